"""The decode kernel against the reference in float64: on a GPU (-m gpu), and its source compiled for the CPU.

The second (host_cuda.h) runs the same arithmetic and indices, thread by thread.
"""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_sfa import SparseKVCache, sfa_attention, sfa_attention_with_kvcache, topk_sparsify
from flash_sfa.impl import cuda_decode, cuda_decode_all
from oracle import poisoned

HERE = Path(__file__).parent
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HEADERS = {"decode": "cuda", "decode_all": "decode_all"}


class HostKernels:
    def __init__(self, config, source="decode"):
        self.source = source
        folder = Path(tempfile.mkdtemp())
        library = folder / "decode.so"
        macros = [f"-D{name}={value}" for name, value in config.macros()]
        subprocess.run(
            ["g++", "-O0", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", "-w", "-I", HERE, "-I",
             cuda_decode.SOURCE.parent, f'-DSFA_HOST="host_{HEADERS[source]}.h"', *macros, "-o", library,
             HERE / f"host_{source}.cpp"],
            check=True,
        )  # fmt: skip
        self.library = ctypes.CDLL(str(library))
        shutil.rmtree(folder)

    def launch(self, name, grid, threads, params, shared=0):
        kernel = (f"sfa_{self.source}", "sfa_combine").index(name)
        assert self.library.launch(kernel, *grid, ctypes.byref(params), ctypes.sizeof(params), shared) == 0


@functools.cache
def host_kernels(config, source="decode"):
    return HostKernels(config, source)


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    with poisoned():
        yield


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param == "cuda":
        return "cuda"
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    monkeypatch.setattr(cuda_decode, "load", lambda config, device: host_kernels(config))
    monkeypatch.setattr(cuda_decode_all, "load", lambda config, device: host_kernels(config, "decode_all"))
    return "cpu"


def normal(*shape, seed=0, dtype=FP32, device="cpu"):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).to(device)


def filled(
    lengths, *, device, hkv=2, d=64, dv=64, topk=8, dense_dims=0, page_size=16, dtype=FP32, v_dtype=None,
    change=None,
):  # fmt: skip
    """A cache with sequences of these lengths and three pages to spare; change(k, v) edits what goes in."""
    pages = sum(-(-n // page_size) for n in lengths) + 3
    cache = SparseKVCache(
        num_kv_heads=hkv, head_dim=d, v_head_dim=dv, topk=topk, dense_dims=dense_dims, page_size=page_size,
        max_tokens=pages * page_size, dtype=dtype, v_dtype=v_dtype, device=device,
    )  # fmt: skip
    cache.alloc(len(lengths))
    shape = (len(lengths), max(lengths), hkv)
    k, v = (normal(*shape, dim, seed=seed, dtype=dtype, device=device) for dim, seed in ((d, 1), (dv, 2)))
    if change is not None:
        change(k, v)
    cache.append(k, v, lengths=lengths)
    return cache


def attend(cache, q, *, topk_q=None, window=(-1, 0), scale=None, drop=False, ids=None, span=1, coded=False, **options):
    """coded: the kernel gets the code of q instead of q. By decode.cu, unless every_row=True."""
    options = {"every_row": False} | options
    scale = cache.head_dim**-0.5 if scale is None else scale
    topk = None if topk_q == "dense" else topk_q or cache.topk
    ids = list(cache._ids) if ids is None else ids
    if coded:
        q, topk = topk_sparsify(q, topk, dense_dims=cache.dense_dims), None
    return cuda_decode.attend(q, cache, 0, ids, window, scale, drop, True, span=span, topk=topk, **options)


def exact(cache, q, topk_q, window, scale, drop, dtype):
    """`sfa_attention` of every sequence by itself on the stored codes, and torch's math attention; both in a dtype."""
    outs, lses, plains = [], [], []
    for row, seq_id in enumerate(cache._ids):
        keys, v = (x[None].to(dtype) for x in (cache.gather(0, seq_id)[0].to_dense(), cache.gather(0, seq_id)[1]))
        query = q[row, None]
        if topk_q != "dense":
            query = topk_sparsify(query, topk_q or cache.topk, dense_dims=cache.dense_dims).to_dense()
        query = query.to(dtype)
        if v.shape[1] == 0:
            nothing = query.new_zeros(*query.shape[1:3], v.shape[-1])
            outs.append(nothing)
            lses.append(query.new_full((query.shape[2], query.shape[1]), -torch.inf))
            plains.append(nothing)
            continue
        if drop:
            code = topk_sparsify(q[row, None], topk_q or cache.topk).to(dtype)
            key_code = cache.gather(0, seq_id)[0].map(lambda x: x[None]).to(dtype)
            out, lse = sfa_attention(
                code, key_code, v, window_size=window, softmax_scale=scale, nonoverlap="drop", return_lse=True,
                impl="reference",
            )  # fmt: skip
        else:
            out, lse = sfa_attention(
                query, keys, v, topk=cache.head_dim, window_size=window, softmax_scale=scale, return_lse=True,
                impl="reference",
            )  # fmt: skip
        outs.append(out[0])
        lses.append(lse[0])
        plains.append(plain_attention(query, keys, v, window, scale)[0])
    return torch.stack(outs), torch.stack(lses), torch.stack(plains)


def plain_attention(query, keys, v, window, scale):
    sq, sk = query.shape[1], keys.shape[1]
    at, to = torch.arange(sq, device=v.device)[:, None] + sk - sq, torch.arange(sk, device=v.device)
    seen = torch.ones(sq, sk, dtype=torch.bool, device=v.device)
    seen &= (window[0] < 0) | (to >= at - window[0])
    seen &= (window[1] < 0) | (to <= at + window[1])
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (query, keys, v)), attn_mask=seen, scale=scale, enable_gqa=True
        ).transpose(1, 2)


def compare(cache, q, *, topk_q=None, window=(-1, 0), scale=None, drop=False, **options):
    """The kernel within the budget of the reference; returns what the kernel returned."""
    scale = cache.head_dim**-0.5 if scale is None else scale
    out, lse, misplaced, rows_read = attend(
        cache, q, topk_q=topk_q, window=window, scale=scale, drop=drop, **options
    )  # fmt: skip
    wanted, wanted_lse, _ = exact(cache, q, topk_q, window, scale, drop, torch.float64)
    reference, _, plain = exact(cache, q, topk_q, window, scale, drop, FP32)
    assert torch.equal(out.isnan(), wanted.isnan()) and torch.equal(lse.isnan(), wanted_lse.isnan())
    assert (misplaced == 0).all()
    good = wanted.isfinite()
    if good.any():
        noise = (reference - wanted)[good].abs().max()
        if cache.dtype == FP32 and not drop and plain[good].isfinite().all():
            noise = noise.maximum((plain - wanted)[good].abs().max())
        budget = 2 * noise + torch.finfo(cache.dtype).eps * wanted[good].abs().max()
        error = (out - wanted)[good].abs().max()
        assert error <= budget, f"error {float(error)}, budget {float(budget)}"
    seen = wanted_lse.isfinite()
    assert torch.equal(lse[~seen].nan_to_num(), wanted_lse[~seen].to(FP32).nan_to_num())
    assert ((lse - wanted_lse).abs() <= 1e-5 * (1 + wanted_lse.abs()))[seen].all()
    return out, lse, rows_read


@pytest.mark.parametrize(
    ("dtype", "group", "page_size"),
    [(BF16, 1, 16), (BF16, 4, 128), (BF16, 8, 256), (FP16, 4, 16), (FP32, 1, 128), (FP32, 8, 100)],
)
def test_ragged_lengths(dtype, group, page_size, device):
    cache = filled([300, 0, 1, 129, 513], page_size=page_size, dtype=dtype, device=device)
    _, _, rows = compare(cache, normal(5, 1, 2 * group, 64, seed=3, dtype=dtype, device=device))
    if group == 1:
        assert rows[1].sum() == 0 and (rows[4] < 513).all() and (rows[4] > 200).all()


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("v_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(("group", "dv", "dense_dims"), [(1, 64, 0), (4, 128, 0), (1, 48, 5), (8, 256, 0)])
def test_eight_bit_values(group, dv, dense_dims, v_dtype, dtype, device):
    """Against the stored values, scale times 8 bits."""

    def small_and_large(k, v):
        v[0, 3], v[0, 4] = 0.0, v[0, 4] * 30

    cache = filled(
        [300, 0, 129], dv=dv, dense_dims=dense_dims, dtype=dtype, v_dtype=v_dtype, device=device, change=small_and_large
    )
    compare(cache, normal(3, 1, 2 * group, 64, seed=3, dtype=dtype, device=device))


@pytest.mark.parametrize(("group", "v_dtype"), [(1, None), (4, None), (8, torch.float8_e4m3fn)], ids=str)
def test_fp32_is_a_few_roundings_off(group, v_dtype, device):
    """One row of V is large, so that the rounding of every later addition shows."""

    def change(k, v):
        v[0, 4] *= 30

    cache = filled([1000], dv=256, dtype=FP32, v_dtype=v_dtype, device=device, change=change)
    q = 2 * normal(1, 1, 2 * group, 64, seed=3, device=device)
    out = attend(cache, q)[0]
    wanted = exact(cache, q, None, (-1, 0), 64**-0.5, False, torch.float64)[0]
    assert (out - wanted).abs().max() <= 3 * torch.finfo(FP32).eps * wanted.abs().max()


@pytest.mark.parametrize("sq", [2, 3, 16])
@pytest.mark.parametrize("window", [(-1, 0), (40, 0), (200, 0), (-1, -1), (3, 5), (0, 0)])
@pytest.mark.parametrize("group", [1, 4])
def test_several_queries_and_windows(sq, window, group, device):
    cache = filled([300, 2, 129], device=device)
    compare(cache, normal(3, sq, 2 * group, 64, seed=3, device=device), window=window)


@pytest.mark.parametrize(
    ("d", "dv", "topk", "dense_dims", "dtype", "topk_q", "group"),
    [
        (128, 128, 8, 0, BF16, None, 1), (256, 256, 8, 0, BF16, None, 1), (128, 24, 7, 0, FP16, 16, 3),
        (60, 36, 5, 0, FP32, 2, 1), (64, 33, 1, 0, BF16, None, 3), (32, 64, 32, 0, BF16, None, 1),
        (320, 80, 16, 0, BF16, None, 3), (320, 80, 9, 0, FP32, 3, 1), (128, 128, 8, 16, BF16, None, 1),
        (64, 64, 8, 3, FP32, None, 3), (64, 64, 8, [60, 1, 7, 9, 11], FP16, 4, 1), (64, 64, 8, 0, BF16, "dense", 3),
        (64, 64, 8, [3, 9], FP32, "dense", 1), (64, 512, 8, 0, FP32, None, 3), (96, 96, 20, 0, BF16, None, 1),
        (64, 64, 12, 12, BF16, None, 3), (128, 128, 8, 0, BF16, None, 4), (128, 128, 8, 0, BF16, None, 8),
        (128, 128, 8, 0, BF16, None, 2), (1024, 64, 8, 0, FP16, None, 1),
    ],
)  # fmt: skip
def test_shapes(d, dv, topk, dense_dims, dtype, topk_q, group, device):
    cache = filled([200, 31], d=d, dv=dv, topk=topk, dense_dims=dense_dims, dtype=dtype, device=device)
    compare(cache, normal(2, 2 if group == 3 else 1, 2 * group, d, seed=3, dtype=dtype, device=device), topk_q=topk_q)


@pytest.mark.parametrize(("staged", "ahead"), [(0, 0), (0, 1), (1, 0)])
@pytest.mark.parametrize("group", [1, 4])
def test_other_ways_to_load(staged, ahead, group, device):
    cache = filled([700, 31, 129], dtype=BF16, d=128, dv=128, device=device)
    q = normal(3, 1, 2 * group, 128, seed=3, dtype=BF16, device=device)
    compare(cache, q, STAGED=staged, AHEAD=ahead, UNROLL=8 if group == 1 else 4)


@pytest.mark.parametrize(
    ("d", "topk", "dense_dims", "dtype", "topk_q", "group", "drop"),
    [
        (128, 8, 0, BF16, None, 1, False), (128, 8, 0, BF16, None, 4, False), (128, 8, 0, BF16, None, 4, True),
        (60, 5, 0, FP16, 9, 3, False), (60, 5, 0, FP16, 9, 1, True), (320, 80, 0, FP32, 3, 1, False),
        (64, 8, [60, 1, 7], FP32, None, 4, False), (64, 8, 16, BF16, 64, 1, False), (32, 32, 0, BF16, None, 2, False),
        (64, 8, 0, BF16, 63, 2, False), (64, 8, 0, FP16, 64, 1, True), (96, 8, 0, FP32, 33, 8, False),
        (1024, 8, 0, BF16, 200, 1, False),
    ],
)  # fmt: skip
def test_the_kernel_ranks_the_features_of_q(d, topk, dense_dims, dtype, topk_q, group, drop, device):
    """The same as on the code of q: with ties, zeros of both signs, non-finite and subnormal features."""
    cache = filled([200, 31], d=d, dv=32, topk=topk, dense_dims=dense_dims, dtype=dtype, device=device)
    q = normal(2, 3, 2 * group, d, seed=3, dtype=dtype, device=device)
    q[0, 0] = q[0, 0].round()
    q[0, 1, :, ::2], q[0, 1, :, 1::2], q[0, 1, :, 3] = 0.0, -0.0, 1.0
    q[1, 0, 0, 5], q[1, 0, 1, 7], q[1, 1, 1, :20] = torch.nan, torch.inf, torch.nan
    q[1, 2] *= torch.finfo(dtype).tiny
    options = {"topk_q": topk_q, "drop": drop}
    for raw, coded in zip(attend(cache, q, **options), attend(cache, q, coded=True, **options)):
        torch.testing.assert_close(raw, coded, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("coded", [False, True])
def test_a_scale_that_is_not_positive(coded, group, scale, device):
    """A kept feature counts though its product is 0 or -0."""
    cache = filled([300], topk=2, dtype=BF16, device=device)
    q = normal(1, 1, 2 * group, 64, seed=3, dtype=BF16, device=device)
    _, _, rows = compare(cache, q, scale=scale, coded=coded)
    assert group > 1 or (rows < 300).all()
    compare(cache, q, scale=scale, coded=coded, drop=True)


@pytest.mark.parametrize("v_dtype", [FP16, FP32])
def test_v_in_another_dtype(v_dtype, device):
    cache = filled([200, 31], dtype=BF16, v_dtype=v_dtype, device=device)
    compare(cache, normal(2, 1, 2, 64, seed=3, dtype=BF16, device=device))


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("window", [(-1, 0), (40, 0)])
def test_drop(group, window, device):
    cache = filled([300, 5], topk=2, device=device)
    compare(cache, normal(2, 2, 2 * group, 64, seed=3, device=device), drop=True, window=window)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("s", [-100.0, -20.0, 0.0, 5.0, 80.0])
@pytest.mark.parametrize(
    "features", [[0] * 300, [0] * 299 + [1], [0] * 127 + [1] + [0] * 172, [0] * 100 + [1] * 28 + [0] * 128, [1] * 200]
)
@pytest.mark.parametrize("group", [1, 2])
def test_all_overlap_rows_stay_stable(features, s, dtype, group, device):
    d, n = 32, len(features)

    def change(k, v):
        k.zero_()[0, torch.arange(n), 0, torch.tensor(features)] = 1.0

    cache = filled([n], hkv=1, d=d, dv=24, topk=1, page_size=128, dtype=dtype, device=device, change=change)
    q = torch.zeros(1, 1, group, d, dtype=dtype, device=device)
    q[0, 0, 0, 0] = s
    if group == 2:  # overlaps with nothing
        q[0, 0, 1, 2] = s
    compare(cache, q, scale=1.0)


@pytest.mark.parametrize("span", [1, 2, 4])
@pytest.mark.parametrize("max_splits", [1, 2, 128])
def test_splits(span, max_splits, device):
    cache = filled([1200, 129], device=device)
    for sq, window in ((1, (-1, 0)), (2, (600, 0))):
        q = normal(2, sq, 2, 64, seed=3, device=device)
        compare(cache, q, span=span, max_splits=max_splits, window=window)


@pytest.mark.parametrize("growth", [1.0, 8.0])
@pytest.mark.parametrize(
    ("topk", "dv", "dtype", "v_dtype", "group"),
    [(8, 64, BF16, None, 1), (1, 128, FP32, None, 1), (2, 64, FP16, torch.int8, 1), (8, 33, FP32, None, 1),
     (1, 64, BF16, None, 4), (4, 128, BF16, torch.int8, 8)],
)  # fmt: skip
def test_rows_that_wait_in_the_queue_for_the_next_block(topk, dv, dtype, v_dtype, group, growth, device):
    """One part, so that a warp takes five blocks; with growth the largest score is found late."""

    def change(k, v):
        k *= torch.linspace(1.0, growth, 2500, device=k.device)[None, :, None, None].to(k.dtype)

    cache = filled([2500, 130], topk=topk, dv=dv, dtype=dtype, v_dtype=v_dtype, device=device, change=change)
    q = normal(2, 1, 2 * group, 64, seed=3, dtype=dtype, device=device)
    _, _, rows = compare(cache, q, max_splits=1)
    assert group > 1 or (rows[0] < 2000).all()


@pytest.mark.parametrize("group", [1, 4])
def test_rows_that_wait_keep_away_from_who_does_not_see_them(group, device):
    """Tokens 125 to 127 alone wait; the first query sees all of them, the second all but token 125."""

    def change(k, v):
        v[0, 125, 0, 3] = torch.nan

    q, options = normal(1, 2, 2 * group, 64, seed=3, device=device), {"window": (1298 - 125, 0), "max_splits": 1}
    clean = attend(filled([1300], device=device), q, **options)[0]
    out = attend(filled([1300], device=device, change=change), q, **options)[0]
    assert out[0, 0, :group, 3].isnan().all() and out.isnan().sum() == group
    torch.testing.assert_close(out[0, 1], clean[0, 1])


def test_results_do_not_depend_on_the_batch_or_on_the_pages(device):
    results = []
    for page_size, rows in ((16, [0, 1, 2]), (100, [0]), (128, [2, 0])):
        cache = filled([1200, 129, 700], page_size=page_size, device=device)
        q = normal(3, 1, 4, 64, seed=3, device=device)[rows]
        results.append(attend(cache, q, ids=rows)[0][rows.index(0)])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("what", ["k", "v", "q"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("v_dtype", [None, torch.int8, torch.float8_e4m3fn], ids=str)
def test_non_finite_values_stay_where_they_are_seen(what, value, group, v_dtype, device):
    q = normal(2, 6, 2 * group, 64, seed=3, device=device)
    clean = compare(filled([200, 200], v_dtype=v_dtype, device=device), q)[0]
    if what == "q":
        q[0, 4, 0, 3] = value

    def change(k, v):
        if what != "q":
            (k if what == "k" else v)[0, 197, 0, 3] = value

    out = attend(filled([200, 200], v_dtype=v_dtype, device=device, change=change), q)[0]
    if what == "q":
        assert out[0, 4, 0].isnan().all()
        out[0, 4, 0] = clean[0, 4, 0]
    else:  # queries 0 to 2 stand before token 197
        assert not out[0, 3:, :group].isfinite().all((1, 2)).any()
        out[0, 3:, :group] = clean[0, 3:, :group]
    torch.testing.assert_close(out, clean)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("dtype", "group"), [(BF16, 1), (FP16, 4), (BF16, 8)])
@pytest.mark.parametrize("drop", [False, True])
def test_values_that_are_not_finite_beside_rows_that_do_not_see_them(value, dtype, group, drop, device):
    """A query that does not see a token does not meet its V, though another row of the read does."""

    def change(k, v):
        v[0, 198, 0, 3], v[0, 197, 0, 16] = value, value

    q = normal(2, 4, 2 * group, 64, seed=3, dtype=dtype, device=device)
    clean = attend(filled([200, 200], dtype=dtype, device=device), q, drop=drop)[0]
    out = attend(filled([200, 200], dtype=dtype, device=device, change=change), q, drop=drop)[0]
    assert out[0, 0].isfinite().all() and (drop or not out[0, 2:, :group, 3].isfinite().any())
    seen = out.isfinite()
    torch.testing.assert_close(out[seen], clean[seen])
    assert (~seen).sum() > 0 and seen[..., [c for c in range(64) if c not in (3, 16)]].all()


def test_rows_without_overlap_are_not_read(device):
    cache = filled([300], device=device)
    q = normal(1, 1, 2, 64, seed=3, device=device)
    out, _, rows = compare(cache, q)
    kept_q = topk_sparsify(q, 8).to_dense()[0, 0] != 0
    kept_k = cache.gather(0, 0)[0].to_dense() != 0
    needed = (kept_q[:, None] & kept_k.transpose(0, 1)).any(-1)
    # The last block has 44 tokens: so few may be read whole.
    assert (needed.sum(-1) <= rows[0]).all() and (rows[0] <= needed[:, :256].sum(-1) + 44).all()
    pool = cache._layers[0]
    for head in range(2):
        for token in (~needed[head, :256]).nonzero()[:, 0].tolist():
            pool.v[pool.sequences[0].pages[token // 16], head, token % 16] = torch.nan
    assert torch.equal(attend(cache, q)[0], out)


def test_pages_that_were_shared_and_moved(device):
    cache = filled([300, 200, 50], page_size=64, device=device)
    cache.fork(0)
    cache.reorder([1, 0, 2, 0])
    cache.truncate([0, 3], [131, 290])
    k, v = normal(2, 20, 2, 64, seed=8, device=device), normal(2, 20, 2, 64, seed=9, device=device)
    cache.append(k, v, seq_ids=[2, 1])
    q = normal(4, 1, 4, 64, seed=3, device=device)
    out = compare(cache, q)[0]
    torch.testing.assert_close(out, sfa_attention_with_kvcache(q, cache, impl="cpu"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dense_dims", [0, [60, 3]])
def test_the_forms_of_q_and_topk(dense_dims, device, monkeypatch):
    """Through the public call: what the kernel ranks, what it is given, and q in another dtype under autocast."""
    monkeypatch.setattr(cuda_decode, "unsupported", lambda *args, **options: None)
    cache = filled([200, 31], dense_dims=dense_dims, dtype=BF16, device=device)
    q = normal(2, 2, 4, 64, seed=3, device=device)
    with torch.autocast(device, dtype=BF16):
        cast, wanted = (sfa_attention_with_kvcache(q, cache, impl=impl) for impl in ("cuda", "reference"))
    torch.testing.assert_close(cast, wanted, rtol=2e-2, atol=2e-2)
    q = q.to(BF16)
    assert torch.equal(cast, sfa_attention_with_kvcache(q, cache, impl="cuda"))
    strided = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(cast, sfa_attention_with_kvcache(strided, cache, impl="cuda"))
    for topk in (8, (3, 8), (None, 8), (62, 8), (100, 8)):
        out, wanted = (sfa_attention_with_kvcache(q, cache, topk=topk, impl=impl) for impl in ("cuda", "reference"))
        torch.testing.assert_close(out, wanted, rtol=2e-2, atol=2e-2)
    code = topk_sparsify(q, 3, dense_dims=dense_dims)
    torch.testing.assert_close(
        sfa_attention_with_kvcache(code, cache, impl="cuda"),
        sfa_attention_with_kvcache(q, cache, topk=(3, 8), impl="cuda"), rtol=2e-2, atol=1e-3,
    )  # fmt: skip
    with pytest.raises(ValueError, match="differs from the cache"):
        sfa_attention_with_kvcache(q, cache, topk=7, impl="cuda")


@pytest.mark.parametrize(("seed", "topk"), [(0, 5), (1, 64), (2, 33)])
def test_ties_of_q_go_to_the_lowest_feature(seed, topk, device):
    """A key on one feature overlaps exactly if the rule keeps that feature of q."""
    d = 96

    def change(k, v):
        k.zero_()[0, torch.arange(d), 0, torch.arange(d)] = 1.0

    cache = filled([d], hkv=1, d=d, dv=8, topk=1, dtype=BF16, device=device, change=change)
    q = (normal(1, 1, 1, d, seed=seed) * 2).round().to(BF16).to(device)
    rows = attend(cache, q, topk_q=topk, drop=True)[3]
    assert rows.tolist() == [[topk]]
    out, lse, _, _ = attend(cache, q, topk_q=topk, drop=True)
    kept = topk_sparsify(q, topk)
    scores = (kept.values.double() * d**-0.5)[0, 0, 0]
    v = cache.gather(0, 0)[1][kept.indices[0, 0, 0].long(), 0].double()
    torch.testing.assert_close(out[0, 0, 0].double(), scores.softmax(0) @ v, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse[0, 0, 0].double(), scores.logsumexp(0), rtol=1e-5, atol=1e-5)


def test_nothing_to_do(device):
    cache = filled([5], device=device)
    out, lse, _, rows_read = attend(cache, normal(0, 2, 4, 64, device=device), ids=[])
    assert out.shape == (0, 2, 4, 64) and lse.shape == (0, 4, 2) and rows_read.shape == (0, 2)
    out, lse, _, _ = attend(cache, normal(1, 0, 4, 64, device=device))
    assert out.shape == (1, 0, 4, 64) and lse.shape == (1, 4, 0)


# Only on a GPU


def steps(cache, q, k, v, impl):
    return sfa_attention_with_kvcache(q, cache, k=k, v=v, impl=impl, return_lse=True)


@pytest.mark.gpu
def test_auto_takes_the_kernel_and_equals_the_others(monkeypatch):
    caches = [filled([300, 0, 129], dtype=BF16, device="cuda") for _ in range(3)]
    calls, original = [], cuda_decode.attend
    monkeypatch.setattr(cuda_decode, "attend", lambda *a, **o: calls.append(1) or original(*a, **o))
    for step in range(5):
        q, k, v = (normal(3, 1 + step, h, 64, seed=step + h, dtype=BF16, device="cuda") for h in (4, 2, 2))
        results = [steps(cache, q, k, v, impl) for cache, impl in zip(caches, ("auto", "cpu", "reference"))]
        assert len(calls) == step + 1
        for out, lse in results[1:]:
            torch.testing.assert_close(results[0][0], out, rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(results[0][1], lse, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_what_the_kernel_refuses_and_what_auto_does_then():
    q = normal(1, 1, 4, 64, dtype=FP32, device="cuda")
    cache = filled([40], device="cuda")
    with pytest.raises(NotImplementedError, match="gradient"):
        sfa_attention_with_kvcache(q.requires_grad_(), cache, impl="cuda")
    assert sfa_attention_with_kvcache(q, cache).requires_grad
    q = q.detach()
    with pytest.raises(NotImplementedError, match="16 query tokens"):
        sfa_attention_with_kvcache(q.expand(-1, 17, -1, -1), cache, impl="cuda")
    assert sfa_attention_with_kvcache(q.expand(-1, 17, -1, -1), cache).shape == (1, 17, 4, 64)
    with pytest.raises(NotImplementedError, match="float64"):
        sfa_attention_with_kvcache(q.double(), filled([40], dtype=torch.float64, device="cuda"), impl="cuda")
    assert (sfa_attention_with_kvcache(q, cache, tolerance=0.5) == sfa_attention_with_kvcache(q, cache)).all()


@pytest.mark.gpu
def test_a_decode_is_captured_in_a_graph_and_replayed_on_other_queries():
    cache = filled([300, 0, 1000], dtype=BF16, device="cuda")
    q = normal(3, 1, 4, 64, dtype=BF16, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        sfa_attention_with_kvcache(q, cache, impl="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = sfa_attention_with_kvcache(q, cache, impl="cuda")
    for seed in (1, 2):
        q.copy_(normal(3, 1, 4, 64, seed=seed, dtype=BF16, device="cuda"))
        graph.replay()
        assert torch.equal(out, sfa_attention_with_kvcache(q, cache, impl="cuda"))


@pytest.mark.gpu
def test_a_decode_does_not_wait_for_the_device():
    cache = filled([300, 0, 1000], dtype=BF16, device="cuda")
    q = normal(3, 1, 4, 64, dtype=BF16, device="cuda")
    sfa_attention_with_kvcache(q, cache, impl="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        sfa_attention_with_kvcache(q, cache, impl="cuda", return_lse=True, return_stats=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 4])
def test_a_long_sequence(group):
    """100,000 tokens, all splits in use; bf16 against the plain PyTorch implementation in fp32."""
    cache = filled([100_000], d=128, dv=128, page_size=256, dtype=BF16, device="cuda")
    q = normal(1, 1, 2 * group, 128, seed=3, dtype=BF16, device="cuda")
    out, lse, _, _ = attend(cache, q, span=4)
    wanted, wanted_lse = sfa_attention_with_kvcache(q, cache, impl="cpu", return_lse=True)
    torch.testing.assert_close(out, wanted, rtol=2**-7, atol=1e-4)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_another_stream_and_another_thread():
    import threading

    cache = filled([300, 70], dtype=BF16, device="cuda")
    q = normal(2, 1, 4, 64, dtype=BF16, device="cuda")
    wanted = sfa_attention_with_kvcache(q, cache, impl="cuda")
    torch.cuda.synchronize()
    got = []

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            got.append(sfa_attention_with_kvcache(q, cache, impl="cuda"))
            torch.cuda.synchronize()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert torch.equal(got[0], wanted)

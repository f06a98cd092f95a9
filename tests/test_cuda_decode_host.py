"""The decode kernel's source compiled for the CPU (host_cuda.h): its arithmetic and indices against the reference."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from flash_sfa import SparseKVCache, sfa_attention, sfa_attention_with_kvcache, topk_sparsify
from flash_sfa.impl import cuda_decode

HERE = Path(__file__).parent
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


class HostKernels:
    def __init__(self, config):
        folder = Path(tempfile.mkdtemp())
        library = folder / "decode.so"
        macros = [f"-D{name}={value}" for name, value in config.macros()]
        subprocess.run(
            ["g++", "-O1", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", "-w", "-I", HERE, "-I",
             cuda_decode.SOURCE.parent, '-DSFA_HOST="host_cuda.h"', *macros, "-o", library, HERE / "host_decode.cpp"],
            check=True,
        )  # fmt: skip
        self.library = ctypes.CDLL(str(library))
        shutil.rmtree(folder)

    def launch(self, name, grid, threads, params):
        kernel = ("sfa_decode", "sfa_combine").index(name)
        assert self.library.launch(kernel, *grid, ctypes.byref(params), ctypes.sizeof(params)) == 0


@functools.cache
def host_kernels(config):
    return HostKernels(config)


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch):
    """Runs the launcher on CPU tensors; fresh memory holds NaN."""
    monkeypatch.setattr(cuda_decode, "load", lambda config, device: host_kernels(config))
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape, seed=0, dtype=FP32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def filled(lengths, *, hkv=2, d=64, dv=64, topk=8, dense_dims=0, page_size=16, dtype=FP32, v_dtype=None, k_scale=1.0):
    cache = SparseKVCache(
        num_kv_heads=hkv, head_dim=d, v_head_dim=dv, topk=topk, dense_dims=dense_dims, page_size=page_size,
        max_tokens=sum(-(-n // page_size) for n in lengths) * page_size + 3 * page_size, dtype=dtype, v_dtype=v_dtype,
    )  # fmt: skip
    cache.alloc(len(lengths))
    n = max(lengths)
    if n:
        k, v = (
            normal(len(lengths), n, hkv, d, seed=1, dtype=dtype),
            normal(len(lengths), n, hkv, dv, seed=2, dtype=dtype),
        )
        cache.append(k * k_scale, v, lengths=lengths)
    return cache


def compare(cache, q, *, topk_q=None, window=(-1, 0), scale=None, drop=False, span=1, max_splits=128, **overrides):
    """The kernel against the reference in float64; returns the kernel's results."""
    scale = cache.head_dim**-0.5 if scale is None else scale
    topk_q = cache.topk if topk_q is None else topk_q
    code = q if topk_q == "dense" else topk_sparsify(q, topk_q, dense_dims=cache.dense_dims)
    ids = list(cache._ids)
    out, lse, _, rows_read = cuda_decode.attend(
        code, cache, 0, ids, window, scale, drop, True, span=span, max_splits=max_splits, **overrides
    )
    expected, expected_lse = exact(cache, code, window, scale, drop)
    plain, _ = exact(cache, code, window, scale, drop, FP32)
    assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(lse.isnan(), expected_lse.isnan())
    eps = torch.finfo(cache.dtype).eps
    good = expected.isfinite()
    size = expected[good].abs().max() if good.any() else 0.0
    error = (out - expected)[good].abs().max() if good.any() else 0.0
    noise = (plain - expected)[good].abs().max() if good.any() else 0.0
    assert error <= 2 * noise + eps * size, (float(error), float(noise), float(size))
    seen = expected_lse.isfinite()
    assert torch.equal(lse[~seen].nan_to_num(), expected_lse[~seen].to(FP32).nan_to_num())
    assert ((lse - expected_lse).abs() <= 1e-5 * (1 + expected_lse.abs()))[seen].all()
    return out, lse, rows_read


class Rows:
    """code[row, None] of a SparseCode."""

    def __init__(self, code):
        self.code = code

    def __getitem__(self, at):
        return self.code.map(lambda x: x[at])


def exact(cache, code, window, scale, drop, dtype=torch.float64):
    """`sfa_attention` of every sequence by itself, on the stored codes."""
    outs, lses = [], []
    code = code if isinstance(code, torch.Tensor) else Rows(code)
    for row, seq_id in enumerate(cache._ids):
        keys, v = cache.gather(0, seq_id)
        mine = code[row, None].to(dtype)
        out, lse = sfa_attention(
            mine, keys.map(lambda x: x[None]).to(dtype), v[None].to(dtype), window_size=window, softmax_scale=scale,
            nonoverlap="drop" if drop else "zero", return_lse=True, impl="reference",
        )  # fmt: skip
        outs.append(out[0])
        lses.append(lse[0])
    return torch.stack(outs), torch.stack(lses)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("page_size", [16, 128, 100])
def test_ragged_lengths(dtype, group, page_size):
    cache = filled([300, 0, 1, 129, 513], page_size=page_size, dtype=dtype)
    q = normal(5, 1, 2 * group, 64, seed=3, dtype=dtype)
    _, _, rows = compare(cache, q)
    if group == 1:
        assert rows[1].sum() == 0 and (rows[4] < 513).all() and (rows[4] > 200).all()


@pytest.mark.parametrize("sq", [2, 3, 16])
@pytest.mark.parametrize("window", [(-1, 0), (40, 0), (200, 0), (-1, -1), (3, 5), (0, 0)])
@pytest.mark.parametrize("group", [1, 4])
def test_several_queries_and_windows(sq, window, group):
    compare(filled([300, 2, 129]), normal(3, sq, 2 * group, 64, seed=3), window=window)


@pytest.mark.parametrize(
    ("d", "dv", "topk", "dense_dims", "dtype", "topk_q"),
    [
        (128, 128, 8, 0, BF16, None), (256, 256, 8, 0, BF16, None), (128, 24, 7, 0, FP16, 16), (60, 36, 5, 0, FP32, 2),
        (64, 33, 1, 0, BF16, None), (32, 64, 32, 0, BF16, None), (320, 80, 16, 0, BF16, None), (320, 80, 9, 0, FP32, 3),
        (128, 128, 8, 16, BF16, None), (64, 64, 8, 3, FP32, None), (64, 64, 8, [60, 1, 7, 9, 11], FP16, 4),
        (64, 64, 8, 0, BF16, "dense"), (64, 64, 8, [3, 9], FP32, "dense"), (64, 512, 8, 0, FP32, None),
        (96, 96, 20, 0, BF16, None), (64, 64, 12, 12, BF16, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("group", [1, 3])
def test_shapes(d, dv, topk, dense_dims, dtype, topk_q, group):
    cache = filled([200, 31], d=d, dv=dv, topk=topk, dense_dims=dense_dims, dtype=dtype)
    compare(cache, normal(2, 2, 2 * group, d, seed=3, dtype=dtype), topk_q=topk_q)


@pytest.mark.parametrize("v_dtype", [FP16, FP32])
def test_v_in_another_dtype(v_dtype):
    compare(filled([200, 31], dtype=BF16, v_dtype=v_dtype), normal(2, 1, 2, 64, seed=3, dtype=BF16))


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("window", [(-1, 0), (40, 0)])
def test_drop(group, window):
    compare(filled([300, 5], topk=2), normal(2, 2, 2 * group, 64, seed=3), drop=True, window=window)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("s", [-100.0, -20.0, 0.0, 5.0, 80.0])
@pytest.mark.parametrize(
    "features", [[0] * 300, [0] * 299 + [1], [0] * 127 + [1] + [0] * 172, [0] * 100 + [1] * 28 + [0] * 128, [1] * 200]
)
@pytest.mark.parametrize("group", [1, 2])
def test_all_overlap_rows_stay_stable(features, s, dtype, group):
    d, n = 32, len(features)
    cache = SparseKVCache(num_kv_heads=1, head_dim=d, topk=1, max_tokens=n, dtype=dtype, v_head_dim=24)
    cache.alloc(1)
    k = torch.nn.functional.one_hot(torch.tensor(features), d).to(dtype)[None, :, None]
    cache.append(k, normal(1, n, 1, 24, seed=3, dtype=dtype))
    q = torch.zeros(1, 1, group, d, dtype=dtype)
    q[..., 0] = s
    if group == 2:
        q[0, 0, 1] = 0.0
        q[0, 0, 1, 2] = s
    compare(cache, q, scale=1.0)


@pytest.mark.parametrize("span", [1, 2, 4])
@pytest.mark.parametrize("max_splits", [1, 2, 128])
def test_splits(span, max_splits):
    compare(filled([1200, 129]), normal(2, 1, 2, 64, seed=3), span=span, max_splits=max_splits)
    compare(filled([1200, 129]), normal(2, 2, 2, 64, seed=3), span=span, max_splits=max_splits, window=(600, 0))


def test_results_do_not_depend_on_the_batch():
    cache = filled([1200, 129, 700])
    q = normal(3, 1, 4, 64, seed=3)
    whole = compare(cache, q)[0]
    for row in range(3):
        alone = cuda_decode.attend(
            topk_sparsify(q[row, None], 8), cache, 0, [row], (-1, 0), 64**-0.5, False, False, span=1
        )
        assert torch.equal(alone[0][0], whole[row])


@pytest.mark.parametrize("what", ["k", "v", "q"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("group", [1, 4])
def test_non_finite_values_stay_where_they_are_seen(what, value, group):
    q = normal(2, 6, 2 * group, 64, seed=3)
    clean = compare(filled([200, 200]), q)[0]
    k, v = normal(2, 200, 2, 64, seed=1), normal(2, 200, 2, 64, seed=2)
    cache = filled([0, 0])
    cache = SparseKVCache(num_kv_heads=2, head_dim=64, topk=8, max_tokens=600, dtype=FP32)
    cache.alloc(2)
    if what == "q":
        q[0, 4, 0, 3] = value
    else:
        (k if what == "k" else v)[0, 197, 0, 3] = value
    cache.append(k, v)
    out = cuda_decode.attend(topk_sparsify(q, 8), cache, 0, [0, 1], (-1, 0), 0.125, False, False, span=1)[0]
    if what == "q":
        assert out[0, 4, 0].isnan().all()
        out[0, 4, 0] = clean[0, 4, 0]
    else:
        assert not out[0, 3:, :group].isfinite().all((1, 2)).any()
        out[0, 3:, :group] = clean[0, 3:, :group]
    torch.testing.assert_close(out, clean)


def test_rows_without_overlap_are_not_read():
    cache = filled([300])
    q = normal(1, 1, 2, 64, seed=3)
    out, _, rows = compare(cache, q)
    kept_q, kept_k = (x.to_dense()[0] != 0 for x in (topk_sparsify(q, 8), cache.gather(0, 0)[0].map(lambda x: x[None])))
    needed = (kept_q[0][:, None] & kept_k.transpose(0, 1)).any(-1)
    # All but the last block, of 44 tokens, of which few may be unread: a short block may be read whole.
    assert (needed.sum(-1) <= rows[0]).all() and (rows[0] <= needed[:, :256].sum(-1) + 44).all()
    pool = cache._layers[0]
    for head in range(2):
        for token in (~needed[head, :256]).nonzero()[:, 0].tolist():
            pool.v[pool.sequences[0].pages[token // 16], head, token % 16] = torch.nan
    again = cuda_decode.attend(topk_sparsify(q, 8), cache, 0, [0], (-1, 0), 0.125, False, False, span=1)[0]
    assert torch.equal(again, out)


def test_against_the_cpu_implementation_through_pages_that_moved():
    cache = filled([300, 200, 50])
    cache.fork(0)
    cache.reorder([1, 0, 2, 0])
    cache.truncate([0, 3], [131, 290])
    k, v = normal(4, 20, 2, 64, seed=8), normal(4, 20, 2, 64, seed=9)
    cache.append(k[:2], v[:2], seq_ids=[2, 1])
    q = normal(4, 1, 4, 64, seed=3)
    compare(cache, q)
    want = sfa_attention_with_kvcache(q, cache, impl="cpu")
    got = cuda_decode.attend(topk_sparsify(q, 8), cache, 0, [0, 1, 2, 3], (-1, 0), 0.125, False, False)[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)

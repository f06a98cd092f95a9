"""impl="intersect": the layout by feature against a dense construction, the kernels on the CPU and on a GPU.

On the CPU g++ compiles intersect.cu (host_intersect.h) and runs it thread by thread: arithmetic and indices, not speed.
"""

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_sfa import SparseCode, select_impl, sfa_attention, topk_sparsify
from flash_sfa.impl import intersect
from oracle import check_budget, check_lse, members_of_code, oracle, poisoned, torch_math, visible

HERE = Path(__file__).parent
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class HostKernels:
    def __init__(self, config, device):
        folder = Path(tempfile.mkdtemp())
        library = folder / "intersect.so"
        subprocess.run(
            ["g++", "-O1", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", "-w", "-I", HERE, "-I",
             intersect.SOURCE.parent, '-DSFA_HOST="host_intersect.h"', *(f"-D{k}={v}" for k, v in config.macros()),
             "-o", library, HERE / "host_intersect.cpp"],
            check=True,
        )  # fmt: skip
        self.library = ctypes.CDLL(str(library))
        shutil.rmtree(folder)
        assert self.library.shared_bytes() == config.shared

    def launch(self, name, grid, threads, params, shared=0):
        self.library.launch(("sfa_pages", "sfa_intersect").index(name), grid[0], ctypes.byref(params))


host_kernels = functools.cache(HostKernels)


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        return "cuda"
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    monkeypatch.setattr(intersect, "load", host_kernels)
    return "cpu"


def normal(*shape, seed=0, dtype=FP32, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


# The layout


def expanded(pages, code, page):
    """Dense rows from the lists, and where a list has an entry."""
    b, hkv, n_pages, _ = pages.offsets.shape
    rows = torch.zeros(b, n_pages * page, hkv, code.dim, dtype=code.dtype)
    kept = torch.zeros_like(rows, dtype=torch.bool)
    for s in range(b):
        for h in range(hkv):
            for n in range(n_pages):
                ends = pages.offsets[s, h, n].tolist()
                for u in range(code.dim):
                    for at in range(ends[u], ends[u + 1]):
                        key = int(pages.ids[s, h, n, at])
                        if key == page % 256 and at > ends[u] and page != 256:
                            assert pages.values[s, h, n, at] == 0, "padding"
                            continue
                        assert key < page
                        assert not kept[s, n * page + key, h, u], "an entry is there once"
                        rows[s, n * page + key, h, u] = pages.values[s, h, n, at]
                        kept[s, n * page + key, h, u] = True
    return rows, kept


def check_layout(pages, code, page, group):
    sk = code.values.shape[1]
    rows, kept = expanded(pages, code, page)
    assert torch.equal(rows[:, :sk], code.to_dense())
    assert torch.equal(kept[:, :sk], members_of_code(code)) and not kept[:, sk:].any()
    assert (pages.offsets % group == 0).all() and pages.ids.shape[-1] >= int(pages.offsets[..., -1].max())
    counts = kept.unflatten(1, (-1, page)).sum(2).movedim(2, 1)
    assert torch.equal(pages.offsets.diff(dim=-1).long(), -(-counts // group) * group), "lists are filled up to groups"
    for ids, ends in zip(pages.ids.flatten(0, 2).tolist(), pages.offsets.flatten(0, 2).tolist()):
        for first, end in zip(ends, ends[1:]):
            real = [key for key in ids[first:end] if key < page]
            assert real == sorted(real), "ids ascend in a list"


@settings(max_examples=25, deadline=None)
@given(
    sk=st.integers(1, 150), d=st.sampled_from([3, 16, 64, 300]), topk=st.integers(1, 9),
    page_group=st.sampled_from([(32, 1), (32, 4), (64, 2), (128, 1), (128, 4), (256, 1)]),
    seed=st.integers(0, 99), ties=st.booleans(),
)  # fmt: skip
def test_layout_equals_a_dense_construction(sk, d, topk, page_group, seed, ties):
    x = normal(2, sk, 2, d, seed=seed)
    code = topk_sparsify(x.round() if ties else x, topk)
    page, group = page_group
    check_layout(intersect.by_feature(code, page=page, group=group), code, page, group)


def short_code(device="cpu", d=64):
    """A code whose rows hold 4, 3, 2 or 1 entries and repeat the last with value 0."""
    code = topk_sparsify(normal(2, 200, 2, d, seed=3), 4)
    values, indices = code.values.clone(), code.indices.clone()
    for n in range(200):
        real = 4 - n % 4
        values[:, n, :, real:] = 0
        indices[:, n, :, real:] = indices[:, n, :, real - 1 : real]
    return SparseCode(values.to(device), indices.to(device), dim=d)


def test_layout_of_codes_that_fill_up():
    check_layout(intersect.by_feature(short_code()), short_code(), 128, 4)


@pytest.mark.parametrize(("d", "dtype"), [(64, BF16), (300, FP32)], ids=str)
def test_the_kernel_builds_the_same_layout(device, d, dtype):
    for code in (topk_sparsify(normal(2, 200, 2, d, dtype=dtype, device=device), 4), short_code(device, d).to(dtype)):
        config = intersect.configure(d, 64, 4, 4, dtype, False, (9, 0))
        with poisoned():
            built = intersect.build_pages(code, config)
        plain = intersect.by_feature(code)
        used = torch.arange(plain.ids.shape[-1], device=device) < plain.offsets[..., -1:]
        assert torch.equal(built.offsets, plain.offsets)
        assert torch.equal(built.ids[used], plain.ids[used]) and torch.equal(built.values[used], plain.values[used])


@pytest.mark.parametrize("options", [{"page": 100}, {"group": 3}, {"group": 4, "page": 256}])
def test_layout_refuses(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        intersect.by_feature(short_code(), **options)
    with pytest.raises(ValueError, match="dense_dims"):
        intersect.by_feature(topk_sparsify(normal(1, 4, 1, 16), 2, dense_dims=2))


# Attention


def run(q, k, v, *, topk=4, window=(-1, -1), drop=False, scale=None, **overrides):
    """intersect.forward with what it must give: out, lse, exact result, comparator."""
    pair = topk if isinstance(topk, tuple) else (topk, topk)
    codes = [x if isinstance(x, SparseCode) else topk_sparsify(x, n) for x, n in zip((q, k), pair)]
    scale = codes[0].dim ** -0.5 if scale is None else scale
    with poisoned():
        out, lse = intersect.forward(*codes, v, window, scale, drop, **overrides)
    rows = [code.to_dense() for code in codes]
    kept = [members_of_code(code) for code in codes]
    seen = visible(q.shape[1], k.shape[1], window, device=v.device)
    grad = torch.zeros_like(out)
    exact = oracle(*rows, v, *kept, seen, grad, drop=drop, scale=scale)
    comparator = torch_math(*rows, v, *kept, seen, grad, drop=drop, scale=scale)
    return out, lse, exact, comparator


# sq, sk, hq, hkv, d, dv, topk, dtype, window, drop, more
GRID = {
    "causal": (70, 70, 2, 1, 64, 64, 4, BF16, (-1, 0), False, {}),
    "two_pages": (33, 239, 2, 2, 64, 64, 4, BF16, (-1, -1), False, {}),
    "drop": (70, 150, 1, 1, 64, 64, 4, BF16, (-1, 0), True, {}),
    "one": (1, 1, 1, 1, 64, 64, 4, BF16, (-1, 0), False, {}),
    "window": (150, 140, 1, 1, 64, 64, 4, BF16, (17, 9), False, {}),
    "window_drop": (40, 190, 1, 1, 64, 64, 4, BF16, (5, -1), True, {}),
    "more_queries": (300, 63, 1, 1, 64, 64, 4, BF16, (-1, 0), False, {}),
    "negative_scale": (40, 63, 1, 1, 64, 64, 4, BF16, (-1, -1), False, {"scale": -0.7}),
    "no_scale": (40, 63, 1, 1, 64, 64, 4, BF16, (-1, 0), False, {"scale": 0.0}),
    "large_scale": (40, 190, 1, 1, 64, 64, 4, BF16, (-1, 0), False, {"scale": 30.0}),
    "fp32": (113, 140, 2, 1, 64, 80, 4, FP32, (-1, 0), False, {}),
    "fp32_drop": (40, 70, 1, 1, 64, 80, 4, FP32, (-1, -1), True, {}),
    "fp16_dv": (40, 140, 1, 1, 64, 200, (3, 7), FP16, (-1, 0), False, {}),
    "wide": (33, 130, 1, 1, 320, 96, (16, 8), BF16, (-1, 0), True, {}),
    "small_blocks": (70, 140, 1, 1, 64, 64, 4, BF16, (-1, 0), False, {"WARPS": 2, "CTAS": 1, "AHEAD": 0}),
}


@pytest.mark.parametrize(
    ("name", "ahead"),
    [(name, 0) for name in GRID] + [(n, 1) for n in ("causal", "window_drop", "fp32", "fp16_dv", "wide")],
)
def test_forward(name, ahead, device):
    sq, sk, hq, hkv, d, dv, topk, dtype, window, drop, more = GRID[name]
    q, k, v = (
        normal(2, n, h, w, seed=i, dtype=dtype, device=device)
        for i, (n, h, w) in enumerate(((sq, hq, d), (sk, hkv, d), (sk, hkv, dv)))
    )
    out, lse, exact, comparator = run(q, k, v, topk=topk, window=window, drop=drop, **({"AHEAD": ahead} | more))
    assert out.dtype == dtype and lse.dtype == FP32
    check_budget("out", out, exact.out, comparator.out)
    check_lse(lse, exact.lse)


@pytest.mark.parametrize("name", ["causal", "drop", "window", "large_scale", "wide_v", "two_groups"])
def test_forward_by_warpgroups(name, device):
    """P V by wgmma, as on Hopper."""
    if device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma is for Hopper")
    grid = GRID | {
        "wide_v": (200, 270, 2, 1, 64, 128, 8, FP16, (-1, 0), False, {}),
        "two_groups": (300, 140, 1, 1, 64, 64, 4, BF16, (-1, 0), False, {"WARPS": 8, "CTAS": 1}),
    }
    sq, sk, hq, hkv, d, dv, topk, dtype, window, drop, more = grid[name]
    q, k, v = (
        normal(2, n, h, w, seed=i, dtype=dtype, device=device)
        for i, (n, h, w) in enumerate(((sq, hq, d), (sk, hkv, d), (sk, hkv, dv)))
    )
    more |= {"AHEAD": int(name != "drop")}
    out, lse, exact, comparator = run(q, k, v, topk=topk, window=window, drop=drop, **more, WGMMA=1)
    check_budget("out", out, exact.out, comparator.out)
    check_lse(lse, exact.lse)
    other, lse_other = run(q, k, v, topk=topk, window=window, drop=drop, **more, WGMMA=0)[:2]
    assert torch.equal(lse, lse_other)
    torch.testing.assert_close(out, other, atol=1e-2, rtol=1e-2)


def test_a_view_of_fused_values_is_read_in_place(device):
    q, k = (normal(1, 40, 2, 64, seed=i, dtype=BF16, device=device) for i in range(2))
    v = normal(1, 2, 40, 128, seed=2, dtype=BF16, device=device)[..., 64:].transpose(1, 2)
    assert intersect._aligned(v) is v
    out, _, exact, comparator = run(q, k, v)
    check_budget("out", out, exact.out, comparator.out)


def test_stored_zeros_are_members_in_drop_mode(device):
    """A pair whose only common entry is 0, or whose product is -0 or underflows, is kept."""
    codes = [
        SparseCode(
            torch.tensor(values, dtype=BF16, device=device).view(1, -1, 1, 1),
            torch.tensor(indices, dtype=torch.uint8, device=device).view(1, -1, 1, 1), dim=64,
        )
        for values, indices in (([0.0, -0.0, 1e-30, -1.0], [1, 1, 2, 3]), ([-1.0, 0.0, -1e-30, 2.0], [1, 1, 2, 5]))
    ]  # fmt: skip
    v = normal(1, 4, 1, 64, dtype=BF16, device=device)
    out, lse, exact, _ = run(*codes, v, drop=True, topk=1)
    check_lse(lse, exact.lse)
    assert lse[0, 0, 3] == -torch.inf and not out[0, 3].any()
    torch.testing.assert_close(out[0, :2, 0].double(), v[0, :2, 0].double().mean(0).expand(2, 64), atol=0.02, rtol=0)
    assert torch.equal(out[0, 2], v[0, 2])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("which", range(3), ids="qkv")
def test_non_finite_values_stay_where_they_are_seen(device, which, dtype, value):
    inputs = [normal(1, 150, 1, 64, seed=i, dtype=dtype, device=device) for i in range(3)]
    results = []
    for spoil in (False, True):
        if spoil:
            inputs[which][0, 100, 0, 5] = value
        q, k = (topk_sparsify(x, 4) for x in inputs[:2])
        results.append(intersect.forward(q, k, inputs[2], (-1, 0), 0.125, False))
    (out, lse), (bad_out, bad_lse) = results
    before, after = slice(0, 100), slice(101, 150)
    assert torch.equal(bad_out[:, before], out[:, before]) and torch.equal(bad_lse[..., before], lse[..., before])
    assert not bad_out[:, 100].isfinite().any() if which != 1 else True
    if which == 0:
        assert torch.equal(bad_out[:, after], out[:, after]) and not bad_lse[..., 100].isfinite().any()
    if which == 1:
        shares = (q.indices[0, 100:, 0] == 5).any(-1)
        assert shares.any() and not bad_out[0, 100:][shares].isfinite().any()
        assert not bad_lse[0, 0, 100:][shares].isfinite().any()
    if which == 2:
        assert not bad_out[:, after].isfinite().any() and torch.equal(bad_lse, lse)


def test_a_non_finite_query_is_spoiled_without_a_shared_feature(device):
    q, k = (normal(1, 3, 1, 64, seed=i, dtype=BF16, device=device) for i in range(2))
    q[..., :32], k[..., 32:] = 0, 0
    q[0, 1, 0, 40] = torch.inf
    out, lse = intersect.forward(topk_sparsify(q, 4), topk_sparsify(k, 4), k, (-1, 0), 0.125, False)
    assert not out[0, 1].isfinite().any() and not lse[0, 0, 1].isfinite()
    assert out[0, [0, 2]].isfinite().all() and lse[0, 0, [0, 2]].isfinite().all()


def test_results_repeat_to_the_bit_and_do_not_depend_on_the_batch(device):
    q, k, v = (normal(2, 150, 2, 64, seed=i, dtype=BF16, device=device) for i in range(3))
    codes = [topk_sparsify(x, 4) for x in (q, k)]
    out, lse = intersect.forward(*codes, v, (-1, 0), 0.125, False)
    again = intersect.forward(*codes, v, (-1, 0), 0.125, False)
    alone = intersect.forward(*(code.map(lambda x: x[1:]) for code in codes), v[1:], (-1, 0), 0.125, False)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    assert torch.equal(out[1:], alone[0]) and torch.equal(lse[1:], alone[1])


def test_no_keys(device):
    q, v = normal(1, 3, 2, 64, dtype=BF16, device=device), normal(1, 0, 2, 64, dtype=BF16, device=device)
    code, none = topk_sparsify(q, 4), topk_sparsify(v, 4)
    out, lse = intersect.forward(code, none, v, (-1, 0), 1.0, False)
    assert not out.any() and (lse == -torch.inf).all()


# Choice, refusals, compilation


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is for machines without a GPU")
def test_needs_a_gpu():
    x = normal(1, 8, 2, 64)
    with pytest.raises(NotImplementedError, match=r"intersect.*CUDA"):
        sfa_attention(x, x, x, topk=4, impl="intersect")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"topk": (4, None)}, "dense"), ({"dense_dims": True}, "dense"), ({"topk": (33, 4)}, "33"),
        ({"d": 1025}, "1025"), ({"dv": 257}, "257"), ({"dtype": torch.float64}, "float64"), ({"masked": True}, "mask"),
        ({"packed": True}, "packed"), ({"dropout_p": 0.1}, "dropout"), ({}, None),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_done(change, text, monkeypatch):
    monkeypatch.setattr(intersect.nvrtc, "missing", lambda index: None)
    call = {"dtype": BF16, "d": 64, "dv": 64, "topk": (4, 4), "dense_dims": False, "masked": False, "packed": False,
            "dropout_p": 0.0} | change  # fmt: skip
    reason = intersect.unsupported(torch.device("cuda"), *(call.pop(n) for n in ("dtype", "d", "dv", "topk")), **call)
    assert reason is None if text is None else text in reason


def test_auto_does_not_take_it(monkeypatch):
    monkeypatch.setattr(intersect, "unsupported", lambda *args, **kwargs: None)
    q, k, v = (normal(1, 8, 2, d, dtype=BF16) for d in (512, 512, 64))
    assert select_impl(q, k, v, topk=8)["forward"] != "intersect"
    choice = select_impl(q, k, v, topk=8, impl="intersect")
    assert (choice["forward"], choice["backward"]) == ("intersect", "none")


def test_under_compile_without_a_break(monkeypatch):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    monkeypatch.setattr(intersect, "load", host_kernels)
    monkeypatch.setattr(intersect.nvrtc, "missing", lambda index: None)
    real = intersect.unsupported
    monkeypatch.setattr(
        intersect, "unsupported", lambda device, *rest, **more: real(torch.device("cuda"), *rest, **more)
    )
    q, k, v = (normal(1, 40, 2, 64, seed=i, dtype=BF16) for i in range(3))

    def call(q, k, v):
        return sfa_attention(q, k, v, topk=4, causal=True, impl="intersect", return_lse=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v)
    assert all(torch.equal(a, b) for a, b in zip(compiled, call(q, k, v)))
    wanted = sfa_attention(q, k, v, topk=4, causal=True, impl="reference")
    torch.testing.assert_close(compiled[0], wanted, atol=2e-2, rtol=2e-2)
    out, _ = call(q.requires_grad_(), k, v)
    with pytest.raises(NotImplementedError, match="backward"):
        out.sum().backward()


@pytest.mark.gpu
def test_through_the_public_function():
    q, k, v = (normal(2, 150, 2, 64, seed=i, dtype=BF16, device="cuda").requires_grad_() for i in range(3))
    assert select_impl(q, k, v, topk=8, impl="intersect")["forward"] == "intersect"
    out, lse = sfa_attention(q, k, v, topk=8, causal=True, impl="intersect", return_lse=True)
    wanted, lse_wanted = sfa_attention(q, k, v, topk=8, causal=True, impl="reference", return_lse=True)
    torch.testing.assert_close(out, wanted, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse, lse_wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(NotImplementedError, match="backward"):
        out.sum().backward()
    compiled = torch.compile(lambda *x: sfa_attention(*x, topk=8, causal=True, impl="intersect"), fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(q, k, v), out)


CONFIGS = [
    (128, 128, 8, BF16, False), (1024, 128, 32, BF16, False), (64, 64, 8, BF16, True), (256, 256, 8, FP16, False),
    (128, 128, 8, FP32, False),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_90a"])
def test_compiles_almost_without_spills(arch, config, tmp_path):
    triton = pytest.importorskip("triton")
    assert intersect.nvrtc.cuda_core() is not None, "cuda-core is part of the test extra"
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    file = tmp_path / "intersect.cubin"
    d, dv, topk, dtype, drop = config
    groups = {"WGMMA": int(dtype != FP32), "AHEAD": int(topk < 32)} if arch == "sm_90a" else {"WGMMA": 0}
    chosen = intersect.configure(d, dv, topk, topk, dtype, drop, (int(arch[3]), 0), **groups)
    file.write_bytes(intersect.nvrtc.compile_file(intersect.SOURCE, chosen.macros(), arch))
    usage = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    assert {kernel for kernel, *_ in found} == {"sfa_pages", "sfa_intersect"}
    for kernel, registers, stack, shared in found:
        print(f"{arch} {kernel}: {registers} registers, {stack} bytes of stack, {shared} of shared memory")
        assert int(stack) <= 64 and int(shared) <= 48 * 1024


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (12, 0)])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_every_allowed_shape_has_a_configuration(capability, dtype):
    for d in (32, 64, 128, 256, 512, 1024):
        for dv in (16, 64, 128, 256):
            for topk in (1, 8, 16, 32):
                most = {(8, 0): 163, (9, 0): 227}.get(capability, 99) * 1024
                if dtype == FP32 and topk == 32 and d >= 512 and most < 100 * 1024:
                    with pytest.raises(NotImplementedError, match="shared memory"):
                        intersect.configure(d, dv, topk, topk, dtype, False, capability)
                    continue
                config = intersect.configure(d, dv, topk, topk, dtype, False, capability)
                assert config.shared <= most and config.WARPS >= 1

"""The spanning grid and the rules on a CUDA device (pytest -m gpu), against the oracle."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import test_attention_rules as rules
from flash_sfa import select_impl, sfa_attention, sfa_attention_varlen, topk_sparsify
from flash_sfa.impl import hopper_forward
from oracle import BF16, FP16, FP32, FP64, Case, check_case
from test_grid import CASES
from test_varlen import RAGGED, check, ends

pytestmark = pytest.mark.gpu
IMPLS = ("reference", "sdpa", "triton")
FULL_MASKS = ("full_mask", "causal_mask", "window_full_mask")  # triton takes key padding only
TRITON_CASES = [
    case for case in CASES if case.sees not in FULL_MASKS and case.dtype != FP64 and max(case.d, case.dv) <= 256
]


@pytest.fixture(autouse=True)
def _exact_fp32() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    yield


@pytest.mark.parametrize("case", CASES, ids=str)
def test_grid_on_cuda(case: Case) -> None:
    check_case(case, "reference", "cuda")
    if not case.may_drop and case.dtype != FP64:
        check_case(case, "sdpa", "cuda")


@pytest.mark.parametrize("case", TRITON_CASES, ids=str)
def test_triton_grid_on_cuda(case: Case) -> None:
    check_case(case, "triton", "cuda")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("lengths_q", "lengths_k", "case"), RAGGED, ids=str)
def test_varlen_on_cuda(lengths_q: list[int], lengths_k: list[int], case: Case, impl: str) -> None:
    case = Case(**{**vars(case), "batch": 1, "lengths": (sum(lengths_q), sum(lengths_k))})
    check(case, lengths_q, lengths_k, impl, "cuda")


@pytest.mark.parametrize("dtype", (BF16, FP16, FP32))
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sees", ("all", "causal", "key_mask", "window"))
def test_gradient_through_lse_on_cuda(sees: str, impl: str, dtype: torch.dtype) -> None:
    rules.test_gradient_through_lse(sees, impl, dtype, "cuda")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", (torch.nan, -torch.inf))
@pytest.mark.parametrize("which", range(3), ids="qkv")
@pytest.mark.parametrize("sees", rules.VISIBILITY)
def test_non_finite_rows_on_cuda(sees: str, which: int, value: float, impl: str) -> None:
    if impl == "triton" and sees == "empty rows":
        pytest.skip("a full mask, which triton refuses (tested in test_bad_input)")
    rules.test_non_finite_rows(sees, which, value, impl, "cuda")


@pytest.mark.parametrize("value", (torch.nan, torch.inf))
@pytest.mark.parametrize("which", range(3), ids="qkv")
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("impl", ("auto", "triton"))
def test_non_finite_values_in_long_rows_stay_where_they_are_seen(
    impl: str, causal: bool, which: int, value: float
) -> None:
    """Who does not see the value keeps the result; other sequences and heads to the bit."""
    inputs = [torch.randn(2, 700, h, 64, device="cuda", dtype=BF16) for h in (4, 2, 2)]
    grad = torch.randn(2, 700, 4, 64, device="cuda", dtype=BF16)
    options: Any = {"topk": 8, "causal": causal, "impl": impl, "return_lse": True}
    results = []
    for spoil in (False, True):
        if spoil:
            inputs[which][1, 300, 1, 5] = value
        wrt = [x.clone().requires_grad_() for x in inputs]
        out, lse = sfa_attention(*wrt, **options)
        results.append((out.detach(), lse.detach(), *torch.autograd.grad(out, wrt, grad)))
    (out, lse, *grads), (out_bad, lse_bad, *grads_bad) = results
    head = slice(1, 2) if which == 0 else slice(2, 4)
    others = [h for h in range(4) if not head.start <= h < head.stop]
    assert torch.equal(out[0], out_bad[0]) and torch.equal(lse[0], lse_bad[0])
    assert torch.equal(out[1, :, others], out_bad[1, :, others]), "the other heads"
    if causal or which == 0:
        torch.testing.assert_close(out_bad[1, :300], out[1, :300], atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(lse_bad[1, :, :300], lse[1, :, :300])
        torch.testing.assert_close(grads_bad[0][1, :300], grads[0][1, :300], atol=2e-2, rtol=2e-2)
    assert not out_bad[1, 300, head].isfinite().any()
    if which == 0:
        assert torch.equal(out[1, 301:], out_bad[1, 301:])
    for clean, spoiled in zip(grads, grads_bad):
        if impl == "triton":  # cuDNN's backward is not deterministic
            assert torch.equal(clean[0], spoiled[0])
        torch.testing.assert_close(spoiled[0], clean[0], atol=2e-2, rtol=2e-2)
        assert spoiled.isfinite().all(), "no gradient flows through what is spoiled"


def heads(n: int, h: int, d: int, dtype: torch.dtype = BF16) -> list[Tensor]:
    return [torch.randn(1, n, h, d, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)]


def test_memory_is_linear_in_the_length() -> None:
    n, h, d = 32768, 4, 128
    q, k, v = heads(n, h, d)
    sfa_attention(q[:, :64], k[:, :64], v[:, :64], topk=8, causal=True).sum().backward()
    for x in (q, k, v):
        x.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = sfa_attention(q, k, v, topk=8, causal=True)
    kept = torch.cuda.memory_allocated() - before
    out.backward(out)
    peak = torch.cuda.max_memory_allocated() - before
    dense = n * h * d * 2
    assert kept <= dense + 2 * (n * h * 8 * 3) + n * h * 4 + 2**20, "out, two codes and lse"
    assert peak <= 20 * dense < n * n, f"{peak / dense:.1f} dense tensors"


def test_more_than_two_to_the_31_elements() -> None:
    """The first and the last heads of a large call equal a small call, forward and backward."""
    n, group, d = 16384, 129, 128
    q, k, v = (torch.randn(1, n, h, d, device="cuda", dtype=BF16) for h in (8 * group, 8, 8))
    assert q.numel() > 2**31
    q.requires_grad_()
    out = sfa_attention(q, k, v, topk=8, causal=True)
    (grad,) = torch.autograd.grad(out, q, q.detach())
    for part, head in ((slice(0, 2), slice(0, 1)), (slice(-2, None), slice(-1, None))):
        few = q.detach()[:, :, part].contiguous().requires_grad_()
        small = sfa_attention(few, k[:, :, head], v[:, :, head], topk=8, causal=True)
        torch.testing.assert_close(out[:, :, part], small, atol=2e-2, rtol=2e-2)
        (wanted,) = torch.autograd.grad(small, few, few.detach())
        torch.testing.assert_close(grad[:, :, part], wanted, atol=2e-2, rtol=2e-2)


def test_no_hidden_synchronisation() -> None:
    q, k, v = heads(64, 4, 64)
    for options in ({"causal": True}, {"window_size": (9, 0)}, {"attn_mask": torch.ones(64, device="cuda").bool()}):
        call: Any = lambda options=options: sfa_attention(q, k, v, topk=8, return_lse=True, **options)[0].sum()  # noqa: E731
        call().backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph() -> None:
    q, k, v = (x.detach() for x in heads(128, 4, 64))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            sfa_attention(q, k, v, topk=8, causal=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sfa_attention(q, k, v, topk=8, causal=True)
    for x in (q, k, v):
        x.normal_()
    graph.replay()
    torch.testing.assert_close(out, sfa_attention(q, k, v, topk=8, causal=True))


def test_choice_and_refusals() -> None:
    q, k, v = heads(64, 4, 64)
    hopper = hopper_forward.missing(q.device.index) is None
    assert select_impl(q, k, v, topk=8)["forward"] == ("cuda" if hopper else "sdpa")
    assert select_impl(*(x.half() for x in (q, k, v)), topk=8)["forward"] == "sdpa"
    assert select_impl(q, k, v, topk=8, deterministic=True)["backward"] == "triton"
    assert select_impl(q, k, v, topk=8, window_size=(9, 0))["forward"] == "triton"
    assert select_impl(q, k, v, topk=8, attn_mask=torch.ones(64, 64, device="cuda").bool())["forward"] == "sdpa"
    with pytest.raises(NotImplementedError, match="deterministic"):
        sfa_attention(q, k, v, topk=8, deterministic=True, impl="sdpa")
    wide = [x.double() for x in (q, k, v)]
    assert sfa_attention(*wide, topk=8).dtype == FP64
    with pytest.raises(NotImplementedError, match="float64"):
        sfa_attention(*wide, topk=8, impl="sdpa")
    with pytest.raises(ValueError, match="device"):
        sfa_attention(q, k.cpu(), v, topk=8)
    with pytest.raises(ValueError, match="device"):
        sfa_attention(q, k, v, topk=8, attn_mask=torch.ones(64, 64).bool())


def test_cu_seqlens_values_are_checked_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(6, 2, 64, device="cuda")
    wrong = torch.tensor([1, 4, 6], dtype=torch.int32, device="cuda")
    monkeypatch.setenv("FLASH_SFA_CHECK", "1")
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        sfa_attention_varlen(x, x, x, cu_seqlens_q=wrong, cu_seqlens_k=wrong, topk=8)
    with pytest.raises(ValueError, match="device"):
        sfa_attention_varlen(x, x, x, cu_seqlens_q=ends([6]), cu_seqlens_k=ends([6]), topk=8)


def test_max_seqlen_is_required_under_compile() -> None:
    x, cu = torch.randn(6, 2, 64, device="cuda"), ends([2, 4]).cuda()

    def call(**lengths: int) -> Tensor:
        compiled = torch.compile(
            lambda x: sfa_attention_varlen(x, x, x, cu_seqlens_q=cu, cu_seqlens_k=cu, topk=8, **lengths),
            fullgraph=True, backend="aot_eager",
        )  # fmt: skip
        return compiled(x)

    with pytest.raises(Exception, match="max_seqlen_q"):
        call()
    wanted = sfa_attention_varlen(x, x, x, cu_seqlens_q=cu, cu_seqlens_k=cu, topk=8)
    torch.testing.assert_close(call(max_seqlen_q=4, max_seqlen_k=4), wanted)


def test_auto_uses_the_triton_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    from flash_sfa.impl import triton_codes

    used: list[str] = []
    for name in ("topk", "topk_kept", "expand", "keep"):
        original = getattr(triton_codes, name)
        monkeypatch.setattr(triton_codes, name, lambda *a, f=original, n=name, **o: used.append(n) or f(*a, **o))
    q, k, v = heads(64, 4, 64)
    sfa_attention(q, k, v, topk=8, causal=True).sum().backward()
    assert set(used) == {"topk_kept", "expand", "keep"}
    assert topk_sparsify(q.double(), 8).dtype == FP64 and "topk" not in used
    assert topk_sparsify(q.to(FP32), 8, impl="triton").dtype == FP32

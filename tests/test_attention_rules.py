"""Rules of sfa_attention that the grid does not reach: lse's gradient, dropout, non-finite rows, precision."""

import math
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_sfa import SparseCode, sfa_attention, topk_sparsify
from oracle import (
    BF16,
    FP16,
    FP32,
    FP64,
    Case,
    check_budget,
    leaves,
    make_inputs,
    members,
    members_of_code,
    oracle,
    poisoned,
    torch_math,
    visible,
)  # fmt: skip

IMPLS = ("reference", "sdpa")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def test_poison_shows() -> None:
    """The fixture of the grid works: memory that nobody writes is NaN."""
    with poisoned():
        assert torch.empty(1000).isnan().all() and torch.ones(3).new_empty(5, 2).isnan().all()
        assert (torch.empty(1000, dtype=torch.uint8) == 255).all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("dtype", (BF16, FP16, FP32, FP64))
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sees", ("all", "causal", "key_mask", "window"))
def test_gradient_through_lse(sees: str, impl: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Alone and together with out; the bound is that of PyTorch's attention for the part through out."""
    case = Case((63, 113), (4, 2), 64, 80, 8, "named", sees=sees, dtype=dtype)
    x = make_inputs(case, device)
    kept = [members(t, 8, case.dims) for t in (x.q, x.k)]
    seen = visible(*case.lengths, case.window, x.mask, device)
    grad_lse = x.grad_lse.where(seen.any(-1), 0.0)
    arguments = (x.q, x.k, x.v, *kept, seen)
    comparator = torch_math(*arguments, x.grad)
    for grad in (x.grad, torch.zeros_like(x.grad)):
        exact = oracle(*arguments, grad, grad_lse)
        only_out = oracle(*arguments, x.grad)
        wrt = leaves(x.q, x.k, x.v)
        out, lse = sfa_attention(*wrt, **case.options(x.mask), return_lse=True, impl=impl)
        torch.autograd.backward([out, lse], [grad, x.grad_lse.to(lse.dtype)])
        for name, leaf, noise in zip(("dq", "dk", "dv"), wrt, (exact.noise_q, exact.noise_k, exact.noise_v)):
            assert leaf.grad is not None
            error_of_torch = getattr(comparator, name) - getattr(only_out, name)
            check_budget(name, leaf.grad, getattr(exact, name), getattr(exact, name) + error_of_torch, noise)


def test_dropout_drops_and_rescales_single_probabilities() -> None:
    """With V = identity the output is the dropped probabilities themselves."""
    n, p = 64, 0.25
    q, k = torch.randn(2, 50, 4, 16), torch.randn(2, n, 2, 16)
    v = torch.eye(n).expand(2, 2, n, n).transpose(1, 2)
    plain, lse = sfa_attention(q, k, v, topk=4, return_lse=True, impl="reference")
    out, lse_too = sfa_attention(q, k, v, topk=4, dropout_p=p, return_lse=True, impl="reference")
    kept = out != 0
    torch.testing.assert_close(out[kept], plain[kept] / (1 - p))
    assert torch.equal(lse, lse_too), "lse is taken before dropout"
    count = kept.numel()
    assert abs(kept.double().mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / count)
    # Independent over keys and over queries.
    for other in (kept[..., 1:] & kept[..., :-1], kept[:, 1:] & kept[:, :-1], kept[:, :, 1:] & kept[:, :, :-1]):
        assert abs(other.double().mean() - (1 - p) ** 2) < 0.01


def test_dropout_gradient() -> None:
    """The gradient of the draw that was made, written out for its mask."""
    p = 0.3
    inputs = [torch.randn(1, 7, 2, 8, dtype=FP64) for _ in range(3)]
    q, k, v = leaves(*inputs)
    grad = torch.randn(1, 7, 2, 8, dtype=FP64)
    torch.manual_seed(5)
    out = sfa_attention(q, k, v, topk=3, causal=True, dropout_p=p)
    out.backward(grad)
    torch.manual_seed(5)
    eye = torch.eye(7, dtype=FP64).expand(1, 2, 7, 7).transpose(1, 2)
    drawn = sfa_attention(inputs[0], inputs[1], eye, topk=3, causal=True, dropout_p=p).transpose(1, 2)  # b h i j
    prob = sfa_attention(inputs[0], inputs[1], eye, topk=3, causal=True).transpose(1, 2)
    factor = torch.where(prob > 0, drawn / prob, 0.0)
    torch.testing.assert_close(out, torch.einsum("bhij,bjhd->bihd", drawn, inputs[2]))
    kept = [members(x, 3) for x in inputs[:2]]
    dprob = torch.einsum("bihd,bjhd->bhij", grad, inputs[2]) * factor
    dscore = prob * (dprob - (prob * dprob).sum(-1, keepdim=True)) * 8**-0.5
    wanted = (
        torch.einsum("bhij,bjhd->bihd", dscore, inputs[1] * kept[1]) * kept[0],
        torch.einsum("bhij,bihd->bjhd", dscore, inputs[0] * kept[0]) * kept[1],
        torch.einsum("bhij,bihd->bjhd", drawn, grad),
    )
    for leaf, exact in zip((q, k, v), wanted):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, exact)


VISIBILITY: dict[str, dict[str, Any]] = {
    "all": {}, "causal": {"causal": True}, "window": {"window_size": (2, 1)},
    "mask": {"attn_mask": torch.arange(9) % 3 != 1}, "empty rows": {"attn_mask": (torch.arange(9) > 4)[:, None]},
}  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("which", range(3), ids="qkv")
@pytest.mark.parametrize("sees", VISIBILITY)
def test_non_finite_rows(sees: str, which: int, value: float, impl: str, device: str = "cpu") -> None:
    """Who cannot see it is untouched to the bit, in out, lse and the gradients of a loss over everything."""
    options = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in VISIBILITY[sees].items()}
    options |= {"topk": 4, "return_lse": True, "impl": impl}
    inputs = [torch.randn(2, 9, h, 16, device=device) for h in (4, 2, 2)]
    window = {"causal": (-1, 0), "window": (2, 1)}.get(sees, (-1, -1))
    seen = visible(9, 9, window, options.get("attn_mask"), device).expand(2, 4, 9, 9)
    clean = sfa_attention(*inputs, **options)
    inputs[which][1, 4, 1, 3] = value
    wrt = leaves(*inputs)
    out, lse = sfa_attention(*wrt, **options)

    touched = torch.zeros(2, 4, 9, dtype=torch.bool, device=device)
    if which == 0:
        touched[1, 1, 4] = seen[1, 1, 4].any()
    else:
        touched[1, 2:] = seen[1, 2:, :, 4]
    assert torch.equal(out.isfinite().all(-1).transpose(1, 2), ~touched)
    torch.testing.assert_close(out.transpose(1, 2)[~touched], clean[0].transpose(1, 2)[~touched])
    torch.testing.assert_close(lse[~touched], clean[1][~touched])
    empty = ~seen.any(-1)
    assert not out.transpose(1, 2)[empty].any() and (lse[empty] == -torch.inf).all()
    if which < 2:
        assert lse[touched].isnan().all()

    (out.sum() + lse.where(~empty, 0.0).sum()).backward()
    for x in wrt:
        assert x.grad is not None and x.grad.isfinite().all(), "a gradient is not finite"
    if which < 2:
        (grad_q, *_) = (x.grad for x in wrt)
        assert grad_q is not None and not grad_q.transpose(1, 2)[touched].any(), "a spoiled row gives no gradient"


@pytest.mark.parametrize("impl", IMPLS)
def test_everything_is_nan(impl: str) -> None:
    q, k, v = leaves(*(torch.full((1, 5, 2, 8), math.nan) for _ in range(3)))
    out, lse = sfa_attention(q, k, v, topk=2, causal=True, return_lse=True, impl=impl)
    assert out.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", (-100.0, -20.0, 80.0, 300.0))
def test_large_scores(size: float, impl: str) -> None:
    """Scores near `size` with full overlap: exact softmax, no overflow and no cancellation."""
    case = Case((9, 33), (2, 2), 16, 8, 16, sees="causal", batch=1)
    x = make_inputs(case)
    q, k = x.q * 0.1 + 2.0, (x.k * 0.1 + 2.0) * (size / 16.0)
    kept = [torch.ones_like(t, dtype=torch.bool) for t in (q, k)]
    arguments = (q, k, x.v, *kept, visible(9, 33, (-1, 0)), x.grad)
    exact, comparator = oracle(*arguments), torch_math(*arguments)
    out, lse = sfa_attention(q, k, x.v, topk=16, causal=True, return_lse=True, impl=impl)
    assert abs(exact.lse.mean() - size) < 0.3 * abs(size) + 4
    check_budget("out", out, exact.out, comparator.out)
    assert ((lse - exact.lse).abs() <= 1e-5 * (1 + exact.lse.abs())).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_softmax_scale(impl: str) -> None:
    """The default is d ** -0.5 whatever topk is; the scale acts after top-k; zero and negative scales work."""
    q, k, v = (torch.randn(1, 9, 2, 32) for _ in range(3))
    kept = [members(t, 4) for t in (q, k)]
    for scale in (None, 0.0, -0.5, 3):
        out = sfa_attention(q, k, v, topk=4, softmax_scale=scale, impl=impl)
        exact = oracle(q, k, v, *kept, visible(9, 9, (-1, -1)), torch.zeros_like(out), scale=scale)
        torch.testing.assert_close(out.double(), exact.out, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("nonoverlap", ("zero", "drop"))
def test_codes_padded_and_with_their_own_dense_dims(nonoverlap: str) -> None:
    """Codes need not come from topk_sparsify: unequal widths, padding, different always-on features."""
    values = torch.randn(1, 6, 2, 3)
    indices = torch.tensor([[0, 5, 9], [5, 5, 5], [2, 9, 9], [0, 1, 2], [7, 8, 9], [1, 5, 9]], dtype=torch.uint8)
    indices = indices[:, None].expand(6, 2, 3)[None]
    values = values * torch.cat([torch.ones(1, 6, 2, 1), indices.diff(dim=-1) != 0], -1)
    for dims_q, dims_k in (((), ()), ((3, 4), (6,)), ((3, 4), (11, 3)), ((10,), ())):
        sides = [
            SparseCode(values[:, :n], indices[:, :n], dim=12, dense=torch.randn(1, n, 2, len(dims)), dense_dims=dims)
            for n, dims in ((4, dims_q), (6, dims_k))
        ]
        dense = [torch.zeros(1, code.shape[1], 2, 12) for code in sides]
        for row, code in zip(dense, sides):
            row.scatter_add_(-1, code.indices.long(), code.values)[..., list(code.dense_dims)] = code.dense
        v, kept = torch.randn(1, 6, 2, 5), [members_of_code(code) for code in sides]
        grad = torch.randn(1, 4, 2, 5)
        exact = oracle(*dense, v, *kept, visible(4, 6, (-1, 0)), grad, drop=nonoverlap == "drop")
        out, lse = sfa_attention(*sides, v, causal=True, nonoverlap=nonoverlap, return_lse=True)
        torch.testing.assert_close(out.double(), exact.out, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(lse.double(), exact.lse, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_reaches_what_the_codes_were_made_of(impl: str) -> None:
    """Sparsified outside or inside, the gradient of the dense rows is the same."""
    inputs = [torch.randn(2, 9, h, 16) for h in (4, 2, 2)]
    grads = []
    for outside in (False, True):
        q, k, v = leaves(*inputs)
        if outside:
            codes = topk_sparsify(q, 4, dense_dims=[7]), topk_sparsify(k, 3, dense_dims=[7])
            out = sfa_attention(*codes, v, causal=True, impl=impl)
        else:
            out = sfa_attention(q, k, v, topk=(4, 3), dense_dims=[7], causal=True, impl=impl)
        grads.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    for a, b in zip(*grads):
        assert torch.equal(a, b) and a.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_only_what_asks_gets_a_gradient(impl: str) -> None:
    for asking in range(3):
        inputs = [torch.randn(1, 5, 2, 8, requires_grad=i == asking) for i in range(3)]
        out = sfa_attention(*inputs, topk=2, causal=True, impl=impl)
        out.sum().backward()
        assert [x.grad is not None for x in inputs] == [i == asking for i in range(3)]
    with torch.no_grad():
        assert not sfa_attention(*inputs, topk=2, impl=impl).requires_grad
    with torch.inference_mode():
        assert sfa_attention(*(x.detach() for x in inputs), topk=2, impl=impl).shape == (1, 5, 2, 8)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ("codes", "dense side", "mask", "varlen-like view"))
def test_saved_for_backward(kind: str, impl: str) -> None:
    """sdpa keeps codes, v, out and lse: no dense row of a sparse side, nothing of n x n but the caller's mask."""
    n, d, dv = 200, 64, 48
    q, k, v = (torch.randn(1, n, h, w, dtype=BF16, requires_grad=True) for h, w in ((4, d), (2, d), (2, dv)))
    mask = torch.rand(n, n) > 0.2 if kind == "mask" else None
    topk = (8, None) if kind == "dense side" else 8
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        sfa_attention(q, k, v, topk=topk, causal=True, attn_mask=mask, impl=impl)
    sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved if x.dtype != torch.bool}
    code_of_q, code_of_k = n * 4 * 8 * 3, n * 2 * (d * 2 if kind == "dense side" else 8 * 3)
    wanted = code_of_q + code_of_k + n * 2 * dv * 2 + n * 4 * dv * 2 + n * 4 * 4
    if impl == "reference":
        assert sum(sizes.values()) > 4 * n * n * 4, "the hook sees what the reference keeps"
        return
    assert sum(sizes.values()) <= wanted
    assert not any(x.shape[-1] == d for x in saved if kind != "dense side")
    square = [x for x in saved if x.numel() >= n * n]
    assert all(x is mask for x in square) and bool(square) == (mask is not None)


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_stay_as_they_are_and_results_repeat(impl: str) -> None:
    inputs = [torch.randn(2, 9, h, 16) for h in (4, 2, 2)]
    before = [x.clone() for x in inputs]
    results = []
    for _ in range(2):
        wrt = leaves(*inputs)
        out = sfa_attention(*wrt, topk=4, causal=True, impl=impl)
        results.append([out, *torch.autograd.grad(out.sum(), wrt)])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert all(torch.equal(a, b) for a, b in zip(before, inputs))


def test_autocast_mixes_dtypes_and_casts_codes() -> None:
    q, k, v = torch.randn(1, 9, 2, 16), torch.randn(1, 9, 2, 16, dtype=BF16), torch.randn(1, 9, 2, 16, dtype=FP16)
    with pytest.raises(TypeError, match="dtype"):
        sfa_attention(q, k, v, topk=4)
    with torch.autocast("cpu", dtype=BF16):
        out = sfa_attention(q, k, v, topk=4, causal=True)
        from_codes = sfa_attention(topk_sparsify(q, 4), topk_sparsify(k, 4), v, causal=True)
        kept_in_fp32 = sfa_attention(topk_sparsify(q.double(), 4).to(FP32), k, v, topk=4, causal=True)
    wanted = sfa_attention(q.bfloat16(), k, v.bfloat16(), topk=4, causal=True)
    assert out.dtype == from_codes.dtype == kept_in_fp32.dtype == BF16
    assert torch.equal(out, wanted) and torch.equal(from_codes, wanted)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("huge", (2**31, sys.maxsize, 2**70))
def test_huge_windows_and_topk_mean_no_limit(huge: int, impl: str) -> None:
    q, k, v = (torch.randn(1, n, 2, 8) for n in (7, 5, 5))
    for options, same in (
        ({"topk": huge, "causal": True}, {"topk": 8, "causal": True}),
        ({"topk": 2, "window_size": (huge, huge)}, {"topk": 2}),
        ({"topk": 2, "window_size": (huge, 1)}, {"topk": 2, "window_size": (-1, 1)}),
        ({"topk": 2, "window_size": (1, huge)}, {"topk": 2, "window_size": (1, -1)}),
    ):
        wanted: Any = sfa_attention(q, k, v, **same, impl=impl)  # type: ignore[call-overload]
        assert torch.equal(sfa_attention(q, k, v, **options, impl=impl), wanted)  # type: ignore[call-overload]


def test_meta_tensors_have_shapes() -> None:
    q, k, v = (torch.randn(1, 9, h, w, device="meta", dtype=BF16) for h, w in ((4, 16), (2, 16), (2, 8)))
    out, lse = sfa_attention(q, k, v, topk=4, dense_dims=2, causal=True, return_lse=True)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((1, 9, 4, 8), BF16, (1, 4, 9), FP32)
    assert out.is_meta
    with pytest.raises(NotImplementedError, match="meta"):
        sfa_attention(q, k, v, topk=4, impl="sdpa")

"""Rules of sfa_attention that the grid does not reach: lse's gradient, dropout, non-finite rows, scales, precision."""

import math
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_sfa import SparseCode, select_impl, sfa_attention, topk_sparsify
from flash_sfa.impl import sdpa
from oracle import (
    AXES,
    BF16,
    DEVICES,
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


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    case=st.builds(
        Case,
        lengths=st.tuples(st.integers(1, 40), st.integers(1, 40)),
        heads=st.sampled_from([(1, 1), (4, 2), (4, 1), (3, 3)]),
        d=st.sampled_from([5, 8, 20, 33]),
        dv=st.sampled_from([1, 8, 17]),
        topk=st.sampled_from([1, 2, 5, 40, "d", (None, 2), (3, None), (2, 4)]),
        dense=st.sampled_from(AXES["dense"]),
        sees=st.sampled_from(AXES["sees"]),
        nonoverlap=st.sampled_from(AXES["nonoverlap"]),
        dtype=st.sampled_from([FP32, FP64]),
        scale=st.sampled_from([None, 0.5]),
    )
)
def test_random_calls(case: Case) -> None:
    """Shapes that no kernel is made for, through what auto chooses."""
    x = make_inputs(case)
    kept = [members(t, entry, case.dims) for t, entry in zip((x.q, x.k), case.pair)]
    seen = visible(*case.lengths, case.window, x.mask)
    exact = oracle(x.q, x.k, x.v, *kept, seen, x.grad, drop=case.nonoverlap == "drop", scale=case.scale)
    wrt = leaves(x.q, x.k, x.v)
    with poisoned():
        out, lse = sfa_attention(*wrt, **case.options(x.mask), return_lse=True)
        out.backward(x.grad)
    tolerance = 1e-11 if case.dtype == FP64 else 2e-5
    for name, ours in {"out": out, "lse": lse, "dq": wrt[0].grad, "dk": wrt[1].grad, "dv": wrt[2].grad}.items():
        assert ours is not None
        torch.testing.assert_close(
            ours.double(), getattr(exact, name), atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
def test_softmax_scale(impl: str, device: str) -> None:
    """The default is d ** -0.5 whatever topk is; the scale acts after top-k; zero and negative scales work."""
    q, k, v = (torch.randn(1, 9, 2, 32).to(device) for _ in range(3))
    kept = [members(t, 4) for t in (q, k)]
    for scale in (None, 0.0, -0.5, 3):
        out = sfa_attention(q, k, v, topk=4, softmax_scale=scale, impl=impl)
        seen = visible(9, 9, (-1, -1), device=device)
        exact = oracle(q, k, v, *kept, seen, torch.zeros_like(out), scale=scale)
        torch.testing.assert_close(out.double(), exact.out, atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    scale=st.sampled_from([-1.0, 0.0, 1e-3, 2.0]),
    causal=st.booleans(),
    lengths=st.tuples(st.integers(1, 33), st.integers(1, 33)),
    heads=st.sampled_from([(1, 1), (4, 2)]),
    topk=st.sampled_from([1, 3, 16, (None, 3)]),
    dtype=st.sampled_from([FP32, FP64]),
    impl=st.sampled_from(["sdpa", "auto"]),
    seed=st.integers(0, 9),
)
def test_any_scale_equals_the_reference_in_float64(
    scale: float, causal: bool, lengths: tuple[int, int], heads: tuple[int, int], topk: Any, dtype: torch.dtype,
    impl: str, seed: int,
) -> None:  # fmt: skip
    """Out, lse and gradients of all three, lse's part included."""
    x = make_inputs(Case(lengths, heads, 16, 8, batch=1, dtype=dtype), seed=seed)
    options = {"topk": topk, "causal": causal, "softmax_scale": scale, "return_lse": True}

    def run(to: torch.dtype, impl: str) -> list[Tensor]:
        wrt = leaves(*(t.to(to) for t in (x.q, x.k, x.v)))
        out, lse = sfa_attention(*wrt, **options, impl=impl)
        (out * x.grad).sum().add((lse * x.grad_lse).where(lse > -torch.inf, 0.0).sum()).backward()
        return [out.detach(), lse.detach(), *(t.grad for t in wrt if t.grad is not None)]

    ours, exact = run(dtype, impl), run(FP64, "reference")
    tolerance = 1e-11 if dtype == FP64 else 2e-5
    assert len(ours) == 5
    for name, a, e in zip(("out", "lse", "dq", "dk", "dv"), ours, exact):
        torch.testing.assert_close(a.double(), e, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


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


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("causal", (True, False))
def test_full_topk_equals_dense_attention(causal: bool, impl: str) -> None:
    q, k, v = (torch.randn(2, 33, 4, 32) for _ in range(3))
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    dense = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal)
    for topk in (32, 99):
        out = sfa_attention(q, k, v, topk=topk, causal=causal, impl=impl)
        torch.testing.assert_close(out, dense.transpose(1, 2), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", ({"causal": True}, {"nonoverlap": "drop"}, {"window_size": (1, 0)}), ids=str)
def test_gradcheck(options: dict[str, Any], impl: str) -> None:
    """Numerical gradients of out and lse in the values of the codes and in v."""
    if impl == "sdpa" and "nonoverlap" in options:
        pytest.skip("sdpa cannot drop")
    q, k, v = (torch.randn(1, 5, 2, 6, dtype=FP64) for _ in range(3))
    codes = [topk_sparsify(x, 2) for x in (q, k)]

    def call(q_values: Tensor, k_values: Tensor, v: Tensor) -> Any:
        sides = (SparseCode(x, code.indices, dim=6) for x, code in zip((q_values, k_values), codes))
        return sfa_attention(*sides, v, return_lse=True, impl=impl, **options)

    assert torch.autograd.gradcheck(call, leaves(*(code.values for code in codes), v))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_future_token_changes_no_past_output(impl: str) -> None:
    q, k, v = (torch.randn(1, 20, 2, 16) for _ in range(3))
    before = sfa_attention(q, k, v, topk=3, causal=True, impl=impl)
    k[:, 12:], v[:, 12:] = 99.0, -99.0
    after = sfa_attention(q, k, v, topk=3, causal=True, impl=impl)
    assert torch.equal(before[:, :12], after[:, :12]) and not torch.equal(before[:, 12:], after[:, 12:])


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_see_nothing_and_empty_sides(impl: str) -> None:
    q, k, v = leaves(*(torch.randn(1, 6, 2, 8) for _ in range(3)))
    mask = torch.arange(6)[:, None] != 2
    out, lse = sfa_attention(q, k, v, topk=2, attn_mask=mask, return_lse=True, impl=impl)
    assert not out[:, 2].any() and (lse[..., 2] == -torch.inf).all()
    (out.sum() + lse.masked_fill(lse == -torch.inf, 0.0).sum()).backward()
    assert q.grad is not None and not q.grad[:, 2].any()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))
    for sq, sk in ((0, 5), (5, 0)):
        a, b = leaves(torch.randn(1, sq, 2, 8), torch.randn(1, sk, 2, 8))
        out, lse = sfa_attention(a, b, b, topk=2, return_lse=True, impl=impl)
        assert out.shape == (1, sq, 2, 8) and not out.any() and (lse == -torch.inf).all()
        out.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_views_of_a_fused_projection(impl: str) -> None:
    """All three gradients arrive in the one tensor."""
    qkv = torch.randn(2, 13, 3, 4, 16, requires_grad=True)
    sfa_attention(*qkv.unbind(2), topk=3, causal=True, impl=impl).square().sum().backward()
    apart = leaves(*(x.detach().contiguous() for x in qkv.unbind(2)))
    sfa_attention(*apart, topk=3, causal=True, impl=impl).square().sum().backward()
    grads = [x.grad for x in apart if x.grad is not None]
    torch.testing.assert_close(qkv.grad, torch.stack(grads, 2), atol=1e-6, rtol=1e-5)


def test_codes_as_input() -> None:
    """A code brings its own topk and dense_dims, which may be repeated; topk is for the other side."""
    q, k, v = torch.randn(1, 9, 4, 16), torch.randn(1, 9, 2, 16), torch.randn(1, 9, 2, 16)
    want = sfa_attention(q, k, v, topk=(4, 3), dense_dims=2)
    qc, kc = topk_sparsify(q, 4, dense_dims=2), topk_sparsify(k, 3, dense_dims=2)
    assert torch.equal(sfa_attention(qc, kc, v), want)
    assert torch.equal(sfa_attention(qc, kc, v, topk=(4, 3), dense_dims=2), want)
    with pytest.raises(ValueError, match="dense_dims"):
        sfa_attention(qc, kc, v, dense_dims=3)
    assert torch.equal(sfa_attention(q, kc, v, topk=4, dense_dims=2), want)
    assert torch.equal(sfa_attention(qc, k, v, topk=(None, 3), dense_dims=2), want)
    torch.testing.assert_close(sfa_attention(q, kc, v), sfa_attention(q, k, v, topk=(None, 3), dense_dims=2))


def test_drop_counts_stored_zeros_as_members() -> None:
    q = SparseCode(torch.ones(1, 1, 1, 1), torch.tensor([[[[2]]]], dtype=torch.uint8), dim=4)
    k = SparseCode(torch.zeros(1, 2, 1, 1), torch.tensor([2, 3], dtype=torch.uint8).view(1, 2, 1, 1), dim=4)
    v = torch.tensor([1.0, 5.0]).view(1, 2, 1, 1)
    assert sfa_attention(q, k, v, nonoverlap="drop").item() == 1.0
    assert sfa_attention(q, k, v, nonoverlap="zero").item() == 3.0
    out, lse = sfa_attention(q, k.map(lambda x: x[:, 1:]), v[:, 1:], nonoverlap="drop", return_lse=True)
    assert out.item() == 0.0 and lse.item() == -torch.inf


def test_autocast_ranks_in_the_autocast_dtype() -> None:
    q, k, v = (torch.randn(1, 30, 2, 64) for _ in range(3))
    q[..., 1] = q[..., 0] * (1 + 2**-12)  # equal in bf16, so the lower feature wins there
    low = [x.bfloat16() for x in (q, k, v)]
    q.requires_grad_()
    with torch.autocast("cpu", BF16):
        out = sfa_attention(q, k, v, topk=3, causal=True)
        code = topk_sparsify(q, 3)
    assert torch.equal(out, sfa_attention(*low, topk=3, causal=True))
    assert torch.equal(code.indices, topk_sparsify(low[0], 3).indices)
    assert not torch.equal(code.indices, topk_sparsify(q, 3).indices)
    out.sum().backward()
    assert q.grad is not None and q.grad.dtype == FP32 and q.grad.any()


def test_double_backward_raises() -> None:
    q, k, v = leaves(*(torch.randn(1, 5, 2, 8) for _ in range(3)))
    out = sfa_attention(q, k, v, topk=2, impl="sdpa")
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.autograd.grad(grad.sum(), k)


def test_select_impl_tells_and_auto_follows() -> None:
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    assert select_impl(q, k, v, topk=2)["forward"] == "sdpa"
    for options in ({"nonoverlap": "drop"}, {"dropout_p": 0.1}):
        choice = select_impl(q, k, v, topk=2, **options)
        assert choice["forward"] == choice["backward"] == "reference" and "sdpa" in choice["reason"]
        results = []
        for impl in ("auto", "reference"):
            torch.manual_seed(3)
            results.append(sfa_attention(q, k, v, topk=2, impl=impl, **options))
        assert torch.equal(*results)
    assert select_impl(q, k, v, topk=2, nonoverlap="drop", dense_dims=1)["forward"] == "sdpa"
    assert select_impl(q, k, v, topk=2, impl="reference")["forward"] == "reference"


def test_exact_implementations_accept_tolerance_and_deterministic() -> None:
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    want = sfa_attention(q, k, v, topk=2)
    for impl in IMPLS:
        torch.testing.assert_close(sfa_attention(q, k, v, topk=2, tolerance=0.5, deterministic=True, impl=impl), want)


@pytest.mark.parametrize("shape", ((2, 6, 3), (3, 2, 1)))
def test_large_cudnn_backward_goes_by_parts(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Halving over kv heads or the batch gives every part its own rows, and puts them back in order."""
    b, hq, hkv = shape
    q, k, v = torch.randn(b, hq, 5, 8), torch.randn(b, hkv, 5, 8), torch.randn(b, hkv, 5, 8)
    out, lse = torch.randn(b, hq, 5, 8), torch.randn(b, hq, 5)
    calls: list[int] = []

    def kernel(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *_: Any, **__: Any) -> Any:
        assert q.shape[1] // k.shape[1] == hq // hkv and lse.shape == (*q.shape[:3], 1)
        calls.append(q.numel())
        return q + grad_out + out + lse, 2 * k, 3 * v

    kernels = type("", (), {"_scaled_dot_product_cudnn_attention_backward": staticmethod(kernel)})
    monkeypatch.setattr(sdpa, "aten", kernels)
    whole = sdpa._cudnn_backward([q, q, k, v, out, lse], True, 1.0)
    monkeypatch.setattr(sdpa, "_CUDNN_ELEMENTS", q.numel() // 2)
    parts = sdpa._cudnn_backward([q, q, k, v, out, lse], True, 1.0)
    assert len(calls) > 2 and all(torch.equal(x, y) for x, y in zip(whole, parts))


@pytest.mark.parametrize("device", DEVICES)
def test_compile_on_the_device(device: str) -> None:
    """On CUDA with the default backend, whose compiled code runs there; test_compile.py has the CPU's cases."""
    torch._dynamo.reset()
    inputs = leaves(*(torch.randn(2, 128, h, 64).bfloat16().to(device) for h in (4, 2, 2)))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sfa_attention(q, k, v, topk=8, causal=True)

    backend = "inductor" if device == "cuda" else "aot_eager"
    eager, compiled = call(*inputs), torch.compile(call, fullgraph=True, backend=backend)(*inputs)
    torch.testing.assert_close(compiled, eager, atol=2e-2, rtol=2e-2)
    wanted, got = (torch.autograd.grad(out.float().square().sum(), inputs) for out in (eager, compiled))
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)

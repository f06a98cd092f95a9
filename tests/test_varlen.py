"""sfa_attention_varlen: packed sequences against the oracle of each sequence, empty ones included."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_sfa import sfa_attention, sfa_attention_varlen, topk_sparsify
from oracle import BF16, FP16, FP32, Case, Result, check_all, leaves, make_inputs, members, oracle, poisoned, torch_math
from oracle import visible as visible_of

IMPLS = ("reference", "sdpa")


def ends(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def visible(lengths_q: Sequence[int], lengths_k: Sequence[int], window: tuple[int, int]) -> Tensor:
    """(1, 1, total_q, total_k): the rule of one sequence on the diagonal blocks."""
    seen = torch.zeros(1, 1, sum(lengths_q), sum(lengths_k), dtype=torch.bool)
    i = j = 0
    for n, m in zip(lengths_q, lengths_k):
        seen[:, :, i : i + n, j : j + m] = visible_of(n, m, window)
        i, j = i + n, j + m
    return seen


def check(case: Case, lengths_q: Sequence[int], lengths_k: Sequence[int], impl: str, device: str = "cpu") -> None:
    assert case.lengths == (sum(lengths_q), sum(lengths_k)) and case.batch == 1
    x = make_inputs(case, device)
    kept = [members(t, entry, case.dims) for t, entry in zip((x.q, x.k), case.pair)]
    arguments = (x.q, x.k, x.v, *kept, visible(lengths_q, lengths_k, case.window).to(device), x.grad)
    drop = case.nonoverlap == "drop"
    exact, comparator = oracle(*arguments, drop=drop), torch_math(*arguments, drop=drop)
    wrt = leaves(x.q, x.k, x.v)
    options = case.options(None)
    assert options.pop("attn_mask") is None
    with poisoned():
        out, lse = sfa_attention_varlen(
            *(t[0] for t in wrt), cu_seqlens_q=ends(lengths_q).to(device), cu_seqlens_k=ends(lengths_k).to(device),
            max_seqlen_q=max(lengths_q, default=0), max_seqlen_k=max(lengths_k, default=0),
            return_lse=True, impl=impl, **options,
        )  # fmt: skip
        out.backward(x.grad[0])
    assert out.shape == (sum(lengths_q), case.heads[0], case.dv)
    assert lse.shape == (case.heads[0], sum(lengths_q))
    check_all(case, x, (out[None], lse[None]), wrt, exact, comparator)


RAGGED = (
    ([5, 0, 63, 1], [5, 0, 63, 1], Case(heads=(4, 2), sees="causal", dtype=BF16)),
    ([5, 0, 63, 1], [9, 30, 0, 24], Case(heads=(8, 1), d=60, dv=80, sees="causal")),
    ([0, 0, 40], [7, 0, 17], Case(heads=(4, 4), d=80, topk=7, sees="causal_window", dtype=FP16)),
    ([113, 17, 0], [128, 3, 1], Case(heads=(8, 2), d=96, dv=32, topk=(None, 8), sees="window")),
    ([33, 31], [20, 44], Case(heads=(2, 2), d=32, topk=16, dense="named", sees="one_key", dtype=BF16)),
    ([3, 3, 3], [3, 3, 3], Case(heads=(2, 1), d=128, topk="d", dense="first")),
    ([1] * 16, [15] * 16, Case(heads=(8, 1), d=256, dv=60, topk=2, sees="window_left")),
)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("lengths_q", "lengths_k", "case"), RAGGED, ids=str)
def test_ragged_batches(lengths_q: list[int], lengths_k: list[int], case: Case, impl: str) -> None:
    case = Case(**{**vars(case), "batch": 1, "lengths": (sum(lengths_q), sum(lengths_k))})
    check(case, lengths_q, lengths_k, impl)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (4, 2), (4, 1)]),
    d=st.sampled_from([8, 20, 33]),
    topk=st.sampled_from([1, 3, "d", (None, 2), (3, None)]),
    dense=st.sampled_from(["none", "first", "named"]),
    sees=st.sampled_from(["all", "causal", "window", "window_left", "window_right", "one_key"]),
    nonoverlap=st.sampled_from(["zero", "drop"]),
    dtype=st.sampled_from([FP32, BF16]),
)
def test_random_batches(lengths: list[tuple[int, int]], nonoverlap: str, **options: Any) -> None:
    lengths_q, lengths_k = zip(*lengths)
    case = Case((sum(lengths_q), sum(lengths_k)), dv=16, nonoverlap=nonoverlap, batch=1, **options)
    for impl in ("reference",) if case.may_drop else IMPLS:
        check(case, lengths_q, lengths_k, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("nonoverlap", ("zero", "drop"))
def test_equals_the_padded_call(impl: str, nonoverlap: str) -> None:
    """One sequence a row of sfa_attention, padding masked away."""
    if (impl, nonoverlap) == ("sdpa", "drop"):
        with pytest.raises(NotImplementedError, match="nonoverlap"):
            x = torch.randn(3, 2, 16)
            sfa_attention_varlen(
                x, x, x, cu_seqlens_q=ends([3]), cu_seqlens_k=ends([3]), topk=2, nonoverlap="drop", impl="sdpa"
            )
        return
    lengths = [4, 9, 1]
    q, k, v = (torch.randn(3, 9, 2, 16) for _ in range(3))
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None])[:, None, None]
    options: dict[str, Any] = {"topk": 2, "nonoverlap": nonoverlap, "impl": impl}
    padded = sfa_attention(q, k, v, attn_mask=mask, **options)
    packed = [torch.cat([x[s, :n] for s, n in enumerate(lengths)]) for x in (q, k, v)]
    out = sfa_attention_varlen(*packed, cu_seqlens_q=ends(lengths), cu_seqlens_k=ends(lengths), **options)
    torch.testing.assert_close(out, torch.cat([padded[s, :n] for s, n in enumerate(lengths)]))


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_at_all(impl: str) -> None:
    for lengths_q, lengths_k in (([], []), ([0], [0]), ([0, 0], [3, 2]), ([2, 3], [0, 0])):
        q, k = (torch.randn(sum(n), 2, 8, requires_grad=True) for n in (lengths_q, lengths_k))
        out, lse = sfa_attention_varlen(
            q, k, k, cu_seqlens_q=ends(lengths_q), cu_seqlens_k=ends(lengths_k), topk=2, return_lse=True, impl=impl
        )
        assert out.shape == q.shape and lse.shape == (2, len(q))
        assert not out.any() and (lse == -torch.inf).all()
        out.sum().backward()
        for x in (q, k):
            assert x.grad is not None and not x.grad.any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("which", range(3), ids="qkv")
def test_a_non_finite_row_stays_in_its_sequence(which: int, value: float, impl: str) -> None:
    lengths = [5, 0, 6]
    inputs = [torch.randn(11, 2, 16) for _ in range(3)]
    options: dict[str, Any] = {
        "cu_seqlens_q": ends(lengths), "cu_seqlens_k": ends(lengths), "topk": 3, "causal": True,
        "return_lse": True, "impl": impl,
    }  # fmt: skip
    clean, clean_lse = sfa_attention_varlen(*inputs, **options)
    inputs[which][2, 0, 4] = value
    wrt = leaves(*inputs)
    out, lse = sfa_attention_varlen(*wrt, **options)
    assert not out[2, 0].isfinite().all()
    assert torch.equal(out[5:], clean[5:]) and torch.equal(lse[:, 5:], clean_lse[:, 5:])
    torch.testing.assert_close(out[:, 1], clean[:, 1])
    torch.testing.assert_close(out[:2], clean[:2])
    out.sum().backward()
    for x in wrt:
        assert x.grad is not None and x.grad[5:].isfinite().all() and x.grad[:, 1].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_codes_as_input(impl: str) -> None:
    lengths = [4, 0, 7]
    q, k, v = (torch.randn(11, h, 16) for h in (4, 2, 2))
    options: dict[str, Any] = {"cu_seqlens_q": ends(lengths), "cu_seqlens_k": ends(lengths), "impl": impl}
    wanted = sfa_attention_varlen(q, k, v, topk=(4, 3), dense_dims=[2, 0], causal=True, **options)
    codes = topk_sparsify(q, 4, dense_dims=[2, 0]), topk_sparsify(k, 3, dense_dims=[2, 0])
    assert torch.equal(sfa_attention_varlen(*codes, v, causal=True, **options), wanted)


def test_max_seqlen_may_be_larger_or_missing() -> None:
    q = torch.randn(6, 2, 16)
    cu = ends([2, 4])
    wanted = sfa_attention_varlen(q, q, q, cu_seqlens_q=cu, cu_seqlens_k=cu, topk=3)
    out = sfa_attention_varlen(q, q, q, cu_seqlens_q=cu, cu_seqlens_k=cu, topk=3, max_seqlen_q=9, max_seqlen_k=4)
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_of_lse(impl: str) -> None:
    lengths_q, lengths_k = [5, 0, 9], [7, 3, 4]
    case = Case((14, 14), (4, 2), 32, 16, 5, sees="causal", batch=1)
    x = make_inputs(case)
    kept = [members(t, 5) for t in (x.q, x.k)]
    seen = visible(lengths_q, lengths_k, case.window)
    exact: Result = oracle(x.q, x.k, x.v, *kept, seen, x.grad, x.grad_lse.where(seen.any(-1), 0.0))
    wrt = leaves(x.q, x.k, x.v)
    out, lse = sfa_attention_varlen(
        *(t[0] for t in wrt), cu_seqlens_q=ends(lengths_q), cu_seqlens_k=ends(lengths_k), topk=5, causal=True,
        return_lse=True, impl=impl,
    )  # fmt: skip
    torch.autograd.backward([out, lse], [x.grad[0], x.grad_lse[0]])
    for leaf, wanted in zip(wrt, (exact.dq, exact.dk, exact.dv)):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.double(), wanted, atol=2e-6, rtol=1e-5)

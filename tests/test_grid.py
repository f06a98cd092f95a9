"""sfa_attention over a spanning set of the whole grid, every implementation, against the oracle."""

import pytest
import torch

from flash_sfa import select_impl, sfa_attention
from oracle import AXES, EXTRA, Case, check_case, make_inputs, pairwise

CASES = (*EXTRA, *pairwise())


def test_the_grid_spans_every_value() -> None:
    for name, values in AXES.items():
        assert {getattr(case, name) for case in CASES} >= set(values)
    assert sum(case.may_drop for case in CASES) >= 5


@pytest.mark.parametrize("case", CASES, ids=str)
def test_grid(case: Case) -> None:
    check_case(case, "reference")
    if not case.may_drop:
        check_case(case, "sdpa")
        return
    x = make_inputs(case)
    assert select_impl(x.q, x.k, x.v, **case.options(x.mask))["forward"] == "reference"
    with pytest.raises(NotImplementedError, match="nonoverlap"):
        sfa_attention(x.q, x.k, x.v, **case.options(x.mask), impl="sdpa")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_comparison_that_can_fail(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget is tight enough to see one key too many and a scale that is off by 1%."""
    from flash_sfa.impl import reference

    case = Case((63, 63), sees="causal", dtype=dtype, batch=1)
    check_case(case, "reference")
    with monkeypatch.context() as patch:
        patch.setattr(reference, "visible_pairs", lambda sq, sk, window, device: torch.ones(sq, sk).tril(1).bool())
        with pytest.raises(AssertionError, match=r"lse|out"):
            check_case(case, "reference")
    attend = reference.attention
    with monkeypatch.context() as patch:
        patch.setattr(reference, "attention", lambda *a: attend(*a[:4], 1.01 * a[4], *a[5:]))
        with pytest.raises(AssertionError, match=r"lse|out"):
            check_case(case, "reference")

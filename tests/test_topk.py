"""topk_sparsify and SparseCode: the selection, the tie rule, storage, gradients."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_sfa import SparseCode, topk_sparsify
from oracle import BF16, DEVICES, FP16, FP32, FP64, kept_features, members, members_of_code, poisoned

NAN, INF = math.nan, math.inf
DTYPES = (BF16, FP16, FP32, FP64)


def rows(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def check(x: Tensor, topk: int, dense_dims: Any = 0) -> SparseCode:
    """A code against the oracle: members, order, values, expansion."""
    d = x.shape[-1]
    dims = tuple(range(dense_dims)) if isinstance(dense_dims, int) else tuple(dense_dims)
    with poisoned():
        code = topk_sparsify(x, topk, dense_dims=dense_dims)
        dense = code.to_dense()
    w = min(topk, d - len(dims))
    assert code.values.shape == code.indices.shape == (*x.shape[:-1], w)
    assert code.indices.dtype == (torch.uint8 if d <= 256 else torch.int16)
    assert (code.topk, code.dim, code.dense_dims, code.dtype, code.shape) == (w, d, dims, x.dtype, x.shape)
    kept = members(x, topk, dims)
    assert torch.equal(members_of_code(code), kept)
    wide = code.indices.long()
    assert (wide.diff(dim=-1) > 0).all(), "indices ascend, none twice"
    assert same(code.values, x.gather(-1, wide))
    assert same(code.dense, x[..., list(dims)])
    assert same(dense, x.where(kept, 0.0))
    return code


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", (1, 3, 32, 60, 64, 80, 96, 128, 256, 257, 300, 512))
def test_selection(d: int, dtype: torch.dtype, device: str) -> None:
    x = rows(2, 5, 3, d, dtype=dtype).to(device)
    for topk in (1, 2, 7, 8, 16, d, d + 5):
        check(x, topk)
        if d > 4:
            check(x, topk, 4)
            check(x, topk, [d // 2 + 1, 0, d - 1])


@pytest.mark.parametrize("d", (1024, 32768))
def test_wide_rows_have_int16_indices(d: int) -> None:
    x = rows(2, d)
    x[0, -1], x[1, -2:] = 100.0, torch.tensor([-100.0, 100.0])
    code = check(x, 8, (d - 3,))
    assert code.indices[0, -1] == d - 1
    assert code.indices[1, -2:].tolist() == [d - 2, d - 1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("row", "topk", "kept"),
    (
        ([1.0, 1.0, 1.0, 1.0], 2, [0, 1]),
        ([-1.0, 1.0, -1.0, 1.0], 3, [0, 1, 2]),
        ([0.0, -0.0, 0.0, -0.0], 2, [0, 1]),
        ([-0.0, 0.0, 1.0, 0.0], 3, [0, 1, 2]),
        ([0.5, 2.0, -2.0, 2.0], 2, [1, 2]),
        ([NAN, 1.0, NAN, INF], 1, [0]),
        ([1.0, -INF, NAN, INF], 2, [1, 2]),
        ([-NAN, NAN, -NAN, NAN], 3, [0, 1, 2]),
        ([INF, -INF, INF, 3.0], 2, [0, 1]),
        ([1.0, 2.0, NAN, NAN], 3, [1, 2, 3]),
    ),
    ids=str,
)
def test_ties_go_to_the_lowest_feature(
    row: list[float], topk: int, kept: list[int], dtype: torch.dtype, device: str
) -> None:
    assert kept_features(row, topk) == kept
    assert check(torch.tensor(row, dtype=dtype, device=device), topk).indices.tolist() == kept


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (BF16, FP16, FP32))
def test_nans_of_every_kind_tie(dtype: torch.dtype, device: str) -> None:
    bits = torch.int32 if dtype == FP32 else torch.int16
    x = torch.ones(6, dtype=dtype)
    x[[1, 3, 5]] = NAN
    x.view(bits)[3] += 1  # another payload
    x.view(bits)[1] |= torch.iinfo(bits).min  # the sign bit
    assert check(x.to(device), 2).indices.tolist() == [1, 3]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    row=st.lists(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, 2.0, -2.0, 1e-7, NAN, INF, -INF]), min_size=2, max_size=12
    ),
    topk=st.integers(1, 14),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_random_rows(row: list[float], topk: int, dtype: torch.dtype, data: st.DataObject) -> None:
    dims = data.draw(st.lists(st.integers(0, len(row) - 1), unique=True, max_size=len(row) - 1))
    check(torch.tensor([row, row[::-1]], dtype=dtype), topk, dims)


def test_bf16_selects_as_its_values_in_fp32() -> None:
    x = rows(500, 64, dtype=BF16)
    assert torch.equal(check(x, 8).indices, topk_sparsify(x.float(), 8).indices)


@pytest.mark.parametrize("device", DEVICES)
def test_any_strides_and_leading_shape(device: str) -> None:
    qkv = rows(2, 7, 3, 4, 32).to(device)
    for view in (qkv[:, :, 1], qkv[:, :, 2].transpose(1, 2), qkv[:, 1:5, 0], qkv[0, 0, 0, 0], qkv.transpose(1, 4)):
        check(view, 2)
    check(rows(1, 32).to(device).expand(5, 32), 4)
    check(rows(0, 3, 32).to(device), 4)
    assert topk_sparsify(rows(0, 3, 32).to(device), 4).to_dense().shape == (0, 3, 32)


def test_inputs_stay_as_they_are() -> None:
    x = rows(4, 32)
    before = x.clone()
    topk_sparsify(x, 4, dense_dims=[3, 1])
    assert torch.equal(x, before)


def test_storage() -> None:
    for dtype, size in ((BF16, 2), (FP32, 4)):
        assert topk_sparsify(rows(10, 128, dtype=dtype), 8).nbytes == 10 * 8 * (size + 1)
        assert topk_sparsify(rows(10, 128, dtype=dtype), 8, dense_dims=16).nbytes == 10 * (8 * (size + 1) + 16 * size)
        assert topk_sparsify(rows(10, 512, dtype=dtype), 8).nbytes == 10 * 8 * (size + 2)
    code = topk_sparsify(rows(10, 4, 128), 8, dense_dims=[5])
    part = code.map(lambda t: t[2:5])
    assert part.shape == (3, 4, 128)
    assert torch.equal(part.to_dense(), code.to_dense()[2:5])
    assert "topk=8" in repr(code) and "(5,)" in repr(code)


@pytest.mark.parametrize("device", DEVICES)
def test_padded_codes_expand_by_adding(device: str) -> None:
    values = torch.tensor([[3.0, 2.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    indices = torch.tensor([[0, 4, 4, 4], [5, 5, 5, 5]], dtype=torch.uint8)
    dense = torch.tensor([[7.0], [8.0]])
    code = SparseCode(values.to(device), indices.to(device), dim=6, dense=dense.to(device), dense_dims=[2])
    assert code.to_dense().tolist() == [[3, 0, 7, 0, 2, 0], [0, 0, 8, 0, 0, 1]]
    assert code.topk == 4


@pytest.mark.parametrize("dense_dims", (0, 2, (5, 1)))
@pytest.mark.parametrize("dtype", (FP32, BF16))
def test_gradient_is_straight_through_on_kept_features(dense_dims: Any, dtype: torch.dtype) -> None:
    x = rows(3, 4, 16, dtype=dtype).requires_grad_()
    code = topk_sparsify(x, 3, dense_dims=dense_dims)
    assert not code.indices.requires_grad
    kept = members(x, 3, code.dense_dims)
    weight = rows(3, 4, 16, dtype=dtype, seed=1)
    (through_dense,) = torch.autograd.grad(code.to_dense(), x, weight, retain_graph=True)
    assert torch.equal(through_dense, weight * kept)
    parts = [weight.gather(-1, code.indices.long()), weight[..., list(code.dense_dims)]]
    (through_parts,) = torch.autograd.grad([code.values, code.dense], x, parts)
    assert torch.equal(through_parts, weight * kept)


def test_second_order_gradients_of_codes() -> None:
    x = rows(2, 8, dtype=FP64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: topk_sparsify(x, 3, dense_dims=1).to_dense(), x)
    assert torch.autograd.gradgradcheck(lambda x: topk_sparsify(x, 3, dense_dims=1).to_dense() ** 3, x)


def test_topk_as_wide_as_the_row_keeps_it_whole() -> None:
    x = rows(3, 16)
    for topk in (16, 17, 1000):
        assert torch.equal(topk_sparsify(x, topk).to_dense(), x)
        assert torch.equal(topk_sparsify(x, topk, dense_dims=3).to_dense(), x)
        assert topk_sparsify(x, topk, dense_dims=3).topk == 13


def test_autocast_casts_then_ranks() -> None:
    x = torch.tensor([1.0, 1.0 + 2**-12, 0.5, 0.25])  # the first two are one number in bf16
    assert topk_sparsify(x, 1).indices.tolist() == [1]
    with torch.autocast("cpu", torch.bfloat16):
        code = topk_sparsify(x, 1)
        wide = topk_sparsify(x.double(), 1)
    assert code.indices.tolist() == [0]
    assert code.dtype == BF16
    assert (wide.indices.tolist(), wide.dtype) == ([1], FP64)


def test_impl() -> None:
    x = rows(3, 16)
    assert torch.equal(topk_sparsify(x, 3, impl="reference").indices, topk_sparsify(x, 3).indices)
    for impl in ("triton", "sdpa", "cuda", "intersect", "cpu"):
        with pytest.raises(NotImplementedError, match=impl):
            topk_sparsify(x, 3, impl=impl)

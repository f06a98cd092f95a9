"""Triton top-k, expand and gather against the reference: on CPU through Triton's interpreter, and on a GPU.

The interpreter must be chosen before the kernels are defined, so this file runs itself in a process with
TRITON_INTERPRET=1 and reads the outcome of every case from there.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flash_sfa.impl import reference
from own_process import outcomes_of, print_outcomes

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def rows(n: int, d: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
    """Random rows; among the first, ties, zeros of both signs, infinities and NaNs of several kinds."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x[: n // 2 : 2] = x[: n // 2 : 2].mul(2).round().to(dtype)
    x[1] = 0.0
    x[3, ::2] = -0.0
    x[5, ::3] = torch.inf
    x[7, 1::3] = torch.nan
    x[9] = torch.nan
    bits = x.view(torch.int16 if x.element_size() == 2 else torch.int32)
    bits[7:10:2, ::2] ^= 1
    bits[9, ::5] ^= 2
    return x.to(device)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def check(x: Tensor, topk: int, dims: tuple[int, ...] = (), **options: str) -> None:
    from flash_sfa.impl import triton_codes

    d = x.shape[-1]
    wanted = reference.topk(x, topk, dims)
    got = triton_codes.topk(x, topk, dims, **options)
    assert got[1].dtype == wanted[1].dtype
    assert torch.equal(got[1], wanted[1]), "indices"
    assert same(got[0], wanted[0]), "values"
    assert same(got[2], wanted[2]), "dense"
    *again, kept = triton_codes.topk_kept(x, topk, dims, **options)
    assert all(same(a, b) for a, b in zip(again, got)), "topk_kept"
    assert same(kept, reference.expand(*wanted, d, dims)), "kept"
    assert same(triton_codes.keep(x, wanted[1], dims), reference.keep(x, wanted[1], dims)), "keep"
    assert same(triton_codes.expand(*wanted, d, dims), reference.expand(*wanted, d, dims)), "expand"
    for a, b in zip(triton_codes.gather(x, wanted[1], dims), reference.gather(x, wanted[1], dims)):
        assert same(a, b), "gather"


def check_views(kernel: str, device: str = "cpu") -> None:
    """A fused qkv slice, transposed heads, a slice of a longer sequence, a row of stride 0, one row."""
    qkv = rows(2 * 9 * 3 * 5, 64, BF16, device).view(2, 9, 3, 5, 64)
    q = qkv[:, :, 1]
    check(q, 8, kernel=kernel)
    check(q.transpose(1, 2), 8, (2, 1), kernel=kernel)
    long = rows(2 * 70 * 4, 32, FP16, device).view(2, 70, 4, 32)
    check(long[:, 1:66], 3, kernel=kernel)
    check(long[:, 1:66].transpose(1, 2), 3, kernel=kernel)
    check(rows(12, 32, BF16, device).expand(3, 12, 32), 4, kernel=kernel)
    check(rows(12, 32, BF16, device)[7], 4, kernel=kernel)
    assert not q.is_contiguous()


def check_unaligned() -> None:
    """Rows that do not start at 8 bytes, rows that are not contiguous: no wrong answer, no error."""
    from flash_sfa.impl import triton_codes

    x = rows(13, 66, BF16)[:, 1:65]
    with pytest.raises(NotImplementedError, match="aligned"):
        triton_codes.topk(x, 4, (), kernel="network")
    check(x, 4)
    check(rows(64, 12, BF16).t()[:, :40], 3)


def check_repeats() -> None:
    """Neighbours with equal indices add; the padding of a code (value 0) changes nothing."""
    from flash_sfa.impl import triton_codes

    for dtype in (FP16, FP32):
        values = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 0.0, -0.0], [0.5, 1.5, 2.5, 3.5]], dtype=dtype)
        indices = torch.tensor([[1, 3, 3, 3], [4, 5, 5, 5], [0, 0, 7, 7]], dtype=torch.uint8)
        dense = torch.tensor([[9.0], [8.0], [7.0]], dtype=dtype)
        wanted = reference.expand(values, indices, dense, 8, (2,))
        assert same(triton_codes.expand(values, indices, dense, 8, (2,)), wanted)
        assert wanted[0, 3] == 9.0
        assert wanted[2, 7] == 6.0


def check_empty_and_float64() -> None:
    from flash_sfa.impl import triton_codes

    values, indices, dense = triton_codes.topk(torch.empty(0, 5, 16), 4, (1,))
    assert values.shape == (0, 5, 4) and indices.shape == (0, 5, 4) and dense.shape == (0, 5, 1)
    assert triton_codes.expand(values, indices, dense, 16, (1,)).shape == (0, 5, 16)
    for call in (
        lambda: triton_codes.topk(torch.ones(2, 8, dtype=torch.float64), 2, ()),
        lambda: triton_codes.gather(torch.ones(2, 8, dtype=torch.float64), indices, ()),
    ):
        with pytest.raises(NotImplementedError, match="float64"):
            call()


def check_poisoned() -> None:
    """Every output element is written: fresh memory full of NaN must not show."""
    from flash_sfa.impl import triton_codes

    fresh = Tensor.new_empty

    def poisoned(self: Tensor, *shape: int, **options: torch.dtype) -> Tensor:
        out = fresh(self, *shape, **options)
        return out.fill_(torch.nan) if out.is_floating_point() else out.fill_(77)

    Tensor.new_empty = poisoned  # type: ignore[method-assign, assignment]
    try:
        x = rows(37, 64, BF16).nan_to_num(1.0)
        for kernel in ("network", "select"):
            code = triton_codes.topk(x, 7, (0, 1, 9), kernel=kernel)
            assert not any(part.isnan().any() for part in (code[0], code[2]))
            assert not triton_codes.expand(*code, 64, (0, 1, 9)).isnan().any()
    finally:
        Tensor.new_empty = fresh  # type: ignore[method-assign]


def _cases() -> dict[str, Callable[[], None]]:
    cases: dict[str, Callable[[], None]] = {
        "views_network": lambda: check_views("network"),
        "views_select": lambda: check_views("select"),
        "unaligned": check_unaligned,
        "repeats": check_repeats,
        "empty_and_float64": check_empty_and_float64,
        "poisoned": check_poisoned,
    }
    few = tuple(range(4))
    for d, topk, dtype, dims, kernel in (
        (128, 8, BF16, (), "network"),
        (128, 8, FP16, few, "network"),
        (128, 7, BF16, (127, 3, 64), "network"),
        (64, 8, BF16, (0, 1, 2), "network"),
        (60, 2, FP16, (), "network"),
        (96, 1, BF16, few, "network"),
        (32, 8, BF16, (), "network"),
        (32, 8, FP16, (31, 0), "network"),
        (32, 32, BF16, (), "network"),
        (80, 4, BF16, (79,), "network"),
        (64, 16, BF16, (), "network"),
        (256, 4, BF16, (255,), "network"),
        (512, 2, BF16, (), "network"),
        (8, 8, FP16, (), "network"),
        (4, 1, BF16, (), "network"),
        (40, 8, BF16, tuple(range(16)), "network"),  # fewer quads than topk take part
        (128, 8, FP32, (), "select"),
        (61, 7, BF16, (), "select"),
        (61, 7, FP32, (0, 1, 2), "select"),
        (96, 40, FP16, (5, 1, 94), "select"),
        (32, 64, FP32, (3,), "select"),
        (300, 2, BF16, (299,), "select"),
        (1024, 8, FP32, (), "select"),
        (3, 1, FP32, (), "select"),
        (1, 5, BF16, (), "select"),
    ):
        name = f"{kernel}_d{d}_k{topk}_{str(dtype)[6:]}_dims{len(dims)}"
        # 40 rows fill less than a tile of 128, 150 rows end in a tile that overlaps the one before.
        n = 150 if (d, topk) in ((64, 8), (61, 7)) else 40
        cases[name] = lambda d=d, k=topk, t=dtype, dims=dims, kernel=kernel, n=n: check(  # type: ignore[misc]
            rows(n, d, t), k, dims, kernel=kernel
        )
    return cases


CASES = _cases()


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    return outcomes_of(__file__, interpret=True)


@pytest.mark.parametrize("name", CASES)
def test_interpreter(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == "ok"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (BF16, FP16, FP32), ids=str)
@pytest.mark.parametrize("d", (32, 60, 64, 80, 96, 128, 256, 512))
def test_gpu_grid(d: int, dtype: torch.dtype) -> None:
    kinds = itertools.cycle(itertools.product(range(3), range(4)))
    for topk, (dims_kind, view) in zip((1, 2, 7, 8, 16, 32, d), kinds):
        x = rows(2 * 150 * 3 * 5, d, dtype, "cuda", seed=topk).view(2, 150, 3, 5, d)
        views = (x, x[:, :, 1], x[:, 3:140, 2].transpose(1, 2), x[:1, :3, 0])
        dims = ((), tuple(range(d // 8)), (d - 1, 3, d // 2))[dims_kind]
        check(views[view], topk, dims)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ("network", "select"))
def test_gpu_views(kernel: str) -> None:
    check_views(kernel, "cuda")


@pytest.mark.gpu
def test_gpu_more_than_2_31_elements() -> None:
    from flash_sfa.impl import triton_codes

    n = 2**31 // 128 + 1000
    x = torch.randn(n, 128, device="cuda", dtype=BF16)
    values, indices, _ = triton_codes.topk(x, 8, ())
    dense = triton_codes.expand(values, indices, values[:, :0], 128, ())
    back = triton_codes.gather(x, indices, ())[0]
    for part in (slice(0, 500), slice(n - 2000, n)):
        wanted = reference.topk(x[part], 8, ())
        assert torch.equal(indices[part], wanted[1]) and torch.equal(values[part], wanted[0])
        assert torch.equal(dense[part], reference.expand(*wanted, 128, ()))
        assert torch.equal(back[part], wanted[0])


if __name__ == "__main__":
    print_outcomes(CASES)

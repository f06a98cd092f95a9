"""The linear algebra of codes as torch.library operators: topk, expand, gather.

``expand`` and ``gather`` are each other's transpose, so they are each other's backward; the backward of
``topk`` is the straight-through gradient on the selected coordinates, which is ``expand`` again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .impl import reference


def index_dtype(dim: int) -> torch.dtype:
    return torch.uint8 if dim <= 256 else torch.int16


_triton: list[str | None] = []  # what triton_missing found; torch.compile warns of functools.cache


def triton_missing() -> str | None:
    """None if the Triton kernels import here, else the reason."""
    if not _triton:
        try:
            from .impl import triton_codes  # noqa: F401
        except Exception as error:  # a broken Triton may raise anything
            _triton.append(f"{type(error).__name__}: {error}")
        else:
            _triton.append(None)
    return _triton[0]


def _function(name: str, impl: str, x: Tensor) -> Callable[..., Any]:
    """topk, expand or gather of an implementation; "auto" takes Triton for CUDA tensors."""
    if impl == "auto" and x.is_cuda and x.dtype != torch.float64 and triton_missing() is None:
        impl = "triton"
    if impl == "triton":
        from .impl import triton_codes

        return getattr(triton_codes, name)
    return getattr(reference, name)


@torch.library.custom_op("flash_sfa::topk", mutates_args=())
def topk(x: Tensor, topk: int, dense_dims: Sequence[int], impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of x -> (values, indices, dense)."""
    return _function("topk", impl, x)(x, topk, tuple(dense_dims))


@torch.library.custom_op("flash_sfa::topk_kept", mutates_args=())
def topk_kept(x: Tensor, topk: int, dense_dims: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`topk`, and the expanded code; without a gradient."""
    return tuple(_function("topk_kept", "auto", x)(x, topk, tuple(dense_dims)))  # type: ignore[return-value]


def keep(x: Tensor, indices: Tensor, dense_dims: Sequence[int]) -> Tensor:
    """Rows of x with zeros at features that a code does not keep; no operator, without a gradient."""
    return _function("keep", "auto", x)(x, indices, tuple(dense_dims))  # type: ignore[no-any-return]


@torch.library.custom_op("flash_sfa::expand", mutates_args=())
def expand(values: Tensor, indices: Tensor, dense: Tensor, dim: int, dense_dims: Sequence[int], impl: str) -> Tensor:
    """(values, indices, dense) -> rows of ``dim`` features, zero elsewhere; repeated indices add."""
    return _function("expand", impl, values)(values, indices, dense, dim, tuple(dense_dims))


@torch.library.custom_op("flash_sfa::gather", mutates_args=())
def gather(x: Tensor, indices: Tensor, dense_dims: Sequence[int], impl: str) -> tuple[Tensor, Tensor]:
    """Rows of x -> (x at indices, x at dense_dims)."""
    return _function("gather", impl, x)(x, indices, tuple(dense_dims))


@topk.register_fake
def _(x: Tensor, topk: int, dense_dims: Sequence[int], impl: str) -> tuple[Tensor, Tensor, Tensor]:
    rows, d, r = x.shape[:-1], x.shape[-1], len(dense_dims)
    w = min(topk, d - r)
    return x.new_empty(*rows, w), x.new_empty(*rows, w, dtype=index_dtype(d)), x.new_empty(*rows, r)


@topk_kept.register_fake
def _(x: Tensor, topk: int, dense_dims: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, d, r = x.shape[:-1], x.shape[-1], len(dense_dims)
    w = min(topk, d - r)
    indices = x.new_empty(*rows, w, dtype=index_dtype(d))
    return x.new_empty(*rows, w), indices, x.new_empty(*rows, r), x.new_empty(*rows, d)


@expand.register_fake
def _(values: Tensor, indices: Tensor, dense: Tensor, dim: int, dense_dims: Sequence[int], impl: str) -> Tensor:
    return values.new_empty(*values.shape[:-1], dim)


@gather.register_fake
def _(x: Tensor, indices: Tensor, dense_dims: Sequence[int], impl: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(indices.shape), x.new_empty(*x.shape[:-1], len(dense_dims))


def _topk_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, _, ctx.dense_dims, ctx.impl = inputs
    ctx.dim = x.shape[-1]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _topk_backward(ctx: Any, grad_values: Tensor, _: Any, grad_dense: Tensor) -> tuple:
    (indices,) = ctx.saved_tensors
    return expand(grad_values, indices, grad_dense, ctx.dim, ctx.dense_dims, ctx.impl), None, None, None


def _expand_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, indices, _, _, ctx.dense_dims, ctx.impl = inputs
    ctx.save_for_backward(indices)


def _expand_backward(ctx: Any, grad: Tensor) -> tuple:
    (indices,) = ctx.saved_tensors
    grad_values, grad_dense = gather(grad, indices, ctx.dense_dims, ctx.impl)
    return grad_values, None, grad_dense, None, None, None


def _gather_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, indices, ctx.dense_dims, ctx.impl = inputs
    ctx.dim = x.shape[-1]
    ctx.save_for_backward(indices)


def _gather_backward(ctx: Any, grad_values: Tensor, grad_dense: Tensor) -> tuple:
    (indices,) = ctx.saved_tensors
    return expand(grad_values, indices, grad_dense, ctx.dim, ctx.dense_dims, ctx.impl), None, None, None


topk.register_autograd(_topk_backward, setup_context=_topk_context)
expand.register_autograd(_expand_backward, setup_context=_expand_context)
gather.register_autograd(_gather_backward, setup_context=_gather_context)

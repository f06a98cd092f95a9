"""The differentiable attention operator over codes that the fused implementations share.

Saved for backward: the codes, v, out and lse; never a dense q or k of a sparse side, never an n x n matrix (a bool mask
is n x n where the caller gives one). An implementation sees expanded rows: `sdpa`, `triton_forward` and
`triton_backward`, or `hopper_forward`, which has the backward of one of the others.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .impl import sdpa


@torch.library.custom_op("flash_sfa::attention", mutates_args=())
def attention(
    q: Tensor, q_indices: Tensor | None, q_dense: Tensor | None, q_rows: Tensor | None, q_source: Tensor | None,
    k: Tensor, k_indices: Tensor | None, k_dense: Tensor | None, k_rows: Tensor | None, k_source: Tensor | None,
    v: Tensor, attn_mask: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, seed: Tensor | None,
    dim: int, q_dense_dims: Sequence[int], k_dense_dims: Sequence[int], left: int, right: int, softmax_scale: float,
    max_seqlen_q: int, max_seqlen_k: int, drop: bool, dropout_p: float, return_lse: bool, impl: str, backward: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k: code values, or the dense rows where indices is None; q_rows, k_rows: the expanded codes where known.

    q_source, k_source: the tensors that the codes were made from here; then they get the gradient, not the codes.
    Returns out (as v), lse (b, hq, sq) and marks of non-finite values for the backward. With cu_seqlens the batch
    dimension is 1 and the sequences lie one after another. ``drop``: a pair without a common feature weighs nothing.
    ``impl``: "sdpa", "triton" or "cuda"; ``backward``: "sdpa" or "triton".
    """
    sides = (q, q_indices, q_dense, q_rows, q_dense_dims), (k, k_indices, k_dense, k_rows, k_dense_dims)
    rows_q, rows_k = (_rows(*side, dim) for side in sides)
    packed = cu_seqlens_q, cu_seqlens_k
    sequences = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    bad = _scan([q, q_dense], [k, k_dense], sequences * k.shape[2])
    if impl == "cuda":
        from .impl import hopper_forward

        return *hopper_forward.forward(rows_q, rows_k, v, bad, right == 0, softmax_scale), bad
    if impl == "triton":
        from .impl import triton_forward

        options = _options(
            sides, dim, drop, left, right, softmax_scale, attn_mask, packed, max_seqlen_q, max_seqlen_k, dropout_p, seed
        )
        return *triton_forward.forward(rows_q, rows_k, v, bad, options), bad
    return *sdpa.forward(rows_q, rows_k, v, bad, attn_mask, packed, (left, right), softmax_scale), bad


@attention.register_fake
def _(q: Tensor, qi: Any, qd: Any, qr: Any, qs: Any, k: Tensor, ki: Any, kd: Any, kr: Any, ks: Any, v: Tensor,
      *rest: Any) -> Any:  # fmt: skip
    b, sq, hq = q.shape[:3]
    lse = v.new_empty(b, hq, sq, dtype=torch.float64 if v.dtype == torch.float64 else torch.float32)
    sequences = b if rest[1] is None else rest[1].shape[0] - 1
    marked = v.is_cuda and ops.triton_missing() is None
    bad = v.new_empty(2 + sequences * k.shape[2] if marked else 0, dtype=torch.int32)
    return v.new_empty(b, sq, hq, v.shape[-1]), lse, bad


@torch.library.custom_op("flash_sfa::attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, bad: Tensor,
    q: Tensor, q_indices: Tensor | None, q_dense: Tensor | None,
    k: Tensor, k_indices: Tensor | None, k_dense: Tensor | None,
    v: Tensor, attn_mask: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, seed: Tensor | None,
    dim: int, q_dense_dims: Sequence[int], k_dense_dims: Sequence[int], left: int, right: int, softmax_scale: float,
    max_seqlen_q: int, max_seqlen_k: int, drop: bool, dropout_p: float, return_lse: bool, impl: str,
    to_source_q: bool, to_source_k: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q (or of its source), q_dense, k (or its source), k_dense, v; only at the kept coordinates."""
    sides = (q, q_indices, q_dense, None, q_dense_dims), (k, k_indices, k_dense, None, k_dense_dims)
    rows_q, rows_k = (_rows(*side, dim) for side in sides)
    packed = cu_seqlens_q, cu_seqlens_k
    used_grad_lse = grad_lse if return_lse else None
    if impl == "triton":
        from .impl import triton_backward

        options = _options(
            sides, dim, drop, left, right, softmax_scale, attn_mask, packed, max_seqlen_q, max_seqlen_k, dropout_p, seed
        )
        dq, dk, dv = triton_backward.backward(grad_out, used_grad_lse, rows_q, rows_k, v, out, lse, bad, options)
    else:
        dq, dk, dv = sdpa.backward(
            grad_out, used_grad_lse, out, lse, bad, rows_q, rows_k, v, attn_mask, packed, (left, right), softmax_scale
        )
    grads_q = _code_grad(dq, q_indices, q_dense_dims, to_source_q)
    return *grads_q, *_code_grad(dk, k_indices, k_dense_dims, to_source_k), dv.contiguous()


@attention_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Any, out: Any, lse: Any, bad: Any,
    q: Tensor, q_indices: Any, q_dense: Any, k: Tensor, k_indices: Any, k_dense: Any, v: Tensor, mask: Any, cu_q: Any,
    cu_k: Any, seed: Any, dim: int, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    def side(x: Tensor, dense: Tensor | None, to_source: bool) -> tuple[Tensor, Tensor]:
        if to_source:
            return x.new_empty(*x.shape[:-1], dim), x.new_empty(0)
        return x.new_empty(x.shape), x.new_empty(0 if dense is None else dense.shape)

    return *side(q, q_dense, options[-2]), *side(k, k_dense, options[-1]), v.new_empty(v.shape)


def _context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, qi, qd, _, q_source, k, ki, kd, _, k_source, *others = inputs[:15]
    ctx.save_for_backward(q, qi, qd, k, ki, kd, *others, *output)
    ctx.options = (*inputs[15:-2], inputs[-1], q_source is not None, k_source is not None)
    ctx.mark_non_differentiable(output[2])


def _autograd(ctx: Any, grad_out: Tensor, grad_lse: Tensor, _: Any) -> tuple:
    *inputs, out, lse, bad = ctx.saved_tensors
    dq, dq_dense, dk, dk_dense, dv = attention_backward(grad_out, grad_lse, out, lse, bad, *inputs, *ctx.options)
    sides = (dq, dq_dense, inputs[2], ctx.options[-2]), (dk, dk_dense, inputs[5], ctx.options[-1])
    grads: list[Tensor | None] = []
    for grad, grad_dense, dense, to_source in sides:
        if to_source:
            grads += [None, None, None, None, grad]
        else:
            grads += [grad, None, None if dense is None else grad_dense, None, None]
    return *grads, dv, *[None] * 17


attention.register_autograd(_autograd, setup_context=_context)


def _scan(q: list[Tensor | None], k: list[Tensor | None], heads: int) -> Tensor:
    """Marks of non-finite values in the parts of q and k, where Triton mends what they spoil."""
    device = next(x.device for x in q if x is not None)
    if device.type != "cuda" or ops.triton_missing() is not None:
        return torch.zeros(0, dtype=torch.int32, device=device)
    from .impl import triton_forward

    parts_q, parts_k = ([x for x in side if x is not None and x.numel() > 0] for side in (q, k))
    return triton_forward.scan(device, parts_q, parts_k, heads)


def _rows(
    values: Tensor, indices: Tensor | None, dense: Tensor | None, rows: Tensor | None, dims: Sequence[int], dim: int
) -> Tensor:
    if rows is not None:
        return rows
    if indices is None or dense is None:
        return values
    return ops.expand(values, indices, dense, dim, dims, "auto")


def _options(
    sides: Sequence[tuple[Any, Any, Any, Any, Any]], dim: int, drop: bool, left: int, right: int,
    softmax_scale: float, attn_mask: Tensor | None, packed: tuple[Tensor | None, Tensor | None],
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, seed: Tensor | None,
) -> Any:  # fmt: skip
    """`triton_forward.Options` of a call."""
    from .impl import triton_forward

    members = [_members(*side, dim) if drop else None for side in sides]
    return triton_forward.Options(
        left, right, softmax_scale, attn_mask, packed[0], packed[1], max_seqlen_q, max_seqlen_k,
        members[0], members[1], dropout_p, seed,
    )  # fmt: skip


def _members(
    values: Tensor, indices: Tensor | None, dense: Tensor | None, _: Any, dims: Sequence[int], dim: int
) -> Tensor:
    """Rows that are not zero where a code keeps a feature."""
    if indices is None or dense is None:
        raise ValueError("drop needs two codes")
    return ops.expand(torch.ones_like(values), indices, torch.ones_like(dense), dim, dims, "auto")


def _code_grad(
    grad: Tensor, indices: Tensor | None, dense_dims: Sequence[int], to_source: bool
) -> tuple[Tensor, Tensor]:
    if indices is None:
        return grad.contiguous(), grad.new_empty(0)
    if to_source:
        return ops.keep(grad, indices, dense_dims), grad.new_empty(0)
    return ops.gather(grad, indices, dense_dims, "auto")

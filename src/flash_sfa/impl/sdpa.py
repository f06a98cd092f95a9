"""Attention by expanding codes and calling PyTorch's fused SDPA kernels: memory linear in the length.

Saved for backward: the codes, v, out and lse; never a dense q or k of a sparse side, never an n x n matrix
(a bool mask is n x n where the caller gives one or the window needs one).

The kernels are called through their aten operators because those return the log-sum-exp. They do not take a
gradient of it. A column appended to v, out and grad_out does: it adds -grad_lse to the row sum
delta = sum(grad_out * out) that the backward subtracts, and nothing elsewhere. Calls that cuDNN does not take
(masks, windows, fp32) go through `blocked` on CUDA.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import ops
from . import blocked
from .reference import visible_pairs

aten = torch.ops.aten
_CUDNN_ELEMENTS = 2**31 - 1


def unsupported(
    dtype: torch.dtype, device: torch.device, *, can_drop: bool, dropout_p: float, deterministic: bool
) -> str | None:
    """Why this implementation cannot do a call, or None."""
    if device.type not in ("cpu", "cuda"):
        return f"tensors on {device.type} are not supported, only cpu and cuda"
    if can_drop:
        return "nonoverlap='drop' would need an n x n mask of overlaps"
    if dropout_p > 0.0:
        return f"dropout_p={dropout_p} is not supported, only 0"
    if device.type == "cuda" and dtype == torch.float64:
        return "float64 is not supported on CUDA"
    if device.type == "cuda" and deterministic:
        return "deterministic=True is not supported on CUDA: the backward of torch SDPA adds in any order"
    return None


@torch.library.custom_op("flash_sfa::sdpa", mutates_args=())
def sdpa(
    q: Tensor, q_indices: Tensor | None, q_dense: Tensor | None,
    k: Tensor, k_indices: Tensor | None, k_dense: Tensor | None,
    v: Tensor, attn_mask: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    dim: int, q_dense_dims: Sequence[int], k_dense_dims: Sequence[int],
    left: int, right: int, softmax_scale: float, codes_impl: str, return_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q, k: code values, or the dense rows where indices is None. Returns out (as v) and lse (b, hq, sq).

    With cu_seqlens the batch dimension is 1 and the sequences lie one after another.
    """
    q = _rows(q, q_indices, q_dense, dim, q_dense_dims, codes_impl)
    k = _rows(k, k_indices, k_dense, dim, k_dense_dims, codes_impl)
    window = (left, right)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        out, lse = _forward(q, k, v, attn_mask, window, softmax_scale)
        return out.contiguous(), lse.contiguous()
    out = v.new_empty(*q.shape[:3], v.shape[-1])
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=_lse_dtype(v.dtype))
    for rows_q, rows_k in _sequences(cu_seqlens_q, cu_seqlens_k):
        out[:, rows_q], lse[:, :, rows_q] = _forward(
            q[:, rows_q], k[:, rows_k], v[:, rows_k], attn_mask, window, softmax_scale
        )
    return out, lse


@sdpa.register_fake
def _(q: Tensor, qi: Any, qd: Any, k: Tensor, ki: Any, kd: Any, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    b, sq, hq = q.shape[:3]
    return v.new_empty(b, sq, hq, v.shape[-1]), v.new_empty(b, hq, sq, dtype=_lse_dtype(v.dtype))


@torch.library.custom_op("flash_sfa::sdpa_backward", mutates_args=())
def sdpa_backward(
    grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor,
    q: Tensor, q_indices: Tensor | None, q_dense: Tensor | None,
    k: Tensor, k_indices: Tensor | None, k_dense: Tensor | None,
    v: Tensor, attn_mask: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    dim: int, q_dense_dims: Sequence[int], k_dense_dims: Sequence[int],
    left: int, right: int, softmax_scale: float, codes_impl: str, return_lse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, q_dense, k, k_dense, v; of codes only at the kept coordinates."""
    rows_of_q = _rows(q, q_indices, q_dense, dim, q_dense_dims, codes_impl)
    rows_of_k = _rows(k, k_indices, k_dense, dim, k_dense_dims, codes_impl)
    window = (left, right)
    grad_lse_used = grad_lse if return_lse else None
    if cu_seqlens_q is None or cu_seqlens_k is None:
        dq, dk, dv = _backward(
            grad_out, grad_lse_used, out, lse, rows_of_q, rows_of_k, v, attn_mask, window, softmax_scale
        )
    else:
        dq, dk, dv = torch.zeros_like(rows_of_q), torch.zeros_like(rows_of_k), torch.zeros_like(v)
        for rows_q, rows_k in _sequences(cu_seqlens_q, cu_seqlens_k):
            dq[:, rows_q], dk[:, rows_k], dv[:, rows_k] = _backward(
                grad_out[:, rows_q], None if grad_lse_used is None else grad_lse_used[:, :, rows_q],
                out[:, rows_q], lse[:, :, rows_q], rows_of_q[:, rows_q], rows_of_k[:, rows_k], v[:, rows_k],
                attn_mask, window, softmax_scale,
            )  # fmt: skip
    dq_values, dq_dense = _code_grad(dq, q_indices, q_dense_dims, codes_impl)
    dk_values, dk_dense = _code_grad(dk, k_indices, k_dense_dims, codes_impl)
    return dq_values, dq_dense, dk_values, dk_dense, dv.contiguous()


@sdpa_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Any, out: Any, lse: Any,
    q: Tensor, q_indices: Any, q_dense: Any, k: Tensor, k_indices: Any, k_dense: Any, v: Tensor, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    def like(x: Tensor | None, default: Tensor) -> Tensor:
        return default.new_empty(0) if x is None else x.new_empty(x.shape)

    return like(q, q), like(q_dense, q), like(k, k), like(k_dense, k), like(v, v)


def _context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:10], *output)
    ctx.options = inputs[10:]


def _autograd(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple:
    *inputs, out, lse = ctx.saved_tensors
    dq, dq_dense, dk, dk_dense, dv = sdpa_backward(grad_out, grad_lse, out, lse, *inputs, *ctx.options)
    q_dense, k_dense = inputs[2], inputs[5]
    return (
        dq, None, None if q_dense is None else dq_dense,
        dk, None, None if k_dense is None else dk_dense,
        dv, *[None] * 11,
    )  # fmt: skip


sdpa.register_autograd(_autograd, setup_context=_context)


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows(
    values: Tensor,
    indices: Tensor | None,
    dense: Tensor | None,
    dim: int,
    dense_dims: Sequence[int],
    codes_impl: str,
) -> Tensor:
    if indices is None or dense is None:
        return values
    return ops.expand(values, indices, dense, dim, dense_dims, codes_impl)


def _code_grad(
    grad: Tensor, indices: Tensor | None, dense_dims: Sequence[int], codes_impl: str
) -> tuple[Tensor, Tensor]:
    if indices is None:
        return grad.contiguous(), grad.new_empty(0)
    return ops.gather(grad, indices, dense_dims, codes_impl)


def _sequences(cu_q: Tensor, cu_k: Tensor) -> list[tuple[slice, slice]]:
    ends_q, ends_k = cu_q.tolist(), cu_k.tolist()
    return [
        (slice(*pair_q), slice(*pair_k)) for pair_q, pair_k in zip(zip(ends_q, ends_q[1:]), zip(ends_k, ends_k[1:]))
    ]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, window: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor]:
    b, sq, hq, _ = q.shape
    if q.numel() == 0 or k.numel() == 0:
        lse = q.new_full((b, hq, sq), -torch.inf, dtype=_lse_dtype(v.dtype))
        return v.new_zeros(b, sq, hq, v.shape[-1]), lse
    mask, causal, empty = _visibility(sq, k.shape[1], attn_mask, window, q.device)
    spoiled_lse, spoiled_out, (q, k, v) = _spoiled(q, k, v, mask, causal)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):  # the dtype is decided; what accumulates stays in fp32
        out, lse = _fused_forward(q, k, v, mask, causal, scale)
    if spoiled_out is not None and spoiled_lse is not None:
        out = out.masked_fill(spoiled_out[..., None], torch.nan)
        lse = lse.masked_fill(spoiled_lse, torch.nan)
    if empty is not None:
        out, lse = out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)
    return out.transpose(1, 2), lse


def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, window: tuple[int, int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    mask, causal, _ = _visibility(q.shape[1], k.shape[1], attn_mask, window, q.device)
    _, _, (q, k, v) = _spoiled(q, k, v, mask, causal)
    q, k, v, out, grad_out = (x.transpose(1, 2) for x in (q, k, v, out, grad_out))
    # Rows that saw nothing or something non-finite: probability 0, so no gradient through them.
    dead = ~(lse.isfinite() & out.isfinite().all(-1))
    if q.device.type != "cpu" or bool(dead.any()):
        lse = lse.masked_fill(dead, torch.inf)
        out, grad_out = (x.masked_fill(dead[..., None], 0.0) for x in (out, grad_out))
    grad_lse = None if grad_lse is None else grad_lse.masked_fill(dead, 0.0)
    with torch.autocast(q.device.type, enabled=False):
        dq, dk, dv = _fused_backward(grad_out, grad_lse, q, k, v, out, lse, dead, mask, causal, scale)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _visibility(
    sq: int, sk: int, attn_mask: Tensor | None, window: tuple[int, int], device: torch.device
) -> tuple[Tensor | None, bool, Tensor | None]:
    """(bool mask or None, whether the kernel's own causal flag serves, rows that see nothing or None)."""
    left, right = window
    left = -1 if left >= sk - 1 else left
    right = -1 if right >= sq - 1 else right
    if attn_mask is None and left < 0 and (right < 0 or (right == 0 and sq == sk)):
        return None, right == 0, None
    mask = attn_mask if attn_mask is not None else torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    mask = mask.reshape(*[1] * (4 - mask.dim()), *mask.shape)
    if left >= 0 or right >= 0:
        mask = mask & visible_pairs(sq, sk, (left, right), device)
    empty = ~mask.any(-1)
    # The kernels need one visible key a row; such rows are overwritten afterwards.
    return (mask | empty[..., None]).expand(-1, -1, -1, sk), False, empty


def _spoiled(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, Tensor, Tensor]]:
    """Rows (b, hq, sq) whose lse or output a non-finite value spoils, and q, k, v with those values zeroed."""
    if q.device.type == "cpu" and all(bool(x.sum().isfinite()) for x in (q, k, v)):
        return None, None, (q, k, v)
    group = q.shape[2] // k.shape[2]
    bad_q, bad_k, bad_v = ((~x.isfinite()).any(-1).transpose(1, 2) for x in (q, k, v))
    clean = tuple(x.nan_to_num(0.0, 0.0, 0.0) for x in (q, k, v))

    def seen(bad: Tensor) -> Tensor:
        bad = bad.repeat_interleave(group, dim=1)[..., None, :]
        if mask is not None:
            return (bad & mask).any(-1)
        if causal:
            return bad.cumsum(-1)[..., 0, :] > 0
        return bad.any(-1).expand(-1, -1, q.shape[1])

    spoiled_lse = bad_q | seen(bad_k)
    return spoiled_lse, spoiled_lse | seen(bad_v), clean  # type: ignore[return-value]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)


def _at_least_fp32(*tensors: Tensor) -> list[Tensor]:
    """The CPU kernel's 16-bit exp is off by 6e-5 in lse; in fp32 it is exact enough and no slower."""
    return [x.float() if x.element_size() == 2 else x for x in tensors]


def _pad_to(width: int, *tensors: Tensor) -> list[Tensor]:
    return [x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1])) for x in tensors]


def _pad_to_8(*tensors: Tensor) -> list[Tensor]:
    return [_pad_to(-(-x.shape[-1] // 8) * 8, x)[0] for x in tensors]


def _cudnn_fits(q: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """cuDNN takes 16-bit floats, causal or full, up to 256 wide; its backward adds a column for grad_lse."""
    return (
        mask is None
        and q.dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and max(q.shape[-1], v.shape[-1]) <= 256
        and q.shape[2] > 1
    )


def _fused_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """q (b, hq, sq, d), k, v (b, hkv, sk, .) -> out (b, hq, sq, dv), lse (b, hq, sq)."""
    dv, dtype = v.shape[-1], v.dtype
    if q.device.type == "cpu":
        q, k, v = _pad_to(max(q.shape[-1], dv), *_at_least_fp32(q, k, v))
        bias = None if mask is None else _additive(mask, q.dtype)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
        return out[..., :dv].to(dtype), lse
    if _cudnn_fits(q, v, mask):
        q, k, v = _pad_to_8(q, k, v)
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)[:2]
        return out[..., :dv], lse.reshape(lse.shape[:3])
    return blocked.forward(q, k, v, mask, causal, scale)


def _fused_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    dead: Tensor, mask: Tensor | None, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    d, dv, dtype, on_cpu = q.shape[-1], v.shape[-1], q.dtype, q.device.type == "cpu"
    fits = on_cpu or _cudnn_fits(q, v if grad_lse is None else pad(v, (0, 1)), mask)
    if not fits:
        return blocked.backward(grad_out, grad_lse, q, k, v, dead, mask, causal, scale)
    if on_cpu:
        q, k, v, out, grad_out = _at_least_fp32(q, k, v, out, grad_out)
    if grad_lse is not None:
        v, out = pad(v, (0, 1)), torch.cat([out, -grad_lse[..., None].to(out.dtype)], -1)
        grad_out = pad(grad_out, (0, 1), value=1.0)
    if on_cpu:
        q, k, v, out, grad_out = _pad_to(max(q.shape[-1], v.shape[-1]), q, k, v, out, grad_out)
        bias = None if mask is None else _additive(mask, q.dtype)
        dq, dk, grad_v = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
        )
    else:
        dq, dk, grad_v = _cudnn_backward([*_pad_to_8(grad_out, q, k, v, out), lse], causal, scale)
    return dq[..., :d].to(dtype), dk[..., :d].to(dtype), grad_v[..., :dv].to(dtype)


def _cudnn_backward(tensors: Sequence[Tensor], causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv from [grad_out, q, k, v, out, lse]."""
    grad_out, q, k, v, out, lse = tensors
    # Above 2^31 elements of q its dq was wrong in a few hundred places (measured, torch 2.11): go by parts.
    dim = 1 if k.shape[1] > 1 else 0
    if q.numel() > _CUDNN_ELEMENTS and k.shape[dim] > 1:
        first = k.shape[dim] // 2
        cuts = [x.shape[dim] // k.shape[dim] * first for x in tensors]
        halves = zip(*(x.split([cut, x.shape[dim] - cut], dim) for x, cut in zip(tensors, cuts)))
        parts = [_cudnn_backward(half, causal, scale) for half in halves]
        dq, dk, dv = (torch.cat(pieces, dim) for pieces in zip(*parts))
        return dq, dk, dv
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
        grad_out.contiguous(), q, k, v, out, lse[..., None].contiguous(), seed, seed, None, None, None,
        q.shape[2], k.shape[2], 0.0, causal, scale=scale,
    )  # fmt: skip
    return dq, dk, dv

"""Attention over expanded rows by PyTorch's fused SDPA kernels: memory linear in the length.

A mask is n x n where the caller gives one, or where the window, or causality over unequal lengths, needs one.

The kernels are called through their aten operators because those return the log-sum-exp. They do not take a
gradient of it. A column appended to v, out and grad_out does: it adds -grad_lse to the row sum
delta = sum(grad_out * out) that the backward subtracts, and nothing elsewhere. Calls that cuDNN does not take
(masks, windows, fp32) go through `blocked` on CUDA.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import ops
from ..codes import SparseCode
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


def cudnn_takes(
    q: Tensor | SparseCode, k: Tensor | SparseCode, v: Tensor, dtype: torch.dtype, window: tuple[int, int], scale: float
) -> bool:
    """Whether the whole call, without a mask, runs in cuDNN: 16-bit floats, causal over equal lengths or full."""
    (sq, d), sk, (left, right) = (q.shape[1], q.shape[-1]), k.shape[1], window
    return (
        v.is_cuda
        and left < 0
        and (right < 0 or (right == 0 and sq == sk))
        and _cudnn_fits(v.device, dtype, d, v.shape[-1], sq, scale)
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, bad: Tensor, attn_mask: Tensor | None,
    cu_seqlens: tuple[Tensor | None, Tensor | None], window: tuple[int, int], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q (b, sq, hq, d), k (b, sk, hkv, d), v (b, sk, hkv, dv) -> out, lse (b, hq, sq); adds marks to ``bad``."""
    if cu_seqlens[0] is None or cu_seqlens[1] is None:
        if _mends(q, k, v, attn_mask, window, scale):
            return _forward_mended(q, k, v, bad, window, scale)
        out, lse = _forward(q, k, v, attn_mask, window, scale)
        return out.contiguous(), lse.contiguous()
    out = v.new_empty(*q.shape[:3], v.shape[-1])
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=_lse_dtype(v.dtype))
    for rows_q, rows_k in _sequences(cu_seqlens[0], cu_seqlens[1]):
        out[:, rows_q], lse[:, :, rows_q] = _forward(q[:, rows_q], k[:, rows_k], v[:, rows_k], attn_mask, window, scale)
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, bad: Tensor, q: Tensor, k: Tensor, v: Tensor,
    attn_mask: Tensor | None, cu_seqlens: tuple[Tensor | None, Tensor | None], window: tuple[int, int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv of `forward`."""
    if cu_seqlens[0] is None or cu_seqlens[1] is None:
        if _mends(q, k, v, attn_mask, window, scale):
            return _backward_mended(grad_out, grad_lse, out, lse, bad, q, k, v, window, scale)
        return _backward(grad_out, grad_lse, out, lse, q, k, v, attn_mask, window, scale)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows_q, rows_k in _sequences(cu_seqlens[0], cu_seqlens[1]):
        dq[:, rows_q], dk[:, rows_k], dv[:, rows_k] = _backward(
            grad_out[:, rows_q], None if grad_lse is None else grad_lse[:, :, rows_q], out[:, rows_q],
            lse[:, :, rows_q], q[:, rows_q], k[:, rows_k], v[:, rows_k], attn_mask, window, scale,
        )  # fmt: skip
    return dq, dk, dv


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sequences(cu_q: Tensor, cu_k: Tensor) -> list[tuple[slice, slice]]:
    if cu_q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise NotImplementedError("impl='sdpa' reads cu_seqlens on the host, which a CUDA graph cannot capture")
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


def _mends(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, window: tuple[int, int], scale: float) -> bool:
    """Whether cuDNN takes the call and Triton mends what a non-finite value spoils. Else such are zeroed first."""
    fits = attn_mask is None and cudnn_takes(q, k, v, q.dtype, window, scale)
    return fits and k.numel() > 0 and q.numel() > 0 and ops.triton_missing() is None


def _forward_mended(
    q: Tensor, k: Tensor, v: Tensor, bad: Tensor, window: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor]:
    from . import triton_forward

    q, k, v = (whole_lines(x) for x in (q, k, v))
    with torch.autocast("cuda", enabled=False):
        out, lse = _fused_forward(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, window[1] == 0, scale)
    out, lse = out.transpose(1, 2).contiguous(), lse.contiguous()
    triton_forward.rescue(q, k, v, out, lse, bad, triton_forward.Options(*window, scale), first=q.shape[1] - 1)
    return out, lse


def _backward_mended(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, bad: Tensor, q: Tensor, k: Tensor, v: Tensor,
    window: tuple[int, int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from . import triton_backward, triton_forward

    options = triton_forward.Options(*window, scale)
    q, k, v, grad_out = (whole_lines(x) for x in (q, k, v, grad_out))
    alone = k.shape[2] == 1 and q.shape[0] == 1  # and so cannot go by parts
    if grad_lse is not None or (alone and q.numel() > _CUDNN_ELEMENTS):
        return triton_backward.backward(grad_out, grad_lse, q, k, v, out, lse, bad, options)
    with torch.autocast("cuda", enabled=False):
        grads = _fused_backward(
            grad_out.transpose(1, 2), None, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
            out.transpose(1, 2), lse, None, None, window[1] == 0, scale,
        )  # fmt: skip
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    triton_backward.rescue(grad_out, grad_lse, q, k, v, out, lse, bad, dq, dk, dv, options)
    return dq, dk, dv


def whole_lines(x: Tensor) -> Tensor:
    """x, copied if rows do not start at multiples of 16 bytes: TMA cannot read such, cuDNN reads wrong (measured)."""
    starts = [stride for size, stride in zip(x.shape[:-1], x.stride()) if size > 1]
    fits = x.stride(-1) == 1 and all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in starts)
    return x if fits and x.data_ptr() % 16 == 0 else x.contiguous()


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


def _positive(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The CPU kernel masks before it scales, so a scale that is not positive goes into q."""
    return (q, scale) if scale > 0.0 else (q * scale, 1.0)


def _pad_to(width: int, *tensors: Tensor) -> list[Tensor]:
    return [x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1])) for x in tensors]


def _pad_to_8(*tensors: Tensor) -> list[Tensor]:
    return [_pad_to(-(-x.shape[-1] // 8) * 8, x)[0] for x in tensors]


def _cudnn_fits(device: torch.device, dtype: torch.dtype, d: int, dv: int, sq: int, scale: float) -> bool:
    """cuDNN takes 16-bit floats, up to 256 wide on Hopper and later, 128 before."""
    if torch.version.hip is not None or not (torch.compiler.is_compiling() or torch.backends.cudnn.enabled):
        return False
    major = torch.cuda.get_device_capability(device)[0]
    widest = 256 if major >= 9 else 128
    return dtype in (torch.float16, torch.bfloat16) and major >= 8 and max(d, dv) <= widest and sq > 1 and scale > 0.0


def _fused_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """q (b, hq, sq, d), k, v (b, hkv, sk, .) -> out (b, hq, sq, dv), lse (b, hq, sq)."""
    dv, dtype = v.shape[-1], v.dtype
    if q.device.type == "cpu":
        q, k, v = _pad_to(max(q.shape[-1], dv), *_at_least_fp32(q, k, v))
        q, scale = _positive(q, scale)
        bias = None if mask is None else _additive(mask, q.dtype)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
        return out[..., :dv].to(dtype), lse
    if mask is None and _cudnn_fits(q.device, q.dtype, q.shape[-1], dv, q.shape[2], scale):
        q, k, v = _pad_to_8(q, k, v)
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)[:2]
        return out[..., :dv], lse.reshape(lse.shape[:3])
    return blocked.forward(q, k, v, mask, causal, scale)


def _fused_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    dead: Tensor | None, mask: Tensor | None, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    d, dv, dtype, on_cpu = q.shape[-1], v.shape[-1], q.dtype, q.device.type == "cpu"
    wide = dv + (grad_lse is not None)
    fits = on_cpu or (mask is None and _cudnn_fits(q.device, dtype, d, wide, q.shape[2], scale))
    if not fits and dead is not None:
        return blocked.backward(grad_out, grad_lse, q, k, v, dead, mask, causal, scale)
    if on_cpu:
        q, k, v, out, grad_out = _at_least_fp32(q, k, v, out, grad_out)
    if grad_lse is not None:
        v, out = pad(v, (0, 1)), torch.cat([out, -grad_lse[..., None].to(out.dtype)], -1)
        grad_out = pad(grad_out, (0, 1), value=1.0)
    if on_cpu:
        q, k, v, out, grad_out = _pad_to(max(q.shape[-1], v.shape[-1]), q, k, v, out, grad_out)
        bias = None if mask is None else _additive(mask, q.dtype)
        factor = scale if scale <= 0.0 else 1.0
        q, scale = _positive(q, scale)
        dq, dk, grad_v = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
        )
        dq = dq * factor if factor != 1.0 else dq
    else:
        dq, dk, grad_v = _cudnn_backward([*_pad_to_8(grad_out, q, k, v, out), lse], causal, scale)
    return dq[..., :d].to(dtype), dk[..., :d].to(dtype), grad_v[..., :dv].to(dtype)


def _cudnn_backward(tensors: Sequence[Tensor], causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv from [grad_out, q, k, v, out, lse]."""
    grad_out, q, k, v, out, lse = tensors
    # With offsets above 2^31 elements in q its dq was wrong in a few hundred places (measured, torch 2.11), also where
    # q was half of a larger tensor: go by parts, each with memory of its own.
    dim = 1 if k.shape[1] > 1 else 0
    if q.numel() > _CUDNN_ELEMENTS and k.shape[dim] > 1:
        first = k.shape[dim] // 2
        cuts = [x.shape[dim] // k.shape[dim] * first for x in tensors]
        halves = zip(*(x.split([cut, x.shape[dim] - cut], dim) for x, cut in zip(tensors, cuts)))
        parts = [_cudnn_backward([x.contiguous() for x in half], causal, scale) for half in halves]
        dq, dk, dv = (torch.cat(pieces, dim) for pieces in zip(*parts))
        return dq, dk, dv
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
        grad_out, q, k, v, out, lse[..., None].contiguous(), seed, seed, None, None, None,
        q.shape[2], k.shape[2], 0.0, causal, scale=scale,
    )  # fmt: skip
    return dq, dk, dv

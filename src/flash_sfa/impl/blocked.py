"""Attention by blocks of query rows in plain PyTorch: any mask, width and dtype; memory linear in the length.

For calls that a device's fused kernels do not take, or take with larger errors. Scores are computed in fp32
(float64 for float64). Inputs are finite and every row sees a key; `sdpa` sees to both.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_SCORES = 2**27


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """q (b, hq, sq, d), k, v (b, hkv, sk, .) -> out (b, hq, sq, dv) in v's dtype, lse (b, hq, sq)."""
    dtype, (q, k, v) = v.dtype, _prepared(q, k, v)
    outs, lses = [], []
    for rows in _blocks(q, k):
        scores = _scores(q, k, rows, mask, causal, scale)
        lses.append(scores.logsumexp(-1))
        outs.append((scores.softmax(-1) @ v).to(dtype))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, dead: Tensor,
    mask: Tensor | None, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v; ``dead`` (b, hq, sq) marks rows without a gradient."""
    dtype, heads = q.dtype, k.shape[1]
    q, k, v = _prepared(q, k, v)
    grad_out = grad_out.to(q.dtype)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows in _blocks(q, k):
        probs = _scores(q, k, rows, mask, causal, scale).softmax(-1).masked_fill(dead[:, :, rows, None], 0.0)
        do = grad_out[:, :, rows]
        dv += probs.transpose(-1, -2) @ do
        dp = do @ v.transpose(-1, -2)
        delta = (probs * dp).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - grad_lse[:, :, rows, None]
        ds = probs * (dp - delta) * scale
        dq[:, :, rows] = ds @ k
        dk += ds.transpose(-1, -2) @ q[:, :, rows]
    dk, dv = (x.unflatten(1, (heads, -1)).sum(2) for x in (dk, dv))
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _prepared(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    return q.to(acc), k.to(acc).repeat_interleave(group, 1), v.to(acc).repeat_interleave(group, 1)


def _blocks(q: Tensor, k: Tensor) -> Iterator[slice]:
    step = max(1, _SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    for start in range(0, q.shape[2], step):
        yield slice(start, min(start + step, q.shape[2]))


def _scores(q: Tensor, k: Tensor, rows: slice, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    scores = (q[:, :, rows] @ k.transpose(-1, -2)) * scale
    if mask is not None:
        return scores.masked_fill(~(mask[:, :, rows] if mask.shape[2] > 1 else mask), -torch.inf)
    if causal:
        i = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
        return scores.masked_fill(torch.arange(k.shape[2], device=q.device) > i, -torch.inf)
    return scores

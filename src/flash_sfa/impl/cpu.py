r"""Decode over a sparse cache, reading only the V rows that the query needs. Plain PyTorch, any device.

Write w_j = e^{s_j - m} for the exact weight of token j (0 where it is not visible, or has no overlap in drop
mode), Z for their sum, B for a block of 128 tokens of which R are read and U are not, S_B for the running sum of
V over B, and mu_B for the mean of w over U:

    o = (1 / Z) sum_B [ sum_R (w_j - mu_B) v_j + mu_B S_B ]

Exact ("zero" mode): R are the tokens that share a feature with some query of the group. All of U have score 0,
so mu_B = e^{-m}, and this is the zero-overlap identity. m is the maximum of s over counted tokens, so 0 takes part
only if a token without overlap is there; where U is empty, mu_B = 0 and S_B is not used. Both keep it stable: all
w <= 1 and Z >= 1. If mu_B |B| still exceeds 4 Z (few rows of U carry Z), all of B is read.

Tolerance: the row j of U has weight mu_B instead of w_j, so |o - o_exact| <= max|v| * misplaced with
misplaced = sum_U |w_j - mu_B| / Z, summed over blocks; Z and lse stay exact. Let F(U) = sum_U |w - mean(U)|.
F never falls when an element x joins U: F(U) = 2 sum_{w < mean} (mean - w); if x >= mean, the mean rises, and
every term of that sum with it; if x <= mean, the same holds for 2 sum_{w > mean} (w - mean). So
  - rows may be ordered once, by the distance to their block's median c, and the largest prefix with
    sum F <= eps Z found by bisection; F <= 2 sum_U |w - c| gives a prefix that fits to start from;
  - the rows read for a GQA group are the union over its queries: each U shrinks, so each bound still holds.

A block that some query sees only in part (window or causal edge) has no usable sum: its visible rows are read.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..cache import BLOCK, SparseKVCache, _index
from .reference import visible_pairs

_CHUNK = 2**22
_CANCEL = 4.0


def attend(
    q: Tensor,
    members: Tensor | None,
    cache: SparseKVCache,
    layer: int,
    seq_id: int,
    window: tuple[int, int],
    softmax_scale: float,
    drop: bool,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One sequence: q (sq, hq, d) are expanded rows for its last sq tokens.

    members (sq, hq, d) bool marks the features that q keeps; None means that every pair overlaps.
    Returns out (sq, hq, dv), lse (hq, sq), misplaced (hq, sq), rows_read (hkv,), in fp32 (fp64 for fp64).
    """
    pool, sequence = cache._layers[layer], cache._layers[layer].sequences[seq_id]
    (sq, hq, _), n, hkv = q.shape, sequence.length, cache.num_kv_heads
    acc = torch.float64 if cache.dtype == torch.float64 else torch.float32
    group = hq // hkv
    start = max(0, n - sq - window[0]) // BLOCK * BLOCK if window[0] >= 0 else 0

    visible = visible_pairs(sq, n, window, q.device)[:, start:].repeat_interleave(group, dim=0)
    rows_of_q = _by_kv_head(q.to(acc), hkv) * softmax_scale
    rows_of_members = None if members is None else _by_kv_head(members, hkv)
    scores, overlap = _scores(rows_of_q, rows_of_members, cache, layer, seq_id, start)
    counted = visible & overlap if drop else visible.expand_as(scores)
    top = scores.detach().masked_fill(~counted, -torch.inf).amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = (scores - top).masked_fill(~counted, -torch.inf).exp()
    total = weights.sum(-1)
    spoiled = total.isnan()
    weights = weights.masked_fill(spoiled[..., None], 0.0)

    blocks = -(-(n - start) // BLOCK)
    exists = _blocks(torch.ones(n - start, dtype=torch.bool, device=q.device), blocks)
    seen, counted = _blocks(visible, blocks), _blocks(counted, blocks)
    overlap, weights = _blocks(overlap, blocks), _blocks(weights, blocks)
    whole = (seen | ~exists).all(-1)
    edge = ~(whole | ~seen.any(-1)).all(0)
    read = (counted & (overlap | edge[:, None])).any(1)
    if tolerance > 0.0:
        fewer = _fewest_rows(weights.detach(), seen & ~edge[:, None], total.detach(), tolerance)
        fewer |= edge[:, None] & read
        better = fewer.sum((-1, -2)) < read.sum((-1, -2))
        read = torch.where(better[:, None, None], fewer, read)
    mean = _mean_unread(weights, exists & ~read, tolerance)
    # mean * S_B much above Z would cancel against the rows read, in the precision of S_B.
    cancels = (mean.detach() * exists.sum(-1) > _CANCEL * total.detach()[..., None]).any(1)
    read = read | (cancels[..., None] & counted.any(1))
    mean = _mean_unread(weights, exists & ~read, tolerance)
    unread = (exists & ~read)[:, None]
    distance = (weights.detach() - mean.detach()[..., None]).abs().masked_fill(~unread, 0.0)
    safe_total = total.masked_fill(spoiled | (total == 0.0), 1.0)
    misplaced = distance.sum((-1, -2), dtype=torch.float64) / safe_total.detach()

    sums = pool.sums[_index(sequence.sums[start // BLOCK :], q.device)].transpose(0, 1)
    out = _mix(mean, mean > 0.0, sums.to(acc))
    coefficients, counted = (weights - mean[..., None]).flatten(-2), counted.flatten(-2)
    pages = _index(sequence.pages, q.device)
    by_head = []
    for head in range(hkv):
        tokens = read[head].flatten().nonzero()[:, 0]
        position = tokens + start
        at = pages[position // cache.page_size], head, position % cache.page_size
        rows = cache._loaded(pool.v[at], pool.v_scale[at])
        by_head.append(_mix(coefficients[head][:, tokens], counted[head][:, tokens], rows.to(acc)))
    out = ((out + torch.stack(by_head)) / safe_total[..., None]).masked_fill(spoiled[..., None], torch.nan)
    empty = total == 0.0
    lse = (top[..., 0] + safe_total.log()).masked_fill(empty, -torch.inf).masked_fill(spoiled, torch.nan)
    return (
        out.unflatten(1, (sq, group)).permute(1, 0, 2, 3).flatten(1, 2),
        _by_query_head(lse, sq),
        _by_query_head(misplaced, sq),
        read.sum((-1, -2)),
    )


def _by_kv_head(x: Tensor, hkv: int) -> Tensor:
    """(sq, hq, d) -> (hkv, sq * group, d)."""
    return x.unflatten(1, (hkv, -1)).permute(1, 0, 2, 3).flatten(1, 2)


def _by_query_head(x: Tensor, sq: int) -> Tensor:
    """(hkv, sq * group) -> (hq, sq)."""
    return x.unflatten(1, (sq, -1)).transpose(1, 2).flatten(0, 1)


def _blocks(x: Tensor, blocks: int) -> Tensor:
    """(..., t) -> (..., blocks, 128), padded with zeros."""
    return pad(x, (0, blocks * BLOCK - x.shape[-1])).unflatten(-1, (blocks, BLOCK))


def _scores(
    q: Tensor, members: Tensor | None, cache: SparseKVCache, layer: int, seq_id: int, start: int
) -> tuple[Tensor, Tensor]:
    """Scores and overlap (hkv, rows, n - start) of scaled q (hkv, rows, d); NaN where q or k is not finite."""
    pool, sequence = cache._layers[layer], cache._layers[layer].sequences[seq_id]
    rows, w, n = q.shape[1], cache.width, sequence.length
    always = torch.tensor(cache.dense_dims, dtype=torch.int64, device=q.device)
    step = max(BLOCK, _CHUNK // max(1, q.shape[0] * rows * w) // BLOCK * BLOCK)
    scores, overlap = [], []
    for begin in range(start, n, step):
        values, indices, dense = (
            cache._rows(part, sequence, begin, min(begin + step, n)) for part in (pool.values, pool.indices, pool.dense)
        )
        at = indices.long().flatten(1)[:, None].expand(-1, rows, -1)
        s = (q.gather(-1, at).unflatten(-1, (-1, w)) * values[:, None].to(q.dtype)).sum(-1)
        if cache.dense_dims:
            s = s + q.index_select(-1, always) @ dense.to(q.dtype).transpose(-1, -2)
        scores.append(s)
        if members is not None:
            overlap.append(members.gather(-1, at).unflatten(-1, (-1, w)).any(-1))
    s = torch.cat(scores, -1)
    s = s.masked_fill(~s.isfinite() | ~q.isfinite().all(-1, keepdim=True), torch.nan)
    return s, torch.cat(overlap, -1) if members is not None else torch.ones_like(s, dtype=torch.bool)


def _mean_unread(weights: Tensor, unread: Tensor, tolerance: float) -> Tensor:
    """The mean weight of the unread rows: weights (hkv, rows, blocks, 128), unread (hkv, blocks, 128)."""
    outside = weights.masked_fill(~unread[:, None], 0.0)
    # Exact: all counted unread weights are equal, so the maximum is the mean without rounding.
    if tolerance == 0.0:
        return outside.amax(-1)
    return outside.sum(-1) / unread.sum(-1).clamp(min=1)[:, None]


def _mix(weights: Tensor, seen: Tensor, rows: Tensor) -> Tensor:
    """weights @ rows; a non-finite row spoils only where it is seen. (..., q, n), (..., q, n), (..., n, dv)."""
    bad = ~rows.isfinite()
    touched = seen.to(rows.dtype) @ bad.to(rows.dtype) > 0.0
    return (weights @ rows.masked_fill(bad, 0.0)).masked_fill(touched, torch.nan)


def _fewest_rows(weights: Tensor, candidates: Tensor, total: Tensor, tolerance: float) -> Tensor:
    """The rows (hkv, blocks, 128) to read so that no query misplaces more than tolerance of its weight.

    weights (hkv, rows, blocks, 128); candidates (rows, blocks, 128): what a query sees in blocks it sees whole.
    """
    w = weights.double()
    candidates = candidates.expand_as(w)
    center = w.masked_fill(~candidates, torch.nan).nanmedian(-1, keepdim=True).values.nan_to_num(0.0)
    distance = (w - center).abs().masked_fill(~candidates, torch.inf).flatten(-2)
    ordered = distance.sort(stable=True, dim=-1)
    rank = torch.empty_like(ordered.indices).scatter_(
        -1, ordered.indices, torch.arange(distance.shape[-1], device=w.device).expand_as(distance)
    )
    rank = rank.view_as(w)
    budget = tolerance * total.double().nan_to_num(0.0)
    cost = ordered.values.cumsum(-1)
    low, high = ((cost <= factor * budget[..., None]).sum(-1) for factor in (0.5, 4.0))
    for _ in range(8):
        middle = (low + high + 1) // 2
        fits = _spread(w, rank < middle[..., None, None]) <= budget
        low, high = torch.where(fits, middle, low), torch.where(fits, high, (middle - 1).maximum(low))
    return (candidates & (rank >= low[..., None, None])).any(1)


def _spread(w: Tensor, unread: Tensor) -> Tensor:
    """F: the sum over blocks of |w - mean| over unread rows; (..., blocks, 128) -> (...)."""
    mean = w.masked_fill(~unread, 0.0).sum(-1, keepdim=True) / unread.sum(-1, keepdim=True).clamp(min=1)
    return (w - mean).abs().masked_fill(~unread, 0.0).sum((-1, -2))

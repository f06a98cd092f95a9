"""The specification in code: plain PyTorch, any float dtype, any device, O(sq * sk) memory.

    s_ij = softmax_scale * sum over features u kept in both rows of q_iu k_ju
    out_i = sum over visible j of softmax_j(s_i) v_j

Written to be read. Every other implementation is tested against this file run in float64.
"""

import torch
from torch import Tensor


def magnitude_order(x: Tensor) -> Tensor:
    """Integers that rank |x| within a row: larger magnitude first, then lower index; NaN above all."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    rank = torch.where(x.isnan(), torch.nan, x.abs()).view(bits)
    if x.element_size() < 8:
        wide = torch.int32 if x.element_size() == 2 else torch.int64
        lower_first = torch.arange(x.shape[-1] - 1, -1, -1, device=x.device, dtype=wide)
        return rank.to(wide).bitwise_left_shift_(15).bitwise_or_(lower_first)
    return -rank.sort(dim=-1, descending=True, stable=True).indices.argsort(dim=-1)


def topk(x: Tensor, topk: int, dense_dims: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Keep ``dense_dims`` and the ``topk`` largest magnitudes of the other features of every row.

    Returns values (..., w), indices (..., w) ascending, dense (..., r), with w = min(topk, d - r).
    """
    d = x.shape[-1]
    always = torch.tensor(dense_dims, dtype=torch.long, device=x.device)
    order = magnitude_order(x.detach()).index_fill_(-1, always, -x.shape[-1])
    indices = order.topk(min(topk, d - len(dense_dims)), dim=-1).indices.sort(dim=-1).values
    dtype = torch.uint8 if d <= 256 else torch.int16
    return x.gather(-1, indices), indices.to(dtype), x.index_select(-1, always)


def expand(values: Tensor, indices: Tensor, dense: Tensor, dim: int, dense_dims: tuple[int, ...]) -> Tensor:
    """The dense rows (..., dim) of a code: zeros elsewhere, repeated indices add."""
    x = values.new_zeros(*values.shape[:-1], dim).scatter_add(-1, indices.long(), values)
    always = torch.tensor(dense_dims, dtype=torch.long, device=x.device)
    return x.index_add_(-1, always, dense) if dense_dims else x


def gather(x: Tensor, indices: Tensor, dense_dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """x at the indices of a code and at its always-on features: the transpose of `expand`."""
    always = torch.tensor(dense_dims, dtype=torch.long, device=x.device)
    return x.gather(-1, indices.long()), x.index_select(-1, always)


def topk_kept(x: Tensor, topk_: int, dense_dims: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`topk`, and the expanded code."""
    code = topk(x, topk_, dense_dims)
    return *code, expand(*code, x.shape[-1], dense_dims)


def keep(x: Tensor, indices: Tensor, dense_dims: tuple[int, ...]) -> Tensor:
    """Rows of x with zeros at features that a code does not keep."""
    return x.masked_fill(~members(indices, x.shape[-1], dense_dims), 0.0)


def members(indices: Tensor, dim: int, dense_dims: tuple[int, ...]) -> Tensor:
    """True at the features that a row keeps, stored zeros included: (..., dim) bool."""
    kept = torch.zeros(*indices.shape[:-1], dim, dtype=torch.bool, device=indices.device)
    always = torch.tensor(dense_dims, dtype=torch.long, device=indices.device)
    return kept.scatter(-1, indices.long(), True).index_fill(-1, always, True)


def visible_pairs(sq: int, sk: int, window: tuple[int, int], device: torch.device) -> Tensor:
    """(sq, sk) bool: i + sk - sq - left <= j <= i + sk - sq + right, with -1 for unlimited."""
    i = torch.arange(sq, device=device)[:, None] + sk - sq
    return _in_window(i, torch.arange(sk, device=device)[None, :], window)


def visible_pairs_varlen(cu_q: Tensor, cu_k: Tensor, total_q: int, total_k: int, window: tuple[int, int]) -> Tensor:
    """(total_q, total_k) bool: the same rule inside each sequence, nothing across sequences."""
    i, j = torch.arange(total_q, device=cu_q.device), torch.arange(total_k, device=cu_q.device)
    seq_i = torch.searchsorted(cu_q, i.to(cu_q.dtype), right=True) - 1
    seq_j = torch.searchsorted(cu_k, j.to(cu_k.dtype), right=True) - 1
    end_q, end_k = cu_q[1:].long(), cu_k[1:].long()
    i_from_end = (i - end_q[seq_i])[:, None]
    j_from_end = (j - end_k[seq_j])[None, :]
    return (seq_i[:, None] == seq_j[None, :]) & _in_window(i_from_end, j_from_end, window)


def _in_window(i: Tensor, j: Tensor, window: tuple[int, int]) -> Tensor:
    left, right = window
    seen = torch.ones_like(i - j, dtype=torch.bool)
    if left >= 0:
        seen = seen & (j >= i - left)
    if right >= 0:
        seen = seen & (j <= i + right)
    return seen


def attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Exact softmax attention on expanded rows.

    q (b, sq, hq, d), k (b, sk, hkv, d), v (b, sk, hkv, dv), visible broadcastable to (b, hq, sq, sk).
    Returns out (b, sq, hq, dv) in v's dtype and lse (b, hq, sq) in fp32 (fp64 for fp64).
    A row that sees nothing gives 0 and lse -inf. A non-finite row spoils only the queries that see it.
    """
    device = "cuda" if v.is_cuda else "cpu"
    with torch.autocast(device, enabled=False):  # the dtype is decided; sums stay in fp32
        dtype, acc = v.dtype, torch.float64 if v.dtype == torch.float64 else torch.float32
        group = q.shape[2] // k.shape[2]
        q, k, v = (x.to(acc).transpose(1, 2) for x in (q, k, v))
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)

        bad_q, bad_k, bad_v = (~x.isfinite() for x in (q, k, v))
        q, k, v = (x.masked_fill(bad, 0.0) for x, bad in ((q, bad_q), (k, bad_k), (v, bad_v)))
        visible = visible.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        scores = (softmax_scale * (q @ k.transpose(-1, -2))).masked_fill(~visible, -torch.inf)
        empty = ~visible.any(-1, keepdim=True)
        lse = scores.logsumexp(dim=-1)
        probs = scores.masked_fill(empty, 0.0).softmax(dim=-1).masked_fill(empty, 0.0)
        if dropout_p > 0.0:
            probs = torch.nn.functional.dropout(probs, dropout_p)
        out = probs @ v

        spoiled = bad_q.any(-1) & visible.any(-1) | (visible & bad_k.any(-1)[..., None, :]).any(-1)
        touched = visible.to(acc) @ bad_v.to(acc) > 0
        lse = lse.masked_fill(spoiled, torch.nan)
        out = out.masked_fill(spoiled[..., None] | touched, torch.nan)
        return out.transpose(1, 2).to(dtype), lse

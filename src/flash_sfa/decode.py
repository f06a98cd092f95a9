"""Attention of new queries over a `SparseKVCache`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .api import _add_batch, sfa_attention
from .cache import SparseKVCache, _capturing
from .checks import (
    IMPLS,
    NONOVERLAP,
    check_bool,
    check_choice,
    check_fraction,
    check_real,
    check_same,
    check_tensor,
    check_topk_pair,
    check_window,
)
from .codes import SparseCode, autocast_dtype, topk_sparsify
from .impl import cpu, cpu_numba, cuda_decode, reference
from .impl import sdpa as sdpa_impl

_SHORT = 16
# Tokens whose keys are expanded at a time where a long prompt meets the cache in chunks.
_SPAN = 2**15
_NOT_BUILT = {
    "triton": "no Triton decode kernel is built yet",
    "intersect": "the paper's posting-list kernel does not read a cache",
}


def sfa_attention_with_kvcache(
    q: Tensor | SparseCode,
    cache: SparseKVCache,
    *,
    k: Tensor | SparseCode | None = None,
    v: Tensor | None = None,
    layer: int = 0,
    seq_ids: Any = None,
    topk: int | tuple[int | None, int | None] | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    nonoverlap: str = "zero",
    tolerance: float = 0.0,
    return_lse: bool = False,
    return_stats: bool = False,
    impl: str = "auto",
) -> Any:
    r"""`sfa_attention` of the last sq tokens of each sequence over all its cached tokens.

    .. math::
        s_{ij} = \text{softmax\_scale} \sum_{u \in I_i \cap J_j} q_{iu} k_{ju}, \qquad
        o_i = \sum_{j\ \text{visible}} \text{softmax}_j(s_i)\, v_j

    With ``tolerance=eps`` the "cpu" implementation leaves V rows unread as long as the weight it misplaces is at
    most eps a query: then max|o - o_exact| <= eps * max|v| a head, plus rounding. lse stays exact.

    Args:
        q: (b, sq, hq, d) tensor or SparseCode in the cache's dtype, hq a multiple of the cache's heads. Row b
            belongs to seq_ids[b]; its query i stands at position length - sq + i.
        cache: keys and values; dense_dims come from it.
        k, v: (b, sq, hkv, d) and (b, sq, hkv, dv), appended to the layer first, as by `SparseKVCache.append`.
        layer: the layer of the cache.
        seq_ids: list of ints or integer tensor; None means all live sequences in order.
        topk: entries kept in a row of q: an int equal to the cache's topk, or (topk_q, cache.topk), with None to
            leave q dense. Default: the cache's topk. A SparseCode brings its own.
        causal, window_size: visibility as in `sfa_attention`, from each sequence's own end.
        softmax_scale: default d ** -0.5.
        nonoverlap: "zero" or "drop", as in `sfa_attention`.
        tolerance: misplaced weight allowed, in [0, 1). "reference" and "sdpa" are exact for any.
        return_lse, return_stats: also return lse, and a dict of statistics.
        impl: "auto" (for at most 16 queries "cpu" on the CPU and "cuda" on a GPU where it can, else `sfa_attention`
            over spans of the cache), "cpu" (reads only the V rows it needs; any device; with numba, compiled, for an
            exact call on the CPU without gradient), "cuda" (the same in a kernel; exact
            for any tolerance; no gradient), "reference" or "sdpa" (`sfa_attention` over spans of the cache).

    Returns:
        out (b, sq, hq, dv) in the cache's dtype; then, if asked, lse (b, hq, sq), fp32 (float64 for float64), and
        {"misplaced_weight": fp32 (b, hq, sq), "rows_read": int64 (b, hkv), the V rows that were read}. A query
        that sees nothing (empty sequence, or before its first token) gives 0 and lse -inf. Gradients reach q
        only: the cache stores none.

    Raises:
        TypeError, ValueError: an argument is wrong or the cache is full; nothing was appended.
        NotImplementedError: an impl that is not built, or that cannot do the call.

    Source: scores are those of arXiv 2603.22300; exact V skipping and the tolerance are ours, derived in
    ``flash_sfa/impl/cpu.py``.

    Example:
        >>> import torch
        >>> from flash_sfa import SparseKVCache, sfa_attention_with_kvcache
        >>> cache = SparseKVCache(num_kv_heads=2, head_dim=64, topk=8, max_tokens=256, dtype=torch.float32)
        >>> ids = cache.alloc(1)
        >>> q, k, v = torch.randn(1, 5, 4, 64), torch.randn(1, 5, 2, 64), torch.randn(1, 5, 2, 64)
        >>> sfa_attention_with_kvcache(q, cache, k=k, v=v).shape
        torch.Size([1, 5, 4, 64])
    """
    if not isinstance(cache, SparseKVCache):
        raise TypeError(f"cache must be a SparseKVCache, got {type(cache).__name__}")
    check_choice(impl, "impl", IMPLS)
    check_choice(nonoverlap, "nonoverlap", NONOVERLAP)
    check_bool(causal, "causal")
    check_bool(return_lse, "return_lse")
    check_bool(return_stats, "return_stats")
    tolerance = check_fraction(tolerance, "tolerance")
    left, right = check_window(window_size)
    right = 0 if causal else right
    scale = cache.head_dim**-0.5 if softmax_scale is None else check_real(softmax_scale, "softmax_scale")
    layer = cache._check_layer(layer)
    ids = cache._check_ids(seq_ids)
    _check_q(q, cache, len(ids))
    topk_q = _check_topk(q, topk, cache)
    if (k is None) != (v is None):
        raise ValueError(f"k and v go together, got {'v without k' if k is None else 'k without v'}")
    if k is not None:
        cache._check_rows(k, v, len(ids))
        check_same("k", k.shape[1], "q", q.shape[1], "length")
    can_drop = nonoverlap == "drop" and not cache.dense_dims and (topk_q is not None or isinstance(q, SparseCode))
    grad = torch.is_grad_enabled() and _anchor(q).requires_grad
    impl = _choose(impl, cache, q.shape[1], can_drop, grad)
    if impl != "cuda" and _capturing(cache.device):
        raise NotImplementedError(
            f"impl={impl!r} reads lengths on the host, which a CUDA graph cannot capture; only 'cuda' can be captured"
            f" ({cuda_decode.unsupported(cache, q.shape[1], grad=grad) or 'which can do this call'})"
        )

    if isinstance(q, Tensor) and topk_q is not None and impl == "cpu" and not grad and cpu_numba.takes_cache(cache):
        q = cpu_numba.sparsify(q.to(cache.dtype), topk_q)
    elif isinstance(q, Tensor) and topk_q is not None and impl != "cuda":  # whose kernel ranks q itself
        q = topk_sparsify(q, topk_q, dense_dims=cache.dense_dims)
    q = q.to(cache.dtype)
    if k is not None and v is not None:
        cache.append(k, v, layer=layer, seq_ids=ids)
    # The top-k above is decided in the autocast dtype; what follows accumulates in fp32.
    with torch.autocast(cache.device.type, enabled=False):
        if impl == "cpu":
            parts = _cpu(q, cache, layer, ids, (left, right), scale, can_drop, tolerance)
        elif impl == "cuda":
            with torch.no_grad():
                parts = cuda_decode.attend(
                    q, cache, layer, ids, (left, right), scale, can_drop, return_stats, topk=topk_q
                )
        else:
            parts = _gathered(q, cache, layer, ids, (left, right), scale, nonoverlap, impl)
    out, lse, misplaced, rows_read = parts
    results: list[Any] = [out]
    if return_lse:
        results.append(lse)
    if return_stats:
        results.append({"misplaced_weight": misplaced.float(), "rows_read": rows_read})
    return tuple(results) if len(results) > 1 else out


def _check_q(q: Any, cache: SparseKVCache, batch: int) -> None:
    rows = q.values if isinstance(q, SparseCode) else check_tensor(q, "q")
    if rows.dim() != 4:
        raise ValueError(f"q must be (batch, seqlen, heads, head_dim), got {rows.dim()} dimensions: {tuple(q.shape)}")
    if q.shape[0] != batch:
        raise ValueError(f"q must have one row for each of the {batch} sequences of seq_ids, got {q.shape[0]}")
    if q.shape[3] != cache.head_dim:
        raise ValueError(f"q must have the cache's head dim, {cache.head_dim}, got {q.shape[3]}")
    if q.shape[2] < 1 or q.shape[2] % cache.num_kv_heads:
        raise ValueError(f"the heads of q must be a multiple of the cache's {cache.num_kv_heads}, got {q.shape[2]}")
    if rows.device != cache.device:
        raise ValueError(f"q must be on the cache's device, {cache.device}, got {rows.device}")
    if autocast_dtype(rows) != cache.dtype:
        raise TypeError(f"q must have the cache's dtype, {cache.dtype}, got {autocast_dtype(rows)}")
    if isinstance(q, SparseCode) and q.dense_dims != cache.dense_dims:
        raise ValueError(f"q must be a code with the cache's dense_dims, {cache.dense_dims}, got {q.dense_dims}")


def _check_topk(q: Tensor | SparseCode, topk: Any, cache: SparseKVCache) -> int | None:
    """What q is to be sparsified to; None: it stays as it is."""
    is_code = isinstance(q, SparseCode)
    if topk is None:
        return None if is_code else cache.topk
    topk_q, topk_k = check_topk_pair(topk)
    most = cache.head_dim - len(cache.dense_dims)
    if topk_k is None or min(topk_k, most) != cache.width:
        raise ValueError(
            f"topk={topk!r} differs from the cache, which holds keys with topk={cache.topk}; "
            f"give (topk_q, {cache.topk}) for another topk of q"
        )
    if not isinstance(q, SparseCode):
        return topk_q
    if topk_q is None or min(topk_q, most) != q.topk:
        raise ValueError(f"topk={topk!r} differs from the code q, which holds {q.topk} entries a row")
    return None


def _choose(impl: str, cache: SparseKVCache, sq: int, can_drop: bool, grad: bool) -> str:
    if impl in _NOT_BUILT:
        raise NotImplementedError(f"impl={impl!r}: {_NOT_BUILT[impl]}")
    if impl == "auto" and cache.device.type == "cpu" and sq <= _SHORT:
        return "cpu"
    if impl == "cuda" or (impl == "auto" and cache.device.type == "cuda"):
        reason = cuda_decode.unsupported(cache, sq, grad=grad)
        if reason is None:
            return "cuda"
        if impl == "cuda":
            raise NotImplementedError(f"impl='cuda': {reason}")
    problem = sdpa_impl.unsupported(cache.dtype, cache.device, can_drop=can_drop, dropout_p=0.0, deterministic=False)
    if impl == "sdpa" and problem is not None:
        raise NotImplementedError(f"impl='sdpa': {problem}")
    if impl == "auto" and cache.device.type == "cpu":
        return "sdpa" if problem is None else "reference"
    return impl


def _cpu(
    q: Tensor | SparseCode, cache: SparseKVCache, layer: int, ids: list[int], window: tuple[int, int],
    scale: float, drop: bool, tolerance: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    members = None
    if isinstance(q, SparseCode):
        grad = torch.is_grad_enabled() and q.values.requires_grad
        if tolerance == 0.0 and not grad and cpu_numba.takes_cache(cache):
            return cpu_numba.attend(q, cache, layer, ids, window, scale, drop)
        if not cache.dense_dims:
            members = reference.members(q.indices, q.dim, q.dense_dims)
        q = q.to_dense()
    parts = []
    for row, seq_id in enumerate(ids):
        mine = None if members is None else members[row]
        if q.shape[1] == 0 or cache._layers[layer].sequences[seq_id].length == 0:
            parts.append(_nothing(q, cache))
        else:
            parts.append(cpu.attend(q[row], mine, cache, layer, seq_id, window, scale, drop, tolerance))
    return _stack(parts, q, cache)


def _gathered(
    q: Tensor | SparseCode, cache: SparseKVCache, layer: int, ids: list[int], window: tuple[int, int],
    scale: float, nonoverlap: str, impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Prefill over the cache, a span of tokens at a time, so that dense keys never exist as a whole.

    A window, and a q that needs a gradient, take one span.
    """
    parts = []
    grad = torch.is_grad_enabled() and _anchor(q).requires_grad
    for row, seq_id in enumerate(ids):
        length = cache._layers[layer].sequences[seq_id].length
        if q.shape[1] == 0 or length == 0:
            parts.append(_nothing(q, cache))
            continue
        mine = q.map(_row_of(row)) if isinstance(q, SparseCode) else q[row, None]
        result = None
        spans = [(0, length)] if grad and window[0] < 0 else _spans(length, q.shape[1], window[0])
        for start, stop in spans:
            code, v = cache._span(layer, seq_id, start, stop)
            part = sfa_attention(
                mine, code.map(_add_batch), v.to(cache.dtype)[None], softmax_scale=scale, nonoverlap=nonoverlap,
                window_size=window if stop == length else (-1, -1), return_lse=True, impl=impl,
            )  # fmt: skip
            result = part if result is None else _merge(result, part)
        assert result is not None
        out, lse = result
        rows_read = torch.full((cache.num_kv_heads,), length - spans[0][0], dtype=torch.int64, device=cache.device)
        parts.append((out[0], lse[0], torch.zeros_like(lse[0]), rows_read))
    return _stack(parts, q, cache)


def _spans(length: int, sq: int, left: int) -> list[tuple[int, int]]:
    """The tokens to attend to, in pieces: all queries see all of each but the last, which holds the queries' own."""
    if 0 <= left < length - 1:
        return [(max(0, length - sq - left), length)]
    cuts = [0, *range(_SPAN, length - sq + 1, _SPAN)]
    return list(zip(cuts, [*cuts[1:], length]))


def _merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the keys of both: out (b, sq, hq, dv) and lse (b, hq, sq) of each."""
    lse = torch.logaddexp(one[1], other[1])
    base = lse.masked_fill(lse == -torch.inf, 0.0)
    shares = [(x - base).exp().transpose(1, 2)[..., None] for x in (one[1], other[1])]
    return one[0] * shares[0] + other[0] * shares[1], lse


def _anchor(q: Tensor | SparseCode) -> Tensor:
    return q.values if isinstance(q, SparseCode) else q


def _row_of(row: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x[row, None]


def _nothing(q: Tensor | SparseCode, cache: SparseKVCache) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result of queries that see no token."""
    sq, hq = q.shape[1:3]
    acc = torch.float64 if cache.dtype == torch.float64 else torch.float32
    zeros = torch.zeros(sq, hq, cache.v_head_dim, dtype=acc, device=cache.device)
    lse = torch.full((hq, sq), -torch.inf, dtype=acc, device=cache.device)
    rows_read = torch.zeros(cache.num_kv_heads, dtype=torch.int64, device=cache.device)
    if _anchor(q).requires_grad:  # keeps the results in the graph of q, with zero gradients
        nothing = _anchor(q).flatten()[:0].sum().to(acc)
        zeros, lse = zeros + nothing, lse + nothing
    return zeros, lse, torch.zeros_like(lse), rows_read


def _stack(
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]], q: Tensor | SparseCode, cache: SparseKVCache
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not parts:
        out, lse, misplaced, rows_read = (x[None][:0] for x in _nothing(q, cache))
    else:
        out, lse, misplaced, rows_read = (torch.stack(column) for column in zip(*parts))
    return out.to(cache.dtype), lse, misplaced, rows_read

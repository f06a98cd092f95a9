"""The public attention functions: check the meaning of a call, sparsify, choose an implementation."""

import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import fused, ops
from .checks import (
    IMPLS,
    MAX_DIM,
    NONOVERLAP,
    check_bool,
    check_choice,
    check_dense_dims,
    check_fraction,
    check_head_dim,
    check_real,
    check_same,
    check_score_dtype,
    check_tensor,
    check_topk,
    check_topk_pair,
    check_window,
    is_int,
)
from .codes import SparseCode, autocast_dtype, topk_sparsify
from .impl import cpu_numba, intersect, reference
from .impl import sdpa as sdpa_impl

logger = logging.getLogger("flash_sfa")


@dataclass(frozen=True)
class _Side:
    """How q or k is to be sparsified: topk None keeps it as it is (dense, or a code already)."""

    topk: int | None
    dense_dims: tuple[int, ...]
    is_code: bool

    @property
    def is_dense(self) -> bool:
        return self.topk is None and not self.is_code


@dataclass(frozen=True)
class _Call:
    """A checked attention call."""

    q_side: _Side
    k_side: _Side
    dim: int
    window: tuple[int, int]
    softmax_scale: float
    nonoverlap: str
    dropout_p: float
    return_lse: bool
    impl: str
    backward: str
    reason: str
    dtype: torch.dtype

    @property
    def can_drop(self) -> bool:
        """Whether some pair may have no common feature, in drop mode."""
        return self.nonoverlap == "drop" and not (
            self.q_side.is_dense
            or self.k_side.is_dense
            or bool(set(self.q_side.dense_dims) & set(self.k_side.dense_dims))
        )


@overload
def sfa_attention(
    q: Tensor | SparseCode, k: Tensor | SparseCode, v: Tensor, *,
    topk: int | tuple[int | None, int | None] | None = None, dense_dims: int | Sequence[int] = 0,
    attn_mask: Tensor | None = None, causal: bool = False, softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1), nonoverlap: str = "zero", dropout_p: float = 0.0,
    deterministic: bool = False, tolerance: float = 0.0, score_dtype: None = None,
    return_lse: Literal[False] = False, impl: str = "auto",
) -> Tensor: ...  # fmt: skip
@overload
def sfa_attention(
    q: Tensor | SparseCode, k: Tensor | SparseCode, v: Tensor, *,
    topk: int | tuple[int | None, int | None] | None = None, dense_dims: int | Sequence[int] = 0,
    attn_mask: Tensor | None = None, causal: bool = False, softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1), nonoverlap: str = "zero", dropout_p: float = 0.0,
    deterministic: bool = False, tolerance: float = 0.0, score_dtype: None = None,
    return_lse: Literal[True], impl: str = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def sfa_attention(
    q: Tensor | SparseCode,
    k: Tensor | SparseCode,
    v: Tensor,
    *,
    topk: int | tuple[int | None, int | None] | None = None,
    dense_dims: int | Sequence[int] = 0,
    attn_mask: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    nonoverlap: str = "zero",
    dropout_p: float = 0.0,
    deterministic: bool = False,
    tolerance: float = 0.0,
    score_dtype: None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Sparse Feature Attention: exact softmax over scores from the top-k features of q and k.

    .. math::
        s_{ij} = \text{softmax\_scale} \sum_{u \in I_i \cap J_j} q_{iu} k_{ju}, \qquad
        o_i = \sum_{j\ \text{visible}} \frac{e^{s_{ij}}}{\sum_{j'} e^{s_{ij'}}} v_j

    I_i and J_j are the features kept in row i of q and row j of k: the ``dense_dims``, and the ``topk`` of
    largest magnitude among the others. V is dense. Gradients are straight-through on kept coordinates.

    Args:
        q: (b, sq, hq, d) tensor or SparseCode.
        k: (b, sk, hkv, d) tensor or SparseCode, hq % hkv == 0 (GQA).
        v: (b, sk, hkv, dv); dv may differ from d. All of one dtype: float16, bfloat16, float32, float64.
        topk: entries kept a row, for both sides, or (topk_q, topk_k) with None for a dense side. A SparseCode
            brings its own; with one code, topk applies to the other side (None: it stays dense).
        dense_dims: features always kept in a tensor that is sparsified here: the first r, or their numbers.
        attn_mask: bool, True = visible, broadcastable to (b, hq, sq, sk); ANDed with the rest.
        causal: query i sees keys j <= i + sk - sq (aligned bottom right).
        softmax_scale: factor on the scores; default d ** -0.5.
        window_size: (left, right); key j is visible if i + sk - sq - left <= j <= i + sk - sq + right;
            -1 is unlimited. causal sets right to 0.
        nonoverlap: weight of a pair without a common feature: "zero" (score 0, weight e^0; the paper's
            formula) or "drop" (weight 0; the paper's algorithm).
        dropout_p: dropout on the probabilities, in [0, 1).
        deterministic: ask for bitwise equal gradients over runs.
        tolerance: allowed misplaced weight in [0, 1); the implementations here are exact for any.
        score_dtype: None only; no implementation computes scores in a narrower type yet.
        return_lse: also return the log-sum-exp.
        impl: "auto", "reference", "sdpa" (PyTorch's fused kernels; cuDNN on CUDA), "triton" (CUDA; masks only as key
            padding, (b, 1, 1, sk)), "cuda" (Hopper: compute capability 9.0; bfloat16, d and dv of 64, 128 or 256, full
            or causal, no mask, window or dropout; the backward is cuDNN's or Triton's), "intersect" (the paper's
            posting lists; CUDA, forward only, two sparse sides) or "cpu" (posting lists on the CPU, with numba; forward
            only, two sparse sides, no mask).

    Returns:
        out (b, sq, hq, dv) in the dtype of v; with return_lse also lse (b, hq, sq), natural log, fp32
        (float64 for float64), before dropout, differentiable. A row that sees nothing gives 0, lse -inf.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what came and what is allowed.
        NotImplementedError: an explicit impl cannot do the call, or is not built.
        RuntimeError: a second derivative is asked for (except with impl="reference").

    Source: arXiv 2603.22300; dense_dims, nonoverlap and the tie rule are ours.

    Example:
        >>> import torch
        >>> from flash_sfa import sfa_attention
        >>> q, k, v = (torch.randn(1, 16, 4, 64) for _ in range(3))
        >>> sfa_attention(q, k, v, topk=8, causal=True).shape
        torch.Size([1, 16, 4, 64])
    """
    _check_ranks(q, k, v, 4)
    b, sq = q.shape[:2]
    check_same("k", k.shape[0], "q", b, "batch size")
    call = _check_call(
        q, k, v, topk, dense_dims, causal, softmax_scale, window_size, nonoverlap, dropout_p, deterministic,
        tolerance, score_dtype, return_lse, impl, attn_mask,
    )  # fmt: skip
    if call.impl == "intersect":
        out, lse = _intersect(q, k, v, call)
    elif call.impl == "cpu":
        out, lse = _cpu(q, k, v, call)
    elif call.impl != "reference":
        out, lse = _fused(q, k, v, call, attn_mask=attn_mask)
    else:
        q, k, v = _sparsify(q, k, v, call)
        visible = reference.visible_pairs(sq, k.shape[1], call.window, v.device)
        if attn_mask is not None:
            visible = visible & attn_mask
        out, lse = _reference(q, k, v, call, visible)
    return (out, lse) if return_lse else out


@overload
def sfa_attention_varlen(
    q: Tensor | SparseCode, k: Tensor | SparseCode, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    topk: int | tuple[int | None, int | None] | None = None, dense_dims: int | Sequence[int] = 0,
    causal: bool = False, softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1), nonoverlap: str = "zero", dropout_p: float = 0.0,
    deterministic: bool = False, tolerance: float = 0.0, score_dtype: None = None,
    return_lse: Literal[False] = False, impl: str = "auto",
) -> Tensor: ...  # fmt: skip
@overload
def sfa_attention_varlen(
    q: Tensor | SparseCode, k: Tensor | SparseCode, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    topk: int | tuple[int | None, int | None] | None = None, dense_dims: int | Sequence[int] = 0,
    causal: bool = False, softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1), nonoverlap: str = "zero", dropout_p: float = 0.0,
    deterministic: bool = False, tolerance: float = 0.0, score_dtype: None = None,
    return_lse: Literal[True], impl: str = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def sfa_attention_varlen(
    q: Tensor | SparseCode,
    k: Tensor | SparseCode,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    topk: int | tuple[int | None, int | None] | None = None,
    dense_dims: int | Sequence[int] = 0,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    nonoverlap: str = "zero",
    dropout_p: float = 0.0,
    deterministic: bool = False,
    tolerance: float = 0.0,
    score_dtype: None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""`sfa_attention` on packed sequences: sequence s is rows cu_seqlens[s] to cu_seqlens[s + 1].

    The formula is that of `sfa_attention` inside each sequence; nothing is visible across sequences, and
    ``causal`` and ``window_size`` count from each sequence's own end. A sequence may be empty on either side.

    Args:
        q: (total_q, hq, d) tensor or SparseCode; k: (total_k, hkv, d); v: (total_k, hkv, dv).
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,), from 0 to the total, not decreasing, on q's device.
            The values are checked on CPU tensors, on CUDA only with FLASH_SFA_CHECK=1 in the environment.
        max_seqlen_q, max_seqlen_k: at least the longest sequence; required on CUDA under torch.compile or graph
            capture, faster on CUDA if given. Checked like cu_seqlens: on CUDA rows beyond a max_seqlen that is too
            small are not computed.
        The other arguments are those of `sfa_attention`; there is no attn_mask. impl="sdpa" reads cu_seqlens on the
            host (on CUDA that waits for the GPU); "triton" does not.

    Returns:
        out (total_q, hq, dv); with return_lse also lse (hq, total_q).

    Raises:
        TypeError, ValueError, NotImplementedError: as `sfa_attention`.

    Source: arXiv 2603.22300.

    Example:
        >>> import torch
        >>> from flash_sfa import sfa_attention_varlen
        >>> q, k, v = (torch.randn(10, 2, 32) for _ in range(3))
        >>> cu = torch.tensor([0, 4, 4, 10], dtype=torch.int32)
        >>> sfa_attention_varlen(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, topk=4, causal=True).shape
        torch.Size([10, 2, 32])
    """
    _check_ranks(q, k, v, 3)
    call = _check_call(
        q, k, v, topk, dense_dims, causal, softmax_scale, window_size, nonoverlap, dropout_p, deterministic,
        tolerance, score_dtype, return_lse, impl,
    )  # fmt: skip
    _check_cu_seqlens(cu_seqlens_q, "cu_seqlens_q", q.shape[0], "q", v.device)
    _check_cu_seqlens(cu_seqlens_k, "cu_seqlens_k", k.shape[0], "k", v.device)
    check_same("cu_seqlens_k", cu_seqlens_k.shape[0], "cu_seqlens_q", cu_seqlens_q.shape[0], "length")
    _check_max_seqlen(max_seqlen_q, "max_seqlen_q", cu_seqlens_q)
    _check_max_seqlen(max_seqlen_k, "max_seqlen_k", cu_seqlens_k)
    q, k = (x.map(_add_batch) if isinstance(x, SparseCode) else x[None] for x in (q, k))
    v = v[None]
    if call.impl == "cpu":
        out, lse = _cpu(q, k, v, call, (cu_seqlens_q, cu_seqlens_k))
    elif call.impl != "reference":
        longest = max_seqlen_q, max_seqlen_k
        out, lse = _fused(q, k, v, call, cu_seqlens=(cu_seqlens_q, cu_seqlens_k), max_seqlens=longest)
    else:
        q, k, v = _sparsify(q, k, v, call)
        visible = reference.visible_pairs_varlen(cu_seqlens_q, cu_seqlens_k, q.shape[1], k.shape[1], call.window)
        out, lse = _reference(q, k, v, call, visible)
    return (out[0], lse[0]) if return_lse else out[0]


def select_impl(
    q: Tensor | SparseCode,
    k: Tensor | SparseCode,
    v: Tensor,
    *,
    topk: int | tuple[int | None, int | None] | None = None,
    dense_dims: int | Sequence[int] = 0,
    attn_mask: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    nonoverlap: str = "zero",
    dropout_p: float = 0.0,
    deterministic: bool = False,
    tolerance: float = 0.0,
    score_dtype: None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> dict[str, str]:
    """Which implementation `sfa_attention` would use for this call, and why. Nothing is computed.

    Takes the arguments of `sfa_attention` and raises what it raises.

    Returns:
        {"forward": name, "backward": name, or "none" where there is no backward, "reason": one sentence}.

    Example:
        >>> import torch
        >>> from flash_sfa import select_impl
        >>> x = torch.randn(1, 8, 2, 32)
        >>> select_impl(x, x, x, topk=4)["forward"]
        'sdpa'
    """
    _check_ranks(q, k, v, 4)
    check_same("k", k.shape[0], "q", q.shape[0], "batch size")
    call = _check_call(
        q, k, v, topk, dense_dims, causal, softmax_scale, window_size, nonoverlap, dropout_p, deterministic,
        tolerance, score_dtype, return_lse, impl, attn_mask,
    )  # fmt: skip
    backward = "none" if call.impl in ("intersect", "cpu") else call.backward
    return {"forward": call.impl, "backward": backward, "reason": call.reason}


def _add_batch(x: Tensor) -> Tensor:
    return x[None]


def _check_ranks(q: Any, k: Any, v: Any, ndim: int) -> None:
    shape = "(batch, seqlen, heads, head_dim)" if ndim == 4 else "(total, heads, head_dim)"
    for x, name in ((q, "q"), (k, "k")):
        rows = x.values if isinstance(x, SparseCode) else check_tensor(x, name)
        if rows.dim() != ndim:
            raise ValueError(f"{name} must be {shape}, got {rows.dim()} dimensions: {tuple(x.shape)}")
    check_tensor(v, "v")
    if v.dim() != ndim:
        raise ValueError(f"v must be {shape}, got {v.dim()} dimensions: {tuple(v.shape)}")


def _check_call(
    q: Tensor | SparseCode, k: Tensor | SparseCode, v: Tensor, topk: Any, dense_dims: Any, causal: Any,
    softmax_scale: Any, window_size: Any, nonoverlap: Any, dropout_p: Any, deterministic: Any, tolerance: Any,
    score_dtype: Any, return_lse: Any, impl: Any, attn_mask: Any = None,
) -> _Call:  # fmt: skip
    check_choice(impl, "impl", IMPLS)
    check_choice(nonoverlap, "nonoverlap", NONOVERLAP)
    check_bool(causal, "causal")
    check_bool(return_lse, "return_lse")
    deterministic = check_bool(deterministic, "deterministic")
    dropout_p = check_fraction(dropout_p, "dropout_p")
    check_fraction(tolerance, "tolerance")
    check_score_dtype(score_dtype)
    left, right = check_window(window_size)
    right = 0 if causal else right

    for x, name in ((q, "q"), (k, "k"), (v, "v")):
        check_head_dim(x.shape[-1], name)
    hq, hkv = q.shape[-2], k.shape[-2]
    check_same("k", k.shape[-1], "q", q.shape[-1], "head dim")
    check_same("v", v.shape[-2], "k", hkv, "number of heads")
    check_same("v", v.shape[-3], "k", k.shape[-3], "length")
    if v.dim() == 4:
        check_same("v", v.shape[0], "k", k.shape[0], "batch size")
    if hkv < 1 or hq < 1 or hq % hkv:
        raise ValueError(f"the heads of q must be a positive multiple of the heads of k and v, got {hq} and {hkv}")
    check_same("k", k.device, "q", q.device, "device")
    check_same("v", v.device, "q", q.device, "device")
    dtypes = [autocast_dtype(x.values if isinstance(x, SparseCode) else x) for x in (q, k, v)]
    if len(set(dtypes)) > 1:
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")

    q_side, k_side = _sides(q, k, topk, dense_dims)
    dim = q.shape[-1]
    scale = dim**-0.5 if softmax_scale is None else check_real(softmax_scale, "softmax_scale")
    call = _Call(
        q_side,
        k_side,
        dim,
        (left, right),
        scale,
        nonoverlap,
        dropout_p,
        return_lse,
        impl,
        impl,
        "asked for",
        dtypes[0],
    )
    if v.dim() == 4:
        _check_mask(attn_mask, (q.shape[0], hq, q.shape[1], k.shape[1]), v.device)
    return _choose(call, q, k, v, attn_mask, deterministic)


def _sides(q: Tensor | SparseCode, k: Tensor | SparseCode, topk: Any, dense_dims: Any) -> tuple[_Side, _Side]:
    codes = isinstance(q, SparseCode), isinstance(k, SparseCode)
    if any(codes) and topk is None:
        pair: tuple[int | None, int | None] = (None, None)
    elif any(codes) and not isinstance(topk, tuple):
        topk = check_topk(topk)
        pair = (topk, topk)
    else:
        pair = check_topk_pair(topk)
    dims = check_dense_dims(dense_dims, q.shape[-1])
    sides = []
    for x, name, entry in ((q, "q", pair[0]), (k, "k", pair[1])):
        if isinstance(x, SparseCode) and all(codes) and dims and dims != x.dense_dims:
            raise ValueError(f"dense_dims={dims} differs from the code {name}, which has dense_dims={x.dense_dims}")
        if not isinstance(x, SparseCode):
            sides.append(_Side(entry, dims if entry is not None else (), False))
            continue
        # With one code, an int topk speaks of the other side.
        if (
            entry is not None
            and (all(codes) or isinstance(topk, tuple))
            and x.topk != min(entry, x.dim - len(x.dense_dims))
        ):
            raise ValueError(f"topk={entry} for {name} differs from its code, which holds {x.topk} entries a row")
        sides.append(_Side(None, x.dense_dims, True))
    return sides[0], sides[1]


def _choose(
    call: _Call,
    q: Tensor | SparseCode,
    k: Tensor | SparseCode,
    v: Tensor,
    attn_mask: Tensor | None,
    deterministic: bool,
) -> _Call:
    """The rule of "auto": on CUDA the first that can of our Hopper kernel, cuDNN, Triton, SDPA kernels, reference."""
    if call.impl == "reference":
        return call
    problems = {
        "cuda": _cuda_problem(call, v, attn_mask),
        "sdpa": sdpa_impl.unsupported(
            call.dtype, v.device, can_drop=call.can_drop, dropout_p=call.dropout_p, deterministic=deterministic
        ),
        "triton": _triton_problem(call, v, attn_mask),
    }
    on_cpu = call.impl == "auto" and v.device.type == "cpu" and not torch.compiler.is_compiling()
    if call.impl == "cpu" or on_cpu:
        problems["cpu"] = _cpu_problem(call, v, attn_mask)
    if call.impl == "intersect":
        problems["intersect"] = _intersect_problem(call, q, k, v, attn_mask)
    if call.impl != "auto":
        problem = problems[call.impl]
        if problem is not None:
            raise NotImplementedError(f"impl={call.impl!r}: {problem}")
    alone = attn_mask is None and v.dim() == 4
    cudnn = alone and sdpa_impl.cudnn_takes(q, k, v, call.dtype, call.window, call.softmax_scale)
    if call.impl != "auto":
        impl, reason = call.impl, call.reason
    elif on_cpu and problems["cpu"] is None and _cpu_is_faster(call, q, k, v):
        impl, reason = "cpu", "posting lists, measured faster than dense attention on a CPU for this shape"
    elif problems["cuda"] is None:
        impl, reason = "cuda", "codes expanded into our Hopper kernel, measured faster than cuDNN on long sequences"
    elif problems["sdpa"] is None and (v.device.type == "cpu" or cudnn):
        kernels = "cuDNN" if cudnn else "PyTorch's fused attention"
        impl, reason = "sdpa", f"codes expanded into {kernels}, the fastest here for this call"
    elif problems["triton"] is None:
        impl, reason = "triton", "codes expanded into our Triton kernels; cuDNN does not take this call"
    elif problems["sdpa"] is None:
        impl, reason = "sdpa", f"codes expanded into PyTorch's attention; triton cannot: {problems['triton']}"
    else:
        impl, reason = "reference", f"sdpa cannot do this call: {problems['sdpa']}"
    if call.impl == "auto" and not torch.compiler.is_compiling():
        _log_choice(impl, reason, v.device.type)
    backward = ("sdpa" if cudnn else "triton") if impl == "cuda" else impl
    # cuDNN's backward is the fastest, but takes no gradient of lse and adds in any order.
    if backward == "sdpa" and cudnn and (call.return_lse or deterministic) and ops.triton_missing() is None:
        backward = "triton"
    return replace(call, impl=impl, backward=backward, reason=reason)


def _cuda_problem(call: _Call, v: Tensor, attn_mask: Tensor | None) -> str | None:
    """Why impl="cuda" cannot do the call, or None."""
    if v.device.type != "cuda":
        return f"it needs CUDA tensors, got {v.device}"
    from .impl import hopper_forward  # imports much of torch, as the first call of any operator does

    return hopper_forward.unsupported(
        v.device.index, call.dtype, call.dim, v.shape[-1], call.window, call.softmax_scale,
        masked=attn_mask is not None, packed=v.dim() == 3, can_drop=call.can_drop, dropout_p=call.dropout_p,
    )  # fmt: skip


def _triton_problem(call: _Call, v: Tensor, attn_mask: Tensor | None) -> str | None:
    """Why impl="triton" cannot do the call, or None."""
    if v.device.type != "cuda":
        return f"it needs CUDA tensors, got {v.device}"
    missing = ops.triton_missing()
    if missing is not None:
        return f"Triton is missing: {missing}"
    if call.dtype == torch.float64:
        return "float64 is not supported"
    if max(call.dim, v.shape[-1]) > 256:
        return f"head dims above 256 are not supported, got {call.dim} and {v.shape[-1]}"
    if attn_mask is not None and any(size != 1 for size in attn_mask.shape[:-1][-2:]):
        return f"attn_mask must be key padding, (b, 1, 1, sk), got {tuple(attn_mask.shape)}"
    return None


def _cpu_problem(call: _Call, v: Tensor, attn_mask: Tensor | None) -> str | None:
    """Why impl="cpu" cannot do the call, or None."""
    sides = call.q_side, call.k_side
    return cpu_numba.unsupported(
        v.device, call.dtype, sparse=not any(side.is_dense for side in sides),
        dense_dims=any(side.dense_dims for side in sides), masked=attn_mask is not None, dropout_p=call.dropout_p,
    )  # fmt: skip


def _cpu_is_faster(call: _Call, q: Tensor | SparseCode, k: Tensor | SparseCode, v: Tensor) -> bool:
    topk_q, topk_k = (
        x.topk if isinstance(x, SparseCode) else side.topk or 0 for x, side in ((q, call.q_side), (k, call.k_side))
    )
    return not _needs_grad(q, k, v) and cpu_numba.is_faster(call.dtype, call.dim, topk_q, topk_k, k.shape[-3])


def _needs_grad(*inputs: Tensor | SparseCode) -> bool:
    parts = [(x.values, x.dense) if isinstance(x, SparseCode) else (x,) for x in inputs]
    return torch.is_grad_enabled() and any(x.requires_grad for part in parts for x in part)


def _intersect_problem(
    call: _Call, q: Tensor | SparseCode, k: Tensor | SparseCode, v: Tensor, attn_mask: Tensor | None
) -> str | None:
    """Why impl="intersect" cannot do the call, or None."""
    sides = (q, call.q_side), (k, call.k_side)
    topk = [x.topk if isinstance(x, SparseCode) else side.topk for x, side in sides]
    dense_dims = any(side.dense_dims for _, side in sides)
    return intersect.unsupported(
        v.device, call.dtype, call.dim, v.shape[-1], (topk[0], topk[1]), dense_dims=dense_dims,
        masked=attn_mask is not None, packed=v.dim() == 3, dropout_p=call.dropout_p,
    )  # fmt: skip


@functools.cache
def _log_choice(impl: str, reason: str, device: str) -> None:
    logger.info("impl='auto' uses %s on %s: %s", impl, device, reason)


def _sparsify(
    q: Tensor | SparseCode, k: Tensor | SparseCode, v: Tensor, call: _Call
) -> tuple[Tensor | SparseCode, Tensor | SparseCode, Tensor]:
    sides = []
    for x, side in ((q, call.q_side), (k, call.k_side)):
        if isinstance(x, Tensor) and side.topk is not None:
            x = topk_sparsify(x, side.topk, dense_dims=side.dense_dims)
        sides.append(x.to(call.dtype))
    return sides[0], sides[1], v.to(call.dtype)


def _reference(
    q: Tensor | SparseCode, k: Tensor | SparseCode, v: Tensor, call: _Call, visible: Tensor
) -> tuple[Tensor, Tensor]:
    if call.can_drop and isinstance(q, SparseCode) and isinstance(k, SparseCode):
        kept_q, kept_k = (reference.members(x.indices, x.dim, x.dense_dims).transpose(1, 2).float() for x in (q, k))
        kept_k = kept_k.repeat_interleave(q.shape[2] // k.shape[2], dim=1)
        visible = visible & (kept_q @ kept_k.transpose(-1, -2) > 0)
    rows_q, rows_k = (x.to_dense() if isinstance(x, SparseCode) else x for x in (q, k))
    return reference.attention(rows_q, rows_k, v, visible, call.softmax_scale, call.dropout_p)


def _intersect(q: Tensor | SparseCode, k: Tensor | SparseCode, v: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    q, k, v = _sparsify(q, k, v, call)
    if isinstance(q, Tensor) or isinstance(k, Tensor):
        raise NotImplementedError("impl='intersect': every feature must be sparse: no dense side, no dense_dims")
    sides = q.values, q.indices, k.values, k.indices
    out, lse = intersect.attention(*sides, v, call.dim, *call.window, call.softmax_scale, call.can_drop)
    return out, lse


def _cpu(
    q: Tensor | SparseCode, k: Tensor | SparseCode, v: Tensor, call: _Call,
    cu_seqlens: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sides = (q, call.q_side.topk), (k, call.k_side.topk)
    if not _needs_grad(q, k, v):
        q, k = (cpu_numba.sparsify(x.to(call.dtype), w) if isinstance(x, Tensor) and w else x for x, w in sides)
    q, k, v = _sparsify(q, k, v, call)
    if isinstance(q, Tensor) or isinstance(k, Tensor):
        raise NotImplementedError("impl='cpu': every feature must be sparse: no dense side, no dense_dims")
    codes = q.values, q.indices, k.values, k.indices
    out, lse = cpu_numba.attention(*codes, v, *cu_seqlens, call.dim, *call.window, call.softmax_scale, call.can_drop)
    return out, lse


def _fused(
    q: Tensor | SparseCode,
    k: Tensor | SparseCode,
    v: Tensor,
    call: _Call,
    *,
    attn_mask: Tensor | None = None,
    cu_seqlens: tuple[Tensor | None, Tensor | None] = (None, None),
    max_seqlens: tuple[int | None, int | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    parts: list[Any] = []
    for x, side in ((q, call.q_side), (k, call.k_side)):
        if isinstance(x, SparseCode):
            code = x.to(call.dtype)
            parts += [code.values, code.indices, code.dense, None, None]
        elif side.topk is None:
            parts += [x.to(call.dtype), None, None, None, None]
        else:
            x = x.to(call.dtype)
            parts += [*ops.topk_kept(x.detach(), min(side.topk, MAX_DIM), list(side.dense_dims)), x]
    seed = torch.randint(2**62, (1,), device=v.device) if call.dropout_p > 0.0 else None
    longest = (x.shape[1] if n is None else n for x, n in zip((q, k), max_seqlens))
    out, lse, _ = fused.attention(
        *parts, v.to(call.dtype), attn_mask, *cu_seqlens, seed, call.dim, list(call.q_side.dense_dims),
        list(call.k_side.dense_dims), *call.window, call.softmax_scale, *longest, call.can_drop, call.dropout_p,
        call.return_lse, call.impl, call.backward,
    )  # fmt: skip
    return out, lse


def _check_mask(attn_mask: Any, shape: tuple[int, ...], device: torch.device) -> None:
    if attn_mask is None:
        return
    if not isinstance(attn_mask, Tensor) or attn_mask.dtype != torch.bool:
        came = attn_mask.dtype if isinstance(attn_mask, Tensor) else type(attn_mask).__name__
        raise TypeError(f"attn_mask must be a bool tensor (True = visible), got {came}")
    fits = attn_mask.dim() <= 4 and all(
        size in (1, full) for size, full in zip(reversed(attn_mask.shape), reversed(shape))
    )
    if not fits:
        raise ValueError(f"attn_mask must broadcast to (b, hq, sq, sk) = {shape}, got {tuple(attn_mask.shape)}")
    check_same("attn_mask", attn_mask.device, "q", device, "device")


def _check_cu_seqlens(cu_seqlens: Any, name: str, total: int, of: str, device: torch.device) -> None:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        came = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"{name} must be an int32 tensor, got {came}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name} must have shape (batch + 1,), got {tuple(cu_seqlens.shape)}")
    check_same(name, cu_seqlens.device, "q", device, "device")
    if torch.compiler.is_compiling():
        return
    if cu_seqlens.device.type != "cpu" and os.environ.get("FLASH_SFA_CHECK") != "1":
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0:
        raise ValueError(f"{name} must start at 0, got {ends[0]}")
    if ends[-1] != total:
        raise ValueError(f"{name} must end at the number of rows of {of}, {total}, got {ends[-1]}")
    if any(a > b for a, b in zip(ends, ends[1:])):
        raise ValueError(f"{name} must not decrease, got {ends}")


def _check_max_seqlen(max_seqlen: Any, name: str, cu_seqlens: Tensor) -> None:
    if max_seqlen is None:
        if cu_seqlens.device.type == "cuda" and (
            torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()
        ):
            raise ValueError(f"{name} is required on CUDA under torch.compile or graph capture, got None")
        return
    if not is_int(max_seqlen):
        raise TypeError(f"{name} must be an int, got {max_seqlen!r}")
    if max_seqlen < 0:
        raise ValueError(f"{name} must not be negative, got {max_seqlen}")
    checked = cu_seqlens.device.type == "cpu" or os.environ.get("FLASH_SFA_CHECK") == "1"
    if checked and not torch.compiler.is_compiling() and cu_seqlens.shape[0] > 1:
        longest = int(cu_seqlens.diff().max())
        if max_seqlen < longest:
            raise ValueError(f"{name} must be at least the longest sequence, {longest}, got {max_seqlen}")

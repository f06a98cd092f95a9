"""Argument checks shared by the public functions. Each raises and changes nothing."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IMPLS = ("auto", "reference", "sdpa", "triton", "cuda", "intersect", "cpu")
NONOVERLAP = ("zero", "drop")
MAX_DIM = 2**15
# Longer than any sequence, and position + window stays within int64.
MAX_WINDOW = 2**40


def is_int(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def check_topk(topk: Any, name: str = "topk") -> int:
    if not is_int(topk):
        raise TypeError(f"{name} must be an int, got {topk!r} of type {type(topk).__name__}")
    if topk < 1:
        raise ValueError(f"{name} must be at least 1, got {topk}")
    return int(topk)


def check_topk_pair(topk: Any) -> tuple[int | None, int | None]:
    """``topk`` of an attention call as (topk_q, topk_k); None leaves that side dense."""
    if isinstance(topk, tuple):
        if len(topk) != 2:
            raise ValueError(f"topk as a tuple must be (topk_q, topk_k), got {len(topk)} entries: {topk!r}")
        if topk == (None, None):
            raise ValueError("topk=(None, None) leaves both sides dense; at least one side must be sparse")
        q, k = (None if t is None else check_topk(t, f"topk[{i}]") for i, t in enumerate(topk))
        return q, k
    if topk is None:
        raise ValueError("topk is missing: give an int, a pair (topk_q, topk_k), or a SparseCode as q or k")
    if not is_int(topk):
        raise TypeError(f"topk must be an int or a tuple of two (int or None), got {topk!r}")
    return check_topk(topk), check_topk(topk)


def check_dense_dims(dense_dims: Any, dim: int) -> tuple[int, ...]:
    """The always-on features as a tuple of feature numbers."""
    if is_int(dense_dims):
        if dense_dims < 0:
            raise ValueError(f"dense_dims must not be negative, got {dense_dims}")
        if dense_dims > dim:
            raise ValueError(f"dense_dims as an int must lie in [0, {dim}), got {dense_dims}")
        dims: tuple[int, ...] = tuple(range(int(dense_dims)))
    elif isinstance(dense_dims, Sequence) and not isinstance(dense_dims, (str, bytes)):
        if len(dense_dims) > dim:
            raise ValueError(f"dense_dims must name fewer features than the {dim} of a row, got {len(dense_dims)}")
        for entry in dense_dims:
            if not is_int(entry):
                raise TypeError(f"dense_dims must hold ints, got {entry!r} of type {type(entry).__name__}")
        dims = tuple(int(entry) for entry in dense_dims)
        if len(set(dims)) != len(dims):
            raise ValueError(f"dense_dims must not repeat a feature, got {dims}")
    else:
        raise TypeError(
            f"dense_dims must be an int or a sequence of ints, got {type(dense_dims).__name__}: {dense_dims!r}"
        )
    if any(not 0 <= entry < dim for entry in dims):
        raise ValueError(f"dense_dims must lie in [0, {dim}), got {dims}")
    if len(dims) >= dim:
        raise ValueError(f"dense_dims covers all {dim} features; leave at least one for top-k")
    return dims


def check_tensor(x: Any, name: str, *, ndim: int | None = None) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else f"layout {x.layout}"
        raise TypeError(f"{name} must be an ordinary (torch.strided) tensor, got {kind}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if ndim is not None and x.dim() != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got {x.dim()} (shape {tuple(x.shape)})")
    return x


def check_head_dim(dim: int, name: str) -> None:
    if not 1 <= dim <= MAX_DIM:
        raise ValueError(f"the last dimension of {name} must be in [1, {MAX_DIM}], got {dim}")


def check_same(name: str, value: Any, other_name: str, other: Any, what: str) -> None:
    if value != other:
        raise ValueError(
            f"{name} and {other_name} must have the same {what}, got {value} for {name} and {other} for {other_name}"
        )


def check_window(window_size: Any) -> tuple[int, int]:
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"window_size must be a pair of ints (left, right), got {window_size!r}")
    left, right = window_size
    if not is_int(left) or not is_int(right):
        raise TypeError(f"window_size must be a pair of ints (left, right), got {window_size!r}")
    if left < -1 or right < -1:
        raise ValueError(f"window_size entries must be -1 (unlimited) or at least 0, got {window_size!r}")
    return min(int(left), MAX_WINDOW), min(int(right), MAX_WINDOW)


def check_bool(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r} of type {type(value).__name__}")
    return value


def check_real(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    # Not math.isfinite: under torch.compile(dynamic=True) a float may be symbolic.
    if not -sys.float_info.max <= value <= sys.float_info.max:
        shown = value if isinstance(value, float) else "an int beyond the range of float64"
        raise ValueError(f"{name} must be finite, got {shown}")
    return float(value)


def check_fraction(value: Any, name: str) -> float:
    value = check_real(value, name)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value}")
    return value


def check_choice(value: Any, name: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return str(value)


def check_score_dtype(score_dtype: Any) -> None:
    if score_dtype is not None:
        raise NotImplementedError(
            f"score_dtype={score_dtype!r} is not built yet in any implementation; use score_dtype=None"
        )

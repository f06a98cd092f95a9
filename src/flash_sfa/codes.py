"""Top-k feature codes: what is kept of a query or key row, and how it is stored."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from . import ops
from .checks import IMPLS, MAX_DIM, check_choice, check_dense_dims, check_head_dim, check_tensor, check_topk, is_int


class SparseCode:
    """Rows of ``dim`` features of which each keeps a few: the always-on ones and the top-k of the others.

    ========== ============ ========================== ==============================================
    attribute  shape        dtype                      meaning
    ========== ============ ========================== ==============================================
    values     (..., w)     float16/bf16/fp32/fp64     the kept entries; differentiable
    indices    (..., w)     uint8 (dim <= 256), int16  their feature numbers, ascending in a row
    dense      (..., r)     dtype of values            the always-on features, in the order dense_dims
    dense_dims              tuple of r ints            which features those are
    dim                     int                        the width d of the dense rows
    ========== ============ ========================== ==============================================

    A row with fewer entries than w repeats its last index with value 0: expansion adds, so this is exact.

    Args:
        values, indices, dense, dense_dims, dim: as in the table. dense may be omitted when dense_dims is ().

    Raises:
        TypeError, ValueError: for a shape, dtype or device that does not fit, and (on CPU tensors) for
            indices that are out of range, not ascending, or name an always-on feature.

    Example:
        >>> import torch
        >>> from flash_sfa import SparseCode
        >>> code = SparseCode(torch.tensor([[3.0, -2.0]]), torch.tensor([[1, 2]], dtype=torch.uint8), dim=4)
        >>> code.to_dense()
        tensor([[ 0.,  3., -2.,  0.]])
    """

    values: Tensor
    indices: Tensor
    dense: Tensor
    dense_dims: tuple[int, ...]
    dim: int

    def __init__(
        self,
        values: Tensor,
        indices: Tensor,
        *,
        dim: int,
        dense: Tensor | None = None,
        dense_dims: int | Sequence[int] = (),
    ) -> None:
        check_tensor(values, "values")
        if not is_int(dim):
            raise TypeError(f"dim must be an int, got {dim!r} of type {type(dim).__name__}")
        check_head_dim(dim, "the expanded code (dim)")
        dims = check_dense_dims(dense_dims, dim)
        if not isinstance(indices, Tensor) or indices.dtype != ops.index_dtype(dim):
            came = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
            raise TypeError(f"indices must be a {ops.index_dtype(dim)} tensor for dim={dim}, got {came}")
        if values.dim() < 1 or values.shape != indices.shape:
            raise ValueError(
                f"values and indices must have the same shape (..., w), got {tuple(values.shape)} and "
                f"{tuple(indices.shape)}"
            )
        if not 1 <= values.shape[-1] <= dim - len(dims):
            raise ValueError(
                f"a code of dim={dim} with {len(dims)} dense_dims holds 1 to {dim - len(dims)} entries a row, "
                f"got {values.shape[-1]}"
            )
        if dense is None:
            if dims:
                raise ValueError(f"dense is missing: dense_dims={dims} needs a tensor (..., {len(dims)})")
            dense = values.new_empty(*values.shape[:-1], 0)
        check_tensor(dense, "dense")
        if dense.dtype != values.dtype:
            raise TypeError(f"dense must have the dtype of values, {values.dtype}, got {dense.dtype}")
        if dense.shape != (*values.shape[:-1], len(dims)):
            raise ValueError(f"dense must have shape {(*values.shape[:-1], len(dims))}, got {tuple(dense.shape)}")
        if not values.device == indices.device == dense.device:
            raise ValueError(
                "values, indices and dense must lie on one device, got "
                f"{values.device}, {indices.device}, {dense.device}"
            )
        if values.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_index_values(indices, dim, dims)
        self.values, self.indices, self.dense, self.dense_dims, self.dim = (
            values,
            indices,
            dense,
            dims,
            int(dim),
        )

    @classmethod
    def _make(
        cls, values: Tensor, indices: Tensor, dense: Tensor, dim: int, dense_dims: tuple[int, ...]
    ) -> "SparseCode":
        """A code from parts that are known to fit."""
        code = object.__new__(cls)
        code.values, code.indices, code.dense, code.dense_dims, code.dim = (
            values,
            indices,
            dense,
            dense_dims,
            dim,
        )
        return code

    @property
    def topk(self) -> int:
        """w, the stored entries a row."""
        return self.values.shape[-1]

    @property
    def shape(self) -> torch.Size:
        """The shape of the dense rows, (..., dim)."""
        return torch.Size((*self.values.shape[:-1], self.dim))

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.values.nbytes + self.indices.nbytes + self.dense.nbytes

    def map(self, fn: Callable[[Tensor], Tensor]) -> "SparseCode":
        """The code with ``fn`` applied to values, indices and dense: for views over the leading dimensions."""
        return self._make(fn(self.values), fn(self.indices), fn(self.dense), self.dim, self.dense_dims)

    def to(self, dtype: torch.dtype) -> "SparseCode":
        """The code with values and dense in another float dtype; the selection does not change."""
        return self._make(self.values.to(dtype), self.indices, self.dense.to(dtype), self.dim, self.dense_dims)

    def to_dense(self) -> Tensor:
        """The rows (..., dim) with zeros at the features that were not kept; differentiable."""
        return ops.expand(self.values, self.indices, self.dense, self.dim, list(self.dense_dims), "auto")

    def __repr__(self) -> str:
        return (
            f"SparseCode(shape={tuple(self.shape)}, topk={self.topk}, dense_dims={self.dense_dims}, "
            f"dtype={self.dtype}, device={self.device})"
        )


def _check_index_values(indices: Tensor, dim: int, dense_dims: tuple[int, ...]) -> None:
    if indices.numel() == 0:
        return
    wide = indices.long()
    if int(wide.min()) < 0 or int(wide.max()) >= dim:
        raise ValueError(f"indices must lie in [0, {dim}), got {int(wide.min())} to {int(wide.max())}")
    if bool((wide.diff(dim=-1) < 0).any()):
        raise ValueError("indices must ascend in every row (the last may repeat, with value 0)")
    if dense_dims and bool(torch.isin(wide, torch.tensor(dense_dims, device=wide.device)).any()):
        raise ValueError(f"indices must not name an always-on feature; dense_dims is {dense_dims}")


def _flatten(code: SparseCode) -> tuple[list[Tensor], tuple[int, tuple[int, ...]]]:
    return [code.values, code.indices, code.dense], (code.dim, code.dense_dims)


def _unflatten(parts: Any, context: tuple[int, tuple[int, ...]]) -> SparseCode:
    values, indices, dense = parts
    return SparseCode._make(values, indices, dense, *context)


_pytree.register_pytree_node(SparseCode, _flatten, _unflatten, serialized_type_name="flash_sfa.SparseCode")


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which x takes part in attention: the autocast dtype where autocast is on."""
    device = x.device.type
    if x.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def topk_sparsify(x: Tensor, topk: int, *, dense_dims: int | Sequence[int] = 0, impl: str = "auto") -> SparseCode:
    """Keep the ``topk`` features of largest magnitude in every row of the last dimension.

    ``code.to_dense() == x * mask`` where mask marks the always-on features and the top-k of the others.
    Ties go to the lowest feature number, also among NaNs (which rank above all) and between -0 and 0, so
    the selection is the same on every device. The gradient is straight-through on the kept coordinates and
    zero elsewhere. Under autocast x is cast first, then ranked.

    Args:
        x: (..., d) float16, bfloat16, float32 or float64, d up to 32768; any strides.
        topk: at least 1; the stored width is min(topk, d - r).
        dense_dims: features that are always kept: an int r for the first r, or their numbers.
        impl: "auto", "reference" (any device) or "triton" (CUDA; not float64).

    Returns:
        SparseCode with values, indices and dense of leading shape x.shape[:-1].

    Raises:
        TypeError: topk not an int, x not a float tensor, dense_dims not ints.
        ValueError: topk < 1, x without a dimension, dense_dims out of range, repeated or covering all.
        NotImplementedError: an implementation that cannot do this, with the reason.

    Source: arXiv 2603.22300, section 3; the tie rule and always-on features are ours.

    Example:
        >>> import torch
        >>> from flash_sfa import topk_sparsify
        >>> topk_sparsify(torch.tensor([0.1, -3.0, 2.0, 0.5]), 2).indices
        tensor([1, 2], dtype=torch.uint8)
    """
    check_tensor(x, "x")
    if x.dim() < 1:
        raise ValueError("x must have at least one dimension (..., d), got a scalar tensor")
    check_head_dim(x.shape[-1], "x")
    topk = check_topk(topk)
    dims = check_dense_dims(dense_dims, x.shape[-1])
    check_choice(impl, "impl", IMPLS)
    x = x.to(autocast_dtype(x))
    if impl == "triton":
        reason = ops.triton_missing()
        if reason is None and x.dtype == torch.float64:
            reason = "float64 is not supported; use impl='reference'"
        if reason is None and x.device.type != "cuda":
            reason = f"it needs a CUDA tensor, x is on {x.device}"
        if reason is not None:
            raise NotImplementedError(f"topk_sparsify with impl='triton': {reason}")
    elif impl not in ("auto", "reference"):
        raise NotImplementedError(
            f"topk_sparsify has no impl={impl!r}; available: 'auto', 'reference', 'triton' (CUDA)"
        )
    values, indices, dense = ops.topk(x, min(topk, MAX_DIM), list(dims), impl)
    return SparseCode._make(values, indices, dense, x.shape[-1], dims)

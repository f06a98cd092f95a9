"""Append to a cache on a GPU in one kernel: the launcher of ``append.cu``, compiled at its first use.

Lengths and tables are those on the device, so a captured launch can be replayed; nothing waits for the GPU.
"""

import ctypes
import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..codes import SparseCode
from . import nvrtc

if TYPE_CHECKING:
    from ..cache import SparseKVCache, _Live

SOURCE = Path(__file__).with_name("append.cu")
BLOCK, WARPS = 128, 8
_POINTERS = (
    "k", "k_indices", "k_dense", "v", "values", "indices", "dense", "stored", "v_scale", "sums", "lengths", "capacity",
    "counts", "pages", "sum_rows", "done", "failed",
)  # fmt: skip
_STRIDES = ("k_batch", "k_token", "k_head", "v_batch", "v_token", "v_head")
_NUMBERS = ("n", "hkv", "pages_stride", "sums_stride", "team")


class Params(ctypes.Structure):
    """The kernel's argument, as ``struct Params`` in append.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_longlong) for name in _STRIDES),
        *((name, ctypes.c_int) for name in _NUMBERS),
    ]


@dataclass(frozen=True)
class Config:
    """What the kernel is compiled for: the macros of append.cu."""

    D: int
    W: int
    R: int
    DV: int
    PAGE: int
    CODE: int
    V: int
    CODED: int

    def macros(self) -> list[tuple[str, str]]:
        return [(f"SFA_{name}", str(value)) for name, value in asdict(self).items()]


def unsupported(cache: "SparseKVCache") -> str | None:
    """Why the kernel cannot write to a cache, or None."""
    from . import cuda_decode

    return cuda_decode.unsupported(cache, 1, grad=False)


def configure(cache: "SparseKVCache", *, coded: bool) -> Config:
    from .cuda_decode import _KINDS

    return Config(
        D=cache.head_dim, W=cache.width, R=len(cache.dense_dims), DV=cache.v_head_dim, PAGE=cache.page_size,
        CODE=_KINDS[cache.dtype], V=_KINDS[cache.v_dtype], CODED=int(coded),
    )  # fmt: skip


def append(
    cache: "SparseKVCache", layer: int, k: Tensor | SparseCode, v: Tensor, live: "_Live", counts: Tensor | None
) -> None:
    """Write the tokens of k and v (b, n, hkv, .) at the ends of live's sequences and advance live.lengths.

    counts: int32 (b,) on the device, the leading tokens of each row that count; None: all n.
    """
    from .cuda_decode import _dims

    b, n, hkv, _ = v.shape
    if isinstance(k, SparseCode):
        keys = [k.values.contiguous(), k.indices.contiguous(), k.dense.contiguous()]
        k_strides = (n * hkv, hkv, 1)  # rows
    else:
        k = k if k.stride(-1) == 1 else k.contiguous()
        keys = [k, k, _dims(cache.dense_dims, cache.device) if cache.dense_dims else k]
        k_strides = (k.stride(0), k.stride(1), k.stride(2))
    v = v if v.stride(-1) == 1 else v.contiguous()
    pool = cache._layers[layer]
    tensors = {
        "k": keys[0], "k_indices": keys[1], "k_dense": keys[2], "v": v, "values": pool.values,
        "indices": pool.indices, "dense": pool.dense, "stored": pool.v, "v_scale": pool.v_scale, "sums": pool.sums,
        "lengths": live.lengths, "capacity": live.capacity, "counts": counts, "pages": live.pages,
        "sum_rows": live.sums, "done": live.done, "failed": live.failed,
    }  # fmt: skip
    # A step of one token has a warp a row; a long append has a thread block a block of 128 tokens.
    team = 1 if n <= 4 else WARPS
    params = Params(
        **{name: None if x is None else x.data_ptr() for name, x in tensors.items()},
        **dict(zip(_STRIDES, (*k_strides, v.stride(0), v.stride(1), v.stride(2)))),
        n=n, hkv=hkv, pages_stride=live.pages.shape[1], sums_stride=live.sums.shape[1], team=team,
    )  # fmt: skip
    # From any start, n tokens touch at most this many blocks.
    units = hkv * ((n + BLOCK - 2) // BLOCK + 1)
    kernel = load(configure(cache, coded=isinstance(k, SparseCode)), cache.device)
    kernel.launch("sfa_append", (-(-units * team // WARPS), b, 1), 32 * WARPS, params)


@functools.cache
def load(config: Config, device: torch.device) -> nvrtc.Kernels:
    return nvrtc.Kernels(SOURCE, config.macros(), ("sfa_append",), device, prefer_shared=("sfa_append",))

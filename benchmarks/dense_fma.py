"""Launcher of dense_fma.cu: a dense FlashAttention without tensor cores, the kind of baseline that the paper used.

For benchmarks only; nothing in the package uses it but ``flash-sfa bench paper`` run from the repository.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from flash_sfa.impl import nvrtc

SOURCE = Path(__file__).with_name("dense_fma.cu")
ROWS = 128


class _Params(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out")), ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("n", "h", "tiles")),
    ]  # fmt: skip


def keys_a_tile(d: int) -> int:
    return 64 if d == 256 else 128


def shared(d: int) -> int:
    return 4 * (ROWS * d + ROWS * keys_a_tile(d) + 2 * 4096)


def macros(d: int, causal: bool) -> nvrtc.Macros:
    return [("FMA_D", str(d)), ("FMA_BN", str(keys_a_tile(d))), ("FMA_CAUSAL", str(int(causal)))]


@functools.cache
def _load(d: int, causal: bool, device: torch.device) -> nvrtc.Kernels:
    name = "dense_fma"
    return nvrtc.Kernels(SOURCE, macros(d, causal), (name,), device, shared={name: shared(d)})


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """q, k, v (b, n, h, d) bf16, contiguous, d 64, 128 or 256 -> out, scale d ** -0.5."""
    b, n, h, d = q.shape
    if d not in (64, 128, 256) or not q.shape == k.shape == v.shape:
        raise ValueError(f"q, k and v must have one shape with d 64, 128 or 256, got {q.shape}, {k.shape}, {v.shape}")
    if any(x.dtype != torch.bfloat16 or not x.is_contiguous() for x in (q, k, v)):
        raise ValueError("q, k and v must be contiguous bf16 tensors")
    out = torch.empty_like(q)
    tiles = -(-n // ROWS)
    params = _Params(
        q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), out=out.data_ptr(), scale=d**-0.5 * 1.4426950408889634, n=n,
        h=h, tiles=tiles,
    )  # fmt: skip
    _load(d, causal, q.device).launch("dense_fma", (b * h * tiles, 1, 1), 256, params, shared=shared(d))
    return out

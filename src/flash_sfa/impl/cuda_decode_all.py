"""Decode on a GPU where (nearly) every row of V is read anyway: settings of ``decode_all.cu``.

`cuda_decode.attend` launches it. Every visible row of V is read, once for all query rows of a kv head (up to 8), and
multiplied on tensor cores.
"""

import functools
from dataclasses import replace

import torch

from ..cache import BLOCK, SparseKVCache
from . import cuda_decode, nvrtc
from .cuda_decode import Config

SOURCE = cuda_decode.SOURCE.with_name("decode_all.cu")
MAX_ROWS, MAX_V_HEAD_DIM = 8, 256
# Shared memory of a thread block that every GPU of compute capability 8.0 or newer has.
_SHARED = 99 * 1024
_PARTS = BLOCK // 16
# Measured on an H200: from this part of the rows of V on, reading all in order is faster than gathering (16 bits; 8).
READ_ANYWAY = 0.9, 0.6


def supported(cache: SparseKVCache) -> bool:
    """Whether decode_all.cu is written for a cache: codes in 16 bits, V in 16 or 8 bits, and even sizes."""
    halves = (torch.bfloat16, torch.float16)
    dtypes = cache.dtype in halves and cache.v_dtype in (*halves, torch.int8, torch.float8_e4m3fn)
    return dtypes and cache.v_head_dim % 64 == 0 and cache.v_head_dim <= MAX_V_HEAD_DIM and cache.page_size % 16 == 0


def takes(cache: SparseKVCache, rows: int, entries: int | None, *, drop: bool) -> bool:
    """Whether impl="cuda" does a call here: where enough of the rows of V are expected to be read anyway.

    rows: query tokens times heads of the group. entries: kept in a row of q, None if it is dense. With w entries a key,
    random codes share a feature with some row with probability ``1 - (1 - w / d) ** (entries * rows)``, trained ones
    more often; with always-on features or a dense query every pair does. drop: pairs without overlap are left out,
    which this kernel does not do. Depends on nothing but the shape, so results do not depend on the batch.
    """
    if entries is None or cache.dense_dims:
        return supported(cache)
    share = 1.0 - (1.0 - cache.width / cache.head_dim) ** (entries * rows)
    return supported(cache) and not drop and share >= READ_ANYWAY[cache.v_dtype.itemsize == 1]


def configure(cache: SparseKVCache, rows: int, *, query: int = cuda_decode._RANKED, **overrides: int) -> Config:
    """The configuration for query rows a kv head; UNROLL is the number of 16-token pieces of V in flight a warp."""
    code, index = 2 * cache.width, cache.width * (1 if cache.head_dim <= 256 else 2)
    always, parts = 2 * len(cache.dense_dims), _PARTS // (2 if cache.v_dtype.itemsize == 1 else 1)
    config = Config(
        D=cache.head_dim, W=cache.width, R=len(cache.dense_dims), DV=cache.v_head_dim, PAGE=cache.page_size,
        ROWS=min(cuda_decode._power_above(rows), MAX_ROWS), CODE=cuda_decode._KINDS[cache.dtype],
        V=cuda_decode._KINDS[cache.v_dtype], ALL=1, DROP=0, QUERY=query, VEC=16, UNROLL=parts, STAGED=0,
        AHEAD=int(code % 4 == 0 and index % 4 == 0 and always % 4 == 0), REP=1, WARPS=4, CTAS=2,
    )  # fmt: skip
    config = replace(config, **overrides)
    while "UNROLL" not in overrides and shared_bytes(config) > _SHARED and config.UNROLL > 2:
        config = replace(config, UNROLL=config.UNROLL - 1)
    if "UNROLL" not in overrides and shared_bytes(config) > _SHARED:
        config = replace(config, AHEAD=0)
    while "UNROLL" not in overrides and shared_bytes(config) > _SHARED and config.ROWS > 1:
        config = replace(config, ROWS=config.ROWS // 2)
    return config


def shared_bytes(config: Config) -> int:
    """Dynamic shared memory of sfa_decode_all: ALL_BYTES there."""
    size = 2 if config.V < 2 else 1
    index = 1 if config.D <= 256 else 2
    codes = _up(BLOCK * (config.W * (2 + index) + 2 * config.R), 16) if config.AHEAD else 0
    weights = _PARTS * (64 * config.ROWS + (64 if config.ROWS > 1 else 0))
    ring = max(16 * config.UNROLL * config.DV * size, 4 * config.ROWS * config.DV)
    table, merged = 4 * config.ROWS * (config.D + config.R), (8 * config.WARPS + 12) * config.ROWS
    return _up(table, 128) + config.WARPS * _up(ring + codes + weights, 128) + merged


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


@functools.cache
def load(config: Config, device: torch.device) -> nvrtc.Kernels:
    return nvrtc.Kernels(
        SOURCE, config.macros(), ("sfa_decode_all", "sfa_combine"), device,
        shared={"sfa_decode_all": shared_bytes(config)}, prefer_shared=("sfa_decode_all",),
    )  # fmt: skip

"""Decode on a GPU: the launcher of ``decode.cu``, which is compiled for each configuration at its first use.

Nothing here waits for the GPU. Results do not depend on what else is in the batch.
"""

import ctypes
import functools
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..cache import BLOCK, SparseKVCache
from ..codes import SparseCode
from . import nvrtc

SOURCE = Path(__file__).with_name("decode.cu")
MAX_QUERIES, MAX_HEAD_DIM, MAX_V_HEAD_DIM = 16, 1024, 512
# Blocks of 128 tokens a thread block takes at least, and the most parts a sequence is cut into.
SPAN, MAX_SPLITS = 4, 512
_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.int8: 3, torch.float8_e4m3fn: 4}
_COMBINE_THREADS = 512
_SHARED = 47 * 1024  # of 48 KiB, since newer architectures count the 1 KiB that the driver takes
_CODE, _DENSE, _RANKED = 0, 1, 2  # what the kernel gets as q
_POINTERS = (
    "q_values", "q_indices", "q_dense", "values", "indices", "dense", "v", "v_scale", "sums", "lengths", "pages",
    "sum_rows", "part_o", "part_ml", "out", "lse", "rows_read",
)  # fmt: skip
_NUMBERS = (
    "sq", "hq", "hkv", "wq", "left", "right", "pages_stride", "sums_stride", "part_stride", "span", "max_splits",
)  # fmt: skip


class Params(ctypes.Structure):
    """The kernels' argument, as ``struct Params`` in decode.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in _NUMBERS),
    ]


@dataclass(frozen=True)
class Config:
    """What a kernel is compiled for: the macros of decode.cu."""

    D: int
    W: int
    R: int
    DV: int
    PAGE: int
    ROWS: int
    CODE: int
    V: int
    ALL: int
    DROP: int
    QUERY: int
    VEC: int
    UNROLL: int
    STAGED: int
    AHEAD: int
    REP: int
    WARPS: int
    CTAS: int

    def macros(self) -> list[tuple[str, str]]:
        return [(f"SFA_{name}", str(value)) for name, value in asdict(self).items()]


def unsupported(cache: SparseKVCache, sq: int, *, grad: bool) -> str | None:
    """Why this implementation cannot do a call, or None."""
    if cache.device.type != "cuda":
        return f"it needs a cache on a CUDA device, this one is on {cache.device}"
    if (reason := nvrtc.missing(cache.device.index)) is not None:
        return reason
    if torch.float64 in (cache.dtype, cache.v_dtype):
        return "float64 is not supported"
    if sq > MAX_QUERIES:
        return f"at most {MAX_QUERIES} query tokens a call are supported, got {sq}"
    if cache.head_dim > MAX_HEAD_DIM or cache.v_head_dim > MAX_V_HEAD_DIM:
        return (
            f"head dims up to {MAX_HEAD_DIM} (q, k) and {MAX_V_HEAD_DIM} (v) are supported, "
            f"got {cache.head_dim} and {cache.v_head_dim}"
        )
    if cache.num_pages * cache.num_kv_heads * cache.page_size >= 2**32:
        return f"a layer holds up to 2**32 rows of V, this one {cache.num_pages} pages of {cache.page_size}"
    if grad:
        return "it gives no gradient; call it under torch.no_grad()"
    return None


def configure(cache: SparseKVCache, rows: int, *, query: int = _RANKED, drop: bool = False, **overrides: int) -> Config:
    """The configuration for query rows a kv head (tokens times heads of the group)."""
    d, dv, size = cache.head_dim, cache.v_head_dim, cache.v_dtype.itemsize
    dense = query == _DENSE or bool(cache.dense_dims)
    # A lane holds the accumulators of its columns for all rows, in fp32 two of each: at most 64. The table has room for
    # 2048 entries.
    twice = 2 if cache.dtype == torch.float32 else 1
    vec = next(n for n in (16, 8, 4, 2, 1) if dv * size % n == 0)
    most = max(1, min(8, 2048 // d))
    n_rows = min(_power_above(rows), 1 << (most.bit_length() - 1))
    while vec > 4 and vec // size > 8 and n_rows > 2:
        vec //= 2
    while n_rows > 1 and n_rows * twice * _accumulators(dv, size, vec) > 64:
        n_rows //= 2
    registers = n_rows * twice * _accumulators(dv, size, vec)
    ctas = 4 if registers <= 32 else 3
    # Loads of V in flight: together they hold at most 32 rows, which wait in the queue.
    at_once = _rows_a_load(dv, size, vec)
    unroll = max(2, min((6 if at_once > 1 else 8) // _pieces(dv, size, vec), 32 // at_once))
    code, index = cache.width * cache.dtype.itemsize, cache.width * (1 if d <= 256 else 2)
    config = Config(
        D=d, W=cache.width, R=len(cache.dense_dims), DV=dv, PAGE=cache.page_size, ROWS=n_rows,
        CODE=_KINDS[cache.dtype], V=_KINDS[cache.v_dtype], ALL=int(dense), DROP=int(drop and not dense),
        QUERY=query, VEC=vec, UNROLL=unroll, STAGED=int(vec >= 4),
        AHEAD=int(code % 4 == 0 and index % 4 == 0 and code + index <= 32),
        REP=8 if n_rows == 1 and d <= 128 else 1, WARPS=4, CTAS=ctas,
    )  # fmt: skip
    if _shared_bytes(config) > _SHARED:
        config = replace(config, UNROLL=max(2, config.UNROLL - 2))
    if _shared_bytes(config) > _SHARED:
        config = replace(config, AHEAD=0)
    while _shared_bytes(config) > _SHARED and config.ROWS > 1:
        config = replace(config, ROWS=config.ROWS // 2)
    return replace(config, **overrides)


def _shared_bytes(config: Config) -> int:
    """Shared memory of sfa_decode, a little rounded up."""
    v_size, code_size = (2, 2, 4, 1, 1)[config.V], (2, 2, 4)[config.CODE]
    queue = BLOCK + (1 + config.STAGED) * config.UNROLL * _rows_a_load(config.DV, v_size, config.VEC)
    own = max(queue * (4 + 4 * config.ROWS), config.ROWS * config.DV * 4)
    staged = config.STAGED * config.UNROLL * _pieces(config.DV, v_size, config.VEC) * 32 * config.VEC
    ahead = config.AHEAD * BLOCK * config.W * (code_size + (1 if config.D <= 256 else 2))
    return config.WARPS * (own + staged + ahead + 64) + 4 * config.ROWS * (config.D * config.REP + config.R + 8)


def _pieces(dv: int, size: int, vec: int) -> int:
    """Loads a lane needs for its part of a V row."""
    return -(-dv * size // vec // 32)


def _rows_a_load(dv: int, size: int, vec: int) -> int:
    """V rows a warp loads at once."""
    return 32 // min(32, _power_above(dv * size // vec))


def _accumulators(dv: int, size: int, vec: int) -> int:
    return _pieces(dv, size, vec) * (vec // size)


def _power_above(n: int) -> int:
    return 1 << (n - 1).bit_length()


def attend(
    q: Tensor | SparseCode,
    cache: SparseKVCache,
    layer: int,
    ids: list[int],
    window: tuple[int, int],
    softmax_scale: float,
    drop: bool,
    stats: bool,
    *,
    topk: int | None = None,
    span: int = SPAN,
    max_splits: int | None = None,
    every_row: bool | None = None,
    **overrides: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out (b, sq, hq, dv), lse (b, hq, sq), misplaced (b, hq, sq), all 0, and rows_read (b, hkv).

    q is a code, or a tensor: with topk the kernel keeps its largest features itself, without it stays dense.
    rows_read counts what was read: query rows that do not fit into one pass read again. Without stats it and
    misplaced are not set. every_row: by decode_all.cu or not; None is what `cuda_decode_all.takes` says.
    """
    from . import cuda_decode_all  # which imports this module

    b, sq, hq, _ = q.shape
    dv, hkv, device = cache.v_head_dim, cache.num_kv_heads, cache.device
    out = torch.empty(b, sq, hq, dv, dtype=cache.dtype, device=device)
    lse = torch.empty(b, hq, sq, dtype=torch.float32, device=device)
    misplaced = torch.zeros(b, hq, sq, device=device) if stats else lse
    new = torch.zeros if stats else torch.empty
    rows_read = new(b, hkv, dtype=torch.int64, device=device)
    if b == 0 or sq == 0:
        return out, lse, misplaced, rows_read
    group = hq // hkv
    most = cache.head_dim - len(cache.dense_dims)
    query = _CODE if isinstance(q, SparseCode) else _DENSE if topk is None or topk >= most else _RANKED
    if every_row is None:
        entries = q.topk if isinstance(q, SparseCode) else None if query == _DENSE else topk
        every_row = cuda_decode_all.takes(cache, sq * group, entries, drop=drop)
    if every_row:
        config = cuda_decode_all.configure(cache, sq * group, query=query, **overrides)
        shared = dynamic = cuda_decode_all.shared_bytes(config)
        kernel, kernels = "sfa_decode_all", cuda_decode_all.load(config, device)
    else:
        config = configure(cache, sq * group, query=query, drop=drop, **overrides)
        shared, dynamic = _shared_bytes(config), 0
        kernel, kernels = "sfa_decode", load(config, device)
    lengths, pages, sums, longest = cache._tables(layer, ids)
    left, right = (min(w, 2**30) for w in window)
    chunks = -(-sq * group // config.ROWS)
    if max_splits is None:
        max_splits = _splits(config, shared, hkv * chunks, device)
    blocks = -(-longest // BLOCK)
    if left >= 0:
        blocks = min(blocks, (left + sq) // BLOCK + 2)
    splits = max(1, min(max_splits, -(-blocks // span)))
    part_o = torch.empty(b * sq * hq * splits * dv, dtype=torch.float32, device=device)
    part_ml = torch.empty(b * sq * hq * splits * 2, dtype=torch.float32, device=device)
    if isinstance(q, SparseCode):
        parts, topk = [x.contiguous() for x in (q.values, q.indices, q.dense)], q.topk
    else:
        q = q.contiguous()
        parts = [q, q, _dims(cache.dense_dims, device) if cache.dense_dims else q]
    pool = cache._layers[layer]
    tensors = {
        "q_values": parts[0], "q_indices": parts[1], "q_dense": parts[2], "values": pool.values,
        "indices": pool.indices, "dense": pool.dense, "v": pool.v, "v_scale": pool.v_scale,
        "sums": pool.sums,
        "lengths": lengths, "pages": pages, "sum_rows": sums, "part_o": part_o, "part_ml": part_ml,
        "out": out, "lse": lse, "rows_read": rows_read if stats else None,
    }  # fmt: skip
    params = Params(
        **{name: None if x is None else x.data_ptr() for name, x in tensors.items()},
        scale=softmax_scale * 1.4426950408889634,
        sq=sq, hq=hq, hkv=hkv, wq=topk or 0, left=left, right=right,
        pages_stride=pages.shape[1], sums_stride=sums.shape[1], part_stride=splits, span=span, max_splits=max_splits,
    )  # fmt: skip
    kernels.launch(kernel, (hkv * chunks, b, splits), 32 * config.WARPS, params, shared=dynamic)
    kernels.launch("sfa_combine", (sq * hq, b, 1), _COMBINE_THREADS, params)
    return out, lse, misplaced, rows_read


@functools.cache
def _dims(dense_dims: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(dense_dims, dtype=torch.int32, device=device)


def _splits(config: Config, shared: int, columns: int, device: torch.device) -> int:
    """The most parts of a sequence: such that one long sequence fills the GPU exactly once.

    Depends on the kernel's shape and the GPU, never on the batch, as results do.
    """
    if device.type != "cuda":
        return MAX_SPLITS
    gpu = torch.cuda.get_device_properties(device)
    # The driver takes 1 KiB of shared memory for itself in each thread block.
    fit = min(config.CTAS, gpu.shared_memory_per_multiprocessor // (shared + 1024))
    return max(1, min(gpu.multi_processor_count * fit // columns, MAX_SPLITS))


@functools.cache
def load(config: Config, device: torch.device) -> nvrtc.Kernels:
    return nvrtc.Kernels(SOURCE, config.macros(), ("sfa_decode", "sfa_combine"), device, prefer_shared=("sfa_decode",))

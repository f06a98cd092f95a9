r"""Attention on the CPU over top-k codes, compiled by Numba: a pass over blocks of 128 keys, V rows read where needed.

A task is up to 128 query rows of one kv head (its group's heads and some query tokens) over a range of key blocks. For
every block it

1. scores all pairs. With few rows, each key's w entries look up the row's table of d features. With more, the block is
   first laid out by feature (`by_feature`: for every feature, which keys keep it, with what value), and a row walks the
   lists of its own features only: w_q w_k / d entries a pair (0.5 at 8 of 128) in place of w_k.
2. keeps m = max s, e_j = e^{s_j - m} and Z as in any online softmax. A pair without overlap has s = 0 by itself.
3. adds to the output, with S the sum of the block's V rows and mu = e^{-m}:

       sum_j e_j v_j = sum_{s_j != 0} (e_j - mu) v_j + mu S

   so that the rows with s_j = 0 are not read. Exact in real arithmetic. Where a row sees only part of the block, where
   no s_j is 0, or where mu S would cancel (128 mu > 4 sum_j e_j), the visible rows are summed directly.

In drop mode pairs without overlap have e_j = 0, and nothing but the other rows is read.

Everything is accumulated in fp32; what is read of 16-bit and 8-bit caches is converted. Spans of keys depend on the
sequence's own length only, so results depend neither on the batch nor on the number of threads.
"""

import ctypes
import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cache import BLOCK, SparseKVCache
from ..codes import SparseCode
from ..ops import index_dtype

# Most query rows of a task, and key blocks of a task where rows alone do not fill one.
ROWS = 128
_SPAN = 64
# Pairs of query rows and keys below which a second thread costs more than it brings.
_SMALL = 2**14
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def missing() -> str | None:
    """Why the kernels cannot run here, or None. The first call imports Numba."""
    return _kernels()[1]


@functools.cache
def _kernels() -> tuple[Any, str | None]:
    try:
        from . import cpu_kernels
    except Exception as error:  # a broken installation may raise anything
        return None, f"it needs numba (pip install 'flash-sfa[cpu]'): {error}"
    return cpu_kernels, None


def unsupported(
    device: torch.device, dtype: torch.dtype, *, sparse: bool, dense_dims: bool, masked: bool, dropout_p: float
) -> str | None:
    """Why these kernels cannot do a call of `sfa_attention`, or None."""
    if device.type != "cpu":
        return f"it needs CPU tensors, got {device}"
    if dtype not in _DTYPES:
        return f"{dtype} is not supported"
    if not sparse or dense_dims:
        return "every feature must be sparse: no dense side, no dense_dims"
    if masked:
        return "attn_mask is not supported"
    if dropout_p > 0.0:
        return f"dropout_p={dropout_p} is not supported"
    return missing()


def sparsify(x: Tensor, topk: int) -> SparseCode:
    """`topk_sparsify` of a CPU tensor, without a gradient and several times faster."""
    d = x.shape[-1]
    rows = x.detach().float().contiguous().view(-1, d)
    w = min(topk, d)
    values, indices = rows.new_empty(rows.shape[0], w), rows.new_empty(rows.shape[0], w, dtype=index_dtype(d))
    arrays = rows.numpy(), values.numpy(), indices.numpy()
    run = _kernels()[0].top_rows
    _share(rows.shape[0], lambda begin, end: run(arrays[0], begin, end, *arrays[1:]), rows.shape[0] > 1024)
    shape = (*x.shape[:-1], w)
    return SparseCode._make(values.view(shape).to(x.dtype), indices.view(shape), x.new_empty(*shape[:-1], 0), d, ())


def is_faster(dtype: torch.dtype, d: int, topk_q: int, topk_k: int, keys: int) -> bool:
    """The rule of "auto" for `sfa_attention`: faster than SDPA on skewed codes too, as measured (docs/cpu.md)."""
    return dtype == torch.float32 and d >= 128 and 4 * topk_q * topk_k <= d and keys >= 1024


@torch.library.custom_op("flash_sfa::cpu", mutates_args=())
def attention(
    q: Tensor, q_indices: Tensor, k: Tensor, k_indices: Tensor, v: Tensor, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, dim: int, left: int, right: int, softmax_scale: float, drop: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Code values and indices of q and k, and v -> out, lse; with cu_seqlens, sequences packed in a batch of 1."""
    (b, sq, hq), (sk, hkv, dv) = q.shape[:3], v.shape[1:]
    k, k_indices, v = (x.transpose(1, 2).contiguous() for x in (k, k_indices, v))
    if cu_seqlens_q is None or cu_seqlens_k is None:
        zero, pages = np.zeros(b, np.int64), np.arange(b, dtype=np.int32)
        lengths = np.arange(b) * sq, zero + sq, zero + sk, zero
    else:
        ends = [x.numpy().astype(np.int64) for x in (cu_seqlens_q, cu_seqlens_k)]
        pages = np.zeros(ends[0].shape[0] - 1, np.int32)
        lengths = ends[0][:-1], np.diff(ends[0]), np.diff(ends[1]), ends[1][:-1]
    tables = (*lengths, pages[:, None], np.zeros((pages.shape[0], 0), np.int32))
    sums = np.empty((0, dv), np.float32)
    shape = hkv, max(sk, 1), dim, k.shape[-1]
    keys, values = (k_indices, k), (v, v.new_empty(0, dtype=torch.bfloat16))
    out, lse, _ = _attend(q, q_indices, keys, values, v.dtype, sums, tables, shape, (left, right), softmax_scale, drop)
    out = out.view(b, sq, hq, dv).to(v.dtype)
    # A new tensor also for one head or one sequence: an operator's result must not be a view of another.
    return out, lse.view(b, sq, hq).transpose(1, 2).contiguous()


@attention.register_fake
def _(q: Tensor, q_indices: Tensor, k: Tensor, k_indices: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    b, sq, hq = q.shape[:3]
    return v.new_empty(b, sq, hq, v.shape[-1]), v.new_empty(b, hq, sq, dtype=torch.float32)


def _no_backward(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError("impl='cpu' has no backward; use impl='auto' to train, or torch.no_grad()")


attention.register_autograd(_no_backward)


def takes_cache(cache: SparseKVCache) -> bool:
    """Whether `attend` can read this cache; else the plain PyTorch path of impl="cpu" does."""
    v_dtypes = (*_DTYPES, torch.int8, torch.float8_e4m3fn)
    known = cache.dtype in _DTYPES and cache.v_dtype in v_dtypes and not cache.dense_dims
    return known and cache.device.type == "cpu" and missing() is None


def attend(
    q: SparseCode, cache: SparseKVCache, layer: int, seq_ids: list[int], window: tuple[int, int], softmax_scale: float,
    drop: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The last tokens of sequences over the cache: out (b, sq, hq, dv), lse and misplaced (b, hq, sq), rows_read."""
    (b, sq, hq), pool = q.shape[:3], cache._layers[layer]
    hkv, dv = cache.num_kv_heads, cache.v_head_dim
    lengths, pages, sums, _ = cache._tables(layer, seq_ids)
    zero = np.zeros(b, np.int64)
    tables = np.arange(b) * sq, zero + sq, lengths.numpy().astype(np.int64), zero, pages.numpy(), sums.numpy()
    shape = hkv, cache.page_size, cache.head_dim, cache.width
    keys, values = (pool.indices, pool.values), (pool.v, pool.v_scale)
    out, lse, read = _attend(
        q.values, q.indices, keys, values, cache.v_dtype, pool.sums.view(-1, dv).numpy(), tables, shape, window,
        softmax_scale, drop,
    )  # fmt: skip
    lse = lse.view(b, sq, hq).transpose(1, 2)
    return out.view(b, sq, hq, dv).to(cache.dtype), lse, torch.zeros_like(lse), read


_BYTES, _BITS, _FLOATS = (np.empty(0, dtype) for dtype in (np.uint8, np.uint16, np.float32))


def _stored(x: Tensor, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, np.ndarray]:
    """What the kernels take: x in the array of its width, the kind of number, and the table that translates its bits.

    One signature for all types, so that one compilation serves all.
    """
    x = x.detach().view(-1)
    if dtype == torch.float32:
        return x.numpy(), _BITS, _BYTES, 0, _FLOATS
    if dtype == torch.bfloat16:
        return _FLOATS, x.view(torch.uint16).numpy(), _BYTES, 1, _FLOATS
    if dtype == torch.float16:
        return _FLOATS, x.view(torch.uint16).numpy(), _BYTES, 2, _table(dtype)
    return _FLOATS, _BITS, x.view(torch.uint8).numpy(), 3, _table(dtype)


@functools.cache
def _table(dtype: torch.dtype) -> np.ndarray:
    """Every number of an 8-bit or 16-bit type, by its bits."""
    count = 2 ** (8 * dtype.itemsize)
    bits = torch.arange(count, dtype=torch.int32, device="cpu")
    bits = bits.to(torch.uint8) if dtype.itemsize == 1 else bits.to(torch.int16)
    return bits.view(dtype).float().numpy()


def _attend(
    q: Tensor, q_indices: Tensor, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], v_dtype: torch.dtype,
    sums: np.ndarray, tables: tuple[Any, ...], shape: tuple[int, int, int, int], window: tuple[int, int],
    softmax_scale: float, drop: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run all tasks and merge their spans: out (total_q, hq, dv), lse (total_q, hq), V rows read (sequences, hkv).

    keys: indices and values of codes, values: V and its scales, all stored as (pages, hkv, page_size, .).
    """
    hq, w_q = q.shape[2:]
    hkv, dv = shape[0], values[0].shape[-1]
    tasks = _tasks(tables[1], tables[2], hkv, hq // hkv)
    spans, total = int(tasks[:, 6].max(initial=0)) + 1, q.shape[0] * q.shape[1]
    top = torch.full((spans, total, hq), -torch.inf, device="cpu")
    z, acc = torch.zeros(spans, total, hq, device="cpu"), torch.zeros(spans, total, hq, dv, device="cpu")
    read = np.zeros(tasks.shape[0], np.int64)
    q = (q.detach().float() * softmax_scale).view(total, hq, w_q)
    rows = q_indices.to(torch.int16).contiguous().view(total, hq, w_q).view(torch.uint16).numpy()
    narrow = keys[0].dtype == torch.uint8
    numbers = keys[0].view(-1).view(torch.uint8 if narrow else torch.uint16).numpy()
    codes = (numbers, _BITS) if narrow else (_BYTES, numbers)
    v = _stored(values[0], v_dtype)
    v_rows = values[0].detach().view(-1, dv).numpy() if v_dtype == torch.float32 else np.empty((0, dv), np.float32)
    results = top.numpy(), z.numpy(), acc.numpy(), read
    arguments = (
        (rows, q.numpy(), (~q.isfinite().all(-1)).numpy()), (*codes, _stored(keys[1], keys[1].dtype)),
        (v_rows, values[1].view(-1).view(torch.uint16).numpy(), v), sums, tables, shape, window, drop, results,
    )  # fmt: skip
    pairs = int((tables[1] * tables[2]).sum()) * hq
    run = _kernels()[0].run
    _share(tasks.shape[0], lambda begin, end: run(tasks, begin, end, *arguments), pairs > _SMALL)
    rows_read = torch.zeros(tables[1].shape[0], hkv, dtype=torch.int64, device="cpu")
    rows_read.index_put_(tuple(torch.from_numpy(tasks[:, i]) for i in (0, 1)), torch.from_numpy(read), accumulate=True)

    if spans > 1:
        largest = top.amax(0)
        factor = (top - largest.masked_fill(largest == -torch.inf, 0.0)).exp()
        top, z, acc = largest, (z * factor).sum(0), (acc * factor[..., None]).sum(0)
    else:
        top, z, acc = top[0], z[0], acc[0]
    empty = z == 0.0
    out = acc / z.masked_fill(empty, 1.0)[..., None]
    return out, (top + z.log()).masked_fill(empty, -torch.inf), rows_read


def _tasks(q_lengths: np.ndarray, k_lengths: np.ndarray, hkv: int, group: int) -> np.ndarray:
    """(tasks, 7) int64: sequence, kv head, first row, rows, first block, last block, slot; the longest first.

    Up to ROWS query rows of a sequence and head share a task, cut by keys into spans; more rows are cut by rows.
    """
    tasks = []
    for sequence, (n_q, n_k) in enumerate(zip(q_lengths.tolist(), k_lengths.tolist())):
        rows, blocks = n_q * group, -(-n_k // BLOCK)
        if rows <= ROWS:
            spans = [(0, rows, first, min(first + _SPAN, blocks), first // _SPAN) for first in range(0, blocks, _SPAN)]
        else:
            spans = [(first, min(ROWS, rows - first), 0, blocks, 0) for first in reversed(range(0, rows, ROWS))]
        tasks += [(sequence, head, *span) for span in spans if rows for head in range(hkv)]
    return np.array(tasks, np.int64).reshape(-1, 7)


def _share(count: int, work: Callable[[int, int], Any], parallel: bool) -> None:
    """work(begin, end) over ranges of range(count), on as many threads as PyTorch uses."""
    threads = min(torch.get_num_threads(), count) if parallel else 1
    if threads <= 1:
        work(0, count)
        return
    size, numbers = -(-count // (8 * threads)), itertools.count()

    def take() -> None:
        while (begin := next(numbers) * size) < count:
            work(begin, min(begin + size, count))

    errors: list[BaseException] = []

    def member(_: Any) -> None:
        try:
            take()
        except BaseException as error:
            errors.append(error)

    openmp = _openmp()
    if openmp is not None:
        # PyTorch's own threads: after its operators they spin for milliseconds, in the way of any other thread.
        openmp.GOMP_parallel(_MEMBER(member), None, threads, 0)
    else:
        others = [_threads(os.getpid(), threads - 1).submit(member, None) for _ in range(threads - 1)]
        member(None)
        for other in others:
            other.result()
    if errors:
        raise errors[0]


_MEMBER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _openmp() -> Any:
    """The GNU OpenMP runtime that PyTorch loaded, or None."""
    try:
        with open("/proc/self/maps") as lines:
            paths = sorted({line.split()[-1] for line in lines if "libgomp" in line})
    except OSError:
        return None
    paths = [path for path in paths if os.path.dirname(torch.__file__) in path or "torch.libs" in path] or paths
    if len(paths) != 1:
        return None
    library = ctypes.CDLL(paths[0])
    library.GOMP_parallel.argtypes = (_MEMBER, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    library.GOMP_parallel.restype = None
    return library


@functools.lru_cache(maxsize=1)
def _threads(process: int, count: int) -> ThreadPoolExecutor:
    """Threads beside the caller's; those of a forked process are its own."""
    return ThreadPoolExecutor(count, thread_name_prefix="flash_sfa")

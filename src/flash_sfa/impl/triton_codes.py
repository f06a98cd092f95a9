"""Top-k, expand and gather of codes as Triton kernels: the meaning of the same names in `reference`.

Every kernel moves bit patterns (int16, int32, int64 views of the tensors), so that no float arithmetic
touches a value that is only selected or copied.

Top-k of 16-bit rows, the fast path ("network"), one thread a row:
  1. read the row as 8-byte quads of four features, once, coalesced; the key of a quad is the largest
     magnitude in it, above the number of the quad, so keys are unique and ties go to the lowest;
  2. the topk quads with the largest keys hold the topk features (each of them beats a whole quad that is
     left out), found in registers by a sorting network that keeps only the head of every list;
  3. read those quads again (from L1 or shared memory) and repeat with one key a feature;
  4. a rotation turns a feature's key into (index, bits of the value); sort by index, store.
All other cases ("select"): bisection on the bits of the w-th largest magnitude, then a prefix sum.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "flash_sfa.impl.triton_codes needs Triton, which comes with CUDA builds of PyTorch on Linux "
        "(or: pip install 'flash-sfa[triton]')"
    ) from error

# Sizes that follow the batch or the sequence must not lead to new kernels.
SIZES = ["n_rows", "n1", "n2"]

# ---------------------------------------------------------------------------------------------- networks
# A list is a tuple of tensors of one shape; entry i of every row is in tensor i. Descending order.


@triton.jit
def _every_other(x, first: tl.constexpr):
    out = ()
    for i in tl.static_range(first, len(x), 2):
        out = out + (x[i],)
    return out


@triton.jit
def _part(x, first: tl.constexpr, count: tl.constexpr):
    out = ()
    for i in tl.static_range(first, first + count):
        out = out + (x[i],)
    return out


@triton.jit
def _merge(a, b):
    """Batcher's odd-even merge of two sorted lists of equal length."""
    if len(a) == 1:
        return (tl.maximum(a[0], b[0]), tl.minimum(a[0], b[0]))
    else:
        even = _merge(_every_other(a, 0), _every_other(b, 0))
        odd = _merge(_every_other(a, 1), _every_other(b, 1))
        out = (even[0],)
        for i in tl.static_range(1, len(a)):
            out = out + (tl.maximum(odd[i - 1], even[i]), tl.minimum(odd[i - 1], even[i]))
        return out + (odd[len(a) - 1],)


@triton.jit
def _sort(x):
    if len(x) == 1:
        return x
    else:
        half: tl.constexpr = len(x) // 2
        return _merge(_sort(_part(x, 0, half)), _sort(_part(x, half, half)))


@triton.jit
def _heads(a, b):
    """The larger half of two sorted lists, as a bitonic list."""
    out = ()
    for i in tl.static_range(len(a)):
        out = out + (tl.maximum(a[i], b[len(a) - 1 - i]),)
    return out


@triton.jit
def _sort_bitonic(x):
    if len(x) == 1:
        return x
    else:
        half: tl.constexpr = len(x) // 2
        high = ()
        low = ()
        for i in tl.static_range(half):
            high = high + (tl.maximum(x[i], x[i + half]),)
            low = low + (tl.minimum(x[i], x[i + half]),)
        return _sort_bitonic(high) + _sort_bitonic(low)


@triton.jit
def _largest(x, K: tl.constexpr):
    """The K largest of a list (lengths are powers of two), in bitonic order."""
    if len(x) == K:
        return _sort(x)
    elif len(x) == 2 * K:
        return _heads(_sort(_part(x, 0, K)), _sort(_part(x, K, K)))
    else:
        half: tl.constexpr = len(x) // 2
        a = _sort_bitonic(_largest(_part(x, 0, half), K))
        b = _sort_bitonic(_largest(_part(x, half, half), K))
        return _heads(a, b)


@triton.jit
def _columns(x, LOG: tl.constexpr):
    """(R, 2, ..., 2) with LOG twos -> the list of its 2**LOG columns."""
    if LOG == 0:
        return (x,)
    else:
        a, b = tl.split(x)
        even = _columns(a, LOG - 1)
        odd = _columns(b, LOG - 1)
        out = ()
        for i in tl.static_range(len(even)):
            out = out + (even[i], odd[i])
        return out


@triton.jit
def _list_of(x, R: tl.constexpr, N: tl.constexpr):
    """(R, N) -> the list of its columns; puts a whole row into one thread."""
    if N == 1:
        return (tl.reshape(x, (R,)),)
    elif N == 2:
        return _columns(tl.reshape(x, (R, 2)), 1)
    elif N == 4:
        return _columns(tl.reshape(x, (R, 2, 2)), 2)
    elif N == 8:
        return _columns(tl.reshape(x, (R, 2, 2, 2)), 3)
    elif N == 16:
        return _columns(tl.reshape(x, (R, 2, 2, 2, 2)), 4)
    elif N == 32:
        return _columns(tl.reshape(x, (R, 2, 2, 2, 2, 2)), 5)
    elif N == 64:
        return _columns(tl.reshape(x, (R, 2, 2, 2, 2, 2, 2)), 6)
    else:
        tl.static_assert(N == 128)
        return _columns(tl.reshape(x, (R, 2, 2, 2, 2, 2, 2, 2)), 7)


@triton.jit
def _joined(x):
    if len(x) == 1:
        return x[0]
    else:
        return tl.join(_joined(_every_other(x, 0)), _joined(_every_other(x, 1)))


@triton.jit
def _table_of(x, R: tl.constexpr):
    """A list of N columns (R,) -> (R, N)."""
    return tl.reshape(_joined(x), (R, len(x)))


# ------------------------------------------------------------------------------------------------- rows


@triton.jit
def _tile(n_rows, R: tl.constexpr, SHORT: tl.constexpr):
    """First row of this program, 0 to R - 1, and which of these rows exist.

    The last tile is moved back to end at the last row: it repeats a few rows with equal results, and all
    rows of all tiles exist. SHORT: there are fewer than R rows in all.
    """
    i = tl.arange(0, R)
    first = tl.program_id(0).to(n_rows.dtype) * R
    if SHORT:
        return first, i, i < n_rows
    else:
        return tl.minimum(first, n_rows - R), i, i >= 0


@triton.jit
def _row_offsets(i, first, n1, n2, s0, s1, s2, N1: tl.constexpr, N2: tl.constexpr, LEVELS: tl.constexpr):
    """Offsets of rows first + i of an array with leading dimensions (any, n2, n1) and strides (s2, s1, s0).

    N1 and N2 are 0 for sizes of at least a tile: then i crosses at most one border and needs no division; small
    powers of two (head counts) themselves; -1 for other sizes, so that no kernel is compiled for one length.
    LEVELS 0: no gaps; N1 is the stride, a constant, so that addresses in a tile become immediates.
    """
    if LEVELS == 0:
        return first.to(tl.int64) * N1, i * N1
    elif LEVELS == 1:
        return first.to(tl.int64) * s0, i.to(tl.int64) * s0
    else:
        outer = first // (N1 if N1 > 0 else n1)
        t = (first - outer * n1).to(tl.int32) + i
        if N1 == 0:
            over = (t >= n1).to(tl.int32)
        else:
            over = t // (N1 if N1 > 0 else n1.to(tl.int32))
        i0 = (t - over * n1).to(tl.int64)
        if LEVELS == 2:
            return outer.to(tl.int64) * s1, over.to(tl.int64) * s1 + i0 * s0
        else:
            outer2 = outer // (N2 if N2 > 0 else n2)
            u = (outer - outer2 * n2).to(tl.int32) + over
            if N2 == 0:
                over2 = (u >= n2).to(tl.int32)
            else:
                over2 = u // (N2 if N2 > 0 else n2.to(tl.int32))
            i1 = (u - over2 * n2).to(tl.int64)
            return outer2.to(tl.int64) * s2, over2.to(tl.int64) * s2 + i1 * s1 + i0 * s0


class _Rows(NamedTuple):
    """The leading dimensions of a tensor, merged to at most three levels, innermost first."""

    x: Tensor
    sizes: tuple[int, int, int]
    strides: tuple[int, int, int]
    levels: int


def _rows_of(x: Tensor) -> _Rows:
    """A copy is made only if the last dimension is not contiguous or more than three levels are left."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    merged: list[tuple[int, int]] = []
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1])):
        if size == 1:
            continue
        if merged and stride == merged[-1][0] * merged[-1][1]:
            merged[-1] = (merged[-1][0] * size, merged[-1][1])
        else:
            merged.append((size, stride))
    if len(merged) > 3:
        return _rows_of(x.contiguous())
    levels = max(1, len(merged))
    merged += [(1, 0)] * (3 - len(merged))
    sizes, strides = zip(*merged)
    return _Rows(x, sizes, strides, levels)


def _size_class(n: int, tile: int) -> int:
    """The constant of _row_offsets for a dimension of n."""
    if n >= tile:
        return 0
    return n if n & (n - 1) == 0 else -1


def _row_arguments(rows: _Rows, tile: int, unit: int) -> dict[str, Any]:
    """Arguments of _row_offsets, strides in units of ``unit`` elements."""
    (n1, n2, _), (s0, s1, s2) = rows.sizes, (stride // unit for stride in rows.strides)
    if rows.levels == 1 and (n1 == 1 or rows.strides[0] == rows.x.shape[-1]):
        width = rows.x.shape[-1] // unit
        return {"n1": 1, "n2": 1, "s0": 0, "s1": 0, "s2": 0, "N1": width, "N2": 0, "LEVELS": 0}
    return {
        "n1": n1,
        "n2": n2,
        "s0": s0,
        "s1": s1,
        "s2": s2,
        "N1": _size_class(n1, tile) if rows.levels > 1 else 0,
        "N2": _size_class(n2, tile) if rows.levels > 2 else 0,
        "LEVELS": rows.levels,
    }


# ------------------------------------------------------------------------------------------ always-on dims


@functools.lru_cache(maxsize=256)
def _feature_table(dims: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(dims or (0,), dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=256)
def _place_table(dims: tuple[int, ...], dim: int, device: torch.device) -> Tensor:
    """For every feature its place in dense, or -1."""
    places = dict(zip(dims, range(len(dims))))
    return torch.tensor([places.get(feature, -1) for feature in range(dim)], dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=256)
def _excluded_table(dims: tuple[int, ...], quads: int, device: torch.device) -> Tensor:
    """For every quad of features, the bits of those that take no part in top-k."""
    bits = [0] * quads
    for feature in dims:
        bits[feature // 4] |= 1 << feature % 4
    return torch.tensor(bits, dtype=torch.int32, device=device)


def _is_prefix(dims: tuple[int, ...]) -> bool:
    return dims == tuple(range(len(dims)))


@triton.jit
def _excluded(quad, table, D: tl.constexpr, RD: tl.constexpr, PREFIX: tl.constexpr):
    """Bit e is set if feature 4 * quad + e is always on or beyond the row."""
    if PREFIX:
        count = tl.minimum(tl.maximum(RD - 4 * quad, 0), 4)
        bits = (1 << count) - 1
    else:
        bits = tl.load(table + quad, mask=quad < D // 4, other=15)
    return tl.where(quad < D // 4, bits, 15)


@triton.jit
def _copy_dense(x, dense, dims, offsets, row, inside, RD: tl.constexpr, RDP: tl.constexpr, PREFIX: tl.constexpr):
    j = tl.arange(0, RDP)[None, :]
    feature = j if PREFIX else tl.load(dims + j, mask=j < RD, other=0)
    keep = inside[:, None] & (j < RD)
    tl.store(dense + row[:, None] * RD + j, tl.load(x + offsets[:, None] + feature, mask=keep), mask=keep)


# ------------------------------------------------------------------------------------------------- top-k
# Key of a quad or a feature, 32 bits unsigned: magnitude (15), takes part (1), reversed number (15), sign (1).
# NAN is the smallest key with the magnitude of a NaN; a minimum with it makes all NaNs equal.


@triton.jit
def _quad_keys(q, NAN: tl.constexpr):
    """The largest magnitude of four 16-bit floats, in bits 17 to 31; the lower bits are zero."""
    low = q.to(tl.uint32)
    high = (q >> 32).to(tl.uint32)
    largest = tl.maximum(tl.maximum(low << 1, low << 17), tl.maximum(high << 1, high << 17))
    return tl.minimum(largest, NAN) & 0xFFFE0000


@triton.jit
def _feature_keys(q, base, excluded, NAN: tl.constexpr, CHECK: tl.constexpr):
    """The list of the keys of the four features of a quad."""
    low = q.to(tl.uint32)
    high = (q >> 32).to(tl.uint32)
    keys = ()
    for e in tl.static_range(4):
        word = low if e < 2 else high
        if e % 2 == 0:
            turned = (word << 17) | (word >> 15)
        else:
            turned = (word << 1) | (word >> 31)
        key = (tl.minimum(turned, NAN) & 0xFFFE0001) | (base | ((3 - e) << 1))
        if CHECK:
            key = tl.where((excluded >> e) & 1 == 0, key, 0)
        keys = keys + (key,)
    return keys


@triton.jit
def _network(
    xq, offset, table, D: tl.constexpr, NQ: tl.constexpr, K: tl.constexpr, NAN: tl.constexpr,
    RD: tl.constexpr, PREFIX: tl.constexpr, WHOLE: tl.constexpr, R: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """The list of the K largest keys of every row, bitonic."""
    LAST: tl.constexpr = D // 4 - 1
    c = tl.arange(0, NQ)[None, :]
    tile = xq + offset[:, None] + c
    if NQ * 4 == D:
        q = tl.load(tile)
    else:
        q = tl.load(tile, mask=c <= LAST, other=0)
    keys = ()
    if NQ > K:
        # Every quad takes part unless the row is padded or has always-on features.
        ALL: tl.constexpr = RD == 0 and NQ * 4 == D
        number = (0x10000 | ((LAST - c) << 3)).to(tl.uint32)
        if ALL:
            key = _quad_keys(q, NAN) | number
        else:
            bits = _excluded(c, table, D, RD, PREFIX)
            if WHOLE:
                key = _quad_keys(q, NAN)
            else:
                low = tl.where(bits & 1 == 0, 0xFFFF, 0) | tl.where(bits & 2 == 0, 0xFFFF0000, 0)
                high = tl.where(bits & 4 == 0, 0xFFFF, 0) | tl.where(bits & 8 == 0, 0xFFFF0000, 0)
                key = _quad_keys(q & (low.to(tl.int64) | (high.to(tl.int64) << 32)), NAN)
            key = tl.where(bits == 15, 0, key | number)
        best = _largest(_list_of(key, R, NQ), K)
        if SHARED:
            quad = LAST - ((_table_of(best, R) >> 3) & 0x1FFF).to(tl.int32)
            found = _list_of(tl.gather(q, quad, 1), R, K)
        for j in tl.static_range(K):
            base = best[j] & 0x1FFF8
            quad_j = LAST - ((best[j] >> 3) & 0x1FFF).to(tl.int32)
            q_j = found[j] if SHARED else tl.load(xq + offset + quad_j)
            excluded = quad_j
            if not WHOLE:
                excluded = _excluded(quad_j, table, D, RD, PREFIX)
            elif not ALL:
                excluded = tl.where(base >= 0x10000, 0, 15)
            keys = keys + _feature_keys(q_j, base, excluded, NAN, not ALL)
    else:
        found = _list_of(q, R, NQ)
        for j in tl.static_range(NQ):
            base = tl.full((R,), 0x10000 + (max(LAST - j, 0) << 3), tl.uint32)
            excluded = _excluded(tl.full((R,), j, tl.int32), table, D, RD, PREFIX)
            keys = keys + _feature_keys(found[j], base, excluded, NAN, RD > 0 or NQ * 4 != D)
    return _largest(keys, K)


@triton.jit
def _store_kept(
    xq, offset, kept, row, inside, top, table, D: tl.constexpr, NQ: tl.constexpr, W: tl.constexpr,
    RD: tl.constexpr, PREFIX: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Writes the rows with zeros at features that are neither in the first W keys of ``top`` nor always on.

    The rows are read again, 64 features (128 bytes) at a time: holding them since the first read would cost registers.
    """
    CHUNK: tl.constexpr = min(NQ, 16)
    for i in tl.range(0, NQ // CHUNK, num_stages=1):
        first = tl.zeros((R,), tl.uint32)
        second = tl.zeros((R,), tl.uint32)
        for j in tl.static_range(W):
            feature = (D - 1 - ((top[j] >> 1) & 0x7FFF).to(tl.int32)).to(tl.uint32)
            bit = tl.full((R,), 1, tl.uint32) << (feature & 31)
            first |= tl.where(feature >> 5 == 2 * i, bit, 0)
            second |= tl.where(feature >> 5 == 2 * i + 1, bit, 0)
        place = tl.arange(0, CHUNK)[None, :]
        c = i * CHUNK + place
        word = tl.where(place < 8, first[:, None], second[:, None])
        bits = (word >> ((place & 7) * 4).to(tl.uint32)).to(tl.int32)
        if RD > 0:
            bits |= _excluded(c, table, D, RD, PREFIX)
        low = ((0 - (bits & 1)) & 0xFFFF) | ((0 - ((bits >> 1) & 1)) << 16)
        high = ((0 - ((bits >> 2) & 1)) & 0xFFFF) | ((0 - ((bits >> 3) & 1)) << 16)
        mask = low.to(tl.uint32).to(tl.int64) | (high.to(tl.int64) << 32)
        q = tl.load(xq + offset[:, None] + c, mask=inside[:, None] & (c < D // 4), other=0)
        tl.store(kept + row[:, None] * (D // 4) + c, q & mask, mask=inside[:, None] & (c < D // 4))


@triton.jit(do_not_specialize=SIZES)
def _topk_network(
    xq, x, values, indices, dense, kept, table, dims, n_rows, n1, n2, s0, s1, s2,
    N1: tl.constexpr, N2: tl.constexpr, LEVELS: tl.constexpr,
    D: tl.constexpr, NQ: tl.constexpr, K: tl.constexpr, W: tl.constexpr, NAN: tl.constexpr,
    RD: tl.constexpr, RDP: tl.constexpr, PREFIX: tl.constexpr, WHOLE: tl.constexpr,
    R: tl.constexpr, SHORT: tl.constexpr, SHARED: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    first, i, inside = _tile(n_rows, R, SHORT)
    # No load needs a mask: in a short tile rows past the end read the last row again.
    i_read = tl.minimum(i, n_rows - 1) if SHORT else i
    start, offset = _row_offsets(i_read, first, n1, n2, s0, s1, s2, N1, N2, LEVELS)
    xq += start
    top = _network(xq, offset, table, D, NQ, K, NAN, RD, PREFIX, WHOLE, R, SHARED)
    if W < K:
        top = _part(_sort_bitonic(top), 0, W)
    if KEPT:
        _store_kept(xq, offset, kept, (first + i).to(tl.int64), inside, top, table, D, NQ, W, RD, PREFIX, R)
    if W < K:
        for _ in tl.static_range(W, K):
            top = top + (tl.zeros((R,), tl.uint32),)

    # The rotated key: 0, reversed index (15 bits), the value's own 16 bits.
    entries = ()
    for j in tl.static_range(K):
        entries = entries + ((top[j] << 15) | (top[j] >> 17),)
    out = _table_of(_sort(entries), R)
    row = (first + i).to(tl.int64)[:, None]
    j = tl.arange(0, K)[None, :]
    keep = inside[:, None] & (j < W)
    tl.store(values + row * W + j, out.to(tl.int16), mask=keep)
    tl.store(indices + row * W + j, D - 1 - ((out >> 16) & 0x7FFF).to(tl.int32), mask=keep)
    if RD > 0:
        _copy_dense(x + start * 4, dense, dims, offset * 4, (first + i).to(tl.int64), inside, RD, RDP, PREFIX)


@triton.jit(do_not_specialize=SIZES)
def _topk_select(
    x, values, indices, dense, kept, place_of, dims, n_rows, n1, n2, s0, s1, s2,
    N1: tl.constexpr, N2: tl.constexpr, LEVELS: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, W: tl.constexpr, INF: tl.constexpr, BITS: tl.constexpr,
    RD: tl.constexpr, RDP: tl.constexpr, PREFIX: tl.constexpr, R: tl.constexpr, SHORT: tl.constexpr,
    KEPT: tl.constexpr,
):  # fmt: skip
    first, i, inside = _tile(n_rows, R, SHORT)
    start, offset = _row_offsets(i, first, n1, n2, s0, s1, s2, N1, N2, LEVELS)
    c = tl.arange(0, DP)[None, :]
    bits = tl.load(x + start + offset[:, None] + c, mask=inside[:, None] & (c < D), other=0)
    magnitude = bits.to(tl.int32) & ((1 << BITS) - 1)
    magnitude = tl.minimum(magnitude, INF + 1)  # all NaNs become equal
    takes_part = c < D
    if RD > 0:
        if PREFIX:
            takes_part = takes_part & (c >= RD)
        else:
            takes_part = takes_part & (tl.load(place_of + c, mask=c < D, other=0) < 0)
    magnitude = tl.where(takes_part, magnitude, -1)

    # The w-th largest magnitude, bit by bit: the largest number that w entries reach.
    least = tl.zeros((R,), tl.int32)
    for b in range(BITS):
        trial = least | (1 << (BITS - 1 - b))
        reach = tl.sum((magnitude >= trial[:, None]).to(tl.int32), 1)
        least = tl.where(reach >= W, trial, least)
    above = (magnitude > least[:, None]).to(tl.int32)
    equal = (magnitude == least[:, None]).to(tl.int32)
    wanted = W - tl.sum(above, 1)
    tied = tl.cumsum(equal, 1)
    chosen = (above == 1) | ((equal == 1) & (tied <= wanted[:, None]))
    place = tl.cumsum(above, 1) + tl.minimum(tied, wanted[:, None]) - 1

    row = (first + i).to(tl.int64)[:, None]
    keep = inside[:, None] & chosen
    tl.store(values + row * W + place, bits, mask=keep)
    tl.store(indices + row * W + place, tl.zeros((R, DP), tl.int32) + c, mask=keep)
    if KEPT:
        tl.store(kept + row * D + c, tl.where(chosen | ~takes_part, bits, 0), mask=inside[:, None] & (c < D))
    if RD > 0:
        _copy_dense(x + start, dense, dims, offset, (first + i).to(tl.int64), inside, RD, RDP, PREFIX)


# ---------------------------------------------------------------------------------------- expand, gather


@triton.jit(do_not_specialize=["n_rows"])
def _expand(
    bits, values, indices, dense, place_of, x, x_values, n_rows,
    D: tl.constexpr, P: tl.constexpr, W: tl.constexpr, PAIR: tl.constexpr,
    RD: tl.constexpr, PREFIX: tl.constexpr, R: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """One thread holds a few words of a row; a word is two features (PAIR) or one."""
    first, i, inside = _tile(n_rows, R, SHORT)
    row = (first + i).to(tl.int64)
    c = tl.arange(0, P)[None, :]
    N: tl.constexpr = D // 2 if PAIR else D
    out = tl.zeros((R, P), tl.int32)
    same = tl.zeros((R,), tl.int32)
    last = tl.full((R,), -1, tl.int32)
    for j in tl.range(0, W, loop_unroll_factor=16 if W > 16 else W, num_stages=1):
        feature = tl.load(indices + row * W + j, mask=inside, other=0).to(tl.int32)
        word = tl.load(bits + row * W + j, mask=inside, other=0).to(tl.int32)
        if PAIR:
            word = (word & 0xFFFF) << ((feature & 1) << 4)
            hit = (feature >> 1)[:, None] == c
        else:
            hit = feature[:, None] == c
        out = tl.where(hit, out | word[:, None], out)
        same |= (feature == last).to(tl.int32)
        last = feature
    if RD > 0:
        for half in tl.static_range(2 if PAIR else 1):
            column = 2 * c + half if PAIR else c
            if PREFIX:
                place = tl.where(column < RD, column, -1)
            else:
                place = tl.load(place_of + column, mask=column < D, other=-1)
            at = dense + row[:, None] * RD + place
            word = tl.load(at, mask=inside[:, None] & (place >= 0), other=0).to(tl.int32)
            out |= (word & 0xFFFF) << (16 * half) if PAIR else word
    tl.store(x + row[:, None] * N + c, out, mask=inside[:, None] & (c < N))

    if tl.max(same, 0) > 0:
        # Some row repeats an index: rewrite the entries of this tile as sums, in order.
        total = tl.zeros((R,), tl.float32)
        last = tl.full((R,), -1, tl.int32)
        tl.debug_barrier()
        for j in range(W):
            feature = tl.load(indices + row * W + j, mask=inside, other=0).to(tl.int32)
            value = tl.load(values + row * W + j, mask=inside, other=0.0).to(tl.float32)
            total = tl.where(feature == last, total, 0.0) + value
            last = feature
            tl.store(x_values + row * D + feature, total.to(x_values.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _gather(
    x, indices, values, dense, dims, n_rows, n1, n2, s0, s1, s2,
    N1: tl.constexpr, N2: tl.constexpr, LEVELS: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    RD: tl.constexpr, RDP: tl.constexpr, PREFIX: tl.constexpr, R: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    first, i, inside = _tile(n_rows, R, SHORT)
    start, offset = _row_offsets(i, first, n1, n2, s0, s1, s2, N1, N2, LEVELS)
    j = tl.arange(0, WP)[None, :]
    keep = inside[:, None] & (j < W)
    at = (first + i).to(tl.int64)[:, None] * W + j
    feature = tl.load(indices + at, mask=keep, other=0).to(tl.int32)
    tl.store(values + at, tl.load(x + start + offset[:, None] + feature, mask=keep), mask=keep)
    if RD > 0:
        _copy_dense(x + start, dense, dims, offset, (first + i).to(tl.int64), inside, RD, RDP, PREFIX)


@triton.jit(do_not_specialize=SIZES)
def _keep(
    xq, kept, indices, table, x, n_rows, n1, n2, s0, s1, s2,
    N1: tl.constexpr, N2: tl.constexpr, LEVELS: tl.constexpr, D: tl.constexpr, NQ: tl.constexpr, W: tl.constexpr,
    RD: tl.constexpr, PREFIX: tl.constexpr, R: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    first, i, inside = _tile(n_rows, R, SHORT)
    start, offset = _row_offsets(i, first, n1, n2, s0, s1, s2, N1, N2, LEVELS)
    row = (first + i).to(tl.int64)
    keys = ()
    for j in tl.static_range(W):
        feature = tl.load(indices + row * W + j, mask=inside, other=0).to(tl.uint32)
        keys = keys + (((D - 1 - feature) << 1).to(tl.uint32),)
    _store_kept(xq + start, offset, kept, row, inside, keys, table, D, NQ, W, RD, PREFIX, R)


# --------------------------------------------------------------------------------------------- launchers

_BITS = {torch.float16: 15, torch.bfloat16: 15, torch.float32: 31}
_INF = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000}


def _check(x: Tensor, name: str) -> None:
    if x.dtype not in _BITS:
        raise NotImplementedError(
            f"impl='triton' takes float16, bfloat16 and float32, {name} is {x.dtype}; use impl='reference'"
        )


def _as_bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16)


def _next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _launch(kernel: Any, n_rows: int, tile: int, warps: int, **arguments: Any) -> None:
    with torch.cuda.device_of(arguments["x"]):
        kernel[(triton.cdiv(n_rows, tile),)](n_rows=n_rows, R=tile, SHORT=n_rows < tile, num_warps=warps, **arguments)


def _tile_rows(width: int) -> tuple[int, int]:
    """Rows and warps of a tile whose rows have ``width`` entries: about 32 entries a thread."""
    warps = min(max(4, width // 1024), 32)
    return max(1, min(128, warps * 1024 // width)), warps


def _network_fits(rows: _Rows, w: int) -> bool:
    x = rows.x
    d = x.shape[-1]
    # The network is unrolled: d * topk bounds its registers and the time to compile it.
    aligned = x.data_ptr() % 8 == 0 and all(stride % 4 == 0 for stride in rows.strides)
    return x.element_size() == 2 and aligned and d % 4 == 0 and _next_power_of_2(d) * _next_power_of_2(w) <= 4096


def topk(
    x: Tensor, topk: int, dense_dims: tuple[int, ...], *, kernel: str = "auto", **tuning: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep ``dense_dims`` and the ``topk`` largest magnitudes of the other features of every row.

    x (..., d) float16, bfloat16 or float32, any strides. Returns values (..., w), indices (..., w) ascending,
    uint8 up to d = 256 and int16 above, and dense (..., r), with w = min(topk, d - r). The bits of a
    selected NaN may change to those of another NaN. ``kernel``: "network", "select" or "auto"; ``tuning``
    overrides R, warps and SHARED, for measurements.

    Raises:
        NotImplementedError: float64; kernel="network" where it does not fit.
    """
    return _topk(x, topk, dense_dims, False, kernel, tuning)[:3]


def topk_kept(
    x: Tensor, topk: int, dense_dims: tuple[int, ...], *, kernel: str = "auto", **tuning: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`topk`, and in the same pass the rows (..., d) with zeros at the features that were not kept."""
    return _topk(x, topk, dense_dims, True, kernel, tuning)


def _topk(
    x: Tensor, topk: int, dense_dims: tuple[int, ...], with_kept: bool, kernel: str, tuning: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, "x")
    d, r = x.shape[-1], len(dense_dims)
    w = min(topk, d - r)
    values = x.new_empty(*x.shape[:-1], w)
    indices = x.new_empty(*x.shape[:-1], w, dtype=torch.uint8 if d <= 256 else torch.int16)
    dense = x.new_empty(*x.shape[:-1], r)
    kept = x.new_empty(x.shape if with_kept else 0)
    if values.numel() == 0:
        return values, indices, dense, kept
    rows = _rows_of(x.detach())
    x = rows.x
    fits = _network_fits(rows, w)
    if kernel == "network" and not fits:
        raise NotImplementedError(
            "kernel='network' takes 16-bit rows aligned to 8 bytes with d % 4 == 0 and d * topk <= 4096; got "
            f"{x.dtype}, d={d}, topk={w}, strides {x.stride()}"
        )
    prefix = _is_prefix(dense_dims)
    common = {
        "values": _as_bits(values),
        "indices": indices,
        "dense": _as_bits(dense) if r else indices,
        "dims": indices if prefix else _feature_table(dense_dims, x.device),
        "n_rows": values.numel() // w,
        "D": d,
        "W": w,
        "RD": r,
        "RDP": _next_power_of_2(r),
        "PREFIX": prefix,
        "KEPT": with_kept,
        "x": _as_bits(x),
    }
    if kernel != "select" and fits:
        taken = set(dense_dims)
        whole = all((4 * (f // 4) + e) in taken for f in dense_dims for e in range(4))
        # The chosen quads come from shared memory or are read again. Measured on an H200: shared memory is 15% faster
        # for these shapes and up to 13 times slower for others.
        plain = rows.levels == 1 and whole and prefix
        wide = d == 256 or (d == 128 and not with_kept)
        shared = tuning.get("SHARED", plain and wide and 4 <= _next_power_of_2(w) <= 8)
        tile, warps = (32, 1) if shared else (128, 4)
        tile, warps = tuning.get("R", tile), tuning.get("warps", warps)
        quads = _quads_of(x)
        _launch(
            _topk_network,
            tile=tile,
            warps=warps,
            xq=quads,
            kept=_quads_of(kept) if with_kept else quads,
            table=indices if prefix else _excluded_table(dense_dims, d // 4, x.device),
            NQ=_next_power_of_2(d // 4),
            K=_next_power_of_2(w),
            NAN=(_INF[x.dtype] + 1) << 17,
            WHOLE=whole,
            SHARED=shared,
            **_row_arguments(rows, tile, 4),
            **common,
        )
    else:
        width = _next_power_of_2(d)
        tile, warps = _tile_rows(width)
        tile, warps = tuning.get("R", tile), tuning.get("warps", warps)
        _launch(
            _topk_select,
            tile=tile,
            warps=warps,
            kept=_as_bits(kept) if with_kept else values,
            place_of=indices if prefix else _place_table(dense_dims, d, x.device),
            DP=width,
            INF=_INF[x.dtype],
            BITS=_BITS[x.dtype],
            **_row_arguments(rows, tile, 1),
            **common,
        )
    return values, indices, dense, kept


def _quads_of(x: Tensor) -> Tensor:
    """The first quad of x as int64: the kernel brings its own strides."""
    return x.as_strided((4,), (1,), x.storage_offset()).view(torch.int64)


def expand(values: Tensor, indices: Tensor, dense: Tensor, dim: int, dense_dims: tuple[int, ...]) -> Tensor:
    """The dense rows (..., dim) of a code: zeros elsewhere; equal neighbours in indices add.

    Raises NotImplementedError for float64.
    """
    _check(values, "values")
    x = values.new_empty(*values.shape[:-1], dim)
    if x.numel() == 0:
        return x
    values, indices, dense = values.detach().contiguous(), indices.contiguous(), dense.detach().contiguous()
    r, w = len(dense_dims), values.shape[-1]
    prefix = _is_prefix(dense_dims)
    pair = values.element_size() == 2 and dim % 2 == 0
    width = _next_power_of_2(dim // 2 if pair else dim)
    tile, warps = _tile_rows(2 * width)
    _launch(
        _expand,
        n_rows=x.numel() // dim,
        tile=tile,
        warps=warps,
        x=x.view(torch.int32) if pair else _as_bits(x),
        bits=_as_bits(values),
        values=values,
        x_values=x,
        indices=indices,
        dense=_as_bits(dense) if r else indices,
        place_of=indices if prefix else _place_table(dense_dims, dim, x.device),
        D=dim,
        P=width,
        W=w,
        PAIR=pair,
        RD=r,
        PREFIX=prefix,
    )
    return x


def gather(x: Tensor, indices: Tensor, dense_dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """x at the indices of a code and at its always-on features: the transpose of `expand`.

    Raises NotImplementedError for float64.
    """
    _check(x, "x")
    w, r = indices.shape[-1], len(dense_dims)
    values, dense = x.new_empty(indices.shape), x.new_empty(*x.shape[:-1], r)
    if values.numel() == 0:
        return values, dense
    rows = _rows_of(x.detach())
    indices = indices.contiguous()
    prefix = _is_prefix(dense_dims)
    width = _next_power_of_2(w)
    tile, warps = max(1, min(128, 4096 // width)), 4
    _launch(
        _gather,
        n_rows=values.numel() // w,
        tile=tile,
        warps=warps,
        x=_as_bits(rows.x),
        indices=indices,
        values=_as_bits(values),
        dense=_as_bits(dense) if r else indices,
        dims=indices if prefix else _feature_table(dense_dims, x.device),
        W=w,
        WP=width,
        RD=r,
        RDP=_next_power_of_2(r),
        PREFIX=prefix,
        **_row_arguments(rows, tile, 1),
    )
    return values, dense


def keep(x: Tensor, indices: Tensor, dense_dims: tuple[int, ...]) -> Tensor:
    """Rows of x with zeros at features that a code does not keep.

    Raises NotImplementedError for float64.
    """
    _check(x, "x")
    d, w = x.shape[-1], indices.shape[-1]
    rows = _rows_of(x.detach())
    if not _network_fits(rows, 1) or w > 32:
        values, dense = gather(x, indices, dense_dims)
        return expand(values, indices, dense, d, dense_dims)
    kept = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if kept.numel() == 0:
        return kept
    prefix = _is_prefix(dense_dims)
    _launch(
        _keep,
        n_rows=kept.numel() // d,
        tile=128,
        warps=4,
        x=x,
        xq=_quads_of(rows.x),
        kept=_quads_of(kept),
        indices=indices.contiguous(),
        table=indices if prefix else _excluded_table(dense_dims, d // 4, x.device),
        D=d,
        NQ=_next_power_of_2(d // 4),
        W=w,
        RD=len(dense_dims),
        PREFIX=prefix,
        **_row_arguments(rows, 128, 4),
    )
    return kept

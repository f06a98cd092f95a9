"""Numba kernels of `cpu_numba`: what a task does, and its steps. Compiled at the first call, kept by Numba on disk."""

import functools
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..cache import BLOCK

# Query rows from which laying a block out by feature pays.
BY_FEATURE = 6
# mu S is not used where 128 mu is more than this times the block's share of Z: it would cancel.
CANCEL = 4.0

F32 = np.float32
_jit = functools.partial(numba.njit, cache=True, nogil=True, error_model="numpy")
# Sums may be reordered, but not "nnan" or "ninf": a value that is not finite must stay visible.
_sum_jit = functools.partial(_jit, fastmath={"contract", "reassoc", "nsz"})


@intrinsic
def _float_of_bits(typingctx: Any, bits: Any) -> Any:
    """The fp32 number with these 32 bits."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.int32), build


@intrinsic
def _prefetch(typingctx: Any, array: Any, at: Any) -> Any:
    """Ask for the cache line of entry `at` of a one-dimensional contiguous array."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        i32, byte = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        line = builder.bitcast(builder.gep(data, [args[1]]), byte)
        builder.call(function, [line, i32(0), i32(3), i32(1)])
        return context.get_dummy_value()

    return types.none(array, at), build


@_jit(fastmath={"contract"})
def _exponentials(s, top, e):
    """e = e^(s - top) for s <= top, to 2 ulp; 0 below e^-87, NaN for NaN. Cephes' polynomial."""
    for j in range(BLOCK):
        x = s[j] - top
        y = F32(-87.0) if x < F32(-87.0) else x
        n = np.rint((y if y > F32(-87.0) else F32(-87.0)) * F32(1.4426950408889634))
        f = (y - n * F32(0.693359375)) - n * F32(-2.12194440e-4)
        p = F32(1.9875691500e-4)
        p = p * f + F32(1.3981999507e-3)
        p = p * f + F32(8.3334519073e-3)
        p = p * f + F32(4.1665795894e-2)
        p = p * f + F32(1.6666665459e-1)
        p = p * f + F32(5.0000001201e-1)
        p = p * f * f + f + F32(1.0)
        p *= _float_of_bits((np.int32(n) + np.int32(127)) << np.int32(23))
        e[j] = F32(0.0) if x < F32(-87.0) else p


@_jit()
def _fill(x, low, high, value):
    for i in range(low, high):
        x[i] = value


@_jit()
def by_feature(indices, values, n, offsets, ids, listed):
    """Lay n keys of w entries out by feature: list u is entries offsets[u] to offsets[u + 1] of ids and listed.

    indices, values (>= n, w); offsets (d + 1,) int32; ids (>= n * w,) uint8, the keys of a list
    ascending; listed (>= n * w,) fp32, their values.
    """
    d, w = offsets.shape[0] - 1, indices.shape[1]
    _fill(offsets, 0, d + 1, np.int32(0))
    for j in range(n):
        for i in range(w):
            offsets[indices[j, i]] += np.int32(1)
    total = np.int32(0)
    for u in range(d):
        count = offsets[u]
        offsets[u] = total
        total += count
    for j in range(n):
        for i in range(w):
            at = np.uint32(offsets[indices[j, i]])
            ids[at] = j
            listed[at] = values[j, i]
            offsets[indices[j, i]] += np.int32(1)
    for u in range(d, 0, -1):
        offsets[u] = offsets[u - 1]
    offsets[0] = 0


@_jit()
def _score_lists(q_index, q_value, row, head, offsets, ids, listed, s, hit, drop):
    _fill(s, 0, BLOCK, F32(0.0))
    if drop:
        _fill(hit, 0, BLOCK, np.uint8(0))
    for i in range(q_index.shape[2]):
        u, x = q_index[row, head, i], q_value[row, head, i]
        for at in range(np.uint32(offsets[u]), np.uint32(offsets[u + 1])):
            s[ids[at]] += x * listed[at]
            if drop:
                hit[ids[at]] = 1


@_jit()
def _score_keys(table, kept, r, indices, values, n, s, hit, drop):
    for j in range(n):
        total = F32(0.0)
        for i in range(indices.shape[1]):
            total += table[r, indices[j, i]] * values[j, i]
        s[j] = total
    if drop:
        for j in range(n):
            hit[j] = 0
            for i in range(indices.shape[1]):
                hit[j] |= kept[r, indices[j, i]]


@_jit()
def _score_stored(table, r, indices, values, w, s):
    """Scores of a whole block from its codes as they are stored."""
    for j in range(BLOCK):
        total = F32(0.0)
        for i in range(w):
            total += table[r, indices[j * w + i]] * values[j * w + i]
        s[j] = total


@_jit()
def _largest(s, lanes):
    """The maximum, NaN aside; lanes (16,) is scratch."""
    _fill(lanes, 0, 16, F32(-np.inf))
    for j in range(0, BLOCK, 16):
        for i in range(16):
            lanes[i] = s[j + i] if s[j + i] > lanes[i] else lanes[i]
    top = lanes[0]
    for i in range(1, 16):
        top = max(top, lanes[i])
    return top


@_sum_jit()
def _total(e):
    total = F32(0.0)
    for j in range(BLOCK):
        total += e[j]
    return total


@_jit()
def _has_nan(s):
    count = 0
    for j in range(BLOCK):
        count += s[j] != s[j]
    return count > 0


@_sum_jit()
def _total_of_zeros(x, n):
    """0, or NaN if one of the first n entries is not finite."""
    total = F32(0.0)
    for i in range(n):
        total += x[i] * F32(0.0)
    return total


@_jit()
def _select(keep, e, n, chosen, coefficient):
    """The keys j with keep[j] != 0 and their e[j], ascending; how many they are."""
    count = np.uint64(0)
    for j in range(n):
        chosen[count] = j
        coefficient[count] = e[j]
        count += np.uint64(keep[j] != F32(0.0))
    return np.int64(count)


@_sum_jit()
def _add_rows(acc, r, rows, at, coefficient, count):
    """acc[r] += sum_i coefficient[i] * rows[at[i]], eight rows a step."""
    whole = count // 8 * 8
    for i in range(0, whole, 8):
        a0, a1, a2, a3, a4, a5, a6, a7 = (
            at[i], at[i + 1], at[i + 2], at[i + 3], at[i + 4], at[i + 5], at[i + 6], at[i + 7]
        )  # fmt: skip
        x0, x1, x2, x3, x4, x5, x6, x7 = (
            coefficient[i], coefficient[i + 1], coefficient[i + 2], coefficient[i + 3],
            coefficient[i + 4], coefficient[i + 5], coefficient[i + 6], coefficient[i + 7],
        )  # fmt: skip
        for c in range(acc.shape[1]):
            acc[r, c] += ((x0 * rows[a0, c] + x1 * rows[a1, c]) + (x2 * rows[a2, c] + x3 * rows[a3, c])) + (
                (x4 * rows[a4, c] + x5 * rows[a5, c]) + (x6 * rows[a6, c] + x7 * rows[a7, c])
            )
    for i in range(whole, count):
        a0, x0 = at[i], coefficient[i]
        for c in range(acc.shape[1]):
            acc[r, c] += x0 * rows[a0, c]


@_jit()
def _sum_rows(rows, at, count, total):
    """total (dv,) float64 = the sum of rows[at[i]]."""
    for c in range(total.shape[0]):
        total[c] = 0.0
    for i in range(count):
        j = at[i]
        for c in range(total.shape[0]):
            total[c] += rows[j, c]


@_jit()
def _copy(stored, first, count, target, to):
    """count stored numbers as fp32: of kind 0 fp32, 1 bf16, 2 and 3 bits of 16 and 8 that table translates."""
    floats, bits16, bits8, kind, table = stored
    target = target[to : to + count]
    if kind == 0:
        part = floats[first : first + count]
        for i in range(count):
            target[i] = part[i]
    elif kind == 3:
        for i in range(count):
            target[i] = table[bits8[first + np.uint64(i)]]
    else:
        bits = bits16[first : first + count]
        if kind == 1:
            for i in range(count):
                target[i] = _float_of_bits(np.int32(bits[i]) << np.int32(16))
        else:
            for i in range(count):
                target[i] = table[bits[i]]


@_jit()
def _widen(chosen, count, flat, stored, scales, wide, converted):
    """The chosen rows of the block as fp32 in wide, each once; a scale is bf16 bits, one a row."""
    dv = np.uint64(wide.shape[1])
    for i in range(count):
        j = chosen[i]
        if not converted[j]:
            converted[j] = 1
            _copy(stored, flat[j] * dv, dv, wide.reshape(-1), j * dv)
            if scales.shape[0]:
                scale = _float_of_bits(np.int32(scales[flat[j]]) << np.int32(16))
                for c in range(dv):
                    wide[j, c] *= scale


@_jit()
def run(tasks, begin, end, q, keys, v, sums, tables, shape, window, drop, results):
    """Tasks begin to end, rows of `cpu_numba._tasks`; the tuples are those of `cpu_numba._attend`."""
    q_index, q_value, q_spoiled = q
    k_index8, k_index16, k_stored = keys
    v_rows, v_scales, v_stored = v
    v_kind = v_stored[3]
    q_start, q_length, k_length, k_first, pages, sum_of = tables
    hkv, page_size, d, w = shape
    m_out, z_out, acc_out, rows_read = results
    group, dv, cancel = q_index.shape[1] // hkv, v_rows.shape[1], F32(CANCEL)
    ki, kv = np.empty((BLOCK, w), np.uint16), np.empty((BLOCK, w), np.float32)
    ki_flat, kv_flat = ki.reshape(-1), kv.reshape(-1)
    offsets, ids, listed = np.empty(d + 1, np.int32), np.empty(BLOCK * w, np.uint8), np.empty(BLOCK * w, np.float32)
    s, e, hit, lanes = np.empty(BLOCK, F32), np.empty(BLOCK, F32), np.empty(BLOCK, np.uint8), np.empty(16, F32)
    every, flat = np.empty(BLOCK, np.uint64), np.empty(BLOCK, np.uint64)
    for j in range(BLOCK):
        every[j] = j
    chosen, at, coefficient = np.empty(BLOCK, np.uint64), np.empty(BLOCK, np.uint64), np.empty(BLOCK, F32)
    converted, touched = np.empty(BLOCK, np.uint8), np.empty(BLOCK, np.uint8)
    wide, block_sum = np.empty((BLOCK if v_kind else 1, dv), F32), np.empty(dv, np.float64)
    part = np.empty((1, dv), F32)
    most = 0
    for task in range(begin, end):
        most = max(most, tasks[task, 3])
    m, z, acc = np.empty(most, F32), np.empty(most, F32), np.empty((most, dv), F32)
    lows, highs = np.empty(most, np.int64), np.empty(most, np.int64)
    table, kept = np.empty((BY_FEATURE, d), F32), np.empty((BY_FEATURE, d), np.uint8)
    for task in range(begin, end):
        sequence, head, first_row, rows, first_block, last_block, slot = tasks[task]
        n_q, n_k, lists = q_length[sequence], k_length[sequence], rows >= BY_FEATURE
        low_of_all, high_of_all = n_k, np.int64(0)
        for r in range(rows):
            token = (first_row + r) // group
            position = token + n_k - n_q
            lows[r] = max(position - window[0], 0) if window[0] >= 0 else 0
            highs[r] = min(position + window[1] + 1, n_k) if window[1] >= 0 else n_k
            if lows[r] < highs[r]:
                low_of_all, high_of_all = min(low_of_all, lows[r]), max(high_of_all, highs[r])
            m[r], z[r] = F32(-np.inf), F32(0.0)
            for c in range(dv):
                acc[r, c] = F32(0.0)
            if not lists:
                row, q_head = q_start[sequence] + token, head * group + (first_row + r) % group
                for u in range(d):
                    table[r, u], kept[r, u] = F32(0.0), 0
                for i in range(q_index.shape[2]):
                    table[r, q_index[row, q_head, i]] += q_value[row, q_head, i]
                    kept[r, q_index[row, q_head, i]] = 1
        for block in range(max(first_block, low_of_all // BLOCK), min(last_block, -(-high_of_all // BLOCK))):
            base = block * BLOCK
            n = min(BLOCK, n_k - base)
            j = 0
            position = k_first[sequence] + base
            inside = position % page_size
            # One row at a time, a whole block of fp32 codes in one page is scored where it lies.
            stored = not lists and not drop and n == BLOCK and inside + BLOCK <= page_size
            stored = stored and k_index8.shape[0] > 0 and k_stored[3] == 0
            first = (np.int64(pages[sequence, position // page_size]) * hkv + head) * page_size + inside
            if stored:
                narrow_block = k_index8[first * w : (first + BLOCK) * w]
                float_block = k_stored[0][first * w : (first + BLOCK) * w]
                for i in range(BLOCK):
                    flat[i] = first + i
                j = n
            while j < n:
                position = k_first[sequence] + base + j
                inside = position % page_size
                row = (np.int64(pages[sequence, position // page_size]) * hkv + head) * page_size + inside
                count = min(n - j, page_size - inside)
                for i in range(count):
                    flat[j + i] = row + i
                target = ki_flat[j * w : (j + count) * w]
                if k_index8.shape[0]:
                    narrow = k_index8[row * w : (row + count) * w]
                    for i in range(count * w):
                        target[i] = narrow[i]
                else:
                    source = k_index16[row * w : (row + count) * w]
                    for i in range(count * w):
                        target[i] = source[i]
                _copy(k_stored, row * w, count * w, kv_flat, j * w)
                j += count
            spoiled_keys = False if stored else np.isnan(_total_of_zeros(kv_flat, n * w))
            # The codes of the next block are on their way while this one is worked on (measured: 8% of a step).
            if not lists and base + 2 * BLOCK <= n_k and page_size >= BLOCK:
                position = k_first[sequence] + base + BLOCK
                row = (np.int64(pages[sequence, position // page_size]) * hkv + head) * page_size + position % page_size
                for i in range(0, BLOCK * w, 64):
                    if k_index8.shape[0]:
                        _prefetch(k_index8, row * w + i)
                    if k_stored[3] == 0:
                        for j in range(0, 64, 16):
                            _prefetch(k_stored[0], row * w + i + j)
            if lists:
                by_feature(ki, kv, n, offsets, ids, listed)
            has_sum = False
            _fill(converted, 0, BLOCK, np.uint8(0))
            _fill(touched, 0, BLOCK, np.uint8(0))
            for r in range(rows):
                low, high = max(lows[r] - base, 0), min(highs[r] - base, n)
                if low >= high:
                    continue
                row, q_head = q_start[sequence] + (first_row + r) // group, head * group + (first_row + r) % group
                if lists:
                    _score_lists(q_index, q_value, row, q_head, offsets, ids, listed, s, hit, drop)
                elif stored:
                    _score_stored(table, r, narrow_block, float_block, w, s)
                    if np.isnan(_total_of_zeros(s, BLOCK)):
                        for i in range(BLOCK * w):
                            if not np.isfinite(float_block[i]):
                                s[i // w] = F32(np.nan)
                else:
                    _score_keys(table, kept, r, ki, kv, n, s, hit, drop)
                if spoiled_keys:
                    for j in range(n):
                        for i in range(w):
                            if not np.isfinite(kv[j, i]):
                                s[j] = F32(np.nan)
                _fill(s, 0, low, F32(-np.inf))
                _fill(s, high, BLOCK, F32(-np.inf))
                if drop:
                    for j in range(BLOCK):
                        s[j] = s[j] if hit[j] else F32(-np.inf)
                top = _largest(s, lanes)
                if drop and top == F32(-np.inf) and not _has_nan(s):
                    if q_spoiled[row, q_head]:  # scores of -inf are not "sees nothing"
                        for j in range(low, high):
                            if hit[j]:
                                z[r], m[r] = F32(np.nan), max(m[r], F32(0.0))
                    continue
                factor, uses_sum = F32(1.0), False
                if top > m[r]:
                    factor = np.exp(m[r] - top)
                    z[r] *= factor
                    m[r] = top
                # A block is summed by itself: one long chain of sums would round more than blockwise products do.
                for c in range(dv):
                    part[0, c] = F32(0.0)
                _exponentials(s, m[r], e)
                total = _total(e)
                z[r] += total
                if q_spoiled[row, q_head]:
                    z[r] = F32(np.nan)
                whole = low == 0 and high == n
                if drop:
                    count = _select(e, e, n, chosen, coefficient)
                else:
                    count, mu = 0, F32(0.0)
                    if whole:
                        count = _select(s, e, n, chosen, coefficient)
                    if whole and count < n:
                        j = 0
                        while s[j] != F32(0.0):
                            j += 1
                        mu = e[j]
                    if whole and count < n and BLOCK * mu <= cancel * total:
                        for i in range(count):
                            coefficient[i] -= mu
                        uses_sum = True
                        if not has_sum:
                            has_sum = True
                            if sums.shape[0]:
                                for c in range(dv):
                                    block_sum[c] = sums[np.int64(sum_of[sequence, block]) * hkv + head, c]
                            else:
                                if v_kind:
                                    _widen(every, n, flat, v_stored, v_scales, wide, converted)
                                    _sum_rows(wide, every, n, block_sum)
                                else:
                                    _sum_rows(v_rows, flat, n, block_sum)
                    elif count < n:
                        count = high - low
                        for i in range(count):
                            chosen[i] = low + i
                            coefficient[i] = e[low + i]
                for i in range(count):
                    touched[chosen[i]] = 1
                    at[i] = flat[chosen[i]]
                if v_kind:
                    _widen(chosen, count, flat, v_stored, v_scales, wide, converted)
                    _add_rows(part, 0, wide, chosen, coefficient, count)
                else:
                    _add_rows(part, 0, v_rows, at, coefficient, count)
                if uses_sum:
                    for c in range(dv):
                        part[0, c] += mu * F32(block_sum[c])
                for c in range(dv):
                    acc[r, c] = acc[r, c] * factor + part[0, c]
            total_read = 0
            for j in range(n):
                total_read += touched[j]
            rows_read[task] += total_read
        for r in range(rows):
            row, q_head = q_start[sequence] + (first_row + r) // group, head * group + (first_row + r) % group
            m_out[slot, row, q_head] = m[r]
            z_out[slot, row, q_head] = z[r]
            acc_out[slot, row, q_head] = acc[r]


@_jit()
def top_rows(x, begin, end, values, indices):
    """The entries of largest magnitude of rows begin to end of x (n, d), ties to the lowest feature, NaN before all.

    values, indices (n, w): w <= d entries a row, indices ascending.
    """
    w = values.shape[1]
    bits = x.view(np.uint32)
    keys, where = np.empty(w + 1, np.uint32), np.empty(w + 1, np.uint32)
    for row in range(begin, end):
        _fill(keys, 0, w + 1, np.uint32(0))
        _fill(where, 0, w + 1, np.uint32(0))
        filled = np.uint64(0)
        for u in range(x.shape[1]):
            key = min(bits[row, u] & np.uint32(0x7FFFFFFF), np.uint32(0x7F800001))
            if filled == w and key <= keys[w - 1]:
                continue
            at = filled
            while at > 0 and keys[at - 1] < key:
                keys[at], where[at] = keys[at - 1], where[at - 1]
                at -= np.uint64(1)
            keys[at], where[at] = key, u
            filled = min(filled + np.uint64(1), np.uint64(w))
        for i in range(1, w):
            u, at = where[i], i
            while at > 0 and where[at - 1] > u:
                where[at] = where[at - 1]
                at -= 1
            where[at] = u
        for i in range(w):
            indices[row, i] = where[i]
            values[row, i] = x[row, where[i]]

"""Backward attention over expanded rows in Triton: dq, dk, dv from out and lse; no atomics, so always deterministic.

    p_ij = exp(s_ij - lse_i)        dv_j = sum_i p_ij do_i
    ds_ij = p_ij (do_i . v_j - delta_i)        delta_i = do_i . out_i - dlse_i
    dq_i = scale sum_j ds_ij k_j    dk_j = scale sum_i ds_ij q_i

Three kernels: delta; dk and dv, a program owns a tile of keys; dq, a program owns a tile of queries. A row that saw
nothing or something non-finite has probability 0. RESCUE repeats the work for heads in which the forward met a
non-finite value, and replaces the rows that it made non-finite.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_forward import (
    LOG2E,
    RESCUERS,
    SIZES,
    Options,
    Tiles,
    any_bad,
    common_arguments,
    dropped,
    finite,
    in_window,
    key_tiles,
    launch,
    pick,
    rows_of,
    shared_memory,
    with_unit_stride,
)


@triton.jit(do_not_specialize=["rows", "seqlen"])
def _delta(
    grad_out, out, lse, grad_lse, delta, log_lse, bad, rows, seqlen, g_b, g_s, g_h, o_b, o_s, o_h,
    HQ: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GRAD_LSE: tl.constexpr,
    RESCUE: tl.constexpr,
):  # fmt: skip
    """delta_i, and lse_i in units of log 2, for rows (b, h, s); rows without a gradient get delta 0 and lse inf."""
    last = tl.cdiv(rows, BM)
    if RESCUE:
        last = tl.where(tl.load(bad) == 0, 0, last)
    for tile in tl.range(tl.program_id(0), last, tl.num_programs(0)):
        row = (tile * BM + tl.arange(0, BM)).to(tl.int64)
        inside = row < rows
        s = row % seqlen
        h = row // seqlen % HQ
        b = row // seqlen // HQ
        c = tl.arange(0, BN)[None, :]
        mask = inside[:, None] & (c < DV)
        o = tl.load(out + (b * o_b + s * o_s + h * o_h)[:, None] + c, mask=mask, other=0.0)
        g = tl.load(grad_out + (b * g_b + s * g_s + h * g_h)[:, None] + c, mask=mask, other=0.0)
        row_lse = tl.load(lse + row, mask=inside, other=0.0)
        dead = ~finite(row_lse) | any_bad(o, 1)
        total = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
        if GRAD_LSE:
            total -= tl.load(grad_lse + row, mask=inside, other=0.0)
        tl.store(delta + row, tl.where(dead, 0.0, total), mask=inside)
        tl.store(log_lse + row, tl.where(dead, float("inf"), row_lse * 1.4426950408889634), mask=inside)


@triton.jit
def _accumulate_keys(
    dk, dv, k_t, v_t, members_t, q, grad_out, members_q, log_lse, delta, seed, j, key_seen, head, sq, sk,
    q_s, g_s, member_s, left, right, scale, keep, lo, hi,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, MASK: tl.constexpr, DROP: tl.constexpr, DROPOUT: tl.constexpr, RESCUE: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Adds the queries [lo, hi) to dk and dv of one tile of keys; tiles are (keys, queries)."""
    c = tl.arange(0, DP)
    cv = tl.arange(0, DVP)
    t = tl.arange(0, BM)
    for m0 in tl.range(lo, hi, BM):
        m0 = tl.multiple_of(m0, BM)
        i = m0 + t
        start = m0.to(tl.int64)
        q_t = rows_of(q + start * q_s, t, q_s, c, sq - m0, D, DP, True)
        g_t = rows_of(grad_out + start * g_s, t, g_s, cv, sq - m0, DV, DVP, True)
        row_lse = tl.load(log_lse + start + t, mask=i < sq, other=float("inf"))
        row_delta = tl.load(delta + start + t, mask=i < sq, other=0.0)
        if RESCUE:
            q_t = tl.where(finite(q_t), q_t, 0.0)
        if EDGE:  # rows without a gradient lie in tiles that some query does not see
            g_t = tl.where((row_lse == float("inf"))[:, None], 0.0, g_t)
        s = tl.dot(k_t, tl.trans(q_t), input_precision="ieee")
        p = tl.exp2(s * scale - row_lse[None, :])
        if EDGE:
            seen = in_window(i[None, :], j[:, None], sq, sk, left, right, LEFT, RIGHT)
            if MASK:
                seen = seen & key_seen[:, None]
            if DROP:
                m_t = rows_of(members_q + start * member_s, t, member_s, c, sq - m0, D, DP, True)
                seen = seen & (tl.dot(members_t, tl.trans(m_t)) > 0)
            p = tl.where(seen, p, 0.0)
        dp = tl.dot(v_t, tl.trans(g_t), input_precision="ieee")
        weight = p
        if DROPOUT:
            weight = dropped(p, seed, i[None, :], j[:, None], head, keep)
            dp = dropped(dp, seed, i[None, :], j[:, None], head, keep)
        dv = tl.dot(weight.to(g_t.dtype), g_t, dv, input_precision="ieee")
        ds = p * (dp - row_delta[None, :])
        if EDGE:
            ds = tl.where(seen, ds, 0.0)
        dk = tl.dot(ds.to(q_t.dtype), q_t, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _keys_tile(
    pid,
    q, k, v, grad_out, dk, dv, log_lse, delta, bad, members_q, members_k, key_mask, cu_q, cu_k, seed, sq, sk, n_tiles,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, g_b, g_s, g_h, dk_b, dk_s, dk_h, dv_b, dv_s, dv_h,
    lse_b, lse_h, mask_b, mask_k, left, right, scale, softmax_scale, keep,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr,
    PACKED: tl.constexpr, DROP: tl.constexpr, DROPOUT: tl.constexpr, RESCUE: tl.constexpr,
):  # fmt: skip
    head_k = pid // n_tiles
    b = (head_k // HK).to(tl.int64)
    hk = (head_k % HK).to(tl.int64)
    n0 = pid % n_tiles * BN
    first_q = b * 0
    first_k = b * 0
    sequence = head_k // HK
    if PACKED:
        first_q = tl.load(cu_q + b).to(tl.int64)
        first_k = tl.load(cu_k + b).to(tl.int64)
        sq = (tl.load(cu_q + b + 1) - first_q).to(tl.int32)
        sk = (tl.load(cu_k + b + 1) - first_k).to(tl.int32)
        b = b * 0
    needed = n0 < sk
    if RESCUE:
        needed = needed & (tl.load(bad + 1) + tl.load(bad + 2 + head_k) > 0)
    if needed:
        t = tl.arange(0, BN)
        j = n0 + t
        c = tl.arange(0, DP)
        cv = tl.arange(0, DVP)
        here = first_k + n0
        k_t = rows_of(k + b * k_b + here * k_s + hk * k_h, t, k_s, c, sk - n0, D, DP, True)
        v_t = rows_of(v + b * v_b + here * v_s + hk * v_h, t, v_s, cv, sk - n0, DV, DVP, True)
        if RESCUE:
            k_t = tl.where(finite(k_t), k_t, 0.0)
            v_t = tl.where(finite(v_t), v_t, 0.0)
        members_t = k_t
        if DROP:
            members_t = rows_of(members_k + ((b * sk + here) * HK + hk) * D, t, HK * D, c, sk - n0, D, DP, True)
        key_seen = j < sk
        if MASK:
            key_seen = tl.load(key_mask + b * mask_b + j.to(tl.int64) * mask_k, mask=j < sk, other=0) != 0

        # Queries that see some key of the tile, [lo, hi), and all of them, [full_lo, full_hi).
        off = sk - sq
        lo = 0
        hi = sq
        if RIGHT:
            lo = tl.maximum(n0 - off - right, 0) // BM * BM
        if LEFT:
            hi = tl.minimum(sq, n0 + BN - off + left)
        full_lo = lo
        full_hi = lo
        if not (MASK or DROP or RESCUE):
            full_hi = sq
            if RIGHT:
                full_lo = tl.maximum(tl.cdiv(tl.maximum(n0 + BN - 1 - off - right, 0), BM) * BM, lo)
            if LEFT:
                full_hi = tl.minimum(sq, tl.maximum(n0 - off + left + 1, 0) // BM * BM)
        acc_k = tl.zeros((BN, DP), tl.float32)
        acc_v = tl.zeros((BN, DVP), tl.float32)
        for g in range(HQ // HK):
            h = hk * (HQ // HK) + g
            head = (sequence * HQ + h).to(tl.int32)
            q_h0 = q + b * q_b + first_q * q_s + h * q_h
            g_h0 = grad_out + b * g_b + first_q * g_s + h * g_h
            l_h0 = log_lse + b * lse_b + h * lse_h + first_q
            d_h0 = delta + b * lse_b + h * lse_h + first_q
            m_h0 = members_q
            if DROP:
                m_h0 = members_q + ((b * sq + first_q) * HQ + h) * D
            if RIGHT:
                acc_k, acc_v = _accumulate_keys(
                    acc_k, acc_v, k_t, v_t, members_t, q_h0, g_h0, m_h0, l_h0, d_h0, seed, j, key_seen, head, sq, sk,
                    q_s, g_s, HQ * D, left, right, scale, keep, lo, tl.minimum(full_lo, hi), D, DP, DV, DVP, BM,
                    LEFT, RIGHT, MASK, DROP, DROPOUT, RESCUE, True,
                )  # fmt: skip
            if not (MASK or DROP or RESCUE):
                acc_k, acc_v = _accumulate_keys(
                    acc_k, acc_v, k_t, v_t, members_t, q_h0, g_h0, m_h0, l_h0, d_h0, seed, j, key_seen, head, sq, sk,
                    q_s, g_s, HQ * D, left, right, scale, keep, full_lo, full_hi, D, DP, DV, DVP, BM,
                    LEFT, RIGHT, MASK, DROP, DROPOUT, RESCUE, False,
                )  # fmt: skip
            if LEFT or MASK or DROP or RESCUE:
                acc_k, acc_v = _accumulate_keys(
                    acc_k, acc_v, k_t, v_t, members_t, q_h0, g_h0, m_h0, l_h0, d_h0, seed, j, key_seen, head, sq, sk,
                    q_s, g_s, HQ * D, left, right, scale, keep, tl.maximum(full_lo, full_hi), hi, D, DP, DV, DVP, BM,
                    LEFT, RIGHT, MASK, DROP, DROPOUT, RESCUE, True,
                )  # fmt: skip
        rows = j[:, None] < sk
        at_k = dk + b * dk_b + here * dk_s + hk * dk_h + t[:, None] * dk_s + c[None, :]
        at_v = dv + b * dv_b + here * dv_s + hk * dv_h + t[:, None] * dv_s + cv[None, :]
        if RESCUE:
            broken_k = any_bad(tl.load(at_k, mask=rows & (c[None, :] < D), other=0.0), 1)
            broken_v = any_bad(tl.load(at_v, mask=rows & (cv[None, :] < DV), other=0.0), 1)
            rows = rows & (broken_k | broken_v)[:, None]
        tl.store(at_k, (acc_k * softmax_scale).to(dk.dtype.element_ty), mask=rows & (c[None, :] < D))
        tl.store(at_v, acc_v.to(dv.dtype.element_ty), mask=rows & (cv[None, :] < DV))


@triton.jit(do_not_specialize=[*SIZES, "softmax_scale"])
def _keys(
    work,
    q, k, v, grad_out, dk, dv, log_lse, delta, bad, members_q, members_k, key_mask, cu_q, cu_k, seed, sq, sk, n_tiles,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, g_b, g_s, g_h, dk_b, dk_s, dk_h, dv_b, dv_s, dv_h,
    lse_b, lse_h, mask_b, mask_k, left, right, scale, softmax_scale, keep,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr,
    PACKED: tl.constexpr, DROP: tl.constexpr, DROPOUT: tl.constexpr, RESCUE: tl.constexpr,
):  # fmt: skip
    if RESCUE:
        if tl.load(bad) != 0:
            for pid in tl.range(tl.program_id(0), work, tl.num_programs(0)):
                _keys_tile(
                    pid,
                    q, k, v, grad_out, dk, dv, log_lse, delta, bad, members_q, members_k, key_mask, cu_q, cu_k, seed,
                    sq, sk, n_tiles,
                    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, g_b, g_s, g_h, dk_b, dk_s, dk_h, dv_b, dv_s, dv_h,
                    lse_b, lse_h, mask_b, mask_k, left, right, scale, softmax_scale, keep,
                    HQ, HK, D, DP, DV, DVP,
                    BM, BN, LEFT, RIGHT, MASK,
                    PACKED, DROP, DROPOUT, RESCUE,
                )  # fmt: skip
    else:
        _keys_tile(
            tl.program_id(0),
            q, k, v, grad_out, dk, dv, log_lse, delta, bad, members_q, members_k, key_mask, cu_q, cu_k, seed,
            sq, sk, n_tiles,
            q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, g_b, g_s, g_h, dk_b, dk_s, dk_h, dv_b, dv_s, dv_h,
            lse_b, lse_h, mask_b, mask_k, left, right, scale, softmax_scale, keep,
            HQ, HK, D, DP, DV, DVP,
            BM, BN, LEFT, RIGHT, MASK,
            PACKED, DROP, DROPOUT, RESCUE,
        )  # fmt: skip


@triton.jit
def _accumulate_queries(
    dq, q_t, g_t, members_t, row_lse, row_delta, k, v, members_k, key_mask, seed, i, head, sq, sk,
    k_s, v_s, member_s, mask_k, left, right, scale, keep, lo, hi,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BN: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, MASK: tl.constexpr, DROP: tl.constexpr, DROPOUT: tl.constexpr, RESCUE: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Adds the keys [lo, hi) to dq of one tile of queries."""
    c = tl.arange(0, DP)
    cv = tl.arange(0, DVP)
    t = tl.arange(0, BN)
    for n0 in tl.range(lo, hi, BN):
        n0 = tl.multiple_of(n0, BN)
        j = n0 + t
        start = n0.to(tl.int64)
        k_t = rows_of(k + start * k_s, t, k_s, c, sk - n0, D, DP, EDGE)
        v_t = rows_of(v + start * v_s, t, v_s, cv, sk - n0, DV, DVP, EDGE)
        if RESCUE:
            k_t = tl.where(finite(k_t), k_t, 0.0)
            v_t = tl.where(finite(v_t), v_t, 0.0)
        s = tl.dot(q_t, tl.trans(k_t), input_precision="ieee")
        p = tl.exp2(s * scale - row_lse[:, None])
        dp = tl.dot(g_t, tl.trans(v_t), input_precision="ieee")
        if DROPOUT:
            dp = dropped(dp, seed, i[:, None], j[None, :], head, keep)
        ds = p * (dp - row_delta[:, None])
        if EDGE:
            seen = in_window(i[:, None], j[None, :], sq, sk, left, right, LEFT, RIGHT)
            if MASK:
                seen = seen & (tl.load(key_mask + j.to(tl.int64) * mask_k, mask=j < sk, other=0) != 0)[None, :]
            if DROP:
                m_t = rows_of(members_k + start * member_s, t, member_s, c, sk - n0, D, DP, True)
                seen = seen & (tl.dot(members_t, tl.trans(m_t)) > 0)
            ds = tl.where(seen, ds, 0.0)
        dq = tl.dot(ds.to(k_t.dtype), k_t, dq, input_precision="ieee")
    return dq


@triton.jit
def _queries_tile(
    pid,
    q, k, v, grad_out, dq, log_lse, delta, bad, members_q, members_k, key_mask, cu_q, cu_k, seed, sq, sk, n_tiles,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, g_b, g_s, g_h, dq_b, dq_s, dq_h,
    lse_b, lse_h, mask_b, mask_k, left, right, scale, softmax_scale, keep,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr,
    PACKED: tl.constexpr, DROP: tl.constexpr, DROPOUT: tl.constexpr, RESCUE: tl.constexpr,
):  # fmt: skip
    head = pid // n_tiles
    b = (head // HQ).to(tl.int64)
    h = (head % HQ).to(tl.int64)
    hk = h // (HQ // HK)
    m0 = (n_tiles - 1 - pid % n_tiles) * BM
    first_q = b * 0
    first_k = b * 0
    if PACKED:
        first_q = tl.load(cu_q + b).to(tl.int64)
        first_k = tl.load(cu_k + b).to(tl.int64)
        sq = (tl.load(cu_q + b + 1) - first_q).to(tl.int32)
        sk = (tl.load(cu_k + b + 1) - first_k).to(tl.int32)
        b = b * 0
    needed = m0 < sq
    if RESCUE:
        needed = needed & (tl.load(bad + 1) + tl.load(bad + 2 + head // HQ * HK + hk) > 0)
    if needed:
        t = tl.arange(0, BM)
        i = m0 + t
        c = tl.arange(0, DP)
        cv = tl.arange(0, DVP)
        here = first_q + m0
        q_t = rows_of(q + b * q_b + here * q_s + h * q_h, t, q_s, c, sq - m0, D, DP, True)
        g_t = rows_of(grad_out + b * g_b + here * g_s + h * g_h, t, g_s, cv, sq - m0, DV, DVP, True)
        at = b * lse_b + h * lse_h + here
        row_lse = tl.load(log_lse + at + t, mask=i < sq, other=float("inf"))
        row_delta = tl.load(delta + at + t, mask=i < sq, other=0.0)
        if RESCUE:
            q_t = tl.where(finite(q_t), q_t, 0.0)
        members_t = q_t
        if DROP:
            members_t = rows_of(members_q + ((b * sq + here) * HQ + h) * D, t, HQ * D, c, sq - m0, D, DP, True)
            members_k += ((b * sk + first_k) * HK + hk) * D
        k += b * k_b + first_k * k_s + hk * k_h
        v += b * v_b + first_k * v_s + hk * v_h
        if MASK:
            key_mask += b * mask_b
        acc = tl.zeros((BM, DP), tl.float32)
        lo, full_lo, full_hi, hi = key_tiles(m0, sq, sk, left, right, BM, BN, LEFT, RIGHT, MASK or DROP or RESCUE)
        if LEFT:
            acc = _accumulate_queries(
                acc, q_t, g_t, members_t, row_lse, row_delta, k, v, members_k, key_mask, seed, i, head, sq, sk,
                k_s, v_s, HK * D, mask_k, left, right, scale, keep, lo, tl.minimum(full_lo, hi), D, DP, DV, DVP, BN,
                LEFT, RIGHT, MASK, DROP, DROPOUT, RESCUE, True,
            )  # fmt: skip
        if not (MASK or DROP or RESCUE):
            acc = _accumulate_queries(
                acc, q_t, g_t, members_t, row_lse, row_delta, k, v, members_k, key_mask, seed, i, head, sq, sk,
                k_s, v_s, HK * D, mask_k, left, right, scale, keep, full_lo, full_hi, D, DP, DV, DVP, BN,
                LEFT, RIGHT, MASK, DROP, DROPOUT, RESCUE, False,
            )  # fmt: skip
        acc = _accumulate_queries(
            acc, q_t, g_t, members_t, row_lse, row_delta, k, v, members_k, key_mask, seed, i, head, sq, sk,
            k_s, v_s, HK * D, mask_k, left, right, scale, keep, tl.maximum(full_lo, full_hi), hi, D, DP, DV, DVP, BN,
            LEFT, RIGHT, MASK, DROP, DROPOUT, RESCUE, True,
        )  # fmt: skip
        at_q = dq + b * dq_b + here * dq_s + h * dq_h + t[:, None] * dq_s + c[None, :]
        mask = (i[:, None] < sq) & (c[None, :] < D)
        if RESCUE:
            mask = mask & any_bad(tl.load(at_q, mask=mask, other=0.0), 1)[:, None]
        acc = tl.where((row_lse == float("inf"))[:, None], 0.0, acc)
        tl.store(at_q, (acc * softmax_scale).to(dq.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*SIZES, "softmax_scale"])
def _queries(
    work,
    q, k, v, grad_out, dq, log_lse, delta, bad, members_q, members_k, key_mask, cu_q, cu_k, seed, sq, sk, n_tiles,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, g_b, g_s, g_h, dq_b, dq_s, dq_h,
    lse_b, lse_h, mask_b, mask_k, left, right, scale, softmax_scale, keep,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr,
    PACKED: tl.constexpr, DROP: tl.constexpr, DROPOUT: tl.constexpr, RESCUE: tl.constexpr,
):  # fmt: skip
    if RESCUE:
        if tl.load(bad) != 0:
            for pid in tl.range(tl.program_id(0), work, tl.num_programs(0)):
                _queries_tile(
                    pid,
                    q, k, v, grad_out, dq, log_lse, delta, bad, members_q, members_k, key_mask, cu_q, cu_k, seed,
                    sq, sk, n_tiles,
                    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, g_b, g_s, g_h, dq_b, dq_s, dq_h,
                    lse_b, lse_h, mask_b, mask_k, left, right, scale, softmax_scale, keep,
                    HQ, HK, D, DP, DV, DVP,
                    BM, BN, LEFT, RIGHT, MASK,
                    PACKED, DROP, DROPOUT, RESCUE,
                )  # fmt: skip
    else:
        _queries_tile(
            tl.program_id(0),
            q, k, v, grad_out, dq, log_lse, delta, bad, members_q, members_k, key_mask, cu_q, cu_k, seed,
            sq, sk, n_tiles,
            q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, g_b, g_s, g_h, dq_b, dq_s, dq_h,
            lse_b, lse_h, mask_b, mask_k, left, right, scale, softmax_scale, keep,
            HQ, HK, D, DP, DV, DVP,
            BM, BN, LEFT, RIGHT, MASK,
            PACKED, DROP, DROPOUT, RESCUE,
        )  # fmt: skip


# --------------------------------------------------------------------------------------------- launcher

# As in triton_forward; a program of _keys owns rows of keys.
_KEYS = {
    (64, 2, 160 * 1024): Tiles(64, 128, 8, 3),
    (64, 2, 0): Tiles(32, 128, 8, 2),
    (128, 2, 160 * 1024): Tiles(32, 128, 8, 2),
    (128, 2, 0): Tiles(16, 128, 8, 2),
    (256, 2, 160 * 1024): Tiles(64, 32, 8, 2),
    (256, 2, 0): Tiles(32, 32, 8, 1),
    (64, 4, 0): Tiles(32, 32, 8, 1),
    (128, 4, 0): Tiles(16, 32, 8, 1),
    (256, 4, 0): Tiles(16, 16, 8, 1),
}
_QUERIES = {
    (64, 2, 0): Tiles(128, 64, 8, 3),
    (128, 2, 160 * 1024): Tiles(128, 64, 8, 2),
    (128, 2, 0): Tiles(64, 32, 4, 2),
    (256, 2, 200 * 1024): Tiles(128, 32, 8, 2),
    (256, 2, 0): Tiles(32, 32, 8, 1),
    (64, 4, 0): Tiles(32, 32, 8, 1),
    (128, 4, 0): Tiles(32, 16, 8, 1),
    (256, 4, 0): Tiles(16, 16, 8, 1),
}
_KEYS_SMALL = {
    (64, 2, 0): Tiles(32, 64, 4, 1),
    (128, 2, 0): Tiles(32, 32, 4, 1),
    (256, 2, 0): Tiles(16, 32, 8, 1),
    (64, 4, 0): Tiles(16, 32, 8, 1),
    (128, 4, 0): Tiles(16, 16, 8, 1),
    (256, 4, 0): Tiles(16, 16, 8, 1),
}
_QUERIES_SMALL = {
    (64, 2, 0): Tiles(64, 32, 4, 1),
    (128, 2, 0): Tiles(64, 32, 4, 1),
    (256, 2, 0): Tiles(32, 16, 8, 1),
    (64, 4, 0): Tiles(32, 16, 8, 1),
    (128, 4, 0): Tiles(16, 16, 8, 1),
    (256, 4, 0): Tiles(16, 16, 8, 1),
}


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bad: Tensor,
    options: Options, *, tiles: tuple[Tiles, Tiles] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv of `triton_forward.forward`; grad_lse (b, hq, sq) or None."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    arguments = grad_out, grad_lse, q, k, v, out, lse, bad, dq, dk, dv, options
    _run(*arguments, tiles=tiles, rescuing=False)
    rescue(*arguments)
    return dq, dk, dv


def rescue(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bad: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, options: Options,
) -> None:  # fmt: skip
    """Recompute, in place, what is not finite in the heads marked in ``bad``; three empty launches if none is."""
    _run(grad_out, grad_lse, q, k, v, out, lse, bad, dq, dk, dv, options, tiles=None, rescuing=True)


def _run(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bad: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, options: Options, *, tiles: tuple[Tiles, Tiles] | None, rescuing: bool,
) -> None:  # fmt: skip
    q, k, v, out, grad_out = (with_unit_stride(x) for x in (q, k, v, out, grad_out))
    arguments = common_arguments(q, k, v, options)
    width = max(arguments["DP"], arguments["DVP"])
    if tiles is None:
        small = rescuing or arguments["DROP"] or arguments["DROPOUT"]
        tables = (_KEYS_SMALL, _QUERIES_SMALL) if small else (_KEYS, _QUERIES)
        shared = shared_memory(q.device)
        tiles = pick(tables[0], width, q.element_size(), shared), pick(tables[1], width, q.element_size(), shared)
    batch = q.shape[0] if options.cu_q is None else options.cu_q.shape[0] - 1
    packed = options.cu_q is not None
    max_q, max_k = (options.max_q, options.max_k) if packed else (q.shape[1], k.shape[1])
    lse = lse.contiguous()
    delta, log_lse = torch.empty_like(lse), torch.empty_like(lse)
    gradients = {"grad_out": grad_out, "g_b": grad_out.stride(0), "g_s": grad_out.stride(1), "g_h": grad_out.stride(2)}
    launch(
        _delta, q, min(-(-lse.numel() // 32), RESCUERS if rescuing else 2**16), Tiles(32, arguments["DVP"], 4, 1),
        out=out, lse=lse, grad_lse=lse if grad_lse is None else grad_lse.contiguous(), delta=delta, log_lse=log_lse,
        bad=bad, rows=lse.numel(), seqlen=q.shape[1], o_b=out.stride(0), o_s=out.stride(1), o_h=out.stride(2),
        HQ=q.shape[2], DV=arguments["DV"], GRAD_LSE=grad_lse is not None, RESCUE=rescuing, **gradients,
    )  # fmt: skip
    arguments |= gradients | {
        "log_lse": log_lse, "delta": delta, "bad": bad, "lse_b": lse.stride(0), "lse_h": lse.stride(1),
        "scale": options.scale * LOG2E, "softmax_scale": options.scale, "RESCUE": rescuing,
    }  # fmt: skip
    keys, queries = tiles
    most = RESCUERS if rescuing else 2**31
    n_tiles = -(-max_k // keys.n)
    programs = n_tiles * batch * k.shape[2]
    launch(
        _keys, q, min(programs, most), keys, work=programs, n_tiles=n_tiles, dk=dk, dv=dv,
        dk_b=dk.stride(0), dk_s=dk.stride(1), dk_h=dk.stride(2), dv_b=dv.stride(0), dv_s=dv.stride(1),
        dv_h=dv.stride(2), **arguments,
    )  # fmt: skip
    n_tiles = -(-max_q // queries.m)
    programs = n_tiles * batch * q.shape[2]
    launch(
        _queries, q, min(programs, most), queries, work=programs, n_tiles=n_tiles, dq=dq,
        dq_b=dq.stride(0), dq_s=dq.stride(1), dq_h=dq.stride(2), **arguments,
    )  # fmt: skip

"""Forward attention over expanded rows in Triton: out and lse, one pass over the keys, nothing of size n x n.

For the calls that cuDNN does not take (windows, key padding, packed sequences, dropout, nonoverlap="drop", fp32), and
to repair rows that a non-finite value spoiled (RESCUE). A program owns BM queries of a head and walks the visible keys
in tiles of BN: masked tiles at the edges of the window, whole tiles without a mask between them.

Scores are kept in units of log 2, so that exp2 serves. Sums and the output are fp32.
"""

import functools
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "the Triton attention kernels need Triton, which comes with CUDA builds of PyTorch on Linux "
        "(or: pip install 'flash-sfa[triton]')"
    ) from error

LOG2E = 1.4426950408889634
# Programs that look for something to repair: few, because there is nothing as a rule.
RESCUERS = 512
# Sizes that follow the batch or the sequence must not lead to new kernels.
SIZES = ["sq", "sk", "n_tiles", "work", "left", "right", "lse_b", "lse_h", "scale", "keep", "mask_b", "mask_k"]


class Options(NamedTuple):
    """What a call sees and how it weighs, shared by forward and backward.

    left, right: window, -1 = unlimited. key_mask (b or 1, 1, 1, sk or 1) bool. cu_q, cu_k: packed sequences, then the
    batch dimension of q, k, v is 1 and max_q, max_k bound their lengths. members_q, members_k: rows like q and k that
    are not zero where a feature is kept; given, a pair without a common one weighs nothing. seed: int64 (1,).
    """

    left: int
    right: int
    scale: float
    key_mask: Tensor | None = None
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None
    max_q: int = 0
    max_k: int = 0
    members_q: Tensor | None = None
    members_k: Tensor | None = None
    dropout_p: float = 0.0
    seed: Tensor | None = None


@triton.jit
def rows_of(x, rows, stride, columns, count, D: tl.constexpr, DP: tl.constexpr, CHECK: tl.constexpr):
    """Tile (rows, columns) of x; rows from ``count`` on read as zero if CHECK."""
    at = x + rows[:, None] * stride + columns[None, :]
    if CHECK and DP != D:
        return tl.load(at, mask=(rows[:, None] < count) & (columns[None, :] < D), other=0.0)
    elif CHECK:
        return tl.load(at, mask=rows[:, None] < count, other=0.0)
    elif DP != D:
        return tl.load(at, mask=columns[None, :] < D, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def finite(x):
    return tl.abs(x.to(tl.float32)) < float("inf")


@triton.jit
def any_bad(x, axis: tl.constexpr):
    return tl.max(tl.where(finite(x), 0, 1), axis) > 0


@triton.jit
def in_window(i, j, sq, sk, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Whether key j exists and query i sees it; i and j broadcast."""
    seen = (j < sk) & (i < sq)
    if LEFT:
        seen = seen & (j >= i + (sk - sq) - left)
    if RIGHT:
        seen = seen & (j <= i + (sk - sq) + right)
    return seen


@triton.jit
def dropped(p, seed, i, j, head, keep):
    """p / keep where a random number of (seed, head, i, j) is below keep, else 0."""
    zero = (i + j) * 0
    bits, _, _, _ = tl.philox(tl.load(seed), zero + i, zero + j, zero + head, zero)
    return tl.where(tl.uint_to_uniform_float(bits) < keep, p / keep, 0.0)


@triton.jit
def key_tiles(
    m0, sq, sk, left, right, BM: tl.constexpr, BN: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    ALL_MASKED: tl.constexpr,
):  # fmt: skip
    """Keys [lo, hi) that some of the queries m0 to m0 + BM - 1 see; [full_lo, full_hi) is seen by all of them."""
    off = sk - sq
    lo = 0
    hi = sk
    if LEFT:
        lo = tl.maximum(m0 + off - left, 0) // BN * BN
    if RIGHT:
        hi = tl.minimum(sk, m0 + BM + off + right)
    if ALL_MASKED:
        return lo, lo, lo, hi
    else:
        full_lo = lo
        full_hi = sk // BN * BN
        if LEFT:
            full_lo = tl.maximum(tl.cdiv(tl.maximum(m0 + BM - 1 + off - left, 0), BN) * BN, lo)
        if RIGHT:
            full_hi = tl.minimum(full_hi, tl.maximum(m0 + off + right + 1, 0) // BN * BN)
        return lo, full_lo, full_hi, hi


@triton.jit
def _attend(
    acc, total, top, bad_lse, bad_out, q, members_q, k, v, members_k, key_mask, seed, i, head, sq, sk,
    k_s, v_s, member_s, mask_k, left, right, scale, keep, lo, hi,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BN: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, MASK: tl.constexpr, DROP: tl.constexpr, DROPOUT: tl.constexpr, SIGNED: tl.constexpr,
    RESCUE: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds the keys [lo, hi) to the running softmax; EDGE: some pairs of these tiles are not visible."""
    c = tl.arange(0, DP)
    cv = tl.arange(0, DVP)
    for n0 in tl.range(lo, hi, BN):
        n0 = tl.multiple_of(n0, BN)
        t = tl.arange(0, BN)
        j = n0 + t
        start = n0.to(tl.int64)
        k_t = rows_of(k + start * k_s, t, k_s, c, sk - n0, D, DP, EDGE)
        if RESCUE:
            bad_k = any_bad(k_t, 1)
            k_t = tl.where(finite(k_t), k_t, 0.0)
        s = tl.dot(q, tl.trans(k_t), input_precision="ieee")
        factor = scale
        if SIGNED:  # the maximum is taken before scaling only where the scale is positive
            s = s * scale
            factor = 1.0
        if EDGE:
            seen = in_window(i[:, None], j[None, :], sq, sk, left, right, LEFT, RIGHT)
            if MASK:
                seen = seen & (tl.load(key_mask + j.to(tl.int64) * mask_k, mask=j < sk, other=0) != 0)[None, :]
            if DROP:
                m_t = rows_of(members_k + start * member_s, t, member_s, c, sk - n0, D, DP, True)
                seen = seen & (tl.dot(members_q, tl.trans(m_t)) > 0)
            s = tl.where(seen, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * factor)
        shift = new_top
        if EDGE:
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s * factor - shift[:, None])
        alpha = tl.exp2(top - shift)
        total = total * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        top = new_top
        if DROPOUT:
            p = dropped(p, seed, i[:, None], j[None, :], head, keep)
        v_t = rows_of(v + start * v_s, t, v_s, cv, sk - n0, DV, DVP, EDGE)
        if RESCUE:
            bad_v = any_bad(v_t, 1)
            v_t = tl.where(finite(v_t), v_t, 0.0)
            bad_lse = bad_lse | tl.max(tl.where(seen & bad_k[None, :], 1, 0), 1)
            bad_out = bad_out | tl.max(tl.where(seen & bad_v[None, :], 1, 0), 1)
        acc = tl.dot(p.to(v_t.dtype), v_t, acc, input_precision="ieee")
    return acc, total, top, bad_lse, bad_out


@triton.jit(do_not_specialize=["count_a", "count_b"])
def _scan(values_a, values_b, bad, count_a, count_b, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Marks bad[0] and bad[1] if some of two lists of rows of WIDTH values is not finite."""
    programs_a = tl.cdiv(count_a, BM)
    pid = tl.program_id(0)
    second = pid >= programs_a
    row = (pid - tl.where(second, programs_a, 0)).to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    at = row * WIDTH + tl.arange(0, WIDTH)[None, :]
    a = tl.load(values_a + at, mask=(row < count_a) & (second == 0), other=0.0)
    b = tl.load(values_b + at, mask=(row < count_b) & second, other=0.0)
    if tl.max(tl.max(tl.where(finite(a) & finite(b), 0, 1), 1), 0) > 0:
        tl.store(bad, 1)
        tl.store(bad + 1, 1)


@triton.jit(do_not_specialize=["first", "count", "n_tiles"])
def _scan_rows(
    out, bad, first, count, n_tiles, o_b, o_s, o_h,
    HQ: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Marks bad[0] if one of the ``count`` rows from ``first`` on, of any sequence and head, is not finite."""
    head = tl.program_id(0) // n_tiles
    row = tl.program_id(0) % n_tiles * BM
    start = (head // HQ).to(tl.int64) * o_b + (first + row).to(tl.int64) * o_s + (head % HQ).to(tl.int64) * o_h
    tile = rows_of(out + start, tl.arange(0, BM), o_s, tl.arange(0, BN), count - row, DV, BN, True)
    if tl.max(tl.max(tl.where(finite(tile), 0, 1), 1), 0) > 0:
        tl.store(bad, 1)


@triton.jit
def _forward_tile(
    pid, q, k, v, out, lse, bad, members_q, members_k, key_mask, cu_q, cu_k, seed, sq, sk, n_tiles,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h, lse_b, lse_h, mask_b, mask_k,
    left, right, scale, keep,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr,
    PACKED: tl.constexpr, DROP: tl.constexpr, DROPOUT: tl.constexpr, SIGNED: tl.constexpr, RESCUE: tl.constexpr,
):  # fmt: skip
    head = pid // n_tiles
    b = (head // HQ).to(tl.int64)
    h = (head % HQ).to(tl.int64)
    hk = h // (HQ // HK)
    # Under a causal mask the last tiles are the longest: they start first.
    m0 = (n_tiles - 1 - pid % n_tiles) * BM
    first_q = b * 0
    first_k = b * 0
    if PACKED:
        first_q = tl.load(cu_q + b).to(tl.int64)
        first_k = tl.load(cu_k + b).to(tl.int64)
        sq = (tl.load(cu_q + b + 1) - first_q).to(tl.int32)
        sk = (tl.load(cu_k + b + 1) - first_k).to(tl.int32)
        b = b * 0
    t = tl.arange(0, BM)
    i = m0 + t
    c = tl.arange(0, DP)
    cv = tl.arange(0, DVP)
    here = first_q + m0
    out_0 = out + b * o_b + here * o_s + h * o_h
    inside = i < sq
    write = inside
    needed = m0 < sq
    if RESCUE:
        written = rows_of(out_0, t, o_s, cv, sq - m0, DV, DVP, True)
        write = inside & any_bad(written, 1)
        needed = needed & ((tl.max(write.to(tl.int32), 0) > 0) | (tl.load(bad + 1) > 0))
    if needed:
        q_t = rows_of(q + b * q_b + here * q_s + h * q_h, t, q_s, c, sq - m0, D, DP, True)
        k_h0 = k + b * k_b + first_k * k_s + hk * k_h
        v_h0 = v + b * v_b + first_k * v_s + hk * v_h
        mask_0 = key_mask
        if MASK:
            mask_0 = key_mask + b * mask_b
        members_t = q_t
        members_h0 = members_k
        if DROP:
            members_0 = members_q + ((b * sq + here) * HQ + h) * D
            members_h0 = members_k + ((b * sk + first_k) * HK + hk) * D
            members_t = rows_of(members_0, t, HQ * D, c, sq - m0, D, DP, True)
        bad_lse = tl.zeros((BM,), tl.int32)
        bad_out = tl.zeros((BM,), tl.int32)
        if RESCUE:
            tl.store(bad + 2 + head // HQ * HK + hk, 1)
            bad_lse = any_bad(q_t, 1).to(tl.int32)
            q_t = tl.where(finite(q_t), q_t, 0.0)

        acc = tl.zeros((BM, DVP), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        top = tl.full((BM,), float("-inf"), tl.float32)
        lo, full_lo, full_hi, hi = key_tiles(m0, sq, sk, left, right, BM, BN, LEFT, RIGHT, MASK or DROP or RESCUE)
        if LEFT:
            acc, total, top, bad_lse, bad_out = _attend(
                acc, total, top, bad_lse, bad_out, q_t, members_t, k_h0, v_h0, members_h0, mask_0, seed, i,
                head, sq, sk, k_s, v_s, HK * D, mask_k, left, right, scale, keep, lo, tl.minimum(full_lo, hi),
                D, DP, DV, DVP, BN, LEFT, RIGHT, MASK, DROP, DROPOUT, SIGNED, RESCUE, True,
            )  # fmt: skip
        if not (MASK or DROP or RESCUE):
            acc, total, top, bad_lse, bad_out = _attend(
                acc, total, top, bad_lse, bad_out, q_t, members_t, k_h0, v_h0, members_h0, mask_0, seed, i,
                head, sq, sk, k_s, v_s, HK * D, mask_k, left, right, scale, keep, full_lo, full_hi,
                D, DP, DV, DVP, BN, LEFT, RIGHT, MASK, DROP, DROPOUT, SIGNED, RESCUE, False,
            )  # fmt: skip
        acc, total, top, bad_lse, bad_out = _attend(
            acc, total, top, bad_lse, bad_out, q_t, members_t, k_h0, v_h0, members_h0, mask_0, seed, i,
            head, sq, sk, k_s, v_s, HK * D, mask_k, left, right, scale, keep, tl.maximum(full_lo, full_hi), hi,
            D, DP, DV, DVP, BN, LEFT, RIGHT, MASK, DROP, DROPOUT, SIGNED, RESCUE, True,
        )  # fmt: skip

        empty = total == 0.0
        result = acc / tl.where(empty, 1.0, total)[:, None]
        row_lse = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) / 1.4426950408889634)
        if RESCUE:
            nan = float("nan")
            result = tl.where(((bad_lse | bad_out) > 0)[:, None] & ~empty[:, None], nan, result)
            row_lse = tl.where((bad_lse > 0) & ~empty, nan, row_lse)
            write = write | (inside & (bad_lse > 0) & ~empty)
        at = out_0 + t[:, None] * o_s + cv[None, :]
        tl.store(at, result.to(out.dtype.element_ty), mask=write[:, None] & (cv[None, :] < DV))
        tl.store(lse + b * lse_b + h * lse_h + here + t, row_lse, mask=write)


@triton.jit(do_not_specialize=SIZES)
def _forward(
    q, k, v, out, lse, bad, members_q, members_k, key_mask, cu_q, cu_k, seed, sq, sk, n_tiles, work,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h, lse_b, lse_h, mask_b, mask_k,
    left, right, scale, keep,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr,
    PACKED: tl.constexpr, DROP: tl.constexpr, DROPOUT: tl.constexpr, SIGNED: tl.constexpr, RESCUE: tl.constexpr,
):  # fmt: skip
    if RESCUE:
        if tl.load(bad) != 0:
            for pid in tl.range(tl.program_id(0), work, tl.num_programs(0)):
                _forward_tile(
                    pid, q, k, v, out, lse, bad, members_q, members_k, key_mask, cu_q, cu_k, seed, sq, sk, n_tiles,
                    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h, lse_b, lse_h, mask_b, mask_k,
                    left, right, scale, keep,
                    HQ, HK, D, DP, DV, DVP, BM, BN, LEFT, RIGHT, MASK, PACKED, DROP, DROPOUT, SIGNED, RESCUE,
                )  # fmt: skip
    else:
        _forward_tile(
            tl.program_id(0), q, k, v, out, lse, bad, members_q, members_k, key_mask, cu_q, cu_k, seed, sq, sk, n_tiles,
            q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h, lse_b, lse_h, mask_b, mask_k,
            left, right, scale, keep,
            HQ, HK, D, DP, DV, DVP, BM, BN, LEFT, RIGHT, MASK, PACKED, DROP, DROPOUT, SIGNED, RESCUE,
        )  # fmt: skip


# --------------------------------------------------------------------------------------------- launcher


class Tiles(NamedTuple):
    """Queries and keys of a tile, warps, pipeline stages."""

    m: int
    n: int
    warps: int
    stages: int


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may use."""
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


# (widest padded head dim, bytes an element, shared memory from) -> tiles; the first that fits. A program's own rows
# (here queries) are fewer than 64 or at least 16 a warp: with 64 rows and 8 warps Triton 3.6 overruns shared memory.
_FORWARD = {
    (64, 2, 0): Tiles(128, 64, 8, 3),
    (128, 2, 160 * 1024): Tiles(128, 64, 8, 3),
    (128, 2, 0): Tiles(64, 64, 4, 2),
    (256, 2, 192 * 1024): Tiles(128, 64, 8, 2),
    (256, 2, 0): Tiles(64, 32, 4, 2),
    (64, 4, 0): Tiles(64, 32, 8, 1),
    (128, 4, 0): Tiles(32, 32, 8, 1),
    (256, 4, 0): Tiles(16, 32, 8, 1),
}
# With RESCUE, DROP or DROPOUT a program holds more.
_FORWARD_SMALL = {
    (64, 2, 0): Tiles(64, 32, 4, 1),
    (128, 2, 0): Tiles(32, 32, 4, 1),
    (256, 2, 0): Tiles(32, 32, 8, 1),
    (64, 4, 0): Tiles(32, 32, 8, 1),
    (128, 4, 0): Tiles(32, 16, 8, 1),
    (256, 4, 0): Tiles(16, 16, 8, 1),
}


def pick(table: dict[tuple[int, int, int], Tiles], width: int, itemsize: int, shared: int) -> Tiles:
    return next(tiles for (w, size, need), tiles in table.items() if width <= w and itemsize == size and shared >= need)


def with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def common_arguments(q: Tensor, k: Tensor, v: Tensor, options: Options) -> dict[str, Any]:
    """Arguments that the forward and backward kernels share."""
    sq, sk = q.shape[1], k.shape[1]
    mask, packed = options.key_mask, options.cu_q is not None
    left = -1 if options.left < 0 or (not packed and options.left >= sk - 1) else min(options.left, 2**30)
    right = -1 if options.right < 0 or (not packed and options.right >= sq - 1) else min(options.right, 2**30)
    if mask is not None:
        mask = mask.reshape(*[1] * (4 - mask.dim()), *mask.shape).expand(q.shape[0], 1, 1, sk).view(torch.uint8)
    d, dv = q.shape[-1], v.shape[-1]
    return {
        "q": q, "k": k, "v": v,
        "members_q": q if options.members_q is None else options.members_q,
        "members_k": k if options.members_k is None else options.members_k,
        "key_mask": q if mask is None else mask,
        "cu_q": q if options.cu_q is None else options.cu_q,
        "cu_k": k if options.cu_k is None else options.cu_k,
        "seed": q if options.seed is None else options.seed,
        "sq": sq, "sk": sk,
        "q_b": q.stride(0), "q_s": q.stride(1), "q_h": q.stride(2),
        "k_b": k.stride(0), "k_s": k.stride(1), "k_h": k.stride(2),
        "v_b": v.stride(0), "v_s": v.stride(1), "v_h": v.stride(2),
        "mask_b": 0 if mask is None else mask.stride(0), "mask_k": 0 if mask is None else mask.stride(3),
        "left": left, "right": right, "keep": 1.0 - options.dropout_p,
        "HQ": q.shape[2], "HK": k.shape[2], "D": d, "DP": max(next_power_of_2(d), 16), "DV": dv,
        "DVP": max(next_power_of_2(dv), 16), "LEFT": left >= 0, "RIGHT": right >= 0,
        "MASK": mask is not None, "PACKED": packed, "DROP": options.members_q is not None,
        "DROPOUT": options.dropout_p > 0.0,
    }  # fmt: skip


def launch(kernel: Any, x: Tensor, programs: int, tiles: Tiles, **arguments: Any) -> None:
    """Run a kernel on the device of x."""
    if programs == 0:
        return
    with torch.cuda.device_of(x):
        kernel[(programs,)](BM=tiles.m, BN=tiles.n, num_warps=tiles.warps, num_stages=tiles.stages, **arguments)


def scan(device: torch.device, q: list[Tensor], k: list[Tensor], heads: int) -> Tensor:
    """Marks of non-finite values, int32 (2 + heads,): anywhere; in q or k; in each key head of each sequence.

    q and k are the parts of a code or dense rows: a code keeps what is not finite, so its few values tell.
    """
    bad = torch.zeros(2 + heads, dtype=torch.int32, device=device)
    for pair in itertools.zip_longest(q, k):
        a, b = (bad[:0] if x is None else x.detach().reshape(-1) for x in pair)
        width = 8 if a.numel() % 8 == 0 and b.numel() % 8 == 0 else 1
        counts = {"count_a": a.numel() // width, "count_b": b.numel() // width}
        a, b = (a if a.numel() else b), (b if b.numel() else a)
        programs = sum(-(-count // 512) for count in counts.values())
        launch(_scan, a, programs, Tiles(512, 1, 4, 1), values_a=a, values_b=b, bad=bad, WIDTH=width, **counts)
    return bad


def forward(
    q: Tensor, k: Tensor, v: Tensor, bad: Tensor, options: Options, *, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """q (b, sq, hq, d), k (b, sk, hkv, d), v (b, sk, hkv, dv), any strides -> out, lse (b, hq, sq); adds to ``bad``."""
    out = v.new_empty(*q.shape[:3], v.shape[-1])
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    _run(q, k, v, out, lse, bad, options, tiles, False)
    rescue(q, k, v, out, lse, bad, options, first=0)
    return out, lse


def rescue(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bad: Tensor, options: Options, *, first: int
) -> None:
    """Recompute, in place, the rows of out that are not finite or see such a key: only what a row sees spoils it.

    A kernel multiplies an invisible v by probability 0, and 0 * nan is nan. Whether there is anything to do shows in
    ``bad`` and in the rows of out from ``first`` on: 0, or the last row where that sees every key.
    """
    count, tile = q.shape[1] - first, 16 if q.shape[1] - first < 64 else 64
    n_tiles, dv = -(-count // tile), out.shape[-1]
    launch(
        _scan_rows, q, n_tiles * out.shape[0] * out.shape[2], Tiles(tile, max(next_power_of_2(dv), 16), 4, 1),
        out=out, bad=bad, first=first, count=count, n_tiles=n_tiles, HQ=out.shape[2], DV=dv,
        o_b=out.stride(0), o_s=out.stride(1), o_h=out.stride(2),
    )  # fmt: skip
    _run(q, k, v, out, lse, bad, options, None, True)


def _run(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bad: Tensor, options: Options, tiles: Tiles | None,
    rescuing: bool,
) -> None:  # fmt: skip
    q, k, v = with_unit_stride(q), with_unit_stride(k), with_unit_stride(v)
    arguments = common_arguments(q, k, v, options)
    width = max(arguments["DP"], arguments["DVP"])
    if tiles is None:
        small = rescuing or arguments["DROP"] or arguments["DROPOUT"]
        tiles = pick(_FORWARD_SMALL if small else _FORWARD, width, q.element_size(), shared_memory(q.device))
    batch = q.shape[0] if options.cu_q is None else options.cu_q.shape[0] - 1
    n_tiles = -(-(options.max_q if options.cu_q is not None else q.shape[1]) // tiles.m)
    programs = n_tiles * batch * q.shape[2]
    launch(
        _forward, q, min(programs, RESCUERS) if rescuing else programs, tiles, work=programs,
        out=out, lse=lse, bad=bad, n_tiles=n_tiles, o_b=out.stride(0), o_s=out.stride(1), o_h=out.stride(2),
        lse_b=lse.stride(0), lse_h=lse.stride(1), scale=options.scale * LOG2E, SIGNED=options.scale <= 0.0,
        RESCUE=rescuing, **arguments,
    )  # fmt: skip

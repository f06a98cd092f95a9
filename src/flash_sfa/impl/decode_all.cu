// Attention of a few query tokens over the paged cache where (nearly) every V row is read anyway: every visible row is.
//
// sfa_decode_all: spans, blocks of 128 tokens and query rows are those of decode.cu. A warp scores a block, a lane four
//   tokens, and multiplies V by the weights on tensor cores, 16 tokens at a time:
//     o^T (16 columns of V x 8 query rows) += V^T (16 x 16 tokens) w^T (16 tokens x 8),
//   a weight as the sum of two 16-bit numbers. V comes through a ring of UNROLL such pieces, filled by asynchronous
//   copies that depend on the length and the tables only; the next block's codes come along.
// sfa_combine is the one of decode.cu, and so is what the launcher sets.
//
// 8-bit V is multiplied in fp16, which holds it exactly, the weight times the row's scale. The reference m of a row is
// not its maximum but within [START - LIMIT, START] of that of score + log2(scale): weights stay below 2^LIMIT.

#define SFA_WITHOUT_DECODE
#include "decode.cu"

#ifndef SFA_HOST
extern __shared__ __align__(128) char shared_memory[];

// Four 8 x 8 matrices of 16 bits, transposed; lane i brings the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(const char* from, u32 (&x)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"((u32)__cvta_generic_to_shared(from)) : "memory");
}

// c (16 x 8) += a (16 x 16) b (16 x 8).
template <bool HALF>
__device__ __forceinline__ void multiply_add(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  if constexpr (HALF) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// Two numbers in 16 bits each.
template <bool HALF>
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 y;
  if constexpr (HALF) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  }
  return y;
}

__device__ __forceinline__ u32 add_halves(u32 x, u32 y) {
  asm("add.rn.f16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
  return x;
}

__device__ __forceinline__ float log2_of(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

constexpr bool BYTES = VB == 1, HALF = SFA_V != 0;
constexpr int TOKENS = 16, PARTS = BLOCK / TOKENS;                       // of a multiplication; such parts of a block
constexpr int ROW_BYTES = DV * VB, PIECES = ROW_BYTES / 16, PART_BYTES = TOKENS * ROW_BYTES;
constexpr int COPIES = PART_BYTES / 512, TILES = DV / 16;                // 16 bytes a lane; columns of V
constexpr float START = HALF ? 10.0f : 0.0f, LIMIT = START + 5.0f;
constexpr float LEAST_SCALE = -80.0f;                                    // log2; V below is lost beside its weight
constexpr float V_UNIT = SFA_V == 4 ? 256.0f : 1.0f;

constexpr int DENSE_AT = BLOCK * W * (CB + IB), CODE_BYTES = AHEAD ? (DENSE_AT + BLOCK * R * CB + 15) / 16 * 16 : 0;
constexpr int WEIGHT_STRIDE = ROWS * 64 + (ROWS > 1 ? 64 : 0);           // so that lanes write to all banks
constexpr int RING_BYTES = max_of(UNROLL * PART_BYTES, ROWS * DV * 4);   // at the end a warp's sums
constexpr int WARP_BYTES = (RING_BYTES + CODE_BYTES + PARTS * WEIGHT_STRIDE + 127) / 128 * 128;
constexpr int ALWAYS_AT = D * ROWS * 4, WARPS_AT = (ALWAYS_AT + R * ROWS * 4 + 127) / 128 * 128;
constexpr int MERGED_AT = WARPS_AT + WARPS * WARP_BYTES;
constexpr int ALL_BYTES = MERGED_AT + (8 * WARPS + 12) * ROWS;           // the launcher computes the same
static_assert(DV % 64 == 0 && PAGE % TOKENS == 0 && VB <= 2 && CB == 2 && ROWS <= 8 && UNROLL <= PARTS);

// The 8 rows of a matrix, tokens 0 to 7 or 8 to 15 of one piece, lie in different banks. PAIRS of pieces change places.
constexpr int PAIRS = PIECES % 8 == 0 ? 4 : 2;
__device__ __forceinline__ int swizzled(int token, int piece) {
  return piece ^ (PAIRS == 4 ? token & 7 : token >> 1 & 3);
}

// Of two tokens' bytes a0 a1 b0 b1 the 16-bit numbers a0 b0 (odd: a1 b1), in units of V_UNIT.
template <bool ODD>
__device__ __forceinline__ u32 widen(u32 x) {
  if constexpr (SFA_V == 3)  // the byte plus 128 in the lowest bits of 1024
    return add_halves(bytes_of(x ^ 0x80808080u, 0x64646464u, ODD ? 0x4341 : 0x4240), 0xe480e480u);
  u32 y = ODD ? x : x << 8;  // e4m3: sign, exponent and mantissa moved to their places
  return (y & 0x80008000u) | (y >> 1 & 0x3f803f80u);
}

template <int KIND>
__device__ __forceinline__ float half_of(u32 word, int e) {
  return element<KIND>(&word, e);
}

extern "C" __global__ void __launch_bounds__(THREADS, SFA_CTAS) sfa_decode_all(const Params p) {
  float *table = (float*)shared_memory, *always = (float*)(shared_memory + ALWAYS_AT);
  float (*merged)[ROWS][2] = (float (*)[ROWS][2])(shared_memory + MERGED_AT);
  int (*bounds)[ROWS] = (int (*)[ROWS])(merged + WARPS), *bad = bounds[2];

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, batch = blockIdx.y, split = blockIdx.z;
  const int group = p.hq / p.hkv, total_rows = group * p.sq, chunks = (total_rows + ROWS - 1) / ROWS;
  const int head = blockIdx.x / chunks, row0 = (blockIdx.x % chunks) * ROWS, rows = min(ROWS, total_rows - row0);
  const int ring = WARPS_AT + warp * WARP_BYTES;  // a multiple of 128, so that pieces can be swizzled in the sum
  char *codes = shared_memory + ring + RING_BYTES, *weights = codes + CODE_BYTES;
  auto q_row = [&](int r) {
    return ((i64)batch * p.sq + (row0 + r) / group) * p.hq + head * group + (row0 + r) % group;
  };
  float x[FEATURES];
  u32 key[FEATURES];
  auto fetch_q = [&](int r) {
#pragma unroll
    for (int i = 0; i < FEATURES; ++i) {
      int u = lane + 32 * i;
      i64 at = q_row(r < rows ? r : 0) * D + min(u, D - 1);
      x[i] = r < rows ? scalar<SFA_CODE>(p.q_values, at) : 0.0f;
      key[i] = u < D ? magnitude(p.q_values, at) : 0;
    }
  };
  const int length = p.lengths[batch];
  if constexpr (QUERY != 0) fetch_q(warp);  // loaded while the length is on its way
  const Range range = range_of(p, length);
  if (split >= range.splits) return;
  auto lower = [&](int r) {
    int position = length - p.sq + (row0 + r) / group;
    return p.left < 0 ? 0 : max(0, position - p.left);
  };
  auto upper = [&](int r) {
    int position = length - p.sq + (row0 + r) / group;
    return max(lower(r), p.right < 0 ? length : min(length, position + p.right + 1));
  };
  // What some row sees, which is one stretch, and what all rows see.
  const int some_lo = lower(0), some_hi = upper(rows - 1), all_lo = lower(rows - 1), all_hi = upper(0);
  const int end = some_hi > some_lo ? min(range.last, range.first + (split + 1) * range.span) : 0;
  const int first = range.first + split * range.span + warp;
  const int* pages = p.pages + (i64)batch * p.pages_stride;
  // The V row of the first token of part lane / 4 of a block; parts that nothing sees repeat one that something does.
  auto locate = [&](int block) {
    int token = block * BLOCK + lane / 4 * TOKENS;
    token = max(min(token, (some_hi - 1) / TOKENS * TOKENS), some_lo / TOKENS * TOKENS);
    return ((u32)pages[token / PAGE] * p.hkv + head) * PAGE + token % PAGE;
  };
  // A lane's tokens are lane % 4, + 4, + 8 and + 12 of part lane / 4.
  auto fetch_codes = [&](u32 part_row) {
    constexpr int STEP_V = min_of(16, pow2_divisor(W * CB)), STEP_I = min_of(16, pow2_divisor(W * IB));
    constexpr int STEP_R = R > 0 ? min_of(16, pow2_divisor(R * CB)) : 16;
#pragma unroll
    for (int i = 0; i < TPL; ++i) {
      const i64 row = part_row + lane % 4 + 4 * i;
      const int at = i * 32 + lane;
#pragma unroll
      for (int j = 0; j < W * CB; j += STEP_V)
        copy_async<STEP_V>(codes + at * W * CB + j, (const char*)p.values + row * (W * CB) + j);
#pragma unroll
      for (int j = 0; j < W * IB; j += STEP_I)
        copy_async<STEP_I>(codes + BLOCK * W * CB + at * W * IB + j, (const char*)p.indices + row * (W * IB) + j);
#pragma unroll
      for (int j = 0; j < R * CB; j += STEP_R)
        copy_async<STEP_R>(codes + DENSE_AT + at * R * CB + j, (const char*)p.dense + row * (R * CB) + j);
    }
  };
  auto fetch_v = [&](u32 part_row, int block, int part, int slot) {
    const int token = block * BLOCK + part * TOKENS;
    const u32 row = __shfl_sync(~0u, part_row, part * 4);
    if (block < end && token < some_hi && token + TOKENS > some_lo) {
      const char* from = (const char*)p.v + (i64)row * ROW_BYTES + lane * 16;
      const int to = ring + slot * PART_BYTES;
#pragma unroll
      for (int i = 0; i < COPIES; ++i) {
        auto place = [](int at) { return at / PIECES * PIECES + swizzled(at / PIECES, at % PIECES); };
        int at = 32 % PIECES == 0 ? (to + place(lane) * 16 ^ swizzled(i * 32 / PIECES, 0) * 16) + i * 512
                                  : to + place(i * 32 + lane) * 16;
        copy_async<16>(shared_memory + at, from + i * 512);
      }
    }
    close_group();
  };
  auto fetch_scales = [&](u32 part_row, u32 (&scale)[TPL]) {
    if constexpr (BYTES)
#pragma unroll
      for (int i = 0; i < TPL; ++i) load<2>(p.v_scale + (part_row + lane % 4 + 4 * i), &scale[i]);
  };

  u32 row = 0, next = 0, scale[TPL];
  if (first < end) {
    row = locate(first);
    if constexpr (AHEAD) fetch_codes(row);
#pragma unroll 1
    for (int j = 0; j < UNROLL; ++j) fetch_v(row, first, j, j);
    fetch_scales(row, scale);
    next = locate(first + WARPS);
  }

  // The query rows: what they see, and the table of their features.
  if (threadIdx.x < ROWS) {
    bounds[0][threadIdx.x] = threadIdx.x < rows ? lower(threadIdx.x) : 0;
    bounds[1][threadIdx.x] = threadIdx.x < rows ? upper(threadIdx.x) : 0;
  }
#pragma unroll 1
  for (int r = warp; r < ROWS; r += WARPS) {
    auto entry = [&](int u) -> float& { return table[(r / RV * D + u) * RV + r % RV]; };
    bool finite = true;
    auto scaled = [&](float x) {
      finite = finite && x - x == 0.0f;
      return x * p.scale;
    };
    if constexpr (QUERY != 0) {
      const int* always_on = (const int*)p.q_dense;
      if (r != warp) fetch_q(r);
      for (int e = 0; e < R; ++e)
#pragma unroll
        for (int i = 0; i < FEATURES; ++i)
          if (lane + 32 * i == always_on[e]) {
            key[i] = 0;
            always[e * ROWS + r] = scaled(x[i]);
            x[i] = 0.0f;
          }
      const u32 members = QUERY == 2 ? rank(key, p.wq, lane) : ~0u;
#pragma unroll
      for (int i = 0; i < FEATURES; ++i)
        if (lane + 32 * i < D) entry(lane + 32 * i) = members >> i & 1 ? scaled(x[i]) : 0.0f;
    } else {
      for (int u = lane; u < D; u += 32) entry(u) = 0.0f;
      for (int e = 0; e < (r < rows ? p.wq : 0); ++e) {  // the lane that owns a feature
        i64 at = q_row(r) * p.wq + e;
        int index = IB == 1 ? (int)((const u8*)p.q_indices)[at] : (int)((const u16*)p.q_indices)[at];
        if (index % 32 == lane) entry(index) += scaled(scalar<SFA_CODE>(p.q_values, at));
      }
      for (int e = lane; e < R; e += 32)
        always[e * ROWS + r] = r < rows ? scaled(scalar<SFA_CODE>(p.q_dense, q_row(r) * R + e)) : 0.0f;
    }
    const bool some = __ballot_sync(~0u, !finite) != 0;
    if (lane == 0) bad[r] = some;
  }
  __syncthreads();

  // m is the same in all lanes, z the sum of a lane's tokens. A lane's sums of V belong to the rows 2 (lane % 4) + i % 2
  // and two columns of each tile.
  float m[ROWS], z[ROWS], acc[TILES][4];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) m[r] = NEG_INF, z[r] = 0.0f;
#pragma unroll
  for (int q = 0; q < TILES; ++q)
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[q][i] = 0.0f;

  // Row i of a matrix is token i / 2 + 4 (i % 2): words of a product's fragment hold tokens t and t + 4, t + 8 and t + 12.
  // The matrices of 16 bits are a product's fragment as it is; of bytes, the first two and the last two make one.
  const int t = lane % 4, g = lane / 4, late = BYTES ? lane >> 3 & 1 : lane >> 4, right = BYTES ? lane >> 4 : lane >> 3 & 1;
  const int token_of = (lane % 8 >> 1) + 4 * (lane & 1) + 8 * late;
  const int v_at = token_of * ROW_BYTES + swizzled(token_of, right) * 16;
  int slot = 0;

#pragma unroll 1
  for (int block = first; block < end; block += WARPS) {
    const int start = block * BLOCK;
    const bool whole = all_lo <= start && start + BLOCK <= all_hi;
    const u32 after = locate(block + 2 * WARPS);
    u32 token_row[TPL];
#pragma unroll
    for (int i = 0; i < TPL; ++i) token_row[i] = row + t + 4 * i;

    float s[TPL][ROWS];
    u32 flag[TPL][FLAGS];  // for decode.cu
#pragma unroll
    for (int i = 0; i < TPL; ++i) {
      flag[i][0] = 0;
#pragma unroll
      for (int r = 0; r < ROWS; ++r) s[i][r] = 0.0f;
    }
    wait_groups<UNROLL - 1>();
    constexpr int FULL = W / EC, TAIL = W % EC;
#pragma unroll(FULL <= 2 ? 2 : 1)
    for (int c = 0; c < FULL; ++c) score_tokens<EC>(p, token_row, codes, c * EC, table, s, flag);
    if constexpr (TAIL > 0) score_tokens<TAIL>(p, token_row, codes, FULL * EC, table, s, flag);
    if constexpr (R > 0) {
      constexpr int PAIR = R % 2 == 0 && AHEAD ? 2 : 1;
#pragma unroll 4
      for (int c = 0; c < R; c += PAIR)
#pragma unroll
        for (int i = 0; i < TPL; ++i) {
          u32 word;
          if constexpr (AHEAD) {
            word = *(const u32*)(codes + DENSE_AT + (i * 32 + lane) * R * CB + c * CB);
          } else {
            load<2>((const u16*)p.dense + (i64)token_row[i] * R + c, &word);
          }
#pragma unroll
          for (int e = 0; e < PAIR; ++e)
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
              s[i][r] = fmaf(always[(c + e) * ROWS + r], element<SFA_CODE>(&word, e), s[i][r]);
        }
    }
#pragma unroll
    for (int i = 0; i < TPL; ++i)
#pragma unroll
      for (int r = 0; r < ROWS; ++r) s[i][r] = fmaf(s[i][r], 0.0f, s[i][r]);  // infinities become NaN
    if constexpr (AHEAD)
      if (block + WARPS < end) fetch_codes(next);

    // What is visible, and the references.
    float units[TPL], size[TPL];
    bool grows = false;
    if (!whole) {
#pragma unroll
      for (int i = 0; i < TPL; ++i)
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          const int token = start + g * TOKENS + t + 4 * i;
          if (token < bounds[0][r] || token >= bounds[1][r]) s[i][r] = NEG_INF;
        }
    }
#pragma unroll
    for (int i = 0; i < TPL; ++i) {
      if constexpr (BYTES) {
        units[i] = as_float(scale[i] << 16);  // bf16
        size[i] = units[i] - units[i] == 0.0f ? fmaxf(log2_of(units[i]), LEAST_SCALE) : LEAST_SCALE;
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) grows |= (BYTES ? s[i][r] + size[i] : s[i][r]) > m[r] + LIMIT;
    }
    fetch_scales(next, scale);
    if (__ballot_sync(~0u, grows)) {
      float factor = 1.0f;  // of row lane
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        float top = NEG_INF;
#pragma unroll
        for (int i = 0; i < TPL; ++i) top = fmaxf(top, BYTES ? s[i][r] + size[i] : s[i][r]);
        top = warp_max(top);
        if (top > m[r] + LIMIT) {
          float by = power(m[r] - (top - START));
          m[r] = top - START;
          z[r] *= by;
          if (lane == r) factor = by;
        }
      }
      float even = __shfl_sync(~0u, factor, 2 * t), odd = __shfl_sync(~0u, factor, 2 * t + 1);
#pragma unroll
      for (int q = 0; q < TILES; ++q)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[q][i] *= i % 2 ? odd : even;
    }

    // The weights, as a product takes them: the upper halves of tokens t and t + 4, of t + 8 and t + 12, then the rest.
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float base = finite_max(m[r]);
      Words<4> out;
#pragma unroll
      for (int i = 0; i < TPL; i += 2) {
        float w[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          w[e] = power(s[i + e][r] - base);
          z[r] += w[e];
          // The scale of a row that is not finite is not either, and must not reach who does not see it.
          if constexpr (BYTES) w[e] = w[e] == 0.0f ? 0.0f : w[e] * units[i + e];
        }
        const u32 upper = pack<HALF>(w[0], w[1]);
        out.x[i / 2] = upper;
        out.x[2 + i / 2] = pack<HALF>(w[0] - half_of<HALF>(upper, 0), w[1] - half_of<HALF>(upper, 1));
      }
      *(Words<4>*)(weights + g * WEIGHT_STRIDE + r * 64 + t * 16) = out;
    }

#pragma unroll 1
    for (int part = 0; part < PARTS; ++part) {
      const int token = start + part * TOKENS;
      const int v = ring + slot * PART_BYTES + v_at;
      wait_groups<UNROLL - 1>();
      __syncwarp();
      if (token < some_hi && token + TOKENS > some_lo) {
        Words<4> b = {};
        if (ROWS == 8 || g < ROWS) b = *(const Words<4>*)(weights + part * WEIGHT_STRIDE + g * 64 + t * 16);
        auto multiply = [&](u32 low, u32 high, int only) {  // the masks of V words; the row to add to, or -1 for all
#pragma unroll
          for (int q = 0; q < ROW_BYTES / 32; ++q) {
            u32 a[4];
            load_matrices(shared_memory + (v ^ q % PAIRS * 32) + q / PAIRS * PAIRS * 32, a);
            if constexpr (BYTES) {
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                const u32 a0 = widen<false>(a[2 * i]), a1 = widen<true>(a[2 * i]);
                const u32 a2 = widen<false>(a[2 * i + 1]), a3 = widen<true>(a[2 * i + 1]);
                multiply_add<HALF>(acc[2 * q + i], a0, a1, a2, a3, b.x[0], b.x[1]);
                multiply_add<HALF>(acc[2 * q + i], a0, a1, a2, a3, b.x[2], b.x[3]);
              }
            } else {
              float c[4];
#pragma unroll
              for (int i = 0; i < 4; ++i) c[i] = acc[q][i];
              multiply_add<HALF>(c, a[0] & low, a[1] & low, a[2] & high, a[3] & high, b.x[0], b.x[1]);
              multiply_add<HALF>(c, a[0] & low, a[1] & low, a[2] & high, a[3] & high, b.x[2], b.x[3]);
#pragma unroll
              for (int i = 0; i < 4; ++i) acc[q][i] = only < 0 || only == 2 * t + i % 2 ? c[i] : acc[q][i];
            }
          }
        };
        // 8-bit V is finite. Other V must not meet a row that does not see it, not even times 0: one row after the other.
        if (BYTES || (all_lo <= token && token + TOKENS <= all_hi)) {
          multiply(~0u, ~0u, -1);
        } else {
#pragma unroll 1
          for (int r = 0; r < rows; ++r) {
            const int lo = bounds[0][r], hi = bounds[1][r];
            auto mask = [&](int at) {
              return (at >= lo && at < hi ? 0xffffu : 0u) | (at + 4 >= lo && at + 4 < hi ? 0xffff0000u : 0u);
            };
            multiply(mask(token + t), mask(token + t + 8), r);
          }
        }
      }
      __syncwarp();
      const bool here = part + UNROLL < PARTS;
      fetch_v(here ? row : next, here ? block : block + WARPS, (part + UNROLL) % PARTS, slot);
      slot = slot + 1 == UNROLL ? 0 : slot + 1;
    }
    row = next;
    next = after;
  }

  // Merge the warps.
  wait_groups<0>();
  __syncwarp();
  float* own_o = (float*)(shared_memory + ring);
#pragma unroll
  for (int q = 0; q < TILES; ++q)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int c = q * 16 + (BYTES ? 2 * g + i / 2 : g + i / 2 * 8), r = 2 * t + i % 2;
      if (r < ROWS) own_o[r * DV + c] = acc[q][i] * V_UNIT;
    }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    float total = warp_sum(z[r]);
    if (lane == 0) merged[warp][r][0] = m[r], merged[warp][r][1] = total;
  }
  if (p.rows_read != nullptr && threadIdx.x == 0) {
    int lo = max(some_lo, (range.first + split * range.span) * BLOCK), hi = min(some_hi, end * BLOCK);
    if (hi > lo) atomicAdd((unsigned long long*)(p.rows_read + (i64)batch * p.hkv + head), (unsigned long long)(hi - lo));
  }
  __syncthreads();
  for (int at = threadIdx.x; at < rows * DV; at += THREADS) {
    int r = at / DV, c = at % DV;
    float top = NEG_INF;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) top = fmaxf(top, merged[w][r][0]);
    float o = 0.0f, total = 0.0f, base = finite_max(top);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      float factor = power(merged[w][r][0] - base);
      o = fmaf(factor, ((const float*)(shared_memory + WARPS_AT + w * WARP_BYTES))[at], o);
      total = fmaf(factor, merged[w][r][1], total);
    }
    int token = (row0 + r) / group, h = head * group + (row0 + r) % group;
    i64 part = (((i64)batch * p.sq + token) * p.hq + h) * p.part_stride + split;
    p.part_o[part * DV + c] = o;
    if (c == 0) {
      if (bad[r] && bounds[1][r] > bounds[0][r]) total = as_float(0x7fc00000u);
      p.part_ml[2 * part] = top;
      p.part_ml[2 * part + 1] = total;
    }
  }
}

// Attention of a few query tokens over the paged cache of key codes. No headers: NVRTC alone compiles this file.
//
// sfa_decode: a CTA owns a span of 128-token blocks of one (sequence, kv head) and ROWS query rows of its group.
//   A warp takes one block at a time: every lane scores four tokens by looking the key's features up in the
//   expanded query rows in shared memory; tokens that share a feature are compacted into a queue; their V rows pass
//   through a ring of loads that is drained once, at the end: what is left of the queue waits for the next block. The
//   others enter through the block's running sum. Partial (m, Z, o) go to memory.
// sfa_combine: a CTA merges the partials of one query row.
//
// With m the running maximum and mu = 2^-m the weight of a token without overlap:
//   o = sum_read (w_j - mu) v_j + mu S_block,  Z = sum_visible w_j.
// mu = 0, so that S_block is unused, where no visible token is left unread: everything overlaps, or the block is seen
// only in part. A block whose unread tokens carry little of its weight (128 mu > 4 Z) is read whole, too: mu S_block
// would cancel against the rows. The choice looks at one block only, so results do not depend on the split.
//
// Set by the launcher: SFA_D, SFA_W (entries a key), SFA_R (always-on features), SFA_DV, SFA_PAGE, SFA_ROWS, SFA_CODE
// and SFA_V (0 bf16, 1 fp16, 2 fp32; V also 3 int8, 4 e4m3), SFA_ALL (every pair overlaps), SFA_DROP, SFA_QUERY (0 a
// code, 1 dense, 2 whole and ranked here), SFA_VEC (bytes a lane loads of a V row), SFA_UNROLL (such loads in flight),
// SFA_STAGED, SFA_AHEAD, SFA_REP (copies of the table), SFA_WARPS, SFA_CTAS.

#ifdef SFA_HOST
#include SFA_HOST
#else
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;

__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float from_half(u16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}

__device__ __forceinline__ u16 to_half(float x) {
  u16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ u16 to_bf16(float x) {
  u16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}

// Bytes that no kernel writes while this one runs; they pass L1 by.
template <int BYTES>
__device__ __forceinline__ void load(const void* p, u32* out) {
  if constexpr (BYTES == 16) {
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "l"(p));
  } else if constexpr (BYTES == 8) {
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(out[0]), "=r"(out[1]) : "l"(p));
  } else if constexpr (BYTES == 4) {
    asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(out[0]) : "l"(p));
  } else if constexpr (BYTES == 2) {
    u16 part;  // volatile: the load stays where it is written, ahead of its use
    asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(part) : "l"(p));
    out[0] = part;
  } else {
    out[0] = __ldg((const u8*)p);
  }
}
// Copies to shared memory that complete later: in order, counted in groups.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* shared, const void* p) {
  u32 to = (u32)__cvta_generic_to_shared(shared);
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(p) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(p), "n"(BYTES) : "memory");
  }
}

__device__ __forceinline__ void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wait_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ u32 bytes_of(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }
__device__ __forceinline__ u32 warp_add_u32(u32 x) { return __reduce_add_sync(~0u, x); }
__device__ __forceinline__ u32 warp_max_u32(u32 x) { return __reduce_max_sync(~0u, x); }
#endif

constexpr int D = SFA_D, W = SFA_W, R = SFA_R, DV = SFA_DV, PAGE = SFA_PAGE, ROWS = SFA_ROWS;
constexpr int WARPS = SFA_WARPS, THREADS = 32 * WARPS, UNROLL = SFA_UNROLL, REP = SFA_REP;
constexpr int BLOCK = 128, TPL = BLOCK / 32, QUERY = SFA_QUERY;
constexpr bool ALL = SFA_ALL, DROP = SFA_DROP, FINE = SFA_CODE == 2;
constexpr int CB = SFA_CODE == 2 ? 4 : 2, IB = D <= 256 ? 1 : 2;
constexpr int VB = SFA_V == 2 ? 4 : SFA_V >= 3 ? 1 : 2;

__host__ __device__ constexpr int pow2_divisor(int n) { return n % 16 == 0 ? 16 : n % 8 == 0 ? 8 : n % 4 == 0 ? 4 : n % 2 == 0 ? 2 : 1; }
__host__ __device__ constexpr int pow2_above(int n) { return n <= 1 ? 1 : 2 * pow2_above((n + 1) / 2); }
__host__ __device__ constexpr int max_of(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int min_of(int a, int b) { return a < b ? a : b; }

// A V row is CHUNKS pieces of VEC bytes; LPR lanes take one each (CH in turn), so a warp loads RPL rows at once.
constexpr int VEC = SFA_VEC, EPV = VEC / VB, CHUNKS = DV * VB / VEC;
constexpr int LPR = min_of(32, pow2_above(CHUNKS)), RPL = 32 / LPR;
constexpr int CH = (CHUNKS + LPR - 1) / LPR, ACC = CH * EPV;
static_assert(VEC % VB == 0 && DV * VB % VEC == 0, "VEC must divide a row of V");

// The lookup table holds the rows in groups of RV, so that a lane reads one vector of RV floats an entry.
constexpr int RV = min_of(ROWS, 4), RG = ROWS / RV;
constexpr int FLAGS = DROP ? ROWS : 1;
constexpr int EC = 16 / CB;  // entries a 16-byte piece of values

// V rows in flight stay in registers, or go through shared memory, a lane reading what it copied itself.
constexpr bool STAGED = SFA_STAGED;
constexpr int WORDS = (VEC + 3) / 4;
// The next block's codes come to shared memory while V rows of this one are read.
constexpr bool AHEAD = SFA_AHEAD;
constexpr int AHEAD_BYTES = AHEAD ? BLOCK * W * (CB + IB) : 16;

constexpr int TABLE_FLOATS = D * REP * ROWS;
// V rows are taken from the queue in sets; with STAGED the set that is next is on its way already.
constexpr int SET = RPL * UNROLL, AT_LEAST = STAGED ? 2 * SET : SET, QUEUE = BLOCK + AT_LEAST;
constexpr int QUEUE_BYTES = QUEUE * (4 + 4 * ROWS), OWN_BYTES = (max_of(QUEUE_BYTES, ROWS * DV * 4) + 15) / 16 * 16;

struct Params {
  const void *q_values, *q_indices, *q_dense;  // unless q is a code, q and the numbers of the always-on features
  const void *values, *indices, *dense, *v;
  const u16* v_scale;
  const float* sums;
  const int *lengths, *pages, *sum_rows;
  float *part_o, *part_ml;
  void* out;
  float* lse;
  i64* rows_read;
  float scale;
  int sq, hq, hkv, wq, left, right, pages_stride, sums_stride, part_stride, span, max_splits;
};

struct Range {
  int first, last, span, splits;
};

// The blocks that some query of a sequence sees, and their division into spans. Depends on nothing but the sequence.
__device__ __forceinline__ Range range_of(const Params& p, int length) {
  int lo = p.left < 0 ? 0 : length - p.sq - p.left;
  Range r;
  r.first = lo > 0 ? lo / BLOCK : 0;
  r.last = (length + BLOCK - 1) / BLOCK;
  r.span = max(p.span, (r.last - r.first + p.max_splits - 1) / p.max_splits);
  r.splits = (r.last - r.first + r.span - 1) / r.span;
  return r;
}

__device__ __forceinline__ float as_float(u32 x) { return __uint_as_float(x); }

template <int KIND>  // 0 bf16, 1 fp16, 2 fp32
__device__ __forceinline__ float element(const u32* words, int e) {
  if constexpr (KIND == 2) return as_float(words[e]);
  u32 word = words[e / 2];
  if constexpr (KIND == 0) return as_float(e % 2 ? word & 0xffff0000u : word << 16);
  return from_half((u16)(e % 2 ? word >> 16 : word));
}

template <int KIND>
__device__ __forceinline__ float scalar(const void* p, i64 i) {
  if constexpr (KIND == 2) return ((const float*)p)[i];
  u32 word = ((const u16*)p)[i];
  return KIND == 0 ? as_float(word << 16) : from_half((u16)word);
}

__device__ __forceinline__ float e4m3(u32 x) {
  // The bits of an fp16 number 2^8 times too small.
  float y = 256.0f * from_half((u16)((x & 0x80u) << 8 | (x & 0x7fu) << 7));
  return (x & 0x7fu) == 0x7fu ? as_float(0x7fc00000u) : y;
}

__device__ __forceinline__ float v_element(const u32* words, int e) {
  if constexpr (VB >= 2) return element<SFA_V>(words, e);
  if constexpr (SFA_V == 3)  // the byte plus 128 in the lowest bits of 2^23
    return as_float(bytes_of(words[e / 4] ^ 0x80808080u, 0x4b000000u, 0x7650 | e % 4)) - 8388736.0f;
  return e4m3(words[e / 4] >> (8 * (e % 4)) & 0xffu);
}

template <int BYTES, int ALIGN>
__device__ __forceinline__ void load_bytes(const void* p, u32* out) {
  constexpr int STEP = min_of(BYTES, ALIGN);
  if constexpr (STEP >= 4) {
#pragma unroll
    for (int i = 0; i < BYTES / STEP; ++i) load<STEP>((const char*)p + i * STEP, out + i * STEP / 4);
  } else {
#pragma unroll
    for (int i = 0; i < (BYTES + 3) / 4; ++i) out[i] = 0;
#pragma unroll
    for (int i = 0; i < BYTES / STEP; ++i) {
      u32 part;
      load<STEP>((const char*)p + i * STEP, &part);
      out[i * STEP / 4] |= part << (8 * (i * STEP % 4));
    }
  }
}

template <int N>
struct alignas(4 * N) Floats {
  float x[N];
};

template <int N>
struct alignas(4 * N) Words {
  u32 x[N];
};

template <int BYTES, int ALIGN>
__device__ __forceinline__ void read_shared(const char* p, u32* out) {
  constexpr int STEP = min_of(BYTES, ALIGN) / 4;
  static_assert(STEP > 0 || !AHEAD, "codes that come ahead are whole words");
  if constexpr (STEP > 0) {
#pragma unroll
    for (int i = 0; i < BYTES / 4; i += STEP) {
      Words<STEP> part = *(const Words<STEP>*)(p + i * 4);
#pragma unroll
      for (int j = 0; j < STEP; ++j) out[i + j] = part.x[j];
    }
  }
}

// Adds N entries of tokens I0 to I0 + COUNT, from entry e0 on, to their scores.
template <int N, int I0, int COUNT>
__device__ __forceinline__ void score_entries(
    const Params& p, const u32 (&row)[TPL], const char* ahead, int e0, const float* table, float (&s)[TPL][ROWS],
    u32 (&flag)[TPL][FLAGS]) {
  u32 values[TPL][(N * CB + 3) / 4], indices[TPL][(N * IB + 3) / 4];
#pragma unroll
  for (int i = I0; i < I0 + COUNT; ++i) {
    constexpr int ALIGN_V = pow2_divisor(W * CB), ALIGN_I = min_of(pow2_divisor(W * IB), pow2_divisor(EC * IB));
    if constexpr (AHEAD) {
      int at = (i * 32 + threadIdx.x % 32) * W + e0;
      read_shared<N * CB, ALIGN_V>(ahead + at * CB, values[i]);
      read_shared<N * IB, ALIGN_I>(ahead + BLOCK * W * CB + at * IB, indices[i]);
    } else {
      i64 at = (i64)row[i] * W + e0;
      load_bytes<N * CB, ALIGN_V>((const char*)p.values + at * CB, values[i]);
      load_bytes<N * IB, ALIGN_I>((const char*)p.indices + at * IB, indices[i]);
    }
  }
#pragma unroll
  for (int i = I0; i < I0 + COUNT; ++i) {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      u32 index = IB == 1 ? indices[i][e / 4] >> (8 * (e % 4)) & 0xffu : indices[i][e / 2] >> (16 * (e % 2)) & 0xffffu;
      float value = element<SFA_CODE>(values[i], e);
#pragma unroll
      for (int g = 0; g < RG; ++g) {
        Floats<RV> entry = *(const Floats<RV>*)(table + (g * D + index) * (REP * RV));
#pragma unroll
        for (int r = 0; r < RV; ++r) {
          s[i][g * RV + r] = fmaf(entry.x[r], value, s[i][g * RV + r]);
          if (DROP) {
            flag[i][g * RV + r] |= __float_as_uint(entry.x[r]);
          } else if (!ALL && g + r == 0) {
            flag[i][0] |= __float_as_uint(entry.x[0]);
          }
        }
      }
    }
  }
}

// All four tokens of a lane; many rows leave registers for the codes of two tokens only.
template <int N>
__device__ __forceinline__ void score_tokens(
    const Params& p, const u32 (&row)[TPL], const char* ahead, int e0, const float* table, float (&s)[TPL][ROWS],
    u32 (&flag)[TPL][FLAGS]) {
  if constexpr (ROWS <= 2) {
    score_entries<N, 0, TPL>(p, row, ahead, e0, table, s, flag);
  } else {
    score_entries<N, 0, TPL / 2>(p, row, ahead, e0, table, s, flag);
    score_entries<N, TPL / 2, TPL / 2>(p, row, ahead, e0, table, s, flag);
  }
}

// Of numbers that are not NaN, by their bits in the order of the numbers.
__device__ __forceinline__ float warp_max(float x) {
  u32 bits = __float_as_uint(x);
  bits = warp_max_u32(bits >> 31 ? ~bits : bits | 0x80000000u);
  return as_float(bits >> 31 ? bits & 0x7fffffffu : ~bits);
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// 2^x. The instruction is off by 2 units in the last place.
__device__ __forceinline__ float power(float x) {
  if constexpr (!FINE) return ex2(x);
  float n = rintf(fminf(fmaxf(x, -127.0f), 128.0f)), f = x - n;
  float y = 1.5353362e-4f;  // within 1 unit in the last place for |f| <= 1/2
  y = fmaf(y, f, 1.3398875e-3f);
  y = fmaf(y, f, 9.6184369e-3f);
  y = fmaf(y, f, 5.5503324e-2f);
  y = fmaf(y, f, 2.4022648e-1f);
  y = fmaf(y, f, 6.9314718e-1f);
  y = fmaf(y, f, 1.0f);
  return x != x ? x : n < -126.5f ? 0.0f : y * as_float((u32)((int)n + 127) << 23);
}

#define NEG_INF as_float(0xff800000u)

__device__ __forceinline__ float finite_max(float m) { return m == NEG_INF ? 0.0f : m; }

constexpr int FEATURES = (D + 31) / 32, QUERIES = (ROWS + WARPS - 1) / WARPS;  // of a lane, lane + 32 i; of a warp

// A table entry with any bit set says that the feature is kept: if its value is 0, it is the smallest number instead.
__device__ __forceinline__ float mark(float entry, bool kept) {
  return ALL ? entry : !kept ? 0.0f : entry == 0.0f ? as_float(1u) : entry;
}

// One more than the magnitude of a feature, as bits in the order of magnitudes; NaNs are alike and largest.
__device__ __forceinline__ u32 magnitude(const void* p, i64 i) {
  if constexpr (SFA_CODE == 2) return min(((const u32*)p)[i] & 0x7fffffffu, 0x7f800001u) + 1;
  return min(((const u16*)p)[i] & 0x7fffu, SFA_CODE == 0 ? 0x7f81u : 0x7c01u) + 1;
}

// Of a row's magnitudes (0: none) the topk largest, the lowest numbers first: bit i stands for feature lane + 32 i.
__device__ __forceinline__ u32 rank(const u32 (&key)[FEATURES], int topk, int lane) {
  u32 least = 0, members = 0;  // the largest number that at least topk keys reach, a bit at a time
#pragma unroll 1
  for (u32 bit = SFA_CODE == 2 ? 1u << 30 : 1u << 14; bit; bit >>= 1) {
    u32 count = 0;
#pragma unroll
    for (int i = 0; i < FEATURES; ++i) count += key[i] >= (least | bit);
    count = warp_add_u32(count);
    if ((int)count >= topk) least |= bit;
    if ((int)count == topk) break;
  }
  u32 above = 0;
#pragma unroll
  for (int i = 0; i < FEATURES; ++i) {
    above += key[i] > least;
    members |= (key[i] > least ? 1u : 0u) << i;
  }
  int left = topk - (int)warp_add_u32(above);
#pragma unroll
  for (int i = 0; i < FEATURES; ++i) {
    u32 equal = __ballot_sync(~0u, key[i] == least);
    if (key[i] == least && __popc(equal & ((1u << lane) - 1)) < left) members |= 1u << i;
    left -= __popc(equal);
  }
  return members;
}

#ifndef SFA_WITHOUT_DECODE  // decode_all.cu has its own
extern "C" __global__ void __launch_bounds__(THREADS, SFA_CTAS) sfa_decode(const Params p) {
  alignas(16) __shared__ float table[TABLE_FLOATS];
  alignas(16) __shared__ float always[R > 0 ? R * ROWS : 1];
  alignas(16) __shared__ unsigned char own[WARPS][OWN_BYTES];
  alignas(16) __shared__ u32 staged[WARPS][STAGED ? UNROLL : 1][STAGED ? CH : 1][32][STAGED ? WORDS : 1];
  alignas(16) __shared__ char ahead[WARPS][AHEAD_BYTES];
  __shared__ float merged[WARPS][ROWS][2];
  __shared__ int bounds[2][ROWS];
  __shared__ int bad[ROWS];

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, batch = blockIdx.y, split = blockIdx.z;
  const int group = p.hq / p.hkv, total_rows = group * p.sq, chunks = (total_rows + ROWS - 1) / ROWS;
  const int head = blockIdx.x / chunks, row0 = (blockIdx.x % chunks) * ROWS;
  auto q_row = [&](int r) {
    return ((i64)batch * p.sq + (row0 + r) / group) * p.hq + head * group + (row0 + r) % group;
  };
  const int length = p.lengths[batch];
  float x[QUERIES][FEATURES];
  u32 key[QUERIES][FEATURES];
  if constexpr (QUERY != 0) {  // a warp has row warp, warp + WARPS, ...; loaded while the length is on its way
#pragma unroll
    for (int j = 0; j < QUERIES; ++j) {
      const int r = warp + j * WARPS;
      const bool real = r < ROWS && row0 + r < total_rows;
      const i64 from = q_row(real ? r : 0) * D;
#pragma unroll
      for (int i = 0; i < FEATURES; ++i) {
        int u = lane + 32 * i;
        i64 at = from + min(u, D - 1);
        x[j][i] = real ? scalar<SFA_CODE>(p.q_values, at) : 0.0f;
        key[j][i] = u < D ? magnitude(p.q_values, at) : 0;
      }
    }
  }
  const Range range = range_of(p, length);
  if (split >= range.splits) return;
  const int end = min(range.last, range.first + (split + 1) * range.span);
  const int first = range.first + split * range.span + warp;
  const int* pages = p.pages + (i64)batch * p.pages_stride;
  const int* sum_rows = p.sum_rows + (i64)batch * p.sums_stride;
  // The V rows of a lane's tokens, which are the rows of their codes. Lanes beyond the end repeat the last token.
  auto locate = [&](int block, u32 (&row)[TPL]) {
    int start = block * BLOCK;
#pragma unroll
    for (int i = 0; i < TPL; ++i) {
      int token = min(start + i * 32 + lane, min(start + BLOCK, length) - 1);
      int page = PAGE % BLOCK == 0 ? pages[start / PAGE] : pages[token / PAGE];
      row[i] = ((u32)page * p.hkv + head) * PAGE + token % PAGE;
    }
  };
  auto fetch_codes = [&](const u32 (&row)[TPL]) {
    constexpr int STEP_V = min_of(16, pow2_divisor(W * CB)), STEP_I = min_of(16, pow2_divisor(W * IB));
#pragma unroll
    for (int i = 0; i < TPL; ++i) {
      char* to = ahead[warp] + (i * 32 + lane) * W * CB;
      const char* from = (const char*)p.values + (i64)row[i] * W * CB;
#pragma unroll
      for (int j = 0; j < W * CB; j += STEP_V) copy_async<STEP_V>(to + j, from + j);
      to = ahead[warp] + BLOCK * W * CB + (i * 32 + lane) * W * IB;
      from = (const char*)p.indices + (i64)row[i] * W * IB;
#pragma unroll
      for (int j = 0; j < W * IB; j += STEP_I) copy_async<STEP_I>(to + j, from + j);
    }
    close_group();
  };
  u32 row[TPL], v_scale[TPL];
  auto load_scales = [&] {
    if constexpr (SFA_V >= 3)
#pragma unroll
      for (int i = 0; i < TPL; ++i) load<2>(p.v_scale + row[i], &v_scale[i]);
  };
  if (first < end) {
    locate(first, row);
    if constexpr (AHEAD) fetch_codes(row);
    load_scales();
  }

  // The query rows: what they see, and the table of their features.
  if (threadIdx.x < ROWS) {
    int r = threadIdx.x, lo = 0, hi = 0;
    if (row0 + r < total_rows) {
      int position = length - p.sq + (row0 + r) / group;
      lo = p.left < 0 ? 0 : max(0, position - p.left);
      hi = p.right < 0 ? length : min(length, position + p.right + 1);
    }
    bounds[0][r] = lo;
    bounds[1][r] = max(lo, hi);
    bad[r] = 0;
  }
  __syncthreads();
  if constexpr (QUERY != 0) {
    const int* always_on = (const int*)p.q_dense;
#pragma unroll
    for (int j = 0; j < QUERIES; ++j) {
      const int r = warp + j * WARPS;
      if (r >= ROWS) break;
      for (int e = 0; e < R; ++e)
#pragma unroll
        for (int i = 0; i < FEATURES; ++i)
          if (lane + 32 * i == always_on[e]) {
            key[j][i] = 0;
            if (x[j][i] - x[j][i] != 0.0f) bad[r] = 1;
            always[e * ROWS + r] = x[j][i] * p.scale;
          }
      const u32 members = QUERY == 2 ? rank(key[j], p.wq, lane) : ~0u;
#pragma unroll
      for (int i = 0; i < FEATURES; ++i) {
        int u = lane + 32 * i;
        if (u >= D) continue;
        bool member = members >> i & 1;
        if (member && x[j][i] - x[j][i] != 0.0f) bad[r] = 1;
        float entry = mark(member ? x[j][i] * p.scale : 0.0f, member && row0 + r < total_rows);
#pragma unroll 4
        for (int c = 0; c < REP; ++c) table[((r / RV * D + u) * REP + (c + lane) % REP) * RV + r % RV] = entry;
      }
    }
    if (!ALL && !DROP && ROWS > 1) {  // kept by any row: in row 0
      __syncthreads();
      for (int u = threadIdx.x; u < D; u += THREADS) {
        bool kept = false;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) kept |= __float_as_uint(table[(r / RV * D + u) * REP * RV + r % RV]) != 0;
        for (int c = 0; c < REP; ++c) {
          float* entry = table + (u * REP + c) * RV;
          *entry = mark(*entry, kept);
        }
      }
    }
  } else {
    for (int u = threadIdx.x; u < D + R; u += THREADS) {
      float x[ROWS];
      u32 members = 0;
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        x[r] = 0.0f;
        if (row0 + r >= total_rows) continue;
        if (u >= D) {
          x[r] = scalar<SFA_CODE>(p.q_dense, q_row(r) * R + (u - D));
        } else {
          for (int e = 0; e < p.wq; ++e) {
            i64 at = q_row(r) * p.wq + e;
            int index = IB == 1 ? (int)((const u8*)p.q_indices)[at] : (int)((const u16*)p.q_indices)[at];
            if (index == u) {
              x[r] += scalar<SFA_CODE>(p.q_values, at);
              members |= 1u << r;
            }
          }
        }
        if (x[r] - x[r] != 0.0f) bad[r] = 1;
        x[r] *= p.scale;
      }
      if (u >= D) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) always[(u - D) * ROWS + r] = x[r];
        continue;
      }
#pragma unroll
      for (int g = 0; g < RG; ++g) {
        Floats<RV> entry;
#pragma unroll
        for (int r = 0; r < RV; ++r) {
          bool by_any = !DROP && g + r == 0 && members != 0;  // in row 0
          entry.x[r] = mark(x[g * RV + r], by_any || (members >> (g * RV + r) & 1));
        }
#pragma unroll 4
        for (int i = 0; i < REP; ++i)
          *(Floats<RV>*)(table + ((g * D + u) * REP + (i + lane) % REP) * RV) = entry;
      }
    }
  }
  __syncthreads();

  const float* my_table = table + lane % REP * RV;
  u32* queue_row = (u32*)own[warp];
  float* queue_weight = (float*)own[warp] + QUEUE;
  const int sub = lane / LPR, column = lane % LPR;

  // Lane r keeps the maximum, the weight and mu of row r. If there is but one, all lanes do, of the weight their share.
  const auto mine = [&](int r) { return ROWS == 1 || lane == r; };
  const auto of_row = [&](float x, int r) { return ROWS == 1 ? x : __shfl_sync(~0u, x, r); };
  float my_m = NEG_INF, my_z = 0.0f, my_mu = 0.0f, acc[ROWS][ACC];
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int e = 0; e < ACC; ++e) acc[r][e] = 0.0f;
  // The queue is entries next_at to tail. With STAGED the first SET are in the ring, as soon as there are so many. Some
  // row may not see all of those before mixed_until.
  int next_at = 0, tail = 0, mixed_until = 0, rows_read = 0;
  const u32 real = (1u << min(ROWS, total_rows - row0)) - 1;

#pragma unroll 1
  for (int block = first; block < end; block += WARPS) {
    const int start = block * BLOCK, stop = min(start + BLOCK, length);
    u32 whole = 0;
    bool edge = false;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      int lo = bounds[0][r], hi = bounds[1][r];
      bool all = lo <= start && stop <= hi, none = hi <= start || lo >= stop || hi <= lo;
      whole |= all ? 1u << r : 0u;
      edge |= !all && !none;
    }
    const int sum_row = ALL || DROP ? 0 : sum_rows[block];
    const bool last = block + WARPS >= end;

    u32 visible[TPL], flag[TPL][FLAGS];
    float s[TPL][ROWS];
#pragma unroll
    for (int i = 0; i < TPL; ++i) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) s[i][r] = 0.0f;
#pragma unroll
      for (int r = 0; r < FLAGS; ++r) flag[i][r] = 0;
    }
    if constexpr (AHEAD)
      if (!STAGED || next_at == 0) wait_groups<0>();  // else a set passed since they were fetched: they are here, too
    constexpr int FULL = W / EC, TAIL = W % EC;
#pragma unroll(FULL <= 2 ? 2 : 1)
    for (int c = 0; c < FULL; ++c) score_tokens<EC>(p, row, ahead[warp], c * EC, my_table, s, flag);
    if constexpr (TAIL > 0) score_tokens<TAIL>(p, row, ahead[warp], FULL * EC, my_table, s, flag);
    if constexpr (R > 0) {
      constexpr int FULL_R = R / EC * EC, ALIGN_R = pow2_divisor(R * CB);
#pragma unroll 1
      for (int c = 0; c < FULL_R; c += EC) {
        u32 words[TPL][4];
#pragma unroll
        for (int i = 0; i < TPL; ++i)
          load_bytes<16, ALIGN_R>((const char*)p.dense + ((i64)row[i] * R + c) * CB, words[i]);
#pragma unroll
        for (int e = 0; e < EC; ++e)
#pragma unroll
          for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int i = 0; i < TPL; ++i)
              s[i][r] = fmaf(always[(c + e) * ROWS + r], element<SFA_CODE>(words[i], e), s[i][r]);
      }
      for (int c = FULL_R; c < R; ++c)
#pragma unroll
        for (int i = 0; i < TPL; ++i) {
          float x = scalar<SFA_CODE>(p.dense, (i64)row[i] * R + c);
#pragma unroll
          for (int r = 0; r < ROWS; ++r) s[i][r] = fmaf(always[c * ROWS + r], x, s[i][r]);
        }
    }

    u32 next[TPL];
    if constexpr (AHEAD) {
      locate(min(block + WARPS, end - 1), next);
      if (!last) fetch_codes(next);
    }

    // What is visible, what is read, and the new maxima.
    u32 read[TPL];
    int unread = 0;
#pragma unroll
    for (int i = 0; i < TPL; ++i) {
      int token = start + i * 32 + lane;
      visible[i] = 0;
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        s[i][r] += s[i][r] - s[i][r];  // infinities become NaN
        bool is = token >= bounds[0][r] && token < bounds[1][r];
        if (DROP) is = is && flag[i][r] != 0;
        visible[i] |= is ? 1u << r : 0u;
      }
      read[i] = visible[i] != 0 && (ALL || DROP || edge || flag[i][0] != 0);
      if (!ALL && !DROP) unread += __popc(__ballot_sync(~0u, visible[i] != 0 && !read[i]));
    }
    bool use_sum = unread > 0, cancels = false;
    __syncwarp();
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float top = NEG_INF, weight = 0.0f, before = of_row(my_m, r);
#pragma unroll
      for (int i = 0; i < TPL; ++i)
        if (visible[i] >> r & 1) top = fmaxf(top, s[i][r]);
      top = fmaxf(warp_max(top), before);
      if (top > before) {
        float factor = power(before - top);
#pragma unroll
        for (int e = 0; e < ACC; ++e) acc[r][e] *= factor;
#pragma unroll 1
        for (int j = next_at + lane; j < tail; j += 32) queue_weight[j * ROWS + r] *= factor;
        if (mine(r)) my_z *= factor;
      }
      float base = finite_max(top);
#pragma unroll
      for (int i = 0; i < TPL; ++i) {
        s[i][r] = visible[i] >> r & 1 ? power(s[i][r] - base) : 0.0f;  // the weight from here on
        weight += s[i][r];
      }
      float mu = use_sum && (whole >> r & 1) ? power(-base) : 0.0f, all = weight;
      // The unread alone weigh mu each: of more than a quarter of a block they are too many to cancel.
      if (ROWS > 1 || (use_sum && 4 * unread <= BLOCK)) {
        all = warp_sum(weight);
        cancels |= mu * (float)(stop - start) > 4.0f * all;
      }
      if (mine(r)) {
        my_m = top;
        my_z += ROWS == 1 ? weight : all;
        my_mu = mu;
      }
    }
    if (cancels) {
      use_sum = false;
      my_mu = 0.0f;
#pragma unroll
      for (int i = 0; i < TPL; ++i) read[i] = visible[i] != 0;
    }
    if (!ALL && !DROP) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        float mu = of_row(my_mu, r);
#pragma unroll
        for (int i = 0; i < TPL; ++i) s[i][r] -= mu;
      }
    }

    // What is left of the queue moves to its front; then this block's tokens.
    if (next_at > 0) {
#pragma unroll 1
      for (int j = lane; j - lane < tail - next_at; j += 32) {
        const bool any = next_at + j < tail;
        u32 from_row = 0;
        if (any) from_row = queue_row[next_at + j];
#pragma unroll
        for (int r = 0; r < ROWS; r += RV) {
          Floats<RV> weight;
          if (any) weight = *(const Floats<RV>*)(queue_weight + (next_at + j) * ROWS + r);
          __syncwarp();
          if (any) *(Floats<RV>*)(queue_weight + j * ROWS + r) = weight;
        }
        if (any) queue_row[j] = from_row;
      }
      tail -= next_at;
      mixed_until -= next_at;
      next_at = 0;
    }
    const bool fill = tail < SET;
    rows_read -= tail;
#pragma unroll
    for (int i = 0; i < TPL; ++i) {
      u32 mask = __ballot_sync(~0u, read[i] != 0);
      if (read[i]) {
        int at = tail + __popc(mask & ((1u << lane) - 1));
        float scale = 1.0f;
        if constexpr (SFA_V >= 3) scale = as_float(v_scale[i] << 16);  // bf16
        queue_row[at] = row[i];
        // The scale of a row that is not finite is not either, and must not reach who does not see it.
        Floats<RV> weight;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          weight.x[r % RV] = s[i][r] == 0.0f ? 0.0f : s[i][r] * scale;
          if (r % RV == RV - 1) *(Floats<RV>*)(queue_weight + at * ROWS + r / RV * RV) = weight;
        }
      }
      tail += __popc(mask);
    }
    __syncwarp();
    rows_read += tail;
    if (DROP || (whole & real) != real) mixed_until = tail;
    if constexpr (AHEAD) {
#pragma unroll
      for (int i = 0; i < TPL; ++i) row[i] = next[i];
    } else {
      locate(min(block + WARPS, end - 1), row);
    }
    load_scales();

    float sum[ACC];
    if (use_sum && sub == 0) {
      const float* sums = p.sums + ((i64)sum_row * p.hkv + head) * DV;
#pragma unroll
      for (int k = 0; k < CH; ++k) {
        bool in_row = column + k * LPR < CHUNKS;
        constexpr int STEP = min_of(EPV, 4);
#pragma unroll
        for (int e = 0; e < EPV; e += STEP) {
          Floats<STEP> part = {};
          if (in_row) part = *(const Floats<STEP>*)(sums + (column + k * LPR) * EPV + e);
#pragma unroll
          for (int j = 0; j < STEP; ++j) sum[k * EPV + e + j] = part.x[j];
        }
      }
    }

    // What one row of the queue adds. In fp32 long chains of additions show: a few rows are added up first.
    float few[FINE ? ROWS : 1][FINE ? ACC : 1] = {};
    auto& to = [&]() -> auto& {
      if constexpr (FINE) {
        return few;
      } else {
        return acc;
      }
    }();
    auto add_few = [&] {
      if constexpr (FINE)
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
          for (int e = 0; e < ACC; ++e) {
            acc[r][e] += few[r][e];
            few[r][e] = 0.0f;
          }
    };
    auto weights = [&](int j) {
      Floats<ROWS> weight;
#pragma unroll
      for (int r = 0; r < ROWS; r += RV) {
        Floats<RV> part = *(const Floats<RV>*)(queue_weight + j * ROWS + r);
#pragma unroll
        for (int i = 0; i < RV; ++i) weight.x[r + i] = part.x[i];
      }
      return weight;
    };
    auto add = [&](const Floats<ROWS>& weight, const u32 (&data)[CH][WORDS]) {
      float value[ACC];
#pragma unroll
      for (int e = 0; e < ACC; ++e) value[e] = v_element(data[e / EPV], e % EPV);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        // A row that does not see the token must not meet its V, which may not be finite.
        if (ROWS == 1 || next_at >= mixed_until || weight.x[r] != 0.0f) {
#pragma unroll
          for (int e = 0; e < ACC; ++e) to[r][e] = fmaf(weight.x[r], value[e], to[r][e]);
        }
      }
    };
    auto piece = [&](u32 v_row, int k) { return (const char*)p.v + (i64)v_row * (DV * VB) + (column + k * LPR) * VEC; };
    if constexpr (STAGED) {
      auto fetch = [&](u32 v_row, int u) {
#pragma unroll
        for (int k = 0; k < CH; ++k)
          if (column + k * LPR < CHUNKS) copy_async<VEC>(staged[warp][u][k][lane], piece(v_row, k));
      };
      auto from_ring = [&](int u, u32 (&data)[CH][WORDS]) {
#pragma unroll
        for (int k = 0; k < CH; ++k)
#pragma unroll
          for (int i = 0; i < WORDS; ++i) data[k][i] = staged[warp][u][k][lane][i];
      };
      u32 data[CH][WORDS];
      if (fill && (last || tail >= SET))
#pragma unroll 1
        for (int u = 0; u < UNROLL; ++u) {
          if (u * RPL + sub < tail) fetch(queue_row[u * RPL + sub], u);
          close_group();
        }
#pragma unroll 1
      for (; tail - next_at >= AT_LEAST; next_at += SET) {
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
          const int j = next_at + u * RPL + sub;
          const u32 v_row = queue_row[j + SET];
          wait_groups<UNROLL - 1>();
          from_ring(u, data);
          const Floats<ROWS> weight = weights(j);
          fetch(v_row, u);
          close_group();
          add(weight, data);
        }
        add_few();
      }
      if (last) {
        // What is in the ring, while what is left follows.
#pragma unroll 1
        for (; next_at < tail; next_at += SET) {
          wait_groups<0>();
#pragma unroll 1
          for (int u = 0; u < UNROLL; ++u) {
            const int j = next_at + u * RPL + sub;
            from_ring(u, data);
            if (j + SET < tail) fetch(queue_row[j + SET], u);
            if (j < tail) add(weights(j), data);
          }
          close_group();
          add_few();
        }
      }
    } else {
#pragma unroll 1
      for (; tail - next_at >= (last ? 1 : AT_LEAST); next_at += SET) {
        u32 data[UNROLL][CH][WORDS];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
          const int j = next_at + u * RPL + sub;
#pragma unroll
          for (int k = 0; k < CH; ++k)
            if (j < tail && column + k * LPR < CHUNKS) load<VEC>(piece(queue_row[j], k), data[u][k]);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
          const int j = next_at + u * RPL + sub;
          if (j < tail) add(weights(j), data[u]);
        }
        add_few();
      }
    }
    if (use_sum) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        float mu = of_row(my_mu, r);
        if (sub == 0 && (ROWS == 1 || mu != 0.0f)) {
#pragma unroll
          for (int e = 0; e < ACC; ++e)
            acc[r][e] = fmaf(mu, sum[e], acc[r][e]);
        }
      }
    }
  }

  if (ROWS == 1) my_z = warp_sum(my_z);
  // Merge the lanes that hold the same columns, then the warps.
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int e = 0; e < ACC; ++e)
#pragma unroll
      for (int offset = LPR; offset < 32; offset *= 2) acc[r][e] += __shfl_xor_sync(~0u, acc[r][e], offset);
  __syncwarp();
  float* own_o = (float*)own[warp];
  if (sub == 0) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int k = 0; k < CH; ++k)
        if (column + k * LPR < CHUNKS)
#pragma unroll
          for (int e = 0; e < EPV; ++e) own_o[r * DV + (column + k * LPR) * EPV + e] = acc[r][k * EPV + e];
  }
  if (lane < ROWS) {
    merged[warp][lane][0] = my_m;
    merged[warp][lane][1] = my_z;
  }
  if (lane == 0) {
    if (p.rows_read != nullptr && rows_read > 0)
      atomicAdd((unsigned long long*)(p.rows_read + (i64)batch * p.hkv + head), (unsigned long long)rows_read);
  }
  __syncthreads();
  for (int t = threadIdx.x; t < ROWS * DV; t += THREADS) {
    int r = t / DV, c = t % DV;
    if (row0 + r >= total_rows) break;
    float top = NEG_INF;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) top = fmaxf(top, merged[w][r][0]);
    float o = 0.0f, total = 0.0f, base = finite_max(top);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      float factor = power(merged[w][r][0] - base);
      o = fmaf(factor, ((const float*)own[w])[t], o);
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
#endif

constexpr int COMBINE_WARPS = 16, CV = DV % 4 == 0 ? 4 : 1, CC = (DV / CV + 31) / 32;
constexpr int DEPTH = max_of(1, 8 / CC), AT_ONCE = COMBINE_WARPS * DEPTH;  // partials a warp and all warps load at once

extern "C" __global__ void __launch_bounds__(32 * COMBINE_WARPS) sfa_combine(const Params p) {
  __shared__ float rows[COMBINE_WARPS][DV];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int batch = blockIdx.y, token = blockIdx.x / p.hq, h = blockIdx.x % p.hq;
  const i64 q_row = ((i64)batch * p.sq + token) * p.hq + h;
  const int splits = range_of(p, p.lengths[batch]).splits;
  const float* ml = p.part_ml + 2 * q_row * p.part_stride;
  const float* part_o = p.part_o + q_row * p.part_stride * DV;

  Floats<CV> part[DEPTH][CC];
  auto fetch = [&](int first) {
#pragma unroll
    for (int j = 0; j < DEPTH; ++j)
#pragma unroll
      for (int k = 0; k < CC; ++k) {
        int i = first + j * COMBINE_WARPS, c = (lane + k * 32) * CV;
        part[j][k] = {};
        if (i < splits && c < DV) part[j][k] = *(const Floats<CV>*)(part_o + (i64)i * DV + c);
      }
  };
  fetch(warp);
  float top = NEG_INF;
  for (int i = lane; i < splits; i += 32) top = fmaxf(top, ml[2 * i]);
  top = warp_max(top);
  const float base = finite_max(top);
  float total = 0.0f;
  for (int i = lane; i < splits; i += 32) total = fmaf(power(ml[2 * i] - base), ml[2 * i + 1], total);
  total = warp_sum(total);

  float acc[CC * CV];
#pragma unroll
  for (int e = 0; e < CC * CV; ++e) acc[e] = 0.0f;
#pragma unroll 1
  for (int first = warp; first < splits; first += AT_ONCE) {
#pragma unroll
    for (int j = 0; j < DEPTH; ++j) {
      int i = first + j * COMBINE_WARPS;
      float factor = i < splits ? power(ml[2 * i] - base) : 0.0f;
#pragma unroll
      for (int e = 0; e < CC * CV; ++e) acc[e] = fmaf(factor, part[j][e / CV].x[e % CV], acc[e]);
    }
    fetch(first + AT_ONCE);
  }
#pragma unroll
  for (int k = 0; k < CC; ++k) {
    int c = (lane + k * 32) * CV;
    if (c < DV)
#pragma unroll
      for (int j = 0; j < CV; ++j) rows[warp][c + j] = acc[k * CV + j];
  }
  __syncthreads();
  const bool empty = total == 0.0f;
  for (int c = threadIdx.x; c < DV; c += 32 * COMBINE_WARPS) {
    float o = 0.0f;
#pragma unroll
    for (int w = 0; w < COMBINE_WARPS; ++w) o += rows[w][c];
    o = empty ? 0.0f : o / total;
    i64 at = q_row * DV + c;
    if constexpr (SFA_CODE == 2) {
      ((float*)p.out)[at] = o;
    } else {
      ((u16*)p.out)[at] = SFA_CODE == 0 ? to_bf16(o) : to_half(o);
    }
  }
  if (threadIdx.x == 0)
    p.lse[((i64)batch * p.hq + h) * p.sq + token] = empty ? NEG_INF : 0.69314718055994531f * (base + log2f(total));
}

// Attention of a few query tokens over the paged cache of key codes. No headers: NVRTC alone compiles this file.
//
// sfa_decode: a CTA owns a span of 128-token blocks of one (sequence, kv head) and ROWS query rows of its group.
//   A warp takes one block at a time: every lane scores four tokens by looking the key's features up in the
//   expanded query rows in shared memory; tokens that share a feature are compacted into a queue; their V rows are
//   gathered, several in flight; the others enter through the block's running sum. Partial (m, Z, o) go to memory.
// sfa_combine: a CTA merges the partials of one query row.
//
// With m the running maximum and mu = 2^-m the weight of a token without overlap:
//   o = sum_read (w_j - mu) v_j + mu S_block,  Z = sum_visible w_j.
// mu = 0, so that S_block is unused, where no visible token is left unread: everything overlaps, or the block is seen
// only in part. A block whose unread tokens carry little of its weight (128 mu > 4 Z) is read whole, too: mu S_block
// would cancel against the rows. The choice looks at one block only, so results do not depend on the split.
//
// Set by the launcher: SFA_D, SFA_W (entries a key), SFA_R (always-on features), SFA_DV, SFA_PAGE, SFA_ROWS, SFA_CODE
// and SFA_V (0 bf16, 1 fp16, 2 fp32; V also 3 int8, 4 e4m3), SFA_ALL (every pair overlaps), SFA_DROP, SFA_QDENSE,
// SFA_VEC (bytes a lane loads of a V row), SFA_UNROLL (such loads in flight), SFA_STAGED, SFA_AHEAD, SFA_REP (copies of
// the table), SFA_WARPS, SFA_CTAS. Not run on a GPU yet, 0 unless asked for: SFA_MMA (V rows on tensor cores), SFA_QTOPK
// (q is given whole and ranked here), SFA_EVEN (spans of any length), SFA_EARLY (sfa_combine may start early), SFA_SCALES
// (scales of 8-bit V come ahead).

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
    out[0] = __ldg((const u16*)p);
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
__device__ __forceinline__ u32 warp_max_u32(u32 x) { return __reduce_max_sync(~0u, x); }

// Adds (16 x 16) times (16 x 8), in the fragment layout of mma.m16n8k16.
template <bool HALF>
__device__ __forceinline__ void multiply_add(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  if constexpr (HALF) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// Two bf16 numbers a word, multiplied and added.
__device__ __forceinline__ u32 fma_bf16x2(u32 x, u32 y, u32 z) {
  u32 out;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(x), "r"(y), "r"(z));
  return out;
}

// A kernel launched to overlap waits here for the one before it.
__device__ __forceinline__ void wait_for_kernel() {
#if __CUDA_ARCH__ >= 900 && SFA_EARLY
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900 && SFA_EARLY
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#endif

constexpr int D = SFA_D, W = SFA_W, R = SFA_R, DV = SFA_DV, PAGE = SFA_PAGE, ROWS = SFA_ROWS;
constexpr int WARPS = SFA_WARPS, THREADS = 32 * WARPS, UNROLL = SFA_UNROLL, REP = SFA_REP;
constexpr int BLOCK = 128, TPL = BLOCK / 32;
constexpr bool ALL = SFA_ALL, DROP = SFA_DROP;
constexpr int CB = SFA_CODE == 2 ? 4 : 2, IB = D <= 256 ? 1 : 2;
constexpr int VB = SFA_V == 2 ? 4 : SFA_V >= 3 ? 1 : 2;
// MMA: V rows meet the weights on tensor cores, 16 tokens at a time; see multiply_tile.
constexpr bool MMA = SFA_MMA, HALF = SFA_V == 1;

__host__ __device__ constexpr int pow2_divisor(int n) { return n % 16 == 0 ? 16 : n % 8 == 0 ? 8 : n % 4 == 0 ? 4 : n % 2 == 0 ? 2 : 1; }
__host__ __device__ constexpr int pow2_above(int n) { return n <= 1 ? 1 : 2 * pow2_above((n + 1) / 2); }
__host__ __device__ constexpr int max_of(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int min_of(int a, int b) { return a < b ? a : b; }

// A V row is CHUNKS pieces of VEC bytes; LPR lanes take one each (CH in turn), so a warp loads RPL rows at once.
constexpr int VEC = SFA_VEC, EPV = VEC / VB, CHUNKS = DV * VB / VEC;
constexpr int LPR = MMA ? 8 : min_of(32, pow2_above(CHUNKS)), RPL = 32 / LPR;
constexpr int CH = (CHUNKS + LPR - 1) / LPR, ACC = CH * EPV;
static_assert(VEC % VB == 0 && DV * VB % VEC == 0, "VEC must divide a row of V");

// The lookup table holds the rows in groups of RV, so that a lane reads one vector of RV floats an entry.
constexpr int RV = min_of(ROWS, 4), RG = ROWS / RV;
constexpr int FLAGS = DROP ? ROWS : 1;
constexpr int EC = 16 / CB;  // entries a 16-byte piece of values

// V rows in flight stay in registers, or go through shared memory, a lane reading what it copied itself.
constexpr bool STAGED = SFA_STAGED;
static_assert(!MMA || (STAGED && VEC == 16 && VB <= 2 && CHUNKS % 8 == 0 && CH <= 4 && UNROLL % 4 == 0), "MMA needs this");
constexpr int WORDS = (VEC + 3) / 4;
// The next block's codes come to shared memory while V rows of this one are read.
constexpr bool AHEAD = SFA_AHEAD;
// So do the scales of 8-bit V.
constexpr bool SCALES = SFA_SCALES && SFA_V >= 3;
constexpr int AHEAD_BYTES = AHEAD ? BLOCK * W * (CB + IB) : 16;

constexpr int TABLE_FLOATS = D * REP * ROWS;
// With MMA a weight is the sum of two 16-bit numbers, which stand 4 or 8 columns apart. For fp16 it is scaled up, since
// weights below 2^-24 would be lost.
constexpr int LOW = ROWS <= 4 ? 4 : 8, COLUMNS = 2 * LOW, TILES = DV / 16;
constexpr float UP = MMA && HALF ? 16384.0f : 1.0f;
constexpr int WEIGHT_BYTES = MMA ? 2 * COLUMNS : 4 * ROWS;
constexpr int QUEUE_BYTES = BLOCK * (4 + WEIGHT_BYTES), OWN_BYTES = (max_of(QUEUE_BYTES, ROWS * DV * 4) + 15) / 16 * 16;

struct Params {
  const void *q_values, *q_indices, *q_dense;  // with SFA_QTOPK the first is q, and the last the numbers of its always-on features
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
  r.span = SFA_EVEN ? max(p.span, (r.last - r.first + p.max_splits - 1) / p.max_splits) : p.span;
  while (r.span * p.max_splits < r.last - r.first) r.span *= 2;
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
  u32 byte = words[e / 4] >> (8 * (e % 4)) & 0xffu;
  if constexpr (SFA_V == 3) return as_float(0x4b000000u | (byte ^ 0x80u)) - 8388736.0f;  // 2^23 + 128
  return e4m3(byte);
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

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// Two tokens' words of V -> pairs (token 0, token 1) of elements, 16 bits each: element i of the words.
__device__ __forceinline__ u32 pair_elements(u32 x0, u32 x1, int i) {
  if constexpr (VB == 2) return bytes_of(x0, x1, i == 0 ? 0x5410 : 0x7632);
  u32 both = bytes_of(x0, x1, i < 2 ? 0x5140 : 0x7362);
  if constexpr (SFA_V == 3) {
    // 0x43xx is 128 + the low seven bits, and 128 or 256 by the sign.
    u32 x = bytes_of(both, 0x43434343u, i % 2 ? 0x4342 : 0x4140);
    return fma_bf16x2(x & 0xff80ff80u, 0xbf80bf80u, x & 0xff7fff7fu);
  }
  // e4m3 bits as a bf16 number 2^120 times too small; the cache stores no NaN in V.
  u32 x = bytes_of(both, 0u, i % 2 ? 0x3424 : 0x1404);
  return fma_bf16x2((x & 0x80008000u) | (x >> 4 & 0x07f007f0u), 0x7b807b80u, 0x80008000u);
}

__device__ __forceinline__ u16 to_weight(float x) { return HALF ? to_half(x) : to_bf16(x); }
__device__ __forceinline__ float from_weight(u16 x) { return HALF ? from_half(x) : as_float((u32)x << 16); }

// acc += V^T W of 16 tokens. Lane (g, c) = (lane / 4, lane % 4) holds tokens c, c + 4, c + 8 and c + 12 of the tile, of
// each the columns (g + 8 k) EPV + e of V. The order of tokens and of columns is free in a product, so what a lane
// copied from memory is its fragment: tile k EPV / 2 + i multiplies the elements 2 i and 2 i + 1 of piece k.
template <int N, int E>
__device__ __forceinline__ void multiply_tile(const u32 (&data)[4][CH][WORDS], const u16* weights, float (&acc)[N][E]) {
  u32 w[COLUMNS / 8][2];
#pragma unroll
  for (int i = 0; i < COLUMNS / 8; ++i) {
    Words<2> part = *(const Words<2>*)(weights + i * 32);
    w[i][0] = part.x[0];
    w[i][1] = part.x[1];
  }
  constexpr int PER = 4 / VB;  // elements a word
#pragma unroll
  for (int k = 0; k < CH; ++k)
#pragma unroll
    for (int i = 0; i < EPV / 2; ++i) {
      u32 a[4];
      int word = 2 * i / PER, e = 2 * i % PER;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        a[j] = pair_elements(data[j / 2 * 2][k][word], data[j / 2 * 2 + 1][k][word], e + j % 2);
#pragma unroll
      for (int j = 0; j < COLUMNS / 8; ++j)
        if constexpr (E == 4) multiply_add<HALF>(acc[(k * (EPV / 2) + i) % N], a, w[j]);
    }
}

// A row that does not see a token must not meet its V, which may not be finite: 0 times infinity. Such elements are
// taken out, and what they spoil is set to NaN here.
template <int N, int E>
__device__ __forceinline__ void take_out(u32 (&data)[4][CH][WORDS], const u16* weights, int lane, float (&acc)[N][E]) {
  constexpr u32 EXPONENT = HALF ? 0x7c00u : 0x7f80u;
  u32 found[4], any = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    found[j] = 0;
#pragma unroll
    for (int k = 0; k < CH; ++k)
#pragma unroll
      for (int i = 0; i < WORDS; ++i) {
        u32 x = data[j][k][i], low = (x & EXPONENT) == EXPONENT, high = (x >> 16 & EXPONENT) == EXPONENT;
        found[j] |= (low | high << 1) << (2 * (k * WORDS + i));
        data[j][k][i] = x & ~((low ? 0xffffu : 0u) | (high ? 0xffff0000u : 0u));
      }
    any |= found[j];
  }
  if (__ballot_sync(~0u, any != 0) == 0) return;
#pragma unroll 1
  for (int r = 0; r < ROWS; ++r) {
    u32 spoiled = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j)  // weights points at column lane / 4 of this lane's tokens
      if (weights[(r - lane / 4) * 4 + j] & 0x7fffu) spoiled |= found[j];
    spoiled |= __shfl_xor_sync(~0u, spoiled, 1);
    spoiled |= __shfl_xor_sync(~0u, spoiled, 2);
    if (lane % 4 != r / 2) continue;
#pragma unroll
    for (int t = 0; t < N; ++t)
#pragma unroll
      for (int e = 0; e < E; ++e)
        if (e % 2 == r % 2 && (spoiled >> (2 * t + e / 2) & 1)) acc[t][e] = as_float(0x7fc00000u);
  }
}

#define NEG_INF as_float(0xff800000u)

__device__ __forceinline__ float finite_max(float m) { return m == NEG_INF ? 0.0f : m; }

extern "C" __global__ void __launch_bounds__(THREADS, SFA_CTAS) sfa_decode(const Params p) {
  alignas(16) __shared__ float table[TABLE_FLOATS];
  alignas(16) __shared__ float always[R > 0 ? R * ROWS : 1];
  alignas(16) __shared__ unsigned char own[WARPS][OWN_BYTES];
  alignas(16) __shared__ u32 staged[WARPS][STAGED ? UNROLL : 1][STAGED ? CH : 1][32][STAGED ? WORDS : 1];
  alignas(16) __shared__ char ahead[WARPS][AHEAD_BYTES];
  __shared__ float merged[WARPS][ROWS][2];
  __shared__ int bounds[2][ROWS];
  __shared__ int bad[ROWS];
  alignas(16) __shared__ float sum_ahead[WARPS][MMA ? DV : 4];

  let_next_kernel_start();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, batch = blockIdx.y, split = blockIdx.z;
  const int group = p.hq / p.hkv, total_rows = group * p.sq, chunks = (total_rows + ROWS - 1) / ROWS;
  const int head = blockIdx.x / chunks, row0 = (blockIdx.x % chunks) * ROWS;
  const int length = p.lengths[batch];
  const Range range = range_of(p, length);
  if (split >= range.splits) return;

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
#if SFA_QTOPK
  // A warp ranks the features of a row: by magnitude, NaN first, then by number.
  constexpr int MINE = (D + 31) / 32;
#pragma unroll 1
  for (int r = warp; r < ROWS; r += WARPS) {
    const bool real = row0 + r < total_rows;
    const i64 q_row = ((i64)batch * p.sq + (row0 + r) / group) * p.hq + head * group + (row0 + r) % group;
    float x[MINE];
    u32 key[MINE], members = 0;
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
      int u = lane + 32 * i;
      x[i] = real && u < D ? scalar<SFA_CODE>(p.q_values, q_row * D + u) : 0.0f;
      key[i] = u < D ? min(__float_as_uint(x[i]) & 0x7fffffffu, 0x7f800001u) + 1 : 0;
    }
    for (int j = 0; j < R; ++j) {
      int always_on = ((const int*)p.q_dense)[j];
#pragma unroll
      for (int i = 0; i < MINE; ++i)
        if (lane + 32 * i == always_on) {
          key[i] = 0;
          if (x[i] - x[i] != 0.0f) bad[r] = 1;
          always[j * ROWS + r] = x[i] * p.scale;
        }
    }
#pragma unroll 1
    for (int e = 0; e < p.wq; ++e) {
      u32 best = 0, at = 0;
#pragma unroll
      for (int i = 0; i < MINE; ++i) best = max(best, key[i]);
      best = warp_max_u32(best);
#pragma unroll
      for (int i = MINE - 1; i >= 0; --i)
        if (key[i] == best) at = ~(u32)(lane + 32 * i);
      at = ~warp_max_u32(at);
#pragma unroll
      for (int i = 0; i < MINE; ++i)
        if (lane + 32 * i == at) {
          members |= 1u << i;
          key[i] = 0;
        }
    }
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
      int u = lane + 32 * i;
      if (u >= D) continue;
      bool member = members >> i & 1;
      if (member && x[i] - x[i] != 0.0f) bad[r] = 1;
      float entry = member ? x[i] * p.scale : 0.0f;
      // The lowest bit says that the feature is kept.
      if (!ALL) entry = as_float((__float_as_uint(entry) & ~1u) | (member && real ? 1u : 0u));
#pragma unroll 4
      for (int j = 0; j < REP; ++j) table[((r / RV * D + u) * REP + (j + lane) % REP) * RV + r % RV] = entry;
    }
  }
  if (!ALL && !DROP && ROWS > 1) {  // by any row, in row 0
    __syncthreads();
    for (int u = threadIdx.x; u < D; u += THREADS) {
      u32 kept = 0;
#pragma unroll
      for (int r = 0; r < ROWS; ++r) kept |= __float_as_uint(table[(r / RV * D + u) * REP * RV + r % RV]) & 1u;
      for (int j = 0; j < REP; ++j) {
        float* entry = table + (u * REP + j) * RV;
        *entry = as_float(__float_as_uint(*entry) | kept);
      }
    }
  }
#else
  for (int u = threadIdx.x; u < D + R; u += THREADS) {
    float x[ROWS];
    bool member = false;
    u32 members = 0;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      x[r] = 0.0f;
      if (row0 + r >= total_rows) continue;
      int token = (row0 + r) / group, h = head * group + (row0 + r) % group;
      i64 q_row = ((i64)batch * p.sq + token) * p.hq + h;
      if (u >= D) {
        x[r] = scalar<SFA_CODE>(p.q_dense, q_row * R + (u - D));
      } else if (SFA_QDENSE) {
        x[r] = scalar<SFA_CODE>(p.q_values, q_row * D + u);
      } else {
        for (int e = 0; e < p.wq; ++e) {
          i64 at = q_row * p.wq + e;
          int index = IB == 1 ? (int)((const u8*)p.q_indices)[at] : (int)((const u16*)p.q_indices)[at];
          if (index == u) {
            x[r] += scalar<SFA_CODE>(p.q_values, at);
            members |= 1u << r;
            member = true;
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
    // The lowest bit of an entry says that the feature is kept: by any row in row 0, in drop mode by each row.
    if (!ALL) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        bool kept = DROP ? members >> r & 1 : member && r == 0;
        if (DROP || r == 0) x[r] = as_float((__float_as_uint(x[r]) & ~1u) | (kept ? 1u : 0u));
      }
    }
#pragma unroll
    for (int g = 0; g < RG; ++g) {
      Floats<RV> entry;
#pragma unroll
      for (int r = 0; r < RV; ++r) entry.x[r] = x[g * RV + r];
#pragma unroll 4
      for (int i = 0; i < REP; ++i)
        *(Floats<RV>*)(table + ((g * D + u) * REP + (i + lane) % REP) * RV) = entry;
    }
  }
#endif
  __syncthreads();

  const float* my_table = table + lane % REP * RV;
  u32* queue_row = (u32*)own[warp];
  float* queue_weight = (float*)own[warp] + BLOCK;
  u16* queue_parts = (u16*)queue_weight;  // with MMA: [tile of 16][token % 4][column][token / 4 % 4]
  if constexpr (MMA) {
#pragma unroll
    for (int i = 0; i < BLOCK * COLUMNS / 2; i += 32) ((u32*)queue_parts)[i + lane] = 0;
  }
  const int* pages = p.pages + (i64)batch * p.pages_stride;
  const int* sum_rows = p.sum_rows + (i64)batch * p.sums_stride;
  const int sub = MMA ? lane % 4 : lane / LPR, column = MMA ? lane / 4 : lane % LPR;

  // Lane r keeps the maximum, the weight and mu of row r.
  constexpr int ACC_ROWS = MMA ? TILES : ROWS, ACC_EACH = MMA ? 4 : ACC;
  float my_m = NEG_INF, my_z = 0.0f, my_mu = 0.0f, acc[ACC_ROWS][ACC_EACH];
#pragma unroll
  for (int r = 0; r < ACC_ROWS; ++r)
#pragma unroll
    for (int e = 0; e < ACC_EACH; ++e) acc[r][e] = 0.0f;
  int rows_read = 0;
  const int end = min(range.last, range.first + (split + 1) * range.span);

  const int first = range.first + split * range.span + warp;
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
  auto fetch_scales = [&](const u32 (&row)[TPL]) {
    if constexpr (SCALES) {
#pragma unroll
      for (int i = 0; i < TPL; ++i) load<2>(p.v_scale + row[i], &v_scale[i]);
    }
  };
  if constexpr (AHEAD) {
    if (first < end) {
      locate(first, row);
      fetch_codes(row);
      fetch_scales(row);
    }
  }
  const u32 real = MMA ? (1u << min(ROWS, total_rows - row0)) - 1 : 0;

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
    u32 next[TPL];
    if constexpr (AHEAD) {
      locate(min(block + WARPS, end - 1), next);
    } else {
      locate(block, row);
      fetch_scales(row);
    }
    const bool mixed = DROP || (whole & real) != real;

    u32 visible[TPL], flag[TPL][FLAGS];
    float s[TPL][ROWS];
#pragma unroll
    for (int i = 0; i < TPL; ++i) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) s[i][r] = 0.0f;
#pragma unroll
      for (int r = 0; r < FLAGS; ++r) flag[i][r] = 0;
    }
    if constexpr (AHEAD) wait_groups<0>();
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
        if (DROP) is = is && (flag[i][r] & 1);
        visible[i] |= is ? 1u << r : 0u;
      }
      read[i] = visible[i] != 0 && (ALL || DROP || edge || (flag[i][0] & 1));
      if (!ALL && !DROP) unread += __popc(__ballot_sync(~0u, visible[i] != 0 && !read[i]));
    }
    bool use_sum = unread > 0, cancels = false;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float top = NEG_INF, weight = 0.0f, before = __shfl_sync(~0u, my_m, r);
#pragma unroll
      for (int i = 0; i < TPL; ++i)
        if (visible[i] >> r & 1) top = fmaxf(top, s[i][r]);
      top = fmaxf(warp_max(top), before);
      if (top > before) {
        float factor = ex2(before - top);
        if constexpr (MMA) {
          // The lane's accumulators belong to rows 2 c and 2 c + 1.
          if (sub % (LOW / 2) == r / 2)
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
              acc[t][r % 2] *= factor;
              acc[t][2 + r % 2] *= factor;
            }
        } else {
#pragma unroll
          for (int e = 0; e < ACC; ++e) acc[r % ACC_ROWS][e % ACC_EACH] *= factor;
        }
        if (lane == r) my_z *= factor;
      }
      float base = finite_max(top);
#pragma unroll
      for (int i = 0; i < TPL; ++i) {
        s[i][r] = visible[i] >> r & 1 ? ex2(s[i][r] - base) : 0.0f;  // the weight from here on
        weight += s[i][r];
      }
      weight = warp_sum(weight);
      float mu = use_sum && (whole >> r & 1) ? ex2(-base) : 0.0f;
      cancels |= mu * (float)(stop - start) > 4.0f * weight;
      if (lane == r) {
        my_m = top;
        my_z += weight;
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
        float mu = __shfl_sync(~0u, my_mu, r);
#pragma unroll
        for (int i = 0; i < TPL; ++i) s[i][r] -= mu;
      }
    }

    // The queue of rows to read.
    __syncwarp();
    int count = 0;
#pragma unroll
    for (int i = 0; i < TPL; ++i) {
      u32 mask = __ballot_sync(~0u, read[i] != 0);
      if (read[i]) {
        int at = count + __popc(mask & ((1u << lane) - 1));
        float scale = UP;  // 1 but for MMA
        if constexpr (SFA_V >= 3) {
          scale = as_float((SCALES ? v_scale[i] : (u32)p.v_scale[row[i]]) << 16);  // bf16
        }
        queue_row[at] = row[i];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          // The scale of a row that is not finite is not either, and must not reach who does not see it.
          if constexpr (MMA) {
            float weight = s[i][r] == 0.0f ? 0.0f : s[i][r] * scale;
            u16* to = queue_parts + ((at / 16 * 4 + at % 4) * COLUMNS + r) * 4 + at / 4 % 4;
            u16 high = to_weight(weight);
            to[0] = high;
            to[LOW * 4] = to_weight(weight - from_weight(high));
          } else {
            queue_weight[at * ROWS + r] = s[i][r] == 0.0f ? 0.0f : s[i][r] * scale;
          }
        }
      }
      count += __popc(mask);
    }
    __syncwarp();
    rows_read += count;
    if constexpr (AHEAD) {
#pragma unroll
      for (int i = 0; i < TPL; ++i) row[i] = next[i];
      if (block + WARPS < end) {
        fetch_codes(row);
        fetch_scales(row);
      }
    }

    float sum[ACC];
    if (MMA && use_sum) {
      const float* sums = p.sums + ((i64)sum_row * p.hkv + head) * DV;
      for (int i = lane * 4; i < DV; i += 128) copy_async<16>(sum_ahead[warp] + i, sums + i);
      close_group();
    }
    if (!MMA && use_sum && sub == 0) {
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

    // What one row of the queue adds.
    auto add = [&](int j, const u32 (&data)[CH][WORDS]) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        float weight = queue_weight[j * ROWS + r];
        // A row that does not see the token must not meet its V, which may not be finite.
        if (ROWS == 1 || weight != 0.0f) {
#pragma unroll
          for (int e = 0; e < ACC; ++e)
            acc[r % ACC_ROWS][e % ACC_EACH] = fmaf(weight, v_element(data[e / EPV], e % EPV), acc[r % ACC_ROWS][e % ACC_EACH]);
        }
      }
    };
    auto v_row = [&](int j) { return (const char*)p.v + (i64)queue_row[j] * (DV * VB); };
    if constexpr (STAGED) {
      auto fetch = [&](int j, int u) {
        if (j < count) {
#pragma unroll
          for (int k = 0; k < CH; ++k)
            if (column + k * LPR < CHUNKS)
              copy_async<VEC>(staged[warp][u][k][lane], v_row(j) + (column + k * LPR) * VEC);
        }
        close_group();
      };
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) fetch(u * RPL + sub, u);
      if constexpr (MMA) {
#pragma unroll 1
        for (int base = 0; base < count; base += 4 * UNROLL) {
#pragma unroll
          for (int tile = 0; tile < UNROLL / 4; ++tile) {
            u32 data[4][CH][WORDS];
            const int from = base + 16 * tile;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              int j = from + 4 * i + sub, u = 4 * tile + i;
              wait_groups<UNROLL - 1>();
#pragma unroll
              for (int k = 0; k < CH; ++k) {
                Words<WORDS> piece = *(const Words<WORDS>*)staged[warp][u % UNROLL][k][lane];
#pragma unroll
                for (int word = 0; word < WORDS; ++word) data[i][k][word] = j < count ? piece.x[word] : 0;
              }
              fetch(j + 4 * UNROLL, u);
            }
            const u16* weights = queue_parts + ((from / 16 * 4 + sub) * COLUMNS + column) * 4;
            if (from < count) {
              if (VB == 2 && mixed) take_out(data, weights, lane, acc);
              multiply_tile(data, weights, acc);
            }
          }
        }
      } else {
#pragma unroll 1
      for (int base = 0; base < count; base += RPL * UNROLL) {
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
          int j = base + u * RPL + sub;
          u32 data[CH][WORDS];
          wait_groups<UNROLL - 1>();
#pragma unroll
          for (int k = 0; k < CH; ++k)
#pragma unroll
            for (int i = 0; i < WORDS; ++i) data[k][i] = staged[warp][u][k][lane][i];
          fetch(j + RPL * UNROLL, u);
          if (j < count) add(j, data);
        }
      }
      }
    } else {
#pragma unroll 1
      for (int base = 0; base < count; base += RPL * UNROLL) {
        u32 data[UNROLL][CH][WORDS];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
          int j = base + u * RPL + sub;
#pragma unroll
          for (int k = 0; k < CH; ++k)
            if (j < count && column + k * LPR < CHUNKS) load<VEC>(v_row(j) + (column + k * LPR) * VEC, data[u][k]);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
          if (base + u * RPL + sub < count) add(base + u * RPL + sub, data[u]);
      }
    }
    if (MMA && use_sum) {
      float mu[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        mu[i] = __shfl_sync(~0u, my_mu, 2 * sub + i);
        if (2 * sub + i >= ROWS) mu[i] = 0.0f;  // the columns of the lower parts
      }
      wait_groups<0>();
      __syncwarp();
#pragma unroll
      for (int t = 0; t < ACC_ROWS; ++t)
#pragma unroll
        for (int e = 0; e < ACC_EACH; ++e) {
          float x = sum_ahead[warp][(column + t / (EPV / 2) * 8) * EPV + t % (EPV / 2) * 2 + e / 2];
          if (mu[e % 2] != 0.0f) acc[t][e] = fmaf(UP * mu[e % 2], x, acc[t][e]);
        }
    } else if (use_sum) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        float mu = __shfl_sync(~0u, my_mu, r);
        if (sub == 0 && (ROWS == 1 || mu != 0.0f)) {
#pragma unroll
          for (int e = 0; e < ACC; ++e)
            acc[r % ACC_ROWS][e % ACC_EACH] = fmaf(mu, sum[e], acc[r % ACC_ROWS][e % ACC_EACH]);
        }
      }
    }
  }

  // Merge the lanes that hold the same columns, then the warps.
#pragma unroll
  for (int r = 0; r < ACC_ROWS; ++r) {
#pragma unroll
    for (int e = 0; e < ACC_EACH; ++e) {
      if constexpr (MMA) {
        if constexpr (LOW == 4) acc[r][e] += __shfl_xor_sync(~0u, acc[r][e], 2);
      } else {
#pragma unroll
        for (int offset = LPR; offset < 32; offset *= 2) acc[r][e] += __shfl_xor_sync(~0u, acc[r][e], offset);
      }
    }
  }
  __syncwarp();
  float* own_o = (float*)own[warp];
  if constexpr (MMA) {
#pragma unroll
    for (int t = 0; t < ACC_ROWS; ++t)
#pragma unroll
      for (int e = 0; e < ACC_EACH; ++e) {
        int r = 2 * sub + e % 2, c = (column + t / (EPV / 2) * 8) * EPV + t % (EPV / 2) * 2 + e / 2;
        if (r < ROWS) own_o[r * DV + c] = acc[t][e] / UP;
      }
  } else if (sub == 0) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int k = 0; k < CH; ++k)
        if (column + k * LPR < CHUNKS)
#pragma unroll
          for (int e = 0; e < EPV; ++e)
            own_o[r * DV + (column + k * LPR) * EPV + e] = acc[r % ACC_ROWS][(k * EPV + e) % ACC_EACH];
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
      float factor = ex2(merged[w][r][0] - base);
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

constexpr int COMBINE_WARPS = 16, CV = DV % 4 == 0 ? 4 : 1, CC = (DV / CV + 31) / 32;

extern "C" __global__ void __launch_bounds__(32 * COMBINE_WARPS) sfa_combine(const Params p) {
  __shared__ float rows[COMBINE_WARPS][DV];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int batch = blockIdx.y, token = blockIdx.x / p.hq, h = blockIdx.x % p.hq;
  const i64 q_row = ((i64)batch * p.sq + token) * p.hq + h;
  const int splits = range_of(p, p.lengths[batch]).splits;
  wait_for_kernel();
  const float* ml = p.part_ml + 2 * q_row * p.part_stride;
  const float* part_o = p.part_o + q_row * p.part_stride * DV;

  float top = NEG_INF;
  for (int i = lane; i < splits; i += 32) top = fmaxf(top, ml[2 * i]);
  top = warp_max(top);
  const float base = finite_max(top);
  float total = 0.0f;
  for (int i = lane; i < splits; i += 32) total = fmaf(ex2(ml[2 * i] - base), ml[2 * i + 1], total);
  total = warp_sum(total);

  float acc[CC * CV];
#pragma unroll
  for (int e = 0; e < CC * CV; ++e) acc[e] = 0.0f;
#pragma unroll 8
  for (int i = warp; i < splits; i += COMBINE_WARPS) {
    float factor = ex2(ml[2 * i] - base);
#pragma unroll
    for (int k = 0; k < CC; ++k) {
      int c = (lane + k * 32) * CV;
      if (c < DV) {
        Floats<CV> part = *(const Floats<CV>*)(part_o + (i64)i * DV + c);
#pragma unroll
        for (int j = 0; j < CV; ++j) acc[k * CV + j] = fmaf(factor, part.x[j], acc[k * CV + j]);
      }
    }
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

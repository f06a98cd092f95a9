// FlashSFA as the paper publishes it (Algorithm 1): sparse queries, keys stored by feature, posting lists intersected
// tile by tile, scores added up on chip, online softmax, no n x n. No headers: NVRTC alone compiles this file.
//
// sfa_pages: turns the codes of PAGE keys of one kv head into posting lists (layout: intersect.py, `FeaturePages`).
// sfa_intersect: a thread owns a query row. It walks the row's lists, a group of four entries at a time, and adds
//   q_u k_u to its own column of a PAGE x 32 tile of fp32 scores in shared memory. A column is a bank: no conflicts, no
//   atomics, and an order of additions that never changes. Then, 32 keys at a time: mask, running maximum, exp2,
//   probabilities to the fragments of mma.m16n8k16, P V on tensor cores. fp32 takes the same steps with FMA for P V.
//
// Set by the launcher: SFA_D, SFA_WQ, SFA_WK (entries of a query, a key), SFA_DV, SFA_DVC (columns of V a thread block
// takes), SFA_KIND (0 bf16, 1 fp16, 2 fp32), SFA_DROP, SFA_AHEAD (the next page's lists come while this one is worked
// on), SFA_WGMMA (P V by warpgroups, sm_90a), SFA_PAGE, SFA_GROUP, SFA_WARPS, SFA_CTAS.

#ifdef SFA_HOST
#include SFA_HOST
#else
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;
typedef unsigned long long u64;

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

// Two floats in 16 bits each; the first in the low half.
template <int KIND>
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 y;
  if constexpr (KIND == 0) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  }
  return y;
}

__device__ __forceinline__ void copy_async_16(void* shared, const void* p) {
  u32 to = (u32)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(p) : "memory");
}

__device__ __forceinline__ void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wait_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices of 16 bits, transposed; lane i brings the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(const void* shared, u32 (&r)[4]) {
  u32 from = (u32)__cvta_generic_to_shared(shared);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
}

// c += a b: a 16 x 16, b 16 x 8.
template <int KIND>
__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if constexpr (KIND == 0) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

#if SFA_WGMMA
#define F4(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])

// c += a v for a warpgroup: a 16 rows of each warp x 16 keys, v 16 keys x 8 NT columns in shared memory; it completes
// later.
template <int KIND>
__device__ __forceinline__ void mma_group(float (&c)[16][4], const u32 (&a)[4], u64 v) {
  if constexpr (KIND == 0) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
        "}, {%64,%65,%66,%67}, %68, p, 1, 1, 1;\n}\n"
        : F4(0), F4(1), F4(2), F4(3), F4(4), F4(5), F4(6), F4(7), F4(8), F4(9), F4(10), F4(11), F4(12), F4(13), F4(14), F4(15)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(v));
  } else {
    asm volatile(
        "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
        "}, {%64,%65,%66,%67}, %68, p, 1, 1, 1;\n}\n"
        : F4(0), F4(1), F4(2), F4(3), F4(4), F4(5), F4(6), F4(7), F4(8), F4(9), F4(10), F4(11), F4(12), F4(13), F4(14), F4(15)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(v));
  }
}

template <int KIND>
__device__ __forceinline__ void mma_group(float (&c)[8][4], const u32 (&a)[4], u64 v) {
  if constexpr (KIND == 0) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
        "}, {%32,%33,%34,%35}, %36, p, 1, 1, 1;\n}\n"
        : F4(0), F4(1), F4(2), F4(3), F4(4), F4(5), F4(6), F4(7)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(v));
  } else {
    asm volatile(
        "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
        "}, {%32,%33,%34,%35}, %36, p, 1, 1, 1;\n}\n"
        : F4(0), F4(1), F4(2), F4(3), F4(4), F4(5), F4(6), F4(7)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(v));
  }
}

// V from a key on: parts of 64 columns, a line of 128 bytes a key, 16-byte pieces swizzled over 8 keys.
template <int PART_BYTES>
__device__ __forceinline__ u64 describe(const char* v) {
  const u32 at = (u32)__cvta_generic_to_shared(v);
  return (u64)((at & 0x3ffff) >> 4) | (u64)(PART_BYTES >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

__device__ __forceinline__ void group_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void group_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until then c and a must not be touched; the compiler must not move anything up past it.
template <int N>
__device__ __forceinline__ void group_wait(float (&c)[2][N][4]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(c[i][n][e])::"memory");
}

// What this thread wrote to shared memory is seen by wgmma.
__device__ __forceinline__ void show_to_group() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#endif

extern __shared__ __align__(1024) char shared_memory[];
#endif

constexpr int D = SFA_D, WQ = SFA_WQ, WK = SFA_WK, DV = SFA_DV, DVC = SFA_DVC, KIND = SFA_KIND;
constexpr int PAGE = SFA_PAGE, GROUP = SFA_GROUP, WARPS = SFA_WARPS, THREADS = 32 * WARPS, ROWS = 32 * WARPS;
constexpr bool DROP = SFA_DROP, AHEAD = SFA_AHEAD, WGMMA = SFA_WGMMA, FP32 = KIND == 2;
constexpr int SIZE = FP32 ? 4 : 2;  // bytes of a value
static_assert(!WGMMA || (!FP32 && WARPS % 4 == 0 && (DVC == 64 || DVC == 128)), "warpgroups");
static_assert(PAGE % 32 == 0 && PAGE <= 256 && DVC % 16 == 0 && DV % 16 == 0, "shape");

__host__ __device__ constexpr int min_of(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int up(int n, int to) { return (n + to - 1) / to * to; }

// The most entries of a page: every list may be padded to whole groups.
constexpr int CAP = up(PAGE * WK + min_of(D, PAGE * WK) * (GROUP - 1), 16);
constexpr int OFFSETS = up(D + 1, 8);  // a page's offsets, rounded up to whole copies of 16 bytes

struct alignas(16) Four {
  u32 x[4];
};

__device__ __forceinline__ float as_float(u32 x) { return __uint_as_float(x); }

__device__ __forceinline__ float widen(u32 bits) {  // a 16-bit value
  return KIND == 0 ? as_float(bits << 16) : from_half((u16)bits);
}

__device__ __forceinline__ int feature(const void* indices, i64 at) {
  return D <= 256 ? ((const u8*)indices)[at] : ((const short*)indices)[at];
}

// ------------------------------------------------------------------------------------------------ keys by feature

struct PageParams {
  const void *values, *indices;  // (b, sk, hkv, WK)
  short* offsets;                // (b, hkv, pages, OFFSETS)
  u8* ids;                       // (b, hkv, pages, CAP)
  void* out;                     // (b, hkv, pages, CAP), as values
  int sk, hkv, pages;
};

extern "C" __global__ void __launch_bounds__(PAGE) sfa_pages(const PageParams p) {
  __shared__ u32 keys[D][PAGE / 32];  // by feature, a bit a key
  __shared__ int sums[PAGE], starts[D];
  const int t = threadIdx.x, page = blockIdx.x % p.pages, head = blockIdx.x / p.pages % p.hkv;
  const i64 batch = blockIdx.x / p.pages / p.hkv, key = (i64)page * PAGE + t;
  const i64 row = ((batch * p.sk + key) * p.hkv + head) * WK;
  const bool real = key < p.sk;

  for (int i = t; i < D * (PAGE / 32); i += PAGE) keys[i / (PAGE / 32)][i % (PAGE / 32)] = 0;
  __syncthreads();
  if (real)
    for (int e = 0; e < WK; ++e) atomicOr(&keys[feature(p.indices, row + e)][t / 32], 1u << (t % 32));
  __syncthreads();

  constexpr int EACH = (D + PAGE - 1) / PAGE;
  int mine = 0, counts[EACH];
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    counts[i] = 0;
    if (t * EACH + i < D)
      for (int w = 0; w < PAGE / 32; ++w) counts[i] += __popc(keys[t * EACH + i][w]);
    mine += up(counts[i], GROUP);
  }
  sums[t] = mine;
  __syncthreads();
  int at = 0;
  for (int i = 0; i < t; ++i) at += sums[i];
  const i64 first = (i64)blockIdx.x * CAP;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int u = t * EACH + i, padded = up(counts[i], GROUP);
    if (u < D) {
      starts[u] = at;
      p.offsets[(i64)blockIdx.x * OFFSETS + u] = (short)at;
      for (int j = counts[i]; j < padded; ++j) {
        p.ids[first + at + j] = (u8)PAGE;
        if (FP32) ((float*)p.out)[first + at + j] = 0.0f;
        if (!FP32) ((u16*)p.out)[first + at + j] = 0;
      }
      at += padded;
      if (u == D - 1) p.offsets[(i64)blockIdx.x * OFFSETS + D] = (short)at;
    }
  }
  __syncthreads();
  if (!real) return;
  for (int e = 0; e < WK; ++e) {
    const int u = feature(p.indices, row + e);
    // A code fills up by repeating its last index with value 0: once is enough.
    if (e > 0 && u == feature(p.indices, row + e - 1)) continue;
    int rank = __popc(keys[u][t / 32] & ((1u << (t % 32)) - 1));
    for (int w = 0; w < t / 32; ++w) rank += __popc(keys[u][w]);
    const i64 to = first + starts[u] + rank;
    p.ids[to] = (u8)t;
    if (FP32) ((float*)p.out)[to] = ((const float*)p.values)[row + e];
    if (!FP32) ((u16*)p.out)[to] = ((const u16*)p.values)[row + e];
  }
}

// ------------------------------------------------------------------------------------------------ attention

struct Params {
  const void *q_values, *q_indices;  // (b, sq, hq, WQ)
  const short* offsets;
  const u8* ids;
  const void *k_values, *v;
  void* out;   // (b, sq, hq, DV)
  float* lse;  // (b, hq, sq)
  i64 v_batch, v_row, v_head;
  float scale;  // |softmax_scale| * log2(e)
  int sign, sq, sk, hq, hkv, left, right, pages, tiles, chunks;
};

#define NEG_INF as_float(0xff800000u)
#define NOT_A_NUMBER as_float(0x7fc00000u)
constexpr u32 BLANK = DROP ? 0x80000000u : 0u;  // a score without an entry: -0, which a sum of entries never is
constexpr int LINE = 128;                       // bytes of a key in a tile: 32 rows
constexpr int TILE = (PAGE + 1) * LINE;         // the last line takes the padding of lists
constexpr int CHUNK = 32;                       // keys of a softmax step
constexpr int V_LINE = (DVC <= 64 ? 64 : 128) * SIZE, PIECES = DVC * SIZE / 16;
constexpr int PART = PAGE * 128;                // bytes of 64 columns of V in 16 bits
constexpr int NT = DVC / 8;
constexpr float LAZY = 8.0f;  // growth of the running maximum, in powers of 2, before the output is rescaled

// Shared memory, in this order; a value beside its word only in fp32.
constexpr int AT_V = 0, AT_TILES = PAGE * V_LINE, AT_WORDS = AT_TILES + WARPS * TILE;
constexpr int AT_VALUES = AT_WORDS + (CAP + 4) * 4, AT_LISTS = AT_VALUES + (FP32 ? (CAP + 4) * 4 : 0);
constexpr int AT_Q = AT_LISTS + up((D + 1) * 4, 16), AT_Q_VALUES = AT_Q + WQ * ROWS * 4;
constexpr int AT_BAD = AT_Q_VALUES + (FP32 ? WQ * ROWS * 4 : 0);
// A page's lists as they lie in memory: offsets, ids, values.
constexpr int AT_RAW = AT_BAD + up(PAGE / 32 * 4, 16), RAW_IDS = AT_RAW + OFFSETS * 2, RAW_VALUES = RAW_IDS + CAP;
constexpr int SHARED = AHEAD ? RAW_VALUES + CAP * SIZE : AT_RAW;

// Where piece c (16 bytes) of the V row of a key is.
__device__ __forceinline__ int v_place(int key, int c) {
  if (FP32) return AT_V + key * V_LINE + c * 16;
  return AT_V + c / 8 * PART + key * 128 + (c % 8 ^ key % 8) * 16;
}

// Four entries of a list: where they go in a tile, and their values.
struct Group {
  u32 to[4];
  float k[4];
};

__device__ __forceinline__ Group load_group(const char* memory, u32 at) {
  Group g;
  Four words = *(const Four*)(memory + AT_WORDS + at * 16);
  if constexpr (FP32) {
    Four values = *(const Four*)(memory + AT_VALUES + at * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) g.to[i] = words.x[i], g.k[i] = as_float(values.x[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      g.to[i] = words.x[i] & 0xffffu;
      g.k[i] = KIND == 0 ? as_float(words.x[i] & 0xffff0000u) : from_half((u16)(words.x[i] >> 16));
    }
  }
  return g;
}

// column[key] += q k for four keys, which differ unless they are padding.
__device__ __forceinline__ void add_group(char* column, const Group& g, float q) {
  float s[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) s[i] = *(const float*)(column + g.to[i]);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    s[i] = fmaf(q, g.k[i], s[i]);
    if (DROP) s[i] += 0.0f;  // -0 becomes 0
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) *(float*)(column + g.to[i]) = s[i];
}

extern "C" __global__ void __launch_bounds__(THREADS, SFA_CTAS) sfa_intersect(const Params p) {
  char* const memory = shared_memory;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Long rows of a causal head first.
  i64 block = blockIdx.x;
  const int tile_row = (p.tiles - 1 - (int)(block % p.tiles)) * ROWS;
  block /= p.tiles;
  const int chunk = (int)(block % p.chunks);
  block /= p.chunks;
  const int head = (int)(block % p.hq), kv_head = head / (p.hq / p.hkv);
  const i64 batch = block / p.hq;

  const int shift = p.sk - p.sq;
  auto low = [&](int i) { return p.left < 0 ? 0 : max(0, i + shift - p.left); };
  auto high = [&](int i) { return p.right < 0 ? p.sk : max(0, min(p.sk, i + shift + p.right + 1)); };
  const int row0 = tile_row + warp * 32, row = row0 + lane, last_row = min(row0 + 31, p.sq - 1);
  const int lo = row < p.sq ? low(row) : 0, hi = row < p.sq ? high(row) : 0;
  // Keys that any row of the warp (or warpgroup) sees, and keys that all rows of the warp see.
  constexpr int TOGETHER = WGMMA ? 128 : 32;
  const int any_row0 = row0 / TOGETHER * TOGETHER, any_last = min(any_row0 + TOGETHER, p.sq) - 1;
  const int any_lo = low(any_row0), any_hi = any_row0 < p.sq ? high(any_last) : 0;
  const int all_lo = low(last_row), all_hi = high(row0);
  const int first_page = low(tile_row) / PAGE;
  const int end_page = min(p.pages, (high(min(tile_row + ROWS, p.sq) - 1) + PAGE - 1) / PAGE);

  char* const tile = memory + AT_TILES + warp * TILE;
  char* const column = tile + lane * 4;
  u32* const lists = (u32*)(memory + AT_LISTS);  // by feature: first group, end << 16
  u32* const q_words = (u32*)(memory + AT_Q) + threadIdx.x;
  float* const q_values = (float*)(memory + AT_Q_VALUES) + threadIdx.x;
  u32* const bad_keys = (u32*)(memory + AT_BAD);

  for (int i = lane; i < TILE / 16; i += 32) *(Four*)(tile + i * 16) = Four{{BLANK, BLANK, BLANK, BLANK}};
  if (threadIdx.x < 4) {
    // The group of a row that has no entry left.
    ((u32*)(memory + AT_WORDS))[CAP + threadIdx.x] = PAGE * LINE;
    if (FP32) ((float*)(memory + AT_VALUES))[CAP + threadIdx.x] = 0.0f;
  }
  if (threadIdx.x == 0) lists[D] = 0;
  bool bad_q = false;
  const i64 q_row = ((batch * p.sq + row) * p.hq + head) * WQ;
  for (int f = 0; f < WQ; ++f) {
    u32 u = D;
    if (row < p.sq) u = feature(p.q_indices, q_row + f);
    if constexpr (FP32) {
      float x = row < p.sq ? ((const float*)p.q_values)[q_row + f] : 0.0f;
      bad_q |= x - x != 0.0f;
      q_words[f * ROWS] = u;
      q_values[f * ROWS] = p.sign == 0 ? 0.0f : p.sign < 0 ? -x : x;
    } else {
      u32 x = row < p.sq ? ((const u16*)p.q_values)[q_row + f] : 0;
      bad_q |= widen(x) - widen(x) != 0.0f;
      q_words[f * ROWS] = u | (p.sign == 0 ? 0 : p.sign < 0 ? x ^ 0x8000u : x) << 16;
    }
  }
  auto q_value = [&](int f, u32 word) {
    if constexpr (FP32) return q_values[f * ROWS];
    return KIND == 0 ? as_float(word & 0xffff0000u) : from_half((u16)(word >> 16));
  };

  const i64 pages = (batch * p.hkv + kv_head) * p.pages;
  auto fetch = [&](int page) {
    const i64 at = pages + page;
    for (int i = threadIdx.x; i < (OFFSETS * 2 + CAP * (1 + SIZE)) / 16; i += THREADS) {
      const int byte = i * 16;
      const char* from = byte < OFFSETS * 2 ? (const char*)(p.offsets + at * OFFSETS) + byte
                         : byte < OFFSETS * 2 + CAP
                             ? (const char*)p.ids + at * CAP + (byte - OFFSETS * 2)
                             : (const char*)p.k_values + at * CAP * SIZE + (byte - OFFSETS * 2 - CAP);
      copy_async_16(memory + AT_RAW + byte, from);
    }
  };

  float m, l, acc[2][NT][4];
  bool spoiled = false, careful = false;
  // A second time, with care, if the result is not finite: then P V must not mix 0 with a value that is not seen.
  for (;;) {
    m = NEG_INF, l = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c) acc[i][n][c] = 0.0f;

    if (AHEAD && first_page < end_page) fetch(first_page);
    close_group();
#pragma unroll 1
    for (int page = first_page; page < end_page; ++page) {
      const int start = page * PAGE;
      if (AHEAD) wait_groups<0>();
      __syncthreads();  // the page's lists are here, and nobody reads the last page any more
      {
        const i64 v0 = batch * p.v_batch + kv_head * p.v_head + chunk * DVC;
        for (int i = threadIdx.x; i < PAGE * PIECES; i += THREADS) {
          const int key = i / PIECES, c = i % PIECES;
          char* to = memory + v_place(key, c);
          if (start + key < p.sk && chunk * DVC + c * (16 / SIZE) < DV) {
            copy_async_16(to, (const char*)p.v + (v0 + (start + key) * p.v_row) * SIZE + c * 16);
          } else {
            *(Four*)to = Four{{0, 0, 0, 0}};
          }
        }
        close_group();
        const i64 at = pages + page;
        const short* offsets = AHEAD ? (const short*)(memory + AT_RAW) : p.offsets + at * OFFSETS;
        const u8* page_ids = AHEAD ? (const u8*)(memory + RAW_IDS) : p.ids + at * CAP;
        const char* page_values = AHEAD ? memory + RAW_VALUES : (const char*)p.k_values + at * CAP * SIZE;
        for (int u = threadIdx.x; u < D; u += THREADS)
          lists[u] = (u32)offsets[u] / 4 | (u32)offsets[u + 1] / 4 << 16;
        const int groups = offsets[D] / 4;
#pragma unroll 4
        for (int g = threadIdx.x; g < groups; g += THREADS) {
          const u32 ids = *(const u32*)(page_ids + g * 4);
          Four words;
          if constexpr (FP32) {
            Four values = *(const Four*)(page_values + g * 16);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              words.x[i] = (ids >> (8 * i) & 0xffu) * LINE;
              float x = as_float(values.x[i]);
              if (x - x != 0.0f) values.x[i] = 0x7fc00000u;
            }
            *(Four*)(memory + AT_VALUES + g * 16) = values;
          } else {
            const u32* pair = (const u32*)(page_values + g * 8);
            const u32 pairs[2] = {pair[0], pair[1]};
            constexpr u32 EXPONENT = KIND == 0 ? 0x7f80u : 0x7c00u;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              u32 x = i % 2 ? pairs[i / 2] >> 16 : pairs[i / 2] & 0xffffu;
              if ((x & EXPONENT) == EXPONENT) x = 0x7fffu;  // an infinity spoils as a NaN does
              words.x[i] = (ids >> (8 * i) & 0xffu) * LINE | x << 16;
            }
          }
          *(Four*)(memory + AT_WORDS + g * 16) = words;
        }
        if (careful && threadIdx.x < PAGE / 32) bad_keys[threadIdx.x] = 0;
      }
      __syncthreads();
      if (AHEAD) {
        if (page + 1 < end_page) fetch(page + 1);
        close_group();
      }

      const bool seen = start < any_hi && start + PAGE > any_lo;
      if (seen) {
        // The next list is at hand when a row comes to the end of one.
        u32 g = CAP / 4, end = g, next = q_words[0], after = q_words[min_of(1, WQ - 1) * ROWS];
        u32 span = lists[next & 0xffffu];
        int begun = 0;
        float x = 0.0f;
        auto step = [&](Group& group) {
          if (g == end && begun < WQ) {
            g = span & 0xffffu, end = span >> 16;
            x = q_value(begun, next);
            ++begun;
            next = after;
            span = lists[next & 0xffffu];
            after = q_words[min(begun + 1, WQ - 1) * ROWS];
          }
          group = load_group(memory, g < end ? g : CAP / 4);
          if (g < end) ++g;
          return g < end || begun < WQ;
        };
        Group group;
        bool more = step(group);
#pragma unroll 1
        while (__any_sync(~0u, more)) {
          const Group now = group;
          const float q = x;
          more = step(group);
          add_group(column, now, q);
        }
        add_group(column, group, x);
        __syncwarp();
      }
      wait_groups<AHEAD ? 1 : 0>();  // V is here
#if SFA_WGMMA
      show_to_group();
#endif
      __syncthreads();
      if (careful) {
        for (int i = threadIdx.x; i < PAGE * PIECES * 16 / SIZE; i += THREADS) {
          const int key = i / (PIECES * 16 / SIZE), c = i % (PIECES * 16 / SIZE);
          char* at = memory + v_place(key, c * SIZE / 16);
          float x;
          if constexpr (FP32) {
            x = ((float*)at)[c % 4];
          } else {
            x = widen(((u16*)at)[c % 8]);
          }
          if (x - x != 0.0f) {
            if (FP32) ((float*)at)[c % 4] = 0.0f;
            if (!FP32) ((u16*)at)[c % 8] = 0;
            atomicOr(&bad_keys[key / 32], 1u << (key % 32));
          }
        }
#if SFA_WGMMA
        show_to_group();
#endif
        __syncthreads();
      }
      if (!seen) continue;

      u32 a[CHUNK / 16][2][4];  // probabilities as the products take them
#pragma unroll 1
      for (int c = 0; c < PAGE / CHUNK; ++c) {
        const int first = start + c * CHUNK;
        char* const lines = tile + c * CHUNK * LINE;
        if (first < any_hi && first + CHUNK > any_lo) {
          float s[CHUNK], tops[4];
#pragma unroll
          for (int k = 0; k < CHUNK; ++k) s[k] = *(const float*)(lines + k * LINE + lane * 4);
          if (DROP) {
#pragma unroll
            for (int k = 0; k < CHUNK; ++k)
              if (__float_as_uint(s[k]) == BLANK) s[k] = NEG_INF;
          }
          if (first < all_lo || first + CHUNK > all_hi) {
#pragma unroll
            for (int k = 0; k < CHUNK; ++k)
              if (first + k < lo || first + k >= hi) s[k] = NEG_INF;
          }
          if (careful) {
            u32 bad = bad_keys[c];
            for (int k = 0; k < CHUNK; ++k)
              if (bad >> k & 1 && first + k >= lo && first + k < hi) spoiled = true;
          }
#pragma unroll
          for (int k = 0; k < CHUNK; ++k) tops[k % 4] = k < 4 ? s[k] : fmaxf(tops[k % 4], s[k]);
          // fmaxf passes a NaN by, so none is left unless all are.
          const float top = fmaxf(fmaxf(fmaxf(tops[0], tops[1]), fmaxf(tops[2], tops[3])), NEG_INF) * p.scale;
          const bool grows = top > m + LAZY;
          const float factor = grows && m != NEG_INF ? ex2(m - top) : 1.0f;
          if (grows) m = top;
          l *= factor;
          auto rescale = [&] {
            if (!__any_sync(~0u, grows)) return;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float f = __shfl_sync(~0u, factor, i * 8 + lane / 4);
#pragma unroll
              for (int n = 0; n < NT; ++n) {
                acc[i / 2][n][i % 2 * 2] *= f;
                acc[i / 2][n][i % 2 * 2 + 1] *= f;
              }
            }
          };
          if (!WGMMA) rescale();
          const float base = m == NEG_INF ? 0.0f : m;
          float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
          for (int k = 0; k < CHUNK; ++k) {
            s[k] = ex2(fmaf(s[k], p.scale, -base));
            sums[k % 4] += s[k];
          }
          l += (sums[0] + sums[1]) + (sums[2] + sums[3]);
          if constexpr (FP32) {
#pragma unroll
            for (int k = 0; k < CHUNK; ++k) *(float*)(lines + k * LINE + lane * 4) = s[k];
            __syncwarp();
#pragma unroll 2
            for (int k = 0; k < CHUNK; ++k) {
              float w[4];
#pragma unroll
              for (int i = 0; i < 4; ++i) w[i] = *(const float*)(lines + k * LINE + (i * 8 + lane / 4) * 4);
              const float* v = (const float*)(memory + AT_V + (c * CHUNK + k) * V_LINE) + lane % 4 * 2;
#pragma unroll
              for (int n = 0; n < NT; ++n) {
                const float v0 = v[n * 8], v1 = v[n * 8 + 1];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                  float* a = acc[i / 2][n] + i % 2 * 2;
                  a[0] = fmaf(w[i], v0, a[0]);
                  a[1] = fmaf(w[i], v1, a[1]);
                }
              }
            }
          } else {
            // Probabilities of keys 2j, 2j + 1 side by side, over the scores: line j, the row at a place that makes
            // the lanes of a fragment hit different banks.
            __syncwarp();
#pragma unroll
            for (int j = 0; j < CHUNK / 2; ++j)
              *(u32*)(lines + j * LINE + (lane ^ (j % 4 * 8)) * 4) = pack<KIND>(s[2 * j], s[2 * j + 1]);
            __syncwarp();
#if SFA_WGMMA
            // The products of the chunk before ran during this one's exponentials.
            group_wait(acc);
            rescale();
#endif
#pragma unroll
            for (int kk = 0; kk < CHUNK / 16; ++kk)
#pragma unroll
              for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                  const int j = kk * 8 + e / 2 * 4 + lane % 4, r = i * 16 + e % 2 * 8 + lane / 4;
                  a[kk][i][e] = *(const u32*)(lines + j * LINE + (r ^ (lane % 4 * 8)) * 4);
                }
#if SFA_WGMMA
            group_fence();
#pragma unroll
            for (int kk = 0; kk < CHUNK / 16; ++kk) {
              const u64 v = describe<PART>(memory + AT_V + (c * CHUNK + kk * 16) * 128);
#pragma unroll
              for (int i = 0; i < 2; ++i) mma_group<KIND>(acc[i], a[kk][i], v);
            }
            group_commit();
#else
#pragma unroll
            for (int kk = 0; kk < CHUNK / 16; ++kk) {
              const int key = c * CHUNK + kk * 16 + lane % 16;
#pragma unroll
              for (int n = 0; n < NT; n += 2) {
                u32 b[4];
                load_matrices(memory + v_place(key, n + lane / 16), b);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                  mma<KIND>(acc[i][n], a[kk][i], b[0], b[1]);
                  mma<KIND>(acc[i][n + 1], a[kk][i], b[2], b[3]);
                }
              }
            }
#endif
          }
          __syncwarp();
        }
#pragma unroll
        for (int i = 0; i < CHUNK * LINE / 512; ++i)
          *(Four*)(lines + i * 512 + lane * 16) = Four{{BLANK, BLANK, BLANK, BLANK}};
      }
      __syncwarp();
#if SFA_WGMMA
      group_wait(acc);
#endif
    }
    bool finite = true;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c) finite = finite && acc[i][n][c] - acc[i][n][c] == 0.0f;
    if (careful || !__syncthreads_or(!finite)) break;
    careful = true;
  }

  if (bad_q && hi > lo) l = NOT_A_NUMBER;
  const float factor = l == 0.0f ? 0.0f : spoiled ? NOT_A_NUMBER : 1.0f / l;
  if (row < p.sq && chunk == 0)
    p.lse[(batch * p.hq + head) * p.sq + row] = l == 0.0f ? NEG_INF : 0.69314718055994531f * (m + log2f(l));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = row0 + i * 8 + lane / 4;
    const float f = __shfl_sync(~0u, factor, i * 8 + lane / 4);
    if (r >= p.sq) continue;
    const i64 to = ((batch * p.sq + r) * p.hq + head) * DV;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int at = chunk * DVC + n * 8 + lane % 4 * 2;
      if (at >= DV) continue;
      const float x = acc[i / 2][n][i % 2 * 2] * f, y = acc[i / 2][n][i % 2 * 2 + 1] * f;
      if constexpr (FP32) {
        ((float*)p.out)[to + at] = x;
        ((float*)p.out)[to + at + 1] = y;
      } else {
        *(u32*)((u16*)p.out + to + at) = pack<KIND>(x, y);
      }
    }
  }
}

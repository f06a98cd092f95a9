// Appends tokens to the paged cache, one launch a layer: top-k of k, V as it is stored, the running sums, the lengths.
// No headers: NVRTC alone compiles this file.
//
// A unit is the part of an append that falls into one 128-token block of one (sequence, kv head): it alone adds to that
// running sum, in a fixed order. `team` warps share a unit, token by token. The last thread block of a sequence to have
// read its length advances it, so that a captured launch can be replayed. An append that does not fit into `capacity`
// writes nothing and sets `failed`.
//
// A step of one token is a chain of memory latencies: k and v come while the length and then the tables do.
//
// Set by the launcher: SFA_D, SFA_W (entries a key), SFA_R (always-on features), SFA_DV, SFA_PAGE, SFA_CODE and SFA_V
// (0 bf16, 1 fp16, 2 fp32; V also 3 int8, 4 e4m3), SFA_CODED (k is a code).

#ifdef SFA_HOST
#include SFA_HOST
#else
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;

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

__device__ __forceinline__ u32 warp_max_u32(u32 x) { return __reduce_max_sync(~0u, x); }
#endif

constexpr int D = SFA_D, W = SFA_W, R = SFA_R, DV = SFA_DV, PAGE = SFA_PAGE, CODE = SFA_CODE, V = SFA_V;
constexpr bool CODED = SFA_CODED, EIGHT = V >= 3;
constexpr int WARPS = 8, THREADS = 32 * WARPS, BLOCK = 128;
constexpr int MINE = (D + 31) / 32, MINE_V = (DV + 31) / 32;  // features and columns a lane holds: lane + 32 i
constexpr float LARGEST = V == 3 ? 127.0f : 448.0f;

struct Params {
  const void *k, *k_indices, *k_dense, *v;  // with SFA_CODED k holds the values, else k_dense the always-on features
  void *values, *indices, *dense, *stored;
  u16* v_scale;
  float* sums;
  int* lengths;
  const int *capacity, *counts, *pages, *sum_rows;
  int *done, *failed;
  i64 k_batch, k_token, k_head, v_batch, v_token, v_head;  // strides in elements
  int n, hkv, pages_stride, sums_stride, team;
};

// The bits of element i; 0 bf16, 1 fp16, 2 fp32.
template <int KIND>
__device__ __forceinline__ u32 bits_at(const void* p, i64 i) {
  if constexpr (KIND == 2) return ((const u32*)p)[i];
  return ((const u16*)p)[i];
}

template <int KIND>
__device__ __forceinline__ float as_number(u32 bits) {
  if constexpr (KIND == 2) return __uint_as_float(bits);
  return KIND == 0 ? __uint_as_float(bits << 16) : from_half((u16)bits);
}

template <int KIND>
__device__ __forceinline__ u32 as_bits(float x) {
  if constexpr (KIND == 2) return __float_as_uint(x);
  return KIND == 0 ? to_bf16(x) : to_half(x);
}

template <int KIND>
__device__ __forceinline__ void put(void* p, i64 i, u32 bits) {
  if constexpr (KIND == 2) {
    ((u32*)p)[i] = bits;
  } else {
    ((u16*)p)[i] = (u16)bits;
  }
}

__device__ __forceinline__ void put_index(void* p, i64 i, int index) {
  if constexpr (D <= 256) {
    ((u8*)p)[i] = (u8)index;
  } else {
    ((u16*)p)[i] = (u16)index;
  }
}

// A number of magnitude up to 448 to e4m3, to nearest even.
__device__ __forceinline__ u8 to_e4m3(float x) {
  u32 bits = __float_as_uint(x), sign = bits >> 24 & 0x80u;
  bits &= 0x7fffffffu;
  // Below 2^-6 e4m3 counts in units of 2^-9; above, the exponent's bias is 120 less.
  u32 small = (u32)rintf(__uint_as_float(bits) * 512.0f);
  u32 large = ((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3);
  return (u8)(sign | (bits < 0x3c800000u ? small : large));
}

__device__ __forceinline__ float from_e4m3(u8 x) { return 256.0f * from_half((u16)((x & 0x80u) << 8 | (x & 0x7fu) << 7)); }

// The topk features of largest magnitude, NaN first, then the lowest number; bit i: feature lane + 32 i is one.
__device__ __forceinline__ u32 rank(u32 (&key)[MINE], int lane) {
  u32 members = 0;
#pragma unroll 1
  for (int e = 0; e < W; ++e) {
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
      if ((u32)(lane + 32 * i) == at) {
        members |= 1u << i;
        key[i] = 0;
      }
  }
  return members;
}

// A row of k and v on its way: the bits of a lane's features and columns.
struct Row {
  u32 k[MINE], v[MINE_V];
};

__device__ __forceinline__ void fetch(const Params& p, i64 batch, i64 token, i64 head, int lane, Row& row) {
  const i64 k_at = batch * p.k_batch + token * p.k_token + head * p.k_head;
  const i64 v_at = batch * p.v_batch + token * p.v_token + head * p.v_head;
  if constexpr (!CODED)
#pragma unroll
    for (int i = 0; i < MINE; ++i)
      row.k[i] = bits_at<CODE>(p.k, k_at + min(lane + 32 * i, D - 1));
#pragma unroll
  for (int i = 0; i < MINE_V; ++i)
    row.v[i] = bits_at<CODE>(p.v, v_at + min(lane + 32 * i, DV - 1));
}

// Stores a code that was given, row `from` of counts rows.
__device__ __forceinline__ void copy_key(const Params& p, i64 from, i64 row, int lane) {
  for (int e = lane; e < W; e += 32) {
    put<CODE>(p.values, row * W + e, bits_at<CODE>(p.k, from * W + e));
    put_index(p.indices, row * W + e, D <= 256 ? (int)((const u8*)p.k_indices)[from * W + e]
                                               : (int)((const u16*)p.k_indices)[from * W + e]);
  }
  for (int j = lane; j < R; j += 32) put<CODE>(p.dense, row * R + j, bits_at<CODE>(p.k_dense, from * R + j));
}

// What rank() keeps of a key, beside its always-on features.
__device__ __forceinline__ u32 members_of(const Params& p, const u32 (&bits)[MINE], int lane) {
  u32 key[MINE];
#pragma unroll
  for (int i = 0; i < MINE; ++i) {
    // One more than the magnitude, the same for every NaN; 0 is none.
    key[i] = lane + 32 * i < D ? min(__float_as_uint(as_number<CODE>(bits[i])) & 0x7fffffffu, 0x7f800001u) + 1 : 0;
  }
  for (int j = 0; j < R; ++j)
#pragma unroll
    for (int i = 0; i < MINE; ++i)
      if (lane + 32 * i == ((const int*)p.k_dense)[j]) key[i] = 0;
  return rank(key, lane);
}

__device__ __forceinline__ void store_key(const Params& p, const u32 (&bits)[MINE], u32 members, i64 row, int lane) {
  for (int j = 0; j < R; ++j)
#pragma unroll
    for (int i = 0; i < MINE; ++i)
      if (lane + 32 * i == ((const int*)p.k_dense)[j]) put<CODE>(p.dense, row * R + j, bits[i]);
  int before = 0;
#pragma unroll
  for (int i = 0; i < MINE; ++i) {
    u32 mask = __ballot_sync(~0u, members >> i & 1);
    if (members >> i & 1) {
      i64 at = row * W + before + __popc(mask & ((1u << lane) - 1));
      put<CODE>(p.values, at, bits[i]);
      put_index(p.indices, at, lane + 32 * i);
    }
    before += __popc(mask);
  }
}

// Stores a row of V and adds what is stored to sum.
__device__ __forceinline__ void store_value(
    const Params& p, const u32 (&bits)[MINE_V], i64 row, int lane, double (&sum)[MINE_V]) {
  u32 largest = 0;  // beyond the last column its bits are repeated
#pragma unroll
  for (int i = 0; i < MINE_V; ++i) largest = max(largest, __float_as_uint(as_number<CODE>(bits[i])) & 0x7fffffffu);
  float scale = 1.0f;
  if constexpr (EIGHT) {
    u16 scale_bits = to_bf16(__uint_as_float(warp_max_u32(largest)) / LARGEST);
    scale = __uint_as_float((u32)scale_bits << 16);
    if (lane == 0) p.v_scale[row] = scale_bits;
  }
#pragma unroll
  for (int i = 0; i < MINE_V; ++i) {
    int c = lane + 32 * i;
    if (c >= DV) continue;
    float x = as_number<CODE>(bits[i]);
    if constexpr (EIGHT) {
      float units = x / scale;
      units = units - units == 0.0f ? fminf(fmaxf(units, -LARGEST), LARGEST) : 0.0f;  // 0 / 0, and what is not finite
      u8 byte = V == 3 ? (u8)(int)rintf(units) : to_e4m3(units);
      ((u8*)p.stored)[row * DV + c] = byte;
      sum[i] += (double)((V == 3 ? (float)(signed char)byte : from_e4m3(byte)) * scale);
    } else {
      constexpr int KIND = EIGHT ? 2 : V;
      u32 kept = KIND == CODE ? bits[i] : as_bits<KIND>(x);
      put<KIND>(p.stored, row * DV + c, kept);
      sum[i] += (double)as_number<KIND>(kept);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) sfa_append(const Params p) {
  __shared__ double part[WARPS][DV];
  __shared__ int lengths[3];  // before and after, and whether the append fits
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, batch = blockIdx.y;
  const int unit = blockIdx.x * (WARPS / p.team) + warp / p.team, member = warp % p.team;
  const int head = unit % p.hkv;
  int arrived = 0, before = 0, count = 0, room = 0;
  if (threadIdx.x == 0) {
    before = p.lengths[batch];
    count = p.counts == nullptr ? p.n : p.counts[batch];
    room = p.capacity[batch];
  }
  // The first block of an append begins with its first token, wherever that falls.
  Row row;
  const bool early = unit < p.hkv && member < p.n;
  if (early) fetch(p, batch, member, head, lane, row);
  if (threadIdx.x == 0) {
    bool fits = before + count <= room;
    lengths[0] = before;
    lengths[1] = fits ? before + count : before;
    lengths[2] = fits;
  }
  __syncthreads();
  const int start = lengths[0], stop = lengths[1], block = start / BLOCK + unit / p.hkv;
  // Counted here and looked at in the end, so that nothing waits for it.
  if (threadIdx.x == 0) arrived = atomicAdd(p.done + batch, 1);
  const int first = max(start, block * BLOCK), last = min(stop, (block + 1) * BLOCK);
  int page = 0, sum_row = 0;
  if (first + member < last) {
    page = p.pages[(i64)batch * p.pages_stride + (first + member) / PAGE];
    sum_row = p.sum_rows[(i64)batch * p.sums_stride + block];
  }
  const i64 sum_at = ((i64)sum_row * p.hkv + head) * DV;
  float stored[MINE_V];
#pragma unroll
  for (int i = 0; i < MINE_V; ++i) stored[i] = 0.0f;

  double sum[MINE_V];
#pragma unroll
  for (int i = 0; i < MINE_V; ++i) sum[i] = 0.0;
#pragma unroll 1
  for (int t = first + member; t < last; t += p.team) {
    if (!early || t != first + member) fetch(p, batch, t - start, head, lane, row);
    if (t >= first + p.team) page = p.pages[(i64)batch * p.pages_stride + t / PAGE];
    const u32 members = CODED ? 0 : members_of(p, row.k, lane);
    // By now the tables are there. A block that begins here holds no sum yet.
    if (t == first && first % BLOCK != 0)
#pragma unroll
      for (int i = 0; i < MINE_V; ++i) stored[i] = p.sums[sum_at + min(lane + 32 * i, DV - 1)];
    const i64 to = ((i64)page * p.hkv + head) * PAGE + t % PAGE;
    if constexpr (CODED) {
      copy_key(p, batch * p.k_batch + (t - start) * p.k_token + head * p.k_head, to, lane);
    } else {
      store_key(p, row.k, members, to, lane);
    }
    store_value(p, row.v, to, lane, sum);
  }
  if (p.team > 1) {
#pragma unroll
    for (int i = 0; i < MINE_V; ++i)
      if (lane + 32 * i < DV) part[warp][lane + 32 * i] = sum[i];
    __syncthreads();
  }
  if (member == 0 && first < last) {
#pragma unroll
    for (int i = 0; i < MINE_V; ++i) {
      int c = lane + 32 * i;
      if (c >= DV) continue;
#pragma unroll 1
      for (int w = 1; w < p.team; ++w) sum[i] += part[warp + w][c];
      p.sums[sum_at + c] = (float)((double)stored[i] + sum[i]);
    }
  }
  // Every thread block of the sequence has read the length: the last one to do so moves it on.
  if (threadIdx.x == 0 && arrived == (int)gridDim.x - 1) {
    p.done[batch] = 0;
    p.lengths[batch] = stop;
    if (!lengths[2]) *p.failed = 1;
  }
}

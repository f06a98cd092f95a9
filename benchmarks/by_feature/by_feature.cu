// Prototype: exact decode of one query token over pages of keys that are stored by feature. No headers: NVRTC alone.
//
// A page holds PAGE tokens of one kv head in the bytes of its row-major codes: ids u8[PAGE * W] and values
// bf16[PAGE * W] sorted by (feature, token), and ends u16[D], where list u is entries ends[u - 1] to ends[u].
//
// by_feature: a CTA owns a range of pages and the ROWS query rows of one kv head; a warp takes a page at a time.
//   Lists of the union of the rows' features come to shared memory, a page ahead. Scores are added up list by list (ids
//   in a list differ, so no atomics), tokens with a score go to a queue, and their V rows pass through a ring of loads
//   that is never drained between pages: what is left of the queue waits for the next page.
// combine: merges the partial results of a query row.
//
// As in decode.cu, with mu = 2^-m the weight of a token without overlap:
//   o = sum_read (w_j - mu) v_j + mu S_page,  Z = sum w_j.
// weigh and by_feature_tolerance: the same with a tolerance, in two passes over the lists. The first finds m and Z; in
// the second tokens that overlap stay unread, too, as if their weight were mu, while the sum of |w_j - mu| over them is
// at most tolerance * Z. (Most unread weights are mu, so no other number makes this sum smaller.)

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
__device__ __forceinline__ u16 to_bf16(float x) {
  u16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
// Volatile: a load stays where it is written, ahead of its use.
template <int BYTES>
__device__ __forceinline__ void load(const void* p, u32* out) {
  if constexpr (BYTES == 16) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "l"(p));
  } else if constexpr (BYTES == 8) {
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(out[0]), "=r"(out[1]) : "l"(p));
  } else if constexpr (BYTES == 4) {
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(out[0]) : "l"(p));
  } else {
    u16 part;
    asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(part) : "l"(p));
    out[0] = part;
  }
}
template <int BYTES>
__device__ __forceinline__ void copy_async(void* shared, const void* p) {
  u32 to = (u32)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(p) : "memory");
}
__device__ __forceinline__ void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wait_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
__device__ __forceinline__ u32 bytes_of(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }
__device__ __forceinline__ u32 warp_max_u32(u32 x) { return __reduce_max_sync(~0u, x); }
#endif

constexpr int D = SFA_D, W = SFA_W, WQ = SFA_WQ, DV = SFA_DV, PAGE = SFA_PAGE, ROWS = SFA_ROWS, VB = SFA_V ? 1 : 2;
constexpr int WARPS = SFA_WARPS, THREADS = 32 * WARPS, UNROLL = SFA_UNROLL, STAGE = SFA_STAGE;  // pieces of 16 bytes
constexpr bool STAGED = SFA_STAGED;  // STAGED: the ring is shared memory, a lane reads what it copied
constexpr int TPL = PAGE / 32, QUADS = TPL / 4, FEATURES = (D + 31) / 32;
static_assert(PAGE % 128 == 0 && PAGE <= 256 && PAGE * W % 16 == 0, "ids are bytes, a lane takes four tokens a time");

__host__ __device__ constexpr int max_of(int a, int b) { return a > b ? a : b; }

// A V row is LPR pieces of 16 bytes: a warp loads RPL rows at once, SET in UNROLL loads.
constexpr int EPV = 16 / VB, LPR = DV * VB / 16, RPL = 32 / LPR, SET = UNROLL * RPL, PART = DV / 32;
static_assert(LPR <= 32 && 32 % LPR == 0 && PART * RPL == EPV && PART % 2 == 0, "V rows of 128 to 512 bytes");
constexpr int LISTS = WQ * ROWS, SLOTS = (LISTS + 31) / 32, BATCH = WQ % 8 == 0 ? 8 : WQ % 4 == 0 ? 4 : 1;
constexpr int PENDING = 2 * SET - 1, QUEUE = PAGE + 2 * SET, MOVES = (PENDING + 31) / 32;

struct alignas(16) List {
  int n, ids, values, staged;  // bytes from the start of the stage, or entries of the page
};

template <int N>
struct alignas(4 * N) Floats {
  float x[N];
};

// Shared memory of a warp.
struct alignas(16) Own {
  float scores[ROWS][PAGE];
  u8 stage[STAGE * 16];
  List lists[LISTS];
  Floats<ROWS> weights[QUEUE];
  u32 rows[QUEUE];
  alignas(16) u32 ring[STAGED ? UNROLL : 1][STAGED ? 32 : 1][4];
};
struct alignas(16) All {
  Own own[WARPS];
  float merged[WARPS][ROWS][2];
  float q_value[ROWS][WQ];
  int q_feature[ROWS][WQ], q_list[ROWS][WQ], feature[LISTS], list_of[D], lists, bad[ROWS];
};

struct Params {
  const u16* q;  // (hq, D), whole: ranked here
  const u8* ids;
  const u16 *values, *ends;
  const void* v;
  const u16* v_scale;
  const float* sums;  // (pages, hkv, DV), of a page
  const int* pages;
  float *part_o, *part_ml, *weighed;  // the last: m and Z of the first pass
  u16* out;
  float* lse;
  u32* rows_read;  // (hkv,), or null
  float scale, tolerance;
  int hq, hkv, used, splits;
};

__device__ __forceinline__ float as_float(u32 x) { return __uint_as_float(x); }
#define NEG_INF as_float(0xff800000u)

__device__ __forceinline__ float v_element(const u32* words, int e) {
  if constexpr (VB == 2) return as_float(e % 2 ? words[e / 2] & 0xffff0000u : words[e / 2] << 16);
  // the byte plus 128 in the lowest bits of 2^23
  return as_float(bytes_of(words[e / 4] ^ 0x80808080u, 0x4b000000u, 0x7650 | e % 4)) - 8388736.0f;
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

// The sum over this lane and those before it.
__device__ __forceinline__ int scan(int x, int lane) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    int before = __shfl_sync(~0u, x, max(lane - offset, 0));
    x += lane >= offset ? before : 0;
  }
  return x;
}

// The WQ largest features of each row, ties to the lowest, and the union of all rows.
__device__ __forceinline__ void rank(const Params& p, All& all, int row0, int lane, int warp) {
  for (int u = threadIdx.x; u < D; u += THREADS) all.list_of[u] = 0;
  __syncthreads();
  for (int r = warp; r < ROWS; r += WARPS) {
    const u16* q = p.q + (i64)(row0 + r) * D;
    u32 key[FEATURES], bits[FEATURES];
#pragma unroll
    for (int i = 0; i < FEATURES; ++i) {
      int u = lane + 32 * i;
      bits[i] = u < D ? q[u] : 0;
      key[i] = u < D ? (min(bits[i] & 0x7fffu, 0x7f81u) + 1) << 16 | (0xffffu - u) : 0;
    }
    for (int e = 0; e < WQ; ++e) {
      u32 top = 0;
#pragma unroll
      for (int i = 0; i < FEATURES; ++i) top = max(top, key[i]);
      top = warp_max_u32(top);
#pragma unroll
      for (int i = 0; i < FEATURES; ++i)
        if (key[i] == top) {
          int u = lane + 32 * i;
          key[i] = 0;
          all.q_feature[r][e] = u;
          all.q_value[r][e] = as_float(bits[i] << 16) * p.scale;
          all.list_of[u] = 1;  // rows that keep the same feature write the same
        }
    }
  }
  __syncthreads();
  if (warp == 0) {
    int count = 0;
#pragma unroll
    for (int i = 0; i < FEATURES; ++i) {
      int u = lane + 32 * i;
      bool kept = u < D && all.list_of[u] != 0;
      u32 mask = __ballot_sync(~0u, kept);
      if (kept) {
        int at = count + __popc(mask & ((1u << lane) - 1));
        all.feature[at] = u;
        all.list_of[u] = at;
      }
      count += __popc(mask);
    }
    if (lane == 0) all.lists = count;
  }
  __syncthreads();
  for (int t = threadIdx.x; t < ROWS * WQ; t += THREADS)
    all.q_list[t / WQ][t % WQ] = all.list_of[all.q_feature[t / WQ][t % WQ]];
  if (threadIdx.x < ROWS) {
    float x = 0.0f;
    for (int e = 0; e < WQ; ++e) x += all.q_value[threadIdx.x][e] * 0.0f;
    all.bad[threadIdx.x] = x != 0.0f;
  }
  __syncthreads();
}

#ifdef SFA_HOST
alignas(16) static char shared_memory[sizeof(All)];
#else
extern __shared__ __align__(16) char shared_memory[];
#endif

enum Pass { EXACT, WEIGH, TOLERANT };

template <Pass PASS>
__device__ __forceinline__ void decode(const Params& p) {
  All& all = *(All*)shared_memory;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.x, split = blockIdx.y;
  const int row0 = head * ROWS;
  Own& own = all.own[warp];
  const int end = (int)((i64)p.used * (split + 1) / p.splits);
  const int first = (int)((i64)p.used * split / p.splits) + warp;
  auto page_at = [&](int i) {
    u32 page;
    load<4>(p.pages + min(i, end - 1), &page);
    return page;
  };
  u32 page = 0, page1 = 0, page2 = 0;  // of this step, the next and the one after, the last without the head
  if (first < end) {  // on their way while q is ranked
    page = page_at(first);
    page1 = page_at(first + WARPS);
    page2 = page_at(first + 2 * WARPS);
  }
  rank(p, all, row0, lane, warp);
  const int lists = all.lists;

  auto of_head = [&](u32 page) { return page * p.hkv + head; };
  // Where the lists of a page begin and end: lane l has list l.
  auto bounds_of = [&](u32 page, int (&bounds)[SLOTS][2]) {
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      int l = lane + 32 * s;
      bounds[s][0] = bounds[s][1] = 0;
      if (l < lists) {
        int u = all.feature[l];
        const u16* ends = p.ends + (i64)page * D + u;
        u32 x[2] = {0, 0};
        if (u > 0) load<2>(ends - 1, &x[0]);
        load<2>(ends, &x[1]);
        bounds[s][0] = (int)x[0];
        bounds[s][1] = (int)x[1];
      }
    }
  };
  // Their pieces of 16 bytes that hold the entries, to shared memory; what has no room there is read where it is.
  auto fetch_lists = [&](u32 page, const int (&bounds)[SLOTS][2]) {
    const char* values = (const char*)(p.values + (i64)page * (PAGE * W));
    const char* ids = (const char*)(p.ids + (i64)page * (PAGE * W));
    int before = 0;
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      int a = bounds[s][0], b = bounds[s][1], n = b - a;
      int v0 = a >> 3, vn = n > 0 ? ((b + 7) >> 3) - v0 : 0, i0 = a >> 4, in = n > 0 ? ((b + 15) >> 4) - i0 : 0;
      int until = before + scan(vn + in, lane), at = until - vn - in;
      bool staged = until <= STAGE;
      if (lane + 32 * s < lists)
        own.lists[lane + 32 * s] =
            staged ? List{n, (at + vn) * 16 + (a & 15), at * 16 + (a & 7) * 2, 1} : List{n, a, a, 0};
      before = __shfl_sync(~0u, until, 31);
      if (!staged) vn = in = 0;
#pragma unroll
      for (int l0 = 0; l0 < 32; l0 += 8) {
        if (l0 + 32 * s >= lists) break;
        int l = l0 + lane / 4;  // four lanes copy a list
        int lvn = __shfl_sync(~0u, vn, l), lin = __shfl_sync(~0u, in, l), lat = __shfl_sync(~0u, at, l);
        int lv0 = __shfl_sync(~0u, v0, l), li0 = __shfl_sync(~0u, i0, l);
        for (int k = lane % 4; k < lvn + lin; k += 4)
          copy_async<16>(own.stage + (lat + k) * 16, k < lvn ? values + (lv0 + k) * 16 : ids + (li0 + k - lvn) * 16);
      }
    }
    close_group();
  };
  auto staged_value = [&](const List& list, int j) {
    return as_float((u32)((const u16*)(own.stage + list.values))[j] << 16);
  };
  auto scales_of = [&](u32 page, u32 (&scales)[QUADS][2]) {
    if constexpr (VB == 1 && PASS != WEIGH)
#pragma unroll
      for (int i = 0; i < QUADS; ++i) load<8>(p.v_scale + (i64)page * PAGE + i * 128 + lane * 4, scales[i]);
  };

  const int sub = lane / LPR, column = lane % LPR;
  float m[ROWS], z[ROWS], mu[ROWS], acc[ROWS][EPV], spent = 0.0f;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    m[r] = NEG_INF;
    z[r] = 0.0f;
#pragma unroll
    for (int e = 0; e < EPV; ++e) acc[r][e] = 0.0f;
#pragma unroll
    for (int i = 0; i < QUADS; ++i) *(Floats<4>*)&own.scores[r][i * 128 + lane * 4] = {};
  }
  float allowed = 0.0f;  // what a page may misplace
  if constexpr (PASS == TOLERANT) {
    static_assert(ROWS == 1 || PASS != TOLERANT, "a tolerance takes one query row");
    const float* ml = p.weighed + (i64)row0 * p.splits * 2;
    float top = NEG_INF, total = 0.0f;
    for (int i = lane; i < p.splits; i += 32) top = fmaxf(top, ml[2 * i]);
    top = warp_max(top);
    for (int i = lane; i < p.splits; i += 32) total = fmaf(ex2(ml[2 * i] - top), ml[2 * i + 1], total);
    m[0] = top;
    allowed = p.tolerance * 0.99f * warp_sum(total) / (float)p.used;
  }
  // The ring starts with a set of nothing: rows of weight 0 whose data is 0.
  u32 data[UNROLL][4];
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    data[u][0] = data[u][1] = data[u][2] = data[u][3] = 0;
    if constexpr (STAGED) *(Floats<4>*)own.ring[u][lane] = {};
  }
#pragma unroll
  for (int i = 0; i < MOVES; ++i)
    if (lane + 32 * i < SET) own.weights[lane + 32 * i] = {};
  int head_at = 0, tail = SET, rows_read = 0;  // the queue: entries head_at to head_at + SET are in the ring

  auto fetch = [&](int u, int j, bool any) {
    const char* from = (const char*)p.v + ((i64)own.rows[any ? j : 0] * LPR + column) * 16;
    if constexpr (STAGED) {
      if (any) copy_async<16>(own.ring[u][lane], from);
      close_group();
    } else if (any) {
      load<16>(from, data[u]);
    }
  };
  auto add = [&](int u, int j) {
    Floats<ROWS> weight = own.weights[j];
    u32 from[4];
    if constexpr (STAGED) wait_groups<UNROLL - 1>();
#pragma unroll
    for (int i = 0; i < 4; ++i) from[i] = STAGED ? own.ring[u][lane][i] : data[u][i];
    float value[EPV];
#pragma unroll
    for (int e = 0; e < EPV; ++e) value[e] = v_element(from, e);
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int e = 0; e < EPV; ++e) acc[r][e] = fmaf(weight.x[r], value[e], acc[r][e]);
  };

  int bounds[SLOTS][2];
  u32 scales[QUADS][2], scales1[QUADS][2];
  bool passed = false;
  if (first < end) {
    page = of_head(page);
    page1 = of_head(page1);
    bounds_of(page, bounds);
    __syncwarp();
    fetch_lists(page, bounds);
    bounds_of(page1, bounds);
    scales_of(page, scales1);
  }
#pragma unroll 1
  for (int i = first; i < end; i += WARPS) {
    u32 sum[PART];
    const float* sums = p.sums + (i64)page * DV + column * EPV + sub * PART;
#pragma unroll
    for (int e = 0; e < PART; e += PART % 4 == 0 ? 4 : 2)
      if (PASS != WEIGH) load<PART % 4 == 0 ? 16 : 8>(sums + e, sum + e);
#pragma unroll
    for (int k = 0; k < QUADS; ++k) scales[k][0] = scales1[k][0], scales[k][1] = scales1[k][1];

    // Scores, list by list: the first 32 entries of BATCH lists are read ahead.
    if (!STAGED || !passed) wait_groups<0>();  // a whole set passed since: then the lists are here, too
    __syncwarp();
#pragma unroll 1
    for (int r = 0; r < ROWS; ++r) {
      float* scores = own.scores[r];
#pragma unroll 1
      for (int e0 = 0; e0 < WQ; e0 += BATCH) {
        int id[BATCH], n[BATCH];
        float product[BATCH];
        bool longer = false;
#pragma unroll
        for (int e = 0; e < BATCH; ++e) {
          List list = own.lists[all.q_list[r][e0 + e]];
          n[e] = list.staged ? list.n : 0;
          longer |= !list.staged || list.n > 32;
          id[e] = 0;
          product[e] = 0.0f;
          if (lane < n[e]) {
            id[e] = own.stage[list.ids + lane];
            product[e] = all.q_value[r][e0 + e] * staged_value(list, lane);
          }
        }
#pragma unroll
        for (int e = 0; e < BATCH; ++e) {
          if (lane < n[e]) scores[id[e]] += product[e];
          __syncwarp();
        }
        if (longer) {  // the same in all lanes
#pragma unroll 1
          for (int e = 0; e < BATCH; ++e) {
            List list = own.lists[all.q_list[r][e0 + e]];
            float x = all.q_value[r][e0 + e];
            if (list.staged) {
              for (int j = lane + 32; j < list.n; j += 32)
                scores[own.stage[list.ids + j]] += x * staged_value(list, j);
            } else {
              const i64 at = (i64)page * (PAGE * W) + list.ids;
#pragma unroll 4
              for (int j = lane; j < list.n; j += 32)
                scores[p.ids[at + j]] += x * as_float((u32)p.values[at + j] << 16);
            }
            __syncwarp();
          }
        }
      }
    }

    // A lane's tokens: i * 128 + lane * 4 + j. Scores are left 0 for the next page.
    float s[TPL][ROWS];
    u32 read = 0;
#pragma unroll
    for (int k = 0; k < QUADS; ++k)
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        Floats<4>* at = (Floats<4>*)&own.scores[r][k * 128 + lane * 4];
        Floats<4> x = *at;
        *at = {};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          s[k * 4 + j][r] = x.x[j] + (x.x[j] - x.x[j]);  // infinities become NaN
          read |= x.x[j] != 0.0f ? 1u << (k * 4 + j) : 0u;
        }
      }
    float factor[ROWS];
    bool cancels = false;
    const int overlapping = __shfl_sync(~0u, scan(__popc(read), lane), 31);
    bool use_sum = overlapping < PAGE;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float top = NEG_INF, weight = 0.0f;
#pragma unroll
      for (int k = 0; k < TPL; ++k) top = fmaxf(top, s[k][r]);
      top = fmaxf(warp_max(top), m[r]);
      factor[r] = top > m[r] ? ex2(m[r] - top) : 1.0f;
      if (top > m[r]) {
#pragma unroll
        for (int e = 0; e < EPV; ++e) acc[r][e] *= factor[r];
        z[r] *= factor[r];
      }
      float base = top == NEG_INF ? 0.0f : top;
      m[r] = top;
#pragma unroll
      for (int k = 0; k < TPL; ++k) {
        s[k][r] = ex2(s[k][r] - base);  // the weight from here on
        weight += s[k][r];
      }
      weight = warp_sum(weight);
      const float mu0 = ex2(-base);
      mu[r] = use_sum ? mu0 : 0.0f;
      z[r] += weight;
      if constexpr (PASS == TOLERANT) {
        // Overlapping tokens of a weight near mu stay unread, too, as many as the pages so far allow: as if it were mu.
        const float budget = allowed * (float)((i - first) / WARPS + 1) - spent;
        u32 keep = read;
        float low = -40.0f, high = 0.0f, paid = 0.0f;
#pragma unroll 1
        for (int step = 0; step < 8; ++step) {  // first nothing is read, then log2 of the distance is bisected
          const float bound = step == 0 ? 2.0f : ex2(0.5f * (low + high));
          float far = 0.0f;
          u32 on = 0;
#pragma unroll
          for (int k = 0; k < TPL; ++k) {
            float distance = fabsf(s[k][r] - mu0);
            bool reads = (read >> k & 1) && !(distance < bound);
            on |= reads ? 1u << k : 0u;
            far += reads ? 0.0f : distance;
          }
          far = warp_sum(far);
          const bool good = far <= budget;
          if (good) {
            keep = on;
            paid = far;
          }
          if (step > 0) (good ? low : high) = 0.5f * (low + high);
          if (step == 0 && good) break;
        }
        read = keep;
        spent += paid;
        use_sum = __ballot_sync(~0u, read != (1u << TPL) - 1) != 0;
        mu[r] = use_sum ? mu0 : 0.0f;
      }
      cancels |= mu[r] * (float)PAGE > 4.0f * weight;
    }
    if (cancels) {
      use_sum = false;
      read = (1u << TPL) - 1;
#pragma unroll
      for (int r = 0; r < ROWS; ++r) mu[r] = 0.0f;
    }

    if constexpr (PASS == WEIGH) read = 0;
    // What is left of the queue moves to its front, with weights under the new maxima; then this page's tokens.
    Floats<ROWS> moved[MOVES];
    u32 moved_row[MOVES];
#pragma unroll
    for (int k = 0; k < MOVES; ++k) {
      int j = head_at + lane + 32 * k;
      if (j < tail) {
        moved[k] = own.weights[j];
        moved_row[k] = own.rows[j];
      }
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < MOVES; ++k) {
      int j = lane + 32 * k;
      if (head_at + j < tail) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) moved[k].x[r] *= factor[r];
        own.weights[j] = moved[k];
        own.rows[j] = moved_row[k];
      }
    }
    tail -= head_at;
    head_at = 0;
    {
      int mine = __popc(read), until = scan(mine, lane), at = tail + until - mine;
      int count = __shfl_sync(~0u, until, 31);
      u32 row = page * PAGE + lane * 4;
#pragma unroll
      for (int k = 0; k < TPL; ++k)
        if (read >> k & 1) {
          Floats<ROWS> weight;
          float scale = VB == 1 ? as_float(bytes_of(scales[k / 4][k % 4 / 2], 0u, k % 2 ? 0x3244 : 0x1044)) : 1.0f;
#pragma unroll
          for (int r = 0; r < ROWS; ++r) weight.x[r] = (s[k][r] - mu[r]) * scale;
          own.weights[at] = weight;
          own.rows[at] = row + k / 4 * 128 + k % 4;
          ++at;
        }
      tail += count;
      rows_read += count;
    }
    __syncwarp();

    // The next page's lists, the bounds of the one after, while V rows pass.
    if (i + WARPS < end) fetch_lists(page1, bounds);
    scales_of(page1, scales1);
    page = page1;
    page1 = of_head(page2);
    bounds_of(page1, bounds);
    page2 = page_at(i + 3 * WARPS);

    passed = tail >= 2 * SET;
#pragma unroll 1
    for (; tail - head_at >= 2 * SET; head_at += SET)
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        int j = head_at + u * RPL + sub;
        add(u, j);
        fetch(u, j + SET, true);
      }
    if (PASS != WEIGH && use_sum) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int e = 0; e < EPV; ++e)
          if (sub == e / PART) acc[r][e] = fmaf(mu[r], as_float(sum[e % PART]), acc[r][e]);
    }
  }
  // The rest of the queue: a set in the ring and less than another.
  if (PASS != WEIGH) {
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      int j = head_at + u * RPL + sub;
      add(u, j);
      fetch(u, j + SET, j + SET < tail);
    }
    wait_groups<0>();
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      int j = head_at + SET + u * RPL + sub;
      if (j < tail) add(u, j);
    }
  }

  // Merge the lanes that hold the same columns, then the warps.
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int e = 0; e < EPV; ++e)
#pragma unroll
      for (int offset = LPR; offset < 32; offset *= 2) acc[r][e] += __shfl_xor_sync(~0u, acc[r][e], offset);
  __syncwarp();
  static_assert(sizeof(Own) >= ROWS * DV * 4, "partial results lie where a warp's own memory was");
  float* own_o = (float*)&own;
  if (PASS != WEIGH && sub == 0) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int e = 0; e < EPV; ++e) own_o[r * DV + column * EPV + e] = acc[r][e];
  }
  if (lane == 0) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      all.merged[warp][r][0] = m[r];
      all.merged[warp][r][1] = z[r];
    }
    if (PASS != WEIGH && p.rows_read != nullptr) atomicAdd(p.rows_read + head, (u32)rows_read);
  }
  __syncthreads();
  for (int t = threadIdx.x; t < ROWS * DV; t += THREADS) {
    int r = t / DV, c = t % DV;
    float top = NEG_INF, o = 0.0f, total = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) top = fmaxf(top, all.merged[w][r][0]);
    float base = top == NEG_INF ? 0.0f : top;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      float share = ex2(all.merged[w][r][0] - base);
      o = fmaf(share, ((const float*)&all.own[w])[t], o);
      total = fmaf(share, all.merged[w][r][1], total);
    }
    i64 part = (i64)(row0 + r) * p.splits + split;
    if (PASS != WEIGH) p.part_o[part * DV + c] = o;
    if (c == 0) {
      float* ml = PASS == WEIGH ? p.weighed : p.part_ml;
      ml[2 * part] = top;
      ml[2 * part + 1] = all.bad[r] ? as_float(0x7fc00000u) : total;
    }
  }
}

#if SFA_TOL
extern "C" __global__ void __launch_bounds__(THREADS, SFA_CTAS) weigh(const Params p) { decode<WEIGH>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, SFA_CTAS) by_feature_tolerance(const Params p) {
  decode<TOLERANT>(p);
}
#else
extern "C" __global__ void __launch_bounds__(THREADS, SFA_CTAS) by_feature(const Params p) { decode<EXACT>(p); }
#endif

constexpr int MERGERS = 512 / DV, COMBINE_THREADS = MERGERS * DV;  // a thread has a column of every MERGERS-th split

extern "C" __global__ void __launch_bounds__(COMBINE_THREADS) combine(const Params p) {
  __shared__ float rows[MERGERS][DV];
  const int c = threadIdx.x % DV, part = threadIdx.x / DV, lane = threadIdx.x % 32;
  const float* ml = p.part_ml + (i64)blockIdx.x * p.splits * 2;
  const float* o = p.part_o + (i64)blockIdx.x * p.splits * DV;
  float top = NEG_INF, total = 0.0f, mine = 0.0f;
  for (int i = lane; i < p.splits; i += 32) top = fmaxf(top, ml[2 * i]);
  top = warp_max(top);
  const float base = top == NEG_INF ? 0.0f : top;
  for (int i = lane; i < p.splits; i += 32) total = fmaf(ex2(ml[2 * i] - base), ml[2 * i + 1], total);
  total = warp_sum(total);
#pragma unroll 8
  for (int i = part; i < p.splits; i += MERGERS) mine = fmaf(ex2(ml[2 * i] - base), o[(i64)i * DV + c], mine);
  rows[part][c] = mine;
  __syncthreads();
  if (part == 0) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < MERGERS; ++w) sum += rows[w][c];
    p.out[(i64)blockIdx.x * DV + c] = to_bf16(sum / total);
    if (c == 0) p.lse[blockIdx.x] = 0.69314718055994531f * (base + log2f(total));
  }
}

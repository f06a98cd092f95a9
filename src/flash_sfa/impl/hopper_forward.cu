// Forward attention for Hopper, warp-specialised: one warp loads tiles by TMA, each consumer warpgroup owns 64 query
// rows, keeps scores, probabilities and output in registers, and multiplies with wgmma. While a warpgroup takes the
// exponentials of one tile, the tensor cores work on its own previous P V and on the other warpgroup's products.
//
// Compiled by hopper_forward.py for each configuration; no headers, so NVRTC alone suffices.
//   HF_D, HF_DV      head dims (64, 128 or 256)        HF_WGS     consumer warpgroups (2 or 3)
//   HF_BN            keys a tile (64 or 128)           HF_STAGES  tiles of k and v in flight
//   HF_QSTAGES       tiles of q in flight (1 or 2)     HF_CAUSAL  bottom-right aligned

typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) TensorMap {
  u64 opaque[16];
};

struct Params {
  unsigned short* out;  // (b, sq, hq, dv) bf16
  float* lse;           // (b, hq, sq)
  int* counter;         // one 0: the next tile of work
  float scale;          // softmax_scale * log2(e)
  int sq, sk, hq, hkv, heads, m_tiles, together;
};

constexpr int BM = 64 * HF_WGS, BN = HF_BN, D = HF_D, DV = HF_DV, STAGES = HF_STAGES, Q_STAGES = HF_QSTAGES;
constexpr int ROW = 128;  // bytes of a row in one swizzled part: 64 features
constexpr int Q_BYTES = BM * D * 2, K_BYTES = BN * D * 2, V_BYTES = BN * DV * 2;
// The output is rescaled when a running maximum grows by more than this (log2), which sums in fp32 bear.
constexpr float LAZY = 8.0f;

// ------------------------------------------------------------------------------------------------- primitives

#ifdef HF_HOST
#include HF_HOST
#else
#define R4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define R16(i) R4(i), R4(i + 4), R4(i + 8), R4(i + 12)
#define R32(i) R16(i), R16(i + 16)
#define R64(i) R32(i), R32(i + 32)

// d (64 x N, fp32 in registers), added to if add, plus a (64 x 16) times b: with `bf16` a and b (N x 16) in shared
// memory, with `rows` a in registers and b (16 x N) in shared memory.
template <int N>
struct Wgmma;

template <>
struct Wgmma<64> {
  static __device__ __forceinline__ void bf16(float (&d)[32], u64 a, u64 b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21, "
        "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31},%32,%33, p, 1, 1, 0, 0;\n}\n "
        : R32(0)
        : "l"(a), "l"(b), "r"(add));
  }
  static __device__ __forceinline__ void rows(float (&d)[32], const u32* a, u64 b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21, "
        "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35},%36, p, 1, 1, 1;\n}\n "
        : R32(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
  }
};

template <>
struct Wgmma<128> {
  static __device__ __forceinline__ void bf16(float (&d)[64], u64 a, u64 b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21, "
        "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41, "
        "%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61, "
        "%62,%63},%64,%65, p, 1, 1, 0, 0;\n}\n "
        : R64(0)
        : "l"(a), "l"(b), "r"(add));
  }
  static __device__ __forceinline__ void rows(float (&d)[64], const u32* a, u64 b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21, "
        "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41, "
        "%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61, "
        "%62,%63}, {%64,%65,%66,%67},%68, p, 1, 1, 1;\n}\n "
        : R64(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
  }
};

template <>
struct Wgmma<256> {
  static __device__ __forceinline__ void rows(float (&d)[128], const u32* a, u64 b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %133, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21, "
        "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41, "
        "%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61, "
        "%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81, "
        "%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100, "
        "%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116, "
        "%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, {%128,%129,%130,%131},%132, "
        "p, 1, 1, 1;\n}\n "
        : R64(0), R64(64)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
  }
};

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void barrier_init(u32 bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}

__device__ __forceinline__ void expect(u32 bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

__device__ __forceinline__ void arrive(u32 bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

__device__ __forceinline__ void wait(u32 bar, u32 parity) {
  u32 done = 0;
  while (!done)
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(bar), "r"(parity)
        : "memory");
}

// A box of a 4d tensor map (feature, row, head, sequence).
__device__ __forceinline__ void load(u32 to, const TensorMap* map, u32 bar, int feature, int row, int head, int b) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(bar), "r"(feature), "r"(row), "r"(head), "r"(b)
      : "memory");
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// The compiler does not know that wgmma goes on after its instruction: reads may not move up past this.
template <int N>
__device__ __forceinline__ void pin(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

__device__ __forceinline__ void turn_wait(int wg) {
  asm volatile("bar.sync %0, 256;" ::"r"(1 + wg) : "memory");
}
__device__ __forceinline__ void turn_pass(int wg) {
  asm volatile("bar.arrive %0, 256;" ::"r"(1 + (wg + 1) % HF_WGS) : "memory");
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ u32 pack(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

__device__ __forceinline__ void never(bool x) {
  if (x) asm volatile("trap;");
}
__device__ __forceinline__ void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void few_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(HF_WGS == 2 ? 24 : 32));
}
__device__ __forceinline__ void many_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(HF_WGS == 2 ? 240 : 160));
}
#endif

#define INF __int_as_float(0x7f800000)

// The same in all lanes, and known to be: descriptors are then made by the uniform unit, not moved to it one by one.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// A matrix in shared memory, swizzled by 128 bytes.
__device__ __forceinline__ u64 descriptor(u32 address, int leading, int stride) {
  address = uniform(address);
  return (u64)((address & 0x3ffff) >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32 | (u64)1 << 62;
}

__device__ __forceinline__ u64 further(u64 at, int bytes) { return at + (bytes >> 4); }

// ------------------------------------------------------------------------------------------------- work

struct Work {
  int m0, head, b, tiles;  // first query, head, sequence, tiles of keys
};

// Heads that fit into L2 together take turns; the longest rows of tiles first.
__device__ __forceinline__ Work work_of(const Params& p, int t) {
  const int part = p.together * p.m_tiles;
  const int first = t / part * p.together, r = t % part;
  const int here = min(p.together, p.heads - first);
  const int bh = first + r % here;
  Work w;
  w.m0 = (p.m_tiles - 1 - r / here) * BM;
  w.head = bh % p.hq;
  w.b = bh / p.hq;
  int keys = p.sk;
  if (HF_CAUSAL) keys = min(keys, w.m0 + BM + p.sk - p.sq);
  w.tiles = keys <= 0 ? 0 : (keys + BN - 1) / BN;
  return w;
}

struct Shared {
  u32 q, k, v, q_full, q_empty, k_full, k_empty, v_full, v_empty, work_full, work_empty;
  int* work;
};

__device__ __forceinline__ void produce(const Params& p, const Shared& s, const TensorMap* mq, const TensorMap* mk,
                                        const TensorMap* mv) {
  const int total = p.heads * p.m_tiles;
  int t = blockIdx.x, queries = 0, n_k = 0, n_v = 0;
  for (int i = 0;; ++i) {
    wait(s.work_empty + 8 * (i & 1), (i >> 1 & 1) ^ 1);
    s.work[i & 1] = t;
    arrive(s.work_full + 8 * (i & 1));
    if (t >= total) break;
    const int next = atomicAdd(p.counter, 1) + gridDim.x;
    const Work w = work_of(p, t);
    t = next;
    if (w.tiles == 0) continue;
    const int hk = w.head / (p.hq / p.hkv), at_q = queries % Q_STAGES;
    wait(s.q_empty + 8 * at_q, (queries / Q_STAGES & 1) ^ 1);
    expect(s.q_full + 8 * at_q, Q_BYTES);
    for (int c = 0; c < D / 64; ++c)
      load(s.q + at_q * Q_BYTES + c * BM * ROW, mq, s.q_full + 8 * at_q, c * 64, w.m0, w.head, w.b);
    ++queries;
    // v of a tile is needed only after k of the next.
    for (int n = w.tiles - 1; n >= -1; --n) {
      if (n >= 0) {
        const int at = n_k % STAGES;
        wait(s.k_empty + 8 * at, (n_k / STAGES & 1) ^ 1);
        expect(s.k_full + 8 * at, K_BYTES);
        for (int c = 0; c < D / 64; ++c)
          load(s.k + at * K_BYTES + c * BN * ROW, mk, s.k_full + 8 * at, c * 64, n * BN, hk, w.b);
        ++n_k;
      }
      if (n < w.tiles - 1) {
        const int at = n_v % STAGES;
        wait(s.v_empty + 8 * at, (n_v / STAGES & 1) ^ 1);
        expect(s.v_full + 8 * at, V_BYTES);
        for (int c = 0; c < DV / 64; ++c)
          load(s.v + at * V_BYTES + c * BN * ROW, mv, s.v_full + 8 * at, c * 64, (n + 1) * BN, hk, w.b);
        ++n_v;
      }
    }
  }
}

// What a thread of a consumer warpgroup holds: rows r and r + 8, columns 8 j + 2 (lane % 4) and the next, of all tiles.
struct Row {
  float top[2], sum[2];  // running maximum in log2 units, sum of exponentials
  int last[2];           // the last key that is seen
};

__device__ __forceinline__ void scores(float (&x)[BN / 2], const Shared& s, int wg, int at_q, int at_k) {
  const u64 k = descriptor(s.k + at_k * K_BYTES, 16, 8 * ROW);
  const u64 q = descriptor(s.q + at_q * Q_BYTES + wg * 64 * ROW, 16, 8 * ROW);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < D / 16; ++i)
    Wgmma<BN>::bf16(x, further(q, i * 32 / ROW * BM * ROW + i * 32 % ROW),
                    further(k, i * 32 / ROW * BN * ROW + i * 32 % ROW), i > 0);
  wgmma_commit();
}

__device__ __forceinline__ void times_v(float (&o)[DV / 2], const u32 (&p)[BN / 4], const Shared& s, int at_v) {
  const u64 v = descriptor(s.v + at_v * V_BYTES, BN * ROW, 8 * ROW);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < BN / 16; ++i) Wgmma<DV>::rows(o, p + 4 * i, further(v, i * 16 * ROW), 1);
  wgmma_commit();
}

// Scores -> probabilities, in place. Returns whether the output must be multiplied by shrink.
template <bool MASKED>
__device__ __forceinline__ bool soften(float (&x)[BN / 2], Row& row, float (&shrink)[2], float scale, int column) {
  if (MASKED) {
#pragma unroll
    for (int j = 0; j < BN / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (column + 8 * j + (e & 1) > row.last[e >> 1]) x[4 * j + e] = -INF;
  }
  float most[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float a = x[2 * r], b = x[2 * r + 1];
#pragma unroll
    for (int j = 1; j < BN / 8; ++j) {
      a = fmaxf(a, x[4 * j + 2 * r]);
      b = fmaxf(b, x[4 * j + 2 * r + 1]);
    }
    a = fmaxf(a, b);
    a = fmaxf(a, __shfl_xor_sync(~0u, a, 1));
    a = fmaxf(a, __shfl_xor_sync(~0u, a, 2));
    most[r] = a * scale;
  }
  const bool grew = most[0] > row.top[0] + LAZY || most[1] > row.top[1] + LAZY;
  const bool rescale = __any_sync(~0u, grew);
  if (rescale) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float top = fmaxf(row.top[r], most[r]);
      shrink[r] = row.top[r] == -INF ? 0.0f : exp2_fast(row.top[r] - top);
      row.sum[r] *= shrink[r];
      row.top[r] = top;
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float base = row.top[r] == -INF ? 0.0f : row.top[r];
    float a = 0.0f, b = 0.0f;
#pragma unroll
    for (int j = 0; j < BN / 8; ++j) {
      x[4 * j + 2 * r] = exp2_fast(fmaf(x[4 * j + 2 * r], scale, -base));
      x[4 * j + 2 * r + 1] = exp2_fast(fmaf(x[4 * j + 2 * r + 1], scale, -base));
      a += x[4 * j + 2 * r];
      b += x[4 * j + 2 * r + 1];
    }
    row.sum[r] += a + b;
  }
  return rescale;
}

__device__ __forceinline__ void pack_all(u32 (&p)[BN / 4], const float (&x)[BN / 2]) {
#pragma unroll
  for (int i = 0; i < BN / 4; ++i) p[i] = pack(x[2 * i], x[2 * i + 1]);
}

struct Count {
  int work, q, k, v;  // tiles of each seen so far, which tell the place in its ring
};

// Scores of the next tile and the product of the last one with v; then the exponentials of the first while the second
// runs. Returns whether the output must be multiplied by shrink.
template <bool MASKED>
__device__ __forceinline__ bool step(float (&x)[BN / 2], const u32 (&prob)[BN / 4], float (&o)[DV / 2], Row& row,
                                     const Shared& s, int wg, int lane, int n, float scale, Count& count,
                                     float (&shrink)[2]) {
  const int at_k = uniform(count.k % STAGES), at_v = uniform(count.v % STAGES), at_q = uniform(count.q % Q_STAGES);
  wait(s.k_full + 8 * at_k, count.k / STAGES & 1);
  turn_wait(wg);
  scores(x, s, wg, at_q, at_k);
  wait(s.v_full + 8 * at_v, count.v / STAGES & 1);
  times_v(o, prob, s, at_v);
  turn_pass(wg);
  wgmma_wait<1>();
  pin(x);
  if (lane == 0) arrive(s.k_empty + 8 * at_k);
  if (n == 0 && lane == 0) arrive(s.q_empty + 8 * at_q);
  const bool rescale = soften<MASKED>(x, row, shrink, scale, n * BN + 2 * (lane & 3));
  // Never true. Without it the assembler moves the exponentials down past the wait for P V, and nothing overlaps.
  never(row.sum[0] + row.sum[1] < 0.0f);
  wgmma_wait<0>();
  pin(o);
  if (lane == 0) arrive(s.v_empty + 8 * at_v);
  ++count.k;
  ++count.v;
  return rescale;
}

__device__ __forceinline__ void multiply(float (&o)[DV / 2], const float (&by)[2]) {
#pragma unroll
  for (int i = 0; i < DV / 2; ++i) o[i] *= by[i >> 1 & 1];
}

// Lanes 0 to 3 hold columns 2 t, 2 t + 1 of four parts of 8; afterwards lane t holds all 8 columns of part t.
__device__ __forceinline__ void transpose(u32 (&a)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const u32 got = __shfl_xor_sync(~0u, odd ? a[i] : a[i + 1], 1);
    (odd ? a[i] : a[i + 1]) = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const u32 got = __shfl_xor_sync(~0u, high ? a[i] : a[i + 2], 2);
    (high ? a[i] : a[i + 2]) = got;
  }
}

__device__ __forceinline__ void finish(const float (&o)[DV / 2], const Row& row, const Work& w, const Params& p, int r0,
                                       int lane) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = row.sum[r];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const bool empty = row.top[r] == -INF;
    const float inverse = empty ? 0.0f : 1.0f / sum;
    const int q = w.m0 + r0 + 8 * r;
    unsigned short* to = p.out + ((long long)(w.b * (long long)p.sq + q) * p.hq + w.head) * DV;
#pragma unroll
    for (int c = 0; c < DV / 32; ++c) {
      u32 a[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = 4 * (4 * c + j) + 2 * r;
        a[j] = pack(o[at] * inverse, o[at + 1] * inverse);
      }
      transpose(a, lane);
      if (q < p.sq) *(uint4*)(to + 32 * c + 8 * (lane & 3)) = make_uint4(a[0], a[1], a[2], a[3]);
    }
    if (q < p.sq && (lane & 3) == 0)
      p.lse[(long long)(w.b * p.hq + w.head) * p.sq + q] =
          empty ? -INF : (row.top[r] + __log2f(sum)) * 0.6931471805599453f;
  }
}

// The next tile of work that sees keys; writes those that see none. False at the end.
__device__ __forceinline__ bool next_work(Work& w, Row& row, const Params& p, const Shared& s, int r0, int lane,
                                          Count& count) {
  for (;;) {
    const int at = count.work & 1;
    wait(s.work_full + 8 * at, count.work >> 1 & 1);
    const int t = s.work[at];
    __syncwarp();
    if (lane == 0) arrive(s.work_empty + 8 * at);
    ++count.work;
    if (t >= p.heads * p.m_tiles) return false;
    w = work_of(p, t);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row.top[r] = -INF;
      row.sum[r] = 0.0f;
      row.last[r] = HF_CAUSAL ? min(p.sk - 1, w.m0 + r0 + 8 * r + p.sk - p.sq) : p.sk - 1;
    }
    if (w.tiles > 0) return true;
    float o[DV / 2];
#pragma unroll
    for (int i = 0; i < DV / 2; ++i) o[i] = 0.0f;
    finish(o, row, w, p, r0, lane);
  }
}

// The scores and probabilities of a tile's first keys, with nothing to overlap.
__device__ __forceinline__ void start(float (&x)[BN / 2], u32 (&prob)[BN / 4], Row& row, const Params& p,
                                      const Shared& s, const Work& w, int wg, int lane, Count& count) {
  const int at_k = uniform(count.k % STAGES), at_q = uniform(count.q % Q_STAGES);
  float shrink[2];
  wait(s.q_full + 8 * at_q, count.q / Q_STAGES & 1);
  wait(s.k_full + 8 * at_k, count.k / STAGES & 1);
  scores(x, s, wg, at_q, at_k);
  wgmma_wait<0>();
  pin(x);
  if (lane == 0) arrive(s.k_empty + 8 * at_k);
  if (w.tiles == 1 && lane == 0) arrive(s.q_empty + 8 * at_q);
  ++count.k;
  soften<true>(x, row, shrink, p.scale, (w.tiles - 1) * BN + 2 * (lane & 3));
  pack_all(prob, x);
}

// The last product of a tile of queries.
__device__ __forceinline__ void end(const u32 (&prob)[BN / 4], float (&o)[DV / 2], const Shared& s, int lane,
                                    Count& count) {
  const int at_v = uniform(count.v % STAGES);
  wait(s.v_full + 8 * at_v, count.v / STAGES & 1);
  times_v(o, prob, s, at_v);
  wgmma_wait<0>();
  pin(o);
  if (lane == 0) arrive(s.v_empty + 8 * at_v);
  ++count.v;
}

__device__ __forceinline__ void consume(const Params& p, const Shared& s, int wg) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3;
  const int r0 = wg * 64 + warp * 16 + (lane >> 2);
  Count count = {0, 0, 0, 0};
  float x[BN / 2], o[DV / 2], shrink[2];
  u32 prob[BN / 4];
  Work w;
  Row row;
  if (wg == HF_WGS - 1) turn_pass(wg);
  while (next_work(w, row, p, s, r0, lane, count)) {
    start(x, prob, row, p, s, w, wg, lane, count);
    // Tiles that all rows of the warpgroup see whole.
    int whole = p.sk / BN, n = w.tiles - 2;
    if (HF_CAUSAL) whole = min(whole, max(w.m0 + wg * 64 + p.sk - p.sq + 1, 0) / BN);
#pragma unroll
    for (int i = 0; i < DV / 2; ++i) o[i] = 0.0f;
    for (; n >= whole; --n) {
      if (step<true>(x, prob, o, row, s, wg, lane, n, p.scale, count, shrink)) multiply(o, shrink);
      pack_all(prob, x);
    }
    for (; n >= 0; --n) {
      if (step<false>(x, prob, o, row, s, wg, lane, n, p.scale, count, shrink)) multiply(o, shrink);
      pack_all(prob, x);
    }
    ++count.q;
    end(prob, o, s, lane, count);
    finish(o, row, w, p, r0, lane);
  }
}

__device__ __forceinline__ void work(const TensorMap* mq, const TensorMap* mk, const TensorMap* mv, const Params& p,
                                     unsigned char* raw) {
  Shared s;
  s.q = (shared_address(raw) + 1023) / 1024 * 1024;
  s.k = s.q + Q_STAGES * Q_BYTES;
  s.v = s.k + STAGES * K_BYTES;
  s.q_full = s.v + STAGES * V_BYTES;
  s.q_empty = s.q_full + 16;
  s.work_full = s.q_full + 32;
  s.work_empty = s.q_full + 48;
  s.k_full = s.q_full + 64;
  s.k_empty = s.k_full + 8 * STAGES;
  s.v_full = s.k_empty + 8 * STAGES;
  s.v_empty = s.v_full + 8 * STAGES;
  s.work = (int*)(raw + (s.v_empty + 8 * STAGES - shared_address(raw)));
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      barrier_init(s.q_full + 8 * i, 1);
      barrier_init(s.q_empty + 8 * i, 4 * HF_WGS);
      barrier_init(s.work_full + 8 * i, 1);
      barrier_init(s.work_empty + 8 * i, 4 * HF_WGS);
    }
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(s.k_full + 8 * i, 1);
      barrier_init(s.v_full + 8 * i, 1);
      barrier_init(s.k_empty + 8 * i, 4 * HF_WGS);
      barrier_init(s.v_empty + 8 * i, 4 * HF_WGS);
    }
    barriers_ready();
  }
  __syncthreads();
  const int wg = uniform(threadIdx.x / 128);
  if (wg == 0) {
    few_registers();
    if (threadIdx.x == 0) produce(p, s, mq, mk, mv);
  } else {
    many_registers();
    consume(p, s, wg - 1);
  }
}

#ifndef HF_HOST
extern "C" __global__ void __launch_bounds__(128 * (HF_WGS + 1), 1)
    hopper_forward(const __grid_constant__ TensorMap mq, const __grid_constant__ TensorMap mk,
                   const __grid_constant__ TensorMap mv, const __grid_constant__ Params p) {
  extern __shared__ unsigned char raw[];
  work(&mq, &mk, &mv, p, raw);
}
#endif

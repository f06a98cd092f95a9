// A plain dense FlashAttention forward on FMA units (no tensor cores), bf16 in and out, fp32 inside: the kind of
// baseline that the paper compares with. For benchmarks only. Set by the launcher: FMA_D (64, 128 or 256; also the width of V),
// FMA_BN (keys a tile), FMA_CAUSAL.
//
// 256 threads as 16 x 16; a thread holds 8 rows x BN / 16 keys of scores and 8 rows x D / 16 columns of the output.
// q stays in shared memory; k and v come in slices of 16 KB, fetched to registers while the slice before is used.

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;

constexpr int D = FMA_D, BN = FMA_BN, BM = 128, SLICE = 4096;
constexpr int K_DIMS = SLICE / BN, K_SLICES = D / K_DIMS, V_KEYS = SLICE / D, V_SLICES = BN / V_KEYS;
constexpr int KEYS = BN / 16, COLUMNS = D / 16;
constexpr bool CAUSAL = FMA_CAUSAL;
#define NEG_INF __int_as_float(0xff800000)

struct Params {
  const u16 *q, *k, *v;  // (b, n, h, D), contiguous
  u16* out;
  float scale;  // softmax_scale * log2(e)
  int n, h, tiles;
};

extern __shared__ __align__(16) float memory[];

__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ u32 pack(float low, float high) {
  u32 y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// Part i of a thread's rows, keys or columns: four in a row of every 64.
template <int N>
__device__ __forceinline__ void load(float (&x)[N], const float* from, int at) {
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    float4 part = *(const float4*)(from + i * 64 + at * 4);
    x[4 * i] = part.x, x[4 * i + 1] = part.y, x[4 * i + 2] = part.z, x[4 * i + 3] = part.w;
  }
}

// Where a line of probabilities keeps a group of four rows: so that writing a column hits all banks.
__device__ __forceinline__ int place(int group, int key) { return group ^ (key / 4 & 7); }

// a[i] b[j] added to c[i][j] for lines first to first + STEPS of a (BM wide) and STEPS lines of b (WIDTH wide).
template <int STEPS, int WIDTH, bool PLACED, int N>
__device__ __forceinline__ void multiply(float (&c)[8][N], const float* a, int first, const float* b, int ty, int tx) {
#pragma unroll 4
  for (int s = 0; s < STEPS; ++s) {
    float x[8], y[N];
    load(x, a + (first + s) * BM, PLACED ? place(ty, first + s) : ty);
    load(y, b + s * WIDTH, tx);
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < N; ++j) c[i][j] = fmaf(x[i], y[j], c[i][j]);
  }
}

__device__ __forceinline__ void widen(const uint4& x, float (&y)[8]) {
  const u32 words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    y[2 * i] = __int_as_float(words[i] << 16);
    y[2 * i + 1] = __int_as_float(words[i] & 0xffff0000u);
  }
}

extern "C" __global__ void __launch_bounds__(256, 1) dense_fma(const Params p) {
  float* const qs = memory;             // [D][BM]
  float* const ps = qs + D * BM;        // [BN][BM]
  float* const slices = ps + BN * BM;   // two of [K_DIMS][BN] or [V_KEYS][D]
  const int t = threadIdx.x, tx = t % 16, ty = t / 16;
  const int tile = p.tiles - 1 - (int)(blockIdx.x % p.tiles), head = blockIdx.x / p.tiles % p.h;
  const i64 base = ((i64)(blockIdx.x / p.tiles / p.h) * p.n * p.h + head) * D, step = (i64)p.h * D;
  const int row0 = tile * BM, keys = CAUSAL ? min(p.n, row0 + BM) : p.n, tiles = (keys + BN - 1) / BN;

  // A thread brings 16 features of a row of q or k, or 2 x 8 columns of v.
  auto row_part = [&](const u16* x, int row, int first, uint4 (&to)[2]) {
    const uint4* from = (const uint4*)(x + base + row * step + first);
    const bool in = row < p.n;
    to[0] = in ? from[0] : uint4{0, 0, 0, 0};
    to[1] = in ? from[1] : uint4{0, 0, 0, 0};
  };
  auto transpose = [&](float* to, int width, int row, int first, const uint4 (&part)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float y[8];
      widen(part[i], y);
#pragma unroll
      for (int e = 0; e < 8; ++e) to[(first + i * 8 + e) * width + row] = y[e];
    }
  };
  for (int part = t / BM; part < D / 16; part += 256 / BM) {
    uint4 x[2];
    row_part(p.q, row0 + t % BM, part * 16, x);
    transpose(qs, BM, t % BM, part * 16, x);
  }

  constexpr int PER_TILE = K_SLICES + V_SLICES;
  uint4 next[2];
  auto fetch = [&](int slice) {
    const int first = slice / PER_TILE * BN, s = slice % PER_TILE;
    if (s < K_SLICES) {
      row_part(p.k, first + t % BN, s * K_DIMS + t / BN * 16, next);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = i * 2048 + t * 8, key = first + (s - K_SLICES) * V_KEYS + at / D;
        next[i] = key < p.n ? *(const uint4*)(p.v + base + key * step + at % D) : uint4{0, 0, 0, 0};
      }
    }
  };
  auto store = [&](int slice) {
    float* to = slices + slice % 2 * SLICE;
    if (slice % PER_TILE < K_SLICES) {
      transpose(to, BN, t % BN, t / BN * 16, next);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float y[8];
        widen(next[i], y);
        float4* at = (float4*)(to + i * 2048 + t * 8);
        at[0] = {y[0], y[1], y[2], y[3]};
        at[1] = {y[4], y[5], y[6], y[7]};
      }
    }
  };

  float o[8][COLUMNS], m[8], l[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    m[i] = NEG_INF, l[i] = 0.0f;
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) o[i][j] = 0.0f;
  }
  fetch(0);
  store(0);
  int slice = 0;
  const int total = tiles * PER_TILE;
#pragma unroll 1
  for (int n = 0; n < tiles; ++n) {
    float s[8][KEYS];
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < KEYS; ++j) s[i][j] = 0.0f;
#pragma unroll 1
    for (int i = 0; i < K_SLICES; ++i, ++slice) {
      __syncthreads();
      fetch(slice + 1);
      multiply<K_DIMS, BN, false>(s, qs, i * K_DIMS, slices + slice % 2 * SLICE, ty, tx);
      store(slice + 1);
    }
    const bool edge = n * BN + BN > p.n || (CAUSAL && n * BN + BN > row0 + 1);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = row0 + i / 4 * 64 + ty * 4 + i % 4;
      float top = m[i], sum = 0.0f;
#pragma unroll
      for (int j = 0; j < KEYS; ++j) {
        const int key = n * BN + j / 4 * 64 + tx * 4 + j % 4;
        s[i][j] *= p.scale;
        if (edge && (key >= p.n || (CAUSAL && key > row))) s[i][j] = NEG_INF;
        top = fmaxf(top, s[i][j]);
      }
#pragma unroll
      for (int offset = 1; offset < 16; offset *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, offset));
      const float factor = ex2(m[i] - top);
      m[i] = top;
#pragma unroll
      for (int j = 0; j < KEYS; ++j) {
        s[i][j] = ex2(s[i][j] - top);
        sum += s[i][j];
      }
      l[i] = l[i] * factor + sum;
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) o[i][j] *= factor;
    }
#pragma unroll
    for (int j = 0; j < KEYS; ++j) {
      const int key = j / 4 * 64 + tx * 4 + j % 4;
#pragma unroll
      for (int i = 0; i < 2; ++i)
        *(float4*)(ps + key * BM + i * 64 + place(ty, key) * 4) =
            float4{s[4 * i][j], s[4 * i + 1][j], s[4 * i + 2][j], s[4 * i + 3][j]};
    }
#pragma unroll 1
    for (int i = 0; i < V_SLICES; ++i, ++slice) {
      __syncthreads();
      if (slice + 1 < total) fetch(slice + 1);
      multiply<V_KEYS, D, true>(o, ps, i * V_KEYS, slices + slice % 2 * SLICE, ty, tx);
      if (slice + 1 < total) store(slice + 1);
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int row = row0 + i / 4 * 64 + ty * 4 + i % 4;
#pragma unroll
    for (int offset = 1; offset < 16; offset *= 2) l[i] += __shfl_xor_sync(~0u, l[i], offset);
    if (row >= p.n) continue;
#pragma unroll
    for (int j = 0; j < COLUMNS; j += 4) {
      uint2 packed = {pack(o[i][j] / l[i], o[i][j + 1] / l[i]), pack(o[i][j + 2] / l[i], o[i][j + 3] / l[i])};
      *(uint2*)(p.out + base + row * step + j / 4 * 64 + tx * 4) = packed;
    }
  }
}

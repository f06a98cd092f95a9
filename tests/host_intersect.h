// What intersect.cu needs on the CPU beside host_cuda.h: votes, matrix loads and products of a warp.
#include "host_cuda.h"

alignas(1024) static char shared_memory[232448];

inline bool __any_sync(u32 mask, bool x) { return __ballot_sync(mask, x) != 0; }
inline bool __syncthreads_or(bool x) {
  static int count[2], turn[host::MAX];
  int me = host::current, side = turn[me] ^= 1;
  count[side] += x;
  __syncthreads();
  bool any = count[side] != 0;
  __syncthreads();
  count[side] = 0;
  return any;
}
inline u32 atomicOr(u32* p, u32 x) {
  u32 old = *p;
  *p |= x;
  return old;
}
inline u16 narrow(int kind, float x) { return kind == 0 ? to_bf16(x) : to_half(x); }
inline float wide(int kind, u32 x) { return kind == 0 ? __uint_as_float(x << 16) : from_half(u16(x)); }
template <int KIND>
u32 pack(float low, float high) {
  return narrow(KIND, low) | u32(narrow(KIND, high)) << 16;
}
inline void copy_async_16(void* to, const void* from) { copy_async<16>(to, from); }
inline void load_matrices(const void* p, u32 (&r)[4]) {
  if (uintptr_t(p) % 16) __builtin_trap();
  const u32* rows = host::exchange(u32((const char*)p - shared_memory));
  int lane = host::current % 32;
  for (int i = 0; i < 4; ++i) {
    u16 part[2];
    for (int e = 0; e < 2; ++e) part[e] = ((const u16*)(shared_memory + rows[i * 8 + lane % 4 * 2 + e]))[lane / 4];
    r[i] = part[0] | u32(part[1]) << 16;
  }
  host::exchange(0);
}
// V in shared memory as a warpgroup reads it; products wait for group_wait, as late as they may.
typedef unsigned long long u64;
template <int PART_BYTES>
u64 describe(const char* v) {
  size_t at = v - shared_memory;
  if (at % 1024 > 7 * 128 || at % 128) __builtin_trap();
  return u64(PART_BYTES) << 32 | at;
}
namespace host {
struct Product {
  float (*c)[4];
  u32 a[4];
  u64 v;
  int kind, columns;
};
static std::vector<Product> products[MAX];
}  // namespace host
template <int KIND, int NT>
void mma_group(float (&c)[NT][4], const u32 (&a)[4], u64 v) {
  host::products[host::current].push_back({c, {a[0], a[1], a[2], a[3]}, v, KIND, NT * 8});
}
inline void group_fence() {}
inline void group_commit() {}
inline void show_to_group() {}
template <int N>
void group_wait(float (&)[2][N][4]) {
  static u32 of[host::MAX / 32][32][4];
  int lane = host::current % 32, warp = host::current / 32;
  for (const host::Product& x : host::products[host::current]) {
    std::memcpy(of[warp][lane], x.a, sizeof x.a);
    __syncwarp();
    for (int n = 0; n < x.columns / 8; ++n)
      for (int e = 0; e < 4; ++e) {
        int row = lane / 4 + e / 2 * 8, column = n * 8 + lane % 4 * 2 + e % 2;
        double sum = x.c[n][e];
        for (int k = 0; k < 16; ++k) {
          u32 p = of[warp][row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
          size_t line = u32(x.v) + k * 128, piece = column % 64 / 8 ^ line / 128 % 8;
          const char* v = shared_memory + column / 64 * (x.v >> 32) + line + piece * 16 + column % 8 * 2;
          sum += double(wide(x.kind, k % 2 ? p >> 16 : p & 0xffff)) * wide(x.kind, *(const u16*)v);
        }
        x.c[n][e] = float(sum);
      }
    __syncwarp();
  }
  host::products[host::current].clear();
}
// The accumulator is fp32; products are summed in double, as a tensor core sums them more exactly than fp32.
template <int KIND>
void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  static u32 of[host::MAX / 32][32][6];
  int lane = host::current % 32, warp = host::current / 32;
  for (int i = 0; i < 4; ++i) of[warp][lane][i] = a[i];
  of[warp][lane][4] = b0, of[warp][lane][5] = b1;
  __syncwarp();
  for (int e = 0; e < 4; ++e) {
    int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    double sum = c[e];
    for (int k = 0; k < 16; ++k) {
      u32 x = of[warp][row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], y = of[warp][column * 4 + k % 8 / 2][4 + k / 8];
      sum += double(wide(KIND, k % 2 ? x >> 16 : x & 0xffff)) * wide(KIND, k % 2 ? y >> 16 : y & 0xffff);
    }
    c[e] = float(sum);
  }
  __syncwarp();
}

// What decode_all.cu needs on the CPU beside host_cuda.h: matrix loads and products of a warp.
#include "host_cuda.h"

alignas(1024) static char shared_memory[232448];

template <bool HALF>
u32 pack(float low, float high) {
  return (HALF ? to_half(low) : to_bf16(low)) | u32(HALF ? to_half(high) : to_bf16(high)) << 16;
}
template <bool HALF>
float unpack(u32 x, int i) {
  x = x >> (16 * i) & 0xffff;
  return HALF ? from_half(u16(x)) : __uint_as_float(x << 16);
}
inline u32 add_halves(u32 x, u32 y) {
  return pack<true>(unpack<true>(x, 0) + unpack<true>(y, 0), unpack<true>(x, 1) + unpack<true>(y, 1));
}
inline float log2_of(float x) { return std::log2(x); }

inline void load_matrices(const char* p, u32 (&r)[4]) {
  if (uintptr_t(p) % 16) __builtin_trap();
  const u32* rows = host::exchange(u32(p - shared_memory));
  int lane = host::current % 32;
  for (int i = 0; i < 4; ++i) {
    u16 part[2];
    for (int e = 0; e < 2; ++e) part[e] = ((const u16*)(shared_memory + rows[i * 8 + lane % 4 * 2 + e]))[lane / 4];
    r[i] = part[0] | u32(part[1]) << 16;
  }
  host::exchange(0);
}

// mma.m16n8k16: lane (g, t) holds a_i at row g + 8 (i % 2) and columns 2 t, 2 t + 1 (+ 8 for i >= 2), b_i at rows 2 t,
// 2 t + 1 (+ 8 for i = 1) and column g, c[i] at row g + 8 (i / 2) and column 2 t + i % 2.
template <bool HALF>
void multiply_add(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const u32 mine[6] = {a0, a1, a2, a3, b0, b1};
  u32 all[6][32];
  for (int i = 0; i < 6; ++i) std::memcpy(all[i], host::exchange(mine[i]), sizeof all[i]);
  const int lane = host::current % 32;
  for (int i = 0; i < 4; ++i) {
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const int holder = k % 8 / 2, upper = k / 8;
      sum += double(unpack<HALF>(all[i / 2 + 2 * upper][lane / 4 * 4 + holder], k % 2)) *
             unpack<HALF>(all[4 + upper][(lane % 4 * 2 + i % 2) * 4 + holder], k % 2);
    }
    c[i] = float(sum);
  }
}

// Runs a CUDA kernel on the CPU, a thread block at a time; every thread is a fiber that yields at warp and block
// synchronisation. For tests of the arithmetic and the indices, not for speed.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

typedef uint32_t u32;
typedef uint16_t u16;
typedef uint8_t u8;
typedef long long i64;

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
using std::max;
using std::min;

struct Dim {
  unsigned x, y, z;
};
static Dim threadIdx, blockIdx, gridDim;

namespace host {
constexpr int MAX = 1024;
static ucontext_t fibers[MAX];  // where a thread starts; from then on jumps, which need no system call
static jmp_buf scheduler, points[MAX];
static std::vector<char> stacks;
static bool started[MAX], done[MAX];
static int threads, current;
static u32 slots[2][MAX];
static int parity[MAX], arrived[MAX / 32 + 1], generation[MAX / 32 + 1];

static void yield() {
  if (!_setjmp(points[current])) _longjmp(scheduler, 1);
}

__attribute__((noinline)) static void resume(int thread) {
  if (_setjmp(scheduler)) return;
  if (started[thread]) _longjmp(points[thread], 1);
  started[thread] = true;
  setcontext(&fibers[thread]);
}

static void wait(int barrier, int size) {
  int mine = generation[barrier];
  if (++arrived[barrier] == size) {
    arrived[barrier] = 0;
    ++generation[barrier];
  } else {
    while (generation[barrier] == mine) yield();
  }
}

// What the 32 lanes of a warp bring; a lane is never two exchanges ahead of another.
static const u32* exchange(u32 x) {
  int me = current, side = parity[me] ^= 1;
  slots[side][me] = x;
  wait(me / 32, 32);
  return &slots[side][me / 32 * 32];
}

template <class F>
void run(F body, Dim grid, int block) {
  static F* entry;
  entry = &body;
  threads = block;
  gridDim = grid;
  stacks.resize(size_t(block) << 15);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        std::memset(parity, 0, sizeof parity);
        for (int t = 0; t < block; ++t) {
          started[t] = done[t] = false;
          getcontext(&fibers[t]);
          fibers[t].uc_stack = {&stacks[size_t(t) << 15], 0, size_t(1) << 15};
          makecontext(&fibers[t], +[] { (*entry)(); done[current] = true; _longjmp(scheduler, 1); }, 0);
        }
        for (int left = block; left;)
          for (int t = 0; t < block; ++t)
            if (!done[t]) {
              current = t;
              threadIdx = {unsigned(t), 0, 0};
              resume(t);
              left -= done[t];
            }
      }
}
}  // namespace host

inline void __syncthreads() { host::wait(host::MAX / 32, host::threads); }
inline void __syncwarp() { host::exchange(0); }
template <class T>
T __shfl_sync(u32, T x, int lane) {
  u32 bits;
  std::memcpy(&bits, &x, 4);
  bits = host::exchange(bits)[lane];
  std::memcpy(&x, &bits, 4);
  return x;
}
template <class T>
T __shfl_xor_sync(u32 mask, T x, int offset) {
  return __shfl_sync(mask, x, (host::current % 32) ^ offset);
}
inline u32 __ballot_sync(u32, bool x) {
  const u32* all = host::exchange(x);
  u32 bits = 0;
  for (int i = 0; i < 32; ++i) bits |= u32(all[i] != 0) << i;
  return bits;
}
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline float __uint_as_float(u32 x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline u32 __float_as_uint(float x) {
  u32 y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline void __threadfence() {}
template <class T>
T atomicAdd(T* p, T x) {
  T old = *p;
  *p += x;
  return old;
}

inline float ex2(float x) { return std::exp2(x); }
inline float from_half(u16 x) {
  _Float16 y;
  std::memcpy(&y, &x, 2);
  return float(y);
}
inline u16 to_half(float x) {
  _Float16 y = _Float16(x);
  u16 bits;
  std::memcpy(&bits, &y, 2);
  return bits;
}
inline u16 to_bf16(float x) {
  u32 bits = __float_as_uint(x);
  if (x != x) return 0x7fff;
  return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
// Asynchronous copies land when they are waited for, as late as they may.
namespace host {
struct Copy {
  void* to;
  const void* from;
  int bytes, group;
};
static std::vector<Copy> copies[MAX];
static int groups[MAX];
}  // namespace host
template <int BYTES>
void copy_async(void* to, const void* from) {
  if ((uintptr_t(to) | uintptr_t(from)) % BYTES) __builtin_trap();
  host::copies[host::current].push_back({to, from, BYTES, host::groups[host::current]});
}
inline void close_group() { ++host::groups[host::current]; }
template <int PENDING>
void wait_groups() {
  auto& copies = host::copies[host::current];
  size_t n = 0;
  for (; n < copies.size() && copies[n].group < host::groups[host::current] - PENDING; ++n)
    std::memcpy(copies[n].to, copies[n].from, copies[n].bytes);
  copies.erase(copies.begin(), copies.begin() + n);
}

inline u32 bytes_of(u32 a, u32 b, u32 selector) {
  uint64_t both = uint64_t(b) << 32 | a;
  u32 out = 0;
  for (int i = 0; i < 4; ++i) out |= u32(both >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return out;
}
inline u32 warp_max_u32(u32 x) {
  const u32* all = host::exchange(x);
  return *std::max_element(all, all + 32);
}
inline u32 warp_add_u32(u32 x) {
  const u32* all = host::exchange(x);
  u32 sum = 0;
  for (int i = 0; i < 32; ++i) sum += all[i];
  return sum;
}

template <int BYTES>
void load(const void* p, u32* out) {
  if (uintptr_t(p) % BYTES) __builtin_trap();  // a GPU would, too
  out[0] = 0;
  std::memcpy(out, p, BYTES);
}

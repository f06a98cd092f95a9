// hopper_forward.cu on the CPU: shared memory with its swizzles, transaction barriers, TMA, wgmma with descriptors and
// register fragments. Every thread of every block is a fiber that yields where it waits.
//
// A product reads its operands only when it is waited for. A load lands at once, or, as the caller likes, only when
// nobody can go on without it. A state in which nobody can go on at all is reported.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <vector>

using std::max;
using std::min;

#define __device__
#define __forceinline__ inline

struct uint4 {
  u32 x, y, z, w;
};
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
struct Dim {
  unsigned x;
};
static Dim threadIdx, blockIdx, gridDim;

inline float __int_as_float(int x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline int __float_as_int(float x) {
  int y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline float __log2f(float x) { return std::log2(x); }
inline int atomicAdd(int* p, int x) {
  int old = *p;
  *p += x;
  return old;
}

namespace host {
constexpr int THREADS = 128 * (HF_WGS + 1), STACK = 1 << 15, BLOCKS = 2, BASE = 16;

struct Transactions {
  int count = 0, left = 0, bytes = 0, phase = 0;
};
struct Named {
  int arrived = 0, generation = 0;
  bool all = true, result = true;
};
struct Op {
  int n, group;
  float* d;
  u64 a, b;
  bool add;
  std::shared_ptr<u32> fragments;  // 4 registers of a of all lanes; none: a is in shared memory
};
struct Block {
  std::vector<uint8_t> memory;
  std::map<u32, Transactions> transactions;
  Named named[17];
};
struct Fiber {
  ucontext_t context;  // where it starts; from then on it jumps, which needs no system call
  jmp_buf point;
  bool started, done;
  int parity, committed;
  u32 slots[2];
  std::deque<Op> ops;
};
static jmp_buf scheduler;
static Fiber fibers[BLOCKS * THREADS];
static std::vector<char> stacks;
static Block blocks[BLOCKS];
static Named warps[BLOCKS * THREADS / 32];
static std::vector<std::shared_ptr<u32>> shared_fragments(BLOCKS* THREADS / 32);
static int current;
static long long changes;
static bool late;
static std::deque<std::function<void()>> loads;

inline Fiber& me() { return fibers[current]; }
inline Block& block() { return blocks[current / THREADS]; }
inline void yield() {
  if (!_setjmp(me().point)) _longjmp(scheduler, 1);
}
__attribute__((noinline)) inline void resume(Fiber& f) {
  if (_setjmp(scheduler)) return;
  if (f.started) _longjmp(f.point, 1);
  f.started = true;
  setcontext(&f.context);
}

inline void arrive(Named& b, int size, bool x = true) {
  ++changes;
  b.all = b.all && x;
  b.arrived += 1;
  if (b.arrived == size) {
    b.result = b.all, b.all = true, b.arrived = 0;
    ++b.generation;
  }
}
inline bool sync(Named& b, int size, bool x = true) {
  const int mine = b.generation;
  arrive(b, size, x);
  while (b.generation == mine) yield();
  return b.result;
}
// Slots of the 32 lanes; a lane is never two exchanges ahead of another.
inline const Fiber* exchange(u32 x, int* side) {
  *side = me().parity ^= 1;
  me().slots[*side] = x;
  sync(warps[current / 32], 32);
  return &fibers[current / 32 * 32];
}

inline void settle(Transactions& t) {
  ++changes;
  if (t.left == 0 && t.bytes == 0) {
    t.left = t.count;
    t.phase ^= 1;
  }
}
inline void arrive(Block& b, u32 bar) {
  Transactions& t = b.transactions.at(bar);
  --t.left;
  settle(t);
}

// Bits 4 to 6 are mixed with bits 7 to 9 of the address.
inline u32 swizzled(u32 at) { return at ^ ((at >> 7 & 7) << 4); }

inline float bf16(uint16_t x) { return __int_as_float(int(x) << 16); }
struct Matrix {
  u32 start, leading, stride;
  explicit Matrix(u64 d)
      : start((d & 0x3fff) << 4), leading((d >> 16 & 0x3fff) << 4), stride((d >> 32 & 0x3fff) << 4) {}
};

inline float element(u32 at) { return bf16(*(const uint16_t*)&block().memory[swizzled(at)]); }

inline void run(const Op& op) {
  const int lane = current % 32, g = lane / 4, t = lane % 4, warp = current / 32 % 4;
  const u32* f = op.fragments.get();
  float a[2][16];
  for (int h = 0; h < 2; ++h)
    for (int k = 0; k < 16; ++k) {
      const int r = warp * 16 + g + 8 * h;
      const Matrix m(op.a);
      if (f == nullptr) {
        a[h][k] = element(m.start + r / 8 * m.stride + r % 8 * 128 + k * 2);
      } else {
        const u32 pair = f[((lane & ~3) + k % 8 / 2) * 4 + (k < 8 ? 0 : 2) + h];
        a[h][k] = bf16(k & 1 ? pair >> 16 : pair & 0xffff);
      }
    }
  const Matrix m(op.b);
  for (int j = 0; j < op.n / 8; ++j)
    for (int e = 0; e < 2; ++e) {
      const int n = 8 * j + 2 * t + e;
      double sum[2] = {};
      for (int k = 0; k < 16; ++k) {
        const float b = element(f ? m.start + n / 64 * m.leading + k / 8 * m.stride + k % 8 * 128 + n % 64 * 2
                                  : m.start + n / 8 * m.stride + n % 8 * 128 + k * 2);
        sum[0] += a[0][k] * b;
        sum[1] += a[1][k] * b;
      }
      for (int h = 0; h < 2; ++h) {
        float& d = op.d[4 * j + 2 * h + e];
        d = float(sum[h]) + (op.add ? d : 0.0f);
      }
    }
}

// Registers of all lanes of a warp, for one instruction.
inline std::shared_ptr<u32> gather(const u32* a) {
  auto& slot = shared_fragments[current / 32];
  if (current % 32 == 0) slot = std::shared_ptr<u32>(new u32[32 * 4], std::default_delete<u32[]>());
  sync(warps[current / 32], 32);
  auto mine = slot;
  for (int i = 0; i < 4; ++i) mine.get()[current % 32 * 4 + i] = a[i];
  sync(warps[current / 32], 32);
  return mine;
}

template <class F>
bool run_blocks(F body, int shared) {
  static F* entry;
  entry = &body;
  stacks.resize(size_t(BLOCKS) * THREADS * STACK);
  const int all = BLOCKS * THREADS;
  for (Block& b : blocks) {
    b = Block();
    b.memory.assign(BASE + shared, 0xff);
  }
  for (auto& w : warps) w = Named();
  loads.clear();
  gridDim = {BLOCKS};
  for (int t = 0; t < all; ++t) {
    Fiber& f = fibers[t];
    f.started = f.done = false, f.parity = 0, f.committed = 0, f.ops.clear();
    getcontext(&f.context);
    f.context.uc_stack = {&stacks[size_t(t) * STACK], 0, size_t(STACK)};
    makecontext(&f.context, +[] { (*entry)(); me().done = true; _longjmp(scheduler, 1); }, 0);
  }
  for (int left = all, idle; left;) {
    const long long before = changes;
    const int were = left;
    for (int t = 0; t < all; ++t)
      if (!fibers[t].done) {
        current = t;
        threadIdx = {unsigned(t % THREADS)}, blockIdx = {unsigned(t / THREADS)};
        resume(fibers[t]);
        left -= fibers[t].done;
      }
    idle = before == changes && were == left ? idle + 1 : 0;
    if (idle == 0) continue;
    if (loads.empty()) return false;  // a deadlock
    auto job = loads.back();  // in no order that one could rely on
    loads.pop_back();
    job();
  }
  return true;
}
}  // namespace host

inline void __syncthreads() { host::sync(host::block().named[0], host::THREADS); }
inline void __syncwarp() { host::sync(host::warps[host::current / 32], 32); }
template <class T>
T __shfl_sync(u32, T x, int lane) {
  u32 bits;
  int side;
  std::memcpy(&bits, &x, 4);
  bits = host::exchange(bits, &side)[lane].slots[side];
  std::memcpy(&x, &bits, 4);
  return x;
}
template <class T>
T __shfl_xor_sync(u32 mask, T x, int offset) {
  return __shfl_sync(mask, x, (host::current % 32) ^ offset);
}
inline bool __any_sync(u32, bool x) { return !host::sync(host::warps[host::current / 32], 32, !x); }

inline u32 shared_address(const void* p) { return u32((const uint8_t*)p - host::block().memory.data()); }
inline void barrier_init(u32 bar, int count) { host::block().transactions[bar] = {count, count, 0, 0}; }
inline void barriers_ready() {}
inline void arrive(u32 bar) { host::arrive(host::block(), bar); }
inline void expect(u32 bar, int bytes) {
  host::block().transactions.at(bar).bytes += bytes;
  arrive(bar);
}
inline void wait(u32 bar, u32 parity) {
  const host::Transactions& t = host::block().transactions.at(bar);
  while (u32(t.phase) == parity) host::yield();
}

// The map: address, sizes of the four dimensions, three strides in bytes, rows of a box.
inline void land(host::Block& block, u32 to, const u64* m, u32 bar, int feature, int row, int head, int b) {
  for (int r = 0; r < int(m[8]); ++r)
    for (int c = 0; c < 128; ++c) {
      const bool inside = row + r < (long long)m[2] && feature + c / 2 < (long long)m[1];
      const uint8_t* from = (const uint8_t*)m[0] + feature * 2 + (row + r) * m[5] + head * m[6] + b * m[7] + c;
      block.memory.at(host::swizzled(to + r * 128 + c)) = inside ? *from : 0;
    }
  host::Transactions& t = block.transactions.at(bar);
  t.bytes -= int(m[8]) * 128;
  host::settle(t);
}
inline void load(u32 to, const TensorMap* map, u32 bar, int feature, int row, int head, int b) {
  host::Block& block = host::block();
  auto job = [&block, to, map, bar, feature, row, head, b] {
    land(block, to, map->opaque, bar, feature, row, head, b);
  };
  if (host::late) {
    host::loads.push_back(job);
  } else {
    job();
  }
}

inline void wgmma_fence() {}
inline void wgmma_commit() { ++host::me().committed; }
template <int N>
void wgmma_wait() {
  __syncwarp();
  auto& ops = host::me().ops;
  while (!ops.empty() && ops.front().group < host::me().committed - N) {
    host::run(ops.front());
    ops.pop_front();
  }
}
template <class T, int N>
void pin(T (&)[N]) {}

template <int N>
struct Wgmma {
  static void bf16(float (&d)[N / 2], u64 a, u64 b, int add) {
    host::me().ops.push_back({N, host::me().committed, d, a, b, add != 0, nullptr});
  }
  static void rows(float (&d)[N / 2], const u32* a, u64 b, int add) {
    host::me().ops.push_back({N, host::me().committed, d, 0, b, add != 0, host::gather(a)});
  }
};

inline void turn_wait(int wg) { host::sync(host::block().named[1 + wg], 256); }
inline void turn_pass(int wg) { host::arrive(host::block().named[1 + (wg + 1) % HF_WGS], 256); }

inline float exp2_fast(float x) { return std::exp2(x); }
inline u32 round_bf16(float x) {
  const u32 bits = __float_as_int(x);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline u32 pack(float low, float high) { return round_bf16(low) | round_bf16(high) << 16; }

inline void never(bool x) {
  if (x) std::abort();
}
inline void few_registers() {}
inline void many_registers() {}

// forward.cu on the CPU: shared memory with its swizzles, transaction barriers, TMA, wgmma with descriptors and
// register fragments, clusters. Every thread of every block is a fiber that yields where it waits.
//
// A product reads its operands only when it is waited for. A load lands at once, or, as the caller likes, only when
// nobody can go on without it. A state in which nobody can go on at all is reported.
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

struct uint2 {
  u32 x, y;
};
struct uint4 {
  u32 x, y, z, w;
};
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
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
inline int __ffs(int x) { return __builtin_ffs(x); }
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
  int n, k, group;
  void* d;
  u64 a, b;
  bool from_shared, sparse, transposed, add, integer, e4m3;
  std::shared_ptr<u32> fragments;  // of all lanes: 4 registers of a and one of places
};
struct Block {
  std::vector<uint8_t> memory;
  std::map<u32, Transactions> transactions;
  Named named[17];
};
struct Fiber {
  ucontext_t context;
  bool done;
  int parity, committed;
  u32 slots[2];
  std::deque<Op> ops;
};
static ucontext_t scheduler;
static Fiber fibers[BLOCKS * THREADS];
static std::vector<char> stacks;
static Block blocks[BLOCKS];
static Named warps[BLOCKS * THREADS / 32], cluster;
static std::vector<std::shared_ptr<u32>> shared_fragments(BLOCKS* THREADS / 32);
static int current;
static long long changes;
static bool late;
static std::deque<std::function<void()>> loads;

inline Fiber& me() { return fibers[current]; }
inline Block& block() { return blocks[current / THREADS]; }
inline void yield() { swapcontext(&me().context, &scheduler); }

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

// Bits 4 and up are mixed with bits 7 and up of the address: rows of 128 bytes repeat after 8, of 64 after 4.
inline u32 swizzled(u32 at, int row) { return at ^ ((at >> 7 & (row == 128 ? 7 : 3)) << 4); }

inline float bf16(uint16_t x) { return __int_as_float(int(x) << 16); }
inline float e4m3(uint8_t x) {
  const int e = x >> 3 & 15, m = x & 7;
  const float y = e ? std::ldexp(1.0f + m / 8.0f, e - 7) : std::ldexp(m / 8.0f, -6);
  return x & 128 ? -y : y;
}

struct Matrix {
  u32 start, leading, stride;
  int row;
  explicit Matrix(u64 d)
      : start((d & 0x3fff) << 4), leading((d >> 16 & 0x3fff) << 4), stride((d >> 32 & 0x3fff) << 4),
        row(d >> 62 == 1 ? 128 : 64) {}
};

inline float element(const Op& op, u32 at, int row) {
  const uint8_t* p = &block().memory[swizzled(at, row)];
  if (op.integer) return *(const int8_t*)p;
  if (op.e4m3) return e4m3(*p);
  return bf16(*(const uint16_t*)p);
}

inline void run(const Op& op) {
  const int lane = current % 32, g = lane / 4, t = lane % 4, warp = current / 32 % 4;
  const int size = op.integer || op.e4m3 ? 1 : 2;
  const int quad = lane & ~3;
  float a[2][64];
  for (int h = 0; h < 2; ++h) {
    for (int k = 0; k < op.k; ++k) a[h][k] = 0.0f;
    const Matrix m(op.a);
    for (int k = 0; k < (op.sparse ? 16 : op.k); ++k) {
      if (op.from_shared) {
        const int r = warp * 16 + g + 8 * h;
        a[h][k] = element(op, m.start + r / 8 * m.stride + r % 8 * m.row + k * size, m.row);
        continue;
      }
      const u32* f = op.fragments.get();
      const u32 pair = f[(quad + k % 8 / 2) * 5 + (k < 8 ? 0 : 2) + h];
      int to = k;
      if (op.sparse) {  // lanes 0 and 1 of four hold the places of 16 features each, for rows g and g + 8
        const int four = k / 2;
        to = four * 4 + (f[(quad + four / 4) * 5 + 4] >> (16 * h + 4 * (four % 4) + 2 * (k & 1)) & 3);
      }
      a[h][to] += bf16(k & 1 ? pair >> 16 : pair & 0xffff);
    }
  }
  const Matrix m(op.b);
  for (int j = 0; j < op.n / 8; ++j)
    for (int e = 0; e < 2; ++e) {
      const int n = 8 * j + 2 * t + e;
      double sum[2] = {};
      for (int k = 0; k < op.k; ++k) {
        const u32 at = op.transposed ? m.start + n / 64 * m.leading + k / 8 * m.stride + k % 8 * 128 + n % 64 * 2
                                     : m.start + n / 8 * m.stride + n % 8 * m.row + k * size;
        const float b = element(op, at, op.transposed ? 128 : m.row);
        sum[0] += a[0][k] * b;
        sum[1] += a[1][k] * b;
      }
      for (int h = 0; h < 2; ++h) {
        if (op.integer) {
          int& d = ((int*)op.d)[4 * j + 2 * h + e];
          d = int(sum[h]) + (op.add ? d : 0);
        } else {
          float& d = ((float*)op.d)[4 * j + 2 * h + e];
          d = float(sum[h]) + (op.add ? d : 0.0f);
        }
      }
    }
}

// Registers of all lanes of a warp, for one instruction.
inline std::shared_ptr<u32> gather(const u32* a, u32 where) {
  auto& slot = shared_fragments[current / 32];
  if (current % 32 == 0) slot = std::shared_ptr<u32>(new u32[32 * 5], std::default_delete<u32[]>());
  sync(warps[current / 32], 32);
  auto mine = slot;
  for (int i = 0; i < 4; ++i) mine.get()[current % 32 * 5 + i] = a[i];
  mine.get()[current % 32 * 5 + 4] = where;
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
  cluster = Named();
  gridDim = {BLOCKS};
  for (int t = 0; t < all; ++t) {
    Fiber& f = fibers[t];
    f.done = false, f.parity = 0, f.committed = 0, f.ops.clear();
    getcontext(&f.context);
    f.context.uc_stack = {&stacks[size_t(t) * STACK], 0, size_t(STACK)};
    f.context.uc_link = &scheduler;
    makecontext(&f.context, +[] { (*entry)(); me().done = true; }, 0);
  }
  for (int left = all, idle; left;) {
    const long long before = changes;
    const int were = left;
    for (int t = 0; t < all; ++t)
      if (!fibers[t].done) {
        current = t;
        threadIdx = {unsigned(t % THREADS)}, blockIdx = {unsigned(t / THREADS)};
        swapcontext(&scheduler, &fibers[t].context);
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

// The map: address, sizes of the four dimensions, three strides in bytes, box (features, rows), bytes an element.
inline void land(host::Block& block, u32 to, const u64* m, u32 bar, int feature, int row, int head, int b) {
  const int width = int(m[8] * m[10]);
  for (int r = 0; r < int(m[9]); ++r)
    for (int c = 0; c < width; ++c) {
      const bool inside = row + r < (long long)m[2] && feature + c / int(m[10]) < (long long)m[1];
      const uint8_t* from = (const uint8_t*)m[0] + feature * m[10] + (row + r) * m[5] + head * m[6] + b * m[7] + c;
      block.memory.at(host::swizzled(to + r * width + c, width)) = inside ? *from : 0;
    }
  host::Transactions& t = block.transactions.at(bar);
  t.bytes -= int(m[9]) * width;
  host::settle(t);
}
inline void load_to(host::Block& block, u32 to, const TensorMap* map, u32 bar, int feature, int row, int head, int b) {
  auto job = [&block, to, map, bar, feature, row, head, b] {
    land(block, to, map->opaque, bar, feature, row, head, b);
  };
  if (host::late) {
    host::loads.push_back(job);
  } else {
    job();
  }
}
#if HF_CLUSTER > 1
#define LOAD_PART load_shared
inline void load_shared(u32 to, const TensorMap* map, u32 bar, int feature, int row, int head, int b) {
  for (host::Block& block : host::blocks) load_to(block, to, map, bar, feature, row, head, b);
}
inline void meet() { host::sync(host::cluster, 2 * host::THREADS); }
#else
#define LOAD_PART load
#endif
inline void load(u32 to, const TensorMap* map, u32 bar, int feature, int row, int head, int b) {
  load_to(host::block(), to, map, bar, feature, row, head, b);
}
inline u32 rank_in_cluster() { return HF_CLUSTER > 1 ? blockIdx.x % 2 : 0; }
inline void release(u32 bar, int lane) {
  if (HF_CLUSTER == 1 && lane == 0) arrive(bar);
  if (HF_CLUSTER > 1 && lane < 2) host::arrive(host::blocks[lane], bar);
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
  static void issue(host::Op op) {
    op.n = N, op.group = host::me().committed;
    host::me().ops.push_back(op);
  }
  static void bf16(float (&d)[N / 2], u64 a, u64 b, int add) {
    issue({0, 16, 0, d, a, b, true, false, false, add != 0, false, false, nullptr});
  }
  static void fp8(float (&d)[N / 2], u64 a, u64 b, int add) {
    issue({0, 32, 0, d, a, b, true, false, false, add != 0, false, true, nullptr});
  }
  static void int8(int (&d)[N / 2], u64 a, u64 b, int add) {
    issue({0, 32, 0, d, a, b, true, false, false, add != 0, true, false, nullptr});
  }
  static void sparse(float (&d)[N / 2], const u32* a, u64 b, u32 meta, int add) {
    issue({0, 32, 0, d, 0, b, false, true, false, add != 0, false, false, host::gather(a, meta)});
  }
  template <int TRANSPOSED>
  static void rows(float (&d)[N / 2], const u32* a, u64 b, int add) {
    issue({0, 16, 0, d, 0, b, false, false, TRANSPOSED != 0, add != 0, false, false, host::gather(a, 0)});
  }
};

inline void turn_wait(int wg) { host::sync(host::block().named[1 + wg], 256); }
inline void turn_pass(int wg) { host::arrive(host::block().named[1 + (wg + 1) % HF_WGS], 256); }
inline bool all_of_warpgroup(bool x, int wg) { return host::sync(host::block().named[8 + wg], 128, x); }
inline void warpgroup_sync(int wg) { host::sync(host::block().named[8 + wg], 128); }

inline float exp2_fast(float x) { return std::exp2(x); }
inline u32 round_bf16(float x) {
  const u32 bits = __float_as_int(x);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline u32 pack(float low, float high) { return round_bf16(low) | round_bf16(high) << 16; }

inline void store_zeros(u32 to) { std::memset(&host::block().memory.at(to), 0, 16); }
inline void store_half(u32 to, u32 bits) { std::memcpy(&host::block().memory.at(to), &bits, 2); }
inline void load_matrices(u32* to, u32 from) {
  const int lane = host::current % 32;
  for (int i = 0; i < 4; ++i) {
    const u32 row = __shfl_sync(~0u, from, 8 * i + lane / 4);
    std::memcpy(&to[i], &host::block().memory.at(row + lane % 4 * 4), 4);
  }
}

inline void never(bool x) {
  if (x) std::abort();
}
inline void few_registers() {}
inline void many_registers() {}

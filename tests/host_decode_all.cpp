// decode_all.cu as a library for the CPU: see host_cuda.h.
#include "decode_all.cu"

extern "C" int launch(int kernel, unsigned x, unsigned y, unsigned z, const Params* p, int size, int shared) {
  if (size != sizeof(Params)) return 1;
  if (kernel == 1) {
    host::run([p] { sfa_combine(*p); }, {x, y, z}, 32 * COMBINE_WARPS);
    return 0;
  }
  if (shared != ALL_BYTES) return 2;
  std::memset(shared_memory, 0xff, sizeof shared_memory);  // what a kernel does not set holds NaN
  host::run([p] { sfa_decode_all(*p); }, {x, y, z}, THREADS);
  return 0;
}

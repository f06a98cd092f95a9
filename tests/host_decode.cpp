// decode.cu as a library for the CPU: see host_cuda.h.
#include "decode.cu"

extern "C" int launch(int kernel, unsigned x, unsigned y, unsigned z, const Params* p, int size, int) {
  if (size != sizeof(Params)) return 1;
  if (kernel == 0) {
    host::run([p] { sfa_decode(*p); }, {x, y, z}, THREADS);
  } else {
    host::run([p] { sfa_combine(*p); }, {x, y, z}, 32 * COMBINE_WARPS);
  }
  return 0;
}

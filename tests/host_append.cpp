// append.cu as a library for the CPU: see host_cuda.h.
#include "append.cu"

extern "C" int launch(unsigned x, unsigned y, unsigned z, const Params* p, int size) {
  if (size != sizeof(Params)) return 1;
  host::run([p] { sfa_append(*p); }, {x, y, z}, THREADS);
  return 0;
}

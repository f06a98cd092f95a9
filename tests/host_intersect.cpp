// intersect.cu as a library for the CPU: see host_cuda.h.
#include "intersect.cu"

extern "C" int shared_bytes() { return SHARED; }

extern "C" int launch(int kernel, unsigned blocks, const void* p) {
  if (kernel == 0) {
    host::run([p] { sfa_pages(*(const PageParams*)p); }, {blocks, 1, 1}, PAGE);
  } else {
    // What a kernel does not set holds NaN.
    std::memset(shared_memory, 0xff, sizeof shared_memory);
    host::run([p] { sfa_intersect(*(const Params*)p); }, {blocks, 1, 1}, THREADS);
  }
  return 0;
}

// hopper_forward.cu as a library for the CPU: see host_hopper.h.
#include "hopper_forward.cu"

// 0, or 1 if Params is not what the caller thinks, or 2 if the threads wait for each other.
extern "C" int launch(const TensorMap* mq, const TensorMap* mk, const TensorMap* mv, const Params* p, int size,
                      int shared, int late) {
  if (size != sizeof(Params)) return 1;
  host::late = late;
  auto body = [=] { work(mq, mk, mv, *p, host::block().memory.data() + host::BASE); };
  return host::run_blocks(body, shared) ? 0 : 2;
}

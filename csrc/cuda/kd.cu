#include "block.h"
#include "kd.h"

namespace fastkd::gpu {

void kd(const Kd& a, Stream stream) { kd(a, Launcher{static_cast<cudaStream_t>(stream)}); }

}  // namespace fastkd::gpu

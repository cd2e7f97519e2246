#include "block.h"
#include "kd.h"

namespace fastkd::gpu {

void kd(const Kd& a, Stream stream) { kd<false>(a, Launcher{static_cast<cudaStream_t>(stream)}); }
void kd_sigmoid(const Kd& a, Stream stream) { kd<true>(a, Launcher{static_cast<cudaStream_t>(stream)}); }

}  // namespace fastkd::gpu

#include "block.h"
#include "losses.h"

namespace fastkd::gpu {

void resized_kd(const Resized& a, Stream stream) { resized_kd(a, Launcher{static_cast<cudaStream_t>(stream)}); }

}  // namespace fastkd::gpu

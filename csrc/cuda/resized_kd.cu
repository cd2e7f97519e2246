#include "block.h"
#include "resize.h"

namespace fastkd::gpu {

void resized_kd(const Resized& a, Stream stream) { resized<2>(a, Launcher{static_cast<cudaStream_t>(stream)}); }

}  // namespace fastkd::gpu

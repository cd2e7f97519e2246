#include "block.h"
#include "resize.h"

namespace fastkd::gpu {

void resized_cross_entropy(const Resized& a, Stream stream) { resized<1>(a, Launcher{static_cast<cudaStream_t>(stream)}); }

}  // namespace fastkd::gpu

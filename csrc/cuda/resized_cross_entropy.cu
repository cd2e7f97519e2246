#include "block.h"
#include "losses.h"

namespace fastkd::gpu {

void resized_cross_entropy(const Resized& a, Stream stream) { resized_cross_entropy(a, Launcher{static_cast<cudaStream_t>(stream)}); }

}  // namespace fastkd::gpu

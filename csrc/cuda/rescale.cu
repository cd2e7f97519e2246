#include "rescale.h"

#include "block.h"

namespace fastkd::gpu {

void rescale(const Rescale& a, Stream stream) { rescale(a, Launcher{static_cast<cudaStream_t>(stream)}); }

}  // namespace fastkd::gpu

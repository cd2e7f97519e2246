#include "block.h"
#include "nfd.h"

namespace fastkd::gpu {

void nfd_forward(const NfdForward& a, Stream stream) { nfd_forward(a, Launcher{static_cast<cudaStream_t>(stream)}); }
void nfd_backward(const NfdBackward& a, Stream stream) { nfd_backward(a, Launcher{static_cast<cudaStream_t>(stream)}); }

}  // namespace fastkd::gpu

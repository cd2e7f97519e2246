#include "block.h"
#include "losses.h"

namespace fastkd::gpu {

void resized_shaped_cross_entropy(const Resized& a, double label_smoothing, double focal_gamma, Stream stream) {
    resized_shaped_cross_entropy(a, label_smoothing, focal_gamma, Launcher{static_cast<cudaStream_t>(stream)});
}

}  // namespace fastkd::gpu

#include "block.h"
#include "cells_each.h"

namespace fastkd::gpu {

void resized_binary_cross_entropy(const ResizedBinaryCrossEntropy& a, Stream stream) { resized_binary_cross_entropy(a, Launcher{static_cast<cudaStream_t>(stream)}); }

}  // namespace fastkd::gpu

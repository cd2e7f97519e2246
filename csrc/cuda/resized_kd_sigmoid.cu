#include "block.h"
#include "cells_each.h"

namespace fastkd::gpu {

void resized_kd_sigmoid(const Resized& a, Stream stream) { resized_kd_sigmoid(a, Launcher{static_cast<cudaStream_t>(stream)}); }

}  // namespace fastkd::gpu

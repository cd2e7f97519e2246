#include "rdd.h"

#include "block.h"
#include "losses.h"

namespace fastkd::gpu {

void confidence(const Resized& a, bool by_label, Stream stream) {
    confidence(a, by_label, Launcher{static_cast<cudaStream_t>(stream)});
}
void difficulty(const Difficulty& a, Stream stream) { difficulty(a, Launcher{static_cast<cudaStream_t>(stream)}); }
void kth_smallest(const Kth& a, Stream stream) { kth_smallest(a, Launcher{static_cast<cudaStream_t>(stream)}); }

}  // namespace fastkd::gpu

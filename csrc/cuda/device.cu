#include <algorithm>
#include <map>
#include <mutex>

#include "block.h"
#include "kernels.h"

namespace fastkd::gpu {
namespace {

__global__ void __launch_bounds__(kThreads) nothing() {}

int attribute(cudaDeviceAttr which, int index) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, index), "asking a device for an attribute");
    return value;
}

// Maximum cluster size if each block uses the maximum shared memory. It can be smaller on a partitioned GPU.
int largest_cluster(int shared) {
    check(cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "asking for shared memory");
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(kMostCluster);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    int blocks = 0;
    check(cudaOccupancyMaxPotentialClusterSize(&blocks, nothing, &config), "asking a device for its clusters");
    return std::min(blocks, kMostCluster);
}

}  // namespace

// The current device must be `index`.
Device device(int index) {
    static std::mutex mutex;
    static std::map<int, Device> known;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(index);
    if (found != known.end()) return found->second;
    const int shared = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    const bool clusters = attribute(cudaDevAttrComputeCapabilityMajor, index) >= 9 && attribute(cudaDevAttrClusterLaunch, index);
    const Device device{shared, attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index),
                        attribute(cudaDevAttrMultiProcessorCount, index), clusters ? largest_cluster(shared) : 0};
    return known[index] = device;
}

}  // namespace fastkd::gpu

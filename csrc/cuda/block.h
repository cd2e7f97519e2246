// Interface of a kernel to its thread block. emulation.h implements the same for the CPU.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "types.h"

namespace fastkd::gpu {

#if defined(__CUDA_ARCH__)
constexpr bool kHasClusters = __CUDA_ARCH__ >= 900;
#else
constexpr bool kHasClusters = true;
#endif

class Block {
public:
    __device__ __forceinline__ Block(char* shared) : shared_(shared) {}

    FASTKD_DEVICE int thread() const { return static_cast<int>(threadIdx.x); }
    FASTKD_DEVICE int64_t index() const { return blockIdx.x; }
    FASTKD_DEVICE void sync() { __syncthreads(); }

    template <class X>
    FASTKD_DEVICE X* shared(int64_t offset) {
        return reinterpret_cast<X*>(shared_ + offset);
    }

    // XOR shuffle: the value of the lane whose index differs in `mask`. As with all exchanges, all lanes of a warp must
    // call it together.
    template <class X>
    FASTKD_DEVICE X shuffle_xor(const X& x, int mask) {
        return exchange(x, [mask](int word) { return __shfl_xor_sync(0xffffffff, word, mask); });
    }
    // The value of the lane `by` below; the lowest lanes get their own.
    template <class X>
    FASTKD_DEVICE X shuffle_up(const X& x, int by) {
        return exchange(x, [by](int word) { return __shfl_up_sync(0xffffffff, word, by); });
    }
    FASTKD_DEVICE bool any(bool x) { return __any_sync(0xffffffff, x); }
    // Bit i: x of lane i.
    FASTKD_DEVICE uint32_t ballot(bool x) { return __ballot_sync(0xffffffff, x); }
    // Increments a counter in shared memory if `counts`. In a branch, the address would be computed again for each count.
    FASTKD_DEVICE void count(int* counter, bool counts) {
        asm volatile(
            "{\n"
            ".reg .pred counts;\n"
            "setp.ne.u32 counts, %1, 0;\n"
            "@counts red.shared.add.u32 [%0], 1;\n"
            "}" ::"r"(address(counter)),
            "r"(static_cast<uint32_t>(counts))
            : "memory");
    }
    // Adds to a counter in device memory. Integers: the sum does not depend on the order.
    FASTKD_DEVICE void add(int64_t* counter, int64_t x) {
        atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(x));
    }

    // Clusters (sm_90)

    // The corresponding address in the shared memory of another block of the cluster.
    template <class X>
    FASTKD_DEVICE const X* remote(const X* p, int rank) {
        const X* out;
        asm("mapa.u64 %0, %1, %2;" : "=l"(out) : "l"(p), "r"(rank));
        return out;
    }
    // Split barrier over all threads of a cluster: writes before arrive are visible after wait.
    FASTKD_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
    FASTKD_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

    // Bulk copies to shared memory, counted by mbarriers (sm_90)
    //
    // One thread initialises all barriers; then, for each, it sets the expected byte count and starts the copies. Each
    // barrier is used once. Addresses and sizes are multiples of 16 bytes.

    FASTKD_DEVICE void prepare_barriers(int count) {
        for (int i = 0; i < count; ++i)
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(barrier(i))) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    FASTKD_DEVICE void expect(int which, int64_t bytes) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier(which))),
                     "r"(static_cast<uint32_t>(bytes))
                     : "memory");
    }
    FASTKD_DEVICE void bulk_copy(void* to, const void* from, int64_t bytes, int which) {
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                         address(to)),
                     "l"(from), "r"(static_cast<uint32_t>(bytes)), "r"(address(barrier(which)))
                     : "memory");
    }
    FASTKD_DEVICE void wait(int which) {
        asm volatile(
            "{\n"
            ".reg .pred there;\n"
            "again:\n"
            "mbarrier.try_wait.parity.shared::cta.b64 there, [%0], 0;\n"
            "@!there bra again;\n"
            "}" ::"r"(address(barrier(which)))
            : "memory");
    }

    // Asynchronous 16-byte copies (cp.async), per thread

    FASTKD_DEVICE void copy_16(void* to, const void* from) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address(to)), "l"(from) : "memory");
    }
    FASTKD_DEVICE void end_of_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
    // Waits until at most the last `later` groups are in flight.
    template <int later>
    FASTKD_DEVICE void wait_for_groups() {
        asm volatile("cp.async.wait_group %0;" ::"n"(later) : "memory");
    }

private:
    template <class X, class F>
    FASTKD_DEVICE static X exchange(const X& x, const F& f) {
        static_assert(sizeof(X) % sizeof(int) == 0);
        int words[sizeof(X) / sizeof(int)];
        memcpy(words, &x, sizeof x);
        FASTKD_UNROLL
        for (int& word : words) word = f(word);
        X out;
        memcpy(&out, words, sizeof out);
        return out;
    }
    FASTKD_DEVICE uint64_t* barrier(int i) { return reinterpret_cast<uint64_t*>(shared_) + i; }
    FASTKD_DEVICE static uint32_t address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

    char* shared_;
};

template <class Body>
__global__ void __launch_bounds__(ThreadsOf<Body>::value, Body::kBlocksPerCores) run(const __grid_constant__ Body body) {
    extern __shared__ __align__(128) char shared[];
    if constexpr (kHasClusters || !NeedsClusters<Body>::value) {
        Block block(shared);
        body(block);
    }
}

inline void check(cudaError_t code, const char* what) {
    if (code != cudaSuccess)
        throw std::runtime_error(std::string("fastkd: ") + what + " failed: " + cudaGetErrorString(code));
}

// Launches a kernel on a stream of the current device.
struct Launcher {
    cudaStream_t stream;

    template <class Body>
    void operator()(const Body& body, int64_t blocks, int64_t shared, int cluster = 0) const {
        if (blocks > 0x7fffffff) throw std::runtime_error("fastkd: the map is too large for one launch");
        if (shared > 48 * 1024)
            check(cudaFuncSetAttribute(run<Body>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
                  "asking for shared memory");
        cudaLaunchAttribute attribute{};
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(static_cast<unsigned>(blocks));
        config.blockDim = dim3(ThreadsOf<Body>::value);
        config.dynamicSmemBytes = static_cast<size_t>(shared);
        config.stream = stream;
        config.attrs = &attribute;
        config.numAttrs = cluster > 0 ? 1 : 0;
        check(cudaLaunchKernelEx(&config, run<Body>, body), "a kernel launch");
    }
};

}  // namespace fastkd::gpu

// Element and vector types of the kernels. The same source is compiled by nvcc for GPUs and by the host compiler for
// the emulation (emulation.h). FMAs are explicit and contraction is off (-fmad=false, -ffp-contract=off), so both
// compute the same bits.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../cpu/kernels.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FASTKD_DEVICE __device__ __forceinline__
#define FASTKD_ANYWHERE __host__ __device__ inline
#define FASTKD_UNROLL _Pragma("unroll")
#define FASTKD_ROLLED _Pragma("unroll 1")
#define FASTKD_UNROLL_BY(n) _Pragma("unroll")
#else
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#define FASTKD_DEVICE inline
#define FASTKD_ANYWHERE inline
#define FASTKD_UNROLL
#define FASTKD_ROLLED
#define FASTKD_UNROLL_BY(n)
#endif

namespace fastkd::gpu {

#if defined(__CUDACC__)
using f16 = __half;
using bf16 = __nv_bfloat16;
#else
using f16 = torch::headeronly::Half;
using bf16 = torch::headeronly::BFloat16;
#endif

constexpr int kThreads = 256;  // per block
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

// Block size of a kernel; kThreads by default.
template <class Body, class = void>
struct ThreadsOf {
    static constexpr int value = kThreads;
};
template <class Body>
struct ThreadsOf<Body, std::void_t<decltype(Body::kThreadsOfBlock)>> {
    static constexpr int value = Body::kThreadsOfBlock;
};
// Whether a kernel needs clusters and bulk copies.
template <class Body, class = void>
struct NeedsClusters : std::false_type {};
template <class Body>
struct NeedsClusters<Body, std::void_t<decltype(Body::kOneRead)>> : std::true_type {};

// fp32, fp16 or bf16, resolved at run time: for pairs of different dtypes, and for maps not aligned to 16 bytes. Loaded
// one element per thread.
struct Any {};

template <class T>
struct AccumulatorOf {
    using type = float;
};
template <>
struct AccumulatorOf<double> {
    using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

// a * b + c, rounded once.
FASTKD_DEVICE float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#else
    return __builtin_fmaf(a, b, c);
#endif
}
FASTKD_DEVICE double multiply_add(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
    return __fma_rn(a, b, c);
#else
    return __builtin_fma(a, b, c);
#endif
}

// Number of bits that are set.
FASTKD_DEVICE int count_bits(uint32_t x) {
#if defined(__CUDA_ARCH__)
    return __popc(x);
#else
    return __builtin_popcount(x);
#endif
}

#if defined(__CUDACC__)
using Bits128 = uint4;
#else
struct alignas(16) Bits128 {
    uint32_t word[4];
};
#endif

// V neighbouring elements in one 16-byte access, or a single element.
template <class T, int V>
FASTKD_DEVICE void load(const T* from, Accumulator<T> (&to)[V]) {
    if constexpr (V == 1) {
        to[0] = static_cast<Accumulator<T>>(*from);
    } else {
        static_assert(V * sizeof(T) == sizeof(Bits128));
        const Bits128 bits = *reinterpret_cast<const Bits128*>(from);
        T part[V];
        memcpy(part, &bits, sizeof bits);
        FASTKD_UNROLL
        for (int i = 0; i < V; ++i) to[i] = static_cast<Accumulator<T>>(part[i]);
    }
}
// Stores to device memory.
template <class T, int V>
FASTKD_DEVICE void store(T* to, const Accumulator<T> (&from)[V]) {
    if constexpr (V == 1) {
        *to = static_cast<T>(from[0]);
    } else {
        static_assert(V * sizeof(T) == sizeof(Bits128));
        T part[V];
        FASTKD_UNROLL
        for (int i = 0; i < V; ++i) part[i] = static_cast<T>(from[i]);
        Bits128 bits;
        memcpy(&bits, part, sizeof bits);
#if defined(__CUDA_ARCH__)
        __stcg(reinterpret_cast<Bits128*>(to), bits);  // a plain assignment may be split into four stores
#else
        *reinterpret_cast<Bits128*>(to) = bits;
#endif
    }
}

// A map in device memory, read and written V elements at a time.
template <class T, int V>
struct Source {
    const T* data;

    FASTKD_ANYWHERE explicit Source(const void* p, DType = {}) : data(static_cast<const T*>(p)) {}
    template <class Index>
    FASTKD_DEVICE void read(Index at, Accumulator<T> (&to)[V]) const {
        load<T, V>(data + at, to);
    }
    FASTKD_DEVICE Accumulator<T> one(int64_t at) const { return static_cast<Accumulator<T>>(data[at]); }
};
template <class T, int V>
struct Sink {
    T* data;

    FASTKD_ANYWHERE explicit Sink(void* p, DType = {}) : data(static_cast<T*>(p)) {}
    FASTKD_DEVICE void write(int64_t at, const Accumulator<T> (&from)[V]) const { store<T, V>(data + at, from); }
    FASTKD_DEVICE void one(int64_t at, Accumulator<T> from) const { data[at] = static_cast<T>(from); }
};

template <>
struct Source<Any, 1> {
    const void* data;
    DType type;

    FASTKD_ANYWHERE Source(const void* p, DType t) : data(p), type(t) {}
    FASTKD_DEVICE float one(int64_t at) const {
        switch (type) {
            case DType::f16: return static_cast<float>(static_cast<const f16*>(data)[at]);
            case DType::bf16: return static_cast<float>(static_cast<const bf16*>(data)[at]);
            default: return static_cast<const float*>(data)[at];
        }
    }
    FASTKD_DEVICE void read(int64_t at, float (&to)[1]) const { to[0] = one(at); }
};
template <>
struct Sink<Any, 1> {
    void* data;
    DType type;

    FASTKD_ANYWHERE Sink(void* p, DType t) : data(p), type(t) {}
    FASTKD_DEVICE void one(int64_t at, float from) const {
        switch (type) {
            case DType::f16: static_cast<f16*>(data)[at] = static_cast<f16>(from); break;
            case DType::bf16: static_cast<bf16*>(data)[at] = static_cast<bf16>(from); break;
            default: static_cast<float*>(data)[at] = from;
        }
    }
    FASTKD_DEVICE void write(int64_t at, const float (&from)[1]) const { one(at, from[0]); }
};

template <class X, class Y>
FASTKD_ANYWHERE std::common_type_t<X, Y> least(X a, Y b) {
    return a < b ? a : b;
}
template <class X, class Y>
FASTKD_ANYWHERE std::common_type_t<X, Y> most(X a, Y b) {
    return a > b ? a : b;
}
FASTKD_ANYWHERE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
// a / b for a >= 0 and b < 2^32, in 32 bits where they suffice: a 64-bit division takes a hundred instructions.
FASTKD_ANYWHERE int64_t quotient(int64_t a, int64_t b) {
    return a >> 32 ? a / b : static_cast<int64_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b));
}
FASTKD_ANYWHERE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace fastkd::gpu

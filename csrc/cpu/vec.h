// One vector type for every instruction set: GCC and Clang vector extensions, as wide as this compilation's flags
// allow.
//
// Everything is in the namespace of the instruction set and uses no std:: template: the linker keeps one copy of an
// inline function, and an AVX-512 copy must not run on an older processor.
#pragma once

#include <cstdint>
#include <new>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#ifndef FASTKD_ISA
#error "compile with -DFASTKD_ISA=baseline, avx2 or avx512 (setup.py does)"
#endif

namespace fastkd::FASTKD_ISA {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

template <class T>
struct VecOf {
    typedef T type __attribute__((vector_size(kVecBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(T));

using Float = Vec<float>;
using Double = Vec<double>;
using Int = Vec<int32_t>;
using Bits = Vec<uint32_t>;
typedef uint16_t Half __attribute__((vector_size(kVecBytes / 2)));  // as many lanes as Float

struct f16 {
    uint16_t bits;
};
struct bf16 {
    uint16_t bits;
};

template <class T>
inline Vec<T> set1(T x) {
    return x - Vec<T>{};
}

// Memory

template <class V>
inline V load_raw(const void* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
template <class V>
inline void store_raw(void* p, V v) {
    __builtin_memcpy(p, &v, sizeof v);
}

inline Float load(const float* p) { return load_raw<Float>(p); }
inline Double load(const double* p) { return load_raw<Double>(p); }
inline void store(float* p, Float v) { store_raw(p, v); }
inline void store(double* p, Double v) { store_raw(p, v); }

inline Float load(const bf16* p) { return (Float)(__builtin_convertvector(load_raw<Half>(p), Bits) << 16); }

// Round to nearest even; a NaN keeps its sign and stays a NaN.
inline void store(bf16* p, Float v) {
    const Bits b = (Bits)v;
    const Bits rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    const Bits nan = (b >> 16) | 0x40;
    store_raw(p, __builtin_convertvector(v == v ? rounded : nan, Half));
}

// Hardware conversion, rounding to nearest even (maskz: GCC warns about the undefined operand of the plain form).
#if defined(__AVX512F__)
inline Float load(const f16* p) { return (Float)_mm512_maskz_cvtph_ps(0xffff, load_raw<__m256i>(p)); }
inline void store(f16* p, Float v) { store_raw(p, _mm512_maskz_cvtps_ph(0xffff, (__m512)v, 0)); }
#elif defined(__F16C__)
inline Float load(const f16* p) { return (Float)_mm256_cvtph_ps(load_raw<__m128i>(p)); }
inline void store(f16* p, Float v) { store_raw(p, _mm256_cvtps_ph((__m256)v, 0)); }
#else
// Shifts exponent and mantissa into place. A multiplication then corrects the exponent bias and normalises subnormals.
// Infinity and NaN need their exponent set separately.
inline Float load(const f16* p) {
    const Bits h = __builtin_convertvector(load_raw<Half>(p), Bits);
    const Bits body = (h & 0x7fff) << 13;
    const Bits value = (Bits)((Float)body * set1(0x1p112f));
    const Bits special = body | 0x7f800000;
    return (Float)((body >= (0x7c00 << 13) ? special : value) | ((h & 0x8000) << 16));
}
// Rounds to nearest even on the integer bits. Below the smallest normal half, adding 0.5 aligns and rounds.
inline void store(f16* p, Float v) {
    const Bits b = (Bits)v & 0x7fffffff;
    const Bits normal = (b + 0xfff + ((b >> 13) & 1) - (112u << 23)) >> 13;
    const Bits tiny = (Bits)((Float)b + set1(0.5f)) - 0x3f000000;
    const Bits big = b > 0x7f800000 ? Bits{} + 0x7e00 : Bits{} + 0x7c00;
    const Bits h = b >= (143u << 23) ? big : b < (113u << 23) ? tiny : normal;
    store_raw(p, __builtin_convertvector(h | (((Bits)v >> 16) & 0x8000), Half));
}
#endif

// The first n < kLanes elements; the other lanes are fill.
template <class T>
inline Vec<T> load_part(const T* p, int64_t n, T fill) {
    T lanes[kLanes<T>];
    for (int i = 0; i < kLanes<T>; ++i) lanes[i] = i < n ? p[i] : fill;
    return load(lanes);
}
template <class T>
inline void store_part(T* p, int64_t n, Vec<T> v) {
    T lanes[kLanes<T>];
    store(lanes, v);
    for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

// A prefetch hint; any address is allowed, also past the end.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// Arithmetic

// a > b ? a : b. A NaN in b is kept, one in a is not; callers detect NaN in their sums. Compilers do not turn the
// vector comparison into x86's single instruction.
inline Double max(Double a, Double b) { return a > b ? a : b; }
inline Float max(Float a, Float b) {
#if defined(__AVX512F__)
    return (Float)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Float)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

// Whether any lane of a comparison holds.
inline bool any(Vec<int64_t> mask) {
    int64_t bits = 0;
    for (int i = 0; i < kLanes<double>; ++i) bits |= mask[i];
    return bits != 0;
}
inline bool any(Int mask) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)mask) != 0;
#else
    int32_t bits = 0;
    for (int i = 0; i < kLanes<float>; ++i) bits |= mask[i];
    return bits != 0;
#endif
}

template <class T>
inline T sum_lanes(Vec<T> v) {
    T lanes[kLanes<T>];
    store(lanes, v);
    for (int w = kLanes<T> / 2; w; w /= 2)
        for (int i = 0; i < w; ++i) lanes[i] += lanes[i + w];
    return lanes[0];
}
template <class T>
inline T max_lanes(Vec<T> v) {
    T lanes[kLanes<T>];
    store(lanes, v);
    for (int w = kLanes<T> / 2; w; w /= 2)
        for (int i = 0; i < w; ++i) lanes[i] = lanes[i] > lanes[i + w] ? lanes[i] : lanes[i + w];
    return lanes[0];
}

// e^x for x <= 88, at most 2 ulp; results below 2^-126 become 0; NaN stays NaN.
//
// x = n ln2 + r, |r| <= ln2 / 2, with ln2 split in two so that n ln2 is exact; degree-6 minimax polynomial in r; 2^n is
// added to the exponent bits.
inline Float exp(Float x) {
    const Float lowest = set1(-88.0f);
    x = max(lowest, x);
    const Float shifter = set1(0x1.8p23f);  // adding it rounds to an integer, left in the low bits
    const Float shifted = x * set1(0x1.715476p0f) + shifter;
    const Float n = shifted - shifter;
    const Float r = (x - n * set1(0x1.63p-1f)) + n * set1(0x1.bd0106p-13f);
    const Float r2 = r * r;  // Estrin's scheme: half the latency of Horner's, and a softmax is latency-bound
    const Float p01 = r + set1(1.0f);
    const Float p23 = r * set1(0x1.5554a2p-3f) + set1(0.5f);
    const Float p46 = r2 * set1(0x1.6b6de6p-10f) + (r * set1(0x1.123008p-7f) + set1(0x1.55568ap-5f));
    const Float p = (r2 * r2) * p46 + (r2 * p23 + p01);
    return p * (Float)(((Bits)shifted + 127) << 23);
}

// ln x for positive normal x, about 1 ulp; exactly 0 at 1; NaN stays NaN.
//
// x = 2^e m, m in [sqrt(1/2), sqrt(2)); ln m = 2 atanh(f), f = (m - 1) / (m + 1), an odd series in f, |f| < 0.172.
inline Float log(Float x) {
    const Bits b = (Bits)x - 0x3f3504f3;
    const Float e = __builtin_convertvector((Int)b >> 23, Float);
    const Float m = (Float)((b & 0x7fffff) + 0x3f3504f3);
    const Float d = m - set1(1.0f);
    const Float f = d / (m + set1(1.0f));
    const Float z = f * f;
    Float p = set1(0.23584351f);
    p = p * z + set1(0.28537204f);
    p = p * z + set1(0.40000337f);
    p = p * z + set1(0.66666667f);
    const Float small = e * set1(-0x1.bd0106p-13f) + (d - f * (d - z * p));
    return (e * set1(0x1.63p-1f) + small) + (x - x);
}

// 1 - e^-x for x >= 0, within a few ulp, also near 0.
inline Float one_minus_exp(Float x) {
    Float p = set1(2.7557319e-6f);
    p = p * x - set1(2.4801587e-5f);
    p = p * x + set1(1.9841270e-4f);
    p = p * x - set1(1.3888889e-3f);
    p = p * x + set1(8.3333333e-3f);
    p = p * x - set1(4.1666667e-2f);
    p = p * x + set1(1.6666667e-1f);
    p = p * x - set1(0.5f);
    p = p * x + set1(1.0f);
    return x < 0.5f ? x * p : set1(1.0f) - exp(-x);
}
// ln(1 + x) for 0 <= x <= 1, within a few ulp, also near 0: 2 atanh(f), f = x / (2 + x), an odd series in f <= 1 / 3.
inline Float log1p(Float x) {
    const Float f = x / (x + set1(2.0f));
    const Float z = f * f;
    Float p = set1(1.0f / 15);
    p = p * z + set1(1.0f / 13);
    p = p * z + set1(1.0f / 11);
    p = p * z + set1(1.0f / 9);
    p = p * z + set1(1.0f / 7);
    p = p * z + set1(1.0f / 5);
    p = p * z + set1(1.0f / 3);
    return (f + f) + (f + f) * (z * p);
}

// fp64 is for exactness, not speed: the C library per lane.
inline Double exp(Double x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
    return x;
}
inline Double log(Double x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_log(x[i]);
    return x;
}

inline Double one_minus_exp(Double x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = -__builtin_expm1(-x[i]);
    return x;
}
inline Double log1p(Double x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_log1p(x[i]);
    return x;
}

// Lane sums in fp64: for Float, lane i holds the sum of lanes i and i + kLanes<double>.
inline Double widened(Double v) { return v; }
inline Double widened(Float v) {
    typedef float Part __attribute__((vector_size(kVecBytes / 2)));
    Part parts[2];
    __builtin_memcpy(parts, &v, sizeof v);
    return __builtin_convertvector(parts[0], Double) + __builtin_convertvector(parts[1], Double);
}

// Scratch

// n uninitialised elements, aligned to a cache line.
template <class T>
class Scratch {
public:
    // Aligned manually: aligned allocation bypasses the allocator's caches of small blocks.
    explicit Scratch(int64_t n)
        : block_(n ? operator new(n * sizeof(T) + 64) : nullptr),
          data_(reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(block_) + 63) & ~uintptr_t{63})) {}
    ~Scratch() { operator delete(block_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    operator T*() const { return data_; }

private:
    void* const block_;
    T* const data_;
};

}  // namespace fastkd::FASTKD_ISA

// Shared by the losses over pixels: exponentials, labels, block reductions.
#pragma once

#include "plan.h"

namespace fastkd::gpu {

FASTKD_DEVICE float exponential(float x) { return expf(x); }
FASTKD_DEVICE double exponential(double x) { return exp(x); }
FASTKD_DEVICE float logarithm(float x) { return logf(x); }
FASTKD_DEVICE double logarithm(double x) { return log(x); }

FASTKD_DEVICE float expm1_of(float x) { return expm1f(x); }
FASTKD_DEVICE double expm1_of(double x) { return expm1(x); }

// fp32 is a single GPU instruction; results below 2^-126 are 0.
FASTKD_DEVICE float exp2_of(float x) {
#if defined(__CUDA_ARCH__)
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
#else
    return exp2f(x);
#endif
}
FASTKD_DEVICE double exp2_of(double x) { return exp2(x); }
FASTKD_DEVICE float log2_of(float x) { return log2f(x); }
FASTKD_DEVICE double log2_of(double x) { return log2(x); }

// a / b to two units in the last place, for b below 2^126: two instructions instead of ten.
FASTKD_DEVICE float fast_ratio(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fdividef(a, b);
#else
    return a / b;
#endif
}
FASTKD_DEVICE double fast_ratio(double a, double b) { return a / b; }

template <class A>
FASTKD_DEVICE A largest(A a, A b) {
    return b > a ? b : a;
}

// A label's class, or -1 if it is ignored or out of range.
FASTKD_DEVICE int class_among(int64_t label, int64_t ignore_index, int64_t classes) {
    return label != ignore_index && label >= 0 && label < classes ? static_cast<int>(label) : -1;
}

// Class of a pixel (0 if there are no labels), or -1 if it is ignored or out of range.
template <class Pixels>
FASTKD_DEVICE int class_of(const Pixels& pixels, int64_t classes, int64_t i) {
    int64_t label;
    switch (pixels.label) {
        case Label::none: return 0;
        case Label::u8: label = static_cast<const uint8_t*>(pixels.target)[i]; break;
        case Label::i32: label = static_cast<const int32_t*>(pixels.target)[i]; break;
        default: label = static_cast<const int64_t*>(pixels.target)[i];
    }
    return class_among(label, pixels.ignore_index, classes);
}

// f(pointer to the labels in their dtype): outside a loop, so that the loads of several iterations can be in flight. Null
// if there are no labels.
template <class F>
FASTKD_DEVICE void with_targets(const LabelPixels& pixels, const F& f) {
    switch (pixels.label) {
        case Label::none: return f(static_cast<const uint8_t*>(nullptr));
        case Label::u8: return f(static_cast<const uint8_t*>(pixels.target));
        case Label::i32: return f(static_cast<const int32_t*>(pixels.target));
        default: return f(static_cast<const int64_t*>(pixels.target));
    }
}

// Whether a mask or a NaN in `known` excludes a label pixel.
template <class A>
FASTKD_DEVICE bool excluded(const LabelPixels& pixels, const A* known, int64_t i) {
    return (pixels.mask && !pixels.mask[i]) || (known && known[i] != known[i]);
}

// The class of a label pixel, or -1.
template <class A>
FASTKD_DEVICE int label_of(const LabelPixels& pixels, const A* known, int64_t classes, int64_t i) {
    return excluded(pixels, known, i) ? -1 : class_of(pixels, classes, i);
}

// Block reduction, result in every thread, fixed order; `warps` is shared memory for kWarps of X.
template <class Block, class X>
FASTKD_DEVICE X sum_block(Block& block, X x, X* warps) {
    for (int bit = 1; bit < kWarp; bit *= 2) x = x + block.shuffle_xor(x, bit);
    if (block.thread() % kWarp == 0) warps[block.thread() / kWarp] = x;
    block.sync();
    X sum = warps[0];
    for (int w = 1; w < kWarps; ++w) sum = sum + warps[w];
    block.sync();  // so that `warps` can be reused
    return sum;
}

// Sums `count` numbers into one partial sum per block.
template <class X>
struct PartialSums {
    static constexpr int kBlocksPerCores = 4;

    const X* terms;
    int64_t count;
    double* parts;  // (blocks,)
    int blocks;

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        const int64_t step = static_cast<int64_t>(blocks) * kThreads;
        double sum = 0;
        for (int64_t i = block.index() * kThreads + block.thread(); i < count; i += 4 * step) {
            X term[4];
            FASTKD_UNROLL
            for (int u = 0; u < 4; ++u) term[u] = i + u * step < count ? terms[i + u * step] : X(0);
            FASTKD_UNROLL
            for (const X& x : term) sum += static_cast<double>(x);
        }
        sum = sum_block(block, sum, block.template shared<double>(0));
        if (block.thread() == 0) parts[block.index()] = sum;
    }
};

// Single block: final sum of a few hundred partial sums of the loss and of the count.
template <class A>
struct Total {
    static constexpr int kBlocksPerCores = 1;

    const double* parts;  // (count,), or null
    int64_t count;
    const double* counted;  // (counters,), or null: all pixels are counted
    int counters;
    int64_t all;
    bool mean;
    double scale;
    A *loss, *total;  // or null

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        double sum = 0, n = 0;
        for (int64_t i = block.thread(); parts && i < count; i += kThreads) sum += parts[i];
        for (int i = block.thread(); counted && i < counters; i += kThreads) n += counted[i];
        sum = sum_block(block, sum, block.template shared<double>(0));
        n = sum_block(block, n, block.template shared<double>(0));
        if (block.thread() != 0) return;
        if (!counted) n = static_cast<double>(all);
        if (parts) *loss = static_cast<A>(scale * sum / (mean && n != 0 ? n : 1.0));
        if (total) *total = static_cast<A>(n);
    }
};

constexpr int64_t kSumScratch = kWarps * 8;  // bytes of shared memory for sum_block

// `parts` holds total.count numbers, followed by room for the partial sums.
template <class A, class Launch>
void launch_total(Total<A> total, double* parts, const Launch& launch) {
    if (parts && total.count > kFewParts) {
        const int blocks = count_blocks(total.count);
        launch(PartialSums<double>{parts, total.count, parts + total.count, blocks}, blocks, kSumScratch);
        parts += total.count;
        total.count = blocks;
    }
    total.parts = parts;
    launch(total, 1, kSumScratch);
}

}  // namespace fastkd::gpu

// What the losses over pixels share: exponentials, labels, sums over a block.
#pragma once

#include "types.h"

namespace fastkd::gpu {

FASTKD_DEVICE float exponential(float x) { return expf(x); }
FASTKD_DEVICE double exponential(double x) { return exp(x); }
FASTKD_DEVICE float logarithm(float x) { return logf(x); }
FASTKD_DEVICE double logarithm(double x) { return log(x); }

template <class A>
FASTKD_DEVICE A largest(A a, A b) {
    return b > a ? b : a;
}

// A pixel's class (0 where there are no labels), or -1 if it does not count: ignored, or none of the classes.
template <class Pixels>
FASTKD_DEVICE int class_of(const Pixels& pixels, int64_t classes, int64_t i) {
    int64_t label;
    switch (pixels.label) {
        case Label::none: return 0;
        case Label::u8: label = static_cast<const uint8_t*>(pixels.target)[i]; break;
        case Label::i32: label = static_cast<const int32_t*>(pixels.target)[i]; break;
        default: label = static_cast<const int64_t*>(pixels.target)[i];
    }
    return label != pixels.ignore_index && label >= 0 && label < classes ? static_cast<int>(label) : -1;
}

// The sum over the block, in every thread, in an order of its own; `warps` is shared memory for kWarps of X.
template <class Block, class X>
FASTKD_DEVICE X sum_block(Block& block, X x, X* warps) {
    for (int bit = 1; bit < kWarp; bit *= 2) x = x + block.shuffle_xor(x, bit);
    if (block.thread() % kWarp == 0) warps[block.thread() / kWarp] = x;
    block.sync();
    X sum = warps[0];
    for (int w = 1; w < kWarps; ++w) sum = sum + warps[w];
    block.sync();  // warps can be used again
    return sum;
}

}  // namespace fastkd::gpu

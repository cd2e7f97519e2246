// Bilinear interpolation of label pixels from the four corners of their cell.
#pragma once

#include "pixels.h"

namespace fastkd::gpu {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
// Instead of -inf, which times a neighbour's weight of 0 is NaN: its exponential is 0 whatever it is blended with.
constexpr double kLow = -1e37, kMasked = -1e29;

template <class A>
struct Corners {
    A top_left, top_right, bottom_left, bottom_right;
};

// A side's logits at a thread's cell, from class to class.
template <class A>
struct Walk {
    const A *top, *bottom;

    FASTKD_DEVICE Corners<A> next(int step) {
        const Corners<A> out{top[0], top[1], bottom[0], bottom[1]};
        top += step;
        bottom += step;
        return out;
    }
};

// A label pixel is one fused multiplication and addition a row for each end, and one more a pixel.
template <class A>
struct Blend {
    A left, down_left, step, down_step;

    FASTKD_DEVICE explicit Blend(const Corners<A>& c)
        : left(c.top_left), down_left(c.bottom_left - c.top_left), step(c.top_right - c.top_left),
          down_step((c.bottom_right - c.bottom_left) - step) {}
};

// Where the digits must be kept: a neighbour that weighs 0 contributes exactly 0, whatever it is.
template <class A>
FASTKD_DEVICE A blended(A one, A other, A weight) {
    return weight == 0 ? one : multiply_add(weight, other, (1 - weight) * one);
}
template <class A>
FASTKD_DEVICE A exact_value(const Corners<A>& c, A down, A right) {
    return blended(blended(c.top_left, c.bottom_left, down), blended(c.top_right, c.bottom_right, down), right);
}

}  // namespace fastkd::gpu

// Bilinear interpolation of label pixels from the four corners of their cell.
#pragma once

#include <type_traits>

#include "pixels.h"

namespace fastkd::gpu {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
// Replaces -inf, whose product with a neighbour's weight of 0 would be NaN. Its exponential is 0 after any blending.
constexpr double kLow = -1e37, kMasked = -1e29;

template <class A>
struct Corners {
    A top_left, top_right, bottom_left, bottom_right;
};

// Iterates over the classes of a side's logits at a thread's cell.
template <class A>
struct Walk {
    const A *top, *bottom;

    FASTKD_DEVICE Corners<A> next(int step, int beside) {
        const Corners<A> out{top[0], top[beside], bottom[0], bottom[beside]};
        top += step;
        bottom += step;
        return out;
    }
};

// Coefficients for label pixels: per row one FMA for each end, then one FMA per pixel.
template <class A>
struct Blend {
    A left, down_left, step, down_step;

    FASTKD_DEVICE explicit Blend(const Corners<A>& c)
        : left(c.top_left), down_left(c.bottom_left - c.top_left), step(c.top_right - c.top_left),
          down_step((c.bottom_right - c.bottom_left) - step) {}
};

// Exact interpolation: a neighbour of weight 0 contributes exactly 0, even at inf or NaN.
template <class A>
FASTKD_DEVICE A blended(A one, A other, A weight) {
    return weight == 0 ? one : multiply_add(weight, other, (1 - weight) * one);
}
template <class A>
FASTKD_DEVICE A exact_value(const Corners<A>& c, A down, A right) {
    return blended(blended(c.top_left, c.bottom_left, down), blended(c.top_right, c.bottom_right, down), right);
}

// The original map, for label pixels that are recomputed: after subtracting a maximum of 1e8 the significant digits are
// lost.
template <class A>
struct Given {
    using Element = std::conditional_t<sizeof(A) == 8, double, Any>;

    const void* data;
    DType type;
    bool channels_last;
    int64_t c, h, w;
    A scale;

    // Offsets of the four corners for class 0.
    struct Places {
        int64_t top_left, top_right, bottom_left, bottom_right;
    };
    FASTKD_DEVICE Places places(int64_t n, int y, int x) const {
        const int64_t top = (n * (channels_last ? 1 : c) * h + within(y, h)) * w, left = within(x, w);
        const int64_t bottom = top + (within(y + 1, h) - within(y, h)) * w, right = within(x + 1, w);
        const int64_t step = channels_last ? c : 1;
        return {(top + left) * step, (top + right) * step, (bottom + left) * step, (bottom + right) * step};
    }
    FASTKD_DEVICE Corners<A> corners(const Places& at, int64_t k) const {
        const int64_t move = k * (channels_last ? 1 : h * w);
        return {one(at.top_left + move), one(at.top_right + move), one(at.bottom_left + move),
                one(at.bottom_right + move)};
    }

private:
    FASTKD_DEVICE static int64_t within(int at, int64_t size) { return least(most(at, 0), size - 1); }
    FASTKD_DEVICE A one(int64_t at) const {
        const A value = Source<Element, 1>(data, type).one(at) * scale;
        return value < static_cast<A>(kLow) ? static_cast<A>(kLow) : value;
    }
};

}  // namespace fastkd::gpu

// Centred moments of a pair of samples, computed per tile about the tile's mean and merged by Chan's rule in an order
// that depends only on the shape. Means are relative to one element of the group: fp32 cannot hold the mean itself if
// mean| >> std.
#pragma once

#include "types.h"

namespace fastkd::gpu {

// Count, means, and the sums of (s - mean_s)^2, (t - mean_t)^2, (s - mean_s)(t - mean_t).
template <class A>
struct Moments {
    A n, mean_s, mean_t, ss, tt, st;
};

// Factors for merging two counts: the total, the second's fraction of it, and that fraction times the first.
template <class A>
struct Counts {
    A total, share, cross;

    FASTKD_DEVICE Counts(A a, A b) : total(a + b), share(b == 0 ? A(0) : b / total), cross(a * share) {}
};

template <class A>
FASTKD_DEVICE Moments<A> merged(const Moments<A>& a, const Moments<A>& b, const Counts<A>& n) {
    const A ds = b.mean_s - a.mean_s, dt = b.mean_t - a.mean_t;
    return {n.total,
            multiply_add(ds, n.share, a.mean_s),
            multiply_add(dt, n.share, a.mean_t),
            multiply_add(ds * ds, n.cross, a.ss + b.ss),
            multiply_add(dt * dt, n.cross, a.tt + b.tt),
            multiply_add(ds * dt, n.cross, a.st + b.st)};
}
template <class A>
FASTKD_DEVICE Moments<A> merged(const Moments<A>& a, const Moments<A>& b) {
    return merged(a, b, Counts<A>(a.n, b.n));
}

// Moments of a tile; replaces its elements by their deviations from the shifts.
template <class A, int R, int V>
FASTKD_DEVICE Moments<A> moments_of(A (&s)[R][V], A (&t)[R][V], A shift_s, A shift_t) {
    A sum_s = 0, sum_t = 0;
    FASTKD_UNROLL
    for (int i = 0; i < R * V; ++i) {
        sum_s += s[i / V][i % V] -= shift_s;
        sum_t += t[i / V][i % V] -= shift_t;
    }
    constexpr A share = A(1) / (R * V);
    const A mean_s = sum_s * share, mean_t = sum_t * share;
    A ss = 0, tt = 0, st = 0;
    FASTKD_UNROLL
    for (int i = 0; i < R * V; ++i) {
        const A ds = s[i / V][i % V] - mean_s, dt = t[i / V][i % V] - mean_t;
        ss = multiply_add(ds, ds, ss);
        tt = multiply_add(dt, dt, tt);
        st = multiply_add(ds, dt, st);
    }
    return {static_cast<A>(R * V), mean_s, mean_t, ss, tt, st};
}

// Converts means relative to the shifts to absolute means.
template <class A>
FASTKD_DEVICE Moments<double> absolute(const Moments<A>& m, A shift_s, A shift_t) {
    return {static_cast<double>(m.n),
            static_cast<double>(shift_s) + static_cast<double>(m.mean_s),
            static_cast<double>(shift_t) + static_cast<double>(m.mean_t),
            static_cast<double>(m.ss),
            static_cast<double>(m.tt),
            static_cast<double>(m.st)};
}

// Merges lanes whose indices differ in the bits from `from` up, into the lowest lane.
template <class Block, class A>
FASTKD_DEVICE Moments<A> merge_lanes(Block& block, Moments<A> m, int from = 1) {
    for (int bit = from; bit < kWarp; bit *= 2) m = merged(m, block.shuffle_xor(m, bit));
    return m;
}

}  // namespace fastkd::gpu

// Online softmax of a pair: two maxima, two sums of exponentials, and the dot product for the KL divergence.
#pragma once

#include "vec.h"

namespace fastkd::FASTKD_ISA {

// sum_s = sum exp((s - max_s) / tau), sum_t likewise,
// dot = sum exp((t - max_t) / tau) ((t - max_t) - (s - max_s)) / tau; KL = dot / sum_t + log(sum_s / sum_t).
struct SoftmaxPair {
    double max_s = -__builtin_inf(), max_t = -__builtin_inf(), sum_s = 0, sum_t = 0, dot = 0;
};

// Factor that rescales a sum from one maximum to another. An empty sum has maximum -inf and stays 0.
inline double rescale(double from, double to, double inv_tau) {
    return from == to || from == -__builtin_inf() ? 1 : __builtin_exp((from - to) * inv_tau);
}

inline void merge(SoftmaxPair& a, const SoftmaxPair& b, double inv_tau) {
    const double max_s = a.max_s > b.max_s ? a.max_s : b.max_s, max_t = a.max_t > b.max_t ? a.max_t : b.max_t;
    // Changing both maxima adds (shift of t - shift of s) to every difference in the sum.
    const auto moved = [&](const SoftmaxPair& x) {
        const double move = ((x.max_t - max_t) - (x.max_s - max_s)) * inv_tau;
        return x.sum_t == 0 ? 0 : rescale(x.max_t, max_t, inv_tau) * (x.dot + (move == 0 ? 0 : x.sum_t * move));
    };
    const double dot = moved(a) + moved(b);
    a.sum_s = a.sum_s * rescale(a.max_s, max_s, inv_tau) + b.sum_s * rescale(b.max_s, max_s, inv_tau);
    a.sum_t = a.sum_t * rescale(a.max_t, max_t, inv_tau) + b.sum_t * rescale(b.max_t, max_t, inv_tau);
    a.max_s = max_s;
    a.max_t = max_t;
    a.dot = dot;
}

// Sums of one vector per side for given maxima; T is the lane type.
template <class T>
struct SoftmaxSums {
    Vec<T> s{}, t{}, dot{};

    void add(Vec<T> ds, Vec<T> dt) {
        const Vec<T> et = exp(dt);
        s += exp(ds);
        t += et;
        dot += et == 0 ? Vec<T>{} : et * (dt - ds);  // probability 0 contributes exactly 0, also at -inf
    }
    void add(const SoftmaxSums& o) {
        s += o.s;
        t += o.t;
        dot += o.dot;
    }
};

// With a maximum of -inf, -inf - max would be NaN; any finite replacement makes the exponentials 0.
template <class V>
inline V finite_max(V m) {
    return m == -__builtin_inff() ? V{} : m;
}

// One group per lane; add() takes tile blocks of (rows, W).
template <class Acc>
struct LaneSoftmax {
    static constexpr int W = kLanes<Acc>;
    Vec<Acc> max_s = set1(Acc(-__builtin_inff())), max_t = max_s;
    SoftmaxSums<Acc> sums;

    SoftmaxPair lane(int l) const { return {max_s[l], max_t[l], sums.s[l], sums.t[l], sums.dot[l]}; }

    void add(const Acc* s, const Acc* t, int64_t rows, Acc inv_tau) {
        Vec<Acc> top_s = max_s, top_t = max_t;
        for (int64_t r = 0; r < rows; ++r) {
            top_s = max(top_s, load(s + r * W));
            top_t = max(top_t, load(t + r * W));
        }
        const Vec<Acc> ref_s = finite_max(top_s), ref_t = finite_max(top_t);
        const Vec<Acc> move_s = sums.s == 0 ? Vec<Acc>{} : (max_s - ref_s) * inv_tau;
        const Vec<Acc> move_t = sums.t == 0 ? Vec<Acc>{} : (max_t - ref_t) * inv_tau;
        const Vec<Acc> scale_t = exp(move_t);
        sums.s *= exp(move_s);
        sums.dot = sums.t == 0 ? Vec<Acc>{} : scale_t * (sums.dot + sums.t * (move_t - move_s));
        sums.t *= scale_t;
        SoftmaxSums<Acc> tile;  // partial sum: two levels keep fp32 sums short
        for (int64_t r = 0; r < rows; ++r)
            tile.add((load(s + r * W) - ref_s) * inv_tau, (load(t + r * W) - ref_t) * inv_tau);
        sums.add(tile);
        max_s = top_s;
        max_t = top_t;
    }
};

// Softmax sums of n contiguous elements that fit the L1 cache.
template <class Acc>
inline SoftmaxPair span_softmax(const Acc* s, const Acc* t, int64_t n, Acc inv_tau) {
    constexpr int W = kLanes<Acc>;
    const Acc lowest = -__builtin_inff();
    Vec<Acc> max_s = set1(lowest), max_t = max_s;
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        max_s = max(max_s, load(s + i));
        max_t = max(max_t, load(t + i));
    }
    if (i < n) {
        max_s = max(max_s, load_part(s + i, n - i, lowest));
        max_t = max(max_t, load_part(t + i, n - i, lowest));
    }
    const Acc top_s = max_lanes<Acc>(max_s), top_t = max_lanes<Acc>(max_t);
    const Acc ref_s = top_s == lowest ? 0 : top_s, ref_t = top_t == lowest ? 0 : top_t;
    SoftmaxSums<Acc> sums;
    for (i = 0; i + W <= n; i += W) {
        prefetch(s + n + i);  // the next span, while this one is in cache
        prefetch(t + n + i);
        sums.add((load(s + i) - ref_s) * inv_tau, (load(t + i) - ref_t) * inv_tau);
    }
    if (i < n)
        sums.add((load_part(s + i, n - i, lowest) - ref_s) * inv_tau,
                 (load_part(t + i, n - i, lowest) - ref_t) * inv_tau);
    return {top_s, top_t, sum_lanes<Acc>(sums.s), sum_lanes<Acc>(sums.t), sum_lanes<Acc>(sums.dot)};
}

}  // namespace fastkd::FASTKD_ISA

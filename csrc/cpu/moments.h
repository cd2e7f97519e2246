// Centred moments of a pair of samples: in Acc about the mean of each tile, merged in fp64 by Chan's rule.
#pragma once

#include "vec.h"

namespace fastkd::FASTKD_ISA {

// Count, means, and the sums of (s - mean_s)^2, (t - mean_t)^2, (s - mean_s)(t - mean_t).
struct Moments {
    double n = 0, mean_s = 0, mean_t = 0, ss = 0, tt = 0, st = 0;
};

inline void merge(Moments& a, const Moments& b) {
    const double n = a.n + b.n, share = b.n / n, cross = a.n * share;
    const double ds = b.mean_s - a.mean_s, dt = b.mean_t - a.mean_t;
    a.n = n;
    a.mean_s += ds * share;
    a.mean_t += dt * share;
    a.ss += b.ss + ds * ds * cross;
    a.tt += b.tt + dt * dt * cross;
    a.st += b.st + ds * dt * cross;
}

// Sums of deviations from a shift near the mean. The first-order sums correct the rounding of the shift.
template <class V>
struct Deviations {
    V s{}, t{}, ss{}, tt{}, st{};

    void add(V ds, V dt) {
        s += ds;
        t += dt;
        ss += ds * ds;
        tt += dt * dt;
        st += ds * dt;
    }
    void add(const Deviations& o) {
        s += o.s;
        t += o.t;
        ss += o.ss;
        tt += o.tt;
        st += o.st;
    }
};

template <class T>
inline Moments moments_about(double n, double shift_s, double shift_t, const Deviations<T>& d) {
    const double rem_s = d.s / n, rem_t = d.t / n;
    return {n,
            shift_s + rem_s,
            shift_t + rem_t,
            d.ss - n * rem_s * rem_s,
            d.tt - n * rem_t * rem_t,
            d.st - n * rem_s * rem_t};
}

// Moments of n contiguous elements that fit the L1 cache: first the shifts, then the deviations.
template <class Acc>
inline Moments span_moments(const Acc* s, const Acc* t, int64_t n) {
    constexpr int W = kLanes<Acc>;
    Vec<Acc> s0{}, s1{}, t0{}, t1{};
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        s0 += load(s + i);
        t0 += load(t + i);
        s1 += load(s + i + W);
        t1 += load(t + i + W);
    }
    for (; i < n; i += W) {
        s0 += load_part(s + i, n - i, Acc(0));
        t0 += load_part(t + i, n - i, Acc(0));
    }
    const Acc shift_s = sum_lanes<Acc>(s0 + s1) / static_cast<Acc>(n);
    const Acc shift_t = sum_lanes<Acc>(t0 + t1) / static_cast<Acc>(n);
    const Vec<Acc> ks = set1(shift_s), kt = set1(shift_t);
    Deviations<Vec<Acc>> a, b;
    for (i = 0; i + 2 * W <= n; i += 2 * W) {
        prefetch(s + n + i);  // the next span, while this one is in cache
        prefetch(t + n + i);
        prefetch(s + n + i + W);
        prefetch(t + n + i + W);
        a.add(load(s + i) - ks, load(t + i) - kt);
        b.add(load(s + i + W) - ks, load(t + i + W) - kt);
    }
    for (; i < n; i += W) a.add(load_part(s + i, n - i, shift_s) - ks, load_part(t + i, n - i, shift_t) - kt);
    a.add(b);
    return moments_about<Acc>(n, shift_s, shift_t,
                              {sum_lanes<Acc>(a.s), sum_lanes<Acc>(a.t), sum_lanes<Acc>(a.ss), sum_lanes<Acc>(a.tt),
                               sum_lanes<Acc>(a.st)});
}

// One group per lane; add() takes tile blocks of (rows, W).
template <class Acc>
struct LaneMoments {
    static constexpr int W = kLanes<Acc>;
    double n = 0;
    double mean_s[W] = {}, mean_t[W] = {}, ss[W] = {}, tt[W] = {}, st[W] = {};

    Moments lane(int l) const { return {n, mean_s[l], mean_t[l], ss[l], tt[l], st[l]}; }

    void add(const Acc* s, const Acc* t, int64_t rows) {
        Vec<Acc> ks{}, kt{};
        for (int64_t r = 0; r < rows; ++r) {
            ks += load(s + r * W);
            kt += load(t + r * W);
        }
        ks /= static_cast<Acc>(rows);
        kt /= static_cast<Acc>(rows);
        Deviations<Vec<Acc>> d, odd;
        int64_t r = 0;
        for (; r + 2 <= rows; r += 2) {
            d.add(load(s + r * W) - ks, load(t + r * W) - kt);
            odd.add(load(s + (r + 1) * W) - ks, load(t + (r + 1) * W) - kt);
        }
        if (r < rows) d.add(load(s + r * W) - ks, load(t + r * W) - kt);
        d.add(odd);
        Acc shift_s[W], shift_t[W], d_s[W], d_t[W], d_ss[W], d_tt[W], d_st[W];
        store(shift_s, ks);
        store(shift_t, kt);
        store(d_s, d.s);
        store(d_t, d.t);
        store(d_ss, d.ss);
        store(d_tt, d.tt);
        store(d_st, d.st);
        for (int l = 0; l < W; ++l) {
            Moments m = lane(l);
            merge(m, moments_about<Acc>(rows, shift_s[l], shift_t[l], {d_s[l], d_t[l], d_ss[l], d_tt[l], d_st[l]}));
            mean_s[l] = m.mean_s;
            mean_t[l] = m.mean_t;
            ss[l] = m.ss;
            tt[l] = m.tt;
            st[l] = m.st;
        }
        n += rows;
    }
};

}  // namespace fastkd::FASTKD_ISA

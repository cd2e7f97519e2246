// NFD: mean of (z(S) - z(T))^2 per group of M elements, where z is the z-score within the group; d below is that mean.
//
//   d = vs is^2 + vt it^2 - 2 c is it,  is = (vs + eps)^-1/2,  it = (vt + eps)^-1/2
//   dd/ds = A (s - mean_s) - B (t - mean_t),  A = 2/M is^2 (1 - vs is^2 + c is it),  B = 2/M is it
//
// The forward reads S and T once. The backward reads both again and writes the gradient from six numbers per group.
// Means are stored as shift + remainder: a single fp32 number is too coarse if |mean| >> std.
#include "moments.h"
#include "reduce.h"

namespace fastkd::FASTKD_ISA {
namespace {

constexpr int64_t kSpan = 2048;       // elements per input; both inputs fit the L1 cache
constexpr int64_t kItem = 8 * kSpan;  // elements of a group per work item
constexpr int64_t kChannels = 128;    // channels_last: channels and pixels per work item
constexpr int64_t kPixels = 2048;
constexpr int64_t kStats = 6;

struct Finished {
    double loss, a, b;
};

// Clamps moments that rounding made inconsistent (a negative variance, a covariance beyond sqrt(vs vt)): with variances
// near 0 their error would be divided by eps.
inline Finished finished(const Moments& m, double eps) {
    const double vs = m.ss < 0 ? 0 : m.ss / m.n, vt = m.tt < 0 ? 0 : m.tt / m.n, most = __builtin_sqrt(vs * vt);
    const double st = m.st / m.n, c = st > most ? most : st < -most ? -most : st;
    const double is = 1 / __builtin_sqrt(vs + eps), it = 1 / __builtin_sqrt(vt + eps);
    const double own = vs * is * is, other = vt * it * it, both = c * is * it, d = (own + other) - 2 * both;
    return {d < 0 ? 0 : d, 2 / m.n * is * is * (1 - (own - both)), 2 / m.n * is * it};
}

template <class Acc>
inline void save(const Moments& m, const Finished& f, Acc* loss, Acc* stats) {
    *loss = static_cast<Acc>(f.loss);
    stats[0] = static_cast<Acc>(m.mean_s);
    stats[1] = static_cast<Acc>(m.mean_s - static_cast<double>(stats[0]));
    stats[2] = static_cast<Acc>(m.mean_t);
    stats[3] = static_cast<Acc>(m.mean_t - static_cast<double>(stats[2]));
    stats[4] = static_cast<Acc>(f.a);
    stats[5] = static_cast<Acc>(f.b);
}

template <class Acc>
inline void finish(const Moments& m, double eps, Acc* loss, Acc* stats) {
    save(m, finished(m, eps), loss, stats);
}

// Forward

// Merges the work items of each group in order; `partial` is (groups, items).
template <class Acc>
void finish_groups(const NfdForward& a, Acc* terms, const Moments* partial, int64_t groups, int64_t items) {
    parallel_items(a.in.parallel_for, groups, items * 16, [&](const Items& mine) {
        for (const int64_t g : mine) {
            Moments m = partial[g * items];
            for (int64_t i = 1; i < items; ++i) merge(m, partial[g * items + i]);
            finish(m, a.eps, terms + g, static_cast<Acc*>(a.stats) + g * kStats);
        }
    });
}

// A group is `runs` contiguous runs. A work item is kItem elements of the concatenated runs.
template <class Acc>
void forward_runs(const NfdForward& a, Acc* terms) {
    const Pair& in = a.in;
    const bool whole = a.group == Group::chw, batch = a.group == Group::nhw;
    const int64_t length = whole ? in.c * in.hw : in.hw, runs = batch ? in.n : 1;
    const int64_t groups = whole ? in.n : batch ? in.c : in.n * in.c;
    const int64_t total = runs * length, items = ceil_div(total, kItem);
    const Scratch<Moments> partial(items > 1 ? groups * items : 0);
    parallel_items(in.parallel_for, groups * items, min(total, kItem), [&](const Items& mine) {
        alignas(64) Acc s_scratch[kSpan], t_scratch[kSpan];
        for (const int64_t item : mine) {
            const int64_t g = item / items, first = item % items * kItem, last = min(total, first + kItem);
            Moments m;
            for (int64_t i = first, n; i < last; i += n) {
                const int64_t run = i / length, at = i % length, offset = (run * groups + g) * length + at;
                n = min(kSpan, min(length - at, last - i));
                merge(m, span_moments(view(in.student, in.student_type, offset, n, s_scratch),
                                      view(in.teacher, in.teacher_type, offset, n, t_scratch), n));
            }
            if (items > 1)
                partial[item] = m;
            else
                finish(m, a.eps, terms + g, static_cast<Acc*>(a.stats) + g * kStats);
        }
    });
    if (items > 1) finish_groups<Acc>(a, terms, partial, groups, items);
}

// channels_last, one group per channel: lanes are channels; reduces over pixels.
template <class Acc>
void forward_channels(const NfdForward& a, Acc* terms) {
    constexpr int W = kLanes<Acc>;
    constexpr int64_t kRows = 32;
    const Pair& in = a.in;
    const int64_t outer = a.group == Group::hw ? in.n : 1, pixels = in.n * in.hw / outer;
    const int64_t items = ceil_div(pixels, kPixels), blocks = ceil_div(in.c, kChannels);
    const Scratch<Moments> partial(outer * in.c * items);
    parallel_items(in.parallel_for, outer * items * blocks, min(pixels, kPixels) * min(in.c, kChannels),
                   [&](const Items& mine) {
        const Scratch<Acc> s_tile(kRows * kChannels), t_tile(kRows * kChannels);
        for (const int64_t item : mine) {
            const int64_t o = item / blocks / items, i = item / blocks % items;
            const int64_t first = item % blocks * kChannels, lanes = min(kChannels, in.c - first);
            LaneMoments<Acc> moments[kChannels / W];
            const int64_t last = min(pixels, (i + 1) * kPixels);
            for (int64_t p = i * kPixels; p < last; p += kRows) {
                const int64_t rows = min(kRows, last - p), offset = (o * pixels + p) * in.c + first;
                load_tile<Acc>(in.student, in.student_type, offset, rows, in.c, lanes, s_tile);
                load_tile<Acc>(in.teacher, in.teacher_type, offset, rows, in.c, lanes, t_tile);
                for (int64_t l = 0; l < lanes; l += W) moments[l / W].add(s_tile + l * rows, t_tile + l * rows, rows);
            }
            for (int64_t l = 0; l < lanes; ++l)
                partial[(o * in.c + first + l) * items + i] = moments[l / W].lane(static_cast<int>(l % W));
        }
    });
    finish_groups<Acc>(a, terms, partial, outer * in.c, items);
}

// One group per pixel: lanes are pixels; reduces over channels.
template <class Acc>
void forward_pixels(const NfdForward& a, Acc* terms) {
    constexpr int W = kLanes<Acc>;
    constexpr int64_t kRows = 32;  // rows per fp64 merge: keeps fp32 sums short
    const Pair& in = a.in;
    const int64_t lanes = pixel_lanes(in.c), tiles = ceil_div(in.hw, lanes);
    parallel_items(in.parallel_for, in.n * tiles, lanes * in.c, [&](const Items& mine) {
        const int64_t size = tile_size<Acc>(in.c, lanes);
        const Scratch<Acc> s_tile(size), t_tile(size), scratch(in.channels_last ? size : 0);
        for (const int64_t item : mine) {
            const int64_t n = item / tiles, first = item % tiles * lanes, count = min(lanes, in.hw - first);
            load_pixels<Acc>(in, in.student, in.student_type, n, first, count, s_tile, scratch);
            load_pixels<Acc>(in, in.teacher, in.teacher_type, n, first, count, t_tile, scratch);
            for (int64_t l = 0; l < count; l += W) {
                LaneMoments<Acc> m;
                for (int64_t r = 0; r < in.c; r += kRows)
                    m.add(s_tile + l * in.c + r * W, t_tile + l * in.c + r * W, min(kRows, in.c - r));
                double loss[W], slope_s[W], slope_t[W];  // computed per lane in a loop that vectorises
                for (int i = 0; i < W; ++i) {
                    const Finished f = finished(m.lane(i), a.eps);
                    loss[i] = f.loss;
                    slope_s[i] = f.a;
                    slope_t[i] = f.b;
                }
                for (int i = 0; i < min(W, count - l); ++i) {
                    const int64_t g = n * in.hw + first + l + i;
                    save(m.lane(i), {loss[i], slope_s[i], slope_t[i]}, terms + g, static_cast<Acc*>(a.stats) + g * kStats);
                }
            }
        }
    });
}

// Backward

// grad * (A x - B y) = b (q x - y) with b = grad B, q = A / B: exactly 0 if student and teacher are equal (q = 1).
template <class T>
struct Coefficients {
    T shift_s, rem_s, shift_t, rem_t, q, b;
};

template <class Acc>
inline Coefficients<Acc> coefficients(const NfdBackward& a, int64_t group) {
    const Acc* stats = static_cast<const Acc*>(a.stats) + group * kStats;
    const Acc grad = gradient_scale<Acc>(a.upstream, group);
    return {stats[0], stats[1], stats[2], stats[3], stats[4] / stats[5], grad * stats[5]};
}

template <class V>
inline V gradient(const Coefficients<V>& k, V s, V t) {
    return k.b * (k.q * ((s - k.shift_s) - k.rem_s) - ((t - k.shift_t) - k.rem_t));
}

// Gradient of n elements of one group.
template <class Acc>
inline void gradient_run(const Coefficients<Acc>& c, const Acc* s, const Acc* t, int64_t n, Acc* out) {
    constexpr int W = kLanes<Acc>;
    const Coefficients<Vec<Acc>> k{set1(c.shift_s), set1(c.rem_s), set1(c.shift_t),
                                   set1(c.rem_t),   set1(c.q),     set1(c.b)};
    int64_t i = 0;
    for (; i + W <= n; i += W) store(out + i, gradient(k, load(s + i), load(t + i)));
    for (; i < n; ++i) out[i] = gradient(c, s[i], t[i]);
}

// Each run of `length` contiguous elements belongs to one group.
template <class Acc>
void backward_runs(const NfdBackward& a, int64_t length) {
    const Pair& in = a.in;
    const int64_t total = in.n * in.c * in.hw;
    parallel_items(in.parallel_for, ceil_div(total, kSpan), kSpan, [&](const Items& mine) {
        alignas(64) Acc s_scratch[kSpan], t_scratch[kSpan], out_scratch[kSpan];
        for (const int64_t item : mine) {
            const int64_t offset = item * kSpan, count = min(kSpan, total - offset);
            const Acc* s = view(in.student, in.student_type, offset, count, s_scratch);
            const Acc* t = view(in.teacher, in.teacher_type, offset, count, t_scratch);
            Acc* out = target_span(a.out, in.student_type, offset, out_scratch);
            for (int64_t i = 0, n; i < count; i += n) {
                const int64_t run = (offset + i) / length;
                n = min(count - i, (run + 1) * length - offset - i);
                const int64_t group = a.group == Group::nhw ? run % in.c : run;
                gradient_run(coefficients<Acc>(a, group), s + i, t + i, n, out + i);
            }
            commit(a.out, in.student_type, offset, count, out);
        }
    });
}

// Coefficients of rows with one group per lane, padded to whole vectors.
template <class Acc>
struct LaneCoefficients {
    explicit LaneCoefficients(int64_t n) : lanes(tile_size<Acc>(1, n)), data(6 * lanes) {
        for (int64_t i = 0; i < 6 * lanes; ++i) data[i] = 0;
    }

    void set(const NfdBackward& a, int64_t first_group, int64_t count) {
        for (int64_t l = 0; l < count; ++l) {
            const Coefficients<Acc> k = coefficients<Acc>(a, first_group + l);
            const Acc fields[6] = {k.shift_s, k.rem_s, k.shift_t, k.rem_t, k.q, k.b};
            for (int f = 0; f < 6; ++f) data[f * lanes + l] = fields[f];
        }
    }

    // One row of n lanes. room >= n elements may be read and written: lanes past the row are overwritten by the next
    // row.
    void gradient_row(const Acc* s, const Acc* t, int64_t n, int64_t room, Acc* out) const {
        constexpr int W = kLanes<Acc>;
        const Acc* k = data;
        int64_t l = 0;
        for (; l < n && l + W <= room; l += W) {
            const Coefficients<Vec<Acc>> c{load(k + l),             load(k + lanes + l),     load(k + 2 * lanes + l),
                                           load(k + 3 * lanes + l), load(k + 4 * lanes + l), load(k + 5 * lanes + l)};
            store(out + l, gradient(c, load(s + l), load(t + l)));
        }
        for (; l < n; ++l) {
            const Coefficients<Acc> c{k[l],             k[lanes + l],     k[2 * lanes + l],
                                      k[3 * lanes + l], k[4 * lanes + l], k[5 * lanes + l]};
            out[l] = gradient(c, s[l], t[l]);
        }
    }

    const int64_t lanes;
    const Scratch<Acc> data;
};

// channels_last, one group per channel: rows are pixels and contiguous.
template <class Acc>
void backward_channels(const NfdBackward& a) {
    const Pair& in = a.in;
    const int64_t rows = min(in.hw, max(64, kItem / in.c)), items = ceil_div(in.hw, rows);
    const int64_t chunk = max(1, kSpan / in.c);  // rows per conversion to Acc
    parallel_items(in.parallel_for, in.n * items, in.c * rows, [&](const Items& mine) {
        LaneCoefficients<Acc> k(in.c);
        const Scratch<Acc> s_scratch(chunk * in.c), t_scratch(chunk * in.c), out_scratch(chunk * in.c);
        for (const int64_t item : mine) {
            const int64_t n = item / items, last = min(in.hw, (item % items + 1) * rows);
            k.set(a, a.group == Group::hw ? n * in.c : 0, in.c);
            for (int64_t p = item % items * rows, count; p < last; p += count) {
                count = min(chunk, last - p);
                const int64_t offset = (n * in.hw + p) * in.c, size = count * in.c;
                const Acc* s = view<Acc>(in.student, in.student_type, offset, size, s_scratch);
                const Acc* t = view<Acc>(in.teacher, in.teacher_type, offset, size, t_scratch);
                Acc* out = target_span<Acc>(a.out, in.student_type, offset, out_scratch);
                for (int64_t i = 0; i < size; i += in.c) k.gradient_row(s + i, t + i, in.c, size - i, out + i);
                commit(a.out, in.student_type, offset, size, out);
            }
        }
    });
}

// NCHW, one group per pixel: rows are channels.
template <class Acc>
void backward_pixels(const NfdBackward& a) {
    const Pair& in = a.in;
    const int64_t lanes = min(in.hw, 512), items = ceil_div(in.hw, lanes);
    parallel_items(in.parallel_for, in.n * items, in.c * lanes, [&](const Items& mine) {
        LaneCoefficients<Acc> k(lanes);
        const Scratch<Acc> s_scratch(lanes), t_scratch(lanes), out_scratch(lanes);
        for (const int64_t item : mine) {
            const int64_t n = item / items, first = item % items * lanes, count = min(lanes, in.hw - first);
            k.set(a, n * in.hw + first, count);
            for (int64_t c = 0; c < in.c; ++c) {
                const int64_t offset = (n * in.c + c) * in.hw + first;
                Acc* out = target_span<Acc>(a.out, in.student_type, offset, out_scratch);
                k.gradient_row(view<Acc>(in.student, in.student_type, offset, count, s_scratch),
                               view<Acc>(in.teacher, in.teacher_type, offset, count, t_scratch), count, count, out);
                commit(a.out, in.student_type, offset, count, out);
            }
        }
    });
}

}  // namespace

void nfd_forward(const NfdForward& a) {
    with_acc(a.in, [&](auto t) {
        using Acc = typename decltype(t)::type;
        const Pair& in = a.in;
        const int64_t groups = a.group == Group::hw    ? in.n * in.c
                               : a.group == Group::nhw ? in.c
                               : a.group == Group::c   ? in.n * in.hw
                                                       : in.n;
        const Terms<Acc> terms(a.out, groups);
        if (a.group == Group::c)
            forward_pixels<Acc>(a, terms.data());
        else if (in.channels_last && a.group != Group::chw)
            forward_channels<Acc>(a, terms.data());
        else
            forward_runs<Acc>(a, terms.data());
        terms.finish();
    });
}

void nfd_backward(const NfdBackward& a) {
    with_acc(a.in, [&](auto t) {
        using Acc = typename decltype(t)::type;
        const Pair& in = a.in;
        if (a.group == Group::chw)
            backward_runs<Acc>(a, in.c * in.hw);
        else if (in.channels_last == (a.group == Group::c))
            backward_runs<Acc>(a, in.channels_last ? in.c : in.hw);
        else if (in.channels_last)
            backward_channels<Acc>(a);
        else
            backward_pixels<Acc>(a);
    });
}

}  // namespace fastkd::FASTKD_ISA

// CWD: per sample and channel tau^2 KL(softmax(T/tau) || softmax(S/tau)) over the pixels; gradient tau (p_s - p_t).
//
// The forward reads S and T once (online softmax over tiles, merged in fp64). The backward reads both again and writes
// the gradient from four numbers per channel.
#include "reduce.h"
#include "softmax.h"

namespace fastkd::FASTKD_ISA {
namespace {

constexpr int64_t kSpan = 2048;       // elements per input; both inputs fit the L1 cache
constexpr int64_t kItem = 8 * kSpan;  // elements of a channel per work item
constexpr int64_t kChannels = 128;    // channels_last: channels and pixels per work item
constexpr int64_t kPixels = 2048;
constexpr int64_t kStats = 4;

template <class Acc>
void finish(const SoftmaxPair& m, double tau, Acc* loss, Acc* stats) {
    const double kl = m.dot / m.sum_t + __builtin_log(m.sum_s / m.sum_t);
    *loss = static_cast<Acc>((kl < 0 ? 0 : kl) * tau * tau);
    stats[0] = static_cast<Acc>(m.max_s);  // an input element, so the conversion is exact
    stats[1] = static_cast<Acc>(__builtin_log(m.sum_s));
    stats[2] = static_cast<Acc>(m.max_t);
    stats[3] = static_cast<Acc>(__builtin_log(m.sum_t));
}

// Forward

// Merges the work items of each channel in order; `partial` is (n * c, items).
template <class Acc>
void finish_groups(const CwdForward& a, const SoftmaxPair* partial, int64_t items) {
    const Terms<Acc> terms(a.out, a.in.n * a.in.c);
    parallel_items(a.in.parallel_for, a.in.n * a.in.c, items * 64, [&](const Items& mine) {
        for (const int64_t g : mine) {
            SoftmaxPair m = partial[g * items];
            for (int64_t i = 1; i < items; ++i) merge(m, partial[g * items + i], 1 / a.temperature);
            finish(m, a.temperature, terms.data() + g, static_cast<Acc*>(a.stats) + g * kStats);
        }
    });
    terms.finish();
}

template <class Acc>
void forward_runs(const CwdForward& a) {
    const Pair& in = a.in;
    const int64_t items = ceil_div(in.hw, kItem);
    const Scratch<SoftmaxPair> partial(in.n * in.c * items);
    parallel_items(in.parallel_for, in.n * in.c * items, min(in.hw, kItem), [&](const Items& mine) {
        alignas(64) Acc s_scratch[kSpan], t_scratch[kSpan];
        for (const int64_t item : mine) {
            const int64_t g = item / items, first = item % items * kItem, last = min(in.hw, first + kItem);
            SoftmaxPair m;
            for (int64_t i = first; i < last; i += kSpan) {
                const int64_t n = min(kSpan, last - i), offset = g * in.hw + i;
                merge(m,
                      span_softmax(view(in.student, in.student_type, offset, n, s_scratch),
                                   view(in.teacher, in.teacher_type, offset, n, t_scratch), n,
                                   static_cast<Acc>(1 / a.temperature)),
                      1 / a.temperature);
            }
            partial[item] = m;
        }
    });
    finish_groups<Acc>(a, partial, items);
}

// channels_last: lanes are channels; reduces over pixels.
template <class Acc>
void forward_channels(const CwdForward& a) {
    constexpr int W = kLanes<Acc>;
    constexpr int64_t kRows = 32;
    const Pair& in = a.in;
    const int64_t items = ceil_div(in.hw, kPixels), blocks = ceil_div(in.c, kChannels);
    const Scratch<SoftmaxPair> partial(in.n * in.c * items);
    parallel_items(in.parallel_for, in.n * items * blocks, min(in.hw, kPixels) * min(in.c, kChannels),
                   [&](const Items& mine) {
        const Scratch<Acc> s_tile(kRows * kChannels), t_tile(kRows * kChannels);
        for (const int64_t item : mine) {
            const int64_t n = item / blocks / items, i = item / blocks % items;
            const int64_t first = item % blocks * kChannels, lanes = min(kChannels, in.c - first);
            LaneSoftmax<Acc> softmax[kChannels / W];
            const int64_t last = min(in.hw, (i + 1) * kPixels);
            for (int64_t p = i * kPixels; p < last; p += kRows) {
                const int64_t rows = min(kRows, last - p), offset = (n * in.hw + p) * in.c + first;
                load_tile<Acc>(in.student, in.student_type, offset, rows, in.c, lanes, s_tile);
                load_tile<Acc>(in.teacher, in.teacher_type, offset, rows, in.c, lanes, t_tile);
                for (int64_t l = 0; l < lanes; l += W)
                    softmax[l / W].add(s_tile + l * rows, t_tile + l * rows, rows,
                                       static_cast<Acc>(1 / a.temperature));
            }
            for (int64_t l = 0; l < lanes; ++l)
                partial[(n * in.c + first + l) * items + i] = softmax[l / W].lane(static_cast<int>(l % W));
        }
    });
    finish_groups<Acc>(a, partial, items);
}

// Backward

template <class T>
struct Coefficients {
    T max_s, log_s, max_t, log_t, scale;
};

template <class Acc>
inline Coefficients<Acc> coefficients(const CwdBackward& a, int64_t group) {
    const Acc* stats = static_cast<const Acc*>(a.stats) + group * kStats;
    return {stats[0], stats[1], stats[2], stats[3],
            gradient_scale<Acc>(a.upstream, group) * static_cast<Acc>(a.temperature)};
}

template <class V, class Acc>
inline V gradient(const Coefficients<V>& k, V s, V t, Acc inv_tau) {
    return k.scale * (exp((s - k.max_s) * inv_tau - k.log_s) - exp((t - k.max_t) * inv_tau - k.log_t));
}

template <class Acc>
void backward_runs(const CwdBackward& a) {
    constexpr int W = kLanes<Acc>;
    const Pair& in = a.in;
    const Acc inv_tau = static_cast<Acc>(1 / a.temperature);
    const int64_t items = ceil_div(in.hw, kSpan);
    parallel_items(in.parallel_for, in.n * in.c * items, min(in.hw, kSpan), [&](const Items& mine) {
        alignas(64) Acc s_scratch[kSpan], t_scratch[kSpan], out_scratch[kSpan];
        for (const int64_t item : mine) {
            const int64_t g = item / items, first = item % items * kSpan, n = min(kSpan, in.hw - first);
            const int64_t offset = g * in.hw + first;
            const Coefficients<Acc> c = coefficients<Acc>(a, g);
            const Coefficients<Vec<Acc>> k{set1(c.max_s), set1(c.log_s), set1(c.max_t), set1(c.log_t), set1(c.scale)};
            const Acc* s = view(in.student, in.student_type, offset, n, s_scratch);
            const Acc* t = view(in.teacher, in.teacher_type, offset, n, t_scratch);
            Acc* out = target_span(a.out, in.student_type, offset, out_scratch);
            int64_t i = 0;
            for (; i + W <= n; i += W) store(out + i, gradient(k, load(s + i), load(t + i), inv_tau));
            if (i < n)
                store_part(out + i, n - i,
                           gradient(k, load_part(s + i, n - i, Acc(0)), load_part(t + i, n - i, Acc(0)), inv_tau));
            commit(a.out, in.student_type, offset, n, out);
        }
    });
}

template <class Acc>
void backward_channels(const CwdBackward& a) {
    constexpr int W = kLanes<Acc>;
    const Pair& in = a.in;
    const Acc inv_tau = static_cast<Acc>(1 / a.temperature);
    const int64_t rows = min(in.hw, max(64, kItem / in.c)), items = ceil_div(in.hw, rows);
    const int64_t padded = tile_size<Acc>(1, in.c);
    const int64_t chunk = max(1, kSpan / in.c);  // rows per conversion to Acc
    parallel_items(in.parallel_for, in.n * items, rows * in.c, [&](const Items& mine) {
        const Scratch<Acc> k(5 * padded);
        const Scratch<Acc> s_scratch(chunk * in.c), t_scratch(chunk * in.c), out_scratch(chunk * in.c);
        for (const int64_t item : mine) {
            const int64_t n = item / items, last = min(in.hw, (item % items + 1) * rows);
            for (int64_t l = 0; l < padded; ++l) {
                const Coefficients<Acc> c = l < in.c ? coefficients<Acc>(a, n * in.c + l) : Coefficients<Acc>{};
                const Acc fields[5] = {c.max_s, c.log_s, c.max_t, c.log_t, c.scale};
                for (int f = 0; f < 5; ++f) k[f * padded + l] = fields[f];
            }
            for (int64_t p = item % items * rows, count; p < last; p += count) {
                count = min(chunk, last - p);
                const int64_t offset = (n * in.hw + p) * in.c, size = count * in.c;
                const Acc* s = view<Acc>(in.student, in.student_type, offset, size, s_scratch);
                const Acc* t = view<Acc>(in.teacher, in.teacher_type, offset, size, t_scratch);
                Acc* out = target_span<Acc>(a.out, in.student_type, offset, out_scratch);
                for (int64_t row = 0; row < size; row += in.c)
                    for (int64_t l = 0; l < in.c; l += W) {
                        const Coefficients<Vec<Acc>> c{load(k + l), load(k + padded + l), load(k + 2 * padded + l),
                                                       load(k + 3 * padded + l), load(k + 4 * padded + l)};
                        const int64_t i = row + l, left = in.c - l;
                        if (i + W <= size)  // lanes past the row are overwritten by the next row
                            store(out + i, gradient(c, load(s + i), load(t + i), inv_tau));
                        else
                            store_part(out + i, left, gradient(c, load_part(s + i, left, Acc(0)),
                                                               load_part(t + i, left, Acc(0)), inv_tau));
                    }
                commit(a.out, in.student_type, offset, size, out);
            }
        }
    });
}

}  // namespace

void cwd_forward(const CwdForward& a) {
    with_acc(a.in, [&](auto t) {
        using Acc = typename decltype(t)::type;
        a.in.channels_last ? forward_channels<Acc>(a) : forward_runs<Acc>(a);
    });
}

void cwd_backward(const CwdBackward& a) {
    with_acc(a.in, [&](auto t) {
        using Acc = typename decltype(t)::type;
        a.in.channels_last ? backward_channels<Acc>(a) : backward_runs<Acc>(a);
    });
}

}  // namespace fastkd::FASTKD_ISA

// KD: per pixel tau^2 KL(softmax(T/tau) || softmax(S/tau)) over the channels; gradient tau (p_s - p_t). The sigmoid
// variant sums the KL of Bernoulli distributions over the channels.
//
// One read of S and T gives loss and gradient. A tile of pixels is loaded into cache with one pixel per vector lane
// (channels_last: transposed while loading). So the softmax needs no horizontal reduction, and each exponential is
// computed once per direction.
#include "reduce.h"
#include "sigmoid.h"
#include "softmax.h"

namespace fastkd::FASTKD_ISA {
namespace {

// Per pixel: factor = scale * weight, and a validity flag. Returns the number of valid pixels.
template <class Acc>
int64_t pixel_factors(const Pixels& pixels, int64_t classes, int64_t first, int64_t n, Acc scale, Acc* factor,
                      Acc* valid) {
    const auto label = [&](int64_t i) -> int64_t {
        switch (pixels.label) {
            case Label::u8: return static_cast<const uint8_t*>(pixels.target)[i];
            case Label::i32: return static_cast<const int32_t*>(pixels.target)[i];
            default: return static_cast<const int64_t*>(pixels.target)[i];
        }
    };
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
        bool counts = true;
        if (pixels.label != Label::none) {
            const int64_t y = label(first + i);
            counts = y != pixels.ignore_index && y >= 0 && y < classes;
        }
        count += counts;
        valid[i] = counts ? Acc(1) : Acc(0);
        factor[i] = pixels.weight ? scale * static_cast<const Acc*>(pixels.weight)[first + i] : scale;
    }
    for (int64_t i = n; i % kLanes<Acc>; ++i) valid[i] = factor[i] = 0;
    return count;
}

constexpr int64_t kRows = 64;  // channels per partial sum: two levels keep fp32 sums short

template <class Acc>
inline void maxima(const Acc* s, const Acc* t, int64_t rows, Vec<Acc>& max_s, Vec<Acc>& max_t) {
    constexpr int W = kLanes<Acc>;
    max_s = load(s);
    max_t = load(t);
    for (int64_t r = 1; r < rows; ++r) {
        max_s = max(max_s, load(s + r * W));
        max_t = max(max_t, load(t + r * W));
    }
}

// Loss of one vector of pixels from its softmax sums; factor = tau^2 * weight.
template <class Acc>
inline Vec<Acc> pixel_loss(const SoftmaxSums<Acc>& sums, Vec<Acc> factor, Vec<Acc> valid) {
    const Vec<Acc> kl = sums.dot / sums.t + log(sums.s / sums.t);
    const Vec<Acc> weighted = (kl < 0 ? Vec<Acc>{} : kl) * factor;
    return valid == 0 ? Vec<Acc>{} : weighted;
}

// Number of valid pixels. Needed before the gradient, which is divided by it.
double count_pixels(const Kd& a) {
    const Pair& in = a.in;
    if (a.pixels.label == Label::none) return static_cast<double>(in.n * in.hw);
    constexpr int64_t kSpan = 256;
    const int64_t items = ceil_div(in.n * in.hw, kSpan);
    const Scratch<int64_t> counts(items);
    const Pixels labels{a.pixels.target, a.pixels.label, a.pixels.ignore_index, nullptr};
    parallel_items(in.parallel_for, items, kSpan, [&](const Items& mine) {
        float factor[kSpan], valid[kSpan];
        for (const int64_t item : mine)
            counts[item] = pixel_factors(labels, in.c, item * kSpan, min(kSpan, in.n * in.hw - item * kSpan), 1.0f, factor, valid);
    });
    int64_t count = 0;
    for (int64_t i = 0; i < items; ++i) count += counts[i];
    return static_cast<double>(count);
}

// kGradient: the exponentials stay in the tile and become tau (p_s - p_t) times the factor of the pixel.
template <class Acc, bool kGradient, bool kSigmoid>
void run(const Kd& a) {
    constexpr int W = kLanes<Acc>;
    const Pair& in = a.in;
    const int64_t lanes = pixel_lanes(in.c), tiles = ceil_div(in.hw, lanes);
    const Acc inv_tau = static_cast<Acc>(1 / a.temperature), tau = static_cast<Acc>(a.temperature);
    const bool per_pixel = a.out.reduce == Reduce::none;
    const Vec<Acc> scale = set1(per_pixel ? static_cast<Acc>(a.out.scale) : Acc(1));
    [[maybe_unused]] Vec<Acc> slope{};
    if constexpr (kGradient)
        slope = set1(gradient_scale<Acc>(a.out, a.out.reduce == Reduce::mean ? count_pixels(a) : 0));
    const Totals totals(in.n * tiles);
    parallel_items(in.parallel_for, in.n * tiles, lanes * in.c, [&](const Items& mine) {
        const int64_t size = tile_size<Acc>(in.c, lanes);
        const Scratch<Acc> s_tile(size), t_tile(size), scratch(in.channels_last ? size : 0);
        Acc factor[256], valid[256], loss[256];
        for (const int64_t item : mine) {
            const int64_t n = item / tiles, first = item % tiles * lanes, count = min(lanes, in.hw - first);
            totals.count[item] =
                static_cast<double>(pixel_factors(a.pixels, in.c, n * in.hw + first, count, tau, factor, valid));
            const TileAddress next_s(in, in.student, in.student_type, n, first + lanes, W);
            const TileAddress next_t(in, in.teacher, in.teacher_type, n, first + lanes, W);
            const TileAddress out(in, kGradient ? a.gradient : in.student, in.student_type, n, first, W);
            load_pixels<Acc>(in, in.student, in.student_type, n, first, count, s_tile, scratch);
            load_pixels<Acc>(in, in.teacher, in.teacher_type, n, first, count, t_tile, scratch);
            Vec<Acc> sum{};
            for (int64_t l = 0; l < count; l += W) {
                Acc *s = s_tile + l * in.c, *t = t_tile + l * in.c;
                if constexpr (kSigmoid) {
                    const Vec<Acc> weight = load(factor + l);  // tau * pixel weight
                    const auto counts = load(valid + l) != 0;
                    [[maybe_unused]] const Vec<Acc> f = slope * weight;
                    Vec<Acc> kl{};
                    for (int64_t first_row = 0; first_row < in.c; first_row += kRows) {
                        Vec<Acc> part{};
                        for (int64_t r = first_row; r < min(in.c, first_row + kRows); ++r) {
                            next_s.fetch(r, l);
                            next_t.fetch(r, l);
                            const Bernoulli<Acc> b(load(s + r * W) * inv_tau, load(t + r * W) * inv_tau);
                            part += b.kl;
                            if constexpr (kGradient) {
                                out.fetch(r, l);
                                const Vec<Acc> g = f * b.difference;
                                store(s + r * W, counts ? g : Vec<Acc>{});
                            }
                        }
                        kl += part;
                    }
                    const Vec<Acc> weighted = kl * (set1(tau) * weight);
                    const Vec<Acc> value = counts ? weighted : Vec<Acc>{};
                    store(loss + l, value * scale);
                    sum += value;
                    continue;
                }
                Vec<Acc> max_s, max_t;
                SoftmaxSums<Acc> sums;
                maxima(s, t, in.c, max_s, max_t);
                for (int64_t first_row = 0; first_row < in.c; first_row += kRows) {
                    SoftmaxSums<Acc> part;
                    for (int64_t r = first_row; r < min(in.c, first_row + kRows); ++r) {
                        next_s.fetch(r, l);
                        next_t.fetch(r, l);
                        const Vec<Acc> ds = (load(s + r * W) - max_s) * inv_tau, es = exp(ds);
                        const Vec<Acc> dt = (load(t + r * W) - max_t) * inv_tau, et = exp(dt);
                        part.s += es;
                        part.t += et;
                        part.dot += et == 0 ? Vec<Acc>{} : et * (dt - ds);  // probability 0 contributes exactly 0, also at -inf
                        if constexpr (kGradient) {
                            out.fetch(r, l);
                            store(s + r * W, es);
                            store(t + r * W, et);
                        }
                    }
                    sums.add(part);
                }
                const Vec<Acc> weight = load(factor + l);  // tau * pixel weight
                const Vec<Acc> value = pixel_loss(sums, set1(tau) * weight, load(valid + l));
                store(loss + l, value * scale);
                sum += value;
                if constexpr (kGradient) {
                    // p_s - p_t as (es - et * ratio) / sum_s: exactly 0 if student and teacher are equal.
                    const Vec<Acc> ratio = sums.s / sums.t, f = slope * weight / sums.s;
                    const auto counts = load(valid + l) != 0;
                    for (int64_t r = 0; r < in.c; ++r) {
                        const Vec<Acc> g = f * (load(s + r * W) - load(t + r * W) * ratio);
                        store(s + r * W, counts ? g : Vec<Acc>{});
                    }
                }
            }
            totals.loss[item] = sum_lanes<Acc>(sum);
            if (per_pixel) __builtin_memcpy(static_cast<Acc*>(a.out.loss) + n * in.hw + first, loss, count * sizeof(Acc));
            if constexpr (kGradient)
                store_pixels<Acc>(in, a.gradient, in.student_type, n, first, count, s_tile, scratch);
        }
    });
    totals.finish<Acc>(a.out);
}

}  // namespace

void kd(const Kd& a) {
    with_acc(a.in, [&](auto t) {
        using Acc = typename decltype(t)::type;
        if (a.sigmoid)
            a.gradient ? run<Acc, true, true>(a) : run<Acc, false, true>(a);
        else
            a.gradient ? run<Acc, true, false>(a) : run<Acc, false, false>(a);
    });
}

}  // namespace fastkd::FASTKD_ISA

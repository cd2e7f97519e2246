// KD: per pixel tau^2 KL(softmax(T/tau) || softmax(S/tau)) over the channels; gradient tau (p_s - p_t).
//
// Forward reads S and T once, backward reads each once and writes the gradient; nothing is saved in between. Backward
// can give the loss on the way, so that a step that knows it needs a gradient reads S and T once in all. A tile of
// pixels is loaded into cache with one pixel per vector lane (channels_last: transposed on the way), so the softmax
// needs no horizontal operation and each exponential is computed once per direction.
#include "softmax.h"
#include "tile.h"

namespace fastkd::FASTKD_ISA {
namespace {

// Per pixel: factor = scale * weight, and whether the pixel counts. Returns how many do.
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

constexpr int64_t kRows = 64;  // channels summed on their own first: two levels keep fp32 sums short

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

// The loss of one vector of pixels, from the sums of its softmaxes; factor = tau^2 * weight.
template <class Acc>
inline Vec<Acc> pixel_loss(const SoftmaxSums<Acc>& sums, Vec<Acc> factor, Vec<Acc> valid) {
    const Vec<Acc> kl = sums.dot / sums.t + log(sums.s / sums.t);
    const Vec<Acc> weighted = (kl < 0 ? Vec<Acc>{} : kl) * factor;
    return valid == 0 ? Vec<Acc>{} : weighted;
}

// Sums of the tiles in order, whatever thread had them.
struct Totals {
    explicit Totals(int64_t tiles) : loss(tiles), count(tiles), tiles(tiles) {}

    template <class Acc>
    void finish(void* total, int64_t* counted) const {
        double sum = 0;
        int64_t n = 0;
        for (int64_t i = 0; i < tiles; ++i) {
            sum += loss[i];
            n += count[i];
        }
        if (total) *static_cast<Acc*>(total) = static_cast<Acc>(sum);
        *counted = n;
    }

    const Scratch<double> loss;
    const Scratch<int64_t> count;
    const int64_t tiles;
};

template <class Acc>
void forward(const KdForward& a) {
    constexpr int W = kLanes<Acc>;
    const Pair& in = a.in;
    const int64_t lanes = pixel_lanes(in.c), tiles = ceil_div(in.hw, lanes);
    const Acc inv_tau = static_cast<Acc>(1 / a.temperature);
    const Totals totals(in.n * tiles);
    parallel_items(in.parallel_for, in.n * tiles, lanes * in.c, [&](int64_t begin, int64_t end) {
        const int64_t size = tile_size<Acc>(in.c, lanes);
        const Scratch<Acc> s_tile(size), t_tile(size), scratch(in.channels_last ? size : 0);
        Acc factor[256], valid[256], loss[256];
        for (int64_t item = begin; item < end; ++item) {
            const int64_t n = item / tiles, first = item % tiles * lanes, count = min(lanes, in.hw - first);
            totals.count[item] = pixel_factors(a.pixels, in.c, n * in.hw + first, count,
                                               static_cast<Acc>(a.temperature * a.temperature), factor, valid);
            const TileAddress next_s(in, in.student, in.student_type, n, first + lanes, W);
            const TileAddress next_t(in, in.teacher, in.teacher_type, n, first + lanes, W);
            load_pixels<Acc>(in, in.student, in.student_type, n, first, count, s_tile, scratch);
            load_pixels<Acc>(in, in.teacher, in.teacher_type, n, first, count, t_tile, scratch);
            Vec<Acc> sum{};
            for (int64_t l = 0; l < count; l += W) {
                const Acc *s = s_tile + l * in.c, *t = t_tile + l * in.c;
                Vec<Acc> max_s, max_t;
                maxima(s, t, in.c, max_s, max_t);
                SoftmaxSums<Acc> sums;
                for (int64_t first_row = 0; first_row < in.c; first_row += kRows) {
                    SoftmaxSums<Acc> part;
                    for (int64_t r = first_row; r < min(in.c, first_row + kRows); ++r) {
                        next_s.fetch(r, l);
                        next_t.fetch(r, l);
                        part.add((load(s + r * W) - max_s) * inv_tau, (load(t + r * W) - max_t) * inv_tau);
                    }
                    sums.add(part);
                }
                const Vec<Acc> value = pixel_loss(sums, load(factor + l), load(valid + l));
                store(loss + l, value);
                sum += value;
            }
            totals.loss[item] = sum_lanes<Acc>(sum);
            if (a.per_pixel)
                __builtin_memcpy(static_cast<Acc*>(a.loss) + n * in.hw + first, loss, count * sizeof(Acc));
        }
    });
    totals.finish<Acc>(a.per_pixel ? nullptr : a.loss, a.count);
}

// kLoss: the loss as well, which has its sums on the way. grad is then one number.
template <class Acc, bool kLoss>
void backward(const KdBackward& a) {
    constexpr int W = kLanes<Acc>;
    const Pair& in = a.in;
    const int64_t lanes = pixel_lanes(in.c), tiles = ceil_div(in.hw, lanes);
    const Acc inv_tau = static_cast<Acc>(1 / a.temperature);
    const Acc* grad = static_cast<const Acc*>(a.grad);
    const Totals totals(kLoss ? in.n * tiles : 0);
    parallel_items(in.parallel_for, in.n * tiles, lanes * in.c, [&](int64_t begin, int64_t end) {
        const int64_t size = tile_size<Acc>(in.c, lanes);
        const Scratch<Acc> s_tile(size), t_tile(size), scratch(in.channels_last ? size : 0);
        Acc factor[256], valid[256];
        for (int64_t item = begin; item < end; ++item) {
            const int64_t n = item / tiles, first = item % tiles * lanes, count = min(lanes, in.hw - first);
            [[maybe_unused]] const int64_t counted = pixel_factors(a.pixels, in.c, n * in.hw + first, count,
                                                                   static_cast<Acc>(a.temperature), factor, valid);
            const Vec<Acc> scale = set1(a.per_pixel ? Acc(1) : grad[0]);
            [[maybe_unused]] const Vec<Acc> tau = set1(static_cast<Acc>(a.temperature));
            [[maybe_unused]] Vec<Acc> loss{};
            if (a.per_pixel)
                for (int64_t i = 0; i < count; ++i) factor[i] *= grad[n * in.hw + first + i];
            const TileAddress next_s(in, in.student, in.student_type, n, first + lanes, W);
            const TileAddress next_t(in, in.teacher, in.teacher_type, n, first + lanes, W);
            const TileAddress out(in, a.out, in.student_type, n, first, W);
            load_pixels<Acc>(in, in.student, in.student_type, n, first, count, s_tile, scratch);
            load_pixels<Acc>(in, in.teacher, in.teacher_type, n, first, count, t_tile, scratch);
            for (int64_t l = 0; l < count; l += W) {
                Acc *s = s_tile + l * in.c, *t = t_tile + l * in.c;
                Vec<Acc> max_s, max_t;
                SoftmaxSums<Acc> sums;
                maxima(s, t, in.c, max_s, max_t);
                for (int64_t first_row = 0; first_row < in.c; first_row += kRows) {
                    SoftmaxSums<Acc> part;
                    for (int64_t r = first_row; r < min(in.c, first_row + kRows); ++r) {
                        next_s.fetch(r, l);
                        next_t.fetch(r, l);
                        out.fetch(r, l);
                        const Vec<Acc> ds = (load(s + r * W) - max_s) * inv_tau, es = exp(ds);
                        const Vec<Acc> dt = (load(t + r * W) - max_t) * inv_tau, et = exp(dt);
                        part.s += es;
                        part.t += et;
                        if constexpr (kLoss) part.dot += et == 0 ? Vec<Acc>{} : et * (dt - ds);
                        store(s + r * W, es);
                        store(t + r * W, et);
                    }
                    sums.add(part);
                }
                if constexpr (kLoss) loss += pixel_loss(sums, tau * load(factor + l), load(valid + l));
                // p_s - p_t as (es - et * ratio) / sum_s: exactly 0 where student and teacher agree.
                const Vec<Acc> ratio = sums.s / sums.t, f = scale * load(factor + l) / sums.s;
                const auto counts = load(valid + l) != 0;
                for (int64_t r = 0; r < in.c; ++r) {
                    const Vec<Acc> g = f * (load(s + r * W) - load(t + r * W) * ratio);
                    store(s + r * W, counts ? g : Vec<Acc>{});
                }
            }
            store_pixels<Acc>(in, a.out, in.student_type, n, first, count, s_tile, scratch);
            if constexpr (kLoss) {
                totals.loss[item] = sum_lanes<Acc>(loss);
                totals.count[item] = counted;
            }
        }
    });
    if constexpr (kLoss) totals.finish<Acc>(a.loss, a.count);
}

}  // namespace

void kd_forward(const KdForward& a) {
    with_acc(a.in, [&](auto t) { forward<typename decltype(t)::type>(a); });
}
void kd_backward(const KdBackward& a) {
    with_acc(a.in, [&](auto t) {
        using Acc = typename decltype(t)::type;
        a.loss ? backward<Acc, true>(a) : backward<Acc, false>(a);
    });
}

}  // namespace fastkd::FASTKD_ISA

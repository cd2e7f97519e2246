// Binary cross-entropy at label resolution and its gradient. With z = bilinear(logits), the loss is softplus(-z) for
// label 1 and softplus(z) for label 0.
//
// Classes are independent, so each is a sample with one class, and its logits are one plane. A channels_last map is
// first transposed to planes at logit size; its gradient is transposed back.
#include "resize.h"

namespace fastkd::FASTKD_ISA {
namespace {

template <class Acc, bool kBlend>
class Term {
    static constexpr int W = kLanes<Acc>;

public:
    Term(const ResizedBinaryCrossEntropy& a, const Map& planes, const Columns<Acc>& columns)
        : channels_(a.logits.c),
          pos_weight_(static_cast<const Acc*>(a.pos_weight)),
          columns_(columns),
          rows_(planes.h, a.to.height, a.to.align_corners),
          logits_(planes, columns.padded),
          gradient_(a.to.gradient != nullptr) {}

    double row(int64_t plane, int64_t label_y, const PixelRow<Acc>& pixels, const GradientShare<Acc>& share, Acc* losses) {
        logits_.load_plain(plane, rows_.tap(label_y), 1);
        const Vec<Acc> one = set1(Acc(1)), positive = set1(pos_weight_ ? pos_weight_[plane % channels_] : Acc(1));
        double total = 0;
        for (int64_t cell = 0; cell < columns_.padded; cell += W) {
            const Side<Acc, false> side{logits_.plain() + cell, logits_.stride, 0};
            Vec<Acc> slope{}, to_right{};
            for (int64_t k = 0; k < columns_.phases; k += kMaxPhases) {
                Vec<Acc> sum{};  // short fp32 sums: a longer sum of equal terms drifts
                for (int64_t j = k; j < min(columns_.phases, k + kMaxPhases); ++j) {
                    const int64_t at = j * columns_.padded + cell;
                    const Vec<Acc> right = load(columns_.right + at), label = load(pixels.label + at);
                    const Vec<Acc> z = side.template value<kBlend, true>(right, 0, 0);
                    const auto is_one = label > 0, counted = label >= 0;
                    const Vec<Acc> x = is_one ? -z : z;  // the derivative of softplus(x) is sigmoid(x)
                    const Vec<Acc> e = exp(x > 0 ? -x : x);
                    const Vec<Acc> factor = load(pixels.factor + at) * (is_one ? positive : one);
                    const Vec<Acc> loss = factor * ((x > 0 ? x : Vec<Acc>{}) + log1p(e));
                    const Vec<Acc> value = counted ? loss : Vec<Acc>{};
                    sum += value;
                    if (losses) store(losses + at, value);
                    if (!gradient_) continue;
                    const Vec<Acc> p = factor * ((x > 0 ? one : e) / (one + e));
                    const Vec<Acc> g = counted ? (is_one ? -p : p) : Vec<Acc>{};
                    slope += g;
                    if constexpr (kBlend) to_right += right * g;
                }
                total += static_cast<double>(sum_lanes<Acc>(sum));
            }
            if (gradient_) share.add(0, cell, slope - to_right, to_right);
        }
        return total;
    }

private:
    const int64_t channels_;
    const Acc* const pos_weight_;
    const Columns<Acc>& columns_;
    const Axis rows_;
    Row<Acc> logits_;
    const bool gradient_;
};

// Transposes a channels_last map to planes (n * c, h, w) and back, one row of the map at a time.
template <class Acc>
void to_planes(const Map& map, ParallelFor parallel_for, Acc* planes) {
    parallel_items(parallel_for, map.n * map.h, map.w * map.c, [&](const Items& mine) {
        const Scratch<Acc> scratch(map.w * map.c);
        for (const int64_t i : mine) {
            const Acc* row = view<Acc>(map.data, map.type, i * map.w * map.c, map.w * map.c, scratch);
            for (int64_t c = 0; c < map.c; ++c)
                for (int64_t x = 0; x < map.w; ++x)
                    planes[((i / map.h * map.c + c) * map.h + i % map.h) * map.w + x] = row[x * map.c + c];
        }
    });
}
template <class Acc>
void from_planes(const Map& map, const Acc* planes, ParallelFor parallel_for, void* out) {
    parallel_items(parallel_for, map.n * map.h, map.w * map.c, [&](const Items& mine) {
        const Scratch<Acc> scratch(map.w * map.c);
        for (const int64_t i : mine) {
            Acc* row = target_span<Acc>(out, map.type, i * map.w * map.c, scratch);
            for (int64_t c = 0; c < map.c; ++c)
                for (int64_t x = 0; x < map.w; ++x)
                    row[x * map.c + c] = planes[((i / map.h * map.c + c) * map.h + i % map.h) * map.w + x];
            commit(out, map.type, i * map.w * map.c, map.w * map.c, row);
        }
    });
}

template <class Acc, bool kBlend>
void run(const ResizedBinaryCrossEntropy& a) {
    const Map& map = a.logits;
    const int64_t size = map.channels_last ? map.n * map.c * map.h * map.w : 0;
    const Scratch<Acc> logits(size), gradient(a.to.gradient ? size : 0);
    Map planes{map.data, map.type, false, map.n * map.c, 1, map.h, map.w};
    Resized to = a.to;
    if (map.channels_last) {
        to_planes<Acc>(map, to.parallel_for, logits);
        planes.data = static_cast<Acc*>(logits);
        planes.type = sizeof(Acc) == sizeof(double) ? DType::f64 : DType::f32;
        if (to.gradient) to.gradient = static_cast<Acc*>(gradient);
    }
    const Columns<Acc> columns(Axis(map.w, to.width, to.align_corners));
    each_label_row<Acc>(planes, to, columns, [&] { return Term<Acc, kBlend>(a, planes, columns); });
    if (map.channels_last && to.gradient) from_planes<Acc>(map, gradient, to.parallel_for, a.to.gradient);
}

}  // namespace

void resized_binary_cross_entropy(const ResizedBinaryCrossEntropy& a) {
    with_acc(a.logits.type, [&](auto t) {
        using Acc = typename decltype(t)::type;
        a.logits.w == a.to.width ? run<Acc, false>(a) : run<Acc, true>(a);
    });
}

}  // namespace fastkd::FASTKD_ISA

// Cross-entropy at label resolution: -log softmax(bilinear(logits))[y], times the pixel's weights; and its gradient.
//
// Each label row blends two rows of logits once (1 / ratio of the work), then every vector of label pixels is
// interpolated, exponentiated and summed in registers. Where a gradient is wanted the exponentials of a few vectors stay
// in cache, and become p - onehot in the same visit. The gradient of a row of logits is added up in cache and written
// once. Threads own bands of logit rows; a band's last row goes to the next band in a fixed order.
#include "resize.h"

namespace fastkd::FASTKD_ISA {
namespace {

template <class Acc, bool kBlend>
class Term {
    static constexpr int W = kLanes<Acc>;

public:
    Term(const ResizedCrossEntropy& a, const Columns<Acc>& columns)
        : classes_(a.logits.c),
          columns_(columns),
          rows_(a.logits.h, a.to.height, a.to.align_corners),
          logits_(a.logits, columns.padded),
          kept_(phases_kept<Acc>(columns.phases, classes_)),
          e_(a.to.gradient ? classes_ * kept_ * W : 0),
          gradient_(a.to.gradient != nullptr) {}

    double row(int64_t n, int64_t label_y, const PixelRow<Acc>& pixels, const GradientShare<Acc>& share, Acc* losses) {
        logits_.load(n, rows_.tap(label_y), 1);
        double total = 0;
        for (int64_t cell = 0; cell < columns_.padded; cell += W)
            for (int64_t k = 0; k < columns_.phases; k += kept_) {
                const int64_t phases = min(kept_, columns_.phases - k);
                Vec<Acc> sum{};  // of a few vectors: a longer fp32 sum of equal terms drifts
                for (int64_t j = 0; j < phases; j += 4)
                    by_count(phases - j, [&](auto g) { sum += losses_of<decltype(g)::value>(pixels, cell, k, j, losses); });
                total += static_cast<double>(sum_lanes<Acc>(sum));
                if (gradient_) add_gradient(cell, phases, share);
            }
        return total;
    }

private:
    // Phases k + j to k + j + G of the cells from `cell` on; leaves what the gradient needs at j.
    template <int G>
    Vec<Acc> losses_of(const PixelRow<Acc>& pixels, int64_t cell, int64_t k, int64_t j, Acc* losses) {
        const Side<Acc, false> side{logits_.values() + cell, logits_.stride, 0};
        for (int i = 0; i < G; ++i) right_[j + i] = load(columns_.right + (k + j + i) * columns_.padded + cell);
        const auto plain = [&] { return Side<Acc, false>{logits_.plain() + cell, logits_.stride, 0}; };
        Softmax<Acc, G, false> softmax;
        if (gradient_)
            softmax.template compute<true, false, kBlend>(side, plain, right_ + j, classes_, e_ + j * W, kept_ * W);
        else
            softmax.template compute<false, false, kBlend>(side, plain, right_ + j, classes_, nullptr, 0);
        Vec<Acc> total{};
        for (int i = 0; i < G; ++i) {
            const int64_t at = (k + j + i) * columns_.padded + cell;
            const Vec<Acc> label = load(pixels.label + at), factor = load(pixels.factor + at);
            const auto counted = label >= 0;
            const Vec<Acc> own = softmax.labelled(side, pixels.label + at, right_[j + i], i);
            const Vec<Acc> loss = factor * (log(softmax.sum[i]) - own);
            const Vec<Acc> value = counted ? loss : Vec<Acc>{};
            total += value;
            if (losses) store(losses + at, value);
            if (!gradient_) continue;
            label_[j + i] = label;
            factor_[j + i] = factor;
            scale_[j + i] = counted ? factor / softmax.sum[i] : Vec<Acc>{};
            clear_uncounted<Acc>(counted, softmax.sum[i], e_ + (j + i) * W, classes_, kept_ * W);
        }
        return total;
    }

    // scale * exp - factor * onehot, added to the cells' left and right logits.
    void add_gradient(int64_t cell, int64_t phases, const GradientShare<Acc>& share) {
        for (int64_t c = 0; c < classes_; ++c) {
            Vec<Acc> sum{}, to_right{};
            const Vec<Acc> own = set1(static_cast<Acc>(c));
            const Acc* e = e_ + c * kept_ * W;
            for (int64_t j = 0; j < phases; ++j) {
                Vec<Acc> g = load(e + j * W) * scale_[j];
                g -= label_[j] == own ? factor_[j] : Vec<Acc>{};
                sum += g;
                if constexpr (kBlend) to_right += right_[j] * g;
            }
            share.add(c, cell, sum - to_right, to_right);
        }
    }

    const int64_t classes_;
    const Columns<Acc>& columns_;
    const Axis rows_;
    Row<Acc> logits_;
    const int64_t kept_;
    const Scratch<Acc> e_;  // (classes, kept, W)
    const bool gradient_;
    Vec<Acc> right_[kMaxPhases], label_[kMaxPhases], factor_[kMaxPhases], scale_[kMaxPhases];
};

template <class Acc, bool kBlend>
void run(const ResizedCrossEntropy& a) {
    const Columns<Acc> columns(Axis(a.logits.w, a.to.width, a.to.align_corners));
    each_label_row<Acc>(a.logits, a.to, columns, [&] { return Term<Acc, kBlend>(a, columns); });
}

}  // namespace

void resized_cross_entropy(const ResizedCrossEntropy& a) {
    with_acc(a.logits.type, [&](auto t) {
        using Acc = typename decltype(t)::type;
        a.logits.w == a.to.width ? run<Acc, false>(a) : run<Acc, true>(a);
    });
}

}  // namespace fastkd::FASTKD_ISA

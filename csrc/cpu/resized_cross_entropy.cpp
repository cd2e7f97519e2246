// Cross-entropy at label resolution and its gradient: -log softmax(bilinear(logits))[y] times the weights of the pixel.
// With label smoothing or focal loss, p and onehot have other factors (fastkd/ops/resized_cross_entropy.py). Label
// smoothing needs a weighted sum of all logits. It is linear, so it is computed from a row of logits and interpolated
// like one more class.
//
// Each label row blends two rows of logits once (1 / ratio of the work). Then every vector of label pixels is
// interpolated, exponentiated and summed in registers. For a gradient, the exponentials of a few vectors stay in cache
// and become p - onehot in the same pass. The gradient of a row of logits accumulates in cache and is written once.
// Each thread processes bands of logit rows; the last row of a band is added to the next band in a fixed order.
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
          gradient_(a.to.gradient != nullptr),
          smoothing_(static_cast<Acc>(a.label_smoothing)),
          gamma_(static_cast<Acc>(a.focal_gamma)),
          class_weight_(static_cast<const Acc*>(a.to.pixels.class_weight)),
          all_(a.label_smoothing ? logits_.stride : 0),
          plain_all_(a.label_smoothing ? logits_.stride : 0) {
        double total = 0;
        for (int64_t c = 0; c < classes_; ++c) total += weight_of(c);
        total_weight_ = static_cast<Acc>(total);
    }

    double row(int64_t n, int64_t label_y, const PixelRow<Acc>& pixels, const GradientShare<Acc>& share, Acc* losses) {
        logits_.load(n, rows_.tap(label_y), 1);
        if (smoothing_ != 0) add_classes(logits_.values(), all_);
        have_plain_all_ = false;
        double total = 0;
        for (int64_t cell = 0; cell < columns_.padded; cell += W)
            for (int64_t k = 0; k < columns_.phases; k += kept_) {
                const int64_t phases = min(kept_, columns_.phases - k);
                Vec<Acc> sum{};  // short fp32 sums: a longer sum of equal terms drifts
                for (int64_t j = 0; j < phases; j += 4)
                    by_count(phases - j, [&](auto g) { sum += losses_of<decltype(g)::value>(pixels, cell, k, j, losses); });
                total += static_cast<double>(sum_lanes<Acc>(sum));
                if (gradient_) smoothing_ != 0 ? add_gradient<true>(cell, phases, share) : add_gradient<false>(cell, phases, share);
            }
        return total;
    }

private:
    Acc weight_of(int64_t c) const { return class_weight_ ? class_weight_[c] : Acc(1); }

    // Weighted sum over the classes of a row of logits.
    void add_classes(const Acc* values, Acc* out) const {
        for (int64_t x = 0; x < logits_.stride; x += W) {
            Vec<Acc> sum{};
            for (int64_t c = 0; c < classes_; ++c) sum += set1(weight_of(c)) * load(values + c * logits_.stride + x);
            store(out + x, sum);
        }
    }
    const Acc* plain_all() {
        if (!have_plain_all_) add_classes(logits_.plain(), plain_all_);
        have_plain_all_ = true;
        return plain_all_;
    }

    // (1 - p)^gamma, given 1 - p.
    Vec<Acc> power(Vec<Acc> rest) const {
        if (gamma_ == 2) return rest * rest;
        const Vec<Acc> least = set1(sizeof(Acc) == sizeof(double) ? Acc(0x1p-1022) : Acc(0x1p-126));
        return rest < least ? Vec<Acc>{} : exp(set1(gamma_) * log(rest));
    }

    // Phases [k + j, k + j + G) of the vector of cells at `cell`; stores the values for the gradient at index j.
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
            const Vec<Acc> nll = log(softmax.sum[i]) - own;
            Vec<Acc> loss = factor * nll, of_label = factor, of_p = factor;
            if (gamma_ != 0) {
                const Vec<Acc> l = nll < 0 ? Vec<Acc>{} : nll, rest = one_minus_exp(l), p = set1(Acc(1)) - rest;
                const Vec<Acc> slope = p == 0 ? Vec<Acc>{} : p * (rest == 0 ? set1(Acc(1)) : l / rest);
                const Vec<Acc> focal = factor * power(rest);
                loss = focal * l;
                of_label = of_p = focal * (set1(Acc(1)) + set1(gamma_) * slope);
            }
            if (smoothing_ != 0) {
                const Vec<Acc> each = load(pixels.weight + at) * set1(smoothing_ / static_cast<Acc>(classes_));
                const auto plain_row = [&] { return plain_all() + cell; };
                const Vec<Acc> sum =
                    softmax.template combined<kBlend>(all_ + cell, plain_row, right_[j + i], total_weight_, i);
                of_label = set1(1 - smoothing_) * factor;
                of_p = of_label + each * set1(total_weight_);
                loss = of_label * nll + each * (set1(total_weight_) * log(softmax.sum[i]) - sum);
                each_[j + i] = counted ? each : Vec<Acc>{};
            }
            const Vec<Acc> value = counted ? loss : Vec<Acc>{};
            total += value;
            if (losses) store(losses + at, value);
            if (!gradient_) continue;
            label_[j + i] = label;
            factor_[j + i] = of_label;
            scale_[j + i] = counted ? of_p / softmax.sum[i] : Vec<Acc>{};
            clear_uncounted<Acc>(counted, softmax.sum[i], e_ + (j + i) * W, classes_, kept_ * W);
        }
        return total;
    }

    // Adds scale * exp - factor * onehot, minus the smoothing term of each class, to the left and right logits of the
    // cells.
    template <bool kSmooth>
    void add_gradient(int64_t cell, int64_t phases, const GradientShare<Acc>& share) {
        [[maybe_unused]] Vec<Acc> each{}, each_right{};
        for (int64_t j = 0; kSmooth && j < phases; ++j) {
            each += each_[j];
            each_right += right_[j] * each_[j];
        }
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
            if constexpr (kSmooth) {
                sum -= set1(weight_of(c)) * each;
                if constexpr (kBlend) to_right -= set1(weight_of(c)) * each_right;
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
    const Acc smoothing_, gamma_;
    const Acc* const class_weight_;
    const Scratch<Acc> all_, plain_all_;  // (stride,): weighted sum over the classes
    bool have_plain_all_ = false;
    Acc total_weight_;
    Vec<Acc> each_[kMaxPhases];
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

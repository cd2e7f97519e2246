// Sums of probabilities per class at label resolution for Dice and cross-entropy, and their gradient. Formulas:
// fastkd/ops/resized_dice.py.
//
// The sums and the gradient each compute the exponentials; nothing is kept between the two passes. Each band of label
// rows accumulates into its own fp64 lanes, at most 16 vectors of label pixels at a time. The bands are summed in
// order.
#include "resize.h"

namespace fastkd::FASTKD_ISA {
namespace {

template <class Acc, bool kBlend>
class Sums {
    static constexpr int W = kLanes<Acc>, D = kLanes<double>;

public:
    Sums(const ResizedDice& a, const Columns<Acc>& columns)
        : classes_(a.logits.c),
          width_(a.columns),
          square_(a.square),
          columns_(columns),
          rows_(a.logits.h, a.to.height, a.to.align_corners),
          logits_(a.logits, columns.padded),
          kept_(phases_kept<Acc>(columns.phases, classes_)),
          e_(classes_ * kept_ * W),
          sums_(classes_ * width_ * D) {}

    void clear() {
        for (int64_t i = 0; i < classes_ * width_ * D; ++i) sums_[i] = 0;
    }
    void finish(double* out) const {
        for (int64_t i = 0; i < classes_ * width_; ++i) out[i] = sum_lanes<double>(load(sums_ + i * D));
    }

    void row(int64_t n, int64_t label_y, const PixelRow<Acc>& pixels) {
        logits_.load(n, rows_.tap(label_y), 1);
        for (int64_t cell = 0; cell < columns_.padded; cell += W)
            for (int64_t k = 0; k < columns_.phases; k += kept_) {
                const int64_t phases = min(kept_, columns_.phases - k);
                for (int64_t j = 0; j < phases; j += 4)
                    by_count(phases - j, [&](auto g) { probabilities<decltype(g)::value>(pixels, cell, k, j); });
                add(cell, phases);
            }
    }

private:
    template <int G>
    void probabilities(const PixelRow<Acc>& pixels, int64_t cell, int64_t k, int64_t j) {
        const Side<Acc, false> side{logits_.values() + cell, logits_.stride, 0};
        for (int i = 0; i < G; ++i) right_[j + i] = load(columns_.right + (k + j + i) * columns_.padded + cell);
        const auto plain = [&] { return Side<Acc, false>{logits_.plain() + cell, logits_.stride, 0}; };
        Softmax<Acc, G, false> softmax;
        softmax.template compute<true, false, kBlend>(side, plain, right_ + j, classes_, e_ + j * W, kept_ * W);
        for (int i = 0; i < G; ++i) {
            const int64_t at = (k + j + i) * columns_.padded + cell;
            const Vec<Acc> label = load(pixels.label + at);
            const auto counted = label >= 0;
            label_[j + i] = label;
            scale_[j + i] = counted ? set1(Acc(1)) / softmax.sum[i] : Vec<Acc>{};
            clear_uncounted<Acc>(counted, softmax.sum[i], e_ + (j + i) * W, classes_, kept_ * W);
            if (width_ < 4) continue;
            const Vec<Acc> log_sum = log(softmax.sum[i]);
            const Vec<Acc> nll = log_sum - softmax.labelled(side, pixels.label + at, right_[j + i], i);
            nll_[j + i] = counted ? nll : Vec<Acc>{};
            if (width_ < 5) continue;
            // -log p summed over all classes is linear in the logits, unless the exponentials were taken about another
            // maximum.
            const auto linear = softmax.careful ? label < label : counted;
            log_sum_[j + i] = linear ? log_sum : Vec<Acc>{};
            one_[j + i] = linear ? set1(Acc(1)) : Vec<Acc>{};
            for (int64_t c = 0; softmax.careful && c < classes_; ++c) {
                const Vec<Acc> each = log_sum - softmax.template value<kBlend, true>(side, right_[j + i], c, i);
                add_to(c, 4, counted ? each : Vec<Acc>{});
            }
        }
    }

    // The phases of the vector of cells at `cell`.
    void add(int64_t cell, int64_t phases) {
        Vec<Acc> low = set1(static_cast<Acc>(classes_)), high{}, log_sum{}, to_left{}, to_right{};
        for (int64_t j = 0; j < phases; ++j) {
            low = label_[j] >= 0 && label_[j] < low ? label_[j] : low;
            high = max(high, label_[j]);
            if (width_ < 5) continue;
            log_sum += log_sum_[j];
            to_left += one_[j] * (set1(Acc(1)) - right_[j]);
            to_right += one_[j] * right_[j];
        }
        const Acc first = -max_lanes<Acc>(-low), last = max_lanes<Acc>(high);  // few distinct labels occur in so few pixels
        for (int64_t c = 0; c < classes_; ++c) {
            const Acc* e = e_ + c * kept_ * W;
            const Vec<Acc> own = set1(static_cast<Acc>(c));
            Vec<Acc> sum{}, intersection{}, labelled{}, nll{};
            const auto term = [&](Vec<Acc> p) { return square_ ? p * p : p; };
            if (own[0] < first || own[0] > last) {
                for (int64_t j = 0; j < phases; ++j) sum += term(load(e + j * W) * scale_[j]);
            } else {
                for (int64_t j = 0; j < phases; ++j) {
                    const Vec<Acc> p = load(e + j * W) * scale_[j];
                    const auto mine = label_[j] == own;
                    sum += term(p);
                    intersection += mine ? p : Vec<Acc>{};
                    labelled += mine ? set1(Acc(1)) : Vec<Acc>{};
                    if (width_ > 3) nll += mine ? nll_[j] : Vec<Acc>{};
                }
                add_to(c, 0, intersection);
                add_to(c, 2, labelled);
                if (width_ > 3) add_to(c, 3, nll);
            }
            add_to(c, 1, sum);
            if (width_ < 5) continue;
            const Acc* at = logits_.values() + c * logits_.stride + cell;
            // A weight of 0 contributes exactly 0, also at -inf.
            const Vec<Acc> left = to_left == 0 ? Vec<Acc>{} : to_left * load(at);
            const Vec<Acc> right = to_right == 0 ? Vec<Acc>{} : to_right * load(at + 1);
            add_to(c, 4, log_sum - left - right);
        }
    }

    void add_to(int64_t c, int64_t column, Vec<Acc> v) {
        double* at = sums_ + (c * width_ + column) * D;
        store(at, load(at) + widened(v));
    }

    const int64_t classes_, width_;
    const bool square_;
    const Columns<Acc>& columns_;
    const Axis rows_;
    Row<Acc> logits_;
    const int64_t kept_;
    const Scratch<Acc> e_;        // (classes, kept, W)
    const Scratch<double> sums_;  // (classes, columns, D)
    Vec<Acc> right_[kMaxPhases], label_[kMaxPhases], scale_[kMaxPhases], nll_[kMaxPhases], log_sum_[kMaxPhases],
        one_[kMaxPhases];
};

template <class Acc, bool kBlend>
void sums(const ResizedDice& a) {
    const Columns<Acc> columns(Axis(a.logits.w, a.to.width, a.to.align_corners));
    const Axis rows(a.logits.h, a.to.height, a.to.align_corners);
    const Scratch<int64_t> first(a.logits.h + 1);
    rows.starts(first);
    const Bands bands(a.logits.n, a.logits.h);
    const int64_t items = a.logits.n * bands.per_sample, size = a.logits.c * a.columns;
    const Scratch<double> parts(items * size);
    parallel_items(a.to.parallel_for, items, int64_t{1} << 40, [&](const Items& mine) {
        Sums<Acc, kBlend> sums(a, columns);
        const PixelRow<Acc> pixels(a.to.pixels, rows, columns, a.to.align_corners);
        for (const int64_t item : mine) {
            const int64_t n = item / bands.per_sample, band = item % bands.per_sample;
            sums.clear();
            for (int64_t label_y = first[bands.first(band)]; label_y < first[bands.first(band + 1)]; ++label_y) {
                pixels.load(n, label_y);
                sums.row(n, label_y, pixels);
            }
            sums.finish(parts + item * size);
        }
    });
    for (int64_t n = 0; n < a.logits.n; ++n)
        for (int64_t i = 0; i < size; ++i) {
            double total = 0;
            for (int64_t band = 0; band < bands.per_sample; ++band) total += parts[(n * bands.per_sample + band) * size + i];
            a.sums[n * size + i] = total;
        }
}

// A term for each_label_row: gradient only, no loss.
template <class Acc, bool kBlend>
class Slopes {
    static constexpr int W = kLanes<Acc>;

public:
    Slopes(const ResizedDice& a, const Columns<Acc>& columns)
        : classes_(a.logits.c),
          width_(a.columns),
          square_(a.square),
          grad_(a.grad),
          columns_(columns),
          rows_(a.logits.h, a.to.height, a.to.align_corners),
          logits_(a.logits, columns.padded),
          kept_(phases_kept<Acc>(columns.phases, classes_)),
          e_(classes_ * kept_ * W),
          intersection_(classes_),
          sum_(classes_),
          nll_(classes_),
          each_(classes_) {}

    double row(int64_t n, int64_t label_y, const PixelRow<Acc>& pixels, const GradientShare<Acc>& share, Acc*) {
        load_slopes(n);
        logits_.load(n, rows_.tap(label_y), 1);
        for (int64_t cell = 0; cell < columns_.padded; cell += W)
            for (int64_t k = 0; k < columns_.phases; k += kept_) {
                const int64_t phases = min(kept_, columns_.phases - k);
                for (int64_t j = 0; j < phases; j += 4)
                    by_count(phases - j, [&](auto g) { probabilities<decltype(g)::value>(pixels, cell, k, j); });
                square_ ? add_gradient<true>(cell, phases, share) : add_gradient<false>(cell, phases, share);
            }
        return 0;
    }

private:
    // Loads the upstream gradient of sample n by column.
    void load_slopes(int64_t n) {
        if (n == sample_) return;
        sample_ = n;
        const double* grad = grad_ + n * classes_ * width_;
        double total = 0;
        for (int64_t c = 0; c < classes_; ++c, grad += width_) {
            intersection_[c] = static_cast<Acc>(grad[0]);
            sum_[c] = static_cast<Acc>(square_ ? 2 * grad[1] : grad[1]);
            nll_[c] = static_cast<Acc>(width_ > 3 ? grad[3] : 0);
            each_[c] = static_cast<Acc>(width_ > 4 ? grad[4] : 0);
            total += width_ > 4 ? grad[4] : 0;
        }
        total_each_ = static_cast<Acc>(total);
        double sum = 0;
        for (int64_t i = 0; i < classes_ * width_; ++i) sum += grad_[n * classes_ * width_ + i];
        finite_ = sum - sum == 0;
    }

    template <int G>
    void probabilities(const PixelRow<Acc>& pixels, int64_t cell, int64_t k, int64_t j) {
        const Side<Acc, false> side{logits_.values() + cell, logits_.stride, 0};
        for (int i = 0; i < G; ++i) right_[j + i] = load(columns_.right + (k + j + i) * columns_.padded + cell);
        const auto plain = [&] { return Side<Acc, false>{logits_.plain() + cell, logits_.stride, 0}; };
        Softmax<Acc, G, false> softmax;
        softmax.template compute<true, false, kBlend>(side, plain, right_ + j, classes_, e_ + j * W, kept_ * W);
        for (int i = 0; i < G; ++i) {
            const auto counted = load(pixels.label + (k + j + i) * columns_.padded + cell) >= 0;
            scale_[j + i] = counted ? set1(Acc(1)) / softmax.sum[i] : Vec<Acc>{};
            clear_uncounted<Acc>(counted, softmax.sum[i], e_ + (j + i) * W, classes_, kept_ * W);
        }
        Vec<Acc> dot[G] = {};
        square_ ? add_dot<G, true>(j, dot) : add_dot<G, false>(j, dot);
        for (int i = 0; i < G; ++i) {
            const int64_t at = (k + j + i) * columns_.padded + cell;
            const Vec<Acc> label = load(pixels.label + at);
            const auto counted = label >= 0;
            const Vec<Acc> own = exp(softmax.labelled(side, pixels.label + at, right_[j + i], i)) * scale_[j + i];
            const Vec<Acc> of_own = by_label<Acc>(intersection_, label) * own, nll = by_label<Acc>(nll_, label);
            const Vec<Acc> of_all = nll + set1(total_each_) - (dot[i] + of_own), of_label = of_own - nll;
            label_[j + i] = label;
            all_[j + i] = counted ? of_all : Vec<Acc>{};
            own_[j + i] = counted ? of_label : Vec<Acc>{};
            one_[j + i] = counted ? set1(Acc(1)) : Vec<Acc>{};
        }
    }

    // dot += sum over classes of B p, where B = sum_, times p if kSquare.
    template <int G, bool kSquare>
    void add_dot(int64_t j, Vec<Acc>* dot) const {
        constexpr int64_t kRows = 64;  // classes per partial sum: two levels keep fp32 sums short
        for (int64_t first = 0; first < classes_; first += kRows) {
            Vec<Acc> part[G] = {};
            for (int64_t c = first; c < min(classes_, first + kRows); ++c) {
                const Vec<Acc> b = set1(sum_[c]);
                for (int i = 0; i < G; ++i) {
                    const Vec<Acc> p = load(e_ + (c * kept_ + j + i) * W) * scale_[j + i];
                    part[i] += kSquare ? b * p * p : b * p;
                }
            }
            for (int i = 0; i < G; ++i) dot[i] += part[i];
        }
    }

    template <bool kSquare>
    void add_gradient(int64_t cell, int64_t phases, const GradientShare<Acc>& share) {
        Vec<Acc> each{}, each_right{};
        for (int64_t j = 0; j < phases; ++j) {
            each += one_[j];
            each_right += right_[j] * one_[j];
        }
        for (int64_t c = 0; c < classes_; ++c) {
            Vec<Acc> sum{}, to_right{};
            const Vec<Acc> own = set1(static_cast<Acc>(c)), b = set1(sum_[c]);
            const Acc* e = e_ + c * kept_ * W;
            for (int64_t j = 0; j < phases; ++j) {
                const Vec<Acc> p = load(e + j * W) * scale_[j];
                Vec<Acc> g = p * ((kSquare ? b * p : b) + all_[j]);
                g += label_[j] == own ? own_[j] : Vec<Acc>{};
                if (!finite_) g = label_[j] >= 0 ? g : Vec<Acc>{};  // 0 * inf or 0 * NaN would be NaN
                sum += g;
                if constexpr (kBlend) to_right += right_[j] * g;
            }
            sum -= each == 0 ? Vec<Acc>{} : set1(each_[c]) * each;
            if constexpr (kBlend) to_right -= each_right == 0 ? Vec<Acc>{} : set1(each_[c]) * each_right;
            share.add(c, cell, sum - to_right, to_right);
        }
    }

    const int64_t classes_, width_;
    const bool square_;
    const double* const grad_;  // (n, classes, columns)
    const Columns<Acc>& columns_;
    const Axis rows_;
    Row<Acc> logits_;
    const int64_t kept_;
    const Scratch<Acc> e_;                                // (classes, kept, W)
    const Scratch<Acc> intersection_, sum_, nll_, each_;  // (classes,): upstream gradient per column; sum_ doubled if square
    Acc total_each_ = 0;
    bool finite_ = true;  // whether all of them are finite
    int64_t sample_ = -1;
    Vec<Acc> right_[kMaxPhases], label_[kMaxPhases], scale_[kMaxPhases], all_[kMaxPhases], own_[kMaxPhases], one_[kMaxPhases];
};

template <class Acc, bool kBlend>
void run(const ResizedDice& a) {
    if (!a.grad) return sums<Acc, kBlend>(a);
    Acc nothing;
    Resized to = a.to;
    to.out = {Reduce::sum, 1, &nothing, nullptr};
    const Columns<Acc> columns(Axis(a.logits.w, to.width, to.align_corners));
    each_label_row<Acc>(a.logits, to, columns, [&] { return Slopes<Acc, kBlend>(a, columns); });
}

}  // namespace

void resized_dice(const ResizedDice& a) {
    with_acc(a.logits.type, [&](auto t) {
        using Acc = typename decltype(t)::type;
        a.logits.w == a.to.width ? run<Acc, false>(a) : run<Acc, true>(a);
    });
}

}  // namespace fastkd::FASTKD_ISA

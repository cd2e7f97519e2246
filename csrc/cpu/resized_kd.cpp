// KD at label resolution and its gradient: tau^2 KL(softmax(bilinear(T) / tau) || softmax(bilinear(S) / tau)) per
// pixel.
//
// Same structure as resized_cross_entropy.cpp, with two sides. If the teacher's logits have another width, their cells
// differ from the student's. Each label row of the teacher is then laid out by the student's phases first, in cache.
// The sigmoid variant has no sum over classes to wait for, so it keeps the difference of the probabilities instead of
// the exponentials.
#include "resize.h"
#include "sigmoid.h"

namespace fastkd::FASTKD_ISA {
namespace {

// Interpolates a row of the teacher's logits, (classes, stride), at each label pixel; stores it by the student's phases
// and cells.
template <class Acc>
void lay_out(const Columns<Acc>& columns, const Axis& teacher, int64_t classes, const Acc* row, int64_t stride, Acc* out) {
    for (int64_t x = 0; x < columns.width; ++x) {
        const Axis::Tap tap = teacher.tap(x);
        const Acc b = static_cast<Acc>(tap.weight), a = static_cast<Acc>(1 - tap.weight);
        const Acc* from = row;
        Acc* to = out + columns.slot[x];
        for (int64_t c = 0; c < classes; ++c, from += stride, to += columns.phases * columns.padded)
            *to = b == 0 ? from[tap.left] : a * from[tap.left] + b * from[tap.right];
    }
}

template <class Acc, bool kBlend, bool kAhead>
class Term {
    static constexpr int W = kLanes<Acc>;

public:
    Term(const ResizedKd& a, const Columns<Acc>& columns)
        : classes_(a.student.c),
          columns_(columns),
          student_rows_(a.student.h, a.to.height, a.to.align_corners),
          teacher_rows_(a.teacher.h, a.to.height, a.to.align_corners),
          teacher_columns_(a.teacher.w, a.to.width, a.to.align_corners),
          student_(a.student, columns.padded),
          teacher_(a.teacher, ceil_div(a.teacher.w, W) * W),
          laid_out_(kAhead ? classes_ * columns.phases * columns.padded : 0),
          plain_laid_out_(kAhead ? classes_ * columns.phases * columns.padded : 0),
          inv_tau_(static_cast<Acc>(1 / a.temperature)),
          tau_(static_cast<Acc>(a.temperature)),
          kept_(phases_kept<Acc>(columns.phases, 2 * classes_)),
          e_s_(classes_ * kept_ * W),
          e_t_(classes_ * kept_ * W),
          gradient_(a.to.gradient != nullptr) {
        for (int64_t i = 0; kAhead && i < classes_ * columns.phases * columns.padded; ++i) laid_out_[i] = plain_laid_out_[i] = 0;
    }

    double row(int64_t n, int64_t label_y, const PixelRow<Acc>& pixels, const GradientShare<Acc>& share, Acc* losses) {
        student_.load(n, student_rows_.tap(label_y), inv_tau_);
        teacher_.load(n, teacher_rows_.tap(label_y), inv_tau_);
        if constexpr (kAhead) lay_out(teacher_.values(), laid_out_);
        have_plain_ = false;
        double total = 0;
        for (int64_t cell = 0; cell < columns_.padded; cell += W)
            for (int64_t k = 0; k < columns_.phases; k += kept_) {
                const int64_t phases = min(kept_, columns_.phases - k);
                Vec<Acc> sum{};  // short fp32 sums: a longer sum of equal terms drifts
                for (int64_t j = 0; j < phases; j += 2)
                    if (phases - j == 1)
                        sum += losses_of<1>(pixels, cell, k, j, losses);
                    else
                        sum += losses_of<2>(pixels, cell, k, j, losses);
                total += static_cast<double>(sum_lanes<Acc>(sum));
                if (gradient_) add_gradient(cell, phases, share);
            }
        return total;
    }

private:
    void lay_out(const Acc* row, Acc* out) const {
        FASTKD_ISA::lay_out(columns_, teacher_columns_, classes_, row, teacher_.stride, out);
    }

    template <int G>
    Vec<Acc> losses_of(const PixelRow<Acc>& pixels, int64_t cell, int64_t k, int64_t j, Acc* losses) {
        const int64_t first = (k + j) * columns_.padded + cell;
        const Side<Acc, false> student{student_.values() + cell, student_.stride, 0};
        const Side<Acc, kAhead> teacher =
            kAhead ? ahead(laid_out_ + first) : Side<Acc, kAhead>{teacher_.values() + cell, teacher_.stride, 0};
        const auto student_plain = [&] { return Side<Acc, false>{student_.plain() + cell, student_.stride, 0}; };
        const auto teacher_plain = [&] {
            if (!kAhead) return Side<Acc, kAhead>{teacher_.plain() + cell, teacher_.stride, 0};
            if (!have_plain_) lay_out(teacher_.plain(), plain_laid_out_);
            have_plain_ = true;
            return ahead(plain_laid_out_ + first);
        };
        for (int i = 0; i < G; ++i) right_[j + i] = load(columns_.right + first + i * columns_.padded);
        Softmax<Acc, G, false> s;
        Softmax<Acc, G, kAhead> t;
        s.template compute<true, false, kBlend>(student, student_plain, right_ + j, classes_, e_s_ + j * W, kept_ * W);
        t.template compute<true, false, kBlend>(teacher, teacher_plain, right_ + j, classes_, e_t_ + j * W, kept_ * W);
        Vec<Acc> dot[G] = {}, total{};
        s.careful || t.careful ? add_dot<G, true>(student, teacher, s, t, j, dot)
                               : add_dot<G, false>(student, teacher, s, t, j, dot);
        for (int i = 0; i < G; ++i) {
            const int64_t at = first + i * columns_.padded;
            const Vec<Acc> factor = load(pixels.factor + at);
            const auto counted = load(pixels.label + at) >= 0;
            const Vec<Acc> kl = dot[i] / t.sum[i] + log(s.sum[i] / t.sum[i]);
            const Vec<Acc> loss = (kl < 0 ? Vec<Acc>{} : kl) * (factor * tau_ * tau_);
            const Vec<Acc> value = counted ? loss : Vec<Acc>{};
            total += value;
            if (losses) store(losses + at, value);
            if (!gradient_) continue;
            // p_s - p_t as (es - et * ratio) / sum_s: exactly 0 if student and teacher are equal.
            ratio_[j + i] = counted ? s.sum[i] / t.sum[i] : Vec<Acc>{};
            scale_[j + i] = counted ? factor * tau_ / s.sum[i] : Vec<Acc>{};
            clear_uncounted<Acc>(counted, s.sum[i], e_s_ + (j + i) * W, classes_, kept_ * W);
            clear_uncounted<Acc>(counted, t.sum[i], e_t_ + (j + i) * W, classes_, kept_ * W);
        }
        return total;
    }

    Side<Acc, kAhead> ahead(const Acc* at) const {
        return {at, columns_.phases * columns_.padded, columns_.padded};
    }

    // dot += exp(t) (t - s), with the same values as in the exponentials.
    template <int G, bool kCareful>
    void add_dot(const Side<Acc, false>& student, const Side<Acc, kAhead>& teacher, const Softmax<Acc, G, false>& s,
                 const Softmax<Acc, G, kAhead>& t, int64_t j, Vec<Acc>* dot) const {
        for (int64_t c = 0; c < classes_; ++c)
            for (int i = 0; i < G; ++i) {
                const Vec<Acc> et = load(e_t_ + (c * kept_ + j + i) * W);
                const Vec<Acc> d = t.template value<kBlend, kCareful>(teacher, right_[j + i], c, i) -
                                   s.template value<kBlend, kCareful>(student, right_[j + i], c, i);
                dot[i] += et == 0 ? Vec<Acc>{} : et * d;  // probability 0 contributes exactly 0, also at -inf
            }
    }

    void add_gradient(int64_t cell, int64_t phases, const GradientShare<Acc>& share) {
        for (int64_t c = 0; c < classes_; ++c) {
            Vec<Acc> sum{}, to_right{};
            const Acc *e_s = e_s_ + c * kept_ * W, *e_t = e_t_ + c * kept_ * W;
            for (int64_t j = 0; j < phases; ++j) {
                const Vec<Acc> g = scale_[j] * (load(e_s + j * W) - load(e_t + j * W) * ratio_[j]);
                sum += g;
                if constexpr (kBlend) to_right += right_[j] * g;
            }
            share.add(c, cell, sum - to_right, to_right);
        }
    }

    const int64_t classes_;
    const Columns<Acc>& columns_;
    const Axis student_rows_, teacher_rows_, teacher_columns_;
    Row<Acc> student_, teacher_;
    const Scratch<Acc> laid_out_, plain_laid_out_;  // (classes, phases, padded)
    bool have_plain_ = false;
    const Acc inv_tau_, tau_;
    const int64_t kept_;
    const Scratch<Acc> e_s_, e_t_;  // (classes, kept, W)
    const bool gradient_;
    Vec<Acc> right_[kMaxPhases], ratio_[kMaxPhases], scale_[kMaxPhases];
};

template <class Acc, bool kBlend, bool kAhead>
class SigmoidTerm {
    static constexpr int W = kLanes<Acc>;

public:
    SigmoidTerm(const ResizedKd& a, const Columns<Acc>& columns)
        : classes_(a.student.c),
          columns_(columns),
          student_rows_(a.student.h, a.to.height, a.to.align_corners),
          teacher_rows_(a.teacher.h, a.to.height, a.to.align_corners),
          teacher_columns_(a.teacher.w, a.to.width, a.to.align_corners),
          student_(a.student, columns.padded),
          teacher_(a.teacher, ceil_div(a.teacher.w, W) * W),
          laid_out_(kAhead ? classes_ * columns.phases * columns.padded : 0),
          inv_tau_(static_cast<Acc>(1 / a.temperature)),
          tau_(static_cast<Acc>(a.temperature)),
          kept_(phases_kept<Acc>(columns.phases, classes_)),
          difference_(a.to.gradient ? classes_ * kept_ * W : 0),
          gradient_(a.to.gradient != nullptr) {
        for (int64_t i = 0; kAhead && i < classes_ * columns.phases * columns.padded; ++i) laid_out_[i] = 0;
    }

    double row(int64_t n, int64_t label_y, const PixelRow<Acc>& pixels, const GradientShare<Acc>& share, Acc* losses) {
        student_.load_plain(n, student_rows_.tap(label_y), inv_tau_);
        teacher_.load_plain(n, teacher_rows_.tap(label_y), inv_tau_);
        if constexpr (kAhead)
            lay_out(columns_, teacher_columns_, classes_, teacher_.plain(), teacher_.stride, static_cast<Acc*>(laid_out_));
        double total = 0;
        for (int64_t cell = 0; cell < columns_.padded; cell += W)
            for (int64_t k = 0; k < columns_.phases; k += kept_) {
                const int64_t phases = min(kept_, columns_.phases - k);
                Vec<Acc> sum{};  // short fp32 sums: a longer sum of equal terms drifts
                for (int64_t j = 0; j < phases; j += 2)
                    sum += phases - j == 1 ? losses_of<1>(pixels, cell, k, j, losses) : losses_of<2>(pixels, cell, k, j, losses);
                total += static_cast<double>(sum_lanes<Acc>(sum));
                if (gradient_) add_gradient(cell, phases, share);
            }
        return total;
    }

private:
    template <int G>
    Vec<Acc> losses_of(const PixelRow<Acc>& pixels, int64_t cell, int64_t k, int64_t j, Acc* losses) {
        const int64_t first = (k + j) * columns_.padded + cell;
        const Side<Acc, false> student{student_.plain() + cell, student_.stride, 0};
        const Side<Acc, kAhead> teacher =
            kAhead ? Side<Acc, kAhead>{laid_out_ + first, columns_.phases * columns_.padded, columns_.padded}
                   : Side<Acc, kAhead>{teacher_.plain() + cell, teacher_.stride, 0};
        for (int i = 0; i < G; ++i) right_[j + i] = load(columns_.right + first + i * columns_.padded);
        constexpr int64_t kRows = 64;  // classes per partial sum: two levels keep fp32 sums short
        Vec<Acc> kl[G] = {}, total{};
        for (int64_t row = 0; row < classes_; row += kRows) {
            Vec<Acc> part[G] = {};
            for (int64_t c = row; c < min(classes_, row + kRows); ++c)
                for (int i = 0; i < G; ++i) {
                    const Bernoulli<Acc> b(student.template value<kBlend, true>(right_[j + i], c, i),
                                           teacher.template value<kBlend, true>(right_[j + i], c, i));
                    part[i] += b.kl;
                    if (gradient_) store(difference_ + (c * kept_ + j + i) * W, b.difference);
                }
            for (int i = 0; i < G; ++i) kl[i] += part[i];
        }
        for (int i = 0; i < G; ++i) {
            const int64_t at = first + i * columns_.padded;
            const Vec<Acc> factor = load(pixels.factor + at);
            const auto counted = load(pixels.label + at) >= 0;
            const Vec<Acc> loss = kl[i] * (factor * tau_ * tau_);
            const Vec<Acc> value = counted ? loss : Vec<Acc>{};
            total += value;
            if (losses) store(losses + at, value);
            if (!gradient_) continue;
            scale_[j + i] = counted ? factor * tau_ : Vec<Acc>{};
            clear_uncounted<Acc>(counted, kl[i], difference_ + (j + i) * W, classes_, kept_ * W);
        }
        return total;
    }

    void add_gradient(int64_t cell, int64_t phases, const GradientShare<Acc>& share) {
        for (int64_t c = 0; c < classes_; ++c) {
            Vec<Acc> sum{}, to_right{};
            for (int64_t j = 0; j < phases; ++j) {
                const Vec<Acc> g = scale_[j] * load(difference_ + (c * kept_ + j) * W);
                sum += g;
                if constexpr (kBlend) to_right += right_[j] * g;
            }
            share.add(c, cell, sum - to_right, to_right);
        }
    }

    const int64_t classes_;
    const Columns<Acc>& columns_;
    const Axis student_rows_, teacher_rows_, teacher_columns_;
    Row<Acc> student_, teacher_;
    const Scratch<Acc> laid_out_;  // (classes, phases, padded)
    const Acc inv_tau_, tau_;
    const int64_t kept_;
    const Scratch<Acc> difference_;  // (classes, kept, W)
    const bool gradient_;
    Vec<Acc> right_[kMaxPhases], scale_[kMaxPhases];
};

template <class Acc, bool kBlend, bool kAhead>
void run(const ResizedKd& a) {
    const Columns<Acc> columns(Axis(a.student.w, a.to.width, a.to.align_corners));
    if (a.sigmoid)
        each_label_row<Acc>(a.student, a.to, columns, [&] { return SigmoidTerm<Acc, kBlend, kAhead>(a, columns); });
    else
        each_label_row<Acc>(a.student, a.to, columns, [&] { return Term<Acc, kBlend, kAhead>(a, columns); });
}

}  // namespace

void resized_kd(const ResizedKd& a) {
    with_acc(a.student.type, [&](auto t) {
        using Acc = typename decltype(t)::type;
        const bool blend = a.student.w != a.to.width;
        if (a.student.w == a.teacher.w)
            blend ? run<Acc, true, false>(a) : run<Acc, false, false>(a);
        else
            blend ? run<Acc, true, true>(a) : run<Acc, false, true>(a);
    });
}

}  // namespace fastkd::FASTKD_ISA

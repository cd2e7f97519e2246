// Losses at label resolution per label pixel, from its interpolated logits s (and t of a teacher) minus the stabilising
// maximum, in units of log 2.
//
//   cross-entropy: weight * -log softmax(s)[label],                         gradient weight * (p_s - onehot)
//   KD:            weight * tau^2 KL(softmax(t / tau) || softmax(s / tau)), gradient weight * tau * (p_s - p_t)
//   confidence:    the largest probability, or that of the label; forward only
//
// A loss defines its sums over the classes (`add`), its `term`, and the gradient of a class (`share`).
#pragma once

#include "cells_run.h"

namespace fastkd::gpu {

constexpr double kNear = 0x1p-96;  // smaller sums of exponentials lose precision: single terms underflow at 2^-126

// Defaults for the members that cells.h requires.
template <class T, int sides, int grids = 1>
struct SoftmaxLoss {
    using A = T;
    static constexpr int kSides = sides, kGrids = grids;
    static constexpr int kFirstShapes = kShapes;  // number of shapes it is compiled for
    static constexpr bool kGradient = true, kForward = true;
    static constexpr bool kOwn = false, kWeights = false, kKnown = false, kWritesSums = false, kSpreads = false;
    static constexpr bool kWide = false, kManySums = false, kWeighed = true;

    struct Class {};
    struct Linear {};
    FASTKD_DEVICE Class of_class(const LabelPixels&, int64_t, int) const { return {}; }
    FASTKD_DEVICE static void add_corners(Linear&, const Corners<A> (&)[sides], const Class&) {}
    FASTKD_DEVICE static A ignored() { return 0; }
    template <class Sums>
    FASTKD_DEVICE static bool near(const Sums& sums) {
        return sums.sum >= static_cast<A>(kNear);
    }
    template <class Sums>
    FASTKD_DEVICE static A gradient(const Sums&) {
        return 1;
    }
    template <class Sums>
    FASTKD_DEVICE static A ratio(const Sums&, int64_t, int) {
        return 0;
    }
    template <class Of>
    FASTKD_DEVICE static A share(const A (&power)[sides], A slope, A, const Of&) {
        return power[0] * slope;
    }
    template <class Of>
    FASTKD_DEVICE static A own(A share, const A (&)[sides], A, A weight, const Of&) {
        return share - weight;
    }
};

template <class T, bool kHasWeights>
struct CrossEntropyLoss : SoftmaxLoss<T, 1> {
    using A = T;
    using typename SoftmaxLoss<T, 1>::Class;
    static constexpr bool kForward = !kHasWeights, kOwn = true, kWeights = kHasWeights, kKnown = true;

    struct Sums {
        A sum = 0, own = 0;
    };
    FASTKD_DEVICE static void add(Sums& sums, const A (&value)[1], const A (&power)[1], bool own, const Class&) {
        sums.sum += power[0];
        if (own) sums.own = value[0];
    }
    FASTKD_DEVICE A term(const Sums& sums) const {
        if (sums.own < static_cast<A>(kMasked)) return static_cast<A>(INFINITY);
        const A loss = (log2_of(sums.sum) - sums.own) * static_cast<A>(kLn2);
        return loss < 0 ? A(0) : loss;
    }
};

// Cross-entropy with label smoothing, or with the focal factor (1 - p)^gamma; formulas in
// fastkd/ops/resized_cross_entropy.py. Smoothing needs sum_c w_c z_c. It is linear in the logits, so the sums at the
// corners are interpolated.
template <class T>
struct ShapedCrossEntropyLoss : SoftmaxLoss<T, 1> {
    using A = T;
    static constexpr int kFirstShapes = kFewShapes;
    static constexpr bool kOwn = true, kWeights = true, kSpreads = true;

    A smoothing, gamma;
    int classes;

    struct Sums {
        A sum = 0, own = 0;
    };
    struct Class {
        A spread;  // class weight
    };
    struct Linear {
        Corners<A> logits{};
        A weight = 0;
    };
    FASTKD_DEVICE static Class of_class(const LabelPixels& pixels, int64_t, int c) {
        return {pixels.class_weight ? static_cast<const A*>(pixels.class_weight)[c] : A(1)};
    }
    FASTKD_DEVICE static void add(Sums& sums, const A (&value)[1], const A (&power)[1], bool own, const Class&) {
        sums.sum += power[0];
        if (own) sums.own = value[0];
    }
    FASTKD_DEVICE static void add_corners(Linear& linear, const Corners<A> (&corners)[1], const Class& of) {
        Corners<A>& to = linear.logits;
        to.top_left = multiply_add(of.spread, corners[0].top_left, to.top_left);
        to.top_right = multiply_add(of.spread, corners[0].top_right, to.top_right);
        to.bottom_left = multiply_add(of.spread, corners[0].bottom_left, to.bottom_left);
        to.bottom_right = multiply_add(of.spread, corners[0].bottom_right, to.bottom_right);
        linear.weight += of.spread;
    }
    FASTKD_DEVICE A term(const Sums& sums) const {
        const A loss = surprise(sums);
        return gamma == 0 ? (1 - smoothing) * loss : power(-expm1_of(-loss)) * loss;
    }
    FASTKD_DEVICE A gradient(const Sums& sums) const {
        if (gamma == 0) return 1 - smoothing;
        const A loss = surprise(sums), rest = -expm1_of(-loss), p = 1 - rest;
        const A pull = rest == 0 ? A(1) : p == 0 ? A(0) : p * (loss / rest);
        return power(rest) * multiply_add(gamma, pull, A(1));
    }
    // Coefficient of each class, times its class weight, for a label pixel of weight 1.
    FASTKD_DEVICE A even() const { return smoothing / static_cast<A>(classes); }
    FASTKD_DEVICE static A whole(A even, const Linear& linear) { return even * linear.weight; }
    FASTKD_DEVICE static A rest(A even, const Sums& sums, const Linear& linear, A down, A right) {
        if (even == 0) return 0;
        const A logits = exact_value(linear.logits, down, right);
        if (logits < static_cast<A>(kMasked)) return even * static_cast<A>(INFINITY);
        return even * ((linear.weight * log2_of(sums.sum) - logits) * static_cast<A>(kLn2));
    }

private:
    FASTKD_DEVICE static A surprise(const Sums& sums) {
        if (sums.own < static_cast<A>(kMasked)) return static_cast<A>(INFINITY);
        const A loss = (log2_of(sums.sum) - sums.own) * static_cast<A>(kLn2);
        return loss < 0 ? A(0) : loss;
    }
    FASTKD_DEVICE A power(A x) const { return exp2_of(gamma * log2_of(x)); }
};

// kSame: student and teacher maps have the same size.
template <class T, bool kSame>
struct KdLoss : SoftmaxLoss<T, 2, kSame ? 1 : 2> {
    using A = T;
    using typename SoftmaxLoss<T, 2, kSame ? 1 : 2>::Class;
    static constexpr bool kManySums = true;

    A temperature;

    struct Sums {
        A sum = 0, teacher = 0, cross = 0;
    };
    FASTKD_DEVICE static void add(Sums& sums, const A (&value)[2], const A (&power)[2], bool, const Class&) {
        sums.sum += power[0];
        sums.teacher += power[1];
        sums.cross = multiply_add(power[1], value[1] - value[0], sums.cross);  // probability 0 contributes exactly 0
    }
    FASTKD_DEVICE static bool near(const Sums& sums) {
        return sums.sum >= static_cast<A>(kNear) && sums.teacher >= static_cast<A>(kNear);
    }
    FASTKD_DEVICE A term(const Sums& sums) const {
        const A kl = (fast_ratio(sums.cross, sums.teacher) + log2_of(ratio(sums, 0, 0))) * static_cast<A>(kLn2);
        return (kl < 0 ? A(0) : kl) * (temperature * temperature);
    }
    FASTKD_DEVICE A gradient(const Sums&) const { return temperature; }
    // Exactly 1 for equal sums, which an approximate division may miss.
    FASTKD_DEVICE static A ratio(const Sums& sums, int64_t, int) {
        return sums.sum == sums.teacher ? A(1) : fast_ratio(sums.sum, sums.teacher);
    }
    // Exactly 0 if student and teacher are equal: their sums are then identical.
    FASTKD_DEVICE static A share(const A (&power)[2], A slope, A ratio, const Class&) {
        return multiply_add(-power[1], ratio, power[0]) * slope;
    }
};

// Probability of the labelled class, or the largest one; 1 for ignored pixels.
template <class T, bool kLabel>
struct Confidence : SoftmaxLoss<T, 1> {
    using A = T;
    using typename SoftmaxLoss<T, 1>::Class;
    static constexpr bool kGradient = false, kOwn = kLabel, kWritesSums = true, kWeighed = false;

    struct Sums {
        A sum = 0, own = static_cast<A>(2 * kLow);
    };
    FASTKD_DEVICE static void add(Sums& sums, const A (&value)[1], const A (&power)[1], bool own, const Class&) {
        sums.sum += power[0];
        if (kLabel ? own : value[0] > sums.own) sums.own = value[0];
    }
    FASTKD_DEVICE A term(const Sums& sums) const { return fast_ratio(exp2_of(sums.own), sums.sum); }
    FASTKD_DEVICE static A ignored() { return 1; }
};

// A gradient with weights needs one more register per pixel, hence a separate kernel.
template <class Launch>
void resized_cross_entropy(const Resized& a, const Launch& launch) {
    const auto run = [&](auto zero) {
        using A = decltype(zero);
        if (a.gradient && (a.pixels.class_weight || a.pixels.weight)) return resized(a, CrossEntropyLoss<A, true>{}, launch);
        resized(a, CrossEntropyLoss<A, false>{}, launch);
    };
    a.maps[0].type == DType::f64 ? run(double{}) : run(float{});
}

template <class Launch>
void resized_shaped_cross_entropy(const Resized& a, double label_smoothing, double focal_gamma, const Launch& launch) {
    const auto run = [&](auto zero) {
        using A = decltype(zero);
        resized(a,
                ShapedCrossEntropyLoss<A>{{}, static_cast<A>(label_smoothing), static_cast<A>(focal_gamma), a.choice.plan.classes},
                launch);
    };
    a.maps[0].type == DType::f64 ? run(double{}) : run(float{});
}

template <class Launch>
void resized_kd(const Resized& a, const Launch& launch) {
    const auto run = [&](auto zero) {
        using A = decltype(zero);
        const A temperature = static_cast<A>(a.temperature);
        if (a.choice.plan.same_size()) return resized(a, KdLoss<A, true>{{}, temperature}, launch);
        resized(a, KdLoss<A, false>{{}, temperature}, launch);
    };
    a.maps[0].type == DType::f64 ? run(double{}) : run(float{});
}

// Fills a.terms, and a.sums unless null.
template <class Launch>
void confidence(const Resized& a, bool by_label, const Launch& launch) {
    const auto run = [&](auto zero) {
        using A = decltype(zero);
        by_label ? resized(a, Confidence<A, true>{}, launch) : resized(a, Confidence<A, false>{}, launch);
    };
    a.maps[0].type == DType::f64 ? run(double{}) : run(float{});
}

}  // namespace fastkd::gpu

// What the losses at label resolution make of a label pixel's logits s (and t of a teacher), interpolated and less what
// stabilises the exponentials, in units of log 2.
//
//     cross-entropy: weight * -log softmax(s)[label],                         gradient weight * (p_s - onehot)
//     KD:            weight * tau^2 KL(softmax(t / tau) || softmax(s / tau)), gradient weight * tau * (p_s - p_t)
//     confidence:    the largest probability, or that of the label; forward only
//
// A loss has the sums that it needs over the classes (`add`), its `term`, and, of the gradient of class c, `gradient` and
// `ratio`: gradient() * weight / sum * (2^s - ratio * 2^t) less, with kOwn, gradient() * weight where c is the label.
#pragma once

#include "cells_run.h"

namespace fastkd::gpu {

constexpr double kNear = 0x1p-96;  // sums of exponentials below this lose digits: single ones end at 2^-126

template <class T, bool kHasWeights>
struct CrossEntropyLoss {
    using A = T;
    static constexpr int kSides = 1, kGrids = 1;
    static constexpr bool kGradient = true, kForward = !kHasWeights;
    static constexpr bool kOwn = true, kWeights = kHasWeights, kKnown = true, kWritesSums = false;

    struct Sums {
        A sum = 0, own = 0;
    };
    FASTKD_DEVICE static void add(Sums& sums, const A (&value)[1], const A (&power)[1], bool own) {
        sums.sum += power[0];
        if (own) sums.own = value[0];
    }
    FASTKD_DEVICE static bool near(const Sums& sums) { return sums.sum >= static_cast<A>(kNear); }
    FASTKD_DEVICE A term(const Sums& sums) const {
        if (sums.own < static_cast<A>(kMasked)) return static_cast<A>(INFINITY);
        const A loss = (log2_of(sums.sum) - sums.own) * static_cast<A>(kLn2);
        return loss < 0 ? A(0) : loss;
    }
    FASTKD_DEVICE static A ignored() { return 0; }
    FASTKD_DEVICE A gradient() const { return 1; }
    FASTKD_DEVICE static A ratio(const Sums&) { return 0; }
};

// kSame: the teacher's map has the student's size.
template <class T, bool kSame>
struct KdLoss {
    using A = T;
    static constexpr int kSides = 2, kGrids = kSame ? 1 : 2;
    static constexpr bool kGradient = true, kForward = true;
    static constexpr bool kOwn = false, kWeights = false, kKnown = false, kWritesSums = false;

    A temperature;

    struct Sums {
        A sum = 0, teacher = 0, cross = 0;
    };
    FASTKD_DEVICE static void add(Sums& sums, const A (&value)[2], const A (&power)[2], bool) {
        sums.sum += power[0];
        sums.teacher += power[1];
        sums.cross = multiply_add(power[1], value[1] - value[0], sums.cross);  // probability 0 adds 0
    }
    FASTKD_DEVICE static bool near(const Sums& sums) {
        return sums.sum >= static_cast<A>(kNear) && sums.teacher >= static_cast<A>(kNear);
    }
    FASTKD_DEVICE A term(const Sums& sums) const {
        const A kl = (sums.cross / sums.teacher + log2_of(sums.sum / sums.teacher)) * static_cast<A>(kLn2);
        return (kl < 0 ? A(0) : kl) * (temperature * temperature);
    }
    FASTKD_DEVICE static A ignored() { return 0; }
    FASTKD_DEVICE A gradient() const { return temperature; }
    // Exactly 0 where student and teacher agree: the sums are the same then.
    FASTKD_DEVICE static A ratio(const Sums& sums) { return sums.sum / sums.teacher; }
};

// Of the labelled class, or of the largest one. 1 where a pixel is ignored.
template <class T, bool kLabel>
struct Confidence {
    using A = T;
    static constexpr int kSides = 1, kGrids = 1;
    static constexpr bool kGradient = false, kForward = true;
    static constexpr bool kOwn = kLabel, kWeights = false, kKnown = false, kWritesSums = true;

    struct Sums {
        A sum = 0, own = static_cast<A>(2 * kLow);
    };
    FASTKD_DEVICE static void add(Sums& sums, const A (&value)[1], const A (&power)[1], bool own) {
        sums.sum += power[0];
        if (kLabel ? own : value[0] > sums.own) sums.own = value[0];
    }
    FASTKD_DEVICE static bool near(const Sums& sums) { return sums.sum >= static_cast<A>(kNear); }
    FASTKD_DEVICE A term(const Sums& sums) const { return exp2_of(sums.own) / sums.sum; }
    FASTKD_DEVICE static A ignored() { return 1; }
    FASTKD_DEVICE A gradient() const { return 0; }
    FASTKD_DEVICE static A ratio(const Sums&) { return 0; }
};

// The gradient with weights needs a register more a pixel: a kernel of its own.
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
void resized_kd(const Resized& a, const Launch& launch) {
    const auto run = [&](auto zero) {
        using A = decltype(zero);
        const A temperature = static_cast<A>(a.temperature);
        if (a.choice.plan.same_size()) return resized(a, KdLoss<A, true>{temperature}, launch);
        resized(a, KdLoss<A, false>{temperature}, launch);
    };
    a.maps[0].type == DType::f64 ? run(double{}) : run(float{});
}

// Fills a.terms, and a.sums where it is there.
template <class Launch>
void confidence(const Resized& a, bool by_label, const Launch& launch) {
    const auto run = [&](auto zero) {
        using A = decltype(zero);
        by_label ? resized(a, Confidence<A, true>{}, launch) : resized(a, Confidence<A, false>{}, launch);
    };
    a.maps[0].type == DType::f64 ? run(double{}) : run(float{});
}

}  // namespace fastkd::gpu

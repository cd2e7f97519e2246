// One class against the rest: KL divergence of two Bernoulli distributions from their logits.
#pragma once

#include "vec.h"

namespace fastkd::FASTKD_ISA {

// KL(sigmoid(t) || sigmoid(s)) and sigmoid(s) - sigmoid(t), both exactly 0 where s == t.
//
// Signs are flipped if t > 0, so that the teacher's probability p is at most 1/2 and there is no cancellation. With u =
// -s, v = -t for t > 0: KL = p (v - u) + softplus(u) - softplus(v); p = 0 drops the product.
template <class Acc>
struct Bernoulli {
    Vec<Acc> kl, difference;

    Bernoulli(Vec<Acc> s, Vec<Acc> t) {
        const Vec<Acc> one = set1(Acc(1));
        const auto flip = t > 0;
        const Vec<Acc> u = flip ? -s : s, v = flip ? -t : t;
        const Vec<Acc> eu = exp(u > 0 ? -u : u), ev = exp(v);
        const Vec<Acc> p = ev / (one + ev), q = (u > 0 ? one : eu) / (one + eu);
        // For u > 0, softplus(u) contains u, which is combined with the product to (1 - p) u: it is infinite where u
        // is.
        const Vec<Acc> pv = p == 0 ? Vec<Acc>{} : p * v, product = p == 0 ? Vec<Acc>{} : p * (v - u);
        kl = (u > 0 ? pv + (one - p) * u : product) + (log1p(eu) - log1p(ev));
        kl = kl < 0 ? Vec<Acc>{} : kl;
        difference = flip ? p - q : q - p;
    }
};

}  // namespace fastkd::FASTKD_ISA

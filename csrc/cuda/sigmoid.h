// Sigmoids of one class against the rest, from logits in units of log 2; stable for any magnitude.
#pragma once

#include "interpolation.h"

namespace fastkd::gpu {

FASTKD_DEVICE float reciprocal_of(float x) {
#if defined(__CUDA_ARCH__)
    float out;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
#else
    return 1 / x;
#endif
}
FASTKD_DEVICE double reciprocal_of(double x) { return 1 / x; }

// log(1 + x) for x in [0, 1]: x times a polynomial, 1.1 ulp. log2 of a rounded 1 + x would lose small x.
FASTKD_DEVICE float log1p_of(float x) {
    constexpr float by[] = {1.0f,           -0.499998927f,  0.333297104f, -0.249516159f, 0.196632743f,
                            -0.152696669f,  0.105436236f,   -0.056373611f, 0.0195425265f, -0.003176057f};
    float out = by[9];
    FASTKD_UNROLL
    for (int i = 8; i >= 0; --i) out = multiply_add(out, x, by[i]);
    return out * x;
}
FASTKD_DEVICE double log1p_of(double x) { return log1p(x); }

template <class A>
FASTKD_DEVICE A minus_absolute(A x) {
    return x < 0 ? x : -x;
}

template <class A>
struct Softplus {
    A value, slope;  // log(1 + exp(x)), and its derivative, sigmoid(x)

    FASTKD_DEVICE explicit Softplus(A x) {
        const A e = exp2_of(minus_absolute(x)), less = reciprocal_of(1 + e);
        value = multiply_add(x > 0 ? x : A(0), static_cast<A>(kLn2), log1p_of(e));
        if (x > static_cast<A>(-kMasked)) value = static_cast<A>(INFINITY);
        slope = x > 0 ? less : e * less;
    }
};

// KL(sigmoid(t) || sigmoid(s)) and sigmoid(s) - sigmoid(t), both exactly 0 where s == t. Computed for the outcome that
// is less probable under t.
template <class A>
struct Bernoulli {
    A kl, difference;

    FASTKD_DEVICE Bernoulli(A s, A t) {
        const bool flip = t > 0;
        s = flip ? -s : s;
        t = flip ? -t : t;
        const A es = exp2_of(minus_absolute(s)), et = exp2_of(t), under = reciprocal_of((1 + es) * (1 + et));
        const A p_t = et * (1 + es) * under, p_s = (s > 0 ? A(1) : es) * (1 + et) * under;
        const A cross = p_t == 0 ? A(0) : p_t * (t - s);
        kl = multiply_add(cross + (s > 0 ? s : A(0)), static_cast<A>(kLn2), log1p_of(es) - log1p_of(et));
        if (minus_absolute(s) < static_cast<A>(kMasked) && (s > 0 || p_t != 0)) kl = et + static_cast<A>(INFINITY);
        difference = flip ? p_t - p_s : p_s - p_t;
    }
};

}  // namespace fastkd::gpu

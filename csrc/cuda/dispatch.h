// Dispatch over dtypes, shared by all operators.
#pragma once

#include "plan.h"

namespace fastkd::gpu {

// Calls f(Kind<T, V>) for the dtypes of a pair that is read `vector` elements at a time.
template <class T, int V>
struct Kind {
    using type = T;
    static constexpr int vector = V;
};
template <class F>
void with_kind(const Pair& in, int vector, const F& f) {
    if (in.student_type == DType::f64) return f(Kind<double, 1>{});
    if (vector == 1) return f(Kind<Any, 1>{});
    if (in.student_type == DType::f32) return f(Kind<float, 4>{});
    if (in.student_type == DType::f16) return f(Kind<f16, 8>{});
    f(Kind<bf16, 8>{});
}

// Calls f(Kind<T, 1>) for the dtype of a map that is read one element at a time.
template <class F>
void with_dtype(DType type, const F& f) {
    if (type == DType::f64) return f(Kind<double, 1>{});
    if (type == DType::f32) return f(Kind<float, 1>{});
    if (type == DType::f16) return f(Kind<f16, 1>{});
    f(Kind<bf16, 1>{});
}

}  // namespace fastkd::gpu

// What every operator does with dtypes and with guesses of grad_output.
#pragma once

#include "plan.h"

namespace fastkd::gpu {

// f(Kind<T, V>) for the dtype of a pair, read `vector` elements at a time.
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

// The next guess of grad_output: a value that came twice in a row. NaN, which equals nothing, is none.
template <class Block, class A>
FASTKD_DEVICE void remember(Block& block, const A* grad, A* memory) {
    if (!memory || block.index() != 0 || block.thread() != 0) return;
    memory[1] = grad[0] == memory[0] ? grad[0] : static_cast<A>(__builtin_nanf(""));
    memory[0] = grad[0];
}

}  // namespace fastkd::gpu

// gradient *= factor in the accumulation type. If the factor is exactly 1, only the factor is read.
#pragma once

#include "dispatch.h"
#include "kernels.h"

namespace fastkd::gpu {

template <class T, int V>
struct RescaleElements {
    using A = Accumulator<T>;
    static constexpr int kBlocksPerCores = 4;

    Source<T, V> from;
    Sink<T, V> to;
    int64_t n, blocks;
    const A* factor;

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        const A by = *factor;
        if (by == 1) return;
        const int64_t vectors = n / V, first = block.index() * kThreads + block.thread();
        for (int64_t i = first; i < vectors; i += blocks * kThreads) {
            A x[V];
            from.read(i * V, x);
            FASTKD_UNROLL
            for (int j = 0; j < V; ++j) x[j] *= by;
            to.write(i * V, x);
        }
        for (int64_t i = vectors * V + first; i < n; i += kThreads) to.one(i, from.one(i) * by);
    }
};

template <class Launch>
void rescale(const Rescale& a, const Launch& launch) {
    const auto run = [&](auto kind) {
        using T = typename decltype(kind)::type;
        constexpr int V = decltype(kind)::vector;
        const int64_t blocks = most(int64_t{1}, least(kBlocks, a.n / (V * kThreads)));
        launch(RescaleElements<T, V>{Source<T, V>(a.gradient, a.type), Sink<T, V>(a.gradient, a.type), a.n, blocks,
                                     static_cast<const Accumulator<T>*>(a.factor)},
               blocks, 0);
    };
    if (a.type == DType::f64) return run(Kind<double, 1>{});
    if (reinterpret_cast<uintptr_t>(a.gradient) % 16) return run(Kind<Any, 1>{});
    if (a.type == DType::f32) return run(Kind<float, 4>{});
    if (a.type == DType::f16) return run(Kind<f16, 8>{});
    run(Kind<bf16, 8>{});
}

}  // namespace fastkd::gpu

// Multiplies a precomputed gradient by the factor that the backward supplies. A factor of exactly 1 reads and writes
// nothing.
#include "tile.h"

namespace fastkd::FASTKD_ISA {

void rescale(const Rescale& a) {
    with_acc(a.type, [&](auto t) {
        using Acc = typename decltype(t)::type;
        constexpr int W = kLanes<Acc>;
        constexpr int64_t kSpan = 2048;
        const Acc factor = *static_cast<const Acc*>(a.factor);
        if (factor == 1) return;
        parallel_items(a.parallel_for, ceil_div(a.n, kSpan), kSpan, [&](const Items& mine) {
            alignas(64) Acc scratch[kSpan];
            for (const int64_t item : mine) {
                const int64_t first = item * kSpan, n = min(kSpan, a.n - first);
                const Acc* in = view<Acc>(a.gradient, a.type, first, n, scratch);
                Acc* out = target_span<Acc>(a.gradient, a.type, first, scratch);
                int64_t i = 0;
                for (; i + W <= n; i += W) store(out + i, load(in + i) * factor);
                for (; i < n; ++i) out[i] = in[i] * factor;
                commit(a.gradient, a.type, first, n, out);
            }
        });
    });
}

}  // namespace fastkd::FASTKD_ISA

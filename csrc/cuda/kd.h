// KD: per pixel tau^2 KL(softmax(T/tau) || softmax(S/tau)) over the classes; gradient tau (p_s - p_t) (docs/kd.md).
// kSigmoid: the sum over classes of the KL of Bernoulli distributions.
//
// A block keeps all classes of a tile of pixels of S and T in shared memory, so loss and gradient need one read. 256 /
// pixels threads share the classes of a pixel. A second kernel sums the tiles in a fixed order. The number of counted
// pixels, the divisor of the mean, is computed before, from the labels alone.
#pragma once

#include "dispatch.h"
#include "kernels.h"
#include "pixels.h"
#include "sigmoid.h"

namespace fastkd::gpu {

struct KdCount {
    static constexpr int kBlocksPerCores = 4;

    Pixels pixels;
    int64_t classes, total;
    double* parts;  // (blocks,)
    int blocks;

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        double n = 0;
        for (int64_t i = block.index() * kThreads + block.thread(); i < total; i += static_cast<int64_t>(blocks) * kThreads)
            n += class_of(pixels, classes, i) >= 0;
        n = sum_block(block, n, block.template shared<double>(0));
        if (block.thread() == 0) parts[block.index()] = n;
    }
};

// Shared-memory element type of a map.
template <class T>
struct HeldAs {
    using type = T;
};
template <>
struct HeldAs<Any> {
    using type = float;
};

template <class T, int V, bool kSigmoid>
struct KdTiles {
    using A = Accumulator<T>;
    using Held = typename HeldAs<T>::type;
    static constexpr int kBlocksPerCores = 3;

    Source<T, V> student, teacher;
    Sink<T, V> gradient;
    KdPlan plan;
    Pixels pixels;
    A temperature, scale;
    A* losses;              // (n, hw), or null
    double* parts;          // (blocks,), or null
    const double* counted;  // `counters` numbers; the gradient is divided by their sum. counters == 0: no division
    int counters;

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        const int64_t classes = plan.classes;
        const int64_t outer = block.index() / plan.tiles, first = block.index() % plan.tiles * plan.pixels;
        const int count = static_cast<int>(least(plan.pixels, plan.inner - first));
        const int pixel = block.thread() % plan.pixels, sub = block.thread() / plan.pixels, subs = kThreads / plan.pixels;
        Held *s = block.template shared<Held>(plan.student), *t = block.template shared<Held>(plan.teacher);
        A* shares = block.template shared<A>(plan.shares);
        each_vector(block, outer, first, count, [&](int64_t from, int at) { fetch(block, student, from, s + at); },
                    [&](int64_t from, int at) { s[at] = static_cast<Held>(student.one(from)); });
        each_vector(block, outer, first, count, [&](int64_t from, int at) { fetch(block, teacher, from, t + at); },
                    [&](int64_t from, int at) { t[at] = static_cast<Held>(teacher.one(from)); });
        block.end_of_group();
        block.template wait_for_groups<0>();
        block.sync();

        const bool exists = pixel < count;
        const auto value = [&](const Held* x, int64_t c) { return static_cast<A>(x[plan.at(c, pixel)]); };
        const A inv_tau = 1 / temperature;
        const auto of_class = [&](int64_t c) {
            const A unit = static_cast<A>(kLog2E) * inv_tau;
            return Bernoulli<A>(value(s, c) * unit, value(t, c) * unit);
        };
        A max_s = static_cast<A>(-INFINITY), max_t = max_s, sum_s = 0, sum_t = 0, dot = 0;
        if constexpr (kSigmoid) {
            for (int64_t c = sub; exists && c < classes; c += subs) dot += of_class(c).kl;
            if (subs > 1) {
                shares[block.thread()] = dot;
                block.sync();
                dot = 0;
                for (int i = pixel; i < kThreads; i += plan.pixels) dot += shares[i];
                block.sync();
            }
        } else {
            for (int64_t c = sub; exists && c < classes; c += subs) {
                max_s = largest(max_s, value(s, c));
                max_t = largest(max_t, value(t, c));
            }
            if (subs > 1) {  // reduce over the threads of a pixel
                shares[block.thread()] = max_s;
                shares[kThreads + block.thread()] = max_t;
                block.sync();
                for (int i = pixel; i < kThreads; i += plan.pixels) {
                    max_s = largest(max_s, shares[i]);
                    max_t = largest(max_t, shares[kThreads + i]);
                }
                block.sync();
            }
            for (int64_t c = sub; exists && c < classes; c += subs) {
                const A ds = (value(s, c) - max_s) * inv_tau, dt = (value(t, c) - max_t) * inv_tau, et = exponential(dt);
                sum_s += exponential(ds);
                sum_t += et;
                dot += et == 0 ? A(0) : et * (dt - ds);  // probability 0 contributes exactly 0, also at -inf
            }
            if (subs > 1) {
                shares[block.thread()] = sum_s;
                shares[kThreads + block.thread()] = sum_t;
                shares[2 * kThreads + block.thread()] = dot;
                block.sync();
                sum_s = sum_t = dot = 0;
                for (int i = pixel; i < kThreads; i += plan.pixels) {
                    sum_s += shares[i];
                    sum_t += shares[kThreads + i];
                    dot += shares[2 * kThreads + i];
                }
                block.sync();
            }
        }

        const int64_t place = outer * plan.inner + first + pixel;
        const bool valid = exists && class_of(pixels, classes, place) >= 0;
        const A weight = valid && pixels.weight ? static_cast<const A*>(pixels.weight)[place] : A(1);
        if (losses || parts) {
            const A kl = kSigmoid ? dot : dot / sum_t + logarithm(sum_s / sum_t);
            const A loss = valid ? (kl < 0 ? A(0) : kl) * (temperature * temperature * weight) : A(0);
            if (losses && exists && sub == 0) losses[place] = loss * scale;
            if (parts) {
                const double sum = sum_block(block, sub == 0 ? static_cast<double>(loss) : 0.0,
                                             block.template shared<double>(plan.shares));
                if (block.thread() == 0) parts[block.index()] = sum;
            }
        }
        if (!gradient.data) return;

        A factor = scale;
        if (counters > 0) {
            double n = block.thread() < counters ? counted[block.thread()] : 0;
            n = sum_block(block, n, block.template shared<double>(plan.shares));
            factor = scale / static_cast<A>(n == 0 ? 1 : n);
        }
        if (exists) {
            factor = !valid ? A(0) : kSigmoid ? factor * weight * temperature : factor * weight * temperature / sum_s;
            const A ratio = sum_s / sum_t;
            for (int64_t c = sub; c < classes; c += subs) {
                if constexpr (kSigmoid) {
                    s[plan.at(c, pixel)] = static_cast<Held>(valid ? factor * of_class(c).difference : A(0));
                    continue;
                }
                const A es = exponential((value(s, c) - max_s) * inv_tau), et = exponential((value(t, c) - max_t) * inv_tau);
                // p_s - p_t as (es - et * ratio) / sum_s: exactly 0 if student and teacher are equal.
                s[plan.at(c, pixel)] = static_cast<Held>(valid ? factor * multiply_add(-et, ratio, es) : A(0));
            }
        }
        block.sync();
        each_vector(block, outer, first, count,
                    [&](int64_t to, int at) {
                        A part[V];
                        if constexpr (V > 1) load<T, V>(s + at, part);
                        gradient.write(to, part);
                    },
                    [&](int64_t to, int at) { gradient.one(to, static_cast<A>(s[at])); });
    }

private:
    template <class Block>
    FASTKD_DEVICE static void fetch(Block& block, const Source<T, V>& map, int64_t from, Held* to) {
        if constexpr (V > 1) block.copy_16(to, map.data + from);
    }

    // vector(offset in the map, offset in shared memory) for each 16 bytes of a tile, one(...) for each remaining
    // element.
    template <class Block, class Vector, class One>
    FASTKD_DEVICE void each_vector(Block& block, int64_t outer, int64_t first, int count, const Vector& vector,
                                   const One& one) const {
        if (plan.channels_last) {
            const int elements = static_cast<int>(count * plan.classes), vectors = V > 1 ? elements / V : 0;
            const int64_t from = first * plan.classes;
            for (int i = block.thread(); i < vectors; i += kThreads) vector(from + static_cast<int64_t>(i) * V, i * V);
            for (int i = vectors * V + block.thread(); i < elements; i += kThreads) one(from + i, i);
        } else {
            const int step = V > 1 ? V : 1, across = plan.pixels / step;
            const int column = block.thread() % across * step;
            for (int64_t c = block.thread() / across; column < count && c < plan.classes; c += kThreads / across) {
                const int64_t from = (outer * plan.classes + c) * plan.inner + first + column;
                if constexpr (V > 1)
                    vector(from, plan.at(c, column));
                else
                    one(from, plan.at(c, column));
            }
        }
    }
};

template <bool kSigmoid, class Launch>
void kd(const Kd& a, const Launch& launch) {
    const Pair& in = a.in;
    const bool labels = a.pixels.label != Label::none, mean = a.reduce == Reduce::mean;
    const int64_t all = in.n * in.hw;
    const int blocks = count_blocks(all);
    if (labels) launch(KdCount{a.pixels, in.c, all, a.count_parts, blocks}, blocks, kSumScratch);
    with_kind(in, a.plan.vector, [&](auto kind) {
        using T = typename decltype(kind)::type;
        using A = Accumulator<T>;
        constexpr int V = decltype(kind)::vector;
        const double scale = mean && !labels ? a.scale / static_cast<double>(all) : a.scale;
        A* terms = a.reduce == Reduce::none ? static_cast<A*>(a.loss) : nullptr;
        launch(KdTiles<T, V, kSigmoid>{Source<T, V>(in.student, in.student_type), Source<T, V>(in.teacher, in.teacher_type),
                             Sink<T, V>(a.gradient, in.student_type), a.plan, a.pixels, static_cast<A>(a.temperature),
                             static_cast<A>(scale), terms, a.parts, a.count_parts, mean && labels ? blocks : 0},
               a.plan.blocks(), a.plan.total);
        launch_total(Total<A>{nullptr, a.plan.blocks(), labels ? a.count_parts : nullptr, blocks, all, mean, a.scale,
                              static_cast<A*>(a.loss), static_cast<A*>(a.count)},
                     a.parts, launch);
    });
}

}  // namespace fastkd::gpu

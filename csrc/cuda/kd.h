// KD: per pixel tau^2 KL(softmax(T/tau) || softmax(S/tau)) over the classes; gradient tau (p_s - p_t) (docs/kd.md).
//
// A block keeps all classes of a tile of pixels of S and T in shared memory: loss, gradient or both come from one read. The
// classes of a pixel are shared by 256 / pixels threads. Sums over tiles are taken by a second kernel in a fixed order; the
// number of pixels that count, which the mean divides by, is known before from the labels alone.
#pragma once

#include "dispatch.h"
#include "kernels.h"
#include "pixels.h"

namespace fastkd::gpu {

struct KdCount {
    static constexpr bool kOneRead = false;
    static constexpr int kBlocksPerCores = 4;

    Pixels pixels;
    int64_t classes, total;
    int64_t* parts;  // (blocks,)
    int blocks;

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        int64_t n = 0;
        for (int64_t i = block.index() * kThreads + block.thread(); i < total; i += blocks * kThreads)
            n += class_of(pixels, classes, i) >= 0;
        n = sum_block(block, n, block.template shared<int64_t>(0));
        if (block.thread() == 0) parts[block.index()] = n;
    }
};

// What shared memory holds of a map.
template <class T>
struct HeldAs {
    using type = T;
};
template <>
struct HeldAs<Any> {
    using type = float;
};

template <class T, int V>
struct KdTiles {
    using A = Accumulator<T>;
    using Held = typename HeldAs<T>::type;
    static constexpr bool kOneRead = false;
    static constexpr int kBlocksPerCores = 3;

    Source<T, V> student, teacher;
    Sink<T, V> gradient;
    KdPlan plan;
    Pixels pixels;
    A temperature, scale;
    A* losses;               // (n, hw), or null
    double* parts;           // (blocks,), or null
    const A* grad;           // (n, hw) or one number, or null
    bool per_pixel, early;
    const int64_t* counted;  // `counters` numbers that add up to the count; counters is 0 where it is not divided by
    int counters;
    const A* guess;
    A* memory;

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        remember(block, grad, memory);
        if (guess && *grad == *guess) return;
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
        A max_s = static_cast<A>(-INFINITY), max_t = max_s;
        for (int64_t c = sub; exists && c < classes; c += subs) {
            max_s = largest(max_s, value(s, c));
            max_t = largest(max_t, value(t, c));
        }
        if (subs > 1) {  // the threads of a pixel tell each other
            shares[block.thread()] = max_s;
            shares[kThreads + block.thread()] = max_t;
            block.sync();
            for (int i = pixel; i < kThreads; i += plan.pixels) {
                max_s = largest(max_s, shares[i]);
                max_t = largest(max_t, shares[kThreads + i]);
            }
            block.sync();
        }
        const A inv_tau = 1 / temperature;
        A sum_s = 0, sum_t = 0, dot = 0;
        for (int64_t c = sub; exists && c < classes; c += subs) {
            const A ds = (value(s, c) - max_s) * inv_tau, dt = (value(t, c) - max_t) * inv_tau, et = exponential(dt);
            sum_s += exponential(ds);
            sum_t += et;
            dot += et == 0 ? A(0) : et * (dt - ds);  // probability 0 adds 0, even at -inf
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

        const int64_t place = outer * plan.inner + first + pixel;
        const bool valid = exists && class_of(pixels, classes, place) >= 0;
        const A weight = valid && pixels.weight ? static_cast<const A*>(pixels.weight)[place] : A(1);
        if (losses || parts) {
            const A kl = dot / sum_t + logarithm(sum_s / sum_t);
            const A loss = valid ? (kl < 0 ? A(0) : kl) * (temperature * temperature * weight) : A(0);
            if (losses && exists && sub == 0) losses[place] = loss;
            if (parts) {
                const double sum = sum_block(block, sub == 0 ? static_cast<double>(loss) : 0.0,
                                             block.template shared<double>(plan.shares));
                if (block.thread() == 0) parts[block.index()] = sum;
            }
        }
        if (!grad || (early && *grad != *grad)) return;

        A factor = scale;
        if (counters > 0) {
            int64_t n = block.thread() < counters ? counted[block.thread()] : 0;
            n = sum_block(block, n, block.template shared<int64_t>(plan.shares));
            factor = 1 / static_cast<A>(most(n, 1));
        }
        if (exists) {
            factor = valid ? grad[per_pixel ? place : 0] * factor * weight * temperature / sum_s : A(0);
            const A ratio = sum_s / sum_t;
            for (int64_t c = sub; c < classes; c += subs) {
                const A es = exponential((value(s, c) - max_s) * inv_tau), et = exponential((value(t, c) - max_t) * inv_tau);
                // p_s - p_t as (es - et * ratio) / sum_s: exactly 0 where student and teacher agree.
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

    // vector(place in the map, place in shared memory) for each 16 bytes of a tile, one(...) for each element that is left.
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

// One block adds up what the tiles and the counters have.
template <class A>
struct KdTotal {
    static constexpr bool kOneRead = false;
    static constexpr int kBlocksPerCores = 1;

    const double* parts;  // (count,), or null
    int64_t count;
    const int64_t* counted;  // (counters,), or null: all pixels count
    int counters;
    int64_t all;
    A* loss;
    int64_t* total;

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        double sum = 0;
        for (int64_t i = block.thread(); parts && i < count; i += kThreads) sum += parts[i];
        sum = sum_block(block, sum, block.template shared<double>(0));
        int64_t n = counted && block.thread() < counters ? counted[block.thread()] : 0;
        n = sum_block(block, n, block.template shared<int64_t>(0));
        if (block.thread() != 0) return;
        if (parts) *loss = static_cast<A>(sum);
        *total = counted ? n : all;
    }
};

template <class Launch>
void kd(const Kd& a, const Launch& launch) {
    const Pair& in = a.in;
    const bool labels = a.pixels.label != Label::none, forward = a.losses || a.loss;
    constexpr int64_t scratch = kWarps * 8;
    const int blocks = count_blocks(in.n * in.hw);
    if (forward && labels) launch(KdCount{a.pixels, in.c, in.n * in.hw, a.count_parts, blocks}, blocks, scratch);
    with_kind(in, a.plan.vector, [&](auto kind) {
        using T = typename decltype(kind)::type;
        using A = Accumulator<T>;
        constexpr int V = decltype(kind)::vector;
        const int64_t* counted = forward ? a.count_parts : a.count;
        const int counters = !a.by_count ? 0 : forward ? blocks : 1;
        launch(KdTiles<T, V>{Source<T, V>(in.student, in.student_type), Source<T, V>(in.teacher, in.teacher_type),
                             Sink<T, V>(a.gradient, in.student_type), a.plan, a.pixels, static_cast<A>(a.temperature),
                             static_cast<A>(a.scale), static_cast<A*>(a.losses), a.loss ? a.parts : nullptr,
                             static_cast<const A*>(a.grad), a.per_pixel, a.early, counted, counters,
                             static_cast<const A*>(a.guess), static_cast<A*>(a.memory)},
               a.plan.blocks(), a.plan.total);
        if (forward)
            launch(KdTotal<A>{a.loss ? a.parts : nullptr, a.plan.blocks(), labels ? a.count_parts : nullptr, blocks,
                              in.n * in.hw, static_cast<A*>(a.loss), a.count},
                   1, scratch);
    });
}

}  // namespace fastkd::gpu

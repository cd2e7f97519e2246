// The steps before the loops over cells: the count for a mean, and a copy of each map in a common format.
//
// The copy is (row, class, column), in the accumulation type, times log2(e) / temperature, with borders repeated, for
// any dtype and layout of the map. For a softmax the maximum over the classes is subtracted.
#pragma once

#include "interpolation.h"

namespace fastkd::gpu {

// Counts the label pixels, or sums their class weights.
template <class A>
struct CellsCount {
    static constexpr int kBlocksPerCores = 4;
    static constexpr int kAtOnce = 8;  // labels whose loads are in flight together

    LabelPixels pixels;
    const A* known;
    int64_t classes, total;
    double* parts;  // (blocks,)
    int blocks;

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        double n = 0;
        with_targets(pixels, [&](const auto* target) { n = sum(block, target); });
        n = sum_block(block, n, block.template shared<double>(0));
        if (block.thread() == 0) parts[block.index()] = n;
    }

private:
    template <class Block, class Target>
    FASTKD_DEVICE double sum(Block& block, const Target* target) const {
        const A* weight = static_cast<const A*>(pixels.class_weight);
        const int64_t step = static_cast<int64_t>(blocks) * kThreads;
        double n = 0;
        FASTKD_ROLLED
        for (int64_t i = block.index() * kThreads + block.thread(); i < total; i += kAtOnce * step) {
            int64_t label[kAtOnce];
            FASTKD_UNROLL
            for (int u = 0; u < kAtOnce; ++u) label[u] = i + u * step < total ? (target ? target[i + u * step] : 0) : -1;
            FASTKD_UNROLL
            for (int u = 0; u < kAtOnce; ++u) {
                if (i + u * step >= total || excluded(pixels, known, i + u * step)) continue;
                const int of = target ? class_among(label[u], pixels.ignore_index, classes) : 0;
                if (of >= 0) n += weight ? static_cast<double>(weight[of]) : 1.0;
            }
        }
        return n;
    }
};

// Converts `rows` rows of a map, starting at row `first` of all its padded rows. kCentred: subtracts the maximum over
// the classes. A block takes 32 positions, and stages up to kClasses classes of them in shared memory, read once; for
// more classes the map is read twice.
template <class T, bool kCentred = true>
struct CellsPrepare {
    using A = Accumulator<T>;
    static constexpr int kBlocksPerCores = 4;
    static constexpr int kClasses = 160;
    static constexpr int kAtOnce = 8;               // values whose loads are in flight together
    static constexpr int kOwn = kWarp / kWarps;     // positions of a warp in channels_last
    static constexpr int kStride = kWarp + 1;
    static constexpr int64_t kTops = kClasses * kStride * static_cast<int64_t>(sizeof(A));
    static constexpr int64_t kOffsets = kTops + kWarps * kStride * static_cast<int64_t>(sizeof(A));
    static constexpr int64_t kShared = kOffsets + 2 * kWarp * 8;

    Source<T, 1> map;
    bool channels_last;
    int64_t c, h, w, first, rows;
    A scale;
    A* out;   // (rows, c, w + 2)
    A* peak;  // kCentred: (rows, w + 2): scaled maxima

    FASTKD_ANYWHERE int64_t places() const { return rows * (w + 2); }
    FASTKD_ANYWHERE int64_t blocks() const { return ceil_div(places(), kWarp); }

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        const int lane = block.thread() % kWarp, warp = block.thread() / kWarp;
        const int64_t at = block.index() * kWarp + lane;
        A *staged = block.template shared<A>(0), *tops = block.template shared<A>(kTops);
        int64_t *from = block.template shared<int64_t>(kOffsets), *to = from + kWarp;  // of class 0; -1 beyond the end
        if (warp == 0) {
            const int64_t row = quotient(at, w + 2), x = at - row * (w + 2);
            from[lane] = at < places() ? pixel(first + row, x) : -1;
            to[lane] = row * c * (w + 2) + x;
        }
        block.sync();
        A top = 0;
        bool is_staged = false;
        if constexpr (kCentred) {
            A best[kOwn];
            FASTKD_UNROLL
            for (A& x : best) x = static_cast<A>(-INFINITY);
            is_staged = c <= kClasses;
            read(0, c, from, block.thread(), [&](int64_t k, int i, int own, A value) {
                best[own] = higher(best[own], value);
                if (is_staged) staged[k * kStride + i] = value;
            });
            if (channels_last) {
                FASTKD_UNROLL
                for (int own = 0; own < kOwn; ++own) {
                    for (int bit = 1; bit < kWarp; bit *= 2) best[own] = higher(best[own], block.shuffle_xor(best[own], bit));
                    if (lane == 0) tops[warp + own * kWarps] = best[own];
                }
            } else {
                tops[warp * kStride + lane] = best[0];
            }
            block.sync();
            top = tops[lane];
            for (int i = 1; i < kWarps && !channels_last; ++i) top = higher(top, tops[i * kStride + lane]);
            if (top == static_cast<A>(-INFINITY)) top = 0;
            if (warp == 0 && at < places()) peak[at] = top * scale;
        }
        for (int64_t begin = 0; begin < c; begin += kClasses) {
            const int64_t end = least(begin + kClasses, c);
            if (!is_staged) {
                block.sync();
                read(begin, end, from, block.thread(),
                     [&](int64_t k, int i, int, A value) { staged[(k - begin) * kStride + i] = value; });
                block.sync();
            }
            for (int64_t k = begin + warp; at < places() && k < end; k += kWarps) {
                A value = (staged[(k - begin) * kStride + lane] - top) * scale;
                value = value < static_cast<A>(kLow) ? static_cast<A>(kLow) : value;
                if (!kCentred) value = value > static_cast<A>(-kLow) ? static_cast<A>(-kLow) : value;
                out[to[lane] + k * (w + 2)] = value;
            }
        }
    }

private:
    FASTKD_DEVICE static A higher(A a, A b) { return a != a ? a : b != b ? b : largest(a, b); }

    // f(class, position, which of the thread's positions, logit) for a thread's share of the classes [begin, end):
    // in NCHW a lane has one position and a warp every eighth class, in channels_last a warp has every eighth position.
    template <class F>
    FASTKD_DEVICE void read(int64_t begin, int64_t end, const int64_t* from, int thread, const F& f) const {
        const int lane = thread % kWarp, warp = thread / kWarp;
        if (!channels_last) {
            const int64_t start = from[lane], size = h * w;
            FASTKD_ROLLED
            for (int64_t k = begin + warp; start >= 0 && k < end; k += kAtOnce * kWarps) {
                A value[kAtOnce];
                FASTKD_UNROLL
                for (int u = 0; u < kAtOnce; ++u) value[u] = k + u * kWarps < end ? map.one(start + (k + u * kWarps) * size) : A(0);
                FASTKD_UNROLL
                for (int u = 0; u < kAtOnce; ++u)
                    if (k + u * kWarps < end) f(k + u * kWarps, lane, 0, value[u]);
            }
            return;
        }
        constexpr int kSteps = kAtOnce / kOwn;
        FASTKD_ROLLED
        for (int64_t k = begin + lane; k < end; k += kSteps * kWarp) {
            A value[kSteps][kOwn];
            FASTKD_UNROLL
            for (int u = 0; u < kSteps; ++u) {
                FASTKD_UNROLL
                for (int own = 0; own < kOwn; ++own) {
                    const int64_t start = from[warp + own * kWarps];
                    value[u][own] = start >= 0 && k + u * kWarp < end ? map.one(start + k + u * kWarp) : A(0);
                }
            }
            FASTKD_UNROLL
            for (int u = 0; u < kSteps; ++u) {
                FASTKD_UNROLL
                for (int own = 0; own < kOwn; ++own)
                    if (k + u * kWarp < end) f(k + u * kWarp, warp + own * kWarps, own, value[u][own]);
            }
        }
    }
    // Offset of class 0 at a position of the padded map.
    FASTKD_DEVICE int64_t pixel(int64_t row, int64_t column) const {
        const int64_t n = quotient(row, h + 2);
        const int64_t y = least(most(row - n * (h + 2) - 1, 0), h - 1), x = least(most(column - 1, 0), w - 1);
        return channels_last ? ((n * h + y) * w + x) * c : n * c * h * w + y * w + x;
    }
};

}  // namespace fastkd::gpu

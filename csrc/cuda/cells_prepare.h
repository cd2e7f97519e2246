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

    LabelPixels pixels;
    const A* known;
    int64_t classes, total;
    double* parts;  // (blocks,)
    int blocks;

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        const A* weight = static_cast<const A*>(pixels.class_weight);
        double n = 0;
        for (int64_t i = block.index() * kThreads + block.thread(); i < total; i += static_cast<int64_t>(blocks) * kThreads) {
            const int label = label_of(pixels, known, classes, i);
            if (label >= 0) n += weight ? static_cast<double>(weight[label]) : 1.0;
        }
        n = sum_block(block, n, block.template shared<double>(0));
        if (block.thread() == 0) parts[block.index()] = n;
    }
};

// Converts `rows` rows of a map, starting at row `first` of all its padded rows. kCentred: subtracts the maximum over
// the classes.
template <class T, bool kCentred = true>
struct CellsPrepare {
    using A = Accumulator<T>;
    static constexpr int kBlocksPerCores = 4;
    static constexpr int kStride = kWarp + 1;
    static constexpr int64_t kShared = (kWarps + kWarp) * kStride * 8;

    Source<T, 1> map;
    bool channels_last;
    int64_t c, h, w, first, rows;
    A scale;
    A* out;   // (rows, c, w + 2)
    A* peak;  // kCentred: (rows, w + 2): scaled maxima

    FASTKD_ANYWHERE int64_t blocks() const { return ceil_div(rows * (w + 2), kWarp); }

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        const int lane = block.thread() % kWarp, warp = block.thread() / kWarp;
        const int64_t at = block.index() * kWarp + lane;
        const bool exists = at < rows * (w + 2);
        const auto place = [&] { return out + at / (w + 2) * c * (w + 2) + at % (w + 2); };
        if constexpr (kCentred) {
            A* all = block.template shared<A>(kWarp * kStride * sizeof(A));
            A top = static_cast<A>(-INFINITY);
            each(block, [&](int64_t, A value) { top = higher(top, value); });
            all[warp * kStride + lane] = top;
            block.sync();
            for (int i = 0; i < kWarps; ++i) top = higher(top, all[i * kStride + lane]);
            if (top == static_cast<A>(-INFINITY)) top = 0;
            A* to = place();
            each(block, [&](int64_t k, A value) {
                value = (value - top) * scale;
                to[k * (w + 2)] = value < static_cast<A>(kLow) ? static_cast<A>(kLow) : value;
            });
            if (warp == 0 && exists) peak[at] = top * scale;
        } else {
            A* to = place();
            each(block, [&](int64_t k, A value) {
                value *= scale;
                value = value < static_cast<A>(kLow) ? static_cast<A>(kLow) : value;
                to[k * (w + 2)] = value > static_cast<A>(-kLow) ? static_cast<A>(-kLow) : value;
            });
        }
    }

private:
    FASTKD_DEVICE static A higher(A a, A b) { return a != a ? a : b != b ? b : largest(a, b); }

    // f(class, logit) for this thread's classes at its position.
    template <class Block, class F>
    FASTKD_DEVICE void each(Block& block, const F& f) const {
        const int lane = block.thread() % kWarp, warp = block.thread() / kWarp;
        const int64_t at = block.index() * kWarp + lane;
        const bool exists = at < rows * (w + 2);
        if (!channels_last) {
            const int64_t from = exists ? pixel(at) : 0;
            FASTKD_UNROLL_BY(4)
            for (int64_t k = warp; exists && k < c; k += kWarps) f(k, map.one(from + k * h * w));
            return;
        }
        A* tile = block.template shared<A>(0);  // (kWarp pixels, kWarp classes)
        for (int64_t k = 0; k < c; k += kWarp) {
            for (int i = warp; i < kWarp; i += kWarps) {
                const int64_t there = block.index() * kWarp + i;
                if (there < rows * (w + 2) && k + lane < c) tile[i * kStride + lane] = map.one(pixel(there) + k + lane);
            }
            block.sync();
            for (int i = warp; exists && i < kWarp && k + i < c; i += kWarps) f(k + i, tile[lane * kStride + i]);
            block.sync();
        }
    }
    // Offset of class 0 at a position of the padded map.
    FASTKD_DEVICE int64_t pixel(int64_t at) const {
        const int64_t row = first + at / (w + 2), n = row / (h + 2);
        const int64_t y = least(most(row % (h + 2) - 1, 0), h - 1), x = least(most(at % (w + 2) - 1, 0), w - 1);
        return channels_last ? ((n * h + y) * w + x) * c : n * c * h * w + y * w + x;
    }
};

}  // namespace fastkd::gpu

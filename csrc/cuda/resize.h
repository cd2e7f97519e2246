// The losses at label resolution (docs/full-resolution.md) and their gradients at logit size, in one launch (docs/cuda.md).
// Of a label pixel with interpolated logits s (and t):
//
//     one side:  weight * -log softmax(s)[label],                          gradient weight * (p_s - onehot)
//     two sides: weight * tau^2 KL(softmax(t / tau) || softmax(s / tau)),  gradient weight * tau * (p_s - p_t)
//
// A block owns a tile of logits and goes down its cells row by row, with two rows of logits in shared memory. First its
// threads own label pixels: they find the log-sum-exps, and from these the loss. Then they own (cell, class) and add up what
// the cell's label pixels give to its four corners. The cells above and to the left of the tile are done by the neighbouring
// block as well, so that every logit's gradient is complete in one block: written once, without atomics, in a fixed order.
#pragma once

#include <type_traits>

#include "dispatch.h"
#include "kernels.h"
#include "pixels.h"

namespace fastkd::gpu {

// Counts the label pixels, by their class weights where there are any.
template <class A>
struct ResizedCount {
    static constexpr bool kOneRead = false;
    static constexpr int kBlocksPerCores = 4;

    LabelPixels pixels;
    int64_t classes, total;
    double* parts;  // (blocks,)
    int blocks;

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        const A* weight = static_cast<const A*>(pixels.class_weight);
        double n = 0;
        for (int64_t i = block.index() * kThreads + block.thread(); i < total; i += blocks * kThreads) {
            const int label = pixels.mask && !pixels.mask[i] ? -1 : class_of(pixels, classes, i);
            if (label >= 0) n += weight ? static_cast<double>(weight[label]) : 1.0;
        }
        n = sum_block(block, n, block.template shared<double>(0));
        if (block.thread() == 0) parts[block.index()] = n;
    }
};

template <class T, int kSides, bool kHeld>
struct ResizedTiles {
    using A = Accumulator<T>;
    static constexpr bool kOneRead = false;
    static constexpr int kBlocksPerCores = kHeld && sizeof(A) == sizeof(float) ? 2 : 1;
    static constexpr int kClasses = 2;  // of a cell that a thread takes together: both need the same pixels' numbers
    // Instead of -inf, which times a neighbour's weight of 0 is NaN: its exponential is 0 whatever it is blended with.
    static constexpr A kLow = static_cast<A>(-1e37), kMasked = static_cast<A>(-1e29);

    Map maps[kSides];
    Sink<T, 1> gradient;
    ResizedPlan plan;
    LabelPixels pixels;
    A temperature, scale;
    A* losses;              // (n, height, width), or null
    double* parts;          // (blocks,), or null
    const A* grad;          // one number, or null: 1
    bool early;
    const double* counted;  // `counters` numbers that add up to the count, or null
    int counters;
    const A* count;         // the count, or null
    const A* guess;
    A* memory;

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        remember(block, grad, memory);
        if (guess && *grad == *guess) return;
        const bool wanted = gradient.data && !(early && *grad != *grad);
        const ResizedTile tile = plan.tile(block.index(), wanted);
        const A factor = wanted ? gradient_factor(block) : A(0);

        int* start = block.template shared<int>(plan.start);
        for (int i = block.thread(); i <= tile.cells(); i += kThreads)
            start[i] = plan.columns.first(tile.cell_column + i);
        A* shares = block.template shared<A>(plan.shares);
        for (int i = block.thread(); i < 4 * plan.cells() * plan.chunk_stride(); i += kThreads) shares[i] = 0;
        block.sync();
        int phases = 0;
        for (int i = 0; i < tile.cells(); ++i) phases = largest(phases, start[i + 1] - start[i]);

        double loss = 0;
        for (int y = tile.cell_row; y < tile.last_row; ++y) {
            if constexpr (kHeld) {
                if (y == tile.cell_row) load_row(block, tile, y);
                load_row(block, tile, y + 1);
            }
            const int end = plan.rows.first(y + 1);
            for (int row = plan.rows.first(y); row < end; row += plan.label_rows)
                for (int phase = 0; phase < phases; phase += plan.phases) {
                    const Step step{y, row, static_cast<int>(least(plan.label_rows, end - row)), phase};
                    prepare(block, tile, step);
                    block.sync();
                    evaluate(block, tile, step);
                    block.sync();
                    loss += weigh(block, tile, step);
                    block.sync();
                    if (!wanted) continue;
                    add_shares(block, tile, step);
                    block.sync();
                }
            if (wanted) write_row(block, tile, y, factor);
        }
        if (parts) {
            loss = sum_block(block, loss, block.template shared<double>(plan.warps));
            if (block.thread() == 0) parts[block.index()] = loss;
        }
    }

private:
    // The label pixels that are taken at a time, of each cell in row y: label rows from `row` on, phases from `phase` on.
    struct Step {
        int y, row, rows, phase;
    };

    template <class Block>
    FASTKD_DEVICE A gradient_factor(Block& block) const {
        A factor = scale;
        if (counted || count) {
            A n;
            if (count) {
                n = *count;
            } else {
                const double part = block.thread() < counters ? counted[block.thread()] : 0.0;
                n = static_cast<A>(sum_block(block, part, block.template shared<double>(plan.warps)));
            }
            factor = 1 / (n == 0 ? A(1) : n);
        }
        return grad ? *grad * factor : factor;
    }

    // ---- logits ------------------------------------------------------------------------------------------------------

    FASTKD_DEVICE int64_t offset(int side, int64_t n, int64_t c, int64_t y, int64_t x) const {
        const int64_t h = plan.rows.in, w = plan.columns.in, classes = plan.classes;
        return maps[side].channels_last ? ((n * h + y) * w + x) * classes + c : ((n * classes + c) * h + y) * w + x;
    }
    FASTKD_DEVICE A logit(int side, int64_t at) const {
        const A value = Source<T, 1>(maps[side].data, maps[side].type).one(at) / temperature;
        return value < kLow ? kLow : value;
    }

    // Where the corners of a cell are, class 0: in shared memory, or in the map.
    using Index = std::conditional_t<kHeld, int, int64_t>;
    struct Cell {
        Index at, right, below, step;  // step: from class to class
    };
    FASTKD_DEVICE Cell cell_of(const ResizedTile& tile, int side, int y, int i) const {
        if constexpr (kHeld) {
            const int stride = plan.stride(), row = (plan.wide + 2) * stride, top = y % 2;
            return {(2 * side + top) * row + i * stride, stride, top ? -row : row, 1};
        } else {
            const int64_t x = tile.cell_column + i, at = offset(side, tile.n, 0, y, x);
            return {at, x + 1 < plan.columns.in ? offset(side, tile.n, 0, y, x + 1) - at : 0,
                    y + 1 < plan.rows.in ? offset(side, tile.n, 0, y + 1, x) - at : 0, offset(side, tile.n, 1, y, x) - at};
        }
    }
    template <class Block>
    FASTKD_DEVICE A read(Block& block, int side, Index at) const {
        if constexpr (kHeld) return block.template shared<A>(plan.logits)[at];
        else return logit(side, at);
    }

    // Row y of the tile's columns and one more to the right; beyond the last row or column, that one again, which weighs 0.
    template <class Block>
    FASTKD_DEVICE void load_row(Block& block, const ResizedTile& tile, int y) const {
        const int columns = tile.cells() + 1, classes = plan.classes, stride = plan.stride();
        const int64_t from_y = least(y, plan.rows.in - 1);
        for (int side = 0; side < kSides; ++side) {
            const bool last = maps[side].channels_last;
            A* row = block.template shared<A>(plan.logits) + (2 * side + y % 2) * (plan.wide + 2) * stride;
            for (int e = block.thread(); e < columns * classes; e += kThreads) {
                const int c = last ? e % classes : e / columns, i = last ? e / classes : e % columns;
                const int64_t x = least(tile.cell_column + i, plan.columns.in - 1);
                row[i * stride + c] = logit(side, offset(side, tile.n, c, from_y, x));
            }
        }
    }

    // A neighbour that weighs 0 has no say, whatever it is.
    FASTKD_DEVICE static A blend(A one, A other, A weight) {
        return weight == 0 ? one : multiply_add(weight, other, (1 - weight) * one);
    }
    // The logits to the left and to the right of label pixels that lie `down` below the cell's top.
    struct Ends {
        A left, right;
        FASTKD_DEVICE A at(A weight) const { return multiply_add(weight, right, (1 - weight) * left); }
    };
    template <class Block>
    FASTKD_DEVICE Ends ends(Block& block, int side, const Cell& cell, int c, A down) const {
        const Index at = cell.at + c * cell.step;
        const A left = blend(read(block, side, at), read(block, side, at + cell.below), down);
        if (plan.columns.in == plan.columns.out) return {left, left};
        return {left, blend(read(block, side, at + cell.right), read(block, side, at + cell.below + cell.right), down)};
    }

    // ---- label pixels ------------------------------------------------------------------------------------------------

    FASTKD_DEVICE int place(int row, int phase, int cell) const { return (row * plan.phases + phase) * plan.cells() + cell; }

    // f(row, phase, cell, label column) for each label pixel of a step in cells [first, last).
    template <class Block, class F>
    FASTKD_DEVICE void each_pixel(Block& block, const Step& step, int first, int last, const F& f) const {
        const int* start = block.template shared<int>(plan.start);
        const int cells = last - first;
        FASTKD_ROLLED
        for (int e = block.thread(); e < step.rows * cells * plan.phases; e += kThreads) {
            const int k = e % plan.phases, i = first + e / plan.phases % cells, r = e / plan.phases / cells;
            const int x = start[i] + step.phase + k;
            if (x < start[i + 1]) f(r, k, i, x);
        }
    }
    FASTKD_DEVICE int64_t pixel(const ResizedTile& tile, const Step& step, int row, int x) const {
        return (tile.n * plan.rows.out + step.row + row) * plan.columns.out + x;
    }

    // Labels, and the weights of rows and columns.
    template <class Block>
    FASTKD_DEVICE void prepare(Block& block, const ResizedTile& tile, const Step& step) const {
        const bool weighted = pixels.weight;
        const Axis across{static_cast<int>(pixels.weight_w), plan.columns.out, plan.columns.align_corners};
        each_pixel(block, step, 0, tile.cells(), [&](int r, int k, int i, int x) {
            const int64_t at = pixel(tile, step, r, x);
            block.template shared<int>(plan.label)[place(r, k, i)] =
                pixels.mask && !pixels.mask[at] ? -1 : class_of(pixels, plan.classes, at);
            if (r > 0) return;
            block.template shared<A>(plan.right)[place(0, k, i)] = plan.columns.template right<A>(x, tile.cell_column + i);
            if (!weighted) return;
            const int left = across.left(x);
            block.template shared<int>(plan.weight_left)[place(0, k, i)] = left;
            block.template shared<A>(plan.weight_right)[place(0, k, i)] = across.template right<A>(x, left);
        });
        const Axis along{static_cast<int>(pixels.weight_h), plan.rows.out, plan.rows.align_corners};
        for (int r = block.thread(); r < step.rows; r += kThreads) {
            block.template shared<A>(plan.down)[r] = plan.rows.template right<A>(step.row + r, step.y);
            if (!weighted) continue;
            const int top = along.left(step.row + r);
            block.template shared<int>(plan.weight_top)[r] = top;
            block.template shared<A>(plan.weight_down)[r] = along.template right<A>(step.row + r, top);
        }
    }

    // The log-sum-exps, and the losses before they are weighted: a thread takes kPixels label pixels of one cell and row.
    template <class Block>
    FASTKD_DEVICE void evaluate(Block& block, const ResizedTile& tile, const Step& step) const {
        const int* start = block.template shared<int>(plan.start);
        const int groups = plan.phases / kPixels, classes = plan.classes;
        FASTKD_ROLLED
        for (int e = block.thread(); e < step.rows * tile.cells() * groups; e += kThreads) {
            const int k = e % groups * kPixels, i = e / groups % tile.cells(), r = e / groups / tile.cells();
            const int there = start[i + 1] - start[i] - step.phase - k;
            const A down = block.template shared<A>(plan.down)[r];
            int label[kPixels];
            A right[kPixels];
            bool any = false;
            FASTKD_UNROLL
            for (int j = 0; j < kPixels; ++j) {
                label[j] = j < there ? block.template shared<int>(plan.label)[place(r, k + j, i)] : -1;
                right[j] = j < there ? block.template shared<A>(plan.right)[place(0, k + j, i)] : A(0);
                any |= label[j] >= 0;
            }
            if (!any) continue;
            Cell cell[kSides];
            A peak[kSides][kPixels], sum[kSides][kPixels], cross[kPixels];
            FASTKD_UNROLL
            for (int side = 0; side < kSides; ++side) {
                cell[side] = cell_of(tile, side, step.y, i);
                FASTKD_UNROLL
                for (int j = 0; j < kPixels; ++j) {
                    peak[side][j] = static_cast<A>(-INFINITY);
                    sum[side][j] = cross[j] = 0;
                }
            }
            FASTKD_ROLLED
            for (int c = 0; c < classes; ++c) {
                FASTKD_UNROLL
                for (int side = 0; side < kSides; ++side) {
                    const Ends logits = ends(block, side, cell[side], c, down);
                    FASTKD_UNROLL
                    for (int j = 0; j < kPixels; ++j) peak[side][j] = largest(peak[side][j], logits.at(right[j]));
                }
            }
            FASTKD_ROLLED
            for (int c = 0; c < classes; ++c) {
                const Ends s = ends(block, 0, cell[0], c, down);
                const Ends t = kSides == 2 ? ends(block, kSides - 1, cell[kSides - 1], c, down) : s;
                FASTKD_UNROLL
                for (int j = 0; j < kPixels; ++j) {
                    const A ds = s.at(right[j]) - peak[0][j];
                    sum[0][j] += exponential(ds);
                    if constexpr (kSides == 2) {
                        const A dt = t.at(right[j]) - peak[1][j], et = exponential(dt);
                        sum[1][j] += et;
                        cross[j] += et == 0 ? A(0) : et * (dt - ds);  // probability 0 adds 0
                    }
                }
            }
            FASTKD_UNROLL
            for (int j = 0; j < kPixels; ++j) {
                if (label[j] < 0) continue;
                const int at = place(r, k + j, i);
                FASTKD_UNROLL
                for (int side = 0; side < kSides; ++side)
                    sums(block, side)[at] = peak[side][j] + logarithm(sum[side][j]);
                A& loss = block.template shared<A>(plan.scale)[at];
                if constexpr (kSides == 2) {
                    const A kl = cross[j] / sum[1][j] + logarithm(sum[0][j] / sum[1][j]);
                    loss = (kl < 0 ? A(0) : kl) * (temperature * temperature);
                } else {
                    const A own = ends(block, 0, cell[0], label[j], down).at(right[j]);
                    loss = own < kMasked ? static_cast<A>(INFINITY) : (peak[0][j] - own) + logarithm(sum[0][j]);
                }
            }
        }
    }
    template <class Block>
    FASTKD_DEVICE A* sums(Block& block, int side) const {
        return block.template shared<A>(plan.sums) + side * plan.label_rows * plan.phases * plan.cells();
    }

    // Sums the losses of the tile's own cells, and puts what the gradient is to be multiplied by in their place. Which
    // thread adds up what has nothing to do with the other cells: the sum has the same bits without a gradient.
    template <class Block>
    FASTKD_DEVICE double weigh(Block& block, const ResizedTile& tile, const Step& step) const {
        const int own = tile.first_column - tile.cell_column;
        const bool counts = step.y >= tile.first_row && tile.first_class == 0;
        double sum = 0;
        const auto take = [&](int r, int k, int i, int x) {
            const int at = place(r, k, i), label = block.template shared<int>(plan.label)[at];
            A weight = 0, loss = 0;
            if (label >= 0) {
                weight = pixels.class_weight ? static_cast<const A*>(pixels.class_weight)[label] : A(1);
                if (pixels.weight) weight *= weight_of(block, tile, r, place(0, k, i));
                loss = weight * block.template shared<A>(plan.scale)[at];
            }
            block.template shared<A>(plan.scale)[at] = kSides == 2 ? weight * temperature : weight;
            if (!counts || i < own) return;
            sum += static_cast<double>(loss);
            if (losses) losses[pixel(tile, step, r, x)] = loss;
        };
        FASTKD_ROLLED
        for (int part = 0; part < 2; ++part)
            each_pixel(block, step, part == 0 ? own : 0, part == 0 ? tile.cells() : own, take);
        return sum;
    }

    // From a map of any size.
    template <class Block>
    FASTKD_DEVICE A weight_of(Block& block, const ResizedTile& tile, int row, int column) const {
        const A right = block.template shared<A>(plan.weight_right)[column];
        const A down = block.template shared<A>(plan.weight_down)[row];
        const int beside = right == 0 ? 0 : 1;
        const A* top = static_cast<const A*>(pixels.weight) + block.template shared<int>(plan.weight_left)[column] +
                       (tile.n * pixels.weight_h + block.template shared<int>(plan.weight_top)[row]) * pixels.weight_w;
        const A* bottom = down == 0 ? top : top + pixels.weight_w;
        return blend(blend(top[0], bottom[0], down), blend(top[beside], bottom[beside], down), right);
    }

    // ---- the gradient ------------------------------------------------------------------------------------------------
    // What a cell's label pixels give to its left and to its right logit, of the row above them and of the row below, which
    // is the one above the next row of cells.

    template <class Block>
    FASTKD_DEVICE A* shares(Block& block, int y, int right) const {
        return block.template shared<A>(plan.shares) + (y % 2 * 2 + right) * plan.cells() * plan.chunk_stride();
    }

    template <class Block>
    FASTKD_DEVICE void add_shares(Block& block, const ResizedTile& tile, const Step& step) const {
        const int* start = block.template shared<int>(plan.start);
        const int groups = static_cast<int>(ceil_div(tile.classes(), kClasses));
        for (int e = block.thread(); e < tile.cells() * groups; e += kThreads) {
            const int i = e / groups, first = e % groups;
            const int phases = static_cast<int>(least(plan.phases, start[i + 1] - start[i] - step.phase));
            if (phases <= 0) continue;
            Cell cell[kSides];
            for (int side = 0; side < kSides; ++side) cell[side] = cell_of(tile, side, step.y, i);
            int c[kClasses];
            A give[kClasses][4] = {};  // to the left and right above, to the left and right below
            FASTKD_UNROLL
            for (int j = 0; j < kClasses; ++j)
                c[j] = tile.first_class + static_cast<int>(least(first + j * groups, tile.classes() - 1));
            FASTKD_ROLLED
            for (int r = 0; r < step.rows; ++r) {
                const A down = block.template shared<A>(plan.down)[r];
                Ends logits[kSides][kClasses];
                A to_left[kClasses] = {}, to_right[kClasses] = {};
                FASTKD_UNROLL
                for (int side = 0; side < kSides; ++side)
                    FASTKD_UNROLL
                    for (int j = 0; j < kClasses; ++j) logits[side][j] = ends(block, side, cell[side], c[j], down);
                FASTKD_ROLLED
                for (int k = 0; k < phases; ++k) {
                    const int at = place(r, k, i), label = block.template shared<int>(plan.label)[at];
                    if (label < 0) continue;
                    const A right = block.template shared<A>(plan.right)[place(0, k, i)];
                    const A weight = block.template shared<A>(plan.scale)[at];
                    FASTKD_UNROLL
                    for (int j = 0; j < kClasses; ++j) {
                        const A p = exponential(logits[0][j].at(right) - sums(block, 0)[at]);
                        A slope;
                        if constexpr (kSides == 2)
                            slope = p - exponential(logits[1][j].at(right) - sums(block, 1)[at]);
                        else
                            slope = c[j] == label ? p - 1 : p;
                        slope *= weight;
                        to_left[j] = multiply_add(1 - right, slope, to_left[j]);
                        to_right[j] = multiply_add(right, slope, to_right[j]);
                    }
                }
                FASTKD_UNROLL
                for (int j = 0; j < kClasses; ++j) {
                    give[j][0] = multiply_add(1 - down, to_left[j], give[j][0]);
                    give[j][1] = multiply_add(1 - down, to_right[j], give[j][1]);
                    give[j][2] = multiply_add(down, to_left[j], give[j][2]);
                    give[j][3] = multiply_add(down, to_right[j], give[j][3]);
                }
            }
            FASTKD_UNROLL
            for (int j = 0; j < kClasses; ++j) {
                if (first + j * groups >= tile.classes()) break;
                const int at = i * plan.chunk_stride() + c[j] - tile.first_class;
                FASTKD_UNROLL
                for (int k = 0; k < 4; ++k) shares(block, step.y + k / 2, k % 2)[at] += give[j][k];
            }
        }
    }

    // Row y is complete: both of its cells' rows have been here. Its place is the next bottom.
    template <class Block>
    FASTKD_DEVICE void write_row(Block& block, const ResizedTile& tile, int y, A factor) const {
        A *left = shares(block, y, 0), *right = shares(block, y, 1);
        const int columns = tile.last_column - tile.first_column, classes = tile.classes(), stride = plan.chunk_stride();
        const bool last = maps[0].channels_last;
        for (int e = block.thread(); y >= tile.first_row && e < columns * classes; e += kThreads) {
            const int c = last ? e % classes : e / columns, x = last ? e / classes : e % columns;
            const int i = tile.first_column - tile.cell_column + x;
            const A value = left[i * stride + c] + (i > 0 ? right[(i - 1) * stride + c] : A(0));
            gradient.one(offset(0, tile.n, tile.first_class + c, y, tile.first_column + x), value * factor);
        }
        block.sync();
        for (int i = block.thread(); i < 2 * plan.cells() * stride; i += kThreads) left[i] = 0;
        block.sync();
    }
};

// One block adds up what the tiles and the counters have.
template <class A>
struct ResizedTotal {
    static constexpr bool kOneRead = false;
    static constexpr int kBlocksPerCores = 1;

    const double* parts;  // (blocks,), or null
    int64_t blocks;
    const double* counted;  // (counters,), or null: all pixels count
    int counters;
    int64_t all;
    A *loss, *count;

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        double sum = 0;
        for (int64_t i = block.thread(); parts && i < blocks; i += kThreads) sum += parts[i];
        sum = sum_block(block, sum, block.template shared<double>(0));
        double n = counted && block.thread() < counters ? counted[block.thread()] : 0.0;
        n = sum_block(block, n, block.template shared<double>(0));
        if (block.thread() != 0) return;
        if (parts) *loss = static_cast<A>(sum);
        *count = static_cast<A>(counted ? n : static_cast<double>(all));
    }
};

template <int kSides, class Launch>
void resized(const Resized& a, const Launch& launch) {
    const ResizedPlan& plan = a.plan;
    const int64_t all = static_cast<int64_t>(plan.n) * plan.rows.out * plan.columns.out;
    const bool labels = a.pixels.label != Label::none, forward = a.losses || a.loss;
    constexpr int64_t scratch = kWarps * 8;
    const int counters = count_blocks(all);
    const auto run = [&](auto kind, auto held) {
        using T = typename decltype(kind)::type;
        using A = Accumulator<T>;
        if (forward && labels)
            launch(ResizedCount<A>{a.pixels, plan.classes, all, a.count_parts, counters}, counters, scratch);
        ResizedTiles<T, kSides, decltype(held)::value> tiles{
            {}, Sink<T, 1>(a.gradient, a.gradient_type), plan, a.pixels, static_cast<A>(a.temperature),
            static_cast<A>(a.scale), static_cast<A*>(a.losses), a.loss ? a.parts : nullptr, static_cast<const A*>(a.grad),
            a.early,
            a.by_count && forward ? a.count_parts : nullptr, counters,
            a.by_count && !forward ? static_cast<const A*>(a.count) : nullptr, static_cast<const A*>(a.guess),
            static_cast<A*>(a.memory)};
        for (int side = 0; side < kSides; ++side) tiles.maps[side] = a.maps[side];
        launch(tiles, plan.blocks(), plan.total);
        if (forward)
            launch(ResizedTotal<A>{a.loss ? a.parts : nullptr, plan.blocks(), labels ? a.count_parts : nullptr, counters,
                                   all, static_cast<A*>(a.loss), static_cast<A*>(a.count)},
                   1, scratch);
    };
    const auto by_type = [&](auto held) {
        a.maps[0].type == DType::f64 ? run(Kind<double, 1>{}, held) : run(Kind<Any, 1>{}, held);
    };
    plan.held ? by_type(std::true_type{}) : by_type(std::false_type{});
}

}  // namespace fastkd::gpu

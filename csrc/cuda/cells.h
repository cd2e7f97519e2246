// Losses at label resolution (docs/full-resolution.md) and their gradients at logit size (docs/cuda.md).
//
// The label pixels between four neighbouring logits form a cell. A thread processes a cell or part of one: its PY x PX
// label pixels are in registers, and lanes run along neighbouring cells. A first loop over the classes reads the four
// corners once for all pixels and sums exponentials. A second loop computes the gradient of the corners from those
// sums, so no map at label size is written.
//
// The maximum over the classes is subtracted from the logits. The interpolated maximum stabilises the exponentials of a
// label pixel: it is an upper bound of the pixel's logits and the same for all classes. If a pixel's logits are so far
// below it that the exponentials would underflow (neighbours whose maxima belong to different classes, by 90 or more),
// the pixel is recomputed separately.
//
// The left corners of a cell are the right corners of its left neighbour, so both contributions are added within the
// warp. The parts of a cell are also lanes of one warp. The upper and the lower corners go to separate planes.
// CellsJoin adds the planes, casts, and writes the student's layout. Every sum has a fixed order; there are no atomics.
//
// cells_prepare.h first converts each map to one format; cells_run.h does the launches.
//
// A loss is a struct (losses.h) with
//   A                accumulation type
//   kSides, kGrids   number of maps, and of distinct map sizes: 2 if the teacher's size differs
//   kWeighed         whether label pixels can have weights at all
//   kOwn, kWeights   whether the labelled class is special, and whether the gradient keeps a weight per label pixel
//   kWide            whether the gradient needs as many registers even without kWeights
//   kManySums        whether the forward without gradient needs more than 168 registers for the sums of 32 label pixels
//   kGradient, kForward, kKnown, kWritesSums   which kernels exist; whether log-sum-exps can be passed in or are written
//   Sums, add        sums over the classes of a label pixel, updated with the values of a class and their powers of 2
//   near             false if the sums may have lost terms to underflow; the pixel is then recomputed about its own maximum
//   term, ignored    loss of a pixel from its sums, and the value for ignored pixels
//   gradient, ratio  numbers per label pixel that, with its weight and sums, determine its gradient
//   share, own       gradient of a class, and its correction for the labelled class with kOwn
//   Class, of_class  per-class data besides the logits
//   kSpreads         whether each label pixel has a term and gradient spread over all classes: even, whole, rest, Class::spread
//   Linear, add_corners  sums over the classes of a cell's corners for that term
// SoftmaxLoss in losses.h has the common defaults.
#pragma once

#include "interpolation.h"

namespace fastkd::gpu {

template <class Loss, int PY, int PX, bool kGradient>
struct Cells {
    using A = typename Loss::A;
    static constexpr int kSides = Loss::kSides;
    static constexpr int kGrids = Loss::kGrids;  // 2 if the maps' sizes, and so their interpolation weights, differ
    static constexpr int kThreadsOfBlock = 64;
    // Launch bounds: at most 255, 168 or 128 registers per thread, enough to avoid spills.
    static constexpr int kBlocksPerCores =
        PY * PX > 32 || sizeof(A) == 8 || (PY * PX > 16 && (kGradient ? Loss::kWeights || Loss::kWide : Loss::kManySums)) ? 4
        : PY * PX > 16 || (PY * PX == 16 && (kGradient ? kGrids == 2 || Loss::kWide : Loss::kKnown))      ? 6
                                                                                                         : 8;
    static constexpr bool kMakesGradient = kGradient;
    static constexpr bool kCentred = true;  // whether the maximum over classes is subtracted from the logits
    static constexpr bool kAddsClasses = false;
    static constexpr bool kWeighs = Loss::kWeighed && (!kGradient || !Loss::kOwn || Loss::kWeights);  // whether weights are possible
    static constexpr bool kWeights = kGradient && Loss::kWeights;  // per pixel, in registers during the gradient

    CellsPlan plan;
    int64_t first, lines;   // the chunk: rows of cells
    LabelPixels pixels;
    Loss loss;
    const A* map[kSides];   // from CellsPrepare
    const A* peak[kSides];  // maxima over the classes
    Given<A> given[kSides];
    const A* known;         // null, or (n, height, width): log-sum-exps, NaN for uncounted pixels
    A* terms;               // null, or (n, height, width)
    A* sums_of;             // null, or (n, height, width): log-sum-exps of the first side
    double* parts;          // null, or (warps,): sums of terms
    const double* counted;  // `counters` numbers; terms are divided by their sum. counters == 0: no division
    int counters;
    A scale;                // of the gradient and of each term
    A* planes;              // (sets, lines, 2, c, w)
    A* edges;               // (sets, groups, 2, c): right-corner gradient of a warp's last cell

    FASTKD_ANYWHERE int64_t blocks() const { return ceil_div(plan.warps(lines), kThreadsOfBlock / kWarp); }

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        const int lane = block.thread() % kWarp;
        const int64_t warp = block.index() * (kThreadsOfBlock / kWarp) + block.thread() / kWarp;
        if (warp >= plan.warps(lines)) return;
        const A factor = factor_of(block, lane);
        const Place at = place_of(warp, lane);

        // The thread's pixels: weights of the right and lower corners, which pixels are counted, labels.
        A right[kGrids][PX], down[kGrids][PY];
        int label[PY][PX];  // only with Loss::kOwn
        uint64_t counts = 0;
        const unsigned rows = setup(block, at, right, down, label, counts);
        Walk<A> start[kSides];
        FASTKD_UNROLL
        for (int side = 0; side < kSides; ++side) start[side] = walk(at, side);

        typename Loss::Sums sums[PY][PX] = {};
        typename Loss::Linear linear;
        if (Loss::kKnown && known)
            take_known(at, start[0], rows, right[0], down[0], label, counts, sums);
        else if (rows != 0)
            add_up(at, start, rows, right, down, label, sums, linear);
        uint64_t far = 0;
        FASTKD_UNROLL
        for (int i = 0; i < PY * PX; ++i)
            if (counts >> i & 1 && !Loss::near(sums[i / PX][i % PX])) far |= uint64_t{1} << i;

        // The loss, and the per-pixel factors of the gradient.
        double sum = 0;
        A slope[PY][PX], ratio[PY][PX], weight[PY][PX];
        A told[PY][PX], lse[PY][PX];  // without gradient: the terms, and the log-sum-exps
        Shares spread;
        Corners<A> top{};
        if (Loss::kWritesSums && !kGradient && sums_of) top = peaks(at);
        FASTKD_UNROLL
        for (int j = 0; j < PX; ++j) {
            A given_weight[PY];
            if (kWeighs && pixels.weight) {
                const Between across = weight_column(at, j);
                FASTKD_UNROLL
                for (int i = 0; i < PY; ++i) given_weight[i] = weight_at(at, weight_row(at, i), across);
            }
            FASTKD_UNROLL
            for (int i = 0; i < PY; ++i) {
                const bool here = (counts & ~far) >> (i * PX + j) & 1;
                A own = here ? A(1) : A(0), all = own, term = Loss::ignored();
                if (here) {
                    if (kWeighs && Loss::kOwn) own = class_weight(label[i][j]);
                    if (kWeighs && pixels.weight) {
                        all = given_weight[i];
                        own *= all;
                    }
                    term = own * loss.term(sums[i][j]);
                    if constexpr (Loss::kSpreads)
                        term += loss.rest(all * loss.even(), sums[i][j], linear, down[0][i], right[0][j]);
                    sum += static_cast<double>(term);
                }
                if constexpr (!kGradient) told[i][j] = term * scale;
                if constexpr (Loss::kWritesSums && !kGradient)
                    lse[i][j] = (exact_value(top, down[0][i], right[0][j]) + log2_of(sums[i][j].sum)) * static_cast<A>(kLn2);
                if constexpr (kGradient) {
                    weight[i][j] = own * factor * loss.gradient(sums[i][j]);
                    A whole = weight[i][j];
                    if constexpr (Loss::kSpreads) {
                        const A even = all * loss.even() * factor;
                        whole += loss.whole(even, linear);
                        spread.add(even, right[0][j], down[0][i]);
                    }
                    slope[i][j] = here ? fast_ratio(whole, sums[i][j].sum) : A(0);
                    ratio[i][j] = here ? loss.ratio(sums[i][j], at.n, label[i][j]) : A(0);
                    if (Loss::kOwn && !here) label[i][j] = -1;
                }
            }
        }
        if constexpr (!kGradient) {
            if (terms) write(terms, at, told);
            if (Loss::kWritesSums && sums_of) write(sums_of, at, lse);  // of ignored pixels too, which nothing reads
        }
        if constexpr (kGradient)
            gradient(block, at, start, rows, counts != 0, right, down, label, weight, slope, ratio, spread, factor);
        if (block.any(far != 0)) far_pixels(block, at, far, factor, sum);
        if (parts) {
            for (int bit = 1; bit < kWarp; bit *= 2) sum += block.shuffle_xor(sum, bit);
            if (lane == 0) parts[warp] = sum;
        }
    }

protected:
    struct Place {
        bool exists;
        int lane, part, set;
        int64_t group, line, n;
        int y, x;  // of the cell
        Piece down, across;

        FASTKD_DEVICE int rows() const { return down.end - down.begin; }
        FASTKD_DEVICE int columns() const { return across.end - across.begin; }
        FASTKD_DEVICE int64_t pixel(const Cells& of, int i, int j) const {
            return (n * of.plan.rows.own.out + down.begin + i) * of.plan.columns.own.out + across.begin + j;
        }
    };

    FASTKD_DEVICE Place place_of(int64_t warp, int lane) const {
        Place at{};
        const int group = plan.group(), cells = plan.columns.own.cells();
        at.lane = lane;
        at.part = lane / group;
        at.group = quotient(warp, plan.sets);
        at.set = static_cast<int>(warp - at.group * plan.sets);
        const int64_t cell = at.group * group + lane % group;
        at.exists = cell < lines * cells;
        at.line = at.exists ? quotient(cell, cells) : 0;
        at.x = static_cast<int>(at.exists ? cell - at.line * cells : 0) + plan.columns.own.first_cell();
        const int64_t line = first + at.line;
        at.n = plan.sample(line);
        at.y = static_cast<int>(line - at.n * plan.rows.own.cells()) + plan.rows.own.first_cell();
        const int part = at.set * plan.team + at.part, wide = plan.columns.count();
        if (at.exists && part < plan.rows.count() * wide) {
            at.down = plan.rows.piece(at.y, part / wide);
            at.across = plan.columns.piece(at.x, part % wide);
        }
        return at;
    }

    template <class Block>
    FASTKD_DEVICE A factor_of(Block& block, int lane) const {
        if (!kGradient || counters == 0) return scale;
        double n = 0;
        for (int i = lane; i < counters; i += kWarp) n += counted[i];
        for (int bit = 1; bit < kWarp; bit *= 2) n += block.shuffle_xor(n, bit);
        return n == 0 ? scale : scale / static_cast<A>(n);
    }

    // Returns a bitmask of the rows in which the warp has a counted pixel.
    template <class Block>
    FASTKD_DEVICE unsigned setup(Block& block, const Place& at, A (&right)[kGrids][PX], A (&down)[kGrids][PY],
                                 int (&label)[PY][PX], uint64_t& counts) const {
        FASTKD_UNROLL
        for (int side = 0; side < kGrids; ++side) {
            FASTKD_UNROLL
            for (int j = 0; j < PX; ++j) right[side][j] = j < at.columns() ? right_of(at, side, j) : A(0);
            FASTKD_UNROLL
            for (int i = 0; i < PY; ++i) down[side][i] = i < at.rows() ? down_of(at, side, i) : A(0);
        }
        with_targets(pixels, [&](const auto* target) { read_labels(at, target, label, counts); });
        unsigned rows = 0;
        FASTKD_UNROLL
        for (int i = 0; i < PY; ++i)
            if (block.any((counts >> (i * PX) & ((uint64_t{1} << PX) - 1)) != 0)) rows |= 1u << i;
        return rows;
    }
    // All loads of a kind before the first use, without branches: pixels outside read the first element.
    template <class Target>
    FASTKD_DEVICE void read_labels(const Place& at, const Target* target, int (&label)[PY][PX], uint64_t& counts) const {
        const int64_t start = at.pixel(*this, 0, 0);
        const auto inside = [&](int i, int j) { return i < at.rows() && j < at.columns(); };
        const auto each = [&](const auto& f) {
            FASTKD_UNROLL
            for (int i = 0; i < PY; ++i) {
                const int64_t row = start + static_cast<int64_t>(i) * plan.columns.own.out;
                FASTKD_UNROLL
                for (int j = 0; j < PX; ++j) f(i, j, inside(i, j) ? row + j : 0);
            }
        };
        Target of[PY][PX];
        if (target) each([&](int i, int j, int64_t pixel) { of[i][j] = target[pixel]; });
        FASTKD_UNROLL
        for (int i = 0; i < PY; ++i) {
            FASTKD_UNROLL
            for (int j = 0; j < PX; ++j) {
                label[i][j] = !inside(i, j) ? -1 : target ? class_among(of[i][j], pixels.ignore_index, plan.classes) : 0;
                if (label[i][j] >= 0) counts |= uint64_t{1} << (i * PX + j);
            }
        }
        if (pixels.mask || (Loss::kKnown && known)) {
            uint64_t out = 0;
            if (pixels.mask) each([&](int i, int j, int64_t pixel) { out |= uint64_t{!pixels.mask[pixel]} << (i * PX + j); });
            if (Loss::kKnown && known)
                each([&](int i, int j, int64_t pixel) { out |= uint64_t{known[pixel] != known[pixel]} << (i * PX + j); });
            counts &= ~out;
            if constexpr (Loss::kOwn) {
                FASTKD_UNROLL
                for (int i = 0; i < PY * PX; ++i)
                    if (out >> i & 1) label[i / PX][i % PX] = -1;
            }
        }
    }
    // Writes a thread's pixels to a map (n, height, width), in 16-byte stores where possible.
    FASTKD_DEVICE void write(A* map, const Place& at, const A (&value)[PY][PX]) const {
        constexpr int V = 16 / sizeof(A);
        A* to = map + at.pixel(*this, 0, 0);
        const int64_t width = plan.columns.own.out;
        const bool wide = PX % V == 0 && at.columns() == PX && width % V == 0 && reinterpret_cast<uintptr_t>(to) % 16 == 0;
        FASTKD_UNROLL
        for (int i = 0; i < PY; ++i) {
            if (i >= at.rows()) continue;
            if (wide) {
                FASTKD_UNROLL
                for (int j = 0; j + V <= PX; j += V) {
                    A part[V];
                    FASTKD_UNROLL
                    for (int v = 0; v < V; ++v) part[v] = value[i][j + v];
                    store<A, V>(to + i * width + j, part);
                }
            } else {
                FASTKD_UNROLL
                for (int j = 0; j < PX; ++j)
                    if (j < at.columns()) to[i * width + j] = value[i][j];
            }
        }
    }
    FASTKD_DEVICE A right_of(const Place& at, int side, int j) const {
        const Axis& axis = side == 1 ? plan.columns.other : plan.columns.own;
        return axis.template right<A>(at.across.begin + j, side == 1 ? at.across.other : at.x);
    }
    FASTKD_DEVICE A down_of(const Place& at, int side, int i) const {
        const Axis& axis = side == 1 ? plan.rows.other : plan.rows.own;
        return axis.template right<A>(at.down.begin + i, side == 1 ? at.down.other : at.y);
    }

    // Source position of a label pixel in the weight map, which may have any size; one axis.
    struct Between {
        int from, step;
        A right;
        Between() = default;
        FASTKD_DEVICE Between(const Axis& axis, int at) {
            const int cell = axis.cell(at);
            right = axis.template right<A>(at, cell);
            from = most(cell, 0);
            step = least(cell + 1, axis.in - 1) - from;
        }
    };
    FASTKD_DEVICE Between weight_row(const Place& at, int i) const {
        const Axis axis{static_cast<int>(pixels.weight_h), plan.rows.own.out, plan.rows.own.align_corners};
        return Between(axis, least(at.down.begin + i, axis.out - 1));
    }
    FASTKD_DEVICE Between weight_column(const Place& at, int j) const {
        const Axis axis{static_cast<int>(pixels.weight_w), plan.columns.own.out, plan.columns.own.align_corners};
        return Between(axis, least(at.across.begin + j, axis.out - 1));
    }
    FASTKD_DEVICE A weight_at(const Place& at, const Between& down, const Between& across) const {
        const A* top = static_cast<const A*>(pixels.weight) +
                       (at.n * pixels.weight_h + down.from) * pixels.weight_w + across.from;
        const A* low = top + down.step * pixels.weight_w;
        return blended(blended(top[0], low[0], down.right), blended(top[across.step], low[across.step], down.right),
                       across.right);
    }
    // Class weight of a counted pixel.
    FASTKD_DEVICE A class_weight(int label) const {
        return pixels.class_weight ? static_cast<const A*>(pixels.class_weight)[label] : A(1);
    }

    // Row of a side's padded map, relative to the chunk's first.
    FASTKD_DEVICE int64_t row_of(const Place& at, int side) const {
        if (side == 1 && kGrids == 2)
            return (at.n - plan.sample(first)) * (plan.rows.other.in + 2) + at.down.other + 1;
        return plan.padded_row(first + at.line) - plan.padded_row(first);
    }
    FASTKD_DEVICE Walk<A> walk(const Place& at, int side) const {
        const int x = (side == 1 && kGrids == 2 ? at.across.other : at.x) + 1;
        const A* top = map[side] + row_of(at, side) * plan.classes * step(side) + x;
        return {top, top + static_cast<int64_t>(below(side)) * plan.classes * step(side)};
    }
    // The maxima that were subtracted from the first side's logits, at the corners.
    FASTKD_DEVICE Corners<A> peaks(const Place& at) const {
        const int w = step(0);
        const A* top = peak[0] + row_of(at, 0) * w + at.x + 1;
        const A* bottom = top + below(0) * w;
        return {top[0], top[beside(0)], bottom[0], bottom[beside(0)]};
    }

    FASTKD_DEVICE int step(int side) const {
        return (side == 1 && kGrids == 2 ? plan.columns.other.in : plan.columns.own.in) + 2;
    }

    // Offsets of the right and lower corners: 0 along an axis that is not resized, because 0 * NaN is NaN. Only the
    // smallest shape can have one column per cell.
    FASTKD_DEVICE int beside(int side) const {
        const Axis& axis = side == 1 && kGrids == 2 ? plan.columns.other : plan.columns.own;
        return PX > kShape[0].columns ? 1 : axis.in != axis.out;
    }
    FASTKD_DEVICE int below(int side) const {
        const Axis& axis = side == 1 && kGrids == 2 ? plan.rows.other : plan.rows.own;
        return axis.in != axis.out;
    }

    // f(class, corners of each side) for every class, with the corners of the next class prefetched.
    template <class F>
    FASTKD_DEVICE void each_class(const Walk<A> (&start)[kSides], const F& f) const {
        Walk<A> walk[kSides];
        Corners<A> next[kSides];
        FASTKD_UNROLL
        for (int side = 0; side < kSides; ++side) {
            walk[side] = start[side];
            next[side] = walk[side].next(step(side), beside(side));
        }
        FASTKD_ROLLED
        for (int c = 0; c < plan.classes; ++c) {
            Corners<A> now[kSides];
            FASTKD_UNROLL
            for (int side = 0; side < kSides; ++side) {
                now[side] = next[side];
                next[side] = walk[side].next(step(side), beside(side));  // past the last class this reads the next row
            }
            f(c, now);
        }
    }

    // f(row, column, logit of each side) for the pixels in `rows`.
    template <class F, class G>
    FASTKD_DEVICE static void each_pixel(const Corners<A> (&corners)[kSides], unsigned rows, const A (&right)[kGrids][PX],
                                         const A (&down)[kGrids][PY], const F& f, const G& end_of_row) {
        const Blend<A> first(corners[0]), last(corners[kSides - 1]);
        FASTKD_UNROLL
        for (int i = 0; i < PY; ++i) {
            if (!(rows >> i & 1)) continue;
            A left[kSides], step[kSides];
            FASTKD_UNROLL
            for (int side = 0; side < kSides; ++side) {
                const Blend<A>& blend = side == 0 ? first : last;
                left[side] = multiply_add(down[side % kGrids][i], blend.down_left, blend.left);
                step[side] = multiply_add(down[side % kGrids][i], blend.down_step, blend.step);
            }
            FASTKD_UNROLL
            for (int j = 0; j < PX; ++j) {
                A value[kSides];
                FASTKD_UNROLL
                for (int side = 0; side < kSides; ++side)
                    value[side] = multiply_add(right[side % kGrids][j], step[side], left[side]);
                f(i, j, value);
            }
            end_of_row(i);
        }
    }

    FASTKD_DEVICE void add_up(const Place& at, const Walk<A> (&start)[kSides], unsigned rows, const A (&right)[kGrids][PX],
                              const A (&down)[kGrids][PY], const int (&label)[PY][PX],
                              typename Loss::Sums (&sums)[PY][PX], typename Loss::Linear& linear) const {
        each_class(start, [&](int c, const Corners<A>(&corners)[kSides]) {
            const typename Loss::Class of = loss.of_class(pixels, at.n, c);
            Loss::add_corners(linear, corners, of);
            each_pixel(
                corners, rows, right, down,
                [&](int i, int j, const A(&value)[kSides]) {
                    A power[kSides];
                    FASTKD_UNROLL
                    for (int side = 0; side < kSides; ++side) power[side] = exp2_of(value[side]);
                    Loss::add(sums[i][j], value, power, Loss::kOwn && label[i][j] == c, of);
                },
                [](int) {});
        });
    }

    // The log-sum-exps are given; only the labelled class is read.
    FASTKD_DEVICE void take_known(const Place& at, const Walk<A>& start, unsigned rows, const A (&right)[PX], const A (&down)[PY],
                                  const int (&label)[PY][PX], uint64_t counts, typename Loss::Sums (&sums)[PY][PX]) const {
        const Blend<A> top(peaks(at));
        FASTKD_UNROLL
        for (int i = 0; i < PY; ++i) {
            if (!(rows >> i & 1)) continue;
            const A left = multiply_add(down[i], top.down_left, top.left);
            const A step_right = multiply_add(down[i], top.down_step, top.step);
            const int64_t row = at.pixel(*this, i, 0);
            constexpr int kAtOnce = PX % 4 == 0 ? 4 : PX == 9 && !kWeights ? 3 : 1;
            FASTKD_UNROLL
            for (int first = 0; first < PX; first += kAtOnce) {
                // A branch also keeps the compiler from loading for all pixels first, which would need too many registers.
                if (!(counts >> (i * PX + first) & ((uint64_t{1} << kAtOnce) - 1))) continue;
                A lse[kAtOnce];
                Corners<A> corners[kAtOnce];
                FASTKD_UNROLL
                for (int k = 0; k < kAtOnce; ++k) {  // all loads before their first use, without branches
                    const bool counted = counts >> (i * PX + first + k) & 1;
                    Walk<A> own = start;
                    const int move = counted ? label[i][first + k] * step(0) : 0;
                    own.top += move;
                    own.bottom += move;
                    lse[k] = known[counted ? row + first + k : 0];
                    corners[k] = own.next(0, beside(0));
                }
                FASTKD_UNROLL
                for (int k = 0; k < kAtOnce; ++k) {
                    const Blend<A> value(corners[k]);
                    const A x = right[first + k];
                    sums[i][first + k] = {exp2_of(lse[k] * static_cast<A>(kLog2E) - multiply_add(x, step_right, left)),
                                          multiply_add(x, multiply_add(down[i], value.down_step, value.step),
                                                       multiply_add(down[i], value.down_left, value.left))};
                }
            }
        }
    }

    struct Shares {
        A all = 0, right = 0, low = 0, low_right = 0;  // gradient summed with weights 1, right, down, right * down

        FASTKD_DEVICE void add(A x, A by_right, A by_down) {
            all += x;
            right = multiply_add(by_right, x, right);
            low = multiply_add(by_down, x, low);
            low_right = multiply_add(by_right * by_down, x, low_right);
        }
        FASTKD_DEVICE void scale(A factor) { all *= factor, right *= factor, low *= factor, low_right *= factor; }
        FASTKD_DEVICE void subtract(A factor, const Shares& other) {
            all = multiply_add(-factor, other.all, all);
            right = multiply_add(-factor, other.right, right);
            low = multiply_add(-factor, other.low, low);
            low_right = multiply_add(-factor, other.low_right, low_right);
        }
    };

    // Destination of a lane's corner gradients, one class after the other.
    struct Planes {
        A *to, *edge;
        int64_t low;  // offset from the upper to the lower corners' plane, if the lane writes both
        int w, group, classes;
        bool owns, last, first, odd;
    };
    FASTKD_DEVICE Planes planes_of(const Place& at) const {
        const int w = plan.columns.own.in, group = plan.group(), classes = plan.classes;
        const bool odd = plan.team > 1 && (at.part & 1);
        const int64_t row = at.set * lines + at.line;
        return {planes + (row * 2 + odd) * classes * w + at.x,
                edges + ((at.set * plan.groups(lines) + at.group) * 2 + odd) * classes,
                static_cast<int64_t>(classes) * w,
                w,
                group,
                classes,
                at.exists && at.part < 2 && at.x >= 0,
                at.part < 2 && at.lane % group == group - 1,
                at.lane % group == 0,
                odd};
    }

    // Merges the parts of a cell, adds the left neighbour's contribution to the left corners, and writes both to the
    // planes. kMore adds to the planes instead of overwriting.
    template <bool kMore, class Block>
    FASTKD_DEVICE void put(Block& block, Planes& planes, Shares mine) const {
        if (!beside(0)) mine.right = mine.low_right = 0;  // otherwise a weight of 0 times NaN would be NaN
        if (!below(0)) mine.low = mine.low_right = 0;
        const auto write = [](A* to, A value) { *to = kMore ? *to + value : value; };
        const A top_right = mine.right - mine.low_right, low_left = mine.low - mine.low_right;
        const A top_left = (mine.all - mine.right) - low_left, low_right = mine.low_right;
        if (plan.team > 1) {
            // Even parts keep the upper corners and receive those of the odd parts; odd parts do the same for the lower
            // corners.
            const bool odd = planes.odd;
            A left = odd ? low_left : top_left, right = odd ? low_right : top_right;
            const A give_left = odd ? top_left : low_left, give_right = odd ? top_right : low_right;
            left += block.shuffle_xor(give_left, planes.group);
            right += block.shuffle_xor(give_right, planes.group);
            FASTKD_ROLLED
            for (int bit = 2 * planes.group; bit < kWarp; bit *= 2) {
                left += block.shuffle_xor(left, bit);
                right += block.shuffle_xor(right, bit);
            }
            const A before = block.shuffle_up(right, 1);
            if (planes.owns) write(planes.to, planes.first ? left : left + before);
            if (planes.last) write(planes.edge, right);
        } else {
            const A above = block.shuffle_up(top_right, 1), below = block.shuffle_up(low_right, 1);
            if (planes.owns) {
                write(planes.to, planes.first ? top_left : top_left + above);
                write(planes.to + planes.low, planes.first ? low_left : low_left + below);
            }
            if (planes.last) {
                write(planes.edge, top_right);
                write(planes.edge + planes.classes, low_right);
            }
        }
        planes.to += planes.w;
        ++planes.edge;
    }

    // Fills the planes for all classes. If none of a lane's pixels is counted, its logits may be NaN.
    template <class Block>
    FASTKD_DEVICE void gradient(Block& block, const Place& at, const Walk<A> (&start)[kSides], unsigned rows, bool counts,
                                const A (&right)[kGrids][PX], const A (&down)[kGrids][PY], const int (&label)[PY][PX],
                                const A (&weight)[PY][PX], const A (&slope)[PY][PX], const A (&ratio)[PY][PX],
                                const Shares& spread, A factor) const {
        Planes planes = planes_of(at);
        uint64_t present = 0;  // bit (class mod 64) for each label in the warp
        if constexpr (Loss::kOwn) {
            FASTKD_UNROLL
            for (int i = 0; i < PY * PX; ++i)
                if (label[i / PX][i % PX] >= 0) present |= uint64_t{1} << (label[i / PX][i % PX] & 63);
            for (int bit = 1; bit < kWarp; bit *= 2) present |= block.shuffle_xor(present, bit);
        }
        each_class(start, [&](int c, const Corners<A>(&corners)[kSides]) {
            Shares mine;
            const typename Loss::Class of = loss.of_class(pixels, at.n, c);
            const auto add = [&](auto own) {
                A sum = 0, sum_right = 0;
                each_pixel(
                    corners, rows, right, down,
                    [&](int i, int j, const A(&value)[kSides]) {
                        A power[kSides];
                        FASTKD_UNROLL
                        for (int side = 0; side < kSides; ++side) power[side] = exp2_of(value[side]);
                        A g = Loss::share(power, slope[i][j], ratio[i][j], of);
                        if constexpr (decltype(own)::value)
                            if (label[i][j] == c) g = Loss::own(g, power, slope[i][j], kWeights ? weight[i][j] : factor, of);
                        sum += g;
                        sum_right = multiply_add(right[0][j], g, sum_right);
                    },
                    [&](int i) {
                        mine.all += sum;
                        mine.right += sum_right;
                        mine.low = multiply_add(down[0][i], sum, mine.low);
                        mine.low_right = multiply_add(down[0][i], sum_right, mine.low_right);
                        sum = sum_right = 0;
                    });
            };
            if (Loss::kOwn && (present >> (c & 63) & 1))
                add(std::bool_constant<Loss::kOwn>{});
            else
                add(std::false_type{});
            if constexpr (Loss::kSpreads) mine.subtract(of.spread, spread);
            if (!counts) mine = {};
            put<false>(block, planes, mine);
        });
    }

    // Recomputes pixels whose exponentials underflow about the maximum of their own logits, one per lane at a time.
    template <class Block>
    FASTKD_DEVICE void far_pixels(Block& block, const Place& at, uint64_t far, A factor, double& sum) const {
        typename Given<A>::Places places[kSides];
        FASTKD_UNROLL
        for (int side = 0; side < kSides; ++side) {
            const bool other = side == 1 && kGrids == 2;
            places[side] = given[side].places(at.n, other ? at.down.other : at.y, other ? at.across.other : at.x);
        }
        FASTKD_ROLLED
        for (int which = 0; which < PY * PX; ++which) {
            const bool mine = far >> which & 1;
            if (!block.any(mine)) continue;
            const int i = which / PX, j = which % PX;
            A right[kSides], down[kSides], top[kSides];
            FASTKD_UNROLL
            for (int side = 0; side < kSides; ++side) {
                right[side] = mine ? right_of(at, side, j) : A(0);
                down[side] = mine ? down_of(at, side, i) : A(0);
                top[side] = static_cast<A>(-INFINITY);
            }
            const int64_t pixel = at.pixel(*this, i, j);
            const int label = mine ? class_of(pixels, plan.classes, pixel) : -1;
            const auto value_of = [&](int side, int c) {
                return exact_value(given[side].corners(places[side], c), down[side], right[side]);
            };
            FASTKD_ROLLED
            for (int c = 0; c < plan.classes; ++c) {
                FASTKD_UNROLL
                for (int side = 0; side < kSides; ++side) {
                    const A value = value_of(side, c);
                    top[side] = value != value ? value : largest(top[side], value);
                }
            }
            typename Loss::Sums sums;
            typename Loss::Linear linear;
            const auto powers = [&](int c, A(&value)[kSides], A(&power)[kSides]) {
                FASTKD_UNROLL
                for (int side = 0; side < kSides; ++side) {
                    value[side] = value_of(side, c) - top[side];
                    power[side] = exp2_of(value[side]);
                }
            };
            FASTKD_ROLLED
            for (int c = 0; c < plan.classes; ++c) {
                A value[kSides], power[kSides];
                const typename Loss::Class of = loss.of_class(pixels, at.n, c);
                powers(c, value, power);
                Loss::add(sums, value, power, label == c, of);
                if constexpr (Loss::kSpreads) Loss::add_corners(linear, {{value[0], value[0], value[0], value[0]}}, of);
            }
            A weight = 0, even = 0, whole = 0;
            if (mine) {
                const A all = pixels.weight ? weight_at(at, weight_row(at, i), weight_column(at, j)) : A(1);
                weight = class_weight(label) * all;
                A term = weight * loss.term(sums);
                if constexpr (Loss::kSpreads) {
                    even = all * loss.even();
                    term += loss.rest(even, sums, linear, down[0], right[0]);
                    even *= factor;
                    whole = loss.whole(even, linear);
                }
                sum += static_cast<double>(term);
                if (!kGradient && terms) terms[pixel] = term * scale;
                if (Loss::kWritesSums && !kGradient && sums_of)
                    sums_of[pixel] = (top[0] + log2_of(sums.sum)) * static_cast<A>(kLn2);
                weight *= factor * loss.gradient(sums);
                whole += weight;
            }
            if constexpr (kGradient) {
                const A slope = whole / sums.sum, ratio = mine ? loss.ratio(sums, at.n, label) : A(0);
                Planes planes = planes_of(at);
                FASTKD_ROLLED
                for (int c = 0; c < plan.classes; ++c) {
                    A value[kSides], power[kSides];
                    const typename Loss::Class of = loss.of_class(pixels, at.n, c);
                    powers(c, value, power);
                    A g = Loss::share(power, slope, ratio, of);
                    if (Loss::kOwn && label == c) g = Loss::own(g, power, slope, weight, of);
                    if constexpr (Loss::kSpreads) g = multiply_add(-of.spread, even, g);
                    if (!mine) g = 0;
                    put<true>(block, planes, {g, right[0] * g, down[0] * g, right[0] * down[0] * g});
                }
            }
        }
    }
};

}  // namespace fastkd::gpu

// Dice at label resolution: sums over the label pixels of each class and sample, and the gradient of any function of
// these sums (formulas in fastkd/ops/resized_dice.py).
//
// Sums: a first loop over the classes computes the log-sum-exps, a second one the probabilities. A warp sums its label
// pixels, at most 1024 per class and sample, as a tree, and writes the numbers of a class contiguously. DiceJoin adds
// the warps of a sample in fp64. Gradient: a loss of cells.h that takes the upstream gradient per class.
#pragma once

#include "losses.h"

namespace fastkd::gpu {

// Fields of the upstream gradient per class and sample, one per column of the sums.
struct UpstreamOfClass {
    static constexpr int sum = 0, spread = 1, intersection = 2, own = 3, count = 4;
};

template <class T>
struct DiceLoss : SoftmaxLoss<T, 1> {
    using A = T;
    static constexpr int kFirstShapes = kFewShapes;
    static constexpr bool kForward = false, kOwn = true, kSpreads = true, kWide = true;
    // Squared exponentials are scaled by kLift, and `near` requires sums above kNearSquares: then a square that
    // underflows below 2^-126 belongs to a probability below 2^-29.
    static constexpr double kLift = 0x1p64, kNearSquares = 0x1p-56;

    const A* upstream;  // (n, classes, UpstreamOfClass::count)
    const A* whole_of;  // (n,): sum of `spread` over the classes
    int classes;
    A square;  // 1, or 0: sums of p instead of p^2

    struct Sums {
        A sum = 0, own = 0, dot = 0;
    };
    struct Class {
        A once, twice, spread, intersection, own;  // once: gradient of sum p; twice: 2 * gradient of sum p^2
    };
    struct Linear {};
    FASTKD_DEVICE const A* of(int64_t n, int c) const { return upstream + (n * classes + c) * UpstreamOfClass::count; }
    FASTKD_DEVICE Class of_class(const LabelPixels&, int64_t n, int c) const {
        A at[UpstreamOfClass::count];
        if constexpr (sizeof(A) == 4)
            load<A, UpstreamOfClass::count>(of(n, c), at);
        else
            for (int i = 0; i < UpstreamOfClass::count; ++i) at[i] = of(n, c)[i];
        const A b = at[UpstreamOfClass::sum];
        return {b * (1 - square), 2 * b * square, at[UpstreamOfClass::spread], at[UpstreamOfClass::intersection],
                at[UpstreamOfClass::own]};
    }
    FASTKD_DEVICE static void add(Sums& sums, const A (&value)[1], const A (&power)[1], bool own, const Class& of) {
        sums.sum += power[0];
        if (own) sums.own = value[0];
        sums.dot = multiply_add(power[0], multiply_add(power[0], of.twice * static_cast<A>(kLift), of.once), sums.dot);
    }
    FASTKD_DEVICE static void add_corners(Linear&, const Corners<A> (&)[1], const Class&) {}
    FASTKD_DEVICE static bool near(const Sums& sums) { return sums.sum >= static_cast<A>(kNearSquares); }
    FASTKD_DEVICE static A term(const Sums&) { return 0; }
    FASTKD_DEVICE static A even() { return 1; }
    FASTKD_DEVICE static A whole(A, const Linear&) { return 0; }
    FASTKD_DEVICE static A rest(A, const Sums&, const Linear&, A, A) { return 0; }
    // Factor common to all classes of a label pixel; multiplied by their probability.
    FASTKD_DEVICE A ratio(const Sums& sums, int64_t n, int label) const {
        const A* own = of(n, label);
        A dot = sums.dot / sums.sum;
        if (square != 0) dot = dot / sums.sum * static_cast<A>(1 / kLift);
        return own[UpstreamOfClass::own] + whole_of[n] -
               multiply_add(own[UpstreamOfClass::intersection], exp2_of(sums.own) / sums.sum, dot);
    }
    FASTKD_DEVICE static A share(const A (&power)[1], A slope, A ratio, const Class& of) {
        const A p = power[0] * slope;
        return p * (multiply_add(of.twice, p, of.once) + ratio);
    }
    FASTKD_DEVICE static A own(A share, const A (&power)[1], A slope, A, const Class& of) {
        return share + multiply_add(of.intersection, power[0] * slope, -of.own);
    }
};

// Converts the upstream gradient (n, c, columns) to the format of the loop; one block per sample.
template <class A>
struct DiceUpstream {
    static constexpr int kBlocksPerCores = 4;

    const double* grad;
    int64_t classes;
    int columns;
    A *upstream, *whole_of;

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        const double* from = grad + block.index() * classes * columns;
        A* to = upstream + block.index() * classes * UpstreamOfClass::count;
        double whole = 0;
        for (int64_t c = block.thread(); c < classes; c += kThreads) {
            const double* of = from + c * columns;
            A* put = to + c * UpstreamOfClass::count;
            const double spread = columns > 4 ? of[4] : 0;
            put[UpstreamOfClass::intersection] = static_cast<A>(of[0]);
            put[UpstreamOfClass::sum] = static_cast<A>(of[1]);
            put[UpstreamOfClass::own] = columns > 3 ? static_cast<A>(of[3]) : A(0);
            put[UpstreamOfClass::spread] = static_cast<A>(spread);
            whole += spread;
        }
        whole = sum_block(block, whole, block.template shared<double>(0));
        if (block.thread() == 0) whole_of[block.index()] = static_cast<A>(whole);
    }
};

template <class T>
struct DiceSumsLoss : SoftmaxLoss<T, 1> {
    using A = T;
    using typename SoftmaxLoss<T, 1>::Class;
    static constexpr int kFirstShapes = kFewShapes;
    static constexpr bool kGradient = false, kOwn = true;

    struct Sums {
        A sum = 0, own = 0;
    };
    FASTKD_DEVICE static void add(Sums& sums, const A (&value)[1], const A (&power)[1], bool own, const Class&) {
        sums.sum += power[0];
        if (own) sums.own = value[0];
    }
    FASTKD_DEVICE static A surprise(const Sums& sums) {
        if (sums.own < static_cast<A>(kMasked)) return static_cast<A>(INFINITY);
        const A loss = (log2_of(sums.sum) - sums.own) * static_cast<A>(kLn2);
        return loss < 0 ? A(0) : loss;
    }
};

template <class T, int PY, int PX>
struct CellsDice : Cells<DiceSumsLoss<T>, PY, PX, false> {
    using Base = Cells<DiceSumsLoss<T>, PY, PX, false>;
    using A = T;
    using Loss = DiceSumsLoss<T>;
    using typename Base::Place;
    using typename Base::Shares;
    static constexpr int kBlocksPerCores = PY * PX > 16 || sizeof(A) == 8 ? 4 : 8;
    static constexpr bool kAddsClasses = true;

    A square;       // 1, or 0
    A* class_sums;  // (rows, classes, plan.sums)

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        const CellsPlan& plan = this->plan;
        const int lane = block.thread() % kWarp;
        const int64_t warp = block.index() * (Base::kThreadsOfBlock / kWarp) + block.thread() / kWarp;
        if (warp >= plan.warps(this->lines)) return;
        const Place at = this->place_of(warp, lane);
        A right[1][PX], down[1][PY];
        int label[PY][PX];
        uint64_t counts = 0;
        const unsigned rows = this->setup(block, at, right, down, label, counts);
        Walk<A> start[1] = {this->walk(at, 0)};
        typename Loss::Sums sums[PY][PX] = {};
        typename Loss::Linear linear;
        if (rows != 0) this->add_up(at, start, rows, right, down, label, sums, linear);

        uint64_t far = 0, present = 0;
        A slope[PY][PX], loss[PY][PX], logs = 0;
        Shares counted;  // for the sums of logits, which are linear in the corners
        FASTKD_UNROLL
        for (int i = 0; i < PY * PX; ++i) {
            const typename Loss::Sums& mine = sums[i / PX][i % PX];
            const bool near = counts >> i & 1 && Loss::near(mine);
            if (counts >> i & 1 && !near) far |= uint64_t{1} << i;
            int& which = label[i / PX][i % PX];
            slope[i / PX][i % PX] = near ? 1 / mine.sum : A(0);
            loss[i / PX][i % PX] = near && plan.sums > 3 ? Loss::surprise(mine) : A(0);
            if (near) {
                logs += log2_of(mine.sum);
                counted.add(1, right[0][i % PX], down[0][i / PX]);
                present |= uint64_t{1} << (which & 63);
            } else {
                which = -1;
            }
        }
        for (int bit = 1; bit < kWarp; bit *= 2) present |= block.shuffle_xor(present, bit);
        const bool any = (counts & ~far) != 0;  // else the logits may be NaN
        const A top_right = counted.right - counted.low_right, low_left = counted.low - counted.low_right;
        const A top_left = (counted.all - counted.right) - low_left, low_right = counted.low_right;
        const Samples samples = samples_of(at);

        this->each_class(start, [&](int c, const Corners<A>(&corners)[1]) {
            OfClass mine;
            const auto add = [&](auto own) {
                this->each_pixel(
                    corners, rows, right, down,
                    [&](int i, int j, const A(&value)[1]) {
                        const A p = exp2_of(value[0]) * slope[i][j];
                        mine.sum = multiply_add(p, multiply_add(p, square, 1 - square), mine.sum);
                        if constexpr (decltype(own)::value)
                            if (label[i][j] == c) {
                                mine.intersection += p;
                                mine.count += 1;
                                mine.own += loss[i][j];
                            }
                    },
                    [](int) {});
            };
            const bool here = present >> (c & 63) & 1;
            if (here)
                add(std::true_type{});
            else
                add(std::false_type{});
            if (plan.sums > 4) {
                const A logits = multiply_add(low_right, corners[0].bottom_right,
                                              multiply_add(low_left, corners[0].bottom_left,
                                                           multiply_add(top_right, corners[0].top_right,
                                                                        top_left * corners[0].top_left)));
                mine.all = nats(logs - logits);
            }
            if (!any) mine = {};
            put<false>(block, at, samples, c, here, mine);
        });
        if (block.any(far != 0)) far_pixels(block, at, far, samples);
    }

private:
    struct OfClass {
        A intersection = 0, sum = 0, count = 0, own = 0, all = 0;
    };
    struct Samples {
        int64_t first, last, row;  // samples of a warp; row of class_sums of the first, in units of sets
    };

    // Infinite for a masked class.
    FASTKD_DEVICE static A nats(A x) {
        return x > static_cast<A>(-kMasked) ? static_cast<A>(INFINITY) : x * static_cast<A>(kLn2);
    }
    FASTKD_DEVICE Samples samples_of(const Place& at) const {
        const CellsPlan& plan = this->plan;
        const int64_t cells = plan.columns.own.cells(), from = at.group * plan.group();
        const int64_t last = least(from + plan.group(), this->lines * cells) - 1;
        const int64_t n = plan.sample(this->first + from / cells);
        return {n, plan.sample(this->first + last / cells), at.group + n - plan.sample(this->first)};
    }

    // Sums a warp's numbers of a class for each sample that it has cells of. `own`: whether any label is that class.
    template <bool kMore, class Block>
    FASTKD_DEVICE void put(Block& block, const Place& at, const Samples& samples, int c, bool own, const OfClass& mine) const {
        const int columns = this->plan.sums, lane = at.lane;
        const auto sum = [&](A x) {
            for (int bit = 1; bit < kWarp; bit *= 2) x += block.shuffle_xor(x, bit);
            return x;
        };
        FASTKD_ROLLED
        for (int64_t n = samples.first; n <= samples.last; ++n) {
            const OfClass part = at.exists && at.n == n ? mine : OfClass{};
            OfClass all;
            all.sum = sum(part.sum);
            if (own) {
                all.intersection = sum(part.intersection);
                all.count = sum(part.count);
                if (columns > 3) all.own = sum(part.own);
            }
            if (columns > 4) all.all = sum(part.all);
            const int64_t row = (samples.row + n - samples.first) * this->plan.sets + at.set;
            A* to = class_sums + (row * this->plan.classes + c) * columns + lane;
            const A value = lane == 0   ? all.intersection
                            : lane == 1 ? all.sum
                            : lane == 2 ? all.count
                            : lane == 3 ? all.own
                                        : all.all;
            if (lane < columns) *to = kMore ? *to + value : value;
        }
    }

    // As in Cells.
    template <class Block>
    FASTKD_DEVICE void far_pixels(Block& block, const Place& at, uint64_t far, const Samples& samples) const {
        const auto places = this->given[0].places(at.n, at.y, at.x);
        FASTKD_ROLLED
        for (int which = 0; which < PY * PX; ++which) {
            const bool mine = far >> which & 1;
            if (!block.any(mine)) continue;
            const int i = which / PX, j = which % PX, classes = this->plan.classes;
            const A right = mine ? this->right_of(at, 0, j) : A(0), down = mine ? this->down_of(at, 0, i) : A(0);
            const int label = mine ? class_of(this->pixels, classes, at.pixel(*this, i, j)) : -1;
            const auto value_of = [&](int c) { return exact_value(this->given[0].corners(places, c), down, right); };
            A top = static_cast<A>(-INFINITY);
            FASTKD_ROLLED
            for (int c = 0; c < classes; ++c) {
                const A value = value_of(c);
                top = value != value ? value : largest(top, value);
            }
            typename Loss::Sums sums;
            FASTKD_ROLLED
            for (int c = 0; c < classes; ++c) {
                const A value[1] = {value_of(c) - top}, power[1] = {exp2_of(value[0])};
                Loss::add(sums, value, power, label == c, {});
            }
            const A slope = 1 / sums.sum, log = log2_of(sums.sum);
            FASTKD_ROLLED
            for (int c = 0; c < classes; ++c) {
                const A value = value_of(c) - top, p = exp2_of(value) * slope;
                OfClass of;
                if (mine) {
                    of.sum = p * multiply_add(p, square, 1 - square);
                    of.all = nats(log - value);
                    if (label == c) of.intersection = p, of.count = 1, of.own = Loss::surprise(sums);
                }
                put<true>(block, at, samples, c, true, of);
            }
        }
    }
};

// Adds the rows of each sample of a chunk to the result of the previous chunks.
template <class A>
struct DiceJoin {
    static constexpr int kBlocksPerCores = 4;

    CellsPlan plan;
    int64_t first, lines;
    int pieces;  // parts per sample
    const A* class_sums;
    double* parts;  // (pieces, n, classes * plan.sums)

    FASTKD_ANYWHERE int64_t numbers() const { return static_cast<int64_t>(plan.classes) * plan.sums; }
    FASTKD_ANYWHERE int64_t tiles() const { return ceil_div(numbers(), kWarp); }
    FASTKD_ANYWHERE int64_t blocks() const { return plan.samples(first, lines) * pieces * tiles(); }

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        const int lane = block.thread() % kWarp, warp = block.thread() / kWarp;
        const int64_t number = block.index() % tiles() * kWarp + lane, rest = block.index() / tiles();
        const int64_t piece = rest % pieces, n = plan.sample(first) + rest / pieces;
        const int64_t tall = plan.rows.own.cells(), wide = plan.columns.own.cells();
        const int64_t begin = most(first, n * tall) - first, end = least(first + lines, (n + 1) * tall) - first;
        const int64_t from = begin * wide / plan.group(), last = (end * wide - 1) / plan.group();
        double sum = 0;
        for (int64_t group = from + piece * kWarps + warp; group <= last; group += pieces * kWarps)
            for (int set = 0; set < plan.sets && number < numbers(); ++set)
                sum += static_cast<double>(
                    class_sums[((group + n - plan.sample(first)) * plan.sets + set) * numbers() + number]);
        double* shared = block.template shared<double>(0);  // (kWarps, kWarp)
        shared[warp * kWarp + lane] = sum;
        block.sync();
        if (warp > 0 || number >= numbers()) return;
        for (int i = 1; i < kWarps; ++i) sum += shared[i * kWarp + lane];
        double* to = parts + (piece * plan.n + n) * numbers() + number;
        *to = first > n * tall ? *to + sum : sum;
    }
};

struct DiceTotal {
    static constexpr int kBlocksPerCores = 4;

    const double* parts;
    int64_t total;  // n * classes * plan.sums
    int pieces;
    double* sums;

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        const int64_t i = block.index() * kThreads + block.thread();
        if (i >= total) return;
        double sum = 0;
        for (int piece = 0; piece < pieces; ++piece) sum += parts[piece * total + i];
        sums[i] = sum;
    }
};

template <class Launch>
void resized_dice_forward(const ResizedDice& a, const Launch& launch) {
    const auto run = [&](auto zero) {
        using A = decltype(zero);
        const CellsPlan& plan = a.on.choice.plan;
        const auto make = [&](auto shape, auto) {
            CellsDice<A, decltype(shape)::rows, decltype(shape)::columns> body{};
            body.square = a.square ? A(1) : A(0);
            return body;
        };
        run_loss<DiceSumsLoss<A>>(a.on, 0, 1, make, launch, [&](const auto& body, const auto& buffers) {
            const DiceJoin<A> join{plan, body.first, body.lines, dice_pieces(plan), buffers.sums, a.parts};
            launch(join, join.blocks(), kThreads * 8);
        });
        const int64_t total = static_cast<int64_t>(plan.n) * plan.classes * plan.sums;
        launch(DiceTotal{a.parts, total, dice_pieces(plan), a.sums}, ceil_div(total, kThreads), 0);
    };
    a.on.maps[0].type == DType::f64 ? run(double{}) : run(float{});
}

template <class Launch>
void resized_dice_backward(const ResizedDice& a, const Launch& launch) {
    const auto run = [&](auto zero) {
        using A = decltype(zero);
        const int64_t n = a.on.maps[0].n, classes = a.on.maps[0].c;
        A* upstream = static_cast<A*>(a.upstream);
        A* whole_of = upstream + n * classes * UpstreamOfClass::count;
        launch(DiceUpstream<A>{a.grad, classes, a.columns, upstream, whole_of}, n, kSumScratch);
        resized(a.on, DiceLoss<A>{{}, upstream, whole_of, static_cast<int>(classes), a.square ? A(1) : A(0)}, launch);
    };
    a.on.maps[0].type == DType::f64 ? run(double{}) : run(float{});
}

}  // namespace fastkd::gpu

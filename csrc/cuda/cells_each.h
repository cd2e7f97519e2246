// Losses at label resolution with one sigmoid per class: sigmoid KD and binary cross-entropy.
//
// Same decomposition into cells as cells.h. The classes of a label pixel are independent, so a single loop over them
// computes loss and gradient, and no maximum is subtracted.
#pragma once

#include "cells_run.h"
#include "sigmoid.h"

namespace fastkd::gpu {

// The members of a loss that cells.h requires.
template <class T, int sides, int grids>
struct EachLoss {
    using A = T;
    static constexpr int kSides = sides, kGrids = grids;
    static constexpr int kFirstShapes = kFewShapes;
    static constexpr bool kGradient = true, kForward = true, kOwn = false, kWeights = false, kKnown = false;
    static constexpr bool kWide = false, kManySums = false, kWeighed = true;

    struct Sums {};
    struct Linear {};
};

template <class T, int sides, int grids, int PY, int PX, bool kGradient>
struct CellsEach : Cells<EachLoss<T, sides, grids>, PY, PX, kGradient> {
    using Base = Cells<EachLoss<T, sides, grids>, PY, PX, kGradient>;
    using A = T;
    using typename Base::Place;
    using typename Base::Planes;
    using typename Base::Shares;
    static constexpr bool kCentred = false;

protected:
    // Weights of a thread's label pixels from map `n`: 0 for uncounted pixels.
    FASTKD_DEVICE void weigh(const Place& at, int64_t n, uint64_t counts, A (&weight)[PY][PX]) const {
        Place from = at;
        from.n = n;
        FASTKD_UNROLL
        for (int j = 0; j < PX; ++j) {
            const typename Base::Between across = this->pixels.weight ? this->weight_column(at, j) : typename Base::Between{};
            FASTKD_UNROLL
            for (int i = 0; i < PY; ++i) {
                weight[i][j] = counts >> (i * PX + j) & 1 ? A(1) : A(0);
                if (this->pixels.weight && weight[i][j] != 0)
                    weight[i][j] = this->weight_at(from, this->weight_row(at, i), across);
            }
        }
    }

    // Fills the planes with f(class, corners), the gradient shares of a class.
    template <class Block, class F>
    FASTKD_DEVICE void each_gradient(Block& block, const Place& at, const Walk<A> (&start)[sides], uint64_t counts, A factor,
                                     const F& f) const {
        Planes planes{};
        if constexpr (kGradient) planes = this->planes_of(at);
        this->each_class(start, [&](int c, const Corners<A>(&corners)[sides]) {
            Shares mine = f(c, corners);
            if constexpr (kGradient) {
                mine.scale(factor);
                if (counts == 0) mine = {};  // the logits may be NaN
                this->template put<false>(block, planes, mine);
            }
        });
    }

    // Sums of the gradients of(row, column, logits), weighted for each corner.
    template <class F>
    FASTKD_DEVICE static Shares shares_of(const Corners<A> (&corners)[sides], unsigned rows, const A (&right)[grids][PX],
                                          const A (&down)[grids][PY], const F& of) {
        Shares mine;
        A sum = 0, sum_right = 0;
        Base::each_pixel(
            corners, rows, right, down,
            [&](int i, int j, const A(&value)[sides]) {
                const A g = of(i, j, value);
                if constexpr (kGradient) {
                    sum += g;
                    sum_right = multiply_add(right[0][j], g, sum_right);
                }
            },
            [&](int i) {
                if constexpr (kGradient) {
                    mine.all += sum;
                    mine.right += sum_right;
                    mine.low = multiply_add(down[0][i], sum, mine.low);
                    mine.low_right = multiply_add(down[0][i], sum_right, mine.low_right);
                    sum = sum_right = 0;
                }
            });
        return mine;
    }

    template <class Block>
    FASTKD_DEVICE void finish(Block& block, int lane, int64_t warp, double sum) const {
        if (!this->parts) return;
        for (int bit = 1; bit < kWarp; bit *= 2) sum += block.shuffle_xor(sum, bit);
        if (lane == 0) this->parts[warp] = sum;
    }
};

// kSame: student and teacher maps have the same size.
template <class T, bool kSame, int PY, int PX, bool kGradient>
struct CellsKdSigmoid : CellsEach<T, 2, kSame ? 1 : 2, PY, PX, kGradient> {
    using Base = CellsEach<T, 2, kSame ? 1 : 2, PY, PX, kGradient>;
    using A = T;
    static constexpr int kGrids = kSame ? 1 : 2;

    A temperature;

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        const int lane = block.thread() % kWarp;
        const int64_t warp = block.index() * (Base::kThreadsOfBlock / kWarp) + block.thread() / kWarp;
        if (warp >= this->plan.warps(this->lines)) return;
        const A factor = this->factor_of(block, lane) * temperature;
        const typename Base::Place at = this->place_of(warp, lane);
        A right[kGrids][PX], down[kGrids][PY], weight[PY][PX], kl[PY][PX] = {};
        int label[PY][PX];
        uint64_t counts = 0;
        const unsigned rows = this->setup(block, at, right, down, label, counts);
        this->weigh(at, at.n, counts, weight);
        Walk<A> start[2] = {this->walk(at, 0), this->walk(at, 1)};
        this->each_gradient(block, at, start, counts, factor, [&](int, const Corners<A>(&corners)[2]) {
            return Base::shares_of(corners, rows, right, down, [&](int i, int j, const A(&value)[2]) {
                const Bernoulli<A> of(value[0], value[1]);
                kl[i][j] += of.kl;
                return of.difference * weight[i][j];
            });
        });
        double sum = 0;
        FASTKD_UNROLL
        for (int i = 0; i < PY; ++i) {
            FASTKD_UNROLL
            for (int j = 0; j < PX; ++j) {
                const A loss = kl[i][j] < 0 ? A(0) : kl[i][j];
                const A term = counts >> (i * PX + j) & 1 ? weight[i][j] * (loss * (temperature * temperature)) : A(0);
                sum += static_cast<double>(term);
                if (!kGradient && this->terms && i < at.rows() && j < at.columns())
                    this->terms[at.pixel(*this, i, j)] = term * this->scale;
            }
        }
        this->finish(block, lane, warp, sum);
    }
};

template <class T, int PY, int PX, bool kGradient>
struct CellsBinary : CellsEach<T, 1, 1, PY, PX, kGradient> {
    using Base = CellsEach<T, 1, 1, PY, PX, kGradient>;
    using A = T;
    static constexpr int kBlocksPerCores = !kGradient && PY * PX > 16 ? 4 : Base::kBlocksPerCores;

    const uint64_t* codes;  // (n, classes, height, code_words(width))
    const A* pos_weight;    // null, or (classes,)
    int weight_classes;     // classes of pixels.weight: 1 or all

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        const int lane = block.thread() % kWarp;
        const int64_t warp = block.index() * (Base::kThreadsOfBlock / kWarp) + block.thread() / kWarp;
        if (warp >= this->plan.warps(this->lines)) return;
        const A factor = this->factor_of(block, lane);
        const typename Base::Place at = this->place_of(warp, lane);
        A right[1][PX], down[1][PY], weight[PY][PX];
        int label[PY][PX];
        uint64_t exists = 0;
        const unsigned rows = this->setup(block, at, right, down, label, exists);
        Walk<A> start[1] = {this->walk(at, 0)};
        const int height = this->plan.rows.own.out, width = this->plan.columns.own.out, classes = this->plan.classes;
        const int64_t words = code_words(width);
        double sum = 0;
        this->each_gradient(block, at, start, exists, factor, [&](int c, const Corners<A>(&corners)[1]) {
            if (c == 0 || weight_classes > 1) this->weigh(at, at.n * weight_classes + (weight_classes > 1 ? c : 0), exists, weight);
            const int64_t row = (at.n * classes + c) * height + at.down.begin;
            unsigned ones[PY], valid[PY];
            FASTKD_UNROLL
            for (int i = 0; i < PY; ++i) {
                ones[i] = valid[i] = 0;
                if (i >= at.rows() || at.columns() <= 0) continue;
                const int bit = at.across.begin % kWarp;
                const uint64_t* from = codes + (row + i) * words + at.across.begin / kWarp;
                const uint64_t code = from[0], next = bit + at.columns() > kWarp ? from[1] : 0;
                ones[i] = bits_of(code, next, 0, bit);
                valid[i] = bits_of(code, next, kWarp, bit);
            }
            const A positive = pos_weight ? pos_weight[c] : A(1);
            A loss = 0;
            const auto mine = Base::shares_of(corners, rows, right, down, [&](int i, int j, const A(&value)[1]) {
                const bool one = ones[i] >> j & 1, valid_one = valid[i] >> j & 1;
                const Softplus<A> of(one ? -value[0] : value[0]);
                const A by = weight[i][j] * (one ? positive : A(1));
                const A term = valid_one ? by * of.value : A(0);
                loss += term;
                if (!kGradient && this->terms && i < at.rows() && j < at.columns())
                    this->terms[(row + i) * width + at.across.begin + j] = term * this->scale;
                return valid_one ? (one ? -of.slope : of.slope) * by : A(0);
            });
            sum += static_cast<double>(loss);
            return mine;
        });
        this->finish(block, lane, warp, sum);
    }

private:
    // Bits from `bit` on of one half of a word, continued in the next word.
    FASTKD_DEVICE static unsigned bits_of(uint64_t code, uint64_t next, int half, int bit) {
        const uint64_t both = (code >> half & 0xffffffffu) | next >> half << kWarp;
        return static_cast<unsigned>(both >> bit);
    }
};

// Reads the targets once: counts them and packs 32 per word. A warp packs 32 neighbouring words at a time, one per lane.
struct BinaryCodes {
    static constexpr int kBlocksPerCores = 4;

    LabelPixels pixels;
    int64_t rows, width;
    uint64_t* codes;
    double* parts;  // (blocks,): counted targets
    int blocks;

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        int64_t n = 0;
        const bool vectors = width % kVector == 0 && reinterpret_cast<uintptr_t>(pixels.target) % kVector == 0;
        const bool bytes = pixels.label == Label::u8 && vectors;
        const int64_t start = block.index() * kThreads + (bytes ? block.thread() : block.thread() / kWarp * kWarp);
        const Word word = word_at(start);
        const Step step = step_of(static_cast<int64_t>(blocks) * kThreads);
        if (bytes)
            pack_bytes(start, word, step, n);
        else
            with_targets(pixels, [&](const auto* target) { pack(block, target, start, word, step, n); });
        const double sum = sum_block(block, static_cast<double>(n), block.template shared<double>(0));
        if (block.thread() == 0) parts[block.index()] = sum;
    }

private:
    static constexpr int kVector = sizeof(Bits128);

    // The targets of a word.
    struct Word {
        int64_t at;  // index of the first one
        int left;    // from there to the end of the row
    };
    FASTKD_DEVICE Word word_at(int64_t word) const {
        const int64_t words = code_words(width), row = word / words, x = word % words * kWarp;
        return {row * width + x, static_cast<int>(width - x)};
    }
    // Moves by a fixed number of words, without a division per word.
    struct Step {
        int64_t words, at, wrap;
        int across, row;

        FASTKD_DEVICE void advance(Word& word) const {
            word.at += at;
            word.left -= across;
            if (word.left > 0) return;
            word.at -= wrap;
            word.left += row;
        }
    };
    FASTKD_DEVICE Step step_of(int64_t by) const {
        const int64_t words = code_words(width), across = by % words * kWarp, row = words * kWarp;
        return {by, by / words * width + across, row - width, static_cast<int>(across), static_cast<int>(row)};
    }

    // 16 targets per load, and each lane packs its own word. Rows are multiples of 16 targets.
    FASTKD_DEVICE void pack_bytes(int64_t start, Word word, const Step& step, int64_t& n) const {
        constexpr int kAtOnce = 2;  // words of a lane whose loads are in flight together
        const auto* target = static_cast<const uint8_t*>(pixels.target);
        const int64_t words = rows * code_words(width);
        FASTKD_ROLLED
        for (int64_t first = start; first < words; first += kAtOnce * step.words) {
            Bits128 bits[kAtOnce][2];
            FASTKD_UNROLL
            for (int k = 0; k < kAtOnce; ++k) {
                const bool exists = first + k * step.words < words;
                bits[k][0] = vector_of(target + word.at, exists);
                bits[k][1] = vector_of(target + word.at + kVector, exists && word.left > kVector);
                step.advance(word);
            }
            FASTKD_UNROLL
            for (int k = 0; k < kAtOnce; ++k) {
                const uint64_t code = code_of(bits[k]);
                n += count_bits(static_cast<uint32_t>(code >> kWarp));
                if (first + k * step.words < words) codes[first + k * step.words] = code;
            }
        }
    }
    FASTKD_DEVICE static Bits128 vector_of(const uint8_t* from, bool exists) {
        if (exists) return *reinterpret_cast<const Bits128*>(from);
        Bits128 out;
        memset(&out, 0xff, sizeof out);  // not counted
        return out;
    }
    // Four targets at a time, in the high bits of the bytes of a register.
    FASTKD_DEVICE uint64_t code_of(const Bits128 (&bits)[2]) const {
        uint32_t four[2 * kVector / 4], zeros = 0, ones = 0;
        memcpy(four, bits, sizeof four);
        FASTKD_UNROLL
        for (int i = 2 * kVector / 4 - 1; i >= 0; --i) {
            const uint32_t lowest = four[i] << 7, others = ((four[i] & 0xfefefefeu) >> 1) + 0x7f7f7f7fu;
            zeros = zeros << 4 | nibble(~others & ~lowest & 0x80808080u);
            ones = ones << 4 | nibble(~others & lowest & 0x80808080u);
        }
        return code_of(zeros, ones);
    }
    // The word of 32 targets from the bits of zeros and ones, either of which may be ignored.
    FASTKD_DEVICE uint64_t code_of(uint32_t zeros, uint32_t ones) const {
        if (pixels.ignore_index == 0) zeros = 0;
        if (pixels.ignore_index == 1) ones = 0;
        return static_cast<uint64_t>(zeros | ones) << kWarp | ones;
    }
    // Bits 7, 15, 23 and 31 of x; the product has them in its highest bits, and nothing carries into those.
    FASTKD_DEVICE static uint32_t nibble(uint32_t x) { return x * 0x00204081u >> 28; }

    // For every dtype, width and alignment: the lanes read the targets of a word, then of the next one.
    template <class L, class Block>
    FASTKD_DEVICE void pack(Block& block, const L* target, int64_t start, Word word, const Step& step, int64_t& n) const {
        constexpr int kAtOnce = sizeof(L) == 1 ? 16 : 8;  // words whose loads are in flight together
        const int lane = block.thread() % kWarp;
        const int64_t words = rows * code_words(width), total = rows * width;
        FASTKD_ROLLED
        for (int64_t first = start; first < words; first += step.words, step.advance(word)) {
            const L* from = target + word.at + lane;
            int end = static_cast<int>(least(total - word.at, kWarp * kWarp)) - lane, left = word.left;
            uint32_t zeros = 0, ones = 0;
            FASTKD_ROLLED
            for (int batch = lane; batch > lane - kWarp; batch -= kAtOnce) {
                L label[kAtOnce];
                FASTKD_UNROLL
                for (int k = 0; k < kAtOnce; ++k) {
                    const int count = least(left, kWarp);
                    label[k] = 2;  // not counted
                    if (lane < count && end > 0) label[k] = *from;
                    from += count;
                    end -= count;
                    left = left > kWarp ? left - kWarp : static_cast<int>(width);
                }
                FASTKD_UNROLL
                for (int k = 0; k < kAtOnce; ++k) {
                    const uint32_t zero = block.ballot(label[k] == 0), one = block.ballot(label[k] == 1);
                    if (batch == k) {
                        zeros = zero;
                        ones = one;
                    }
                }
            }
            const uint64_t code = code_of(zeros, ones);
            n += count_bits(static_cast<uint32_t>(code >> kWarp));
            if (first + lane < words) codes[first + lane] = code;
        }
    }
};

template <class Launch>
void resized_kd_sigmoid(const Resized& a, const Launch& launch) {
    const auto run = [&](auto zero, auto same) {
        using A = decltype(zero);
        constexpr bool kSame = decltype(same)::value;
        const auto make = [&](auto shape, auto gradient) {
            CellsKdSigmoid<A, kSame, decltype(shape)::rows, decltype(shape)::columns, decltype(gradient)::value> body{};
            body.temperature = static_cast<A>(a.temperature);
            return body;
        };
        resized_as<EachLoss<A, 2, kSame ? 1 : 2>>(a, make, launch);
    };
    const auto run_as = [&](auto zero) {
        a.choice.plan.same_size() ? run(zero, std::true_type{}) : run(zero, std::false_type{});
    };
    a.maps[0].type == DType::f64 ? run_as(double{}) : run_as(float{});
}

template <class Launch>
void resized_binary_cross_entropy(const ResizedBinaryCrossEntropy& a, const Launch& launch) {
    const auto run = [&](auto zero) {
        using A = decltype(zero);
        const CellsPlan& plan = a.on.choice.plan;
        const int64_t height = plan.rows.own.out, width = plan.columns.own.out;
        const int64_t rows = static_cast<int64_t>(plan.n) * plan.classes * height;
        LabelPixels elements{};
        elements.target = a.target;
        elements.label = a.label;
        elements.ignore_index = a.ignore_index;
        const int counters = code_blocks(rows * code_words(width));
        launch(BinaryCodes{elements, rows, width, a.codes, a.on.count_parts, counters}, counters, kSumScratch);
        const auto make = [&](auto shape, auto gradient) {
            CellsBinary<A, decltype(shape)::rows, decltype(shape)::columns, decltype(gradient)::value> body{};
            body.codes = a.codes;
            body.pos_weight = static_cast<const A*>(a.pos_weight);
            body.weight_classes = static_cast<int>(a.weight_classes);
            return body;
        };
        Resized on = a.on;
        on.pixels.weight = a.weight;
        on.pixels.weight_h = a.weight_h;
        on.pixels.weight_w = a.weight_w;
        const bool mean = on.reduce == Reduce::mean;
        run_loss<EachLoss<A, 1, 1>>(on, mean ? counters : 0, on.scale, make, launch, NothingAfter{});
        launch_total(Total<A>{nullptr, total_warps(plan), on.count_parts, counters, rows * width, mean, on.scale,
                              static_cast<A*>(on.loss), static_cast<A*>(on.count)},
                     on.parts, launch);
    };
    a.on.maps[0].type == DType::f64 ? run(double{}) : run(float{});
}

}  // namespace fastkd::gpu

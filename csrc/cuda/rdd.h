// RDD's relatively difficult pixels (docs/rdd.md), and the exact k-th smallest number for their threshold.
#pragma once

#include "kernels.h"
#include "pixels.h"

namespace fastkd::gpu {

// K-th smallest
//
// Radix select with 8-bit digits from the highest. Per digit, many blocks count it among the numbers whose higher digits
// match those of the k-th, and add their counts to those of the pass: integers, whose sum does not depend on the order.
// Every block of the next pass then finds the digit of the k-th. Each digit costs one read of the numbers; nothing is
// sorted. A lane of a warp has its own bins in its own bank of shared memory: in most passes the numbers crowd in a few
// bins.

template <class A>
struct Key {
    using type = uint32_t;
};
template <>
struct Key<double> {
    using type = uint64_t;
};

// Maps floats to unsigned integers of the same order; NaN of either sign becomes the largest.
template <class A>
FASTKD_DEVICE typename Key<A>::type key_of(A x) {
    using K = typename Key<A>::type;
    constexpr K sign = K{1} << (8 * sizeof(K) - 1);
    if (x != x) return ~K{};
    K bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & sign ? ~bits : bits | sign;
}
template <class A>
FASTKD_DEVICE A number_of(typename Key<A>::type key) {
    using K = typename Key<A>::type;
    constexpr K sign = K{1} << (8 * sizeof(K) - 1);
    if (key == ~K{}) return static_cast<A>(__builtin_nanf(""));
    const K bits = key & sign ? key ^ sign : ~key;
    A x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// What is known about the k-th: its highest bits, and its rank among the numbers that share them.
template <class A>
struct Found {
    typename Key<A>::type prefix;
    int64_t k;
};

constexpr int64_t kFindScratch = (kBins / kWarp + 2) * 8;  // bytes of shared memory for find

// The digit of the k-th from the counts of the previous pass, one bin per thread.
template <class A, class Block>
FASTKD_DEVICE Found<A> find(Block& block, const int64_t* bins, const Found<A>& before, int64_t* scratch) {
    const int bin = block.thread(), lane = bin % kWarp, warp = bin / kWarp;
    int64_t* const out = scratch + kBins / kWarp;
    int64_t mine = 0, below = 0;
    if (bin < kBins) {
        mine = below = bins[bin];
        for (int by = 1; by < kWarp; by *= 2) {
            const int64_t other = block.shuffle_up(below, by);
            if (lane >= by) below += other;
        }
        if (lane == kWarp - 1) scratch[warp] = below;
        below -= mine;
    }
    block.sync();
    if (bin < kBins) {
        for (int w = 0; w < warp; ++w) below += scratch[w];
        if (below < before.k && before.k <= below + mine) {
            out[0] = bin;
            out[1] = before.k - below;
        }
    }
    block.sync();
    return {static_cast<typename Key<A>::type>(before.prefix << kDigit | static_cast<typename Key<A>::type>(out[0])), out[1]};
}

template <class A>
struct KthState {
    int64_t* state;       // (2, 2): prefix and k before the last digit, and before the current one
    const int64_t* bins;  // (passes, kBins)
    int64_t first;        // k
    int pass;

    // Result of the previous passes.
    template <class Block>
    FASTKD_DEVICE Found<A> found(Block& block, int64_t* scratch) const {
        if (pass == 0) return {0, first};
        Found<A> before{0, first};
        if (pass > 1) {
            const int64_t* from = state + 2 * ((pass - 1) % 2);
            before = {static_cast<typename Key<A>::type>(from[0]), from[1]};
        }
        return find<A>(block, bins + (pass - 1) * kBins, before, scratch);
    }
};

struct KthClear {
    static constexpr int kBlocksPerCores = 1;

    int64_t* bins;
    int64_t count;

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        for (int64_t i = block.thread(); i < count; i += kThreads) bins[i] = 0;
    }
};

template <class A>
struct KthCount {
    static constexpr int kBlocksPerCores = 2, kThreadsOfBlock = kKthThreads;
    static constexpr int64_t kCounts = kBins * kWarp * 4, kShared = kCounts + kFindScratch;
    using K = typename Key<A>::type;

    const A* x;
    int64_t n;
    KthState<A> known;
    int64_t* bins;  // (kBins,): counts of this pass
    int blocks;

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        int* counts = block.template shared<int>(0);  // (kBins, kWarp)
        const int lane = block.thread() % kWarp;
        const Found<A> found = known.found(block, block.template shared<int64_t>(kCounts));
        if (block.index() == 0 && block.thread() == 0) {
            known.state[2 * (known.pass % 2)] = static_cast<int64_t>(found.prefix);
            known.state[2 * (known.pass % 2) + 1] = found.k;
        }
        for (int i = block.thread(); i < kBins * kWarp; i += kThreadsOfBlock) counts[i] = 0;
        block.sync();
        // Bits of the higher digits, none in the first pass.
        const int shift = 8 * sizeof(K) - kDigit * (known.pass + 1);
        const K higher = known.pass == 0 ? K{} : ~K{} << kDigit << shift;
        const K wanted = known.pass == 0 ? K{} : found.prefix << kDigit << shift;
        const auto count = [&](A value) {
            const K key = key_of(value);
            block.count(counts + (key >> shift & (kBins - 1)) * kWarp + lane, ((key ^ wanted) & higher) == 0);
        };
        if (reinterpret_cast<uintptr_t>(x) % sizeof(Bits128) == 0)
            each<sizeof(Bits128) / sizeof(A), 4>(block, count);
        else
            each<1, 8>(block, count);
        block.sync();
        if (block.thread() >= kBins) return;
        int64_t sum = 0;
        for (int i = 0; i < kWarp; ++i) sum += counts[block.thread() * kWarp + (i + lane) % kWarp];
        if (sum != 0) block.add(bins + block.thread(), sum);
    }

private:
    // Calls f(number) for the numbers of this thread. The loads of `kAtOnce` vectors are in flight together.
    template <int V, int kAtOnce, class Block, class F>
    FASTKD_DEVICE void each(const Block& block, const F& f) const {
        constexpr int kTileOfBlock = kAtOnce * kThreadsOfBlock;
        const int64_t vectors = n / V;
        FASTKD_ROLLED
        for (int64_t tile = block.index() * kTileOfBlock; tile < vectors; tile += blocks * int64_t{kTileOfBlock}) {
            const int left = static_cast<int>(least(vectors - tile, kTileOfBlock)) - block.thread();
            const A* from = x + (tile + block.thread()) * V;
            A value[kAtOnce][V];
            FASTKD_UNROLL
            for (int k = 0; k < kAtOnce; ++k)
                if (k * kThreadsOfBlock < left) load<A, V>(from + k * kThreadsOfBlock * V, value[k]);
            FASTKD_UNROLL
            for (int k = 0; k < kAtOnce; ++k) {
                if (k * kThreadsOfBlock >= left) break;
                FASTKD_UNROLL
                for (int i = 0; i < V; ++i) f(value[k][i]);
            }
        }
        const int64_t rest = vectors * V + block.thread();
        if (block.index() == 0 && rest < n) f(x[rest]);
    }
};

template <class A>
struct KthFind {
    static constexpr int kBlocksPerCores = 1;

    KthState<A> known;
    A* out;

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        const Found<A> found = known.found(block, block.template shared<int64_t>(0));
        if (block.thread() == 0) *out = number_of<A>(found.prefix);
    }
};

template <class A, class Launch>
void kth_smallest_of(const Kth& a, const Launch& launch) {
    const int blocks = kth_blocks(a.n);
    const int64_t bins = kth_bins(a.type);
    KthState<A> known{a.state, a.bins, most(int64_t{1}, least(a.k, a.n)), 0};
    launch(KthClear{a.bins, bins}, 1, 0);
    for (; known.pass < bins / kBins; ++known.pass)
        launch(KthCount<A>{static_cast<const A*>(a.x), a.n, known, a.bins + known.pass * kBins, blocks}, blocks,
               KthCount<A>::kShared);
    launch(KthFind<A>{known, static_cast<A*>(a.out)}, 1, kFindScratch);
}

template <class Launch>
void kth_smallest(const Kth& a, const Launch& launch) {
    a.type == DType::f64 ? kth_smallest_of<double>(a, launch) : kth_smallest_of<float>(a, launch);
}

// Selection

template <class A>
struct Selection {
    static constexpr int kBlocksPerCores = 4;

    LabelPixels pixels;
    int64_t classes, total;
    const A *student, *teacher;                  // confidences
    const A *student_limit, *teacher_limit;      // or null
    A threshold;
    Select select;
    uint8_t* mask;  // or null
    A* lse;         // or null
    double* parts;  // (2, blocks): selected and valid
    int blocks;

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        int selected = 0, valid = 0;
        with_targets(pixels, [&](const auto* target) { choose(block, target, selected, valid); });
        const double selections = sum_block(block, static_cast<double>(selected), block.template shared<double>(0));
        const double valids = sum_block(block, static_cast<double>(valid), block.template shared<double>(0));
        if (block.thread() != 0) return;
        parts[block.index()] = selections;
        parts[blocks + block.index()] = valids;
    }

private:
    static constexpr int kAtOnce = 32 / sizeof(A);  // pixels of a thread whose loads are in flight together

    template <class L, class Block>
    FASTKD_DEVICE void choose(const Block& block, const L* target, int& selected, int& valid) const {
        constexpr int kTileOfBlock = kAtOnce * kThreads;
        const A student_most = limit(student_limit), teacher_most = limit(teacher_limit);
        const unsigned table = truth_table();
        FASTKD_ROLLED
        for (int64_t tile = block.index() * kTileOfBlock; tile < total; tile += static_cast<int64_t>(blocks) * kTileOfBlock) {
            const int left = static_cast<int>(least(total - tile, kTileOfBlock)) - block.thread();
            const int64_t first = tile + block.thread();
            A s[kAtOnce], t[kAtOnce];
            L label[kAtOnce];
            FASTKD_UNROLL
            for (int k = 0; k < kAtOnce; ++k) {
                if (k * kThreads >= left) break;
                s[k] = student[first + k * kThreads];
                t[k] = teacher[first + k * kThreads];
                label[k] = target[first + k * kThreads];
            }
            FASTKD_UNROLL
            for (int k = 0; k < kAtOnce; ++k) {
                if (k * kThreads >= left) break;
                const int64_t i = first + k * kThreads;
                const bool counts = class_among(label[k], pixels.ignore_index, classes) >= 0;
                const bool taken = counts && table >> (2 * (s[k] <= student_most) + (t[k] <= teacher_most)) & 1;
                valid += counts;
                selected += taken;
                if (mask) mask[i] = taken;
                if (lse && !taken) lse[i] = static_cast<A>(__builtin_nanf(""));
            }
        }
    }
    FASTKD_DEVICE A limit(const A* kth) const { return kth && *kth > threshold ? *kth : threshold; }
    // Bit 2 s + t: whether a pixel is selected that is hard for the student (s) and for the teacher (t).
    FASTKD_DEVICE unsigned truth_table() const {
        switch (select) {
            case Select::exclusive: return 0b0110;
            case Select::either: return 0b1110;
            case Select::both: return 0b1000;
            case Select::student: return 0b1100;
            default: return 0b0100;
        }
    }
};

template <class Launch>
void difficulty(const Difficulty& a, const Launch& launch) {
    const auto run = [&](auto zero) {
        using A = decltype(zero);
        const int blocks = selection_blocks(a.total);
        launch(Selection<A>{a.pixels, a.classes, a.total, static_cast<const A*>(a.student), static_cast<const A*>(a.teacher),
                            static_cast<const A*>(a.limits[0]), static_cast<const A*>(a.limits[1]),
                            static_cast<A>(a.threshold), a.select, a.mask, static_cast<A*>(a.lse), a.parts, blocks},
               blocks, kSumScratch);
        // Selected / valid; 0 if no pixel is valid.
        launch(Total<A>{a.parts, blocks, a.parts + blocks, blocks, 0, true, 1, static_cast<A*>(a.share), nullptr}, 1,
               kSumScratch);
    };
    a.wide ? run(double{}) : run(float{});
}

}  // namespace fastkd::gpu

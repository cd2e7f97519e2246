// RDD's relatively difficult pixels (docs/rdd.md), and the exact k-th smallest number for their threshold.
#pragma once

#include "kernels.h"
#include "pixels.h"

namespace fastkd::gpu {

// K-th smallest
//
// Radix select with 11-bit digits from the highest. Per digit, many blocks count it among the numbers whose higher
// digits match those of the k-th. A second kernel adds the counts of the blocks, one thread per bin. Every block of the
// next pass then finds the digit of the k-th. Each digit costs one read of the numbers; nothing is sorted.

constexpr int kBinBlocks = kBins / kThreads;

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

// The digit of the k-th from the counts of the previous pass; `scratch` is shared memory for kThreads + 2 numbers.
template <class A, class Block>
FASTKD_DEVICE Found<A> find(Block& block, const int64_t* bins, const Found<A>& before, int bits, int64_t* scratch) {
    constexpr int each = kBins / kThreads;
    int64_t mine = 0;
    for (int i = 0; i < each; ++i) mine += bins[block.thread() * each + i];
    scratch[block.thread()] = mine;
    block.sync();
    if (block.thread() == 0) {
        int64_t below = 0;
        int owner = 0;
        while (owner < kThreads - 1 && below + scratch[owner] < before.k) below += scratch[owner++];
        int bin = owner * each;
        while (bin < owner * each + each - 1 && below + bins[bin] < before.k) below += bins[bin++];
        scratch[kThreads] = bin;
        scratch[kThreads + 1] = before.k - below;
    }
    block.sync();
    const Found<A> out{static_cast<typename Key<A>::type>(before.prefix << bits | static_cast<uint64_t>(scratch[kThreads])),
                       scratch[kThreads + 1]};
    block.sync();
    return out;
}

template <class A>
struct KthState {
    int64_t* state;  // (2, 2): prefix and k before the last digit, and before the current one
    int64_t first;   // k
    int pass, bits;  // of the previous digit

    // Result of the previous passes.
    template <class Block>
    FASTKD_DEVICE Found<A> found(Block& block, const int64_t* bins, int64_t* scratch) const {
        if (pass == 0) return {0, first};
        Found<A> before{0, first};
        if (pass > 1) {
            const int64_t* from = state + 2 * ((pass - 1) % 2);
            before = {static_cast<typename Key<A>::type>(from[0]), from[1]};
        }
        return find<A>(block, bins, before, bits, scratch);
    }
};

template <class A>
struct KthCount {
    static constexpr int kBlocksPerCores = 4;
    static constexpr int64_t kShared = kBins * 4 + (kThreads + 2) * 8;

    const A* x;
    int64_t n;
    KthState<A> known;
    const int64_t* bins;  // (kBins,): counts of the previous pass
    int above, shift;     // the digit is bits [shift, above)
    int* parts;           // (blocks, kBins)
    int blocks;

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        using K = typename Key<A>::type;
        int* counts = block.template shared<int>(0);
        const Found<A> found = known.found(block, bins, block.template shared<int64_t>(kBins * 4));
        if (block.index() == 0 && block.thread() == 0) {
            known.state[2 * (known.pass % 2)] = static_cast<int64_t>(found.prefix);
            known.state[2 * (known.pass % 2) + 1] = found.k;
        }
        for (int i = block.thread(); i < kBins; i += kThreads) counts[i] = 0;
        block.sync();
        constexpr int whole = 8 * sizeof(K);
        for (int64_t i = block.index() * kThreads + block.thread(); i < n; i += static_cast<int64_t>(blocks) * kThreads) {
            const K key = key_of(x[i]);
            if (above < whole && key >> above != found.prefix) continue;
            block.count(counts + (key >> shift & ((K{1} << (above - shift)) - 1)));
        }
        block.sync();
        for (int i = block.thread(); i < kBins; i += kThreads) parts[block.index() * kBins + i] = counts[i];
    }
};

// Adds the counts of the blocks: one thread per bin.
struct KthAdd {
    static constexpr int kBlocksPerCores = 4;

    const int* parts;  // (blocks, kBins)
    int blocks;
    int64_t* bins;

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        const int64_t bin = block.index() * kThreads + block.thread();
        int64_t sum = 0;
        FASTKD_UNROLL_BY(8)
        for (int i = 0; i < blocks; ++i) sum += parts[static_cast<int64_t>(i) * kBins + bin];
        bins[bin] = sum;
    }
};

template <class A>
struct KthFind {
    static constexpr int kBlocksPerCores = 1;

    KthState<A> known;
    const int64_t* bins;
    A* out;

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        const Found<A> found = known.found(block, bins, block.template shared<int64_t>(0));
        if (block.thread() == 0) *out = number_of<A>(found.prefix);
    }
};

template <class A, class Launch>
void kth_smallest_of(const Kth& a, const Launch& launch) {
    const int blocks = kth_blocks(a.n);
    KthState<A> known{a.state, most(int64_t{1}, least(a.k, a.n)), 0, 0};
    for (int above = 8 * sizeof(A); above > 0;) {
        const int shift = most(above - kDigit, 0);
        launch(KthCount<A>{static_cast<const A*>(a.x), a.n, known, a.bins, above, shift, a.parts, blocks}, blocks,
               KthCount<A>::kShared);
        launch(KthAdd{a.parts, blocks, a.bins}, kBinBlocks, 0);
        ++known.pass;
        known.bits = above - shift;
        above = shift;
    }
    launch(KthFind<A>{known, a.bins, static_cast<A*>(a.out)}, 1, (kThreads + 2) * 8);
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
        const A student_most = limit(student_limit), teacher_most = limit(teacher_limit);
        double selected = 0, valid = 0;
        for (int64_t i = block.index() * kThreads + block.thread(); i < total; i += static_cast<int64_t>(blocks) * kThreads) {
            const bool counts = class_of(pixels, classes, i) >= 0;
            const bool taken = counts && combined(student[i] <= student_most, teacher[i] <= teacher_most);
            valid += counts;
            selected += taken;
            if (mask) mask[i] = taken;
            if (lse && !taken) lse[i] = static_cast<A>(__builtin_nanf(""));
        }
        selected = sum_block(block, selected, block.template shared<double>(0));
        valid = sum_block(block, valid, block.template shared<double>(0));
        if (block.thread() != 0) return;
        parts[block.index()] = selected;
        parts[blocks + block.index()] = valid;
    }

private:
    FASTKD_DEVICE A limit(const A* kth) const { return kth && *kth > threshold ? *kth : threshold; }
    FASTKD_DEVICE bool combined(bool s, bool t) const {
        switch (select) {
            case Select::exclusive: return s != t;
            case Select::either: return s || t;
            case Select::both: return s && t;
            case Select::student: return s;
            default: return s && !t;
        }
    }
};

template <class Launch>
void difficulty(const Difficulty& a, const Launch& launch) {
    const auto run = [&](auto zero) {
        using A = decltype(zero);
        const int blocks = count_blocks(a.total);
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

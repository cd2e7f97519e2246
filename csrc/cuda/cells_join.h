// The step after the loops over cells: combines the planes of gradient shares into the gradient.
#pragma once

#include "pixels.h"

namespace fastkd::gpu {

// Adds the planes of a chunk. A row of logits is the sum of the upper plane of the cells below it and the lower plane
// of the cells above it. The lower plane of the chunk's last row is stored in `carry` for the next chunk.
template <class T>
struct CellsJoin {
    using A = Accumulator<T>;
    static constexpr int kBlocksPerCores = 4;
    static constexpr int kClasses = 64;  // per block
    static constexpr int kAtOnce = 4;    // classes whose loads are in flight together
    static constexpr int kStride = kWarp + 1;
    static constexpr int64_t kOffsets = kClasses * kStride * static_cast<int64_t>(sizeof(A));
    static constexpr int64_t kShared = kOffsets + kWarp * 8;

    CellsPlan plan;
    int64_t first, lines;
    const A *planes, *edges, *before;  // before: (c, w), carry of the previous chunk
    A* carry;
    Sink<T, 1> out;
    bool channels_last;

    FASTKD_ANYWHERE int64_t places() const { return (lines + 1) * plan.columns.own.in; }
    FASTKD_ANYWHERE int64_t parts() const { return ceil_div(plan.classes, kClasses); }
    FASTKD_ANYWHERE int64_t blocks() const { return ceil_div(places(), kWarp) * parts(); }

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        const int lane = block.thread() % kWarp, warp = block.thread() / kWarp, w = plan.columns.own.in;
        const int64_t tile = quotient(block.index(), parts()), size = static_cast<int64_t>(plan.rows.own.in) * w;
        const int part = static_cast<int>(block.index() - tile * parts()) * kClasses, last = least(part + kClasses, plan.classes);
        const Place mine = place_of(tile * kWarp + lane);
        A* staged = block.template shared<A>(0);                        // (classes, places), for channels_last
        int64_t* offsets = block.template shared<int64_t>(kOffsets);  // of the places in the gradient; -1: none
        if (warp == 0) offsets[lane] = mine.exists && !mine.carries ? mine.out : -1;
        FASTKD_ROLLED
        for (int c = part + warp; c < last; c += kAtOnce * kWarps) {
            A value[kAtOnce];
            gather(mine, c, last, value);
            FASTKD_UNROLL
            for (int u = 0; u < kAtOnce; ++u) {
                const int k = c + u * kWarps;
                if (!mine.exists || k >= last) continue;
                if (mine.carries)
                    carry[static_cast<int64_t>(k) * w + mine.x] = value[u];
                else if (!channels_last)
                    out.one(mine.out + k * size, value[u]);
                else
                    staged[(k - part) * kStride + lane] = value[u];
            }
        }
        if (!channels_last) return;
        block.sync();
        for (int i = warp; i < kWarp; i += kWarps) {
            if (offsets[i] < 0) continue;
            for (int k = part + lane; k < last; k += kWarp) out.one(offsets[i] + k, staged[(k - part) * kStride + i]);
        }
    }

private:
    // One of the planes at a place, from class 0 on; null if there are no cells on that side.
    struct Side {
        const A *plane, *edge;  // edge: right-corner gradient of the previous warp's last cell, or null
        bool once;              // whether it is the carry, which has a single set
    };
    struct Place {
        bool exists, carries;
        int64_t out;
        int x;
        Side below, above;  // upper plane of the cells below, lower plane of those above
    };

    FASTKD_DEVICE Place place_of(int64_t at) const {
        Place out{};
        const int w = plan.columns.own.in, h = plan.rows.own.in, cells = plan.rows.own.cells();
        if (at >= places()) return out;
        const int64_t at_line = quotient(at, w), line = first + at_line, n = quotient(line, cells);
        out.x = static_cast<int>(at - at_line * w);
        const int y = static_cast<int>(line - n * cells) + plan.rows.own.first_cell();
        out.carries = at_line == lines;
        out.exists = out.carries || y >= 0;
        out.out = channels_last ? ((n * h + y) * w + out.x) * plan.classes
                                : (n * plan.classes * h + y) * static_cast<int64_t>(w) + out.x;
        if (!out.carries) out.below = side(at_line, 0, out.x);
        if (out.carries || y > plan.rows.own.first_cell())
            out.above = at_line > 0 ? side(at_line - 1, 1, out.x) : Side{before + out.x, nullptr, true};
        return out;
    }
    FASTKD_DEVICE Side side(int64_t line, int low, int x) const {
        const int64_t cell = line * plan.columns.own.cells() + x - plan.columns.own.first_cell();
        const int64_t classes = plan.classes, group = quotient(cell, plan.group());
        const bool starts = group > 0 && group * plan.group() == cell;
        return {planes + (line * 2 + low) * classes * plan.columns.own.in + x,
                starts ? edges + ((group - 1) * 2 + low) * classes : nullptr, false};
    }

    // The sums for classes c, c + kWarps, ...
    FASTKD_DEVICE void gather(const Place& at, int c, int last, A (&value)[kAtOnce]) const {
        A above[kAtOnce] = {};
        FASTKD_UNROLL
        for (A& x : value) x = 0;
        const int64_t plane = lines * 2 * plan.classes * plan.columns.own.in;
        const int64_t edge = plan.sets > 1 ? plan.groups(lines) * 2 * plan.classes : 0;
        FASTKD_ROLLED
        for (int set = 0; set < plan.sets; ++set) {
            add(at.below, set * plane, set * edge, c, last, value);
            if (set == 0 || !at.above.once) add(at.above, set * plane, set * edge, c, last, above);
        }
        FASTKD_UNROLL
        for (int u = 0; u < kAtOnce; ++u) value[u] += above[u];
    }
    FASTKD_DEVICE void add(const Side& side, int64_t plane, int64_t edge, int c, int last, A (&sum)[kAtOnce]) const {
        if (!side.plane) return;
        const auto of = [&](int u) { return static_cast<int64_t>(least(c + u * kWarps, last - 1)); };  // loads without branches
        A value[kAtOnce];
        FASTKD_UNROLL
        for (int u = 0; u < kAtOnce; ++u) value[u] = side.plane[plane + of(u) * plan.columns.own.in];
        FASTKD_UNROLL
        for (int u = 0; u < kAtOnce; ++u) sum[u] += value[u];
        if (!side.edge) return;
        FASTKD_UNROLL
        for (int u = 0; u < kAtOnce; ++u) value[u] = side.edge[edge + of(u)];
        FASTKD_UNROLL
        for (int u = 0; u < kAtOnce; ++u) sum[u] += value[u];
    }
};

}  // namespace fastkd::gpu

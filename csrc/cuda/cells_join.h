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
    static constexpr int kStride = kWarp + 1;
    static constexpr int64_t kShared = kWarp * kStride * 8;

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
        const int64_t tile = block.index() / parts() * kWarp, part = block.index() % parts() * kClasses;
        const int last = static_cast<int>(least(part + kClasses, static_cast<int64_t>(plan.classes)));
        const Place mine = place_of(tile + lane);
        A* shared = block.template shared<A>(0);  // (kWarp classes, kWarp places)
        for (int c = static_cast<int>(part); c < last; c += kWarp) {
            for (int k = c + warp; k < least(c + kWarp, last); k += kWarps) {
                if (!mine.exists) continue;
                const A value = gathered(mine, k);
                if (mine.carries)
                    carry[static_cast<int64_t>(k) * w + mine.x] = value;
                else if (!channels_last)
                    out.one(mine.out + k * static_cast<int64_t>(plan.rows.own.in) * w, value);
                else
                    shared[(k - c) * kStride + lane] = value;
            }
            if (!channels_last) continue;
            block.sync();
            for (int i = warp; i < kWarp && c + lane < last; i += kWarps) {
                const Place other = place_of(tile + i);
                if (other.exists && !other.carries) out.one(other.out + c + lane, shared[lane * kStride + i]);
            }
            block.sync();
        }
    }

private:
    struct Place {
        bool exists, carries, above, below;  // above, below: whether there are cells on that side
        int64_t line, out;
        int x;
    };

    FASTKD_DEVICE Place place_of(int64_t at) const {
        Place out{};
        const int w = plan.columns.own.in, h = plan.rows.own.in, cells = plan.rows.own.cells();
        if (at >= places()) return out;
        out.line = at / w;
        out.x = static_cast<int>(at % w);
        const int64_t line = first + out.line, n = line / cells;
        const int y = static_cast<int>(line % cells) + plan.rows.own.first_cell();
        out.carries = out.line == lines;
        out.exists = out.carries || y >= 0;
        out.below = !out.carries;
        out.above = out.carries || y > plan.rows.own.first_cell();
        out.out = channels_last ? ((n * h + y) * w + out.x) * plan.classes
                                : (n * plan.classes * h + y) * static_cast<int64_t>(w) + out.x;
        return out;
    }

    FASTKD_DEVICE A gathered(const Place& at, int c) const {
        A sum = 0;
        if (at.below) sum = plane(at.line, 0, c, at.x);
        if (at.above) sum += at.line > 0 ? plane(at.line - 1, 1, c, at.x) : before[static_cast<int64_t>(c) * plan.columns.own.in + at.x];
        return sum;
    }
    FASTKD_DEVICE A plane(int64_t line, int low, int c, int x) const {
        const int w = plan.columns.own.in, group = plan.group();
        const int64_t cell = line * plan.columns.own.cells() + x - plan.columns.own.first_cell();
        A sum = 0;
        for (int set = 0; set < plan.sets; ++set) {
            sum += planes[(((set * lines + line) * 2 + low) * plan.classes + c) * w + x];
            if (cell % group == 0 && cell > 0)
                sum += edges[((set * plan.groups(lines) + cell / group - 1) * 2 + low) * plan.classes + c];
        }
        return sum;
    }
};

}  // namespace fastkd::gpu

// How work is cut into blocks and clusters of threads: plain arithmetic on the shape, the same on the host, in the kernels
// and in the emulation. Nothing here depends on a value or on how busy the device is, so results are bitwise the same.
#pragma once

#include "types.h"

namespace fastkd::gpu {

// What the host must know of the device. Bytes.
struct Device {
    int64_t shared_per_block;   // the most that one block may ask for
    int64_t shared_per_cores;   // of one multiprocessor
    int64_t multiprocessors;
    int cluster;               // the most blocks in a cluster; 0: no clusters or no bulk copies (before sm_90)
    int64_t smallest = 4096;   // elements of a group that is worth a cluster; tests ask for less
};

// ---- views -----------------------------------------------------------------------------------------------------------
// Every grouping of a dense map, in either layout, is one of two three-dimensional arrays:
//
//              NCHW                        channels_last
//     hw       rows (1, N*C, H*W)          columns (N, H*W, C)
//     nhw      rows (N, C, H*W)            columns (1, N*H*W, C)
//     c        columns (N, C, H*W)         rows (1, N*H*W, C)
//     chw      rows (1, N, C*H*W)          rows (1, N, C*H*W)

// (runs, groups, length): group g is [:, g, :].
struct Rows {
    int64_t runs, groups, length;
};
// (outer, rows, inner): group outer * inner + i is [outer, :, i].
struct Columns {
    int64_t outer, rows, inner;
};

FASTKD_ANYWHERE bool in_rows(Group group, bool channels_last) {
    return group == Group::chw || channels_last == (group == Group::c);
}
FASTKD_ANYWHERE Rows rows_of(Group group, bool channels_last, int64_t n, int64_t c, int64_t hw) {
    if (group == Group::chw) return {1, n, c * hw};
    if (channels_last) return {1, n * hw, c};
    return group == Group::nhw ? Rows{n, c, hw} : Rows{1, n * c, hw};
}
FASTKD_ANYWHERE Columns columns_of(Group group, bool channels_last, int64_t n, int64_t c, int64_t hw) {
    if (!channels_last) return {n, c, hw};
    return group == Group::nhw ? Columns{1, n * hw, c} : Columns{n, hw, c};
}

// ---- streaming: forward and backward read S and T once each ----------------------------------------------------------

constexpr int kTile = 16;            // elements of each map that a thread reads at a time, in 16-byte pieces
constexpr int kTileOfOnes = 8;       // the same where they come one by one
constexpr int64_t kBlocks = 2048;    // groups are split until there are as many blocks, some three times what fits a GPU
constexpr int64_t kChunk = 1 << 22;  // the most elements of a chunk: counts are exact in fp32, and indices fit 32 bits

FASTKD_ANYWHERE int tile_of(int vector) { return vector == 1 ? kTileOfOnes : kTile; }

// A unit is one chunk of one run of one group, contiguous in memory; a team of threads takes one.
struct RowCut {
    Rows rows;
    int team;  // threads: a warp where groups are short, else the block
    int64_t chunk, chunks;

    FASTKD_ANYWHERE int64_t units() const { return rows.runs * rows.groups * chunks; }
    FASTKD_ANYWHERE int64_t blocks() const { return ceil_div(units(), kThreads / team); }
    // Of a unit, in the order of memory: its group, its part of that group, its first element and how many it has.
    FASTKD_ANYWHERE int64_t group(int64_t unit) const { return unit / chunks % rows.groups; }
    FASTKD_ANYWHERE int64_t part(int64_t unit) const { return unit / chunks / rows.groups * chunks + unit % chunks; }
    FASTKD_ANYWHERE int64_t first(int64_t unit) const { return unit / chunks * rows.length + unit % chunks * chunk; }
    FASTKD_ANYWHERE int count(int64_t unit) const {
        return static_cast<int>(least(chunk, rows.length - unit % chunks * chunk));
    }
    FASTKD_ANYWHERE int64_t parts() const { return rows.runs * chunks; }  // of a group
};

FASTKD_ANYWHERE RowCut cut(const Rows& rows, int vector) {
    const int64_t lines = rows.runs * rows.groups;
    const bool short_ones = rows.length <= 2 * kWarp * tile_of(vector);
    const int64_t tile = (short_ones ? kWarp : kThreads) * tile_of(vector);
    int64_t chunks = short_ones ? 1 : least(ceil_div(rows.length, tile), ceil_div(kBlocks, lines));
    chunks = most(chunks, ceil_div(rows.length, kChunk));
    const int64_t chunk = round_up(ceil_div(rows.length, chunks), tile);
    return {rows, short_ones ? kWarp : kThreads, chunk, ceil_div(rows.length, chunk)};
}

// A block takes a strip of neighbouring columns, `lanes` vectors wide, and a chunk of rows; a thread keeps to one vector.
struct ColumnCut {
    Columns columns;
    int vector, lanes;
    int64_t strips, chunk, chunks;

    FASTKD_ANYWHERE int64_t blocks() const { return columns.outer * strips * chunks; }
    FASTKD_ANYWHERE int slots() const { return kThreads / lanes; }  // rows that a block reads side by side
    FASTKD_ANYWHERE int64_t outer(int64_t block) const { return block / chunks / strips; }
    FASTKD_ANYWHERE int64_t strip(int64_t block) const { return block / chunks % strips; }  // its first column
    FASTKD_ANYWHERE int64_t part(int64_t block) const { return block % chunks; }
    FASTKD_ANYWHERE int64_t first_row(int64_t block) const { return block % chunks * chunk; }
    FASTKD_ANYWHERE int64_t last_row(int64_t block) const { return least(columns.rows, first_row(block) + chunk); }
    FASTKD_ANYWHERE int64_t width() const { return static_cast<int64_t>(lanes) * vector; }
    FASTKD_ANYWHERE int64_t at(int64_t block, int64_t row, int64_t column) const {
        return (outer(block) * columns.rows + row) * columns.inner + column;
    }
};

// Vectors of a strip: 128 bytes of fp32 or fp16 where they are 16 bytes, else one for each lane of a warp.
FASTKD_ANYWHERE int strip_lanes(int64_t inner, int vector) {
    int lanes = 1;
    while (lanes < (vector == 1 ? kWarp : 8) && static_cast<int64_t>(lanes) * vector < inner) lanes *= 2;
    return lanes;
}

FASTKD_ANYWHERE ColumnCut cut(const Columns& columns, int vector) {
    const int lanes = strip_lanes(columns.inner, vector);
    const int64_t strips = ceil_div(columns.inner, static_cast<int64_t>(lanes) * vector);
    const int64_t tile = static_cast<int64_t>(kThreads / lanes) * (tile_of(vector) / vector);
    int64_t chunks = least(ceil_div(columns.rows, tile), ceil_div(kBlocks, columns.outer * strips));
    chunks = most(chunks, ceil_div(columns.rows, kChunk));
    const int64_t chunk = round_up(ceil_div(columns.rows, chunks), tile);
    return {columns, vector, lanes, strips, chunk, ceil_div(columns.rows, chunk)};
}

// ---- one read: a group stays in the shared memory of a cluster -------------------------------------------------------

constexpr int kMostCluster = 8;  // what every device with clusters can run
constexpr int kStages = 4;       // parts in which a block's share arrives, so that its moments begin before it is all there

// Blocks that fit one multiprocessor at a time hide each other's waiting; below a third of its shared memory, three do.
// The driver keeps 1 KB a block.
FASTKD_ANYWHERE int64_t comfortable(const Device& device) { return device.shared_per_cores / 3 - 1024; }

// Shared memory of a block, in bytes from its start: mbarriers, what blocks tell each other, what the warps tell each
// other, coefficients, and the shares of S and T.
struct SharedLayout {
    int64_t part, warps, stats, student, teacher, total;
};

FASTKD_ANYWHERE SharedLayout shared_layout(int64_t columns, int64_t share_bytes) {
    SharedLayout at{};
    at.part = kStages * 8;                                              // Moments<double> (columns,)
    at.warps = at.part + columns * 6 * 8;                               // Moments<float> (kWarps, columns)
    at.stats = at.warps + kWarps * columns * 6 * 4;                     // float (6, columns)
    at.student = round_up(at.stats + columns * 6 * 4, 128);
    at.teacher = at.student + round_up(share_bytes, 128);
    at.total = at.teacher + round_up(share_bytes, 128);
    return at;
}

// Rows: block `rank` of a cluster takes elements [rank * share, (rank + 1) * share) of a group, its runs end to end.
struct RowShares {
    Rows rows;
    int cluster;  // blocks; 0: does not fit
    int64_t share, stage;
    SharedLayout shared;

    FASTKD_ANYWHERE int64_t total() const { return rows.runs * rows.length; }
    FASTKD_ANYWHERE int64_t blocks() const { return rows.groups * cluster; }
    FASTKD_ANYWHERE int64_t first(int rank) const { return least(total(), rank * share); }
    FASTKD_ANYWHERE int64_t last(int rank) const { return least(total(), (rank + 1) * share); }
    FASTKD_ANYWHERE int64_t at(int64_t group, int64_t element) const {
        return (element / rows.length * rows.groups + group) * rows.length + element % rows.length;
    }

    // f(offset in memory, element of the group, count) for each contiguous piece of elements [from, to) of a group.
    template <class F>
    FASTKD_ANYWHERE void each_piece(int64_t group, int64_t from, int64_t to, const F& f) const {
        for (int64_t at = from; at < to;) {
            const int64_t run = at / rows.length, within = at - run * rows.length;
            const int64_t count = least(rows.length - within, to - at);
            f((run * rows.groups + group) * rows.length + within, at, count);
            at += count;
        }
    }
};

// bytes: of an element. The fewest blocks a group that leave room for others on a multiprocessor, else the fewest that
// hold it; more, where there would be fewer blocks than multiprocessors.
FASTKD_ANYWHERE RowShares share_out(const Rows& rows, int bytes, const Device& device) {
    RowShares out{rows, 0, 0, 0, {}};
    const int64_t total = rows.runs * rows.length, vector = 16 / bytes;
    // Short groups and short runs: a block a group, or a bulk copy a run, costs more than it saves.
    if (rows.length % vector != 0 || total < device.smallest || rows.length < device.smallest / 16) return out;
    for (int pass = 0; pass < 2 && out.cluster == 0; ++pass)
        for (int blocks = 1; blocks <= device.cluster && out.cluster == 0; blocks *= 2) {
            const int64_t share = round_up(ceil_div(total, blocks), kThreads * vector);
            const SharedLayout shared = shared_layout(1, share * bytes);
            if (shared.total > (pass == 0 ? least(comfortable(device), device.shared_per_block) : device.shared_per_block))
                continue;
            const bool idle = rows.groups * blocks < device.multiprocessors && 2 * blocks <= device.cluster &&
                              share >= 4 * kThreads * vector;
            if (pass == 0 && idle) continue;
            out = {rows, blocks, share, round_up(ceil_div(share, kStages), kThreads * vector), shared};
        }
    return out;
}

// Columns: a cluster takes a strip `lanes` vectors wide, block `rank` rows [rank * share, (rank + 1) * share) of it.
struct ColumnShares {
    Columns columns;
    int cluster;  // blocks; 0: does not fit
    int vector, lanes;
    int64_t strips, share, stage;  // rows
    SharedLayout shared;

    FASTKD_ANYWHERE int slots() const { return kThreads / lanes; }
    FASTKD_ANYWHERE int64_t width() const { return static_cast<int64_t>(lanes) * vector; }
    FASTKD_ANYWHERE int64_t blocks() const { return columns.outer * strips * cluster; }
    FASTKD_ANYWHERE int64_t first(int rank) const { return least(columns.rows, rank * share); }
    FASTKD_ANYWHERE int64_t last(int rank) const { return least(columns.rows, (rank + 1) * share); }
    FASTKD_ANYWHERE int64_t at(int64_t cluster_index, int64_t row, int64_t column) const {
        return (cluster_index / strips * columns.rows + row) * columns.inner + column;
    }
};

// Wide strips first: 128 bytes of a row if they fit comfortably, or else 64; then the same without room for others, then
// 32, one sector of a cache line.
FASTKD_ANYWHERE ColumnShares share_out(const Columns& columns, int bytes, const Device& device) {
    ColumnShares out{columns, 0, 16 / bytes, 0, 0, 0, 0, {}};
    if (columns.inner % out.vector != 0 || columns.rows < device.smallest / 16) return out;
    const int widest = strip_lanes(columns.inner, out.vector);
    for (int pass = 0; pass < 3 && out.cluster == 0; ++pass)
        for (int lanes = pass == 2 ? 2 : widest; lanes >= (pass == 2 ? 2 : 4) && out.cluster == 0; lanes /= 2)
            for (int blocks = 1; blocks <= device.cluster && out.cluster == 0; blocks *= 2) {
                if (lanes > widest) break;
                const int64_t share = round_up(ceil_div(columns.rows, blocks), kThreads / lanes);
                const SharedLayout shared = shared_layout(lanes * out.vector, share * lanes * 16);
                const int64_t room = pass == 0 ? least(comfortable(device), device.shared_per_block)
                                               : device.shared_per_block;
                if (shared.total > room) continue;
                out = {columns, blocks, out.vector, lanes, ceil_div(columns.inner, static_cast<int64_t>(lanes) * out.vector),
                       share, round_up(ceil_div(share, kStages), kThreads / lanes), shared};
            }
    return out;
}

// ---- NFD -------------------------------------------------------------------------------------------------------------

// Elements that are read at a time: 16 bytes of them, or 1 where the dtypes differ or something is not aligned; fp64,
// which is for checking gradients, comes one by one too. `line` is what is contiguous.
inline int vector_of(const Pair& in, int64_t line, const void* out = nullptr) {
    const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    if (in.student_type != in.teacher_type || in.student_type == DType::f64) return 1;
    const int vector = in.student_type == DType::f32 ? 4 : 8;
    return aligned(in.student) && aligned(in.teacher) && aligned(out) && line % vector == 0 ? vector : 1;
}

// How a forward runs: in one read if a group fits a cluster, else streaming.
struct NfdPlan {
    bool rows;
    int vector;
    RowShares row_shares;
    ColumnShares column_shares;
    RowCut row_cut;
    ColumnCut column_cut;

    bool one_read() const { return rows ? row_shares.cluster > 0 : column_shares.cluster > 0; }
    int64_t parts() const { return one_read() ? 1 : rows ? row_cut.parts() : column_cut.chunks; }  // of a group
};

inline NfdPlan plan_nfd(const Pair& in, Group group, const Device& device) {
    NfdPlan plan{};
    plan.rows = in_rows(group, in.channels_last);
    const Rows rows = rows_of(group, in.channels_last, in.n, in.c, in.hw);
    const Columns columns = columns_of(group, in.channels_last, in.n, in.c, in.hw);
    plan.vector = vector_of(in, plan.rows ? rows.length : columns.inner);
    if (plan.rows) {
        plan.row_cut = cut(rows, plan.vector);
        if (plan.vector > 1) plan.row_shares = share_out(rows, 16 / plan.vector, device);
    } else {
        plan.column_cut = cut(columns, plan.vector);
        if (plan.vector > 1) plan.column_shares = share_out(columns, 16 / plan.vector, device);
    }
    return plan;
}

// ---- KD --------------------------------------------------------------------------------------------------------------

// A block holds all classes of `pixels` pixels: (classes, pixels) of NCHW, (pixels, classes) of channels_last, which is one
// long line of pixels.
struct KdPlan {
    int64_t classes, outer, inner, tiles;
    int pixels, vector;
    bool channels_last;
    int64_t student, teacher, shares, total;  // bytes of shared memory

    FASTKD_ANYWHERE int64_t blocks() const { return outer * tiles; }
    FASTKD_ANYWHERE int at(int64_t c, int pixel) const {
        return static_cast<int>(channels_last ? pixel * classes + c : c * pixels + pixel);
    }
};

// Blocks that count labels; each block of the next kernel adds up what they found, a number a thread.
FASTKD_ANYWHERE int count_blocks(int64_t pixels) { return static_cast<int>(least(kThreads, ceil_div(pixels, 16 * kThreads))); }

// The most pixels that leave room for other blocks, but no fewer than 32 while they fit at all; fewer, too, where there would
// be fewer blocks than two a multiprocessor. pixels is 0 where one pixel's classes do not fit.
inline KdPlan plan_kd(const Pair& in, const Device& device, const void* out = nullptr) {
    KdPlan plan{in.c, in.channels_last ? 1 : in.n, in.channels_last ? in.n * in.hw : in.hw, 0, 0, 0, in.channels_last,
                0,    0,                           0,                                       0};
    const auto lay_out = [&](int pixels, int vector) {
        const int64_t bytes = in.student_type == DType::f64 ? 8 : vector == 1 ? 4 : 16 / vector;
        plan.pixels = pixels;
        plan.vector = vector;
        plan.tiles = ceil_div(plan.inner, pixels);
        plan.teacher = round_up(in.c * pixels * bytes, 128);
        plan.shares = 2 * plan.teacher;
        plan.total = plan.shares + 3 * kThreads * (in.student_type == DType::f64 ? 8 : 4);
        return plan.total;
    };
    int vector = vector_of(in, in.channels_last ? 8 : in.hw, out);
    int pixels = kThreads;
    while (pixels > 32 && lay_out(pixels, vector) > least(comfortable(device), device.shared_per_block)) pixels /= 2;
    while (pixels > 32 && plan.outer * ceil_div(plan.inner, pixels) < 2 * device.multiprocessors) pixels /= 2;
    while (pixels > 0 && lay_out(pixels, vector) > device.shared_per_block) {
        pixels /= 2;
        if (pixels < 8) vector = 1;  // no 16 bytes of pixels are left, nor, channels_last, a tile that begins at a multiple
    }
    if (pixels == 0) plan.pixels = 0;
    return plan;
}

// ---- losses at label resolution --------------------------------------------------------------------------------------

// One direction of a bilinear resize, in exact integers. The outputs between a logit and the next one are that logit's cell;
// those before the first logit are in its cell too (docs/full-resolution.md).
struct Axis {
    int in, out;  // 2 in out + in is below 2^31: a 64-bit division is a hundred instructions
    bool align_corners;

    FASTKD_ANYWHERE int left(int x) const { return min(over(x) / under(), in - 1); }
    // What the logit to the right of output x weighs; the one to its left has the rest.
    template <class A>
    FASTKD_ANYWHERE A right(int x, int left) const {
        return left >= in - 1 ? A(0) : static_cast<A>(over(x) - left * under()) / static_cast<A>(under());
    }
    // The first output of this cell or of a later one.
    FASTKD_ANYWHERE int first(int cell) const {
        if (cell <= 0) return 0;
        if (cell >= in) return out;
        const int under = align_corners ? in - 1 : 2 * in;
        const int over = align_corners ? cell * max(out - 1, 1) : max((2 * cell + 1) * out - in, 0);
        return min((over + under - 1) / under, out);
    }

private:
    FASTKD_ANYWHERE static int min(int a, int b) { return a < b ? a : b; }
    FASTKD_ANYWHERE static int max(int a, int b) { return a > b ? a : b; }
    FASTKD_ANYWHERE int over(int x) const { return align_corners ? x * (in - 1) : max((2 * x + 1) * in - out, 0); }
    FASTKD_ANYWHERE int under() const { return align_corners ? max(out - 1, 1) : 2 * out; }
};

// The logits whose gradient a block makes, and the cells around them: the label pixels of the cells above and to the left
// are its neighbours' too.
struct ResizedTile {
    int64_t n;
    int first_row, last_row, cell_row, first_column, last_column, cell_column;  // cell_: where the cells begin
    int first_class, last_class;

    FASTKD_ANYWHERE int cells() const { return last_column - cell_column; }
    FASTKD_ANYWHERE int classes() const { return last_class - first_class; }
};

// A block goes down a tile of logits, `tall` rows of `wide`, one row of cells at a time.
struct ResizedPlan {
    int n, classes;
    Axis rows, columns;
    int tall, wide, chunk;   // chunk: classes of the gradient
    bool held;               // the two rows of logits are in shared memory, or else read where they are
    int label_rows, phases;  // label pixels of each cell that are taken at a time
    int strips, bands, chunks;
    // Shared memory, in bytes from its start: logits (sides, 2, wide + 2, stride), shares (4, wide + 1, chunk_stride),
    // then of each cell's label pixels (label_rows, phases, wide + 1), columns (phases, wide + 1) and label rows.
    int64_t logits, shares, sums, scale, label, right, weight_right, weight_left, down, weight_down, weight_top, start, warps;
    int64_t total;

    FASTKD_ANYWHERE int cells() const { return wide + 1; }
    FASTKD_ANYWHERE int stride() const { return classes | 1; }  // odd: cells do not share banks
    FASTKD_ANYWHERE int chunk_stride() const { return chunk | 1; }
    FASTKD_ANYWHERE int64_t blocks() const { return static_cast<int64_t>(n) * bands * strips * chunks; }

    FASTKD_ANYWHERE ResizedTile tile(int64_t block, bool gradient) const {
        const int index = static_cast<int>(block), part = index % chunks, strip = index / chunks % strips;
        const int band = index / chunks / strips % bands;
        ResizedTile t{};
        t.n = index / chunks / strips / bands;
        t.first_row = band * tall;
        t.last_row = static_cast<int>(least(rows.in, t.first_row + tall));
        t.cell_row = gradient && band > 0 ? t.first_row - 1 : t.first_row;
        t.first_column = strip * wide;
        t.last_column = static_cast<int>(least(columns.in, t.first_column + wide));
        t.cell_column = gradient && strip > 0 ? t.first_column - 1 : t.first_column;
        t.first_class = part * chunk;
        t.last_class = static_cast<int>(least(classes, t.first_class + chunk));
        return t;
    }
};

constexpr int kPixels = 4;  // label pixels of a cell that a thread takes together

// The widest tile that leaves room for other blocks, then the widest that fits; where classes are so many that their rows do
// not, logits are read from memory and the gradient is made by chunks of classes. Tiles are as tall as there are blocks left
// for all multiprocessors. total is beyond the device's shared memory if nothing fits.
inline ResizedPlan plan_resized(const Map& map, int64_t height, int64_t width, bool align_corners, int sides,
                                const Device& device) {
    ResizedPlan plan{};
    plan.n = static_cast<int>(map.n);
    plan.classes = static_cast<int>(map.c);
    plan.rows = {static_cast<int>(map.h), static_cast<int>(height), align_corners};
    plan.columns = {static_cast<int>(map.w), static_cast<int>(width), align_corners};
    const int64_t bytes = map.type == DType::f64 ? 8 : 4;
    const auto lay_out = [&](int64_t wide, bool held, int64_t chunk) {
        plan.wide = static_cast<int>(wide);
        plan.held = held;
        plan.chunk = static_cast<int>(chunk);
        plan.phases = static_cast<int>(least(round_up(ceil_div(width, map.w), kPixels), 4 * kPixels));
        const int64_t row = static_cast<int64_t>(plan.phases) * plan.cells() * ((sides + 1) * bytes + 4);
        plan.label_rows = static_cast<int>(most(least(ceil_div(height, map.h), device.shared_per_block / 6 / row), 1));
        int64_t end = 0;
        const auto take = [&](int64_t count, int64_t size) {
            const int64_t at = end;
            end = round_up(end + count * size, 16);
            return at;
        };
        const int64_t columns = static_cast<int64_t>(plan.phases) * plan.cells(), pixels = plan.label_rows * columns;
        plan.logits = take(held ? 2 * sides * (wide + 2) * plan.stride() : 0, bytes);
        plan.shares = take(4 * plan.cells() * static_cast<int64_t>(plan.chunk_stride()), bytes);
        plan.sums = take(sides * pixels, bytes);
        plan.scale = take(pixels, bytes);
        plan.label = take(pixels, 4);
        plan.right = take(columns, bytes);
        plan.weight_right = take(columns, bytes);
        plan.weight_left = take(columns, 4);
        plan.down = take(plan.label_rows, bytes);
        plan.weight_down = take(plan.label_rows, bytes);
        plan.weight_top = take(plan.label_rows, 4);
        plan.start = take(plan.cells() + 1, 4);
        plan.warps = take(kWarps, 8);
        plan.total = end;
    };
    // From `from` logits down to `to`, of about equal strips.
    const auto widest = [&](int64_t from, int64_t to, bool held, int64_t chunk, int64_t room) {
        for (int64_t wide = from;; wide = plan.wide - 1) {
            lay_out(ceil_div(map.w, ceil_div(map.w, wide)), held, chunk);
            if (plan.total <= room) return true;
            if (plan.wide <= to) return false;
        }
    };
    // Two blocks have the registers.
    const int64_t room = least(device.shared_per_cores / 2 - 1024, device.shared_per_block);
    bool fits = widest(64, 4, true, map.c, room) || widest(8, 1, true, map.c, device.shared_per_block);
    for (int64_t chunk = map.c; !fits && chunk > 0; chunk /= 2) fits = widest(8, 4, false, chunk, room);
    plan.strips = static_cast<int>(ceil_div(map.w, plan.wide));
    plan.chunks = static_cast<int>(ceil_div(map.c, plan.chunk));
    int64_t tall = least(map.h, 16);
    while (tall > 4 && map.n * plan.strips * plan.chunks * ceil_div(map.h, tall) < 2 * device.multiprocessors)
        tall = (tall + 1) / 2;
    plan.tall = static_cast<int>(ceil_div(map.h, ceil_div(map.h, tall)));
    plan.bands = static_cast<int>(ceil_div(map.h, plan.tall));
    return plan;
}

}  // namespace fastkd::gpu

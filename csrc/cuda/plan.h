// How work is divided into blocks and clusters: integer arithmetic on the shape, identical on the host, in the kernels
// and in the emulation. Nothing depends on data or on the load of the device, so results are bitwise reproducible.
#pragma once

#include "types.h"

namespace fastkd::gpu {

// Device properties; sizes in bytes.
struct Device {
    int64_t shared_per_block;   // maximum per block
    int64_t shared_per_cores;   // per multiprocessor
    int64_t multiprocessors;
    int cluster;               // maximum cluster size; 0: no clusters or no bulk copies (before sm_90)
    // Minimum elements per group for a cluster. On an H100 a cluster was slower than two reads at 4096, faster at 8192.
    // Tests lower it.
    int64_t smallest = 8192;
    int64_t smallest_budget = 8 << 20;  // extra memory in bytes below which maps are not split into chunks; tests lower it
};

// Views
//
// Every grouping of a dense map, in either layout, is one of two three-dimensional arrays:
//
//          NCHW                        channels_last
//   hw     rows (1, N*C, H*W)          columns (N, H*W, C)
//   nhw    rows (N, C, H*W)            columns (1, N*H*W, C)
//   c      columns (N, C, H*W)         rows (1, N*H*W, C)
//   chw    rows (1, N, C*H*W)          rows (1, N, C*H*W)

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

// Streaming: forward and backward each read S and T once

constexpr int kTile = 16;            // elements of each map per thread and iteration, in 16-byte loads
constexpr int kTileOfOnes = 8;       // the same for single-element loads
constexpr int64_t kBlocks = 2048;    // groups are split until there are this many blocks, about three times a full GPU
constexpr int64_t kColumnBlocks = 512;  // the same for columns, twice what fits an H100: merging a block's columns is expensive
constexpr int64_t kChunk = 1 << 22;  // maximum elements per chunk: counts are exact in fp32, and indices fit 32 bits

FASTKD_ANYWHERE int tile_of(int vector) { return vector == 1 ? kTileOfOnes : kTile; }

// A unit is one chunk of one run of one group, contiguous in memory, processed by one team of threads.
struct RowCut {
    Rows rows;
    int team;  // threads: a warp for short groups, else the block
    int64_t chunk, chunks;

    FASTKD_ANYWHERE int64_t units() const { return rows.runs * rows.groups * chunks; }
    FASTKD_ANYWHERE int64_t blocks() const { return ceil_div(units(), kThreads / team); }
    // For a unit, in memory order: its group, its part of that group, its first element, its number of elements.
    FASTKD_ANYWHERE int64_t group(int64_t unit) const { return unit / chunks % rows.groups; }
    FASTKD_ANYWHERE int64_t part(int64_t unit) const { return unit / chunks / rows.groups * chunks + unit % chunks; }
    FASTKD_ANYWHERE int64_t first(int64_t unit) const { return unit / chunks * rows.length + unit % chunks * chunk; }
    FASTKD_ANYWHERE int count(int64_t unit) const {
        return static_cast<int>(least(chunk, rows.length - unit % chunks * chunk));
    }
    FASTKD_ANYWHERE int64_t parts() const { return rows.runs * chunks; }  // per group
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

// A block processes a strip of neighbouring columns, `lanes` vectors wide, and a chunk of rows; each thread keeps to
// one vector.
struct ColumnCut {
    Columns columns;
    int vector, lanes;
    int64_t strips, chunk, chunks;

    FASTKD_ANYWHERE int64_t blocks() const { return columns.outer * strips * chunks; }
    FASTKD_ANYWHERE int slots() const { return kThreads / lanes; }  // rows that a block reads in parallel
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

// Vectors per strip: 128 bytes of fp32 or fp16 for 16-byte vectors, else one per lane of a warp.
FASTKD_ANYWHERE int strip_lanes(int64_t inner, int vector) {
    int lanes = 1;
    while (lanes < (vector == 1 ? kWarp : 8) && static_cast<int64_t>(lanes) * vector < inner) lanes *= 2;
    return lanes;
}

FASTKD_ANYWHERE ColumnCut cut(const Columns& columns, int vector) {
    const int lanes = strip_lanes(columns.inner, vector);
    const int64_t strips = ceil_div(columns.inner, static_cast<int64_t>(lanes) * vector);
    const int64_t tile = static_cast<int64_t>(kThreads / lanes) * (tile_of(vector) / vector);
    int64_t chunks = least(ceil_div(columns.rows, tile), ceil_div(kColumnBlocks, columns.outer * strips));
    chunks = most(chunks, ceil_div(columns.rows, kChunk));
    const int64_t chunk = round_up(ceil_div(columns.rows, chunks), tile);
    return {columns, vector, lanes, strips, chunk, ceil_div(columns.rows, chunk)};
}

// One read: a group stays in the shared memory of a cluster

constexpr int kMostCluster = 8;  // supported by every device with clusters
constexpr int kStages = 4;       // stages of a block's share: the moments start before all of it has arrived

// Several resident blocks per multiprocessor hide latency; with less than a third of the shared memory each, three fit.
// The driver reserves 1 KB per block.
FASTKD_ANYWHERE int64_t comfortable(const Device& device) { return device.shared_per_cores / 3 - 1024; }

// Shared memory of a block, as byte offsets: mbarriers, exchange between blocks, exchange between warps, coefficients,
// shares of S and T.
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

// Rows: block `rank` of a cluster has elements [rank * share, (rank + 1) * share) of a group's concatenated runs.
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

    // f(offset in memory, element within the group, count) for each contiguous piece of elements [from, to) of a group.
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

// bytes: per element. Uses the fewest blocks per group that allow several resident blocks per multiprocessor, else the
// fewest that hold the group; more if there would be fewer blocks than multiprocessors.
FASTKD_ANYWHERE RowShares share_out(const Rows& rows, int bytes, const Device& device) {
    RowShares out{rows, 0, 0, 0, {}};
    const int64_t total = rows.runs * rows.length, vector = 16 / bytes;
    // For short groups or runs, a block per group or a bulk copy per run costs more than it saves.
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

// NFD

// Elements per load: 16 bytes, or 1 if the dtypes differ or something is not aligned. fp64, used for checking
// gradients, is also loaded one by one. `line` is the contiguous length.
inline int vector_of(const Pair& in, int64_t line, const void* out = nullptr) {
    const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    if (in.student_type != in.teacher_type || in.student_type == DType::f64) return 1;
    const int vector = in.student_type == DType::f32 ? 4 : 8;
    return aligned(in.student) && aligned(in.teacher) && aligned(out) && line % vector == 0 ? vector : 1;
}

// How a gradient is computed: in one read if a group lies in rows and fits a cluster, else streaming.
struct NfdPlan {
    bool rows;
    int vector;
    RowShares shares;
    RowCut row_cut;
    ColumnCut column_cut;

    bool one_read() const { return shares.cluster > 0; }
    int64_t parts() const { return rows ? row_cut.parts() : column_cut.chunks; }  // per group, streaming
};

inline NfdPlan plan_nfd(const Pair& in, Group group, const Device& device) {
    NfdPlan plan{};
    plan.rows = in_rows(group, in.channels_last);
    const Rows rows = rows_of(group, in.channels_last, in.n, in.c, in.hw);
    const Columns columns = columns_of(group, in.channels_last, in.n, in.c, in.hw);
    plan.vector = vector_of(in, plan.rows ? rows.length : columns.inner);
    if (plan.rows) {
        plan.row_cut = cut(rows, plan.vector);
        if (plan.vector > 1) plan.shares = share_out(rows, 16 / plan.vector, device);
    } else {
        plan.column_cut = cut(columns, plan.vector);
    }
    return plan;
}

// KD

// A block holds all classes of `pixels` pixels: (classes, pixels) for NCHW, (pixels, classes) for channels_last, which
// is one long line of pixels.
struct KdPlan {
    int64_t classes, outer, inner, tiles;
    int pixels, vector;
    bool channels_last;
    int64_t student, teacher, shares, total;  // byte offsets in shared memory

    FASTKD_ANYWHERE int64_t blocks() const { return outer * tiles; }
    FASTKD_ANYWHERE int at(int64_t c, int pixel) const {
        return static_cast<int>(channels_last ? pixel * classes + c : c * pixels + pixel);
    }
};

// Blocks that count labels. Each block of the next kernel sums their results, one number per thread.
FASTKD_ANYWHERE int count_blocks(int64_t pixels) { return static_cast<int>(least(kThreads, ceil_div(pixels, 16 * kThreads))); }

// The largest tile that still allows several blocks per multiprocessor, but at least 32 pixels if they fit at all; also
// smaller while there are fewer than two blocks per multiprocessor. pixels is 0 if the classes of one pixel do not fit.
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
        if (pixels < 8) vector = 1;  // fewer than 16 bytes of pixels or, in channels_last, tiles that start unaligned
    }
    if (pixels == 0) plan.pixels = 0;
    return plan;
}

// Losses at label resolution

// One axis of a bilinear resize in exact integer arithmetic. The outputs between a logit and the next form that logit's
// cell. Outputs before the first logit are cell -1; those after the last logit belong to its cell
// (docs/full-resolution.md).
struct Axis {
    int in, out;  // in (2 out + 1) < 2^31: a 64-bit division takes a hundred instructions
    bool align_corners;

    FASTKD_ANYWHERE int first_cell() const { return align_corners ? 0 : -1; }
    FASTKD_ANYWHERE int cells() const { return in - first_cell(); }
    FASTKD_ANYWHERE int cell(int x) const { return over(x) < 0 ? -1 : least(over(x) / under(), in - 1); }
    // Weight of the logit to the right of output x; the left one has the remainder. Borders repeat, so a border cell
    // has two equal corners; the one that exists gets the full weight.
    template <class A>
    FASTKD_ANYWHERE A right(int x, int cell) const {
        if (cell < 0) return 1;
        return cell >= in - 1 ? A(0) : static_cast<A>(over(x) - cell * under()) / static_cast<A>(under());
    }
    // First output of this cell or of a later one.
    FASTKD_ANYWHERE int first(int cell) const {
        if (cell <= first_cell()) return 0;
        if (cell >= in) return out;
        const int over = align_corners ? cell * most(out - 1, 1) : most((2 * cell + 1) * out - in, 0);
        const int under = align_corners ? in - 1 : 2 * in;
        return least((over + under - 1) / under, out);
    }
    // Maximum number of outputs in a cell.
    FASTKD_ANYWHERE int largest_cell() const {
        if (!align_corners) return in == 1 ? (out + 1) / 2 : (out + in - 1) / in;
        return in == 1 ? out : most((out - 1 + in - 2) / (in - 1), 1);
    }

private:
    FASTKD_ANYWHERE int over(int x) const { return align_corners ? x * (in - 1) : (2 * x + 1) * in - out; }
    FASTKD_ANYWHERE int under() const { return align_corners ? most(out - 1, 1) : 2 * out; }
};

// A thread's part of a cell along one axis: outputs [begin, end), all in one cell of the other map too.
struct Piece {
    int begin, end, other;
};

struct Pieces {
    Axis own, other;  // student and teacher; equal for one map, or maps of one size
    int crossed;      // maximum number of the other map's cells that a cell overlaps
    int splits;       // parts of each overlap

    FASTKD_ANYWHERE int count() const { return crossed * splits; }
    FASTKD_ANYWHERE Piece piece(int cell, int which) const {
        int begin = own.first(cell), end = own.first(cell + 1), beside = cell;
        if (other.in != own.in) {
            beside = other.cell(least(begin, own.out - 1)) + which / splits;
            begin = most(begin, other.first(beside));
            end = least(end, other.first(beside + 1));
            beside = least(beside, other.in - 1);
        }
        const int size = (most(end - begin, 0) + splits - 1) / splits;
        begin += which % splits * size;
        return {begin, least(end, begin + size), beside};
    }
};

// Lanes run along cells, numbered consecutively over samples, rows of cells and cells. The parts of a cell are lanes of
// one warp (a `team`), up to the warp size. Chunks of rows of cells bound the extra memory.
struct CellsPlan {
    int n, classes;
    Pieces rows, columns;
    int team, sets;           // lanes per cell, and teams per cell
    int64_t chunk;            // rows of cells
    int sums = 0;             // per class: numbers that a warp sums for each sample

    FASTKD_ANYWHERE int64_t lines() const { return static_cast<int64_t>(n) * rows.own.cells(); }
    FASTKD_ANYWHERE int group() const { return kWarp / team; }  // cells per warp
    FASTKD_ANYWHERE int64_t groups(int64_t lines) const { return ceil_div(lines * columns.own.cells(), group()); }
    FASTKD_ANYWHERE int64_t warps(int64_t lines) const { return groups(lines) * sets; }

    // The kernels' copy of a map has repeated borders: rows -1 to h, columns -1 to w. A row of cells reads two rows.
    FASTKD_ANYWHERE int64_t padded_row(int64_t line) const {
        // Sample `n` has in + 2 padded rows for its cells, so it starts (in + 2 - cells) * n rows later.
        return line + sample(line) * (rows.own.in + 2 - rows.own.cells()) + rows.own.first_cell() + 1;
    }
    FASTKD_ANYWHERE int64_t padded_rows(int64_t first, int64_t lines) const {
        return padded_row(first + lines - 1) + 2 - padded_row(first);
    }
    // For a map of another size: whole samples.
    FASTKD_ANYWHERE int64_t sample(int64_t line) const { return quotient(line, rows.own.cells()); }
    FASTKD_ANYWHERE int64_t samples(int64_t first, int64_t lines) const {
        return sample(first + lines - 1) + 1 - sample(first);
    }
    // Rows of per-warp sums: one per group and sample in it. Their index is group + sample - first sample of the chunk,
    // which is unique because group or sample increases from row to row.
    FASTKD_ANYWHERE int64_t sums_rows(int64_t lines) const {
        return sums == 0 ? 0 : (groups(lines) + lines / rows.own.cells() + 2) * sets;
    }
    FASTKD_ANYWHERE bool same_size() const {
        return rows.own.in == rows.other.in && columns.own.in == columns.other.in;
    }
};

// Label pixels of a cell that a thread keeps in registers: rows and columns.
struct Shape {
    int rows, columns;
};
constexpr int kShapes = 4, kFewShapes = 3;
constexpr Shape kShape[kShapes] = {{2, 2}, {4, 4}, {4, 8}, {5, 9}};

// Number of leading shapes compiled: one for fp64, which is for checking; the small ones for maps of different sizes;
// at most those of the loss.
constexpr int shapes_of(bool wide, bool same_size, int first) { return wide ? 1 : !same_size && first > 2 ? 2 : first; }

struct CellsChoice {
    CellsPlan plan;
    int shape;
};

inline int power_of_two(int x) {
    int out = 1;
    while (out < x) out *= 2;
    return out;
}

inline Pieces pieces_of(const Axis& own, const Axis& other, int* largest) {
    Pieces out{own, other, 1, 1};
    *largest = own.largest_cell();
    if (own.in == other.in) return out;
    for (int cell = own.first_cell(); cell < own.in; ++cell) {
        const int begin = own.first(cell), end = own.first(cell + 1);
        if (begin < end) out.crossed = most(out.crossed, other.cell(end - 1) - other.cell(begin) + 1);
    }
    *largest = least(*largest, other.largest_cell());
    return out;
}

// Chooses the smallest shape that holds a cell (or the largest overlap of two maps' cells); larger cells are split.
// Parts get fewer rows while there are fewer than 16 warps per multiprocessor.
inline CellsChoice plan_cells(const Map& own, const Map& other, int64_t height, int64_t width, bool align_corners,
                              const Device& device, int first_shapes = kShapes) {
    const auto axis = [&](int64_t in, int64_t out) {
        return Axis{static_cast<int>(in), static_cast<int>(out), align_corners};
    };
    CellsChoice out{};
    CellsPlan& plan = out.plan;
    plan.n = static_cast<int>(own.n);
    plan.classes = static_cast<int>(own.c);
    int tall = 1, wide = 1;
    plan.rows = pieces_of(axis(own.h, height), axis(other.h, height), &tall);
    plan.columns = pieces_of(axis(own.w, width), axis(other.w, width), &wide);
    const int shapes = shapes_of(own.type == DType::f64, plan.same_size(), first_shapes);
    while (out.shape < shapes - 1 && wide > kShape[out.shape].columns) ++out.shape;
    if (out.shape == kShapes - 1 && wide > kShape[out.shape].columns) --out.shape;  // wider than 9 is split, into columns of 8
    plan.columns.splits = power_of_two((wide + kShape[out.shape].columns - 1) / kShape[out.shape].columns);
    plan.rows.splits = power_of_two((tall + kShape[out.shape].rows - 1) / kShape[out.shape].rows);
    const auto lay_out = [&] {
        const int parts = plan.rows.count() * plan.columns.count();
        plan.team = least(power_of_two(parts), kWarp);
        plan.sets = (parts + plan.team - 1) / plan.team;
    };
    lay_out();
    while (plan.warps(plan.lines()) < 16 * device.multiprocessors && plan.rows.splits < tall) {
        plan.rows.splits *= 2;
        lay_out();
    }
    plan.chunk = plan.lines();
    return out;
}

// Number of parts in which the rows of sums of a sample are added.
FASTKD_ANYWHERE int dice_pieces(const CellsPlan& plan) {
    return static_cast<int>(least(int64_t{kWarp}, ceil_div(plan.groups(plan.rows.own.cells()) * plan.sets, 64)));
}

// Bytes for a chunk of `lines` rows: copies of the maps and planes of the gradient.
inline int64_t cells_bytes(const CellsPlan& plan, int sides, bool gradient, int64_t lines, int64_t acc) {
    const int64_t w = plan.columns.own.in, c = plan.classes;
    const int64_t map = (lines + 3) * (c + 1) * (w + 2) * acc * (plan.same_size() ? sides : 1);
    return map + (gradient ? plan.sets * 2 * c * acc * (lines * w + plan.groups(lines)) : 0) +
           plan.sums_rows(lines) * c * plan.sums * acc;
}

// Limits extra memory to about a fortieth of plain PyTorch's (about 12 bytes per class, label pixel and map), but keeps
// enough rows to fill the device.
inline int64_t chunk_of(const CellsPlan& plan, int sides, bool gradient, int64_t acc, const Device& device) {
    const int64_t pixels = static_cast<int64_t>(plan.n) * plan.rows.own.out * plan.columns.own.out;
    const int64_t budget = most(device.smallest_budget, pixels * plan.classes * 3 * sides * acc / 40);
    const int64_t row = most(plan.warps(1), 1), fill = ceil_div(8 * device.multiprocessors, row);
    int64_t chunk = plan.lines();
    while (chunk > 1 && chunk > fill && cells_bytes(plan, sides, gradient, chunk, acc) > budget) chunk = (chunk + 1) / 2;
    return chunk;
}

// Warps over all chunks.
inline int64_t total_warps(const CellsPlan& plan) {
    int64_t warps = 0;
    for (int64_t first = 0; first < plan.lines(); first += plan.chunk)
        warps += plan.warps(least(plan.chunk, plan.lines() - first));
    return warps;
}

template <class A>
struct CellsBuffers {
    A *map[2], *peak[2], *planes, *edges, *carry[2], *sums;
    int64_t bytes;
};

// Pointers to the parts of a chunk's scratch memory; `bytes` is its size, also for a null pointer.
template <class A>
CellsBuffers<A> lay_out(const CellsPlan& plan, int sides, bool gradient, void* scratch) {
    CellsBuffers<A> out{};
    const auto take = [&](int64_t count) {
        A* at = reinterpret_cast<A*>(static_cast<char*>(scratch) + out.bytes);
        out.bytes = round_up(out.bytes + count * static_cast<int64_t>(sizeof(A)), 128);
        return at;
    };
    const int64_t c = plan.classes, w = plan.columns.own.in;
    int64_t rows = 0, samples = 0;
    for (int64_t first = 0; first < plan.lines(); first += plan.chunk) {
        const int64_t lines = least(plan.chunk, plan.lines() - first);
        rows = most(rows, plan.padded_rows(first, lines));
        samples = most(samples, plan.samples(first, lines));
    }
    for (int side = 0; side < sides; ++side) {
        const bool other = side == 1 && !plan.same_size();
        const int64_t wide = (other ? plan.columns.other.in : w) + 2;
        const int64_t tall = other ? samples * (plan.rows.other.in + 2) : rows;
        out.map[side] = take((tall * c + 1) * wide);  // one extra row: the loops prefetch the next class
        out.peak[side] = take(tall * wide);
    }
    if (gradient) {
        out.planes = take(plan.sets * plan.chunk * 2 * c * w);
        out.edges = take(plan.sets * plan.groups(plan.chunk) * 2 * c);
        for (A*& carry : out.carry) carry = take(c * w);
    }
    if (plan.sums > 0) out.sums = take(plan.sums_rows(plan.chunk) * c * plan.sums);
    return out;
}

inline int64_t scratch_bytes(const CellsPlan& plan, int sides, bool gradient, bool wide) {
    return wide ? lay_out<double>(plan, sides, gradient, nullptr).bytes : lay_out<float>(plan, sides, gradient, nullptr).bytes;
}

// Words of 32 elements: one bit for a target of 1, one bit for a counted target.
FASTKD_ANYWHERE int64_t code_words(int64_t width) { return ceil_div(width, kWarp); }

// Blocks that pack them, one word per lane at a time. Each warp of the next kernel sums their counts.
FASTKD_ANYWHERE int code_blocks(int64_t words) { return static_cast<int>(least(2 * kThreads, ceil_div(words, kThreads))); }

// Sums and selections

constexpr int64_t kFewParts = 1024;  // above this, many blocks compute partial sums first

// Room for `count` numbers and for the partial sums of the blocks that add them.
FASTKD_ANYWHERE int64_t part_space(int64_t count) { return count > kFewParts ? count + kThreads : count; }

// Radix select. Two blocks per multiprocessor of an H100, whose threads have 64 bytes in flight each.
constexpr int kDigit = 8, kBins = 1 << kDigit, kKthThreads = 512;

FASTKD_ANYWHERE int64_t kth_bins(DType type) { return (type == DType::f64 ? 64 : 32) / kDigit * kBins; }
FASTKD_ANYWHERE int kth_blocks(int64_t n) { return static_cast<int>(least(int64_t{264}, ceil_div(n, 16 * kKthThreads))); }

FASTKD_ANYWHERE int selection_blocks(int64_t pixels) {
    return static_cast<int>(least(int64_t{1024}, ceil_div(pixels, 8 * kThreads)));
}

}  // namespace fastkd::gpu

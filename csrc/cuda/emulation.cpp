// torch.ops.fastkd_cuda.* for CPU tensors, on the emulated GPU of emulation.h: built and loaded by tests only.
//
// torch.ops.fastkd_cuda_emulation.configure(...) sets the properties of the GPU and the order of its threads. The other
// operators there return plans as tables. Their schemas are in tests/emulation.py.
#include "emulation.h"

#include "../checks.h"
#include "cells_each.h"
#include "kd.h"
#include "kernels.h"
#include "losses.h"
#include "nfd.h"
#include "rdd.h"
#include "rescale.h"
#include "resized_dice.h"

namespace fastkd::gpu {
namespace {

Device emulated{227 * 1024, 228 * 1024, 132, 8, 256};  // clusters for small groups too
Order order = Order::random;

void configure(int64_t shared_per_block, int64_t shared_per_cores, int64_t multiprocessors, int64_t cluster,
               int64_t smallest, int64_t smallest_budget, std::string threads) {
    emulated = {shared_per_block, shared_per_cores, multiprocessors, static_cast<int>(cluster), smallest, smallest_budget};
    order = threads == "forwards" ? Order::forwards : threads == "backwards" ? Order::backwards : Order::random;
}

// A table of int64 on the device of `like`.
Tensor table(const Tensor& like, const std::vector<std::vector<int64_t>>& lines) {
    const auto width = static_cast<int64_t>(lines.empty() ? 0 : lines[0].size());
    Tensor out = new_empty(like, std::vector<int64_t>{static_cast<int64_t>(lines.size()), width},
                           torch::headeronly::ScalarType::Long);
    auto* to = static_cast<int64_t*>(out.mutable_data_ptr());
    for (const auto& line : lines) to = std::copy(line.begin(), line.end(), to);
    return out;
}

// Per unit of a streaming kernel: group, part index, parts per group, first element, number of elements.
Tensor row_units(const Tensor& like, int64_t runs, int64_t groups, int64_t length, int64_t vector) {
    const RowCut c = cut(Rows{runs, groups, length}, static_cast<int>(vector));
    std::vector<std::vector<int64_t>> lines;
    for (int64_t block = 0; block < c.blocks(); ++block)
        for (int64_t unit = block * (kThreads / c.team); unit < (block + 1) * (kThreads / c.team); ++unit)
            if (unit < c.units()) lines.push_back({c.group(unit), c.part(unit), c.parts(), c.first(unit), c.count(unit)});
    return table(like, lines);
}

// Per block of a streaming kernel: outer index, first column, width, part index, parts per group, first and last row.
Tensor column_blocks(const Tensor& like, int64_t outer, int64_t rows, int64_t inner, int64_t vector) {
    const ColumnCut c = cut(Columns{outer, rows, inner}, static_cast<int>(vector));
    std::vector<std::vector<int64_t>> lines;
    for (int64_t b = 0; b < c.blocks(); ++b)
        lines.push_back({c.outer(b), c.strip(b) * c.width(), c.width(), c.part(b), c.chunks, c.first_row(b), c.last_row(b)});
    return table(like, lines);
}

void check_layout(const SharedLayout& at, int64_t columns, int64_t share_bytes) {
    const bool apart = at.part >= kStages * 8 && at.warps >= at.part + columns * 48 &&
                       at.stats >= at.warps + kWarps * columns * 24 && at.student >= at.stats + columns * 24 &&
                       at.teacher >= at.student + share_bytes && at.total >= at.teacher + share_bytes;
    if (!apart || at.part % 8 || at.warps % 4 || at.student % 128 || at.teacher % 128)
        throw std::logic_error("emulation: parts of shared memory overlap or are not aligned");
}

// Per bulk copy: group, rank, stage, offset in memory, first element within the group, number of elements, bytes of
// shared memory.
Tensor row_pieces(const Tensor& like, int64_t runs, int64_t groups, int64_t length, int64_t bytes) {
    const RowShares plan = share_out(Rows{runs, groups, length}, static_cast<int>(bytes), emulated);
    std::vector<std::vector<int64_t>> lines;
    if (plan.cluster) check_layout(plan.shared, 1, plan.share * bytes);
    for (int64_t block = 0; block < plan.blocks(); ++block) {
        const int rank = static_cast<int>(block % plan.cluster);
        for (int64_t from = plan.first(rank), stage = 0; from < plan.last(rank); from += plan.stage, ++stage)
            plan.each_piece(block / plan.cluster, from, least(from + plan.stage, plan.last(rank)),
                            [&](int64_t offset, int64_t at, int64_t count) {
                                lines.push_back({block / plan.cluster, rank, stage, offset, at, count, plan.shared.total});
                            });
    }
    return table(like, lines);
}

// Whether a full H100 computes the gradient of NFD in one read.
Tensor nfd_reads(const Tensor& student, const Tensor& teacher, std::string dims) {
    const Device h100{227 << 10, 228 << 10, 132, 8};
    return table(student, {{plan_nfd(pair_of(student, teacher), group_of(dims), h100).one_read()}});
}

// Pixels per tile, tiles per line of pixels, pixels per line, bytes of shared memory; 0 pixels if nothing fits.
Tensor kd_tiles(const Tensor& x) {
    const KdPlan plan = plan_kd(pair_of(x, x), emulated);
    return table(x, {{plan.pixels, plan.tiles, plan.inner, plan.total}});
}

// Per output of a resize: its cell, the first output of that cell and of the next one, the largest number of outputs in
// a cell.
Tensor axis_cells(const Tensor& like, int64_t in, int64_t out, bool align_corners) {
    const Axis axis{static_cast<int>(in), static_cast<int>(out), align_corners};
    std::vector<std::vector<int64_t>> lines;
    for (int x = 0; x < axis.out; ++x) {
        const int cell = axis.cell(x);
        lines.push_back({cell, axis.first(cell), axis.first(cell + 1), axis.largest_cell()});
    }
    return table(like, lines);
}

CellsChoice choice(const Tensor& student, const Tensor& teacher, int64_t height, int64_t width, bool align_corners) {
    CellsChoice out = plan_cells(map_of(student, "student"), map_of(teacher, "teacher"), height, width, align_corners, emulated);
    out.plan.chunk = chunk_of(out.plan, 2, true, 4, emulated);
    return out;
}

// Per part of a cell that has label pixels: sample, cell, the teacher's cell, rows and columns of label pixels.
Tensor cell_parts(const Tensor& student, const Tensor& teacher, int64_t height, int64_t width, bool align_corners) {
    const CellsChoice chosen = choice(student, teacher, height, width, align_corners);
    const CellsPlan& plan = chosen.plan;
    std::vector<std::vector<int64_t>> lines;
    for (int64_t n = 0; n < plan.n; ++n)
        for (int y = plan.rows.own.first_cell(); y < plan.rows.own.in; ++y)
            for (int x = plan.columns.own.first_cell(); x < plan.columns.own.in; ++x)
                for (int part = 0; part < plan.rows.count() * plan.columns.count(); ++part) {
                    const Piece down = plan.rows.piece(y, part / plan.columns.count());
                    const Piece across = plan.columns.piece(x, part % plan.columns.count());
                    if (down.begin >= down.end || across.begin >= across.end) continue;
                    const Shape most = kShape[chosen.shape];
                    if (down.end - down.begin > most.rows || across.end - across.begin > most.columns)
                        throw std::logic_error("emulation: a part beyond its shape");
                    lines.push_back({n, y, x, down.other, across.other, down.begin, down.end, across.begin, across.end});
                }
    return table(student, lines);
}

// Rows and columns of the shape, lanes per team and teams per cell, rows of cells in total and per chunk, bytes of
// scratch memory, warps.
Tensor cells_plan(const Tensor& student, const Tensor& teacher, int64_t height, int64_t width, bool align_corners) {
    const CellsChoice chosen = choice(student, teacher, height, width, align_corners);
    const CellsPlan& plan = chosen.plan;
    return table(student, {{kShape[chosen.shape].rows, kShape[chosen.shape].columns, plan.team, plan.sets, plan.lines(),
                            plan.chunk, scratch_bytes(plan, 2, true, false), plan.warps(plan.lines())}});
}

}  // namespace

Device device(int) { return emulated; }
void nfd_forward(const NfdForward& a, Stream) { nfd_forward(a, Launcher{order}); }
void nfd_backward(const NfdBackward& a, Stream) { nfd_backward(a, Launcher{order}); }
void kd(const Kd& a, Stream) { kd<false>(a, Launcher{order}); }
void kd_sigmoid(const Kd& a, Stream) { kd<true>(a, Launcher{order}); }
void resized_cross_entropy(const Resized& a, Stream) { resized_cross_entropy(a, Launcher{order}); }
void resized_shaped_cross_entropy(const Resized& a, double label_smoothing, double focal_gamma, Stream) {
    resized_shaped_cross_entropy(a, label_smoothing, focal_gamma, Launcher{order});
}
void resized_kd(const Resized& a, Stream) { resized_kd(a, Launcher{order}); }
void resized_kd_sigmoid(const Resized& a, Stream) { resized_kd_sigmoid(a, Launcher{order}); }
void resized_dice_forward(const ResizedDice& a, Stream) { resized_dice_forward(a, Launcher{order}); }
void resized_dice_backward(const ResizedDice& a, Stream) { resized_dice_backward(a, Launcher{order}); }
void resized_binary_cross_entropy(const ResizedBinaryCrossEntropy& a, Stream) {
    resized_binary_cross_entropy(a, Launcher{order});
}
void confidence(const Resized& a, bool by_label, Stream) { confidence(a, by_label, Launcher{order}); }
void difficulty(const Difficulty& a, Stream) { difficulty(a, Launcher{order}); }
void kth_smallest(const Kth& a, Stream) { kth_smallest(a, Launcher{order}); }
void rescale(const Rescale& a, Stream) { rescale(a, Launcher{order}); }

}  // namespace fastkd::gpu

STABLE_TORCH_LIBRARY_IMPL(fastkd_cuda_emulation, CompositeExplicitAutograd, m) {
    m.impl("configure", TORCH_BOX(&fastkd::gpu::configure));
    m.impl("row_units", TORCH_BOX(&fastkd::gpu::row_units));
    m.impl("column_blocks", TORCH_BOX(&fastkd::gpu::column_blocks));
    m.impl("row_pieces", TORCH_BOX(&fastkd::gpu::row_pieces));
    m.impl("nfd_reads", TORCH_BOX(&fastkd::gpu::nfd_reads));
    m.impl("kd_tiles", TORCH_BOX(&fastkd::gpu::kd_tiles));
    m.impl("axis_cells", TORCH_BOX(&fastkd::gpu::axis_cells));
    m.impl("cell_parts", TORCH_BOX(&fastkd::gpu::cell_parts));
    m.impl("cells_plan", TORCH_BOX(&fastkd::gpu::cells_plan));
}

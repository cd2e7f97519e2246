// NFD: mean of (z(S) - z(T))^2 per group of M elements (docs/nfd.md), in CUDA (docs/cuda.md).
//
//   d = vs is^2 + vt it^2 - 2 c is it,  is = (vs + eps)^-1/2,  it = (vt + eps)^-1/2
//   dd/ds = A (s - mean_s) - B (t - mean_t),  A = 2/M is^2 (1 - vs is^2 + c is it),  B = 2/M is it
//
// Two algorithms. Streaming: the forward reads S and T, the backward reads both again and writes the gradient, 5 tensor
// transfers; for groups in rows and in columns (plan.h). One read: a cluster of blocks keeps a group of S and T in
// shared memory until its moments are known, then writes the gradient, 3 transfers; for groups in rows.
#pragma once

#include "dispatch.h"
#include "kernels.h"
#include "moments.h"
#include "pixels.h"

namespace fastkd::gpu {

constexpr int kStats = 6;  // per group: both means as shift and remainder, A and B

template <class A>
FASTKD_DEVICE void finish(const Moments<double>& m, double eps, double scale, A* loss, A* stats) {
    const double vs = m.ss / m.n, vt = m.tt / m.n, c = m.st / m.n;
    const double is = 1 / sqrt(vs + eps), it = 1 / sqrt(vt + eps);
    const double own = vs * is * is, other = vt * it * it, both = c * is * it, d = (own - both) + (other - both);
    *loss = static_cast<A>(d < 0 ? 0 : d * scale);
    stats[0] = static_cast<A>(m.mean_s);
    stats[1] = static_cast<A>(m.mean_s - static_cast<double>(stats[0]));
    stats[2] = static_cast<A>(m.mean_t);
    stats[3] = static_cast<A>(m.mean_t - static_cast<double>(stats[2]));
    stats[4] = static_cast<A>(2 / m.n * is * is * (1 - (own - both)));
    stats[5] = static_cast<A>(2 / m.n * is * it);
}

// grad (A x - B y) as b (q x - y) with b = grad B, q = A / B: exactly 0 if student and teacher are equal (q = 1).
template <class A>
struct Coefficients {
    A shift_s, rest_s, shift_t, rest_t, q, b;

    FASTKD_DEVICE A operator()(A s, A t) const {
        return b * multiply_add(q, (s - shift_s) - rest_s, -((t - shift_t) - rest_t));
    }
};

template <class A>
FASTKD_DEVICE Coefficients<A> coefficients(const A* stats, A grad) {
    return {stats[0], stats[1], stats[2], stats[3], stats[4] / stats[5], grad * stats[5]};
}

// Shared by streaming and one read

template <int V>
constexpr int kTileRows = (V == 1 ? kTileOfOnes : kTile) / V;  // vectors per tile

template <int N>
struct Count {
    static constexpr int value = N;
};

// Adds the vectors member, member + team, ... of `vectors` contiguous ones starting at element `first`. Index: 64-bit
// in device memory, 32-bit in shared memory.
template <class Index, class T, int V, class A = Accumulator<T>>
FASTKD_DEVICE void add_line(Moments<A>& m, const Source<T, V>& student, const Source<T, V>& teacher, Index first,
                            int member, int team, int vectors, A shift_s, A shift_t) {
    int v = member;
    const auto add = [&](auto count) {
        constexpr int R = decltype(count)::value;
        A s[R][V], t[R][V];
        FASTKD_UNROLL
        for (int u = 0; u < R; ++u) student.read(first + static_cast<Index>(v + u * team) * V, s[u]);
        FASTKD_UNROLL
        for (int u = 0; u < R; ++u) teacher.read(first + static_cast<Index>(v + u * team) * V, t[u]);
        m = merged(m, moments_of(s, t, shift_s, shift_t));
    };
    constexpr int R = kTileRows<V>;
    FASTKD_ROLLED
    for (; v + (R - 1) * team < vectors; v += R * team) add(Count<R>{});
    FASTKD_ROLLED
    for (; v < vectors; v += team) add(Count<1>{});  // fewer than R remain
}

// Adds rows row, row + slots, ... up to last to V columns. at(row) is the offset of a row's V elements.
template <class T, int V, class Index, class At, class A = Accumulator<T>>
FASTKD_DEVICE void add_columns(Moments<A> (&m)[V], const Source<T, V>& student, const Source<T, V>& teacher, Index row,
                               Index last, int slots, const A (&shift_s)[V], const A (&shift_t)[V], const At& at) {
    A counted = m[0].n;  // the same for all columns
    const auto add = [&](auto rows) {
        constexpr int R = decltype(rows)::value;
        const Counts<A> n(counted, R);
        A s[R][V], t[R][V];
        FASTKD_UNROLL
        for (int u = 0; u < R; ++u) student.read(at(row + u * slots), s[u]);
        FASTKD_UNROLL
        for (int u = 0; u < R; ++u) teacher.read(at(row + u * slots), t[u]);
        FASTKD_UNROLL
        for (int i = 0; i < V; ++i) {
            A one_s[R][1], one_t[R][1];
            FASTKD_UNROLL
            for (int u = 0; u < R; ++u) {
                one_s[u][0] = s[u][i];
                one_t[u][0] = t[u][i];
            }
            m[i] = merged(m[i], moments_of(one_s, one_t, shift_s[i], shift_t[i]), n);
        }
        counted = n.total;
    };
    constexpr int R = V == 1 ? kTileRows<V> : 2 * kTileRows<V>;
    FASTKD_ROLLED
    for (; row + (R - 1) * slots < last; row += R * slots) add(Count<R>{});
    FASTKD_ROLLED
    for (; row < last; row += slots) add(Count<1>{});  // fewer than R remain
    FASTKD_UNROLL
    for (int i = 0; i < V; ++i) m[i].n = counted;
}

// The block's moments, returned in thread 0; `warps` is shared memory for kWarps of them.
template <class Block, class A>
FASTKD_DEVICE Moments<A> merge_block(Block& block, Moments<A> m, Moments<A>* warps) {
    if (block.thread() % kWarp == 0) warps[block.thread() / kWarp] = m;
    block.sync();
    for (int w = 1; w < kWarps && block.thread() == 0; ++w) m = merged(m, warps[w]);
    return m;
}

// Moments of a strip by column: thread i returns those of column i. `warps` is (kWarps, lanes * V).
template <class Block, class A, int V>
FASTKD_DEVICE Moments<A> merge_strip(Block& block, const Moments<A> (&m)[V], int lanes, Moments<A>* warps) {
    const int width = lanes * V, lane = block.thread() % lanes;
    FASTKD_UNROLL
    for (int i = 0; i < V; ++i) {
        const Moments<A> all = merge_lanes(block, m[i], lanes);
        if (block.thread() % kWarp < lanes) warps[block.thread() / kWarp * width + lane * V + i] = all;
    }
    block.sync();
    Moments<A> out{};
    for (int w = 0; w < kWarps && block.thread() < width; ++w) out = merged(out, warps[w * width + block.thread()]);
    return out;
}

// Gradient of `vectors` vectors starting at element `to` of the map; student and teacher are read starting at `from`.
template <class Index, class T, int V, class A = Accumulator<T>>
FASTKD_DEVICE void gradient_line(const Coefficients<A>& k, const Source<T, V>& student, const Source<T, V>& teacher,
                                 Index from, const Sink<T, V>& out, int64_t to, int member, int team, int vectors) {
    int v = member;
    const auto write = [&](auto count) {
        constexpr int R = decltype(count)::value;
        A s[R][V], t[R][V];
        FASTKD_UNROLL
        for (int u = 0; u < R; ++u) {
            student.read(from + static_cast<Index>(v + u * team) * V, s[u]);
            teacher.read(from + static_cast<Index>(v + u * team) * V, t[u]);
        }
        FASTKD_UNROLL
        for (int u = 0; u < R; ++u) {
            FASTKD_UNROLL
            for (int i = 0; i < V; ++i) s[u][i] = k(s[u][i], t[u][i]);
            out.write(to + static_cast<int64_t>(v + u * team) * V, s[u]);
        }
    };
    constexpr int R = kTileRows<V>;
    FASTKD_ROLLED
    for (; v + (R - 1) * team < vectors; v += R * team) write(Count<R>{});
    FASTKD_ROLLED
    for (; v < vectors; v += team) write(Count<1>{});
}

// Gradient of V columns: rows row, row + slots, ... up to last. from(row) is the offset of student and teacher, to(row)
// that of the gradient. `all` is shared memory (6, width) for the coefficients of the columns.
template <class T, int V, class Index, class From, class To, class A = Accumulator<T>>
FASTKD_DEVICE void gradient_columns(const A* all, int width, int column, const Source<T, V>& student,
                                    const Source<T, V>& teacher, const Sink<T, V>& out, Index row, Index last,
                                    int slots, const From& from, const To& to) {
    Coefficients<A> k[V];
    FASTKD_UNROLL
    for (int i = 0; i < V; ++i)
        k[i] = {all[column + i],             all[width + column + i],     all[2 * width + column + i],
                all[3 * width + column + i], all[4 * width + column + i], all[5 * width + column + i]};
    const auto write = [&](auto rows) {
        constexpr int R = decltype(rows)::value;
        A s[R][V], t[R][V];
        FASTKD_UNROLL
        for (int u = 0; u < R; ++u) {
            student.read(from(row + u * slots), s[u]);
            teacher.read(from(row + u * slots), t[u]);
        }
        FASTKD_UNROLL
        for (int u = 0; u < R; ++u) {
            FASTKD_UNROLL
            for (int i = 0; i < V; ++i) s[u][i] = k[i](s[u][i], t[u][i]);
            out.write(to(row + u * slots), s[u]);
        }
    };
    constexpr int R = kTileRows<V>;
    FASTKD_ROLLED
    for (; row + (R - 1) * slots < last; row += R * slots) write(Count<R>{});
    FASTKD_ROLLED
    for (; row < last; row += slots) write(Count<1>{});
}

template <class A>
FASTKD_DEVICE void put_coefficients(A* all, int width, int column, const Coefficients<A>& k) {
    const A fields[kStats] = {k.shift_s, k.rest_s, k.shift_t, k.rest_t, k.q, k.b};
    for (int f = 0; f < kStats; ++f) all[f * width + column] = fields[f];
}

// Streaming

template <class T, int V>
struct NfdForwardRows {
    using A = Accumulator<T>;
    static constexpr int kBlocksPerCores = V == 1 ? 2 : 4;

    Source<T, V> student, teacher;
    RowCut cut;
    double eps, scale;
    A *loss, *stats;
    Moments<double>* parts;

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        const int member = block.thread() % cut.team;
        const int64_t unit = block.index() * (kThreads / cut.team) + block.thread() / cut.team;
        const bool exists = unit < cut.units();
        const int64_t first = exists ? cut.first(unit) : 0;
        const A shift_s = student.one(first), shift_t = teacher.one(first);
        Moments<A> m{};
        if (exists)
            add_line(m, student, teacher, first, member, cut.team, cut.count(unit) / V, shift_s, shift_t);
        m = merge_lanes(block, m);
        if (cut.team == kThreads) m = merge_block(block, m, block.template shared<Moments<A>>(0));
        if (!exists || member != 0) return;
        const Moments<double> all = absolute(m, shift_s, shift_t);
        const int64_t group = cut.group(unit);
        if (cut.parts() == 1)
            finish(all, eps, scale, loss + group, stats + group * kStats);
        else
            parts[group * cut.parts() + cut.part(unit)] = all;
    }
};

template <class T, int V>
struct NfdForwardColumns {
    using A = Accumulator<T>;
    static constexpr int kBlocksPerCores = 2;

    Source<T, V> student, teacher;
    ColumnCut cut;
    double eps, scale;
    A *loss, *stats;
    Moments<double>* parts;

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        const int64_t b = block.index(), strip = cut.strip(b) * cut.width(), row = cut.first_row(b);
        const int64_t column = strip + block.thread() % cut.lanes * V;
        Moments<A> m[V] = {};
        if (column < cut.columns.inner) {
            A shift_s[V], shift_t[V];
            student.read(cut.at(b, row, column), shift_s);
            teacher.read(cut.at(b, row, column), shift_t);
            add_columns(m, student, teacher, row + block.thread() / cut.lanes, cut.last_row(b), cut.slots(), shift_s,
                        shift_t, [&](int64_t r) { return cut.at(b, r, column); });
        }
        const Moments<A> mine = merge_strip(block, m, cut.lanes, block.template shared<Moments<A>>(0));
        const int64_t own = strip + block.thread();
        if (block.thread() >= cut.width() || own >= cut.columns.inner) return;
        const int64_t first = cut.at(b, row, own), group = cut.outer(b) * cut.columns.inner + own;
        const Moments<double> all = absolute(mine, student.one(first), teacher.one(first));
        if (cut.chunks == 1)
            finish(all, eps, scale, loss + group, stats + group * kStats);
        else
            parts[group * cut.chunks + cut.part(b)] = all;
    }
};

// One warp per group: merges its parts in an order that depends only on their number.
template <class A>
struct NfdMerge {
    static constexpr int kBlocksPerCores = 2;

    const Moments<double>* parts;
    int64_t groups, count;
    double eps, scale;
    A *loss, *stats;

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        const int64_t group = block.index() * kWarps + block.thread() / kWarp;
        const int lane = block.thread() % kWarp;
        Moments<double> m{};
        for (int64_t i = lane; group < groups && i < count; i += kWarp) m = merged(m, parts[group * count + i]);
        m = merge_lanes(block, m);
        if (group < groups && lane == 0) finish(m, eps, scale, loss + group, stats + group * kStats);
    }
};

template <class T, int V>
struct NfdBackwardRows {
    using A = Accumulator<T>;
    static constexpr int kBlocksPerCores = V == 1 ? 2 : 4;

    Source<T, V> student, teacher;
    Sink<T, V> out;
    RowCut cut;
    const A *grad, *stats;
    bool per_group;
    A scale;

    FASTKD_DEVICE A upstream(int64_t group) const { return grad ? grad[per_group ? group : 0] * scale : scale; }

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        const int64_t unit = block.index() * (kThreads / cut.team) + block.thread() / cut.team;
        if (unit >= cut.units()) return;
        const int64_t group = cut.group(unit), first = cut.first(unit);
        gradient_line(coefficients(stats + group * kStats, upstream(group)), student, teacher, first, out, first,
                      block.thread() % cut.team, cut.team, cut.count(unit) / V);
    }
};

template <class T, int V>
struct NfdBackwardColumns {
    using A = Accumulator<T>;
    static constexpr int kBlocksPerCores = 2;

    Source<T, V> student, teacher;
    Sink<T, V> out;
    ColumnCut cut;
    const A *grad, *stats;
    bool per_group;
    A scale;

    FASTKD_DEVICE A upstream(int64_t group) const { return grad ? grad[per_group ? group : 0] * scale : scale; }

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        const int64_t b = block.index(), strip = cut.strip(b) * cut.width();
        const int width = static_cast<int>(cut.width()), lane = block.thread() % cut.lanes * V;
        A* all = block.template shared<A>(0);
        const int64_t own = cut.outer(b) * cut.columns.inner + strip + block.thread();
        if (block.thread() < width && strip + block.thread() < cut.columns.inner)
            put_coefficients(all, width, block.thread(), coefficients(stats + own * kStats, upstream(own)));
        block.sync();
        if (strip + lane >= cut.columns.inner) return;
        const auto at = [&](int64_t row) { return cut.at(b, row, strip + lane); };
        gradient_columns(all, width, lane, student, teacher, out, cut.first_row(b) + block.thread() / cut.lanes,
                         cut.last_row(b), cut.slots(), at, at);
    }
};

// One read
//
// All blocks of a cluster merge the same parts in the same order, so they have identical results; block 0 writes them.

template <class T, int V>
struct NfdOneReadRows {
    using A = Accumulator<T>;
    static constexpr bool kOneRead = true;
    static constexpr int kBlocksPerCores = 3;

    const T *student, *teacher;
    RowShares plan;
    double eps, scale;
    A *loss, *stats;
    T* gradient;

    template <class Block>
    FASTKD_DEVICE void operator()(Block& block) const {
        const int rank = static_cast<int>(block.index() % plan.cluster);
        const int64_t group = block.index() / plan.cluster, first = plan.first(rank), last = plan.last(rank);
        T *s = block.template shared<T>(plan.shared.student), *t = block.template shared<T>(plan.shared.teacher);
        if (block.thread() == 0) fetch(block, group, first, last, s, t);
        block.sync();

        Moments<A> m{};
        A shift_s = 0, shift_t = 0;
        const Source<T, V> here_s(s), here_t(t);
        if (first < last) {
            shift_s = static_cast<A>(student[plan.at(group, first)]);
            shift_t = static_cast<A>(teacher[plan.at(group, first)]);
            const int count = static_cast<int>(last - first), stage = static_cast<int>(plan.stage);
            FASTKD_ROLLED
            for (int from = 0, i = 0; from < count; from += stage, ++i) {
                block.wait(i);
                const int here = count - from < stage ? count - from : stage;
                add_line(m, here_s, here_t, from, block.thread(), kThreads, here / V, shift_s, shift_t);
            }
        }
        m = merge_block(block, merge_lanes(block, m), block.template shared<Moments<A>>(plan.shared.warps));

        auto* part = block.template shared<Moments<double>>(plan.shared.part);
        A* numbers = block.template shared<A>(plan.shared.stats);
        if (block.thread() == 0) *part = absolute(m, shift_s, shift_t);
        block.cluster_arrive();
        block.cluster_wait();
        if (block.thread() == 0) {
            Moments<double> all = *block.remote(part, 0);
            FASTKD_ROLLED
            for (int r = 1; r < plan.cluster; ++r) all = merged(all, *block.remote(part, r));
            A value;
            finish(all, eps, 1, &value, numbers);
            if (rank == 0) {
                loss[group] = value;
                for (int i = 0; i < kStats; ++i) stats[group * kStats + i] = numbers[i];
            }
        }
        block.sync();
        block.cluster_arrive();  // last access to another block's shared memory; the matching wait is at the end

        const Coefficients<A> k = coefficients(numbers, static_cast<A>(scale));
        const Sink<T, V> out(gradient);
        plan.each_piece(group, first, last, [&](int64_t to, int64_t at, int64_t count) {
            gradient_line(k, here_s, here_t, static_cast<int>(at - first), out, to, block.thread(), kThreads,
                          static_cast<int>(count / V));
        });
        block.cluster_wait();
    }

private:
    template <class Block>
    FASTKD_DEVICE void fetch(Block& block, int64_t group, int64_t first, int64_t last, T* s, T* t) const {
        block.prepare_barriers(kStages);
        for (int64_t from = first, i = 0; from < last; from += plan.stage, ++i) {
            const int64_t to = least(from + plan.stage, last);
            const int stage = static_cast<int>(i);
            block.expect(stage, 2 * (to - from) * static_cast<int64_t>(sizeof(T)));
            plan.each_piece(group, from, to, [&](int64_t offset, int64_t at, int64_t count) {
                const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
                block.bulk_copy(s + (at - first), student + offset, bytes, stage);
                block.bulk_copy(t + (at - first), teacher + offset, bytes, stage);
            });
        }
    }
};

// Launches

template <class Launch>
void nfd_forward(const NfdForward& a, const Launch& launch) {
    const Pair& in = a.in;
    const NfdPlan& plan = a.plan;
    with_kind(in, plan.vector, [&](auto kind) {
        using T = typename decltype(kind)::type;
        using A = Accumulator<T>;
        constexpr int V = decltype(kind)::vector;
        const bool none = a.reduce == Reduce::none;
        const double scale = none ? a.scale : 1;
        A *loss = static_cast<A*>(none ? a.loss : a.losses), *stats = static_cast<A*>(a.stats);
        auto* parts = static_cast<Moments<double>*>(a.parts);
        const Source<T, V> student(in.student, in.student_type), teacher(in.teacher, in.teacher_type);
        const int64_t groups = plan.rows ? plan.row_cut.rows.groups : plan.column_cut.columns.outer * plan.column_cut.columns.inner;
        if (V > 1 && a.gradient) {
            if constexpr (V > 1)
                launch(NfdOneReadRows<T, V>{student.data, teacher.data, plan.shares, a.eps, a.scale, loss, stats,
                                            static_cast<T*>(a.gradient)},
                       plan.shares.blocks(), plan.shares.shared.total, plan.shares.cluster);
        } else {
            if (plan.rows) {
                launch(NfdForwardRows<T, V>{student, teacher, plan.row_cut, a.eps, scale, loss, stats, parts},
                       plan.row_cut.blocks(), kWarps * sizeof(Moments<A>));
            } else {
                const ColumnCut& cut = plan.column_cut;
                launch(NfdForwardColumns<T, V>{student, teacher, cut, a.eps, scale, loss, stats, parts}, cut.blocks(),
                       kWarps * cut.width() * static_cast<int64_t>(sizeof(Moments<A>)));
            }
            if (plan.parts() > 1)
                launch(NfdMerge<A>{parts, groups, plan.parts(), a.eps, scale, loss, stats}, ceil_div(groups, kWarps), 0);
        }
        if (none) return;
        const int blocks = count_blocks(groups);
        launch(PartialSums<A>{loss, groups, a.sum_parts, blocks}, blocks, kSumScratch);
        launch_total(Total<A>{nullptr, blocks, nullptr, 0, groups, false, a.scale, static_cast<A*>(a.loss), nullptr},
                     a.sum_parts, launch);
    });
}

template <class Launch>
void nfd_backward(const NfdBackward& a, const Launch& launch) {
    const Pair& in = a.in;
    const bool rows = in_rows(a.group, in.channels_last);
    const Rows lines = rows_of(a.group, in.channels_last, in.n, in.c, in.hw);
    const Columns columns = columns_of(a.group, in.channels_last, in.n, in.c, in.hw);
    with_kind(in, vector_of(in, rows ? lines.length : columns.inner, a.out), [&](auto kind) {
        using T = typename decltype(kind)::type;
        using A = Accumulator<T>;
        constexpr int V = decltype(kind)::vector;
        const Source<T, V> student(in.student, in.student_type), teacher(in.teacher, in.teacher_type);
        const Sink<T, V> out(a.out, in.student_type);
        const A *grad = static_cast<const A*>(a.grad), *stats = static_cast<const A*>(a.stats);
        const A scale = static_cast<A>(a.scale);
        if (rows) {
            const RowCut lines_cut = cut(lines, V);
            launch(NfdBackwardRows<T, V>{student, teacher, out, lines_cut, grad, stats, a.per_group, scale},
                   lines_cut.blocks(), 0);
        } else {
            const ColumnCut strips = cut(columns, V);
            launch(NfdBackwardColumns<T, V>{student, teacher, out, strips, grad, stats, a.per_group, scale}, strips.blocks(),
                   kStats * strips.width() * static_cast<int64_t>(sizeof(A)));
        }
    });
}

}  // namespace fastkd::gpu

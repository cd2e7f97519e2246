// Launches a loss at label resolution: the count; per chunk of rows the copies, the loops and the join; the final sum.
#pragma once

#include <type_traits>

#include "cells.h"
#include "cells_join.h"
#include "cells_prepare.h"
#include "dispatch.h"
#include "kernels.h"

namespace fastkd::gpu {

template <class A, bool kCentred, class Launch>
void prepare(const Map& map, double scale, int64_t first, int64_t rows, A* out, A* peak, const Launch& launch) {
    const auto run = [&](auto kind) {
        using T = typename decltype(kind)::type;
        if constexpr (std::is_same_v<Accumulator<T>, A>) {
            const CellsPrepare<T, kCentred> body{Source<T, 1>(map.data, map.type), map.channels_last, map.c, map.h, map.w, first, rows,
                                       static_cast<A>(scale), out, peak};
            launch(body, body.blocks(), CellsPrepare<T, kCentred>::kShared);
        }
    };
    with_dtype(map.type, run);
}

// Runs the chunks of a call; `body` is a loss's Cells. after(body) runs after the loops of each chunk.
template <class Body, class Launch, class After>
void run_cells(const Resized& a, Body body, const Launch& launch, const After& after) {
    using A = typename Body::A;
    constexpr bool gradient = Body::kMakesGradient;
    const CellsPlan& plan = a.choice.plan;
    const CellsBuffers<A> at = lay_out<A>(plan, a.sides, gradient, a.scratch);
    double* parts = body.parts;
    int chunk = 0;
    for (int64_t first = 0; first < plan.lines(); first += plan.chunk, ++chunk) {
        const int64_t lines = least(plan.chunk, plan.lines() - first);
        for (int side = 0; side < Body::kSides; ++side) {
            const Map& map = a.maps[side];
            const bool other = side == 1 && Body::kGrids == 2;
            const int64_t from = other ? plan.sample(first) * (map.h + 2) : plan.padded_row(first);
            const int64_t rows = other ? plan.samples(first, lines) * (map.h + 2) : plan.padded_rows(first, lines);
            prepare<A, Body::kCentred>(map, kLog2E / a.temperature, from, rows, at.map[side], at.peak[side], launch);
            body.map[side] = at.map[side];
            body.peak[side] = at.peak[side];
            body.given[side] = {map.data, map.type, map.channels_last, map.c, map.h, map.w,
                                static_cast<A>(kLog2E / a.temperature)};
        }
        body.first = first;
        body.lines = lines;
        body.parts = parts;
        body.planes = at.planes;
        body.edges = at.edges;
        if constexpr (Body::kAddsClasses) body.class_sums = at.sums;
        launch(body, body.blocks(), 0);
        after(body, at);
        if (parts) parts += plan.warps(lines);
        if constexpr (gradient) {
            const auto join = [&](auto kind) {
                using T = typename decltype(kind)::type;
                if constexpr (std::is_same_v<Accumulator<T>, A>) {
                    const CellsJoin<T> body_of_join{plan, first, lines, at.planes, at.edges, at.carry[chunk % 2],
                                                    at.carry[1 - chunk % 2], Sink<T, 1>(a.gradient, a.maps[0].type),
                                                    a.maps[0].channels_last};
                    launch(body_of_join, body_of_join.blocks(), CellsJoin<T>::kShared);
                }
            };
            a.maps[0].type == DType::f64 ? join(Kind<double, 1>{}) : join(Kind<Any, 1>{});
        }
    }
}

// f(ShapeOf) for shape number `shape` of the first `count`.
template <int PY, int PX>
struct ShapeOf {
    static constexpr int rows = PY, columns = PX;
};
template <int count, class F>
void with_shape(int shape, const F& f) {
    if constexpr (count > 0) {
        if (shape == count - 1) return f(ShapeOf<kShape[count - 1].rows, kShape[count - 1].columns>{});
        with_shape<count - 1>(shape, f);
    }
}

// Runs the chunks of a loss: make(shape, gradient) returns the kernel; its terms are divided by the sum of `counters`
// numbers.
template <class Loss, class Make, class Launch, class After>
void run_loss(const Resized& a, int counters, double scale, const Make& make, const Launch& launch, const After& after) {
    using A = typename Loss::A;
    with_shape<shapes_of(sizeof(A) == 8, Loss::kGrids == 1, Loss::kFirstShapes)>(a.choice.shape, [&](auto shape) {
        const auto run = [&](auto gradient) {
            auto body = make(shape, gradient);
            body.plan = a.choice.plan;
            body.pixels = a.pixels;
            body.known = static_cast<const A*>(a.known);
            body.terms = static_cast<A*>(a.terms);
            body.sums_of = static_cast<A*>(a.sums);
            body.parts = a.parts;
            body.counted = a.count_parts;
            body.counters = counters;
            body.scale = static_cast<A>(scale);
            run_cells(a, body, launch, after);
        };
        if constexpr (Loss::kGradient) {
            if (a.gradient) return run(std::true_type{});
        }
        if constexpr (Loss::kForward) run(std::false_type{});
    });
}

struct NothingAfter {
    template <class Body, class Buffers>
    void operator()(const Body&, const Buffers&) const {}
};

// A complete loss over label pixels: count, chunks, final sum.
template <class Loss, class Make, class Launch>
void resized_as(const Resized& a, const Make& make, const Launch& launch) {
    using A = typename Loss::A;
    const CellsPlan& plan = a.choice.plan;
    const int64_t all = static_cast<int64_t>(plan.n) * plan.rows.own.out * plan.columns.own.out;
    const bool counts = a.pixels.label != Label::none || a.known;
    const int counters = count_blocks(all);
    if (counts && a.count)
        launch(CellsCount<A>{a.pixels, static_cast<const A*>(a.known), plan.classes, all, a.count_parts, counters}, counters,
               kSumScratch);
    const bool divides = a.reduce == Reduce::mean;
    run_loss<Loss>(a, divides && counts ? counters : 0, divides && !counts ? a.scale / static_cast<double>(all) : a.scale, make,
                   launch, NothingAfter{});
    if (a.count)
        launch_total(Total<A>{nullptr, total_warps(plan), counts ? a.count_parts : nullptr, counters, all, divides, a.scale,
                              static_cast<A*>(a.loss), static_cast<A*>(a.count)},
                     a.parts, launch);
}

// `loss` is a struct from losses.h.
template <class Loss, class Launch>
void resized(const Resized& a, const Loss& loss, const Launch& launch) {
    const auto make = [&](auto shape, auto gradient) {
        Cells<Loss, decltype(shape)::rows, decltype(shape)::columns, decltype(gradient)::value> body{};
        body.loss = loss;
        return body;
    };
    resized_as<Loss>(a, make, launch);
}

}  // namespace fastkd::gpu

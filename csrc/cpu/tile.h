// Spans and tiles: reading inputs of any dtype and memory format in the accumulation type.
//
// A kernel works on spans or tiles of Acc that fit the L1 or L2 cache. An input that is already Acc is read in place if
// the loop is linear; others are converted to scratch one span at a time. So each kernel is compiled once per Acc, not
// once per pair of dtypes and memory format.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace fastkd::FASTKD_ISA {

template <class T>
struct Type {
    using type = T;
};

template <class Acc, class F>
inline void with_type(DType type, const F& f) {
    if constexpr (sizeof(Acc) == sizeof(double)) {
        f(Type<double>{});
    } else {
        switch (type) {
            case DType::f16: f(Type<f16>{}); break;
            case DType::bf16: f(Type<bf16>{}); break;
            default: f(Type<float>{});
        }
    }
}

// Runs f(Type<Acc>) with the accumulation type.
template <class F>
inline void with_acc(DType type, const F& f) {
    if (type == DType::f64)
        f(Type<double>{});
    else
        f(Type<float>{});
}
template <class F>
inline void with_acc(const Pair& in, const F& f) {
    with_acc(in.student_type, f);
}

template <class Acc>
inline bool in_place(DType type) {
    return type == (sizeof(Acc) == sizeof(double) ? DType::f64 : DType::f32);
}

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads

// The items of one thread, claimed dynamically in blocks, so that no thread waits for one that the system has
// descheduled.
class Items {
public:
    Items(int64_t* next, int64_t items, int64_t block) : next_(next), items_(items), block_(block) {}

    struct End {};
    struct Iterator {
        int64_t operator*() const { return item; }
        void operator++() {
            if (++item == end) take();
        }
        bool operator!=(End) const { return item < items->items_; }
        void take() {
            item = __atomic_fetch_add(items->next_, items->block_, __ATOMIC_RELAXED);
            end = min(items->items_, item + items->block_);
        }
        const Items* items;
        int64_t item = 0, end = 0;
    };
    Iterator begin() const {
        Iterator first{this};
        first.take();
        return first;
    }
    End end() const { return {}; }

private:
    int64_t* const next_;
    const int64_t items_, block_;
};

// Runs body(items) on each thread, with `for (int64_t item : items)`, for items [0, count) of about `cost` elements
// each. Items are independent and depend on the shape only, so results do not depend on the assignment to threads.
template <class F>
inline void parallel_items(ParallelFor parallel_for, int64_t count, int64_t cost, const F& body) {
    const int64_t grain = cost >= 32768 ? 1 : 32768 / (cost > 0 ? cost : 1);
    int64_t next = 0;
    // Blocks, because neighbouring items share pages and prefetched lines; 64 of them keep the imbalance at the end
    // small.
    const Items items(&next, count, max(1, count / 64));
    const auto run = [&] { body(items); };
    parallel_for(
        0, count, grain, [](int64_t, int64_t, void* context) { (*static_cast<decltype(run)*>(context))(); },
        const_cast<void*>(static_cast<const void*>(&run)));
}

inline int64_t bytes_of(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }

// Spans

// The first n < kLanes elements as Acc; the other lanes are 0.
template <class Acc, class T>
inline Vec<Acc> load_tail(const T* in, int64_t n) {
    T part[kLanes<Acc>];
    for (int i = 0; i < kLanes<Acc>; ++i) part[i] = i < n ? in[i] : T{};
    return load(part);
}
template <class Acc, class T>
inline void store_tail(T* out, int64_t n, Vec<Acc> v) {
    T part[kLanes<Acc>];
    store(part, v);
    for (int64_t i = 0; i < n; ++i) out[i] = part[i];
}

template <class T, class Acc>
inline void convert(const T* in, int64_t n, Acc* out) {
    constexpr int W = kLanes<Acc>;
    int64_t i = 0;
    for (; i + W <= n; i += W) store(out + i, load(in + i));
    if (i < n) store_part(out + i, n - i, load_tail<Acc>(in + i, n - i));
}

template <class T, class Acc>
inline void convert_back(const Acc* in, int64_t n, T* out) {
    constexpr int W = kLanes<Acc>;
    int64_t i = 0;
    for (; i + W <= n; i += W) store(out + i, load(in + i));
    if (i < n) store_tail<Acc>(out + i, n - i, load_part(in + i, n - i, Acc(0)));
}

// Elements [offset, offset + n) as Acc: in place if they are Acc, else converted to scratch (n elements).
template <class Acc>
inline const Acc* view(const void* data, DType type, int64_t offset, int64_t n, Acc* scratch) {
    if (in_place<Acc>(type)) return static_cast<const Acc*>(data) + offset;
    with_type<Acc>(type, [&](auto t) {
        using T = typename decltype(t)::type;
        convert(static_cast<const T*>(data) + offset, n, scratch);
    });
    return scratch;
}

// Destination of elements [offset, offset + n): the output itself, or scratch that commit() converts.
template <class Acc>
inline Acc* target_span(void* data, DType type, int64_t offset, Acc* scratch) {
    return in_place<Acc>(type) ? static_cast<Acc*>(data) + offset : scratch;
}
template <class Acc>
inline void commit(void* data, DType type, int64_t offset, int64_t n, const Acc* scratch) {
    if (in_place<Acc>(type)) return;
    with_type<Acc>(type, [&](auto t) {
        using T = typename decltype(t)::type;
        convert_back(scratch, n, static_cast<T*>(data) + offset);
    });
}

// Tiles
//
// A tile of rows x lanes is stored as one (rows, W) block per W lanes, so that a reduction over the rows of a block
// reads memory linearly. Lanes past the end hold 0.

template <class Acc>
inline int64_t tile_size(int64_t rows, int64_t lanes) {
    return ceil_div(lanes, kLanes<Acc>) * kLanes<Acc> * rows;
}

// Rows are short and far apart, out of reach of the hardware prefetcher.
constexpr int64_t kRowsAhead = 4;

// Element (row, lane) is at offset + row * stride + lane.
template <class Acc>
inline void load_tile(const void* data, DType type, int64_t offset, int64_t rows, int64_t stride, int64_t lanes,
                      Acc* tile) {
    constexpr int W = kLanes<Acc>;
    with_type<Acc>(type, [&](auto t) {
        using T = typename decltype(t)::type;
        const T* in = static_cast<const T*>(data) + offset;
        for (int64_t r = 0; r < rows; ++r, in += stride) {
            int64_t l = 0;
            for (; l + W <= lanes; l += W) {
                prefetch(in + kRowsAhead * stride + l);
                store(tile + l * rows + r * W, load(in + l));
            }
            if (l < lanes) store(tile + l * rows + r * W, load_tail<Acc>(in + l, lanes - l));
        }
    });
}

template <class Acc>
inline void store_tile(void* data, DType type, int64_t offset, int64_t rows, int64_t stride, int64_t lanes,
                       const Acc* tile) {
    constexpr int W = kLanes<Acc>;
    with_type<Acc>(type, [&](auto t) {
        using T = typename decltype(t)::type;
        T* out = static_cast<T*>(data) + offset;
        for (int64_t r = 0; r < rows; ++r, out += stride) {
            int64_t l = 0;
            for (; l + W <= lanes; l += W) store(out + l, load(tile + l * rows + r * W));
            if (l < lanes) store_tail<Acc>(out + l, lanes - l, load(tile + l * rows + r * W));
        }
    });
}

typedef float Quad __attribute__((vector_size(16)));
typedef int32_t QuadIndex __attribute__((vector_size(16)));

template <int A, int B, int C, int D>
inline Quad shuffle(Quad x, Quad y) {
#if defined(__clang__)
    return __builtin_shufflevector(x, y, A, B, C, D);
#else
    return __builtin_shuffle(x, y, QuadIndex{A, B, C, D});
#endif
}

// out[j * out_stride + i] = in[i * in_stride + j] for i, j in 0..3
inline void transpose4(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
    const Quad a = load_raw<Quad>(in), b = load_raw<Quad>(in + in_stride);
    const Quad c = load_raw<Quad>(in + 2 * in_stride), d = load_raw<Quad>(in + 3 * in_stride);
    const Quad ab0 = shuffle<0, 4, 1, 5>(a, b), ab1 = shuffle<2, 6, 3, 7>(a, b);
    const Quad cd0 = shuffle<0, 4, 1, 5>(c, d), cd1 = shuffle<2, 6, 3, 7>(c, d);
    store_raw(out, shuffle<0, 1, 4, 5>(ab0, cd0));
    store_raw(out + out_stride, shuffle<2, 3, 6, 7>(ab0, cd0));
    store_raw(out + 2 * out_stride, shuffle<0, 1, 4, 5>(ab1, cd1));
    store_raw(out + 3 * out_stride, shuffle<2, 3, 6, 7>(ab1, cd1));
}

// Transposes (lanes, rows) in memory to a tile of rows x lanes, and back.
template <class Acc>
inline void transpose_in(const Acc* in, int64_t rows, int64_t lanes, Acc* tile) {
    constexpr int W = kLanes<Acc>;
    int64_t l = 0;
    if constexpr (sizeof(Acc) == sizeof(float)) {
        if (rows >= 4)
            for (; l + 4 <= lanes; l += 4) {
                Acc* out = tile + (l / W) * W * rows + l % W;
                const Acc* from = in + l * rows;
                for (int64_t r = 0; r + 4 <= rows; r += 4) transpose4(from + r, rows, out + r * W, W);
                if (rows % 4) transpose4(from + rows - 4, rows, out + (rows - 4) * W, W);  // overlaps: same values
            }
    }
    for (; l < lanes; ++l)
        for (int64_t r = 0; r < rows; ++r) tile[(l / W) * W * rows + r * W + l % W] = in[l * rows + r];
    for (; l % W; ++l)
        for (int64_t r = 0; r < rows; ++r) tile[(l / W) * W * rows + r * W + l % W] = 0;
}

template <class Acc>
inline void transpose_out(const Acc* tile, int64_t rows, int64_t lanes, Acc* out) {
    constexpr int W = kLanes<Acc>;
    int64_t l = 0;
    if constexpr (sizeof(Acc) == sizeof(float)) {
        if (rows >= 4)
            for (; l + 4 <= lanes; l += 4) {
                const Acc* from = tile + (l / W) * W * rows + l % W;
                Acc* to = out + l * rows;
                for (int64_t r = 0; r + 4 <= rows; r += 4) transpose4(from + r * W, W, to + r, rows);
                if (rows % 4) transpose4(from + (rows - 4) * W, W, to + rows - 4, rows);
            }
    }
    for (; l < lanes; ++l)
        for (int64_t r = 0; r < rows; ++r) out[l * rows + r] = tile[(l / W) * W * rows + r * W + l % W];
}

// Pixel tiles: rows are channels, lanes are pixels, in either memory format

// Pixels per tile: about 16 KB per input, so that both fit the L1 cache; but at least 64 pixels, 4 cache lines per
// channel, while the tile fits the L2 cache.
inline int64_t pixel_lanes(int64_t c) { return c > 1024 ? 16 : max(64, min(256, 4096 / c / 16 * 16)); }

// Address of a tile of pixels for prefetching: the next tile of the inputs, this tile of the output.
class TileAddress {
public:
    TileAddress(const Pair& in, const void* data, DType type, int64_t n, int64_t first, int64_t width) {
        const int64_t bytes = bytes_of(type);
        if (first >= in.hw) ++n, first = 0;
        base_ = static_cast<const char*>(data) +
                bytes * (in.channels_last ? (n * in.hw + first) * in.c : n * in.c * in.hw + first);
        row_ = bytes * (in.channels_last ? width : in.hw);
        lane_ = bytes * (in.channels_last ? in.c : 1);
    }
    void fetch(int64_t row, int64_t lane) const { prefetch(base_ + row * row_ + lane * lane_); }

private:
    const char* base_;
    int64_t row_, lane_;
};

template <class Acc>
inline void load_pixels(const Pair& in, const void* data, DType type, int64_t n, int64_t first, int64_t lanes,
                        Acc* tile, Acc* scratch) {
    if (in.channels_last)
        transpose_in(view(data, type, (n * in.hw + first) * in.c, lanes * in.c, scratch), in.c, lanes, tile);
    else
        load_tile(data, type, n * in.c * in.hw + first, in.c, in.hw, lanes, tile);
}

template <class Acc>
inline void store_pixels(const Pair& in, void* data, DType type, int64_t n, int64_t first, int64_t lanes,
                         const Acc* tile, Acc* scratch) {
    if (in.channels_last) {
        const int64_t offset = (n * in.hw + first) * in.c;
        Acc* out = target_span(data, type, offset, scratch);
        transpose_out(tile, in.c, lanes, out);
        commit(data, type, offset, lanes * in.c, out);
    } else {
        store_tile(data, type, n * in.c * in.hw + first, in.c, in.hw, lanes, tile);
    }
}

}  // namespace fastkd::FASTKD_ISA

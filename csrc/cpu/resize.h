// Bilinear interpolation for the resized losses, organised in cells.
//
// A cell is the area between a logit and its right neighbour (and between rows y and y + 1). The label pixels of one
// row within a cell are its phases. A vector holds one phase of neighbouring cells. So it needs two contiguous loads of
// logits at any ratio, and the transposed interpolation is two contiguous adds: no gather, permutation or atomic. At a
// fractional ratio some phases of some cells are empty; their weight is 0.
#pragma once

#include "reduce.h"

namespace fastkd::FASTKD_ISA {

// One axis of a bilinear resize in exact integer arithmetic: torch's source coordinate without its rounding.
class Axis {
public:
    Axis(int64_t in, int64_t out, bool align_corners) : in_(in), out_(out), align_(align_corners) {}

    struct Tap {
        int64_t left, right;
        double weight;  // of `right`; `left` has 1 - weight
    };

    Tap tap(int64_t x) const {
        const int64_t over = align_ ? x * (in_ - 1) : (2 * x + 1) * in_ - out_;
        const int64_t under = align_ ? max(out_ - 1, 1) : 2 * out_;
        const int64_t left = over < 0 ? 0 : over / under;
        if (over < 0 || left >= in_ - 1) return {min(left, in_ - 1), min(left, in_ - 1), 0};
        return {left, left + 1, static_cast<double>(over - left * under) / static_cast<double>(under)};
    }

    // first[cell] = first output of this cell or of a later one; first[in] = out.
    void starts(int64_t* first) const {
        int64_t cell = 0;
        for (int64_t x = 0; x < out_; ++x)
            for (const int64_t left = tap(x).left; cell <= left; ++cell) first[cell] = x;
        for (; cell <= in_; ++cell) first[cell] = out_;
    }

    int64_t in() const { return in_; }
    int64_t out() const { return out_; }

private:
    int64_t in_, out_;
    bool align_;
};

// Label columns by phase and cell.
template <class Acc>
struct Columns {
    explicit Columns(const Axis& axis)
        : cells(axis.in()),
          padded(ceil_div(axis.in(), kLanes<Acc>) * kLanes<Acc>),
          width(axis.out()),
          phases(most(axis)),
          slot(axis.out()),
          right(phases * padded) {
        for (int64_t i = 0; i < phases * padded; ++i) right[i] = 0;
        int64_t cell = -1, phase = 0;
        for (int64_t x = 0; x < width; ++x) {
            const Axis::Tap tap = axis.tap(x);
            phase = tap.left == cell ? phase + 1 : 0;
            cell = tap.left;
            slot[x] = static_cast<int32_t>(phase * padded + cell);
            right[slot[x]] = static_cast<Acc>(tap.weight);
            blend |= tap.weight != 0;
        }
    }

    const int64_t cells, padded, width, phases;
    const Scratch<int32_t> slot;  // (width,): label column -> phase * padded + cell
    const Scratch<Acc> right;     // (phases, padded): weight of the right logit
    bool blend = false;           // whether any weight is nonzero

private:
    static int64_t most(const Axis& axis) {
        const Scratch<int64_t> first(axis.in() + 1);
        axis.starts(first);
        int64_t n = 1;
        for (int64_t i = 0; i < axis.in(); ++i) n = max(n, first[i + 1] - first[i]);
        return n;
    }
};

template <class Acc>
constexpr Acc kLowest = sizeof(Acc) == sizeof(double) ? Acc(-0x1p1022) : Acc(-0x1p126);  // the sum of two does not overflow

// The interpolated row of logits for a label row: converted to Acc, blended from two rows, minus a bound on the maximum
// of each pixel.
//
// The maximum over classes of an interpolated pixel is at most the interpolated maximum. Subtracting that bound keeps
// every exponential at or below 1 (up to rounding). It costs one operation per logit instead of one per label pixel.
template <class Acc>
class Row {
    static constexpr int W = kLanes<Acc>;

public:
    Row(const Map& map, int64_t padded)
        : stride(padded + W),
          map_(map),
          loaded_{Scratch<Acc>((map.c + 1) * stride), Scratch<Acc>((map.c + 1) * stride)},
          values_(map.c * stride),
          plain_(map.c * stride),
          scratch_(map.channels_last ? map.w * map.c : 0) {}

    // Blends rows tap.left and tap.right of sample n and multiplies by scale.
    void load(int64_t n, const Axis::Tap& tap, Acc scale) {
        top_ = row(n, tap.left), bottom_ = row(n, tap.right), weight_ = tap.weight, scale_ = scale;
        have_plain_ = false;
        const Acc *top = top_, *bottom = bottom_, *top_max = top + map_.c * stride, *bottom_max = bottom + map_.c * stride;
        const Vec<Acc> a = set1(static_cast<Acc>(1 - tap.weight)), b = set1(static_cast<Acc>(tap.weight)),
                       factor = set1(scale), lowest = set1(kLowest<Acc>), none = set1(Acc(-__builtin_inff()));
        for (int64_t c = 0; c < map_.c; ++c)
            for (int64_t x = 0; x < stride; x += W) {
                Vec<Acc> v = load_at(top + c * stride + x), m = load_at(top_max + x);
                if (tap.weight != 0) {  // else 0 * inf would be NaN
                    v = a * v + b * load_at(bottom + c * stride + x);
                    m = a * m + b * load_at(bottom_max + x);
                }
                // Clamps to [kLowest, 0]. Rounding can leave a huge logit above its bound, outside the range of exp().
                // A difference or product can overflow to -inf, and its product with a weight of 0 would be NaN. An
                // input of -inf or NaN is kept.
                const Vec<Acc> d = (v - m) * factor, below = d > 0 ? Vec<Acc>{} : d;
                store(values_ + c * stride + x, v > none ? max(lowest, below) : d);
            }
    }

    // Only plain() is needed.
    void load_plain(int64_t n, const Axis::Tap& tap, Acc scale) {
        top_ = row(n, tap.left), bottom_ = row(n, tap.right), weight_ = tap.weight, scale_ = scale;
        have_plain_ = false;
        plain();
    }

    const Acc* values() const { return values_; }  // (c, stride), the last logit repeated to the right
    // The values without the bound subtracted. Far below the bound, the subtraction has rounded away their low digits.
    const Acc* plain() {
        if (have_plain_) return plain_;
        const Vec<Acc> a = set1(static_cast<Acc>(1 - weight_)), b = set1(static_cast<Acc>(weight_)), factor = set1(scale_);
        for (int64_t i = 0; i < map_.c * stride; i += W) {
            Vec<Acc> v = load_at(top_ + i);
            if (weight_ != 0) v = a * v + b * load_at(bottom_ + i);
            store(plain_ + i, v * factor);
        }
        have_plain_ = true;
        return plain_;
    }
    const int64_t stride;

private:
    static Vec<Acc> load_at(const Acc* p) { return fastkd::FASTKD_ISA::load(p); }

    const Acc* row(int64_t n, int64_t y) {
        const int slot = y % 2;
        Acc* out = loaded_[slot];
        if (n_[slot] == n && y_[slot] == y) return out;
        n_[slot] = n;
        y_[slot] = y;
        with_type<Acc>(map_.type, [&](auto t) {
            using T = typename decltype(t)::type;
            const T* in = static_cast<const T*>(map_.data);
            if (map_.channels_last) {
                convert(in + (n * map_.h + y) * map_.w * map_.c, map_.w * map_.c, static_cast<Acc*>(scratch_));
                for (int64_t c = 0; c < map_.c; ++c)
                    for (int64_t x = 0; x < map_.w; ++x) out[c * stride + x] = scratch_[x * map_.c + c];
            } else {
                for (int64_t c = 0; c < map_.c; ++c)
                    convert(in + ((n * map_.c + c) * map_.h + y) * map_.w, map_.w, out + c * stride);
            }
        });
        Acc* most = out + map_.c * stride;
        for (int64_t x = 0; x < stride; ++x) most[x] = -__builtin_inff();
        for (int64_t c = 0; c < map_.c; ++c) {
            Acc* values = out + c * stride;
            for (int64_t x = map_.w; x < stride; ++x) values[x] = values[map_.w - 1];
            for (int64_t x = 0; x < stride; x += W)
                store(most + x, max(load_at(values + x), load_at(most + x)));
        }
        for (int64_t x = 0; x < stride; ++x)
            if (most[x] == -__builtin_inff()) most[x] = 0;  // -inf - -inf would be NaN
        return out;
    }

    const Map map_;
    const Scratch<Acc> loaded_[2];  // (c, stride), and (stride,): maximum over c
    const Scratch<Acc> values_, plain_, scratch_;
    const Acc *top_ = nullptr, *bottom_ = nullptr;
    double weight_ = 0;
    Acc scale_ = 1;
    bool have_plain_ = false;
    int64_t n_[2] = {-1, -1}, y_[2] = {-1, -1};
};

// True if the sum may have lost terms to fp32 underflow: the bound was far above the true maximum.
template <class Acc>
constexpr Acc kTiny = sizeof(Acc) == sizeof(double) ? Acc(1e-140) : Acc(1e-17);

// Logits of a vector of label pixels: interpolated from a row of logits, or, if kAhead, already laid out by phase.
template <class Acc, bool kAhead>
struct Side {
    const Acc* values;
    int64_t stride;  // between classes
    int64_t phase;   // between phases, if kAhead

    // kCareful: a neighbour of weight 0 contributes exactly 0, even at -inf (0 * inf is NaN).
    template <bool kBlend, bool kCareful>
    Vec<Acc> value(Vec<Acc> right, int64_t c, int64_t k) const {
        const Acc* at = values + c * stride;
        if constexpr (kAhead) return load(at + k * phase);
        const Vec<Acc> own = load(at);
        if constexpr (!kBlend) return own;
        const Vec<Acc> blend = (set1(Acc(1)) - right) * own + right * load(at + 1);
        if constexpr (kCareful) return right == 0 ? own : blend;
        return blend;
    }
};

// Value of the labelled class per pixel (class 0 if unlabelled).
template <class Acc>
inline Vec<Acc> labelled_value(const Side<Acc, false>& side, const Acc* labels, Vec<Acc> right) {
    constexpr int W = kLanes<Acc>;
    Acc out[W], weight[W];
    store(weight, right);
    for (int i = 0; i < W; ++i) {
        const Acc* at = side.values + (labels[i] < 0 ? 0 : static_cast<int64_t>(labels[i])) * side.stride + i;
        out[i] = weight[i] == 0 ? at[0] : (1 - weight[i]) * at[0] + weight[i] * at[1];
    }
    return load(out);
}

// table[label] per pixel, 0 if unlabelled.
template <class Acc>
inline Vec<Acc> by_label(const Acc* table, Vec<Acc> label) {
    constexpr int W = kLanes<Acc>;
    Acc labels[W], out[W];
    store(labels, label);
    for (int i = 0; i < W; ++i) out[i] = labels[i] < 0 ? Acc(0) : table[static_cast<int64_t>(labels[i])];
    return load(out);
}

// Softmaxes of G vectors of label pixels. `e` receives exp(value), classes `e_stride` apart, vectors W apart. If a sum
// is tiny or NaN, the bound was too loose or a value is not finite. Those pixels are recomputed from the plain values
// about their true maximum.
template <class Acc, int G, bool kAhead>
struct Softmax {
    static constexpr int W = kLanes<Acc>;
    Vec<Acc> sum[G], most[G];
    bool careful = false;

    // `plain` returns the Side of the plain values; called only if needed.
    template <bool kStore, bool kMost, bool kBlend, class Plain>
    void compute(const Side<Acc, kAhead>& side, const Plain& plain, const Vec<Acc>* right, int64_t classes, Acc* e,
                 int64_t e_stride) {
        run<kStore, kMost, kBlend, false>(side, right, classes, e, e_stride);
        for (int j = 0; j < G; ++j) careful |= any(!(sum[j] >= kTiny<Acc>));
        if (!careful) return;
        plain_ = plain();
        for (int j = 0; j < G; ++j) top_[j] = set1(Acc(-__builtin_inff()));
        for (int64_t c = 0; c < classes; ++c)
            for (int j = 0; j < G; ++j) top_[j] = max(plain_.template value<kBlend, true>(right[j], c, j), top_[j]);
        for (int j = 0; j < G; ++j)  // only those pixels: a result must not depend on its neighbours
            again_[j] = (!(sum[j] >= kTiny<Acc>)) & (top_[j] != -__builtin_inff());
        run<kStore, kMost, kBlend, true>(side, right, classes, e, e_stride);
    }

    // The argument of the exponential of class c of vector j; kCareful if `careful` is set for this or another side.
    template <bool kBlend, bool kCareful>
    Vec<Acc> value(const Side<Acc, kAhead>& side, Vec<Acc> right, int64_t c, int64_t j) const {
        const Vec<Acc> own = side.template value<kBlend, kCareful>(right, c, j);
        if (!kCareful || !careful) return own;
        return again_[j] ? plain_.template value<kBlend, true>(right, c, j) - top_[j] : own;
    }

    // The same for the labelled class of each pixel.
    Vec<Acc> labelled(const Side<Acc, kAhead>& side, const Acc* labels, Vec<Acc> right, int64_t j) const {
        const Vec<Acc> own = labelled_value(side, labels, right);
        if (!careful) return own;
        return again_[j] ? labelled_value(plain_, labels, right) - top_[j] : own;
    }

    // A weighted sum over the classes, on the same scale as the exponentials: `own` is computed from values, `plain`
    // from plain values.
    template <bool kBlend, class PlainSum>
    Vec<Acc> combined(const Acc* own, const PlainSum& plain, Vec<Acc> right, Acc weights, int64_t j) const {
        const Vec<Acc> v = Side<Acc, false>{own, 0, 0}.template value<kBlend, true>(right, 0, 0);
        if (!careful) return v;
        const Vec<Acc> w = Side<Acc, false>{plain(), 0, 0}.template value<kBlend, true>(right, 0, 0);
        return again_[j] ? w - top_[j] * weights : v;
    }

private:
    template <bool kStore, bool kMost, bool kBlend, bool kCareful>
    void run(const Side<Acc, kAhead>& side, const Vec<Acc>* right, int64_t classes, Acc* e, int64_t e_stride) {
        Vec<Acc> left[G];
        for (int j = 0; j < G; ++j) {
            left[j] = set1(Acc(1)) - right[j];
            sum[j] = most[j] = Vec<Acc>{};
        }
        constexpr int64_t kRows = 64;  // classes per partial sum: two levels keep fp32 sums short
        for (int64_t first = 0; first < classes; first += kRows) {
            Vec<Acc> part[G] = {};
            const int64_t last = min(classes, first + kRows);
            for (int64_t c = first; c < last; ++c) {
                const Acc* at = side.values + c * side.stride;
                Vec<Acc> a{}, b{};
                if constexpr (!kAhead) a = load(at);
                if constexpr (!kAhead && kBlend) b = load(at + 1);
                for (int j = 0; j < G; ++j) {
                    Vec<Acc> v = a;
                    if constexpr (kAhead) v = load(at + j * side.phase);
                    else if constexpr (kBlend) v = left[j] * a + right[j] * b;
                    if constexpr (kCareful) v = value<kBlend, true>(side, right[j], c, j);
                    const Vec<Acc> ex = exp(v);
                    part[j] += ex;
                    if constexpr (kMost) most[j] = max(most[j], ex);
                    if constexpr (kStore) store(e + c * e_stride + j * W, ex);
                }
            }
            for (int j = 0; j < G; ++j) sum[j] += part[j];
        }
    }

    using Mask = decltype(Vec<Acc>{} < Vec<Acc>{});
    Side<Acc, kAhead> plain_{};
    Vec<Acc> top_[G];
    Mask again_[G];
};

// f(Type) with an integral constant 1 to 4: the number of vectors processed together, which hides the latency of exp.
template <int N>
struct Count {
    static constexpr int value = N;
};
template <class F>
inline void by_count(int64_t n, const F& f) {
    switch (n) {
        case 1: f(Count<1>{}); break;
        case 2: f(Count<2>{}); break;
        case 3: f(Count<3>{}); break;
        default: f(Count<4>{});
    }
}

// The gradient

// Gradient contributions of label rows to a row of logits: to the left and to the right logit of each cell, (c, stride)
// each.
template <class Acc>
struct RowGradient {
    static constexpr int W = kLanes<Acc>;
    RowGradient(int64_t c, int64_t padded) : stride(padded + W), size(c * stride + W), left(size), right(size) {}

    void clear() {
        for (int64_t i = 0; i < size; i += W) {
            store(left + i, Vec<Acc>{});
            store(right + i, Vec<Acc>{});
        }
    }
    void add(const RowGradient& o) {
        for (int64_t i = 0; i < size; i += W) {
            store(left + i, load(left + i) + load(o.left + i));
            store(right + i, load(right + i) + load(o.right + i));
        }
    }
    // Gradient of logit (c, x): from its own cell and the cell to its left. The right logit of the last cell is the
    // last logit.
    Acc at(int64_t c, int64_t x, int64_t w) const {
        const Acc* r = right + c * stride;
        return left[c * stride + x] + (x ? r[x - 1] : Acc(0)) + (x == w - 1 ? r[x] : Acc(0));
    }

    const int64_t stride, size;
    const Scratch<Acc> left, right;
};

// Gradient at logit size, in the accumulation type until its scale is known; and the last row of each band, which is
// added to the first row of the next band.
template <class Acc>
class GradientRows {
public:
    GradientRows(void* out, const Map& map, int64_t items)
        : map_(map),
          result_(out),
          own_(out && !in_place<Acc>(map.type) ? size() : 0),
          rows_(out && !in_place<Acc>(map.type) ? static_cast<Acc*>(own_) : static_cast<Acc*>(out)),
          spill_(out ? items * map.c * map.w : 0) {}

    void write(int64_t n, int64_t y, const RowGradient<Acc>& row) const {
        for (int64_t c = 0; c < map_.c; ++c)
            for (int64_t x = 0; x < map_.w; ++x) rows_[offset(n, c, y) + x * step()] = row.at(c, x, map_.w);
    }
    void spill(int64_t item, const RowGradient<Acc>& row) const {
        for (int64_t c = 0; c < map_.c; ++c)
            for (int64_t x = 0; x < map_.w; ++x) spill_[(item * map_.c + c) * map_.w + x] = row.at(c, x, map_.w);
    }
    void add_spill(int64_t item, int64_t n, int64_t y) const {
        for (int64_t c = 0; c < map_.c; ++c)
            for (int64_t x = 0; x < map_.w; ++x)
                rows_[offset(n, c, y) + x * step()] += spill_[(item * map_.c + c) * map_.w + x];
    }
    // Scales the gradient and converts it to the dtype of the logits.
    void finish(Acc scale, ParallelFor parallel_for) const {
        if (scale == 1 && in_place<Acc>(map_.type)) return;
        constexpr int64_t kSpan = 16384;
        parallel_items(parallel_for, ceil_div(size(), kSpan), kSpan, [&](const Items& mine) {
            for (const int64_t item : mine) {
                const int64_t first = item * kSpan, n = min(kSpan, size() - first);
                for (int64_t i = 0; i < n; ++i) rows_[first + i] *= scale;
                commit(result_, map_.type, first, n, rows_ + first);
            }
        });
    }

private:
    int64_t size() const { return map_.n * map_.c * map_.h * map_.w; }
    int64_t step() const { return map_.channels_last ? map_.c : 1; }
    int64_t offset(int64_t n, int64_t c, int64_t y) const {
        return map_.channels_last ? (n * map_.h + y) * map_.w * map_.c + c : ((n * map_.c + c) * map_.h + y) * map_.w;
    }

    const Map map_;
    void* const result_;
    const Scratch<Acc> own_;
    Acc* const rows_;
    const Scratch<Acc> spill_;  // (items, c, w)
};

// Bands of cell rows, about 32 in total so that threads share them evenly. Depends on the shape only.
struct Bands {
    Bands(int64_t n, int64_t h) : per_sample(min(h, max(1, ceil_div(32, n)))), h(h) {}
    int64_t first(int64_t band) const { return band * h / per_sample; }
    const int64_t per_sample, h;
};

// Label pixels

// One label row by phase and cell: the class (-1 if not counted) and the factor of the pixel's term.
template <class Acc>
class PixelRow {
public:
    PixelRow(const LabelPixels& pixels, const Axis& rows, const Columns<Acc>& columns, bool align_corners)
        : label(columns.phases * columns.padded),
          factor(columns.phases * columns.padded),
          weight(pixels.keep_weight ? columns.phases * columns.padded : 0),
          pixels_(pixels),
          columns_(columns),
          height_(rows.out()),
          weight_rows_(pixels.weight_h, rows.out(), align_corners),
          weight_row_(pixels.weight_w),
          weight_right_(pixels.weight ? columns.width : 0),
          weight_left_(pixels.weight ? columns.width : 0),
          weight_next_(pixels.weight ? columns.width : 0) {
        const Axis axis(pixels.weight_w, columns.width, align_corners);
        for (int64_t x = 0; pixels.weight && x < columns.width; ++x) {
            const Axis::Tap tap = axis.tap(x);
            weight_left_[x] = static_cast<int32_t>(tap.left);
            weight_next_[x] = static_cast<int32_t>(tap.right);
            weight_right_[x] = static_cast<Acc>(tap.weight);
        }
        for (int64_t i = 0; i < columns.phases * columns.padded; ++i) {
            label[i] = -1;
            factor[i] = 0;
            if (pixels.keep_weight) weight[i] = 0;
        }
    }

    // Reads label row y of sample n. Returns the summed class weights of the counted pixels.
    double load(int64_t n, int64_t y) const {
        switch (pixels_.label) {
            case Label::none: return read(n, y, [](int64_t) { return 0; });
            case Label::u8: return read_labels<uint8_t>(n, y);
            case Label::i32: return read_labels<int32_t>(n, y);
            default: return read_labels<int64_t>(n, y);
        }
    }

    const Scratch<Acc> label, factor;  // -1 and 0 if not counted
    const Scratch<Acc> weight;         // the factor without the class weight, if kept

private:
    template <class T>
    double read_labels(int64_t n, int64_t y) const {
        const T* row = static_cast<const T*>(pixels_.target) + (n * height_ + y) * columns_.width;
        return read(n, y, [&](int64_t x) -> int64_t {
            const int64_t label = row[x];
            return label == pixels_.ignore_index || label < 0 || label >= pixels_.classes ? -1 : label;
        });
    }

    template <class F>
    double read(int64_t n, int64_t y, const F& label_at) const {
        const int64_t width = columns_.width;
        const uint8_t* mask = pixels_.mask ? pixels_.mask + (n * height_ + y) * width : nullptr;
        const Acc* class_weight = static_cast<const Acc*>(pixels_.class_weight);
        double count = 0;
        for (int64_t x = 0; x < width; ++x) {
            int64_t c = label_at(x);
            if (mask && !mask[x]) c = -1;
            const int32_t at = columns_.slot[x];
            const Acc own = c < 0 ? Acc(0) : class_weight ? class_weight[c] : Acc(1);
            label[at] = static_cast<Acc>(c);
            factor[at] = own;
            count += own;
        }
        for (int64_t x = 0; pixels_.keep_weight && x < width; ++x)
            weight[columns_.slot[x]] = label[columns_.slot[x]] < 0 ? Acc(0) : Acc(1);
        if (pixels_.weight) apply_weight(n, y);
        return count;
    }

    void apply_weight(int64_t n, int64_t y) const {
        const Axis::Tap tap = weight_rows_.tap(y);
        const Acc *map = static_cast<const Acc*>(pixels_.weight) +
                         n / pixels_.weight_planes * pixels_.weight_h * pixels_.weight_w,
                  *top = map + tap.left * pixels_.weight_w, *bottom = map + tap.right * pixels_.weight_w;
        const Acc down = static_cast<Acc>(tap.weight), up = static_cast<Acc>(1 - tap.weight);
        for (int64_t i = 0; i < pixels_.weight_w; ++i) weight_row_[i] = down == 0 ? top[i] : up * top[i] + down * bottom[i];
        for (int64_t x = 0; x < columns_.width; ++x) {
            const int32_t at = columns_.slot[x];
            const Acc right = weight_right_[x], own = weight_row_[weight_left_[x]];
            const Acc mine = right == 0 ? own : (1 - right) * own + right * weight_row_[weight_next_[x]];
            factor[at] = label[at] < 0 ? Acc(0) : factor[at] * mine;
            if (pixels_.keep_weight) weight[at] = label[at] < 0 ? Acc(0) : mine;
        }
    }

    const LabelPixels pixels_;
    const Columns<Acc>& columns_;
    const int64_t height_;
    const Axis weight_rows_;
    const Scratch<Acc> weight_row_, weight_right_;  // (weight_w,), (width,)
    const Scratch<int32_t> weight_left_, weight_next_;
};

// Sets non-finite exponentials of uncounted pixels to 0, since 0 * inf is NaN. They are detected from their sum.
template <class Acc, class Mask>
inline void clear_uncounted(Mask counted, Vec<Acc> sum, Acc* e, int64_t classes, int64_t stride) {
    const Vec<Acc> nan = sum - sum;
    if (!any((counted ? Vec<Acc>{} : nan) != 0)) return;
    for (int64_t c = 0; c < classes; ++c) {
        const Vec<Acc> kept = load(e + c * stride);
        store(e + c * stride, counted ? kept : Vec<Acc>{});
    }
}

// Phases whose exponentials are kept at a time: they fit half of a side's share of the L2 cache; at most kMaxPhases.
constexpr int64_t kMaxPhases = 16;
template <class Acc>
inline int64_t phases_kept(int64_t phases, int64_t classes) {
    const int64_t fit = max(4, int64_t{65536} / (classes * kVecBytes) / 4 * 4);
    return min(phases, min(fit, kMaxPhases));
}

// Destination of a label row's gradient: weighted shares of a row of logits and of the next row.
template <class Acc>
struct GradientShare {
    RowGradient<Acc> *top, *bottom;
    Vec<Acc> up, down;
    bool blend;  // whether `down` is nonzero

    void add(int64_t c, int64_t cell, Vec<Acc> to_left, Vec<Acc> to_right) const {
        const int64_t at = c * top->stride + cell;
        store(top->left + at, load(top->left + at) + up * to_left);
        store(top->right + at, load(top->right + at) + up * to_right);
        if (!blend) return;
        store(bottom->left + at, load(bottom->left + at) + down * to_left);
        store(bottom->right + at, load(bottom->right + at) + down * to_right);
    }
};

// Visits every label row once, in bands of logit rows. make_term() creates one Term per thread. term.row(n, label_y,
// pixels, share, losses) processes one label row: it returns the loss, adds the gradient to `share` unless to.gradient
// is null, and writes the loss per pixel to `losses` (phases, padded) unless that is null.
template <class Acc, class MakeTerm>
inline void each_label_row(const Map& map, const Resized& to, const Columns<Acc>& columns, const MakeTerm& make_term) {
    const Axis rows(map.h, to.height, to.align_corners);
    const Scratch<int64_t> first(map.h + 1);
    rows.starts(first);
    const Bands bands(map.n, map.h);
    const int64_t items = map.n * bands.per_sample;
    const GradientRows<Acc> gradient(to.gradient, map, items);
    const Totals totals(items);
    const bool per_pixel = to.out.reduce == Reduce::none;
    parallel_items(to.parallel_for, items, int64_t{1} << 40, [&](const Items& mine) {
        auto term = make_term();
        const PixelRow<Acc> pixels(to.pixels, rows, columns, to.align_corners);
        const Scratch<Acc> losses(per_pixel ? columns.phases * columns.padded : 0);
        RowGradient<Acc> one(to.gradient ? map.c : 0, columns.padded), two(to.gradient ? map.c : 0, columns.padded);
        for (const int64_t item : mine) {
            const int64_t n = item / bands.per_sample, band = item % bands.per_sample;
            RowGradient<Acc>*top = &one, *bottom = &two;
            double total = 0, count = 0;
            top->clear();
            for (int64_t y = bands.first(band); y < bands.first(band + 1); ++y) {
                bottom->clear();
                for (int64_t label_y = first[y]; label_y < first[y + 1]; ++label_y) {
                    const Axis::Tap tap = rows.tap(label_y);
                    count += pixels.load(n, label_y);
                    const GradientShare<Acc> share{top, bottom, set1(static_cast<Acc>(1 - tap.weight)),
                                                   set1(static_cast<Acc>(tap.weight)), tap.weight != 0};
                    total += term.row(n, label_y, pixels, share, per_pixel ? static_cast<Acc*>(losses) : nullptr);
                    if (!per_pixel) continue;
                    Acc* row = static_cast<Acc*>(to.out.loss) + (n * to.height + label_y) * to.width;
                    const Acc scale = static_cast<Acc>(to.out.scale);
                    for (int64_t x = 0; x < to.width; ++x) row[x] = losses[columns.slot[x]] * scale;
                }
                if (!to.gradient) continue;
                if (y == map.h - 1) top->add(*bottom);
                gradient.write(n, y, *top);
                RowGradient<Acc>* next = bottom;
                bottom = top;
                top = next;
            }
            if (to.gradient && bands.first(band + 1) < map.h) gradient.spill(item, *top);
            totals.loss[item] = total;
            totals.count[item] = count;
        }
    });
    totals.finish<Acc>(to.out);
    if (!to.gradient) return;
    for (int64_t item = 0; item < items; ++item) {
        const int64_t next = item % bands.per_sample + 1;
        if (next < bands.per_sample) gradient.add_spill(item, item / bands.per_sample, bands.first(next));
    }
    gradient.finish(gradient_scale<Acc>(to.out, totals.counted()), to.parallel_for);
}

}  // namespace fastkd::FASTKD_ISA

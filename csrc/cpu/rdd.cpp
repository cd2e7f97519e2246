// RDD's maps (arXiv 2407.03719): the teacher's confidence, with KD and its gradient from the same read; the mask of
// relatively difficult pixels; the exact k-th smallest for its threshold, by radix select.
#include "resize.h"
#include "softmax.h"

namespace fastkd::FASTKD_ISA {
namespace {

constexpr int64_t kRows = 64;  // channels per partial sum: two levels keep fp32 sums short

// Sums of up to three softmaxes and two divergences for one vector of pixels.
template <class Acc>
struct HeadSums {
    Vec<Acc> main{}, aux{}, student{}, heads{}, kd{};

    void add(const HeadSums& o) {
        main += o.main;
        aux += o.aux;
        student += o.student;
        heads += o.heads;
        kd += o.kd;
    }
};

template <class Acc>
inline Vec<Acc> maximum(const Acc* x, int64_t rows) {
    constexpr int W = kLanes<Acc>;
    Vec<Acc> most = load(x);
    for (int64_t r = 1; r < rows; ++r) most = max(most, load(x + r * W));
    return finite_max(most);
}

// KL = dot / sum_p + log(sum_q / sum_p) >= 0.
template <class Acc>
inline Vec<Acc> divergence(Vec<Acc> dot, Vec<Acc> p, Vec<Acc> q) {
    const Vec<Acc> kl = dot / p + log(q / p);
    return kl < 0 ? Vec<Acc>{} : kl;
}

template <class Acc, bool kStudent>
void confidence(const TeacherConfidence& a) {
    constexpr int W = kLanes<Acc>;
    const Pair& in = a.in;
    const int64_t lanes = pixel_lanes(in.c), tiles = ceil_div(in.hw, lanes), items = in.n * tiles;
    const Totals totals(items);
    [[maybe_unused]] const Vec<Acc> slope = set1(kStudent ? gradient_scale<Acc>(a.out, 0) : Acc(0));
    parallel_items(in.parallel_for, items, lanes * in.c, [&](const Items& mine) {
        const int64_t size = tile_size<Acc>(in.c, lanes);
        const Scratch<Acc> main(size), aux(size), student(kStudent ? size : 0), scratch(in.channels_last ? size : 0);
        Acc map[256];
        for (const int64_t item : mine) {
            const int64_t n = item / tiles, first = item % tiles * lanes, count = min(lanes, in.hw - first);
            load_pixels<Acc>(in, in.student, in.student_type, n, first, count, main, scratch);
            load_pixels<Acc>(in, in.teacher, in.teacher_type, n, first, count, aux, scratch);
            if constexpr (kStudent) load_pixels<Acc>(in, a.student, a.student_type, n, first, count, student, scratch);
            double total = 0;
            for (int64_t l = 0; l < count; l += W) {
                Acc *m = main + l * in.c, *x = aux + l * in.c, *s = kStudent ? student + l * in.c : nullptr;
                const Vec<Acc> top_m = maximum(m, in.c), top_x = maximum(x, in.c);
                Vec<Acc> top_s{};
                if constexpr (kStudent) top_s = maximum(s, in.c);
                HeadSums<Acc> sums;
                for (int64_t r0 = 0; r0 < in.c; r0 += kRows) {
                    HeadSums<Acc> part;
                    for (int64_t r = r0; r < min(in.c, r0 + kRows); ++r) {
                        const Vec<Acc> dm = load(m + r * W) - top_m, em = exp(dm);
                        const Vec<Acc> dx = load(x + r * W) - top_x, ex = exp(dx);
                        const Vec<Acc> p = a.aux_main ? ex : em, d = a.aux_main ? dx - dm : dm - dx;
                        part.main += em;
                        part.aux += ex;
                        part.heads += p == 0 ? Vec<Acc>{} : p * d;  // probability 0 contributes exactly 0, also at -inf
                        if constexpr (kStudent) {
                            const Vec<Acc> ds = load(s + r * W) - top_s, es = exp(ds);
                            part.student += es;
                            part.kd += em == 0 ? Vec<Acc>{} : em * (dm - ds);
                            store(s + r * W, es);
                            store(m + r * W, em);
                        }
                    }
                    sums.add(part);
                }
                store(map + l, exp(-(a.aux_main ? divergence<Acc>(sums.heads, sums.aux, sums.main)
                                                : divergence<Acc>(sums.heads, sums.main, sums.aux))));
                if constexpr (kStudent) {
                    Acc kl[W];
                    store(kl, divergence<Acc>(sums.kd, sums.main, sums.student));
                    for (int64_t i = 0; i < min(W, count - l); ++i) total += kl[i];
                    const Vec<Acc> ratio = sums.student / sums.main, scale = slope / sums.student;
                    for (int64_t r = 0; r < in.c; ++r)  // exactly 0 if student and teacher are equal
                        store(s + r * W, scale * (load(s + r * W) - load(m + r * W) * ratio));
                }
            }
            __builtin_memcpy(static_cast<Acc*>(a.confidence) + n * in.hw + first, map, count * sizeof(Acc));
            totals.loss[item] = total;
            totals.count[item] = static_cast<double>(count);
            if constexpr (kStudent)
                if (a.gradient) store_pixels<Acc>(in, a.gradient, a.student_type, n, first, count, student, scratch);
        }
    });
    if constexpr (kStudent) totals.finish<Acc>(a.out);
}

// K-th smallest

template <class Acc>
struct KeyOf;
template <>
struct KeyOf<float> {
    using type = uint32_t;
};
template <>
struct KeyOf<double> {
    using type = uint64_t;
};

// Maps floats to unsigned integers of the same order; NaN of either sign becomes the largest.
template <class Acc>
inline typename KeyOf<Acc>::type key_of(Acc x) {
    using Key = typename KeyOf<Acc>::type;
    constexpr Key sign = Key{1} << (8 * sizeof(Key) - 1);
    if (x != x) return ~Key{};
    Key bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits & sign ? ~bits : bits | sign;
}
template <class Acc>
inline Acc number_of(typename KeyOf<Acc>::type key) {
    using Key = typename KeyOf<Acc>::type;
    constexpr Key sign = Key{1} << (8 * sizeof(Key) - 1);
    if (key == ~Key{}) return static_cast<Acc>(__builtin_nan(""));
    const Key bits = key & sign ? key ^ sign : ~key;
    Acc x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

// Radix select from the highest digit. Each pass counts the digit among the keys whose higher digits match, and keeps
// the digit value that contains the k-th. One read of x per digit, no sorting.
template <class Acc>
Acc kth(const Acc* x, int64_t n, int64_t k, ParallelFor parallel_for) {
    using Key = typename KeyOf<Acc>::type;
    constexpr int kBits = 11, kBins = 1 << kBits, kKeyBits = 8 * sizeof(Key);
    const int64_t chunks = min(64, ceil_div(n, 65536)), chunk = ceil_div(n, chunks);
    const Scratch<int64_t> bins(chunks * kBins);
    k = max(1, min(k, n));
    Key prefix = 0;
    for (int shift = kKeyBits; shift > 0;) {
        const int above = shift;
        shift = static_cast<int>(max(0, shift - kBits));
        const Key digit = (Key{1} << (above - shift)) - 1;
        parallel_items(parallel_for, chunks, chunk, [&](const Items& mine) {
            for (const int64_t i : mine) {
                int64_t* counts = bins + i * kBins;
                for (int b = 0; b < kBins; ++b) counts[b] = 0;
                for (int64_t j = i * chunk; j < min(n, (i + 1) * chunk); ++j) {
                    const Key key = key_of(x[j]);
                    if (above == kKeyBits || key >> above == prefix) ++counts[(key >> shift) & digit];
                }
            }
        });
        for (Key b = 0;; ++b) {
            int64_t count = 0;
            for (int64_t i = 0; i < chunks; ++i) count += bins[i * kBins + static_cast<int64_t>(b)];
            if (k <= count) {
                prefix = above == kKeyBits ? b : prefix << (above - shift) | b;
                break;
            }
            k -= count;
        }
    }
    return number_of<Acc>(prefix);
}

// Difficulty

// Confidence of one network, one label row at a time.
template <class Acc>
class Confidence {
    static constexpr int W = kLanes<Acc>;

public:
    Confidence(const DifficultyMask& a, const Map& logits, const Columns<Acc>& columns)
        : classes_(logits.c),
          columns_(columns),
          rows_(logits.h, a.height, a.align_corners),
          logits_(logits, columns.padded),
          pixels_(a.pixels, rows_, columns, a.align_corners),
          laid_out_(columns.phases * columns.padded),
          by_label_(a.by_label) {}

    // Label row y in label order; 1 where ignored. Returns the number of valid pixels.
    double row(int64_t n, int64_t y, Acc* out) {
        logits_.load(n, rows_.tap(y), 1);
        const double valid = pixels_.load(n, y);
        for (int64_t cell = 0; cell < columns_.padded; cell += W)
            for (int64_t k = 0; k < columns_.phases; k += 4)
                by_count(columns_.phases - k, [&](auto g) {
                    columns_.blend ? vectors<decltype(g)::value, true>(cell, k) : vectors<decltype(g)::value, false>(cell, k);
                });
        for (int64_t x = 0; x < columns_.width; ++x) out[x] = laid_out_[columns_.slot[x]];
        return valid;
    }
    bool valid(int64_t x) const { return pixels_.label[columns_.slot[x]] >= 0; }

private:
    template <int G, bool kBlend>
    void vectors(int64_t cell, int64_t k) {
        const Side<Acc, false> side{logits_.values() + cell, logits_.stride, 0};
        Vec<Acc> right[G];
        for (int i = 0; i < G; ++i) right[i] = load(columns_.right + (k + i) * columns_.padded + cell);
        const auto plain = [&] { return Side<Acc, false>{logits_.plain() + cell, logits_.stride, 0}; };
        Softmax<Acc, G, false> softmax;
        if (by_label_)
            softmax.template compute<false, false, kBlend>(side, plain, right, classes_, nullptr, 0);
        else
            softmax.template compute<false, true, kBlend>(side, plain, right, classes_, nullptr, 0);
        for (int i = 0; i < G; ++i) {
            const int64_t at = (k + i) * columns_.padded + cell;
            const Vec<Acc> most =
                by_label_ ? exp(softmax.labelled(side, pixels_.label + at, right[i], i)) : softmax.most[i];
            const Vec<Acc> p = most / softmax.sum[i];
            store(laid_out_ + at, load(pixels_.label + at) >= 0 ? p : set1(Acc(1)));
        }
    }

    const int64_t classes_;
    const Columns<Acc>& columns_;
    const Axis rows_;
    Row<Acc> logits_;
    const PixelRow<Acc> pixels_;
    const Scratch<Acc> laid_out_;
    const bool by_label_;
};

inline bool selected(Select select, bool student_hard, bool teacher_hard) {
    switch (select) {
        case Select::exclusive: return student_hard != teacher_hard;
        case Select::either: return student_hard || teacher_hard;
        case Select::both: return student_hard && teacher_hard;
        case Select::student: return student_hard;
        default: return student_hard && !teacher_hard;
    }
}

// mask[x], on entry the validity of the pixel, &= selected. Returns the number of selected pixels.
template <class Acc>
int64_t select_row(Select select, const Acc* student, const Acc* teacher, Acc student_limit, Acc teacher_limit, int64_t n,
                   uint8_t* mask) {
    uint8_t table[4];  // index: student hard, teacher hard
    for (int i = 0; i < 4; ++i) table[i] = selected(select, i & 1, i & 2);
    int64_t count = 0;
    for (int64_t x = 0; x < n; ++x) {
        mask[x] &= table[(student[x] <= student_limit) | (teacher[x] <= teacher_limit) << 1];
        count += mask[x];
    }
    return count;
}

// Without min_kept the thresholds are known, and the confidences of a row stay in cache. With it, the confidences are
// stored (4 bytes per pixel and side) until both thresholds are known. The k-th smallest is at most the threshold
// exactly if at least k confidences are; the radix select runs only otherwise.
template <class Acc>
void mask(const DifficultyMask& a) {
    constexpr int64_t kRowsAtATime = 8;
    const Columns<Acc> student_columns(Axis(a.student.w, a.width, a.align_corners)),
        teacher_columns(Axis(a.teacher.w, a.width, a.align_corners));
    const int64_t pixels = a.student.n * a.height * a.width, chunks = ceil_div(a.height, kRowsAtATime),
                  items = a.student.n * chunks, k = min(a.min_kept, pixels);
    const bool keep = k > 0;
    const bool alone = a.select == Select::student;  // OHEM: the teacher is not read
    const Acc threshold = static_cast<Acc>(a.threshold);
    const Scratch<Acc> student_map(keep ? pixels : 0), own_teacher_map(keep && !alone ? pixels : 0);
    Acc* const teacher_map = alone ? static_cast<Acc*>(student_map) : static_cast<Acc*>(own_teacher_map);
    const Scratch<int64_t> valid(items), chosen(items), student_hard(items), teacher_hard(items);
    parallel_items(a.parallel_for, items, int64_t{1} << 40, [&](const Items& mine) {
        Confidence<Acc> student(a, a.student, student_columns), teacher(a, a.teacher, teacher_columns);
        const Scratch<Acc> student_row(keep ? 0 : a.width), own_teacher_row(keep || alone ? 0 : a.width);
        Acc* const teacher_row = alone ? static_cast<Acc*>(student_row) : static_cast<Acc*>(own_teacher_row);
        for (const int64_t item : mine) {
            const int64_t n = item / chunks, first = item % chunks * kRowsAtATime;
            valid[item] = chosen[item] = student_hard[item] = teacher_hard[item] = 0;
            for (int64_t y = first; y < min(a.height, first + kRowsAtATime); ++y) {
                const int64_t offset = (n * a.height + y) * a.width;
                Acc *s = keep ? student_map + offset : student_row, *t = keep ? teacher_map + offset : teacher_row;
                uint8_t* to = a.mask + offset;
                valid[item] += static_cast<int64_t>(student.row(n, y, s));
                if (!alone) teacher.row(n, y, t);
                for (int64_t x = 0; x < a.width; ++x) to[x] = student.valid(x);
                if (!keep) {
                    chosen[item] += select_row(a.select, s, t, threshold, threshold, a.width, to);
                    continue;
                }
                for (int64_t x = 0; x < a.width; ++x) {
                    student_hard[item] += s[x] <= threshold;
                    teacher_hard[item] += t[x] <= threshold;
                }
            }
        }
    });
    const auto sum = [&](const int64_t* x) {
        int64_t total = 0;
        for (int64_t i = 0; i < items; ++i) total += x[i];
        return total;
    };
    double selected = 0;
    if (keep) {
        const auto limit = [&](const Acc* map, int64_t hard) {
            if (hard >= k) return threshold;
            const Acc smallest = kth(map, pixels, k, a.parallel_for);
            return smallest <= threshold ? threshold : smallest;  // a NaN is returned; no pixel is then hard
        };
        const Acc student_limit = limit(student_map, sum(student_hard));
        const Acc teacher_limit = alone ? student_limit : limit(teacher_map, sum(teacher_hard));
        const int64_t per_item = a.width * kRowsAtATime, each = ceil_div(pixels, per_item);
        const Scratch<int64_t> counts(each);
        parallel_items(a.parallel_for, each, per_item, [&](const Items& mine) {
            for (const int64_t i : mine) {
                const int64_t at = i * per_item;
                counts[i] = select_row<Acc>(a.select, student_map + at, teacher_map + at, student_limit, teacher_limit,
                                            min(per_item, pixels - at), a.mask + at);
            }
        });
        for (int64_t i = 0; i < each; ++i) selected += static_cast<double>(counts[i]);
    } else {
        selected = static_cast<double>(sum(chosen));
    }
    const double all = static_cast<double>(sum(valid));
    *static_cast<Acc*>(a.share) = static_cast<Acc>(all == 0 ? 0 : selected / all);
}

}  // namespace

void teacher_confidence(const TeacherConfidence& a) {
    with_acc(a.in, [&](auto t) {
        using Acc = typename decltype(t)::type;
        a.student ? confidence<Acc, true>(a) : confidence<Acc, false>(a);
    });
}

void difficulty_mask(const DifficultyMask& a) {
    with_acc(a.student.type, [&](auto t) { mask<typename decltype(t)::type>(a); });
}

void kth_smallest(const void* in, DType type, int64_t n, int64_t k, void* out, ParallelFor parallel_for) {
    with_acc(type, [&](auto t) {
        using Acc = typename decltype(t)::type;
        *static_cast<Acc*>(out) = kth(static_cast<const Acc*>(in), n, k, parallel_for);
    });
}

}  // namespace fastkd::FASTKD_ISA

// Finds the first label that is neither a class nor ignore_index.
#include "tile.h"

namespace fastkd::FASTKD_ISA {
namespace {

template <class T>
int64_t first_bad(const Labels& a) {
    constexpr int64_t kSpan = 16384;
    const T* labels = static_cast<const T*>(a.labels);
    const int64_t items = ceil_div(a.n, kSpan);
    const Scratch<int64_t> found(items);
    const auto bad = [&](int64_t i) {
        const int64_t label = labels[i];
        return (label < 0 || label >= a.classes) && label != a.ignore_index;
    };
    parallel_items(a.parallel_for, items, kSpan, [&](const Items& mine) {
        for (const int64_t item : mine) {
            const int64_t first = item * kSpan, last = min(a.n, first + kSpan);
            int64_t any = 0;
            for (int64_t i = first; i < last; ++i) any |= bad(i);  // no branch, so that the loop vectorises
            found[item] = -1;
            for (int64_t i = first; any && i < last && found[item] < 0; ++i)
                if (bad(i)) found[item] = i;
        }
    });
    for (int64_t i = 0; i < items; ++i)
        if (found[i] >= 0) return found[i];
    return -1;
}

}  // namespace

int64_t first_bad_label(const Labels& a) {
    switch (a.type) {
        case Label::u8: return first_bad<uint8_t>(a);
        case Label::i32: return first_bad<int32_t>(a);
        default: return first_bad<int64_t>(a);
    }
}

}  // namespace fastkd::FASTKD_ISA

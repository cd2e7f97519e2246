// Reduction of the terms to the loss: in fp64 and in item order, independent of the threads.
#pragma once

#include "tile.h"

namespace fastkd::FASTKD_ISA {

// Writes the count, and the loss unless Reduce::none.
template <class Acc>
inline void finish(const Loss& out, double total, double count) {
    if (out.count) *static_cast<Acc*>(out.count) = static_cast<Acc>(count);
    if (out.reduce == Reduce::none) return;
    const double scaled = total * out.scale;
    *static_cast<Acc*>(out.loss) = static_cast<Acc>(out.reduce == Reduce::mean ? (count == 0 ? 0 : scaled / count) : scaled);
}

// Factor of the gradient of the summed terms.
template <class Acc>
inline Acc gradient_scale(const Loss& out, double count) {
    return static_cast<Acc>(out.reduce == Reduce::mean ? (count == 0 ? 0 : out.scale / count) : out.scale);
}

// The same with an upstream gradient, of one group or of all.
template <class Acc>
inline Acc gradient_scale(const Upstream& up, int64_t group) {
    return static_cast<const Acc*>(up.grad)[up.reduce == Reduce::none ? group : 0] * static_cast<Acc>(up.scale);
}

// Sums per work item.
struct Totals {
    explicit Totals(int64_t items) : loss(items), count(items), items(items) {}

    template <class Acc>
    void finish(const Loss& out) const {
        double total = 0;
        for (int64_t i = 0; i < items; ++i) total += loss[i];
        FASTKD_ISA::finish<Acc>(out, total, counted());
    }
    double counted() const {
        double n = 0;
        for (int64_t i = 0; i < items; ++i) n += count[i];
        return n;
    }

    const Scratch<double> loss, count;
    const int64_t items;
};

// One term per group: stored in the output for Reduce::none, else in scratch until they are summed.
template <class Acc>
class Terms {
public:
    Terms(const Loss& out, int64_t groups)
        : out_(out),
          groups_(groups),
          own_(out.reduce == Reduce::none ? 0 : groups),
          data_(out.reduce == Reduce::none ? static_cast<Acc*>(out.loss) : static_cast<Acc*>(own_)) {}

    Acc* data() const { return data_; }
    void finish() const {
        if (out_.reduce == Reduce::none) {
            const Acc scale = static_cast<Acc>(out_.scale);
            for (int64_t g = 0; g < groups_ && scale != 1; ++g) data_[g] *= scale;
            return;
        }
        double total = 0;
        for (int64_t g = 0; g < groups_; ++g) total += data_[g];
        FASTKD_ISA::finish<Acc>(out_, total, static_cast<double>(groups_));
    }

private:
    const Loss out_;
    const int64_t groups_;
    const Scratch<Acc> own_;
    Acc* const data_;
};

}  // namespace fastkd::FASTKD_ISA

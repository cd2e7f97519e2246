// The vector exponential as an operator, for tests of its error bound and for benchmarks; and the table of kernels of
// this instruction set.
#include "tile.h"

namespace fastkd::FASTKD_ISA {

void nfd_forward(const NfdForward&);
void nfd_backward(const NfdBackward&);
void kd(const Kd&);
void cwd_forward(const CwdForward&);
void cwd_backward(const CwdBackward&);
void resized_cross_entropy(const ResizedCrossEntropy&);
void resized_kd(const ResizedKd&);
void resized_dice(const ResizedDice&);
void resized_binary_cross_entropy(const ResizedBinaryCrossEntropy&);
void teacher_confidence(const TeacherConfidence&);
void difficulty_mask(const DifficultyMask&);
void kth_smallest(const void*, DType, int64_t, int64_t, void*, ParallelFor);
void rescale(const Rescale&);
int64_t first_bad_label(const Labels&);

namespace {

constexpr int64_t kSpan = 8192;

void exp_all(const float* in, float* out, int64_t n, ParallelFor parallel_for) {
    parallel_items(parallel_for, ceil_div(n, kSpan), kSpan, [&](const Items& mine) {
        for (const int64_t item : mine) {
            int64_t i = item * kSpan;
            const int64_t last = min(n, i + kSpan);
            for (; i + kLanes<float> <= last; i += kLanes<float>) store(out + i, exp(load(in + i)));
            if (i < last) store_part(out + i, last - i, exp(load_part(in + i, last - i, 0.0f)));
        }
    });
}

const char* name() {
    return kVecBytes == 64 ? "avx512" : kVecBytes == 32 ? "avx2" : "baseline";
}

}  // namespace

Kernels table() {
    return {name(),
            nfd_forward,
            nfd_backward,
            kd,
            cwd_forward,
            cwd_backward,
            resized_cross_entropy,
            resized_kd,
            resized_dice,
            resized_binary_cross_entropy,
            teacher_confidence,
            difficulty_mask,
            kth_smallest,
            rescale,
            first_bad_label,
            exp_all};
}

}  // namespace fastkd::FASTKD_ISA

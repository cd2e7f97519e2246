// Interface between registration.cpp and the kernels: plain structs and one table of functions per instruction set.
//
// The kernels are compiled several times with different flags. They include no torch header: the linker could keep the
// AVX-512 copy of one of its inline functions for all callers. So tensors are passed as pointers and sizes.
#pragma once

#include <cstdint>

namespace fastkd {

enum class DType { f32, f64, f16, bf16 };
enum class Label { none, u8, i32, i64 };
enum class Group { hw, nhw, c, chw };
enum class Reduce { sum, mean, none };

using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

// Student and teacher: both (n, c, hw) in memory, or both (n, hw, c) if channels_last. Below, acc is double if the
// student is f64, else float.
struct Pair {
    const void* student;
    const void* teacher;
    DType student_type;
    DType teacher_type;
    bool channels_last;
    int64_t n, c, hw;
    ParallelFor parallel_for;
};

// Reduction of the terms (per pixel or group): scale * sum, the same divided by the count, or scale * term each.
struct Loss {
    Reduce reduce;
    double scale;
    void* loss;   // acc scalar; Reduce::none: one per term
    void* count;  // acc scalar or null: number of valid pixels, or the sum of their class weights
};

// Upstream gradient of a reduced loss.
struct Upstream {
    const void* grad;  // acc scalar; Reduce::none: one per group
    Reduce reduce;
    double scale;
};

struct NfdForward {
    Pair in;
    Group group;
    double eps;
    Loss out;
    void* stats;  // acc (groups, 6)
};

struct NfdBackward {
    Pair in;
    Group group;
    Upstream upstream;
    const void* stats;  // acc (groups, 6)
    void* out;          // dtype and layout of student
};

// Weight of each pixel: 0 if its label is ignored or outside [0, c).
struct Pixels {
    const void* target;  // (n, hw) or null
    Label label;
    int64_t ignore_index;
    const void* weight;  // acc (n, hw) or null
};

struct Kd {
    Pair in;
    Pixels pixels;
    double temperature;
    Loss out;
    void* gradient;  // null, or dtype and layout of student
    bool sigmoid;    // sigmoid per class instead of a softmax over classes
};

struct CwdForward {
    Pair in;
    double temperature;
    Loss out;
    void* stats;  // acc (n, c, 4)
};

struct CwdBackward {
    Pair in;
    double temperature;
    Upstream upstream;
    const void* stats;  // acc (n, c, 4)
    void* out;          // dtype and layout of student
};

// One map, (n, c, h, w) in memory or (n, h, w, c) if channels_last.
struct Map {
    const void* data;
    DType type;
    bool channels_last;
    int64_t n, c, h, w;
};

// Weight of each label pixel: 0 if its label is ignored or outside [0, c) or its mask is 0, else class weight * pixel
// weight. The map of pixel weights may have any size; it is resized bilinearly.
struct LabelPixels {
    const void* target;  // (n, height, width) or null
    Label label;
    int64_t ignore_index;
    const void* class_weight;  // acc (c,) or null
    const void* weight;        // acc (n, weight_h, weight_w) or null
    int64_t weight_h, weight_w;
    const uint8_t* mask;  // (n, height, width) or null
    int64_t classes;      // number of classes in the labels
    int64_t weight_planes = 1;  // consecutive samples that share a weight map
    bool keep_weight = false;   // also keep the weight without the class weight
};

struct Resized {
    LabelPixels pixels;
    int64_t height, width;
    bool align_corners;
    Loss out;
    void* gradient;  // null, or dtype and layout of the student's logits
    ParallelFor parallel_for;
};

struct ResizedCrossEntropy {
    Map logits;
    Resized to;
    double label_smoothing, focal_gamma;  // at most one is nonzero
};

// Sums over label pixels for Dice and cross-entropy, or, if to.gradient is not null, their gradient
// (fastkd/ops/resized_dice.py).
struct ResizedDice {
    Map logits;
    Resized to;  // to.out is not written
    bool square;
    int64_t columns;
    double* sums;        // (n, c, columns), or null
    const double* grad;  // (n, c, columns), or null
};

// Each class is treated as a sample with one class: the target is (n * c, height, width) with labels 0 and 1.
struct ResizedBinaryCrossEntropy {
    Map logits;
    Resized to;
    const void* pos_weight;  // acc (c,) or null
};

struct ResizedKd {
    Map student, teacher;
    double temperature;
    Resized to;
    bool sigmoid;  // sigmoid per class instead of a softmax over classes
};

struct TeacherConfidence {
    Pair in;             // main, aux
    bool aux_main;        // KL(aux || main), else KL(main || aux)
    void* confidence;     // acc (n, hw)
    const void* student;  // null, or a third map of the same shape and layout: KD from main at temperature 1
    DType student_type;
    Loss out;
    void* gradient;  // null, or dtype and layout of student
};

enum class Select { exclusive, either, both, student, student_only };

struct DifficultyMask {
    Map student, teacher;
    LabelPixels pixels;
    int64_t height, width;
    bool align_corners;
    double threshold;
    int64_t min_kept;
    bool by_label;  // confidence in the labelled class, else in the largest
    Select select;
    uint8_t* mask;  // (n, height, width)
    void* share;    // acc scalar: fraction of the valid pixels that is selected
    ParallelFor parallel_for;
};

// gradient *= factor; nothing is written if the factor is exactly 1.
struct Rescale {
    void* gradient;
    DType type;
    int64_t n;
    const void* factor;  // acc scalar
    ParallelFor parallel_for;
};

struct Labels {
    const void* labels;  // contiguous
    Label type;
    int64_t n, classes, ignore_index;
    ParallelFor parallel_for;
};

struct Kernels {
    const char* isa;
    void (*nfd_forward)(const NfdForward&);
    void (*nfd_backward)(const NfdBackward&);
    void (*kd)(const Kd&);
    void (*cwd_forward)(const CwdForward&);
    void (*cwd_backward)(const CwdBackward&);
    void (*resized_cross_entropy)(const ResizedCrossEntropy&);
    void (*resized_kd)(const ResizedKd&);
    void (*resized_dice)(const ResizedDice&);
    void (*resized_binary_cross_entropy)(const ResizedBinaryCrossEntropy&);
    void (*teacher_confidence)(const TeacherConfidence&);
    void (*difficulty_mask)(const DifficultyMask&);
    void (*kth_smallest)(const void* in, DType type, int64_t n, int64_t k, void* out, ParallelFor parallel_for);
    void (*rescale)(const Rescale&);
    int64_t (*first_bad_label)(const Labels&);
    void (*exp)(const float* in, float* out, int64_t n, ParallelFor parallel_for);
};

// The table for this machine, chosen once. FASTKD_CPU_ISA=baseline|avx2|avx512 overrides the choice.
const Kernels& kernels();

}  // namespace fastkd

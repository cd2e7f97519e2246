// Interface between registration.cpp and the kernels. Everything is asynchronous on one stream; pointers are device
// pointers.
#pragma once

#include "plan.h"

namespace fastkd::gpu {

// Opaque, because registration.cpp is compiled without CUDA headers.
using Stream = void*;

// Losses are scale * sum of the terms, divided by the count for Reduce::mean, or scale * term each.

struct NfdForward {
    Pair in;
    Group group;
    double eps;
    NfdPlan plan;
    Reduce reduce;      // sum or none
    double scale;
    void* loss;         // acc scalar; Reduce::none: (groups,)
    void* stats;        // acc (groups, 6)
    void* losses;       // Reduce::sum: acc (groups,)
    double* sum_parts;  // Reduce::sum: (count_blocks(groups),)
    void* parts;        // double (groups, plan.parts(), 6), or null
    void* gradient;     // null, or dtype and layout of student: gradient of the sum, in one read
};

struct NfdBackward {
    Pair in;
    Group group;
    const void* grad;   // acc scalar; per_group: (groups,); null: 1
    bool per_group;
    double scale;
    const void* stats;  // acc (groups, 6)
    void* out;          // dtype and layout of student
};

struct Kd {
    Pair in;
    Pixels pixels;
    KdPlan plan;
    double temperature;
    Reduce reduce;
    double scale;

    void* loss;           // acc scalar; Reduce::none: (n, hw)
    void* count;          // acc scalar: number of counted pixels
    double* parts;        // (part_space(plan.blocks()),), null for Reduce::none
    double* count_parts;  // (count_blocks(n * hw),), if there are labels
    void* gradient;       // null, or dtype and layout of student
};

// A loss of logits, or of student and teacher logits, at label resolution.
struct Resized {
    int sides;
    Map maps[2];
    LabelPixels pixels;
    const void* known;    // null, or acc (n, height, width): log-sum-exps of the logits, NaN for uncounted pixels
    CellsChoice choice;
    double temperature;
    Reduce reduce;
    double scale;

    void* terms;          // Reduce::none: acc (n, height, width)
    void* sums;           // null, or acc (n, height, width): log-sum-exps
    void* loss;           // acc scalar
    void* count;          // acc scalar: sum of the class weights of counted pixels
    double* parts;        // (part_space(total_warps(plan)),), null for Reduce::none
    double* count_parts;  // (count_blocks(n * height * width),), if pixels can be ignored
    void* gradient;       // null, or dtype and layout of the student
    void* scratch;        // scratch_bytes(...) bytes
};

// For the sums, the output fields of `on` are unused.
struct ResizedDice {
    Resized on;
    bool square;
    int columns;
    double* sums;        // (n, c, columns), or null
    double* parts;       // sums: (dice_pieces(plan), n, c, columns)
    const double* grad;  // (n, c, columns), or null
    void* upstream;      // grad: acc (n, 4 c + 1)
};

// One sigmoid per class: the target and on.terms are (n, c, height, width).
struct ResizedBinaryCrossEntropy {
    Resized on;              // without pixels; count_parts: (code_blocks(n * c * height * code_words(width)),)
    const void* target;      // (n, c, height, width)
    Label label;
    int64_t ignore_index;
    const void* pos_weight;  // null, or acc (c,)
    const void* weight;      // null, or acc (n, weight_classes, weight_h, weight_w), weight_classes 1 or c
    int64_t weight_classes, weight_h, weight_w;
    uint64_t* codes;         // (n, c, height, code_words(width))
};

// Selection of relatively difficult pixels.
struct Difficulty {
    LabelPixels pixels;
    int64_t classes, total;  // total: n * height * width
    bool wide;               // acc is double
    const void* student;     // acc (n, height, width): confidences, 1 where ignored
    const void* teacher;
    const void* limits[2];   // null, or acc scalar: the k-th smallest of each
    double threshold;
    Select select;
    uint8_t* mask;           // null, or (n, height, width)
    void* lse;               // null, or acc (n, height, width): NaN where not selected
    double* parts;           // (2, selection_blocks(total))
    void* share;             // acc scalar: fraction of the valid pixels that is selected
};

struct Kth {
    DType type;  // f32 or f64
    const void* x;
    int64_t n, k;
    int64_t* bins;   // (kth_bins(type),)
    int64_t* state;  // (4,)
    void* out;       // one number
};

struct Rescale {
    DType type;
    void* gradient;
    int64_t n;
    const void* factor;  // acc scalar
};

Device device(int index);
void nfd_forward(const NfdForward& a, Stream stream);
void nfd_backward(const NfdBackward& a, Stream stream);
void kd(const Kd& a, Stream stream);
void kd_sigmoid(const Kd& a, Stream stream);
void resized_cross_entropy(const Resized& a, Stream stream);
void resized_shaped_cross_entropy(const Resized& a, double label_smoothing, double focal_gamma, Stream stream);
void resized_kd(const Resized& a, Stream stream);
void resized_kd_sigmoid(const Resized& a, Stream stream);
void resized_dice_forward(const ResizedDice& a, Stream stream);
void resized_dice_backward(const ResizedDice& a, Stream stream);
void resized_binary_cross_entropy(const ResizedBinaryCrossEntropy& a, Stream stream);
void confidence(const Resized& a, bool by_label, Stream stream);
void difficulty(const Difficulty& a, Stream stream);
void kth_smallest(const Kth& a, Stream stream);
void rescale(const Rescale& a, Stream stream);

}  // namespace fastkd::gpu

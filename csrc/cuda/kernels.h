// What registration.cpp and the kernels agree on. Everything is asynchronous, on one stream; pointers are the device's.
#pragma once

#include "plan.h"

namespace fastkd::gpu {

// Opaque here: registration.cpp is compiled without CUDA's headers.
using Stream = void*;

// Every loss: scale * sum of its terms, for Reduce::mean divided by what counts, or scale * term each.

struct NfdForward {
    Pair in;
    Group group;
    double eps;
    NfdPlan plan;
    Reduce reduce;      // sum or none
    double scale;
    void* loss;         // acc, one number; Reduce::none: (groups,)
    void* stats;        // acc (groups, 6)
    void* losses;       // Reduce::sum: acc (groups,)
    double* sum_parts;  // Reduce::sum: (count_blocks(groups),)
    void* parts;        // double (groups, plan.parts(), 6), or null
    void* gradient;     // null, or dtype and layout of student: the gradient of the sum, in one read
};

struct NfdBackward {
    Pair in;
    Group group;
    const void* grad;   // acc, one number; per_group: (groups,); null: 1
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

    void* loss;           // acc, one number; Reduce::none: (n, hw)
    void* count;          // acc, one number: how many pixels count
    double* parts;        // (part_space(plan.blocks()),), null for Reduce::none
    double* count_parts;  // (count_blocks(n * hw),), where there are labels
    void* gradient;       // null, or dtype and layout of student
};

// Of logits, or of student and teacher.
struct Resized {
    int sides;
    Map maps[2];
    LabelPixels pixels;
    const void* known;    // null, or acc (n, height, width): log-sum-exps of the logits, NaN where a pixel does not count
    CellsChoice choice;
    double temperature;
    Reduce reduce;
    double scale;

    void* terms;          // Reduce::none: acc (n, height, width)
    void* sums;           // null, or acc (n, height, width): log-sum-exps
    void* loss;           // acc, one number
    void* count;          // acc, one number: the summed class weights of the pixels that count
    double* parts;        // (part_space(total_warps(plan)),), null for Reduce::none
    double* count_parts;  // (count_blocks(n * height * width),), where something can leave pixels out
    void* gradient;       // null, or dtype and layout of the student
    void* scratch;        // of scratch_bytes(...)
};

// Of the sums, `on` has only what is not the result.
struct ResizedDice {
    Resized on;
    bool square;
    int columns;
    double* sums;        // (n, c, columns), or null
    double* parts;       // sums: (dice_pieces(plan), n, c, columns)
    const double* grad;  // (n, c, columns), or null
    void* upstream;      // grad: acc (n, 4 c + 1)
};

// Each class against the rest: the target is (n, c, height, width), and so is on.terms.
struct ResizedBinaryCrossEntropy {
    Resized on;              // without pixels
    const void* target;      // (n, c, height, width)
    Label label;
    int64_t ignore_index;
    const void* pos_weight;  // null, or acc (c,)
    const void* weight;      // null, or acc (n, weight_classes, weight_h, weight_w), of 1 or c classes
    int64_t weight_classes, weight_h, weight_w;
    uint64_t* codes;         // (n, c, height, code_words(width))
};

// Relatively difficult pixels.
struct Difficulty {
    LabelPixels pixels;
    int64_t classes, total;  // total: n * height * width
    bool wide;               // acc is double
    const void* student;     // acc (n, height, width): confidences, 1 where ignored
    const void* teacher;
    const void* limits[2];   // null, or acc, one number: the k-th smallest of each
    double threshold;
    Select select;
    uint8_t* mask;           // null, or (n, height, width)
    void* lse;               // null, or acc (n, height, width): NaN where not selected
    double* parts;           // (2, count_blocks(total))
    void* share;             // acc, one number: selected of the valid pixels
};

struct Kth {
    DType type;  // f32 or f64
    const void* x;
    int64_t n, k;
    int* parts;      // (kth_blocks(n), kBins)
    int64_t* bins;   // (kBins,)
    int64_t* state;  // (4,)
    void* out;       // one number
};

struct Rescale {
    DType type;
    void* gradient;
    int64_t n;
    const void* factor;  // acc, one number
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

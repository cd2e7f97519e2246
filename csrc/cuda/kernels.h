// What registration.cpp and the kernels agree on. Everything is asynchronous, on one stream; pointers are the device's.
#pragma once

#include "plan.h"

namespace fastkd::gpu {

// Opaque here: registration.cpp is compiled without CUDA's headers.
using Stream = void*;

struct NfdForward {
    Pair in;
    Group group;
    double eps;
    NfdPlan plan;
    void* loss;         // acc (groups,)
    void* stats;        // acc (groups, 6)
    void* parts;        // double (groups, plan.parts(), 6), or null
    void* gradient;     // null, or dtype and layout of student: only with one read
    const void* guess;  // null, or acc, one number: the gradient is made for this grad_output of every group, unless NaN
};

struct NfdBackward {
    Pair in;
    Group group;
    const void* grad;   // acc (groups,)
    const void* stats;  // acc (groups, 6)
    void* out;          // dtype and layout of student
    const void* guess;  // null, or acc, one number: groups whose grad equals it have their gradient in `out` already
    void* memory;       // null, or acc (2,): the last grad, and the next guess
};

// Forward, backward, or both at once: what is null is not computed.
struct Kd {
    Pair in;
    Pixels pixels;
    KdPlan plan;
    double temperature;

    void* losses;          // acc (n, hw): the loss of each pixel
    void* loss;            // acc, one number: their sum
    int64_t* count;        // how many pixels count
    double* parts;         // (plan.blocks(),), for loss
    int64_t* count_parts;  // (count_blocks(n * hw),), where there are labels

    const void* grad;   // acc (n, hw), or one number
    bool per_pixel;     // which of them
    double scale;       // of the gradient
    bool by_count;      // instead of scale: 1 / max(count, 1)
    void* gradient;     // dtype and layout of student
    bool early;         // grad is a guess: no gradient if it is NaN
    const void* guess;  // acc, one number: the gradient is there already if this is grad
    void* memory;       // acc (2,): the last grad, and the next guess
};

// Of logits, or of student and teacher. Forward, gradient, or both at once, as above.
struct Resized {
    int sides;
    Map maps[2];
    LabelPixels pixels;
    ResizedPlan plan;
    double temperature;

    void* losses;         // acc (n, height, width): the loss of each label pixel
    void* loss;           // acc, one number: their sum
    void* count;          // acc, one number: the summed class weights of the pixels that count
    double* parts;        // (plan.blocks(),), for loss
    double* count_parts;  // (count_blocks(n * height * width),), where there are labels

    const void* grad;     // acc, one number; null: 1
    double scale;         // of the gradient
    bool by_count;        // instead of scale: 1 / count
    void* gradient;       // layout of the student
    DType gradient_type;
    bool early;           // grad is a guess: no gradient if it is NaN
    const void* guess;    // acc, one number: the gradient is there already if this is grad
    void* memory;         // acc (2,): the last grad, and the next guess
};

Device device(int index);
void copy(void* to, const void* from, int64_t bytes, Stream stream);
void nfd_forward(const NfdForward& a, Stream stream);
void nfd_backward(const NfdBackward& a, Stream stream);
void kd(const Kd& a, Stream stream);
void resized_cross_entropy(const Resized& a, Stream stream);
void resized_kd(const Resized& a, Stream stream);

}  // namespace fastkd::gpu

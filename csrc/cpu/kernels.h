// What registration.cpp and the kernels agree on: plain structs, one table of functions per instruction set.
//
// The kernels are compiled several times with different flags. They see no torch header (an inline function of one,
// compiled for AVX-512, could be the copy the linker keeps for everyone), so tensors arrive here as pointers and sizes.
#pragma once

#include <cstdint>

namespace fastkd {

enum class DType { f32, f64, f16, bf16 };
enum class Label { none, u8, i32, i64 };
enum class Group { hw, nhw, c, chw };

using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

// Student and teacher, both (n, c, hw) in memory, or both (n, hw, c) if channels_last. acc below is double if the
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

struct NfdForward {
    Pair in;
    Group group;
    double eps;
    void* loss;   // acc (groups,)
    void* stats;  // acc (groups, 6)
};

struct NfdBackward {
    Pair in;
    Group group;
    const void* grad;   // acc (groups,)
    const void* stats;  // acc (groups, 6)
    void* out;          // dtype and layout of student
};

// What a pixel counts: nothing if its label is ignored or outside [0, c), else its weight.
struct Pixels {
    const void* target;  // (n, hw) or null
    Label label;
    int64_t ignore_index;
    const void* weight;  // acc (n, hw) or null
};

struct KdForward {
    Pair in;
    Pixels pixels;
    double temperature;
    bool per_pixel;
    void* loss;      // acc (n, hw), or one number
    int64_t* count;  // one number
};

struct KdBackward {
    Pair in;
    Pixels pixels;
    double temperature;
    const void* grad;  // acc (n, hw), or one number
    bool per_pixel;
    void* out;       // dtype and layout of student
    void* loss;      // null, or one number: the loss is computed too
    int64_t* count;  // null, or one number
};

struct CwdForward {
    Pair in;
    double temperature;
    void* loss;   // acc (n, c)
    void* stats;  // acc (n, c, 4)
};

struct CwdBackward {
    Pair in;
    double temperature;
    const void* grad;   // acc (n, c)
    const void* stats;  // acc (n, c, 4)
    void* out;          // dtype and layout of student
};

struct Kernels {
    const char* isa;
    void (*nfd_forward)(const NfdForward&);
    void (*nfd_backward)(const NfdBackward&);
    void (*kd_forward)(const KdForward&);
    void (*kd_backward)(const KdBackward&);
    void (*cwd_forward)(const CwdForward&);
    void (*cwd_backward)(const CwdBackward&);
    void (*exp)(const float* in, float* out, int64_t n, ParallelFor parallel_for);
};

// The table for this machine, chosen once; FASTKD_CPU_ISA=baseline|avx2|avx512 forces one.
const Kernels& kernels();

}  // namespace fastkd

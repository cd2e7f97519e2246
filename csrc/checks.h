// What the operators of every C++ and CUDA library check of their tensors before a kernel sees plain pointers.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace fastkd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

inline void parallel_for(int64_t begin, int64_t end, int64_t grain, Body body, void* context) {
    torch::stable::parallel_for(begin, end, grain, [&](int64_t b, int64_t e) { body(b, e, context); });
}

inline DType dtype_of(const Tensor& x, const char* name) {
    switch (x.scalar_type()) {
        case ScalarType::Float: return DType::f32;
        case ScalarType::Double: return DType::f64;
        case ScalarType::Half: return DType::f16;
        case ScalarType::BFloat16: return DType::bf16;
        default: STD_TORCH_CHECK(false, name, " must be float32, float64, float16 or bfloat16");
    }
    return DType::f32;
}

// Size-1 dimensions have no say; H*W == 1 or C == 1 is the same memory in both formats and counts as NCHW.
inline bool is_channels_last(const Tensor& x, const char* name) {
    const auto matches = [&](std::initializer_list<int> order) {
        int64_t stride = 1;
        for (int d : order) {
            if (x.size(d) != 1 && x.stride(d) != stride) return false;
            stride *= x.size(d);
        }
        return true;
    };
    if (matches({3, 2, 1, 0})) return false;
    STD_TORCH_CHECK(matches({1, 3, 2, 0}), name, " must be dense, NCHW or channels_last; call .contiguous()");
    return true;
}

inline Pair pair_of(const Tensor& student, const Tensor& teacher) {
    STD_TORCH_CHECK(student.dim() == 4 && teacher.dim() == 4, "student and teacher must be (N, C, H, W), got ",
                    student.dim(), " and ", teacher.dim(), " dimensions");
    for (int d = 0; d < 4; ++d)
        STD_TORCH_CHECK(student.size(d) == teacher.size(d), "student and teacher differ in dimension ", d, ": ",
                        student.size(d), " and ", teacher.size(d));
    STD_TORCH_CHECK(student.numel() > 0, "student is empty");
    const DType s = dtype_of(student, "student"), t = dtype_of(teacher, "teacher");
    STD_TORCH_CHECK((s == DType::f64) == (t == DType::f64), "float64 goes with float64 only");
    const bool channels_last = is_channels_last(student, "student");
    STD_TORCH_CHECK(channels_last == is_channels_last(teacher, "teacher"),
                    "student and teacher must have the same memory format");
    return {student.const_data_ptr(), teacher.const_data_ptr(), s,           t, channels_last, student.size(0),
            student.size(1),          student.size(2) * student.size(3), parallel_for};
}

inline ScalarType acc_type(const Pair& in) {
    return in.student_type == DType::f64 ? ScalarType::Double : ScalarType::Float;
}

// The pointer of a contiguous tensor in the accumulation type, with `numel` elements.
inline const void* acc_data(const Tensor& x, const Pair& in, int64_t numel, const char* name) {
    STD_TORCH_CHECK(x.scalar_type() == acc_type(in), name, " must be float32, or float64 for float64 inputs");
    STD_TORCH_CHECK(x.numel() == numel, name, " must have ", numel, " elements, got ", x.numel());
    STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
    return x.const_data_ptr();
}

inline Group group_of(const std::string& dims) {
    if (dims == "hw") return Group::hw;
    if (dims == "nhw") return Group::nhw;
    if (dims == "c") return Group::c;
    STD_TORCH_CHECK(dims == "chw", "dims must be 'hw', 'nhw', 'c' or 'chw', got '", dims, "'");
    return Group::chw;
}

inline Sizes group_sizes(Group group, const Tensor& x) {
    switch (group) {
        case Group::hw: return {x.size(0), x.size(1)};
        case Group::nhw: return {x.size(1)};
        case Group::c: return {x.size(0), x.size(2), x.size(3)};
        default: return {x.size(0)};
    }
}

inline int64_t product(const Sizes& sizes) {
    int64_t n = 1;
    for (int64_t size : sizes) n *= size;
    return n;
}

inline Sizes with(Sizes sizes, int64_t last) {
    sizes.push_back(last);
    return sizes;
}

inline Pixels pixels_of(const Pair& in, const std::optional<Tensor>& target,
                        const std::optional<Tensor>& weight, int64_t ignore_index) {
    Pixels pixels{nullptr, Label::none, ignore_index, nullptr};
    if (target) {
        switch (target->scalar_type()) {
            case ScalarType::Byte: pixels.label = Label::u8; break;
            case ScalarType::Int: pixels.label = Label::i32; break;
            case ScalarType::Long: pixels.label = Label::i64; break;
            default: STD_TORCH_CHECK(false, "target must be uint8, int32 or int64");
        }
        STD_TORCH_CHECK(target->numel() == in.n * in.hw, "target must have ", in.n * in.hw, " elements, got ",
                        target->numel());
        STD_TORCH_CHECK(target->is_contiguous(), "target must be contiguous");
        pixels.target = target->const_data_ptr();
    }
    if (weight) pixels.weight = acc_data(*weight, in, in.n * in.hw, "weight");
    return pixels;
}

}  // namespace fastkd

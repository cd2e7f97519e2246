// Checks on operator arguments, shared by the C++ and CUDA libraries.
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

// Size-1 dimensions are ignored. With H*W == 1 or C == 1 both formats have the same memory layout; this counts as NCHW.
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

inline ScalarType acc_type(DType type) { return type == DType::f64 ? ScalarType::Double : ScalarType::Float; }
inline ScalarType acc_type(const Pair& in) { return acc_type(in.student_type); }

// Data pointer of a contiguous tensor with `numel` elements in the accumulation type.
inline const void* acc_data(const Tensor& x, DType type, int64_t numel, const char* name) {
    STD_TORCH_CHECK(x.scalar_type() == acc_type(type), name, " must be float32, or float64 for float64 inputs");
    STD_TORCH_CHECK(x.numel() == numel, name, " must have ", numel, " elements, got ", x.numel());
    STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
    return x.const_data_ptr();
}
inline const void* acc_data(const Tensor& x, const Pair& in, int64_t numel, const char* name) {
    return acc_data(x, in.student_type, numel, name);
}

inline Reduce reduce_of(const std::string& reduction) {
    if (reduction == "sum") return Reduce::sum;
    if (reduction == "mean") return Reduce::mean;
    STD_TORCH_CHECK(reduction == "none", "reduction must be 'sum', 'mean' or 'none', got '", reduction, "'");
    return Reduce::none;
}

inline Select select_of(const std::string& select) {
    if (select == "xor") return Select::exclusive;
    if (select == "or") return Select::either;
    if (select == "and") return Select::both;
    if (select == "student") return Select::student;
    STD_TORCH_CHECK(select == "student_only", "select must be 'xor', 'or', 'and', 'student' or 'student_only', got '",
                    select, "'");
    return Select::student_only;
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

// Losses at label resolution

inline Map map_of(const Tensor& x, const char* name) {
    STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0, name, " must be (N, C, H, W) and not empty, got ", x.dim(),
                    " dimensions and ", x.numel(), " elements");
    return {x.const_data_ptr(), dtype_of(x, name), is_channels_last(x, name), x.size(0), x.size(1), x.size(2), x.size(3)};
}

inline Label label_of(const Tensor& target) {
    STD_TORCH_CHECK(target.is_contiguous(), "target must be contiguous");
    switch (target.scalar_type()) {
        case ScalarType::Byte: return Label::u8;
        case ScalarType::Int: return Label::i32;
        case ScalarType::Long: return Label::i64;
        default: STD_TORCH_CHECK(false, "target must be uint8, int32 or int64");
    }
    return Label::none;
}

// A contiguous (n, height, width) map; a height or width of 0 accepts any size.
inline void check_pixels(const Tensor& x, int64_t n, int64_t height, int64_t width, const char* name) {
    STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == n && (!height || x.size(1) == height) && (!width || x.size(2) == width),
                    name, " must be (", n, ", ", height, ", ", width, "), where 0 is any size");
    STD_TORCH_CHECK(x.is_contiguous() && x.numel() > 0, name, " must be contiguous and not empty");
}

inline const void* acc_map(const Tensor& x, DType type, const char* name) {
    STD_TORCH_CHECK(x.scalar_type() == (type == DType::f64 ? ScalarType::Double : ScalarType::Float), name,
                    " must be float32, or float64 for float64 logits");
    return x.const_data_ptr();
}

inline LabelPixels label_pixels(const Map& logits, int64_t height, int64_t width, const std::optional<Tensor>& target,
                                const std::optional<Tensor>& class_weight, const std::optional<Tensor>& weight,
                                const std::optional<Tensor>& mask, int64_t ignore_index) {
    STD_TORCH_CHECK(height > 0 && width > 0 && logits.w < (int64_t{1} << 24) && width < (int64_t{1} << 24),
                    "a map must be 1 to 2^24 pixels wide, got ", logits.w, " and ", width);
    LabelPixels pixels{nullptr, Label::none, ignore_index, nullptr, nullptr, height, width, nullptr, logits.c};
    if (target) {
        check_pixels(*target, logits.n, height, width, "target");
        pixels.label = label_of(*target);
        pixels.target = target->const_data_ptr();
    }
    if (class_weight) {
        STD_TORCH_CHECK(class_weight->numel() == logits.c && class_weight->is_contiguous(), "class_weight must have ",
                        logits.c, " elements");
        pixels.class_weight = acc_map(*class_weight, logits.type, "class_weight");
    }
    if (weight) {
        check_pixels(*weight, logits.n, 0, 0, "pixel_weight");
        pixels.weight = acc_map(*weight, logits.type, "pixel_weight");
        pixels.weight_h = weight->size(1);
        pixels.weight_w = weight->size(2);
    }
    if (mask) {
        STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "mask must be bool");
        check_pixels(*mask, logits.n, height, width, "mask");
        pixels.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
    }
    return pixels;
}

inline Tensor empty_like_as(const Tensor& x, ScalarType type) {
    if (x.scalar_type() == type) return empty_like(x);
    if (!is_channels_last(x, "logits")) return new_empty(x, Sizes{x.size(0), x.size(1), x.size(2), x.size(3)}, type);
    Tensor out = new_empty(x, Sizes{x.size(0), x.size(2), x.size(3), x.size(1)}, type);
    return transpose(transpose(out, 2, 3), 1, 2);
}

}  // namespace fastkd

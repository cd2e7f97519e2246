// The operators torch.ops.fastkd_cpu.*, on LibTorch's stable ABI: schemas, checks, allocation; the work is in cpu/.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

using fastkd::DType;
using fastkd::Group;
using fastkd::Label;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

void parallel_for(int64_t begin, int64_t end, int64_t grain, fastkd::Body body, void* context) {
    torch::stable::parallel_for(begin, end, grain, [&](int64_t b, int64_t e) { body(b, e, context); });
}

DType dtype_of(const Tensor& x, const char* name) {
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
bool is_channels_last(const Tensor& x, const char* name) {
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

fastkd::Pair pair_of(const Tensor& student, const Tensor& teacher) {
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

ScalarType acc_type(const fastkd::Pair& in) {
    return in.student_type == DType::f64 ? ScalarType::Double : ScalarType::Float;
}

// The pointer of a contiguous tensor in the accumulation type, with `numel` elements.
const void* acc_data(const Tensor& x, const fastkd::Pair& in, int64_t numel, const char* name) {
    STD_TORCH_CHECK(x.scalar_type() == acc_type(in), name, " must be float32, or float64 for float64 inputs");
    STD_TORCH_CHECK(x.numel() == numel, name, " must have ", numel, " elements, got ", x.numel());
    STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
    return x.const_data_ptr();
}

Group group_of(const std::string& dims) {
    if (dims == "hw") return Group::hw;
    if (dims == "nhw") return Group::nhw;
    if (dims == "c") return Group::c;
    STD_TORCH_CHECK(dims == "chw", "dims must be 'hw', 'nhw', 'c' or 'chw', got '", dims, "'");
    return Group::chw;
}

Sizes group_sizes(Group group, const Tensor& x) {
    switch (group) {
        case Group::hw: return {x.size(0), x.size(1)};
        case Group::nhw: return {x.size(1)};
        case Group::c: return {x.size(0), x.size(2), x.size(3)};
        default: return {x.size(0)};
    }
}

int64_t product(const Sizes& sizes) {
    int64_t n = 1;
    for (int64_t size : sizes) n *= size;
    return n;
}

Sizes with(Sizes sizes, int64_t last) {
    sizes.push_back(last);
    return sizes;
}

// A gradient: dense, dtype and memory format of the student. Large fresh memory costs a page fault every 4 KB when it
// is first written, more than the arithmetic; 2 MB pages make that rare where the system grants them on request.
Tensor gradient_like(const Tensor& student) {
    Tensor out = empty_like(student);
#if defined(__linux__)
    constexpr uintptr_t page = uintptr_t{1} << 21;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(out.mutable_data_ptr());
    const uintptr_t first = (begin + page - 1) & ~(page - 1);
    const uintptr_t last = (begin + static_cast<uintptr_t>(out.numel()) * out.element_size()) & ~(page - 1);
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
    return out;
}

std::tuple<Tensor, Tensor> nfd_forward(const Tensor& student, const Tensor& teacher, std::string dims, double eps) {
    const fastkd::Pair in = pair_of(student, teacher);
    const Group group = group_of(dims);
    const Sizes sizes = group_sizes(group, student);
    Tensor loss = new_empty(student, sizes, acc_type(in)), stats = new_empty(student, with(sizes, 6), acc_type(in));
    fastkd::kernels().nfd_forward({in, group, eps, loss.mutable_data_ptr(), stats.mutable_data_ptr()});
    return {loss, stats};
}

Tensor nfd_backward(const Tensor& grad, const Tensor& student, const Tensor& teacher, const Tensor& stats,
                    std::string dims) {
    const fastkd::Pair in = pair_of(student, teacher);
    const Group group = group_of(dims);
    const int64_t groups = product(group_sizes(group, student));
    Tensor out = gradient_like(student);
    fastkd::kernels().nfd_backward({in, group, acc_data(grad, in, groups, "grad"),
                                    acc_data(stats, in, groups * 6, "stats"), out.mutable_data_ptr()});
    return out;
}

fastkd::Pixels pixels_of(const fastkd::Pair& in, const std::optional<Tensor>& target,
                         const std::optional<Tensor>& weight, int64_t ignore_index) {
    fastkd::Pixels pixels{nullptr, Label::none, ignore_index, nullptr};
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

std::tuple<Tensor, Tensor> kd_forward(const Tensor& student, const Tensor& teacher, std::optional<Tensor> target,
                                      std::optional<Tensor> weight, double temperature, int64_t ignore_index,
                                      bool per_pixel) {
    const fastkd::Pair in = pair_of(student, teacher);
    const Sizes sizes = per_pixel ? Sizes{student.size(0), student.size(2), student.size(3)} : Sizes{};
    Tensor loss = new_empty(student, sizes, acc_type(in)), count = new_empty(student, Sizes{}, ScalarType::Long);
    fastkd::kernels().kd_forward({in, pixels_of(in, target, weight, ignore_index), temperature, per_pixel,
                                  loss.mutable_data_ptr(), static_cast<int64_t*>(count.mutable_data_ptr())});
    return {loss, count};
}

Tensor kd_backward(const Tensor& grad, const Tensor& student, const Tensor& teacher, std::optional<Tensor> target,
                   std::optional<Tensor> weight, double temperature, int64_t ignore_index) {
    const fastkd::Pair in = pair_of(student, teacher);
    const bool per_pixel = grad.dim() > 0;
    Tensor out = gradient_like(student);
    fastkd::kernels().kd_backward({in, pixels_of(in, target, weight, ignore_index), temperature,
                                   acc_data(grad, in, per_pixel ? in.n * in.hw : 1, "grad"), per_pixel,
                                   out.mutable_data_ptr(), nullptr, nullptr});
    return out;
}

std::tuple<Tensor, Tensor, Tensor> kd_with_gradient(const Tensor& student, const Tensor& teacher,
                                                    std::optional<Tensor> target, std::optional<Tensor> weight,
                                                    double temperature, int64_t ignore_index, double scale) {
    const fastkd::Pair in = pair_of(student, teacher);
    Tensor loss = new_empty(student, Sizes{}, acc_type(in)), count = new_empty(student, Sizes{}, ScalarType::Long);
    Tensor out = gradient_like(student);
    const float scale_f = static_cast<float>(scale);
    const void* grad = in.student_type == DType::f64 ? static_cast<const void*>(&scale) : &scale_f;
    fastkd::kernels().kd_backward({in, pixels_of(in, target, weight, ignore_index), temperature, grad, false,
                                   out.mutable_data_ptr(), loss.mutable_data_ptr(),
                                   static_cast<int64_t*>(count.mutable_data_ptr())});
    return {loss, count, out};
}

std::tuple<Tensor, Tensor> cwd_forward(const Tensor& student, const Tensor& teacher, double temperature) {
    const fastkd::Pair in = pair_of(student, teacher);
    const Sizes sizes{in.n, in.c};
    Tensor loss = new_empty(student, sizes, acc_type(in)), stats = new_empty(student, with(sizes, 4), acc_type(in));
    fastkd::kernels().cwd_forward({in, temperature, loss.mutable_data_ptr(), stats.mutable_data_ptr()});
    return {loss, stats};
}

Tensor cwd_backward(const Tensor& grad, const Tensor& student, const Tensor& teacher, const Tensor& stats,
                    double temperature) {
    const fastkd::Pair in = pair_of(student, teacher);
    Tensor out = gradient_like(student);
    fastkd::kernels().cwd_backward({in, temperature, acc_data(grad, in, in.n * in.c, "grad"),
                                    acc_data(stats, in, in.n * in.c * 4, "stats"), out.mutable_data_ptr()});
    return out;
}

Tensor exponential(const Tensor& x) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous(), "exp takes a contiguous float32 tensor");
    Tensor out = empty_like(x);
    fastkd::kernels().exp(static_cast<const float*>(x.const_data_ptr()), static_cast<float*>(out.mutable_data_ptr()),
                          x.numel(), parallel_for);
    return out;
}

std::string chosen_isa() { return fastkd::kernels().isa; }

}  // namespace

STABLE_TORCH_LIBRARY(fastkd_cpu, m) {
    m.def("nfd_forward(Tensor student, Tensor teacher, str dims, float eps) -> (Tensor loss, Tensor stats)");
    m.def("nfd_backward(Tensor grad, Tensor student, Tensor teacher, Tensor stats, str dims) -> Tensor");
    m.def(
        "kd_forward(Tensor student, Tensor teacher, Tensor? target, Tensor? weight, float temperature, "
        "int ignore_index, bool per_pixel) -> (Tensor loss, Tensor count)");
    m.def(
        "kd_backward(Tensor grad, Tensor student, Tensor teacher, Tensor? target, Tensor? weight, float temperature, "
        "int ignore_index) -> Tensor");
    m.def(
        "kd_with_gradient(Tensor student, Tensor teacher, Tensor? target, Tensor? weight, float temperature, "
        "int ignore_index, float scale) -> (Tensor loss, Tensor count, Tensor gradient)");
    m.def("cwd_forward(Tensor student, Tensor teacher, float temperature) -> (Tensor loss, Tensor stats)");
    m.def("cwd_backward(Tensor grad, Tensor student, Tensor teacher, Tensor stats, float temperature) -> Tensor");
    m.def("exp(Tensor x) -> Tensor");
    m.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fastkd_cpu, CPU, m) {
    m.impl("nfd_forward", TORCH_BOX(&nfd_forward));
    m.impl("nfd_backward", TORCH_BOX(&nfd_backward));
    m.impl("kd_forward", TORCH_BOX(&kd_forward));
    m.impl("kd_backward", TORCH_BOX(&kd_backward));
    m.impl("kd_with_gradient", TORCH_BOX(&kd_with_gradient));
    m.impl("cwd_forward", TORCH_BOX(&cwd_forward));
    m.impl("cwd_backward", TORCH_BOX(&cwd_backward));
    m.impl("exp", TORCH_BOX(&exponential));
}

STABLE_TORCH_LIBRARY_IMPL(fastkd_cpu, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&chosen_isa)); }

// The operators torch.ops.fastkd_cpu.*, on LibTorch's stable ABI: schemas, checks, allocation; the work is in cpu/.
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "checks.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

using namespace fastkd;

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

// The outputs of a resized loss, and the description the kernel fills them by.
struct ResizedOut {
    ResizedOut(const Tensor& logits, const fastkd::LabelPixels& pixels, int64_t height, int64_t width, bool align_corners,
               bool per_pixel)
        : acc(logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
          loss(new_empty(logits, per_pixel ? Sizes{logits.size(0), height, width} : Sizes{}, acc)),
          count(new_empty(logits, Sizes{}, acc)),
          kernel{pixels,  height,  width, align_corners, per_pixel, loss.mutable_data_ptr(), count.mutable_data_ptr(),
                 nullptr, parallel_for} {}

    // A gradient in the accumulation type, in the memory format of the logits.
    Tensor add_gradient(const Tensor& logits) {
        Tensor gradient = empty_like_as(logits, acc);
        kernel.gradient = gradient.mutable_data_ptr();
        return gradient;
    }

    const ScalarType acc;
    Tensor loss, count;
    fastkd::Resized kernel;
};

std::tuple<Tensor, Tensor> resized_cross_entropy_forward(const Tensor& logits, const Tensor& target,
                                                         std::optional<Tensor> class_weight,
                                                         std::optional<Tensor> pixel_weight, std::optional<Tensor> mask,
                                                         int64_t ignore_index, bool align_corners, bool per_pixel) {
    const fastkd::Map map = map_of(logits, "logits");
    STD_TORCH_CHECK(target.dim() == 3, "target must be (N, H, W), got ", target.dim(), " dimensions");
    const int64_t height = target.size(1), width = target.size(2);
    ResizedOut out(logits, label_pixels(map, height, width, target, class_weight, pixel_weight, mask, ignore_index), height,
                   width, align_corners, per_pixel);
    fastkd::kernels().resized_cross_entropy({map, out.kernel});
    return {out.loss, out.count};
}

std::tuple<Tensor, Tensor, Tensor> resized_cross_entropy_gradient(const Tensor& logits, const Tensor& target,
                                                                  std::optional<Tensor> class_weight,
                                                                  std::optional<Tensor> pixel_weight,
                                                                  std::optional<Tensor> mask, int64_t ignore_index,
                                                                  bool align_corners) {
    const fastkd::Map map = map_of(logits, "logits");
    STD_TORCH_CHECK(target.dim() == 3, "target must be (N, H, W), got ", target.dim(), " dimensions");
    const int64_t height = target.size(1), width = target.size(2);
    ResizedOut out(logits, label_pixels(map, height, width, target, class_weight, pixel_weight, mask, ignore_index), height,
                   width, align_corners, false);
    Tensor gradient = out.add_gradient(logits);
    fastkd::kernels().resized_cross_entropy({map, out.kernel});
    return {out.loss, out.count, gradient};
}

fastkd::ResizedKd resized_kd_of(const Tensor& student, const Tensor& teacher, double temperature, const ResizedOut& out) {
    const fastkd::Map s = map_of(student, "student"), t = map_of(teacher, "teacher");
    STD_TORCH_CHECK(s.n == t.n && s.c == t.c, "student and teacher must have the same N and C");
    STD_TORCH_CHECK((s.type == DType::f64) == (t.type == DType::f64), "float64 goes with float64 only");
    return {s, t, temperature, out.kernel};
}

std::tuple<Tensor, Tensor> resized_kd_forward(const Tensor& student, const Tensor& teacher, std::optional<Tensor> target,
                                              std::optional<Tensor> pixel_weight, int64_t height, int64_t width,
                                              double temperature, int64_t ignore_index, bool align_corners,
                                              bool per_pixel) {
    ResizedOut out(student,
                   label_pixels(map_of(student, "student"), height, width, target, std::nullopt, pixel_weight, std::nullopt,
                                ignore_index),
                   height, width, align_corners, per_pixel);
    fastkd::kernels().resized_kd(resized_kd_of(student, teacher, temperature, out));
    return {out.loss, out.count};
}

std::tuple<Tensor, Tensor, Tensor> resized_kd_gradient(const Tensor& student, const Tensor& teacher,
                                                       std::optional<Tensor> target, std::optional<Tensor> pixel_weight,
                                                       int64_t height, int64_t width, double temperature,
                                                       int64_t ignore_index, bool align_corners) {
    ResizedOut out(student,
                   label_pixels(map_of(student, "student"), height, width, target, std::nullopt, pixel_weight, std::nullopt,
                                ignore_index),
                   height, width, align_corners, false);
    Tensor gradient = out.add_gradient(student);
    fastkd::kernels().resized_kd(resized_kd_of(student, teacher, temperature, out));
    return {out.loss, out.count, gradient};
}

bool aux_main(const std::string& direction) {
    STD_TORCH_CHECK(direction == "aux_main" || direction == "main_aux",
                    "direction must be 'aux_main' or 'main_aux', got '", direction, "'");
    return direction == "aux_main";
}

Tensor teacher_confidence(const Tensor& main, const Tensor& aux, std::string direction) {
    const fastkd::Pair in = pair_of(main, aux);
    Tensor out = new_empty(main, Sizes{main.size(0), main.size(2), main.size(3)}, acc_type(in));
    fastkd::kernels().teacher_confidence(
        {in, nullptr, DType::f32, aux_main(direction), out.mutable_data_ptr(), nullptr, nullptr});
    return out;
}

std::tuple<Tensor, Tensor, Tensor> kd_with_confidence(const Tensor& student, const Tensor& teacher, const Tensor& aux,
                                                      std::string direction) {
    const fastkd::Pair in = pair_of(teacher, aux);
    pair_of(student, teacher);  // for its checks
    Tensor out = new_empty(student, Sizes{student.size(0), student.size(2), student.size(3)}, acc_type(in));
    Tensor loss = new_empty(student, Sizes{}, acc_type(in)), gradient = empty_like_as(student, acc_type(in));
    fastkd::kernels().teacher_confidence({in, student.const_data_ptr(), dtype_of(student, "student"), aux_main(direction),
                                          out.mutable_data_ptr(), loss.mutable_data_ptr(), gradient.mutable_data_ptr()});
    return {loss, gradient, out};
}

fastkd::Select select_of(const std::string& select) {
    if (select == "xor") return fastkd::Select::exclusive;
    if (select == "or") return fastkd::Select::either;
    if (select == "and") return fastkd::Select::both;
    if (select == "student") return fastkd::Select::student;
    STD_TORCH_CHECK(select == "student_only", "select must be 'xor', 'or', 'and', 'student' or 'student_only', got '",
                    select, "'");
    return fastkd::Select::student_only;
}

std::tuple<Tensor, Tensor> difficulty_mask(const Tensor& student, const Tensor& teacher, const Tensor& target,
                                           double threshold, int64_t min_kept, std::string confidence, std::string select,
                                           int64_t ignore_index, bool align_corners) {
    const fastkd::Map s = map_of(student, "student"), t = map_of(teacher, "teacher");
    STD_TORCH_CHECK(s.n == t.n && s.c == t.c, "student and teacher must have the same N and C");
    STD_TORCH_CHECK((s.type == DType::f64) == (t.type == DType::f64), "float64 goes with float64 only");
    STD_TORCH_CHECK(target.dim() == 3, "target must be (N, H, W), got ", target.dim(), " dimensions");
    STD_TORCH_CHECK(confidence == "max" || confidence == "label", "confidence must be 'max' or 'label', got '", confidence,
                    "'");
    const int64_t height = target.size(1), width = target.size(2);
    Tensor mask = new_empty(target, Sizes{target.size(0), height, width}, ScalarType::Bool);
    Tensor counts = new_empty(target, Sizes{2}, ScalarType::Long);
    fastkd::kernels().difficulty_mask(
        {s, t, label_pixels(s, height, width, target, std::nullopt, std::nullopt, std::nullopt, ignore_index), height, width,
         align_corners, threshold, min_kept, confidence == "label", select_of(select),
         static_cast<uint8_t*>(mask.mutable_data_ptr()), static_cast<int64_t*>(counts.mutable_data_ptr()), parallel_for});
    return {mask, counts};
}

Tensor kth_smallest(const Tensor& x, int64_t k) {
    const DType type = dtype_of(x, "x");
    STD_TORCH_CHECK((type == DType::f32 || type == DType::f64) && x.is_contiguous() && x.numel() > 0,
                    "kth_smallest takes a contiguous float32 or float64 tensor that is not empty");
    Tensor out = new_empty(x, Sizes{}, x.scalar_type());
    fastkd::kernels().kth_smallest(x.const_data_ptr(), type, x.numel(), k, out.mutable_data_ptr(), parallel_for);
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
    m.def(
        "resized_cross_entropy_forward(Tensor logits, Tensor target, Tensor? class_weight, Tensor? pixel_weight, "
        "Tensor? mask, int ignore_index, bool align_corners, bool per_pixel) -> (Tensor loss, Tensor count)");
    m.def(
        "resized_cross_entropy_gradient(Tensor logits, Tensor target, Tensor? class_weight, Tensor? pixel_weight, "
        "Tensor? mask, int ignore_index, bool align_corners) -> (Tensor loss, Tensor count, Tensor gradient)");
    m.def(
        "resized_kd_forward(Tensor student, Tensor teacher, Tensor? target, Tensor? pixel_weight, SymInt height, "
        "SymInt width, float temperature, int ignore_index, bool align_corners, bool per_pixel) "
        "-> (Tensor loss, Tensor count)");
    m.def(
        "resized_kd_gradient(Tensor student, Tensor teacher, Tensor? target, Tensor? pixel_weight, SymInt height, "
        "SymInt width, float temperature, int ignore_index, bool align_corners) "
        "-> (Tensor loss, Tensor count, Tensor gradient)");
    m.def("teacher_confidence(Tensor main, Tensor aux, str direction) -> Tensor");
    m.def(
        "kd_with_confidence(Tensor student, Tensor teacher, Tensor aux, str direction) "
        "-> (Tensor loss, Tensor gradient, Tensor confidence)");
    m.def(
        "difficulty_mask(Tensor student, Tensor teacher, Tensor target, float threshold, int min_kept, str confidence, "
        "str select, int ignore_index, bool align_corners) -> (Tensor mask, Tensor counts)");
    m.def("kth_smallest(Tensor x, int k) -> Tensor");
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
    m.impl("resized_cross_entropy_forward", TORCH_BOX(&resized_cross_entropy_forward));
    m.impl("resized_cross_entropy_gradient", TORCH_BOX(&resized_cross_entropy_gradient));
    m.impl("resized_kd_forward", TORCH_BOX(&resized_kd_forward));
    m.impl("resized_kd_gradient", TORCH_BOX(&resized_kd_gradient));
    m.impl("teacher_confidence", TORCH_BOX(&teacher_confidence));
    m.impl("kd_with_confidence", TORCH_BOX(&kd_with_confidence));
    m.impl("difficulty_mask", TORCH_BOX(&difficulty_mask));
    m.impl("kth_smallest", TORCH_BOX(&kth_smallest));
    m.impl("exp", TORCH_BOX(&exponential));
}

STABLE_TORCH_LIBRARY_IMPL(fastkd_cpu, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&chosen_isa)); }

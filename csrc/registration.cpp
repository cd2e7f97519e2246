// The operators torch.ops.fastkd_cpu.* on LibTorch's stable ABI: checks and allocation. The kernels are in cpu/, the
// schemas in Python (fastkd/ops).
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
using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

// Allocates a gradient: dense, dtype and memory format of the student. The first write to large fresh memory costs a
// page fault per 4 KB, more than the arithmetic. 2 MB pages avoid most of them, if the system grants them on request.
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

// Outputs of a loss operator: one number, or `sizes` terms; and the count, unless `kept` is given.
struct Out {
    Out(const Tensor& student, const std::string& reduction, double scale, Sizes sizes,
        std::optional<Tensor> kept = std::nullopt)
        : reduce(reduce_of(reduction)),
          loss(new_empty(student, reduce == Reduce::none ? std::move(sizes) : Sizes{}, acc_type(dtype_of(student, "student")))),
          kept(kept ? *kept : new_empty(student, Sizes{}, acc_type(dtype_of(student, "student")))),
          kernel{reduce, scale, loss.mutable_data_ptr(), kept ? nullptr : this->kept.mutable_data_ptr()} {}

    const Reduce reduce;
    Tensor loss, kept;
    const fastkd::Loss kernel;
};

// Upstream gradient of a loss with a separate backward: one number, or one per group.
Upstream upstream_of(const Tensor& grad, const Pair& in, const std::string& reduction, double scale, int64_t groups) {
    const Reduce reduce = reduce_of(reduction);
    return {acc_data(grad, in, reduce == Reduce::none ? groups : 1, "grad"), reduce, scale};
}

Two nfd_forward(const Tensor& student, const Tensor& teacher, std::string dims, double eps, std::string reduction,
                double scale) {
    const Pair in = pair_of(student, teacher);
    const Group group = group_of(dims);
    const Sizes sizes = group_sizes(group, student);
    Out out(student, reduction, scale, sizes, new_empty(student, with(sizes, 6), acc_type(in)));
    kernels().nfd_forward({in, group, eps, out.kernel, out.kept.mutable_data_ptr()});
    return {out.loss, out.kept};
}

Tensor nfd_backward(const Tensor& grad, const Tensor& student, const Tensor& teacher, std::string dims, double,
                    std::string reduction, double scale, const Tensor& stats) {
    const Pair in = pair_of(student, teacher);
    const Group group = group_of(dims);
    const int64_t groups = product(group_sizes(group, student));
    Tensor out = gradient_like(student);
    kernels().nfd_backward({in, group, upstream_of(grad, in, reduction, scale, groups),
                            acc_data(stats, in, groups * 6, "stats"), out.mutable_data_ptr()});
    return out;
}

Two cwd_forward(const Tensor& student, const Tensor& teacher, double temperature, std::string reduction, double scale) {
    const Pair in = pair_of(student, teacher);
    const Sizes sizes{in.n, in.c};
    Out out(student, reduction, scale, sizes, new_empty(student, with(sizes, 4), acc_type(in)));
    kernels().cwd_forward({in, temperature, out.kernel, out.kept.mutable_data_ptr()});
    return {out.loss, out.kept};
}

Tensor cwd_backward(const Tensor& grad, const Tensor& student, const Tensor& teacher, double temperature,
                    std::string reduction, double scale, const Tensor& stats) {
    const Pair in = pair_of(student, teacher);
    Tensor out = gradient_like(student);
    kernels().cwd_backward({in, temperature, upstream_of(grad, in, reduction, scale, in.n * in.c),
                            acc_data(stats, in, in.n * in.c * 4, "stats"), out.mutable_data_ptr()});
    return out;
}

// The gradient variant of an operator whose forward computes the gradient: f(gradient) returns loss and count.
template <class F>
Three with_gradient(const Tensor& student, const F& f) {
    Tensor gradient = gradient_like(student);
    auto [loss, kept] = f(gradient.mutable_data_ptr());
    return {loss, kept, gradient};
}

struct PixelArgs {
    const std::optional<Tensor>&target, &class_weight, &weight, &selected;
    int64_t ignore_index;
    const std::string& reduction;
    double scale;
};

Two kd(const Tensor& student, const Tensor& teacher, const PixelArgs& a, double temperature, bool sigmoid, void* gradient) {
    const Pair in = pair_of(student, teacher);
    Out out(student, a.reduction, a.scale, {student.size(0), student.size(2), student.size(3)});
    kernels().kd({in, pixels_of(in, a.target, a.weight, a.ignore_index), temperature, out.kernel, gradient, sigmoid});
    return {out.loss, out.kept};
}

template <bool kSigmoid>
Two kd_forward(const Tensor& student, const Tensor& teacher, std::optional<Tensor> target, std::optional<Tensor> weight,
               double temperature, int64_t ignore_index, std::string reduction, double scale) {
    return kd(student, teacher, {target, {}, weight, {}, ignore_index, reduction, scale}, temperature, kSigmoid, nullptr);
}

template <bool kSigmoid>
Three kd_gradient(const Tensor& student, const Tensor& teacher, std::optional<Tensor> target, std::optional<Tensor> weight,
                  double temperature, int64_t ignore_index, std::string reduction, double scale) {
    const PixelArgs args{target, {}, weight, {}, ignore_index, reduction, scale};
    return with_gradient(student, [&](void* g) { return kd(student, teacher, args, temperature, kSigmoid, g); });
}

Resized resized_of(const Map& map, const PixelArgs& a, const Sizes& size, bool align_corners, const Out& out, void* gradient) {
    STD_TORCH_CHECK(size.size() == 2, "size must be (height, width)");
    return {label_pixels(map, size[0], size[1], a.target, a.class_weight, a.weight, a.selected, a.ignore_index),
            size[0],
            size[1],
            align_corners,
            out.kernel,
            gradient,
            parallel_for};
}

struct Shape {
    double label_smoothing, focal_gamma;
};

Two resized_cross_entropy(const Tensor& logits, const Tensor& target, const PixelArgs& a, bool align_corners, Shape shape,
                          void* gradient) {
    const Map map = map_of(logits, "logits");
    STD_TORCH_CHECK(target.dim() == 3, "target must be (N, H, W), got ", target.dim(), " dimensions");
    const Sizes size{target.size(1), target.size(2)};
    Out out(logits, a.reduction, a.scale, {logits.size(0), size[0], size[1]});
    Resized to = resized_of(map, a, size, align_corners, out, gradient);
    to.pixels.keep_weight = shape.label_smoothing != 0;
    kernels().resized_cross_entropy({map, to, shape.label_smoothing, shape.focal_gamma});
    return {out.loss, out.kept};
}

Two resized_cross_entropy_forward(const Tensor& logits, const Tensor& target, std::optional<Tensor> class_weight,
                                  std::optional<Tensor> pixel_weight, std::optional<Tensor> selected, int64_t ignore_index,
                                  bool align_corners, std::string reduction, double scale) {
    const std::optional<Tensor> labels = target;
    const PixelArgs args{labels, class_weight, pixel_weight, selected, ignore_index, reduction, scale};
    return resized_cross_entropy(logits, target, args, align_corners, {0, 0}, nullptr);
}

Three resized_cross_entropy_gradient(const Tensor& logits, const Tensor& target, std::optional<Tensor> class_weight,
                                     std::optional<Tensor> pixel_weight, std::optional<Tensor> selected,
                                     int64_t ignore_index, bool align_corners, std::string reduction, double scale) {
    const std::optional<Tensor> labels = target;
    const PixelArgs args{labels, class_weight, pixel_weight, selected, ignore_index, reduction, scale};
    return with_gradient(logits,
                         [&](void* g) { return resized_cross_entropy(logits, target, args, align_corners, {0, 0}, g); });
}

Two resized_shaped_cross_entropy_forward(const Tensor& logits, const Tensor& target, std::optional<Tensor> class_weight,
                                         std::optional<Tensor> pixel_weight, int64_t ignore_index, bool align_corners,
                                         double label_smoothing, double focal_gamma, std::string reduction, double scale) {
    const std::optional<Tensor> labels = target;
    const PixelArgs args{labels, class_weight, pixel_weight, {}, ignore_index, reduction, scale};
    return resized_cross_entropy(logits, target, args, align_corners, {label_smoothing, focal_gamma}, nullptr);
}

Three resized_shaped_cross_entropy_gradient(const Tensor& logits, const Tensor& target, std::optional<Tensor> class_weight,
                                            std::optional<Tensor> pixel_weight, int64_t ignore_index, bool align_corners,
                                            double label_smoothing, double focal_gamma, std::string reduction, double scale) {
    const std::optional<Tensor> labels = target;
    const PixelArgs args{labels, class_weight, pixel_weight, {}, ignore_index, reduction, scale};
    const Shape shape{label_smoothing, focal_gamma};
    return with_gradient(logits,
                         [&](void* g) { return resized_cross_entropy(logits, target, args, align_corners, shape, g); });
}

// Dice and cross-entropy from sums

struct DiceArgs {
    int64_t ignore_index;
    bool align_corners, square;
    int64_t columns;
    const std::string& reduction;
    double scale;
};

ResizedDice dice_of(const Tensor& logits, const Tensor& target, const DiceArgs& a) {
    STD_TORCH_CHECK(a.columns >= 3 && a.columns <= 5, "columns must be 3 to 5, got ", a.columns);
    STD_TORCH_CHECK(a.reduction == "none" && a.scale == 1, "reduction must be 'none' and scale 1");
    STD_TORCH_CHECK(target.dim() == 3, "target must be (N, H, W), got ", target.dim(), " dimensions");
    const Map map = map_of(logits, "logits");
    const int64_t height = target.size(1), width = target.size(2);
    const LabelPixels pixels = label_pixels(map, height, width, target, std::nullopt, std::nullopt, std::nullopt, a.ignore_index);
    return {map, {pixels, height, width, a.align_corners, {}, nullptr, parallel_for}, a.square, a.columns, nullptr, nullptr};
}

Two resized_dice_forward(const Tensor& logits, const Tensor& target, int64_t ignore_index, bool align_corners, bool square,
                         int64_t columns, std::string reduction, double scale) {
    ResizedDice dice = dice_of(logits, target, {ignore_index, align_corners, square, columns, reduction, scale});
    Tensor sums = new_empty(logits, Sizes{logits.size(0), logits.size(1), columns}, ScalarType::Double);
    dice.sums = static_cast<double*>(sums.mutable_data_ptr());
    kernels().resized_dice(dice);
    return {sums, new_empty(logits, Sizes{0}, acc_type(dice.logits.type))};
}

Tensor resized_dice_backward(const Tensor& grad, const Tensor& logits, const Tensor& target, int64_t ignore_index,
                             bool align_corners, bool square, int64_t columns, std::string reduction, double scale,
                             const Tensor&) {
    ResizedDice dice = dice_of(logits, target, {ignore_index, align_corners, square, columns, reduction, scale});
    STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Double && grad.is_contiguous() &&
                        grad.numel() == logits.size(0) * logits.size(1) * columns,
                    "grad must be contiguous, float64, (N, C, columns)");
    Tensor out = gradient_like(logits);
    dice.grad = static_cast<const double*>(grad.const_data_ptr());
    dice.to.gradient = out.mutable_data_ptr();
    kernels().resized_dice(dice);
    return out;
}

// Binary cross-entropy

struct BinaryArgs {
    const std::optional<Tensor>&pos_weight, &pixel_weight;
    int64_t ignore_index;
    bool align_corners;
    const std::string& reduction;
    double scale;
};

Two resized_binary_cross_entropy(const Tensor& logits, const Tensor& target, const BinaryArgs& a, void* gradient) {
    const Map map = map_of(logits, "logits");
    STD_TORCH_CHECK(target.dim() == 4 && target.size(0) == map.n && target.size(1) == map.c && target.numel() > 0,
                    "target must be (N, C, H, W) with the N and C of the logits, and not empty");
    const int64_t height = target.size(2), width = target.size(3);
    LabelPixels pixels = label_pixels(map, height, width, std::nullopt, std::nullopt, std::nullopt, std::nullopt, a.ignore_index);
    pixels.label = label_of(target);
    pixels.target = target.const_data_ptr();
    pixels.classes = 2;
    if (a.pixel_weight) {
        const Tensor& weight = *a.pixel_weight;
        STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == map.n && (weight.size(1) == 1 || weight.size(1) == map.c) &&
                            weight.is_contiguous() && weight.numel() > 0,
                        "pixel_weight must be (N, 1, H, W) or (N, C, H, W), contiguous and not empty");
        pixels.weight = acc_map(weight, map.type, "pixel_weight");
        pixels.weight_h = weight.size(2);
        pixels.weight_w = weight.size(3);
        pixels.weight_planes = weight.size(1) == 1 ? map.c : 1;
    }
    const void* pos_weight = a.pos_weight ? acc_data(*a.pos_weight, map.type, map.c, "pos_weight") : nullptr;
    Out out(logits, a.reduction, a.scale, {map.n, map.c, height, width});
    kernels().resized_binary_cross_entropy(
        {map, {pixels, height, width, a.align_corners, out.kernel, gradient, parallel_for}, pos_weight});
    return {out.loss, out.kept};
}

Two resized_binary_cross_entropy_forward(const Tensor& logits, const Tensor& target, std::optional<Tensor> pos_weight,
                                         std::optional<Tensor> pixel_weight, int64_t ignore_index, bool align_corners,
                                         std::string reduction, double scale) {
    const BinaryArgs args{pos_weight, pixel_weight, ignore_index, align_corners, reduction, scale};
    return resized_binary_cross_entropy(logits, target, args, nullptr);
}

Three resized_binary_cross_entropy_gradient(const Tensor& logits, const Tensor& target, std::optional<Tensor> pos_weight,
                                            std::optional<Tensor> pixel_weight, int64_t ignore_index, bool align_corners,
                                            std::string reduction, double scale) {
    const BinaryArgs args{pos_weight, pixel_weight, ignore_index, align_corners, reduction, scale};
    return with_gradient(logits, [&](void* g) { return resized_binary_cross_entropy(logits, target, args, g); });
}

struct Teacher {
    const Tensor& logits;
    double temperature;
    bool sigmoid;
};

Two resized_kd(const Tensor& student, const Teacher& teacher, const PixelArgs& a, const Sizes& size, bool align_corners,
               void* gradient) {
    const Map s = map_of(student, "student"), t = map_of(teacher.logits, "teacher");
    STD_TORCH_CHECK(s.n == t.n && s.c == t.c, "student and teacher must have the same N and C");
    STD_TORCH_CHECK((s.type == DType::f64) == (t.type == DType::f64), "float64 goes with float64 only");
    STD_TORCH_CHECK(size.size() == 2, "size must be (height, width)");
    Out out(student, a.reduction, a.scale, {student.size(0), size[0], size[1]});
    const Resized to = resized_of(s, a, size, align_corners, out, gradient);
    kernels().resized_kd({s, t, teacher.temperature, to, teacher.sigmoid});
    return {out.loss, out.kept};
}

template <bool kSigmoid>
Two resized_kd_forward(const Tensor& student, const Tensor& teacher, std::optional<Tensor> target,
                       std::optional<Tensor> pixel_weight, Sizes size, double temperature, int64_t ignore_index,
                       bool align_corners, std::string reduction, double scale) {
    const PixelArgs args{target, {}, pixel_weight, {}, ignore_index, reduction, scale};
    return resized_kd(student, {teacher, temperature, kSigmoid}, args, size, align_corners, nullptr);
}

template <bool kSigmoid>
Three resized_kd_gradient(const Tensor& student, const Tensor& teacher, std::optional<Tensor> target,
                          std::optional<Tensor> pixel_weight, Sizes size, double temperature, int64_t ignore_index,
                          bool align_corners, std::string reduction, double scale) {
    const PixelArgs args{target, {}, pixel_weight, {}, ignore_index, reduction, scale};
    const Teacher other{teacher, temperature, kSigmoid};
    return with_gradient(student, [&](void* g) { return resized_kd(student, other, args, size, align_corners, g); });
}

bool aux_main(const std::string& direction) {
    STD_TORCH_CHECK(direction == "aux_main" || direction == "main_aux",
                    "direction must be 'aux_main' or 'main_aux', got '", direction, "'");
    return direction == "aux_main";
}

Tensor confidence_map(const Tensor& main, const Pair& in) {
    return new_empty(main, Sizes{main.size(0), main.size(2), main.size(3)}, acc_type(in));
}

Tensor teacher_confidence(const Tensor& main, const Tensor& aux, std::string direction) {
    const Pair in = pair_of(main, aux);
    Tensor out = confidence_map(main, in);
    kernels().teacher_confidence({in, aux_main(direction), out.mutable_data_ptr(), nullptr, DType::f32, {}, nullptr});
    return out;
}

struct TeacherHeads {
    const Tensor &main, &aux;
    const std::string& direction;
};

Two kd_confidence(const Tensor& student, const TeacherHeads& teacher, const std::string& reduction, double scale,
                  void* gradient) {
    const Pair in = pair_of(teacher.main, teacher.aux);
    pair_of(student, teacher.main);  // for its checks
    STD_TORCH_CHECK(reduction == "sum", "reduction must be 'sum', got '", reduction, "'");
    Out out(student, reduction, scale, {}, confidence_map(student, in));
    kernels().teacher_confidence({in, aux_main(teacher.direction), out.kept.mutable_data_ptr(), student.const_data_ptr(),
                                  dtype_of(student, "student"), out.kernel, gradient});
    return {out.loss, out.kept};
}

Two kd_confidence_forward(const Tensor& student, const Tensor& teacher, const Tensor& aux, std::string direction,
                          std::string reduction, double scale) {
    return kd_confidence(student, {teacher, aux, direction}, reduction, scale, nullptr);
}

Three kd_confidence_gradient(const Tensor& student, const Tensor& teacher, const Tensor& aux, std::string direction,
                             std::string reduction, double scale) {
    return with_gradient(
        student, [&](void* g) { return kd_confidence(student, {teacher, aux, direction}, reduction, scale, g); });
}

Two difficulty_mask(const Tensor& student, const Tensor& teacher, const Tensor& target, double threshold, int64_t min_kept,
                    std::string confidence, std::string select, int64_t ignore_index, bool align_corners) {
    const Map s = map_of(student, "student"), t = map_of(teacher, "teacher");
    STD_TORCH_CHECK(s.n == t.n && s.c == t.c, "student and teacher must have the same N and C");
    STD_TORCH_CHECK((s.type == DType::f64) == (t.type == DType::f64), "float64 goes with float64 only");
    STD_TORCH_CHECK(target.dim() == 3, "target must be (N, H, W), got ", target.dim(), " dimensions");
    STD_TORCH_CHECK(confidence == "max" || confidence == "label", "confidence must be 'max' or 'label', got '", confidence,
                    "'");
    const int64_t height = target.size(1), width = target.size(2);
    Tensor mask = new_empty(target, Sizes{target.size(0), height, width}, ScalarType::Bool);
    Tensor share = new_empty(student, Sizes{}, acc_type(s.type));
    kernels().difficulty_mask(
        {s, t, label_pixels(s, height, width, target, std::nullopt, std::nullopt, std::nullopt, ignore_index), height, width,
         align_corners, threshold, min_kept, confidence == "label", select_of(select),
         static_cast<uint8_t*>(mask.mutable_data_ptr()), share.mutable_data_ptr(), parallel_for});
    return {mask, share};
}

Tensor kth_smallest(const Tensor& x, int64_t k) {
    const DType type = dtype_of(x, "x");
    STD_TORCH_CHECK((type == DType::f32 || type == DType::f64) && x.is_contiguous() && x.numel() > 0,
                    "kth_smallest takes a contiguous float32 or float64 tensor that is not empty");
    Tensor out = new_empty(x, Sizes{}, x.scalar_type());
    kernels().kth_smallest(x.const_data_ptr(), type, x.numel(), k, out.mutable_data_ptr(), parallel_for);
    return out;
}

void rescale_(Tensor gradient, const Tensor& factor) {
    const DType type = dtype_of(gradient, "gradient");
    is_channels_last(gradient, "gradient");  // for its check: dense
    kernels().rescale({gradient.mutable_data_ptr(), type, gradient.numel(), acc_data(factor, type, 1, "factor"), parallel_for});
}

Tensor first_bad_label(const Tensor& target, int64_t classes, int64_t ignore_index) {
    Tensor out = new_empty(target, Sizes{}, ScalarType::Long);
    *static_cast<int64_t*>(out.mutable_data_ptr()) = kernels().first_bad_label(
        {target.const_data_ptr(), label_of(target), target.numel(), classes, ignore_index, parallel_for});
    return out;
}

Tensor exponential(const Tensor& x) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous(), "exp takes a contiguous float32 tensor");
    Tensor out = empty_like(x);
    kernels().exp(static_cast<const float*>(x.const_data_ptr()), static_cast<float*>(out.mutable_data_ptr()), x.numel(),
                  parallel_for);
    return out;
}

std::string chosen_isa() { return kernels().isa; }

}  // namespace

#if !defined(FASTKD_LIBRARY_IMPL)  // Kernel Hub builds have their own namespace
#define FASTKD_LIBRARY_IMPL(key, m) STABLE_TORCH_LIBRARY_IMPL(fastkd_cpu, key, m)
#endif

FASTKD_LIBRARY_IMPL(CPU, m) {
    m.impl("nfd_forward", TORCH_BOX(&nfd_forward));
    m.impl("nfd_backward", TORCH_BOX(&nfd_backward));
    m.impl("cwd_forward", TORCH_BOX(&cwd_forward));
    m.impl("cwd_backward", TORCH_BOX(&cwd_backward));
    m.impl("kd_forward", TORCH_BOX(&kd_forward<false>));
    m.impl("kd_gradient", TORCH_BOX(&kd_gradient<false>));
    m.impl("kd_sigmoid_forward", TORCH_BOX(&kd_forward<true>));
    m.impl("kd_sigmoid_gradient", TORCH_BOX(&kd_gradient<true>));
    m.impl("resized_cross_entropy_forward", TORCH_BOX(&resized_cross_entropy_forward));
    m.impl("resized_cross_entropy_gradient", TORCH_BOX(&resized_cross_entropy_gradient));
    m.impl("resized_shaped_cross_entropy_forward", TORCH_BOX(&resized_shaped_cross_entropy_forward));
    m.impl("resized_shaped_cross_entropy_gradient", TORCH_BOX(&resized_shaped_cross_entropy_gradient));
    m.impl("resized_kd_forward", TORCH_BOX(&resized_kd_forward<false>));
    m.impl("resized_kd_gradient", TORCH_BOX(&resized_kd_gradient<false>));
    m.impl("resized_kd_sigmoid_forward", TORCH_BOX(&resized_kd_forward<true>));
    m.impl("resized_kd_sigmoid_gradient", TORCH_BOX(&resized_kd_gradient<true>));
    m.impl("resized_dice_forward", TORCH_BOX(&resized_dice_forward));
    m.impl("resized_dice_backward", TORCH_BOX(&resized_dice_backward));
    m.impl("resized_binary_cross_entropy_forward", TORCH_BOX(&resized_binary_cross_entropy_forward));
    m.impl("resized_binary_cross_entropy_gradient", TORCH_BOX(&resized_binary_cross_entropy_gradient));
    m.impl("teacher_confidence", TORCH_BOX(&teacher_confidence));
    m.impl("kd_confidence_forward", TORCH_BOX(&kd_confidence_forward));
    m.impl("kd_confidence_gradient", TORCH_BOX(&kd_confidence_gradient));
    m.impl("difficulty_mask", TORCH_BOX(&difficulty_mask));
    m.impl("kth_smallest", TORCH_BOX(&kth_smallest));
    m.impl("rescale_", TORCH_BOX(&rescale_));
    m.impl("first_bad_label", TORCH_BOX(&first_bad_label));
    m.impl("exp", TORCH_BOX(&exponential));
}

FASTKD_LIBRARY_IMPL(CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&chosen_isa)); }

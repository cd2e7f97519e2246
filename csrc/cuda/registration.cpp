// The operators torch.ops.fastkd_cuda.*, on LibTorch's stable ABI: schemas, checks, allocation; the work is in the .cu
// files. Compiled with FASTKD_EMULATION, the same for CPU tensors on the emulation (emulation.cpp).
#if !defined(FASTKD_EMULATION)
#define USE_CUDA  // declares the stream below
#endif

#include "../checks.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/shim_utils.h>

#include <limits>
#include <tuple>

#include "kernels.h"

namespace {

using namespace fastkd;

#if defined(FASTKD_EMULATION)
#define FASTKD_KEY CPU
struct On {
    explicit On(const Tensor&) {}
    gpu::Stream stream = nullptr;
    gpu::Device device = gpu::device(0);
};
#else
#define FASTKD_KEY CUDA
// Makes a tensor's device the current one, and knows the stream that torch uses on it.
struct On {
    explicit On(const Tensor& x) : guard(x.get_device_index()), device(gpu::device(x.get_device_index())) {
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    }
    torch::stable::accelerator::DeviceGuard guard;
    gpu::Stream stream = nullptr;
    gpu::Device device;
};
#endif

void check_device(const Tensor& student, const Tensor& other, const char* name) {
    STD_TORCH_CHECK(student.is_cuda() == other.is_cuda() && student.get_device_index() == other.get_device_index(), name,
                    " must be on the student's device");
}

Pair pair_on_device(const Tensor& student, const Tensor& teacher) {
    check_device(student, teacher, "teacher");
    return pair_of(student, teacher);
}

void* scratch_of(const Tensor& x, int64_t doubles, Tensor& keep) {
    if (doubles == 0) return nullptr;
    keep = new_empty(x, Sizes{doubles}, ScalarType::Double);
    return keep.mutable_data_ptr();
}

// The next guess of grad_output. A copy: another backward may change the memory while this forward's kernels run.
Tensor guess_of(const On& on, const Tensor& student, DType type, const Tensor& memory) {
    check_device(student, memory, "memory");
    const auto* guesses = static_cast<const char*>(acc_data(memory, type, 2, "memory"));
    Tensor guess = new_empty(student, Sizes{}, acc_type(type));
    const int64_t bytes = acc_type(type) == ScalarType::Double ? 8 : 4;
    gpu::copy(guess.mutable_data_ptr(), guesses + bytes, bytes, on.stream);
    return guess;
}

void check_early(const Tensor& student, const Tensor& gradient, const Pair& in, const Tensor& memory) {
    pair_on_device(student, gradient);
    STD_TORCH_CHECK(gradient.scalar_type() == student.scalar_type(), "gradient must have the student's dtype");
    check_device(student, memory, "memory");
    acc_data(memory, in, 2, "memory");
}

// ---- NFD -------------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> run_nfd_forward(const On& on, const Tensor& student, const Tensor& teacher,
                                           const std::string& dims, double eps, void* gradient, const void* guess) {
    const Pair in = pair_on_device(student, teacher);
    const Group group = group_of(dims);
    const Sizes sizes = group_sizes(group, student);
    const gpu::NfdPlan plan = gpu::plan_nfd(in, group, on.device);
    STD_TORCH_CHECK(!gradient || plan.one_read(), "a group of this map does not fit a cluster: ask nfd_fits first");
    Tensor loss = new_empty(student, sizes, acc_type(in)), stats = new_empty(student, with(sizes, 6), acc_type(in));
    Tensor keep;
    void* parts = scratch_of(student, plan.parts() > 1 ? product(sizes) * plan.parts() * 6 : 0, keep);
    gpu::nfd_forward({in, group, eps, plan, loss.mutable_data_ptr(), stats.mutable_data_ptr(), parts, gradient, guess},
                     on.stream);
    return {loss, stats};
}

std::tuple<Tensor, Tensor> nfd_forward(const Tensor& student, const Tensor& teacher, std::string dims, double eps) {
    const On on(student);
    return run_nfd_forward(on, student, teacher, dims, eps, nullptr, nullptr);
}

bool nfd_fits(const Tensor& student, const Tensor& teacher, std::string dims) {
    const On on(student);
    return gpu::plan_nfd(pair_on_device(student, teacher), group_of(dims), on.device).one_read();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> nfd_forward_ahead(const Tensor& student, const Tensor& teacher,
                                                             std::string dims, double eps, const Tensor& memory) {
    const On on(student);
    const Pair in = pair_on_device(student, teacher);
    Tensor gradient = empty_like(student);
    const Tensor guess = guess_of(on, student, in.student_type, memory);
    const auto [loss, stats] = run_nfd_forward(on, student, teacher, dims, eps, gradient.mutable_data_ptr(),
                                               guess.const_data_ptr());
    return {loss, stats, gradient, guess};
}

void run_nfd_backward(const On& on, const Tensor& grad, const Tensor& student, const Tensor& teacher,
                      const Tensor& stats, const std::string& dims, void* out, const void* guess, void* memory) {
    const Pair in = pair_on_device(student, teacher);
    const Group group = group_of(dims);
    const int64_t groups = product(group_sizes(group, student));
    check_device(student, grad, "grad");
    check_device(student, stats, "stats");
    gpu::nfd_backward({in, group, acc_data(grad, in, groups, "grad"), acc_data(stats, in, groups * 6, "stats"), out, guess,
                       memory},
                      on.stream);
}

Tensor nfd_backward(const Tensor& grad, const Tensor& student, const Tensor& teacher, const Tensor& stats,
                    std::string dims) {
    const On on(student);
    Tensor out = empty_like(student);
    run_nfd_backward(on, grad, student, teacher, stats, dims, out.mutable_data_ptr(), nullptr, nullptr);
    return out;
}

void nfd_backward_ahead(const Tensor& grad, const Tensor& student, const Tensor& teacher, const Tensor& stats,
                        std::string dims, const Tensor& guess, Tensor gradient, Tensor memory) {
    const On on(student);
    const Pair in = pair_on_device(student, teacher);
    check_early(student, gradient, in, memory);
    run_nfd_backward(on, grad, student, teacher, stats, dims, gradient.mutable_data_ptr(),
                     acc_data(guess, in, 1, "guess"), memory.mutable_data_ptr());
}

// ---- KD --------------------------------------------------------------------------------------------------------------

gpu::Kd kd_of(const On& on, const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& target,
              const std::optional<Tensor>& weight, double temperature, int64_t ignore_index, const void* gradient) {
    const Pair in = pair_on_device(student, teacher);
    if (target) check_device(student, *target, "target");
    if (weight) check_device(student, *weight, "weight");
    gpu::Kd a{};
    a.in = in;
    a.pixels = pixels_of(in, target, weight, ignore_index);
    a.plan = gpu::plan_kd(in, on.device, gradient);
    a.temperature = temperature;
    a.scale = 1;
    STD_TORCH_CHECK(a.plan.pixels > 0, "the ", in.c, " classes of a pixel do not fit this device's shared memory");
    return a;
}

// What a forward fills, and where its kernels keep their sums in between.
struct KdSums {
    KdSums(gpu::Kd& a, const Tensor& student, bool per_pixel)
        : loss(new_empty(student, per_pixel ? Sizes{student.size(0), student.size(2), student.size(3)} : Sizes{},
                         acc_type(a.in))),
          count(new_empty(student, Sizes{}, ScalarType::Long)) {
        a.count = static_cast<int64_t*>(count.mutable_data_ptr());
        if (per_pixel) {
            a.losses = loss.mutable_data_ptr();
        } else {
            a.loss = loss.mutable_data_ptr();
            a.parts = static_cast<double*>(scratch_of(student, a.plan.blocks(), parts));
        }
        if (a.pixels.label != Label::none) {
            count_parts = new_empty(student, Sizes{gpu::count_blocks(a.in.n * a.in.hw)}, ScalarType::Long);
            a.count_parts = static_cast<int64_t*>(count_parts.mutable_data_ptr());
        }
    }
    Tensor loss, count, parts, count_parts;
};

std::tuple<Tensor, Tensor> kd_forward(const Tensor& student, const Tensor& teacher, std::optional<Tensor> target,
                                      std::optional<Tensor> weight, double temperature, int64_t ignore_index,
                                      bool per_pixel) {
    const On on(student);
    gpu::Kd a = kd_of(on, student, teacher, target, weight, temperature, ignore_index, nullptr);
    const KdSums sums(a, student, per_pixel);
    gpu::kd(a, on.stream);
    return {sums.loss, sums.count};
}

Tensor kd_backward(const Tensor& grad, const Tensor& student, const Tensor& teacher, std::optional<Tensor> target,
                   std::optional<Tensor> weight, double temperature, int64_t ignore_index) {
    const On on(student);
    Tensor out = empty_like(student);
    gpu::Kd a = kd_of(on, student, teacher, target, weight, temperature, ignore_index, out.const_data_ptr());
    check_device(student, grad, "grad");
    a.per_pixel = grad.dim() > 0;
    a.grad = acc_data(grad, a.in, a.per_pixel ? a.in.n * a.in.hw : 1, "grad");
    a.gradient = out.mutable_data_ptr();
    gpu::kd(a, on.stream);
    return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> kd_forward_ahead(const Tensor& student, const Tensor& teacher,
                                                            std::optional<Tensor> target, std::optional<Tensor> weight,
                                                            double temperature, int64_t ignore_index, double scale,
                                                            bool by_count, const Tensor& memory) {
    const On on(student);
    Tensor gradient = empty_like(student);
    gpu::Kd a = kd_of(on, student, teacher, target, weight, temperature, ignore_index, gradient.const_data_ptr());
    STD_TORCH_CHECK(target.has_value() || !by_count, "by_count needs a target");
    const KdSums sums(a, student, false);
    const Tensor guess = guess_of(on, student, a.in.student_type, memory);
    a.grad = guess.const_data_ptr();
    a.early = true;
    a.scale = scale;
    a.by_count = by_count;
    a.gradient = gradient.mutable_data_ptr();
    gpu::kd(a, on.stream);
    return {sums.loss, sums.count, gradient, guess};
}

void kd_backward_ahead(const Tensor& grad, const Tensor& student, const Tensor& teacher, std::optional<Tensor> target,
                       std::optional<Tensor> weight, double temperature, int64_t ignore_index, double scale, bool by_count,
                       const Tensor& count, const Tensor& guess, Tensor gradient, Tensor memory) {
    const On on(student);
    gpu::Kd a = kd_of(on, student, teacher, target, weight, temperature, ignore_index, gradient.const_data_ptr());
    check_early(student, gradient, a.in, memory);
    check_device(student, grad, "grad");
    STD_TORCH_CHECK(count.scalar_type() == ScalarType::Long && count.numel() == 1, "count must be one int64");
    a.grad = acc_data(grad, a.in, 1, "grad");
    a.scale = scale;
    a.by_count = by_count;
    a.count = static_cast<int64_t*>(count.mutable_data_ptr());
    a.guess = acc_data(guess, a.in, 1, "guess");
    a.memory = memory.mutable_data_ptr();
    a.gradient = gradient.mutable_data_ptr();
    gpu::kd(a, on.stream);
}

// ---- losses at label resolution --------------------------------------------------------------------------------------

gpu::Resized resized_of(const On& on, std::initializer_list<const Tensor*> sides, int64_t height, int64_t width,
                        const std::optional<Tensor>& target, const std::optional<Tensor>& class_weight,
                        const std::optional<Tensor>& pixel_weight, const std::optional<Tensor>& mask, double temperature,
                        int64_t ignore_index, bool align_corners) {
    gpu::Resized a{};
    for (const Tensor* map : sides) {
        check_device(**sides.begin(), *map, "teacher");
        const Map& side = a.maps[a.sides++] = map_of(*map, "logits");
        STD_TORCH_CHECK(side.n == a.maps[0].n && side.c == a.maps[0].c && side.h == a.maps[0].h && side.w == a.maps[0].w &&
                            (side.type == DType::f64) == (a.maps[0].type == DType::f64),
                        "student and teacher must have the same shape, and both float64 or neither");
    }
    for (const auto& other : {target, class_weight, pixel_weight, mask})
        if (other) check_device(**sides.begin(), *other, "target, its weights and mask");
    a.pixels = label_pixels(a.maps[0], height, width, target, class_weight, pixel_weight, mask, ignore_index);
    const auto small = [](int64_t in, int64_t out) {
        return in < (1 << 30) && out < (1 << 30) && in * (2 * out + 1) < INT32_MAX;
    };
    const bool small_weight = !a.pixels.weight || (small(a.pixels.weight_h, height) && small(a.pixels.weight_w, width));
    STD_TORCH_CHECK(small(a.maps[0].h, height) && small(a.maps[0].w, width) && small_weight && a.maps[0].c < INT32_MAX,
                    "maps this large need another backend: fastkd.use_backend(\"triton\")");
    a.plan = gpu::plan_resized(a.maps[0], height, width, align_corners, a.sides, on.device);
    STD_TORCH_CHECK(a.plan.total <= on.device.shared_per_block, "the gradient of one column of logits does not fit this ",
                    "device's shared memory: ", a.plan.total, " bytes of ", on.device.shared_per_block);
    a.temperature = temperature;
    a.scale = 1;
    return a;
}

// What a forward fills, and where its kernels keep their sums in between.
struct ResizedSums {
    ResizedSums(gpu::Resized& a, const Tensor& logits, bool per_pixel)
        : acc(acc_type(a.maps[0].type)),
          loss(new_empty(logits, per_pixel ? Sizes{a.plan.n, a.plan.rows.out, a.plan.columns.out} : Sizes{}, acc)),
          count(new_empty(logits, Sizes{}, acc)) {
        a.count = count.mutable_data_ptr();
        if (per_pixel) {
            a.losses = loss.mutable_data_ptr();
        } else {
            a.loss = loss.mutable_data_ptr();
            a.parts = static_cast<double*>(scratch_of(logits, a.plan.blocks(), parts));
        }
        const int64_t pixels = static_cast<int64_t>(a.plan.n) * a.plan.rows.out * a.plan.columns.out;
        if (a.pixels.label != Label::none)
            a.count_parts = static_cast<double*>(scratch_of(logits, gpu::count_blocks(pixels), count_parts));
    }
    const ScalarType acc;
    Tensor loss, count, parts, count_parts;
};

void run(const On& on, const gpu::Resized& a) {
    a.sides == 2 ? gpu::resized_kd(a, on.stream) : gpu::resized_cross_entropy(a, on.stream);
}

std::tuple<Tensor, Tensor> forward(const On& on, gpu::Resized a, const Tensor& logits, bool per_pixel) {
    const ResizedSums sums(a, logits, per_pixel);
    run(on, a);
    return {sums.loss, sums.count};
}

std::tuple<Tensor, Tensor, Tensor> with_gradient(const On& on, gpu::Resized a, const Tensor& logits) {
    const ResizedSums sums(a, logits, false);
    Tensor gradient = empty_like_as(logits, sums.acc);
    a.gradient = gradient.mutable_data_ptr();
    a.gradient_type = sums.acc == ScalarType::Double ? DType::f64 : DType::f32;
    run(on, a);
    return {sums.loss, sums.count, gradient};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_ahead(const On& on, gpu::Resized a, const Tensor& logits, double scale,
                                                         bool by_count, const Tensor& memory) {
    const ResizedSums sums(a, logits, false);
    Tensor gradient = empty_like(logits);
    a.gradient = gradient.mutable_data_ptr();
    a.gradient_type = a.maps[0].type;
    const Tensor guess = guess_of(on, logits, a.maps[0].type, memory);
    a.grad = guess.const_data_ptr();
    a.early = true;
    a.scale = scale;
    a.by_count = by_count;
    run(on, a);
    return {sums.loss, sums.count, gradient, guess};
}

void backward_ahead(const On& on, gpu::Resized a, const Tensor& grad, const Tensor& logits, double scale, bool by_count,
                    const Tensor& count, const Tensor& guess, Tensor& gradient, Tensor& memory) {
    const DType type = a.maps[0].type;
    check_early(logits, gradient, pair_of(logits, logits), memory);
    check_device(logits, grad, "grad");
    a.gradient = gradient.mutable_data_ptr();
    a.gradient_type = type;
    a.grad = acc_data(grad, type, 1, "grad");
    a.scale = scale;
    a.by_count = by_count;
    a.count = const_cast<void*>(acc_data(count, type, 1, "count"));
    a.guess = acc_data(guess, type, 1, "guess");
    a.memory = memory.mutable_data_ptr();
    run(on, a);
}

gpu::Resized cross_entropy_of(const On& on, const Tensor& logits, const Tensor& target,
                              const std::optional<Tensor>& class_weight, const std::optional<Tensor>& pixel_weight,
                              const std::optional<Tensor>& mask, int64_t ignore_index, bool align_corners) {
    STD_TORCH_CHECK(target.dim() == 3, "target must be (N, H, W), got ", target.dim(), " dimensions");
    return resized_of(on, {&logits}, target.size(1), target.size(2), target, class_weight, pixel_weight, mask, 1,
                      ignore_index, align_corners);
}

std::tuple<Tensor, Tensor> resized_cross_entropy_forward(const Tensor& logits, const Tensor& target,
                                                         std::optional<Tensor> class_weight,
                                                         std::optional<Tensor> pixel_weight, std::optional<Tensor> mask,
                                                         int64_t ignore_index, bool align_corners, bool per_pixel) {
    const On on(logits);
    return forward(on, cross_entropy_of(on, logits, target, class_weight, pixel_weight, mask, ignore_index, align_corners),
                   logits, per_pixel);
}

std::tuple<Tensor, Tensor, Tensor> resized_cross_entropy_gradient(const Tensor& logits, const Tensor& target,
                                                                  std::optional<Tensor> class_weight,
                                                                  std::optional<Tensor> pixel_weight,
                                                                  std::optional<Tensor> mask, int64_t ignore_index,
                                                                  bool align_corners) {
    const On on(logits);
    return with_gradient(
        on, cross_entropy_of(on, logits, target, class_weight, pixel_weight, mask, ignore_index, align_corners), logits);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> resized_cross_entropy_forward_ahead(
    const Tensor& logits, const Tensor& target, std::optional<Tensor> class_weight, std::optional<Tensor> pixel_weight,
    std::optional<Tensor> mask, int64_t ignore_index, bool align_corners, double scale, bool by_count,
    const Tensor& memory) {
    const On on(logits);
    return forward_ahead(
        on, cross_entropy_of(on, logits, target, class_weight, pixel_weight, mask, ignore_index, align_corners), logits,
        scale, by_count, memory);
}

void resized_cross_entropy_backward_ahead(const Tensor& grad, const Tensor& logits, const Tensor& target,
                                          std::optional<Tensor> class_weight, std::optional<Tensor> pixel_weight,
                                          std::optional<Tensor> mask, int64_t ignore_index, bool align_corners,
                                          double scale, bool by_count, const Tensor& count, const Tensor& guess,
                                          Tensor gradient, Tensor memory) {
    const On on(logits);
    backward_ahead(on,
                   cross_entropy_of(on, logits, target, class_weight, pixel_weight, mask, ignore_index, align_corners), grad,
                   logits, scale, by_count, count, guess, gradient, memory);
}

gpu::Resized kd_at_labels_of(const On& on, const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& target,
                             const std::optional<Tensor>& pixel_weight, int64_t height, int64_t width, double temperature,
                             int64_t ignore_index, bool align_corners) {
    return resized_of(on, {&student, &teacher}, height, width, target, std::nullopt, pixel_weight, std::nullopt, temperature,
                      ignore_index, align_corners);
}

std::tuple<Tensor, Tensor> resized_kd_forward(const Tensor& student, const Tensor& teacher, std::optional<Tensor> target,
                                              std::optional<Tensor> pixel_weight, int64_t height, int64_t width,
                                              double temperature, int64_t ignore_index, bool align_corners,
                                              bool per_pixel) {
    const On on(student);
    return forward(on,
                   kd_at_labels_of(on, student, teacher, target, pixel_weight, height, width, temperature, ignore_index,
                                   align_corners),
                   student, per_pixel);
}

std::tuple<Tensor, Tensor, Tensor> resized_kd_gradient(const Tensor& student, const Tensor& teacher,
                                                       std::optional<Tensor> target, std::optional<Tensor> pixel_weight,
                                                       int64_t height, int64_t width, double temperature,
                                                       int64_t ignore_index, bool align_corners) {
    const On on(student);
    return with_gradient(on,
                         kd_at_labels_of(on, student, teacher, target, pixel_weight, height, width, temperature,
                                         ignore_index, align_corners),
                         student);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> resized_kd_forward_ahead(const Tensor& student, const Tensor& teacher,
                                                                    std::optional<Tensor> target,
                                                                    std::optional<Tensor> pixel_weight, int64_t height,
                                                                    int64_t width, double temperature,
                                                                    int64_t ignore_index, bool align_corners, double scale,
                                                                    bool by_count, const Tensor& memory) {
    const On on(student);
    return forward_ahead(on,
                         kd_at_labels_of(on, student, teacher, target, pixel_weight, height, width, temperature,
                                         ignore_index, align_corners),
                         student, scale, by_count, memory);
}

void resized_kd_backward_ahead(const Tensor& grad, const Tensor& student, const Tensor& teacher,
                               std::optional<Tensor> target, std::optional<Tensor> pixel_weight, int64_t height,
                               int64_t width, double temperature, int64_t ignore_index, bool align_corners, double scale,
                               bool by_count, const Tensor& count, const Tensor& guess, Tensor gradient, Tensor memory) {
    const On on(student);
    backward_ahead(on,
                   kd_at_labels_of(on, student, teacher, target, pixel_weight, height, width, temperature, ignore_index,
                                   align_corners),
                   grad, student, scale, by_count, count, guess, gradient, memory);
}

}  // namespace

STABLE_TORCH_LIBRARY(fastkd_cuda, m) {
    m.def("nfd_forward(Tensor student, Tensor teacher, str dims, float eps) -> (Tensor loss, Tensor stats)");
    m.def("nfd_backward(Tensor grad, Tensor student, Tensor teacher, Tensor stats, str dims) -> Tensor");
    m.def("nfd_fits(Tensor student, Tensor teacher, str dims) -> bool");
    m.def(
        "nfd_forward_ahead(Tensor student, Tensor teacher, str dims, float eps, Tensor memory) "
        "-> (Tensor loss, Tensor stats, Tensor gradient, Tensor guess)");
    m.def(
        "nfd_backward_ahead(Tensor grad, Tensor student, Tensor teacher, Tensor stats, str dims, Tensor guess, "
        "Tensor(a!) gradient, Tensor(b!) memory) -> ()");
    m.def(
        "kd_forward(Tensor student, Tensor teacher, Tensor? target, Tensor? weight, float temperature, "
        "int ignore_index, bool per_pixel) -> (Tensor loss, Tensor count)");
    m.def(
        "kd_backward(Tensor grad, Tensor student, Tensor teacher, Tensor? target, Tensor? weight, float temperature, "
        "int ignore_index) -> Tensor");
    m.def(
        "kd_forward_ahead(Tensor student, Tensor teacher, Tensor? target, Tensor? weight, float temperature, "
        "int ignore_index, float scale, bool by_count, Tensor memory) "
        "-> (Tensor loss, Tensor count, Tensor gradient, Tensor guess)");
    m.def(
        "kd_backward_ahead(Tensor grad, Tensor student, Tensor teacher, Tensor? target, Tensor? weight, "
        "float temperature, int ignore_index, float scale, bool by_count, Tensor count, Tensor guess, "
        "Tensor(a!) gradient, Tensor(b!) memory) -> ()");
    m.def(
        "resized_cross_entropy_forward(Tensor logits, Tensor target, Tensor? class_weight, Tensor? pixel_weight, "
        "Tensor? mask, int ignore_index, bool align_corners, bool per_pixel) -> (Tensor loss, Tensor count)");
    m.def(
        "resized_cross_entropy_gradient(Tensor logits, Tensor target, Tensor? class_weight, Tensor? pixel_weight, "
        "Tensor? mask, int ignore_index, bool align_corners) -> (Tensor loss, Tensor count, Tensor gradient)");
    m.def(
        "resized_cross_entropy_forward_ahead(Tensor logits, Tensor target, Tensor? class_weight, Tensor? pixel_weight, "
        "Tensor? mask, int ignore_index, bool align_corners, float scale, bool by_count, Tensor memory) "
        "-> (Tensor loss, Tensor count, Tensor gradient, Tensor guess)");
    m.def(
        "resized_cross_entropy_backward_ahead(Tensor grad, Tensor logits, Tensor target, Tensor? class_weight, "
        "Tensor? pixel_weight, Tensor? mask, int ignore_index, bool align_corners, float scale, bool by_count, "
        "Tensor count, Tensor guess, Tensor(a!) gradient, Tensor(b!) memory) -> ()");
    m.def(
        "resized_kd_forward(Tensor student, Tensor teacher, Tensor? target, Tensor? pixel_weight, SymInt height, "
        "SymInt width, float temperature, int ignore_index, bool align_corners, bool per_pixel) "
        "-> (Tensor loss, Tensor count)");
    m.def(
        "resized_kd_gradient(Tensor student, Tensor teacher, Tensor? target, Tensor? pixel_weight, SymInt height, "
        "SymInt width, float temperature, int ignore_index, bool align_corners) "
        "-> (Tensor loss, Tensor count, Tensor gradient)");
    m.def(
        "resized_kd_forward_ahead(Tensor student, Tensor teacher, Tensor? target, Tensor? pixel_weight, SymInt height, "
        "SymInt width, float temperature, int ignore_index, bool align_corners, float scale, bool by_count, "
        "Tensor memory) -> (Tensor loss, Tensor count, Tensor gradient, Tensor guess)");
    m.def(
        "resized_kd_backward_ahead(Tensor grad, Tensor student, Tensor teacher, Tensor? target, Tensor? pixel_weight, "
        "SymInt height, SymInt width, float temperature, int ignore_index, bool align_corners, float scale, "
        "bool by_count, Tensor count, Tensor guess, Tensor(a!) gradient, Tensor(b!) memory) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastkd_cuda, FASTKD_KEY, m) {
    m.impl("nfd_forward", TORCH_BOX(&nfd_forward));
    m.impl("nfd_backward", TORCH_BOX(&nfd_backward));
    m.impl("nfd_fits", TORCH_BOX(&nfd_fits));
    m.impl("nfd_forward_ahead", TORCH_BOX(&nfd_forward_ahead));
    m.impl("nfd_backward_ahead", TORCH_BOX(&nfd_backward_ahead));
    m.impl("kd_forward", TORCH_BOX(&kd_forward));
    m.impl("kd_backward", TORCH_BOX(&kd_backward));
    m.impl("kd_forward_ahead", TORCH_BOX(&kd_forward_ahead));
    m.impl("kd_backward_ahead", TORCH_BOX(&kd_backward_ahead));
    m.impl("resized_cross_entropy_forward", TORCH_BOX(&resized_cross_entropy_forward));
    m.impl("resized_cross_entropy_gradient", TORCH_BOX(&resized_cross_entropy_gradient));
    m.impl("resized_cross_entropy_forward_ahead", TORCH_BOX(&resized_cross_entropy_forward_ahead));
    m.impl("resized_cross_entropy_backward_ahead", TORCH_BOX(&resized_cross_entropy_backward_ahead));
    m.impl("resized_kd_forward", TORCH_BOX(&resized_kd_forward));
    m.impl("resized_kd_gradient", TORCH_BOX(&resized_kd_gradient));
    m.impl("resized_kd_forward_ahead", TORCH_BOX(&resized_kd_forward_ahead));
    m.impl("resized_kd_backward_ahead", TORCH_BOX(&resized_kd_backward_ahead));
}

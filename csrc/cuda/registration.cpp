// The operators torch.ops.fastkd_cuda.* on LibTorch's stable ABI: checks and allocation. The kernels are in the .cu
// files, the schemas in Python (fastkd/ops). With FASTKD_EMULATION, the same operators for CPU tensors on the emulation
// (emulation.cpp).
#if !defined(FASTKD_EMULATION) && !defined(USE_CUDA)
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
// Sets the current device to the tensor's, and gets torch's current stream and the device properties.
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

// Scratch memory of `count` doubles; nothing for 0.
struct Doubles {
    explicit Doubles(const Tensor& x, int64_t count) {
        if (count > 0) keep = new_empty(x, Sizes{count}, ScalarType::Double);
    }
    double* data() const { return keep ? static_cast<double*>(keep->mutable_data_ptr()) : nullptr; }
    std::optional<Tensor> keep;
};

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

// f(pointer) returns loss and kept, and writes the gradient to the pointer.
template <class F>
Three with_gradient(const Tensor& student, const std::string& reduction, const F& f) {
    STD_TORCH_CHECK(reduction != "none", "a gradient is that of one number: reduction must be 'sum' or 'mean'");
    Tensor gradient = empty_like(student);
    const auto [loss, kept] = f(gradient.mutable_data_ptr());
    return {loss, kept, gradient};
}

// NFD

struct NfdArgs {
    const std::string& dims;
    double eps;
    const std::string& reduction;
    double scale;
};

void run_nfd_backward(const On& on, const Tensor* grad, const Pair& in, const Tensor& stats, const NfdArgs& args,
                      void* out) {
    const Group group = group_of(args.dims);
    const bool per_group = grad && reduce_of(args.reduction) == Reduce::none;
    const int64_t groups = stats.numel() / 6;
    gpu::nfd_backward({in, group, grad ? acc_data(*grad, in, per_group ? groups : 1, "grad") : nullptr, per_group, args.scale,
                       acc_data(stats, in, groups * 6, "stats"), out},
                      on.stream);
}

Two run_nfd(const On& on, const Tensor& student, const Tensor& teacher, const NfdArgs& args, void* gradient) {
    const Pair in = pair_on_device(student, teacher);
    const Group group = group_of(args.dims);
    const Reduce reduce = reduce_of(args.reduction);
    STD_TORCH_CHECK(reduce != Reduce::mean, "reduction must be 'sum' or 'none'");
    const Sizes sizes = group_sizes(group, student);
    const int64_t groups = product(sizes);
    const gpu::NfdPlan plan = gpu::plan_nfd(in, group, on.device);
    const bool none = reduce == Reduce::none;
    Tensor loss = new_empty(student, none ? sizes : Sizes{}, acc_type(in)), stats = new_empty(student, with(sizes, 6), acc_type(in));
    std::optional<Tensor> losses;
    if (!none) losses = new_empty(student, Sizes{groups}, acc_type(in));
    const bool one_read = gradient && plan.one_read() && reinterpret_cast<uintptr_t>(gradient) % 16 == 0;
    const Doubles parts(student, !one_read && plan.parts() > 1 ? groups * plan.parts() * 6 : 0);
    const Doubles sums(student, none ? 0 : gpu::count_blocks(groups));
    gpu::nfd_forward({in, group, args.eps, plan, reduce, args.scale, loss.mutable_data_ptr(), stats.mutable_data_ptr(),
                      losses ? losses->mutable_data_ptr() : nullptr, sums.data(), parts.data(), one_read ? gradient : nullptr},
                     on.stream);
    if (gradient && !one_read) run_nfd_backward(on, nullptr, in, stats, args, gradient);
    return {loss, stats};
}

Two nfd_forward(const Tensor& student, const Tensor& teacher, std::string dims, double eps, std::string reduction,
                double scale) {
    const On on(student);
    return run_nfd(on, student, teacher, {dims, eps, reduction, scale}, nullptr);
}

// One read if a group fits a cluster, else two.
Three nfd_gradient(const Tensor& student, const Tensor& teacher, std::string dims, double eps, std::string reduction,
                   double scale) {
    const On on(student);
    return with_gradient(student, reduction,
                         [&](void* g) { return run_nfd(on, student, teacher, {dims, eps, reduction, scale}, g); });
}

Tensor nfd_backward(const Tensor& grad, const Tensor& student, const Tensor& teacher, std::string dims, double eps,
                    std::string reduction, double scale, const Tensor& stats) {
    const On on(student);
    const Pair in = pair_on_device(student, teacher);
    check_device(student, grad, "grad");
    check_device(student, stats, "stats");
    STD_TORCH_CHECK(stats.numel() == 6 * product(group_sizes(group_of(dims), student)), "stats must have 6 numbers a group");
    Tensor out = empty_like(student);
    run_nfd_backward(on, &grad, in, stats, {dims, eps, reduction, scale}, out.mutable_data_ptr());
    return out;
}

// Losses over pixels

struct PixelArgs {
    const std::optional<Tensor>& target;
    const std::optional<Tensor>& weight;
    int64_t ignore_index;
    const std::string& reduction;
    double scale;
};

void check_devices(const Tensor& student, std::initializer_list<const std::optional<Tensor>*> others) {
    for (const auto* other : others)
        if (*other) check_device(student, **other, "target, its weights and what is selected");
}

template <bool kSigmoid>
Two run_kd(const Tensor& student, const Tensor& teacher, double temperature, const PixelArgs& args, void* gradient) {
    const On on(student);
    gpu::Kd a{};
    a.in = pair_on_device(student, teacher);
    check_devices(student, {&args.target, &args.weight});
    a.pixels = pixels_of(a.in, args.target, args.weight, args.ignore_index);
    a.plan = gpu::plan_kd(a.in, on.device, gradient);
    STD_TORCH_CHECK(a.plan.pixels > 0, "the ", a.in.c, " classes of a pixel do not fit this device's shared memory");
    a.temperature = temperature;
    a.reduce = reduce_of(args.reduction);
    a.scale = args.scale;
    const bool none = a.reduce == Reduce::none;
    const ScalarType acc = acc_type(a.in);
    Tensor loss = new_empty(student, none ? Sizes{student.size(0), student.size(2), student.size(3)} : Sizes{}, acc);
    Tensor count = new_empty(student, Sizes{}, acc);
    const Doubles parts(student, none ? 0 : gpu::part_space(a.plan.blocks()));
    const Doubles counted(student, a.pixels.label != Label::none ? gpu::count_blocks(a.in.n * a.in.hw) : 0);
    a.loss = loss.mutable_data_ptr();
    a.count = count.mutable_data_ptr();
    a.parts = parts.data();
    a.count_parts = counted.data();
    a.gradient = gradient;
    kSigmoid ? gpu::kd_sigmoid(a, on.stream) : gpu::kd(a, on.stream);
    return {loss, count};
}

template <bool kSigmoid>
Two kd_forward(const Tensor& student, const Tensor& teacher, std::optional<Tensor> target, std::optional<Tensor> weight,
               double temperature, int64_t ignore_index, std::string reduction, double scale) {
    return run_kd<kSigmoid>(student, teacher, temperature, {target, weight, ignore_index, reduction, scale}, nullptr);
}

template <bool kSigmoid>
Three kd_gradient(const Tensor& student, const Tensor& teacher, std::optional<Tensor> target, std::optional<Tensor> weight,
                  double temperature, int64_t ignore_index, std::string reduction, double scale) {
    const PixelArgs args{target, weight, ignore_index, reduction, scale};
    return with_gradient(student, reduction, [&](void* g) { return run_kd<kSigmoid>(student, teacher, temperature, args, g); });
}

// Losses at label resolution

// Whether the kernels' 32-bit arithmetic is sufficient for this resize.
bool fits(int64_t in, int64_t out) { return in < (1 << 30) && out < (1 << 30) && in * (2 * out + 1) < INT32_MAX; }

// Number of shapes that a loss is compiled for, and of sums per class and sample.
struct Cut {
    int shapes = gpu::kShapes, sums = 0;
};

// Inputs of a loss at label resolution: maps, labels, work decomposition, scratch memory.
struct AtLabels {
    AtLabels(const On& on, std::initializer_list<const Tensor*> maps, const Sizes& size, bool align_corners, bool gradient,
             const Cut& cut = {})
        : on(on), first(**maps.begin()), height(size.at(0)), width(size.at(1)) {
        for (const Tensor* map : maps) {
            check_device(first, *map, "teacher");
            const Map& side = a.maps[a.sides++] = map_of(*map, "logits");
            STD_TORCH_CHECK(side.n == a.maps[0].n && side.c == a.maps[0].c &&
                                (side.type == DType::f64) == (a.maps[0].type == DType::f64),
                            "student and teacher must have the same N and C, and both be float64 or neither");
            STD_TORCH_CHECK(fits(side.h, height) && fits(side.w, width) && side.c < (1 << 24),
                            "maps this large need another backend: fastkd.use_backend(\"triton\")");
        }
        acc = acc_type(a.maps[0].type);
        a.temperature = 1;
        a.scale = 1;
        a.choice = gpu::plan_cells(a.maps[0], a.maps[a.sides - 1], height, width, align_corners, on.device, cut.shapes);
        a.choice.plan.sums = cut.sums;
        const bool wide = acc == ScalarType::Double;
        a.choice.plan.chunk = gpu::chunk_of(a.choice.plan, a.sides, gradient, wide ? 8 : 4, on.device);
        scratch = new_empty(first, Sizes{gpu::scratch_bytes(a.choice.plan, a.sides, gradient, wide)}, ScalarType::Byte);
        a.scratch = scratch->mutable_data_ptr();
    }
    void set_weights(const std::optional<Tensor>& class_weight, const PixelArgs& args, const std::optional<Tensor>& selected) {
        check_devices(first, {&args.target, &class_weight, &args.weight, &selected});
        const bool known = selected && selected->scalar_type() != ScalarType::Bool;
        a.pixels = label_pixels(a.maps[0], height, width, args.target, class_weight, args.weight,
                                known ? std::nullopt : selected, args.ignore_index);
        STD_TORCH_CHECK(!a.pixels.weight || (fits(a.pixels.weight_h, height) && fits(a.pixels.weight_w, width)),
                        "weights this large need another backend: fastkd.use_backend(\"triton\")");
        if (known) {
            check_pixels(*selected, a.maps[0].n, height, width, "selected");
            a.known = acc_map(*selected, a.maps[0].type, "selected");
        }
        a.reduce = reduce_of(args.reduction);
        a.scale = args.scale;
    }
    // Allocates loss and count, runs the kernels, returns both.
    template <class F>
    Two run(const F& kernels, void* gradient) {
        const bool none = a.reduce == Reduce::none;
        const int64_t pixels = a.maps[0].n * height * width;
        Tensor loss = new_empty(first, none ? Sizes{a.maps[0].n, height, width} : Sizes{}, acc);
        Tensor count = new_empty(first, Sizes{}, acc);
        const Doubles parts(first, none ? 0 : gpu::part_space(gpu::total_warps(a.choice.plan)));
        const Doubles counted(first, a.pixels.label != Label::none || a.known ? gpu::count_blocks(pixels) : 0);
        (none ? a.terms : a.loss) = loss.mutable_data_ptr();
        a.count = count.mutable_data_ptr();
        a.parts = parts.data();
        a.count_parts = counted.data();
        a.gradient = gradient;
        kernels(a, on.stream);
        return {loss, count};
    }
    const On& on;
    const Tensor& first;
    int64_t height, width;
    gpu::Resized a{};
    ScalarType acc{};
    std::optional<Tensor> scratch;
};

Sizes size_of(const Tensor& target) {
    STD_TORCH_CHECK(target.dim() == 3, "target must be (N, H, W), got ", target.dim(), " dimensions");
    return {target.size(1), target.size(2)};
}

struct Selected {
    const std::optional<Tensor>&class_weight, &selected;
};

Two run_cross_entropy(const Tensor& logits, const Selected& which, const PixelArgs& args, bool align_corners,
                      void* gradient) {
    const On on(logits);
    AtLabels at(on, {&logits}, size_of(*args.target), align_corners, gradient);
    at.set_weights(which.class_weight, args, which.selected);
    return at.run([](const auto& a, auto stream) { gpu::resized_cross_entropy(a, stream); }, gradient);
}

struct Shaped {
    const std::optional<Tensor>& class_weight;
    double label_smoothing, focal_gamma;
};

Two run_shaped_cross_entropy(const Tensor& logits, const Shaped& shaped, const PixelArgs& args, bool align_corners,
                             void* gradient) {
    const On on(logits);
    AtLabels at(on, {&logits}, size_of(*args.target), align_corners, gradient, {gpu::kFewShapes});
    at.set_weights(shaped.class_weight, args, std::nullopt);
    const auto run = [&](const auto& a, auto stream) {
        gpu::resized_shaped_cross_entropy(a, shaped.label_smoothing, shaped.focal_gamma, stream);
    };
    return at.run(run, gradient);
}

Two resized_cross_entropy_forward(const Tensor& logits, const Tensor& target, std::optional<Tensor> class_weight,
                                  std::optional<Tensor> pixel_weight, std::optional<Tensor> selected, int64_t ignore_index,
                                  bool align_corners, std::string reduction, double scale) {
    const std::optional<Tensor> labels = target;
    return run_cross_entropy(logits, {class_weight, selected}, {labels, pixel_weight, ignore_index, reduction, scale},
                             align_corners, nullptr);
}

Three resized_cross_entropy_gradient(const Tensor& logits, const Tensor& target, std::optional<Tensor> class_weight,
                                     std::optional<Tensor> pixel_weight, std::optional<Tensor> selected,
                                     int64_t ignore_index, bool align_corners, std::string reduction, double scale) {
    const std::optional<Tensor> labels = target;
    const PixelArgs args{labels, pixel_weight, ignore_index, reduction, scale};
    return with_gradient(logits, reduction, [&](void* g) {
        return run_cross_entropy(logits, {class_weight, selected}, args, align_corners, g);
    });
}

Two resized_shaped_cross_entropy_forward(const Tensor& logits, const Tensor& target, std::optional<Tensor> class_weight,
                                         std::optional<Tensor> pixel_weight, int64_t ignore_index, bool align_corners,
                                         double label_smoothing, double focal_gamma, std::string reduction, double scale) {
    const std::optional<Tensor> labels = target;
    return run_shaped_cross_entropy(logits, {class_weight, label_smoothing, focal_gamma},
                                    {labels, pixel_weight, ignore_index, reduction, scale}, align_corners, nullptr);
}

Three resized_shaped_cross_entropy_gradient(const Tensor& logits, const Tensor& target, std::optional<Tensor> class_weight,
                                            std::optional<Tensor> pixel_weight, int64_t ignore_index, bool align_corners,
                                            double label_smoothing, double focal_gamma, std::string reduction, double scale) {
    const std::optional<Tensor> labels = target;
    const PixelArgs args{labels, pixel_weight, ignore_index, reduction, scale};
    const Shaped shaped{class_weight, label_smoothing, focal_gamma};
    return with_gradient(logits, reduction,
                         [&](void* g) { return run_shaped_cross_entropy(logits, shaped, args, align_corners, g); });
}

// Dice

struct DiceArgs {
    int64_t ignore_index;
    bool align_corners, square;
    int64_t columns;
    const std::string& reduction;
    double scale;
};

// Shared by sums and gradient; `gradient`: of the sums, or null.
gpu::ResizedDice dice_of(AtLabels& at, const Tensor& target, const DiceArgs& args, void* gradient) {
    STD_TORCH_CHECK(args.reduction == "none" && args.scale == 1, "reduction must be 'none' and scale 1");
    const std::optional<Tensor> labels = target;
    at.set_weights(std::nullopt, {labels, std::nullopt, args.ignore_index, args.reduction, 1}, std::nullopt);
    at.a.gradient = gradient;
    gpu::ResizedDice out{};
    out.on = at.a;
    out.square = args.square;
    out.columns = static_cast<int>(args.columns);
    return out;
}

Two resized_dice_forward(const Tensor& logits, const Tensor& target, int64_t ignore_index, bool align_corners, bool square,
                         int64_t columns, std::string reduction, double scale) {
    const On on(logits);
    STD_TORCH_CHECK(columns >= 3 && columns <= 5, "columns must be 3 to 5, got ", columns);
    AtLabels at(on, {&logits}, size_of(target), align_corners, false, {gpu::kFewShapes, static_cast<int>(columns)});
    gpu::ResizedDice a = dice_of(at, target, {ignore_index, align_corners, square, columns, reduction, scale}, nullptr);
    Tensor sums = new_empty(logits, Sizes{logits.size(0), logits.size(1), columns}, ScalarType::Double);
    const Doubles parts(logits, gpu::dice_pieces(a.on.choice.plan) * sums.numel());
    a.sums = static_cast<double*>(sums.mutable_data_ptr());
    a.parts = parts.data();
    gpu::resized_dice_forward(a, on.stream);
    return {sums, new_empty(logits, Sizes{0}, at.acc)};
}

Tensor resized_dice_backward(const Tensor& grad, const Tensor& logits, const Tensor& target, int64_t ignore_index,
                             bool align_corners, bool square, int64_t columns, std::string reduction, double scale,
                             const Tensor&) {
    const On on(logits);
    check_device(logits, grad, "grad");
    STD_TORCH_CHECK(columns >= 3 && columns <= 5 && grad.scalar_type() == ScalarType::Double && grad.is_contiguous() &&
                        grad.numel() == logits.size(0) * logits.size(1) * columns,
                    "grad must be contiguous, float64, (N, C, columns)");
    AtLabels at(on, {&logits}, size_of(target), align_corners, true, {gpu::kFewShapes});
    Tensor out = empty_like(logits);
    gpu::ResizedDice a = dice_of(at, target, {ignore_index, align_corners, square, columns, reduction, scale},
                                 out.mutable_data_ptr());
    Tensor upstream = new_empty(logits, Sizes{logits.size(0) * (4 * logits.size(1) + 1)}, at.acc);
    a.grad = static_cast<const double*>(grad.const_data_ptr());
    a.upstream = upstream.mutable_data_ptr();
    gpu::resized_dice_backward(a, on.stream);
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

Two run_binary_cross_entropy(const Tensor& logits, const Tensor& target, const BinaryArgs& args, void* gradient) {
    const On on(logits);
    STD_TORCH_CHECK(target.dim() == 4 && target.size(0) == logits.size(0) && target.size(1) == logits.size(1),
                    "target must be (N, C, H, W) with the N and C of the logits");
    check_device(logits, target, "target");
    check_devices(logits, {&args.pos_weight, &args.pixel_weight});
    const int64_t n = logits.size(0), c = logits.size(1), height = target.size(2), width = target.size(3);
    AtLabels at(on, {&logits}, {height, width}, args.align_corners, gradient, {gpu::kFewShapes});
    at.set_weights(std::nullopt, {std::nullopt, std::nullopt, args.ignore_index, args.reduction, args.scale}, std::nullopt);
    gpu::ResizedBinaryCrossEntropy a{};
    a.target = target.const_data_ptr();
    a.label = label_of(target);
    a.ignore_index = args.ignore_index;
    const DType type = at.a.maps[0].type;
    a.pos_weight = args.pos_weight ? acc_data(*args.pos_weight, type, c, "pos_weight") : nullptr;
    a.weight_classes = 1;
    if (args.pixel_weight) {
        const Tensor& weight = *args.pixel_weight;
        STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == n && (weight.size(1) == 1 || weight.size(1) == c) &&
                            weight.is_contiguous() && weight.numel() > 0,
                        "pixel_weight must be (N, 1, H, W) or (N, C, H, W), contiguous and not empty");
        STD_TORCH_CHECK(fits(weight.size(2), height) && fits(weight.size(3), width),
                        "weights this large need another backend: fastkd.use_backend(\"triton\")");
        a.weight = acc_map(weight, type, "pixel_weight");
        a.weight_classes = weight.size(1);
        a.weight_h = weight.size(2);
        a.weight_w = weight.size(3);
    }
    const bool none = at.a.reduce == Reduce::none;
    Tensor loss = new_empty(logits, none ? Sizes{n, c, height, width} : Sizes{}, at.acc), count = new_empty(logits, Sizes{}, at.acc);
    const int64_t words = n * c * height * gpu::code_words(width);
    Tensor codes = new_empty(logits, Sizes{words}, ScalarType::Long);
    const Doubles parts(logits, none ? 0 : gpu::part_space(gpu::total_warps(at.a.choice.plan)));
    const Doubles counted(logits, gpu::code_blocks(words));
    (none ? at.a.terms : at.a.loss) = loss.mutable_data_ptr();
    at.a.count = count.mutable_data_ptr();
    at.a.parts = parts.data();
    at.a.count_parts = counted.data();
    at.a.gradient = gradient;
    a.on = at.a;
    a.codes = static_cast<uint64_t*>(codes.mutable_data_ptr());
    gpu::resized_binary_cross_entropy(a, on.stream);
    return {loss, count};
}

Two resized_binary_cross_entropy_forward(const Tensor& logits, const Tensor& target, std::optional<Tensor> pos_weight,
                                         std::optional<Tensor> pixel_weight, int64_t ignore_index, bool align_corners,
                                         std::string reduction, double scale) {
    return run_binary_cross_entropy(logits, target, {pos_weight, pixel_weight, ignore_index, align_corners, reduction, scale},
                                    nullptr);
}

Three resized_binary_cross_entropy_gradient(const Tensor& logits, const Tensor& target, std::optional<Tensor> pos_weight,
                                            std::optional<Tensor> pixel_weight, int64_t ignore_index, bool align_corners,
                                            std::string reduction, double scale) {
    const BinaryArgs args{pos_weight, pixel_weight, ignore_index, align_corners, reduction, scale};
    return with_gradient(logits, reduction, [&](void* g) { return run_binary_cross_entropy(logits, target, args, g); });
}

// KD at label resolution

struct Teacher {
    const Tensor& map;
    double temperature;
};

template <bool kSigmoid>
Two run_resized_kd(const Tensor& student, const Teacher& teacher, const Sizes& size, const PixelArgs& args,
                   bool align_corners, void* gradient) {
    const On on(student);
    STD_TORCH_CHECK(size.size() == 2, "size must be (height, width)");
    AtLabels at(on, {&student, &teacher.map}, size, align_corners, gradient, {kSigmoid ? gpu::kFewShapes : gpu::kShapes});
    at.set_weights(std::nullopt, args, std::nullopt);
    at.a.temperature = teacher.temperature;
    const auto run = [](const auto& a, auto stream) {
        kSigmoid ? gpu::resized_kd_sigmoid(a, stream) : gpu::resized_kd(a, stream);
    };
    return at.run(run, gradient);
}

template <bool kSigmoid>
Two resized_kd_forward(const Tensor& student, const Tensor& teacher, std::optional<Tensor> target,
                       std::optional<Tensor> pixel_weight, Sizes size, double temperature, int64_t ignore_index,
                       bool align_corners, std::string reduction, double scale) {
    return run_resized_kd<kSigmoid>(student, {teacher, temperature}, size, {target, pixel_weight, ignore_index, reduction, scale},
                          align_corners, nullptr);
}

template <bool kSigmoid>
Three resized_kd_gradient(const Tensor& student, const Tensor& teacher, std::optional<Tensor> target,
                          std::optional<Tensor> pixel_weight, Sizes size, double temperature, int64_t ignore_index,
                          bool align_corners, std::string reduction, double scale) {
    const PixelArgs args{target, pixel_weight, ignore_index, reduction, scale};
    return with_gradient(student, reduction, [&](void* g) {
        return run_resized_kd<kSigmoid>(student, {teacher, temperature}, size, args, align_corners, g);
    });
}

// RDD

Tensor run_kth(const On& on, const Tensor& x, int64_t k) {
    const DType type = dtype_of(x, "x");
    STD_TORCH_CHECK(type == DType::f32 || type == DType::f64, "x must be float32 or float64");
    STD_TORCH_CHECK(x.is_contiguous() && x.numel() > 0, "x must be contiguous and not empty");
    Tensor out = new_empty(x, Sizes{}, x.scalar_type());
    Tensor bins = new_empty(x, Sizes{gpu::kth_bins(type)}, ScalarType::Long), state = new_empty(x, Sizes{4}, ScalarType::Long);
    gpu::kth_smallest({type, x.const_data_ptr(), x.numel(), k, static_cast<int64_t*>(bins.mutable_data_ptr()),
                       static_cast<int64_t*>(state.mutable_data_ptr()), out.mutable_data_ptr()},
                      on.stream);
    return out;
}

Tensor kth_smallest(const Tensor& x, int64_t k) {
    const On on(x);
    return run_kth(on, x, k);
}

struct DifficultyArgs {
    double threshold;
    int64_t min_kept;
    const std::string &confidence, &select;
    int64_t ignore_index;
    bool align_corners;
};

// The first result is the mask, or the student's log-sum-exps.
Two run_difficulty(const Tensor& student, const Tensor& teacher, const Tensor& target, const DifficultyArgs& args, bool lse) {
    const On on(student);
    STD_TORCH_CHECK(args.confidence == "max" || args.confidence == "label", "confidence must be 'max' or 'label', got '",
                    args.confidence, "'");
    const Sizes size = size_of(target);
    const std::optional<Tensor> labels = target;
    const std::string none = "none";
    const PixelArgs pixels{labels, std::nullopt, args.ignore_index, none, 1};
    const ScalarType acc = acc_type(dtype_of(student, "student"));
    const Sizes sizes{target.size(0), size[0], size[1]};
    STD_TORCH_CHECK(student.size(1) == teacher.size(1), "student and teacher must have the same C");
    Tensor first = new_empty(student, sizes, lse ? acc : ScalarType::Bool), share = new_empty(student, Sizes{}, acc);

    gpu::Difficulty a{};
    std::optional<Tensor> confidences[2], limits[2];
    const Tensor* const maps[] = {&student, &teacher};
    a.select = select_of(args.select);
    const int last = a.select == Select::student ? 0 : 1;  // OHEM: the teacher is not read
    for (int side = 0; side <= last; ++side) {
        confidences[side] = new_empty(student, sizes, acc);
        {  // `at` releases its scratch memory before the k-th smallest needs some
            AtLabels at(on, {maps[side]}, size, args.align_corners, false);
            STD_TORCH_CHECK(at.acc == acc, "float64 goes with float64 only");
            at.set_weights(std::nullopt, pixels, std::nullopt);
            at.a.terms = confidences[side]->mutable_data_ptr();
            at.a.sums = lse && side == 0 ? first.mutable_data_ptr() : nullptr;
            gpu::confidence(at.a, args.confidence == "label", on.stream);
            a.pixels = at.a.pixels;
            a.classes = at.a.maps[0].c;
        }
        if (args.min_kept > 0) limits[side] = run_kth(on, *confidences[side], args.min_kept);
        a.limits[side] = limits[side] ? limits[side]->const_data_ptr() : nullptr;
    }
    a.total = target.numel();
    a.wide = acc == ScalarType::Double;
    a.student = confidences[0]->const_data_ptr();
    a.teacher = confidences[last]->const_data_ptr();
    a.limits[1] = a.limits[last];
    a.threshold = args.threshold;
    (lse ? a.lse : reinterpret_cast<void*&>(a.mask)) = first.mutable_data_ptr();
    const Doubles parts(student, 2 * gpu::selection_blocks(a.total));
    a.parts = parts.data();
    a.share = share.mutable_data_ptr();
    gpu::difficulty(a, on.stream);
    return {first, share};
}

Two difficulty_mask(const Tensor& student, const Tensor& teacher, const Tensor& target, double threshold, int64_t min_kept,
                    std::string confidence, std::string select, int64_t ignore_index, bool align_corners) {
    return run_difficulty(student, teacher, target, {threshold, min_kept, confidence, select, ignore_index, align_corners},
                          false);
}

Two difficulty_lse(const Tensor& student, const Tensor& teacher, const Tensor& target, double threshold, int64_t min_kept,
                   std::string confidence, std::string select, int64_t ignore_index, bool align_corners) {
    return run_difficulty(student, teacher, target, {threshold, min_kept, confidence, select, ignore_index, align_corners},
                          true);
}

// Rescale

void rescale_(Tensor gradient, const Tensor& factor) {
    const On on(gradient);
    const DType type = dtype_of(gradient, "gradient");
    check_device(gradient, factor, "factor");
    STD_TORCH_CHECK(gradient.dim() != 4 || gradient.numel() == 0 || gradient.is_contiguous() ||
                        is_channels_last(gradient, "gradient"),
                    "gradient must be dense");
    if (gradient.numel() == 0) return;
    gpu::rescale({type, gradient.mutable_data_ptr(), gradient.numel(), acc_data(factor, type, 1, "factor")}, on.stream);
}

}  // namespace

#if !defined(FASTKD_LIBRARY_IMPL)  // Kernel Hub builds have their own namespace
#define FASTKD_LIBRARY_IMPL(key, m) STABLE_TORCH_LIBRARY_IMPL(fastkd_cuda, key, m)
#endif

FASTKD_LIBRARY_IMPL(FASTKD_KEY, m) {
    m.impl("nfd_forward", TORCH_BOX(&nfd_forward));
    m.impl("nfd_gradient", TORCH_BOX(&nfd_gradient));
    m.impl("nfd_backward", TORCH_BOX(&nfd_backward));
    m.impl("kd_forward", TORCH_BOX(&kd_forward<false>));
    m.impl("kd_gradient", TORCH_BOX(&kd_gradient<false>));
    m.impl("kd_sigmoid_forward", TORCH_BOX(&kd_forward<true>));
    m.impl("kd_sigmoid_gradient", TORCH_BOX(&kd_gradient<true>));
    m.impl("resized_cross_entropy_forward", TORCH_BOX(&resized_cross_entropy_forward));
    m.impl("resized_cross_entropy_gradient", TORCH_BOX(&resized_cross_entropy_gradient));
    m.impl("resized_shaped_cross_entropy_forward", TORCH_BOX(&resized_shaped_cross_entropy_forward));
    m.impl("resized_shaped_cross_entropy_gradient", TORCH_BOX(&resized_shaped_cross_entropy_gradient));
    m.impl("resized_dice_forward", TORCH_BOX(&resized_dice_forward));
    m.impl("resized_dice_backward", TORCH_BOX(&resized_dice_backward));
    m.impl("resized_binary_cross_entropy_forward", TORCH_BOX(&resized_binary_cross_entropy_forward));
    m.impl("resized_binary_cross_entropy_gradient", TORCH_BOX(&resized_binary_cross_entropy_gradient));
    m.impl("resized_kd_forward", TORCH_BOX(&resized_kd_forward<false>));
    m.impl("resized_kd_gradient", TORCH_BOX(&resized_kd_gradient<false>));
    m.impl("resized_kd_sigmoid_forward", TORCH_BOX(&resized_kd_forward<true>));
    m.impl("resized_kd_sigmoid_gradient", TORCH_BOX(&resized_kd_gradient<true>));
    m.impl("difficulty_mask", TORCH_BOX(&difficulty_mask));
    m.impl("difficulty_lse", TORCH_BOX(&difficulty_lse));
    m.impl("kth_smallest", TORCH_BOX(&kth_smallest));
    m.impl("rescale_", TORCH_BOX(&rescale_));
}

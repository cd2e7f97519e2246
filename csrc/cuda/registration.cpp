// The operators torch.ops.fastkd_cuda.*, on LibTorch's stable ABI: schemas, checks, allocation; the work is in the .cu
// files. Compiled with FASTKD_EMULATION, the same for CPU tensors on the emulation (emulation.cpp).
#if !defined(FASTKD_EMULATION)
#define USE_CUDA  // declares the stream below
#endif

#include "../checks.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

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
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
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
    check_device(student, memory, "memory");
    const auto* guesses = static_cast<const char*>(acc_data(memory, in, 2, "memory"));
    Tensor gradient = empty_like(student), guess = new_empty(student, Sizes{}, acc_type(in));
    // A copy: another backward may change the memory while this one's kernels run.
    const int64_t bytes = acc_type(in) == ScalarType::Double ? 8 : 4;
    gpu::copy(guess.mutable_data_ptr(), guesses + bytes, bytes, on.stream);
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
    pair_on_device(student, gradient);  // for its checks
    STD_TORCH_CHECK(gradient.scalar_type() == student.scalar_type(), "gradient must have the student's dtype");
    acc_data(memory, in, 2, "memory");
    run_nfd_backward(on, grad, student, teacher, stats, dims, gradient.mutable_data_ptr(),
                     acc_data(guess, in, 1, "guess"), memory.mutable_data_ptr());
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
}

STABLE_TORCH_LIBRARY_IMPL(fastkd_cuda, FASTKD_KEY, m) {
    m.impl("nfd_forward", TORCH_BOX(&nfd_forward));
    m.impl("nfd_backward", TORCH_BOX(&nfd_backward));
    m.impl("nfd_fits", TORCH_BOX(&nfd_fits));
    m.impl("nfd_forward_ahead", TORCH_BOX(&nfd_forward_ahead));
    m.impl("nfd_backward_ahead", TORCH_BOX(&nfd_backward_ahead));
}

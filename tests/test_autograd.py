"""The one autograd Function (fastkd/ops/_autograd.py): when the gradient is computed, its factor, and repeated
backwards.

A factor of 1 must be free, any other exact in the accumulator; fp16 gradients must stay in range for every reduction.
"""

import pytest
import torch

import fastkd
from fastkd import functional

from . import budget
from .losses import EACH, LOSSES, OPERATOR
from .support import DEVICE, each_kernel, needs
from .test_kd import labels

each_loss = pytest.mark.parametrize("name", EACH)
half_and_single = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def problem(dtype=torch.float32, shape=(2, 5, 6, 7), size=(13, 20)):
    student, teacher = torch.randn(2, *shape, device=DEVICE).to(dtype)
    return student.requires_grad_(), teacher, labels((shape[0], *size), shape[1], 0.2, torch.int64, 1)


def takes(backend: str, name: str) -> None:
    if name in OPERATOR:
        needs(backend, OPERATOR[name])


@pytest.mark.promise("backward-again")
@each_kernel
@each_loss
@half_and_single
def test_backward_again(backend, name, dtype):
    """Repeated backward over a retained graph with factors of 1 and others: each gradient is the exact multiple of
    the first."""
    takes(backend, name)
    student, teacher, target = problem(dtype)
    with fastkd.use_backend(backend):
        loss = LOSSES[name](student, teacher, target)
    (one,) = torch.autograd.grad(loss, student, retain_graph=True)
    kept = one.clone()
    for factor in (0.5, 3.0, 1.0, -4096.0):
        (got,) = torch.autograd.grad(loss, student, torch.tensor(factor, device=DEVICE), retain_graph=True)
        assert torch.equal(one, kept)
        # A power of two is exact except at the limits of fp16's range.
        exact = factor != 3.0 and dtype != torch.float16
        assert torch.equal(got, kept * factor) if exact else True
        want = kept.double() * factor
        error = (got.double() - want).norm()
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * max(1, abs(factor))
        assert error <= budget.roundings(2, want, budget.rounding(dtype)) + smallest * want.numel() ** 0.5
    assert one.any()


@each_kernel
@each_loss
def test_the_first_factor_is_not_one(backend, name):
    """The gradient from the forward is multiplied once; a second backward is independent of the first one's factor."""
    takes(backend, name)
    student, teacher, target = problem()
    with fastkd.use_backend(backend):
        want = torch.autograd.grad(LOSSES[name](student, teacher, target), student)[0]
        loss = LOSSES[name](student, teacher, target)
    (eight,) = torch.autograd.grad(loss, student, torch.tensor(8.0, device=DEVICE), retain_graph=True)
    (one,) = torch.autograd.grad(loss, student, retain_graph=True)
    assert torch.equal(eight, want * 8)
    assert torch.equal(one, want)


@each_kernel
@each_loss
def test_accumulates_like_any_gradient(backend, name):
    """Two losses of one student, and a student with an existing gradient."""
    takes(backend, name)
    student, teacher, target = problem()
    with fastkd.use_backend(backend):
        alone = torch.autograd.grad(LOSSES[name](student, teacher, target), student)[0]
        (LOSSES[name](student, teacher, target) + 2 * LOSSES[name](student, teacher, target)).backward()
        LOSSES[name](student, teacher, target).backward()
    budget.assert_close(student.grad, 4 * alone.double())


@pytest.mark.promise("fp16-range")
@each_kernel
@pytest.mark.parametrize("scaler", [1.0, 2.0**16])
@pytest.mark.parametrize("name", ["kd", "kd_target", "resized_ce", "resized_kd"])
def test_fp16_gradient_of_a_mean_over_a_million_pixels(backend, name, scaler):
    """1 / 2^20 is below fp16's normal numbers, and a softmax difference times it is smaller still. With GradScaler's
    factor the gradient that reaches the layers is a normal number with full precision."""
    if backend != "cpu" and DEVICE == "cpu":
        pytest.skip("a million pixels in the interpreter or the emulation")
    at_labels = (1024, 1024)
    shape = (1, 2, *at_labels) if name.startswith("kd") else (1, 2, 32, 32)
    student, teacher, target = problem(torch.float16, shape, at_labels)
    with fastkd.use_backend(backend):
        value = LOSSES[name](student, teacher, target)
        (got,) = torch.autograd.grad(value, student, torch.tensor(scaler, device=DEVICE))
    exact = student.detach().double().requires_grad_()
    with fastkd.use_backend("reference"):
        (want,) = torch.autograd.grad(LOSSES[name](exact, teacher.double(), target), exact)
    want *= scaler
    step = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps  # of subnormal numbers
    error = (got.double() - want).norm().item()
    assert error <= budget.roundings(1, want, 2**-11) + (0.5 * step * want.numel() ** 0.5 if scaler == 1 else 1e-9)


@pytest.mark.promise("fp16-range")
@each_kernel
@pytest.mark.parametrize("name", ["kd", "resized_ce", "resized_kd", "class_weight"])
def test_fp16_gradient_of_large_pixel_weights(backend, name):
    """Weights of 10^6: the gradient of the sum overflows fp16, that of the mean does not."""
    student, teacher, target = problem(torch.float16, (1, 4, 16, 16), (16, 16))
    weight = torch.full((1, 16, 16), 1e6, device=DEVICE)
    loss = {
        "kd": lambda s, t: fastkd.kd_loss(s, t, weight=weight),
        "resized_ce": lambda s, t: fastkd.resized_cross_entropy(s, target, pixel_weight=weight),
        "resized_kd": lambda s, t: fastkd.resized_kd_loss(s, t, size=(16, 16), pixel_weight=weight),
        "class_weight": lambda s, t: fastkd.resized_cross_entropy(s, target, class_weight=weight[0, 0, :4]),
    }[name]
    with fastkd.use_backend(backend):
        (got,) = torch.autograd.grad(loss(student, teacher), student)
    exact = student.detach().double().requires_grad_()
    with fastkd.use_backend("reference"):
        (want,) = torch.autograd.grad(loss(exact, teacher.double()), exact)
    assert got.isfinite().all()
    step = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    assert (got.double() - want).norm() <= budget.roundings(2, want, 2**-11) + step * want.numel() ** 0.5


MODULES = {
    "nfd": (lambda w: fastkd.NFDLoss(loss_weight=w), lambda s, t, y: fastkd.nfd_loss(s, t)),
    "cwd": (lambda w: fastkd.CWDLoss(loss_weight=w), lambda s, t, y: fastkd.cwd_loss(s, t)),
    "kd": (lambda w: fastkd.KDLoss(loss_weight=w), lambda s, t, y: fastkd.kd_loss(s, t)),
    "resized_ce": (
        lambda w: fastkd.ResizedCrossEntropyLoss(loss_weight=w),
        lambda s, t, y: fastkd.resized_cross_entropy(s, y),
    ),
    "resized_ce_dice": (
        lambda w: lambda s, y: fastkd.ResizedCrossEntropyDiceLoss(loss_weight=w)(s, y).loss,
        lambda s, t, y: fastkd.resized_cross_entropy_dice_loss(s, y).loss,
    ),
    "resized_kd": (
        lambda w: fastkd.ResizedKDLoss(loss_weight=w),
        lambda s, t, y: fastkd.resized_kd_loss(s, t, size=y.shape[1:], target=y),
    ),
}


@pytest.mark.promise("rescale")
@each_kernel
@pytest.mark.parametrize("weight", [1.0, 8.0, 2.0**-10])
@pytest.mark.parametrize("name", MODULES)
def test_loss_weight_of_a_module(backend, name, weight):
    """It is passed to the kernel; with a power of two the result is bitwise the function's times that factor."""
    takes(backend, name)
    module, function = MODULES[name]
    module = module(weight)
    student, teacher, target = problem()
    args = {"resized_ce": (target,), "resized_ce_dice": (target,), "resized_kd": (teacher, target)}.get(
        name, (teacher,)
    )
    with fastkd.use_backend(backend):
        got, want = module(student, *args), function(student, teacher, target)
        assert torch.equal(got, want * weight)
        gradients = [torch.autograd.grad(x, student)[0] for x in (got, want)]
    assert torch.equal(gradients[0], gradients[1] * weight)


@pytest.mark.promise("backward-again")
@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", EACH)
def test_compiled_steps(backend, name, dtype):
    """Compiled: a second backward over a retained graph and a factor other than 1 match eager mode; saved tensors
    are unchanged."""
    takes(backend, name)
    torch._dynamo.reset()
    student, teacher, target = problem(dtype)
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
    with fastkd.use_backend(backend):
        losses = [f(student, teacher, target) for f in (compiled, LOSSES[name])]
    for factor in (4.0, 1.0, 0.25):
        got, want = (
            torch.autograd.grad(x, student, torch.tensor(factor, device=DEVICE), retain_graph=True)[0] for x in losses
        )
        budget.assert_close(got, want)


def test_words_become_a_reduction_and_a_scale():
    """The only place that converts the functions' reduction names to the operators' arguments."""
    of = functional.reduction_of
    assert of("mean", 12, 3) == ("sum", 1 / 12)
    assert of("mean", 12, 3, counted=True, weight=2.0) == ("mean", 2.0)
    assert of("mean_all", 12, 3, counted=True, weight=2.0) == ("sum", 2 / 12)
    assert of("sum", 12, 3, weight=2.0) == ("sum", 2.0)
    assert of("batchmean", 12, 3, weight=2.0) == ("sum", 2 / 3)
    assert of("none", 12, 3, weight=2.0) == ("none", 2.0)
    assert of("mean", 0, 0) == ("sum", 1.0)

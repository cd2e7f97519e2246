"""Channel-wise distillation against the float64 formula, on every backend."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import fastkd
from fastkd.functional import FEATURE_REDUCTIONS

from . import budget
from .support import DEVICE, assert_within_budget, each_backend, each_kernel, loss_and_gradient, problems


@each_kernel
@given(problem=problems(), reduction=st.sampled_from(FEATURE_REDUCTIONS), temperature=st.sampled_from([0.5, 1.0, 4.0]))
def test_within_eagers_error(backend, problem, reduction, temperature):
    student, teacher = problem.tensors()
    n, c, h, w = student.shape
    assert_within_budget(
        lambda s, t: fastkd.cwd_loss(s, t, temperature=temperature, reduction=reduction),
        student,
        teacher,
        backend,
        temperature / (h * w) / (1 if reduction in ("sum", "none") else n if reduction == "batchmean" else n * c),
        # Less rounding per channel than eager, but a third of a rounding is biased, which accumulates in a sum.
        {"sum": temperature**2 * (n * c) ** 0.5, "batchmean": temperature**2 * c**0.5}.get(reduction, 1.0),
    )


@each_backend
@pytest.mark.parametrize("channels_last", [False, True])
def test_against_torch(backend, channels_last):
    student, teacher = torch.randn(2, 2, 10, 13, 7, device=DEVICE)
    if channels_last:
        student, teacher = (x.to(memory_format=torch.channels_last) for x in (student, teacher))
    value, gradient = loss_and_gradient(fastkd.cwd_loss, student, teacher, backend, torch.tensor(1.0))
    s = student.double().requires_grad_()
    want = F.kl_div(
        F.log_softmax(s.flatten(2) / 4, 2),
        F.log_softmax(teacher.double().flatten(2) / 4, 2),
        log_target=True,
        reduction="sum",
    ) * (16 / 20)
    want.backward()
    budget.assert_close(value, want.detach())
    budget.assert_close(gradient, s.grad)
    assert gradient.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@each_backend
@pytest.mark.parametrize("reduction", FEATURE_REDUCTIONS)
def test_reductions_agree(backend, reduction):
    student, teacher = torch.randn(2, 3, 4, 5, 6, device=DEVICE)
    with fastkd.use_backend(backend):
        channels = fastkd.cwd_loss(student, teacher, reduction="none")
        got = fastkd.cwd_loss(student, teacher, reduction=reduction)
    assert channels.shape == (3, 4)
    want = {"none": channels, "mean": channels.mean(), "sum": channels.sum(), "batchmean": channels.sum() / 3}
    torch.testing.assert_close(got, want[reduction])


@each_backend
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_empty(backend, shape):
    student = torch.randn(shape, device=DEVICE, requires_grad=True)
    with fastkd.use_backend(backend):
        value = fastkd.cwd_loss(student, torch.randn(shape, device=DEVICE))
    value.backward()
    assert value == 0
    assert student.grad.shape == shape


@each_backend
def test_impossible_pixels_of_the_teacher(backend):
    student, teacher = torch.randn(2, 2, 6, 5, 4, device=DEVICE)
    teacher[:, :, 2] = -torch.inf
    value, gradient = loss_and_gradient(fastkd.cwd_loss, student, teacher, backend, torch.tensor(1.0))
    kept = [0, 1, 3, 4]
    log_s = F.log_softmax(student.double().flatten(2) / 4, 2).view(2, 6, 5, 4)[:, :, kept]
    log_t = F.log_softmax(teacher.double()[:, :, kept].flatten(2) / 4, 2).view(2, 6, 4, 4)
    want = F.kl_div(log_s, log_t, log_target=True, reduction="sum") * (16 / 12)
    budget.assert_close(value, want)
    assert gradient.isfinite().all()


@each_backend
def test_identical_inputs_give_zero(backend):
    x = 30 * torch.randn(2, 19, 9, 11, device=DEVICE)
    value, gradient = loss_and_gradient(fastkd.cwd_loss, x, x.clone(), backend)
    budget.assert_zero(value)
    budget.assert_zero(gradient, 0.1)


@each_kernel
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 4096, 1, 3), (2, 5, 1, 1), (1, 2, 300, 257)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_extreme_shapes(backend, shape, layout):
    student, teacher = (torch.randn(shape, device=DEVICE).to(memory_format=layout) for _ in range(2))
    assert_within_budget(fastkd.cwd_loss, student, teacher, backend, 4 / student.numel())


@each_kernel
@pytest.mark.parametrize("offset", [1e3, -1e4])
def test_far_from_zero(backend, offset):
    student, teacher = (torch.randn(2, 3, 40, 40, device=DEVICE) + offset for _ in range(2))
    assert_within_budget(fastkd.cwd_loss, student, teacher, backend, 4 / student.numel())


@each_kernel
def test_bitwise_reproducible(backend):
    student, teacher = torch.randn(2, 2, 19, 65, 63, device=DEVICE)
    first = loss_and_gradient(fastkd.cwd_loss, student, teacher, backend)
    for _ in range(3):
        again = loss_and_gradient(fastkd.cwd_loss, student, teacher, backend)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@each_kernel
def test_gradcheck(backend):
    student = torch.randn(2, 3, 4, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    teacher = torch.randn(2, 3, 4, 5, dtype=torch.float64, device=DEVICE)
    with fastkd.use_backend(backend):
        torch.autograd.gradcheck(lambda s: fastkd.cwd_loss(s, teacher, reduction="none"), student)


@each_kernel
def test_nan_propagates(backend):
    student, teacher = torch.randn(2, 2, 3, 8, 8, device=DEVICE)
    student[1, 2, 3, 3] = float("nan")
    value, gradient = loss_and_gradient(fastkd.cwd_loss, student, teacher, backend)
    assert value.isnan()
    assert gradient[1, 2].isnan().all()
    assert gradient[0].isfinite().all()

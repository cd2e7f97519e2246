"""NFD against the float64 formula: every grouping, dtype, layout, offset and reduction, on every backend."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastkd
from fastkd import reference

from . import budget
from .support import (
    DEVICE,
    Problem,
    assert_within_budget,
    each_backend,
    each_kernel,
    loss_and_gradient,
    problems,
)

DIMS = ("hw", "nhw", "c", "chw")
each_dims = pytest.mark.parametrize("dims", DIMS)


def smallest_std(x: torch.Tensor, dims: str) -> float:
    variance = x.double().var(reference._GROUP_DIMS[dims], correction=0)
    return (variance + 1e-5).min().sqrt().item()


@pytest.mark.promise("budget")
@each_kernel
@each_dims
@given(problem=problems(), reduction=st.sampled_from(fastkd.functional.FEATURE_REDUCTIONS))
def test_within_eagers_error(backend, dims, problem, reduction):
    student, teacher = problem.tensors()
    group = student[0, 0].numel()
    # The z-score divides by the standard deviation, and so does the gradient: this is the size of its rounding noise.
    scale = 1 / smallest_std(student, dims) / (group if reduction == "none" else 1)
    offset = 1 + abs(problem.offset) / smallest_std(student, dims)
    # The loss of an element is a small difference of numbers near 1 (docs/nfd.md).
    elements = {"sum": student.numel(), "batchmean": student[0].numel()}.get(reduction, 1)
    assert_within_budget(
        lambda s, t: fastkd.nfd_loss(s, t, dims=dims, reduction=reduction),
        student,
        teacher,
        backend,
        scale * min(offset, 4),
        elements,
    )


@pytest.mark.promise("nfd-offset")
@each_kernel
@pytest.mark.parametrize(("mean", "std", "tolerance"), [(1e4, 1e-2, 1e-3), (1e3, 1e-3, 1e-3), (-1e6, 1.0, 1e-3)])
@each_dims
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_far_from_zero(backend, mean, std, tolerance, dims, layout):
    """mean| / std = 10^6 in fp32: the gradient is within 0.1 %, while plain PyTorch is off by percents."""
    g = torch.Generator().manual_seed(1)
    student, teacher = (
        (torch.randn(2, 24, 33, 40, generator=g, dtype=torch.float64) * std + mean)
        .float()
        .to(DEVICE, memory_format=layout)
        for _ in range(2)
    )

    def loss(s, t):
        return fastkd.nfd_loss(s, t, dims=dims, eps=1e-12)

    value, gradient = loss_and_gradient(loss, student, teacher, backend)
    true_value, true_gradient = loss_and_gradient(loss, student.double(), teacher.double(), "reference")
    torch.testing.assert_close(value.double(), true_value, rtol=tolerance, atol=0)
    assert (gradient.double() - true_gradient).norm() <= tolerance * true_gradient.norm()


@each_backend
@each_dims
def test_formula_by_hand(backend, dims):
    """Against numbers computed by hand from the definition, not with our reference."""
    student = torch.tensor([[[[1.0, 3.0]], [[2.0, 2.0]]]], device=DEVICE)
    teacher = torch.tensor([[[[3.0, 1.0]], [[0.0, 4.0]]]], device=DEVICE)
    with fastkd.use_backend(backend):
        got = fastkd.nfd_loss(student, teacher, dims=dims, eps=0.25, reduction="none")
    s, t = student.double(), teacher.double()
    dim = reference._GROUP_DIMS[dims]

    def z(x):
        return (x - x.mean(dim, keepdim=True)) / (x.var(dim, correction=0, keepdim=True) + 0.25).sqrt()

    budget.assert_close(got, ((z(s) - z(t)) ** 2).mean(dim))
    if dims == "hw":  # z(S) = (-1, 1) / sqrt(1.25), z(T) = -z(S); S constant, T = (-2, 2) / sqrt(4.25)
        torch.testing.assert_close(got[0], torch.tensor([4 / 1.25, 4 / 4.25], device=DEVICE))


@each_backend
@each_dims
def test_identical_inputs_give_zero(backend, dims):
    x = torch.randn(2, 7, 9, 11, device=DEVICE)
    value, gradient = loss_and_gradient(lambda s, t: fastkd.nfd_loss(s, t, dims=dims), x, x.clone(), backend)
    budget.assert_zero(value)
    budget.assert_zero(gradient, 0.1)


@each_backend
@each_dims
@pytest.mark.parametrize("reduction", fastkd.functional.FEATURE_REDUCTIONS)
def test_reductions_agree(backend, dims, reduction):
    student, teacher = torch.randn(2, 3, 4, 5, 6, device=DEVICE)
    with fastkd.use_backend(backend):
        per_group = fastkd.nfd_loss(student, teacher, dims=dims, reduction="none")
        got = fastkd.nfd_loss(student, teacher, dims=dims, reduction=reduction)
    elements = student.numel() / per_group.numel()
    want = {
        "none": per_group,
        "mean": per_group.mean(),
        "sum": per_group.sum() * elements,
        "batchmean": per_group.sum() * elements / 3,
    }[reduction]
    torch.testing.assert_close(got, want)


@each_backend
@each_dims
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_empty(backend, dims, shape):
    student = torch.randn(shape, device=DEVICE, requires_grad=True)
    with fastkd.use_backend(backend):
        value = fastkd.nfd_loss(student, torch.randn(shape, device=DEVICE), dims=dims)
    value.backward()
    assert value == 0
    assert student.grad.shape == shape


@each_kernel
@each_dims
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 1, 1), (1, 4096, 1, 3), (2, 5, 1, 1)])
def test_extreme_shapes(backend, dims, shape):
    problem = Problem(shape, torch.float32, torch.float32, "nchw", "nchw", 0.0, 1.0, 3)
    student, teacher = problem.tensors()
    assert_within_budget(
        lambda s, t: fastkd.nfd_loss(s, t, dims=dims), student, teacher, backend, 1 / smallest_std(student, dims)
    )


@each_kernel
@each_dims
def test_bitwise_reproducible(backend, dims):
    student, teacher = torch.randn(2, 2, 37, 65, 63, device=DEVICE)
    first = loss_and_gradient(lambda s, t: fastkd.nfd_loss(s, t, dims=dims), student, teacher, backend)
    for _ in range(3):
        again = loss_and_gradient(lambda s, t: fastkd.nfd_loss(s, t, dims=dims), student, teacher, backend)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@each_kernel
@each_dims
def test_gradcheck(backend, dims):
    student = torch.randn(2, 2, 2, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    teacher = torch.randn(2, 2, 2, 3, dtype=torch.float64, device=DEVICE)
    with fastkd.use_backend(backend):
        torch.autograd.gradcheck(lambda s: fastkd.nfd_loss(s, teacher, dims=dims, reduction="none"), student)


@each_kernel
@each_dims
def test_nan_propagates(backend, dims):
    student, teacher = torch.randn(2, 2, 3, 8, 8, device=DEVICE)
    student[1, 2, 3, 3] = float("nan")
    value, gradient = loss_and_gradient(lambda s, t: fastkd.nfd_loss(s, t, dims=dims), student, teacher, backend)
    assert value.isnan()
    assert gradient[1, 2, 3, 3].isnan()

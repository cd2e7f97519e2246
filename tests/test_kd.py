"""Pixel-wise KD against the float64 formula: dtypes, layouts, temperatures, labels, weights, reductions, backends."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import fastkd
from fastkd.functional import PIXEL_REDUCTIONS

from . import budget
from .support import DEVICE, assert_within_budget, each_backend, each_kernel, loss_and_gradient, problems

each_reduction = pytest.mark.parametrize("reduction", PIXEL_REDUCTIONS)


def labels(shape, classes, ignored, dtype, seed, ignore_index=255):
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(0, min(classes, 255), shape, generator=g)
    target[torch.rand(shape, generator=g) < ignored] = ignore_index
    return target.to(DEVICE, dtype)


@pytest.mark.promise("budget")
@each_kernel
@given(
    problem=problems(),
    reduction=st.sampled_from(PIXEL_REDUCTIONS),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    ignored=st.sampled_from([None, 0.0, 0.3, 1.0]),
    label_dtype=st.sampled_from([torch.uint8, torch.int32, torch.int64]),
    weighted=st.booleans(),
)
def test_within_eagers_error(backend, problem, reduction, temperature, ignored, label_dtype, weighted):
    student, teacher = problem.tensors()
    n, c, h, w = student.shape
    target = None if ignored is None else labels((n, h, w), c, ignored, label_dtype, problem.seed)
    weight = torch.rand(n, h, w, device=DEVICE) if weighted else None
    # One rounding of a logit changes a log-probability by |logit| * eps; a pixel's loss multiplies that by
    # temperature^2.
    pixels = {"sum": n * h * w, "batchmean": h * w}.get(reduction, 1)
    assert_within_budget(
        lambda s, t: fastkd.kd_loss(s, t, temperature=temperature, target=target, weight=weight, reduction=reduction),
        student,
        teacher,
        backend,
        temperature / (1 if reduction in ("sum", "none") else n if reduction == "batchmean" else n * h * w),
        temperature**2 * pixels,
    )


@each_backend
@pytest.mark.parametrize("channels_last", [False, True])
def test_against_torch(backend, channels_last):
    """Against torch's own kl_div, at temperature 2."""
    student, teacher = torch.randn(2, 2, 19, 13, 7, device=DEVICE)
    if channels_last:
        student, teacher = (x.to(memory_format=torch.channels_last) for x in (student, teacher))
    value, gradient = loss_and_gradient(
        lambda s, t: fastkd.kd_loss(s, t, temperature=2.0), student, teacher, backend, torch.tensor(1.0)
    )
    s = student.double().requires_grad_()
    want = F.kl_div(
        F.log_softmax(s / 2, 1), F.log_softmax(teacher.double() / 2, 1), log_target=True, reduction="sum"
    ) * (4 / (2 * 13 * 7))
    want.backward()
    budget.assert_close(value, want.detach())
    budget.assert_close(gradient, s.grad)
    assert gradient.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@each_backend
@each_reduction
@pytest.mark.parametrize("with_target", [False, True])
def test_reductions_agree(backend, reduction, with_target):
    student, teacher = torch.randn(2, 3, 4, 5, 6, device=DEVICE)
    target = labels((3, 5, 6), 4, 0.4, torch.int64, 5) if with_target else None
    with fastkd.use_backend(backend):
        pixels = fastkd.kd_loss(student, teacher, target=target, reduction="none")
        got = fastkd.kd_loss(student, teacher, target=target, reduction=reduction)
    if with_target:
        assert (pixels[target == 255] == 0).all()
    count = int((target != 255).sum()) if with_target else 90
    want = {
        "none": pixels,
        "mean": pixels.sum() / count,
        "mean_all": pixels.mean(),
        "sum": pixels.sum(),
        "batchmean": pixels.sum() / 3,
    }[reduction]
    torch.testing.assert_close(got, want)


@each_backend
@each_reduction
def test_everything_ignored(backend, reduction):
    student, teacher = torch.randn(2, 2, 4, 5, 6, device=DEVICE)
    target = torch.full((2, 5, 6), 255, device=DEVICE)
    value, gradient = loss_and_gradient(
        lambda s, t: fastkd.kd_loss(s, t, target=target, reduction=reduction), student, teacher, backend
    )
    assert (value == 0).all()
    assert (gradient == 0).all()


@each_backend
@each_reduction
def test_empty_batch(backend, reduction):
    student = torch.randn(0, 4, 5, 6, device=DEVICE, requires_grad=True)
    with fastkd.use_backend(backend):
        value = fastkd.kd_loss(student, student.detach(), reduction=reduction)
    value.sum().backward()
    assert value.sum() == 0
    assert student.grad.shape == student.shape


@each_backend
@pytest.mark.parametrize("ignore_index", [-1, -100, 0, 3])
def test_other_ignore_index(backend, ignore_index):
    student, teacher = torch.randn(2, 1, 4, 3, 3, device=DEVICE)
    target = torch.tensor([[[0, 1, 2], [3, 0, 1], [2, 3, ignore_index]]], device=DEVICE)
    with fastkd.use_backend(backend):
        got = fastkd.kd_loss(student, teacher, target=target, ignore_index=ignore_index, reduction="none")
    assert ((got != 0) == (target != ignore_index)).all()


@pytest.mark.promise("masked-classes")
@each_backend
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_impossible_class_of_the_teacher(backend, layout):
    """A teacher logit of -inf is a class of probability 0 and contributes 0."""
    student, teacher = (x.to(memory_format=layout) for x in torch.randn(2, 2, 6, 5, 4, device=DEVICE))
    teacher[:, 2] = -torch.inf
    value, gradient = loss_and_gradient(fastkd.kd_loss, student, teacher, backend, torch.tensor(1.0))
    kept = [0, 1, 3, 4, 5]
    log_s = F.log_softmax(student.double(), 1)[:, kept]
    log_t = F.log_softmax(teacher.double()[:, kept], 1)
    want = F.kl_div(log_s, log_t, log_target=True, reduction="sum") / 40
    budget.assert_close(value, want)
    budget.assert_close(gradient[:, 2], F.softmax(student.double(), 1)[:, 2] / 40)


@each_backend
def test_identical_inputs_give_zero(backend):
    x = 30 * torch.randn(2, 19, 9, 11, device=DEVICE)
    value, gradient = loss_and_gradient(fastkd.kd_loss, x, x.clone(), backend)
    assert value == 0
    budget.assert_zero(gradient, 1 / 198)


@each_kernel
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_confident_networks(backend, scale):
    """Logits in the hundreds and thousands: the softmax is one-hot and its naive log is -inf."""
    student, teacher = scale * torch.randn(2, 2, 19, 16, 16, device=DEVICE)
    assert_within_budget(fastkd.kd_loss, student, teacher, backend, 1 / 512)


@each_kernel
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 3, 3), (1, 4096, 1, 5), (1, 300, 7, 9), (2, 5, 1, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_extreme_shapes(backend, shape, layout):
    student, teacher = (torch.randn(shape, device=DEVICE).to(memory_format=layout) for _ in range(2))
    assert_within_budget(fastkd.kd_loss, student, teacher, backend, 1 / (shape[0] * shape[2] * shape[3]))


@pytest.mark.promise("threads")
@each_kernel
def test_bitwise_reproducible(backend):
    student, teacher = torch.randn(2, 2, 19, 65, 63, device=DEVICE)
    target = labels((2, 65, 63), 19, 0.2, torch.int64, 1)
    first = loss_and_gradient(lambda s, t: fastkd.kd_loss(s, t, target=target), student, teacher, backend)
    for _ in range(3):
        again = loss_and_gradient(lambda s, t: fastkd.kd_loss(s, t, target=target), student, teacher, backend)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@each_kernel
@each_reduction
def test_gradcheck(backend, reduction):
    student = torch.randn(2, 3, 2, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    teacher = torch.randn(2, 3, 2, 3, dtype=torch.float64, device=DEVICE)
    target, weight = labels((2, 2, 3), 3, 0.3, torch.int64, 2), torch.rand(2, 2, 3, dtype=torch.float64, device=DEVICE)
    with fastkd.use_backend(backend):
        torch.autograd.gradcheck(
            lambda s: fastkd.kd_loss(s, teacher, temperature=2.0, target=target, weight=weight, reduction=reduction),
            student,
        )


@pytest.mark.promise("backward-again")
@each_kernel
@pytest.mark.parametrize("with_target", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
def test_second_backward_and_other_scales(backend, with_target, reduction):
    """The first backward may use a gradient computed in the forward; the second recomputes it. Both scale alike, and
    the second does not change the gradient that the first returned."""
    student, teacher = torch.randn(2, 2, 7, 9, 11, device=DEVICE)
    student.requires_grad_()
    target = labels((2, 9, 11), 7, 0.3, torch.int64, 2) if with_target else None
    with fastkd.use_backend(backend):
        loss = fastkd.kd_loss(student, teacher, target=target, reduction=reduction)
    (first,) = torch.autograd.grad(loss, student, torch.tensor(3.0, device=DEVICE), retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, student, torch.tensor(-0.5, device=DEVICE), retain_graph=True)
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, first * (-0.5 / 3))
    want = loss_and_gradient(
        lambda s, t: fastkd.kd_loss(s, t, target=target, reduction=reduction),
        student.double(), teacher.double(), "reference", torch.tensor(3.0),
    )  # fmt: skip
    torch.testing.assert_close(loss.double(), want[0])
    budget.assert_close(first, want[1])


@each_kernel
def test_no_gradient_wanted(backend):
    student, teacher = torch.randn(2, 2, 7, 9, 11, device=DEVICE)
    with fastkd.use_backend(backend):
        want = fastkd.kd_loss(student, teacher)
        with torch.no_grad():
            got = fastkd.kd_loss(student.clone().requires_grad_(), teacher)
    assert not got.requires_grad
    assert torch.equal(got, want)


@each_kernel
def test_nan_propagates(backend):
    for side in (0, 1):
        pair = list(torch.randn(2, 2, 3, 8, 8, device=DEVICE))
        pair[side][1, 2, 3, 3] = float("nan")
        value, gradient = loss_and_gradient(fastkd.kd_loss, *pair, backend)
        assert value.isnan()
        assert gradient[1, :, 3, 3].isnan().all()
        assert gradient[0].isfinite().all()

"""The losses at label resolution equal "interpolate, then the loss" on each backend; edge cases as documented."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import fastkd
from fastkd.functional import PIXEL_REDUCTIONS

from . import budget
from .support import DEVICE, kernel_backends
from .test_kd import labels

each_convention = pytest.mark.parametrize("align_corners", [False, True])
each_reduction = pytest.mark.parametrize("reduction", PIXEL_REDUCTIONS)


@pytest.fixture(autouse=True, params=["reference", *kernel_backends()])
def on_backend(request):
    with fastkd.use_backend(request.param):
        yield


sizes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 24), st.integers(1, 24))


def upsample(x, size, align_corners):
    return F.interpolate(x.double(), size, mode="bilinear", align_corners=align_corners)


@given(size=sizes, classes=st.sampled_from([1, 3, 19]), align_corners=st.booleans(), seed=st.integers(0, 2**16))
def test_cross_entropy_equals_interpolate_then_loss(size, classes, align_corners, seed):
    g = torch.Generator().manual_seed(seed)
    h, w, height, width = size
    logits = torch.randn(2, classes, h, w, generator=g).to(DEVICE).requires_grad_()
    target = labels((2, height, width), classes, 0.3, torch.int64, seed)
    class_weight = torch.rand(classes, generator=g).to(DEVICE) + 0.5
    got = fastkd.resized_cross_entropy(logits, target, class_weight=class_weight, align_corners=align_corners)
    got.backward()
    x = logits.detach().double().requires_grad_()
    if (target == 255).all():
        assert got == 0
        assert (logits.grad == 0).all()
        return
    want = F.cross_entropy(upsample(x, (height, width), align_corners), target, class_weight.double(), ignore_index=255)
    want.backward()
    budget.assert_close(got, want)
    budget.assert_close(logits.grad, x.grad)


@given(size=sizes, align_corners=st.booleans(), seed=st.integers(0, 2**16), temperature=st.sampled_from([1.0, 3.0]))
def test_kd_equals_interpolate_then_loss(size, align_corners, seed, temperature):
    g = torch.Generator().manual_seed(seed)
    h, w, height, width = size
    student, teacher = torch.randn(2, 2, 5, h, w, generator=g).to(DEVICE)
    student.requires_grad_()
    got = fastkd.resized_kd_loss(
        student, teacher, size=(height, width), temperature=temperature, align_corners=align_corners
    )
    got.backward()
    x = student.detach().double().requires_grad_()
    log_s, log_t = (F.log_softmax(upsample(z, (height, width), align_corners) / temperature, 1) for z in (x, teacher))
    want = F.kl_div(log_s, log_t, log_target=True, reduction="sum") * temperature**2 / (2 * height * width)
    want.backward()
    budget.assert_close(got, want)
    budget.assert_close(student.grad, x.grad)


@each_reduction
@each_convention
@pytest.mark.parametrize("weight_size", [(12, 10), (3, 5), (20, 7)])
def test_pixel_weight_is_resized_and_never_counts(reduction, align_corners, weight_size):
    logits = torch.randn(2, 4, 5, 6, device=DEVICE)
    target = labels((2, 12, 10), 4, 0.3, torch.uint8, 4)
    weight = torch.rand(2, *weight_size, device=DEVICE)
    got = fastkd.resized_cross_entropy(
        logits, target, pixel_weight=weight, align_corners=align_corners, reduction=reduction
    )
    pixels = (
        F.cross_entropy(upsample(logits, (12, 10), align_corners), target.long(), ignore_index=255, reduction="none")
        * upsample(weight[:, None], (12, 10), align_corners)[:, 0]
    )
    want = {
        "none": pixels,
        "mean": pixels.sum() / (target != 255).sum(),
        "mean_all": pixels.mean(),
        "sum": pixels.sum(),
        "batchmean": pixels.sum() / 2,
    }[reduction]
    budget.assert_close(got, want)


@each_reduction
def test_everything_ignored(reduction):
    logits = torch.randn(2, 4, 5, 6, device=DEVICE, requires_grad=True)
    target = torch.full((2, 10, 12), 255, device=DEVICE)
    for loss in (
        fastkd.resized_cross_entropy(logits, target, reduction=reduction, class_weight=torch.ones(4, device=DEVICE)),
        fastkd.resized_kd_loss(logits, logits.detach() + 1, size=(10, 12), target=target, reduction=reduction),
    ):
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert (loss == 0).all()
        assert (gradient == 0).all()


@each_reduction
def test_empty_batch(reduction):
    logits = torch.randn(0, 4, 5, 6, device=DEVICE, requires_grad=True)
    target = torch.zeros(0, 10, 12, device=DEVICE, dtype=torch.int64)
    for loss in (
        fastkd.resized_cross_entropy(logits, target, reduction=reduction),
        fastkd.resized_kd_loss(logits, logits.detach(), size=(10, 12), reduction=reduction),
    ):
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.shape == ((0, 10, 12) if reduction == "none" else ())
        assert loss.sum() == 0
        assert gradient.shape == logits.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    logits = torch.randn(2, 4, 5, 6, device=DEVICE).to(dtype).requires_grad_()
    target = labels((2, 10, 12), 4, 0.3, torch.int32, 4)
    loss = fastkd.resized_cross_entropy(logits, target)
    loss.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert logits.grad.dtype == dtype
    want = F.cross_entropy(upsample(logits.detach(), (10, 12), False), target.long(), ignore_index=255)
    budget.assert_close(loss, want)


def test_teacher_of_another_size():
    student, teacher = torch.randn(2, 4, 5, 6, device=DEVICE), torch.randn(2, 4, 10, 12, device=DEVICE)
    got = fastkd.resized_kd_loss(student, teacher, size=(20, 24))
    want = fastkd.kd_loss(upsample(student, (20, 24), False), upsample(teacher, (20, 24), False))
    budget.assert_close(got, want)

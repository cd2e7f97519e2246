"""Label smoothing and focal loss at label resolution: torch's smoothing, the focal formula, the kernels' error
budget."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

import fastkd

from .support import DEVICE, INTERPRETER, assert_within_budget, each_backend, each_kernel, needs
from .test_kd import labels
from .test_resized import each_convention, each_reduction, upsample
from .test_resized_kernels import build, problems, scale_of

SHAPES = {"smoothing": {"label_smoothing": 0.1}, "focal": {"focal_gamma": 2.0}, "focal, 0.5": {"focal_gamma": 0.5}}
each_shape = pytest.mark.parametrize("shape", SHAPES)


def truth(logits, target, class_weight, align_corners, label_smoothing=0.0, focal_gamma=0.0):
    """Terms (N, H, W), and the divisor of the mean, in float64."""
    x = upsample(logits, target.shape[-2:], align_corners)
    weight = None if class_weight is None else class_weight.double()
    options = {"ignore_index": 255, "reduction": "none"}
    terms = F.cross_entropy(x, target.long(), weight, label_smoothing=label_smoothing, **options)
    valid = target != 255
    label = torch.where(valid, target, 0).long()
    if focal_gamma:
        p = F.softmax(x, 1).gather(1, label[:, None])[:, 0]
        terms = (1 - p) ** focal_gamma * terms
    return terms, (valid if weight is None else weight[label] * valid).sum()


@each_backend
@each_shape
@each_convention
@each_reduction
@pytest.mark.parametrize("weighted", [True] if INTERPRETER else [False, True])
def test_formula(backend, shape, align_corners, reduction, weighted):
    needs(backend, "resized_shaped_cross_entropy")
    g = torch.Generator().manual_seed(1)
    (classes, *size), label_size = ((4, 2, 3), (5, 7)) if INTERPRETER else ((7, 5, 6), (11, 17))
    logits = torch.randn(2, classes, *size, generator=g).to(DEVICE)
    target = labels((2, *label_size), classes, 0.3, torch.uint8, 1)
    class_weight = torch.rand(classes, generator=g).to(DEVICE) + 0.5 if weighted else None
    options = {"class_weight": class_weight, "align_corners": align_corners, "reduction": reduction, **SHAPES[shape]}
    with fastkd.use_backend(backend):
        got = fastkd.resized_cross_entropy(logits, target, **options)
    terms, count = truth(logits, target, class_weight, align_corners, **SHAPES[shape])
    want = {
        "none": terms,
        "sum": terms.sum(),
        "batchmean": terms.sum() / 2,
        "mean": terms.sum() / count,
        "mean_all": terms.mean(),
    }[reduction]
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)


@each_kernel
@each_shape
@given(problem=problems)
def test_within_budget(backend, shape, problem):
    needs(backend, "resized_shaped_cross_entropy")
    student, _, target, pixel_weight, class_weight = build(problem)
    options = {"align_corners": problem["align_corners"], "reduction": problem["reduction"], **SHAPES[shape]}

    def loss(s, t):
        return fastkd.resized_cross_entropy(s, target, pixel_weight=pixel_weight, class_weight=class_weight, **options)

    scale = scale_of(problem, target)
    assert_within_budget(loss, student, student.clone(), backend, loss_scale=scale, gradient_scale=scale)


@each_shape
def test_gradcheck_of_the_reference(shape):
    logits = torch.randn(2, 4, 2, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    target = labels((2, 5, 4), 4, 0.3, torch.int64, 1)
    weights = {"class_weight": torch.rand(4, device=DEVICE), "pixel_weight": torch.rand(2, 3, 3, device=DEVICE)}
    with fastkd.use_backend("reference"):
        assert torch.autograd.gradcheck(
            lambda x: fastkd.resized_cross_entropy(x, target, **weights, **SHAPES[shape]), logits
        )


@each_backend
@each_shape
def test_all_ignored(backend, shape):
    needs(backend, "resized_shaped_cross_entropy")
    logits = torch.randn(2, 3, 4, 5, device=DEVICE, requires_grad=True)
    target = torch.full((2, 8, 10), 255, device=DEVICE)
    with fastkd.use_backend(backend):
        loss = fastkd.resized_cross_entropy(logits, target, **SHAPES[shape])
    assert loss == 0
    assert not torch.autograd.grad(loss, logits)[0].any()


@each_backend
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_focal_of_a_sure_pixel_is_zero(backend, gamma):
    """p = 1 in fp32: for gamma < 1 the derivative of (1 - p)^gamma is infinite there, that of the loss is not."""
    needs(backend, "resized_shaped_cross_entropy")
    logits = torch.tensor([100.0, -100.0], device=DEVICE).view(1, 2, 1, 1).requires_grad_()
    for label, want in ((0, 0.0), (1, 200.0)):
        target = torch.full((1, 3, 3), label, device=DEVICE)
        with fastkd.use_backend(backend):
            loss = fastkd.resized_cross_entropy(logits, target, focal_gamma=gamma)
            (gradient,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(loss.item(), want)
        torch.testing.assert_close(gradient.flatten().tolist(), [0.0, 0.0] if label == 0 else [1.0, -1.0])


@each_backend
def test_neither_is_plain_cross_entropy(backend):
    """Bitwise, from the same operator."""
    logits = torch.randn(2, 5, 4, 6, device=DEVICE, requires_grad=True)
    target = labels((2, 9, 13), 5, 0.3, torch.int64, 1)
    results = []
    with fastkd.use_backend(backend):
        for options in ({}, {"label_smoothing": 0, "focal_gamma": 0.0}):
            loss = fastkd.resized_cross_entropy(logits, target, **options)
            results.append((loss.detach(), *torch.autograd.grad(loss, logits)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_is_refused():
    logits, target = torch.randn(1, 3, 2, 2), torch.zeros(1, 4, 4, dtype=torch.int64)
    for loss in (lambda **o: fastkd.resized_cross_entropy(logits, target, **o), fastkd.ResizedCrossEntropyLoss):
        with pytest.raises(ValueError, match=r"label_smoothing: got 1\.0, expected a number >= 0 and < 1"):
            loss(label_smoothing=1.0)
        with pytest.raises(ValueError, match="focal_gamma: got -1"):
            loss(focal_gamma=-1.0)
        with pytest.raises(ValueError, match="expected at most one of them"):
            loss(label_smoothing=0.1, focal_gamma=2.0)

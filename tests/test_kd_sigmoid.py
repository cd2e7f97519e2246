"""KD with one sigmoid per class: the KL of Bernoulli distributions in float64, edge cases, the kernels' error
budget."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import fastkd

from .support import DEVICE, assert_within_budget, each_backend, each_kernel, loss_and_gradient, needs
from .support import problems as pairs
from .test_kd import labels
from .test_resized import upsample
from .test_resized_kernels import build, scale_of
from .test_resized_kernels import problems as resized_problems


def truth(student, teacher, temperature):
    """Per pixel, as binary cross-entropy minus the teacher's entropy."""
    s, t = student.double() / temperature, torch.sigmoid(teacher.double() / temperature)
    cross = F.binary_cross_entropy_with_logits(s, t, reduction="none")
    return (cross - torch.special.entr(t) - torch.special.entr(1 - t)).sum(1) * temperature**2


@each_backend
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_formula(backend, temperature):
    needs(backend, "kd_sigmoid")
    g = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 2, 5, 6, 7, generator=g).to(DEVICE)
    target = labels((2, 6, 7), 5, 0.3, torch.int64, 0)
    options = {"temperature": temperature, "activation": "sigmoid"}
    with fastkd.use_backend(backend):
        terms = fastkd.kd_loss(student, teacher, reduction="none", **options)
        mean = fastkd.kd_loss(student, teacher, target=target, **options)
        volume = fastkd.kd_loss(student[:, :, None], teacher[:, :, None], reduction="none", **options)
        resized = fastkd.resized_kd_loss(student, teacher, size=(13, 9), reduction="none", **options)
        gradient = loss_and_gradient(
            lambda s, t: fastkd.kd_loss(s, t, reduction="sum", **options), student, teacher, backend
        )
    want = truth(student, teacher, temperature)
    torch.testing.assert_close(terms.double(), want, rtol=2e-6, atol=2e-6)
    assert torch.equal(volume[:, 0], terms)
    torch.testing.assert_close(mean.double(), want[target != 255].mean(), rtol=2e-6, atol=2e-6)
    want = truth(*(upsample(x, (13, 9), False) for x in (student, teacher)), temperature)
    torch.testing.assert_close(resized.double(), want, rtol=2e-6, atol=2e-6)
    s, t = (torch.sigmoid(x / temperature) for x in (student, teacher))
    torch.testing.assert_close(gradient[1], 1.7 * temperature * (s - t), rtol=1e-5, atol=1e-6)


@each_kernel
@given(problem=pairs(), temperature=st.sampled_from([1.0, 4.0]), weighted=st.booleans())
def test_within_budget(backend, problem, temperature, weighted):
    needs(backend, "kd_sigmoid")
    student, teacher = problem.tensors()
    shape = (student.shape[0], *student.shape[2:])
    weight = torch.rand(shape, device=DEVICE) if weighted else None
    target = labels(shape, student.shape[1], 0.3, torch.uint8 if student.shape[1] < 255 else torch.int32, problem.seed)

    def loss(s, t):
        return fastkd.kd_loss(s, t, target=target, weight=weight, temperature=temperature, activation="sigmoid")

    unit = temperature**2 * max(1.0, problem.scale) * student.shape[1] ** 0.5
    assert_within_budget(loss, student, teacher, backend, gradient_scale=temperature / student.numel(), loss_scale=unit)


@each_kernel
@given(problem=resized_problems, temperature=st.sampled_from([1.0, 4.0]), with_target=st.booleans())
def test_resized_within_budget(backend, problem, temperature, with_target):
    needs(backend, "resized_kd_sigmoid")
    student, teacher, target, pixel_weight, _ = build(problem)
    options = {"align_corners": problem["align_corners"], "reduction": problem["reduction"], "temperature": temperature}

    def loss(s, t):
        return fastkd.resized_kd_loss(
            s,
            t,
            size=tuple(target.shape[-2:]),
            target=target if with_target else None,
            pixel_weight=pixel_weight,
            activation="sigmoid",
            **options,
        )

    scale = scale_of(problem, target) * temperature**2
    assert_within_budget(loss, student, teacher, backend, loss_scale=scale, gradient_scale=scale)


def test_gradcheck_of_the_reference():
    student, teacher = torch.randn(2, 2, 3, 3, 4, dtype=torch.float64, device=DEVICE)
    with fastkd.use_backend("reference"):
        for loss in (
            lambda s: fastkd.kd_loss(s, teacher, temperature=2.0, activation="sigmoid"),
            lambda s: fastkd.resized_kd_loss(s, teacher, size=(5, 6), temperature=2.0, activation="sigmoid"),
        ):
            assert torch.autograd.gradcheck(loss, student.clone().requires_grad_())


@each_backend
@pytest.mark.parametrize("resized", [False, True])
def test_extremes(backend, resized):
    """+-1e4 and infinity on either side, a teacher with probability 1, and equal logits."""
    needs(backend, "resized_kd_sigmoid" if resized else "kd_sigmoid")
    big, inf = 1e4, torch.inf
    cases = [
        (big, -big, 1e4),
        (-big, big, 1e4),
        (big, big, 0),
        (-big, -big, 0),
        (0, big, 0.6931472),
        (0, -big, 0.6931472),
    ]
    cases += [(0, inf, 0.6931472), (0, -inf, 0.6931472), (5, 5, 0), (-3, inf, 3.0485873)]
    cases += [(inf, inf, 0), (-inf, -inf, 0), (inf, -inf, inf), (-inf, inf, inf)]
    cases += [(s, t, inf) for s in (inf, -inf) for t in (-3, 0, 2)] + [(inf, -big, inf), (-inf, big, inf)]
    s, t, want = (torch.tensor(column, dtype=torch.float32, device=DEVICE) for column in zip(*cases, strict=True))
    student, teacher = s.view(1, 1, 1, -1).requires_grad_(), t.view(1, 1, 1, -1)
    options = {"activation": "sigmoid", "reduction": "none"}
    with fastkd.use_backend(backend):
        if resized:
            loss = fastkd.resized_kd_loss(student, teacher, size=(1, len(cases)), **options)
        else:
            loss = fastkd.kd_loss(student, teacher, **options)
        (gradient,) = torch.autograd.grad(loss.sum(), student)
    torch.testing.assert_close(loss.flatten(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.flatten(), (torch.sigmoid(s) - torch.sigmoid(t)), rtol=1e-6, atol=1e-7)


def test_what_is_refused():
    s = torch.randn(1, 3, 2, 2)
    for loss in (
        lambda **o: fastkd.kd_loss(s, s, **o),
        lambda **o: fastkd.resized_kd_loss(s, s, size=(4, 4), **o),
        fastkd.KDLoss,
        fastkd.ResizedKDLoss,
    ):
        with pytest.raises(ValueError, match="activation: got 'tanh', expected one of 'softmax', 'sigmoid'"):
            loss(activation="tanh")

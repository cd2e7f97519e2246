"""Dice, and cross-entropy with Dice, at label resolution: the formulas in float64, torch's cross-entropy, edge
cases."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import fastkd
from fastkd import reference

from . import budget
from .support import DEVICE, INTERPRETER, LAYOUTS, assert_within_budget, each_backend, each_kernel, lay_out, needs
from .test_kd import labels

LARGEST = 4 if INTERPRETER else 24
CLASSES = [1, 2, 5] if INTERPRETER else [1, 2, 5, 19, 70]
OPTIONS = {
    "batch": st.booleans(),
    "smooth": st.sampled_from([1.0, 1e-5, 0.0]),
    "square": st.booleans(),
    "background": st.booleans(),
    "present": st.booleans(),
    "align_corners": st.booleans(),
}
problems = st.fixed_dictionaries(
    {
        "shape": st.tuples(
            st.integers(1, 3), st.sampled_from(CLASSES), st.integers(1, LARGEST // 2), st.integers(1, LARGEST)
        ),
        "size": st.tuples(st.integers(1, LARGEST), st.integers(1, 2 * LARGEST)),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
        "layout": st.sampled_from(LAYOUTS),
        "label": st.sampled_from([torch.uint8, torch.int32, torch.int64]),
        "weights": st.booleans(),
        "seed": st.integers(0, 2**16),
    }
)


def build(problem):
    n, c, h, w = problem["shape"]
    g = torch.Generator().manual_seed(problem["seed"])
    logits = lay_out((3 * torch.randn(n, c, h, w, generator=g)).to(DEVICE, problem["dtype"]), problem["layout"])
    target = labels((n, *problem["size"]), max(c, 2), 0.3, problem["label"], problem["seed"])
    class_weight = torch.rand(c, generator=g).to(DEVICE) + 0.5 if problem["weights"] else None
    return logits, target, class_weight


def probabilities(logits, target, align_corners):
    """Of all classes at label size in float64 (two for one logit), the one-hot labels, and the map of valid pixels."""
    x = F.interpolate(logits.double(), target.shape[-2:], mode="bilinear", align_corners=align_corners)
    if x.shape[1] == 1:
        x = torch.cat([torch.zeros_like(x), x], 1)
    valid = target != 255
    onehot = F.one_hot(torch.where(valid, target, 0).long(), x.shape[1]).movedim(3, 1) * valid[:, None]
    return x, F.softmax(x, 1) * valid[:, None], onehot.double()


def dice(logits, target, *, batch=True, smooth=1.0, square=False, background=True, present=False, class_weight=None,
         align_corners=False, reduction="mean"):  # fmt: skip
    """The formula as written, class by class, in float64."""
    _, p, onehot = probabilities(logits, target, align_corners)
    one = logits.shape[1] == 1
    terms = p.new_zeros(1 if batch else len(p), 1 if one else p.shape[1])
    total = p.new_zeros(())
    weights = 0.0
    for c in range(1 if one else 0, p.shape[1]):
        for i, images in enumerate([slice(None)] if batch else [slice(n, n + 1) for n in range(len(p))]):
            q, y = p[images, c], onehot[images, c]
            if (not background and c == 0) or (present and not y.any()):
                continue
            below = (q.square() if square else q).sum() + y.sum() + smooth
            term = 1 - (2 * (q * y).sum() + smooth) / below if below > 0 else 0 * q.sum()
            at = 0 if one else c
            weight = 1.0 if class_weight is None else class_weight[at].double()
            terms[i, at] = (term * weight).detach()
            total, weights = total + term * weight, weights + weight
    if reduction == "none":
        return terms[0] if batch else terms
    return total / weights if reduction == "mean" and weights > 0 else total


@each_backend
@given(problem=problems, reduction=st.sampled_from(["mean", "sum", "none"]), options=st.fixed_dictionaries(OPTIONS))
def test_dice_is_the_formula(backend, problem, reduction, options):
    needs(backend, "resized_dice")
    logits, target, class_weight = build(problem)
    options |= {"class_weight": class_weight, "reduction": reduction}
    with fastkd.use_backend(backend):
        got = fastkd.resized_dice_loss(logits, target, **options)
    want = dice(logits, target, **options)
    assert got.dtype == budget.accumulator(logits)
    u = 1e-12 if got.dtype == torch.float64 else 2e-6
    torch.testing.assert_close(got.double(), want, rtol=u, atol=u)


@each_backend
@given(problem=problems, smoothing=st.sampled_from([0.0, 0.1]), options=st.fixed_dictionaries(OPTIONS))
def test_both_are_the_two_losses(backend, problem, smoothing, options):
    """With one logit, the cross-entropy is torch's binary one."""
    needs(backend, "resized_dice")
    logits, target, class_weight = build(problem)
    one = logits.shape[1] == 1
    class_weight = None if one else class_weight
    with fastkd.use_backend(backend):
        got = fastkd.resized_cross_entropy_dice_loss(
            logits,
            target,
            ce_weight=0.5,
            dice_weight=2.0,
            class_weight=class_weight,
            label_smoothing=smoothing,
            **options,
        )
    x, _, _ = probabilities(logits, target, options["align_corners"])
    want_ce = x.new_zeros(())
    if (target != 255).any():
        weight = None if class_weight is None else class_weight.double()
        want_ce = F.cross_entropy(x, target.long(), weight, ignore_index=255, label_smoothing=smoothing)
        if one and smoothing == 0:
            valid = target != 255
            binary = F.binary_cross_entropy_with_logits(x[:, 1][valid], target[valid].double())
            torch.testing.assert_close(want_ce, binary)
    want_dice = dice(logits, target, class_weight=class_weight, **options)
    u = 1e-12 if got.loss.dtype == torch.float64 else 2e-6
    torch.testing.assert_close(got.ce.double(), want_ce, rtol=u, atol=u)
    torch.testing.assert_close(got.dice.double(), want_dice, rtol=u, atol=u)
    torch.testing.assert_close(got.loss.double(), 0.5 * want_ce + 2 * want_dice, rtol=2 * u, atol=2 * u)


@each_kernel
@given(problem=problems, smoothing=st.sampled_from([0.0, 0.1]), options=st.fixed_dictionaries(OPTIONS))
def test_gradient_within_budget(backend, problem, smoothing, options):
    needs(backend, "resized_dice")
    logits, target, class_weight = build(problem)
    class_weight = None if logits.shape[1] == 1 else class_weight

    def both(s, t):
        return fastkd.resized_cross_entropy_dice_loss(
            s, target, class_weight=class_weight, label_smoothing=smoothing, **options
        ).loss

    def alone(s, t):
        return fastkd.resized_dice_loss(s, target, class_weight=class_weight, **options)

    for loss in (both,) if INTERPRETER else (both, alone):
        assert_within_budget(loss, logits, logits.clone(), backend, loss_scale=12.0)


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("classes", [1, 4])
def test_gradcheck_of_the_reference(square, batch, classes):
    logits = torch.randn(2, classes, 2, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    target = labels((2, 5, 4), max(classes, 2), 0.3, torch.int64, 1)

    def loss(x):
        out = fastkd.resized_cross_entropy_dice_loss(x, target, label_smoothing=0.1, square=square, batch=batch)
        return out.loss + fastkd.resized_dice_loss(x, target, square=square, batch=batch)

    with fastkd.use_backend("reference"):
        assert torch.autograd.gradcheck(loss, logits)


@each_backend
@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_all_ignored(backend, smooth):
    needs(backend, "resized_dice")
    logits = torch.randn(2, 3, 4, 5, device=DEVICE, requires_grad=True)
    target = torch.full((2, 8, 10), 255, device=DEVICE)
    with fastkd.use_backend(backend):
        for present in (False, True):
            out = fastkd.resized_cross_entropy_dice_loss(logits, target, smooth=smooth, present=present)
            assert (out.loss, out.ce, out.dice) == (0, 0, 0)
            (gradient,) = torch.autograd.grad(out.loss, logits)
            assert not gradient.any()


@each_backend
@pytest.mark.parametrize("present", [False, True])
def test_one_class_absent_and_one_class_alone(backend, present):
    """By hand: at ratio 1 and with equal logits every p is 1/3."""
    needs(backend, "resized_dice")
    logits = torch.zeros(1, 3, 2, 4, device=DEVICE)
    target = torch.tensor([[[0, 0, 0, 0], [1, 1, 255, 255]]], device=DEVICE)
    with fastkd.use_backend(backend):
        terms = fastkd.resized_dice_loss(logits, target, smooth=0, present=present, reduction="none")
        mean = fastkd.resized_dice_loss(logits, target, smooth=0, present=present)
    want = [1 - (8 / 3) / (2 + 4), 1 - (4 / 3) / (2 + 2), 0.0 if present else 1.0]
    torch.testing.assert_close(terms.tolist(), want)
    torch.testing.assert_close(mean.item(), sum(want) / (2 if present else 3))
    alone = torch.full((1, 2, 4), 2, device=DEVICE)
    with fastkd.use_backend(backend):
        got = fastkd.resized_dice_loss(logits, alone, smooth=0, present=True)
        foreground = fastkd.resized_dice_loss(logits, alone * 0, smooth=0, present=True, background=False)
    torch.testing.assert_close(got.item(), 1 - (16 / 3) / (8 / 3 + 8))
    assert foreground == 0


@each_backend
def test_nothing_at_all(backend):
    needs(backend, "resized_dice")
    for shape in ((0, 3, 2, 2), (2, 3, 0, 2)):
        logits = torch.zeros(shape, device=DEVICE, requires_grad=True)
        target = torch.zeros(shape[0], 4, 4, dtype=torch.uint8, device=DEVICE)
        with fastkd.use_backend(backend):
            for batch in (False, True):
                out = fastkd.resized_cross_entropy_dice_loss(logits, target, smooth=0, batch=batch)
                out.loss.backward()
        assert out.loss == 0
        assert logits.grad.shape == shape


@each_kernel
@pytest.mark.skipif(INTERPRETER or "emulat" in str(fastkd.backend_info()), reason="minutes there")
def test_a_large_image_keeps_its_digits(backend):
    """4096x8192 equal terms: an fp32 sum would be off by 1e-5 or more."""
    needs(backend, "resized_dice")
    logits = torch.tensor([0.3, -0.4, 1.1], device=DEVICE).view(1, 3, 1, 1)
    target = torch.zeros(1, 4096, 8192, dtype=torch.uint8, device=DEVICE)
    with fastkd.use_backend(backend):
        out = fastkd.resized_cross_entropy_dice_loss(logits, target)
    log_p = F.log_softmax(logits.double(), 1).flatten()
    p, m = log_p.exp(), target.numel()
    want = (1 - (2 * m * p[0] + 1) / (m * p[0] + m + 1) + 2 - 1 / (m * p[1] + 1) - 1 / (m * p[2] + 1)) / 3
    torch.testing.assert_close(out.dice.item(), want.item(), rtol=1e-6, atol=0)
    torch.testing.assert_close(out.ce.item(), -log_p[0].item(), rtol=1e-6, atol=0)


def test_what_is_refused():
    logits, target = torch.randn(1, 3, 2, 2), torch.zeros(1, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="smooth: got -1"):
        fastkd.resized_dice_loss(logits, target, smooth=-1)
    with pytest.raises(ValueError, match="reduction: got 'mean_all'"):
        fastkd.resized_dice_loss(logits, target, reduction="mean_all")
    with pytest.raises(ValueError, match="label_smoothing: got 1, expected a number >= 0 and < 1"):
        fastkd.resized_cross_entropy_dice_loss(logits, target, label_smoothing=1)
    with pytest.raises(ValueError, match="class_weight: got a weight for one logit"):
        fastkd.resized_cross_entropy_dice_loss(logits[:, :1], target, class_weight=torch.ones(1))
    with pytest.raises(IndexError, match="got label 2, expected 0 to 1"):
        fastkd.resized_dice_loss(logits[:, :1], target + 2)


@each_kernel
def test_sums_are_the_references(backend):
    """Each column separately: the functions' combination could hide a wrong one."""
    needs(backend, "resized_dice")
    from fastkd.ops import operator

    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 3, 7, generator=g).to(DEVICE)
    target = labels((2, 9, 20), 5, 0.3, torch.uint8, 2)
    for square in (False, True):
        for columns in (3, 4, 5):
            got, _ = operator(backend, "resized_dice_forward")(logits, target, 255, False, square, columns, "none", 1.0)
            resized = reference.resize(logits.double(), (9, 20), False)
            want = reference.dice_sums(resized, target, 255, square, columns)
            assert got.dtype == torch.float64
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)

"""The kernels of the losses at label resolution: error budgets, the transposed interpolation, extremes, repetition."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import fastkd
from fastkd._operators import Labels, cross_entropy
from fastkd.functional import PIXEL_REDUCTIONS

from .support import DEVICE, DTYPES, INTERPRETER, LAYOUTS, assert_within_budget, each_kernel, lay_out, loss_and_gradient
from .test_kd import labels
from .test_resized import each_convention, upsample

CLASSES = [1, 2, 5, 9] if INTERPRETER else [1, 2, 5, 19, 70, 150]
LARGEST = 4 if INTERPRETER else 40

problems = st.fixed_dictionaries(
    {
        "shape": st.tuples(
            st.integers(1, 1 if INTERPRETER else 3),
            st.sampled_from(CLASSES),
            st.integers(1, LARGEST // 2),
            st.integers(1, LARGEST),
        ),
        "size": st.tuples(st.integers(1, LARGEST), st.integers(1, 2 * LARGEST)),
        "same_width": st.booleans(),
        "dtype": st.sampled_from(DTYPES),
        "teacher_dtype": st.sampled_from(DTYPES),
        "layout": st.sampled_from(LAYOUTS),
        "scale": st.sampled_from([1.0, 10.0]),
        "align_corners": st.booleans(),
        "label": st.sampled_from([torch.uint8, torch.int32, torch.int64]),
        "reduction": st.sampled_from(PIXEL_REDUCTIONS),
        "weights": st.booleans(),
        "weight_size": st.tuples(st.integers(1, 30), st.integers(1, 30)),
        "teacher_size": st.one_of(st.none(), st.tuples(st.integers(1, 20), st.integers(1, 40))),
        "seed": st.integers(0, 2**16),
    }
)


def build(problem):
    n, c, h, w = problem["shape"]
    height, width = problem["size"]
    width = w if problem["same_width"] else width
    g = torch.Generator().manual_seed(problem["seed"])
    student = problem["scale"] * torch.randn(n, c, h, w, generator=g, dtype=torch.float64)
    teacher = problem["scale"] * torch.randn(
        n, c, *(problem["teacher_size"] or (h, w)), generator=g, dtype=torch.float64
    )
    student = lay_out(student.to(DEVICE, problem["dtype"]), problem["layout"])
    teacher = teacher.to(DEVICE, problem["teacher_dtype"])
    target = labels((n, height, width), c, 0.3, problem["label"], problem["seed"])
    pixel_weight = torch.rand(n, *problem["weight_size"], generator=g).to(DEVICE) if problem["weights"] else None
    class_weight = torch.rand(c, generator=g).to(DEVICE) + 0.5 if problem["weights"] else None
    return student, teacher, target, pixel_weight, class_weight


def scale_of(problem, target) -> float:
    """A loss is a difference of logits of this scale; a sum has one per pixel."""
    pixels = {"sum": target.numel(), "batchmean": target[0].numel()}.get(problem["reduction"], 1)
    return 4 * problem["scale"] * pixels


@pytest.mark.promise("budget")
@each_kernel
@given(problem=problems)
def test_cross_entropy_within_budget(backend, problem):
    student, _, target, pixel_weight, class_weight = build(problem)
    options = {"align_corners": problem["align_corners"], "reduction": problem["reduction"]}

    def loss(s, t):
        return fastkd.resized_cross_entropy(s, target, pixel_weight=pixel_weight, class_weight=class_weight, **options)

    scale = scale_of(problem, target)
    assert_within_budget(loss, student, student.clone(), backend, loss_scale=scale, gradient_scale=scale)


@pytest.mark.promise("budget")
@each_kernel
@given(problem=problems, temperature=st.sampled_from([1.0, 4.0]), with_target=st.booleans())
def test_kd_within_budget(backend, problem, temperature, with_target):
    student, teacher, target, pixel_weight, _ = build(problem)
    options = {"align_corners": problem["align_corners"], "reduction": problem["reduction"], "temperature": temperature}

    def loss(s, t):
        return fastkd.resized_kd_loss(
            s,
            t,
            size=tuple(target.shape[-2:]),
            target=target if with_target else None,
            pixel_weight=pixel_weight,
            **options,
        )

    scale = scale_of(problem, target) * temperature**2
    assert_within_budget(loss, student, teacher, backend, loss_scale=scale, gradient_scale=scale)


@each_kernel
@each_convention
@pytest.mark.parametrize("size", [(16, 50), (4, 6), (5, 2), (1, 1), (9, 7)])
def test_gradient_is_the_transpose_of_the_interpolation(backend, align_corners, size):
    """<gradient, v> at logit size = <gradient at label size, interpolated v>, for any v."""
    logits = torch.randn(2, 7, 4, 7, device=DEVICE, dtype=torch.float64, requires_grad=True)
    target = labels((2, *size), 7, 0.2, torch.int64, 1)
    with fastkd.use_backend(backend):
        loss = fastkd.resized_cross_entropy(logits, target, align_corners=align_corners, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, logits)
    resized = upsample(logits.detach(), size, align_corners)
    valid = target != 255
    onehot = F.one_hot(torch.where(valid, target, 0), 7).movedim(3, 1)
    at_labels = (F.softmax(resized, 1) - onehot) * valid[:, None]
    v = torch.randn_like(logits)
    torch.testing.assert_close(
        (gradient * v).sum(), (at_labels * upsample(v, size, align_corners)).sum(), rtol=1e-10, atol=1e-10
    )


@each_kernel
@pytest.mark.parametrize("classes", [2, 19] if INTERPRETER else [2, 19, 300])
def test_neighbours_that_disagree_by_hundreds(backend, classes):
    """Between two pixels confident of different classes, the largest interpolated logit is far below both."""
    size = (4, 24) if INTERPRETER else (16, 48)
    student = torch.zeros(1, classes, 2, 6, device=DEVICE)
    student[:, 0, :, ::2] = 400.0
    student[:, 1, :, 1::2] = 400.0
    teacher = student.flip(3)
    target = labels((1, *size), classes, 0.2, torch.int64, 3)
    assert_within_budget(
        lambda s, t: fastkd.resized_cross_entropy(s, target), student, teacher, backend, loss_scale=400.0
    )
    assert_within_budget(
        lambda s, t: fastkd.resized_kd_loss(s, t, size=size), student, teacher, backend, loss_scale=400.0
    )


@pytest.mark.promise("ignored-pixels")
@each_kernel
@pytest.mark.parametrize(("size", "first"), [((2, 80), 40), ((1, 20), 15)])
def test_an_ignored_pixel_may_hold_anything(backend, size, first):
    """Logits that affect only ignored pixels may be NaN or infinite: loss and gradient of the others are unchanged."""
    student, teacher = torch.randn(2, 1, 5, 1, 20, device=DEVICE)
    target = labels((1, *size), 5, 0.1, torch.uint8, 2)
    target[..., first:] = 255
    for bad in (torch.nan, torch.inf, -torch.inf):
        results = []
        for value in (0.0, bad):
            s, t = student.clone(), teacher.clone()
            s[..., 15:], t[..., 15:] = value, value
            s.requires_grad_()
            with fastkd.use_backend(backend):
                loss = fastkd.resized_cross_entropy(s, target) + fastkd.resized_kd_loss(s, t, size=size, target=target)
            (gradient,) = torch.autograd.grad(loss, s)
            results.append((loss.detach(), gradient[..., :12]))
            assert gradient.isfinite().all()
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


@pytest.mark.promise("nan")
@each_kernel
def test_nan_propagates(backend):
    logits = torch.randn(1, 4, 4, 8, device=DEVICE)
    logits[0, 2, 2, 3] = torch.nan
    target = torch.zeros(1, 16, 32, dtype=torch.int64, device=DEVICE)
    with fastkd.use_backend(backend):
        got = fastkd.resized_cross_entropy(logits, target, reduction="none")
    want = upsample(logits, (16, 32), False)[:, 2].isnan()
    assert torch.equal(got.isnan(), want)


@pytest.mark.promise("nan")
@each_kernel
@pytest.mark.parametrize("size", [(3, 4), (6, 4), (3, 8)])
def test_nan_crosses_no_axis_without_interpolation(backend, size):
    """0 * NaN is NaN: along an axis that is not resized, the gradient takes nothing from a neighbour of weight 0."""
    student, teacher = torch.randn(2, 1, 2, 3, 4, device=DEVICE)
    student[0, 1, 1, 1] = torch.nan
    target = torch.zeros(1, *size, dtype=torch.int64, device=DEVICE)
    for loss in (
        lambda s, t: fastkd.resized_cross_entropy(s, target),
        lambda s, t: fastkd.resized_kd_loss(s, t, size=size, activation="sigmoid"),
    ):
        got, want = (loss_and_gradient(loss, student, teacher, b)[1] for b in (backend, "reference"))
        assert got[want.isfinite()].isfinite().all()
        assert not got.isfinite().all()


@pytest.mark.promise("masked-classes")
@each_kernel
def test_masked_classes_at_ratio_one(backend):
    """Without interpolation, -inf is a class of probability 0."""
    logits = torch.randn(1, 5, 4, 9, device=DEVICE)
    logits[:, 3] = -torch.inf
    target = labels((1, 4, 9), 3, 0.2, torch.int64, 1)
    with fastkd.use_backend(backend):
        got = fastkd.resized_cross_entropy(logits, target)
        torch.testing.assert_close(got, F.cross_entropy(logits, target, ignore_index=255))
        student = torch.randn_like(logits)
        kd = fastkd.resized_kd_loss(student, logits, size=(4, 9))
        torch.testing.assert_close(kd, fastkd.kd_loss(student, logits))
        # The same if it is the label, and masked only in the neighbouring columns and rows.
        logits[0, 3, 1::2, 1::2] = 1.0
        target[0, 1::2, 1::2] = 3
        got = fastkd.resized_cross_entropy(logits, target)
        torch.testing.assert_close(got, F.cross_entropy(logits, target, ignore_index=255))
        if backend != "cuda":  # no RDD kernel
            hard = fastkd.difficulty_mask(logits, student, target, confidence="label", threshold=1.0, select="student")
            assert torch.equal(hard, target != 255)


@each_kernel
@pytest.mark.parametrize("turned", [False, True])
def test_beside_a_huge_logit(backend, turned):
    """Class 0 goes from -3e7 to 1e8. Halfway the other classes determine the result, far below the bound: no
    precision is lost."""
    teacher, student = torch.randn(2, 1, 5, 3, 3, device=DEVICE)
    teacher[0, 0] = torch.tensor([-3e7, 1e8, 1e8], device=DEVICE).view((1, 3) if turned else (3, 1))
    target = labels((1, 7, 7), 5, 0.0, torch.int64, 1)
    for loss in (
        lambda s, t: fastkd.resized_kd_loss(s, t, size=(7, 7), reduction="none"),
        lambda s, t: fastkd.resized_kd_loss(s, t[..., :2], size=(7, 7), reduction="none"),
        lambda s, t: fastkd.resized_kd_loss(torch.cat([t[:, :1], s[:, 1:]], 1), t, size=(7, 7), reduction="none"),
        lambda s, t: fastkd.resized_cross_entropy(t, target.clamp(min=1), reduction="none"),
    ):
        with fastkd.use_backend(backend):
            got = loss(student, teacher)
        with fastkd.use_backend("reference"):
            want = loss(student.double(), teacher.double())
        sane = want < 1e3  # where class 0 does not dominate
        assert sane.sum() >= 7
        torch.testing.assert_close(got[sane].double(), want[sane], rtol=1e-4, atol=1e-4)


@each_kernel
@pytest.mark.parametrize(("size", "align_corners"), [((2, 5), True), ((5, 11), False)])
def test_a_masked_pixel_is_an_ignored_one(backend, size, align_corners):
    """The mask of RDD's TSE and the label ignore_index exclude the same pixels, bitwise."""
    if backend == "cuda":
        pytest.skip("CUDA C++ takes no mask")
    logits = torch.randn(2, 3, 2, 5, device=DEVICE, requires_grad=True)
    target, mask = labels((2, *size), 3, 0.2, torch.uint8, 1), torch.rand(2, *size, device=DEVICE) < 0.5
    class_weight, pixel_weight = torch.rand(3, device=DEVICE), torch.rand(2, *size, device=DEVICE)
    results = []
    with fastkd.use_backend(backend):
        for y, m in ((target, mask), (torch.where(mask, target, 255), None)):
            loss, weight = cross_entropy(
                logits, Labels(y, class_weight, 255, align_corners), pixel_weight, m, "mean", 1.0
            )
            results.append((loss.detach(), weight, *torch.autograd.grad(loss, logits)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][2].any()


@pytest.mark.promise("threads")
@each_kernel
@pytest.mark.skipif(INTERPRETER, reason="the interpreter has one thread")
def test_same_bits_for_any_number_of_threads(backend):
    student, teacher = torch.randn(2, 3, 19, 16, 20, device=DEVICE)
    target = labels((3, 70, 90), 19, 0.2, torch.uint8, 1)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            s = student.clone().requires_grad_()
            with fastkd.use_backend(backend):
                loss = fastkd.resized_cross_entropy(s, target) + fastkd.resized_kd_loss(s, teacher, size=(70, 90))
            results.append((loss.detach(), *torch.autograd.grad(loss, s)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.promise("backward-again")
@each_kernel
def test_backward_twice(backend):
    """A second backward over the same graph recomputes the gradient; double backward is refused."""
    student, teacher = torch.randn(2, 1, 4, 2, 6, device=DEVICE)
    target = labels((1, 4, 12), 4, 0.3, torch.int64, 4)
    losses = [
        lambda s: fastkd.resized_cross_entropy(s, target),
        lambda s: fastkd.resized_kd_loss(s, teacher, size=(4, 12)),
    ]
    if backend != "cuda":  # no RDD kernel
        losses.append(lambda s: fastkd.rdd_loss(s, teacher, target, stage="tfe", teacher_aux=teacher.flip(1)).loss)
    for loss in losses:
        s = student.clone().requires_grad_()
        with fastkd.use_backend(backend):
            value = loss(s)
            (once,) = torch.autograd.grad(value, s, retain_graph=True)
            kept = once.clone()
            (twice,) = torch.autograd.grad(value, s, torch.tensor(3.0, device=DEVICE), retain_graph=True)
            assert torch.equal(once, kept)
            torch.testing.assert_close(twice, 3 * once)
            with pytest.raises(RuntimeError, match="double backward"):
                torch.autograd.grad(value, s, create_graph=True)


@each_kernel
@pytest.mark.skipif(INTERPRETER, reason="one program would take 65 536 label pixels in turn")
def test_half_precision_does_not_overflow(backend):
    """The gradient of a sum over 65 536 label pixels of one logit overflows fp16; that of the mean does not."""
    logits = torch.zeros(1, 2, 1, 1, device=DEVICE, dtype=torch.float16, requires_grad=True)
    target = torch.zeros(1, 512, 512, dtype=torch.uint8, device=DEVICE)
    with fastkd.use_backend(backend):
        fastkd.resized_cross_entropy(logits, target).backward()
    torch.testing.assert_close(logits.grad.flatten().tolist(), [-0.5, 0.5])

"""Wrong arguments raise the documented errors; dtypes, teachers and layouts are handled as documented."""

import inspect

import pytest
import torch

import fastkd
from fastkd.functional import PIXEL_REDUCTIONS

from . import budget
from .support import DEVICE, LAYOUTS, each_backend, each_kernel, lay_out, loss_and_gradient

S = torch.randn(2, 4, 6, 6)
T = torch.randn(2, 4, 6, 6)
Y = torch.randint(0, 4, (2, 12, 12))

PAIRWISE = {
    "nfd_loss": lambda s, t: fastkd.nfd_loss(s, t),
    "cwd_loss": lambda s, t: fastkd.cwd_loss(s, t),
    "kd_loss": lambda s, t: fastkd.kd_loss(s, t),
    "resized_kd_loss": lambda s, t: fastkd.resized_kd_loss(s, t, size=(12, 12)),
    "difficulty_mask": lambda s, t: fastkd.difficulty_mask(s, t, Y),
    "rdd_loss": lambda s, t: fastkd.rdd_loss(s, t, Y, stage="tse"),
}
each_loss = pytest.mark.parametrize("name", PAIRWISE)

SIGNATURES = {
    "nfd_loss": "student, teacher, *, dims='hw', eps=1e-05, reduction='mean'",
    "kd_loss": "student, teacher, *, temperature=1.0, target=None, weight=None, ignore_index=255, reduction='mean', "
    "activation='softmax'",
    "cwd_loss": "student, teacher, *, temperature=4.0, reduction='mean'",
    "resized_cross_entropy": "logits, target, *, class_weight=None, pixel_weight=None, ignore_index=255, "
    "align_corners=False, reduction='mean', label_smoothing=0.0, focal_gamma=0.0",
    "resized_kd_loss": "student, teacher, *, size, temperature=1.0, target=None, pixel_weight=None, ignore_index=255, "
    "align_corners=False, reduction='mean', activation='softmax'",
    "resized_dice_loss": "logits, target, *, batch=True, smooth=1.0, square=False, background=True, present=False, "
    "class_weight=None, ignore_index=255, align_corners=False, reduction='mean'",
    "resized_cross_entropy_dice_loss": "logits, target, *, ce_weight=1.0, dice_weight=1.0, class_weight=None, "
    "label_smoothing=0.0, batch=True, smooth=1.0, square=False, background=True, present=False, ignore_index=255, "
    "align_corners=False",
    "resized_binary_cross_entropy": "logits, target, *, pos_weight=None, pixel_weight=None, ignore_index=255, "
    "align_corners=False, reduction='mean'",
    "resized_ohem_cross_entropy": "logits, target, *, threshold=0.7, min_kept=100000, class_weight=None, ignore_index=255, "
    "align_corners=False, reduction='mean'",
    "teacher_confidence": "main, aux, *, direction='aux_main'",
    "difficulty_mask": "student, teacher, target, *, threshold=0.7, min_kept=0, confidence='max', select='xor', "
    "ignore_index=255, align_corners=False",
    "rdd_loss": "student, teacher, target, *, stage, teacher_aux=None, student_aux=None, preset='paper', kd_weight=1.0, "
    "temperature=1.0, threshold=None, min_kept=None, select='xor', class_weight=None, aux_weight=None, "
    "ignore_index=255, align_corners=None, blend=None",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_names_and_defaults(name):
    """Defaults are part of the API."""
    parameters = inspect.signature(getattr(fastkd, name)).parameters.values()
    bare = inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters])
    assert str(bare) == f"({SIGNATURES[name]})"


@pytest.mark.promise("value-error")
@pytest.mark.promise("type-error")
@each_loss
def test_wrong_tensors(name):
    loss = PAIRWISE[name]
    with pytest.raises(ValueError, match=r"student: got shape \(6, 6\), expected (4|3 to 5) dimensions"):
        loss(S[0, 0], T)
    with pytest.raises(TypeError, match=r"teacher: got dtype torch.int64, expected float32"):
        loss(S, T.long())
    with pytest.raises(TypeError, match=r"student: got list, expected a torch.Tensor"):
        loss([1.0], T)
    with pytest.raises(ValueError, match=r"teacher: got shape \(1, 4, 6, 6\), expected the same N as student"):
        loss(S, T[:1])
    with pytest.raises(
        ValueError, match=r"teacher: got shape \(2, 3, 6, 6\), expected the same C as student .* adapter"
    ):
        loss(S, T[:, :3])
    with pytest.raises(ValueError, match=r"teacher: is on meta, expected cpu"):
        loss(S, T.to("meta"))
    with pytest.raises(ValueError, match=r"teacher: requires grad, .* teacher.detach\(\)"):
        loss(S, T.clone().requires_grad_())


@pytest.mark.promise("value-error")
@pytest.mark.parametrize("name", ["nfd_loss", "cwd_loss", "kd_loss"])
def test_wrong_size(name):
    with pytest.raises(ValueError, match=r"teacher: got shape \(2, 4, 5, 6\), expected the same H"):
        PAIRWISE[name](S, T[:, :, :5])
    with pytest.raises(ValueError, match=r"expected the same W .* resize"):
        PAIRWISE[name](S, T[..., :5])


@pytest.mark.promise("value-error")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fastkd.nfd_loss(S, T, dims="h"), r"dims: got 'h', expected one of 'hw', 'nhw', 'c', 'chw'"),
        (lambda: fastkd.nfd_loss(S, T, eps=-1.0), r"eps: got -1.0, expected a number >= 0"),
        (lambda: fastkd.nfd_loss(S, T, eps=float("nan")), r"eps: got nan"),
        (lambda: fastkd.nfd_loss(S, T, reduction="mean_all"), r"reduction: got 'mean_all'"),
        (lambda: fastkd.kd_loss(S, T, reduction="avg"), r"reduction: got 'avg', .* 'batchmean'"),
        (lambda: fastkd.kd_loss(S, T, temperature=0), r"temperature: got 0, expected a number > 0"),
        (lambda: fastkd.cwd_loss(S, T, temperature=-1), r"temperature: got -1"),
        (lambda: fastkd.resized_kd_loss(S, T, size=(1, 2, 3)), r"size: got \(1, 2, 3\), expected \(height, width\)"),
        (lambda: fastkd.kd_loss(S, T, target=Y), r"target: got shape \(2, 12, 12\), expected \(2, 6, 6\)"),
        (lambda: fastkd.kd_loss(S, T, weight=torch.ones(2, 6)), r"weight: got shape \(2, 6\), expected \(2, 6, 6\)"),
        (lambda: fastkd.resized_cross_entropy(S, Y[:1]), r"target: got shape \(1, 12, 12\), expected \(2, H, W\)"),
        (
            lambda: fastkd.resized_cross_entropy(S, Y, class_weight=torch.ones(3)),
            r"class_weight: got shape \(3,\), .*\(4,\)",
        ),
        (lambda: fastkd.resized_cross_entropy(S, Y, pixel_weight=torch.ones(1, 3, 3)), r"pixel_weight: got shape"),
        (lambda: fastkd.difficulty_mask(S, T, Y, min_kept=-1), r"min_kept: got -1, expected a number >= 0"),
        (
            lambda: fastkd.difficulty_mask(S, T, Y, confidence="x"),
            r"confidence: got 'x', expected one of 'max', 'label'",
        ),
        (lambda: fastkd.difficulty_mask(S, T, Y, select="nor"), r"select: got 'nor'"),
        (lambda: fastkd.teacher_confidence(S, T, direction="x"), r"direction: got 'x', .* 'aux_main', 'main_aux'"),
        (lambda: fastkd.teacher_confidence(S, T[:, :, :3]), r"aux: got shape .* same H as main"),
        (lambda: fastkd.rdd_loss(S, T, Y, stage="x"), r"stage: got 'x', expected one of 'tfe', 'tse'"),
        (lambda: fastkd.rdd_loss(S, T, Y, stage="tse", preset="x"), r"preset: got 'x', .* 'paper', 'official'"),
        (lambda: fastkd.RDDLoss(0), r"total_steps: got 0"),
        (lambda: fastkd.RDDLoss(10, tfe_steps=11), r"tfe_steps: got 11, expected a number >= 0 and <= 10"),
        (lambda: fastkd.NFDLoss(4), r"NFDLoss: got in_channels=4, teacher_channels=None"),
        (lambda: fastkd.ResizedKDLoss()(S, T), r"neither size nor target"),
        (lambda: fastkd.use_backend("gpu"), r"use_backend: got 'gpu', expected one of auto, reference"),
    ],
)
def test_wrong_options(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.promise("index-error")
@pytest.mark.parametrize("bad", [4, 99, -1])
def test_label_out_of_range(bad):
    target = Y.clone()
    target[1, 3, 3], target[0, 0, 0] = bad, 255
    for loss in (
        lambda: fastkd.resized_cross_entropy(S, target),
        lambda: fastkd.resized_kd_loss(S, T, size=(12, 12), target=target),
        lambda: fastkd.difficulty_mask(S, T, target),
        lambda: fastkd.rdd_loss(S, T, target, stage="tse"),
        lambda: fastkd.kd_loss(S, T, target=target[:, :6, :6]),
    ):
        with pytest.raises(IndexError, match=rf"target: got label {bad}, expected 0 to 3"):
            loss()


@pytest.mark.promise("type-error")
def test_label_dtype():
    with pytest.raises(TypeError, match=r"target: got dtype torch.float32, expected uint8, int32 or int64"):
        fastkd.resized_cross_entropy(S, Y.float())
    many = torch.randn(1, 300, 2, 2)
    labels = torch.full((1, 4, 4), 255, dtype=torch.uint8)
    assert fastkd.resized_cross_entropy(many, labels, ignore_index=-1) > 0  # 255 is a class here
    assert fastkd.resized_cross_entropy(many, labels) == 0


@each_backend
@pytest.mark.parametrize("name", ["nfd_loss", "cwd_loss", "kd_loss"])
class TestTeacherAndLayout:
    def test_teacher_from_inference_mode(self, backend, name):
        with torch.inference_mode():
            teacher = torch.randn(2, 4, 6, 6).to(DEVICE) + 0
        value, gradient = loss_and_gradient(PAIRWISE[name], S.to(DEVICE), teacher, backend)
        again = loss_and_gradient(PAIRWISE[name], S.to(DEVICE), teacher.clone(), backend)
        assert torch.equal(value, again[0])
        assert torch.equal(gradient, again[1])

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layout_changes_nothing_but_rounding(self, backend, name, layout):
        student, teacher = S.to(DEVICE), T.to(DEVICE)
        if layout == "expanded":
            student, teacher = student[:1].expand_as(student), teacher[:1].expand_as(teacher)
        plain = loss_and_gradient(PAIRWISE[name], student.contiguous(), teacher.contiguous(), backend)
        moved = loss_and_gradient(PAIRWISE[name], lay_out(student, layout), lay_out(teacher, layout), backend)
        for a, b in zip(plain, moved, strict=True):
            budget.assert_close(a, b)

    @pytest.mark.promise("inputs")
    def test_inputs_are_left_alone(self, backend, name):
        student, teacher = S.to(DEVICE), T.to(DEVICE)
        before = student.clone(), teacher.clone()
        loss_and_gradient(PAIRWISE[name], student, teacher, backend)
        assert torch.equal(student, before[0])
        assert torch.equal(teacher, before[1])

    @pytest.mark.promise("overwritten")
    def test_overwritten_input_is_noticed(self, backend, name):
        student, teacher = S.to(DEVICE).clone().requires_grad_(), T.to(DEVICE).clone()
        with fastkd.use_backend(backend):
            value = PAIRWISE[name](student, teacher)
        if backend == "reference":
            return  # plain autograd may no longer need the teacher
        teacher.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()

    def test_backward_twice(self, backend, name):
        student, teacher = S.to(DEVICE).clone().requires_grad_(), T.to(DEVICE)
        with fastkd.use_backend(backend):
            value = PAIRWISE[name](student, teacher)
        value.backward(retain_graph=True)
        once = student.grad.clone()
        value.backward()
        torch.testing.assert_close(student.grad, 2 * once)

    @pytest.mark.promise("fp16-range")
    def test_gradient_scales_exactly(self, backend, name):
        """As GradScaler requires: a power of two scales the gradient exactly."""
        one, many = (
            loss_and_gradient(PAIRWISE[name], S.to(DEVICE), T.to(DEVICE), backend, torch.tensor(g))
            for g in (1.0, 65536.0)
        )
        assert torch.equal(one[1] * 65536, many[1])

    @pytest.mark.promise("autocast")
    def test_autocast_changes_nothing(self, backend, name):
        plain = loss_and_gradient(PAIRWISE[name], S.to(DEVICE), T.to(DEVICE), backend)
        with torch.autocast(DEVICE, torch.bfloat16):
            cast = loss_and_gradient(PAIRWISE[name], S.to(DEVICE), T.to(DEVICE), backend)
        assert torch.equal(plain[0], cast[0])
        assert torch.equal(plain[1], cast[1])


@each_kernel
@pytest.mark.parametrize("name", ["nfd_loss", "cwd_loss", "kd_loss"])
def test_double_backward_is_refused(backend, name):
    student, teacher = S.to(DEVICE).clone().requires_grad_(), T.to(DEVICE)
    with fastkd.use_backend(backend):
        loss = PAIRWISE[name](student, teacher)
    with pytest.raises(RuntimeError, match=r"double backward .*use_backend"):
        torch.autograd.grad(loss, student, create_graph=True)
    with fastkd.use_backend("reference"):
        (gradient,) = torch.autograd.grad(PAIRWISE[name](student, teacher), student, create_graph=True)
    gradient.square().sum().backward()
    assert student.grad.isfinite().all()


@each_backend
def test_every_reduction_of_one_number_is_that_number(backend):
    student, teacher = torch.randn(2, 1, 5, 1, 1, device=DEVICE)
    target = torch.tensor([[[3]]], device=DEVICE)
    for reduction in PIXEL_REDUCTIONS:
        with fastkd.use_backend(backend):
            for loss in (
                lambda **o: fastkd.kd_loss(student, teacher, target=target, **o),
                lambda **o: fastkd.resized_cross_entropy(student, target, **o),
                lambda **o: fastkd.resized_kd_loss(student, teacher, size=(1, 1), **o),
            ):
                torch.testing.assert_close(loss(reduction=reduction).sum(), loss(reduction="none").sum())

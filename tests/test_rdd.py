"""RDD: both maps, stages and presets against the definitions, written with plain torch functions."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import fastkd
from fastkd.functional import SELECTIONS
from fastkd.losses import CITYSCAPES_CLASS_WEIGHTS

from .support import DEVICE, each_backend, kernel_backends
from .test_kd import labels

CLASSES = 5


@pytest.fixture(autouse=True, params=["reference", *kernel_backends()])
def on_backend(request):
    with fastkd.use_backend(request.param):
        yield


@pytest.fixture
def heads():
    """Student, teacher, their auxiliary heads (confident enough for a threshold of 0.7 to separate pixels), and
    labels."""
    student, teacher, student_aux, teacher_aux = 3 * torch.randn(4, 2, CLASSES, 6, 8, device=DEVICE)
    target = labels((2, 24, 30), CLASSES, 0.2, torch.int64, 3)
    return student.requires_grad_(), teacher, student_aux.requires_grad_(), teacher_aux, target


def up(x, target, align_corners):
    return F.interpolate(x, target.shape[-2:], mode="bilinear", align_corners=align_corners)


def kl(p_logits, q_logits):
    """KL(p || q) per pixel."""
    return F.kl_div(F.log_softmax(q_logits, 1), F.log_softmax(p_logits, 1), log_target=True, reduction="none").sum(1)


def ce(logits, target, align_corners, weight=None):
    return F.cross_entropy(up(logits, target, align_corners), target, weight, ignore_index=255, reduction="none")


def expected_mask(student, teacher, target, preset, min_kept=0):
    hard = []
    for z in (student, teacher):
        p = F.softmax(up(z, target, preset == "official"), 1)
        if preset == "paper":
            hard.append(p.amax(1) <= 0.7)
        else:
            valid = target != 255
            conf = torch.where(valid, p.gather(1, torch.where(valid, target, 0)[:, None])[:, 0], 1.0)
            ordered = conf.flatten().sort().values
            k = min(min_kept, ordered.numel())
            threshold = max(0.7, ordered[k - 1].item()) if k else 0.7
            hard.append(conf <= threshold)
    return (hard[0] != hard[1]) & (target != 255)


def test_teacher_confidence(heads):
    _, main, _, aux, _ = heads
    default = fastkd.teacher_confidence(main, aux)
    torch.testing.assert_close(default, torch.exp(-kl(aux, main)))
    torch.testing.assert_close(fastkd.teacher_confidence(main, aux, direction="main_aux"), torch.exp(-kl(main, aux)))
    assert default.shape == (2, 6, 8)
    assert ((default > 0) & (default <= 1)).all()
    assert (fastkd.teacher_confidence(main, main.clone()) == 1).all()


@pytest.mark.parametrize("select", SELECTIONS)
def test_select_words(heads, select):
    student, teacher, _, _, target = heads
    a, b = (F.softmax(up(z, target, False), 1).amax(1) <= 0.7 for z in (student, teacher))
    want = {"xor": a ^ b, "or": a | b, "and": a & b, "student": a, "student_only": a & ~b}[select]
    got = fastkd.difficulty_mask(student, teacher, target, select=select)
    assert got.dtype == torch.bool
    assert not got.requires_grad
    assert torch.equal(got, want & (target != 255))
    assert got.any()


@given(
    kept=st.sampled_from([0, 1, 7, 100, 1440, 5000]),
    threshold=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    seed=st.integers(0, 2**16),
    flat=st.booleans(),
)
def test_kth_smallest(kept, threshold, seed, flat):
    """hard = confidence <= max(threshold, k-th smallest), by sorting; k may exceed the number of pixels; includes
    ties."""
    g = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 2, 3, 6, 8, generator=g).to(DEVICE, torch.float64) * (0 if flat else 1)
    target = labels((2, 24, 30), 3, 0.1, torch.int64, seed)
    got = fastkd.difficulty_mask(
        student, teacher, target, threshold=threshold, min_kept=kept, confidence="label", select="student"
    )
    valid = target != 255
    p = F.softmax(up(student, target, False), 1).gather(1, torch.where(valid, target, 0)[:, None])[:, 0]
    p = torch.where(valid, p, 1)
    k = min(kept, p.numel())
    limit = max(threshold, p.flatten().sort().values[k - 1].item()) if k else threshold
    decided = valid & ((p - limit).abs() > 1e-12)
    assert torch.equal(got[decided], (p <= limit)[decided])
    assert not got[~valid].any()
    assert got.sum() >= min(k, int(valid.sum()))


def test_paper_tfe(heads):
    student, teacher, _, teacher_aux, target = heads
    out = fastkd.rdd_loss(student, teacher, target, stage="tfe", teacher_aux=teacher_aux)
    weight = up(torch.exp(-kl(teacher, teacher_aux))[:, None], target, False)[:, 0]
    torch.testing.assert_close(out.task, (weight * ce(student, target, False)).mean())
    torch.testing.assert_close(out.kd, kl(teacher, student).mean())
    torch.testing.assert_close(out.loss, out.task + out.kd)
    assert out.stage == "tfe"
    assert out.selected == 1


def test_paper_tse(heads):
    student, teacher, _, _, target = heads
    out = fastkd.rdd_loss(student, teacher, target, stage="tse", kd_weight=0.5)
    mask = expected_mask(student, teacher, target, "paper")
    torch.testing.assert_close(out.task, (mask * ce(student, target, False)).mean())
    torch.testing.assert_close(out.loss, out.task + 0.5 * out.kd)
    torch.testing.assert_close(out.selected, mask.sum() / (target != 255).sum())
    out.loss.backward()
    assert student.grad.isfinite().all()


def test_official_tfe(heads):
    student, teacher, student_aux, teacher_aux, target = heads
    out = fastkd.rdd_loss(
        student, teacher, target, stage="tfe", preset="official", teacher_aux=teacher_aux, student_aux=student_aux,
        class_weight=torch.rand(CLASSES, device=DEVICE),
    )  # fmt: skip
    weight = up(torch.exp(-kl(teacher_aux, teacher))[:, None], target, True)[:, 0]
    want = (weight * ce(student, target, True)).mean() + 0.4 * (weight * ce(student_aux, target, True)).mean()
    torch.testing.assert_close(out.task, want)


@pytest.mark.parametrize("min_kept", [None, 0, 300, 900])
def test_official_tse(heads, min_kept):
    student, teacher, student_aux, teacher_aux, target = heads
    class_weight = torch.rand(CLASSES, device=DEVICE) + 0.5
    out = fastkd.rdd_loss(
        student, teacher, target, stage="tse", preset="official", teacher_aux=teacher_aux, student_aux=student_aux,
        class_weight=class_weight, min_kept=min_kept,
    )  # fmt: skip
    want = 0
    for s, t, factor in ((student, teacher, 1), (student_aux, teacher_aux, 0.4)):
        mask = expected_mask(s, t, target, "official", 100_000 if min_kept is None else min_kept)
        label = torch.where(mask, target, 255)
        if mask.any():
            want += factor * F.cross_entropy(up(s, target, True), label, class_weight, ignore_index=255)
    torch.testing.assert_close(out.task, torch.as_tensor(want, dtype=torch.float32, device=DEVICE))


@pytest.mark.promise("nothing-counted")
def test_min_kept_beyond_the_pixels_selects_nothing(heads):
    """Every pixel is hard for both networks, so none is relatively difficult: 0, not NaN."""
    student, teacher, _, _, target = heads
    out = fastkd.rdd_loss(student, teacher, target, stage="tse", preset="official", min_kept=10**6)
    assert out.task == 0
    assert out.selected == 0
    out.loss.backward()
    assert student.grad.isfinite().all()


def test_all_ignored(heads):
    student, teacher, _, teacher_aux, target = heads
    target = torch.full_like(target, 255)
    for stage, preset in itertools.product(("tfe", "tse"), ("paper", "official")):
        out = fastkd.rdd_loss(student, teacher, target, stage=stage, preset=preset, teacher_aux=teacher_aux)
        assert out.task == 0
        assert out.selected == 0


@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
def test_blend(heads, blend):
    student, teacher, _, teacher_aux, target = heads
    both = {
        stage: fastkd.rdd_loss(student, teacher, target, stage=stage, teacher_aux=teacher_aux)
        for stage in ("tfe", "tse")
    }
    out = fastkd.rdd_loss(student, teacher, target, stage="tse", teacher_aux=teacher_aux, blend=blend)
    torch.testing.assert_close(out.task, (1 - blend) * both["tse"].task + blend * both["tfe"].task)
    torch.testing.assert_close(out.selected, both["tse"].selected)


def test_schedule(heads):
    student, teacher, _, teacher_aux, target = heads
    loss = fastkd.RDDLoss(40, blend=True)
    assert loss.tfe_steps == 4
    assert [loss(student, teacher, target, step=i, teacher_aux=teacher_aux).stage for i in (0, 3, 4, 39)] == [
        "tfe", "tfe", "tse", "tse",
    ]  # fmt: skip
    assert fastkd.RDDLoss(40_000, preset="official").tfe_steps == 4000
    got = loss(student, teacher, target, step=22, teacher_aux=teacher_aux)
    want = fastkd.rdd_loss(student, teacher, target, stage="tse", teacher_aux=teacher_aux, blend=0.5)
    torch.testing.assert_close(got.loss, want.loss)


def test_loss_weight_scales_the_terms(heads):
    student, teacher, _, teacher_aux, target = heads
    one, three = (
        fastkd.RDDLoss(10, loss_weight=w)(student, teacher, target, step=0, teacher_aux=teacher_aux) for w in (1.0, 3.0)
    )
    for name in ("loss", "task", "kd"):
        torch.testing.assert_close(getattr(three, name), 3 * getattr(one, name))
    assert three.selected == one.selected


def test_no_auxiliary_head(heads):
    student, teacher, _, _, target = heads
    with pytest.raises(ValueError, match="tfe_steps=0"):
        fastkd.RDDLoss(10)(student, teacher, target, step=0)
    assert fastkd.RDDLoss(10, tfe_steps=0)(student, teacher, target, step=0).stage == "tse"
    with pytest.raises(ValueError, match="student_aux is None"):
        fastkd.rdd_loss(student, teacher, target, stage="tse", aux_weight=0.4)
    with pytest.raises(ValueError, match="teacher_aux is None"):
        fastkd.rdd_loss(student, teacher, target, stage="tse", student_aux=student, aux_weight=0.4)
    without = fastkd.rdd_loss(student, teacher, target, stage="tse")
    ignored = fastkd.rdd_loss(student, teacher, target, stage="tse", student_aux=student.flip(1), aux_weight=0)
    assert torch.equal(without.loss, ignored.loss)


def test_uint8_labels_and_negative_ignore_index(heads):
    student, teacher, _, teacher_aux, target = heads
    for stage in ("tfe", "tse"):
        a = fastkd.rdd_loss(student, teacher, target, stage=stage, teacher_aux=teacher_aux)
        b = fastkd.rdd_loss(student, teacher, target.to(torch.uint8), stage=stage, teacher_aux=teacher_aux)
        minus = torch.where(target == 255, -1, target)
        c = fastkd.rdd_loss(student, teacher, minus, stage=stage, teacher_aux=teacher_aux, ignore_index=-1)
        assert a.loss == b.loss == c.loss


def test_cityscapes_weights():
    assert len(CITYSCAPES_CLASS_WEIGHTS) == 19
    assert fastkd.RDDLoss(10, class_weight=CITYSCAPES_CLASS_WEIGHTS).class_weight.shape == (19,)


@each_backend
def test_mask_where_there_are_more_classes_than_rows(backend):
    student, target = torch.zeros(1, 5, 2, 2, device=DEVICE), torch.full((1, 4, 4), 4, device=DEVICE)
    teacher = student.clone()
    teacher[:, 4] = 20.0
    for confidence in ("max", "label"):
        with fastkd.use_backend(backend):
            assert fastkd.difficulty_mask(student, teacher, target, confidence=confidence).all()


@each_backend
def test_mask_of_one_class(backend):
    """With one class, an ignored pixel cannot be given another class."""
    logits, target = torch.zeros(1, 1, 2, 2, device=DEVICE), torch.zeros(1, 4, 4, dtype=torch.long, device=DEVICE)
    target[:, 0] = 255
    with fastkd.use_backend(backend):
        mask = fastkd.difficulty_mask(logits, logits, target, confidence="label", select="or", min_kept=16)
    assert torch.equal(mask.bool(), target != 255)


@each_backend
def test_mask_of_one_pixel(backend):
    student, target = (
        torch.tensor([0.0, 5.0], device=DEVICE).view(1, 2, 1, 1),
        torch.ones(1, 1, 1, device=DEVICE).long(),
    )
    with fastkd.use_backend(backend):
        assert fastkd.difficulty_mask(-student, student, target, confidence="label").all()
        assert not fastkd.difficulty_mask(student, student, target, confidence="label").any()

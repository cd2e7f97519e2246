"""The kernels of RDD: the mask, ties, the k-th smallest, KD and the confidence in one read."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastkd
from fastkd import backends, reference
from fastkd.functional import SELECTIONS
from fastkd.ops import operator

from .support import DEVICE, INTERPRETER, each_kernel
from .test_kd import labels
from .test_rdd import kl


def at_the_limit(logits, target, *, threshold=0.7, min_kept=0, confidence="max", align_corners=False, select="xor"):
    """Pixels of float64 logits whose confidence is within rounding of the threshold."""
    p = reference.confidence(logits, target, confidence, 255, align_corners)
    kept = min(min_kept, p.numel())
    limit = p.flatten().kthvalue(kept).values.clamp(min=threshold) if kept else threshold
    return (p - limit).abs() < 1e-12


@pytest.mark.promise("mask")
@each_kernel
@given(
    shape=st.tuples(
        st.integers(1, 1 if INTERPRETER else 3),
        st.sampled_from([1, 2, 9] if INTERPRETER else [1, 2, 19, 150]),
        st.integers(1, 9),
        st.integers(1, 20),
    ),
    size=st.tuples(st.integers(1, 4 if INTERPRETER else 30), st.integers(1, 12 if INTERPRETER else 50)),
    teacher_size=st.tuples(st.integers(1, 9), st.integers(1, 20)),
    confidence=st.sampled_from(["max", "label"]),
    select=st.sampled_from(SELECTIONS),
    min_kept=st.sampled_from([0, 1, 50, 700, 10**6]),
    align_corners=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_mask_is_the_references(backend, shape, size, teacher_size, confidence, select, min_kept, align_corners, seed):
    """In fp64, except where a confidence is within rounding of the threshold."""
    g = torch.Generator().manual_seed(seed)
    student = 4 * torch.randn(shape, generator=g, dtype=torch.float64).to(DEVICE)
    teacher = 4 * torch.randn(*shape[:2], *teacher_size, generator=g, dtype=torch.float64).to(DEVICE)
    target = labels((shape[0], *size), shape[1], 0.2, torch.int64, seed)
    options = {"confidence": confidence, "select": select, "min_kept": min_kept, "align_corners": align_corners}
    masks = []
    for name in (backend, "reference"):
        with fastkd.use_backend(name):
            masks.append(fastkd.difficulty_mask(student, teacher, target, **options))
    undecided = at_the_limit(student, target, **options) | at_the_limit(teacher, target, **options)
    assert torch.equal(masks[0] | undecided, masks[1] | undecided)


@pytest.mark.promise("mask")
@each_kernel
@pytest.mark.parametrize("min_kept", [0, 2000])
def test_mask_differs_by_roundings_alone(backend, min_kept):
    """In fp32 a pixel may be classified differently only if its confidence is within a few roundings of the
    threshold."""
    rows = 1 if INTERPRETER else 16
    student, teacher = 3 * torch.randn(2, 2, 19, rows, 32, device=DEVICE)
    target = labels((2, 8 * rows, 256), 19, 0.2, torch.uint8, 1)
    options = {"min_kept": min_kept, "confidence": "label"}
    masks = []
    for name in (backend, "reference"):
        with fastkd.use_backend(name):
            masks.append(fastkd.difficulty_mask(student, teacher, target, **options))
    assert masks[1].any()
    assert (masks[0] != masks[1]).sum() <= 2


@each_kernel
def test_ties_at_the_threshold_are_hard(backend):
    """A confidence equal to the threshold, or to the k-th smallest, is hard: flat logits of two classes have 0.5."""
    student = torch.zeros(1, 2, 4, 4, device=DEVICE)
    teacher = torch.tensor([8.0, 0.0], device=DEVICE)[None, :, None, None].expand(1, 2, 4, 4)
    target = torch.zeros(1, 8, 8, dtype=torch.int64, device=DEVICE)
    with fastkd.use_backend(backend):
        assert fastkd.difficulty_mask(student, teacher, target, threshold=0.5).all()
        assert not fastkd.difficulty_mask(student, teacher, target, threshold=0.49).any()
        kept = fastkd.difficulty_mask(student, teacher, target, threshold=0.1, min_kept=1, select="student")
        assert kept.all()


@each_kernel
@pytest.mark.parametrize("min_kept", [0, 300])
def test_student_alone(backend, min_kept):
    """OHEM's mask depends on no logit of the teacher."""
    student = 3 * torch.randn(2, 5, 4, 6, device=DEVICE)
    target = labels((2, 13, 20), 5, 0.2, torch.uint8, 1)
    options = {"min_kept": min_kept, "confidence": "label", "select": "student", "threshold": 0.3}
    with fastkd.use_backend(backend):
        mask = fastkd.difficulty_mask(student, torch.full_like(student, torch.nan), target, **options)
    with fastkd.use_backend("reference"):
        want = fastkd.difficulty_mask(student.double(), student.double(), target, **options)
    assert want.any()
    assert torch.equal(mask, want)


ADVERSARIAL = {
    "all equal": torch.full((1000,), 0.3),
    "all 1": torch.ones(5_000 if INTERPRETER else 70_000),
    "one": torch.tensor([0.5]),
    "uniform": torch.rand(9_001 if INTERPRETER else 200_001, generator=torch.Generator().manual_seed(0)),
    "normal": torch.randn(4_537 if INTERPRETER else 65_537, generator=torch.Generator().manual_seed(1)),
    "nan": torch.tensor([torch.nan, 0.2, torch.inf, -torch.inf, 0.1, torch.nan, -0.0, 0.0]),
    "all nan": torch.full((9,), torch.nan),
    "subnormal": torch.arange(500) * 1e-45,
    "one bit apart": 0.7 + torch.arange(4000) * 2**-24,
}


@pytest.mark.promise("mask")
@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_kth_smallest_is_torchs(backend, name, dtype):
    x = ADVERSARIAL[name].to(DEVICE, dtype)
    assert backends.why_not(backend) is None  # loads it
    for k in (x.numel() // 3,) if INTERPRETER else (1, 2, x.numel() // 3, x.numel(), x.numel() + 5):
        got = operator(backend, "kth_smallest")(x, k)
        want = x.kthvalue(min(max(k, 1), x.numel())).values
        assert got.shape == ()
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)), k


@each_kernel
def test_nan_confidence_is_not_hard(backend):
    student, teacher = torch.randn(2, 1, 3, 4, 4, device=DEVICE)
    student[0, 1, 1, 1] = torch.nan
    target = torch.zeros(1, 4, 4, dtype=torch.int64, device=DEVICE)
    with fastkd.use_backend(backend):
        for kept in (0, 3):
            mask = fastkd.difficulty_mask(student, teacher, target, threshold=1.0, min_kept=kept, select="student")
            assert mask.sum() == 15
            assert not mask[0, 1, 1]
        everything = fastkd.difficulty_mask(student, teacher, target, threshold=0.1, min_kept=16, select="student")
        assert not everything.any()  # the 16th smallest is NaN


@each_kernel
@pytest.mark.parametrize("direction", ["aux_main", "main_aux"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_kd_and_confidence_in_one_read(backend, direction, layout, dtype):
    if backend == "cuda":
        pytest.skip("CUDA C++ has no kernel for it")
    student, teacher, aux = (
        (3 * x).to(dtype).to(memory_format=layout) for x in torch.randn(3, 2, 21, 9, 11, device=DEVICE)
    )
    assert backends.why_not(backend) is None
    loss, confidence, gradient = operator(backend, "kd_confidence_gradient")(
        student, teacher, aux, direction, "sum", 0.5
    )
    s = student.double().requires_grad_()
    want = 0.5 * kl(teacher.double(), s).sum()
    want.backward()
    first, second = (aux, teacher) if direction == "aux_main" else (teacher, aux)
    torch.testing.assert_close(loss.double(), want.detach(), rtol=1e-6, atol=1e-6)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), s.grad, rtol=max(1e-4, torch.finfo(dtype).eps), atol=1e-6)
    expected = torch.exp(-kl(first.double(), second.double()))
    torch.testing.assert_close(confidence.double(), expected, rtol=1e-5, atol=1e-6)
    assert gradient.stride() == student.stride()

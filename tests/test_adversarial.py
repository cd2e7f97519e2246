"""Extreme inputs: huge, tiny, constant, infinite, NaN, ignored, empty, shared, many.

Where plain PyTorch gives a finite result, the kernels give one of the same accuracy. NaN and infinity reach the results
that depend on them and no others.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

import fastkd
from fastkd import backends

from . import budget
from .losses import HEATED, LOSSES, REDUCED
from .support import DEVICE, LAYOUTS, each_backend, each_kernel, lay_out, loss_and_gradient, needs_cpu
from .test_kd import labels
from .test_nfd import smallest_std
from .test_rdd_kernels import at_the_limit

# Every loss that is continuous in the logits, per element if possible; those with a temperature also at a low one.
CASES: dict[str, tuple[str, dict]] = {
    **{
        name: (name, {"reduction": "none"} if name in REDUCED else {})
        for name in LOSSES
        if not name.startswith("rdd_tse")
    },
    **{f"{name}_cold": (name, {"temperature": 0.1}) for name in HEATED},
}
TEMPERATURE = {"cwd": 4.0} | {f"{name}_cold": 0.1 for name in HEATED}
DIMS = {"nfd": "hw", "nfd_nhw": "nhw", "nfd_c": "c", "nfd_chw": "chw"}
each_loss = pytest.mark.parametrize("name", CASES)

few = settings(max_examples=min(12 if settings().max_examples <= 60 else 400, settings().max_examples))

CONTENTS = ("normal", "subnormal", "flat", "zero", "one-hot", "offset", "one huge")
shapes = st.tuples(
    st.integers(1, 2), st.sampled_from([1, 2, 5, 17, 33, 130]), st.integers(1, 7), st.sampled_from([1, 3, 16, 19, 40])
)


def content(kind: str, shape: tuple[int, ...], dtype: torch.dtype, power: int, seed: int) -> Tensor:
    """A map of the given kind, with magnitude 10^power if the kind has one."""
    g = torch.Generator().manual_seed(seed)
    x, scale, limits = torch.randn(shape, generator=g, dtype=torch.float64), 10.0**power, torch.finfo(dtype)
    classes = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=g)
    x = {
        "normal": x * scale,
        "subnormal": x * limits.tiny / 8,
        "flat": x[:, :, :1, :1].expand(shape) * min(scale, 1e3),
        "zero": x * 0,
        "one-hot": torch.nn.functional.one_hot(classes, shape[1]).movedim(3, 1).double() * scale,
        "offset": x + min(scale, 1e4),
        "one huge": x.index_put((torch.tensor(0), torch.tensor(0)), x[0, 0] * scale),
    }[kind]
    return x.clamp(limits.min, limits.max).to(DEVICE, dtype)


def on(backend: str, name: str, student: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient, with a nonuniform upstream gradient."""
    loss, options = CASES[name]
    student = student.detach().requires_grad_()
    with fastkd.use_backend(backend):
        value = LOSSES[loss](student, *args, **options)
    weights = torch.linspace(0.5, 1.5, max(value.numel(), 1), dtype=value.dtype, device=value.device)
    value.backward(weights[: value.numel()].view(value.shape))
    return value.detach(), student.grad


def assert_as_right_as_eager(name: str, backend: str, student: Tensor, teacher: Tensor, *target: Tensor) -> None:
    """Finite where plain PyTorch is, and as close to the float64 result, up to roundings of the inputs' magnitude."""
    ours, eager = (on(b, name, student, teacher, *target) for b in (backend, "reference"))
    true = on("reference", name, student.double(), teacher.double(), *target)
    # Effect of one rounding of each logit, for example by interpolation.
    g = torch.Generator(DEVICE).manual_seed(0)
    rounded = [
        x.double() * (1 + 2.0**-23 * (1 - 2 * torch.randint(0, 2, x.shape, generator=g, device=DEVICE)))
        for x in (student, teacher)
    ]
    moved = on("reference", name, *rounded, *target)
    tau = TEMPERATURE.get(name, 1.0)
    largest = max(student.abs().max().item(), teacher.abs().max().item())
    if name.startswith("nfd"):  # the z-scores of both sides are divided by the student's standard deviation
        natural = {"loss": 1.0, "gradient": 1 / smallest_std(student, DIMS[name]) / student[0, 0].numel()}
    else:  # a rounding of the largest logit changes log-probabilities and probabilities by as much
        natural = {"loss": tau * (tau + largest), "gradient": tau * (1 + largest / tau)}
    acc = budget.accumulator(student, teacher)
    for what, got, plain, want, near in zip(("loss", "gradient"), ours, eager, true, moved, strict=True):
        counted = plain.isfinite() & want.isfinite()
        assert got[counted].isfinite().all(), f"{what}: not finite where plain PyTorch is"
        got, plain, want, near = (x[counted] for x in (got, plain, want, near))
        budget.assert_within(what, got, plain, want, acc, unit=natural[what], moved=near)


@pytest.mark.promise("finite")
@each_kernel
@each_loss
@few
@given(
    shape=shapes,
    kinds=st.tuples(st.sampled_from(CONTENTS), st.sampled_from(CONTENTS)),
    powers=st.tuples(*[st.sampled_from([-30, -10, -3, 0, 1, 2, 4, 8, 12, 15])] * 2),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    size=st.tuples(st.integers(1, 20), st.integers(1, 60)),
    seed=st.integers(0, 2**16),
)
def test_extreme_contents(backend, name, shape, kinds, powers, dtype, layouts, size, seed):
    student, teacher = (
        lay_out(content(kind, shape, dtype, power, seed + i), layout)
        for i, (kind, power, layout) in enumerate(zip(kinds, powers, layouts, strict=True))
    )
    y = labels((shape[0], *size), shape[1], 0.2, torch.int64, seed)
    assert_as_right_as_eager(name, backend, student, teacher, y)


@pytest.mark.promise("nfd-flat")
@each_kernel
@pytest.mark.parametrize("dims", ["hw", "nhw", "c", "chw"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_nfd_of_flat_groups_is_bounded(backend, dims, layout):
    """A group without variance: rounding errors, of either sign, must not be divided by eps alone."""
    teacher = lay_out(torch.randn(2, 64, 5, 7, device=DEVICE), layout)
    flat = torch.randn((1, 64, 1, 1) if dims in ("hw", "nhw") else (2, 1, 1, 1), device=DEVICE).expand(2, 64, 5, 7)
    for height in (1e2, 1e8, 1e10, 1e12):
        student = lay_out((flat * height).contiguous(), layout)
        value, gradient = loss_and_gradient(
            lambda s, t: fastkd.nfd_loss(s, t, dims=dims, eps=1e-12, reduction="none"), student, teacher, backend
        )
        assert ((value >= 0) & (value <= 4)).all()
        assert gradient.isfinite().all()


@pytest.mark.promise("cwd-flat")
@each_kernel
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_cwd_of_huge_flat_maps(backend, layout):
    """The student's distribution is uniform, the teacher's one-hot, for any offset."""
    flat, noise = (
        lay_out(x, layout) for x in (torch.ones(2, 7, 9, 12, device=DEVICE), torch.randn(2, 7, 9, 12, device=DEVICE))
    )
    onehot = (noise == noise.amax((2, 3), keepdim=True)).float()
    for height in (1e10, 1e20, 1e30):
        _, gradient = loss_and_gradient(
            lambda s, t: fastkd.cwd_loss(s, t, temperature=0.3),
            flat * height,
            noise * height,
            backend,
            torch.tensor(14.0),
        )
        torch.testing.assert_close(gradient, 0.3 * (1 / 108 - onehot))


@pytest.mark.promise("masked-classes")
@each_kernel
@pytest.mark.parametrize("temperature", [1.0, 0.25])
@pytest.mark.parametrize("size", [(9, 12), (30, 41)])
def test_classes_masked_with_the_lowest_number(backend, temperature, size):
    """Masks often use finfo.min. It is finite, and a neighbour's weight of 0 must not turn it into NaN."""
    student, teacher = 5 * torch.randn(2, 2, 7, 9, 12, device=DEVICE)
    for x in (student, teacher):
        x[:, 5], x[0, 2, :, ::3] = torch.finfo(torch.float32).min, torch.finfo(torch.float32).min
    y = labels((2, *size), 2, 0.1, torch.int64, 0)
    for loss in (
        lambda s, t: fastkd.resized_cross_entropy(s, y),
        lambda s, t: fastkd.resized_kd_loss(s, t, size=size, temperature=temperature),
    ):
        value, gradient = loss_and_gradient(loss, student, teacher, backend)
        want = loss_and_gradient(loss, student.double(), teacher.double(), "reference")
        budget.assert_close(value, want[0])
        budget.assert_close(gradient, want[1])


# NaN and infinity


@pytest.mark.promise("nan")
@each_kernel
@each_loss
@few
@given(
    shape=shapes,
    bad=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    side=st.sampled_from(["student", "teacher", "both"]),
    many=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(["nchw", "channels_last"]),
    size=st.tuples(st.integers(1, 20), st.integers(1, 60)),
    seed=st.integers(0, 2**16),
)
def test_not_finite_goes_where_it_belongs(backend, name, shape, bad, side, many, dtype, layout, size, seed):
    """Results are finite where plain PyTorch's are, and NaN or infinite where a non-finite input is counted."""
    student, teacher = (content("normal", shape, dtype, 0, seed + i) for i in range(2))
    g = torch.Generator().manual_seed(seed)
    hit = torch.rand(shape, generator=g).to(DEVICE) < (0.3 if many else 0)
    hit.view(-1)[torch.randint(0, student.numel(), (1,), generator=g).to(DEVICE)] = True
    student = lay_out(student.masked_fill(hit, bad) if side != "teacher" else student, layout)
    teacher = lay_out(teacher.masked_fill(hit, bad) if side != "student" else teacher, layout)
    y = labels((shape[0], *size), shape[1], 0.2, torch.int64, seed)
    ours, eager = (on(b, name, student, teacher, y) for b in (backend, "reference"))
    if name == "resized_ohem_ce":  # plain PyTorch's NaN (inf * 0) is not a confidence below the threshold
        plain = torch.nn.functional.interpolate(student.float(), size, mode="bilinear").isnan().any(1)
        eager = (eager[0].masked_fill(plain, torch.nan), eager[1] if not plain.any() else eager[1] * torch.nan)
    for what, got, plain in zip(("loss", "gradient"), ours, eager, strict=True):
        assert got[plain.isfinite()].isfinite().all(), f"{what}: not finite where plain PyTorch is"
    if bad == -torch.inf:  # a class of probability 0
        return
    if name in (
        "resized_ce",
        "resized_kd",
    ):  # plain PyTorch multiplies a neighbour by a weight of 0, the kernels ignore it
        sees = hit if side != "teacher" or name == "resized_kd" else hit & False
        reach = torch.nn.functional.interpolate(sees.any(1, keepdim=True).double(), size, mode="bilinear")[:, 0]
        assert not ours[0][(reach > 1e-6) & (y != 255)].isfinite().any()
    elif not name.startswith(("resized", "rdd")):
        assert not ours[0][~eager[0].isfinite()].isfinite().any(), "loss: finite where plain PyTorch is not"


@pytest.mark.promise("ignored-pixels")
@each_kernel
def test_weights_of_ignored_pixels_do_not_matter(backend):
    """A NaN or infinite weight of an ignored pixel changes nothing, neither there nor in its neighbours."""
    student, teacher = torch.randn(2, 2, 5, 12, 20, device=DEVICE)
    y = labels((2, 12, 20), 5, 0.3, torch.int64, 0)
    weight = torch.rand(2, 12, 20, device=DEVICE)
    for bad in (torch.nan, torch.inf):
        holes = torch.where(y == 255, bad, weight)
        for loss in (
            lambda s, t, w: fastkd.kd_loss(s, t, target=y, weight=w),
            lambda s, t, w: fastkd.resized_cross_entropy(s, y, pixel_weight=w),
            lambda s, t, w: fastkd.resized_kd_loss(s, t, size=(12, 20), target=y, pixel_weight=w),
        ):
            got, want = (
                loss_and_gradient(lambda s, t, loss=loss, w=w: loss(s, t, w), student, teacher, backend)
                for w in (holes, weight)
            )
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.promise("value-error")
@each_backend
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_numbers_that_are_none(backend, bad):
    s, t = torch.randn(2, 1, 3, 4, 4, device=DEVICE)
    y = torch.zeros(1, 4, 4, dtype=torch.int64, device=DEVICE)
    for call in (
        lambda: fastkd.kd_loss(s, t, temperature=bad),
        lambda: fastkd.cwd_loss(s, t, temperature=bad),
        lambda: fastkd.nfd_loss(s, t, eps=bad),
        lambda: fastkd.resized_kd_loss(s, t, size=(4, 4), temperature=bad),
        lambda: fastkd.rdd_loss(s, t, y, stage="tse", kd_weight=bad),
        lambda: fastkd.difficulty_mask(s, t, y, threshold=bad),
    ):
        with fastkd.use_backend(backend), pytest.raises(ValueError, match=rf"got {bad}, expected a number"):
            call()


@pytest.mark.promise("fp16-range")
@each_kernel
def test_fp16_gradient_with_large_weights(backend):
    """The gradient of the sum overflows fp16 here; that of the mean does not."""
    student = torch.randn(1, 4, 32, 32, device=DEVICE).half()
    teacher, weight = torch.randn_like(student), torch.full((1, 32, 32), 5e5, device=DEVICE)
    for options in ({"weight": weight}, {"temperature": 1e5}):
        got, want = (
            loss_and_gradient(lambda s, t, o=options: fastkd.kd_loss(s, t, **o), x, y, b)
            for x, y, b in ((student, teacher, backend), (student.float(), teacher.float(), "reference"))
        )
        budget.assert_close(got[1], want[1].double())


# Shapes, labels, memory


@pytest.mark.promise("finite")
@each_kernel
@each_loss
@pytest.mark.parametrize(
    "shape", [(1, c, 1, 1) for c in (1, 2, 3, 15, 16, 17, 31, 33, 1023, 1025, 4096)] + [(3, 1, 5, 1)]
)
def test_one_pixel_and_any_number_of_channels(backend, name, shape):
    student, teacher = (content("normal", shape, torch.float32, 0, i) for i in range(2))
    for size in ((1, 1), (3, 37)):
        y = labels((shape[0], *size), shape[1], 0.0, torch.int64, 0)
        assert_as_right_as_eager(name, backend, student, teacher, y)


@pytest.mark.promise("nothing-counted")
@each_backend
@each_loss
@pytest.mark.parametrize("shape", [(0, 5, 4, 4), (0, 1, 1, 1)])
def test_empty_batch(backend, name, shape):
    y = torch.zeros(0, 9, 9, dtype=torch.uint8, device=DEVICE)
    value, gradient = on(backend, name, torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE), y)
    assert (value == 0).all()
    assert gradient.shape == shape


@pytest.mark.promise("nothing-counted")
@each_backend
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_every_label_ignored(backend, dtype):
    """Loss and gradient are 0 even if weights (or, in the kernels, logits) are not finite; the mask is empty."""
    student, teacher = torch.randn(2, 2, 5, 6, 7, device=DEVICE)
    if backend != "reference":
        student[1, 2, 3, 4], teacher[0, 1, 2, 3] = torch.inf, torch.nan
    y, z = (torch.full((2, *hw), 255, dtype=dtype, device=DEVICE) for hw in ((13, 20), (6, 7)))
    for loss in (
        lambda s, t: fastkd.kd_loss(s, t, target=z, weight=torch.full((2, 6, 7), torch.inf, device=DEVICE)),
        lambda s, t: fastkd.resized_cross_entropy(s, y, class_weight=torch.full((5,), 3.0, device=DEVICE)),
        lambda s, t: fastkd.resized_kd_loss(s, t, size=(13, 20), target=y),
        lambda s, t: fastkd.rdd_loss(s, t, y, stage="tse", preset="official").task,
        lambda s, t: fastkd.rdd_loss(s, t, y, stage="tfe", teacher_aux=t.flip(1)).task,
    ):
        value, gradient = loss_and_gradient(loss, student, teacher, backend)
        assert value == 0
        assert (gradient == 0).all()
    with fastkd.use_backend(backend):
        assert not fastkd.difficulty_mask(student, teacher, y, select="or").any()


@pytest.mark.promise("ignored-pixels")
@each_kernel
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_operators_ignore_labels_out_of_range(backend, dtype):
    """Labels that bypass the checks (compiled code, a GPU) are ignored; nothing is read outside the logits."""
    student, teacher = torch.randn(2, 1, 5, 6, 7, device=DEVICE)
    limits = torch.iinfo(dtype)
    bad = labels((1, 13, 20), 5, 0.0, dtype, 0)
    good = bad.clone()
    for i, value in enumerate((5, 200, limits.max, limits.min)):
        if 0 <= value < 5:  # 0 for uint8, which is a class
            continue
        bad[0, i], good[0, i] = value, 255
    assert backends.why_not(backend) is None
    op = getattr(torch.ops, f"fastkd_{backend}")
    for call in (
        lambda y: op.resized_cross_entropy_gradient(student, y, None, None, None, 255, False, "mean", 1.0),
        lambda y: op.resized_kd_gradient(student, teacher, y, None, [13, 20], 1.0, 255, False, "mean", 1.0),
        lambda y: op.kd_gradient(student, teacher, y[:, :6, :7].contiguous(), None, 1.0, 255, "mean", 1.0),
        lambda y: op.difficulty_mask(student, teacher, y, 0.7, 30, "label", "or", 255, False),
    ):
        assert all(torch.equal(a, b) for a, b in zip(call(bad), call(good), strict=True))


@pytest.mark.promise("inputs")
@each_kernel
@each_loss
def test_student_and_teacher_share_memory(backend, name):
    """The same tensor, or overlapping views of one storage: the inputs are not written, and the loss equals that of
    copies."""
    storage = torch.randn(2 * 5 * 8 * 9 + 64, device=DEVICE)
    before = storage.clone()
    y = labels((2, 17, 30), 5, 0.2, torch.int64, 0)
    for shift in (0, 1, 64):
        student, teacher = (storage[i : i + 720].view(2, 5, 8, 9) for i in (0, shift))
        got = on(backend, name, student, teacher, y)
        want = on(backend, name, student.clone(), teacher.clone(), y)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert torch.equal(storage, before)


@pytest.mark.promise("equal-maps")
@each_kernel
@few
@given(
    shape=shapes,
    power=st.sampled_from([-10, 0, 2, 8]),
    kind=st.sampled_from(CONTENTS),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    size=st.tuples(st.integers(1, 20), st.integers(1, 60)),
    seed=st.integers(0, 2**16),
)
def test_a_student_equal_to_its_teacher(backend, shape, power, kind, dtype, size, seed):
    """Loss and gradient are exactly 0; NFD, CWD and interpolated teachers up to rounding."""
    x = content(kind, shape, dtype, power, seed)
    y = labels((shape[0], *size), shape[1], 0.2, torch.int64, seed)
    for name in ("kd", "kd_target", "kd_cold", "resized_kd", "resized_kd_cold", "cwd", "nfd", "nfd_c"):
        value, gradient = on(backend, name, x, x.clone(), y)
        budget.assert_zero(value)
        if not name.startswith(("cwd", "nfd")):
            assert (gradient == 0).all()
    with fastkd.use_backend(backend):
        assert not fastkd.difficulty_mask(x, x.clone(), y).any()
        assert (fastkd.teacher_confidence(x, x.clone()) == 1).all()


# The maps of RDD


@each_kernel
@few
@given(
    shape=shapes,
    kinds=st.tuples(st.sampled_from(CONTENTS), st.sampled_from(CONTENTS)),
    powers=st.tuples(*[st.sampled_from([-30, -3, 0, 1, 2, 8, 15])] * 2),
    bad=st.sampled_from([None, torch.nan, torch.inf, -torch.inf]),
    size=st.tuples(st.integers(1, 20), st.integers(1, 60)),
    kept=st.sampled_from([0, 1, 40, 10**9]),
    confidence=st.sampled_from(["max", "label"]),
    seed=st.integers(0, 2**16),
)
def test_rdd_maps_of_extreme_logits(backend, shape, kinds, powers, bad, size, kept, confidence, seed):
    """In fp64, where kernel and reference do not differ measurably: the same mask, confidences in [0, 1]."""
    student, teacher = (
        content(kind, shape, torch.float32, power, seed + i).double()
        for i, (kind, power) in enumerate(zip(kinds, powers, strict=True))
    )
    if bad is not None:
        student = student.flatten().index_fill(0, torch.tensor(seed % student.numel(), device=DEVICE), bad).view(shape)
    y = labels((shape[0], *size), shape[1], 0.2, torch.int64, seed)
    valid = y != 255
    options = {"min_kept": kept, "confidence": confidence, "threshold": 0.61803, "select": "or"}
    masks, maps = [], []
    for name in (backend, "reference"):
        with fastkd.use_backend(name):
            masks.append(fastkd.difficulty_mask(student, teacher, y, **options))
            maps.append(fastkd.teacher_confidence(student, teacher))
    assert not masks[0][~valid].any()
    finite = maps[1].isfinite()
    assert ((maps[0] >= 0) & (maps[0] <= 1))[finite].all()
    budget.assert_close(maps[0][finite], maps[1][finite])
    if bad is None and max(powers) <= 2:  # beyond, a rounding of the interpolation moves a probability from 0 to 1
        undecided = at_the_limit(student, y, **options) | at_the_limit(teacher, y, **options)
        assert torch.equal(masks[0] | undecided, masks[1] | undecided)


# Half precision

CONVERSIONS = """
import sys, torch
from fastkd import backends
torch.ops.load_library(sys.argv[1])
backends.define("cpu")
op = torch.ops.fastkd_cpu
every = torch.arange(-(2**15), 2**15).to(torch.int16)
edges = (every.view(torch.bfloat16).float().view(torch.int32)[:, None] + torch.tensor([0, 1, 0x7fff, 0x8000, 0x8001, 0xffff]))
for dtype in (torch.float16, torch.bfloat16):
    # Read: the mean of a group of one element is the element, whatever vector or tail it is loaded by.
    x = every.view(dtype)
    for shape in ((1, 65536, 1, 1), (65536, 1, 1, 1)):
        _, stats = op.nfd_forward(x.view(shape), x.view(shape), "hw", 1.0, "sum", 1.0)
        mean, want = stats.view(-1, 6)[:, 0], x.float()
        assert torch.equal(mean[x.isfinite()], want[x.isfinite()]), (dtype, "read")
        assert not mean[~x.isfinite()].isfinite().any(), (dtype, "read")
    # Write: with these statistics the gradient is grad * (1 * s - 1 * 0), rounded to the student's type.
    grad = torch.cat([edges.int().view(torch.float32).flatten(), x.float(), torch.nextafter(x.float(), torch.tensor(9e9))])
    grad = torch.cat([grad, (x.float() + torch.nextafter(x, torch.tensor(torch.inf, dtype=dtype)).float()) / 2])  # ties
    stats = torch.tensor([0.0, 0, 0, 0, 1, 1]).expand(1, grad.numel(), 6).contiguous()
    for form in (torch.contiguous_format, torch.channels_last):
        one = torch.ones(1, grad.numel(), 1, 3, dtype=dtype).contiguous(memory_format=form)
        out = op.nfd_backward(grad[None], one, one * 0, "hw", 1.0, "none", 1.0, stats)
        want = grad.to(dtype)[None, :, None, None].expand_as(out)
        assert torch.equal(out.isnan(), want.isnan()), (dtype, "NaN")
        assert torch.equal(out.nan_to_num(7.0, 8.0, -8.0), want.nan_to_num(7.0, 8.0, -8.0)), (dtype, "write")
print(op.isa())
"""


@pytest.mark.promise("half-precision")
@needs_cpu
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_number_of_half_precision(isa):
    """Each fp16 and bf16 number is read exactly; values between two of them, and ties, are rounded as in torch."""
    library = str(Path(fastkd.__file__).with_name("_cpu.so"))
    done = subprocess.run(
        [sys.executable, "-c", CONVERSIONS, library],
        env={**os.environ, "FASTKD_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    if "which this processor does not have" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa


# Sequences


class Sequences(RuleBasedStateMachine):
    """Calls in any order, with any number of threads, forced backends and from other Python threads: each is bitwise
    reproducible and leaves its inputs unchanged."""

    @initialize()
    def start(self):
        self.threads = torch.get_num_threads()
        g = torch.Generator().manual_seed(0)
        student, teacher = torch.randn(2, 2, 5, 9, 40, generator=g).to(DEVICE)
        self.inputs = (
            student,
            teacher,
            labels((2, 20, 70), 5, 0.2, torch.uint8, 0),
        )
        self.copies = [x.clone() for x in self.inputs]
        self.first: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

    def call(self, name: str, backend: str) -> None:
        got = on(backend, name, *self.inputs)
        want = self.first.setdefault((name, backend), got)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), (name, backend)

    @rule(name=st.sampled_from(list(CASES)), backend=st.sampled_from(["auto", "reference"]))
    def a_call(self, name, backend):
        self.call(name, backend)

    @rule(count=st.integers(1, 4))
    def other_threads(self, count):
        torch.set_num_threads(count)

    @rule(
        names=st.lists(st.sampled_from(list(CASES)), min_size=2, max_size=4),
        backend=st.sampled_from(["auto", "reference"]),
    )
    def calls_at_once(self, names, backend):
        failures = []

        def one(name, backend):
            try:
                self.call(name, backend)
            except BaseException as error:
                failures.append(error)

        others = {"auto": "reference", "reference": "auto"}
        workers = [
            threading.Thread(target=one, args=(name, backend if i % 2 else others[backend]))
            for i, name in enumerate(names)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not failures, failures

    @rule(name=st.sampled_from(list(CASES)))
    def a_refused_call(self, name):
        with pytest.raises(ValueError, match=r"expected (4|3 to 5) dimensions"):
            LOSSES[CASES[name][0]](self.inputs[0][0, 0], *self.inputs[1:])

    @invariant()
    def inputs_are_unchanged(self):
        assert all(torch.equal(a, b) for a, b in zip(self.inputs, self.copies, strict=True))
        assert backends.requested() == "auto"

    def teardown(self):
        torch.set_num_threads(self.threads)


Sequences.TestCase.settings = settings(max_examples=8, stateful_step_count=20)
TestSequences = pytest.mark.promise("sequences")(pytest.mark.promise("callers")(Sequences.TestCase))


class Heap(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def bytes_in_use() -> int:
    """Bytes allocated by glibc's malloc and not yet freed."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Heap
    heap = mallinfo2()
    return heap.uordblks + heap.hblkhd


@pytest.mark.promise("no-leak")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="counts bytes by glibc's mallinfo2")
@pytest.mark.skipif(DEVICE != "cpu", reason="counts the heap of the C++ kernels")
@needs_cpu
@each_loss
def test_no_leak(name):
    """A hundred more steps do not leak a map, nor the scratch of a call that fails half way."""
    student, teacher = torch.randn(2, 2, 16, 24, 40)
    y = labels((2, 48, 80), 16, 0.2, torch.uint8, 0)

    def steps(count):
        for _ in range(count):
            on("cpu", name, student, teacher, y)
        return bytes_in_use()

    steps(20)
    before = steps(20)
    grown = steps(100) - before
    assert grown < 100 * 1000, f"{grown} bytes in 100 steps"


# Size


def available() -> int:
    text = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else "MemAvailable: 0"
    return 1024 * int(text.partition("MemAvailable:")[2].split()[0])


def needs_memory(gib):
    """Skips at the start of the test, not at collection: other processes may allocate memory in between."""
    if available() < gib << 30:
        pytest.skip(f"needs {gib} GiB of free memory, there are {available() >> 30}")


def one_label_in_the_last_row():
    target = torch.full((1, (1 << 16) + 8, 1 << 15), 255, dtype=torch.uint8)
    target[0, -1, -3] = 2
    return target


@pytest.mark.promise("large")
@pytest.mark.slow
@pytest.mark.large
@pytest.mark.parametrize("name", ["nfd", "cwd", "kd"])
def test_more_than_two_to_the_31_elements(name):
    """Elements beyond index 2^31 are read and written correctly: the second sample equals the same sample alone."""
    needs_memory(18)
    shape = (2, 64, 4096, 4100)  # slightly more than 2^30 elements per sample
    loss = {
        "nfd": lambda s, t: fastkd.nfd_loss(s, t, reduction="none")[:, 0],
        "cwd": lambda s, t: fastkd.cwd_loss(s, t, reduction="none")[:, 0],
        "kd": lambda s, t: fastkd.kd_loss(s, t, reduction="none")[:, ::512, ::512],
    }[name]
    pattern = torch.randn(1_000_003).bfloat16()
    count = torch.Size(shape).numel()
    storage = torch.empty(count + 1, dtype=torch.bfloat16)
    for first in range(0, count + 1, pattern.numel()):
        storage[first : first + pattern.numel()] = pattern[: count + 1 - first]
    student, teacher = storage[:count].view(shape), storage[1:].view(shape)
    whole = student.requires_grad_()
    value = loss(whole, teacher)
    value.sum().backward()
    alone = student.detach()[1:].requires_grad_()
    want = loss(alone, teacher[1:])
    want.sum().backward()
    assert torch.equal(value[1:].detach(), want.detach())
    assert torch.equal(whole.grad[1, ::7, ::5], alone.grad[0, ::7, ::5])


@pytest.mark.promise("large")
@pytest.mark.slow
@pytest.mark.large
def test_more_than_two_to_the_31_label_pixels():
    """Only one label in the last row is valid: the loss is that pixel's."""
    needs_memory(18)
    logits = torch.randn(1, 3, 9, 5, requires_grad=True)
    value = fastkd.resized_cross_entropy(logits, one_label_in_the_last_row())
    value.backward()
    corner = logits.detach()[:, :, -1, -1].requires_grad_()  # the last label pixels depend only on the last logit
    want = torch.nn.functional.cross_entropy(corner, torch.tensor([2]))
    want.backward()
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(logits.grad[:, :, -1, -1], corner.grad)
    assert logits.grad.count_nonzero() == 3


@pytest.mark.promise("large")
@pytest.mark.slow
@pytest.mark.large
@pytest.mark.parametrize(
    ("min_kept", "threshold", "gib"),
    [(0, 1.0, 7), (1, 0.0, 21)],  # the latter keeps the confidence of each pixel in both networks
)
def test_mask_of_more_than_two_to_the_31_label_pixels(min_kept, threshold, gib):
    needs_memory(gib)
    logits, options = torch.randn(1, 3, 9, 5), {"min_kept": min_kept, "threshold": threshold, "select": "or"}
    mask = fastkd.difficulty_mask(logits, logits.flip(1), one_label_in_the_last_row(), **options)
    assert mask.sum() == 1
    assert mask[0, -1, -3]

"""Triton only: tiles and chunks, every dtype and layout with every tiling, labels of every dtype.

Runs on a GPU, or with TRITON_INTERPRET=1 in Triton's interpreter. Tests that apply to every backend are in the
operators' files.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastkd

from . import budget
from .support import DEVICE, INTERPRETER

if not INTERPRETER and DEVICE == "cpu":
    pytest.skip("Triton's kernels run in the job with TRITON_INTERPRET=1", allow_module_level=True)

from fastkd.kernels import cwd, kd, nfd, rdd, tiles
from fastkd.kernels.resize import planning

from fastkd import backends, reference

NCHW, NHWC = torch.contiguous_format, torch.channels_last
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
# Student and teacher.
DTYPES = [(F32, F32), (F16, F16), (BF16, BF16), (BF16, F32), (F32, F16), (F64, F64)]
KINDS = [(*DTYPES[i % 6], (NCHW, NHWC)[(i + i // 6) % 2]) for i in range(12)]
# Sizes around the tiles (powers of two and WIDTH), all sizes 1, and common numbers of channels and classes.
SHAPES = [(2, 19, 5, 7), (3, 1, 9, 4), (1, 2, 1, 1), (2, 64, 4, 16), (1, 3, 53, 61), (2, 150, 3, 3), (1, 300, 2, 5)]
# (TILE, WIDTH, PROGRAMS): the defaults; one long chunk of many tiles; a few chunks of several tiles each.
CUTS = {"shipped": (2048, 64, 2048), "one chunk": (256, 8, 1), "chunks": (256, 8, 12)}
CASES = [("shipped", shape) for shape in SHAPES] + [
    (cut, shape) for cut in ("one chunk", "chunks") for shape in [(2, 19, 5, 7), (1, 3, 23, 41), (1, 150, 3, 3)]
]

each_cut = pytest.mark.parametrize("cut", CUTS, indirect=True)
each_layout = pytest.mark.parametrize("layout", [NCHW, NHWC])


def each_problem(option: str, *values):
    """Every tiling and shape with every value of an option, cycling through the dtypes and layouts."""
    problems = [
        (value, cut, shape, *KINDS[(i + 5 * j) % len(KINDS)])
        for j, value in enumerate(values)
        for i, (cut, shape) in enumerate(CASES)
    ]
    return pytest.mark.parametrize((option, "cut", "shape", "student", "teacher", "layout"), problems, indirect=["cut"])


@pytest.fixture
def cut(request, monkeypatch):
    for name, value in zip(("TILE", "WIDTH", "PROGRAMS"), CUTS[request.param], strict=True):
        monkeypatch.setattr(tiles, name, value)
    tiles._cut.cache_clear()
    yield request.param
    tiles._cut.cache_clear()


def maps(shape, student=F32, teacher=F32, layout=NCHW, scale=1.0, offset=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    s = torch.randn(shape, generator=g, dtype=F64)
    t = 0.7 * s + 0.7 * torch.randn(shape, generator=g, dtype=F64)
    return tuple((x * scale + offset).to(DEVICE, d).to(memory_format=layout) for x, d in ((s, student), (t, teacher)))


def truth(formula, student: Tensor, teacher: Tensor, grad: Tensor, dtype) -> tuple[Tensor, Tensor]:
    """Loss, and gradient of sum(grad * loss) for the student, by plain PyTorch in ``dtype``."""
    s = student.to(dtype).requires_grad_()
    loss = formula(s, teacher.to(dtype))
    (gradient,) = torch.autograd.grad(loss, s, grad.to(dtype))
    return loss.detach(), gradient


def check(formula, student: Tensor, teacher: Tensor, grad: Tensor, loss: Tensor, gradient: Tensor) -> None:
    acc = budget.accumulator(student, teacher)
    assert (loss.dtype, gradient.dtype, gradient.stride()) == (acc, student.dtype, student.stride())
    right = truth(formula, student, teacher, grad, F64)
    eager = truth(formula, student, teacher, grad, acc)
    for what, got, plain, want in zip(("loss", "gradient"), (loss, gradient), eager, right, strict=True):
        assert got.shape == want.shape
        budget.assert_within(what, got, plain, want, acc, unit=want.abs().max().item())


def run_nfd(student: Tensor, teacher: Tensor, dims: str, eps: float = 1e-5):
    args = (student, teacher, dims, eps, "none", 1.0)
    loss, stats = nfd.forward(*args)
    grad = torch.randn_like(loss)
    return grad, loss, nfd.backward(grad, *args, stats)


def run_cwd(student: Tensor, teacher: Tensor, temperature: float):
    args = (student, teacher, temperature, "none", 1.0)
    loss, stats = cwd.forward(*args)
    grad = torch.randn_like(loss)
    return grad, loss, cwd.backward(grad, *args, stats)


def run_kd(student: Tensor, teacher: Tensor, temperature: float, target=None, weight=None, ignore_index=255):
    loss, _ = kd.forward(student, teacher, target, weight, temperature, ignore_index, "none", 1.0)
    grad = torch.randn_like(loss)
    upstream = grad if weight is None else grad * weight
    return grad, loss, kd.gradient(student, teacher, target, upstream, temperature, ignore_index, "sum", 1.0)[2]


@each_problem("dims", "hw", "nhw", "c", "chw")
def test_nfd(dims, cut, shape, student, teacher, layout):
    s, t = maps(shape, student, teacher, layout)
    check(lambda s, t: reference.nfd(s, t, dims, 1e-5), s, t, *run_nfd(s, t, dims))


@each_problem("temperature", 4.0, 0.7)
def test_cwd(temperature, cut, shape, student, teacher, layout):
    s, t = maps(shape, student, teacher, layout, scale=3.0)
    check(lambda s, t: reference.cwd(s, t, temperature), s, t, *run_cwd(s, t, temperature))


@each_problem("pixels", "weighted", "labelled")
def test_kd(pixels, cut, shape, student, teacher, layout):
    n, c, h, w = shape
    s, t = maps(shape, student, teacher, layout, scale=3.0)
    temperature, weight, target = 4.0, None, None
    if pixels == "weighted":
        temperature = 1.0
        weight = torch.rand(n, h, w, dtype=F64 if s.dtype == F64 else F32, device=DEVICE)
    else:  # some labels are ignored, some out of range
        target = torch.randint(0, min(c + 2, 256), (n, h, w), device=DEVICE)
        target[torch.rand(n, h, w, device=DEVICE) < 0.2] = 255
        target = target.to(torch.uint8)

    def formula(s, t):
        loss = reference.kd(s, t, temperature) * (1 if weight is None else weight)
        return loss if target is None else torch.where(reference.valid_pixels(target, c, 255), loss, 0)

    check(formula, s, t, *run_kd(s, t, temperature, target, weight))


@each_layout
@each_cut
@pytest.mark.parametrize("dims", ["hw", "nhw", "c", "chw"])
def test_nfd_far_from_zero(dims, cut, layout):
    """mean| / std = 1e6: the gradient is within 0.1 %."""
    s, t = maps((2, 20, 5, 9), layout=layout, scale=1e-2, offset=1e4)
    grad, loss, gradient = run_nfd(s, t, dims, 1e-12)
    want, want_gradient = truth(lambda s, t: reference.nfd(s, t, dims, 1e-12), s, t, grad, F64)
    torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=1e-6)
    assert (gradient.double() - want_gradient).norm() <= 1e-3 * want_gradient.norm()


@each_cut
@pytest.mark.parametrize("dims", ["hw", "nhw", "c", "chw"])
def test_nfd_near_convergence(dims, cut):
    """The loss is a difference of large numbers: its absolute error is below 1e-6."""
    s, _ = maps((1, 10, 5, 17), scale=100.0, offset=30.0)
    for noise in (0.0, 1e-3, 1e-1):
        t = 0.5 * s + noise * torch.randn_like(s)
        loss, _ = nfd.forward(s, t, dims, 1e-5, "none", 1.0)
        assert (loss - reference.nfd(s.double(), t.double(), dims, 1e-5)).abs().max() < 1e-6


@each_cut
def test_outlier_first(cut):
    """The reference value of all means may itself be an outlier."""
    s, t = maps((1, 2, 30, 40))
    s[..., 0, 0] = 1e4
    for dims in ("hw", "chw", "nhw"):
        check(lambda s, t: reference.nfd(s, t, dims, 1e-5), s, t, *run_nfd(s, t, dims))  # noqa: B023


@each_cut
@each_layout
def test_masked_teacher(cut, layout):
    """A teacher logit of -inf is probability 0 and contributes 0, also if a whole tile or chunk is -inf."""
    s, t = maps((1, 70, 3, 5), layout=layout)
    t[:, :40] = -torch.inf
    check(lambda s, t: reference.kd(s, t, 2.0), s, t, *run_kd(s, t, 2.0))
    s, t = maps((1, 2, 16, 51), layout=layout)
    t[:, :, :8] = -torch.inf
    check(lambda s, t: reference.cwd(s, t, 2.0), s, t, *run_cwd(s, t, 2.0))


@pytest.mark.parametrize("cut", ["shipped", "chunks"], indirect=True)
@each_layout
def test_same_maps(cut, layout):
    """Divergence and gradient of equal maps are exactly 0, also with masked classes and large offsets."""
    s, _ = maps((1, 21, 5, 7), layout=layout, scale=30.0, offset=1e3)
    for temperature in (1.0, 3.0):
        for _, loss, gradient in (run_kd(s, s, temperature), run_cwd(s, s, temperature)):
            assert not loss.any()
            assert not gradient.any()
    s[:, 3] = -torch.inf
    assert not run_kd(s, s, 2.0)[1].any()


def test_kd_labels():
    """Every label dtype; out-of-range labels are ignored and cause no read."""
    s, t = maps((2, 4, 6, 7))
    want = reference.kd(s.double(), t.double(), 1.0)
    signed = {torch.int32: [-(2**31), -100, -1, 2**31 - 1], torch.int64: [-(2**63), -100, 2**40, 2**63 - 1]}
    for dtype in (torch.uint8, torch.int32, torch.int64):
        bad = [4, 200, 255, *signed.get(dtype, [])]
        target = torch.arange(84, device=DEVICE).reshape(2, 6, 7) % 4
        for i, label in enumerate(bad):
            target.view(-1)[3 * i] = label
        target = target.to(dtype)
        for ignore_index in (255, 2, -100):
            valid = (target >= 0) & (target < 4) & (target != ignore_index)
            loss, count = kd.forward(s, t, target, None, 1.0, ignore_index, "none", 1.0)
            assert count == valid.sum()
            torch.testing.assert_close(loss.double(), torch.where(valid, want, 0), rtol=1e-5, atol=1e-6)
            _, count, gradient = kd.gradient(s, t, target, None, 1.0, ignore_index, "mean", 1.0)
            assert count == valid.sum()
            assert not gradient.movedim(1, 3)[~valid].any()
    target.fill_(255)
    s[0, 0, 0, 0] = torch.nan  # an ignored pixel may hold anything
    for reduction in ("sum", "mean"):
        loss, count, gradient = kd.gradient(s, t, target, None, 1.0, 255, reduction, 1.0)
        assert (loss, count) == (0, 0)
        assert not gradient.any()


@pytest.mark.parametrize("shape", [(2, 19, 5, 7), (1, 150, 3, 41)])
@pytest.mark.parametrize("labelled", [False, True], ids=["all", "labelled"])
def test_kd_reductions(shape, labelled):
    """Sum, mean and count, and the gradients, match those of the map; ``scale`` multiplies both."""
    n, c, h, w = shape
    s, t = maps(shape)
    weight = torch.rand(n, h, w, device=DEVICE)
    target = torch.randint(0, c + 3, (n, h, w), dtype=torch.int32, device=DEVICE) if labelled else None
    options = (target, weight, 2.0, 1)
    terms, count = kd.forward(s, t, *options, "none", 1.0)
    valid = torch.ones_like(terms) if target is None else reference.valid_pixels(target, c, 1)
    every = kd.gradient(s, t, *options, "sum", 1.0)[2]
    for reduction, by in (("sum", 0.7), ("mean", 0.7 / valid.sum().item())):
        loss, same_count = kd.forward(s, t, *options, reduction, 0.7)
        early, another_count, gradient = kd.gradient(s, t, *options, reduction, 0.7)
        assert torch.equal(loss, early)
        assert count == same_count == another_count == valid.sum()
        torch.testing.assert_close(loss, (terms.double().sum() * by).float())
        torch.testing.assert_close(gradient, every * by)


@pytest.mark.parametrize("dims", ["hw", "nhw", "c", "chw"])
def test_group_sums(dims):
    """The sum equals that of the groups; a 0-d upstream gradient applies to all groups; ``scale`` multiplies both."""
    s, t = maps((3, 20, 9, 13))
    for run, args in ((nfd, (s, t, dims, 1e-5)), (cwd, (s, t, 2.0))):
        terms, stats = run.forward(*args, "none", 0.5)
        loss, same_stats = run.forward(*args, "sum", 0.5)
        torch.testing.assert_close(loss, terms.double().sum().float())
        assert torch.equal(stats, same_stats)
        everywhere = run.backward(torch.full_like(terms, 1.7), *args, "none", 0.5, stats)
        assert torch.equal(run.backward(torch.tensor(1.7, device=DEVICE), *args, "sum", 0.5, stats), everywhere)


@pytest.mark.parametrize("min_kept", [0, 30])
def test_ohem_computes_one_confidence(min_kept, monkeypatch):
    launch, names = rdd.launch, []

    def counted(kernel, grid, *args, **constants):
        names.append((kernel.fn.__name__ if hasattr(kernel, "fn") else kernel.__name__, grid))
        launch(kernel, grid, *args, **constants)

    monkeypatch.setattr(rdd, "launch", counted)
    student, teacher = maps((1, 3, 4, 5))
    target = torch.randint(0, 3, (1, 6, 9), device=DEVICE)
    for select, expected in (("student", 1), ("xor", 2)):
        names.clear()
        rdd.difficulty_lse(student, teacher, target, 0.3, min_kept, "label", select, 255, False)
        assert sum(name == "_confidence" for name, _ in names) == expected
        assert {grid[1] for name, grid in names if name == "_histogram"} == ({expected} if min_kept else set())


def test_nan_propagates():
    s, t = maps((2, 5, 7, 9))
    s[1, 2, 3, 4] = torch.nan
    assert torch.equal(
        nfd.forward(s, t, "hw", 1e-5, "none", 1.0)[0].isnan().nonzero(), torch.tensor([[1, 2]], device=DEVICE)
    )
    assert torch.equal(cwd.forward(s, t, 4.0, "none", 1.0)[0].isnan().nonzero(), torch.tensor([[1, 2]], device=DEVICE))
    loss, _ = kd.forward(s, t, None, None, 1.0, 255, "none", 1.0)
    assert torch.equal(loss.isnan().nonzero(), torch.tensor([[1, 3, 4]], device=DEVICE))


def test_constant_maps():
    """Variance 0: the loss is 0 and eps keeps the gradient finite."""
    s = torch.full((2, 3, 8, 9), 7.0, device=DEVICE)
    for dims in ("hw", "nhw", "c", "chw"):
        _, loss, gradient = run_nfd(s, s + 1, dims)
        assert not loss.any()
        assert not gradient.any()


@pytest.mark.promise("triton-bits")
@pytest.mark.parametrize("cut", ["shipped", "chunks"], indirect=True)
def test_same_bits_every_time(cut):
    s, t = maps((1, 5, 11, 13), BF16, F32)

    def everything():
        torch.manual_seed(1)
        target = torch.randint(0, 5, (1, 11, 13), device=DEVICE)
        nfds = [x for dims in ("hw", "nhw", "c", "chw") for x in run_nfd(s, t, dims)]
        reduced = kd.gradient(s, t, target, None, 2.0, 255, "mean", 1.0)
        return [*nfds, *run_cwd(s, t, 4.0), *run_kd(s, t, 2.0, target), *reduced]

    assert all(torch.equal(a, b) for a, b in zip(everything(), everything(), strict=True))


def test_registered():
    """The operators have the schemas of ``fastkd.ops``, and respect a map's storage offset."""
    s, t = (torch.cat([torch.zeros(1, device=DEVICE), x.flatten()])[1:].view(x.shape) for x in maps((1, 5, 6, 7)))
    assert backends.why_not("triton") is None  # loads it
    ops, group = torch.ops.fastkd_triton, ("none", 1.0)
    nfds = ops.nfd_forward(s, t, "hw", 1e-5, *group)
    assert torch.equal(nfds[0], nfd.forward(s.clone(), t.clone(), "hw", 1e-5, *group)[0])
    assert torch.equal(ops.cwd_forward(s, t, 4.0, *group)[1], cwd.forward(s.clone(), t.clone(), 4.0, *group)[1])
    options = (None, None, 2.0, 255, "sum", 1.0)
    assert torch.equal(ops.kd_gradient(s, t, *options)[2], kd.gradient(s.clone(), t.clone(), *options)[2])


def test_a_long_sum_of_equal_terms_does_not_drift(monkeypatch):
    """One lane adds all label pixels of a cell: 144 equal terms, and 144 equal class weights."""
    monkeypatch.setattr(planning, "PROGRAMS", 1)
    planning._plan.cache_clear()
    # For these, the roundings of a sequential sum all have the same sign.
    logits, student, teacher = (
        torch.tensor(x, device=DEVICE).view(1, 2, 1, 1) for x in ([0.0, 0.2], [-0.7, 0.0], [1.5, 0.0])
    )
    target = torch.ones(1, 8, 18, dtype=torch.uint8, device=DEVICE)
    weight = torch.tensor([1.0, 0.866], device=DEVICE)

    def losses(x, s, t):
        return (
            fastkd.resized_cross_entropy(x, target, class_weight=weight, align_corners=True),
            fastkd.resized_kd_loss(s, t, size=target.shape[1:], align_corners=True),
        )

    with fastkd.use_backend("triton"):
        got = losses(logits, student, teacher)
    with fastkd.use_backend("reference"):
        want = losses(logits.double(), student.double(), teacher.double())
    planning._plan.cache_clear()
    for one, true in zip(got, want, strict=True):
        assert abs(one.double() / true - 1) < 1e-6

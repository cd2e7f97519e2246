"""The CUDA kernels on an emulated GPU: plans, and the kernels themselves, thread by thread."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import reference
from fastkd._arguments import dense_together
from fastkd.ops import nfd

from . import emulation

if not emulation.RUNNING:
    pytest.skip("make test runs it with FASTKD_CUDA_EMULATION", allow_module_level=True)

DIMS = ("hw", "nhw", "c", "chw")
ROOT_OF_TESTS = Path(__file__).parent
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
ORDERS = ("forwards", "backwards", "random")
# A full H100, sizes in bytes; clusters also for groups of one element.
H100 = {
    "shared_per_block": 227 << 10,
    "shared_per_cores": 228 << 10,
    "multiprocessors": 132,
    "cluster": 8,
    "smallest": 1,
    "smallest_budget": 8 << 20,
}
# A group needs several blocks that nearly fill a multiprocessor; no clusters; a quarter of a GPU.
SMALL = {**H100, "shared_per_block": 24 << 10, "shared_per_cores": 25 << 10, "multiprocessors": 1}
STREAMING = {**H100, "cluster": 0}
QUARTER = {**H100, "cluster": 2}
# Little extra memory and few multiprocessors: maps are split into chunks of rows, and cells stay whole.
CHUNKS = {**H100, "multiprocessors": 1, "smallest_budget": 1}


def plans():
    return torch.ops.fastkd_cuda_emulation


@pytest.fixture(autouse=True)
def configured():
    """Every test starts with the same GPU."""
    assert fastkd.backends.why_not("cuda") is None
    configure(H100)


def configure(gpu: dict, order: str = "random") -> None:
    plans().configure(*gpu.values(), order)


def table(name: str, *sizes: int) -> list[list[int]]:
    return getattr(plans(), name)(torch.empty(0), *sizes).tolist()


# Plans

LENGTHS = (1, 2, 7, 31, 64, 255, 256, 1000, 1024, 4095, 4096, 4097, 20_000, 70_001)


@pytest.mark.parametrize("vector", [1, 4, 8])
def test_rows_are_cut_without_gap_or_overlap(vector):
    for runs, groups, length in itertools.product((1, 2, 5), (1, 3, 33), LENGTHS):
        if length % vector:
            continue
        lines = table("row_units", runs, groups, length, vector)
        end = 0
        parts: dict[int, list[int]] = {}
        for group, part, _, first, count in lines:
            assert first == end
            assert count > 0
            assert count % vector == 0
            assert first // length == (first + count - 1) // length, "a unit lies in one run"
            assert group == first // length % groups
            parts.setdefault(group, []).append(part)
            end = first + count
        assert end == runs * groups * length
        assert all(sorted(p) == list(range(lines[0][2])) for p in parts.values())
        assert len(parts) == groups


@pytest.mark.parametrize("vector", [1, 4, 8])
def test_columns_are_cut_without_gap_or_overlap(vector):
    for outer, rows, inner in itertools.product((1, 3), (1, 2, 33, 64, 300, 2000), (8, 16, 40, 64, 200, 264)):
        covered = torch.zeros(outer, rows, inner, dtype=torch.int8)
        parts: dict[tuple[int, int], list[int]] = {}
        lines = table("column_blocks", outer, rows, inner, vector)
        for o, column, width, part, _, first, last in lines:
            covered[o, first:last, column : column + width] += 1
            parts.setdefault((o, column), []).append(part)
            assert last > first
            assert column < inner
        assert covered.eq(1).all()
        assert all(sorted(p) == list(range(lines[0][4])) for p in parts.values())


@pytest.mark.parametrize("gpu", [H100, SMALL, QUARTER])
@pytest.mark.parametrize("size", [2, 4])
def test_shares_of_a_cluster_are_complete(gpu, size):
    """Every element is copied once, to its place in the group, in pieces that are valid bulk copies."""
    configure(gpu)
    fitted = 0
    vector = 16 // size
    for runs, groups, length in itertools.product((1, 2, 7), (1, 2, 9), (8, 16, 72, 256, 1000, 2048, 5000, 40_000)):
        lines = table("row_pieces", runs, groups, length, size)
        if length % vector or not lines:
            continue
        fitted += 1
        copied = torch.zeros(runs * groups * length, dtype=torch.int8)
        ends: dict[int, int] = {}
        for group, rank, stage, offset, element, count, shared in lines:
            copied[offset : offset + count] += 1
            run, within = divmod(element, length)
            assert offset == (run * groups + group) * length + within
            assert element == ends.get(group, 0), "ranks and stages follow each other"
            assert count % vector == offset % vector == element % vector == 0
            assert rank < gpu["cluster"]
            assert stage < 4
            assert shared <= gpu["shared_per_block"]
            ends[group] = element + count
        assert copied.eq(1).all()
        assert ends == {group: runs * length for group in range(groups)}
    assert fitted > 30


def test_too_large_or_uneven_groups_stream():
    assert not table("row_pieces", 1, 2, 8 * 227 * 1024 // 4, 4), "8 blocks hold less than S and T"
    assert table("row_pieces", 1, 2, 8 * 200 * 1024 // 8, 4)
    assert not table("row_pieces", 1, 2, 4099, 4), "not a multiple of 16 bytes"
    configure(STREAMING)
    assert not table("row_pieces", 1, 2, 4096, 4), "no clusters before sm_90"
    configure({**H100, "smallest": 4096})
    assert not table("row_pieces", 1, 2, 2048, 4)


SHAPES = (
    (2, 3, 64, 128), (2, 3, 64, 64), (1, 3, 127, 65), (1, 3, 90, 92), (2, 1, 677, 677), (1, 1, 448, 1024), (1, 1, 448, 1032),
    (1, 1, 448, 512), (1, 2, 448, 520), (1, 2, 896, 512), (4, 8, 16, 32), (4, 32, 16, 16), (16, 8, 16, 32), (16, 32, 16, 16),
    (1, 8192, 1, 1), (1, 8200, 2, 1), (1, 8196, 1, 2), (2, 8, 1, 1024), (2, 1, 1024, 8), (2, 19, 61, 67),
)  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_python_knows_which_groups_are_read_once(dtype, layout):
    """The choice of the backend agrees with the plan of a full H100."""
    reads = []
    for shape, dims, other in itertools.product(SHAPES, DIMS, (dtype, torch.bfloat16)):
        pair = [torch.empty(shape, dtype=t) for t in (dtype, other)]
        if layout == "nhwc":
            n, c, h, w = shape
            pair = [x.view(n, h, w, c).permute(0, 3, 1, 2) for x in pair]
        student, teacher = dense_together(*pair)
        reads.append(plans().nfd_reads(student, teacher, dims).item())
        once = dtype == other != torch.float64 and nfd._read_once(student, dims)
        assert once == reads[-1], (shape, dims, other)
        columns = dtype == other != torch.float64 and nfd._in_columns(student, dims)
        assert not (once and columns)
        assert nfd.fits_cuda(student, teacher, dims) == (once or columns)
    assert set(reads) == ({0} if dtype == torch.float64 else {0, 1})


# The kernels


def maps(shape, layout: str, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(shape, generator=g, dtype=torch.float64)
    teacher = 0.7 * student + 0.7 * torch.randn(shape, generator=g, dtype=torch.float64) + 3
    return tuple(x.to(dtype).to(memory_format=LAYOUTS[layout]) for x in (student, teacher))


def run_nfd(student, teacher, dims) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, stats, and the gradient of the streaming backward for a grad of 1.7 per group."""
    ops = torch.ops.fastkd_cuda
    args = (student, teacher, dims, 1e-5, "none", 1.0)
    loss, stats = ops.nfd_forward(*args)
    return loss, stats, ops.nfd_backward(torch.full_like(loss, 1.7), *args, stats)


def close_to_the_formula(student, teacher, dims, loss, gradient) -> None:
    true = student.double().requires_grad_()
    value = reference.nfd(true, teacher.double(), dims, 1e-5)
    value.backward(torch.full_like(value, 1.7))
    eps = torch.finfo(student.dtype).eps
    torch.testing.assert_close(loss.double(), value.detach(), rtol=1e-6, atol=1e-6)
    assert (gradient.double() - true.grad).norm() <= (eps + 1e-6) * true.grad.norm() + 1e-6 * eps


@pytest.mark.parametrize("gpu", [H100, SMALL, STREAMING], ids=["cluster", "small", "streaming"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dims", DIMS)
def test_small_sizes(gpu, layout, dims):
    """Channels and pixels around the vector's 4 and 8 elements, warp and block size; each dtype occurs in each."""
    configure(gpu)
    dtypes = itertools.cycle((torch.float32, torch.bfloat16, torch.float16, torch.float64))
    for n, c, (h, w) in itertools.product((1, 2), (1, 4, 8, 9, 40), ((1, 1), (1, 8), (3, 3), (4, 8), (8, 33))):
        student, teacher = maps((n, c, h, w), layout, next(dtypes))
        loss, _, gradient = run_nfd(student, teacher, dims)
        if (c if dims == "c" else h * w) > 1:  # in a group of one element everything is 0
            close_to_the_formula(student, teacher, dims, loss, gradient)
        else:
            assert not loss.isnan().any()


LARGE = [
    ((1, 2, 96, 100), "nchw"),  # several chunks, or a cluster of several blocks
    ((3, 2, 40, 48), "nchw"),
    ((1, 72, 12, 20), "nhwc"),  # incomplete strips
    ((1, 16, 45, 50), "nhwc"),
    ((1, 3, 61, 67), "nchw"),  # no vectors
]


@pytest.mark.parametrize("gpu", [H100, SMALL, STREAMING], ids=["cluster", "small", "streaming"])
@pytest.mark.parametrize(("shape", "layout"), LARGE)
@pytest.mark.parametrize("dims", DIMS)
def test_any_order_of_threads_gives_the_same_bits(gpu, shape, layout, dims):
    """A result that depends on the order has a missing barrier; it is also compared with the formula."""
    dtype = (torch.float32, torch.bfloat16)[DIMS.index(dims) % 2]
    student, teacher = maps(shape, layout, dtype)
    results = []
    for order in ORDERS:
        configure({**gpu, "smallest": 256}, order)
        results.append(run_nfd(student, teacher, dims))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    close_to_the_formula(student, teacher, dims, results[0][0], results[0][2])


@pytest.mark.parametrize("gpu", [H100, SMALL, QUARTER, STREAMING], ids=["cluster", "small", "quarter", "streaming"])
@pytest.mark.parametrize(("shape", "layout"), LARGE)
@pytest.mark.parametrize("dims", DIMS)
def test_an_early_gradient_has_the_bits_of_the_backward(gpu, shape, layout, dims):
    """One read (groups that are rows and fit a cluster) and two kernels give the same results."""
    ops = torch.ops.fastkd_cuda
    turn = DIMS.index(dims) + LARGE.index((shape, layout))
    configure({**gpu, "smallest": 256}, ORDERS[turn % 3])
    student, teacher = maps(shape, layout, (torch.float32, torch.bfloat16, torch.float16)[turn % 3])
    args = (student, teacher, dims, 1e-5, "sum", 1.7)
    loss, stats, early = ops.nfd_gradient(*args)
    assert torch.equal(early, ops.nfd_backward(torch.ones(()), *args, stats))
    want_loss, want_stats = ops.nfd_forward(*args)
    torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats, want_stats, rtol=1e-5, atol=1e-5)
    terms, _ = ops.nfd_forward(*args[:4], "none", 1.7)
    torch.testing.assert_close(terms.double().sum(), want_loss.double(), rtol=1e-6, atol=1e-6)


# KD


def kd_inputs(shape, layout: str, dtype: torch.dtype):
    student, teacher = maps(shape, layout, dtype)
    labels = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=torch.Generator().manual_seed(1))
    labels[:, ::3] = 255
    return student, teacher, labels


def test_tiles_of_pixels_fit():
    """Pixels per block decrease with the classes, down to one; each pixel is in one tile; 4096 classes fit every
    chip."""
    sm_86 = {**H100, "shared_per_block": 99 << 10, "shared_per_cores": 100 << 10, "cluster": 0}
    for gpu in (H100, sm_86, SMALL):
        configure(gpu)
        for classes, dtype in itertools.product(
            (1, 19, 150, 1000, 4096), (torch.float32, torch.bfloat16, torch.float64)
        ):
            for layout in LAYOUTS:
                x = torch.empty((2, classes, 5, 16), dtype=dtype).to(memory_format=LAYOUTS[layout])
                pixels, tiles, inner, shared = plans().kd_tiles(x).flatten().tolist()
                if pixels == 0:
                    assert gpu is SMALL
                    assert classes == 4096
                    continue
                assert pixels & (pixels - 1) == 0
                assert (tiles - 1) * pixels < inner <= tiles * pixels
                assert shared <= gpu["shared_per_block"]
                assert inner == (2 * 80 if not x.is_contiguous() else 80)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 19, 9, 16), (1, 150, 5, 8), (1, 600, 3, 5)])
def test_kd_in_any_order_is_the_formula(shape, layout, dtype):
    """The forward, and loss and gradient in one kernel, are bitwise equal in any order of threads."""
    ops = torch.ops.fastkd_cuda
    student, teacher, labels = kd_inputs(shape, layout, dtype)
    args = (student, teacher, labels, None, 2.0, 255, "mean", 1.7)
    results = []
    for order in ORDERS:
        configure(H100, order)
        loss, count, gradient = ops.kd_gradient(*args)
        assert torch.equal(ops.kd_forward(*args)[0], loss)
        assert count == (labels != 255).sum()
        results.append((loss, gradient))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    x = student.double().requires_grad_()
    with fastkd.use_backend("reference"):
        true = 1.7 * fastkd.kd_loss(x, teacher.double(), temperature=2.0, target=labels)
    true.backward()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(results[0][0].double(), true.detach(), rtol=1e-5, atol=1e-6)
    assert (results[0][1].double() - x.grad).norm() <= (eps + 2e-6) * x.grad.norm()


# Losses at label resolution


@pytest.mark.parametrize("align_corners", [False, True])
def test_cells_are_those_of_exact_fractions(align_corners):
    for size_in, size_out in itertools.product((1, 2, 3, 5, 8, 9), (1, 2, 3, 4, 7, 9, 24, 65)):
        lines = plans().axis_cells(torch.empty(0), size_in, size_out, align_corners).tolist()
        cells = []
        for x in range(size_out):
            position = (
                Fraction(size_in - 1, max(size_out - 1, 1)) * x
                if align_corners
                else Fraction((2 * x + 1) * size_in, 2 * size_out) - Fraction(1, 2)
            )
            cells.append(min(math.floor(position), size_in - 1))
        assert [cell for cell, *_ in lines] == cells
        for x, (cell, first, end, largest) in enumerate(lines):
            assert cells.index(cell) == first <= x < end == first + cells.count(cell)
            assert cells.count(cell) <= largest


SIZES = [  # of student, teacher and labels
    ((4, 6), (4, 6), (32, 48)),
    ((5, 6), (5, 6), (41, 51)),
    ((3, 3), (3, 3), (25, 25)),
    ((1, 1), (1, 1), (70, 90)),
    ((9, 11), (9, 11), (4, 5)),
    ((5, 4), (5, 4), (5, 4)),
    ((2, 3), (5, 1), (40, 60)),
    ((3, 5), (6, 10), (24, 40)),
    ((2, 2), (30, 40), (16, 20)),
]


@pytest.mark.parametrize("gpu", [H100, CHUNKS], ids=["whole", "chunks"])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("size", "teacher_size", "label_size"), SIZES)
def test_every_label_pixel_has_one_thread(gpu, align_corners, size, teacher_size, label_size):
    """In the cell that contains it, for both maps."""
    configure(gpu)
    student, teacher = torch.empty(2, 3, *size), torch.empty(2, 3, *teacher_size)
    axes = [
        [row[0] for row in plans().axis_cells(torch.empty(0), size_in, size_out, align_corners).tolist()]
        for sizes in (size, teacher_size)
        for size_in, size_out in zip(sizes, label_size, strict=True)
    ]
    covered = torch.zeros(2, *label_size, dtype=torch.int8)
    for n, *cells, top, bottom, left, right in (
        plans().cell_parts(student, teacher, *label_size, align_corners).tolist()
    ):
        covered[n, top:bottom, left:right] += 1
        for axis, cell, (begin, end) in zip(axes, cells, [(top, bottom), (left, right)] * 2, strict=True):
            assert set(axis[begin:end]) == {cell}
    assert covered.eq(1).all()


def test_cells_fill_the_device_and_keep_within_their_memory():
    # A batch of one uses smaller parts.
    for n, size, labels in ((1, (64, 128), (512, 1024)), (16, (64, 64), (512, 512))):
        logits = torch.empty(n, 19, *size)
        rows, columns, team, sets, lines, chunk, scratch, warps = (
            plans().cells_plan(logits, logits, *labels, False).flatten().tolist()
        )
        assert (rows, columns, sets) == (4, 8, 1)
        assert warps >= 16 * 132 or team == 8, "or parts of one row of label pixels"
        assert chunk == lines, "one chunk"
        assert scratch <= 0.03 * 2 * 12 * n * 19 * labels[0] * labels[1]
    shape = plans().cells_plan(torch.empty(16, 19, 64, 64), torch.empty(16, 19, 64, 64), 512, 512, True)[0, :2]
    assert shape.tolist() == [5, 9], "8.11 label pixels per cell"
    # Low ratios need more memory per label pixel, and are split into chunks.
    logits = torch.empty(8, 19, 256, 256)
    *_, lines, chunk, scratch, _ = plans().cells_plan(logits, logits, 512, 512, False).flatten().tolist()
    assert chunk < lines
    assert scratch <= max(8 << 20, 0.03 * 2 * 12 * 8 * 19 * 512 * 512)


def resized_inputs(c: int, size: tuple[int, int], label_size: tuple[int, int], dtype, layout="nchw"):
    student, teacher = maps((2, c, *size), layout, dtype)
    g = torch.Generator().manual_seed(1)
    target = torch.randint(0, c, (2, *label_size), generator=g)
    target[torch.rand(target.shape, generator=g) < 0.2] = 255
    return student, teacher, target


class Call(NamedTuple):
    """An operator, its arguments, and the loss of fp64 logits by the reference."""

    op: str
    args: tuple
    formula: Callable[[Tensor], Tensor]

    def gradient(self) -> tuple[Tensor, Tensor, Tensor]:
        return getattr(torch.ops.fastkd_cuda, f"{self.op}_gradient")(*self.args)

    def loss(self) -> Tensor:
        return getattr(torch.ops.fastkd_cuda, f"{self.op}_forward")(*self.args)[0]


def resized_calls(student, teacher, target, class_weight, pixel_weight, selected, align_corners) -> dict[str, Call]:
    options = {"align_corners": align_corners}
    size = target.shape[-2:]
    elements = torch.stack([torch.where(target == 255, 255, target == c) for c in range(student.shape[1])], 1)

    def cross_entropy(x, selected=None, **shape):
        weight = pixel_weight
        if selected is not None:
            weight = reference.resize(weight.double(), size, align_corners) * selected
        terms, _, counted = reference.cross_entropy(
            reference.resize(x, size, align_corners), target, class_weight, 255, **shape
        )
        if weight is not None:
            terms = terms * reference.resize(weight.to(x.dtype), size, align_corners)
        return terms.sum() / (counted if selected is None else counted * selected).sum()

    def kd(x, activation="softmax"):
        return fastkd.resized_kd_loss(
            x,
            teacher.double(),
            size=size,
            target=target,
            pixel_weight=pixel_weight,
            temperature=2.0,
            activation=activation,
            **options,
        )

    def binary(x):
        weights = {"pos_weight": class_weight, "pixel_weight": pixel_weight}
        return fastkd.resized_binary_cross_entropy(x, elements, **weights, **options)

    labels = (student, target, class_weight, pixel_weight)
    kd_args = (student, teacher, target, pixel_weight, size, 2.0, 255, align_corners, "mean", 1.7)
    smoothing, focal = {"label_smoothing": 0.1}, {"focal_gamma": 1.5}
    shaped = (*labels, 255, align_corners)
    each_weight = None if pixel_weight is None else pixel_weight[:, None]
    return {
        "cross-entropy": Call(
            "resized_cross_entropy",
            (*labels, selected, 255, align_corners, "mean", 1.7),
            lambda x: cross_entropy(x, selected),
        ),
        "smoothing": Call(
            "resized_shaped_cross_entropy", (*shaped, 0.1, 0.0, "mean", 1.7), lambda x: cross_entropy(x, **smoothing)
        ),
        "focal": Call(
            "resized_shaped_cross_entropy", (*shaped, 0.0, 1.5, "mean", 1.7), lambda x: cross_entropy(x, **focal)
        ),
        "kd": Call("resized_kd", kd_args, kd),
        "kd, sigmoid": Call("resized_kd_sigmoid", kd_args, lambda x: kd(x, "sigmoid")),
        "binary": Call(
            "resized_binary_cross_entropy",
            (student, elements, class_weight, each_weight, 255, align_corners, "mean", 1.7),
            binary,
        ),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("gpu", [H100, CHUNKS], ids=["whole", "chunks"])
@pytest.mark.parametrize(("size", "teacher_size", "label_size"), SIZES)
def test_losses_at_label_resolution_are_the_formula(gpu, align_corners, size, teacher_size, label_size, layout):
    """fp32 against fp64, weighted and selected; the forward is bitwise equal to loss and gradient in one kernel."""
    configure(gpu)
    student, _, target = resized_inputs(4, size, label_size, torch.float32, layout)
    teacher = resized_inputs(4, teacher_size, label_size, torch.float32, layout)[1]
    g = torch.Generator().manual_seed(2)
    class_weight, pixel_weight = torch.rand(4, generator=g) + 0.5, torch.randn(2, 3, 4, generator=g)
    selected = torch.rand(target.shape, generator=g) < 0.8
    calls = resized_calls(student, teacher, target, class_weight, pixel_weight, selected, align_corners)
    for name, call in calls.items():
        loss, _, gradient = call.gradient()
        assert torch.equal(call.loss(), loss), name
        assert gradient.stride() == student.stride()
        x = student.double().requires_grad_()
        with fastkd.use_backend("reference"):
            true = 1.7 * call.formula(x)
        (want,) = torch.autograd.grad(true, x)
        torch.testing.assert_close(loss.double(), true.detach(), rtol=1e-5, atol=2e-6)
        assert (gradient.double() - want).norm() <= 2e-6 * want.norm() + 1e-9, name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gpu", [H100, CHUNKS], ids=["whole", "chunks"])
@pytest.mark.parametrize(
    ("classes", "size", "label_size", "dtype"),
    [
        (19, (6, 20), (41, 160), torch.float32),
        (150, (3, 5), (24, 40), torch.bfloat16),
        (600, (3, 5), (7, 9), torch.float16),
    ],
)
def test_losses_at_label_resolution_in_any_order_of_threads(gpu, classes, size, label_size, dtype, layout):
    student, teacher, target = resized_inputs(classes, size, label_size, dtype, layout)
    weight = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(2))
    for name, call in resized_calls(student, teacher, target, None, weight, None, False).items():
        results = []
        for order in ORDERS:
            configure(gpu, order)
            results.append(call.gradient())
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), name


@pytest.mark.parametrize("gpu", [H100, CHUNKS], ids=["whole", "chunks"])
@pytest.mark.parametrize("masked", [False, True])
def test_pixels_far_below_their_bound_are_exact(gpu, masked):
    """Between logits of different classes that differ by 1000, where all exponentials of a pixel underflow; also
    with masked classes."""
    configure(gpu)
    student, teacher, target = resized_inputs(5, (4, 5), (24, 30), torch.float32)
    student, teacher = 600 * student, 400 * teacher
    if masked:
        student[:, 3] = teacher[:, 3] = -torch.inf
        target[target == 3] = 2
    for name, call in resized_calls(student, teacher, target, None, None, None, False).items():
        loss, _, gradient = call.gradient()
        if masked and name == "smoothing":
            assert loss == torch.inf
            continue
        x = student.double()
        if masked:
            x[:, 3] = -1e30  # plain PyTorch's interpolation turns -inf into NaN
            teacher[:, 3] = -1e30
        x.requires_grad_()
        with fastkd.use_backend("reference"):
            true = 1.7 * call.formula(x)
        (want,) = torch.autograd.grad(true, x)
        torch.testing.assert_close(loss.double(), true.detach(), rtol=1e-5, atol=1e-6)
        assert (gradient.double() - want).norm() <= 1e-4 * want.norm(), name
        if masked:
            teacher[:, 3] = -torch.inf


DICE_OPTIONS = [(square, columns) for square in (False, True) for columns in (3, 4, 5)]


def run_dice(logits, target, align_corners, square, columns) -> tuple[Tensor, Tensor, Tensor]:
    """Sums, and the gradient of the logits from their upstream gradient."""
    ops = torch.ops.fastkd_cuda
    args = (logits, target, 255, align_corners, square, columns, "none", 1.0)
    sums, kept = ops.resized_dice_forward(*args)
    grad = torch.randn(sums.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return sums, grad, ops.resized_dice_backward(grad, *args, kept)


def dice_is_the_formula(logits, target, align_corners, square, columns, tolerance=2e-6) -> None:
    sums, grad, gradient = run_dice(logits, target, align_corners, square, columns)
    x = logits.double().requires_grad_()
    want = reference.dice_sums(reference.resize(x, target.shape[-2:], align_corners), target, 255, square, columns)
    (slope,) = torch.autograd.grad(want, x, grad)
    torch.testing.assert_close(sums, want.detach(), rtol=tolerance, atol=1e-5)
    assert gradient.stride() == logits.stride()
    assert (gradient.double() - slope).norm() <= tolerance * slope.norm() + 1e-9


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("gpu", [H100, CHUNKS], ids=["whole", "chunks"])
@pytest.mark.parametrize(("size", "label_size"), [(size, labels) for size, other, labels in SIZES if size == other])
def test_dice_is_the_formula(gpu, align_corners, size, label_size):
    configure(gpu)
    for turn, (square, columns) in enumerate(DICE_OPTIONS):
        layout = list(LAYOUTS)[turn % 2]
        logits, _, target = resized_inputs(4, size, label_size, torch.float32, layout)
        dice_is_the_formula(logits, target, align_corners, square, columns)


@pytest.mark.parametrize("gpu", [H100, CHUNKS], ids=["whole", "chunks"])
def test_dice_of_many_samples_in_a_warp(gpu):
    """A map of one pixel has four cells, so a warp processes cells of up to nine samples."""
    configure(gpu)
    g = torch.Generator().manual_seed(0)
    for size in ((1, 1), (2, 1), (1, 5)):
        logits = torch.randn(23, 3, *size, generator=g)
        target = torch.randint(0, 4, (23, 4, 7), generator=g)
        dice_is_the_formula(logits, torch.where(target == 3, 255, target), False, True, 5)


@pytest.mark.parametrize("gpu", [H100, CHUNKS], ids=["whole", "chunks"])
@pytest.mark.parametrize(("classes", "dtype"), [(19, torch.float32), (150, torch.bfloat16)])
def test_dice_in_any_order_of_threads(gpu, classes, dtype):
    logits, _, target = resized_inputs(classes, (6, 20), (41, 160), dtype)
    results = []
    for order in ORDERS:
        configure(gpu, order)
        results.append(run_dice(logits, target, False, False, 5))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("gpu", [H100, CHUNKS], ids=["whole", "chunks"])
@pytest.mark.parametrize("square", [False, True])
def test_dice_of_pixels_far_below_their_bound(gpu, square):
    configure(gpu)
    logits, _, target = resized_inputs(5, (4, 5), (24, 30), torch.float32)
    dice_is_the_formula(600 * logits, target, False, square, 5, tolerance=1e-4)


def misaligned(x: Tensor) -> Tensor:
    """A copy whose address is one element past a multiple of 16 bytes."""
    out = torch.empty(x.numel() + 16, dtype=x.dtype)
    first = -out.data_ptr() % 16 // x.element_size() + 1
    return out[first : first + x.numel()].view(x.shape).copy_(x)


def binary_terms(target: Tensor, ignore_index: int) -> None:
    """Terms and count of constant logits, from one word of targets to the next."""
    logits = torch.full((*target.shape[:2], 1, 2), 0.5)
    args = (logits, target, None, None, ignore_index, False, "none", 1.0)
    terms, count = torch.ops.fastkd_cuda.resized_binary_cross_entropy_forward(*args)
    counted = ((target == 0) | (target == 1)) & (target != ignore_index)
    want = torch.where(target == 1, math.log1p(math.exp(-0.5)), math.log1p(math.exp(0.5))) * counted
    assert count == counted.sum()
    torch.testing.assert_close(terms, want.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("aligned", [True, False])
def test_binary_targets_of_any_width(aligned, dtype):
    g = torch.Generator().manual_seed(0)
    ignored = itertools.cycle((255, 0, 1, 2))
    for width in (1, 2, 15, 16, 17, 31, 32, 33, 48, 63, 64, 80, 131):
        target = torch.randint(0, 4, (2, 2, 3, width), generator=g).to(dtype)
        target[target == 3] = 255
        if dtype != torch.uint8:
            target[..., ::7] = torch.iinfo(dtype).max - 254  # its lowest byte is 1
            target[..., 3::7] = -256
        binary_terms(target if aligned else misaligned(target), next(ignored))


@pytest.mark.parametrize(
    ("dtype", "width", "words"), [(torch.uint8, 16, 290_000), (torch.uint8, 80, 150_000), (torch.int32, 65, 150_000)]
)
def test_binary_targets_of_many_words(dtype, width, words):
    """More than the blocks pack at a time: each warp goes on to later rows, and with 3 words to a row to another place."""
    g = torch.Generator().manual_seed(1)
    target = torch.randint(0, 3, (1, 1, words // -(-width // 32), width), generator=g).to(dtype)
    binary_terms(target, 255)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_kd_of_equal_maps_has_no_gradient(dtype):
    student, _, _ = resized_inputs(7, (4, 5), (24, 30), dtype)
    ops = torch.ops.fastkd_cuda
    loss, _, gradient = ops.resized_kd_gradient(student, student, None, None, (24, 30), 2.0, 255, False, "mean", 1.0)
    assert loss == 0
    assert not gradient.any()
    assert not ops.kd_gradient(student, student, None, None, 1.0, 255, "mean", 1.0)[2].any()


# RDD


@pytest.mark.parametrize("min_kept", [0, 300])
@pytest.mark.parametrize("confidence", ["max", "label"])
@pytest.mark.parametrize("select", ["xor", "or", "and", "student", "student_only"])
def test_difficulty_is_the_formula(select, confidence, min_kept):
    ops = torch.ops.fastkd_cuda
    student, _, target = resized_inputs(6, (4, 5), (24, 30), torch.float32)
    teacher = resized_inputs(6, (3, 7), (24, 30), torch.float32)[1]
    target = target.to((torch.uint8, torch.int32, torch.int64)[len(select) % 3])
    args = (target, 0.4, min_kept, confidence, select, 255, True)
    mask, share = ops.difficulty_mask(student, teacher, *args)
    want = reference.difficulty_mask(student.double(), teacher.double(), *args)
    assert (mask != want).sum() <= 1, "a threshold may lie between two roundings"
    assert share == pytest.approx(mask.sum().item() / (target != 255).sum().item(), rel=1e-6)
    lse, again = ops.difficulty_lse(student, teacher, *args)
    assert again == share
    assert torch.equal(lse.isnan(), ~mask)
    true = torch.logsumexp(reference.resize(student.double(), (24, 30), True), 1)
    torch.testing.assert_close(lse[mask].double(), true[mask], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gpu", [H100, CHUNKS], ids=["whole", "chunks"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "scale", "weighted"),
    [
        (torch.float32, 1, True),
        (torch.float32, 600, False),  # neighbours where each other's exponentials underflow
        (torch.bfloat16, 1, False),
        (torch.float64, 1, True),
    ],
)
def test_cross_entropy_of_known_log_sum_exps_is_that_of_the_mask(gpu, layout, dtype, scale, weighted):
    """The log-sum-exps from RDD save a pass over the classes and change only roundings."""
    configure(gpu)
    ops = torch.ops.fastkd_cuda
    student, teacher, target = resized_inputs(6, (4, 5), (24, 30), dtype, layout)
    student = student * scale
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    class_weight, pixel_weight = (
        (torch.rand(n, dtype=acc) + 0.5 for n in ((6,), (2, 3, 4))) if weighted else (None, None)
    )
    selection = (target, 0.25, 0, "label", "student", 255, False)
    mask, _ = ops.difficulty_mask(student, teacher, *selection)
    lse, _ = ops.difficulty_lse(student, teacher, *selection)
    assert 0 < mask.sum() < (target != 255).sum()
    for reduction in ("mean", "sum", "none"):
        tail = (255, False, reduction, 1.7)
        for name in ("forward",) if reduction == "none" else ("forward", "gradient"):
            run = getattr(ops, f"resized_cross_entropy_{name}")
            by_lse, by_mask = (run(student, target, class_weight, pixel_weight, s, *tail) for s in (lse, mask))
            assert torch.equal(by_lse[1], by_mask[1]), "counted"
            for got, want in zip(by_lse[::2], by_mask[::2], strict=True):
                error, size = (got.double() - want.double()).norm(), want.double().norm()
                assert error <= (torch.finfo(got.dtype).eps + 2e-6 * max(1, scale / 10)) * size
        if reduction == "none":
            assert not by_lse[0][~mask].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kth_smallest(dtype):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5000, generator=g, dtype=dtype)
    x[:7] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 1e-40], dtype=dtype)
    x[100:2000] = 0.25
    want = x.sort().values
    for k in (0, 1, 2, 1000, 2500, 4999, 5000, 9000):
        got = torch.ops.fastkd_cuda.kth_smallest(x, k)
        torch.testing.assert_close(got, want[min(max(k, 1), 5000) - 1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kth_smallest_of_any_number_and_alignment(dtype):
    """Around the numbers that a block reads at a time, in vectors of 16 bytes or one by one; each of them counts."""
    for n in (1, 2, 3, 5, 4095, 4096, 4099, 8192, 8195, 16387):
        x = torch.arange(n, dtype=dtype).flip(0)
        for y in (x, misaligned(x)):
            for k in (1, n // 2 + 1, n):
                assert torch.ops.fastkd_cuda.kth_smallest(y, k) == k - 1


def test_kth_smallest_of_more_than_the_blocks_read_at_a_time():
    x = torch.rand(2_300_001, generator=torch.Generator().manual_seed(0))
    for y in (x, misaligned(x)):
        assert torch.ops.fastkd_cuda.kth_smallest(y, 1_500_000) == x.kthvalue(1_500_000).values


def test_mask_of_more_pixels_than_the_blocks_read_at_a_time():
    target = (torch.arange(2_200_000) % 3).to(torch.uint8).view(1, 1100, 2000)
    student, teacher = torch.tensor([[2.0, 0.0], [0.0, 1.0]])[:, None, :, None, None]
    mask, share = torch.ops.fastkd_cuda.difficulty_mask(
        student, teacher, target, 0.8, 0, "max", "student_only", 2, False
    )
    assert not mask.any()
    assert share == 0
    mask, share = torch.ops.fastkd_cuda.difficulty_mask(student, teacher, target, 0.8, 0, "label", "xor", 2, False)
    assert torch.equal(mask, target == 0)
    assert share == pytest.approx((target == 0).sum().item() / (target != 2).sum().item(), rel=1e-6)


# Rescale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rescale(dtype):
    x = torch.randn(3, 5, 7, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    for factor in (1.0, 0.3):
        got = x.clone()
        torch.ops.fastkd_cuda.rescale_(got, torch.tensor(factor, dtype=acc))
        assert torch.equal(got, (x.to(acc) * torch.tensor(factor, dtype=acc)).to(dtype))


# The emulation itself


def test_the_emulation_sees_misuse_and_runs_under_a_fortified_libc(tmp_path):
    """Exchanges at different places or by some lanes only, victims of missing barriers; glibc's checked longjmp is
    not used."""
    out = emulation.run_program(ROOT_OF_TESTS / "emulation_misuse.cpp", tmp_path, "-O2", "-D_FORTIFY_SOURCE=3")
    assert out.split("\n")[:-1] == [
        "sums: 496 1520 496 1520",
        "different masks: emulation: lanes of a warp exchange values at different places",
        "up and xor: emulation: lanes of a warp exchange values at different places",
        "half a warp: emulation: threads wait for each other for ever",
        "beyond the warp: emulation: an exchange with a lane beyond the warp",
        "any: 1 0",
        "ballot: 32 3221225472",
    ]

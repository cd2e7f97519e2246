"""The CUDA kernels on an emulated GPU: how work is cut, and the kernels themselves, thread by thread.

The emulation takes the place of the CUDA backend in its process, so the file runs in one of its own, started by
``test_on_the_emulation``, with the operator suite behind it.
"""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from fastkd.ops._registry import Guess
from torch import Tensor

import fastkd
from fastkd import backends, reference

from . import emulation

needs_emulation = pytest.mark.skipif(not emulation.RUNNING, reason="runs inside test_on_the_emulation")

DIMS = ("hw", "nhw", "c", "chw")
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
ORDERS = ("forwards", "backwards", "random")
# A whole H100, in bytes; groups of one element may go to clusters.
H100 = {
    "shared_per_block": 227 << 10,
    "shared_per_cores": 228 << 10,
    "multiprocessors": 132,
    "cluster": 8,
    "smallest": 1,
}
# Where a group needs several blocks that nearly fill their multiprocessor; no clusters; a quarter of a GPU.
SMALL = {**H100, "shared_per_block": 24 << 10, "shared_per_cores": 25 << 10, "multiprocessors": 1}
STREAMING = {**H100, "cluster": 0}
QUARTER = {**H100, "cluster": 2}
# Tiles of few logits, so that small maps have many of them.
TINY = {**H100, "shared_per_block": 3 << 10, "shared_per_cores": 4 << 10}


@pytest.mark.skipif(emulation.RUNNING, reason="this is the process that it starts")
@pytest.mark.skipif(emulation.compiler() is None, reason="there is no C++ compiler")
def test_on_the_emulation():
    run = emulation.run_tests(*emulation.SUITE)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


def plans():
    return torch.ops.fastkd_cuda_emulation


@pytest.fixture(autouse=True)
def configured():
    """Every test begins with the same GPU."""
    if emulation.RUNNING:
        assert fastkd.backends.why_not("cuda") is None
        configure(H100)


def configure(gpu: dict, order: str = "random") -> None:
    plans().configure(*gpu.values(), order)


def table(name: str, *sizes: int) -> list[list[int]]:
    return getattr(plans(), name)(torch.empty(0), *sizes).tolist()


# ---- how work is cut -------------------------------------------------------------------------------------------------

LENGTHS = (1, 2, 7, 31, 64, 255, 256, 1000, 1024, 4095, 4096, 4097, 20_000, 70_001)


@needs_emulation
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


@needs_emulation
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


@needs_emulation
@pytest.mark.parametrize("gpu", [H100, SMALL, QUARTER])
@pytest.mark.parametrize("size", [2, 4])
def test_shares_of_a_cluster_are_complete(gpu, size):
    """Every element is copied once, to its place in the group, in pieces that bulk copies take."""
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


@needs_emulation
@pytest.mark.parametrize("gpu", [H100, SMALL, QUARTER])
@pytest.mark.parametrize("size", [2, 4])
def test_strips_of_a_cluster_are_complete(gpu, size):
    configure(gpu)
    fitted = 0
    for outer, rows, inner in itertools.product((1, 2), (1, 5, 64, 300, 3000), (8, 16, 64, 72, 320)):
        lines = table("column_shares", outer, rows, inner, size)
        if not lines:
            continue
        fitted += 1
        covered = torch.zeros(outer, rows, inner, dtype=torch.int8)
        for o, column, width, rank, first, last, shared in lines:
            covered[o, first:last, column : column + width] += 1
            assert column < inner
            assert rank < gpu["cluster"]
            assert shared <= gpu["shared_per_block"]
        assert covered.eq(1).all()
    assert fitted > 10


@needs_emulation
def test_too_large_or_uneven_groups_stream():
    assert not table("row_pieces", 1, 2, 8 * 227 * 1024 // 4, 4), "8 blocks hold S and T of less than that"
    assert table("row_pieces", 1, 2, 8 * 200 * 1024 // 8, 4)
    assert not table("row_pieces", 1, 2, 4099, 4), "no multiple of 16 bytes"
    configure(STREAMING)
    assert not table("row_pieces", 1, 2, 4096, 4), "no clusters before sm_90"
    assert not table("column_shares", 1, 300, 64, 4)
    configure({**H100, "smallest": 4096})
    assert not table("row_pieces", 1, 2, 2048, 4)


# ---- the kernels -----------------------------------------------------------------------------------------------------


def maps(shape, layout: str, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(shape, generator=g, dtype=torch.float64)
    teacher = 0.7 * student + 0.7 * torch.randn(shape, generator=g, dtype=torch.float64) + 3
    return tuple(x.to(dtype).to(memory_format=LAYOUTS[layout]) for x in (student, teacher))


def run_nfd(student, teacher, dims) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, stats and the gradient for a grad of 1.7 a group, by the streaming backward."""
    ops = torch.ops.fastkd_cuda
    loss, stats = ops.nfd_forward(student, teacher, dims, 1e-5)
    return loss, stats, ops.nfd_backward(torch.full_like(loss, 1.7), student, teacher, stats, dims)


def close_to_the_formula(student, teacher, dims, loss, gradient) -> None:
    true = student.double().requires_grad_()
    value = reference.nfd(true, teacher.double(), dims, 1e-5)
    value.backward(torch.full_like(value, 1.7))
    eps = torch.finfo(student.dtype).eps
    torch.testing.assert_close(loss.double(), value.detach(), rtol=1e-6, atol=1e-6)
    assert (gradient.double() - true.grad).norm() <= (eps + 1e-6) * true.grad.norm() + 1e-6 * eps


@needs_emulation
@pytest.mark.parametrize("gpu", [H100, SMALL, STREAMING], ids=["cluster", "small", "streaming"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dims", DIMS)
def test_small_sizes(gpu, layout, dims):
    """Channels and pixels around a vector's 4 and 8 elements, a warp's and a block's; each dtype turns up everywhere."""
    configure(gpu)
    dtypes = itertools.cycle((torch.float32, torch.bfloat16, torch.float16, torch.float64))
    for n, c, (h, w) in itertools.product((1, 2), (1, 4, 8, 9, 40), ((1, 1), (1, 8), (3, 3), (4, 8), (8, 33))):
        student, teacher = maps((n, c, h, w), layout, next(dtypes))
        loss, _, gradient = run_nfd(student, teacher, dims)
        if (c if dims == "c" else h * w) > 1:  # a group of one element: everything is 0
            close_to_the_formula(student, teacher, dims, loss, gradient)
        else:
            assert not loss.isnan().any()


LARGE = [
    ((1, 2, 96, 100), "nchw"),  # several chunks, or a cluster of several blocks
    ((3, 2, 40, 48), "nchw"),
    ((2, 72, 24, 40), "nhwc"),  # strips that end early
    ((1, 16, 90, 100), "nhwc"),
    ((1, 3, 61, 67), "nchw"),  # no vectors
]


@needs_emulation
@pytest.mark.parametrize("gpu", [H100, SMALL, STREAMING], ids=["cluster", "small", "streaming"])
@pytest.mark.parametrize(("shape", "layout"), LARGE)
@pytest.mark.parametrize("dims", DIMS)
def test_any_order_of_threads_gives_the_same_bits(gpu, shape, layout, dims):
    """A result that depends on the order misses a barrier; and it is right."""
    dtype = (torch.float32, torch.bfloat16)[DIMS.index(dims) % 2]
    student, teacher = maps(shape, layout, dtype)
    results = []
    for order in ORDERS:
        configure({**gpu, "smallest": 256}, order)
        results.append(run_nfd(student, teacher, dims))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    close_to_the_formula(student, teacher, dims, results[0][0], results[0][2])


@needs_emulation
@pytest.mark.parametrize("gpu", [H100, SMALL, QUARTER], ids=["cluster", "small", "quarter"])
@pytest.mark.parametrize(("shape", "layout"), LARGE[:4])
@pytest.mark.parametrize("dims", DIMS)
def test_one_read_gives_the_bits_of_the_backward(gpu, shape, layout, dims):
    ops = torch.ops.fastkd_cuda
    used = 0
    for dtype, order in zip((torch.float32, torch.bfloat16, torch.float16), ORDERS, strict=True):
        configure({**gpu, "smallest": 256}, order)
        student, teacher = maps(shape, layout, dtype)
        if not ops.nfd_fits(student, teacher, dims):
            continue
        used += 1
        loss, stats, gradient = run_nfd(student, teacher, dims)
        memory = torch.tensor([0.0, 1.7])
        early = ops.nfd_forward_ahead(student, teacher, dims, 1e-5, memory)
        assert all(torch.equal(a, b) for a, b in zip(early, (loss, stats, gradient, memory[1]), strict=True))
        # No guess: nothing is written, and memory that was just allocated is full of NaN.
        nothing = ops.nfd_forward_ahead(student, teacher, dims, 1e-5, torch.full((2,), torch.nan))
        assert torch.equal(nothing[0], loss)
        assert nothing[2].isnan().all()
    group = {"hw": 1, "nhw": shape[0], "chw": shape[1]}.get(dims, 0) * shape[2] * shape[3]
    if gpu is H100 and group:
        assert used == 3


@needs_emulation
@pytest.mark.parametrize(("shape", "layout", "dims"), [((2, 8, 16, 16), "nchw", "hw"), ((1, 16, 20, 24), "nhwc", "hw")])
def test_backward_makes_what_was_guessed_wrong(shape, layout, dims):
    ops = torch.ops.fastkd_cuda
    student, teacher = maps(shape, layout, torch.float32)
    loss, stats, early, guess = ops.nfd_forward_ahead(student, teacher, dims, 1e-5, torch.tensor([1.7, 1.7]))
    grad = torch.full_like(loss, 1.7)
    grad[0, 1] = 2.0
    want = ops.nfd_backward(grad, student, teacher, stats, dims)
    assert not torch.equal(early, want)
    right, memory = early.clone(), torch.tensor([1.7, 1.7])
    ops.nfd_backward_ahead(grad, student, teacher, stats, dims, guess, right, memory)
    assert torch.equal(right, want)
    assert torch.equal(memory, torch.tensor([1.7, 1.7])), "the first group's grad came again"
    # What was guessed right is not touched, whatever is in it.
    marked = torch.full_like(early, 7.0)
    ops.nfd_backward_ahead(torch.full_like(loss, 1.7), student, teacher, stats, dims, guess, marked, memory)
    assert marked.eq(7).all()
    ops.nfd_backward_ahead(torch.full_like(loss, 3.0), student, teacher, stats, dims, guess, marked, memory)
    assert memory[0] == 3
    assert memory[1].isnan(), "a new value is a guess only when it comes twice"


@needs_emulation
def test_gradients_are_right_while_grad_output_changes():
    """Over steps whose loss weight changes now and then, to the bit; the fp16 gradient does not underflow on the way."""
    student, teacher = maps((2, 4, 32, 32), "nchw", torch.float16)
    made = []
    for weight in (1.0, 1.0, 1.0, 65536.0, 65536.0, 65536.0, 3.0, 65536.0):
        x = student.clone().requires_grad_()
        with fastkd.use_backend("cuda"):
            loss = fastkd.nfd_loss(x, teacher)
            node = loss.grad_fn.next_functions[0][0]
            made.append(not node.gradient.isnan().any())
            (loss * weight).backward()
            _, stats = torch.ops.fastkd_cuda.nfd_forward(student, teacher, "hw", 1e-5)
        grad = (torch.full((2, 4), weight) / 8).contiguous()
        assert torch.equal(x.grad, torch.ops.fastkd_cuda.nfd_backward(grad, student, teacher, stats, "hw"))
    assert made == [False, False, True, True, False, True, True, False]


@needs_emulation
def test_equal_losses_of_unequal_weight_have_memories_of_their_own():
    Guess._free.clear()
    student, teacher = maps((1, 4, 16, 16), "nchw", torch.float32)
    made = []
    for _ in range(3):
        x = student.clone().requires_grad_()
        with fastkd.use_backend("cuda"):
            first, second = fastkd.nfd_loss(x, teacher), fastkd.nfd_loss(x, teacher)
            made.append([not loss.grad_fn.next_functions[0][0].gradient.isnan().any() for loss in (first, second)])
            (first + 5 * second).backward()
    assert made == [[False, False], [False, False], [True, True]]


@needs_emulation
def test_graphs_without_a_backward_and_second_backwards():
    student, teacher = maps((1, 4, 16, 16), "nchw", torch.float32)
    with fastkd.use_backend("cuda"):
        for _ in range(3):
            fastkd.nfd_loss(student.clone().requires_grad_(), teacher)  # dropped
        assert max(len(free) for free in Guess._free.values()) <= 2, "a graph that is dropped gives its memory back"
        x = student.clone().requires_grad_()
        loss = fastkd.nfd_loss(x, teacher)
        (first,) = torch.autograd.grad(loss, x, retain_graph=True)
        (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)
    with fastkd.use_backend("cuda"), pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(fastkd.nfd_loss(x, teacher), x, create_graph=True)


# ---- KD --------------------------------------------------------------------------------------------------------------


def kd_inputs(shape, layout: str, dtype: torch.dtype):
    student, teacher = maps(shape, layout, dtype)
    labels = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=torch.Generator().manual_seed(1))
    labels[:, ::3] = 255
    return student, teacher, labels


@needs_emulation
def test_tiles_of_pixels_fit():
    """Fewer pixels a block as classes grow, down to one; each pixel in one tile; 4096 classes on every chip."""
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


@needs_emulation
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 19, 9, 16), (1, 150, 5, 8), (1, 600, 3, 5)])
def test_kd_in_any_order_is_the_formula(shape, layout, dtype):
    """Forward, backward and both in one, with a guess and without, give the same bits in any order of threads."""
    ops = torch.ops.fastkd_cuda
    student, teacher, labels = kd_inputs(shape, layout, dtype)
    args = (student, teacher, labels, None, 2.0, 255)
    results = []
    for gpu, order in ((H100, "forwards"), (H100, "backwards"), (H100, "random")):
        configure(gpu, order)
        loss, count = ops.kd_forward(*args, False)
        one = torch.ones((), dtype=loss.dtype)
        gradient = ops.kd_backward(one * 1.7 / count.to(loss.dtype), *args)
        memory = torch.tensor([1.7, 1.7], dtype=loss.dtype)
        early = ops.kd_forward_ahead(*args, 1.0, True, memory)
        assert torch.equal(early[0], loss)
        assert torch.equal(early[1], count)
        late = torch.full_like(student, 7)
        nan = torch.full_like(one, torch.nan)
        ops.kd_backward_ahead(one * 1.7, *args, 1.0, True, count, nan, late, memory)
        assert torch.equal(early[2], late)
        ops.kd_backward_ahead(
            one * 1.7, *args, 1.0, True, count, early[3], marked := torch.full_like(student, 7), memory
        )
        assert marked.eq(7).all(), "a right guess leaves the gradient alone"
        results.append((loss, gradient, early[2]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    x = student.double().requires_grad_()
    true = fastkd.kd_loss(x, teacher.double(), temperature=2.0, target=labels)
    true.backward(torch.tensor(1.7, dtype=torch.float64))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(results[0][0].double() / (labels != 255).sum(), true.detach(), rtol=1e-5, atol=1e-6)
    assert (results[0][2].double() - x.grad).norm() <= (eps + 2e-6) * x.grad.norm()


@needs_emulation
def test_kd_gradients_are_right_while_labels_and_weights_change():
    """The count of valid pixels changes in every step and is no part of the guess."""
    student, teacher, labels = kd_inputs((2, 19, 8, 16), "nchw", torch.bfloat16)
    made = []
    for step, weight in enumerate((1.0, 1.0, 1.0, 8.0, 8.0, 8.0)):
        labels[0, step] = 255
        x, y = (student.clone().requires_grad_() for _ in range(2))
        with fastkd.use_backend("cuda"):
            loss = fastkd.kd_loss(x, teacher, target=labels)
            made.append(not loss.grad_fn.gradient.isnan().any())
            (weight * loss).backward()
        with fastkd.use_backend("reference"):
            (weight * fastkd.kd_loss(y, teacher, target=labels)).backward()
        assert (x.grad - y.grad).float().norm() <= 0.01 * y.grad.float().norm()
    assert made == [False, False, True, True, False, True]


# ---- losses at label resolution --------------------------------------------------------------------------------------


@needs_emulation
@pytest.mark.parametrize("align_corners", [False, True])
def test_cells_are_those_of_exact_fractions(align_corners):
    for size_in, size_out in itertools.product((1, 2, 3, 5, 8, 9), (1, 2, 3, 4, 7, 9, 24, 65)):
        lines = plans().axis_cells(torch.empty(0), size_in, size_out, align_corners).tolist()
        cells = []
        for x in range(size_out):
            ratio = (
                Fraction(size_in - 1, max(size_out - 1, 1)) * x
                if align_corners
                else Fraction((2 * x + 1) * size_in, 2 * size_out) - Fraction(1, 2)
            )
            cells.append(min(int(max(ratio, 0)), size_in - 1))
        assert [left for left, _, _ in lines] == cells
        for x, (left, first, end) in enumerate(lines):
            assert cells.index(left) == first <= x < end == first + cells.count(left)


@needs_emulation
def test_tiles_of_logits_are_complete():
    """Every class of every logit in one block, which has the cells above and to the left too; all ways to cut turn up."""
    sm_86 = {**H100, "shared_per_block": 99 << 10, "shared_per_cores": 100 << 10, "cluster": 0}
    ways = set()
    for gpu in (H100, sm_86, SMALL, TINY):
        configure(gpu)
        for classes, (h, w), sides in itertools.product(
            (1, 19, 150, 4096), ((1, 1), (5, 3), (17, 70), (33, 9)), (1, 2)
        ):
            if classes == 4096 and (gpu is TINY or w == 70):
                continue
            dtype = torch.float64 if h == 5 else torch.float32
            logits = torch.empty((2, classes, h, w), dtype=dtype)
            lines = plans().resized_tiles(logits, sides, 8 * h, 7 * w).tolist()
            assert lines
            covered = torch.zeros(2, h, w, classes, dtype=torch.int8)
            for n, cell_row, row, last_row, cell_column, column, last_column, c, last_c, shared, held in lines:
                covered[n, row:last_row, column:last_column, c:last_c] += 1
                assert (cell_row, cell_column) == (max(row - 1, 0), max(column - 1, 0))
                assert shared <= gpu["shared_per_block"]
                ways.add((bool(held), last_c - c < classes, last_column - column < w, last_row - row < h))
            assert covered.eq(1).all()
    assert {way[:2] for way in ways} == {(True, False), (False, True)}
    assert {way[2:] for way in ways} == set(itertools.product((False, True), repeat=2))


def resized_inputs(c: int, size: tuple[int, int], label_size: tuple[int, int], dtype, layout="nchw"):
    student, teacher = maps((2, c, *size), layout, dtype)
    g = torch.Generator().manual_seed(1)
    target = torch.randint(0, c, (2, *label_size), generator=g)
    target[torch.rand(target.shape, generator=g) < 0.2] = 255
    return student, teacher, target


@needs_emulation
@pytest.mark.parametrize(("gpu", "align_corners"), [(H100, False), (TINY, False), (TINY, True)])
def test_losses_at_label_resolution_at_small_sizes(gpu, align_corners):
    """Each size below with each, in fp64, against the formula."""
    configure(gpu)
    ops = torch.ops.fastkd_cuda
    numbers = itertools.cycle((1, 3, 4))
    for size in itertools.product((1, 2, 9), (1, 3, 9)):
        for label_size in itertools.product((1, 5, 19), (4, 18)):
            student, teacher, target = resized_inputs(next(numbers), size, label_size, torch.float64)
            x = student.requires_grad_()
            with fastkd.use_backend("reference"):
                options = {"align_corners": align_corners, "reduction": "sum"}
                ce = fastkd.resized_cross_entropy(x, target, **options)
                kd = fastkd.resized_kd_loss(x, teacher, size=label_size, target=target, temperature=2.0, **options)
            x = x.detach()
            got_ce = ops.resized_cross_entropy_gradient(x, target, None, None, None, 255, align_corners)
            got_kd = ops.resized_kd_gradient(x, teacher, target, None, *label_size, 2.0, 255, align_corners)
            for got, want in ((got_ce, ce), (got_kd, kd)):
                (gradient,) = torch.autograd.grad(want, student)
                torch.testing.assert_close(got[0], want.detach(), rtol=1e-6, atol=1e-6)
                assert got[1] == (target != 255).sum()
                # The reference's own weights are off by fp32's roundings.
                torch.testing.assert_close(got[2], gradient, rtol=1e-5, atol=1e-5)


@needs_emulation
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("gpu", "classes", "size", "label_size", "dtype"),
    [
        (H100, 19, (6, 70), (21, 280), torch.float32),
        (H100, 150, (5, 12), (40, 96), torch.bfloat16),
        (TINY, 7, (9, 10), (35, 33), torch.float16),
        (SMALL, 600, (3, 5), (7, 9), torch.float32),  # logits read where they are, classes in chunks
    ],
)
def test_resized_gradients_in_any_order_and_early_or_late(gpu, classes, size, label_size, dtype, layout):
    """The same bits from every order of threads, made in the forward or in the backward."""
    ops = torch.ops.fastkd_cuda
    student, teacher, target = resized_inputs(classes, size, label_size, dtype, layout)
    g = torch.Generator().manual_seed(2)
    class_weight, pixel_weight = torch.rand(classes, generator=g) + 0.5, torch.rand(2, 3, 4, generator=g)
    mask = torch.rand(target.shape, generator=g) < 0.9
    calls = {
        "resized_cross_entropy": (student, target, class_weight, pixel_weight, mask, 255, False),
        "resized_kd": (student, teacher, target, pixel_weight, *label_size, 2.0, 255, False),
    }
    grad, nan, memory = torch.tensor(1.7), torch.tensor(torch.nan), torch.tensor([1.7, 1.7])
    for name, args in calls.items():
        forward, ahead, behind = (
            getattr(ops, f"{name}_{end}") for end in ("forward", "forward_ahead", "backward_ahead")
        )
        results = []
        for order in ORDERS:
            configure(gpu, order)
            early = ahead(*args, 1.0, True, memory)
            late = torch.full_like(student, 7)
            behind(grad, *args, 1.0, True, early[1], nan, late, memory)
            assert torch.equal(early[2], late)
            behind(grad, *args, 1.0, True, early[1], early[3], marked := torch.full_like(student, 7), memory)
            assert marked.eq(7).all(), "a right guess leaves the gradient alone"
            nothing = ahead(*args, 1.0, True, torch.full((2,), torch.nan))
            assert nothing[2].isnan().all()
            assert torch.equal(nothing[0], early[0])
            assert torch.equal(forward(*args, False)[0], early[0])
            torch.testing.assert_close(forward(*args, True)[0].sum(), early[0], rtol=2e-6, atol=0)
            results.append(early)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_emulation
def test_resized_gradients_are_right_while_labels_and_weights_change():
    student, teacher, target = resized_inputs(19, (6, 9), (24, 36), torch.bfloat16)
    losses = {
        "ce": lambda x: fastkd.resized_cross_entropy(x, target, class_weight=torch.linspace(0.5, 1.5, 19)),
        "kd": lambda x: fastkd.resized_kd_loss(x, teacher, size=(24, 36), target=target),
        "kd of all pixels": lambda x: fastkd.resized_kd_loss(x, teacher, size=(24, 36)),
    }
    for loss in losses.values():
        Guess._free.clear()
        made = []
        for step, weight in enumerate((1.0, 1.0, 1.0, 8.0, 8.0, 8.0)):
            target[0, step] = 255
            x, y = (student.clone().requires_grad_() for _ in range(2))
            with fastkd.use_backend("cuda"):
                value = loss(x)
                made.append(not value.grad_fn.gradient.isnan().any())
                (weight * value).backward()
            with fastkd.use_backend("reference"):
                (weight * loss(y)).backward()
            assert (x.grad - y.grad).float().norm() <= 0.01 * y.grad.float().norm()
        assert made == [False, False, True, True, False, True]


@needs_emulation
def test_a_teacher_of_another_size_goes_to_another_backend():
    student, teacher, _ = resized_inputs(5, (4, 6), (16, 24), torch.float32)
    other = teacher[..., ::2].contiguous()
    with fastkd.use_backend("cuda"):
        got = fastkd.resized_kd_loss(student, other, size=(16, 24))
    assert torch.equal(got, fastkd.resized_kd_loss(student, other, size=(16, 24)))
    assert backends.without_cuda("resized_kd", torch.device("cpu")) == "cpu"

"""The C++ library alone: instruction sets, threads, exponential, labels, argument checks of the operators."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastkd import backends
from fastkd.ops import OPERATORS, Draw, operator

from . import budget
from .support import needs_cpu

ROOT = Path(__file__).parents[1]
pytestmark = needs_cpu


class Mixed(Draw):
    """Maps of one dtype; the teacher (every map but the first) of another."""

    teacher = torch.float16

    def map(self, seed: int, spatial: tuple[int, int] | None = None) -> Tensor:
        return super().map(seed, spatial).to(self.teacher if seed else self.dtype)


NHWC = torch.channels_last
CASES = {
    "fp32": Draw(shape=(2, 19, 9, 11), size=(46, 35)),
    "bf16-fp16-nhwc": Mixed(shape=(2, 19, 9, 11), size=(9, 11), dtype=torch.bfloat16, label_dtype=torch.uint8, layout=NHWC),
    "fp16": Draw(shape=(1, 150, 3, 5), size=(2, 4), dtype=torch.float16, label_dtype=torch.int32),
    "fp32-fp16-nhwc": Mixed(shape=(1, 3, 70, 60), size=(35, 75), layout=NHWC),
    "fp64": Draw(shape=(2, 5, 1, 1), size=(7, 3), dtype=torch.float64),
}  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES)


def run_all(draw: Draw) -> dict[str, Tensor]:
    """Results by name of every operator of the table on its samples."""
    assert (reason := backends.why_not("cpu")) is None, reason
    torch.manual_seed(0)
    out = {}
    for row in OPERATORS:
        if "cpu" not in row.backends or row.name == "isa" or (row.name == "exp" and draw.dtype == torch.float64):
            continue
        for i, args in enumerate(row.samples(draw)):
            args = [a.clone() if isinstance(a, Tensor) else a for a in args]
            got = operator("cpu", row.name)(*args)
            got = args[0] if got is None else got
            for part, x in enumerate(got if isinstance(got, tuple) else (got,)):
                out[f"{row.name} {i} {part}"] = x
    return out


SCRIPT = """
import sys, torch
from tests import test_csrc as t
torch.save((torch.ops.fastkd_cpu.isa(), {name: t.run_all(draw) for name, draw in t.CASES.items()}), sys.argv[1])
"""


@pytest.fixture(scope="module")
def of_each_isa(tmp_path_factory):
    """Instruction set -> case -> results, each from a separate process; only sets that this processor supports."""
    results = {}
    for isa in ("baseline", "avx2", "avx512"):
        path = tmp_path_factory.mktemp("isa") / isa
        command, env = [sys.executable, "-c", SCRIPT, str(path)], {**os.environ, "FASTKD_CPU_ISA": isa}
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            assert "which this processor does not have" in done.stderr, done.stderr
            continue
        got, results[isa] = torch.load(path)
        assert got == isa
    return results


@pytest.mark.promise("instruction-sets")
@each_case
def test_instruction_sets_agree(of_each_isa, case) -> None:
    """baseline, AVX2 and AVX-512 differ by rounding only."""
    first = of_each_isa["baseline"][case]
    for isa, cases in of_each_isa.items():
        assert cases[case].keys() == first.keys()
        for name, want in first.items():
            got = cases[case][name]
            if not want.is_floating_point():
                assert torch.equal(got, want), (isa, name)
                continue
            # Two results within the budget of the same truth. One of NFD's statistics cancels; Dice's fp64 sums have
            # fp32 terms.
            single = torch.float32 if case != "fp64" else want.dtype
            u = budget.rounding(want.dtype, single) if "nfd_forward" not in name else 1e-5
            assert (got.double() - want.double()).norm() <= budget.roundings(32, want.double(), u), (isa, name)


def test_unknown_instruction_set_is_an_error() -> None:
    """A misspelt FASTKD_CPU_ISA raises an error that lists the valid values."""
    script = "from fastkd import backends; backends.why_not('cpu'); import torch; torch.ops.fastkd_cpu.isa()"
    env = {**os.environ, "FASTKD_CPU_ISA": "avx3"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode
    assert "expected baseline, avx2 or avx512" in done.stderr


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.promise("threads")
@each_case
def test_threads_do_not_change_a_bit(threads, case) -> None:
    """Work items depend on the shape only and are merged in order."""
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(run_all(CASES[case]))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value.nan_to_num(7.0), other[name].nan_to_num(7.0)), name


@pytest.mark.promise("threads")
def test_large_work_is_split_and_still_the_same(threads) -> None:
    """Groups longer than one work item are merged from partial results, bitwise equal for every thread count."""
    student, teacher = torch.randn(2, 4, 190, 210), torch.randn(2, 4, 190, 210)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(
            [ops().nfd_forward(student, teacher, dims, 1e-5, "none", 1.0)[0] for dims in ("hw", "nhw", "c", "chw")]
            + [ops().cwd_forward(student, teacher, 4.0, "none", 1.0)[0]]
            + [ops().kd_gradient(student, teacher, None, None, 1.0, 255, "sum", 1.0)[i] for i in (0, 2)]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("count", [1, 16_384, 50_000])
def test_first_bad_label(threads, dtype, count) -> None:
    """Returns the first one at any position relative to the threads' spans of 16 384, for every kind of bad label."""
    limits = torch.iinfo(dtype)
    good = torch.arange(count, dtype=torch.int64).remainder(19).to(dtype)
    good[::7] = 255
    for count_of_threads in (1, 3):
        threads(count_of_threads)
        assert ops().first_bad_label(good, 19, 255) == -1
        assert ops().first_bad_label(good, 18, 255) == (good == 18).nonzero()[0] if count > 18 else True
        assert ops().first_bad_label(good, 19, -1 if limits.min else 254) == 0  # where 255 is not ignored
        for position in {0, count // 3, min(count - 1, 16_383), min(count - 1, 16_384), count - 1}:
            for bad in {19, 254, limits.max - (limits.max == 255), limits.min or 20}:
                y = good.clone()
                y[position], y[position + 1 :] = bad, 20
                assert ops().first_bad_label(y, 19, 255) == position


def test_labels_are_checked_in_any_layout() -> None:
    """The function copies non-contiguous labels; the operator refuses them, and float labels."""
    with pytest.raises(RuntimeError, match="contiguous"):
        ops().first_bad_label(torch.zeros(4, 6, dtype=torch.uint8)[:, ::2], 19, 255)
    with pytest.raises(RuntimeError, match="uint8, int32 or int64"):
        ops().first_bad_label(torch.zeros(4), 19, 255)


@pytest.mark.parametrize("layout", [torch.contiguous_format, NHWC], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rescale(threads, dtype, layout) -> None:
    """gradient * factor in the accumulator, rounded once."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    for count in (1, 3):
        threads(count)
        for shape in ((1, 1, 1, 1), (2, 7, 9, 37), (1, 3, 40, 70)):
            gradient = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
            for factor in (0.0, -2.5, 1 + 2**-20, torch.nan):
                got = gradient.clone()
                ops().rescale_(got, torch.tensor(factor, dtype=acc))
                want = (gradient.to(acc) * torch.tensor(factor, dtype=acc)).to(dtype)
                assert got.stride() == gradient.stride()
                assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))


READ_ONLY = """
import ctypes, mmap, torch
from fastkd import backends
backends.why_not("cpu")
pages = mmap.mmap(-1, 1 << 16)
gradient = torch.frombuffer(pages, dtype=torch.float32).view(1, 4, 64, 64)
address = gradient.data_ptr()
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), 1 << 16, 1) == 0  # PROT_READ
torch.ops.fastkd_cpu.rescale_(gradient, torch.tensor(1.0))
print("untouched", flush=True)
torch.ops.fastkd_cpu.rescale_(gradient, torch.tensor(1.5))
"""


@pytest.mark.promise("rescale")
@pytest.mark.skipif(sys.platform != "linux", reason="read-only pages by Linux's mprotect")
def test_rescale_by_one_writes_nothing() -> None:
    """With a factor of 1 a gradient in read-only memory works; the next factor crashes, which shows that it was
    read-only."""
    done = subprocess.run([sys.executable, "-c", READ_ONLY], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "untouched\n", done.stderr
    assert done.returncode < 0  # a signal


def test_rescale_keeps_the_bits_of_nan() -> None:
    payloads = torch.tensor([0x7FC12345, 0x7F812345, -4194304 + 77], dtype=torch.int32).repeat(200)
    gradient = payloads.clone().view(torch.float32).view(1, 1, 20, 30)
    ops().rescale_(gradient, torch.tensor(1.0))
    assert torch.equal(gradient.view(torch.int32).flatten(), payloads)


def ops() -> object:
    return torch.ops.fastkd_cpu


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("ignored", [False, True], ids=["counted", "nothing counted"])
def test_reductions(reduction, ignored) -> None:
    """scale * sum of the terms, the same over the count (0 for a count of 0), or scale * term; the gradient
    likewise."""
    student, teacher = torch.randn(2, 2, 5, 6, 7)
    weight = torch.rand(2, 6, 7)
    labels = torch.randint(0, 5, (2, 6, 7))
    labels[0] = 255
    if ignored:
        labels[:] = 255
    class_weight, count = torch.tensor([0.5, 1, 2, 3, 4]), (labels != 255).sum().float()
    weights = (class_weight[labels.clamp(max=4)] * (labels != 255)).sum()
    for name, args, counted in (
        ("kd", (student, teacher, labels, weight, 2.0, 255), count),
        ("resized_cross_entropy", (student, labels, class_weight, weight, None, 255, False), weights),
        ("resized_kd", (student, teacher, labels, weight, [6, 7], 2.0, 255, False), count),
    ):
        forward, gradient = (getattr(ops(), f"{name}_{what}") for what in ("forward", "gradient"))
        terms, kept = forward(*args, "none", 1.0)
        whole = gradient(*args, "sum", 1.0)[2]
        for scale in (1.0, 0.25, -3.0):
            loss, kept = forward(*args, reduction, scale)
            budget.assert_close(kept, counted.double())
            if reduction == "none":
                assert torch.equal(loss, terms * scale) if scale != -3.0 else True
                budget.assert_close(loss, terms.double() * scale)
                continue
            divisor = 1 if reduction == "sum" or counted == 0 else counted.double()
            budget.assert_close(loss, terms.double().sum() * scale / divisor)
            if ignored:
                assert loss == 0
            both = gradient(*args, reduction, scale)
            assert torch.equal(both[0], loss)
            assert torch.equal(both[1], kept)
            budget.assert_close(both[2], whole.double() * scale / divisor)


def test_exp_error_bound() -> None:
    """csrc/cpu/vec.h promises 2 ulp for x <= 88, 0 below the normal range, and NaN for NaN."""
    x = torch.cat(
        [torch.linspace(-87.3, 0, 500_001), torch.linspace(-0.4, 0.4, 300_001), torch.linspace(0, 88, 50_001)]
    )
    value, truth = ops().exp(x), x.double().exp()
    ulp = torch.nextafter(value, torch.full_like(value, torch.inf)) - value
    assert ((value - truth).abs() / ulp).max() <= 2
    edge = ops().exp(torch.tensor([-torch.inf, -1e30, -100.0, -0.0, 0.0, torch.nan]))
    assert edge[:5].tolist() == [0, 0, 0, 1, 1]
    assert edge[5].isnan()


def test_storage_offset_is_respected() -> None:
    """A slice of a batch is dense but has a storage offset."""
    student, teacher = torch.randn(3, 5, 7, 6), torch.randn(3, 5, 7, 6)
    loss = ops().nfd_forward(student[1:], teacher[1:], "hw", 1e-5, "none", 1.0)[0]
    assert torch.equal(loss, ops().nfd_forward(student[1:].clone(), teacher[1:].clone(), "hw", 1e-5, "none", 1.0)[0])


X, Y = torch.randn(2, 3, 4, 5), torch.zeros(2, 8, 9, dtype=torch.uint8)
REFUSED = {
    "must be dense, NCHW or channels_last": ("nfd_forward", X[..., ::2], X[..., ::2], "hw", 1e-5, "sum", 1.0),
    "differ in dimension 1": ("kd_forward", X, torch.randn(2, 4, 4, 5), None, None, 1.0, 255, "sum", 1.0),
    "same memory format": ("cwd_forward", X, X.contiguous(memory_format=NHWC), 4.0, "sum", 1.0),
    "target must have 40 elements": ("kd_forward", X, X, Y[:, :4, :4].contiguous(), None, 1.0, 255, "sum", 1.0),
    "weight must be float32": ("kd_forward", X, X, None, torch.ones(2, 4, 5).double(), 1.0, 255, "sum", 1.0),
    "logits must be dense": ("resized_cross_entropy_forward", X[..., ::2], Y, None, None, None, 255, False, "sum", 1.0),
    "class_weight must have 3 elements": (
        "resized_cross_entropy_forward", X, Y, torch.ones(4), None, None, 255, False, "sum", 1.0
    ),
    "pixel_weight must be": (
        "resized_cross_entropy_forward", X, Y, None, torch.ones(3, 4, 4), None, 255, False, "sum", 1.0
    ),
    "mask must be bool": ("resized_cross_entropy_forward", X, Y, None, None, Y, 255, False, "sum", 1.0),
    "target must be": ("resized_kd_forward", X, X, Y, None, [8, 10], 1.0, 255, False, "sum", 1.0),
    "size must be": ("resized_kd_forward", X, X, Y, None, [8], 1.0, 255, False, "sum", 1.0),
    "same N and C": ("difficulty_mask", X, torch.randn(2, 4, 4, 5), Y, 0.7, 0, "max", "xor", 255, False),
    "dims must be": ("nfd_forward", X, X, "wh", 1e-5, "sum", 1.0),
    "reduction must be": ("nfd_forward", X, X, "hw", 1e-5, "average", 1.0),
    "grad must have 1 elements": ("nfd_backward", torch.ones(6), X, X, "hw", 1e-5, "sum", 1.0, torch.ones(2, 3, 6)),
    "factor must be float32": ("rescale_", X.clone(), torch.ones((), dtype=torch.float64)),
}  # fmt: skip


@pytest.mark.promise("runtime-error")
@pytest.mark.parametrize("message", REFUSED)
def test_inputs_are_checked(message) -> None:
    """The operators repeat the checks of the Python layer: a wrong stride would read out of bounds."""
    name, *args = REFUSED[message]
    with pytest.raises(RuntimeError, match=message):
        getattr(ops(), name)(*args)

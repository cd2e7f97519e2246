"""The C++ library by itself, through torch.ops.fastkd_cpu: instruction sets, threads, exponential, schemas."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastkd

LIBRARY = Path(fastkd.__file__).parent / "_cpu.so"
pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="the C++ library is not built (pip install -e .)")


def ops() -> object:
    """torch.ops.fastkd_cpu; loading a library twice is harmless."""
    torch.ops.load_library(LIBRARY)
    return torch.ops.fastkd_cpu


def run_all(
    shape: tuple[int, ...], student_dtype: torch.dtype, teacher_dtype: torch.dtype, memory_format: torch.memory_format
) -> dict[str, torch.Tensor]:
    """Every operator on one seeded pair of maps; the results by name."""
    op = ops()
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(shape, generator=generator).to(student_dtype).contiguous(memory_format=memory_format)
    teacher = torch.randn(shape, generator=generator).to(teacher_dtype).contiguous(memory_format=memory_format)
    n, c, h, w = shape
    target = torch.randint(0, c, (n, h, w), generator=generator, dtype=torch.uint8)
    target[torch.rand(n, h, w, generator=generator) < 0.2] = 255
    weight = torch.rand(n, h, w, generator=generator, dtype=torch.float64 if student_dtype == torch.float64 else None)
    out = {}
    for dims in ("hw", "nhw", "c", "chw"):
        loss, stats = op.nfd_forward(student, teacher, dims, 1e-5)
        out[f"nfd {dims}"], out[f"nfd {dims} stats"] = loss, stats
        out[f"nfd {dims} grad"] = op.nfd_backward(torch.ones_like(loss), student, teacher, stats, dims)
    for labels in (None, target, target.int(), target.long()):
        for per_pixel in (False, True):
            loss, count = op.kd_forward(student, teacher, labels, weight, 2.0, 255, per_pixel)
            grad = op.kd_backward(torch.ones_like(loss), student, teacher, labels, weight, 2.0, 255)
            name = f"kd {None if labels is None else labels.dtype} {per_pixel}"
            out[name], out[name + " count"], out[name + " grad"] = loss, count, grad
    sizes = {"up": (5 * h + 1, 3 * w + 2), "same": (h, w), "down": (h // 2 + 1, w // 3 + 1)}
    for name, (height, width) in sizes.items():
        labels = torch.randint(0, c, (n, height, width), generator=generator)
        labels[:, ::3] = 255
        args = (None, weight, None, 255, name == "up")
        out[f"ce {name}"], _, out[f"ce {name} grad"] = op.resized_cross_entropy_gradient(student, labels, *args)
        args = (labels, weight, height, width, 2.0, 255, name == "up")
        out[f"resized kd {name}"], _, out[f"resized kd {name} grad"] = op.resized_kd_gradient(student, teacher, *args)
        narrow = teacher[..., : max(1, w // 2)].contiguous()
        out[f"resized kd {name} other"], _, _ = op.resized_kd_gradient(student, narrow, *args)
    if (student_dtype == torch.float64) == (teacher_dtype == torch.float64):
        parts = op.kd_with_confidence(
            student, teacher, teacher.flip(1).contiguous(memory_format=memory_format), "aux_main"
        )
        out["kd with confidence"], out["kd with confidence grad"], out["confidence"] = parts
        out["kth"] = op.kth_smallest(out["confidence"], n * h * w // 2)
    loss, stats = op.cwd_forward(student, teacher, 4.0)
    out["cwd"], out["cwd stats"] = loss, stats
    out["cwd grad"] = op.cwd_backward(torch.ones_like(loss), student, teacher, stats, 4.0)
    return out


CASES = [
    ((2, 19, 9, 11), torch.float32, torch.float32, torch.contiguous_format),
    ((2, 19, 9, 11), torch.bfloat16, torch.float16, torch.channels_last),
    ((1, 150, 3, 5), torch.float16, torch.float32, torch.contiguous_format),
    ((1, 3, 150, 140), torch.float32, torch.bfloat16, torch.channels_last),
    ((2, 5, 1, 1), torch.float64, torch.float64, torch.contiguous_format),
]


def test_instruction_sets_agree(tmp_path: Path) -> None:
    """baseline, AVX2 and AVX-512 round differently, and only that."""
    script = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import test_csrc as t; "
        "torch.save((t.ops().isa(), [t.run_all(*case) for case in t.CASES]), sys.argv[2])"
    )
    results = {}
    for isa in ("baseline", "avx2", "avx512"):
        path = tmp_path / isa
        done = subprocess.run(
            [sys.executable, "-c", script, str(Path(__file__).parent), str(path)],
            env={**os.environ, "FASTKD_CPU_ISA": isa},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            assert "which this processor does not have" in done.stderr, done.stderr
            continue
        results[isa] = torch.load(path)
        assert results[isa][0] == isa
    first = next(iter(results.values()))[1]
    for isa, (_, cases) in results.items():
        for case, values, expected in zip(CASES, cases, first, strict=True):
            for name, value in values.items():
                # A result in half precision may differ by its own last bit; the A among the statistics cancels.
                tolerance = 1e-4 if "stats" in name else 1e-5
                if value.is_floating_point():
                    tolerance = max(tolerance, 2 * torch.finfo(value.dtype).eps)
                torch.testing.assert_close(
                    value,
                    expected[name],
                    rtol=tolerance,
                    atol=1e-5,
                    msg=lambda m, where=(isa, case, name): f"{where}: {m}",
                )


def test_unknown_instruction_set_is_an_error() -> None:
    """A misspelt FASTKD_CPU_ISA says what it may be."""
    script = "import test_csrc; test_csrc.ops().isa()"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        env={**os.environ, "FASTKD_CPU_ISA": "avx3"},
    )
    assert done.returncode
    assert "expected baseline, avx2 or avx512" in done.stderr


@pytest.mark.parametrize("case", CASES, ids=str)
def test_threads_do_not_change_a_bit(case: tuple) -> None:
    """Tiles depend on the shape alone and are merged in order."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run_all(*case)
        torch.set_num_threads(2)
        two = run_all(*case)
    finally:
        torch.set_num_threads(threads)
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def test_large_work_is_split_and_still_the_same() -> None:
    """Groups longer than one work item are merged from partial results, the same for every thread count."""
    threads = torch.get_num_threads()
    student, teacher = torch.randn(2, 4, 190, 210), torch.randn(2, 4, 190, 210)
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                [ops().nfd_forward(student, teacher, dims, 1e-5)[0] for dims in ("hw", "nhw", "c", "chw")]
                + [ops().cwd_forward(student, teacher, 4.0)[0]]
                + [ops().kd_forward(student, teacher, None, None, 1.0, 255, False)[0]]
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


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
    """A slice of a batch is dense but does not begin at its storage's first element."""
    student, teacher = torch.randn(3, 5, 7, 6), torch.randn(3, 5, 7, 6)
    loss = ops().nfd_forward(student[1:], teacher[1:], "hw", 1e-5)[0]
    assert torch.equal(loss, ops().nfd_forward(student[1:].clone(), teacher[1:].clone(), "hw", 1e-5)[0])


def test_inputs_are_checked() -> None:
    """What the Python layer guarantees is checked again: a wrong stride would read out of bounds."""
    x = torch.randn(2, 3, 4, 5)
    with pytest.raises(RuntimeError, match="must be dense, NCHW or channels_last"):
        ops().nfd_forward(x[..., ::2], x[..., ::2], "hw", 1e-5)
    with pytest.raises(RuntimeError, match="differ in dimension 1"):
        ops().kd_forward(x, torch.randn(2, 4, 4, 5), None, None, 1.0, 255, False)
    with pytest.raises(RuntimeError, match="same memory format"):
        ops().cwd_forward(x, x.contiguous(memory_format=torch.channels_last), 4.0)
    with pytest.raises(RuntimeError, match="target must have 40 elements"):
        ops().kd_forward(x, x, torch.zeros(2, 4, 4, dtype=torch.uint8), None, 1.0, 255, False)
    labels = torch.zeros(2, 8, 9, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="logits must be dense"):
        ops().resized_cross_entropy_forward(x[..., ::2], labels, None, None, None, 255, False, False)
    with pytest.raises(RuntimeError, match="class_weight must have 3 elements"):
        ops().resized_cross_entropy_forward(x, labels, torch.ones(4), None, None, 255, False, False)
    with pytest.raises(RuntimeError, match="pixel_weight must be"):
        ops().resized_cross_entropy_forward(x, labels, None, torch.ones(3, 4, 4), None, 255, False, False)
    with pytest.raises(RuntimeError, match="target must be"):
        ops().resized_kd_forward(x, x, labels, None, 8, 10, 1.0, 255, False, False)
    with pytest.raises(RuntimeError, match="same N and C"):
        ops().difficulty_mask(x, torch.randn(2, 4, 4, 5), labels, 0.7, 0, "max", "xor", 255, False)
    with pytest.raises(RuntimeError, match="dims must be"):
        ops().nfd_forward(x, x, "wh", 1e-5)

"""Memory of forward and backward beyond the gradient, from the peak of a fresh process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .support import needs_cpu

CODE = """
import json, sys, torch
from benchmarks.harness import peak_memory
from tests.losses import LOSSES
used = {}
for label, name, shape, size in json.loads(sys.argv[1]):
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = (torch.randn(shape, dtype=dtype) for _ in range(2))
        target = torch.randint(0, min(shape[1], 250), (shape[0], *size), dtype=torch.uint8)
        target[:, :8] = 255  # ignored, so that each label is looked at
        student.requires_grad_()
        def step():
            student.grad = None
            LOSSES[name](student, teacher, target).backward()
        step()
        peaks = []
        for _ in range(2):  # other pages of the process that become resident meanwhile only add: the smaller counts
            student.grad = None  # else the memory it gives back would hide as much of the new one
            peaks.append(peak_memory(step))
        extra = min(peaks) - student.nbytes
        used[f"{label} {dtype}"] = extra / (student.nbytes + teacher.nbytes), extra / target.numel()
print(json.dumps(used))
"""
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)
pytestmark = [needs_cpu, needs_proc]


def measure(cases: list[tuple]) -> dict[str, tuple[float, float]]:
    """By case and dtype: bytes beyond the gradient, as a fraction of the inputs and per label pixel."""
    command = [sys.executable, "-c", CODE, json.dumps(cases)]
    out = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    used = json.loads(out.stdout)
    assert len(used) == 2 * len(cases)
    return used


@pytest.mark.promise("memory-maps")
def test_extra_memory():
    """Losses at map resolution: less than 1 % of the inputs."""
    used = measure(
        [
            ("nfd", "nfd", (1, 512, 128, 256), (1, 1)),
            ("kd", "kd", (1, 19, 1024, 1024), (1, 1)),
            ("kd, many classes", "kd", (2, 150, 256, 128), (1, 1)),
            ("cwd", "cwd", (1, 512, 128, 256), (1, 1)),
        ]
    )
    assert not {name: share for name, (share, _) in used.items() if share >= 0.01}


@pytest.mark.promise("memory-labels")
def test_extra_memory_at_label_resolution():
    """Beyond the gradient: at most 8 bytes per label pixel, 16 in TSE; the logits alone would take 76 or 600."""
    used = measure(
        [
            (f"{name}, {shape[1]} classes", name, shape, size)
            for shape, size in (((1, 19, 128, 256), (1024, 2048)), ((1, 150, 64, 64), (1024, 1024)))
            for name in ("resized_ce", "resized_ce_dice", "resized_focal_ce", "resized_kd", "rdd_tfe", "rdd_tse")
        ]
    )
    assert not {name: size for name, (_, size) in used.items() if size > (16 if name.startswith("rdd_tse") else 8)}

"""Beyond the gradient, forward and backward need less than 1 % of the inputs: asserted on the peak of a fresh process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastkd import backends

CODE = """
import json, sys, torch, fastkd
sys.path.insert(0, sys.argv[1])
from benchmarks.harness import peak_memory
shares = {}
for name, loss, shape in (
    ("nfd", fastkd.nfd_loss, (1, 512, 128, 256)),
    ("kd", fastkd.kd_loss, (1, 19, 1024, 1024)),
    ("kd, many classes", fastkd.kd_loss, (2, 150, 256, 128)),
    ("cwd", fastkd.cwd_loss, (1, 512, 128, 256)),
):
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = (torch.randn(shape, dtype=dtype) for _ in range(2))
        student.requires_grad_()
        def step():
            student.grad = None
            loss(student, teacher).backward()
        step()
        student.grad = None  # else the memory it gives back would hide as much of the new one
        extra = peak_memory(step) - student.nbytes
        shares[f"{name} {dtype}"] = extra / (student.nbytes + teacher.nbytes)
print(json.dumps(shares))
"""


@pytest.mark.skipif(backends.why_not("cpu") is not None, reason=str(backends.why_not("cpu")))
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_extra_memory():
    root = str(Path(__file__).parents[1])
    out = subprocess.run([sys.executable, "-c", CODE, root], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    shares = json.loads(out.stdout)
    assert len(shares) == 8
    assert max(shares.values()) < 0.01, shares


RESIZED = """
import json, sys, torch, fastkd
sys.path.insert(0, sys.argv[1])
from benchmarks.harness import peak_memory
height, width = 1024, 2048
target = torch.randint(0, 19, (1, height, width), dtype=torch.uint8)
target[:, :8] = 255  # ignored, so that each label is looked at
bytes_a_pixel = {}
for classes, h, w in ((19, 128, 256), (150, 64, 128)):
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher, aux = (torch.randn(1, classes, h, w, dtype=dtype) for _ in range(3))
        student.requires_grad_()
        rdd = dict(preset="official", teacher_aux=aux)
        for name, loss in {
            "cross-entropy": lambda: fastkd.resized_cross_entropy(student, target),
            "kd": lambda: fastkd.resized_kd_loss(student, teacher, size=(height, width), target=target),
            "tfe": lambda: fastkd.rdd_loss(student, teacher, target, stage="tfe", **rdd).loss,
            "tse": lambda: fastkd.rdd_loss(student, teacher, target, stage="tse", **rdd).loss,
        }.items():
            def step():
                student.grad = None
                loss().backward()
            step()
            student.grad = None  # else the memory it gives back would hide as much of the new one
            extra = peak_memory(step) - student.nbytes
            bytes_a_pixel[f"{name}, {classes} classes, {dtype}"] = extra / (height * width)
print(json.dumps(bytes_a_pixel))
"""


@pytest.mark.skipif(backends.why_not("cpu") is not None, reason=str(backends.why_not("cpu")))
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_extra_memory_at_label_resolution():
    """Beyond the gradient: at most 8 bytes a label pixel, 16 in TSE, where the logits alone would be 76 or 600."""
    root = str(Path(__file__).parents[1])
    out = subprocess.run([sys.executable, "-c", RESIZED, root], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    used = json.loads(out.stdout)
    assert len(used) == 16
    print(used)
    assert all(used[name] <= (16 if name.startswith("tse") else 8) for name in used), used

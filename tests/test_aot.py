"""Every Triton kernel, compiled ahead of time for each GPU generation with no GPU, must keep its registers.

The launchers run on meta tensors with a stand-in for ``launch`` that compiles: so what is compiled is what they would
run, at the blocks, types and argument specialisations they pick. The toolchain in Triton's wheel reports the spills.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels cannot be compiled in the interpreter", allow_module_level=True)

from fastkd.kernels import cwd, kd, nfd
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NCHW, NHWC = torch.contiguous_format, torch.channels_last
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


class Target:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, name: str):
        self.name = name

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]


def maps(shape, layout, student, teacher):
    """Student and teacher of ``shape`` that hold no memory."""
    return tuple(torch.empty(shape, dtype=d, device="meta").to(memory_format=layout) for d in (student, teacher))


def run_nfd(dims, *map_):
    s, t = maps(*map_)
    loss, stats = nfd.forward(s, t, dims, 1e-5)
    nfd.backward(loss, s, t, stats, dims)


def run_kd(per_pixel, target, weight, *map_):
    s, t = maps(*map_)
    shape = (s.shape[0], *s.shape[2:])
    target = target and torch.empty(shape, dtype=target, device="meta")
    weight = torch.empty(shape, device="meta") if weight else None
    loss, _ = kd.forward(s, t, target, weight, 2.0, 255, per_pixel)
    kd.backward(loss, s, t, target, weight, 2.0, 255)


def run_cwd(*map_):
    s, t = maps(*map_)
    loss, stats = cwd.forward(s, t, 4.0)
    cwd.backward(loss, s, t, stats, 4.0)


CASES = {
    # Few large planes (split), many small ones, the groups that span the batch, a pixel or a sample; odd sizes.
    "nfd-hw-split": lambda: run_nfd("hw", (1, 512, 256, 512), NCHW, BF16, BF16),
    "nfd-hw-fp32": lambda: run_nfd("hw", (8, 512, 64, 128), NCHW, F32, F32),
    "nfd-hw-odd": lambda: run_nfd("hw", (2, 19, 45, 45), NCHW, F16, F32),
    "nfd-hw-nhwc": lambda: run_nfd("hw", (8, 512, 64, 128), NHWC, BF16, BF16),
    "nfd-nhw-nhwc-fp32": lambda: run_nfd("nhw", (8, 512, 64, 128), NHWC, F32, F32),
    "nfd-c": lambda: run_nfd("c", (8, 512, 64, 128), NCHW, F32, F32),
    "nfd-c-nhwc": lambda: run_nfd("c", (8, 512, 64, 128), NHWC, F16, F16),
    "nfd-chw": lambda: run_nfd("chw", (8, 512, 64, 128), NCHW, BF16, F32),
    # Cityscapes and ADE20K logits, with and without labels and weights; 4096 classes.
    "kd-19-fp32": lambda: run_kd(False, None, False, (8, 19, 64, 128), NCHW, F32, F32),
    "kd-19-label": lambda: run_kd(False, torch.int64, True, (8, 19, 512, 1024), NCHW, F16, F16),
    "kd-150-nhwc": lambda: run_kd(True, torch.uint8, False, (16, 150, 64, 64), NHWC, BF16, BF16),
    "kd-4096": lambda: run_kd(False, torch.int32, False, (2, 4096, 32, 32), NCHW, BF16, F32),
    "kd-4096-nhwc-fp32": lambda: run_kd(False, None, True, (2, 4096, 32, 32), NHWC, F32, F32),
    "cwd-19": lambda: run_cwd((8, 19, 64, 128), NCHW, BF16, BF16),
    "cwd-split": lambda: run_cwd((1, 512, 256, 512), NCHW, F32, F32),
    "cwd-nhwc": lambda: run_cwd((8, 512, 64, 128), NHWC, F16, F32),
}


def usage(compiled) -> tuple[int, int]:
    """(registers a thread, bytes or registers spilled) of a compiled kernel."""
    if "amdgcn" in compiled.asm:
        count = dict(re.findall(r"\.(\w+):\s+(\d+)\n", compiled.asm["amdgcn"].partition("amdhsa.kernels")[2]))
        return int(count["vgpr_count"]), int(count["vgpr_spill_count"]) + int(count["sgpr_spill_count"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        text = subprocess.check_output([knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name], text=True)
    # A spilled register lives on the stack; the kernels keep nothing else there.
    registers, stack, local = (int(re.search(rf"{what}:(\d+)", text)[1]) for what in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def compiled_by(run, target: str, monkeypatch) -> list[tuple]:
    """(kernel, its arguments, the compiled code) of each kernel that ``run`` launches."""
    out = []

    def compile_only(kernel, grid, like, *args, num_warps=4, **constants):
        assert all(0 < size < 2**31 for size in grid)
        out.append((kernel, kernel.warmup(*args, grid=grid, num_warps=num_warps, **constants)))

    for module in (nfd, kd, cwd):
        monkeypatch.setattr(module, "launch", compile_only)
    # Not set_active: the driver before may be none at all, where there is no GPU.
    monkeypatch.setattr(driver, "_active", Target(target))
    run()
    return out


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_spills(case, target, monkeypatch):
    kernels = compiled_by(CASES[case], target, monkeypatch)
    assert len(kernels) >= 2
    for kernel, compiled in kernels:
        registers, spilled = usage(compiled)
        print(f"{case} {target} {kernel.__name__} {registers} {spilled}")
        assert registers > 0
        assert spilled == 0, f"{case}: {kernel.__name__} on {target} spills {spilled} ({registers} registers)"

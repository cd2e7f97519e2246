"""Memory and time of a run's losses at its own shapes, with the kernels and in plain PyTorch.

Measured once after the last step, on random inputs with the shapes, dtypes and strides of the run.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastkd
from fastkd.train.gradients import each_tensor
from fastkd.train.methods import Objective
from fastkd.train.models import Output

TENSORS_OF_EAGER = 12  # upper bound of the label-size tensors that plain PyTorch keeps alive in any loss here
SECONDS = 5.0  # slower calls in plain PyTorch are measured on one image and scaled


class Shapes(NamedTuple):
    """Meta tensors of the losses' inputs in a step."""

    student: Output
    teacher: Output | None
    labels: Tensor


def shapes_of(student: Output, teacher: Output | None, labels: Tensor) -> Shapes:
    return each_tensor(Shapes(student, teacher, labels), lambda x: torch.empty_like(x, device="meta"))


def loss_cost(objective: Objective, shapes: Shapes, *, step: int, device: torch.device) -> dict[str, Any]:
    """Memory and time of one forward and backward of the losses.

    Args:
        objective: the losses of the run; its buffers may change (a method may keep a memory bank).
        shapes: from `shapes_of`.
        step: of the run; RDD's stages differ.
        device: that of the run.

    Returns:
        {"backends": names, "ours": cost, "eager": cost, "note": text or None}. A cost is {"bytes": peak beyond the
        inputs and the gradients, "seconds": per call, "images": batch size of the measurement}, scaled to the batch if
        measured on one image; or None, with the reason in the note. Never raises.
    """
    operators = fastkd.backend_info()["operators"].values()
    found: dict[str, Any] = {
        "backends": sorted({str(operator.get(device.type) or "reference") for operator in operators}),
        "ours": None,
        "eager": None,
        "note": None,
    }
    gc.collect()
    try:
        images = shapes.student.logits.shape[0]
        found["ours"] = _measure(objective, shapes, images, step, device)
        need = TENSORS_OF_EAGER * 4 * shapes.student.logits.shape[1] * shapes.labels[0].numel()
        if need > (free := _free(device)):
            found["note"] = f"plain PyTorch needs about {need / 2**30:.1f} GiB an image and {free / 2**30:.1f} are free"
            return found
        with fastkd.use_backend("reference"):
            one = _measure(objective, shapes, 1, step, device)
            small = one["seconds"] * images < SECONDS and one["bytes"] * images < free / 2
            found["eager"] = _measure(objective, shapes, images, step, device) if small else _scaled(one, images)
    except Exception as error:  # statistics must not fail a finished run
        found["note"] = f"not measured: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    objective.zero_grad(set_to_none=True)
    return found


def _scaled(one: dict[str, Any], images: int) -> dict[str, Any]:
    return {"bytes": one["bytes"] * images, "seconds": one["seconds"] * images, "images": 1}


def _measure(objective: Objective, shapes: Shapes, images: int, step: int, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(0)
    classes = shapes.student.logits.shape[1]

    def filled(x: Tensor) -> Tensor:
        like = torch.empty_like(x[:images], device=device)
        if not x.is_floating_point():
            return like.random_(0, classes, generator=generator)
        return like.normal_(generator=generator)

    student, teacher, labels = each_tensor(shapes, filled)
    leaves: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        leaves.append(x.requires_grad_())
        return x

    each_tensor(student, keep)

    def call() -> None:
        for leaf in leaves:
            leaf.grad = None
        objective(student, teacher, labels, step).total.backward()

    call()
    gradients = sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
    for leaf in leaves:  # otherwise freed memory would hide new allocations
        leaf.grad = None
    peak = _peak_memory(call, device) - gradients
    _synchronise(device)
    begin = time.perf_counter()
    call()
    _synchronise(device)
    return {"bytes": max(peak, 0), "seconds": time.perf_counter() - begin, "images": images}


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _peak_memory(call: Callable[[], None], device: torch.device) -> int:
    """Peak memory of `call` in bytes: of the allocator on a GPU, resident memory of the process on a CPU (Linux)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    status = Path("/proc/self/status")

    def kib(key: str) -> int:
        return int(status.read_text().partition(f"{key}:")[2].split()[0])

    ctypes.CDLL(None).malloc_trim(0)  # otherwise unused heap would hide new allocations
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    resident = kib("VmRSS")
    call()
    return (kib("VmHWM") - resident) * 1024


def _free(device: torch.device) -> int:
    """Free bytes, on the device or in the system (Linux)."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) * 1024

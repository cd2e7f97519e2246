"""How far the losses are from float64, beside plain PyTorch in the same dtype: the table of docs/promises.md.

    python -m tests.tools.errors            # on the CPU, or on a GPU where there is one

The truth is the reference in float64 on the inputs as rounded to their dtype. Loss: |error| / |truth|; gradient: the L2 norm of
the error over that of the truth; the worst of some seeds.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import fastkd

from ..losses import LOSSES, Loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def problem(dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of two networks that agree to some extent, 3 wide, and labels at four times the size, a tenth ignored."""
    g = torch.Generator().manual_seed(seed)
    student = 3 * torch.randn(2, 19, 32, 64, generator=g)
    teacher = 0.7 * student + 2 * torch.randn(2, 19, 32, 64, generator=g)
    labels = torch.randint(0, 19, (2, 128, 256), generator=g)
    labels[torch.rand(labels.shape, generator=g) < 0.1] = 255
    return student.to(DEVICE, dtype), teacher.to(DEVICE, dtype), labels.to(DEVICE)


def run(loss: Loss, backend: str, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    with fastkd.use_backend(backend):
        value = loss(student, teacher, labels)
    (2**12 * value).backward()  # as a GradScaler does: a mean's gradient is below fp16's range
    return value.detach().double(), student.grad.double()


def errors(name: str, dtype: torch.dtype, seeds: int) -> dict[str, tuple[float, float]]:
    """Backend -> relative error of the loss and of the gradient."""
    worst = {"auto": (0.0, 0.0), "reference": (0.0, 0.0)}
    for seed in range(seeds):
        student, teacher, labels = problem(dtype, seed)
        true = run(LOSSES[name], "reference", student.double(), teacher.double(), labels)
        for backend, (loss, gradient) in worst.items():
            got = run(LOSSES[name], backend, student, teacher, labels)
            off = [((a - b).norm() / b.norm()).item() for a, b in zip(got, true, strict=True)]
            worst[backend] = max(loss, off[0]), max(gradient, off[1])
    return worst


def table(seeds: int = 5) -> list[str]:
    lines = [
        "| loss | dtype | loss: kernel | plain PyTorch | gradient: kernel | plain PyTorch |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name in LOSSES:
        for dtype in DTYPES:
            found = errors(name, dtype, seeds)
            (loss, gradient), (plain_loss, plain_gradient) = found["auto"], found["reference"]
            short = str(dtype).removeprefix("torch.")
            lines.append(
                f"| {name} | {short} | {loss:.1e} | {plain_loss:.1e} | {gradient:.1e} | {plain_gradient:.1e} |"
            )
    return lines


if __name__ == "__main__":
    print(f"{DEVICE}: {fastkd.backend_info()['operators']['kd'][DEVICE]}", file=sys.stderr)
    print("\n".join(table()))

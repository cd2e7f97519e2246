"""Errors of the losses against float64, next to plain PyTorch's in the same dtype: the table of docs/promises.md.

    python -m tests.tools.errors            # on a GPU if there is one, else on the CPU
    python -m tests.tools.errors --save     # and append the rows to benchmarks/results/errors.csv

The truth is the reference in float64 on the inputs rounded to their dtype. Loss: |error| / |truth|; gradient: L2 norm
of the error over that of the truth. The table has the worst of several seeds.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor

import fastkd
from benchmarks.harness import RESULTS, WHERE, Record, append, dtype_name, read, where

from ..losses import LOSSES, Loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FILE = "errors.csv"
COLUMNS = (*WHERE, "loss", "dtype", "seeds", "loss_kernel", "loss_plain", "gradient_kernel", "gradient_plain")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def problem(dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated logits of two networks, 3 wide, and labels at four times the size, a tenth of them ignored."""
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
    (2**12 * value).backward()  # as GradScaler does: a mean's gradient underflows fp16
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


def records(seeds: int = 5) -> list[Record]:
    """One row per loss and dtype: errors of the kernel and of plain PyTorch."""
    found = []
    for name in LOSSES:
        for dtype in DTYPES:
            print(f"{name} {dtype_name(dtype)}", file=sys.stderr)
            row = where(DEVICE) | {"loss": name, "dtype": dtype_name(dtype), "seeds": str(seeds)}
            for rival, (loss, gradient) in errors(name, dtype, seeds).items():
                rival = {"auto": "kernel", "reference": "plain"}[rival]
                row |= {f"loss_{rival}": f"{loss:.1e}", f"gradient_{rival}": f"{gradient:.1e}"}
            found.append(row)
    return found


def newest() -> list[Record]:
    """The rows of the last CPU run."""
    rows = [row for row in read(RESULTS / FILE) if not row["driver"]]
    return [row for row in rows if (row["date"], row["commit"]) == (rows[-1]["date"], rows[-1]["commit"])]


def table(rows: list[Record]) -> list[str]:
    names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
    heads = [f"{name} {part}" for name in names.values() for part in ("loss", "gradient")]
    lines = ["| loss | " + " | ".join(heads) + " |", "|---" + "|---:" * len(heads) + "|"]
    of = {(row["loss"], row["dtype"]): row for row in rows}
    for loss in dict.fromkeys(row["loss"] for row in rows):
        cells = [
            f"{of[loss, dtype][f'{part}_kernel']} / {of[loss, dtype][f'{part}_plain']}"
            for dtype in names
            for part in ("loss", "gradient")
        ]
        lines.append(f"| {loss} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help=f"append the rows to benchmarks/results/{FILE}")
    args = parser.parse_args()
    rows = records()
    if args.save:
        append(rows, RESULTS / FILE, COLUMNS)
    print("\n".join(table(rows)))

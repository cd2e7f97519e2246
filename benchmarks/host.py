"""Host overhead per call: forward and backward of every loss on tensors of 16 numbers, where kernels take no time.

All losses and their rival, ``F.cross_entropy(F.interpolate(x, ...), y)``, take turns in one process, so that caches are
as cold as in a training step. On a GPU this is the time until the calls return, forward and backward separately.

    python -m benchmarks.host [--rounds 2000] [--out DIR]     # DIR: appends to DIR/{cpu,cuda}_host.csv

`FASTKD_BACKEND=triton` measures another backend than the default.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd

from . import harness

COLUMNS = (*harness.WHERE[:4], "torch", "kernels", "backend", "loss", "forward_us", "backward_us")
RIVAL = "F.cross_entropy(F.interpolate(x))"


def calls(device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """Each loss as a function of the student's tensor."""
    g = torch.Generator().manual_seed(0)
    teacher, aux = (torch.randn(1, 4, 2, 2, generator=g).to(device) for _ in range(2))
    target = torch.randint(0, 4, (1, 4, 4), generator=g).to(device)

    def rdd(stage: str) -> Callable[[Tensor], Tensor]:
        return lambda x: fastkd.rdd_loss(x, teacher, target, stage=stage, teacher_aux=aux).loss

    return {
        RIVAL: lambda x: F.cross_entropy(F.interpolate(x, (4, 4), mode="bilinear"), target),
        "nfd_loss": lambda x: fastkd.nfd_loss(x, teacher),
        "cwd_loss": lambda x: fastkd.cwd_loss(x, teacher),
        "kd_loss": lambda x: fastkd.kd_loss(x, teacher),
        "resized_cross_entropy": lambda x: fastkd.resized_cross_entropy(x, target),
        "resized_kd_loss": lambda x: fastkd.resized_kd_loss(x, teacher, size=(4, 4)),
        "rdd_loss, TSE": rdd("tse"),
        "rdd_loss, TFE": rdd("tfe"),
    }


def measure(device: torch.device, rounds: int) -> dict[str, tuple[float, float]]:
    """Median microseconds of the forward and of the backward of each call."""
    x = torch.randn(1, 4, 2, 2, device=device, requires_grad=True)
    losses = calls(device)
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in losses}
    for _ in range(rounds):
        for name, loss in losses.items():
            x.grad = None
            start = time.perf_counter()
            value = loss(x)
            middle = time.perf_counter()
            value.backward()
            end = time.perf_counter()
            times[name][0].append((middle - start) * 1e6)
            times[name][1].append((end - middle) * 1e6)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return {name: (statistics.median(f), statistics.median(b)) for name, (f, b) in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder of the CSV file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    measure(device, 20)
    table = measure(device, args.rounds)
    rival = sum(table[RIVAL])
    print(f"{'us, median of ' + str(args.rounds):36} {'forward':>8} {'backward':>8} {'both':>8} {'/ rival':>8}")
    for name, (forward, backward) in table.items():
        both = forward + backward
        print(f"{name:36} {forward:8.1f} {backward:8.1f} {both:8.1f} {both / rival:8.2f}")
    if args.out:
        here = {column: value for column, value in harness.where(device.type).items() if column in COLUMNS}
        here["backend"] = os.environ.get("FASTKD_BACKEND", "default")
        rows = [
            here | {"loss": name, "forward_us": f"{forward:.1f}", "backward_us": f"{backward:.1f}"}
            for name, (forward, backward) in table.items()
        ]
        harness.append(rows, args.out / f"{device.type}_host.csv", COLUMNS)


if __name__ == "__main__":
    main()

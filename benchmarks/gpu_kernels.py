"""Time of every kernel of a loss, forward and backward, in both memory formats: Triton, CUDA C++, and eager.

    python -m benchmarks.gpu_kernels --compile            # compiles in one process per core and prints the time of each
                                                          # first call
    python -m benchmarks.gpu_kernels --out DIR --resume   # appends to DIR/kernels.txt, and sums to DIR/cuda_kernels.csv

Kernel times come from the profiler and exclude host time. The order of backends on a GPU (fastkd/backends.py) is
checked against the committed sums.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import fastkd

from . import harness
from .cases import BF16, FEATURE_LOSSES, LOSSES, RECIPES

COLUMNS = (*harness.WHERE[:4], "torch", "kernels", "recipe", "loss", "layout", "dtype", "backend", "kernel_us")
BACKENDS = ("auto", "triton", "cuda", "eager")
COMPOSED = ("rdd_tse", "rdd_tfe", "resized_ohem_ce")
"""Losses of several operators, measured also with the default backend of each."""
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def measured() -> list[tuple[str, str, str]]:
    """(recipe, loss, layout), the most informative first."""
    losses = ("resized_ce", "resized_kd", "rdd_tse", "rdd_tfe", "nfd", "kd", "cwd")
    found = [(recipe, loss, layout) for recipe in ("ADE20K", "Cityscapes") for loss in losses for layout in LAYOUTS]
    found += [("Cityscapes, full", loss, "NCHW") for loss in losses[:2]]
    more = (
        "resized_ce_dice", "resized_bce", "resized_focal_ce", "resized_smooth_ce", "resized_kd_sigmoid", "resized_dice",
        "resized_ohem_ce", "kd_sigmoid",
    )  # fmt: skip
    return found + [(recipe, loss, "NCHW") for recipe in ("ADE20K", "Cityscapes") for loss in more]


def calls(recipe: str, loss: str, layout: str) -> Iterator[tuple[str, object]]:
    """Per backend: a name, and a function that runs forward and backward once."""
    sizes = RECIPES[recipe]
    shape = sizes.features if loss in FEATURE_LOSSES else sizes.logits
    case = LOSSES[loss](shape, sizes.crop, BF16)
    student, teacher = (
        x.detach().to(memory_format=LAYOUTS[layout]).requires_grad_(x.requires_grad)  # a leaf in either layout
        for x in harness.inputs(case, harness.DEVICE, shape[0])
    )
    rivals = case.rivals(harness.DEVICE, shape)

    for backend in BACKENDS:
        if backend == "auto" and loss not in COMPOSED:
            continue
        function = rivals["eager" if backend == "eager" else "ours"]
        if isinstance(function, str):
            continue

        def call(function=function, backend=backend) -> None:
            with fastkd.use_backend("auto" if backend == "eager" else backend):
                harness.gradient(function, student, teacher)

        yield backend, call


def first_call(call) -> float:
    """Seconds, excluding device start-up."""
    torch.ones(1, device=harness.DEVICE).sum().item()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def profile(call, times: int = 5) -> list[tuple[str, float]]:
    """Kernels and their microseconds per call, the longest first."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(times):
            call()
        torch.cuda.synchronize()
    rows = [(event.key, event.self_device_time_total / times) for event in found.key_averages()]
    return sorted(((name, time) for name, time in rows if time > 0), key=lambda row: -row[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(), help="folder of kernels.txt")
    parser.add_argument("--resume", action="store_true", help="skip cases that kernels.txt has")
    parser.add_argument("--compile", action="store_true", help="only run every case once, in parallel processes")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS, help="only these")
    parser.add_argument("--only", type=int, help="with --compile: one case, in this process")
    args = parser.parse_args()
    if args.compile and args.only is None:
        count, cores = len(measured()), min(os.cpu_count() or 1, 14)
        running: list[subprocess.Popen] = []
        for index in range(count):
            if len(running) == cores:
                running.pop(0).wait()
            command = [sys.executable, "-m", "benchmarks.gpu_kernels", "--compile", "--only", str(index)]
            running.append(subprocess.Popen(command))
        return max((process.wait() for process in running), default=0)
    chosen = measured() if args.only is None else measured()[args.only : args.only + 1]
    path = args.out / "kernels.txt"
    known = path.read_text() if args.resume and path.exists() else ""
    print(known, end="")
    for recipe, loss, layout in chosen:
        for backend, call in calls(recipe, loss, layout):
            # Eager compiles nothing, and its copies at label resolution would not fit in many processes.
            if backend not in args.backends or (args.compile and backend == "eager"):
                continue
            title = f"{recipe} {loss} {layout} {backend}"
            if f"{title}:" in known:
                continue
            try:
                if args.compile:
                    seconds = first_call(call)
                    if seconds > 0.2:  # otherwise nothing was compiled, or another process did it
                        print(f"first call of {title}: {seconds:.1f} s", flush=True)
                    continue
                kernels = profile(call)
            except Exception as error:  # the backend lacks this loss; the others are still measured
                print(f"{title}: {harness.reason(error)}", flush=True)
                continue
            lines = [
                f"{title}: {sum(time for _, time in kernels):.1f} us",
                *(f"    {t:8.1f}  {k[:100]}" for k, t in kernels),
            ]
            with path.open("a") as file:
                file.write("\n".join(lines) + "\n")
            record = {column: value for column, value in harness.where(harness.DEVICE).items() if column in COLUMNS}
            record |= {"recipe": recipe, "loss": loss, "layout": layout, "dtype": harness.dtype_name(BF16)}
            record |= {"backend": backend, "kernel_us": f"{sum(time for _, time in kernels):.1f}"}
            record["kernels"] = {"cuda": "CUDA C++", "auto": "Triton and CUDA C++", "eager": ""}.get(
                backend, record["kernels"]
            )
            harness.append([record], args.out / "cuda_kernels.csv", COLUMNS)
            print("\n".join(lines), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Time and memory against label resolution: cross-entropy, CE + Dice, RDD's TSE; batch 1, 19 classes, logits at 1/8.

    python -m benchmarks.full_resolution

Every measurement runs in a process with limited memory (``--limit-gib``), so a rival that needs more fails alone and is
listed as such. CPU only. Appends to ``results/full_resolution.csv`` and prints the table; `benchmarks.publish` writes
the page and the plot.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from . import bench_rdd, bench_resized_cross_entropy, bench_resized_dice
from .harness import RESULTS, Case, Record, append, peak_memory, where
from .report import origin

ROOT = Path(__file__).parents[1]
HEIGHTS = (256, 512, 1024, 2048, 4096)
RIVALS = ("ours", "eager", "compile")
LOSSES = ("cross-entropy", "CE + Dice", "RDD TSE")
COLUMNS = ("date", "commit", "device", "threads", "torch", "loss", "height", "width", "rival", "median_ms", "extra_mib")
CLASSES, STRIDE = 19, 8


def case(loss_name: str, height: int) -> Case:
    """Labels of height x 2 height."""
    make = {
        "cross-entropy": bench_resized_cross_entropy.case,
        "CE + Dice": bench_resized_dice.ce_case,
        "RDD TSE": bench_rdd.tse_case,
    }[loss_name]
    return make((1, CLASSES, height // STRIDE, 2 * height // STRIDE), (height, 2 * height), torch.float32)


def measure(loss_name: str, height: int, rival: str, limit_gib: float) -> dict[str, float | str]:
    """Median milliseconds and extra MiB of forward + backward in this process, or the error."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit_gib * 2**30),) * 2)
    try:
        one = case(loss_name, height)
        rivals = one.rivals("cpu", one.shape)
        loss = torch.compile(rivals["eager"], fullgraph=True) if rival == "compile" else rivals[rival]
        g = torch.Generator().manual_seed(0)
        student, teacher = (torch.randn(one.shape, generator=g) for _ in range(2))
        student.requires_grad_()

        def step() -> None:
            student.grad = None
            loss(student, teacher).backward()

        step()
        student.grad = None
        extra = peak_memory(step, "cpu") - student.nbytes
        times: list[float] = []
        while len(times) < 3 or (len(times) < 15 and sum(times) < 2):
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
        return {"median_ms": statistics.median(times) * 1e3, "extra_mib": extra / 2**20}
    except (RuntimeError, MemoryError) as error:
        return {"died": str(error).partition("\n")[0][:80]}


def newest(records: Iterable[Record]) -> dict[tuple[str, int], dict[str, Record]]:
    """{(loss, height): {rival: latest record}}."""
    found: dict[tuple[str, int], dict[str, Record]] = {}
    for record in records:
        found.setdefault((record["loss"], int(record["height"])), {})[record["rival"]] = record
    return found


def table(rows: Mapping[tuple[str, int], Mapping[str, Record]]) -> str:
    def cell(results: Mapping[str, Record], rival: str, key: str, digits: int) -> str:
        text = results[rival][key] if rival in results else ""
        return text if text in ("", "died") else f"{float(text):,.{digits}f}"

    lines = [
        "| loss | labels | ours ms | eager ms | compile ms | ours MiB | eager MiB | compile MiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (name, height), results in rows.items():
        cells = [cell(results, r, "median_ms", 0) for r in RIVALS] + [cell(results, r, "extra_mib", 1) for r in RIVALS]
        lines.append(f"| {name} | {height}×{2 * height} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + '\n\n"died": needed more memory than the process was given.'


def plot(rows: Mapping[tuple[str, int], Mapping[str, Record]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), constrained_layout=True)
    colours = {"ours": "#0b7a75", "eager": "#c8553d", "compile": "#8d8d8d"}
    for axis, key, label in zip(
        axes, ("median_ms", "extra_mib"), ("time, ms", "memory beyond the gradient, MiB"), strict=True
    ):
        for name, style in (("cross-entropy", "-"), ("RDD TSE", "--")):
            for rival in RIVALS:
                points = [
                    (2 * height**2 / 1e6, float(results[rival][key]))
                    for (loss, height), results in rows.items()
                    if loss == name and rival in results and results[rival][key] != "died"
                ]
                if points:
                    axis.plot(
                        *zip(*points, strict=True),
                        style,
                        marker="o",
                        ms=4,
                        color=colours[rival],
                        label=f"{name}, {rival}",
                    )
        axis.set(xscale="log", yscale="log", xlabel="label pixels, millions", ylabel=label)
        axis.grid(which="major", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--limit-gib", type=float, default=18, help="memory a process may have")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=LOSSES, help="only these")
    parser.add_argument("--heights", type=int, nargs="+", default=HEIGHTS)
    parser.add_argument("--one", nargs=3, metavar=("LOSS", "HEIGHT", "RIVAL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, height, rival = args.one
        print(json.dumps(measure(name, int(height), rival, args.limit_gib)))
        return
    records: list[Record] = []
    for name in args.losses:
        for height in args.heights:
            for rival in RIVALS:
                print(f"… {name} {height} {rival}", file=sys.stderr)
                command = [sys.executable, "-m", "benchmarks.full_resolution", "--limit-gib", str(args.limit_gib)]
                child = subprocess.run(
                    [*command, "--one", name, str(height), rival], capture_output=True, text=True, cwd=ROOT, check=False
                )
                last = (child.stdout.strip().splitlines() or [""])[-1]
                result = json.loads(last) if child.returncode == 0 else {"died": f"exit {child.returncode}"}
                if "died" in result:
                    print(f"  died: {result['died']}", file=sys.stderr)
                here = {k: v for k, v in where("cpu").items() if k in COLUMNS}
                numbers = {k: f"{result[k]:.2f}" if k in result else "died" for k in ("median_ms", "extra_mib")}
                shape = {"loss": name, "height": str(height), "width": str(2 * height), "rival": rival}
                records.append(here | shape | numbers)
    append(records, RESULTS / "full_resolution.csv", COLUMNS)
    print(f"{origin(records[0])}\n\n{table(newest(records))}")


if __name__ == "__main__":
    main()

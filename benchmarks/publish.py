"""`python -m benchmarks.publish`: docs/numbers.md, plots, and tables in README and other pages, from results/*.csv.

python -m benchmarks.publish --add DIR     first adds the rows of DIR/*.csv, such as gpu_check.py's
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fastkd import backends
from fastkd.ops import nfd

from . import bench_step, full_resolution, gpu_kernels, host, training
from .cases import BF16, FEATURE_LOSSES, LOSSES, RECIPES, cpu_cases, gpu_cases
from .harness import COLUMNS, RESULTS, Case, Record, Row, append, newest, read, rows
from .report import (
    PREDICTION,
    host_table,
    kernels_table,
    losses_share,
    losses_table,
    origin,
    plot,
    predictions_table,
    steps_table,
)
from .roofline import GPUS, PER_CLOCK, special_function_rate

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
FILES = {
    "cpu.csv": COLUMNS,
    "cuda.csv": COLUMNS,
    "cpu_steps.csv": bench_step.COLUMNS,
    "cuda_steps.csv": bench_step.COLUMNS,
    "cuda_kernels.csv": gpu_kernels.COLUMNS,
    "cuda_host.csv": host.COLUMNS,
    "full_resolution.csv": full_resolution.COLUMNS,
}
NOT_RUN = "not yet run"
# Operators of csrc and kernels behind a measured loss, if there is more than one backend to choose from.
OPERATORS = {
    "nfd": "nfd", "kd": "kd", "kd_sigmoid": "kd_sigmoid", "cwd": "cwd", "resized_ce": "resized_cross_entropy",
    "resized_kd": "resized_kd", "resized_kd_sigmoid": "resized_kd_sigmoid", "resized_bce": "resized_binary_cross_entropy",
    "resized_smooth_ce": "resized_shaped_cross_entropy", "resized_focal_ce": "resized_shaped_cross_entropy",
    "resized_dice": "resized_dice", "resized_ce_dice": "resized_dice",
}  # fmt: skip
FIRST_RUN = "36b6442"
"""Its kernels for these losses have been replaced; their rows stay in the CSV and are on no page."""
REPLACED = ("resized CE", "resized KD", "RDD TFE", "RDD TSE", "KD")


class Target(NamedTuple):
    """A GPU target, and how to compute it from the rows of one device: {case: the number that counts}."""

    what: str
    wanted: str
    ops: tuple[str, ...]
    number: Callable[[Row], float | None]
    worst: Callable[..., float]
    text: str  # format of the number


def _memory_share(row: Row) -> float | None:
    ours, eager = row.value("ours", "peak_bytes"), row.value("eager", "peak_bytes")
    return ours / eager if ours is not None and eager else None


TFE, TSE = "RDD TFE", "RDD TSE"
TO_TFE = ("resized CE", "resized KD", TFE)
AT_LABELS = (*TO_TFE, TSE)
TRAINING = ("OHEM", "smoothed CE", "focal CE", "Dice", "CE + Dice", "BCE", "KD, sigmoid", "resized KD, sigmoid")
TARGETS = (
    Target("NFD: of the copy bandwidth, for 5 transfers", "≥ 90 %", ("NFD",), Row.copy_share, min, "{:.0%}"),
    Target("KD, CWD: of the copy bandwidth", "≥ 90 %", ("KD", "CWD"), Row.copy_share, min, "{:.0%}"),
    Target("resized CE, KD, TFE: eager ÷ ours", "≥ 20×", TO_TFE, lambda r: r.ratio("eager"), min, "{:.1f}×"),
    Target("resized CE, KD, TFE: compile ÷ ours", "≥ 10×", TO_TFE, lambda r: r.ratio("compile"), min, "{:.1f}×"),
    Target("TSE: eager, which sorts, ÷ ours", "≥ 40×", (TSE,), lambda r: r.ratio("eager"), min, "{:.1f}×"),
    Target("at label resolution: extra memory, of eager's", "≤ 3 %", AT_LABELS, _memory_share, max, "{:.1%}"),
    Target("at label resolution: ÷ the floor", "≤ 2.5×", AT_LABELS, lambda r: r.over_floor, max, "{:.2f}×"),
    Target(
        "host time of one loss call above a bare launch",
        "≤ 40 µs",
        ("NFD", "KD", "CWD", *AT_LABELS),
        lambda r: r.value("ours", "host_us"),
        max,
        "{:.0f} µs",
    ),
)


def targets_table(found: Mapping[tuple[str, ...], Row], steps: list[Record]) -> str:
    """Every GPU target and the worst case of each measured GPU."""
    devices = list(dict.fromkeys(key[0] for key in found)) or [None]
    lines = [
        "| target on an H100 | wanted | " + " | ".join(f"measured{f', {d}' if d else ''}" for d in devices) + " |",
        "|---|---|" + "---|" * len(devices),
    ]
    for target in TARGETS:
        cells = []
        for device in devices:
            numbers = {
                key[1:]: number
                for key, row in found.items()
                if key[0] == device and key[1] in target.ops and (number := target.number(row)) is not None
            }
            if numbers:
                case, number = target.worst(numbers.items(), key=lambda item: item[1])
                cells.append(f"{target.text.format(number)} ({' '.join(part for part in case if part)})")
            else:
                cells.append(NOT_RUN)
        lines.append(f"| {target.what} | {target.wanted} | {' | '.join(cells)} |")
    cells = []
    for device in devices:
        shares = {
            (r["losses"], r["rival"]): f"{r['losses']}, {r['rival']}: {losses_share(r):.1%}"
            for r in steps
            if r["device"] == device and r["recipe"] == "ADE20K" and r["median_ms"] and r["rival"] in ("ours", "eager")
        }
        cells.append("; ".join(shares.values()) or NOT_RUN)
    what = "losses' share of an ADE20K step (bf16, R18 student, R101 teacher)"
    lines.append(f"| {what} | ≤ 5 % where eager's take 40 % | {' | '.join(cells)} |")
    return "\n".join(lines)


def pages(results: Path = RESULTS) -> dict[Path, str]:
    """Path -> text of every page generated from the CSV files."""
    records = {name: read(results / name) for name in FILES}
    cpu = newest(rows(records["cpu.csv"]))
    cuda = present(records["cuda.csv"])
    parts = [
        "# Numbers",
        "Made from `benchmarks/results/*.csv` by `python -m benchmarks.publish`; do not edit. What is measured and how: "
        "[benchmarks.md](benchmarks.md). Of each case, the newest run.",
        "## CPU",
        *_sections(cpu, {c.key: c.targets for c in cpu_cases()}),
    ]
    if cpu:
        parts.append("![times on the CPU](images/losses-cpu.png)")
    if records["full_resolution.csv"]:
        sizes = full_resolution.newest(records["full_resolution.csv"])
        first = next(iter(next(iter(sizes.values())).values()))
        parts += [
            "### Against label resolution",
            "Batch 1, 19 classes, logits at 1/8, fp32, forward and backward; memory beyond the gradient "
            f"(`python -m benchmarks.full_resolution`). {origin(first)}:",
            full_resolution.table(sizes),
        ]
    parts += ["### A training step on the CPU", *_steps(records["cpu_steps.csv"])]
    parts += ["## GPU", *gpu_section(cuda, records["cuda_steps.csv"])]
    parts += [
        "### Kernel times",
        "From the profiler, without host time: forward and backward, bf16, µs. `default`: the backend that is chosen. The floor "
        "is that of the prediction above, at the datasheet's rates. `python -m benchmarks.gpu_kernels`; "
        f"{kernel_origins(records['cuda_kernels.csv'])}.",
        kernels_table(*kernel_times(records["cuda_kernels.csv"])),
        "### Host time of a call",
        "Forward and backward of a loss on 16 numbers, where kernels take no time. `python -m benchmarks.host`; "
        + "; ".join(dict.fromkeys(map(origin_of_host, records["cuda_host.csv"])))
        + ".",
        host_table(records["cuda_host.csv"]),
    ]
    readme = (ROOT / "README.md").read_text()
    for name, table in (("cpu", readme_cpu(cpu)), ("gpu", readme_gpu(newest(cuda)))):
        readme = between_markers(readme, name, table)
    cells = ROOT / "docs" / "full-resolution.md"
    made = {ROOT / "docs" / "numbers.md": "\n\n".join(parts) + "\n", ROOT / "README.md": readme}
    made[cells] = between_markers(cells.read_text(), "cells", cells_table(records["cuda_kernels.csv"]))
    for page, tables in training.tables(results).items():
        path = ROOT / "docs" / f"{page}.md"
        made[path] = path.read_text()
        for name, table in tables.items():
            made[path] = between_markers(made[path], name, table)
    return made


def present(records: Sequence[Record]) -> dict[tuple[str, ...], Row]:
    """Rows without those of kernels that have been replaced."""
    return rows(r for r in records if r["commit"] != FIRST_RUN or r["op"] not in REPLACED)


def default_backend(recipe: str, loss: str, layout: str) -> str:
    """The column of cuda_kernels.csv that has the default backend's time."""
    if loss in gpu_kernels.COMPOSED:
        return "auto"
    first, *others = backends.CHOICE[OPERATORS[loss]]["cuda"]
    if loss == "nfd":
        x = torch.empty(RECIPES[recipe].features, dtype=BF16, device="meta")
        x = x.to(memory_format=gpu_kernels.LAYOUTS[layout])
        return first if nfd.fits_cuda(x, x, "hw") else others[0]
    return first


def newest_kernels(records: Sequence[Record]) -> dict[tuple[str, str, str, str], Record]:
    """{(recipe, loss, layout, backend): bf16 row}: ours of the last commit, eager's newest."""
    commit = [r["commit"] for r in records if r["backend"] != "eager"][-1]
    return {
        (r["recipe"], r["loss"], r["layout"], r["backend"]): r
        for r in records
        if r["dtype"] == "bfloat16" and (r["backend"] == "eager" or r["commit"] == commit)
    }


def kernel_origins(records: Sequence[Record]) -> str:
    found = newest_kernels(records).values()
    ours, eager = (
        sorted({r["commit"] for r in found if (r["backend"] == "eager") == is_eager}) for is_eager in (False, True)
    )
    (device,) = {f"{r['device']}, driver {r['driver']}, torch {r['torch']}" for r in found}
    (version,) = {r["kernels"] for r in found if r["backend"] == "triton"}
    return f"{device}, {version}; ours at {' and '.join(ours)}, eager at {' and '.join(eager)}"


def cells_table(records: Sequence[Record]) -> str:
    """The losses at label resolution in the first run and in the last, NCHW."""
    first = {
        (r["recipe"], r["loss"], r["backend"]): float(r["kernel_us"])
        for r in records
        if (r["commit"], r["dtype"], r["layout"]) == (FIRST_RUN, "bfloat16", "NCHW")
    }
    times, floors = kernel_times(records)
    lines = [
        f"| | {FIRST_RUN}: Triton | CUDA C++ | now: Triton | CUDA C++ | default | floor | eager |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for recipe in ("ADE20K", "Cityscapes", "Cityscapes, full"):
        for loss in ("resized_ce", "resized_kd", "rdd_tfe", "rdd_tse"):
            name = _name(loss)
            if (now := times.get((recipe, name, "NCHW"))) is None:
                continue
            numbers = [first.get((recipe, loss, by)) for by in ("triton", "cuda")]
            numbers += [now.get(by) for by in ("triton", "cuda", "default")] + [floors[recipe, name], now.get("eager")]
            cells = ["–" if x is None else f"{x:,.0f}" for x in numbers]
            lines.append(f"| {recipe}, {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def origin_of_host(record: Record) -> str:
    return (
        f"{record['device']}, torch {record['torch']}, {record['kernels']}, commit {record['commit']}, {record['date']}"
    )


def kernel_times(
    records: Sequence[Record],
) -> tuple[dict[tuple[str, str, str], dict[str, float]], dict[tuple[str, str], float]]:
    """Arguments of :func:`report.kernels_table`."""
    times: dict[tuple[str, str, str], dict[str, float]] = {}
    floors: dict[tuple[str, str], float] = {}
    found = newest_kernels(records)
    for (recipe, loss, layout, backend), record in found.items():
        of = times.setdefault((recipe, _name(loss), layout), {})
        of[backend] = float(record["kernel_us"])
        if backend == default_backend(recipe, loss, layout):
            of["default"] = of[backend]
        sizes, gpu = RECIPES[recipe], GPUS["H100"]
        case = LOSSES[loss](sizes.features if loss in FEATURE_LOSSES else sizes.logits, sizes.crop, BF16)
        rate = special_function_rate(record["device"])
        floors[recipe, _name(loss)] = case.work.seconds(gpu.bandwidth, rate) * 1e6
    return times, floors


def _name(loss: str) -> str:
    sizes = RECIPES["CamVid"]
    return LOSSES[loss](sizes.features if loss in FEATURE_LOSSES else sizes.logits, sizes.crop, BF16).op


def gpu_section(cuda: Mapping[tuple[str, ...], Row], steps: list[Record]) -> list[str]:
    """Targets, measurements, and the prediction."""
    if cuda:
        parts = [*_sections(cuda, {}), "![times on the GPU](images/losses-cuda.png)"]
    else:
        parts = ["**Not yet run on a GPU.** `python3 benchmarks/gpu_check.py --out DIR` measures what is missing here."]
    sources = [
        f"- {name}: {gpu.bandwidth / 1e12:g} TB/s; {gpu.units} × {gpu.clock / 1e9:g} GHz × {PER_CLOCK} exponentials a second; "
        f"{gpu.source}."
        for name, gpu in GPUS.items()
    ]
    return [
        "### Targets",
        targets_table(cuda, steps),
        "### Losses on a GPU",
        *parts,
        "### A training step on a GPU",
        *_steps(steps),
        "### Prediction",
        PREDICTION,
        predictions_table([case for case in gpu_cases() if case.dtype == torch.bfloat16], cuda),
        "The datasheet numbers and where they are from:",
        "\n".join(sources),
    ]


def _sections(found: Mapping[tuple[str, ...], Row], targets: Mapping[tuple[str, ...], dict[str, float]]) -> list[str]:
    """A table per machine and commit, under its origin."""
    groups: dict[str, dict[tuple[str, ...], Row]] = {}
    for key, row in found.items():
        groups.setdefault(origin(next(iter(row.rivals.values()))), {})[key] = row
    return [part for where, group in groups.items() for part in (f"{where}:", losses_table(group, targets))] or [
        NOT_RUN
    ]


def _steps(records: list[Record]) -> list[str]:
    newest = {tuple(r[k] for k in bench_step.KEY): r for r in records}
    groups: dict[str, list[Record]] = {}
    for record in newest.values():
        groups.setdefault(origin(record), []).append(record)
    return [part for where, group in groups.items() for part in (f"{where}:", steps_table(group))] or [
        f"{NOT_RUN.capitalize()}."
    ]


def _shape(case: Case) -> str:
    return f"{case.shape}{f' → {case.size[0]}×{case.size[1]}' if case.size else ''}"


def _by_origin(found: Mapping[tuple[str, ...], Row], cases: Sequence[Case], head: str, line: Callable[..., str]) -> str:
    """The measured cases in order: a table per machine and commit."""
    by_case = {key[1:]: row for key, row in found.items()}
    groups: dict[str, list[str]] = {}
    for case in cases:
        if case.key in by_case:
            row = by_case[case.key]
            groups.setdefault(origin(row.ours), []).append(line(case, row))
    return "\n\n".join("\n".join([f"{where}:", "", head, *lines]) for where, lines in groups.items())


def readme_cpu(cpu: Mapping[tuple[str, ...], Row]) -> str:
    """The fp32 rows, except those of docs/training-losses.md."""

    def line(case: Case, row: Row) -> str:
        numbers = [row.ratio("eager"), row.ratio("compile"), row.over_floor]
        return (
            f"| {case.op} | {_shape(case)} | " + " | ".join("–" if n is None else f"{n:.1f}×" for n in numbers) + " |"
        )

    head = "| loss | shape, fp32 | eager ÷ ours | compile ÷ ours | ours ÷ floor |\n|---|---|---:|---:|---:|"
    wanted = [case for case in cpu_cases() if case.dtype == torch.float32 and case.op not in TRAINING]
    return _by_origin(cpu, wanted, head, line)


def readme_gpu(cuda: Mapping[tuple[str, ...], Row]) -> str:
    """Time and extra memory of the faster of our backends, eager and compile."""

    def line(case: Case, row: Row) -> str:
        timed = {rival: ms for rival in row.rivals if (ms := row.value(rival, "median_ms"))}
        best = min((rival for rival in timed if rival.partition(",")[0] == "ours"), key=timed.__getitem__)
        times = [timed.get(rival) for rival in (best, "eager", "compile")]
        memory = [row.value(rival, "peak_bytes") for rival in (best, "eager")]
        cells = ["–" if ms is None else f"{ms:.3g}" for ms in times]
        cells += [
            "–" if size is None else "< 0.1" if size < 1e5 else f"{size / 1e6:,.{1 if size < 1e6 else 0}f}"
            for size in memory
        ]
        return f"| {case.op} | {_shape(case)} | {' | '.join(cells)} |"

    head = "| loss | shape, bf16 | ours, ms | eager | compile | ours, extra MB | eager |\n|---|---|---:|---:|---:|---:|---:|"
    return _by_origin(cuda, [case for case in gpu_cases() if case.dtype == torch.bfloat16], head, line)


def between_markers(text: str, name: str, table: str) -> str:
    """Replaces what is between the markers of ``name`` in ``text``."""
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the page must have {begin} and {end} once each")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{table}\n{end}{rest.partition(end)[2]}"


def publish() -> None:
    """Writes the pages and draws the plots."""
    for path, text in pages().items():
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")
    for device in ("cpu", "cuda"):
        if found := newest(present(read(RESULTS / f"{device}.csv"))):
            plot(found, IMAGES / f"losses-{device}.png")
    if records := read(RESULTS / "full_resolution.csv"):
        full_resolution.plot(full_resolution.newest(records), IMAGES / "full-resolution.png")


def add(folder: Path) -> None:
    """Adds the rows of ``folder`` that are missing here."""
    for name, columns in FILES.items():
        here = read(RESULTS / name)
        new = [record for record in read(folder / name) if record not in here]
        if new:
            append(new, RESULTS / name, columns)
        print(f"{name}: {len(new)} new rows")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.publish", description=__doc__)
    parser.add_argument("--add", type=Path, metavar="DIR", help="first add the rows of DIR/*.csv")
    parser.add_argument(
        "--gpu", type=Path, metavar="DIR", help="only print the results in DIR/cuda*.csv, and plot them there"
    )
    args = parser.parse_args()
    if args.gpu:
        found = newest(rows(read(args.gpu / "cuda.csv")))
        print("\n\n".join(gpu_section(found, read(args.gpu / "cuda_steps.csv"))))
        if found:
            plot(found, args.gpu / "losses-cuda.png")
        return
    if args.add:
        add(args.add)
    publish()


if __name__ == "__main__":
    main()

"""Scores of training runs: results/training.csv, and its tables on the pages that the rows name.

    python -m benchmarks.training street-scenes scores runs/teacher runs/plain-0 runs/kd-0     adds their rows
    python -m benchmarks.publish                                                               writes the tables

A row is one run, with its seed in `seeds`. A row with several seeds is the mean of runs that were not kept. `±` is the
standard deviation over the seeds (n − 1).
"""

from __future__ import annotations

import argparse
import datetime
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .harness import RESULTS, Record, append, read

if TYPE_CHECKING:
    from fastkd.train.runs import Run

FILE = "training.csv"
COLUMNS = (
    *("date", "commit", "torch", "threads", "page", "table", "run", "method", "weights", "seeds", "labels", "unlabelled"),
    *("steps", "seconds", "miou", "miou_deviation", "pixel_accuracy", "pixel_accuracy_deviation", "against_plain", "class_iou"),
)  # fmt: skip
PLAIN, TEACHER = "plain", "teacher"
LONGER = "plain, as long"  # the plain student trained for the time of a distilled one
SCORES = ("miou", "pixel_accuracy")


def record(run: Run, page: str, table: str, *, commit: str, threads: str) -> Record:
    """The row of a finished run, named after it without the trailing seed number."""
    if not run.finished:
        raise ValueError(f"{run.path}: {'; '.join(run.problems)}")
    images, loss = run.result["images"], run.settings["loss"]
    methods = [] if run.method == "none" else run.method.split("+")
    values = {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "torch": run.result["versions"]["torch"],
        "threads": threads,
        "page": page,
        "table": table,
        "run": re.sub(r"-\d+$", "", run.name),
        "method": run.method,
        "weights": " ".join(f"{loss[m]['kd_weight' if m == 'rdd' else 'weight']:g}" for m in methods),
        "seeds": str(run.seed),
        "labels": str(images["labelled"]["images"]),
        "unlabelled": str(images["unlabelled"]["images"]),
        "steps": f"{run.result['steps']:.0f}",
        "seconds": f"{run.result['seconds']:.0f}",
        "class_iou": "; ".join(f"{name} {100 * v:.1f}" for name, v in run.result["class_iou"].items() if v is not None),
    }
    return dict.fromkeys(COLUMNS, "") | values | {key: f"{100 * run.result[key]:.2f}" for key in SCORES}


def by_run(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The rows of each run, one per seed (the last), in order of first occurrence."""
    found: dict[str, dict[str, Record]] = {}
    for row in records:
        found.setdefault(row["run"], {})[row["seeds"]] = row
    return {name: list(rows.values()) for name, rows in found.items()}


def table(runs: Mapping[str, Sequence[Record]]) -> str:
    """Mean ± deviation over the seeds, and the per-seed change from the plain student at equal steps and equal time."""
    columns = ["run", "labels", "steps", "time, s"]
    columns += [
        column for score in ("mIoU %", "pixel accuracy %") for column in (score, "against plain", "at equal time")
    ]
    equal_steps, equal_time = ({row["seeds"]: row for row in runs.get(name, ())} for name in (PLAIN, LONGER))
    lines = []
    for name, rows in runs.items():
        first = rows[0]
        images = first["labels"] + (f" + {first['unlabelled']} without" if first["unlabelled"] != "0" else "")
        cells = [name, images, first["steps"], f"{_mean(rows, 'seconds'):.0f}" if first["seconds"] else ""]
        kept = [float(change) for change in first["against_plain"].split()]
        for key in SCORES:
            changes = _changes(rows, equal_steps, key) or (kept if key == "miou" else [])
            cells += [_score(rows, key), "" if name in (PLAIN, TEACHER) else _signed(changes)]
            cells.append("" if name in (PLAIN, TEACHER, LONGER) else _signed(_changes(rows, equal_time, key)))
        lines.append(cells)
    shown = [number for number in range(len(columns)) if any(cells[number] for cells in lines)]
    text = [_line([columns[number] for number in shown]), "|---|" + "---:|" * (len(shown) - 1)]
    return "\n".join([*text, *(_line([cells[number] for number in shown]) for cells in lines)])


def class_table(runs: Mapping[str, Sequence[Record]]) -> str:
    """IoU in percent, mean over seeds: one row per class."""
    found = {name: [_classes(row) for row in rows] for name, rows in runs.items()}
    lines = [_line(["class", *found]), "|---|" + "---:|" * len(found)]
    for name in next(iter(found.values()))[0]:
        cells = [f"{statistics.fmean(row[name] for row in rows):.1f}" for rows in found.values()]
        lines.append(_line([name, *cells]))
    return "\n".join(lines)


def tables(results: Path = RESULTS) -> dict[str, dict[str, str]]:
    """Page -> marker -> table: the scores of each table, and the classes of the one called "scores"."""
    found: dict[str, dict[str, list[Record]]] = {}
    for row in read(results / FILE):
        found.setdefault(row["page"], {}).setdefault(row["table"], []).append(row)
    return {
        page: {name: table(by_run(rows)) for name, rows in parts.items()}
        | {"classes": class_table(by_run(parts["scores"]))}
        for page, parts in found.items()
    }


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _classes(row: Record) -> dict[str, float]:
    pairs = (entry.rpartition(" ") for entry in row["class_iou"].split("; "))
    return {name: float(value) for name, _, value in pairs}


def _mean(rows: Sequence[Record], key: str) -> float:
    return statistics.fmean(float(row[key]) for row in rows)


def _score(rows: Sequence[Record], key: str) -> str:
    spread = f"{statistics.stdev(float(row[key]) for row in rows)}" if len(rows) > 1 else rows[0][f"{key}_deviation"]
    return f"{_mean(rows, key):.1f}" + (f" ± {float(spread):.1f}" if spread else "")


def _changes(rows: Sequence[Record], base: Mapping[str, Record], key: str) -> list[float]:
    """Per seed; a mean of several seeds has none."""
    single = (row for row in rows if row["seeds"] in base and " " not in row["seeds"])
    return [float(row[key]) - float(base[row["seeds"]][key]) for row in single]


def _signed(changes: Sequence[float]) -> str:
    return ", ".join(f"{change:+.1f}" for change in changes).replace("-", "−")


def main() -> None:
    from fastkd.train.runs import read_run  # it needs the trainer's packages; the tables do not

    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("page", help="file of docs/ without its ending")
    parser.add_argument("table", help="marker of the table in the page")
    parser.add_argument("runs", nargs="+", type=Path, help="directories of finished runs")
    parser.add_argument("--commit", help="commit of the runs; default: the recorded one")
    parser.add_argument("--threads", default="1", help="CPU threads of the runs (default: %(default)s)")
    args = parser.parse_args()
    runs = [read_run(path) for path in args.runs]
    new = [
        record(
            run, args.page, args.table, threads=args.threads, commit=args.commit or str(run.result["versions"]["git"])
        )
        for run in runs
    ]
    here = read(RESULTS / FILE)
    append([row for row in new if row not in here], RESULTS / FILE, COLUMNS)


if __name__ == "__main__":
    main()

"""A self-contained page about runs: numbers, curves, pictures, configurations, and conclusions.

`report.html` is a single file. Runs that differ only in the seed share a row, mean ± standard deviation. Truncated and
damaged runs are shown as such. The texts around the tables are in `report.html.j2` and `table.md.j2`.
"""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, select_autoescape

from fastkd.train.curves import as_svg, charts, charts_of_terms, write_png
from fastkd.train.files import write_text, write_whole
from fastkd.train.log import duration
from fastkd.train.runs import Group, Run, grouped, load_runs, verdict, with_deviation

MISSING = "\N{EN DASH}"  # for a missing number


class Row(NamedTuple):
    """group: determines the colour mark. best: indices of the cells to mark."""

    cells: Sequence[str]
    group: Group | None = None
    tags: Sequence[str] = ()
    best: Sequence[int] = ()


class Table(NamedTuple):
    """words: number of leading text columns."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Row]
    captions: Sequence[str] = ()
    words: int = 2
    folded: bool = False


def write_report(
    out_dir: Path | str,
    runs: Sequence[Path | str],
    *,
    title: str,
    notes: str | None = None,
    panels: Sequence[tuple[str, Path]] = (),
) -> Path:
    """Writes `report.html`, `table.md` and `curves.png` into `out_dir`; returns the page's path.

    runs: run directories with `log.jsonl`, `result.json` and `config.yaml`; any may be missing or truncated.
    notes: plain text under the title, with empty lines between paragraphs.
    panels: captions and picture files, which the page embeds as they are.

    Raises ValueError without runs.
    """
    if not runs:
        raise ValueError("a report needs at least one run directory, got none")
    out = Path(out_dir)
    groups = grouped(load_runs(runs))
    found, terms = charts(groups), charts_of_terms(groups[0]) if len(groups) == 1 else []
    write_whole(out / "curves.png", lambda beside: write_png(found, beside))
    tables = _runs(groups), _seeds(groups), _costs(groups), _classes(groups)
    contents = {
        "title": title,
        "notes": (notes or "").split("\n\n"),
        "verdict": verdict(groups),
        "tables": [table for table in tables if table.rows],
        "groups": groups,
        "figures": {chart.name: as_svg(chart) for chart in found + terms},
        "pictures": [_picture(*panel) for panel in panels],
    }
    folder, escaped = FileSystemLoader(Path(__file__).parent), select_autoescape(["html.j2"])
    templates = Environment(loader=folder, autoescape=escaped, trim_blocks=True)
    for name in ("table.md", "report.html"):
        write_text(out / name, templates.get_template(f"{name}.j2").render(contents))
    return out / "report.html"


def _number(value: float | None, form: str = ".1f", factor: float = 1.0) -> str:
    return MISSING if value is None else f"{factor * value:{form}}"


def _scaled(value: float | None, units: dict[str, float], form: str = ".3g") -> str:
    """A number in the largest unit in which it is at least 1, or the last."""
    if value is None:
        return MISSING
    unit = next((unit for unit, size in units.items() if value >= size), list(units)[-1])
    return f"{value / units[unit]:{form}} {unit}".strip()


COLUMNS = ("run", "method", "mIoU %", "pixel acc. %", "s / step", "losses %", "parameters", "steps", "images", "time")
CAPTION = (
    "mIoU and pixel accuracy on the validation split. “s / step”: seconds per training step; “losses %”: the share of it spent "
    "in the losses, forward and backward; “images”: training images with a label + without; “time”: of the whole run, "
    "validation included."
)


def _cells(group: Group) -> list[str]:
    """The cells of `COLUMNS`."""
    first, steps, seconds = group.first, group.first.number("steps"), group.mean("seconds")
    scores = [[100 * value for value in group.numbers(key)] for key in ("miou", "pixel_accuracy")]
    return [
        group.name + (f" ({len(group.runs)} seeds)" if len(group.runs) > 1 else ""),
        group.method,
        *(with_deviation(values) if values else MISSING for values in scores),
        _number(group.mean("seconds_per_step"), ".3g"),
        _number(group.mean("loss_share"), factor=100),
        _scaled(group.mean("params"), {"G": 1e9, "M": 1e6, "k": 1e3, "": 1}, ".2f"),
        f"{first.step} (stopped)" if steps is None and first.step is not None else _number(steps, ".0f"),
        first.counts("images") or MISSING,
        MISSING if seconds is None else duration(seconds),
    ]


def _runs(groups: Sequence[Group]) -> Table:
    rows = []
    for group in groups:
        tags = [{"teacher": "teacher", "plain": "plain student"}.get(group.role, "")]
        if unfinished := sum(not run.finished for run in group.runs):
            tags.append((f"{unfinished} of {len(group.runs)} " if len(group.runs) > 1 else "") + "unfinished")
        elif any("log.jsonl" in problem for run in group.runs for problem in run.problems):
            tags.append("log damaged")
        rows.append(Row(_cells(group), group, [tag for tag in tags if tag]))
    return Table("Runs" if len(groups) > 1 else "Run", COLUMNS, rows, [CAPTION])


def _seeds(groups: Sequence[Group]) -> Table:
    rows = []
    for group in (group for group in groups if len(group.runs) > 1):
        for run in group.runs:
            name, _, *cells = _cells(Group(run.name, [run]))
            rows.append(Row([name, str(run.seed), *cells], group))
    return Table("Each seed", ("run", "seed", *COLUMNS[2:]), rows, folded=True)


COST_COLUMNS = ("run", "kernels", "losses %", "ms", "ms, plain", "faster", "memory", "memory, plain", "less")
COST_CAPTION = (
    "One forward and backward of the losses alone, at the run's own shapes: with the kernels that the run used, and in plain "
    "PyTorch. Memory is the peak beyond the inputs and their gradients. An asterisk: one image, times the batch."
)


def _costs(groups: Sequence[Group]) -> Table:
    """Cost of the losses in each group's first run, if measured."""
    rows, captions = [], [COST_CAPTION]
    for group in groups:
        if not (losses := group.first.result.get("losses")):
            continue
        names = losses.get("backends")
        kernels = ", ".join(map(str, names)) if isinstance(names, list) else MISSING
        cells = [group.name, kernels, _number(group.first.number("loss_share"), factor=100)]
        cells += _compared(group.first, "seconds", lambda value: _number(value, ".3g", 1000))
        cells += _compared(
            group.first, "bytes", lambda value: _scaled(value, {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10})
        )
        rows.append(Row(cells, group))
        captions += [f"{group.name}: {losses['note']}."] if losses.get("note") else []
    return Table("What the losses cost", COST_COLUMNS, rows, captions)


def _compared(run: Run, key: str, text: Callable[[float | None], str]) -> list[str]:
    """What the losses cost with the kernels, in plain PyTorch, and the ratio."""
    ours, plain = (run.number("losses", side, key) for side in ("ours", "eager"))
    images = {run.number("losses", side, "images") for side in ("ours", "eager")}
    star = "*" if plain is not None and len(images) > 1 else ""
    ratio = plain / ours if ours and plain else None
    return [text(ours), text(plain) + star, MISSING if ratio is None else f"{ratio:.{int(ratio < 10)}f}×"]


def _classes(groups: Sequence[Group]) -> Table:
    """IoU of each class, averaged over a group's runs; the best students, as printed, are marked."""
    having = [group for group in groups if any(run.result.get("class_iou") for run in group.runs)]
    rows = []
    for name in dict.fromkeys(name for g in having for run in g.runs for name in run.result.get("class_iou", {})):
        cells = [name, *(_number(group.mean("class_iou", name), factor=100) for group in having)]
        students = [i for i, g in enumerate(having, 1) if g.role != "teacher" and cells[i] != MISSING]
        top = max((float(cells[i]) for i in students), default=0.0)
        rows.append(Row(cells, best=[i for i in students if float(cells[i]) == top > 0 and len(students) > 1]))
    marked = " The best of the students is marked." if len(having) > 1 else ""
    caption = f"Per cent.{marked} A dash: neither labelled nor predicted."
    return Table("IoU per class", ["class", *(group.name for group in having)], rows, [caption], words=1)


def _picture(caption: str, file: Path) -> tuple[str, str]:
    """Caption and data URL, or the reason why there is none."""
    try:
        data = base64.b64encode(file.read_bytes()).decode("ascii")
    except OSError as error:
        return caption, f"picture left out: {error}"
    return caption, f"data:{mimetypes.guess_type(file.name)[0]};base64,{data}"

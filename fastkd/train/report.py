"""A self-contained page about runs: numbers, curves, pictures, configurations, and conclusions.

`report.html` is a single file (template: `report.html.j2`). Runs that differ only in the seed share a row, mean ±
standard deviation. Truncated and damaged runs are shown as such.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from PIL import Image

from fastkd.train.curves import as_svg, charts, charts_of_terms, write_png
from fastkd.train.files import write_text, write_whole
from fastkd.train.log import duration
from fastkd.train.runs import Group, as_number, grouped, load_runs, verdict

TEMPLATE = Path(__file__).with_name("report.html.j2")
MISSING = "\N{EN DASH}"  # for a missing number
MOST_BYTES = 300_000  # of a PNG picture in the page; larger ones become JPEG

Panel = Any  # a Pillow picture, its path, or (caption, either)


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
    panels: Sequence[Panel] = (),
) -> Path:
    """Writes `report.html`, `table.md` and `curves.png` into `out_dir`; returns the page's path.

    runs: run directories with `log.jsonl`, `result.json` and `config.yaml`; any may be missing or truncated.
    notes: plain text under the title, with empty lines between paragraphs.
    panels: Pillow images or files, each alone or as (caption, picture).

    Raises ValueError without runs.
    """
    from jinja2 import Environment
    from markupsafe import Markup

    if not runs:
        raise ValueError("a report needs at least one run directory, got none")
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    groups = grouped(load_runs(runs))
    lines, found = verdict(groups), charts(groups)
    write_whole(out / "curves.png", lambda beside: write_png(found, beside))
    tables = [table for table in (_runs(groups), _seeds(groups), _costs(groups), _classes(groups)) if table.rows]
    write_text(out / "table.md", _markdown(tables, groups, title, lines))
    figures = [*found, *(charts_of_terms(groups[0]) if len(groups) == 1 else ())]
    page = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    html = page.render(
        title=title, notes=(notes or "").split("\n\n"), verdict=lines, tables=tables, groups=groups,
        figures=[Markup(as_svg(chart)) for chart in figures],
        names=[chart.name for chart in figures], pictures=[_picture(panel) for panel in panels],
    )  # fmt: skip
    write_text(out / "report.html", html)
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
    scores = []
    for key in ("miou", "pixel_accuracy"):
        deviation = group.spread(key)
        scores.append(_number(group.mean(key), factor=100))
        scores[-1] += "" if deviation is None else f" ± {100 * deviation:.1f}"
    return [
        group.name + (f" ({len(group.runs)} seeds)" if len(group.runs) > 1 else ""), group.method, *scores,
        _number(group.mean("seconds_per_step"), ".3g"), _number(group.mean("loss_share"), factor=100),
        _scaled(group.mean("params"), {"G": 1e9, "M": 1e6, "k": 1e3, "": 1}, ".2f"),
        f"{first.step} (stopped)" if steps is None and first.step is not None else _number(steps, ".0f"),
        first.counts("images") or MISSING, MISSING if seconds is None else duration(seconds),
    ]  # fmt: skip


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
    several = [(group, run) for group in groups if len(group.runs) > 1 for run in group.runs]
    cells = [(group, run, _cells(Group(run.name, [run]))) for group, run in several]
    rows = [Row([own[0], str(run.seed), *own[2:]], group) for group, run, own in cells]
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
        ours, eager = (side if isinstance(side := losses.get(name), dict) else {} for name in ("ours", "eager"))
        names, cells = losses.get("backends"), []
        star = "*" if eager.get("images") != ours.get("images") else ""
        for key in ("seconds", "bytes"):
            left, right = as_number(ours.get(key)), as_number(eager.get(key))
            ratio = right / left if left and right else None
            texts = [
                _number(value, ".3g", 1000)
                if key == "seconds"
                else _scaled(value, {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10})
                for value in (left, right)
            ]
            texts[1] += star if right is not None else ""
            cells += [*texts, MISSING if ratio is None else f"{ratio:.{int(ratio < 10)}f}×"]
        kernels = ", ".join(map(str, names)) if isinstance(names, list) else MISSING
        rows.append(Row([group.name, kernels, _number(group.first.number("loss_share"), factor=100), *cells], group))
        captions += [f"{group.name}: {losses['note']}."] if losses.get("note") else []
    return Table("What the losses cost", COST_COLUMNS, rows, captions)


def _classes(groups: Sequence[Group]) -> Table:
    """IoU of each class, averaged over a group's runs; the best students, as printed, are marked."""
    having = [(g, found) for g in groups if any(found := [run.result.get("class_iou", {}) for run in g.runs])]
    rows = []
    for name in dict.fromkeys(name for _, found in having for table in found for name in table):
        cells = [name]
        for _, found in having:
            values = [v for table in found if (v := as_number(table.get(name))) is not None]
            cells.append(_number(fmean(values), factor=100) if values else MISSING)
        students = [i for i, (g, _) in enumerate(having, 1) if g.role != "teacher" and cells[i] != MISSING]
        top = max((float(cells[i]) for i in students), default=0.0)
        rows.append(Row(cells, best=[i for i in students if float(cells[i]) == top > 0 and len(students) > 1]))
    marked = " The best of the students is marked." if len(having) > 1 else ""
    caption = f"Per cent.{marked} A dash: neither labelled nor predicted."
    return Table("IoU per class", ["class", *(group.name for group, _ in having)], rows, [caption], words=1)


def _markdown(tables: Sequence[Table], groups: Sequence[Group], title: str, lines: Sequence[str]) -> str:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    text = [f"# {title}", ""]
    for table in tables:
        rule = "|" + "---|" * table.words + "---:|" * (len(table.columns) - table.words)
        text += [f"## {table.title}", "", row(table.columns), rule]
        text += [row([f"**{c}**" if i in best else c for i, c in enumerate(cells)]) for cells, _, _, best in table.rows]
        text += ["", *table.captions, ""]
    text += [f"- {line}" for line in lines]
    text += [f"- {run.name}: {problem}." for group in groups for run in group.runs for problem in run.problems]
    return "\n".join(text) + "\n"


def _picture(panel: Panel) -> tuple[str, str]:
    """Caption and data URL, or the reason why there is none; PNG, or JPEG if that is large."""
    caption, picture = panel if isinstance(panel, (tuple, list)) else ("", panel)
    try:
        picture = (picture if isinstance(picture, Image.Image) else Image.open(picture)).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        return str(caption), f"picture left out: {error}"
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 90})):
        buffer = io.BytesIO()
        picture.save(buffer, format=kind, **options)
        if buffer.tell() < MOST_BYTES:
            break
    return str(caption), f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"

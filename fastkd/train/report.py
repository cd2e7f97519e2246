"""One self-contained page about a set of runs: numbers, curves, pictures, configurations, and what they do and do not show.

`report.html` needs nothing beside it (template: `report.html.j2`). Runs that differ in their seed alone are one row, mean ±
standard deviation. A run that was cut short, or whose files are damaged, is shown as that.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from fastkd.train.curves import as_svg, charts, charts_of_terms, write_png
from fastkd.train.files import write_text, write_whole
from fastkd.train.log import duration
from fastkd.train.runs import Group, Run, as_number, grouped, load_runs, verdict

TEMPLATE = Path(__file__).with_name("report.html.j2")
MISSING = "\N{EN DASH}"  # a number that is not there
MOST_BYTES = 300_000  # of a picture in the page as PNG; above that it is a JPEG

Panel = Any  # a Pillow picture, a path of one, or (caption, either)


class Row(NamedTuple):
    """group: whose colour stands before it. marks: index of a cell -> "best" or "teacher"."""

    cells: Sequence[str]
    group: Group | None = None
    tags: Sequence[str] = ()
    marks: Any = None


class Table(NamedTuple):
    """words: how many of the first columns hold text."""

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
    """Write `report.html`, `table.md` and `curves.png` into `out_dir`; returns the page's path.

    runs: run directories with `log.jsonl`, `result.json` and `config.yaml`, any of them missing or cut short.
    notes: plain text shown under the title, empty lines between paragraphs.
    panels: pictures to show: Pillow images or files, each alone or as (caption, picture).
    `ValueError`: no runs.
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
    tables = [_runs(groups), _seeds(groups), _costs(groups), _classes(groups)]
    write_text(out / "table.md", _markdown(tables, groups, title, lines))
    page = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    figures = [*found, *(charts_of_terms(groups[0]) if len(groups) == 1 else ())]
    html = page.render(
        title=title, notes=[p.strip() for p in re.split(r"\n\s*\n", notes or "") if p.strip()], verdict=lines,
        tables=tables, groups=groups, figures=[Markup(as_svg(chart)) for chart in figures],
        about_curves=_about_curves(groups), pictures=[_picture(panel) for panel in panels],
    )  # fmt: skip
    write_text(out / "report.html", html)
    return out / "report.html"


def _text(form: str, factor: float = 1.0) -> Callable[[float | None], str]:
    return lambda value: MISSING if value is None else form.format(factor * value)


_percent = _text("{:.1f}", 100)


def _ratio(value: float) -> str:
    return f"{value:.0f}×" if value >= 10 else f"{value:.1f}×"


def _seconds(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _scaled(value: float | None, units: tuple[tuple[float, str], ...], form: str) -> str:
    """A number in the first unit that it fills, or the last."""
    if value is None:
        return MISSING
    size, unit = next((u for u in units if value >= u[0]), units[-1])
    return f"{value / size:{form}} {unit}".strip()


def _bytes(value: float | None) -> str:
    return _scaled(value, ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")), ".3g")


def _row(of: Group | Run) -> list[str]:
    """The cells of `COLUMNS`, of a group's mean or of a run."""
    group, first = (of, of.first) if isinstance(of, Group) else (Group(of.name, [of]), of)

    def spread(key: str) -> str:
        deviation = group.spread(key)
        return _percent(group.mean(key)) + ("" if deviation is None else f" ± {_percent(deviation)}")

    steps = first.number("steps")
    count = _scaled(group.mean("params"), ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")), ".2f")
    stopped = MISSING if first.step is None else f"{first.step} (stopped)"
    seconds = group.mean("seconds")
    return [
        group.name + (f" ({len(group.runs)} seeds)" if len(group.runs) > 1 else ""), group.method, spread("miou"),
        spread("pixel_accuracy"), _seconds(group.mean("seconds_per_step")), _percent(group.mean("loss_share")), count,
        stopped if steps is None else f"{steps:.0f}", first.images or MISSING,
        MISSING if seconds is None else duration(seconds),
    ]  # fmt: skip


COLUMNS = ("run", "method", "mIoU %", "pixel acc. %", "s / step", "losses %", "parameters", "steps", "images", "time")
CAPTION = (
    "mIoU and pixel accuracy on the validation split. “s / step”: seconds of a training step; “losses %”: the share of it spent "
    "in the losses, forward and backward; “images”: training images with a label + without; “time”: of the whole run, "
    "validation included."
)


def _runs(groups: Sequence[Group]) -> Table:
    rows = []
    for group in groups:
        tags = [{"teacher": "teacher", "plain": "plain student"}.get(group.role, "")]
        if unfinished := sum(not run.finished for run in group.runs):
            tags.append((f"{unfinished} of {len(group.runs)} " if len(group.runs) > 1 else "") + "unfinished")
        elif any("log.jsonl" in problem for run in group.runs for problem in run.problems):
            tags.append("log damaged")
        rows.append(Row(_row(group), group, [tag for tag in tags if tag], {}))
    return Table("Runs" if len(groups) > 1 else "Run", COLUMNS, rows, [CAPTION])


def _seeds(groups: Sequence[Group]) -> Table:
    several = [(group, run) for group in groups if len(group.runs) > 1 for run in group.runs]
    rows = [
        Row([cells[0], str(run.seed), *cells[2:]], group, (), {}) for group, run in several for cells in [_row(run)]
    ]
    return Table("Each seed", ("run", "seed", *COLUMNS[2:]), rows, folded=True)


COST_COLUMNS = ("run", "kernels", "losses %", "ms", "ms, plain", "faster", "memory", "memory, plain", "less")
COST_CAPTION = (
    "One forward and backward of the losses alone, at the run's own shapes: with the kernels that the run used, and in plain "
    "PyTorch. Memory is the peak beyond the inputs and their gradients. An asterisk: one image, times the batch."
)


def _costs(groups: Sequence[Group]) -> Table:
    """Cost of the losses in each group's first run, if it was measured."""
    rows, captions = [], [COST_CAPTION]
    for group in groups:
        losses = group.first.result.get("losses")
        if not isinstance(losses, dict):
            continue
        ours, eager = (side if isinstance(side := losses.get(name), dict) else {} for name in ("ours", "eager"))
        names, cells = losses.get("backends"), []
        for key, text in (("seconds", _text("{:.3g}", 1000)), ("bytes", _bytes)):
            left, right = as_number(ours.get(key)), as_number(eager.get(key))
            star = "*" if right is not None and eager.get("images") != ours.get("images") else ""
            cells += [text(left), text(right) + star, _ratio(right / left) if left and right else MISSING]
        kernels = ", ".join(map(str, names)) if isinstance(names, list) else MISSING
        rows.append(Row([group.name, kernels, _percent(group.first.number("loss_share")), *cells], group, (), {}))
        captions += [f"{group.name}: {losses['note']}."] if losses.get("note") else []
    return Table("What the losses cost", COST_COLUMNS, rows, captions)


def _classes(groups: Sequence[Group]) -> Table:
    """IoU of each class, mean of a group's runs; the best students as they are printed are marked."""
    having: list[tuple[Group, dict[str, float | None]]] = []
    for group in groups:
        tables = [t for run in group.runs if isinstance(t := run.result.get("class_iou"), dict) and t]
        if tables:
            columns = {n: [v for t in tables if (v := as_number(t.get(n))) is not None] for t in tables for n in t}
            having.append((group, {str(n): sum(v) / len(v) if v else None for n, v in columns.items()}))
    rows = []
    for name in dict.fromkeys(name for _, table in having for name in table):
        values = [_percent(table.get(name)) for _, table in having]
        students = [v for (group, _), v in zip(having, values, strict=True) if group.role != "teacher" and v != MISSING]
        best = max(students, key=float) if len(students) > 1 else "0.0"
        kinds = ["teacher" if group.role == "teacher" else "best" if v == best != "0.0" else ""
                 for (group, _), v in zip(having, values, strict=True)]  # fmt: skip
        rows.append(Row([name, *values], None, (), dict(enumerate(["", *kinds]))))
    marked = " The best of the students is marked." if len(having) > 1 else ""
    caption = f"Per cent.{marked} A dash: neither labelled nor predicted."
    return Table("IoU per class", ["class", *(group.name for group, _ in having)], rows, [caption], words=1)


def _markdown(tables: Sequence[Table], groups: Sequence[Group], title: str, lines: Sequence[str]) -> str:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    text = [f"# {title}", ""]
    for table in tables:
        if table.rows:
            rule = "|" + "---|" * table.words + "---:|" * (len(table.columns) - table.words)
            text += [f"## {table.title}", "", row(table.columns), rule]
            for cells, _, _, marks in table.rows:
                text.append(row([f"**{c}**" if marks.get(i) == "best" else c for i, c in enumerate(cells)]))
            text += ["", *table.captions, ""]
    text += [f"- {line}" for line in lines]
    text += [f"- {run.name}: {problem}." for group in groups for run in group.runs for problem in run.problems]
    return "\n".join(text) + "\n"


def _about_curves(groups: Sequence[Group]) -> str:
    runs = [run for group in groups for run in group.runs]
    words = {
        "The training loss sums the terms of a method: compare a run with itself, not with another method.": len(groups)
        > 1,
        "A band spans the seeds, its line is their mean.": len(runs) > len(groups),
        "A dashed line is a run that did not finish.": not all(group.finished for group in groups),
        "The cosine is that between the gradients of the task loss and of the distillation losses at the student's logits: "
        "below 0 the two pull apart.": any(run.curves.get("train/grad_cosine") for run in runs),
    }
    return " ".join(sentence for sentence, true in words.items() if true)


def _picture(panel: Panel) -> tuple[str, str]:
    """Caption and data URL, or a sentence on why there is none; PNG, or JPEG where that is large."""
    caption, picture = panel if isinstance(panel, (tuple, list)) else ("", panel)
    try:
        if not isinstance(picture, Image.Image):
            with Image.open(picture) as opened:
                picture = opened.convert("RGB")
        for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 90})):
            buffer = io.BytesIO()
            picture.convert("RGB").save(buffer, format=kind, **options)
            if buffer.tell() < MOST_BYTES:
                break
    except (OSError, SyntaxError, ValueError) as error:
        return str(caption), f"picture left out: {error}"
    return str(caption), f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"

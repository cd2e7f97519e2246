"""One self-contained page about a set of runs: numbers, curves, pictures, configurations, and what they do and do not show.

`report.html` needs nothing beside it: style and pictures are inside, there is no script. Runs that differ in their seed alone
are one row, mean ± standard deviation. A run that was cut short, or whose files are damaged, is shown as that.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from fastkd.train.curves import as_svg, charts, charts_of_terms, write_png
from fastkd.train.files import write_text, write_whole
from fastkd.train.log import duration
from fastkd.train.runs import Group, Run, as_number, grouped, load_runs, verdict

MISSING = "\N{EN DASH}"  # a number that is not there
MOST_BYTES = 300_000  # of a picture in the page as PNG; above that it is a JPEG

Panel = Any  # a Pillow picture, a path of one, or (caption, either)


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
    if not runs:
        raise ValueError("a report needs at least one run directory, got none")
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    groups = grouped(load_runs(runs))
    lines = verdict(groups)
    found = charts(groups)
    write_whole(out / "curves.png", lambda beside: write_png(found, beside))
    figures = [as_svg(chart) for chart in found]
    if len(groups) == 1:
        figures += [as_svg(chart) for chart in charts_of_terms(groups[0])]
    write_text(out / "table.md", _markdown(groups, title, lines))
    write_text(out / "report.html", _page(groups, title, notes, lines, figures, panels))
    return out / "report.html"


# Tables ----------------------------------------------------------------------------------------------------------


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f}"


def _seconds(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _count(value: float | None) -> str:
    if value is None:
        return MISSING
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f}"


def _time(value: float | None) -> str:
    return MISSING if value is None else duration(value)


def _bytes(value: float) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 2**10:.0f} KiB"


def _ratio(value: float) -> str:
    return f"{value:.0f}×" if value >= 10 else f"{value:.1f}×"


def _steps(run: Run) -> str:
    value = run.number("steps")
    if value is not None:
        return f"{value:.0f}"
    return MISSING if run.step is None else f"{run.step} (stopped)"


def _spread(group: Group | Run, key: str, text: Callable[[float | None], str]) -> str:
    """A number, or mean ± standard deviation over the seeds."""
    if isinstance(group, Run):
        return text(group.number(key))
    spread = group.spread(key)
    return text(group.mean(key)) + ("" if spread is None else f" ± {text(spread)}")


COLUMNS = ("run", "method", "mIoU %", "pixel acc. %", "s / step", "losses %", "parameters", "steps", "time")


def _row(of: Group | Run) -> tuple[str, ...]:
    first = of.first if isinstance(of, Group) else of
    seeds = f" ({len(of.runs)} seeds)" if isinstance(of, Group) and len(of.runs) > 1 else ""
    mean = of.mean if isinstance(of, Group) else of.number
    return (
        of.name + seeds, of.method, _spread(of, "miou", _percent), _spread(of, "pixel_accuracy", _percent),
        _seconds(mean("seconds_per_step")), _percent(mean("loss_share")), _count(mean("params")), _steps(first),
        _time(mean("seconds")),
    )  # fmt: skip


COST_COLUMNS = ("run", "kernels", "losses %", "ms", "ms, plain", "faster", "memory", "memory, plain", "less")
COST_CAPTION = (
    "One forward and backward of the losses alone, at the run's own shapes: with the kernels that the run used, and in plain "
    "PyTorch. Memory is the peak beyond the inputs and their gradients. An asterisk: one image, times the batch. “losses %” is "
    "their share of a training step, measured in the run."
)


def _cost_row(group: Group) -> tuple[str, ...] | None:
    """The row of `COST_COLUMNS` of a group's first run; None if it says nothing of what its losses cost."""
    losses = group.first.result.get("losses")
    if not isinstance(losses, dict):
        return None
    ours, eager = (side if isinstance(side := losses.get(name), dict) else {} for name in ("ours", "eager"))
    scaled = "*" if eager.get("images") != ours.get("images") else ""
    cells = []
    for key, text in (("seconds", lambda v: f"{1000 * v:.3g}"), ("bytes", _bytes)):
        left, right = as_number(ours.get(key)), as_number(eager.get(key))
        cells += [
            MISSING if left is None else text(left),
            MISSING if right is None else text(right) + scaled,
            _ratio(right / left) if left and right else MISSING,
        ]
    names = losses.get("backends")
    return (
        group.name,
        ", ".join(map(str, names)) if isinstance(names, list) else MISSING,
        _percent(group.first.number("loss_share")),
        *cells,
    )


def _classes(groups: Sequence[Group]) -> tuple[list[str], list[tuple[Group, dict[str, float | None]]]]:
    """Names of the classes, and with each group its mean IoU of each."""
    found: list[tuple[Group, dict[str, float | None]]] = []
    for group in groups:
        tables = [t for run in group.runs if isinstance(t := run.result.get("class_iou"), dict) and t]
        names = dict.fromkeys(str(name) for table in tables for name in table)
        columns = {name: [v for t in tables if (v := as_number(t.get(name))) is not None] for name in names}
        if names:
            found.append((group, {name: sum(v) / len(v) if v else None for name, v in columns.items()}))
    return list(dict.fromkeys(name for _, table in found for name in table)), found


def _best(values: Sequence[float | None]) -> set[int]:
    """The indices of the largest value as it is printed (ties are all best); none among fewer than two values or zeros."""
    known = [round(100 * v, 1) for v in values if v is not None]
    if len(known) < 2 or max(known) == 0:
        return set()
    return {i for i, v in enumerate(values) if v is not None and round(100 * v, 1) == max(known)}


def _best_student(having: Sequence[tuple[Group, dict[str, float | None]]], name: str) -> set[int]:
    return _best([None if group.role == "teacher" else table.get(name) for group, table in having])


def _markdown(groups: Sequence[Group], title: str, lines: Sequence[str]) -> str:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
        return [row(columns), "|---|---|" + "---:|" * (len(columns) - 2), *map(row, rows), ""]

    text = [f"# {title}", "", *table(COLUMNS, [_row(group) for group in groups])]
    if seeds := [run for group in groups if len(group.runs) > 1 for run in group.runs]:
        text += ["Each of several seeds:", "", *table(COLUMNS, [_row(run) for run in seeds])]
    if costs := [cells for group in groups if (cells := _cost_row(group))]:
        text += [*table(COST_COLUMNS, costs), COST_CAPTION, ""]
    names, having = _classes(groups)
    if names:
        text += [
            "IoU per class, %; the best of the students in bold.",
            "",
            row(["class", *(g.name for g, _ in having)]),
        ]
        text.append("|---|" + "---:|" * len(having))
        for name in names:
            best, values = _best_student(having, name), [_percent(table.get(name)) for _, table in having]
            text.append(row([name, *(f"**{v}**" if i in best else v for i, v in enumerate(values))]))
        text.append("")
    text += [f"- {line}" for line in lines]
    text += [f"- {run.name}: {problem}." for group in groups for run in group.runs for problem in run.problems]
    return "\n".join(text) + "\n"


# The page --------------------------------------------------------------------------------------------------------

STYLE = """
:root { --ink: #1d2228; --soft: #59626d; --line: #e2e5e9; --paper: #fff; --wash: #f6f7f9; --accent: #0b6bb3; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 8px; text-wrap: balance; }
h2 { font-size: 19px; letter-spacing: -0.005em; margin: 44px 0 12px; }
p { margin: 0 0 10px; max-width: 72ch; }
.notes, .caption { color: var(--soft); }
.caption { font-size: 14px; margin-top: 10px; }
.verdict { background: var(--wash); border-left: 3px solid var(--accent); border-radius: 0 6px 6px 0;
  padding: 14px 20px 8px; margin: 24px 0 0; }
.verdict p { max-width: 88ch; }
.verdict p:last-child { color: var(--soft); font-size: 15px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 15px; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; font-size: 13px; color: var(--soft); vertical-align: bottom; }
th, td { padding: 8px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { border-bottom: 1.5px solid #b6bcc4; }
td { text-align: right; }
th:first-child, td:first-child, .text { text-align: left; }
td:first-child, th:first-child { padding-left: 0; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 8px; }
.tag { font-size: 12px; color: var(--soft); border: 1px solid var(--line); border-radius: 9px;
  padding: 1px 7px; margin-left: 8px; }
.tag.warn { color: #8a4b00; border-color: #ecc894; background: #fff7ea; }
.bar { display: inline-block; width: 56px; height: 8px; border-radius: 2px; background: var(--wash);
  margin-left: 10px; text-align: left; }
.bar i { display: block; height: 8px; border-radius: 2px; }
td.best { font-weight: 650; background: #eef5fb; }
td.teacher { color: var(--soft); }
.classes { font-size: 14px; } .classes th, .classes td { padding: 5px 12px; }
.classes th:first-child, .classes td:first-child { padding-left: 0; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 14px; margin: 0 0 6px; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 16px 28px; }
.curves svg { width: 100%; height: auto; display: block; }
figure { margin: 0 0 20px; } figure img { max-width: 100%; height: auto; display: block; border-radius: 4px; }
figure .scroll img { max-width: none; width: max(100%, 900px); }
figcaption { color: var(--soft); font-size: 14px; margin-top: 6px; }
details { border-bottom: 1px solid var(--line); padding: 10px 0; }
summary { cursor: pointer; font-weight: 550; }
summary .caption { font-weight: 400; margin-left: 8px; }
pre { background: var(--wash); border-radius: 6px; padding: 12px 16px; overflow-x: auto;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media (max-width: 640px) { main { padding: 24px 16px 48px; } h1 { font-size: 25px; } .bar { display: none; }
  th, td { padding: 7px 9px; } }
@media print { main { max-width: none; padding: 0; } h2 { break-after: avoid; } figure, table { break-inside: avoid; } }
"""


def _page(
    groups: Sequence[Group],
    title: str,
    notes: str | None,
    lines: Sequence[str],
    figures: Sequence[str],
    panels: Sequence[Panel],
) -> str:
    text = html.escape
    parts = [f"<h1>{text(title)}</h1>"]
    parts += [f'<p class="notes">{text(p.strip())}</p>' for p in re.split(r"\n\s*\n", notes or "") if p.strip()]
    parts.append('<div class="verdict">' + "".join(f"<p>{text(line)}</p>" for line in lines) + "</div>")
    parts += ["<h2>Runs</h2>" if len(groups) > 1 else "<h2>Run</h2>", _runs_table(groups)]
    parts.append(
        '<p class="caption">mIoU and pixel accuracy on the validation split. “s / step”: seconds of a training step; “losses %”: '
        "the share of it spent in the losses, forward and backward; “time”: of the whole run, validation included.</p>"
    )
    if any(len(group.runs) > 1 for group in groups):
        parts.append(_seeds_table(groups))
    parts.append(_cost_table(groups))
    legend = "".join(f"<span>{_dot(group)}{text(group.name)}</span>" for group in groups if _has_curves(group))
    parts.append("<h2>Curves</h2>" + (f'<div class="legend">{legend}</div>' if legend and len(groups) > 1 else ""))
    parts.append('<div class="curves">' + "".join(f"<div>{figure}</div>" for figure in figures) + "</div>")
    parts.append(f'<p class="caption">{_about_curves(groups)}</p>')
    names, having = _classes(groups)
    if names:
        parts += ["<h2>IoU per class</h2>", _class_table(names, having)]
        marked = " The best of the students is marked." if len(having) > 1 else ""
        parts.append(f'<p class="caption">Per cent.{marked} A dash: neither labelled nor predicted.</p>')
    if panels:
        parts.append("<h2>Pictures</h2>")
        parts += [_figure(panel) for panel in panels]
    parts.append("<h2>Configurations</h2>")
    parts += [_details(group, run) for group in groups for run in group.runs]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def _has_curves(group: Group) -> bool:
    return any(run.curves.get("train/loss") or run.curves.get("val/miou") for run in group.runs)


def _about_curves(groups: Sequence[Group]) -> str:
    words = []
    if len(groups) > 1:
        words.append(
            "The training loss sums the terms of a method: compare a run with itself, not with another method."
        )
    if any(len(group.runs) > 1 for group in groups):
        words.append("A band spans the seeds, its line is their mean.")
    if not all(group.finished for group in groups):
        words.append("A dashed line is a run that did not finish.")
    if any(run.curves.get("train/grad_cosine") for group in groups for run in group.runs):
        words.append(
            "The cosine is that between the gradients of the task loss and of the distillation losses at the student's logits: "
            "below 0 the two pull apart."
        )
    return " ".join(words)


def _dot(group: Group) -> str:
    return f'<span class="dot" style="background:{group.colour}"></span>'


def _table(columns: Sequence[str], rows: Sequence[tuple[Group, Sequence[str]]]) -> str:
    """The cells of `rows` are HTML; two columns of text, the rest numbers."""
    head = "".join(f"<th{' class=text' if i < 2 else ''}>{html.escape(name)}</th>" for i, name in enumerate(columns))
    body = "".join(
        f"<tr><td>{_dot(group)}{cells[0]}</td><td class=text>{cells[1]}</td>"
        + "".join(f"<td>{cell}</td>" for cell in cells[2:])
        + "</tr>"
        for group, cells in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _runs_table(groups: Sequence[Group]) -> str:
    top = max((group.mean("miou") or 0.0 for group in groups), default=0.0) or 1.0
    rows = []
    for group in groups:
        cells = [html.escape(cell) for cell in _row(group)]
        role = {"teacher": "teacher", "plain": "plain student"}.get(group.role)
        cells[0] += f'<span class="tag">{role}</span>' if role else ""
        unfinished = sum(not run.finished for run in group.runs)
        if unfinished:
            of = f"{unfinished} of {len(group.runs)} " if len(group.runs) > 1 else ""
            cells[0] += f'<span class="tag warn">{of}unfinished</span>'
        elif any("log.jsonl" in problem for run in group.runs for problem in run.problems):
            cells[0] += '<span class="tag warn">log damaged</span>'
        miou = group.mean("miou")
        if miou is not None and len(groups) > 1:
            width = max(0.0, min(100.0, 100 * miou / top))
            cells[2] += f'<span class="bar"><i style="width:{width:.1f}%;background:{group.colour}"></i></span>'
        rows.append((group, cells))
    return _table(COLUMNS, rows)


def _seeds_table(groups: Sequence[Group]) -> str:
    columns = ("run", "seed", *COLUMNS[2:])
    rows = []
    for group in groups:
        for run in group.runs if len(group.runs) > 1 else ():
            cells = [html.escape(cell) for cell in _row(run)]
            rows.append((group, [cells[0], html.escape(str(run.seed)), *cells[2:]]))
    return f"<details><summary>Each seed</summary>{_table(columns, rows)}</details>"


def _cost_table(groups: Sequence[Group]) -> str:
    """What the losses cost, with its heading; empty if no run says."""
    rows = [(group, [html.escape(c) for c in row]) for group in groups if (row := _cost_row(group))]
    if not rows:
        return ""
    notes = "".join(
        f'<p class="caption">{html.escape(f"{group.name}: {note}")}.</p>'
        for group, _ in rows
        if (note := group.first.result["losses"].get("note"))
    )
    return f'<h2>What the losses cost</h2>{_table(COST_COLUMNS, rows)}<p class="caption">{COST_CAPTION}</p>{notes}'


def _class_table(names: Sequence[str], having: Sequence[tuple[Group, dict[str, float | None]]]) -> str:
    head = "<th>class</th>" + "".join(f"<th>{_dot(group)}{html.escape(group.name)}</th>" for group, _ in having)
    body = []
    for name in names:
        best = _best_student(having, name)
        cells = ""
        for i, (group, table) in enumerate(having):
            kind = ' class="best"' if i in best else ' class="teacher"' if group.role == "teacher" else ""
            cells += f"<td{kind}>{_percent(table.get(name))}</td>"
        body.append(f"<tr><td>{html.escape(name)}</td>{cells}</tr>")
    rows = "".join(body)
    return (
        f'<div class="scroll"><table class="classes"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _details(group: Group, run: Run) -> str:
    text = html.escape
    about = [f"seed {run.seed}"] if run.seed != "unknown" else []
    about += [str(run.result["model"])] if "model" in run.result else []
    if (processes := as_number(run.result.get("processes"))) and processes > 1:
        about.append(f"{processes:.0f} processes")
    body = "".join(f'<p class="caption">{text(problem)}.</p>' for problem in run.problems)
    body += f"<pre>{text(run.config)}</pre>" if run.config else ""
    versions = run.result.get("versions")
    if isinstance(versions, dict) and versions:
        body += f'<p class="caption">{text(", ".join(f"{k} {v}" for k, v in versions.items()))}</p>'
    caption = f'<span class="caption">{text(" · ".join(about))}</span>'
    return f"<details><summary>{_dot(group)}{text(run.name)}{caption}</summary>{body}</details>"


def _figure(panel: Panel) -> str:
    caption, picture = panel if isinstance(panel, (tuple, list)) else ("", panel)
    note = f"<figcaption>{html.escape(str(caption))}</figcaption>" if caption else ""
    try:
        if not isinstance(picture, Image.Image):
            with Image.open(picture) as opened:
                picture = opened.convert("RGB")
        kind, data = _encoded(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        return f'<figure><p class="caption">{html.escape(f"picture left out: {error}")}</p>{note}</figure>'
    alt = html.escape(str(caption) or "panel", quote=True)
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return f'<figure><div class="scroll"><img alt="{alt}" src="{source}"></div>{note}</figure>'


def _encoded(picture: Image.Image) -> tuple[str, bytes]:
    """As PNG, or as JPEG where that is large."""
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 90})):
        buffer = io.BytesIO()
        picture.save(buffer, format=kind, **options)
        if buffer.tell() < MOST_BYTES:
            break
    return kind, buffer.getvalue()

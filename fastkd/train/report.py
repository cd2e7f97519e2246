"""One self-contained page about a set of runs: numbers, curves, pictures, configurations, and what they do and do not show.

`report.html` needs nothing beside it: style and pictures are inside, there is no script. A run that was cut short, or whose
files are damaged, is shown as that; it never stops the report.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

NO_CLEAR_CHANGE = 0.5  # points of mIoU: below this, one seed says nothing
TEACHER_COLOUR, PLAIN_COLOUR = "#2b3138", "#8b939d"
COLOURS = ("#0b6bb3", "#d1580b", "#12876a", "#b14a8b", "#b98a00", "#4aa3d6", "#7a5cc0", "#8c5a3c")
MISSING = "\N{EN DASH}"  # a number that is not there
PLAIN = ("none", "plain", "")  # words for "no distillation"

Panel = Any  # a Pillow picture, a path of one, or (caption, either)


@dataclass
class Run:
    """What could be read of one run directory; None or empty where it could not."""

    path: Path
    name: str
    result: dict[str, Any] = field(default_factory=dict)
    loss: list[tuple[float, float]] = field(default_factory=list)  # (step, value)
    miou: list[tuple[float, float]] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)  # the last validation's values
    step: int | None = None
    config: str | None = None
    problems: list[str] = field(default_factory=list)
    colour: str = PLAIN_COLOUR
    role: str = "student"  # "teacher", "plain", "distilled", or "student" when nothing tells

    @property
    def method(self) -> str:
        return str(self.result.get("method", "")) or _config_value(self.config, "method") or "?"

    @property
    def finished(self) -> bool:
        return bool(self.result)

    def number(self, key: str) -> float | None:
        """A finite number of result.json; for scores, else that of the last validation in the log."""
        value = _number(self.result.get(key))
        return _number(self.last.get(key)) if value is None and key in ("miou", "pixel_accuracy") else value


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
    loaded = load_runs(runs)
    lines = verdict(loaded)
    figures = _figures(loaded, out / "curves.png")
    (out / "table.md").write_text(_markdown(loaded, title, lines), encoding="utf-8")
    page = _page(loaded, title, notes, lines, figures, panels)
    (out / "report.html").write_text(page, encoding="utf-8")
    return out / "report.html"


# Reading ---------------------------------------------------------------------------------------------------------


def load_runs(paths: Sequence[Path | str]) -> list[Run]:
    """The runs, with their roles (who is teacher, plain student, distilled) and colours."""
    runs = [read_run(Path(path)) for path in paths]
    _assign(runs)
    return runs


def read_run(path: Path) -> Run:
    """Whatever can be read of a run directory; what cannot is named in `problems`."""
    run = Run(path, path.name or str(path))
    if not path.is_dir():
        run.problems.append(f"no such run directory: {path}")
        return run
    try:
        result = json.loads((path / "result.json").read_text(encoding="utf-8"))
        if isinstance(result, dict):
            run.result = result
        else:
            run.problems.append("result.json does not hold an object")
    except FileNotFoundError:
        run.problems.append("no result.json: the run did not finish")
    except (OSError, ValueError) as error:
        run.problems.append(f"result.json cannot be read ({error})")
    run.name = str(run.result.get("name") or run.name)
    try:
        run.config = (path / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        run.problems.append("no config.yaml")
    try:
        lines = (path / "log.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        run.problems.append("no log.jsonl: no curves")
        return run
    damaged = 0
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (ValueError, KeyError, TypeError, OverflowError):
            damaged += bool(line.strip()) and number < len(lines)  # the last line may be cut short
            continue
        run.step = step if run.step is None else max(run.step, step)
        if entry.get("split") == "train" and _number(entry.get("loss")) is not None:
            run.loss.append((step, float(entry["loss"])))
        elif entry.get("split") == "val" and _number(entry.get("miou")) is not None:
            run.miou.append((step, float(entry["miou"])))
            run.last = entry
    if damaged:
        run.problems.append(f"log.jsonl: {damaged} unreadable line{'s' if damaged > 1 else ''} left out")
    return run


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _config_value(config: str | None, key: str) -> str | None:
    """A top-level scalar of the YAML text: enough to name the method of a run that did not finish."""
    found = re.search(rf"^{key}:[ \t]*['\"]?([^'\"#\n]*)", config or "", re.MULTILINE)
    return found.group(1).strip() or None if found else None


def _assign(runs: list[Run]) -> None:
    """Roles and colours. A run without distillation is the plain student if a distilled run has its model, else a teacher."""
    students = {str(run.result.get("model")) for run in runs if run.method not in (*PLAIN, "?")}
    number = 0
    for run in runs:
        if run.method == "?":
            run.role = "student"
        elif run.method not in PLAIN:
            run.role = "distilled"
        elif students and run.finished:
            run.role = "plain" if str(run.result.get("model")) in students else "teacher"
        if run.role in ("teacher", "plain"):
            run.colour = TEACHER_COLOUR if run.role == "teacher" else PLAIN_COLOUR
        else:
            run.colour = COLOURS[number % len(COLOURS)]
            number += 1


# What the numbers say --------------------------------------------------------------------------------------------


def verdict(runs: Sequence[Run]) -> list[str]:
    """Sentences that follow from the finished runs' mIoU, and no more than follows."""
    whole = [run for run in runs if run.finished and _number(run.result.get("miou")) is not None]
    lines: list[str] = []
    plain = {str(run.result.get("model")): run for run in reversed(whole) if run.role == "plain"}
    teachers = [run for run in whole if run.role == "teacher"]
    distilled = [run for run in whole if run.role == "distilled"]
    for model, base in plain.items():
        score = 100 * base.result["miou"]
        gap = None
        if len(teachers) == 1:
            gap = 100 * teachers[0].result["miou"] - score
            if gap > 0:
                lines.append(
                    f"The teacher ({teachers[0].name}) reaches {score + gap:.1f} % mIoU, the plain student ({base.name}) "
                    f"{score:.1f} %. The gap is {gap:.1f} points."
                )
            else:
                lines.append(
                    f"The teacher ({teachers[0].name}, {score + gap:.1f} % mIoU) is no better than the plain student "
                    f"({base.name}, {score:.1f} %), so these runs say little about distillation."
                )
        else:
            lines.append(f"The plain student ({base.name}) reaches {score:.1f} % mIoU.")
        words: dict[str, list[str]] = {"gained": [], "lost": [], "did not change clearly": []}
        for run in distilled:
            if str(run.result.get("model")) != model:
                continue
            change = 100 * run.result["miou"] - score
            text = f"{run.name} ({change:+.1f}"
            if gap is not None and gap > NO_CLEAR_CHANGE and change > NO_CLEAR_CHANGE:
                text += f", {100 * change / gap:.0f} % of the gap"
            unlike = [
                f"{key} {run.result.get(key)} instead of {base.result.get(key)}"
                for key in ("steps", "seed")
                if run.result.get(key) != base.result.get(key)
            ]
            text += ")" + (f" [not like for like: {', '.join(unlike)}]" if unlike else "")
            word = "did not change clearly" if abs(change) < NO_CLEAR_CHANGE else "gained" if change > 0 else "lost"
            words[word].append(text)
        titles = {
            "gained": "Gained over the plain student, in points of mIoU",
            "lost": "Lost against it",
            "did not change clearly": f"Within {NO_CLEAR_CHANGE} points of it, which is no clear difference",
        }
        lines += [f"{titles[word]}: {'; '.join(texts)}." for word, texts in words.items() if texts]
    alone = [run.name for run in distilled if str(run.result.get("model")) not in plain]
    if alone:
        lines.append(f"No plain student of the same model was finished, so nothing can be said of {', '.join(alone)}.")
    if not plain and not alone and whole:
        best = max(whole, key=lambda run: run.result["miou"])
        lines.append(
            f"There is no distilled run to judge. The best run is {best.name} with {100 * best.result['miou']:.1f} % mIoU."
        )
    broken = [run.name for run in runs if run not in whole]
    if broken:
        lines.append(f"Left out of this comparison, because unfinished or unreadable: {', '.join(broken)}.")
    if not whole:
        return [*lines, "No run finished: there is nothing to compare."]
    seeds = sorted({str(run.result.get("seed", "unknown")) for run in whole})
    if len(seeds) == 1:
        lines.append(f"Every run is one seed ({seeds[0]}): differences of this size can change with another seed.")
    else:
        lines.append(
            f"Seeds {', '.join(seeds)} appear, and each run is one of them: differences can change with the seed."
        )
    return lines


# Figures ---------------------------------------------------------------------------------------------------------


def _thin(points: list[tuple[float, float]], most: int = 120) -> tuple[list[float], list[float]]:
    """At most `most` points: means over equal runs of neighbours."""
    points = sorted(points)
    if len(points) > most:
        edges = [round(i * len(points) / most) for i in range(most + 1)]
        points = [
            tuple(sum(values) / len(values) for values in zip(*points[a:b], strict=True))  # type: ignore[misc]
            for a, b in itertools.pairwise(edges)
        ]
    return [p[0] for p in points], [p[1] for p in points]


def _draw(axes: Any, runs: Sequence[Run], kind: str) -> bool:
    drawn = False
    for run in runs:
        points = run.loss if kind == "loss" else run.miou
        if not points:
            continue
        x, y = _thin(points)
        y = [100 * v for v in y] if kind == "miou" else y
        style = {"marker": "o", "markersize": 3.2} if kind == "miou" or len(x) == 1 else {}
        label = run.name + ("" if run.finished else " (unfinished)")
        axes.plot(
            x, y, color=run.colour, linewidth=1.7, linestyle="-" if run.finished else (0, (4, 2)), label=label, **style
        )
        drawn = True
    axes.set_xlabel("step")
    axes.set_ylabel("training loss" if kind == "loss" else "validation mIoU (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=3, colors="#4a525c")
    positive = [v for run in runs for _, v in run.loss if v > 0] if kind == "loss" else []
    if positive and max(positive) > 30 * min(positive):
        axes.set_yscale("log")
    if not drawn:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", color="#8b939d")
    return drawn


def _figures(runs: Sequence[Run], png: Path) -> list[str]:
    """Both curves as SVG texts, and side by side in the file `png`."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    look: Any = {
        "font.size": 9.5, "axes.labelcolor": "#2b3138", "axes.edgecolor": "#b6bcc4", "svg.fonttype": "path",
        "legend.frameon": False, "legend.fontsize": 9,
    }  # fmt: skip
    texts = []
    kinds = ("miou", "loss")
    with rc_context(look):
        both = Figure(figsize=(11, 4.2), dpi=130, layout="constrained")
        FigureCanvasAgg(both)
        axes = both.subplots(1, 2)
        drawn = [_draw(one, runs, kind) for one, kind in zip(axes, kinds, strict=True)]
        if any(drawn):
            entries = {
                label: line for one in axes for line, label in zip(*one.get_legend_handles_labels(), strict=True)
            }
            both.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=min(5, len(entries)))
        both.savefig(png)
        for kind in kinds:
            figure = Figure(figsize=(5.6, 3.6), layout="constrained")
            FigureCanvasSVG(figure)
            _draw(figure.subplots(), runs, kind)
            buffer = io.StringIO()
            # Ids must differ between the two pictures of one page, and be the same in every writing.
            with rc_context({"svg.hashsalt": kind}):
                figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
            text = buffer.getvalue()
            text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
            # Glyphs and markers are named by what they are, so the same id would stand in both pictures.
            text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{kind}-", text)
            texts.append(re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2))
    return texts


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


def _steps(run: Run) -> str:
    value = run.number("steps")
    if value is not None:
        return f"{value:.0f}"
    return MISSING if run.step is None else f"{run.step} (stopped)"


COLUMNS = ("run", "method", "mIoU %", "pixel acc. %", "s / step", "losses %", "parameters", "steps")


def _row(run: Run) -> tuple[str, ...]:
    return (
        run.name, run.method, _percent(run.number("miou")), _percent(run.number("pixel_accuracy")),
        _seconds(run.number("seconds_per_step")), _percent(run.number("loss_share")), _count(run.number("params")), _steps(run),
    )  # fmt: skip


def _classes(runs: Sequence[Run]) -> tuple[list[str], list[Run]]:
    having = [run for run in runs if isinstance(run.result.get("class_iou"), dict) and run.result["class_iou"]]
    return list(dict.fromkeys(str(name) for run in having for name in run.result["class_iou"])), having


COST_COLUMNS = ("run", "kernels", "losses %", "ms", "ms, plain", "faster", "memory", "memory, plain", "less")
COST_CAPTION = (
    "One forward and backward of the losses alone, at the run's own shapes: with the kernels that the run used, and in plain "
    "PyTorch. Memory is the peak beyond the inputs and their gradients. An asterisk: one image, times the batch. “losses %” is "
    "their share of a training step, measured in the run."
)


def _bytes(value: float) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 2**10:.0f} KiB"


def _ratio(value: float) -> str:
    return f"{value:.0f}×" if value >= 10 else f"{value:.1f}×"


def _cost_row(run: Run) -> tuple[str, ...] | None:
    """The run's row of `COST_COLUMNS`; None if it says nothing of what its losses cost."""
    losses = run.result.get("losses")
    if not isinstance(losses, dict):
        return None
    ours, eager = (side if isinstance(side := losses.get(name), dict) else {} for name in ("ours", "eager"))
    scaled = "*" if eager.get("images") != ours.get("images") else ""
    cells = []
    for key, text in (("seconds", lambda v: f"{1000 * v:.3g}"), ("bytes", _bytes)):
        left, right = _number(ours.get(key)), _number(eager.get(key))
        cells += [
            MISSING if left is None else text(left),
            MISSING if right is None else text(right) + scaled,
            _ratio(right / left) if left and right else MISSING,
        ]
    names = losses.get("backends")
    return (
        run.name,
        ", ".join(map(str, names)) if isinstance(names, list) else MISSING,
        _percent(run.number("loss_share")),
        *cells,
    )


def _cost_table(runs: Sequence[Run]) -> str:
    """What the losses cost, with its heading; empty if no run says."""
    rows = [(run, row) for run in runs if (row := _cost_row(run))]
    if not rows:
        return ""
    head = "".join(f"<th{' class=text' if i < 2 else ''}>{name}</th>" for i, name in enumerate(COST_COLUMNS))
    body = ""
    for run, row in rows:
        cells = [html.escape(cell) for cell in row]
        body += f"<tr><td>{_dot(run)}{cells[0]}</td><td class=text>{cells[1]}</td>"
        body += "".join(f"<td>{cell}</td>" for cell in cells[2:]) + "</tr>"
    notes = "".join(
        f'<p class="caption">{html.escape(f"{run.name}: {note}")}.</p>'
        for run, _ in rows
        if (note := run.result["losses"].get("note"))
    )
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return f'<h2>What the losses cost</h2>{table}<p class="caption">{COST_CAPTION}</p>{notes}'


def _best(values: Sequence[float | None]) -> set[int]:
    """The indices of the largest value as it is printed (ties are all best); none among fewer than two values or zeros."""
    known = [round(100 * v, 1) for v in values if v is not None]
    if len(known) < 2 or max(known) == 0:
        return set()
    return {i for i, v in enumerate(values) if v is not None and round(100 * v, 1) == max(known)}


def _markdown(runs: Sequence[Run], title: str, lines: Sequence[str]) -> str:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    text = [
        f"# {title}",
        "",
        row(COLUMNS),
        "|---|---|" + "---:|" * (len(COLUMNS) - 2),
        *(row(_row(run)) for run in runs),
        "",
    ]
    costs = [cells for run in runs if (cells := _cost_row(run))]
    if costs:
        text += [
            row(COST_COLUMNS),
            "|---|---|" + "---:|" * (len(COST_COLUMNS) - 2),
            *map(row, costs),
            "",
            COST_CAPTION,
            "",
        ]
    names, having = _classes(runs)
    if names:
        text += [
            "IoU per class, %; the best of the students in bold.",
            "",
            row(["class", *(run.name for run in having)]),
        ]
        text.append("|---|" + "---:|" * len(having))
        for name in names:
            values = [_number(run.result["class_iou"].get(name)) for run in having]
            best = _best([None if run.role == "teacher" else v for run, v in zip(having, values, strict=True)])
            text.append(
                row([name, *(f"**{_percent(v)}**" if i in best else _percent(v) for i, v in enumerate(values))])
            )
        text.append("")
    text += [f"- {line}" for line in lines]
    text += [f"- {run.name}: {problem}." for run in runs for problem in run.problems]
    return "\n".join(text) + "\n"


# The page --------------------------------------------------------------------------------------------------------

STYLE = """
:root { --ink: #1d2228; --soft: #59626d; --line: #e2e5e9; --paper: #fff; --wash: #f6f7f9; --accent: #0b6bb3; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
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
th, td { padding: 8px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { border-bottom: 1.5px solid #b6bcc4; }
td { text-align: right; }
th:first-child, td:first-child, .text { text-align: left; }
td:first-child, th:first-child { padding-left: 0; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 8px; }
.tag { font-size: 12px; color: var(--soft); border: 1px solid var(--line); border-radius: 9px;
  padding: 1px 7px; margin-left: 8px; }
.tag.warn { color: #8a4b00; border-color: #ecc894; background: #fff7ea; }
.bar { display: inline-block; width: 84px; height: 8px; border-radius: 2px; background: var(--wash);
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
    runs: Sequence[Run],
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
    parts += ["<h2>Runs</h2>", _runs_table(runs)]
    parts.append(
        '<p class="caption">mIoU and pixel accuracy on the validation split. “s / step”: seconds of a training step; “losses %”: '
        "the share of it spent in the losses, forward and backward.</p>"
    )
    legend = "".join(f"<span>{_dot(run)}{text(run.name)}</span>" for run in runs if run.loss or run.miou)
    parts.append(_cost_table(runs))
    parts.append("<h2>Curves</h2>" + (f'<div class="legend">{legend}</div>' if legend else ""))
    parts.append('<div class="curves">' + "".join(f"<div>{figure}</div>" for figure in figures) + "</div>")
    parts.append(
        '<p class="caption">The training loss sums the terms of a method: compare a run with itself, not with another method. '
        "A dashed line is a run that did not finish.</p>"
    )
    names, having = _classes(runs)
    if names:
        parts += ["<h2>IoU per class</h2>", _class_table(names, having)]
        parts.append(
            '<p class="caption">Per cent. The best of the students is marked. '
            "A dash: neither labelled nor predicted.</p>"
        )
    if panels:
        parts.append("<h2>Pictures</h2>")
        parts += [_figure(panel) for panel in panels]
    parts.append("<h2>Configurations</h2>")
    for run in runs:
        about = [f"seed {run.result['seed']}"] if "seed" in run.result else []
        about += [f"{run.result['model']}"] if "model" in run.result else []
        if _number(run.result.get("seconds")) is not None:
            about.append(f"{run.result['seconds'] / 60:.1f} min")
        body = "".join(f'<p class="caption">{text(problem)}.</p>' for problem in run.problems)
        body += f"<pre>{text(run.config)}</pre>" if run.config else ""
        versions = run.result.get("versions")
        if isinstance(versions, dict) and versions:
            body += f'<p class="caption">{text(", ".join(f"{k} {v}" for k, v in versions.items()))}</p>'
        parts.append(
            f'<details><summary>{_dot(run)}{text(run.name)}<span class="caption">{text(" · ".join(about))}</span></summary>'
            f"{body}</details>"
        )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def _dot(run: Run) -> str:
    return f'<span class="dot" style="background:{run.colour}"></span>'


def _runs_table(runs: Sequence[Run]) -> str:
    head = "".join(f"<th{' class=text' if i < 2 else ''}>{html.escape(name)}</th>" for i, name in enumerate(COLUMNS))
    top = max((run.number("miou") or 0.0 for run in runs), default=0.0) or 1.0
    body = []
    for run in runs:
        cells = [html.escape(cell) for cell in _row(run)]
        tags = {"teacher": '<span class="tag">teacher</span>', "plain": '<span class="tag">plain student</span>'}.get(
            run.role, ""
        )
        if not run.finished:
            tags += '<span class="tag warn">unfinished</span>'
        elif any("log.jsonl" in problem for problem in run.problems):
            tags += '<span class="tag warn">log damaged</span>'
        miou = run.number("miou")
        if miou is not None:
            width = max(0.0, min(100.0, 100 * miou / top))
            cells[2] += f'<span class="bar"><i style="width:{width:.1f}%;background:{run.colour}"></i></span>'
        first = f"<td>{_dot(run)}{cells[0]}{tags}</td><td class=text>{cells[1]}</td>"
        body.append(f"<tr>{first}{''.join(f'<td>{cell}</td>' for cell in cells[2:])}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _class_table(names: Sequence[str], runs: Sequence[Run]) -> str:
    head = "<th>class</th>" + "".join(f"<th>{_dot(run)}{html.escape(run.name)}</th>" for run in runs)
    body = []
    for name in names:
        values = [_number(run.result["class_iou"].get(name)) for run in runs]
        best = _best([None if run.role == "teacher" else v for run, v in zip(runs, values, strict=True)])
        cells = ""
        for i, (run, value) in enumerate(zip(runs, values, strict=True)):
            kind = ' class="best"' if i in best else ' class="teacher"' if run.role == "teacher" else ""
            cells += f"<td{kind}>{_percent(value)}</td>"
        body.append(f"<tr><td>{html.escape(name)}</td>{cells}</tr>")
    table = f'<table class="classes"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _figure(panel: Panel) -> str:
    caption, picture = panel if isinstance(panel, (tuple, list)) else ("", panel)
    note = f"<figcaption>{html.escape(str(caption))}</figcaption>" if caption else ""
    try:
        if not isinstance(picture, Image.Image):
            with Image.open(picture) as opened:
                picture = opened.convert("RGB")
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, format="PNG", optimize=True)
    except (OSError, SyntaxError, ValueError) as error:
        return f'<figure><p class="caption">{html.escape(f"picture left out: {error}")}</p>{note}</figure>'
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    alt = html.escape(str(caption) or "panel", quote=True)
    return f'<figure><div class="scroll"><img alt="{alt}" src="data:image/png;base64,{data}"></div>{note}</figure>'

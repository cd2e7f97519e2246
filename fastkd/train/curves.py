"""Curves of runs, drawn with Matplotlib: as SVG for a page, and in one PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastkd.train.runs import COLOURS, Group

MOST_POINTS = 120
LOOK: Any = {
    "font.size": 9.5, "axes.labelcolor": "#2b3138", "axes.edgecolor": "#b6bcc4", "lines.linewidth": 1.7, "lines.markersize": 3.2,
    "legend.frameon": False, "legend.fontsize": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": "#e6e8eb", "axes.axisbelow": True,
}  # fmt: skip


class Line(NamedTuple):
    """points: (step, mean, lowest, highest)."""

    label: str
    colour: str
    points: list[tuple[float, float, float, float]]
    dashed: bool = False


class Chart(NamedTuple):
    """name: prefix of ids; legend: whether the chart has its own legend."""

    name: str
    ylabel: str
    lines: list[Line]
    legend: bool = False


def charts(groups: Sequence[Group]) -> list[Chart]:
    """Validation mIoU, training loss and, if logged, the cosine of task and distillation gradients."""
    found = []
    for name, curve, ylabel in (
        ("miou", "val/miou", "validation mIoU"),
        ("loss", "train/loss", "training loss"),
        ("cosine", "train/grad_cosine", "cosine of task and distillation gradients"),
    ):
        lines = [
            Line(g.name + ("" if g.finished else " (unfinished)"), g.colour, points, not g.finished)
            for g in groups
            if (points := g.curve(curve))
        ]
        if lines or name != "cosine":
            found.append(Chart(name, ylabel, lines))
    return found


def charts_of_terms(group: Group) -> list[Chart]:
    """Each loss and the norm of its gradient over the steps of one run."""
    found = []
    for name, ylabel in (("loss", "weighted loss"), ("grad", "norm of the gradient at the outputs")):
        terms = sorted({key for run in group.runs for key in run.curves if key.startswith(f"train/{name}/")})
        coloured = zip(terms, COLOURS * 2, strict=False)
        if lines := [Line(key.split("/")[2], colour, group.curve(key)) for key, colour in coloured]:
            found.append(Chart(f"{name}-terms", ylabel, lines, legend=True))
    return found


def as_svg(chart: Chart) -> str:
    """Self-contained SVG without a fixed size, deterministic."""
    buffer = io.StringIO()
    with rc_context(LOOK | {"svg.hashsalt": chart.name}):
        figure = _figure([chart])
        if chart.legend:
            figure.axes[0].legend()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Ids of glyphs and markers depend on their content only and would collide between charts of one page.
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{chart.name}-", text)
    return re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)


@rc_context(LOOK)
def write_png(found: Sequence[Chart], path: Path) -> None:
    """The charts side by side, with one legend."""
    figure = _figure(found)
    labelled = (zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes)
    if handles := {label: line for pairs in labelled for line, label in pairs}:
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=min(5, len(handles)))
    figure.savefig(path, format="png", dpi=130)


def _figure(found: Sequence[Chart]) -> Figure:
    figure = Figure(figsize=(5.6 * len(found), 3.7), layout="constrained")
    for axes, chart in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        for line in chart.lines:
            x, mean, low, high = _thin(line.points)
            style = (0, (4, 2)) if line.dashed else "-"
            marker = "o" if chart.name == "miou" or len(x) == 1 else ""  # few points: mark each
            axes.plot(x, mean, color=line.colour, label=line.label, linestyle=style, marker=marker)
            if (low < high).any():
                axes.fill_between(x, low, high, color=line.colour, alpha=0.15, linewidth=0)
        axes.set(xlabel="step", ylabel=chart.ylabel)
        values = [value for line in axes.lines for value in line.get_ydata()]
        if chart.name == "miou":
            axes.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))  # integer percents
            axes.yaxis.set_major_formatter("{x:.0%}")
        elif chart.name == "cosine":
            axes.axhline(0, color="#8b939d", linewidth=0.8)
        elif values and 0 < 30 * min(values) < max(values):
            axes.set_yscale("log")
        if not values:
            axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", color="#8b939d")
    return figure


def _thin(points: list[tuple[float, float, float, float]]) -> np.ndarray:
    """Step, mean, minimum and maximum of at most MOST_POINTS points, averaged over equal spans."""
    spans = np.array_split(np.array(points), min(len(points), MOST_POINTS))
    return np.stack([span.mean(0) for span in spans], axis=1)

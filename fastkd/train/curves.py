"""Curves of runs, drawn with Matplotlib: as SVG for a page, and side by side in a PNG."""

from __future__ import annotations

import io
import itertools
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastkd.train.runs import COLOURS, Group

MOST_POINTS = 120
LOOK: Any = {
    "font.size": 9.5, "axes.labelcolor": "#2b3138", "axes.edgecolor": "#b6bcc4", "svg.fonttype": "path",
    "legend.frameon": False, "legend.fontsize": 9,
}  # fmt: skip


class Line(NamedTuple):
    """points: (step, mean, lowest, highest)."""

    label: str
    colour: str
    points: list[tuple[float, float, float, float]]
    dashed: bool = False


class Chart(NamedTuple):
    """name: for ids and the legend's place; markers: draw each point."""

    name: str
    ylabel: str
    lines: list[Line]
    markers: bool = False
    legend: bool = False
    zero: bool = False  # a line at 0


def charts(groups: Sequence[Group]) -> list[Chart]:
    """Validation mIoU and training loss; and, where the runs logged it, the cosine of task and distillation gradients."""

    def lines(curve: str, scale: float = 1.0) -> list[Line]:
        return [
            Line(
                group.name + ("" if group.finished else " (unfinished)"),
                group.colour,
                [(step, scale * mean, scale * low, scale * high) for step, mean, low, high in points],
                not group.finished,
            )
            for group in groups
            if (points := group.curve(curve))
        ]

    found = [
        Chart("miou", "validation mIoU (%)", lines("val/miou", 100), markers=True),
        Chart("loss", "training loss", lines("train/loss")),
    ]
    if cosine := lines("train/grad_cosine"):
        found.append(Chart("cosine", "cosine of task and distillation gradients", cosine, zero=True))
    return found


def charts_of_terms(group: Group) -> list[Chart]:
    """Each loss, and the norm of its gradient, over the steps of one run."""
    found = []
    for name, ylabel in (("loss", "weighted loss"), ("grad", "norm of the gradient at the outputs")):
        terms = sorted({key for run in group.runs for key in run.curves if key.startswith(f"train/{name}/")})
        lines = [
            Line(key.removeprefix(f"train/{name}/"), COLOURS[number % len(COLOURS)], group.curve(key))
            for number, key in enumerate(terms)
        ]
        if lines:
            found.append(Chart(f"{name}-terms", ylabel, lines, legend=True))
    return found


def as_svg(chart: Chart) -> str:
    """Self-contained, without a size of its own, and the same text in every writing."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(LOOK | {"svg.hashsalt": chart.name}):
        figure = Figure(figsize=(5.6, 3.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        _draw(axes, chart)
        if chart.legend:
            axes.legend()
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Glyphs and markers are named by what they are, so the same id would stand in two pictures of one page.
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{chart.name}-", text)
    return re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)


def write_png(found: Sequence[Chart], path: Path) -> None:
    """The charts side by side, with one legend."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(LOOK):
        figure = Figure(figsize=(5.5 * len(found), 4.2), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        entries: dict[str, Any] = {}
        for axes, chart in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
            _draw(axes, chart)
            entries |= {label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        if entries:
            figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=min(5, len(entries)))
        figure.savefig(path, format="png")


def _draw(axes: Any, chart: Chart) -> None:
    values: list[float] = []
    for line in chart.lines:
        points = _thin(line.points)
        x, mean, low, high = zip(*points, strict=True)
        values += mean
        style: dict[str, Any] = {"marker": "o", "markersize": 3.2} if chart.markers or len(x) == 1 else {}
        dashes = (0, (4, 2)) if line.dashed else "-"
        axes.plot(x, mean, color=line.colour, linewidth=1.7, linestyle=dashes, label=line.label, **style)
        if low != high:
            axes.fill_between(x, low, high, color=line.colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("step")
    axes.set_ylabel(chart.ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=3, colors="#4a525c")
    if chart.zero:
        axes.axhline(0, color="#8b939d", linewidth=0.8)
    elif not chart.markers and values and min(values) > 0 and max(values) > 30 * min(values):
        axes.set_yscale("log")
    if not values:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", color="#8b939d")


def _thin(points: list[tuple[float, float, float, float]]) -> list[tuple[float, ...]]:
    """At most MOST_POINTS points: means over equal spans of neighbours."""
    if len(points) <= MOST_POINTS:
        return list(points)
    edges = [round(i * len(points) / MOST_POINTS) for i in range(MOST_POINTS + 1)]
    return [
        tuple(statistics.fmean(column) for column in zip(*points[a:b], strict=True))
        for a, b in itertools.pairwise(edges)
    ]

"""Tables (Markdown) and plots of records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .harness import Case, Record, Row
from .roofline import GPUS

COLOURS = {"ours": "#0b7a75", "eager": "#c8553d", "compile": "#8d8d8d", "liger": "#d9a441"}

PREDICTION = (
    "PREDICTED, not measured: the time in which each GPU can move the bytes (m) or compute the exponentials (e) that a forward "
    "and backward needs, whichever takes longer, at datasheet rates; launches are left out."
)


def origin(record: Record) -> str:
    """What was measured, where and when."""
    parts = [
        record["device"],
        record.get("driver") and f"driver {record['driver']}",
        record["threads"] and f"{record['threads']} threads",
        f"torch {record['torch']}",
        record.get("kernels"),
        f"commit {record['commit']}",
        record["date"],
    ]
    return ", ".join(part for part in parts if part)


def losses_table(found: Mapping[tuple[str, ...], Row], targets: Mapping[tuple[str, ...], dict[str, float]]) -> str:
    """One line per case: our time, the rivals', share of the hardware's limits, memory, errors; targets are beside
    their values. Keys of ``targets``: key of a case without the device."""
    others = {name for row in found.values() for name in row.rivals if row.value(name, "median_ms")}
    rivals = ["eager", "compile", *sorted(others - {"ours", "eager", "compile"})]
    lines = [
        "| loss | logits or features → labels | dtype | ours ms (20–80 %) | "
        + " | ".join(f"{name} ÷ ours" for name in rivals)
        + " | of copy bandwidth | ours ÷ floor | extra memory MiB (kept): ours / eager | error: ours / eager |",
        "|---|---|---|---:|" + "---:|" * (len(rivals) + 4),
    ]
    for key, row in found.items():
        _, op, shape, size, dtype = key
        goals = targets.get(key[1:], {})
        ratios = [_against(row.ratio(name), goals.get(name), "≥") for name in rivals]
        lines.append(
            f"| {op} | {_times(shape)}{' → ' + _times(size) if size else ''} | {dtype} | {_time(row.ours)} | "
            + " | ".join(ratios)
            + f" | {_share(row.copy_share())} | {_against(row.over_floor, goals.get('floor'), '≤')} "
            f"| {_memory(row, goals.get('bytes'))} | {_error(row, 'ours')} / {_error(row, 'eager')} |"
        )
    notes = {
        f"{name}: {record['note']}" for row in found.values() for name, record in row.rivals.items() if record["note"]
    }
    if notes:
        lines += ["", "Notes: " + "; ".join(sorted(notes)) + "."]
    return "\n".join(lines)


def steps_table(records: Sequence[Record]) -> str:
    """One line per rival of a training step."""
    lines = [
        "| recipe | images | losses | rival | step ms (20–80 %) | losses ms | their share | peak GiB |",
        "|---|---|---|---|---:|---:|---:|---:|",
    ]
    for r in records:
        losses, share, peak = "–", "–", "–"
        if r["median_ms"]:
            losses = f"{float(r['losses_ms']):.2f}"
            share = f"{losses_share(r):.1%}"
        if r["peak_bytes"]:
            peak = f"{int(r['peak_bytes']) / 2**30:.2f}"
        lines.append(
            f"| {r['recipe']} | {_times(r['images'])} | {r['losses']} | {r['rival']} | {_time(r)} | {losses} | {share} | {peak} |"
        )
    return "\n".join(lines)


def losses_share(record: Record) -> float:
    """Share of the losses in the time of a training step."""
    return float(record["losses_ms"]) / float(record["median_ms"])


def kernels_table(
    times: Mapping[tuple[str, str, str], Mapping[str, float]], floors: Mapping[tuple[str, str], float]
) -> str:
    """One line per recipe and loss: kernel times in microseconds.

    Args:
        times: {(recipe, loss, layout): {"default", "triton", "cuda" or "eager": µs}}.
        floors: {(recipe, loss): µs}.
    """
    lines = [
        "| recipe | loss | default | Triton | CUDA C++ | eager | eager ÷ default | default ÷ floor "
        "| channels_last: default | eager |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for recipe, loss in dict.fromkeys(key[:2] for key in times):
        nchw, last = (times.get((recipe, loss, layout), {}) for layout in ("NCHW", "channels_last"))
        default, eager = nchw.get("default"), nchw.get("eager")
        ratio = f"{eager / default:.0f}×" if default and eager else "–"
        over = f"{default / floors[recipe, loss]:.1f}×" if default else "–"
        cells = [_micro(nchw.get(name)) for name in ("default", "triton", "cuda", "eager")]
        cells += [ratio, over, _micro(last.get("default")), _micro(last.get("eager"))]
        lines.append(f"| {recipe} | {loss} | {' | '.join(cells)} |")
    return "\n".join(lines)


def host_table(records: Sequence[Record]) -> str:
    """One line per loss: host time of forward and backward on the default backend and on Triton."""
    found = {(r["loss"], r["backend"]): float(r["forward_us"]) + float(r["backward_us"]) for r in records}
    lines = ["| loss | default, µs | Triton, µs |", "|---|---:|---:|"]
    for loss in dict.fromkeys(r["loss"] for r in records):
        lines.append(f"| `{loss}` | {_micro(found.get((loss, 'default')))} | {_micro(found.get((loss, 'triton')))} |")
    return "\n".join(lines)


def _micro(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def predictions_table(cases: Iterable[Case], measured: Mapping[tuple[str, ...], Row]) -> str:
    """The roofline's predictions for every case and GPU, and measurements.

    ``measured``: rows of ``cuda.csv`` by key, device included.
    """
    lines = [
        "| loss | shape → labels | dtype | MB | exponentials, 10⁶ | "
        + " | ".join(f"{name} µs" for name in GPUS)
        + " | measured µs |",
        "|---|---|---|---:|---:|" + "---:|" * (len(GPUS) + 1),
    ]
    for case in cases:
        op, shape, size, dtype = case.key
        predicted = []
        for gpu in GPUS.values():
            seconds = case.work.seconds(gpu.bandwidth, gpu.exponentials_per_second)
            bound = "m" if seconds == case.work.bytes / gpu.bandwidth else "e"
            predicted.append(f"{seconds * 1e6:.1f} {bound}")
        seen = [
            f"{row.value('ours', 'median_ms') * 1e3:.1f} ({key[0]})"
            for key, row in measured.items()
            if key[1:] == case.key and row.value("ours", "median_ms")
        ]
        lines.append(
            f"| {op} | {_times(shape)}{' → ' + _times(size) if size else ''} | {dtype} | {case.work.bytes / 1e6:.1f} "
            f"| {case.work.exponentials / 1e6:.1f} | {' | '.join(predicted)} | {', '.join(seen) or 'not yet run'} |"
        )
    return "\n".join(lines)


def plot(measured: Mapping[tuple[str, ...], Row], path: Path) -> None:
    """Bars of the times of every rival and case on a logarithmic axis, with the 20th and 80th percentile."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = [(key, row) for key, row in measured.items() if row.value("ours", "median_ms")]
    if not found:
        raise ValueError(f"no case has a time to plot in {path}")
    timed = dict.fromkeys(name for _, row in found for name in row.rivals if row.value(name, "median_ms"))
    names = [*(n for n in COLOURS if n in timed), *(n for n in timed if n not in COLOURS)]
    figure, axis = plt.subplots(figsize=(9, 1 + 0.24 * len(found) * (len(names) + 0.7)), constrained_layout=True)
    height = 1 / (len(names) + 0.7)
    for i, name in enumerate(names):
        points = [(y, row) for y, (_, row) in enumerate(found) if row.value(name, "median_ms")]
        low, middle, high = ([row.value(name, c) for _, row in points] for c in ("p20_ms", "median_ms", "p80_ms"))
        below, above = ([abs(v - m) for v, m in zip(edge, middle, strict=True)] for edge in (low, high))
        ys = [y + i * height for y, _ in points]
        axis.barh(
            ys,
            middle,
            height,
            xerr=[below, above],
            color=COLOURS.get(name),
            label=name,
            error_kw={"lw": 0.8, "alpha": 0.6},
        )
    floors = [(y, row.value("ours", "floor_ms")) for y, (_, row) in enumerate(found)]
    for y, floor in floors:
        axis.plot([floor, floor], [y - height / 2, y + height * (len(names) - 0.5)], color="black", lw=1.2)
    labels = [f"{k[1]} {_times(k[2])}{' → ' + _times(k[3]) if k[3] else ''} {k[4]}" for k, _ in found]
    axis.set_yticks([y + height * (len(names) - 1) / 2 for y in range(len(found))], labels, fontsize=8)
    axis.margins(y=0.01)
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="forward and backward, ms; the black line is the floor")
    runs = dict.fromkeys(
        f"{r['device']}, torch {r['torch']}, commit {r['commit']}" for r in (row.ours for _, row in found)
    )
    axis.set_title("\n".join(runs), fontsize=8)
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _times(numbers: str) -> str:
    return numbers.replace("x", "×")


def _time(record: Record) -> str:
    if not record["median_ms"]:
        return record["note"] or "–"
    return f"{float(record['median_ms']):.3g} ({float(record['p20_ms']):.3g}–{float(record['p80_ms']):.3g})"


def _against(value: float | None, target: float | None, sign: str, unit: str = "×") -> str:
    """A value, and whether it meets its target, if any."""
    if value is None:
        return "–"
    text = f"{value:.2f}{unit}"
    if target is None:
        return text
    met = value >= target if sign == "≥" else value <= target
    return f"{text} ({sign} {target:g}: {'met' if met else 'missed'})"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _memory(row: Row, limit: float | None) -> str:
    """Peak and kept MiB of ours and of eager; a limit is in bytes per label pixel."""

    def of(rival: str) -> str:
        peak, kept = (row.value(rival, c) for c in ("peak_bytes", "retained_bytes"))
        return ("–" if peak is None else f"{peak / 2**20:.1f}") + ("" if kept is None else f" ({kept / 2**20:.1f})")

    text = f"{of('ours')} / {of('eager')}"
    peak = row.value("ours", "peak_bytes")
    if limit is not None and peak is not None:
        batch, *_ = map(int, row.ours["shape"].split("x"))
        height, width = map(int, row.ours["size"].split("x"))
        text += f"; {_against(peak / (batch * height * width), limit, '≤', ' B a label pixel')}"
    return text


def _error(row: Row, rival: str) -> str:
    return row.rivals[rival]["error"] if rival in row.rivals and row.rivals[rival]["error"] else "–"

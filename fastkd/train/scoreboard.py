"""Runs and checkpoints scored under one evaluation, with mean and deviation over runs that differ in their seed alone."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from fastkd.train import checkpoint
from fastkd.train.config import Config, EvalConfig, seeds_apart, to_dict
from fastkd.train.data import build_dataset, eval_transform
from fastkd.train.evaluation import Scores, SegmentationSet, evaluate


class Entry(NamedTuple):
    """One network: name, configuration and step of its checkpoint; hours its run took, None if it has not ended."""

    name: str
    config: Config
    step: int
    hours: float | None
    scores: Scores


class Row(NamedTuple):
    """Runs of one configuration and several seeds. The deviation is that of a sample (n − 1), None for one seed."""

    name: str
    seeds: int
    steps: int
    hours: float | None
    miou: float
    miou_deviation: float | None
    pixel_accuracy: float
    pixel_accuracy_deviation: float | None


def score(
    paths: Sequence[Path],
    how: EvalConfig,
    *,
    root: str | None = None,
    split: str = "val",
    device: torch.device,
    progress: bool = False,
) -> list[Entry]:
    """Scores every network in the same way on the same images.

    Args:
        paths: run directories (their last.pt, the network of the last step) or checkpoints.
        how: the evaluation, e.g. `validation_of` the first.
        root: folder of the data set, if it is not where it was in training.
        split: "val", "test" or "train".

    Raises:
        CheckpointError, FileNotFoundError: a checkpoint cannot be read.
        ValueError: two of them are on different data.
    """
    how.check()
    data = _config(paths[0]).data
    options = data.options if split == "train" else data.options | data.val_options
    dataset = cast(
        SegmentationSet,
        build_dataset(data.name, root=root or data.root, split=split, transform=eval_transform(), **options),
    )
    entries = []
    for path in paths:
        network, state = checkpoint.load_network(_file(path))
        config = checkpoint.config_of(state, path)
        if list(state["classes"]) != list(dataset.classes):
            raise ValueError(
                f"{path} knows the {len(state['classes'])} classes {', '.join(state['classes'])}; the data of {paths[0]} has "
                f"{len(dataset.classes)}: {', '.join(dataset.classes)}. Evaluate them apart"
            )
        name = config.name or (path if path.is_dir() else path.parent).name
        found = evaluate(
            network.to(device), dataset, how, device=device, workers=data.workers, progress=name if progress else None
        )
        entries.append(Entry(name, config, state["step"], _hours(path), found))
    return entries


def validation_of(path: Path) -> EvalConfig:
    """How a run or checkpoint was validated in training, on all images."""
    return dataclasses.replace(_config(path).eval, limit=None)


def _config(path: Path) -> Config:
    return checkpoint.config_of(checkpoint.load(_file(path)), path)


def _file(path: Path) -> Path:
    return path / "last.pt" if path.is_dir() else path


def _hours(path: Path) -> float | None:
    result = (path if path.is_dir() else path.parent) / "result.json"
    return json.loads(result.read_text(encoding="utf-8"))["seconds"] / 3600 if result.is_file() else None


def rows(entries: Sequence[Entry]) -> list[Row]:
    """One row for all entries whose configurations differ in their seed alone, in the order of the first."""
    groups: list[list[Entry]] = []
    for entry in entries:
        same = (g for g in groups if _same(g[0], entry))
        group = next(same, None)
        if group is None:
            groups.append([entry])
        else:
            group.append(entry)
    return [_row(group) for group in groups]


def _same(a: Entry, b: Entry) -> bool:
    return a.step == b.step and seeds_apart(to_dict(a.config), to_dict(b.config))


def _row(group: list[Entry]) -> Row:
    hours = [entry.hours for entry in group if entry.hours is not None]
    miou, accuracy = ([getattr(entry.scores, name) for entry in group] for name in ("miou", "pixel_accuracy"))
    return Row(
        name=group[0].name,
        seeds=len(group),
        steps=group[0].step,
        hours=statistics.mean(hours) if hours else None,
        miou=statistics.mean(miou),
        miou_deviation=statistics.stdev(miou) if len(group) > 1 else None,
        pixel_accuracy=statistics.mean(accuracy),
        pixel_accuracy_deviation=statistics.stdev(accuracy) if len(group) > 1 else None,
    )


def table(found: Sequence[Row]) -> str:
    """The rows in Markdown, in percent and hours."""
    lines = ["| run | seeds | steps | hours | mIoU % | pixel accuracy % |", "|---|---:|---:|---:|---:|---:|"]
    for row in found:
        hours = "" if row.hours is None else f"{row.hours:.2f}"
        miou, accuracy = (
            _percent(row.miou, row.miou_deviation),
            _percent(row.pixel_accuracy, row.pixel_accuracy_deviation),
        )
        lines.append(f"| {row.name} | {row.seeds} | {row.steps} | {hours} | {miou} | {accuracy} |")
    return "\n".join(lines)


def _percent(mean: float, deviation: float | None) -> str:
    return f"{100 * mean:.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}")


def class_table(entries: Sequence[Entry]) -> str:
    """IoU in percent, a class a line and a network a column; absent: neither labelled nor predicted."""
    names = list(entries[0].scores.class_iou)
    width, columns = max(map(len, names)), [max(8, len(entry.name)) for entry in entries]
    head = " " * (width + 2) + "  ".join(f"{entry.name:>{w}}" for entry, w in zip(entries, columns, strict=True))
    lines = [head.rstrip()] if len(entries) > 1 else []
    for name in names:
        values = [entry.scores.class_iou[name] for entry in entries]
        words = ["absent" if value is None else f"{100 * value:.2f}" for value in values]
        lines.append(f"{name:<{width}}  " + "  ".join(f"{x:>{w}}" for x, w in zip(words, columns, strict=True)))
    return "\n".join(lines)


def to_json(entries: Sequence[Entry], how: EvalConfig) -> dict[str, Any]:
    """Everything a table shows and more: the evaluation, each network's scores with its seed, the rows."""
    networks = [
        {"name": e.name, "seed": e.config.seed, "method": e.config.method, "step": e.step, "hours": e.hours, **e.scores._asdict()}
        for e in entries
    ]  # fmt: skip
    return {"eval": to_dict(how), "networks": networks, "rows": [row._asdict() for row in rows(entries)]}

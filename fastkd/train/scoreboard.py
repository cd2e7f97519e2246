"""Scores runs and checkpoints under one evaluation, with mean and deviation over runs that differ only in the seed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastkd.train import checkpoint
from fastkd.train.config import Config, EvalConfig, to_dict
from fastkd.train.data import evaluation_set
from fastkd.train.evaluation import Scores, evaluate
from fastkd.train.runs import Run, grouped

SCORES = ("miou", "pixel_accuracy")


class Entry(NamedTuple):
    """One network: name, configuration and step of its checkpoint; hours of its run, None if unfinished."""

    name: str
    config: Config
    step: int
    hours: float | None
    scores: Scores


def score(
    paths: Sequence[Path],
    how: EvalConfig,
    *,
    root: str | None = None,
    split: str = "val",
    device: torch.device,
    progress: bool = False,
) -> list[Entry]:
    """Scores every network with the same evaluation on the same images.

    Args:
        paths: run directories (their last.pt) or checkpoints.
        how: the evaluation, e.g. `validation_of` the first.
        root: folder of the data set, if it has moved since training.
        split: "val", "test" or "train".

    Raises:
        CheckpointError, FileNotFoundError: a checkpoint cannot be read.
        ValueError: two of them are on different data.
    """
    how.check()
    data = _config(paths[0]).data
    dataset = evaluation_set(data, split=split, root=root)
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
    """The validation options of a run or checkpoint, on all images."""
    return dataclasses.replace(_config(path).eval, limit=None)


def _config(path: Path) -> Config:
    return checkpoint.config_of(checkpoint.load(_file(path)), path)


def _file(path: Path) -> Path:
    return path / "last.pt" if path.is_dir() else path


def _hours(path: Path) -> float | None:
    result = (path if path.is_dir() else path.parent) / "result.json"
    return json.loads(result.read_text(encoding="utf-8"))["seconds"] / 3600 if result.is_file() else None


def rows(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """One row per configuration, over its seeds, in order of first occurrence.

    Means over the seeds; sample standard deviations (n − 1), None for one seed; hours None if no run has finished.
    """
    runs = []
    for entry in entries:
        found = {"miou": entry.scores.miou, "pixel_accuracy": entry.scores.pixel_accuracy, "steps": entry.step}
        hours = {} if entry.hours is None else {"hours": entry.hours}
        runs.append(Run(Path(entry.name), entry.name, found | hours, settings=to_dict(entry.config)))
    return [
        {"name": group.first.name, "seeds": len(group.runs), "steps": group.first.result["steps"], "hours": group.mean("hours")}
        | {key: group.mean(key) for key in SCORES}
        | {f"{key}_deviation": group.spread(key) for key in SCORES}
        for group in grouped(runs)
    ]  # fmt: skip


def table(found: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown, in percent and hours."""
    lines = ["| run | seeds | steps | hours | mIoU % | pixel accuracy % |", "|---|---:|---:|---:|---:|---:|"]
    for row in found:
        hours = "" if row["hours"] is None else f"{row['hours']:.2f}"
        spreads = ["" if (v := row[f"{key}_deviation"]) is None else f" ± {100 * v:.2f}" for key in SCORES]
        scores = [f"{100 * row[key]:.2f}{spread}" for key, spread in zip(SCORES, spreads, strict=True)]
        lines.append(f"| {row['name']} | {row['seeds']} | {row['steps']} | {hours} | {' | '.join(scores)} |")
    return "\n".join(lines)


def class_table(entries: Sequence[Entry]) -> str:
    """IoU in percent, one row per class and one column per network; absent: neither labelled nor predicted."""
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
    """The evaluation, each network's scores with its seed, and the rows."""
    networks = [
        {"name": e.name, "seed": e.config.seed, "method": e.config.method, "step": e.step, "hours": e.hours, **e.scores._asdict()}
        for e in entries
    ]  # fmt: skip
    return {"eval": to_dict(how), "networks": networks, "rows": rows(entries)}

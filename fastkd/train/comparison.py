"""A page that compares runs: their numbers and curves, and what their networks see in the same images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from fastkd.train import checkpoint
from fastkd.train.config import Config
from fastkd.train.data import build_dataset, eval_transform
from fastkd.train.evaluation import SegmentationSet
from fastkd.train.files import write_whole
from fastkd.train.models import SegmentationModel
from fastkd.train.pictures import MAPS, difficulty, predictions, sample
from fastkd.train.report import write_report
from fastkd.train.runs import grouped, load_runs


class Shown(NamedTuple):
    """A run in the pictures."""

    name: str
    path: Path
    config: Config
    state: dict[str, Any]
    network: SegmentationModel


def compare(
    out: Path,
    runs: Sequence[Path],
    *,
    title: str,
    notes: str | None = None,
    root: str | None = None,
    count: int = 3,
) -> Path:
    """Writes `<out>/report.html`, `table.md`, `curves.png` and two panels; returns the page.

    Args:
        runs: directories of runs on one data set, in the order of the page. Runs that differ in their seed alone are one row; the
            pictures show the first of them. The TFE and TSE maps are drawn for the first teacher among them (a run with an
            auxiliary head) and the last student distilled, if there are such.
        root: folder of the data set, if it is not where it was in training.
        count: validation images in a panel, evenly spread.

    Raises:
        CheckpointError: neither last.pt of a run nor the one before can be read.
        ValueError: the runs are on different classes.
    """
    shown = _shown(runs)
    pictures = []
    if shown:
        data, how = shown[0].config.data, shown[0].config.eval
        options = data.options | data.val_options
        scenes = cast(
            SegmentationSet,
            build_dataset(data.name, root=root or data.root, split="val", transform=eval_transform(), **options),
        )
        samples = sample(scenes, count)
        networks = {run.name: run.network for run in shown}
        seen = predictions(networks, samples, scenes, how)
        pictures.append(("predictions", "What the networks see in validation images.", seen))
        teacher = next((run for run in shown if run.network.has_aux), None)
        student = next((run for run in reversed(shown) if run.config.teacher), None)
        if teacher and student:
            maps = difficulty(teacher.network, student.network, samples, scenes, how, name=student.name)
            pictures.append(("difficulty", MAPS.format(student.name), maps))
    for name, _, picture in pictures:
        write_whole(out / f"{name}.png", partial(picture.save, format="PNG"))
    return write_report(out, list(runs), title=title, notes=notes, panels=[picture[1:] for picture in pictures])


def _shown(runs: Sequence[Path]) -> list[Shown]:
    """The first run of each group that has a checkpoint, under names that differ."""
    found: list[Shown] = []
    for group in grouped(load_runs(runs)):
        path = group.first.path
        if not checkpoint.exists(path):
            continue
        state, _ = checkpoint.load_last(path)
        if found and state["classes"] != found[0].state["classes"]:
            raise ValueError(
                f"{path} is on the classes {state['classes']}, {found[0].path} on {found[0].state['classes']}"
            )
        network, _ = checkpoint.load_network(path, state)
        name = "plain student" if group.role == "plain" else group.name
        taken = {run.name for run in found}
        name = next(n for n in (name, group.name, str(path)) if n not in taken)
        found.append(Shown(name, path, checkpoint.config_of(state, path), state, network))
    return found

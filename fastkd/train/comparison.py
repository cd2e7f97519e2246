"""A page that compares runs: numbers, curves, and predictions on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fastkd.train import checkpoint
from fastkd.train.config import Config
from fastkd.train.data import evaluation_set
from fastkd.train.files import write_whole
from fastkd.train.models import SegmentationModel
from fastkd.train.pictures import MAPS, difficulty, predictions, sample
from fastkd.train.report import write_report
from fastkd.train.runs import grouped, load_runs


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
        runs: directories of runs on one data set, in the order of the page. Runs that differ only in the seed share a
            row; the panels show the first of them. TFE and TSE maps are drawn for the first teacher (a run with an
            auxiliary head) and the last distilled student, if both exist.
        root: folder of the data set, if it has moved since training.
        count: validation images per panel, evenly spaced.

    Raises:
        CheckpointError: neither last.pt of a run nor the previous checkpoint can be read.
        ValueError: the runs have different classes.
    """
    shown = _shown(runs)
    pictures = []
    if shown:
        data, how = shown[0][1].data, shown[0][1].eval
        scenes = evaluation_set(data, root=root)
        samples = sample(scenes, count)
        seen = predictions({name: network for name, _, network in shown}, samples, scenes, how)
        pictures.append(("predictions", "Predictions on validation images.", seen))
        teachers = [network for _, _, network in shown if network.has_aux]
        students = [(name, network) for name, config, network in shown if config.teacher]
        if teachers and students:
            name, student = students[-1]
            maps = difficulty(teachers[0], student, samples, scenes, how, name=name)
            pictures.append(("difficulty", MAPS.format(name), maps))
    for name, _, picture in pictures:
        write_whole(out / f"{name}.png", partial(picture.save, format="PNG"))
    return write_report(out, list(runs), title=title, notes=notes, panels=[picture[1:] for picture in pictures])


def _shown(runs: Sequence[Path]) -> list[tuple[str, Config, SegmentationModel]]:
    """The first run of each group that has a checkpoint, under unique names."""
    found: dict[str, tuple[str, Config, SegmentationModel]] = {}
    classes: dict[str, Path] = {}
    for group in grouped(load_runs(runs)):
        path = group.first.path
        if not checkpoint.exists(path):
            continue
        state, _ = checkpoint.load_last(path)
        classes.setdefault(str(state["classes"]), path)
        if len(classes) > 1:
            raise ValueError("; ".join(f"{where} is on the classes {names}" for names, where in classes.items()))
        network, _ = checkpoint.load_network(path, state)
        plain = ["plain student"] if group.role == "plain" else []
        name = next(n for n in (*plain, group.name, str(path)) if n not in found)
        found[name] = name, checkpoint.config_of(state, path), network
    return list(found.values())

"""A page that compares runs: numbers, curves, and predictions on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL.Image import Image

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
    pictures: dict[str, tuple[str, Image]] = {}
    if shown:
        networks = {name: network for name, (_, network) in shown.items()}
        first, _ = next(iter(shown.values()))
        scenes = evaluation_set(first.data, root=root)
        samples = sample(scenes, count)
        seen = predictions(networks, samples, scenes, first.eval)
        pictures["predictions.png"] = "Predictions on validation images.", seen
        teachers = [network for network in networks.values() if network.has_aux]
        students = [name for name, (config, _) in shown.items() if config.teacher]
        if teachers and students:
            name = students[-1]
            maps = difficulty(teachers[0], networks[name], samples, scenes, first.eval, name=name)
            pictures["difficulty.png"] = MAPS.format(name), maps
    for file, (_, picture) in pictures.items():
        write_whole(out / file, partial(picture.save, format="PNG"))
    panels = [(caption, out / file) for file, (caption, _) in pictures.items()]
    return write_report(out, runs, title=title, notes=notes, panels=panels)


def _shown(runs: Sequence[Path]) -> dict[str, tuple[Config, SegmentationModel]]:
    """The first run of each group that has a checkpoint, by the group's name, or its path if that name is taken."""
    found: dict[str, tuple[Config, SegmentationModel]] = {}
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
        name = str(path) if group.name in found else group.name
        found[name] = checkpoint.config_of(state, path), network
    return found

"""A page that compares finished runs: their numbers and curves, and what their networks see in the same images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from fastkd.train import checkpoint
from fastkd.train.config import Config, from_dict
from fastkd.train.data import build_dataset, eval_transform
from fastkd.train.evaluation import SegmentationSet
from fastkd.train.pictures import difficulty, predictions, sample
from fastkd.train.report import write_report


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
        runs: directories of finished runs on one data set, in the order of the page. The TFE and TSE maps are drawn for the
            first teacher among them (a run with an auxiliary head) and the last student distilled with RDD, if there are such.
        root: folder of the data set, if it is not where it was in training.
        count: validation images in a panel, evenly spread.

    Raises:
        CheckpointError, FileNotFoundError: a run's last.pt cannot be read.
        ValueError: the runs are on different classes.
    """
    loaded = {path.name: checkpoint.load_network(path / "last.pt") for path in runs}
    networks = {name: network for name, (network, _) in loaded.items()}
    states = [state for _, state in loaded.values()]
    for path, state in zip(runs, states, strict=True):
        if state["classes"] != states[0]["classes"]:
            raise ValueError(f"{path} is on the classes {state['classes']}, {runs[0]} on {states[0]['classes']}")
    configs = {name: from_dict(Config, state["config"]) for name, (_, state) in loaded.items()}
    data, size = configs[runs[0].name].data, configs[runs[0].name].eval.size
    options = data.options | data.val_options
    scenes = cast(
        SegmentationSet,
        build_dataset(data.name, root=root or data.root, split="val", transform=eval_transform(), **options),
    )
    samples = sample(scenes, count)
    names = {name: "plain student" if _is_plain(c, configs) else c.name or name for name, c in configs.items()}
    named = {names[name]: network for name, network in networks.items()}
    out.mkdir(parents=True, exist_ok=True)
    pictures = [
        ("What the networks see in validation images.", predictions(named, samples, scenes, size)),
    ]
    teacher = next((name for name, network in networks.items() if network.has_aux), None)
    student = next((name for name in reversed(configs) if "rdd" in configs[name].method.split("+")), None)
    if teacher and student:
        pictures.append(
            (
                "Relative difficulty. TFE: how far the teacher's two heads agree (bright: fully). TSE: pixels that one of "
                f"student and teacher finds hard and the other easy, here for {names[student]}.",
                difficulty(networks[teacher], networks[student], samples, scenes, size, name=names[student]),
            )
        )
    for (_, picture), name in zip(pictures, ("predictions", "difficulty"), strict=False):
        picture.save(out / f"{name}.png")
    return write_report(out, list(runs), title=title, notes=notes, panels=pictures)


def _is_plain(config: Config, configs: dict[str, Config]) -> bool:
    """Trained alone, with the network of a distilled run."""
    return config.method == "none" and any(c.method != "none" and c.model == config.model for c in configs.values())

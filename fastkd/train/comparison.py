"""A page that compares finished runs: their numbers and curves, and what their networks see in the same images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image

from fastkd import difficulty_mask, teacher_confidence
from fastkd.train import checkpoint
from fastkd.train.config import Config, from_dict
from fastkd.train.data import build_dataset, eval_transform
from fastkd.train.evaluation import SegmentationSet, predict_logits
from fastkd.train.models import Output, SegmentationModel
from fastkd.train.panels import colourise, heatmap, panel
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
    chosen = [scenes[round((i + 0.5) * len(scenes) / count)] for i in range(count)]

    names = {name: "plain student" if _is_plain(c, configs) else c.name or name for name, c in configs.items()}
    out.mkdir(parents=True, exist_ok=True)
    pictures = [
        ("What the networks see in validation images.", _predictions(networks, names, chosen, scenes, size)),
    ]
    teacher = next((name for name, network in networks.items() if network.has_aux), None)
    student = next((name for name in reversed(configs) if "rdd" in configs[name].method.split("+")), None)
    if teacher and student:
        pictures.append(
            (
                "Relative difficulty. TFE: how far the teacher's two heads agree (bright: fully). TSE: pixels that one of "
                f"student and teacher finds hard and the other easy, here for {names[student]}.",
                _difficulty(networks[teacher], networks[student], names[student], chosen, scenes, size),
            )
        )
    for (_, picture), name in zip(pictures, ("predictions", "difficulty"), strict=False):
        picture.save(out / f"{name}.png")
    return write_report(out, list(runs), title=title, notes=notes, panels=pictures)


def _is_plain(config: Config, configs: dict[str, Config]) -> bool:
    """Trained alone, with the network of a distilled run."""
    return config.method == "none" and any(c.method != "none" and c.model == config.model for c in configs.values())


def _predictions(
    networks: dict[str, SegmentationModel],
    names: dict[str, str],
    chosen: list,
    scenes: SegmentationSet,
    size: tuple[int, int] | None,
) -> Image.Image:
    palette = np.asarray(scenes.palette)
    rows = []
    for image, label in chosen:
        shape = (image.shape[-2], image.shape[-1])
        seen = [
            colourise(predict_logits(n, image[None], shape, input_size=size).argmax(1)[0].byte().numpy(), palette)
            for n in networks.values()
        ]
        rows.append([image, colourise(label.numpy(), palette), *seen])
    return panel(["image", "label", *names.values()], rows, legend=scenes.classes, palette=palette)


@torch.no_grad()
def _difficulty(
    teacher: SegmentationModel,
    student: SegmentationModel,
    name: str,
    chosen: list,
    scenes: SegmentationSet,
    size: tuple[int, int] | None,
) -> Image.Image:
    palette = np.asarray(scenes.palette)
    rows = []
    for image, label in chosen:
        shape = (image.shape[-2], image.shape[-1])
        t, s = (_output(network, image, size) for network in (teacher, student))
        assert t.aux is not None  # the teacher was chosen for it
        confidence = teacher_confidence(t.logits, t.aux, direction="main_aux")[0]
        mask = difficulty_mask(s.logits, t.logits, label[None])[0]
        maps = [
            colourise(predict_logits(n, image[None], shape, input_size=size).argmax(1)[0].byte().numpy(), palette)
            for n in (teacher, student)
        ]
        rows.append(
            [
                image,
                colourise(label.numpy(), palette),
                *maps,
                heatmap(confidence.numpy()),
                heatmap(mask.float().numpy()),
            ]
        )
    return panel(["image", "label", "teacher", name, "TFE confidence", "TSE mask"], rows)


def _output(network: SegmentationModel, image: torch.Tensor, size: tuple[int, int] | None) -> Output:
    batch = image[None].float() / 255
    if size is not None and tuple(batch.shape[-2:]) != tuple(size):
        batch = torch.nn.functional.interpolate(batch, tuple(size), mode="bilinear", antialias=True)
    return network(batch)

"""What networks see: predictions, and the two maps of relative difficulty, in the same few validation images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastkd import difficulty_mask, teacher_confidence
from fastkd.train.config import EvalConfig
from fastkd.train.evaluation import SegmentationSet, predict_scores
from fastkd.train.models import SegmentationModel
from fastkd.train.panels import colourise, heatmap, panel

MAPS = (
    "Relative difficulty. TFE: how far the teacher's two heads agree (bright: fully). TSE: pixels that one of student and "
    "teacher finds hard and the other easy, here for {}."
)
Samples = Sequence[tuple[Tensor, Tensor]]


def sample(dataset: SegmentationSet, count: int) -> Samples:
    """`count` items, evenly spread; all of them if there are not so many."""
    count = min(count, len(dataset))
    return [dataset[int((i + 0.5) * len(dataset) / count)] for i in range(count)]


def predictions(
    networks: Mapping[str, SegmentationModel], samples: Samples, dataset: SegmentationSet, how: EvalConfig
) -> Image.Image:
    """Rows of image, label and each network's prediction, under its name, evaluated as `how` says; all are in eval mode."""
    palette = np.asarray(dataset.palette)
    rows = [
        [image, colourise(label, palette), *(_seen(network, image, palette, how) for network in networks.values())]
        for image, label in samples
    ]
    return panel(["image", "label", *networks], rows, legend=dataset.classes, palette=palette)


@torch.no_grad()
def difficulty(
    teacher: SegmentationModel,
    student: SegmentationModel,
    samples: Samples,
    dataset: SegmentationSet,
    how: EvalConfig,
    *,
    name: str = "student",
) -> Image.Image:
    """Rows of image, label, what both see, and RDD's maps; TFE's only if the teacher has an auxiliary head."""
    palette = np.asarray(dataset.palette)
    titles = ["image", "label", "teacher", name, *(["TFE confidence"] if teacher.has_aux else []), "TSE mask"]
    rows = []
    for image, label in samples:
        t, aux = _logits(teacher, image, how)
        s, _ = _logits(student, image, how)
        maps = [] if aux is None else [teacher_confidence(t, aux, direction="main_aux")[0]]
        maps.append(difficulty_mask(s, t, label[None].to(s.device))[0])
        seen = [_seen(network, image, palette, how) for network in (teacher, student)]
        rows.append([image, colourise(label, palette), *seen, *(heatmap(values) for values in maps)])
    return panel(titles, rows, legend=dataset.classes, palette=palette)


def _seen(network: SegmentationModel, image: Tensor, palette: Any, how: EvalConfig) -> np.ndarray:
    shape = (image.shape[-2], image.shape[-1])
    return colourise(predict_scores(network, image[None].to(_device(network)), shape, how).argmax(1)[0], palette)


def _logits(network: SegmentationModel, image: Tensor, how: EvalConfig) -> tuple[Tensor, Tensor | None]:
    """Main and auxiliary logits (1, K, H, W) of the whole image, at its size or the one it is resized to."""
    batch = image[None].to(_device(network)).float() / 255
    if how.size is not None:
        batch = F.interpolate(batch, tuple(how.size), mode="bilinear", antialias=True)
    height, width = batch.shape[-2:]
    batch = F.pad(batch, (0, -width % how.size_divisor, 0, -height % how.size_divisor), mode="replicate")
    out = network(batch)

    def cropped(x: Tensor) -> Tensor:
        x = F.interpolate(x.float(), batch.shape[-2:], mode="bilinear", align_corners=how.align_corners)
        return x[..., :height, :width].contiguous()

    return cropped(out.logits), None if out.aux is None else cropped(out.aux)


def _device(network: SegmentationModel) -> torch.device:
    return network.mean.device

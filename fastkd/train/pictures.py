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
from fastkd.train.evaluation import SegmentationSet, predict_logits
from fastkd.train.models import Output, SegmentationModel
from fastkd.train.panels import colourise, heatmap, panel

MAPS = (
    "Relative difficulty. TFE: how far the teacher's two heads agree (bright: fully). TSE: pixels that one of student and "
    "teacher finds hard and the other easy, here for {}."
)
Size = tuple[int, int] | None
Samples = Sequence[tuple[Tensor, Tensor]]


def sample(dataset: SegmentationSet, count: int) -> Samples:
    """`count` items, evenly spread; all of them if there are not so many."""
    count = min(count, len(dataset))
    return [dataset[int((i + 0.5) * len(dataset) / count)] for i in range(count)]


def predictions(
    networks: Mapping[str, SegmentationModel], samples: Samples, dataset: SegmentationSet, size: Size
) -> Image.Image:
    """Rows of image, label and what each network sees, under its name; the networks are in eval mode."""
    palette = np.asarray(dataset.palette)
    rows = [
        [image, colourise(label, palette), *(_seen(network, image, palette, size) for network in networks.values())]
        for image, label in samples
    ]
    return panel(["image", "label", *networks], rows, legend=dataset.classes, palette=palette)


@torch.no_grad()
def difficulty(
    teacher: SegmentationModel,
    student: SegmentationModel,
    samples: Samples,
    dataset: SegmentationSet,
    size: Size,
    *,
    name: str = "student",
) -> Image.Image:
    """Rows of image, label, what both see, and RDD's maps; TFE's only if the teacher has an auxiliary head."""
    palette = np.asarray(dataset.palette)
    titles = ["image", "label", "teacher", name, *(["TFE confidence"] if teacher.has_aux else []), "TSE mask"]
    rows = []
    for image, label in samples:
        t, s = (_output(network, image, size) for network in (teacher, student))
        maps = [] if t.aux is None else [teacher_confidence(t.logits, t.aux, direction="main_aux")[0]]
        maps.append(difficulty_mask(s.logits, t.logits, label[None].to(s.logits.device))[0])
        seen = [_seen(network, image, palette, size) for network in (teacher, student)]
        rows.append([image, colourise(label, palette), *seen, *(heatmap(values.float()) for values in maps)])
    return panel(titles, rows, legend=dataset.classes, palette=palette)


def _seen(network: SegmentationModel, image: Tensor, palette: Any, size: Size) -> np.ndarray:
    images = image[None].to(_device(network))
    shape = (image.shape[-2], image.shape[-1])
    return colourise(predict_logits(network, images, shape, input_size=size).argmax(1)[0], palette)


def _output(network: SegmentationModel, image: Tensor, size: Size) -> Output:
    """Of the image at `size`, stretched to sides that 32 divides, which most encoders need: the maps lie over the label."""
    batch = image[None].to(_device(network)).float() / 255
    height, width = (-(-side // 32) * 32 for side in size or batch.shape[-2:])
    if tuple(batch.shape[-2:]) != (height, width):
        batch = F.interpolate(batch, (height, width), mode="bilinear", antialias=True)
    return network(batch)


def _device(network: SegmentationModel) -> torch.device:
    return network.mean.device

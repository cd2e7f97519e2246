"""Scores of a segmentation network: everything comes from one confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchmetrics.classification import MulticlassConfusionMatrix
from tqdm import tqdm


class SegmentationSet(Protocol):
    """Items (image uint8 (3, H, W), label uint8 (H, W)); `palette` (K, 3) gives each of the K classes a colour."""

    classes: Sequence[str]
    palette: Any
    ignore_index: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class Scores(NamedTuple):
    """miou and pixel_accuracy in [0, 1]; class_iou per class, None where a class is neither labelled nor predicted."""

    miou: float
    pixel_accuracy: float
    class_iou: dict[str, float | None]


def scores(matrix: Tensor, classes: Sequence[str]) -> Scores:
    """Scores of a confusion matrix (K, K), rows = labels, columns = predictions, over valid pixels.

    IoU of a class = diagonal / (row + column − diagonal). A class that is absent (a sum of 0) is None and left out of the
    mean. Without any valid pixel both means are 0.
    """
    matrix = matrix.double().cpu()
    hits = matrix.diagonal()
    union = matrix.sum(0) + matrix.sum(1) - hits
    iou = {name: (hits[i] / union[i]).item() if union[i] > 0 else None for i, name in enumerate(classes)}
    present = [value for value in iou.values() if value is not None]
    total = matrix.sum().item()
    return Scores(sum(present) / len(present) if present else 0.0, hits.sum().item() / total if total else 0.0, iou)


@torch.no_grad()
def predict_logits(
    model: nn.Module, images: Tensor, size: tuple[int, int], *, input_size: tuple[int, int] | None = None
) -> Tensor:
    """Logits (N, K, *size) of uint8 or [0, 1] float images (N, 3, H, W), which are first resized to `input_size`, if given."""
    if input_size is not None and tuple(images.shape[-2:]) != tuple(input_size):
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        images = F.interpolate(images, tuple(input_size), mode="bilinear", align_corners=False, antialias=True)
    logits = model(images).logits.float()
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def evaluate(
    model: nn.Module,
    dataset: SegmentationSet,
    *,
    device: torch.device,
    batch_size: int = 8,
    size: tuple[int, int] | None = None,
    limit: int | None = None,
    rank: int = 0,
    world: int = 1,
    progress: Any = None,
) -> Scores:
    """Scores of `model` on `dataset` at the labels' resolution.

    Args:
        model: takes images, returns an `Output`; left in the mode it was found in.
        dataset: images and labels.
        size: images are resized to (height, width) before the model.
        limit: only the first so many items.
        rank, world: this process and their number; each takes its share, and all get the scores of the whole.
        progress: text of a progress bar, None for no bar.
    """
    classes, ignore_index = dataset.classes, dataset.ignore_index
    count = len(dataset) if limit is None else min(limit, len(dataset))
    loader: Any = DataLoader(Subset(cast(Any, dataset), range(rank, count, world)), batch_size=batch_size)
    metric = MulticlassConfusionMatrix(len(classes), ignore_index=ignore_index, validate_args=False).to(device)
    training = model.training
    model.eval()
    try:
        for images, labels in tqdm(loader, desc=progress, disable=progress is None, leave=False, dynamic_ncols=True):
            labels = labels.to(device).long()
            logits = predict_logits(model, images.to(device), labels.shape[-2:], input_size=size)
            metric.update(logits.argmax(1), labels)
        return scores(metric.compute(), classes)
    finally:
        model.train(training)

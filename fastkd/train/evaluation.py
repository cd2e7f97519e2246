"""Scores of a segmentation network, all from one confusion matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from fastkd.train.config import EvalConfig
from fastkd.train.models import Output, SegmentationModel, refused


class SegmentationSet(Protocol):
    """Items (image uint8 (3, H, W), label uint8 (H, W)); `palette` (K, 3) has the colours of the K classes."""

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

    IoU = diagonal / (row + column − diagonal). An absent class (denominator 0) is None and left out of the mean.
    Without valid pixels both means are 0.
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
    model: Callable[[Tensor], Output],
    images: Tensor,
    size: tuple[int, int],
    *,
    input_size: tuple[int, int] | None = None,
    size_divisor: int = 32,
    align_corners: bool = False,
) -> Tensor:
    """Logits (N, K, *size) of uint8 or [0, 1] float images (N, 3, H, W), from one forward of the whole images.

    Images are first resized to `input_size`, if given, and padded at the bottom and right by edge replication to
    multiples of `size_divisor`, which most encoders need.
    """
    images = _resized(images, input_size)
    height, width = images.shape[-2:]
    bottom, right = -height % size_divisor, -width % size_divisor
    if not (bottom or right):
        logits = _logits(model, images, size_divisor)
        return F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)
    padded = F.pad(_unit(images), (0, right, 0, bottom), mode="replicate")
    logits = _logits(model, padded, size_divisor)
    logits = F.interpolate(logits, padded.shape[-2:], mode="bilinear", align_corners=align_corners)
    logits = logits[..., :height, :width]
    if (height, width) == tuple(size):
        return logits
    return F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)


def _logits(model: Callable[[Tensor], Output], images: Tensor, size_divisor: int) -> Tensor:
    try:
        return model(images).logits.float()
    except (RuntimeError, AssertionError, ValueError) as error:  # raised by the network's library
        if not isinstance(model, SegmentationModel):
            raise
        value = f"eval.size_divisor {size_divisor}: an image of"
        raise refused(model, images.shape[-2:], error, value=value) from error


@torch.no_grad()
def predict_scores(model: nn.Module, images: Tensor, size: tuple[int, int], how: EvalConfig) -> Tensor:
    """Scores (N, K, *size) of images (N, 3, H, W), whose argmax is the predicted class; `how`: the evaluation options.

    For one view (one scale, no flip) its logits, otherwise the mean of the views' class probabilities.
    """
    views = [(scale, flip) for scale in how.scales for flip in ((False, True) if how.flip else (False,))]
    total: Tensor | None = None
    for scale, flip in views:
        view = images.flip(-1) if flip else images
        sides = how.size or view.shape[-2:]
        view = _resized(view, (max(1, round(sides[0] * scale)), max(1, round(sides[1] * scale))))
        logits = _slide(model, view, size, how) if how.window else _whole(model, view, size, how)
        logits = logits.flip(-1) if flip else logits
        if len(views) == 1:
            return logits
        shares = logits.softmax(1) / len(views)
        total = shares if total is None else total.add_(shares)
    assert total is not None  # ensured by config.check
    return total


def _whole(model: nn.Module, images: Tensor, size: tuple[int, int], how: EvalConfig) -> Tensor:
    return predict_logits(model, images, size, size_divisor=how.size_divisor, align_corners=how.align_corners)


def _slide(model: nn.Module, images: Tensor, size: tuple[int, int], how: EvalConfig) -> Tensor:
    """Per-pixel mean of the logits of all windows that cover a pixel; the last window of a row ends at the border."""
    assert how.window is not None
    height, width = images.shape[-2:]
    high, wide = min(how.window[0], height), min(how.window[1], width)
    down, across = how.stride or (max(1, high * 2 // 3), max(1, wide * 2 // 3))
    total: Tensor | None = None
    count = images.new_zeros((height, width), dtype=torch.float32)
    for top in _starts(height, high, down):
        for left in _starts(width, wide, across):
            part = (..., slice(top, top + high), slice(left, left + wide))
            logits = _whole(model, images[part], (high, wide), how)
            if total is None:
                total = logits.new_zeros((*logits.shape[:2], height, width))
            total[part] += logits
            count[part] += 1
    assert total is not None
    total /= count
    if (height, width) == tuple(size):
        return total
    return F.interpolate(total, size, mode="bilinear", align_corners=how.align_corners)


def _starts(length: int, window: int, stride: int) -> list[int]:
    return [*range(0, length - window, stride), length - window]


def _resized(images: Tensor, size: Sequence[int] | None) -> Tensor:
    if size is None or tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(_unit(images), tuple(size), mode="bilinear", align_corners=False, antialias=True)


def _unit(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images


class ConfusionMatrix:
    """Counts (K, K) of pixels, rows = labels, columns = predictions, on `device`; only `compute` synchronises.

    torchmetrics drops ignored pixels with a boolean index, which synchronises at every batch.
    """

    def __init__(self, classes: int, ignore_index: int, device: torch.device) -> None:
        self.classes, self.ignore_index = classes, ignore_index
        self.counts = torch.zeros(classes * classes + 1, dtype=torch.int64, device=device)  # last: ignored pixels

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """predicted, labels: integers of the same shape; labels in [0, K) or `ignore_index`."""
        cells = labels.long() * self.classes + predicted
        cells = torch.where(labels == self.ignore_index, self.classes**2, cells).flatten()
        self.counts.index_add_(0, cells, torch.ones_like(cells))

    def compute(self, *, world: int = 1) -> Tensor:
        """The matrix summed over all `world` processes."""
        if world > 1:
            torch.distributed.all_reduce(self.counts)
        return self.counts[:-1].view(self.classes, self.classes)


def evaluate(
    model: nn.Module,
    dataset: SegmentationSet,
    how: EvalConfig | None = None,
    *,
    device: torch.device,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    progress: Any = None,
) -> Scores:
    """Scores of `model` on `dataset` at label resolution.

    Args:
        model: takes images, returns an `Output`; its training mode is restored.
        dataset: images and labels; images of different sizes are evaluated separately.
        how: size, windows, scales, flip, batch size and limit (`config.EvalConfig`).
        workers: loader processes.
        rank, world: this process and the number of processes; each evaluates a share, all return the total scores.
        progress: text of a progress bar, None for no bar.

    Raises:
        ValueError: model and data set differ in the number of classes.
    """
    how = how or EvalConfig()
    classes = dataset.classes
    count = len(dataset) if how.limit is None else min(how.limit, len(dataset))
    loader: Any = DataLoader(
        Subset(cast(Any, dataset), range(rank, count, world)),
        batch_size=how.batch_size,
        collate_fn=_by_size,
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
    matrix = ConfusionMatrix(len(classes), dataset.ignore_index, device)
    training = model.training
    model.eval()
    try:
        for batches in tqdm(loader, desc=progress, disable=progress is None, leave=False, dynamic_ncols=True):
            for images, labels in batches:
                images, labels = (x.to(device, non_blocking=True) for x in (images, labels))
                found = predict_scores(model, images, labels.shape[-2:], how)
                if found.shape[1] != len(classes):
                    raise ValueError(
                        f"the network predicts {found.shape[1]} classes, the data set has {len(classes)}; "
                        "evaluate it on the data set it was trained for"
                    )
                matrix.update(found.argmax(1), labels)
        return scores(matrix.compute(world=world), classes)
    finally:
        model.train(training)


def _by_size(items: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Splits a batch into runs of the same size."""
    groups = [list(group) for _, group in groupby(items, lambda item: (item[0].shape, item[1].shape))]
    return [(torch.stack([image for image, _ in g]), torch.stack([label for _, label in g])) for g in groups]

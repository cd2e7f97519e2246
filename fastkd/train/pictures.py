"""Pictures of predictions and of the two maps of relative difficulty, on the same validation images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor

from fastkd import difficulty_mask, teacher_confidence
from fastkd.train.config import EvalConfig
from fastkd.train.evaluation import SegmentationSet, predict_logits, predict_scores
from fastkd.train.models import Output, SegmentationModel

MAPS = (
    "Relative difficulty. TFE: how far the teacher's two heads agree (bright: fully). TSE: pixels that one of student and "
    "teacher finds hard and the other easy, here for {}."
)
IGNORE = 255
Samples = Sequence[tuple[Tensor, Tensor]]


def colourise(label: Any, palette: Any) -> np.ndarray:
    """A label map (H, W) as uint8 (H, W, 3); ignored pixels are black."""
    label = torch.as_tensor(label).cpu().numpy()
    if bad := {*np.unique(label).tolist()} - {*range(len(palette)), IGNORE}:
        raise ValueError(f"the label map holds {min(bad)}, the palette has {len(palette)} colours")
    colours = np.zeros((IGNORE + 1, 3), np.uint8)
    colours[: len(palette)] = palette
    return colours[label]


def overlay(image: np.ndarray, label: np.ndarray, palette: Any, alpha: float = 0.55) -> np.ndarray:
    """The image, uint8 (H, W, 3), with the coloured label (H, W) blended in where not ignored."""
    if image.shape[:2] != label.shape:
        raise ValueError(f"image {image.shape} and label {label.shape} must have the same height and width")
    mixed = (1 - alpha) * image.astype(np.float32) + alpha * colourise(label, palette).astype(np.float32)
    return np.where(label[..., None] == IGNORE, image, mixed.astype(np.uint8))


def heatmap(values: Tensor) -> np.ndarray:
    """A map (H, W) in [0, 1] (or bool) as uint8 (H, W, 3): uniform lightness from dark 0 to bright 1; NaN is grey."""
    colours = colormaps["magma"].with_extremes(bad=(0.5, 0.5, 0.5))
    return colours(np.ma.masked_invalid(values.float().cpu().numpy()), bytes=True)[..., :3]


def panel(
    titles: Sequence[str], rows: Sequence[Sequence[np.ndarray]], *, legend: Sequence[str] = (), palette: Any = ()
) -> Image.Image:
    """A grid of pictures (H, W, 3) under `titles`, with a colour legend of the classes."""
    if any(len(row) != len(titles) for row in rows):
        raise ValueError(f"every row needs {len(titles)} pictures, one a title")
    ratios = [max(x.shape[0] / x.shape[1] for x in row) for row in rows]
    text = max(1.0, len(titles) / 6)  # legible where a page shrinks a wide panel to its own width
    across, longest = int(2 * len(titles) / text), int(34 / text)
    lines = -(-len(legend) // across)
    size = 2.7 * len(titles), 2.65 * sum(ratios) + (0.35 + 0.2 * lines) * text
    figure = Figure(size, dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0))
    grid = figure.subplots(len(rows), len(titles), squeeze=False, height_ratios=ratios)
    for axes, row in zip(grid, rows, strict=True):
        for place, picture in zip(axes, row, strict=True):
            place.imshow(picture)
            place.axis("off")
    for place, title in zip(grid[0], titles, strict=True):
        place.set_title(title if len(title) < longest else title[: longest - 2] + "…", fontsize=10 * text)
    if legend:
        colours = np.asarray(palette) / 255
        handles = [Patch(color=colour, label=name) for name, colour in zip(legend, colours, strict=False)]
        figure.legend(handles=handles, loc="outside lower center", ncols=across, fontsize=8 * text, frameon=False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def sample(dataset: SegmentationSet, count: int) -> Samples:
    """`count` evenly spaced items, or all of them if there are fewer."""
    count = min(count, len(dataset))
    return [dataset[int((i + 0.5) * len(dataset) / count)] for i in range(count)]


def predictions(
    networks: Mapping[str, SegmentationModel], samples: Samples, dataset: SegmentationSet, how: EvalConfig
) -> Image.Image:
    """Rows of image, label and each network's prediction, by name, evaluated as `how`; networks are in eval mode."""
    rows = _rows([*networks.values()], samples, dataset, how)
    return panel(["image", "label", *networks], rows, legend=dataset.classes, palette=dataset.palette)


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
    """Rows of image, label, both predictions, and RDD's maps; TFE's only if the teacher has an auxiliary head."""
    rows = _rows([teacher, student], samples, dataset, how)
    for row, (image, label) in zip(rows, samples, strict=True):
        t, *aux = _logits(teacher, image, how)
        s = _logits(student, image, how)[0]
        maps = [teacher_confidence(t, other, direction="main_aux") for other in aux]
        maps.append(difficulty_mask(s, t, label[None].to(s.device)))
        row += [heatmap(values[0]) for values in maps]
    titles = ["image", "label", "teacher", name, *(["TFE confidence"] if teacher.has_aux else []), "TSE mask"]
    return panel(titles, rows, legend=dataset.classes, palette=dataset.palette)


def _rows(
    networks: Sequence[SegmentationModel], samples: Samples, dataset: SegmentationSet, how: EvalConfig
) -> list[list[np.ndarray]]:
    rows = []
    for image, label in samples:
        height, width = image.shape[-2:]
        scores = [predict_scores(net, image[None].to(net.mean.device), (height, width), how) for net in networks]
        labels = [label, *(found.argmax(1)[0] for found in scores)]
        rows.append([image.permute(1, 2, 0).numpy(), *(colourise(x, dataset.palette) for x in labels)])
    return rows


def _logits(network: SegmentationModel, image: Tensor, how: EvalConfig) -> tuple[Tensor, ...]:
    """Main and, if there is an auxiliary head, auxiliary logits (1, K, H, W) of the whole image."""

    def heads(images: Tensor) -> Output:
        out = network(images)
        return out if out.aux is None else out._replace(logits=torch.cat((out.logits, out.aux), 1))

    height, width = image.shape[-2:]
    options: Any = {"input_size": how.size, "size_divisor": how.size_divisor, "align_corners": how.align_corners}
    logits = predict_logits(heads, image[None].to(network.mean.device), (height, width), **options)
    return logits.chunk(2 if network.has_aux else 1, 1)

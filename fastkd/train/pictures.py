"""Pictures of predictions and of the two maps of relative difficulty, on the same validation images."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.utils import draw_segmentation_masks

from fastkd import difficulty_mask, teacher_confidence
from fastkd.train.config import EvalConfig
from fastkd.train.evaluation import SegmentationSet, predict_scores
from fastkd.train.models import SegmentationModel

MAPS = (
    "Relative difficulty. TFE: how far the teacher's two heads agree (bright: fully). TSE: pixels that one of student and "
    "teacher finds hard and the other easy, here for {}."
)
IGNORE = 255
Samples = Sequence[tuple[Tensor, Tensor]]


def overlay(image: Any, label: Any, palette: Any, alpha: float = 0.55) -> np.ndarray:
    """The image (3, H, W) or (H, W, 3) with the coloured label (H, W) blended in where not ignored; uint8 (H, W, 3)."""
    image, label = torch.as_tensor(image).cpu(), torch.as_tensor(label).cpu()
    image = image.permute(2, 0, 1) if image.shape[0] != 3 else image
    if image.shape[1:] != label.shape:
        shapes = f"image {tuple(image.shape)} and label {tuple(label.shape)}"
        raise ValueError(f"{shapes} must have the same height and width")
    kinds = [kind for kind in label.unique().tolist() if kind != IGNORE]
    if bad := [kind for kind in kinds if not 0 <= kind < len(palette)]:
        raise ValueError(f"the label map holds {bad[0]}, the palette has {len(palette)} colours")
    if kinds:
        masks, colours = torch.stack([label == kind for kind in kinds]), [tuple(map(int, palette[k])) for k in kinds]
        image = draw_segmentation_masks(image, masks, alpha=alpha, colors=colours)  # type: ignore[arg-type]
    return image.permute(1, 2, 0).numpy()


def colourise(label: Any, palette: Any) -> np.ndarray:
    """A label map (H, W) as uint8 (H, W, 3); ignored pixels are black."""
    label = torch.as_tensor(label)
    return overlay(torch.zeros(3, *label.shape, dtype=torch.uint8), label, palette, alpha=1.0)


def heatmap(values: Tensor) -> np.ndarray:
    """A map (H, W) in [0, 1] (or bool) as uint8 (H, W, 3): uniform lightness from dark 0 to bright 1; NaN is grey."""
    from matplotlib import colormaps

    colours = colormaps["magma"].with_extremes(bad=(0.5, 0.5, 0.5))
    return colours(np.ma.masked_invalid(values.float().cpu().numpy()), bytes=True)[..., :3]


def panel(
    titles: Sequence[str], rows: Sequence[Sequence[Any]], *, legend: Sequence[str] = (), palette: Any = ()
) -> Image.Image:
    """A grid of pictures, (H, W, 3) or tensors (3, H, W), under `titles`, with a colour legend of the classes."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch

    if any(len(row) != len(titles) for row in rows):
        raise ValueError(f"every row needs {len(titles)} pictures, one a title")
    shown = [[x.permute(1, 2, 0).cpu().numpy() if isinstance(x, Tensor) else x for x in row] for row in rows]
    ratios = [max(x.shape[0] / x.shape[1] for x in row) for row in shown]
    lines = -(-len(legend) // (2 * len(titles)))
    size = 2.7 * len(titles), 2.65 * sum(ratios) + 0.35 + 0.2 * lines
    figure = Figure(size, dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0))
    grid = figure.subplots(len(rows), len(titles), squeeze=False, height_ratios=ratios)
    for axes, row in zip(grid, shown, strict=True):
        for place, picture in zip(axes, row, strict=True):
            place.imshow(picture)
            place.axis("off")
    for place, title in zip(grid[0], titles, strict=True):
        place.set_title(title if len(title) < 34 else title[:32] + "…", fontsize=10)
    if legend:
        colours: list[Any] = [tuple(int(c) / 255 for c in colour) for colour in palette]
        handles = [Patch(color=colour, label=name) for name, colour in zip(legend, colours, strict=False)]
        figure.legend(handles=handles, loc="outside lower center", ncols=2 * len(titles), fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    with Image.open(buffer) as picture:
        return picture.convert("RGB")


def sample(dataset: SegmentationSet, count: int) -> Samples:
    """`count` evenly spaced items, or all of them if there are fewer."""
    count = min(count, len(dataset))
    return [dataset[int((i + 0.5) * len(dataset) / count)] for i in range(count)]


def predictions(
    networks: Mapping[str, SegmentationModel], samples: Samples, dataset: SegmentationSet, how: EvalConfig
) -> Image.Image:
    """Rows of image, label and each network's prediction, by name, evaluated as `how`; networks are in eval mode."""
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
    """Rows of image, label, both predictions, and RDD's maps; TFE's only if the teacher has an auxiliary head."""
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
    height, width = image.shape[-2:]
    return colourise(
        predict_scores(network, image[None].to(network.mean.device), (height, width), how).argmax(1)[0], palette
    )


def _logits(network: SegmentationModel, image: Tensor, how: EvalConfig) -> tuple[Tensor, Tensor | None]:
    """Main and auxiliary logits (1, K, H, W) of the whole image, at its size or the one it is resized to."""
    batch = image[None].to(network.mean.device).float() / 255
    if how.size is not None:
        batch = F.interpolate(batch, tuple(how.size), mode="bilinear", antialias=True)
    height, width = batch.shape[-2:]
    batch = F.pad(batch, (0, -width % how.size_divisor, 0, -height % how.size_divisor), mode="replicate")
    out = network(batch)

    def cropped(x: Tensor) -> Tensor:
        x = F.interpolate(x.float(), batch.shape[-2:], mode="bilinear", align_corners=how.align_corners)
        return x[..., :height, :width].contiguous()

    return cropped(out.logits), None if out.aux is None else cropped(out.aux)

"""Pictures from tensors: coloured labels, overlays, heat maps, and a grid of them under titles."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import draw_segmentation_masks

IGNORE = 255


def overlay(image: Any, label: Any, palette: Any, alpha: float = 0.55) -> np.ndarray:
    """The coloured label (H, W) over the image (3, H, W) or (H, W, 3), uint8 (H, W, 3); ignored pixels show the image."""
    image, label = torch.as_tensor(image).cpu(), torch.as_tensor(label).cpu()
    image = image.permute(2, 0, 1) if image.shape[0] != 3 else image
    if image.shape[1:] != label.shape:
        raise ValueError(
            f"image {tuple(image.shape)} and label {tuple(label.shape)} must have the same height and width"
        )
    kinds = [kind for kind in label.unique().tolist() if kind != IGNORE]
    if kinds and not 0 <= kinds[0] <= kinds[-1] < len(palette):
        bad = kinds[0] if kinds[0] < 0 else kinds[-1]
        raise ValueError(f"the label map holds {bad}, the palette has {len(palette)} colours")
    if kinds:
        masks, colours = torch.stack([label == kind for kind in kinds]), [tuple(map(int, palette[k])) for k in kinds]
        image = draw_segmentation_masks(image, masks, alpha=alpha, colors=colours)  # type: ignore[arg-type]
    return image.permute(1, 2, 0).numpy()


def colourise(label: Any, palette: Any) -> np.ndarray:
    """A label map (H, W) as uint8 (H, W, 3); ignored pixels black."""
    label = torch.as_tensor(label)
    return overlay(torch.zeros(3, *label.shape, dtype=torch.uint8), label, palette, alpha=1.0)


def heatmap(values: Tensor) -> np.ndarray:
    """A map (H, W) of values in [0, 1] (or bool) as uint8 (H, W, 3): even steps of lightness, dark 0 to bright 1; NaN is grey."""
    from matplotlib import colormaps

    colours = colormaps["magma"].with_extremes(bad=(0.5, 0.5, 0.5))
    return colours(np.ma.masked_invalid(values.float().cpu().numpy()), bytes=True)[..., :3]


def panel(
    titles: Sequence[str], rows: Sequence[Sequence[Any]], *, legend: Sequence[str] = (), palette: Any = ()
) -> Image.Image:
    """A grid of pictures, (H, W, 3) or tensors (3, H, W), under `titles`, and class names with their colours."""
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

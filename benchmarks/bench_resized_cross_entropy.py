"""Cross-entropy at label resolution, forward and backward.

The floor is 2 exponentials a class and label pixel: one for the loss, one for a gradient made in a pass of its own. Making
the gradient in the forward can go below it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd

from .bench_nfd import acc
from .harness import DEVICE, Case, exponentials, main

SIZE = (512, 1024)


def labels(n: int, classes: int, size: tuple[int, int]) -> Tensor:
    """Random labels, a tenth of them ignored."""
    g = torch.Generator().manual_seed(1)
    target = torch.randint(0, classes, (n, *size), generator=g)
    target[torch.rand(n, *size, generator=g) < 0.1] = 255
    return target.to(DEVICE)


def upsample(x: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    return F.interpolate(x.to(acc(x)), size, mode="bilinear", align_corners=align_corners)


def case(shape: tuple[int, int, int, int], size: tuple[int, int], dtype: torch.dtype) -> Case:
    n, classes, _, _ = shape
    target = labels(n, classes, size)

    def ours(student: Tensor, teacher: Tensor) -> Tensor:
        return fastkd.resized_cross_entropy(student, target)

    def plain(student: Tensor, teacher: Tensor) -> Tensor:
        return F.cross_entropy(upsample(student, size), target, ignore_index=255)

    fp32 = DEVICE == "cpu" and dtype == torch.float32
    return Case(
        f"resized CE to {size[0]}×{size[1]}",
        shape,
        dtype,
        ours,
        plain,
        lambda s, t: {"exp": lambda: exponentials(n * classes * size[0] * size[1])},
        lambda t: 2 * t["exp"],
        {"eager": 12, "compile": 12, "floor": 2.5, "bytes": 8} if fp32 else {},
        label_pixels=n * size[0] * size[1],
    )


CASES = [
    case((2, 19, 64, 128), SIZE, torch.float32),
    case((2, 19, 64, 128), SIZE, torch.bfloat16),
    case((2, 150, 64, 64), (512, 512), torch.float32),
]

if __name__ == "__main__":
    main(CASES)

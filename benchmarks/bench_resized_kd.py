"""KD at label resolution, forward and backward.

The floor is 4 exponentials a class and label pixel: each side, once for the loss and once for a gradient made in a pass of
its own. Making the gradient in the forward can go below it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd

from .bench_resized_cross_entropy import upsample
from .harness import DEVICE, Case, exponentials, main


def case(shape: tuple[int, int, int, int], size: tuple[int, int], dtype: torch.dtype) -> Case:
    n, classes, _, _ = shape
    pixels = n * size[0] * size[1]

    def ours(student: Tensor, teacher: Tensor) -> Tensor:
        return fastkd.resized_kd_loss(student, teacher, size=size)

    def plain(student: Tensor, teacher: Tensor) -> Tensor:
        log_s = F.log_softmax(upsample(student, size), 1)
        return F.kl_div(log_s, F.softmax(upsample(teacher, size), 1), reduction="sum") / pixels

    fp32 = DEVICE == "cpu" and dtype == torch.float32
    return Case(
        f"resized KD to {size[0]}×{size[1]}",
        shape,
        dtype,
        ours,
        plain,
        lambda s, t: {"exp": lambda: exponentials(classes * pixels)},
        lambda t: 4 * t["exp"],
        {"eager": 12, "compile": 6, "floor": 2.5, "bytes": 8} if fp32 else {},
        label_pixels=pixels,
    )


CASES = [
    case((2, 19, 64, 128), (512, 1024), torch.float32),
    case((2, 19, 64, 128), (512, 1024), torch.bfloat16),
    case((2, 150, 64, 64), (512, 512), torch.float32),
]

if __name__ == "__main__":
    main(CASES)

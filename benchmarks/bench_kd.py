"""Pixel-wise KD, forward and backward.

The floor is that of a step which computes the gradient in a pass of its own: read S and T twice and write the gradient
(5 transfers), and 4 exponentials an element (each side, each way). A machine does both at once, so it is the larger of the
two times. Making the gradient in the forward can go below it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd

from .bench_nfd import acc
from .harness import DEVICE, Case, exp_pieces, main


def plain(student: Tensor, teacher: Tensor) -> Tensor:
    """As segmentation code bases write it: kl_div of a log-softmax and a softmax."""
    n, _, h, w = student.shape
    log_s = F.log_softmax(student.to(acc(student)), 1)
    p_t = F.softmax(teacher.to(acc(teacher)), 1)
    return F.kl_div(log_s, p_t, reduction="sum") / (n * h * w)


CASES = [
    Case(
        "KD",
        shape,
        dtype,
        fastkd.kd_loss,
        plain,
        exp_pieces,
        lambda t: max(t["add"] * 5 / 3, 4 * t.get("exp", 0)),
        {"eager": 8, "compile": 3.5, "floor": 2} if DEVICE == "cpu" and dtype == torch.float32 else {},
    )
    for shape in ((1, 19, 512, 1024), (2, 150, 128, 128))
    for dtype in (torch.float32, torch.bfloat16)
]

if __name__ == "__main__":
    main(CASES)

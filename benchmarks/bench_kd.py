"""Pixel-wise KD, forward and backward.

Floor: read S and T twice and write the gradient (5 transfers), and 4 exponentials an element (each side, each way). A
machine does both at once, so the floor is the larger of the two times.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd

from .bench_nfd import acc
from .harness import DEVICE, Case, exp_pieces, main


def plain(student: Tensor, teacher: Tensor) -> Tensor:
    n, _, h, w = student.shape
    log_s = F.log_softmax(student.to(acc(student)), 1)
    log_t = F.log_softmax(teacher.to(acc(teacher)), 1)
    return F.kl_div(log_s, log_t, reduction="sum", log_target=True) / (n * h * w)


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

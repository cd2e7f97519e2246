"""Channel-wise distillation, forward and backward. The floor is KD's: 5 transfers, 4 exponentials an element."""

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd

from .bench_nfd import acc
from .harness import DEVICE, Case, exp_pieces, main


def plain(student: Tensor, teacher: Tensor) -> Tensor:
    """As distillation code bases write it: the softmax of T times the difference of the log-softmaxes."""
    n, c, _, _ = student.shape
    s, t = student.to(acc(student)).flatten(2) / 4, teacher.to(acc(teacher)).flatten(2) / 4
    p_t = F.softmax(t, 2)
    return (p_t * F.log_softmax(t, 2) - p_t * F.log_softmax(s, 2)).sum() * (16 / (n * c))


CASES = [
    Case(
        "CWD",
        (2, 256, 64, 128),
        dtype,
        fastkd.cwd_loss,
        plain,
        exp_pieces,
        lambda t: max(t["add"] * 5 / 3, 4 * t.get("exp", 0)),
        {"eager": 5, "compile": 1.5} if DEVICE == "cpu" and dtype == torch.float32 else {},
    )
    for dtype in (torch.float32, torch.bfloat16)
]

if __name__ == "__main__":
    main(CASES)

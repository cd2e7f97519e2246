"""NFD, dims "hw", forward and backward. Floor: 5 tensor transfers at the bandwidth of `torch.add(S, T, out=G)` (3)."""

import torch
from torch import Tensor

import fastkd

from .harness import DEVICE, Case, copy_pieces, main


def plain(student: Tensor, teacher: Tensor) -> Tensor:
    def normalise(x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        var = x.var((2, 3), correction=0, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt()

    return torch.nn.functional.mse_loss(normalise(student.to(acc(student))), normalise(teacher.to(acc(teacher))))


def acc(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


CASES = [
    Case(
        "NFD",
        shape,
        dtype,
        fastkd.nfd_loss,
        plain,
        copy_pieces,
        lambda t: t["add"] * 5 / 3,
        {"eager": 10, "compile": 1.7, "floor": 1.6} if DEVICE == "cpu" and dtype == torch.float32 else {},
    )
    for shape in ((2, 256, 64, 128), (1, 512, 128, 256))
    for dtype in (torch.float32, torch.bfloat16)
]

if __name__ == "__main__":
    main(CASES)

"""The student in training: batch norms, moving average of the weights, unused parameters."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastkd.train.models import PROBE, SegmentationModel, Student


def set_batch_norm(student: Student, mode: str, *, processes: int, device: torch.device) -> Student:
    """Converts batch norms to statistics over all processes if `mode` is "sync"; ValueError on a CPU."""
    if mode != "sync" or processes == 1:
        return student
    if device.type == "cpu":
        raise ValueError(
            "train.batch_norm sync works on GPUs only; with several processes on a CPU set --train.batch_norm local or frozen"
        )
    from timm.layers import convert_sync_batchnorm  # torch's version drops the activation in timm's batch norms

    return convert_sync_batchnorm(student)


def train_mode(student: Student, batch_norm: str) -> None:
    """Training mode; with "frozen" the batch norms keep their statistics."""
    student.train()
    if batch_norm == "frozen":
        for module in student.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def freeze_unused(student: Student, *, aux: bool) -> None:
    """Freezes parameters that no loss reaches; processes would wait for their gradients forever.

    aux: whether a loss reads the auxiliary head.
    """
    student.eval()
    out = student(torch.zeros(PROBE, device=student.model.mean.device))
    read = [out.logits, *out.features.values(), *([out.aux] if aux and out.aux is not None else [])]
    parameters = [p for p in student.parameters() if p.requires_grad]
    grads = torch.autograd.grad([x.sum() for x in read], parameters, allow_unused=True)
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.requires_grad_(grad is not None)


class Average:
    """Exponential moving average of a network's weights and buffers; the first step copies them."""

    def __init__(self, network: SegmentationModel, decay: float):
        self._averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)

    @property
    def network(self) -> SegmentationModel:
        return cast(SegmentationModel, self._averaged.module)

    def update(self, network: SegmentationModel) -> None:
        self._averaged.update_parameters(network)

    @property
    def count(self) -> int:
        """Steps averaged so far."""
        return int(self._averaged.n_averaged)

    def restore(self, network: dict[str, Tensor], count: int) -> None:
        self._averaged.module.load_state_dict(network)
        self._averaged.n_averaged.fill_(count)

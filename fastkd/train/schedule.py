"""Optimiser and learning rate. The rate depends only on the step, so resuming needs no scheduler state."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fastkd.train.config import OptimConfig


def build_schedule(optimizer: torch.optim.Optimizer, optim: OptimConfig, steps: int, *, done: int = 0) -> LambdaLR:
    """The learning-rate schedule of a run of `steps`, from step `done` on."""
    for group in optimizer.param_groups:
        group["initial_lr"] = optim.lr
    return LambdaLR(optimizer, partial(_factor, optim, steps), last_epoch=done - 1)


def _factor(optim: OptimConfig, steps: int, step: int) -> float:
    """The rate of step `step` (from 0) divided by `optim.lr`."""
    if step < optim.warmup:
        return (step + 1) / optim.warmup
    done = min(step / steps, 1.0)
    factor = (1 - done) ** optim.power if optim.schedule == "poly" else 0.5 * (1 + math.cos(math.pi * done))
    return max(factor, optim.min_lr / optim.lr)


def build_optimizer(optim: OptimConfig, student: nn.Module) -> torch.optim.Optimizer:
    if optim.name == "sgd":
        return torch.optim.SGD(
            student.parameters(), lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay
        )
    return torch.optim.AdamW(student.parameters(), lr=optim.lr, weight_decay=optim.weight_decay)

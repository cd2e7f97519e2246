"""Optimiser and learning rate: the rate is a function of the step alone, so a resumed run needs no state of a scheduler."""

from __future__ import annotations

import math

import torch
from torch import nn

from fastkd.train.config import OptimConfig


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Rate of optimiser step `step` (from 0) of a run of `steps`."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    done = step / steps
    factor = (1 - done) ** optim.power if optim.schedule == "poly" else 0.5 * (1 + math.cos(math.pi * done))
    return max(optim.lr * factor, optim.min_lr)


def build_optimizer(optim: OptimConfig, student: nn.Module) -> torch.optim.Optimizer:
    if optim.name == "sgd":
        return torch.optim.SGD(
            student.parameters(), lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay
        )
    return torch.optim.AdamW(student.parameters(), lr=optim.lr, weight_decay=optim.weight_decay)

"""Learning rates computed by hand."""

import math

import pytest
import torch

pytest.importorskip("accelerate")

from fastkd.train.config import OptimConfig
from fastkd.train.schedule import build_optimizer, build_schedule


def learning_rate(optim, step, steps):
    """Learning rate of a run resumed at this step; a run from the start must give the same."""
    optimizer = build_optimizer(optim, torch.nn.Linear(1, 1))
    schedule = build_schedule(optimizer, optim, steps)
    for _ in range(step):
        optimizer.step()
        schedule.step()
    resumed = build_optimizer(optim, torch.nn.Linear(1, 1))
    assert build_schedule(resumed, optim, steps, done=step).get_last_lr() == schedule.get_last_lr()
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    return optimizer.param_groups[0]["lr"]


def test_poly():
    optim = OptimConfig(lr=0.1, power=0.9, warmup=10)
    assert learning_rate(optim, 0, 100) == pytest.approx(0.01)
    assert learning_rate(optim, 9, 100) == pytest.approx(0.1)
    assert learning_rate(optim, 50, 100) == pytest.approx(0.1 * 0.5**0.9)
    assert learning_rate(OptimConfig(lr=0.1), 0, 100) == 0.1


def test_cosine():
    optim = OptimConfig(lr=0.2, schedule="cosine", min_lr=0.01)
    assert learning_rate(optim, 0, 100) == pytest.approx(0.2)
    assert learning_rate(optim, 50, 100) == pytest.approx(0.1)
    assert learning_rate(optim, 25, 100) == pytest.approx(0.1 * (1 + math.sqrt(0.5)))
    assert learning_rate(optim, 99, 100) == 0.01

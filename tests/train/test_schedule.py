"""Learning rates worked out by hand."""

import math

import pytest

pytest.importorskip("accelerate")

from fastkd.train.config import OptimConfig
from fastkd.train.schedule import learning_rate


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

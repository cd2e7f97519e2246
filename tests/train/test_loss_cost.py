"""Cost of the losses, measured with the kernels and in plain PyTorch; it never ends a run."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")

from fastkd import backends
from fastkd.train import loss_cost
from fastkd.train.config import LossConfig
from fastkd.train.methods import Objective
from fastkd.train.models import Output

CPU = torch.device("cpu")
LABELS = (2, 256, 256)
CLASSES = 40

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)


class Network:
    has_aux, feature_names, classes = True, (), CLASSES


@pytest.fixture
def objective():
    return Objective("rdd", LossConfig(), total_steps=10, student=Network(), teacher=Network())


@pytest.fixture
def shapes():
    def logits(dtype):
        return torch.empty(2, CLASSES, 32, 32, dtype=dtype)

    student = Output(logits(torch.bfloat16), {}, logits(torch.bfloat16))
    teacher = Output(logits(torch.float32), {}, logits(torch.float32))
    return loss_cost.shapes_of(student, teacher, torch.zeros(LABELS, dtype=torch.uint8))


@pytest.mark.skipif(backends.why_not("cpu") is not None, reason=str(backends.why_not("cpu")))
def test_kernels_and_plain_pytorch(objective, shapes):
    cost = loss_cost.loss_cost(objective, shapes, step=9, device=CPU)
    assert cost["note"] is None
    assert cost["backends"] == ["cpu"]
    copy = 4 * CLASSES * LABELS[0] * LABELS[1] * LABELS[2]  # the logits at label size, which plain PyTorch materialises
    assert cost["eager"]["bytes"] > 2 * copy
    assert cost["ours"]["bytes"] < copy / 4
    assert cost["ours"]["images"] == cost["eager"]["images"] == 2
    assert cost["ours"]["seconds"] > 0


def test_a_long_call_is_scaled_from_one_image(objective, shapes, monkeypatch):
    whole = loss_cost.loss_cost(objective, shapes, step=9, device=CPU)["eager"]["bytes"]
    monkeypatch.setattr(loss_cost, "SECONDS", 0.0)
    scaled = loss_cost.loss_cost(objective, shapes, step=9, device=CPU)["eager"]
    assert scaled["images"] == 1
    # Resident memory: memory that the process kept from earlier work hides the same amount of new memory.
    assert whole / 6 < scaled["bytes"] < 6 * whole, (scaled["bytes"], whole)


def test_too_little_memory_is_said(objective, shapes, monkeypatch):
    monkeypatch.setattr(loss_cost, "_free", lambda device: 2**20)
    cost = loss_cost.loss_cost(objective, shapes, step=9, device=CPU)
    assert cost["eager"] is None
    assert "needs about 0.1 GiB an image" in cost["note"]


def test_a_failure_is_a_note(objective, shapes):
    cost = loss_cost.loss_cost(objective, shapes._replace(teacher=None), step=9, device=CPU)
    assert cost["ours"] is None
    assert cost["note"].startswith("not measured: ")

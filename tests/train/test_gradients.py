"""The backward pass in two parts, and statistics of the losses' gradients."""

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("segmentation_models_pytorch")

from fastkd.train import engine
from fastkd.train.gradients import cut, gradient_statistics, send_back
from fastkd.train.loader import train_loader
from fastkd.train.models import Output
from tests.train import tiny


def test_split_backward_is_the_ordinary_one(teacher, tmp_path):
    config = tiny.config(tmp_path, method="kd+nfd", teacher=teacher)
    images, labels = next(iter(train_loader(tiny.DATASETS[0], batch_size=4, steps=range(1), seed=0)))
    grads = []
    for split in (True, False):
        work = engine.Run(config, show=False, datasets=tiny.DATASETS)
        torch.manual_seed(0)
        out = work.student(images)
        target = engine.teacher_forward(work.teacher, images)
        if split:
            leaves, pairs = cut(out)
            work.objective(leaves, target, labels, 0).total.backward()
            send_back(pairs)
        else:
            work.objective(out, target, labels, 0).total.backward()
        grads.append({name: p.grad for name, p in work.student.named_parameters()})
    assert any("adapters" in name for name in grads[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_statistics_by_hand(dtype):
    leaves, _ = cut(
        Output(
            torch.zeros(1, 2, 1, 1, dtype=dtype), {"f": torch.zeros(1, 1, 1, 2, dtype=dtype)}, torch.zeros(1, 2, 1, 1)
        )
    )
    s = leaves.logits.flatten()
    pixel = 2.0**-10  # losses are means
    tiny_number = 2.0**-26  # below the smallest fp16 number
    parts = {
        "task": (3 * s[0].float() + 4 * leaves.aux.flatten()[0]) * pixel,
        "kd": s[1].float() * 2 * pixel,
        "cwd": s[0].float() * 2 * pixel,
        "nfd": leaves.features["f"].float().sum() * pixel,
        "small": s[0].float() * tiny_number,
        "constant": torch.ones(()),
    }
    found = gradient_statistics(parts, leaves, frozenset({"task"}))
    expected = {"task": 5 * pixel, "kd": 2 * pixel, "cwd": 2 * pixel, "nfd": 2**0.5 * pixel, "small": tiny_number}
    assert found.keys() == {f"grad/{name}" for name in expected} | {"grad_cosine"}
    for name, value in expected.items():
        assert found[f"grad/{name}"].item() == pytest.approx(value, rel=1e-3)
    assert found["grad_cosine"].item() == pytest.approx(0.5**0.5, rel=1e-3)
    assert all(leaf.grad is None for leaf in (leaves.logits, leaves.aux, leaves.features["f"]))
    assert "grad_cosine" not in gradient_statistics(
        {"task": parts["task"], "nfd": parts["nfd"]}, leaves, frozenset({"task"})
    )

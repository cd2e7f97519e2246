"""Two processes (gloo, on the CPU) train like one process with the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("segmentation_models_pytorch")

from fastkd.train import checkpoint
from fastkd.train.config import EvalConfig
from fastkd.train.evaluation import evaluate
from tests.train import child, tiny
from tests.train.tiny import lines

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.parametrize("kind", [pytest.param("shared", marks=pytest.mark.slow), "few"])  # few: with unlabelled images
def test_two_processes_train_as_one(kind, teacher, tmp_path, quick):
    """Each accumulates two parts with different numbers of valid pixels; the evaluation has an odd number of images."""
    one, two = tmp_path / "one", tmp_path / "two"
    tiny.run(child.shared(one, teacher, few=kind == "few"))
    done = subprocess.run(
        [*LAUNCH, "-m", "tests.train.child", kind, str(two), teacher],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for left, right in zip(lines(one, "train"), lines(two, "train"), strict=True):
        assert right["step"] == left["step"]
        for name in ("loss", "loss/task", "loss/kd", "loss/nfd"):
            assert right[name] == pytest.approx(left[name], rel=2e-5), name
    states = [checkpoint.load(out / "last.pt") for out in (one, two)]
    for part in ("model", "adapters"):
        for name, value in states[0][part].items():
            torch.testing.assert_close(states[1][part][name], value, rtol=1e-3, atol=1e-5, msg=name)

    assert states[1]["step"] == 3
    network, _ = checkpoint.load_network(two / "last.pt")
    alone = evaluate(network, tiny.DATASETS[1], EvalConfig(batch_size=1, limit=3), device=torch.device("cpu"))
    together = lines(two, "val")[-1]
    assert together["miou"] == pytest.approx(alone.miou, rel=1e-5)
    assert together["pixel_accuracy"] == pytest.approx(alone.pixel_accuracy, rel=1e-5)

"""A resumed run is bitwise equal to an uninterrupted one."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("segmentation_models_pytorch")

from fastkd.train import checkpoint, engine
from fastkd.train.checkpoint import LAST, PREVIOUS, CheckpointError
from fastkd.train.config import OptimConfig
from tests.train import child, tiny
from tests.train.tiny import lines, run

pytestmark = pytest.mark.usefixtures("quick")


def assert_same_run(left, right):
    a, b = (checkpoint.load(out / LAST) for out in (left, right))
    for part in ("model", "student", "adapters"):
        for name, value in (a[part] or {}).items():
            assert torch.equal(value, b[part][name]), f"{part} {name}"
    assert [x["loss"] for x in lines(left, "train")] == [x["loss"] for x in lines(right, "train")]
    assert [x["step"] for x in lines(right, "train")] == list(range(1, a["step"] + 1))
    assert [x["miou"] for x in lines(left, "val")] == [x["miou"] for x in lines(right, "val")]


def interrupted(config, monkeypatch, *, at):
    """The run up to step `at`."""
    step = engine.Run._step

    def stops(self, *args, **options):
        if self.step == at:
            raise KeyboardInterrupt
        return step(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(engine.Run, "_step", stops)
        with pytest.raises(KeyboardInterrupt):
            run(config)


@pytest.mark.parametrize(
    ("workers", "options"),
    [(0, {"ema": 0.9}), (1, {"accumulate": 2}), (0, {"precision": "bf16", "batch_norm": "frozen"})],
)
def test_resume_is_bitwise_the_uninterrupted_run(workers, options, teacher, tmp_path, monkeypatch):
    def config(name):
        c = tiny.config(
            tmp_path / name, method="nfd+rdd", teacher=teacher, aux=True, train={"steps": 5, "panels": 0} | options,
            optim=OptimConfig(name="sgd", lr=0.01, clip=1.0),
        )  # fmt: skip
        c.data.workers = workers
        return c

    run(config("whole"))
    interrupted(config("parts"), monkeypatch, at=3)  # after the checkpoint of step 2
    assert checkpoint.load(tmp_path / "parts" / LAST)["step"] == 2
    assert len(lines(tmp_path / "parts", "train")) == 3
    torch.rand(3)  # another state of the random number generator
    run(config("parts"), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_killed_runs_go_on(teacher, tmp_path):
    """SIGKILL, twice, at arbitrary moments."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(child.killed(whole, teacher))
    root = Path(__file__).parents[2]
    for steps in (2, 6):
        process = subprocess.Popen([sys.executable, "-m", "tests.train.child", "killed", parts, teacher], cwd=root)
        while not (parts / "log.jsonl").exists() or (parts / "log.jsonl").read_text().count('"train"') < steps:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
        process.kill()
        process.wait()
    assert 1 <= checkpoint.load_last(parts)[0]["step"] < child.STEPS
    run(child.killed(parts, teacher), resume=True)
    assert_same_run(whole, parts)


def test_a_cut_checkpoint_costs_one_interval(tmp_path):
    def config(name):
        return tiny.config(tmp_path / name, train={"steps": 6, "panels": 0})

    run(config("whole"))
    run(config("parts"))
    last = tmp_path / "parts" / LAST
    last.write_bytes(last.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match=rf"cannot read .*{LAST}.*Going on from .*{PREVIOUS}, step 4"):
        run(config("parts"), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert checkpoint.load(tmp_path / "parts" / PREVIOUS)["step"] == 4  # not the damaged one


def test_a_full_disk_ends_the_run_and_costs_one_interval(tmp_path, monkeypatch):
    def config(name):
        return tiny.config(tmp_path / name, train={"steps": 6, "panels": 0})

    run(config("whole"))
    written = []
    save = checkpoint.save

    def full(state, path, **options):
        def writer(values, target):
            target.write_bytes(b"half")
            raise OSError(28, "No space left on device")

        written.append(path.name)
        save(state, path, **options, **({"writer": writer} if written.count(LAST) == 2 else {}))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        with pytest.raises(CheckpointError, match=r"cannot write .*last\.pt.*make room and go on with --resume"):
            run(config("parts"))
    assert checkpoint.load(tmp_path / "parts" / LAST)["step"] == 2
    run(config("parts"), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_full_disk_under_the_log(tmp_path, monkeypatch):
    def full(self, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(engine.RunLog, "write", full)
    with pytest.raises(OSError, match=rf"No space left on device while writing to {tmp_path}.*go on with --resume"):
        run(tiny.config(tmp_path))


def test_a_finished_run_resumes_to_its_result(tmp_path):
    first = run(tiny.config(tmp_path))
    again = run(tiny.config(tmp_path), resume=True)
    assert again["miou"] == first["miou"]
    assert again["steps"] == first["steps"]


def test_resuming_another_configuration_names_the_difference(tmp_path):
    run(tiny.config(tmp_path))
    with pytest.raises(CheckpointError, match=r"optim\.lr, seed differ"):
        run(tiny.config(tmp_path, seed=3, optim=OptimConfig(lr=0.5)), resume=True)
    run(tiny.config(tmp_path, name="renamed", train={"log_every": 2, "checkpoint_every": 1}), resume=True)


def test_resuming_with_another_teacher(teacher, tmp_path):
    path = tmp_path / "teacher.pt"
    state = checkpoint.load(teacher)
    checkpoint.save(state, path)
    config = tiny.config(tmp_path / "student", method="kd", teacher=str(path))
    run(config)
    path.rename(tmp_path / "moved.pt")
    config.teacher = str(tmp_path / "moved.pt")
    run(config, resume=True)  # the same run in another folder
    state["model"]["aux_head.0.weight"] += 1
    checkpoint.save(state, tmp_path / "moved.pt")
    with pytest.raises(CheckpointError, match="another teacher"):
        run(config, resume=True)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "cut", "foreign"])
def test_unreadable_checkpoints_are_named(content, teacher, tmp_path):
    path = tmp_path / LAST
    if content == "cut":
        data = Path(teacher).read_bytes()
        path.write_bytes(data[: len(data) // 2])
    elif content == "foreign":
        torch.save({"weight": torch.ones(1)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=str(path)):
        run(tiny.config(tmp_path), resume=True)
    with pytest.raises(CheckpointError, match=str(path)):
        run(tiny.config(tmp_path / "student", method="kd", teacher=str(path)))

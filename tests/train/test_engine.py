"""Runs of a few steps: every method, resuming, checkpoints, logs, and what goes wrong."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("segmentation_models_pytorch")

from fastkd.train import checkpoint, engine
from fastkd.train.config import OptimConfig
from fastkd.train.loader import StepSampler, train_loader
from tests.train import tiny


def run(config, **options):
    return engine.train(config, show=False, datasets=tiny.DATASETS, **options)


def lines(out, split):
    return [line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if line["split"] == split]


def model_state(path):
    return checkpoint.load(path)["model"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    run(tiny.config(out, aux=True, width=64))
    return str(out / "last.pt")


TERMS = {
    "none": {"task"},
    "kd": {"task", "kd"},
    "nfd": {"task", "nfd"},
    "cwd": {"task", "cwd"},
    "rdd": {"rdd_task", "rdd_kd"},
    "kd+nfd+cwd": {"task", "kd", "nfd", "cwd"},
    "nfd+rdd": {"rdd_task", "rdd_kd", "nfd"},
}


@pytest.mark.parametrize("method", TERMS)
def test_every_method_trains(method, teacher, tmp_path):
    config = tiny.config(tmp_path, method=method, teacher=teacher)
    config.loss.rdd.tfe_steps = 1
    config.loss.cwd.on = "features" if method == "cwd" else "logits"
    config.loss.kd.resized = method == "kd"
    result = run(config)
    train = lines(tmp_path, "train")
    assert [line["step"] for line in train] == [1, 2]
    for line in train:
        terms = {key.removeprefix("loss/"): value for key, value in line.items() if key.startswith("loss/")}
        assert set(terms) == TERMS[method]
        assert line["loss"] == pytest.approx(sum(terms.values()), rel=1e-4)
        assert 0 <= line["loss_s"] <= line["step_s"]
        assert line["lr"] > 0
    assert result["method"] == method
    assert 0 < result["loss_share"] < 1
    assert list(result) == [
        "name", "method", "model", "params", "steps", "miou", "pixel_accuracy", "class_iou", "seconds_per_step", "loss_share",
        "losses", "seconds", "seed", "versions",
    ]  # fmt: skip
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result))
    assert lines(tmp_path, "val")[-1]["miou"] == pytest.approx(result["miou"], rel=1e-4)


def test_training_learns(tmp_path):
    config = tiny.config(tmp_path, train={"steps": 30}, optim=OptimConfig(name="adamw", lr=0.01))
    result = run(config)
    losses = [line["loss"] for line in lines(tmp_path, "train")]
    assert sum(losses[-5:]) / 5 < 0.4 * losses[0]  # the first is that of a network that knows nothing, log 3
    assert result["pixel_accuracy"] > 0.6


def test_auxiliary_head_of_the_student(teacher, tmp_path):
    for method, terms in (("none", {"loss/task", "loss/aux"}), ("rdd", {"loss/rdd_task", "loss/rdd_kd"})):
        run(tiny.config(tmp_path, aux=True, method=method, teacher=teacher), overwrite=True)
        assert {key for key in lines(tmp_path, "train")[0] if key.startswith("loss/")} == terms


def test_split_backward_is_the_ordinary_one(teacher, tmp_path):
    config = tiny.config(tmp_path, method="kd+nfd", teacher=teacher)
    images, labels = next(iter(train_loader(tiny.DATASETS[0], batch_size=4, steps=range(1), seed=0)))
    grads = []
    for cut in (True, False):
        work = engine.Run(config, show=False, datasets=tiny.DATASETS)
        torch.manual_seed(0)
        out = work.student(images)
        target = engine.teacher_forward(work.teacher, images)
        if cut:
            leaves, pairs = engine.cut(out)
            work.objective(leaves, target, labels, 0).total.backward()
            engine.send_back(pairs)
        else:
            work.objective(out, target, labels, 0).total.backward()
        grads.append({name: p.grad for name, p in work.student.named_parameters()})
    assert any("adapters" in name for name in grads[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("workers", [0, 1])
def test_resume_is_bitwise_the_uninterrupted_run(workers, teacher, tmp_path, monkeypatch):
    def config(name):
        c = tiny.config(
            tmp_path / name, method="nfd+rdd", teacher=teacher, aux=True, train={"steps": 5},
            optim=OptimConfig(name="sgd", lr=0.01, clip=1.0),
        )  # fmt: skip
        c.data.workers = workers
        return c

    run(config("whole"))
    step = engine.Run._step

    def interrupted(self, *args):
        if self.step == 3:  # after the checkpoint of step 2
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(engine.Run, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(config("parts"))
    assert checkpoint.load(tmp_path / "parts" / "last.pt")["step"] == 2
    torch.rand(3)  # another place in the random stream
    run(config("parts"), resume=True)

    whole, parts = (checkpoint.load(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    for part in ("model", "adapters"):
        for name, value in whole[part].items():
            assert torch.equal(value, parts[part][name]), f"{part} {name}"
    assert [x["step"] for x in lines(tmp_path / "parts", "train")] == [1, 2, 3, 4, 5]
    assert [x["loss"] for x in lines(tmp_path / "whole", "train")] == [
        x["loss"] for x in lines(tmp_path / "parts", "train")
    ]


def test_runs_of_one_seed_begin_with_one_student(teacher, tmp_path):
    states = []
    for method in ("none", "nfd"):
        work = engine.Run(tiny.config(tmp_path, method=method, teacher=teacher), show=False, datasets=tiny.DATASETS)
        states.append(work.network.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_finished_run_resumes_to_its_result(tmp_path):
    first = run(tiny.config(tmp_path))
    again = run(tiny.config(tmp_path), resume=True)
    assert again["miou"] == first["miou"]
    assert again["steps"] == first["steps"]


def test_an_old_run_is_not_overwritten_silently(tmp_path):
    run(tiny.config(tmp_path))
    with pytest.raises(FileExistsError, match=r"--resume.*--overwrite"):
        run(tiny.config(tmp_path))
    run(tiny.config(tmp_path, seed=1), overwrite=True)
    assert [x["step"] for x in lines(tmp_path, "train")] == [1, 2]


def test_resuming_another_configuration_names_the_difference(tmp_path):
    run(tiny.config(tmp_path))
    with pytest.raises(checkpoint.CheckpointError, match=r"optim\.lr, seed differ"):
        run(tiny.config(tmp_path, seed=3, optim=OptimConfig(lr=0.5)), resume=True)


def test_resuming_with_another_teacher(teacher, tmp_path):
    path = tmp_path / "teacher.pt"
    state = checkpoint.load(teacher)
    checkpoint.save(state, path)
    config = tiny.config(tmp_path / "student", method="kd", teacher=str(path))
    run(config)
    state["model"]["aux_head.0.weight"] += 1
    checkpoint.save(state, path)
    with pytest.raises(checkpoint.CheckpointError, match="another teacher"):
        run(config, resume=True)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "cut", "foreign"])
def test_unreadable_checkpoints_are_named(content, teacher, tmp_path):
    path = tmp_path / "last.pt"
    if content == "cut":
        data = Path(teacher).read_bytes()
        path.write_bytes(data[: len(data) // 2])
    elif content == "foreign":
        torch.save({"weight": torch.ones(1)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match=str(path)):
        run(tiny.config(tmp_path), resume=True)
    with pytest.raises(checkpoint.CheckpointError, match=str(path)):
        run(tiny.config(tmp_path / "student", method="kd", teacher=str(path)))


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save({"model": {}, "step": 1}, path)

    def fails(state, target):
        target.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.save({"model": {}, "step": 2}, path, fails)
    assert checkpoint.load(path)["step"] == 1


def test_a_teacher_of_other_classes(teacher, tmp_path):
    class Other(tiny.Patches):
        classes = ("a", "b", "c")

    with pytest.raises(ValueError, match=r"trained on the classes \['ground', 'red', 'blue'\]"):
        engine.train(tiny.config(tmp_path, method="kd", teacher=teacher), show=False, datasets=(Other(), Other()))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match=r"lower --optim\.lr"):
        run(tiny.config(tmp_path, optim=OptimConfig(lr=1e30), train={"steps": 6}))


def test_learning_rate():
    config = tiny.config("x", train={"steps": 100}, optim=OptimConfig(lr=0.1, power=0.9, warmup=10))
    assert engine.learning_rate(config, 0) == pytest.approx(0.01)
    assert engine.learning_rate(config, 50) == pytest.approx(0.1 * 0.5**0.9)
    assert engine.learning_rate(dataclasses.replace(config, optim=OptimConfig(lr=0.1)), 0) == 0.1


def test_samples_depend_on_seed_and_step_alone():
    whole = list(StepSampler(10, 4, range(6), 0, 0, 1))
    assert list(StepSampler(10, 4, range(3, 6), 0, 0, 1)) == whole[3:]
    shares = [list(StepSampler(10, 4, range(6), 0, rank, 2)) for rank in range(2)]
    assert [a + b for a, b in zip(*shares, strict=True)] == whole
    flat = [index for batch in whole for index, _ in batch]
    assert sorted(flat[:10]) == list(range(10))
    assert flat[:10] != flat[10:20]
    with pytest.raises(ValueError, match="cannot be shared"):
        StepSampler(10, 4, range(6), 0, 0, 3)

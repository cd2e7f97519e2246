"""Runs of a few steps: every method, the steps, the files of a run, errors."""

import json

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")
pytest.importorskip("segmentation_models_pytorch")

from accelerate.optimizer import AcceleratedOptimizer
from PIL import Image

from fastkd.train import checkpoint, engine
from fastkd.train.config import EvalConfig, ModelConfig, OptimConfig
from fastkd.train.student import freeze_unused, set_batch_norm, train_mode
from tests.train import tiny
from tests.train.tiny import lines, run

TERMS = {
    "none": {"task"},
    "kd": {"task", "kd"},
    "nfd": {"task", "nfd"},
    "cwd": {"task", "cwd"},
    "rdd": {"rdd_task", "rdd_kd"},
    "kd+nfd+cwd": {"task", "kd", "nfd", "cwd"},
    "nfd+rdd": {"rdd_task", "rdd_kd", "nfd"},
}


def named(line, prefix):
    return {key.removeprefix(prefix): value for key, value in line.items() if key.startswith(prefix)}


def built(config):
    work = engine.Run(config, show=False, datasets=tiny.DATASETS)
    work.schedule = engine.build_schedule(work.optimizer.optimizer, config.optim, config.train.steps)
    return work


@pytest.mark.parametrize("method", TERMS)
def test_every_method_trains(method, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(engine.Run, "_report", lambda self: None)
    config = tiny.config(tmp_path, method=method, teacher=teacher)
    config.loss.rdd.tfe_steps = 1
    config.loss.cwd.compare = "features" if method == "cwd" else "logits"
    config.loss.kd.resized = method == "kd"
    result = run(config)
    train = lines(tmp_path, "train")
    assert [line["step"] for line in train] == [1, 2]
    for line in train:
        losses = named(line, "loss/")
        assert set(losses) == set(named(line, "grad/")) == set(named(line, "weight/")) == TERMS[method]
        assert line["loss"] == pytest.approx(sum(losses.values()), rel=1e-4)
        assert all(norm > 0 for norm in named(line, "grad/").values())
        at_logits = TERMS[method] - {"nfd"} - ({"cwd"} if method == "cwd" else set())
        assert ("grad_cosine" in line) == (len(at_logits) > 1)
        assert abs(line.get("grad_cosine", 0)) <= 1
        assert 0 <= line["loss_s"] <= line["step_s"]
        assert line["lr"] > 0
    if "nfd" in TERMS[method]:
        assert train[0]["weight/nfd"] == 5.0
    assert result["method"] == method
    assert 0 < result["loss_share"] < 1
    assert list(result) == [
        "name", "method", "model", "params", "steps", "images", "miou", "pixel_accuracy", "class_iou", "seconds_per_step",
        "loss_share",
        "losses", "seconds", "seed", "processes", "versions",
    ]  # fmt: skip
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result))
    assert lines(tmp_path, "val")[-1]["miou"] == pytest.approx(result["miou"], rel=1e-4)


def test_training_learns(tmp_path, quick):
    config = tiny.config(tmp_path, train={"steps": 30, "checkpoint_every": 30}, optim=OptimConfig("adamw", lr=0.01))
    result = run(config)
    losses = [line["loss"] for line in lines(tmp_path, "train")]
    assert sum(losses[-5:]) / 5 < 0.4 * losses[0]  # the first is that of an untrained network, log 3
    assert result["pixel_accuracy"] > 0.6


def test_auxiliary_head_of_the_student(teacher, tmp_path, quick):
    for method, terms in (("none", {"task", "aux"}), ("rdd", {"rdd_task", "rdd_kd"})):
        run(tiny.config(tmp_path, aux=True, method=method, teacher=teacher), overwrite=True)
        line = lines(tmp_path, "train")[0]
        assert set(named(line, "loss/")) == terms
    assert "weight/aux" not in line


def test_runs_of_one_seed_begin_with_one_student(teacher, tmp_path):
    states = [
        built(tiny.config(tmp_path, method=method, teacher=teacher)).network.state_dict() for method in ("none", "nfd")
    ]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_an_old_run_is_not_overwritten_silently(tmp_path, quick):
    run(tiny.config(tmp_path))
    with pytest.raises(FileExistsError, match=r"--resume.*--overwrite"):
        run(tiny.config(tmp_path))
    run(tiny.config(tmp_path, seed=1), overwrite=True)
    assert [x["step"] for x in lines(tmp_path, "train")] == [1, 2]
    assert not (tmp_path / checkpoint.PREVIOUS).exists()


# Steps


def exact(**changes):
    """Options with which an accumulated batch equals the whole one: no dropout, no batch statistics."""
    train = {"batch_norm": "frozen", "panels": 0} | changes.pop("train", {})
    return {"options": {"decoder_dropout": 0.0}, "train": train} | changes


def test_parts_of_a_batch_give_what_the_whole_gives(teacher, tmp_path, quick):
    """The parts have different numbers of valid pixels."""
    for parts in (1, 4):
        train = {"accumulate": parts, "steps": 3}
        run(tiny.config(tmp_path / str(parts), method="kd+nfd", teacher=teacher, aux=True, **exact(train=train)))
    whole, parts = (lines(tmp_path / name, "train") for name in ("1", "4"))
    for left, right in zip(whole, parts, strict=True):
        for name in ("loss", "loss/task", "loss/aux", "loss/kd", "loss/nfd"):
            assert right[name] == pytest.approx(left[name], rel=2e-5)
    states = [checkpoint.load(tmp_path / name / "last.pt")["model"] for name in ("1", "4")]
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-3, atol=1e-5)


def test_every_method_takes_a_batch_in_parts(teacher, tmp_path, quick):
    """Only CIRKD differs: it compares the pixels of images within a part."""
    for parts in (1, 2):
        method = "at+fitnet+skd+ifvd+dsd+cirkd"
        config = tiny.config(
            tmp_path / str(parts), method=method, teacher=teacher, **exact(train={"accumulate": parts})
        )
        config.loss.dsd.weight = 0.0  # its other term needs two taps
        run(config)
    whole, parts = (lines(tmp_path / name, "train")[0] for name in ("1", "2"))
    for name, value in named(whole, "loss/").items():
        assert parts["loss/" + name] == pytest.approx(value, rel=0.2 if name == "cirkd" else 2e-5)


def test_parts_must_divide_the_batch(tmp_path):
    with pytest.raises(ValueError, match=r"batch_size 4 .* train\.accumulate 3; take a multiple of 3"):
        run(tiny.config(tmp_path, train={"accumulate": 3}))


def test_moving_average_is_what_is_scored_and_saved(tmp_path, quick, monkeypatch):
    students = []
    real = engine.Average.update
    monkeypatch.setattr(
        engine.Average,
        "update",
        lambda self, model: (students.append({k: v.clone() for k, v in model.state_dict().items()}), real(self, model)),
    )
    scored = []
    monkeypatch.setattr(engine, "evaluate", lambda model, *a, **k: scored.append(model) or engine.Scores(0.5, 0.5, {}))
    run(tiny.config(tmp_path, train={"ema": 0.9, "steps": 3}))
    expected = {name: students[0][name].double() for name in students[0]}
    for student in students[1:]:
        expected = {name: 0.9 * value + 0.1 * student[name].double() for name, value in expected.items()}
    last, best = (checkpoint.load(tmp_path / name) for name in ("last.pt", "best.pt"))
    for name, value in last["model"].items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7)
        assert torch.equal(last["student"][name], students[-1][name])
        assert torch.equal(best["model"][name], value)
        assert torch.equal(scored[0].state_dict()[name], value)


def test_frozen_batch_norm_keeps_its_statistics(tmp_path, quick):
    def statistics(state):
        return {name: value for name, value in state.items() if "running" in name}

    config = tiny.config(tmp_path, train={"batch_norm": "frozen"}, eval=EvalConfig(every=1, batch_size=2))
    before = statistics(built(config).network.state_dict())
    run(config)
    after = statistics(checkpoint.load(tmp_path / "last.pt")["model"])
    assert len(after) > 10
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_synchronised_batch_norm_keeps_the_network(tmp_path):
    """timm's batch norms include their activation, which torch's own conversion drops."""
    work = built(tiny.config(tmp_path, aux=True))
    images = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)
    train_mode(work.student, "local")
    work.student(images)  # running statistics other than 0 and 1
    before = work.student.eval()(images)
    student = set_batch_norm(work.student, "sync", processes=2, device=torch.device("cuda"))
    after = student.eval()(images)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in student.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in student.modules())
    torch.testing.assert_close(after.logits, before.logits)
    with pytest.raises(ValueError, match=r"on GPUs only.*local or frozen"):
        set_batch_norm(student, "sync", processes=2, device=torch.device("cpu"))


def test_what_no_loss_reaches_is_frozen(tmp_path):
    work = built(tiny.config(tmp_path, aux=True))
    freeze_unused(work.student, aux=False)
    frozen = {name for name, p in work.student.named_parameters() if not p.requires_grad}
    assert frozen == {f"model.aux_head.{name}" for name, _ in work.network.aux_head.named_parameters()}


@pytest.mark.parametrize("score_first", [False, True])
def test_half_precision_reaches_the_losses(score_first, teacher, tmp_path):
    """Also after an evaluation."""
    work = built(tiny.config(tmp_path, method="kd+nfd", teacher=teacher, train={"precision": "bf16"}))
    train_mode(work.student, "local")
    if score_first:
        work._evaluate()
    watch = engine.Stopwatch(work.device)
    student, other, _ = work._step(work._batches(), watch, keep=True).given
    assert student.logits.dtype == other.logits.dtype == torch.bfloat16
    assert student.logits.grad.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in work.student.parameters())


def test_loss_scaling_changes_nothing(teacher, tmp_path):
    """Inserts the GradScaler of fp16 training manually; Accelerate creates it on GPUs only."""
    weights = []
    for scaler in (None, torch.amp.GradScaler("cpu")):
        work = built(tiny.config(tmp_path, method="kd+nfd", teacher=teacher, aux=True))
        work.accelerator.scaler = scaler
        work.optimizer = AcceleratedOptimizer(work.optimizer.optimizer, scaler=scaler)
        work.accelerator._optimizers = [work.optimizer]
        train_mode(work.student, "local")
        work._step(work._batches(), engine.Stopwatch(work.device))
        weights.append(work.student.state_dict())
    assert scaler.get_scale() == 2**16  # nothing overflowed
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-7)


def test_fp16_needs_a_gpu(tmp_path):
    with pytest.raises(ValueError, match=r"fp16 needs a GPU.*bf16"):
        run(tiny.config(tmp_path, train={"precision": "fp16"}))


def compiled_run(tmp_path, teacher):
    for compile in (False, True):
        out = tmp_path / str(compile)
        run(tiny.config(out, method="nfd+rdd", teacher=teacher, aux=True, **exact(train={"compile": compile})))
    plain, compiled = (lines(tmp_path / str(compile), "train") for compile in (False, True))
    for left, right in zip(plain, compiled, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-3)
    state = checkpoint.load(tmp_path / "True" / "last.pt")["model"]
    assert state.keys() == checkpoint.load(tmp_path / "False" / "last.pt")["model"].keys()


def test_compiled_networks(teacher, tmp_path, quick, monkeypatch):
    """One graph each, with a backend that runs the graph unchanged."""
    graphs = []

    def eager(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compile = torch.compile  # nn.Module.compile calls it too
    monkeypatch.setattr(torch, "compile", lambda network: compile(network, backend=eager, fullgraph=True))
    compiled_run(tmp_path, teacher)
    assert len(graphs) == 2


@pytest.mark.slow
def test_compiled_networks_by_inductor(teacher, tmp_path, quick):
    torch._dynamo.reset()
    compiled_run(tmp_path, teacher)


# Output files


def test_panels_events_and_page(teacher, tmp_path):
    train = {"steps": 3, "panels": 2}
    config = tiny.config(tmp_path, method="rdd", teacher=teacher, train=train, eval=EvalConfig(every=1, limit=2))
    run(config)
    panels = sorted((tmp_path / "panels").iterdir())
    assert [panel.name for panel in panels] == ["000001.jpg", "000002.jpg", "000003.jpg"]
    with Image.open(panels[0]) as picture:
        assert picture.width > 6 * 256  # image, label, teacher, student, two maps
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"train/loss/rdd_kd", "train/grad/rdd_kd", "train/grad_cosine", "val/miou"} <= set(events.Tags()["scalars"])
    assert len(events.Images("panel")) == 3
    page = (tmp_path / "report.html").read_text()
    assert "What the losses cost" in page
    assert page.count(";base64,") == 1  # the last panel


def test_long_runs_draw_few_panels(tmp_path, quick, monkeypatch):
    drawn = []
    monkeypatch.setattr(engine.RunLog, "picture", lambda self, step, image: drawn.append(step))
    work = built(tiny.config(tmp_path, train={"steps": 1000, "panels": 1}, eval=EvalConfig(every=7)))
    work.log = engine.RunLog(tmp_path, enabled=False)
    for work.step in [*range(7, 1000, 7), 1000]:
        work._draw()
    assert 15 < len(drawn) <= engine.PICTURES
    assert drawn[-1] == 1000


# Errors


def test_a_teacher_of_other_classes(teacher, tmp_path):
    class Other(tiny.Patches):
        classes = ("a", "b", "c")

    with pytest.raises(ValueError, match=r"trained on the classes \['ground', 'red', 'blue'\]"):
        engine.train(tiny.config(tmp_path, method="kd", teacher=teacher), show=False, datasets=(Other(), Other()))


def test_a_loss_that_is_not_finite_is_named(teacher, tmp_path):
    config = tiny.config(tmp_path, method="kd", teacher=teacher, train={"steps": 6, "log_every": 3})
    config.loss.kd.weight = 1e39  # infinite in fp32; non-finite after this step
    with pytest.raises(
        FloatingPointError, match=r"the loss kd is no longer finite at step 1 .*'kd': inf.*lower --optim\.lr \(0\.01\)"
    ):
        run(config)
    assert not (tmp_path / "last.pt").exists()


def test_too_little_memory_says_what_to_lower(tmp_path, monkeypatch):
    def greedy(self, *args, **kwargs):
        torch.empty(2**46, dtype=torch.uint8)

    monkeypatch.setattr(engine.Run, "_part", greedy)
    with pytest.raises(
        MemoryError, match=r"too little memory: .*70368744177664 bytes.*--train\.batch_size \(4\).*bf16"
    ):
        run(tiny.config(tmp_path))

    def out_of_memory(self, *args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(engine.Run, "_part", out_of_memory)
    with pytest.raises(MemoryError, match="CUDA out of memory"):
        run(tiny.config(tmp_path))


# Common problems


class Cut(tiny.Patches):
    """Images of 60x60, not divisible by any encoder's stride."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image[:, :60, :60], label[:60, :60]


def test_a_crop_that_the_network_refuses_names_what_fits(tmp_path):
    with pytest.raises(
        ValueError, match=r"data\.crop \[60, 60\] does not suit the network .*; it takes \[64, 64\]"
    ) as error:
        engine.train(tiny.config(tmp_path), show=False, datasets=(Cut(), tiny.DATASETS[1]))
    assert "\n" not in str(error.value)


def test_a_size_divisor_that_is_too_small_is_named(tmp_path, quick):
    how = EvalConfig(every=100, batch_size=2, size=(60, 60), size_divisor=4)
    with pytest.raises(ValueError, match=r"eval\.size_divisor 4: an image of \[60, 60\] .*it takes \[64, 64\]"):
        run(tiny.config(tmp_path, eval=how))


def test_a_batch_norm_on_one_value_says_what_to_change(tmp_path):
    model = ModelConfig(arch="DeepLabV3Plus", encoder="tu-mobilenetv3_small_050")
    with pytest.raises(ValueError, match=r"a batch norm sees a single value .*train\.batch_norm frozen"):
        run(tiny.config(tmp_path, model=model, train={"batch_size": 1}))


class Without(tiny.Patches):
    """Without pixels of the last class."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image, torch.where(label == 2, 255, label)


def test_a_class_without_a_labelled_pixel_is_warned_about(tmp_path, quick):
    with pytest.warns(UserWarning, match=r"no pixel in the 8 crops so far is labelled 'blue'.*0: 0, 255: 1"):
        engine.train(tiny.config(tmp_path), show=False, datasets=(Without(), tiny.DATASETS[1]))

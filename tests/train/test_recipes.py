"""Recipes: resolution, published numbers, and three steps of each on each data set."""

import json

import pytest
import torch
import yaml

pytest.importorskip("accelerate")
pytest.importorskip("segmentation_models_pytorch")

from fastkd.train import engine, recipe
from fastkd.train.config import Config, from_dict, parse
from fastkd.train.data import build_dataset
from fastkd.train.models import build_model
from tests.train import tiny, trees

SETS = ("cityscapes", "camvid", "voc", "ade20k")
PUBLISHED = ("baseline", "cirkd-v1", "cirkd-v2", "rdd-paper", "rdd-official", "nfd", "cwd", "segformer", "canonical-kd")
OWN = {"camvid-lite0": "camvid", "street-scenes": "street_scenes"}  # the data set of each of this project's own recipes


def resolve(name, *words):
    return parse(["--recipe", name, "--teacher", "t.pt", *words])[0]


# From the papers' tables: crop, batch, learning rate, steps, weight decay.
@pytest.mark.parametrize(
    ("name", "data", "crop", "batch", "lr", "steps", "decay"),
    [
        ("cirkd-v1", "cityscapes", (512, 1024), 16, 0.02, 40_000, 1e-4),
        ("cirkd-v1", "voc", (512, 512), 16, 0.02, 40_000, 1e-4),
        ("cirkd-v1", "camvid", (360, 360), 16, 0.02, 40_000, 1e-4),
        ("cirkd-v1", "ade20k", (512, 512), 16, 0.02, 40_000, 1e-4),
        ("cirkd-v2", "cityscapes", (512, 1024), 8, 0.01, 80_000, 1e-4),
        ("cirkd-v2", "voc", (512, 512), 16, 0.02, 80_000, 1e-4),
        ("cirkd-v2", "ade20k", (512, 512), 16, 0.02, 80_000, 1e-4),
        ("rdd-paper", "cityscapes", (512, 1024), 16, 0.02, 40_000, 5e-4),
        ("rdd-paper", "camvid", (360, 360), 16, 0.02, 40_000, 5e-4),
        ("rdd-paper", "ade20k", (512, 512), 16, 0.02, 80_000, 5e-4),
        ("rdd-official", "voc", (512, 512), 16, 0.02, 40_000, 1e-4),
        ("rdd-official", "ade20k", (512, 512), 16, 0.02, 80_000, 1e-4),
        ("segformer", "cityscapes", (1024, 1024), 8, 2e-4, 160_000, 1e-4),
    ],
)
def test_published_numbers(name, data, crop, batch, lr, steps, decay):
    c = resolve(name, "--data.name", data)
    assert (c.data.name, c.data.crop, c.data.scale, c.data.flip) == (data, crop, (0.5, 2.0), 0.5)
    assert (c.train.batch_size, c.train.steps) == (batch, steps)
    assert (c.optim.lr, c.optim.weight_decay, c.optim.momentum, c.optim.power) == (lr, decay, 0.9, 0.9)
    assert c.optim.name == ("adamw" if name == "segformer" else "sgd")


def test_methods_and_weights():
    assert resolve("cirkd-v1").method == "kd+cirkd"
    assert resolve("rdd-paper").loss.rdd.preset == "paper"
    assert resolve("rdd-paper").model.aux is None
    official = resolve("rdd-official")
    assert (official.loss.rdd.preset, official.loss.rdd.class_weight) == ("official", "cityscapes")
    assert resolve("rdd-official", "--data.name", "voc").loss.rdd.class_weight is None
    assert (resolve("nfd").loss.nfd.weight, resolve("nfd").loss.kd.weight) == (5.0, 0.5)
    cwd = resolve("cwd").loss.cwd
    assert (cwd.compare, cwd.weight, cwd.feature_weight, cwd.temperature) == ("both", 3.0, 50.0, 4.0)
    assert (resolve("segformer").model.encoder, resolve("segformer").model.options) == ("mit_b0", {})


def test_later_words_win(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("data: {name: voc}\noptim: {lr: 0.5, warmup: 7}\n")
    c = resolve("rdd-paper", "--config", str(path), "--optim.warmup", "9", "--model.options.decoder_channels", "64")
    assert (c.data.name, c.data.crop) == ("voc", (512, 512))  # the file's data set selects the recipe's layer
    assert (c.optim.lr, c.optim.warmup, c.optim.weight_decay) == (0.5, 9, 5e-4)
    assert c.model.options == {"encoder_output_stride": 8, "decoder_channels": 64}
    first = parse(["--optim.lr", "0.5", "--recipe", "baseline"])[0]  # at any position on the command line
    assert first.optim.lr == 0.5


def test_recipes_of_the_package():
    own = {f"{name}-{role}": data for name, data in OWN.items() for role in ("teacher", "student")}
    assert {*PUBLISHED, *own} == set(recipe.names())
    for name in recipe.names():
        assert recipe.load(name)["data"]["name"] == own.get(name, "cityscapes")


def test_merge_changes_neither():
    base, over = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}, "e": None}
    assert recipe.merge(base, over) == {"a": {"b": 4, "c": 2}, "d": 3, "e": None}
    assert base == {"a": {"b": 1, "c": 2}, "d": 3}
    assert over == {"a": {"b": 4}, "e": None}


@pytest.mark.parametrize(
    ("name", "words", "stride"),
    [
        ("baseline", [], 8),
        ("baseline", ["--model.encoder", "mobilenet_v2"], 8),
        ("baseline", ["--model.arch", "PSPNet"], 8),
        ("segformer", [], 4),
        ("canonical-kd", [], 4),
    ],
)
def test_networks_of_the_recipes(name, words, stride):
    network = build_model(resolve(name, *words).model, 19).eval()
    out = network(torch.zeros(1, 3, 64, 96))
    assert out.logits.shape == (1, 19, 64 // stride, 96 // stride)
    assert network.has_aux == (name == "baseline")


SMALL = ["--model.encoder", "tu-test_resnet"]
NARROW = {"DeepLabV3": "decoder_channels", "Segformer": "decoder_segmentation_channels"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(data set, architecture) -> a tree and an untrained teacher of that kind, created on demand."""
    folder = tmp_path_factory.mktemp("recipes")

    def prepare(data, arch):
        root, teacher = folder / data, folder / f"{data}-{arch}.pt"
        if not root.exists():
            trees.TREES[data](root)
        if not teacher.exists():
            kind = "segformer" if arch == "Segformer" else "baseline"
            words = ["--recipe", kind, "--data.name", data, "--method", "none", *SMALL, *narrow(arch, 48)]
            tiny.save_network(teacher, parse(words)[0], build_dataset(data, root=root, split="val"))
        return root, teacher

    return prepare


def narrow(arch, width):
    return [f"--model.options.{NARROW[arch]}", str(width)]


# Each recipe on one data set, with and without unlabelled images; `pytest -m slow` runs the other pairs.
PAIRS = [(name, SETS[(i + few) % 4], few) for i, name in enumerate(PUBLISHED) for few in (False, True)[: 1 + (i > 0)]]
REST = [(name, data, False) for name in PUBLISHED for data in SETS if (name, data, False) not in PAIRS]


@pytest.mark.parametrize(
    ("name", "data", "few"), [*PAIRS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in REST)]
)
def test_three_steps(name, data, few, place, tmp_path, quick):
    """The recipe with a small encoder and decoder, a small crop, a batch of two, and three steps.

    few: with half of the labels, and an unlabelled image in each batch.
    """
    arch = recipe.load(name)["model"]["arch"]
    root, teacher = place(data, arch)
    words = ["--recipe", name, "--data.name", data, "--data.root", str(root), "--out", str(tmp_path / "run")]
    small = ["--data.crop", "[64, 64]", "--train.batch_size", "2", "--train.steps", "3", *SMALL, *narrow(arch, 32)]
    brief = [
        "--train.log_every",
        "1",
        "--train.panels",
        "0",
        "--eval.limit",
        "1",
        "--train.device",
        "cpu",
        "--data.workers",
        "0",
    ]
    brief += ["--data.labelled", "1/2", "--data.unlabelled", "rest"] if few else []
    config, flags = parse([*words, *small, *brief, *(["--teacher", str(teacher)] if name != "baseline" else [])])
    result = engine.train(config, show=False, **flags)
    assert result["steps"] == 3
    assert result["images"]["unlabelled"]["crops"] == 3 * few
    assert result["method"] == recipe.load(name)["method"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3]
    if name.startswith("rdd"):  # both stages have run: the first lasts a tenth of three steps
        assert {"loss/rdd_task", "loss/rdd_kd"} <= set(lines[0])
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["optim"]["weight_decay"] == recipe.load(name, data)["optim"]["weight_decay"]
    assert from_dict(Config, saved) == config
    assert result["seed"] == 0
    assert {"git", "torch", "fastkd"} <= set(result["versions"])

"""Every block of README.md and docs/*.md runs, on tiny data.

Blocks are fenced and name their language. bash expands the loops and variables of commands and passes each to
`Place.run`. fastkd's commands run in this process, with small networks and data substituted. The others are listed in
`ELSEWHERE` with the reason why they are only checked. Python blocks run with the names in `SCOPES`; `CONFIGURATIONS`
defines the use of each page's YAML.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

pytest.importorskip("accelerate")
pytest.importorskip("segmentation_models_pytorch")
pytest.importorskip("onnxruntime")
pytest.importorskip("pytorch_lightning")

import fastkd
from fastkd import cli
from fastkd.train import engine, recipe
from fastkd.train.config import Config, EvalConfig, ModelConfig, from_dict, parse
from fastkd.train.convert import convert
from fastkd.train.data import build_dataset
from fastkd.train.models import build_model
from tests.train import tiny, trees

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# Command line from bash -> why it does not run here. The module, file, target or extra that it names must exist.
ELSEWHERE = {
    r"pip install .*": "needs the network",
    r"git clone .*|cd .*": "needs the repository",
    r"make .*": "builds an environment, or takes minutes",
    r"python3? -m (benchmarks|pytest|tests).*|python3 benchmarks/gpu_check.py .*": "measures or tests, for minutes",
    r"benchmarks/sanitize.sh": "needs a GPU",
    r"scontrol .*": "needs SLURM",
    r"python examples/.*": "tests/test_examples.py runs them",
    r"fastkd export .*\.onnx.*": "takes 10 s; tests/train/test_export.py does it",
}
# Launchers of one or more fastkd processes; the command after them runs here in a single process.
LAUNCHERS = r"(srun )?torchrun .*--no-python fastkd (?P<a>.*)|accelerate launch .*-m fastkd\.cli (?P<b>.*)"
SEEN = {"PYTHONPATH", "FASTKD_BACKEND", "CUDA_VISIBLE_DEVICES"}  # environment variables set before a command

# A factory's network, built only once: two stages, two heads.
NETS = """
from torch import nn

class Stages(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, width, 3, 4, 1), nn.Conv2d(width, width, 3, 2, 1)

    def forward(self, x):
        x = self.first(x)
        return x, self.second(x)

class Net(nn.Module):
    def __init__(self, classes, width):
        super().__init__()
        self.stages = Stages(width)
        self.head, self.side_head = nn.Conv2d(width, classes, 1), nn.Conv2d(width, classes, 1)

    def forward(self, x):
        x = self.stages(x)[-1]
        return self.head(x), self.side_head(x)

def build(classes, width):
    return Net(classes, width)
"""
TAPS = {"encoder": "stages[-1]", "encoder_stage3": "stages[0]", "decoder": "stages[-1]"}
SMALL = {"model.arch": "my_nets:build", "model.options": {"width": 8}, "model.logits": "head", "model.features": TAPS}
SMALL |= {"model.weights": None, "model.encoder_weights": None, "model.aux": None, "model.aux_logits": "side_head"}
SMALL |= {"data.crop": (64, 64)}
SHORT = {
    "train.steps": 1,
    "train.batch_size": 2,
    "train.panels": 0,
    "train.device": "cpu",
    "optim.warmup": 0,
    "data.workers": 0,
}
SHORT |= {"eval.limit": 1, "eval.size_divisor": 32}
SCENES = {"data.options": {"size": (64, 64), "length": 8}, "data.val_options": {"length": 1}}


def change(config: Config, values: dict) -> None:
    for name, value in values.items():
        *groups, last = name.split(".")
        setattr(functools.reduce(getattr, groups, config), last, value)


def blocks(language: str = "") -> list:
    """(page, language, text) of each block, with "page:line" as its ID."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE):
            line, name = text[: match.start()].count("\n") + 1, page.relative_to(ROOT).as_posix()
            if not language or match[1] == language:
                found.append(pytest.param(name, match[1], match[2], id=f"{name}:{line}"))
    return found


def test_every_block_has_a_language_that_is_tested():
    assert {param.values[1] for param in blocks()} == {"bash", "python", "yaml", "text"}
    assert len(blocks()) > 40
    for page in PAGES:  # indented blocks are not allowed, since they name no language
        outside = re.sub(r"^```.*\n(?:.*\n)*?```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert not re.search(r"(?:\A|\n\n) {4}\S", outside), page


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def test_links_lead_somewhere():
    """`make docs` checks links between the pages of the site, which does not include README and CONTRIBUTING."""
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            file, _, anchor = link.partition("#")
            if not link.startswith("http"):
                target = page.parent / file if file else page
                assert target.exists(), f"{page.name}: {link}"
                assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    listed = re.findall(r": ([\w-]+\.md)$", nav, re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in PAGES[1:])


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize(("page", "language", "text"), blocks("text"))
def test_formulas_are_text(page, language, text):
    """Blocks that do not run contain no command, code or configuration."""
    assert not re.search(r"^\s*(fastkd|python3?|pip|make|import|from|\w+:) ", text, re.MULTILINE)


def commands(text: str, folder: Path) -> list[list[str]]:
    """The argument list of each command that bash would run."""
    names = {"scontrol", "srun", "torchrun", "accelerate", "git", "cd", "benchmarks/sanitize.sh"}
    names |= {"fastkd", "python", "python3", "pip", "make"}
    stubs = "".join(
        f"{name}() {{ printf '%s\\x1f' {name} \"$@\" >&3; printf '\\x1e' >&3; }}\n" for name in sorted(names)
    )
    calls = folder / "calls"
    done = subprocess.run(
        ["bash", "-c", f"exec 3>{calls}\nset -e\n{stubs}{text}"], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, f"a command without a rule: {done.stderr}"
    assert not done.stderr, done.stderr
    return [call.split("\x1f")[:-1] for call in calls.read_text().split("\x1e")[:-1]]


class Place:
    """A folder in which the commands run, with the data sets, checkpoints, runs and pictures that they name."""

    def __init__(self, folder: Path):
        self.folder, self.done = folder, set()
        (folder / "my_nets.py").write_text(NETS)
        trees.save(trees.picture(0), folder / "photo.jpg")
        trees.save(trees.picture(1), folder / "photos/a.jpg")

    def data(self, name: str) -> Path | None:
        """A tree of the data set; for two folders also under other names."""
        if name == "street_scenes":
            return None
        root = self.folder / "data" / name
        if not root.exists():
            trees.TREES[name](root)
            if name == "folders":
                (root / "img").symlink_to("images")
                (root / "mask").symlink_to("labels")
        return root

    def teacher(self, data: str) -> str:
        """An untrained network with an auxiliary head for the classes of a data set."""
        path = self.folder / "teachers" / f"{data}.pt"
        if not path.exists():
            config, root = Config(), self.data(data)
            change(config, SMALL | {"data.name": data, "data.root": None if root is None else str(root)})
            tiny.save_network(path, config, build_dataset(data, root=root, split="val"))
        return str(path)

    def run(self, words: list[str]) -> None:
        line = " ".join(words)
        if (launched := re.fullmatch(LAUNCHERS, line)) is not None:
            words = ["fastkd", *(launched["a"] or launched["b"]).split()]
        if any(re.fullmatch(pattern, line) for pattern in ELSEWHERE):
            self.look(words)
            return
        assert words[0] == "fastkd", f"no rule for: {line}"
        command, *rest = words[1:]
        if command in ("train", "convert"):
            getattr(self, command)(rest)
        elif line not in self.done:
            self.done.add(line)
            assert cli.main([command, *getattr(self, f"_{command}", lambda w: w)(rest)]) == 0, line

    def look(self, words: list[str]) -> None:
        """Checks that everything named by a command that is not run exists."""
        if words[0] == "make":
            targets = re.findall(r"^([\w-]+(?: [\w-]+)*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(words[1:]) <= {name for names in targets for name in names.split()}, words
        if words[0] == "pip":
            known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
            extras = {extra for names in re.findall(r"\[(.+?)\]", " ".join(words)) for extra in names.split(",")}
            assert extras <= set(known), words
        for module in re.findall(r"-m (benchmarks[\w.]*|tests[\w.]*)", " ".join(words)):
            assert importlib.util.find_spec(module), words
        for file in re.findall(r"\b(?:tests|benchmarks|examples)/[\w/]+\.(?:py|sh)", " ".join(words)):
            assert (ROOT / file).is_file(), words

    def parsed(self, words: list[str], command: str = "train") -> Config:
        for file in (word for word in words if word.endswith(".yaml")):
            if not Path(file).exists():
                Path(file).write_text("data: {name: camvid}\n")
        return parse(words, prog=f"fastkd {command}")[0]

    def substituted(self, config: Config, values: dict) -> Config:
        root = self.data(config.data.name)
        change(config, values | SHORT | (SCENES if root is None else {"data.root": str(root)}))
        if config.teacher:
            config.teacher = self.teacher(config.data.name)
        config.out = str(self.folder / "trained" / str(len(self.done)))
        return config

    def train(self, words: list[str]) -> None:
        """Trains one step, unless a configuration that is equal after the substitution has been trained already."""
        config = self.substituted(self.parsed(words), SMALL)
        key = repr((config.method, config.loss, config.data))
        if key not in self.done:
            self.done.add(key)
            assert engine.train(config, show=False)["steps"] == 1

    def convert(self, words: list[str]) -> None:
        config = self.parsed(words, "convert")
        config.data.name = "cityscapes"
        config = self.substituted(config, SMALL)
        torch.save(torch.load(self.teacher("cityscapes"), weights_only=True)["model"], self.folder / "network.pth")
        config.model.weights = str(self.folder / "network.pth")
        convert(config)

    def _data(self, words: list[str]) -> list[str]:
        config = self.parsed([word for word in words if word != "--check"], "data")
        return [*words, "--data.root", str(self.data(config.data.name)), "--data.crop", "[32, 32]"]

    def _on_runs(self, words: list[str]) -> list[str]:
        """Replaces a missing run by one trained for a step; sizes are small."""
        trained = self.folder / "one"
        if not trained.exists():
            config = self.substituted(Config(name="one"), SMALL | {"eval.size": (64, 64)})
            config.out = str(trained)
            engine.train(config, show=False)
        for run in {word.split("/")[1] for word in words if word.startswith("runs/")}:
            Path("runs").mkdir(exist_ok=True)
            if not Path("runs", run).exists():
                Path("runs", run).symlink_to(trained)
        small = re.sub(r"--size 512 1024", "--size 64 64", "\0".join(words).replace("\0", " "))
        return re.sub(r"--window 512 512 --stride 341 341", "--window 48 48 --stride 32 32", small).split()

    _eval = _predict = _export = _report = _on_runs

    def _bench(self, words: list[str]) -> list[str]:
        small = re.sub(r"--size \S+", "--size 8,16", re.sub(r"--shape \S+", "--shape 1,3,4,8", " ".join(words)))
        return [*small.split(), "--seconds", "0.01", "--device", "cpu", "--losses", "kd"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("docs"))


@pytest.fixture
def here(place, quick_runs, monkeypatch):
    monkeypatch.chdir(place.folder)
    monkeypatch.syspath_prepend(place.folder)
    monkeypatch.setenv("FASTKD_FACTORIES", "my_nets:build")
    return place


@pytest.fixture
def quick_runs(monkeypatch):
    """Skips the report and the loss timing after the last step; `fastkd bench` does not compare with torch.compile."""
    monkeypatch.setattr(engine.Run, "_report", lambda self: None)
    monkeypatch.setattr(engine.Run, "_loss_cost", lambda self: None)
    monkeypatch.setattr(torch, "compile", lambda loss, **_: loss)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("page", "language", "text"), blocks("bash"))
def test_commands(page, language, text, here, tmp_path):
    found = commands(text, tmp_path)
    assert found or "export" in text
    for words in found:
        here.run(words)


def test_a_command_without_a_rule_is_noticed(here, tmp_path):
    with pytest.raises(AssertionError, match="frobnicate: command not found"):
        commands("frobnicate --all", tmp_path)
    with pytest.raises(AssertionError, match="no rule for: python -m antigravity"):
        here.run(["python", "-m", "antigravity"])
    with pytest.raises(SystemExit):
        here.run(["fastkd", "train", "--optim.speed", "3"])
    with pytest.raises(AssertionError):
        here.run(["make", "coffee"])


# Python


class Network(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Conv2d(3, width, 3, stride=4, padding=1)
        self.head = nn.Conv2d(width, 5, 1)

    def forward(self, x):
        return self.head(self.body(x).relu())


def networks() -> dict:
    labels = torch.randint(0, 5, (2, 64, 64))
    labels[:, 0] = 255
    return {"student": Network(8), "teacher": Network(16), "images": torch.randn(2, 3, 64, 64), "labels": labels}


def tensors() -> dict:
    scope = networks()
    student, teacher = (torch.randn(2, 256 * n, 8, 8, requires_grad=n == 1) for n in (1, 2))
    logits, labels = torch.randn(2, 5, 16, 16, requires_grad=True), scope["labels"]
    return {
        "F": F, "fastkd": fastkd, "logits": logits, "labels": labels, "task": F.mse_loss(logits, torch.zeros(logits.shape)),
        "student_features": student, "teacher_features": teacher, "student_feature": student,
        "teacher_feature": torch.randn(student.shape), "student_logits": logits, "teacher_logits": torch.randn(logits.shape),
        "teacher_aux_logits": torch.randn(logits.shape),
    }  # fmt: skip


def smp_model() -> dict:
    model = build_model(tiny.config("x").model, 3).tapped.model
    return {"model": model, "images": torch.randn(1, 3, 64, 64)}


SCOPES = {  # of every other page: tensors
    "README.md": lambda: {"F": F, "fastkd": fastkd, "torch": torch, "logits": tensors()["logits"], **networks()},
    "docs/drop-in.md": networks,
    "docs/training.md": smp_model,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("page", "language", "text"), blocks("python"))
def test_python(page, language, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = SCOPES.get(page, tensors)()
    if "torchdistill" in text:  # torchdistill does not resize logits
        scope["labels"] = scope["labels"][:, ::4, ::4].contiguous()
    before = [p.clone() for p in scope["student"].parameters()] if "student" in scope else []
    exec(compile(text, page, "exec"), scope)
    for options in scope.get("distill_losses", {}).values():  # in mmrazor's configuration
        module, _, name = options.pop("type").rpartition(".")
        getattr(importlib.import_module(module), name)(**options)(*torch.randn(2, 2, 5, 4, 4))
    if before and "student(" in text.replace("tapped_", ""):
        parameters = list(scope["student"].parameters())
        moved = any(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
        assert moved or all(p.grad is not None for p in parameters)
    if isinstance(loss := scope.get("loss"), torch.Tensor):
        assert loss.isfinite()
        if not before:
            loss.backward()


def test_the_page_of_drop_ins_has_a_block_for_each_project():
    headings = re.findall(r"^## (.*)", (ROOT / "docs/drop-in.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"A plain loop", "timm", "Lightning", "CIRKD's scripts", "mmrazor", "torchdistill"} <= set(headings)
    assert {"segmentation-models-pytorch", "MONAI", "Ultralytics"} <= set(headings)


# YAML


def train_it(values: dict, here: Place) -> None:
    """The trainer's example with its crop, networks and methods, for one step."""
    Path("example.yaml").write_text(yaml.safe_dump(values))
    config = here.substituted(here.parsed(["--config", "example.yaml"]), {})
    change(config, {"eval.size_divisor": EvalConfig.size_divisor})
    dataset = build_dataset("camvid", root=here.data("camvid"), split="val")
    teacher = copy.deepcopy(config)
    teacher.model.aux = "encoder[-2]"
    config.teacher = tiny.save_network(here.folder / "own.pt", teacher, dataset)
    assert engine.train(config, show=False)["steps"] == 1


def build_it(values: dict, here: Place) -> None:
    """Builds a network, with ResNet-18 for ResNet-101 and random weights for its files."""
    values = yaml.safe_load(yaml.safe_dump(values["model"]).replace("resnet101", "resnet18"))
    config: ModelConfig = from_dict(ModelConfig, values)
    bare = build_model(from_dict(ModelConfig, values | {"weights": None, "encoder_weights": None}), 19)
    if config.encoder_weights:
        torch.save(bare.tapped.model.encoder.state_dict(), config.encoder_weights)
    if config.weights:
        torch.save(bare.state_dict(), config.weights)
    out = build_model(config, 19).eval()(torch.rand(1, 3, 64, 64))
    assert out.logits.shape[1] == 19
    assert set(out.features) == set(config.features or {"encoder": ""})
    assert (out.aux is not None) == bool(config.aux or config.aux_logits)


def write_it(values: dict, here: Place) -> None:
    """Writes a recipe next to the package's."""
    folder = here.folder / "recipes"
    folder.mkdir()
    for path in recipe.RECIPES.glob("*.yaml"):
        (folder / path.name).write_text(path.read_text())
    (folder / "mine.yaml").write_text(yaml.safe_dump(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "RECIPES", folder)
        config = parse(["--recipe", "mine", "--data.name", "ade20k", "--teacher", "t.pt"])[0]
    assert (config.method, config.train.steps, config.optim.weight_decay) == ("rdd", 80_000, 5e-4)


CONFIGURATIONS = {"docs/training.md": train_it, "docs/models.md": build_it, "docs/recipes.md": write_it}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("page", "language", "text"), blocks("yaml"))
def test_configurations(page, language, text, here):
    assert page in CONFIGURATIONS, f"no rule for the YAML of {page}"
    CONFIGURATIONS[page](yaml.safe_load(text), here)

"""The commands and configurations of the docs run: what they say is parsed, and the trainer's example trains."""

import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("segmentation_models_pytorch")

from fastkd.train import engine
from fastkd.train.config import parse
from fastkd.train.data import build_dataset
from tests.train import tiny, trees

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("training.md", "models.md", "methods.md", "recipes.md")


def commands():
    """The words of each `fastkd train | data | convert` of the pages."""
    found = []
    for page in PAGES:
        text = (DOCS / page).read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^    fastkd (.+)$", text, re.MULTILINE):
            command, *words = shlex.split(line)
            if command in ("train", "data", "convert"):
                found.append(pytest.param(command, words, id=f"{page} {line[:60]}"))
    return found


@pytest.mark.parametrize(("command", "words"), commands())
def test_commands_of_the_docs_are_read(command, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for word in words:
        if word.endswith(".yaml"):
            Path(word).write_text("train: {steps: 8}\n")
    words = [word.replace("W", "1") if word == "W" else word for word in words if word != "--check"]
    parse(words, prog=f"fastkd {command}")


def test_the_configuration_of_the_trainers_page_trains(tmp_path, quick):
    """Its crop, its networks and its methods, for one step on a small set."""
    block = re.search(r"```yaml\n(.*?)```", (DOCS / "training.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    (tmp_path / "run.yaml").write_text(block)
    trees.camvid(tmp_path / "data")
    small = [
        "--data.root",
        str(tmp_path / "data"),
        "--train.steps",
        "1",
        "--train.batch_size",
        "2",
        "--eval.limit",
        "1",
    ]
    words = ["--config", str(tmp_path / "run.yaml"), *small, "--train.device", "cpu", "--out", str(tmp_path / "run")]
    teacher = parse([*words, "--method", "none", "--model.aux", "encoder[-2]"])[0]
    dataset = build_dataset("camvid", root=tmp_path / "data", split="val")
    path = tiny.save_network(tmp_path / "teacher.pt", teacher, dataset)
    assert engine.train(parse([*words, "--teacher", path])[0], show=False)["steps"] == 1

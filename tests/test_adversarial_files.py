"""Untrusted files: damaged, foreign or hostile checkpoints, weights and YAML. Each is refused with an error that
names it, and no code in it runs. (Images and label files: tests/train/test_datasets.py,
tests/train/test_predict.py.)"""

from __future__ import annotations

import copy
import io
import os
import pickle
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("segmentation_models_pytorch")

from PIL import Image

from fastkd.cli import main
from fastkd.train import checkpoint
from fastkd.train.config import parse, to_dict
from fastkd.train.data.images import DataError, open_image, upright
from fastkd.train.models import build_model
from fastkd.train.weights import load_state_file
from tests.train import tiny


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint written by the trainer."""
    config = tiny.config(tmp_path_factory.mktemp("run"))
    network = build_model(config.model, 3)
    return {
        "format": checkpoint.FORMAT,
        "config": to_dict(config),
        "classes": list(tiny.Patches.classes),
        "palette": [list(colour) for colour in tiny.Patches.palette],
        "step": 2,
        "model": network.state_dict(),
    }


class Hostile:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.promise("no-code")
@pytest.mark.parametrize("where", ["whole", "inside"])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("read", [checkpoint.load, checkpoint.load_network, load_state_file])
def test_a_pickle_runs_no_code(where, form, read, good, tmp_path):
    hostile, path = Hostile(tmp_path / "made"), tmp_path / "model.pt"
    state = hostile if where == "whole" else good | {"extra": hostile}
    if form == "pickle":
        path.write_bytes(pickle.dumps(hostile))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match=str(path)):
        read(path)
    assert not (tmp_path / "made").exists()


def damage(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    kind = chance.choice(("cut", "flip", "zero", "insert", "noise"))
    at = chance.randrange(len(changed))
    if kind == "cut":
        del changed[at:]
    elif kind == "flip":
        changed[at] ^= 1 << chance.randrange(8)
    elif kind == "zero":
        changed[at : at + 64] = bytes(len(changed[at : at + 64]))
    elif kind == "insert":
        changed[at:at] = chance.randbytes(7)
    else:
        return chance.randbytes(chance.randrange(200))
    return bytes(changed)


@pytest.mark.promise("foreign")
def test_damaged_checkpoints(tmp_path):
    """A damaged file either still loads with its original contents, or the error names it."""
    state = {"format": 1, "model": {"w": torch.arange(3000.0)}, "classes": ["a"], "step": 7}
    file = io.BytesIO()
    torch.save(state, file)
    chance, refused, read = random.Random(0), 0, 0
    for i in range(150):
        path = tmp_path / f"{i}.pt"
        path.write_bytes(damage(file.getvalue(), chance))
        try:
            found = checkpoint.load(path)
        except checkpoint.CheckpointError as error:
            refused += str(path) in str(error)
        else:
            assert torch.equal(found.pop("model")["w"], state["model"]["w"])
            assert found == {"format": 1, "classes": ["a"], "step": 7}
            read += 1
    assert read + refused == 150
    assert refused > 100


WRONG = (None, 3, "x", [], ["x", 4], {}, {"x": 1}, -1.5, [[1, 2, 300]] * 3, torch.zeros(2))
PLACES = [
    ("config",), ("config", "model"), ("config", "model", "arch"), ("config", "model", "encoder"),
    ("config", "model", "library"), ("config", "model", "options"), ("config", "model", "features"),
    ("config", "model", "logits"), ("config", "model", "mean"), ("classes",), ("palette",), ("model",),
]  # fmt: skip


@pytest.mark.promise("foreign")
@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_foreign_checkpoints(place, good, tmp_path):
    """A missing value or one of the wrong type gives an error that names the file, not an unrelated traceback."""
    path, said = tmp_path / "foreign.pt", []
    for value in ("missing", *WRONG):
        state = copy.deepcopy(good)
        holder = state
        for name in place[:-1]:
            holder = holder[name]
        if value == "missing":
            del holder[place[-1]]
        else:
            holder[place[-1]] = value
        torch.save(state, path)
        try:
            network, _ = checkpoint.load_network(path)
        except ValueError as error:
            said.append(str(error))
        else:  # an equivalent value, such as features: None
            assert network(torch.zeros(1, 3, 64, 64)).logits.shape[1] == 3
    assert all(str(path) in message for message in said)
    assert len(said) > 5


@pytest.mark.parametrize(
    ("place", "value"),
    [(("loss", "cwd", "speed"), 1), (("optim",), 3), (("eval", "size"), 4), (("data",), [1]), (("loss", "kd"), {1: 2})],
)
def test_a_configuration_of_another_version(place, value, good, tmp_path, capsys):
    """Commands that need more than the network from a checkpoint also give its name."""
    state, path = copy.deepcopy(good), tmp_path / "other.pt"
    holder = state["config"]
    for name in place[:-1]:
        holder = holder[name]
    holder[place[-1]] = value
    torch.save(state, path)
    with pytest.raises(
        checkpoint.CheckpointError, match=rf"{path} is of a configuration that this version does not know"
    ):
        checkpoint.config_of(state, path)
    assert main(["export", str(path), "--out", str(tmp_path / "x.safetensors")]) == 1
    assert str(path) in capsys.readouterr().err


@pytest.mark.promise("no-fetch")
@pytest.mark.parametrize("encoder", ["tu-hf-hub:someone/something", "tu-local-dir:/tmp", "hf-hub:someone/something"])
def test_a_checkpoint_fetches_nothing(encoder, good, tmp_path):
    state = copy.deepcopy(good)
    state["config"]["model"]["encoder"] = encoder
    torch.save(state, tmp_path / "far.pt")
    with pytest.raises(ValueError, match=r"far\.pt.*a place to fetch a network from"):
        checkpoint.load_network(tmp_path / "far.pt")


def refused(words: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(words)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.promise("yaml-bomb")
def test_yaml_that_unfolds_without_end(tmp_path, capsys):
    """Eight lines that reference each other ten times expand to a hundred million values."""
    path = tmp_path / "run.yaml"
    lines = [f"    {b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in zip("abcdefg", "bcdefgh", strict=True)]
    path.write_text("data:\n  options:\n    a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]\n" + "\n".join(lines))
    for words in (["--config", str(path)], [f"--config={path}"]):
        assert f"{path}: its aliases (*name) unfold into more than" in refused(words, capsys)
    path.write_text("data:\n  options: &o {length: 4, same: *o}\n")
    refused(["--config", str(path)], capsys)
    path.write_text("optim: &o {lr: 0.5}\n")  # an anchor alone is fine
    assert parse(["--config", str(path)])[0].optim.lr == 0.5


@pytest.mark.promise("foreign")
def test_damaged_yaml(tmp_path, capsys):
    """Random edits of a configuration: it loads, or the exit status is 2."""
    text = "out: run\nmethod: none\noptim: {lr: 0.1, name: sgd}\ntrain:\n  steps: 5\n  precision: bf16\n"
    chance, path, codes = random.Random(0), tmp_path / "run.yaml", []
    hostile = ["[" * 3000, "a: " * 500, "!!python/name:os.system", "\x00", "- - -", "out: [1,", "? {}", "%YAML 9", "~"]
    for i in range(60):
        if i < len(hostile):
            path.write_text(hostile[i])
        else:
            path.write_bytes(damage(text.encode(), chance))
        try:
            parse(["--config", str(path)])
        except SystemExit as stop:
            codes.append(stop.code)
    assert set(codes) == {2}
    assert len(codes) > 20


def pictures() -> list[bytes]:
    """Small images in every supported format and mode, with and without metadata."""
    picture = Image.effect_noise((24, 20), 90).convert("RGB")
    turned = Image.Exif()
    turned[0x0112] = 6
    saved = [(picture.convert(mode), "PNG", {}) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")]
    saved += [(picture, name, {"exif": turned}) for name in ("PNG", "JPEG", "WEBP")]
    saved += [(picture, "JPEG", {"progressive": True}), (picture.convert("CMYK"), "JPEG", {}), (picture, "BMP", {})]
    saved += [(picture.convert("P"), "BMP", {}), (picture, "WEBP", {"lossless": True})]
    files = []
    for image, name, options in saved:
        file = io.BytesIO()
        image.save(file, name, **options)
        files.append(file.getvalue())
    return files


@pytest.mark.promise("data-roots")
@pytest.mark.filterwarnings("ignore:::PIL")
def test_damaged_images(tmp_path):
    """Up to four random edits per file: it is read completely, or the error names it."""
    chance, path, read, refused = random.Random(0), tmp_path / "image", 0, 0
    for whole in pictures() * 30:
        data = whole
        for _ in range(chance.choice((1, 1, 2, 4))):
            data = damage(data or b"x", chance)
        path.write_bytes(data)
        try:
            upright(open_image(path)).convert("RGB")
            read += 1
        except DataError as error:
            refused += str(path) in str(error)
    assert read + refused == 30 * len(pictures())
    assert min(read, refused) > 50

"""`fastkd export`: the exported file computes what the network does, also in other programs."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("accelerate")
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

from safetensors import safe_open  # noqa: E402

from fastkd.cli import main  # noqa: E402
from fastkd.train import checkpoint, export  # noqa: E402
from fastkd.train.models import Output  # noqa: E402
from tests.train import tiny  # noqa: E402


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    config = tiny.config("run", aux=True)
    config.model.encoder = "tu-test_resnet"  # few operators: the exporter takes time for each
    return tiny.save_network(tmp_path_factory.mktemp("run") / "best.pt", config)


def test_onnx(path, tmp_path, capsys):
    out = tmp_path / "new" / "x.onnx"
    assert main(["export", path, "--out", str(out)]) == 0
    assert "onnxruntime agrees" in capsys.readouterr().out
    assert [p.name for p in out.parent.iterdir()] == ["x.onnx"]
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    network, state = checkpoint.load_network(path)
    images = torch.rand(3, 3, *tiny.CROP)
    (logits,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = F.interpolate(network(images).logits, tiny.CROP, mode="bilinear")
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)
    notes = session.get_modelmeta().custom_metadata_map
    assert json.loads(notes["classes"]) == state["classes"]
    assert str(tmp_path.parent.parent).encode() not in out.read_bytes()
    assert export.__file__.encode() not in out.read_bytes()  # no paths of this machine


def test_safetensors(path, tmp_path):
    out = tmp_path / "x.safetensors"
    assert main(["export", path, "--out", str(out)]) == 0
    state = checkpoint.load(path)
    with safe_open(out, "pt") as file:
        assert set(file.keys()) == set(state["model"])
        assert all(torch.equal(file.get_tensor(name), value) for name, value in state["model"].items())
        assert json.loads(file.metadata()["classes"]) == state["classes"]
        assert json.loads(file.metadata()["model"])["arch"] == "FPN"


class Drifting(nn.Module):
    """Behaves differently after it has been traced."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, images):
        return Output(self.conv(images) * (1.0 if torch.compiler.is_compiling() else 1.5), {}, None)


def test_a_file_that_differs_is_not_kept(path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "load_network", lambda path: (Drifting(), checkpoint.load(path)))
    assert main(["export", path, "--out", str(tmp_path / "x.onnx")]) == 1
    assert "differ from the network's by" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_wrong_words(path, tmp_path, capsys):
    for words, says in (
        (["--out", "x.pt"], "must end in .onnx or .safetensors"),
        (["--out", "x.onnx", "--size", "60", "100"], "give --size 64 96"),
    ):
        assert main(["export", path, *words]) == 1
        assert says in capsys.readouterr().err
    assert main(["export", str(tmp_path / "absent.pt"), "--out", "x.onnx"]) == 1
    assert "no checkpoint" in capsys.readouterr().err


def test_missing_packages_say_how_to_install_them(path, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert main(["export", path, "--out", str(tmp_path / "x.onnx")]) == 1
    assert 'pip install "fastkd[train,export]"' in capsys.readouterr().err

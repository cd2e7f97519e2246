"""The command line, mostly in separate processes."""

import json
import os
import subprocess
import sys

import pytest
import torch

import fastkd
from fastkd.cli import _device, main


def command(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "fastkd.cli", *map(str, words)], capture_output=True, text=True, check=False, **options
    )


def test_info_says_which_backends_there_are(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    words = ("fastkd", "Python", "torch", "packages: ", "CPU: ", "reference  yes: plain PyTorch", "requested: auto")
    for word in (*words, "cuda, triton, reference"):
        assert word in out
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert lines["triton"].split()[1] in ("yes:", "no:")
    assert ("GPU: none" in out) == (torch.cuda.device_count() == 0)
    assert lines["kd"].split()[1] == fastkd.backend_info()["operators"]["kd"]["cpu"]


def test_usage_and_unknown_commands(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "predict" in capsys.readouterr().out
    assert main(["trian"]) == 2
    assert "no command 'trian'" in capsys.readouterr().err


def test_importing_fastkd_leaves_the_trainer_alone():
    code = (
        "import sys, fastkd, fastkd.cli; "
        "print([m for m in ('fastkd.train', 'accelerate', 'torchvision', 'triton') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.parametrize(
    "words",
    [["train"], ["eval", "x.pt"], ["predict", "x.pt", __file__], ["demo"]],
)
def test_missing_extras_say_how_to_install_them(words, monkeypatch, capsys):
    for name in [m for m in sys.modules if m.startswith("fastkd.train")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("jsonargparse", "accelerate", "tqdm", "torchvision"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(words) == 1
    assert 'pip install "fastkd[train]"' in capsys.readouterr().err


def test_train_eval(tmp_path, capsys):
    pytest.importorskip("accelerate")
    words = [
        "--data.options", '{"size": [64, 128], "length": 4}', "--data.val_options", '{"length": 2}', "--data.crop", "[64, 64]",
        "--model.arch", "FPN", "--model.encoder", "tu-mobilenetv3_small_050",
        "--train.steps", "2", "--train.batch_size", "2", "--train.device", "cpu", "--out", tmp_path / "run",
    ]  # fmt: skip
    done = command("train", *words)
    assert done.returncode == 0, done.stderr
    assert "run: mIoU" in done.stdout
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 2
    assert main(["train", *map(str, words)]) == 1
    again = capsys.readouterr().err
    assert "already holds a run" in again
    assert "Traceback" not in again

    best = str(tmp_path / "run" / "best.pt")
    assert main(["eval", best, "--device", "cpu"]) == 0
    assert "mIoU" in capsys.readouterr().out

    (tmp_path / "c.png").write_bytes(b"no image")
    assert main(["eval", str(tmp_path / "c.png")]) == 1
    assert "cannot read checkpoint" in capsys.readouterr().err


def test_a_terminal_that_is_not_utf8_loses_nothing(tmp_path):
    """Two seeds of one run, so the row contains a ±."""
    pytest.importorskip("accelerate")
    from tests.train import tiny, trees

    trees.folders(tmp_path / "data")
    (tmp_path / "data" / "classes.txt").write_text("straße\nlight\nthing\n", encoding="utf-8")
    runs = []
    for seed in (0, 1):
        config = tiny.config(tmp_path / f"run{seed}", seed=seed)
        config.data.name, config.data.root = "folders", str(tmp_path / "data")
        from fastkd.train.data import build_dataset

        dataset = build_dataset("folders", root=tmp_path / "data", split="val")
        runs.append(tmp_path / f"run{seed}" / "last.pt")
        tiny.save_network(runs[-1], config, dataset)
    words = ["eval", *runs, "--json", tmp_path / "s.json", "--device", "cpu"]
    done = command(*words, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "stra?e" in done.stdout
    assert "| run0 | 2 |" in done.stdout
    assert len(json.loads((tmp_path / "s.json").read_text())["networks"]) == 2


@pytest.mark.parametrize("name", ["cud", "xla"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(
        ValueError, match=f"--device {name}: torch has no such device here .*; take cpu, or leave it out"
    ):
        _device(name)

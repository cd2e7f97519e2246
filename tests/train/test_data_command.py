"""`fastkd data`: its counts, checked by hand, and that it finds every damaged file."""

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("torchvision")

from fastkd.cli import main
from fastkd.train.data import build_dataset, check
from tests.train import trees


def test_counts_by_hand(tmp_path):
    trees.folders(tmp_path)
    for path in (tmp_path / "labels" / "train").rglob("*.png"):
        label = np.zeros(trees.SIZE, np.uint8)
        label[:12] = 2  # a quarter of the rows
        label[12:24] = 255
        trees.save(label, path)
    found = check.contents(build_dataset("folders", root=tmp_path, split="train"))
    assert found.images == 3
    assert found.pixels.tolist() == [3 * 24 * 64, 0, 3 * 12 * 64, 3 * 12 * 64]
    lines = check.table(["road", "traffic light", "thing"], {"train": found}).splitlines()
    assert [line.split()[-2:] for line in lines[1:]] == [
        ["66.67", "%"],
        ["light", "none"],
        ["33.33", "%"],
        ["25.00", "%"],
    ]


def test_command(tmp_path, capsys):
    trees.camvid(tmp_path)
    threads = torch.get_num_threads()
    words = ["data", "--recipe", "rdd-paper", "--data.name", "camvid", "--data.root", str(tmp_path)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "camvid: 11 classes, 3 training and 2 validation images" in out
    assert "one loader process: " in out
    assert "4 of them, on as many free cores: a batch of 16 every" in out
    assert torch.get_num_threads() == threads

    damaged = [tmp_path / "train" / "0001TP_001.png", tmp_path / "valannot" / "0001TP_000.png"]
    for path in damaged:
        path.write_bytes(b"")
    assert main([*words, "--check"]) == 1
    told = capsys.readouterr()
    assert all(f"{path} cannot be read" in told.err for path in damaged)
    assert "bicyclist" in told.out
    assert main(["data", "--data.name", "camvid", "--data.root", str(tmp_path / "nowhere")]) == 1
    assert "Set --data.root" in capsys.readouterr().err

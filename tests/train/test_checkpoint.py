"""A checkpoint is complete or absent, also after a kill, a truncated write or a full disk."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("accelerate")

from fastkd.train import checkpoint
from fastkd.train.checkpoint import LAST, PREVIOUS, CheckpointError
from fastkd.train.files import write_text, write_whole


def state(step):
    return {"model": {"w": torch.full((20_000,), float(step))}, "step": step}


def saved(out, *steps):
    for step in steps:
        checkpoint.save(state(step), out / LAST, previous=out / PREVIOUS)


def test_the_checkpoint_before_is_kept(tmp_path):
    saved(tmp_path, 1)
    assert not (tmp_path / PREVIOUS).exists()
    saved(tmp_path, 2, 3)
    assert checkpoint.load(tmp_path / LAST)["step"] == 3
    assert checkpoint.load(tmp_path / PREVIOUS)["step"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [PREVIOUS, LAST]


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def no_links(*args):
        raise OSError("Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    saved(tmp_path, 1, 2, 3)
    assert checkpoint.load(tmp_path / LAST)["step"] == 3
    assert checkpoint.load(tmp_path / PREVIOUS)["step"] == 2


def damaged(path, how):
    data = bytearray(path.read_bytes())
    if how == "cut":
        del data[len(data) // 2 :]
    elif how == "flipped":
        data[len(data) // 2] ^= 0x10
    elif how == "empty":
        data.clear()
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "flipped", "empty"])
def test_a_damaged_checkpoint_costs_one_interval(how, tmp_path):
    saved(tmp_path, 1, 2)
    damaged(tmp_path / LAST, how)
    with pytest.raises(CheckpointError, match=f"cannot read checkpoint {tmp_path / LAST}"):
        checkpoint.load(tmp_path / LAST)
    with pytest.warns(UserWarning, match=r"cannot read .*last\.pt: .*Going on from .*last\.prev\.pt, step 1"):
        found, is_last = checkpoint.load_last(tmp_path)
    assert (found["step"], is_last) == (1, False)
    assert torch.equal(found["model"]["w"], state(1)["model"]["w"])
    damaged(tmp_path / PREVIOUS, "cut")
    with pytest.raises(CheckpointError, match=LAST):
        checkpoint.load_last(tmp_path)


def test_a_checkpoint_that_is_gone(tmp_path):
    saved(tmp_path, 1, 2)
    (tmp_path / LAST).unlink()
    assert checkpoint.exists(tmp_path)
    with pytest.warns(UserWarning, match="no checkpoint"):
        assert checkpoint.load_last(tmp_path)[0]["step"] == 1
    (tmp_path / PREVIOUS).unlink()
    assert not checkpoint.exists(tmp_path)
    with pytest.raises(FileNotFoundError, match=LAST):
        checkpoint.load_last(tmp_path)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    saved(tmp_path, 1)

    def fails(values, target):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"cannot write .*last\.pt, .* GiB are free.*No space left.*--resume"):
        checkpoint.save(state(2), tmp_path / LAST, previous=tmp_path / PREVIOUS, writer=fails)
    assert checkpoint.load(tmp_path / LAST)["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == [LAST]


FULL = """
import resource, sys
from pathlib import Path
import torch
from fastkd.train import checkpoint
path = Path(sys.argv[1]) / "last.pt"
checkpoint.save({"model": {"w": torch.ones(1000)}, "step": 1}, path)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
checkpoint.save({"model": {"w": torch.ones(100_000)}, "step": 2}, path)
"""


def test_a_disk_that_is_full(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "CheckpointError: cannot write" in done.stderr
    assert "the disk or a limit on file sizes cuts it short" in done.stderr
    assert "What was saved before is whole: make room and go on with --resume" in done.stderr
    assert checkpoint.load(tmp_path / LAST)["step"] == 1


@pytest.mark.promise("whole-checkpoints")
def test_killed_at_any_moment(tmp_path):
    """A process that only saves is killed repeatedly: what remains can be read, and its step never decreases."""
    chance, newest = random.Random(0), 0
    for _ in range(25):
        child = os.fork()
        if not child:  # the child uses no torch threads
            for step in range(newest + 1, 10**9):
                saved(tmp_path, step)
        time.sleep(chance.uniform(0.001, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if checkpoint.exists(tmp_path):
            found = checkpoint.load(tmp_path / LAST)
            assert found["step"] >= newest
            assert torch.equal(found["model"]["w"], state(found["step"])["model"]["w"])
            newest = found["step"]
    assert newest > 10


def test_text_is_replaced_whole(tmp_path):
    path = tmp_path / "log"
    write_text(path, "one")

    def half(beside):
        beside.write_text("tw")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, half)
    assert path.read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["log"]

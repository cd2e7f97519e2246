"""Output of a run: log, progress, time left."""

import json
import sys

import pytest

pytest.importorskip("tensorboard")

from fastkd.train import log
from fastkd.train.log import Progress, RunLog, duration


def test_the_log_goes_on_after_the_step_that_was_saved(tmp_path):
    first = RunLog(tmp_path)
    first.open(keep_to=0)
    for step in (1, 2, 3):
        first.write(step, 1.0, "train", {"loss": 1 / 3})
    first.close()
    path = tmp_path / "log.jsonl"
    path.write_text(path.read_text() + '[3]\n{"step": 4, "spl')  # truncated by a kill
    second = RunLog(tmp_path)
    second.open(keep_to=2)
    second.write(3, 2.0, "train", {"loss": 0.25})
    second.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.333333), (2, 0.333333), (3, 0.25)]


def test_a_new_run_clears_the_old_one(tmp_path):
    for name in (*log.STALE, "panels/000001.jpg", "tensorboard/events"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    (tmp_path / "notes.txt").write_text("the user's own")
    run = RunLog(tmp_path)
    run.open(keep_to=0)
    run.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "notes.txt", "tensorboard"]
    assert not (tmp_path / "tensorboard" / "events").exists()


def test_of_several_processes_one_writes(tmp_path):
    run = RunLog(tmp_path / "out", enabled=False)
    run.open(keep_to=0)
    run.write(1, 1.0, "train", {"loss": 1.0})
    run.close()
    assert not (tmp_path / "out").exists()


def test_progress_in_a_file(capsys, monkeypatch):
    clock = iter([0.0, *(10.0 * i for i in range(1, 20))])
    monkeypatch.setattr(log.time, "perf_counter", lambda: next(clock))
    progress = Progress("run", total=108, done=100, show=True)
    for step in range(101, 109):
        progress.step(step, 0.5)
    progress.close()
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "run: step 101 of 108, loss 0.500, 10 s a step, 1 min 10 s left",
        "run: step 104 of 108, loss 0.500, 10 s a step, 40 s left",
        "run: step 107 of 108, loss 0.500, 10 s a step, 10 s left",
        "run: step 108 of 108, loss 0.500, 10 s a step, 0 s left",
    ]


def test_progress_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = Progress("run", total=4, done=1, show=True)
    progress.step(2, None)
    progress.step(3, 0.25)
    progress.close()
    said = capsys.readouterr().err
    assert "3/4" in said
    assert "loss=0.250" in said


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (200, "3 min 20 s"),
        (3599.9, "1 h"),
        (18720, "5 h 12 min"),
        (187200, "2 d 4 h"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text

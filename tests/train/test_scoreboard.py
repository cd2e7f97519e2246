"""Runs under one evaluation: seeds grouped, mean and deviation by hand, one scoring for all."""

import json
import statistics

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("segmentation_models_pytorch")

from fastkd.cli import main
from fastkd.train import checkpoint, engine, scoreboard
from fastkd.train.config import Config, DataConfig, EvalConfig
from fastkd.train.evaluation import Scores
from tests.train import tiny, trees


def entry(name, miou, hours=None, **changes):
    return scoreboard.Entry(name, Config(**changes), 10, hours, Scores(miou, miou + 0.1, {"a": miou, "b": None}))


def test_seeds_are_averaged_by_hand():
    entries = [
        entry("plain", 0.5, 1.0, seed=0),
        entry("kd", 0.7, seed=0, method="kd", teacher="t0.pt"),
        entry("plain-1", 0.6, 3.0, seed=1),
        entry("kd-1", 0.8, seed=1, method="kd", teacher="t1.pt"),
        entry("kd-2", 0.6, seed=2, method="kd", teacher="t2.pt"),
        entry("kd-2 again", 0.6, seed=2, method="kd", teacher="t2.pt", optim=tiny.OptimConfig(lr=1.0)),
    ]
    plain, kd, other = scoreboard.rows(entries)
    assert (plain["name"], plain["seeds"], plain["hours"]) == ("plain", 2, 2.0)
    assert plain["miou"] == pytest.approx(0.55)
    assert plain["miou_deviation"] == pytest.approx(0.05 * 2**0.5)
    assert (kd["name"], kd["seeds"], kd["hours"]) == ("kd", 3, None)
    assert kd["miou"] == pytest.approx(0.7)
    assert kd["miou_deviation"] == pytest.approx(statistics.stdev([0.7, 0.8, 0.6])) == pytest.approx(0.1)
    assert (other["seeds"], other["miou_deviation"]) == (1, None)
    text = scoreboard.table([plain, kd, other])
    assert "| plain | 2 | 10 | 2.00 | 55.00 ± 7.07 | 65.00 ± 7.07 |" in text
    assert "| kd-2 again | 1 | 10 |  | 60.00 | 70.00 |" in text
    assert scoreboard.class_table(entries[:2]).splitlines()[-1].split() == ["b", "absent", "absent"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds, and a run on other classes."""
    place = tmp_path_factory.mktemp("runs")
    data = {
        name: DataConfig(name=name, crop=tiny.CROP, **trees.TREES[name](place / name)) for name in ("camvid", "folders")
    }
    for name, seed in (("camvid", 0), ("camvid", 1), ("folders", 0)):
        config = tiny.config(place / f"{name}-{seed}", seed=seed)
        config.data, config.train.steps = data[name], 1
        engine.train(config, show=False)
    return place


def test_command(runs, capsys):
    words = ["eval", str(runs / "camvid-0"), str(runs / "camvid-1" / "best.pt"), "--device", "cpu"]
    assert main([*words, "--json", str(runs / "scores.json")]) == 0
    out = capsys.readouterr().out
    assert "bicyclist" in out
    assert "| camvid-0 | 2 | 1 | " in out
    told = json.loads((runs / "scores.json").read_text())
    own = json.loads((runs / "camvid-0" / "result.json").read_text())
    assert told["networks"][0]["miou"] == pytest.approx(own["miou"])
    assert told["networks"][0]["class_iou"] == pytest.approx(own["class_iou"])
    assert [n["seed"] for n in told["networks"]] == [0, 1]
    mean = statistics.mean(n["miou"] for n in told["networks"])
    assert told["rows"][0]["miou"] == pytest.approx(mean)
    assert told["rows"][0]["hours"] > 0

    sliding = ["--window", "48", "48", "--stride", "16", "32", "--scales", "1", "1.5", "--flip", "--limit", "1"]
    assert main([*words, *sliding, "--json", str(runs / "scores.json")]) == 0
    how = json.loads((runs / "scores.json").read_text())["eval"]
    assert (how["window"], how["stride"], how["scales"], how["flip"], how["limit"]) == (
        [48, 48],
        [16, 32],
        [1, 1.5],
        True,
        1,
    )


def test_what_cannot_be_compared(runs, capsys):
    assert main(["eval", str(runs / "camvid-0"), str(runs / "folders-0"), "--device", "cpu"]) == 1
    assert "knows the 3 classes road, traffic light, thing; the data of" in capsys.readouterr().err
    assert main(["eval", str(runs / "camvid-0"), "--root", str(runs / "folders")]) == 1
    assert "camvid: no folder" in capsys.readouterr().err
    assert main(["eval", str(runs)]) == 1
    assert f"no checkpoint {runs / 'last.pt'}" in capsys.readouterr().err
    assert main(["eval", str(runs / "camvid-0"), "--stride", "4", "4"]) == 1
    assert "set eval.window" in capsys.readouterr().err


def test_a_run_is_scored_by_its_last_step(runs):
    state = checkpoint.load(runs / "camvid-0" / "last.pt")
    found = scoreboard.score([runs / "camvid-0"], EvalConfig(), device=tiny.torch.device("cpu"))
    assert found[0].step == state["step"] == 1

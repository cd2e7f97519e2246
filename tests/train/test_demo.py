"""The demo in miniature: it ends in a page, skips what is finished, and trains again what has changed."""

import dataclasses

import pytest
import yaml

pytest.importorskip("accelerate")

from fastkd.train import checkpoint, demo


@pytest.fixture(scope="module")
def settings():
    values = yaml.safe_load(demo.SETTINGS.read_text())
    values["common"]["data"] |= {
        "options": {"size": [64, 128], "length": 4, "cache": True},
        "val_options": {"length": 4},
        "crop": [64, 64],
    }
    values["common"]["train"] |= {"batch_size": 2, "device": "cpu"}
    values["common"]["eval"] = {"every": 100, "limit": 2}
    values["student"]["train"] = {"steps": 2}
    values["teacher"] = values["student"] | {"model": values["student"]["model"] | {"aux": "encoder[-2]"}}
    values["methods"] = {name: values["methods"][name] for name in ("none", "rdd")}
    return values


def test_settings_of_the_package():
    runs = demo.configs(demo.Path("out"), yaml.safe_load(demo.SETTINGS.read_text()))
    assert list(runs) == ["teacher", "none", "kd", "nfd", "rdd", "nfd+rdd"]
    assert runs["teacher"].model.aux is not None
    students = [c for name, c in runs.items() if name != "teacher"]
    assert len({(c.seed, c.train.steps, c.optim.lr, c.model.encoder, str(c.data)) for c in students}) == 1
    assert all(c.teacher == "out/teacher/last.pt" for c in students if c.method != "none")


def test_demo(settings, tmp_path, capsys):
    page = demo.demo(tmp_path, settings)
    assert page == tmp_path / "report.html"
    html = page.read_text()
    for word in ("teacher", "student rdd", "TFE", "TSE"):
        assert word in html
    assert "[1/3] teacher, 2 steps: about" in capsys.readouterr().out

    runs = demo.configs(tmp_path, settings)
    assert [demo.run_state(config) for config in runs.values()] == ["finished"] * 3
    demo.demo(tmp_path, settings)
    assert capsys.readouterr().out.count("finished before") == 3

    changed = dataclasses.replace(runs["none"], seed=5)
    assert demo.run_state(changed) == "new"
    (tmp_path / "student" / "result.json").unlink()
    assert demo.run_state(runs["none"]) == "partial"
    state = checkpoint.load(tmp_path / "teacher" / "last.pt")
    state["model"]["aux_head.0.weight"] += 1
    checkpoint.save(state, tmp_path / "teacher" / "last.pt")
    assert demo.run_state(runs["rdd"]) == "new"  # of another teacher
    (tmp_path / "student" / "last.pt").write_bytes(b"cut")
    assert demo.run_state(runs["none"]) == "new"

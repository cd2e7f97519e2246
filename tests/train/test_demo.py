"""The demo in miniature: it writes the report, skips finished runs, and retrains what has changed."""

import dataclasses

import pytest
import yaml

pytest.importorskip("accelerate")

from fastkd.train import checkpoint, demo


@pytest.fixture(scope="module")
def settings():
    values = yaml.safe_load(demo.SETTINGS.read_text())
    small = {
        "data": {
            "options": {"size": [64, 128], "length": 8, "cache": True},
            "val_options": {"length": 4},
            "crop": [64, 64],
        },
        "train": {"steps": 2, "batch_size": 2, "device": "cpu", "precision": "no", "panels": 0},
        "eval": {"every": 100, "limit": 2},
    }
    for role in ("teacher", "student"):
        values[role] = demo.recipe.merge(values[role], small)
    return values


def test_settings_of_the_package():
    runs = demo.configs(demo.Path("out"), yaml.safe_load(demo.SETTINGS.read_text()))
    assert list(runs) == ["teacher", "plain-0", "plain-1", "cwd-0", "cwd-1"]
    assert runs["teacher"].model.aux is not None
    assert runs["teacher"].data.labelled == 1.0
    students = [c for name, c in runs.items() if name != "teacher"]
    assert {(c.seed, c.method) for c in students} == {(s, m) for s in (0, 1) for m in ("none", "cwd")}
    assert len({(c.train.steps, c.optim.lr, c.model.encoder, c.data.labelled) for c in students}) == 1
    assert all(
        (c.teacher, c.data.unlabelled) == ("out/teacher/last.pt", "rest") for c in students if c.method != "none"
    )


def test_demo(settings, tmp_path, capsys, quick):
    page = demo.demo(tmp_path, settings)
    assert page == tmp_path / "report.html"
    html = page.read_text()
    for word in ("teacher", "cwd (2 seeds)", "TFE", "TSE", "1 + 7"):
        assert word in html
    said = capsys.readouterr().out
    assert "[1/5] teacher, 2 steps: about" in said
    assert "| cwd (2 seeds) | cwd |" in said
    assert "The teacher (teacher)" in said

    runs = demo.configs(tmp_path, settings)
    assert [demo.run_state(config) for config in runs.values()] == ["finished"] * 5
    demo.demo(tmp_path, settings)
    assert capsys.readouterr().out.count("finished before") == 5

    changed = dataclasses.replace(runs["plain-0"], seed=5)
    assert demo.run_state(changed) == "new"
    (tmp_path / "plain-0" / "result.json").unlink()
    assert demo.run_state(runs["plain-0"]) == "partial"
    state = checkpoint.load(tmp_path / "teacher" / "last.pt")
    state["model"]["aux_head.0.weight"] += 1
    checkpoint.save(state, tmp_path / "teacher" / "last.pt")
    assert demo.run_state(runs["cwd-0"]) == "new"  # it had another teacher
    (tmp_path / "plain-0" / "last.pt").write_bytes(b"cut")
    assert demo.run_state(runs["plain-0"]) == "new"

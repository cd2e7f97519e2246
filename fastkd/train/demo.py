"""`fastkd demo`: a teacher, a plain student and four distilled ones on generated street scenes, compared in one page.

All values are in `demo.yaml`. The students start from the same weights and see the same crops; the page shows what came out,
also where a method does not help.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from fastkd.train import checkpoint, recipe
from fastkd.train.comparison import compare
from fastkd.train.config import Config, differences, from_dict, to_dict
from fastkd.train.engine import build_datasets, train
from fastkd.train.evaluation import SegmentationSet

SETTINGS = Path(__file__).with_name("demo.yaml")


def configs(out: Path, settings: dict[str, Any]) -> dict[str, Config]:
    """The runs in order: "teacher", then one per method; each has its directory under `out`."""
    runs = {"teacher": _config(settings, "teacher", {}, out=str(out / "teacher"), name="teacher")}
    for method, values in settings["methods"].items():
        name = "student" if method == "none" else f"student {method}"
        teacher = None if method == "none" else str(out / "teacher" / "last.pt")
        own = {"out": str(out / name.replace(" ", "-")), "name": name, "method": method, "teacher": teacher}
        runs[method] = _config(settings, "student", values, **own)
    return runs


def _config(settings: dict[str, Any], role: str, values: dict[str, Any], **own: Any) -> Config:
    merged: dict[str, Any] = {}
    for layer in (settings["common"], settings[role], values, own):
        merged = recipe.merge(merged, layer)
    return from_dict(Config, merged)


def demo(out: Path, settings: dict[str, Any] | None = None) -> Path:
    """Trains what is not finished yet and writes `<out>/report.html`; returns its path.

    A run is skipped if it finished with the same configuration and the same teacher, and goes on if it was interrupted.
    """
    settings = settings or yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    out = Path(out)
    runs = configs(out, settings)
    expected = {name: float(settings["seconds"][name]) for name in runs}
    datasets = None
    pace, taken, planned = 1.0, 0.0, 0.0  # pace: how many times as long as expected a run takes here
    for number, (name, config) in enumerate(runs.items(), 1):
        state = run_state(config)
        head = f"[{number}/{len(runs)}] {config.name}, {config.train.steps} steps"
        if state == "finished":
            print(f"{head}: finished before", flush=True)
            continue
        if datasets is None:
            datasets = _paint(config)
        left = sum(expected[other] for other in list(runs)[number - 1 :] if run_state(runs[other]) != "finished")
        print(f"{head}: about {_minutes(pace * expected[name])}; all runs: about {_minutes(pace * left)}", flush=True)
        started = time.perf_counter()
        train(config, resume=state == "partial", overwrite=state == "new", datasets=datasets)
        if state == "new":
            taken, planned = taken + time.perf_counter() - started, planned + expected[name]
            pace = taken / planned
    print("writing the report", flush=True)
    return report(out, runs)


def _paint(config: Config) -> tuple[SegmentationSet, SegmentationSet]:
    """The data sets, with every scene painted into their caches."""
    datasets = build_datasets(config.data)
    for dataset, what in zip(datasets, ("training", "validation"), strict=True):
        for index in tqdm(range(len(dataset)), desc=f"painting {what} scenes", dynamic_ncols=True):
            dataset[index]
    return datasets


def run_state(config: Config) -> str:
    """ "finished", "partial" (can be resumed), or "new": nothing there, or of another configuration, or another teacher."""
    out = Path(config.out)
    if not checkpoint.exists(out):
        return "new"
    try:
        state, _ = checkpoint.load_last(out)
        if differences(state["config"], to_dict(config)):
            return "new"
        if config.teacher and state["teacher_digest"] != checkpoint.digest(checkpoint.load(config.teacher)["model"]):
            return "new"
    except (checkpoint.CheckpointError, FileNotFoundError):
        return "new"
    return "finished" if state["step"] == config.train.steps and (out / "result.json").exists() else "partial"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def report(out: Path, runs: dict[str, Config]) -> Path:
    """The page about all runs."""
    student, teacher = runs["none"], runs["teacher"]
    notes = (
        f"Street scenes painted by the package: {teacher.data.options['length']} for training, "
        f"{teacher.data.val_options['length']} others for validation. "
        f"Teacher: {teacher.model.arch} on {teacher.model.encoder}, {teacher.train.steps} steps; students: "
        f"{student.model.arch} on {student.model.encoder}, {student.train.steps} steps each, all from random weights. "
        "The students share their first weights and every crop.\n\n"
        "This is a short run on a small data set: it shows that the parts work together and what they cost, not which "
        "method is best."
    )
    return compare(out, [Path(config.out) for config in runs.values()], title="FastKD demo", notes=notes)

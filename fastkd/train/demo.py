"""`fastkd demo`: the gain from distillation with few labels, on generated street scenes.

The teacher trains on all labels. Students get the labels of a sixteenth of the scenes; distilled ones also see the
others, unlabelled. All values are in `demo.yaml`. The result is a table and a page, also if distillation gains nothing.
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
from fastkd.train.runs import grouped, load_runs, verdict

SETTINGS = Path(__file__).with_name("demo.yaml")


def configs(out: Path, settings: dict[str, Any]) -> dict[str, Config]:
    """The runs in order, by name: the teacher, then each method with each seed; each has a directory under `out`."""
    runs = {"teacher": _config(settings["teacher"], {}, out=str(out / "teacher"), name="teacher")}
    for method, values in settings["methods"].items():
        teacher = None if method == "none" else str(out / "teacher" / "last.pt")
        for seed in settings["seeds"]:
            name = f"{'plain' if method == 'none' else method}-{seed}"
            own = {"out": str(out / name), "name": name, "method": method, "teacher": teacher, "seed": seed}
            runs[name] = _config(settings["student"], values, **own)
    return runs


def _config(role: dict[str, Any], values: dict[str, Any], **own: Any) -> Config:
    merged = recipe.load(role["recipe"])
    for layer in ({key: value for key, value in role.items() if key != "recipe"}, values, own):
        merged = recipe.merge(merged, layer)
    return from_dict(Config, merged)


def demo(out: Path, settings: dict[str, Any] | None = None) -> Path:
    """Trains what is not finished and writes `<out>/report.html`; returns its path.

    A run is skipped if it finished with the same configuration and teacher, and resumed if it was interrupted.
    """
    settings = settings or yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    out = Path(out)
    runs = configs(out, settings)
    seconds = settings["seconds"]
    expected = {name: float(seconds["teacher" if name == "teacher" else c.method]) for name, c in runs.items()}
    datasets = None
    pace, taken, planned = 1.0, 0.0, 0.0  # pace: measured time of a run divided by the expected time
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
    """The data sets, with every scene generated into their caches."""
    datasets = build_datasets(config.data)
    for dataset, what in zip(datasets, ("training", "validation"), strict=True):
        for index in tqdm(range(len(dataset)), desc=f"painting {what} scenes", dynamic_ncols=True, disable=None):
            dataset[index]
    return datasets


def run_state(config: Config) -> str:
    """ "finished", "partial" (can be resumed), or "new": no run, or one with another configuration or teacher."""
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
    """The page about all runs, and its table on the terminal."""
    teacher, student = runs["teacher"], next(c for c in runs.values() if c.teacher)
    scenes = teacher.data.options["length"]
    notes = (
        f"Street scenes generated by the package. The teacher ({teacher.model.arch} on {teacher.model.encoder}, "
        f"{teacher.train.steps} steps) has the labels of all {scenes} training scenes. The students ({student.model.encoder}, "
        f"{student.train.steps} steps) have the labels of {student.data.labelled} of them; the distilled ones also see the "
        f"others, without labels. {teacher.data.val_options['length']} other scenes are for validation; each score is that "
        "of the last step. All networks start from random weights."
    )
    page = compare(out, [Path(config.out) for config in runs.values()], title="FastKD demo", notes=notes)
    print((out / "table.md").read_text(encoding="utf-8").partition("## Each seed")[0].strip())
    print(*verdict(grouped(load_runs([config.out for config in runs.values()]))), sep="\n")
    return page

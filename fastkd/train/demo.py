"""`fastkd demo`: a teacher, a plain student and four distilled ones on generated street scenes, compared in one page.

All values are in `demo.yaml`. The students start from the same weights and see the same crops; the page shows what came out,
also where a method does not help.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from tqdm import tqdm

from fastkd import difficulty_mask, teacher_confidence
from fastkd.train import checkpoint
from fastkd.train.config import Config, differences, from_dict, to_dict
from fastkd.train.engine import build_datasets, train
from fastkd.train.evaluation import SegmentationSet, predict_logits
from fastkd.train.models import SegmentationModel
from fastkd.train.panels import colourise, heatmap, panel
from fastkd.train.report import write_report

SETTINGS = Path(__file__).with_name("demo.yaml")
SCENES = (3, 11, 27)  # of the validation set, in the pictures


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
        merged = _merge(merged, layer)
    return from_dict(Config, merged)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {k: _merge(base[k], v) for k, v in over.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return base | over | both


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
    if not (out / "last.pt").exists():
        return "new"
    try:
        state = checkpoint.load(out / "last.pt")
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
    """The page: table and curves from the runs' own files, and pictures of a few validation scenes."""
    networks = {name: checkpoint.load_network(Path(config.out) / "last.pt")[0] for name, config in runs.items()}
    _, scenes = build_datasets(runs["teacher"].data)
    student, teacher = runs["none"], runs["teacher"]
    notes = (
        f"Street scenes are painted by the package: {len(scenes)} for validation, other ones for training. "
        f"Teacher: {teacher.model.arch} on {teacher.model.encoder}, {teacher.train.steps} steps; students: "
        f"{student.model.arch} on {student.model.encoder}, {student.train.steps} steps each, all from random weights. "
        "The students share their first weights and every crop.\n\n"
        "This is a short run on a small data set: it shows that the parts work together and what they cost, not which "
        "method is best."
    )
    pictures = [
        ("What the networks see in validation scenes.", _predictions(networks, scenes, out / "predictions.png")),
        (
            "Relative difficulty. TFE: how far the teacher's two heads agree (bright: fully). TSE: pixels that one of "
            "student and teacher finds hard and the other easy, here for the student trained with RDD.",
            _difficulty(networks, scenes, out / "difficulty.png"),
        ),
    ]
    return write_report(out, [Path(c.out) for c in runs.values()], title="FastKD demo", notes=notes, panels=pictures)


def _logits(network: SegmentationModel, image: torch.Tensor) -> torch.Tensor:
    return predict_logits(network, image[None], (image.shape[-2], image.shape[-1]))


def _predictions(networks: dict[str, SegmentationModel], scenes: Any, path: Path) -> Path:
    palette = np.asarray(scenes.palette)
    rows = []
    for index in SCENES:
        image, label = scenes[index]
        seen = [colourise(_logits(n, image).argmax(1)[0].byte().numpy(), palette) for n in networks.values()]
        rows.append([image, colourise(label.numpy(), palette), *seen])
    titles = ["image", "label"] + [{"none": "plain student"}.get(name, name) for name in networks]
    return _save(panel(titles, rows, legend=scenes.classes, palette=palette), path)


@torch.no_grad()
def _difficulty(networks: dict[str, SegmentationModel], scenes: Any, path: Path) -> Path:
    palette = np.asarray(scenes.palette)
    rows = []
    for index in SCENES:
        image, label = scenes[index]
        teacher, student = networks["teacher"](image[None]), networks["rdd"](image[None])
        confidence = teacher_confidence(teacher.logits, teacher.aux, direction="main_aux")[0]
        mask = difficulty_mask(student.logits, teacher.logits, label[None].long())[0]
        maps = [colourise(out.logits.argmax(1)[0].byte().numpy(), palette) for out in (teacher, student)]
        rows.append(
            [
                image,
                colourise(label.numpy(), palette),
                *maps,
                heatmap(confidence.numpy()),
                heatmap(mask.float().numpy()),
            ]
        )
    titles = ["image", "label", "teacher", "student rdd", "TFE confidence", "TSE mask"]
    return _save(panel(titles, rows), path)


def _save(image: Image.Image, path: Path) -> Path:
    image.save(path)
    return path

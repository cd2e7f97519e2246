"""Reads runs from disk, groups them over seeds, and draws conclusions.

Truncated or damaged runs are shown as such and never stop a report.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fastkd.train.config import seeds_apart

NO_CLEAR_CHANGE = 0.5  # points of mIoU: smaller differences are noise
TEACHER_COLOUR, PLAIN_COLOUR = "#2b3138", "#8b939d"
COLOURS = ("#0b6bb3", "#d1580b", "#12876a", "#b14a8b", "#b98a00", "#4aa3d6", "#7a5cc0", "#8c5a3c")
PLAIN = ("none", "plain")  # names for "no distillation"
TEXTS, TABLES = (
    ("name", "method", "model"),
    ("class_iou", "images", "losses", "versions"),
)  # text in result.json; others are numbers

Points = list[tuple[float, float]]  # (step, value)


@dataclass
class Run:
    """The readable contents of a run directory; other fields are empty."""

    path: Path
    name: str
    result: dict[str, Any] = field(default_factory=dict)  # without values of the wrong type
    curves: dict[str, Points] = field(default_factory=dict)  # "train/loss", "val/miou", ...
    config: str = ""
    settings: dict[str, Any] = field(default_factory=dict)  # the parsed `config`
    problems: list[str] = field(default_factory=list)

    @property
    def method(self) -> str:
        return str(self.result.get("method") or self.settings.get("method") or "?")

    @property
    def finished(self) -> bool:
        return bool(self.result)

    @property
    def seed(self) -> Any:
        found = (as_number(values.get("seed")) for values in (self.result, self.settings))
        return next((int(seed) for seed in found if seed is not None), "unknown")

    @property
    def step(self) -> int | None:
        """The last logged step."""
        return max((int(points[-1][0]) for points in self.curves.values()), default=None)

    def counts(self, what: str) -> str:
        """Number of labelled + unlabelled training "images" or "crops"; "" if unknown."""
        kinds = [self.result.get("images", {}).get(kind) for kind in ("labelled", "unlabelled")]
        numbers = [as_number(kind.get(what)) for kind in kinds if isinstance(kind, dict)]
        return " + ".join(f"{n:.0f}" for i, n in enumerate(numbers) if n is not None and (n or i == 0))

    @property
    def about(self) -> str:
        """Seed, network and images of one run."""
        kinds = zip(self.counts("images").split(" + "), ("labelled", "unlabelled"), strict=False)
        images = " + ".join(f"{count} {kind}" for count, kind in kinds if count)
        images = images and f"{images} images, {self.counts('crops')} crops"
        return " · ".join(word for word in (f"seed {self.seed}", self.result.get("model"), images) if word)

    @property
    def versions(self) -> str:
        return ", ".join(f"{k} {v}" for k, v in self.result.get("versions", {}).items())

    def number(self, key: str) -> float | None:
        """A number of result.json; for scores, falls back to the last validation in the log."""
        logged: Points = self.curves.get(f"val/{key}", [(0, math.nan)])
        return as_number(self.result.get(key, logged[-1][1]))


@dataclass
class Group:
    """Runs that differ only in the seed; usually one.

    role: "teacher", "plain" (a student without distillation), "distilled", or "student" if unknown.
    """

    name: str
    runs: list[Run]
    role: str = "student"
    colour: str = PLAIN_COLOUR

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def method(self) -> str:
        return self.first.method

    @property
    def model(self) -> str:
        """Network, options and label share: what a plain and a distilled student must have in common to be compared."""
        run = next((run for run in self.runs if "model" in run.result), None)
        if run is None:
            return "?"
        model, data = (v if isinstance(v := run.settings.get(name), dict) else {} for name in ("model", "data"))
        return f"{run.result['model']} {model.get('options') or ''} {data.get('labelled', 1.0)}"

    @property
    def finished(self) -> bool:
        return all(run.finished for run in self.runs)

    def numbers(self, key: str) -> list[float]:
        return [value for run in self.runs if (value := run.number(key)) is not None]

    def mean(self, key: str) -> float | None:
        return statistics.fmean(values) if (values := self.numbers(key)) else None

    def spread(self, key: str) -> float | None:
        """Standard deviation over the seeds (n − 1); None for one seed."""
        return statistics.stdev(values) if len(values := self.numbers(key)) > 1 else None

    def scores(self) -> dict[Any, float]:
        """mIoU in percent of the finished runs, by seed."""
        return {run.seed: 100 * run.result["miou"] for run in self.runs if "miou" in run.result}

    def curve(self, name: str) -> list[tuple[float, float, float, float]]:
        """(step, mean, minimum, maximum) over the runs, at their common steps."""
        having = [dict(run.curves[name]) for run in self.runs if run.curves.get(name)]
        steps = sorted(set(having[0]).intersection(*having[1:])) if having else []
        columns = [(step, [values[step] for values in having]) for step in steps]
        return [(step, statistics.fmean(values), min(values), max(values)) for step, values in columns]


def load_runs(paths: Sequence[Path | str]) -> list[Run]:
    return [read_run(Path(path)) for path in paths]


def read_run(path: Path) -> Run:
    """Reads a run directory; `problems` names what is missing or damaged."""
    run = Run(path, path.name or str(path))
    if not path.is_dir():
        run.problems.append(f"no such run directory: {path}")
        return run
    try:
        result = json.loads((path / "result.json").read_text(encoding="utf-8"))
        if isinstance(result, dict):
            run.result = {key: value for key, value in result.items() if _fits(key, value)}
        else:
            run.problems.append("result.json does not hold an object")
    except FileNotFoundError:
        run.problems.append("no result.json: the run did not finish")
    except (OSError, ValueError) as error:
        run.problems.append(f"result.json cannot be read ({error})")
    run.name = run.result.get("name") or run.name
    try:
        run.config = (path / "config.yaml").read_text(encoding="utf-8", errors="replace")
        settings = yaml.safe_load(run.config)
        run.settings = settings if isinstance(settings, dict) else {}
    except OSError:
        run.problems.append("no config.yaml")
    except yaml.YAMLError:
        run.problems.append("config.yaml cannot be read")
    try:
        lines = (path / "log.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        run.problems.append("no log.jsonl: no curves")
        return run
    damaged = 0
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            step, split = int(entry.pop("step")), entry.pop("split", None)
        except (ValueError, KeyError, TypeError, OverflowError, AttributeError):
            damaged += bool(line.strip()) and number < len(lines)  # the last line may be truncated
            continue
        for key, value in entry.items():
            if as_number(value) is not None:
                run.curves.setdefault(f"{split}/{key}", []).append((step, float(value)))
    if damaged:
        run.problems.append(f"log.jsonl: {damaged} unreadable line{'s' if damaged > 1 else ''} left out")
    return run


def _fits(key: str, value: Any) -> bool:
    if key in TEXTS or key in TABLES:
        return isinstance(value, str if key in TEXTS else dict)
    return as_number(value) is not None


def as_number(value: Any) -> float | None:
    """The value if it is a finite number."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else None


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Groups runs that differ only in the seed, and assigns roles and colours.

    A group without distillation is the plain student if a distilled one has its model, otherwise a teacher.
    """
    found: list[list[Run]] = []
    for run in runs:
        same = next((members for members in found if all(_seeds_apart(member, run) for member in members)), None)
        if same is None:
            found.append([run])
        else:
            same.append(run)
    groups = [Group(_common_name(members), members) for members in found]
    students = {group.model for group in groups if group.method not in (*PLAIN, "?")}
    colours, fixed = iter(COLOURS * len(groups)), {"teacher": TEACHER_COLOUR, "plain": PLAIN_COLOUR}
    for group in groups:
        if group.method not in (*PLAIN, "?"):
            group.role = "distilled"
        elif group.method != "?" and students and any(run.finished for run in group.runs):
            group.role = "plain" if group.model in students else "teacher"
        group.colour = fixed.pop(group.role, "") or next(colours)  # a second plain student gets its own colour
    return groups


def _seeds_apart(a: Run, b: Run) -> bool:
    ends = [(run.result.get("model"), run.result.get("steps")) for run in (a, b)]
    return ends[0] == ends[1] and seeds_apart(a.settings, b.settings)


def _common_name(runs: Sequence[Run]) -> str:
    """The common name of a group without trailing seed numbers, if unique; otherwise the method."""
    if len(runs) == 1:
        return runs[0].name
    names = {re.sub(r"[-_. ]*(seed|s)?[-_. ]*\d+$", "", run.name) for run in runs}
    return (names.pop() if len(names) == 1 else "") or runs[0].method


def verdict(groups: Sequence[Group]) -> list[str]:
    """The conclusions that the finished runs' mIoU supports, as sentences."""
    whole = [group for group in groups if group.scores()]
    if len(groups) == 1:
        return [_alone(groups[0])]
    if not whole:
        return ["No run finished: there is nothing to compare."]
    lines: list[str] = []
    plain = {group.model: group for group in reversed(whole) if group.role == "plain"}
    teachers = [group for group in whole if group.role == "teacher"]
    distilled = [group for group in whole if group.role == "distilled"]
    for model, base in plain.items():
        gap = _score(teachers[0]) - _score(base) if len(teachers) == 1 else 0.0
        if gap:
            lines.append(
                f"The teacher ({teachers[0].name}) reaches {_said(teachers[0])} mIoU, the plain student ({base.name}) "
                f"{_said(base)}."
            )
            poor = "The teacher is no better than the plain student, so these runs say little about distillation."
            lines[-1] += f" The gap is {gap:.1f} points." if gap > 0 else f" {poor}"
        else:
            lines.append(f"The plain student ({base.name}) reaches {_said(base)} mIoU.")
        for other in (group for group in whole if group.role == "plain" and group.model == model):
            against = "the plain student" if other is base else f"{other.name} ({_said(other)})"
            found = [group for group in distilled if group.model == model]
            lines += _changes(other, found, against, gap if other is base else 0.0)
    if alone := [group.name for group in distilled if group.model not in plain]:
        lines.append(f"No plain student of the same model was finished, so nothing can be said of {', '.join(alone)}.")
    elif not plain:
        best = max(whole, key=_score)
        lines.append(f"There is no distilled run to judge. The best run is {best.name} with {_said(best)} mIoU.")
    if broken := [run.name for group in groups for run in group.runs if "miou" not in run.result]:
        lines.append(f"Left out of this comparison, because unfinished or unreadable: {', '.join(broken)}.")
    if plain and distilled and all(len(group.scores()) > 1 for group in [*plain.values(), *distilled]):
        lines.append(
            "± is the standard deviation over seeds. A difference counts as clear if it is larger than "
            f"{NO_CLEAR_CHANGE} points and than twice its standard error over the common seeds."
        )
    else:
        lines.append("Not every method has several seeds: a difference of this size can change with another seed.")
    return lines


def _alone(group: Group) -> str:
    if not group.scores():
        at = f"; it stopped at step {group.first.step}" if group.first.step is not None else ""
        return f"{group.name} did not finish, or cannot be read{at}."
    seeds = f" over {len(group.runs)} seeds" if len(group.runs) > 1 else ""
    return f"{group.name} reaches {_said(group)} mIoU{seeds} after {group.first.number('steps'):.0f} steps."


def _changes(base: Group, distilled: Sequence[Group], against: str, gap: float) -> list[str]:
    """Differences of the distilled groups from a plain student, sorted by certainty."""
    titles = {
        f"Gained over {against}, in points of mIoU": lambda change, clear: clear and change > 0,
        f"Lost against {against}": lambda change, clear: clear and change < 0,
        f"No clear difference from {against}": lambda change, clear: not clear,
    }
    said: list[tuple[str, float, bool]] = []
    for group in distilled:
        shared, change, error = _difference(group, base)
        text = f"{group.name} ({change:+.1f}"
        if len(shared) > 1:
            text += f" ± {error * math.sqrt(len(shared)):.1f} over {len(shared)} seeds"
        elif shared and len(group.scores()) + len(base.scores()) > 2:
            text += f" with seed {shared[0]}"
        if gap > NO_CLEAR_CHANGE and change > NO_CLEAR_CHANGE:
            text += f", {100 * change / gap:.0f} % of the gap"
        ours, theirs = (
            {"steps": g.first.result.get("steps"), "seed": ", ".join(map(str, g.scores()))} for g in (group, base)
        )
        taken, before = group.mean("seconds"), base.mean("seconds")
        if taken and before and (ours["steps"] != theirs["steps"] or not 0.9 < taken / before < 1.1):
            text += f", in {taken / before:.1f} times the time"
        unlike = [
            f"{k} {v} instead of {theirs[k]}"
            for k, v in ours.items()
            if v != theirs[k] and not (k == "seed" and shared)
        ]
        text += ")" + (f" [not like for like: {', '.join(unlike)}]" if unlike else "")
        said.append((text, change, abs(change) >= NO_CLEAR_CHANGE and abs(change) > 2 * error))
    lines = ((title, [text for text, change, clear in said if fits(change, clear)]) for title, fits in titles.items())
    return [f"{title}: {'; '.join(texts)}." for title, texts in lines if texts]


def _difference(group: Group, base: Group) -> tuple[list[Any], float, float]:
    """The common seeds, the mean change in points over them, and its standard error (0: unknown).

    Without common seeds, the change of the means.
    """
    ours, theirs = group.scores(), base.scores()
    shared = [seed for seed in ours if seed in theirs]
    changes = [ours[seed] - theirs[seed] for seed in shared] or [_score(group) - _score(base)]
    error = statistics.stdev(changes) / math.sqrt(len(shared)) if len(shared) > 1 else 0.0
    return shared, statistics.fmean(changes), error


def _score(group: Group) -> float:
    return statistics.fmean(group.scores().values())


def _said(group: Group) -> str:
    values = list(group.scores().values())
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread} %"

"""Reads runs from disk, groups them over seeds, and draws conclusions.

Truncated or damaged runs are shown as such and never stop a report.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fastkd.train.config import seeds_apart

NO_CLEAR_CHANGE = 0.5  # points of mIoU: smaller differences are noise
TEACHER_COLOUR, PLAIN_COLOUR = "#2b3138", "#8b939d"
COLOURS = ("#0b6bb3", "#d1580b", "#12876a", "#b14a8b", "#b98a00", "#4aa3d6", "#7a5cc0", "#8c5a3c")
UNDISTILLED = ("none", "?")  # methods; "?": unknown
TYPES: dict[str, type] = dict.fromkeys(("name", "method", "model"), str)  # in result.json; others are numbers
TYPES |= dict.fromkeys(("class_iou", "images", "losses", "versions"), dict)

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
        labelled, unlabelled = (self.number("images", kind, what) for kind in ("labelled", "unlabelled"))
        numbers = [] if labelled is None else [labelled, *([unlabelled] if unlabelled else [])]
        return " + ".join(f"{number:.0f}" for number in numbers)

    @property
    def about(self) -> str:
        """Seed, network and images of one run."""
        kinds = zip(self.counts("images").split(" + "), ("labelled", "unlabelled"), strict=False)
        images = " + ".join(f"{count} {kind}" for count, kind in kinds if count)
        images = images and f"{images} images, {self.counts('crops')} crops"
        return " · ".join(word for word in (f"seed {self.seed}", self.result.get("model"), images) if word)

    def number(self, *keys: str) -> float | None:
        """A number of result.json, by its keys; for scores, falls back to the last validation in the log."""
        value: Any = self.result
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        logged = self.curves.get(f"val/{'/'.join(keys)}", [(0, None)])
        return as_number(logged[-1][1] if value is None else value)


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

    def numbers(self, *keys: str) -> list[float]:
        return [value for run in self.runs if (value := run.number(*keys)) is not None]

    def mean(self, *keys: str) -> float | None:
        return statistics.fmean(values) if (values := self.numbers(*keys)) else None

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
        run.result = {key: value for key, value in result.items() if _fits(key, value)}
    except FileNotFoundError:
        run.problems.append("no result.json: the run did not finish")
    except AttributeError:
        run.problems.append("result.json does not hold an object")
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
    return isinstance(value, TYPES[key]) if key in TYPES else as_number(value) is not None


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
        members = next((members for members in found if all(_seeds_apart(member, run) for member in members)), None)
        if members is None:
            found.append(members := [])
        members.append(run)
    groups = [Group(_common_name(members), members) for members in found]
    students = {group.model for group in groups if group.method not in UNDISTILLED}
    colours, fixed = iter(COLOURS * len(groups)), {"teacher": TEACHER_COLOUR, "plain": PLAIN_COLOUR}
    for group in groups:
        if group.method not in UNDISTILLED:
            group.role = "distilled"
        elif group.method == "none" and students and any(run.finished for run in group.runs):
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
    if len(groups) == 1:
        return [_alone(groups[0])]
    whole = [group for group in groups if group.scores()]
    if not whole:
        return ["No run finished: there is nothing to compare."]
    lines: list[str] = []
    teachers = [group for group in whole if group.role == "teacher"]
    distilled = [group for group in whole if group.role == "distilled"]
    plain: dict[str, Group] = {}  # the first plain student of each model
    for base in (group for group in whole if group.role == "plain"):
        first = base is plain.setdefault(base.model, base)
        gap = _score(teachers[0]) - _score(base) if first and len(teachers) == 1 else 0.0
        if first:
            lines.append(_start(base, teachers[0] if gap else None, gap))
        against = "the plain student" if first else f"{base.name} ({_said(base)})"
        lines += _changes(base, [group for group in distilled if group.model == base.model], against, gap)
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
    steps = group.first.number("steps")
    return f"{group.name} reaches {_said(group)} mIoU{seeds}" + ("." if steps is None else f" after {steps:.0f} steps.")


def _start(plain: Group, teacher: Group | None, gap: float) -> str:
    if teacher is None:
        return f"The plain student ({plain.name}) reaches {_said(plain)} mIoU."
    poor = "The teacher is no better than the plain student, so these runs say little about distillation."
    return (
        f"The teacher ({teacher.name}) reaches {_said(teacher)} mIoU, the plain student ({plain.name}) {_said(plain)}. "
        + (f"The gap is {gap:.1f} points." if gap > 0 else poor)
    )


def _changes(base: Group, distilled: Sequence[Group], against: str, gap: float) -> list[str]:
    """Differences of the distilled groups from a plain student, sorted by certainty."""
    titles = {
        1: f"Gained over {against}, in points of mIoU",
        -1: f"Lost against {against}",
        0: f"No clear difference from {against}",
    }
    said = [_change(group, base, gap) for group in distilled]
    lines = ((title, [text for sign, text in said if sign == kind]) for kind, title in titles.items())
    return [f"{title}: {'; '.join(texts)}." for title, texts in lines if texts]


def _change(group: Group, base: Group, gap: float) -> tuple[int, str]:
    """The sign of the difference (0: not clear), and the difference in words, paired by seed where seeds are common."""
    ours, theirs = group.scores(), base.scores()
    shared = [seed for seed in ours if seed in theirs]
    changes = [ours[seed] - theirs[seed] for seed in shared] or [_score(group) - _score(base)]
    change, spread = statistics.fmean(changes), statistics.stdev(changes) if len(changes) > 1 else 0.0
    clear = abs(change) >= NO_CLEAR_CHANGE and abs(change) > 2 * spread / math.sqrt(len(changes))
    text = f"{group.name} ({change:+.1f}"
    if len(shared) > 1:
        text += f" ± {spread:.1f} over {len(shared)} seeds"
    elif shared and len(ours) + len(theirs) > 2:
        text += f" with seed {shared[0]}"
    if gap > NO_CLEAR_CHANGE and change > NO_CLEAR_CHANGE:
        text += f", {100 * change / gap:.0f} % of the gap"
    steps, base_steps = (g.first.result.get("steps") for g in (group, base))
    taken, before = group.mean("seconds"), base.mean("seconds")
    if taken and before and (steps != base_steps or not 0.9 < taken / before < 1.1):
        text += f", in {taken / before:.1f} times the time"
    unlike = [f"steps {steps} instead of {base_steps}"] if steps != base_steps else []
    if not shared:
        unlike.append(f"seed {', '.join(map(str, ours))} instead of {', '.join(map(str, theirs))}")
    text += ")" + (f" [not like for like: {', '.join(unlike)}]" if unlike else "")
    return (0 if not clear else 1 if change > 0 else -1), text


def _score(group: Group) -> float:
    return statistics.fmean(group.scores().values())


def _said(group: Group) -> str:
    return f"{with_deviation(group.scores().values())} %"


def with_deviation(values: Collection[float]) -> str:
    """Mean ± standard deviation (n − 1), the latter for several values."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"

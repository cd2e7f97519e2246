"""The log of a run: log.jsonl, TensorBoard events, progress, timings, versions."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from fastkd.train.checkpoint import LAST, PREVIOUS
from fastkd.train.files import write_text, write_whole

PACKAGES = ("torch", "torchvision", "accelerate", "segmentation_models_pytorch", "timm")
TIMES = ("step_s", "data_s", "loss_s")
LINE_SECONDS = 30.0
PANELS = "panels"  # folder of a run's pictures
STALE = ("result.json", "report.html", "table.md", "curves.png", LAST, PREVIOUS, "best.pt")


class RunLog:
    """`log.jsonl`, one object {"step", "time", "split", ...} per line; also TensorBoard scalars and pictures."""

    def __init__(self, out: Path, *, enabled: bool = True):
        self.out, self.enabled = out, enabled
        self.file: Any = None
        self.board: Any = None

    def open(self, *, keep_to: int) -> None:
        """Keeps lines of steps up to `keep_to` (0: none) and appends after them."""
        if not self.enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.out.mkdir(parents=True, exist_ok=True)
        path, board = self.out / "log.jsonl", self.out / "tensorboard"
        kept = []
        if keep_to and path.exists():
            kept = [line for line in path.read_text().splitlines() if _step(line) <= keep_to]
        elif not keep_to:
            for folder in (board, self.out / PANELS):
                shutil.rmtree(folder, ignore_errors=True)
            for name in STALE:
                (self.out / name).unlink(missing_ok=True)
        write_text(path, "".join(line + "\n" for line in kept))
        self.file = path.open("a", buffering=1)
        self.board = SummaryWriter(str(board), purge_step=keep_to + 1 if keep_to else None)

    def write(self, step: int, seconds: float, split: str, values: dict[str, float]) -> None:
        if not self.enabled:
            return
        line = {"step": step, "time": round(seconds, 3), "split": split} | {k: _round(v) for k, v in values.items()}
        self.file.write(json.dumps(line) + "\n")
        for name, value in values.items():
            self.board.add_scalar(f"{split}/{name}", value, step)

    def picture(self, step: int, image: Image.Image) -> None:
        """Writes `panels/<step>.jpg` and the same to TensorBoard."""
        if not self.enabled:
            return
        path = self.out / PANELS / f"{step:06d}.jpg"
        write_whole(path, lambda beside: image.save(beside, format="JPEG", quality=90))
        self.board.add_image("panel", np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.board.close()


class Progress:
    """A bar on a terminal, otherwise occasional lines; both with the remaining time."""

    def __init__(self, name: str, *, total: int, done: int, show: bool):
        self.name, self.total, self.first, self.show = name, total, done, show
        self.watched = show and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, desc=name, disable=not self.watched, dynamic_ncols=True)
        self.begun = time.perf_counter()
        self.spoke = self.begun - LINE_SECONDS

    def step(self, done: int, loss: float | None) -> None:
        """Called after each step; `loss` if it was read."""
        self.bar.update()
        if loss is None or not self.show:
            return
        self.bar.set_postfix(loss=f"{loss:.3f}")
        now = time.perf_counter()
        if self.watched or (now - self.spoke < LINE_SECONDS and done < self.total):
            return
        self.spoke = now
        pace = (now - self.begun) / (done - self.first)
        left = duration(pace * (self.total - done))
        self.say(f"step {done} of {self.total}, loss {loss:.3f}, {pace:.3g} s a step, {left} left")

    def say(self, text: str) -> None:
        if self.show:
            tqdm.write(f"{self.name}: {text}", file=sys.stderr)

    def close(self) -> None:
        self.bar.close()


def duration(seconds: float) -> str:
    """In words, with two units: "42 s", "3 min 20 s", "5 h 12 min", "2 d 4 h"."""
    seconds = round(seconds)
    for size, unit, part, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            whole, rest = divmod(round(seconds / part), size // part)
            return f"{whole} {unit} {rest} {smaller}" if rest else f"{whole} {unit}"
    return f"{seconds} s"


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # a line truncated by a crash
        return float("inf")


def _round(value: float) -> float:
    return float(f"{value:.6g}")


class Stopwatch:
    """Seconds per step, waiting for data, and in the losses (forward and backward).

    On a GPU the losses are timed with events that `means` reads, so that no step synchronises.
    """

    def __init__(self, device: torch.device, totals: dict[str, float] | None = None):
        self.cuda = device.type == "cuda"
        self._totals = {name: 0.0 for name in ("steps", *TIMES)} | (totals or {})
        self.events: list[tuple[Any, Any]] = []
        self._clear()

    def _clear(self) -> None:
        self.sums, self.count, self.events = dict.fromkeys(TIMES, 0.0), 0, []

    def begin(self) -> None:
        self.start = time.perf_counter()

    def data_ready(self) -> None:
        self.sums["data_s"] += time.perf_counter() - self.start

    def loss_begins(self) -> None:
        self.mark = self._now()

    def loss_ends(self) -> None:
        if self.cuda:
            self.events.append((self.mark, self._now()))
        else:
            self.sums["loss_s"] += self._now() - self.mark

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def end(self) -> None:
        self.sums["step_s"] += time.perf_counter() - self.start
        self.count += 1

    def _flush(self) -> dict[str, float]:
        if self.events:
            waiting = time.perf_counter()
            torch.cuda.synchronize()
            self.sums["step_s"] += time.perf_counter() - waiting
            self.sums["loss_s"] += sum(a.elapsed_time(b) for a, b in self.events) / 1000
        means = {name: self.sums[name] / max(self.count, 1) for name in TIMES}
        self._totals["steps"] += self.count
        for name in TIMES:
            self._totals[name] += self.sums[name]
        self._clear()
        return means

    def means(self) -> dict[str, float]:
        """Means over the steps since the last call."""
        return self._flush()

    def totals(self) -> dict[str, float]:
        """Sums over the run: steps, step_s, data_s, loss_s."""
        if self.count:
            self._flush()
        return dict(self._totals)


def versions() -> dict[str, str | None]:
    """Versions that a run's numbers depend on; "git" is the commit of the working directory, if it is a repository."""
    import fastkd

    found: dict[str, str | None] = {"python": platform.python_version(), "fastkd": getattr(fastkd, "__version__", None)}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["git"] = _commit()
    return found


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None

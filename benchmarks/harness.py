"""One harness for every benchmark: cases, rivals, timing, memory, errors, the table and the CSV.

All rivals of a case run in one process, one call of each after the other, so that a noisy machine disturbs all alike;
before every timed call a buffer larger than the caches is written. Reported are medians with the 20th and 80th
percentiles, and ratios of medians. A rival whose result fails the error check has no time printed.
"""

from __future__ import annotations

import csv
import ctypes
import datetime
import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import fastkd
from fastkd import backends

Loss = Callable[[Tensor, Tensor], Tensor]
RESULTS = Path(os.environ.get("FASTKD_RESULTS", Path(__file__).with_name("results")))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLUSH_BYTES = 64 * 2**20 if DEVICE == "cpu" else 256 * 2**20  # beyond the last-level cache
COLUMNS = (
    *("date", "commit", "device", "threads", "torch", "kernels", "op", "shape", "dtype"),
    *("rival", "p20_ms", "median_ms", "p80_ms", "floor_ms", "error", "extra_memory"),
)
MAX_ERROR = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Relative error of a gradient against float64 above which a time means nothing."""


@dataclass
class Case:
    """One loss on one shape.

    ``ours`` and ``plain`` map (student, teacher) to a 0-d loss; ``plain`` is what one writes in PyTorch and what
    ``torch.compile`` gets. ``floor(student, teacher, seconds)`` is the time the hardware needs for the work that no
    implementation can avoid, from the timed ``pieces``.
    """

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    ours: Loss
    plain: Loss
    pieces: Callable[[Tensor, Tensor], dict[str, Callable[[], object]]]
    floor: Callable[[dict[str, float]], float]
    targets: dict[str, float] = field(default_factory=dict)
    label_pixels: int | None = None  # of a loss at label resolution: its extra memory is given per label pixel
    max_error: float | None = None  # instead of MAX_ERROR's


@dataclass
class Row:
    case: Case
    times: dict[str, tuple[float, float, float]]  # rival -> 20 %, median, 80 % in milliseconds
    errors: dict[str, float]
    floor: float
    extra_bytes: int  # beyond the inputs and the gradient
    input_bytes: int

    def ratio(self, rival: str) -> float | None:
        if self.times.get("ours") is None or self.times.get(rival) is None:
            return None
        return self.times[rival][1] / self.times["ours"][1]

    @property
    def over_floor(self) -> float | None:
        return self.times["ours"][1] / self.floor if "ours" in self.times else None


def run(case: Case, seconds: float = 6.0) -> Row:
    """Checks every rival against float64, then times them interleaved for about ``seconds``."""
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(case.shape, generator=g).to(DEVICE, case.dtype) for _ in range(2))
    student.requires_grad_()
    torch._dynamo.reset()
    rivals = {"ours": case.ours, "eager": case.plain, "compile": torch.compile(case.plain, fullgraph=True)}

    def step(loss: Loss) -> Tensor:
        student.grad = None
        loss(student, teacher).backward()
        return student.grad

    truth_student = student.detach().double().requires_grad_()
    case.plain(truth_student, teacher.double()).backward()
    truth = truth_student.grad
    errors = {name: relative_error(step(loss), truth) for name, loss in rivals.items()}
    del truth, truth_student

    student.grad = None  # else the memory it gives back would hide as much of the new one
    extra = peak_memory(lambda: step(case.ours)) - student.nbytes
    calls = {name: (lambda loss=loss: step(loss)) for name, loss in rivals.items()} | case.pieces(
        student.detach(), teacher
    )
    times = interleave(calls, seconds)
    floor = case.floor({name: times.pop(name)[1] for name in list(times) if name not in rivals})
    limit = MAX_ERROR[case.dtype] if case.max_error is None else case.max_error
    kept = {name: t for name, t in times.items() if errors[name] <= limit}
    return Row(case, kept, errors, floor, max(extra, 0), student.nbytes + teacher.nbytes)


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def interleave(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, tuple[float, float, float]]:
    flush = torch.empty(FLUSH_BYTES // 4, device=DEVICE)
    for call in calls.values():
        call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(next(iter(samples.values()))) < 7:
        for name, call in calls.items():
            flush.fill_(1.0)
            samples[name].append(_milliseconds(call))
    return {name: _percentiles(values) for name, values in samples.items()}


def _milliseconds(call: Callable[[], object]) -> float:
    if DEVICE == "cpu":
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e3
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin_event.record()
    call()
    end_event.record()
    end_event.synchronize()
    return begin_event.elapsed_time(end_event)


def _percentiles(values: list[float]) -> tuple[float, float, float]:
    fifths = statistics.quantiles(values, n=5)
    return fifths[0], statistics.median(values), fifths[3]


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes by which memory peaks during ``call``, which must have run before: the allocator's on a GPU, the process's
    resident memory on a CPU (Linux)."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - allocated
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark

    def kib(key: str) -> int:
        return int(status.read_text().partition(f"{key}:")[2].split()[0])

    before = kib("VmRSS")
    call()
    return (kib("VmHWM") - before) * 1024


def copy_pieces(student: Tensor, teacher: Tensor) -> dict[str, Callable[[], object]]:
    """The bandwidth of this machine on these tensors: two reads and a write."""
    out = torch.empty_like(student)
    return {"add": lambda: torch.add(student, teacher, out=out)}


def exp_pieces(student: Tensor, teacher: Tensor) -> dict[str, Callable[[], object]]:
    """And its exponentials: as many as the student has elements."""
    if DEVICE == "cuda":  # special-function units keep up with memory in every case here
        return copy_pieces(student, teacher)
    return copy_pieces(student, teacher) | {"exp": lambda: exponentials(student.numel())}


def exponentials(n: int) -> None:
    """The vector exponential of the kernels on ``n`` numbers that stay in the second-level cache (CPU), or from memory."""
    if DEVICE == "cuda":
        torch.rand(n, device=DEVICE).exp_()
        return
    chunk = torch.rand(32768 * torch.get_num_threads())
    for _ in range(-(-n // chunk.numel())):
        torch.ops.fastkd_cpu.exp(chunk)


def report(rows: list[Row]) -> str:
    """The rows as a Markdown table, each target beside what was measured."""

    def against(value: float | None, target: float | None, sign: str, unit: str = "×") -> str:
        if value is None:
            return "error check failed"
        text = f"{value:.2f}{unit}"
        if target is None:
            return text
        met = value >= target if sign == "≥" else value <= target
        return f"{text} ({sign} {target:g}: {'met' if met else 'missed'})"

    lines = [
        "| loss | shape | dtype | ours ms (20–80 %) | eager ÷ ours | compile ÷ ours | ours ÷ floor | extra memory "
        "| error: ours / eager |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        t = row.case.targets
        memory = f"{row.extra_bytes / row.input_bytes:.2%}"
        if row.case.label_pixels is not None:
            memory = against(row.extra_bytes / row.case.label_pixels, t.get("bytes"), "≤", " B a label pixel")
        ours = "error check failed"
        if "ours" in row.times:
            low, median, high = row.times["ours"]
            ours = f"{median:.2f} ({low:.2f}–{high:.2f})"
        lines.append(
            f"| {row.case.op} | {row.case.shape} | {_name(row.case.dtype)} | {ours} "
            f"| {against(row.ratio('eager'), t.get('eager'), '≥')} | {against(row.ratio('compile'), t.get('compile'), '≥')} "
            f"| {against(row.over_floor, t.get('floor'), '≤')} | {memory} "
            f"| {row.errors['ours']:.1e} / {row.errors['eager']:.1e} |"
        )
    return "\n".join(lines)


def append(rows: list[Row], path: Path) -> None:
    """Adds the rows to a CSV file with what they were measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        for row in rows:
            for rival, error in row.errors.items():
                times = [f"{t:.4f}" for t in row.times[rival]] if rival in row.times else ["", "", ""]
                writer.writerow(
                    [
                        datetime.date.today().isoformat(),
                        commit(),
                        device(),
                        torch.get_num_threads() if DEVICE == "cpu" else "",
                        torch.__version__,
                        kernels(),
                        row.case.op,
                        "x".join(map(str, row.case.shape)),
                        _name(row.case.dtype),
                        rival,
                        *times,
                        f"{row.floor:.4f}",
                        f"{error:.2e}",
                        f"{row.extra_bytes / row.input_bytes:.4f}" if rival == "ours" else "",
                    ]
                )


def main(cases: list[Case], out: Path = RESULTS) -> str:
    """Runs the cases on the GPU if there is one, else on the CPU; prints the table, appends to ``cpu.csv`` or ``cuda.csv``."""
    if (reason := backends.why_not("cpu" if DEVICE == "cpu" else "triton")) is not None:
        sys.exit(f"nothing to measure: {reason}")
    rows = []
    for case in cases:
        print(f"… {case.op} {case.shape} {_name(case.dtype)}", file=sys.stderr)
        rows.append(run(case))
    append(rows, out / f"{DEVICE}.csv")
    where = f"{device()}, {torch.get_num_threads()} threads" if DEVICE == "cpu" else device()
    table = f"{where}, torch {torch.__version__}, {kernels()}, commit {commit()}\n\n{report(rows)}"
    print(table)
    return table


def kernels() -> str:
    """What the measured kernels are: the instruction set of the C++ ones, or Triton's version."""
    return fastkd.backend_info()["backends"]["cpu" if DEVICE == "cpu" else "triton"]["detail"]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def commit() -> str:
    out = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    return out.stdout.strip() or "unknown"


def device() -> str:
    if DEVICE == "cuda":
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
        return f"{torch.cuda.get_device_name()}, driver {driver.stdout.strip() or 'unknown'}"
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

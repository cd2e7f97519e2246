"""The benchmark harness: cases, rivals, timing, memory, errors, records and their CSV.

All rivals of a case run in one process in turns, one call each, so that noise affects all alike; before every timed
call a buffer larger than the caches is written. Results are medians with the 20th and 80th percentiles, and ratios of
medians. A rival whose gradient fails the float64 check gets no time. docs/benchmarks.md describes the method.
"""

from __future__ import annotations

import csv
import ctypes
import datetime
import functools
import gc
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import fastkd
from fastkd import backends

from .roofline import Work, special_function_rate

Loss = Callable[[Tensor, Tensor], Tensor]
Record = dict[str, str]
"""One rival of one case: a row of the CSV, with values as written there, "" for none."""
Shape = tuple[int, int, int, int]

RESULTS = Path(__file__).with_name("results")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLUSH_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}  # beyond the last-level cache
SECONDS = {"cpu": 6.0, "cuda": 0.8}  # of timing per case
WHERE = ("date", "commit", "device", "driver", "threads", "torch", "kernels")
COLUMNS = (
    *WHERE,
    *("op", "shape", "size", "dtype", "rival", "p20_ms", "median_ms", "p80_ms", "floor_ms", "bytes", "copy_gbs"),
    *("error", "peak_bytes", "retained_bytes", "host_us", "note"),
)
KEY = ("device", "op", "shape", "size", "dtype")
"""Columns that identify a case on a machine."""
MAX_ERROR = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Maximum relative error of a gradient against float64; beyond it a time is meaningless."""


@dataclass
class Case:
    """One loss on one shape.

    ``rivals(device, shape)`` returns {name: a function of (student, teacher) that returns a 0-d loss} for maps of
    ``shape``. "ours" and "eager" are always present; "eager" is the usual PyTorch code, and the input of
    ``torch.compile``. A string instead of a function is the reason why a rival is missing.
    """

    op: str
    shape: Shape
    dtype: torch.dtype
    rivals: Callable[[str, Shape], dict[str, Loss | str]]
    work: Work
    size: tuple[int, int] | None = None  # of the labels, for losses at label resolution
    targets: dict[str, float] = field(default_factory=dict)
    max_error: float | None = None  # overrides MAX_ERROR

    @property
    def scale(self) -> float:
        """Scale of the loss: fp16 gradients need one, as from torch.amp.GradScaler, or most of them round to 0."""
        return 2.0**16 if self.dtype == torch.float16 else 1.0

    @property
    def key(self) -> tuple[str, ...]:
        """KEY without the device, as in a record."""
        return (self.op, by_x(self.shape), by_x(self.size or ()), dtype_name(self.dtype))


def by_x(numbers: Iterable[int]) -> str:
    return "x".join(map(str, numbers))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run(case: Case, device: str = DEVICE, seconds: float | None = None) -> list[Record]:
    """Checks every rival against float64, measures its memory, then times all in turns for about ``seconds``.

    If float64 does not fit, the check uses as many samples as fit. Rivals that need more memory than available are
    skipped.
    """
    n, free = case.shape[0], free_bytes(device)
    checked = min(n, int(free // (float64_bytes(case) / n)))
    if checked == 0:
        needed = float64_bytes(case) / n / 2**30
        note = f"the float64 check of one sample needs {needed:.0f} GiB, {free / 2**30:.0f} are free"
        return [_record(case, device, "ours", note=note)]
    rivals = all_rivals(case, device, checked)
    records = check(case, device, rivals, checked)
    if checked < n:
        rivals = all_rivals(case, device, n)
        for record in records.values():
            record.setdefault("note", f"checked on {checked} of {n} samples")
    student, teacher = inputs(case, device, n)
    timed: dict[str, Callable[[], object]] = {}
    for name in [name for name, record in records.items() if record.get("passed")]:
        loss, needed = rivals[name], float64_bytes(case) / 2
        assert not isinstance(loss, str)
        if not name.startswith("ours") and needed > free:
            records[name]["note"] = f"needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free"
            continue
        try:
            gradient(loss, student, teacher)
            peak, retained = memory(loss, student, teacher, device)
        except Exception as failure:  # probably out of memory; the others are still timed
            records[name]["note"] = reason(failure)
            continue
        records[name] |= {"peak_bytes": str(peak), "retained_bytes": str(retained)}
        timed[name] = functools.partial(gradient, loss, student, teacher, case.scale)
        if device == "cuda":
            host = host_microseconds(functools.partial(loss, student, teacher)) - bare_launch_microseconds()
            records[name]["host_us"] = f"{host:.1f}"

    pieces = hardware(case, student.detach(), teacher, device)
    calls = timed | {name: call for name, (call, _) in pieces.items()}
    times = interleave(calls, device, SECONDS[device] if seconds is None else seconds)
    # Work per second of each piece.
    rates = {name: amount / (statistics.median(times[name]) / 1e3) for name, (_, amount) in pieces.items()}
    if device == "cuda" and (rate := special_function_rate(device_name(device))):
        rates["exponentials"] = rate
    floor = case.work.seconds(rates["bytes"], rates.get("exponentials"))
    for name in timed:
        low, median, high = percentiles(times[name])
        records[name] |= {"p20_ms": f"{low:.4f}", "median_ms": f"{median:.4f}", "p80_ms": f"{high:.4f}"}
    shared = {
        "floor_ms": f"{floor * 1e3:.4f}",
        "bytes": f"{case.work.bytes:.0f}",
        "copy_gbs": f"{rates['bytes'] / 1e9:.4g}",
    }
    return [_record(case, device, name, **shared, **values) for name, values in records.items()]


def inputs(case: Case, device: str, samples: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    shape = (samples, *case.shape[1:])
    student, teacher = (torch.randn(shape, generator=g).to(device, case.dtype) for _ in range(2))
    return student.requires_grad_(), teacher


def check(case: Case, device: str, rivals: Mapping[str, Loss | str], samples: int) -> dict[str, Record]:
    """{rival: its error, or the reason why it is not timed}; "passed" is in those that may be timed."""
    student, teacher = inputs(case, device, samples)
    truth = gradient(rivals["eager"], student.detach().double().requires_grad_(), teacher.double(), case.scale)
    limit = MAX_ERROR[case.dtype] if case.max_error is None else case.max_error
    records: dict[str, Record] = {}
    for name, loss in rivals.items():
        if isinstance(loss, str):
            records[name] = {"note": loss}
            continue
        try:
            error = relative_error(gradient(loss, student, teacher, case.scale), truth)
        except Exception as failure:  # no compiler or kernel, for example
            records[name] = {"note": reason(failure)}
            continue
        records[name] = {"error": f"{error:.2e}"}
        if error <= limit:
            records[name]["passed"] = "yes"
        else:  # NaN too
            records[name]["note"] = f"error check failed: {error:.1e} is above {limit:g}"
    return records


def reason(failure: Exception) -> str:
    return f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0][:120]}"


def all_rivals(case: Case, device: str, samples: int) -> dict[str, Loss | str]:
    """The case's own rivals, ``torch.compile`` of the eager one, and ours on every other backend available here."""
    torch._dynamo.reset()
    rivals = case.rivals(device, (samples, *case.shape[1:]))
    ours, eager = rivals["ours"], rivals["eager"]
    rivals["compile"] = torch.compile(eager, fullgraph=True)
    default = backends.choose("kd", torch.device(device))
    for name in ("cpu", "triton", "cuda"):
        if name != default and backends.why_not(name) is None and backends.runs_on(name, torch.device(device)):
            rivals[f"ours, {name}"] = functools.partial(_on_backend, name, ours)
    return rivals


def _on_backend(name: str, loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
    with fastkd.use_backend(name):
        return loss(student, teacher)


def gradient(loss: Loss, student: Tensor, teacher: Tensor, scale: float = 1.0) -> Tensor:
    """One forward and backward of ``scale`` times the loss."""
    student.grad = None
    value = loss(student, teacher)
    value.backward(None if scale == 1 else torch.full_like(value, scale))
    assert student.grad is not None
    return student.grad


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


# Memory


def float64_bytes(case: Case) -> int:
    """Approximate need of plain PyTorch in float64: 8 tensors of the student's size, or of that after the resize."""
    n, c, h, w = case.shape
    height, width = case.size or (h, w)
    return 8 * 8 * n * c * max(h * w, height * width)


def free_bytes(device: str) -> float:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    info = Path("/proc/meminfo")
    return int(info.read_text().partition("MemAvailable:")[2].split()[0]) * 1024 if info.exists() else float("inf")


def memory(loss: Loss, student: Tensor, teacher: Tensor, device: str) -> tuple[int, int]:
    """Bytes beyond the inputs: (peak of forward and backward minus the gradient; kept between the two).

    ``loss`` must have run before.
    """
    student.grad = None  # otherwise its freed memory would hide new allocations
    _settle(device)
    before, kept = bytes_in_use(device), [0]

    def step() -> None:
        value = loss(student, teacher)
        kept[0] = bytes_in_use(device) - before
        value.backward()

    peak = peak_memory(step, device) - student.nbytes
    student.grad = None
    return max(peak, 0), max(kept[0], 0)


def peak_memory(call: Callable[[], object], device: str = DEVICE) -> int:
    """Peak memory of ``call`` in bytes: of the allocator on a GPU, resident memory of the process on a CPU (Linux).
    ``call`` must have run before."""
    _settle(device)
    before = bytes_in_use(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    if not _STATUS.exists():
        return 0
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    call()
    return _status("VmHWM") - before


def bytes_in_use(device: str) -> int:
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return _status("VmRSS") if _STATUS.exists() else 0


def _settle(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
    elif _STATUS.exists():
        ctypes.CDLL(None).malloc_trim(0)


_STATUS = Path("/proc/self/status")


def _status(key: str) -> int:
    return int(_STATUS.read_text().partition(f"{key}:")[2].split()[0]) * 1024


# Time


def interleave(calls: dict[str, Callable[[], object]], device: str, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every call with cold caches, in turns."""
    flush = torch.empty(FLUSH_BYTES[device] // 4, device=device)
    for call in calls.values():
        call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    round_of = _cpu_round if device == "cpu" else _GpuRound(calls, flush)
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(next(iter(samples.values()))) < 7:
        for name, milliseconds in round_of(calls, flush).items():
            samples[name].append(milliseconds)
    return samples


def _cpu_round(calls: dict[str, Callable[[], object]], flush: Tensor) -> dict[str, float]:
    times = {}
    for name, call in calls.items():
        flush.fill_(1.0)
        begin = time.perf_counter()
        call()
        times[name] = (time.perf_counter() - begin) * 1e3
    return times


class _GpuRound:
    """Queues a whole round before waiting: the flushes before a call outlast its launch on the host, so the events
    around it measure the GPU and not Python."""

    def __init__(self, calls: dict[str, Callable[[], object]], flush: Tensor):
        fill_ms = statistics.median(self._timed(lambda: flush.fill_(1.0)) for _ in range(5))
        self.fills = {name: 1 + int(1.5 * host_microseconds(call, 3) / 1e3 / fill_ms) for name, call in calls.items()}

    @staticmethod
    def _timed(call: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    def __call__(self, calls: dict[str, Callable[[], object]], flush: Tensor) -> dict[str, float]:
        events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in calls}
        next(iter(calls.values()))()  # after a synchronisation the host is slow; the first timed call would show it
        for name, call in calls.items():
            for _ in range(self.fills[name]):
                flush.fill_(1.0)
            events[name][0].record()
            call()
            events[name][1].record()
        torch.cuda.synchronize()
        return {name: begin.elapsed_time(end) for name, (begin, end) in events.items()}


def host_microseconds(call: Callable[[], object], times: int = 30) -> float:
    """Median time until ``call`` returns on the host, with an empty queue, on a GPU."""
    taken = []
    for _ in range(times):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        taken.append((time.perf_counter() - begin) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(taken)


@functools.cache
def bare_launch_microseconds() -> float:
    """Host time of launching an empty Triton kernel."""
    import triton

    @triton.jit
    def nothing(x):
        pass

    x = torch.empty(16, device="cuda")
    nothing[(1,)](x)
    return host_microseconds(lambda: nothing[(1,)](x))


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th."""
    fifths = statistics.quantiles(values, n=5)
    return fifths[0], statistics.median(values), fifths[3]


def hardware(
    case: Case, student: Tensor, teacher: Tensor, device: str
) -> dict[str, tuple[Callable[[], object], float]]:
    """{what: (a call, its amount of work)}: bandwidth and, on a CPU, exponentials per second of this machine."""
    if device == "cuda":
        source = torch.empty(FLUSH_BYTES["cuda"], dtype=torch.uint8, device=device)
        copy = torch.empty_like(source)
        return {"bytes": (lambda: copy.copy_(source), 2.0 * source.nbytes)}
    out = torch.empty_like(student)
    pieces: dict[str, tuple[Callable[[], object], float]] = {
        "bytes": (lambda: torch.add(student, teacher, out=out), 3.0 * student.nbytes)
    }
    if case.work.exponentials:
        n = int(min(case.work.exponentials, 2**24))
        pieces["exponentials"] = (lambda: exponentials(n), float(n))
    return pieces


def exponentials(n: int) -> None:
    """The C++ kernels' vectorised exponential (PyTorch's without them) on ``n`` numbers that stay in the L2 cache."""
    chunk = torch.rand(min(n, 32768 * torch.get_num_threads()))
    exp = torch.ops.fastkd_cpu.exp if backends.why_not("cpu") is None else torch.exp_
    for _ in range(-(-n // chunk.numel())):
        exp(chunk)


# Records


def where(device: str) -> Record:
    """Columns that describe what was measured, and where."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "device": device_name(device),
        "driver": driver() if device == "cuda" else "",
        "threads": str(torch.get_num_threads()) if device == "cpu" else "",
        "torch": torch.__version__,
        "kernels": backends.backend_info()["backends"]["cpu" if device == "cpu" else "triton"]["detail"],
    }


def _record(case: Case, device: str, rival: str, **values: str) -> Record:
    values.pop("passed", None)
    record = dict.fromkeys(COLUMNS, "") | where(device) | dict(zip(KEY[1:], case.key, strict=True)) | {"rival": rival}
    if rival == "liger" and liger() is None:
        record["kernels"] = f"liger-kernel {importlib.metadata.version('liger-kernel')}"
    return record | values


def append(records: list[Record], path: Path, columns: Sequence[str] = COLUMNS) -> None:
    """Appends records to a CSV file; raises if its columns differ."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    if not new:
        with path.open(newline="") as file:
            found = next(csv.reader(file), [])
        if found != list(columns):
            raise ValueError(f"{path} has the columns {','.join(found)}; expected {','.join(columns)}")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(records)


def read(path: Path) -> list[Record]:
    """The records of a CSV file; none if it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        records = list(csv.DictReader(file))
    if any(None in r or None in r.values() for r in records):
        raise ValueError(f"{path} has a row with more or fewer fields than its header")
    return records


def measure(
    cases: Sequence[Case], path: Path | None, device: str = DEVICE, resume: bool = False, seconds: float | None = None
) -> list[Record]:
    """Runs the cases, appends each to ``path`` when done, and prints the current one to stderr.

    Args:
        resume: skip cases that ``path`` has from this commit and machine.
    """
    here = where(device)
    done = {
        tuple(r[k] for k in KEY)
        for r in (read(path) if path and resume else [])
        if r["commit"] == here["commit"] and r["torch"] == here["torch"]
    }
    records = []
    for case in cases:
        if (here["device"], *case.key) in done:
            continue
        print(f"… {' '.join(part for part in case.key if part)}", file=sys.stderr, flush=True)
        new = run(case, device, seconds)
        records += new
        if path is not None:
            append(new, path)
    return records


# Where this runs


@functools.cache
def liger() -> str | None:
    """Why Liger-Kernel cannot be timed, or None."""
    try:
        import liger_kernel.transformers  # noqa: F401
    except Exception as error:  # its many imports can fail in any way
        return f"Liger-Kernel cannot be imported ({error}); pip install liger-kernel"
    return None if DEVICE == "cuda" else "Liger-Kernel has no CPU kernels"


@functools.cache
def commit() -> str:
    """The checkout's commit; otherwise $FASTKD_COMMIT or the version of the installed package."""
    root = Path(__file__).parents[1]
    if (root / ".git").exists() and (root / "csrc").is_dir():
        command = ["git", "describe", "--always", "--dirty"]
        out = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
        if out.returncode == 0:
            return out.stdout.strip()
    return os.environ.get("FASTKD_COMMIT", f"of version {fastkd.__version__}")


@functools.cache
def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    except OSError:  # no NVIDIA card
        out = []
    return out[0].strip() if out else f"ROCm {torch.version.hip}" if torch.version.hip else "unknown"


class Row(NamedTuple):
    """The records of one case, by rival."""

    rivals: dict[str, Record]

    @property
    def ours(self) -> Record:
        return self.rivals["ours"]

    def same_run(self, record: Record) -> bool:
        """Whether ``record`` may be from the same run as the others."""
        return all(other[k] == record[k] for other in self.rivals.values() for k in ("date", "commit", "torch"))

    def value(self, rival: str, column: str) -> float | None:
        text = self.rivals.get(rival, {}).get(column, "")
        return float(text) if text else None

    def ratio(self, rival: str) -> float | None:
        """Time of ``rival`` divided by ours."""
        ours, other = self.value("ours", "median_ms"), self.value(rival, "median_ms")
        return other / ours if ours and other else None

    @property
    def over_floor(self) -> float | None:
        ours, floor = self.value("ours", "median_ms"), self.value("ours", "floor_ms")
        return ours / floor if ours and floor else None

    def copy_share(self, rival: str = "ours") -> float | None:
        """Bandwidth of the unavoidable bytes as a share of the copy bandwidth."""
        time_ms, moved, gbs = (self.value(rival, c) for c in ("median_ms", "bytes", "copy_gbs"))
        return moved / (time_ms / 1e3) / (gbs * 1e9) if time_ms and moved and gbs else None


def rows(records: Iterable[Record]) -> dict[tuple[str, ...], Row]:
    """The newest run of every case on every machine, by KEY, in the order of those runs."""
    found: dict[tuple[str, ...], Row] = {}
    for record in records:
        key = tuple(record[k] for k in KEY)
        if key in found and not found[key].same_run(record):
            del found[key]
        found.setdefault(key, Row({})).rivals[record["rival"]] = record
    return found


def newest(found: Mapping[tuple[str, ...], Row]) -> dict[tuple[str, ...], Row]:
    """The newest run of each case on any machine."""
    last = {key[1:]: key for key in found}
    return {key: row for key, row in found.items() if last[key[1:]] == key}

"""Which backend runs an operator, why, and how to force one.

The backend is chosen per call from the device of the tensors: ``cpu`` (C++) for CPU tensors, ``triton`` or ``cuda``
(CUDA C++) for CUDA tensors, whichever is preferred for the operator, ``reference`` (plain PyTorch, any device) if there
is no kernel. ``FASTKD_BACKEND`` or `use_backend` forces one. Nothing is loaded or compiled before the first call that
needs it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from ._namespace import KERNELS, LIBRARIES, NAMESPACES
from .ops import OPERATORS

NAMES = ("auto", "reference", "cpu", "triton", "cuda")

# Backends per device in order of preference. CUDA C++ for NFD takes only the groups for which it was measured to be the
# faster (``fits_cuda`` in ops/nfd.py). At label resolution it comes first because it compiles nothing at the first call
# and takes half of the host time; with 19 classes Triton's kernels for some losses are faster, by less than that.
CHOICE: dict[str, dict[str, tuple[str, ...]]] = {
    "nfd": {"cpu": ("cpu",), "cuda": ("cuda", "triton")},
    "kd": {"cpu": ("cpu",), "cuda": ("cuda", "triton")},
    "cwd": {"cpu": ("cpu",), "cuda": ("triton",)},
    "resized_cross_entropy": {"cpu": ("cpu",), "cuda": ("cuda", "triton")},
    "resized_kd": {"cpu": ("cpu",), "cuda": ("cuda", "triton")},
    "resized_shaped_cross_entropy": {"cpu": ("cpu",), "cuda": ("cuda", "triton")},
    "resized_dice": {"cpu": ("cpu",), "cuda": ("cuda", "triton")},
    "resized_binary_cross_entropy": {"cpu": ("cpu",), "cuda": ("cuda", "triton")},
    "kd_sigmoid": {"cpu": ("cpu",), "cuda": ("cuda", "triton")},
    "resized_kd_sigmoid": {"cpu": ("cpu",), "cuda": ("cuda", "triton")},
    "kd_confidence": {"cpu": ("cpu",), "cuda": ("triton",)},
    "teacher_confidence": {"cpu": ("cpu",), "cuda": ("triton",)},
    "difficulty_mask": {"cpu": ("cpu",), "cuda": ("cuda", "triton")},
}
# The measurement behind the GPU order; tests/test_benchmarks.py compares it with benchmarks/results/cuda_kernels.csv and
# cuda_host.csv.
BASIS = "H100 at 38e7138"
_FORCED = os.environ.get("FASTKD_BACKEND", "auto")  # read once: reading it costs as much as a small call
_DEVICE = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}
_LIBRARY = LIBRARIES["cpu"]
_CUDA_LIBRARY = LIBRARIES["cuda"]

_T = TypeVar("_T")
_why_not: dict[str, str | None] = {}
_libraries: list[torch.library.Library] = []  # operators live as long as their library object


class _ThisThread(threading.local):
    """Instance attributes, because Dynamo traces and guards them; a class attribute would hold for every thread."""

    def __init__(self) -> None:
        self.forced: str | None = None


_this_thread = _ThisThread()


def _constant_when_traced(fn: Callable[..., _T]) -> Callable[..., _T]:
    """``torch.compiler.assume_constant_result`` without importing the compiler."""
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


class BackendError(RuntimeError):
    """A forced backend cannot run."""


def define(backend: str) -> torch.library.Library:
    """Defines the operators of ``backend`` in its namespace; its library registers the kernels."""
    library = torch.library.Library(NAMESPACES[backend], "DEF")
    for operator in OPERATORS:
        if backend in operator.backends:
            library.define(operator.schema, tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"{NAMESPACES[backend]}::{operator.name}", operator.fake, lib=library)
    _libraries.append(library)
    return library


def _not_installed() -> str | None:
    """The reason if this is a clone's source tree, which Python started there imports instead of an installation."""
    if importlib.util.find_spec(KERNELS) is not None:
        return None
    return (
        f"{Path(__file__).parent} is the source tree, which has no built kernels and hides an installation; start Python "
        "in another folder, or run `pip install --no-build-isolation -e .`"
    )


def _load_cpu() -> str | None:
    path = Path(__file__).with_name(_LIBRARY)
    if not path.is_file():
        return _not_installed() or (
            "the C++ kernels were not built with this installation (no C++ compiler or no torch at build time); "
            "run `pip install --no-build-isolation .` where both are present"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the C++ kernels could not be loaded from {path}: {error}"
    define("cpu")
    return None


def _load_triton() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error}); `pip install triton` gives it where there is a wheel"
    interpreter = bool(triton.knobs.runtime.interpret)
    if not interpreter and not torch.cuda.is_available():
        return "torch finds no CUDA or ROCm device (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter)"
    if reason := _not_installed():
        return reason
    importlib.import_module(KERNELS).register(define("triton"))
    return None


def _load_cuda() -> str | None:
    # Built by the tests: the same kernels on CPU tensors, emulated thread by thread.
    emulation = os.environ.get("FASTKD_CUDA_EMULATION")
    path = Path(emulation) if emulation else Path(__file__).with_name(_CUDA_LIBRARY)
    if not path.is_file():
        return _not_installed() or (
            "the CUDA C++ kernels were not built with this installation (no nvcc at build time, or FASTKD_CUDA=0); "
            "run `pip install --no-build-isolation .` where nvcc and a CUDA build of torch are present"
        )
    if not emulation and not (torch.version.cuda and torch.cuda.is_available()):
        return "torch finds no CUDA device"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the CUDA C++ kernels could not be loaded from {path}: {error}"
    define("cuda")
    return None


@_constant_when_traced
def why_not(backend: str) -> str | None:
    """None if ``backend`` is loaded and can run, otherwise the reason. The first call loads it."""
    if backend not in _why_not:
        _why_not[backend] = {
            "cpu": _load_cpu,
            "triton": _load_triton,
            "cuda": _load_cuda,
        }[backend]()
    return _why_not[backend]


def requested() -> str:
    """The backend forced by `use_backend` or, at import, by ``FASTKD_BACKEND``; else ``"auto"``."""
    name = _this_thread.forced or _FORCED
    if name not in NAMES:
        raise ValueError(f"FASTKD_BACKEND is {name!r}; expected one of {', '.join(NAMES)}")
    return name


def choose(op: str, device: torch.device, cuda: bool = True) -> str:
    """The backend for ``op`` on tensors of ``device``.

    Args:
        op: a key of `CHOICE`.
        cuda: whether CUDA C++ is fast for this shape; if not, the next backend is chosen unless CUDA C++ is forced.

    Raises:
        BackendError: the forced backend cannot run on this machine or device.
        RuntimeError: a kernel would run inside a torch.func transform.
    """
    name = requested()
    if name == "reference":
        return "reference"
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "fastkd: the kernels have no rules for torch.func (grad, vmap, jvp, ...); use "
            '`with fastkd.use_backend("reference"):` around this loss'
        )
    if name == "auto":
        return _preferred(op, device.type, cuda)
    reason = why_not(name)
    if reason is None and name not in implementations(op):
        reason = f"it has no kernel for {op}"
    if reason is None and not runs_on(name, device):
        reason = f"it runs on {_DEVICE[name]} tensors and these are on {device.type}"
    if reason is not None:
        raise BackendError(f"backend {name!r} was forced but cannot run {op}: {reason}")
    return name


def _preferred(op: str, device: str, cuda: bool) -> str:
    candidates = CHOICE[op].get(device, ())
    for candidate in candidates:
        if (cuda or candidate != "cuda") and why_not(candidate) is None:
            return candidate
    if candidates:
        _warn_once(candidates[-1], device)
    return "reference"


@_constant_when_traced
def implementations(op: str) -> tuple[str, ...]:
    """The backends that have a kernel for ``op``."""
    return next(o.backends for o in OPERATORS if o.name in (op, f"{op}_forward"))


def runs_on(backend: str, device: torch.device) -> bool:
    """Whether a loaded ``backend`` takes tensors of ``device``; the interpreter and the emulation take CPU tensors."""
    if backend == "triton" and device.type == "cpu":
        return _interpreting()
    if backend == "cuda" and "FASTKD_CUDA_EMULATION" in os.environ:
        return device.type == "cpu"
    return _DEVICE[backend] == device.type


@_constant_when_traced
def _interpreting() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


_warned: set[str] = set()


@_constant_when_traced
def _warn_once(backend: str, device: str) -> None:
    if backend not in _warned:
        _warned.add(backend)
        warnings.warn(
            f"fastkd: no {backend} kernels for {device} tensors, using plain PyTorch instead: {_why_not[backend]}",
            stacklevel=4,
        )


class use_backend:
    """Context manager that forces a backend for all calls in the current thread.

    Args:
        name: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: unknown name.
        BackendError: the backend cannot run on this machine.
    """

    def __init__(self, name: str):
        if name not in NAMES:
            raise ValueError(f"use_backend: got {name!r}, expected one of {', '.join(NAMES)}")
        if name not in ("auto", "reference") and (reason := why_not(name)) is not None:
            raise BackendError(f"backend {name!r} cannot run: {reason}")
        self.name = name

    def __enter__(self) -> use_backend:
        self._outer, _this_thread.forced = _this_thread.forced, self.name
        return self

    def __exit__(self, *exc: object) -> None:
        _this_thread.forced = self._outer


def backend_info() -> dict[str, Any]:
    """The backends that are built, loaded and chosen, and why others are not.

    Returns:
        ``{"requested": name, "backends": {name: {"available": bool, "reason": str | None, "detail": str}},
        "operators": {op: {"kernels": [...], "cpu": chosen on CPU, "cuda": chosen on CUDA or None without a GPU,
        "cuda_order": order of preference on CUDA, "cuda_basis": the measurement behind it}}}``.
    """
    backends: dict[str, dict[str, Any]] = {
        "reference": {"available": True, "reason": None, "detail": f"plain PyTorch {torch.__version__}"}
    }
    for name in ("cpu", "triton", "cuda"):
        reason = why_not(name)
        backends[name] = {"available": reason is None, "reason": reason, "detail": "" if reason else _detail(name)}
    cuda = torch.cuda.is_available()
    return {
        "requested": requested(),
        "backends": backends,
        "operators": {
            op: {
                "kernels": list(implementations(op)),
                "cpu": _chosen(op, torch.device("cpu")),
                "cuda": _chosen(op, torch.device("cuda")) if cuda else None,
                "cuda_order": list(order["cuda"]),
                "cuda_basis": BASIS if len(order["cuda"]) > 1 else "nothing to choose from",
            }
            for op, order in CHOICE.items()
        },
    }


def _chosen(op: str, device: torch.device) -> str:
    try:
        return choose(op, device)
    except BackendError as error:
        return f"error: {error}"


def _detail(name: str) -> str:
    if name == "cuda":
        if "FASTKD_CUDA_EMULATION" in os.environ:
            return "CUDA C++, emulated on the CPU"
        return f"CUDA C++, {torch.cuda.get_device_name()}, sm_{''.join(map(str, torch.cuda.get_device_capability()))}"
    if name == "cpu":
        return f"C++, {getattr(torch.ops, NAMESPACES['cpu']).isa()}, {torch.get_num_threads()} threads"
    import triton

    return f"Triton {triton.__version__}" + (", interpreter" if _interpreting() else "")

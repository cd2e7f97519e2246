"""What the operator families share: finding a backend's operators, and keeping tensors for the backward."""

from __future__ import annotations

import heapq
import importlib
import itertools
from collections.abc import Callable, Hashable, Iterator
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

FAMILIES = ("nfd", "kd", "cwd", "resized_cross_entropy", "resized_kd", "rdd")


def families() -> list[ModuleType]:
    return [importlib.import_module(f".{name}", __package__) for name in FAMILIES]


def operators(backend: str):
    """The namespace that holds ``backend``'s operators, e.g. ``torch.ops.fastkd_cpu``."""
    if backend == "cuda":
        return torch.ops.fastkd_cuda
    return torch.ops.fastkd_cpu if backend == "cpu" else torch.ops.fastkd_triton


def schemas(family: ModuleType, backend: str) -> tuple:
    """The (schema, fake) of each operator that ``backend`` has of a family. CUDA has few, and lists them all."""
    if backend == "cuda":
        return getattr(family, "CUDA_OPERATORS", ())
    return family.OPERATORS + (getattr(family, "CPU_OPERATORS", ()) if backend == "cpu" else ())


def register_fakes(backend: str) -> None:
    """Tells torch the output shapes of ``backend``'s operators, which must be defined already."""
    for family in families():
        for schema, fake in schemas(family, backend):
            torch.library.register_fake(f"fastkd_{backend}::{schema.partition('(')[0]}", fake)


def accumulator(x: Tensor) -> torch.dtype:
    """What a map of this dtype is computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Saved:
    """Tensors kept for the backward.

    Autograd refuses to save inference tensors, which is what a teacher run under ``torch.inference_mode`` gives. They
    are constants, so holding them is enough; all others go through ``save_for_backward`` and its checks.
    """

    def __init__(self, ctx, *tensors: Tensor | None):
        if torch.compiler.is_compiling():  # tracing has no is_inference()
            inference = [False] * len(tensors)
        else:
            inference = [t is not None and t.is_inference() for t in tensors]
        self.held = [t if i else None for t, i in zip(tensors, inference, strict=True)]
        ctx.save_for_backward(*(None if i else t for t, i in zip(tensors, inference, strict=True)))

    def tensors(self, ctx) -> list[Tensor | None]:
        """What was kept, for a first derivative; a graph of this backward (``create_graph=True``) is refused, since the
        second derivative would silently be missing from it."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "fastkd: double backward (create_graph=True) is not implemented by the kernels; use "
                '`with fastkd.use_backend("reference"):` around the forward of this loss'
            )
        return [s if h is None else h for s, h in zip(ctx.saved_tensors, self.held, strict=True)]


class GradientAhead:
    """A gradient that was made in the forward, in fp32 (fp64) and not scaled yet.

    The first backward scales it in place and hands it out; a further one over the same graph makes it anew. A traced graph
    must not change what it has saved, and scales a copy.
    """

    def __init__(self, ctx, gradient: Tensor, *inputs: Tensor | None):
        self.traced = torch.compiler.is_compiling()
        self.gradient = None if self.traced else gradient
        self.saved = Saved(ctx, *((gradient,) if self.traced else inputs))

    def scaled(
        self, ctx, factor: Tensor, dtype: torch.dtype, make_anew: Callable[[list[Tensor | None]], Tensor]
    ) -> Tensor:
        saved = self.saved.tensors(ctx)
        if saved[0] is not None and self.traced:
            return (saved[0] * factor).to(dtype)
        gradient = make_anew(saved) if self.gradient is None else self.gradient
        self.gradient = None
        return gradient.mul_(factor).to(dtype)


class Guess:
    """A guess of the ``grad_output`` that a backward will get, kept on the device, for a gradient made in the forward.

    A gradient that is scaled afterwards costs the two transfers that making it early saved. So the forward scales it by the
    value that came the last two times, and the backward's kernel looks whether that was right: if not, it makes the
    gradient anew. Either way the bits are those of a gradient made in the backward, and the host waits for nothing.

    ``memory`` is (2,): the last value, and the next guess, NaN where the last two differ; forward and backward kernels read
    and write it. Graphs that are alive at once have memories of their own: the k-th of a step has the k-th memory of its
    kind each time, so that equal losses of unequal weight do not spoil each other's guesses.
    """

    _free: ClassVar[dict[Hashable, list[tuple[int, Tensor]]]] = {}  # heaps: the lowest index is handed out first
    _indices: ClassVar[dict[Hashable, Iterator[int]]] = {}

    def __init__(self, kind: Hashable, like: Tensor):
        self._kind = (kind, like.device)
        try:
            self._index, self.memory = heapq.heappop(self._free.setdefault(self._kind, []))
        except IndexError:
            self._index = next(self._indices.setdefault(self._kind, itertools.count()))
            self.memory = torch.full((2,), float("nan"), dtype=accumulator(like), device=like.device)
        self._held = True

    def release(self) -> None:
        if self._held:
            self._held = False
            heapq.heappush(self._free[self._kind], (self._index, self.memory))

    def __del__(self) -> None:
        self.release()

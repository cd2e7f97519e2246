"""An operator is one row: schema, fake, sample inputs, and the backends that implement it.

Each backend registers its rows in its own namespace (``fastkd_cpu``, ``fastkd_triton``, ``fastkd_cuda``), so that one
process can choose per call and compare them. Tests and benchmarks enumerate the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


def accumulator(*tensors: Tensor) -> torch.dtype:
    """Accumulator dtype: fp64 if any map is fp64, otherwise fp32."""
    for t in tensors:
        if t.dtype == torch.float64:
            return torch.float64
    return torch.float32


class Draw(NamedTuple):
    """Sample inputs: sizes, dtypes, memory format and device."""

    shape: tuple[int, int, int, int] = (2, 5, 4, 6)  # of maps
    size: tuple[int, int] = (9, 13)  # of labels
    dtype: torch.dtype = torch.float32
    label_dtype: torch.dtype = torch.int64
    layout: torch.memory_format = torch.contiguous_format
    device: str = "cpu"

    def map(self, seed: int, spatial: tuple[int, int] | None = None) -> Tensor:
        """(N, C, h, w): logits or features."""
        shape = (*self.shape[:2], *(spatial or self.shape[2:]))
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return x.to(self.device, self.dtype).to(memory_format=self.layout)

    def labels(self, spatial: tuple[int, int] | None = None) -> Tensor:
        """(N, H, W), ``size`` by default; about one in C + 1 is ignored (255)."""
        n, classes = self.shape[:2]
        g = torch.Generator().manual_seed(2)
        labels = torch.randint(0, classes + 1, (n, *(spatial or self.size)), generator=g)
        return torch.where(labels == classes, 255, labels).to(self.device, self.label_dtype)

    def elements(self) -> Tensor:
        """(N, C, H, W) of 0 and 1; about one in three is ignored (255)."""
        g = torch.Generator().manual_seed(5)
        elements = torch.randint(0, 3, (*self.shape[:2], *self.size), generator=g)
        return torch.where(elements == 2, 255, elements).to(self.device, self.label_dtype)

    def weight(self, *shape: int) -> Tensor:
        """Positive weights in the accumulator's dtype."""
        acc = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.rand(shape, generator=torch.Generator().manual_seed(3)).to(self.device, acc) + 0.5

    def mask(self) -> Tensor:
        """bool (N, H, W), ``size``."""
        g = torch.Generator().manual_seed(4)
        return (torch.rand(self.shape[0], *self.size, generator=g) < 0.6).to(self.device)


Samples = Callable[[Draw], Iterator[tuple[Any, ...]]]


class Operator(NamedTuple):
    """One operator. ``samples`` yields arguments for every combination of optional arguments."""

    schema: str
    fake: Callable[..., Any]
    samples: Samples
    backends: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.schema.partition("(")[0]


def _any_weight(*args: Any) -> bool:
    return False


@dataclass(frozen=True, eq=False)
class Loss:
    """A differentiable loss and the two or three operators that compute it.

    All take ``arguments`` (the student's tensor first, tensors before options), then ``reduction`` and ``scale``:

        "sum"   loss = scale * sum of the terms
        "mean"  loss = scale * sum of the terms / count, 0 where the count is 0
        "none"  loss = scale * term, for each pixel or group

    ``<name>_forward`` returns the loss and what it keeps (statistics of the groups, or the count). ``<name>_gradient``
    also returns the gradient of the reduced loss, from the same read and in the student's dtype and memory format: an
    early gradient. ``<name>_backward`` computes a late gradient from the upstream gradient and what was kept.
    """

    name: str
    arguments: str
    fake: Callable[..., tuple[Tensor, Tensor]]
    samples: Samples
    early: tuple[str, ...]
    """Backends with ``_gradient``."""
    late: tuple[str, ...] = ()
    """Backends with ``_backward``."""
    unit: Callable[..., float] = lambda *args: 1.0
    """The scale at which an fp16 gradient has values of about 1."""
    pixel_weight: int | None = None
    """Index of the pixel weight (N, H, W) among the arguments; "none" passes the upstream gradient through it."""
    any_weight: Callable[..., bool] = _any_weight
    """Whether there is a weight; the gradient at ``unit`` may then overflow fp16."""
    one_weight: Callable[..., tuple[int, ...]] | None = None
    """Shape of that argument with one number per sample; default: one per label pixel."""
    reductions: tuple[str, ...] = ("sum", "mean", "none")
    sample_scale: float = 0.7
    """``scale`` in the sample inputs; 1 if the operator accepts no other."""
    returns_kept: bool = False
    """Whether the caller also gets what the forward keeps."""

    tensors: int = field(init=False)
    """Number of tensor arguments."""

    def __post_init__(self) -> None:
        kinds = [a.split()[0] for a in self.arguments.split(", ")]
        object.__setattr__(self, "tensors", kinds.count("Tensor") + kinds.count("Tensor?"))

    def operators(self) -> tuple[Operator, ...]:
        forward = f"{self.arguments}, str reduction, float scale"
        backends = tuple(b for b in ("cpu", "triton", "cuda") if b in self.early + self.late)
        rows = [
            Operator(
                f"{self.name}_forward({forward}) -> (Tensor loss, Tensor kept)",
                self.fake,
                self._reduced("sum", "mean", "none"),
                backends,
            )
        ]
        if self.early:
            rows.append(
                Operator(
                    f"{self.name}_gradient({forward}) -> (Tensor loss, Tensor kept, Tensor gradient)",
                    self._gradient_fake,
                    self._reduced("sum", "mean"),
                    self.early,
                )
            )
        if self.late:
            rows.append(
                Operator(
                    f"{self.name}_backward(Tensor grad, {forward}, Tensor kept) -> Tensor",
                    self._backward_fake,
                    self._backward_samples,
                    self.late,
                )
            )
        return tuple(rows)

    def _reduced(self, *reductions: str) -> Samples:
        def samples(draw: Draw) -> Iterator[tuple[Any, ...]]:
            for args in self.samples(draw):
                for reduction in reductions:
                    if reduction in self.reductions:
                        yield (*args, reduction, self.sample_scale)

        return samples

    def _gradient_fake(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return (*self.fake(*args), torch.empty_like(args[0]))

    def _backward_fake(self, grad: Tensor, *args: Any) -> Tensor:
        return torch.empty_like(args[0])

    def _backward_samples(self, draw: Draw) -> Iterator[tuple[Any, ...]]:
        for args in self._reduced("sum", "none")(draw):
            loss, kept = self.fake(*args)
            yield torch.full_like(loss, 1.7), *args, torch.rand_like(kept) + 0.5

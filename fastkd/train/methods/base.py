"""Shared by the methods: the pair of networks, the compared features, and normalisation."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd.backends import requested
from fastkd.ranges import NonNegative
from fastkd.train.models import Feature, Output, SegmentationModel

Variant = Literal["published", "paper"]  # the code behind the published tables, or the paper's formula
CHUNK = 1 << 24  # elements of a similarity matrix alive at once; 64 MiB in fp32


class Pair(NamedTuple):
    """The networks a method is built for, and options of the run."""

    student: SegmentationModel
    teacher: SegmentationModel
    ignore_index: int = 255
    align_corners: bool = False


@dataclass
class FeatureConfig:
    """Options of every method that compares features.

    Args:
        weight: weight of the mean over the compared features.
        features: names of the taps (model.features) to compare; None: all that student and teacher share.
    """

    weight: NonNegative = 1.0
    features: tuple[str, ...] | None = None


class Distiller(nn.Module):
    """A distillation term: forward(student, teacher, labels) -> 0-d loss, weighted.

    Args:
        weight: its factor, to log.
        features: features that the student must return for it, by name.
        over_valid: whether it is a mean over labelled pixels.
    """

    def __init__(self, weight: float, features: dict[str, Feature] | None = None, *, over_valid: bool = False):
        super().__init__()
        self.weight, self.features, self.over_valid = weight, features or {}, over_valid

    def forward(self, student: Output, teacher: Output, labels: Tensor) -> Tensor:
        raise NotImplementedError


class OnLogits(Distiller):
    """`loss(student, teacher)` of the logits; `loss` has a `loss_weight`, as all losses here."""

    def __init__(self, loss: nn.Module):
        super().__init__(cast(float, loss.loss_weight))
        self.loss = loss

    def forward(self, student: Output, teacher: Output, labels: Tensor) -> Tensor:
        return self.loss(student.logits, teacher.logits)


class OnFeatures(Distiller):
    """Mean over the compared features of `loss(student, teacher)`, or `loss(student, teacher, labels)` if `labelled`.

    `adapt`: name of a method whose student features go through a trained 1x1 convolution if the teacher has other
    channels. Teacher features of another size are resized bilinearly to the student's. With `labelled`, only labelled
    images count.
    """

    def __init__(
        self,
        loss: nn.Module,
        config: FeatureConfig,
        pair: Pair,
        *,
        adapt: str | None = None,
        labelled: bool = False,
        over_valid: bool = False,
    ):
        keys, features = {}, {}
        for name in compared_features(pair, config.features):
            channels = pair.teacher.channels[name]
            adapted = adapt is not None and pair.student.channels[name] != channels
            keys[name] = f"{adapt}/{name}" if adapted else name
            features[keys[name]] = Feature(name, channels if adapted else None)
        super().__init__(cast(float, loss.loss_weight), features, over_valid=over_valid)
        self.keys = keys  # tap -> name under which the student returns it
        self.loss, self.labelled = loss, labelled

    def forward(self, student: Output, teacher: Output, labels: Tensor) -> Tensor:
        terms = []
        for name, key in self.keys.items():
            s, t = student.features[key], teacher.features[name]
            if self.labelled:
                s, t = s[: labels.shape[0]], t[: labels.shape[0]]
            pair = s, resize(t, s)
            terms.append(self.loss(*pair, labels) if self.labelled else self.loss(*pair))
        return torch.stack(terms).mean()


def compared_features(pair: Pair, names: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """The taps to compare: `names`, or all that both networks have. ValueError if there are none or one is missing."""
    taps = {"student": pair.student.feature_names, "teacher": pair.teacher.feature_names}
    shared = tuple(name for name in taps["student"] if name in taps["teacher"])
    for name in names or ():
        for who, have in taps.items():
            if name not in have:
                close = difflib.get_close_matches(name, have, n=1)
                hint = f"did you mean {close[0]!r}?" if close else "add it to model.features"
                raise ValueError(f"feature {name!r} is not tapped in the {who}, which has {list(have)}; {hint}")
    if names is None and not shared:
        raise ValueError(
            f"student taps the features {list(taps['student'])} and the teacher {list(taps['teacher'])}: no name in "
            "common; tap the features to compare under the same name (model.features)"
        )
    return shared if names is None else tuple(names)


def first(out: Output, count: int) -> Output:
    """The logits of the first `count` images of a batch."""
    if out.logits.shape[0] == count:
        return out
    return Output(out.logits[:count], {}, None if out.aux is None else out.aux[:count])


def resize(x: Tensor, like: Tensor) -> Tensor:
    """`x` (N, C, h, w) resized bilinearly to the size of `like`."""
    size = (like.shape[-2], like.shape[-1])
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


def precise(x: Tensor) -> Tensor:
    """In fp32, or fp64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


def unit(x: Tensor, dim: int) -> Tensor:
    """`x` divided by its Euclidean norm along `dim`; zero vectors stay zero and get gradient 0."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / torch.where(norm == 0, torch.inf, norm)


def mean(x: Tensor) -> Tensor:
    """The mean; 0 if empty."""
    return x.sum() / max(x.numel(), 1)


def check_variant(variant: str) -> None:
    if variant not in get_args(Variant):
        raise ValueError(f"variant: got {variant!r}, expected 'published' or 'paper'")


def no_autocast(x: Tensor) -> torch.autocast:
    """Disables autocast: matrix products in a loss need more than half precision."""
    return torch.autocast(x.device.type, enabled=False)


def sum_of_rows(like: Tensor, rows: int, columns: int, term: Callable[[int, int], Tensor]) -> Tensor:
    """Sum of `term(start, stop)` over spans of rows whose matrices have about CHUNK elements; 0 without rows.

    Spans are recomputed in the backward, so that only one span's matrices are alive at a time.
    """
    step = max(1, CHUNK // max(columns, 1))
    total = like[:0].sum()  # 0, connected to the graph
    if step >= rows:
        return total + term(0, rows) if rows else total
    backend = requested()

    def again(start: int, stop: int) -> Tensor:
        with fastkd.use_backend(backend):  # the backward may run under another forced backend
            return term(start, stop)

    for start in range(0, rows, step):
        total = total + checkpoint(again, start, min(start + step, rows), use_reentrant=False, preserve_rng_state=False)
    return total

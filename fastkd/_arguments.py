"""Validation and normalisation of the losses' arguments. Errors name the value, what was expected and the remedy."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from . import backends
from .ops import operator

_FLOATS = frozenset((torch.float32, torch.float16, torch.bfloat16, torch.float64))
_LABELS = frozenset((torch.uint8, torch.int32, torch.int64))
ANY_RANK = (3, 4, 5)
AXES = {3: "L", 4: "HW", 5: "DHW"}  # spatial axes by rank


def check_word(name: str, got: str, known: tuple[str, ...]) -> None:
    if got not in known:
        raise ValueError(f"{name}: got {got!r}, expected one of {', '.join(map(repr, known))}")


def check_number(
    name: str,
    got: float,
    *,
    minimum: float = -math.inf,
    above: float = -math.inf,
    maximum: float = math.inf,
    below: float = math.inf,
) -> None:
    check_constant(name, got)
    if not (minimum <= got <= maximum and above < got < below):  # False for NaN too
        bounds = [f"> {above}"] if above > -math.inf else [f">= {minimum}"]
        bounds.append(f"<= {maximum}" if maximum < math.inf else f"< {below}" if below < math.inf else "< infinity")
        raise ValueError(f"{name}: got {got}, expected a number {' and '.join(bounds)}")


def check_constant(name: str, x: object) -> None:
    """Kernels compute no gradient for constants, so a constant that requires grad is an error."""
    if isinstance(x, Tensor) and x.requires_grad:
        raise ValueError(f"{name}: requires grad, but it is taken as a constant; pass {name}.detach()")


def check_float(name: str, x: Tensor, ranks: tuple[int, ...] = (4,)) -> None:
    """(N, C, H, W) of a supported floating-point dtype; ``ranks`` 3 to 5 allow 1 to 3 spatial axes."""
    if isinstance(x, Tensor) and x.dtype in _FLOATS and x.dim() in ranks:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected a torch.Tensor")
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected float32, float16, bfloat16 or float64; cast it first")
    expected = "4 dimensions (N, C, H, W)"
    if len(ranks) > 1:
        expected = "3 to 5 dimensions: (N, C, L), (N, C, H, W) or (N, C, D, H, W)"
    raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {expected}")


def check_teacher(name: str, x: Tensor) -> None:
    if x.requires_grad:
        raise ValueError(
            f"{name}: requires grad, but no gradient is computed for a teacher; pass {name}.detach() or run the teacher "
            "under torch.no_grad()"
        )


def check_same(name: str, x: Tensor, other_name: str, other: Tensor, same_size: bool = True) -> None:
    if x.shape != other.shape:
        if x.dim() != other.dim():
            raise ValueError(
                f"{name}: got shape {tuple(x.shape)}, expected {other.dim()} dimensions like {other_name} {tuple(other.shape)}"
            )
        for axis, got, want in zip("NC" + AXES[x.dim()] if same_size else "NC", x.shape, other.shape, strict=False):
            if got != want:
                raise ValueError(
                    f"{name}: got shape {tuple(x.shape)}, expected the same {axis} as {other_name} {tuple(other.shape)}"
                    + ("; a 1x1 adapter can match C (NFDLoss has one)" if axis == "C" else "")
                    + ("; resize one to the other's size" if axis in "LDHW" else "")
                )
    check_device(name, x, other_name, other)


def check_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name}: is on {x.device}, expected {other.device} like {other_name}; move it with .to()")


def check_pair(student: Tensor, teacher: Tensor, same_size: bool = True, ranks: tuple[int, ...] = (4,)) -> None:
    if (  # fast path of every loss call
        isinstance(student, Tensor)
        and isinstance(teacher, Tensor)
        and student.dtype in _FLOATS
        and teacher.dtype in _FLOATS
        and student.dim() in ranks
        and student.shape == teacher.shape
        and student.device == teacher.device
        and not teacher.requires_grad
    ):
        return
    check_float("student", student, ranks)
    check_float("teacher", teacher, ranks)
    check_same("teacher", teacher, "student", student, same_size)
    check_teacher("teacher", teacher)


def check_target(
    target: Tensor, logits: Tensor, shape: tuple[int | None, ...], ignore_index: int, classes: int | None = None
) -> None:
    """Labels (N, H, W); None in ``shape`` matches any size. Values are checked on CPU, where it does not synchronise.

    Args:
        classes: number of classes; default: the number of channels.
    """
    if not isinstance(target, Tensor):
        raise TypeError(f"target: got {type(target).__name__}, expected a torch.Tensor of labels (N, H, W)")
    if target.dtype not in _LABELS:
        raise TypeError(f"target: got dtype {target.dtype}, expected uint8, int32 or int64 labels")
    _check_map("target", target, shape)
    check_device("target", target, "the logits", logits)
    if not _values_are_checked(target):
        return
    classes = logits.shape[1] if classes is None else classes
    bad = _first_bad_label(target, classes, ignore_index)
    if bad >= 0:
        raise IndexError(
            f"target: got label {int(target.flatten()[bad])}, expected 0 to {classes - 1} (C = {classes}) or ignore_index "
            f"{ignore_index}; map the labels to class indices, or pass the ignore_index they use"
        )


def _values_are_checked(target: Tensor) -> bool:
    """The check branches on a value: it cannot be traced, and it synchronises a GPU."""
    return not torch.compiler.is_compiling() and (target.is_cpu or os.environ.get("FASTKD_CHECK_LABELS") == "1")


def check_elements(target: Tensor, logits: Tensor, ignore_index: int) -> Tensor:
    """Returns targets of 0 and 1, (N, C, H, W) or for C = 1 (N, H, W), as (N, C, H, W) of a label dtype."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target: got {type(target).__name__}, expected a torch.Tensor of zeros and ones")
    if target.dtype == torch.bool:
        target = target.view(torch.uint8)
    if target.is_floating_point() or target.is_complex():
        raise TypeError(f"target: got dtype {target.dtype}, expected zeros and ones of an integer dtype or bool")
    if target.dtype not in _LABELS:
        target = target.long()
    n, classes = logits.shape[:2]
    if target.dim() == 3 and classes == 1:
        target = target[:, None]
    if target.dim() != 4 or target.shape[0] != n or target.shape[1] != classes:
        raise ValueError(
            f"target: got shape {tuple(target.shape)}, expected (N, C, H, W) with N and C of the logits {tuple(logits.shape)}"
            + ("; labels of classes go to resized_cross_entropy, or through F.one_hot" if target.dim() == 3 else "")
        )
    check_device("target", target, "the logits", logits)
    if _values_are_checked(target):
        bad = _first_bad_label(target, 2, ignore_index)
        if bad >= 0:
            raise IndexError(
                f"target: got {int(target.flatten()[bad])}, expected 0, 1 or ignore_index {ignore_index} (one class against "
                "the rest)"
            )
    return target


def _first_bad_label(target: Tensor, classes: int, ignore_index: int) -> int:
    if target.is_cpu and backends.why_not("cpu") is None:
        return int(operator("cpu", "first_bad_label")(target.contiguous(), classes, ignore_index))
    label = target.flatten().long()  # comparisons in uint8 would wrap the other operand
    bad = ((label < 0) | (label >= classes)) & (label != ignore_index)
    return int(bad.long().argmax()) if bool(bad.any()) else -1


def _check_map(name: str, x: Tensor, shape: tuple[int | None, ...]) -> None:
    got = x.shape
    wrong = len(got) != len(shape)
    if not wrong:
        for size, want in zip(got, shape, strict=True):
            wrong = wrong or (want is not None and size != want)
    if wrong:
        axes = "N" + AXES[len(shape) + 1]
        # Only on error: Dynamo cannot format a symbolic size.
        expected = ", ".join(axis if size is None else str(size) for axis, size in zip(axes, shape, strict=True))
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected ({expected})")


def check_pixel_weight(name: str, weight: Tensor, logits: Tensor, shape: tuple[int | None, ...]) -> None:
    """A constant map (N, H, W); None in ``shape`` matches any size."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(
            f"{name}: got {getattr(weight, 'dtype', type(weight))}, expected a floating-point tensor (N, H, W)"
        )
    check_constant(name, weight)
    _check_map(name, weight, shape)
    check_device(name, weight, "the logits", logits)


def check_class_weight(weight: Tensor, logits: Tensor, name: str = "class_weight") -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(f"{name}: got {getattr(weight, 'dtype', type(weight))}, expected a floating-point tensor (C,)")
    check_constant(name, weight)
    if weight.shape != (logits.shape[1],):
        raise ValueError(f"{name}: got shape {tuple(weight.shape)}, expected ({logits.shape[1]},), one per class")
    check_device(name, weight, "the logits", logits)


def as_map(x: Tensor) -> Tensor:
    """(N, C, ...) of any rank as (N, C, H, W), as a view if possible."""
    return x if x.dim() == 4 else x.unsqueeze(2) if x.dim() == 3 else x.flatten(3)


def dense_together(*maps: Tensor) -> tuple[Tensor, ...]:
    """All in one dense layout (the first's if dense), and all fp64 if any is; usually without a copy."""
    maps = one_precision(*maps)
    for x in maps:
        if not x.is_contiguous():
            break
    else:
        return maps
    layout = torch.contiguous_format
    if not maps[0].is_contiguous() and maps[0].is_contiguous(memory_format=torch.channels_last):
        layout = torch.channels_last
    return tuple([x.contiguous(memory_format=layout) for x in maps])


def dense_each(*maps: Tensor) -> tuple[Tensor, ...]:
    """Each in its own dense layout, NCHW-contiguous or channels_last, and all fp64 if any is."""
    return tuple(
        [x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous() for x in one_precision(*maps)]
    )


def dense(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """Contiguous, and in ``dtype`` if given."""
    return None if x is None else (x if dtype is None else x.to(dtype)).contiguous()


def one_precision(*maps: Tensor) -> tuple[Tensor, ...]:
    for x in maps:
        if x.dtype == torch.float64:
            return tuple([y.double() for y in maps])
    return maps

"""Checks and normal forms of the losses' arguments. Each error says what was got, what was expected, what to do."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from . import backends

_FLOATS = frozenset((torch.float32, torch.float16, torch.bfloat16, torch.float64))
_LABELS = frozenset((torch.uint8, torch.int32, torch.int64))


def check_word(name: str, got: str, known: tuple[str, ...]) -> None:
    if got not in known:
        raise ValueError(f"{name}: got {got!r}, expected one of {', '.join(map(repr, known))}")


def check_number(
    name: str, got: float, *, minimum: float = -math.inf, above: float = -math.inf, maximum: float = math.inf
) -> None:
    if not (minimum <= got <= maximum and above < got < math.inf):  # also refuses NaN
        bounds = [f"> {above}"] if above > -math.inf else [f">= {minimum}"]
        bounds.append(f"<= {maximum}" if maximum < math.inf else "< infinity")
        raise ValueError(f"{name}: got {got}, expected a number {' and '.join(bounds)}")


def check_float(name: str, x: Tensor) -> None:
    """(N, C, H, W) in one of the four floating-point dtypes."""
    if isinstance(x, Tensor) and x.dtype in _FLOATS and x.dim() == 4:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected a torch.Tensor")
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected float32, float16, bfloat16 or float64; cast it first")
    if x.dim() != 4:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected 4 dimensions (N, C, H, W)")


def check_teacher(name: str, x: Tensor) -> None:
    if x.requires_grad:
        raise ValueError(
            f"{name}: requires grad, but no gradient is computed for a teacher; pass {name}.detach() or run the teacher "
            "under torch.no_grad()"
        )


def check_same(name: str, x: Tensor, other_name: str, other: Tensor, same_size: bool = True) -> None:
    if x.shape != other.shape:
        for axis, got, want in zip("NCHW" if same_size else "NC", x.shape, other.shape, strict=False):
            if got != want:
                raise ValueError(
                    f"{name}: got shape {tuple(x.shape)}, expected the same {axis} as {other_name} {tuple(other.shape)}"
                    + ("; a 1x1 adapter can match C (NFDLoss has one)" if axis == "C" else "")
                    + ("; resize one to the other's size" if axis in "HW" else "")
                )
    check_device(name, x, other_name, other)


def check_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name}: is on {x.device}, expected {other.device} like {other_name}; move it with .to()")


def check_pair(student: Tensor, teacher: Tensor, same_size: bool = True) -> None:
    if (  # the usual case, at every call of every loss
        isinstance(student, Tensor)
        and isinstance(teacher, Tensor)
        and student.dtype in _FLOATS
        and teacher.dtype in _FLOATS
        and student.dim() == 4
        and student.shape == teacher.shape
        and student.device == teacher.device
        and not teacher.requires_grad
    ):
        return
    check_float("student", student)
    check_float("teacher", teacher)
    check_same("teacher", teacher, "student", student, same_size)
    check_teacher("teacher", teacher)


def check_target(target: Tensor, logits: Tensor, shape: tuple[int | None, ...], ignore_index: int) -> None:
    """Labels (N, H, W); a None in ``shape`` is any size. Values are checked on the CPU, where that costs no wait."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target: got {type(target).__name__}, expected a torch.Tensor of labels (N, H, W)")
    if target.dtype not in _LABELS:
        raise TypeError(f"target: got dtype {target.dtype}, expected uint8, int32 or int64 labels")
    _check_map("target", target, shape)
    check_device("target", target, "the logits", logits)
    # A branch on a value cannot be traced, and waits for a GPU.
    if torch.compiler.is_compiling() or not (target.is_cpu or os.environ.get("FASTKD_CHECK_LABELS") == "1"):
        return
    classes = logits.shape[1]
    bad = _first_bad_label(target, classes, ignore_index)
    if bad >= 0:
        raise IndexError(
            f"target: got label {int(target.flatten()[bad])}, expected 0 to {classes - 1} (C = {classes}) or ignore_index "
            f"{ignore_index}; map the labels to class indices, or pass the ignore_index they use"
        )


def _first_bad_label(target: Tensor, classes: int, ignore_index: int) -> int:
    if target.is_cpu and backends.why_not("cpu") is None:
        return int(torch.ops.fastkd_cpu.first_bad_label.default(target.contiguous(), classes, ignore_index))
    label = target.flatten().long()  # uint8 would wrap the numbers it is compared with
    bad = ((label < 0) | (label >= classes)) & (label != ignore_index)
    return int(bad.long().argmax()) if bool(bad.any()) else -1


def _check_map(name: str, x: Tensor, shape: tuple[int | None, ...]) -> None:
    got = x.shape
    n, height, width = shape
    if (
        len(got) != 3
        or (n is not None and got[0] != n)
        or (height is not None and got[1] != height)
        or (width is not None and got[2] != width)
    ):
        # Written here alone: Dynamo cannot put a symbolic size into words.
        expected = ", ".join(axis if size is None else str(size) for axis, size in zip("NHW", shape, strict=True))
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected ({expected})")


def check_pixel_weight(name: str, weight: Tensor, logits: Tensor, shape: tuple[int | None, ...]) -> None:
    """A constant map (N, H, W); a None in ``shape`` is any size."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(
            f"{name}: got {getattr(weight, 'dtype', type(weight))}, expected a floating-point tensor (N, H, W)"
        )
    if weight.requires_grad:
        raise ValueError(f"{name}: requires grad, but it is taken as a constant; pass {name}.detach()")
    _check_map(name, weight, shape)
    check_device(name, weight, "the logits", logits)


def check_class_weight(weight: Tensor, logits: Tensor) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(
            f"class_weight: got {getattr(weight, 'dtype', type(weight))}, expected a floating-point tensor (C,)"
        )
    if weight.shape != (logits.shape[1],):
        raise ValueError(f"class_weight: got shape {tuple(weight.shape)}, expected ({logits.shape[1]},), one per class")
    check_device("class_weight", weight, "the logits", logits)


def dense_together(*maps: Tensor) -> tuple[Tensor, ...]:
    """All in one dense layout (the first's if it has one), and all fp64 if one is; no copy in the usual case."""
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
    """Each in its own dense layout, NCHW-contiguous or channels_last, and all fp64 if one is."""
    return tuple(
        [x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous() for x in one_precision(*maps)]
    )


def dense(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """Contiguous, and in ``dtype`` if one is given."""
    return None if x is None else (x if dtype is None else x.to(dtype)).contiguous()


def one_precision(*maps: Tensor) -> tuple[Tensor, ...]:
    for x in maps:
        if x.dtype == torch.float64:
            return tuple([y.double() for y in maps])
    return maps

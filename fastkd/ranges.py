"""Numeric ranges as types, for configurations, data sets and commands; --help shows them.

    clip: Positive | None = None

`check` validates a dataclass and `check_options` keyword arguments against their annotations; `Numbers` is an argparse
parser that shows the ranges.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal


@dataclass(frozen=True, repr=False)
class Range:
    """Finite numbers from `low` to `high`; `above` and `below` are exclusive. `note` is shown with it."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    note: str = ""

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and self.low <= value <= self.high and self.above < value < self.below

    def __repr__(self) -> str:
        said = self._limits()
        return f"{said} ({self.note})" if self.note else said

    def _limits(self) -> str:
        if self.low > -math.inf and self.high < math.inf:
            return f"{self.low:g} to {self.high:.10g}"
        ends = {"at least": self.low, "above": self.above, "at most": self.high, "below": self.below}
        return " and ".join(f"{word} {end:.10g}" for word, end in ends.items() if math.isfinite(end)) or "finite"


Finite = Annotated[float, Range()]
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(low=0)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(above=0, high=1)]
ShareBelowOne = Annotated[float, Range(low=0, below=1)]
InnerShare = Annotated[float, Range(above=0, below=1)]
Count = Annotated[int, Range(low=1)]
CountOrZero = Annotated[int, Range(low=0)]
Byte = Annotated[int, Range(0, 255)]
IgnoredByte = Annotated[int, Range(0, 255, note="files hold a label of -1 as 255")]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # NumPy's range
Side = Annotated[int, Range(low=16)]  # pixels of a generated scene
Shape = tuple[Count, Count, Count, Count]
Size = tuple[Count, Count]


def check(config: Any, prefix: str = "") -> None:
    """Raises ValueError for the first value in a dataclass, nested ones included, that its annotation does not allow."""
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            check(value, f"{prefix}{name}.")
        else:
            _check(f"{prefix}{name}", hint, value)


def check_options(function: Callable[..., Any], options: Mapping[str, Any], prefix: str) -> None:
    """`check` for the keywords of a function call."""
    hints = _hints(function)
    for name, value in options.items():
        if name in hints:
            _check(f"{prefix}{name}", hints[name], value)


def option_limits(function: Callable[..., Any]) -> dict[str, str]:
    """The type and range, in words, of each numeric keyword of a function."""
    return {name: words(hint) for name, hint in _hints(function).items() if name != "return" and _ranges(hint)}


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    called = function.__init__ if isinstance(function, type) else function  # type: ignore[misc]
    return typing.get_type_hints(called, include_extras=True)


def _check(name: str, hint: Any, value: Any) -> None:
    if not _fits(hint, value):
        raise ValueError(f"{name} must be {words(hint)}, got {value!r}")


def _fits(hint: Any, value: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _fits(parts[0], value) and all(value in r for r in parts[1:] if isinstance(r, Range))
    if origin in (typing.Union, types.UnionType):
        return any(_fits(part, value) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return False
        if parts[-1] is Ellipsis:
            return all(_fits(parts[0], v) for v in value)
        return len(value) == len(parts) and all(map(_fits, parts, value))
    if hint is None or hint is type(None):
        return value is None
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    return True  # mappings and the like: checked by jsonargparse


def words(hint: Any) -> str:
    """A type in words."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        limits = " and ".join(repr(r) for r in parts[1:] if isinstance(r, Range))
        return f"{words(parts[0])}{'' if limits == 'finite' else ' ' + limits}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(words, parts))
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is tuple:
        return (
            f"a list, each {words(parts[0])}"
            if parts[-1] is Ellipsis
            else f"{len(parts)} values, each {words(parts[0])}"
        )
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return names.get(hint, str(hint))


def limits(kind: type, prefix: str = "") -> dict[str, str]:
    """Dotted name -> range in words, for each number in a dataclass and in those nested in it."""
    found: dict[str, str] = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            found |= limits(hint, f"{prefix}{name}.")
        elif said := " or ".join(dict.fromkeys(map(repr, _ranges(hint)))):
            found[prefix + name] = said
    return found


def _ranges(hint: Any) -> list[Range]:
    parts = typing.get_args(hint)
    return [r for part in parts for r in ([part] if isinstance(part, Range) else _ranges(part))]


def number(hint: Any) -> Callable[[str], Any]:
    """An argparse ``type`` for this annotation."""
    parts = typing.get_args(hint)
    several = typing.get_origin(hint) is tuple  # comma-separated
    kind = typing.get_args(parts[0])[0] if several else parts[0]

    def read(text: str) -> Any:
        try:
            value = tuple(map(kind, text.split(","))) if several else kind(text)
        except ValueError:
            value = text
        if not _fits(hint, value):
            raise argparse.ArgumentTypeError(f"must be {words(hint)}, got {text!r}")
        return value

    return read


class Numbers(argparse.ArgumentParser):
    """An argparse parser whose options accept the types of this file; --help shows the range."""

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:  # type: ignore[override]
        if typing.get_origin(options.get("type")) in (Annotated, tuple):
            hint = options["type"]
            options |= {"type": number(hint), "help": f"{options.get('help', '')} ({words(hint)})".strip()}
        return super().add_argument(*names, **options)

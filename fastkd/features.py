"""Named taps into any model: one forward returns its output and the tensors returned by chosen submodules.

    tapped = Tapped(model, {"feat": "encoder[-1]", "logits": "segmentation_head.0"})
    output, taps = tapped(images)            # taps["feat"], taps["logits"]

A path is a submodule's name as in `model.named_modules()`; "" is the model itself. A suffix in square brackets selects
an entry if the module returns several: `encoder[-1]` from a list or tuple, `backbone[out]` from a dict.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["Tapped", "TappedOutput"]

_PATH = re.compile(r"(?P<module>[^\[\]]*)(?:\[(?P<entry>[^\[\]]+)\])?")


class TappedOutput(NamedTuple):
    """Return value of a `Tapped` model: its own `output`, and the tapped tensors by name."""

    output: Any
    taps: dict[str, Tensor]


class _Taken(NamedTuple):
    """A module's output; version: its write counter, None if it has none; copy: a copy of the values."""

    tensor: Tensor
    version: int | None
    copy: Tensor | None
    mode: tuple[str, bool]


class Tapped(nn.Module):
    """Wraps `model`; calling it returns `TappedOutput(output, taps)`. Gradients flow through the taps.

    A tap holds the values that the module returned. Tensors that a later module overwrites (ReLU with inplace=True) are
    copied. To find out which, the first forward in training mode and the first in evaluation mode copy all.

    Hooks exist only during a forward: the model itself is unchanged, nothing is kept between calls, and the wrapper can
    be copied, pickled and moved. A module that runs several times in one forward is tapped at its last run.

    Args:
        model: any module.
        taps: name -> path (see the module docstring).

    Raises:
        ValueError: a path is malformed or names no submodule (similar names are suggested).
        RuntimeError: (on call) a tapped module did not run; or its tensor was overwritten, unlike in earlier calls.
        TypeError, LookupError: (on call) the bracket does not match the module's output, or the tap is not a tensor.
    """

    def __init__(self, model: nn.Module, taps: Mapping[str, str]):
        super().__init__()
        self.model = model
        self.paths = dict(taps)
        self._pinned: dict[str, _Taken] | None = None
        self._overwritten: dict[
            tuple[str, bool], bool
        ] = {}  # (tap, training mode of its module) -> whether it is copied
        for name, path in self.paths.items():
            _find(model, name, path)

    def pin(self) -> Tapped:
        """Installs the hooks permanently and returns self: torch.compile can trace hooks but not install them."""
        if self._pinned is None:
            self._pinned = {}
            self._install(self._pinned)
        return self

    def _install(self, taps: dict[str, _Taken]) -> list[RemovableHandle]:
        found = [(name, path, *_find(self.model, name, path)) for name, path in self.paths.items()]
        known = self._overwritten
        return [
            m.register_forward_hook(partial(_keep, taps, known, name, path, entry)) for name, path, m, entry in found
        ]

    def forward(self, *args: Any, **kwargs: Any) -> TappedOutput:
        if self._pinned is not None:
            output = self.model(*args, **kwargs)
            kept = dict(self._pinned)
            self._pinned.clear()
            return self._result(output, kept)
        taps: dict[str, _Taken] = {}
        handles = self._install(taps)
        try:
            output = self.model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return self._result(output, taps)

    def _result(self, output: Any, taps: dict[str, _Taken]) -> TappedOutput:
        if missing := [f"{name!r} ({self.paths[name]!r})" for name in self.paths if name not in taps]:
            raise RuntimeError(
                f"tap {', '.join(missing)} did not run in this forward; tap a module that the model calls"
            )
        return TappedOutput(output, {name: self._value(name, taps[name]) for name in self.paths})

    def _value(self, name: str, taken: _Taken) -> Tensor:
        if taken.version is None:
            return taken.tensor if taken.copy is None else taken.copy
        changed = taken.tensor._version != taken.version
        if changed and taken.copy is None:
            self._overwritten[taken.mode] = True
            raise RuntimeError(
                f"tap {name!r} ({self.paths[name]!r}): a later module overwrote what it returned, which none did before; call "
                "again: from now on it is copied"
            )
        self._overwritten[taken.mode] = changed
        return taken.copy if changed and taken.copy is not None else taken.tensor

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={path!r}" for name, path in self.paths.items())


def _find(model: nn.Module, name: str, path: str) -> tuple[nn.Module, str | None]:
    match = _PATH.fullmatch(path)
    if match is None:
        raise ValueError(f"tap {name!r}: cannot read the path {path!r}; expected 'module.name' or 'module.name[entry]'")
    wanted = match["module"]
    try:
        return model.get_submodule(wanted), match["entry"]
    except AttributeError:
        names = [n for n, _ in model.named_modules() if n]
        close = difflib.get_close_matches(wanted, names, n=5, cutoff=0.5)
        close = close or [n for n in names if "." not in n]
        hint = ", ".join(repr(n) for n in close)
        raise ValueError(
            f"tap {name!r}: {type(model).__name__} has no module {wanted!r}; did you mean {hint}?"
        ) from None


def _keep(
    taps: dict[str, _Taken],
    overwritten: Mapping[tuple[str, bool], bool],
    name: str,
    path: str,
    entry: str | None,
    module: nn.Module,
    args: Any,
    out: Any,
) -> None:
    where = f"tap {name!r} ({path!r})"
    if entry is not None:
        if isinstance(out, Mapping):
            if entry not in out:
                raise LookupError(f"{where}: no entry {entry!r}; the module returned the keys {sorted(map(str, out))}")
            out = out[entry]
        elif isinstance(out, (list, tuple)):
            if not re.fullmatch(r"-?\d+", entry):
                raise LookupError(f"{where}: the module returned a {type(out).__name__}, so the entry must be a number")
            if not -len(out) <= int(entry) < len(out):
                raise LookupError(f"{where}: no entry {entry}; the module returned {len(out)} entries")
            out = out[int(entry)]
        else:
            raise TypeError(
                f"{where}: the module returned a {type(out).__name__}, which has no entries; drop the brackets"
            )
    if not isinstance(out, Tensor):
        if isinstance(out, Mapping):
            which = f"choose one of its keys, as in '{path}[{next(iter(out), 'key')}]'"
        elif isinstance(out, (list, tuple)):
            which = f"it has {len(out)} entries: choose one, as in '{path}[-1]'"
        else:
            which = "tap a module that returns one"
        raise TypeError(f"{where}: expected a tensor, got a {type(out).__name__}; {which}")
    mode = name, module.training
    # Compiled models and inference tensors have no write counter: use what is known, else copy.
    counted = not (torch.compiler.is_compiling() or out.is_inference())
    known = overwritten.get(mode)
    copy = out.clone() if known is not False else None
    taps[name] = _Taken(out, out._version if counted and not known else None, copy, mode)

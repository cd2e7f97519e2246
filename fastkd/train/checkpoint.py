"""Checkpoints: a single file, written atomically and read without executing code from it.

A checkpoint is a dict of plain values and tensors: `format`, `config` (see `config.to_dict`), `classes`, `palette`,
`step`, `model` (the network's state dict), and in `last.pt` the state needed to resume. `load_network` rebuilds the
network from it.
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastkd.train.config import Config, ModelConfig, from_dict
from fastkd.train.files import write_whole
from fastkd.train.models import SegmentationModel, build_model

FORMAT = 1
LAST, PREVIOUS = "last.pt", "last.prev.pt"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written, or belongs to another run or program. The message names the file."""


def save(
    state: dict[str, Any],
    path: Path,
    *,
    previous: Path | None = None,
    writer: Callable[[Any, Path], object] = torch.save,
) -> None:
    """Writes `state` to `path` atomically; `previous` keeps the checkpoint that was there.

    Raises CheckpointError if it cannot be written; `path` is then unchanged.
    """
    try:
        write_whole(path, lambda beside: writer({"format": FORMAT, **state}, beside), previous=previous)
    except (OSError, RuntimeError) as error:
        free = shutil.disk_usage(path.parent).free / 2**30
        # torch.save replaces an OSError with its own error about file positions.
        reason = error.strerror if isinstance(error, OSError) else "the disk or a limit on file sizes cuts it short"
        raise CheckpointError(
            f"cannot write {path}, {free:.2f} GiB are free there: {reason}. What was saved before is whole: make room and go on "
            "with --resume"
        ) from error


def load(path: str | Path) -> dict[str, Any]:
    """The dict of a checkpoint, tensors on the CPU. FileNotFoundError or CheckpointError name the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load does not verify checksums
                raise ValueError(f"the checksum of {damaged} in it is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a truncated or foreign file
        raise CheckpointError(
            f"cannot read checkpoint {path}: {_first_line(error)}; delete it or pass another"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or "model" not in state:
        found = sorted(map(str, state))[:6] if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path} is not a checkpoint of this trainer (format {FORMAT}): it holds {found}")
    return state


def exists(out: Path) -> bool:
    """Whether a run directory has a checkpoint to resume from."""
    return (out / LAST).exists() or (out / PREVIOUS).exists()


def load_last(out: Path) -> tuple[dict[str, Any], bool]:
    """The state to resume from, and whether it is from the last checkpoint.

    If the last is missing or damaged, falls back to the previous one with a warning. Raises FileNotFoundError or
    CheckpointError if neither can be read.
    """
    try:
        return load(out / LAST), True
    except (CheckpointError, FileNotFoundError) as error:
        try:
            state = load(out / PREVIOUS)
        except (CheckpointError, FileNotFoundError):
            raise error from None
        warnings.warn(f"{error}. Going on from {out / PREVIOUS}, step {state['step']}", stacklevel=2)
        return state, False


def load_network(path: str | Path, state: dict[str, Any] | None = None) -> tuple[SegmentationModel, dict[str, Any]]:
    """The network of a checkpoint, on the CPU and in eval mode, and the checkpoint's dict."""
    state = load(path) if state is None else state
    classes, palette = state.get("classes"), state.get("palette")
    if not (isinstance(classes, list) and classes and all(isinstance(name, str) for name in classes)):
        raise CheckpointError(f"checkpoint {path}: expected a list of class names, got {classes!r:.100}")
    if not (isinstance(palette, list) and len(palette) >= len(classes) and all(map(_is_colour, palette))):
        raise CheckpointError(f"checkpoint {path}: expected one colour (R, G, B) per class, got {palette!r:.100}")
    try:
        config = from_dict(ModelConfig, state["config"]["model"])
        network = build_model(config, len(classes), from_checkpoint=True)
    except Exception as error:  # a foreign configuration can make the libraries raise anything
        raise CheckpointError(
            f"checkpoint {path}: its configuration builds no network: {type(error).__name__}: {error}"
        ) from error
    try:
        network.load_state_dict(state["model"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint {path} does not fit the network of its own configuration: {error}"
        ) from error
    return network.eval(), state


def config_of(state: dict[str, Any], path: str | Path) -> Config:
    """The configuration a checkpoint was trained with; CheckpointError if this version does not support its values."""
    try:
        return from_dict(Config, state["config"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint {path} is of a configuration that this version does not know: {error}"
        ) from error


def _is_colour(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 3 and all(v in range(256) for v in value)


def digest(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 of a network's state; identifies the teacher that a student started with."""
    sha = hashlib.sha256()
    for name in sorted(state):
        sha.update(name.encode())
        sha.update(state[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__

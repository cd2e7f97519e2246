"""Checkpoints: one file, written atomically, read without running code from it.

A checkpoint is a dict of plain values and tensors: `format`, `config` (see `config.to_dict`), `classes`, `palette`, `step`,
`model` (state of the network), and in `last.pt` what a run needs to go on. `load_network` rebuilds the network from it alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastkd.train.config import ModelConfig, from_dict
from fastkd.train.models import SegmentationModel, build_model

FORMAT = 1


class CheckpointError(ValueError):
    """A file that is no checkpoint of this trainer, or not of this run. The message names it."""


def save(state: dict[str, Any], path: Path, writer: Callable[[Any, Path], None] = torch.save) -> None:
    """Writes `state` beside `path`, then renames it: a reader sees the old file or the new one, never a part of it."""
    partial = path.with_name(path.name + ".tmp")
    writer({"format": FORMAT, **state}, partial)
    if partial.exists():  # in a process group only the first process writes
        os.replace(partial, path)


def load(path: str | Path) -> dict[str, Any]:
    """The dict of a checkpoint, tensors on the CPU. FileNotFoundError or CheckpointError name the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a truncated or foreign file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"cannot read checkpoint {path}: {reason}; delete it, or name another") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or "model" not in state:
        found = sorted(map(str, state))[:6] if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path} is not a checkpoint of this trainer (format {FORMAT}): it holds {found}")
    return state


def load_network(path: str | Path, state: dict[str, Any] | None = None) -> tuple[SegmentationModel, dict[str, Any]]:
    """The network of a checkpoint, on the CPU, in eval mode, and the checkpoint's dict."""
    state = load(path) if state is None else state
    config = from_dict(ModelConfig, state["config"]["model"])
    network = build_model(config, len(state["classes"]), from_checkpoint=True)
    try:
        network.load_state_dict(state["model"])
    except RuntimeError as error:
        raise CheckpointError(
            f"checkpoint {path} does not fit the network of its own configuration: {error}"
        ) from error
    return network.eval(), state


def digest(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 of a network's state: tells whether a teacher is still the one a student began with."""
    sha = hashlib.sha256()
    for name in sorted(state):
        sha.update(name.encode())
        sha.update(state[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()

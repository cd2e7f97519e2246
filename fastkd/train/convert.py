"""Converts a network with weights from elsewhere to a checkpoint of this trainer: to teach, evaluate or predict."""

from __future__ import annotations

from pathlib import Path

import torch

from fastkd.train import checkpoint
from fastkd.train.config import Config, to_dict
from fastkd.train.data import evaluation_set
from fastkd.train.models import build_model


def convert(config: Config, *, overwrite: bool = False) -> Path:
    """Writes `<out>/best.pt`: the network of `config.model` with its weights file, and the data's classes and colours.

    Raises:
        ValueError: no weights file is given, or it does not fit the network.
        FileExistsError: `<out>` holds a checkpoint and `overwrite` is False.
    """
    if config.model.weights is None:
        raise ValueError("there is nothing to convert: give --model.weights FILE, the state dict of the whole network")
    path = Path(config.out) / "best.pt"
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; discard it with --overwrite, or change --out")
    dataset = evaluation_set(config.data)
    network = build_model(config.model, len(dataset.classes))
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "config": to_dict(config),
        "classes": list(dataset.classes),
        "palette": torch.as_tensor(dataset.palette).tolist(),
        "step": 0,
        "model": network.state_dict(),
    }
    checkpoint.save(state, path)
    return path

"""A data set and configurations small enough for training in a test."""

from __future__ import annotations

import json

import torch

from fastkd.train import checkpoint
from fastkd.train.config import Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig, to_dict
from fastkd.train.models import build_model

CROP = (64, 64)


class Patches:
    """Coloured squares on noise: three classes that a network learns quickly; the number of void rows differs
    between items."""

    transform = None
    classes = ("ground", "red", "blue")
    palette = ((60, 60, 60), (220, 40, 40), (40, 40, 220))
    ignore_index = 255

    def __init__(self, length: int = 8, noise: bool = True):
        self.length, self.noise = length, noise

    def __len__(self) -> int:
        return self.length

    def image(self, index: int):
        return self[index][0]

    def __getitem__(self, index: int):
        rng = torch.Generator().manual_seed(index)
        image = torch.randint(90, 120, (3, *CROP), generator=rng)
        label = torch.zeros(CROP, dtype=torch.uint8)
        for kind, channel in ((1, 0), (2, 2)):
            y, x = torch.randint(4, 36, (2,), generator=rng).tolist()
            image[channel, y : y + 24, x : x + 24] += 120
            label[y : y + 24, x : x + 24] = kind
        if self.noise:  # from torch's default generator, like augmentation
            image = image + torch.randint(0, 16, image.shape)
        label[: 1 + 6 * (index % 3)] = 255
        return image.clamp(0, 255).to(torch.uint8), label


DATASETS = (Patches(), Patches(4, noise=False))


def config(out, **changes) -> Config:
    """A run of a few steps; `aux=True` adds an auxiliary head, `dims` is the decoder's width."""
    aux = changes.pop("aux", False)
    width = changes.pop("width", 32)
    train = {"steps": 2, "batch_size": 4, "log_every": 1, "checkpoint_every": 2, "device": "cpu", "panels": 0}
    model = ModelConfig(
        arch="FPN",
        encoder="tu-mobilenetv3_small_050",
        options={"decoder_pyramid_channels": width, "decoder_segmentation_channels": width}
        | changes.pop("options", {}),
        features={"decoder": "decoder"},
        aux="encoder[-2]" if aux else None,
    )
    return Config(
        out=str(out),
        data=DataConfig(crop=CROP),
        model=changes.pop("model", model),
        optim=changes.pop("optim", OptimConfig(lr=0.01)),
        train=TrainConfig(**train | changes.pop("train", {})),
        eval=changes.pop("eval", EvalConfig(every=100, batch_size=2)),
        **changes,
    )


def run(config, **options) -> dict:
    from fastkd.train.engine import train

    return train(config, show=False, datasets=DATASETS, **options)


def lines(out, split: str) -> list[dict]:
    """The log's lines for one split."""
    return [line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if line["split"] == split]


def save_network(path, config, dataset=DATASETS[0]):
    """Saves an untrained network of `config` for the classes of `dataset`; returns the checkpoint's path as a
    string."""
    torch.manual_seed(0)
    network = build_model(config.model, len(dataset.classes))
    state = {
        "config": to_dict(config),
        "classes": list(dataset.classes),
        "palette": torch.as_tensor(dataset.palette).tolist(),
        "step": 0,
        "model": network.state_dict(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(state, path)
    return str(path)

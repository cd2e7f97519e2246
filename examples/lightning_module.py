"""A LightningModule that distils. Lightning moves the losses, which are submodules, and optimises NFD's adapter.

python examples/lightning_module.py --steps 200
"""

from __future__ import annotations

import argparse

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

import fastkd
from fastkd.train.data import StreetScenes


def network(width: int, classes: int) -> nn.ModuleDict:
    """Features at 1/4 and logits at the same size."""
    body = nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1),
        nn.ReLU(),
    )
    return nn.ModuleDict({"body": body, "head": nn.Conv2d(width, classes, 1)})


class Distillation(pl.LightningModule):
    def __init__(self, student: nn.ModuleDict, teacher: nn.ModuleDict, channels: tuple[int, int]):
        super().__init__()
        self.student, self.teacher = student, teacher.eval().requires_grad_(False)
        self.task = fastkd.ResizedCrossEntropyLoss(ignore_index=255)
        self.kd = fastkd.KDLoss(temperature=1.0)
        self.nfd = fastkd.NFDLoss(*channels, loss_weight=5.0)
        self.losses: list[torch.Tensor] = []

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        images, labels = batch[0].float() / 255, batch[1]
        with torch.no_grad():
            teacher_features = self.teacher["body"](images)
            teacher_logits = self.teacher["head"](teacher_features)
        features = self.student["body"](images)
        logits = self.student["head"](features)
        terms = {
            "task": self.task(logits, labels),
            "kd": self.kd(logits, teacher_logits),
            "nfd": self.nfd(features, teacher_features),
        }
        loss = sum(terms.values())
        self.losses.append(loss.detach())
        self.log_dict({f"loss/{name}": value.detach() for name, value in terms.items()})
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([*self.student.parameters(), *self.nfd.parameters()], lr=1e-3)


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--size", type=int, nargs=2, default=(128, 256))
    parser.add_argument("--accelerator", default="auto")
    args = parser.parse_args(argv)
    scenes = StreetScenes("train", size=tuple(args.size), length=4 * args.steps)
    classes = len(scenes.classes)
    module = Distillation(network(32, classes), network(64, classes), channels=(32, 64))
    trainer = pl.Trainer(
        max_steps=args.steps, accelerator=args.accelerator, devices=1, logger=False, enable_checkpointing=False
    )
    trainer.fit(module, DataLoader(scenes, batch_size=4))
    losses = [float(value) for value in module.losses]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")
    return losses


if __name__ == "__main__":
    main()

"""A plain PyTorch loop: cross-entropy at label resolution, KD on the logits, NFD on the features.

    python examples/plain_loop.py --steps 200

The data are generated street scenes. Any loader of images and labels (N, H, W), 255 where ignored, can replace them.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader

import fastkd
from fastkd.train.data import StreetScenes


class Network(nn.Module):
    """Logits and features at 1/8 of the image's size."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        for channels_in, channels_out in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [
                nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1),
                nn.BatchNorm2d(channels_out),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers)
        self.head = nn.Conv2d(4 * width, classes, 1)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(images)
        return self.head(features), features


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--size", type=int, nargs=2, default=(128, 256))
    args = parser.parse_args(argv)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")

    scenes = StreetScenes("train", size=tuple(args.size), length=4 * args.steps)
    loader = DataLoader(scenes, batch_size=4)
    classes = len(scenes.classes)
    student = Network(16, classes).to(device)
    teacher = Network(32, classes).to(device).eval()  # load your trained weights here

    task = fastkd.ResizedCrossEntropyLoss(ignore_index=255)  # labels at full size, logits at 1/8
    kd = fastkd.KDLoss(temperature=1.0)
    nfd = fastkd.NFDLoss(in_channels=64, teacher_channels=128).to(device)  # with a trainable 1x1 adapter
    optimizer = torch.optim.SGD([*student.parameters(), *nfd.parameters()], lr=0.02, momentum=0.9)

    losses = []
    for images, labels in loader:
        images, labels = images.to(device).float() / 255, labels.to(device)
        with torch.no_grad():
            teacher_logits, teacher_features = teacher(images)
        logits, features = student(images)
        loss = task(logits, labels) + kd(logits, teacher_logits) + 5.0 * nfd(features, teacher_features)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())  # reading it here would synchronise
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")
    return [float(value) for value in losses]


if __name__ == "__main__":
    main()

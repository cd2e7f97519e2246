"""segmentation-models-pytorch with timm encoders: features by name, logits before they are upsampled.

python examples/smp_timm.py --steps 200
"""

from __future__ import annotations

import argparse

import segmentation_models_pytorch as smp
import torch
from torch import nn
from torch.utils.data import DataLoader

import fastkd
from fastkd.features import Tapped
from fastkd.train.data import StreetScenes

TAPS = {"features": "encoder[-1]", "logits": "segmentation_head.0"}  # see "fastkd.features" for paths


def network(encoder: str, classes: int) -> Tapped:
    model = smp.FPN(f"tu-{encoder}", encoder_weights=None, classes=classes)
    model.segmentation_head[1] = nn.Identity()  # the upsampling: FastKD's losses take logits at their own size
    return Tapped(model, TAPS)


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--size", type=int, nargs=2, default=(128, 256))
    parser.add_argument("--student", default="mobilenetv3_small_050", help="any timm network with features")
    parser.add_argument("--teacher", default="mobilenetv3_large_100")
    args = parser.parse_args(argv)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")

    scenes = StreetScenes("train", size=tuple(args.size), length=4 * args.steps)
    loader = DataLoader(scenes, batch_size=4)
    student = network(args.student, len(scenes.classes)).to(device)
    teacher = network(args.teacher, len(scenes.classes)).to(device).eval()  # load your trained weights here

    channels = [n.model.encoder.out_channels[-1] for n in (student, teacher)]
    nfd = fastkd.NFDLoss(*channels).to(device)
    kd = fastkd.ResizedKDLoss(temperature=1.0)  # at label resolution; fastkd.KDLoss compares at logit resolution
    task = fastkd.ResizedCrossEntropyLoss(ignore_index=255)
    optimizer = torch.optim.AdamW([*student.parameters(), *nfd.parameters()], lr=1e-3)

    losses = []
    for images, labels in loader:
        images, labels = images.to(device).float() / 255, labels.to(device)
        with torch.no_grad():
            wanted = teacher(images).taps
        taps = student(images).taps
        loss = task(taps["logits"], labels) + kd(taps["logits"], wanted["logits"], labels)
        loss = loss + 5.0 * nfd(taps["features"], wanted["features"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")
    return [float(value) for value in losses]


if __name__ == "__main__":
    main()

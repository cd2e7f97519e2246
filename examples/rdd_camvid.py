"""RDD on CamVid in a plain loop: a teacher with an auxiliary head, then the student.

    python examples/rdd_camvid.py --root CAMVID --steps 1000

CAMVID holds train/, trainannot/, val/ and valannot/ of the SegNet tutorial. `fastkd train --recipe rdd-paper` adds a
schedule, evaluation and checkpoints.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

import fastkd
from fastkd.train.data import build_dataset, train_transform
from fastkd.train.models import ModelConfig, Output, SegmentationModel, build_model


def batches(loader: Iterable, steps: int, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    endless = itertools.chain.from_iterable(itertools.repeat(loader))
    for images, labels in itertools.islice(endless, steps):
        yield images.to(device), labels.to(device)


def fit(
    model: SegmentationModel, data: Iterable, loss_of: Callable[[Output, Any, Any, int], torch.Tensor]
) -> list[float]:
    """One pass over `data`; returns the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    losses = []
    model.train()
    for step, (images, labels) in enumerate(data):
        loss = loss_of(model(images), images, labels, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [float(value) for value in losses]


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", required=True)
    parser.add_argument("--steps", type=int, default=1000, help="steps of the teacher and of the student, each")
    parser.add_argument("--crop", type=int, nargs=2, default=(352, 352))
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args(argv)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")

    dataset: Any = build_dataset("camvid", root=args.root, split="train", transform=train_transform(tuple(args.crop)))
    loader = DataLoader(dataset, batch_size=args.batch_size, shuffle=True, drop_last=True)
    classes = len(dataset.classes)
    big = ModelConfig(arch="FPN", encoder="tu-mobilenetv3_large_100", aux="encoder[-2]")
    small = ModelConfig(arch="FPN", encoder="tu-mobilenetv3_small_050")
    teacher = build_model(big, classes).to(device)
    student = build_model(small, classes).to(device)

    task = fastkd.ResizedCrossEntropyLoss()
    fit(
        teacher,
        batches(loader, args.steps, device),
        lambda out, images, labels, step: task(out.logits, labels) + 0.4 * task(out.aux, labels),
    )
    teacher.eval()

    # The first tenth of the run (TFE) weights pixels by the agreement of the teacher's heads, the rest (TSE) by
    # relative difficulty.
    rdd = fastkd.RDDLoss(total_steps=args.steps, preset="paper")

    def distil(out: Output, images: torch.Tensor, labels: torch.Tensor, step: int) -> torch.Tensor:
        with torch.no_grad():
            wanted = teacher(images)
        return rdd(out.logits, wanted.logits, labels, step=step, teacher_aux=wanted.aux).loss

    losses = fit(student, batches(loader, args.steps, device), distil)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")
    return losses


if __name__ == "__main__":
    main()

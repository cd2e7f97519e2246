"""Hugging Face: distils a larger SegFormer into SegFormer B0 with transformers' Trainer and its own `compute_loss`.

    python examples/segformer_trainer.py --steps 200

SegFormer's built-in loss upsamples the logits to the labels; this `compute_loss` uses the network's logits at 1/4.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import SegformerConfig, SegformerForSemanticSegmentation, Trainer, TrainingArguments

import fastkd
from fastkd.train.data import StreetScenes


class Scenes(Dataset):
    """Items as mappings, as Trainer expects."""

    def __init__(self, scenes: StreetScenes):
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image, label = self.scenes[index]
        return {"pixel_values": image.as_subclass(torch.Tensor) / 255, "labels": label.as_subclass(torch.Tensor).long()}


class DistillationTrainer(Trainer):
    def __init__(self, *args: Any, teacher: torch.nn.Module, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        self.task = fastkd.ResizedCrossEntropyLoss(ignore_index=255)
        self.kd = fastkd.KDLoss(temperature=1.0)
        self.losses: list[torch.Tensor] = []

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        labels = inputs.pop("labels")  # without labels the model skips its built-in loss
        outputs = model(**inputs)
        with torch.no_grad():
            teacher_logits = self.teacher(**inputs).logits
        loss = self.task(outputs.logits, labels) + self.kd(outputs.logits, teacher_logits)
        self.losses.append(loss.detach())
        return (loss, outputs) if return_outputs else loss


def segformer(classes: int, widths: list[int], depths: list[int]) -> SegformerForSemanticSegmentation:
    """Random weights; use `SegformerForSemanticSegmentation.from_pretrained` for trained ones."""
    return SegformerForSemanticSegmentation(
        SegformerConfig(num_labels=classes, hidden_sizes=widths, depths=depths, decoder_hidden_size=widths[-1])
    )


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--size", type=int, nargs=2, default=(128, 256))
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args(argv)
    scenes = StreetScenes("train", size=tuple(args.size), length=4 * args.steps)
    classes = len(scenes.classes)
    with tempfile.TemporaryDirectory() as out:
        trainer = DistillationTrainer(
            model=segformer(classes, [32, 64, 160, 256], [2, 2, 2, 2]),  # B0
            teacher=segformer(classes, [64, 128, 320, 512], [2, 2, 2, 2]),  # B1
            args=TrainingArguments(
                output_dir=out,
                max_steps=args.steps,
                per_device_train_batch_size=4,
                learning_rate=1e-3,
                report_to="none",
                save_strategy="no",
                remove_unused_columns=False,
                use_cpu=args.cpu,
            ),
            train_dataset=Scenes(scenes),
        )
        trainer.train()
    losses = [float(value) for value in trainer.losses]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")
    return losses


if __name__ == "__main__":
    main()

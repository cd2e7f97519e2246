"""Distils the patch tokens of a frozen ViT (such as DINO) into a convolutional student, without labels.

    python examples/vit_tokens.py --steps 200

NFD compares z-scores, so scale and offset of the tokens' channels cancel. Weights are random here; create the ViT with
`pretrained=True`, or load a file.
"""

from __future__ import annotations

import argparse

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import fastkd
from fastkd.train.data import StreetScenes


class Student(nn.Module):
    """A timm network's features at 1/16, resized to the ViT's patch grid."""

    def __init__(self, name: str):
        super().__init__()
        self.body = timm.create_model(name, features_only=True, out_indices=(3,))
        self.channels = self.body.feature_info.channels()[-1]

    def forward(self, images: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        features = self.body(images)[0]
        return F.interpolate(features, grid, mode="bilinear", align_corners=False).flatten(2)  # (N, C, L)


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--size", type=int, nargs=2, default=(112, 224), help="multiples of the ViT's patch")
    parser.add_argument("--teacher", default="vit_small_patch14_dinov2")
    parser.add_argument("--student", default="mobilenetv3_small_100")
    args = parser.parse_args(argv)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")

    loader = DataLoader(StreetScenes("train", size=tuple(args.size), length=4 * args.steps), batch_size=4)
    teacher = timm.create_model(args.teacher, num_classes=0, dynamic_img_size=True).to(device).eval()
    student = Student(args.student).to(device)
    nfd = fastkd.NFDLoss(in_channels=student.channels, teacher_channels=teacher.num_features).to(device)
    optimizer = torch.optim.AdamW([*student.parameters(), *nfd.parameters()], lr=1e-3)

    losses = []
    for images, _ in loader:
        images = images.to(device).float() / 255
        with torch.no_grad():
            tokens = teacher.forward_features(images)[
                :, teacher.num_prefix_tokens :
            ]  # (N, L, C), without class and register tokens
        patch = teacher.patch_embed.patch_size
        grid = (images.shape[-2] // patch[0], images.shape[-1] // patch[1])
        loss = nfd(student(images, grid), tokens.transpose(1, 2))  # tokens are read in place
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")
    return [float(value) for value in losses]


if __name__ == "__main__":
    main()

"""A whole training step: teacher forward, student forward and backward, and the losses.

    python -m benchmarks.bench_step [--out DIR] [--resume]

torchvision's DeepLabV3 with random weights: ResNet-101 teacher, ResNet-18 student, both at output stride 8 with an
auxiliary head. On a GPU the networks run under bf16 autocast in channels_last with the recipes' batch and crop; on a
CPU in fp32 on small images. The losses run on detached outputs and their gradient is passed on to the network, so that
they can be timed separately. Appends to ``results/{cpu,cuda}_steps.csv``.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastkd

from . import bench_nfd, bench_rdd, bench_resized_cross_entropy, bench_resized_kd
from .cases import RECIPES, Recipe
from .harness import DEVICE, RESULTS, WHERE, Record, append, by_x, peak_memory, percentiles, read, where
from .report import origin, steps_table

COLUMNS = (
    *WHERE,
    *("recipe", "images", "classes", "dtype", "losses", "rival"),
    *("p20_ms", "median_ms", "p80_ms", "losses_ms", "peak_bytes", "note"),
)
KEY = ("device", "recipe", "images", "losses", "rival")
CPU_RECIPES = {"small": Recipe(2, 19, (128, 256))}
STEPS = {"cpu": 5, "cuda": 8}


class Outputs(NamedTuple):
    """logits and auxiliary logits (N, K, h, w), features (N, 512 or 2048, h, w)."""

    logits: Tensor
    aux: Tensor
    features: Tensor


Losses = Callable[[Outputs, Outputs, Tensor], Tensor]
"""(student's leaves, teacher's outputs, labels) -> 0-d loss."""


class Network(nn.Module):
    """DeepLabV3 without the final up-sampling; ``project`` maps the student's features to the teacher's channels."""

    def __init__(self, network: nn.Module, project: nn.Module):
        super().__init__()
        self.network, self.project = network, project

    def forward(self, images: Tensor) -> Outputs:
        maps = self.network.backbone(images)
        return Outputs(
            self.network.classifier(maps["out"]), self.network.aux_classifier(maps["aux"]), self.project(maps["out"])
        )


def networks(classes: int, device: str) -> tuple[Network, Network]:
    """Teacher and student."""
    from torchvision.models import resnet18, segmentation
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3
    from torchvision.models.segmentation.fcn import FCNHead

    teacher = segmentation.deeplabv3_resnet101(weights=None, weights_backbone=None, num_classes=classes, aux_loss=True)
    backbone = resnet18(weights=None)
    for layer, dilation in ((backbone.layer3, 2), (backbone.layer4, 4)):
        for conv in layer.modules():
            if isinstance(conv, nn.Conv2d):  # torchvision's option supports only bottlenecks
                conv.stride = (1, 1)
                if conv.kernel_size == (3, 3):
                    conv.dilation = conv.padding = (dilation, dilation)
    taps = IntermediateLayerGetter(backbone, {"layer3": "aux", "layer4": "out"})
    student = DeepLabV3(taps, DeepLabHead(512, classes), FCNHead(256, classes))
    adapter = nn.Conv2d(512, 2048, 1, bias=False)
    pair = Network(teacher, nn.Identity()), Network(student, adapter)
    layout = torch.channels_last if device == "cuda" else torch.contiguous_format
    for network in pair:
        network.to(device, memory_format=layout)
    return pair[0].eval().requires_grad_(False), pair[1].train()


def kd_losses(ours: bool) -> Losses:
    """Cross-entropy of both heads and KD, all at label resolution."""

    def losses(s: Outputs, t: Outputs, target: Tensor) -> Tensor:
        size = (target.shape[1], target.shape[2])
        if ours:
            ce = fastkd.resized_cross_entropy
            return (
                ce(s.logits, target) + 0.4 * ce(s.aux, target) + fastkd.resized_kd_loss(s.logits, t.logits, size=size)
            )
        ce = bench_resized_cross_entropy.plain
        return ce(s.logits, target) + 0.4 * ce(s.aux, target) + bench_resized_kd.plain(s.logits, t.logits, size)

    return losses


def rdd_losses(ours: bool) -> Losses:
    """RDD's second stage (official preset, both heads) and NFD on the last features."""

    def losses(s: Outputs, t: Outputs, target: Tensor) -> Tensor:
        if ours:
            rdd = fastkd.rdd_loss(
                s.logits, t.logits, target, stage="tse", preset="official", teacher_aux=t.aux, student_aux=s.aux
            )
            return rdd.loss + fastkd.nfd_loss(s.features, t.features)
        main = bench_rdd.tse(s.logits, t.logits, target, None)
        aux = bench_rdd.tse(s.aux, t.aux, target, None)
        return main + 0.4 * aux + bench_rdd.kd(s.logits, t.logits) + bench_nfd.plain(s.features, t.features)

    return losses


LOSSES: dict[str, Callable[[bool], Losses]] = {"CE + KD": kd_losses, "RDD + NFD": rdd_losses}


class Step:
    """Runs steps and records when each part began."""

    def __init__(self, teacher: Network, student: Network, images: Tensor, target: Tensor):
        self.teacher, self.student, self.images, self.target = teacher, student, images, target
        self.device = images.device.type

    def __call__(self, losses: Losses) -> Callable[[], tuple[float, float]]:
        """One step; the returned function waits for it and returns (total milliseconds, those of the losses)."""
        marks = [self._mark()]
        with self._autocast():
            with torch.no_grad():
                t = self.teacher(self.images)
            s = self.student(self.images)
        marks.append(self._mark())
        leaves = Outputs(*(x.detach().requires_grad_() for x in s))
        losses(leaves, t, self.target).backward()
        marks.append(self._mark())
        used = [(x, leaf.grad) for x, leaf in zip(s, leaves, strict=True) if leaf.grad is not None]
        torch.autograd.backward([x for x, _ in used], [grad for _, grad in used])
        self.student.zero_grad(set_to_none=True)
        marks.append(self._mark())
        return lambda: (self._between(marks[0], marks[3]), self._between(marks[1], marks[2]))

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast("cuda", torch.bfloat16) if self.device == "cuda" else contextlib.nullcontext()

    def _mark(self):
        if self.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin, end) -> float:
        if self.device == "cpu":
            return (end - begin) * 1e3
        end.synchronize()
        return begin.elapsed_time(end)


def run(name: str, recipe: Recipe, device: str) -> list[Record]:
    """All sets of losses of one recipe, with rivals interleaved."""
    g = torch.Generator().manual_seed(0)
    images = torch.randn(recipe.batch, 3, *recipe.crop, generator=g).to(device)
    if device == "cuda":
        images = images.to(memory_format=torch.channels_last)
    target = bench_resized_cross_entropy.labels(recipe.logits, recipe.crop, device)
    torch.backends.cudnn.benchmark = True  # the usual training setting
    step = Step(*networks(recipe.classes, device), images, target)
    records = []
    for losses_name, make in LOSSES.items():
        torch._dynamo.reset()
        rivals = {"ours": make(True), "eager": make(False), "compile": torch.compile(make(False), fullgraph=True)}
        results: dict[str, dict[str, str]] = {}
        for rival, losses in rivals.items():
            try:
                step(losses)()
                results[rival] = {"peak_bytes": str(peak_memory(lambda losses=losses: step(losses)(), device))}
            except Exception as failure:  # out of memory, no compiler, ...: the others are still timed
                results[rival] = {"note": f"{type(failure).__name__}: {str(failure).partition(chr(10))[0][:120]}"}
        times: dict[str, list[tuple[float, float]]] = {r: [] for r, values in results.items() if "note" not in values}
        for _ in range(STEPS[device]):
            for rival, samples in times.items():
                samples.append(step(rivals[rival])())
        for rival, samples in times.items():
            low, median, high = percentiles([whole for whole, _ in samples])
            results[rival] |= {"p20_ms": f"{low:.3f}", "median_ms": f"{median:.3f}", "p80_ms": f"{high:.3f}"}
            results[rival]["losses_ms"] = f"{percentiles([part for _, part in samples])[1]:.3f}"
        same = {
            "recipe": name,
            "images": by_x((recipe.batch, 3, *recipe.crop)),
            "classes": str(recipe.classes),
            "dtype": "bfloat16" if device == "cuda" else "float32",
            "losses": losses_name,
        }
        records += [dict.fromkeys(COLUMNS, "") | where(device) | same | {"rival": r} | v for r, v in results.items()]
    return records


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_step", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file (default: %(default)s)")
    parser.add_argument(
        "--resume", action="store_true", help="skip cases that the CSV has from this commit and machine"
    )
    args = parser.parse_args()
    path = args.out / f"{DEVICE}_steps.csv"
    here = where(DEVICE)
    same = ("commit", "device", "torch")
    done = {r["recipe"] for r in read(path) if args.resume and all(r[k] == here[k] for k in same)}
    records = []
    for name, recipe in (RECIPES if DEVICE == "cuda" else CPU_RECIPES).items():
        if name not in done:
            print(f"… {name} {by_x((recipe.batch, 3, *recipe.crop))}", file=sys.stderr, flush=True)
            new = run(name, recipe, DEVICE)
            append(new, path, COLUMNS)
            records += new
    if records:
        print(f"{origin(records[0])}\n\n{steps_table(records)}")


if __name__ == "__main__":
    main()

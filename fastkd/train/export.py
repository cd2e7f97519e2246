"""Exports a network to ONNX or its weights to safetensors, and verifies the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.train import checkpoint
from fastkd.train.files import write_whole

SIDE = 32  # sides of the ONNX input must be multiples, as encoders require
TOLERANCE = 1e-3  # relative to the largest logit: onnxruntime's kernels sum in another order


class ExportError(ValueError):
    """The file would differ from the network. Nothing is left at its path."""


class Segmenter(nn.Module):
    """images (N, 3, H, W), RGB, floats in [0, 1] -> logits (N, K, H, W)."""

    def __init__(self, network: nn.Module, align_corners: bool) -> None:
        super().__init__()
        self.network, self.align_corners = network, align_corners

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(images).logits
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=self.align_corners)


def export(path: Path, out: Path, *, size: tuple[int, int] | None = None) -> str:
    """Writes `out` in the format of its ending, .onnx or .safetensors; returns a description.

    ONNX files take any number of images of one size and include normalisation and up-sampling. The metadata of both
    formats holds classes, palette and model configuration.

    Args:
        path: a checkpoint of the trainer.
        size: (height, width) of the ONNX input; None: that of the validation, or of a training crop.

    Raises:
        ValueError: another ending, or sides not divisible by 32.
        ExportError: the file's output differs from the network's.
        ModuleNotFoundError: onnx, onnxscript or onnxruntime is missing for ONNX.
    """
    if out.suffix not in (".onnx", ".safetensors"):
        raise ValueError(f"--out {out} must end in .onnx or .safetensors")
    network, state = checkpoint.load_network(path)
    config = checkpoint.config_of(state, path)
    notes = {
        "classes": json.dumps(list(state["classes"])),
        "palette": json.dumps(state["palette"]),
        "model": json.dumps(state["config"]["model"]),
    }
    said: list[str] = []

    def write(path: Path) -> None:
        if out.suffix == ".safetensors":
            said.append(_safetensors(network, path, notes))
        else:
            sides = size or config.eval.size or config.data.crop
            said.append(_onnx(Segmenter(network, config.eval.align_corners).eval(), path, sides, notes))

    write_whole(out, write)
    return f"{out}: {said[0]}"


def _safetensors(network: nn.Module, path: Path, notes: dict[str, str]) -> str:
    from safetensors.torch import load_file, save

    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    path.write_bytes(save(state, notes))
    read = load_file(path)
    if read.keys() != state.keys() or not all(torch.equal(read[name], value) for name, value in state.items()):
        raise ExportError(f"{path} does not hold the tensors that were written; check the disk")
    return f"{len(state)} tensors, read back and bitwise equal"


def _onnx(model: nn.Module, path: Path, size: tuple[int, int], notes: dict[str, str]) -> str:
    import numpy as np
    import onnx
    import onnxruntime
    import onnxscript  # noqa: F401  torch.onnx needs it; its own error is less clear

    if size[0] % SIDE or size[1] % SIDE:
        fit = tuple(max(SIDE, round(side / SIDE) * SIDE) for side in size)
        raise ValueError(
            f"an ONNX input of {size[0]}x{size[1]} must have sides that {SIDE} divides; give --size {fit[0]} {fit[1]}"
        )
    example = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    program: Any = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    proto = program.model_proto
    for node in proto.graph.node:
        del node.metadata_props[:]  # stack traces with local paths
    onnx.helper.set_model_props(proto, notes)
    onnx.save(proto, path)
    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for images in (example, example[:1]):  # also with another batch size than traced
        with torch.no_grad():
            expected = model(images).numpy()
        (found,) = session.run(None, {"images": images.numpy()})
        worst = max(worst, float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-12)))
    if not worst <= TOLERANCE:
        raise ExportError(
            f"the logits of the ONNX file differ from the network's by {worst:.1e} of the largest, more than {TOLERANCE:.0e}"
        )
    return f"images (N, 3, {size[0]}, {size[1]}) in [0, 1] -> logits; onnxruntime agrees to {worst:.0e} of the largest"

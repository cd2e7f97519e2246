"""Configuration of a training run: dataclasses, read from YAML and the command line by jsonargparse.

    fastkd train --config run.yaml --method nfd --optim.lr 0.02

Later arguments win. Every value of the resolved configuration is written to `<out>/config.yaml`, which is itself a valid
`--config`.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from fastkd.train.files import write_text
from fastkd.train.methods.registry import LossConfig, parse_method

RECIPES = Path(__file__).parent / "recipes"


@dataclass
class DataConfig:
    """Data set and augmentation.

    Args:
        name: data set, "street_scenes" (generated) or "camvid".
        root: folder of the data set; None for generated data.
        options: further keywords of the data set, e.g. {"length": 800} for street_scenes.
        val_options: the same for the validation split, over `options`.
        crop: height and width of a training crop.
        scale: range of the random resize before the crop.
        flip: probability of a horizontal flip.
        jitter: strength of the colour jitter, 0 for none.
        workers: loader processes; 0 loads in the training process.
    """

    name: str = "street_scenes"
    root: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    val_options: dict[str, Any] = field(default_factory=dict)
    crop: tuple[int, int] = (256, 512)
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    jitter: float = 0.0
    workers: int = 0


@dataclass
class ModelConfig:
    """One segmentation network.

    Args:
        library: "smp" (segmentation-models-pytorch) or "torchvision".
        arch: class of smp (DeepLabV3, PSPNet, Segformer, FPN, ...), function of torchvision.models.segmentation, or
            "package.module:factory", a callable that is given classes=... and `options` and returns the network.
        encoder: smp encoder (resnet18, resnet101, mobilenet_v2, mit_b0, ...); "tu-<name>" is any timm model. Only for smp.
        encoder_weights: file with the encoder's state dict (.safetensors, or a torch file); None: random start. Only for smp.
        weights: file with the whole network's state dict, under its own names or those of CIRKD; None: random start.
        options: further keywords of the architecture; with smp, encoder_output_stride: 8 gives dilated features.
        logits: path of the module that returns the raw logits; None: the architecture's known one (of a factory: the network).
        features: name -> path of the features that feature losses compare (see fastkd.features); None: {encoder: the encoder's
            last} for a library's network, none for a factory's.
        aux: path of the feature map that feeds an FCN auxiliary head, e.g. "encoder[-2]"; None: no such head.
        aux_logits: path of the module that returns the logits of an auxiliary head that the network has itself.
        channels: order in which the network takes the channels of an image.
        max_value: of white in the images the network takes, 1 or 255; mean and std are in the same units and channel order.
        mean: input mean.
        std: input standard deviation.
    """

    library: Literal["smp", "torchvision"] = "smp"
    arch: str = "DeepLabV3Plus"
    encoder: str = "tu-mobilenetv3_small_100"
    encoder_weights: str | None = None
    weights: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    logits: str | None = None
    features: dict[str, str] | None = None
    aux: str | None = None
    aux_logits: str | None = None
    channels: Literal["rgb", "bgr"] = "rgb"
    max_value: float = 1.0
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


@dataclass
class OptimConfig:
    """Optimiser and schedule.

    Args:
        name: "sgd" or "adamw".
        lr: learning rate after the warm-up.
        momentum: of SGD.
        weight_decay: of every parameter.
        schedule: "poly", lr · (1 − step/steps)^power, or "cosine", lr · (1 + cos(π · step/steps)) / 2.
        power: of "poly".
        warmup: steps in which the learning rate grows linearly to its value.
        min_lr: the learning rate does not fall below this after the warm-up.
        clip: bound of the gradient's norm, None for none.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: Literal["poly", "cosine"] = "poly"
    power: float = 0.9
    warmup: int = 0
    min_lr: float = 0.0
    clip: float | None = None


@dataclass
class TrainConfig:
    """Length and mechanics of a run.

    Args:
        steps: optimiser steps.
        batch_size: images of an optimiser step, over all processes and parts.
        accumulate: parts a process does its share in, one after the other, to save memory.
        precision: "no" (fp32), "bf16" or "fp16" (GPU only, with loss scaling) of the networks.
        device: "auto" takes an accelerator if there is one.
        channels_last: memory format of networks and images.
        compile: torch.compile student and teacher.
        batch_norm: statistics of the student's batch norms: "sync" over all processes (on GPUs; with one process as
            "local"), "local" to a process, or "frozen" as they were loaded.
        ema: decay of an exponential moving average of the student's weights, which is then what is scored and saved as the
            network (e.g. 0.999); None for none.
        log_every: steps between lines of the log; only these steps wait for the device.
        checkpoint_every: steps between checkpoints, the most a crash can cost.
        panels: validation images that are drawn at evaluations, 0 for none.
    """

    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    precision: Literal["no", "fp16", "bf16"] = "no"
    device: Literal["auto", "cpu"] = "auto"
    channels_last: bool = True
    compile: bool = False
    batch_norm: Literal["sync", "local", "frozen"] = "sync"
    ema: float | None = None
    log_every: int = 10
    checkpoint_every: int = 200
    panels: int = 3


@dataclass
class EvalConfig:
    """Validation. size: images are resized to (height, width) before the model; scores are always at label resolution."""

    every: int = 200
    batch_size: int = 8
    size: tuple[int, int] | None = None
    limit: int | None = None


@dataclass
class Config:
    """A run.

    Args:
        out: run directory.
        name: name in reports; None: the directory's.
        method: "none" or a sum of kd, nfd, cwd, rdd, at, fitnet, skd, ifvd, dsd and cirkd, e.g. "nfd+rdd".
        teacher: checkpoint of a run of this trainer (best.pt or last.pt); None only with method "none".
        seed: of everything; runs that differ in their method alone start from the same student and see the same crops.
        data: data set and augmentation.
        model: the network that is trained.
        loss: weights and options of the losses.
        optim: optimiser and schedule.
        train: length and mechanics.
        eval: validation.
    """

    out: str = "runs/default"
    name: str | None = None
    method: str = "none"
    teacher: str | None = None
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def check(config: Config) -> None:
    """ValueError where values do not fit each other."""
    if parse_method(config.method) and config.teacher is None:
        raise ValueError(
            f"method {config.method!r} needs a teacher; give --teacher CHECKPOINT, or --method none to train without"
        )
    for name, value in (
        ("train.steps", config.train.steps),
        ("train.batch_size", config.train.batch_size),
        ("train.accumulate", config.train.accumulate),
        ("train.log_every", config.train.log_every),
        ("train.checkpoint_every", config.train.checkpoint_every),
        ("eval.every", config.eval.every),
        ("eval.batch_size", config.eval.batch_size),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if config.optim.lr <= 0:
        raise ValueError(f"optim.lr must be positive, got {config.optim.lr}")
    if config.train.ema is not None and not 0 < config.train.ema < 1:
        raise ValueError(f"train.ema is a decay between 0 and 1, e.g. 0.999, got {config.train.ema}; null for none")


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dicts, lists, strings and numbers: what YAML and a checkpoint hold."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def from_dict(kind: type, values: dict[str, Any]) -> Any:
    """The dataclass `kind` from `to_dict`'s output; values that are not given keep their default."""
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}; expected {', '.join(hints)}")
    return kind(**{name: _typed(hints[name], value) for name, value in values.items()})


def _typed(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_dict(hint, value)
    return tuple(value) if typing.get_origin(hint) is tuple and isinstance(value, list) else value


def _with_recipes(argv: list[str]) -> list[str]:
    """`--config NAME` may name a recipe of the package instead of a file."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    for i, word in enumerate(words[:-1]):
        recipe = RECIPES / f"{words[i + 1]}.yaml"
        if word == "--config" and not Path(words[i + 1]).exists() and recipe.exists():
            words[i + 1] = str(recipe)
    return words


def write_yaml(config: Config, path: Path) -> None:
    write_text(path, yaml.safe_dump(to_dict(config), sort_keys=False))


# Values that change nothing in what a run computes; a teacher is known by its digest, not by its path.
COSMETIC = (
    *("out", "name", "teacher", "data.root", "data.workers"),
    *("train.log_every", "train.checkpoint_every", "train.panels"),
)


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the values in which two `to_dict` outputs differ, those of `COSMETIC` left out."""
    found = []
    for key in sorted(set(a) | set(b)):
        if f"{prefix}{key}" in COSMETIC:
            continue
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found.append(f"{prefix}{key}")
    return found


def parse(argv: list[str], *, prog: str = "fastkd train") -> tuple[Config, dict[str, Any]]:
    """Configuration and flags (resume, overwrite) from command-line words; exits with a message where they are wrong."""
    from jsonargparse import ArgumentParser

    recipes = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    parser = ArgumentParser(
        prog=prog,
        usage="%(prog)s [--config FILE] [--NAME VALUE ...]",
        description="Train a segmentation network, with or without a teacher.",
    )
    parser.add_argument("--config", action="config", help=f"YAML file, or one of the recipes {recipes}")
    parser.add_argument("--resume", action="store_true", help="go on from <out>/last.pt")
    parser.add_argument("--overwrite", action="store_true", help="discard what an earlier run left in <out>")
    parser.add_class_arguments(Config)
    values = parser.instantiate(parser.parse_args(_with_recipes(argv)))
    config = Config(**{f.name: values[f.name] for f in dataclasses.fields(Config)})
    try:
        check(config)
    except ValueError as error:
        parser.error(str(error))
    return config, {"resume": values.resume, "overwrite": values.overwrite}

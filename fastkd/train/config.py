"""Configuration of a training run: dataclasses, read from YAML and the command line by jsonargparse.

    fastkd train --recipe rdd-paper --config mine.yaml --optim.lr 0.01

A recipe is applied first (recipe.py); later arguments override it. The resolved configuration is written to
`<out>/config.yaml`, which is itself a valid `--config`.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
import sys
import types
import typing
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import yaml

from fastkd import ranges
from fastkd.ranges import (
    Count,
    CountOrZero,
    InnerShare,
    NonNegative,
    Positive,
    PositiveShare,
    Seed,
    Share,
    ShareBelowOne,
)
from fastkd.train import recipe
from fastkd.train.files import write_text
from fastkd.train.methods.registry import LossConfig, parse_method
from fastkd.train.models import ModelConfig


@dataclass
class DataConfig:
    """Data set and augmentation.

    Args:
        name: data set: "street_scenes" (generated), "cityscapes", "camvid", "voc", "ade20k", or "folders" for any
            other.
        root: folder of the data set; None for generated data.
        options: more arguments of the data set, e.g. {"length": 800} for street_scenes (listed in docs/training.md).
        val_options: overrides of `options` for the validation split.
        crop: height and width of training crops.
        scale: range of the random resize before the crop.
        scale_step: factors are low, low + scale_step, ... high; 0: continuous.
        cat_max_ratio: maximum share of one class in the labelled pixels of a crop; 1 for no limit.
        flip: probability of a horizontal flip.
        jitter: strength of the colour jitter, 0 for none.
        workers: loader processes; 0 loads in the training process.
        labelled: share of the training images whose labels are used, e.g. 1/8.
        labelled_seed: selects those images, independently of the run's seed.
        unlabelled: images used by the distillation losses only: "rest" for the training images whose labels are not
            used, or a folder; None for none.
        unlabelled_share: share of unlabelled images in each batch.
    """

    name: str = "street_scenes"
    root: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    val_options: dict[str, Any] = field(default_factory=dict)
    crop: tuple[Count, Count] = (256, 512)
    scale: tuple[Positive, Positive] = (0.5, 2.0)
    scale_step: NonNegative = 0.0
    cat_max_ratio: PositiveShare = 1.0
    flip: Share = 0.5
    jitter: ShareBelowOne = 0.0
    workers: CountOrZero = 0
    labelled: PositiveShare | str = 1.0
    labelled_seed: Seed = 0
    unlabelled: str | None = None
    unlabelled_share: InnerShare = 0.5


@dataclass
class OptimConfig:
    """Optimiser and schedule.

    Args:
        name: "sgd" or "adamw".
        lr: learning rate after the warm-up.
        momentum: momentum of SGD.
        weight_decay: weight decay of every parameter.
        schedule: "poly", lr · (1 − step/steps)^power, or "cosine", lr · (1 + cos(π · step/steps)) / 2.
        power: exponent of "poly".
        warmup: steps of linear warm-up.
        min_lr: minimum of the learning rate after the warm-up.
        clip: maximum norm of the gradient, None for none.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.02
    momentum: ShareBelowOne = 0.9
    weight_decay: NonNegative = 1e-4
    schedule: Literal["poly", "cosine"] = "poly"
    power: NonNegative = 0.9
    warmup: CountOrZero = 0
    min_lr: NonNegative = 0.0
    clip: Positive | None = None


@dataclass
class TrainConfig:
    """Length and mechanics of a run.

    Args:
        steps: optimiser steps.
        batch_size: images per optimiser step, over all processes and accumulation steps.
        accumulate: gradient accumulation steps, to save memory.
        precision: dtype of the networks: "no" (fp32), "bf16" or "fp16" (GPU only, with loss scaling).
        device: "auto" uses an accelerator if available.
        channels_last: memory format of networks and images.
        compile: torch.compile student and teacher.
        batch_norm: statistics of the student's batch norms: "sync" over all processes (on GPUs; same as "local" with
            one process), "local" to a process, or "frozen" as loaded.
        ema: decay of an exponential moving average of the student's weights (e.g. 0.999), which is then evaluated and
            saved as the network; None for none.
        log_every: steps between log lines; only these steps synchronise with the device.
        checkpoint_every: steps between checkpoints, the most a crash can lose.
        panels: validation images drawn at each evaluation, 0 for none.
    """

    steps: Count = 1000
    batch_size: Count = 8
    accumulate: Count = 1
    precision: Literal["no", "fp16", "bf16"] = "no"
    device: Literal["auto", "cpu"] = "auto"
    channels_last: bool = True
    compile: bool = False
    batch_norm: Literal["sync", "local", "frozen"] = "sync"
    ema: InnerShare | None = None
    log_every: Count = 10
    checkpoint_every: Count = 200
    panels: CountOrZero = 3


@dataclass
class EvalConfig:
    """Validation; scores are always at label resolution.

    Args:
        every: steps between validations.
        batch_size: images per batch; images of different sizes are evaluated separately.
        size: resize images to this height and width before the model.
        limit: evaluate only the first N images.
        window: height and width of a sliding window; None evaluates whole images.
        stride: vertical and horizontal step of the window; None for two thirds of it.
        scales: scale factors of multi-scale evaluation; class probabilities are averaged.
        flip: also evaluate the mirrored image.
        size_divisor: pad images to multiples of this (32 suits every encoder, 8 a dilated one).
        align_corners: convention of the bilinear resize of logits to labels, as in training.
    """

    every: Count = 200
    batch_size: Count = 8
    size: tuple[Count, Count] | None = None
    limit: Count | None = None
    window: tuple[Count, Count] | None = None
    stride: tuple[Count, Count] | None = None
    scales: tuple[Positive, ...] = (1.0,)
    flip: bool = False
    size_divisor: Count = 32
    align_corners: bool = False

    def check(self) -> None:
        """Raises ValueError if values are inconsistent."""
        ranges.check(self, "eval.")
        if not self.scales:
            raise ValueError("eval.scales must be at least one factor, got none")
        if self.stride is not None and self.window is None:
            raise ValueError("eval.stride is the step of a sliding window; set eval.window too, or leave it out")
        steps = zip(self.stride or (), self.window or (), strict=False)
        if not all(0 < step <= side for step, side in steps):
            raise ValueError(
                f"eval.stride {self.stride} must be between 1 and the window {self.window}, or pixels are left out"
            )


@dataclass
class Config:
    """A run.

    Args:
        out: run directory.
        name: name in reports; None: that of the directory.
        method: "none" or a sum of kd, nfd, cwd, rdd, at, fitnet, skd, ifvd, dsd and cirkd, e.g. "nfd+rdd".
        teacher: checkpoint of a run of this trainer (best.pt or last.pt); None only with method "none".
        seed: random seed; runs that differ only in the method start from the same student and see the same crops.
        data: data set and augmentation.
        model: the network to train.
        loss: weights and options of the losses.
        optim: optimiser and schedule.
        train: length and mechanics.
        eval: validation.
    """

    out: str = "runs/default"
    name: str | None = None
    method: str = "none"
    teacher: str | None = None
    seed: Seed = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def check(config: Config) -> None:
    """Raises ValueError if a value is out of range or values are inconsistent."""
    ranges.check(config)
    if parse_method(config.method) and config.teacher is None:
        raise ValueError(
            f"method {config.method!r} needs a teacher; give --teacher CHECKPOINT, or --method none to train without"
        )
    if "rdd" in parse_method(config.method) and config.loss.task != "ce":
        raise ValueError(
            f"loss.task {config.loss.task!r}: the method rdd weights the cross-entropy of the labels itself; leave loss.task "
            "out, or use a method without rdd"
        )
    config.eval.check()
    low, high = config.data.scale
    if low > high:
        raise ValueError(f"data.scale must be [low, high] with low at most high, got {[low, high]}")
    if config.data.scale_step > high - low:
        raise ValueError(
            f"data.scale_step must be at most high - low = {high - low:g} of data.scale, got {config.data.scale_step}"
        )
    labelled_share(config.data)
    if config.data.unlabelled is not None:
        if not parse_method(config.method):
            raise ValueError("data.unlabelled: method none has no loss for images without labels; leave it out")
        if not 0 < unlabelled_size(config) < config.train.batch_size:
            raise ValueError(
                f"data.unlabelled_share {config.data.unlabelled_share} of train.batch_size {config.train.batch_size} must leave "
                "room for labelled and unlabelled images"
            )


def labelled_share(data: DataConfig) -> Fraction:
    """data.labelled, "1/8" or 0.125, as a number in (0, 1]; otherwise ValueError."""
    try:
        share = Fraction(str(data.labelled))
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share <= 1:
        raise ValueError(
            f"data.labelled is a share of the training images above 0 and up to 1, e.g. 1/8; got {data.labelled!r}"
        )
    return share


def unlabelled_size(config: Config) -> int:
    """Unlabelled images per batch."""
    data = config.data
    return 0 if data.unlabelled is None else round(data.unlabelled_share * config.train.batch_size)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dicts, lists, strings and numbers, for YAML and checkpoints."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def from_dict(kind: type, values: dict[str, Any]) -> Any:
    """The dataclass `kind` from `to_dict`'s output; missing values keep their default."""
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}; expected {', '.join(hints)}")
    return kind(**{name: _typed(hints[name], value) for name, value in values.items()})


def _typed(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint, *others = (option for option in typing.get_args(hint) if option is not type(None))
        if others:
            return tuple(value) if isinstance(value, list) else value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_dict(hint, value)
    if typing.get_origin(hint) is not tuple:
        return value
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"expected several values, got {value!r}")
    return tuple(value)


def write_yaml(config: Config, path: Path) -> None:
    write_text(path, yaml.safe_dump(to_dict(config), sort_keys=False))


# Values that do not change what a run computes. A teacher is identified by its digest, not its path.
COSMETIC = (
    *("out", "name", "teacher", "data.root", "data.workers"),
    *("train.log_every", "train.checkpoint_every", "train.panels"),
)


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the values in which two `to_dict` outputs differ, except those of `COSMETIC`."""
    found = []
    for key in sorted(set(a) | set(b), key=str):
        if f"{prefix}{key}" in COSMETIC:
            continue
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found.append(f"{prefix}{key}")
    return found


def seeds_apart(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two `to_dict` outputs are seeds of one configuration."""
    return differences(a, b) == ["seed"]


def parse(argv: list[str], *, prog: str = "fastkd train") -> tuple[Config, dict[str, Any]]:
    """Configuration and flags (resume, overwrite) from command-line words; exits with a message on errors."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(
        prog=prog,
        usage="%(prog)s [--recipe NAME] [--config FILE] [--NAME VALUE ...]",
        description="Train a segmentation network, with or without a teacher.",
        exit_on_error=False,
    )
    # Taken out before parsing, since it is applied first wherever it stands.
    parser.add_argument("--recipe", help=f"values to start from: {', '.join(recipe.names())}")
    parser.add_argument("--config", action="config", help="YAML file")
    parser.add_argument("--resume", action="store_true", help="go on from <out>/last.pt")
    parser.add_argument("--overwrite", action="store_true", help="discard what an earlier run left in <out>")
    parser.add_class_arguments(Config)
    said = ranges.limits(Config)
    for action in parser._actions:
        if action.dest in said:
            action.help = f"{str(action.help).removesuffix('.')}; {said[action.dest]}."
        if action.dest == "data.options" and {"-h", "--help"} & set(argv):
            action.help = f"{str(action.help).removesuffix('.')}. Numbers: {_data_limits()}."
    try:
        for flag, value in itertools.pairwise(part for word in argv for part in word.split("=", 1)):
            if flag == "--config" and Path(value).is_file():
                _refuse_unfolding(Path(value))
        given = parser.parse_args(argv, defaults=False)
        if chosen := given.get("recipe"):
            data = given.data.name if "data.name" in given else None
            argv = ["--config", yaml.safe_dump(recipe.load(chosen, data)), *argv]
        args = parser.parse_args(argv)
        for group in (name for name, is_group in _keys(Config).items() if is_group):
            if not hasattr(args[group], "as_dict"):
                member = next(name for name in _keys(Config) if name.startswith(f"{group}."))
                raise ValueError(f"{group} is a group of values, such as {member}; got {args[group]!r}")
        values = parser.instantiate(args)
        config = Config(**{f.name: values[f.name] for f in dataclasses.fields(Config)})
        check(config)
    except (ArgumentError, ValueError, RecursionError) as error:
        print(f"{prog}: {_with_hint(str(error))}\nAll values and their meaning: {prog} --help", file=sys.stderr)
        raise SystemExit(2) from None
    return config, {"resume": values.resume, "overwrite": values.overwrite}


def _data_limits() -> str:
    from fastkd.train.data import KINDS

    found = {name: ranges.option_limits(kind) for name, kind in KINDS.items()}
    return "; ".join(
        f"{option} of {name}, {said}" for name, options in found.items() for option, said in options.items()
    )


def _refuse_unfolding(path: Path, most: int = 100_000) -> None:
    """Raises ValueError if a YAML file's aliases expand to more than `most` values, which can exhaust memory."""
    sizes: dict[int, int] = {}

    def size(node: Any) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = most  # for an alias inside its own anchor
            parts = itertools.chain.from_iterable(n if isinstance(n, tuple) else (n,) for n in node.value)
            sizes[id(node)] = 1 if isinstance(node, yaml.ScalarNode) else 1 + sum(map(size, parts))
        return sizes[id(node)]

    try:
        root = yaml.compose(path.read_text(encoding="utf-8", errors="replace"), Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return  # reported by the parser
    if root is not None and size(root) > most:
        raise ValueError(f"{path}: its aliases (*name) unfold into more than {most} values; write them out")


def _keys(kind: type, prefix: str = "") -> dict[str, bool]:
    """Dotted name of every value of a configuration -> whether it is a group."""
    found = {}
    for name, hint in typing.get_type_hints(kind).items():
        group = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        found[prefix + name] = group
        found |= _keys(hint, f"{prefix}{name}.") if group else {}
    return found


YAML_WORDS = {"True": "on", "False": "no"}


def _hint(kind: type, name: str) -> Any:
    """The annotation of a value by its dotted name; None for groups and unknown names."""
    for part in name.split("."):
        kind = typing.get_type_hints(kind, include_extras=True).get(part) if dataclasses.is_dataclass(kind) else None  # type: ignore[assignment]
    return None if isinstance(kind, type) and dataclasses.is_dataclass(kind) else kind


def _with_hint(message: str) -> str:
    """Adds the closest existing names to jsonargparse's message about an unknown name."""
    if path := re.search(r"File does not exist: '(.+)'", message):
        stem = Path(path[1]).stem
        return f"no file {path[1]}" + (f"; the recipe is given by --recipe {stem}" if stem in recipe.names() else "")
    known_forms = (
        r"unrecognized arguments: -*([\w.]+)",
        r"Group '(.+)' does not accept option '(.+)'",
        r"Option '(.+)' is not accepted",
    )
    wrong = re.search(r'Parser key "([\w.]+)":.*(?:Got|Given) value: (.+?)\s*$', message, re.DOTALL)
    if wrong and (hint := _hint(Config, wrong[1])):
        says = f"{wrong[1]} must be {ranges.words(hint)}, got {wrong[2]}"
        if "'" in ranges.words(hint) and wrong[2] in ("True", "False"):
            says += (
                f'; YAML reads a bare yes, no, on or off as true or false: put it in quotes ("{YAML_WORDS[wrong[2]]}")'
            )
        return says
    found = next((match for form in known_forms if (match := re.search(form, message))), None)
    if found is None:
        return message
    name = ".".join(found.groups())
    known = [*_keys(Config), "config", "recipe", "resume", "overwrite"]
    close = difflib.get_close_matches(name, known, n=2)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"there is no value {name}{hint}"

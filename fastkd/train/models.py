"""Segmentation networks with taps for distillation.

`SegmentationModel` takes images as loaded and returns raw logits at their own resolution, the tapped features and, if
there is an auxiliary head, its logits. `Student` adds the 1x1 adapters of the feature losses. Nothing here downloads
anything: weights come from files that the user names (`weights.py`).
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.features import Tapped
from fastkd.ranges import Finite, Positive
from fastkd.train.weights import load_encoder_weights, load_network_weights

PROBE = (2, 3, 128, 128)  # images of the dummy forward that determines the channels of heads and adapters
TRUSTED = "FASTKD_FACTORIES"  # environment variable: comma-separated factories that a checkpoint may name


@dataclass
class ModelConfig:
    """One segmentation network.

    Args:
        library: "smp" (segmentation-models-pytorch) or "torchvision".
        arch: class of smp (DeepLabV3, PSPNet, Segformer, FPN, ...), function of torchvision.models.segmentation, or
            "package.module:factory", a callable that takes classes=... and `options` and returns the network.
        encoder: smp encoder (resnet18, resnet101, mobilenet_v2, mit_b0, ...); "tu-<name>" is any timm model. Only for
            smp.
        encoder_weights: file with the encoder's state dict (.safetensors, or a torch file); None: random. Only for smp.
        weights: file with the whole network's state dict, with its own names or CIRKD's; None: random.
        options: more arguments of the architecture; for smp, encoder_output_stride: 8 gives dilated features.
        logits: path of the module that returns the raw logits; None: known for the architectures (for a factory: the
            network).
        features: name -> path of the features that feature losses compare (see fastkd.features); None: {encoder: the
            encoder's last} for library networks, none for a factory's.
        aux: path of the feature map that feeds a new FCN auxiliary head, e.g. "encoder[-2]"; None: no such head.
        aux_logits: path of the module that returns the logits of the network's own auxiliary head.
        channels: channel order of the network's input.
        max_value: value of white in the network's input, 1 or 255; mean and std have the same units and channel order.
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
    max_value: Positive = 1.0
    mean: tuple[Finite, Finite, Finite] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)


class Output(NamedTuple):
    """logits (N, K, h, w); features by name, each (N, C, h', w'); aux (N, K, h, w) or None."""

    logits: Tensor
    features: dict[str, Tensor]
    aux: Tensor | None


class Feature(NamedTuple):
    """A tapped feature that a method needs from the student: as is (channels None) or adapted to this many channels."""

    source: str
    channels: int | None


class FCNHead(nn.Sequential):
    """Auxiliary head: 3x3 convolution to C/4 channels (at least 32), batch norm, ReLU, dropout, 1x1 to the classes."""

    def __init__(self, channels: int, classes: int):
        middle = max(channels // 4, 32)
        super().__init__(
            nn.Conv2d(channels, middle, 3, padding=1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            nn.Dropout(0.1),
            nn.Conv2d(middle, classes, 1),
        )


class SegmentationModel(nn.Module):
    """A network, its input normalisation, its taps and an optional auxiliary head.

    Args:
        network: any module that maps (N, 3, H, W) floats to a segmentation.
        classes: K.
        config: paths of the taps (`logits` and `features` are not None), and the input format.

    forward(images): RGB, uint8 in [0, 255] or floats in [0, 1], (N, 3, H, W). Auxiliary logits are resized bilinearly
    to the main logits.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        classes: int,
        config: ModelConfig,
    ):
        super().__init__()
        assert config.logits is not None
        logits, features, aux, aux_logits = config.logits, config.features or {}, config.aux, config.aux_logits
        if aux is not None and aux_logits is not None:
            raise ValueError(
                "model.aux puts a new auxiliary head on the network, model.aux_logits taps its own: give one"
            )
        self.classes, self.feature_names = classes, tuple(features)
        self.bgr, self.max_value = config.channels == "bgr", config.max_value
        # Configuration names, for messages.
        paths = {f"model.features.{name}": path for name, path in features.items()} | {"model.logits": logits}
        if aux is not None:
            paths["model.aux"] = aux
        if aux_logits is not None:
            paths["model.aux_logits"] = aux_logits
        self.tapped = Tapped(network, paths)
        self.register_buffer("mean", torch.tensor(config.mean, dtype=torch.float32).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(config.std, dtype=torch.float32).view(1, 3, 1, 1))
        owners = {name: _token_owner(network, path) for name, path in paths.items()}
        self.tokens = {name: owner for name, owner in owners.items() if owner is not None}
        taps = self._probe()
        for name, tap in taps.items():
            wanted = classes if name in ("model.logits", "model.aux_logits") else None
            if tap.dim() != 4 or tap.shape[1] != (wanted or tap.shape[1]):
                expected = f"(N, {wanted or 'C'}, h, w), or tokens of a timm vision transformer"
                hint = f"; name the layer that returns the raw logits of the {classes} classes" if wanted else ""
                raise ValueError(f"{name} {paths[name]!r} returns shape {tuple(tap.shape)}, expected {expected}{hint}")
        self.channels = {name: taps[f"model.features.{name}"].shape[1] for name in self.feature_names}
        self.has_aux = aux is not None or aux_logits is not None
        self.aux_head = FCNHead(taps["model.aux"].shape[1], classes) if aux is not None else None

    def normalise(self, images: Tensor) -> Tensor:
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        if self.bgr:
            images = images.flip(1)
        if self.max_value != 1:
            images = images * self.max_value
        return (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Output:
        taps = self._taps(self.normalise(images))
        logits, aux = taps["model.logits"], None
        if self.has_aux:
            aux = taps["model.aux_logits"] if self.aux_head is None else self.aux_head(taps["model.aux"])
            if aux.shape[-2:] != logits.shape[-2:]:
                aux = F.interpolate(aux, logits.shape[-2:], mode="bilinear", align_corners=False)
        return Output(logits, {name: taps[f"model.features.{name}"] for name in self.feature_names}, aux)

    @torch.no_grad()
    def _probe(self) -> dict[str, Tensor]:
        training = self.training
        self.eval()
        taps = self._taps(torch.zeros(PROBE))
        self.train(training)
        return taps

    def _taps(self, images: Tensor) -> dict[str, Tensor]:
        """The tapped tensors; tokens (N, L, C) of a timm vision transformer as maps (N, C, h, w)."""
        taps = self.tapped(images).taps
        for name, path in self.tokens.items():
            if taps[name].dim() == 3:
                transformer = self.tapped.model.get_submodule(path)
                taps[name] = token_map(taps[name], transformer, images.shape[-2:], name)
        return taps


def _token_owner(network: nn.Module, path: str) -> str | None:
    """The timm vision transformer of a tapped module: the one that contains it, or the network's only one."""
    path = path.partition("[")[0]
    found = [
        name for name, m in network.named_modules() if hasattr(m, "num_prefix_tokens") and hasattr(m, "patch_embed")
    ]
    around = [name for name in found if name in ("", path) or path.startswith(f"{name}.")]
    return around[-1] if around else found[0] if len(found) == 1 else None


def token_map(tokens: Tensor, transformer: Any, size: Sequence[int], name: str) -> Tensor:
    """Tokens (N, L, C) of a timm vision transformer as a map (N, C, h, w): class and register tokens dropped, no copy.

    Args:
        transformer: has `num_prefix_tokens` and `patch_embed`.
        size: of the images; determines the grid.
        name: of the tap, for the message.
    """
    prefix, patches = transformer.num_prefix_tokens, transformer.patch_embed
    if hasattr(patches, "dynamic_feat_size"):
        height, width = patches.dynamic_feat_size(tuple(size))
    else:
        height, width = (side // patch for side, patch in zip(size, patches.patch_size, strict=True))
    if tokens.shape[1] != prefix + height * width:
        raise ValueError(
            f"{name} returns {tokens.shape[1]} tokens, expected {prefix} and a grid of {height} x {width} for images of "
            f"{size[0]} x {size[1]}; tap a block that keeps all of them"
        )
    return tokens[:, prefix:].transpose(1, 2).unflatten(2, (height, width))


class Student(nn.Module):
    """The trained module: a model, and a 1x1 adapter for each feature that is compared in the teacher's channels.

    Args:
        model: the network.
        features: the features to return; others are dropped.
    """

    def __init__(self, model: SegmentationModel, features: Mapping[str, Feature] | None = None):
        super().__init__()
        self.model = model
        self.features = dict(features or {})
        self.adapters = nn.ModuleDict()
        for name, feature in self.features.items():
            if feature.channels is not None:
                self.adapters[name] = nn.Conv2d(model.channels[feature.source], feature.channels, 1)

    def forward(self, images: Tensor) -> Output:
        out = self.model(images)
        features = {}
        for name, feature in self.features.items():
            tapped = out.features[feature.source]
            features[name] = self.adapters[name](tapped) if name in self.adapters else tapped
        return Output(out.logits, features, out.aux)


def build_model(config: ModelConfig, classes: int, *, from_checkpoint: bool = False) -> SegmentationModel:
    """The network of `config` for `classes` classes, randomly initialised except for the weights files it names.

    from_checkpoint: skip weights files, since the whole state is loaded next, and call a factory only if the
    environment variable FASTKD_FACTORIES lists it, since the configuration comes from a file. ValueError names what
    does not fit.
    """
    try:
        return _build(config, classes, from_checkpoint)
    except (RuntimeError, AssertionError, TypeError, LookupError, AttributeError, NotImplementedError) as error:
        if is_memory(error):
            raise
        encoder = f", encoder {config.encoder!r}" if config.library == "smp" and ":" not in config.arch else ""
        raise ValueError(
            f"model.arch {config.arch!r}{encoder}, options {config.options}: {first_line(error)}"
        ) from error


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def is_memory(error: BaseException) -> bool:
    """Whether an error means out of memory (a RuntimeError in torch)."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def refused(network: SegmentationModel, size: Sequence[int], error: Exception, *, value: str) -> Exception:
    """Explains an exception raised by a forward of images of `size`, which the configuration value `value` sets.

    Tries nearby sizes on zero images and names those that work. Errors unrelated to the size are returned unchanged.
    """
    if is_memory(error):
        return error
    if "Expected more than 1 value per channel" in str(error):
        return ValueError(
            "a batch norm sees a single value of each channel and has no variance to divide by: give a process two images at a "
            "time (raise train.batch_size or lower train.accumulate), raise data.crop, or set train.batch_norm frozen"
        )
    if _takes(network, size):
        return error
    near = [tuple(max(d, round(side / d) * d) for side in size) for d in (8, 16, 32, 64)]
    fits = next((sides for sides in near if sides != tuple(size) and _takes(network, sides)), None)
    advice = f"it takes {list(fits)}" if fits else "sizes near it that 8, 16, 32 or 64 divides do not do either"
    return ValueError(f"{value} {list(size)} does not suit the network ({first_line(error)}); {advice}")


@torch.no_grad()
def _takes(network: SegmentationModel, size: Sequence[int]) -> bool:
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        network(torch.zeros(1, 3, *size, device=network.mean.device))
        return True
    except Exception:  # any exception means no
        return False
    finally:
        for module, training in modes:
            module.training = training


def _build(config: ModelConfig, classes: int, from_checkpoint: bool) -> SegmentationModel:
    if ":" in config.arch:
        kind, network, logits, features = "factory", _factory(config, classes, from_checkpoint), "", {}
    elif config.library == "smp":
        kind, network, logits, features = (
            "smp",
            _smp(config, classes),
            "segmentation_head.0",
            {"encoder": "encoder[-1]"},
        )
    else:
        kind, network, logits = "torchvision", _torchvision(config, classes), "classifier"
        features = {"encoder": "backbone[out]"}
    if config.encoder_weights and kind != "smp":
        raise ValueError(
            f"model.encoder_weights is read by library 'smp' only, got a {kind} network; use model.weights"
        )
    if config.encoder_weights and not from_checkpoint:
        load_encoder_weights(network.get_submodule("encoder"), config.encoder, Path(config.encoder_weights))
    taps: dict[str, Any] = {
        "logits": logits if config.logits is None else config.logits,
        "features": features if config.features is None else config.features,
    }
    model = SegmentationModel(network, classes, dataclasses.replace(config, **taps))
    head = getattr(network, "segmentation_head", None)
    if kind == "smp" and config.logits is None and isinstance(head, nn.Sequential):
        head[1] = nn.Identity()  # the up-sampling after the tapped logits is not needed
    if config.weights and not from_checkpoint:
        load_network_weights(model, Path(config.weights))
    return model


def _smp(config: ModelConfig, classes: int) -> nn.Module:
    import segmentation_models_pytorch as smp

    known = {name: kind for name, kind in vars(smp).items() if isinstance(kind, type) and issubclass(kind, nn.Module)}
    if config.arch not in known:
        close = difflib.get_close_matches(config.arch, known, n=3) or sorted(known)
        raise ValueError(
            f"model.arch: segmentation-models-pytorch has no {config.arch!r}; did you mean {', '.join(close)}?"
        )
    if ":" in config.encoder:  # timm's hf-hub:NAME and local-dir:PATH
        raise ValueError(
            f"model.encoder: got {config.encoder!r}, a place to fetch a network from; expected the name of one"
        )
    options = dict(config.options)
    if config.arch == "PSPNet" and "encoder_output_stride" in options:
        # smp's PSPNet stops at the third stage; the published one dilates the last two.
        options = {"encoder_depth": 5, "output_stride": options.pop("encoder_output_stride")} | options
    try:
        network = known[config.arch](config.encoder, encoder_weights=None, classes=classes, **options)
    except (
        TypeError,
        KeyError,
        RuntimeError,
        ValueError,
        AssertionError,
        AttributeError,
        NotImplementedError,
    ) as error:
        raise ValueError(
            f"cannot build {config.arch} with encoder {config.encoder!r}, options {config.options}: {first_line(error)}"
        ) from error
    _keep_first_dilation(network.get_submodule("encoder"))
    return network


def _keep_first_dilation(encoder: nn.Module) -> None:
    """In a dilated ResNet, lets the convolution that lost its stride keep the dilation of the previous stage.

    torchvision and the published networks do so, and their weights expect it; smp dilates it further.
    """
    for stage in (getattr(encoder, "layer3", None), getattr(encoder, "layer4", None)):
        if isinstance(stage, nn.Sequential):
            block: Any = stage[0]
            convolution = block.conv2 if hasattr(block, "conv3") else block.conv1
            if convolution.dilation[0] > 1:
                halved = (convolution.dilation[0] // 2,) * 2
                convolution.dilation = convolution.padding = halved


def _torchvision(config: ModelConfig, classes: int) -> nn.Module:
    from torchvision.models import get_model, list_models, segmentation

    known = list_models(module=segmentation)
    if config.arch not in known:
        close = difflib.get_close_matches(config.arch, known, n=3) or known
        raise ValueError(
            f"model.arch: torchvision has no segmentation model {config.arch!r}; did you mean {', '.join(close)}?"
        )
    return get_model(config.arch, weights=None, weights_backbone=None, num_classes=classes, **config.options)


def _factory(config: ModelConfig, classes: int, from_checkpoint: bool) -> nn.Module:
    """Calls the "package.module:factory" of `config.arch`."""
    where = f"model.arch {config.arch!r}"
    if from_checkpoint and config.arch not in os.environ.get(TRUSTED, "").split(","):
        raise ValueError(
            f"{where} is code that a checkpoint names; if you trust it, allow it with {TRUSTED}={config.arch} in the environment"
        )
    module_name, _, path = config.arch.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{where}: {error}; install it, or put the folder that holds it into the environment variable PYTHONPATH"
        ) from error
    for name in path.split("."):
        if not hasattr(found, name):
            close = difflib.get_close_matches(name, dir(found), n=3)
            raise ValueError(
                f"{where}: {getattr(found, '__name__', module_name)} has no {name!r}"
                + (f"; did you mean {', '.join(close)}?" if close else "")
            )
        found = getattr(found, name)
    try:
        inspect.signature(found).bind(classes=classes, **config.options)
    except TypeError as error:
        raise ValueError(
            f"{where} cannot be called with classes={classes} and model.options {config.options}: {error}; expected a function "
            "or class that takes classes=... and returns a torch.nn.Module"
        ) from error
    factory: Callable[..., Any] = found
    network = factory(classes=classes, **config.options)
    if not isinstance(network, nn.Module):
        raise ValueError(f"{where} returned a {type(network).__name__}, expected a torch.nn.Module")
    return network

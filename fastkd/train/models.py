"""Segmentation networks with the taps that distillation needs.

`SegmentationModel` takes images as they are loaded and returns the raw logits at their own resolution, the tapped features
and, where the network has one, the logits of an FCN auxiliary head. `Student` adds the 1x1 adapters of the feature losses.
Nothing here downloads anything: encoder weights come from a file the user names.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.features import Tapped
from fastkd.train.config import ModelConfig

PROBE = (2, 3, 128, 128)  # images of the dummy forward that sizes heads and adapters


class Output(NamedTuple):
    """logits (N, K, h, w); features by name, each (N, C, h', w'); aux (N, K, h, w) or None."""

    logits: Tensor
    features: dict[str, Tensor]
    aux: Tensor | None


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
        logits: path of the module that returns the raw logits.
        features: name -> path of the features to return.
        aux: path of the feature map an FCN head is put on, or None.
        mean, std: of images in [0, 1].

    forward(images): uint8 in [0, 255] or floats in [0, 1], (N, 3, H, W). The auxiliary logits are resized bilinearly to the
    main logits, so that the two heads can be compared pixel by pixel.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        classes: int,
        *,
        logits: str,
        features: Mapping[str, str],
        aux: str | None = None,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ):
        super().__init__()
        self.feature_names = tuple(features)
        paths = {f"feature/{name}": path for name, path in features.items()} | {"logits": logits}
        if aux is not None:
            paths["aux"] = aux
        self.tapped = Tapped(network, paths)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1))
        taps = self._probe()
        if taps["logits"].dim() != 4 or taps["logits"].shape[1] != classes:
            shape = tuple(taps["logits"].shape)
            raise ValueError(
                f"model.logits {logits!r} returns shape {shape}, expected (N, {classes}, h, w); name the last layer"
            )
        for name in self.feature_names:
            if taps[f"feature/{name}"].dim() != 4:
                shape = tuple(taps[f"feature/{name}"].shape)
                raise ValueError(
                    f"model.features {name!r} ({features[name]!r}) has shape {shape}, expected (N, C, h, w)"
                )
        self.channels = {name: taps[f"feature/{name}"].shape[1] for name in self.feature_names}
        self.aux_head = FCNHead(taps["aux"].shape[1], classes) if aux is not None else None

    @property
    def has_aux(self) -> bool:
        return self.aux_head is not None

    def normalise(self, images: Tensor) -> Tensor:
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        return (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Output:
        taps = self.tapped(self.normalise(images)).taps
        logits, aux = taps["logits"], None
        if self.aux_head is not None:
            aux = self.aux_head(taps["aux"])
            if aux.shape[-2:] != logits.shape[-2:]:
                aux = F.interpolate(aux, logits.shape[-2:], mode="bilinear", align_corners=False)
        return Output(logits, {name: taps[f"feature/{name}"] for name in self.feature_names}, aux)

    @torch.no_grad()
    def _probe(self) -> dict[str, Tensor]:
        training = self.training
        self.eval()
        taps = self.tapped(torch.zeros(PROBE)).taps
        self.train(training)
        return taps


class Student(nn.Module):
    """The trained module: a model and, where the teacher's channels differ, a 1x1 adapter for each compared feature.

    Args:
        model: the network.
        teacher_channels: feature name -> channels of the teacher; these features are returned, adapted, and no others.
    """

    def __init__(self, model: SegmentationModel, teacher_channels: Mapping[str, int] | None = None):
        super().__init__()
        self.model = model
        self.returned = tuple(teacher_channels or ())
        self.adapters = nn.ModuleDict()
        for name, channels in (teacher_channels or {}).items():
            if model.channels[name] != channels:
                self.adapters[name] = nn.Conv2d(model.channels[name], channels, 1)

    def forward(self, images: Tensor) -> Output:
        out = self.model(images)
        features = {
            n: self.adapters[n](out.features[n]) if n in self.adapters else out.features[n] for n in self.returned
        }
        return Output(out.logits, features, out.aux)


def build_model(config: ModelConfig, classes: int, *, load_encoder: bool = True) -> SegmentationModel:
    """The network of `config` for `classes` classes, randomly started but for the encoder's weights file.

    load_encoder=False leaves the file out, for a model whose whole state is loaded next. ValueError names what does not fit.
    """
    network = (_smp if config.library == "smp" else _torchvision)(config, classes)
    if config.encoder_weights and load_encoder:
        if config.library != "smp":
            raise ValueError("model.encoder_weights is read by library 'smp' only; leave it out with 'torchvision'")
        load_encoder_weights(network.get_submodule("encoder"), config.encoder, Path(config.encoder_weights))
    logits = config.logits or ("segmentation_head.0" if config.library == "smp" else "classifier")
    model = SegmentationModel(
        network, classes, logits=logits, features=config.features, aux=config.aux, mean=config.mean, std=config.std
    )
    head = getattr(network, "segmentation_head", None)
    if config.logits is None and isinstance(head, nn.Sequential) and len(head) > 1:
        head[1] = nn.Identity()  # the up-sampling after the tapped logits would be thrown away
    return model


def _smp(config: ModelConfig, classes: int) -> nn.Module:
    import segmentation_models_pytorch as smp

    known = {name: kind for name, kind in vars(smp).items() if isinstance(kind, type) and issubclass(kind, nn.Module)}
    if config.arch not in known:
        close = difflib.get_close_matches(config.arch, known, n=3) or sorted(known)
        raise ValueError(
            f"model.arch: segmentation-models-pytorch has no {config.arch!r}; did you mean {', '.join(close)}?"
        )
    try:
        return known[config.arch](config.encoder, encoder_weights=None, classes=classes, **config.options)
    except (TypeError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"cannot build {config.arch} with encoder {config.encoder!r}, options {config.options}: {error}"
        ) from error


def _torchvision(config: ModelConfig, classes: int) -> nn.Module:
    from torchvision.models import get_model, list_models, segmentation

    known = list_models(module=segmentation)
    if config.arch not in known:
        close = difflib.get_close_matches(config.arch, known, n=3) or known
        raise ValueError(
            f"model.arch: torchvision has no segmentation model {config.arch!r}; did you mean {', '.join(close)}?"
        )
    return get_model(config.arch, weights=None, weights_backbone=None, num_classes=classes, **config.options)


def load_state_file(path: Path) -> dict[str, Tensor]:
    """State dict of a .safetensors or torch file (read without running code from it). ValueError names an unreadable file."""
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has its own exceptions; all of them mean the same here
        raise ValueError(f"cannot read weights from {path}: {error}") from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"{path} holds no state dict: expected a mapping from names to tensors, got {type(state).__name__}"
        )
    return dict(state)


def load_encoder_weights(encoder: nn.Module, name: str, path: Path) -> None:
    """Loads `path` into an smp encoder, strictly: every tensor of the encoder must be there with its shape, and the only
    tensors left over may be the classifier's (for timm: those of the full model that the encoder does not use)."""
    state = load_state_file(path)
    own = encoder.state_dict()
    matched = {}
    for key in own:
        source = key.removeprefix("model.")
        if source not in state:  # timm flattens `stages.0` to `stages_0` when it extracts features
            source = re.sub(r"^([a-z]+)_(\d+)\.", r"\1.\2.", source)
        matched[key] = source
    missing = [source for source in matched.values() if source not in state]
    extra = [key for key in set(state) - set(matched.values()) if not _is_classifier(name, key)]
    shapes = [
        f"{source} is {tuple(state[source].shape)}, expected {tuple(own[key].shape)}"
        for key, source in matched.items()
        if source in state and state[source].shape != own[key].shape
    ]
    if missing or extra or shapes:
        parts = [f"{what}: {', '.join(sorted(names)[:4])}{' ...' if len(names) > 4 else ''} ({len(names)})"
                 for what, names in (("missing", missing), ("unknown", extra), ("shape", shapes)) if names]  # fmt: skip
        raise ValueError(f"{path} does not fit encoder {name!r}: {'; '.join(parts)}")
    encoder.load_state_dict({key: state[source] for key, source in matched.items()})


def _is_classifier(encoder: str, key: str) -> bool:
    if encoder.startswith("tu-"):
        return key in _timm_keys(encoder.removeprefix("tu-"))
    return key.split(".")[0] in ("fc", "classifier", "head", "last_linear")


@lru_cache
def _timm_keys(name: str) -> frozenset[str]:
    import timm

    with torch.device("meta"):
        return frozenset(timm.create_model(name, pretrained=False).state_dict())

"""State dicts from files: encoders, whole networks, and other projects' tensor names."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Names in a CIRKD checkpoint -> names of `SegmentationModel` around smp's DeepLabV3. The backbone has torchvision's
# names. The heads' names are from awesome-semantic-segmentation-pytorch, whose layout CIRKD follows. CIRKD's PSPNet
# and MobileNetV2 have no counterpart in smp and are an error.
CIRKD = (
    (r"pretrained\.", "tapped.model.encoder."),
    (r"head\.aspp\.b0\.", "tapped.model.decoder.aspp.convs.0."),
    (r"head\.aspp\.b([123])\.block\.", r"tapped.model.decoder.aspp.convs.\1."),
    (r"head\.aspp\.b4\.gap\.", "tapped.model.decoder.aspp.convs.4."),
    (r"head\.aspp\.project\.", "tapped.model.decoder.aspp.project."),
    (r"head\.block\.0\.", "tapped.model.decoder.conv."),
    (r"head\.block\.1\.", "tapped.model.decoder.bn."),
    (r"head\.block\.4\.", "tapped.model.segmentation_head.0."),
    (r"auxlayer\.block\.", "aux_head."),
)
# Input format of these networks.
CIRKD_INPUT = "channels: bgr, max_value: 255, mean: [104.007, 116.669, 122.679], std: [1, 1, 1]"


# Keys under which checkpoints keep the state dict; the first present is used, recursively.
HOLDERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "module", "network", "net", "weights", "params"),
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
)
SAVE = "save the state dict alone: torch.save(network.state_dict(), FILE)"


def load_state_file(path: Path) -> dict[str, Tensor]:
    """State dict of a .safetensors or torch file, read without executing code from it.

    Unwraps checkpoints by `HOLDERS`; `fitted` strips prefixes. ValueError: the file cannot be read, or holds more than
    tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has its own exceptions
        if kind := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{path} holds an object of {kind[1]} beside tensors, which would run code when read; {SAVE}"
            ) from error
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"cannot read weights from {path}: {first}; is it complete, and a .safetensors or torch file?"
        ) from error
    state = _unwrapped(state)
    if not isinstance(state, Mapping):
        raise ValueError(
            f"{path} holds no state dict but a {type(state).__name__}, expected a mapping from names to tensors; {SAVE}"
        )
    if other := next((key for key, value in state.items() if not isinstance(value, Tensor)), None):
        beside = "beside tensors" if any(isinstance(value, Tensor) for value in state.values()) else "and no state dict"
        raise ValueError(
            f"{path} holds {str(other)!r} ({type(state[other]).__name__}) {beside} "
            f"(expected under {', '.join(HOLDERS[:4])}, ...); {SAVE}"
        )
    return {str(name): value for name, value in state.items()}


def _unwrapped(state: Any) -> Any:
    """The innermost mapping that the `HOLDERS` lead to."""
    while isinstance(state, Mapping):
        if "n_averaged" in state:  # AveragedModel's step count
            state = {key: value for key, value in state.items() if key != "n_averaged"}
        inner = next((state[key] for key in HOLDERS if isinstance(state.get(key), Mapping)), None)
        if inner is None:
            break
        state = inner
    return state


def fitted(state: dict[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """`state` without prefixes that all names share ("module.", "student."), if more names then match `expected`."""
    best = state
    while state and len(heads := {key.partition(".")[0] for key in state}) == 1 and all("." in key for key in state):
        state = {key.removeprefix(f"{next(iter(heads))}."): value for key, value in state.items()}
        if len(state.keys() & set(expected)) > len(best.keys() & set(expected)):
            best = state
    return best


def load_encoder_weights(encoder: nn.Module, name: str, path: Path) -> None:
    """Loads `path` into an smp encoder strictly: all tensors must be there with their shapes, and only classifier
    tensors (for timm: those that the encoder does not use) may be left over."""
    own = encoder.state_dict()
    timm = {re.sub(r"^([a-z]+)_(\d+)\.", r"\1.\2.", key.removeprefix("model.")) for key in own}
    state = fitted(load_state_file(path), {*own, *timm, *(key.removeprefix("model.") for key in own)})
    if own.keys() & state.keys() and all(key.startswith("model.") for key in own):  # the state dict of such an encoder
        state = {key.removeprefix("model."): value for key, value in state.items()}
    matched = {}
    for key in own:
        source = key.removeprefix("model.")
        if source not in state:  # timm renames `stages.0` to `stages_0` when it extracts features
            source = re.sub(r"^([a-z]+)_(\d+)\.", r"\1.\2.", source)
        matched[key] = source
    extra = [key for key in set(state) - set(matched.values()) if not _is_classifier(name, key)]
    _load(encoder, matched, state, extra, f"{path} does not fit encoder {name!r}")


def _is_classifier(encoder: str, key: str) -> bool:
    if encoder.startswith("tu-"):
        return key in _timm_keys(encoder.removeprefix("tu-"))
    return key.split(".")[0] in ("fc", "classifier", "head", "last_linear")


@lru_cache
def _timm_keys(name: str) -> frozenset[str]:
    import timm

    with torch.device("meta"):
        return frozenset(timm.create_model(name, pretrained=False).state_dict())


def load_network_weights(model: Any, path: Path) -> None:
    """Loads `path` into a whole network strictly, except for an auxiliary head that the model does not have.

    The file may use the names of the network, of this trainer's checkpoints, or of CIRKD.
    """
    own = model.state_dict()
    state = fitted(load_state_file(path), {*own, *(key.removeprefix("tapped.model.") for key in own), *_foreign(own)})
    if any(key.startswith("pretrained.") for key in state) and not any("model.pretrained." in key for key in own):
        names = {key: _translate(key) for key in state if not key.startswith("pretrained.fc.")}
        if not (model.bgr and model.max_value == 255):
            warnings.warn(f"{path} has the names of CIRKD, whose networks expect model {{{CIRKD_INPUT}}}", stacklevel=2)
    elif any(key.startswith("tapped.model.") for key in state):
        names = {key: key for key in state if key not in ("mean", "std")}
    else:
        names = {key: f"tapped.model.{key}" for key in state}
    matched = {target: source for source, target in names.items() if target in own}
    for key in own:
        if key not in ("mean", "std"):
            matched.setdefault(key, key)  # if missing, reported under our name
    unused = ("aux_head.", "tapped.model.aux_classifier.")  # the latter is torchvision's
    extra = [source for source, target in names.items() if target not in own and not target.startswith(unused)]
    _load(model, matched, state, extra, f"{path} does not fit {type(model.tapped.model).__name__}")


def _foreign(own: Collection[str]) -> set[str]:
    """Prefixes of names in CIRKD files."""
    return {f"pretrained.{key.removeprefix('tapped.model.encoder.')}" for key in own if ".encoder." in key}


def _translate(key: str) -> str:
    for pattern, replacement in CIRKD:
        if re.match(pattern, key):
            return re.sub(f"^{pattern}", replacement, key)
    return key


def _load(
    module: nn.Module, matched: Mapping[str, str], state: Mapping[str, Tensor], extra: list[str], problem: str
) -> None:
    """Loads state[source] into each name of `matched` (name -> source). ValueError lists missing, extra and misshapen.

    A missing batch count stays 0: older files lack it, and nothing here reads it.
    """
    own = module.state_dict()
    missing = [s for s in matched.values() if s not in state and not s.endswith("num_batches_tracked")]
    shapes = [
        f"{source} is {tuple(state[source].shape)}, expected {tuple(own[key].shape)}"
        for key, source in matched.items()
        if source in state and state[source].shape != own[key].shape
    ]
    found = {"missing": missing, "unknown": extra, "shape": shapes}
    parts = [
        f"{what}: {', '.join(sorted(names)[:4])}{' ...' if len(names) > 4 else ''} ({len(names)})"
        for what, names in found.items()
        if names
    ]
    if parts:
        raise ValueError(f"{problem}: {'; '.join(parts)}")
    module.load_state_dict({key: state[s] for key, s in matched.items() if s in state}, strict=False)

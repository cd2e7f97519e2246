"""The methods by name. To add one, add a file here and a line in `LossConfig`."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields

from fastkd.ranges import NonNegative, ShareBelowOne
from fastkd.train.methods.at import ATConfig
from fastkd.train.methods.cirkd import CIRKDConfig
from fastkd.train.methods.cwd import CWDConfig
from fastkd.train.methods.dsd import DSDConfig
from fastkd.train.methods.fitnet import FitNetConfig
from fastkd.train.methods.ifvd import IFVDConfig
from fastkd.train.methods.kd import KDConfig
from fastkd.train.methods.nfd import NFDConfig
from fastkd.train.methods.rdd import RDDConfig
from fastkd.train.methods.skd import SKDConfig
from fastkd.train.methods.task import DiceConfig, OHEMConfig, Task, TaskLoss


@dataclass
class LossConfig:
    """Weights and options of the losses; `method` selects which are summed.

    Args:
        task: loss of the labels: "ce" (cross-entropy), "ce+dice", "ohem", "focal" or "bce" (each class against the
            rest). Method rdd has its own.
        label_smoothing: label smoothing of the cross-entropy of "ce" and "ce+dice".
        focal_gamma: exponent of "focal".
        dice: options of "ce+dice".
        ohem: options of "ohem".
        aux_weight: weight of the task loss of the student's auxiliary head, if any.
        align_corners: convention of the resize of logits to labels (True in the released code of CIRKD and RDD).
    """

    task: Task = "ce"
    label_smoothing: ShareBelowOne = 0.0
    focal_gamma: NonNegative = 2.0
    dice: DiceConfig = field(default_factory=DiceConfig)
    ohem: OHEMConfig = field(default_factory=OHEMConfig)
    aux_weight: NonNegative = 0.4
    align_corners: bool = False
    kd: KDConfig = field(default_factory=KDConfig)
    nfd: NFDConfig = field(default_factory=NFDConfig)
    cwd: CWDConfig = field(default_factory=CWDConfig)
    rdd: RDDConfig = field(default_factory=RDDConfig)
    at: ATConfig = field(default_factory=ATConfig)
    fitnet: FitNetConfig = field(default_factory=FitNetConfig)
    skd: SKDConfig = field(default_factory=SKDConfig)
    ifvd: IFVDConfig = field(default_factory=IFVDConfig)
    dsd: DSDConfig = field(default_factory=DSDConfig)
    cirkd: CIRKDConfig = field(default_factory=CIRKDConfig)

    def build_task(self, ignore_index: int) -> TaskLoss:
        return TaskLoss(
            self.task,
            label_smoothing=self.label_smoothing,
            focal_gamma=self.focal_gamma,
            dice=self.dice,
            ohem=self.ohem,
            ignore_index=ignore_index,
            align_corners=self.align_corners,
        )


METHODS = tuple(f.name for f in fields(LossConfig) if hasattr(f.default_factory, "build"))


def parse_method(method: str) -> tuple[str, ...]:
    """The losses that a method sums: "none" -> (), "nfd+rdd" -> ("nfd", "rdd"). ValueError for unknown or repeated ones."""
    if method == "none":
        return ()
    words = tuple(word.strip().lower() for word in method.split("+"))
    for word in words:
        if word not in METHODS:
            close = difflib.get_close_matches(word, METHODS, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(
                f"method {method!r}: unknown loss {word!r}; {hint}expected 'none' or a sum of {', '.join(METHODS)}"
            )
    if len(set(words)) != len(words):
        raise ValueError(
            f"method {method!r} names a loss twice; set its weight instead, e.g. --loss.{words[0]}.weight 2"
        )
    return words

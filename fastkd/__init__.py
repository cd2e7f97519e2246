"""FastKD: fused losses for knowledge distillation and semantic segmentation.

Importing it needs only torch and compiles nothing; kernels are loaded by the first call that uses them.
"""

from ._version import __version__ as __version__
from .backends import BackendError, backend_info, use_backend
from .functional import (
    CEDiceOutput,
    RDDOutput,
    cwd_loss,
    difficulty_mask,
    kd_loss,
    nfd_loss,
    rdd_loss,
    resized_binary_cross_entropy,
    resized_cross_entropy,
    resized_cross_entropy_dice_loss,
    resized_dice_loss,
    resized_kd_loss,
    resized_ohem_cross_entropy,
    teacher_confidence,
)
from .losses import (
    CWDLoss,
    KDLoss,
    NFDLoss,
    RDDLoss,
    ResizedBinaryCrossEntropyLoss,
    ResizedCrossEntropyDiceLoss,
    ResizedCrossEntropyLoss,
    ResizedDiceLoss,
    ResizedKDLoss,
    ResizedOHEMCrossEntropyLoss,
)

__all__ = [
    "BackendError",
    "CEDiceOutput",
    "CWDLoss",
    "KDLoss",
    "NFDLoss",
    "RDDLoss",
    "RDDOutput",
    "ResizedBinaryCrossEntropyLoss",
    "ResizedCrossEntropyDiceLoss",
    "ResizedCrossEntropyLoss",
    "ResizedDiceLoss",
    "ResizedKDLoss",
    "ResizedOHEMCrossEntropyLoss",
    "backend_info",
    "cwd_loss",
    "difficulty_mask",
    "kd_loss",
    "nfd_loss",
    "rdd_loss",
    "resized_binary_cross_entropy",
    "resized_cross_entropy",
    "resized_cross_entropy_dice_loss",
    "resized_dice_loss",
    "resized_kd_loss",
    "resized_ohem_cross_entropy",
    "teacher_confidence",
    "use_backend",
]

"""The public losses as callables of student, teacher and labels, for tests and tools that iterate over all of them.

``labels`` are at label resolution; losses at map resolution resize them by nearest neighbour. Options (a reduction, a
temperature) are passed to the function.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fastkd

Loss = Callable[..., Tensor]


def nearest(labels: Tensor, like: Tensor) -> Tensor:
    """Labels resized to the resolution of a map."""
    rows, columns = (
        torch.arange(n, device=labels.device) * m // max(n, 1)
        for n, m in zip(like.shape[-2:], labels.shape[-2:], strict=True)
    )
    return labels[:, rows][:, :, columns].contiguous()


def against_the_rest(labels: Tensor, like: Tensor) -> Tensor:
    """One binary map per class: (N, C, H, W) of 0 and 1, 255 if ignored."""
    one = torch.stack([labels == c for c in range(like.shape[1])], 1).to(torch.uint8)
    return torch.where((labels == 255)[:, None], 255, one)


def _rdd(stage: str, part: str, **fixed) -> Loss:
    def loss(s: Tensor, t: Tensor, y: Tensor, **options) -> Tensor:
        return getattr(fastkd.rdd_loss(s, t, y, stage=stage, teacher_aux=t.flip(1), **fixed, **options), part)

    return loss


LOSSES: dict[str, Loss] = {
    "nfd": lambda s, t, y, **options: fastkd.nfd_loss(s, t, **options),
    "nfd_nhw": lambda s, t, y, **options: fastkd.nfd_loss(s, t, dims="nhw", **options),
    "nfd_c": lambda s, t, y, **options: fastkd.nfd_loss(s, t, dims="c", **options),
    "nfd_chw": lambda s, t, y, **options: fastkd.nfd_loss(s, t, dims="chw", **options),
    "resized_ohem_ce": lambda s, t, y, **options: fastkd.resized_ohem_cross_entropy(s, y, **{"min_kept": 50} | options),
    "cwd": lambda s, t, y, **options: fastkd.cwd_loss(s, t, **options),
    "kd": lambda s, t, y, **options: fastkd.kd_loss(s, t, **options),
    "kd_target": lambda s, t, y, **options: fastkd.kd_loss(s, t, target=nearest(y, s), **options),
    "resized_ce": lambda s, t, y, **options: fastkd.resized_cross_entropy(s, y, **options),
    "resized_ce_corners": lambda s, t, y, **options: fastkd.resized_cross_entropy(s, y, align_corners=True, **options),
    "resized_kd": lambda s, t, y, **options: fastkd.resized_kd_loss(s, t, size=y.shape[1:], target=y, **options),
    "resized_smooth_ce": lambda s, t, y, **options: fastkd.resized_cross_entropy(s, y, label_smoothing=0.1, **options),
    "resized_focal_ce": lambda s, t, y, **options: fastkd.resized_cross_entropy(s, y, focal_gamma=2.0, **options),
    "resized_dice": lambda s, t, y, **options: fastkd.resized_dice_loss(s, y, **options),
    "resized_ce_dice": lambda s, t, y: fastkd.resized_cross_entropy_dice_loss(s, y, label_smoothing=0.1).loss,
    "resized_bce": lambda s, t, y, **options: fastkd.resized_binary_cross_entropy(s, against_the_rest(y, s), **options),
    "kd_sigmoid": lambda s, t, y, **options: fastkd.kd_loss(s, t, activation="sigmoid", **options),
    "resized_kd_sigmoid": lambda s, t, y, **options: fastkd.resized_kd_loss(
        s, t, size=y.shape[1:], target=y, activation="sigmoid", **options
    ),
    "rdd_tfe": _rdd("tfe", "loss"),
    "rdd_tse": _rdd("tse", "loss", preset="official", min_kept=50),
    "rdd_tse_kd": _rdd("tse", "kd"),
}
# Losses with a `reduction`, and losses with a `temperature`.
REDUCED = tuple(name for name in LOSSES if not name.startswith("rdd") and name != "resized_ce_dice")
HEATED = ("cwd", "kd", "kd_target", "resized_kd", "kd_sigmoid", "resized_kd_sigmoid")
# One loss per path through autograd and the operators, for slow tests.
EACH = (
    "nfd", "cwd", "kd", "kd_target", "kd_sigmoid", "resized_ce", "resized_focal_ce", "resized_kd", "resized_kd_sigmoid",
    "resized_ce_dice", "resized_bce", "rdd_tfe", "rdd_tse",
)  # fmt: skip
# Operators of the losses that not every backend implements.
OPERATOR = {
    "resized_smooth_ce": "resized_shaped_cross_entropy",
    "resized_focal_ce": "resized_shaped_cross_entropy",
    "resized_dice": "resized_dice",
    "resized_ce_dice": "resized_dice",
    "resized_bce": "resized_binary_cross_entropy",
    "kd_sigmoid": "kd_sigmoid",
    "resized_kd_sigmoid": "resized_kd_sigmoid",
    "cwd": "cwd",
    "rdd_tfe": "kd_confidence",
    "rdd_tse": "difficulty_mask",
}

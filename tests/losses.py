"""The public losses, once: each as a callable of student, teacher and labels, which the other tests and the tools enumerate.

``labels`` are at label resolution; a loss at that of the maps takes the nearest of them. Options (a reduction, a temperature)
are passed on to the function.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fastkd

Loss = Callable[..., Tensor]


def nearest(labels: Tensor, like: Tensor) -> Tensor:
    """Labels at the resolution of a map."""
    rows, columns = (
        torch.arange(n, device=labels.device) * m // max(n, 1)
        for n, m in zip(like.shape[-2:], labels.shape[-2:], strict=True)
    )
    return labels[:, rows][:, :, columns].contiguous()


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
    "rdd_tfe": _rdd("tfe", "loss"),
    "rdd_tse": _rdd("tse", "loss", preset="official"),
    "rdd_tse_kd": _rdd("tse", "kd"),
}
# Those that take a reduction, and a temperature.
REDUCED = tuple(name for name in LOSSES if not name.startswith("rdd"))
HEATED = ("cwd", "kd", "kd_target", "resized_kd")
# One of each path through autograd and the operators, for what is slow to try.
EACH = ("nfd", "cwd", "kd", "kd_target", "resized_ce", "resized_kd", "rdd_tfe", "rdd_tse")

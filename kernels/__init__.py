"""Triton kernels of the losses, one file per operator family, registered in the namespace ``fastkd_triton``.

Importing this package imports Triton; ``fastkd`` imports it at the first call that needs a kernel. If
``TRITON_INTERPRET=1`` is set before that, the kernels run in Triton's interpreter and also accept CPU tensors.
"""

import torch
import triton

from fastkd.ops import OPERATORS

from . import (
    cwd,
    kd,
    kd_sigmoid,
    nfd,
    rdd,
    rescale,
    resized_binary_cross_entropy,
    resized_cross_entropy,
    resized_dice,
    resized_kd,
    resized_kd_sigmoid,
    resized_shaped_cross_entropy,
)

MODULES = {
    "nfd": nfd,
    "kd": kd,
    "kd_sigmoid": kd_sigmoid,
    "cwd": cwd,
    "resized_cross_entropy": resized_cross_entropy,
    "resized_shaped_cross_entropy": resized_shaped_cross_entropy,
    "resized_dice": resized_dice,
    "resized_binary_cross_entropy": resized_binary_cross_entropy,
    "resized_kd": resized_kd,
    "resized_kd_sigmoid": resized_kd_sigmoid,
}


def _launcher(name: str):
    """A loss operator's suffix names the function of its module; other launchers have the operator's name."""
    loss, _, which = name.rpartition("_")
    if loss in MODULES:
        return getattr(MODULES[loss], which)
    return rescale.rescale_ if name == "rescale_" else getattr(rdd, name)


LAUNCHERS = {row.name: _launcher(row.name) for row in OPERATORS if "triton" in row.backends}


def register(library: torch.library.Library) -> None:
    """Registers an implementation of each operator that ``library`` defines."""
    for name, launcher in LAUNCHERS.items():
        for key in ("CUDA", "CPU") if triton.knobs.runtime.interpret else ("CUDA",):
            library.impl(name, launcher, key)

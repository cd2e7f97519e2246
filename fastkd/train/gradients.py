"""The backward pass in two parts, norms and cosines of the losses' gradients, and the first loss that is not finite.

The losses see leaves detached from the network, so that their forward and backward can be timed and their gradients
compared. Their gradients are then propagated through the network. The result equals one backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastkd.train.models import Output

HALF_SCALE = 2.0**16  # keeps half-precision gradients of about 1 / pixels from underflowing


def each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Applies `change` to every tensor in `value` (an Output, a dict, None, ...)."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: each_tensor(inner, change) for key, inner in value.items()}
    if isinstance(value, tuple):
        return type(value)(*(each_tensor(inner, change) for inner in value))
    return value


def cut(student: Output) -> tuple[Output, list[tuple[Tensor, Tensor]]]:
    """The output as leaves of a new graph, and the pairs (original, leaf)."""
    pairs: list[tuple[Tensor, Tensor]] = []

    def leaf(x: Tensor) -> Tensor:
        pairs.append((x, x.detach().requires_grad_()))
        return pairs[-1][1]

    return each_tensor(student, leaf), pairs


def send_back(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Backpropagates the gradients of `cut`'s leaves through the network."""
    used = [(x, leaf.grad) for x, leaf in pairs if leaf.grad is not None]
    torch.autograd.backward([x for x, _ in used], [grad for _, grad in used])


def gradient_statistics(parts: Mapping[str, Tensor], student: Output, task: frozenset[str]) -> dict[str, Tensor]:
    """Norms of the losses' gradients at the student's outputs, and the cosine of task and distillation.

    Args:
        parts: the weighted losses, with their graph down to the leaves of `student`.
        student: leaves from `cut`.
        task: names of the parts that use labels; the others use the teacher.

    Returns:
        0-d tensors. "grad/<part>": norm of the part's gradient at its inputs from the student (logits, auxiliary
        logits, features). "grad_cosine": cosine at the logits between the summed gradients of task and distillation,
        the conflict that RDD (arXiv 2407.03719) describes; absent unless both have a gradient there.
    """
    leaves: list[Tensor] = []
    each_tensor(student, lambda x: leaves.append(x) or x)  # type: ignore[func-returns-value]
    half = any(leaf.dtype == torch.float16 for leaf in leaves)
    scale = HALF_SCALE if half else 1.0
    found: dict[str, Tensor] = {}
    sums: dict[bool, Tensor] = {}
    for name, part in parts.items():
        if not part.requires_grad:
            continue
        grads = torch.autograd.grad(part * scale, leaves, retain_graph=True, allow_unused=True)
        norms = [grad.float().norm() for grad in grads if grad is not None]
        found[f"grad/{name}"] = torch.stack(norms).norm() / scale
        at_logits = next(grad for leaf, grad in zip(leaves, grads, strict=True) if leaf is student.logits)
        if at_logits is not None:
            side = name in task
            sums[side] = sums[side] + at_logits.float() if side in sums else at_logits.float()
    if len(sums) == 2:
        found["grad_cosine"] = torch.nn.functional.cosine_similarity(sums[True].flatten(), sums[False].flatten(), dim=0)
    return found


class Latest:
    """The weighted losses of the latest step, or of the first step in which one is not finite.

    They stay on the device until logged; by then a single loss that is not finite has spread to all.
    """

    def __init__(self, names: Iterable[str], values: Tensor, step: int):
        self.names, self.values, self.step = tuple(names), values, torch.full_like(values[0], step)

    def see(self, values: Tensor, step: int) -> None:
        finite = self.values.isfinite().all()
        self.values = torch.where(finite, values, self.values)
        self.step = torch.where(finite, step, self.step)

"""OHEM at label resolution against the float64 formula on every backend."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import fastkd

from .support import DEVICE, INTERPRETER, each_backend, each_kernel, loss_and_gradient
from .test_kd import labels


def ohem(logits, target, threshold=0.7, min_kept=100_000, class_weight=None, align_corners=False, reduction="mean"):
    """As in typical training code: upsample, sort the probabilities of the labels, keep the hardest."""
    upsampled = F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=align_corners)
    target = target.long()
    valid = target != 255
    p = F.softmax(upsampled.detach(), 1).gather(1, torch.where(valid, target, 0)[:, None])[:, 0]
    p = torch.where(valid, p, 1)
    k = min(min_kept, p.numel())
    limit = max(threshold, p.flatten().sort().values[k - 1].item()) if k else threshold
    kept = valid & (p <= limit)
    terms = F.cross_entropy(upsampled, target, class_weight, ignore_index=255, reduction="none")
    terms = torch.where(kept, terms, 0)
    if reduction == "none":
        return terms
    if reduction != "mean":
        return terms.sum() / {"sum": 1, "batchmean": len(target), "mean_all": target.numel()}[reduction]
    weight = kept.to(terms.dtype) if class_weight is None else class_weight[torch.where(valid, target, 0)] * kept
    return terms.sum() / weight.sum().clamp(min=1e-300)


@each_kernel
@given(
    shape=st.tuples(
        st.integers(1, 1 if INTERPRETER else 3),
        st.sampled_from([1, 2, 9] if INTERPRETER else [1, 2, 19, 150]),
        st.integers(1, 9),
        st.integers(1, 12),
    ),
    size=st.tuples(st.integers(1, 4 if INTERPRETER else 30), st.integers(1, 12 if INTERPRETER else 50)),
    min_kept=st.sampled_from([0, 1, 50, 700, 10**6]),
    threshold=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    weighted=st.booleans(),
    align_corners=st.booleans(),
    reduction=st.sampled_from(["mean", "mean_all", "sum", "batchmean", "none"]),
    seed=st.integers(0, 2**16),
)
def test_against_the_formula(backend, shape, size, min_kept, threshold, weighted, align_corners, reduction, seed):
    """In fp64, so that fp32 rounding moves no pixel across the threshold."""
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(shape, generator=g, dtype=torch.float64).to(DEVICE)
    target = labels((shape[0], *size), shape[1], 0.2, torch.int64, seed)
    weight = (torch.rand(shape[1], generator=g, dtype=torch.float64) + 0.5).to(DEVICE) if weighted else None
    options = {
        "min_kept": min_kept, "threshold": threshold, "class_weight": weight, "align_corners": align_corners,
        "reduction": reduction,
    }  # fmt: skip
    got = loss_and_gradient(
        lambda s, t: fastkd.resized_ohem_cross_entropy(s, target, **options), logits, logits, backend
    )
    x = logits.clone().requires_grad_()
    want = ohem(x, target, **options)
    want.backward(torch.full_like(want, 1.7))
    torch.testing.assert_close(got[0], want.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got[1], x.grad, rtol=1e-7, atol=1e-9)


@each_backend
def test_by_hand(backend):
    """Two classes, probabilities 0.5, 0.2, 0.9 and one ignored: the threshold keeps one, min_kept another."""
    p = torch.tensor([0.5, 0.2, 0.9, 0.1], device=DEVICE)
    logits = torch.stack([torch.log(p / (1 - p)), torch.zeros(4, device=DEVICE)])[None, :, None]
    target = torch.tensor([[[0, 0, 0, 255]]], device=DEVICE)
    with fastkd.use_backend(backend):
        only = fastkd.resized_ohem_cross_entropy(logits, target, threshold=0.3, min_kept=0)
        two = fastkd.resized_ohem_cross_entropy(logits, target, threshold=0.3, min_kept=2)
        everything = fastkd.resized_ohem_cross_entropy(logits, target, threshold=0.3, min_kept=10)
        none = fastkd.resized_ohem_cross_entropy(logits, torch.full_like(target, 255))
    torch.testing.assert_close(only, -torch.log(p[1]))
    torch.testing.assert_close(two, -torch.log(p[:2]).mean())
    torch.testing.assert_close(everything, -torch.log(p[:3]).mean())
    assert none == 0


@each_backend
def test_nothing_counts(backend):
    logits = torch.randn(2, 5, 3, 4, device=DEVICE)
    target = torch.full((2, 6, 8), 255, dtype=torch.uint8, device=DEVICE)
    value, gradient = loss_and_gradient(
        lambda s, t: fastkd.resized_ohem_cross_entropy(s, target), logits, logits, backend
    )
    assert value == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize(
    ("options", "message"), [({"threshold": 1.5}, "threshold: got 1.5"), ({"min_kept": -1}, "min_kept: got -1")]
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        fastkd.resized_ohem_cross_entropy(torch.randn(1, 3, 2, 2), torch.zeros(1, 4, 4, dtype=torch.int64), **options)

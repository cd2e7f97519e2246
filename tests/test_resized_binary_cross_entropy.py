"""Binary cross-entropy at label resolution: torch's own on interpolated logits, edge cases, the kernels' error
budget."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import fastkd
from fastkd.functional import PIXEL_REDUCTIONS

from . import budget
from .support import (
    DEVICE,
    DTYPES,
    INTERPRETER,
    LAYOUTS,
    assert_within_budget,
    each_backend,
    each_kernel,
    lay_out,
    needs,
)

LARGEST = 4 if INTERPRETER else 20
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
problems = st.fixed_dictionaries(
    {
        "shape": st.tuples(
            st.integers(1, 3), st.sampled_from([1, 2, 5, 19]), st.integers(1, LARGEST // 2), st.integers(1, LARGEST)
        ),
        "size": st.tuples(st.integers(1, LARGEST), st.integers(1, 2 * LARGEST)),
        "dtype": st.sampled_from(DTYPES),
        "layout": st.sampled_from(LAYOUTS),
        "label": st.sampled_from(INTEGERS),
        "align_corners": st.booleans(),
        "reduction": st.sampled_from(PIXEL_REDUCTIONS),
        "weights": st.booleans(),
        "weight_size": st.tuples(st.integers(1, 12), st.integers(1, 12)),
        "seed": st.integers(0, 2**16),
    }
)


def build(problem):
    n, c, h, w = problem["shape"]
    g = torch.Generator().manual_seed(problem["seed"])
    logits = lay_out((3 * torch.randn(n, c, h, w, generator=g)).to(DEVICE, problem["dtype"]), problem["layout"])
    target = torch.randint(0, 3, (n, c, *problem["size"]), generator=g)
    target = torch.where(target == 2, 100, target).to(DEVICE, problem["label"])
    pos_weight = torch.rand(c, generator=g).to(DEVICE) + 0.5 if problem["weights"] else None
    pixel_weight = torch.rand(n, *problem["weight_size"], generator=g).to(DEVICE) if problem["weights"] else None
    return logits, target, pos_weight, pixel_weight


@each_backend
@given(problem=problems)
def test_equals_torchs(backend, problem):
    needs(backend, "resized_binary_cross_entropy")
    logits, target, pos_weight, _ = build(problem)
    with fastkd.use_backend(backend):
        got = fastkd.resized_binary_cross_entropy(
            logits,
            target,
            pos_weight=pos_weight,
            ignore_index=100,
            align_corners=problem["align_corners"],
            reduction=problem["reduction"],
        )
    x = F.interpolate(logits.double(), target.shape[-2:], mode="bilinear", align_corners=problem["align_corners"])
    valid = target != 100
    weight = None if pos_weight is None else pos_weight.double()[:, None, None]
    terms = valid * F.binary_cross_entropy_with_logits(x, (target == 1).double(), pos_weight=weight, reduction="none")
    want = {
        "none": terms,
        "sum": terms.sum(),
        "batchmean": terms.sum() / len(x),
        "mean": terms.sum() / valid.sum().clamp(min=1),
        "mean_all": terms.mean(),
    }[problem["reduction"]]
    u = 1e-12 if got.dtype == torch.float64 else 2e-6
    torch.testing.assert_close(got.double(), want, rtol=u, atol=u)


@each_kernel
@given(problem=problems)
def test_within_budget(backend, problem):
    needs(backend, "resized_binary_cross_entropy")
    logits, target, pos_weight, pixel_weight = build(problem)

    def loss(s, t):
        return fastkd.resized_binary_cross_entropy(
            s,
            target,
            pos_weight=pos_weight,
            pixel_weight=pixel_weight,
            ignore_index=100,
            align_corners=problem["align_corners"],
            reduction=problem["reduction"],
        )

    scale = {"sum": target.numel(), "batchmean": target[0].numel()}.get(problem["reduction"], 1)
    assert_within_budget(loss, logits, logits.clone(), backend, loss_scale=scale, gradient_scale=scale)


def test_gradcheck_of_the_reference():
    logits = torch.randn(2, 3, 2, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    target = torch.randint(0, 2, (2, 3, 5, 4), device=DEVICE)
    weights = {"pos_weight": torch.rand(3, device=DEVICE), "pixel_weight": torch.rand(2, 2, 2, device=DEVICE)}
    with fastkd.use_backend("reference"):
        assert torch.autograd.gradcheck(lambda x: fastkd.resized_binary_cross_entropy(x, target, **weights), logits)


@each_backend
def test_labels_of_one_class(backend):
    """(N, H, W) or (N, 1, H, W), of any integer dtype or bool; "none" has the shape of the labels."""
    needs(backend, "resized_binary_cross_entropy")
    logits = torch.randn(2, 1, 3, 4, device=DEVICE)
    target = torch.rand(2, 6, 8, device=DEVICE) < 0.5
    with fastkd.use_backend(backend):
        want = fastkd.resized_binary_cross_entropy(logits, target, reduction="none")
        assert want.shape == (2, 6, 8)
        for dtype in INTEGERS:
            for y in (target.to(dtype), target.to(dtype)[:, None]):
                got = fastkd.resized_binary_cross_entropy(logits, y, reduction="none")
                assert got.shape == y.shape
                assert torch.equal(got.flatten(), want.flatten())


@each_backend
@pytest.mark.parametrize("reduction", PIXEL_REDUCTIONS)
def test_all_ignored(backend, reduction):
    needs(backend, "resized_binary_cross_entropy")
    logits = torch.randn(2, 3, 3, 4, device=DEVICE, requires_grad=True)
    target = torch.full((2, 3, 6, 8), 255, dtype=torch.uint8, device=DEVICE)
    with fastkd.use_backend(backend):
        loss = fastkd.resized_binary_cross_entropy(logits, target, reduction=reduction)
    assert not loss.any()
    assert not torch.autograd.grad(loss.sum(), logits)[0].any()


@each_backend
def test_huge_logits(backend):
    needs(backend, "resized_binary_cross_entropy")
    inf = torch.inf
    logits = torch.tensor([1e4, -1e4, 88.0, -88.0, inf, -inf], device=DEVICE).view(1, 1, 2, 3).requires_grad_()
    for label, want in ((0, [1e4, 0.0, 88.0, 0.0, inf, 0.0]), (1, [0.0, 1e4, 0.0, 88.0, 0.0, inf])):
        target = torch.full((1, 2, 3), label, device=DEVICE)
        with fastkd.use_backend(backend):
            loss = fastkd.resized_binary_cross_entropy(logits, target, reduction="none")
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
        torch.testing.assert_close(loss.flatten().tolist(), want, rtol=1e-6, atol=1e-6)
        signs = [1.0, 0.0, 1.0, 0.0, 1.0, 0.0] if label == 0 else [0.0, -1.0, 0.0, -1.0, 0.0, -1.0]
        torch.testing.assert_close(gradient.flatten().tolist(), signs, rtol=0, atol=1e-6)


@each_kernel
@pytest.mark.parametrize("weights", [False, True])
def test_fp16_gradients(backend, weights):
    """For a mean over many elements, and with weights beyond fp16's range."""
    needs(backend, "resized_binary_cross_entropy")
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 8, 16, generator=g).to(DEVICE, torch.float16).requires_grad_()
    target = torch.randint(0, 2, (1, 3, 16, 32), generator=g).to(DEVICE)
    pos_weight = torch.full((3,), 1e6, device=DEVICE) if weights else None
    with fastkd.use_backend(backend):
        loss = fastkd.resized_binary_cross_entropy(logits, target, pos_weight=pos_weight)
        (got,) = torch.autograd.grad(loss, logits, torch.tensor(256.0 if not weights else 1.0, device=DEVICE))
    exact = logits.detach().double().requires_grad_()
    with fastkd.use_backend("reference"):
        loss = fastkd.resized_binary_cross_entropy(exact, target, pos_weight=pos_weight)
        (want,) = torch.autograd.grad(loss, exact)
    want = want * (1.0 if weights else 256.0)
    assert got.isfinite().all()
    assert (got.double() - want).norm() <= budget.roundings(2, want, 2**-11)


def test_what_is_refused():
    logits = torch.randn(1, 3, 2, 2)
    with pytest.raises(ValueError, match=r"expected \(N, C, H, W\) with N and C of the logits .*one_hot"):
        fastkd.resized_binary_cross_entropy(logits, torch.zeros(1, 4, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"target: got dtype torch.float32, expected zeros and ones"):
        fastkd.resized_binary_cross_entropy(logits, torch.zeros(1, 3, 4, 4))
    with pytest.raises(IndexError, match="target: got 2, expected 0, 1 or ignore_index 255"):
        fastkd.resized_binary_cross_entropy(logits, torch.full((1, 3, 4, 4), 2))
    with pytest.raises(ValueError, match=r"pos_weight: got shape \(2,\), expected \(3,\)"):
        fastkd.resized_binary_cross_entropy(
            logits, torch.zeros(1, 3, 4, 4, dtype=torch.uint8), pos_weight=torch.ones(2)
        )

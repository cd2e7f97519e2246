"""The losses reproduce the numbers of segmentation-models-pytorch and MONAI; Ultralytics' loss is checked against its
formula.

Logits are at label size or smaller; in the latter case the original gets resized logits.
"""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import fastkd
from fastkd.compat import monai, smp, ultralytics
from tests.support import each_backend, needs

N, C, H, W = 2, 5, 9, 12


def problem(ignore_index=None, absent=None, size=None, dtype=torch.float64, channels=C):
    g = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(N, channels, *(size or (H, W)), generator=g, dtype=dtype)
    labels = torch.randint(0, channels, (N, H, W), generator=g)
    if absent is not None:
        labels[labels == absent] = (absent + 1) % channels
    if ignore_index is not None:
        labels[torch.rand(labels.shape, generator=g) < 0.2] = ignore_index
    return logits, labels


def agree(ours, theirs, logits, labels, *, size=(H, W), rtol=1e-6):
    """Value and gradient; the original gets logits at label size."""
    found = []
    for loss, resize in ((ours, False), (theirs, True)):
        x = logits.clone().requires_grad_()
        y = F.interpolate(x, size, mode="bilinear", align_corners=False) if resize and x.shape[-2:] != size else x
        value = loss(y, labels)
        weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
        found.append((value.detach(), *torch.autograd.grad((value * weights).sum(), x)))
    torch.testing.assert_close(found[0][0], found[1][0].to(found[0][0].dtype), rtol=rtol, atol=rtol)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=rtol, atol=rtol)


each_size = pytest.mark.parametrize("size", [None, (4, 5)], ids=["labels", "smaller"])


@pytest.fixture(params=["reference", "cpu"])
def on_backend(request):
    needs(request.param, "resized_dice")
    with fastkd.use_backend(request.param):
        yield


@each_size
@pytest.mark.parametrize("ignore_index", [None, 255, 0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"smooth": 1.0},
        {"log_loss": True},
        {"classes": [1, 3]},
        {"classes": [0, 2], "class_weights": [1.0, 2.0, 3.0, 4.0, 5.0]},
    ],
    ids=str,
)
def test_dice_of_smp(on_backend, size, ignore_index, options):
    losses = pytest.importorskip(
        "segmentation_models_pytorch", reason="segmentation-models-pytorch is not installed"
    ).losses
    logits, labels = problem(ignore_index, absent=2, size=size)
    ours, theirs = (
        kind("multiclass", ignore_index=ignore_index, **options) for kind in (smp.DiceLoss, losses.DiceLoss)
    )
    agree(ours, theirs, logits, labels)


@each_size
@pytest.mark.parametrize("ignore_index", [None, 255])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 0.25, "gamma": 3.0},
        {"normalized": True},
        {"reduction": "sum", "reduced_threshold": 0.6},
        {"class_weights": [1.0, 2.0, 3.0, 4.0, 5.0]},
    ],
    ids=str,
)
def test_focal_of_smp(size, ignore_index, options):
    losses = pytest.importorskip(
        "segmentation_models_pytorch", reason="segmentation-models-pytorch is not installed"
    ).losses
    logits, labels = problem(ignore_index, size=size)
    ours, theirs = (
        kind("multiclass", ignore_index=ignore_index, **options) for kind in (smp.FocalLoss, losses.FocalLoss)
    )
    agree(ours, theirs, logits, labels)


@each_size
@pytest.mark.parametrize("ignore_index", [None, 255, -100])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smooth_factor", [0.0, 0.1])
def test_cross_entropy_of_smp(on_backend, size, ignore_index, reduction, smooth_factor):
    losses = pytest.importorskip(
        "segmentation_models_pytorch", reason="segmentation-models-pytorch is not installed"
    ).losses
    logits, labels = problem(ignore_index, size=size)
    options = {"ignore_index": ignore_index, "reduction": reduction, "smooth_factor": smooth_factor}
    theirs = losses.SoftCrossEntropyLoss(**options)
    agree(smp.SoftCrossEntropyLoss(**options), theirs, logits, labels)


MONAI = [
    {},
    {"squared_pred": True},
    {"jaccard": True},
    {"batch": True, "smooth_nr": 0.0, "smooth_dr": 1e-3},
    {"include_background": False},
    {"reduction": "sum", "weight": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])},
    {"include_background": False, "squared_pred": True, "jaccard": True},
]


@each_size
@pytest.mark.parametrize("ignore_index", [None, 255, 1])
@pytest.mark.parametrize("options", [*MONAI, {"reduction": "none"}], ids=str)
def test_dice_of_monai(on_backend, size, ignore_index, options):
    losses = pytest.importorskip("monai.losses", reason="monai is not installed")
    logits, labels = problem(ignore_index, absent=2, size=size)
    options = {"softmax": True, "to_onehot_y": True, "ignore_index": ignore_index, **options}
    agree(monai.DiceLoss(**options), losses.DiceLoss(**options), logits, labels[:, None])


@each_size
@pytest.mark.parametrize("options", MONAI, ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_dice_and_cross_entropy_of_monai(on_backend, size, options, label_smoothing):
    losses = pytest.importorskip("monai.losses", reason="monai is not installed")
    logits, labels = problem(size=size)
    options = {"softmax": True, "to_onehot_y": True, "label_smoothing": label_smoothing, "lambda_dice": 2.0, **options}
    theirs = losses.DiceCELoss(**options).double()
    agree(monai.DiceCELoss(**options), theirs, logits, labels[:, None])


def test_volumes_of_monai(on_backend):
    losses = pytest.importorskip("monai.losses", reason="monai is not installed")
    g = torch.Generator().manual_seed(0)
    volume = torch.randn(2, 3, 4, 5, 6, generator=g, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 1, 4, 5, 6), generator=g)
    options = {"softmax": True, "to_onehot_y": True}
    for kind in ("DiceLoss", "DiceCELoss"):
        for reduction in ("mean", "none") if kind == "DiceLoss" else ("mean",):
            ours, theirs = (getattr(module, kind)(reduction=reduction, **options) for module in (monai, losses))
            agree(ours, theirs, volume, labels, size=volume.shape[-2:])


@each_backend
@pytest.mark.parametrize(("weighted", "aux"), [*itertools.product([False, True], [False, True])])
def test_ultralytics_is_its_description(backend, weighted, aux):
    needs(backend, "resized_dice")
    logits, labels = problem(255, size=(4, 5))
    side = problem(size=(3, 3))[0] if aux else None
    class_weight = torch.arange(1.0, C + 1) if weighted else None
    with fastkd.use_backend(backend):
        loss, parts = ultralytics.SemanticSegmentationLoss(class_weight)(logits, labels, side)
    up = [None if x is None else F.interpolate(x, (H, W), mode="bilinear", align_corners=False) for x in (logits, side)]
    weight = None if class_weight is None else class_weight.double()
    ce, aux_ce = (torch.zeros(()) if x is None else F.cross_entropy(x, labels, weight, ignore_index=255) for x in up)
    valid = labels != 255
    p = F.softmax(up[0], 1) * valid[:, None]
    onehot = F.one_hot(labels.where(valid, 0), C).movedim(3, 1) * valid[:, None]
    over = (0, 2, 3)
    dice = (1 - (2 * (p * onehot).sum(over) + 1) / (p.sum(over) + onehot.sum(over) + 1)).mean()
    torch.testing.assert_close(parts, torch.stack([ce, dice, aux_ce]).to(parts.dtype), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss.item(), N * (ce + dice + 0.4 * aux_ce).item(), rtol=1e-6, atol=1e-6)


def test_what_is_refused():
    for kind in (smp.DiceLoss, smp.FocalLoss):
        with pytest.raises(ValueError, match="mode: got 'binary', expected 'multiclass'"):
            kind("binary")
        with pytest.raises(ValueError, match="from_logits"):
            kind("multiclass", from_logits=False)
    for kind in (monai.DiceLoss, monai.DiceCELoss):
        for options in ({}, {"softmax": True}, {"softmax": True, "to_onehot_y": True, "sigmoid": True}):
            with pytest.raises(ValueError, match="expected softmax=True and to_onehot_y=True"):
                kind(**options)
    loss = monai.DiceLoss(softmax=True, to_onehot_y=True)
    with pytest.raises(ValueError, match=r"target: got shape \(2, 9, 12\)"):
        loss(*problem())
    with pytest.raises(ValueError, match="volumes are not resized"):
        loss(torch.randn(1, 2, 2, 2, 2), torch.zeros(1, 1, 4, 4, 4))


def test_nothing_else_is_imported():
    code = (
        "import sys, fastkd.compat.smp, fastkd.compat.monai, fastkd.compat.ultralytics; "
        "print({'segmentation_models_pytorch', 'monai', 'ultralytics', 'fastkd.train'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"

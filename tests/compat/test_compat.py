"""The classes of other projects reproduce those projects' numbers; each formula is written out here in float64."""

import inspect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import fastkd
from fastkd.compat import cirkd, mmrazor, torchdistill
from tests.support import each_backend

N, C, H, W = 2, 5, 4, 6
Y = torch.randint(0, C, (N, H, W), generator=torch.Generator().manual_seed(1))
Y[0, 0] = 255
REDUCTIONS = ("batchmean", "sum", "mean", "none")


def maps(*shape):
    rng = torch.Generator().manual_seed(0)
    return torch.randn(2, *(shape or (N, C, H, W)), generator=rng, dtype=torch.float64)


def divergence(student, teacher, tau, dim):
    """KL of the softmaxes over `dim`, reduced over `dim` only."""
    p, q = torch.softmax(teacher / tau, dim), torch.softmax(student / tau, dim)
    return (p * (p / q).log()).sum(dim)


def agree(loss, formula, student, teacher, backend="auto", rtol=1e-10):
    """Value and gradient of `loss` equal those of `formula` in float64, and approximately in float32."""
    for dtype, tolerance in ((torch.float64, rtol), (torch.float32, max(rtol, 1e-5))):
        rounded = student.detach().to(dtype)
        ours, plain = (rounded.to(kind, copy=True).requires_grad_() for kind in (dtype, torch.float64))
        with fastkd.use_backend(backend):
            value = loss(ours, teacher.to(dtype))
        want = formula(plain, teacher.to(dtype).double())
        torch.testing.assert_close(value.double(), want, rtol=tolerance, atol=tolerance)
        value.sum().backward()
        want.sum().backward()
        torch.testing.assert_close(ours.grad.double(), plain.grad, rtol=tolerance, atol=10 * tolerance)


@each_backend
@pytest.mark.parametrize("tau", [1, 4.0])
def test_cirkd_kd(tau, backend):
    formula = lambda s, t: divergence(s, t, tau, 1).sum() / (N * H * W) * tau**2  # noqa: E731
    agree(cirkd.CriterionKD(temperature=tau), formula, *maps(), backend)


@each_backend
def test_cirkd_cwd(backend):
    channel = lambda s, t: divergence(s.flatten(2), t.flatten(2), 4.0, 2).sum() / (N * C) * 16  # noqa: E731
    agree(cirkd.CriterionCWD(C, C, "channel", "kl", 4.0), channel, *maps(), backend)
    spatial = lambda s, t: divergence(s, t, 2.0, 1).sum() / (N * H * W) * 4  # noqa: E731
    agree(cirkd.CriterionCWD(C, C, norm_type="spatial", divergence="kl", temperature=2.0), spatial, *maps(), backend)


def test_cirkd_cwd_of_squares():
    plain = lambda s, t: (s - t).square().sum() / (N * H * W)  # noqa: E731
    agree(cirkd.CriterionCWD(C, C), plain, *maps())
    soft = lambda x: torch.softmax(x.flatten(2) / 2, 2)  # noqa: E731
    channel = lambda s, t: (soft(s) - soft(t)).square().sum() / (N * C) * 4  # noqa: E731
    agree(cirkd.CriterionCWD(C, C, "channel", temperature=2.0), channel, *maps())
    for norm_type, divergence_ in (("none", "kl"), ("chanel", "mse"), ("channel", "l1")):
        with pytest.raises(
            ValueError, match=rf"norm_type '{norm_type}' and divergence '{divergence_}', expected 'channel'"
        ):
            cirkd.CriterionCWD(C, C, norm_type, divergence_)


def test_cirkd_adapters():
    """A 1x1 convolution without bias: in CWD if the channels differ, in FitNet always."""
    student, teacher = (x.float() for x in maps())
    for loss, formula in (
        (
            cirkd.CriterionCWD(3, C, "channel", "kl"),
            lambda s: divergence(s.flatten(2), teacher.flatten(2), 1, 2).sum() / (N * C),
        ),
        (cirkd.CriterionFitNet(3, C), lambda s: (s - teacher).square().mean()),
    ):
        assert [name for name, _ in loss.named_parameters()] == ["conv.weight"]
        value = loss(student[:, :3], teacher)
        torch.testing.assert_close(value, formula(F.conv2d(student[:, :3], loss.conv.weight)))
        value.backward()
        assert loss.conv.weight.grad.abs().sum() > 0


def test_cirkd_feature_losses():
    """The formulas are tested in tests/train/test_methods.py; this tests CIRKD's names and arguments."""
    from fastkd.train.methods.at import ATLoss
    from fastkd.train.methods.cirkd import CIRKDLoss
    from fastkd.train.methods.ifvd import IFVDLoss

    student, teacher = maps()
    teacher.requires_grad_()
    for loss, same in (
        (cirkd.CriterionAT(), ATLoss(loss_weight=1)),
        (cirkd.CriterionMiniBatchCrossImagePair(temperature=0.1), CIRKDLoss(temperature=0.1)),
        (cirkd.CriterionMiniBatchCrossImagePair(0.5, pooling=True), CIRKDLoss(temperature=0.5, pool=2)),
    ):
        assert torch.equal(loss(student, teacher), same(student, teacher.detach()))
    found = cirkd.CriterionIFV(C)(student, teacher, Y)
    assert torch.equal(found, IFVDLoss(C, loss_weight=1)(student, teacher.detach(), Y))
    with pytest.raises(ValueError, match="got 1 and 2 layers, expected two or more"):
        cirkd.CriterionDoubleSimKD()([student], [teacher, teacher])


def test_cirkd_cross_entropy():
    large = Y.repeat_interleave(8, 1).repeat_interleave(8, 2)

    def formula(logits, labels, ignored):
        logits = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=True)
        log_p, terms = logits.log_softmax(1), []
        for n, i, j in torch.cartesian_prod(*map(torch.arange, labels.shape)).tolist():
            if labels[n, i, j] != ignored:
                terms.append(-log_p[n, labels[n, i, j], i, j])
        return torch.stack(terms).mean()

    logits, _ = maps()
    for labels, ignored in ((Y, 255), (torch.where(large == 255, -1, large), -1)):
        loss = cirkd.SegCrossEntropyLoss(ignore_index=ignored) if ignored == 255 else cirkd.SegCrossEntropyLoss()
        agree(
            lambda s, t, y=labels, f=loss: f(s, y), lambda s, t, y=labels, i=ignored: formula(s, y, i), logits, logits
        )


@each_backend
def test_mmrazor_cwd(backend):
    formula = lambda s, t: 3 * divergence(s.flatten(2), t.flatten(2), 5.0, 2).sum() * 25 / (C * N)  # noqa: E731
    agree(mmrazor.ChannelWiseDivergence(tau=5.0, loss_weight=3.0), formula, *maps(), backend)


def elements(student, teacher, tau):
    p, q = torch.softmax(teacher / tau, 1), torch.softmax(student / tau, 1)
    return p * (p / q).log()


REDUCE = {
    "batchmean": lambda x: x.sum() / N,
    "sum": torch.sum,
    "mean": lambda x: x.sum() / x.numel(),  # over elements: C times smaller than the mean over pixels
    "none": lambda x: x,
}


@pytest.mark.parametrize("shape", [(N, C), (N, C, H, W), (N, C, 7)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_mmrazor_kl(reduction, shape):
    formula = lambda s, t: 2 * 9 * REDUCE[reduction](elements(s, t, 3.0))  # noqa: E731
    agree(mmrazor.KLDivergence(tau=3.0, reduction=reduction, loss_weight=2.0), formula, *maps(*shape))


def test_mmrazor_kl_can_train_the_teacher():
    student, teacher = maps()
    plain = teacher.clone().requires_grad_()
    teacher.requires_grad_()
    mmrazor.KLDivergence()(student.requires_grad_(), teacher).backward()
    assert teacher.grad is None
    mmrazor.KLDivergence(teacher_detach=False)(student, teacher).backward()
    (elements(student.detach(), plain, 1.0).sum() / N).backward()
    torch.testing.assert_close(teacher.grad, plain.grad)


@each_backend
def test_mmrazor_pkd(backend):
    def normalise(x):
        flat = x.transpose(0, 1).flatten(1)
        centred = flat - flat.mean(1, keepdim=True)
        return centred / ((centred.square().sum(1, keepdim=True) / (flat.shape[1] - 1)).sqrt() + 1e-6)

    def formula(s, t):
        return (normalise(s) - normalise(t)).square().mean() / 2

    student, teacher = maps()
    agree(mmrazor.PKDLoss(), formula, 3 * student + 1, teacher, backend, rtol=5e-6)
    pairs = (student, 2 * teacher), (teacher, student)
    torch.testing.assert_close(
        mmrazor.PKDLoss(loss_weight=2.0)(*pairs),
        2 * (formula(student, teacher) + formula(2 * teacher, student)),
        rtol=1e-5,
        atol=0,
    )
    small = F.avg_pool2d(teacher, 2)
    up, down = F.interpolate(small, (H, W), mode="bilinear"), F.interpolate(student, (2, 3), mode="bilinear")
    torch.testing.assert_close(
        mmrazor.PKDLoss(resize_stu=False)(student, small), formula(student, up), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(mmrazor.PKDLoss()(student, small), formula(down, small), rtol=1e-5, atol=0)


def torchdistill_kd(**options):
    return torchdistill.KDLoss("head", "output", "classifier", "output", **options)


def io(student, teacher):
    return {"head": {"output": student}}, {"classifier": {"input": None, "output": teacher}}


# With "none" the two terms, (N, H, W) and (N, C, H, W), cannot be added; the original has the same limitation.
@pytest.mark.parametrize(
    ("reduction", "labelled"), [(r, y) for r in REDUCTIONS for y in (True, False) if not (r == "none" and y)]
)
def test_torchdistill_kd(reduction, labelled):
    weight = torch.tensor([1.0, 2.0, 3.0, 0.5, 1.0], dtype=torch.float64)
    loss = torchdistill_kd(temperature=2.0, alpha=0.3, reduction=reduction, weight=weight, ignore_index=255)
    y = Y if labelled else None

    def formula(s, t):
        soft = REDUCE[reduction](elements(s, t, 2.0))
        if y is None:
            return soft  # without T²
        picked = torch.where(y == 255, 0, y)
        counted = weight[picked] * (y != 255)
        hard = -s.log_softmax(1).gather(1, picked[:, None])[:, 0] * counted
        if reduction in ("batchmean", "mean"):
            hard = hard.sum() / counted.sum()
        elif reduction == "sum":
            hard = hard.sum()
        return 0.3 * hard + 0.7 * 4 * soft

    student, teacher = maps()
    agree(lambda s, t: loss.to(s.dtype)(*io(s, t), y), formula, student, teacher)


def test_torchdistill_kd_without_or_with_other_weights():
    student, teacher = maps()
    soft = elements(student, teacher, 2.0).sum() / N
    for alpha in (None, 0):
        torch.testing.assert_close(torchdistill_kd(temperature=2.0, alpha=alpha)(*io(student, teacher), Y), soft)
    y = torch.where(Y == 255, 0, Y)
    hard = F.cross_entropy(student, y, label_smoothing=0.1)
    loss = torchdistill_kd(temperature=2.0, alpha=0.5, beta=3.0, label_smoothing=0.1)
    torch.testing.assert_close(loss(*io(student, teacher), y), 0.5 * hard + 3 * 4 * soft)
    vectors = maps(N, C)
    hard = F.cross_entropy(vectors[0], torch.tensor([1, 4]))
    torch.testing.assert_close(
        torchdistill_kd(temperature=1.0, alpha=0.5)(*io(*vectors), torch.tensor([1, 4])),
        0.5 * hard + 0.5 * elements(*vectors, 1.0).sum() / N,
    )


def test_torchdistill_names_what_was_recorded():
    loss = torchdistill.KDLoss("classifer", "output", "classifier", "output", temperature=1.0)
    with pytest.raises(KeyError, match=r"no student output \['classifer'\]\['output'\]; recorded are .*head"):
        loss(*io(*maps()))


@pytest.mark.parametrize(
    ("kind", "signature"),
    [
        (cirkd.CriterionKD, {"temperature": 1}),
        (cirkd.SegCrossEntropyLoss, {"ignore_index": -1}),
        (cirkd.CriterionCWD, {"norm_type": "none", "divergence": "mse", "temperature": 1.0}),
        (cirkd.CriterionMiniBatchCrossImagePair, {"pooling": False}),
        (mmrazor.ChannelWiseDivergence, {"tau": 1.0, "loss_weight": 1.0}),
        (mmrazor.KLDivergence, {"tau": 1.0, "reduction": "batchmean", "loss_weight": 1.0, "teacher_detach": True}),
        (mmrazor.PKDLoss, {"loss_weight": 1.0, "resize_stu": True}),
        (torchdistill.KDLoss, {"alpha": None, "beta": None, "reduction": "batchmean"}),
    ],
)
def test_arguments_and_defaults(kind, signature):
    parameters = inspect.signature(kind).parameters.values()
    assert {p.name: p.default for p in parameters if p.default is not p.empty} == signature


def test_an_adapter_is_asked_for():
    student, _ = maps()
    with pytest.raises(ValueError, match="a 1x1 adapter can match C"):
        mmrazor.ChannelWiseDivergence()(student, student[:, :3])


def test_only_torch_is_needed():
    code = (
        "import sys\n"
        "for name in ('yaml', 'torchvision', 'timm', 'segmentation_models_pytorch', 'accelerate', 'triton'):\n"
        "    sys.modules[name] = None\n"
        "import fastkd.compat.cirkd, fastkd.compat.mmrazor, fastkd.compat.torchdistill\n"
        "assert not {'fastkd.train.config', 'fastkd.train.engine', 'fastkd.train.data'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

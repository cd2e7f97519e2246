"""Distillation methods against their formulas, written as loops in float64; edge cases; a few training steps."""

import copy
import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("yaml")

import fastkd
from fastkd.train.methods import METHODS, LossConfig, Objective, base, parse_method, student_features, teacher_forward
from fastkd.train.methods.at import ATLoss
from fastkd.train.methods.cirkd import CIRKDLoss
from fastkd.train.methods.dsd import DSDLoss
from fastkd.train.methods.fitnet import FitNetLoss
from fastkd.train.methods.ifvd import IFVDLoss
from fastkd.train.methods.skd import SKDLoss

N, K, H, W = 2, 3, 4, 5
LABELS = torch.tensor(
    [0, 0, 1, 1, 255, 1, 0, 1, 1, 255, 0, 0, 0, 1, 7, 255, 0, 1, 1, 1]
)  # class 2 is absent, 7 is out of range
TARGET = torch.stack([LABELS.view(H, W), LABELS.flip(0).view(H, W)])


def pair(channels=(6, 6), size=(H, W), dtype=torch.float64):
    rng = torch.Generator().manual_seed(3)
    return [torch.randn(N, c, *size, generator=rng, dtype=torch.float64).to(dtype) for c in channels]


# The papers' formulas, element by element


def norm(v):
    return torch.stack([x * x for x in v]).sum().sqrt()


def pixels(x):
    return itertools.product(range(x.shape[-2]), range(x.shape[-1]))


def attention(x):
    energy = [sum(x[c, i, j] ** 2 for c in range(len(x))) for i, j in pixels(x)]
    return [e / norm(energy) for e in energy]


def literal_at(student, teacher):
    terms = []
    for s, t in zip(student, teacher, strict=True):
        terms += [(a - b) ** 2 for a, b in zip(attention(s), attention(t), strict=True)]
    return sum(terms) / len(terms)


def literal_fitnet(student, teacher):
    terms = [(a - b) ** 2 for a, b in zip(student.flatten(), teacher.flatten(), strict=True)]
    return sum(terms) / len(terms)


def cosine(a, b):
    return (a * b).sum() / (norm(a) * norm(b))


def patches(x, side, pool=lambda patch: patch.mean(1)):
    rows, columns = range(0, x.shape[1], side), range(0, x.shape[2], side)
    return [pool(x[:, i : i + side, j : j + side].flatten(1)) for i in rows for j in columns]


def maximum(patch):
    return patch.amax(1)


def literal_skd(student, teacher, side, pool=maximum):
    terms = []
    for s, t in zip(student, teacher, strict=True):
        s, t = patches(s, side, pool), patches(t, side, pool)
        terms += [(cosine(s[i], s[j]) - cosine(t[i], t[j])) ** 2 for i in range(len(s)) for j in range(len(s))]
    return sum(terms) / len(terms)


def variation_map(x, label):
    out = {}
    for i, j in pixels(x):
        if label[i, j] < K:
            members = [x[:, a, b] for a, b in pixels(x) if label[a, b] == label[i, j]]
            out[i, j] = cosine(x[:, i, j], sum(members) / len(members))
    return out


def literal_ifvd(student, teacher, target, ignored=0):
    """ignored: 1 includes pixels without a class, whose similarity is 1 on both sides."""
    terms = []
    for s, t, y in zip(student, teacher, target, strict=True):
        s, t = variation_map(s, y), variation_map(t, y)
        terms += [(s[p] - t[p]) ** 2 for p in s]
        terms += [s[next(iter(s))] * 0] * (ignored * (y.numel() - len(s)))
    return sum(terms) / len(terms)


def literal_dsd_published(student, teacher, temperature=4.0):
    """The layers of an image, with the logits last."""

    def residuals(layers, n):
        maps = [torch.stack(attention(layer[n])) for layer in layers]
        pairs = itertools.combinations(maps, 2)
        return [(b - a) / norm(b - a) for a, b in pairs]

    def gram(z):
        classes = torch.stack(patches(z, 2)).T / temperature
        p = [c.exp() / c.exp().sum() for c in classes]
        return [(a * b).sum() for a in p for b in p]

    pixel, category = [], []
    for n in range(N):
        for s, t in zip(residuals(student, n), residuals(teacher, n), strict=True):
            pixel += [(a - b) ** 2 for a, b in zip(s, t, strict=True)]
        category += [(a - b) ** 2 for a, b in zip(gram(student[-1][n]), gram(teacher[-1][n]), strict=True)]
    return sum(pixel) / len(pixel), sum(category) / len(category)


def literal_dsd(student_logits, teacher_logits, student, teacher, temperature):
    def residual(features, n):  # two layers of the same size
        return [b - a for a, b in zip(attention(features[0][n]), attention(features[1][n]), strict=True)]

    def correlation(z):
        p = torch.stack([torch.stack([z[c, i, j] for c in range(K)]) for i, j in pixels(z)])
        p = (p / temperature).exp() / (p / temperature).exp().sum(1, keepdim=True)
        return [cosine(p[:, a], p[:, b]) for a in range(K) for b in range(K)]

    pixel, category = [], []
    for n in range(N):
        pixel += [(a - b) ** 2 for a, b in zip(residual(student, n), residual(teacher, n), strict=True)]
        both = zip(correlation(student_logits[n]), correlation(teacher_logits[n]), strict=True)
        category += [(a - b) ** 2 for a, b in both]
    return sum(pixel) / len(pixel), sum(category) / len(category)


def literal_cirkd(student, teacher, temperature, side=1):
    def distribution(a, image):
        e = torch.stack([cosine(a, b) for b in image]).div(temperature).exp()
        return e / e.sum()

    student, teacher = ([patches(x, side) for x in batch] for batch in (student, teacher))
    terms = []
    for i, j in itertools.product(range(N), range(N)):
        for a in range(len(student[i])):
            p, q = distribution(teacher[i][a], teacher[j]), distribution(student[i][a], student[j])
            terms.append((p * (p / q).log()).sum())
    return sum(terms) / len(terms)


LITERAL = {
    "at": (ATLoss(loss_weight=1), literal_at, (6, 4)),
    "fitnet": (FitNetLoss(loss_weight=1), literal_fitnet, (6, 6)),
    "skd": (SKDLoss(pool=2, loss_weight=1), lambda s, t: literal_skd(s, t, 2), (6, 4)),
    "skd, paper": (
        SKDLoss(variant="paper", loss_weight=1),
        lambda s, t: literal_skd(s, t, 2, lambda patch: patch.mean(1)),
        (6, 4),
    ),
    "skd, every pixel": (SKDLoss(pool=1, loss_weight=1), lambda s, t: literal_skd(s, t, 1), (3, 4)),
    "ifvd": (
        lambda s, t: IFVDLoss(K, loss_weight=1)(s, t, TARGET),
        lambda s, t: literal_ifvd(s, t, TARGET, ignored=1),
        (6, 4),
    ),
    "ifvd, paper": (
        lambda s, t: IFVDLoss(K, variant="paper", loss_weight=1)(s, t, TARGET),
        lambda s, t: literal_ifvd(s, t, TARGET),
        (6, 4),
    ),
    "cirkd": (CIRKDLoss(temperature=0.5, loss_weight=1), lambda s, t: literal_cirkd(s, t, 0.5), (3, 4)),
    "cirkd, pooled": (CIRKDLoss(temperature=0.1, pool=2, loss_weight=1), lambda s, t: literal_cirkd(s, t, 0.1, 2), (3, 4)),
}  # fmt: skip


def value_and_gradient(loss, student, teacher):
    student = student.clone().requires_grad_()
    value = loss(student, teacher)
    value.backward()
    return value.detach(), student.grad


@pytest.mark.parametrize("chunk", [base.CHUNK, 40], ids=["whole", "chunked"])
@pytest.mark.parametrize("name", LITERAL)
def test_formula(name, chunk, monkeypatch):
    monkeypatch.setattr(base, "CHUNK", chunk)
    loss, literal, channels = LITERAL[name]
    student, teacher = pair(channels)
    want = value_and_gradient(literal, student, teacher)
    torch.testing.assert_close(value_and_gradient(loss, student, teacher), want, rtol=1e-9, atol=1e-12)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 0.05)):
        s, t = student.to(dtype), teacher.to(dtype)
        value, gradient = value_and_gradient(loss, s, t)
        assert value.dtype == torch.float32
        assert gradient.dtype == dtype
        rounded = value_and_gradient(literal, s.double(), t.double())
        torch.testing.assert_close(value.double(), rounded[0], rtol=1e-5, atol=1e-7)
        assert (gradient.double() - rounded[1]).norm() <= tolerance * rounded[1].norm()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(loss(s, t), value, rtol=1e-6, atol=1e-7)


def test_formula_of_dsd():
    (zs, zt), (s0, t0), (s1, t1) = pair((K, K)), pair((5, 4)), pair((2, 7))
    leaves = [x.clone().requires_grad_() for x in (s0, s1, zs)]
    pixel, category = literal_dsd_published(leaves, (t0, t1, zt))
    (1000 * pixel + 10 * category).backward()
    ours = [x.clone().requires_grad_() for x in (s0, s1, zs)]
    value = DSDLoss()(ours[2], zt, ours[:2], (t0, t1))
    value.backward()
    torch.testing.assert_close(value.detach(), (1000 * pixel + 10 * category).detach())
    for a, b in zip(ours, leaves, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_values_of_the_code_behind_the_published_tables():
    """Values computed by the published code on these tensors, in float64."""
    rng = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    fs, ft = draw(2, 6, 5, 7), 2 * draw(2, 6, 5, 7)
    zs, zt = draw(2, 4, 5, 7), 2 * draw(2, 4, 5, 7)
    fs2, ft2 = draw(2, 8, 5, 7), draw(2, 8, 5, 7)
    assert SKDLoss(loss_weight=1)(fs, ft).item() == pytest.approx(0.169290016, rel=1e-8)
    pixel = DSDLoss(loss_weight=1, category_weight=0)(zs, zt, (fs, fs2), (ft, ft2))
    category = DSDLoss(loss_weight=0, category_weight=1)(zs, zt, (fs, fs2), (ft, ft2))
    assert pixel.item() == pytest.approx(0.052811544, rel=1e-7)
    assert category.item() == pytest.approx(2.76686575e-05, rel=1e-8)
    from fastkd.compat import cirkd

    assert cirkd.CriterionStructuralKD()(fs, ft).item() == pytest.approx(0.169290016, rel=1e-8)
    both = cirkd.CriterionDoubleSimKD()([fs, fs2, zs], [ft, ft2, zt])
    assert [x.item() for x in both] == pytest.approx([0.052811544, 2.76686575e-05], rel=1e-7)


def test_formula_of_dsd_in_the_paper():
    (zs, zt), (s0, t0), (s1, t1) = pair((K, K)), pair((5, 4)), pair((3, 7))
    leaves = [x.clone().requires_grad_() for x in (zs, s0, s1)]
    pixel, category = literal_dsd(leaves[0], zt, leaves[1:], (t0, t1), temperature=2.0)
    (1000 * pixel + 10 * category).backward()
    ours = [x.clone().requires_grad_() for x in (zs, s0, s1)]
    value = DSDLoss(variant="paper", temperature=2.0)(ours[0], zt, ours[1:], (t0, t1))
    value.backward()
    torch.testing.assert_close(value.detach(), (1000 * pixel + 10 * category).detach())
    for a, b in zip(ours, leaves, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_dsd_resizes_the_deeper_map():
    (s0, t0), (s1, t1) = pair((3, 3), (4, 6)), pair((5, 5), (2, 3))
    logits = torch.zeros(N, K, 4, 6, dtype=torch.float64)

    def residual(shallow, deep):
        q = [torch.stack([torch.stack(attention(x)).view(x.shape[-2:]) for x in batch]) for batch in (shallow, deep)]
        return F.interpolate(q[1][:, None], (4, 6), mode="bilinear")[:, 0] - q[0]

    want = 1000 * (residual(s0, s1) - residual(t0, t1)).square().mean()
    torch.testing.assert_close(DSDLoss(variant="paper")(logits, logits, (s0, s1), (t0, t1)), want)


def test_ifvd_takes_labels_by_nearest_neighbour():
    student, teacher = pair((6, 4))
    large = TARGET.repeat_interleave(3, 1).repeat_interleave(2, 2)
    for target in (large, large.to(torch.uint8), large.int()):
        torch.testing.assert_close(IFVDLoss(K)(student, teacher, target), IFVDLoss(K)(student, teacher, TARGET))
    # The ignored class has no prototype.
    torch.testing.assert_close(
        IFVDLoss(K, ignore_index=1)(student, teacher, TARGET),
        IFVDLoss(K)(student, teacher, torch.where(TARGET == 1, 255, TARGET)),
    )


def test_ifvd_without_a_label_is_zero():
    student, teacher = pair((6, 4))
    value, gradient = value_and_gradient(lambda s, t: IFVDLoss(K)(s, t, torch.full_like(TARGET, 255)), student, teacher)
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("name", LITERAL)
def test_the_graph_can_be_used_twice(name, monkeypatch):
    """For example if the trainer logs gradients before the step."""
    monkeypatch.setattr(base, "CHUNK", 40)
    loss, _, channels = LITERAL[name]
    student, teacher = pair(channels)
    value = loss(student.requires_grad_(), teacher)
    first = torch.autograd.grad(value, student, retain_graph=True)[0]
    value.backward()
    assert torch.equal(first, student.grad)


def test_the_backward_pass_keeps_the_backend(monkeypatch):
    monkeypatch.setattr(base, "CHUNK", 40)
    student, teacher = (x.requires_grad_(i == 0) for i, x in enumerate(pair((3, 4))))
    gradients = []
    for backend in ("reference", "auto"):
        with fastkd.use_backend(backend):
            value = CIRKDLoss()(student, teacher)
        gradients.append(torch.autograd.grad(value, student)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", LITERAL)
def test_zero_features_have_finite_gradients(name):
    """After a ReLU a pixel can be zero in all channels."""
    loss, _, channels = LITERAL[name]
    student, teacher = pair(channels)
    student[:, :, 1] = teacher[:, :, 2] = 0
    student[1] = 0
    value, gradient = value_and_gradient(loss, student, teacher)
    assert value.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", LITERAL)
def test_an_empty_batch_is_zero(name):
    loss, _, channels = LITERAL[name]
    if name.startswith("ifvd"):
        loss = lambda s, t: IFVDLoss(K)(s, t, TARGET[:0])  # noqa: E731
    student, teacher = (x[:0] for x in pair(channels))
    assert value_and_gradient(loss, student, teacher)[0] == 0


@pytest.mark.parametrize("name", LITERAL)
def test_a_teacher_that_is_the_student_costs_nothing(name):
    loss = LITERAL[name][0]
    student, _ = pair((6, 6))
    value, gradient = value_and_gradient(loss, student, student.clone())
    assert abs(value) < 1e-14
    assert gradient.norm() < 1e-12


@pytest.mark.parametrize("name", LITERAL)
def test_no_step_waits_for_the_device(name, monkeypatch):
    """Reading a value in Python would synchronise a GPU; a tensor without values raises an error instead."""
    monkeypatch.setattr(base, "CHUNK", 40)
    loss, _, channels = LITERAL[name]
    with FakeTensorMode(allow_non_fake_inputs=True):
        student, teacher = (torch.empty(N, c, H, W) for c in channels)
        value_and_gradient(loss, student, teacher)


MEMORY = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from benchmarks.harness import peak_memory
from fastkd.train.methods import base
from fastkd.train.methods.cirkd import CIRKDLoss
from fastkd.train.methods.skd import SKDLoss
base.CHUNK = 1 << 20
student, teacher = torch.randn(2, 16, 48, 48).requires_grad_(), torch.randn(2, 16, 48, 48)
for loss in (CIRKDLoss(), SKDLoss(pool=1)):
    loss(student, teacher).backward()
    print(peak_memory(lambda: loss(student, teacher).backward()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_similarities_do_not_pile_up():
    """All similarities at once would take 250 MB in CIRKD and 130 in SKD; the matrices of a span take 4 MB.
    Measured: 35 to 66."""
    root = str(Path(__file__).parents[2])
    out = subprocess.run([sys.executable, "-c", MEMORY, root], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    cirkd, skd = map(float, out.stdout.split())
    assert 0 < cirkd < 100e6
    assert 0 < skd < 100e6


def test_wrong_values_are_named():
    with pytest.raises(ValueError, match="put a 1x1 convolution on the student"):
        FitNetLoss()(*pair((6, 4)))
    with pytest.raises(ValueError, match="pool: got 0"):
        SKDLoss(pool=0)
    for kind in (SKDLoss, DSDLoss, lambda variant: IFVDLoss(K, variant=variant)):
        with pytest.raises(ValueError, match="variant: got 'code', expected 'published' or 'paper'"):
            kind(variant="code")
    with pytest.raises(ValueError, match="temperature > 0"):
        CIRKDLoss(temperature=0)
    with pytest.raises(ValueError, match=r"unknown loss 'cird'; did you mean 'cirkd'\?"):
        parse_method("kd+cird")


# In the trainer


@pytest.fixture(scope="module")
def networks():
    pytest.importorskip("segmentation_models_pytorch")
    from fastkd.train.config import ModelConfig
    from fastkd.train.models import build_model

    taps = {"low": "encoder[-2]", "high": "encoder[-1]"}
    student = ModelConfig(arch="FPN", encoder="tu-mobilenetv3_small_050", features=taps)
    teacher = dataclasses.replace(student, encoder="tu-mobilenetv3_small_075", aux="encoder[-2]")
    return build_model(student, K), build_model(teacher, K).eval().requires_grad_(False)


def steps(method, networks, config=None, count=2):
    """A few SGD steps; returns the last terms and the student."""
    from fastkd.train.models import Student

    torch.manual_seed(0)
    network, teacher = copy.deepcopy(networks[0]), networks[1]
    config = config or LossConfig()
    student = Student(network, student_features(method, config, network, teacher))
    objective = Objective(method, config, total_steps=count, student=network, teacher=teacher)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    labels = torch.randint(0, K, (2, 64, 64))
    labels[:, :8] = 255
    for step in range(count):
        optimizer.zero_grad()
        terms = objective(student(images), teacher_forward(teacher, images), labels, step)
        terms.total.backward()
        optimizer.step()
    assert terms.total.isfinite()
    assert terms.total.item() == pytest.approx(sum(part.item() for part in terms.parts.values()), rel=1e-5)
    return terms, student


@pytest.mark.parametrize("method", [m for m in METHODS if m != "rdd"])
def test_each_method_trains_alone(method, networks):
    config = LossConfig()
    config.cwd.compare = "both"
    terms, student = steps(method, networks, config)
    assert set(terms.parts) == {"task", method}
    assert terms.parts[method] > 0
    assert terms.parts[method].requires_grad
    adapted = {"nfd", "cwd", "fitnet"}  # these compare channel by channel
    assert set(student.adapters) == ({f"{method}/low", f"{method}/high"} if method in adapted else set())
    assert all(p.grad.abs().sum() > 0 for p in student.adapters.parameters())


def test_all_methods_train_together_and_beside_rdd(networks):
    terms, student = steps("+".join(METHODS), networks)
    assert set(terms.parts) == {"rdd_task", "rdd_kd", *METHODS} - {"rdd"}
    assert set(student.features) == {"low", "high", "nfd/low", "nfd/high", "fitnet/low", "fitnet/high"}


def test_weights_and_taps_can_be_chosen(networks):
    config = LossConfig()
    config.at.features = ("high",)
    one, _ = steps("at", networks, config, count=1)
    config.at.weight *= 3
    assert steps("at", networks, config, count=1)[0].parts["at"].item() == pytest.approx(
        3 * one.parts["at"].item(), rel=1e-4
    )
    config.at.features = ("hihg",)
    with pytest.raises(ValueError, match=r"feature 'hihg' is not tapped in the student, .* did you mean 'high'\?"):
        steps("at", networks, config)


def test_published_weights():
    config = LossConfig()
    weights = {name: getattr(config, name).weight for name in METHODS}
    assert weights == {
        "kd": 1, "nfd": 5, "cwd": 3, "rdd": 1, "at": 1e4, "fitnet": 10, "skd": 10, "ifvd": 20, "dsd": 1000, "cirkd": 1,
    }  # fmt: skip
    assert (config.cwd.feature_weight, config.cwd.temperature, config.dsd.category_weight) == (50, 4, 10)
    assert (ATLoss().loss_weight, FitNetLoss().loss_weight, SKDLoss().loss_weight) == (1e4, 10, 10)
    assert (IFVDLoss(K).loss_weight, DSDLoss().loss_weight, CIRKDLoss().loss_weight) == (20, 1000, 1)


def test_networks_that_do_not_fit(networks):
    from fastkd.train.config import ModelConfig
    from fastkd.train.models import build_model

    student, teacher = networks
    one_tap = build_model(
        ModelConfig(arch="FPN", encoder="tu-mobilenetv3_small_050", features={"high": "encoder[-1]"}), K
    )
    paper = LossConfig()
    paper.dsd.variant = "paper"
    Objective("dsd", LossConfig(), total_steps=1, student=one_tap, teacher=teacher)  # the logits are the second layer
    with pytest.raises(ValueError, match=r"two or more from shallow to deep.*--loss.dsd.weight 0"):
        Objective("dsd", paper, total_steps=1, student=one_tap, teacher=teacher)
    other = build_model(ModelConfig(arch="FPN", encoder="tu-mobilenetv3_small_050"), K + 1)
    with pytest.raises(ValueError, match="the teacher predicts 3 classes and the student 4; train both on the same"):
        Objective("kd", LossConfig(), total_steps=1, student=other, teacher=teacher)
    config = LossConfig()
    config.rdd.class_weight = "cityscapes"
    with pytest.raises(ValueError, match="class_weight has 19 numbers, expected 3"):
        Objective("rdd", config, total_steps=1, student=student, teacher=teacher)
    config = LossConfig()
    config.rdd.tfe_steps, config.rdd.blend = 0, True
    with pytest.raises(ValueError, match=r"set loss\.rdd\.blend false"):
        Objective("rdd", config, total_steps=1, student=student, teacher=student)

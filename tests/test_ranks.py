"""Tokens (B, L, C) and volumes (N, C, D, H, W) give the numbers of a map with the same elements, in place, in the
same strides."""

import pytest
import torch

import fastkd

from .support import DEVICE, each_backend, each_kernel, loss_and_gradient

LOSSES = {
    "nfd": lambda s, t, y, **o: fastkd.nfd_loss(s, t, **o),
    "nfd, c": lambda s, t, y, **o: fastkd.nfd_loss(s, t, dims="c", **o),
    "nfd, nhw": lambda s, t, y, **o: fastkd.nfd_loss(s, t, dims="nhw", **o),
    "nfd, chw": lambda s, t, y, **o: fastkd.nfd_loss(s, t, dims="chw", **o),
    "cwd": lambda s, t, y, **o: fastkd.cwd_loss(s, t, **o),
    "kd": lambda s, t, y, **o: fastkd.kd_loss(s, t, target=y, weight=y / 4 + 0.5, **o),
}
each_loss = pytest.mark.parametrize("name", LOSSES)
SPATIAL = {"tokens": (24,), "volume": (2, 3, 4)}


def problem(spatial):
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 5, *spatial, generator=g).to(DEVICE)
    return student, teacher, torch.randint(0, 5, (2, *spatial), generator=g).to(DEVICE)


@each_backend
@each_loss
@pytest.mark.parametrize("kind", SPATIAL)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_same_elements_same_bits(backend, name, kind, reduction):
    if backend == "cuda" and name == "cwd":
        pytest.skip("CUDA C++ has no kernel for it")
    spatial = SPATIAL[kind]
    student, teacher, target = problem(spatial)
    as_map = (2, 3 * 2, 4)  # the same elements as a map of 6 by 4
    want = loss_and_gradient(
        lambda s, t: LOSSES[name](s, t, target.view(2, *as_map[1:]), reduction=reduction),
        student.view(2, 5, *as_map[1:]),
        teacher.view(2, 5, *as_map[1:]),
        backend,
    )
    got = loss_and_gradient(lambda s, t: LOSSES[name](s, t, target, reduction=reduction), student, teacher, backend)
    if reduction == "none":
        shapes = {"kd": (2, *spatial), "nfd, c": (2, *spatial), "nfd, nhw": (5,), "nfd, chw": (2,)}
        assert got[0].shape == shapes.get(name, (2, 5))
    assert torch.equal(got[0].flatten(), want[0].flatten())
    assert torch.equal(got[1].flatten(), want[1].flatten())
    assert got[1].shape == student.shape


@each_kernel
@each_loss
def test_tokens_in_their_own_strides(backend, name):
    if backend == "cuda" and name == "cwd":
        pytest.skip("CUDA C++ has no kernel for it")
    student, teacher, target = problem((24,))
    tokens = student.transpose(1, 2).contiguous().requires_grad_()  # (B, L, C)
    with fastkd.use_backend(backend):
        value = LOSSES[name](tokens.transpose(1, 2), teacher.transpose(1, 2).contiguous().transpose(1, 2), target)
    value.backward()
    assert tokens.grad.is_contiguous()
    want = loss_and_gradient(lambda s, t: LOSSES[name](s, t, target), student, teacher, backend, torch.tensor(1.0))
    torch.testing.assert_close(value.detach(), want[0])
    torch.testing.assert_close(tokens.grad.transpose(1, 2), want[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["nfd", "cwd", "kd"])
def test_tokens_are_read_without_a_copy(name, monkeypatch):
    """The kernel gets the caller's memory."""
    student = torch.randn(2, 24, 5).transpose(1, 2)
    seen = []
    for module in (fastkd.functional, fastkd._operators):
        monkeypatch.setattr(module, "evaluate", lambda loss, b, r, s, *args: seen.extend(args[:2]) or args[0].sum())
    LOSSES[name](student, student, torch.zeros(2, 24, dtype=torch.int64))
    assert [x.data_ptr() for x in seen] == [student.data_ptr()] * 2
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


def test_wrong_ranks():
    x = torch.randn(2, 5, 24)
    with pytest.raises(ValueError, match=r"student: got shape \(5, 24\), expected 3 to 5 dimensions"):
        fastkd.nfd_loss(x[0], x[0])
    with pytest.raises(ValueError, match=r"teacher: got shape \(2, 5, 4, 6\), expected 3 dimensions like student"):
        fastkd.cwd_loss(x, x.view(2, 5, 4, 6))
    with pytest.raises(ValueError, match=r"expected the same L as student .* resize"):
        fastkd.kd_loss(x, x[..., :7])
    with pytest.raises(ValueError, match=r"target: got shape \(2, 4, 6\), expected \(2, 24\)"):
        fastkd.kd_loss(x, x, target=torch.zeros(2, 4, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected 4 dimensions \(N, C, H, W\)"):
        fastkd.resized_kd_loss(x, x, size=(4, 4))


@pytest.mark.parametrize("spatial", [(24,), (4, 6), (2, 3, 4)])
def test_adapter_of_any_rank(spatial):
    """The 1x1 convolution of a map becomes a linear layer on tokens; a teacher of another size is resized."""
    loss = fastkd.NFDLoss(5, 7)
    student = torch.randn(2, 5, *spatial)
    teacher = torch.randn(2, 7, *(2 * size for size in spatial))
    value = loss(student, teacher)
    weight = loss.adapter.weight.flatten(1)
    adapted = torch.einsum("oc,nc...->no...", weight, student)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(spatial)]
    resized = torch.nn.functional.interpolate(teacher, spatial, mode=mode, align_corners=False)
    torch.testing.assert_close(value, fastkd.nfd_loss(adapted, resized), rtol=1e-4, atol=1e-5)
    value.backward()
    assert loss.adapter.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("temperature", lambda x, w: fastkd.kd_loss(x, x.detach(), temperature=w[0])),
        ("temperature", lambda x, w: fastkd.cwd_loss(x, x.detach(), temperature=w[0])),
        ("eps", lambda x, w: fastkd.nfd_loss(x, x.detach(), eps=w[0])),
        (
            "class_weight",
            lambda x, w: fastkd.resized_cross_entropy(x, torch.zeros(2, 8, 8, dtype=torch.int64), class_weight=w),
        ),
        (
            "class_weight",
            lambda x, w: fastkd.rdd_loss(
                x, x.detach(), torch.zeros(2, 8, 8, dtype=torch.int64), stage="tse", class_weight=w
            ),
        ),
        ("weight", lambda x, w: fastkd.kd_loss(x, x.detach(), weight=w.sum().expand(2, 4, 6))),
    ],
)
def test_constants_that_want_a_gradient_are_refused(name, call):
    weight = torch.ones(5, requires_grad=True)
    with pytest.raises(ValueError, match=rf"{name}: requires grad, .* pass {name}.detach\(\)"):
        call(torch.randn(2, 5, 4, 6, requires_grad=True), weight)


@each_kernel
def test_a_mean_of_equal_terms_does_not_drift(backend):
    """Two million label pixels with equal terms: the mean is that term to 1e-6."""
    size = (1024, 2048) if DEVICE == "cuda" or backend == "cpu" else (16, 64)
    student, teacher = 3 * torch.randn(2, 1, 19, 1, 1, device=DEVICE)
    target = torch.full((1, *size), 3, dtype=torch.uint8, device=DEVICE)
    with fastkd.use_backend(backend):
        ce = fastkd.resized_cross_entropy(student, target).double()
        kd = fastkd.resized_kd_loss(student, teacher, size=size).double()
        dense = fastkd.kd_loss(*(x.expand(1, 19, *size) for x in (student, teacher))).double()
    with fastkd.use_backend("reference"):
        want_ce = fastkd.resized_cross_entropy(student.double(), target[:, :1, :1])
        want_kd = fastkd.kd_loss(student.double(), teacher.double())
    for got, want in ((ce, want_ce), (kd, want_kd), (dense, want_kd)):
        assert abs(got / want - 1) < 1e-6

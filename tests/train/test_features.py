"""Named taps: their results, their cleanup, and the errors for wrong names."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from fastkd.features import Tapped


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Pyramid()
        self.decoder = nn.Conv2d(8, 4, 1)
        self.head = nn.Sequential(nn.Conv2d(4, 3, 1), nn.Upsample(scale_factor=4))
        self.unused = nn.Linear(1, 1)

    def forward(self, x):
        return {"out": self.head(self.decoder(self.encoder(x)[-1]))}


class Pyramid(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1)])

    def forward(self, x):
        first = self.stages[0](x)
        return [x, first, self.stages[1](first)]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def test_taps_are_the_modules_outputs(net):
    x = torch.randn(2, 3, 16, 16)
    output, taps = Tapped(net, {"feat": "encoder[-1]", "mid": "encoder[1]", "logits": "head.0", "whole": "[out]"})(x)
    assert list(taps) == ["feat", "mid", "logits", "whole"]
    features = net.encoder(x)
    torch.testing.assert_close(taps["feat"], features[-1])
    torch.testing.assert_close(taps["mid"], features[1])
    assert taps["logits"].shape == (2, 3, 4, 4)  # before upsampling
    assert taps["whole"] is output["out"]


def test_gradients_flow_through_taps(net):
    taps = Tapped(net, {"feat": "encoder[-1]"})(torch.randn(1, 3, 16, 16)).taps
    taps["feat"].sum().backward()
    assert net.encoder.stages[0].weight.grad is not None
    assert net.decoder.weight.grad is None


def test_nothing_is_kept_between_calls(net):
    tapped = Tapped(net, {"feat": "encoder[-1]"})
    out = tapped(torch.randn(1, 3, 16, 16))
    alive = weakref.ref(out.taps["feat"])
    gc.disable()  # no reference cycle: the feature is freed with its last reference
    try:
        del out
        assert alive() is None
    finally:
        gc.enable()
    assert not any(m._forward_hooks for m in net.modules())


def test_hooks_are_removed_after_an_error(net):
    with pytest.raises(RuntimeError):
        Tapped(net, {"feat": "encoder[-1]"})(torch.randn(1, 5, 16, 16))
    assert not any(m._forward_hooks for m in net.modules())


def test_copies_are_independent(net):
    tapped = Tapped(net, {"feat": "encoder[-1]"})
    twin = copy.deepcopy(tapped)
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        twin.model.encoder.stages[1].weight.zero_()
        assert not torch.equal(tapped(x).taps["feat"], twin(x).taps["feat"])


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("encodr[-1]", r"no module 'encodr'; did you mean 'encoder'"),
        ("decoder.conv", "did you mean 'decoder'"),
        ("zzz", "'encoder', 'decoder', 'head'"),
        ("encoder[-1", "cannot read the path"),
    ],
)
def test_wrong_names_suggest_close_ones(net, path, says):
    with pytest.raises(ValueError, match=says):
        Tapped(net, {"feat": path})


@pytest.mark.parametrize(
    ("path", "kind", "says"),
    [
        ("encoder", TypeError, r"got a list; it has 3 entries: choose one, as in 'encoder\[-1\]'"),
        ("", TypeError, r"got a dict; choose one of its keys, as in '\[out\]'"),
        ("encoder[7]", LookupError, "returned 3 entries"),
        ("encoder[last]", LookupError, "must be a number"),
        ("[aux]", LookupError, r"keys \['out'\]"),
        ("decoder[0]", TypeError, "drop the brackets"),
        ("unused", RuntimeError, "did not run"),
    ],
)
def test_wrong_entries(net, path, kind, says):
    with pytest.raises(kind, match=says):
        Tapped(net, {"feat": path})(torch.randn(1, 3, 16, 16))


class Normed(nn.Module):
    """A convolution, a batch norm and an in-place activation, as in every block of a torchvision ResNet."""

    def __init__(self, activation):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), activation

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_tap_is_what_the_module_returned_before_it_was_overwritten(mode, training, pinned):
    torch.manual_seed(0)
    net = Normed(nn.ReLU(inplace=True)).train(training)
    plain = Normed(nn.ReLU()).train(training)
    plain.load_state_dict(net.state_dict())
    tapped, x = Tapped(net, {"bn": "bn", "act": "act"}), torch.randn(2, 3, 8, 8)
    if pinned:
        tapped.pin()
    for _ in range(3):
        with mode():
            output, taps = tapped(x)
            want = plain.bn(plain.conv(x))
        assert torch.equal(taps["bn"], want)
        assert (taps["bn"] < 0).any()
        assert torch.equal(taps["act"], want.relu())
        assert torch.equal(output, want.relu())
    if mode is torch.enable_grad:
        (output.sum() + taps["bn"].square().sum()).backward()
        assert net.conv.weight.grad.isfinite().all()


def test_a_tensor_that_is_not_overwritten_is_not_copied(net):
    tapped, x = Tapped(net, {"whole": "[out]"}), torch.randn(1, 3, 16, 16)
    for _ in range(2):
        output, taps = tapped(x)
        assert taps["whole"] is output["out"]
    tapped.eval()
    tapped(x)
    with torch.inference_mode():  # uses what the first eval forward found about overwriting
        output, taps = tapped(x)
    assert taps["whole"] is output["out"]


def test_a_tensor_that_is_overwritten_later_on_is_an_error_once():
    net = Normed(nn.Identity())
    tapped, x = Tapped(net, {"bn": "bn"}), torch.randn(2, 3, 8, 8)
    tapped(x)
    net.act = nn.ReLU(inplace=True)
    with pytest.raises(RuntimeError, match=r"overwrote what it returned.*call again"):
        tapped(x)
    assert (tapped(x).taps["bn"] < 0).any()


def test_the_blocks_of_a_torchvision_resnet():
    models = pytest.importorskip("torchvision.models")
    net = models.resnet18(weights=None).eval()
    names = [name for name, module in net.named_modules() if name.endswith(("bn1", "bn2"))]
    taps = Tapped(net, {name: name for name in names})(torch.randn(1, 3, 64, 64)).taps
    assert all((taps[name] < 0).any() for name in names)


def test_a_compiled_model_keeps_what_was_returned():
    tapped = Tapped(Normed(nn.ReLU(inplace=True)).eval(), {"bn": "bn"}).pin()
    compiled = torch.compile(tapped, backend="eager")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(compiled(x).taps["bn"], tapped.model.bn(tapped.model.conv(x)))

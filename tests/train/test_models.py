"""Networks: raw logits at their own size, taps, auxiliary heads, adapters, weights from files."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkd

pytest.importorskip("segmentation_models_pytorch")

from fastkd.train.config import LossConfig, ModelConfig
from fastkd.train.methods import Objective, student_features, teacher_forward
from fastkd.train.models import SegmentationModel, Student, build_model
from fastkd.train.weights import load_encoder_weights, load_network_weights, load_state_file
from tests.train import tiny

IMAGES = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)


def small(**changes):
    return dataclasses.replace(tiny.config("x", aux=changes.pop("with_aux", False)).model, **changes)


@pytest.fixture(scope="module")
def teacher():
    config = tiny.config("x", aux=True, width=64).model
    return build_model(config, 5).eval().requires_grad_(False)


def test_logits_are_raw_and_at_their_own_size():
    model = build_model(small(), 5).eval()
    out = model(IMAGES)
    assert out.logits.shape == (2, 5, 16, 24)
    assert out.aux is None
    assert out.features["decoder"].shape == (2, 32, 16, 24)
    network = model.tapped.model
    torch.testing.assert_close(out.logits, network.segmentation_head[0](out.features["decoder"]))


def test_auxiliary_head_matches_the_logits_and_is_trained(teacher):
    assert teacher.has_aux
    assert teacher(IMAGES).aux.shape == teacher(IMAGES).logits.shape
    model = build_model(small(with_aux=True), 5)
    model(IMAGES).aux.sum().backward()
    assert model.aux_head[-1].weight.grad is not None
    assert model.tapped.model.segmentation_head[0].weight.grad is None


def test_bytes_and_floats_are_the_same_images():
    model = build_model(small(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)), 5).eval()
    torch.testing.assert_close(model(IMAGES).logits, model(IMAGES.float() / 255).logits)
    torch.testing.assert_close(model.normalise(IMAGES), (IMAGES.float() / 255 - 0.5) / 0.5)


@pytest.mark.parametrize("arch", ["Unet", "DeepLabV3", "DeepLabV3Plus", "PSPNet", "Segformer"])
def test_architectures_of_smp(arch):
    model = build_model(ModelConfig(arch=arch, encoder="tu-mobilenetv3_small_050"), 5).eval()
    out = model(IMAGES)
    assert out.logits.shape[:2] == (2, 5)
    assert out.features["encoder"].shape[1] == model.tapped.model.encoder.out_channels[-1]
    assert arch == "Unet" or out.logits.shape[-1] < 96  # a U-Net's logits have the full size


DILATED = {"encoder_output_stride": 8}
RECIPES = [
    *((arch, encoder, 8) for arch in ("DeepLabV3", "PSPNet") for encoder in ("resnet18", "mobilenet_v2", "resnet101")),
    *(("Segformer", f"mit_b{i}", 4) for i in range(6)),
]
LARGE = ("resnet101", "mit_b1", "mit_b2", "mit_b3", "mit_b4", "mit_b5")


@pytest.mark.parametrize(
    ("arch", "encoder", "stride"),
    [pytest.param(*r, marks=[pytest.mark.slow] if r[1] in LARGE else []) for r in RECIPES],
)
def test_networks_of_the_published_tables(arch, encoder, stride):
    options = {} if arch == "Segformer" else DILATED
    config = ModelConfig(arch=arch, encoder=encoder, options=options, aux="encoder[-2]")
    model = build_model(config, 5).eval()
    out = model(IMAGES)
    assert out.logits.shape == out.aux.shape == (2, 5, 64 // stride, 96 // stride)
    assert out.features["encoder"].shape[-2:] == ((2, 3) if arch == "Segformer" else (8, 12))


def test_dilated_resnets_are_those_of_torchvision():
    from torchvision.models import resnet50

    config = ModelConfig(arch="DeepLabV3", encoder="resnet50", options=DILATED)
    encoder = build_model(config, 5).eval().double().tapped.model.encoder
    reference = resnet50(replace_stride_with_dilation=[False, True, True]).eval().double()
    reference.load_state_dict(encoder.state_dict(), strict=False)
    reference.avgpool = reference.fc = torch.nn.Identity()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)  # fp32 convolutions depend on the algorithm
    torch.testing.assert_close(encoder(x)[-1].flatten(1), reference(x))


def test_input_as_another_code_base_takes_it():
    """CIRKD's: BGR in 0 to 255, minus a mean, without standard deviation."""
    model = build_model(small(channels="bgr", max_value=255.0, mean=(104.007, 116.669, 122.679), std=(1, 1, 1)), 5)
    pixel = torch.tensor([10, 20, 30], dtype=torch.uint8).view(1, 3, 1, 1)
    want = torch.tensor([30 - 104.007, 20 - 116.669, 10 - 122.679]).view(1, 3, 1, 1)
    torch.testing.assert_close(model.normalise(pixel), want)
    torch.testing.assert_close(model.normalise(pixel.float() / 255), want)


def test_torchvision():
    config = ModelConfig(
        library="torchvision",
        arch="lraspp_mobilenet_v3_large",
        features={"high": "backbone[high]"},
        aux="backbone[low]",
    )
    out = build_model(config, 5).eval()(IMAGES)
    assert out.logits.shape == (2, 5, 8, 12)
    assert out.aux.shape == out.logits.shape


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"arch": "FPNN"}, "did you mean FPN"),
        ({"encoder": "tu-nothing"}, "tu-nothing"),
        ({"options": {"depth_of_field": 1}}, "depth_of_field"),
        ({"features": {"a": "encodr[-1]"}}, "did you mean 'encoder'"),
        ({"logits": "decoder"}, "expected"),
        ({"library": "torchvision", "arch": "fcn_resnet5"}, "did you mean fcn_resnet50"),
    ],
)
def test_wrong_models_are_named(changes, says):
    with pytest.raises(ValueError, match=says):
        build_model(small(**changes), 5)


def test_student_returns_what_the_method_compares_adapted(teacher):
    network = build_model(small(), 5)
    student = Student(network, student_features("nfd", LossConfig(), network, teacher))
    assert student(IMAGES).features["nfd/decoder"].shape[1] == teacher.channels["decoder"] == 64
    assert "adapters.nfd/decoder.weight" in student.state_dict()
    assert Student(network, student_features("kd", LossConfig(), network, teacher))(IMAGES).features == {}


def test_teacher_output_shares_memory_and_can_be_saved_for_backward(teacher):
    out = teacher_forward(teacher, IMAGES)
    for x in (out.logits, out.aux, out.features["decoder"]):
        assert not x.is_inference()
        assert not x.requires_grad
        s = torch.randn(x.shape, requires_grad=True)
        (s * x).sum().backward()
        torch.testing.assert_close(s.grad, x)
    torch.testing.assert_close(out.logits, teacher(IMAGES).logits)


def test_rdd_needs_the_teachers_auxiliary_head():
    student, plain = build_model(small(), 5), build_model(small(), 5)
    with pytest.raises(ValueError, match=r"--model.aux.*tfe_steps=0"):
        Objective("rdd", LossConfig(), total_steps=100, student=student, teacher=plain)
    config = LossConfig()
    config.rdd.tfe_steps = 0
    Objective("rdd", config, total_steps=100, student=student, teacher=plain)
    with pytest.raises(ValueError, match="the teacher has none"):
        Objective("rdd", config, total_steps=100, student=build_model(small(with_aux=True), 5), teacher=plain)


def test_features_need_a_common_name(teacher):
    student = build_model(small(features={"other": "encoder[-1]"}), 5)
    with pytest.raises(ValueError, match=r"\['other'\].*\['decoder'\]"):
        Objective("nfd", LossConfig(), total_steps=10, student=student, teacher=teacher)


FACTORY = """
import torch

class Net(torch.nn.Module):
    def __init__(self, classes, width=8):
        super().__init__()
        self.body = torch.nn.Conv2d(3, width, 3, 4, 1)
        self.head, self.side = torch.nn.Conv2d(width, classes, 1), torch.nn.Conv2d(width, classes, 1)

    def forward(self, x):
        x = self.body(x)
        self.side(x)
        return self.head(x)

def build(classes, width=8):
    return Net(classes, width)

def other(n):
    return Net(n)

def nothing(classes):
    return classes

def dictionary(classes):
    net = Net(classes)
    net.register_forward_hook(lambda module, args, out: {"out": out})
    return net
"""


@pytest.fixture
def factory(tmp_path, monkeypatch):
    (tmp_path / "made_up_nets.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda path, **changes: ModelConfig(arch=f"made_up_nets:{path}", **changes)


def test_factories(factory):
    out = build_model(factory("build"), 5).eval()(IMAGES)
    assert out.logits.shape == (2, 5, 16, 24)
    assert out.features == {}
    config = factory("Net", options={"width": 6}, logits="head", features={"body": "body"}, aux_logits="side")
    model = build_model(config, 5).eval()
    out = model(IMAGES)
    assert model.channels == {"body": 6}
    assert model.has_aux
    torch.testing.assert_close(out.aux, model.tapped.model.side(out.features["body"]))
    assert build_model(factory("dictionary", logits="[out]"), 5)(IMAGES).logits.shape == (2, 5, 16, 24)


@pytest.mark.parametrize(
    ("path", "changes", "says"),
    [
        ("biuld", {}, "made_up_nets has no 'biuld'; did you mean build"),
        ("other", {}, "missing a required argument: 'n'|unexpected keyword argument 'classes'"),
        ("build", {"options": {"depth": 3}}, "unexpected keyword argument 'depth'"),
        ("nothing", {}, "returned a int, expected a torch.nn.Module"),
        ("build", {"features": {"a": "bdy"}}, r"tap 'model.features.a': Net has no module 'bdy'; did you mean 'body'"),
        ("build", {"logits": "body"}, r"model.logits 'body' returns shape .*expected \(N, 5, h, w\)"),
        ("dictionary", {}, r"choose one of its keys, as in '\[out\]'"),
        ("build", {"aux": "body", "aux_logits": "side"}, "give one"),
        ("build", {"encoder_weights": "x.pt"}, "got a factory network; use model.weights"),
    ],
)
def test_wrong_factories_are_named(path, changes, says, factory):
    with pytest.raises((ValueError, TypeError), match=says):
        build_model(factory(path, **changes), 5)


def test_a_factory_that_cannot_be_imported():
    with pytest.raises(ValueError, match=r"No module named 'no_such_nets'; install it, or .*PYTHONPATH"):
        build_model(ModelConfig(arch="no_such_nets:build"), 5)


@pytest.mark.promise("no-code")
def test_a_checkpoint_runs_no_factory_unless_allowed(factory, monkeypatch):
    with pytest.raises(ValueError, match="FASTKD_FACTORIES=made_up_nets:build"):
        build_model(factory("build"), 5, from_checkpoint=True)
    monkeypatch.setenv("FASTKD_FACTORIES", "other:net,made_up_nets:build")
    build_model(factory("build"), 5, from_checkpoint=True)


def test_encoder_weights_are_loaded_strictly_but_for_the_classifier(tmp_path):
    import timm
    from safetensors.torch import save_file

    full = timm.create_model("mobilenetv3_small_050", pretrained=False).state_dict()
    save_file(full, tmp_path / "good.safetensors")
    torch.save(full, tmp_path / "good.pt")
    for name in ("good.safetensors", "good.pt"):
        model = build_model(small(encoder_weights=str(tmp_path / name)), 5)
        torch.testing.assert_close(model.tapped.model.encoder.model.conv_stem.weight, full["conv_stem.weight"])

    encoder = build_model(small(), 5).tapped.model.encoder
    broken = dict(full)
    del broken["conv_stem.weight"]
    broken["bn1.weight"] = torch.ones(3)
    broken["surprise.weight"] = torch.ones(1)
    torch.save(broken, tmp_path / "bad.pt")
    with pytest.raises(
        ValueError, match=r"bad.pt.*missing: conv_stem.weight.*unknown: surprise.weight.*bn1.weight is \(3,\)"
    ):
        load_encoder_weights(encoder, "tu-mobilenetv3_small_050", tmp_path / "bad.pt")


def same(state, other):
    return all(torch.equal(value, other[name]) for name, value in state.items() if "num_batches" not in name)


def test_whole_networks_are_loaded(tmp_path):
    from safetensors.torch import save_file

    trained = build_model(small(with_aux=True), 5)
    own, inner = trained.state_dict(), trained.tapped.model.state_dict()
    files = {"inner.pt": inner, "trainer.pt": {"format": 1, "config": {"a": 1}, "model": own}}
    files["parallel.pth"] = {"state_dict": {f"module.{name}": value for name, value in inner.items()}}
    for name, state in files.items():
        torch.save(state, tmp_path / name)
    save_file(inner, tmp_path / "inner.safetensors")
    model = build_model(small(), 5)
    for name in (*files, "inner.safetensors"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        load_network_weights(model, tmp_path / name)
        assert same(model.state_dict(), own), name
    assert same(build_model(small(weights=str(tmp_path / "trainer.pt"), with_aux=True), 5).state_dict(), own)
    with pytest.raises(ValueError, match=r"inner.pt does not fit FPN: missing: aux_head.*\(7\)"):
        build_model(small(weights=str(tmp_path / "inner.pt"), with_aux=True), 5)
    with pytest.raises(ValueError, match=r"shape: segmentation_head.0.* is \(5, .*expected \(4, "):
        build_model(small(weights=str(tmp_path / "inner.pt")), 4)


def test_weights_of_torchvision_with_their_auxiliary_head(tmp_path):
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

    full = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5, aux_loss=True).eval()
    torch.save(full.state_dict(), tmp_path / "full.pth")
    config = ModelConfig(
        library="torchvision",
        arch="deeplabv3_mobilenet_v3_large",
        weights=str(tmp_path / "full.pth"),
        options={"aux_loss": True},
        aux_logits="aux_classifier",
    )
    x = torch.rand(1, 3, 64, 64)
    model = build_model(config, 5).eval()
    out, want = model(x), full.backbone(model.normalise(x))
    torch.testing.assert_close(out.logits, full.classifier(want["out"]))
    aux = full.aux_classifier(want["aux"])
    torch.testing.assert_close(out.aux, F.interpolate(aux, out.logits.shape[-2:], mode="bilinear"))
    assert build_model(dataclasses.replace(config, options={}, aux_logits=None), 5).eval()(x).aux is None


def dilated_resnet18():
    """torchvision's ResNet-18 at output stride 8: a stage's first convolution has the previous stage's dilation."""
    from torchvision.models import resnet18

    net = resnet18()
    for stage, before, own in ((net.layer3, 1, 2), (net.layer4, 2, 4)):
        stage[0].downsample[0].stride = (1, 1)
        for i, conv in enumerate(m for m in stage.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)):
            conv.stride, conv.dilation = (1, 1), ((own, own) if i else (before, before))
            conv.padding = conv.dilation
    return net


class PublicLayout(nn.Module):
    """A DeepLabV3 with the names of a CIRKD checkpoint, as documented by awesome-semantic-segmentation-pytorch."""

    def __init__(self, classes):
        super().__init__()

        def block(inputs, outputs, *kernel, **options):
            convolution = nn.Conv2d(inputs, outputs, *kernel, bias=False, **options)
            return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

        self.pretrained = dilated_resnet18()
        aspp = nn.ModuleDict({"b0": block(512, 256, 1), "project": block(5 * 256, 256, 1)})
        for i, rate in enumerate((12, 24, 36), 1):
            aspp[f"b{i}"] = nn.ModuleDict({"block": block(512, 256, 3, padding=rate, dilation=rate)})
        aspp["b4"] = nn.ModuleDict({"gap": nn.Sequential(nn.AdaptiveAvgPool2d(1), *block(512, 256, 1))})
        last = nn.Sequential(*block(256, 256, 3, padding=1), nn.Dropout(0.1), nn.Conv2d(256, classes, 1))
        self.head = nn.ModuleDict({"aspp": aspp, "block": last})
        side = nn.Sequential(*block(256, 64, 3, padding=1), nn.Dropout(0.1), nn.Conv2d(64, classes, 1))
        self.auxlayer = nn.ModuleDict({"block": side})

    def forward(self, x):
        net, aspp = self.pretrained, self.head["aspp"]
        x = net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x))))))
        third = net.layer3(x)
        x = net.layer4(third)
        parts = [aspp["b0"](x)] + [aspp[f"b{i}"]["block"](x) for i in (1, 2, 3)]
        parts.append(aspp["b4"]["gap"](x).expand_as(parts[0]))
        logits = self.head["block"](aspp["project"](torch.cat(parts, 1)))
        return logits, self.auxlayer["block"](third)


CIRKD = {"channels": "bgr", "max_value": 255.0, "mean": (104.007, 116.669, 122.679), "std": (1.0, 1.0, 1.0)}


def test_a_checkpoint_in_the_names_of_cirkd(tmp_path):
    public = PublicLayout(5).eval()
    torch.save(public.state_dict(), tmp_path / "teacher.pth")
    config = ModelConfig(
        arch="DeepLabV3", encoder="resnet18", options=DILATED, weights=str(tmp_path / "teacher.pth"), **CIRKD
    )
    out = build_model(dataclasses.replace(config, aux="encoder[-2]"), 5).eval()(IMAGES)
    bgr = IMAGES.flip(1).float() - torch.tensor(CIRKD["mean"]).view(1, 3, 1, 1)
    logits, aux = public(bgr)
    torch.testing.assert_close(out.logits, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.aux, aux, rtol=1e-4, atol=1e-4)

    state = public.state_dict()
    state["head.psp.conv1.weight"] = state.pop("head.block.0.weight")
    torch.save(state, tmp_path / "other.pth")
    with (
        pytest.warns(UserWarning, match=r"names of CIRKD, whose networks expect model \{channels: bgr"),
        pytest.raises(
            ValueError, match=r"missing: tapped.model.decoder.conv.weight \(1\); unknown: head.psp.conv1.weight \(1\)"
        ),
    ):
        build_model(dataclasses.replace(config, channels="rgb", weights=str(tmp_path / "other.pth")), 5)


def test_convert_makes_a_teacher_of_foreign_weights(tmp_path, capsys):
    from fastkd.cli import main
    from fastkd.train import checkpoint

    trained = build_model(small(), 15)
    torch.save(trained.tapped.model.state_dict(), tmp_path / "foreign.pth")
    (tmp_path / "teacher.yaml").write_text(
        "data: {name: street_scenes, options: {size: [64, 96], length: 2}}\n"
        "model: {arch: FPN, encoder: tu-mobilenetv3_small_050, features: {decoder: decoder},\n"
        "        options: {decoder_pyramid_channels: 32, decoder_segmentation_channels: 32}}\n"
    )
    words = ["convert", "--config", str(tmp_path / "teacher.yaml"), "--out", str(tmp_path / "teacher")]
    assert main(words) == 1
    assert "give --model.weights FILE" in capsys.readouterr().err
    words += ["--model.weights", str(tmp_path / "foreign.pth")]
    assert main(words) == 0
    (tmp_path / "foreign.pth").unlink()  # the checkpoint does not need it
    network, state = checkpoint.load_network(tmp_path / "teacher" / "best.pt")
    assert len(state["classes"]) == 15
    torch.testing.assert_close(network(IMAGES).logits, trained.eval()(IMAGES).logits)
    assert main(words) == 1
    assert "exists; discard it with --overwrite" in capsys.readouterr().err


def test_unreadable_weights_are_named(tmp_path):
    for name in ("x.safetensors", "x.pt"):
        (tmp_path / name).write_bytes(b"no weights")
        with pytest.raises(ValueError, match=f"cannot read weights from .*{name}"):
            load_state_file(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        load_state_file(tmp_path / "list.pt")
    with pytest.raises(FileNotFoundError, match="no weights file"):
        load_state_file(tmp_path / "absent.pt")


def wrapped():
    """name -> a function that adds a common wrapper to a state dict."""
    prefix = lambda *words: lambda state: {"".join(words) + k: v for k, v in state.items()}  # noqa: E731
    return {
        "plain": lambda state: state,
        "DataParallel": prefix("module."),
        "torch.compile": prefix("_orig_mod."),
        "compiled in DataParallel": prefix("module.", "_orig_mod."),
        "DataParallel, compiled": prefix("_orig_mod.", "module."),
        "Lightning": lambda state: {"epoch": 3, "state_dict": prefix("model.")(state), "hyper_parameters": {"lr": 1.0}},
        "a student": prefix("student.", "module."),
        "a trainer": lambda state: {"model": {"state_dict": state}, "optimizer": {"state": {}}},
        "model_state_dict": lambda state: {"model_state_dict": prefix("module.")(state), "epoch": 1},
        "timm": lambda state: {"arch": "x", "state_dict": prefix("module.")(state), "state_dict_ema": state},
        "average": lambda state: {"n_averaged": torch.tensor(3), **prefix("module.")(state)},
    }


@pytest.fixture(scope="module")
def pair():
    """Two networks of one configuration."""
    config = ModelConfig(arch="FPN", encoder="tu-mobilenetv3_small_050")
    torch.manual_seed(0)
    return config, build_model(config, 3), build_model(config, 3)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("wrapper", wrapped())
def test_every_common_wrapper_is_taken_off(wrapper, suffix, pair, tmp_path):
    from safetensors.torch import save_file

    config, network, other = pair
    for name, state in (
        (
            "network",
            {k.removeprefix("tapped.model."): v for k, v in network.state_dict().items() if k.startswith("tapped")},
        ),
        ("encoder", network.tapped.model.encoder.state_dict()),
    ):
        path = tmp_path / f"{name}{suffix}"
        held = wrapped()[wrapper](state)
        if suffix == ".safetensors":
            if any(not isinstance(value, torch.Tensor) for value in held.values()):
                pytest.skip("a safetensors file holds names and tensors alone")
            save_file({k: v.contiguous() for k, v in held.items()}, path)
        else:
            torch.save(held, path)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.normal_()
        if name == "network":
            load_network_weights(other, path)
            found, wanted = other, network
        else:
            load_encoder_weights(other.tapped.model.encoder, config.encoder, path)
            found, wanted = other.tapped.model.encoder, network.tapped.model.encoder
        loaded = found.state_dict()
        for key, value in wanted.state_dict().items():
            assert torch.equal(loaded[key], value), key


class Settings:
    pass


@pytest.mark.parametrize(
    ("held", "says"),
    [
        ({"model": {"a": torch.zeros(1)}, "args": Settings()}, r"holds an object of [\w.]*Settings beside tensors"),
        ({"a": torch.zeros(1), "epoch": 3}, r"holds 'epoch' \(int\) beside tensors"),
        ({"epoch": 3}, r"holds 'epoch' \(int\) and no state dict"),
        ([torch.zeros(1)], "holds no state dict but a list, expected a mapping"),
    ],
)
def test_a_file_that_holds_more_than_tensors_says_what_to_save(held, says, tmp_path):
    torch.save(held, tmp_path / "a.pth")
    with pytest.raises(
        ValueError, match=rf"{says}.*save the state dict alone: torch\.save\(network\.state_dict\(\), FILE\)"
    ) as error:
        load_state_file(tmp_path / "a.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"encoder": "no_such_encoder"}, "no_such_encoder"),
        ({"options": {"encoder_output_stride": 3}}, "encoder"),
        ({"options": {"no_such_option": 1}}, "no_such_option"),
        ({"features": {"e": "encoder"}}, r"model\.arch 'FPN'.*it has \d+ entries: choose one"),
        ({"encoder": "tu-vit_tiny_patch16_224"}, "vit_tiny"),
    ],
)
def test_what_a_library_raises_names_the_value(changes, says):
    config = ModelConfig(**({"arch": "FPN", "encoder": "tu-mobilenetv3_small_050"} | changes))
    with pytest.raises(ValueError, match=says):
        build_model(config, 3)


# Tokens of vision transformers


class TokenNetwork(torch.nn.Module):
    """A timm vision transformer with a linear head on its patch tokens."""

    def __init__(self, classes: int, registers: int = 0):
        super().__init__()
        timm = pytest.importorskip("timm")
        options = {"img_size": 128, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
        self.body = timm.models.vision_transformer.VisionTransformer(
            **options, reg_tokens=registers, dynamic_img_size=True, dynamic_img_pad=True
        )
        self.head = torch.nn.Linear(24, classes)

    def forward(self, images):
        return self.head(self.body.forward_features(images))


@pytest.mark.parametrize("registers", [0, 4])
def test_tokens_are_maps_without_class_and_registers(registers):
    taps = {"block": "body.blocks.0", "norm": "body.norm"}
    network = TokenNetwork(3, registers)
    model = SegmentationModel(network, 3, ModelConfig(logits="head", features=taps, aux="body.blocks.0")).eval()
    assert model.channels == {"block": 24, "norm": 24}
    images = torch.rand(2, 3, 96, 150)  # the width is padded to 10 patches
    out = model(images)
    assert out.logits.shape == out.aux.shape == (2, 3, 6, 10)
    tokens = network.body.forward_features(model.normalise(images))[:, 1 + registers :]
    assert out.features["norm"].shape == (2, 24, 6, 10)
    torch.testing.assert_close(out.features["norm"], tokens.transpose(1, 2).reshape(2, 24, 6, 10))
    fastkd.NFDLoss()(out.features["block"], out.features["norm"].detach()).backward()
    assert network.body.blocks[0].mlp.fc1.weight.grad is not None


def test_tokens_that_are_no_grid():
    network = TokenNetwork(3)
    network.body.blocks[1].register_forward_hook(lambda module, args, out: out[:, :-1])
    with pytest.raises(ValueError, match=r"model.features.x returns 64 tokens, expected 1 and a grid of 8 x 8"):
        SegmentationModel(network, 3, ModelConfig(logits="head", features={"x": "body.blocks.1"}))


def test_tokens_of_anything_else_are_named():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 16, stride=16), torch.nn.Flatten(2))
    with pytest.raises(ValueError, match=r"or tokens of a timm vision transformer"):
        SegmentationModel(network, 3, ModelConfig(logits="0", features={"x": "1"}))

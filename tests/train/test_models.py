"""Networks: raw logits at their own size, taps, auxiliary heads, adapters, weights from files."""

import dataclasses

import pytest
import torch

pytest.importorskip("segmentation_models_pytorch")

from fastkd.train.config import LossConfig, ModelConfig
from fastkd.train.methods import Objective, student_features, teacher_forward
from fastkd.train.models import Student, build_model
from fastkd.train.weights import load_encoder_weights, load_state_file
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
    assert arch == "Unet" or out.logits.shape[-1] < 96  # a U-Net's own logits are full size


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

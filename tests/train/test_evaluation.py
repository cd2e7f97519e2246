"""Scores against numbers computed by hand; windows, scales and flips against their expected results."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("torchvision")

from fastkd.train.config import EvalConfig
from fastkd.train.evaluation import ConfusionMatrix, _starts, evaluate, predict_logits, predict_scores, scores
from fastkd.train.models import Output

CPU = torch.device("cpu")


def test_scores_by_hand():
    # rows = labels: class 0 has 5 pixels (3 right), class 1 has 3 (2 right), class 2 occurs in neither labels nor
    # predictions.
    matrix = torch.tensor([[3, 2, 0], [1, 2, 0], [0, 0, 0]])
    result = scores(matrix, ["a", "b", "c"])
    assert result.class_iou == {"a": pytest.approx(3 / 6), "b": pytest.approx(2 / 5), "c": None}
    assert result.miou == pytest.approx((3 / 6 + 2 / 5) / 2)
    assert result.pixel_accuracy == pytest.approx(5 / 8)


def test_a_predicted_class_without_labels_counts_as_zero():
    result = scores(torch.tensor([[3, 1], [0, 0]]), ["a", "b"])
    assert result.class_iou == {"a": 0.75, "b": 0.0}
    assert result.miou == pytest.approx(0.375)


def test_no_valid_pixel():
    result = scores(torch.zeros(2, 2), ["a", "b"])
    assert result.miou == 0
    assert result.pixel_accuracy == 0
    assert result.class_iou == {"a": None, "b": None}


def test_confusion_matrix_by_hand():
    matrix = ConfusionMatrix(3, 255, CPU)
    labels = torch.tensor([[0, 0, 1, 255], [2, 2, 2, 255]], dtype=torch.uint8)
    matrix.update(torch.tensor([[0, 1, 1, 0], [2, 0, 2, 2]]), labels)
    matrix.update(torch.tensor([1]), torch.tensor([0], dtype=torch.uint8))
    assert matrix.compute().tolist() == [[1, 2, 0], [0, 1, 0], [1, 0, 2]]
    many = ConfusionMatrix(200, 255, CPU)  # 200 · 200 does not fit the labels' 8 bits
    many.update(torch.tensor([3]), torch.tensor([199], dtype=torch.uint8))
    assert many.compute()[199, 3] == 1


class Waits(TorchDispatchMode):
    """Records operators that would synchronise the host if the tensors were on a GPU."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "unique", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0].removeprefix("aten::")
        indexed = name == "index" and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if name.startswith(self.NAMES) or indexed:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_no_batch_waits_for_the_device():
    how = EvalConfig(window=(8, 8), stride=(4, 4), scales=(0.5, 1.0), flip=True, size_divisor=8)
    matrix, images = ConfusionMatrix(3, 255, CPU), torch.zeros(2, 3, 12, 12, dtype=torch.uint8)
    labels = torch.zeros(2, 12, 12, dtype=torch.uint8)
    with Waits() as waits:
        matrix.update(predict_scores(Red(), images, (12, 12), how).argmax(1), labels)
    assert waits.seen == []
    with Waits() as waits:  # checks that the test can detect one
        labels[labels != 255].max().item()
    assert waits.seen == ["index", "_local_scalar_dense"]


class Red(nn.Module):
    """Logits that encode the class from the red channel."""

    def forward(self, images):
        images = images.float() if images.dtype == torch.uint8 else images * 255
        return Output(torch.cat([-(images[:, :1] - k).abs() for k in range(3)], 1), {}, None)


class Pairs:
    classes, ignore_index = ("a", "b", "c"), 255

    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        predicted, label = self.pairs[index]
        image = torch.tensor(predicted, dtype=torch.uint8)[None].repeat(3, 1, 1)
        return image, torch.tensor(label, dtype=torch.uint8)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_evaluate_by_hand(batch_size):
    data = Pairs([
        ([[0, 0], [1, 1]], [[0, 1], [1, 255]]),
        ([[0, 1], [1, 0]], [[0, 0], [1, 255]]),
        ([[0, 2, 0]], [[0, 0, 255]]),
    ])  # fmt: skip
    model = Red().train()
    # valid pixels, label -> prediction: 0->0, 1->0, 1->1; 0->0, 0->1, 1->1; image of another size: 0->0, 0->2
    result = evaluate(model, data, EvalConfig(batch_size=batch_size), device=CPU)
    assert result.class_iou == {"a": pytest.approx(3 / 6), "b": pytest.approx(2 / 4), "c": 0.0}
    assert result.miou == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert result.pixel_accuracy == pytest.approx(5 / 8)
    assert model.training
    first = evaluate(model, data, EvalConfig(limit=1), device=CPU)
    assert first.pixel_accuracy == pytest.approx(2 / 3)
    assert first.class_iou["c"] is None


def test_evaluate_in_shares():
    """The counts of two processes add up to those of one (torch.distributed does the sum)."""
    data = Pairs([([[k % 3, 0]], [[0, k % 2]]) for k in range(5)])

    def counts(**share):
        kept = []
        compute = ConfusionMatrix.compute
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ConfusionMatrix, "compute", lambda self, world: kept.append(compute(self)) or kept[0])
            evaluate(Red(), data, device=CPU, **share)
        return kept[0]

    assert torch.equal(counts(rank=0, world=2) + counts(rank=1, world=2), counts())


def test_another_number_of_classes():
    class Two(Pairs):
        classes = ("a", "b")

    with pytest.raises(ValueError, match="predicts 3 classes, the data set has 2"):
        evaluate(Red(), Two([([[0]], [[0]])]), device=CPU)


def test_scores_are_at_label_resolution():
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    assert predict_logits(Red(), images, (20, 12), input_size=(4, 4)).shape == (1, 3, 20, 12)
    for how in (
        EvalConfig(),
        EvalConfig(window=(5, 5)),
        EvalConfig(scales=(0.5, 1.5), flip=True),
        EvalConfig(size=(4, 6)),
    ):
        assert predict_scores(Red(), images, (20, 12), how).shape == (1, 3, 20, 12)


class Seen(nn.Module):
    """Records input shapes; logits are the first two channels at a quarter of the size."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def forward(self, images):
        self.shapes.append(tuple(images.shape[-2:]))
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        return Output(nn.functional.avg_pool2d(images[:, :2], 4), {}, None)


def test_padding_to_what_the_network_takes():
    model, images = Seen(), torch.rand(1, 3, 20, 36)
    found = predict_logits(model, images, (20, 36), size_divisor=16)
    assert model.shapes == [(32, 48)]
    own = predict_logits(model, images, (20, 36), size_divisor=4)
    assert model.shapes[-1] == (20, 36)
    # The padding repeats the border and is cropped again; it affects half a cell of the logits.
    torch.testing.assert_close(found[..., :18, :34], own[..., :18, :34])


def test_windows():
    assert _starts(10, 4, 3) == [0, 3, 6]
    assert _starts(10, 4, 4) == [0, 4, 6]
    assert _starts(4, 4, 3) == [0]
    model, images = Seen(), torch.rand(2, 3, 24, 40)
    predict_scores(model, images, (24, 40), EvalConfig(window=(16, 16), stride=(8, 16), size_divisor=4))
    assert model.shapes == [(16, 16)] * (2 * 3)
    model.shapes.clear()
    predict_scores(model, images, (24, 40), EvalConfig(window=(64, 64), size_divisor=4))
    assert model.shapes == [(24, 40)]  # not larger than the image


class Mean(nn.Module):
    """Logits (mean of the window, 0), which identify a window."""

    def forward(self, images):
        means = images[:, :1].mean((-2, -1), keepdim=True).expand_as(images[:, :1])
        return Output(torch.cat([means, torch.zeros_like(means)], 1), {}, None)


def test_overlapping_windows_are_averaged_by_hand():
    images = torch.zeros(1, 3, 1, 6)
    images[..., :] = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    found = predict_scores(Mean(), images, (1, 6), EvalConfig(window=(1, 4), stride=(1, 2), size_divisor=1))
    # windows 0..3 (mean 0.3) and 2..5 (mean 0.7)
    torch.testing.assert_close(found[0, 0, 0], torch.tensor([0.3, 0.3, 0.5, 0.5, 0.7, 0.7]))


def test_a_pixelwise_network_sees_the_same_in_windows():
    images = torch.randint(0, 3, (2, 3, 13, 11), dtype=torch.uint8)
    whole = predict_scores(Red(), images, (13, 11), EvalConfig(size_divisor=1))
    parts = predict_scores(Red(), images, (13, 11), EvalConfig(window=(5, 4), size_divisor=1))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


class Lopsided(nn.Module):
    """Predicts class 1 in the left half of any input."""

    def forward(self, images):
        logits = images.new_zeros((len(images), 2, *images.shape[-2:]), dtype=torch.float32)
        logits[:, 1, :, : images.shape[-1] // 2] = 2.0
        return Output(logits, {}, None)


def test_flip_by_hand():
    images = torch.zeros(1, 3, 2, 4)
    once = predict_scores(Lopsided(), images, (2, 4), EvalConfig(size_divisor=1))
    assert once[0, 1, 0].tolist() == [2, 2, 0, 0]
    both = predict_scores(Lopsided(), images, (2, 4), EvalConfig(flip=True, size_divisor=1))
    share = torch.tensor([2.0, 0.0]).softmax(0)[0]
    torch.testing.assert_close(both[0, 1], torch.full((2, 4), float(share + 0.5) / 2))


def test_scales_by_hand():
    model, images = Seen(), torch.rand(1, 3, 16, 16)
    found = predict_scores(model, images, (16, 16), EvalConfig(scales=(0.5, 1.0, 2.0), size_divisor=4))
    assert model.shapes == [(8, 8), (16, 16), (32, 32)]
    torch.testing.assert_close(found.sum(1), torch.ones(1, 16, 16))
    views = [predict_logits(model, images, (16, 16), input_size=(s, s), size_divisor=4) for s in (8, 16, 32)]
    torch.testing.assert_close(found, torch.stack([v.softmax(1) for v in views]).mean(0))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scales": ()}, r"eval\.scales"),
        ({"scales": (0.0,)}, r"eval\.scales"),
        ({"stride": (4, 4)}, r"set eval\.window"),
        ({"window": (4, 4), "stride": (4, 8)}, "pixels are left out"),
        ({"batch_size": 0}, r"eval\.batch_size must be a whole number at least 1"),
        ({"size_divisor": 0}, r"eval\.size_divisor"),
    ],
)
def test_values_that_do_not_fit(changes, says):
    with pytest.raises(ValueError, match=says):
        EvalConfig(**changes).check()

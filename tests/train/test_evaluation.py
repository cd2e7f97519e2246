"""Scores against numbers worked out by hand."""

import pytest
import torch
from torch import nn

pytest.importorskip("torchmetrics")

from fastkd.train.evaluation import evaluate, predict_logits, scores
from fastkd.train.models import Output


def test_scores_by_hand():
    # rows = labels: class 0 has 5 pixels (3 right), class 1 has 3 (2 right), class 2 is labelled and predicted nowhere.
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


class Red(nn.Module):
    """Logits that read the class off the red channel."""

    def forward(self, images):
        red = images[:, :1].float()
        return Output(torch.cat([-(red - k).abs() for k in range(3)], 1), {}, None)


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


def test_evaluate_by_hand():
    data = Pairs([([[0, 0], [1, 1]], [[0, 1], [1, 255]]), ([[0, 1], [1, 0]], [[0, 0], [1, 255]])])
    model = Red().train()
    # valid pixels, label -> prediction: 0->0, 1->0, 1->1; 0->0, 0->1, 1->1
    result = evaluate(model, data, device=torch.device("cpu"), batch_size=1)
    assert result.class_iou == {"a": pytest.approx(2 / 4), "b": pytest.approx(2 / 4), "c": None}
    assert result.pixel_accuracy == pytest.approx(4 / 6)
    assert model.training
    first = evaluate(model, data, device=torch.device("cpu"), limit=1)
    assert first.pixel_accuracy == pytest.approx(2 / 3)


def test_scores_are_at_label_resolution():
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    assert predict_logits(Red(), images, (20, 12), input_size=(4, 4)).shape == (1, 3, 20, 12)

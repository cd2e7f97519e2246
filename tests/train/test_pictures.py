"""Visualisations, for images of any size."""

import numpy as np
import pytest
import torch

pytest.importorskip("segmentation_models_pytorch")

from fastkd.train.config import EvalConfig
from fastkd.train.models import build_model
from fastkd.train.pictures import difficulty, predictions, sample
from tests.train import tiny

WIDTH = 270  # width of a picture in a panel


class Odd(tiny.Patches):
    """Images of different sizes, none divisible by the stride."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image[:, : 50 + index, :61], label[: 50 + index, :61]


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    teacher, student = (build_model(tiny.config("", aux=aux).model, 3).eval() for aux in (True, False))
    return teacher, student


def test_samples_are_spread_evenly():
    assert len(sample(tiny.Patches(8), 3)) == 3
    assert [label.shape[0] for _, label in sample(Odd(10), 3)] == [51, 55, 58]
    assert len(sample(tiny.Patches(2), 3)) == 2


@pytest.mark.parametrize("how", [EvalConfig(), EvalConfig(size=(40, 72)), EvalConfig(flip=True, scales=(1.0, 1.5))])
def test_images_of_any_size(how, networks):
    teacher, student = networks
    samples = sample(Odd(4), 2)
    picture = difficulty(teacher, student, samples, Odd(4), how)
    assert picture.width == 6 * WIDTH
    alone = difficulty(student, student, samples, Odd(4), how)
    assert alone.width == 5 * WIDTH  # without an auxiliary head there is no TFE map
    assert predictions({"a": student}, samples, Odd(4), how).width == 3 * WIDTH


def test_the_mask_of_equal_networks_is_empty(networks):
    """Dark, the heat map's lowest value."""
    _, student = networks
    picture = np.asarray(difficulty(student, student, sample(Odd(4), 1), Odd(4), EvalConfig()))
    mask = picture[60:200, -200:-50].reshape(-1, 3)
    assert (mask == mask[0]).all()
    assert mask[0].tolist() == [0, 0, 3]

"""Samples depend only on the seed and on their index in the run."""

import pytest
import torch

pytest.importorskip("accelerate")

from fastkd.train.loader import Part, StepSampler, train_loader
from tests.train import tiny


def test_samples_depend_on_seed_and_step_alone():
    whole = list(StepSampler(10, 4, range(6), 0))
    assert list(StepSampler(10, 4, range(3, 6), 0)) == whole[3:]
    shares = [list(StepSampler(10, 4, range(6), 0, rank, 2)) for rank in range(2)]
    assert [a + b for a, b in zip(*shares, strict=True)] == whole
    parts = StepSampler(10, 4, range(6), 0, parts=2)
    assert len(parts) == 12
    assert [key for part in parts for key in part] == [key for batch in whole for key in batch]
    flat = [index for batch in whole for index, _ in batch]
    assert sorted(flat[:10]) == list(range(10))
    assert flat[:10] != flat[10:20]


def test_batches_do_not_depend_on_the_number_of_workers():
    def batches(workers):
        torch.manual_seed(workers)  # another state of the random number generator
        loader = train_loader(
            tiny.Patches(5), batch_size=4, steps=range(1, 4), seed=3, workers=workers, part=Part(parts=2)
        )
        return [torch.cat([images.flatten(), labels.flatten()]) for images, labels in loader]

    alone = batches(0)
    assert len(alone) == 6
    for workers in (1, 3):
        assert all(torch.equal(a, b) for a, b in zip(alone, batches(workers), strict=True))


def test_what_cannot_be_shared():
    with pytest.raises(ValueError, match="cannot be shared by 3 processes"):
        StepSampler(10, 4, range(6), 0, 0, 3)
    with pytest.raises(ValueError, match="take a multiple of 8"):
        StepSampler(10, 4, range(6), 0, 0, 2, 4)
    with pytest.raises(ValueError, match="empty"):
        StepSampler(0, 4, range(6), 0)

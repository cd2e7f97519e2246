"""Batches of endless shuffled passes over a data set; each sample is drawn under its own seed.

With unlabelled images, every batch and every share of it has the same number of them. They come last, without labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, default_collate

from fastkd.train.data.unlabelled import Unlabelled
from fastkd.train.evaluation import SegmentationSet


class Part(NamedTuple):
    """Process index, number of processes, and accumulation steps per process."""

    rank: int = 0
    world: int = 1
    parts: int = 1


ALONE = Part()


class StepSampler(Sampler):
    """For each step, this process's share of the batch in `parts` lists of (index, sample number in the run).

    Sample k of a pass is item k mod n of the permutation of epoch k div n; a batch may span two epochs. The order
    depends only on the seed, not on the first step or the number of processes and parts. Unlabelled images have a
    separate pass; their indices follow those of the labelled ones.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        steps: range,
        seed: int,
        rank: int = 0,
        world: int = 1,
        parts: int = 1,
        *,
        unlabelled: int = 0,
        unlabelled_size: int = 0,
    ):
        """batch_size: images per step; `unlabelled_size` of them come from the `unlabelled` other images."""
        if length < 1:
            raise ValueError("the training set is empty")
        # Items in a pass, items per step, index of the first item, and its position in the batch.
        labelled = batch_size - unlabelled_size
        self.passes = [(length, labelled, 0, 0), (unlabelled, unlabelled_size, length, labelled)]
        for what, size in (("train.batch_size", batch_size), ("the unlabelled share of a batch,", unlabelled_size)):
            if size % (world * parts):
                raise ValueError(
                    f"{what} {size} cannot be shared by {world} processes with train.accumulate {parts}; "
                    f"take a multiple of {world * parts}"
                )
        self.batch_size, self.steps, self.seed = batch_size, steps, seed
        self.rank, self.world, self.parts = rank, world, parts

    def __len__(self) -> int:
        return len(self.steps) * self.parts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        orders = [(torch.empty(0), -1)] * 2
        for step in self.steps:
            batch: list[list[tuple[int, int]]] = [[] for _ in range(self.parts)]
            for kind, (length, size, first, start) in enumerate(self.passes):
                share = size // self.world
                for own in range(share):
                    place = self.rank * share + own
                    epoch, item = divmod(step * size + place, length)
                    if epoch != orders[kind][1]:
                        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                        orders[kind] = torch.randperm(length, generator=generator), epoch
                    key = first + int(orders[kind][0][item]), step * self.batch_size + start + place
                    batch[own * self.parts // share].append(key)
            yield from batch


class Seeded(Dataset):
    """Returns item (index, number) under torch's CPU generator seeded by (seed, number), and restores the generator."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        index, number = key
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(self.seed * 1_000_000_007 + number)  # manual_seed would reseed the GPU too
        try:
            return self.dataset[index]
        finally:
            torch.set_rng_state(state)


def train_loader(
    dataset: SegmentationSet,
    *,
    batch_size: int,
    steps: range,
    seed: int,
    workers: int = 0,
    part: Part = ALONE,
    pin_memory: bool = False,
    unlabelled: Unlabelled | None = None,
    unlabelled_size: int = 0,
) -> DataLoader:
    """Batches (images, labels of the first of them) for `steps` of a run, `part.parts` per step.

    batch_size: images over all processes and parts; `unlabelled_size` of them are unlabelled.
    """
    others = 0 if unlabelled is None else len(unlabelled)
    sampler = StepSampler(
        len(dataset), batch_size, steps, seed, *part, unlabelled=others, unlabelled_size=unlabelled_size
    )
    both: Any = dataset if unlabelled is None else ConcatDataset([cast(Dataset, dataset), unlabelled])
    return DataLoader(
        Seeded(both, seed), batch_sampler=sampler, num_workers=workers, pin_memory=pin_memory, collate_fn=_batch
    )


def _batch(items: list[Any]) -> list[torch.Tensor]:
    """Images (N, 3, H, W), and labels (L, H, W) of the first L; the others are unlabelled."""
    pairs = [item for item in items if isinstance(item, (tuple, list))]
    return [
        default_collate([*(pair[0] for pair in pairs), *items[len(pairs) :]]),
        default_collate([label for _, label in pairs]),
    ]

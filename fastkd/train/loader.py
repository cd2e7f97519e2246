"""Batches of an endless, shuffled pass over a data set, each sample drawn under its own seed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fastkd.train.evaluation import SegmentationSet


class StepSampler(Sampler):
    """For each step, this process's share of the batch in `parts` lists of (index, number of the sample in the run).

    Sample k is item k mod n of the permutation of epoch k div n; a batch may span two epochs. The order depends on the seed
    alone, not on where the run starts or how many processes and parts share a batch.
    """

    def __init__(
        self, length: int, batch_size: int, steps: range, seed: int, rank: int = 0, world: int = 1, parts: int = 1
    ):
        if length < 1:
            raise ValueError("the training set is empty")
        if batch_size % (world * parts):
            raise ValueError(
                f"train.batch_size {batch_size} cannot be shared by {world} processes with train.accumulate {parts}; "
                f"take a multiple of {world * parts}"
            )
        self.length, self.batch_size, self.steps, self.seed = length, batch_size, steps, seed
        self.rank, self.world, self.parts = rank, world, parts

    def __len__(self) -> int:
        return len(self.steps) * self.parts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, epoch = torch.empty(0), -1
        share = self.batch_size // self.world
        for step in self.steps:
            batch = []
            for place in range(self.rank * share, (self.rank + 1) * share):
                number = step * self.batch_size + place
                if number // self.length != epoch:
                    epoch = number // self.length
                    order = torch.randperm(
                        self.length, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                    )
                batch.append((int(order[number % self.length]), number))
            size = share // self.parts
            yield from (batch[start : start + size] for start in range(0, share, size))


class Seeded(Dataset):
    """Gives item (index, number) with torch's CPU generator seeded by (seed, number), and restores the generator."""

    def __init__(self, dataset: SegmentationSet, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        index, number = key
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(
            self.seed * 1_000_000_007 + number
        )  # not manual_seed: it would reseed the GPU
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
    rank: int = 0,
    world: int = 1,
    parts: int = 1,
    pin_memory: bool = False,
) -> DataLoader:
    """Batches for `steps` of a run, `parts` for each step; batch_size counts all processes and parts."""
    sampler = StepSampler(len(dataset), batch_size, steps, seed, rank, world, parts)
    return DataLoader(Seeded(dataset, seed), batch_sampler=sampler, num_workers=workers, pin_memory=pin_memory)

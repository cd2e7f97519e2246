"""Random calls of the C++ operators (fastkd.ops.OPERATORS): shapes, strides, dtypes, options and contents, some of them
invalid.

    python -m tests.tools.fuzz --minutes 60                   # with the installed library
    python -m tests.tools.sanitize --tool asan --fuzz 60      # under the address and undefined-behaviour sanitizers
    python -m tests.tools.fuzz --seed 123456                  # repeats one case

A case depends only on its seed. A call must return or raise RuntimeError. Its results must have no unwritten element;
inputs must be unchanged; a second call must be bitwise equal; finite inputs of ordinary size must give finite results.
The seed of a failing case is printed, and the exit status is 1; after a crash the seed is in ``--log``.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkd import backends
from fastkd.ops import OPERATORS, Draw, Operator

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LABELS = (torch.uint8, torch.int32, torch.int64)
# Around the kernels' tiles, spans and vectors: 4, 8 and 16 lanes, 64 to 256 pixels, spans of 2048.
SIZES = (1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 255, 257)
# Around the chunks of operators on vectors: k-th smallest, the exponential.
LENGTHS = (1, 2, 100, 65_535, 65_536, 65_537, 200_000)
ROWS = {row.name: row for row in OPERATORS if "cpu" in row.backends and row.name != "isa"}
# Values of an option, by name: ordinary ones, and any.
OPTIONS: dict[str, tuple[tuple, tuple]] = {
    "temperature": ((1.0, 4.0, 0.5), (1.0, 1e-3, 1e6, 1e-30, 1e30)),
    "eps": ((1e-5,), (0.0, 1e-5, 1e-30)),
    "scale": ((1.0, 0.7, 2.0**-12), (1.0, 0.0, -3.0, 1e-30, 1e30)),
    "threshold": ((0.7, 0.0, 1.0, 0.3),) * 2,
    "min_kept": ((0, 0, 1, 10, 1000, 10**9),) * 2,
    "k": ((1, 2, 50, 65_536, 200_000, 200_001, 0, -5),) * 2,
    "ignore_index": ((255, 0, -1),) * 2,
    "align_corners": ((False, True),) * 2,
}


class Fuzzed(Draw):
    """Random sample inputs of one case, from its seed."""

    def __new__(cls, seed: int) -> Fuzzed:
        r = random.Random(seed)
        shape = size = (10**6, 1, 1, 1)
        while shape[0] * shape[1] * shape[2] * shape[3] > 300_000:
            shape = (r.choice((1, 1, 2, 3, 5)), r.choice((*SIZES, 150, 1025, 4096)), r.choice(SIZES), r.choice(SIZES))
        # Labels for thousands of classes would take a sanitizer minutes.
        while size[0] * size[1] > min(40_000, 4_000_000 // shape[1]):
            size = r.choice(SIZES), r.choice((*SIZES, 513, 1030))
        layout = r.choice((torch.contiguous_format, torch.channels_last))
        self = super().__new__(
            cls, shape, shape[2:] if r.random() < 0.2 else size, r.choice(DTYPES), r.choice(LABELS), layout
        )
        self.r, self.g = r, torch.Generator().manual_seed(seed)
        self.tame = r.random() < 0.5  # finite and of ordinary size
        self.made: dict[tuple, Tensor] = {}  # a row's samples request the same tensors repeatedly
        return self

    def map(self, seed: int, spatial: tuple[int, int] | None = None) -> Tensor:
        shape = (*self.shape[:2], *(spatial or self.shape[2:]))
        return self.once(("map", seed, shape), lambda: self.fresh_map(shape, student=seed == 0))

    def fresh_map(self, shape: tuple[int, ...], student: bool) -> Tensor:
        r, dtype = self.r, self.dtype
        if not student and r.random() < 0.4:
            other = r.choice(DTYPES)
            if (dtype == torch.float64) == (other == torch.float64) or r.random() < 0.1:
                dtype = other
        x = torch.randn(shape, generator=self.g, dtype=torch.float64)
        if not self.tame:
            x = x * 10.0 ** r.choice((-40, -10, 0, 2, 5, 12, 30, 300))
            if r.random() < 0.4:
                at = torch.randint(0, x.numel(), (r.randint(1, 5),), generator=self.g)
                x.view(-1)[at] = r.choice((torch.nan, torch.inf, -torch.inf, 1e-320, -0.0, 65504.0))
            if r.random() < 0.1:
                x = x * 0 + r.choice((0.0, 1.0, -torch.inf, 3e4))
        return self.lay_out(x.to(dtype))

    def lay_out(self, x: Tensor) -> Tensor:
        """In the case's memory format, at an odd address or, rarely, with strides that must be refused."""
        kind = self.r.random()
        if kind < 0.02:
            return x.transpose(-1, -2).contiguous().transpose(-1, -2)
        if kind < 0.04:
            return x[:1].expand(x.shape)
        x = x.contiguous(memory_format=self.layout)
        if kind < 0.4:
            pad = self.r.randint(1, 9)
            x = torch.cat([x.new_zeros(pad), x.flatten()])[pad:].view(x.shape) if x.is_contiguous() else x
        return x

    def labels(self, spatial: tuple[int, int] | None = None) -> Tensor:
        shape = (self.shape[0], *(spatial or self.size))
        return self.once(("labels", shape), lambda: self.fresh_labels(shape))

    def fresh_labels(self, shape: tuple[int, ...]) -> Tensor:
        classes, limits = self.shape[1], torch.iinfo(self.label_dtype)
        y = torch.randint(0, min(classes, limits.max + 1), shape, generator=self.g).to(self.label_dtype)
        y[torch.rand(shape, generator=self.g) < self.r.choice((0.0, 0.2, 0.2, 1.0))] = 255
        if self.r.random() < 0.3:  # out of range: ignored, never read out of bounds
            at = torch.randint(0, y.numel(), (3,), generator=self.g)
            y.view(-1)[at] = self.r.choice((limits.max, limits.min, min(classes, limits.max)))
        return y

    def weight(self, *shape: int) -> Tensor:
        return self.once(("weight", shape), lambda: self.fresh_weight(shape))

    def fresh_weight(self, shape: tuple[int, ...]) -> Tensor:
        acc = torch.float64 if self.dtype == torch.float64 else torch.float32
        x = torch.rand(shape, generator=self.g).to(acc)
        if not self.tame and self.r.random() < 0.2:
            x.view(-1)[0] = self.r.choice((torch.nan, torch.inf, -1.0))
        return x

    def mask(self) -> Tensor:
        shape = (self.shape[0], *self.size)
        return self.once(("mask",), lambda: torch.rand(shape, generator=self.g) < self.r.choice((0.0, 0.5, 1.0)))

    def once(self, key: tuple, make) -> Tensor:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]


def arguments(row: Operator) -> list[tuple[str, str]]:
    """(type, name) of each argument of the schema."""
    inside = row.schema.partition("(")[2].rpartition(") ->")[0]
    return [tuple(a.split()[:2]) for a in inside.split(", ")]


def case(row: Operator, d: Fuzzed) -> list[Any]:
    """One of the row's samples with random options; rarely with an argument that must be refused."""
    count = sum(1 for _ in row.samples(Draw()))
    args = list(next(itertools.islice(row.samples(d), d.r.randrange(count), None)))
    for i, (kind, name) in enumerate(arguments(row)):
        if name in OPTIONS:
            args[i] = d.r.choice(OPTIONS[name][not d.tame])
        elif kind == "str" and d.r.random() < 0.003:
            args[i] = "no such word"
        elif isinstance(args[i], Tensor):
            if all(not isinstance(a, Tensor) or a.dim() == 1 for a in args):  # a vector that does not belong to a map
                args[i] = d.weight(d.r.choice(LENGTHS))
            if d.r.random() < 0.02:
                args[i] = spoiled(args[i], d.r)
    return args


def spoiled(x: Tensor, r: random.Random) -> Tensor:
    """One smaller or larger in a dimension, or of another dtype."""
    if x.dim() == 0 or r.random() < 0.3:
        return x.to(r.choice((*DTYPES, *LABELS)))
    d = r.randrange(x.dim())
    if r.random() < 0.5 and x.size(d):
        return x.narrow(d, 1, x.size(d) - 1).contiguous()
    return torch.cat([x, x.new_zeros([1 if i == d else n for i, n in enumerate(x.shape)])], d)


def call(row: Operator, args: list[Any]) -> tuple[Tensor, ...]:
    """The operator's results, or the argument that it writes."""
    args = [a.clone() if "(a!)" in kind else a for a, (kind, _) in zip(args, arguments(row), strict=True)]
    out = getattr(torch.ops.fastkd_cpu, row.name)(*args)
    return (args[0],) if out is None else out if isinstance(out, tuple) else (out,)


def same(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) and (
        a.dtype.is_floating_point <= torch.equal(a.isnan(), b.isnan())
    )


def run_case(seed: int) -> tuple[str, bool]:
    """Runs one case. Returns the operator's name, and whether the call returned (it may also be refused).

    Raises:
        AssertionError: a requirement is violated.
    """
    d = Fuzzed(seed)
    row = d.r.choice(list(ROWS.values()))
    torch.set_num_threads(d.r.choice((1, 2, 3)))
    args = case(row, d)
    inputs = [x for x in args if isinstance(x, Tensor)]
    before = [x.clone() for x in inputs]
    try:
        first = call(row, args)
    except RuntimeError:
        return row.name, False
    second = call(row, args)
    assert all(same(a, b) for a, b in zip(inputs, before, strict=True)), "an input was written to"
    assert all(same(a, b) for a, b in zip(first, second, strict=True)), "a second call gives different bits"
    tame = d.tame and all(not x.is_floating_point() or x.isfinite().all() for x in inputs)
    numbers = [x for x in first if x.is_floating_point() and x.dtype != torch.float16]  # fp16 sums may overflow
    assert not tame or all(x.isfinite().all() for x in numbers), "not finite"
    return row.name, True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--first", type=int, default=0, help="the seed of the first case; they count up from there")
    parser.add_argument("--seed", type=int, help="this case alone")
    parser.add_argument("--log", type=Path, help="a file that always holds the seed that is running")
    args = parser.parse_args()
    assert (reason := backends.why_not("cpu")) is None, reason
    # Fills fresh memory with NaN, so that unwritten elements show.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if args.seed is not None:
        print(run_case(args.seed))
        return 0
    end, seed, failed = time.monotonic() + 60 * args.minutes, args.first, []
    counts = {name: [0, 0] for name in ROWS}
    while time.monotonic() < end:
        if args.log:
            args.log.write_text(f"{seed}\n")
        try:
            name, returned = run_case(seed)
        except AssertionError as error:
            failed.append(seed)
            print(f"seed {seed}: {error}", flush=True)
        else:
            counts[name][not returned] += 1
        seed += 1
    for name, (done, refused) in counts.items():
        print(f"{name:32} {done:8} calls {refused:8} refused")
    print(f"seeds {args.first} to {seed - 1}, {torch.ops.fastkd_cpu.isa()}, {len(failed)} failed {failed[:20]}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())

"""Random calls of the C++ operators: shapes, strides, dtypes, options and contents, some of them wrong.

    python -m tests.tools.fuzz --minutes 60                   # with the library that is built
    python -m tests.tools.sanitize --tool asan --fuzz 60      # the same under the address and undefined-behaviour sanitizers
    python -m tests.tools.fuzz --seed 123456                  # one case again

A case is drawn from its seed alone. What must hold: a call returns or raises RuntimeError; what it returns has no element
that was never written; inputs are unchanged; a second call gives the same bits; finite inputs of ordinary size give
finite results. The seed of a case that fails is printed, and the exit status is 1; a crash leaves it in ``--log``.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from fastkd import backends

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LABELS = (torch.uint8, torch.int32, torch.int64)
# Around the tiles, spans and vectors of the kernels: 4, 8 and 16 lanes, 64 to 256 pixels, spans of 2048.
SIZES = (1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 255, 257)


class Draw:
    """What one case is made of; everything comes from the seed."""

    def __init__(self, seed: int):
        self.r = random.Random(seed)
        self.g = torch.Generator().manual_seed(seed)
        self.tame = self.r.random() < 0.5  # finite and of ordinary size
        self.dtype = self.r.choice(DTYPES)

    def shape(self) -> tuple[int, int, int, int]:
        r = self.r
        while True:
            shape = (r.choice((1, 1, 2, 3, 5)), r.choice((*SIZES, 150, 1025, 4096)), r.choice(SIZES), r.choice(SIZES))
            if shape[0] * shape[1] * shape[2] * shape[3] <= 300_000:
                return shape

    def size(self, classes: int = 1) -> tuple[int, int]:
        """Of the labels; a sanitizer would spend minutes on each that has thousands of classes."""
        while True:
            size = self.r.choice(SIZES), self.r.choice((*SIZES, 513, 1030))
            if size[0] * size[1] <= min(40_000, 4_000_000 // classes):
                return size

    def map(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        r = self.r
        if dtype is None:
            dtype = r.choice(DTYPES) if r.random() < 0.4 else self.dtype
            if (dtype == torch.float64) != (self.dtype == torch.float64) and r.random() < 0.9:
                dtype = self.dtype
        x = torch.randn(shape, generator=self.g, dtype=torch.float64)
        if not self.tame:
            x = x * 10.0 ** r.choice((-40, -10, 0, 2, 5, 12, 30, 300))
            if r.random() < 0.4 and x.numel():
                at = torch.randint(0, x.numel(), (r.randint(1, 5),), generator=self.g)
                x.view(-1)[at] = r.choice((torch.nan, torch.inf, -torch.inf, 1e-320, -0.0, 65504.0))
            if r.random() < 0.1:
                x = x * 0 + r.choice((0.0, 1.0, -torch.inf, 3e4))
        return self.lay_out(x.to(dtype))

    def lay_out(self, x: Tensor) -> Tensor:
        """Dense at an odd address, channels_last, or, seldom, with strides that must be refused."""
        kind = self.r.random()
        if x.dim() != 4:
            return x
        if kind < 0.3:
            x = x.contiguous(memory_format=torch.channels_last)
        elif kind < 0.5:
            pad = self.r.randint(1, 9)
            x = torch.cat([x.new_zeros(pad), x.flatten()])[pad:].view(x.shape)
        elif kind < 0.52:
            x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
        elif kind < 0.54:
            x = x[:1].expand(x.shape)
        return x

    def labels(self, shape: tuple[int, ...], classes: int) -> Tensor:
        dtype = self.r.choice(LABELS)
        y = torch.randint(0, min(classes, 256 if dtype == torch.uint8 else classes), shape, generator=self.g).to(dtype)
        y[torch.rand(shape, generator=self.g) < self.r.choice((0.0, 0.2, 0.2, 1.0))] = 255
        if self.r.random() < 0.3 and y.numel():  # out of range: ignored, never read out of bounds
            y.view(-1)[torch.randint(0, y.numel(), (3,), generator=self.g)] = self.r.choice(
                (torch.iinfo(dtype).max, torch.iinfo(dtype).min, min(classes, torch.iinfo(dtype).max))
            )
        return y

    def acc(self, *maps: Tensor) -> torch.dtype:
        if self.r.random() < 0.02:
            return self.r.choice(DTYPES)
        return torch.float64 if maps[0].dtype == torch.float64 else torch.float32

    def maybe(self, x: Tensor) -> Tensor | None:
        return x if self.r.random() < 0.5 else None

    def weights(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        x = torch.rand(shape, generator=self.g).to(dtype)
        if not self.tame and self.r.random() < 0.2 and x.numel():
            x.view(-1)[0] = self.r.choice((torch.nan, torch.inf, -1.0))
        return x

    def off(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape, or, seldom, another one, which must be refused."""
        if self.r.random() < 0.97 or not shape:
            return shape
        i = self.r.randrange(len(shape))
        return (*shape[:i], max(0, shape[i] + self.r.choice((-1, 1))), *shape[i + 1 :])

    def tau(self) -> float:
        return self.r.choice((1.0, 4.0, 0.5)) if self.tame else self.r.choice((1.0, 1e-3, 1e6, 1e-30, 1e30))


def pair(d: Draw) -> tuple[Tensor, Tensor]:
    shape = d.shape()
    student, teacher = d.map(shape), d.map(d.off(shape))
    if d.r.random() < 0.9 and student.shape == teacher.shape:
        layout = torch.contiguous_format if student.is_contiguous() else torch.channels_last
        if student.is_contiguous(memory_format=layout):
            teacher = teacher.contiguous(memory_format=layout)
    return student, teacher


def nfd(d: Draw, op):
    student, teacher = pair(d)
    dims, eps = d.r.choice(("hw", "nhw", "c", "chw")), 1e-5 if d.tame else d.r.choice((0.0, 1e-5, 1e-30))
    inputs = [student, teacher]
    yield inputs, lambda: op.nfd_forward(student, teacher, dims, eps)
    loss, stats = op.nfd_forward(student, teacher, dims, eps)
    grad = d.map(d.off(tuple(loss.shape)), loss.dtype).contiguous()
    yield [*inputs, grad, stats], lambda: op.nfd_backward(grad, student, teacher, stats, dims)


def cwd(d: Draw, op):
    student, teacher = pair(d)
    tau = d.tau()
    yield [student, teacher], lambda: op.cwd_forward(student, teacher, tau)
    loss, stats = op.cwd_forward(student, teacher, tau)
    grad = d.map(d.off(tuple(loss.shape)), loss.dtype).contiguous()
    yield [student, teacher, grad, stats], lambda: op.cwd_backward(grad, student, teacher, stats, tau)


def kd(d: Draw, op):
    student, teacher = pair(d)
    n, c, h, w = student.shape
    target, weight = d.maybe(d.labels(d.off((n, h, w)), c)), d.maybe(d.weights(d.off((n, h, w)), d.acc(student)))
    tau, per_pixel = d.tau(), d.r.random() < 0.5
    grad = d.map((n, h, w) if per_pixel else (), d.acc(student))
    inputs = [x for x in (student, teacher, target, weight, grad) if x is not None]
    args = (student, teacher, target, weight, tau, 255)
    yield inputs, lambda: op.kd_forward(*args, per_pixel)
    yield inputs, lambda: op.kd_backward(grad, *args)
    yield inputs, lambda: op.kd_with_gradient(*args, 0.5)


def resized_cross_entropy(d: Draw, op):
    logits = d.map(d.shape())
    n, c, _, _ = logits.shape
    size = tuple(logits.shape[2:]) if d.r.random() < 0.2 else d.size(c)
    target = d.labels(d.off((n, *size)), c)
    acc = d.acc(logits)
    args = (
        logits,
        target,
        d.maybe(d.weights(d.off((c,)), acc)),
        d.maybe(d.weights((n, *d.r.choice((size, d.size()))), acc)),
        d.maybe(torch.rand(target.shape, generator=d.g) < 0.5),
        d.r.choice((255, 0, -1)),
        d.r.random() < 0.5,
    )
    inputs = [x for x in args if isinstance(x, Tensor)]
    yield inputs, lambda: op.resized_cross_entropy_gradient(*args)
    per_pixel = d.r.random() < 0.5
    yield inputs, lambda: op.resized_cross_entropy_forward(*args, per_pixel)


def two_maps(d: Draw) -> tuple[Tensor, Tensor]:
    """Student and teacher logits whose sizes may differ."""
    shape = d.shape()
    other = d.shape()
    student = d.map(shape)
    if d.r.random() < 0.5 or shape[0] * shape[1] * other[2] * other[3] > 300_000:
        other = shape
    return student, d.map((*d.off(shape[:2]), *other[2:]))


def resized_kd(d: Draw, op):
    student, teacher = two_maps(d)
    n, c, h, w = student.shape
    size = (h, w) if d.r.random() < 0.2 else d.size(c)
    acc = d.acc(student)
    args = (
        student,
        teacher,
        d.maybe(d.labels(d.off((n, *size)), c)),
        d.maybe(d.weights((n, *d.r.choice((size, d.size()))), acc)),
        *size,
        d.tau(),
        255,
        d.r.random() < 0.5,
    )
    inputs = [x for x in args if isinstance(x, Tensor)]
    yield inputs, lambda: op.resized_kd_gradient(*args)
    per_pixel = d.r.random() < 0.5
    yield inputs, lambda: op.resized_kd_forward(*args, per_pixel)


def rdd(d: Draw, op):
    student, teacher = pair(d)
    aux = d.map(tuple(student.shape))
    if d.r.random() < 0.9:
        layout = torch.contiguous_format if student.is_contiguous() else torch.channels_last
        aux = aux.contiguous(memory_format=layout)
    direction = d.r.choice(("aux_main", "main_aux"))
    yield [teacher, aux], lambda: op.teacher_confidence(teacher, aux, direction)
    yield [student, teacher, aux], lambda: op.kd_with_confidence(student, teacher, aux, direction)


def difficulty_mask(d: Draw, op):
    student, teacher = two_maps(d)
    n, c, _, _ = student.shape
    target = d.labels(d.off((n, *d.size(c))), c)
    args = (
        student,
        teacher,
        target,
        d.r.choice((0.7, 0.0, 1.0, 0.3)),
        d.r.choice((0, 0, 1, 10, 1000, 10**9)),
        d.r.choice(("max", "label")),
        d.r.choice(("xor", "or", "and", "student", "student_only")),
        255,
        d.r.random() < 0.5,
    )
    yield [student, teacher, target], lambda: op.difficulty_mask(*args)


def kth_smallest(d: Draw, op):
    x = d.map((d.r.choice((1, 2, 100, 65_535, 65_536, 65_537, 200_000)),), d.r.choice((torch.float32, torch.float64)))
    k = d.r.choice((1, 2, x.numel() // 2, x.numel(), x.numel() + 1, 0, -5))
    yield [x], lambda: op.kth_smallest(x, k)


FAMILIES = (nfd, cwd, kd, resized_cross_entropy, resized_kd, rdd, difficulty_mask, kth_smallest)


def same(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) and (
        a.dtype.is_floating_point <= torch.equal(a.isnan(), b.isnan())
    )


def run_case(seed: int) -> tuple[str, int, int]:
    """One case; the name of its family, and how many calls returned and were refused.

    Raises:
        AssertionError: what must hold does not.
    """
    d = Draw(seed)
    family = d.r.choice(FAMILIES)
    torch.set_num_threads(d.r.choice((1, 2, 3)))
    done = refused = 0
    calls = family(d, torch.ops.fastkd_cpu)
    while True:
        try:
            inputs, call = next(calls)
        except StopIteration:
            return family.__name__, done, refused
        except RuntimeError:  # the generator's own forward was refused
            return family.__name__, done, refused + 1
        before = [x.clone() for x in inputs]
        try:
            first = call()
        except RuntimeError:
            refused += 1
            continue
        done += 1
        first = first if isinstance(first, tuple) else (first,)
        second = call()
        second = second if isinstance(second, tuple) else (second,)
        assert all(same(a, b) for a, b in zip(inputs, before, strict=True)), "an input was written to"
        assert all(same(a, b) for a, b in zip(first, second, strict=True)), "a second call gives other bits"
        tame = d.tame and all(not x.is_floating_point() or x.isfinite().all() for x in inputs)
        assert not tame or all(not x.is_floating_point() or x.isfinite().all() for x in first), "not finite"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--first", type=int, default=0, help="the seed of the first case; they count up from there")
    parser.add_argument("--seed", type=int, help="this case alone")
    parser.add_argument("--log", type=Path, help="a file that always holds the seed that is running")
    args = parser.parse_args()
    assert (reason := backends.why_not("cpu")) is None, reason
    # Fresh memory is NaN, so that what is never written shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if args.seed is not None:
        print(run_case(args.seed))
        return 0
    end, seed, failed = time.monotonic() + 60 * args.minutes, args.first, []
    counts: dict[str, list[int]] = {f.__name__: [0, 0, 0] for f in FAMILIES}
    while time.monotonic() < end:
        if args.log:
            args.log.write_text(f"{seed}\n")
        try:
            name, done, refused = run_case(seed)
        except AssertionError as error:
            failed.append(seed)
            print(f"seed {seed}: {error}", flush=True)
        else:
            counts[name] = [a + b for a, b in zip(counts[name], (1, done, refused), strict=True)]
        seed += 1
    for name, (cases, done, refused) in counts.items():
        print(f"{name:24} {cases:8} cases {done:8} calls {refused:8} refused")
    print(f"seeds {args.first} to {seed - 1}, {torch.ops.fastkd_cpu.isa()}, {len(failed)} failed {failed[:20]}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())

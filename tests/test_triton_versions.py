"""Every supported Triton compiles every kernel in every combination of optional arguments and label dtypes, for sm_90.

`make test-all` tests the versions in ``FASTKD_TRITONS``: folders separated as in PATH, each with a Triton (``pip
install --target FOLDER --no-deps triton==VERSION``). CI tests those of the oldest and the newest torch. For one
version:

    python -m tests.test_triton_versions [SHARE OF]
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels cannot be compiled in the interpreter", allow_module_level=True)

import triton
from fastkd.kernels import kd_sigmoid, resized_kd_sigmoid

from .compilation import (
    F16,
    F32,
    F64,
    I32,
    I64,
    NCHW,
    NHWC,
    U8,
    run_binary,
    run_cross_entropy,
    run_dice,
    run_difficulty,
    run_kd,
    run_resized_kd,
    run_shaped,
    stand_in,
)

TRITONS = ["", *filter(None, os.environ.get("FASTKD_TRITONS", "").split(os.pathsep))]  # "": the installed one


def combinations() -> list[Callable[[], None]]:
    """Small problems in every combination of optional arguments and label dtypes."""
    shape, size = (2, 5, 6, 7), (11, 15)
    out: list[Callable[[], None]] = []
    for label, class_weight, weight, selected in itertools.product(
        (U8, I32, I64), (False, True), (None, (11, 15), (3, 4)), (None, "bool", "lse")
    ):
        options = (label, class_weight, weight, selected, False)
        for forward in (False, True) if label == U8 else (False,):
            out.append(lambda o=options, f=forward: run_cross_entropy(shape, size, NCHW, F32, *o, f))
    for label, weight, teacher in itertools.product((None, U8, I32, I64), (False, True), ((6, 7), (9, 4))):
        options = (NCHW, F32, label, weight)
        for forward in (False, True) if label == U8 else (False,):
            out.append(lambda t=teacher, o=options, f=forward: run_resized_kd(shape, t, size, *o, f))
    for label, weight in itertools.product((None, U8, I32, I64), (False, True)):
        out.append(lambda o=(label, weight): run_kd(shape, NCHW, F32, F32, *o))
    for label, confidence, min_kept, lse in itertools.product((U8, I32, I64), ("max", "label"), (0, 9), (False, True)):
        options = (NCHW, F32, label, confidence, min_kept, lse)
        out.append(lambda o=options: run_difficulty(shape, size, *o))
    of_label = itertools.cycle((U8, I32, I64))
    for options, class_weight, weight, forward in itertools.product(
        ((0.1, 0.0), (0.0, 2.0)), (False, True), (None, (3, 4)), (False, True)
    ):
        args = (NCHW, F32, next(of_label), options, class_weight, weight, False, forward)
        out.append(lambda a=args: run_shaped(shape, size, *a))
    for square, columns, align, backward in itertools.product((False, True), (3, 4, 5), (False, True), (False, True)):
        args = (NCHW, F32, next(of_label), square, columns, align, backward)
        out.append(lambda a=args: run_dice(shape, size, *a))
    for pos_weight, weight, forward in itertools.product((False, True), (None, (1, 3, 4), (5, 11, 15)), (False, True)):
        args = (NCHW, F32, next(of_label), pos_weight, weight, forward)
        out.append(lambda a=args: run_binary(shape, size, *a))
    for labelled, weight, teacher, forward in itertools.product(
        (False, True), (False, True), ((6, 7), (9, 4)), (False, True)
    ):
        args = (NCHW, F32, next(of_label) if labelled else None, weight, forward, resized_kd_sigmoid)
        out.append(lambda t=teacher, a=args: run_resized_kd(shape, t, size, *a))
        args = (NCHW, F32, F32, next(of_label) if labelled else None, weight, "mean", kd_sigmoid)
        out.append(lambda a=args: run_kd(shape, *a))
    # The compiler specialises on a size of 1.
    for one, to, dtype in (((1, 1, 1, 1), (1, 1), F32), ((1, 2, 1, 1), (1, 9), F64), ((3, 1, 4, 5), (4, 5), F16)):
        for options in ((0.1, 0.0), (0.0, 2.0)):
            out.append(lambda o=one, t=to, d=dtype, p=options: run_shaped(o, t, NHWC, d, U8, p, True))
        for backward in (False, True):
            out.append(lambda o=one, t=to, d=dtype, b=backward: run_dice(o, t, NHWC, d, U8, b, 5, b, b))
        out.append(lambda o=one, t=to, d=dtype: run_binary(o, t, NHWC, d, U8, True, (1, 1, 1)))
        out.append(
            lambda o=one, t=to, d=dtype: run_resized_kd(o, (1, 1), t, NHWC, d, U8, True, module=resized_kd_sigmoid)
        )
        out.append(lambda o=one, d=dtype: run_kd(o, NHWC, d, d, U8, True, "mean", kd_sigmoid))
    for dtype in (F64, F16):
        out.append(lambda d=dtype: run_cross_entropy(shape, size, NHWC, d, U8, True, size))
        out.append(lambda d=dtype: run_resized_kd(shape, (6, 7), size, NHWC, d, U8, True))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("folder", TRITONS)
def test_every_combination_compiles(folder):
    """Each torch version has its own Triton: each compiles every kernel with any arguments."""
    command = [sys.executable, "-m", "tests.test_triton_versions"]
    root = Path(__file__).parents[1]
    paths = os.pathsep.join(filter(None, (folder, str(root))))
    run = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": paths}, text=True, capture_output=True)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    assert folder in run.stdout


def compile_combinations(share: int, of: int) -> int:
    """Compiles every ``of``-th combination from ``share`` on; returns the number of kernels."""
    found = stand_in("sm_90")
    for run in combinations()[share::of]:
        run()
    return len(found)


def main() -> None:
    workers = min(os.cpu_count() or 1, 8)
    shares = [(i, workers) for i in range(workers)]
    if len(sys.argv) > 2:
        shares = [(int(sys.argv[1]), int(sys.argv[2]))]
    start = time.perf_counter()
    with ProcessPoolExecutor(len(shares), multiprocessing.get_context("spawn")) as pool:
        count = sum(pool.map(compile_combinations, *zip(*shares, strict=True)))
    seconds = time.perf_counter() - start
    print(f"Triton {triton.__version__} of {Path(triton.__file__).parents[1]}: {count} kernels in {seconds:.0f} s")


if __name__ == "__main__":
    main()

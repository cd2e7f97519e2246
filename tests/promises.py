"""What is promised, and what was run by hand: `python -m tests.tools.pages` makes docs/promises.md of both.

A test that checks a promise carries its name, `@pytest.mark.promise("name")`. tests/test_promises.py fails if a promise has no
test, a name has no promise, or the page is out of date.
"""

from __future__ import annotations

from typing import NamedTuple

# Section -> name -> what is promised.
PROMISES = {
    "Numbers": {
        "error-bounds": (
            "Errors: loss 1e-6, gradient 2e-6 in fp32, 2⁻⁸ in bf16 and 2⁻¹¹ in fp16 (the rounding of the result), "
            "1e-12 in fp64"
        ),
        "examples-differ": "The property tests draw every option, in different combinations",
        "budget": (
            "At most twice plain PyTorch's error plus eight roundings, for any shape, layout, dtype, offset and option"
        ),
        "nfd-offset": "NFD where the mean is 10⁶ standard deviations: gradient within 0.1 %",
        "finite": (
            "Finite wherever plain PyTorch is, and as accurate: magnitudes from 10⁻³⁰ to 10¹⁵, subnormals, flat planes, one-hot "
            "teachers, 1 to 4096 channels, one pixel"
        ),
        "nfd-flat": "NFD of a channel without variance is between 0 and 4, whatever its height and `eps`",
        "cwd-flat": "CWD of flat maps is uniform at any height",
        "masked-classes": "Classes masked with −∞ or with the lowest finite number have probability 0, interpolated or not",
        "nan": "NaN and infinity reach only the results that depend on them",
        "ignored-pixels": (
            "Logits, weights and out-of-range labels of ignored pixels change nothing and cause no read out of bounds"
        ),
        "nothing-counted": "Nothing counted: 0, and a gradient of 0",
        "equal-maps": "Student equal to teacher: 0, and a gradient of 0 (NFD and CWD: at rounding)",
        "mask": (
            "RDD's mask equals the reference's, except where a confidence is a rounding from the threshold; the k-th "
            "smallest is exact"
        ),
        "fp16-range": (
            "fp16: a gradient stays in range whatever the weights, the temperature and the number of pixels; "
            "GradScaler's factor passes through exactly"
        ),
        "half-precision": "Every fp16 and bf16 number is read exactly and written as torch rounds it, on every instruction set",
        "large": "More than 2³¹ elements or label pixels (slow; needs 7 to 21 GiB)",
    },
    "Reproducibility": {
        "threads": "Same input, same backend, same machine: the same bits, for any number of threads",
        "sequences": "The same in any sequence of calls, backends, thread counts and concurrent callers",
        "deterministic": "Works under `torch.use_deterministic_algorithms(True)`",
        "processes": "Works in spawned and forked processes",
        "instruction-sets": "Instruction sets differ by roundings alone",
        "triton-bits": "Triton: the same bits on every run",
    },
    "Memory, synchronisation, threads": {
        "memory-maps": "NFD, KD, CWD: beyond the gradient, less than 1 % of the inputs",
        "memory-labels": "Label resolution: beyond the gradient at logit size, at most 8 bytes a label pixel, 16 in RDD's TSE",
        "sanitizers": ("C++ kernels: no out-of-bounds or uninitialised read, no undefined behaviour, no race"),
        "no-leak": "No memory is kept after a step",
        "inputs": "Inputs are never written to, even if student and teacher share memory",
        "overwritten": "An input overwritten before the backward is an error",
        "gpu-queue": "No step waits for the GPU; steps can be captured in a CUDA graph; any stream and device",
        "callers": "Calls from many threads at once; `use_backend` holds in its own thread",
    },
    "Inside torch": {
        "opcheck": "Every operator passes `torch.library.opcheck`",
        "one-graph": "`torch.compile(fullgraph=True)`: one graph for all batches, and with `dynamic=True` for all sizes",
        "backend-graph": "A forced backend makes another graph, and can be forced inside one",
        "export": "`torch.export` of every module; also saved to a file, except `RDDLoss`",
        "backward-again": "Activation checkpointing; a second backward over a kept graph, compiled or not",
        "ddp": "Distributed data parallel gives the mean of the gradients",
        "autocast": "Autocast changes nothing; a step under it trains",
        "rescale": (
            "A gradient whose upstream factor is 1 is not touched again; `loss_weight` reaches the kernel, and a "
            "power of two scales every bit"
        ),
        "copies": "Modules can be copied, pickled and saved",
        "double-backward": "Double backward and `torch.func` are refused by the kernels, and work on the reference",
    },
    "Errors": {
        "value-error": (
            "`ValueError`: wrong rank or shape, other devices, an unknown word, a number out of range or not finite, "
            "a teacher that requires grad"
        ),
        "type-error": "`TypeError`: not a tensor, integer logits, labels that are no integers",
        "index-error": "`IndexError`: a label outside [0, C) that is not `ignore_index` (CPU, eager)",
        "backend-error": "`BackendError`: a forced backend that cannot run, with the reason",
        "runtime-error": (
            "`RuntimeError`: double backward, `torch.func`; an operator called directly with tensors it cannot take"
        ),
    },
    "Package": {
        "stable-abi": (
            "One library for every Python and for torch from 2.10 on: it uses torch's stable C functions only, and "
            "nothing of Python"
        ),
        "wide-instructions": "AVX2 and AVX-512 instructions occur only in functions that are chosen at run time",
        "pure-python": (
            "Without a compiler, or without torch at build time: a pure-Python package that says once which kernels "
            "it lacks"
        ),
        "wheel": "`make wheel`: a pure wheel and one tagged `py3-none-manylinux…`, with the files they should have (slow)",
        "sdist": "The source archive builds, and the wheel passes the core's tests with torch alone (slow)",
        "hub": "Two builds for the Kernel Hub run in one process, each with operators of its own (compiled ones slow)",
        "light-import": "`import fastkd` imports neither the trainer nor Triton",
    },
    "Files from strangers": {
        "no-code": "A checkpoint, weights file or YAML runs no code",
        "no-fetch": "A checkpoint causes no download",
        "foreign": "A damaged or foreign file is an error that names it",
        "yaml-bomb": "A YAML file cannot unfold into all memory",
        "data-roots": "Lists of a data set stay inside its folder; damaged images and labels are named",
        "whole-checkpoints": "A checkpoint is whole or absent",
    },
}


class Run(NamedTuple):
    """A check that is run by hand, since it takes minutes or more."""

    check: str
    command: str
    date: str
    commit: str
    """Of the sources that were checked, where it was noted; else of the row."""
    result: str


BY_HAND = (
    Run(
        "Mutants",
        "python -m tests.tools.mutants",
        "2026-11-26",
        "1dccc08",
        "Seed 20. C++, Triton, functions and reference, a sample of 217: 184 fail a test, 31 are equivalent (the "
        "script says why), 2 do not compile. CUDA on the emulated GPU, a sample of 32: 29 fail a test, 2 change "
        "speed only, 1 fails `tests/test_cuda_build.py`.",
    ),
    Run(
        "Address and undefined-behaviour sanitizers, fresh memory filled with NaN",
        "python -m tests.tools.sanitize --tool asan",
        "2026-11-26",
        "34a769d",
        "Core tests, AVX-512: 1832 passed; five that compare instruction sets failed for want of others, and are left out since.",
    ),
    Run(
        "Fuzzing under the same sanitizers",
        "python -m tests.tools.sanitize --tool asan --fuzz 80",
        "2026-11-26",
        "f44449e",
        "AVX-512, seeds 0 to 40385 and, after a change at label resolution, 100000 to 107144: nothing found.",
    ),
    Run(
        "Races",
        "python -m tests.tools.sanitize --tool tsan",
        "2026-11-26",
        "9b3c806",
        "Core tests, AVX-512, three threads: 1832 passed.",
    ),
    Run(
        "Uninitialised memory",
        "python -m tests.tools.sanitize --tool valgrind",
        "2026-11-25",
        "024bf31",
        "All kernels, 8 cases, AVX2: nothing found.",
    ),
    Run(
        "Property tests with 400 or 1000 examples",
        "python -m pytest --hypothesis-profile=thorough tests/test_kd.py",
        "2026-11-26",
        "f44449e",
        "This file and those of `nfd`, `cwd`, `rdd`, `rdd_kernels`, `resized`, `resized_kernels` and "
        "`adversarial`, twice: passed.",
    ),
    Run(
        "Versions: torch 2.10.0 and 2.12.1 with Python 3.11, torch 2.14.1 with Python 3.10 and 3.13",
        "python -m tests.tools.versions",
        "2026-11-26",
        "f44449e",
        "One library, built with 2.14.1: 1029 core tests passed with each torch, 1027 with each Python.",
    ),
    Run(
        "The manylinux wheel of `make wheel`, built with torch 2.14.1",
        "python -m pytest $(python -m tests.suites core)",
        "2026-11-26",
        "c66dcc0",
        "Python 3.10 with torch 2.10.0: all core tests passed but 6, `torch.compile` in fp16, mended in 71b9d5f. Python "
        "3.13 with torch 2.15.0: `test_functional` and `test_losses` passed.",
    ),
    Run(
        "The pure wheel, Python 3.13 with torch 2.15.0",
        "FASTKD_BUILD=0 python -m pytest --hypothesis-profile=interpreter $(python -m tests.suites core)",
        "2026-11-26",
        "881b8d5",
        "493 passed, the tests of kernels skipped with the reason. Half of `test_compile`, `test_integration` and four "
        "files of the losses at label resolution were not run.",
    ),
    Run(
        "Package",
        "python -m pytest -m slow tests/test_packaging.py",
        "2026-11-25",
        "211048f",
        "3 passed.",
    ),
    Run(
        "GPU tests on one H100, torch 2.11, Triton 3.6",
        "python benchmarks/gpu_check.py --out DIR",
        "2026-11-26",
        "36b6442",
        "Triton: 863 passed, 19 failed: 12 of RDD's TSE, which Triton 3.6 did not compile, 4 of equal maps with a "
        "gradient of 1e-9, 3 of a memory test. CUDA C++: 346 passed, 1 failed in the build of the emulation. All "
        "mended; nothing newer has run on a GPU.",
    ),
    Run(
        "More than 2³¹ elements",
        "python -m pytest -m slow tests/test_adversarial.py",
        "2026-11-26",
        "f44449e",
        "NFD, CWD, KD, cross-entropy, RDD's mask with and without `min_kept`: passed.",
    ),
)

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
            "Relative error: loss 1e-6; gradient 2e-6 in fp32, 2⁻⁸ in bf16, 2⁻¹¹ in fp16 (the rounding of the result); "
            "1e-12 in fp64"
        ),
        "examples-differ": "Property tests draw every option, in different combinations",
        "budget": (
            "Error at most twice plain PyTorch's plus eight roundings, for any shape, layout, dtype, offset and option"
        ),
        "nfd-offset": "NFD with a mean of 10⁶ standard deviations: gradient within 0.1 %",
        "finite": (
            "Finite wherever plain PyTorch is, and as accurate: magnitudes from 10⁻³⁰ to 10¹⁵, subnormals, flat planes, one-hot "
            "teachers, 1 to 4096 channels, one pixel"
        ),
        "nfd-flat": "NFD of a constant channel is between 0 and 4, for any constant and `eps`",
        "cwd-flat": "CWD of constant maps: uniform distributions, for any constant",
        "masked-classes": "Classes masked with −∞ or the lowest finite number have probability 0, interpolated or not",
        "nan": "NaN and infinity reach only the results that depend on them",
        "ignored-pixels": (
            "Logits, weights and out-of-range labels of ignored pixels have no effect and cause no out-of-bounds read"
        ),
        "nothing-counted": "If no pixel counts, loss and gradient are 0",
        "equal-maps": "If student equals teacher, loss and gradient are 0 (NFD and CWD: up to rounding)",
        "mask": (
            "RDD's mask equals the reference's, except for confidences within a rounding of the threshold; the k-th "
            "smallest is exact"
        ),
        "fp16-range": (
            "fp16 gradients stay in range for any weights, temperature and number of pixels; GradScaler's factor is "
            "applied exactly"
        ),
        "half-precision": "Every fp16 and bf16 number is read exactly and rounded as in torch, on every instruction set",
        "large": "More than 2³¹ elements or label pixels (slow; needs 7 to 21 GiB)",
    },
    "Reproducibility": {
        "threads": "Bitwise reproducible on the same backend and machine, for any number of threads",
        "sequences": "Also in any sequence of calls, backends, thread counts and concurrent callers",
        "deterministic": "Works under `torch.use_deterministic_algorithms(True)`",
        "processes": "Works in spawned and forked processes",
        "instruction-sets": "Instruction sets differ only by roundings",
        "triton-bits": "Triton: bitwise the same on every run",
    },
    "Memory, synchronisation, threads": {
        "memory-maps": "NFD, KD, CWD: extra memory beyond the gradient is less than 1 % of the inputs",
        "memory-labels": "At label resolution: beyond the gradient at logit size, at most 8 bytes a label pixel, 16 in RDD's TSE",
        "sanitizers": "C++ kernels: no out-of-bounds or uninitialised read, no undefined behaviour, no race",
        "no-leak": "No memory is kept after a step",
        "inputs": "Inputs are never modified, even if student and teacher share memory",
        "overwritten": "An input overwritten before the backward is an error",
        "gpu-queue": "No synchronisation with the GPU; CUDA graph capture; any stream and device",
        "callers": "Concurrent calls from many threads; `use_backend` applies to its own thread",
    },
    "Inside torch": {
        "opcheck": "Every operator passes `torch.library.opcheck`",
        "one-graph": "`torch.compile(fullgraph=True)`: one graph for all batches, and with `dynamic=True` for all sizes",
        "backend-graph": "Forcing a backend recompiles; forcing inside compiled code works",
        "export": "`torch.export` of every module; also saved to a file, except `RDDLoss`",
        "backward-again": "Activation checkpointing; a second backward over a kept graph, compiled or not",
        "ddp": "Distributed data parallel averages the gradients",
        "autocast": "Autocast does not change results; training under it works",
        "rescale": (
            "If the upstream gradient is 1, the gradient is not rewritten; `loss_weight` is applied in the kernel, exactly "
            "for powers of two"
        ),
        "copies": "Modules can be copied, pickled and saved",
        "double-backward": "Kernels refuse double backward and `torch.func`; the reference supports both",
    },
    "Errors": {
        "value-error": (
            "`ValueError`: wrong rank or shape, different devices, an unknown option, a number out of range or not finite, "
            "a teacher that requires grad"
        ),
        "type-error": "`TypeError`: not a tensor, integer logits, non-integer labels",
        "index-error": "`IndexError`: a label outside [0, C) that is not `ignore_index` (CPU, eager)",
        "backend-error": "`BackendError`: a forced backend that cannot run, with the reason",
        "runtime-error": (
            "`RuntimeError`: double backward, `torch.func`; an operator called directly with tensors it cannot take"
        ),
    },
    "Package": {
        "stable-abi": (
            "One library for every Python and torch ≥ 2.10: it uses only torch's stable C functions, and nothing of Python"
        ),
        "wide-instructions": "AVX2 and AVX-512 instructions occur only in functions selected at run time",
        "pure-python": (
            "Without a compiler, or without torch at build time: a pure-Python package that warns once about missing "
            "kernels"
        ),
        "wheel": "`make wheel`: a pure wheel and one tagged `py3-none-manylinux…`, with the expected files (slow)",
        "sdist": "The source archive builds, and the wheel passes the core's tests with torch alone (slow)",
        "hub": "Two Kernel Hub builds run in one process, each with its own operators (compiled ones slow)",
        "light-import": "`import fastkd` imports neither the trainer nor Triton",
    },
    "Untrusted files": {
        "no-code": "A checkpoint, weights file or YAML runs no code",
        "no-fetch": "A checkpoint causes no download",
        "foreign": "A damaged or foreign file is an error that names it",
        "yaml-bomb": "A YAML file cannot exhaust memory by expanding",
        "data-roots": "A data set's lists stay inside its folder; damaged images and labels are named",
        "whole-checkpoints": "A checkpoint is complete or absent",
    },
}


class Run(NamedTuple):
    """A check that is run by hand, since it takes minutes or more."""

    check: str
    command: str
    date: str
    commit: str
    """Of the checked sources, if noted; otherwise of this row."""
    result: str


BY_HAND = (
    Run(
        "Everything, slow checks included",
        "make test-all",
        "2026-11-27",
        "aae78f6",
        "Two cores, 28 minutes: 3382 passed; Triton's interpreter 567; emulated GPU 1318; more than 2³¹ elements 6; "
        "every combination of arguments with Triton 3.6.0, 3.7.1 and 3.8.0; fuzzing (41176 seeds) and both sanitizers: "
        "nothing found.",
    ),
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
        "2026-11-27",
        "aae78f6",
        "Core tests, AVX-512: 1835 passed.",
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
        "2026-11-27",
        "aae78f6",
        "Core tests, AVX-512, three threads: 1835 passed.",
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
        "`adversarial`, twice each: passed.",
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
        "python -m tests.tools.versions newest --wheel W --keep",
        "2026-11-27",
        "1e9e8d0",
        "Python 3.13 with torch 2.15.0 and Python 3.10 with torch 2.10.0: 1953 core tests passed with each, 12 skipped.",
    ),
    Run(
        "The pure wheel",
        "python -m tests.tools.versions newest --wheel W --keep",
        "2026-11-27",
        "1e9e8d0",
        "Python 3.13 with torch 2.15.0 and Python 3.10 with torch 2.10.0: 603 core tests passed with each; the 1362 of "
        "kernels skipped.",
    ),
    Run(
        "The manylinux wheel with CUDA for sm_90, built with nvcc 13.0 and torch 2.14.1",
        "FASTKD_CUDA=1 FASTKD_CUDA_ARCHS=90 make wheel",
        "2026-11-27",
        "1e9e8d0",
        "Contains no library of torch or CUDA. Without a GPU, Python 3.10 with torch 2.10.0 loads it, with a kernel for "
        "every operator.",
    ),
    Run(
        "Package",
        "python -m pytest -m slow tests/test_packaging.py",
        "2026-11-25",
        "211048f",
        "3 passed.",
    ),
    Run(
        "Every combination of optional arguments in Triton 3.6.0, 3.7.1 and 3.8.0, sm_90",
        "python -m tests.test_triton_versions",
        "2026-11-27",
        "aae78f6",
        "All losses: all compiled.",
    ),
    Run(
        "GPU tests on one H100, torch 2.11, Triton 3.6",
        "the pytest command of benchmarks/gpu_check.py",
        "2026-11-27",
        "d2478b8",
        "1232 passed, 34 skipped, 8 failed: 4 whose bound was below the rounding of fp16, 2 of one bit between KD's loss "
        "with and without gradient in Triton, 2 of a memory limit in RDD's TSE. All mended. Of the same tests at 38e7138, "
        "with the kernels changed since, the first 43 % of ten files passed before the time was up.",
    ),
    Run(
        "More than 2³¹ elements",
        "python -m pytest -m slow tests/test_adversarial.py",
        "2026-11-26",
        "f44449e",
        "NFD, CWD, KD, cross-entropy, RDD's mask with and without `min_kept`: passed.",
    ),
)

"""Which test files make up which run. `make test` and the tools take them from here:

python -m tests.suites interpreted
"""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parent

# One file an operator family; each runs on whatever backend the process has (tests/support.py).
FAMILIES = (
    "nfd", "kd", "kd_sigmoid", "cwd", "resized", "resized_kernels", "resized_shaped_cross_entropy", "resized_dice",
    "resized_binary_cross_entropy", "rdd", "rdd_kernels",
)  # fmt: skip
SUITES = {
    # Every operator on this machine's kernels.
    "operators": ("operators", "autograd", "csrc", *FAMILIES),
    # TRITON_INTERPRET=1: Triton's kernels in its interpreter, on CPU tensors.
    "interpreted": (
        "triton", "operators", "kd_sigmoid", "resized_kernels", "resized_shaped_cross_entropy", "resized_dice",
        "resized_binary_cross_entropy", "rdd_kernels",
    ),
    # FASTKD_CUDA_EMULATION=library: CUDA C++ on the emulated GPU (tests/emulation.py).
    "emulated": (
        "cuda_plan", "operators", "autograd", "nfd", "kd", "kd_sigmoid", "resized", "resized_kernels",
        "resized_shaped_cross_entropy", "resized_dice", "resized_binary_cross_entropy", "rdd_kernels", "ranks",
    ),
    # What needs nothing but torch and the library: neither the trainer, nor a compiler, nor Triton.
    "core": (
        "adversarial", "autograd", "backends", "compile", "csrc", "functional", "integration", "losses", "operators",
        *FAMILIES,
    ),
}  # fmt: skip


def files(suite: str) -> list[str]:
    return [f"tests/test_{name}.py" for name in SUITES[suite]]


if __name__ == "__main__":
    print(*files(sys.argv[1]))

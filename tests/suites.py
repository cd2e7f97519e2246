"""Which test files belong to which run, for `make test` and the tools:

python -m tests.suites interpreted
"""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parent

# One file per operator family; each runs on the backend of the process (tests/support.py).
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
    # Needs only torch and the library: no trainer, compiler or Triton.
    "core": (
        "adversarial", "autograd", "backends", "compile", "csrc", "functional", "integration", "losses", "operators",
        *FAMILIES,
    ),
}  # fmt: skip


def files(suite: str) -> list[str]:
    return [f"tests/test_{name}.py" for name in SUITES[suite]]


if __name__ == "__main__":
    print(*files(sys.argv[1]))

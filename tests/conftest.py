"""Every test sees fresh memory filled with NaN, so that an element nobody writes cannot pass."""

import gc
import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture.engine import ConjectureRunner

settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=30, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", settings.get_profile("default"), derandomize=False, max_examples=1000)
# Triton's interpreter runs a kernel's every operation in NumPy, program by program; the emulated GPU runs thread by thread.
settings.register_profile("interpreter", settings.get_profile("default"), max_examples=8)
settings.register_profile("quick", settings.get_profile("default"), max_examples=10)  # benchmarks/gpu_check.py
# Hypothesis would make most examples by copying parts of earlier ones; each is to be drawn anew, so that 30 of them meet
# most of the options (test_promises.py::test_examples_differ notices where a later version has another name for this).
ConjectureRunner.generate_mutations_from = lambda self, data: None
slow = os.environ.get("TRITON_INTERPRET") == "1" or "FASTKD_CUDA_EMULATION" in os.environ
settings.load_profile("interpreter" if slow else "default")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; what is about threads sets their number itself
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


def pytest_configure(config):
    config.addinivalue_line("markers", "promise(name): checks what tests/promises.py promises under that name")


def pytest_collection_finish():
    gc.freeze()  # modules and tests, half a million objects: each full collection of a test would go through them


def pytest_make_parametrize_id(config, val, argname):
    """What decides a test is in its ID: dtypes, layouts, sizes and classes too, which pytest would number."""
    if isinstance(val, torch.dtype | torch.memory_format):
        return str(val).removeprefix("torch.")
    if isinstance(val, type) or (callable(val) and getattr(val, "__name__", "<lambda>") != "<lambda>"):
        return val.__name__
    written = str(val)
    plain = isinstance(val, tuple | list | dict) and len(written) <= 60 and " at 0x" not in written
    return written.replace("torch.", "") if plain else None


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)

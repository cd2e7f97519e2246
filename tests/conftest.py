"""Fills fresh memory with NaN in every test, so that an unwritten element fails it."""

import gc
import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture.engine import ConjectureRunner

from . import interpreter

settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=30, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", settings.get_profile("default"), derandomize=False, max_examples=1000)
# Triton's interpreter runs every operation of a kernel in NumPy, one program at a time; the emulated GPU runs one
# thread at a time.
settings.register_profile("interpreter", settings.get_profile("default"), max_examples=8)
settings.register_profile("quick", settings.get_profile("default"), max_examples=10)  # benchmarks/gpu_check.py
# By default Hypothesis creates most examples by copying parts of earlier ones. Drawing each anew makes 30 of them cover
# most options (test_promises.py::test_examples_differ fails if a later version renames this).
ConjectureRunner.generate_mutations_from = lambda self, data: None
slow = os.environ.get("TRITON_INTERPRET") == "1" or "FASTKD_CUDA_EMULATION" in os.environ
settings.load_profile("interpreter" if slow else "default")
if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.patch()
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; thread tests set the number themselves
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for processes started by tests


def pytest_configure(config):
    config.addinivalue_line("markers", "promise(name): checks what tests/promises.py promises under that name")


def pytest_collection_finish():
    gc.freeze()  # half a million objects of modules and tests, which each full collection would traverse


def pytest_make_parametrize_id(config, val, argname):
    """Puts dtypes, layouts, sizes and classes into test IDs; pytest would number them."""
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

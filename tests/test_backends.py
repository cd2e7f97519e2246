"""Selecting, forcing and describing backends; a light import; a complete build."""

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import fastkd
from fastkd import backends

from . import test_gpu
from .support import needs_cpu

CUDA = Path(fastkd.__file__).with_name("_cuda.so")
S, T = torch.randn(2, 2, 4, 6, 6)


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, check=False
    )


@pytest.mark.skipif(os.environ.get("FASTKD_BUILD") == "0", reason="FASTKD_BUILD=0: built without the C++ kernels")
def test_cpu_kernels_are_built():
    """Other tests skip without the kernels, so this one must fail."""
    assert backends.why_not("cpu") is None


@pytest.mark.promise("stable-abi")
@pytest.mark.skipif(not (CUDA.is_file() and torch.version.cuda), reason="no CUDA kernels, or torch is not a CUDA build")
def test_cuda_library_loads_without_a_gpu():
    """The library of any CUDA version loads into this torch and has a kernel for every operator."""
    code = f"""
import torch
from fastkd import backends
torch.ops.load_library({str(CUDA)!r})
backends.define("cuda")
operators = [f"fastkd_cuda::{{operator.name}}" for operator in backends.OPERATORS if "cuda" in operator.backends]
print(len(operators), [name for name in operators if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")])
"""
    out = python(code)
    count, missing = out.stdout.split(maxsplit=1)
    assert (int(count) > 20, missing.strip()) == (True, "[]"), out.stderr


@pytest.mark.promise("light-import")
def test_import_is_light():
    out = python(
        "import sys, fastkd\n"
        "heavy = {'triton', 'fastkd.kernels', 'fastkd.train', 'torchvision', 'accelerate', 'torch._dynamo'} & set(sys.modules)\n"
        "print(sorted(heavy), [k for k in fastkd.backends._why_not])"
    )
    assert out.stdout.strip() == "[] []", out.stderr


def test_public_names():
    names = {
        "nfd_loss", "kd_loss", "cwd_loss", "resized_cross_entropy", "resized_kd_loss", "teacher_confidence",
        "difficulty_mask", "rdd_loss", "RDDOutput", "use_backend", "backend_info", "NFDLoss", "KDLoss", "CWDLoss",
        "ResizedCrossEntropyLoss", "ResizedKDLoss", "RDDLoss", "resized_dice_loss", "resized_cross_entropy_dice_loss",
        "resized_binary_cross_entropy", "CEDiceOutput", "ResizedDiceLoss", "ResizedCrossEntropyDiceLoss",
        "ResizedBinaryCrossEntropyLoss",
    }  # fmt: skip
    assert names <= set(fastkd.__all__)
    assert all(getattr(fastkd, name).__doc__ for name in names)


def test_environment_forces():
    code = "import torch, fastkd; print(fastkd.backends.choose('nfd', torch.device('cpu')))"
    assert python(code, FASTKD_BACKEND="reference").stdout.strip() == "reference"
    wrong = python(code, FASTKD_BACKEND="gpu")
    assert "FASTKD_BACKEND is 'gpu'; expected one of auto, reference, cpu, triton, cuda" in wrong.stderr


@needs_cpu
def test_environment_forces_a_kernel():
    code = "import torch, fastkd; print(fastkd.backends.choose('nfd', torch.device('cpu')))"
    assert python(code, FASTKD_BACKEND="cpu").stdout.strip() == "cpu"


@pytest.mark.promise("backend-error")
def test_forcing_what_cannot_run():
    if reason := backends.why_not("cpu"):
        with pytest.raises(fastkd.BackendError) as error:
            fastkd.use_backend("cpu")
        assert str(error.value) == f"backend 'cpu' cannot run: {reason}"
    if not torch.cuda.is_available():
        with pytest.raises(
            fastkd.BackendError,
            match=r"'cuda' cannot run: (torch finds no CUDA device|the CUDA C\+\+ kernels were not built)",
        ):
            fastkd.use_backend("cuda")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        with pytest.raises(
            fastkd.BackendError,
            match=r"'triton' cannot run: (torch finds no CUDA or ROCm device|Triton cannot be imported)",
        ):
            fastkd.use_backend("triton")


@needs_cpu
def test_forcing_a_backend_without_this_kernel(monkeypatch):
    monkeypatch.setattr(backends, "implementations", lambda op: ("triton",))
    with fastkd.use_backend("cpu"), pytest.raises(fastkd.BackendError, match="it has no kernel for kd"):
        fastkd.kd_loss(S, T)


def test_nesting_and_exceptions():
    with fastkd.use_backend("reference"):
        with fastkd.use_backend("auto"):
            assert backends.requested() == "auto"
        with pytest.raises(ZeroDivisionError), fastkd.use_backend("auto"):
            raise ZeroDivisionError
        assert backends.requested() == "reference"
    assert backends.requested() == "auto"


@needs_cpu
def test_backward_keeps_the_backend_of_the_forward():
    student = S.clone().requires_grad_()
    with fastkd.use_backend("cpu"):
        loss = fastkd.kd_loss(student, T)
    with fastkd.use_backend("reference"):
        loss.backward()
    assert student.grad.abs().sum() > 0


def test_info():
    info = fastkd.backend_info()
    assert set(info["backends"]) == {"reference", "cpu", "triton", "cuda"}
    for name, backend in info["backends"].items():
        assert backend["available"] == (backend["reason"] is None), name
    assert info["operators"]["nfd"]["cpu"] == ("cpu" if info["backends"]["cpu"]["available"] else "reference")
    assert info["operators"]["resized_kd"]["kernels"] == ["cpu", "triton", "cuda"]
    assert info["operators"]["nfd"]["cuda_order"] == ["cuda", "triton"]


def test_the_table_chooses(monkeypatch):
    """The first available backend in a device's list that accepts the call."""
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    monkeypatch.setattr(backends, "_why_not", {"cpu": None, "triton": None, "cuda": None})
    assert [backends.choose("nfd", gpu, cuda) for cuda in (True, False)] == ["cuda", "triton"]
    assert backends.choose("cwd", gpu) == "triton"
    assert backends.choose("nfd", cpu) == "cpu"
    monkeypatch.setitem(backends.CHOICE["nfd"], "cuda", ("triton", "cuda"))
    assert backends.choose("nfd", gpu) == "triton"
    monkeypatch.setattr(backends, "_why_not", {"cpu": None, "triton": None, "cuda": "not built"})
    assert backends.choose("kd", gpu) == "triton"


def test_the_table_names_kernels_that_exist():
    for op, devices in backends.CHOICE.items():
        for device, names in devices.items():
            assert set(names) <= set(backends.implementations(op)), (op, device)


@pytest.mark.promise("pure-python")
def test_says_once_what_is_missing():
    code = """
import warnings, torch, fastkd
fastkd.backends._LIBRARY = "missing.so"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        fastkd.kd_loss(torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3))
        fastkd.nfd_loss(torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3))
print([str(w.message) for w in caught])
"""
    out = python(code).stdout
    assert out.count("no cpu kernels for cpu tensors, using plain PyTorch instead") == 1
    assert "were not built" in out


@pytest.mark.promise("pure-python")
def test_the_source_tree_says_that_it_is_not_installed(tmp_path):
    """Python started in a clone imports the clone, which has neither compiled kernels nor the package fastkd.kernels."""
    built = shutil.ignore_patterns("*.so", "kernels", "benchmarks", "__pycache__")
    shutil.copytree(Path(fastkd.__file__).parent, tmp_path / "fastkd", ignore=built)
    code = f"""
import sys
sys.meta_path = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
sys.path.insert(0, {str(tmp_path)!r})
import fastkd
print(*(backend["reason"] for backend in fastkd.backend_info()["backends"].values()), sep="\\n")
"""
    out = python(code, TRITON_INTERPRET="1")
    expected = 2 + (importlib.util.find_spec("triton") is not None)
    assert out.stdout.count(f"{tmp_path / 'fastkd'} is the source tree") == expected, out.stderr


@pytest.mark.promise("callers")
def test_threads():
    """Concurrent calls from many threads give the same results as one thread."""
    want = fastkd.nfd_loss(S, T)
    got = []
    threads = [threading.Thread(target=lambda: got.extend(fastkd.nfd_loss(S, T) for _ in range(20))) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(got) == 80
    assert all(torch.equal(x, want) for x in got)


@pytest.mark.parametrize("name", test_gpu.LOSSES)
def test_gpu_tests_run_the_backend_in_their_name(monkeypatch, name):
    seen = []
    why_not = backends.why_not
    monkeypatch.setattr(
        backends, "why_not", lambda backend: None if backend in ("triton", "cuda") else why_not(backend)
    )
    monkeypatch.setattr(backends, "choose", lambda *_, **__: seen.append(backends.requested()) or "reference")
    test_gpu.run(name, *test_gpu.inputs("cpu"))
    assert set(seen) == {"cuda" if name.endswith(test_gpu.IN_CUDA) else "triton"}

"""The CUDA C++ kernels on a GPU: the operator suite, bitwise equality with the emulation, and GPU-only behaviour."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastkd
from fastkd import backends

from . import emulation

GPU = torch.cuda.is_available() and torch.version.cuda is not None and not emulation.RUNNING
BUILT = Path(fastkd.__file__).with_name("_cuda.so").is_file() or shutil.which("nvcc") is not None
pytestmark = [
    pytest.mark.skipif(not GPU, reason="there is no CUDA GPU"),
    pytest.mark.skipif(not BUILT, reason="the CUDA kernels are not built, and there is no nvcc to build them"),
]

ROOT = Path(__file__).parents[1]
SUITE = (
    "test_nfd",
    "test_kd",
    "test_kd_sigmoid",
    "test_resized",
    "test_resized_kernels",
    "test_resized_shaped_cross_entropy",
    "test_resized_dice",
    "test_resized_binary_cross_entropy",
    "test_rdd",
)  # operators with a CUDA kernel
SHAPE = (3, 32, 48, 64)  # one plane fits one block; a channel of the batch fits a cluster
each_layout = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


def test_is_loaded():
    """Gives a clearer message than the failures of the other tests."""
    assert backends.why_not("cuda") is None


@pytest.mark.parametrize("name", SUITE)
def test_operator_suite(name):
    """In a separate process that selects the CUDA backend."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", f"tests/{name}.py"]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "FASTKD_TEST_CUDA": "1"}, text=True, capture_output=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


def maps(dtype=torch.float32, layout=torch.contiguous_format, shape=SHAPE):
    g = torch.Generator().manual_seed(0)
    student = torch.randn(shape, generator=g)
    teacher = 0.7 * student + 0.7 * torch.randn(shape, generator=g) + 3
    return tuple(x.to(dtype).to(memory_format=layout) for x in (student, teacher))


def nfd_results(student, teacher, dims) -> dict[str, torch.Tensor]:
    ops = torch.ops.fastkd_cuda
    args = (student, teacher, dims, 1e-5, "none", 1.7)
    loss, stats = ops.nfd_forward(*args)
    out = {"loss": loss, "stats": stats, "late": ops.nfd_backward(torch.ones_like(loss), *args, stats)}
    out["sum"], _, out["early"] = ops.nfd_gradient(*args[:4], "sum", 1.7)
    return out


CASES = [
    (dims, dtype, layout)
    for dims in ("hw", "nhw", "c", "chw")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for layout in (torch.contiguous_format, torch.channels_last)
]


def emulate(path: str) -> None:
    """Run by ``python -c`` on the emulation: results of all cases with this GPU's plans."""
    gpu = torch.load(path + ".gpu")
    assert backends.why_not("cuda") is None
    torch.ops.fastkd_cuda_emulation.configure(*gpu, 4096, 8 << 20, "random")
    torch.save([nfd_results(*maps(dtype, layout), dims) for dims, dtype, layout in CASES], path)


@pytest.mark.skipif(emulation.compiler() is None, reason="there is no C++ compiler for the emulation")
def test_bits_are_those_of_the_emulation(tmp_path):
    """Same plan, order and rounding: a difference is a race, a missing barrier or a wrong instruction."""
    gpu = torch.cuda.get_device_properties(0)
    clusters = 8 if gpu.major >= 9 else 0
    path = str(tmp_path / "emulated")
    torch.save(
        [
            gpu.shared_memory_per_block_optin, gpu.shared_memory_per_multiprocessor, gpu.multi_processor_count, clusters,
        ],
        path + ".gpu",
    )  # fmt: skip
    code = f"from tests.test_cuda import emulate; emulate({path!r})"
    env = {**os.environ, "FASTKD_CUDA_EMULATION": str(emulation.build()), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True)
    for (dims, dtype, layout), want in zip(CASES, torch.load(path), strict=True):
        got = nfd_results(*(x.cuda() for x in maps(dtype, layout)), dims)
        assert got.keys() == want.keys()
        for name, value in got.items():
            assert torch.equal(value.cpu(), want[name]), f"{name} of {dims}, {dtype}, {layout}"


@each_layout
@pytest.mark.parametrize("dims", ["hw", "nhw"])
def test_the_host_waits_for_nothing(dims, layout):
    """Steps with a changing loss scale, with every synchronisation an error; fp16 gradients keep their precision.

    The yardstick is one rounding of the fp32 gradient. At weight 1 its elements are about 4e-6, where fp16 is spaced by
    6e-8: that rounding alone is 4e-3 of the norm. An early gradient is rounded twice, once at its own scale.
    """
    student, teacher = (x.cuda() for x in maps(torch.float16, layout))
    with fastkd.use_backend("cuda"):
        fastkd.nfd_loss(student.clone().requires_grad_(), teacher, dims=dims).backward()  # allocates
        args = (student.float(), teacher.float(), dims, 1e-5, "none", 1.0)
        loss, stats = torch.ops.fastkd_cuda.nfd_forward(*args)
        for weight in (1.0, 1.0, 1.0, 65536.0, 65536.0, 65536.0, 3.0):
            x = student.clone().requires_grad_()
            torch.cuda.set_sync_debug_mode("error")
            try:
                (fastkd.nfd_loss(x, teacher, dims=dims) * weight).backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            grad = torch.full_like(loss, weight / loss.numel())
            want = torch.ops.fastkd_cuda.nfd_backward(grad, *args, stats)
            error, rounding = (x.grad - want).norm().item(), (want.half() - want).norm().item()
            assert error <= 2 * rounding, f"weight {weight}: error {error}, rounding {rounding}, norm {want.norm()}"


@each_layout
@pytest.mark.parametrize("classes", [19, 150, 4096])
def test_kd_under_a_scale_and_labels_that_change(classes, layout):
    """No synchronisation; the count of valid pixels is recomputed in every step; correct against plain PyTorch."""
    student, teacher = (x.cuda() for x in maps(torch.bfloat16, layout, (2, classes, 24, 32)))
    labels = torch.randint(0, classes, (2, 24, 32), device="cuda")
    for step, weight in enumerate((1.0, 1.0, 1.0, 65536.0, 65536.0, 65536.0, 3.0)):
        labels[0, step] = 255
        x, y = (student.clone().requires_grad_() for _ in range(2))
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            with fastkd.use_backend("cuda"):
                (fastkd.kd_loss(x, teacher, target=labels) * weight).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        with fastkd.use_backend("reference"):
            (fastkd.kd_loss(y, teacher, target=labels) * weight).backward()
        assert (x.grad - y.grad).float().norm() <= 0.01 * y.grad.float().norm()


@each_layout
@pytest.mark.parametrize(("classes", "dtype"), [(19, torch.float16), (150, torch.bfloat16), (4096, torch.float32)])
def test_label_resolution_under_a_scale_and_labels_that_change(classes, dtype, layout):
    """As above; and a second backward over one graph is bitwise equal."""
    student, teacher = (x.cuda() for x in maps(dtype, layout, (2, classes, 12, 20)))
    labels = torch.randint(0, classes, (2, 48, 90), device="cuda")
    for loss in (
        lambda s, y: fastkd.resized_cross_entropy(s, y),
        lambda s, y: fastkd.resized_kd_loss(s, teacher, size=(48, 90), target=y),
    ):
        for step, weight in enumerate((1.0, 1.0, 1.0, 1024.0, 1024.0, 1024.0, 3.0)):
            labels[0, step] = 255
            x, y = (student.clone().requires_grad_() for _ in range(2))
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            try:
                with fastkd.use_backend("cuda"):
                    value = loss(x, labels)
                    (value * weight).backward(retain_graph=True)
                    (late,) = torch.autograd.grad(value * weight, x)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            with fastkd.use_backend("reference"):
                (loss(y, labels) * weight).backward()
            assert torch.equal(x.grad, late)
            assert (x.grad - y.grad).float().norm() <= 0.01 * y.grad.float().norm()


def test_another_stream_and_a_graph_give_the_same():
    student, teacher = (x.cuda() for x in maps(torch.bfloat16))
    x = student.clone().requires_grad_()

    def step() -> torch.Tensor:
        x.grad = None
        with fastkd.use_backend("cuda"):
            loss = fastkd.nfd_loss(x, teacher)
        loss.backward()
        return loss.detach()

    want, gradient = step(), x.grad.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            assert torch.equal(step(), want)
            assert torch.equal(x.grad, gradient)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        graph.replay()
        assert torch.equal(captured, want)
        assert torch.equal(x.grad, gradient)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_another_device_than_the_current_one():
    student, teacher = (x.to("cuda:1") for x in maps())
    with fastkd.use_backend("cuda"):
        value = fastkd.nfd_loss(student, teacher)
    assert value.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(value.cpu(), fastkd.nfd_loss(*maps()))

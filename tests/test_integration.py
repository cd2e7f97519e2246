"""The losses within torch: compile, export, func, checkpointing, DDP, processes, autocast."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd import backends

from .losses import EACH, LOSSES
from .support import DEVICE, each_backend, each_kernel, loss_and_gradient
from .test_compile import pair
from .test_kd import labels

each_loss = pytest.mark.parametrize("name", EACH)

MODULES = {
    "nfd": lambda: fastkd.NFDLoss(4, 6, dims="nhw"),
    "cwd": lambda: fastkd.CWDLoss(),
    "kd": lambda: fastkd.KDLoss(temperature=2.0),
    "resized_ce": lambda: fastkd.ResizedCrossEntropyLoss(class_weight=[1.0, 2.0, 0.5, 1.0]),
    "resized_kd": lambda: fastkd.ResizedKDLoss(align_corners=True),
    "rdd": lambda: fastkd.RDDLoss(10, preset="official", class_weight=torch.ones(4), blend=True),
}
each_module = pytest.mark.parametrize("name", MODULES)


def call_of(name: str, student: Tensor, teacher: Tensor, target: Tensor, step: int = 0) -> tuple[tuple, dict]:
    """Arguments for the module of that name."""
    return {
        "nfd": ((student, teacher.repeat(1, 2, 1, 1)[:, :6]), {}),
        "cwd": ((student, teacher), {}),
        "kd": ((student, teacher), {}),
        "resized_ce": ((student, target), {}),
        "resized_kd": ((student, teacher, target), {}),
        "rdd": ((student, teacher, target), {"step": step, "teacher_aux": teacher.flip(1), "student_aux": 2 * student}),
    }[name]


def scalar(out: Tensor | fastkd.RDDOutput) -> Tensor:
    return out.loss if isinstance(out, tuple) else out


# Compile and export


@pytest.mark.promise("one-graph")
@each_kernel
@each_loss
def test_compiled_for_any_size(backend, name):
    """dynamic=True and fullgraph: one graph for every batch and size, with the numbers of eager mode."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    loss = LOSSES[name]
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    with fastkd.use_backend(backend):
        for n, h, w in ((2, 6, 7), (3, 9, 8), (4, 8, 13)):
            student = torch.randn(n, 4, h, w, device=DEVICE, requires_grad=True)
            teacher, target = torch.randn(n, 4, h, w, device=DEVICE), labels((n, 3 * h, 30), 4, 0.2, torch.int64, n)
            values = [f(student, teacher, target) for f in (compiled, loss)]
            torch.testing.assert_close(*values)
            torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in values))
    assert counter.frame_count <= 2  # a size around 1 can change the result of a layout check


@pytest.mark.promise("backend-graph")
def test_forcing_a_backend_inside_compiled_code():
    def loss(student, teacher):
        with fastkd.use_backend("reference"):
            plain = fastkd.kd_loss(student, teacher)
        return plain - fastkd.kd_loss(student, teacher)

    torch._dynamo.reset()
    student, teacher, _ = pair(0)
    graphs = []

    def keep(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    torch.compile(loss, fullgraph=True, backend=keep)(student.detach(), teacher)
    assert any("log_softmax" in target for target in graphs[0])
    if backends.choose("kd", student.device) != "reference":
        assert any("kd_forward" in target for target in graphs[0])
    assert backends.requested() == "auto"


@pytest.mark.promise("backend-graph")
def test_a_forced_backend_makes_another_graph():
    """A different forced backend recompiles."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    student, teacher, _ = pair(0)
    compiled = torch.compile(fastkd.kd_loss, fullgraph=True, backend=counter)
    compiled(student, teacher)
    with fastkd.use_backend("reference"):
        compiled(student, teacher)
    compiled(student, teacher)
    assert counter.frame_count == 2


@pytest.mark.promise("export")
@each_module
def test_export(name):
    """torch.export keeps a module with its operators. The program can be saved and loaded, except for RDDLoss: torch
    saves a returned string (the stage) but cannot load it."""
    loss = MODULES[name]()
    for step in (0, 5) if name == "rdd" else (0,):
        student, teacher, target = pair(step)
        args, options = call_of(name, student.detach(), teacher, target, step)
        program = torch.export.export(loss, args, options)
        if backends.why_not("cpu") is None and DEVICE == "cpu":
            assert any("fastkd_cpu" in str(node.target) for node in program.graph.nodes)
        want = scalar(loss(*args, **options))
        torch.testing.assert_close(scalar(program.module()(*args, **options)), want)
        if name != "rdd":
            file = io.BytesIO()
            torch.export.save(program, file)
            file.seek(0)
            torch.testing.assert_close(torch.export.load(file).module()(*args, **options), want)


# Autograd and func


@pytest.mark.promise("double-backward")
@each_kernel
@each_loss
def test_func_is_refused_by_kernels_and_works_on_the_reference(backend, name):
    """torch.func and forward-mode derivatives raise an error instead of giving a wrong or missing derivative."""
    student, teacher, target = pair(0)
    student = student.detach()

    def loss(x):
        return LOSSES[name](x, teacher, target)

    with fastkd.use_backend(backend):
        with pytest.raises(RuntimeError, match=r'use_backend\("reference"\)'):
            torch.func.grad(loss)(student)
        with pytest.raises(RuntimeError, match=r'use_backend\("reference"\)'):
            torch.func.vmap(loss)(torch.stack([student, student]))
        with pytest.raises(RuntimeError, match=r'use_backend\("reference"\)'):
            torch.func.jvp(loss, (student,), (torch.ones_like(student),))
    with fastkd.use_backend("reference"):
        got = torch.func.grad(loss)(student)
        want = loss_and_gradient(lambda s, t: loss(s), student, teacher, "reference", torch.tensor(1.0))[1]
        torch.testing.assert_close(got, want)


@pytest.mark.promise("double-backward")
@pytest.mark.promise("runtime-error")
@each_kernel
@each_loss
def test_double_backward_is_refused(backend, name):
    student, teacher, target = pair(1)
    with fastkd.use_backend(backend):
        loss = LOSSES[name](student, teacher, target)
    with pytest.raises(RuntimeError, match=r"double backward .*use_backend"):
        torch.autograd.grad(loss, student, create_graph=True)


@pytest.mark.promise("backward-again")
@each_backend
@each_loss
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(backend, name, reentrant):
    """Activation checkpointing runs the forward twice; loss and gradient are bitwise equal."""
    student, teacher, target = pair(1)
    with fastkd.use_backend(backend):
        want = LOSSES[name](student, teacher, target)
        (want_gradient,) = torch.autograd.grad(want, student)
        got = checkpoint(LOSSES[name], student, teacher, target, use_reentrant=reentrant)
        got.backward()
    assert torch.equal(got, want)
    assert torch.equal(student.grad, want_gradient)


@pytest.mark.promise("deterministic")
@each_backend
@each_loss
def test_strictly_deterministic(backend, name):
    """Uses no operation that torch lists as nondeterministic (plain PyTorch's resize is one on a GPU)."""
    if backend == "reference" and DEVICE == "cuda":
        pytest.skip("the backward of torch's bilinear resize is not deterministic on a GPU")
    student, teacher, target = pair(1)
    torch.use_deterministic_algorithms(True)
    with fastkd.use_backend(backend):
        results = [torch.autograd.grad(LOSSES[name](student, teacher, target), student)[0] for _ in range(2)]
    assert torch.equal(*results)


@pytest.mark.promise("autocast")
@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_training_step_under_autocast(backend, dtype):
    """The layers run in half precision; the losses take their outputs and return fp32; gradients reach the weights."""
    student, teacher = nn.Conv2d(3, 4, 3, padding=1).to(DEVICE), nn.Conv2d(3, 4, 3, padding=1).to(DEVICE)
    images, target = torch.randn(2, 3, 6, 6, device=DEVICE), labels((2, 12, 12), 4, 0.2, torch.int64, 0)
    for name, loss in LOSSES.items():
        student.zero_grad()
        with fastkd.use_backend(backend), torch.autocast(DEVICE, dtype):
            with torch.no_grad():
                features = teacher(images)
            logits = student(images)
            assert logits.dtype == dtype
            value = loss(logits, features, target)
        assert value.dtype == torch.float32, name
        value.backward()
        assert student.weight.grad.isfinite().all(), name
        assert student.weight.grad.count_nonzero() > 0, name


# Modules


@pytest.mark.promise("copies")
@each_module
def test_copies_of_a_module(name):
    """deepcopy, pickle and torch.save, also after a step; the copy computes the same loss."""
    loss = MODULES[name]()
    student, teacher, target = pair(0)
    args, options = call_of(name, student, teacher, target)
    want = scalar(loss(*args, **options))
    want.backward(retain_graph=True)
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), torch.load(file, weights_only=False)):
        assert torch.equal(scalar(twin(*args, **options)), want)
        assert [p.shape for p in twin.parameters()] == [p.shape for p in loss.parameters()]


# Threads and processes


@pytest.mark.promise("callers")
@each_kernel
def test_a_forced_backend_is_its_threads_own(backend):
    inside, outside = threading.Barrier(2), threading.Barrier(2)
    seen = []

    def other():
        with fastkd.use_backend(backend):
            inside.wait()
            outside.wait()
            seen.append(backends.requested())

    worker = threading.Thread(target=other)
    worker.start()
    inside.wait()
    seen.append(backends.requested())
    with fastkd.use_backend("reference"):
        outside.wait()
        worker.join()
        seen.append(backends.requested())
    assert seen == ["auto", backend, "reference"]


def gradients(seed: int) -> list[Tensor]:
    results = []
    for loss in LOSSES.values():
        student, teacher, target = pair(seed)
        results.append(torch.autograd.grad(loss(student, teacher, target), student)[0].cpu())
    return results


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.student, self.nfd, self.kd = nn.Conv2d(3, 4, 1), fastkd.NFDLoss(4, 6), fastkd.KDLoss()
        self.rdd = fastkd.RDDLoss(10, tfe_steps=0)

    def forward(self, images: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        logits = self.student(images)
        rdd = self.rdd(logits, teacher[:, :4].contiguous(), target, step=0).loss
        return self.nfd(logits, teacher) + self.kd(logits, teacher[:, :4].contiguous()) + rdd


def batch(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(rank)
    return (
        torch.randn(2, 3, 6, 6, generator=g),
        torch.randn(2, 6, 6, 6, generator=g),
        labels((2, 12, 12), 4, 0, torch.int64, rank),
    )


def in_another_process(rank: int, folder: str, want: list[Tensor]) -> None:
    """One of two spawned processes: first the losses alone, then a step of DDP over gloo."""
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(gradients(3), want, strict=True))
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = nn.parallel.DistributedDataParallel(Net())
    net(*batch(rank)).backward()
    torch.save([p.grad for p in net.module.parameters()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.promise("processes")
@pytest.mark.promise("ddp")
@pytest.mark.skipif(DEVICE != "cpu", reason="two gloo processes on the CPU")
def test_spawned_processes_and_ddp(tmp_path):
    """Two processes give bitwise the results of this one, and DDP the mean gradient of both batches."""
    mp.spawn(in_another_process, (str(tmp_path), gradients(3)), nprocs=2)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    torch.manual_seed(0)
    net = Net()
    sum(net(*batch(rank)) / 2 for rank in (0, 1)).backward()
    for a, b, p in zip(*both, net.parameters(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, p.grad)


FORK = """
import os, sys, torch, fastkd
student, teacher = torch.randn(2, 2, 19, 40, 50)
student.requires_grad_()

def gradients():
    losses = fastkd.nfd_loss(student, teacher), fastkd.kd_loss(student, teacher), fastkd.cwd_loss(student, teacher)
    return torch.cat([torch.autograd.grad(loss, student)[0] for loss in losses])

torch.set_num_threads(2)
want = gradients()  # the library is loaded and its threads have run
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # as a DataLoader's worker does: OpenMP's threads do not survive a fork
    os._exit(0 if torch.equal(gradients(), want) else 3)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert torch.equal(gradients(), want)  # and here nothing broke
sys.exit(status)
"""


@pytest.mark.promise("processes")
@pytest.mark.skipif(DEVICE != "cpu", reason="CUDA does not survive a fork")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_forked_process():
    """A child forked after the kernels ran gives bitwise equal results."""
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr

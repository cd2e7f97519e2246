"""torch.compile: one graph, no recompilation when the batch changes, the same numbers as eager."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastkd

from .losses import EACH, LOSSES
from .support import DEVICE, each_backend


def pair(seed):
    g = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 2, 4, 6, 6, generator=g).to(DEVICE)
    target = torch.randint(0, 4, (2, 12, 12), generator=g).to(DEVICE)
    target[:, : seed % 5] = 255
    return student.requires_grad_(), teacher, target


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.mark.promise("one-graph")
@each_backend
@pytest.mark.parametrize("name", EACH)
def test_one_graph_for_all_batches(backend, name):
    loss = LOSSES[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    with fastkd.use_backend(backend):
        for seed in range(4):
            student, teacher, target = pair(seed)
            want = loss(student, teacher, target)
            (want_gradient,) = torch.autograd.grad(want, student)
            got = compiled(student, teacher, target)
            (gradient,) = torch.autograd.grad(got, student)
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(gradient, want_gradient)
    assert counter.frame_count == 1


@each_backend
def test_dynamic_shapes(backend):
    compiled = torch.compile(fastkd.kd_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    with fastkd.use_backend(backend):
        for size in (5, 8, 13):
            student, teacher = torch.randn(2, 2, 4, size, size + 1, device=DEVICE)
            torch.testing.assert_close(compiled(student, teacher), fastkd.kd_loss(student, teacher))


def test_inductor():
    """Code generation, once."""
    loss = torch.compile(fastkd.NFDLoss(), fullgraph=True)
    student, teacher, _ = pair(0)
    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    want = fastkd.nfd_loss(student, teacher)
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(gradient, torch.autograd.grad(want, student)[0])


@pytest.mark.promise("one-graph")
@pytest.mark.parametrize("blend", [False, True])
def test_stage_switch(blend):
    """The first change of ``step`` makes it symbolic, for which Dynamo recompiles once; afterwards only the switch
    does."""
    counter = CompileCounterWithBackend("aot_eager")
    loss = fastkd.RDDLoss(20, tfe_steps=8, blend=blend)
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    counts = []
    for step in range(20):
        student, teacher, target = pair(step)
        aux = teacher.flip(1)
        out = compiled(student, teacher, target, step=step, teacher_aux=aux)
        want = loss(student, teacher, target, step=step, teacher_aux=aux)
        assert out.stage == want.stage == ("tfe" if step < 8 else "tse")
        torch.testing.assert_close(out.loss, want.loss)
        counts.append(counter.frame_count)
    assert counts[1] == counts[7] <= 2
    assert counts[8] == counts[19] <= 3

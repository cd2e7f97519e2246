"""Shared by the operator tests: available backends, random problems, comparison with the error budget
(tests/budget.py)."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import fastkd
from fastkd import backends

from . import budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"


def kernel_backends() -> list:
    """Backends for this machine's tensors; an unavailable one is a skipped parameter with the reason."""
    names = ("triton",) if DEVICE == "cuda" else ("cpu",)
    if INTERPRETER:
        names = ("triton",)
    if "FASTKD_CUDA_EMULATION" in os.environ or os.environ.get("FASTKD_TEST_CUDA") == "1":
        names = ("cuda",)
    return [
        pytest.param(
            name, marks=[pytest.mark.skip(reason=f"{name}: {reason}")] if (reason := backends.why_not(name)) else []
        )
        for name in names
    ]


each_kernel = pytest.mark.parametrize("backend", kernel_backends())
# A pure-Python installation has no C++ library; if one should have been built, test_cpu_kernels_are_built fails.
needs_cpu = pytest.mark.skipif(backends.why_not("cpu") is not None, reason=f"cpu: {backends.why_not('cpu')}")
each_backend = pytest.mark.parametrize("backend", ["reference", *kernel_backends()])


def needs(backend: str, op: str) -> None:
    """Skips a test if this backend does not implement the operator."""
    if backend != "reference" and backend not in backends.implementations(op):
        pytest.skip(f"{backend} has no kernel for {op}")


@dataclass(frozen=True)
class Problem:
    """A pair of tensors to compare, described by fields that hypothesis can shrink."""

    shape: tuple[int, int, int, int]
    student_dtype: torch.dtype
    teacher_dtype: torch.dtype
    student_layout: str
    teacher_layout: str
    offset: float
    scale: float
    seed: int

    def tensors(self) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(self.seed)
        student = torch.randn(self.shape, generator=g, dtype=torch.float64)
        teacher = 0.7 * student + 0.7 * torch.randn(self.shape, generator=g, dtype=torch.float64)
        return tuple(
            lay_out((x * self.scale + self.offset).to(DEVICE, dtype), layout)
            for x, dtype, layout in (
                (student, self.student_dtype, self.student_layout),
                (teacher, self.teacher_dtype, self.teacher_layout),
            )
        )


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another layout: a view with gaps, an offset, channels last, or one plane shared by all
    samples."""
    if layout == "nchw":
        return x.contiguous()
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "offset":  # dense, but with a storage offset and unaligned
        return torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape)
    if layout == "strided":
        return x.repeat_interleave(2, -1)[..., ::2]
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    assert layout == "expanded"
    return x[:1].expand(x.shape)


LAYOUTS = ("nchw", "channels_last", "offset", "strided", "transposed", "expanded")


def problems(max_channels: int = 40, half_offset: bool = True) -> st.SearchStrategy[Problem]:
    dtype = st.sampled_from(DTYPES)
    return st.builds(
        Problem,
        shape=st.tuples(
            st.integers(1, 3),
            st.one_of(st.integers(1, max_channels), st.sampled_from([1, 19, 64, 150, 257])),
            st.integers(1, 24),
            st.integers(1, 40),
        ),
        student_dtype=dtype,
        teacher_dtype=dtype,
        student_layout=st.sampled_from(LAYOUTS),
        teacher_layout=st.sampled_from(LAYOUTS),
        offset=st.sampled_from([0.0, 0.5, -3.0, 100.0]),
        scale=st.sampled_from([1.0, 1e-2, 10.0]),
        seed=st.integers(0, 2**16),
    )


def loss_and_gradient(loss, student: Tensor, teacher: Tensor, backend: str, grad_output: Tensor | None = None):
    """``loss(student, teacher)`` on ``backend`` and the gradient of ``student``, unconverted."""
    student = student.detach().requires_grad_()
    with fastkd.use_backend(backend):
        value = loss(student, teacher)
    if grad_output is None:
        grad_output = torch.full_like(value, 1.7)
    value.backward(grad_output.to(value.dtype))
    return value.detach(), student.grad


def assert_within_budget(
    loss, student: Tensor, teacher: Tensor, backend: str, gradient_scale: float = 1.0, loss_scale: float = 1.0
) -> None:
    """Checks loss and gradient of ``backend`` against float64, with plain PyTorch's error as the yardstick.

    Args:
        gradient_scale: magnitude below which a gradient is rounding noise (e.g. if the true one is 0).
        loss_scale: the same for the loss: one rounding of a logarithm, times the loss's factors and number of terms.
    """
    ours = loss_and_gradient(loss, student, teacher, backend)
    eager = loss_and_gradient(loss, student, teacher, "reference")
    true = loss_and_gradient(loss, student.double(), teacher.double(), "reference")
    acc = budget.accumulator(student, teacher)
    assert ours[0].dtype == acc
    assert ours[0].shape == true[0].shape
    assert ours[1].dtype == student.dtype
    assert ours[1].shape == student.shape
    budget.assert_within("loss", ours[0], eager[0], true[0], acc, unit=loss_scale)
    budget.assert_within("gradient", ours[1], eager[1], true[1], acc, unit=gradient_scale)

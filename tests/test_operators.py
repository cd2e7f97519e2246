"""Properties of every operator in the table: schema, opcheck, argument names, bitwise reproducibility."""

import inspect

import pytest
import torch

from fastkd import backends
from fastkd.ops import OPERATORS, Draw, operator

from .support import DEVICE, INTERPRETER, each_kernel

NAMES = {row.name: row for row in OPERATORS}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
each_operator = pytest.mark.parametrize("name", NAMES)
# In Triton's interpreter a call with the default sizes takes up to seconds.
SMALL = {"shape": (2, 3, 2, 3), "size": (5, 7)} if INTERPRETER else {}


def calls(name: str, **draw) -> list[tuple]:
    """A minimal subset of the row's samples that contains every value of every argument and every shape of every
    tensor."""
    seen, chosen = set(), []
    for args in NAMES[name].samples(Draw(device=DEVICE, **SMALL, **draw)):
        values = {(i, str(a.shape) if isinstance(a, torch.Tensor) else str(a)) for i, a in enumerate(args)}
        if not values <= seen or not chosen:
            seen |= values
            chosen.append(args)
    return chosen


def few(samples: list[tuple], first: bool) -> list[tuple]:
    """In the interpreter a single one, the first or the last."""
    return samples[:1] if INTERPRETER and first else samples[-1:] if INTERPRETER else samples


def implemented(name: str, backend: str):
    if backend not in NAMES[name].backends:
        pytest.skip(f"{backend} has no {name}")
    assert backends.why_not(backend) is None
    return getattr(getattr(torch.ops, f"fastkd_{backend}"), name).default


def test_names_are_unique():
    assert len(NAMES) == len(OPERATORS)


@each_kernel
@each_operator
def test_schema_is_the_tables(backend, name):
    op = implemented(name, backend)
    assert str(op._schema) == f"fastkd_{backend}::{NAMES[name].schema}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(
        f"fastkd_{backend}::{name}", "CompositeExplicitAutograd" if name == "isa" else DEVICE.upper()
    )


@each_operator
def test_at_most_ten_arguments(name):
    """Backward operators take the upstream gradient and the saved tensors in addition to the forward's arguments."""
    arguments = NAMES[name].schema.partition(" ->")[0].count(",") + 1
    assert arguments <= 10


@pytest.mark.promise("opcheck")
@each_kernel
@each_operator
@pytest.mark.parametrize(
    ("layout", "dtype"), [("nchw", torch.float32), ("channels_last", torch.bfloat16)], ids=["nchw-fp32", "nhwc-bf16"]
)
def test_opcheck(backend, name, layout, dtype):
    """Schema, no aliasing, fake tensors with the strides of the real ones."""
    op = implemented(name, backend)
    for args in few(calls(name, dtype=dtype, layout=LAYOUTS[layout]), layout == "nchw"):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.promise("opcheck")
@each_kernel
@each_operator
def test_opcheck_of_dynamic_shapes(backend, name):
    """Traced with symbolic sizes, the operator gives eager mode's numbers. One sample each, since it takes a
    second."""
    op = implemented(name, backend)
    if name == "isa":
        pytest.skip("no tensor")
    if name == "difficulty_lse":
        pytest.skip("opcheck takes its NaN, where a pixel is not selected, for a difference")
    torch.library.opcheck(op, calls(name)[-1], test_utils=("test_aot_dispatch_dynamic",))


@each_kernel
@each_operator
def test_same_bits_every_time_and_inputs_are_left_alone(backend, name):
    if name == "isa":
        pytest.skip("no tensor")
    implemented(name, backend)
    op, written = operator(backend, name), int(name == "rescale_")
    for args in few(calls(name, layout=torch.channels_last), False):
        runs = []
        for _ in range(2):
            copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
            out = op(*copies)
            out = copies[0] if written else out
            runs.append([x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor)])
            for a, b in zip(args[written:], copies[written:], strict=True):
                assert same(a, b) if isinstance(a, torch.Tensor) else a == b
        assert all(same(a, b) for a, b in zip(*runs, strict=True))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, or both NaN."""
    return torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@each_operator
def test_fakes_take_the_schemas_arguments(name):
    """Calls by keyword, which finds a misspelt argument of a fake."""
    row = NAMES[name]
    parameters = list(inspect.signature(row.fake).parameters.values())
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return
    schema = row.schema.partition("(")[2].partition(") ->")[0]
    assert [p.name for p in parameters] == [a.split()[-1] for a in schema.split(", ") if a]

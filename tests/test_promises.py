"""docs/promises.md: each promise names tests that exist, and the bounds of its table hold."""

import ast
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from . import budget
from .losses import LOSSES
from .support import problems
from .tools.errors import DTYPES, errors

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+)(?:::(\w+))?)?`")


def names_in(path: Path) -> set[str]:
    """Names of the functions, of the classes, and of the classes' functions as Class::function."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign):
            targets = node.targets if isinstance(node, ast.Assign) else []
            found |= {target.id for target in targets if isinstance(target, ast.Name)} or {getattr(node, "name", "")}
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{child.name}" for child in node.body if isinstance(child, ast.FunctionDef)}
    return found


def test_every_named_test_exists():
    named = NAMED.findall(PAGE)
    assert len(named) > 60
    for file, *parts in named:
        assert (ROOT / file).is_file(), file
        if name := "::".join(part for part in parts if part):
            assert name in names_in(ROOT / file), f"{file}::{name}"


def test_every_promise_names_a_test():
    """In the tables of promises the last column says where it is checked."""
    promises, _, _ = PAGE.partition("\n## As run")
    rows = [line for line in promises.splitlines() if line.startswith("| ") and not line.startswith("| loss |")]
    promises = [row for row in rows if not row.startswith(("| promise |", "| raises |"))]
    checked = [row for row in promises if NAMED.search(row.split(" | ")[-1])]
    measured = [row for row in promises if re.search(r"\d\.\de-\d\d", row)]
    assert len(checked) > 30
    assert len(checked) + len(measured) == len(promises), set(promises) - set(checked) - set(measured)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_error_bounds(name, dtype):
    loss, gradient = errors(name, dtype, seeds=1)["auto"]
    assert loss <= budget.LOSS[torch.float64 if dtype == torch.float64 else torch.float32]
    assert gradient <= budget.GRADIENT[dtype]


def test_examples_differ():
    """What hypothesis draws covers the options: dtypes, layouts, and what a loss adds to them."""
    drawn = []

    @settings(settings.get_profile("default"), database=None)
    @given(problems(), st.tuples(st.sampled_from("abcde"), st.booleans(), st.sampled_from("abcd")))
    def draw(problem, options):
        drawn.append(
            (problem.student_dtype, problem.teacher_dtype, problem.student_layout, problem.teacher_layout, *options)
        )

    draw()
    assert len(set(drawn)) >= 25
    for option in range(len(drawn[0])):
        assert len({example[option] for example in drawn}) == [4, 4, 6, 6, 5, 2, 4][option]

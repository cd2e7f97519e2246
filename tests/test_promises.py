"""docs/promises.md matches the marks of the tests, and the bounds of its table hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from . import budget
from .losses import LOSSES
from .promises import PROMISES
from .support import problems
from .tools import pages
from .tools.errors import DTYPES, errors


@pytest.mark.parametrize("path", pages.pages(), ids=lambda path: path.name)
def test_pages_are_made_of_the_marks(path):
    assert path.read_text(encoding="utf-8") == pages.pages()[path], "run python -m tests.tools.pages"


def test_every_promise_has_a_test_and_every_mark_a_promise():
    names = [name for section in PROMISES.values() for name in section]
    assert len(names) == len(set(names)) > 50
    assert set(names) == set(pages.marked())


@pytest.mark.promise("error-bounds")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_error_bounds(name, dtype):
    loss, gradient = errors(name, dtype, seeds=1)["auto"]
    assert loss <= budget.LOSS[torch.float64 if dtype == torch.float64 else torch.float32]
    assert gradient <= budget.GRADIENT[dtype]


@pytest.mark.promise("examples-differ")
def test_examples_differ():
    """Hypothesis' examples cover the options: dtypes, layouts, and those of each loss."""
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

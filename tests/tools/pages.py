"""Writes docs/promises.md and the index of docs/losses.md: what tests promise, and where a loss is found.

    python -m tests.tools.pages

A promise's tests have `@pytest.mark.promise(NAME)`; tests/promises.py has the names. A loss's files are those of its name.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

from ..promises import BY_HAND, PROMISES

ROOT = Path(__file__).parents[2]
PAGE, LOSSES = ROOT / "docs" / "promises.md", ROOT / "docs" / "losses.md"
ERRORS = "<!-- errors -->", "<!-- end -->"
INDEX = "<!-- index -->", "<!-- end index -->"
REFERENCE = {"rdd": ("teacher_confidence", "difficulty_mask")}  # whose functions have other names


@functools.cache
def marked() -> dict[str, list[str]]:
    """Name of a promise -> the tests that check it, as file::test, without running any of them."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        file = path.relative_to(ROOT).as_posix()
        for name, node in _tests(ast.parse(path.read_text(encoding="utf-8")).body):
            for promise in _names(node):
                found.setdefault(promise, []).append(f"{file}::{name}")
    return found


def _tests(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, list[ast.expr]]]:
    """Each test, and each class of tests, with its decorators; of `TestX = mark(...)` the value."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield prefix + node.name, node.decorator_list
        if isinstance(node, ast.ClassDef):
            yield from _tests(node.body, f"{node.name}::")
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, [node.value]


def _names(nodes: list[ast.expr]) -> list[str]:
    calls = [call for node in nodes for call in ast.walk(node) if isinstance(call, ast.Call)]
    return [ast.literal_eval(call.args[0]) for call in calls if ast.unparse(call.func) == "pytest.mark.promise"]


def between(text: str, markers: tuple[str, str]) -> str:
    return text.partition(markers[0])[2].partition(markers[1])[0].strip()


def promises_page() -> str:
    """The page; the table of errors, which tests.tools.errors prints, is kept as it is."""
    tests = marked()
    parts = [
        "# Promises, and how they are checked",
        "Made by `python -m tests.tools.pages` from the marks of the tests and from `tests/promises.py`; edit those.\n"
        "`make test` runs the tests on the C++ kernels, on Triton's in its interpreter, and on CUDA's on an emulated GPU;\n"
        "`make test-all` adds slow ones and the tools. `tests/test_gpu.py` needs a GPU.",
    ]
    for section, promises in PROMISES.items():
        rows = [f"| {text} | {', '.join(f'`{test}`' for test in tests[name])} |" for name, text in promises.items()]
        parts += [f"## {section}", "\n".join(["| promise | checked by |", "|---|---|", *rows])]
        if section == "Numbers":
            parts += [
                "Limits: NFD squares its inputs in fp32, so values beyond 10¹⁷ give NaN (plain PyTorch gives 0). The\n"
                "softmax losses need differences of logits, times the number of classes or pixels and divided by the\n"
                "temperature, within fp32's range. In CUDA C++ at label resolution, a NaN logit also makes the gradient of its\n"
                "neighbour NaN along an axis that is not resized.",
                "Errors against float64, on logits of two networks that agree in part: relative error of the loss, and of the\n"
                "gradient in the L2 norm (`python -m tests.tools.errors`; worst of 5 seeds, C++ kernels with AVX-512, commit\n"
                "ef7758f):",
                "\n".join([ERRORS[0], between(PAGE.read_text(encoding="utf-8"), ERRORS), ERRORS[1]]),
            ]
    rows = [f"| {run.check} | `{run.command}` | {run.date}, {run.commit} | {run.result} |" for run in BY_HAND]
    parts += [
        "## Run by hand",
        "On 2 cores with AVX-512. The commit is that of the sources, or of this row where that was not noted.",
        "\n".join(["| check | command | date, commit | result |", "|---|---|---|---|", *rows]),
    ]
    return "\n\n".join(parts) + "\n"


def index() -> str:
    """A row for each family of operators that is a loss; the name of the family finds its files."""
    kernels = {"C++": "csrc/cpu/{}.cpp", "Triton": "kernels/{}.py", "CUDA C++": "csrc/cuda/{}.cu"}
    lines = ["| name, page | reference | kernels | tests | benchmark |", "|---|---|---|---|---|"]
    defined = [
        node.name for node in ast.parse((ROOT / "fastkd/reference.py").read_text()).body if hasattr(node, "name")
    ]
    for path in sorted((ROOT / "fastkd" / "ops").glob("[a-z]*.py")):
        if "Loss(" not in path.read_text(encoding="utf-8"):
            continue
        stem = path.stem
        page = stem.replace("_", "-") + ".md"
        formula = [name for name in defined if name.startswith(stem.removeprefix("resized_"))]
        tests = {test.stem.removeprefix("test_") for test in (ROOT / "tests").glob(f"test_{stem}*.py")}
        if stem.startswith("resized_") and stem not in tests:
            tests |= {"resized", "resized_kernels"}
        cells = {
            "page": f"[{stem}]({page})" if (ROOT / "docs" / page).exists() else f"`{stem}`",
            "reference": ", ".join(f"`{name}`" for name in formula or REFERENCE[stem]),
            "kernels": ", ".join(word for word, file in kernels.items() if (ROOT / file.format(stem)).exists())
            or "not yet",
            "tests": ", ".join(f"`{test}`" for test in sorted(tests)),
            "benchmark": "yes" if (ROOT / f"benchmarks/bench_{stem}.py").exists() else "not yet",
        }
        lines.append(f"| {' | '.join(cells.values())} |")
    return "\n".join(lines)


def pages() -> dict[Path, str]:
    head, _, rest = LOSSES.read_text(encoding="utf-8").partition(INDEX[0])
    return {PAGE: promises_page(), LOSSES: f"{head}{INDEX[0]}\n{index()}\n{INDEX[1]}{rest.partition(INDEX[1])[2]}"}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")

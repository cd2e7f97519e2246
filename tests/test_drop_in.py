"""Every code block of docs/drop-in.md runs, and trains something."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn

PAGE = (Path(__file__).parents[1] / "docs" / "drop-in.md").read_text(encoding="utf-8")
NEEDS = {"timm": "timm", "Lightning": "pytorch_lightning"}


def blocks():
    """(heading and number, code) of each block."""
    found = []
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        heading = section.split("\n", 1)[0]
        code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        found += [pytest.param(heading, text, id=f"{heading} {i}") for i, text in enumerate(code)]
    return found


class Network(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Conv2d(3, width, 3, stride=4, padding=1)
        self.head = nn.Conv2d(width, 5, 1)

    def forward(self, x):
        return self.head(self.body(x).relu())


@pytest.mark.parametrize(("heading", "code"), blocks())
def test_block(heading, code, tmp_path, monkeypatch):
    if heading in NEEDS:
        pytest.importorskip(NEEDS[heading], reason=f"{NEEDS[heading]} is not installed")
    monkeypatch.chdir(tmp_path)
    labels = torch.randint(0, 5, (2, 64, 64))
    labels[:, 0] = 255
    student, teacher = Network(8), Network(16)
    scope = {"student": student, "teacher": teacher, "images": torch.randn(2, 3, 64, 64), "labels": labels}
    if heading == "torchdistill":  # which does not resize logits
        scope["labels"] = labels[:, ::4, ::4].contiguous()
    before = [p.clone() for p in student.parameters()]
    exec(compile(code, f"docs/drop-in.md, {heading}", "exec"), scope)
    if heading == "mmrazor":
        for options in scope["distill_losses"].values():
            module, _, name = options.pop("type").rpartition(".")
            getattr(importlib.import_module(module), name)(**options)(*torch.randn(2, 2, 5, 4, 4))
    elif heading != "timm":
        moved = any(not torch.equal(p, old) for p, old in zip(student.parameters(), before, strict=True))
        assert moved or all(p.grad is not None for p in student.parameters())


def test_the_page_has_a_block_for_each_project():
    headings = {param.values[0] for param in blocks()}
    assert headings == {"A plain loop", "timm", "Lightning", "CIRKD's scripts", "mmrazor", "torchdistill"}

"""Each file in examples/ is short, runs on tiny data and trains the expected parameters."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

pytest.importorskip("torchvision")
EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = ["--steps", "2", "--size", "32", "64"]
# Its arguments, and the modules it needs besides the trainer.
CASES = {
    "plain_loop": (SMALL, ()),
    "smp_timm": ([*SMALL, "--teacher", "mobilenetv3_small_075"], ("segmentation_models_pytorch",)),
    "lightning_module": ([*SMALL, "--accelerator", "cpu"], ("pytorch_lightning",)),
    "segformer_trainer": ([*SMALL, "--cpu"], ("accelerate", "transformers")),
    "vit_tokens": (
        [
            "--steps",
            "2",
            "--size",
            "32",
            "64",
            "--teacher",
            "vit_tiny_patch16_224",
            "--student",
            "mobilenetv3_small_050",
        ],
        ("timm",),
    ),
    "rdd_camvid": (
        ["--steps", "2", "--crop", "64", "64", "--batch-size", "3"],
        ("accelerate", "segmentation_models_pytorch"),
    ),
}


def test_every_example_is_run_and_short():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(CASES)
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 120, path.name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_example(name, tmp_path, monkeypatch):
    words, packages = CASES[name]
    for package in packages:
        pytest.importorskip(package)
    if name == "rdd_camvid":
        from tests.train import trees

        words = ["--root", trees.camvid(tmp_path)["root"], *words]
    if name == "segformer_trainer":  # an earlier test in this process may have used another precision
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    gradients = []
    hook = register_optimizer_step_post_hook(lambda optimizer, *_: gradients.append(norm(optimizer)))
    try:
        losses = module.main(words)
    finally:
        hook.remove()
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    assert len(gradients) == (4 if name == "rdd_camvid" else 2)  # there the teacher's gradients are included
    assert all(0 < gradient < math.inf for gradient in gradients)


def norm(optimizer) -> float:
    """Norm of all gradients."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return sum(float(p.grad.norm()) for p in parameters if p.grad is not None)


def test_the_notebook_runs_and_holds_its_picture(monkeypatch, capsys):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    notebook = json.loads((EXAMPLES / "five_minutes.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    settings = "SIZE, SCENES, STEPS = (128, 256), 48, 150"
    assert settings in code
    scope = {}
    exec(compile(code.replace(settings, "SIZE, SCENES, STEPS = (32, 64), 4, 2"), "five_minutes.ipynb", "exec"), scope)
    assert "teacher: " in capsys.readouterr().out
    assert len(scope["figure"].axes) == 6
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert "image/png" in outputs[-1]["data"]

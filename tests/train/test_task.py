"""The trainer's task losses: their formulas, terms and weights, errors, and a short run of each."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("accelerate")
pytest.importorskip("segmentation_models_pytorch")

import fastkd
from fastkd.train.config import Config, check
from fastkd.train.methods.registry import METHODS, LossConfig
from fastkd.train.methods.task import DiceConfig, OHEMConfig, TaskLoss, one_against_the_rest
from tests.train import tiny
from tests.train.tiny import lines, run

LOGITS = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 5, (2, 10, 12), generator=torch.Generator().manual_seed(1))
LABELS[LABELS == 4] = 255
TASKS = ("ce", "ce+dice", "ohem", "focal", "bce")


def test_what_each_computes():
    config = LossConfig(label_smoothing=0.1, focal_gamma=3.0, align_corners=True)
    config.dice, config.ohem = DiceConfig(2.0, False, 0.5, True, False, True), OHEMConfig(0.5, 7)
    where = {"ignore_index": 255, "align_corners": True}
    dice = {"batch": False, "smooth": 0.5, "square": True, "background": False, "present": True}
    both = fastkd.resized_cross_entropy_dice_loss(LOGITS, LABELS, label_smoothing=0.1, **dice, **where)
    onehot = F.one_hot(LABELS.where(LABELS != 255, 0), 4).movedim(3, 1)
    want = {
        "ce": {"task": fastkd.resized_cross_entropy(LOGITS, LABELS, label_smoothing=0.1, **where)},
        "ce+dice": {"task": both.ce, "dice": 2 * both.dice},
        "ohem": {"task": fastkd.resized_ohem_cross_entropy(LOGITS, LABELS, threshold=0.5, min_kept=7, **where)},
        "focal": {"task": fastkd.resized_cross_entropy(LOGITS, LABELS, focal_gamma=3.0, **where)},
        "bce": {
            "task": fastkd.resized_binary_cross_entropy(
                LOGITS, torch.where(LABELS[:, None] == 255, 255, onehot), **where
            )
        },
    }
    for task, parts in want.items():
        config.task = task
        loss = config.build_task(255)
        got = loss(LOGITS, LABELS)
        assert set(got) == set(loss.weights)
        torch.testing.assert_close(got, parts)
    assert TaskLoss("ce+dice", dice=config.dice).weights == {"task": 1.0, "dice": 2.0}
    assert not TaskLoss("ohem").over_valid
    with pytest.raises(ValueError, match=r"loss.task: got 'dice', expected one of ce, ce\+dice"):
        TaskLoss("dice")


@pytest.mark.parametrize("ignore_index", [255, -1, 2])
def test_labels_against_the_rest(ignore_index):
    labels = torch.tensor([[[0, 1, 2, ignore_index]]])
    got = one_against_the_rest(labels, 3, ignore_index)
    assert got.shape == (1, 3, 1, 4)
    for c in range(3):
        want = [ignore_index if y == ignore_index else int(y == c) for y in labels.flatten().tolist()]
        assert got[0, c].flatten().tolist() == want


def test_tasks_are_no_methods():
    assert METHODS == ("kd", "nfd", "cwd", "rdd", "at", "fitnet", "skd", "ifvd", "dsd", "cirkd")
    config = Config(method="rdd", teacher="teacher.pt")
    check(config)
    config.loss.task = "ce+dice"
    with pytest.raises(ValueError, match=r"loss.task 'ce\+dice': the method rdd weights"):
        check(config)


@pytest.mark.parametrize("changes", [{"label_smoothing": 1.0}, {"focal_gamma": -1.0}], ids=str)
def test_ranges(changes):
    with pytest.raises(ValueError, match=f"loss.{next(iter(changes))}"):
        check(Config(loss=LossConfig(**changes)))


@pytest.mark.parametrize("task", TASKS)
def test_a_run_of_each(task, tmp_path, quick):
    config = tiny.config(tmp_path, aux=True)
    config.loss.task, config.loss.ohem.min_kept = task, 50
    run(config)
    line = lines(tmp_path, "train")[0]
    parts = {name for name in line if name.startswith("loss/")}
    dice = {"loss/dice", "loss/aux_dice"} if task == "ce+dice" else set()
    assert parts == {"loss/task", "loss/aux"} | dice
    assert line["loss"] == pytest.approx(sum(line[name] for name in parts), rel=1e-5)
    assert "grad_cosine" not in line  # the conflict between task and distillation
    assert line["weight/aux"] == 0.4
    assert f"task: {task}\n" in (tmp_path / "config.yaml").read_text()

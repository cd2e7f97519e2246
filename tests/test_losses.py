"""The modules pass their options to the functions, and NFDLoss matches channels and sizes."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F

import fastkd

S, T = torch.randn(2, 2, 4, 6, 6)
Y = torch.randint(0, 4, (2, 12, 12))

CASES = [
    (fastkd.NFDLoss, fastkd.nfd_loss, {"dims": "c", "eps": 1e-3, "reduction": "sum"}, (S, T), {}),
    (fastkd.CWDLoss, fastkd.cwd_loss, {"temperature": 2.0, "reduction": "none"}, (S, T), {}),
    (fastkd.KDLoss, fastkd.kd_loss, {"temperature": 2.0, "ignore_index": 1}, (S, T), {"target": Y[:, :6, :6]}),
    (
        fastkd.ResizedCrossEntropyLoss,
        fastkd.resized_cross_entropy,
        {"class_weight": torch.rand(4), "align_corners": True, "reduction": "batchmean"},
        (S, Y),
        {"pixel_weight": torch.rand(2, 3, 3)},
    ),
    (
        fastkd.ResizedOHEMCrossEntropyLoss,
        fastkd.resized_ohem_cross_entropy,
        {"threshold": 0.4, "min_kept": 30, "class_weight": torch.rand(4), "align_corners": True},
        (S, Y),
        {},
    ),
    (
        fastkd.ResizedCrossEntropyLoss,
        fastkd.resized_cross_entropy,
        {"label_smoothing": 0.2, "ignore_index": 1},
        (S, Y),
        {},
    ),
    (fastkd.ResizedCrossEntropyLoss, fastkd.resized_cross_entropy, {"focal_gamma": 2.0}, (S, Y), {}),
    (
        fastkd.ResizedDiceLoss,
        fastkd.resized_dice_loss,
        {
            "batch": False,
            "smooth": 0.1,
            "square": True,
            "background": False,
            "present": True,
            "ignore_index": 1,
            "class_weight": torch.rand(4),
            "align_corners": True,
            "reduction": "none",
        },
        (S, Y),
        {},
    ),
    (
        fastkd.ResizedBinaryCrossEntropyLoss,
        fastkd.resized_binary_cross_entropy,
        {"pos_weight": torch.rand(4), "align_corners": True, "reduction": "sum", "ignore_index": 1},
        (S, Y[:, None].expand(2, 4, 12, 12).clamp(max=1)),
        {"pixel_weight": torch.rand(2, 3, 3)},
    ),
    (fastkd.KDLoss, fastkd.kd_loss, {"activation": "sigmoid"}, (S, T), {}),
    (
        fastkd.ResizedKDLoss,
        fastkd.resized_kd_loss,
        {"size": (12, 12), "activation": "sigmoid", "ignore_index": 1},
        (S, T),
        {"target": Y},
    ),
    (
        fastkd.ResizedKDLoss,
        fastkd.resized_kd_loss,
        {"size": (12, 12), "temperature": 2.0, "align_corners": True, "reduction": "mean_all"},
        (S, T),
        {"target": Y},
    ),
]


@pytest.mark.parametrize(("module", "function", "options", "args", "call"), CASES, ids=[c[0].__name__ for c in CASES])
def test_module_is_the_function(module, function, options, args, call):
    loss = module(**options, loss_weight=3.0)
    torch.testing.assert_close(loss(*args, **call), 3 * function(*args, **options, **call))
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        torch.testing.assert_close(twin(*args, **call), loss(*args, **call))
    assert "loss_weight=3.0" in repr(loss)


@pytest.mark.parametrize(("module", "function"), [case[:2] for case in CASES] + [(fastkd.RDDLoss, fastkd.rdd_loss)])
def test_defaults_are_the_functions(module, function):
    """Each keyword has the same default in the module and in the function."""
    options = inspect.signature(module).parameters
    shared = [p for p in inspect.signature(function).parameters.values() if p.name in options and p.name != "blend"]
    assert shared
    for p in shared:
        if p.default is not inspect.Parameter.empty:
            assert options[p.name].default == p.default, p.name


def test_module_of_cross_entropy_and_dice():
    """The module's weight multiplies all three numbers."""
    options = {
        "ce_weight": 0.5,
        "dice_weight": 2.0,
        "class_weight": torch.rand(4),
        "label_smoothing": 0.1,
        "smooth": 1e-5,
    }
    options |= {"batch": False, "square": True, "background": False, "present": True, "align_corners": True}
    options["ignore_index"] = 1
    module = fastkd.ResizedCrossEntropyDiceLoss(**options, loss_weight=3.0)
    want = fastkd.resized_cross_entropy_dice_loss(S, Y, **options)
    for loss in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(loss(S, Y), fastkd.CEDiceOutput(*[3 * x for x in want]))
    assert "dice_weight=2.0" in repr(module)
    defaults = inspect.signature(fastkd.resized_cross_entropy_dice_loss).parameters
    for name, p in inspect.signature(fastkd.ResizedCrossEntropyDiceLoss).parameters.items():
        assert name == "loss_weight" or p.default == defaults[name].default


def test_adapter_and_resize():
    loss = fastkd.NFDLoss(4, 7, dims="nhw")
    assert [p.shape for p in loss.parameters()] == [(7, 4, 1, 1)]
    teacher = torch.randn(2, 7, 9, 11)
    value = loss(S, teacher)
    resized = F.interpolate(teacher, (6, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(value, fastkd.nfd_loss(loss.adapter(S), resized, dims="nhw"))
    value.backward()
    assert loss.adapter.weight.grad.abs().sum() > 0


def test_adapter_learns():
    """The adapter alone can learn to invert a linear map of the channels."""
    torch.manual_seed(0)
    student = torch.randn(2, 4, 16, 16)
    teacher = torch.einsum("ij,njhw->nihw", torch.randn(6, 4), student)
    loss = fastkd.NFDLoss(4, 6)
    optimiser = torch.optim.Adam(loss.parameters(), lr=0.05)
    for _ in range(150):
        optimiser.zero_grad()
        value = loss(student, teacher)
        value.backward()
        optimiser.step()
    assert value < 0.01


def test_state_dict_holds_only_what_is_trained():
    assert list(fastkd.NFDLoss(4, 6).state_dict()) == ["adapter.weight"]
    assert not fastkd.RDDLoss(10, class_weight=torch.ones(4)).state_dict()


def test_class_weight_moves_with_the_module():
    loss = fastkd.ResizedCrossEntropyLoss(class_weight=[1.0, 2.0, 3.0, 4.0]).double()
    assert loss.class_weight.dtype == torch.float64

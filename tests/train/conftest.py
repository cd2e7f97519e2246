"""Fixtures shared by the trainer's tests."""

import pytest

from tests.train import tiny


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """Checkpoint of a network with an auxiliary head, wider than the students of `tiny.config`."""
    out = tmp_path_factory.mktemp("teacher")
    tiny.run(tiny.config(out, aux=True, width=64))
    return str(out / "last.pt")


@pytest.fixture
def quick(monkeypatch):
    """Skips the steps after training: the report and the loss timing."""
    from fastkd.train.engine import Run

    monkeypatch.setattr(Run, "_report", lambda self: None)
    monkeypatch.setattr(Run, "_loss_cost", lambda self: None)

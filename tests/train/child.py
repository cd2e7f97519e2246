"""Runs in separate processes for the tests: `python -m tests.train.child killed|shared|few OUT TEACHER`."""

import sys
from pathlib import Path

from fastkd.train import checkpoint
from fastkd.train.config import EvalConfig
from tests.train import tiny

STEPS = 12


def killed(out, teacher):
    """NFD+RDD with an auxiliary head, EMA weights and unlabelled images; a checkpoint after every step."""
    train = {"steps": STEPS, "checkpoint_every": 1, "ema": 0.9, "panels": 0}
    return unlabelled(tiny.config(out, method="nfd+rdd", teacher=teacher, aux=True, train=train))


def unlabelled(config):
    """The same run with half the labels; half of each batch comes from the unlabelled images."""
    config.data.labelled, config.data.unlabelled = "1/2", "rest"
    return config


def shared(out, teacher, *, accumulate=1, few=False):
    """KD and NFD besides the task, without dropout and batch statistics, so that nothing depends on how the batch is
    split.

    No loss uses the auxiliary head. few: with unlabelled images.
    """
    train = {"steps": 3, "accumulate": accumulate, "batch_norm": "frozen", "panels": 0, "checkpoint_every": 3}
    evaluation = EvalConfig(every=2, batch_size=2, limit=3)  # not divisible by two processes
    config = tiny.config(
        out, method="kd+nfd", teacher=teacher, aux=True, options={"decoder_dropout": 0.0}, train=train, eval=evaluation
    )
    config.loss.aux_weight = 0.0
    if few:
        config.train.batch_size = 8
        return unlabelled(config)
    return config


if __name__ == "__main__":
    kind, out, teacher = sys.argv[1:]
    config = killed(out, teacher) if kind == "killed" else shared(out, teacher, accumulate=2, few=kind == "few")
    tiny.run(config, resume=checkpoint.exists(Path(out)))

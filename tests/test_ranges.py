"""Every number of the configuration and of the commands is validated on input against a range that --help shows."""

import argparse
import dataclasses
import re
import subprocess
import sys
import typing
from typing import Annotated

import pytest

from fastkd import cli, ranges
from fastkd.ranges import Count, Numbers, Positive, Range, Share


@pytest.mark.parametrize(
    ("limits", "inside", "outside", "words"),
    [
        (Range(), (-5, 0, 1e300), (float("inf"), float("nan")), "finite"),
        (Range(low=0), (0, 3), (-1e-9, float("inf")), "at least 0"),
        (Range(above=0), (1e-9,), (0, -1, float("nan")), "above 0"),
        (Range(0, 1), (0, 0.5, 1), (-0.1, 1.1), "0 to 1"),
        (Range(low=0, below=1), (0, 0.9), (1, -0.1), "at least 0 and below 1"),
        (Range(above=0, high=1), (0.1, 1), (0, 1.1), "above 0 and at most 1"),
    ],
)
def test_a_range(limits, inside, outside, words):
    assert all(value in limits for value in inside)
    assert not any(value in limits for value in outside)
    assert repr(limits) == words


@dataclasses.dataclass
class Inner:
    pair: tuple[Count, Count] = (1, 2)
    weights: tuple[Positive, ...] | None = None


@dataclasses.dataclass
class Outer:
    share: Share = 0.5
    inner: Inner = dataclasses.field(default_factory=Inner)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"share": 2}, "share must be a number 0 to 1, got 2"),
        ({"share": True}, "share must be a number 0 to 1, got True"),
        ({"share": "x"}, "share must be a number 0 to 1, got 'x'"),
        ({"inner": Inner((1, 0))}, "inner.pair must be 2 values, each a whole number at least 1, got (1, 0)"),
        ({"inner": Inner((1, 2, 3))}, "inner.pair must be 2 values"),
        ({"inner": Inner((1, 1.5))}, "inner.pair must be 2 values"),
        ({"inner": Inner(weights=(1, -1))}, "inner.weights must be a list, each a number above 0 or null, got (1, -1)"),
    ],
)
def test_values_inside_dataclasses(values, says):
    ranges.check(Outer())
    ranges.check(Outer(inner=Inner(weights=(1.0, 2))))
    with pytest.raises(ValueError, match=re.escape(says)):
        ranges.check(Outer(**values))


def test_options_of_a_command(capsys):
    parser = Numbers("x")
    parser.add_argument("--limit", type=Count, help="images")
    assert parser.parse_args(["--limit", "3"]).limit == 3
    for word in ("0", "-1", "1.5", "nan", "x"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--limit", word])
        assert f"--limit: must be a whole number at least 1, got '{word}'" in capsys.readouterr().err
    assert "images (a whole number at least 1)" in parser.format_help()
    parser.add_argument("--size", type=ranges.Size)
    assert parser.parse_args(["--size", "3,4"]).size == (3, 4)
    for word in ("3", "3,0", "3,4,5", "3,x"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--size", word])
        assert f"--size: must be 2 values, each a whole number at least 1, got '{word}'" in capsys.readouterr().err


def numbers(hint):
    """The numeric types of an annotation, each with whether it has a range."""
    if typing.get_origin(hint) is Annotated:
        yield hint, any(isinstance(part, Range) for part in hint.__metadata__)
    elif hint in (int, float):
        yield hint, False
    else:
        for part in typing.get_args(hint):
            yield from numbers(part)


def values(kind, prefix=""):
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from values(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint


def test_every_number_of_the_configuration_has_a_range_and_help_shows_it():
    pytest.importorskip("jsonargparse")
    from fastkd.train.config import Config

    found = {name: [has for _, has in numbers(hint)] for name, hint in values(Config)}
    assert sum(map(len, found.values())) > 60
    assert not [name for name, has in found.items() if not all(has)]
    shown = subprocess.run(
        [sys.executable, "-m", "fastkd.cli", "train", "--help"], capture_output=True, text=True, check=True
    ).stdout
    shown = re.sub(r"\s+", " ", shown)
    for option, words in (("optim.clip", "above 0"), ("train.ema", "above 0 and below 1"), ("data.flip", "0 to 1")):
        assert re.search(rf"--{option} [^-]*; {words}\.", shown)


def test_every_number_of_a_data_set_has_a_range_and_help_shows_it(capsys):
    pytest.importorskip("jsonargparse")
    pytest.importorskip("torchvision")
    from fastkd.train.config import parse
    from fastkd.train.data import KINDS, build_dataset

    hints = [hint for kind in KINDS.values() for name, hint in ranges._hints(kind).items() if name != "values"]
    assert sum(True for hint in hints for _ in numbers(hint)) == 6
    assert all(has for hint in hints for _, has in numbers(hint))  # values: layouts.py checks what it maps
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "length of street_scenes, a whole number at least 1 or null" in shown
    assert "first of folders, a whole number 0 to 255" in shown
    with pytest.raises(ValueError, match=r"data\.options\.length must be a whole number at least 1 or null, got 0"):
        build_dataset("street_scenes", split="train", length=0)


def test_every_number_of_a_command_has_a_range(monkeypatch):
    """No parser of the command line is given a bare int or float."""
    bare = []
    plain = argparse.ArgumentParser.add_argument

    def watch(self, *names, **options):
        if options.get("type") in (int, float):
            bare.append(names)
        return plain(self, *names, **options)

    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", watch)
    for command in ("eval", "predict", "export", "report", "demo", "bench", "info"):
        with pytest.raises(SystemExit):
            cli.COMMANDS[command](["--help"])
    assert not bare

"""Configuration: YAML, overrides from the command line, round trips, error messages."""

import re
from pathlib import Path

import pytest

pytest.importorskip("jsonargparse")

from fastkd.train.config import (
    Config,
    differences,
    from_dict,
    parse,
    parse_method,
    to_dict,
    write_yaml,
)


def test_command_line_wins_over_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "seed: 7\noptim: {lr: 0.5, name: adamw}\ndata: {crop: [64, 96]}\nmodel: {features: {a: 'encoder[-2]'}}\n"
    )
    config, flags = parse(["--config", str(path), "--optim.lr", "0.25", "--eval.size", "[32, 64]", "--resume"])
    assert (config.seed, config.optim.lr, config.optim.name) == (7, 0.25, "adamw")
    assert config.data.crop == (64, 96)
    assert config.eval.size == (32, 64)
    assert config.model.features == {"a": "encoder[-2]"}
    assert config.train == Config().train
    assert flags == {"resume": True, "overwrite": False}


def test_round_trip(tmp_path):
    config, _ = parse(
        ["--method", "nfd+rdd", "--teacher", "t.pt", "--data.options", '{"length": 8}', "--loss.rdd.tfe_steps", "0"]
    )
    assert from_dict(Config, to_dict(config)) == config
    write_yaml(config, tmp_path / "config.yaml")
    assert parse(["--config", str(tmp_path / "config.yaml")])[0] == config


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--loss.rdd.class_weight", "cityscapes"], "cityscapes"),
        (["--loss.rdd.class_weight", "[1.0, 2.5]"], (1.0, 2.5)),
        (["--loss.at.features", "[low, high]"], ("low", "high")),
        (["--loss.cwd.compare", "both"], "both"),
        (["--model.features", "null"], None),
        (["--model.channels", "bgr"], "bgr"),
    ],
)
def test_values_of_losses_and_models(words, value, tmp_path):
    def find(config):
        for name in words[0].removeprefix("--").split("."):
            config = getattr(config, name)
        return config

    config, _ = parse(words)
    assert find(config) == value
    assert from_dict(Config, to_dict(config)) == config
    write_yaml(config, tmp_path / "config.yaml")
    assert parse(["--config", str(tmp_path / "config.yaml")])[0] == config


def test_from_dict_names_unknown_fields():
    with pytest.raises(ValueError, match="OptimConfig has no field speed"):
        from_dict(Config, {"optim": {"speed": 1}})


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--optim.lrr", "1"], "no value optim.lrr; did you mean optim.lr"),
        (["--config", "{optim: {lrr: 1}}"], "no value optim.lrr; did you mean optim.lr"),
        (["--config", "{optm: {lr: 1}}"], "no value optm"),
        (["--metod", "kd"], "no value metod; did you mean method"),
        (["--config", "{optim: 3}"], "optim is a group of values, such as optim.name; got 3"),
        (["--config", "absent.yaml"], "no file"),
        (["--config", "camvid-lite0-teacher"], "--recipe camvid-lite0-teacher"),
        (["--recipe", "rdd-papr"], "no recipe 'rdd-papr'; did you mean 'rdd-paper'?"),
        (["--eval.stride", "[4, 4]"], "set eval.window"),
        (["--optim.lr", "fast"], "optim.lr must be a number above 0, got fast\n"),
        (["--method", "kd+foo", "--teacher", "t.pt"], "unknown loss 'foo'"),
        (["--method", "kd"], "needs a teacher"),
        (["--train.steps", "0"], "train.steps must be a whole number at least 1, got 0"),
        (["--optim.clip", "-1"], "optim.clip must be a number above 0 or null, got -1"),
        (["--optim.clip", "0"], "optim.clip must be a number above 0"),
        (["--optim.lr", "nan"], "optim.lr must be a number above 0, got nan"),
        (["--train.batch_size", "2.5"], "train.batch_size must be a whole number at least 1, got 2.5"),
        (["--loss.kd.weight", "-1"], "loss.kd.weight must be a number at least 0, got -1"),
        (["--data.scale", "[2, 1]"], "low at most high"),
        (
            ["--config", "{train: {precision: no}}"],
            "train.precision must be 'no' or 'fp16' or 'bf16', got False; YAML reads a bare",
        ),
    ],
)
def test_errors_name_the_option(words, says, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(words)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.promise("no-code")
def test_yaml_runs_no_code(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"out: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]\n")
    with pytest.raises(SystemExit):
        parse(["--config", str(path)])
    assert not (tmp_path / "made").exists()


def test_parse_method():
    assert parse_method("none") == ()
    assert parse_method("nfd+rdd") == ("nfd", "rdd")
    with pytest.raises(ValueError, match="twice"):
        parse_method("kd+kd")
    with pytest.raises(ValueError, match="unknown loss"):
        parse_method("none+kd")


def test_differences_ignore_where_a_run_is_kept():
    a, b = to_dict(Config()), to_dict(Config(out="elsewhere", name="x", seed=1))
    b["optim"]["lr"] = 9
    assert differences(a, b) == ["optim.lr", "seed"]


DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["models.md", "training.md"])
def test_configurations_of_the_docs_are_read(page, tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        (tmp_path / "run.yaml").write_text(block)
        parse(["--config", str(tmp_path / "run.yaml")])

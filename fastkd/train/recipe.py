"""Recipes: YAML files in `recipes/`, each with a published run's differences from the defaults.

Two keys are special. `base` names the recipe that this one extends; `sets` holds overrides per data set. For a data
set, the layers are: the base, its `sets`, the recipe, its `sets`; later ones win. A final value of null means the
default.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml

RECIPES = Path(__file__).with_name("recipes")


def names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load(name: str, data: str | None = None) -> dict[str, Any]:
    """The values of recipe `name` for data set `data`; None: the recipe's own. ValueError for an unknown recipe."""
    values = _read(name)
    chain = [values]
    while base := values.pop("base", None):
        values = _read(base)
        chain.insert(0, values)
    own: dict[str, Any] = {}
    for values in chain:
        own = merge(own, values)
    data = data or own["data"]["name"]
    merged: dict[str, Any] = {}
    for values in chain:
        there = values.pop("sets", {}).get(data, {})
        merged = merge(merge(merged, values), there)
    return _given(merge(merged, {"data": {"name": data}}))


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Drops null values."""
    return {k: _given(v) if isinstance(v, dict) else v for k, v in values.items() if v is not None}


def _read(name: str) -> dict[str, Any]:
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"no recipe {name!r}; {hint}The package has {', '.join(names())}. A file of your own is given by --config FILE"
        )
    return yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` merged into `base` recursively; neither is changed."""
    both = {k: merge(base[k], v) for k, v in over.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return base | over | both

"""Fresh virtual environments with a few of this one's packages only, without downloads."""

from __future__ import annotations

import importlib.metadata as metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement


def clean(folder: Path, packages: tuple[str, ...]) -> str:
    """Creates a virtual environment with ``packages`` and their requirements; returns the path of its Python."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    site = next((folder / "lib").glob("python3*")) / "site-packages"
    for entry in {file for name in closure(packages) for file in top_level(name)}:
        link = site / entry.name
        if link.is_dir() and not link.is_symlink():
            shutil.rmtree(link)  # setuptools from venv, in an old version
        if not link.exists():
            link.symlink_to(entry)
    return str(folder / "bin" / "python")


def closure(packages: tuple[str, ...]) -> set[str]:
    """The packages and their installed requirements, recursively."""
    found: set[str] = set()
    todo = list(packages)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            needed = map(Requirement, requires)
            todo += [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def top_level(name: str) -> set[Path]:
    """What a package installs in site-packages."""
    files = metadata.files(name) or []
    return {
        Path(str(f.locate())).parents[len(f.parts) - 2] if len(f.parts) > 1 else Path(str(f.locate()))
        for f in files
        if f.parts[0] != ".."
    }

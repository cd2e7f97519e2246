"""Fresh virtual environments with a few packages of this one and nothing else, without a download."""

from __future__ import annotations

import importlib.metadata as metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement


def clean(folder: Path, packages: tuple[str, ...]) -> str:
    """Makes a virtual environment that sees ``packages`` and what they require; the path of its Python."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    site = next((folder / "lib").glob("python3*")) / "site-packages"
    for entry in {file for name in closure(packages) for file in top_level(name)}:
        link = site / entry.name
        if link.is_dir() and not link.is_symlink():
            shutil.rmtree(link)  # what venv has put there: setuptools, in an old version
        if not link.exists():
            link.symlink_to(entry)
    return str(folder / "bin" / "python")


def closure(packages: tuple[str, ...]) -> set[str]:
    """The packages and, as far as they are installed, what they require."""
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
    """What a package has put into site-packages."""
    files = metadata.files(name) or []
    return {
        Path(str(f.locate())).parents[len(f.parts) - 2] if len(f.parts) > 1 else Path(str(f.locate()))
        for f in files
        if f.parts[0] != ".."
    }

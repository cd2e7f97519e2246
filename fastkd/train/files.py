"""Files that are whole or not there: written beside their place, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], object], *, previous: Path | None = None) -> None:
    """`write(beside)` makes the file, which then takes the place of `path`: at any moment `path` is the old file or the new.

    previous: keeps what `path` was before under this name.
    """
    beside = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(beside)
        _flush(beside)
        if previous is not None and path.exists():
            _keep(path, previous)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    _flush(path.parent)


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_json(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2) + "\n")


def _keep(path: Path, previous: Path) -> None:
    link = previous.with_name(previous.name + ".tmp")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
    except OSError:  # a file system without links: for an instant there is only `previous`
        os.replace(path, previous)
    else:
        os.replace(link, previous)


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk: a rename may reach it before what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems cannot flush a folder; a failed flush of a file is a failed write
            raise
    finally:
        os.close(handle)

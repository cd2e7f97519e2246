"""Atomic file writes: written to a temporary file, flushed to disk, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], object], *, previous: Path | None = None) -> None:
    """`write(beside)` creates the new file, which then replaces `path` atomically.

    previous: name under which the old file is kept.
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
    except OSError:  # no hard links: briefly only `previous` exists
        os.replace(path, previous)
    else:
        os.replace(link, previous)


def _flush(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to disk: a rename may otherwise reach it before the data."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems cannot flush folders; a failed flush of a file is an error
            raise
    finally:
        os.close(handle)

"""Files that are complete or absent, JSON, and the folder where derived files are kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastcon.errors import FastconError


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a crash at any moment leaves either the old or the new one, complete."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise FastconError(
            f"{path} cannot be written ({error.strerror}): free space, then run the same command again"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, completely or not at all."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def _sync_folder(folder: Path) -> None:
    """Make a rename in a folder survive a crash."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def cache_folder(kind: str) -> Path:
    """Where caches live: $FASTCON_CACHE, else $XDG_CACHE_HOME/fastcon, else ~/.cache/fastcon."""
    base = os.environ.get("FASTCON_CACHE")
    if base is None:
        base = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "fastcon")
    return Path(base) / kind


def remembered(kind: str, case: list[Any], measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The result of `measure` for a case: from the cache if it was measured before, else measured now and cached if possible."""
    path = cache_folder(kind) / f"{hashlib.sha256(json.dumps(case).encode()).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        return {name: float(value) for name, value in json.loads(path.read_text())["measured"].items()}
    measured = measure()
    with contextlib.suppress(OSError, FastconError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"case": case, "measured": measured})
    return measured


def derived(path: Path, make: Callable[[Path], None]) -> Path:
    """A file or folder derived from others: made by `make(partial)` and renamed into place, unless it is there.

    Processes that make the same one at once do not disturb each other: the first to finish wins. Raises OSError.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        make(partial)
        os.rename(partial, path)
    except OSError:
        if not path.exists():  # else another process was first
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            partial.unlink()
    return path

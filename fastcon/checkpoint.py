"""Files that are whole or not there, and the checkpoints of a run."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from fastcon.errors import FastconError

KEEP = 2


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old one or the new one, whole."""
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


def _sync_folder(folder: Path) -> None:
    """Make a rename in a folder last."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def save(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write the checkpoint of a step and forget all but the newest two."""
    import io

    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(folder / f"step-{step:09d}.pt", buffer.getvalue())
    for old in _found(folder)[:-KEEP]:
        old.unlink()


def newest(folder: Path) -> dict[str, Any] | None:
    """The newest readable checkpoint, or None. Only tensors and plain values are ever loaded."""
    for path in reversed(_found(folder)):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception:
            continue
    return None


def _found(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*.pt") if re.fullmatch(r"step-\d{9}\.pt", path.name))

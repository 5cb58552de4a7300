"""The one error class of fastcon: a message for the person who can act on it."""

from __future__ import annotations

import importlib
from types import ModuleType


class FastconError(Exception):
    """An error the user can fix: the message names both sides and the way out, on one line."""


class UsageError(FastconError):
    """An invalid option: the command line exits with 2 for it."""


class Interrupted(FastconError):
    """A signal asked the run to stop; its state is saved and the same command resumes it."""


class Busy(FastconError):
    """Another process is writing what this one wants to write."""


def optional_import(module: str, extra: str) -> ModuleType:
    """Import `module`, or say which extra of fastcon brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise FastconError(f"{module} is not installed ({error}): pip install 'fastcon[{extra}]' brings it") from error


def one_line(error: BaseException, most: int = 160) -> str:
    """What an exception says, on one line of at most so many characters."""
    return " ".join(str(error).split())[:most] or type(error).__name__

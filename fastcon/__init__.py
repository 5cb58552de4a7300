"""fastcon: many teachers, stored logits, one student (representation consolidation, arXiv 2107.08039).

The public names below load on first use, so that `import fastcon` and `fastcon --help` stay quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastcon import probe as probe
    from fastcon.errors import FastconError as FastconError
    from fastcon.loader import Loader as Loader
    from fastcon.models import load as load
    from fastcon.objective import loss as loss
    from fastcon.store import Store as Store

__version__ = "0.1.0"
__all__ = ["FastconError", "Loader", "Store", "load", "loss", "probe"]

_HOMES = {"FastconError": "errors", "Loader": "loader", "Store": "store", "load": "models", "loss": "objective"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"fastcon.{_HOMES[name]}"), name)
    if name == "probe":
        return importlib.import_module("fastcon.probe")
    raise AttributeError(f"module 'fastcon' has no attribute {name!r}")

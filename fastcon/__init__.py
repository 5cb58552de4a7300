"""fastcon: many teachers, stored logits, one student (representation consolidation, arXiv 2107.08039).

The public names below load on first use, so that `import fastcon` and `fastcon --help` stay quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastcon.api import precompute as precompute
    from fastcon.api import train as train
    from fastcon.distill.loader import Loader as Loader
    from fastcon.distill.loss import loss as loss
    from fastcon.errors import FastconError as FastconError
    from fastcon.models.load import load as load
    from fastcon.store.reader import Store as Store
    from fastcon.transfer.few_shot import few_shot as few_shot
    from fastcon.transfer.solvers import LinearSVM as LinearSVM

__version__ = "0.1.0"
_HOMES = {
    "FastconError": "errors",
    "LinearSVM": "transfer.solvers",
    "Loader": "distill.loader",
    "Store": "store.reader",
    "few_shot": "transfer.few_shot",
    "load": "models.load",
    "loss": "distill.loss",
    "precompute": "api",
    "train": "api",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"fastcon.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'fastcon' has no attribute {name!r}")

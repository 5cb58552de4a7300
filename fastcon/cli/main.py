"""Entry point of `fastcon`: the group with all its commands."""

from __future__ import annotations

from fastcon.cli import distill, images, results, transfer
from fastcon.cli.group import main

__all__ = ["distill", "images", "main", "results", "transfer"]

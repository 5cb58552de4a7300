"""Benchmarks: each compares fastcon with what a user would pick instead, on the same input, interleaved in one run.

A benchmark returns rows of at least name, ours, theirs, unit, ratio (larger is better), n and device; `record` puts the
command, commit, hardware and versions beside them.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastcon import run

Row = dict[str, Any]
Say = Callable[[str], None]


def record(rows: list[Row]) -> dict[str, Any]:
    """The rows with what made them."""
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    cores = len(os.sched_getaffinity(0))
    return {
        "command": " ".join(["fastcon", *(os.path.basename(part) for part in sys.argv[1:])]),  # no places of a machine
        "commit": commit.stdout.strip() or None,
        "hardware": {"cpu": _cpu(), "cores": cores, "machine": platform.machine(), **gpu},
        "versions": run.versions(),
        "rows": rows,
    }


def results_folder() -> Path | None:
    """benchmarks/results of the checkout that this code runs from; None for an installed package."""
    folder = Path(__file__).parents[2] / "benchmarks"
    return folder / "results" if (folder / "README.md").is_file() else None


def interleave(variants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call every variant in turn, `rounds` times over, after one call each to warm up; what each returned."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, variant in variants.items():
            value = variant()
            if number:
                found[name].append(value)
    return found


def compared(name: str, ours: list[float], theirs: list[float], unit: str, device: str, **facts: Any) -> Row:
    """A row of medians; the ratio is the median over rounds. Units ending in /s are better when larger."""
    rate = unit.endswith("/s")
    ratios = [a / b if rate else b / a for a, b in zip(ours, theirs, strict=True)]
    return {
        "name": name,
        "ours": statistics.median(ours),
        "theirs": statistics.median(theirs),
        "unit": unit,
        "ratio": statistics.median(ratios),
        "n": len(ratios),
        "device": device,
        **facts,
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()

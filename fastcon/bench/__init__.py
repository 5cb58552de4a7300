"""Benchmarks: each compares fastcon with what a user would pick instead, on the same input, interleaved in one run.

A benchmark returns rows of at least name, ours, theirs, unit, ratio (larger is better), n and device; `record` puts the
command, commit, hardware and versions beside them.
"""

from __future__ import annotations

import importlib
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastcon.cores import cores, cpu_name
from fastcon.errors import UsageError
from fastcon.files import write_json
from fastcon.machine import choose_device
from fastcon.run import versions

Row = dict[str, Any]
Say = Callable[[str], None]


def record(rows: list[Row]) -> dict[str, Any]:
    """The rows with what made them."""
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "command": " ".join(["fastcon", *(os.path.basename(part) for part in sys.argv[1:])]),  # no places of a machine
        "commit": commit.stdout.strip() or None,
        "hardware": {"cpu": cpu_name(), "cores": cores(), "machine": platform.machine(), **gpu},
        "versions": versions(),
        "rows": rows,
    }


TAKES = {
    "images": ("loader", "train", "probe"),
    "backbone": ("probe",),
    "store": ("store",),
    "device": ("kernel", "loader", "train", "probe", "probe_full", "start"),
}
"""The benchmarks that take an option."""


def run(what: str, say: Say, given: dict[str, Any]) -> list[Row]:
    """Run a benchmark by name with the options given to it. Raises UsageError for one that is not its own."""
    for name in given:
        if what not in TAKES[name]:
            raise UsageError(f"`{name}` is for {', '.join(TAKES[name])}, not for bench {what}")
    if what == "probe" and ("images" in given) != ("backbone" in given):
        raise UsageError("bench probe takes `images` and `backbone` together: features of one by the other")
    options = dict(given)
    if "store" in options:
        options["logits_of"] = options.pop("store")
    if what in TAKES["device"]:
        options["device"] = choose_device(options.get("device", "auto"))
    return importlib.import_module(f"fastcon.bench.{what}").bench(say, **options)


def keep(what: str, rows: list[Row]) -> None:
    """Write the record of a benchmark to benchmarks/results, where fastcon runs from a checkout."""
    folder = results_folder()
    if folder is not None:
        folder.mkdir(exist_ok=True)
        write_json(folder / f"{what}-{rows[0]['device']}.json", record(rows))


def results_folder() -> Path | None:
    """benchmarks/results of the checkout that this code runs from; None for an installed package."""
    folder = Path(__file__).parents[2] / "benchmarks"
    return folder / "results" if (folder / "README.md").is_file() else None


def interleave(variants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call every variant in turn, `rounds` times, after one call each to warm up; returns their results."""
    results: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, variant in variants.items():
            value = variant()
            if number:
                results[name].append(value)
    return results


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

"""A probe on all images of a large task against scikit-learn: the whole protocol, and its memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from fastcon.bench import Row, Say
from fastcon.bench.probe import FOLDS, features_like_resnets, objective
from fastcon.data import splits
from fastcon.transfer.few_shot import C_GRID, few_shot
from fastcon.transfer.solvers import LinearSVM


def bench(
    say: Say,
    device: torch.device,
    classes: int = 100,
    images: int = 160,
    width: int = 2048,
    test_images: int = 4000,
    fitted: int = 3,
) -> list[Row]:
    """C chosen on 5 folds of all images, and the final fit: against as many fits by LinearSVC(dual=False), extrapolated.

    Features are synthetic, of `images` a class. Ours runs in a process of its own, whose peak memory is read. scikit-learn
    is timed on `fitted` of the one-vs-rest problems of one fold, for each C, with its defaults; `objective_excess` is the
    most by which the objective it stops at is above ours there, relative.
    """
    shape = [classes, images, width, test_images]
    command = [sys.executable, "-m", "fastcon.bench.probe_full", str(device), *map(str, shape)]
    ours = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
    say(f"ours {ours['seconds']:.0f} s, {ours['megabytes']:,.0f} MB, accuracy {ours['accuracy']:.2%}")
    seconds, excess = _sklearn(classes, images, width, fitted, say)
    theirs = seconds * classes / fitted * (FOLDS * len(C_GRID) + 1) / len(C_GRID)
    row: Row = {"name": "probe_full", "ours": ours.pop("seconds"), "theirs": theirs, "unit": "s"}
    row |= {"ratio": theirs / row["ours"], "n": 1, "device": device.type, "objective_excess": excess, **ours}
    row["case"] = f"{classes * images:,} rows x {width:,} features x {classes} classes, {len(C_GRID)} C, {FOLDS} folds"
    row["theirs_is"] = f"extrapolated from {fitted * len(C_GRID)} of {classes * (FOLDS * len(C_GRID) + 1):,} fits"
    return [row]


def _sklearn(classes: int, images: int, width: int, fitted: int, say: Say) -> tuple[float, float]:
    """Seconds of a fit of each of some classes and each C on four fifths of the rows, and the most that one misses."""
    from sklearn.svm import LinearSVC

    x, y = features_like_resnets(classes, images, width)
    inside = splits.fold_of(np.arange(len(y), dtype=np.uint64), y, FOLDS, 0, 0) != 0
    x, y, total, excess = x[inside], y[inside], 0.0, 0.0
    for cost in C_GRID:
        seconds = 0.0
        for label in np.linspace(0, classes - 1, fitted).astype(int):
            started = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # where it stops at max_iter: that is its default, and so its time
                theirs = LinearSVC(C=cost, dual=False).fit(x, y == label)
            seconds += time.perf_counter() - started
            best, reached = (
                objective(model, x, y == label, cost) for model in (LinearSVM(cost).fit(x, y == label), theirs)
            )
            excess = max(excess, reached / best - 1)
        say(f"  LinearSVC(C={cost:g}, dual=False): {seconds / fitted:.2f} s a class")
        total += seconds
    return total, excess


def _peak_megabytes() -> float:
    """Of this process alone: getrusage's is at least that of the process which started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """The probe alone: for a process that is measured."""
    device, classes, images, width, test_images = sys.argv[1], *map(int, sys.argv[2:])
    data = (
        features_like_resnets(classes, n, width, seed) for seed, n in enumerate((images, -(-test_images // classes)))
    )
    (x, y), (test_x, test_y) = data
    started = time.perf_counter()
    result = few_shot(x, y, test_x, test_y, shots=None, device=device)
    measured = {
        "seconds": time.perf_counter() - started,
        "megabytes": _peak_megabytes(),
        "accuracy": result.mean,
        "chosen_c": result.chosen_c[0],
        "largest_duality_gap": result.gaps[0],
    }
    print(json.dumps(measured))


if __name__ == "__main__":
    main()

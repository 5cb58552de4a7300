"""The few-shot protocol against scikit-learn."""

from __future__ import annotations

import time
import warnings

import numpy as np
from numpy.typing import NDArray

from fastcon import probe, splits
from fastcon.bench import Row, Say
from fastcon.solvers import SOLVERS

FOLDS, SHOTS = 5, 5


def features_like_resnets(
    classes: int, images: int, width: int, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Synthetic features [classes * images, width] as a ResNet's are: non-negative, of norm about 25, strongly correlated.

    A common mean, 64 directions of falling strength in which classes differ and overlap, a little noise of each feature.
    """
    world, random = np.random.default_rng(12345), np.random.default_rng(seed)
    directions = world.normal(0, 0.5, (64, width)) / np.sqrt(np.arange(1, 65))[:, None]
    centres, mean = world.normal(0, 0.6, (classes, 1, 64)), np.abs(world.normal(0, 1, width))
    inner = centres + random.normal(0, 1, (classes, images, 64))
    x = np.maximum(mean + inner @ directions + random.normal(0, 0.2, (classes, images, width)), 0).reshape(-1, width)
    return (x * (25 / np.linalg.norm(x, axis=1).mean())).astype(np.float32), np.repeat(np.arange(classes), images)


def bench(say: Say, classes: int = 98, width: int = 2048, trials: int = 50, test_images: int = 4000) -> list[Row]:
    """The few-shot protocol: all trials with the batched solver, against GridSearchCV(LinearSVC) on the same draws.

    scikit-learn is timed on one fit for each C (one fold of the first trial) and extrapolated to trials x (folds x
    values of C + 1) fits, for unscaled features and for features of norm 1. Agreement is measured in full on a
    smaller problem (20 classes x 512 features, 20 trials), with scikit-learn fitted in the span of the training rows.
    """
    rows = []
    x, y = features_like_resnets(classes, 10, width)
    test_x, test_y = features_like_resnets(classes, -(-test_images // classes), width, seed=1)
    fits = trials * (FOLDS * len(probe.C_GRID) + 1)
    for name, scale in (("probe_vs_sklearn", 1.0), ("probe_vs_sklearn, features of norm 1", 1 / 25)):
        started = time.perf_counter()
        ours = probe.few_shot(x * scale, y, test_x * scale, test_y, trials=trials)
        seconds = time.perf_counter() - started
        say(f"{name}: ours {seconds:.1f} s, accuracy {ours.mean:.2%}")
        theirs = _sklearn_seconds(x * scale, y, say) * fits / len(probe.C_GRID)
        rows.append(
            _row(name, seconds, theirs, "s", trials)
            | {"theirs_is": f"extrapolated from {len(probe.C_GRID)} of {fits:,} fits", "accuracy": ours.mean}
        )
    return rows + _agreement(say)


def _sklearn_seconds(x: NDArray, y: NDArray, say: Say) -> float:
    """Seconds of LinearSVC as GridSearchCV calls it (its defaults), one fit for each C, in the full feature space."""
    from sklearn.svm import LinearSVC

    draw = splits.draw(np.arange(len(y), dtype=np.uint64), y, SHOTS, 0, 0)
    inside = splits.fold_of(draw.astype(np.uint64), y[draw], FOLDS, 0, 0) != 0
    total = 0.0
    for cost in probe.C_GRID:
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it often stops at max_iter: that is its default, and so its time
            LinearSVC(C=cost).fit(x[draw][inside], y[draw][inside])
        seconds = time.perf_counter() - started
        total += seconds
        say(f"  LinearSVC(C={cost:g}): {seconds:.2f} s")
    return total


def _agreement(say: Say, trials: int = 20) -> list[Row]:
    """Chosen C and accuracy against scikit-learn in the span of the rows, and the seconds of both."""
    x, y = features_like_resnets(20, 10, 512)
    test_x, test_y = features_like_resnets(20, 100, 512, seed=1)
    results, seconds = {}, {}
    for solver in ("batched", "sklearn"):
        started = time.perf_counter()
        results[solver] = probe.few_shot(x, y, test_x, test_y, trials=trials, solver=solver)
        seconds[solver] = time.perf_counter() - started
    ours, theirs = (results[solver] for solver in ("batched", "sklearn"))
    equal = float(np.mean(np.array(ours.chosen_c) == np.array(theirs.chosen_c)))
    say(f"20 classes x 512: same C in {equal:.0%} of {trials} trials, accuracy {ours.mean:.2%} and {theirs.mean:.2%}")
    return [
        _row("probe_vs_sklearn in the span, 20 classes x 512", seconds["batched"], seconds["sklearn"], "s", trials)
        | {"same_c": equal, "accuracy": ours.mean, "accuracy_sklearn": theirs.mean, "solvers": sorted(SOLVERS)}
    ]


def _row(name: str, ours: float, theirs: float, unit: str, n: int) -> Row:
    return {"name": name, "ours": ours, "theirs": theirs, "unit": unit, "ratio": theirs / ours, "n": n, "device": "cpu"}

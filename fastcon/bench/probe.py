"""The few-shot protocol against scikit-learn."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastcon import features, models, probe, splits
from fastcon.bench import Row, Say
from fastcon.manifest import index
from fastcon.precompute import Settings
from fastcon.solvers import LinearSVM

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


def bench(
    say: Say,
    images: str | None = None,
    backbone: str | None = None,
    classes: int = 98,
    width: int = 2048,
    trials: int = 50,
    test_images: int = 4000,
) -> list[Row]:
    """The few-shot protocol: all trials with the batched solver, against GridSearchCV(LinearSVC) on the same draws.

    On synthetic features [classes, width], and with images and a backbone on real ones: the d-split of the images, half
    of every class kept aside for testing. scikit-learn is timed on one fit for each C (one fold of the first trial) and
    extrapolated to trials x (folds x values of C + 1) fits, for unscaled features and for features scaled to norm 1.
    Agreement is measured in full on a smaller problem (20 classes x 512 features, 20 trials), with scikit-learn fitted
    in the span of the training rows; objectives on 30 of its problems.
    """
    x, y = features_like_resnets(classes, 10, width)
    test_x, test_y = features_like_resnets(classes, -(-test_images // classes), width, seed=1)
    rows = [
        _against_sklearn(name, scale * x, y, scale * test_x, test_y, trials, say)
        for name, scale in (("probe_vs_sklearn", 1.0), ("probe_vs_sklearn, features of norm 1", 1 / 25))
    ]
    if images and backbone:
        rows.append(_against_sklearn("probe_vs_sklearn, real features", *_real(images, backbone), trials, say))
    return rows + _agreement(say)


def _against_sklearn(name: str, x: NDArray, y: NDArray, test_x: NDArray, test_y: NDArray, trials: int, say: Say) -> Row:
    fits = trials * (FOLDS * len(probe.C_GRID) + 1)
    started = time.perf_counter()
    ours = probe.few_shot(x, y, test_x, test_y, trials=trials)
    seconds = time.perf_counter() - started
    say(f"{name}: ours {seconds:.1f} s, accuracy {ours.mean:.2%}")
    theirs = _sklearn_seconds(x, y, say) * fits / len(probe.C_GRID)
    return _row(name, seconds, theirs, "s", trials) | {
        "case": f"{y.max() + 1} classes x {SHOTS} shots x {x.shape[1]} features of norm {np.linalg.norm(x, axis=1).mean():.0f}, "
        f"{len(test_y)} test rows",
        "theirs_is": f"extrapolated from {len(probe.C_GRID)} of {fits:,} fits",
        "accuracy": ours.mean,
        "largest_duality_gap": max(gap for gap in ours.gaps if gap is not None),
    }


def _real(images: str, backbone: str) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Features and labels, for training and for testing, of the d-split of labelled images."""
    settings = Settings()
    model, manifest = models.load(backbone), index([images])
    found = features.features(model, manifest, settings)
    train, test = splits.labelled(manifest, None, 0.5, "d", 0)
    return found[train.indices], train.labels, found[test.indices], test.labels


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
    difference = max(abs(a - b) / b for a, b in _objectives(x, y, 30))
    say(
        f"20 classes x 512: same C in {equal:.0%} of {trials} trials, accuracy {ours.mean:.2%} and {theirs.mean:.2%}, "
        f"objectives of 30 problems within {difference:.1e}"
    )
    return [
        _row("probe_vs_sklearn in the span, 20 classes x 512", seconds["batched"], seconds["sklearn"], "s", trials)
        | {"same_c": equal, "accuracy": ours.mean, "accuracy_sklearn": theirs.mean, "objective_difference": difference}
    ]


def _objectives(x: NDArray, y: NDArray, count: int) -> Iterator[tuple[float, float]]:
    """Objective reached by ours and by scikit-learn (tol 1e-8) on sampled problems: a draw, a class and a C each."""
    from sklearn.svm import LinearSVC

    random = np.random.default_rng(0)
    for trial in range(count):
        draw = splits.draw(np.arange(len(y), dtype=np.uint64), y, SHOTS, 0, trial)
        rows = x[draw].astype(np.float64) @ np.linalg.qr(x[draw].astype(np.float64).T)[0]
        own = np.where(y[draw] == random.integers(y.max() + 1), 1, -1)
        cost = float(random.choice(probe.C_GRID))
        ours = LinearSVM(cost).fit(rows, own)
        theirs = LinearSVC(C=cost, dual=True, tol=1e-8, max_iter=1_000_000).fit(rows, own)

        def objective(model: Any, rows: NDArray = rows, own: NDArray = own, cost: float = cost) -> float:
            slack = np.maximum(0, 1 - own * model.decision_function(rows))
            return 0.5 * float((model.coef_**2).sum() + (model.intercept_**2).sum()) + cost * float((slack**2).sum())

        yield objective(ours), objective(theirs)


def _row(name: str, ours: float, theirs: float, unit: str, n: int) -> Row:
    return {"name": name, "ours": ours, "theirs": theirs, "unit": unit, "ratio": theirs / ours, "n": n, "device": "cpu"}

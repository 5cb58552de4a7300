"""The few-shot protocol against scikit-learn."""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastcon.bench import Row, Say
from fastcon.data import splits
from fastcon.data.manifest import index
from fastcon.machine import Machine
from fastcon.models.load import load
from fastcon.transfer import features
from fastcon.transfer.few_shot import C_GRID, few_shot
from fastcon.transfer.solvers import LinearSVM, cuml_model

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
    device: torch.device,
    images: Sequence[str] = (),
    backbone: str | None = None,
    classes: int = 98,
    width: int = 2048,
    trials: int = 50,
    test_images: int = 4000,
) -> list[Row]:
    """The few-shot protocol: all trials with the batched solver, against GridSearchCV(LinearSVC) on the same draws.

    On synthetic features [classes, width], and with a backbone on real ones: the d-split of each of the images, half of
    every class kept aside for testing. scikit-learn is timed on one fit for each C (one fold of the first trial) and
    extrapolated to trials x (folds x values of C + 1) fits, for unscaled features and for features scaled to norm 1.
    Beside the times: by how much each of these fits misses the objective that ours reaches, and the accuracy of both.
    Agreement is measured in full on a smaller problem (20 classes x 512 features, 20 trials), with scikit-learn fitted
    in the span of the training rows; objectives on 30 of its problems. On a GPU, where cuML is installed, its too.
    """
    if device.type == "cuda":  # contexts and libraries are loaded on first use
        few_shot(*features_like_resnets(4, 10, 64), *features_like_resnets(4, 5, 64), trials=1, device=str(device))
    x, y = features_like_resnets(classes, 10, width)
    test_x, test_y = features_like_resnets(classes, -(-test_images // classes), width, seed=1)
    rows = [
        _against_sklearn(name, scale * x, y, scale * test_x, test_y, trials, device, say)
        for name, scale in (("probe_vs_sklearn", 1.0), ("probe_vs_sklearn, features of norm 1", 1 / 25))
    ]
    for source in images if backbone else ():
        real = _real(source, str(backbone), device)
        name = f"probe_vs_sklearn, d-split of {splits.task_name([source])}"
        rows.append(_against_sklearn(name, *real, trials, device, say))
    return rows + _agreement(device, say)


def _against_sklearn(
    name: str, x: NDArray, y: NDArray, test_x: NDArray, test_y: NDArray, trials: int, device: torch.device, say: Say
) -> Row:
    fits = trials * (FOLDS * len(C_GRID) + 1)
    started = time.perf_counter()
    ours = few_shot(x, y, test_x, test_y, trials=trials, device=str(device))
    seconds = time.perf_counter() - started
    say(f"{name}: ours {seconds:.1f} s, accuracy {ours.mean:.2%}")
    compared = _same_fits(x, y, test_x, test_y, say)
    theirs = compared.pop("seconds") * fits / len(C_GRID)
    return _row(name, seconds, theirs, "s", trials, device) | {
        "case": f"{y.max() + 1} classes x {SHOTS} shots x {x.shape[1]} features of norm {np.linalg.norm(x, axis=1).mean():.0f}, "
        f"{len(test_y)} test rows",
        "theirs_is": f"extrapolated from {len(C_GRID)} of {fits:,} fits",
        "accuracy": ours.mean,
        "largest_duality_gap": max(gap for gap in ours.gaps if gap is not None),
        **compared,
    }


def _real(images: str, backbone: str, device: torch.device) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Features and labels, for training and for testing, of the d-split of labelled images."""
    model, manifest = load(backbone).on(device), index([images])
    values = features.features(model, manifest, Machine(str(device)))
    train, test = splits.labelled(manifest, None, 0.5, "d", 0)
    return values[train.indices], train.labels, values[test.indices], test.labels


def _same_fits(x: NDArray, y: NDArray, test_x: NDArray, test_y: NDArray, say: Say) -> dict[str, float]:
    """One fit for each C by LinearSVC as GridSearchCV calls it (its defaults, all features), and by ours on the same rows.

    seconds: of LinearSVC's. objective_excess: the most by which the objective it stops at (all classes, one C) is above
    ours, relative. accuracy_of_fits: of ours on the test rows, mean over C, and LinearSVC's.
    """
    from sklearn.svm import LinearSVC

    draw = splits.draw(np.arange(len(y), dtype=np.uint64), y, SHOTS, 0, 0)
    inside = splits.fold_of(draw.astype(np.uint64), y[draw], FOLDS, 0, 0) != 0
    rows, labels = x[draw][inside], y[draw][inside]
    total, excess, accuracies = 0.0, 0.0, []
    for cost in C_GRID:
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it often stops at max_iter: that is its default, and so its time
            theirs = LinearSVC(C=cost).fit(rows, labels)
        seconds = time.perf_counter() - started
        total += seconds
        ours = LinearSVM(cost).fit(rows, labels)
        best, reached = (objective(model, rows, labels, cost) for model in (ours, theirs))
        excess = max(excess, reached / best - 1)
        accuracies.append([(model.predict(test_x) == test_y).mean() for model in (ours, theirs)])
        say(f"  LinearSVC(C={cost:g}): {seconds:.2f} s, objective {reached / best - 1:+.1e} above ours")
    ours_mean, theirs_mean = np.mean(accuracies, axis=0).tolist()
    return {
        "seconds": total,
        "objective_excess": excess,
        "accuracy_of_fits": ours_mean,
        "accuracy_of_fits_sklearn": theirs_mean,
    }


def objective(model: Any, rows: NDArray, labels: NDArray, cost: float) -> float:
    """The objective of a fitted model, summed over its one-vs-rest problems, with the intercept penalised."""
    scores = np.asarray(model.decision_function(rows), dtype=np.float64).reshape(len(rows), -1)
    signs = np.where(labels[:, None] == model.classes_[-scores.shape[1] :], 1.0, -1.0)
    square = (np.asarray(model.coef_, np.float64) ** 2).sum() + (np.asarray(model.intercept_, np.float64) ** 2).sum()
    return float(0.5 * square + cost * (np.maximum(0, 1 - signs * scores) ** 2).sum())


def _agreement(device: torch.device, say: Say, trials: int = 20) -> list[Row]:
    """Chosen C and accuracy against the libraries' solvers in the span of the rows, and the seconds of both."""
    x, y = features_like_resnets(20, 10, 512)
    test_x, test_y = features_like_resnets(20, 100, 512, seed=1)
    libraries = ["sklearn"] + ["cuml"] * (device.type == "cuda" and importlib.util.find_spec("cuml") is not None)
    results, seconds = {}, {}
    for solver in ("batched", *libraries):
        started = time.perf_counter()
        draws = 2 if solver == "cuml" else trials  # which fits each of 14,400 problems by itself: half an hour for all
        results[solver] = few_shot(x, y, test_x, test_y, trials=draws, solver=solver, device=str(device))
        seconds[solver] = time.perf_counter() - started
    rows = []
    for library in libraries:
        ours, theirs = results["batched"], results[library]
        draws = len(theirs.chosen_c)
        equal = float(np.mean(np.array(ours.chosen_c[:draws]) == np.array(theirs.chosen_c)))
        difference = max(abs(a - b) / b for a, b in _objectives(x, y, library, 30))
        name = f"probe_vs_{library} in the span, 20 classes x 512"
        say(
            f"{name}: same C in {equal:.0%} of {trials} trials, accuracy {ours.mean:.2%} and {theirs.mean:.2%}, "
            f"objectives of 30 problems within {difference:.1e}"
        )
        rows.append(
            _row(name, seconds["batched"], seconds[library], "s", trials, device)
            | {"same_c": equal, "accuracy": ours.mean, f"accuracy_{library}": theirs.mean}
            | {"objective_difference": difference}
        )
    return rows


def _objectives(x: NDArray, y: NDArray, library: str, count: int) -> Iterator[tuple[float, float]]:
    """Objectives of ours and of a library (scikit-learn: tol 1e-8) on sampled problems: one draw, class and C each."""
    from sklearn.svm import LinearSVC

    random = np.random.default_rng(0)
    for trial in range(count):
        draw = splits.draw(np.arange(len(y), dtype=np.uint64), y, SHOTS, 0, trial)
        rows = x[draw].astype(np.float64) @ np.linalg.qr(x[draw].astype(np.float64).T)[0]
        signs = np.where(y[draw] == random.integers(y.max() + 1), 1, -1)
        cost = float(random.choice(C_GRID))
        exact = LinearSVC(C=cost, dual=True, tol=1e-8, max_iter=1_000_000)
        theirs = (exact if library == "sklearn" else cuml_model(cost)).fit(rows, signs)
        yield objective(LinearSVM(cost).fit(rows, signs), rows, signs, cost), objective(theirs, rows, signs, cost)


def _row(name: str, ours: float, theirs: float, unit: str, n: int, device: torch.device) -> Row:
    ratio = theirs / ours
    return {"name": name, "ours": ours, "theirs": theirs, "unit": unit, "ratio": ratio, "n": n, "device": device.type}

"""Linear SVMs on frozen features: the paper's few-shot protocol, as a library on plain arrays.

One-vs-rest, squared hinge, intercept penalised as liblinear does; C by stratified cross-validation inside each
draw; ties go to the smallest C.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from fastcon.cores import Cores, workers
from fastcon.data import splits
from fastcon.errors import FastconError
from fastcon.machine import choose_device
from fastcon.ranks import ALONE, Ranks
from fastcon.transfer import options
from fastcon.transfer.options import C_GRID, TRIALS
from fastcon.transfer.solvers import SOLVERS, Fold, Scores, Solver, gram_of_draws

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Result:
    """Accuracies (fractions) of a probe, one per trial, and the C each trial chose."""

    accuracies: list[float]
    chosen_c: list[float]
    per_class: list[float]
    """Accuracy of each class, averaged over trials; NaN for a class without test images."""
    gaps: list[float | None] = dataclasses.field(default_factory=list)
    """The largest relative duality gap of each trial's solutions; None where the solver certifies nothing."""

    @property
    def mean(self) -> float:
        """Mean over trials."""
        return float(np.mean(self.accuracies))

    @property
    def std(self) -> float:
        """Sample standard deviation over trials; 0 for one trial."""
        return float(np.std(self.accuracies, ddof=1)) if len(self.accuracies) > 1 else 0.0

    @property
    def ci95(self) -> float:
        """Half the width of the 95 % interval of the mean: see `interval`."""
        return interval(self.accuracies)


def interval(accuracies: Sequence[float]) -> float:
    """Half the width of the 95 % interval of a mean over trials: 1.96 std / sqrt(trials), 0 for one trial."""
    if len(accuracies) < 2:
        return 0.0
    return 1.96 * float(np.std(accuracies, ddof=1)) / math.sqrt(len(accuracies))


def few_shot(
    features: NDArray,
    labels: NDArray,
    test_features: NDArray,
    test_labels: NDArray,
    *,
    shots: int | None = splits.SHOTS,
    trials: int = TRIALS,
    c_grid: Sequence[float] = C_GRID,
    folds: int = 5,
    solver: str = "auto",
    seed: int = 0,
    ids: NDArray[np.uint64] | None = None,
    classes: int | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> Result:
    """Accuracy on the test set of linear SVMs trained on `shots` images per class, over `trials` draws.

    features [n, D], labels [n] and test_features [m, D], test_labels [m]: arrays; labels count from 0. Labels [n, K] of
    zeros and ones are a multi-label task: K binary problems, the accuracy is the mean over images and labels, draws and
    folds are random instead of stratified. shots: images per class (all of a smaller class), of a multi-label task images
    in all; None: all images, once. ids [n]: what the draws depend on besides the seed
    (default: the row number), so that equal ids give equal draws for every representation. classes: how many there are
    (default: as many as labels occur). device: where the batched solver works: cpu, cuda …; auto: a GPU if there is one.
    threads: trials at a time on a CPU (default: one per core). ranks: of several each takes some of the trials, and all get
    the result; all of them must call.
    Raises FastconError.
    """
    features, labels, test_features, test_labels = _checked(features, labels, test_features, test_labels)
    if folds < 2 or trials < 1 or not c_grid or min(c_grid) <= 0 or (shots is not None and shots < 1):
        raise FastconError("a probe needs shots >= 1, trials >= 1, folds >= 2 and values of C above 0")
    if solver not in options.SOLVERS:
        raise FastconError(f"no solver {solver!r}: there are {', '.join(options.SOLVERS)}")
    ids = np.arange(len(labels), dtype=np.uint64) if ids is None else ids
    place = choose_device(device)
    several = labels.ndim == 2
    classes = labels.shape[1] if several else max(classes or 0, int(max(labels.max(), test_labels.max())) + 1)
    smallest = len(labels) if several else int(np.bincount(labels)[np.unique(labels)].min())
    if several and min(smallest, shots or smallest) < folds:
        raise FastconError(f"{min(smallest, shots or smallest)} training images cannot be cut into {folds} folds")
    if min(smallest, shots or smallest) < folds:
        warnings.warn(
            f"the smallest class has {min(smallest, shots or smallest)} images for {folds} folds: in some folds "
            "its one-vs-rest problem has no positive row",
            stacklevel=2,
        )

    solver = "batched" if solver == "auto" else solver
    count = trials if shots is not None else 1

    def drawn(trial: int) -> NDArray[np.intp]:
        return splits.draw(ids, labels, shots, seed, trial) if shots is not None else np.arange(len(labels))

    whole = gram_of_draws(features, len(drawn(0)), count, place) if solver == "batched" else None

    def run(trial: int) -> _Trial:
        rows = drawn(trial)
        fold = splits.fold_of(ids[rows], labels[rows], folds, seed, trial)
        gram = whole and whole[torch.from_numpy(rows).to(place)]
        fits = SOLVERS[solver](features[rows], labels[rows], classes, place, gram)
        cost, scores = _trial(fits, labels[rows], test_features, fold, sorted(c_grid))
        right = _right(scores, test_labels)
        of_classes = right.mean(0) if several else _by_class(right, test_labels, classes)
        return _Trial(float(right.mean()), cost, of_classes, fits.gap)

    mine = ranks.share(count)
    on_cpu = solver == "sklearn" or (solver != "cuml" and place.type == "cpu")
    done: list[_Trial] = []
    for trial in _in_order(run, mine, on_cpu, threads, turns=ranks.count == 1):
        done.append(trial)
        if progress:
            progress(len(done), len(mine))
    made = [trial for trials_of_rank in ranks.all(done) for trial in trials_of_rank]
    accuracies, chosen, per_class, gaps = (list(column) for column in zip(*made, strict=True))
    return Result(accuracies, chosen, np.mean(per_class, axis=0).tolist(), gaps)


class _Trial(NamedTuple):
    """What a draw gave."""

    accuracy: float
    cost: float
    per_class: NDArray[np.float64]
    gap: float | None


def _in_order(
    run: Callable[[int], T], trials: range, side_by_side: bool, threads: int | None, turns: bool
) -> Iterator[T]:
    """Trials in order; side by side: one per core, as threads inside so small a problem gain little."""
    if len(trials) < 2 or not side_by_side:
        yield from map(run, trials)
        return
    with Cores(threads, turns=turns) as cores, workers(cores.threads) as pool:
        for start in range(0, len(trials), cores.threads):
            with cores.turn():
                done = list(pool.map(run, trials[start : start + cores.threads]))
            yield from done


def _trial(fits: Solver, labels: NDArray, test: NDArray, fold: NDArray, costs: list[float]) -> tuple[float, Scores]:
    """Choose C on the folds, fit on all rows, score the test rows [m, classes]."""
    folds = [Fold(np.flatnonzero(fold != number), np.flatnonzero(fold == number)) for number in np.unique(fold)]
    if labels.ndim == 1 and any(len(np.unique(labels[inside])) < 2 for inside, _ in folds):
        raise FastconError(
            "a fold of the training rows holds fewer than two classes: use fewer `folds` or more `shots`"
        )
    scores_of = fits.held_out(folds, costs)
    accuracy = np.array(
        [
            [_right(scores, labels[outside]).mean() for scores in of_fold]
            for of_fold, (_, outside) in zip(scores_of, folds, strict=True)
        ]
    )
    mean = accuracy.mean(0)
    best = int(np.argmax(mean >= mean.max() - 1e-12))  # the first: ties go to the smallest C
    return costs[best], fits.test(costs[: best + 1], test)


def _right(scores: Scores, labels: NDArray) -> NDArray[np.bool_]:
    """Which images [m] are classified correctly; of a multi-label task which labels [m, K] are."""
    return (scores > 0) == labels if labels.ndim == 2 else scores.argmax(1) == labels


def _by_class(right: NDArray[np.bool_], labels: NDArray, classes: int) -> NDArray[np.float64]:
    counts = np.bincount(labels, minlength=classes)
    with np.errstate(invalid="ignore"):
        return np.bincount(labels, weights=right, minlength=classes) / counts


def _checked(*arrays: NDArray) -> list[NDArray]:
    features, labels, test_features, test_labels = (np.asarray(array) for array in arrays)
    for what, x, y in (("training", features, labels), ("test", test_features, test_labels)):
        if x.ndim != 2 or y.shape[:1] != (len(x),) or y.ndim > 2 or not len(x):
            raise FastconError(f"{what} features are [n, D] with n labels and n > 0, got {x.shape} and {y.shape}")
        if not np.isfinite(x).all():
            raise FastconError(
                f"{what} features hold NaN or infinity, first in row {int(np.argwhere(~np.isfinite(x))[0][0])}"
            )
        if not np.issubdtype(y.dtype, np.integer) or y.min() < 0:
            raise FastconError(f"{what} labels are integers from 0, got {y.dtype} from {y.min()}")
    if features.shape[1] != test_features.shape[1]:
        raise FastconError(
            f"training features have {features.shape[1]} columns, test features {test_features.shape[1]}"
        )
    if labels.shape[1:] != test_labels.shape[1:] or (labels.ndim == 2 and max(labels.max(), test_labels.max()) > 1):
        raise FastconError(
            f"labels of several classes per image are [n, K] of zeros and ones, alike in both parts: got {labels.shape} "
            f"and {test_labels.shape}"
        )
    if labels.ndim == 1 and len(np.unique(labels)) < 2:
        raise FastconError("the training labels hold one class only: a probe needs at least 2")
    return [features, labels.astype(np.int64), test_features, test_labels.astype(np.int64)]

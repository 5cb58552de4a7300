"""Linear SVM solvers side by side: one interface, one objective. In: training rows. Out: decision values of others.

The objective is liblinear's, one-vs-rest: 1/2 |(w, b)|^2 + C sum_i max(0, 1 - y_i (w.x_i + b))^2, the intercept b
penalised as one more weight. `batched` is our own and certifies every solution; `sklearn` and `cuml` are the well-kept
libraries to check it against. cuML is approximate: its line search and its gradient disagree on the squared hinge, so that
it may stop above the optimum. `LinearSVM` offers the batched one as a scikit-learn estimator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from fastcon.errors import FastconError, optional_import
from fastcon.kernels import svm, svm_primal

TOGETHER = 1 << 24
"""Coefficients, and entries of Gram matrices, of the folds that are solved together: those of one C take 0.1 GB then."""
GRAM_ROWS = 8192
"""Up to so many rows (0.8 GB then) the Gram matrix is used for fewer features than rows, too …"""
GRAM_RATIO = 4
"""… and up to so many times the features: to there it is quicker than the primal."""

Scores = NDArray[np.float64]
Rows = NDArray[np.intp]


class Fold(NamedTuple):
    """Rows to train on, and the rows that are held out."""

    inside: Rows
    outside: Rows


class Solver(Protocol):
    """Fits on the training rows [n, D] of a draw, or on some of them. Costs are values of C in rising order."""

    gap: float | None
    """The largest relative duality gap of all its solutions so far; None where a solver does not say."""

    def held_out(self, folds: list[Fold], costs: list[float]) -> list[list[Scores]]:
        """Of every fold, train on its rows `inside`: decision values [m, K] of the rows `outside`, one array per C."""

    def test(self, costs: list[float], rows: NDArray) -> Scores:
        """Train on all rows with the last C (those before it may serve as starts): decision values [m, K] of `rows`."""


def gram_of_draws(features: NDArray, rows: int, draws: int, device: torch.device) -> svm.Gram | None:
    """The Gram matrix of all features [n, D], if draws of some rows use one and one for each is more work; else None."""
    n = len(features)
    if draws < 2 or n > GRAM_ROWS or n**2 > draws * rows**2 or not _over_gram(rows, features.shape[1]):
        return None
    return _gram(_tensor(features, np.float64).to(device))


def _over_gram(rows: int, features: int) -> bool:
    """Whether problems of so many rows are solved over their Gram matrix."""
    return rows <= max(features, min(GRAM_ROWS, GRAM_RATIO * features))


def _gram(rows: torch.Tensor) -> svm.Gram:
    """Of rows [n, D] with a constant feature for the intercept."""
    return svm.Gram.of(rows @ rows.T + 1)


class Batched:
    """The certified solver: over the Gram matrix, or in the primal, and from float32 features, where rows are more than
    four times the features, or more than 8,192 and the features."""

    def __init__(
        self,
        train: NDArray,
        labels: NDArray,
        classes: int,
        device: str | torch.device = "cpu",
        gram: svm.Gram | None = None,
    ) -> None:
        """gram: of the training rows, where it is known."""
        self._labels, self._classes, self._device = labels, classes, torch.device(device)
        self._signs = _signs(labels, classes).to(self._device)
        self.gap: float | None = 0.0
        self._whole: torch.Tensor | None = None
        dual = gram is not None or _over_gram(*train.shape)
        self._rows = _tensor(train, np.float64 if dual else np.float32).to(self._device)
        self._gram = (gram or _gram(self._rows)) if dual else None

    def held_out(self, folds: list[Fold], costs: list[float]) -> list[list[Scores]]:
        """See Solver. Raises FastconError where an optimum is not reached."""
        if self._gram is None:
            self._whole = self._primal(self._rows, self._signs, costs[:1], None)[0]  # the folds' solutions are near it
            return [self._held_out_primal(fold, costs) for fold in folds]
        together = max(1, TOGETHER // (len(self._rows) * max(len(self._rows), self._classes)))
        self._whole = self._dual(self._gram, self._signs, costs[:1], None)[0]
        scores: list[list[Scores]] = []
        for at in range(0, len(folds), together):
            scores += self._held_out_dual(folds[at : at + together], costs)
        return scores

    def _held_out_primal(self, fold: Fold, costs: list[float]) -> list[Scores]:
        rows, labels = self._rows[self._there(fold.outside)], self._labels[fold.inside]
        inside = self._there(fold.inside)
        path = self._primal(self._rows[inside], self._signs[:, inside], costs, self._whole)
        return [_decided(_linear(weights.to(rows.dtype), rows).cpu().numpy(), labels) for weights in path]

    def _held_out_dual(self, folds: list[Fold], costs: list[float]) -> list[list[Scores]]:
        """Folds together: their problems are over the rows that any of them trains on."""
        assert self._gram is not None
        assert self._whole is not None
        rows = np.unique(np.concatenate([fold.inside for fold in folds]))
        used = self._there(np.stack([np.isin(rows, fold.inside) for fold in folds]).astype(np.float64))
        places = self._there(rows)
        signs = self._signs[:, places] * used[:, None]
        start = self._whole[:, places] * used[:, None]
        gram = self._gram if len(rows) == len(self._rows) else self._gram[places]
        path = self._dual(gram, signs.flatten(0, 1), costs, start.flatten(0, 1))
        scores_of_folds = []
        for k, fold in enumerate(folds):
            across = self._gram.matrix[places[:, None], self._there(fold.outside)]
            scores = [beta.view_as(signs)[k] @ across for beta in path]
            scores_of_folds.append([_decided(each.T.cpu().numpy(), self._labels[fold.inside]) for each in scores])
        return scores_of_folds

    def test(self, costs: list[float], rows: NDArray) -> Scores:
        """See Solver. Raises FastconError where an optimum is not reached."""
        if self._gram is None:
            weights = self._primal(self._rows, self._signs, costs, self._whole)[-1]
        else:
            beta = self._dual(self._gram, self._signs, costs, self._whole)[-1]
            weights = torch.cat([beta @ self._rows, beta.sum(1, keepdim=True)], 1)
        across = _tensor(rows, np.float32 if rows.dtype == np.float32 else np.float64).to(self._device)
        return _decided(_linear(weights.to(across.dtype), across).double().cpu().numpy(), self._labels)

    def _there(self, array: NDArray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)

    def _dual(
        self, gram: svm.Gram, signs: torch.Tensor, costs: list[float], start: torch.Tensor | None
    ) -> list[torch.Tensor]:
        with _reached():
            path = svm.solve_path(gram, signs, costs, start)
        for _, gap in path:
            self._saw(gap)
        return [beta for beta, _ in path]

    def _primal(
        self, rows: torch.Tensor, signs: torch.Tensor, costs: list[float], start: torch.Tensor | None
    ) -> list[torch.Tensor]:
        with _reached():
            path = svm_primal.solve_path(rows, signs, costs, start)
        for _, gap in path:
            self._saw(gap)
        return [weights for weights, _ in path]

    def _saw(self, gap: torch.Tensor) -> None:
        self.gap = max(self.gap or 0.0, float(gap.max()))


@contextlib.contextmanager
def _reached() -> Iterator[None]:
    """Whatever keeps a solver from its optimum is an error of the command."""
    try:
        yield
    except ArithmeticError as error:  # not converged, or not positive definite
        raise FastconError(
            f"the SVMs did not reach their optimum ({error}): leave that C out of the grid, or scale the features"
        ) from error


class Library:
    """A library's solver for one C at a time, in the span of the training rows: the optimum is the same there."""

    gap: float | None = None

    def __init__(self, fit: Callable[[NDArray, NDArray, float], Any], *draw: Any) -> None:
        """fit: (rows [n, d], labels [n], C) → a model with `decision_function`. draw: as `Batched`'s."""
        self._fit = fit
        train, self._labels, self._classes, *_ = draw
        self._basis = None
        if len(train) < train.shape[1]:
            self._basis = np.linalg.qr(np.asarray(train, np.float64).T)[0]  # [D, n], orthonormal
        self._train = self._in_span(np.asarray(train, np.float64))

    def held_out(self, folds: list[Fold], costs: list[float]) -> list[list[Scores]]:
        """See Solver."""
        return [[self._scores(inside, cost, self._train[outside]) for cost in costs] for inside, outside in folds]

    def test(self, costs: list[float], rows: NDArray) -> Scores:
        """See Solver."""
        return self._scores(np.arange(len(self._train)), costs[-1], self._in_span(rows))

    def _in_span(self, rows: NDArray) -> NDArray:
        return rows if self._basis is None else np.asarray(rows @ self._basis.astype(rows.dtype), np.float64)

    def _scores(self, inside: Rows, cost: float, rows: NDArray) -> Scores:
        """A class without a training row scores below every other."""
        if self._labels.ndim == 2:
            labels = self._labels[inside]
            scores = _decided(np.zeros((len(rows), self._classes)), labels)
            for label in np.flatnonzero(np.isfinite(scores[0])):
                scores[:, label] = self._fit(self._train[inside], labels[:, label], cost).decision_function(rows)
            return scores
        values = np.asarray(self._fit(self._train[inside], self._labels[inside], cost).decision_function(rows))
        scores = np.full((len(rows), self._classes), -np.inf)
        scores[:, np.unique(self._labels[inside])] = np.stack([-values, values], 1) if values.ndim == 1 else values
        return scores


def _sklearn(train: NDArray, labels: NDArray, cost: float) -> Any:
    from sklearn.svm import LinearSVC

    return LinearSVC(C=cost, dual=len(train) <= train.shape[1], tol=1e-6, max_iter=100_000).fit(train, labels)


def _cuml(train: NDArray, labels: NDArray, cost: float) -> Any:
    return cuml_model(cost).fit(train, labels)


def cuml_model(cost: float) -> Any:
    """cuML's LinearSVC for the objective above. Its squared-hinge gradient is half the loss's, so it is given 2C for C."""
    if not torch.cuda.is_available():
        raise FastconError("`solver` cuml needs an NVIDIA GPU, and PyTorch sees none here: use `solver` batched")
    return optional_import("cuml.svm", "cuml").LinearSVC(
        C=2 * cost, penalty="l2", loss="squared_hinge", penalized_intercept=True, tol=1e-6, max_iter=10_000
    )


SOLVERS: dict[str, Callable[..., Solver]] = {
    "batched": Batched,
    "sklearn": partial(Library, _sklearn),
    "cuml": partial(Library, _cuml),
}
"""Name → (train [n, D], labels [n] or [n, K], classes K, device, the Gram matrix if it is known) → Solver."""


class LinearSVM(ClassifierMixin, BaseEstimator):
    """The batched solver as a scikit-learn classifier (L2-regularised squared hinge, one-vs-rest).

    C: weight of the loss. After `fit`: `coef_` [K, d], `intercept_` [K] (one row for two classes), `classes_`, and
    `duality_gap_` [K], the certified relative distance from the optimum.
    """

    def __init__(self, C: float = 1.0) -> None:
        self.C = C

    def fit(self, X: NDArray, y: NDArray) -> LinearSVM:
        """Fit to X [n, d] and labels y [n] of at least two classes."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"a classifier needs at least 2 classes, y holds one class: {self.classes_[0]!r}")
        if not self.C > 0:
            raise ValueError(f"C must be above 0, got {self.C!r}")
        signs = _signs(labels, len(self.classes_))
        if len(signs) == 2:  # the two mirror each other
            signs = signs[1:]
        weights, gap = _weights(X, signs, float(self.C))
        self.coef_, self.intercept_, self.duality_gap_ = weights[:, :-1], weights[:, -1], gap
        return self

    def decision_function(self, X: NDArray) -> NDArray:
        """Signed scores: [m, K], or [m] for two classes."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        scores = X @ self.coef_.T + self.intercept_
        return scores[:, 0] if len(self.classes_) == 2 else scores

    def predict(self, X: NDArray) -> NDArray:
        """The class of the highest score [m]."""
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(1)]


def _weights(x: NDArray, signs: torch.Tensor, cost: float) -> tuple[NDArray, NDArray]:
    """Weights [K, d + 1] and duality gaps [K] of the problems that signs [K, n] say."""
    rows = _tensor(x, np.float64)
    if not _over_gram(*x.shape):
        weights, gap = svm_primal.solve(rows, signs, cost)
        return weights.numpy(), gap.numpy()
    beta, gap = svm.solve(_gram(rows), signs, cost)
    return torch.cat([beta @ rows, beta.sum(1, keepdim=True)], 1).numpy(), gap.numpy()


def _signs(labels: NDArray, classes: int) -> torch.Tensor:
    """+1 where a row is of the class, else -1: float64 [K, n]. labels: [n], or [n, K] of zeros and ones."""
    if labels.ndim == 2:
        return torch.from_numpy(labels).T.double() * 2 - 1
    return torch.where(torch.from_numpy(labels)[None] == torch.arange(classes)[:, None], 1.0, -1.0).double()


def _decided(scores: Scores, labels: NDArray) -> Scores:
    """Scores [m, K] where a label that all training rows have, or none has, is that for every image. labels: [n, K]."""
    if labels.ndim == 2:
        scores[:, labels.all(0)] = np.inf
        scores[:, ~labels.any(0)] = -np.inf
    return scores


def _linear(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """w.x + b of rows [m, D] and weights [K, D + 1]: [m, K]."""
    return torch.addmm(weights[:, -1], rows, weights[:, :-1].T)


def _tensor(array: NDArray, dtype: Any) -> torch.Tensor:
    """The array as a tensor; copied only where it is of another type, or read-only as a cached file is."""
    return torch.from_numpy(np.require(array, dtype, ["C", "W"]))

"""Linear SVM solvers side by side: one interface, one objective. In: training rows. Out: decision values of others.

The objective is liblinear's, one-vs-rest: 1/2 |(w, b)|^2 + C sum_i max(0, 1 - y_i (w.x_i + b))^2, the intercept b
penalised as one more weight. `batched` is our own and certifies every solution; `sklearn` and `cuml` are the well-kept
libraries to check it against. `LinearSVM` offers the batched one as a scikit-learn estimator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from fastcon.errors import FastconError, optional_import
from fastcon.kernels import svm

GRAM_ROWS = 2048
"""Up to here the Gram matrix is used even for fewer features: it solves any C exactly."""

Scores = NDArray[np.float64]
Solver = Callable[[NDArray, NDArray, NDArray, int, list[float]], list[Scores]]
"""(train [n, d], labels [n], rows [m, d], classes K, values of C) → decision values [m, K], one array a C."""


def batched(train: NDArray, labels: NDArray, rows: NDArray, classes: int, costs: list[float]) -> list[Scores]:
    """The certified solver: over the Gram matrix where rows are no more than features or 2,048, else in the primal."""
    try:
        return (_over_gram if len(train) <= max(train.shape[1], GRAM_ROWS) else _in_primal)(
            train, labels, rows, classes, costs
        )
    except ArithmeticError as error:  # not converged, or not positive definite
        raise FastconError(
            f"the SVMs did not reach their optimum ({error}): leave that C out of the grid, or scale the features"
        ) from error


def sklearn(train: NDArray, labels: NDArray, rows: NDArray, classes: int, costs: list[float]) -> list[Scores]:
    """scikit-learn's LinearSVC (liblinear); a class without a training row scores below every other."""
    from sklearn.svm import LinearSVC

    def fit(cost: float) -> Any:
        return LinearSVC(C=cost, dual=len(train) <= train.shape[1], tol=1e-6, max_iter=100_000).fit(train, labels)

    return [_all_classes(fit(cost).decision_function(rows), np.unique(labels), classes) for cost in costs]


def cuml(train: NDArray, labels: NDArray, rows: NDArray, classes: int, costs: list[float]) -> list[Scores]:
    """cuML's LinearSVC on the GPU. Its squared-hinge gradient is half the loss's, so it is given 2C for C."""
    if not torch.cuda.is_available():
        raise FastconError("--solver cuml needs an NVIDIA GPU, and PyTorch sees none here: use --solver batched")
    library = optional_import("cuml.svm", "cuml")

    def fit(cost: float) -> Any:
        return library.LinearSVC(
            C=2 * cost, penalty="l2", loss="squared_hinge", penalized_intercept=True, grad_tol=1e-6, max_iter=10_000
        ).fit(np.asarray(train, np.float32), labels)

    def decide(model: Any) -> NDArray:
        return np.asarray(model.decision_function(np.asarray(rows, np.float32)))

    return [_all_classes(decide(fit(cost)), np.unique(labels), classes) for cost in costs]


SOLVERS: dict[str, Solver] = {"batched": batched, "sklearn": sklearn, "cuml": cuml}


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
        weights, gap = _weights(X, labels, len(self.classes_), float(self.C))
        if len(self.classes_) == 2:  # the two problems mirror each other
            weights, gap = weights[1:], gap[1:]
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


def _over_gram(train: NDArray, labels: NDArray, rows: NDArray, classes: int, costs: list[float]) -> list[Scores]:
    x = _tensor(train, np.float64)
    gram = x @ x.T + 1
    signs = torch.where(torch.from_numpy(labels)[None] == torch.arange(classes)[:, None], 1.0, -1.0).double()
    across = _tensor(rows, np.float64) @ x.T + 1
    out, beta = [], None
    for cost in costs:
        beta, _ = svm.solve(gram, signs, cost, beta)
        out.append((across @ beta.T).numpy())
    return out


def _in_primal(train: NDArray, labels: NDArray, rows: NDArray, classes: int, costs: list[float]) -> list[Scores]:
    x, across = (_tensor(part, np.float32) for part in (train, rows))
    out, weights = [], None
    for cost in costs:
        weights, _ = svm.solve_primal(x, torch.from_numpy(labels), classes, cost, weights)
        out.append((across @ weights[:, :-1].T + weights[:, -1]).double().numpy())
    return out


def _weights(x: NDArray, labels: NDArray, classes: int, cost: float) -> tuple[NDArray, NDArray]:
    """Weights [K, d + 1] and duality gaps [K]."""
    rows = _tensor(x, np.float64)
    if len(x) > max(x.shape[1], GRAM_ROWS):
        weights, gap = svm.solve_primal(rows, torch.from_numpy(labels), classes, cost)
        return weights.numpy(), gap.numpy()
    signs = torch.where(torch.from_numpy(labels)[None] == torch.arange(classes)[:, None], 1.0, -1.0).double()
    beta, gap = svm.solve(rows @ rows.T + 1, signs, cost)
    return torch.cat([beta @ rows, beta.sum(1, keepdim=True)], 1).numpy(), gap.numpy()


def _tensor(array: NDArray, dtype: type) -> torch.Tensor:
    """The array as a tensor; copied only where it is of another type, or read-only as a cached file is."""
    return torch.from_numpy(np.require(array, dtype, ["C", "W"]))


def _all_classes(values: NDArray, present: NDArray, classes: int) -> Scores:
    scores = np.full((len(values), classes), -np.inf)
    scores[:, present] = np.stack([-values, values], 1) if values.ndim == 1 else values
    return scores

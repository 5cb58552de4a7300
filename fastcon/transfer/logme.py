"""LogME: how well features explain labels, without training a classifier (You et al., "LogME: Practical Assessment of
Pre-trained Models for Transfer Learning", ICML 2021).

Of each class, labels 0 and 1 are regressed on the features by a Bayesian linear model, w ~ N(0, 1/alpha), y ~ N(w.x,
1/beta), whose evidence is maximised over alpha and beta by MacKay's fixed point; LogME is the mean over classes of the
log evidence per image. One singular value decomposition serves all classes.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fastcon.errors import FastconError

STEPS, TOLERANCE = 100, 1e-5


def logme(features: NDArray, labels: NDArray) -> float:
    """The score of features [n, D] for labels [n] of integers from 0, or [n, K] of zeros and ones; higher is better.

    Of one task only scores may be compared. Raises FastconError where there are fewer than two classes.
    """
    x = np.asarray(features, dtype=np.float64)
    targets = labels.T.astype(np.float64) if labels.ndim == 2 else _one_vs_rest(labels)
    if len(targets) < 2:
        raise FastconError("the labels hold one class only: LogME needs at least 2")
    left, values, _ = np.linalg.svd(x, full_matrices=False)
    return float(np.mean([_evidence(left, values**2, x.shape[1], y) for y in targets]))


def _one_vs_rest(labels: NDArray) -> NDArray[np.float64]:
    return (labels[None] == np.unique(labels)[:, None]).astype(np.float64)


def _evidence(left: NDArray[np.float64], squares: NDArray[np.float64], width: int, y: NDArray[np.float64]) -> float:
    """The largest log evidence per image. left, squares: U [n, r] and the squared singular values [r] of the features."""
    n = len(y)
    along = (left.T @ y) ** 2
    beyond = max(float(y @ y - along.sum()), 1e-12 * n)  # what no weights explain
    ratio = 1.0  # alpha / beta
    for _ in range(STEPS):
        kept = squares / (squares + ratio)
        used = kept.sum()
        size = (kept / (squares + ratio) * along).sum()  # |w|^2
        error = ((1 - kept) ** 2 * along).sum() + beyond
        alpha, beta = used / max(size, 1e-300), (n - used) / error
        before, ratio = ratio, alpha / beta
        if abs(ratio - before) <= TOLERANCE * before:
            break
    kept = squares / (squares + ratio)
    size, error = (kept / (squares + ratio) * along).sum(), ((1 - kept) ** 2 * along).sum() + beyond
    curvature = np.log(alpha + beta * squares).sum() + (width - len(squares)) * math.log(alpha)
    total = width * math.log(alpha) + n * math.log(beta) - n * math.log(2 * math.pi)
    return float(total - curvature - beta * error - alpha * size) / (2 * n)

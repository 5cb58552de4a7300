"""The same SVMs as `svm`'s in the primal, for more rows than features: truncated Newton, all classes together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from fastcon.kernels.svm import BLOCK, GAP, NotConverged
from torch import Tensor

_STEPS, _STEPS_FLOAT32 = 100, 25
_RANK = 64  # of the preconditioner
_INNER_STEPS = 400
_LENGTHS = tuple(0.5**k for k in range(8))


class Primal(NamedTuple):
    """Weights [K, d + 1] of K problems, the intercept last, and the relative duality gap [K] of each."""

    weights: Tensor
    gap: Tensor


def solve(features: Tensor, signs: Tensor, cost: float, start: Tensor | None = None) -> Primal:
    """Solve K one-vs-rest problems over the same rows.

    features: [n, d] float32 or float64 (a constant column is added inside for the intercept). signs: [K, n] of -1 and
    +1. start: weights [K, d + 1] of a nearby C. The weights are float64 where float32 did not suffice. Memory beyond the
    features: a few matrices [n, K] and [K, d + 1]. Raises NotConverged where a duality gap stays above 1e-4.
    """
    n, d = features.shape
    signs = signs.T.to(features.dtype)
    weights = features.new_zeros(signs.shape[1], d + 1) if start is None else start.to(features.dtype, copy=True)
    basis = _leading(features)
    leading, norms = _scores(features, basis), features.square().sum(1) + 1
    scores = _scores(features, weights)
    for _ in range(_STEPS if features.dtype == torch.float64 else _STEPS_FLOAT32):
        slack = (1 - signs * scores).clamp_min(0)
        gradient = weights - 2 * cost * _back(features, signs * slack)
        gap = _primal_gap(weights, gradient, slack, cost)
        if bool((gap <= GAP / 2).all()):
            return Primal(weights, gap)
        support = (slack > 0).to(features.dtype)
        inner = _inner(leading, support)
        rest = (norms @ support - inner.diagonal(dim1=1, dim2=2).sum(1)).clamp_min(0) / (d + 1)
        precondition = _Leading(basis, 2 * cost * inner, 1 + 2 * cost * rest)
        step = _conjugate_gradients(features, support, cost, -gradient, precondition)
        step_scores = _scores(features, step)
        length = _best_length(weights, scores, step, step_scores, signs, cost)
        weights, scores = weights + length[:, None] * step, scores + length * step_scores
    if features.dtype == torch.float32:  # what is left is float32's own error: finish in float64
        return solve(features.double(), signs.T, cost, weights)
    worst = int(gap.argmax())
    raise NotConverged(
        f"class {worst} at C = {cost:g} stopped at a relative duality gap of {gap[worst]:.1e} (n = {n}, d = {d})"
    )


class _Leading:
    """An approximate inverse of I + 2C X^T M X for each class: exact in the leading directions, uniform elsewhere."""

    def __init__(self, basis: Tensor, inner: Tensor, rest: Tensor) -> None:
        """basis: orthonormal [r, d + 1]. inner: 2C of its part of X^T M X [K, r, r]. rest: the others' mean [K]."""
        diagonal = inner.diagonal(dim1=1, dim2=2)
        diagonal.add_(1 + 1e-6 * diagonal.sum(1, keepdim=True))  # makes up for rounding, so that the factor exists
        self._basis, self._rest = basis, rest[:, None]
        self._inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(inner)[0])

    def __call__(self, right: Tensor) -> Tensor:
        inside = right @ self._basis.T
        solved = torch.bmm(self._inverse, inside[..., None])[..., 0]
        return right / self._rest + (solved - inside / self._rest) @ self._basis


def _leading(features: Tensor) -> Tensor:
    """An orthonormal basis [r, d + 1] of what rows, with the constant column, have most in common."""
    generator = torch.Generator().manual_seed(0)
    width = features.shape[1] + 1
    basis = torch.randn(min(_RANK, width), width, generator=generator).to(features)
    for _ in range(3):
        basis = torch.linalg.qr(_back(features, _scores(features, basis)).T)[0].T
    return basis


def _inner(rows: Tensor, support: Tensor) -> Tensor:
    """X^T M X of each class [K, r, r], of rows [n, r] and its support [n, K], by blocks of rows that stay in the cache."""
    classes, rank = support.shape[1], rows.shape[1]
    out = rows.new_zeros(classes, rank, rank)
    step = max(64, 16 * BLOCK[rows.device.type] // (classes * rank))
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        out.baddbmm_((support[start : start + step].T[:, :, None] * block).mT, block.expand(classes, -1, -1))
    return out


def _scores(features: Tensor, weights: Tensor) -> Tensor:
    """w.x of every row and class [n, K], the last weight being the intercept's."""
    return torch.addmm(weights[:, -1], features, weights[:, :-1].T)


def _back(features: Tensor, values: Tensor) -> Tensor:
    """sum_i values_ic x_i with the constant column: [K, d + 1] for values [n, K]."""
    return torch.cat([values.T @ features, values.sum(0)[:, None]], 1)


def _primal_gap(weights: Tensor, gradient: Tensor, slack: Tensor, cost: float) -> Tensor:
    """Relative duality gap [K], the dual at alpha = 2C slack, whose weights are w - gradient."""
    squares = slack.double().square().sum(0)
    primal = 0.5 * weights.double().square().sum(1) + cost * squares
    implied = (weights - gradient).double().square().sum(1)
    dual = 2 * cost * slack.double().sum(0) - 0.5 * implied - cost * squares
    return (primal - dual) / primal


def _conjugate_gradients(
    features: Tensor, support: Tensor, cost: float, right: Tensor, precondition: _Leading
) -> Tensor:
    """Newton's direction of every class: (I + 2C X^T M X) s = right, to a thousandth of the gradient's norm, in float64 to a millionth.

    Looser, and with a large C it stalls: the part of the residual that is left outweighs what the step gains."""
    solution = torch.zeros_like(right)
    residual = right.clone()
    direction = precondition(residual)
    product = (residual * direction).sum(1)
    target = (1e-6 if right.dtype == torch.float32 else 1e-12) * product
    for _ in range(_INNER_STEPS):
        image = direction + 2 * cost * _back(features, support * _scores(features, direction))
        curvature = (direction * image).sum(1)
        length = torch.where((product > target) & (curvature > 0), product / curvature, 0)  # 0: done, or rounding
        if not bool((length > 0).any()):
            break
        solution += length[:, None] * direction
        residual -= length[:, None] * image
        scaled = precondition(residual)
        renewed = (residual * scaled).sum(1)
        direction = scaled + torch.where(length > 0, renewed / product, 0)[:, None] * direction
        product = torch.where(length > 0, renewed, 0)
    return solution


def _best_length(
    weights: Tensor, scores: Tensor, step: Tensor, step_scores: Tensor, signs: Tensor, cost: float
) -> Tensor:
    """How far to go along each class's step: the best of the full one and its halvings, or not at all."""
    best = torch.zeros(len(weights), dtype=weights.dtype, device=weights.device)
    value = _primal(weights, scores, signs, cost)
    for t in _LENGTHS:
        tried = _primal(weights + t * step, scores + t * step_scores, signs, cost)
        best = torch.where(tried < value, t, best)
        value = torch.minimum(tried, value)
        if bool((best > 0).all()):
            break
    return best


def _primal(weights: Tensor, scores: Tensor, signs: Tensor, cost: float) -> Tensor:
    slack = (1 - signs * scores).clamp_min(0)
    return 0.5 * weights.square().sum(1).double() + cost * slack.square().sum(0).double()

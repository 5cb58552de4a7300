"""Batched linear SVMs: L2-regularised squared hinge, one-vs-rest, all classes of a Gram matrix together.

Objective of each class, as liblinear's (with the intercept as one more, penalised, constant feature 1):

    min_w  1/2 |w|^2 + C sum_i max(0, 1 - y_i w.x_i)^2,     w = sum_i beta_i x_i

Newton's method on the support set (Keerthi & DeCoste, JMLR 2005, in the span of the rows: Chapelle, Neural
Computation 2007): with support S, (K_SS + I / 2C) beta_S = y_S and beta = 0 elsewhere. With few shots nearly every
row supports every class, so one inverse of K + I / 2C serves all classes and each solves only for the few rows
outside S (or inside, where those are fewer). Every solution comes with its duality gap.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GAP = 1e-4
"""Relative duality gap that a solution must reach."""
_STEPS = 100
_STEPS_FLOAT32 = 25
_INNER_STEPS = 400
_GROUP = 16  # problems of like size solved at once, so that padding them to the largest costs little
_BLOCK = 1 << 25  # float64 entries of the systems solved at once: 256 MB
_LENGTHS = tuple(0.5**k for k in range(12))


class Solution(NamedTuple):
    """Coefficients [K, n] of K problems over n rows, and the relative duality gap [K] of each."""

    beta: Tensor
    gap: Tensor


class Primal(NamedTuple):
    """Weights [K, d + 1] of K problems, the intercept last, and the relative duality gap [K] of each."""

    weights: Tensor
    gap: Tensor


class NotConverged(ArithmeticError):
    """A problem did not reach the duality gap; the message says which and how far."""


def solve(gram: Tensor, signs: Tensor, cost: float, start: Tensor | None = None) -> Solution:
    """Solve K one-vs-rest problems that share their rows.

    gram: [n, n] float64, X X^T + 1 for an intercept. signs: [K, n] of -1 and +1. cost: C. start: beta [K, n] of a
    nearby C. Raises NotConverged rather than returning a solution whose gap is above 1e-4.
    """
    n = len(gram)
    ridge = 1 / (2 * cost)
    system = gram + ridge * torch.eye(n, dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed:
        raise NotConverged(f"K + I / 2C is not positive definite in float64 at C = {cost:g} (n = {n})")
    inverse = torch.cholesky_inverse(factor)
    beta = signs @ inverse if start is None else start.clone()
    scores = beta @ gram
    open_ = torch.arange(len(signs), device=gram.device)
    for _ in range(_STEPS):
        support = signs[open_] * scores[open_] < 1
        target = _restricted(system, inverse, signs[open_], support)
        beta[open_], scores[open_] = _line_search(gram, signs[open_], cost, beta[open_], scores[open_], target)
        gap = duality_gap(gram, signs[open_], cost, beta[open_], scores[open_])
        open_ = open_[gap > GAP / 100]
        if not len(open_):
            break
    gap = duality_gap(gram, signs, cost, beta, scores)
    if not bool((gap <= GAP).all()):
        worst = int(gap.argmax())
        raise NotConverged(
            f"class {worst} at C = {cost:g} stopped at a relative duality gap of {gap[worst]:.1e} (n = {n})"
        )
    return Solution(beta, gap)


def duality_gap(gram: Tensor, signs: Tensor, cost: float, beta: Tensor, scores: Tensor) -> Tensor:
    """(primal - dual) / primal of each problem [K]: how far from the optimum `beta` can be at most.

    The primal is taken at w = sum beta_i x_i, the dual at the nearest multipliers that are feasible, max(0, y beta).
    scores: beta @ gram [K, n].
    """
    primal = objective(signs, cost, beta, scores)
    alpha = (signs * beta).clamp_min(0)
    feasible = signs * alpha
    dual = alpha.sum(1) - 0.5 * (feasible * (feasible @ gram)).sum(1) - (alpha.square() / (4 * cost)).sum(1)
    return (primal - dual) / primal


def objective(signs: Tensor, cost: float, beta: Tensor, scores: Tensor) -> Tensor:
    """The primal objective of each problem [K]."""
    slack = (1 - signs * scores).clamp_min(0)
    return 0.5 * (beta * scores).sum(1) + cost * slack.square().sum(1)


def _line_search(
    gram: Tensor, signs: Tensor, cost: float, beta: Tensor, scores: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Go from beta towards target as far as pays: the best of a few lengths, the full step first."""
    goal = target @ gram
    best = objective(signs, cost, target, goal)
    now = objective(signs, cost, beta, scores)
    if bool((best <= now).all()):
        return target, goal
    length = torch.ones_like(best)
    for t in _LENGTHS[1:]:
        value = objective(signs, cost, beta + t * (target - beta), scores + t * (goal - scores))
        length = torch.where(value < best, t, length)
        best = torch.minimum(best, value)
    length = length[:, None]
    return beta + length * (target - beta), scores + length * (goal - scores)


def _restricted(system: Tensor, inverse: Tensor, signs: Tensor, support: Tensor) -> Tensor:
    """beta [K, n] with (K + I/2C)_SS beta_S = y_S and zero outside each problem's support [K, n]."""
    beta = torch.zeros_like(signs)
    few_inside = support.sum(1) * 2 <= support.shape[1]
    for problems, inside in ((few_inside.nonzero()[:, 0], True), ((~few_inside).nonzero()[:, 0], False)):
        if not len(problems):
            continue
        y, s = signs[problems], support[problems]
        if inside:
            beta[problems] = _solve_members(system, s, y)
        else:
            full = y @ inverse
            correction = _solve_members(inverse, ~s, -full)
            beta[problems] = (full + correction @ inverse) * s
    return beta


def _solve_members(matrix: Tensor, members: Tensor, right: Tensor) -> Tensor:
    """For each problem solve matrix[M, M] x = right[M] over its members M; zero elsewhere. All [K, n]."""
    count = members.sum(1)
    size = int(count.max())
    if size == 0:
        return torch.zeros_like(right)
    group = max(min(_GROUP, _BLOCK // size**2), 1)
    if len(right) > group:
        out = torch.zeros_like(right)
        for some in count.argsort().split(group):
            out[some] = _solve_members(matrix, members[some], right[some])
        return out
    place = members.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :size]
    filler = torch.arange(size, device=matrix.device) >= count[:, None]
    blocks = matrix[place[:, :, None], place[:, None, :]]
    blocks.masked_fill_(filler[:, :, None] | filler[:, None, :], 0)
    blocks.diagonal(dim1=1, dim2=2).masked_fill_(filler, 1)
    vector = right.gather(1, place).masked_fill_(filler, 0)
    factor = torch.linalg.cholesky_ex(blocks)[0]
    halfway = torch.linalg.solve_triangular(factor, vector[..., None], upper=False)
    solved = torch.linalg.solve_triangular(factor.mT, halfway, upper=True)[..., 0]
    return torch.zeros_like(right).scatter_(1, place, solved.masked_fill(filler, 0))


def solve_primal(features: Tensor, labels: Tensor, classes: int, cost: float, start: Tensor | None = None) -> Primal:
    """Solve the same problems in the primal, for more rows than features: truncated Newton, all classes together.

    features: [n, d] float32 or float64 (a constant column is added inside for the intercept). labels: int64 [n].
    start: weights [K, d + 1] of a nearby C. Memory beyond the features: a few matrices [n, K] and [K, d + 1].
    Raises NotConverged where a duality gap stays above 1e-4.
    """
    n, d = features.shape
    signs = torch.where(labels[:, None] == torch.arange(classes, device=labels.device), 1.0, -1.0).to(features.dtype)
    weights = features.new_zeros(classes, d + 1) if start is None else start.clone()
    squares = features.square()
    scores = _scores(features, weights)
    for _ in range(_STEPS if features.dtype == torch.float64 else _STEPS_FLOAT32):
        slack = (1 - signs * scores).clamp_min(0)
        gradient = weights - 2 * cost * _back(features, signs * slack)
        gap = _primal_gap(weights, gradient, slack, cost)
        if bool((gap <= GAP / 2).all()):
            return Primal(weights, gap)
        support = (slack > 0).to(features.dtype)
        diagonal = 1 + 2 * cost * _back(squares, support)
        step = _conjugate_gradients(features, support, cost, -gradient, diagonal)
        step_scores = _scores(features, step)
        length = _best_length(weights, scores, step, step_scores, signs, cost)
        weights, scores = weights + length[:, None] * step, scores + length * step_scores
    if features.dtype == torch.float32:  # what is left is float32's own error: finish in float64
        finished = solve_primal(features.double(), labels, classes, cost, weights.double())
        return Primal(finished.weights.float(), finished.gap)
    worst = int(gap.argmax())
    raise NotConverged(
        f"class {worst} at C = {cost:g} stopped at a relative duality gap of {gap[worst]:.1e} (n = {n}, d = {d})"
    )


def _scores(features: Tensor, weights: Tensor) -> Tensor:
    """w.x of every row and class [n, K], the last weight being the intercept's."""
    return torch.addmm(weights[:, -1], features, weights[:, :-1].T)


def _back(features: Tensor, values: Tensor) -> Tensor:
    """sum_i values_ic x_i with the constant column: [K, d + 1] for values [n, K]."""
    return torch.cat([values.T @ features, values.sum(0)[:, None]], 1)


def _primal_gap(weights: Tensor, gradient: Tensor, slack: Tensor, cost: float) -> Tensor:
    """Relative duality gap [K], the dual at alpha = 2C slack, whose weights are w - gradient."""
    own = slack.double().square().sum(0)
    primal = 0.5 * weights.double().square().sum(1) + cost * own
    implied = (weights - gradient).double().square().sum(1)
    dual = 2 * cost * slack.double().sum(0) - 0.5 * implied - cost * own
    return (primal - dual) / primal


def _conjugate_gradients(features: Tensor, support: Tensor, cost: float, right: Tensor, diagonal: Tensor) -> Tensor:
    """Newton's direction of every class: (I + 2C X^T M X) s = right, to a thousandth of the gradient's norm, in float64 to a millionth.

    Looser, and with a large C it stalls: the part of the residual that is left outweighs what the step gains."""
    solution = torch.zeros_like(right)
    residual = right.clone()
    scaled = residual / diagonal
    direction = scaled.clone()
    product = (residual * scaled).sum(1)
    target = (1e-6 if right.dtype == torch.float32 else 1e-12) * product
    for _ in range(_INNER_STEPS):
        image = direction + 2 * cost * _back(features, support * _scores(features, direction))
        length = product / (direction * image).sum(1).clamp_min(1e-30)
        length = torch.where(product > target, length, torch.zeros_like(length))
        solution += length[:, None] * direction
        residual -= length[:, None] * image
        scaled = residual / diagonal
        renewed = (residual * scaled).sum(1)
        direction = scaled + (renewed / product.clamp_min(1e-30))[:, None] * direction
        product = torch.where(length > 0, renewed, product)
        if bool((product <= target).all()):
            break
    return solution


def _best_length(
    weights: Tensor, scores: Tensor, step: Tensor, step_scores: Tensor, signs: Tensor, cost: float
) -> Tensor:
    """How far to go along each class's step: the best of the full one and its halvings, or not at all."""
    best = torch.zeros(len(weights), dtype=weights.dtype, device=weights.device)
    value = _primal(weights, scores, signs, cost)
    for t in _LENGTHS[:8]:
        tried = _primal(weights + t * step, scores + t * step_scores, signs, cost)
        best = torch.where(tried < value, t, best)
        value = torch.minimum(tried, value)
        if bool((best > 0).all()):
            break
    return best


def _primal(weights: Tensor, scores: Tensor, signs: Tensor, cost: float) -> Tensor:
    slack = (1 - signs * scores).clamp_min(0)
    return 0.5 * weights.square().sum(1).double() + cost * slack.square().sum(0).double()

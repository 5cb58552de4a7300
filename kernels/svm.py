"""Batched linear SVMs: L2-regularised squared hinge, one-vs-rest, all classes and folds of a Gram matrix together.

Objective of each class, as liblinear's (with the intercept as one more, penalised, constant feature 1):

    min_w  1/2 |w|^2 + C sum_i max(0, 1 - y_i w.x_i)^2,     w = sum_i beta_i x_i

Newton's method on the support set (Keerthi & DeCoste, JMLR 2005, in the span of the rows: Chapelle, Neural
Computation 2007): with support S, (K_SS + I / 2C) beta_S = y_S and beta = 0 elsewhere. Float32 finds the support:
where it is large by conjugate gradients, all classes in one product, preconditioned with the few large eigenvalues
that features have in common; where it is small by one Cholesky factor per class. Float64 finishes what is not certified
then. Every solution comes with its duality gap.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GAP = 1e-4
"""Relative duality gap that a solution must reach."""
_GAP_AIM = 1e-5  # where the solver stops
_STEPS = 100
_STEPS_FLOAT32 = 25
_ROUGH_STEPS = 12
_ROUNDING = 1e-5  # relative, of an objective in float32
_RANK = 16  # of the dual's preconditioner
_PRIMAL_RANK = 64
_DUAL_INNER_STEPS = 32
_INNER_STEPS = 400
_BLOCK = {"cpu": 1 << 16, "cuda": 1 << 26}  # entries of the systems solved at once: more fall out of a CPU's cache
_BISECTIONS = 24
_LENGTHS = tuple(0.5**k for k in range(12))


class Gram(NamedTuple):
    """K = X X^T of n rows, in double and single precision, and K's leading part F F^T of low rank."""

    matrix: Tensor
    """float64 [n, n]."""
    rough: Tensor
    """float32 [n, n]."""
    factor: Tensor
    """float32 [n, r]."""

    @classmethod
    def of(cls, matrix: Tensor) -> Gram:
        """From K, float64 [n, n]; F by Nystrom's method on a subspace iterated twice (Halko et al., SIAM Review 2011)."""
        n = len(matrix)
        rough = matrix.float()
        generator = torch.Generator().manual_seed(0)
        basis = torch.randn(n, min(_RANK, n), generator=generator).to(rough.device)
        for _ in range(3):
            basis = torch.linalg.qr(rough @ basis)[0]
        values, vectors = torch.linalg.eigh(basis.T @ rough @ basis)
        return cls(matrix, rough, basis @ vectors * values.clamp_min(0).sqrt())

    def __getitem__(self, rows: Tensor) -> Gram:
        """Of some of the rows [m]."""
        return Gram(self.matrix[rows][:, rows], self.rough[rows][:, rows], self.factor[rows])


class Solution(NamedTuple):
    """Coefficients [P, n] of P problems over n rows, and the relative duality gap [P] of each."""

    beta: Tensor
    gap: Tensor


class Primal(NamedTuple):
    """Weights [K, d + 1] of K problems, the intercept last, and the relative duality gap [K] of each."""

    weights: Tensor
    gap: Tensor


class NotConverged(ArithmeticError):
    """A problem did not reach the duality gap; the message says which and how far."""


def solve(gram: Gram, signs: Tensor, cost: float, start: Tensor | None = None) -> Solution:
    """Solve P one-vs-rest problems over the rows of one Gram matrix: all classes, and all folds, together.

    gram: of X X^T + 1 for an intercept. signs: float64 [P, n] of -1 and +1, and 0 where a row is not in the problem, as
    one that a fold holds out; its coefficient is 0, in `start`, too. cost: C. start: beta [P, n] of a nearby C.
    Raises NotConverged rather than returning a solution whose gap is above 1e-4.
    """
    n, ridge = len(signs[0]), 1 / (2 * cost)
    beta = _from_all_rows(gram, signs, ridge) if start is None else start
    if ridge > 2e-5 * float(gram.matrix.diagonal().mean()):  # else float32's error outweighs the ridge
        rough = _newton(gram, signs.float(), cost, beta.float(), _ROUGH_STEPS).beta.double()
        beta = torch.where(rough.isfinite().all(1, keepdim=True), rough, beta)
    beta, gap = _newton(gram, signs, cost, beta, _STEPS)
    if not bool((gap <= GAP).all()):
        raise NotConverged(f"at C = {cost:g} a class stopped at a relative duality gap of {gap.max():.1e} (n = {n})")
    return Solution(beta, gap)


def objective(signs: Tensor, cost: float, beta: Tensor, scores: Tensor) -> Tensor:
    """The primal objective of each problem [P]. scores: beta @ gram [P, n]."""
    return 0.5 * (beta * scores).sum(1) + cost * _slack(signs, scores).square().sum(1)


def duality_gap(gram: Tensor, signs: Tensor, cost: float, beta: Tensor, scores: Tensor) -> Tensor:
    """(primal - dual) / primal of each problem [P]: how far from the optimum `beta` can be at most.

    The primal is taken at w = sum beta_i x_i, the dual at the nearest multipliers that are feasible, max(0, y beta).
    """
    return _Point.at(gram, signs, cost, beta, scores).gap


def _slack(signs: Tensor, scores: Tensor) -> Tensor:
    """max(0, 1 - y_i w.x_i) of the rows in each problem, 0 of the others [P, n]."""
    return torch.addcmul(signs.abs(), signs, scores, value=-1).clamp_min_(0)


class _Point(NamedTuple):
    """Where P problems stand: coefficients, scores and slack [P, n], primal objective and relative duality gap [P]."""

    beta: Tensor
    scores: Tensor
    slack: Tensor
    primal: Tensor
    gap: Tensor

    @classmethod
    def at(cls, matrix: Tensor, signs: Tensor, cost: float, beta: Tensor, scores: Tensor) -> _Point:
        """At some coefficients; scores: beta @ matrix."""
        slack = _slack(signs, scores)
        square = (beta * scores).sum(1)
        primal = 0.5 * square + cost * slack.square().sum(1)
        alpha = signs * beta
        outside = (alpha.amin(1) < 0).nonzero()[:, 0]
        if len(outside):
            alpha.clamp_min_(0)
            feasible = (signs * alpha)[outside]
            square[outside] = (feasible * (feasible @ matrix)).sum(1)
        gap = (primal - (alpha.sum(1) - 0.5 * square - alpha.square().sum(1) / (4 * cost))) / primal
        return cls(beta, scores, slack, primal, gap)

    def of(self, problems: Tensor) -> _Point:
        """Some of the problems."""
        return _Point(*(part[problems] for part in self))


def _from_all_rows(gram: Gram, signs: Tensor, ridge: float) -> Tensor:
    """The solution if every row supported every class: one factor for all problems over the same rows."""
    beta = torch.empty_like(signs)
    inside, which = torch.unique_consecutive(signs.abs(), dim=0, return_inverse=True)
    for number, rows in enumerate(inside):
        system = gram.matrix * rows[:, None]
        system.mul_(rows).diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(system)
        if failed:
            raise NotConverged(
                f"K + I / 2C is not positive definite in float64 at 1 / 2C = {ridge:g} (n = {len(system)})"
            )
        beta[which == number] = torch.cholesky_solve(signs[which == number].T, factor).T
    return beta


def _newton(gram: Gram, signs: Tensor, cost: float, beta: Tensor, steps: int) -> Solution:
    """Newton steps in the precision of `signs` and `beta` until every gap is small or `steps` are taken."""
    single = beta.dtype == torch.float32
    matrix, ridge = gram.rough if single else gram.matrix, 1 / (2 * cost)
    point = _Point.at(matrix, signs, cost, beta, beta @ matrix)
    result, problems = Solution(beta.clone(), point.gap.clone()), torch.arange(len(beta), device=beta.device)
    for _ in range(steps):
        more = ~(point.gap <= _GAP_AIM)  # also where it is not a number
        if not bool(more.all()):  # finished problems leave
            result.beta[problems], result.gap[problems] = point.beta, point.gap
            still = more.nonzero()[:, 0]
            problems, signs, point = problems[still], signs[still], point.of(still)
            if not len(problems):
                break
        support = point.slack > 0
        kept = point.beta * support
        kept_scores = point.scores if torch.equal(kept, point.beta) else kept @ matrix
        residual = torch.add(signs - kept_scores, kept, alpha=-ridge).mul_(support)
        if single and support.sum() > max(0.15 * support.shape[1], 48) * len(support):
            step = _conjugate_steps(gram, ridge, support, residual)
        else:
            step = _factored_steps(matrix, ridge, support, residual)
        before = point
        point = _line_search(matrix, signs, cost, point, kept + step, torch.addmm(kept_scores, step, matrix))
        nearer = (point.gap < before.gap / 2) | (point.primal < before.primal * (1 - _ROUNDING))
        if single and not bool(nearer.any()):
            break  # float32 goes no further
    result.beta[problems], result.gap[problems] = point.beta, point.gap
    return result


def _line_search(matrix: Tensor, signs: Tensor, cost: float, point: _Point, target: Tensor, goal: Tensor) -> _Point:
    """Go to the target, which scores `goal`; where that is worse, to the best point on the way, as finite convergence needs.

    The objective along the way is convex: its slope's zero is bisected.
    """
    reached = _Point.at(matrix, signs, cost, target, goal)
    worse = (~(reached.primal <= point.primal)).nonzero()[:, 0]  # also where it is not a number
    if not len(worse):
        return reached
    y, b, s = signs[worse], point.beta[worse], point.scores[worse]
    along, across = target[worse] - b, goal[worse] - s
    failed = ~(along.isfinite() & across.isfinite()).all(1, keepdim=True)
    along, across = along.masked_fill(failed, 0), across.masked_fill(failed, 0)
    start, curve = (along * s).sum(1), (along * across).sum(1)
    length = torch.zeros_like(start)
    for k in range(1, _BISECTIONS):
        tried = length + 0.5**k
        slack = _slack(y, torch.addcmul(s, tried[:, None], across))
        slope = start + tried * curve - 2 * cost * (y * across * slack).sum(1)
        length = torch.where(slope < 0, tried, length)
    beta, scores = (torch.addcmul(a, length[:, None], b) for a, b in ((b, along), (s, across)))
    for part, values in zip(reached, _Point.at(matrix, y, cost, beta, scores), strict=True):
        part[worse] = values
    return reached


def _conjugate_steps(gram: Gram, ridge: float, support: Tensor, right: Tensor) -> Tensor:
    """(K + I/2C)_SS x = right over each problem's support, to a hundredth of the residual; zero elsewhere.

    Preconditioned with (F F^T + tau I)_SS, by Woodbury's formula from one r x r system per problem.
    """
    matrix, factor = gram.rough, gram.factor
    rank = factor.shape[1]
    mask = support.to(matrix.dtype)
    tau = ridge + ((matrix.diagonal().sum() - factor.square().sum()) / len(matrix)).clamp_min(0)
    products = (factor[:, :, None] * factor[:, None, :]).flatten(1)
    inner = (mask @ products).view(-1, rank, rank)
    inner.diagonal(dim1=1, dim2=2).add_(tau)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(inner)[0])

    def precondition(r: Tensor) -> Tensor:  # times tau, which conjugate gradients are invariant to
        inside = torch.bmm(inverse, (r @ factor)[..., None])[..., 0]
        return torch.addcmul(r, inside @ factor.T, mask, value=-1)

    solution = torch.zeros_like(right)
    residual = right.clone()
    direction = precondition(residual)
    product = (residual * direction).sum(1)
    target = 1e-4 * residual.square().sum(1)
    for _ in range(_DUAL_INNER_STEPS):
        image = torch.addmm(direction, direction, matrix, beta=ridge).mul_(mask)
        length = (product / (direction * image).sum(1).clamp_min(1e-30))[:, None]
        solution.addcmul_(length, direction)
        residual.addcmul_(length, image, value=-1)
        if bool((residual.square().sum(1) <= target).all()):
            break
        scaled = precondition(residual)
        renewed = (residual * scaled).sum(1)
        direction = scaled.addcmul_((renewed / product.clamp_min(1e-30))[:, None], direction)
        product = renewed
    return solution


def _factored_steps(matrix: Tensor, ridge: float, support: Tensor, right: Tensor) -> Tensor:
    """The same by a Cholesky factor of each problem's (K + I/2C)_SS, problems of like size together."""
    out = torch.zeros_like(right)
    counts, order = support.sum(1).sort()
    sizes, end = counts.tolist(), len(counts)
    rows = support[order].to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    while end and sizes[end - 1]:
        size = sizes[end - 1]
        begin = max(0, end - max(1, _BLOCK[matrix.device.type] // size**2))
        some, place = order[begin:end], rows[begin:end, :size]
        filler = torch.arange(size, device=matrix.device) >= counts[begin:end, None]
        end = begin
        blocks = matrix[place[:, :, None], place[:, None, :]]
        blocks.masked_fill_(filler[:, :, None] | filler[:, None, :], 0)
        blocks.diagonal(dim1=1, dim2=2).add_(ridge).masked_fill_(filler, 1)
        vector = right[some].gather(1, place).masked_fill_(filler, 0)
        solved = torch.cholesky_solve(vector[..., None], torch.linalg.cholesky_ex(blocks)[0])[..., 0]
        out[some] = torch.zeros_like(right[some]).scatter_(1, place, solved.masked_fill(filler, 0))
    return out


def solve_primal(features: Tensor, signs: Tensor, cost: float, start: Tensor | None = None) -> Primal:
    """Solve the same problems in the primal, for more rows than features: truncated Newton, all classes together.

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
        return solve_primal(features.double(), signs.T, cost, weights)
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
    basis = torch.randn(min(_PRIMAL_RANK, width), width, generator=generator).to(features)
    for _ in range(3):
        basis = torch.linalg.qr(_back(features, _scores(features, basis)).T)[0].T
    return basis


def _inner(rows: Tensor, support: Tensor) -> Tensor:
    """X^T M X of each class [K, r, r], of rows [n, r] and its support [n, K], by blocks of rows that stay in the cache."""
    classes, rank = support.shape[1], rows.shape[1]
    out = rows.new_zeros(classes, rank, rank)
    step = max(64, 16 * _BLOCK[rows.device.type] // (classes * rank))
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

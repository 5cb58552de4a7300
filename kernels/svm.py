"""Batched linear SVMs: L2-regularised squared hinge, one-vs-rest, all classes of a Gram matrix together.

Objective of each class, as liblinear's (with the intercept as one more, penalised, constant feature 1):

    min_w  1/2 |w|^2 + C sum_i max(0, 1 - y_i w.x_i)^2,     w = sum_i beta_i x_i

Newton's method on the support set (Keerthi & DeCoste, JMLR 2005, in the span of the rows: Chapelle, Neural
Computation 2007): with support S, (K_SS + I / 2C) beta_S = y_S and beta = 0 elsewhere. Float32 finds the support:
where it is large by conjugate gradients, all classes in one product, preconditioned with the few large eigenvalues
that features have in common; where it is small by a Cholesky factor a class. Float64 finishes what is not certified
then. Every solution comes with its duality gap.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GAP = 1e-4
"""Relative duality gap that a solution must reach."""
_GAP_AIM = 1e-5  # what we stop at
_STEPS = 100
_STEPS_FLOAT32 = 25
_ROUGH_STEPS = 12
_RANK = 32  # of the preconditioner
_INNER_STEPS = 400
_BLOCK = 1 << 16  # entries of the systems solved at once: more fall out of the cache
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
    """Coefficients [K, n] of K problems over n rows, and the relative duality gap [K] of each."""

    beta: Tensor
    gap: Tensor


class Primal(NamedTuple):
    """Weights [K, d + 1] of K problems, the intercept last, and the relative duality gap [K] of each."""

    weights: Tensor
    gap: Tensor


class NotConverged(ArithmeticError):
    """A problem did not reach the duality gap; the message says which and how far."""


def solve(gram: Gram, signs: Tensor, cost: float, start: Tensor | None = None) -> Solution:
    """Solve K one-vs-rest problems that share their rows.

    gram: of X X^T + 1 for an intercept. signs: float64 [K, n] of -1 and +1. cost: C. start: beta [K, n] of a nearby C.
    Raises NotConverged rather than returning a solution whose gap is above 1e-4.
    """
    n, ridge = len(signs[0]), 1 / (2 * cost)
    beta = _from_all_rows(gram, signs, ridge) if start is None else start.clone()
    if ridge > 2e-5 * float(gram.matrix.diagonal().mean()):  # else float32's error outweighs the ridge
        rough = _newton(gram, signs.float(), cost, beta.float(), _ROUGH_STEPS).beta.double()
        beta = torch.where(rough.isfinite().all(1, keepdim=True), rough, beta)
    beta, gap = _newton(gram, signs, cost, beta, _STEPS)
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
    square = (beta * scores).sum(1)
    primal = 0.5 * square + cost * (1 - signs * scores).clamp_min(0).square().sum(1)
    alpha = signs * beta
    outside = (alpha.amin(1) < 0).nonzero()[:, 0]
    alpha = alpha.clamp_min(0)
    if len(outside):
        feasible = (signs * alpha)[outside]
        square[outside] = (feasible * (feasible @ gram)).sum(1)
    return (primal - (alpha.sum(1) - 0.5 * square - alpha.square().sum(1) / (4 * cost))) / primal


def objective(signs: Tensor, cost: float, beta: Tensor, scores: Tensor) -> Tensor:
    """The primal objective of each problem [K]."""
    slack = (1 - signs * scores).clamp_min(0)
    return 0.5 * (beta * scores).sum(1) + cost * slack.square().sum(1)


def _from_all_rows(gram: Gram, signs: Tensor, ridge: float) -> Tensor:
    """The solution if every row supported every class: one factor for all."""
    system = gram.matrix + ridge * torch.eye(len(gram.matrix), dtype=signs.dtype, device=signs.device)
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed:
        raise NotConverged(f"K + I / 2C is not positive definite in float64 at 1 / 2C = {ridge:g} (n = {len(system)})")
    return torch.cholesky_solve(signs.T, factor).T.contiguous()


def _newton(gram: Gram, signs: Tensor, cost: float, beta: Tensor, steps: int) -> Solution:
    """Newton steps in the precision of `signs` and `beta` until every gap is small or `steps` are taken."""
    single = beta.dtype == torch.float32
    matrix, ridge = gram.rough if single else gram.matrix, 1 / (2 * cost)
    scores = beta @ matrix
    gap = duality_gap(matrix, signs, cost, beta, scores)
    for _ in range(steps):
        open_ = (~(gap <= _GAP_AIM)).nonzero()[:, 0]  # also where it is not a number
        if not len(open_):
            break
        y, b, s = signs[open_], beta[open_], scores[open_]
        support = y * s < 1
        kept = b * support
        kept_scores = s if torch.equal(kept, b) else kept @ matrix
        residual = (y - kept_scores - ridge * kept) * support
        if single and support.sum() > max(0.15 * support.shape[1], 48) * len(support):
            step = _conjugate_steps(gram, ridge, support, residual)
        else:
            step = _factored_steps(matrix, ridge, support, residual)
        beta[open_], scores[open_] = _line_search(y, cost, b, s, kept + step, kept_scores + step @ matrix)
        before, gap[open_] = gap[open_], duality_gap(matrix, y, cost, beta[open_], scores[open_])
        if single and not bool((gap[open_] < before / 2).any()):
            break  # as far as float32 goes
    return Solution(beta, gap)


def _line_search(
    signs: Tensor, cost: float, beta: Tensor, scores: Tensor, target: Tensor, goal: Tensor
) -> tuple[Tensor, Tensor]:
    """Go from beta to target; where that is worse, to the best point on the way, as finite convergence needs it.

    scores and goal are what beta and target score. The objective along the way is convex: its slope's zero is bisected.
    """
    now, reached = objective(signs, cost, beta, scores), objective(signs, cost, target, goal)
    worse = (~(reached <= now)).nonzero()[:, 0]  # also where it is not a number
    if not len(worse):
        return target, goal
    y, b, s = signs[worse], beta[worse], scores[worse]
    along, across = target[worse] - b, goal[worse] - s
    failed = ~(along.isfinite() & across.isfinite()).all(1, keepdim=True)
    along, across = along.masked_fill(failed, 0), across.masked_fill(failed, 0)
    start, curve = (along * s).sum(1), (along * across).sum(1)
    length = torch.zeros_like(start)
    for k in range(1, _BISECTIONS):
        tried = length + 0.5**k
        slack = (1 - y * (s + tried[:, None] * across)).clamp_min(0)
        slope = start + tried * curve - 2 * cost * (y * across * slack).sum(1)
        length = torch.where(slope < 0, tried, length)
    target[worse], goal[worse] = b + length[:, None] * along, s + length[:, None] * across
    return target, goal


def _conjugate_steps(gram: Gram, ridge: float, support: Tensor, right: Tensor) -> Tensor:
    """(K + I/2C)_SS x = right over each problem's support, to a ten thousandth of the residual; zero elsewhere.

    Preconditioned with (F F^T + tau I)_SS, by Woodbury's formula from one r x r system a problem.
    """
    matrix, factor = gram.rough, gram.factor
    rank = factor.shape[1]
    mask = support.to(matrix.dtype)
    tau = ridge + ((matrix.diagonal().sum() - factor.square().sum()) / len(matrix)).clamp_min(0)
    products = (factor[:, :, None] * factor[:, None, :]).flatten(1)
    inner = (mask @ products).view(-1, rank, rank)
    inner.diagonal(dim1=1, dim2=2).add_(tau)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(inner)[0])

    def precondition(r: Tensor) -> Tensor:
        inside = torch.bmm(inverse, (r @ factor)[..., None])[..., 0]
        return (r - (inside @ factor.T) * mask) / tau

    solution = torch.zeros_like(right)
    residual = right.clone()
    direction = precondition(residual)
    product = (residual * direction).sum(1)
    target = 1e-8 * residual.square().sum(1)
    for _ in range(_RANK):
        image = (direction @ matrix + ridge * direction) * mask
        length = product / (direction * image).sum(1).clamp_min(1e-30)
        solution += length[:, None] * direction
        residual -= length[:, None] * image
        if bool((residual.square().sum(1) <= target).all()):
            break
        scaled = precondition(residual)
        renewed = (residual * scaled).sum(1)
        direction = scaled + (renewed / product.clamp_min(1e-30))[:, None] * direction
        product = renewed
    return solution


def _factored_steps(matrix: Tensor, ridge: float, support: Tensor, right: Tensor) -> Tensor:
    """The same by a Cholesky factor of each problem's (K + I/2C)_SS, problems of like size together."""
    out = torch.zeros_like(right)
    counts, order = support.sum(1).sort()
    sizes, end = counts.tolist(), len(counts)
    while end and sizes[end - 1]:
        size = sizes[end - 1]
        begin = max(0, end - max(1, _BLOCK // size**2))
        some = order[begin:end]
        filler = torch.arange(size, device=matrix.device) >= counts[begin:end, None]
        end = begin
        place = support[some].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :size]
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
        inner = torch.stack([(leading * mask[:, None]).T @ leading for mask in support.T])
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
        diagonal.add_(1 + 1e-6 * diagonal.sum(1, keepdim=True))  # what rounding took, so that the factor exists
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
    basis = torch.randn(min(2 * _RANK, width), width, generator=generator).to(features)
    for _ in range(3):
        basis = torch.linalg.qr(_back(features, _scores(features, basis)).T)[0].T
    return basis


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

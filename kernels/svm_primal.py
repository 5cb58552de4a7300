"""The same SVMs as `svm`'s in the primal, for more rows than features: truncated Newton, all classes together."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from fastcon.kernels import svm
from torch import Tensor

_STEPS, _STEPS_FLOAT32 = 100, 25
_RANK = 64  # of the preconditioner
_INNER_STEPS = 400
_FEW_STEPS = 16  # of conjugate gradients; a factor that costs no more is quicker
_ROWS_TOGETHER = 1 << 12  # of a Hessian
_EASY = 100  # 2C times a row's squared norm: to here any start will do


class Primal(NamedTuple):
    """Weights [K, d + 1] of K problems, the intercept last, and the relative duality gap [K] of each."""

    weights: Tensor
    gap: Tensor


def solve(features: Tensor, signs: Tensor, cost: float, start: Tensor | None = None) -> Primal:
    """Solve K one-vs-rest problems over the same rows.

    features: [n, d] float32 or float64 (a constant column is added inside for the intercept). signs: [K, n] of -1 and
    +1. start: weights [K, d + 1] of a problem nearby, as of most of the rows; for a large C it helps little. Weights are
    float64 where float32 did not suffice. Memory beyond the features: twice as much for them in float64, a few matrices
    [n, K] and [K, d + 1], and a few [d, d] and [4096, d] for factors. Raises NotConverged where a gap stays above 1e-4.
    """
    return solve_path(features, signs, [cost], start)[0]


def solve_path(features: Tensor, signs: Tensor, costs: Sequence[float], start: Tensor | None = None) -> list[Primal]:
    """The same for several C, each from the one before; they are quickest in rising order. start: of the first C.

    A large C is come to from smaller ones, as its optimum is far from any start but theirs.
    """
    rows, signs = _Rows(features), signs.T
    weights = features.new_zeros(signs.shape[1], features.shape[1] + 1) if start is None else start
    rungs = max(0, math.ceil(math.log10(2 * costs[0] * float(rows.norms.mean()) / _EASY)))
    path = []
    for cost in [*(costs[0] / 10**k for k in range(rungs, 0, -1)), *costs]:
        path.append(_solved(rows, signs, cost, weights))
        weights = path[-1].weights
    for cost, (_, gap) in zip(costs, path[rungs:], strict=True):
        if not bool((gap <= svm.GAP).all()):
            worst = int(gap.argmax())
            raise svm.NotConverged(
                f"class {worst} at C = {cost:g} stopped at a relative duality gap of {gap[worst]:.1e} "
                f"(n = {features.shape[0]}, d = {features.shape[1]})"
            )
    return path[rungs:]


def _solved(rows: _Rows, signs: Tensor, cost: float, start: Tensor) -> Primal:
    """In float32 as far as it goes, and what is left in float64."""
    suffices = svm.float32_suffices(cost, rows.norms)
    solved = _newton(rows if suffices else rows.double, signs, cost, start)
    left = (~(solved.gap <= svm.GAP_AIM)).nonzero()[:, 0]
    if not len(left) or solved.weights.dtype == torch.float64:
        return solved
    finished = _newton(rows.double, signs[:, left], cost, solved.weights[left])
    gap = solved.gap.index_copy(0, left, finished.gap)
    return Primal(solved.weights.double().index_copy(0, left, finished.weights), gap)


class _Rows:
    """Features [n, d], and what is made of them once and where it is needed."""

    def __init__(self, features: Tensor) -> None:
        self.features = features

    @functools.cached_property
    def double(self) -> _Rows:
        """The same in float64."""
        return self if self.features.dtype == torch.float64 else _Rows(self.features.double())

    @functools.cached_property
    def norms(self) -> Tensor:
        """Squared, with the constant column [n]."""
        return self.features.square().sum(1) + 1

    @functools.cached_property
    def leading(self) -> _Leading:
        """What they have most in common."""
        return _Leading.of(self)


def _newton(rows: _Rows, signs: Tensor, cost: float, start: Tensor) -> Primal:
    """Newton steps in the features' precision until every gap is small, float32 comes no nearer, or many are taken."""
    features, single = rows.features, rows.features.dtype == torch.float32
    signs, weights = signs.to(features.dtype), start.to(features.dtype)
    unknown = torch.full((len(weights),), torch.inf, dtype=torch.float64, device=weights.device)
    result, problems = Primal(weights.clone(), unknown.clone()), torch.arange(len(weights), device=weights.device)
    least_gap, least, moves = unknown, unknown, unknown > 0
    scores = _scores(features, weights)
    for left in range(_STEPS_FLOAT32 if single else _STEPS, -1, -1):
        slack = (1 - signs * scores).clamp_min(0)
        gradient = weights - 2 * cost * _back(features, signs * slack)
        primal, gap = _certified(weights, gradient, slack, cost)
        result.weights[problems], result.gap[problems] = weights, gap
        more = moves & ~(gap <= svm.GAP_AIM)  # also where it is not a number
        if single:
            more &= (gap < least_gap / 2) | (primal < least * (1 - svm.ROUNDING))
        least_gap, least = torch.minimum(least_gap, gap), torch.minimum(least, primal)
        still = more.nonzero()[:, 0]
        if not left or not len(still):
            break
        if len(still) < len(problems):  # the others leave
            problems, weights, gradient = (part[still] for part in (problems, weights, gradient))
            least_gap, least = least_gap[still], least[still]
            signs, scores, slack = (part[:, still] for part in (signs, scores, slack))
        step = _step(rows, slack > 0, signs, cost, weights, gradient)
        found = step.isfinite().all(1)
        step = torch.where(found[:, None], step, 0)
        across = _scores(features, step)
        length = _length(weights, scores, step, across, signs, cost)
        weights, scores = weights + length[:, None] * step, scores + length * across
        moves = found & (length > 0)  # else the next step is the same
    return result


def _step(rows: _Rows, support: Tensor, signs: Tensor, cost: float, weights: Tensor, gradient: Tensor) -> Tensor:
    """Newton's direction of every class [K, d + 1]: by conjugate gradients, or by a factor where that is less work.

    How many of their steps will do is not known before: where a factor takes more than a few it is left until they have
    taken as long, so that both together take at most twice the better one's time (but for 400 steps, which are not exceeded).
    """
    features, (n, d) = rows.features, rows.features.shape
    count = support.sum(0).double()
    side = count.clamp_max(d)
    # Of a factor, in float64, and of one of their steps, which in float32 takes half as long.
    of_factor, of_step = side * (2 * d * count + side.square() / 3), 4 * n * d
    worth = of_factor / of_step * (2 if features.dtype == torch.float32 else 1)
    factored = worth <= _FEW_STEPS
    step = torch.zeros_like(weights)
    some = (~factored).nonzero()[:, 0]
    if len(some):
        mask = support[:, some].to(features.dtype)
        inverse = rows.leading.inverse(mask, cost)
        step[some], done = _conjugate_gradients(features, mask, cost, -gradient[some], inverse, worth[some])
        factored[some] = ~done
    for k in factored.nonzero()[:, 0].tolist():
        these = support[:, k].nonzero()[:, 0]
        if len(these) > d:
            step[k] = -_through_hessian(features, these, cost, gradient[k].double()).to(features.dtype)
        else:
            target = _through_gram(features[these].double(), signs[these, k].double(), cost)
            step[k] = target.to(features.dtype) - weights[k]
    return step


def _through_gram(support: Tensor, signs: Tensor, cost: float) -> Tensor:
    """The optimum [d + 1] if these rows [s, d] are the support: X^T (X X^T + I / 2C)^-1 y."""
    gram = support @ support.T + 1
    gram.diagonal().add_(1 / (2 * cost))
    beta = torch.cholesky_solve(signs[:, None], torch.linalg.cholesky_ex(gram)[0])[:, 0]
    return torch.cat([beta @ support, beta.sum()[None]])


def _through_hessian(features: Tensor, support: Tensor, cost: float, right: Tensor) -> Tensor:
    """(I + 2C X^T X)^-1 right [d + 1], of the rows whose numbers are given, by blocks of them."""
    hessian = torch.eye(len(right), dtype=right.dtype, device=right.device)
    for some in support.split(_ROWS_TOGETHER):
        block = features[some].double()
        block = torch.cat([block, block.new_ones(len(block), 1)], 1)
        hessian.addmm_(block.T, block, alpha=2 * cost)
    return torch.cholesky_solve(right[:, None], torch.linalg.cholesky_ex(hessian)[0])[:, 0]


class _Leading(NamedTuple):
    """What rows, with the constant column, have most in common, and what that says of each of them."""

    basis: Tensor
    """Orthonormal [r, d + 1]."""
    rows: Tensor
    """In this basis [n, r]."""
    norms: Tensor
    """Squared, of the whole rows [n]."""

    @classmethod
    def of(cls, rows: _Rows) -> _Leading:
        """By Halko et al.'s iteration on a random subspace."""
        generator, features = torch.Generator().manual_seed(0), rows.features
        width = features.shape[1] + 1
        basis = torch.randn(min(_RANK, width), width, generator=generator).to(features)
        for _ in range(3):
            basis = torch.linalg.qr(_back(features, _scores(features, basis)).T)[0].T
        return cls(basis, _scores(features, basis), rows.norms)

    def inverse(self, support: Tensor, cost: float) -> Callable[[Tensor], Tensor]:
        """Of I + 2C X^T M X of each class, nearly: exact in the basis, uniform elsewhere. support: M [n, K]."""
        inner = _inner(self.rows, support)
        diagonal = inner.diagonal(dim1=1, dim2=2)
        others = (self.norms @ support - diagonal.sum(1)).clamp_min(0) / self.basis.shape[1]
        rest = (1 + 2 * cost * others)[:, None]
        inner.mul_(2 * cost)
        diagonal.add_(1 + 1e-6 * diagonal.sum(1, keepdim=True))  # makes up for rounding, so that the factor exists
        inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(inner)[0])

        def apply(right: Tensor) -> Tensor:
            inside = right @ self.basis.T
            solved = torch.bmm(inverse, inside[..., None])[..., 0]
            return right / rest + (solved - inside / rest) @ self.basis

        return apply


def _inner(rows: Tensor, support: Tensor) -> Tensor:
    """X^T M X of each class [K, r, r], of rows [n, r] and its support [n, K], by blocks of rows that stay in the cache."""
    classes, rank = support.shape[1], rows.shape[1]
    out = rows.new_zeros(classes, rank, rank)
    step = max(64, 16 * svm.BLOCK[rows.device.type] // (classes * rank))
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


def _certified(weights: Tensor, gradient: Tensor, slack: Tensor, cost: float) -> tuple[Tensor, Tensor]:
    """The objective and the relative duality gap [K], the dual at alpha = 2C slack, whose weights are w - gradient."""
    squares = slack.double().square().sum(0)
    primal = 0.5 * weights.double().square().sum(1) + cost * squares
    implied = (weights - gradient).double().square().sum(1)
    dual = 2 * cost * slack.double().sum(0) - 0.5 * implied - cost * squares
    return primal, (primal - dual) / primal


def _conjugate_gradients(
    features: Tensor,
    support: Tensor,
    cost: float,
    right: Tensor,
    precondition: Callable[[Tensor], Tensor],
    most: Tensor,
) -> tuple[Tensor, Tensor]:
    """Newton's direction of every class: (I + 2C X^T M X) s = right, to a thousandth of the gradient's norm, in float64 to a millionth.

    Looser, and with a large C it stalls: the part of the residual that is left outweighs what the step gains. Also
    returns which classes came so far [K], in the number of steps that each may take, most [K].
    """
    solution = torch.zeros_like(right)
    residual = right.clone()
    direction = precondition(residual)
    product = (residual * direction).sum(1)
    target = (1e-6 if right.dtype == torch.float32 else 1e-12) * product
    done = product == 0
    for number in range(min(_INNER_STEPS, math.ceil(float(most.max())))):
        image = direction + 2 * cost * _back(features, support * _scores(features, direction))
        curvature = (direction * image).sum(1)
        going = ~done & (product > 0) & (curvature > 0) & (number < most)  # else rounding, or too long
        if not bool(going.any()):
            break
        length = torch.where(going, product / curvature, 0)
        solution += length[:, None] * direction
        residual -= length[:, None] * image
        scaled = precondition(residual)
        renewed = (residual * scaled).sum(1)
        direction = scaled + torch.where(going, renewed / product, 0)[:, None] * direction
        product = torch.where(going, renewed, product)
        done |= going & (product <= target)
    return solution, done


def _length(weights: Tensor, scores: Tensor, step: Tensor, across: Tensor, signs: Tensor, cost: float) -> Tensor:
    """How far to go along each class's step: all of it, the best length where that is worse, or not at all [K]."""
    before = _primal(weights, scores, signs, cost)
    length = (_primal(weights + step, scores + across, signs, cost) <= before).to(weights.dtype)
    worse = (length == 0).nonzero()[:, 0]
    if len(worse):
        w, s, (y, x, a) = weights[worse], step[worse], (part[:, worse].T for part in (signs, scores, across))
        low, best = svm.best_length(y, cost, x, a, (w * s).sum(1), (s * s).sum(1))
        for tried in (low, best):
            less = _primal(w + tried[:, None] * s, (x + tried[:, None] * a).T, y.T, cost) <= before[worse]
            length[worse] = torch.where(less, tried, length[worse])
    return length


def _primal(weights: Tensor, scores: Tensor, signs: Tensor, cost: float) -> Tensor:
    slack = (1 - signs * scores).clamp_min(0)
    return 0.5 * weights.double().square().sum(1) + cost * slack.double().square().sum(0)

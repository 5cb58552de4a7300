"""Batched linear SVMs: L2-regularised squared hinge, one-vs-rest, all classes and folds of a Gram matrix together.

Objective of each class, as liblinear's (with the intercept as one more, penalised, constant feature 1):

    min_w  1/2 |w|^2 + C sum_i max(0, 1 - y_i w.x_i)^2,     w = sum_i beta_i x_i

Newton's method on the support set (Keerthi & DeCoste, JMLR 2005, in the span of the rows: Chapelle, Neural
Computation 2007): with support S, (K_SS + I / 2C) beta_S = y_S and beta = 0 elsewhere. Float32 finds the support:
where it is large by conjugate gradients, all classes in one product, preconditioned with the few large eigenvalues
that features have in common; where it is small by one Cholesky factor per class. Float64 finishes what is not at
its optimum then. Every solution comes with its duality gap.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

GAP = 1e-4
"""Relative duality gap that a solution must reach."""
GAP_AIM = 2e-6
"""Where the solvers stop: predictions are those of 1e-9 then but for one in thousands."""
ROUNDING = 1e-5
"""Relative, of an objective in float32."""
BLOCK = {"cpu": 1 << 16, "cuda": 1 << 26}
"""Entries of the systems solved at once: more fall out of a CPU's cache."""
_STEPS = 100
_ROUGH_STEPS = 12
_LARGE = 0.15  # a support of this share of the rows is solved by conjugate gradients
_STAYING = 0.4  # share of the support that has to stay where a solution only grows
_SETTLED, _SCALE_STEPS = 1.05, 3
_RANK = 16  # of the preconditioner
_INNER_STEPS = 32
_PER_BLOCK = {"cpu": 1 << 16, "cuda": 1 << 24}  # coefficients of a block: a CPU's cache holds no more
_SEARCH_STEPS, _SEARCH_STEPS_AT_MOST = 8, 40


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
        both = (part.index_select(0, rows).index_select(1, rows) for part in (self.matrix, self.rough))
        return Gram(*both, self.factor[rows])


def float32_suffices(cost: float, norms: Tensor) -> bool:
    """Whether the ridge outweighs float32's error, for a beginning at least. norms: of the rows, squared [n]."""
    return 1 / (2 * cost) > 2e-5 * float(norms.mean())


class Solution(NamedTuple):
    """Coefficients [P, n] of P problems over n rows, and the relative duality gap [P] of each."""

    beta: Tensor
    gap: Tensor


class NotConverged(ArithmeticError):
    """A problem did not reach the duality gap; the message says which and how far."""


def solve(gram: Gram, signs: Tensor, cost: float, start: Tensor | None = None) -> Solution:
    """Solve P one-vs-rest problems over the rows of one Gram matrix: all classes, and all folds, together.

    gram: of X X^T + 1 for an intercept. signs: float64 [P, n] of -1 and +1, and 0 where a row is not in the problem, as
    one that a fold holds out; its coefficient is 0, in `start`, too. Every problem has rows. cost: C. start: beta [P, n] of a problem nearby: of
    another C, or of other rows as well. Raises NotConverged rather than returning a solution whose gap is above 1e-4.
    """
    return solve_path(gram, signs, [cost], start)[0]


def solve_path(gram: Gram, signs: Tensor, costs: Sequence[float], start: Tensor | None = None) -> list[Solution]:
    """The same for several C, each from those before; they are quickest in rising order. start: of the first C."""
    blocks = _blocks(gram, signs)
    paths: list[list[_Point]] = [[] for _ in blocks]
    ridges = [1 / (2 * cost) for cost in costs]
    solutions = []
    for k, cost in enumerate(costs):
        begun = []
        for block, path in zip(blocks, paths, strict=True):
            if path:
                began = _predicted(path, ridges[: k + 1], block.signs)
            else:
                began = _first(block, ridges[0], None if start is None else start[block.problems][:, block.rows])
            begun.append(_approached(block, cost, began))
        points = _finished(gram, blocks, begun, cost)
        for path, point in zip(paths, points, strict=True):
            path[:] = [*path[-1:], point]  # more are not needed, and would take the memory of a solution each
        beta = torch.cat(
            [block.over_all(point.beta, len(gram.matrix)) for block, point in zip(blocks, points, strict=True)]
        )
        solutions.append(Solution(beta, torch.cat([point.gap for point in points])))
    return solutions


class _Block(NamedTuple):
    """Problems that are solved together, and the rows that any of them is about."""

    problems: slice
    rows: Tensor
    """[m] of all rows."""
    gram: Gram
    """Of these rows."""
    signs: Tensor
    """[p, m]."""

    def over_all(self, values: Tensor, n: int) -> Tensor:
        """Values [p, m] of these rows among all, zero for the others [p, n]."""
        if len(self.rows) == n:
            return values
        return values.new_zeros(len(values), n).index_copy_(1, self.rows, values)


def _blocks(gram: Gram, signs: Tensor) -> list[_Block]:
    """Problems over the same rows in one block, and those of several such sets while they are small."""
    inside, n = signs != 0, signs.shape[1]
    begins = [0, *((inside[1:] != inside[:-1]).any(1).nonzero()[:, 0] + 1).tolist(), len(signs)]
    largest = max(end - begin for begin, end in itertools.pairwise(begins))
    together = max(1, _PER_BLOCK[signs.device.type] // (n * largest))
    blocks = []
    for first, end in itertools.pairwise([*begins[:-1:together], len(signs)]):
        rows = inside[first:end].any(0).nonzero()[:, 0]
        some = signs[first:end] if len(rows) == n else signs[first:end, rows]
        blocks.append(_Block(slice(first, end), rows, gram if len(rows) == n else gram[rows], some))
    return blocks


class _Start(NamedTuple):
    """Where Newton's method begins: coefficients and scores, and what it takes for the support first [P, n]."""

    beta: Tensor
    scores: Tensor
    support: Tensor


def _predicted(points: list[_Point], ridges: list[float], signs: Tensor) -> _Start:
    """Where the solutions for the last of the ridges may be, from those for the ones before.

    At first a solution grows with C, and the rows that it grows past leave the support. At last the support stays
    as it is, and beta = (K_SS + ridge I)^-1 y_S is nearly linear in the ridge. In between nothing better is known than
    the support that was.
    """
    last = points[-1]
    beta, scores, support = last.beta, last.scores, last.beta != 0
    scale = _best_scale(signs.float(), ridges[-1], beta.float(), scores.float()).double()
    grown = _slack(signs, scale * scores) > 0
    grows = grown.sum(1, keepdim=True) > _STAYING * support.sum(1, keepdim=True)
    factor = torch.where(grows, scale, 1)
    if len(points) > 1 and ridges[-2] != ridges[-3]:
        before = points[-2]
        settled = ~grows & (scale < _SETTLED) & ((before.beta != 0) == support).all(1, keepdim=True)
        further = settled * ((ridges[-1] - ridges[-2]) / (ridges[-2] - ridges[-3]))
        beta = beta + further * (beta - before.beta)
        scores = scores + further * (scores - before.scores)
    beta, scores = factor * beta, factor * scores
    return _Start(beta, scores, torch.where(grows, grown, (signs * beta > 0) | (_slack(signs, scores) > 0)))


def _best_scale(signs: Tensor, ridge: float, beta: Tensor, scores: Tensor) -> Tensor:
    """The multiple of each beta with the least objective [P, 1], nearly: by Newton's method in this one number."""
    inside, margins, square = signs.abs(), signs * scores, (beta * scores).sum(1, keepdim=True)
    scale = torch.ones_like(square)
    for _ in range(_SCALE_STEPS):
        slack = torch.addcmul(inside, margins, scale, value=-1).clamp_min_(0)
        slope = ridge * scale * square - (margins * slack).sum(1, keepdim=True)
        curve = ridge * square + (margins.square() * (slack > 0)).sum(1, keepdim=True)
        scale = scale - slope / curve.clamp_min(1e-30)
    return scale


def _first(block: _Block, ridge: float, beta: Tensor | None) -> _Start:
    if beta is None:
        beta = _from_all_rows(block.gram, block.signs, ridge)
    return _Start(beta, beta @ block.gram.matrix, block.signs * beta > 0)


def _approached(block: _Block, cost: float, start: _Start) -> tuple[_Point, Tensor]:
    """Where Newton's method in float32 comes, in float64, and what to take for the support there."""
    gram, signs, support = block.gram, block.signs, start.support
    beta, scores = start.beta, start.scores
    if float32_suffices(cost, gram.matrix.diagonal()):
        single = _Start(beta.float(), scores.float(), support)
        rough = _newton(gram, signs.float(), cost, single, _ROUGH_STEPS).beta.double()
        beta = torch.where(rough.isfinite().all(1, keepdim=True), rough, beta)
        scores = beta @ gram.matrix
        support = _slack(signs, scores) > 0
    return _Point.at(gram.matrix, signs, cost, beta, scores), support


def _finished(gram: Gram, blocks: list[_Block], begun: list[tuple[_Point, Tensor]], cost: float) -> list[_Point]:
    """What is not near enough yet goes on in float64, what is left of all blocks together. Raises NotConverged."""
    n = len(gram.matrix)
    left = [(~(point.gap <= GAP_AIM)).nonzero()[:, 0] for point, _ in begun]  # also where it is not a number
    if not any(len(some) for some in left):
        return [point for point, _ in begun]

    def of_all(values: Sequence[Tensor]) -> Tensor:
        each = zip(blocks, left, values, strict=True)
        return torch.cat([block.over_all(value[some], n) for block, some, value in each])

    beta = of_all([point.beta for point, _ in begun])
    start = _Start(beta, beta @ gram.matrix, of_all([support for _, support in begun]))
    ended = _newton(gram, of_all([block.signs for block in blocks]), cost, start, _STEPS)
    if not bool((ended.gap <= GAP).all()):
        raise NotConverged(
            f"at C = {cost:g} a class stopped at a relative duality gap of {ended.gap.max():.1e} (n = {n})"
        )
    points, at = [], 0
    for block, some, (point, _) in zip(blocks, left, begun, strict=True):
        points.append(point.with_some(some, ended.of(slice(at, at + len(some))).of_rows(block.rows)))
        at += len(some)
    return points


def objective(signs: Tensor, cost: float, beta: Tensor, scores: Tensor) -> Tensor:
    """The primal objective of each problem [P]. scores: beta @ gram [P, n]."""
    return 0.5 * (beta * scores).sum(1) + cost * _slack(signs, scores).square().sum(1)


def duality_gap(gram: Tensor, signs: Tensor, cost: float, beta: Tensor, scores: Tensor) -> Tensor:
    """(primal - dual) / primal of each problem [P]: how far from the optimum `beta` can be at most.

    The primal is taken at w = sum beta_i x_i, the dual at the nearest multipliers that are feasible, max(0, y beta).
    """
    return _Point.at(gram, signs, cost, beta, scores, exact=math.inf).gap


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
    def at(cls, matrix: Tensor, signs: Tensor, cost: float, beta: Tensor, scores: Tensor, exact: float = GAP) -> _Point:
        """At some coefficients; scores: beta @ matrix. A gap above `exact` may be of multipliers that are not feasible."""
        slack = _slack(signs, scores)
        square = (beta * scores).sum(1)
        primal = 0.5 * square + cost * _squared(slack)
        alpha = signs * beta
        gap = (primal - _dual(alpha, square, cost)) / primal
        unsure = (gap <= exact).nonzero()[:, 0]
        alpha = alpha[unsure]
        infeasible = alpha.amin(1) < 0
        if bool(infeasible.any()):
            unsure, alpha = unsure[infeasible], alpha[infeasible].clamp_min_(0)
            feasible = signs[unsure] * alpha
            square = (feasible * (feasible @ matrix)).sum(1)
            gap[unsure] = (primal[unsure] - _dual(alpha, square, cost)) / primal[unsure]
        return cls(beta, scores, slack, primal, gap)

    def of(self, problems: Tensor | slice) -> _Point:
        """Some of the problems."""
        return _Point(*(part[problems] for part in self))

    def of_rows(self, rows: Tensor) -> _Point:
        """The same, told of some of the rows."""
        if len(rows) == self.beta.shape[1]:
            return self
        return self._replace(beta=self.beta[:, rows], scores=self.scores[:, rows], slack=self.slack[:, rows])

    def with_some(self, problems: Tensor, points: _Point) -> _Point:
        """With some of the problems elsewhere."""
        if len(problems) == len(self.gap):
            return points
        return _Point(*(part.index_copy(0, problems, some) for part, some in zip(self, points, strict=True)))


def _dual(alpha: Tensor, square: Tensor, cost: float) -> Tensor:
    """The dual objective [P] at multipliers alpha [P, n]; square: |sum y alpha x|^2."""
    return alpha.sum(1) - 0.5 * square - _squared(alpha) / (4 * cost)


def _squared(vectors: Tensor) -> Tensor:
    """Their squared lengths."""
    return torch.linalg.vector_norm(vectors, dim=1).square_()


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


def _newton(gram: Gram, signs: Tensor, cost: float, start: _Start, steps: int) -> _Point:
    """Newton steps in the precision of `signs` and `start` until every gap is small or `steps` are taken."""
    single = start.beta.dtype == torch.float32
    matrix, ridge = gram.rough if single else gram.matrix, 1 / (2 * cost)
    result = point = _Point.at(matrix, signs, cost, start.beta, start.scores)
    support, problems = start.support, torch.arange(len(signs), device=signs.device)
    for number in range(steps):
        more = ~(point.gap <= GAP_AIM)  # also where it is not a number
        if not bool(more.all()):  # finished problems leave
            result = result.with_some(problems, point)
            still = more.nonzero()[:, 0]
            problems, signs, point, support = problems[still], signs[still], point.of(still), support[still]
            if not len(problems):
                return result
        if single and support.sum() > max(_LARGE * support.shape[1], 48) * len(support):
            kept = point.beta * support
            kept_scores = point.scores if torch.equal(kept, point.beta) else kept @ matrix
            step = _conjugate_steps(
                gram, ridge, support, torch.add(signs - kept_scores, kept, alpha=-ridge).mul_(support)
            )
            target, goal = kept + step, torch.addmm(kept_scores, step, matrix)
        else:
            target = _factored(matrix, ridge, support, signs)
            goal = target @ matrix
        before = point
        point = _line_search(matrix, signs, cost, point, target, goal)
        nearer = (point.gap < before.gap / 2) | (point.primal < before.primal * (1 - ROUNDING))
        if single and number and not bool(nearer.any()):
            break  # float32 goes no further; the first step's support was a guess
        support = point.slack > 0
    return result.with_some(problems, point)


def _line_search(matrix: Tensor, signs: Tensor, cost: float, point: _Point, target: Tensor, goal: Tensor) -> _Point:
    """Go to the target, which scores `goal`; where that is worse, to the best point on the way, as finite convergence needs.

    A certified target is not worse than what is further from its optimum, whatever rounding does to its objective.
    """
    reached = _Point.at(matrix, signs, cost, target, goal)
    nearer = (reached.gap <= GAP) & (reached.gap < point.gap)
    worse = ~((reached.primal <= point.primal) | nearer)  # also where it is not a number
    worse = worse.nonzero()[:, 0]
    if not len(worse):
        return reached
    y, b, s = signs[worse], point.beta[worse], point.scores[worse]
    along, across = target[worse] - b, goal[worse] - s
    failed = ~(along.isfinite() & across.isfinite()).all(1, keepdim=True)
    along, across = along.masked_fill(failed, 0), across.masked_fill(failed, 0)
    low, length = best_length(y, cost, s, across, (along * s).sum(1), (along * across).sum(1))

    def at(length: Tensor) -> _Point:
        beta, scores = (torch.addcmul(a, length[:, None], b) for a, b in ((b, along), (s, across)))
        return _Point.at(matrix, y, cost, beta, scores)

    found = at(length)
    above = found.primal > point.primal[worse]
    if bool(above.any()):
        found = at(torch.where(above, low, length))
    for part, values in zip(reached, found, strict=True):
        part[worse] = values
    return reached


def best_length(
    signs: Tensor, cost: float, scores: Tensor, across: Tensor, start: Tensor, curve: Tensor
) -> tuple[Tensor, Tensor]:
    """How far to go along a way that begins downhill, from 0 to 1, and a shorter length where it still falls [P] each.

    scores: at its beginning, and across: what all of it adds [P, n]. start, curve: slope and curvature along it of half the
    squared weights [P]. The objective is convex and piecewise quadratic: its slope's zero is found by Newton's method,
    within the bounds that the slopes seen so far give.
    """
    margins = signs * across
    low, high = torch.zeros_like(start), torch.ones_like(start)
    length = high
    for number in range(_SEARCH_STEPS_AT_MOST):
        if number >= _SEARCH_STEPS and bool((low > 0).all()):
            break  # all of them come down at least
        slack = _slack(signs, torch.addcmul(scores, length[:, None], across))
        slope = start + length * curve - 2 * cost * (margins * slack).sum(1)
        low, high = torch.where(slope < 0, length, low), torch.where(slope < 0, high, length)
        newton = length - slope / (curve + 2 * cost * (margins.square() * (slack > 0)).sum(1))
        length = torch.where((newton >= low) & (newton <= high), newton, (low + high) / 2)
    return low, length


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
    for _ in range(_INNER_STEPS):
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


def _factored(matrix: Tensor, ridge: float, support: Tensor, right: Tensor) -> Tensor:
    """(K + I/2C)_SS x = right over each problem's support by a Cholesky factor each, problems of like size together."""
    out = torch.zeros_like(right)
    counts = support.sum(1)
    rows, starts = support.nonzero()[:, 1], counts.cumsum(0) - counts
    counts, order = counts.sort()
    sizes, end = counts.tolist(), len(counts)
    while end and sizes[end - 1]:
        size = sizes[end - 1]
        begin = max(0, end - max(1, BLOCK[matrix.device.type] // size**2))
        some, number = order[begin:end], torch.arange(size, device=matrix.device)
        filler = number >= counts[begin:end, None]
        place = rows[(starts[some, None] + number).clamp_max_(len(rows) - 1)]
        end, kept = begin, (~filler).to(matrix.dtype)
        blocks = matrix[place[:, :, None], place[:, None, :]]
        blocks.mul_(kept[:, :, None]).mul_(kept[:, None, :])
        blocks.diagonal(dim1=1, dim2=2).add_(ridge).masked_fill_(filler, 1)
        vector = right[some].gather(1, place)
        solved = torch.cholesky_solve(vector[..., None], torch.linalg.cholesky_ex(blocks)[0])[..., 0]
        out[some] = out[some].scatter_add_(1, place, solved * kept)
    return out

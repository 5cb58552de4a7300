"""The batched SVM: the optimum of scikit-learn's objective, certified by its duality gap."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import rng
from fastcon.kernels import svm, svm_primal
from sklearn.svm import LinearSVC

from fastcon.bench.probe import features_like_resnets

COSTS = [10.0**k for k in range(-3, 4)]


def problem(classes=8, shots=5, width=64, seed=0, spread=0.6):
    """Features with the norm of a ResNet's (about 25), non-negative, in overlapping classes."""
    random = rng(seed)
    centres = random.normal(0, spread, (classes, 1, width))
    x = np.abs(centres + random.normal(0, 1, (classes, shots, width))).reshape(-1, width) * 25 / np.sqrt(width)
    y = np.repeat(np.arange(classes), shots)
    signs = np.where(y == np.arange(classes)[:, None], 1.0, -1.0)
    return x, y, svm.Gram.of(torch.from_numpy(x @ x.T + 1)), torch.from_numpy(signs)


def liblinear_objectives(x, y, signs, cost):
    model = LinearSVC(C=cost, tol=1e-9, max_iter=1_000_000, dual=True).fit(x, y)
    scores = model.decision_function(x).T
    slack = np.maximum(0, 1 - signs.numpy() * scores)
    return 0.5 * ((model.coef_**2).sum(1) + model.intercept_**2) + cost * (slack**2).sum(1)


@pytest.mark.parametrize("shape", [(8, 5, 64), (20, 3, 30), (3, 40, 16)])
def test_objectives_equal_scikit_learns(shape):
    x, y, gram, signs = problem(*shape)
    beta = None
    for cost in (1e-3, 1e-2, 1e-1, 1.0):
        beta, gap = svm.solve(gram, signs, cost, beta)
        ours = svm.objective(signs, cost, beta, beta @ gram.matrix).numpy()
        theirs = liblinear_objectives(x, y, signs, cost)
        assert (gap <= 1e-5).all()
        assert (ours * (1 - gap.numpy()) <= theirs * (1 + 1e-9)).all()  # what the gap certifies
        np.testing.assert_allclose(ours, theirs, rtol=1e-3)


def test_the_optimality_conditions_hold_exactly(monkeypatch):
    monkeypatch.setattr(svm, "GAP_AIM", 1e-13)
    _, _, gram, signs = problem()
    cost = 0.3
    beta, _ = svm.solve(gram, signs, cost)
    slack = (1 - signs * (beta @ gram.matrix)).clamp_min(0)
    torch.testing.assert_close(beta, 2 * cost * signs * slack, rtol=1e-6, atol=1e-9)


def test_a_warm_start_changes_nothing():
    _, _, gram, signs = problem(seed=3)
    cold, _ = svm.solve(gram, signs, 10.0)
    warm, _ = svm.solve(gram, signs, 10.0, svm.solve(gram, signs, 0.01).beta)
    torch.testing.assert_close(warm, cold, rtol=1e-3, atol=1e-4)


def test_a_class_without_rows_is_all_negative():
    _, _, gram, signs = problem()
    signs[2] = -1
    beta, gap = svm.solve(gram, signs, 1.0)
    assert gap.max() < svm.GAP
    assert (beta[2] @ gram.matrix < 0).all()


def test_rows_with_sign_0_are_in_no_problem():
    _, _, gram, signs = problem()
    some = torch.arange(0, signs.shape[1], 3)
    masked = torch.zeros_like(signs)
    masked[:, some] = signs[:, some]
    for cost in (1e-3, 1e-1, 10.0):
        beta, gap = svm.solve(gram, torch.cat([masked, signs]), cost)
        alone = svm.solve(gram[some], signs[:, some], cost).beta
        ours = svm.objective(masked, cost, beta[: len(signs)], beta[: len(signs)] @ gram.matrix)
        best = svm.objective(signs[:, some], cost, alone, alone @ gram[some].matrix)
        torch.testing.assert_close(ours, best, rtol=2e-5, atol=0)
        assert not beta[: len(signs)][masked == 0].any()
        assert gap.max() <= 1e-5


def test_equal_rows_are_no_trouble():
    x, _, _, signs = problem()
    x[1], x[7] = x[0], x[0]
    gram = svm.Gram.of(torch.from_numpy(x @ x.T + 1))
    for cost in (1e-3, 1e3):
        assert svm.solve(gram, signs, cost).gap.max() < svm.GAP


def test_the_gap_is_a_certificate():
    _, _, gram, signs = problem()
    cost = 0.1
    beta, _ = svm.solve(gram, signs, cost)
    best = svm.objective(signs, cost, beta, beta @ gram.matrix)
    for factor in (0.9, 0.99, 1.01):
        worse = beta * factor
        gap = svm.duality_gap(gram.matrix, signs, cost, worse, worse @ gram.matrix)
        suboptimality = 1 - best / svm.objective(signs, cost, worse, worse @ gram.matrix)
        assert (gap >= suboptimality - 1e-12).all()
        assert (suboptimality > 0).all()


def test_a_step_too_far_is_cut_to_the_best_point_on_the_way():
    _, _, gram, signs = problem()
    cost = 0.1
    optimum = svm.solve(gram, signs, cost).beta
    start = svm.solve(gram, signs, cost / 30).beta
    point = svm._Point.at(gram.matrix, signs, cost, start, start @ gram.matrix)
    target = start + 5 * (optimum - start)
    found = svm._line_search(gram.matrix, signs, cost, point, target.clone(), target @ gram.matrix)
    values = torch.stack(
        [
            svm.objective(signs, cost, b, b @ gram.matrix)
            for b in (start + t * (target - start) for t in torch.linspace(0, 1, 2001))
        ]
    )
    worse = values[-1] > values[0]
    assert 0 < worse.sum() < len(worse)
    torch.testing.assert_close(found.primal, torch.where(worse, values.amin(0), values[-1]), rtol=1e-3, atol=0)
    torch.testing.assert_close(found.scores, found.beta @ gram.matrix)


def test_too_few_steps_are_an_error_and_not_a_result(monkeypatch):
    _, _, gram, signs = problem(classes=3, shots=40, width=16)
    monkeypatch.setattr(svm, "_STEPS", 1)
    with pytest.raises(svm.NotConverged, match="relative duality gap"):
        svm.solve(gram, signs, 100.0)


@pytest.mark.parametrize("shape", [(3, 40, 16), (6, 60, 30), (2, 100, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_primal_reaches_the_same_optimum(shape, dtype):
    x, _, gram, signs = problem(*shape)
    weights = None
    for cost in (1e-3, 1e-1, 10.0):
        weights, gap = svm_primal.solve(torch.from_numpy(x).to(dtype), signs, cost, weights)
        scores = weights.double() @ torch.from_numpy(np.c_[x, np.ones(len(x))]).T
        slack = (1 - signs * scores).clamp_min(0)
        ours = 0.5 * weights.double().square().sum(1) + cost * slack.square().sum(1)
        beta, _ = svm.solve(gram, signs, cost)
        best = svm.objective(signs, cost, beta, beta @ gram.matrix)
        assert (gap <= svm.GAP).all()
        assert ((ours - best) / best <= gap + 1e-5).all()  # the gap certifies the distance
        assert ((ours - best) / best).max() < 1e-3


def counted(monkeypatch, module, *names):
    """How often each of these functions is called from now on."""
    calls = dict.fromkeys(names, 0)

    def counting(name, real):
        def call(*given):
            calls[name] += 1
            return real(*given)

        return call

    for name in names:
        monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    return calls


@pytest.mark.parametrize("few", [math.inf, -1], ids=["factors", "conjugate gradients first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_way_of_the_primal_leads_to_the_optimum(monkeypatch, few, dtype):
    """A factor of the Hessian or, where the support is smaller than the features are, of its Gram matrix; or none."""
    x, y = features_like_resnets(6, 60, 100)
    signs = torch.from_numpy(np.where(y == np.arange(6)[:, None], 1.0, -1.0))
    x = x.astype(np.float64)
    calls = counted(monkeypatch, svm_primal, "_through_gram", "_through_hessian", "_conjugate_gradients")
    monkeypatch.setattr(svm_primal, "_FEW_STEPS", few)
    monkeypatch.setattr(svm_primal, "_ROWS_TOGETHER", 50)
    path = svm_primal.solve_path(torch.from_numpy(x).to(dtype), signs, COSTS)
    theirs = svm.solve_path(svm.Gram.of(torch.from_numpy(x @ x.T + 1)), signs, COSTS)
    for (weights, gap), (beta, _) in zip(path, theirs, strict=True):
        assert (gap <= 2e-6).all()
        expected = torch.cat([beta @ torch.from_numpy(x), beta.sum(1, keepdim=True)], 1)
        assert (weights - expected).norm() < 2e-3 * expected.norm()
    assert calls["_through_gram"] > 0
    if few > 0:
        assert calls["_through_hessian"] > 0
    assert (calls["_conjugate_gradients"] > 0) == (few < 0)


@pytest.mark.parametrize("together", [7, 100])
def test_the_factors_are_of_the_supports_systems(monkeypatch, together):
    monkeypatch.setattr(svm_primal, "_ROWS_TOGETHER", together)
    random, cost = rng(), 0.3
    x, signs, right = (torch.from_numpy(random.normal(size=shape)) for shape in ((40, 6), 40, 7))
    some = torch.arange(0, 40, 2)
    rows = torch.cat([x, torch.ones(40, 1, dtype=x.dtype)], 1)[some]
    hessian = torch.eye(7, dtype=x.dtype) + 2 * cost * rows.T @ rows
    torch.testing.assert_close(hessian @ svm_primal._through_hessian(x, some, cost, right), right)
    best = svm_primal._through_gram(x[some], signs[some], cost)  # there the gradient is zero
    torch.testing.assert_close(best, 2 * cost * (signs[some] - rows @ best) @ rows)


def test_the_primal_takes_what_is_less_work(monkeypatch):
    """Many rows and a small C: a few steps with the whole rows; a large C: a factor of the few rows in the support."""
    x, y = features_like_resnets(12, 100, 400)
    signs = torch.from_numpy(np.where(y == np.arange(12)[:, None], 1.0, -1.0))
    calls = counted(monkeypatch, svm_primal, "_through_gram", "_through_hessian", "_conjugate_gradients")
    first = svm_primal.solve(torch.from_numpy(x), signs, 1e-4)
    assert calls["_conjugate_gradients"] > 0
    assert calls["_through_gram"] + calls["_through_hessian"] == 0
    calls["_conjugate_gradients"] = 0
    svm_primal.solve_path(
        torch.from_numpy(x),
        signs,
        [10.0, 100.0],
        svm_primal.solve(torch.from_numpy(x), signs, 1.0, first.weights).weights,
    )
    assert calls["_through_gram"] > 0


def test_the_primal_leaves_float64_the_rest(monkeypatch):
    """Float32 is twice as quick: where it comes no nearer to a few classes' optima, float64 takes those alone."""
    x, y = features_like_resnets(30, 100, 64)
    steps, real = {torch.float32: [], torch.float64: []}, svm_primal._step

    def counting(rows, support, *rest):
        steps[rows.features.dtype].append(support.shape[1])
        return real(rows, support, *rest)

    monkeypatch.setattr(svm_primal, "_step", counting)
    signs = torch.from_numpy(np.where(y == np.arange(30)[:, None], 1.0, -1.0))
    svm_primal.solve_path(torch.from_numpy(x), signs, COSTS[:4])
    assert sum(steps[torch.float32]) > 200
    assert 0 < sum(steps[torch.float64]) < 0.05 * sum(steps[torch.float32])


def test_a_factor_where_conjugate_gradients_fail(monkeypatch):
    """Features of very different strength and a support of most rows: no number of steps would do."""
    random = rng()
    n, d = 600, 120
    turn = np.linalg.qr(random.normal(size=(d, d)))[0]
    x = random.normal(size=(n, d)) * np.logspace(0, -4, d) @ turn
    x *= 25 / np.linalg.norm(x, axis=1).mean()
    signs = torch.from_numpy(random.choice([-1.0, 1.0], (1, n)))
    monkeypatch.setattr(svm_primal, "_INNER_STEPS", 20)
    calls = counted(monkeypatch, svm_primal, "_step", "_through_hessian")
    path = svm_primal.solve_path(torch.from_numpy(x).float(), signs, [1e-3, 1.0, 1e3])
    assert all((gap <= 2e-6).all() for _, gap in path)
    assert calls["_through_hessian"] > 0
    assert calls["_step"] < 60


def test_a_class_that_cannot_step_keeps_its_weights(monkeypatch):
    """As where a factor fails: what it had is not lost to NaN, and the others go on."""
    x, _, _, signs = problem(3, 40, 8)
    real, counts = svm_primal._step, []

    def failing(rows, support, *rest):
        step = real(rows, support, *rest)
        counts.append(len(step))
        if len(counts) == 1:
            step[0] = torch.nan
        return step

    monkeypatch.setattr(svm_primal, "_step", failing)
    weights, gap = svm_primal._newton(svm_primal._Rows(torch.from_numpy(x)), signs.T, 0.1, torch.zeros(3, 9).double())
    assert (weights[0] == 0).all()
    assert gap[0] > svm.GAP
    assert (gap[1:] <= 2e-6).all()
    assert counts[:2] == [3, 2]


@pytest.mark.parametrize("shape", [(10, 300, 64), (4, 500, 200)])
def test_a_large_c_is_reached_from_any_start(shape):
    """As from nothing, with every row in the support, or from the optimum of some of the rows."""
    x, y = features_like_resnets(*shape)
    rows, signs = torch.from_numpy(x), torch.from_numpy(np.where(y == np.arange(shape[0])[:, None], 1.0, -1.0))
    along = svm_primal.solve_path(rows, signs, COSTS)[-1]
    some = svm_primal.solve_path(rows[::2], signs[:, ::2], COSTS)[-1]
    for start in (None, some.weights):
        found = svm_primal.solve(rows, signs, COSTS[-1], start)
        assert (found.gap <= 2e-6).all()
        torch.testing.assert_close(found.weights, along.weights, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(100, 100, 64), (40, 250, 32)])
def test_a_long_way_in_the_wrong_direction(shape):
    """Many classes of few features: full steps violate rows by the hundred, and the best length is a thousandth."""
    x, y = features_like_resnets(*shape)
    signs = torch.from_numpy(np.where(y == np.arange(shape[0])[:, None], 1.0, -1.0))
    for _, gap in svm_primal.solve_path(torch.from_numpy(x), signs, COSTS):
        assert (gap <= 2e-6).all()


def test_blocks_of_problems_do_not_show(monkeypatch):
    _, _, gram, signs = problem()
    whole = svm.solve(gram, signs, 1.0).beta
    monkeypatch.setitem(svm.BLOCK, "cpu", 400)
    torch.testing.assert_close(svm.solve(gram, signs, 1.0).beta, whole)


def test_float32_goes_as_far_as_it_can(monkeypatch):
    """A first step that does not bring the dual nearer is no end: what float32 leaves undone takes float64 twice the time."""
    x, y = features_like_resnets(30, 5, 512)
    rows, signs = torch.from_numpy(x).double(), torch.from_numpy(np.where(y == np.arange(30)[:, None], 1.0, -1.0))
    gram, beta, steps = svm.Gram.of(rows @ rows.T + 1), None, {torch.float32: 0, torch.float64: 0}
    real = svm._line_search

    def counted(matrix, signs, *rest):
        steps[signs.dtype] += len(signs)
        return real(matrix, signs, *rest)

    monkeypatch.setattr(svm, "_line_search", counted)
    for cost in (1e-3, 1e-2, 1e-1):
        beta = svm.solve(gram, signs, cost, beta).beta
    assert steps[torch.float32] > 100
    assert steps[torch.float64] < 0.05 * steps[torch.float32]


def test_small_systems_of_many_rows():
    """They are summed by blocks of rows."""
    random = rng()
    rows = torch.from_numpy(random.normal(size=(1000, 60)))
    support = torch.from_numpy((random.normal(size=(1000, 50)) > 0).astype(float))
    expected = torch.einsum("nr,nk,ns->krs", rows, support, rows)
    torch.testing.assert_close(svm_primal._inner(rows, support), expected)


def ordinary(classes, images, width, seed=0):
    """The Gram matrix and signs of features as a ResNet's."""
    x, y = features_like_resnets(classes, images, width, seed)
    rows, signs = torch.from_numpy(x).double(), np.where(y == np.arange(classes)[:, None], 1.0, -1.0)
    return svm.Gram.of(rows @ rows.T + 1), torch.from_numpy(signs)


@pytest.mark.parametrize(("shape", "seed"), [((3, 100, 8), 0), ((4, 300, 16), 1), ((6, 200, 24), 0)])
def test_rounding_does_not_hide_an_optimum(shape, seed):
    """Many rows of few features, at a large C: the optimum's objective may round to more than where only multipliers have to change."""
    gram, signs = ordinary(*shape, seed)
    for solution in svm.solve_path(gram, signs, COSTS):
        assert solution.gap.max() <= svm.GAP


@pytest.mark.parametrize(("shape", "spared"), [((30, 5, 512), 0.15), ((10, 50, 64), 0.0)])
def test_a_path_is_quicker_than_its_steps(monkeypatch, shape, spared):
    """A solution says more of the next than a start: which rows it outgrows, and, once it settles, where it goes."""
    gram, signs = ordinary(*shape)
    steps, real = [], svm._line_search
    monkeypatch.setattr(svm, "_line_search", lambda *given: (steps.append((given[2], len(given[1]))), real(*given))[1])
    path = svm.solve_path(gram, signs, COSTS)
    along = {cost: sum(n for at, n in steps if at == cost) for cost in COSTS}
    steps.clear()
    for k, cost in enumerate(COSTS):
        solved = svm.solve(gram, signs, cost, path[k - 1].beta if k else None)
        scores = [beta @ gram.matrix for beta in (solved.beta, path[k].beta)]
        torch.testing.assert_close(*scores, rtol=0, atol=5e-3)
    alone = {cost: sum(n for at, n in steps if at == cost) for cost in COSTS}
    assert along[1e-2] <= (1 - spared) * alone[1e-2], "the rows it outgrows"
    assert along[1e2] + along[1e3] < 0.75 * (alone[1e2] + alone[1e3]), "where it goes"
    assert sum(along.values()) <= (1 - spared) * sum(alone.values())


def test_the_same_c_again_and_again():
    gram, signs = ordinary(6, 10, 64)
    first, *others = svm.solve_path(gram, signs, [10.0] * 4)
    for other in others:
        torch.testing.assert_close(other.beta, first.beta)


def test_a_step_that_is_certified_but_further_off_is_not_taken():
    gram, signs = ordinary(6, 10, 64)
    best = svm.solve(gram, signs, 1.0).beta
    further = best * 1.0002
    gaps = [svm.duality_gap(gram.matrix, signs, 1.0, beta, beta @ gram.matrix) for beta in (best, further)]
    assert ((gaps[0] < gaps[1]) & (gaps[1] <= svm.GAP)).all()
    point = svm._Point.at(gram.matrix, signs, 1.0, best, best @ gram.matrix)
    found = svm._line_search(gram.matrix, signs, 1.0, point, further, further @ gram.matrix)
    assert (found.gap <= 1.001 * gaps[0]).all()

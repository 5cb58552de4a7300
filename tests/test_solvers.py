"""Solvers side by side: one objective, and a scikit-learn estimator that keeps scikit-learn's rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import parametrize_with_checks
from test_few_shot import clusters

from fastcon.errors import FastconError
from fastcon.transfer import solvers
from fastcon.transfer.solvers import LinearSVM


@parametrize_with_checks([LinearSVM()])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize("images", [2, 12])  # fewer rows than features, and more
def test_parity_with_scikit_learn(images):
    x, y = clusters(images=images)
    rows, _ = clusters(images=30, seed=1)
    x, rows = x.astype(np.float64), rows.astype(np.float64)
    ours_of, theirs_of = (solvers.SOLVERS[name](x, y, 6) for name in ("batched", "sklearn"))
    for cost in (1e-3, 1e-1):
        ours, theirs = ours_of.test([cost], rows), theirs_of.test([cost], rows)
        np.testing.assert_allclose(ours, theirs, atol=2e-2)
        assert (ours.argmax(1) == theirs.argmax(1)).mean() > 0.99


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("gram_ratio", [100, 0], ids=["over the Gram matrix", "in the primal"])
def test_a_gpu_finds_the_same_optimum(monkeypatch, gram_ratio):
    monkeypatch.setattr(solvers, "GRAM_RATIO", gram_ratio)
    x, y = clusters(images=60)
    folds = [
        solvers.Fold(np.flatnonzero(np.arange(len(y)) % 5 != k), np.flatnonzero(np.arange(len(y)) % 5 == k))
        for k in range(5)
    ]
    found = []
    for device in ("cpu", "cuda"):
        fits = solvers.Batched(x, y, 6, device)
        found.append([*fits.held_out(folds, [1e-3, 1e-1])[3], fits.test([1e-2], x)])
        assert fits.gap <= 1e-4
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-2)


def test_folds_solved_together_are_solved_as_alone(monkeypatch):
    x, y = clusters(images=7)
    folds = [
        solvers.Fold(np.flatnonzero(np.arange(len(y)) % 5 != k), np.flatnonzero(np.arange(len(y)) % 5 == k))
        for k in range(5)
    ]
    costs = [1e-3, 1e-1, 10.0]
    monkeypatch.setattr(solvers.svm, "GAP_AIM", 1e-12)
    together = solvers.Batched(x, y, 6).held_out(folds, costs)
    monkeypatch.setitem(solvers.svm._PER_BLOCK, "cpu", 1)
    in_blocks = solvers.Batched(x, y, 6).held_out(folds, costs)
    monkeypatch.setattr(solvers, "TOGETHER", 1)
    alone = solvers.Batched(x, y, 6).held_out(folds, costs)
    for ours, *theirs in zip(together, in_blocks, alone, strict=True):
        np.testing.assert_allclose([ours, ours], theirs, rtol=1e-5, atol=1e-6)


def test_a_gram_matrix_of_all_rows_serves_every_draw():
    x, y = clusters(images=7)
    some = np.arange(len(y)) % 3 > 0
    whole = solvers.gram_of_draws(x, int(some.sum()), 9, torch.device("cpu"))
    assert whole is not None
    assert solvers.gram_of_draws(x, int(some.sum()), 2, torch.device("cpu")) is None, "one each is less work"
    assert solvers.gram_of_draws(x, len(x), 1, torch.device("cpu")) is None, "it would be one more"
    assert solvers.gram_of_draws(x[:, :4], int(some.sum()), 9, torch.device("cpu")) is None, "the primal is"
    given = whole[torch.from_numpy(np.flatnonzero(some))]
    found = [solvers.Batched(x[some], y[some], 6, "cpu", gram).test([1e-2, 1.0], x) for gram in (given, None)]
    np.testing.assert_allclose(*found, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuML fits on an NVIDIA GPU only")
def test_parity_of_cuml():
    pytest.importorskip("cuml")
    x, y = clusters()
    ours, theirs = (solvers.SOLVERS[name](x, y, 6).test([1e-2], x) for name in ("batched", "cuml"))
    np.testing.assert_allclose(ours, theirs, atol=5e-2)


def test_cuml_without_a_gpu_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    x, y = clusters()
    with pytest.raises(FastconError, match="needs an NVIDIA GPU"):
        solvers.SOLVERS["cuml"](x, y, 6).test([1.0], x)


@pytest.mark.parametrize("classes", [2, 5])
def test_the_estimator_is_linear_svc(classes):
    x, y = clusters(classes=classes)
    names = np.array([f"class {k}" for k in range(classes)])[y]
    x = x.astype(np.float64)
    ours, theirs = LinearSVM(C=0.01).fit(x, names), LinearSVC(C=0.01, tol=1e-9, max_iter=100_000).fit(x, names)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=2e-3)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, atol=2e-3)
    assert ours.duality_gap_.max() <= 1e-4
    assert (ours.predict(x) == theirs.predict(x)).all()
    assert ours.decision_function(x).shape == theirs.decision_function(x).shape


def test_an_optimum_out_of_reach_is_an_error():
    x, y = clusters(images=3)
    with pytest.raises(FastconError, match="did not reach their optimum"):
        solvers.Batched(x.astype(np.float64) * 1e9, y, 6).test([1e6], x)


def test_which_rows_go_to_the_gram_matrix():
    over = [(2048, 512), (2049, 512), (8192, 2048), (8193, 2048), (16_000, 16_000), (16_000, 15_999)]
    assert [solvers._over_gram(*shape) for shape in over] == [True, False] * 3


def test_many_rows_go_to_the_primal_and_agree(monkeypatch):
    x, y = clusters(images=60)
    rows, _ = clusters(images=30, seed=1)
    costs = [1e-3, 1e-1, 10.0, 1000.0]
    monkeypatch.setattr(solvers, "GRAM_RATIO", 100)
    exact = solvers.Batched(x, y, 6)
    monkeypatch.setattr(solvers, "GRAM_ROWS", 0)
    monkeypatch.setattr(solvers.svm, "solve_path", lambda *_: pytest.fail("the Gram matrix was used"))
    primal = solvers.Batched(x, y, 6)
    assert exact._gram is not None
    assert primal._gram is None
    found = [primal.test(costs[:k], rows) for k in range(1, len(costs) + 1)]
    monkeypatch.undo()
    for k, ours in enumerate(found, 1):
        theirs = exact.test(costs[:k], rows)
        assert (ours.argmax(1) == theirs.argmax(1)).mean() > 0.98

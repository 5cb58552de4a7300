"""The few-shot protocol on plain arrays: solvers agree, draws are shared, bad input is refused."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import rng

from fastcon.data import splits
from fastcon.errors import FastconError
from fastcon.transfer import few_shot as probe
from fastcon.transfer.few_shot import few_shot


def clusters(classes=6, images=12, width=24, noise=1.1, seed=0):
    centres = rng(99).normal(0, 1, (classes, 1, width))
    x = np.abs(centres + noise * rng(seed).normal(0, 1, (classes, images, width))).reshape(-1, width) * 4
    return x.astype(np.float32), np.repeat(np.arange(classes), images)


@pytest.fixture(scope="module")
def data():
    return (*clusters(), *clusters(images=40, seed=1))


def test_solvers_agree(data):
    grid = (1e-3, 1e-2, 1e-1)
    ours = few_shot(*data, trials=6, c_grid=grid, solver="batched")
    theirs = few_shot(*data, trials=6, c_grid=grid, solver="sklearn")
    assert ours.chosen_c == theirs.chosen_c
    assert ours.mean == pytest.approx(theirs.mean, abs=1e-3)
    assert 0.3 < ours.mean < 1


def test_it_is_gridsearch_by_hand(data):
    """One trial written out with scikit-learn on the raw features: folds, choice of C, refit, test accuracy."""
    from sklearn.svm import LinearSVC

    x, y, test_x, test_y = data
    ids = np.arange(len(y), dtype=np.uint64)
    grid = (1e-3, 1e-2, 1e-1)
    result = few_shot(x, y, test_x, test_y, trials=3, c_grid=grid, seed=4, ids=ids)
    for trial in range(3):
        rows = splits.draw(ids, y, 5, 4, trial)
        fold = splits.fold_of(ids[rows], y[rows], 5, 4, trial)
        scores = []
        for cost in grid:
            parts = [
                LinearSVC(C=cost, tol=1e-8, max_iter=100_000).fit(x[rows][fold != k], y[rows][fold != k])
                .score(x[rows][fold == k], y[rows][fold == k]) for k in range(5)
            ]  # fmt: skip
            scores.append(np.mean(parts))
        best = grid[int(np.argmax(np.array(scores) >= max(scores) - 1e-12))]
        assert result.chosen_c[trial] == best
        final = LinearSVC(C=best, tol=1e-8, max_iter=100_000).fit(x[rows], y[rows])
        assert result.accuracies[trial] == pytest.approx(final.score(test_x, test_y), abs=1 / len(test_y) + 1e-9)


def test_the_span_of_the_rows_loses_nothing(data):
    x, y, test_x, test_y = data
    wide, wide_test = (np.concatenate([part, np.zeros((len(part), 500), np.float32)], 1) for part in (x, test_x))
    turn = np.linalg.qr(rng(1).normal(size=(524, 524)))[0].astype(np.float32)
    narrow = few_shot(x, y, test_x, test_y, trials=3, shots=4)
    assert few_shot(wide @ turn, y, wide_test @ turn, test_y, trials=3, shots=4).accuracies == pytest.approx(
        narrow.accuracies, abs=0.01
    )


def test_statistics_of_the_trials():
    result = probe.Result([0.5, 0.7, 0.6], [1.0] * 3, [0.6])
    assert result.mean == pytest.approx(0.6)
    assert result.std == pytest.approx(0.1)
    assert result.ci95 == pytest.approx(1.96 * 0.1 / 3**0.5)
    assert probe.Result([0.5], [1.0], [0.5]).std == 0


def test_draws_depend_on_ids_and_seed_alone(data):
    x, y, test_x, test_y = data
    ids = rng(5).permutation(len(y)).astype(np.uint64)
    first = few_shot(x, y, test_x, test_y, trials=2, ids=ids)
    order = rng(6).permutation(len(y))
    assert few_shot(x[order], y[order], test_x, test_y, trials=2, ids=ids[order]).accuracies == first.accuracies
    assert few_shot(x, y, test_x, test_y, trials=2, ids=ids, seed=1).accuracies != first.accuracies


def test_all_images_once(data):
    result = few_shot(*data, shots=None)
    assert len(result.accuracies) == 1
    assert result.mean > few_shot(*data, trials=5).mean


def test_ties_go_to_the_smallest_c():
    x = np.eye(4, dtype=np.float32).repeat(5, 0) * 10
    y = np.repeat(np.arange(4), 5)
    assert few_shot(x, y, x, y, trials=2, c_grid=(10.0, 0.1, 1.0)).chosen_c == [0.1, 0.1]


def test_a_value_of_c_given_twice_counts_once(data):
    once, twice = (few_shot(*data, trials=2, c_grid=grid) for grid in ((1e-2, 1.0, 10.0), (1.0, 1e-2, 1.0, 10.0, 10.0)))
    assert (once.chosen_c, once.accuracies) == (twice.chosen_c, twice.accuracies)


def test_a_class_smaller_than_the_folds_warns_and_works(data):
    x, y, test_x, test_y = data
    keep = np.r_[0:2, 12 : len(y)]
    with pytest.warns(UserWarning, match="smallest class has 2 images for 5 folds"):
        result = few_shot(x[keep], y[keep], test_x, test_y, trials=3)
    assert result.mean > 0.3
    assert len(result.per_class) == 6


def test_per_class_accuracy(data):
    x, y, test_x, test_y = data
    result = few_shot(x, y, test_x[:80], test_y[:80], trials=2)  # two of the six classes have test images
    assert np.isnan(result.per_class[2:]).all()
    assert np.mean(result.per_class[:2]) == pytest.approx(result.mean)


BAD = {
    "one class": (lambda d: (d[0][:12], d[1][:12], d[2], d[3]), "one class only"),
    "nan": (
        lambda d: (np.where(np.arange(24) == 3, np.nan, d[0]), d[1], d[2], d[3]),
        "NaN or infinity, first in row 0",
    ),
    "empty": (lambda d: (d[0][:0], d[1][:0], d[2], d[3]), "n > 0"),
    "widths": (lambda d: (d[0][:, :20], d[1], d[2], d[3]), "have 20 columns, test features 24"),
    "counts": (lambda d: (d[0], d[1][:5], d[2], d[3]), "n labels"),
    "floats": (lambda d: (d[0], d[1] + 0.5, d[2], d[3]), "labels are integers"),
    "negative": (lambda d: (d[0], d[1] - 1, d[2], d[3]), "from -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(data, case):
    spoil, message = BAD[case]
    with pytest.raises(FastconError, match=message):
        few_shot(*spoil(data))


@pytest.mark.parametrize("options", [{"folds": 1}, {"trials": 0}, {"shots": 0}, {"c_grid": ()}, {"c_grid": (0.0,)}])
def test_settings_that_cannot_be(data, options):
    with pytest.raises(FastconError, match="a probe needs"):
        few_shot(*data, **options)


def test_a_fold_with_one_class_is_refused():
    x = rng(0).normal(size=(2, 8))
    with pytest.warns(UserWarning, match="smallest class"), pytest.raises(FastconError, match="fewer than two classes"):
        few_shot(x, np.array([0, 1]), x, np.array([0, 1]), folds=2, trials=1)


@pytest.fixture(scope="module")
def several_labels():
    """300 + 500 images with 5 labels each told from 16 features, the last of them in no image."""
    x = rng(1).normal(0, 1, (800, 16)).astype(np.float32)
    y = (x @ rng(2).normal(0, 1, (16, 5)) + rng(3).normal(0, 2, (800, 5)) > 0).astype(np.int64)
    y[:, 4] = 0
    return x[:300], y[:300], x[300:], y[300:]


def test_several_labels_are_a_problem_each(several_labels):
    """One trial written out with scikit-learn: draws and folds regardless of labels, C by the mean over labels."""
    from sklearn.svm import LinearSVC

    x, y, test_x, test_y = several_labels
    ids = np.arange(300, dtype=np.uint64)
    grid = (1e-3, 1e-1)
    result = few_shot(x, y, test_x, test_y, shots=60, trials=2, c_grid=grid, seed=4, ids=ids)
    for trial in range(2):
        rows = splits.draw(ids, y, 60, 4, trial)
        assert len(rows) == 60
        fold = splits.fold_of(ids[rows], y[rows], 5, 4, trial)
        assert np.bincount(fold).tolist() == [12] * 5

        def right(cost, inside, at, wanted):
            told = np.zeros_like(wanted)
            for k in range(4):
                told[:, k] = LinearSVC(C=cost, tol=1e-8, max_iter=100_000).fit(*(part[inside] for part in (x, y[:, k])))\
                    .predict(at)  # fmt: skip
            return (told == wanted).mean()

        scores = [
            np.mean([right(cost, rows[fold != k], x[rows[fold == k]], y[rows[fold == k]]) for k in range(5)])
            for cost in grid
        ]
        best = grid[int(np.argmax(np.array(scores) >= max(scores) - 1e-12))]
        assert result.chosen_c[trial] == best
        assert result.accuracies[trial] == pytest.approx(right(best, rows, test_x, test_y), abs=1 / 2500 + 1e-9)
    assert result.per_class[4] == 1.0  # never there, never said to be
    assert result.mean == pytest.approx(np.mean(result.per_class))
    library = few_shot(x, y, test_x, test_y, shots=60, trials=2, c_grid=grid, seed=4, ids=ids, solver="sklearn")
    assert library.accuracies == pytest.approx(result.accuracies, abs=1e-3)


def test_several_labels_on_one_side_only_are_refused(several_labels):
    x, y, test_x, test_y = several_labels
    with pytest.raises(FastconError, match="alike in both parts"):
        few_shot(x, y, test_x, test_y[:, 0])
    with pytest.raises(FastconError, match="zeros and ones"):
        few_shot(x, y * 2, test_x, test_y)
    with pytest.raises(FastconError, match="4 training images cannot be cut into 5 folds"):
        few_shot(x, y, test_x, test_y, shots=4)

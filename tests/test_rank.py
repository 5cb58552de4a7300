"""LogME against scikit-learn's evidence, and the order of models for a task."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import make_model, rng
from sklearn.linear_model import BayesianRidge

from fastcon.cli.main import main
from fastcon.errors import FastconError
from fastcon.transfer import rank as ranking
from fastcon.transfer.logme import logme
from fastcon.transfer.rank import kendall


def evidence(x, y):
    """The log evidence per image that scikit-learn's Bayesian ridge reaches, without its priors on alpha and beta."""
    none = dict.fromkeys(("alpha_1", "alpha_2", "lambda_1", "lambda_2"), 0.0)
    model = BayesianRidge(max_iter=3000, tol=1e-12, fit_intercept=False, compute_score=True, **none).fit(x, y)
    return model.scores_[-1] / len(y)


@pytest.mark.parametrize("shape", [(80, 12), (40, 90)])
def test_logme_is_the_evidence_of_bayesian_ridge(shape):
    random = rng()
    x = random.normal(size=shape) + 0.5
    labels = (x[:, 0] + 0.3 * random.normal(size=len(x)) > 0.5).astype(int) + (x[:, 1] > 1)
    expected = np.mean([evidence(x, (labels == k).astype(float)) for k in range(3)])
    assert logme(x, labels) == pytest.approx(expected, abs=2e-3)
    several = (labels[:, None] == np.arange(3)).astype(int)
    assert logme(x, several) == pytest.approx(logme(x, labels))


def test_better_features_score_higher():
    random = rng()
    labels = np.arange(200) % 5
    centres = random.normal(size=(5, 30))
    scores = [logme(centres[labels] + noise * random.normal(size=(200, 30)), labels) for noise in (0.5, 1, 2, 4)]
    assert scores == sorted(scores, reverse=True)
    with pytest.raises(FastconError, match="one class only"):
        logme(random.normal(size=(20, 3)), np.zeros(20, int))


def test_agreement_of_orders():
    assert kendall([1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4]) == pytest.approx(1)
    assert kendall([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert kendall([1, 2], [1, 2]) is None
    assert kendall([1, 2, 3], [5, 5, 5]) is None


def test_models_in_order(tmp_path, labelled_folder, monkeypatch):
    specs = [str(make_model(tmp_path / f"{k}.safetensors", ["a", "b"], k)) for k in range(4)]
    command = ["rank", *specs, "--train", str(labelled_folder), "--holdout", "0.5", "--top", "3", "--trials", "3"]
    told = CliRunner().invoke(main, [*command, "--json", str(tmp_path / "r.json")])
    assert told.exit_code == 0, told.output
    found = json.loads((tmp_path / "r.json").read_text())
    rows = found["results"]
    assert [row["backbone"] for row in rows][-1] == min(rows, key=lambda row: row["logme"])["backbone"]
    assert "accuracy" not in rows[-1]
    accuracies = [row["accuracy"] for row in rows[:3]]
    assert accuracies == sorted(accuracies, reverse=True)
    assert found["agreement"] == kendall([row["logme"] for row in rows[:3]], accuracies)
    alone = CliRunner().invoke(
        main, ["probe", rows[0]["backbone"], *command[5:9], "--trials", "3", "--json", str(tmp_path / "p.json")]
    )
    assert alone.exit_code == 0, alone.output
    assert json.loads((tmp_path / "p.json").read_text())["results"][0]["accuracies"] == rows[0]["accuracies"]
    lines = told.output.splitlines()
    assert lines[-1].startswith("LogME and the probes agree by a Kendall tau of")
    assert "not probed" in lines[-2]
    by_accuracy = [row["backbone"] for row in rows[:3]]
    scores = iter(range(3))  # the order of LogME turned around
    monkeypatch.setattr(ranking, "logme", lambda features, labels: next(scores))
    turned = CliRunner().invoke(main, ["rank", *by_accuracy, *command[5:], "--json", str(tmp_path / "t.json")])
    assert turned.exit_code == 0, turned.output
    found = json.loads((tmp_path / "t.json").read_text())
    assert [row["backbone"] for row in found["results"]] == by_accuracy
    monkeypatch.undo()
    only = CliRunner().invoke(main, [*command[:-4], "--top", "0"])
    assert only.exit_code == 0, only.output
    assert only.output.count("not probed") == 4

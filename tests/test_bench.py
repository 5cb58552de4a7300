"""Benchmarks: rows with the fields that a reader compares, measured on a problem small enough for a test."""

from __future__ import annotations

import numpy as np
import pytest

from fastcon import bench
from fastcon.bench import probe


def test_rows_of_the_probe_benchmark(monkeypatch):
    monkeypatch.setattr(probe, "_agreement", lambda say: [])
    said: list[str] = []
    rows = probe.bench(said.append, classes=4, width=40, trials=2, test_images=20)
    assert rows[0]["name"] == "probe_vs_sklearn"
    for row in rows:
        assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"])
        assert (row["unit"], row["n"], row["device"]) == ("s", 2, "cpu")
        assert row["theirs_is"] == "extrapolated from 7 of 72 fits"
        assert 0.25 <= row["accuracy"] <= 1


def test_agreement_with_scikit_learn_is_measured():
    [row] = probe._agreement(lambda line: None, trials=2)
    assert row["same_c"] >= 0.5
    assert row["accuracy"] == pytest.approx(row["accuracy_sklearn"], abs=5e-3)


def test_features_are_as_a_resnets():
    x, y = probe.features_like_resnets(5, 6, 256)
    assert x.min() == 0
    assert np.linalg.norm(x, axis=1).mean() == pytest.approx(25, rel=1e-3)
    assert np.bincount(y).tolist() == [6] * 5


def test_a_record_says_what_made_it():
    made = bench.record([])
    assert set(made) == {"command", "commit", "hardware", "versions", "rows"}
    assert made["hardware"]["cores"] >= 1

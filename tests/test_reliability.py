"""Reliable teachers: the measure by value, planted bad ones, and the weights that follow."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import MACHINE, rng

from fastcon.bench.fixtures import manifest_of
from fastcon.cli.main import main
from fastcon.distill import reliability
from fastcon.distill.options import TrainOptions, Upkeep
from fastcon.distill.relate import relate
from fastcon.distill.reliability import resolved, shared_information, weights
from fastcon.distill.train import train
from fastcon.errors import FastconError, UsageError
from fastcon.info import describe
from fastcon.models.origin import origin
from fastcon.report.relations import conclusions
from fastcon.store.format import Recipe, TeacherRecord
from fastcon.store.reader import Store
from fastcon.store.writer import open_for_writing

ROWS = 3000


def onehot(classes, count):
    return 60.0 * np.eye(count)[classes]


def written(path, said, views=2, kinds=None):
    """A store where teacher NAME says said[NAME][view] [ROWS, C] of the images."""
    with open_for_writing(str(path), manifest_of(ROWS), Recipe(size=32, chunk_rows=500), views, {}) as writer:
        for name, of_views in said.items():
            role = "generalist" if name == "general" else "teacher"
            classes = tuple(map(str, range(of_views[0].shape[1])))
            kind = (kinds or {}).get(name, "softmax")
            writer.add_teacher(name, TeacherRecord(role, weights=name, classes=classes, kind=kind), None)
            for view in range(views):
                order = writer.view(view).order
                for chunk in range(writer.chunks):
                    images = order[slice(*writer.chunk_range(chunk))]
                    writer.write(name, view, chunk, {"logits": of_views[view][images].astype(np.float16)})
    return Store(path)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Sure of eight classes; sure, but with a crop's luck; sure of one class; of any; and the same of every image."""
    random = rng(3)
    true = random.integers(0, 8, ROWS)
    luck = [np.where(random.random(ROWS) < 0.5, true, random.integers(0, 8, ROWS)) for _ in range(2)]
    said = {
        "general": [onehot(true, 8)] * 2,
        "good": [onehot(true, 8)] * 2,
        "same": [onehot((true + 3) % 8, 8)] * 2,
        "unsteady": [onehot(classes, 8) for classes in luck],
        "constant": [onehot(np.zeros(ROWS, int), 8)] * 2,
        "random": [onehot(random.integers(0, 500, ROWS), 500) for _ in range(2)],
        "flat": [np.zeros((ROWS, 8))] * 2,
    }
    return written(tmp_path_factory.mktemp("reliability") / "store", said)


def test_the_information_by_value(planted):
    entropy = np.log(8)
    assert shared_information(planted, "good") == pytest.approx(entropy, abs=0.01)
    assert shared_information(planted, "same") == pytest.approx(shared_information(planted, "good"))
    # the same class with probability a = 1/2 * 1/2 + 3/4 * 1/8, else any other
    a = 0.25 + 0.75 / 8
    joint = a * np.log(8 * a) + (1 - a) * np.log(8 * (1 - a) / 7)
    assert shared_information(planted, "unsteady") == pytest.approx(joint, abs=0.03)
    for nothing in ("constant", "flat"):
        assert shared_information(planted, nothing) == pytest.approx(0, abs=1e-9)
    assert abs(shared_information(planted, "random")) < 0.1  # uncorrected: 2.7 nats, of pairs that occur once


def test_soft_predictions_share_less():
    z = np.log(np.array([[0.8, 0.2], [0.2, 0.8]]))
    joint = np.array([[0.34, 0.16], [0.16, 0.34]])
    assert reliability._classes(z, z) == pytest.approx((joint * np.log(joint / 0.25)).sum())


def test_many_classes_are_counted_in_blocks(monkeypatch):
    random = rng()
    first, second = random.normal(size=(2, 50, 37))
    whole = reliability._classes(first, second)
    monkeypatch.setattr(reliability, "BLOCK", 10)
    assert reliability._classes(first, second) == pytest.approx(whole)


def test_labels_add_up():
    yes = np.where(np.arange(400)[:, None] % 4 == [0, 1], 60.0, -60.0)
    quarter = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    assert reliability._labels(yes, yes) == pytest.approx(2 * quarter)
    assert reliability._labels(yes, np.zeros_like(yes)) == pytest.approx(0, abs=1e-12)


def test_pairs_are_two_views_of_one_image(tmp_path, monkeypatch):
    """Each image says its own number, in both views: also where only some chunks are read."""
    numbers = [np.stack([np.arange(ROWS) % 2000, np.arange(ROWS) // 2000], 1).astype(float)] * 2
    store = written(tmp_path / "s", {"t": numbers})
    first, second = reliability._two_views(store, "t")
    assert np.array_equal(first, second)
    assert len(first) == ROWS
    monkeypatch.setattr(reliability, "PAIRS", 300)
    first, second = reliability._two_views(store, "t")
    assert np.array_equal(first, second)
    assert 200 < len(first) < 500


def test_weights(planted):
    heads = ["general", "good", "same", "unsteady"]
    assert weights(planted, heads, TrainOptions()) == {"good": 0.5, "same": 0.5, "unsteady": 0}
    assert weights(planted, heads, TrainOptions(balance=(1, 3))) == {"good": 0.75, "same": 0.75, "unsteady": 0}
    assert weights(planted, heads[1:], TrainOptions(method="traditional")) == {"good": 0.5, "same": 0.5, "unsteady": 0}


def test_between_nothing_and_whole(planted, monkeypatch):
    known = {"good": 1.0, "same": 1.0, "unsteady": 0.6}
    monkeypatch.setattr(reliability, "shared_information", lambda store, name: known[name])
    found = weights(planted, ["general", *known], TrainOptions())
    assert found == {"good": round(1 / 2.4, 4), "same": round(1 / 2.4, 4), "unsteady": round(0.4 / 2.4, 4)}


def test_where_all_are_good_nothing_changes(planted):
    options = TrainOptions(weight="auto")
    found = resolved(planted, ["general", "good", "same"], options)
    assert found.weight == ("auto", ("good", 0.5), ("same", 0.5))
    assert resolved(planted, ["general", "flat", "constant"], options).weight[1:] == (("flat", 0.5), ("constant", 0.5))


def test_an_embedding_counts_in_full(tmp_path):
    random = rng()
    said = {"a": [onehot(np.arange(ROWS) % 8, 8)] * 2, "e": [random.normal(size=(ROWS, 8))] * 2}
    store = written(tmp_path / "s", said, kinds={"e": "embedding"})
    assert weights(store, ["a", "e"], TrainOptions(method="traditional")) == {"a": 0.5, "e": 0.5}


def test_a_run_with_it(store_path, tmp_path):
    """Recorded as what it came to, beside where that is from; what is given by hand stays; it resumes."""
    options = TrainOptions(epochs=1, batch_size=32, weight=("auto",))
    train(str(store_path), str(tmp_path / "run"), options, MACHINE, Upkeep())
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["weight"] == ["auto", ["letters", 1.0]]
    assert "weight auto letters=1, " in describe(str(tmp_path / "run"))[1]
    train(str(store_path), str(tmp_path / "run"), options, MACHINE, Upkeep())  # nothing to do
    own = TrainOptions(epochs=1, batch_size=32, weight=("auto", ("letters", 0.3)))
    assert resolved(Store(store_path), ["general", "letters"], own).weight == ("auto", ("letters", 0.3))
    other = TrainOptions(epochs=1, batch_size=32, weight=(("letters", 0.3),))
    train(str(store_path), str(tmp_path / "other"), other, MACHINE, Upkeep())
    recipes = [origin(str(tmp_path / run))["lineage"]["recipe"] for run in ("run", "other")]
    assert recipes[0] != recipes[1]


def test_on_the_command_line(planted):
    told = CliRunner().invoke(main, ["train", "--store", planted.path, "--out", "x", "--weight", "auto", "--dry-run"])
    assert told.exit_code == 0, told.output
    assert "random (weight 0)" in told.output
    told = CliRunner().invoke(main, ["train", "--store", planted.path, "--out", "x", "--weight", "birds", "--dry-run"])
    assert "is neither NAME=λ with λ above 0, as birds=0.5, nor auto" in told.output


def test_relate_names_them(planted):
    said = conclusions(relate(planted.path))
    bad = {line.split()[2] for line in said if line.startswith("unreliable: what")}
    assert {"constant", "flat", "random"} <= bad
    assert not {"general", "good", "same"} & bad


def test_one_view_does_not_show_it(tmp_path):
    store = written(tmp_path / "s", {"t": [onehot(np.arange(ROWS) % 8, 8)]}, views=1)
    with pytest.raises(FastconError, match="holds one view of each image"):
        shared_information(store, "t")
    with pytest.raises(UsageError, match="nor auto"):
        TrainOptions(weight="aut")

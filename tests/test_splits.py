"""Hold-outs, class splits, draws and folds: pure, disjoint, whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcon.data import splits
from fastcon.data.manifest import index
from fastcon.errors import FastconError

NAMES = [f"class {k}" for k in range(11)]


def test_t_and_d_are_disjoint_halves_by_name():
    t, d = (splits.split_classes(NAMES, which, 3) for which in ("t", "d"))
    assert sorted(t + d) == sorted(NAMES)
    assert (len(t), len(d)) == (5, 6)
    shuffled = [NAMES[k] for k in np.random.default_rng(0).permutation(11)]
    assert set(splits.split_classes(shuffled, "t", 3)) == set(t)
    assert set(splits.split_classes(NAMES, "t", 4)) != set(t)
    assert splits.split_classes(NAMES, "none", 3) == NAMES


def test_parts_of_a_split_make_it_up():
    names = [f"class {k}" for k in range(50)]
    parts = [splits.split_classes(names, f"t{k}/5", 3) for k in range(1, 6)]
    assert [len(part) for part in parts] == [5] * 5  # 10 % of the classes each, as in the paper
    assert sorted(name for part in parts for name in part) == sorted(splits.split_classes(names, "t", 3))
    assert parts[0] == ["class 6", "class 9", "class 13", "class 20", "class 34"]  # which part is which stays so
    with pytest.raises(FastconError, match="`split` t2/5 leaves 1 of 11 classes"):
        splits.split_classes(NAMES, "t2/5", 3)


@pytest.mark.parametrize("text", ["x", "t/5", "t6/5", "t0/5", "none1/2", "", "t1/0"])
def test_what_is_no_split(text):
    with pytest.raises(FastconError, match="is neither none, t, d nor a part of one"):
        splits.parse_split(text)


def test_several_labels_an_image(tmp_path, labelled_folder):
    """A list of paths with tabs: all images take part, whatever their labels; classes are matched by name."""
    images = sorted(labelled_folder.glob("*/*.jpg"))[:20]
    lines = [f"{path}\tred\tround" if k % 2 else f"{path}" for k, path in enumerate(images)]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    (tmp_path / "test.txt").write_text(f"{images[0]}\tblue\tred\n{images[1]}\n")
    train, test = splits.labelled(index([tmp_path / "train.txt"]), index([tmp_path / "test.txt"]), None, "none", 0)
    assert train.classes == test.classes == ("red", "round")
    assert train.labels.tolist() == [[k % 2, k % 2] for k in range(20)]
    assert test.labels.tolist() == [[1, 0], [0, 0]]
    kept, aside = splits.labelled(index([tmp_path / "train.txt"]), None, 0.25, "none", 0)
    assert (len(kept), len(aside)) == (15, 5)
    with pytest.raises(FastconError, match="its classes cannot be split"):
        splits.labelled(index([tmp_path / "train.txt"]), None, 0.25, "t", 0)
    (tmp_path / "one.txt").write_text(f"{images[0]}\tred\n{images[1]}\tround\n")  # no image happens to have two
    _, one = splits.labelled(index([tmp_path / "train.txt"]), index([tmp_path / "one.txt"]), None, "none", 0)
    assert one.labels.tolist() == [[1, 0], [0, 1]]
    with pytest.raises(FastconError, match="none of the labels of the test images"):
        splits.labelled(index([tmp_path / "train.txt"]), index([labelled_folder]), None, "none", 0)


def test_known_answer_of_a_split():
    assert splits.split_classes(NAMES, "t", 0) == KNOWN_T


def test_a_split_needs_four_classes():
    with pytest.raises(FastconError, match="needs at least 4, there are 3"):
        splits.split_classes(NAMES[:3], "t", 0)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=80), st.floats(0.05, 0.95), st.integers(0, 99))
def test_holding_out(labels, fraction, seed):
    labels = np.array(labels)
    ids = np.arange(len(labels), dtype=np.uint64) * 31
    kept, aside = splits._set_aside(ids, labels, fraction, seed)
    assert sorted([*kept, *aside]) == list(range(len(labels)))
    for label in np.unique(labels):
        size, taken = (labels == label).sum(), (labels[aside] == label).sum()
        assert taken == (0 if size == 1 else np.clip(np.rint(size * fraction), 1, size - 1))


def test_the_same_images_stay_aside_in_every_command(labelled_folder):
    _, everything = splits.labelled(index([labelled_folder]), None, 0.5, "none", 1)
    _, half = splits.labelled(index([labelled_folder]), None, 0.5, "d", 1)
    assert set(half.indices) < set(everything.indices)
    train, _ = splits.labelled(index([labelled_folder]), None, 0.5, "d", 1)
    assert not set(train.indices) & set(everything.indices)
    assert len(half.classes) == 3
    names = {half.manifest.name(int(i)).split("/")[0] for i in half.indices}
    assert names == set(half.classes)


def test_labels_count_within_the_wanted_classes(labelled_folder):
    manifest = index([labelled_folder])
    subset = splits.of_classes(manifest, ["shape-004", "shape-001"])
    for position, label in zip(subset.indices, subset.labels, strict=True):
        assert manifest.name(int(position)).startswith(subset.classes[label])
    with pytest.raises(FastconError, match="none of the 84 images is of a wanted class"):
        splits.of_classes(manifest, ["other"])


@given(st.integers(1, 8), st.integers(0, 50))
def test_draws(shots, trial):
    labels = np.repeat(np.arange(5), [1, 3, 8, 20, 5])
    ids = np.arange(len(labels), dtype=np.uint64) + 7
    rows = splits.draw(ids, labels, shots, 0, trial)
    counts = np.bincount(labels[rows], minlength=5)
    assert counts.tolist() == np.minimum([1, 3, 8, 20, 5], shots).tolist()
    backwards = splits.draw(ids[::-1], labels[::-1], shots, 0, trial)
    assert set(ids[::-1][backwards].tolist()) == set(ids[rows].tolist())


def test_draws_differ_between_trials_and_seeds():
    labels = np.repeat(np.arange(3), 30)
    ids = np.arange(90, dtype=np.uint64)
    drawn = {tuple(splits.draw(ids, labels, 5, seed, trial)) for seed in (0, 1) for trial in range(5)}
    assert len(drawn) == 10


@given(st.integers(2, 7), st.lists(st.integers(1, 12), min_size=2, max_size=8))
def test_folds_are_stratified_and_equal(folds, sizes):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    fold = splits.fold_of(np.arange(len(labels), dtype=np.uint64), labels, folds, 0, 0)
    per_class = np.array([np.bincount(fold[labels == c], minlength=folds) for c in range(len(sizes))])
    assert (np.ptp(per_class, axis=1) <= 1).all()
    assert np.ptp(per_class.sum(0)) <= 1


def test_what_a_command_cannot_use_is_said(proxy_folder):
    with pytest.raises(FastconError, match=r"holds 0 class\(es\), at least 2 are needed"):
        splits.labelled(index([proxy_folder]), None, 0.5, "none", 0)


KNOWN_T = ["class 3", "class 5", "class 6", "class 7", "class 10"]


def test_a_draw_from_what_draws_touch_is_the_same_draw(labelled_folder):
    """So a probe may compute features of those images alone."""
    train, _ = splits.labelled(index([labelled_folder]), None, 0.3, "none", 0)
    touched = splits.drawn(train, 2, 5, 3)
    assert len(touched) < len(train)
    own = splits.alone(touched)
    assert len(own.manifest) == len(touched)
    for trial in range(3):
        whole = train.ids[splits.draw(train.ids, train.labels, 2, 5, trial)]
        few = own.ids[splits.draw(own.ids, own.labels, 2, 5, trial)]
        assert sorted(whole.tolist()) == sorted(few.tolist())
    names = [own.classes[label] for label in own.labels]
    assert names == [own.manifest.name(int(k)).split("/")[0] for k in own.indices]

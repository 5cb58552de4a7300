"""Which images and classes take part: hold-outs, t- and d-splits, few-shot draws, folds.

All are pure functions of a seed and of image ids or class names, so every command given the same seed agrees.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastcon.data import views
from fastcon.data.manifest import Manifest
from fastcon.errors import FastconError, UsageError

SHOTS, MULTI_LABEL_SHOTS = 5, 1000
"""The paper's few shots: images per class; of a multi-label task images in all."""
_SPLIT = re.compile(r"none|([td])(?:([1-9]\d*)/([1-9]\d*))?")


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some images of a manifest with labels [m] counted within `classes`, or [m, C] of zeros and ones (multi-label)."""

    manifest: Manifest
    indices: NDArray[np.intp]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several labels, or none."""
        return self.labels.ndim == 2

    @property
    def digest(self) -> str:
        """SHA-256 of which images these are, with which labels among which classes."""
        hasher = hashlib.sha256(self.manifest.digest.encode())
        for part in (self.indices.astype(np.int64), self.labels.astype(np.int64)):
            hasher.update(part.tobytes())
        hasher.update("\0".join(self.classes).encode())
        return hasher.hexdigest()

    @property
    def ids(self) -> NDArray[np.uint64]:
        """Image ids [m]."""
        return self.manifest.ids[self.indices]


def labelled(
    train: Manifest, test: Manifest | None, holdout: float | None, split: str, seed: int
) -> tuple[Subset, Subset]:
    """The training and test parts of labelled images, some of whose classes take part.

    Raises FastconError where labels, classes or the test part are missing.
    """
    _require_labels(train)
    if split != "none" and train.multi_hot.shape[1]:
        raise FastconError(
            f"{', '.join(train.sources)} has several labels per image: its classes cannot be split, choose groups of "
            "labels instead (`split` none)"
        )
    classes = split_classes(train.classes, split, seed)
    if test is not None:
        _require_labels(test)
        several = bool(train.multi_hot.shape[1] or test.multi_hot.shape[1])
        if several and not set(classes) & set(test.classes):
            raise FastconError(
                f"none of the labels of the test images ({few(test.classes)}) is one of the training images "
                f"({few(classes)})"
            )
        return of_classes(train, classes, several=several), of_classes(test, classes, several=several)
    kept, aside = hold_out(train, holdout or 0.0, seed)
    return of_classes(train, classes, kept), of_classes(train, classes, aside)


def split_classes(classes: Sequence[str], split: str, seed: int) -> list[str]:
    """The classes of the t-split or d-split: disjoint random halves by seed, keyed by name (paper, section 3).

    t2/5: the second of five parts of the t-split (each 10 % of all classes, as in the paper's Fig. 3a).
    """
    which, part, parts = parse_split(split)
    if which is None:
        return list(classes)
    if len(classes) < 4:
        raise FastconError(
            f"`split` {split} halves the classes and needs at least 4, there are {len(classes)}: use `split` none"
        )
    order = views.permutation(seed, _name_keys(classes), 0, views.CLASS_SPLIT)
    half = len(classes) // 2
    chosen = set(np.array_split(order[:half] if which == "t" else order[half:], parts)[part - 1].tolist())
    if len(chosen) < 2:
        raise FastconError(f"`split` {split} leaves {len(chosen)} of {len(classes)} classes, at least 2 are needed")
    return [name for k, name in enumerate(classes) if k in chosen]


def parse_split(text: str) -> tuple[str | None, int, int]:
    """none, t, d, or a part of one as t2/5 → ("t", "d" or None, which part, of how many). Raises UsageError."""
    match = _SPLIT.fullmatch(text)
    which, part, parts = (match[1], int(match[2] or 1), int(match[3] or 1)) if match else (None, 1, 0)
    if not part <= parts:
        raise UsageError(f"`split` {text!r} is neither none, t, d nor a part of one, as t2/5")
    return which, part, parts


def hold_out(manifest: Manifest, fraction: float, seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """(kept, aside): `fraction` of each class aside, at least one image, though a class of one stays whole."""
    labels = np.zeros(len(manifest), np.int64) if manifest.multi_hot.shape[1] else manifest.labels
    return _set_aside(manifest.ids, labels, fraction, seed)


def part(subset: Subset, fraction: float, seed: int) -> tuple[Subset, Subset]:
    """Cut a subset likewise into (kept, aside)."""
    kept, aside = _set_aside(subset.ids, _strata(subset.labels), fraction, seed)
    return pick(subset, kept), pick(subset, aside)


def pick(subset: Subset, positions: NDArray[np.intp]) -> Subset:
    """Some of a subset's images, by position."""
    return dataclasses.replace(subset, indices=subset.indices[positions], labels=subset.labels[positions])


def of_classes(
    manifest: Manifest, classes: Sequence[str], within: NDArray[np.intp] | None = None, several: bool = False
) -> Subset:
    """The images of some classes, matched by name (multi-label: all); `within` restricts to some of the manifest.

    several: images may have several labels, even if none of these happens to.
    """
    if several or manifest.multi_hot.shape[1]:
        return _multi_label(manifest, classes, within)
    place = {name: k for k, name in enumerate(classes)}
    renamed = np.array([place.get(name, -1) for name in manifest.classes] + [-1], dtype=np.int64)
    labels = renamed[manifest.labels]  # label -1 takes the last entry, which is -1
    indices = np.flatnonzero(labels >= 0)
    if within is not None:
        indices = np.intersect1d(indices, within)
    if not len(indices):
        raise FastconError(
            f"none of the {len(manifest)} images is of a wanted class ({few(classes)}); the images' "
            f"classes are {few(manifest.classes)}"
        )
    return Subset(manifest, indices, labels[indices], tuple(classes))


def _multi_label(manifest: Manifest, classes: Sequence[str], within: NDArray[np.intp] | None) -> Subset:
    indices = np.arange(len(manifest)) if within is None else within
    column_of = {name: k for k, name in enumerate(manifest.classes)}
    labels = np.zeros((len(indices), len(classes)), dtype=np.int64)
    for k, name in enumerate(classes):
        if name in column_of and manifest.multi_hot.shape[1]:
            labels[:, k] = manifest.multi_hot[indices, column_of[name]]
        elif name in column_of:
            labels[:, k] = manifest.labels[indices] == column_of[name]
    return Subset(manifest, indices, labels, tuple(classes))


def draw(ids: NDArray[np.uint64], labels: NDArray[np.int64], shots: int, seed: int, trial: int) -> NDArray[np.intp]:
    """Positions of `shots` images per class (all of a smaller class), a pure function of (seed, ids, trial).

    Of multi-label images [n, C]: `shots` images in all.
    """
    rank = _rank_in_class(views.keys(seed, ids, trial, views.DRAW), _strata(labels))
    return np.flatnonzero(rank < shots)


def drawn(subset: Subset, shots: int, seed: int, trials: int) -> Subset:
    """Union of all draws; redrawing from it gives the same images."""
    rows = [draw(subset.ids, subset.labels, shots, seed, trial) for trial in range(trials)]
    return pick(subset, np.unique(np.concatenate(rows)))


def alone(subset: Subset) -> Subset:
    """The subset with its own manifest, so that nothing is computed for other images."""
    manifest = subset.manifest.select(subset.indices)
    return dataclasses.replace(subset, manifest=manifest, indices=np.arange(len(subset)))


def fold_of(ids: NDArray[np.uint64], labels: NDArray[np.int64], folds: int, seed: int, trial: int) -> NDArray[np.int64]:
    """Stratified fold [m] of each image: a class's images are dealt out in random order, folds in turn.

    Each class starts dealing where the one before it stopped, so that folds stay equally large. Multi-label images
    are dealt out as one class.
    """
    order = np.lexsort((views.keys(seed, ids, trial, views.FOLD), _strata(labels)))
    dealt = np.empty(len(ids), dtype=np.int64)
    dealt[order] = np.arange(len(ids)) % folds
    return dealt


def _strata(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The strata of a draw [n]: the classes; images with several labels have none."""
    return labels if labels.ndim == 1 else np.zeros(len(labels), dtype=np.int64)


def _set_aside(
    ids: NDArray[np.uint64], labels: NDArray, fraction: float, seed: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    rank = _rank_in_class(views.keys(seed, ids, 0, views.HOLDOUT), labels)
    sizes = np.bincount(labels + 1, minlength=1)[labels + 1]
    count = np.clip(np.rint(sizes * fraction), 1, sizes - 1)
    aside = (rank < count) & (labels >= 0)
    return np.flatnonzero(~aside), np.flatnonzero(aside)


def _rank_in_class(keys: NDArray[np.uint64], labels: NDArray) -> NDArray[np.int64]:
    order = np.lexsort((keys, labels))
    first = np.searchsorted(labels[order], labels[order], side="left")
    rank = np.empty(len(labels), dtype=np.int64)
    rank[order] = np.arange(len(labels)) - first
    return rank


def _name_keys(names: Sequence[str]) -> NDArray[np.uint64]:
    hashed = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names]
    return np.frombuffer(b"".join(hashed), dtype="<u8")


def _require_labels(manifest: Manifest) -> None:
    if len(manifest.classes) < 2:
        raise FastconError(
            f"{', '.join(manifest.sources)} holds {len(manifest.classes)} class(es), at least 2 are needed: "
            "put the images of each class into a folder of its own"
        )


def task_name(sources: list[str]) -> str:
    """What a task is called: its first source without folders, options and ending; a data set's own name."""
    named_set = re.match(r"[a-z]+:([\w-]+)(?:\?|$)", sources[0])
    if named_set:
        return named_set[1]
    parts = [part for part in sources[0].split("/") if part]
    named = [part for part in parts if part not in ("train", "val", "test")] or parts  # birds/train is birds
    return named[-1].removesuffix(".tar").removesuffix(".txt") if named else sources[0]


def few(names: Sequence[str]) -> str:
    """The first names of many, for a message."""
    return ", ".join(list(names[:4]) + ([f"… ({len(names)} in all)"] if len(names) > 4 else [])) or "none"

"""How much a teacher can be relied on, from what it said of two views of the same images; and weights made of that.

A teacher that recognises things says the same of two crops of an image and different things of different images: its
predictions of two views share information, the objective of invariant information clustering (Ji et al., "Invariant
Information Clustering for Unsupervised Image Classification and Segmentation", ICCV 2019, Eq. 3). A head whose weights are
wrong, a network damaged by noise or one trained on wrong labels shares little.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastcon.distill import loss as objective
from fastcon.distill.options import AUTO, TrainOptions
from fastcon.errors import FastconError
from fastcon.store.reader import Store, Stored

PAIRS = 4096
"""Images, about, whose two views are compared."""
NOTHING, WHOLE = 0.5, 0.75
"""Shares of the median below which a teacher is left out, and from which it counts as much as any."""
BLOCK = 1024
"""Classes that are counted at a time, against all."""


def resolved(store: Stored, names: Sequence[str], options: TrainOptions) -> TrainOptions:
    """The options with the weights that "auto" stands for beside it; those that were given stay. names: the heads."""
    if AUTO not in options.weight:
        return options
    given = tuple(pair for pair in options.weight if not isinstance(pair, str))
    made = {name: value for name, value in weights(store, names, options).items() if name not in dict(given)}
    return dataclasses.replace(options, weight=(AUTO, *made.items(), *given))


def weights(store: Stored, names: Sequence[str], options: TrainOptions) -> dict[str, float]:
    """λ of the task-specific teachers among `names`, rounded to 4 digits: their share of the balance, split anew.

    A teacher counts in full where its shared information is at least WHOLE of the median of all, not at all below NOTHING
    of it, in between in proportion; an embedding, which predicts nothing, in full.
    """
    tasks = [name for name in names if name != store.generalist]
    balanced = dict(zip(names, objective.head_weights(names, store.generalist, options.balance), strict=True))
    known = {name: shared_information(store, name) for name in tasks if store.teachers[name].kind != "embedding"}
    middle = float(np.median(list(known.values()))) if known else 0.0
    if middle <= 0:
        return {name: round(balanced[name], 4) for name in tasks}
    ramp = {name: (known.get(name, middle) / middle - NOTHING) / (WHOLE - NOTHING) for name in tasks}
    parts = {name: min(max(part, 0.0), 1.0) for name, part in ramp.items()}
    share = sum(balanced[name] for name in tasks) / sum(parts.values())
    return {name: round(share * part, 4) for name, part in parts.items()}


def shared_information(store: Stored, name: str) -> float:
    """Nats that a classifier's predictions of views 0 and 1 of an image share, beyond what any two images' do.

    Soft predictions at T = 1, of some PAIRS images of the first part. Raises FastconError for a store of one view.
    """
    if store.views < 2:
        raise FastconError(
            f"{store.path} holds one view of each image, and how reliable a teacher is shows in two: run `fastcon precompute` "
            "again with `views` 2, or give `weight` NAME=λ"
        )
    part = store.part(0)
    first, second = _two_views(part, name)
    predict = _labels if store.teachers[name].kind == "sigmoid" else _classes
    return predict(first, second) - predict(first, np.roll(second, 1, axis=0))


def _two_views(store: Store, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Logits [n, C] of the same images in views 0 and 1: those that evenly spaced chunks of both have in common."""
    count = min(store.chunks, int(np.ceil((PAIRS * store.rows) ** 0.5 / store.recipe.chunk_rows)))
    chunks = np.unique(np.linspace(0, store.chunks - 1, count).round().astype(int)).tolist()
    spans = [slice(*store.chunk_range(chunk)) for chunk in chunks]
    images, others = (np.concatenate([store.view(view).order[span] for span in spans]) for view in (0, 1))
    _, *rows = np.intersect1d(images, others, assume_unique=True, return_indices=True)
    first, second = (
        np.concatenate([store.logits(name, view, chunk) for chunk in chunks])[rows[view]].astype(np.float64)
        for view in (0, 1)
    )
    return first, second


def _classes(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Mutual information of the classes of two softmax heads, their joint distribution the mean over the images."""
    p, q = (_softmax(z) for z in (first, second))
    total = _entropy(p.mean(0)) + _entropy(q.mean(0))
    for start in range(0, p.shape[1], BLOCK):
        total -= _entropy(p[:, start : start + BLOCK].T @ q / len(p))
    return total


def _labels(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """The same of every label, added up."""
    p, q = (1 / (1 + np.exp(-z)) for z in (first, second))
    joint = np.stack([(a * b).mean(0) for a in (p, 1 - p) for b in (q, 1 - q)])
    return sum(_entropy(np.stack([x.mean(0), 1 - x.mean(0)])) for x in (p, q)) - _entropy(joint)


def _softmax(z: NDArray[np.float64]) -> NDArray[np.float64]:
    p = np.exp(z - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def _entropy(p: NDArray[np.float64]) -> float:
    """-sum p log p, in nats."""
    p = p[p > 0]
    return -float((p * np.log(p)).sum())

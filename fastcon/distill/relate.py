"""How alike the teachers of a store are, from what they said of the same rows; no model is run.

Two measures, of teachers with whatever classes. Linear CKA of their logits (Kornblith et al., "Similarity of Neural
Network Representations Revisited", ICML 2019) with the unbiased HSIC (Song et al., "Feature Selection via Dependence
Maximization", JMLR 2012): 1 for outputs that are equal up to a rotation and a scale, 0 for unrelated ones. And the mutual
information of their predicted classes, normalised and adjusted for chance (Vinh et al., "Information Theoretic Measures
for Clusterings Comparison", JMLR 2010). Embeddings predict no classes: they have the first measure only.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastcon.distill.reliability import shared_information
from fastcon.errors import FastconError
from fastcon.store.parts import opened
from fastcon.store.reader import Stored

ROWS, CHUNKS = 2048, 8
"""Rows that are compared, and chunks they come from, at most."""
SUBSTANTIAL = 0.25
"""Least mean silhouette of a grouping: below there is "no substantial structure" (Kaufman & Rousseeuw 1990)."""
ALIKE, MARGIN, REDUNDANT = 0.5, 0.05, 0.95
"""CKA from which teachers without such structure count as one domain; by which a domain is more alike inside than to the
rest; and from which one of two teachers adds little."""
NEAR_CONSTANT = 0.1
"""Share of the information that its classes could carry below which a teacher says nearly the same of every image."""
FEWEST = 64
"""Images that must be in the sample of two views to say how consistent a teacher is."""


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What a teacher says of a proxy, by itself."""

    classes: int
    """Or features, of an embedding, which has nothing but its consistency."""
    information: float | None
    """Of the predicted class about the image, as a share of what that many classes could carry: 0 for a constant."""
    used: float | None
    """Classes that it effectively uses: the perplexity of its mean prediction (of labels: of several, their number)."""
    confidence: float | None
    """Mean probability of its prediction."""
    consistency: float | None
    """Share of images of which two views are predicted alike (of an embedding: the mean cosine of two views' centred
    features); None: too few images are in the sample twice."""
    steady: float | None = None
    """Nats that predictions of two views of an image share: see `reliability`. None of one view, and of an embedding."""

    @property
    def near_constant(self) -> bool:
        """Whether the proxy does not cover what it was taught."""
        return self.information is not None and self.information < NEAR_CONSTANT


@dataclasses.dataclass(frozen=True)
class Relations:
    """How the teachers of a store relate; matrices [N, N] in the order of `names`."""

    store: str
    names: list[str]
    generalist: str | None
    rows: int
    cka: NDArray[np.float64]
    shared: NDArray[np.float64]
    """Adjusted mutual information of predicted classes: 0 by chance, 1 at most; NaN with an embedding."""
    outputs: dict[str, Outputs]
    domains: list[list[str]]
    """Task-specific teachers, grouped where that has structure: see `domains`."""
    silhouette: float | None
    """Of that grouping; None where it was not found by it."""
    redundant: list[tuple[str, str]]

    def json(self) -> dict[str, Any]:
        """As it is written into results."""
        shared = [[None if np.isnan(value) else value for value in row] for row in self.shared.tolist()]
        return dataclasses.asdict(self) | {"cka": self.cka.tolist(), "shared": shared}


def relate(path: str | os.PathLike[str], rows: int = ROWS) -> Relations:
    """Compare the teachers of a store on up to `rows` rows of its first view. Raises FastconError."""
    store = opened(path)
    names = list(store.teachers)
    if len(names) < 2:
        raise FastconError(f"{store.path} has {len(names)} teacher: there is nothing to compare")
    for name in names:
        store.require(name, min(store.views, 2))
    chunks = np.unique(np.linspace(0, store.chunks - 1, CHUNKS).round().astype(int)).tolist()
    logits = {name: _sample(store, name, chunks, rows) for name in names}
    grams = {name: _gram(values, store.teachers[name].kind) for name, values in logits.items()}
    classifies = {name: store.teachers[name].kind != "embedding" for name in names}
    predicted = {name: values.argmax(1) for name, values in logits.items() if classifies[name]}
    cka, shared = np.eye(len(names)), np.eye(len(names))
    for (i, a), (j, b) in itertools.combinations(enumerate(names), 2):
        cka[i, j] = cka[j, i] = similarity(grams[a], grams[b])
        both = classifies[a] and classifies[b]
        shared[i, j] = shared[j, i] = _shared(predicted[a], predicted[b]) if both else np.nan
    again = _twice(store, chunks) if store.views > 1 else []
    outputs = {name: _outputs(store, name, values, again) for name, values in logits.items()}
    if store.views > 1:
        for name in predicted:
            outputs[name] = dataclasses.replace(outputs[name], steady=shared_information(store, name))
    experts = [k for k, name in enumerate(names) if name != store.generalist]
    groups, silhouette = domains(cka[np.ix_(experts, experts)])
    grouped = [[names[experts[k]] for k in group] for group in groups]
    redundant = [(names[i], names[j]) for i, j in itertools.combinations(experts, 2) if cka[i, j] >= REDUNDANT]
    count = len(next(iter(logits.values())))
    return Relations(store.path, names, store.generalist, count, cka, shared, outputs, grouped, silhouette, redundant)


def similarity(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """CKA of two Gram matrices [n, n], by the unbiased HSIC; below 0 only by chance. 0 where one of them is constant."""
    norms = _hsic(a, a) * _hsic(b, b)
    return 0.0 if norms <= 0 else float(_hsic(a, b) / norms**0.5)


def domains(cka: NDArray[np.float64]) -> tuple[list[list[int]], float | None]:
    """Groups of teachers [N, N], and their mean silhouette; None where there are none.

    Teachers belong together that relate to all teachers alike: the distance of two is 1 less the correlation of their rows
    of the CKA matrix. All that a common origin makes alike drops out of that. Average linkage, as many groups as give the
    best mean silhouette (Rousseeuw 1987); a group that is hardly more alike inside than to the rest falls apart. Below
    SUBSTANTIAL there are no groups: all are one if they are alike on the whole, else each its own.
    """
    count = len(cka)
    best: tuple[float, list[int]] = (1e-6, [])
    for number in range(2, count):
        labels = _cut(cka, number)
        value = float(np.mean(_silhouettes(_apart(cka), labels)))
        if value > best[0] - 1e-9:  # of two that are as good the finer
            best = value, labels
    if best[0] < SUBSTANTIAL:
        alike = count > 0 and (count == 1 or cka[np.triu_indices(count, 1)].mean() >= ALIKE)
        return ([list(range(count))] if alike else [[k] for k in range(count)]), None
    groups = [[k for k, label in enumerate(best[1]) if label == group] for group in dict.fromkeys(best[1])]
    return [part for group in groups for part in ([group] if _holds(cka, group) else [[k] for k in group])], best[0]


def _holds(cka: NDArray[np.float64], group: list[int]) -> bool:
    """Whether the members of a group are more alike than each is to the rest."""
    rest = [k for k in range(len(cka)) if k not in group]
    if len(group) == 1 or not rest:
        return True
    inside = cka[np.ix_(group, group)][np.triu_indices(len(group), 1)].mean()
    return bool(inside >= cka[np.ix_(group, rest)].mean() + MARGIN)


def _apart(cka: NDArray[np.float64]) -> NDArray[np.float64]:
    """The distance of every two teachers [N, N]: 1 less the correlation of their rows."""
    with np.errstate(invalid="ignore"):
        alike = np.atleast_2d(np.corrcoef((cka + cka.T) / 2))
    apart = np.clip(1 - np.nan_to_num(alike, nan=1.0), 0, None)  # a row without spread is like any other
    np.fill_diagonal(apart, 0)
    return apart


def linkage(cka: NDArray[np.float64]) -> NDArray[np.float64]:
    """SciPy's linkage matrix [N - 1, 4] of `domains`, for a dendrogram."""
    from scipy.cluster.hierarchy import linkage as scipys
    from scipy.spatial.distance import squareform

    return scipys(squareform(_apart(cka), checks=False), "average")


def _cut(cka: NDArray[np.float64], number: int) -> list[int]:
    from scipy.cluster.hierarchy import cut_tree

    return cut_tree(linkage(cka), number)[:, 0].tolist()


def _silhouettes(apart: NDArray[np.float64], labels: Sequence[int]) -> list[float]:
    """Of each teacher: how much nearer its own group is than the nearest other; 0 of one that is alone."""
    groups = {label: np.flatnonzero(np.array(labels) == label) for label in labels}
    values = []
    for k, label in enumerate(labels):
        own = groups[label]
        if len(own) == 1:
            values.append(0.0)
            continue
        inside = apart[k, own].sum() / (len(own) - 1)
        outside = min(apart[k, other].mean() for name, other in groups.items() if name != label)
        values.append(float((outside - inside) / max(inside, outside, 1e-12)))
    return values


def _sample(store: Stored, name: str, chunks: list[int], rows: int) -> NDArray[np.float32]:
    """A teacher's logits of as many rows of each chunk of view 0; rows lie in random order."""
    share = -(-rows // len(chunks))
    return np.concatenate([store.logits(name, 0, chunk)[:share] for chunk in chunks]).astype(np.float32)[:rows]


def _gram(logits: NDArray[np.float32], kind: str) -> NDArray[np.float32]:
    """X X^T of centred logits at unit scale; of a softmax's rows the mean means nothing, so it is taken out, too."""
    x = logits - logits.mean(1, keepdims=True) if kind == "softmax" else logits
    x = x - x.mean(0)
    norm = np.linalg.norm(x)
    x = x / norm * len(x) ** 0.5 if norm > 0 else x
    gram = x @ x.T
    np.fill_diagonal(gram, 0)
    return gram


def _hsic(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """The unbiased estimate (Song et al., Eq. 5) of two Gram matrices with empty diagonals."""
    n = len(a)
    rows_a, rows_b = a.sum(0, dtype=np.float64), b.sum(0, dtype=np.float64)
    product = float(np.einsum("ij,ij->", a, b, dtype=np.float64))
    product += rows_a.sum() * rows_b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * float(rows_a @ rows_b)
    return product / (n * (n - 3))


def _shared(a: NDArray[np.intp], b: NDArray[np.intp]) -> float:
    from sklearn.metrics import adjusted_mutual_info_score

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there may be as many classes as rows
        return float(adjusted_mutual_info_score(a, b))


def _outputs(
    store: Stored, name: str, logits: NDArray[np.float32], again: list[tuple[int, int, NDArray, NDArray]]
) -> Outputs:
    teacher = store.teachers[name]
    z = logits.astype(np.float64)
    if teacher.kind == "embedding":
        cosines = [
            _cosines(store.logits(name, 0, first)[rows] - z.mean(0), store.logits(name, 1, second)[others] - z.mean(0))
            for first, second, rows, others in again
        ]
        return Outputs(len(teacher.classes), None, None, None, _mean_over_images(cosines))
    if teacher.kind == "sigmoid":
        p = 1 / (1 + np.exp(-z))
        information = float((_bits(p.mean(0)) - _bits(p).mean(0)).mean() / np.log(2))
        used = float(p.mean(0).sum())
        confidence = float(np.maximum(p, 1 - p).mean())
    else:
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        mean = p.mean(0)
        whole = -float((mean * np.log(np.maximum(mean, 1e-300))).sum())
        each = -float((p * np.log(np.maximum(p, 1e-300))).sum(1).mean())
        information, used, confidence = (whole - each) / np.log(max(len(mean), 2)), np.exp(whole), p.max(1).mean()
    alike = [
        store.logits(name, 0, first)[rows].argmax(1) == store.logits(name, 1, second)[others].argmax(1)
        for first, second, rows, others in again
    ]
    consistency = _mean_over_images(alike)
    return Outputs(len(teacher.classes), float(information), float(used), float(confidence), consistency)


def _mean_over_images(values: Sequence[NDArray[Any]]) -> float | None:
    return float(np.concatenate(values).mean()) if sum(map(len, values)) >= FEWEST else None


def _cosines(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of every row of `a` with that of `b`."""
    return (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)


def _bits(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Entropy of a yes or no, in nats."""
    q = np.clip(p, 1e-300, 1 - 1e-16)
    return -(q * np.log(q) + (1 - q) * np.log1p(-q))


def _twice(store: Stored, chunks: list[int]) -> list[tuple[int, int, NDArray, NDArray]]:
    """Where the same images lie in chunks of views 0 and 1: both chunks, and the rows in each."""
    found = []
    for first, second in itertools.product(chunks, chunks):
        if store.chunking.place(first)[0] == store.chunking.place(second)[0]:  # a part has its own images
            _, rows, others = np.intersect1d(
                _order(store, 0, first), _order(store, 1, second), assume_unique=True, return_indices=True
            )
            if len(rows):
                found.append((first, second, rows, others))
    return found


def _order(store: Stored, view: int, chunk: int) -> NDArray[np.uint32]:
    """Which image of its part each row of a chunk is."""
    part, inside = store.chunking.place(chunk)
    start, stop = store.part(part).chunk_range(inside)
    return store.part(part).view(view).order[start:stop]

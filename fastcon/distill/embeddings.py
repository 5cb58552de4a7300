"""What the features of embedding teachers are standardised with: mean and standard deviation of each in a store's rows.

Both follow from the stored rows, so they are not stored: adding parts, views or images leaves nothing to bring up to date.
"""

from __future__ import annotations

import numpy as np
import torch

from fastcon.kernels.multihead_ce import Standard
from fastcon.store.reader import Stored

CHUNKS = 64
"""Chunks of view 0 that they are taken from, at most: rows lie in random order, so these are a random sample."""
CONSTANT = 1e-6
"""Standard deviation, as a share of the largest, below which a feature counts as constant and is not learned."""


def standard(store: Stored, name: str) -> Standard | None:
    """The standard of a teacher whose rows of view 0 are complete; None where it is no embedding."""
    teacher = store.teachers[name]
    if teacher.kind != "embedding":
        return None
    total = np.zeros((2, len(teacher.classes)))
    count = 0
    chunks = np.unique(np.linspace(0, store.chunks - 1, CHUNKS).round().astype(int)).tolist()
    for chunk in chunks:
        store.ahead([name], 0, chunk)
    for chunk in chunks:
        rows = store.logits(name, 0, chunk).astype(np.float64)
        total += rows.sum(0), np.square(rows).sum(0)
        count += len(rows)
    mean = total[0] / count
    deviation = np.sqrt(np.maximum(total[1] / count - np.square(mean), 0))
    learned = deviation > CONSTANT * deviation.max()
    scale = np.divide(1, deviation, out=np.zeros_like(deviation), where=learned)
    return Standard(torch.from_numpy(mean).float(), torch.from_numpy(scale).float())

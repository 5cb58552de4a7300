"""A view as a pure function of (seed, image id, view id): order, crop box and flip.

In: a seed, image ids and sizes. Out: NumPy arrays. Every random word comes from Philox4x32-10, a
counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), at a
counter made of image id, view and purpose. Nothing depends on batches, workers or a resume point.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]

TRIES = 10
# Purposes: the counter word that keeps uses of one (seed, id) apart. Crop tries take 0 to 9.
FLIP, ORDER, EPOCH_CHUNKS, EPOCH_ROWS, HOLDOUT, DRAW, FOLD, CLASS_SPLIT, SAMPLE, SHUFFLE, EPOCH_PARTS = range(16, 27)

_BLOCK = 1 << 16  # images computed at once: bounds the memory of ten tries
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox(key: tuple[int, int], counter: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Philox4x32-10: counter [..., 4] of 32-bit words (held in uint64) → random words [..., 4], likewise."""
    c0, c1, c2, c3 = np.moveaxis(counter & _LOW, -1, 0)
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _HALF) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _HALF) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1)


def words(seed: int, ids: NDArray[np.uint64], stream: int, purpose: int) -> NDArray[np.uint64]:
    """Four random 32-bit words for every id: uint64 [n, 4]. `stream` is the view, epoch or trial."""
    ids = np.asarray(ids, dtype=np.uint64)
    counter = np.empty((*ids.shape, 4), dtype=np.uint64)
    counter[..., 0] = ids & _LOW
    counter[..., 1] = ids >> _HALF
    counter[..., 2] = stream
    counter[..., 3] = purpose
    return philox((seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF), counter)


def keys(seed: int, ids: NDArray[np.uint64], stream: int, purpose: int) -> NDArray[np.uint64]:
    """One random 64-bit sort key for every id."""
    out = np.empty(len(ids), dtype=np.uint64)
    for start in range(0, len(ids), _BLOCK):
        drawn = words(seed, ids[start : start + _BLOCK], stream, purpose)
        out[start : start + _BLOCK] = (drawn[:, 1] << _HALF) | drawn[:, 0]
    return out


def permutation(seed: int, ids: NDArray[np.uint64], stream: int, purpose: int) -> NDArray[np.int64]:
    """A random order of `ids` (indices into it): the stable argsort of their keys."""
    return np.argsort(keys(seed, ids, stream, purpose), kind="stable")


def order(seed: int, ids: NDArray[np.uint64], view: int) -> NDArray[np.int64]:
    """The order of the images in a view: entry r is the image of row r."""
    return permutation(seed, ids, view, ORDER)


def flips(seed: int, ids: NDArray[np.uint64], view: int) -> NDArray[np.uint8]:
    """1 where the view of an image is mirrored left to right (probability one half)."""
    return (words(seed, ids, view, FLIP)[:, 0] >> np.uint64(31)).astype(np.uint8)


def boxes(
    seed: int,
    ids: NDArray[np.uint64],
    view: int,
    widths: NDArray[np.int32],
    heights: NDArray[np.int32],
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> NDArray[np.int32]:
    """Crop boxes [n, 4] (top, left, height, width) with the semantics of torchvision's RandomResizedCrop.

    Ten tries of an area in `scale` and a log-uniform aspect in `ratio`; the first that fits is placed
    uniformly, else the largest central box within `ratio`.
    """
    out = np.empty((len(ids), 4), dtype=np.int32)
    for start in range(0, len(ids), _BLOCK):
        block = slice(start, start + _BLOCK)
        out[block] = _boxes(seed, ids[block], view, widths[block], heights[block], scale, ratio)
    return out


def center_boxes(widths: NDArray[np.int32], heights: NDArray[np.int32]) -> NDArray[np.int32]:
    """The evaluation crop as boxes [n, 4]: the central square of 224/256 of the short side.

    Resized to `size`, this is the image with its short side at size * 256 / 224 and its centre cut out.
    """
    short = np.minimum(widths, heights)
    side = np.maximum(np.rint(short * (224 / 256)).astype(np.int32), 1)
    return np.stack([(heights - side) // 2, (widths - side) // 2, side, side], axis=1).astype(np.int32)


def _boxes(seed, ids, view, widths, heights, scale, ratio) -> NDArray[np.int32]:  # type: ignore[no-untyped-def]
    drawn = np.stack([words(seed, ids, view, attempt) for attempt in range(TRIES)], axis=1)  # [n, 10, 4]
    uniform = drawn * 2.0**-32
    w, h = np.asarray(widths, np.int64)[:, None], np.asarray(heights, np.int64)[:, None]
    area = w * h * (scale[0] + uniform[..., 0] * (scale[1] - scale[0]))
    low, high = np.log(ratio[0]), np.log(ratio[1])
    aspect = np.exp(low + uniform[..., 1] * (high - low))
    box_w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    box_h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (box_w > 0) & (box_w <= w) & (box_h > 0) & (box_h <= h)
    # (word * count) >> 32 is uniform over count values without a modulus.
    top = (drawn[..., 2] * np.maximum(h - box_h + 1, 1).astype(np.uint64)) >> _HALF
    left = (drawn[..., 3] * np.maximum(w - box_w + 1, 1).astype(np.uint64)) >> _HALF
    tried = np.stack([top.astype(np.int64), left.astype(np.int64), box_h, box_w], axis=-1)
    first = fits.argmax(axis=1)
    chosen = tried[np.arange(len(ids)), first]
    return np.where(fits.any(axis=1)[:, None], chosen, _fallback(w[:, 0], h[:, 0], ratio)).astype(np.int32)


def _fallback(w: NDArray[np.int64], h: NDArray[np.int64], ratio: tuple[float, float]) -> NDArray[np.int64]:
    box_w, box_h = w.copy(), h.copy()
    tall, wide = w / h < min(ratio), w / h > max(ratio)
    box_h[tall] = np.maximum(np.rint(w[tall] / min(ratio)), 1)
    box_w[wide] = np.maximum(np.rint(h[wide] * max(ratio)), 1)
    return np.stack([(h - box_h) // 2, (w - box_w) // 2, box_h, box_w], axis=1)

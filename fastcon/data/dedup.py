"""Near-duplicate images between two sets (or within one): perceptual hashes to find them, correlation to confirm.

An image has six hashes, of itself and of five of its parts (95 % of its sides: the middle and at each corner), so that
a copy that lost a margin is found too: a pair of which a hash of the one whole and any of the other differ in few of 64
bits is a candidate; it is one where small grey copies, at the best of a few crops, correlate. Time grows about linearly up to some
100,000 images without many equal ones; a thousand equal images are a million pairs.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastcon.cores import default_threads
from fastcon.data.decode import eight_bit
from fastcon.data.manifest import Manifest
from fastcon.errors import FastconError
from fastcon.files import write_atomically

DISTANCE = 10
"""Bits of 64 in which hashes of a candidate pair differ at most."""
CORRELATION = 0.9
"""Correlation of the grey copies from which on a pair is one."""
SIDE = 48
_MARGIN = 0.05
_PARTS = ((0.5, 0.5), (0, 0), (0, 1), (1, 0), (1, 1))


@dataclasses.dataclass(frozen=True)
class Prints:
    """What images are compared by: hashes uint64 [n, 6] of the whole and of five parts, grey copies uint8 [n, 48, 48]."""

    hashes: NDArray[np.uint64]
    grey: NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two near-duplicates by their index in either set: differing bits and correlation."""

    first: int
    second: int
    bits: int
    correlation: float


Progress = Callable[[int, int], None]


def fingerprints(manifest: Manifest, threads: int | None = None, progress: Progress | None = None) -> Prints:
    """Decode and hash every image of a set. Raises FastconError for one that changed or does not decode."""
    n = len(manifest)
    hashes, grey = np.empty((n, 1 + len(_PARTS)), dtype=np.uint64), np.empty((n, SIDE, SIDE), dtype=np.uint8)
    reader = manifest.reader()
    try:
        with ThreadPoolExecutor(threads or default_threads()) as pool:
            for start in range(0, n, 256):
                block = range(start, min(start + 256, n))
                names = [manifest.name(k) for k in block]
                for k, (own, copy) in zip(block, pool.map(_print, names, reader.read(list(block))), strict=True):
                    hashes[k], grey[k] = own, copy
                if progress:
                    progress(block.stop, n)
    finally:
        reader.close()
    return Prints(hashes, grey)


def _print(name: str, data: NDArray[np.uint8]) -> tuple[list[int], NDArray[np.uint8]]:
    import imagehash
    from PIL import Image

    try:
        file = Image.open(io.BytesIO(data.tobytes()))
        file.draft("L", (2 * SIDE, 2 * SIDE))  # JPEGs come out small, at a fraction of the time
        image = eight_bit(file).convert("L")
    except Exception as error:
        raise FastconError(f"image {name!r} does not decode ({error}): index it without `trust_images`") from error
    width, height = image.size[0] * (1 - _MARGIN), image.size[1] * (1 - _MARGIN)
    parts = [image]
    for across, down in _PARTS:
        left, top = across * (image.size[0] - width), down * (image.size[1] - height)
        parts.append(image.resize((32, 32), Image.Resampling.BILINEAR, box=_inside(image, left, top, width, height)))
    hashes = [imagehash.phash(part).hash for part in parts]
    return [int.from_bytes(np.packbits(bits).tobytes(), "big") for bits in hashes], np.asarray(
        image.resize((SIDE, SIDE))
    )


def _inside(image: Any, left: float, top: float, width: float, height: float) -> tuple[float, float, float, float]:
    """A box as Pillow takes it, clipped where rounding puts it outside the image."""
    return left, top, min(left + width, image.size[0]), min(top + height, image.size[1])


def near_duplicates(
    a: Prints,
    b: Prints | None = None,
    distance: int = DISTANCE,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[Pair]:
    """Pairs of an image of `a` and one of `b` (None: another of `a`), by first index, the most alike first."""
    other = a if b is None else b
    pairs = []
    for first, second in _candidates(a.hashes, other.hashes, distance, threads, progress):
        if b is None and first >= second:
            continue
        correlation = _correlation(a.grey[first], other.grey[second])
        if correlation >= CORRELATION:
            pairs.append(Pair(first, second, _bits(a.hashes[first], other.hashes[second]), correlation))
    return sorted(pairs, key=lambda pair: (pair.first, -pair.correlation))


def _candidates(
    a: NDArray[np.uint64], b: NDArray[np.uint64], distance: int, threads: int | None, progress: Progress | None
) -> list[tuple[int, int]]:
    """Pairs of which some hashes differ in at most `distance` bits.

    Then one of the four quarters differs in at most a fourth of them (Norouzi et al., CVPR 2012): pairs are looked up by
    every quarter so near, and the whole hashes compared.
    """
    masks = [sum(1 << bit for bit in bits) for r in range(distance // 4 + 1) for bits in combinations(range(16), r)]

    def quarter(job: tuple[int, int, int]) -> NDArray[np.intp]:
        i, j, shift = job
        ours, theirs = a[:, i], b[:, j]
        own, other = ((part >> np.uint64(shift)).astype(np.uint16).astype(np.int64) for part in (ours, theirs))
        order = np.argsort(other, kind="stable")
        starts = np.searchsorted(other[order], np.arange((1 << 16) + 1))
        found = []
        for mask in masks:
            begin, end = starts[own ^ mask], starts[(own ^ mask) + 1]
            counts = end - begin
            first = np.repeat(np.arange(len(a)), counts)
            second = order[np.arange(len(first)) + np.repeat(begin - np.cumsum(counts) + counts, counts)]
            close = np.bitwise_count(ours[first] ^ theirs[second]) <= distance
            found.append(np.stack([first[close], second[close]], 1))
        return np.concatenate(found)

    jobs = [(i, j, shift) for i, j in _matches(a) for shift in (0, 16, 32, 48)]
    keys = np.empty(0, dtype=np.int64)
    with ThreadPoolExecutor(threads or default_threads()) as pool:
        for done, found in enumerate(pool.map(quarter, jobs), 1):
            keys = np.union1d(keys, found[:, 0] * len(b) + found[:, 1])
            if progress:
                progress(done, len(jobs))
    return [(key // len(b), key % len(b)) for key in keys.tolist()]


def _bits(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> int:
    return min(int(np.bitwise_count(a[i] ^ b[j])) for i, j in _matches(a[None]))


def _matches(hashes: NDArray[np.uint64]) -> list[tuple[int, int]]:
    """Which hashes are compared: the whole of either image with every one of the other."""
    count = hashes.shape[1]
    return [(0, j) for j in range(count)] + [(i, 0) for i in range(1, count)]


def _correlation(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """The best correlation of two grey copies, either of them whole or with 5 % of its sides cut off."""
    whole = (_normal(a), _normal(b))
    return max(
        float(np.vdot(_normal(a), whole[1])),
        max(float(np.vdot(part, whole[1])) for part in _crops(a)),
        max(float(np.vdot(whole[0], part)) for part in _crops(b)),
    )


def _crops(grey: NDArray[np.uint8]) -> Iterator[NDArray[np.float32]]:
    from PIL import Image

    image, cut = Image.fromarray(grey), SIDE * _MARGIN
    for left in (0, cut / 2, cut):
        for top in (0, cut / 2, cut):
            box = _inside(image, left, top, SIDE - cut, SIDE - cut)
            yield _normal(np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box)))
    yield _normal(
        np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=(cut, cut, SIDE - cut, SIDE - cut)))
    )


def _normal(grey: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Scaled to mean 0 and norm 1, so that products are correlations; a uniform picture correlates with none."""
    values = grey.astype(np.float32) - grey.mean()
    norm = float(np.linalg.norm(values))
    return values / norm if norm > 1 else np.zeros_like(values)


def write(out: str, sets: list[Manifest], prints: list[Prints], pairs: list[Pair]) -> None:
    """pairs.csv and sheet.png of the pairs between the first and the last of `sets`, in the folder `out`."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["first", "second", "bits", "correlation"])
    writer.writerows([sets[0].name(p.first), sets[-1].name(p.second), p.bits, f"{p.correlation:.3f}"] for p in pairs)
    write_atomically(folder / "pairs.csv", text.getvalue().encode(errors="surrogateescape"))
    write_atomically(folder / "sheet.png", contact_sheet(prints[0], prints[-1], pairs))


def contact_sheet(a: Prints, b: Prints, pairs: list[Pair], most: int = 60) -> bytes:
    """A PNG of the first pairs, side by side, as the grey copies they were compared by."""
    from PIL import Image

    columns, edge = 5, 8
    shown = pairs[:most]
    width, height = 2 * SIDE + edge, SIDE + edge
    sheet = Image.new("L", (columns * width + edge, max(-(-len(shown) // columns), 1) * height + edge), 255)
    for k, pair in enumerate(shown):
        x, y = edge + k % columns * width, edge + k // columns * height
        sheet.paste(Image.fromarray(a.grey[pair.first]), (x, y))
        sheet.paste(Image.fromarray(b.grey[pair.second]), (x + SIDE, y))
    out = io.BytesIO()
    sheet.resize((2 * sheet.width, 2 * sheet.height)).save(out, "PNG")
    return out.getvalue()

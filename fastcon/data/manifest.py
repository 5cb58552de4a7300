"""Image sources → a manifest: stable ids, places, sizes, content digests, labels, and a reject list.

Indexing decodes every image once (`trust=True` reads headers only), because a header does not show a
truncated scan, and an image that fails later stops a whole decoding pipeline. What cannot be decoded goes
on the reject list with its reason. The result is cached as memory-mapped columns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from fastcon import remote
from fastcon.cores import cores
from fastcon.data import sources as image_sources
from fastcon.data.datasets import has_scheme
from fastcon.errors import FastconError, one_line
from fastcon.files import cache_folder, derived

FORMATS = {"JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF"}
"""Formats that both decoders read alike (MPO: the JPEG of a camera); any other is rejected by name."""
TIFF_MODES = {"L", "RGB", "RGBA", "CMYK"}
LARGEST_SIDE = 20_000
LARGEST_AREA = 100_000_000
CACHE_VERSION = 2
_COLUMNS = (
    "ids",
    "containers",
    "offsets",
    "sizes",
    "widths",
    "heights",
    "digests",
    "checksums",
    "names",
    "name_ends",
    "labels",
    "multi_hot",
)


class Share(NamedTuple):
    """Some of the images: those whose id leaves the remainder `number` when divided by `parts`, or those of every so many-th tar."""

    number: int
    parts: int
    by: str = "image"
    """"image" or "tar"."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """n images in a fixed order. Columns are arrays of n entries, mapped from disk where they were cached."""

    ids: NDArray[np.uint64]
    """Hash of each image's name relative to its source: a moved folder is the same data set."""
    containers: NDArray[np.int32]
    """Index into `places` of the folder or tar that holds the image."""
    offsets: NDArray[np.int64]
    """Where its bytes begin in a tar; -1: it is a file of its own."""
    sizes: NDArray[np.int64]
    widths: NDArray[np.int32]
    heights: NDArray[np.int32]
    digests: NDArray[np.uint8]
    """[n, 16]: the first half of the SHA-256 of the bytes: what the image is."""
    checksums: NDArray[np.uint32]
    """CRC-32C of the bytes: what every read is checked against, in a tenth of the time."""
    names: NDArray[np.uint8]
    name_ends: NDArray[np.int64]
    labels: NDArray[np.int32]
    """Class index, -1 without; of multi-label sources all -1."""
    multi_hot: NDArray[np.uint8]
    """[n, classes] for multi-label sources, else [n, 0]."""
    places: list[str]
    classes: list[str]
    rejects: list[tuple[str, str]]
    """(name, reason) of what could not be decoded."""
    sources: list[str]
    share: Share | None = None
    """Which of the images of its sources it holds; None: all."""

    side = None  # images differ in size: see decode.Images

    def __len__(self) -> int:
        return len(self.ids)

    def reader(self) -> ImageReader:
        """What reads the images' bytes."""
        return ImageReader(self)

    def name(self, index: int) -> str:
        """The image's name relative to its source (tar members: SHARD/MEMBER)."""
        start = self.name_ends[index - 1] if index else 0
        return os.fsdecode(self.names[start : self.name_ends[index]].tobytes())

    def areas(self, indices: NDArray[np.integer]) -> NDArray[np.int64]:
        """Pixels that some of the images have."""
        return self.widths[indices].astype(np.int64) * self.heights[indices]

    def labels_of(self, indices: NDArray[np.integer]) -> NDArray[np.int64]:
        """Class indices of some images, -1 without."""
        return self.labels[indices].astype(np.int64)

    @property
    def has_labels(self) -> bool:
        """Whether any image has one class."""
        return bool((self.labels >= 0).any())

    @property
    def all_labelled(self) -> bool:
        """Whether every image has one class."""
        return bool((self.labels >= 0).all())

    @property
    def digest(self) -> str:
        """SHA-256 over ids and content digests in order: equal for the same images, wherever they lie."""
        hasher = hashlib.sha256(np.ascontiguousarray(self.ids).data)
        hasher.update(np.ascontiguousarray(self.digests).data)
        return hasher.hexdigest()

    def select(self, keep: NDArray[np.intp]) -> Manifest:
        """The manifest of some of the images, in the given order."""
        ends, starts = self.name_ends[keep], np.where(keep > 0, self.name_ends[keep - 1], 0)
        names = [self.names[a:b] for a, b in zip(starts, ends, strict=True)]
        changed = {c: getattr(self, c)[keep] for c in _COLUMNS if c not in ("names", "name_ends")}
        changed["names"] = np.concatenate(names) if names else self.names[:0]
        changed["name_ends"] = np.cumsum(ends - starts)
        return dataclasses.replace(self, **changed)


class ImageReader:
    """Reads the encoded bytes of images and checks each against its recorded checksum."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._files: dict[int, int] = {}
        self._versions: dict[int, str] = {}
        self._opening = threading.Lock()
        self._threads = cores()
        self._pool = ThreadPoolExecutor(self._threads)

    def read(self, indices: Sequence[int]) -> list[NDArray[np.uint8]]:
        """The bytes of some images, [size] each. Raises FastconError naming the first that differs."""
        share = max(-(-len(indices) // self._threads), 1)
        parts = [indices[start : start + share] for start in range(0, len(indices), share)]
        return list(itertools.chain.from_iterable(self._pool.map(self._some, parts)))

    def _some(self, indices: Sequence[int]) -> list[NDArray[np.uint8]]:
        return [self._checked(index) for index in indices]

    def _checked(self, index: int) -> NDArray[np.uint8]:
        manifest = self.manifest
        try:
            data = self._bytes(index)
        except OSError as error:
            raise FastconError(
                f"image {manifest.name(index)!r} of {manifest.places[manifest.containers[index]]} cannot "
                f"be read ({error.strerror}): put it back, or index the images anew"
            ) from error
        if google_crc32c.value(data) != manifest.checksums[index]:
            raise FastconError(
                f"image {manifest.name(index)!r} of {manifest.places[manifest.containers[index]]} changed "
                f"since it was indexed ({manifest.sizes[index]} bytes then, {len(data)} now or other "
                "content): restore it, or start from the new images with a new store"
            )
        return np.frombuffer(data, dtype=np.uint8)

    def _bytes(self, index: int) -> bytes:
        manifest = self.manifest
        container, offset = int(manifest.containers[index]), int(manifest.offsets[index])
        if offset < 0:
            with open(os.path.join(manifest.places[container], manifest.name(index)), "rb") as file:
                return file.read()
        if remote.is_url(manifest.places[container]):
            return self._fetched(container, int(manifest.sizes[index]), offset)
        with self._opening:
            if container not in self._files:
                self._files[container] = os.open(manifest.places[container], os.O_RDONLY)
        return os.pread(self._files[container], int(manifest.sizes[index]), offset)

    def _fetched(self, container: int, size: int, offset: int) -> bytes:
        """Of a tar in object storage: not kept open, so that copies can go which no longer fit."""
        place = self.manifest.places[container]
        if container not in self._versions:
            self._versions[container] = remote.version(place)
        descriptor = remote.opened(place, self._versions[container])
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Close the tar files and end the threads."""
        self._pool.shutdown()
        while self._files:
            os.close(self._files.popitem()[1])


def index(
    sources: Sequence[str],
    *,
    trust: bool = False,
    strict: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Index image sources, or load the cached index where nothing was touched since.

    trust: read headers only. strict: any reject is an error. progress is called with (done, total).
    Raises FastconError where a source is missing or nothing in it can be decoded.
    """
    return ImageSet(sources, trust=trust, strict=strict, progress=progress).manifest()


class ImageSet:
    """Image sources to be indexed: all at once, or share by share, so that P processes do a P-th of the work each."""

    def __init__(
        self,
        sources: Sequence[str],
        *,
        trust: bool = False,
        strict: bool = False,
        progress: Callable[[int, int], None] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """As `index`; say gets a note of what was left out. Raises FastconError where a source is missing."""
        self._given = [os.fspath(source) for source in sources]
        self.sources = [_absolute(source) for source in self._given]
        self._trust, self._strict, self._progress, self._say = trust, strict, progress, say
        self._stamp = image_sources.stamp(self.sources)
        self._listed: Manifest | None = None

    def manifest(self, share: Share | None = None) -> Manifest:
        """The manifest of all images, or of a share of them. Raises FastconError where there is no usable image."""
        part = f"-{share.number}of{share.parts}-{share.by}" if share else ""
        folder = cache_folder("manifests") / f"v{CACHE_VERSION}-{int(self._trust)}-{self._stamp}{part}"
        manifest = _load(folder) if folder.exists() else None
        if manifest is None:
            made = manifest = self._index(share)
            with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
                shutil.rmtree(folder, ignore_errors=True)  # an entry that could not be loaded
                derived(folder, lambda partial: _save(made, partial))
        self._check(manifest, share)
        return dataclasses.replace(manifest, share=share)

    @property
    def by(self) -> str:
        """How the images are shared among parts: by tar where that spares fetching the others."""
        return "tar" if all(map(remote.is_url, self.sources)) else "image"

    def _index(self, share: Share | None) -> Manifest:
        if share and share.by == "tar":
            tars = image_sources.tars(self.sources)
            if share.parts > len(tars):
                raise FastconError(
                    f"{len(tars)} tars cannot be shared among {share.parts} parts, one at least each: choose fewer `parts`"
                )
            return self._looked_at(_listed(tars[share.number :: share.parts]))
        if self._listed is None:
            self._listed = _listed(self.sources)
        listed = self._listed
        if share is None:
            self._listed = None  # it is examined in place
        else:
            here = np.flatnonzero(listed.ids % np.uint64(share.parts) == share.number)
            listed = dataclasses.replace(listed.select(here), rejects=listed.rejects if share.number == 0 else [])
        return self._looked_at(listed)

    def _looked_at(self, listed: Manifest) -> Manifest:
        of_places = np.bincount(listed.containers, listed.sizes, len(listed.places))
        fetched = sum(size for size, place in zip(of_places, listed.places, strict=True) if remote.is_url(place))
        if fetched > remote.kept():
            self._say(
                f"warning: these images have {fetched / 1e9:.1f} GB, and {remote.kept() / 1e9:g} GB of what lies in object storage are "
                "kept here, so that much will be fetched again and again: set $FASTCON_CACHE_GB higher, or make more `parts`"
            )
        return dataclasses.replace(_examined(listed, self._trust, self._progress), sources=self.sources)

    def _check(self, manifest: Manifest, share: Share | None) -> None:
        rejects = manifest.rejects
        first = f"first {rejects[0][0]!r}: {rejects[0][1]}" if rejects else ""
        if self._strict and rejects:
            name, reason = rejects[0]
            raise FastconError(
                f"{len(rejects)} of {len(manifest) + len(rejects)} images cannot be used, "
                f"first {name!r} ({reason}): remove them, or leave out `strict`"
            )
        if not len(manifest):
            where = f"share {share.number} of {share.parts} of " if share else ""
            more = f"{len(rejects)} rejected" + (f", {first}" if first else "")
            way = ": choose fewer `parts`" if share and not rejects else ""
            raise FastconError(f"no readable image in {where}{', '.join(self._given)} ({more}){way}")
        if rejects:
            self._say(f"{len(rejects)} images left out, {first} (`strict` refuses them)")


def _absolute(source: str) -> str:
    return source if has_scheme(source) or remote.is_url(source) else os.path.abspath(os.path.expanduser(source))


def _listed(sources: list[str]) -> Manifest:
    """All images of some sources, none of them looked at yet."""
    listing = image_sources.read(sources)
    n = len(listing.size)
    label_ends = np.array(listing.label_ends, dtype=np.int64)
    raw = Manifest(
        ids=np.empty(0, np.uint64),
        containers=np.array(listing.container, dtype=np.int32),
        offsets=np.array(listing.offset, dtype=np.int64),
        sizes=np.array(listing.size, dtype=np.int64),
        widths=np.zeros(n, np.int32),
        heights=np.zeros(n, np.int32),
        digests=np.zeros((n, 16), np.uint8),
        checksums=np.zeros(n, np.uint32),
        names=np.frombuffer(bytes(listing.names), dtype=np.uint8),
        name_ends=np.array(listing.name_ends, dtype=np.int64),
        labels=np.empty(0, np.int32),
        multi_hot=np.empty((0, 0), np.uint8),
        places=listing.containers,
        classes=listing.classes,
        rejects=list(listing.skipped),
        sources=sources,
    )
    labels, multi_hot = _labels(listing, label_ends, n)
    return dataclasses.replace(raw, ids=_ids(raw), labels=labels, multi_hot=multi_hot)


def _examined(raw: Manifest, trust: bool, progress: Callable[[int, int], None] | None) -> Manifest:
    """The images that can be used, with their sizes and digests; the others are put on the reject list."""
    n = len(raw)
    keep = np.ones(n, dtype=bool)
    for done, (position, outcome) in enumerate(_outcomes(raw, trust), 1):
        if isinstance(outcome, str):
            keep[position] = False
            raw.rejects.append((raw.name(position), outcome))
        else:
            raw.widths[position], raw.heights[position], raw.checksums[position], digest = outcome
            raw.digests[position] = np.frombuffer(digest, dtype=np.uint8)
        if progress and (done % 256 == 0 or done == n):
            progress(done, n)
    return raw if keep.all() else raw.select(np.flatnonzero(keep))


def _labels(listing: image_sources.Listing, ends: NDArray[np.int64], n: int) -> tuple[NDArray, NDArray]:
    counts = np.diff(ends, prepend=0)
    flat = np.array(listing.labels, dtype=np.int32)
    labels = np.full(n, -1, dtype=np.int32)
    if not listing.multi_label:
        labels[counts == 1] = flat
        return labels, np.zeros((n, 0), dtype=np.uint8)
    multi_hot = np.zeros((n, len(listing.classes)), dtype=np.uint8)
    multi_hot[np.repeat(np.arange(n), counts), flat] = 1
    return labels, multi_hot


def _ids(manifest: Manifest) -> NDArray[np.uint64]:
    """64-bit hashes of the names; a name that comes again in a later source is hashed with its occurrence."""
    n = len(manifest.name_ends)
    ids = np.empty(n, dtype=np.uint64)
    names = manifest.names.tobytes()
    start = 0
    for i, end in enumerate(manifest.name_ends):
        ids[i] = int.from_bytes(hashlib.blake2b(names[start:end], digest_size=8).digest(), "little")
        start = end
    occurrence = 1
    again = _repeats(ids)
    while len(again):
        for i in again:
            name = os.fsencode(manifest.name(i)) + f"\0{occurrence}".encode()
            ids[i] = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
        occurrence += 1
        again = _repeats(ids)
    return ids


def _repeats(ids: NDArray[np.uint64]) -> NDArray[np.intp]:
    """Positions whose id occurred before."""
    by_id = np.argsort(ids, kind="stable")
    return np.sort(by_id[1:][ids[by_id][1:] == ids[by_id][:-1]])


_Found = tuple[int, int, int, bytes]
"""Width, height, checksum and digest of an image."""


def _outcomes(manifest: Manifest, trust: bool) -> Iterator[tuple[int, _Found | str]]:
    """(position, what it is or the reason for rejecting it), in order, decoded in parallel."""
    reader = ImageReader(manifest)
    block = 32

    def examine_block(start: int) -> list[_Found | str]:
        return [_examine(reader, i, trust) for i in range(start, min(start + block, len(manifest.sizes)))]

    with ThreadPoolExecutor(cores()) as pool:
        starts = range(0, len(manifest.sizes), block)
        for start, outcomes in zip(starts, pool.map(examine_block, starts), strict=True):
            yield from enumerate(outcomes, start)
    reader.close()


def _examine(reader: ImageReader, index: int, trust: bool) -> _Found | str:
    from PIL import Image

    try:
        data = reader._bytes(index)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not data:
        return "empty file"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a bomb warning comes before our own limit, which follows
            image = Image.open(io.BytesIO(data))
            width, height = image.size
            if image.format not in FORMATS:
                return f"{image.format} is not read (use {', '.join(sorted(FORMATS))})"
            if image.format == "TIFF" and (image.mode not in TIFF_MODES or image.getexif().get(0x0112, 1) != 1):
                return f"a TIFF of mode {image.mode} or turned by its tags, which decoders read differently"
            if min(width, height) < 1 or max(width, height) > LARGEST_SIDE or width * height > LARGEST_AREA:
                return f"absurd dimensions {width} x {height}"
            if not trust:
                image.draft("RGB", (max(width // 8, 1), max(height // 8, 1)))  # the whole scan at an eighth of the work
                image.load()
    except Exception as error:
        return f"cannot be decoded: {one_line(error, 200).replace('_io.BytesIO object at', '').strip()}"
    return width, height, google_crc32c.value(data), hashlib.sha256(data).digest()[:16]


def _save(manifest: Manifest, folder: Path) -> None:
    folder.mkdir()
    for column in _COLUMNS:
        np.save(folder / f"{column}.npy", getattr(manifest, column))
    rest = {key: getattr(manifest, key) for key in ("places", "classes", "rejects", "sources")}
    (folder / "manifest.json").write_text(json.dumps(rest))


def _load(folder: Path) -> Manifest | None:
    try:
        rest = json.loads((folder / "manifest.json").read_text())
        rest["rejects"] = [(name, reason) for name, reason in rest["rejects"]]
        columns = {column: np.load(folder / f"{column}.npy", mmap_mode="r") for column in _COLUMNS}
        return Manifest(**columns, **rest)
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None

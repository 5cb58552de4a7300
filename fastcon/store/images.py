"""The images of a store, where they are now: one manifest, or those of its parts, each opened when it is needed."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fastcon.data.decode import Reader
from fastcon.data.manifest import ImageSet, Manifest
from fastcon.errors import FastconError
from fastcon.store.parts import Binding, StoreOfParts
from fastcon.store.reader import Store, Stored

OPEN = 32
"""Manifests of parts held open; of each only what is read is in memory."""


class PartImages:
    """The images of a store's parts, one part after another, as `data.decode.Images`."""

    side = None  # they differ in size

    def __init__(self, store: StoreOfParts, sets: list[ImageSet]) -> None:
        """sets: where the images of each of the store's sets are."""
        self._store, self._sets = store, sets
        self._starts = store.chunking.part_starts
        self._parts: OrderedDict[int, Manifest] = OrderedDict()
        self._opening = threading.Lock()

    def part(self, number: int) -> Manifest:
        """The images of a part. Raises FastconError where they are not those that the part was made from."""
        with self._opening:
            if number not in self._parts:
                if len(self._parts) >= OPEN:
                    self._parts.popitem(last=False)
                which, _ = self._store.binding.share(number)
                self._parts[number] = manifest_of(self._store.part(number), self._sets[which])
            self._parts.move_to_end(number)
            return self._parts[number]

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def classes(self) -> list[str]:
        """Names of the classes, the same in every part where there are labels."""
        return self.part(0).classes

    def name(self, index: int) -> str:
        """The image's name relative to its source."""
        part = self._part_of(index)
        return self.part(part).name(index - int(self._starts[part]))

    def areas(self, indices: NDArray[np.integer]) -> NDArray[np.int64]:
        """Pixels that some of the images have."""
        return self._gathered(indices, Manifest.areas, np.int64)

    def labels_of(self, indices: NDArray[np.integer]) -> NDArray[np.int64]:
        """Class indices of some images, -1 without."""
        return self._gathered(indices, Manifest.labels_of, np.int64)

    @property
    def has_labels(self) -> bool:
        """Whether images have a class: those of each set's first part tell, or of each part where tars are shared. Where classes
        differ there are none in common.
        """
        binding = self._store.binding
        numbers = [
            binding.numbers(k) if each.by == "tar" else binding.numbers(k)[:1] for k, each in enumerate(binding.sets)
        ]
        firsts = [self.part(number) for some in numbers for number in some]
        return firsts[0].has_labels and all(first.classes == firsts[0].classes for first in firsts)

    @property
    def all_labelled(self) -> bool:
        """Whether every image has one class."""
        return self.has_labels and all(self.part(number).all_labelled for number in range(len(self._starts) - 1))

    def reader(self) -> Reader:
        """What reads the images' bytes."""
        return _Reader(self)

    def _part_of(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, "right")) - 1

    def _gathered(
        self, indices: NDArray[np.integer], get: Callable[[Manifest, NDArray], NDArray], dtype: type
    ) -> NDArray:
        out: NDArray = np.empty(len(indices), dtype=dtype)
        parts = self._store.chunking.parts_of(indices)
        for number in np.unique(parts):
            here = parts == number
            out[here] = get(self.part(int(number)), indices[here] - self._starts[number])
        return out


class _Reader:
    """Reads images of several parts."""

    def __init__(self, images: PartImages) -> None:
        self._images = images
        self._readers: OrderedDict[int, Reader] = OrderedDict()

    def read(self, indices: Sequence[int]) -> list[NDArray[np.uint8]]:
        """The bytes of some images."""
        wanted = np.asarray(indices, dtype=np.int64)
        parts, starts = self._images._store.chunking.parts_of(wanted), self._images._starts
        out: list[NDArray[np.uint8]] = [np.empty(0, np.uint8)] * len(wanted)
        for number in np.unique(parts).tolist():
            here = np.flatnonzero(parts == number)
            data = self._part(number).read((wanted[here] - starts[number]).tolist())
            for place, item in zip(here.tolist(), data, strict=True):
                out[place] = item
        return out

    def _part(self, number: int) -> Reader:
        if number not in self._readers:
            if len(self._readers) >= OPEN:
                self._readers.popitem(last=False)[1].close()
            self._readers[number] = self._images.part(number).reader()
        self._readers.move_to_end(number)
        return self._readers[number]

    def close(self) -> None:
        """Close the files."""
        with contextlib.ExitStack() as all_of_them:
            for reader in self._readers.values():
                all_of_them.callback(reader.close)
        self._readers.clear()


Given = Sequence[str] | str | ImageSet | Manifest | PartImages | None
"""Where images are: IMAGES, or already indexed; None: where they were."""


def images_of(
    store: Stored, images: Given = None, index: Callable[[Sequence[str]], ImageSet] = ImageSet
) -> Manifest | PartImages:
    """The images of a store; index: how IMAGES are looked up. Raises FastconError where they are not its images."""
    if isinstance(images, PartImages):
        return images
    if not isinstance(images, Manifest | ImageSet | None):
        images = [images] if isinstance(images, str) else list(images)
    if isinstance(store, StoreOfParts):
        return PartImages(store, image_sets(store.binding, images, index))
    assert isinstance(store, Store)
    if not isinstance(images, Manifest | ImageSet):
        images = index(images or store.sources)
    return manifest_of(store, images)


def image_sets(
    binding: Binding, images: list[str] | ImageSet | Manifest | None, index: Callable[[Sequence[str]], ImageSet]
) -> list[ImageSet]:
    """The sets of a store in parts. Raises FastconError where there are more or fewer IMAGES than it was made from."""
    if isinstance(images, ImageSet) and len(binding.sets) == 1:
        return [images]
    given = binding.sources if images is None else images if isinstance(images, list) else images.sources
    if len(binding.sets) == 1:
        return [index(given)]
    if len(given) != len(binding.sources):
        raise FastconError(
            f"the parts were made from {len(binding.sources)} IMAGES ({', '.join(binding.sources)}), {len(given)} are given: "
            "give where each of them is now, in that order"
        )
    ends = np.cumsum([len(each.sources) for each in binding.sets]).tolist()
    return [index(given[end - len(each.sources) : end]) for each, end in zip(binding.sets, ends, strict=True)]


def manifest_of(store: Store, images: ImageSet | Manifest) -> Manifest:
    """The manifest of one store, or one part. Raises FastconError where these are not its images."""
    manifest = images if isinstance(images, Manifest) else images.manifest(store.record.images.share)
    store.check_images(manifest)
    return manifest

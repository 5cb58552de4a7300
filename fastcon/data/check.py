"""Is a copy of a published data set whole? Listed and counted, never decoded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from urllib.parse import quote

import numpy as np

from fastcon.data import sources
from fastcon.data.datasets import dataset
from fastcon.errors import FastconError


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a data set: what lies there, and what was published."""

    name: str
    images: int
    published: int
    classes: int
    published_classes: int
    per_class: tuple[int, int]
    """Images of the smallest and of the largest class."""
    published_per_class: int | None
    """None: classes have different numbers of images."""
    missing: tuple[str, ...]
    """Listed images that are not there."""

    @property
    def faults(self) -> list[str]:
        """What is not as published."""
        faults = []
        if self.images != self.published:
            faults.append(f"{self.images:,} of {self.published:,} images")
        if self.classes != self.published_classes:
            faults.append(f"{self.classes:,} of {self.published_classes:,} classes")
        low, high = self.per_class
        if self.published_per_class is not None and (low, high) != (self.published_per_class,) * 2:
            faults.append(f"{low:,} to {high:,} images per class instead of {self.published_per_class:,}")
        if self.missing:
            faults.append(f"{len(self.missing):,} listed but missing, first {self.missing[0]}")
        return faults


def check(name: str, root: str) -> tuple[list[Part], dict[str, str]]:
    """The parts of a data set under a root, and why others cannot be read. Raises FastconError for an unknown name."""
    published, parts, absent = dataset(name), [], {}
    for part in published.parts:
        source = f"data:{name}?root={quote(str(Path(root).expanduser().absolute()))}&part={part}"
        try:
            listing = sources.read([source])
        except FastconError as error:
            absent[part] = str(error)
            continue
        counts = np.bincount(np.asarray(listing.labels, np.int64), minlength=max(1, len(listing.classes)))
        parts.append(
            Part(
                part,
                len(listing.size),
                published.parts[part],
                len(listing.classes),
                published.classes,
                (int(counts.min()), int(counts.max())),
                published.per_class.get(part),
                tuple(skipped for skipped, _ in listing.skipped),
            )
        )
    return parts, absent

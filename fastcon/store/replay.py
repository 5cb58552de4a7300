"""Rows of a store → requests to the decoder: crops of the images, or the baked views themselves.

A baked view is a JPEG of recipe.size pixels per side that `bake` wrote into a shard of the store; it is decoded whole.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fastcon.data.decode import Images, Reader, Request
from fastcon.data.manifest import Manifest
from fastcon.errors import FastconError
from fastcon.store.format import View
from fastcon.store.images import PartImages
from fastcon.store.reader import Stored


class Replay:
    """The views of a store for `data.decode`: `images` to decode from, and the request for any rows.

    A store with baked views needs no manifest; raises FastconError where one is needed. keep: shards held open, twice
    the lanes of a loader.
    """

    def __init__(self, store: Stored, images: Manifest | PartImages | None, keep: int = 16) -> None:
        self._store = store
        self._starts = store.chunking.part_starts
        self._keep = keep if len(self._starts) > 2 else 1
        self._views: OrderedDict[tuple[int, int], View] = OrderedDict()
        if store.recipe.bake is not None:
            self.images: Images = BakedViews(store, keep)
        elif images is None:
            raise FastconError(f"{store.path} has no baked views: give the images that it was made from")
        else:
            self.images = images

    def view(self, number: int, part: int = 0) -> View:
        """Order, boxes and flips of a view of a part; the last ones requested are kept."""
        if (part, number) not in self._views:
            while len(self._views) >= self._keep:  # free its memory before the next one takes some
                self._views.popitem(last=False)
            self._views[part, number] = self._store.part(part).view(number)
        self._views.move_to_end((part, number))
        return self._views[part, number]

    def indices(self, number: int, rows: NDArray[np.integer]) -> NDArray[np.int64]:
        """Which image each row of a view is [B]."""
        return np.concatenate([view.order[inside] + start for view, inside, start in self._by_part(number, rows)])

    def request(self, number: int, rows: NDArray[np.integer] | slice) -> Request:
        """What to decode for some rows of a view."""
        if isinstance(rows, slice):
            rows = np.arange(rows.start, rows.stop)
        if self._store.recipe.bake is not None:
            return Request.whole(number * self._store.rows + rows.astype(np.int64), self._store.recipe.size)
        pieces = [
            Request(view.order[inside] + start, view.boxes[inside], view.flips[inside])
            for view, inside, start in self._by_part(number, rows)
        ]
        return pieces[0] if len(pieces) == 1 else Request.joined(pieces)

    def _by_part(self, number: int, rows: NDArray[np.integer]) -> Iterator[tuple[View, NDArray[np.integer], np.int64]]:
        """Rows of a view by runs of one part each: that part's view, the rows in it, and where its images begin."""
        if len(self._starts) == 2:
            yield self.view(number), rows, self._starts[0]
            return
        parts = self._store.chunking.parts_of(rows)
        for a, b in itertools.pairwise([0, *(np.flatnonzero(np.diff(parts)) + 1).tolist(), len(rows)]):
            part = int(parts[a])
            yield self.view(number, part), rows[a:b] - self._starts[part], self._starts[part]


class BakedViews:
    """The shards of a store as images: index view * rows + row is the baked view of that row."""

    def __init__(self, store: Stored, keep: int) -> None:
        self.store, self._keep = store, keep
        self.side: int | None = store.recipe.size

    def name(self, index: int) -> str:
        """Where a baked view lies."""
        view, row = divmod(index, self.store.rows)
        return f"baked view {view}, row {row}"

    def areas(self, indices: NDArray[np.integer]) -> NDArray[np.int64]:
        """Pixels of each."""
        return np.full(len(indices), self.store.recipe.size**2, dtype=np.int64)

    def reader(self) -> Reader:
        """Reads their bytes, checked against the store's record."""
        return _ShardReader(self.store, self._keep)


class _ShardReader:
    """The last few shards, mapped into memory: every lane of a loader is inside one."""

    def __init__(self, store: Stored, keep: int) -> None:
        self._store, self._keep = store, keep
        self._shards: OrderedDict[tuple[int, int], list[NDArray[np.uint8]]] = OrderedDict()

    def read(self, indices: Sequence[int]) -> list[NDArray[np.uint8]]:
        """The encoded bytes of baked views."""
        views, rows = np.divmod(np.asarray(indices), self._store.rows)
        chunks, inside = self._store.chunking.locate(rows)
        places = zip(views.tolist(), chunks.tolist(), inside.tolist(), strict=True)
        return [self._shard(view, chunk)[k] for view, chunk, k in places]

    def _shard(self, view: int, chunk: int) -> list[NDArray[np.uint8]]:
        key = (view, chunk)
        if key not in self._shards:
            self._shards[key] = self._store.shard(view, chunk)
            if len(self._shards) > self._keep:
                self._shards.popitem(last=False)
        self._shards.move_to_end(key)
        return self._shards[key]

    def close(self) -> None:
        """Unmap the shards."""
        self._shards.clear()

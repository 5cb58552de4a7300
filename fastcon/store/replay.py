"""Rows of a store → requests to the decoder: crops of the images, or the baked views themselves.

A baked view is a JPEG of recipe.size pixels per side that `bake` wrote into a shard of the store; it is decoded whole.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastcon.data.decode import Images, Reader, Request
from fastcon.data.manifest import Manifest
from fastcon.errors import FastconError
from fastcon.store.format import View
from fastcon.store.reader import Store


class Replay:
    """The views of a store for `data.decode`: `images` to decode from, and the request for any rows.

    A store with baked views needs no manifest; raises FastconError where one is needed. keep: shards held open, twice
    the lanes of a loader.
    """

    def __init__(self, store: Store, manifest: Manifest | None, keep: int = 16) -> None:
        self._store, self._number = store, -1
        self._view: View | None = None
        if store.recipe.bake is not None:
            self.images: Images = BakedViews(store, keep)
        elif manifest is None:
            raise FastconError(f"{store.path} has no baked views: give the images that it was made from")
        else:
            self.images = manifest

    def view(self, number: int) -> View:
        """Order, boxes and flips of a view; the last one requested is kept."""
        if self._view is None or self._number != number:
            self._view = None  # free its memory before the next one takes some
            self._number, self._view = number, self._store.view(number)
        return self._view

    def request(self, number: int, rows: NDArray[np.integer] | slice) -> Request:
        """What to decode for some rows of a view."""
        if self._store.recipe.bake is not None:
            rows = np.arange(self._store.rows)[rows] if isinstance(rows, slice) else rows.astype(np.int64)
            return Request.whole(number * self._store.rows + rows, self._store.recipe.size)
        view = self.view(number)
        return Request(view.order[rows], view.boxes[rows], view.flips[rows])


class BakedViews:
    """The shards of a store as images: index view * rows + row is the baked view of that row."""

    def __init__(self, store: Store, keep: int) -> None:
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

    def __init__(self, store: Store, keep: int) -> None:
        self._store, self._keep = store, keep
        self._shards: OrderedDict[tuple[int, int], list[NDArray[np.uint8]]] = OrderedDict()

    def read(self, indices: Sequence[int]) -> list[NDArray[np.uint8]]:
        """The encoded bytes of baked views."""
        views, rows = np.divmod(np.asarray(indices), self._store.rows)
        chunks, inside = np.divmod(rows, self._store.recipe.chunk_rows)
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

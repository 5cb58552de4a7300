"""Which rows each global batch takes: a pure function of (seed, epoch, batch size, lanes)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fastcon.data import views
from fastcon.errors import FastconError
from fastcon.store.chunks import Chunks

Rows = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which rows each global batch of an epoch takes.

    Epoch e reads view e mod V. Its rows are cut into `lanes` equal runs; a batch takes the next B / lanes rows of every
    lane. The n mod B rows left over are left out of that epoch. In the first round of seed 0 rows come as they lie on
    disk, else shuffled by (seed, epoch): parts, the chunks of each, and the rows inside those. Nothing is kept but the
    order of the chunks and, for each lane, the rows of one of them.
    """

    rows: int
    views: int
    chunk_rows: int
    batch_size: int
    lanes: int
    seed: int
    parts: tuple[int, ...] = ()
    """Rows of each part of the store (default: one part of all)."""

    def __post_init__(self) -> None:
        if self.batch_size > self.rows:
            raise FastconError(
                f"a batch of {self.batch_size} needs as many images, the store has {self.rows}: use a "
                f"`batch_size` of at most {self.rows}"
            )
        if self.batch_size % self.lanes:
            raise FastconError(f"{self.lanes} lanes do not divide a batch of {self.batch_size}")

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return self.rows // self.batch_size

    @property
    def left_out(self) -> int:
        """Rows of an epoch that are in no batch."""
        return self.rows % self.batch_size

    def batches(self, epoch: int, skip: int = 0, lanes: range | None = None) -> Iterator[Rows]:
        """Rows of every batch of an epoch [B] but the first `skip`; row ids are those of view `epoch mod views`.

        lanes: of these alone, the share of a rank: [B / all lanes * those].
        """
        share = self.batch_size // self.lanes
        run = self.steps * share
        order = _Order(self, epoch)
        mine = range(self.lanes) if lanes is None else lanes
        pieces = [_pieces(order.rows(lane * run + skip * share, (lane + 1) * run), share) for lane in mine]
        for rows in zip(*pieces, strict=True):
            yield np.concatenate(rows)

    def epoch(self, epoch: int) -> Rows:
        """Rows of all batches of an epoch: [steps, B]."""
        return np.stack(list(self.batches(epoch)))

    @functools.cached_property
    def chunks(self) -> Chunks:
        """How the rows are divided."""
        return Chunks(self.parts or (self.rows,), self.chunk_rows)

    def on_disk(self, epoch: int) -> bool:
        """Whether the rows of an epoch come as they lie on disk."""
        return epoch < self.views and self.seed == 0


class _Order:
    """The rows of an epoch, one after another."""

    def __init__(self, schedule: Schedule, epoch: int) -> None:
        self._seed, self._epoch, self._on_disk = schedule.seed, epoch, schedule.on_disk(epoch)
        part_of, self._starts, self._stops = schedule.chunks.all()
        if not self._on_disk:
            parts = np.arange(part_of[-1] + 1, dtype=np.uint64)
            place = np.empty(len(parts), dtype=np.int64)
            place[views.permutation(schedule.seed, parts, epoch, views.EPOCH_PARTS)] = np.arange(len(parts))
            keys = views.keys(schedule.seed, np.arange(len(part_of), dtype=np.uint64), epoch, views.EPOCH_CHUNKS)
            order = np.lexsort((keys, place[part_of]))
            self._starts, self._stops = self._starts[order], self._stops[order]
        self._ends = np.cumsum(self._stops - self._starts)

    def rows(self, begin: int, end: int) -> Iterator[Rows]:
        """The rows at places `begin` to `end` of the epoch, chunk by chunk."""
        number = int(np.searchsorted(self._ends, begin, "right"))
        while begin < end:
            rows, first = self._chunk(number), int(self._ends[number - 1]) if number else 0
            yield rows[begin - first : end - first]
            begin, number = int(self._ends[number]), number + 1

    def _chunk(self, number: int) -> Rows:
        rows = np.arange(self._starts[number], self._stops[number])
        if self._on_disk:
            return rows
        keys = views.keys(self._seed, rows.astype(np.uint64), self._epoch, views.EPOCH_ROWS)
        return rows[np.argsort(keys, kind="stable")]


def _pieces(arrays: Iterator[Rows], size: int) -> Iterator[Rows]:
    """Arrays, one after another, cut into pieces of `size`."""
    rest = np.empty(0, dtype=np.int64)
    for array in arrays:
        at = 0
        if len(rest):
            at = min(size - len(rest), len(array))
            rest = np.concatenate([rest, array[:at]])
            if len(rest) < size:
                continue
            yield rest
        whole = at + (len(array) - at) // size * size
        for start in range(at, whole, size):
            yield array[start : start + size]
        rest = array[whole:]


def default_lanes(batch_size: int) -> int:
    """The largest of 8, 4, 2, 1 that divides the batch."""
    return next(lanes for lanes in (8, 4, 2, 1) if batch_size % lanes == 0)

"""How the rows of a view are divided: into parts, and the rows of each part into chunks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


class Chunks:
    """Rows of consecutive parts, each cut into chunks of `chunk_rows`; the last chunk of a part may be shorter."""

    def __init__(self, parts: Sequence[int], chunk_rows: int) -> None:
        """parts: the rows of each."""
        rows = np.asarray(parts, dtype=np.int64)
        self.chunk_rows = chunk_rows
        self.part_starts: Indices = np.concatenate([[0], np.cumsum(rows)])
        """The first row of each part, and the number of all rows [P + 1]."""
        self.first_chunks: Indices = np.concatenate([[0], np.cumsum(-(-rows // chunk_rows))])
        """The first chunk of each part, and the number of all chunks [P + 1]."""

    @property
    def rows(self) -> int:
        """All rows."""
        return int(self.part_starts[-1])

    def __len__(self) -> int:
        return int(self.first_chunks[-1])

    def span(self, chunk: int) -> tuple[int, int]:
        """First row and one past the last row of a chunk."""
        part, inside = self.place(chunk)
        start = int(self.part_starts[part]) + inside * self.chunk_rows
        return start, min(start + self.chunk_rows, int(self.part_starts[part + 1]))

    def place(self, chunk: int) -> tuple[int, int]:
        """The part of a chunk, and its number there."""
        part = int(np.searchsorted(self.first_chunks, chunk, "right")) - 1
        return part, chunk - int(self.first_chunks[part])

    def parts_of(self, rows: NDArray[np.integer]) -> Indices:
        """The part of each row."""
        return np.searchsorted(self.part_starts, rows, "right") - 1

    def locate(self, rows: NDArray[np.integer]) -> tuple[Indices, Indices]:
        """The chunk of each row, and its place there."""
        if len(self.part_starts) == 2:
            chunk, inside = np.divmod(rows, self.chunk_rows)
            return chunk, inside
        part = self.parts_of(rows)
        chunk, inside = np.divmod(rows - self.part_starts[part], self.chunk_rows)
        return chunk + self.first_chunks[part], inside

    def all(self) -> tuple[Indices, Indices, Indices]:
        """Of every chunk: its part, its first row and one past its last."""
        counts = np.diff(self.first_chunks)
        part = np.repeat(np.arange(len(counts)), counts)
        starts = self.part_starts[part] + (np.arange(len(self)) - self.first_chunks[part]) * self.chunk_rows
        return part, starts, np.minimum(starts + self.chunk_rows, self.part_starts[part + 1])

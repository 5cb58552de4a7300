"""Schedules of stores in parts, and the shares of ranks. Those of one part are in test_loader.py."""

from __future__ import annotations

import numpy as np
import pytest

from fastcon.distill.schedule import Schedule
from fastcon.store.chunks import Chunks

PARTS = (37, 100, 5, 64)


def schedule(**changes):
    values = {"rows": sum(PARTS), "views": 2, "chunk_rows": 16, "batch_size": 24, "lanes": 8, "seed": 4, "parts": PARTS}
    return Schedule(**values | changes)


def test_chunks_do_not_straddle_parts():
    chunks = Chunks(PARTS, 16)
    assert (len(chunks), chunks.rows) == (3 + 7 + 1 + 4, 206)
    spans = [chunks.span(k) for k in range(len(chunks))]
    assert [row for a, b in spans for row in range(a, b)] == list(range(206))
    assert spans[2:4] == [(32, 37), (37, 53)]
    assert [chunks.place(k) for k in (0, 2, 3, 10, 11, 14)] == [(0, 0), (0, 2), (1, 0), (2, 0), (3, 0), (3, 3)]
    rows = np.array([0, 36, 37, 136, 137, 141, 142, 205])
    chunk, inside = chunks.locate(rows)
    assert [spans[c][0] + i for c, i in zip(chunk.tolist(), inside.tolist(), strict=True)] == rows.tolist()
    assert chunks.parts_of(rows).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    part, starts, stops = chunks.all()
    assert list(zip(starts.tolist(), stops.tolist(), strict=True)) == spans
    assert part.tolist() == [0] * 3 + [1] * 7 + [2] + [3] * 4


@pytest.mark.parametrize(("epoch", "seed"), [(0, 0), (1, 0), (2, 0), (0, 4), (5, 4)])
def test_every_row_comes_once_an_epoch(epoch, seed):
    taken = schedule(seed=seed).epoch(epoch)
    assert taken.shape == (8, 24)
    assert len(set(taken.ravel().tolist())) == 192
    assert taken.max() < 206


def test_parts_and_their_chunks_stay_together():
    """An epoch goes through the parts in some order, through the chunks of each, and through the rows of those."""
    later = schedule(batch_size=206, lanes=1)
    orders = set()
    for epoch in range(2, 8):
        rows = later.epoch(epoch)[0]
        parts = later.chunks.parts_of(rows)
        order = parts[np.flatnonzero(np.diff(parts, prepend=-1))].tolist()
        assert sorted(order) == [0, 1, 2, 3]  # each part in one piece
        orders.add(tuple(order))
        chunks = later.chunks.locate(rows)[0]
        assert len(np.flatnonzero(np.diff(chunks))) == len(later.chunks) - 1  # and so each chunk
    assert len(orders) > 2
    first = schedule(batch_size=206, lanes=1, seed=0).epoch(1)[0]
    assert first.tolist() == list(range(206))  # as on disk


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_any_number_of_ranks_trains_on_the_same_batches(ranks):
    whole = list(schedule().batches(3))
    each = 8 // ranks
    shares = [list(schedule().batches(3, lanes=range(r * each, (r + 1) * each))) for r in range(ranks)]
    for step, batch in enumerate(whole):
        assert np.array_equal(np.concatenate([share[step] for share in shares]), batch)


def test_skipping_equals_having_read():
    whole = list(schedule().batches(3))
    for skip in (1, 5, 8):
        rest = list(schedule().batches(3, skip))
        assert len(rest) == 8 - skip
        assert all(np.array_equal(a, b) for a, b in zip(rest, whole[skip:], strict=True))


def test_one_part_is_as_good_as_none():
    for epoch in range(4):
        plain = Schedule(206, 2, 16, 24, 8, 4).epoch(epoch)
        assert np.array_equal(plain, schedule(parts=(206,)).epoch(epoch))

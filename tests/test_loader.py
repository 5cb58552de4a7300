"""The schedule of rows and the loader: what comes out is what the store and the images say."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st

import fastcon
from fastcon.data.manifest import index
from fastcon.distill.loader import Loader
from fastcon.distill.schedule import Schedule, default_lanes
from fastcon.errors import FastconError
from fastcon.store.reader import Store


@given(
    st.integers(1, 400), st.integers(1, 3), st.integers(1, 70), st.integers(1, 48), st.sampled_from([1, 2, 4, 8]),
    st.integers(0, 5),
)  # fmt: skip
def test_each_row_at_most_once_an_epoch_and_all_but_the_tail(rows, views, chunk, share, lanes, epoch):
    batch = share * lanes
    if batch > rows:
        with pytest.raises(FastconError, match="needs as many images"):
            Schedule(rows, views, chunk, batch, lanes, 0)
        return
    schedule = Schedule(rows, views, chunk, batch, lanes, 0)
    taken = schedule.epoch(epoch)
    assert taken.shape == (schedule.steps, batch)
    assert len(set(taken.ravel().tolist())) == taken.size == rows - schedule.left_out
    assert schedule.left_out == rows % batch
    assert np.array_equal(taken, schedule.epoch(epoch))


def test_lanes_are_equal_runs_of_the_epoch():
    schedule = Schedule(rows=101, views=2, chunk_rows=16, batch_size=8, lanes=4, seed=0)
    first = schedule.epoch(0)
    assert first[0].tolist() == [0, 1, 24, 25, 48, 49, 72, 73]
    assert first[1].tolist() == [2, 3, 26, 27, 50, 51, 74, 75]
    assert schedule.steps == 12
    for lane in range(4):  # what a rank that owns this lane reads: one ascending run
        assert first[:, 2 * lane : 2 * lane + 2].ravel().tolist() == list(range(24 * lane, 24 * lane + 24))


def test_later_rounds_shuffle_whole_chunks_and_the_rows_inside():
    schedule = Schedule(rows=100, views=2, chunk_rows=16, batch_size=100, lanes=1, seed=5)
    assert Schedule(100, 2, 16, 100, 1, seed=0).epoch(1)[0].tolist() == list(range(100))  # seed 0 as it lies on disk
    assert schedule.epoch(1)[0].tolist() != list(range(100))  # others from the first round on
    again, later = schedule.epoch(2)[0], schedule.epoch(4)[0]
    assert again.tolist() != later.tolist()
    chunks = again // 16
    changes = np.flatnonzero(np.diff(chunks)) + 1
    assert len(changes) == 6  # seven chunks, each in one piece
    assert sorted(set(chunks[np.r_[0, changes]].tolist())) == list(range(7))
    inside = again[chunks == chunks[0]]
    assert inside.tolist() != sorted(inside.tolist())


def test_known_answer_of_a_later_round():
    schedule = Schedule(rows=12, views=1, chunk_rows=4, batch_size=4, lanes=2, seed=1)
    assert schedule.epoch(3).tolist() == KNOWN


def test_default_lanes():
    assert [default_lanes(b) for b in (32, 12, 6, 7)] == [8, 4, 2, 1]


def test_batches_carry_the_stored_rows(store_path, proxy):
    group = zarr.open_group(str(store_path), mode="r")
    loader = fastcon.Loader(str(store_path), proxy, 24, epochs=4)
    assert len(loader) == 4 * 6
    for k, batch in enumerate(loader):
        epoch, step = divmod(k, 6)
        rows = loader.schedule.epoch(epoch)[step]
        view = epoch % 2
        assert np.array_equal(batch.indices, group["order"][view][rows])
        for name in ("general", "letters"):
            expected = group[f"teachers/{name}/logits"][view][rows]
            assert np.array_equal(batch.logits[name].numpy(), expected)
        assert torch.equal(batch.stacked, torch.cat([batch.logits["general"], batch.logits["letters"]], 1))
        assert batch.pixels.dtype == torch.uint8
        assert batch.pixels.shape == (24, 3, 32, 32)
        assert batch.labels is None


def test_skipping_equals_having_read(store_path, proxy):
    loader = Loader(str(store_path), proxy, 32)
    whole = [batch.stacked for batch in loader.batches([0, 1, 2])]
    rest = [batch.stacked for batch in loader.batches([1, 2], skip=3)]
    assert len(rest) == len(whole) - 4 - 3
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[7:], strict=True))


def test_one_teacher_only(store_path, proxy):
    loader = Loader(str(store_path), proxy, 50, heads=["letters"])
    batch = next(iter(loader))
    assert list(batch.logits) == ["letters"]
    assert batch.stacked.shape == (50, 3)
    assert loader.segments.widths == (3,)


def test_segments_have_the_papers_weights(store_path, proxy):
    segments = Loader(str(store_path), proxy, 32).segments
    assert segments.widths == (10, 3)
    assert segments.weights == (1.0, 1.0)
    assert segments.temperatures == (2.0, 2.0)


def test_moved_images_are_the_same(store_path, proxy_folder, tmp_path):
    moved = shutil.copytree(proxy_folder, tmp_path / "elsewhere")
    ours, theirs = (next(iter(Loader(str(store_path), source, 32))) for source in (None, str(moved)))
    assert torch.equal(ours.pixels, theirs.pixels)


def test_other_images_are_refused(store_path, labelled_folder):
    with pytest.raises(FastconError, match="the store was made from 150 images"):
        Loader(str(store_path), str(labelled_folder))


def test_an_unfinished_store_is_refused(store_path, proxy, tmp_path):
    path = Path(shutil.copytree(store_path, tmp_path / "s"))
    checksums = zarr.open_group(str(path))["teachers/letters/checksums"]
    checksums[1, 2] = -1
    with pytest.raises(FastconError, match=r"teacher 'letters' is not finished \(first: view 1, chunk 2; 1 chunks"):
        Loader(str(path), proxy, 32)
    Loader(str(path), proxy, 32, heads=["general"])


def test_labels_follow_their_images(tmp_path, labelled_folder, teachers):
    from conftest import BATCH, MACHINE, RECIPE

    from fastcon.distill.precompute import precompute

    images = index([labelled_folder])
    precompute(str(tmp_path / "s"), images, teachers[:1], RECIPE, 1, MACHINE, BATCH)
    for batch in Loader(str(tmp_path / "s"), images, 20):
        names = [images.name(int(i)).split("/")[0] for i in batch.indices]
        assert [images.classes[k] for k in batch.labels] == names


def test_a_broken_row_order_is_refused(store_path, proxy, tmp_path):
    path = Path(shutil.copytree(store_path, tmp_path / "s"))
    order = zarr.open_group(str(path))["order"]
    order[0] = order[0][::-1]
    with pytest.raises(FastconError, match="view 0 are missing or damaged"):
        next(iter(Loader(str(path), proxy, 32)))


def test_opening_a_store_keeps_no_object_per_image(store_path):
    index(Store(store_path).record.images.sources)  # which keeps what it found
    assert isinstance(index(Store(store_path).record.images.sources).ids, np.memmap)


KNOWN = [[3, 0, 7, 6], [2, 1, 9, 11], [5, 4, 8, 10]]


def test_the_first_so_many_views(store_path, proxy):
    one = fastcon.Loader(str(store_path), proxy, 24, views=1, epochs=2, seed=0)
    pixels = [batch.pixels for batch in one]
    both = fastcon.Loader(str(store_path), proxy, 24, epochs=2, seed=0)
    assert all(torch.equal(a, b.pixels) for a, b in zip(pixels[:6], both, strict=False))
    first = {int(k): p for batch in itertools.islice(one, 6) for k, p in zip(batch.indices, batch.pixels, strict=True)}
    again = list(one)[6:]
    shown = [(int(k), p) for batch in again for k, p in zip(batch.indices, batch.pixels, strict=True)]
    assert all(torch.equal(p, first[k]) for k, p in shown if k in first)  # the same view once more
    with pytest.raises(FastconError, match="has 2 views of each image, not 3"):
        fastcon.Loader(str(store_path), proxy, 24, views=3)


def test_processes_share_every_batch(store_path, proxy):
    whole = list(Loader(str(store_path), proxy, 24))
    shares = [list(Loader(str(store_path), proxy, 24, rank=(r, 4))) for r in range(4)]
    for step, batch in enumerate(whole):
        mine = [share[step] for share in shares]
        assert np.array_equal(np.concatenate([part.indices for part in mine]), batch.indices)
        assert torch.equal(torch.cat([part.pixels for part in mine]), batch.pixels)
        assert torch.equal(torch.cat([part.stacked for part in mine]), batch.stacked)
    with pytest.raises(FastconError, match="5 ranks do not divide the 8 lanes"):
        Loader(str(store_path), proxy, 24, rank=(0, 5))

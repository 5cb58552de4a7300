"""Baked views: what is in a shard, that teachers and students see its pixels, resume, damage, and no photos needed."""

from __future__ import annotations

import dataclasses
import io
import itertools
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BATCH, MACHINE, RECIPE, tree
from PIL import Image

from fastcon.data import decode as decoding
from fastcon.data.decode import Request
from fastcon.data.manifest import index
from fastcon.distill.loader import Loader
from fastcon.distill.options import TrainOptions
from fastcon.distill.precompute import precompute
from fastcon.distill.train import train
from fastcon.distill.verify import verify
from fastcon.errors import FastconError
from fastcon.store import bake
from fastcon.store.reader import Store
from fastcon.store.replay import Replay

BAKED = dataclasses.replace(RECIPE, bake=90)


@pytest.fixture(scope="module")
def baked(tmp_path_factory, proxy, teachers):
    path = tmp_path_factory.mktemp("baked") / "store"
    assert precompute(str(path), proxy, teachers, BAKED, 2, MACHINE, BATCH) == 300
    return path


@pytest.fixture
def copy(baked, tmp_path):
    return Path(shutil.copytree(baked, tmp_path / "store"))


def shard(store: Path, view: int = 1, chunk: int = 2) -> Path:
    return store / "shards" / f"view-{view:03d}" / f"chunk-{chunk:05d}.tar"


def test_a_shard_is_a_tar_of_the_rows_in_order(baked, proxy):
    store = Store(baked)
    view = store.view(1)
    with tarfile.open(shard(baked)) as tar:
        members = tar.getmembers()
        assert [m.name for m in members] == [f"{row:09d}.jpg" for row in range(128, 150)]
        images = [np.asarray(Image.open(io.BytesIO(tar.extractfile(m).read()))) for m in members]
    rows = slice(128, 150)
    request = Request(view.order[rows], view.boxes[rows], view.flips[rows])
    [pixels] = decoding.decode(proxy, [request], [32], BATCH, MACHINE)
    cut = pixels[32].permute(0, 2, 3, 1).numpy().astype(int)
    for image, want in zip(images, cut, strict=True):
        assert image.shape == (32, 32, 3)
        assert np.abs(image - want).mean() < 12  # a JPEG of quality 90, of 32 pixels
    assert [part.tobytes() for part in store.shard(1, 2)] == [bake.encode(image, 90) for image in cut.astype(np.uint8)]


def test_small_batches_are_decoded_together_and_come_apart_again(baked, monkeypatch):
    replay, ends = Replay(Store(baked), None), [0, 7, 8, 40, 41, 73, 90, 150]
    decoded = {}
    for together in (1, 48, 256):
        monkeypatch.setattr(decoding, "TOGETHER", together)
        requests = [replay.request(1, slice(a, b)) for a, b in itertools.pairwise(ends)]
        decoded[together] = [batch[32] for batch in decoding.decode(replay.images, requests, [32], 60, MACHINE)]
        assert [len(batch) for batch in decoded[together]] == np.diff(ends).tolist()
        assert all(batch.is_contiguous(memory_format=torch.channels_last) for batch in decoded[together])
    for one, *others in zip(*decoded.values(), strict=True):
        assert all(torch.equal(one, other) for other in others)
    assert len({batch.untyped_storage().data_ptr() for batch in decoded[256]}) == 1


def test_the_teachers_saw_the_baked_pixels_and_so_does_the_loader(baked, teachers):
    store = Store(baked)
    loader = Loader(store, batch_size=50, epochs=2, lanes=1)
    assert loader.manifest is None
    for step, batch in enumerate(loader):
        number, start = divmod(step * 50, 150)
        assert np.array_equal(batch.indices, store.view(number).order[start : start + 50])
        with torch.inference_mode():
            again = teachers[0].model(batch.pixels)
        file = store.shard(number, start // 64)[start % 64]  # the batch's first row, decoded by Pillow
        first = batch.pixels[0].permute(1, 2, 0).numpy().astype(int)
        assert np.abs(np.asarray(Image.open(io.BytesIO(file.tobytes()))) - first).mean() < 2
        difference = again.numpy() - batch.logits["general"].float().numpy()
        assert np.abs(difference).max() < 0.02


def test_training_needs_no_photos(copy, tmp_path, proxy_folder, monkeypatch):
    from fastcon.store import images as module

    monkeypatch.setattr(module, "ImageSet", None)  # nobody lists or reads images
    options = TrainOptions(epochs=1, batch_size=25)
    row = train(str(copy), str(tmp_path / "run"), options, MACHINE)
    assert row["images"] == 150
    monkeypatch.undo()
    with pytest.raises(FastconError, match="`labels` needs a class for every proxy image"):
        train(str(copy), str(tmp_path / "other"), dataclasses.replace(options, labels=True), MACHINE)


def test_batches_that_are_kept_stay_as_they_were(baked):
    """DALI's memory is handed on without a copy: it must not be used for the next batch."""
    loader = Loader(str(baked), batch_size=10, epochs=4)
    kept, copies = [], []
    for batch in loader:
        kept.append(batch.pixels)
        copies.append(batch.pixels.clone())
    assert len(kept) == 60
    assert all(torch.equal(pixels, copy) for pixels, copy in zip(kept, copies, strict=True))
    assert len({pixels.data_ptr() for pixels in kept}) == 60


def test_a_later_round_shuffles(baked):
    loader = Loader(str(baked), batch_size=50, epochs=3)
    seen = [batch.indices for batch in loader]
    assert sorted(np.concatenate(seen[6:]).tolist()) == list(range(150))
    assert not np.array_equal(seen[0], seen[6])


def test_resumes_to_the_same_bytes(baked, tmp_path, proxy, teachers):
    path = tmp_path / "store"

    class Stop(Exception):
        pass

    def stop(done, total):
        if done > 100:
            raise Stop

    with pytest.raises(Stop):
        precompute(str(path), proxy, teachers, BAKED, 1, MACHINE, BATCH, progress=stop)
    assert 0 < sum(1 for _ in path.rglob("*.tar")) < 3
    assert precompute(str(path), proxy, teachers, BAKED, 1, MACHINE, BATCH) == 150
    assert precompute(str(path), proxy, teachers, BAKED, 2, MACHINE, BATCH) == 150  # one more view
    assert tree(path) == tree(baked)


@pytest.mark.parametrize("damage", ["missing", "empty", "short", "flipped"])
def test_damage_is_found_named_and_repaired(copy, baked, damage):
    file = shard(copy)
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "flipped":
        data[600] ^= 1
        file.write_bytes(data)
    else:
        file.write_bytes(data[: 0 if damage == "empty" else -600])
    with pytest.raises(FastconError, match=r"chunk-00002.tar is .*--repair"):
        list(Loader(str(copy), batch_size=50, start_epoch=1))
    assert [check.what for check in verify(str(copy), None, 8, MACHINE) if not check.passed][:1] == ["shards"]
    assert all(check.passed for check in verify(str(copy), None, 8, MACHINE, repair=True))
    assert tree(copy) == tree(baked)


def test_verify_bakes_a_sample_again(baked):
    [line] = [check for check in verify(str(baked), None, 20, MACHINE) if check.what == "baked"]
    assert line.passed
    assert "20 views baked again: 20 the same bytes" in line.seen


def test_other_bytes_are_not_passed_off_as_a_repair(copy, monkeypatch):
    shard(copy).unlink()
    encode = bake.encode
    monkeypatch.setattr(bake, "encode", lambda pixels, quality: encode(pixels, 50))
    with pytest.raises(FastconError, match="other bytes than the teachers saw"):
        verify(str(copy), None, 0, MACHINE, repair=True)


def test_baked_or_not_is_settled_when_a_store_is_made(baked, store_path, proxy, teachers):
    with pytest.raises(FastconError, match="views baked at quality 90, this call says no baked views"):
        precompute(str(baked), proxy, teachers, RECIPE, 2, MACHINE, BATCH)
    with pytest.raises(FastconError, match="no baked views, this call says views baked at quality 90"):
        precompute(str(store_path), proxy, teachers, BAKED, 2, MACHINE, BATCH)


def test_shards_are_images_for_anybody(baked):
    assert len(index([str(shard(baked))])) == 22


def test_both_decoders_take_baked_views(baked):
    ours = next(iter(Loader(str(baked), batch_size=30))).pixels.float()
    theirs = next(iter(Loader(str(baked), batch_size=30, loader="torchvision"))).pixels.float()
    assert (ours - theirs).abs().mean() < 0.5


def test_samples_and_the_shard_they_come_from_are_mended_together(copy, baked):
    shard(copy, 0, 0).write_bytes(b"gone")
    [samples] = (copy / "samples" / "pixels" / "c").rglob("0/0/0/0")
    samples.write_bytes(b"gone")
    assert not [check for check in verify(str(copy), None, 8, MACHINE, repair=True) if not check.passed]
    assert tree(copy) == tree(baked)


def test_lost_checksums_of_shards_are_a_row_of_the_table(copy, baked):
    for file in (copy / "baked" / "checksums" / "c").rglob("*"):
        if file.is_file():
            file.write_bytes(b"x")
    checks = verify(str(copy), None, 8, MACHINE)
    assert next(check.what for check in checks if not check.passed) == "shards"
    assert len(checks) > 5
    assert not [check for check in verify(str(copy), None, 8, MACHINE, repair=True) if not check.passed]
    assert tree(copy) == tree(baked)

"""Stores in object storage, over the S3 protocol: the same values, what is kept here, and what goes wrong on the way."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import BATCH, MACHINE, RECIPE, tree

from fastcon import remote as files
from fastcon.cli.main import main
from fastcon.data.manifest import ImageSet
from fastcon.distill import parts as in_parts
from fastcon.distill.loader import Loader
from fastcon.distill.options import PrecomputeOptions, TrainOptions, Upkeep
from fastcon.distill.precompute import Teacher, precompute
from fastcon.distill.relate import relate
from fastcon.distill.train import train
from fastcon.distill.verify import verify
from fastcon.errors import FastconError
from fastcon.files import cache_folder
from fastcon.store.parts import opened
from fastcon.store.reader import Store

pytest.importorskip("moto")
s3fs = pytest.importorskip("s3fs")

QUICK = TrainOptions(epochs=2, batch_size=24)


@pytest.fixture(scope="module")
def baked(tmp_path_factory, proxy_folder, teachers):
    """A store of two parts with baked views, one byte a class."""
    path = tmp_path_factory.mktemp("baked") / "store"
    options = PrecomputeOptions(seed=3, size=32, batch_size=BATCH, logits="uint8", bake=True, parts=2)
    in_parts.make(str(path), ImageSet([str(proxy_folder)]), teachers, options, 2, MACHINE)
    return path


def kept(url: str) -> Path:
    return Path(files.Bucket(url).root)


def test_the_same_as_from_a_folder(bucket, store_path, proxy):
    url = bucket.put(store_path, "whole")
    local, remote = Store(store_path), Store(url)
    for name in local.teachers:
        for view in range(2):
            for chunk in range(local.chunks):
                assert np.array_equal(remote.logits(name, view, chunk), local.logits(name, view, chunk))
    assert all(np.array_equal(*pair) for pair in zip(remote.samples(), local.samples(), strict=True))
    assert remote.weights("general") == local.weights("general")
    assert [remote.image_name(k) for k in (0, 149)] == [local.image_name(k) for k in (0, 149)]
    assert all(check.passed for check in verify(url, proxy, 32, MACHINE))
    assert relate(url).cka.tolist() == relate(store_path).cka.tolist()
    shown = CliRunner().invoke(main, ["info", url])
    assert shown.exit_code == 0, shown.output
    assert "150 images x 2 views at 32 px" in shown.output


def test_training_on_parts_with_baked_views(bucket, baked, tmp_path):
    url = bucket.put(baked, "baked")
    bucket.latency, bucket.failing = 0.01, 0.1
    before = bucket.failed
    train(url, str(tmp_path / "remote"), QUICK, MACHINE, Upkeep(log_every=4))
    train(str(baked), str(tmp_path / "local"), QUICK, MACHINE, Upkeep(log_every=4))
    assert bucket.failed > before
    for name in ("student.safetensors", "heads.safetensors", "metrics.jsonl"):
        assert (tmp_path / "remote" / name).read_bytes() == (tmp_path / "local" / name).read_bytes(), name


def test_what_is_asked_for(bucket, baked):
    """A file a chunk and array, once, and only what the checksums do not cover when the store is opened again."""
    url = bucket.put(baked, "asked")
    bucket.asked.clear()
    for batch in Loader(url, batch_size=24, epochs=2, threads=1):
        assert len(batch.pixels) == 24
    store = opened(baked)
    chunks = 2 * len(store.chunking)  # of two views
    asked = [name.removeprefix("asked/") for name in bucket.asked]
    assert len(set(asked)) == len(asked) - (asked.count("parts.json") - 1)
    for kind, count in (("/logits/c/", 2 * chunks), ("/scales/c/", 2 * chunks), ("/shards/", chunks), ("/order/c/", 4)):
        assert sum(kind in f"/{name}" for name in asked) == count, kind
    bucket.asked.clear()
    assert len(list(Loader(url, batch_size=24, epochs=2, threads=1))) == 12
    again = [name.removeprefix("asked/") for name in bucket.asked]
    assert not [name for name in again if files._lasts(name.split("/", 1)[-1])]
    assert len(again) < len(asked)


def test_the_next_chunks_come_while_these_are_used(bucket, store_path, proxy):
    url = bucket.put(store_path, "ahead")
    batches = iter(Loader(url, proxy, 10, lanes=1, threads=1))
    next(batches)
    end = [f"teachers/{name}/logits/c/0/2/0" for name in Store(store_path).teachers]
    for _ in range(200):
        if all((kept(url) / name).exists() for name in end):
            break
        time.sleep(0.02)
    assert all((kept(url) / name).exists() for name in end)  # the last chunk, of rows that come twelve batches later


def test_all_that_a_chunk_takes_comes_ahead(bucket, baked):
    """Metadata and checksums, too: one after another they would be a wait for each array of each part."""
    part = opened(bucket.put(baked, "together")).part(1)
    part.ahead(list(part.teachers), 1, 0)
    for future in part._files._asked.values():
        future.result()
    bucket.asked.clear()
    part.view(1), part.shard(1, 0), [part.parts(name, 1, 0) for name in part.teachers]
    assert bucket.asked == []


def test_a_bound_on_what_is_kept(bucket, store_path, monkeypatch):
    url = bucket.put(store_path, "bound")
    monkeypatch.setattr(files._Kept, "limit", 4000)
    coming = kept(url) / "teachers/general/logits/c/0/0/0.1.2.partial"
    coming.parent.mkdir(parents=True)
    coming.write_bytes(b"x")
    store, local = Store(url), Store(store_path)
    for view in range(2):
        for chunk in range(3):
            assert np.array_equal(store.logits("general", view, chunk), local.logits("general", view, chunk))
    assert coming.exists()  # what another process is fetching
    assert 0 < sum(size for _, size, _ in files._lasting(cache_folder("stores"))) <= 4000
    assert np.array_equal(store.logits("general", 0, 0), local.logits("general", 0, 0))  # fetched anew


def test_a_copy_that_is_damaged_or_stale_is_fetched_anew(bucket, store_path):
    url = bucket.put(store_path, "damaged")
    name, local = "teachers/general/logits/c/0/1/0", Store(store_path)
    Store(url).logits("general", 0, 1)
    (kept(url) / name).write_bytes(b"rubbish")
    assert np.array_equal(Store(url).logits("general", 0, 1), local.logits("general", 0, 1))
    Store(url).view(1)
    (kept(url) / "boxes/c/1/0/0").write_bytes((Path(store_path) / "boxes/c/0/0/0").read_bytes())
    assert np.array_equal(Store(url).view(1).boxes, local.view(1).boxes)


def test_what_is_damaged_there_is_an_error(bucket, store_path, tmp_path):
    url, there = bucket.put(store_path, "broken"), s3fs.S3FileSystem()
    there.pipe("bucket/broken/teachers/general/logits/c/0/1/0", b"rubbish")
    there.rm("bucket/broken/teachers/letters/logits/c/0/0/0")
    there.rm("bucket/broken/flips/c/1/0")
    store = Store(url)
    with pytest.raises(FastconError, match=r"teacher 'general', view 0, chunk 1 .* is damaged"):
        store.logits("general", 0, 1)
    with pytest.raises(FastconError, match=r"teacher 'letters', view 0, chunk 0 .* is missing"):
        store.logits("letters", 0, 0)
    with pytest.raises(FastconError, match="'flips' is missing or damaged"):
        store.view(1)
    there.pipe("bucket/broken/zarr.json", b"{}")
    with pytest.raises(FastconError, match="s3://bucket/broken is a Zarr group but no finished fastcon store"):
        Store(url)


def test_verify_looks_at_what_is_there(bucket, store_path, proxy):
    url, there = bucket.put(store_path, "looked"), s3fs.S3FileSystem()
    for chunk in range(3):
        Store(url).logits("general", 0, chunk)
    there.pipe("bucket/looked/teachers/general/logits/c/0/1/0", b"rubbish")
    failed = {check.what for check in verify(url, proxy, 0, MACHINE) if not check.passed}
    assert failed == {"general: chunks"}
    assert all(check.passed for check in verify(url, proxy, 0, MACHINE, repair=True))
    assert (
        there.cat("bucket/looked/teachers/general/logits/c/0/1/0")
        == tree(store_path)["teachers/general/logits/c/0/1/0"]
    )
    there.rm("bucket/looked/zarr.json")
    with pytest.raises(FastconError, match="s3://bucket/looked is no fastcon store"):  # whatever is still here
        Store(url)


def test_a_store_that_grows_is_seen_to(bucket, store_path, tmp_path, proxy, teachers):
    """A new view and teacher are there once it is opened again: nothing of the record is kept."""
    folder = tmp_path / "s"
    shutil.copytree(store_path, folder)
    url = bucket.put(folder, "grown")
    assert Store(url).views == 2
    more = [*teachers, Teacher("again", teachers[1].spec, teachers[1].model)]
    precompute(str(folder), proxy, more, RECIPE, 3, MACHINE, BATCH)
    bucket.put(f"{folder}/", "grown/")
    store = Store(url)
    assert (store.views, list(store.teachers)) == (3, ["general", "letters", "again"])
    store.require("again", 3)
    assert np.array_equal(store.logits("letters", 2, 2), Store(folder).logits("letters", 2, 2))


def test_the_place_cannot_be_reached(bucket, store_path, monkeypatch, tmp_path):
    with pytest.raises(FastconError, match=r"s3://bucket/nothing is no fastcon store"):
        Store("s3://bucket/nothing")
    url = bucket.put(store_path, "silent")
    store = Store(url)
    bucket.failing = 1.0
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    with pytest.raises(
        FastconError, match=r"^s3://bucket/silent/.* could not be fetched .*: run the same command again"
    ):
        store.logits("general", 0, 0)
    bucket.failing = 0.0
    assert np.array_equal(store.logits("general", 0, 0), Store(store_path).logits("general", 0, 0))  # it was no damage
    store.view(0), store.samples()
    store._files.path = lambda name: (_ for _ in ()).throw(files.Unreachable("gone"))
    for read in (lambda: store.view(0), lambda: store.logits("general", 0, 0), store.samples):
        with pytest.raises(FastconError, match=r"^gone$"):  # not called damaged
            read()
    with pytest.raises(FastconError, match="nosuch://bucket/store cannot be read"):
        opened("nosuch://bucket/store")


def test_the_bound_by_the_command_line(bucket, store_path, tmp_path, proxy_folder, monkeypatch):
    monkeypatch.setattr(files._Kept, "limit", files._Kept.limit)
    url = bucket.put(store_path, "line")
    out = tmp_path / "run"
    command = [
        "train",
        "--store",
        url,
        "--out",
        str(out),
        "--images",
        str(proxy_folder),
        "--epochs",
        "1",
        "--device",
        "cpu",
    ]
    told = CliRunner().invoke(main, [*command, "--cache", "0.5"])
    assert told.exit_code == 0, told.output
    assert files._Kept.limit == 0.5e9
    assert json.loads((out / "config.json").read_text())["lineage"]["proxy"] == "line"
    assert cache_folder("stores").is_dir()

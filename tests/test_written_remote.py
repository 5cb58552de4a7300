"""Stores made in object storage: the same bytes as in a folder, one writer at a time, and whole at every moment."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from conftest import BATCH, MACHINE, RECIPE, tree

from fastcon import remote
from fastcon.data.manifest import ImageSet, index
from fastcon.distill import parts as in_parts
from fastcon.distill import precompute as computing
from fastcon.distill import verify as verifying
from fastcon.distill.loader import Loader
from fastcon.distill.options import PrecomputeOptions
from fastcon.distill.precompute import Teacher, precompute
from fastcon.distill.verify import verify
from fastcon.errors import Busy, FastconError, Interrupted
from fastcon.files import cache_folder
from fastcon.store import bake as baking
from fastcon.store import lease as leases
from fastcon.store import mirror, parts
from fastcon.store.images import images_of
from fastcon.store.lease import Lease
from fastcon.store.parts import forget, opened
from fastcon.store.reader import Store

pytest.importorskip("moto")
s3fs = pytest.importorskip("s3fs")

PARTS = PrecomputeOptions(seed=3, size=32, batch_size=BATCH, logits="uint8", bake=True, parts=2)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(leases, "BEAT", 0.2)
    monkeypatch.setattr(leases, "EXPIRY", 1.0)
    monkeypatch.setattr(leases, "LOOK", 0.05)
    monkeypatch.setattr(mirror, "EVERY", 0.1)
    monkeypatch.setattr(mirror, "PAUSE", 0.1)
    monkeypatch.setattr(in_parts, "POLL_THERE", 0.2)


def objects(url: str) -> dict[str, bytes]:
    """What there is at a place, but for logs."""
    filesystem, key = fsspec.core.url_to_fs(url)
    filesystem.invalidate_cache()
    return {
        str(name)[len(key) :].lstrip("/"): filesystem.cat_file(name)
        for name in filesystem.find(key)
        if not str(name).endswith(".log")
    }


def test_the_same_bytes_as_in_a_folder(bucket, proxy, teachers, store_path):
    """In two goes, each on a machine that has nothing of it, over a connection that fails."""
    url = "s3://bucket/whole"
    bucket.latency, bucket.failing = 0.005, 0.05
    assert precompute(url, proxy, teachers[:1], RECIPE, 1, MACHINE, BATCH) == 150
    assert precompute(url, proxy, teachers[:1], RECIPE, 2, MACHINE, BATCH) == 150
    assert precompute(url, proxy, teachers, RECIPE, 2, MACHINE, BATCH) == 300
    bucket.failing = 0.0
    assert objects(url) == tree(store_path)
    assert precompute(url, proxy, teachers, RECIPE, 2, MACHINE, BATCH) == 0
    assert not list(cache_folder("writing").glob("store-*"))
    chunks = [name for name in bucket.brought if "/logits/c/" in name and name.startswith("whole/")]
    assert len(chunks) == len(set(chunks)) == 2 * 2 * 3  # each once, however many rounds there were


@pytest.mark.parametrize("at_once", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_parts_made_there(bucket, proxy_folder, tmp_path, generalist_file, teacher_file, at_once):
    """With baked views, by so many processes with the same command."""
    url = f"s3://bucket/parts-{at_once}"
    command = [sys.executable, "-m", "fastcon", "precompute", str(proxy_folder), "--views", "2", "--size", "32"]
    command += ["--precision", "float32", "--logits", "uint8", "--bake", "--parts", "3", "--device", "cpu"]
    command += ["--generalist", f"general={generalist_file}", "--teacher", f"letters={teacher_file}"]
    subprocess.run([*command, "--store", str(tmp_path / "store")], check=True)
    running = [subprocess.Popen([*command, "--store", url]) for _ in range(at_once)]
    assert [process.wait(300) for process in running] == [0] * at_once
    assert objects(url) == tree(tmp_path / "store")
    assert len(opened(url).teachers) == 2


def test_parts_grow_and_shrink_there(bucket, proxy_folder, tmp_path, teachers):
    images = ImageSet([str(proxy_folder)])
    for path in ("s3://bucket/grown", str(tmp_path / "grown")):
        assert in_parts.make(path, images, teachers[:1], PARTS, 1, MACHINE) == 150
        assert in_parts.make(path, images, teachers, PARTS, 2, MACHINE) == 300
        forget(path, "letters")
        with pytest.raises(FastconError, match="has no teacher 'letters'"):
            forget(path, "letters")
    assert objects("s3://bucket/grown") == tree(tmp_path / "grown")
    assert not [name for name in objects("s3://bucket/grown") if "letters" in name]
    assert all(check.passed for check in verify("s3://bucket/grown", None, 32, MACHINE))


def test_a_second_writer_is_refused(bucket, proxy, teachers, proxy_folder):
    url = "s3://bucket/held"
    precompute(url, proxy, teachers, RECIPE, 1, MACHINE, BATCH)
    before = objects(url)
    with mirror.mirrored(url):
        for write in (
            lambda: precompute(url, proxy, teachers, RECIPE, 2, MACHINE, BATCH),
            lambda: precompute(url + "/", proxy, teachers, RECIPE, 2, MACHINE, BATCH),
            lambda: forget(url, "letters"),
        ):
            started = time.monotonic()
            with pytest.raises(
                Busy, match=rf"s3://bucket/held is being written by process {os.getpid()} on .*: wait for it"
            ):
                write()
            assert time.monotonic() - started < 5
    assert objects(url) == before


def test_a_part_that_another_is_making_is_made_when_that_dies(bucket, proxy_folder, teachers, monkeypatch):
    monkeypatch.setattr(leases, "EXPIRY", 6.0)
    url = "s3://bucket/died"
    told: list[str] = []
    dead = Lease(f"{url}/part-00000/{mirror.LEASE}", f"{url}/part-00000").take()
    dead._end.set()
    images, manifest, listed = ImageSet([str(proxy_folder)]), ImageSet.manifest, []
    monkeypatch.setattr(ImageSet, "manifest", lambda self, share: (listed.append(share), manifest(self, share))[1])
    assert in_parts.make(url, images, teachers, PARTS, 1, MACHINE, say=told.append) == 150
    assert [share.number for share in listed] == [0, 1, 0], "the first for the record; none while it waits"
    assert any("waiting for part 0, which other processes are making" in line for line in told)
    with pytest.raises(FastconError, match=r"died/part-00000 is written by another process by now"):
        dead.check()
    dead.release()  # which takes nothing from whoever has it now


def test_leases(bucket, monkeypatch):
    url = "s3://bucket/leases/a"
    first = Lease(url, "a").take()
    with pytest.raises(Busy):
        Lease(url, "a").take()
    time.sleep(1.5)  # it lives
    with pytest.raises(Busy):
        Lease(url, "a").take()
    first.check()
    first.release()
    assert objects("s3://bucket/leases") == {}
    dead = Lease(url, "a").take()
    dead._end.set()
    second = Lease(url, "a").take_over()
    second.check()
    assert list(objects(url)) == ["2"]
    with pytest.raises(FastconError, match="by another process by now"):
        dead.check()
    there = fsspec.filesystem("s3")
    there.pipe("bucket/leases/a/1", dead._says())  # a sign of life that was long on its way
    there.rm("bucket/leases/a/2")
    with pytest.raises(FastconError, match="by another process by now"):
        dead.check()
    there.rm("bucket/leases/a/1")
    there.pipe("bucket/leases/a/2", second._says())
    second._end.set()
    rivals, won = [Lease(url, "a") for _ in range(8)], []

    def rival(lease):
        with contextlib.suppress(Busy):
            won.append(lease.take_over())

    threads = [threading.Thread(target=rival, args=(lease,)) for lease in rivals]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(won) == 1
    won[0].check()
    won[0].release()


def test_a_holder_that_was_thought_dead_writes_nothing_more(bucket, proxy, teachers):
    url = "s3://bucket/paused"
    precompute(url, proxy, teachers[:1], RECIPE, 1, MACHINE, BATCH)
    before = objects(url)

    def outlived():
        with mirror.mirrored(url) as folder:
            filesystem, key = fsspec.core.url_to_fs(url)
            filesystem.pipe_file(f"{key}/{mirror.LEASE}/7", b"process 1 on another (x, 0)\n")
            Path(folder, "shards").mkdir()
            Path(folder, "shards/more").write_bytes(b"x")
            time.sleep(0.5)

    with pytest.raises(FastconError, match="paused is written by another process by now"):
        outlived()
    assert {name: data for name, data in objects(url).items() if mirror.LEASE not in name} == before


@pytest.mark.parametrize("bake", [None, 90])
def test_a_writer_stops_once_its_lease_is_lost(bucket, proxy, teachers, bake, monkeypatch):
    url, taken, done, encode = f"s3://bucket/lost-{bake}", threading.Event(), [], baking.encode
    deadline = time.monotonic() + 60

    def another_takes_it(*_):
        if not taken.is_set():
            taken.set()
            filesystem, key = fsspec.core.url_to_fs(url)
            filesystem.pipe_file(f"{key}/{mirror.LEASE}/7", b"process 1 on another (x, 0)\n")
        while not list(cache_folder("writing").glob(f"store-*/{mirror.LOST}")) and time.monotonic() < deadline:
            time.sleep(0.02)
        done.append(1)

    if bake:
        monkeypatch.setattr(baking, "encode", lambda *view: (another_takes_it(), encode(*view))[1])
    with pytest.raises(leases.Lost, match=rf"^{url} is written by another process by now.*run the same command again$"):
        precompute(
            *(url, proxy, teachers, dataclasses.replace(RECIPE, bake=bake), 4, MACHINE, BATCH),
            progress=None if bake else another_takes_it,
        )
    chunk = RECIPE.chunk_rows + BATCH  # its rows, and those of the batch that goes past its end
    assert len(done) <= (chunk if bake else 2 + chunk // BATCH), "it went on after a chunk"


def test_a_lease_lost_during_a_round(store_path):
    """Nothing that speaks of what is there goes up any more."""

    class Ours:
        times = 0

        def check(self, look=True):
            self.times += look
            if self.times > 1:
                raise leases.Lost("lost")

    url = "memory://rounds/lost"
    with pytest.raises(leases.Lost):
        mirror._Mirror(url, str(store_path), Ours())._push()
    names = list(objects(url))
    assert any("/logits/c/" in name for name in names)
    assert not [name for name in names if mirror._comes_last(name)]


def test_a_lease_seen_to_be_lost_ends_a_round_at_once(store_path):
    class Seen:
        def check(self, look=True):
            if not look:
                raise leases.Lost("lost")

    url = "memory://rounds/seen"
    losing = mirror._Mirror(url, str(store_path), Seen())
    with pytest.raises(leases.Lost):
        losing._push()
    assert not objects(url)
    fsspec.filesystem("memory").pipe("/rounds/seen/another's", b"x")
    with pytest.raises(leases.Lost):
        losing._remove("another's")
    assert objects(url) == {"another's": b"x"}


def test_two_that_try_at_once_and_what_cannot_be_read(bucket, monkeypatch):
    lease = Lease("s3://bucket/leases/b", "b")

    def conflict(*_, **__):
        raise OSError(5, "ConditionalRequestConflict: retry the upload")

    monkeypatch.setattr(lease._filesystem, "pipe_file", conflict)
    with pytest.raises(Busy):
        lease.take()

    def denied(*_, **__):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(lease._filesystem, "cat_file", denied)
    with pytest.raises(FastconError, match=r"^b cannot be read \(Access Denied\)$"):
        lease.take()


def test_a_beginning_that_was_cut_off(bucket, proxy, teachers, store_path):
    """And the marker of a folder that was made by hand."""
    there = s3fs.S3FileSystem()
    there.pipe("bucket/begun/precompute.log", b"x")
    there.pipe("bucket/begun/images/ids/c/0", b"x")
    there.call_s3("put_object", Bucket="bucket", Key="begun/", Body=b"")
    precompute("s3://bucket/begun", proxy, teachers, RECIPE, 2, MACHINE, BATCH)
    assert {name: data for name, data in objects("s3://bucket/begun").items() if name} == tree(store_path)


def test_lost_metadata_cost_no_logits(bucket, store_path, proxy, teachers):
    url, there = bucket.put(store_path, "bare"), s3fs.S3FileSystem()
    before = objects(url)
    there.rm("bucket/bare/teachers/general/logits/zarr.json")
    with pytest.raises(FastconError, match="verify --repair"):
        precompute(url, proxy, teachers, RECIPE, 3, MACHINE, BATCH)
    assert objects(url).keys() >= {name for name in before if "/c/" in name}
    there.rm("bucket/bare/zarr.json")
    with pytest.raises(
        FastconError, match=r"bare: its record \(zarr.json\) is lost; `fastcon verify --repair` restores it"
    ):
        precompute(url, proxy, teachers, RECIPE, 2, MACHINE, BATCH)
    assert all(check.passed for check in verify(url, proxy, 0, MACHINE, repair=True))
    after = objects(url)
    assert all(after[name] == data for name, data in before.items() if "/c/" in name)


def test_a_machine_that_is_lost(bucket, proxy_folder, proxy, teachers, generalist_file, teacher_file, tmp_path):
    """Killed in the middle; the next one, which has nothing of it, makes what is not there yet."""
    url = "s3://bucket/lost"
    program = f"""
import os, signal, time
from conftest import *
from fastcon.distill.precompute import Teacher, precompute
from fastcon.data.manifest import index
from fastcon.store import mirror, lease
mirror.EVERY = 0.05
lease.BEAT = 0.2
teachers = [Teacher("general", {str(generalist_file)!r}, load({str(generalist_file)!r}), generalist=True),
            Teacher("letters", {str(teacher_file)!r}, load({str(teacher_file)!r}))]
def progress(done, total):
    if done > 200:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
precompute({url!r}, index([{str(proxy_folder)!r}]), teachers, RECIPE, 2, MACHINE, BATCH, progress=progress)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "FASTCON_CACHE": str(tmp_path)}
    killed = subprocess.run([sys.executable, "-c", program], env=environment)
    assert killed.returncode == -signal.SIGKILL
    done = Store(url).done("general")
    assert 0 < done.sum() < done.size
    with pytest.raises(FastconError, match="teacher 'general' is not finished"):
        Store(url).require("general", 2)
    left = sum(b - a for a, b in (Store(url).chunk_range(c) for v in range(2) for c in range(3) if not done[v, c]))
    assert precompute(url, proxy, teachers, RECIPE, 2, MACHINE, BATCH) == left < 300
    assert all(check.passed for check in verify(url, proxy, 32, MACHINE))
    before = os.environ["FASTCON_CACHE"]
    assert list(Path(tmp_path, "writing").glob("store-*"))  # swept by the next that writes there
    try:
        os.environ["FASTCON_CACHE"] = str(tmp_path)
        precompute(url, proxy, teachers, RECIPE, 2, MACHINE, BATCH)
    finally:
        os.environ["FASTCON_CACHE"] = before
    assert not list(Path(tmp_path, "writing").glob("store-*"))


def test_whole_at_every_moment(store_path, proxy, teachers, tmp_path):
    """Whichever upload is the last one, what the place says is there is there."""
    grown = tmp_path / "grown"
    shutil.copytree(store_path, grown)
    more = [*teachers, Teacher("again", teachers[1].spec, teachers[1].model)]
    precompute(str(grown), proxy, more, RECIPE, 3, MACHINE, BATCH)
    memory = fsspec.filesystem("memory")

    class Counted:
        """The memory's file system, that loses its connection after some uploads."""

        def __init__(self, left):
            self.left = left

        def __getattr__(self, name):
            return getattr(memory, name)

        def _spend(self):
            self.left -= 1
            if self.left < 0:
                raise OSError("lost")

        def pipe_file(self, *arguments):
            self._spend()
            memory.pipe_file(*arguments)

        def put_file(self, *arguments):
            self._spend()
            memory.put_file(*arguments)

    class Ours:
        def check(self, look=True):
            pass

    def brought(start, end, uploads):
        """The place after so many uploads of `end` to where `start` was; whether that was all."""
        url = f"memory://moments/{time.monotonic_ns()}"
        first = mirror._Mirror(url, str(start), Ours())
        first._push() if start else None
        second = mirror._Mirror(url, str(end), Ours())
        second._there = dict(first._there) if start else {}
        second._filesystem = Counted(uploads)
        try:
            second._push()
        except OSError:
            return url, False
        return url, True

    old = Store(store_path)
    for start, end in ((None, store_path), (store_path, grown)):
        uploads, seen, whole = 0, set(), False
        while not whole:
            url, whole = brought(start, end, uploads)
            uploads += 1
            try:
                store = Store(url)
            except FastconError:
                assert start is None
                continue
            seen.add((store.views, len(store.teachers)))
            for name in store.teachers:
                done = store.done(name)
                for view, chunk in zip(*done.nonzero(), strict=True):
                    store.logits(name, int(view), int(chunk))
            for view in range(store.views):
                store.view(view)
            if start:
                assert all(store.done(name)[:2].all() for name in old.teachers)
        assert uploads > 20
        assert seen == ({(2, 2)} if start is None else {(2, 2), (3, 3)})
        assert objects(url) == tree(end)


def test_what_cannot_be_written(bucket, proxy, teachers, monkeypatch):
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    there = s3fs.S3FileSystem()
    there.pipe("bucket/others/photo.jpg", b"x")
    with pytest.raises(FastconError, match=r"others holds other files \(photo.jpg, …\) and no store"):
        precompute("s3://bucket/others", proxy, teachers, RECIPE, 1, MACHINE, BATCH)
    images = ImageSet(list(proxy.sources))
    with pytest.raises(FastconError, match=r"others holds other files \(photo.jpg, …\) and no store"):
        in_parts.make("s3://bucket/others", images, teachers, PARTS, 1, MACHINE)
    with pytest.raises(FastconError, match=r"s3://nothing/store cannot be written \(.*bucket does not exist"):
        precompute("s3://nothing/store", proxy, teachers, RECIPE, 1, MACHINE, BATCH)
    url = "s3://bucket/named"
    precompute(url, proxy, teachers, RECIPE, 1, MACHINE, BATCH)
    with pytest.raises(FastconError, match=r"^s3://bucket/named was made with seed 3, this call says 4"):
        precompute(url, proxy, teachers, replace(RECIPE, seed=4), 1, MACHINE, BATCH)

    def progress(done, total):
        bucket.failing = 1.0

    with pytest.raises(FastconError, match=r"s3://bucket/named (cannot be written|cannot be read) .*"):
        precompute(url, proxy, teachers, RECIPE, 2, MACHINE, BATCH, progress=progress)
    bucket.failing = 0.0
    time.sleep(1.2)  # its lease could not be given back, and lapses
    assert precompute(url, proxy, teachers, RECIPE, 2, MACHINE, BATCH) == 150


def test_a_signal_leaves_what_is_finished_there(bucket, proxy, teachers):
    url = "s3://bucket/signal"

    def progress(done, total):
        if done > 200:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        precompute(url, proxy, teachers, RECIPE, 2, MACHINE, BATCH, progress=progress)
    assert Store(url).done("general").any()
    assert 0 < precompute(url, proxy, teachers, RECIPE, 2, MACHINE, BATCH) < 300


def test_repair_there(bucket, proxy_folder, teachers, monkeypatch):
    url, there = "s3://bucket/mended", s3fs.S3FileSystem()
    in_parts.make(url, ImageSet([str(proxy_folder)]), teachers, PARTS, 2, MACHINE)
    before = objects(url)
    there.pipe("bucket/mended/part-00001/teachers/general/logits/c/1/0/0", b"rubbish")
    there.rm("bucket/mended/part-00000/shards/view-000/chunk-00000.tar")
    there.rm("bucket/mended/part-00000/zarr.json")
    assert not all(check.passed for check in verify(url, None, 0, MACHINE))

    def lost(*_, **__):
        raise leases.Lost("another writes it")

    with monkeypatch.context() as patch:
        patch.setattr(verifying, "_repair", lost)
        with pytest.raises(leases.Lost):
            verify(f"{url}/part-00001", None, 0, MACHINE, repair=True)
    computed, fill = [], computing.fill
    monkeypatch.setattr(computing, "fill", lambda *given, **named: computed.append(given[4]) or fill(*given, **named))
    assert all(check.passed for check in verify(url, None, 8, MACHINE, repair=True))
    assert computed == [[(1, 0)]]  # the damaged chunk alone
    assert objects(url) == before
    assert json.loads(before["parts.json"])["bound"]["1"]["views"] == 2
    assert parts.has_parts(url)


@pytest.fixture(scope="module")
def shards(bucket, proxy_folder, tmp_path_factory):
    """The images as five tars, here and there."""
    here = tmp_path_factory.mktemp("shards")
    files = sorted(path for path in proxy_folder.rglob("*") if path.is_file())
    for k in range(5):
        with tarfile.open(here / f"x-{k}.tar", "w") as tar:
            for path in files[k::5]:
                tar.add(path, path.name)
    return here, bucket.put(here, "shards")


SIZES = ("ids", "offsets", "sizes", "widths", "heights", "digests", "checksums", "names", "name_ends", "labels")


def test_images_in_tars_there(bucket, shards, teachers, tmp_path):
    """The same manifest and the same store; each tar is asked for once, and once more when it is another."""
    here, there = shards[0] / "x-{0..4}.tar", shards[1] + "/x-{0..4}.tar"
    bucket.asked.clear()
    remote, local = index([there]), index([str(here)])
    for column in SIZES:
        assert np.array_equal(getattr(remote, column), getattr(local, column)), column
    assert remote.sources == [there]
    assert remote.digest == local.digest
    precompute("s3://bucket/from-tars", remote, teachers, RECIPE, 1, MACHINE, BATCH)
    precompute(str(tmp_path / "from-tars"), local, teachers, RECIPE, 1, MACHINE, BATCH)
    ours, theirs = objects("s3://bucket/from-tars"), tree(tmp_path / "from-tars")
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} == {"zarr.json", "record.copy"}  # where images were
    assert len(next(iter(Loader("s3://bucket/from-tars", None, 32))).pixels) == 32
    assert sorted(name for name in bucket.asked if name.endswith(".tar")) == [f"shards/x-{k}.tar" for k in range(5)]
    s3fs.S3FileSystem().put(str(shards[0] / "x-1.tar"), "bucket/shards/x-0.tar")
    with pytest.raises(FastconError, match="changed since it was indexed"):
        list(Loader("s3://bucket/from-tars", remote, 32))
    assert index([there]).digest != local.digest
    s3fs.S3FileSystem().put(str(shards[0] / "x-0.tar"), "bucket/shards/x-0.tar")
    assert index([there]).digest == local.digest


def test_parts_have_shares_of_tars(bucket, shards, teachers, tmp_path, monkeypatch):
    """A process fetches those of its parts alone. The images may be used from elsewhere later."""
    monkeypatch.setenv("FASTCON_CACHE", str(tmp_path / "cache"))
    url, images = "s3://bucket/of-tars", ImageSet([shards[1] + "/x-{0..4}.tar"])
    bucket.asked.clear()
    assert in_parts.make(url, images, teachers, replace(PARTS, bake=False, part=(1,)), 1, MACHINE) == 60
    assert {name for name in bucket.asked if name.endswith(".tar")} == {"shards/x-1.tar", "shards/x-3.tar"}
    assert in_parts.make(url, images, teachers, replace(PARTS, bake=False), 1, MACHINE) == 90
    store = opened(url)
    names = {images_of(store).name(k).split("/")[0] for k in range(90)}
    assert names == {"x-0.tar", "x-2.tar", "x-4.tar"}
    assert len(list(Loader(url, [str(shards[0] / "x-{0..4}.tar")], 30, threads=1))) == 5
    assert all(check.passed for check in verify(url, [str(shards[0] / "x-{0..4}.tar")], 8, MACHINE))
    with pytest.raises(FastconError, match=r"is no .tar, and the parts of this store have shares of tars"):
        next(iter(Loader(url, [str(shards[0])], 30)))
    with pytest.raises(FastconError, match="5 tars cannot be shared among 6 parts, one at least each"):
        in_parts.make("s3://bucket/many", images, teachers, replace(PARTS, parts=6), 1, MACHINE)


def test_labels_of_shares_of_tars(bucket, labelled_folder, teachers, tmp_path):
    """Classes are those of a part's own tars: where these differ there are none in common."""
    folders = sorted(path for path in labelled_folder.iterdir() if path.is_dir())
    for name, classes in (("same-0", [0, 1]), ("same-1", [0, 1]), ("other-0", [2, 3]), ("other-1", [4, 5])):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for number in classes:
                tar.add(folders[number], folders[number].name)
    there = bucket.put(tmp_path, "labels")
    for name, labelled in (("same", True), ("other", False)):
        images = ImageSet([there + f"/{name}-{{0,1}}.tar"])
        in_parts.make(f"s3://bucket/labelled-{name}", images, teachers[:1], replace(PARTS, bake=False), 1, MACHINE)
        assert images_of(opened(f"s3://bucket/labelled-{name}")).has_labels == labelled


def test_a_bound_that_the_tars_exceed(bucket, shards, monkeypatch, tmp_path):
    """It is said, and all goes on."""
    monkeypatch.setattr(remote._Kept, "limit", 2 * (shards[0] / "x-0.tar").stat().st_size)
    monkeypatch.setenv("FASTCON_CACHE", str(tmp_path / "cache"))
    told: list[str] = []
    images = ImageSet([shards[1] + "/x-{0..4}.tar"], say=told.append)
    assert len(images.manifest()) == 150
    assert "will be fetched again and again: set $FASTCON_CACHE_GB higher, or make more `parts`" in told[0]
    kept_there = sum(path.stat().st_size for path in cache_folder("stores").rglob("*.tar"))
    assert 0 < kept_there <= remote.kept()
    reader = images.manifest().reader()
    reader.read(range(150))
    links = []
    for place in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed by now
            links.append(os.readlink(place))
    assert not [link for link in links if link.startswith(str(tmp_path)) and ".tar" in link]  # held, and in the way
    reader.close()


def test_images_that_are_not_there(bucket, shards):
    with pytest.raises(FastconError, match=r"^there is no s3://bucket/shards/x-7.tar$"):
        index([shards[1] + "/x-{4,7}.tar"])
    with pytest.raises(
        FastconError, match=r"s3://bucket/shards lies in object storage, where images are read from .tar"
    ):
        index([shards[1]])
    s3fs.S3FileSystem().pipe("bucket/shards/bad.tar", b"x" * 700)
    with pytest.raises(FastconError, match=r"s3://bucket/shards/bad.tar is not a readable tar file"):
        index([shards[1] + "/bad.tar"])

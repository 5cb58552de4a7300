"""Kills, flipped bytes, full disks and hostile files: nothing is lost but minutes, nothing wrong is used."""

from __future__ import annotations

import contextlib
import json
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
from conftest import BATCH, MACHINE, RECIPE, rewrite_record, tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_train import QUICK, UPKEEP

from fastcon.data.manifest import index
from fastcon.distill import precompute as stage
from fastcon.distill.train import train
from fastcon.distill.verify import verify
from fastcon.errors import FastconError, Interrupted
from fastcon.store.format import COPY
from fastcon.store.reader import Store
from fastcon.store.writer import StoreWriter

KILLS = [5, pytest.param(25, marks=pytest.mark.slow)]
FLIPS = [30, pytest.param(200, marks=pytest.mark.slow)]


@pytest.fixture
def copy(tmp_path, store_path) -> Path:
    return Path(shutil.copytree(store_path, tmp_path / "store"))


@pytest.mark.parametrize("kills", KILLS)
def test_precompute_killed_at_any_moment(tmp_path, proxy_folder, generalist_file, teacher_file, kills):
    """The store comes out byte-identical, and each kill costs at most two chunks a teacher."""
    chance = random.Random(kills)
    views = str(10 * kills)  # more than even a quick machine computes before the last kill
    command = ("precompute", str(proxy_folder), str(tmp_path / "store"), str(generalist_file), str(teacher_file), views)
    before, seconds = 0, 0.6
    for _ in range(kills):
        rows = faults.kill(chance.uniform(0, seconds), *command)
        if rows is None:
            break
        store = Store(tmp_path / "store")
        done = min(int(store.done(name).sum()) for name in store.teachers)
        assert -(-rows // faults.CHUNK_ROWS) - (done - before) <= 2
        before = done
    assert 0 < before < 30 * kills
    faults.finish(*command)
    faults.finish(*command[:2], str(tmp_path / "whole"), *command[3:])
    assert tree(tmp_path / "store") == tree(tmp_path / "whole")


def test_at_most_two_chunks_wait_to_be_written(tmp_path, proxy, teachers, monkeypatch):
    real, written, ahead = StoreWriter.write, [], []

    def slow(self, *args):
        time.sleep(0.3)
        real(self, *args)
        written.append(args[0])

    monkeypatch.setattr(StoreWriter, "write", slow)

    def look(done: int, total: int) -> None:
        ahead.append(-(-done // 64) - len(written))

    stage.precompute(str(tmp_path / "s"), proxy, teachers[1:], RECIPE, 2, MACHINE, BATCH, progress=look)
    assert len(written) == 6
    assert max(ahead) == 2


@pytest.mark.parametrize("kills", KILLS)
def test_train_killed_at_any_moment(tmp_path, store_path, kills):
    """Weights, metrics and all else come out as if nothing had happened; checkpoints are written at every step."""
    chance = random.Random(kills)
    command = ("train", str(store_path), str(tmp_path / "run"), str(4 * kills))
    steps: list[int] = []
    for _ in range(kills):
        seen = faults.kill(chance.uniform(0, 1.0), *command)
        if seen is None:
            break
        steps.append(seen)
    assert steps == sorted(steps)  # no step is lost that was saved
    assert len(steps) > kills // 2
    faults.finish(*command)
    faults.finish(*command[:2], str(tmp_path / "whole"), *command[3:])
    assert tree(tmp_path / "run") == tree(tmp_path / "whole")
    rows = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows == sorted(set(rows))


@pytest.mark.parametrize("flips", FLIPS)
def test_a_flipped_bit_anywhere_is_found_and_mended(tmp_path, store_path, proxy, flips):
    chance, good = random.Random(flips), tree(store_path)
    for number in range(flips):
        path = Path(shutil.copytree(store_path, tmp_path / str(number)))
        what = faults.flip(path, chance)
        try:
            found = any(not check.passed for check in verify(str(path), proxy, 0, MACHINE))
        except FastconError:
            found = True
        assert found, what
        assert all(check.passed for check in verify(str(path), proxy, 0, MACHINE, repair=True)), what
        assert tree(path) == good, what
        shutil.rmtree(path)


def test_repair_computes_what_was_damaged_and_nothing_else(copy, proxy, monkeypatch):
    chunk = copy / "teachers" / "letters" / "logits" / "c" / "1" / "2" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    written: list[tuple] = []
    real = StoreWriter.write
    monkeypatch.setattr(StoreWriter, "write", lambda self, *a: (written.append(a[:3]), real(self, *a)))
    assert all(check.passed for check in verify(str(copy), proxy, 8, MACHINE, repair=True))
    assert written == [("letters", 1, 2)]


def test_a_record_lost_with_its_copy_is_said(copy, proxy):
    for name in ("zarr.json", COPY):
        (copy / name).write_bytes((copy / name).read_bytes().replace(b'"seed": 3', b'"seed": 4'))
    with pytest.raises(FastconError, match="are both damaged"):
        verify(str(copy), proxy, 0, MACHINE, repair=True)


def test_a_signal_stops_precompute_with_whole_chunks(tmp_path, proxy, teachers, store_path):
    import os
    import signal

    def poke(done, total):
        if done >= 100:
            os.kill(os.getpid(), signal.SIGTERM)

    path = tmp_path / "s"
    with pytest.raises(
        Interrupted, match=r"stopped by signal 15 after \d+ of 300 rows; run the same command to resume"
    ):
        stage.precompute(str(path), proxy, teachers, RECIPE, 2, MACHINE, BATCH, progress=poke)
    assert Store(path).done("letters").sum() == 1
    stage.precompute(str(path), proxy, teachers, RECIPE, 2, MACHINE, BATCH)
    assert tree(path) == tree(store_path)


def test_a_reader_beside_the_writer_sees_finished_rows_only(tmp_path, proxy, teachers, store_path):
    path, whole, seen = tmp_path / "s", Store(store_path), []

    def look(done, total):
        store = Store(path)
        for name in store.teachers:
            for view, chunk in np.argwhere(store.done(name)):
                assert np.array_equal(store.logits(name, view, chunk), whole.logits(name, view, chunk))
                seen.append((name, view, chunk))

    stage.precompute(str(path), proxy, teachers, RECIPE, 2, MACHINE, BATCH, progress=look)
    assert len(set(seen)) >= 8


def limited(size: int, *command: object) -> subprocess.CompletedProcess[str]:
    """The command line where no file may grow beyond `size` bytes, as on a full disk."""
    return subprocess.run(
        [sys.executable, "-m", "fastcon", *map(str, command)],
        capture_output=True, text=True, timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )  # fmt: skip


def test_a_full_disk_is_one_line_and_the_same_command_resumes(tmp_path, proxy_folder, teacher_file, labelled_folder):
    store, run = tmp_path / "store", tmp_path / "run"
    commands = {
        50_000: ("precompute", proxy_folder, "--store", store, "--views", 1, "--size", 32, "--teacher",
                 f"letters={teacher_file}", "--precision", "float32"),
        100_000: ("train", "--store", store, "--out", run, "--student", teacher_file, "--method", "traditional", "--epochs", 1),
        10: ("probe", teacher_file, "--train", labelled_folder, "--holdout", 0.5, "--trials", 2, "--json",
             tmp_path / "probe.json"),
    }  # fmt: skip
    for size, command in commands.items():
        refused = limited(size, *command)
        assert refused.returncode == 1, refused.stderr
        [line] = [line for line in refused.stderr.splitlines() if "free space" in line] or [refused.stderr]
        assert "File too large" in line
        assert "Traceback" not in refused.stderr
        assert limited(resource.RLIM_INFINITY, *command).returncode == 0
    assert all(check.passed for check in verify(str(store), None, 32, MACHINE))
    assert json.loads((tmp_path / "probe.json").read_text())["results"][0]["accuracies"]
    assert not list(tmp_path.rglob("*.partial"))


def mounts_work() -> bool:
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


def in_a_mount_namespace(script: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """A shell script whose mounts nobody else sees; $fastcon is the command line."""
    script = f"fastcon='{sys.executable} -m fastcon'\n{script}"
    return subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, timeout=timeout)


@pytest.mark.skipif(not mounts_work(), reason="needs the right to mount (root)")
def test_a_full_tmpfs_is_one_line_and_the_same_command_resumes(tmp_path, proxy_folder, teacher_file, store_path):
    """A disk that is really full (ENOSPC); after space is made, what comes out is what an empty disk would have got."""
    disk = tmp_path / "disk"
    disk.mkdir()
    precompute = (
        f"$fastcon precompute {proxy_folder} --store {disk}/store --views 2 --size 32 --teacher l={teacher_file}"
    )
    train = (
        f"$fastcon train --store {disk}/store --student {teacher_file} --method traditional --epochs 1 --out {disk}/run"
    )
    seen = in_a_mount_namespace(
        f"""
        mount -t tmpfs -o size=200k tmpfs {disk}
        {precompute}; echo "rc $?" >&2
        mount -o remount,size=900k {disk}
        set -e
        {precompute} --json {tmp_path}/precompute.json
        set +e
        head -c 1000000 /dev/zero > {disk}/ballast
        {train}; echo "rc $?" >&2
        rm {disk}/ballast; mount -o remount,size=64m {disk}
        set -e
        {train}
        $fastcon verify {disk}/store
        cp -r {disk}/run {tmp_path}/run
        """
    )
    assert seen.returncode == 0, seen.stderr
    assert seen.stderr.count("rc 1") == 2, seen.stderr
    assert len(re.findall("No space left on device.*: free space", seen.stderr)) == 2, seen.stderr
    assert "Traceback" not in seen.stderr
    assert 0 < json.loads((tmp_path / "precompute.json").read_text())["rows_computed"] <= 300
    assert (tmp_path / "run" / "student.safetensors").exists()


def test_a_small_machine_is_enough(tmp_path, proxy_folder, teacher_file, labelled_folder):
    """One core, 1.5 GB of memory, no /dev/shm to speak of."""
    commands = f"""
        run="prlimit --data=1500000000 taskset -c 0 $fastcon"
        $run precompute {proxy_folder} --store {tmp_path}/s --views 1 --size 32 --teacher l={teacher_file}
        $run train --store {tmp_path}/s --student {teacher_file} --method traditional --epochs 1 --out {tmp_path}/r
        $run probe {tmp_path}/r --train {labelled_folder} --holdout 0.5 --trials 2 --json {tmp_path}/probe.json
        """
    if mounts_work():
        seen = in_a_mount_namespace(f"set -e; mount -t tmpfs -o size=4k tmpfs /dev/shm; {commands}")
    else:
        script = f"set -e; fastcon='{sys.executable} -m fastcon'; {commands}"
        seen = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=300)
    assert seen.returncode == 0, seen.stderr
    assert Store(tmp_path / "s").done("l").all()
    assert json.loads((tmp_path / "probe.json").read_text())["results"][0]["accuracies"]


def test_broken_images_among_good_ones(tmp_path, teachers):
    """17 kinds: each is decoded alike by both loaders, or on the reject list with a reason; the run goes on."""
    import os

    from test_decode import rotated, sixteen_bit
    from test_manifest import encoded, write

    folder = tmp_path / "images"
    bad = {
        "empty.jpg": b"", "truncated.jpg": encoded()[:-200], "page.jpg": b"<html></html>", "moving.gif": encoded("GIF"),
        "nothing.bmp": b"BM" + bytes(52), "wide.png": encoded("PNG", (60_000, 1)),
        "film.webp": encoded("WEBP", save_all=True, append_images=[]), "notes.txt": b"no image",
    }  # fmt: skip
    good = {
        "one.png": encoded("PNG", (1, 1)), "sixteen.png": sixteen_bit(), "cmyk.jpg": encoded("JPEG", mode="CMYK"),
        "palette.png": encoded("PNG", mode="P"), "progressive.jpg": encoded("JPEG", progressive=True),
        "rotated.jpg": rotated(), "jpeg-inside.png": encoded("JPEG"), "plain.jpg": encoded(),
    }  # fmt: skip
    for name, data in (bad | good).items():
        write(folder / name, data)
    (folder / "folder.jpg").mkdir()
    (folder / "dangling.jpg").symlink_to("nowhere.jpg")
    write(folder / "locked.jpg", encoded())
    (folder / "locked.jpg").chmod(0)
    may_read = os.access(folder / "locked.jpg", os.R_OK)  # as root nothing is locked
    manifest = index([str(folder)])
    names = {manifest.name(k) for k in range(len(manifest))}
    rejected = dict(manifest.rejects)
    assert set(good) <= names
    assert "locked.jpg" in (names if may_read else rejected)
    expected = set(bad) - {"notes.txt", "film.webp"} | {"dangling.jpg"}
    assert expected <= set(rejected)
    assert all(rejected.values())
    stored = {}
    for loader in ("dali", "torchvision"):
        path = str(tmp_path / loader)
        stage.precompute(
            path, manifest, teachers, replace(RECIPE, chunk_rows=8), 1, replace(MACHINE, loader=loader), BATCH
        )
        stored[loader] = Store(path).samples()[1].astype(np.int16)
    assert np.abs(stored["dali"] - stored["torchvision"]).mean(axis=(1, 2, 3)).max() <= 1.0


def test_an_overflowed_step_in_float16_is_skipped(tmp_path, store_path, generalist_file, monkeypatch):
    """With an absurd loss scale every gradient overflows: nothing may move, and nothing may turn NaN."""
    real = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda device, enabled: real(device, init_scale=2.0**60, enabled=enabled)
    )
    options = replace(QUICK, epochs=1)
    half = replace(MACHINE, precision="float16")
    train(str(store_path), str(tmp_path / "skipped"), options, half, UPKEEP)
    monkeypatch.undo()
    train(str(store_path), str(tmp_path / "moved"), options, half, UPKEEP)
    skipped, moved = (load_file(tmp_path / run / "student.safetensors") for run in ("skipped", "moved"))
    start = load_file(generalist_file)
    weight = "conv1.0.weight"
    assert torch.equal(skipped[weight], start[weight])
    assert moved[weight].isfinite().all()
    assert not torch.equal(moved[weight], start[weight])


@pytest.mark.parametrize("rows", [10**12, 4 * 10**9])
def test_a_record_that_claims_too_much_takes_no_memory(copy, rows):
    rewrite_record(copy, lambda record: record["images"].update(count=rows))
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(FastconError):
        Store(copy).view(0)
    assert time.monotonic() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
                    max_leaves=6)  # fmt: skip


def places(value: object, at: tuple = ()) -> list[tuple]:
    found = [at] if at else []
    if isinstance(value, dict):
        for key, inner in value.items():
            found += places(inner, (*at, key))
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_record_opens_or_is_refused(store_path, tmp_path_factory, data):
    """A record by another hand, with a digest that fits: whatever it says, errors are ours."""
    path = tmp_path_factory.mktemp("fuzz") / "store"
    shutil.copytree(store_path, path)
    record = json.loads((path / COPY).read_text())
    *parents, last = data.draw(st.sampled_from(places(record)))
    value = data.draw(JSON)

    def change(found: dict) -> None:
        for key in parents:
            found = found[key]
        found[last] = value

    rewrite_record(path, change)
    with contextlib.suppress(FastconError):
        store = Store(path)
        store.view(0)
        store.image_columns()
        for name in store.teachers:
            store.logits(name, 0, 0)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60))
def test_any_text_file_of_paths_is_read_or_refused(tmp_path, text):
    (tmp_path / "list.txt").write_text(text, encoding="utf-8", errors="surrogatepass")
    with contextlib.suppress(FastconError):
        index([str(tmp_path / "list.txt")])


def scalars(value: object, at: tuple = ()) -> list[tuple]:
    if isinstance(value, dict):
        return [place for key, inner in value.items() for place in scalars(inner, (*at, key))]
    if isinstance(value, list) and value:
        return [place for k, inner in enumerate(value) for place in scalars(inner, (*at, k))]
    return [at] if isinstance(value, int | str) and not isinstance(value, bool) else []


def test_metadata_that_say_something_else_are_found(copy, store_path, proxy):
    """One value changed in every metadata file, which stays JSON all the same."""
    chance, found_on_read = random.Random(1), 0
    for name, data in Store(store_path).metadata_files().items():
        meta = json.loads(data)
        *parents, last = chance.choice(scalars(meta))
        place = meta
        for key in parents:
            place = place[key]
        place[last] = place[last] - 1 if isinstance(place[last], int) else place[last] + "x"
        (copy / name).write_text(json.dumps(meta))
        try:
            store = Store(copy)
            assert name in store.damaged_metadata()
            if name.removesuffix("/zarr.json") in store.layout:
                store._array(name.removesuffix("/zarr.json"))
        except FastconError:
            found_on_read += 1
        assert all(check.passed for check in verify(str(copy), proxy, 0, MACHINE, repair=True)), name
        assert tree(copy) == tree(store_path), name
    assert found_on_read == len(Store(store_path).layout) + 1  # every array, and the record


def test_a_store_of_one_image_is_whole(tmp_path, proxy, teachers):
    """All of its columns are zeros, which are data all the same."""
    one = proxy.select(np.array([0]))
    stage.precompute(str(tmp_path / "s"), one, teachers, RECIPE, 2, MACHINE, BATCH)
    assert all(check.passed for check in verify(str(tmp_path / "s"), one, 2, MACHINE))
    assert Store(tmp_path / "s").view(1).order.tolist() == [0]


def test_lost_checksums_are_found_in_the_chunks_and_need_no_teacher(copy, store_path, proxy, monkeypatch):
    file = copy / "teachers" / "letters" / "checksums" / "c" / "1" / "0"
    file.write_bytes(b"?" + file.read_bytes()[1:])
    monkeypatch.setattr(stage, "fill", lambda *_: pytest.fail("something was computed again"))
    assert all(check.passed for check in verify(str(copy), proxy, 0, MACHINE, repair=True))
    assert tree(copy) == tree(store_path)

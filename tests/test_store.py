"""The store: read by plain zarr, whole or refused, one writer, grown in place."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from conftest import RECIPE, rewrite_record, tree

from fastcon.data.manifest import index
from fastcon.errors import FastconError
from fastcon.store.reader import Store
from fastcon.store.writer import make_view, open_for_writing


@pytest.fixture
def copy(store_path, tmp_path) -> Path:
    return Path(shutil.copytree(store_path, tmp_path / "store"))


def test_plain_zarr_reads_it(store_path, proxy):
    group = zarr.open_group(str(store_path), mode="r")
    record = group.attrs["fastcon"]
    assert record["format"] == 2
    assert list(record["teachers"]) == ["general", "letters"]
    assert record["teachers"]["letters"]["classes"] == ["a", "b", "c"]
    logits = group["teachers/letters/logits"]
    assert (logits.shape, logits.dtype) == ((2, 150, 3), np.dtype("float16"))
    assert np.array_equal(np.sort(group["order"][1]), np.arange(150))
    assert np.array_equal(group["images/ids"][:], proxy.ids)
    assert np.array_equal(group["boxes"][0], make_view(RECIPE, proxy, 0).boxes)


def test_logits_are_read_back_as_written(store_path):
    store, group = Store(store_path), zarr.open_group(str(store_path), mode="r")
    chunks = [store.logits("general", 1, chunk) for chunk in range(store.chunks)]
    assert [len(chunk) for chunk in chunks] == [64, 64, 22]
    assert np.array_equal(np.concatenate(chunks), group["teachers/general/logits"][1])


def test_a_chunk_of_zeros_is_no_missing_chunk(copy, proxy):
    zeros = np.zeros((64, 3), dtype=np.float16)
    with open_for_writing(copy, proxy, RECIPE, 2, {}) as store:
        store.write("letters", 1, 1, {"logits": zeros})
    assert np.array_equal(Store(copy).logits("letters", 1, 1), zeros)


def chunk_file(store: Path, view: int = 1, chunk: int = 1) -> Path:
    return store / "teachers" / "letters" / "logits" / "c" / str(view) / str(chunk) / "0"


def test_a_missing_chunk_is_an_error_and_never_zeros(copy):
    chunk_file(copy).unlink()
    with pytest.raises(
        FastconError, match=r"teacher 'letters', view 1, chunk 1 \(rows 64 to 127\) is missing.*--repair"
    ):
        Store(copy).logits("letters", 1, 1)


@pytest.mark.parametrize("at", [0, 100, -1])
def test_a_flipped_byte_is_found(copy, at):
    data = bytearray(chunk_file(copy).read_bytes())
    data[at] ^= 0x40
    chunk_file(copy).write_bytes(data)
    with pytest.raises(FastconError, match=r"view 1, chunk 1 .* is damaged"):
        Store(copy).logits("letters", 1, 1)


@pytest.mark.parametrize("change", [-100, -1, 1, 1000])
def test_a_chunk_of_another_length_is_found(copy, change):
    data = chunk_file(copy).read_bytes()
    chunk_file(copy).write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(FastconError, match=rf"view 1, chunk 1 .* is damaged \({len(data) + change} bytes long\)"):
        Store(copy).logits("letters", 1, 1)


def test_a_system_that_gives_only_some_of_a_file_at_once(copy, monkeypatch):
    want, readv = Store(copy).logits("letters", 1, 1), os.readv
    monkeypatch.setattr(os, "readv", lambda fd, buffers: readv(fd, [memoryview(buffers[0]).cast("B")[:100]]))
    assert np.array_equal(Store(copy).logits("letters", 1, 1), want)


def test_a_chunk_in_the_place_of_another_is_found(copy):
    shutil.copy(chunk_file(copy, 0, 0), chunk_file(copy, 1, 1))
    with pytest.raises(FastconError, match="holds other rows than were written"):
        Store(copy).logits("letters", 1, 1)


@pytest.mark.parametrize("name", ["order", "boxes", "flips"])
def test_a_view_that_lost_a_column_is_refused(copy, name):
    for file in (copy / name / "c" / "1").rglob("*"):
        if file.is_file():
            file.unlink()
    with pytest.raises(FastconError, match="missing or damaged"):
        Store(copy).view(1)
    Store(copy).view(0)


def test_another_format_is_refused(copy):
    rewrite_record(copy, lambda record: record.update(format=1))
    with pytest.raises(FastconError, match="store format 1, this fastcon reads format 2"):
        Store(copy)


@pytest.mark.parametrize("kind", ["nothing", "other zarr", "run"])
def test_what_is_no_store_is_refused(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "other zarr":
        zarr.open_group(str(path), mode="w").create_array("a", shape=(2,), dtype="int32")
    elif kind == "run":
        path.mkdir()
        (path / "config.json").write_text("{}")
    with pytest.raises(FastconError, match=r"no fastcon store|no finished fastcon store"):
        Store(path)


def test_a_folder_with_other_files_is_not_written_into(tmp_path, proxy):
    (tmp_path / "thesis.tex").write_text("precious")
    with (
        pytest.raises(FastconError, match=r"holds other files \(thesis.tex"),
        open_for_writing(tmp_path, proxy, RECIPE, 1, {}),
    ):
        pass
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ".lock"] == ["thesis.tex"]


def test_an_interrupted_creation_starts_anew(tmp_path, proxy):
    with open_for_writing(tmp_path / "a", proxy, RECIPE, 1, {}):
        pass
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    meta = json.loads((tmp_path / "b" / "zarr.json").read_text())
    (tmp_path / "b" / "zarr.json").write_text(json.dumps(meta | {"attributes": {}}))
    (tmp_path / "b" / "order" / "c" / "0" / "0").unlink()
    with open_for_writing(tmp_path / "b", proxy, RECIPE, 1, {}):
        pass
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_growing_equals_having_asked_for_more_at_once(tmp_path, proxy):
    for name, counts in (("a", [3]), ("b", [1, 2, 3])):
        for count in counts:
            with open_for_writing(tmp_path / name, proxy, RECIPE, count, {}):
                pass
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_another_recipe_is_refused(copy, proxy):
    from dataclasses import replace

    with (
        pytest.raises(FastconError, match="was made with seed 3, this call says 4"),
        open_for_writing(copy, proxy, replace(RECIPE, seed=4), 2, {}),
    ):
        pass


def test_changed_images_are_named(store_path, proxy_folder, tmp_path):
    folder = Path(shutil.copytree(proxy_folder, tmp_path / "images"))
    store = Store(store_path)
    store.check_images(index([folder]))
    shutil.copy(folder / "000001.jpg", folder / "000000.jpg")
    with pytest.raises(FastconError, match=r"150 images .* these are 150 .*'000000.jpg' has other content"):
        store.check_images(index([folder]))
    (folder / "000000.jpg").unlink()
    with pytest.raises(FastconError, match=r"these are 149 .*'000000.jpg' is gone"):
        store.check_images(index([folder]))
    shutil.copy(proxy_folder / "000000.jpg", folder)
    shutil.copy(proxy_folder / "000000.jpg", folder / "new.jpg")
    with pytest.raises(FastconError, match=r"these are 151 .*'new.jpg' is new"):
        store.check_images(index([folder]))


def test_a_second_writer_is_refused_and_told_who_holds_it(copy, proxy_folder):
    script = (
        "import sys; from fastcon.data.manifest import index; from fastcon.store.reader import Store; from fastcon.store.writer import open_for_writing\n"
        "m = index([sys.argv[2]])\n"
        "with open_for_writing(sys.argv[1], m, Store(sys.argv[1]).recipe, 2, {}): print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(copy), str(proxy_folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        images = index([proxy_folder])
        with (
            pytest.raises(FastconError, match=f"being written by process {other.pid} on "),
            open_for_writing(copy, images, RECIPE, 2, {}),
        ):
            pass
        other.kill()
    with open_for_writing(copy, images, RECIPE, 2, {}):  # the lock of a dead process is free
        pass


def test_names_that_cannot_be_folders_are_refused(copy, proxy):
    with open_for_writing(copy, proxy, RECIPE, 2, {}) as store:
        for name in ("../up", "a/b", "", ".hidden", "x" * 65):
            with pytest.raises(FastconError, match="cannot name a teacher"):
                store.add_teacher(name, {"role": "teacher", "classes": ["a"], "logits": "float16"}, None)


def test_the_run_that_creates_a_store_holds_it_too(tmp_path, proxy):
    with (
        open_for_writing(tmp_path / "s", proxy, RECIPE, 1, {}),
        pytest.raises(FastconError, match="being written by process"),
        open_for_writing(tmp_path / "s", proxy, RECIPE, 1, {}),
    ):
        pass


def test_leftovers_of_a_killed_write_are_removed(copy, proxy, store_path):
    (chunk_file(copy).parent / "0.1234.partial").write_bytes(b"half")
    (copy / "zarr.abcd.partial").write_bytes(b"half")
    with open_for_writing(copy, proxy, RECIPE, 2, {}):
        pass
    assert tree(copy) == tree(store_path)


def test_a_store_that_cannot_be_looked_at_is_not_taken_for_none(copy, proxy):
    (copy / "zarr.json").write_text("{ not json")
    with pytest.raises(FastconError, match="cannot be read"), open_for_writing(copy, proxy, RECIPE, 2, {}):
        pass
    assert (copy / "teachers").exists()

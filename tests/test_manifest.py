"""Manifests: what is listed, what is rejected and why, ids that survive a move, bytes that are checked."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import rng
from PIL import Image

from fastcon.data import manifest as manifests
from fastcon.data.manifest import ImageReader, index
from fastcon.errors import FastconError


def encoded(form: str = "JPEG", size: tuple[int, int] = (40, 30), seed: int = 0, mode: str = "RGB", **options) -> bytes:
    pixels = rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def test_a_folder_of_classes(tmp_path):
    for name in ("b/2.jpg", "a/1.jpg", "b/1.jpg"):
        write(tmp_path / name, encoded(seed=len(name)))
    write(tmp_path / "notes.txt", b"not an image, not looked at")
    found = index([tmp_path])
    assert [found.name(i) for i in range(3)] == ["a/1.jpg", "b/1.jpg", "b/2.jpg"]
    assert found.classes == ["a", "b"]
    assert found.labels.tolist() == [0, 1, 1]
    assert found.widths.tolist() == [40] * 3
    assert found.heights.tolist() == [30] * 3
    assert not found.rejects


def test_one_folder_around_everything_is_no_class(tmp_path):
    write_tar(tmp_path / "a.tar", {"photos/1.jpg": encoded(), "photos/2.jpg": encoded(seed=1)})
    write(tmp_path / "plain" / "1.jpg", encoded())
    assert index([tmp_path / "a.tar"]).classes == []
    assert index([tmp_path / "plain"]).labels.tolist() == [-1]


def test_shards_labels_and_offsets(tmp_path):
    images = {f"set/{c}/{i}.jpg": encoded(seed=i + 10 * ord(c)) for c in "xy" for i in range(3)}
    write_tar(tmp_path / "s-000.tar", dict(list(images.items())[:2]))
    write_tar(tmp_path / "s-001.tar", dict(list(images.items())[2:]))
    found = index([f"{tmp_path}/s-{{000..001}}.tar"])
    assert found.classes == ["x", "y"]
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    reader = ImageReader(found)
    assert [data.tobytes() for data in reader.read(range(6))] == list(images.values())
    reader.close()


def test_ids_do_not_depend_on_where_the_folder_lies(tmp_path):
    for i in range(5):
        write(tmp_path / "one" / f"{i}.jpg", encoded(seed=i))
    before = index([tmp_path / "one"])
    shutil.move(tmp_path / "one", tmp_path / "elsewhere")
    after = index([tmp_path / "elsewhere"])
    assert after.ids.tolist() == before.ids.tolist()
    assert after.digest == before.digest


def test_equal_names_in_two_sources_get_different_ids(tmp_path):
    for folder in ("one", "two", "three"):
        write(tmp_path / folder / "0.jpg", encoded(seed=len(folder)))
    found = index([tmp_path / "one", tmp_path / "two", tmp_path / "three"])
    assert len(set(found.ids.tolist())) == 3
    assert found.ids[0] == index([tmp_path / "one"]).ids[0]


def test_a_text_file_of_paths_with_labels(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.jpg", encoded(seed=i))
    (tmp_path / "list.txt").write_text("2.jpg\tcat\n0.jpg\tdog\ngone.jpg\tdog\n")
    found = index([tmp_path / "list.txt"])
    assert [found.name(i) for i in range(2)] == ["2.jpg", "0.jpg"]
    assert [found.classes[k] for k in found.labels] == ["cat", "dog"]
    assert found.rejects == [("gone.jpg", "no such file")]


def test_several_labels_become_multi_hot(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.jpg", encoded(seed=i))
    (tmp_path / "list.txt").write_text("0.jpg\tred\tlong\n1.jpg\tlong\n2.jpg\n")
    found = index([tmp_path / "list.txt"])
    assert found.classes == ["long", "red"]
    assert found.multi_hot.tolist() == [[1, 1], [1, 0], [0, 0]]
    assert found.labels.tolist() == [-1, -1, -1]


BROKEN = {
    "empty.jpg": (b"", "empty"),
    "page.jpg": (b"<html>not found</html>", "cannot be decoded"),
    "truncated.jpg": (encoded()[:-200], "truncated"),
    "truncated.png": (encoded("PNG")[:1000], "cannot be decoded"),
    "moving.gif": (encoded("GIF"), "GIF is not read"),
    "wide.png": (encoded("PNG", (20_001, 1)), "absurd dimensions 20001 x 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_decoded_is_rejected_with_its_reason(tmp_path, name):
    data, reason = BROKEN[name]
    write(tmp_path / name, data)
    write(tmp_path / "good.jpg", encoded())
    found = index([tmp_path])
    assert len(found) == 1
    [(rejected, why)] = found.rejects
    assert rejected == name
    assert reason in why
    with pytest.raises(FastconError, match=f"first '{name}'"):
        index([tmp_path], strict=True)


def test_a_directory_named_like_an_image_and_a_dangling_link(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    write(tmp_path / "good.jpg", encoded())
    found = index([tmp_path])
    assert [found.name(i) for i in range(len(found))] == ["good.jpg"]
    assert [name for name, _ in found.rejects] == ["link.jpg"]


def test_nothing_readable_is_an_error(tmp_path):
    write(tmp_path / "a.jpg", b"")
    with pytest.raises(FastconError, match=r"no readable image .*1 rejected, first 'a.jpg': empty file"):
        index([tmp_path])


def test_trusting_reads_headers_only(tmp_path):
    write(tmp_path / "truncated.jpg", encoded()[:-200])
    assert len(index([tmp_path], trust=True)) == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [("nowhere", "no such image source"), ("empty", "no images in"), ("a.tar.gz", "compressed tar")],
)
def test_sources_that_are_none(tmp_path, source, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.tar.gz").touch()
    with pytest.raises(FastconError, match=message):
        index([tmp_path / source])


def test_a_tar_is_called_as_it_was_named(tmp_path):
    """And not as the file that a link of this name stands for."""
    write_tar(tmp_path / "blob", {"1.jpg": encoded()})
    (tmp_path / "photos.tar").symlink_to(tmp_path / "blob")
    assert index([tmp_path / "photos.tar"]).name(0) == "photos.tar/1.jpg"


def test_an_unreadable_tar(tmp_path):
    write(tmp_path / "a.tar", b"x" * 2000)
    with pytest.raises(FastconError, match="not a readable tar"):
        index([tmp_path / "a.tar"])


def test_links_in_a_tar_are_never_followed(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("evil.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        header = tarfile.TarInfo("../../up.jpg")
        header.size = len(encoded())
        tar.addfile(header, io.BytesIO(encoded()))
    found = index([tmp_path / "a.tar"])
    assert [name for name, _ in found.rejects] == ["a.tar/evil.jpg"]
    assert ImageReader(found).read([0])[0].tobytes() == encoded()


def test_the_cache_is_used_and_notices_a_touched_file(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jpg", encoded())
    first = index([tmp_path])
    monkeypatch.setattr(manifests, "_examine", lambda *_: pytest.fail("decoded again"))
    cached = index([tmp_path])
    assert cached.digest == first.digest
    assert isinstance(cached.ids, np.memmap)
    monkeypatch.undo()
    path.write_bytes(encoded(seed=9))
    assert index([tmp_path]).digest != first.digest


def test_bytes_are_checked_as_they_are_read(tmp_path):
    path = write(tmp_path / "a.jpg", encoded())
    found = index([tmp_path])
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    with pytest.raises(FastconError, match=r"image 'a.jpg' .* changed"):
        ImageReader(found).read([0])
    path.unlink()
    with pytest.raises(FastconError, match=r"image 'a.jpg' .* cannot be read"):
        ImageReader(found).read([0])


def test_a_torchvision_data_set_of_files(tmp_path):
    for name in ("b/2.jpg", "a/1.jpg"):
        write(tmp_path / name, encoded(seed=len(name)))
    found = index([f"torchvision:ImageFolder?root={tmp_path}"])
    assert [found.classes[k] for k in found.labels] == ["a", "b"]
    assert found.places == [str(tmp_path)]


def test_a_torchvision_data_set_without_files_becomes_a_tar_once(tmp_path):
    source = "torchvision:FakeData?size=6&image_size=(3,20,24)&num_classes=3"
    found = index([source])
    assert len(found) == 6
    assert (found.widths[0], found.heights[0]) == (24, 20)
    stamp = os.stat(found.places[0]).st_mtime_ns
    assert index([source]).digest == found.digest
    assert os.stat(found.places[0]).st_mtime_ns == stamp


def test_select_keeps_names_and_bytes_together(tmp_path):
    for i in range(6):
        write(tmp_path / f"{'x' * i}{i}.jpg", encoded(seed=i))
    found = index([tmp_path])
    some = found.select(np.array([4, 0]))
    assert [some.name(0), some.name(1)] == [found.name(4), found.name(0)]
    assert ImageReader(some).read([1])[0].tobytes() == ImageReader(found).read([0])[0].tobytes()


def test_tiffs_that_decoders_read_differently_are_rejected(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path / "turned.tif", encoded("TIFF", exif=exif))
    write(tmp_path / "bilevel.tif", encoded("TIFF", mode="1"))
    write(tmp_path / "plain.tif", encoded("TIFF"))
    found = index([tmp_path])
    assert [name for name, _ in found.rejects] == ["bilevel.tif", "turned.tif"]
    assert [found.name(i) for i in range(len(found))] == ["plain.tif"]


def test_shards_of_one_class_each_keep_their_labels(tmp_path):
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", {f"{name}/1.jpg": encoded(seed=ord(name))})
    assert index([tmp_path / "a.tar", tmp_path / "b.tar"]).labels.tolist() == [0, 1]
    assert index([tmp_path / "a.tar"]).classes == []


def test_a_damaged_cache_entry_is_made_anew(tmp_path):
    write(tmp_path / "a.jpg", encoded())
    first = index([tmp_path])
    [entry] = [path.parent for path in manifests.cache_folder("manifests").rglob("manifest.json")
               if str(tmp_path) in path.read_text()]  # fmt: skip
    (entry / "ids.npy").write_bytes(b"")
    assert index([tmp_path]).digest == first.digest
    assert isinstance(index([tmp_path]).ids, np.memmap)

"""Near-duplicates: planted ones are found, different images are not, by the library and from the command line."""

from __future__ import annotations

import csv
import io
import tarfile

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import rng
from PIL import Image, ImageEnhance

from fastcon.cli.main import main
from fastcon.data import dedup, rendered
from fastcon.data.manifest import index
from fastcon.errors import FastconError


def altered(image: Image.Image, kind: str) -> bytes:
    width, height = image.size
    image = {
        "resized": lambda: image.resize((width * 2 // 3, height * 2 // 3)),
        "recompressed": lambda: image,
        "cropped": lambda: image.crop((0, 0, round(0.95 * width), round(0.95 * height))),
        "brightened": lambda: ImageEnhance.Brightness(image).enhance(1.3),
    }[kind]()
    out = io.BytesIO()
    image.save(out, "JPEG", quality=30 if kind == "recompressed" else 90)
    return out.getvalue()


KINDS = ("resized", "recompressed", "cropped", "brightened")


def test_planted_duplicates_are_found_and_no_others(tmp_path, shared_data):
    """2,000 different photos, and altered copies of 400 of them: 95 % found, no false pair."""
    originals, copies = tmp_path / "a", tmp_path / "b"
    originals.mkdir()
    copies.mkdir()
    with tarfile.open(shared_data / "proxy-000.tar") as tar:
        photos = [m for m in tar if m.name.endswith(".jpg")][:2000]
        for k, member in enumerate(photos):
            data = tar.extractfile(member).read()
            (originals / f"{k:04d}.jpg").write_bytes(data)
            if k < 400:
                image = Image.open(io.BytesIO(data)).convert("RGB")
                (copies / f"{k:04d}.jpg").write_bytes(altered(image, KINDS[k % 4]))
    a, b = (index([str(folder)], trust=True) for folder in (originals, copies))
    prints = [dedup.fingerprints(manifest) for manifest in (a, b)]
    pairs = dedup.near_duplicates(*prints)
    names = {(a.name(pair.first), b.name(pair.second)) for pair in pairs}
    assert all(one == other for one, other in names)
    for k, kind in enumerate(KINDS):
        found = sum(int(one[:4]) % 4 == k for one, _ in names)
        assert found >= 95, f"{found} of 100 {kind}"
    assert dedup.near_duplicates(prints[0]) == []


def test_from_the_command_line(tmp_path):
    for k in range(6):
        image = rendered.make("shapes", k, 0)
        (tmp_path / "a" / "c").mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "a" / "c" / f"{k}.png")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "copy.jpg").write_bytes(
        altered(Image.open(tmp_path / "a" / "c" / "3.png").convert("RGB"), "resized")
    )
    arguments = ["dedup", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "1 near-duplicate pairs among 6 and 1 images" in result.output
    [row] = csv.DictReader((tmp_path / "out" / "pairs.csv").open())
    assert (row["first"], row["second"]) == ("c/3.png", "copy.jpg")
    assert Image.open(tmp_path / "out" / "sheet.png").size[0] > 400


def test_candidates_are_all_pairs_within_the_distance():
    a, b = (rng(seed).integers(0, 2**64, (n, 2), dtype=np.uint64) for seed, n in ((0, 20), (1, 30)))
    b[5] = a[13] ^ np.uint64(0b111)
    b[29, 1] = a[2, 0]
    b[7, 0] = a[19, 1] ^ np.uint64(0x8001_8001_8001_8001)  # eight bits, two in every quarter
    assert dedup._candidates(a, b, 4, None, None) == [(2, 29), (13, 5)]
    for distance in (8, 20):
        every = [(i, j) for i in range(20) for j in range(30) if dedup._bits(a[i], b[j]) <= distance]
        assert dedup._candidates(a, b, distance, None, None) == every


def test_even_pictures_are_no_duplicates():
    grey = np.full((2, dedup.SIDE, dedup.SIDE), 128, dtype=np.uint8)
    prints = dedup.Prints(np.zeros((2, 2), dtype=np.uint64), grey)
    assert dedup.near_duplicates(prints) == []


@pytest.mark.slow
def test_a_hundred_thousand_against_as_many_compare_in_minutes():
    import time

    random = rng()
    grey = np.zeros((100_000, dedup.SIDE, dedup.SIDE), dtype=np.uint8)
    a, b = (dedup.Prints(random.integers(0, 2**64, (100_000, 6), dtype=np.uint64), grey) for _ in range(2))
    started = time.monotonic()
    assert dedup.near_duplicates(a, b) == []
    assert time.monotonic() - started < 300


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (6, 8), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    for name, pixels in (("a/8.png", image), ("b/16.png", image.astype(np.uint16) * 257)):
        (tmp_path / name).parent.mkdir()
        Image.fromarray(pixels).save(tmp_path / name)
    first, second = (dedup.fingerprints(index([tmp_path / name])) for name in "ab")
    [pair] = dedup.near_duplicates(first, second)
    assert (pair.bits, round(pair.correlation, 6)) == (0, 1.0)


def test_an_image_that_does_not_decode_is_named(tmp_path):
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    with pytest.raises(FastconError, match=r"image 'torn\.png' does not decode"):
        dedup.fingerprints(index([tmp_path], trust=True))

"""How time and memory grow with the number of images: every stage at n and at 10 n, in a process of its own each.

The images are as many entries of a manifest as are asked for, all of them the same small file, and the logits are
constants: what is measured is everything but pixels and networks.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from fastcon.bench import Row, Say
from fastcon.bench.fixtures import manifest_of, photos
from fastcon.data import decode
from fastcon.data.manifest import ImageSet, Manifest, Share, index
from fastcon.distill import verify
from fastcon.distill.loader import Loader
from fastcon.machine import Machine
from fastcon.store import parts
from fastcon.store.codec import codec
from fastcon.store.format import Recipe, TeacherRecord
from fastcon.store.pixels import decode_samples
from fastcon.store.writer import StoreWriter, open_for_writing, set_samples
from fastcon.transfer.few_shot import few_shot

CLASSES, VIEWS, PART = 10, 2, 100_000
RECIPE = Recipe(size=32)
MACHINE = Machine("cpu")
TEACHER = TeacherRecord("teacher", weights="constant", classes=tuple(str(k) for k in range(CLASSES)))


def bench(say: Say, rows: int = 10_000_000, smallest: int = 10_000) -> list[Row]:
    """Seconds and peak memory of each stage at `smallest`, 10 times that, … up to `rows` images (index and probe: a million).

    A row compares a stage with ten times its seconds at a tenth of the images: a ratio of 1 is linear growth, 10 none.
    """
    sizes = [smallest * 10**k for k in range(round(math.log10(rows / smallest)) + 1)]
    made: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for stage in STAGES:
            before: dict[str, float] | None = None
            for size in (size for size in sizes if size <= MOST.get(stage, size)):
                now = _measured(stage, size, Path(scratch))
                say(f"{stage}, {size:,} images: {now['seconds']:.2f} s, {now['megabytes']:,.0f} MB")
                if before:
                    made.append(_row(stage, size, now, before))
                before = now
    return made


def _measured(stage: str, size: int, scratch: Path) -> dict[str, float]:
    """Run a stage in a process of its own."""
    command = [sys.executable, "-m", "fastcon.bench.growth", stage, str(size), str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _row(stage: str, size: int, now: dict[str, float], before: dict[str, float]) -> Row:
    linear = 10 * before["seconds"]
    return {
        "name": f"growth, {stage}",
        "case": f"{size:,} images",
        "ours": now["seconds"],
        "theirs": linear,
        "unit": "s",
        "ratio": linear / now["seconds"],
        "exponent": math.log10(now["seconds"] / before["seconds"]),
        "megabytes": now["megabytes"],
        "megabytes_of_a_tenth": before["megabytes"],
        "n": 1,
        "device": "cpu",
    }


def _images(scratch: Path, rows: int, first: int = 0) -> Manifest:
    """A manifest of the same small file again and again, its ids counting from `first`."""
    folder = scratch / "photo"
    if not folder.exists():
        photos(folder, 1, 48, 40)
    data = (folder / "00000.jpg").read_bytes()
    plain = manifest_of(rows)
    name = np.frombuffer(b"00000.jpg", dtype=np.uint8)
    return dataclasses.replace(
        plain,
        ids=plain.ids + np.uint64(first),
        sizes=np.full(rows, len(data)),
        widths=np.full(rows, 48, np.int32),
        heights=np.full(rows, 40, np.int32),
        checksums=np.full(rows, google_crc32c.value(data), np.uint32),
        names=np.tile(name, rows),
        name_ends=len(name) * np.arange(1, rows + 1),
        places=[str(folder)],
        sources=[str(folder)],
    )


def _fill(path: Path, images: Manifest) -> None:
    """A finished store of one teacher whose logits are constants."""
    with open_for_writing(str(path), images, RECIPE, VIEWS, decode.settings(MACHINE)) as store:
        set_samples(store, decode_samples(store, images, MACHINE))
        store.add_teacher("constant", TEACHER, None)
        _write(store)


def _write(store: StoreWriter) -> None:
    for view in range(VIEWS):
        for chunk in range(store.chunks):
            start, stop = store.chunk_range(chunk)
            (part, (dtype, width)), *_ = codec(TEACHER.logits).parts(CLASSES).items()
            store.write("constant", view, chunk, {part: np.ones((stop - start, width), dtype)})


class _PartsOfOneImage(ImageSet):
    """Parts of PART images each."""

    def __init__(self, scratch: Path) -> None:
        self.sources, self._scratch = [str(scratch / "photo")], scratch

    def manifest(self, share: Share | None = None) -> Manifest:
        """See ImageSet."""
        assert share is not None
        return dataclasses.replace(_images(self._scratch, PART, share.number * PART), share=share)


def _index(scratch: Path, rows: int) -> Callable[[], object]:
    """The headers of a tar are read, and of its images."""
    folder = scratch / "photo"
    if not folder.exists():
        photos(folder, 1, 48, 40)
    data, path = (folder / "00000.jpg").read_bytes(), scratch / f"{rows}.tar"
    if not path.exists():
        with tarfile.open(path, "w") as tar:
            for k in range(rows):
                member = tarfile.TarInfo(f"{k:08d}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return lambda: index([str(path)], trust=True)


def _precompute(scratch: Path, rows: int) -> Callable[[], object]:
    images = _images(scratch, rows)
    return lambda: _fill(scratch / f"store-{rows}", images)


def _train_start(scratch: Path, rows: int) -> Callable[[], object]:
    images = _images(scratch, rows)
    return lambda: next(iter(Loader(str(scratch / f"store-{rows}"), images, 32, seed=1)))


def _verify(scratch: Path, rows: int) -> Callable[[], object]:
    images = _images(scratch, rows)
    return lambda: verify.verify(str(scratch / f"store-{rows}"), images, 0, MACHINE)


def _parts(scratch: Path, rows: int) -> Callable[[], object]:
    """Parts of the same size, one or more."""
    path, images, count = scratch / f"parts-{rows}", _PartsOfOneImage(scratch), -(-rows // PART)

    def make() -> None:
        shared = (parts.Shared(images.sources, count),)
        binding = parts.Binding(shared, RECIPE, decode.settings(MACHINE), {"constant": TEACHER})
        for number in range(count):
            folder = parts.folder(str(path), number)
            _fill(Path(folder), images.manifest(Share(number, count)))
            binding.bound[number] = parts.Bound.of(parts.Store(folder))
        with parts.changing(str(path)) as write:
            write(binding)

    return make


def _start_of_parts(scratch: Path, rows: int) -> Callable[[], object]:
    images = _PartsOfOneImage(scratch)
    return lambda: next(iter(Loader(str(scratch / f"parts-{rows}"), images, 32, seed=1)))


def _probe(_: Path, rows: int) -> Callable[[], object]:
    """All rows, 32 features, 10 classes."""
    random = np.random.default_rng(0)
    centres, labels = random.normal(0, 1, (CLASSES, 32)), np.arange(rows) % CLASSES
    features = (centres[labels] + random.normal(0, 2, (rows, 32))).astype(np.float32)
    return lambda: few_shot(features, labels, features[:1000], labels[:1000], shots=None, c_grid=[1e-3], device="cpu")


STAGES: dict[str, Callable[[Path, int], Callable[[], object]]] = {
    "index": _index,
    "precompute": _precompute,
    "train_start": _train_start,
    "verify": _verify,
    "parts": _parts,
    "start_of_parts": _start_of_parts,
    "probe": _probe,
}
"""Name → (scratch folder, images) → what is timed; some need what those before them have made."""
MOST = {"index": 1_000_000, "probe": 1_000_000}
"""Most images of a stage: more would take 25 GB of disk, or an hour."""


def main(stage: str, rows: str, scratch: str) -> None:
    """Time one stage and print its seconds and the most memory of this process."""
    work = STAGES[stage](Path(scratch), int(rows))
    started = time.perf_counter()
    work()
    facts: dict[str, Any] = {"seconds": time.perf_counter() - started}
    facts["megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])

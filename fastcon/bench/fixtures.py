"""What several benchmarks need: images, and a store with logits of any width that no teacher had to compute."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fastcon.data import rendered
from fastcon.data.manifest import Manifest, index
from fastcon.machine import Machine
from fastcon.store import bake
from fastcon.store.codec import codec
from fastcon.store.format import Recipe, TeacherRecord
from fastcon.store.pixels import decode_samples
from fastcon.store.writer import open_for_writing, set_samples

RENDERED = 256
"""Most distinct photos to render."""


def photos(folder: Path, count: int, width: int = 500, height: int = 375) -> Path:
    """JPEGs of that size with the detail and the bytes of photos: a rendered image enlarged, over noise of falling strength.

    At this quality they take 0.57 bytes per pixel, as ImageNet's photos do (0.57 over 63 of them; 0.36 at quality 90).
    """
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    kinds = list(rendered.DOMAINS)
    for k in range(count):
        random = np.random.default_rng(k)
        drawn = rendered.make(kinds[k % len(kinds)], k, 0).resize((width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(drawn, dtype=np.float32)
        for scale, strength in ((1, 6), (4, 12), (16, 25)):
            small = random.normal(0, strength, (height // scale + 1, width // scale + 1))
            pixels = pixels + np.kron(small, np.ones((scale, scale)))[:height, :width, None]
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{k:05d}.jpg", quality=96)
    return folder


def image_files(images: Sequence[str], scratch: Path, count: int, width: int, height: int) -> list[Path]:
    """`count` files in scratch/photos: those of `images`, taken out of tars, or rendered ones; if there are few, they repeat."""
    folder = scratch / "photos"
    if images:
        manifest = index(list(images))
        folder.mkdir(parents=True)
        reader = manifest.reader()
        for k, data in enumerate(reader.read(range(min(len(manifest), count)))):
            (folder / f"{k:05d}{Path(manifest.name(k)).suffix}").write_bytes(data.tobytes())
        reader.close()
    else:
        photos(folder, min(count, RENDERED), width, height)
    files = sorted(folder.iterdir())
    for number in range(len(files), count):
        again = files[number % len(files)]
        shutil.copy(again, folder / f"z{number:05d}{again.suffix}")
    return sorted(folder.iterdir())


def store_of(
    path: Path,
    manifest: Manifest,
    recipe: Recipe,
    views: int,
    widths: list[int],
    machine: Machine,
    kind: str = "float16",
) -> Path:
    """A finished store whose teachers are normal random logits of these widths."""
    with open_for_writing(str(path), manifest, recipe, views, {}) as writer:
        if recipe.bake is not None:
            bake.bake(writer, manifest, bake.missing(writer, views), machine)
        set_samples(writer, decode_samples(writer, manifest, machine))
        for number, width in enumerate(widths):
            name = f"teacher-{number}"
            classes = tuple(str(k) for k in range(width))
            writer.add_teacher(name, TeacherRecord("teacher", weights=name, classes=classes, logits=kind), None)
            random = torch.Generator().manual_seed(number)
            for view in range(views):
                for chunk in range(writer.chunks):
                    start, stop = writer.chunk_range(chunk)
                    logits = 3 * torch.randn(stop - start, width, generator=random)
                    parts = {part: rows.numpy() for part, rows in codec(kind).encode(logits).items()}
                    writer.write(name, view, chunk, parts)
    return path


def manifest_of(rows: int) -> Manifest:
    """A manifest of images that do not exist: for stores whose pixels are never read."""
    ids: NDArray[np.uint64] = np.arange(rows, dtype=np.uint64)
    side = np.full(rows, 64, dtype=np.int32)
    zeros = np.zeros(rows, dtype=np.int64)
    names = np.frombuffer(b"".join(b"%08d" % k for k in range(rows)), dtype=np.uint8)
    return Manifest(
        ids=ids,
        containers=zeros.astype(np.int32),
        offsets=zeros - 1,
        sizes=zeros,
        widths=side,
        heights=side,
        digests=np.zeros((rows, 16), dtype=np.uint8),
        checksums=np.zeros(rows, dtype=np.uint32),
        names=names,
        name_ends=8 * np.arange(1, rows + 1),
        labels=np.full(rows, -1, dtype=np.int32),
        multi_hot=np.zeros((rows, 0), dtype=np.uint8),
        places=["/nowhere"],
        classes=[],
        rejects=[],
        sources=["/nowhere"],
    )

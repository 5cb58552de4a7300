"""Views baked into a store: each crop that the teachers see, as a small JPEG in a tar shard of the store.

Decoding the whole photo and cutting the crop out of it happens once, here; teachers and students decode the JPEG.
Shards are WebDataset tars, one per chunk, their members in row order: the file of row 5 of view 0 is
STORE/shards/view-000/chunk-00000.tar/000000005.jpg.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from fastcon.data.decode import Request, Requests, decode
from fastcon.data.manifest import Manifest
from fastcon.errors import Interrupted
from fastcon.machine import Machine
from fastcon.store.reader import Store
from fastcon.store.replay import Replay
from fastcon.store.writer import StoreWriter

Place = tuple[int, int]
"""View and chunk."""


def missing(store: Store, views: int) -> list[Place]:
    """The (view, chunk) of the first `views` views whose shard is not written yet."""
    done = store.baked()[:views]
    return [(int(view), int(chunk)) for view, chunk in np.argwhere(~done)]


def bake(
    store: StoreWriter,
    manifest: Manifest,
    work: list[Place],
    machine: Machine,
    batch_size: int = 128,
    progress: Callable[[int, int], None] | None = None,
    stop: Sequence[int] = (),
) -> None:
    """Write the shards of `work`. progress gets (rows done, rows to do). Raises Interrupted as `precompute.fill` does."""
    size, quality = store.recipe.size, store.recipe.bake
    assert quality is not None
    spans = [store.chunk_range(chunk) for _, chunk in work]
    total, done = sum(end - start for start, end in spans), 0
    batches = [
        (place, slice(at, min(at + batch_size, end)), end)
        for place, (start, end) in zip(work, spans, strict=True)
        for at in range(start, end, batch_size)
    ]

    replay = Replay(store, manifest)

    def requests() -> Requests:
        for (number, _), rows, _ in batches:
            view = replay.view(number)
            yield Request(view.order[rows], view.boxes[rows], view.flips[rows])

    parts: list[bytes] = []
    decoded = decode(manifest, requests(), [size], batch_size, machine)
    with ThreadPoolExecutor(machine.cores) as pool:
        for ((view, chunk), rows, end), pixels in zip(batches, decoded, strict=True):
            views = pixels[size].permute(0, 2, 3, 1).cpu().numpy()
            files = pool.map(encode, views, [quality] * len(views))
            parts += [member(row, data) for row, data in enumerate(files, rows.start)]
            if rows.stop == end:
                store.write_shard(view, chunk, b"".join([*parts, bytes(1024)]))
                parts = []
            done += len(views)
            if progress:
                progress(done, total)
            if stop:
                raise Interrupted(
                    f"stopped by signal {stop[0]} after {done} of {total} views were baked; run the same command to resume"
                )


def encode(pixels: NDArray[np.uint8], quality: int) -> bytes:
    """A view [size, size, 3] as JPEG."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=quality)
    return out.getvalue()


def member(row: int, data: bytes) -> bytes:
    """A file of a tar: its header, its bytes, and the padding to whole blocks of 512."""
    header = tarfile.TarInfo(f"{row:09d}.jpg")
    header.size = len(data)
    return header.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)

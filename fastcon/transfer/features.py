"""Frozen features and logits of images at the centre crop. Features are cached on disk, keyed by network, images and settings."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fastcon.data import decode, views
from fastcon.data.decode import Request
from fastcon.data.manifest import Manifest
from fastcon.files import cache_folder, derived
from fastcon.machine import Machine
from fastcon.models.classifier import Classifier
from fastcon.ranks import ALONE, Ranks

Progress = Callable[[int, int], None]


def features(
    model: Classifier,
    manifest: Manifest,
    machine: Machine,
    size: int | None = None,
    batch_size: int = 128,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> NDArray[np.float32]:
    """Features [n, D] of every image of a manifest, from the cache where this model has seen these images.

    ranks: of several each computes some of the batches, and all get everything; all of them must call.
    """
    machine, size = machine.settled(), size or model.size
    path = cache_folder("features") / f"{_key(model, manifest, machine, size)}.npy"
    cached = _cached(path, (len(manifest), model.feature_size))
    everywhere = all(ranks.all(cached is not None))
    if cached is not None and everywhere:
        return cached
    out = _of_batches(model.features, manifest, np.arange(len(manifest)), size, batch_size, machine, ranks, progress)
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
            path.unlink(missing_ok=True)  # an entry that could not be loaded
            derived(path, lambda partial: _save(partial, out))
    return out


def _cached(path: Path, shape: tuple[int, int]) -> NDArray[np.float32] | None:
    if path.exists():
        with contextlib.suppress(ValueError, OSError):
            cached = np.load(path, mmap_mode="r")
            return cached if cached.shape == shape else None
    return None


def _of_batches(
    network: Callable[[torch.Tensor], torch.Tensor],
    manifest: Manifest,
    indices: NDArray[np.intp],
    size: int,
    batch_size: int,
    machine: Machine,
    ranks: Ranks,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """What a network makes of some images [m, …]: the same batches whoever computes them, so the same values."""
    share = ranks.share(-(-len(indices) // batch_size))
    mine, out = indices[share.start * batch_size : share.stop * batch_size], None
    with machine.computing(turns=ranks.count == 1) as cores:
        for rows, pixels in center_crops(manifest, mine, size, batch_size, machine) if len(mine) else ():
            with cores.turn(), torch.inference_mode(), machine.autocast():
                values = network(pixels).float().cpu().numpy()
            out = np.empty((len(mine), *values.shape[1:]), dtype=np.float32) if out is None else out
            out[rows] = values
            if progress:
                progress(rows.stop * len(indices) // len(mine), len(indices))
    parts = [part for part in ranks.all(out) if part is not None]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _save(path: Path, features: NDArray[np.float32]) -> None:
    with open(path, "wb") as file:  # given a path, NumPy would add an ending to it
        np.save(file, features)


def logits(
    model: Classifier,
    manifest: Manifest,
    indices: NDArray[np.intp],
    machine: Machine,
    batch_size: int = 128,
    ranks: Ranks = ALONE,
) -> NDArray[np.float32]:
    """Logits [m, C of all heads] of some images at the centre crop, as large as the model's input; ranks: as in `features`."""
    return _of_batches(model, manifest, indices, model.size, batch_size, machine.settled(), ranks)


def center_crops(
    manifest: Manifest, indices: NDArray[np.intp], size: int, batch_size: int, machine: Machine
) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, uint8 pixels [B, 3, size, size]): the short side taken to size * 256 / 224, its centre cut out."""
    slices = [slice(a, min(a + batch_size, len(indices))) for a in range(0, len(indices), batch_size)]

    def requests() -> Iterator[Request]:
        for rows in slices:
            chosen = indices[rows]
            boxes = views.center_boxes(manifest.widths[chosen], manifest.heights[chosen])
            yield Request(chosen, boxes, np.zeros(len(chosen), dtype=np.uint8))

    decoded = decode.decode(manifest, requests(), [size], batch_size, machine)
    for rows, pixels in zip(slices, decoded, strict=True):
        yield rows, pixels[size]


def _key(model: Classifier, manifest: Manifest, machine: Machine, size: int) -> str:
    used = {
        "weights": model.digest(),
        "mean": model.mean,
        "std": model.std,
        "images": manifest.digest,
        "size": size,
        "precision": machine.precision,
        "pipeline": decode.settings(machine),
        "torch": torch.__version__,
        "version": 1,
    }
    return hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()[:32]

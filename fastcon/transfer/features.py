"""Frozen features and logits of images at the centre crop. Features are cached on disk, keyed by network, images and settings."""

from __future__ import annotations

import contextlib
import hashlib
import json
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

Progress = Callable[[int, int], None]


def features(
    model: Classifier,
    manifest: Manifest,
    machine: Machine,
    size: int | None = None,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Features [n, D] of every image of a manifest, from the cache where this model has seen these images."""
    machine, size = machine.settled(), size or model.size
    path = cache_folder("features") / f"{_key(model, manifest, machine, size)}.npy"
    if path.exists():
        with contextlib.suppress(ValueError, OSError):
            cached = np.load(path, mmap_mode="r")
            if cached.shape == (len(manifest), model.feature_size):
                return cached
    out = np.empty((len(manifest), model.feature_size), dtype=np.float32)
    everything = np.arange(len(manifest))
    with machine.computing() as cores:
        for rows, pixels in center_crops(manifest, everything, size, batch_size, machine):
            with cores.turn(), torch.inference_mode(), machine.autocast():
                out[rows] = model.features(pixels).cpu().numpy()
            if progress:
                progress(rows.stop, len(manifest))
    with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
        path.unlink(missing_ok=True)  # an entry that could not be loaded
        derived(path, lambda partial: _save(partial, out))
    return out


def _save(path: Path, features: NDArray[np.float32]) -> None:
    with open(path, "wb") as file:  # given a path, NumPy would add an ending to it
        np.save(file, features)


def logits(
    model: Classifier, manifest: Manifest, indices: NDArray[np.intp], machine: Machine, batch_size: int = 128
) -> NDArray[np.float32]:
    """Logits [m, C of all heads] of some images at the centre crop, as large as the model's input."""
    machine, parts = machine.settled(), []
    with machine.computing() as cores:
        for _, pixels in center_crops(manifest, indices, model.size, batch_size, machine):
            with cores.turn(), torch.inference_mode(), machine.autocast():
                parts.append(model(pixels).float().cpu().numpy())
    return np.concatenate(parts)


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

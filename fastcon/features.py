"""Frozen features and logits of images at the centre crop. Features are cached on disk by what made them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from fastcon import models, pipeline, views
from fastcon.machine import Cores
from fastcon.manifest import Manifest, cache_folder
from fastcon.models import Classifier
from fastcon.pipeline import Request
from fastcon.precompute import Settings

Progress = Callable[[int, int], None]


def features(
    model: Classifier, manifest: Manifest, settings: Settings, size: int | None = None, progress: Progress | None = None
) -> NDArray[np.float32]:
    """Features [n, D] of every image of a manifest, from the cache where this model has seen these images."""
    size = size or model.size
    path = cache_folder("features") / f"{_key(model, manifest, settings, size)}.npy"
    if path.exists():
        with contextlib.suppress(ValueError, OSError):
            cached = np.load(path, mmap_mode="r")
            if cached.shape == (len(manifest), model.feature_size):
                return cached
    out = np.empty((len(manifest), model.feature_size), dtype=np.float32)
    everything = np.arange(len(manifest))
    with Cores(settings.threads, settings.device) as cores:
        for rows, pixels in center_crops(manifest, everything, size, settings):
            with cores.turn(), torch.inference_mode(), models.precision_context(settings.precision, settings.device):
                out[rows] = model.features(pixels).cpu().numpy()
            if progress:
                progress(rows.stop, len(manifest))
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.npy")
        np.save(partial, out)
        os.replace(partial, path)
    return out


def logits(
    model: Classifier, manifest: Manifest, indices: NDArray[np.intp], settings: Settings, size: int | None = None
) -> NDArray[np.float32]:
    """Logits [m, C of all heads] of some images at the centre crop."""
    parts = []
    with Cores(settings.threads, settings.device) as cores:
        for _, pixels in center_crops(manifest, indices, size or model.size, settings):
            with cores.turn(), torch.inference_mode(), models.precision_context(settings.precision, settings.device):
                parts.append(model(pixels).float().cpu().numpy())
    return np.concatenate(parts)


def center_crops(
    manifest: Manifest, indices: NDArray[np.intp], size: int, settings: Settings
) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, uint8 pixels [B, 3, size, size]): the short side taken to size * 256 / 224, its centre cut out."""
    slices = [slice(a, min(a + settings.batch_size, len(indices))) for a in range(0, len(indices), settings.batch_size)]

    def requests() -> Iterator[Request]:
        for rows in slices:
            here = indices[rows]
            boxes = views.center_boxes(manifest.widths[here], manifest.heights[here])
            yield Request(here, boxes, np.zeros(len(here), dtype=np.uint8))

    decoded = pipeline.decode(manifest, requests(), [size], settings)
    for rows, pixels in zip(slices, decoded, strict=True):
        yield rows, pixels[size]


def _key(model: Classifier, manifest: Manifest, settings: Settings, size: int) -> str:
    used = {
        "weights": model.digest(),
        "mean": model.mean,
        "std": model.std,
        "images": manifest.digest,
        "size": size,
        "precision": settings.precision,
        "pipeline": pipeline.settings(settings.loader, settings.device),
        "torch": torch.__version__,
        "version": 1,
    }
    return hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()[:32]

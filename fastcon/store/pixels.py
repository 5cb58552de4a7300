"""The decoded pixels of a few rows, kept in every store: every user decodes them again and compares."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastcon.data import decode
from fastcon.data.manifest import Manifest
from fastcon.errors import FastconError
from fastcon.machine import Machine
from fastcon.store.reader import Store, sample_rows
from fastcon.store.replay import Replay


def decode_samples(store: Store, manifest: Manifest | None, machine: Machine) -> NDArray[np.uint8]:
    """Decode the store's sample rows: uint8 [k, size, size, 3]."""
    replay = Replay(store, manifest)
    rows = sample_rows(store)
    size = store.recipe.size
    [pixels] = decode.decode(replay.images, [replay.request(0, rows)], [size], len(rows), machine)
    return pixels[size].permute(0, 2, 3, 1).contiguous().cpu().numpy()


def check_pixels(store: Store, manifest: Manifest | None, machine: Machine, exact: bool) -> str | None:
    """Decode the sample rows again and compare them with the stored pixels.

    None: equal. A warning to show: within 0.5 of 255 on average. Raises FastconError beyond, or with `exact` for
    any difference.
    """
    _, stored = store.samples()
    difference = float(np.abs(decode_samples(store, manifest, machine).astype(np.int16) - stored).mean())
    if difference == 0:
        return None
    was, now = store.record.pipeline, decode.settings(machine)
    changed = ", ".join(
        f"{key} {was.get(key)} → {now.get(key)}" for key in sorted({*was, *now}) if was.get(key) != now.get(key)
    )
    what = (
        f"images decode differently from when {store.path} was made: {difference:.3f} of 255 on average over "
        f"{len(stored)} samples ({changed or 'same settings'})"
    )
    if exact or difference > 0.5:
        raise FastconError(f"{what}: use the loader, device and versions that made it, or make a new store")
    return what

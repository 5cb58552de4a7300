"""The commands as functions: the same names and defaults as on the command line, errors that name parameters."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastcon.data.manifest import ImageSet, Manifest
from fastcon.distill import parts
from fastcon.distill import precompute as precomputing
from fastcon.distill import train as training
from fastcon.distill.options import PrecomputeOptions, TrainOptions, Upkeep
from fastcon.errors import UsageError
from fastcon.machine import Machine
from fastcon.options import refuse, take

Say = Callable[[str], None]
Progress = Callable[[int, int], None]


def precompute(
    images: Manifest | Sequence[str] | str,
    store: str | os.PathLike[str],
    views: int,
    *,
    generalist: Mapping[str, str] | None = None,
    teachers: Mapping[str, str] | None = None,
    say: Say = lambda line: None,
    progress: Progress | None = None,
    **options: Any,
) -> int:
    """Run every teacher once over augmented views of images and store its logits; rows computed (0: all were there).

    images: IMAGES, or their manifest. generalist: {name: MODEL}; teachers: {name: MODEL, …}. options: those of
    `PrecomputeOptions` (seed, size, scale, logits, bake, bake_quality, batch_size, compile, parts, part, add) and `Machine`
    (device, precision, loader, threads). Running it again resumes; more views or teachers compute just those. Raises FastconError.
    """
    if len(generalist or {}) > 1:
        raise UsageError("`generalist` is one {name: MODEL}")
    chosen, machine = take(PrecomputeOptions, options), take(Machine, options)
    refuse(options, PrecomputeOptions, Machine)
    first = next(iter((generalist or {}).items()), None)
    loaded = precomputing.load_teachers(first, list((teachers or {}).items()), chosen.size)
    if not loaded:
        raise UsageError("no teacher given: `generalist` {name: MODEL}, `teachers` {name: MODEL, …}, or both")
    given = (
        images
        if isinstance(images, Manifest)
        else ImageSet([images] if isinstance(images, str | os.PathLike) else images)
    )
    return parts.make(os.fspath(store), given, loaded, chosen, views, machine, progress, say)


def train(
    store: str | os.PathLike[str],
    out: str | os.PathLike[str],
    images: Manifest | Sequence[str] | str | None = None,
    *,
    say: Say = lambda line: None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train a student on stored logits; the last row of its metrics: step, loss, and of each head loss, KL, agreement.

    images: where the images are now (default: where they were). options: those of `TrainOptions` (student, method, heads,
    views, balance, weight, temperature, epochs, batch_size, lr_backbone, …: the paper's Eq. 1 and section 3), `Upkeep`
    (log_every, checkpoint_minutes, …) and `Machine`. Running it again resumes. Raises FastconError.
    """
    chosen, upkeep, machine = take(TrainOptions, options), take(Upkeep, options), take(Machine, options)
    refuse(options, TrainOptions, Upkeep, Machine)
    return training.train(os.fspath(store), os.fspath(out), chosen, machine, upkeep, images, say=say, progress=progress)

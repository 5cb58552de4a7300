"""The paper's probe: few-shot linear SVMs on the frozen features of each backbone, on the same draws for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastcon.data import splits
from fastcon.data.options import Index, Task
from fastcon.data.splits import Subset
from fastcon.errors import UsageError
from fastcon.machine import Machine
from fastcon.models.classifier import Classifier
from fastcon.models.load import load
from fastcon.models.origin import origin
from fastcon.ranks import Ranks, join
from fastcon.transfer import options as defaults
from fastcon.transfer.features import Progress, features
from fastcon.transfer.few_shot import Result, few_shot
from fastcon.transfer.options import TRIALS, ProbeOptions

Bar = Callable[[str, str], Progress]
"""(what, unit) → progress(done, total)."""


def probe(
    backbones: Sequence[str],
    task: Task,
    options: ProbeOptions,
    machine: Machine,
    index: Index,
    bar: Bar = lambda what, unit: lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
    show: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Accuracy of the frozen features of each backbone (a MODEL). show is called with each row of results as it is done.

    Under torchrun the ranks share images and trials, and come to the same results.
    """
    machine = machine.settled()
    ranks = join(machine.target)
    if not ranks.first:
        bar, say, show = (lambda what, unit: lambda done, total: None), (lambda line: None), (lambda row: None)
    with ranks.agreeing(in_turn=True):
        train, test = task.parts(index)
    several = splits.MULTI_LABEL_SHOTS if train.multi_label else splits.SHOTS
    shots, trials = (None, 1) if options.full else (options.shots or several, options.trials or TRIALS)
    with ranks.agreeing(in_turn=True):
        models = {spec: load(spec) for spec in backbones}
        size = options.size or common_size({spec: model.size for spec, model in models.items()})
    say(f"{len(train.classes)} classes, {len(train):,} training and {len(test):,} test images, {size} px")
    record = {
        "command": "probe",
        "backbones": list(backbones),
        **task.record(),
        "seed": options.seed,
        "shots": shots,
        "trials": trials,
        "folds": options.folds,
        "c_grid": list(options.c_grid),
        "solver": options.solver,
        "scale_features": options.scale_features,
        "size": size,
        "classes": len(train.classes),
        "multi_label": train.multi_label,
        "train_images": len(train),
        "test_images": len(test),
        "results": [],
    }
    train, test = _needed(train, test, shots, trials, options.seed)
    for spec, model in models.items():
        model.on(machine.target)
        arrays = [_features(spec, model, part, options, size, machine, bar, ranks) for part in (train, test)]
        started = time.monotonic()
        result = few_shot(
            arrays[0],
            train.labels,
            arrays[1],
            test.labels,
            shots=shots,
            trials=trials,
            c_grid=options.c_grid,
            folds=options.folds,
            solver=options.solver,
            seed=options.seed,
            ids=train.ids,
            classes=len(train.classes),
            device=machine.device,
            threads=machine.threads,
            progress=bar(f"probe {spec}", "trials"),
            ranks=ranks,
        )
        row = _row(spec, result, train.classes, time.monotonic() - started) | {"architecture": model.architecture}
        record["results"].append(row)  # type: ignore[attr-defined]
        show(row)
    return record


def _needed(train: Subset, test: Subset, shots: int | None, trials: int, seed: int) -> tuple[Subset, Subset]:
    """The images whose features are computed: all of a set, or a few of a much larger one."""
    if shots is not None:
        touched = splits.drawn(train, shots, seed, trials)
        train = splits.alone(touched) if defaults.FEW * len(touched) < len(train.manifest) else train
    return train, splits.alone(test) if defaults.FEW * len(test) < len(test.manifest) else test


def _features(
    spec: str,
    model: Classifier,
    part: Subset,
    options: ProbeOptions,
    size: int,
    machine: Machine,
    bar: Bar,
    ranks: Ranks,
) -> NDArray[np.float32]:
    progress = bar(f"features {spec}", "images")
    values = features(model, part.manifest, machine, size, options.batch_size, progress, ranks)[part.indices]
    if options.scale_features == "none":
        return values
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


def _row(spec: str, result: Result, classes: Sequence[str], seconds: float) -> dict[str, Any]:
    per_class = zip(classes, result.per_class, strict=True)
    return {
        "backbone": spec,
        **origin(spec),
        "accuracy": result.mean,
        "std": result.std,
        "ci95": result.ci95,
        "accuracies": result.accuracies,
        "chosen_c": result.chosen_c,
        "duality_gaps": result.gaps,
        "seconds": seconds,
        # NaN, for a class without test images, is no JSON
        "per_class": {name: None if value != value else value for name, value in per_class},
    }


def common_size(sizes: dict[str, int]) -> int:
    """The input size that all backbones name. Raises UsageError where they name several."""
    if len(set(sizes.values())) > 1:
        pairs = ", ".join(f"{spec}: {size}" for spec, size in sizes.items())
        raise UsageError(f"the backbones name different input sizes ({pairs}): choose one with `size`")
    return next(iter(sizes.values()))

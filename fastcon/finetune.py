"""Fine-tuning a MODEL on labelled images: how teachers are made, and how backbones are judged. One loop, random views.

In: training and test subsets, a MODEL to start from. Out: RUN/model.safetensors with the head of the task, its
metrics, and the learning rate that a held-out part of the training set chose.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastcon import checkpoint, features, models, pipeline, splits, views
from fastcon.errors import FastconError, Interrupted
from fastcon.machine import Cores
from fastcon.models import RUN_WEIGHTS, Classifier, Head
from fastcon.pipeline import Request
from fastcon.precompute import Settings
from fastcon.probe import interval
from fastcon.run import Metrics, Run, stop_signals
from fastcon.splits import Subset
from fastcon.train import make_optimizer, rng_state, set_rate, set_rng

RESULT = RUN_WEIGHTS[1]
REPORT = "result.json"
CHECKPOINT_SECONDS = 60.0
VALIDATION = 0.1
"""Share of each training class that chooses the learning rate."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Hyperparameters; the defaults are the paper's for teachers (120 epochs, x 0.1 at 70 and 100)."""

    head: str = "task"
    lr_grid: tuple[float, ...] = (0.001, 0.01, 0.1)
    epochs: int = 120
    milestones: tuple[float, ...] = (70 / 120, 100 / 120)
    batch_size: int = 32
    momentum: float = 0.9
    weight_decay: float = 1e-4
    scale: tuple[float, float] = (0.08, 1.0)
    batch_norm: str = "batch"
    dropout: bool = True
    seed: int = 0
    precision: str = "auto"


DOWNSTREAM = (0.5, 0.8)
"""Milestones of the paper's downstream fine-tuning, in shares of its 50 epochs."""


class Diverged(FastconError):
    """A learning rate at which the loss turned NaN or infinite."""


Say = Callable[[str], None]
Progress = Callable[[int, int], None]


def teach(
    init: str,
    train: Subset,
    test: Subset,
    out: str,
    options: Options,
    settings: Settings,
    size: int | None = None,
    data: dict[str, Any] | None = None,
    say: Say = lambda line: None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fine-tune `init` on `train`, write the teacher into `out` and return its accuracy on `test`.

    With several learning rates each is tried on all but a tenth of every class, and the one that does best on that
    tenth trains on everything. data: how the parts were chosen, for the record. Rerunning resumes; a finished run only
    reports.
    """
    start = _start(init, size)
    options = _resolved(options, start, settings)
    run = Run(
        out, {"command": "teach", "init": init, **_identity(start, train, test, size, data, options)}, settings.threads
    )
    if run.finished(RESULT):
        say(f"{out} is finished: nothing to do")
        return json.loads((run.path / REPORT).read_text())
    run.begin()
    count = _counter(progress, _total_steps(train, options))
    model, result = _tune(start, train, test, run, "", options, settings, say, count)
    result |= {"test_images": len(test), "classes": len(train.classes)}
    _write(run, REPORT, result)
    run.end(RESULT, model.export(options.head))
    return result


def finetune(
    backbone: str,
    train: Subset,
    test: Subset,
    out: str,
    options: Options,
    settings: Settings,
    size: int | None = None,
    data: dict[str, Any] | None = None,
    shots: int | None = None,
    trials: int = 1,
    say: Say = lambda line: None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fine-tune `backbone` on a downstream task: on all of `train` once, or on `trials` draws of `shots` images a class.

    The draws are those of the probes with the same seed, and every trial chooses its own learning rate as `teach` does.
    Returns the mean accuracy on `test` and each trial's; on all images `out` becomes a MODEL too. Rerunning resumes.
    """
    start = _start(backbone, size)
    options = _resolved(options, start, settings)
    identity = _identity(start, train, test, size, data, options) | {"shots": shots, "trials": trials}
    run = Run(out, {"command": "finetune", "init": backbone, **identity}, settings.threads)
    if run.finished(REPORT):
        say(f"{out} is finished: nothing to do")
        return json.loads((run.path / REPORT).read_text())
    run.begin()
    draws = [train]
    if shots is not None:
        chosen = (splits.draw(train.ids, train.labels, shots, options.seed, trial) for trial in range(trials))
        draws = [splits.pick(train, rows) for rows in chosen]
    count = _counter(progress, sum(_total_steps(draw, options) for draw in draws))
    found = []
    for trial, draw in enumerate(draws):
        name = f"trial-{trial}"
        done = run.path / f"{name}.json"
        if done.exists():
            found.append(json.loads(done.read_text()))
            count(_total_steps(draw, options))
            continue
        model, result = _tune(start, draw, test, run, f"{name}-", options, settings, say, count)
        if shots is None:
            checkpoint.write_atomically(run.path / RESULT, model.export(options.head))
        _write(run, done.name, result)
        run.forget_checkpoints()
        found.append(result)
    accuracies = [trial["accuracy"] for trial in found]
    summary = {
        "accuracy": float(np.mean(accuracies)),
        "accuracies": accuracies,
        "ci95": interval(accuracies),
        "multi_label": train.multi_label,
        "lr": [trial["lr"] for trial in found],
        "train_images": len(draws[0]),
        "test_images": len(test),
        "classes": len(train.classes),
    }
    _write(run, REPORT, summary)
    return summary


def _resolved(options: Options, start: Classifier, settings: Settings) -> Options:
    precision = models.choose_precision(options.precision, settings.device, training=True)
    batch_norm = models.choose_batch_norm(options.batch_norm, start)
    return dataclasses.replace(options, precision=precision, batch_norm=batch_norm)


def _identity(
    start: Classifier, train: Subset, test: Subset, size: int | None, data: dict[str, Any] | None, options: Options
) -> dict[str, Any]:
    return {
        "init_weights": start.digest(),
        "train": train.digest,
        "test": test.digest,
        "train_images": len(train),
        "test_images": len(test),
        "classes": list(train.classes),
        "size": size,
        "data": data,
        **dataclasses.asdict(options),
    }


def _start(spec: str, size: int | None) -> Classifier:
    start = models.load(spec, size=size)
    start.set_size(size or start.size)
    return start


def _write(run: Run, name: str, result: dict[str, Any]) -> None:
    checkpoint.write_atomically(run.path / name, (json.dumps(result, indent=2) + "\n").encode())


def _counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    done = 0

    def count(steps: int) -> None:
        nonlocal done
        done += steps
        if progress:
            progress(done, total)

    return count


def _tune(
    start: Classifier,
    train: Subset,
    test: Subset,
    run: Run,
    prefix: str,
    options: Options,
    settings: Settings,
    say: Say,
    count: Callable[[int], None],
) -> tuple[Classifier, dict[str, Any]]:
    """Choose a learning rate on a held-out tenth of `train`, train on all of it: the network, and how it does."""
    rates = sorted(options.lr_grid)
    best, tried = rates[0], {}
    if len(rates) > 1:
        kept, aside = splits.part(train, VALIDATION, options.seed)
        if not len(aside):
            raise FastconError(
                f"{len(train)} training images, one a class, leave none aside to choose among {len(rates)} learning "
                "rates: give one (--lr-grid 0.01), or more images a class"
            )
        for rate in rates:
            try:
                model = fit(start, kept, rate, options, settings, run, f"{prefix}lr-{rate:g}", count)
            except Diverged as error:
                say(f"learning rate {rate:g} is out: {error}")
                continue
            tried[rate] = accuracy(model, options.head, aside, settings)
            say(f"learning rate {rate:g}: {tried[rate]:.1%} of the held-out tenth")
        if not tried:
            raise FastconError(
                f"the loss turned NaN at every learning rate of {rates}: use another --out with lower ones"
            )
        best = max(tried, key=lambda rate: (tried[rate], -rate))
    model = fit(start, train, best, options, settings, run, f"{prefix}final", count)
    result = {
        "accuracy": accuracy(model, options.head, test, settings),
        "lr": best,
        "tried": {f"{rate:g}": value for rate, value in tried.items()},
    }
    return model, result


def fit(
    start: Classifier,
    train: Subset,
    rate: float,
    options: Options,
    settings: Settings,
    run: Run,
    stage: str,
    count: Callable[[int], None] = lambda steps: None,
) -> Classifier:
    """Fine-tune a copy of `start` with a fresh head at one learning rate.

    Checkpointed at the end of an epoch, when the last one is a minute old: one of 50 epochs on few shots is large and soon
    outdated.
    """
    model = _copy(start, Head(options.head, train.classes, "sigmoid" if train.multi_label else "softmax"), options.seed)
    loss_of = _binary_cross_entropy if train.multi_label else nn.functional.cross_entropy
    model.on(settings.device).learn(options.batch_norm, options.dropout)
    optimizer = make_optimizer(model, rate, rate, options.momentum, options.weight_decay)
    scaler = torch.amp.GradScaler(settings.device.type, enabled=options.precision == "float16")
    steps = _steps(train, options)
    epoch, position = 0, 0
    folder = run.checkpoints / stage
    state = checkpoint.newest(folder)
    torch.manual_seed(options.seed)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        set_rng(state["rng"], settings.device)
        epoch, position = state["epoch"], state["metrics"]
        count(epoch * steps)
    metrics = Metrics(run.path / f"metrics-{stage}.jsonl", position)
    batches = _batches(train, range(epoch, options.epochs), model.size, options, settings)
    saved = time.monotonic()
    loss_sum, step = torch.zeros((), device=settings.device), epoch * steps
    with Cores(run.threads, settings.device) as cores, stop_signals() as stop:
        for pixels, labels in batches:
            set_rate(optimizer, step / (steps * options.epochs), options.milestones)
            with cores.turn():
                with models.precision_context(options.precision, settings.device):
                    logits = model(pixels)
                loss = loss_of(logits, labels)
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            loss_sum += loss.detach()
            step += 1
            count(1)
            if step % steps == 0:
                mean = loss_sum.item() / steps
                if not math.isfinite(mean):
                    batches.close()
                    raise Diverged(
                        f"the loss is {mean} in epoch {step // steps} at learning rate {rate:g}: use another --out with a "
                        "lower one"
                    )
                metrics.write({"epoch": step // steps - 1, "lr": optimizer.param_groups[0]["lr"], "loss": mean})
                run.log(f"{stage} epoch {step // steps}/{options.epochs} loss {mean:.4f}")
                loss_sum.zero_()
                if stop or time.monotonic() - saved >= CHECKPOINT_SECONDS:
                    saved = time.monotonic()
                    checkpoint.save(
                        folder,
                        step // steps,
                        {
                            "model": model.state_dict(),
                            "optimizer": optimizer.state_dict(),
                            "scaler": scaler.state_dict(),
                            "rng": rng_state(settings.device),
                            "epoch": step // steps,
                            "metrics": metrics.position,
                        },
                    )
            if stop and step < steps * options.epochs:
                raise Interrupted(
                    f"stopped by signal {stop[0]} in epoch {step // steps + 1}; run the same command to resume"
                )
    metrics.close()
    return model.eval()


def accuracy(model: Classifier, head: str, test: Subset, settings: Settings) -> float:
    """Share of images whose class the head finds among its own classes, matched by name.

    Of multi-label images the share of (image, label) pairs that its signs tell right.
    """
    chosen, columns = model.head_index(head)
    place = {name: k for k, name in enumerate(chosen.classes)}
    missing = [name for name in test.classes if name not in place]
    if missing:
        raise FastconError(
            f"head {head!r} does not know the class {missing[0]!r} of the test images ({len(missing)} such); "
            f"it knows {splits.few(chosen.classes)}"
        )
    if test.multi_label != (chosen.kind == "sigmoid"):
        raise FastconError(
            f"head {head!r} is a {chosen.kind} head, and the test images have "
            f"{'several labels each' if test.multi_label else 'one class each'}"
        )
    own = np.array([place[name] for name in test.classes])
    model.on(settings.device).eval()
    found = features.logits(model, test.manifest, test.indices, settings)[:, columns]
    if test.multi_label:
        return float(((found[:, own] > 0) == test.labels).mean())
    return float((found.argmax(1) == own[test.labels]).mean())


def _binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(logits, labels.float())


def _copy(start: Classifier, head: Head, seed: int) -> Classifier:
    import copy

    model = copy.deepcopy(start)
    model.replace_heads([head], keep={}, seed=seed)
    return model


def _steps(train: Subset, options: Options) -> int:
    return max(len(train) // options.batch_size, 1)


def _total_steps(train: Subset, options: Options) -> int:
    grid = options.lr_grid if len(options.lr_grid) > 1 else ()
    kept = splits.part(train, VALIDATION, options.seed)[0] if grid else train
    return options.epochs * (_steps(train, options) + len(grid) * _steps(kept, options))


def _batches(
    train: Subset, epochs: range, size: int, options: Options, settings: Settings
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Random views, a new one of every image each epoch: (uint8 [B, 3, size, size], int64 labels [B])."""
    ids = train.ids
    widths, heights = train.manifest.widths[train.indices], train.manifest.heights[train.indices]

    def plan() -> Iterator[tuple[Request, NDArray[np.int64]]]:
        for epoch in epochs:
            order = views.permutation(options.seed, ids, epoch, views.SHUFFLE)
            boxes = views.boxes(options.seed, ids, epoch, widths, heights, options.scale)
            flips = views.flips(options.seed, ids, epoch)
            for step in range(_steps(train, options)):
                rows = order[step * options.batch_size : (step + 1) * options.batch_size]
                yield Request(train.indices[rows], boxes[rows], flips[rows]), train.labels[rows]

    requests = (request for request, _ in plan())
    settings = dataclasses.replace(settings, batch_size=options.batch_size)
    decoded = pipeline.decode(train.manifest, requests, [size], settings)
    for pixels, (_, labels) in zip(decoded, plan(), strict=True):
        yield pixels[size], torch.from_numpy(labels).to(settings.device, non_blocking=True)

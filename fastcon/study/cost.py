"""What a study would do and cost: its graph, its images, and the time they would take on this machine."""

from __future__ import annotations

import collections
import functools
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from fastcon.data import datasets
from fastcon.data.sources import read
from fastcon.errors import FastconError
from fastcon.machine import Machine, precision_context
from fastcon.models.load import load
from fastcon.study.plan import Job, Study
from fastcon.training import settle

BATCH = 32
LONGEST = 5
"""Commands whose share of the time is said."""


def describe(study: Study, device: torch.device, say: Callable[[str], None]) -> tuple[dict[str, Any], str]:
    """Counts, images and estimated seconds of a study, and a text with its graph.

    The time is of the networks alone (a step of 32 images, measured here), without decoding; images of sets that are
    not there and have no published size are not counted, and said.
    """
    sizes = {name: _size(sources, share) for name, (sources, share) in study.images.items()}
    specs = dict.fromkeys(spec for job in study.jobs for spec, _, _ in job.forward + job.trained)
    rates = {spec: _rates(spec, study.size, device, say) for spec in specs}
    counts = collections.Counter(job.command[0] for job in study.jobs)
    forward = sum(_images(job.forward, sizes) for job in study.jobs)
    trained = sum(_images(job.trained, sizes) for job in study.jobs)
    each = {job.name: _seconds(job, sizes, rates) for job in study.jobs}
    seconds = sum(each.values())
    unknown = sorted(name for name, size in sizes.items() if size is None)
    facts = {
        "study": study.name,
        "counts": dict(counts),
        "images_forward": round(forward),
        "images_trained": round(trained),
        "seconds": seconds,
        "device": str(device),
        "unknown": unknown,
        "jobs": [
            {"name": job.name, "command": list(job.command), "needs": list(job.needs), "seconds": each[job.name]}
            for job in study.jobs
        ],
    }
    lines = [f"{study.name}: {study.title}", ""]
    lines += [f"{job.name}" + (f"  <-  {_few(job.needs)}" if job.needs else "") for job in study.jobs]
    lines += ["", f"{len(study.jobs)} commands: " + ", ".join(f"{n} {command}" for command, n in counts.items())]
    lines.append(f"images: {forward:,.0f} forward, {trained:,.0f} trained on")
    lines += [f"not counted, as they are not there: {', '.join(unknown)}"] if unknown else []
    for spec, (ahead, step) in rates.items():
        lines.append(f"{spec}: {ahead:,.0f} images/s forward, {step:,.0f} images/s trained on, on {device}")
    lines.append(f"about {_duration(seconds)} on this machine, decoding and start-up not counted")
    longest = sorted(each, key=lambda name: -each[name])[:LONGEST] if seconds else []
    lines += [f"  {each[name] / seconds:4.0%}  {_duration(each[name])}  {name}" for name in longest]
    return facts, "\n".join(lines)


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _size(sources: list[str], share: float) -> float | None:
    """Images of some sources: as published, or listed where they are there. Without sources: `share` images."""
    if not sources:
        return share
    total = 0
    for source in sources:
        if source.startswith("data:"):
            total += datasets.published(source)
        else:
            listed = _listed(source)
            if listed is None:
                return None
            total += listed
    return total * share


@functools.cache
def _listed(source: str) -> int | None:
    """How many images a source lists; None where it is not there."""
    try:
        return len(read([source]).size)
    except (FastconError, OSError):
        return None


def _images(passes: tuple[tuple[str, str, float], ...], sizes: dict[str, float | None]) -> float:
    return sum(times * (sizes[name] or 0.0) for _, name, times in passes)


def _seconds(job: Job, sizes: dict[str, float | None], rates: dict[str, tuple[float, float]]) -> float:
    ahead = sum(times * (sizes[name] or 0.0) / rates[spec][0] for spec, name, times in job.forward)
    return ahead + sum(times * (sizes[name] or 0.0) / rates[spec][1] for spec, name, times in job.trained)


def _rates(spec: str, size: int, device: torch.device, say: Callable[[str], None]) -> tuple[float, float]:
    """(images/s forward, images/s of a training step) of a MODEL's architecture, with random weights."""
    architecture, _, query = spec.partition("?")
    found = re.search(r"size=(\d+)", query)
    side = int(found[1]) if found else size
    model = load(f"{architecture.partition('@')[0]}@random?size={side}").on(device)
    say(f"measuring {architecture} at {side} px on {device} …")
    pixels = torch.zeros(BATCH, 3, side, side, dtype=torch.uint8, device=device)
    machine = Machine(str(device))
    training = settle(machine, model, BATCH).precision

    def ahead() -> None:
        with torch.inference_mode(), machine.autocast():
            model.eval()(pixels)

    def step() -> None:
        with precision_context(training, device):
            loss = model.train()(pixels).square().mean()
        loss.backward()

    return BATCH / _time(ahead, device), BATCH / _time(step, device)


def _time(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of a call: the median over two seconds, after one to warm up."""
    seconds: list[float] = []
    while len(seconds) < 4 or (sum(seconds) < 2 and len(seconds) < 100):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.0f} seconds"

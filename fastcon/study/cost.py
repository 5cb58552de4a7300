"""What a study would do and cost: its graph, its images, disk, and the time they would take here or on another machine."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastcon.data import datasets
from fastcon.data.sources import read
from fastcon.errors import FastconError
from fastcon.machine import Machine, precision_context
from fastcon.models.load import load
from fastcon.store.codec import codec
from fastcon.study.plan import Job, Study
from fastcon.training import settle

BATCH = 32
BAKED = 0.33
"""Bytes per pixel of a baked view at quality 90: see benchmarks/README.md."""
LONGEST = 5
"""Commands whose share of the time is said."""


@dataclasses.dataclass(frozen=True)
class _Network:
    """What an architecture costs: images/s forward and in a step of training, bytes of its weights, classes, feature width."""

    forward: float
    trained: float
    weights: int
    classes: int
    width: int


Rate = tuple[float, float]
"""Images/s forward and trained on, of the generalist."""


def describe(
    study: Study, device: torch.device, say: Callable[[str], None], rate: Rate | None = None
) -> tuple[dict[str, Any], str]:
    """Counts, images, bytes and estimated seconds of a study, and a text with its graph.

    The time is of the networks alone (a step of 32 images, measured here), without decoding; images of sets that are
    not there and have no published size are not counted, and said. rate: of the generalist on another machine, as a GPU,
    whose time is estimated too: the ratios between networks are taken to be as here.
    """
    sizes = {name: _size(sources, share) for name, (sources, share) in study.images.items()}
    specs = dict.fromkeys(spec for job in study.jobs for spec, _, _ in job.forward + job.trained)
    networks = {spec: _network(spec, study.size, device, say) for spec in specs}
    counts = collections.Counter(job.command[0] for job in study.jobs)
    jobs = [_cost(job, sizes, networks, rate) for job in study.jobs]
    totals = {key: sum(job[key] for job in jobs) for key in ("images_forward", "images_trained", "seconds", *_BYTES)}
    elsewhere = None if rate is None else sum(job["seconds_at_rate"] for job in jobs)
    unknown = sorted(name for name, size in sizes.items() if size is None)
    facts = {
        "study": study.name,
        "counts": dict(counts),
        **totals,
        "device": str(device),
        "unknown": unknown,
        "jobs": jobs,
    }
    facts |= {} if rate is None else {"rate": list(rate), "seconds_at_rate": elsewhere}
    lines = [f"{study.name}: {study.title}", ""]
    lines += [f"{job.name}" + (f"  <-  {_few(job.needs)}" if job.needs else "") for job in study.jobs]
    lines += ["", f"{len(study.jobs)} commands: " + ", ".join(f"{n} {command}" for command, n in counts.items())]
    lines.append(f"images: {totals['images_forward']:,.0f} forward, {totals['images_trained']:,.0f} trained on")
    lines += [f"not counted, as they are not there: {', '.join(unknown)}"] if unknown else []
    disk = ", ".join(f"{kind.removesuffix('_bytes')} {totals[kind] / 1e9:,.1f} GB" for kind in _BYTES)
    lines.append(f"disk: {disk}")
    for spec, network in networks.items():
        lines.append(
            f"{spec}: {network.forward:,.0f} images/s forward, {network.trained:,.0f} images/s trained on, on {device}"
        )
    lines.append(f"about {_duration(totals['seconds'])} on this machine, decoding and start-up not counted")
    if rate is not None:
        lines.append(
            f"about {_duration(elsewhere or 0)} where the generalist does {rate[0]:,.0f} images/s forward, {rate[1]:,.0f} trained on"
        )
    longest = sorted(jobs, key=lambda job: -job["seconds"])[:LONGEST] if totals["seconds"] else []
    lines += [
        f"  {job['seconds'] / totals['seconds']:4.0%}  {_duration(job['seconds'])}  {job['name']}" for job in longest
    ]
    return facts, "\n".join(lines)


_BYTES = ("stores_bytes", "runs_bytes", "features_bytes")


def _cost(job: Job, sizes: dict[str, float | None], networks: dict[str, _Network], rate: Rate | None) -> dict[str, Any]:
    """What one command costs."""

    def total(passes: tuple[tuple[str, str, float], ...], each: Callable[[_Network], float]) -> float:
        return sum(times * (sizes[name] or 0.0) * each(networks[spec]) for spec, name, times in passes)

    seconds = total(job.forward, lambda n: 1 / n.forward) + total(job.trained, lambda n: 1 / n.trained)
    cost: dict[str, Any] = {
        "name": job.name,
        "command": list(job.command),
        "needs": list(job.needs),
        "images_forward": round(total(job.forward, lambda n: 1)),
        "images_trained": round(total(job.trained, lambda n: 1)),
        "seconds": seconds,
        "stores_bytes": _store_bytes(job, sizes, networks),
        "runs_bytes": networks[job.keeps].weights if job.keeps else 0,
        "features_bytes": total(job.forward, lambda n: 4 * n.width) if job.command[0] == "probe" else 0,
    }
    if rate is not None:
        base = next(iter(networks.values()))  # the generalist's
        forward_seconds = total(job.forward, lambda n: base.forward / n.forward / rate[0])
        cost["seconds_at_rate"] = forward_seconds + total(job.trained, lambda n: base.trained / n.trained / rate[1])
    return cost


def _store_bytes(job: Job, sizes: dict[str, float | None], networks: dict[str, _Network]) -> float:
    """Of a store: logits as its codec keeps them, and of every row 21 bytes that say which view it is; baked views with them."""
    if not job.heads:
        return 0.0
    options = dict(zip(job.command, job.command[1:], strict=False))
    kept = codec(options.get("--logits", "float16"))
    row = 21.0 + sum(kept.row_bytes(round(_classes(of, share, networks))) for of, share in job.heads)
    row += BAKED * int(options.get("--size", 224)) ** 2 if "--bake" in job.command else 0
    _, name, views = job.forward[0]
    return views * (sizes[name] or 0.0) * row


def _classes(of: str | tuple[str, ...], share: float, networks: dict[str, _Network]) -> float:
    """How many classes a head has: of a MODEL, or a share of those of IMAGES; 0 where they are not there."""
    if isinstance(of, str):
        return networks[of].classes
    if of[0].startswith("data:"):
        return share * datasets.dataset(of[0].removeprefix("data:").partition("?")[0]).classes
    return share * max((_listed(source) or (0, 0))[1] for source in of)


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
            total += listed[0]
    return total * share


@functools.cache
def _listed(source: str) -> tuple[int, int] | None:
    """How many images a source lists, and of how many classes; None where it is not there."""
    try:
        listing = read([source])
        return len(listing.size), len(listing.classes)
    except (FastconError, OSError):
        return None


def _network(spec: str, size: int, device: torch.device, say: Callable[[str], None]) -> _Network:
    """Measured with random weights; its classes are those of its weights, where these are a file here."""
    architecture, _, query = spec.partition("?")
    size_option = re.search(r"size=(\d+)", query)
    side = int(size_option[1]) if size_option else size
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

    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    with_classes = load(spec) if Path(architecture.partition("@")[2]).is_file() else model
    width = model.features(pixels[:1]).shape[1]
    return _Network(
        BATCH / _time(ahead, device), BATCH / _time(step, device), weights, len(with_classes.heads[0].classes), width
    )


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

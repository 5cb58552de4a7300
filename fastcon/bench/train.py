"""Precompute and training against the same networks on a batch in memory, and against teachers run in the loop."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcon.bench import Row, Say, compared, interleave
from fastcon.bench.fixtures import image_files, store_of
from fastcon.data.decode import decode
from fastcon.data.manifest import index
from fastcon.distill import precompute
from fastcon.distill.loader import Loader
from fastcon.distill.loss import loss
from fastcon.distill.pending import Pending, one_late
from fastcon.machine import Machine, precision_context
from fastcon.models import frozen
from fastcon.models.classifier import Classifier
from fastcon.models.frozen import Frozen
from fastcon.models.load import load
from fastcon.store.format import Recipe
from fastcon.store.replay import Replay
from fastcon.training import compiled, make_optimizer, settle


@dataclasses.dataclass(frozen=True)
class Scale:
    """A network, its input, its batch, and how many images and batches a round takes."""

    architecture: str
    size: int
    batch: int
    images: int
    pixels: tuple[int, int]
    steps: int
    teachers: int


CPU = Scale("torchvision:resnet18", 64, 32, 1024, (96, 72), 10, 1)
CPU_TOO = Scale("timm:tf_efficientnet_lite0", 96, 32, 1024, (96, 72), 10, 1)
"""For precompute alone."""
GPU = Scale("torchvision:resnet50", 224, 256, 4096, (500, 375), 40, 4)
CLASSES = 200
TOGETHER = 10.0
"""Seconds that training processes are measured for."""
NEIGHBOUR = """
import json, sys
from fastcon.bench.train import Scale, neighbour
neighbour(sys.argv[1], Scale(**json.loads(sys.argv[2])), float(sys.argv[3]))
"""
PAPERS_BATCH = 32


def bench(
    say: Say, device: torch.device, images: Sequence[str] = (), rounds: int = 3, scale: Scale | None = None
) -> list[Row]:
    """img/s of precompute, of training steps fed by the loader, of training with its teachers online, and of --compile.

    Where torch.compile does not work its rows are left out, and teachers run as they are.
    """
    also = [CPU_TOO] if scale is None and device.type == "cpu" and importlib.util.find_spec("timm") else []
    scale = scale or (GPU if device.type == "cuda" else CPU)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        image_files(images, folder, scale.images, *scale.pixels)
        manifest = index([str(folder / "photos")], trust=True)
        recipe = Recipe(size=scale.size)
        case = _case(scale)
        rows = []
        for shape in [scale, *also]:
            for row in _precompute(folder, manifest, Recipe(size=shape.size), shape, device, rounds, say):
                rows.append(row)
                say(_line(row))
        for count in (2, 4, 6):
            path = store_of(folder / f"store-{count}", manifest, recipe, 1, [CLASSES] * count, Machine(str(device)))
            measured = _train(path, scale, device, count, rounds, case)
            rows += measured[count > 2 :]  # the step does not depend on the number of teachers: one row of it is enough
            for row in measured[count > 2 :]:
                say(_line(row))
        if device.type == "cpu":
            rows.append(_side_by_side(path, scale, rounds, case))
            say(_line(rows[-1]))
        for row in _compiled(path, scale, device, rounds, case, say):
            rows.append(row)
            say(_line(row))
    return rows


def _line(row: Row) -> str:
    return f"{row['name']}, {row['case']}: {row['ours']:,.0f} against {row['theirs']:,.0f} {row['unit']}, ratio {row['ratio']:.2f}"


def _case(scale: Scale) -> str:
    return f"{scale.architecture.partition(':')[2]}, {scale.size} px"


def _way(model: Classifier, machine: Machine, batch_size: int, say: Say) -> str:
    """How a teacher is fastest here, which precompute finds out before long work."""
    return frozen.choose(model, machine, batch_size, rows=1 << 40, say=say)


def _network(scale: Scale, device: torch.device, number: int = 0) -> Classifier:
    torch.manual_seed(number)
    classes = [str(k) for k in range(CLASSES)]
    return load(f"{scale.architecture}@random?size={scale.size}", classes=classes).on(device)


def _precompute(
    folder: Path, manifest: Any, recipe: Recipe, scale: Scale, device: torch.device, rounds: int, say: Say
) -> list[Row]:
    """The whole stage into a new store, from its second batch on, against the teachers on a batch in memory.

    Against both: as they are, and as PyTorch runs them best.
    """
    machine = Machine(str(device)).settled()
    teachers = [
        precompute.Teacher(f"teacher-{k}", "none", _network(scale, device, k).eval()) for k in range(scale.teachers)
    ]
    batch = torch.randint(0, 256, (128, 3, scale.size, scale.size), dtype=torch.uint8, device=device)
    batch = batch.to(memory_format=torch.channels_last)
    how = _way(teachers[0].model, machine, len(batch), say)
    number = iter(range(1_000_000))

    def ours() -> float:
        times: list[tuple[float, int]] = []
        path = folder / f"precompute-{scale.size}-{next(number)}"
        precompute.precompute(
            str(path),
            manifest,
            teachers,
            recipe,
            1,
            machine,
            progress=lambda done, _: times.append((time.perf_counter(), done)),
            compile=how,
        )
        (start, before), (stop, after) = times[0], times[-1]
        return (after - before) / (stop - start)

    def alone(how: str) -> Callable[[], float]:
        runs = [Frozen(teacher.model, machine, len(batch), how) for teacher in teachers]

        def run() -> float:
            started = time.perf_counter()
            for pending in one_late(
                [Pending(run(batch), "float16") for run in runs] for _ in range(len(manifest) // 128 - 1)
            ):
                for answers in pending:
                    answers.parts()
            return 128 * (len(manifest) // 128 - 1) / (time.perf_counter() - started)

        return run

    variants = {"precompute": alone(frozen.PLAIN)}
    if how != frozen.PLAIN:
        variants["precompute_vs_best"] = alone(how)
    rates = interleave({"ours": ours, **variants}, rounds)
    what = f"{_case(scale)}, {scale.teachers} teacher{'s' * (scale.teachers > 1)}, {machine.precision}, compile {how}"
    return [compared(name, rates["ours"], rates[name], "img/s", device.type, case=what) for name in variants]


def _train(path: Path, scale: Scale, device: torch.device, count: int, rounds: int, case: str) -> list[Row]:
    used = _precision(scale, device)
    loader = Loader(str(path), batch_size=scale.batch, epochs=1_000_000, device=device)
    step = _step(loader, scale, device, used)
    teaching = Machine(str(device)).settled()
    networks = [_network(scale, device, k) for k in range(count)]
    how = _way(networks[0], teaching, scale.batch, lambda line: None)
    teachers = [Frozen(network, teaching, scale.batch, how) for network in networks]

    def teach(pixels: Tensor) -> Tensor:
        return torch.cat([teacher(pixels) for teacher in teachers], 1)

    stream = iter(loader)
    kept = next(stream)

    def decoded() -> Iterator[Tensor]:
        replay = Replay(loader.store, loader.manifest)
        epochs = ((epoch % loader.views, loader.schedule.epoch(epoch)) for epoch in itertools.count())
        requests = (replay.request(view, rows) for view, batches in epochs for rows in batches)
        for pixels in decode(replay.images, requests, [scale.size], scale.batch, loader.machine):
            yield pixels[scale.size]

    def offline() -> None:
        batch = next(stream)
        step(batch.pixels, batch.stacked)

    online_pixels = decoded()

    def online() -> None:
        pixels = next(online_pixels)
        step(pixels, teach(pixels).clone())

    timed = functools.partial(_timed, scale=scale, device=device)
    rates = interleave(
        {
            "offline": timed(offline),
            "memory": timed(lambda: step(kept.pixels, kept.stacked)),
            "online": timed(online),
            "teachers": timed(lambda: teach(kept.pixels)),
        },
        rounds,
    )
    stream.close()  # type: ignore[attr-defined]
    online_pixels.close()  # type: ignore[attr-defined]
    # The bound of the speed-up: (t_student + t_teachers) / t_student, with t = 1 / rate.
    bound = statistics.median(1 + s / t for s, t in zip(rates["memory"], rates["teachers"], strict=True))
    what = f"{case}, batch {scale.batch}, {used}"
    rows = [
        compared("train_step", rates["offline"], rates["memory"], "img/s", device.type, case=what),
        compared(
            "train_vs_online",
            rates["offline"],
            rates["online"],
            "img/s",
            device.type,
            case=f"{what}, N+1 = {count}, teachers' compile {how}",
        ),
    ]
    rows[1] |= {"speed_up": rows[1]["ratio"], "bound": bound, "ratio": rows[1]["ratio"] / bound}
    return rows


def _side_by_side(path: Path, scale: Scale, rounds: int, case: str) -> Row:
    """img/s of two training processes on the same cores, together, against one alone."""
    command = [sys.executable, "-c", NEIGHBOUR, str(path), json.dumps(dataclasses.asdict(scale)), str(TOGETHER)]

    def processes(count: int) -> float:
        running = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
        ]
        for process in running:
            assert process.stdout is not None
            process.stdout.readline()  # it is ready
        for process in running:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return sum(float(process.communicate()[0]) for process in running)

    measured = [(processes(2), processes(1)) for _ in range(rounds)]
    together, alone = map(list, zip(*measured, strict=True))
    return compared("side_by_side", together, alone, "img/s", "cpu", case=f"{case}, batch {scale.batch}")


def neighbour(path: str, scale: Scale, seconds: float) -> None:
    """Print "ready", wait for a line, and print the img/s of training steps from then on, each in its turn."""
    device = torch.device("cpu")
    loader = Loader(path, batch_size=scale.batch, epochs=1_000_000, device=device)
    step, started, images = _step(loader, scale, device, _precision(scale, device)), 0.0, 0
    with Machine("cpu").computing() as cores:
        for batch in loader:
            with cores.turn():
                step(batch.pixels, batch.stacked)
            images += len(batch.indices)
            if not started:
                print("ready", flush=True)
                sys.stdin.readline()
                started, images = time.monotonic(), 0
            elif time.monotonic() > started + seconds:
                print(images / (time.monotonic() - started))
                return


def _step(
    loader: Loader, scale: Scale, device: torch.device, precision: str, compile: str = "none"
) -> Callable[[Tensor, Any], None]:
    """A step of training a new student on pixels and logits, as `fastcon.train` takes it."""
    student = _network(scale, device)
    student.replace_heads(loader.heads, keep={}, seed=0)
    student.train()
    optimizer = make_optimizer(student, 0.001, 0.01, 0.9, 1e-4)
    forward = compiled(student, compile)

    def step(pixels: Tensor, logits: Any) -> None:
        with precision_context(precision, device):
            out = forward(pixels)
        optimizer.zero_grad(set_to_none=True)
        loss(out, logits, loader.segments).total.backward()
        optimizer.step()

    return step


def _precision(scale: Scale, device: torch.device) -> str:
    """What `fastcon.train` would train in here."""
    return settle(Machine(str(device)), _network(scale, device), scale.batch).precision


def _timed(work: Callable[[], Any], scale: Scale, device: torch.device) -> Callable[[], float]:
    """img/s of a step, after one to warm up."""

    def run() -> float:
        work()
        _wait(device)
        started = time.perf_counter()
        for _ in range(scale.steps):
            work()
        _wait(device)
        return scale.steps * scale.batch / (time.perf_counter() - started)

    return run


def _compiled(path: Path, scale: Scale, device: torch.device, rounds: int, case: str, say: Say) -> Iterator[Row]:
    """Steps on a batch in memory as --compile makes them, against the same without; on a GPU at the paper's batch, too."""
    modes = ("default", "graphs") if device.type == "cuda" else ("default",)
    for batch in sorted({scale.batch, PAPERS_BATCH}):
        scale = dataclasses.replace(scale, batch=batch)
        used = _precision(scale, device)
        loader = Loader(str(path), batch_size=batch, device=device)
        [kept] = itertools.islice(loader, 1)
        variants = {}
        torch.compiler.reset()  # else a second batch size is compiled for any batch size
        for mode in ("none", *modes):
            step = functools.partial(_step(loader, scale, device, used, mode), kept.pixels, kept.stacked)
            try:
                step()
            except Exception as error:
                say(f"--compile {mode} does not work here: {' '.join(str(error).split())[:80]}")
                continue
            variants[mode] = _timed(step, scale, device)
        rates = interleave(variants, rounds)
        for mode in variants:
            if mode != "none":
                what = f"{case}, batch {batch}, {used}"
                yield compared(
                    f"train_step, --compile {mode}", rates[mode], rates["none"], "img/s", device.type, case=what
                )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""How long commands take to start: the whole of a short one, against what a plain script of PyTorch takes for as much."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fastcon.bench import Row, Say, compared, interleave
from fastcon.bench.fixtures import image_files, store_of
from fastcon.data.manifest import index
from fastcon.errors import FastconError
from fastcon.machine import Machine
from fastcon.store.format import Recipe

SIZE, BATCH, CLASSES = 64, 32, 1000
TEACHER_ALONE = ["--method", "traditional"]
PLAIN_INFO = "import numpy"
PLAIN_TRAIN = f"""
import sys, torch, torchvision
torch.set_default_device(sys.argv[1])
student = torchvision.models.resnet18(num_classes={CLASSES})
optimizer = torch.optim.SGD(student.parameters(), 0.01, 0.9)
logits = student(torch.rand({BATCH}, 3, {SIZE}, {SIZE}))
torch.nn.functional.cross_entropy(logits, torch.rand({BATCH}, {CLASSES}).softmax(1)).backward()
optimizer.step()
torch.save(student.state_dict(), "student.pt")
"""


def bench(say: Say, device: torch.device, rounds: int = 5) -> list[Row]:
    """`info` of a store against Python with NumPy, and a run of one step against the same step of a plain script.

    The run begins, checks its start, takes its step on a batch of decoded images and writes the student. All are processes
    of their own; files are in the system's cache after the first round, which does not count.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        image_files([], folder, BATCH, 96, 72)
        manifest = index([str(folder / "photos")], trust=True)
        store = store_of(folder / "store", manifest, Recipe(size=SIZE), 1, [CLASSES], Machine(str(device)))
        trains = (_train(store, folder / f"run-{number}", device) for number in itertools.count())
        rows = []
        for name, case, ours, theirs in (
            ("start_info", "info STORE", itertools.repeat(["-m", "fastcon", "info", str(store)]), PLAIN_INFO),
            ("start_train", f"one step of {BATCH} images and the end of the run", trains, PLAIN_TRAIN),
        ):
            plain = itertools.repeat(["-c", theirs, str(device)])
            seconds = interleave({"ours": _timed(ours, folder), "theirs": _timed(plain, folder)}, rounds)
            rows.append(compared(name, seconds["ours"], seconds["theirs"], "s", device.type, case=case))
            say(f"{name}, {case}: {rows[-1]['ours']:.2f} s, plain {rows[-1]['theirs']:.2f} s")
        return rows


def _train(store: Path, run: Path, device: torch.device) -> list[str]:
    where = ["--store", str(store), "--out", str(run), "--epochs", "1", "--device", str(device)]
    return ["-m", "fastcon", "train", *where, "--student", f"torchvision:resnet18@random?size={SIZE}", *TEACHER_ALONE]


def _timed(all_arguments: Iterator[list[str]], folder: Path) -> Callable[[], float]:
    """Seconds of a process of Python, with the next of these arguments."""

    def run() -> float:
        arguments = next(all_arguments)
        command = [sys.executable, *arguments]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        seconds = time.perf_counter() - started
        if done.returncode:
            raise FastconError(f"{' '.join(arguments)} failed: {done.stderr.strip()}")
        return seconds

    return run

"""Processes to be killed, and bytes to be flipped: what the fault tests and `benchmarks/soak.py` do to fastcon."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

from fastcon.models.load import load

CHUNK_ROWS = 64


def precompute(images: str, out: str, generalist: str, teacher: str, views: str) -> None:
    """A store of small chunks; prints the rows done."""
    from fastcon.data.manifest import index
    from fastcon.distill.precompute import Teacher, precompute
    from fastcon.machine import Machine
    from fastcon.store.format import Recipe

    teachers = [
        Teacher("general", generalist, load(generalist), generalist=True),
        Teacher("letters", teacher, load(teacher)),
    ]
    recipe = Recipe(seed=3, size=32, chunk_rows=CHUNK_ROWS)
    precompute(out, index([images]), teachers, recipe, int(views), Machine("cpu", "float32"), 32, progress=_say)


def train(store: str, out: str, epochs: str) -> None:
    """A student with a checkpoint after every step; prints the steps done."""
    from fastcon.distill.options import TrainOptions, Upkeep
    from fastcon.distill.train import train
    from fastcon.machine import Machine

    options = TrainOptions(epochs=int(epochs), batch_size=32)
    upkeep = Upkeep(log_every=3, checkpoint_minutes=0)
    train(store, out, options, Machine("cpu", "float32"), upkeep, progress=_say)


def _say(done: int, total: int) -> None:
    print(done, total, flush=True)


def start(*command: str) -> subprocess.Popen[str]:
    """`precompute` or `train` in a process of its own."""
    program = [sys.executable, __file__, *command]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*command: str) -> None:
    """Run to the end."""
    process = start(*command)
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-2000:]


def kill(seconds: float, *command: str) -> int | None:
    """Kill -9 so long after the first progress; what it had done by then, or None if it was finished before."""
    process = start(*command)
    assert process.stdout is not None
    lines = [process.stdout.readline()]
    reader = threading.Thread(target=lambda: lines.extend(process.stdout))  # type: ignore[arg-type]
    reader.start()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    ended = process.poll() is not None
    process.send_signal(signal.SIGKILL)
    reader.join()
    process.communicate()
    whole = [line for line in lines if line.endswith("\n")]
    return None if ended or not whole else int(whole[-1].split()[0])


def flip(folder: Path, chance: random.Random) -> str:
    """Change one bit of one byte of a file that verify covers; which. Half of the time any file, else any byte."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.suffix not in (".lock", ".log")]
    weights = [1] * len(files) if chance.random() < 0.5 else [f.stat().st_size for f in files]
    [file] = chance.choices(files, weights)
    data = bytearray(file.read_bytes())
    at, bit = chance.randrange(len(data)), 1 << chance.randrange(8)
    data[at] ^= bit
    file.write_bytes(data)
    return f"bit {bit} of byte {at} of {file.relative_to(folder)}"


if __name__ == "__main__":
    {"precompute": precompute, "train": train}[sys.argv[1]](*sys.argv[2:])

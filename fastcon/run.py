"""The folder of a run: its configuration, its metrics and its log, and what "rerun resumes" means for it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastcon.cores import Cores, cores, default_threads
from fastcon.errors import FastconError
from fastcon.files import write_atomically, write_json

CONFIG = "config.json"
RUN_WEIGHTS = ("student.safetensors", "model.safetensors")
"""What a finished run of `train`, and one of `teach` or `finetune`, leaves."""
RUN_HEADS = "heads.safetensors"


class Run:
    """RUN/config.json says what the run is, RUN/metrics.jsonl what it measured, RUN/run.log when and how fast.

    No clock time enters config or metrics, so two runs of one command make the same bytes.
    """

    def __init__(self, path: str | os.PathLike[str], config: dict[str, Any], threads: int | None = None) -> None:
        """Look at the folder. Raises FastconError where it holds another run, or other files.

        threads: how many to use; by default as many as the run began with, since sums over other threads round differently.
        """
        self.path = Path(path)
        self.threads = threads or self._threads()
        self.config = config | {"threads": self.threads, "versions": versions()}
        if self._file.exists():
            self._check_same()
        elif self.path.exists() and (not self.path.is_dir() or not self._only_begun()):
            raise FastconError(f"{self.path} holds other files and no run: give an empty or a new folder as `out`")

    def _threads(self) -> int:
        begun = recorded(self.path, "threads")
        return min(begun, cores()) if isinstance(begun, int) else default_threads()

    def _only_begun(self) -> bool:
        """True if only an interrupted `begin` left files here."""
        return all(file.name == f"{self._file.name}.partial" for file in self.path.iterdir())

    def begin(self) -> None:
        """Write the configuration, when all that could refuse it has been checked."""
        if not self._file.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self._file, self.config)

    def end(self, result: str, data: bytes) -> None:
        """Write the file that says the run is finished, and forget its checkpoints."""
        write_atomically(self.path / result, data)
        self.forget_checkpoints()

    def forget_checkpoints(self) -> None:
        """Remove them, once their result is written."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    @property
    def _file(self) -> Path:
        return self.path / CONFIG

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints lie."""
        return self.path / "checkpoints"

    def finished(self, result: str) -> bool:
        """Whether the file that is written last is there."""
        return (self.path / result).exists()

    def log(self, line: str) -> None:
        """Append a line to run.log, with the time."""
        with open(self.path / "run.log", "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def _check_same(self) -> None:
        stored = json.loads(self._file.read_text())
        for key, value in json.loads(json.dumps(self.config)).items():
            if key not in ("threads", "versions", "lineage") and stored.get(key) != value:
                raise FastconError(
                    f"{self.path} holds another run: {key} was {stored.get(key)!r}, this call says {value!r}; "
                    "use the same options to resume it, or another `out`"
                )


def recorded(out: str | os.PathLike[str], key: str) -> Any:
    """A value that the run in a folder began with and keeps; None where there is no run."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return json.loads(Path(out, CONFIG).read_text()).get(key)
    return None


class Metrics:
    """metrics.jsonl, one JSON object per line; `position` and `truncate` let a resumed run leave no gap and no duplicate."""

    def __init__(self, path: Path, position: int = 0) -> None:
        self._file = open(path, "a+b")  # noqa: SIM115 - closed by close()
        self._file.truncate(position)

    @property
    def position(self) -> int:
        """Bytes written so far."""
        self._file.flush()
        return os.fstat(self._file.fileno()).st_size

    def write(self, row: dict[str, Any]) -> None:
        """Append one row."""
        self._file.write((json.dumps(row) + "\n").encode())
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Waits:
    """What the steps of a run waited for; waits.log gets one JSON line each time the run stops or ends.

    seconds: from the first batch asked for to the last step's end; of these, pixels and logits are what the loader's
    consumer waited for them, turns what other fastcon processes computed meanwhile, host is metrics, checkpoints and
    logging; the rest is the step itself. tried: what `distill.advice` measured.
    """

    FILE = "waits.log"

    def __init__(self, loader: dict[str, float], cores: Cores) -> None:
        """loader: `Loader.waits`, seconds that go on counting, as do those of `cores`."""
        self._loader, self._cores, self._host, self._steps = loader, cores, 0.0, 0
        self._start = time.perf_counter()
        self.seconds = 0.0

    def step(self, host: float) -> None:
        """Count a step and the seconds it spent on the host's own work."""
        self._steps += 1
        self._host += host

    def write(self, run: Run, tried: dict[str, float] | None = None) -> None:
        """Append the line."""
        self.seconds = time.perf_counter() - self._start
        line: dict[str, Any] = {
            "steps": self._steps,
            "seconds": self.seconds,
            **self._loader,
            "turns": self._cores.waited,
        }
        line |= {"host": self._host, **({"tried": tried} if tried else {})}
        with open(run.path / self.FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM, SIGINT and SIGHUP instead of dying: the loop looks at the list between steps. A second one kills.

    SIGHUP (a terminal that goes away) stays ignored where it was, as under nohup.
    """
    signals: list[int] = []

    def handle(number: int, _: object) -> None:
        if signals:
            raise KeyboardInterrupt
        signals.append(number)

    try:
        hup = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
        old = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT, *hup)}
    except ValueError:  # not the main thread: whoever embeds us keeps its own handlers
        yield signals
        return
    try:
        yield signals
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    numbers = {"python": platform.python_version()}
    for name in ("fastcon", "torch", "torchvision", "nvidia-dali-cuda130", "zarr", "numpy", "scikit-learn", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            numbers[name] = importlib.metadata.version(name)
    return numbers

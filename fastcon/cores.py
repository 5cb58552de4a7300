"""The cores of this machine, shared with other fastcon processes: how many there are, and whose turn it is.

Two training processes of two threads each on the same two cores make a tenth of the progress of one: a step has
hundreds of short parallel regions, and in each of them a thread waits, spinning, for one that sits behind the other
process's time slice. So processes take turns: one that computes holds a lock on each of its cores, and lets go of them
after every step. Together they are as fast as one alone, and no number of threads, so no last bit of a gradient,
depends on the neighbours.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import platform
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PATIENCE = 30.0
"""Seconds after which a process proceeds without its turn, as the holder may be suspended; it then stops waiting for it."""
POLL = 0.0005


def cores() -> int:
    """The cores this process may use: those of its affinity, limited by its cgroup's quota."""
    return max(1, min(len(os.sched_getaffinity(0)), round(min(quota(), 1 << 16))))


def default_threads() -> int:
    """OMP_NUM_THREADS where it is set, as job schedulers do; else one per core."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return min(int(given), cores()) if given.isdecimal() and int(given) else cores()


def cpu_name() -> str:
    """The model of this machine's CPU."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def quota(root: str = "/sys/fs/cgroup", cgroups: str = "/proc/self/cgroup") -> float:
    """CPUs' worth of time that the cgroup of this process gets; infinity without a limit."""
    limits = [math.inf]
    with contextlib.suppress(OSError, ValueError):
        paths = [line.rsplit(":", 1)[-1].strip("/") for line in Path(cgroups).read_text().splitlines()]
        for path in paths:
            parents = [Path(path), *Path(path).parents]
            limits += [_limit(Path(root, kind, parent)) for kind in ("", "cpu") for parent in parents]
    return min(limits)


def _limit(folder: Path) -> float:
    """The limit that one folder of cgroups states, in either of their two versions."""
    with contextlib.suppress(OSError, ValueError):
        limit, period = (folder / "cpu.max").read_text().split()
        return math.inf if limit == "max" else int(limit) / int(period)
    with contextlib.suppress(OSError, ValueError):
        limit = (folder / "cpu.cfs_quota_us").read_text()
        return int(limit) / int((folder / "cpu.cfs_period_us").read_text()) if int(limit) > 0 else math.inf
    return math.inf


class Cores:
    """The cores that a stage computes on, while it does: `with Cores(threads) as cores`, and `with cores.turn()` a step.

    PyTorch then uses `threads` threads. Fewer than there are cores are kept to cores of their own, so that two processes
    with half of them each do not meet. Afterwards everything is as it was.
    """

    def __init__(
        self,
        threads: int | None = None,
        device: torch.device | None = None,
        folder: str | None = None,
        turns: bool = True,
    ) -> None:
        """threads: None, as many as `default_threads` says. On a GPU nobody waits. folder: where the locks are.

        turns: whether to take turns with others; not so ranks that wait for each other in the middle of a step.
        """
        self.threads = threads or default_threads()
        self._shared, self._takes_turns = device is None or device.type == "cpu", turns
        self._folder = Path(folder or os.path.join(tempfile.gettempdir(), f"fastcon-{os.getuid()}"))
        self.waited = 0.0
        """Seconds that other processes had the turn."""
        self._files: list[int] = []
        self._turns: list[tuple[int, int]] = []
        self._stuck: set[int] = set()
        """Locks whose holders did not release them in time."""

    def __enter__(self) -> Cores:
        import torch

        self._before = torch.get_num_threads(), os.sched_getaffinity(0)
        torch.set_num_threads(self.threads)
        if self._shared:
            with contextlib.suppress(OSError):  # no folder for locks: every process for itself
                self._folder.mkdir(mode=0o700, exist_ok=True)
                allowed = sorted(self._before[1])
                mine = allowed if self.threads >= len(allowed) else self._choose(allowed)
                taken = mine if self._takes_turns else []
                self._turns = [(self._open(f"queue-{core}"), self._open(f"core-{core}")) for core in taken]
                os.sched_setaffinity(0, mine)
        return self

    def __exit__(self, *_: object) -> None:
        import torch

        torch.set_num_threads(self._before[0])
        os.sched_setaffinity(0, self._before[1])
        self._turns = []
        while self._files:
            os.close(self._files.pop())

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Compute while no other fastcon process does on these cores; one thread of a process at a time."""
        held = []
        asked = time.monotonic()
        deadline = asked + PATIENCE
        for queue, core in self._turns:  # in the order of the cores, so that nobody waits in a circle
            if self._get(queue, deadline):
                if self._get(core, deadline):
                    held.append(core)
                fcntl.flock(queue, fcntl.LOCK_UN)  # a waiting process is first in line for the core
        self.waited += time.monotonic() - asked
        try:
            yield
        finally:
            for core in held:
                fcntl.flock(core, fcntl.LOCK_UN)

    def _get(self, lock: int, deadline: float) -> bool:
        got = _try(lock) if lock in self._stuck else _wait(lock, deadline)
        (self._stuck.discard if got else self._stuck.add)(lock)
        return got

    def _choose(self, allowed: list[int]) -> list[int]:
        """As many cores as threads: those that no other process has chosen, as far as they go."""
        free: list[int] = []
        busy: list[int] = []
        for core in allowed:
            mine = len(free) < self.threads and _try(self._open(f"chosen-{core}"))
            (free if mine else busy).append(core)
        start = os.getpid() % max(len(busy), 1)
        return sorted(free + (busy[start:] + busy[:start])[: self.threads - len(free)])

    def _open(self, name: str) -> int:
        self._files.append(os.open(self._folder / name, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        return self._files[-1]


@contextlib.contextmanager
def workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """`count` Python threads, inside which PyTorch uses one core each: for many small calls, which gain more from that.

    The caller's own number of threads stays as it is. On the way out, work that has not begun is dropped.
    """
    import torch

    started = threading.Barrier(count + 1)

    def begin() -> None:
        torch.set_num_threads(1)  # this thread's; PyTorch also takes it as the default of threads to come,
        torch.get_num_threads()  # and a thread looks that default up when it first asks
        with contextlib.suppress(threading.BrokenBarrierError):  # the caller is already leaving
            started.wait()

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, initializer=begin)
    try:
        for _ in range(count):  # each waits at the barrier, so that the next starts another thread
            pool.submit(int)
        started.wait()
        torch.set_num_threads(before)
        yield pool
    finally:
        started.abort()  # nobody waits for a thread that could not start
        pool.shutdown(cancel_futures=True)


def _try(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait(file: int, deadline: float) -> bool:
    while not _try(file):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL)
    return True

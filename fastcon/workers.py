"""Threads that share the cores: Python threads inside which PyTorch uses one core each."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import torch


@contextmanager
def workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """`count` threads for many small PyTorch calls, which gain more from that than from threads inside each.

    The caller's own number of threads stays as it is. On the way out, work that has not begun is dropped.
    """
    started = threading.Barrier(count + 1)

    def begin() -> None:
        torch.set_num_threads(1)  # this thread's; PyTorch also takes it as the default of threads to come,
        torch.get_num_threads()  # and a thread looks that default up when it first asks
        with suppress(threading.BrokenBarrierError):  # the caller is on its way out already
            started.wait()

    own = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, initializer=begin)
    try:
        for _ in range(count):  # each waits at the barrier, so that the next starts another thread
            pool.submit(int)
        started.wait()
        torch.set_num_threads(own)
        yield pool
    finally:
        started.abort()  # nobody waits for a thread that could not start
        pool.shutdown(cancel_futures=True)

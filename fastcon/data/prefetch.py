"""An iterator run ahead of its consumer, in a thread."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def prefetch(items: Iterable[T], depth: int) -> Prefetch[T]:
    """Run an iterator in a background thread, at most `depth` items ahead."""
    return Prefetch(items, depth)


class Prefetch(Iterator[T]):
    """The iterator behind `prefetch`; `close` ends its thread, an exception in it is raised here."""

    _END = object()

    def __init__(self, items: Iterable[T], depth: int) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(iter(items),), daemon=True)
        self._thread.start()

    def _run(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                if not self._put((item, None)):
                    return
                del item
            self._put((self._END, None))
        except BaseException as error:
            self._put((self._END, error))
        finally:
            close = getattr(items, "close", None)
            if close:
                close()

    def _put(self, entry: tuple[Any, BaseException | None]) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __next__(self) -> T:
        while True:
            if self._closed.is_set():
                raise StopIteration
            with contextlib.suppress(queue.Empty):
                item, error = self._queue.get(timeout=0.1)
                break
        if item is self._END:
            self._closed.set()
            if error is not None:
                raise error
            raise StopIteration
        return item

    def close(self) -> None:
        """Stop the thread and wait for it, unless called from that thread (garbage collection may run on any thread)."""
        self._closed.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

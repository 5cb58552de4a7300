"""Who may write at a place in object storage: the holder of a lease, which lapses when its process dies.

    PLACE/1, PLACE/2, …    the largest number is the holder's; each file says who that is, and is written anew while it lives

A file is made only where there is none of that name (a conditional write), so of two that want the same number one gets it.
Whoever sees the same file for EXPIRY seconds of its own clock takes the next number; the one before finds out before it
writes the next time. Clocks of machines are not compared.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from fastcon.errors import Busy, FastconError, one_line
from fastcon.remote import filesystem_of

BEAT, EXPIRY = 10.0, 60.0
"""Seconds between two signs of life, and without one until a holder counts as dead."""
LOOK, RARELY = 0.5, 5.0
"""Seconds between the first two looks of one that waits, and, more and more, between the last."""

_seen: dict[str, tuple[bytes, float]] = {}
"""What a lease's file last said, and since when, for those that come back later."""


class Lost(FastconError):
    """Another process has taken a lease."""


class Lease:
    """A lease, held from when it is taken until `release`."""

    def __init__(self, url: str, what: str) -> None:
        """url: the place; what: that is written under it, for messages."""
        self._what, self._who = what, f"process {os.getpid()} on {socket.gethostname()}"
        self._filesystem, self._key = filesystem_of(url)
        self._number, self._lost = 0, False
        self._token, self._beats = uuid.uuid4().hex, 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)

    def take(self) -> Lease:
        """Take it. Raises Busy where another holds it, FastconError where the place cannot be written.

        A dead holder is found out by coming back for EXPIRY seconds.
        """
        if not self._taken():
            raise Busy(f"{self._what} is being written by {self._holder()}: wait for it, or stop it first")
        self._thread.start()
        return self

    def take_over(self) -> Lease:
        """Take it, if need be when the holder is seen not to live. Raises Busy as soon as it is seen to."""
        first = None
        for pause in _pauses():
            try:
                return self.take()
            except Busy:
                said = self._read(max(self._numbers(), default=0))
                if first not in (None, said) and said is not None:
                    raise
                first = said
                time.sleep(pause)
        raise AssertionError

    def wait(self) -> Lease:
        """Take it once nobody else has it."""
        for pause in _pauses():
            with contextlib.suppress(Busy):
                return self.take()
            time.sleep(pause)
        raise AssertionError

    def check(self, look: bool = True) -> None:
        """Raise Lost where another has taken it, from then on for good; FastconError where that cannot be seen.

        look: now; else what was seen last counts, which is as old as a sign of life at most.
        """
        if look and (max(self._numbers(), default=0) != self._number or not self._mine()):
            self._lost = True
        if self._lost:
            raise Lost(
                f"{self._what} is written by another process by now, as this one gave no sign of life for {EXPIRY:g} s: "
                "run the same command again"
            )

    def release(self) -> None:
        """Give it up."""
        self._end.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # it lapses
            if self._mine():
                self._filesystem.rm_file(self._file(self._number))

    def _taken(self) -> bool:
        """Whether it could be taken now."""
        numbers = self._numbers()
        if numbers and not self._lapsed(max(numbers)):
            return False
        number = max(numbers, default=0) + 1
        try:
            self._filesystem.pipe_file(self._file(number), self._says(), mode="create")
        except Exception as error:
            there = self._read(number)
            if there is None and "Conflict" not in str(error):  # as S3 says where two try at once
                raise FastconError(f"{self._what} cannot be written ({one_line(error)})") from error
            if there != self._says():  # else it was made, and the answer lost
                return False
        later = self._numbers()
        first = max(later, default=0) == number  # else it was taken from one that died, at the same time
        for other in (n for n in later if n < number or (n == number and not first)):
            with contextlib.suppress(Exception):
                self._filesystem.rm_file(self._file(other))
        self._number = number
        return first

    def _lapsed(self, number: int) -> bool:
        """Whether a holder has given no sign of life for too long."""
        name, said = self._file(number), self._read(number)
        before, since = _seen.get(name, (None, 0.0))
        if said != before or said is None:
            _seen[name] = (said or b"", time.monotonic())
            return False
        return time.monotonic() - since >= EXPIRY

    def _live(self) -> None:
        """Say that this process lives. What fails is tried again, or seen by `check`."""
        while not self._lost and not self._end.wait(BEAT):
            with contextlib.suppress(Exception):
                self.check()
                self._beats += 1
                self._filesystem.pipe_file(self._file(self._number), self._says())

    def _says(self) -> bytes:
        return f"{self._who} ({self._token}, {self._beats})\n".encode()

    def _mine(self) -> bool:
        return self._token.encode() in (self._read(self._number) or b"")

    def _holder(self) -> str:
        said = self._read(max(self._numbers(), default=0)) or b"another process"
        return said.decode(errors="replace").partition(" (")[0].strip()

    def _read(self, number: int) -> bytes | None:
        try:
            return bytes(self._filesystem.cat_file(self._file(number)))
        except FileNotFoundError:
            return None
        except Exception as error:
            raise FastconError(f"{self._what} cannot be read ({one_line(error)})") from error

    def _numbers(self) -> list[int]:
        self._filesystem.invalidate_cache()
        try:
            names = self._filesystem.ls(self._key, detail=False, refresh=True)  # whatever another thread lists
        except FileNotFoundError:
            return []
        except Exception as error:
            raise FastconError(f"{self._what} cannot be read ({one_line(error)})") from error
        return [int(name) for name in (str(n).rsplit("/", 1)[-1] for n in names) if name.isdigit()]

    def _file(self, number: int) -> str:
        return f"{self._key}/{number}"


def _pauses() -> Iterator[float]:
    pause = LOOK
    while True:
        yield pause
        pause = min(1.5 * pause, RARELY)

"""A store in object storage is written in a folder of this machine, whose files go there while the work goes on.

What is there can be used and taken up at every moment: a record or a checksum goes up only after what it speaks of. So a
machine that is lost costs what was made since the last round of uploads, and the next one goes on from there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastcon.errors import FastconError, one_line
from fastcon.files import cache_folder, write_atomically
from fastcon.remote import AT_ONCE, fetch, filesystem_of
from fastcon.store.format import COPY
from fastcon.store.lease import Lease, Lost

EVERY = 10.0
"""Seconds between two rounds of uploads."""
TRIES, PAUSE = 3, 5.0
"""How often the last round is tried, and seconds between."""
LEASE, HELD, LOST = "write.lease", "held.lock", "lost.lock"
FACTS, PIXELS, ALL = range(3)
"""What is brought here of a store: neither logits nor baked views; baked views as well, from which teachers are run; all."""
_PARTS = {"images", "order", "boxes", "flips", "samples", "baked", "shards", "teachers", COPY, LEASE, "zarr.json"}


@contextlib.contextmanager
def mirrored(url: str, having: int = PIXELS, patient: bool = True) -> Iterator[str]:
    """The folder in which the store at `url` is to be written, by one process at a time.

    having: what of the store is brought here. patient: wait to see whether a process that holds it lives. Raises Busy where
    another process writes the store, FastconError where that cannot be done.
    """
    url = url.rstrip("/")
    lease = Lease(f"{url}/{LEASE}", url)
    lease.take_over() if patient else lease.take()
    try:
        with _scratch() as folder:
            mirror = _Mirror(url, folder, lease)
            mirror.pull(having)
            with mirror.pushing(), _called(url, folder):
                yield folder
    finally:
        lease.release()


def check_held(folder: str) -> None:
    """Raise Lost where a folder is brought to a place that another process writes by now."""
    with contextlib.suppress(FileNotFoundError):
        raise Lost(Path(folder, LOST).read_text())


@contextlib.contextmanager
def _called(url: str, folder: str) -> Iterator[None]:
    """Errors speak of the place, but for those of a full disk."""
    try:
        yield
    except FastconError as error:
        if folder not in str(error) or "cannot be written" in str(error):
            raise
        raise type(error)(str(error).replace(folder, url)) from error


@contextlib.contextmanager
def _scratch() -> Iterator[str]:
    """A folder of the cache that goes with this process, or, if that is killed, with the next."""
    below = cache_folder("writing")
    try:
        below.mkdir(parents=True, exist_ok=True)
        with open(below / "lock", "a") as sweeping:
            fcntl.flock(sweeping, fcntl.LOCK_EX)
            for left in below.glob("store-*"):
                with contextlib.suppress(OSError), open(left / HELD, "a") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left)
            folder = tempfile.mkdtemp(prefix="store-", dir=below)
            held = open(os.path.join(folder, HELD), "a")  # noqa: SIM115 - open as long as the folder is used
            fcntl.flock(held, fcntl.LOCK_EX)
    except OSError as error:
        raise FastconError(
            f"{below} cannot be written ({error.strerror}): free space, or set $FASTCON_CACHE"
        ) from error
    try:
        yield folder
    finally:
        held.close()
        shutil.rmtree(folder, ignore_errors=True)


class _Mirror:
    """A folder and the place in object storage that it is brought to."""

    def __init__(self, url: str, folder: str, lease: Lease) -> None:
        self._url, self._folder, self._lease = url, folder, lease
        self._filesystem, self._key = filesystem_of(url)
        self._there: dict[str, tuple[int, int] | bytes | None] = {}
        """What is there: time and size of the file here that it is a copy of, or the bytes; None: it is not here."""
        self._teachers: set[str] | None = None
        """Those of the record as it was last read here."""
        self._end = threading.Event()

    # there → here

    def pull(self, having: int) -> None:
        """Fetch what there is of the store. Raises FastconError for a place that holds something else."""
        names = self._names()
        if "zarr.json" not in names and COPY not in names:  # nothing, or a beginning that was cut off: it is made anew
            foreign = sorted(name for name in names if name.split("/")[0] not in _PARTS)
            if foreign:
                raise FastconError(
                    f"{self._url} holds other files ({foreign[0]}, …) and no store: give an empty or a new place"
                )
            self._there = dict.fromkeys(names)
            return
        if "zarr.json" not in names and having != ALL:
            raise FastconError(f"{self._url}: its record (zarr.json) is lost; `fastcon verify --repair` restores it")
        wanted = [name for name in names if _having(name) <= having]
        self._there = dict.fromkeys(set(names) - set(wanted))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for name, _ in zip(wanted, pool.map(self._fetch, wanted), strict=True):
                if Path(self._folder, name).exists():
                    self._there[name] = (
                        Path(self._folder, name).read_bytes() if _comes_last(name) else self._state(name)
                    )

    def _names(self) -> list[str]:
        try:
            self._filesystem.invalidate_cache()
            found = self._filesystem.find(self._key)
        except Exception as error:
            raise FastconError(f"{self._url} cannot be read ({one_line(error)})") from error
        names = [str(path)[len(self._key) :].lstrip("/") for path in found]
        return [name for name in names if name and name.split("/")[0] != LEASE and not name.endswith(".log")]

    def _fetch(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # gone since it was listed
            fetch(self._filesystem, f"{self._key}/{name}", f"{self._url}/{name}", os.path.join(self._folder, name))

    # here → there

    @contextlib.contextmanager
    def pushing(self) -> Iterator[None]:
        """Bring what changes here there, round after round and, whatever happens, at the end."""
        thread = threading.Thread(target=self._rounds, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._end.set()
            thread.join()
            self._last()

    def _rounds(self) -> None:
        while not self._end.wait(EVERY):
            try:
                self._push()
            except Lost as lost:
                with contextlib.suppress(FastconError):  # a full disk stops the writer, too
                    write_atomically(Path(self._folder, LOST), str(lost).encode())
                return
            except Exception:  # the next round brings what failed, or the last one says why
                continue

    def _last(self) -> None:
        for left in reversed(range(TRIES)):
            try:
                self._push()
                return
            except Lost:
                raise
            except Exception as error:
                if not left:
                    raise FastconError(
                        f"{self._url} cannot be written ({one_line(error)}): run the same command again once it can"
                    ) from error
                time.sleep(PAUSE)

    def _push(self) -> None:
        """One round: what the record and the checksums speak of, then these as they were before."""
        self._lease.check()
        names = self._local()
        last = {name: Path(self._folder, name).read_bytes() for name in sorted(names, key=_rank) if _comes_last(name)}
        record = json.loads(last.get("zarr.json", b"{}")).get("attributes", {}).get("fastcon")
        self._teachers = set(record["teachers"]) if record else None
        states = {name: self._state(name) for name in self._local() if not _comes_last(name)}
        changed = [name for name, state in states.items() if self._there.get(name) != state]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for name, _ in zip(changed, pool.map(self._put, changed), strict=True):
                self._there[name] = states[name]
            self._lease.check()
            for rank in (NOTES, RECORD, COPIED):
                some = [name for name in last if _rank(name) == rank and self._there.get(name) != last[name]]
                for name, _ in zip(some, pool.map(lambda name: self._put(name, last[name]), some), strict=True):
                    self._there[name] = last[name]
            gone = [name for name in self._there if self._gone(name)]
            for name, _ in zip(gone, pool.map(self._remove, gone), strict=True):
                del self._there[name]

    def _put(self, name: str, data: bytes | None = None) -> None:
        self._lease.check(look=False)
        if data is not None:
            self._filesystem.pipe_file(f"{self._key}/{name}", data)
            return
        with contextlib.suppress(FileNotFoundError):  # gone by now: what speaks of it is gone in the next round
            self._filesystem.put_file(os.path.join(self._folder, name), f"{self._key}/{name}")

    def _remove(self, name: str) -> None:
        self._lease.check(look=False)
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.rm_file(f"{self._key}/{name}")

    def _gone(self, name: str) -> bool:
        """Whether a file that is there has been removed here; one that was never here goes with its teacher."""
        if self._there[name] is not None:
            return not Path(self._folder, name).exists()
        teacher = re.match("teachers/([^/]+)/", name)
        return teacher is not None and self._teachers is not None and teacher[1] not in self._teachers

    def _local(self) -> list[str]:
        names = (str(path.relative_to(self._folder)) for path in Path(self._folder).rglob("*") if path.is_file())
        return [name for name in names if not name.endswith((".partial", ".lock"))]

    def _state(self, name: str) -> tuple[int, int]:
        about = os.stat(os.path.join(self._folder, name))
        return about.st_mtime_ns, about.st_size


def _having(name: str) -> int:
    """From what on a file is brought here."""
    array, _, chunk = name.partition("/c/")
    if chunk and array.startswith("teachers/") and array.rsplit("/", 1)[-1] in ("logits", "scales", "classes"):
        return ALL
    return PIXELS if name.startswith("shards/") else FACTS


COPIED, RECORD, NOTES, REST = range(4)


def _rank(name: str) -> int:
    """In which order files are read here, and, backwards, go there: notes are checksums and the metadata of arrays."""
    if name in ("zarr.json", COPY):
        return RECORD if name == "zarr.json" else COPIED
    return NOTES if name.endswith("/zarr.json") or name.partition("/c/")[0].endswith("/checksums") else REST


def _comes_last(name: str) -> bool:
    """Whether a file speaks of others."""
    return _rank(name) != REST

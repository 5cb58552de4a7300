"""Where the files of a store are: in a folder, or in object storage (s3://… and whatever else fsspec reaches).

Of a store in object storage a folder of the cache holds what has been read, so that everything else reads files: what the
store's checksums cover stays there from run to run, within LIMIT bytes, the least recently used going first; the rest is
fetched once each time the store is opened.
"""

from __future__ import annotations

import abc
import contextlib
import hashlib
import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec

from fastcon.errors import FastconError, one_line
from fastcon.files import cache_folder

LIMIT = 50e9
"""Bytes of each store in object storage that are kept on this machine; see `keep_at_most`."""
AT_ONCE = 16
"""Files of a store that are fetched at a time."""


_LASTING = ("order", "boxes", "flips", "shards", "logits", "scales", "classes")


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a store lies in object storage (s3://…) rather than in a folder."""
    return "://" in os.fspath(path)


def keep_at_most(gigabytes: float) -> None:
    """Set LIMIT, for the whole process."""
    global LIMIT
    LIMIT = gigabytes * 1e9


class Unreachable(FastconError):
    """A file in object storage that could not be fetched, be it there or not."""


class Files(abc.ABC):
    """The files of a store, by their names relative to it."""

    root: str
    """Where Zarr looks for them."""

    @abc.abstractmethod
    def path(self, name: str) -> str:
        """Where a file is on this machine. Raises FileNotFoundError."""

    def ahead(self, names: Iterable[str]) -> None:  # noqa: B027 - only copies are fetched
        """Begin to fetch what will be asked for."""

    def drop(self, names: Iterable[str]) -> bool:
        """Forget copies that are not what they should be; False where these are the originals."""
        return False


class Folder(Files):
    """A folder of this machine."""

    def __init__(self, path: str) -> None:
        self.root = path

    def path(self, name: str) -> str:
        """See `Files`."""
        path = os.path.join(self.root, name)
        os.stat(path)
        return path


class Direct(Files):
    """A store in object storage that is being written, through Zarr alone."""

    def __init__(self, url: str) -> None:
        self.root = url

    def path(self, name: str) -> str:
        """Nothing is fetched."""
        return ""


class Bucket(Files):
    """A store in object storage, read through a folder of the cache."""

    def __init__(self, url: str) -> None:
        """Raises FastconError where fsspec lacks what it takes to reach it."""
        self.url = url.rstrip("/")
        try:
            self._filesystem, self._key = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise FastconError(
                f"{url} lies in object storage: pip install 'fastcon[s3]' to read it ({error})"
            ) from error
        except ValueError as error:
            raise FastconError(f"{url} cannot be read ({one_line(error)})") from error
        self.root = str(cache_folder("stores") / hashlib.sha256(self.url.encode()).hexdigest()[:16])
        self._asked: dict[str, Future[str]] = {}
        self._asking = threading.Lock()
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="fetch")
        self._kept = sum(size for _, size, _ in self._lasting())

    def path(self, name: str) -> str:
        """See `Files`. Raises Unreachable."""
        return self._ask(name).result()

    def ahead(self, names: Iterable[str]) -> None:
        """See `Files`."""
        for name in names:
            self._ask(name)

    def drop(self, names: Iterable[str]) -> bool:
        """See `Files`."""
        with self._asking:
            for name in names:
                self._asked.pop(name, None)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(self.root, name))
        return True

    def _ask(self, name: str) -> Future[str]:
        with self._asking:
            future = self._asked.get(name)
            if future is None or (future.done() and (_lasts(name) or future.exception() is not None)):
                future = self._asked[name] = self._pool.submit(self._fetched, name)
            return future

    def _fetched(self, name: str) -> str:
        path = os.path.join(self.root, name)
        if _lasts(name):
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)  # when it was last used
                return path
        os.makedirs(os.path.dirname(path), exist_ok=True)
        partial = f"{path}.{os.getpid()}.{threading.get_ident()}.partial"
        try:
            self._fetch(name, partial)
            os.replace(partial, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
        if _lasts(name):
            self._make_room(os.path.getsize(path))
        return path

    def _fetch(self, name: str, to: str) -> None:
        """Raises FileNotFoundError or Unreachable; trying again, later and later, is in the libraries below fsspec."""
        try:
            self._filesystem.get_file(f"{self._key}/{name}", to)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise Unreachable(
                f"{self.url}/{name} could not be fetched ({one_line(error)}): run the same command again once it can be reached"
            ) from error

    def _make_room(self, more: int) -> None:
        with self._asking:
            self._kept += more
            if self._kept <= LIMIT:
                return
            files = sorted(self._lasting())
            self._kept = sum(size for _, size, _ in files)
            for _, size, path in files[:-1]:  # not the newest
                if self._kept <= 0.9 * LIMIT:
                    break
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                self._kept -= size

    def _lasting(self) -> list[tuple[float, int, str]]:
        """When they were last used, bytes and paths of the files that stay."""
        found = []
        for path in Path(self.root).rglob("*"):
            if _lasts(str(path.relative_to(self.root))) and path.is_file():
                with contextlib.suppress(FileNotFoundError):
                    about = path.stat()
                    found.append((about.st_mtime, about.st_size, str(path)))
        return found


def _lasts(name: str) -> bool:
    """Whether a file is one of the many whose bytes are checked whenever they are read: logits, views, shards."""
    array, _, chunk = name.partition("/c/")
    kind = array.rsplit("/", 1)[-1] if chunk else name.partition("/")[0]
    return kind in _LASTING


def files_of(path: str) -> Files:
    """The files of a store that is read."""
    return Bucket(path) if is_url(path) else Folder(path)


def get(url: str, name: str) -> bytes | None:
    """A small file of a store in object storage, as it is now; None where there is none. Raises FastconError."""
    files: Any = Bucket(url)
    try:
        return Path(files.path(name)).read_bytes()
    except FileNotFoundError:
        return None

"""Object storage (s3://… and whatever else fsspec reaches): files of stores, and tars of images.

A folder of the cache holds what has been read, so that everything else reads files. Tars, and of a store what its checksums
cover, stay there from run to run, all together within a bound, the least recently used going first; the rest of a store is
fetched once each time it is opened.
"""

from __future__ import annotations

import abc
import contextlib
import errno
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

GIGABYTES = 50.0
"""Of what lies in object storage and is kept on this machine, unless $FASTCON_CACHE_GB or `keep_at_most` says otherwise."""
AT_ONCE = 16
"""Files of a store that are fetched at a time."""


_LASTING, _WHOLE = ("order", "boxes", "flips", "logits", "scales", "classes"), "tars"
_FOLDERS = {"shards", _WHOLE}


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether something lies in object storage (s3://…) rather than on this machine."""
    return "://" in os.fspath(path)


def filesystem_of(url: str) -> tuple[Any, str]:
    """What reaches a URL, and the key there. Raises FastconError where fsspec lacks what it takes."""
    try:
        filesystem, key = fsspec.core.url_to_fs(url.rstrip("/"))
    except ImportError as error:
        raise FastconError(f"{url} lies in object storage: pip install 'fastcon[s3]' to reach it ({error})") from error
    except ValueError as error:
        raise FastconError(f"{url} cannot be read ({one_line(error)})") from error
    return filesystem, str(key)


class _Kept:
    """How many bytes are kept: those found when they were last counted, and those added since."""

    limit = 1e9 * float(os.environ.get("FASTCON_CACHE_GB", GIGABYTES))
    counted: int | None = None
    added = 0
    lock = threading.Lock()


def kept() -> float:
    """How many bytes of what lies in object storage are kept here."""
    return _Kept.limit


def keep_at_most(gigabytes: float) -> None:
    """Set how many gigabytes of what lies in object storage are kept here, for this process."""
    _Kept.limit = gigabytes * 1e9


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

    def distrust(self) -> None:  # noqa: B027 - only copies may be other than the originals
        """Forget all copies, to look at the originals."""


class Folder(Files):
    """A folder of this machine."""

    def __init__(self, path: str) -> None:
        self.root = path

    def path(self, name: str) -> str:
        """See `Files`."""
        path = os.path.join(self.root, name)
        os.stat(path)
        return path


class Bucket(Files):
    """A store in object storage, read through a folder of the cache."""

    def __init__(self, url: str) -> None:
        """Raises FastconError where fsspec lacks what it takes to reach it."""
        self.url = url.rstrip("/")
        self._filesystem, self._key = filesystem_of(self.url)
        self.root = str(cache_folder("stores") / hashlib.sha256(self.url.encode()).hexdigest()[:16])
        self._asked: dict[str, Future[str]] = {}
        self._asking = threading.Lock()
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="fetch")

    def path(self, name: str) -> str:
        """See `Files`. Raises Unreachable. Does not wait for what was asked for ahead."""
        if (here := self._here(name)) is not None:
            return here
        with self._asking:
            future = self._asked.get(name)
            mine = future is None or future.cancel() or _over(future, name)
            if mine:
                future = self._asked[name] = Future()
                future.set_running_or_notify_cancel()
        assert future is not None
        if mine:
            try:
                future.set_result(self._fetched(name))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def ahead(self, names: Iterable[str]) -> None:
        """See `Files`."""
        for name in names:
            if self._here(name) is None:
                with self._asking:
                    future = self._asked.get(name)
                    if future is None or _over(future, name):
                        self._asked[name] = self._pool.submit(self._fetched, name)

    def distrust(self) -> None:
        """See `Files`."""
        self.drop([os.path.relpath(path, self.root) for _, _, path in _lasting(Path(self.root))])

    def drop(self, names: Iterable[str]) -> bool:
        """See `Files`."""
        with self._asking:
            for name in names:
                self._asked.pop(name, None)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(self.root, name))
        return True

    def _here(self, name: str) -> str | None:
        """Where a file is that stays, if it is."""
        path = os.path.join(self.root, name)
        if _lasts(name):
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)  # when it was last used
                return path
        return None

    def _fetched(self, name: str) -> str:
        path = os.path.join(self.root, name)
        fetch(self._filesystem, f"{self._key}/{name}", f"{self.url}/{name}", path)
        if _lasts(name):
            _make_room(os.path.getsize(path))
        return path


def version(url: str) -> str:
    """What changes whenever a file in object storage does. Raises FastconError where there is none."""
    filesystem, key = filesystem_of(url)
    try:
        filesystem.invalidate_cache()
        return hashlib.sha256(str(filesystem.info(key)).encode()).hexdigest()
    except FileNotFoundError:
        raise FastconError(f"there is no {url}") from None
    except Exception as error:
        raise Unreachable(f"{url} cannot be reached ({one_line(error)})") from error


def opened(url: str, version: str) -> int:
    """A descriptor of a copy, which stays like the chunks of a store, of a file in object storage. Raises FastconError.

    To be closed soon: copies that had to go take up space as long as they are open.
    """
    name = hashlib.sha256(f"{url}\0{version}".encode()).hexdigest()[:16]
    path = str(cache_folder("stores") / name / _WHOLE / url.rsplit("/", 1)[-1])
    with _fetching.setdefault(path, threading.Lock()):
        while True:
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)
                return os.open(path, os.O_RDONLY)
            filesystem, key = filesystem_of(url)
            try:
                fetch(filesystem, key, url, path)
            except FileNotFoundError:
                raise FastconError(f"there is no {url} any more: put it back") from None
            _make_room(os.path.getsize(path))


_fetching: dict[str, threading.Lock] = {}


def fetch(filesystem: Any, key: str, url: str, path: str) -> None:
    """Bring a file here, at once. Raises FileNotFoundError or Unreachable; trying again is in the libraries below fsspec."""
    partial = f"{path}.{os.getpid()}.{threading.get_ident()}.partial"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        filesystem.get_file(key, partial)
        os.replace(partial, path)
    except FileNotFoundError:  # an older copy is none of it
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        raise
    except Exception as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise Unreachable(
                f"{url} does not fit on the disk of {cache_folder('stores')}: free space, or keep less of it with `cache`"
            ) from error
        raise Unreachable(
            f"{url} could not be fetched ({one_line(error)}): run the same command again once it can be reached"
        ) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)


def _over(future: Future[str], name: str) -> bool:
    """Whether a file must be fetched again if it is asked for again."""
    return future.done() and (_lasts(name) or future.cancelled() or future.exception() is not None)


def _make_room(more: int) -> None:
    """Count a new file, and remove the least recently used ones of all stores where they are too many."""
    with _Kept.lock:
        _Kept.added += more
        if _Kept.counted is not None and _Kept.counted + _Kept.added <= _Kept.limit and _Kept.added <= _Kept.limit / 20:
            return
        files = sorted(_lasting(cache_folder("stores")))  # those of other processes, too
        _Kept.counted, _Kept.added = sum(size for _, size, _ in files), 0
        if _Kept.counted <= _Kept.limit:
            return
        for _, size, path in files[:-1]:  # not the newest
            if _Kept.counted <= 0.9 * _Kept.limit:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            _Kept.counted -= size


def _lasting(folder: Path) -> list[tuple[float, int, str]]:
    """When they were last used, bytes and paths of the files that stay, without those on their way."""
    found = []
    for path in folder.rglob("*"):
        if path.suffix != ".partial" and path.is_file() and _lasts(str(path.relative_to(folder))):
            with contextlib.suppress(FileNotFoundError):
                about = path.stat()
                found.append((about.st_mtime, about.st_size, str(path)))
    return found


def _lasts(name: str) -> bool:
    """Whether a file is one of the many whose bytes are checked whenever they are read: logits, views, shards, tars."""
    array, _, chunk = name.partition("/c/")
    first, *rest = name.split("/")  # the name of the store's folder in the cache may come first
    return (
        array.rsplit("/", 1)[-1] in _LASTING
        if chunk
        else bool({first, *(rest[:1] if first != "teachers" else [])} & _FOLDERS)
    )


def files_of(path: str) -> Files:
    """The files of a store that is read."""
    return Bucket(path) if is_url(path) else Folder(path)


def get(url: str, name: str) -> bytes | None:
    """A small file of a store in object storage, as it is now; None where there is none. Raises FastconError."""
    filesystem, key = filesystem_of(url)
    try:
        return bytes(filesystem.cat_file(f"{key}/{name}"))
    except FileNotFoundError:
        return None
    except Exception as error:
        raise Unreachable(
            f"{url}/{name} could not be fetched ({one_line(error)}): run the same command again once it can be reached"
        ) from error


def put(url: str, name: str, data: bytes) -> None:
    """Write a small file of a store in object storage. Raises FastconError."""
    filesystem, key = filesystem_of(url)
    try:
        filesystem.pipe_file(f"{key}/{name}", data)
    except Exception as error:
        raise FastconError(f"{url}/{name} cannot be written ({one_line(error)})") from error


def has(path: str, name: str) -> bool:
    """Whether a small file is there, in a folder or in object storage."""
    return get(path, name) is not None if is_url(path) else Path(path, name).is_file()


def names(path: str) -> list[str]:
    """What there is at a place, in order. Raises FastconError."""
    if not is_url(path):
        return sorted(os.listdir(path))
    filesystem, key = filesystem_of(path)
    try:
        filesystem.invalidate_cache()
        found = [str(entry).rstrip("/") for entry in filesystem.ls(key, detail=False)]
        return sorted(entry.rsplit("/", 1)[-1] for entry in found if entry.strip("/") != key.strip("/"))
    except FileNotFoundError:
        return []
    except Exception as error:
        raise FastconError(f"{path} cannot be read ({one_line(error)})") from error

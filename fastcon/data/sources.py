"""Image sources as the user names them → one listing: where each image's bytes lie, its name, its label.

IMAGES is a folder, tar shards ('a-{000..005}.tar', which may lie in object storage), a text file of paths, or a named data
set (`datasets`). The listing reads directories and tar headers only; `manifest` reads the bytes. Tars in object storage are
fetched whole and kept: images are read in an order of their own, and a request for each costs more time than running a network.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from fastcon import remote
from fastcon.data import datasets
from fastcon.data.published import Files
from fastcon.errors import FastconError

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".jp2"}


FETCHED = 4
"""Tars that are fetched at a time."""


class Listing:
    """Columns under construction, one entry per image, with no Python object kept per image.

    containers: folders and tar files; container, offset, size: where an image lies (offset -1: a file of
    its own under the folder); names: relative to the source; labels: class indices of an image.
    """

    def __init__(self) -> None:
        self.containers: list[str] = []
        self.classes: list[str] = []
        self.multi_label = False
        self.container = array("i")
        self.offset = array("q")
        self.size = array("q")
        self.names = bytearray()
        self.name_ends = array("q")
        self.labels = array("i")
        self.label_ends = array("q")
        self.skipped: list[tuple[str, str]] = []

    def add(self, name: str, offset: int, size: int, labels: Sequence[int]) -> None:
        """Add one image of the newest container."""
        self.container.append(len(self.containers) - 1)
        self.offset.append(offset)
        self.size.append(size)
        self.names += os.fsencode(name)
        self.name_ends.append(len(self.names))
        self.labels.extend(labels)
        self.label_ends.append(len(self.labels))


def tars(sources: Sequence[str]) -> list[str]:
    """The tars that all sources are. Raises FastconError where one is something else."""
    found = []
    for source in sources:
        here = _shards(source) if remote.is_url(source) else list(map(str, _expand(source)))
        other = next((name for name in here if not name.endswith(".tar")), None)
        if other is not None:
            raise FastconError(f"{other} is no .tar, and the parts of this store have shares of tars: give those")
        found += here
    return found


def stamp(sources: Sequence[str]) -> str:
    """The cache key: a digest of everything visible of the sources without reading their bytes."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(f"\0source {source}\0".encode(errors="surrogateescape"))
        for line in _stat_lines(source):
            digest.update(os.fsencode(line))
    return digest.hexdigest()[:32]


def read(sources: Sequence[str]) -> Listing:
    """List every image of `sources`, in a fixed order; classes are united by name."""
    listing = Listing()
    reader = _Reader(listing)
    for source in sources:
        reader.read(source)
    _settle_classes(listing, reader.classes)
    if not len(listing.size) and not listing.skipped:
        raise FastconError(
            f"no images in {_named(sources)}: a folder, .tar shards or a list of paths is expected "
            f"to hold files ending in {', '.join(sorted(SUFFIXES)[:6])}, …"
        )
    return listing


def _named(sources: Sequence[str]) -> str:
    return ", ".join(sources) if sources else "an empty list of sources"


def _stat_lines(source: str) -> Iterator[str]:
    if datasets.has_scheme(source):
        files = datasets.resolve(source)
        if isinstance(files, Files):
            for name, labels in files.pairs:
                yield "{}\0{}\0{}\0{}\n".format(name, labels, *_size_and_time(files.root / name))
            return
        source = str(files)
    if remote.is_url(source):
        urls = _shards(source)
        with ThreadPoolExecutor(remote.AT_ONCE) as pool:
            yield from (
                f"{url}\0{version}\n" for url, version in zip(urls, pool.map(remote.version, urls), strict=True)
            )
        return
    for path in _expand(source):
        if path.is_dir():
            for name, entry in walk(path):
                status = (
                    entry.stat()
                    if not entry.is_symlink() or os.path.exists(entry.path)
                    else entry.stat(follow_symlinks=False)
                )
                yield f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n"
        else:
            status = path.stat()
            yield f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\n"
            if path.suffix != ".tar":
                yield from (f"{item.size}\0{item.modified}\n" for item in _listed_files(path))


def _expand(source: str) -> list[Path]:
    """Brace ranges and lists → existing paths."""
    paths = [Path(name).expanduser() for name in _braces(source)]
    missing = next((path for path in paths if not path.exists()), None)
    if missing is not None:
        raise FastconError(
            f"no such image source: {missing} (a folder, .tar shards, a text file of paths or torchvision:NAME?root=…)"
        )
    return paths


def _shards(source: str) -> list[str]:
    """Tars in object storage. Raises FastconError for what is none."""
    urls = _braces(source)
    other = next((url for url in urls if not url.endswith(".tar")), None)
    if other is not None:
        raise FastconError(
            f"{other} lies in object storage, where images are read from .tar shards: pack them into some"
        )
    return urls


def _braces(source: str) -> list[str]:
    """Brace ranges {000..005} and lists {a,b} → names."""
    braces = re.search(r"\{([^{}]+)\}", source)
    if not braces:
        return [source]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    if span:
        low, high = span.groups()
        middle = [f"{i:0{len(low)}d}" for i in range(int(low), int(high) + 1)]
    else:
        middle = braces[1].split(",")
    before, after = source[: braces.start()], source[braces.end() :]
    return [name for part in middle for name in _braces(before + part + after)]


def walk(root: Path, below: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Every file under root in a fixed order, as (name relative to root, entry); one folder's names at a time."""
    with os.scandir(root / below if below else root) as entries:
        entries_in_order = sorted(entries, key=lambda entry: os.fsencode(entry.name))
    for entry in entries_in_order:
        name = f"{below}/{entry.name}" if below else entry.name
        if entry.is_dir():
            yield from walk(root, name)
        elif Path(entry.name).suffix.lower() in SUFFIXES:
            yield name, entry


class _Reader:
    """Reads sources into a listing and numbers class names as they come."""

    def __init__(self, listing: Listing) -> None:
        self.listing = listing
        self.classes: dict[str, int] = {}

    def read(self, source: str) -> None:
        if datasets.has_scheme(source):
            self._data_set(source)
            return
        if remote.is_url(source):
            self._fetched(_shards(source))
            return
        for path in _expand(source):
            if path.is_dir():
                self._folder(path)
            elif path.suffix == ".tar":
                self._tar(path)
            elif ".tar." in path.name or path.suffix == ".tgz":
                raise FastconError(f"{path} is a compressed tar, which cannot be read at random: uncompress it")
            else:
                self._list_file(path)

    def _label(self, folder: str) -> list[int]:
        return [self.classes.setdefault(folder, len(self.classes))] if folder else []

    def _folder(self, root: Path) -> None:
        self.listing.containers.append(str(root.resolve()))
        for name, entry in walk(root):
            label = self._label(os.path.basename(os.path.dirname(name)))
            try:
                self.listing.add(name, -1, entry.stat().st_size, label)
            except OSError as error:
                self.listing.skipped.append((name, f"cannot be read: {error.strerror}"))

    def _tar(self, path: Path) -> None:
        try:
            self._members(str(path.resolve()), path.name, os.open(path, os.O_RDONLY))
        except OSError as error:
            raise FastconError(f"{path} is not a readable tar file ({error}): fetch or make it again") from error

    def _fetched(self, urls: list[str]) -> None:
        """List tars in object storage, with the next ones on their way."""
        coming: deque[tuple[str, Future[int]]] = deque()
        with ThreadPoolExecutor(FETCHED) as pool:
            try:
                for url in [*urls, *[""] * FETCHED]:
                    if url:
                        coming.append((url, pool.submit(lambda url: remote.opened(url, remote.version(url)), url)))
                    if coming and (len(coming) > FETCHED or not url):
                        first, descriptor = coming.popleft()
                        self._members(first, first.rsplit("/", 1)[-1], descriptor.result())
            finally:
                for _, descriptor in coming:
                    if not descriptor.exception():
                        os.close(descriptor.result())

    def _members(self, place: str, shard: str, descriptor: int) -> None:
        self.listing.containers.append(place)
        try:
            with os.fdopen(descriptor, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    self._member(shard, member)
                    tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
        except (tarfile.TarError, OSError) as error:
            raise FastconError(f"{place} is not a readable tar file ({error}): fetch or make it again") from error

    def _member(self, shard: str, member: tarfile.TarInfo) -> None:
        if Path(member.name).suffix.lower() not in SUFFIXES:
            return
        name = f"{shard}/{member.name}"
        if not member.isreg() or member.issparse():
            self.listing.skipped.append((name, "not a plain file in the tar (a link, say)"))
            return
        label = self._label(os.path.basename(os.path.dirname(member.name)))
        self.listing.add(name, member.offset_data, member.size, label)

    def _list_file(self, path: Path) -> None:
        self.listing.containers.append(str(path.parent.resolve()))
        for item in _listed_files(path):
            labels = [self.classes.setdefault(label, len(self.classes)) for label in item.labels]
            if item.size < 0:
                self.listing.skipped.append((item.name, "no such file"))
            else:
                self.listing.add(item.name, -1, item.size, labels)

    def _data_set(self, source: str) -> None:
        files = datasets.resolve(source)
        if isinstance(files, Path):
            self.read(str(files))
            return
        self.listing.containers.append(str(files.root))
        self.listing.multi_label |= files.multi_label
        for name, labels in files.pairs:
            numbers = [self.classes.setdefault(label, len(self.classes)) for label in labels]
            try:
                self.listing.add(name, -1, os.stat(files.root / name).st_size, numbers)
            except OSError as error:
                self.listing.skipped.append((name, f"cannot be read: {error.strerror}"))


def _settle_classes(listing: Listing, classes: dict[str, int]) -> None:
    """Number the classes in the order of their names; a single class around everything does not count as one."""
    counts = {stop - start for start, stop in zip([0, *listing.label_ends], listing.label_ends, strict=False)}
    if len(classes) < 2:
        del listing.labels[:]
        listing.label_ends = array("q", [0]) * len(listing.label_ends)
        return
    listing.multi_label |= bool(counts - {0, 1})
    listing.classes = sorted(classes)
    number = {classes[name]: index for index, name in enumerate(listing.classes)}
    listing.labels = array("i", (number[label] for label in listing.labels))


class _ListedFile:
    """A line of a text file: a path, then its labels, separated by tabs."""

    def __init__(self, line: str, root: Path) -> None:
        self.name, *self.labels = line.split("\t")
        self.size, self.modified = _size_and_time(root / self.name)


def _size_and_time(path: Path) -> tuple[int, int]:
    """Bytes and time of a file; -1 where it is not there."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a name with a NUL
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _listed_files(path: Path) -> Iterator[_ListedFile]:
    try:
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                if line.strip():
                    yield _ListedFile(line.rstrip("\r\n"), path.parent)
    except UnicodeDecodeError as error:
        raise FastconError(f"{path} is neither a folder, a .tar nor a text file of paths") from error

"""Image sources as the user names them → one listing: where each image's bytes lie, its name, its label.

IMAGES is a folder, tar shards ('a-{000..005}.tar'), a text file of paths, or torchvision:NAME?option=value.
The listing reads directories and tar headers only; `manifest` reads the bytes.
"""

from __future__ import annotations

import ast
import hashlib
import io
import os
import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from fastcon.errors import FastconError

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".jp2"}


class Listing:
    """Columns under construction, one entry an image, with no Python object kept per image.

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


def stamp(sources: Sequence[str]) -> str:
    """A digest of everything that can be seen of the sources without reading bytes: the cache's key."""
    seen = hashlib.sha256()
    for source in sources:
        seen.update(f"\0source {source}\0".encode(errors="surrogateescape"))
        for line in _stat_lines(source):
            seen.update(os.fsencode(line))
    return seen.hexdigest()[:32]


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
    if source.startswith("torchvision:"):
        pairs = _paths_and_labels(_torchvision_dataset(source))
        if pairs is not None:
            for file, label in pairs:
                status = os.stat(file)
                yield f"{file}\0{label}\0{status.st_size}\0{status.st_mtime_ns}\n"
            return
        source = str(_materialised(source))
    for path in _expand(source):
        if path.is_dir():
            for name, entry in _walk(path):
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
    """Brace ranges {000..005} and lists {a,b} → existing paths."""
    found = re.search(r"\{([^{}]+)\}", source)
    if not found:
        path = Path(source).expanduser()
        if not path.exists():
            raise FastconError(
                f"no such image source: {source} (a folder, .tar shards, a text file of paths or "
                "torchvision:NAME?root=…)"
            )
        return [path]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if span:
        low, high = span.groups()
        middle = [f"{i:0{len(low)}d}" for i in range(int(low), int(high) + 1)]
    else:
        middle = found[1].split(",")
    before, after = source[: found.start()], source[found.end() :]
    return [path for part in middle for path in _expand(before + part + after)]


def _walk(root: Path, below: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Every file under root in a fixed order, as (name relative to root, entry); one folder's names at a time."""
    with os.scandir(root / below if below else root) as entries:
        here = sorted(entries, key=lambda entry: os.fsencode(entry.name))
    for entry in here:
        name = f"{below}/{entry.name}" if below else entry.name
        if entry.is_dir():
            yield from _walk(root, name)
        elif Path(entry.name).suffix.lower() in SUFFIXES:
            yield name, entry


class _Reader:
    """Reads sources into a listing and numbers class names as they come."""

    def __init__(self, listing: Listing) -> None:
        self.listing = listing
        self.classes: dict[str, int] = {}

    def read(self, source: str) -> None:
        if source.startswith("torchvision:"):
            self._torchvision(source)
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
        for name, entry in _walk(root):
            label = self._label(os.path.basename(os.path.dirname(name)))
            try:
                self.listing.add(name, -1, entry.stat().st_size, label)
            except OSError as error:
                self.listing.skipped.append((name, f"cannot be read: {error.strerror}"))

    def _tar(self, path: Path) -> None:
        self.listing.containers.append(str(path.resolve()))
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    self._member(path, member)
                    tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
        except (tarfile.TarError, OSError) as error:
            raise FastconError(f"{path} is not a readable tar file ({error}): fetch or make it again") from error

    def _member(self, path: Path, member: tarfile.TarInfo) -> None:
        if Path(member.name).suffix.lower() not in SUFFIXES:
            return
        name = f"{path.name}/{member.name}"
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

    def _torchvision(self, source: str) -> None:
        dataset = _torchvision_dataset(source)
        pairs = _paths_and_labels(dataset)
        if pairs is None:
            self.read(str(_materialised(source)))
            return
        root = os.path.commonpath([os.path.dirname(str(path)) for path, _ in pairs])
        self.listing.containers.append(root)
        names = [str(name) for name in getattr(dataset, "classes", [])]
        for path, label in pairs:
            name = names[label] if label < len(names) else str(label)
            index = self.classes.setdefault(name, len(self.classes))
            self.listing.add(os.path.relpath(path, root), -1, os.stat(path).st_size, [index])


def _settle_classes(listing: Listing, found: dict[str, int]) -> None:
    """Number the classes in the order of their names; a single one, around everything, is none."""
    counts = {stop - start for start, stop in zip([0, *listing.label_ends], listing.label_ends, strict=False)}
    if len(found) < 2:
        del listing.labels[:]
        listing.label_ends = array("q", [0]) * len(listing.label_ends)
        return
    listing.multi_label = bool(counts - {0, 1})
    listing.classes = sorted(found)
    number = {found[name]: index for index, name in enumerate(listing.classes)}
    listing.labels = array("i", (number[label] for label in listing.labels))


class _ListedFile:
    """A line of a text file: a path, then its labels, separated by tabs."""

    def __init__(self, line: str, root: Path) -> None:
        self.name, *self.labels = line.split("\t")
        try:
            status = os.stat(root / self.name)
            self.size, self.modified = status.st_size, status.st_mtime_ns
        except (OSError, ValueError):  # ValueError: a name with a NUL
            self.size, self.modified = -1, -1


def _listed_files(path: Path) -> Iterator[_ListedFile]:
    try:
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                if line.strip():
                    yield _ListedFile(line.rstrip("\r\n"), path.parent)
    except UnicodeDecodeError as error:
        raise FastconError(f"{path} is neither a folder, a .tar nor a text file of paths") from error


def _torchvision_dataset(source: str) -> Any:
    import torchvision

    name, _, query = source.removeprefix("torchvision:").partition("?")
    factory = getattr(torchvision.datasets, name, None)
    if factory is None:
        raise FastconError(f"torchvision has no data set {name!r} (in {source})")
    options = {key: _literal(value) for key, value in parse_qsl(query)}
    try:
        return factory(**options)
    except Exception as error:
        raise FastconError(
            f"torchvision.datasets.{name} did not open with {options}: "
            f"{' '.join(str(error).split())} (add &download=True to let it download)"
        ) from error


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _paths_and_labels(dataset: Any) -> list[tuple[str, int]] | None:
    """(path, label) of a torchvision data set that keeps them, in its order; None where it does not."""
    for attribute in ("samples", "_samples"):
        pairs = getattr(dataset, attribute, None)
        if pairs and isinstance(pairs[0][0], str | Path) and isinstance(pairs[0][1], int):
            return list(pairs)
    for files, labels in (("_image_files", "_labels"), ("_images", "_labels")):
        if hasattr(dataset, files) and isinstance(getattr(dataset, labels, None), list):
            return list(zip(getattr(dataset, files), getattr(dataset, labels), strict=True))
    return None


def _materialised(source: str) -> Path:
    """A cached tar of PNGs in class folders, for a torchvision data set that hides its files."""
    from fastcon.manifest import cache_folder

    path = cache_folder("torchvision") / f"{hashlib.sha256(source.encode()).hexdigest()[:16]}.tar"
    if path.exists():
        return path
    dataset = _torchvision_dataset(source)
    classes = [str(name) for name in getattr(dataset, "classes", [])]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    with tarfile.open(partial, "w") as tar:
        for i in range(len(dataset)):
            image, label = dataset[i]
            label = int(label)
            folder = (classes[label] if label < len(classes) else str(label)).replace("/", "-")
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "PNG")
            header = tarfile.TarInfo(f"data/{folder}/{i:07d}.png")
            header.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(header, buffer)
    os.replace(partial, path)
    return path

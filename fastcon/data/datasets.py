"""Named data sets as IMAGES: data:NAME?root=…&part=…, torchvision:NAME?…, rendered:NAME?…  → files and labels.

`data:` reads the official files of the paper's data sets as they are published, unpacked into `root`; `torchvision:` is any
data set of torchvision; `rendered:` are images that fastcon draws itself, for trying things out. Nothing is
downloaded, unless torchvision is asked to (&download=True).
"""

from __future__ import annotations

import ast
import hashlib
import io
import re
import tarfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from fastcon.data.published import DATASETS, DataSet, Files, torchvision_files
from fastcon.errors import FastconError
from fastcon.files import cache_folder, derived

SCHEMES = ("data", "torchvision", "rendered")


def has_scheme(source: str) -> bool:
    """Whether an IMAGES source is a named data set."""
    return source.partition(":")[0] in SCHEMES


def resolve(source: str) -> Files | Path:
    """The files of a named data set, or the folder or tar that was made of it. Raises FastconError."""
    scheme, _, rest = source.partition(":")
    name, _, query = rest.partition("?")
    options = _options(query)
    if scheme == "data":
        return _official(source, name, options)
    if scheme == "rendered":
        return _rendered(source, name, options)
    files = torchvision_files(_torchvision_dataset(source, name, options))
    return _materialised(source, name, options) if files is None else files


def _options(query: str) -> dict[str, str]:
    """key=value&… with %XX decoded; a plus stays one, since paths have them."""
    pairs = (part.partition("=") for part in query.split("&") if part)
    return {key: unquote(value) for key, _, value in pairs}


def published(source: str) -> int:
    """Images of a data:NAME?… source as published. Raises FastconError for an unknown name or part."""
    name, _, query = source.removeprefix("data:").partition("?")
    data_set = dataset(name)
    return data_set.parts[_part(source, name, _options(query))]


def _part(source: str, name: str, options: dict[str, str]) -> str:
    data_set = dataset(name)
    part = options.get("part", data_set.train)
    if part not in data_set.parts:
        raise FastconError(f"{source}: {name} has no part {part!r}: there are {', '.join(data_set.parts)}")
    return part


def _official(source: str, name: str, options: dict[str, str]) -> Files | Path:
    data_set = dataset(name)
    unknown = set(options) - {"root", "part"}
    if unknown or not options.get("root"):
        raise FastconError(
            f"{source}: data sets are data:NAME?root=FOLDER&part=PART"
            + (f", {sorted(unknown)[0]!r} is no option" if unknown else "")
        )
    root, part = Path(options["root"]).expanduser().absolute(), _part(source, name, options)
    try:
        content = data_set.read(root, part) if data_set.group is None else data_set.read(root, part, data_set.group)
        pairs = content if isinstance(content, Path) else list(content)
    except OSError as error:
        other = data_set.elsewhere(root, part)
        if other is not None:
            return other
        raise FastconError(
            f"{source}: {error.filename or root} is missing: {root} should hold {data_set.files} (from {data_set.where})"
            + (f", or {part}/CLASS/*.jpg, or {part}*.tar with class folders" if data_set.group is None else "")
        ) from error
    except Exception as error:  # whatever a reader of damaged files may raise
        raise FastconError(f"{source}: the files under {root} are not as published ({error!r})") from error
    if isinstance(pairs, Path):
        return pairs
    if not pairs:
        raise FastconError(f"{source}: no images: {root} should hold {data_set.files} (from {data_set.where})")
    return Files(root, pairs, data_set.group is not None)


def dataset(name: str) -> DataSet:
    """The data set of a name. Raises FastconError, naming all."""
    try:
        return DATASETS[name]
    except KeyError:
        raise FastconError(f"no data set {name!r}: there are {', '.join(DATASETS)} (`fastcon data list`)") from None


def _torchvision_dataset(source: str, name: str, options: dict[str, str]) -> Any:
    import torchvision

    factory = getattr(torchvision.datasets, name, None)
    if factory is None:
        raise FastconError(f"torchvision has no data set {name!r} (in {source})")
    values = {key: _literal(value) for key, value in options.items()}
    try:
        return factory(**values)
    except Exception as error:
        raise FastconError(
            f"torchvision.datasets.{name} did not open with {values}: "
            f"{' '.join(str(error).split())} (add &download=True to let it download)"
        ) from error


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _cached(source: str, ending: str) -> Path:
    return cache_folder("datasets") / f"{hashlib.sha256(source.encode()).hexdigest()[:16]}{ending}"


def _materialised(source: str, name: str, options: dict[str, str]) -> Path:
    """A cached tar of PNGs in class folders, for a torchvision data set that hides its files."""

    def make(partial: Path) -> None:
        _write_tar(_torchvision_dataset(source, name, options), partial)

    return derived(_cached(source, ".tar"), make)


def _write_tar(dataset: Any, path: Path) -> None:
    classes = [str(name) for name in getattr(dataset, "classes", [])]
    with tarfile.open(path, "w") as tar:
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


RENDERED = ("glyphs", "shapes", "textures", "digits", "mixed", "pairs")


def _rendered(source: str, name: str, options: dict[str, str]) -> Files | Path:
    """A cached folder of rendered images.

    glyphs, shapes, textures: &classes=FIRST-LAST&images=EACH; digits: scikit-learn's; mixed: unlabelled, &images=ALL;
    pairs: two glyphs an image, multi-label, &classes=FIRST-LAST&images=ALL.
    """
    from fastcon.data import rendered

    if name not in RENDERED:
        raise FastconError(f"{source}: what is rendered is {', '.join(RENDERED)}")
    allowed = {"digits": set(), "mixed": {"images"}}.get(name, {"classes", "images"})
    span = re.fullmatch(r"(\d+)-(\d+)", options.get("classes", "0-11"))
    images = options.get("images", "50")
    if set(options) - allowed or not span or int(span[2]) < int(span[1]) or not images.isdecimal() or int(images) < 1:
        raise FastconError(f"{source}: options of {name} are {', '.join(sorted(allowed)) or 'none'}, as classes=0-11")
    classes, count = range(int(span[1]), int(span[2]) + 1), int(images)

    def make(partial: Path) -> None:
        if name == "digits":
            rendered.write_digits(partial)
        elif name == "mixed":
            rendered.write_proxy(partial, count)
        elif name == "pairs":
            rendered.write_pairs(partial, classes, count)
        else:
            rendered.write_classes(partial, name, classes, count)

    folder = derived(_cached(source, ""), make)
    return folder / "labels.txt" if name == "pairs" else folder

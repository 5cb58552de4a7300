"""Layouts → Zarr arrays and groups, and the metadata files that they must have. The only module that knows Zarr."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import MemoryStore

from fastcon.errors import FastconError, one_line
from fastcon.store.format import Layout


def open_group(path: str, mode: str, called: str | None = None) -> Any:
    """The root group: "r" and "r+" need one, "a" makes it where there is none. called: what errors call it."""
    try:
        return zarr.open_group(path, mode=mode, zarr_format=3, use_consolidated=False)  # type: ignore[arg-type]
    except Exception as error:
        raise FastconError(
            f"{called or path} is no fastcon store ({one_line(error)}): give the folder that `fastcon precompute --store` wrote"
        ) from error


def group_at(path: str) -> Any:
    """The root group, or None where there is nothing. Raises FastconError for a place that cannot be read."""
    try:
        return zarr.open_group(path, mode="r", zarr_format=3, use_consolidated=False)
    except FileNotFoundError:  # the one error that means "nothing there": any other must not start a new store
        return None
    except Exception as error:
        raise FastconError(f"{path} cannot be read ({one_line(error)})") from error


def create(group: Any, name: str, layout: Layout) -> Any:
    """Make an array of this layout, replacing an existing one."""
    return group.create_array(
        name,
        config={"write_empty_chunks": True},  # a chunk of zeros is not a missing chunk
        shape=layout.shape,
        chunks=tuple(max(c, 1) for c in layout.chunks),
        dtype=layout.dtype,
        fill_value=layout.fill,
        overwrite=True,
        filters=None,
        serializer=BytesCodec(endian="little" if np.dtype(layout.dtype).itemsize > 1 else None),
        compressors=Crc32cCodec(),
    )


def existing(group: Any, path: str, expected: Layout) -> Any:
    """An array of a group. Raises some exception where there is none, or its metadata are not those of its layout.

    A first axis longer than expected is growth in progress: another process may be adding views.
    """
    with zarr.config.set({"array.write_empty_chunks": True}):  # a chunk of zeros is not a missing chunk
        array = group[path]
    fields, implied = _fields(array.metadata.to_dict()), _fields(_metadata(expected))
    if array.shape[0] > implied["shape"][0]:
        fields["shape"][0] = implied["shape"][0]
    if fields != implied:
        raise ValueError("its zarr.json is not what the record implies")
    return array


def _metadata(layout: Layout) -> dict[str, Any]:
    """The metadata of an array, as this version of Zarr has them."""
    return create(zarr.open_group(MemoryStore(), mode="w", zarr_format=3), "x", layout).metadata.to_dict()


def array_file(layout: Layout) -> bytes:
    """The zarr.json of an array."""
    memory = MemoryStore()
    create(zarr.open_group(memory, mode="w", zarr_format=3), "x", layout)
    return memory._store_dict["x/zarr.json"].to_bytes()


def group_file(attributes: dict[str, Any]) -> bytes:
    """The zarr.json of a group."""
    memory = MemoryStore()
    zarr.open_group(memory, mode="w", zarr_format=3, attributes=attributes)
    return memory._store_dict["zarr.json"].to_bytes()


def _fields(metadata: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(metadata, default=str))


def same_json(path: Path, expected: bytes) -> bool:
    """Whether a file holds the same values; white space and the order of keys may differ between versions.

    A first axis that is longer than it must be is a growth that goes on, or was cut off: what it adds is not used.
    """
    try:
        value, implied = (json.loads(data, parse_float=str, parse_int=str) for data in (path.read_bytes(), expected))
        if implied.get("shape") and int(value["shape"][0]) > int(implied["shape"][0]):
            value["shape"][0] = implied["shape"][0]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return False
    return value == implied

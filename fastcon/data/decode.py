"""The one decode path: encoded bytes and crop boxes → uint8 RGB batches, for precompute, train and probe alike.

A DALI graph does it with `mixed` decoding on a GPU; without one it decodes on the CPU and PyTorch resizes.
`loader="torchvision"` is its twin where DALI is not available, and the oracle of its test.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import io
import itertools
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fastcon.cores import workers
from fastcon.data.prefetch import prefetch
from fastcon.errors import FastconError, one_line
from fastcon.machine import Machine

MIXED = {"hw_decoder_load": 0.0, "jpeg_fancy_upsampling": True}
"""Of the decoder on a GPU. Colours are upsampled as on the CPU: else pixels of 4:2:0 photos differ by about 0.5 of 255. No share
for the hardware decoder: on Hopper it was seen to write out of stream order (torchcodec issue 1634)."""
AT_ONCE = 1 << 28
"""Most pixels of whole images decoded at a time, about 0.8 GB: 128 photos of 12 megapixels would take three times 4.6 GB."""
TOGETHER = 256
"""Baked views that are decoded at a time: up to 8 smaller batches of them are joined."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A batch to decode: image indices [B], boxes [B, 4] (top, left, height, width), flips [B] of 0 or 1."""

    indices: NDArray[np.integer]
    boxes: NDArray[np.int32]
    flips: NDArray[np.uint8]

    @classmethod
    def whole(cls, indices: NDArray[np.integer], side: int) -> Request:
        """Images that are squares of `side`, as they are."""
        boxes = np.tile(np.array([0, 0, side, side], dtype=np.int32), (len(indices), 1))
        return cls(indices, boxes, np.zeros(len(indices), dtype=np.uint8))

    @classmethod
    def joined(cls, requests: Sequence[Request]) -> Request:
        """Several requests, one after another."""
        columns = ([getattr(request, field.name) for request in requests] for field in dataclasses.fields(cls))
        return cls(*map(np.concatenate, columns))

    def __getitem__(self, which: slice) -> Request:
        return Request(self.indices[which], self.boxes[which], self.flips[which])


Requests = Iterator[Request]
Pixels = dict[int, Tensor]
"""Side length → uint8 [B, 3, side, side] in channels-last memory."""
Data = NDArray[np.uint8]
"""The encoded bytes of an image."""


class Reader(Protocol):
    """Returns encoded bytes, checked; called from one thread at a time. Raises FastconError for what it cannot find."""

    def read(self, indices: Sequence[int]) -> list[Data]:
        """The bytes of some images."""

    def close(self) -> None:
        """Close files and end threads."""


class Images(Protocol):
    """What can be decoded from: a manifest, or the baked views of a store."""

    @property
    def side(self) -> int | None:
        """Every image is a square of this side, taken whole and unmirrored; None: boxes and flips say."""

    def name(self, index: int) -> str:
        """What to call an image."""

    def areas(self, indices: NDArray[np.integer]) -> NDArray[np.int64]:
        """Pixels that some images have, whole."""

    def reader(self) -> Reader:
        """Open it."""


def decode(
    images: Images, requests: Iterable[Request], sizes: Sequence[int], batch_size: int, machine: Machine
) -> Iterator[Pixels]:
    """Decode, crop, resize and flip each request, in order; a request has at most `batch_size` images.

    Each box is resized to every one of `sizes`. Bytes are read, and checked against what is recorded of them, in a
    background thread ahead of decoding, and decoding goes on in another while a batch is used. Raises FastconError
    where an image changed or does not decode.
    """
    most = batch_size
    if images.side is not None:  # small images, whose batches are taken together
        most = max(most, min(8 * most, TOGETHER))
    expected: deque[tuple[list[int], int]] = deque()  # for each group: images of its requests, and in how many parts

    def parts() -> Iterator[Request]:
        for group in _grouped(requests, most):
            whole = Request.joined(group)
            bounds = _bounds(images.areas(whole.indices))
            expected.append(([len(request.indices) for request in group], len(bounds)))
            yield from (whole[bound] for bound in bounds)

    recent: deque[Encoded] = deque(maxlen=8)  # a failure may concern any image in flight
    plan = _Plan(sorted(set(sizes)), images.side, most, machine.cores, machine.target, machine.loader)
    with contextlib.ExitStack() as opened:  # which closes the last first
        reader = opened.enter_context(contextlib.closing(images.reader()))
        encoded = prefetch(_remembered(_read(reader, parts()), recent), depth=2)
        opened.enter_context(contextlib.closing(encoded))
        decoded = prefetch(GRAPHS[machine.loader](encoded, plan), depth=1)
        opened.enter_context(contextlib.closing(decoded))
        try:
            for pixels, ready in decoded:
                hand_over(pixels.values(), ready)
                counts, more = expected.popleft()
                for _ in range(more - 1):
                    part, ready = next(decoded)
                    hand_over(part.values(), ready)
                    pixels = {size: torch.cat([pixels[size], part[size]]) for size in pixels}
                start = 0
                for count in counts:
                    batch = {size: together[start : start + count] for size, together in pixels.items()}
                    yield batch
                    start += count
                del pixels, batch  # their lifetime is up to their user
        except _Undecodable as error:
            raise FastconError(_culprit(images, recent, plan) or str(error)) from error


def _bounds(areas: NDArray[np.int64]) -> list[slice]:
    """Cut a request where its images together have more than AT_ONCE pixels: on a GPU they are decoded whole."""
    if areas.sum() <= AT_ONCE:
        return [slice(0, len(areas))]
    starts, held = [0], 0
    for k, area in enumerate(areas.tolist()):
        if held and held + area > AT_ONCE:
            starts.append(k)
            held = 0
        held += area
    return [slice(start, stop) for start, stop in itertools.pairwise([*starts, len(areas)])]


def hand_over(tensors: Iterable[Tensor], ready: torch.cuda.Event | None) -> None:
    """Make the current stream wait for tensors that another one fills, and keep their memory until it has used them."""
    if ready is not None:
        for tensor in tensors:
            stream = torch.cuda.current_stream(tensor.device)
            stream.wait_event(ready)
            tensor.record_stream(stream)


def settings(machine: Machine) -> dict[str, Any]:
    """What may change pixels, to be recorded beside them: decoder, its options and versions."""
    kind, loader = machine.target.type, machine.loader
    common = {"loader": loader, "interpolation": "triangular, antialiased", "orientation": "as stored"}
    if loader == "torchvision":
        return common | {"decoder": "pillow", "pillow": importlib.metadata.version("pillow")}
    dali = _dali_module()
    common |= {"dali": dali.__version__}
    if kind == "cuda":
        return common | {"decoder": "mixed", **MIXED, **_versions("nvidia-nvimgcodec", "nvidia-nvjpeg")}
    return common | {"decoder": "cpu", "torch": torch.__version__}


def _versions(*packages: str) -> dict[str, str]:
    """Versions of installed distributions, whatever CUDA version their names end with."""
    installed = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    return {
        name: version
        for name, version in sorted(installed.items())
        if name and re.sub(r"-cu\d+$", "", name) in packages
    }


def _dali_module() -> Any:
    try:
        return importlib.import_module("nvidia.dali")
    except ImportError as error:
        raise FastconError(
            f"NVIDIA DALI is not installed ({error}): pip install nvidia-dali-cuda130, or use `loader` torchvision"
        ) from error


Encoded = tuple[Request, list[Data]]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a graph makes of encoded images: sides to resize to, the side they all have (or None), and how."""

    sizes: list[int]
    side: int | None
    batch_size: int
    threads: int
    device: torch.device
    loader: str


class _Undecodable(Exception):
    """A batch did not decode; it is not known yet which image failed."""


def _remembered(encoded: Iterator[Encoded], recent: deque[Encoded]) -> Iterator[Encoded]:
    for item in encoded:
        recent.append(item)
        yield item


def _culprit(images: Images, recent: Iterable[Encoded], plan: _Plan) -> str | None:
    """Decode the images of the last batches one by one and name the first that fails."""
    alone = dataclasses.replace(plan, batch_size=1, threads=1)
    singles = [(request[k : k + 1], [file]) for request, data in list(recent) for k, file in enumerate(data)]
    decoded = 0
    try:
        for _ in GRAPHS[plan.loader](iter(singles), alone):
            decoded += 1
    except _Undecodable as error:
        name = images.name(int(singles[decoded][0].indices[0]))
        return (
            f"image {name!r} does not decode ({error}): remove it, or leave out `trust_images` so that indexing leaves "
            "it out"
        )
    return None


def _grouped(requests: Iterable[Request], most: int) -> Iterator[list[Request]]:
    """Requests that follow each other, as many together as have at most `most` images."""
    group: list[Request] = []
    held = 0
    for request in requests:
        if group and held + len(request.indices) > most:
            yield group
            group, held = [], 0
        group.append(request)
        held += len(request.indices)
        if held >= most:  # not only when the next one comes
            yield group
            group, held = [], 0
    if group:
        yield group


def _read(reader: Reader, requests: Iterable[Request]) -> Iterator[Encoded]:
    for request in requests:
        yield request, reader.read(request.indices.tolist())


Decoded = tuple[Pixels, torch.cuda.Event | None]
"""A batch, and on a GPU what to wait for before its use."""


def _dali(encoded: Iterator[Encoded], plan: _Plan) -> Iterator[Decoded]:
    """On a GPU the whole way in one graph; on the CPU the graph decodes, and PyTorch resizes (see `_resized`)."""
    _dali_module()
    from nvidia.dali import fn, pipeline_def
    from nvidia.dali import tensors as dali_tensors
    from nvidia.dali import types as dali_types
    from nvidia.dali.plugin.pytorch import feed_ndarray

    types: Any = dali_types  # its names are made at import, where no type checker sees them
    tensors: Any = dali_tensors  # whose stubs lack an argument
    sizes, device = plan.sizes, plan.device
    on_gpu = device.type == "cuda"
    failure: list[BaseException] = []

    inputs = 1 if plan.side is not None else 3  # boxes and flips only where they are used: DALI would warn

    def source() -> tuple[Any, ...]:
        try:
            request, data = next(encoded)
        except StopIteration:
            raise
        except BaseException as error:  # DALI would wrap it in a trace of its own
            failure.append(error)
            raise StopIteration from error
        # As a list of arrays DALI would look at each of them in Python.
        files = tensors.TensorListCPU([tensors.TensorCPU(file) for file in data], contiguous=False)
        return (files, request.boxes.astype(np.int32, copy=False), request.flips.astype(np.int32))[:inputs]

    def resize(images: Any, side: int) -> Any:
        return fn.resize(images, size=[side, side], interp_type=types.INTERP_LINEAR, antialias=True)

    @pipeline_def(  # type: ignore[call-overload]  # DALI's stubs do not know exec_dynamic
        batch_size=plan.batch_size,
        num_threads=plan.threads,
        device_id=device.index or 0 if on_gpu else None,
        prefetch_queue_depth=2,
        exec_dynamic=True,  # new memory for every batch: `dense` hands it on
    )
    def graph() -> Any:
        images: Any
        dtypes, ndims = [types.UINT8, types.INT32, types.INT32], [1, 1, 0]
        jpegs, *rest = fn.external_source(
            source=source, num_outputs=inputs, batch=True, dtype=dtypes[:inputs], ndim=ndims[:inputs]
        )
        kind = {"device": "mixed", **MIXED} if on_gpu else {"device": "cpu"}
        kind |= {"output_type": types.RGB, "adjust_orientation": False}
        if plan.side is not None:
            images = fn.decoders.image(jpegs, **kind)
            return tuple(images if s == plan.side else resize(images, s) for s in sizes) if on_gpu else images
        box, flip = rest
        if not on_gpu:
            return fn.decoders.image_slice(jpegs, box[:2], box[2:], axes=[0, 1], **kind), flip
        # Whole image, then the box: nvImageCodec's region decoding crashed on Hopper (its issue 55).
        images = fn.slice(fn.decoders.image(jpegs, **kind), box[:2], box[2:], axes=[0, 1])
        return tuple(fn.flip(resize(images, s), horizontal=flip) for s in sizes)

    stream = (
        torch.cuda.Stream(device) if on_gpu else None
    )  # so that decoding never waits for the consumer of the batches

    def dense(output: Any) -> Tensor:
        decoded = output.as_tensor()
        if stream is None:  # no copy: the batch keeps its memory, and the next one takes other
            return torch.from_dlpack(decoded).permute(0, 3, 1, 2)
        with torch.cuda.stream(stream):
            pixels = torch.empty(decoded.shape(), dtype=torch.uint8, device=device)
            feed_ndarray(decoded, pixels, cuda_stream=stream)
        return pixels.permute(0, 3, 1, 2)

    pipe = graph()
    pipe.build()
    with workers(plan.threads) as pool:
        while True:
            try:
                outputs = pipe.run()
            except StopIteration:
                if failure:
                    raise failure[0] from None
                return
            except RuntimeError as error:
                raise _Undecodable(f"DALI: {one_line(error, 200)}") from error
            if on_gpu or sizes == [plan.side]:
                pixels = {size: dense(output) for size, output in zip(sizes, outputs, strict=True)}
                yield pixels, None if stream is None else stream.record_event()
            else:
                crops = [torch.from_numpy(np.asarray(crop)) for crop in outputs[0]]  # type: ignore[union-attr]
                flips = np.asarray(outputs[1].as_tensor()) if plan.side is None else np.zeros(len(crops), np.int32)
                yield _resized(pool, crops, flips, sizes), None


def _resized(pool: Executor, crops: list[Tensor], flips: NDArray[np.int32], sizes: list[int]) -> Pixels:
    """Crops uint8 [H, W, 3] resized and flipped. DALI's own resizing on the CPU takes four times as long."""
    out = {size: torch.empty((len(crops), size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2) for size in sizes}

    def some(start: int) -> None:
        for k in range(len(crops))[start : start + 4]:  # a call of the pool for each would take a tenth of the time
            crop = crops[k][None].permute(0, 3, 1, 2)  # channels-last, as its strides tell
            for size, pixels in out.items():
                image = functional.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]
                pixels[k] = image.flip(2) if flips[k] else image

    list(pool.map(some, range(0, len(crops), 4)))
    return out


def _torchvision(encoded: Iterator[Encoded], plan: _Plan) -> Iterator[Decoded]:
    with ThreadPoolExecutor(plan.threads) as pool:
        for request, data in encoded:
            try:
                images = list(pool.map(_crop, data, request.boxes, request.flips, [plan.sizes] * len(data)))
            except (OSError, ValueError) as error:  # Pillow's errors of bad content
                raise _Undecodable(f"Pillow: {one_line(error, 200)}") from error
            pixels = {size: np.stack([image[k] for image in images]) for k, size in enumerate(plan.sizes)}
            device = plan.device
            yield {size: torch.from_numpy(p).to(device).permute(0, 3, 1, 2) for size, p in pixels.items()}, None


GRAPHS = {"dali": _dali, "torchvision": _torchvision}


def _crop(data: Data, box: NDArray[np.int32], flip: int, sizes: list[int]) -> list[NDArray[np.uint8]]:
    from torchvision.transforms.v2 import functional

    top, left, height, width = (int(value) for value in box)
    image = functional.crop(rgb(data.tobytes()), top, left, height, width)
    if flip:
        image = functional.horizontal_flip(image)
    return [np.asarray(functional.resize(image, [size, size], antialias=True)) for size in sizes]


def rgb(data: bytes) -> Any:
    """Decode with Pillow to an RGB image as DALI does: stored orientation, 16-bit scaled to 8."""
    from PIL import Image

    return eight_bit(Image.open(io.BytesIO(data))).convert("RGB")


def eight_bit(image: Any) -> Any:
    """A Pillow image of 16 bits scaled to 8, where Pillow itself would clip it; others as they are."""
    from PIL import Image

    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image) / 257.0).round().astype(np.uint8))

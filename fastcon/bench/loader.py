"""Pixels, boxes and logits together, against torchvision's DataLoader and FFCV on the same photos."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastcon.bench import Row, Say, compared, interleave
from fastcon.bench.fixtures import image_files, store_of
from fastcon.cores import cores
from fastcon.data.decode import decode
from fastcon.data.manifest import index
from fastcon.distill.loader import Loader
from fastcon.machine import Machine
from fastcon.store.format import Recipe
from fastcon.store.reader import Store
from fastcon.store.replay import Replay

SIDE, BATCH, CLASSES, QUALITY = 224, 64, 1500, 90


def bench(
    say: Say,
    device: torch.device,
    images: Sequence[str] = (),
    views: int = 2,
    count: int = 1024,
    rounds: int = 5,
    size: tuple[int, int] = (500, 375),
) -> list[Row]:
    """img/s of `count` photos x `views` views to 224 px, from the first batch on, decoding threads or workers: one per core.

    What is fast goes through the views several times over, so that every variant takes about a second a round.
    torchvision's DataLoader reads the same files and cuts the same crops; FFCV, where it is installed, reads its own
    format of the same photos with random crops of the same kind.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = image_files(images, folder, count, *size)
        manifest = index([str(folder / "photos")], trust=True)
        machine, teachers = Machine(str(device)), [CLASSES - CLASSES // 3, CLASSES // 3]
        plain = store_of(folder / "store", manifest, Recipe(size=SIDE), views, teachers, machine)
        baked = store_of(folder / "baked", manifest, Recipe(size=SIDE, bake=QUALITY), views, teachers, machine)
        bytes_a_view = sum(f.stat().st_size for f in baked.rglob("*.tar")) / (len(manifest) * views)
        workers = cores()
        variants = {
            "ours": _rate(lambda: _ours(plain, device, views)),
            "without logits": _rate(lambda: _pixels(plain, device, views)),
            "torchvision": _rate(lambda: _torchvision(Store(plain), files, workers, views)),
            "baked": _rate(lambda: _ours(baked, device, 4 * views)),
        }
        if importlib.util.find_spec("ffcv"):
            variants["ffcv"] = _rate(_ffcv(folder / "full.beton", files, None, workers, views))
            variants["ffcv 256"] = _rate(_ffcv(folder / "256.beton", files, 256, workers, 2 * views))
        rates = interleave(variants, rounds)
    pixels = sum(int(w) * int(h) for w, h in zip(manifest.widths, manifest.heights, strict=True)) / len(manifest)
    case = {"case": f"{len(manifest)} photos of {pixels / 1000:.0f} kpixel, {views} views, {CLASSES} classes"}
    case |= {"threads": workers}  # type: ignore[dict-item]
    pairs = [
        ("loader", "ours", "torchvision"),
        ("loader, against itself without logits", "ours", "without logits"),
        ("loader_vs_ffcv", "ours", "ffcv"),
        ("loader_baked", "baked", "ours"),
        ("loader_baked_vs_ffcv", "baked", "ffcv 256"),
    ]
    rows = []
    for name, ours, theirs in pairs:
        if theirs in rates:
            facts: dict[str, Any] = {"bytes_a_view": bytes_a_view} if ours == "baked" else {}
            rows.append(compared(name, rates[ours], rates[theirs], "img/s", device.type, **case, **facts))
            say(f"{name}: {rows[-1]['ours']:,.0f} against {rows[-1]['theirs']:,.0f} img/s, {rows[-1]['ratio']:.2f} x")
    return rows


def _rate(batches: Callable[[], Iterable[Any]]) -> Callable[[], float]:
    """img/s between the first batch and the last, so that starting threads and workers does not count."""

    def run() -> float:
        images, first, last = 0, 0.0, 0.0
        for pixels in batches():
            last = time.perf_counter()
            if not first:
                first = last
            else:
                images += len(pixels)
        return images / (last - first)

    return run


def _ours(path: Path, device: torch.device, epochs: int) -> Iterable[Any]:
    for batch in Loader(str(path), batch_size=BATCH, epochs=epochs, device=device):
        yield batch.pixels


def _pixels(path: Path, device: torch.device, views: int) -> Iterable[Any]:
    """The loader's decoding alone."""
    loader = Loader(str(path), batch_size=BATCH, epochs=views, device=device)
    replay = Replay(loader.store, loader.manifest)
    requests = (replay.request(view, rows) for view in range(views) for rows in loader.schedule.epoch(view))
    for pixels in decode(replay.images, requests, [SIDE], BATCH, loader.machine):
        yield pixels[SIDE]


class _Files(torch.utils.data.Dataset):
    """The plain way: open, crop, flip, resize with torchvision; the crops are the store's."""

    def __init__(self, store: Store, files: list[Path], views: int) -> None:
        self._files, self._views = files, [store.view(number) for number in range(views)]
        self._rows = store.rows - store.rows % BATCH

    def __len__(self) -> int:
        return self._rows * len(self._views)

    def __getitem__(self, number: int) -> torch.Tensor:
        from PIL import Image
        from torchvision.transforms.v2 import functional

        view, row = self._views[number // self._rows], number % self._rows
        image = Image.open(self._files[view.order[row]]).convert("RGB")
        top, left, height, width = view.boxes[row].tolist()
        image = functional.resized_crop(image, top, left, height, width, [SIDE, SIDE], antialias=True)
        return functional.pil_to_tensor(functional.horizontal_flip(image) if view.flips[row] else image)


def _torchvision(store: Store, files: list[Path], workers: int, views: int) -> Iterable[Any]:
    dataset = _Files(store, sorted(files), views)
    return torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=workers)


class _Indexed:
    """What FFCV's writer takes: PIL images and a number."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> tuple[Any, int]:
        from PIL import Image

        return Image.open(self._files[number]).convert("RGB"), number


def _ffcv(path: Path, files: list[Path], largest: int | None, workers: int, epochs: int) -> Callable[[], Iterable[Any]]:
    """FFCV's loader over its own format of the photos, JPEGs of quality 90: random resized crops and flips, uint8."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader as FFCVLoader
    from ffcv.loader import OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter

    field = RGBImageField(write_mode="jpg", max_resolution=largest, jpeg_quality=90)
    DatasetWriter(str(path), {"image": field, "label": IntField()}, num_workers=1).from_indexed_dataset(_Indexed(files))
    steps = [RandomResizedCropRGBImageDecoder((SIDE, SIDE)), RandomHorizontalFlip(), ToTensor(), ToTorchImage()]
    loader = FFCVLoader(
        str(path), batch_size=BATCH, num_workers=workers, order=OrderOption.RANDOM, drop_last=True,
        pipelines={"image": steps, "label": None},
    )  # fmt: skip

    def batches() -> Iterable[Any]:
        for _ in range(epochs):
            for (pixels,) in loader:
                yield pixels

    return batches

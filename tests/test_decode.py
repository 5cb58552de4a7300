"""One decode path: DALI against its torchvision twin, over formats, sizes, boxes and flips."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from test_manifest import encoded, write

from fastcon.data import decode as decoding
from fastcon.data import views
from fastcon.data.decode import Request
from fastcon.data.manifest import index
from fastcon.data.prefetch import prefetch
from fastcon.errors import FastconError
from fastcon.machine import LOADERS, Machine


def requests_of(manifest, batch, view=0):
    boxes = views.boxes(0, manifest.ids, view, manifest.widths, manifest.heights)
    flips = views.flips(0, manifest.ids, view)
    order = np.arange(len(manifest))
    return [
        Request(order[a : a + batch], boxes[a : a + batch], flips[a : a + batch]) for a in range(0, len(order), batch)
    ]


def pixels_of(manifest, batch, sizes, **options):
    batches = list(decoding.decode(manifest, requests_of(manifest, batch), sizes, batch, Machine("cpu", **options)))
    return {size: torch.cat([batch[size] for batch in batches]) for size in sizes}


def difference(a, b):
    return (a.int() - b.int()).abs().float().mean().item()


def test_dali_equals_torchvision_on_rendered_images(proxy):
    ours, twin = (pixels_of(proxy, 32, [24, 40], loader=loader) for loader in LOADERS)
    for size in (24, 40):
        assert ours[size].shape == (150, 3, size, size)
        assert ours[size].is_contiguous(memory_format=torch.channels_last)
        assert difference(ours[size], twin[size]) < 0.5


def test_dali_equals_torchvision_on_photos(shared_data):
    photos = index([shared_data / "photos.tar"])
    ours, twin = (pixels_of(photos, 21, [224], loader=loader)[224] for loader in LOADERS)
    assert difference(ours, twin) <= 0.5


@pytest.mark.parametrize("loader", LOADERS)
def test_pixels_do_not_depend_on_the_batch(proxy, loader):
    whole, single = (
        pixels_of(proxy, 150, [32], loader=loader)[32],
        pixels_of(proxy, 7, [32], loader=loader, threads=1)[32],
    )
    assert torch.equal(whole, single)


@pytest.mark.parametrize("loader", LOADERS)
def test_box_and_flip_are_what_they_say(tmp_path, loader):
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[10:20, 30:50] = [200, 100, 50]
    pixels[10:20, 30:32] = [0, 255, 0]  # the left edge of the box
    write(tmp_path / "a.png", b"")
    Image.fromarray(pixels).save(tmp_path / "a.png")
    manifest = index([tmp_path])
    box = np.array([[10, 30, 10, 20]] * 2, dtype=np.int32)
    request = Request(np.zeros(2, int), box, np.array([0, 1], dtype=np.uint8))
    [out] = decoding.decode(manifest, [request], [20], 2, Machine("cpu", loader=loader))
    plain, flipped = out[20].permute(0, 2, 3, 1)
    assert plain[10, 0].tolist() == [0, 255, 0]
    assert plain[10, 19].tolist() == [200, 100, 50]
    assert torch.equal(plain.flip(1), flipped)


FORMATS = {
    "progressive.jpg": encoded("JPEG", progressive=True),
    "grey.jpg": encoded("JPEG", mode="L"),
    "cmyk.jpg": encoded("JPEG", mode="CMYK"),
    "palette.png": encoded("PNG", mode="P"),
    "alpha.png": encoded("PNG", mode="RGBA"),
    "picture.webp": encoded("WEBP"),
    "picture.bmp": encoded("BMP"),
    "picture.tif": encoded("TIFF"),
    "jpeg-inside.png": encoded("JPEG"),
    "one.png": encoded("PNG", (1, 1)),
}


def sixteen_bit() -> bytes:
    import io

    buffer = io.BytesIO()
    ramp = np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(30, 40)
    Image.fromarray(ramp).save(buffer, "PNG")
    return buffer.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded("JPEG", exif=exif)


@pytest.mark.parametrize("name", [*FORMATS, "sixteen.png", "rotated.jpg"])
def test_formats_decode_alike_in_both(tmp_path, name):
    write(tmp_path / name, FORMATS.get(name) or {"sixteen.png": sixteen_bit, "rotated.jpg": rotated}[name]())
    manifest = index([tmp_path])
    assert not manifest.rejects
    ours, twin = (pixels_of(manifest, 1, [24], loader=loader)[24] for loader in LOADERS)
    assert difference(ours, twin) <= 1.0


def test_a_changed_image_stops_the_pass_and_is_named(tmp_path):
    for i in range(4):
        write(tmp_path / f"{i}.jpg", encoded(seed=i))
    manifest = index([tmp_path])
    write(tmp_path / "2.jpg", encoded(seed=99))
    for loader in LOADERS:
        with pytest.raises(FastconError, match=r"image '2.jpg' .* changed"):
            pixels_of(manifest, 1, [16], loader=loader)


def test_prefetch_hands_over_in_order_raises_and_closes():
    assert list(prefetch(range(50), 3)) == list(range(50))

    def failing():
        yield 1
        raise ValueError("inside")

    items = prefetch(failing(), 2)
    assert next(items) == 1
    with pytest.raises(ValueError, match="inside"):
        next(items)
    endless = prefetch(iter(int, 1), 2)
    next(endless)
    started = time.monotonic()
    endless.close()
    assert time.monotonic() - started < 2
    assert not endless._thread.is_alive()


def test_a_loader_that_there_is_not():
    with pytest.raises(FastconError, match="`loader` 'none' is none of dali, torchvision"):
        Machine(loader="none")


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("seconds", [0, 0.1])
def test_who_stops_early_leaves_no_thread_behind(tmp_path, loader, seconds):
    for i in range(16):
        write(tmp_path / f"{i}.jpg", encoded(seed=i))
    manifest = index([tmp_path])

    def slow():
        for request in requests_of(manifest, 1):
            time.sleep(seconds)
            yield request

    before = set(threading.enumerate())
    batches = decoding.decode(manifest, slow(), [16], 1, Machine("cpu", loader=loader))
    next(batches)
    batches.close()
    assert set(threading.enumerate()) <= before


def test_a_prefetch_may_be_closed_by_its_own_thread_and_while_another_waits():
    taken, closed = threading.Event(), threading.Event()

    def closing_itself():
        yield 1
        taken.wait()
        items.close()
        closed.set()
        yield 2

    items = prefetch(closing_itself(), 1)
    assert next(items) == 1
    taken.set()
    assert list(items) == []
    assert closed.wait(5)
    never = prefetch(iter(threading.Event().wait, True), 1)
    threading.Timer(0.2, never._closed.set).start()
    assert list(never) == []


def test_a_batch_comes_before_the_next_is_asked_for(tmp_path):
    write(tmp_path / "a.jpg", encoded())
    manifest = index([tmp_path])
    asked = threading.Event()

    def requests():
        yield from requests_of(manifest, 1)
        asked.wait(20)

    batches = decoding.decode(manifest, requests(), [16], 1, Machine("cpu", loader="torchvision"))
    started = time.monotonic()
    assert len(next(batches)[16]) == 1
    assert time.monotonic() - started < 10
    asked.set()
    batches.close()


@pytest.mark.parametrize("bad", [0, 10, 19])
def test_an_image_that_does_not_decode_is_named(tmp_path, bad):
    """Only `trust_images` lets one through: its header is whole."""
    for i in range(20):
        write(tmp_path / f"{i}.jpg", encoded(seed=i))
    write(tmp_path / f"{bad}.jpg", encoded(seed=bad)[:-300])
    manifest = index([tmp_path], trust=True)
    for loader in LOADERS:
        with pytest.raises(FastconError, match=rf"image '{bad}.jpg' does not decode .* leave out `trust_images`"):
            pixels_of(manifest, 1, [16], loader=loader)


def test_the_gpu_decoder_is_told_to_make_the_pixels_of_the_cpu():
    schema = pytest.importorskip("nvidia.dali.backend").TryGetSchema("decoders__Image")
    assert set(decoding.MIXED) <= set(schema.GetArgumentNames())
    assert decoding.MIXED["jpeg_fancy_upsampling"] is True  # DALI's default is another chroma than the CPU's
    assert schema.GetArgumentDefaultValueString("jpeg_fancy_upsampling") == "False"


def test_versions_are_found_whatever_their_cuda():
    found = decoding._versions("nvidia-nvimgcodec", "nvidia-nvjpeg")
    assert sorted(name.partition("-cu")[0] for name in found) == ["nvidia-nvimgcodec", "nvidia-nvjpeg"]
    assert all(version[0].isdigit() for version in found.values())


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("most", [1, 25_000])
def test_a_batch_of_large_images_is_decoded_in_parts(proxy, monkeypatch, loader, most):
    areas = proxy.areas(np.arange(len(proxy)))
    whole = pixels_of(proxy, 40, [24, 32], loader=loader)
    monkeypatch.setattr(decoding, "AT_ONCE", most)
    read = []
    monkeypatch.setattr(decoding, "_read", lambda reader, requests: _noting(reader, requests, read))
    batches = list(decoding.decode(proxy, requests_of(proxy, 40), [24, 32], 40, Machine("cpu", loader=loader)))
    assert [len(batch[24]) for batch in batches] == [40, 40, 40, 30]
    for size in (24, 32):
        assert torch.equal(torch.cat([batch[size] for batch in batches]), whole[size])
        assert batches[0][size].is_contiguous(memory_format=torch.channels_last)
    assert len(read) > 4
    assert np.concatenate(read).tolist() == list(range(len(proxy)))
    assert all(len(part) == 1 or areas[part].sum() <= most for part in read)


def test_areas_are_width_times_height(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    Image.new("RGB", (50, 90)).save(tmp_path / "b.png")
    assert index([tmp_path]).areas(np.array([1, 0, 1])).tolist() == [4500, 1200, 4500]


def _noting(reader, requests, read):
    for request in requests:
        read.append(request.indices)
        yield request, reader.read(request.indices.tolist())

"""Stores and runs made on a GPU against the same made on the CPU: pixels, logits, training steps, resuming."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from device import DEVICE
from PIL import Image, ImageFilter

pytest.importorskip("zarr")

from conftest import RECIPE, make_model
from test_decode import difference, requests_of
from test_train import QUICK, UPKEEP

from fastcon.data import decode as decoding
from fastcon.data import rendered
from fastcon.data.manifest import Manifest, index
from fastcon.distill import train as training
from fastcon.distill.loader import Loader
from fastcon.distill.options import Upkeep
from fastcon.distill.precompute import Teacher, precompute
from fastcon.distill.train import train
from fastcon.distill.verify import verify
from fastcon.errors import Interrupted
from fastcon.machine import LOADERS, Machine
from fastcon.models.load import load
from fastcon.store.reader import Store

MISSING = {"dali": importlib.util.find_spec("nvidia.dali") is None if importlib.util.find_spec("nvidia") else True}
DECODERS = [
    pytest.param(name, marks=pytest.mark.skipif(MISSING.get(name, False), reason=f"{name} is not installed"))
    for name in LOADERS
]
LOADER = "torchvision" if MISSING["dali"] else "dali"
DEVICES = [("cpu", DEVICE), (DEVICE, "cpu")]


def _photos(folder: Path, count: int, side: int, **options: object) -> Manifest:
    """Smooth coloured noise, in which wrongly upsampled chroma shows."""
    random = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        small = Image.fromarray(random.integers(0, 256, (side // 8, side // 6, 3), dtype=np.uint8))
        image = small.resize((side * 4 // 3, side), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1))
        buffer = io.BytesIO()
        image.save(buffer, **options)
        (folder / f"{number}.{options['format'].lower()}").write_bytes(buffer.getvalue())
    return index([str(folder)])


@pytest.fixture(scope="module")
def proxy(tmp_path_factory) -> Manifest:
    root = tmp_path_factory.mktemp("images") / "proxy"
    rendered.write_proxy(root, 150)
    return index([str(root)])


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> list[Teacher]:
    folder = tmp_path_factory.mktemp("models")
    general = make_model(folder / "general.safetensors", [f"thing {k}" for k in range(10)], 1)
    letters = make_model(folder / "letters.safetensors", ["a", "b", "c"], 2, size=40)
    found = [Teacher("general", str(general), load(general), generalist=True)]
    return [*found, Teacher("letters", str(letters), load(letters))]


@pytest.fixture(scope="module")
def stores(tmp_path_factory, proxy, teachers) -> dict[str, Path]:
    """A store made on each device, in float32."""
    root = tmp_path_factory.mktemp("stores")
    for device in {"cpu", DEVICE}:
        machine = Machine(device, "float32", LOADER)
        assert precompute(str(root / device), proxy, teachers, RECIPE, 2, machine, 24) == 300
    return {device: root / device for device in ("cpu", DEVICE)}


@pytest.mark.parametrize("loader", DECODERS)
@pytest.mark.parametrize(
    "options",
    [
        {"format": "JPEG", "quality": 90, "subsampling": "4:2:0"},
        {"format": "JPEG", "quality": 90, "subsampling": "4:4:4"},
        {"format": "JPEG", "quality": 90, "subsampling": "4:2:0", "progressive": True},
        {"format": "PNG"},
        {"format": "WEBP", "quality": 90},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_pixels_of_a_gpu_are_the_cpus_within_half_a_level(tmp_path, options, loader):
    photos = _photos(tmp_path / "photos", 12, 240, **options)
    found = []
    for device in ("cpu", DEVICE):
        batches = list(decoding.decode(photos, requests_of(photos, 5), [96, 64], 5, Machine(device, loader=loader)))
        assert all(batch[96].is_contiguous(memory_format=torch.channels_last) for batch in batches)
        found.append({size: torch.cat([batch[size] for batch in batches]).cpu() for size in (96, 64)})
    for size in (96, 64):
        assert difference(found[0][size], found[1][size]) < 0.5


@pytest.mark.parametrize("loader", DECODERS)
def test_baked_views_of_a_gpu_are_the_cpus(tmp_path, proxy, teachers, loader):
    recipe = replace(RECIPE, bake=95)
    precompute(str(tmp_path / "store"), proxy, teachers[:1], recipe, 1, Machine("cpu", "float32", loader), 24)
    pixels = []
    for device in ("cpu", DEVICE):
        batches = Loader(str(tmp_path / "store"), batch_size=30, device=device, loader=loader)
        pixels.append(torch.cat([batch.pixels.cpu() for batch in batches]))
    assert difference(*pixels) < 0.5


@pytest.mark.parametrize(("made", "used"), DEVICES)
def test_a_store_made_on_one_device_serves_on_the_other(stores, proxy, made, used):
    for check in verify(str(stores[made]), proxy, machine=Machine(used, "float32", LOADER)):
        assert check.passed, check
    loader = Loader(str(stores[made]), proxy, batch_size=24, device=used, loader=LOADER)
    assert sum(len(batch.pixels) for batch in loader) == 144


def test_logits_do_not_depend_on_the_device(stores, teachers):
    ours, theirs = (Store(stores[device]) for device in ("cpu", DEVICE))
    for teacher in teachers:
        for view in range(2):
            for chunk in range(ours.chunks):
                a, b = (np.asarray(s.logits(teacher.name, view, chunk), np.float32) for s in (ours, theirs))
                assert np.abs(a - b).mean() < 0.02 * np.abs(a).mean() + 0.02
                assert (a.argmax(1) == b.argmax(1)).mean() > 0.95


@pytest.mark.parametrize("mode", ["none", "default", "graphs"])
@pytest.mark.parametrize(("precision", "within"), [("float32", 2e-3), ("bfloat16", 0.1), ("float16", 3e-2)])
def test_the_first_steps_of_training_are_the_cpus(stores, proxy, tmp_path, mode, precision, within):
    """Later ones need not be: training magnifies what rounding differs by."""
    losses = []
    for name, machine, how in (
        ("cpu", Machine("cpu", "float32", LOADER), "none"),
        ("gpu", Machine(DEVICE, precision, LOADER), mode),
    ):
        upkeep = Upkeep(log_every=1, compile=how)
        train(str(stores["cpu"]), str(tmp_path / name), replace(QUICK, epochs=1), machine, upkeep, proxy)
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses.append([row["loss"] for row in rows if 1 <= row["step"] <= 3])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=within)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_run_goes_on_where_it_was_stopped(stores, proxy, tmp_path, precision):
    machine = Machine(DEVICE, precision, LOADER)

    def stop(done: int, total: int) -> None:
        if done == total // 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(str(stores[DEVICE]), str(tmp_path / "run"), QUICK, machine, UPKEEP, proxy, progress=stop)
    assert training.newest(tmp_path / "run" / "checkpoints")["step"] > 0
    resumed = train(str(stores[DEVICE]), str(tmp_path / "run"), QUICK, machine, UPKEEP, proxy)
    whole = train(str(stores[DEVICE]), str(tmp_path / "whole"), QUICK, machine, UPKEEP, proxy)
    assert resumed["step"] == whole["step"]
    assert resumed["loss"] == pytest.approx(whole["loss"], rel=1e-3)
    names = [(tmp_path / name / "metrics.jsonl").read_text().count("\n") for name in ("run", "whole")]
    assert names[0] == names[1]


def test_float32_is_no_tf32(teachers):
    if not DEVICE.startswith("cuda"):
        pytest.skip("TF32 is a GPU's")
    layer = torch.nn.Conv2d(256, 256, 3, padding=1, bias=False)
    x = torch.randn(4, 256, 32, 32)
    with torch.no_grad():
        exact = torch.nn.functional.conv2d(x.double(), layer.weight.double(), padding=1)
        with Machine(DEVICE, "float32").computing():
            ours = layer.to(DEVICE)(x.to(DEVICE)).cpu()
    assert (ours - exact).abs().max() < 1e-4 * exact.abs().max()

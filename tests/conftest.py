"""Shared fixtures: rendered images, two small teachers, a small store. Everything on the CPU, in float32."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastcon.data import rendered
from fastcon.data.manifest import Manifest, index
from fastcon.distill.precompute import Teacher, precompute
from fastcon.machine import Machine
from fastcon.models.load import load
from fastcon.store.format import COPY, Recipe, record_digest

if "FASTCON_TEST_DEVICE" not in os.environ:  # which bin/test --gpu sets: see tests/gpu/device.py
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same everywhere, with a GPU or without
    os.environ.setdefault("TRITON_INTERPRET", "1")  # both read when PyTorch and Triton are first used

import numpy as np
import pytest
import torch
import zarr

ARCHITECTURE = "torchvision:shufflenet_v2_x0_5"
SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCON_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    """An S3 server on loopback: see bucket.py."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    from bucket import serving

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def _calm(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test's latency and failures end with it."""
    yield
    if "bucket" in request.fixturenames:
        server = request.getfixturevalue("bucket")
        server.latency = server.failing = 0.0


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip("no ../shared/data here")
    return SHARED


@pytest.fixture(scope="session")
def labelled_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    rendered.write_classes(root, "shapes", range(6), 14)
    return root


@pytest.fixture(scope="session")
def proxy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("proxy")
    rendered.write_proxy(root, 150)
    return root


@pytest.fixture(scope="session")
def proxy(proxy_folder: Path) -> Manifest:
    return index([str(proxy_folder)])


def make_model(path: Path, classes: list[str], seed: int, size: int = 32) -> Path:
    """A small network with random weights and lively batch statistics, written as fastcon writes weights."""
    torch.manual_seed(seed)
    model = load(f"{ARCHITECTURE}@random?size={size}", classes=classes).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain average, so that few batches settle it
    with torch.no_grad():
        for _ in range(4):
            blobs = torch.nn.functional.interpolate(torch.rand(32, 3, 5, 5), (size, size), mode="bilinear")
            model((blobs * 255).to(torch.uint8))
        model.head_module.layer.weight.mul_(5)
    path.write_bytes(model.eval().export("head"))
    return path


@pytest.fixture(scope="session")
def generalist_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(
        tmp_path_factory.mktemp("models") / "generalist.safetensors", [f"thing {i}" for i in range(10)], 1
    )


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "teacher.safetensors", ["a", "b", "c"], 2, size=40)


@pytest.fixture(scope="session")
def teachers(generalist_file: Path, teacher_file: Path) -> list[Teacher]:
    return [
        Teacher("general", str(generalist_file), load(generalist_file), generalist=True),
        Teacher("letters", str(teacher_file), load(teacher_file)),
    ]


RECIPE = Recipe(seed=3, size=32, chunk_rows=64)
MACHINE = Machine("cpu", "float32")
BATCH = 24


@pytest.fixture(scope="session")
def store_path(tmp_path_factory: pytest.TempPathFactory, proxy: Manifest, teachers: list[Teacher]) -> Path:
    """A finished store of 150 images, 2 views, chunks of 64 rows, two teachers. Not to be changed: copy it."""
    path = tmp_path_factory.mktemp("stores") / "store"
    assert precompute(str(path), proxy, teachers, RECIPE, 2, MACHINE, BATCH) == 300
    return path


def tree(path: Path) -> dict[str, bytes]:
    """Every file of a folder but locks and logs: what rule 9 calls byte-identical."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.suffix not in (".lock", ".log")
    }


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def rewrite_record(path: Path, change: Callable[[dict], None]) -> None:
    """Change a store's record as its own writer would: with its digest, and in both places."""
    group = zarr.open_group(str(path), mode="r+", zarr_format=3, use_consolidated=False)
    record = dict(group.attrs["fastcon"])
    change(record)
    record["digest"] = record_digest(record)
    group.attrs["fastcon"] = record
    (path / COPY).write_text(json.dumps(record, indent=2) + "\n")

"""Every benchmark runs on a GPU and gives whole rows; small here, `bin/bench` has the real sizes."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from device import DEVICE

from fastcon.bench import Row, kernel, probe

NEEDS_STORE = pytest.mark.skipif(
    importlib.util.find_spec("zarr") is None or importlib.util.find_spec("nvidia") is None, reason="needs zarr and DALI"
)


def _whole(rows: list[Row], said: list[str]) -> set[str]:
    for row in rows:
        assert row["ratio"] > 0
        assert row["device"] == torch.device(DEVICE).type
    assert not [line for line in said if "does not work" in line], said
    return {row["name"] for row in rows}


def test_kernel():
    said: list[str] = []
    names = _whole(kernel.bench(said.append, torch.device(DEVICE), rounds=1, cases=[(32, [100, 40])]), said)
    assert {"loss_vs_eager", "loss_vs_compile"} <= names
    if DEVICE.startswith("cuda"):
        assert {"loss_vs_eager, both in a CUDA graph", "loss_bandwidth"} <= names


def test_probe():
    said: list[str] = []
    rows = probe.bench(said.append, torch.device(DEVICE), classes=4, width=40, trials=2, test_images=20)
    assert "probe_vs_sklearn" in _whole(rows, said)


@NEEDS_STORE
def test_train():
    from fastcon.bench import train

    said: list[str] = []
    scale = train.Scale("torchvision:shufflenet_v2_x0_5", 32, 16, 256, (48, 40), 4, 1)
    names = _whole(train.bench(said.append, torch.device(DEVICE), rounds=1, scale=scale), said)
    assert {"precompute", "train_step", "train_vs_online"} <= names


@NEEDS_STORE
def test_loader():
    from fastcon.bench import loader

    said: list[str] = []
    rows = loader.bench(said.append, torch.device(DEVICE), views=2, count=128, rounds=1, size=(60, 48))
    assert "loader" in _whole(rows, said)

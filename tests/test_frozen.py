"""Networks that are only run, as they are and compiled."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from conftest import BATCH, MACHINE, RECIPE, tree

from fastcon.data import views
from fastcon.data.decode import Request, decode
from fastcon.data.manifest import index
from fastcon.distill.precompute import Teacher, precompute
from fastcon.distill.verify import _compare, verify
from fastcon.errors import FastconError
from fastcon.machine import Machine
from fastcon.models import frozen
from fastcon.models.frozen import Frozen
from fastcon.models.load import load
from fastcon.store.reader import Store


def _network(factor: float = 1.0):
    """A small ResNet with statistics that matter."""
    network = load("torchvision:resnet18@random?size=32", classes=["a", "b", "c"]).eval()
    with torch.no_grad():
        for value in network.parameters():
            value.mul_(factor if value.ndim > 1 else 1)
        for name, value in network.named_buffers():
            if name.endswith("running_var"):
                value.mul_(1 + factor)
    return network


def _pixels(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return pixels.to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def two():
    """Two networks of one architecture, as they are and compiled, though PyTorch's own limit is one."""
    networks = [_network(1.0), _network(1.5)]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled = [Frozen(network, MACHINE, 8, "default") for network in networks]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 2
    return networks, compiled


def test_compiled_networks_give_their_own_logits_for_any_number_of_rows(two):
    pixels = _pixels(8)
    plain = []
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for network, compiled in zip(*two, strict=True):
        with torch.inference_mode():
            plain.append(network(pixels))
        for count in (8, 3, 1):
            logits = compiled(pixels[:count])
            assert (logits.dtype, logits.shape) == (torch.float32, (count, 3))
            torch.testing.assert_close(logits, plain[-1][:count], rtol=1e-4, atol=1e-5)
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    )  # nothing is compiled for another number of rows
    assert (plain[0] - plain[1]).abs().max() > 0.01  # so that one's logits could not pass for the other's


def test_weights_are_frozen_into_what_was_compiled(monkeypatch):
    network = _network()
    monkeypatch.setattr(frozen, "folded", lambda model: model)  # else a copy is compiled
    compiled = Frozen(network, MACHINE, 4, "default")
    before = compiled(_pixels(4)).clone()
    with torch.no_grad():
        for name, value in network.named_parameters():
            if "layer4" in name:
                value.zero_()
    assert torch.equal(compiled(_pixels(4)), before)
    assert not torch.equal(Frozen(network, MACHINE, 4)(_pixels(4)), before)


def _measured(monkeypatch, tmp_path, glance: float, plain: float, compiled: float) -> list[list[str]]:
    """Networks take so many seconds an image; every measurement is noted by the ways that it compares."""
    calls: list[list[str]] = []

    def seconds(variants, cores, rounds=frozen.ROUNDS):
        calls.append(list(variants))
        return {"none": glance} if rounds == 1 else {"none": plain, "default": compiled}

    monkeypatch.setenv("FASTCON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(frozen, "seconds", seconds)
    monkeypatch.setattr(Frozen, "_compiled", lambda self: self._model)
    return calls


@pytest.mark.parametrize(
    ("rows", "compiled", "chosen"),
    [(119, 0.1, "none"), (121, 0.1, "default"), (121, 0.92, "none"), (121, 0.9, "default"), (121, 2.0, "none")],
)
def test_networks_are_compiled_where_that_pays_for_itself(tmp_path, monkeypatch, rows, compiled, chosen):
    calls = _measured(monkeypatch, tmp_path, 1.0, 1.0, compiled)
    said: list[str] = []
    for _ in range(2):  # the second time from the cache
        assert frozen.choose(_network(), MACHINE.settled(), 8, rows, said.append) == chosen
    assert calls == [["none"], ["none", "default"]][: 1 + (rows > 120)]
    assert len(said) == 2 * (rows > 120)
    frozen.choose(_network(), MACHINE.settled(), 9, rows, said.append)
    assert len(calls) == 2 * (1 + (rows > 120))  # another batch size is another case


def test_where_nothing_can_be_compiled_networks_run_as_they_are(tmp_path, monkeypatch):
    said: list[str] = []

    def fails(*args, **options):
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setenv("FASTCON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch, "compile", lambda *args, **options: fails)
    assert frozen.choose(_network(), MACHINE.settled(), 2, 1 << 30, said.append) == "none"
    assert said == [
        "torchvision:resnet18 cannot be compiled here (no working C++ compiler): `compile` none runs it as it is"
    ]
    with pytest.raises(FastconError, match="cannot be compiled here"):
        Frozen(_network(), MACHINE, 2, "default")


class Small(torch.nn.Module):
    """What takes a second to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        self.fc = torch.nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(x).mean((2, 3)))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    made = []
    for seed, name in enumerate(("letters", "digits")):
        torch.manual_seed(seed)
        weights = tmp_path_factory.mktemp("weights") / f"{name}.pt"
        torch.save(Small().state_dict(), weights)
        spec = f"python:test_frozen:Small@{weights}?size=32"
        made.append(Teacher(name, spec, load(spec)))
    return made


@pytest.fixture(scope="module")
def compiled_store(tmp_path_factory, proxy, teachers):
    path = tmp_path_factory.mktemp("compiled") / "store"
    precompute(str(path), proxy, teachers, RECIPE, 1, MACHINE, BATCH, compile="default")
    return path


def test_a_store_says_how_its_teachers_ran_and_goes_on_so(compiled_store, proxy, teachers, tmp_path, monkeypatch):
    assert {t.compile for t in Store(compiled_store).teachers.values()} == {"default"}
    path = tmp_path / "s"

    def stop(done: int, total: int) -> None:
        if done > 70:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        precompute(str(path), proxy, teachers, RECIPE, 1, MACHINE, BATCH, progress=stop, compile="default")
    monkeypatch.setattr(frozen, "choose", None)  # what is recorded is not chosen again
    assert precompute(str(path), proxy, teachers, RECIPE, 1, MACHINE, BATCH) > 0
    assert tree(path) == tree(compiled_store)
    precompute(str(path), proxy, teachers, RECIPE, 2, MACHINE, BATCH)  # nor for another view
    assert {t.compile for t in Store(path).teachers.values()} == {"default"}
    with pytest.raises(FastconError, match="compile"):
        precompute(str(path), proxy, teachers, RECIPE, 2, MACHINE, BATCH, compile="none")


def test_verify_holds_and_repairs_a_store_that_was_computed_compiled(compiled_store, proxy, tmp_path):
    path = shutil.copytree(compiled_store, tmp_path / "s")
    assert [check.seen for check in verify(str(path), proxy, rows=100, machine=MACHINE) if not check.passed] == []
    chunk = next(path.glob("teachers/letters/logits/c/0/1/*"))
    chunk.write_bytes(b"torn")
    assert not all(check.passed for check in verify(str(path), proxy, rows=0, machine=MACHINE))
    repaired = verify(str(path), proxy, rows=20, machine=MACHINE, repair=True)
    assert [check.seen for check in repaired if not check.passed] == []
    assert tree(path) == tree(compiled_store)


def test_a_store_that_ran_as_it_is_refuses_compiled_rows(proxy, teachers, tmp_path):
    path = tmp_path / "s"
    precompute(str(path), proxy, teachers, RECIPE, 1, MACHINE, BATCH)
    assert {t.compile for t in Store(path).teachers.values()} == {None}
    with pytest.raises(FastconError, match="compile"):
        precompute(str(path), proxy, teachers, RECIPE, 2, MACHINE, BATCH, compile="default")


def test_batch_norms_fold_into_the_convolutions_before_them():
    network = _network(1.5)
    inside = frozen.folded(network)
    with torch.no_grad():
        torch.testing.assert_close(inside(_pixels(4)), network(_pixels(4)), rtol=1e-4, atol=1e-5)
        x = torch.randn(2, 512, 3, 3)
        torch.testing.assert_close(inside.net.layer4[1].bn2(x), x)  # nothing is left for it to do
    assert network.net.layer4[1].conv2.bias is None  # the network itself stays as it is


def test_batch_norms_that_cannot_be_folded_stay_where_they_are():
    network = load("python:test_frozen:Shared@random?size=32").eval()
    network.net.features[1].running_var.fill_(5)
    with torch.no_grad():
        assert torch.equal(frozen.folded(network)(_pixels(4)), network(_pixels(4)))


class Shared(Small):
    """Its convolution's output goes past the batch-norm, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features[0](x)
        return self.fc((x + self.features[1](x)).mean((2, 3)))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_compiling_changes_logits_of_photos_no_more_than_the_precision_does(shared_data, precision):
    weights = shared_data / "efficientnet-lite0-imagenet.safetensors"
    network = load(f"timm:tf_efficientnet_lite0@{weights}?size=96&mean=0.5,0.5,0.5&std=0.5,0.5,0.5")
    photos = index([str(shared_data / "proxy-000.tar")], trust=True)
    chosen = np.arange(128)
    boxes = views.boxes(0, photos.ids[chosen], 0, photos.widths[chosen], photos.heights[chosen], (0.35, 1.0))
    request = Request(chosen, boxes, views.flips(0, photos.ids[chosen], 0))
    [pixels] = decode(photos, [request], [96], 128, MACHINE)
    exact = Frozen(network, MACHINE, 128)(pixels[96])
    plain, compiled = (
        _compare(exact, Frozen(network, Machine("cpu", precision), 128, how)(pixels[96]), "softmax")
        for how in ("none", "default")
    )
    if precision == "float32":
        assert plain == (0.0, 1.0)
        assert compiled[0] < 1e-9
    assert compiled[0] <= 1.2 * plain[0] + 1e-9  # KL in nats
    assert compiled[1] >= plain[1] - 0.03  # same argmax

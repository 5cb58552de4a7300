"""The state of a loop: checkpoints, and going on from one as if nothing had happened."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import MACHINE

from fastcon import training
from fastcon.machine import Machine
from fastcon.models.load import load
from fastcon.training import Loop, make_optimizer, newest, set_rate, settle


def test_checkpoints_keep_two_and_skip_a_torn_one(tmp_path):
    for step in range(1, 5):
        training._write(tmp_path, step, {"format": training.FORMAT, "step": step, "x": torch.ones(2)})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step-000000003.pt", "step-000000004.pt"]
    file = tmp_path / "step-000000004.pt"
    file.write_bytes(file.read_bytes()[:100])
    assert newest(tmp_path)["step"] == 3


def test_checkpoints_of_another_format_are_passed_over(tmp_path):
    training._write(tmp_path, 1, {"student": {}, "step": 1})
    assert newest(tmp_path) is None


def _loop(path, adamw=False, **options):
    model = load("torchvision:shufflenet_v2_x0_5@random?size=32", classes=["a", "b"]).train()
    optimizer = make_optimizer(model, 0.01, 0.1, 0.9, 1e-4, adamw)
    return Loop(model, optimizer, MACHINE, path, seconds=1e9, **options)


def _step(loop):
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)  # from the random state that is saved
    loop.update(loop.model(pixels).square().mean())


@pytest.mark.parametrize("options", [{}, {"adamw": True, "clip": 1.0, "ema": 0.5}], ids=["paper", "modern"])
def test_a_loop_goes_on_from_a_checkpoint_bit_for_bit(tmp_path, options):
    whole = _loop(tmp_path / "whole", **options)
    assert whole.begin(seed=5) is None
    for _ in range(4):
        _step(whole)
    first = _loop(tmp_path / "cut", **options)
    first.begin(seed=5)
    for _ in range(2):
        _step(first)
    first.save({"what": torch.ones(3), "else": 7})
    second = _loop(tmp_path / "cut", **options)
    more = second.begin(seed=99)
    assert (second.step, more["else"]) == (2, 7)
    for _ in range(2):
        _step(second)
    for loops in (0, 1):
        for name, value in whole.model.state_dict().items():
            assert torch.equal(second.model.state_dict()[name], value), (loops, name)
        whole.end()
        second.end()  # what is left is the same, too


def test_the_mean_of_the_weights_is_left(tmp_path):
    """Of the first value itself, then by a decay of (1 + n) / (10 + n), at most what was asked for."""
    loop = _loop(tmp_path, ema=0.25)
    loop.begin(seed=1)
    values, parameter = [], next(loop.model.parameters())
    for _ in range(4):
        _step(loop)
        values.append(parameter.detach().clone())
    expected = values[0]
    for n, value in enumerate(values[1:], 1):
        decay = min(0.25, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    loop.end()
    torch.testing.assert_close(parameter.detach(), expected)
    assert not torch.equal(parameter, values[-1])


def test_gradients_are_cut_to_a_norm(tmp_path):
    moved = {}
    for clip in (None, 1e-3):
        model = load("torchvision:shufflenet_v2_x0_5@random?size=32&seed=3", classes=["a", "b"]).train()
        before = [p.detach().clone() for p in model.parameters()]
        loop = Loop(model, make_optimizer(model, 1.0, 1.0, 0.0, 0.0), MACHINE, tmp_path, 1e9, clip=clip)
        loop.begin(seed=1)
        _step(loop)
        moved[clip] = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
    norms = {clip: torch.cat([m.flatten() for m in way]).norm().item() for clip, way in moved.items()}
    assert norms[None] > 1e-2
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-2)
    scale = norms[1e-3] / norms[None]  # the direction is kept
    torch.testing.assert_close(moved[1e-3][0], moved[None][0] * scale, rtol=1e-2, atol=1e-7)


def test_adamw_decays_weights_alone(tmp_path):
    model = load("torchvision:shufflenet_v2_x0_5@random?size=32", classes=["a", "b"])
    optimizer = make_optimizer(model, 0.01, 0.1, 0.9, 0.05, adamw=True)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.01, 0.05), (0.01, 0.0), (0.1, 0.05), (0.1, 0.0),
    ]  # fmt: skip
    every = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in every} == {id(p) for p in model.parameters()}
    for group in optimizer.param_groups:
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] > 0}


def test_rates_rise_and_fall_along_a_cosine(tmp_path):
    loop = _loop(tmp_path)
    for progress, factor in ((0.0, 0), (0.05, 0.5), (0.1, 1), (0.55, 0.5), (0.775, 0.5 - 0.5**1.5), (1.0, 0)):
        set_rate(loop.optimizer, progress, warm_up=0.1, cosine=True)
        assert [group["lr"] for group in loop.optimizer.param_groups] == pytest.approx([0.01 * factor, 0.1 * factor])
    set_rate(loop.optimizer, 0.05, (0.5,), warm_up=0.1)
    assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(0.005)
    set_rate(loop.optimizer, 0.6, (0.5,), warm_up=0.1)
    assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


def test_a_checkpoint_is_due_by_the_clock(tmp_path):
    loop = _loop(tmp_path)
    assert not loop.due()
    loop._seconds = 0
    assert loop.due()


def test_rates_fall_at_each_milestone(tmp_path):
    loop = _loop(tmp_path)
    for progress, factor in ((0.0, 1), (0.49, 1), (0.5, 0.1), (0.85, 0.01)):
        set_rate(loop.optimizer, progress, (0.5, 0.8))
        rates = [group["lr"] for group in loop.optimizer.param_groups]
        assert torch.allclose(torch.tensor(rates), torch.tensor([0.01, 0.1]) * factor)


def test_gradients_are_scaled_in_float16_alone(tmp_path):
    assert not _loop(tmp_path).scaler.is_enabled()
    model = load("torchvision:shufflenet_v2_x0_5@random?size=32", classes=["a", "b"])
    half = dataclasses.replace(MACHINE, precision="float16")
    assert Loop(model, make_optimizer(model, 0.1, 0.1, 0, 0), half, tmp_path, 1).scaler.is_enabled()


def _auto(monkeypatch, tmp_path, float32: float, bfloat16: float) -> list[dict]:
    """A cache of its own, and a CPU on which a step takes so long in either precision; every measurement is noted."""
    calls = []

    def measured(network, cases, cores):
        calls.append({name: (len(pixels), precision) for name, (pixels, precision) in cases.items()})
        network(next(iter(cases.values()))[0])  # in train mode: moves the running statistics of what it is given
        torch.rand(3)
        return {"float32": float32, "bfloat16": bfloat16}

    monkeypatch.setenv("FASTCON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(training, "step_seconds", measured)
    monkeypatch.setattr(training, "cpu_has_bfloat16", lambda: True)
    return calls


@pytest.mark.parametrize(
    ("float32", "bfloat16", "chosen"), [(0.9, 1.0, "float32"), (1.05, 1.0, "float32"), (1.2, 1.0, "bfloat16")]
)
def test_a_cpu_trains_in_the_precision_that_was_measured_faster(tmp_path, monkeypatch, float32, bfloat16, chosen):
    calls = _auto(monkeypatch, tmp_path, float32, bfloat16)
    network = load("torchvision:shufflenet_v2_x0_5@random?size=32")
    state = {name: value.clone() for name, value in network.state_dict().items()}
    random = torch.get_rng_state()
    assert settle(Machine("cpu", threads=1), network, 6) == Machine("cpu", chosen, threads=1)
    assert calls == [{name: (6, name) for name in ("float32", "bfloat16")}]
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    settle(Machine("cpu", threads=1), network, 6)
    assert len(calls) == 1  # from the cache
    settle(Machine("cpu", threads=1), network, 7)
    assert len(calls) == 2  # another batch is another case
    assert settle(Machine("cpu", "float16"), network, 6).precision == "float16"  # what is asked for is not measured


def test_a_damaged_or_unwritable_cache_of_precisions_is_measured_again(tmp_path, monkeypatch):
    calls = _auto(monkeypatch, tmp_path, 1.0, 0.5)
    network = load("torchvision:shufflenet_v2_x0_5@random?size=32")
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert settle(Machine("cpu"), network, 6).precision == "bfloat16"
    (tmp_path / "cache").unlink()
    settle(Machine("cpu"), network, 6)
    [kept] = (tmp_path / "cache" / "precision").iterdir()
    kept.write_text("{")
    assert settle(Machine("cpu"), network, 6).precision == "bfloat16"
    assert len(calls) == 3


def test_a_run_keeps_the_precision_it_began_with(tmp_path, monkeypatch):
    calls = _auto(monkeypatch, tmp_path, 1.0, 0.5)
    network = load("torchvision:shufflenet_v2_x0_5@random?size=32")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"precision": "float32"}')
    assert settle(Machine("cpu"), network, 6, str(tmp_path / "run")).precision == "float32"
    assert not calls
    assert settle(Machine("cpu"), network, 6, str(tmp_path / "other")).precision == "bfloat16"


def test_without_bfloat16_in_hardware_nothing_is_measured(tmp_path, monkeypatch):
    calls = _auto(monkeypatch, tmp_path, 1.0, 0.5)
    monkeypatch.setattr(training, "cpu_has_bfloat16", lambda: False)
    assert settle(Machine("cpu"), load("torchvision:shufflenet_v2_x0_5@random?size=32"), 6).precision == "float32"
    assert not calls

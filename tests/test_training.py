"""The state of a loop: checkpoints, and going on from one as if nothing had happened."""

from __future__ import annotations

import dataclasses

import torch
from conftest import MACHINE

from fastcon import training
from fastcon.models.load import load
from fastcon.training import Loop, make_optimizer, newest, set_rate


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


def _loop(path, seed=0):
    model = load("torchvision:shufflenet_v2_x0_5@random?size=32", classes=["a", "b"]).train()
    optimizer = make_optimizer(model, 0.01, 0.1, 0.9, 1e-4)
    return Loop(model, optimizer, MACHINE, path, seconds=1e9)


def _step(loop):
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)  # from the random state that is saved
    loop.update(loop.model(pixels).square().mean())


def test_a_loop_goes_on_from_a_checkpoint_bit_for_bit(tmp_path):
    whole = _loop(tmp_path / "whole")
    assert whole.begin(seed=5) is None
    for _ in range(4):
        _step(whole)
    first = _loop(tmp_path / "cut")
    first.begin(seed=5)
    for _ in range(2):
        _step(first)
    first.save({"what": torch.ones(3), "else": 7})
    second = _loop(tmp_path / "cut")
    more = second.begin(seed=99)
    assert (second.step, more["else"]) == (2, 7)
    for _ in range(2):
        _step(second)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


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

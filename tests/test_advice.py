"""Advice: what is measured is what the options would do."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import MACHINE
from test_train import QUICK, UPKEEP

from fastcon import training
from fastcon.cores import Cores
from fastcon.distill import advice
from fastcon.distill.train import train
from fastcon.models.load import load


def test_each_choice_is_timed_for_what_it_is(generalist_file, monkeypatch):
    student = load(generalist_file).learn("running", dropout=False)
    pixels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    took = {("bfloat16", 4): 2.0, ("float32", 4): 1.0, ("bfloat16", 8): 6.0}
    monkeypatch.setattr(training, "_step", lambda _, batch, precision, cores: took[precision, len(batch)])
    rates = advice.measure(student, pixels, "bfloat16", Cores())
    assert rates == {"": 2, "`precision` float32": 4, "`batch_size` 8": pytest.approx(8 / 6)}


def test_a_long_run_ends_with_advice_and_the_same_student(store_path, tmp_path):
    options = replace(QUICK, epochs=1, batch_norm="batch")
    for name, seconds in (("long", 0.0), ("short", 1e9)):
        train(str(store_path), str(tmp_path / name), options, MACHINE, replace(UPKEEP, advise_seconds=seconds))
    spans = [json.loads((tmp_path / name / "waits.log").read_text()) for name in ("long", "short")]
    assert set(spans[0]["tried"]) == {"", "`precision` bfloat16", "`batch_size` 64"}
    assert all(rate > 0 for rate in spans[0]["tried"].values())
    assert "tried" not in spans[1]
    students = [(tmp_path / name / "student.safetensors").read_bytes() for name in ("long", "short")]
    assert students[0] == students[1]

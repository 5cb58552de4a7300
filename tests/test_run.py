"""The folder of a run, its metrics, and files that are whole or not there."""

from __future__ import annotations

import json

import pytest

from fastcon import info
from fastcon.cores import Cores
from fastcon.data.splits import task_name
from fastcon.errors import FastconError, optional_import
from fastcon.run import Metrics, Run, Waits


def test_a_run_is_reopened_by_the_same_configuration_alone(tmp_path):
    Run(tmp_path / "run", {"command": "train", "epochs": 9})  # only looked at: nothing is written yet
    Run(tmp_path / "run", {"command": "train", "epochs": 3, "grid": (1.0, 2.0)}).begin()
    Run(tmp_path / "run", {"command": "train", "epochs": 3, "grid": (1.0, 2.0)}).begin()
    with pytest.raises(FastconError, match="epochs was 3, this call says 4"):
        Run(tmp_path / "run", {"command": "train", "epochs": 4, "grid": (1.0, 2.0)})


def test_a_run_that_was_killed_as_it_began_begins_anew(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json.partial").write_text("{")
    Run(tmp_path / "run", CONFIG).begin()
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["config.json"]


def test_metrics_go_on_where_the_checkpoint_was(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl")
    metrics.write({"step": 1})
    position = metrics.position
    metrics.write({"step": 2})
    metrics.close()
    again = Metrics(tmp_path / "m.jsonl", position)
    again.write({"step": 2, "again": True})
    again.close()
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1}, {"step": 2, "again": True}]


def test_info_says_when_a_run_is_unfinished(tmp_path):
    Run(tmp_path / "run", {"command": "train", "method": "consolidate"}).begin()
    facts, text = info.describe(str(tmp_path / "run"))
    assert not facts["finished"]
    assert "not finished: run its command again" in text


CONFIG = {"command": "train", "store": {"recipe": {"bake": None}}}


def test_info_adds_up_what_a_run_waited_for(tmp_path, monkeypatch):
    run = Run(tmp_path / "run", CONFIG)
    run.begin()
    clock = iter([0.0, 10.0, 100.0, 130.0])  # two sittings, of 10 and of 30 seconds
    monkeypatch.setattr("fastcon.run.time.perf_counter", lambda: next(clock))
    for pixels in (6.0, 14.0):
        waits = Waits({"pixels": pixels, "logits": 1.0}, Cores())
        waits.step(0.5)
        waits.step(0.5)
        waits.write(run)
    with open(run.path / Waits.FILE, "a") as file:
        file.write('{"steps": 1, "sec')  # killed while it wrote
    facts, text = info.describe(str(run.path))
    assert facts["waits"] == pytest.approx(
        {"pixels": 0.5, "logits": 0.05, "turns": 0, "host": 0.05, "step": 0.4, "seconds": 40}
    )
    assert "time: 50% pixels, 5% logits, 0% turns, 5% host, 40% step of 40 s" in text
    assert "to be faster: `threads`" in text


@pytest.mark.parametrize(
    ("waits", "baked", "advice"),
    [
        ({"pixels": 0.3, "logits": 0.1, "host": 0}, None, "precompute with `bake`"),
        ({"pixels": 0.3, "logits": 0.1, "host": 0}, 90, "`threads` for as many decoding threads as there are cores"),
        ({"pixels": 0.1, "logits": 0.3, "host": 0}, None, "`logits` uint8"),
        ({"pixels": 0.1, "logits": 0, "host": 0.2}, None, "`log_every`"),
        ({"pixels": 0.1, "logits": 0, "turns": 0.5, "host": 0.2}, None, "other fastcon processes"),
    ],
)
def test_what_to_change_follows_from_the_largest_wait(waits, baked, advice):
    shares = {"turns": 0} | waits | {"step": 1 - sum(waits.values()), "seconds": 9}
    line = info.diagnosis(shares, {"store": {"recipe": {"bake": baked}}})[1]
    assert advice in line
    assert ("`bake`" in line) == (advice == "precompute with `bake`")


@pytest.mark.parametrize(
    ("rates", "advice"),
    [
        ({"": 100.0, "--precision float32": 131.0, "--batch-size 64": 120.0}, "--precision float32: 131 images/s"),
        ({"": 100.0, "--precision float32": 109.0}, "nothing that was tried (--precision float32) is faster than 100"),
    ],
)
def test_advice_for_the_step_is_what_was_measured(rates, advice):
    waits = {"pixels": 0.08, "logits": 0.02, "turns": 0, "host": 0.09, "step": 0.81, "seconds": 9, "tried": rates}
    assert advice in info.diagnosis(waits, CONFIG)[1]


def test_a_missing_dependency_names_its_extra():
    with pytest.raises(FastconError, match=r"no_such_module is not installed .* pip install 'fastcon\[timm\]'"):
        optional_import("no_such_module", "timm")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("birds/train", "birds"),
        ("/data/aid.tar", "aid"),
        ("data:ifashion-sleeve?root=/data/ifashion&part=train", "ifashion-sleeve"),
        ("data:cub?root=/a/b&part=test", "cub"),
        ("rendered:glyphs?classes=0-3", "glyphs"),
        ("rendered:digits", "digits"),
    ],
)
def test_what_a_task_is_called(source, name):
    assert task_name([source]) == name

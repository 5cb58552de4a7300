"""Verify: a whole store passes, every damage is named, and repair brings back the same bytes."""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from conftest import ARCHITECTURE, BATCH, MACHINE, make_model, rewrite_record, tree
from safetensors.torch import load_file

from fastcon.data.manifest import index
from fastcon.distill import verify as verification
from fastcon.distill.options import TrainOptions, Upkeep
from fastcon.distill.precompute import Teacher, precompute
from fastcon.distill.train import train
from fastcon.distill.verify import verify
from fastcon.errors import FastconError
from fastcon.machine import Machine
from fastcon.models.load import load
from fastcon.store import pixels
from fastcon.store.format import COPY, digest
from fastcon.store.reader import Store


@pytest.fixture
def copy(store_path, tmp_path) -> Path:
    return Path(shutil.copytree(store_path, tmp_path / "store"))


def failed(checks):
    return {check.what: check.seen for check in checks if not check.passed}


def test_a_whole_store_passes(store_path):
    checks = verify(str(store_path), None, 60, MACHINE)
    assert not failed(checks)
    assert [check.what for check in checks] == [
        "metadata", "images", "views", "pixels", "general: chunks", "general: weights", "general: rows", "letters: chunks",
        "letters: rows",
    ]  # fmt: skip
    assert "60 rows computed again" in checks[-1].seen


def chunk_of(path: Path, view: int, chunk: int) -> Path:
    return path / "teachers" / "letters" / "logits" / "c" / str(view) / str(chunk) / "0"


@pytest.mark.parametrize("damage", ["missing", "empty", "short", "flipped"])
def test_damage_is_named_and_repaired(copy, store_path, damage):
    file = chunk_of(copy, 1, 2)
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "flipped":
        data[5] ^= 1
        file.write_bytes(data)
    else:
        file.write_bytes(data[: 0 if damage == "empty" else -9])
    seen = failed(verify(str(copy), None, 8, MACHINE))
    assert list(seen) == ["letters: chunks"]
    assert "view 1, chunk 2 (rows 128 to 149)" in seen["letters: chunks"]
    assert not failed(verify(str(copy), None, 8, MACHINE, repair=True))
    assert tree(copy) == tree(store_path)


def test_rows_of_other_images_are_found(copy):
    """A permuted order with a matching digest, as a buggy writer would leave it: only recomputing can tell."""
    group = zarr.open_group(str(copy))
    order = np.roll(group["order"][0], 1)
    group["order"][0] = order
    found = digest(order, group["boxes"][0], group["flips"][0])
    rewrite_record(copy, lambda record: record["view_digests"].__setitem__(0, found))
    seen = failed(verify(str(copy), None, 100, MACHINE))
    assert "not what the recipe makes" in seen["views"]
    assert any("KL" in seen.get(f"{name}: rows", "") for name in ("general", "letters"))


def test_logits_of_another_teacher_are_found(copy, teachers):
    group = zarr.open_group(str(copy))
    logits = group["teachers/letters/logits"]
    rows = logits[0][:, ::-1].copy()
    store = Store(copy)
    from fastcon.store.format import checksum

    logits[0] = rows
    for chunk in range(store.chunks):
        a, b = store.chunk_range(chunk)
        group["teachers/letters/checksums"][0, chunk] = checksum(rows[a:b])
    assert list(failed(verify(str(copy), None, 100, MACHINE))) == ["letters: rows"]


def test_an_unfinished_store_is_said(copy):
    zarr.open_group(str(copy))["teachers/letters/checksums"][1, 0] = -1
    assert failed(verify(str(copy), None, 0, MACHINE)) == {"letters: chunks": "5 of 6 chunks whole, 1 not computed yet"}


def test_a_teacher_that_is_gone_or_changed_is_said(copy, tmp_path):
    other = make_model(tmp_path / "other.safetensors", ["a", "b", "c"], seed=77, size=40)
    for spec, message in ((str(other), "put the former back"), ("gone.safetensors", "no such weights file")):
        rewrite_record(copy, lambda record, spec=spec: record["teachers"]["letters"].update(spec=spec))
        assert message in failed(verify(str(copy), None, 8, MACHINE))["letters: rows"]


def test_pixels_that_decode_otherwise_are_said(store_path, monkeypatch):
    real = pixels.decode_samples
    monkeypatch.setattr(pixels, "decode_samples", lambda *args: real(*args)[:, ::-1])
    assert "decode differently" in failed(verify(str(store_path), None, 0, MACHINE))["pixels"]
    monkeypatch.undo()
    checks = verify(str(store_path), None, 0, replace(MACHINE, loader="torchvision"))
    assert "of 255 on average" in next(check.seen for check in checks if check.what == "pixels")


def test_other_images_are_refused(store_path, labelled_folder):
    with pytest.raises(FastconError, match="the store was made from 150 images"):
        verify(str(store_path), [str(labelled_folder)], 8, MACHINE)


def test_the_comparison_by_value():
    import torch

    a = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
    p = torch.tensor([1 / (1 + np.e), np.e / (1 + np.e)])
    kl, same = verification._compare(a, a.flip(1), "softmax")
    assert kl == pytest.approx(float((p * (p / p.flip(0)).log()).sum()))
    assert same == 0
    assert verification._compare(a, a, "softmax") == (0, 1)
    kl, same = verification._compare(torch.tensor([[2.0, -2.0]]), torch.tensor([[2.0, 2.0]]), "sigmoid")
    assert kl == pytest.approx(float((p * (p / p.flip(0)).log()).sum()) / 2)
    assert same == 0.5


def test_only_finished_rows_are_computed_again(copy, proxy, teachers):
    """A teacher that lacks a chunk and a view that another has: said, not stumbled over."""
    from conftest import RECIPE

    from fastcon.distill.precompute import precompute

    precompute(str(copy), proxy, teachers[:1], RECIPE, 3, MACHINE, BATCH)
    zarr.open_group(str(copy))["teachers/letters/checksums"][1, 0] = -1
    seen = failed(verify(str(copy), None, 100, MACHINE))
    assert seen == {"letters: chunks": "5 of 9 chunks whole, 4 not computed yet"}


def test_repair_wants_the_pixels_and_the_device_that_were_there(copy):
    chunk_of(copy, 1, 2).unlink()
    seen = failed(verify(str(copy), None, 8, replace(MACHINE, loader="torchvision"), repair=True))
    assert "decode differently" in seen["letters: repair"]
    rewrite_record(copy, lambda record: record["teachers"]["letters"].update(device="cuda"))
    seen = failed(verify(str(copy), None, 8, MACHINE, repair=True))
    assert "was computed on cuda: repair it with `device` cuda" in seen["letters: repair"]
    assert not chunk_of(copy, 1, 2).exists()


@pytest.mark.parametrize("name", ["order", "boxes", "flips"])
def test_a_damaged_view_is_named_and_repaired(copy, store_path, name):
    [file] = [file for file in (copy / name / "c" / "1").rglob("*") if file.is_file()]
    file.write_bytes(b"?" + file.read_bytes()[1:])
    assert "damaged" in failed(verify(str(copy), None, 0, MACHINE))["views"]
    assert not failed(verify(str(copy), None, 8, MACHINE, repair=True))
    assert tree(copy) == tree(store_path)


@pytest.mark.parametrize("part", ["images/ids", "images/digests", "images/names", "images/name_ends"])
def test_damaged_image_columns_are_named_and_repaired(copy, store_path, part):
    for file in (copy / part / "c").rglob("*"):
        if file.is_file():
            file.unlink()
    assert "missing or damaged" in failed(verify(str(copy), None, 0, MACHINE))["images"]
    assert not failed(verify(str(copy), None, 0, MACHINE, repair=True))
    assert tree(copy) == tree(store_path)


@pytest.mark.parametrize("way", ["precompute", "repair"])
def test_damaged_weights_are_named_and_written_anew(copy, store_path, proxy, teachers, way):
    from conftest import RECIPE

    from fastcon.distill.precompute import precompute

    (copy / "teachers" / "general" / "weights" / "c" / "0").unlink()
    assert "general: weights" in failed(verify(str(copy), None, 0, MACHINE))
    if way == "precompute":
        precompute(str(copy), proxy, teachers, RECIPE, 2, MACHINE, BATCH)
    else:
        assert not failed(verify(str(copy), None, 0, MACHINE, repair=True))
    assert tree(copy) == tree(store_path)


def test_a_missing_array_is_one_line(copy):
    (copy / "teachers" / "letters" / "checksums" / "zarr.json").unlink()
    with pytest.raises(FastconError, match="array 'teachers/letters/checksums' is missing or damaged"):
        Store(copy).logits("letters", 0, 0)


def test_a_growth_that_goes_on_or_was_cut_off_is_no_damage(copy, proxy):
    """Arrays grow first, the record follows: a reader in between sees the old views, whole."""
    group = zarr.open_group(str(copy), mode="r+")
    for name in ("order", "boxes", "flips", "teachers/letters/logits", "teachers/letters/checksums"):
        array = group[name]
        array.resize((3, *array.shape[1:]))
    assert not failed(verify(str(copy), None, 8, MACHINE))
    group["boxes"].resize((3, 150, 5))
    assert "boxes" in failed(verify(str(copy), None, 0, MACHINE))["metadata"]


def test_a_teacher_that_cannot_be_mended_hides_no_other(copy, store_path, tmp_path):
    def spoil(name):
        file = copy / "teachers" / name / "logits" / "c" / "1" / "2" / "0"
        file.write_bytes(file.read_bytes()[:-9])

    spoil("general")
    spoil("letters")
    rewrite_record(copy, lambda record: record["teachers"]["general"].update(device="cuda"))
    seen = failed(verify(str(copy), None, 8, MACHINE, repair=True))
    assert list(seen) == ["general: repair", "general: chunks"]
    assert "was computed on cuda" in seen["general: repair"]
    assert not any(name.startswith("letters") for name in seen)


def test_a_store_of_an_earlier_version_is_as_good_as_new(tmp_path, generalist_file):
    """The store (24 photos, two teachers, baked) was written by the last version that took a bare architecture for random weights."""
    with zipfile.ZipFile(Path(__file__).parent / "fixtures" / "store-of-format-2.zip") as fixture:
        fixture.extractall(tmp_path)
    path, photos = str(tmp_path / "store"), index([str(tmp_path / "photos")])
    before = tree(tmp_path / "store")
    assert [check for check in verify(path, photos, 0, MACHINE) if not check.passed] == []
    store = Store(path)
    assert (store.rows, store.views, list(store.teachers)) == (24, 2, ["letters", "tones"])
    assert store.teachers["letters"].spec == "torchvision:shufflenet_v2_x0_5?size=32"
    assert store.logits("letters", 1, 1).shape == (8, 5)
    options = TrainOptions(method="traditional", epochs=1, batch_size=8, student=f"{ARCHITECTURE}@random?size=32")
    row = train(path, str(tmp_path / "run"), options, MACHINE)
    assert set(row["heads"]) == {"letters", "tones"}
    general = Teacher("general", str(generalist_file), load(generalist_file), generalist=True)
    assert precompute(path, photos, [general], store.recipe, 2, MACHINE, 8) == 48
    after = tree(tmp_path / "store")
    assert {name: after[name] for name in before if "zarr.json" not in name and name != COPY} == {
        name: data for name, data in before.items() if "zarr.json" not in name and name != COPY
    }


def test_a_run_that_an_earlier_version_began_goes_on(tmp_path, monkeypatch):
    """Three of nine steps on the store above, and what that version itself made of it in the end."""
    for name in ("store", "run"):
        with zipfile.ZipFile(Path(__file__).parent / "fixtures" / f"{name}-of-format-2.zip") as fixture:
            fixture.extractall(tmp_path)
    (tmp_path / "small.py").write_text(
        "from torch import nn\n"
        "def net(): return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), "
        "nn.Flatten(), nn.Linear(8, 5))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = TrainOptions(method="traditional", epochs=3, batch_size=8, student="python:small:net?size=32", seed=5)
    steps = []
    config = (tmp_path / "run" / "config.json").read_bytes()
    train(
        str(tmp_path / "store"),
        str(tmp_path / "run"),
        options,
        Machine("cpu"),  # precision and threads: what the run has
        Upkeep(log_every=1),
        progress=lambda done, total: steps.append(done),
    )
    assert steps[0] == 4
    assert (tmp_path / "run" / "config.json").read_bytes() == config
    made, wanted = (load_file(tmp_path / folder / "student.safetensors") for folder in ("run", "whole"))
    assert set(made) == set(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(made[key], value, rtol=1e-3, atol=1e-6)
    rows, before = (
        [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        for folder in ("run", "whole")
    )
    assert rows[:3] == before[:3]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in before], rel=1e-3)

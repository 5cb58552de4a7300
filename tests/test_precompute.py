"""Precompute: what is stored is what the teachers said of the pixels that training will see; it resumes exactly."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BATCH, MACHINE, RECIPE, make_model, tree

from fastcon.data import decode as decoding
from fastcon.data import views
from fastcon.data.decode import Request
from fastcon.distill import precompute
from fastcon.distill.loader import Loader
from fastcon.distill.precompute import Teacher
from fastcon.distill.verify import verify
from fastcon.errors import FastconError
from fastcon.models.classifier import Head
from fastcon.models.frozen import Frozen
from fastcon.models.load import load
from fastcon.store import arrays, pixels, writer
from fastcon.store.format import Recipe
from fastcon.store.reader import Store
from fastcon.store.writer import StoreWriter, forget


def test_stored_logits_are_the_teachers_own(store_path, proxy, teachers):
    store = Store(store_path)
    view = store.view(1)
    for teacher in teachers:
        size = teacher.model.size
        request = [Request(view.order[64:128], view.boxes[64:128], view.flips[64:128])]
        [pixels] = decoding.decode(proxy, request, [size], 64, MACHINE)
        with torch.no_grad():
            expected = teacher.model(pixels[size])
        stored = torch.from_numpy(store.logits(teacher.name, 1, 1)).float()
        torch.testing.assert_close(stored, expected, rtol=2e-3, atol=2e-3)  # float16
        assert expected.std(0).min() > 0.3  # the rows differ, so a wrong order would show


def test_the_student_sees_the_pixels_the_teacher_saw(tmp_path, proxy, teachers, monkeypatch):
    seen = []
    real = Frozen.__call__

    def spy(self, pixels):
        seen.append(pixels.clone())
        return real(self, pixels)

    monkeypatch.setattr(Frozen, "__call__", spy)
    precompute.precompute(str(tmp_path / "s"), proxy, teachers[:1], RECIPE, 2, MACHINE, BATCH, compile="none")
    by_teacher = torch.cat(seen).view(2, 150, 3, 32, 32)
    view = [Store(tmp_path / "s").view(v) for v in range(2)]
    loader = Loader(str(tmp_path / "s"), proxy, 25, epochs=2)
    count = 0
    for k, batch in enumerate(loader):
        epoch = k // loader.schedule.steps
        row_of = np.argsort(view[epoch].order)
        rows = row_of[batch.indices]
        assert torch.equal(batch.pixels, by_teacher[epoch][rows])
        count += len(rows)
    assert count == 300


def test_resuming_gives_the_same_bytes(tmp_path, proxy, teachers, store_path, monkeypatch):
    path = str(tmp_path / "s")
    real, calls = StoreWriter.write, 0

    def dies(self, *args):
        nonlocal calls
        calls += 1
        if calls in (3, 6, 7):
            raise KeyboardInterrupt
        real(self, *args)

    monkeypatch.setattr(StoreWriter, "write", dies)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            precompute.precompute(path, proxy, teachers, RECIPE, 2, MACHINE, BATCH)
    monkeypatch.undo()
    assert 0 < precompute.precompute(path, proxy, teachers, RECIPE, 2, MACHINE, BATCH) < 300
    assert tree(Path(path)) == tree(store_path)
    assert precompute.precompute(path, proxy, teachers, RECIPE, 2, MACHINE, BATCH) == 0
    assert tree(Path(path)) == tree(store_path)


def test_more_views_and_another_teacher_compute_just_those(tmp_path, proxy, teachers, store_path, monkeypatch):
    path = str(tmp_path / "s")
    ran: dict[str, int] = {}
    real = Frozen.__call__
    names = {id(teacher.model): teacher.name for teacher in teachers}

    def spy(self, pixels):
        name = names[id(self._model)]
        ran[name] = ran.get(name, 0) + len(pixels)
        return real(self, pixels)

    monkeypatch.setattr(Frozen, "__call__", spy)
    precompute.precompute(path, proxy, teachers[:1], RECIPE, 1, MACHINE, BATCH, compile="none")
    assert ran == {"general": 150}
    precompute.precompute(path, proxy, teachers, RECIPE, 1, MACHINE, BATCH, compile="none")
    assert ran == {"general": 150, "letters": 150}
    precompute.precompute(path, proxy, teachers, RECIPE, 2, MACHINE, BATCH, compile="none")
    assert ran == {"general": 300, "letters": 300}
    assert tree(Path(path)) == tree(store_path)


def test_batches_never_straddle_a_chunk(store_path):
    store = Store(store_path)
    slices = [rows for chunk in range(store.chunks) for rows in precompute.batches_of(store, chunk, 24)]
    assert [(rows.start, rows.stop) for rows in slices] == [
        (0, 24), (24, 48), (48, 64), (64, 88), (88, 112), (112, 128), (128, 150),
    ]  # fmt: skip


def test_other_weights_under_the_same_name_are_refused(tmp_path, store_path, proxy, teachers):
    path = shutil.copytree(store_path, tmp_path / "s")
    other = make_model(tmp_path / "m.safetensors", ["a", "b", "c"], seed=9, size=40)
    changed = Teacher("letters", str(other), load(other))
    with pytest.raises(
        FastconError, match=r"teacher 'letters' is in .* with weights \w{12}…, the one given has \w{12}…"
    ):
        precompute.precompute(str(path), proxy, [teachers[0], changed], RECIPE, 2, MACHINE, BATCH)


def test_a_teacher_is_taken_out_and_may_come_back(tmp_path, store_path, proxy, teachers):
    path = shutil.copytree(store_path, tmp_path / "s")
    alone = tmp_path / "alone"
    precompute.precompute(str(alone), proxy, teachers[:1], RECIPE, 2, MACHINE, BATCH)
    forget(path, "letters")
    assert list(Store(path).teachers) == ["general"]
    assert {k: v for k, v in tree(path).items() if k != "teachers/zarr.json"} == {
        k: v for k, v in tree(alone).items() if k != "teachers/zarr.json"
    }
    other = make_model(tmp_path / "m.safetensors", ["a", "b", "c"], seed=9, size=40)
    changed = Teacher("letters", str(other), load(other))
    assert precompute.precompute(str(path), proxy, [teachers[0], changed], RECIPE, 2, MACHINE, BATCH) == 300
    forget(path, "letters")
    precompute.precompute(str(path), proxy, teachers, RECIPE, 2, MACHINE, BATCH)
    assert tree(path) == tree(store_path)
    with pytest.raises(FastconError, match="has no teacher 'birds': there are general, letters"):
        forget(path, "birds")


@pytest.mark.parametrize("moment", ["before", "between", "while deleting"])
def test_a_kill_leaves_a_teacher_there_or_gone(moment, tmp_path, store_path, proxy, teachers, monkeypatch):
    path = shutil.copytree(store_path, tmp_path / "s")

    def dies(*args: object) -> None:
        if moment == "while deleting":
            shutil.rmtree(path / "teachers" / "letters" / "logits")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "_commit" if moment == "before" else "_remove_unnamed", dies)
        patch.setattr(writer, "_reopened", _opened_plainly)  # without what is patched
        with pytest.raises(KeyboardInterrupt):
            forget(path, "letters")
    there = list(Store(path).teachers)
    assert there == (["general", "letters"] if moment == "before" else ["general"])
    done = precompute.precompute(str(path), proxy, teachers[: len(there)], RECIPE, 2, MACHINE, BATCH)
    assert done == 0
    assert (path / "teachers" / "letters").exists() == (moment == "before")
    assert all(check.passed for check in verify(str(path), proxy, 16, MACHINE, False))
    precompute.precompute(str(path), proxy, teachers, RECIPE, 2, MACHINE, BATCH)
    assert tree(path) == tree(store_path)


def _opened_plainly(path: str) -> StoreWriter:
    store = StoreWriter(path)
    store._group = arrays.open_group(path, "r+")
    return store


def test_a_second_generalist_is_refused(tmp_path, store_path, proxy, teachers):
    path = shutil.copytree(store_path, tmp_path / "s")
    second = replace(teachers[1], name="other", generalist=True)
    with pytest.raises(FastconError, match="has the generalist 'general', and a store has one"):
        precompute.precompute(str(path), proxy, [second], RECIPE, 2, MACHINE, BATCH)


def test_names_given_twice_are_refused(tmp_path, proxy, teachers):
    with pytest.raises(FastconError, match="'letters' is given twice"):
        precompute.precompute(str(tmp_path / "s"), proxy, [teachers[1]] * 2, RECIPE, 1, MACHINE, BATCH)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_logits_that_are_no_numbers_are_named_and_not_stored(tmp_path, proxy, teachers, value):
    model = load(teachers[1].spec)
    with torch.no_grad():
        model.head_module.layer.bias[1] = value
    with pytest.raises(
        FastconError, match=r"teacher 'bad' gives NaN, infinite or float16-overflowing .*image '0\d+\.jpg'"
    ):
        precompute.precompute(str(tmp_path / "s"), proxy, [Teacher("bad", "x", model)], RECIPE, 1, MACHINE, BATCH)
    assert not Store(tmp_path / "s").done("bad").any()


def test_a_full_disk_is_said_and_survived(tmp_path, proxy, teachers, store_path, monkeypatch):
    path = str(tmp_path / "s")
    real, calls = StoreWriter.write, 0

    def full(self, *args):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise OSError(28, "No space left on device")
        real(self, *args)

    monkeypatch.setattr(StoreWriter, "write", full)
    with pytest.raises(FastconError, match=r"No space left on device.: free space, then run the same command again"):
        precompute.precompute(path, proxy, teachers, RECIPE, 2, MACHINE, BATCH)
    monkeypatch.undo()
    precompute.precompute(path, proxy, teachers, RECIPE, 2, MACHINE, BATCH)
    assert tree(Path(path)) == tree(store_path)


def test_pixels_that_decode_otherwise_are_refused(tmp_path, store_path, proxy, monkeypatch):
    store = Store(store_path)
    assert pixels.check_pixels(store, proxy, MACHINE, exact=True) is None
    slightly = replace(MACHINE, loader="torchvision")
    warning = pixels.check_pixels(store, proxy, slightly, exact=False)
    assert warning is not None
    assert "of 255 on average over 64 samples" in warning
    assert "loader dali → torchvision" in warning
    with pytest.raises(FastconError, match="decode differently"):
        pixels.check_pixels(store, proxy, slightly, exact=True)
    real = pixels.decode_samples
    monkeypatch.setattr(pixels, "decode_samples", lambda *args: real(*args)[:, :, ::-1])
    with pytest.raises(FastconError, match="decode differently"):
        pixels.check_pixels(store, proxy, MACHINE, exact=False)


def test_sample_pixels_are_kept(store_path):
    rows, pixels = Store(store_path).samples()
    assert len(rows) == 64
    assert pixels.shape == (64, 32, 32, 3)
    assert len(set(rows.tolist())) == 64


def test_a_store_in_object_storage(proxy, teachers, store_path):
    """fsspec's in-memory file system stands in for a bucket."""
    url = "memory://bucket/store"
    precompute.precompute(url, proxy, teachers, RECIPE, 1, MACHINE, BATCH)
    assert precompute.precompute(url, proxy, teachers, RECIPE, 2, MACHINE, BATCH) == 150
    remote, local = Store(url), Store(store_path)
    for name in local.teachers:
        for view in range(2):
            assert np.array_equal(remote.logits(name, view, 1), local.logits(name, view, 1))
    assert len(next(iter(Loader(remote, proxy, 32))).pixels) == 32


def test_a_teacher_that_failed_at_once_may_come_back_mended(tmp_path, proxy, teachers):
    broken = load(teachers[1].spec)
    with torch.no_grad():
        broken.head_module.layer.bias[1] = float("nan")
    for attempt in (broken, teachers[1].model):
        mended = attempt is not broken
        try:
            precompute.precompute(str(tmp_path / "s"), proxy, [Teacher("a", "x", attempt)], RECIPE, 1, MACHINE, BATCH)
        except FastconError:
            assert not mended
    assert Store(tmp_path / "s").done("a").all()


def test_a_model_of_several_heads_must_say_which(teachers):
    model = load(teachers[1].spec)
    model.replace_heads([*model.heads, Head("new", ("x", "y"))], keep={"head": 0}, seed=0)
    with pytest.raises(FastconError, match=r"runs/s has several heads \(head, new\): choose one, as runs/s\?head=head"):
        Teacher("a", "runs/s", model)


@pytest.mark.parametrize(
    ("size", "scale", "warned"),
    [(32, (0.08, 1.0), False), (96, (0.08, 1.0), True), (160, (0.35, 1.0), True), (96, (0.9, 1.0), False)],
)
def test_crops_that_hold_little_detail_are_warned_of(proxy, size, scale, warned):
    said = precompute.enlarged(proxy, Recipe(size=size, scale=scale))
    assert (said is not None) == warned
    if said:
        boxes = views.boxes(0, proxy.ids, 0, proxy.widths, proxy.heights, scale)
        share = np.mean([min(height, width) < size / 2 for _, _, height, width in boxes])
        assert said.startswith(f"{share:.0%} of the crops are enlarged more than 2 times to {size} px")
        assert ("`scale` 0.35 1" in said) == (scale[0] < 0.35)


def test_the_warning_of_small_photos_is_said_once_there_is_work(tmp_path, proxy, teachers):
    said: list[str] = []
    for _ in range(2):
        precompute.precompute(
            str(tmp_path / "s"), proxy, teachers[:1], Recipe(size=96), 1, MACHINE, BATCH, say=said.append
        )
    assert [line.split(":")[0] for line in said] == ["warning"]

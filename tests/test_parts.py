"""Stores in parts: the same logits as one store, the same bytes whoever makes them, and nothing that is not there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BATCH, MACHINE, make_model, tree

from fastcon.data.manifest import ImageSet, index
from fastcon.distill import parts as distilled
from fastcon.distill.loader import Loader
from fastcon.distill.options import PrecomputeOptions, TrainOptions
from fastcon.distill.precompute import Teacher, precompute
from fastcon.distill.train import train
from fastcon.distill.verify import verify
from fastcon.errors import FastconError, UsageError
from fastcon.info import describe
from fastcon.models.load import load
from fastcon.store import parts
from fastcon.store.format import Recipe
from fastcon.store.reader import Store

OPTIONS = PrecomputeOptions(seed=3, size=32, batch_size=BATCH, parts=3)
CHUNK = 16


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Several chunks in a part."""
    recipe = PrecomputeOptions.recipe.fget
    monkeypatch.setattr(PrecomputeOptions, "recipe", property(lambda self: replace(recipe(self), chunk_rows=CHUNK)))


@pytest.fixture(scope="module")
def images(proxy_folder):
    return ImageSet([str(proxy_folder)])


def make(path, images, teachers, views=2, **changes):
    return distilled.make(str(path), images, teachers, replace(OPTIONS, **changes), views, MACHINE)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, proxy_folder, teachers):
    """A store of 150 images in 3 parts, 2 views, two teachers. Not to be changed: copy it."""
    path = tmp_path_factory.mktemp("parts") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            PrecomputeOptions, "recipe", property(lambda self: Recipe(self.seed, self.size, chunk_rows=CHUNK))
        )
        assert make(path, ImageSet([str(proxy_folder)]), teachers) == 300
    return path


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


def test_parts_share_the_images_by_their_ids(whole, proxy):
    stores = [Store(parts.folder(str(whole), k)) for k in range(3)]
    ids = [store.image_columns()[0] for store in stores]
    assert sorted(np.concatenate(ids).tolist()) == sorted(proxy.ids.tolist())
    assert all((part % np.uint64(3) == k).all() for k, part in enumerate(ids))
    assert [store.record.images.json()["share"] for store in stores] == [[k, 3] for k in range(3)]
    assert [store.record.images.share for store in stores] == [(k, 3, "image") for k in range(3)]
    assert [store.teachers["general"].weights_bytes is None for store in stores] == [False, True, True]  # kept once


def test_images_have_the_logits_that_one_store_gives_them(whole, tmp_path, proxy, teachers):
    """And the pixels: views do not depend on parts."""
    precompute(str(tmp_path / "one"), proxy, teachers, Recipe(3, 32, chunk_rows=CHUNK), 2, MACHINE, BATCH)

    def by_image(path):
        loader = Loader(str(path), None, 30, epochs=2)
        name = loader.manifest.name
        found = {}
        for k, batch in enumerate(loader):
            for row, image in enumerate(batch.indices.tolist()):
                found[k // len(loader) * 2, name(image)] = batch.stacked[row], batch.pixels[row]
        return found

    one, several = by_image(tmp_path / "one"), by_image(whole)
    assert one.keys() == several.keys()
    assert len(one) == 150
    for key, (logits, pixels) in one.items():
        torch.testing.assert_close(several[key][0], logits, rtol=2e-3, atol=2e-3)  # batches differ, and so may rounding
        assert torch.equal(several[key][1], pixels)


def test_the_same_bytes_part_by_part(whole, tmp_path, images, teachers):
    for number in (2, 0):
        make(tmp_path / "s", images, teachers, part=(number,))
    with pytest.raises(FastconError, match=r"part 1 is not finished \(1 of 3 are not\)"):
        Loader(str(tmp_path / "s"))
    assert "3 parts, 2 of them made" in describe(str(tmp_path / "s"))[1]
    make(tmp_path / "s", images, teachers, part="1-2", parts=None)
    assert tree(tmp_path / "s") == tree(whole)
    assert make(tmp_path / "s", images, teachers, parts=None) == 0


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_the_same_bytes_by_torchrun(tmp_path, proxy_folder, generalist_file, teacher_file, ranks):
    command = [
        "precompute",
        str(proxy_folder),
        "--views",
        "1",
        "--size",
        "32",
        "--precision",
        "float32",
        "--parts",
        "4",
    ]
    command += ["--generalist", f"general={generalist_file}", "--teacher", f"letters={teacher_file}"]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "fastcon"]
    subprocess.run([sys.executable, "-m", "fastcon", *command, "--store", str(tmp_path / "one")], check=True)
    subprocess.run([*run, *command, "--store", str(tmp_path / "many")], check=True)
    assert tree(tmp_path / "one") == tree(tmp_path / "many")


def test_a_part_whose_process_died_is_made_by_others(tmp_path, whole, images, teachers, monkeypatch):
    """A process that is killed while it holds a part; another one waits for it, and then makes that part itself."""
    path = tmp_path / "s"
    folder = parts.folder(str(path), 1)
    hold = f"import fcntl, os, time; os.makedirs({folder!r}, exist_ok=True); file = open({folder + '/write.lock'!r}, 'a+')\n"
    hold += "fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        sleep = time.sleep
        look = {distilled.POLL: lambda _: process.kill() or process.wait()}
        monkeypatch.setattr(time, "sleep", lambda seconds: look.get(seconds, sleep)(seconds))  # at the first look
        said = []
        rows = distilled.make(str(path), images, teachers, OPTIONS, 2, MACHINE, say=said.append)
    assert rows == 300
    assert [line for line in said if "waiting" in line] == ["waiting for part 1, which other processes are making"]
    assert tree(path) == tree(whole)


def test_a_part_is_bound_with_what_it_has_by_then(tmp_path, images, teachers, monkeypatch):
    """Another process forgets a teacher between a part's last row and its entry in the record."""
    path, changing, calls = str(tmp_path / "store"), parts.changing, []

    @contextlib.contextmanager
    def after_another(path):
        with changing(path) as write:
            calls.append(path)
            if len(calls) == 2:  # the first says which parts there are to be
                parts.forget(parts.folder(path, 0), "letters")
            yield write

    monkeypatch.setattr(parts, "changing", after_another)
    make(path, images, teachers, views=1, part=(0,))
    assert len(calls) == 3, "the teacher was seen to be missing, and made again"
    assert parts.read(path).bound[0].done == {teacher.name: 1 for teacher in teachers}


def test_a_teacher_or_views_cost_only_what_is_new(copy, tmp_path, images, teachers):
    before = tree(copy)
    extra = make_model(tmp_path / "x.safetensors", ["u", "v"], 7)
    added = [Teacher("extra", str(extra), load(extra))]
    assert make(copy, images, added, parts=None) == 300
    after = tree(copy)
    logits = {name for name in before if "/c/" in name}
    assert {name: after[name] for name in logits} == {name: before[name] for name in logits}
    assert make(copy, images, [*teachers, *added], views=3) == 150
    assert parts.opened(copy).views == 3
    assert list(parts.opened(copy).teachers) == ["general", "letters", "extra"]


def test_images_are_added_as_further_parts(copy, tmp_path, images, labelled_folder, teachers):
    more, before = ImageSet([str(labelled_folder)]), tree(copy)
    with pytest.raises(FastconError, match="the store was made from"):  # else they are taken for the same, moved
        make(copy, more, teachers, parts=None)
    assert make(copy, more, teachers, parts=2, add=True) == 2 * 84
    after = tree(copy)
    assert {name: after[name] for name in before if name != "parts.json"} == {
        name: data for name, data in before.items() if name != "parts.json"
    }
    store = parts.opened(copy)
    assert (store.rows, store.binding.count, store.views) == (150 + 84, 5, 2)
    assert [store.part(k).record.images.share for k in range(5)] == [
        *((k, 3, "image") for k in range(3)),
        *((k, 2, "image") for k in range(2)),
    ]
    assert make(copy, more, teachers, parts=2, add=True) == 0  # they are there
    assert make(copy, images, teachers, views=3, parts=None) == 150  # of these alone
    assert parts.opened(copy).views == 2
    loader = Loader(str(copy), None, 39)
    names = {loader.manifest.name(k) for batch in loader for k in batch.indices.tolist()}
    assert len(names) == 234
    assert not [check for check in verify(str(copy), None, 10, MACHINE) if not check.passed]
    shutil.copytree(labelled_folder, tmp_path / "moved")
    sources = [*images.sources, str(tmp_path / "moved")]
    assert len(Loader(str(copy), sources, 39)) == 6
    with pytest.raises(FastconError, match=r"were made from 2 IMAGES .* 1 are given"):
        Loader(str(copy), sources[:1], 39)
    with pytest.raises(FastconError, match="give one of those, or `add` these"):
        make(copy, ImageSet([str(tmp_path / "moved")]), teachers, parts=None)
    assert "in 2 parts, from" in describe(str(copy))[1]


def test_labels_of_other_classes_are_not_mixed(tmp_path, labelled_folder, teachers):
    """Number 1 of one set is not number 1 of another: then nobody has labels."""
    shutil.copytree(labelled_folder, tmp_path / "same")
    (tmp_path / "other").mkdir()
    for folder in sorted(labelled_folder.iterdir())[:3]:
        shutil.copytree(folder, tmp_path / "other" / f"new {folder.name}")
    make(tmp_path / "s", ImageSet([str(labelled_folder)]), teachers, parts=2)
    make(tmp_path / "s", ImageSet([str(tmp_path / "same")]), teachers, parts=1, add=True)
    assert next(iter(Loader(str(tmp_path / "s"), None, 28))).labels is not None
    make(tmp_path / "s", ImageSet([str(tmp_path / "other")]), teachers, parts=1, add=True)
    assert next(iter(Loader(str(tmp_path / "s"), None, 28))).labels is None
    with pytest.raises(FastconError, match="`labels` needs a class for every proxy image"):
        train(str(tmp_path / "s"), str(tmp_path / "r"), TrainOptions(epochs=1, batch_size=28, labels=True), MACHINE)


def test_a_part_is_a_store_of_its_own(whole, proxy):
    assert not [check for check in verify(str(whole / "part-00001"), None, 5, MACHINE) if not check.passed]
    assert "share 1 of 3" in describe(str(whole / "part-00001"))[1]
    assert not [check for check in verify(str(whole), proxy, 3, MACHINE) if not check.passed]


def test_one_part_is_a_store_without_parts(tmp_path, images, teachers):
    make(tmp_path / "s", images, teachers, parts=1)
    assert isinstance(parts.opened(tmp_path / "s"), Store)
    with pytest.raises(FastconError, match="has no parts yet"):
        make(tmp_path / "t", images, teachers, parts=3, add=True)


def test_a_teacher_that_only_some_parts_have_is_not_finished(copy, tmp_path, images):
    extra = make_model(tmp_path / "x.safetensors", ["u", "v"], 7)
    make(copy, images, [Teacher("extra", str(extra), load(extra))], part=(1,))
    assert len(Loader(str(copy), None, 30, heads=["general", "letters"]))
    with pytest.raises(FastconError, match=r"teacher 'extra' is not finished \(first: part 0; 2 parts in all\)"):
        Loader(str(copy), None, 30)


def test_training_resumes_to_the_same_student(whole, tmp_path):
    options = TrainOptions(epochs=3, batch_size=24)
    train(str(whole), str(tmp_path / "a"), options, MACHINE)
    stop = []

    def progress(step, total):
        if step == 8 and not stop:
            stop.append(step)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(FastconError, match="at step 8 of 18, saved"):
        train(str(whole), str(tmp_path / "b"), options, MACHINE, progress=progress)
    train(str(whole), str(tmp_path / "b"), options, MACHINE)
    for name in ("student.safetensors", "heads.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "a" / "config.json").read_text())["store"]["teachers"].keys() == {
        "general",
        "letters",
    }


def test_labels_come_from_the_parts(tmp_path, labelled_folder, teachers):
    make(tmp_path / "s", ImageSet([str(labelled_folder)]), teachers)
    manifest = index([str(labelled_folder)])
    label_of = {manifest.name(k): int(label) for k, label in enumerate(manifest.labels)}
    loader = Loader(str(tmp_path / "s"), None, 28)
    for batch in loader:
        assert [label_of[loader.manifest.name(k)] for k in batch.indices.tolist()] == batch.labels.tolist()
    result = train(
        str(tmp_path / "s"), str(tmp_path / "r"), TrainOptions(epochs=1, batch_size=28, labels=True), MACHINE
    )
    assert "labels" in result["heads"]


def test_baked_parts_train_without_photos(tmp_path, proxy_folder, teachers):
    shutil.copytree(proxy_folder, tmp_path / "photos")
    make(tmp_path / "s", ImageSet([str(tmp_path / "photos")]), teachers[:1], bake=True)
    seen = {
        int(k): p
        for b in Loader(str(tmp_path / "s"), None, 30)
        for k, p in zip(b.indices, b.pixels.clone(), strict=True)
    }
    loader = Loader(str(tmp_path / "s"), [str(tmp_path / "photos")], 30)
    assert loader.manifest is not None
    shutil.rmtree(tmp_path / "photos")
    again = Loader(str(tmp_path / "s"), None, 30)
    assert all(torch.equal(p, seen[int(k)]) for b in again for k, p in zip(b.indices, b.pixels, strict=True))


def test_verify_looks_at_every_part(copy, proxy_folder):
    assert [check.seen for check in verify(str(copy), None, 30, MACHINE) if not check.passed] == []
    chunk = copy / "part-00002/teachers/letters/logits/c/1/2/0"
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"x")
    [failed] = [check for check in verify(str(copy), None, 0, MACHINE) if not check.passed]
    assert failed.what == "letters: chunks"
    assert failed.seen.startswith("part 2: ")
    assert all(check.passed for check in verify(str(copy), None, 3, MACHINE, repair=True))
    shutil.rmtree(copy / "part-00001")
    assert [check.what for check in verify(str(copy), None, 0, MACHINE) if not check.passed] == ["part"]


def test_forgetting_forgets_everywhere(copy):
    parts.forget(copy, "letters")
    assert list(parts.opened(copy).teachers) == ["general"]
    assert not list(copy.glob("part-*/teachers/letters"))
    with pytest.raises(FastconError, match="no teacher 'letters': there are general"):
        parts.forget(copy, "letters")


def test_a_lost_record_is_written_from_the_parts(copy, whole, images, teachers):
    (copy / "parts.json").write_text("{")
    with pytest.raises(FastconError, match=r"parts\.json is missing or damaged"):
        Loader(str(copy))
    (copy / "parts.json").unlink()
    assert make(copy, images, teachers[1:]) == 0
    assert parts.opened(copy).teachers.keys() == {"general", "letters"}
    assert tree(copy) == tree(whole)


def test_parts_that_do_not_belong_together_are_refused(copy, tmp_path, images, proxy_folder, teachers):
    def says(text, **changes):
        with pytest.raises(FastconError, match=text):
            make(copy, images, teachers, **changes)

    says("has 3 parts, this call says 4: use `parts` 3", parts=4)
    says("has parts 0 to 2 of these images: there is no `part` 3", part=(3,))
    says("made with seed 3, this call says 5", seed=5)
    says("teacher 'general' is in .* with logits float16, the one given has uint8", logits="uint8")
    with pytest.raises(FastconError, match="has the generalist 'general', and a store has one"):
        make(copy, images, [Teacher("other", "x", teachers[0].model, generalist=True)])
    with pytest.raises(FastconError, match="the store was made from"):
        Loader(str(copy), [str(_fewer(proxy_folder, tmp_path))])
    shutil.rmtree(copy / "part-00001")
    shutil.copytree(copy / "part-00002", copy / "part-00001")
    with pytest.raises(FastconError, match=r"part-00001 is not the part that .*parts\.json speaks of"):
        list(Loader(str(copy), None, 30))


def test_parts_decode_alike(copy, images, teachers, monkeypatch):
    """Another decoder may make parts only where its pixels are the same."""
    (copy / "part-00002").rename(copy / "gone")
    binding = parts.read(str(copy))
    with parts.changing(str(copy)) as write:
        write(replace(binding, bound={0: binding.bound[0], 1: binding.bound[1]}))
    other = replace(MACHINE, loader="torchvision")
    with pytest.raises(FastconError, match=r"images decode differently from when .*part-00000 was made"):
        distilled.make(str(copy), images, teachers, OPTIONS, 2, other)
    assert not (copy / "part-00002").exists()
    monkeypatch.setattr(distilled.decode, "settings", lambda machine: {"decoder": "newer"})  # with the same pixels
    assert make(copy, images, teachers) == 2 * binding.bound[2].rows


def _fewer(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "fewer")
    for file in sorted(path for path in (tmp_path / "fewer").rglob("*") if path.is_file())[:30]:
        file.unlink()
    return tmp_path / "fewer"


def test_what_parts_cannot_be_made_of(tmp_path, store_path, proxy_folder, images, teachers):
    with pytest.raises(FastconError, match="is a store without parts: leave out `parts`"):
        make(store_path, images, teachers)
    with pytest.raises(FastconError, match="has no parts yet: say with `parts`"):
        make(tmp_path / "none", images, teachers, parts=None, part=(1,))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("x")
    with pytest.raises(FastconError, match=r"holds other files \(file, …\)"):
        make(tmp_path / "other", images, teachers)
    with pytest.raises(FastconError, match=r"no readable image in share .* of 2000 of .* choose fewer `parts`"):
        make(tmp_path / "many", images, teachers, parts=2000)
    for text in ("x", "3-1", "-1", "1-2-3", "1.5"):
        with pytest.raises(UsageError, match="is not a number or a range"):
            PrecomputeOptions(part=text)
    assert PrecomputeOptions(part="2-4").part == (2, 3, 4)
    assert PrecomputeOptions(part=2).part == (2,)


def test_ranks_begin_with_different_parts(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for number, order in (("0", [0, 1, 2, 3]), ("1", [2, 3, 0, 1])):
        monkeypatch.setenv("RANK", number)
        assert distilled._in_turn([0, 1, 2, 3]) == order
    assert distilled._in_turn([1, 3]) == [3, 1]


def test_opening_reads_the_record_alone(whole, monkeypatch):
    """However many parts there are: they are opened when their rows are needed."""
    opened = []
    real = Store.__init__
    monkeypatch.setattr(Store, "__init__", lambda self, path: opened.append(Path(path).name) or real(self, path))
    store = parts.opened(whole)
    assert (store.rows, store.views, opened) == (150, 2, [])
    store.logits("general", 1, store.chunks - 1)
    assert opened == ["part-00002"]

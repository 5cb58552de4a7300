"""Teaching: a teacher that learns, the learning rate that a held-out part chose, resuming, upstream accuracy."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import rng
from PIL import Image

from fastcon import machine as machine_module
from fastcon.data import splits
from fastcon.data.manifest import index
from fastcon.errors import FastconError, Interrupted
from fastcon.machine import Machine
from fastcon.models.load import load
from fastcon.transfer import features, finetune
from fastcon.transfer.finetune import teach
from fastcon.transfer.options import FinetuneOptions, TuneOptions

INIT = "torchvision:resnet18?size=32"
BACKBONE = "torchvision:resnet18@random?size=32"
OPTIONS = TuneOptions(epochs=8, lr_grid=(0.02,), batch_size=16, scale=(0.5, 1.0))
DOWNSTREAM = FinetuneOptions(lr_grid=(0.02,), batch_size=16, scale=(0.5, 1.0))
MACHINE = Machine("cpu", "float32")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Six classes told apart by colour: learnt in a few steps."""
    root = tmp_path_factory.mktemp("colours")
    for k, colour in enumerate(
        [(200, 60, 60), (60, 200, 60), (60, 60, 200), (200, 200, 60), (200, 60, 200), (60, 200, 200)]
    ):
        for i in range(14):
            noise = rng(100 * k + i).normal(0, 25, (40, 48, 3))
            folder = root / f"colour-{k}"
            folder.mkdir(exist_ok=True)
            Image.fromarray(np.clip(colour + noise, 0, 255).astype(np.uint8)).save(folder / f"{i}.jpg")
    return splits.labelled(index([root]), None, 0.3, "none", 0)


@pytest.fixture(scope="module")
def taught(parts, tmp_path_factory):
    out = tmp_path_factory.mktemp("teach") / "run"
    return out, teach(INIT, *parts, str(out), OPTIONS, MACHINE)


def test_it_learns(taught, parts):
    out, result = taught
    assert result["accuracy"] > 0.5  # six classes
    rows = [json.loads(line) for line in (out / "metrics-final.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(8))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert [row["lr"] for row in rows] == pytest.approx([0.02] * 4 + [0.002] * 2 + [0.0002] * 2)


def test_the_teacher_is_a_model(taught, parts):
    out, result = taught
    model = load(out)
    assert model.heads[0].classes == parts[1].classes
    assert finetune.accuracy(model, "task", parts[1], MACHINE) == result["accuracy"]
    logits = features.logits(model, parts[1].manifest, parts[1].indices, MACHINE)
    assert (logits.argmax(1) == parts[1].labels).mean() == pytest.approx(result["accuracy"])


def test_classes_are_matched_by_name(taught, parts):
    model = load(taught[0])
    test = parts[1]
    turned = replace(test, classes=test.classes[::-1], labels=len(test.classes) - 1 - test.labels)
    assert finetune.accuracy(model, "task", turned, MACHINE) == taught[1]["accuracy"]
    with pytest.raises(FastconError, match="head 'task' does not know the class 'other'"):
        finetune.accuracy(model, "task", replace(test, classes=("other", *test.classes[1:])), MACHINE)
    with pytest.raises(FastconError, match="no head 'z': there are task"):
        finetune.accuracy(model, "z", test, MACHINE)


class _Stop(Exception):
    pass


@pytest.mark.parametrize("seconds", [0, 60])
def test_resuming_equals_never_having_stopped(taught, parts, tmp_path, monkeypatch, seconds):
    monkeypatch.setattr(finetune, "CHECKPOINT_SECONDS", seconds)

    def bomb(done, total):
        if done == 11:
            raise _Stop

    with pytest.raises(_Stop):
        teach(INIT, *parts, str(tmp_path / "run"), OPTIONS, MACHINE, progress=bomb)
    assert bool(list((tmp_path / "run").glob("checkpoints/final/*"))) == (seconds == 0)
    assert teach(INIT, *parts, str(tmp_path / "run"), OPTIONS, MACHINE) == taught[1]
    for name in ("model.safetensors", "metrics-final.jsonl", "result.json"):
        assert (tmp_path / "run" / name).read_bytes() == (taught[0] / name).read_bytes()


def test_a_finished_run_only_reports(taught, parts):
    said: list[str] = []
    assert teach(INIT, *parts, str(taught[0]), OPTIONS, MACHINE, say=said.append) == taught[1]
    assert "nothing to do" in said[0]
    with pytest.raises(FastconError, match="holds another run: epochs was 8, this call says 9"):
        teach(INIT, *parts, str(taught[0]), replace(OPTIONS, epochs=9), MACHINE)


def test_the_grid_is_judged_on_held_out_training_images(parts, tmp_path, monkeypatch):
    judged = []
    real = finetune.accuracy

    def spy(model, head, subset, machine, **more):
        judged.append(subset)
        return real(model, head, subset, machine, **more)

    monkeypatch.setattr(finetune, "accuracy", spy)
    options = replace(OPTIONS, epochs=8, lr_grid=(0.02, 1e-6))
    result = teach(INIT, *parts, str(tmp_path / "run"), options, MACHINE)
    assert set(result["tried"]) == {"0.02", "1e-06"}
    assert result["lr"] == 0.02
    train, test = (set(part.indices.tolist()) for part in parts)
    assert all(set(subset.indices.tolist()) < train for subset in judged[:2])
    assert set(judged[2].indices.tolist()) == test


@pytest.mark.parametrize("stop_at", [1, 12, 20])
def test_a_signal_in_mid_epoch_saves_and_the_same_command_resumes(parts, taught, tmp_path, stop_at):
    def poke(done, total):
        if done == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match=f"at step {stop_at} of 24, saved"):
        teach(INIT, *parts, str(tmp_path / "run"), OPTIONS, MACHINE, progress=poke)
    steps = []
    again = teach(INIT, *parts, str(tmp_path / "run"), OPTIONS, MACHINE, progress=lambda done, _: steps.append(done))
    assert steps[:2] == [stop_at, stop_at + 1]  # not one step twice
    assert again == taught[1]
    for name in ("model.safetensors", "metrics-final.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (taught[0] / name).read_bytes()


def test_every_epoch_shows_every_image_anew(parts):
    train = parts[0]
    options = replace(OPTIONS, batch_size=len(train))
    every, options = range(len(train)), replace(options, epochs=2)
    (first, labels), (second, others) = finetune._batches(train, 0, 32, options, MACHINE, every)
    assert sorted(labels.tolist()) == sorted(train.labels.tolist()) == sorted(others.tolist())
    assert not torch.equal(first, second)
    [(again, _)] = finetune._batches(train, 1, 32, options, MACHINE, every)
    assert torch.equal(again, second)
    [(some, of_some)] = finetune._batches(train, 1, 32, options, MACHINE, range(5, 9))
    assert torch.equal(some, second[5:9])
    assert torch.equal(of_some, others[5:9])


def test_a_rate_that_explodes_is_named(parts, tmp_path):
    with pytest.raises(FastconError, match=r"the loss is (nan|inf) in epoch \d at learning rate 1e\+20"):
        teach(INIT, *parts, str(tmp_path / "run"), replace(OPTIONS, lr_grid=(1e20,)), MACHINE)


def test_features_are_cached_by_what_made_them(taught, parts, monkeypatch):
    model, manifest = load(taught[0]), parts[0].manifest
    first = features.features(model, manifest, MACHINE)
    assert first.shape == (84, 512)
    with torch.no_grad():
        [(_, pixels)] = features.center_crops(manifest, np.arange(40), 32, 40, MACHINE)
        np.testing.assert_allclose(first[:40], model.features(pixels).numpy(), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(features, "center_crops", lambda *_: pytest.fail("computed again"))
    assert np.array_equal(features.features(model, manifest, MACHINE), first)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        features.features(model, manifest, MACHINE)
    monkeypatch.undo()
    smaller = features.features(load(taught[0]), manifest, MACHINE, size=24)
    assert not np.allclose(smaller, first)


def test_the_centre_crop_is_torchvisions_within_a_rounding(proxy):
    import io

    from PIL import Image
    from torchvision.transforms import functional

    from fastcon.data.manifest import ImageReader

    [(_, ours)] = features.center_crops(proxy, np.arange(20), 32, 40, MACHINE)
    reader = ImageReader(proxy)
    theirs = []
    for k in range(20):
        image = Image.open(io.BytesIO(reader.read([k])[0].tobytes())).convert("RGB")
        image = functional.center_crop(functional.resize(image, round(32 * 256 / 224), antialias=True), 32)
        theirs.append(functional.pil_to_tensor(image))
    assert (ours.int() - torch.stack(theirs).int()).abs().float().mean() < 6


def test_other_images_under_the_same_folder_are_another_run(taught, parts):
    train, test = splits.labelled(parts[0].manifest, None, 0.3, "none", 1)
    assert (len(train), len(test)) == (len(parts[0]), len(parts[1]))
    with pytest.raises(FastconError, match="holds another run: train was"):
        teach(INIT, train, test, str(taught[0]), OPTIONS, MACHINE)


def test_a_diverging_rate_leaves_the_others(parts, tmp_path):
    said: list[str] = []
    options = replace(OPTIONS, epochs=1, lr_grid=(0.02, 1e20))
    result = teach(INIT, *parts, str(tmp_path / "run"), options, MACHINE, say=said.append)
    assert result["lr"] == 0.02
    assert list(result["tried"]) == ["0.02"]
    assert said[0] == "starts from torchvision:resnet18?size=32, random weights, at 32 px"
    assert any("learning rate 1e+20 is out" in line for line in said)


def test_a_command_that_was_refused_may_be_corrected(parts, tmp_path):
    with pytest.raises(FastconError, match="no such weights file"):
        teach("gone.safetensors", *parts, str(tmp_path / "run"), OPTIONS, MACHINE)
    teach(INIT, *parts, str(tmp_path / "run"), replace(OPTIONS, epochs=1), MACHINE)


def test_few_shots_are_the_draws_of_the_probes(parts, tmp_path, monkeypatch):
    train, test = parts
    seen = []
    real = finetune.fit

    def spy(start, subset, rate, options, *rest):
        seen.append(subset.indices.tolist())
        return real(start, subset, rate, options, *rest)

    monkeypatch.setattr(finetune, "fit", spy)
    options = replace(DOWNSTREAM, epochs=2, seed=3)
    result = finetune.finetune(
        BACKBONE, train, test, str(tmp_path / "few"), replace(options, shots=4, trials=2), MACHINE
    )
    drawn = [train.indices[splits.draw(train.ids, train.labels, 4, 3, trial)].tolist() for trial in range(2)]
    assert seen == drawn
    assert drawn[0] != drawn[1]
    assert result["accuracy"] == pytest.approx(np.mean(result["accuracies"]))
    assert len(result["accuracies"]) == 2
    assert not (tmp_path / "few" / "model.safetensors").exists()
    said: list[str] = []
    again = finetune.finetune(
        BACKBONE, train, test, str(tmp_path / "few"), replace(options, shots=4, trials=2), MACHINE, say=said.append
    )
    assert again == result
    assert "nothing to do" in said[0]


def test_few_shots_resume_after_the_trials_that_are_done(parts, tmp_path):
    options = replace(DOWNSTREAM, epochs=2)
    whole = finetune.finetune(BACKBONE, *parts, str(tmp_path / "whole"), replace(options, shots=4, trials=3), MACHINE)
    steps = []

    def bomb(done, total):
        steps.append(done)
        if len(steps) == 4:  # two steps a trial
            raise _Stop

    with pytest.raises(_Stop):
        finetune.finetune(
            BACKBONE, *parts, str(tmp_path / "cut"), replace(options, shots=4, trials=3), MACHINE, progress=bomb
        )
    assert (tmp_path / "cut" / "trial-0.json").exists()
    assert not (tmp_path / "cut" / "result.json").exists()
    resumed = []
    again = finetune.finetune(
        BACKBONE, *parts, str(tmp_path / "cut"), replace(options, shots=4, trials=3), MACHINE,
        progress=lambda done, total: resumed.append((done, total)),
    )  # fmt: skip
    assert again == whole
    assert resumed[-1][0] == resumed[-1][1]


def test_all_images_make_a_model(taught, parts, tmp_path):
    options = replace(DOWNSTREAM, epochs=5)
    result = finetune.finetune(BACKBONE, *parts, str(tmp_path / "run"), options, MACHINE)
    assert result["accuracies"] == [result["accuracy"]]
    assert finetune.accuracy(load(tmp_path / "run"), "task", parts[1], MACHINE) == result["accuracy"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics-trial-0-final.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows] == pytest.approx([0.02] * 2 + [0.002] * 2 + [0.0002])


def test_one_image_a_class_leaves_none_to_choose_with(parts, tmp_path):
    options = replace(DOWNSTREAM, lr_grid=(0.01, 0.1))
    with pytest.raises(FastconError, match="leave none aside to choose among 2 learning rates"):
        finetune.finetune(BACKBONE, *parts, str(tmp_path / "run"), replace(options, shots=1, trials=1), MACHINE)


def test_several_labels_an_image_make_a_sigmoid_head(parts, tmp_path):
    """Labels "red", "green", "blue" by the colour's channels: learnt as three binary problems."""
    channels = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]])
    train, test = (replace(part, labels=channels[part.labels], classes=("red", "green", "blue")) for part in parts)
    result = teach(INIT, train, test, str(tmp_path / "run"), OPTIONS, MACHINE)
    model = load(tmp_path / "run")
    assert model.heads[0].kind == "sigmoid"
    told = features.logits(model, test.manifest, test.indices, MACHINE) > 0
    assert result["accuracy"] == pytest.approx((told == test.labels).mean())
    assert result["accuracy"] > 0.75
    turned = replace(test, classes=test.classes[::-1], labels=test.labels[:, ::-1])
    assert finetune.accuracy(model, "task", turned, MACHINE) == result["accuracy"]
    with pytest.raises(FastconError, match="is a sigmoid head, and the test images have one class each"):
        finetune.accuracy(
            model, "task", replace(parts[1], classes=("red", "green", "blue", "red", "red", "red")), MACHINE
        )


def test_other_weights_under_the_same_path_are_another_run(taught, parts, tmp_path):
    """A result is of the weights that made it, not of the name of their file."""
    file = tmp_path / "backbone.safetensors"
    file.write_bytes((taught[0] / "model.safetensors").read_bytes())
    options = replace(DOWNSTREAM, epochs=1)
    finetune.finetune(str(file), *parts, str(tmp_path / "run"), options, MACHINE)
    teach(str(file), *parts, str(tmp_path / "teacher"), options, MACHINE)
    model = load(file)
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    file.write_bytes(model.export("task"))
    for run in (finetune.finetune, teach):
        out = tmp_path / ("run" if run is finetune.finetune else "teacher")
        with pytest.raises(FastconError, match="holds another run: init_weights was"):
            run(str(file), *parts, str(out), options, MACHINE)


def test_accuracies_are_measured_in_the_precision_of_evaluate(parts, tmp_path, monkeypatch):
    """Which is another than that of training where a CPU has bfloat16 and trains this network faster in float32."""
    monkeypatch.setattr(machine_module, "cpu_has_bfloat16", lambda: True)
    monkeypatch.setattr(finetune, "settle", lambda machine, *_: replace(machine.settled(), precision="float32"))
    seen = []
    measure = finetune.accuracy
    monkeypatch.setattr(finetune, "accuracy", lambda *given, **more: seen.append(given[3].precision) or measure(*given))
    options = replace(OPTIONS, epochs=1, lr_grid=(0.01, 0.02))
    result = teach(INIT, *parts, str(tmp_path / "run"), options, Machine("cpu"))
    assert seen == ["bfloat16"] * 3  # two learning rates, and the test images
    assert json.loads((tmp_path / "run" / "config.json").read_text())["precision"] == "float32"
    assert measure(load(tmp_path / "run"), "task", parts[1], Machine("cpu")) == result["accuracy"]

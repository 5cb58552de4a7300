"""Training: the loop by value, resuming as if never stopped, what a run leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURE, BATCH, MACHINE, RECIPE
from safetensors.torch import load_file
from torchvision import models as zoo

from fastcon import machine
from fastcon.cores import Cores
from fastcon.data.manifest import index
from fastcon.distill import tally
from fastcon.distill import train as training
from fastcon.distill.loader import Loader
from fastcon.distill.options import RECIPES, TrainOptions, Upkeep
from fastcon.distill.precompute import Teacher, precompute
from fastcon.distill.train import train
from fastcon.errors import FastconError, Interrupted
from fastcon.info import describe
from fastcon.models.classifier import Head
from fastcon.models.load import from_bytes, load
from fastcon.models.origin import origin
from fastcon.store.format import Recipe
from fastcon.store.reader import Store
from fastcon.training import newest

QUICK = TrainOptions(epochs=3, batch_size=32)
UPKEEP = Upkeep(log_every=3)


@pytest.fixture(scope="module")
def trained(store_path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "consolidate"
    train(str(store_path), str(out), QUICK, MACHINE, UPKEEP)
    return out


def test_it_is_sgd_on_the_papers_loss(store_path, tmp_path):
    """One epoch written out by hand: the paper's loss by autograd, plain SGD; the same way is gone."""
    store = Store(store_path)
    student = from_bytes(store.weights("general"), "x")
    heads = [Head("general", student.heads[0].classes), Head("letters", ("a", "b", "c"))]
    student.replace_heads(heads, keep={"general": 0}, seed=0)
    student.on(torch.device("cpu")).eval()  # on running statistics, without dropout
    start = {name: value.clone() for name, value in student.named_parameters()}
    optimizer = torch.optim.SGD(
        [
            {"params": student.backbone_parameters(), "lr": 1e-3},
            {"params": student.head_module.parameters(), "lr": 1e-2},
        ],
        momentum=0.9,
        weight_decay=1e-4,
    )
    torch.manual_seed(0)
    for step, batch in enumerate(Loader(store, None, 32)):
        for group, rate in zip(optimizer.param_groups, (1e-3, 1e-2), strict=True):
            group["lr"] = rate * (1, 1, 0.1, 0.1)[step]  # four steps: the first milestone, at half, falls on step 2
        logits = student.split(student(batch.pixels))
        loss = sum(
            -((batch.logits[name].float() / 2).softmax(1) * (logits[name] / 2).log_softmax(1)).sum(1).mean()
            for name in ("general", "letters")
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    train(str(store_path), str(tmp_path / "run"), replace(QUICK, epochs=1), MACHINE, UPKEEP)
    ours = dict(load(tmp_path / "run").named_parameters())
    for part in ("conv1", "stage2", "stage4", "fc"):
        theirs, mine = (
            torch.cat([(way[name] - start[name]).detach().ravel() for name in start if f"net.{part}" in name])
            for way in (dict(student.named_parameters()), ours)
        )
        # Batch statistics amplify the last bit of a gradient some ten thousandfold in these few steps: to 2 % on one machine.
        assert (mine - theirs).norm() < 0.05 * theirs.norm(), part


def test_what_a_run_leaves_behind(trained, store_path):
    config = json.loads((trained / "config.json").read_text())
    assert config["method"] == "consolidate"
    assert config["temperature"] == 2.0
    assert torch.__version__.startswith(config["versions"]["torch"])
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 3, 4, 6, 8, 9, 12]
    assert [row["images"] for row in rows] == [128, 96, 32, 64, 64, 32, 96]
    assert rows[-1]["lr_heads"] == pytest.approx(1e-4)
    for row in rows:
        for head in row["heads"].values():
            assert -1e-6 <= head["kl"] < head["loss"]
            assert 0 <= head["agreement"] <= 1
        assert row["loss"] == pytest.approx(sum(head["loss"] for head in row["heads"].values()), rel=1e-6)
    theirs = zoo.get_model(ARCHITECTURE.split(":")[1], num_classes=10)
    theirs.load_state_dict(load_file(trained / "student.safetensors"))
    heads = load_file(trained / "heads.safetensors")
    assert {name: tuple(t.shape) for name, t in heads.items()} == {
        "general.bias": (10,), "general.weight": (10, 1024), "letters.bias": (3,), "letters.weight": (3, 1024),
    }  # fmt: skip
    model = load(trained)
    assert [(head.name, len(head.classes)) for head in model.heads] == [("general", 10), ("letters", 3)]
    assert model.heads[1].classes == ("a", "b", "c")
    assert torch.equal(model.head_weights("letters")["weight"], heads["letters.weight"])


class _Stop(Exception):
    pass


@pytest.mark.parametrize("stop_at", [1, 4, 5, 11])
def test_resuming_equals_never_having_stopped(store_path, trained, tmp_path, monkeypatch, stop_at):
    """Stopped by force after a step, with the last checkpoint before it: same weights, same metrics, to the bit."""
    upkeep = replace(UPKEEP, checkpoint_minutes=0 if stop_at != 5 else 1e9)

    def bomb(done, total):
        if done == stop_at:
            raise _Stop

    with pytest.raises(_Stop):
        train(str(store_path), str(tmp_path / "run"), QUICK, MACHINE, upkeep, progress=bomb)
    train(str(store_path), str(tmp_path / "run"), QUICK, MACHINE, upkeep)
    for name in ("student.safetensors", "heads.safetensors", "metrics.jsonl", "config.json"):
        assert (tmp_path / "run" / name).read_bytes() == (trained / name).read_bytes(), name


def test_sums_that_arrive_late_make_the_same_rows(store_path, trained, tmp_path, monkeypatch):
    """As on a GPU, where a row is written some steps after it was taken: none lost at a stop, none twice."""
    monkeypatch.setattr(tally.Taken, "arrived", lambda taken: False)

    def stop(done, total):
        if done == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(str(store_path), str(tmp_path / "run"), QUICK, MACHINE, UPKEEP, progress=stop)
    train(str(store_path), str(tmp_path / "run"), QUICK, MACHINE, UPKEEP)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()


def test_a_run_says_where_it_comes_from(trained):
    lineage = json.loads((trained / "config.json").read_text())["lineage"]
    about = lineage["teachers"]["letters"]
    assert lineage["proxy"] == "store"
    assert (about["task"], about["split"], about["split_seed"]) == ("letters", "none", 0)
    assert about["architecture"].startswith("torchvision:")
    assert "general" not in lineage["teachers"]


def test_a_signal_saves_and_the_same_command_resumes(store_path, trained, tmp_path):
    def poke(done, total):
        if done == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="stopped by signal 15 at step 5 of 12"):
        train(str(store_path), str(tmp_path / "run"), QUICK, MACHINE, UPKEEP, progress=poke)
    assert newest(tmp_path / "run" / "checkpoints")["step"] == 5
    said: list[str] = []
    train(str(store_path), str(tmp_path / "run"), QUICK, MACHINE, UPKEEP, say=said.append)
    assert any("resuming" in line and "step 5 of 12" in line for line in said)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()


def test_cut_off_after_its_last_step(store_path, trained, tmp_path, monkeypatch):
    """All steps saved, and the run not ended: the same command ends it and gives the last row."""
    out, ends = str(tmp_path / "run"), training.Run.end

    def cut(*_):
        raise OSError("cut off")

    monkeypatch.setattr(training.Run, "end", cut)
    with pytest.raises(OSError, match="cut off"):
        train(str(store_path), out, QUICK, MACHINE, UPKEEP)
    monkeypatch.setattr(training.Run, "end", ends)
    row = train(str(store_path), out, QUICK, MACHINE, UPKEEP)
    assert row == json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert (tmp_path / "run/student.safetensors").read_bytes() == (trained / "student.safetensors").read_bytes()


def test_a_finished_run_is_left_alone_and_another_is_refused(store_path, trained):
    said: list[str] = []
    before = (trained / "student.safetensors").stat().st_mtime_ns
    assert train(str(store_path), str(trained), QUICK, MACHINE, UPKEEP, say=said.append)["step"] == 12
    assert "nothing to do" in said[0]
    assert (trained / "student.safetensors").stat().st_mtime_ns == before
    with pytest.raises(FastconError, match=r"holds another run: temperature was 2.0, this call says 3.0"):
        train(str(store_path), str(trained), replace(QUICK, temperature=3.0), MACHINE, UPKEEP)


def test_a_folder_with_other_files_is_refused(store_path, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FastconError, match="holds other files and no run"):
        train(str(store_path), str(tmp_path), QUICK, MACHINE, UPKEEP)


def test_traditional_trains_the_tasks_and_leaves_head_0(store_path, tmp_path, generalist_file):
    options = replace(QUICK, method="traditional", epochs=1)
    row = train(str(store_path), str(tmp_path / "run"), options, MACHINE, UPKEEP)
    assert list(row["heads"]) == ["letters"]
    original, exported = load_file(generalist_file), load_file(tmp_path / "run" / "student.safetensors")
    assert torch.equal(exported["fc.weight"], original["fc.weight"])
    assert not torch.equal(exported["conv5.0.weight"], original["conv5.0.weight"])
    model = load(tmp_path / "run")
    assert [head.name for head in model.heads] == ["letters", "general"]
    assert torch.equal(model.head_weights("general")["weight"], original["fc.weight"])


def test_soft_label_trains_head_0_alone(store_path, tmp_path):
    row = train(str(store_path), str(tmp_path / "run"), replace(QUICK, method="soft-label", epochs=1), MACHINE, UPKEEP)
    assert list(row["heads"]) == ["general"]
    assert row["loss"] == pytest.approx(row["heads"]["general"]["loss"])


def test_another_architecture_says_that_head_0_is_random(store_path, tmp_path):
    said: list[str] = []
    options = replace(QUICK, epochs=1, student="torchvision:mobilenet_v3_small@random")
    train(str(store_path), str(tmp_path / "run"), options, MACHINE, UPKEEP, say=said.append)
    assert any("head 0 starts at random" in line for line in said)
    theirs = zoo.mobilenet_v3_small(num_classes=10)
    theirs.load_state_dict(load_file(tmp_path / "run" / "student.safetensors"))
    assert load(tmp_path / "run").size == 32


def test_the_temperature(store_path, tmp_path):
    """A student that does not move: head 0's loss is the entropy of the stored logits at T, its KL zero."""
    options = replace(QUICK, epochs=1, batch_size=30, lr_backbone=0, lr_heads=0, temperature=0.7)
    row = train(str(store_path), str(tmp_path / "run"), options, MACHINE, UPKEEP)
    store = Store(store_path)
    z = np.concatenate([store.logits("general", 0, chunk) for chunk in range(store.chunks)]).astype(np.float64)
    log_p = torch.from_numpy(z / 0.7).log_softmax(1)
    entropies = -(log_p.exp() * log_p).sum(1)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][1:]
    seen = sum(row["images"] * row["heads"]["general"]["loss"] for row in rows) / sum(row["images"] for row in rows)
    assert seen == pytest.approx(entropies.mean().item(), rel=1e-3)
    assert row["heads"]["general"]["kl"] == pytest.approx(0, abs=1e-4)


def test_a_weight_of_its_own_for_a_head(store_path, tmp_path):
    options = replace(QUICK, epochs=1, weight=(("letters", 0.25),))
    row = train(str(store_path), str(tmp_path / "run"), options, MACHINE, UPKEEP)
    losses = {name: head["loss"] for name, head in row["heads"].items()}
    assert row["loss"] == pytest.approx(losses["general"] + 0.25 * losses["letters"], rel=1e-5)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["weight"] == [["letters", 0.25]]
    assert "weight letters=0.25, " in describe(str(tmp_path / "run"))[1]
    with pytest.raises(FastconError, match="weight was"):
        train(str(store_path), str(tmp_path / "run"), replace(options, weight=()), MACHINE, UPKEEP)


def test_balance_weighs_the_heads(store_path, tmp_path):
    row = train(str(store_path), str(tmp_path / "run"), replace(QUICK, epochs=1, balance=(1.0, 3.0)), MACHINE, UPKEEP)
    heads = row["heads"]
    assert row["loss"] == pytest.approx(0.5 * heads["general"]["loss"] + 1.5 * heads["letters"]["loss"], rel=1e-6)


def test_labels_add_a_supervised_head(tmp_path, labelled_folder, teachers, store_path):
    from fastcon.data.manifest import index

    precompute(str(tmp_path / "s"), index([labelled_folder]), teachers[:1], RECIPE, 1, MACHINE, BATCH)
    options = replace(QUICK, method="soft-label", labels=True, epochs=2, batch_size=20)
    row = train(str(tmp_path / "s"), str(tmp_path / "run"), options, MACHINE, UPKEEP)
    assert row["loss"] == pytest.approx(row["heads"]["general"]["loss"] + row["heads"]["labels"]["loss"], rel=1e-6)
    assert load(tmp_path / "run").heads[1].classes == tuple(f"shape-00{k}" for k in range(6))
    with pytest.raises(FastconError, match="`labels` needs a class for every proxy image"):
        train(str(store_path), str(tmp_path / "other"), replace(QUICK, labels=True), MACHINE, UPKEEP)


def test_without_a_generalist_a_student_is_needed(tmp_path, proxy, teachers):
    precompute(str(tmp_path / "s"), proxy, teachers[1:], RECIPE, 1, MACHINE, BATCH)
    options = replace(QUICK, method="traditional", epochs=1)
    with pytest.raises(FastconError, match="no generalist to start from: give a `student`"):
        train(str(tmp_path / "s"), str(tmp_path / "a"), options, MACHINE, UPKEEP)
    train(str(tmp_path / "s"), str(tmp_path / "b"), replace(options, student=f"{ARCHITECTURE}@random"), MACHINE)
    assert load(tmp_path / "b").heads[0].classes == ("a", "b", "c")


def test_a_loss_that_turns_nan_stops_and_keeps_the_last_checkpoint(store_path, tmp_path):
    options = replace(QUICK, lr_backbone=1e20, lr_heads=1e20)
    with pytest.raises(FastconError, match=r"the loss is nan at step 3 .*last good checkpoint"):
        train(str(store_path), str(tmp_path / "run"), options, MACHINE, UPKEEP)
    assert not (tmp_path / "run" / "student.safetensors").exists()
    [start] = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert start["step"] == 0


def test_a_batch_larger_than_the_store_is_refused(store_path, tmp_path):
    with pytest.raises(FastconError, match="a batch of 151 needs as many images, the store has 150"):
        train(str(store_path), str(tmp_path / "run"), replace(QUICK, batch_size=151, lanes=1), MACHINE, UPKEEP)


def test_rates_fall_at_the_milestones():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    optimizer.param_groups[0]["base"] = 2.0
    seen = []
    for progress in (0, 0.49, 0.5, 0.79, 0.8, 1):
        training.set_rate(optimizer, progress, (0.5, 0.8))
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen == pytest.approx([2, 2, 0.2, 0.2, 0.02, 0.02])


def test_the_run_survives_a_moved_store(store_path, tmp_path, trained):
    moved = shutil.copytree(store_path, tmp_path / "moved")
    assert train(str(moved), str(trained), QUICK, MACHINE, UPKEEP)["step"] == 12


def test_the_seed_sets_new_heads(store_path, tmp_path, trained):
    train(str(store_path), str(tmp_path / "run"), replace(QUICK, seed=1, epochs=1), MACHINE, UPKEEP)
    a, b = (load_file(run / "heads.safetensors")["letters.weight"].numpy() for run in (trained, tmp_path / "run"))
    assert not np.allclose(a, b)


def _statistics(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state.items() if "running_" in key}


def test_running_statistics_stay_bit_for_bit_and_affine_parameters_are_trained(trained, store_path):
    store = Store(store_path)
    before = from_bytes(store.weights("general"), "x").net.state_dict()
    after = load_file(trained / "student.safetensors")
    kept = _statistics(after)
    assert kept
    assert all(torch.equal(value, before[key]) for key, value in kept.items())
    moved = [key for key, value in after.items() if key not in kept and not torch.equal(value, before.get(key, value))]
    assert any(key.startswith("conv1.1.") for key in moved)  # a batch-norm's weight and bias


def test_batch_statistics_move_when_asked_for(store_path, tmp_path):
    train(str(store_path), str(tmp_path), replace(QUICK, epochs=1, batch_norm="batch"), MACHINE, UPKEEP)
    before = from_bytes(Store(store_path).weights("general"), "x").net.state_dict()
    after = _statistics(load_file(tmp_path / "student.safetensors"))
    assert all(not torch.equal(value, before[key]) for key, value in after.items())


def test_the_start_is_the_generalist_and_says_so(trained, capsys):
    start = json.loads((trained / "metrics.jsonl").read_text().splitlines()[0])
    assert start["step"] == 0
    assert start["images"] == 128  # of 150 in batches of 32
    assert start["heads"]["general"]["agreement"] == 1
    assert abs(start["heads"]["general"]["kl"]) < 1e-6

    assert "the student agrees with general on 100.0% of 128 images" in describe(str(trained))[1]


def _warnings(store: Path, out: Path, options: TrainOptions) -> list[str]:
    said: list[str] = []
    train(str(store), str(out), options, MACHINE, UPKEEP, say=said.append)
    return [line for line in said if "does not start as its generalist" in line]


def test_a_right_start_warns_of_nothing(store_path, tmp_path):
    assert not _warnings(store_path, tmp_path, replace(QUICK, epochs=1))


def test_a_start_on_batch_statistics_warns_and_names_the_flag(store_path, tmp_path):
    [line] = _warnings(store_path, tmp_path, replace(QUICK, epochs=1, batch_norm="batch", batch_size=2))
    assert "try `batch_norm` running" in line


def test_a_wrong_normalisation_warns(store_path, generalist_file, tmp_path):
    student = f"{generalist_file}?mean=0.1,0.1,0.1&std=0.9,0.9,0.9"
    [line] = _warnings(store_path, tmp_path, replace(QUICK, epochs=1, student=student))
    assert "mean or std" in line
    assert "batch_norm" not in line


def test_the_check_changes_nothing_of_the_student(store_path, tmp_path):
    """Statistics of the batches that were compared would otherwise be in the student of batch mode."""
    options = replace(QUICK, epochs=1, batch_norm="batch")
    train(str(store_path), str(tmp_path / "checked"), options, MACHINE, UPKEEP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.students, "starts_as_generalist", lambda *_: False)
        train(str(store_path), str(tmp_path / "unchecked"), options, MACHINE, UPKEEP)
    students = [(tmp_path / name / "student.safetensors").read_bytes() for name in ("checked", "unchecked")]
    assert students[0] == students[1]


def test_lite0_in_batch_mode_warns_and_on_running_statistics_does_not(shared_data, tmp_path):
    """A real generalist at 96 px, where batch statistics make it another network."""
    pytest.importorskip("timm")
    spec = f"timm:tf_efficientnet_lite0@{shared_data}/efficientnet-lite0-imagenet.safetensors"
    spec += "?size=96&mean=0.5,0.5,0.5&std=0.5,0.5,0.5"
    photos = index([str(shared_data / "photos.tar")])
    store = tmp_path / "store"
    teacher = Teacher("imagenet", spec, load(spec), generalist=True)
    precompute(str(store), photos, [teacher], Recipe(seed=0, size=96), 1, MACHINE, 32)
    options = replace(QUICK, method="soft-label", epochs=1, batch_size=20)
    assert not _warnings(store, tmp_path / "running", options)
    [line] = _warnings(store, tmp_path / "batch", replace(options, batch_norm="batch"))
    assert "try `batch_norm` running" in line


def _stop_at(step: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return progress


def test_threads_are_recorded_and_kept_when_it_goes_on(store_path, tmp_path, monkeypatch):
    options = replace(QUICK, epochs=1)
    with pytest.raises(Interrupted):
        train(str(store_path), str(tmp_path), options, replace(MACHINE, threads=1), UPKEEP, progress=_stop_at(2))
    assert json.loads((tmp_path / "config.json").read_text())["threads"] == 1
    used: list[int] = []
    monkeypatch.setattr(
        machine, "Cores", lambda threads, *more, **rest: used.append(threads) or Cores(threads, *more, **rest)
    )
    train(str(store_path), str(tmp_path), options, MACHINE, UPKEEP)
    assert used == [1]


def stop_at(step: int) -> Callable[[int, int], None]:
    return lambda done, total: os.kill(os.getpid(), signal.SIGTERM) if done == step else None


def test_the_modern_recipe(store_path, tmp_path, monkeypatch):
    """Its defaults, what may be chosen instead, and that it resumes to the same student."""
    chosen = TrainOptions(recipe="modern")
    assert (chosen.batch_size, chosen.lr_backbone, chosen.weight_decay, chosen.scale_lr) == (256, 5e-4, 0.05, True)
    half = TrainOptions(recipe="modern", batch_size=128, lr_heads=0.01).optimisation
    assert (half.lr_backbone, half.lr_heads) == (pytest.approx(2.5e-4), pytest.approx(0.005))
    assert TrainOptions(recipe="modern", batch_size=128, scale_lr=False).optimisation.lr_backbone == 5e-4
    paper = TrainOptions(batch_size=64)
    assert (paper.lr_backbone, paper.optimisation.lr_backbone, paper.optimisation.ema) == (0.001, 0.001, None)
    assert TrainOptions(batch_size=64, scale_lr=True, warm_up=0.1).optimisation.lr_backbone == pytest.approx(0.002)

    options = TrainOptions(recipe="modern", epochs=2, batch_size=50)
    with pytest.raises(Interrupted):
        train(str(store_path), str(tmp_path / "cut"), options, MACHINE, progress=stop_at(3))
    for run in ("cut", "whole"):
        train(str(store_path), str(tmp_path / run), options, MACHINE)
    one, other = ((tmp_path / run / "student.safetensors").read_bytes() for run in ("cut", "whole"))
    assert one == other
    monkeypatch.setitem(RECIPES, "modern", replace(RECIPES["modern"], ema=None))
    train(str(store_path), str(tmp_path / "last"), options, MACHINE)
    assert (tmp_path / "last" / "student.safetensors").read_bytes() != one  # the last weights, not their mean
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert (config["recipe"], config["milestones"], config["lr_backbone"]) == ("modern", [], 5e-4)
    rates = [
        json.loads(line).get("lr_heads") for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    ]
    assert rates[-1] < rates[1] < 1e-3 * 50 / 256


def test_runs_of_before_there_were_recipes_go_on(store_path, tmp_path):
    """What they wrote down is what the paper's recipe is recorded as now."""
    options = TrainOptions(epochs=1, batch_size=50)
    with pytest.raises(Interrupted):
        train(str(store_path), str(tmp_path / "run"), options, MACHINE, progress=stop_at(1))
    file = tmp_path / "run" / "config.json"
    config = json.loads(file.read_text())
    before = origin(str(tmp_path / "run"))
    assert {key: config.pop(key) for key in ("recipe", "scale_lr", "warm_up", "sync_bn")} == dict.fromkeys(
        ("recipe", "scale_lr", "warm_up", "sync_bn")
    )
    file.write_text(json.dumps(config))
    assert origin(str(tmp_path / "run")) == before  # also for what repeats what
    train(str(store_path), str(tmp_path / "run"), options, MACHINE)

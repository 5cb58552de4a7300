"""Studies: the right commands in the right order, refusals, resuming, and small twins that run from end to end."""

from __future__ import annotations

import collections
import functools
import json
import os
import signal
import subprocess
import sys
import time
import tomllib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcon import study
from fastcon.cli.main import main
from fastcon.data import rendered
from fastcon.errors import FastconError
from fastcon.report.results import read
from fastcon.study import plan

COUNTS = {
    "paper": {"teach": 30, "precompute": 3, "train": 42, "evaluate": 6, "probe": 73, "finetune": 172, "report": 1},
    "table2": {"teach": 2, "precompute": 1, "train": 4, "evaluate": 6, "probe": 9, "report": 1},
    "table4": {"teach": 10, "precompute": 1, "train": 21, "probe": 40, "report": 1},
    "fig3a": {"teach": 20, "precompute": 1, "train": 12, "probe": 20, "report": 1},
    "fig3b": {"teach": 3, "precompute": 2, "train": 4, "probe": 20, "report": 1},
    "fig5a": {"teach": 1, "precompute": 1, "train": 3, "probe": 15, "report": 1},
    "fig5b": {"teach": 1, "precompute": 2, "train": 4, "probe": 15, "report": 1},
    "table5": {"teach": 4, "precompute": 1, "train": 11, "finetune": 60, "report": 1},
    "table6": {"teach": 5, "precompute": 1, "train": 13, "finetune": 112, "report": 1},
}
"""Of the paper: e.g. Table 6 is 7 tasks x (generalist, soft-label, 6 teachers x 2 methods, 2 teachers themselves)."""
MODELS = {"fig3a": 2, "paper": 2}
"""Models that a twin trains first, where the full study takes torchvision's weights."""


def counts(planned):
    return dict(collections.Counter(job.command[0] for job in planned.jobs))


@pytest.mark.parametrize("name", COUNTS)
def test_the_right_commands_for_each_experiment(name):
    full = study.load(name, data="/data")
    assert counts(full) == COUNTS[name]
    small = study.load(name, ["small"])
    assert counts(small) == COUNTS[name] | {"teach": COUNTS[name]["teach"] + MODELS.get(name, 1)}
    for planned in (full, small):
        done = set()
        for job in planned.jobs:
            assert set(job.needs) <= done
            done.add(job.name)
            main.commands[job.command[0]].make_context(job.command[0], list(job.command[1:]))  # parses
        assert not any("DATA" in word for job in planned.jobs for word in job.command)
    commands = [" ".join(job.command) for job in full.jobs]
    assert len(set(commands)) == len(commands)
    assert all("torchvision:resnet50@IMAGENET1K_V1" in c for c in commands if c.startswith("precompute"))
    assert all("--precision bfloat16" in c for c in commands if not c.startswith("report"))


def test_every_study_is_counted():
    assert set(study.shipped()) == set(COUNTS)
    assert all(study.shipped().values())


def options(command, key):
    return [command[k + 1] for k, word in enumerate(command) if word == key]


def jobs(name, *overlays):
    return {job.name: job for job in study.load(name, overlays, "/data").jobs}


def test_protocols_of_the_paper():
    """Splits, tasks, methods and weights, spelled out for a few commands."""
    found = jobs("fig3a")
    teacher = found["teach-ifood-2of5-resnet18"].command
    assert options(teacher, "--split") == ["t2/5"]
    assert options(teacher, "--init") == ["torchvision:resnet18@IMAGENET1K_V1"]
    assert options(teacher, "--train") == ["data:ifood?root=/data/ifood&part=train"]
    assert options(teacher, "--test") == ["data:ifood?root=/data/ifood&part=val"]
    five = found["train-consolidate-ifood-x5-resnet18"].command
    assert options(five, "--heads") == [",".join(f"ifood-{k}of5-resnet18" for k in range(1, 6))]
    assert len(options(found["precompute-imagenet"].command, "--teacher")) == 20
    probe = found["probe-cars196-tenths"].command
    assert options(probe, "--split") == ["d"]
    assert {word for word in probe if word.startswith("runs/")} == {
        *(f"runs/{name.removeprefix('teach-')}" for name in found if name.startswith("teach-")),
        *(f"runs/{name.removeprefix('train-')}" for name in found if name.startswith("train-")),
    }
    assert options(found["report-fig3a"].command, "--best")[1] == (
        "cars196-best-resnet50=" + ",".join(f"cars196-{k}of5-resnet50" for k in range(1, 6))
    )
    mixed = jobs("fig3b")
    assert [word.split("?")[0] for word in mixed["precompute-mixed"].command[1:5]] == [
        "data:places365", "data:inaturalist", "data:logo2k", "data:imagenet",
    ]  # fmt: skip
    assert options(mixed["train-consolidate-x3-mixed"].command, "--epochs") == ["10"]
    assert options(mixed["train-consolidate-x3"].command, "--epochs") == ["40"]
    assert [options(j.command, "--balance") for n, j in jobs("fig5a").items() if n.startswith("train")] == [
        [], ["1:3"], ["3:1"],
    ]  # fmt: skip
    labels = [n for n, j in jobs("fig5b").items() if "--labels" in j.command]
    assert labels == ["train-consolidate-cars196-places365-labels"]
    table5 = jobs("table5")
    assert options(table5["finetune-ifashion-sleeve-1000-images-resnet50"].command, "--shots") == ["1000"]
    assert options(table5["finetune-food101-5-shot-soft-label"].command, "--shots") == ["5"]
    assert options(table5["teach-ifashion-category"].command, "--split") == ["none"]
    table6 = jobs("table6")
    assert "--shots" not in table6["finetune-flowers-none-all-images-resnet50"].command
    assert "--trials" not in jobs("table6", "small")["finetune-flowers-none-all-images-resnet50"].command
    assert options(table6["finetune-flowers-none-all-images-resnet50"].command, "--split") == ["none"]
    assert options(table6["finetune-aircraft-all-images-resnet50"].command, "--split") == ["d"]
    evaluated = jobs("table2")["evaluate-consolidate-ifood-ifood"].command
    assert options(evaluated, "--head") == ["ifood"]
    assert options(evaluated, "--split") == ["t"]
    related = options(jobs("table4")["report-table4"].command, "--related")
    assert {"ifood=food101", "inaturalist=cub", "ifashion-category=ifashion-sleeve"} <= set(related)


TINY = """
title = "two commands"
generalist = "small"
[models.small]
model = "torchvision:shufflenet_v2_x0_5@random?size=32"
[data.shapes]
train = "rendered:shapes?classes=0-7&images=12"
holdout = 0.5
[options]
probe = { trials = 2, c-grid = "0.1" }
[[evaluations]]
command = "probe"
on = "shapes:d"
of = "generalist"
"""


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    return tmp_path / "tiny.toml"


def run(file, out, *arguments):
    said: list[str] = []
    facts = study.run(study.load(str(file)), str(out), arguments, said.append)
    return facts, said


def test_running_resuming_and_changing(tiny, tmp_path):
    out = tmp_path / "out"
    facts, said = run(tiny, out)
    assert facts["ran"] == 2
    assert said[0] == "0 of 2 commands are done"
    assert said[1].startswith("[1/2] probe-shapes: torchvision:shufflenet_v2_x0_5@random?size=32: ")
    assert (out / "report" / "index.html").stat().st_size > 1000
    probe = json.loads((out / "jobs" / "probe-shapes.json").read_text())
    assert (probe["task"], probe["classes"], probe["trials"]) == ("shapes", 4, 2)
    stamp = os.stat(out / "jobs" / "probe-shapes.json").st_mtime_ns
    assert run(tiny, out)[0]["ran"] == 0
    (out / "jobs" / "report.json").unlink()
    assert run(tiny, out)[0]["ran"] == 1
    assert os.stat(out / "jobs" / "probe-shapes.json").st_mtime_ns == stamp
    tiny.write_text(TINY.replace("trials = 2", "trials = 3"))
    assert run(tiny, out)[0]["ran"] == 2  # the probe, and the report that is made from it
    assert json.loads((out / "jobs" / "probe-shapes.json").read_text())["trials"] == 3
    made = [os.stat(out / "jobs" / f"{name}.json").st_mtime_ns for name in ("probe-shapes", "report")]
    assert stamp < made[0] < made[1]
    other = tmp_path / "other.toml"
    other.write_text(TINY)
    with pytest.raises(FastconError, match="holds the study 'tiny', this is 'other': give another --out"):
        run(other, out)
    foreign = probe | {"argv": ["probe", "elsewhere"]}
    (out / "jobs" / "probe-shapes.json").write_text(json.dumps(foreign))
    with pytest.raises(FastconError, match=r"probe-shapes\.json was not made by this study's command"):
        run(tiny, out)
    (out / "jobs" / "probe-shapes.json").write_text("[]")
    with pytest.raises(FastconError, match="was not made by this study's command"):
        run(tiny, out)


FULL = """
title = "a student"
generalist = "small"
[models.small]
model = "torchvision:shufflenet_v2_x0_5@random?size=32"
[data.shapes]
train = "rendered:shapes?classes=0-7&images=12"
holdout = 0.5
[data.proxy]
train = "rendered:mixed?images=64"
[options]
every = { threads = 1 }
precompute = { views = 1, size = 32 }
teach = { epochs = 1, lr-grid = "0.01" }
train = { epochs = 1 }
finetune = { epochs = 1, lr-grid = "0.01" }
[[teachers]]
data = "shapes"
[[students]]
teachers = ["shapes"]
method = "consolidate"
proxy = "proxy"
[[evaluations]]
command = "finetune"
on = "shapes:d"
of = "students"
"""


def stamps(out):
    return {file.stem: os.stat(file).st_mtime_ns for file in (out / "jobs").glob("*.json")}


def test_what_a_change_makes_outdated_is_run_anew(tmp_path):
    """Options of a run in the middle: it and what follows; its former self is put aside. Further views: the store grows."""
    file, out = tmp_path / "full.toml", tmp_path / "out"
    file.write_text(FULL)
    assert run(file, out)[0]["ran"] == 5
    before = stamps(out)
    file.write_text(FULL.replace("train = { epochs = 1 }", "train = { epochs = 2 }"))
    assert run(file, out)[0]["ran"] == 3  # train, finetune, report
    after = stamps(out)
    assert {name for name in after if after[name] == before[name]} == {"teach-shapes", "precompute-proxy"}
    assert json.loads((out / "runs/consolidate-shapes/config.json").read_text())["epochs"] == 2
    assert json.loads((out / "runs/consolidate-shapes.old/config.json").read_text())["epochs"] == 1
    weights = json.loads((out / "runs/finetune-shapes-consolidate-shapes/config.json").read_text())["init_weights"]
    former = json.loads((out / "runs/finetune-shapes-consolidate-shapes.old/config.json").read_text())["init_weights"]
    assert weights != former
    file.write_text(FULL.replace("views = 1", "views = 2").replace("train = { epochs = 1 }", "train = { epochs = 2 }"))
    assert run(file, out)[0]["ran"] == 4  # all but the teacher
    assert json.loads((out / "jobs/precompute-proxy.json").read_text())["rows_computed"] == 64  # the second view alone
    assert not (out / "stores" / "proxy.old").exists()
    (out / "jobs.json").unlink()  # a lost plan: the results stay
    assert run(file, out)[0]["ran"] == 0
    for damage in ("[]", "{", '{"study": 3}'):
        (out / "jobs.json").write_text(damage)
        with pytest.raises(FastconError, match=r"is damaged .* remove it, the results stay"):
            run(file, out)


def test_braces_spaces_and_dollars_reach_the_commands_as_they_are(tmp_path):
    root = tmp_path / "a $(touch PWNED) {b} +"
    for k in range(8):
        for half in "xy":
            rendered.write_classes(root / half, "shapes", range(k, k + 1), 6)
    text = TINY.replace('"rendered:shapes?classes=0-7&images=12"', f"'{root}/{{x,y}}'")
    (tmp_path / "odd.toml").write_text(text.replace("{b}", "b"))
    (root.rename(tmp_path / "a $(touch PWNED) b +"))
    facts, _ = run(tmp_path / "odd.toml", tmp_path / "out")
    assert facts["ran"] == 2
    assert json.loads((tmp_path / "out/jobs/probe-shapes.json").read_text())["train_images"] == 24
    assert not list(tmp_path.rglob("PWNED"))


def test_places_are_absolute_before_commands_run_elsewhere(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.safetensors").touch()
    text = TINY.replace(
        '"rendered:shapes?classes=0-7&images=12"', "['torchvision:ImageFolder?root=my images', 'data:cub?root=b+c']"
    )
    tiny.write_text(text.replace("shufflenet_v2_x0_5@random?size=32", "shufflenet_v2_x0_5@w.safetensors?size=32"))
    [probe, _] = study.load(str(tiny)).jobs
    assert options(probe.command, "--train") == [
        f"torchvision:ImageFolder?root={tmp_path}/my%20images", f"data:cub?root={tmp_path}/b%2Bc",
    ]  # fmt: skip
    assert probe.command[1] == f"torchvision:shufflenet_v2_x0_5@{tmp_path}/w.safetensors?size=32"
    cars = study.load("fig5a", data=str(tmp_path / "x+y & z")).jobs[0].command
    assert options(cars, "--train") == [f"data:cars196?root={tmp_path}/x%2By%20%26%20z/cars196&part=train"]


def test_several_splits_and_evaluations_of_one_task(tiny):
    """Tasks of several splits are told apart in reports, evaluations of one task by a name of their own."""
    more = '[[evaluations]]\ncommand = "probe"\non = ["shapes:d", "shapes"]\nof = "generalist"\nname = "1-shot"\noptions = { shots = 1 }\n'
    tiny.write_text(TINY + more)
    found = {job.name: job.command for job in study.load(str(tiny)).jobs}
    assert list(found) == ["probe-shapes-d", "probe-shapes-d-1-shot", "probe-shapes-none-1-shot", "report"]
    assert [options(found[name], "--task") for name in list(found)[:3]] == [["shapes:d"], ["shapes:d"], ["shapes:none"]]


def test_the_command_that_fails_is_named_in_one_line(tiny, tmp_path):
    tiny.write_text(TINY.replace("classes=0-7", "classes=0-1"))
    with pytest.raises(
        FastconError, match=r"^probe-shapes failed: --split d halves the classes and needs at least 4"
    ) as e:
        run(tiny, tmp_path / "out")
    assert "\n" not in str(e.value)


def test_a_folder_with_other_files_is_left_alone(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FastconError, match="holds other files and no study"):
        run(tiny, tmp_path / "out")


def test_a_signal_stops_the_commands_and_the_same_command_resumes(tiny, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fastcon", "study", str(tiny), "--out", str(out)]
    hears = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hears)
    while not (out / "jobs" / "probe-shapes.log").exists():
        assert process.poll() is None
        time.sleep(0.05)
    with pytest.raises(FastconError, match="is being run by another"):
        run(tiny, out)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 75
    assert "run the same command to resume" in process.communicate()[1]
    assert not (out / "jobs" / "report.json").exists()
    assert run(tiny, out)[0]["ran"] >= 1


BAD = {
    "no test part": ("holdout = 0.5", "", "\\[data.shapes\\] needs train, and either test or holdout"),
    "two test parts": ("holdout = 0.5", 'holdout = 0.5\ntest = "x"', "needs train, and either test or holdout"),
    "name": ('on = "shapes:d"', 'on = "shapes:d"\nname = "a b"', "the name 'a b' is not letters"),
    "kind of value": ('on = "shapes:d"', "on = 3", "a value is of another kind than it should be"),
    "circle": ('train = "rendered:shapes?classes=0-7&images=12"', 'union = ["shapes"]', "a value is of another kind"),
    "no teachers": (
        "[data.shapes]",
        '[[students]]\nmethod = "consolidate"\nproxy = "shapes"\n[data.shapes]',
        "a student by consolidate has no teachers",
    ),
    "data": ('on = "shapes:d"', 'on = "shape:d"', "unknown data set 'shape': describe it in \\[data.shape\\]"),
    "split": ('on = "shapes:d"', 'on = "shapes:q"', "split 'q' is neither none, t, d"),
    "key": ('on = "shapes:d"', 'tasks = "shapes:d"', "\\[\\[evaluations\\]\\] has no key 'tasks'"),
    "command": ('command = "probe"', 'command = "prob"', "has the command 'prob': one of probe, finetune, evaluate"),
    "of": ('of = "generalist"', 'of = "general"', "is of 'general': there are generalist, teachers, students"),
    "generalist": ('generalist = "small"', 'generalist = "large"', "generalist names the model 'large'"),
    "model": ('model = "torchvision', 'modell = "torchvision', "\\[models.small\\] has no key 'modell'"),
    "toml": ("[models.small]", "[models.small", "is no study"),
    "list": ("[[evaluations]]", "[evaluations]", "evaluations of a study is a list of tables"),
    "teacher": ("[options]", "students = [{teachers=['x']}]\n[options]", "has no key 'students'"),
    "method": (
        "[data.shapes]",
        '[[students]]\nmethod = "best"\nproxy = "shapes"\n[data.shapes]',
        "method 'best' is none of",
    ),
    "unknown teacher": (
        "[data.shapes]",
        '[[students]]\nteachers = ["x"]\nmethod = "consolidate"\nproxy = "shapes"\n[data.shapes]',
        "names the teacher 'x'; there are none",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_study_is_said(tiny, case):
    old, new, message = BAD[case]
    assert old in TINY
    tiny.write_text(TINY.replace(old, new))
    with pytest.raises(FastconError, match=message) as error:
        study.load(str(tiny))
    assert "\n" not in str(error.value)


def test_a_study_that_is_not_there():
    with pytest.raises(FastconError, match="no study 'tabel4': a TOML file, or one of paper, table2, table4"):
        study.load("tabel4")


def test_what_a_study_costs(tiny):
    """Features of all 96 images are computed once, whatever the split."""
    facts, text = study.describe(study.load(str(tiny)), torch.device("cpu"), lambda line: None)
    assert facts["counts"] == {"probe": 1, "report": 1}
    assert (facts["images_forward"], facts["images_trained"], facts["unknown"]) == (96, 0, [])
    assert "report  <-  probe-shapes" in text
    tiny.write_text(TINY.replace('train = "rendered:shapes?classes=0-7&images=12"', 'train = "/nowhere"'))
    assert study.describe(study.load(str(tiny)), torch.device("cpu"), lambda line: None)[0]["unknown"] == [
        "shapes whole",
        "shapes:d test",
        "shapes:d train",
    ]


def test_the_cost_of_training_by_hand(tmp_path):
    file = tmp_path / "train.toml"
    file.write_text(
        TINY.replace("[data.shapes]", "[data.proxy]\ntrain = 'rendered:mixed?images=100'\n[data.shapes]").replace(
            "[options]",
            '[options]\nteach = { epochs = 10, lr-grid = "0.1,0.2" }\nprecompute = { views = 3 }\ntrain = { epochs = 7 }',
        )
        + '[[teachers]]\ndata = "shapes"\n[[students]]\nteachers = ["shapes"]\nmethod = "consolidate"\nproxy = "proxy"\n'
    )
    facts, text = study.describe(study.load(str(file)), torch.device("cpu"), lambda line: None, (100, 10))
    seconds = {job["name"]: job["seconds"] for job in facts["jobs"]}
    assert sum(seconds.values()) == pytest.approx(facts["seconds"])
    assert seconds["report"] == 0 < seconds["probe-shapes"]
    longest = max(seconds, key=seconds.get)
    assert f"{seconds[longest] / facts['seconds']:4.0%}" in next(
        line for line in text.splitlines() if line.endswith(f"  {longest}")
    )
    assert facts["images_forward"] == 96 + 2 * 3 * 100
    assert facts["images_trained"] == 24 * 10 * (1 + 2 * 0.9) + 7 * 100
    assert facts["seconds_at_rate"] == pytest.approx(facts["images_forward"] / 100 + facts["images_trained"] / 10)
    assert facts["stores_bytes"] == 3 * 100 * (21 + 2 * 1000 + 2 * 4)  # the generalist's classes, and half of eight
    assert facts["runs_bytes"] == 2 * next(job["runs_bytes"] for job in facts["jobs"] if job["name"] == "teach-shapes")
    assert facts["runs_bytes"] > 2 * 4 * 1_300_000  # a ShuffleNet's parameters
    assert facts["features_bytes"] == 96 * 4 * 1024
    assert "disk: stores 0.0 GB, runs 0.0 GB, features 0.0 GB" in text


def test_images_that_few_shot_probes_do_not_look_at_are_not_counted():
    """Of iFashion's million images 50 draws of 1,000, and the test part; of Food-101 all."""
    planned = study.load("fig5a", data="/data")
    looked_at = {job.name: job.forward[0][1] for job in planned.jobs if job.command[0] == "probe"}
    assert looked_at["probe-ifashion-sleeve-balance"] == "ifashion-sleeve:none drawn"
    assert planned.images["ifashion-sleeve:none drawn"] == ([], 50 * 1000 + 9897)
    assert looked_at["probe-food101-balance"] == "food101 whole"


def twin(out, name):
    """A twin of a study, two commands at a time; returns how many ran."""
    said: list[str] = []
    planned = study.load(name, ["small"])
    facts = study.run(planned, str(out), ["--config", "threads=1"], said.append)
    assert study.run(planned, str(out), [], said.append)["ran"] == 0
    return facts["ran"]


def compared(out, name):
    """What the report of a study says of its first reference."""
    return json.loads((out / "jobs" / f"{name}.json").read_text())["compared"][0]


def test_the_twin_of_figure_5a(tmp_path):
    out = tmp_path / "out"
    assert twin(out, "fig5a") == sum(COUNTS["fig5a"].values()) + 1
    probe = json.loads((out / "jobs" / "probe-ifashion-sleeve-balance.json").read_text())
    assert (probe["multi_label"], probe["shots"], probe["classes"]) == (True, 1000, 4)
    weights = [
        json.loads((out / f"runs/consolidate-cars196-{b}/config.json").read_text())["balance"] for b in ("1to3", "3to1")
    ]
    assert weights == [[1, 3], [3, 1]]
    name, balance = "Cars196 (t-split) repr. consolid.", compared(out, "report-fig5a")
    ours = {cell["published"]: cell["ours"] for cell in balance["cells"]}
    assert ours == {
        "ImageNet-pretrained model": "resnet50",
        name: "consolidate-cars196",
        f"{name} (ImageNet proxy)": "consolidate-cars196",
        f"{name} old:new = 1:1": "consolidate-cars196",
        f"{name} old:new = 1:3": "consolidate-cars196-1to3",
        f"{name} old:new = 3:1": "consolidate-cars196-3to1",
    }
    assert balance["compared"] == 30  # each on five tasks


@pytest.mark.slow
def test_figure_5b_shares_what_figure_5a_made(tmp_path):
    """In one folder: 5b finds a teacher, a store, a student and ten probes there."""
    out = tmp_path / "out"
    twin(out, "fig5a")
    assert twin(out, "fig5b") == COUNTS["fig5b"]["train"] - 1 + COUNTS["fig5b"]["probe"] - 10 + 1 + 1
    labels = out / "runs" / "consolidate-cars196-places365-labels" / "metrics.jsonl"
    assert "labels" in json.loads(labels.read_text().splitlines()[-1])["heads"]
    assert sorted(os.listdir(out / "stores")) == ["imagenet", "places365"]
    proxies = {cell["published"]: cell["ours"] for cell in compared(out, "report-fig5b")["cells"]}
    assert (
        proxies["Cars196 (t-split) repr. consolid. (Places365 proxy w/ label)"]
        == "consolidate-cars196-places365-labels"
    )
    assert proxies["Cars196 (t-split) trad. distill (Places365 proxy)"] == "traditional-cars196-places365"


@pytest.mark.slow
def test_the_twin_of_the_paper(tmp_path):
    """All of it, beside every accuracy that the paper printed; then its parts, of which only the reports are left to make."""
    out = tmp_path / "out"
    assert twin(out, "paper") == sum(COUNTS["paper"].values()) + 2
    assert (out / "report" / "index.html").stat().st_size > 10_000
    found = json.loads((out / "jobs" / "report.json").read_text())["compared"]
    assert [(c["reference"], c["published"], c["compared"]) for c in found] == [
        ("table2", 21, 21), ("table2", 6, 6), ("table4", 495, 495), ("table5", 60, 60), ("table6", 112, 112),
    ]  # fmt: skip
    for name in set(COUNTS) - {"paper"}:
        assert twin(out, name) == 1
        assert (out / f"report-{name}" / "index.html").stat().st_size > 10_000


def places(value, here=()):
    """Every place in a study as TOML gives it: keys and list positions from the top."""
    yield here
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*here, key))


ANYTHING = st.recursive(
    st.one_of(st.booleans(), st.integers(-3, 50), st.floats(allow_nan=True), st.text(max_size=8), st.just("shapes:d")),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), name=st.sampled_from(["paper", "full"]), value=ANYTHING)
def test_any_study_is_planned_or_refused_in_one_line(data, name, value):
    """One value of a good study replaced by anything, or left out."""
    found = tomllib.loads(FULL) if name == "full" else tomllib.loads((plan.PAPER / f"{name}.toml").read_text())
    where = data.draw(st.sampled_from([place for place in places(found) if place]))
    inside = found
    for key in where[:-1]:
        inside = inside[key]
    if data.draw(st.booleans()):
        inside[where[-1]] = value
    else:
        del inside[where[-1]]
    refusal = ""
    try:
        assert plan.planned("study", found).jobs[-1].name == "report"
    except FastconError as error:
        refusal = str(error)
    assert "\n" not in refusal.replace(str(value), "")


def test_a_name_that_cannot_be_printed_is_quoted():
    found = tomllib.loads(FULL)
    found["models"]["a\nb"] = "shapes:d"
    with pytest.raises(FastconError, match=r"^'a\\nb' of a study is a table, not 'shapes:d'$"):
        plan.planned("study", found)


def test_what_a_finished_command_is_reported_by(tmp_path):
    """Its result, not a note that came after it; of a failure the very last line, which is the error."""
    from fastcon.study.engine import _last_line

    log = tmp_path / "x.log"
    log.write_text("fastcon: 12 classes\nruns/x: 97.00% of 600 test images\nfastcon: to be faster: --threads 2\n\n")
    assert _last_line(log, besides="fastcon: ") == "runs/x: 97.00% of 600 test images"
    assert _last_line(log) == "fastcon: to be faster: --threads 2"
    log.write_text("fastcon: only notes\n")
    assert _last_line(log, besides="fastcon: ") == "fastcon: only notes"
    assert _last_line(tmp_path / "none.log") == "it said nothing"


def test_two_teachers_of_one_name_are_refused(tiny):
    tiny.write_text(TINY + '[[teachers]]\ndata = ["shapes", "cars196"]\nname = "same"\n')
    with pytest.raises(FastconError, match="two teachers are called 'same': name them apart"):
        study.load(str(tiny), data="/data")


@pytest.mark.slow
def test_a_teacher_that_joins_leaves_the_store_and_the_students_of_others_as_they_are(tmp_path):
    file, out = tmp_path / "full.toml", tmp_path / "out"
    file.write_text(FULL)
    run(file, out)
    student = (out / "runs/consolidate-shapes/student.safetensors").read_bytes()
    more = '[data.more]\ntrain = "rendered:shapes?classes=20-27&images=12"\nholdout = 0.5\n[options]'
    text = FULL.replace("[options]", more).replace('data = "shapes"', 'data = ["shapes", "more"]')
    file.write_text(text.replace('teachers = ["shapes"]', 'teachers = [["shapes"], ["more"]]'))
    run(file, out)
    assert json.loads((out / "jobs/precompute-proxy.json").read_text())["rows_computed"] == 64  # of the new teacher
    assert not (out / "stores/proxy.old").exists()
    assert not (out / "runs/consolidate-shapes.old").exists()
    assert (out / "runs/consolidate-shapes/student.safetensors").read_bytes() == student
    assert (out / "runs/consolidate-more/student.safetensors").exists()


PARTS = (
    FULL.replace(
        "[options]", '[data.more]\ntrain = "rendered:shapes?classes=20-27&images=12"\nholdout = 0.5\n[options]'
    )
    .replace('data = "shapes"', 'data = ["shapes", "more"]')
    .replace('teachers = ["shapes"]', 'teachers = [["shapes"], ["more"]]')
    .replace("[[evaluations]]", '[parts.one]\ntitle = "first"\n[parts.two]\n[[evaluations]]\nparts = "one"')
    .replace('of = "students"', 'of = "*-shapes"')
    + """
[[evaluations]]
parts = ["two"]
command = "finetune"
on = "more:d"
of = "consolidate-more"
"""
)


def test_parts_of_a_study_share_a_folder(tmp_path):
    file, out = tmp_path / "parts.toml", tmp_path / "out"
    file.write_text(PARTS)

    def ran(*only):
        return study.run(study.load(str(file), only=only), str(out), (), print)["ran"]

    assert study.load(str(file), only=["one"]).title == "first"
    assert ran("one") == 5  # teach, precompute, train, finetune, report-one
    student = (out / "runs/consolidate-shapes/student.safetensors").stat()
    assert ran("two") == 5
    assert json.loads((out / "jobs/precompute-proxy.json").read_text())["rows_computed"] == 64  # of the new teacher
    assert ran("one") == 0  # the store has its teachers, and another one
    assert ran("two") == 0
    assert ran() == ran("one", "two") == 1  # their common reports
    assert (out / "runs/consolidate-shapes/student.safetensors").stat() == student
    assert not list(out.glob("*/*.old"))


def test_parts_that_are_not_there(tmp_path):
    found = tomllib.loads(PARTS)
    with pytest.raises(FastconError, match=r"^x has no part 'three': there are one, two$"):
        plan.planned("x", found, only=["three"])
    found["evaluations"][0]["parts"] = ["four"]
    with pytest.raises(FastconError, match=r"^x has no part 'four': there are one, two$"):
        plan.planned("x", found)
    with pytest.raises(FastconError, match=r"^y has no part 'one': there are none$"):
        plan.planned("y", tomllib.loads(FULL), only=["one"])
    found = tomllib.loads(PARTS.replace('"*-shapes"', '"*-shape"'))
    with pytest.raises(FastconError, match=r"is of '\*-shape': there are generalist, teachers, students, shapes"):
        plan.planned("x", found)


def test_every_number_of_the_paper_is_made_once():
    """Each accuracy that the paper printed has one command of the study that makes its counterpart, and is named by it."""
    jobs = study.load("paper", data="/data").jobs
    made = collections.Counter(measured(jobs))
    assert max(made.values()) == 1
    printed = collections.Counter()
    for number in (2, 4, 5, 6):
        for table in read([f"table{number}"]).tables.values():
            for label, task in table.cells:
                row = table.rows[label]
                key = row.lineage.key(None)
                of = [key] if not row.best_of else [("teacher", frozenset([teacher])) for teacher in key[1]]
                for one in of:
                    assert made[table.title, one, table.task_key(task)] == 1, (number, label, task)
                printed[number] += 1
    assert printed == {2: 27, 4: 495, 5: 60, 6: 112}  # Table 2 prints its generalist twice


def measured(jobs):
    """(protocol, what a representation is, task) of every accuracy that commands of a study make."""
    kinds = {}  # MODEL → what it is, as the paper's tables say it
    for job in jobs:
        given = main.commands[job.command[0]].make_context(job.command[0], list(job.command[1:])).params
        if job.command[0] == "teach":
            other = "resnet18" in given["init"]
            kinds[given["out"]] = ("teacher", frozenset([(given["task"].partition(":")[0], given["split"], other)]))
        elif job.command[0] == "train":
            taught = [next(iter(kinds[f"runs/{name}"][1])) for name in (given["heads"] or "").split(",") if name]
            method = {"consolidate": "consolidated"}.get(given["method"], given["method"])
            proxy = given["store"].removeprefix("stores/")
            kinds[given["out"]] = (method, frozenset(taught), proxy, given["balance"], given["labels"])
        elif job.command[0] in ("probe", "finetune", "evaluate"):
            yield from accuracies(job.command[0], given, kinds)


def accuracies(command, given, kinds):
    task = (given["task"].partition(":")[0], given["split"])
    if command == "evaluate":
        yield "upstream accuracy", kinds[given["model"]], task
        return
    few = {"probe": "5-shot linear SVM", "finetune": "5-shot fine-tuning"}[command]
    protocol = "fine-tuning on all images" if command == "finetune" and given["shots"] is None else few
    for spec in given.get("backbones") or [given["backbone"]]:
        yield protocol, kinds.get(spec, ("generalist", frozenset())), task


SEVERAL = """
generalist = "net"
seeds = [0, 1]
splits = [0, 1]
[models.net]
model = "torchvision:resnet18"
[data.birds]
train = "rendered:shapes"
holdout = 0.5
[data.bees]
train = "rendered:digits"
holdout = 0.5
[data.proxy]
train = "rendered:textures"
[stores.one]
views = 1
[stores.small]
logits = "top32"
[[teachers]]
data = "birds"
[[students]]
teachers = [["birds"]]
method = ["consolidate", "traditional"]
proxy = "proxy"
store = ["one", "small"]
[[students]]
method = "soft-label"
proxy = "proxy"
[[evaluations]]
command = "probe"
on = ["birds:d", "bees"]
"""


def test_seeds_splits_and_stores_multiply():
    planned = plan.planned("x", tomllib.loads(SEVERAL))
    jobs = {job.name: job for job in planned.jobs}
    assert counts(planned) == {"teach": 2, "precompute": 3, "train": 18, "probe": 3, "report": 1}
    teach = jobs["teach-birds-split1"].command
    assert teach[teach.index("--split-seed") + 1] == "1"
    assert "--split-seed" not in jobs["teach-birds-split0"].command
    train = jobs["train-consolidate-birds-split1-small-seed1"].command
    assert train[train.index("--seed") + 1] == "1"
    assert train[train.index("--heads") + 1] == "birds-split1"
    assert train[train.index("--store") + 1] == "stores/proxy-small"
    precompute = jobs["precompute-proxy-small"].command
    assert precompute[precompute.index("--logits") + 1] == "top32"
    assert precompute[precompute.index("--views") + 1] == "4"
    probed = {
        name: [word for word in jobs[name].command if word.startswith("runs/")] for name in jobs if "probe" in name
    }
    assert len(probed["probe-bees"]) == 20  # two teachers, eighteen students
    one = probed["probe-birds-split1"]
    assert len(one) == 11  # its own teacher and students, and the students without teachers
    assert not any("split0" in word for word in one)
    report = " ".join(jobs["report"].command)
    assert "--related birds-split0=birds --related birds-split1=birds" in report
    assert jobs["teach-birds-split1"].command[jobs["teach-birds-split1"].command.index("--task") + 1] == "birds"


def test_a_store_that_is_not_there():
    with pytest.raises(FastconError, match=r"names the store 'two'; \[stores\] has one, small"):
        plan.planned("x", tomllib.loads(SEVERAL.replace('store = ["one", "small"]', 'store = "two"')))

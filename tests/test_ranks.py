"""Training with several ranks: the same batches and, but for rounding, the same student; what ends one rank ends all."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file

from fastcon.cli.main import main
from fastcon.distill.options import TrainOptions, Upkeep
from fastcon.distill.train import train
from fastcon.errors import FastconError
from fastcon.machine import Machine, choose_device, rank
from fastcon.ranks import Ranks, Told, join

CALL = {"epochs": 2, "batch_size": 24, "lr_backbone": 1e-5, "lr_heads": 1e-4, "precision": "float32", "log_every": 2}


def ranked(ranks: int, *calls: dict | list, check: bool = True) -> list[list[dict]]:
    """The lines of every rank, call by call."""
    script = Path(__file__).with_name("ranked.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, json.dumps(calls)], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert done.returncode == 0 or not check, done.stderr[-3000:]
    lines = [json.loads(line) for line in re.findall(r"^\{.*\}$", done.stdout, re.MULTILINE)]
    of_rank = [[line for line in lines if line["rank"] == number] for number in range(ranks)]
    return [[lines[k] for lines in of_rank if k < len(lines)] for k in range(len(calls))]


def weights(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "student.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, store_path):
    """The run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    options = TrainOptions(epochs=2, batch_size=24, lr_backbone=1e-5, lr_heads=1e-4)
    train(str(store_path), str(out), options, Machine("cpu", "float32", threads=1), Upkeep(log_every=2))
    return out


def test_two_ranks_train_as_one(tmp_path, store_path, generalist_file, alone):
    """And what does not go together is said once, by the first of them."""
    call = {"store": str(store_path), "out": str(tmp_path / "two"), **CALL}
    other = {**call, "out": str(tmp_path / "x")}
    lines, again, odd, seeds, lost, synced = ranked(
        2,
        call,
        call,
        other | {"lanes": 3},
        other | {"only": {"1": {"seed": 5}}},
        other | {"only": {"1": {"store": str(tmp_path / "nowhere")}}},
        other | {"sync_bn": True},
    )
    assert [line["steps"] for line in lines] == [12, 12]
    assert lines[0]["row"] == lines[1]["row"]
    one, two = ((run / "metrics.jsonl").read_text().splitlines() for run in (alone, tmp_path / "two"))
    assert len(one) == len(two) == 7
    for a, b in zip(map(json.loads, one), map(json.loads, two), strict=True):
        assert {key: a[key] for key in ("step", "epoch", "images")} == {
            key: b[key] for key in ("step", "epoch", "images")
        }
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        for name, values in a["heads"].items():
            assert b["heads"][name] == pytest.approx(values, rel=1e-2, abs=1e-5)
    ours, theirs, start = weights(alone), weights(tmp_path / "two"), load_file(generalist_file)
    assert ours.keys() == theirs.keys() == start.keys()
    moved = {key: np.linalg.norm(value - start[key]) for key, value in ours.items()}
    assert sum(way > 0 for way in moved.values()) > 50
    for key, way in moved.items():  # what training changed is the same but for a twentieth, which is float32's rounding
        assert np.linalg.norm(theirs[key] - ours[key]) <= 5e-2 * way, key

    assert [line["said"] for line in again] == [[f"{tmp_path / 'two'} is finished: nothing to do"], []]
    assert again[0]["row"] == again[1]["row"] == lines[0]["row"]

    for failed, text in (
        (odd, "2 ranks do not divide the 3 lanes of a batch of 24"),
        (seeds, "rank 1 has another store or other options than rank 0: seed differ"),
        (lost, "rank 1 of 2: .*nowhere"),
        (synced, "`sync_bn` needs GPUs"),
    ):
        assert [line["quiet"] for line in failed] == [False, True], failed
        assert re.match(text, failed[0]["error"]), failed[0]["error"]
    assert not (tmp_path / "x").exists()


def test_ranks_stop_together_and_others_go_on(tmp_path, store_path, alone):
    """One rank of three is stopped, then one is killed; a single process and two ranks end what they began."""
    call = {"store": str(store_path), "out": str(tmp_path / "run"), **CALL, "lanes": 6}
    [stopped] = ranked(3, call | {"stop": [2, 4]})
    assert {line["error"] for line in stopped} == {
        "stopped by signal 15 at step 4 of 12, saved; run the same command to resume"
    }
    [dead] = ranked(3, call | {"die": [1, 3]}, check=False)  # torchrun ends the others
    for line in dead:
        assert line["error"].startswith("one of the 3 ranks is gone, and so the others end: the same command resumes")
    assert [line["rank"] for line in dead if not line["quiet"]] in ([0], [])
    [ended] = ranked(2, call)
    assert ended[0]["said"][-1] == f"resuming {tmp_path / 'run'} at step 6 of 12"  # the end of an epoch
    assert [line["steps"] for line in ended] == [6, 6]
    rows = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows == [0, 2, 4, 6, 8, 10, 12]
    options = TrainOptions(epochs=2, batch_size=24, lr_backbone=1e-5, lr_heads=1e-4, lanes=6)
    train(str(store_path), str(tmp_path / "one"), options, Machine("cpu", "float32", threads=1), Upkeep(log_every=2))
    one, ours = weights(tmp_path / "one"), weights(tmp_path / "run")
    for key, value in one.items():
        np.testing.assert_allclose(ours[key], value, atol=1e-4, err_msg=key)


def test_the_other_commands(tmp_path, labelled_folder, generalist_file):
    """teach, finetune, probe, rank and evaluate: what two ranks share comes out as of one, and is said once."""
    task = [
        "--train",
        str(labelled_folder),
        "--holdout",
        "0.4",
        "--seed",
        "1",
        "--device",
        "cpu",
        "--precision",
        "float32",
    ]
    tune = [*task, "--epochs", "3", "--batch-size", "15", "--batch-norm", "running", "--lr-grid"]

    def commands(where: Path) -> list[list[str]]:
        where.mkdir()
        out = {name: ["--out", str(where / name)] for name in ("taught", "tuned")}
        models = [str(generalist_file), str(tmp_path / "one" / "taught")]
        return [
            [*words, "--json", str(where / f"{k}.json")]
            for k, words in enumerate(
                [
                    ["teach", "--init", str(generalist_file), *tune, "0.00001,0.0001", *out["taught"]],
                    ["finetune", str(generalist_file), *tune, "0.0001", "--shots", "5", "--trials", "2", *out["tuned"]],
                    ["probe", *models, *task, "--trials", "5", "--size", "32"],
                    ["rank", *models, *task, "--trials", "5", "--size", "32"],
                    [
                        "evaluate",
                        models[1],
                        "--test",
                        str(labelled_folder),
                        "--holdout",
                        "0.4",
                        "--split",
                        "t",
                        *task[6:],
                    ],
                ]
            )
        ]

    alone = [CliRunner().invoke(main, [*words, "--threads", "1"]) for words in commands(tmp_path / "one")]
    for told in alone:
        assert told.exit_code == 0, told.output
    together = commands(tmp_path / "two")
    small = [
        "teach",
        "--init",
        str(generalist_file),
        *tune,
        "0.0001",
        "--out",
        str(tmp_path / "x"),
        "--batch-size",
        "1",
    ]
    lost = ["teach", "--init", "nowhere.safetensors", *tune, "0.0001", "--out", str(tmp_path / "x")]
    batch = [
        "teach",
        "--init",
        str(generalist_file),
        *task,
        "--epochs",
        "3",
        "--batch-size",
        "14",
        "--batch-norm",
        "batch",
    ]
    batch += ["--lr-grid", "0.0001", "--out", str(tmp_path / "batch")]
    *lines, again, few, nowhere, stopped, resumed = ranked(
        2, *together, together[0], small, lost, [*batch, "stop@2"], [*batch, "--json", str(tmp_path / "batch.json")]
    )
    assert [line["code"] for line in stopped] == [75, 75]
    assert "stopped by signal 15 at step 2 of 3, saved" in stopped[0]["output"]
    assert stopped[1]["output"] == ""
    assert [line["code"] for line in resumed] == [0, 0]
    judged = ["evaluate", str(tmp_path / "batch"), *together[4][2:8], "--device", "cpu", "--precision", "float32"]
    told = CliRunner().invoke(main, [*judged, "--json", str(tmp_path / "judged.json")])
    assert told.exit_code == 0, told.output  # the network that was written is the one that was measured
    accuracies = [json.loads((tmp_path / name).read_text())["accuracy"] for name in ("batch.json", "judged.json")]
    assert accuracies[0] == accuracies[1]
    for one, two in zip(alone, lines, strict=True):
        first, second = two
        assert (first["code"], second["code"], second["output"]) == (0, 0, ""), two
        says = [text.replace(str(tmp_path / "two"), str(tmp_path / "one")) for text in first["output"].splitlines()]
        assert says == one.output.splitlines()
    for k in range(5):
        ours, theirs = (json.loads((tmp_path / who / f"{k}.json").read_text()) for who in ("one", "two"))
        for gone in ("seconds", "argv", "out", "duality_gaps"):
            for result in (ours, theirs, *ours.get("results", []), *theirs.get("results", [])):
                result.pop(gone, None)
        assert ours == theirs
    ours, theirs = (load_file(tmp_path / who / "taught" / "model.safetensors") for who in ("one", "two"))
    start = load_file(generalist_file)
    moved = [
        key for key in ours if key in start and start[key].shape == ours[key].shape and np.any(start[key] != ours[key])
    ]
    assert len(moved) > 50
    for key in moved:
        assert np.linalg.norm(ours[key] - theirs[key]) <= 5e-2 * np.linalg.norm(ours[key] - start[key]), key
    one, two = ((tmp_path / who / "taught" / "metrics-final.jsonl").read_text().splitlines() for who in ("one", "two"))
    for a, b in zip(map(json.loads, one), map(json.loads, two), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
    assert "is finished: nothing to do" in again[0]["output"]
    assert again[1]["output"] == ""
    for failed, text in ((few, "a batch of 1 images cannot be shared by 2 ranks"), (nowhere, "no such weights file")):
        assert [line["code"] for line in failed] == [1, 1]
        assert text in failed[0]["output"]
        assert failed[0]["output"].count("fastcon: ") <= 3
        assert failed[1]["output"] == ""


def test_shares_cover_everything_once():
    for count in (0, 1, 5, 24):
        parts = [list(Ranks(number, 3).share(count)) for number in range(3)]
        assert [k for part in parts for k in part] == list(range(count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_rank_needs_nobody():
    ranks = Ranks(0, 1)
    assert (ranks.same(lambda: 3), ranks.all("x"), ranks.most(1, 2), ranks.first) == (3, ["x"], [1, 2], True)
    with pytest.raises(FastconError, match="as it is"), ranks.agreeing():
        raise FastconError("as it is")
    with pytest.raises(RuntimeError, match="gloo"), ranks.lost():
        raise RuntimeError("gloo")
    with pytest.raises(RuntimeError, match="shapes"), Ranks(1, 2).lost():
        raise RuntimeError("shapes do not match")  # no loss of a rank
    with pytest.raises(Told, match="one of the 2 ranks is gone"), Ranks(1, 2).lost():
        raise RuntimeError("[gloo/transport] Connection closed by peer")


def test_ranks_are_torchruns(monkeypatch):
    assert rank() == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert rank() == (3, 4)
    assert choose_device("auto").type == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [str(choose_device(name)) for name in ("auto", "cuda", "cuda:1")] == ["cuda:3", "cuda:3", "cuda:1"]


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for number, kind in (("0", FastconError), ("1", Told)):
        monkeypatch.setenv("RANK", number)
        with pytest.raises(kind, match="4 ranks here, and PyTorch sees 2 GPUs: use `torchrun --nproc-per-node 2`"):
            join(torch.device("cuda", 0))


@pytest.fixture
def hosts():
    """Two network namespaces, "hosts" that a cable connects and nothing else reaches: what runs a command in each, and addresses."""
    names = [f"fastcon-{os.getpid()}-{k}" for k in range(2)]
    addresses = ["10.77.0.1", "10.77.0.2"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no network namespaces here")
    try:
        ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1", "netns", names[1])
        for k, name in enumerate(names):
            ip("-n", name, "addr", "add", f"{addresses[k]}/24", "dev", f"cable{k}")
            ip("-n", name, "link", "set", f"cable{k}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield [["ip", "netns", "exec", name] for name in names], addresses
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


@pytest.mark.slow
def test_two_hosts_train_as_one(hosts, tmp_path, store_path):
    """torchrun on two hosts, a rank each: the metrics and weights of two ranks on one."""
    inside, addresses = hosts
    script = str(Path(__file__).with_name("ranked.py"))
    [lines] = ranked(2, {"store": str(store_path), "out": str(tmp_path / "one"), **CALL})
    call = json.dumps([{"store": str(store_path), "out": str(tmp_path / "two"), **CALL}])
    running = []
    for k in range(2):
        command = [*inside[k], sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={addresses[0]}:29400", "--rdzv-id=test"]
        command += [f"--rdzv-conf=is_host={1 - k}", f"--local-addr={addresses[k]}", script, call]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"cable{k}"}
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    said = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], [errors.decode()[-2000:] for _, errors in said]
    assert len(lines) == 2
    assert (tmp_path / "two/metrics.jsonl").read_bytes() == (tmp_path / "one/metrics.jsonl").read_bytes()
    ours, theirs = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)

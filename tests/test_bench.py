"""Benchmarks: rows with the fields that a reader compares, measured on a problem small enough for a test."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from fastcon.kernels import svm
from fastcon.kernels.multihead_ce import multihead_cross_entropy

from fastcon import bench
from fastcon.bench import fixtures, growth, kernel, loader, probe, probe_full, start, store, train
from fastcon.data.manifest import index
from fastcon.distill import loss as objective
from fastcon.distill.loader import Loader
from fastcon.machine import Machine
from fastcon.models import frozen
from fastcon.models.frozen import Frozen
from fastcon.store.format import Recipe
from fastcon.store.parts import opened
from fastcon.store.reader import Store
from fastcon.transfer.solvers import LinearSVM


def test_rows_of_the_probe_benchmark(monkeypatch):
    monkeypatch.setattr(probe, "_agreement", lambda device, say: [])
    said: list[str] = []
    rows = probe.bench(said.append, torch.device("cpu"), classes=4, width=40, trials=2, test_images=20)
    assert rows[0]["name"] == "probe_vs_sklearn"
    for row in rows:
        assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"])
        assert (row["unit"], row["n"], row["device"]) == ("s", 2, "cpu")
        assert row["theirs_is"] == "extrapolated from 7 of 72 fits"
        assert 0.25 <= row["accuracy"] <= 1
        assert -1e-4 <= row["objective_excess"] < 1  # nobody goes below a certified optimum
        assert row["accuracy_of_fits"] == pytest.approx(row["accuracy_of_fits_sklearn"], abs=0.15)


def test_rows_of_the_full_probe_benchmark():
    said: list[str] = []
    [row] = probe_full.bench(said.append, torch.device("cpu"), 4, 30, 20, test_images=20, fitted=2)
    assert row["name"] == "probe_full"
    assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"])
    assert row["case"] == "120 rows x 20 features x 4 classes, 7 C, 5 folds"
    assert row["theirs_is"] == "extrapolated from 14 of 144 fits"
    assert row["chosen_c"] in probe_full.C_GRID
    assert row["largest_duality_gap"] <= 1e-4
    assert 100 < row["megabytes"] < 10_000
    assert -1e-4 <= row["objective_excess"] < 1
    assert 0.25 <= row["accuracy"] <= 1
    assert len(said) == 1 + len(probe_full.C_GRID)


def test_rows_of_the_start_benchmark(monkeypatch):
    real, ran = subprocess.run, []
    monkeypatch.setattr(subprocess, "run", lambda command, **given: (ran.append(command), real(command, **given))[1])
    rows = start.bench(lambda line: None, torch.device("cpu"), rounds=1)
    check(rows, ["start_info", "start_train"])
    assert [row["case"] for row in rows] == ["info STORE", "one step of 32 images and the end of the run"]
    assert len(ran) == 8, "ours and theirs, once to warm up and once to be timed"


@pytest.mark.parametrize("classes", [2, 5])
def test_an_objective_is_what_the_kernel_says(classes):
    random = np.random.default_rng(0)
    x, y = random.normal(size=(30, 8)) + 1, np.arange(30) % classes
    model = LinearSVM(0.3).fit(x, y)
    signs = torch.from_numpy(np.where(y == np.arange(classes)[:, None], 1.0, -1.0))[-model.coef_.shape[0] :]
    gram = svm.Gram.of(torch.from_numpy(x @ x.T + 1))
    beta, _ = svm.solve(gram, signs, 0.3)
    best = svm.objective(signs, 0.3, beta, beta @ gram.matrix).sum().item()
    assert probe.objective(model, x, y, 0.3) == pytest.approx(best, rel=1e-6)


def test_agreement_with_scikit_learn_is_measured():
    [row] = probe._agreement(torch.device("cpu"), lambda line: None, trials=2)
    assert row["objective_difference"] < 1e-3
    assert row["same_c"] >= 0.5
    assert row["accuracy"] == pytest.approx(row["accuracy_sklearn"], abs=5e-3)


def test_features_are_as_a_resnets():
    x, y = probe.features_like_resnets(5, 6, 256)
    assert x.min() == 0
    assert np.linalg.norm(x, axis=1).mean() == pytest.approx(25, rel=1e-3)
    assert np.bincount(y).tolist() == [6] * 5


def test_a_record_says_what_made_it_and_no_place(monkeypatch):
    monkeypatch.setattr("sys.argv", ["fastcon", "bench", "loader", "--images", "/home/somebody/photos.tar"])
    made = bench.record([])
    assert made["command"] == "fastcon bench loader --images photos.tar"
    assert set(made) == {"command", "commit", "hardware", "versions", "rows"}
    assert made["hardware"]["cores"] >= 1


def check(rows, names):
    assert [row["name"] for row in rows] == names
    for row in rows:
        assert {"name", "ours", "theirs", "unit", "ratio", "n", "device", "case"} <= set(row)
        assert row["ratio"] > 0


def test_rows_of_the_kernel_benchmark(monkeypatch):
    def no_compiler(*_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(kernel, "_compiled", no_compiler)
    said: list[str] = []
    rows = kernel.bench(said.append, torch.device("cpu"), rounds=1, cases=[(4, [5, 3])])
    assert said[0] == "torch.compile does not work here: no compiler"
    check(rows, ["loss_vs_eager", "loss_vs_eager, with KL and agreement"])
    assert rows[0]["case"] == "B = 4, 2 heads, 8 classes"
    student, teacher = kernel._logits(4, segments := objective.segments([5, 3], [1, 1]), torch.device("cpu"))
    torch.testing.assert_close(kernel._fused(student, teacher, segments), kernel._loop(student, teacher, segments))


def test_few_photos_come_several_times_over(tmp_path, monkeypatch):
    monkeypatch.setattr(fixtures, "RENDERED", 3)
    files = fixtures.image_files([], tmp_path, 8, 40, 30)
    contents = [file.read_bytes() for file in files]
    assert (len(files), len(set(contents))) == (8, 3)
    [file, *_] = fixtures.image_files([str(tmp_path / "photos")], tmp_path / "again", 1, 0, 0)
    assert file.read_bytes() == contents[0]


def test_rendered_photos_take_as_many_bytes_a_pixel_as_photos(tmp_path):
    files = list(fixtures.photos(tmp_path / "photos", 6).iterdir())
    assert 0.5 < sum(file.stat().st_size for file in files) / (len(files) * 500 * 375) < 0.65


def test_the_row_of_an_embedding():
    """What it is compared with gives the same loss, else it raises."""
    row = kernel._embedding_row(4, 5, 3, torch.device("cpu"), rounds=1)
    assert (row["name"], row["case"]) == ("embedding_vs_eager", "B = 4, 5 classes and 3 features")
    assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"])


def test_the_loops_that_the_kernel_is_compared_with_are_the_same_loss():
    segments = objective.segments([5, 3], [1, 0.5])
    student, teacher = kernel._logits(6, segments, torch.device("cpu"))
    ours = multihead_cross_entropy(student, teacher, segments)
    for mine, theirs in zip(ours, kernel._loop_with_statistics(student, teacher, segments), strict=True):
        torch.testing.assert_close(mine, theirs)
    by_kl = kernel._kl_loop(torch.nn.KLDivLoss(reduction="batchmean"), student, teacher, segments)
    totals = (ours.total, kernel._loop(student, teacher, segments), by_kl)
    gradients = [torch.autograd.grad(total, student)[0] for total in totals]
    for other in gradients[1:]:
        torch.testing.assert_close(gradients[0], other)


def test_rows_of_the_store_benchmark(store_path):
    rows = store.bench(lambda line: None, str(store_path), rows=2048, classes=20, rounds=1)
    check(rows, ["store_read", "store_read, in batches of 256"] * 2 + ["codec"] * 8)
    quality = {row["case"]: row for row in rows if row["name"] == "codec"}
    assert quality["float16, letters, 3 classes"]["kl_mean"] == 0
    assert quality["uint8, general, 10 classes"]["ours"] == 18
    assert quality["uint8, general, 10 classes"]["kl_worst"] < 1e-3


def test_rows_of_the_loader_benchmark(monkeypatch):
    monkeypatch.setattr(loader, "SIDE", 32)
    monkeypatch.setattr(loader, "BATCH", 8)
    monkeypatch.setattr(loader.importlib.util, "find_spec", lambda name: None)
    rows = loader.bench(lambda line: None, torch.device("cpu"), views=2, count=24, rounds=1, size=(60, 48))
    check(rows, ["loader", "loader, against itself without logits", "loader_baked"])
    assert rows[0]["case"].startswith("24 photos of 3 kpixel, 2 views")
    assert rows[2]["bytes_a_view"] > 500


def test_torchvisions_loader_gives_what_ours_gives(tmp_path):
    files = fixtures.image_files([], tmp_path, 64, 80, 60)
    recipe = Recipe(size=224)
    path = fixtures.store_of(tmp_path / "store", index([str(tmp_path / "photos")]), recipe, 1, [4], Machine("cpu"))
    [theirs] = loader._torchvision(Store(path), files, 0, 1)
    [ours] = loader._pixels(path, torch.device("cpu"), 1)
    order = next(iter(Loader(str(path), batch_size=64))).indices.argsort()
    rows = Store(path).view(0).order.argsort()
    assert (theirs[rows].float() - ours[order].float()).abs().mean() < 1


def test_rows_of_the_train_benchmark(monkeypatch):
    monkeypatch.setattr(train, "compiled", lambda model, mode: model)  # that takes half a minute
    monkeypatch.setattr(Frozen, "_compiled", lambda self: self._model)
    monkeypatch.setattr(train, "TOGETHER", 1.0)
    monkeypatch.setattr(frozen, "choose", lambda *args, **options: "default")
    monkeypatch.setattr(train, "PAPERS_BATCH", 8)
    scale = train.Scale("torchvision:shufflenet_v2_x0_5", 32, 8, 256, (40, 36), 2, 1)
    rows = train.bench(lambda line: None, torch.device("cpu"), rounds=1, scale=scale)
    names = ["precompute", "precompute_vs_best", "train_step", *["train_vs_online"] * 3]
    check(rows, [*names, "side_by_side", "train_step, --compile default"])
    for row in rows[3:6]:
        assert row["ratio"] == pytest.approx(row["speed_up"] / row["bound"])
        assert row["bound"] > 1


def test_the_ratio_is_better_when_larger():
    faster = bench.compared("x", [2.0, 4.0], [1.0, 1.0], "img/s", "cpu")
    assert (faster["ratio"], faster["ours"], faster["n"]) == (3, 3, 2)
    assert bench.compared("x", [2.0], [1.0], "us", "cpu")["ratio"] == 0.5


def test_variants_take_turns():
    calls = []
    seen = bench.interleave({"a": lambda: calls.append("a") or 1.0, "b": lambda: calls.append("b") or 2.0}, 2)
    assert calls == ["a", "b"] * 3  # one round to warm up
    assert seen == {"a": [1.0, 1.0], "b": [2.0, 2.0]}


def test_the_speed_table_comes_from_the_records(tmp_path):
    spec = importlib.util.spec_from_file_location("table", Path(__file__).parent.parent / "benchmarks" / "table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = [
        bench.compared("loader", [500.0], [250.0], "img/s", "cpu"),
        bench.compared("loss_vs_eager", [10.0], [20.0], "us", "cpu"),
        bench.compared("loss_vs_eager", [10.0], [5.0], "us", "cpu"),
    ]
    (tmp_path / "a-cpu.json").write_text(json.dumps({"hardware": {"cores": 2}, "rows": rows}))
    made = module.table(tmp_path)
    assert "(`loader`) | 2.00 (500 against 250 img/s) | ≥ 1.5 |  |  |" in made
    assert "(`loss_vs_eager`) | 0.50 to 2.00 (2 cases) | ≥ 1 |  | ≥ 5 |" in made
    assert "| 2 CPU cores | aim | GPU, not measured | aim |" in made
    gpu = bench.compared("loader", [900.0], [300.0], "img/s", "cuda")
    (tmp_path / "a-cuda.json").write_text(json.dumps({"hardware": {"cores": 2, "gpu": "One"}, "rows": [gpu]}))
    both = module.table(tmp_path)
    assert "| 2 CPU cores | aim | One | aim |" in both
    assert "(`loader`) | 2.00 (500 against 250 img/s) | ≥ 1.5 | 3.00 (900 against 300 img/s) |" in both
    assert "(2 cases) | ≥ 1 | not measured | ≥ 5 |" in both
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert module.table(Path(module.__file__).parent / "results") in readme


def test_the_page_of_scale_is_what_its_script_makes():
    folder = Path(__file__).parent.parent / "benchmarks"
    spec = importlib.util.spec_from_file_location("scale", folder / "scale.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.page()
    assert (folder / "scale.md").read_text() == made
    assert "| ImageNet-1k × 40 views, 11 teachers | 216 GB |" in made  # 1,281,167 x 40 x 2,110 x 2 bytes
    assert "| 8.7 ; 3.6 | 1.1 ; 0.44 |" in made  # 1,281,167 x 40 x 11 / 18,000 / 3,600 and x 40 / 4,000 / 3,600
    assert [module._bytes(n) for n in (999, 1500, 2.5e9, 3e15)] == ["999 B", "1.5 KB", "2.5 GB", "3 PB"]


def test_stages_grow_as_they_do(tmp_path, monkeypatch, capsys):
    """Every stage runs on what those before it made, and a row says how it grew."""
    monkeypatch.setattr(growth, "PART", 40)
    for stage in growth.STAGES:
        for rows in (100, 150):
            growth.main(stage, str(rows), str(tmp_path))
            facts = json.loads(capsys.readouterr().out.splitlines()[-1])
            assert facts["seconds"] > 0
            assert facts["megabytes"] > 100
    assert Store(tmp_path / "store-150").require("constant", 2) is None
    assert opened(tmp_path / "parts-150").rows == 4 * 40
    asked = []

    def measured(stage, size, scratch):
        asked.append((stage, size))
        return {"seconds": size**0.5, "megabytes": size / 10}

    monkeypatch.setattr(growth, "_measured", measured)
    rows = growth.bench(lambda line: None, 10_000_000)
    assert [size for stage, size in asked if stage == "index"] == [10**4, 10**5, 10**6]
    assert [size for stage, size in asked if stage == "verify"] == [10**4, 10**5, 10**6, 10**7]
    assert {round(row["exponent"], 6) for row in rows} == {0.5}
    assert {round(row["ratio"], 3) for row in rows} == {3.162}

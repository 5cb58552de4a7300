"""The report: the paper's tally from the paper's tables, paired differences by value, and a page in a real browser."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from conftest import rng

from fastcon.data.published import RELATED as RELATED_LISTS
from fastcon.errors import FastconError
from fastcon.report import write_report
from fastcon.report.cells import Cell, Part
from fastcon.report.results import ABOUT, PRINTED, read
from fastcon.report.sheet import top
from fastcon.report.tally import printed, tally
from fastcon.store.reader import Store

RELATED = {teacher: set(tasks) for teacher, tasks in RELATED_LISTS.items()}
NASTY = "<script>alert(1)</script>\n\"'&|_$%" + "x" * 4000


def probe(backbones: dict[str, tuple[str, list[str], list[float]]], task: str = "birds", **changes) -> dict:
    """What `fastcon probe --json` writes, of made-up trials."""
    rows = [
        {"backbone": f"runs/{name}", "name": name, "method": method, "teachers": teachers, "accuracy": float(np.mean(trials)),
         "std": 0.0, "ci95": 0.01, "accuracies": trials, "chosen_c": [1.0] * len(trials), "per_class": {}}
        for name, (method, teachers, trials) in backbones.items()
    ]  # fmt: skip
    facts = {"command": "probe", "task": task, "backbones": [f"runs/{n}" for n in backbones], "train": [f"data/{task}.tar"], "test": [],
             "holdout": 0.5, "split": "d", "split_seed": 0, "seed": 0, "shots": 5, "trials": 3, "folds": 5, "c_grid": [0.1, 1.0],
             "solver": "auto", "scale_features": "none", "size": 64}  # fmt: skip
    return facts | changes | {"results": rows}


def write(path: Path, result: dict) -> str:
    path.write_text(json.dumps(result))
    return str(path)


def counts(path: str, threshold: float = 1.5) -> dict[tuple[str, str, bool], tuple[int, int, int]]:
    [table] = read([path]).tables.values()
    return {(line.ours, line.theirs, line.related): line.counts(threshold) for line in tally(table, RELATED)}


def test_the_tally_of_the_papers_table_3():
    found = counts("table4")
    assert found["consolidated", "generalist", True] == (6, 4, 0)
    assert found["consolidated", "traditional", True] == (7, 1, 2)
    assert found["traditional", "generalist", True] == (5, 1, 4)
    assert found["consolidated", "traditional", False] == (10, 0, 0)
    assert found["traditional", "generalist", False] == (0, 0, 10)
    assert found["consolidated", "generalist", False] == (0, 8, 2)  # the paper says 0/10/0: see the next test


def test_where_our_tally_is_not_the_papers_it_shows():
    [table] = read(["table4"]).tables.values()
    line = next(
        x for x in tally(table, RELATED) if (x.ours, x.theirs, x.related) == ("consolidated", "generalist", False)
    )
    outside = {scenario: round(value, 1) for scenario, value in line.differences if abs(value) > 1.5}
    assert outside == {"ifood": -2.1, "inaturalist": -2.0}
    assert line.counts(2.2) == (0, 10, 0)


@pytest.mark.parametrize(("number", "count"), [(2, 30), (4, 495), (5, 60), (6, 112)])
def test_every_cell_of_the_papers_tables_arrives(number, count):
    rows = list(csv.DictReader((PRINTED / f"table{number}.csv").open()))
    values = [float(v) for row in rows for key, v in row.items() if v and key not in ABOUT]
    assert len(values) == count
    cells = [cell.value for table in read([f"table{number}"]).tables.values() for cell in table.cells.values()]
    assert sorted(cells + [28.9, 37.0, 70.7] * (number == 2)) == sorted(values)  # Table 2 prints its generalist twice


def test_differences_are_paired_over_trials(tmp_path):
    base, gain = rng().uniform(0.4, 0.6, 3), np.array([0.10, 0.11, 0.12])
    result = probe(
        {"ours": ("consolidated", ["birds"], (base + gain).tolist()), "base": ("generalist", [], base.tolist())}
    )
    [table] = read([write(tmp_path / "a.json", result)]).tables.values()
    mean, half = table.difference("ours", "birds")
    assert (mean, half) == pytest.approx((11.0, 1.96 * 1.0 / 3**0.5))
    assert list(table.rows) == ["base", "ours"]  # the generalist first
    assert table.difference("base", "birds") is None
    assert table.title == "5-shot linear SVM"


def finetune(name: str, method: str, trials: list[float], shots: int | None = None, **changes) -> dict:
    """What `fastcon finetune --json` writes, of made-up trials."""
    return {"command": "finetune", "task": "birds", "backbone": f"runs/{name}", "name": name, "method": method, "teachers": [],
            "train": ["birds"], "seed": 0, "shots": shots, "trials": len(trials), "accuracy": float(np.mean(trials)),
            "accuracies": trials, "ci95": 0.01} | changes  # fmt: skip


def test_fine_tuning_makes_tables_of_its_own(tmp_path):
    """Full and few-shot apart; draws are paired; a multi-label task of 1,000 images stands with those of 5 shots."""
    paths = [
        write(tmp_path / f"{k}.json", result)
        for k, result in enumerate(
            [
                finetune("base", "generalist", [0.5]),
                finetune("ours", "consolidated", [0.6]),
                finetune("base", "generalist", [0.2, 0.4], shots=5),
                finetune("ours", "consolidated", [0.3, 0.5], shots=5),
                finetune("ours", "consolidated", [0.9, 0.8], shots=1000, multi_label=True, task="fashion"),
            ]
        )
    ]
    tables = read(paths).tables
    assert list(tables) == ["fine-tuning on all images", "5-shot fine-tuning"]
    assert tables["fine-tuning on all images"].difference("ours", "birds") == (pytest.approx(10.0), None)
    assert tables["5-shot fine-tuning"].difference("ours", "birds") == (pytest.approx(10.0), pytest.approx(0.0))
    assert tables["5-shot fine-tuning"].tasks == ["birds", "fashion"]


def test_a_fine_tuned_run_is_no_upstream_accuracy(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(
        json.dumps({"command": "finetune", "init": "runs/ours", "shots": 5, "trials": 2, "data": {"task": "birds"}})
    )
    (run / "result.json").write_text(json.dumps({"accuracy": 0.5, "accuracies": [0.4, 0.6], "ci95": 0.1}))
    [table] = read([str(run)]).tables.values()
    assert table.title == "5-shot fine-tuning"
    assert table.cells["ours", "birds"].trials == (40.0, 60.0)


def test_variants_of_one_method_are_left_out_of_the_tally(tmp_path):
    rows = {"base": ("generalist", [], [0.4]), "ours": ("consolidated", ["birds"], [0.5])}
    [table] = read([write(tmp_path / "one.json", probe(rows))]).tables.values()
    assert [line.differences for line in tally(table, {})] == [[("birds", pytest.approx(10.0))]]
    variants = rows | {"ours-1to3": ("consolidated", ["birds"], [0.6])}
    [table] = read([write(tmp_path / "two.json", probe(variants))]).tables.values()
    assert tally(table, {}) == []


def lineage(task: str = "birds", split: str = "t", split_seed: int = 0, seed: int = 0, **changes) -> dict:
    """What a student's results say of where it comes from."""
    teacher = {"task": task, "split": split, "split_seed": split_seed, "architecture": "net"}
    known = {"seed": seed, "teachers": [teacher], "proxy": "photos", "balance": "1:1", "labels": False, "recipe": "r"}
    return known | changes


def repeated(tmp_path: Path, ours, base, splits=(0, 1), seeds=(0, 1)) -> list[str]:
    """Probes of students over splits and seeds, ours[split][seed] and base[split] being their trials."""
    paths = []
    for split in splits:
        rows = {"base": ("generalist", [], list(base[split]))}
        rows |= {
            f"ours-split{split}-seed{k}": ("consolidated", [f"birds-split{split}"], list(ours[split][k])) for k in seeds
        }
        result = probe(rows, split_seed=split)
        for row, seed in zip(result["results"][1:], seeds, strict=True):
            row["lineage"] = lineage(split_seed=split, seed=seed)
        paths.append(write(tmp_path / f"split{split}.json", result))
    return paths


def test_runs_that_differ_in_seeds_alone_make_one_row(tmp_path):
    base = [[0.40, 0.42], [0.50, 0.52]]
    ours = [[[0.45, 0.47], [0.47, 0.49]], [[0.58, 0.60], [0.56, 0.58]]]  # 5 and 7, then 8 and 6 points above
    [table] = read(repeated(tmp_path, ours, base)).tables.values()
    assert list(table.rows) == ["base", "ours"]
    cell = table.cells["ours", "birds"]
    assert cell.value == pytest.approx((46 + 48 + 59 + 57) / 4)
    assert (cell.over, len(cell.parts)) == ("class splits", 4)
    mean, half = table.difference("ours", "birds")
    assert mean == pytest.approx((6 + 7) / 2)
    assert half == pytest.approx(12.7062 * 0.5, rel=1e-4)  # t(0.975, 1) x sd(6, 7) / sqrt 2
    assert table.rows["ours"].related("birds", {"birds-split1": {"birds"}})
    one_split = tmp_path / "one"
    one_split.mkdir()
    [table] = read(repeated(one_split, ours, base, splits=(0,))).tables.values()
    assert table.cells["ours-split0", "birds"].over == "training seeds"
    assert table.difference("ours-split0", "birds") == pytest.approx((6.0, 12.7062 * 1.0), rel=1e-4)


def test_a_run_that_other_seeds_have_is_missed(tmp_path):
    base, ours = [[0.40, 0.42]] * 2, [[[0.45, 0.47]] * 2] * 2
    paths = repeated(tmp_path, ours, base)
    found = json.loads(Path(paths[1]).read_text())
    del found["results"][2]
    Path(paths[1]).write_text(json.dumps(found))
    with pytest.raises(
        FastconError, match=r"^'ours' on 'birds' has no result of training seed 1 in class split 1, which"
    ):
        read(paths)


def test_rows_repeated_over_splits_and_over_seeds_do_not_mix(tmp_path):
    base, ours = [[0.40, 0.42]] * 2, [[[0.45, 0.47]] * 2] * 2
    paths = repeated(tmp_path, ours, base, seeds=(0,))  # over two splits
    (tmp_path / "more").mkdir()
    more = repeated(tmp_path / "more", ours, base, splits=(0,))  # over two seeds
    found = json.loads(Path(more[0]).read_text())
    for row in found["results"][1:]:
        row["name"] = row["name"].replace("ours", "others")
        row["lineage"]["recipe"] = "other"
    Path(more[0]).write_text(json.dumps(found))
    with pytest.raises(
        FastconError, match=r"is repeated over training seeds, 'ours.*' over class splits \(on 'birds'\)"
    ):
        read([*paths, *more])


def test_other_options_are_another_row(tmp_path):
    rows = {name: ("consolidated", ["birds"], [0.5, 0.6]) for name in ("ours-a", "ours-b", "ours-c")}
    result = probe(rows)
    for k, row in enumerate(result["results"]):
        row["lineage"] = lineage(seed=k % 2, recipe="other" if k == 2 else "r")
    [table] = read([write(tmp_path / "a.json", result)]).tables.values()
    assert list(table.rows) == ["ours", "ours-c"]
    assert len(table.cells["ours", "birds"].parts) == 2


def test_a_student_that_was_trained_twice_is_said(tmp_path):
    """Two studies trained the same student, on a GPU, where no two runs are alike."""
    paths = []
    for k in range(2):
        result = probe({"ours": ("consolidated", ["birds"], [0.5, 0.6 + k / 10])})
        result["results"][0]["lineage"] = lineage()
        paths.append(write(tmp_path / f"{k}.json", result))
    said: list[str] = []
    write_report(paths, str(tmp_path / "out"), say=said.append)
    assert (
        "ours was trained twice with the same options and seed: of tasks that both have, the first is shown" in said[0]
    )
    [table] = read(paths).tables.values()
    assert table.cells["ours", "birds"].value == pytest.approx(55.0)


@pytest.mark.parametrize(("splits", "seeds"), [(3, 2), (1, 4)])
def test_intervals_cover_seeds_and_splits(splits, seeds):
    """A simulation: draws within training seeds within class splits; intervals over draws alone would cover far less."""
    random, truth, covered, naive = rng(), 1.0, 0, 0
    count, trials = 1500, 20
    for _ in range(count):
        parts = []
        for split in range(splits):
            of_split = truth + (0.8 * random.normal() if splits > 1 else 0)
            for seed in range(seeds):
                values = of_split + 0.5 * random.normal() + random.normal(0, 1, trials)
                parts.append(Part(float(values.mean()), tuple(values), None, "", split, seed))
        mean, half = Cell(tuple(parts)).value, Cell(tuple(parts)).ci95
        covered += abs(mean - truth) <= half
        values = np.concatenate([part.trials for part in parts])
        naive += abs(values.mean() - truth) <= 1.96 * values.std(ddof=1) / len(values) ** 0.5
    assert covered / count == pytest.approx(0.95, abs=0.017)  # three standard errors
    assert naive / count < 0.75


def test_ours_beside_the_papers(tmp_path):
    """Matched by teachers, method, proxy and weights, whatever the rows and tasks are called."""
    rows = {
        "general": ("generalist", [], [0.30, 0.32]),
        "a": ("consolidated", ["cars"], [0.60, 0.60]),
        "b": ("consolidated", ["cars"], [0.50, 0.50]),
        "c": ("consolidated", ["cars"], [0.40, 0.40]),
        "d": ("consolidated", ["cars"], [0.20, 0.20]),
        "taught": ("teacher", ["cars"], [0.35, 0.35]),
        "small": ("teacher", ["cars"], [0.25, 0.25]),
    }
    lines = {
        "taught": {"split": "t1/5"},
        "small": {"split": "t1/5"},
        "a": {},
        "b": {"balance": "1:3"},
        "c": {"split": "t1/5", "architecture": "small"},
        "d": {"balance": "1:5"},
    }
    result = probe(rows, task="cars196", train=["cars.tar"])
    for row in result["results"]:
        row["architecture"] = "small" if row["name"] == "small" else "net"
        if row["name"] in lines:
            known = lineage("cars196", proxy="imagenet")
            changes = dict(lines[row["name"]])
            if row["method"] == "teacher":  # which says it of itself
                known["teachers"][0].pop("architecture", None)
            known["teachers"][0] |= {k: changes.pop(k) for k in ("split", "architecture") if k in changes}
            row["lineage"] = known | changes | {"recipe": row["name"]}
    path = write(tmp_path / "a.json", result)
    said: list[str] = []
    facts = write_report([path], str(tmp_path / "out"), references=["table4"], say=said.append)
    [found] = facts["compared"]
    assert {(cell["published"], cell["ours"]) for cell in found["cells"]} == {
        ("ImageNet-pretrained model", "general"),
        ("Cars196 (t-split) repr. consolid.", "a"),
        ("Cars196 (t-split) repr. consolid. (ImageNet proxy)", "a"),
        ("Cars196 (t-split) repr. consolid. old:new = 1:1", "a"),
        ("Cars196 (t-split) repr. consolid. old:new = 1:3", "b"),
        ("Cars196 10% (Res18) repr. consolid.", "c"),
        ("Cars196 10% classes teacher", "taught"),
        ("Cars196 10% classes (Res18) teacher", "small"),
    }
    first = next(cell for cell in found["cells"] if cell["ours"] == "a")
    assert (first["task"], first["difference"]) == ("cars196:d", pytest.approx(60.0 - 59.21))
    assert "not in table4: d" in found["missing"]
    assert "not measured by us: dtd:d" in found["missing"]
    assert "no counterpart of ours: DTD (t-split) trad. distill" in found["missing"]
    assert (found["published"], found["compared"]) == (495, 8)
    stem = tmp_path / "out" / "5-shot-linear-SVM-ours-beside-table4"
    assert "| 60.0 / 59.2 (+0.8) | – / 70.0 |" in stem.with_suffix(".md").read_text()
    line = next(row for row in csv.DictReader(stem.with_suffix(".csv").open()) if row["ours"] == "b")
    assert (line["accuracy"], line["published_accuracy"], line["difference"]) == ("50.0000", "61.2100", "-11.2100")
    assert (tmp_path / "out" / "5-shot-linear-SVM-ours-beside-table4-gains.svg").exists()


def test_fine_tuned_students_beside_the_papers(tmp_path):
    """Of networks that no result names, teachers are taken to be of the generalist's."""
    known = lineage("resisc45", proxy="imagenet")
    known["teachers"][0]["architecture"] = "torchvision:resnet50"
    rows = [finetune("r50", "generalist", [0.9], task="resisc45", split="d"),
            finetune("ours", "consolidated", [0.8], task="resisc45", split="d", lineage=known)]  # fmt: skip
    paths = [write(tmp_path / f"{k}.json", row) for k, row in enumerate(rows)]
    [found] = write_report(paths, str(tmp_path / "out"), references=["table6"])["compared"]
    assert {(cell["published"], cell["ours"]) for cell in found["cells"]} == {
        ("ImageNet-pretrained model", "r50"),
        ("Resisc45 (t-split) repr. consolid.", "ours"),
    }


def test_a_reference_that_cannot_be_compared(tmp_path):
    path = write(tmp_path / "a.json", probe({"base": ("generalist", [], [0.5, 0.6])}))
    for reference, message in (
        (
            "table6",
            "table6 has accuracies of fine-tuning on all images; the results have 5-shot linear SVM: nothing can",
        ),
        ("table7", "table7"),
        (path, "a reference is a CSV table, or a table of the paper"),
    ):
        with pytest.raises(FastconError, match=message):
            write_report([path], str(tmp_path / "out"), references=[reference])


def test_the_best_of_several_teachers(tmp_path):
    """By related accuracy alone: b is better where it does not count."""
    rows = {
        "base": ("generalist", [], [0.3, 0.3]),
        "a": ("teacher", ["birds"], [0.6, 0.6]),
        "b": ("teacher", ["birds"], [0.5, 0.5]),
    }
    other = {"a": ("teacher", ["birds"], [0.1, 0.1]), "b": ("teacher", ["birds"], [0.9, 0.9])}
    paths = [write(tmp_path / "1.json", probe(rows)), write(tmp_path / "2.json", probe(other, task="cars"))]
    write_report(paths, str(tmp_path / "out"), best=["best=a,b"])
    table = (tmp_path / "out" / "5-shot-linear-SVM.md").read_text()
    assert "| best | **60.0** (+30.0 ± 0.0) | 10.0 |" in table
    for best, message in (
        ("best", "`best` 'best' is not NAME=LABEL,LABEL,…"),
        ("best=a,x", "`best` 'best': no table has all of a, x"),
        ("a=a,b", "'a' is a representation already"),
    ):
        with pytest.raises(FastconError, match=message):
            write_report(paths, str(tmp_path / "other"), best=[best])


def test_at_which_thresholds_the_papers_counts_hold(tmp_path):
    lines = {(line.ours, line.theirs, line.related): line for line in tally(*read(["table4"]).tables.values(), RELATED)}
    holds = {key: lines[key].thresholds(counts) for key, counts in printed().items()}
    for key, range_ in holds.items():
        if range_:
            low, high = range_
            assert lines[key].counts(low) == lines[key].counts((low + min(high, 99)) / 2) == printed()[key]
            assert high == math.inf or lines[key].counts(high) != printed()[key]
    assert lines["consolidated", "generalist", False].thresholds((3, 3, 3)) is None
    everywhere = [range_ for range_ in holds.values() if range_]
    assert len(everywhere) == 6  # each holds at some threshold,
    assert max(low for low, _ in everywhere) > min(high for _, high in everywhere)  # and no threshold gives all six
    said: list[str] = []
    write_report(["table4"], str(tmp_path / "out"), say=said.append)
    assert "| tally, ≈: within 1.5 points | tasks | > | ≈ | < | the paper | the same at thresholds |" in said[0]


def test_the_page_says_which_command_made_a_result(tmp_path):
    result = probe({"ours": ("consolidated", ["birds"], [0.5])}, argv=["probe", "runs/ours", "--train", "my birds"])
    write_report([write(tmp_path / "a.json", result)], str(tmp_path / "out"), title="Birds & bees")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "fastcon probe runs/ours --train &#x27;my birds&#x27;" in page
    assert "<h1>Birds &amp; bees</h1>" in page


def test_the_generalist_can_be_named(tmp_path):
    result = probe({"ours": ("consolidated", ["birds"], [0.5, 0.6]), "broad": ("teacher", ["broad"], [0.4, 0.5])})
    [table] = read([write(tmp_path / "a.json", result)], generalist="broad").tables.values()
    assert table.difference("ours", "birds") == pytest.approx((10.0, 0.0))
    with pytest.raises(FastconError, match="no result has a representation 'x'; there are broad, ours"):
        read([str(tmp_path / "a.json")], generalist="x")


def test_tables_in_three_forms_and_related_tasks(tmp_path):
    result = probe({"base_1": ("generalist", [], [0.4, 0.4]), "ours": ("consolidated", ["birds"], [0.5, 0.5])})
    other = probe(
        {"base_1": ("generalist", [], [0.8, 0.8]), "ours": ("consolidated", ["birds"], [0.7, 0.7])}, task="cars"
    )
    paths = [write(tmp_path / "a.json", result), write(tmp_path / "b.json", other)]
    facts = write_report(paths, str(tmp_path / "out"), related=["birds=cars"])
    assert (tmp_path / "out" / "5-shot-linear-SVM.md").read_text().splitlines() == [
        "| representation | birds | cars |", "|---|---|---|", r"| base\_1 | 40.0 | **80.0** |",
        "| ours | **50.0** (+10.0 ± 0.0) | 70.0 (-10.0 ± 0.0) |",
    ]  # fmt: skip
    assert r"base\_1 & 40.0 & \textbf{80.0} \\" in (tmp_path / "out" / "5-shot-linear-SVM.tex").read_text()
    rows = list(csv.DictReader((tmp_path / "out" / "5-shot-linear-SVM.csv").open()))
    assert rows[3]["difference"] == "-10.0000"
    line = facts["tally"]["5-shot linear SVM"][0]
    assert (line["tasks"], line["counts"], line["differences"]) == ("related", [0, 1, 0], {"birds": pytest.approx(0.0)})


def test_names_cannot_break_out_of_the_page(tmp_path):
    result = probe({NASTY: ("consolidated", [NASTY], [0.5, 0.6]), "base": ("generalist", [], [0.4, 0.5])}, task=NASTY)
    write_report([write(tmp_path / "a.json", result)], str(tmp_path / "out"))
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<script>alert" not in page
    assert page.count("<script>") == 1
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", page)  # nothing from outside
    for figure in (tmp_path / "out").glob("*.svg"):
        ET.parse(figure)
    assert len((tmp_path / "out" / "5-shot-linear-SVM.md").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x,y\n1,2\n", "has the columns representation, method"),
        ("a.csv", "representation,method,Cars\nr,generalist,140\n", "line 2: '140' is no accuracy in percent"),
        ("a.csv", "representation,method,Cars\nr,magic,14\n", "line 2: method 'magic' is none of"),
        ("a.json", "{", "is no JSON result"),
        ("a.json", '{"command": "train"}', "is no result of probe, finetune or evaluate"),
        ("a.json", '{"command": "probe", "shots": 5, "results": [{}]}', "is no whole result of probe"),
        ("gone.json", None, "No such file"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(FastconError, match=message):
        write_report([str(tmp_path / name)], str(tmp_path / "out"))


def test_contradictions_and_foreign_folders_are_refused(tmp_path):
    one = write(tmp_path / "a.json", probe({"ours": ("consolidated", ["birds"], [0.5])}))
    two = write(tmp_path / "b.json", probe({"ours": ("consolidated", ["birds"], [0.6])}))
    with pytest.raises(FastconError, match="'ours' on 'birds' has another accuracy"):
        write_report([one, two], str(tmp_path / "out"))
    with pytest.raises(FastconError, match="holds other files"):
        write_report([one], str(tmp_path))
    with pytest.raises(FastconError, match="nothing to report"):
        write_report([], str(tmp_path / "out"))


def test_a_run_gives_curves_and_a_store_views(tmp_path, store_path):
    from conftest import MACHINE
    from test_train import QUICK, UPKEEP

    from fastcon.distill.train import train

    train(str(store_path), str(tmp_path / "student"), QUICK, MACHINE, UPKEEP)
    result = probe({"student": ("consolidated", ["letters"], [0.5, 0.6]), "base": ("generalist", [], [0.4, 0.5])})
    paths = [write(tmp_path / "a.json", result), str(tmp_path / "student")]
    write_report(paths, str(tmp_path / "out"), views=str(store_path))
    page = (tmp_path / "out" / "index.html").read_text()
    for name in ("learning-curves", "cost-and-accuracy", "5-shot-linear-SVM-gains"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert page.count("data:image/png;base64,") == 24
    store = Store(store_path)
    rows, _ = store.samples()
    logits = store.logits("letters", 0, 0)[rows[0]].astype(float) / 2
    best = int(logits.argmax())
    share = float(np.exp(logits[best]) / np.exp(logits).sum())
    assert f"<b>letters</b>: {store.teachers['letters'].classes[best]} {share:.0%}" in page


def test_the_top_classes_of_a_sigmoid_head():
    classes, values = top(np.array([0.0, 4.0, -2.0, 2.0]), "sigmoid")
    assert classes.tolist() == [1, 3, 0]
    assert values == pytest.approx([1 / (1 + np.exp(-2)), 1 / (1 + np.exp(-1)), 0.5])


BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_the_page_in_a_browser(tmp_path):
    """It sorts by a click, loads nothing, shows no script error, and fits a phone without scrolling sideways."""
    write_report(["table4"], str(tmp_path / "out"))
    page = (tmp_path / "out" / "index.html").read_text()
    check = """<script>
      const errors = []; addEventListener('error', e => errors.push(e.message));
      const button = document.querySelectorAll('th button')[1]; button.click();
      const first = document.querySelector('tbody tr td').textContent, order = button.parentElement.getAttribute('aria-sort');
      button.click();
      const last = document.querySelector('tbody tr td').textContent;
      const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
      document.title = JSON.stringify({first, order, last, wide, errors, loaded: performance.getEntriesByType('resource').length});
    </script>"""
    own = base64.b64encode(hashlib.sha256(check[8:-9].encode()).digest()).decode()  # the page lets no other script run
    page = page.replace("script-src ", f"script-src 'sha256-{own}' ")
    foreign = "<script>document.body.prepend('smuggled in')</script>"
    (tmp_path / "out" / "check.html").write_text(page.replace("</body>", foreign + check + "</body>"))
    seen = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=400,800", "--dump-dom",
         f"--user-data-dir={tmp_path}/profile", f"file://{tmp_path}/out/check.html"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "smuggled in" not in seen.stdout.replace(foreign, "")
    found = json.loads(re.search(r"<title>(.*?)</title>", seen.stdout).group(1).replace("&gt;", ">"))
    assert found == {
        "first": "Cars196 (t-split) repr. consolid. old:new = 1:3", "order": "descending",
        "last": "iFashion category task trad. distill",
        "wide": False, "errors": [], "loaded": 0,
    }  # fmt: skip

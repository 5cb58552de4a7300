"""How teachers relate: the measures by value, and domains that were planted come out."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import rng
from sklearn.metrics import silhouette_samples

from fastcon.bench.fixtures import manifest_of
from fastcon.cli.main import main
from fastcon.distill import relate as module
from fastcon.distill.relate import domains, relate, similarity
from fastcon.errors import FastconError
from fastcon.report import write_report
from fastcon.report.relations import conclusions
from fastcon.store import parts
from fastcon.store.format import Recipe, TeacherRecord
from fastcon.store.writer import open_for_writing

ROWS = 600


def gram(x):
    return module._gram(x.astype(np.float32), "sigmoid")


def test_cka_by_value():
    random = rng()
    x, y = random.normal(size=(40, 5)), random.normal(size=(40, 7))
    a, b = gram(x).astype(float), gram(y).astype(float)
    n = 40

    def hsic(k, m):  # Song et al., Eq. 5, as it is written
        one = np.ones(n)
        value = (
            np.trace(k @ m) + one @ k @ one * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ k @ m @ one
        )
        return value / (n * (n - 3))

    assert similarity(gram(x), gram(y)) == pytest.approx(hsic(a, b) / np.sqrt(hsic(a, a) * hsic(b, b)), rel=1e-4)


def test_cka_sees_neither_rotation_nor_scale_nor_chance():
    random = rng()
    x = random.normal(size=(300, 20))
    turn = np.linalg.qr(random.normal(size=(20, 20)))[0]
    assert similarity(gram(x), gram(3 * x @ turn + 5)) == pytest.approx(1, abs=1e-3)
    wide = [random.normal(size=(300, 250)) for _ in range(2)]  # the biased estimate says 0.45 of these
    assert abs(similarity(gram(wide[0]), gram(wide[1]))) < 0.02
    assert similarity(gram(x), gram(np.ones((300, 4)))) == 0
    z = x - x.mean(1, keepdims=True) + random.normal(size=(300, 1))  # of a softmax, the mean of a row says nothing
    assert similarity(module._gram(x.astype(np.float32), "softmax"), module._gram(z.astype(np.float32), "softmax")) == (
        pytest.approx(1, abs=1e-3)
    )


def blocks(*sizes, inside=0.8, outside=0.2):
    label = np.repeat(np.arange(len(sizes)), sizes)
    return np.where(label[:, None] == label, np.where(np.eye(len(label)) > 0, 1, inside), outside)


def test_domains():
    assert domains(blocks(2, 3, 1))[0] == [[0, 1], [2, 3, 4], [5]]
    assert domains(blocks(2, 2)) == ([[0, 1], [2, 3]], pytest.approx(0.96, abs=0.01))
    assert domains(blocks(5, 1, 1))[0] == [[0, 1, 2, 3, 4], [5], [6]]  # two that are like nobody are no domain
    assert domains(blocks(4)) == ([[0, 1, 2, 3]], None)  # all alike
    assert domains(blocks(4, inside=0.1)) == ([[0], [1], [2], [3]], None)
    assert domains(np.ones((3, 3))) == ([[0, 1, 2]], None)
    assert domains(blocks(1)) == ([[0]], None)
    assert domains(blocks(1, 1, outside=0.7)) == ([[0, 1]], None)
    assert domains(np.zeros((0, 0))) == ([], None)


def test_no_domains_in_noise():
    """Teachers that are alike by chance only seldom reach what counts as structure."""
    random, found = rng(), 0
    for _ in range(60):
        noise = random.normal(0, 0.05, (8, 8))
        cka = 0.3 + (noise + noise.T) / 2
        np.fill_diagonal(cka, 1)
        found += domains(cka)[1] is not None
    assert found <= 3


REAL = """0.21 0.22 0.43 0.11 0.10 0.17 0.18 0.14 0.19 0.43 0.16 0.24 0.20 0.40 0.37 0.19 0.10 0.19 0.20 0.27 0.22
0.15 0.18 0.22 0.28 0.30 0.30 0.35 0.17 0.13 0.22 0.24 0.23 0.31 0.51 0.48"""
"""CKA below the diagonal of nine teachers: thirds of AID, Oxford Flowers and Grocery (ResNet18, 4,000 photos of 72 px)."""


def test_the_domains_of_real_teachers():
    cka = np.eye(9)
    cka[np.tril_indices(9, -1)] = [float(value) for value in REAL.split()]
    cka = np.maximum(cka, cka.T)
    grouped, silhouette = domains(cka)
    assert grouped == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert silhouette == pytest.approx(0.39, abs=0.02)


def test_parts_of_a_domain_come_out_together():
    """Fifths of AID beside thirds of Flowers and Grocery, as measured: see benchmarks/README.md."""
    above = """
        .325 .312 .225 .440 .120 .157 .205 .129 .143 .158   .362 .298 .381 .142 .160 .269 .136 .163 .166
        .605 .307 .069 .115 .191 .156 .149 .122   .274 .084 .101 .149 .114 .127 .089   .194 .182 .174 .178 .161 .259
        .432 .400 .201 .285 .243   .370 .271 .299 .233   .222 .305 .311   .352 .510   .475"""
    cka = np.eye(11)
    cka[np.triu_indices(11, 1)] = [float(value) for value in above.split()]
    cka = np.maximum(cka, cka.T)
    found, silhouette = domains(cka)
    assert found == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10]]
    assert silhouette == pytest.approx(0.46, abs=0.02)


def test_silhouettes_equal_scikit_learns():
    apart = 1 - blocks(3, 2, 2, inside=0.7) + 0.05 * np.abs(np.subtract.outer(np.arange(7), np.arange(7)))
    np.fill_diagonal(apart, 0)
    labels = [0, 0, 0, 1, 1, 2, 2]
    ours = module._silhouettes(apart, labels)
    np.testing.assert_allclose(ours, silhouette_samples(apart, labels, metric="precomputed"))


def planted():
    """Logits [ROWS, C] of every teacher, by image: two domains seen through other eyes, a constant, a copy, a label."""
    random = rng(1)
    worlds = [random.normal(size=(ROWS, 12)) for _ in range(2)]
    said = {"general": np.concatenate(worlds, 1) @ random.normal(size=(24, 30))}
    for name, world, classes in (("a1", 0, 6), ("a2", 0, 9), ("b1", 1, 8), ("b2", 1, 5), ("b3", 1, 7)):
        turn = np.linalg.qr(random.normal(size=(12, 12)))[0][:, :classes]
        said[name] = 4 * worlds[world] @ turn + 0.3 * random.normal(size=(ROWS, classes))
    said["copy"] = said["b1"][:, ::-1] * 1.1
    said["flat"] = np.tile([3.0, 0, 0, 0], (ROWS, 1)) + 0.01 * random.normal(size=(ROWS, 4))
    said["sure"] = 50 * np.eye(4)[np.arange(ROWS) % 4]
    return said


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One view of a teacher says of an image what the other does, but "a1" changes its mind about every third."""
    path = tmp_path_factory.mktemp("relate") / "store"
    with open_for_writing(str(path), manifest_of(ROWS), Recipe(size=32, chunk_rows=100), 2, {}) as writer:
        for name, values in planted().items():
            role = "generalist" if name == "general" else "teacher"
            classes = tuple(map(str, range(values.shape[1])))
            writer.add_teacher(name, TeacherRecord(role, weights=name, classes=classes, logits="float32"), None)
            for view in (0, 1):
                order = writer.view(view).order
                for chunk in range(writer.chunks):
                    images = order[slice(*writer.chunk_range(chunk))]
                    logits = values[images]
                    if name == "a1" and view == 1:
                        logits = np.where((images % 3 == 0)[:, None], np.roll(logits, 1, axis=1), logits)
                    writer.write(name, view, chunk, {"logits": logits.astype(np.float32)})
    return path


def test_planted_domains_come_out(store):
    found = relate(store)
    assert found.rows == ROWS
    grouped = {frozenset(domain) for domain in found.domains}
    assert {frozenset({"a1", "a2"}), frozenset({"b1", "b2", "b3", "copy"})} <= grouped
    assert found.silhouette > 0.3
    assert found.redundant == [("b1", "copy")]
    names = found.names
    assert found.shared[names.index("b1"), names.index("copy")] == pytest.approx(1)
    assert abs(found.shared[names.index("a1"), names.index("b1")]) < 0.1
    assert "general" not in {name for domain in found.domains for name in domain}
    says = conclusions(found)
    assert any(line.endswith("--heads a1,a2 --out …") for line in says)
    assert [line for line in says if line.startswith("not covered: flat")]


def test_what_each_teacher_says(store):
    out = relate(store).outputs
    assert out["sure"].information == pytest.approx(1, abs=1e-3)  # four classes, equally often, without a doubt
    assert (out["sure"].used, out["sure"].confidence) == (pytest.approx(4, abs=0.01), pytest.approx(1))
    assert out["flat"].information < 0.01
    assert [name for name, each in out.items() if each.near_constant] == ["flat"]
    assert out["a1"].consistency == pytest.approx(2 / 3, abs=0.01)
    assert out["a2"].consistency == 1
    assert out["a2"].classes == 9


def test_a_few_rows_of_many_chunks(store):
    found = relate(store, 240)
    assert found.rows == 240
    assert frozenset({"a1", "a2"}) in {frozenset(domain) for domain in found.domains}


def test_teachers_of_labels():
    """A sigmoid head: information by label, and how many labels there are."""
    z = np.where(np.arange(400)[:, None] % 2 == [0, 1, 0], 60.0, -60.0).astype(np.float32)
    record = TeacherRecord("teacher", classes=("x", "y", "z"), kind="sigmoid")

    class One:
        teachers = {"t": record}  # noqa: RUF012

    out = module._outputs(One, "t", z, [])
    assert (out.information, out.used, out.confidence) == (pytest.approx(1), pytest.approx(1.5), pytest.approx(1))
    assert out.consistency is None


def test_a_store_in_parts(store, tmp_path):
    parts_of = parts.Binding((parts.Shared([], 2),), Recipe(size=32, chunk_rows=100), {})
    path = tmp_path / "s"
    for number in range(2):
        where = parts.folder(str(path), number)
        with open_for_writing(where, manifest_of(ROWS // 2), parts_of.recipe, 2, {}) as writer:
            for name, values in planted().items():
                role, classes = "generalist" if name == "general" else "teacher", range(values.shape[1])
                record = TeacherRecord(role, weights=name, classes=tuple(map(str, classes)))
                parts_of.teachers[name] = record
                writer.add_teacher(name, record, None)
                for view in (0, 1):
                    order = writer.view(view).order
                    for chunk in range(writer.chunks):
                        images = order[slice(*writer.chunk_range(chunk))] + number * (ROWS // 2)
                        writer.write(name, view, chunk, {"logits": values[images].astype(np.float16)})
        parts_of.bound[number] = parts.Bound.of(parts.Store(where))
    with parts.changing(str(path)) as write:
        write(parts_of)
    found = relate(path)
    assert found.outputs["a1"].consistency == 1
    assert frozenset({"a1", "a2"}) in {frozenset(domain) for domain in found.domains}


def test_as_a_command_and_on_the_page(store, tmp_path):
    told = CliRunner().invoke(main, ["relate", str(store), "--json", str(tmp_path / "r.json")])
    assert told.exit_code == 0, told.output
    assert "9 teachers compared on 600 rows" in told.output
    assert "redundant: b1 and copy" in told.output
    assert len(json.loads((tmp_path / "r.json").read_text())["cka"]) == 9
    write_report([], str(tmp_path / "page"), relate=str(store))
    page = (tmp_path / "page" / "index.html").read_text()
    assert "teachers of" in page
    assert "not covered: flat" in page
    assert (tmp_path / "page" / "teachers.svg").exists()


def test_what_cannot_be_compared(store_path, tmp_path):
    with open_for_writing(str(tmp_path / "s"), manifest_of(50), Recipe(size=32), 1, {}) as writer:
        writer.add_teacher("only", TeacherRecord("teacher", classes=("x", "y")), None)
        with pytest.raises(FastconError, match="has 1 teacher: there is nothing to compare"):
            relate(tmp_path / "s")
        writer.add_teacher("other", TeacherRecord("teacher", classes=("x", "y")), None)
    with pytest.raises(FastconError, match="teacher 'only' is not finished"):
        relate(tmp_path / "s")

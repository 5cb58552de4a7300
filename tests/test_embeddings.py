"""Embedding teachers: what they are, how they are stored, standardised, learned, verified and compared; by value."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import ARCHITECTURE, BATCH, MACHINE, RECIPE, rewrite_record, rng
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

import fastcon
from fastcon.bench.fixtures import manifest_of
from fastcon.cli.main import main
from fastcon.data.manifest import ImageSet
from fastcon.distill import parts as in_parts
from fastcon.distill.embeddings import standard
from fastcon.distill.loader import Loader
from fastcon.distill.options import PrecomputeOptions, TrainOptions, Upkeep
from fastcon.distill.precompute import Teacher, precompute
from fastcon.distill.relate import relate
from fastcon.distill.train import train
from fastcon.distill.verify import _distance, verify
from fastcon.errors import FastconError
from fastcon.models.classifier import Head
from fastcon.models.load import load
from fastcon.report.figures import curves
from fastcon.report.results import read
from fastcon.report.sheet import views
from fastcon.store.format import Recipe, TeacherRecord
from fastcon.store.parts import forget
from fastcon.store.reader import Store
from fastcon.store.writer import open_for_writing


def tower() -> nn.Module:
    """An image tower without a classifier, as CLIP's and SigLIP's are."""
    torch.manual_seed(7)
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 24), nn.Tanh())


def maps() -> nn.Module:
    return nn.Conv2d(3, 4, 1)


@pytest.fixture(scope="module")
def stores(tmp_path_factory, proxy, teachers, teacher_file):
    """A store of each codec: a generalist, a classifier and the classifier's features."""
    features = Teacher("features", f"{teacher_file}?kind=embedding", load(f"{teacher_file}?kind=embedding"))
    paths = {}
    for logits in ("float16", "uint8"):
        paths[logits] = tmp_path_factory.mktemp("embedding") / logits
        given = [*teachers, dataclasses.replace(features)]
        precompute(str(paths[logits]), proxy, given, RECIPE, 2, MACHINE, BATCH, logits)
    return paths


def pixels(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["torchvision:resnet18", "torchvision:squeezenet1_1", "timm:vit_small_patch16_dinov3"])
def test_an_embedding_is_what_the_last_layer_is_given(name):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    whole, features = load(f"{name}@random?size=64"), load(f"{name}@random?size=64&kind=embedding")
    with torch.no_grad():
        out = features(pixels(64))
        assert torch.equal(out, whole.features(pixels(64)))
        assert torch.equal(out, features.features(pixels(64)))
        assert torch.equal(out, features(pixels(64)))  # still
        assert whole(pixels(64)).shape == (3, 1000)
    (head,) = features.heads
    assert (head.kind, len(head.classes), out.shape) == ("embedding", whole.feature_size, (3, whole.feature_size))


def test_weights_without_a_classifier(tmp_path):
    state = load(f"{ARCHITECTURE}@random?seed=5").net.state_dict()
    headless = {k.replace(".layer.", "."): v for k, v in state.items() if ".layer." not in k}
    save_file(headless, tmp_path / "backbone.safetensors")
    with pytest.raises(FastconError, match="missing: "):
        load(f"{ARCHITECTURE}@{tmp_path}/backbone.safetensors?size=32")
    model = load(f"{ARCHITECTURE}@{tmp_path}/backbone.safetensors?size=32&kind=embedding")
    with torch.no_grad():
        assert torch.equal(model(pixels(32)), load(f"{ARCHITECTURE}@random?seed=5&size=32").features(pixels(32)))
    save_file(dict(list(headless.items())[2:]), tmp_path / "less.safetensors")
    with pytest.raises(FastconError, match="do not fit"):
        load(f"{ARCHITECTURE}@{tmp_path}/less.safetensors?size=32&kind=embedding")


def test_your_own_tower(tmp_path):
    model = load("python:test_embeddings:tower?size=64&kind=embedding&mean=0.5,0.5,0.5&std=0.5,0.5,0.5")
    given = pixels(64)
    with torch.no_grad():
        torch.testing.assert_close(model(given), tower()(given.float() / 127.5 - 1))
    torch.save({k: v + 1 for k, v in tower().state_dict().items()}, tmp_path / "tower.pt")
    other = load(f"python:test_embeddings:tower@{tmp_path}/tower.pt?size=64&kind=embedding")
    assert other.digest() != model.digest()
    again = load("python:test_embeddings:tower?size=64&kind=embedding&seed=5")
    assert again.digest() == load("python:test_embeddings:tower?size=64&kind=embedding").digest()
    with pytest.raises(FastconError, match="as an embedding is a teacher for precompute, and no network to train"):
        model.replace_heads([Head("x", ("a", "b"))], keep={}, seed=0)
    with pytest.raises(FastconError, match=r"returns \(1, 4, 64, 64\) for an image, not an embedding \[1, D\]"):
        load("python:test_embeddings:maps?size=64&kind=embedding")


def test_stored_is_what_the_network_gives(stores, proxy, teacher_file):
    store, model = Store(stores["float16"]), load(teacher_file)
    batch = next(iter(Loader(store, batch_size=8, heads=["features"])))
    assert store.teachers["features"].kind == "embedding"
    assert store.teachers["features"].classes[:2] == ("feature 0", "feature 1")
    letters = next(iter(Loader(store, batch_size=8, heads=["letters"])))
    layer = model.head_module.layer
    torch.testing.assert_close(
        layer(batch.logits["features"].float()), letters.logits["letters"].float(), rtol=2e-3, atol=2e-2
    )


def test_one_byte_a_feature(stores):
    exact, rough = (Store(path).logits("features", 0, 0).astype(float) for path in stores.values())
    a, b = exact - exact.mean(0), rough - exact.mean(0)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosines.min() > 0.999


def filled(path, rows, kind="embedding", views_=1):
    with open_for_writing(str(path), manifest_of(len(rows)), Recipe(size=32, chunk_rows=100), views_, {}) as writer:
        record = TeacherRecord("teacher", classes=tuple(map(str, range(rows.shape[1]))), kind=kind, logits="float32")
        writer.add_teacher("t", record, None)
        for view in range(views_):
            order = writer.view(view).order
            for chunk in range(writer.chunks):
                chosen = order[slice(*writer.chunk_range(chunk))]
                writer.write("t", view, chunk, {"logits": (rows[chosen] + view).astype(np.float32)})
    return Store(path)


def test_standards_by_value(tmp_path):
    rows = (rng().normal(size=(950, 6)) * [1, 2, 3, 1e-3, 0, 50] + [1000, 0, -5, 2, 4, 0]).astype(np.float32)
    rows[:, 4] = 4 + np.where(rng(1).normal(size=950) > 0, 4.8e-7, 0)  # rounding of a constant
    found = standard(filled(tmp_path / "s", rows), "t")
    deviation = rows.astype(np.float64).std(0)
    np.testing.assert_allclose(found.mean.numpy(), rows.astype(np.float64).mean(0), rtol=1e-6)
    learned = [0, 1, 2, 3, 5]
    np.testing.assert_allclose(found.scale.numpy()[learned], 1 / deviation[learned], rtol=1e-5)
    assert found.scale[4] == 0
    assert standard(filled(tmp_path / "other", rows, "softmax"), "t") is None


@pytest.mark.parametrize("logits", ["float16", "uint8"])
def test_the_loaders_table_gives_the_loss_by_definition(stores, logits):
    loader = Loader(stores[logits], batch_size=16)
    batch = next(iter(loader))
    width = loader.segments.columns
    student = torch.randn(16, width, generator=torch.Generator().manual_seed(0), requires_grad=True)
    result = fastcon.loss(student, batch.stacked, loader.segments)
    of = standard(loader.store, "features")
    target = (batch.logits["features"].float() - of.mean) * of.scale
    mine = student[:, width - target.shape[1] :]
    expected = (
        1
        - functional.cosine_similarity(mine, target)
        + functional.smooth_l1_loss(mine, target, reduction="none").mean(1)
    )
    assert loader.names[-1] == "features"
    torch.testing.assert_close(result.losses[:, -1], expected, rtol=1e-4, atol=1e-4)
    assert loader.segments.weights == (1.0, 0.5, 0.5)


@pytest.fixture(scope="module")
def trained(stores, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "student"
    options = TrainOptions(epochs=8, batch_size=32, lr_heads=0.05)
    train(str(stores["uint8"]), str(out), options, MACHINE, Upkeep(log_every=4))
    return out


def test_a_student_learns_it(trained):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    first, last = (row["heads"]["features"] for row in (rows[1], rows[-1]))
    assert set(first) == {"loss", "r2", "cosine"}
    assert set(rows[-1]["heads"]["letters"]) == {"loss", "kl", "agreement"}
    assert last["r2"] > first["r2"]
    assert last["cosine"] > first["cosine"] + 0.1
    assert last["loss"] < first["loss"]
    total = sum(
        weight * rows[-1]["heads"][name]["loss"]
        for name, weight in (("general", 1), ("letters", 0.5), ("features", 0.5))
    )
    assert rows[-1]["loss"] == pytest.approx(total, rel=1e-5)


def test_its_head_is_a_model_of_its_own(trained):
    head, whole = load(f"{trained}?head=features"), load(trained)
    assert head.heads[0].kind == "embedding"
    given = pixels(32)
    with torch.no_grad():
        torch.testing.assert_close(head(given), whole.split(whole(given))["features"])
        assert torch.equal(load(f"{trained}?kind=embedding")(given), whole.features(given))
    assert load(f"{trained}?size=64&kind=embedding").size == 64


def test_the_features_of_a_run_whose_head_0_is_not_trained(stores, tmp_path):
    options = TrainOptions(method="traditional", heads=("features",), epochs=1, batch_size=32)
    train(str(stores["float16"]), str(tmp_path / "run"), options, MACHINE, Upkeep())
    with torch.no_grad():
        given = pixels(32)
        assert torch.equal(load(f"{tmp_path}/run?kind=embedding")(given), load(tmp_path / "run").features(given))


def test_its_curve_is_what_it_does_not_explain(trained):
    figure = curves(read([str(trained)], None).runs)
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert labels == ["general", "letters", "features (1 − R²)"]
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    shown = figure.axes[0].lines[2].get_ydata()
    assert shown[-1] == pytest.approx(1 - rows[-1]["heads"]["features"]["r2"])


def test_verify(stores, tmp_path, proxy, teachers, teacher_file):
    checks = {check.what: check for check in verify(str(stores["uint8"]), proxy, 64, MACHINE)}
    assert checks["features: rows"].passed, checks["features: rows"].seen
    assert "squared error" in checks["features: rows"].seen
    other = load(f"{teacher_file}?kind=embedding")
    with torch.no_grad():
        for parameter in other.backbone_parameters():
            parameter.mul_(1.05)
    given = [teachers[0], Teacher("features", f"{teacher_file}?kind=embedding", other)]
    precompute(str(tmp_path / "s"), proxy, given, RECIPE, 1, MACHINE, BATCH)
    digest = load(f"{teacher_file}?kind=embedding").digest()
    rewrite_record(tmp_path / "s", lambda record: record["teachers"]["features"].update(weights=digest))
    failed = {check.what for check in verify(str(tmp_path / "s"), proxy, 64, MACHINE) if not check.passed}
    assert "features: rows" in failed


def test_the_distance_of_features():
    rows = rng().normal(size=(500, 8)) * np.arange(1, 9) + 100
    error, cosine = _distance(rows, rows + 0.1 * rows.std(0))
    assert error == pytest.approx(0.01)
    assert 0.98 < cosine < 1
    assert _distance(rows, rows[::-1])[1] == pytest.approx(0, abs=0.1)  # raw features of any two images are near 1
    assert _distance(rows[:1], rows[:1]) == (0, pytest.approx(1))


def test_relations(stores, tmp_path):
    found = relate(stores["float16"])
    place = {name: k for k, name in enumerate(found.names)}
    assert np.isnan(found.shared[place["features"], place["letters"]])
    assert found.cka[place["features"], place["letters"]] > found.cka[place["general"], place["letters"]]
    out = found.outputs["features"]
    assert (out.information, out.used, out.confidence, out.near_constant) == (None, None, None, False)
    store = Store(stores["float16"])
    middle = np.concatenate([store.logits("features", 0, chunk) for chunk in range(store.chunks)]).astype(float)
    first, second = (
        np.concatenate([store.logits("features", view, chunk) for chunk in range(store.chunks)])[
            np.argsort(store.view(view).order)
        ]
        - middle.mean(0)
        for view in range(2)
    )
    cosines = (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    assert out.consistency == pytest.approx(cosines.mean(), abs=1e-3)
    told = CliRunner().invoke(main, ["relate", str(stores["float16"]), "--json", str(tmp_path / "r.json")])
    assert told.exit_code == 0, told.output
    assert "(–)" in told.output
    assert None in json.loads((tmp_path / "r.json").read_text())["shared"][place["features"]]


def test_in_parts_baked_and_forgotten(tmp_path, proxy_folder, teachers, teacher_file):
    path, spec = str(tmp_path / "s"), f"{teacher_file}?kind=embedding"
    options = PrecomputeOptions(seed=3, size=32, batch_size=BATCH, logits="uint8", bake=True, parts=2)
    given = [*teachers, Teacher("features", spec, load(spec))]
    in_parts.make(path, ImageSet([str(proxy_folder)]), given, options, 1, MACHINE)
    loader = Loader(path, batch_size=16)
    rows = np.concatenate([loader.store.logits("features", 0, chunk) for chunk in range(loader.store.chunks)])
    of = loader.segments.standards[loader.names.index("features")]
    np.testing.assert_allclose(of.mean.numpy(), rows.astype(np.float64).mean(0), rtol=1e-5, atol=1e-5)
    batch = next(iter(loader))
    assert fastcon.loss(torch.zeros(16, loader.segments.columns), batch.stacked, loader.segments).total.isfinite()
    assert all(check.passed for check in verify(path, None, 32, MACHINE))
    forget(path, "features")
    assert Loader(path, batch_size=16).names == ["general", "letters"]


def test_what_a_sheet_says(stores):
    assert "<b>features</b>: 1,024 features</div>" in views(str(stores["float16"]))


def test_what_it_cannot_be(teacher_file, proxy, teachers, tmp_path, trained):
    spec = f"{teacher_file}?kind=embedding"
    with pytest.raises(FastconError, match="is an embedding, and the generalist a classifier"):
        Teacher("g", spec, load(spec), generalist=True)
    with pytest.raises(FastconError, match="'f' is an embedding: store it with `logits` float16 or uint8"):
        precompute(str(tmp_path / "s"), proxy, [Teacher("f", spec, load(spec))], RECIPE, 1, MACHINE, BATCH, "top2")

"""Export: what leaves fastcon gives the same numbers without it, and the card says what was recorded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MACHINE
from safetensors.torch import load_file
from torchvision import models as zoo

from fastcon import export as stage
from fastcon.distill.options import TrainOptions
from fastcon.distill.train import train
from fastcon.errors import FastconError
from fastcon.models.load import load
from fastcon.store.reader import Store


@pytest.fixture(scope="module")
def run(store_path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "student"
    train(str(store_path), str(out), TrainOptions(epochs=1, batch_size=32, balance=(1.0, 3.0)), MACHINE)
    return out


def result(path: Path, name: str, accuracy: float = 0.75) -> str:
    row = {"backbone": f"runs/{name}", "name": name, "method": "consolidated", "teachers": ["letters"], "accuracy": accuracy,
           "ci95": 0.02, "accuracies": [accuracy] * 2}  # fmt: skip
    base = row | {"backbone": "g", "name": "general", "method": "generalist", "teachers": [], "accuracy": 0.5,
                  "accuracies": [0.5] * 2}  # fmt: skip
    path.write_text(json.dumps({"command": "probe", "task": "birds", "shots": 5, "results": [base, row]}))
    return str(path)


def test_onnx_runtime_gives_the_same_features_and_logits(run, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    facts = stage.export(str(run), str(tmp_path / "out"))
    assert facts["onnx"]["largest_difference"] < 1e-4
    session = runtime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["features", "general", "letters"]
    model = load(run)
    for count in (1, 7):  # any batch
        pixels = torch.randint(0, 256, (count, 3, model.size, model.size), dtype=torch.uint8)
        features, *logits = session.run(None, {"pixels": pixels.numpy()})
        with torch.inference_mode():
            assert features == pytest.approx(model.features(pixels).numpy(), abs=1e-3)
            assert np.concatenate(logits, 1) == pytest.approx(model(pixels).numpy(), abs=1e-3)


def test_the_state_dict_is_torchvisions(run, tmp_path):
    facts = stage.export(str(run), str(tmp_path / "out"), head="letters", onnx=False)
    assert (facts["head"], facts["onnx"]) == ("letters", None)
    assert not (tmp_path / "out" / "model.onnx").exists()
    model = load(run)
    classes = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert classes == {head.name: list(head.classes) for head in model.heads}
    plain = getattr(zoo, model.architecture.removeprefix("torchvision:"))(num_classes=len(classes["letters"])).eval()
    plain.load_state_dict(load_file(tmp_path / "out" / "weights.safetensors"))
    pixels = torch.randint(0, 256, (3, 3, model.size, model.size), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (model.mean, model.std))
    with torch.inference_mode():
        logits = plain((pixels / 255 - mean) / std)
        assert torch.allclose(logits, model.split(model(pixels))["letters"], atol=1e-4)


def test_the_card_says_what_was_recorded(run, store_path, tmp_path):
    out = tmp_path / "out"
    stage.export(str(run), str(out), onnx=False, results=[result(tmp_path / "a.json", run.name)], licence="apache-2.0")
    card, store = (out / "README.md").read_text(), Store(store_path)
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert f"| general | {len(store.teachers['general'].classes)} | softmax | 0.5 | the generalist: " in card
    assert f"| 1.5 | letters, split none: `{store.teachers['letters'].weights[:16]}` |" in card
    assert f"| proxy | store, digest `{store.record.images.digest[:16]}` |" in card
    assert "| epochs | 1 |" in card
    assert "## Accuracy, 5-shot linear SVM" in card
    assert "| birds | 75.0 ± 2.0 | +25.0 ± 0.0 |" in card
    stage.export(str(run), str(out), onnx=False)  # again, into its own folder
    assert "license: other" in (out / "README.md").read_text()


def test_what_cannot_be_exported(run, store_path, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    other = result(tmp_path / "a.json", "somebody")
    for arguments, message in (
        ((str(store_path), "x"), "is not a run of train or teach"),
        ((str(run), str(tmp_path / "full"), None, False), "holds other files: give an empty or a new folder"),
        ((str(run), str(tmp_path / "x"), "birds", False), "birds"),
        ((str(run), str(tmp_path / "x"), None, False, [other]), "`results` hold no accuracy of student"),
    ):
        with pytest.raises(FastconError, match=message) as refused:
            stage.export(*arguments)
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "x").exists()
    monkeypatch.setattr(stage, "TOLERANCE", -1.0)
    pytest.importorskip("onnxruntime")
    with pytest.raises(FastconError, match="would differ from PyTorch by"):
        stage.export(str(run), str(tmp_path / "y"))
    assert not (tmp_path / "y" / "model.onnx").exists()

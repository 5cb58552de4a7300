"""MODEL specs: every family's head is found, split, widened and written back; weights that do not fit are named."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURE
from safetensors.torch import load_file, save_file
from torchvision import models as zoo

from fastcon.errors import FastconError
from fastcon.machine import choose_device
from fastcon.models.classifier import IMAGENET_MEAN, IMAGENET_STD, Head
from fastcon.models.load import load
from fastcon.models.origin import origin, taught

FAMILIES = {
    "alexnet": 64,
    "convnext_tiny": 64,
    "densenet121": 64,
    "efficientnet_b0": 64,
    "googlenet": 64,
    "inception_v3": 96,
    "mnasnet0_5": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "regnet_y_400mf": 64,
    "resnet18": 64,
    "resnext50_32x4d": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64,
    "swin_t": 64,
    "vgg11_bn": 64,
    "vit_b_16": 224,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_second_head_leaves_the_first_as_it_was(name, tmp_path):
    size = FAMILIES[name]
    torch.manual_seed(0)
    model = load(f"torchvision:{name}@random?size={size}", classes=["x", "y", "z"])
    pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        alone = model(pixels)
        model.replace_heads([Head("new", tuple("abcde")), Head("head", ("x", "y", "z"))], keep={"head": 0}, seed=1)
        both = model.split(model(pixels))
        assert {k: tuple(v.shape) for k, v in both.items()} == {"new": (2, 5), "head": (2, 3)}
        torch.testing.assert_close(both["head"], alone, rtol=1e-4, atol=1e-4)
        assert model.features(pixels).shape == (2, model.feature_size)
        (tmp_path / "m.safetensors").write_bytes(model.export("head"))
        torch.testing.assert_close(load(tmp_path / "m.safetensors")(pixels), alone, rtol=1e-4, atol=1e-4)
        if name.startswith("mnasnet"):
            return  # torchvision's MNASNet wants a version that no plain state dict carries
        extra = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
        theirs = zoo.get_model(name, num_classes=3, **extra).eval()
        theirs.load_state_dict(load_file(tmp_path / "m.safetensors"))
        normalised = (pixels / 255 - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(
            3, 1, 1
        )
        torch.testing.assert_close(theirs(normalised), alone, rtol=1e-4, atol=1e-4)


def test_features_are_what_the_head_is_given():
    model = load("torchvision:resnet18@random?size=32", classes=["a", "b"])
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        layer = model.head_module.layer
        torch.testing.assert_close(model.features(pixels) @ layer.weight.T + layer.bias, model(pixels))


def test_heads_compute_in_float32_under_autocast():
    model = load(f"{ARCHITECTURE}@random?size=32", classes=["a", "b"])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


def test_size_mean_and_std_come_from_the_spec_then_the_weights_then_the_call(generalist_file):
    assert load(f"{generalist_file}?size=48&mean=0,0,0&std=1,1,1").size == 48
    assert load(generalist_file, size=99).size == 32
    assert load(f"{ARCHITECTURE}@random", size=99).size == 99
    model = load(f"{ARCHITECTURE}@random?size=16&mean=0,0.5,1&std=1,1,0.5", classes=["a", "b"])
    seen = []
    model.net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(torch.full((1, 3, 16, 16), 255, dtype=torch.uint8))
    assert seen[0][0, :, 0, 0].tolist() == pytest.approx([1.0, 0.5, 0.0], abs=1e-6)


def plain_state(path, classes=4):
    torch.manual_seed(3)
    net = zoo.get_model("shufflenet_v2_x0_5", num_classes=classes)
    torch.save(net.state_dict(), path)
    return net.state_dict()


@pytest.mark.parametrize("wrap", ["bare", "state_dict", "model", "module.", "_orig_mod."])
def test_common_wrappings_of_checkpoints_come_off(tmp_path, wrap):
    state = plain_state(tmp_path / "bare.pt")
    wrapped = {f"{wrap}{k}": v for k, v in state.items()} if wrap.endswith(".") else {wrap: state, "epoch": 3}
    torch.save(state if wrap == "bare" else wrapped, tmp_path / "w.pt")
    model = load(f"{ARCHITECTURE}@{tmp_path}/w.pt")
    assert len(model.heads[0].classes) == 4
    assert torch.equal(model.head_module.layer.weight, state["fc.weight"])


def test_weights_that_do_not_fit_say_which_keys(tmp_path):
    state = plain_state(tmp_path / "a.pt")
    state["conv1.0.weight"] = torch.zeros(1)
    del state["conv5.0.weight"]
    state["new.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(FastconError) as error:
        load(f"{ARCHITECTURE}@{tmp_path}/bad.pt")
    assert "missing: conv5.0.weight" in str(error.value)
    assert "unexpected: new.weight" in str(error.value)
    assert "other shape: conv1.0.weight (1,) instead of (24, 3, 3, 3)" in str(error.value)


class _Touch:
    def __reduce__(self):
        return (open, (str(_Touch.path), "w"))


def test_pickled_code_in_a_checkpoint_never_runs(tmp_path):
    _Touch.path = tmp_path / "ran"
    torch.save({"state_dict": _Touch()}, tmp_path / "evil.pt")
    (tmp_path / "ran").unlink(missing_ok=True)
    with pytest.raises(FastconError, match="pickled code is never run"):
        load(f"{ARCHITECTURE}@{tmp_path}/evil.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchvision:resnet19", "no classifier 'resnet19'; close: "),
        ("resnet50", "is no model"),
        ("torchvision:resnet18@gone.pt", "no such weights file"),
        ("torchvision:resnet18@IMAGENET9K_V1", "no weights 'IMAGENET9K_V1'"),
        ("gone.safetensors", "no such weights file"),
        ("torchvision:resnet18?colour=1", "unknown option 'colour'"),
        ("torchvision:resnet18@random?size=big", "not a whole number"),
        ("torchvision:resnet18@random?size=2", "outside 8 to 4096"),
        ("torchvision:resnet18@random?mean=1,2", "not three numbers"),
        ("python:nowhere:model", "No module named 'nowhere'"),
        ("torchvision:resnet18@pretrained", "name the weights"),
        ("torchvision:fcn_resnet50@IMAGENET1K_V1", "no classifier 'fcn_resnet50'"),
        (
            "torchvision:resnet50",
            "names no weights: say torchvision:resnet50@IMAGENET1K_V1, .*, or .*@random for random",
        ),
        ("timm:resnet10t", "names no weights: say timm:resnet10t@pretrained, "),
        ("torchvision:vit_b_16@random?size=65", "takes images of 224 px, not 65 .*no multiple.*use \\?size=224"),
        ("torchvision:alexnet@random?size=32", "does not run on images of 32 px"),
        ("timm:mixer_s32_224@random?size=96", "does not run on images of 96 px"),
        ("torchvision:resnet18@random?seed=x", "seed=x is not a whole number"),
        ("torchvision:resnet18@random?std=0,1,1", "std=0,1,1 must be above 0"),
        ("torchvision:resnet18@random?mean=nan,1,1", "not three numbers"),
        ("torchvision:resnet18@random?kind=other", "none of softmax, sigmoid, embedding"),
    ],
)
def test_specs_that_name_nothing(spec, message):
    with pytest.raises(FastconError, match=message):
        load(spec)


def test_a_python_factory(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 5))\n"
        "def number(): return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = load("python:mine:net?size=8")
    assert model(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).shape == (2, 5)
    with pytest.raises(FastconError, match="returned a int"):
        load("python:mine:number")


def test_what_a_python_factory_returns_must_be_its_last_layers_logits(tmp_path, monkeypatch):
    (tmp_path / "odd.py").write_text(
        "from torch import nn\n"
        "def net(*after): return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 5), *after)\n"
        "def softmax(): return net(nn.Softmax(1))\n"
        "def embedding(): return net(nn.LayerNorm(5))\n"
        "def maps(): return nn.Sequential(nn.Conv2d(3, 5, 1))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("softmax", "embedding"):
        with pytest.raises(FastconError, match="is not what its last layer, 2, computes: a MODEL is a classifier"):
            load(f"python:odd:{name}?size=8")
    with pytest.raises(FastconError, match=r"returns \(1, 5, 8, 8\), not logits of shape \(1, 5\)"):
        load("python:odd:maps?size=8")


@pytest.mark.parametrize(
    "name", ["torchvision:vit_b_16", "timm:vit_tiny_patch16_224", "timm:swin_tiny_patch4_window7_224"]
)
def test_a_transformer_takes_another_size(name, tmp_path):
    model, size = load(f"{name}@random?seed=3", classes=["a", "b", "c"]), 96
    torch.nn.init.normal_(model.head_module.layer.weight)  # torchvision's starts at zero
    (tmp_path / "m.safetensors").write_bytes(model.export("head"))
    pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    theirs = _at_another_size(name, load_file(tmp_path / "m.safetensors"), size)
    images = (pixels / 255 - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    with torch.no_grad():
        expected = theirs(images)
        resized = load(f"{tmp_path}/m.safetensors?size={size}")
        torch.testing.assert_close(resized(pixels), expected, rtol=1e-4, atol=1e-4)
        model.set_size(size)
        torch.testing.assert_close(model(pixels), expected, rtol=1e-4, atol=1e-4)
        (tmp_path / "again.safetensors").write_bytes(resized.export("head"))
        again = load(tmp_path / "again.safetensors")
    assert again.size == size
    torch.testing.assert_close(again(pixels), expected, rtol=1e-4, atol=1e-4)


def _at_another_size(name: str, state: dict[str, torch.Tensor], size: int) -> torch.nn.Module:
    """The library's own way: position embeddings interpolated while the weights are loaded."""
    kind, _, architecture = name.partition(":")
    if kind == "torchvision":
        net = zoo.vit_b_16(image_size=size, num_classes=3)
        net.load_state_dict(zoo.vision_transformer.interpolate_embeddings(size, 16, state))
        return net.eval()
    timm = pytest.importorskip("timm")
    if "swin" in architecture:  # windows shrink with the grid: only this way of timm's says how
        net = timm.create_model(architecture, num_classes=3)
        net.load_state_dict(state)
        net.set_input_size(img_size=(size, size))
        return net.eval()
    net = timm.create_model(architecture, num_classes=3, img_size=size)
    filtered = sys.modules[type(net).__module__].checkpoint_filter_fn(state, net)
    net.load_state_dict(filtered)
    return net.eval()


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_base_patch16_siglip_224", "resnet50_clip"])
def test_weights_without_a_classifier_are_no_classifier(name, monkeypatch):
    timm = pytest.importorskip("timm")
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained=False, **more: create(name, **more)
    )  # no download
    with pytest.raises(FastconError, match=f"has weights but no classifier.*teach --init timm:{name}@pretrained"):
        load(f"timm:{name}@pretrained")


def test_weights_without_a_classifier_can_be_fine_tuned(monkeypatch):
    timm = pytest.importorskip("timm")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **more: create(name, **more))
    model = load("timm:vit_small_patch16_dinov3@pretrained?size=64", untrained=True)
    assert model.feature_size == 384


def test_a_safetensors_file_of_torchvision_names(tmp_path):
    state = plain_state(tmp_path / "a.pt")
    save_file(state, tmp_path / "a.safetensors", metadata={"classes": json.dumps(list("wxyz")), "size": "40"})
    model = load(f"{ARCHITECTURE}@{tmp_path}/a.safetensors")
    assert model.heads[0].classes == tuple("wxyz")
    assert model.size == 40
    with pytest.raises(FastconError, match="does not say its architecture"):
        load(tmp_path / "a.safetensors")
    save_file(state, tmp_path / "b.safetensors", metadata={"classes": json.dumps(["one"])})
    with pytest.raises(FastconError, match="names 1 classes, its head has 4 outputs"):
        load(f"{ARCHITECTURE}@{tmp_path}/b.safetensors")


def test_the_digest_follows_the_weights(generalist_file, teacher_file):
    model = load(generalist_file)
    assert model.digest() == load(generalist_file).digest() != load(teacher_file).digest()
    before = model.digest()
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-6
    assert model.digest() != before


def test_the_real_generalist(shared_data):
    model = load(shared_data / "resnet18-tiny-imagenet-64.safetensors")
    assert (model.size, model.architecture, len(model.heads[0].classes)) == (64, "torchvision:resnet18", 200)


def test_timm_models():
    pytest.importorskip("timm", reason="the timm extra is not installed")
    model = load("timm:resnet10t@random?size=32", classes=["a", "b"])
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert model(pixels).shape == (2, 2)
    assert model.features(pixels).shape == (2, 512)


def test_random_weights_are_the_same_for_the_same_spec():
    first, again, other = (load(f"{ARCHITECTURE}@random?size=32{seed}").digest() for seed in ("", "&seed=0", "&seed=1"))
    assert first == again != other


def test_a_data_file_does_not_choose_code(tmp_path, monkeypatch):
    (tmp_path / "chosen.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"architecture": "python:chosen:net"})
    with pytest.raises(FastconError, match="a network of your own code: give it as python:chosen:net@FILE"):
        load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "mps", "cuda"])
def test_devices_that_are_not_there(device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(FastconError, match=f"`device` {device}"):
        choose_device(device)


def test_one_of_several_heads(tmp_path, generalist_file):
    model = load(generalist_file)
    model.replace_heads([model.heads[0], Head("new", ("x", "y"))], keep={"head": 0}, seed=0)
    run = tmp_path / "run"
    run.mkdir()
    (run / "student.safetensors").write_bytes(model.export("head"))
    (run / "heads.safetensors").write_bytes(model.export_heads())
    both, one = load(run), load(f"{run}?head=new")
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(one(pixels), both.split(both(pixels))["new"])
    assert [head.classes for head in one.heads] == [("x", "y")]
    with pytest.raises(FastconError, match="no head 'z': there are head, new"):
        load(f"{run}?head=z")


def config_of(path: Path, **changes) -> str:
    """A RUN of `train` with two teachers, as far as `origin` looks at it."""
    teacher = {"task": "birds", "split": "t", "split_seed": 0, "architecture": "torchvision:resnet18"}
    config = {
        "command": "train", "method": "consolidate", "balance": [1.0, 3.0], "labels": False, "weight": [["birds-split0", 0.5]],
        "seed": 0, "epochs": 2, "heads": ["birds-split0"], "threads": 2, "versions": {},
        "store": {"recipe": {"size": 32}, "views": 4, "images": "digest", "generalist": "broad",
                  "teachers": {"broad": "digest", "birds-split0": "digest"}},
        "lineage": {"proxy": "photos", "teachers": {"birds-split0": teacher}},
    } | changes  # fmt: skip
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def test_the_lineage_of_a_student(tmp_path):
    facts = origin(config_of(tmp_path / "one"))
    assert (facts["name"], facts["method"], facts["teachers"]) == ("one", "consolidated", ["birds-split0"])
    lineage = facts["lineage"]
    assert (lineage["seed"], lineage["proxy"], lineage["balance"], lineage["labels"]) == (0, "photos", "1:3", False)
    assert [teacher["task"] for teacher in lineage["teachers"]] == ["birds"]
    other = {"task": "birds", "split": "t", "split_seed": 1, "architecture": "torchvision:resnet18"}
    repeated = config_of(
        tmp_path / "two", seed=1, threads=1, heads=["birds-split1"], weight=[["birds-split1", 0.5]],
        store={"recipe": {"size": 32}, "views": 4, "images": "digest", "generalist": "broad",
               "teachers": {"broad": "digest", "birds-split1": "another"}},
        lineage={"proxy": "photos", "teachers": {"birds-split1": other}},
    )  # fmt: skip
    assert origin(repeated)["lineage"]["recipe"] == lineage["recipe"]
    for k, change in enumerate(({"epochs": 3}, {"weight": None}, {"temperature": 1.0})):
        assert origin(config_of(tmp_path / f"other{k}", **change))["lineage"]["recipe"] != lineage["recipe"]
    former = config_of(tmp_path / "former", lineage=None)
    assert "lineage" not in origin(former)


def test_what_a_teacher_was_taught(tmp_path):
    data = {"task": "cars:t", "train": ["cars"], "split": "t2/5", "split_seed": 3}
    (tmp_path / "config.json").write_text(json.dumps({"command": "teach", "data": data, "seed": 5, "lr_grid": [0.1]}))
    assert taught(f"{tmp_path}?size=64") == {"task": "cars", "split": "t2/5", "split_seed": 3}
    assert origin(str(tmp_path))["lineage"]["seed"] == 5
    assert taught("torchvision:resnet18@random") == {}
    assert origin("torchvision:resnet18@random").get("lineage") is None

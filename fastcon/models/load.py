"""MODEL specs → a `Classifier`.

    torchvision:resnet50@IMAGENET1K_V2 · torchvision:resnet18@weights.safetensors · torchvision:resnet18@random
    timm:NAME@pretrained|weights|random · python:module:factory[@weights] · weights.safetensors with metadata · a RUN
    options after '?': ?size=64&mean=0.5,0.5,0.5&std=0.2,0.2,0.2&seed=1 (of random weights)
        &head=NAME (one of a run's) &kind=sigmoid (a multi-label classifier) &kind=embedding (the features its last layer
        is given; of python: what the network returns)

Weights are read as safetensors or with weights_only=True.
"""

from __future__ import annotations

import difflib
import importlib
import json
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from fastcon.errors import FastconError, one_line, optional_import
from fastcon.kernels.multihead_ce import KINDS
from fastcon.models.classifier import IMAGENET_MEAN, IMAGENET_STD, NO_CLASSIFIER, Classifier, Head, Tower, head_path
from fastcon.models.sizes import resize
from fastcon.run import RUN_HEADS, RUN_WEIGHTS


def load(
    spec: str | Path, *, size: int | None = None, classes: Sequence[str] | None = None, untrained: bool = False
) -> Classifier:
    """Load a MODEL in eval mode, on the CPU, in float32, after running one image through it.

    size: input size where neither the spec nor the weights name one (default 224). classes: class names for random weights.
    untrained: take a spec without weights as one with @random, and weights without a classifier with a random one;
    else both are errors. A RUN is loaded with all its heads. Raises FastconError.
    """
    text = str(spec)
    path, _, query = text.partition("?")
    options = dict(parse_qsl(query))
    unknown = set(options) - {"size", "mean", "std", "seed", "head", "kind"}
    if unknown:
        raise FastconError(
            f"{text}: unknown option {sorted(unknown)[0]!r}; there are size, mean, std, seed, head and kind"
        )
    embedding = options.get("kind") == "embedding"
    if Path(path).is_dir():
        model = _load_run(Path(path), {k: v for k, v in options.items() if k != "kind" or not embedding})
        if "head" in options:
            model.keep_head(options["head"])
        if embedding:
            model.embed()
        return model
    if path.endswith(".safetensors") and ":" not in path.split("/")[0]:
        if not Path(path).is_file():
            raise FastconError(f"no such weights file: {path}")
        return from_bytes(Path(path).read_bytes(), path, options)
    architecture, _, weights = path.partition("@")
    _check_architecture(architecture)
    if not (weights or untrained or architecture.startswith("python:")):
        raise FastconError(f"{text} names no weights: {_ways_to_weights(architecture)}")
    state, meta = _weights(architecture, weights)
    if (untrained or embedding) and meta.get("pretrained"):
        meta["pretrained"] = "backbone"
    return _assemble(architecture, state, meta, options, size, classes, text)


def _ways_to_weights(architecture: str) -> str:
    ways = [f"{architecture}@FILE", f"{architecture}@random for random ones"]
    if architecture.startswith("timm:"):
        ways.insert(0, f"{architecture}@pretrained")
    elif architecture.startswith("torchvision:"):
        from torchvision import models

        enum = models.get_model_weights(architecture.removeprefix("torchvision:"))
        ways[:0] = [f"{architecture}@{weights.name}" for weights in enum]
    return "say " + ", ".join(ways[:-1]) + f", or {ways[-1]}"


def from_bytes(data: bytes, origin: str, options: Mapping[str, str] | None = None) -> Classifier:
    """A Classifier from a safetensors file whose metadata names the architecture, as fastcon writes them."""
    meta = _metadata(data, origin)
    if "architecture" not in meta:
        raise FastconError(f"{origin} does not say its architecture: give torchvision:NAME@{origin}")
    architecture = meta["architecture"]
    if architecture.startswith("python:"):  # a data file must not choose code to run
        raise FastconError(f"{origin} is a network of your own code: give it as {architecture}@FILE")
    return _assemble(architecture, load_safetensors(data), meta, options or {}, None, None, origin)


def _outputs(net: nn.Module, path: str) -> int:
    weight = net.get_submodule(path).weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def build(architecture: str, classes: int) -> nn.Module:
    """A network of `classes` outputs with random weights."""
    _check_architecture(architecture)
    kind, _, name = architecture.partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "torchvision":
            return _build_torchvision(name, classes)
        if kind == "timm":
            try:
                return optional_import("timm", "timm").create_model(name, num_classes=classes)
            except RuntimeError as error:
                raise FastconError(f"timm has no model {name!r} ({error})") from error
        return _build_python(architecture, name)


def _pretrained_timm(architecture: str, headless: bool) -> tuple[nn.Module, dict[str, str]]:
    """A timm network with the weights, classes and preprocessing that timm itself gives it.

    headless: where it comes without a classifier, give it a random one, and no error.
    """
    timm, name = optional_import("timm", "timm"), architecture.removeprefix("timm:")
    try:
        net = timm.create_model(name, pretrained=True)
        if not _classifies(net) and headless:
            net = timm.create_model(name, pretrained=True, num_classes=1000)
    except (RuntimeError, OSError) as error:
        first = str(error).strip().split("\n")[0][:160]
        raise FastconError(
            f"{architecture} did not come with weights ({first}): give a file, as {architecture}@FILE"
        ) from error
    if not (headless or _classifies(net)):
        raise FastconError(
            f"{architecture} has weights but no classifier: {NO_CLASSIFIER}; fine-tune it for a task first, with "
            f"fastcon teach --init {architecture}@pretrained"
        )
    config = net.pretrained_cfg
    meta = {"size": str(config["input_size"][-1])}
    return net, meta | {key: ",".join(map(str, config[key])) for key in ("mean", "std")}


def _classifies(net: Any) -> bool:
    """Whether the pretrained weights of a timm network include a classifier: DINO has none, CLIP's is a projection."""
    config = net.pretrained_cfg
    contrastive = "clip" in f"{config.get('architecture')}.{config.get('tag')}"
    of_imagenet = optional_import("timm.data", "timm").infer_imagenet_subset(config) is not None
    return config["num_classes"] > 0 and (of_imagenet or not contrastive)


def _check_architecture(architecture: str) -> None:
    """Refuse a spec without a library, and a torchvision name that is not a classifier, before looking for weights."""
    if not architecture.startswith(("torchvision:", "timm:", "python:")):
        raise FastconError(
            f"{architecture!r} is no model: torchvision:NAME, timm:NAME, python:module:factory, a "
            ".safetensors file of fastcon's, or the folder of a run"
        )
    if architecture.startswith("torchvision:"):
        from torchvision import models

        name, names = architecture.removeprefix("torchvision:"), models.list_models(module=models)
        if name not in names:
            close = difflib.get_close_matches(name, names, 3)
            raise FastconError(
                f"torchvision has no classifier {name!r}" + (f"; close: {', '.join(close)}" if close else "")
            )


def _build_torchvision(name: str, classes: int) -> nn.Module:
    from torchvision import models

    extra: dict[str, Any] = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, weights=None, num_classes=classes, **extra)


def _build_python(architecture: str, name: str) -> nn.Module:
    module, _, factory = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        net = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError) as error:
        raise FastconError(
            f"{architecture}: {error}; python:MODULE:FACTORY names a function without arguments that "
            "returns a torch.nn.Module"
        ) from error
    if not isinstance(net, nn.Module):
        raise FastconError(f"{architecture} returned a {type(net).__name__}, not a torch.nn.Module")
    return net


State = dict[str, Tensor]


def _weights(architecture: str, weights: str) -> tuple[State | None, dict[str, str]]:
    """State dict and metadata of what follows '@': nothing, a torchvision enum, or a file."""
    if weights in ("", "random"):
        return None, {}
    if weights == "pretrained":
        if not architecture.startswith("timm:"):
            raise FastconError(f"{architecture}@pretrained: name the weights, as torchvision:resnet50@IMAGENET1K_V2")
        return None, {"pretrained": weights}
    if "/" not in weights and "." not in weights and architecture.startswith("torchvision:"):
        return _torchvision_weights(architecture.removeprefix("torchvision:"), weights)
    path = Path(weights).expanduser()
    if not path.is_file():
        raise FastconError(f"no such weights file: {weights} (for {architecture})")
    if path.suffix == ".safetensors":
        data = path.read_bytes()
        meta = _metadata(data, weights)
        meta.pop("architecture", None)
        return load_safetensors(data), meta
    return _unwrapped(_torch_load(path), weights), {}


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first = str(error).strip().split("\n")[0][:160]
        raise FastconError(
            f"{path} holds no plain weights ({first}): only tensors are loaded, pickled code is never "
            "run; save its state_dict, or convert it to safetensors"
        ) from error


def _torchvision_weights(name: str, weights: str) -> tuple[State, dict[str, str]]:
    from torchvision import models

    try:
        entry = models.get_model_weights(name)[weights]
    except (KeyError, ValueError) as error:
        raise FastconError(
            f"torchvision has no weights {weights!r} for {name!r}, and no file of that name is here"
        ) from error
    preset = entry.transforms()
    mean, std = preset.mean, preset.std
    if name in ("googlenet", "inception_v3"):  # with these weights torchvision re-normalises inside (transform_input)
        mean, std = [0.5] * 3, [0.5] * 3
    meta = {
        "classes": json.dumps(entry.meta["categories"]),
        "size": str(preset.crop_size[0]),
        "mean": ",".join(map(str, mean)),
        "std": ",".join(map(str, std)),
    }
    try:
        return dict(entry.get_state_dict(progress=False, check_hash=True)), meta
    except OSError as error:
        raise FastconError(
            f"the weights {weights} of {name} could not be downloaded ({error}): give a file, as "
            f"torchvision:{name}@FILE"
        ) from error


def _metadata(data: bytes, origin: str) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        load_safetensors(data)
    except (SafetensorError, ValueError) as error:
        raise FastconError(f"{origin} is no readable safetensors file ({error}): fetch or write it again") from error
    return dict(header.get("__metadata__") or {})


def _unwrapped(state: Any, origin: str) -> State:
    """The state dict inside a third-party checkpoint: state_dict, model, module. and the like."""
    for key in ("state_dict", "model_state_dict", "model", "net"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()) or not state:
        raise FastconError(f"{origin} holds no state dict of tensors")
    for prefix in ("module.", "_orig_mod.", "model."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _assemble(
    architecture: str,
    state: State | None,
    meta: Mapping[str, str],
    options: Mapping[str, str],
    size: int | None,
    classes: Sequence[str] | None,
    origin: str,
) -> Classifier:
    with torch.random.fork_rng(devices=[]):  # the same random weights for the same spec, always
        torch.manual_seed(_whole(options.get("seed", "0"), "seed", origin))
        if meta.get("pretrained"):
            net, meta = _pretrained_timm(architecture, meta["pretrained"] == "backbone")
        else:
            net = build(architecture, len(classes) if classes else 1000)
    settings = dict(meta) | dict(options)
    side = _size(settings.get("size"), size, origin)
    embedding = options.get("kind") == "embedding"
    whole = embedding and architecture.startswith("python:")  # what it returns is the embedding: it has no head
    path = "" if whole else head_path(net, origin)
    if state is not None:
        net = _load_state(net, path, architecture, state, int(meta.get("size", side)), origin, headless=embedding)
    resize(net, side, origin)
    if whole:
        net, meta, path = _with_a_head(net, side, origin), {}, "1"
    outputs = _outputs(net, path)
    names = tuple(json.loads(meta["classes"])) if "classes" in meta else tuple(classes or ())
    if len(names) != outputs:
        if names:
            raise FastconError(f"{origin} names {len(names)} classes, its head has {outputs} outputs")
        names = tuple(f"class {i}" for i in range(outputs))
    std = _triple(settings.get("std"), IMAGENET_STD, origin)
    if min(std) <= 0:
        raise FastconError(f"{origin}: std={settings['std']} must be above 0")
    head = Head(
        meta.get("head", "head"), names, "softmax" if embedding else _kind(settings.get("kind", "softmax"), origin)
    )
    model = Classifier(
        net,
        [head],
        architecture=architecture,
        size=side,
        mean=_triple(settings.get("mean"), IMAGENET_MEAN, origin),
        std=std,
    ).eval()
    if embedding:
        model.embed()
    model.try_once(origin)
    return model


def _with_a_head(net: nn.Module, side: int, origin: str) -> nn.Module:
    """A network of embeddings with a layer after it, to be what its features are the input of."""
    try:
        with torch.no_grad():
            out = net.eval()(torch.zeros(1, 3, side, side))
    except Exception as error:
        raise FastconError(f"{origin} does not run on images of {side} px ({one_line(error)})") from error
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != 1:
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise FastconError(f"{origin} returns {shape} for an image, not an embedding [1, D]")
    return Tower(net, nn.Linear(out.shape[1], 1))


def _load_state(
    net: nn.Module, path: str, architecture: str, state: State, side: int, origin: str, headless: bool = False
) -> nn.Module:
    """The network with a state dict loaded, which belongs to images of `side` pixels; headless: it may lack the head."""
    weight = state.get(f"{path}.weight")
    if weight is not None and weight.shape[0] != _outputs(net, path):
        net = build(architecture, weight.shape[0])
    if any(key in state and state[key].shape != value.shape for key, value in net.state_dict().items()):
        resize(net, side, origin)
    expected = net.state_dict()
    state = {k: v for k, v in state.items() if k in expected or not k.startswith(("aux", "AuxLogits"))}
    state = {k: v for k, v in state.items() if k in expected or not k.endswith("num_batches_tracked")}
    optional = {f"{path}.weight", f"{path}.bias"} if headless else set()
    missing = [k for k in expected if k not in state and k not in optional and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in expected]
    shapes = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(expected[k].shape)}"
        for k in state
        if k in expected and state[k].shape != expected[k].shape
    ]
    if missing or unexpected or shapes:
        problems = [
            f"{what}: {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
            for what, keys in (("missing", missing), ("unexpected", unexpected), ("other shape", shapes))
            if keys
        ]
        raise FastconError(f"the weights of {origin} do not fit {architecture}: {'; '.join(problems)}")
    expected.update(state)  # the network's own dict, since it carries the version that MNASNet asks for
    net.load_state_dict(expected)
    return net


def _load_run(run: Path, options: Mapping[str, str]) -> Classifier:
    weights = next((run / name for name in RUN_WEIGHTS if (run / name).is_file()), None)
    if weights is None:
        unfinished = (run / "config.json").exists()
        raise FastconError(
            f"{run} holds no {' or '.join(RUN_WEIGHTS)}: "
            + ("the run is not finished, run its command again" if unfinished else "give the folder of a run")
        )
    model = from_bytes(weights.read_bytes(), str(weights), options)
    if (run / RUN_HEADS).is_file():
        _attach_heads(model, run / RUN_HEADS)
    return model


def _attach_heads(model: Classifier, path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["heads"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    heads = [Head(item["name"], tuple(item["classes"]), item["kind"]) for item in described]
    first = model.heads[0]
    untrained = [] if any(head.name == first.name for head in heads) else [first]
    model.replace_heads([*heads, *untrained], keep={first.name: 0}, seed=0)
    with torch.no_grad():
        for head in heads:
            _, columns = model.head_index(head.name)
            model.head_module.layer.weight[columns] = tensors[f"{head.name}.weight"]
            if model.head_module.layer.bias is not None:
                model.head_module.layer.bias[columns] = tensors[f"{head.name}.bias"]


def _size(given: str | None, default: int | None, origin: str) -> int:
    size = _whole(given, "size", origin) if given is not None else default or 224
    if not 8 <= size <= 4096:
        raise FastconError(f"{origin}: size={size} is outside 8 to 4096 pixels")
    return size


def _whole(text: str, what: str, origin: str) -> int:
    if not text.isdecimal():
        raise FastconError(f"{origin}: {what}={text} is not a whole number")
    return int(text)


def _kind(text: str, origin: str) -> str:
    if text not in KINDS:
        raise FastconError(f"{origin}: kind={text} is none of {', '.join(KINDS)}")
    return text


def _triple(given: str | None, default: tuple[float, ...], origin: str) -> tuple[float, ...]:
    if given is None:
        return default
    try:
        values = tuple(float(part) for part in given.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or not all(map(math.isfinite, values)):
        raise FastconError(f"{origin}: {given!r} is not three numbers for red, green and blue, as 0.5,0.5,0.5")
    return values

"""A RUN → files that others can use without fastcon: ONNX, a state dict, and a model card of what was recorded."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastcon.distill.loss import head_weights
from fastcon.distill.options import AUTO
from fastcon.errors import FastconError, one_line, optional_import
from fastcon.files import write_atomically, write_json
from fastcon.models.classifier import Classifier
from fastcon.models.load import load
from fastcon.report.results import read
from fastcon.report.tables import difference
from fastcon.run import Waits

TOLERANCE = 1e-3
"""Most that an output of the ONNX file may differ from PyTorch's, relative to the larger of 1 and its largest value."""
CARD, ONNX, WEIGHTS = "README.md", "model.onnx", "weights.safetensors"
Say = Callable[[str], None]


class _Outputs(nn.Module):
    """Features and the logits of each head, from one pass."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        features = self.model.features(pixels)
        logits = self.model.head_module.layer(features)
        return features, *logits.split([len(head.classes) for head in self.model.heads], 1)


def export(
    run: str,
    out: str,
    head: str | None = None,
    onnx: bool = True,
    results: Sequence[str] = (),
    licence: str | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Write OUT/weights.safetensors, OUT/model.onnx, OUT/classes.json and OUT/README.md, the model card; returns facts.

    run: a finished RUN of `train` or `teach`. head: the one that the state dict gets (default: the first); ONNX has all of
    them. onnx: whether to write it; it takes uint8 pixels [B, 3, size, size] and gives `features` [B, D] and each head's logits
    [B, C], and is checked with ONNX Runtime. results: RESULTS whose accuracies of this run the card shows. licence: of the
    weights, for the card. Raises FastconError.
    """
    config = _config(run)
    model = load(run)
    chosen = head or model.heads[0].name
    model.head_index(chosen)
    card = _card(Path(run), config, model, chosen, onnx, results, licence)
    folder = _folder(out)
    write_atomically(folder / WEIGHTS, model.export(chosen))
    write_json(folder / "classes.json", {each.name: list(each.classes) for each in model.heads})
    facts: dict[str, Any] = {"out": out, "head": chosen, "onnx": None}
    if onnx:
        facts["onnx"] = {"largest_difference": _onnx(model, folder / ONNX)}
        say(f"{folder / ONNX}: largest difference to PyTorch {facts['onnx']['largest_difference']:.1e}")
    write_atomically(folder / CARD, card.encode())
    return facts


def _config(run: str) -> dict[str, Any]:
    try:
        config = json.loads((Path(run) / "config.json").read_text())
        if config["command"] not in ("train", "teach"):
            raise ValueError(f"it is a run of {config['command']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FastconError(f"{run} is not a run of train or teach ({one_line(error)})") from error
    return config


def _folder(out: str) -> Path:
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / WEIGHTS).exists())):
        raise FastconError(f"{out} holds other files: give an empty or a new folder as `out`")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _onnx(model: Classifier, path: Path) -> float:
    """Write the ONNX file and run it: the largest relative difference of an output. Raises FastconError beyond TOLERANCE."""
    for module in ("onnx", "onnxscript"):
        optional_import(module, "onnx")
    runtime = optional_import("onnxruntime", "onnx")
    outputs = _Outputs(model).eval()
    pixels = torch.randint(0, 256, (2, 3, model.size, model.size), dtype=torch.uint8)
    names = ["features", *(head.name for head in model.heads)]
    batch = {"pixels": {0: torch.export.Dim("batch")}}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                outputs,
                (pixels,),
                dynamo=True,
                input_names=["pixels"],
                output_names=names,
                dynamic_shapes=batch,
                verbose=False,
            )
        program.save(str(path))  # type: ignore[union-attr]
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        tried = torch.randint(0, 256, (5, 3, model.size, model.size), dtype=torch.uint8)
        theirs = session.run(None, {"pixels": tried.numpy()})
    except Exception as error:  # whatever an exporter may raise for a network it does not know
        raise FastconError(
            f"{model.architecture} cannot be written as ONNX ({one_line(error)}): leave it out, `onnx` no"
        ) from error
    with torch.inference_mode():
        ours = outputs(tried)
    differences = [
        float((mine - torch.from_numpy(other)).abs().max() / mine.abs().max().clamp_min(1))
        for mine, other in zip(ours, theirs, strict=True)
    ]
    if max(differences) > TOLERANCE:
        path.unlink()
        raise FastconError(
            f"{path} would differ from PyTorch by {max(differences):.1e} (at most {TOLERANCE:g} is allowed)"
        )
    return max(differences)


# the model card


def _card(
    run: Path,
    config: dict[str, Any],
    model: Classifier,
    head: str,
    onnx: bool,
    results: Sequence[str],
    licence: str | None,
) -> str:
    parts = [
        f"---\nlicense: {licence or 'other'}\ntags: [image-classification, knowledge-distillation, fastcon]\n---\n",
        f"# {run.name}\n",
        _opening(config, model),
        "## Heads\n",
        _heads(config, model),
        "## Training\n",
        _training(run, config),
        *_accuracies(run, results),
        "## Files\n",
        _files(model, head, onnx),
        "## Licence\n",
        (f"{licence}.\n" if licence else "Not stated by whoever exported this model.\n")
        + "The weights derive from the networks and images named above, each of which has terms of its own.\n",
    ]
    return "\n".join(parts)


def _opening(config: dict[str, Any], model: Classifier) -> str:
    version = config["versions"]["fastcon"]
    network = f"{model.architecture} at {model.size} px"
    if config["command"] == "teach":
        return f"{network}, fine-tuned from {config['init']} with fastcon {version}.\n"
    return (
        f"{network}, trained with fastcon {version} by the method `{config['method']}` of *Representation Consolidation for "
        "Training Expert Students* (Li et al., arXiv 2107.08039): several teachers distilled over unlabelled images into "
        "one backbone, to be used for its frozen features or as a start for fine-tuning.\n"
    )


def _heads(config: dict[str, Any], model: Classifier) -> str:
    store = config.get("store", {})
    digests, taught = store.get("teachers", {}), config.get("lineage", {}).get("teachers", {})
    weights = {}
    if digests:
        given = [tuple(pair) for pair in config["weight"] or [] if pair != AUTO]
        weights = dict(
            zip(digests, head_weights(list(digests), store["generalist"], config["balance"], given), strict=True)
        )
    lines = ["| head | classes | kind | λ | teacher (digest of its weights) |", "|---|---|---|---|---|"]
    for head in model.heads:
        what = taught.get(head.name, {})
        general = "the generalist: " if head.name == store.get("generalist") else ""
        about = f"{what['task']}, split {what['split']}: " if what else general
        weight = f"{weights[head.name]:g}" if head.name in weights else ""
        digest = f"`{digests[head.name][:16]}`" if head.name in digests else ""
        lines.append(f"| {head.name} | {len(head.classes):,} | {head.kind} | {weight} | {about}{digest} |")
    return "\n".join(lines) + "\n"


def _training(run: Path, config: dict[str, Any]) -> str:
    facts = {}
    if config["command"] == "train":
        store, recipe = config["store"], config["store"]["recipe"]
        facts["proxy"] = f"{config.get('lineage', {}).get('proxy', 'images')}, digest `{store['images'][:16]}`"
        facts["views"] = (
            f"{config['views'] or store['views']} per image, {recipe['size']} px, crops of {recipe['scale'][0]:g} to "
            f"{recipe['scale'][1]:g} of the area, seed {recipe['seed']}"
        )
    else:
        data = config["data"]
        facts["data"] = (
            f"{data['task']}, split {data['split']} (seed {data['split_seed']}), {config['train_images']:,} images"
        )
    shown = ("epochs", "batch_size", "lr_backbone", "lr_heads", "temperature", "batch_norm", "precision", "seed")
    facts |= {key.replace("_", " "): str(config[key]) for key in shown if config.get(key) is not None}
    last = _last(run / "metrics.jsonl")
    for name, head in last.get("heads", {}).items():
        facts[f"last, head {name}"] = ", ".join(f"{key} {value:.3f}" for key, value in head.items())
    if (run / "result.json").exists():
        facts["accuracy on its test images"] = f"{json.loads((run / 'result.json').read_text())['accuracy']:.2%}"
    seconds = _seconds(run)
    if seconds:
        facts["training time"] = f"{seconds / 60:.1f} minutes"
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items())]) + "\n"


def _last(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return {}


def _seconds(run: Path) -> float:
    try:
        return sum(json.loads(line)["seconds"] for line in (run / Waits.FILE).read_text().splitlines())
    except (OSError, ValueError, KeyError):
        return 0.0


def _accuracies(run: Path, results: Sequence[str]) -> list[str]:
    """A table for each protocol that has this run. Raises FastconError where none of the results has it."""
    if not results:
        return []
    tables = [table for table in read(results).tables.values() if run.name in table.rows]
    if not tables:
        raise FastconError(f"`results` hold no accuracy of {run.name}")
    parts = []
    for table in tables:
        lines = [
            f"## Accuracy, {table.title}\n",
            "| task | accuracy, % | against the generalist, points |",
            "|---|---|---|",
        ]
        for task in table.tasks:
            cell = table.cells.get((run.name, task))
            if cell is not None:
                half = "" if cell.ci95 is None else f" ± {cell.ci95:.1f}"
                lines.append(f"| {task} | {cell.value:.1f}{half} | {difference(table, run.name, task)} |")
        parts.append("\n".join(lines) + "\n")
    return parts


def _files(model: Classifier, head: str, onnx: bool) -> str:
    mean, std = ([round(value, 4) for value in values] for values in (model.mean, model.std))
    lines = [
        f"- `{WEIGHTS}`: state dict of {model.architecture} with the head `{head}`, under the library's own names; it takes RGB in "
        f"0 … 1, less {mean}, over {std}.",
        "- `classes.json`: the class names of each head.",
    ]
    if onnx:
        lines.append(
            f"- `{ONNX}`: takes `pixels`, uint8 RGB [batch, 3, {model.size}, {model.size}] (normalisation is inside), gives `features` "
            f"and the logits of {', '.join(f'`{each.name}`' for each in model.heads)}."
        )
    side = round(model.size * 256 / 224)
    lines.append(f"- Images are resized to {side} px on their short side, and the central {model.size} px are taken.")
    return "\n".join(lines) + "\n"

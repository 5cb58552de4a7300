"""The whole of fastcon against the plainest loop there is: PyTorch, torchvision and Pillow, teachers run online, nothing stored."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import torch
import zarr
from conftest import BATCH, RECIPE
from PIL import Image
from safetensors.torch import load_file
from test_train import QUICK, UPKEEP
from torch import nn
from torchvision.models import shufflenet_v2_x0_5
from torchvision.transforms.v2 import functional

from fastcon.distill.precompute import precompute
from fastcon.distill.train import train
from fastcon.machine import Machine

EPOCHS, STEPS_AN_EPOCH, ROWS = 2, 4, 32
RATES = 1e-4, 1e-3
"""Of backbone and heads: a tenth of the paper's, at which these random networks amplify rounding to the size of a step."""
MEAN, STD = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def _network(file, classes: int) -> nn.Module:
    network = shufflenet_v2_x0_5(num_classes=classes)
    network.load_state_dict(load_file(file))
    return network.eval()


def _views(store: zarr.Group, folder, view: int, rows: slice, size: int) -> torch.Tensor:
    """The crops that the store names, cut out of the photos: float32 [B, 3, size, size], normalised."""
    names, ends = store["images/names"][:].tobytes(), store["images/name_ends"][:]
    crops = []
    for image, box, flip in zip(*(store[part][view, rows] for part in ("order", "boxes", "flips")), strict=True):
        name = names[ends[image - 1] if image else 0 : ends[image]].decode()
        photo = Image.open(io.BytesIO((folder / name).read_bytes())).convert("RGB")
        crop = functional.crop(photo, *box.tolist())
        crop = functional.resize(functional.horizontal_flip(crop) if flip else crop, [size, size], antialias=True)
        crops.append(functional.pil_to_tensor(crop))
    return (torch.stack(crops).float() / 255 - MEAN) / STD


def _written_out(store: zarr.Group, folder, generalist_file, teacher_file) -> nn.Module:
    """A student of Eq. 1 and 2: starts as the generalist with a new head beside its own; SGD, on running statistics."""
    teachers = [(_network(generalist_file, 10), 32), (_network(teacher_file, 3), 40)]
    student = _network(generalist_file, 10)
    old = student.fc
    torch.manual_seed(0)
    _, new = nn.Linear(1024, 10), nn.Linear(1024, 3)
    student.fc = nn.Linear(1024, 13)
    with torch.no_grad():
        student.fc.weight.copy_(torch.cat([old.weight, new.weight]))
        student.fc.bias.copy_(torch.cat([old.bias, new.bias]))
    backbone = [value for name, value in student.named_parameters() if not name.startswith("fc.")]
    groups = [{"params": backbone, "lr": RATES[0]}, {"params": student.fc.parameters(), "lr": RATES[1]}]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=1e-4)
    for step in range(EPOCHS * STEPS_AN_EPOCH):
        progress = step / (EPOCHS * STEPS_AN_EPOCH)
        for group, rate in zip(optimizer.param_groups, RATES, strict=True):
            group["lr"] = rate * 0.1 ** ((progress >= 0.5) + (progress >= 0.8))
        view, at = divmod(step, STEPS_AN_EPOCH)
        rows = slice(at * ROWS, (at + 1) * ROWS)
        loss = torch.zeros(())
        for logits, (teacher, size) in zip(
            student(_views(store, folder, view, rows, 32)).split([10, 3], 1), teachers, strict=True
        ):
            with torch.no_grad():
                target = (teacher(_views(store, folder, view, rows, size)) / 2).softmax(1)
            loss = loss - (target * (logits / 2).log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


def test_a_student_is_that_of_the_plainest_loop(tmp_path, proxy, proxy_folder, teachers, generalist_file, teacher_file):
    machine = Machine("cpu", "float32", loader="torchvision")
    path = str(tmp_path / "store")
    precompute(path, proxy, teachers, RECIPE, EPOCHS, machine, BATCH, "float32")
    options = replace(QUICK, epochs=EPOCHS, batch_size=ROWS, lanes=1, lr_backbone=RATES[0], lr_heads=RATES[1])
    train(path, str(tmp_path / "run"), options, machine, UPKEEP, proxy)
    plain = _written_out(zarr.open_group(path, mode="r"), proxy_folder, generalist_file, teacher_file).state_dict()

    ours = load_file(tmp_path / "run" / "student.safetensors")
    heads = load_file(tmp_path / "run" / "heads.safetensors")
    ours["fc.weight"] = torch.cat([heads["general.weight"], heads["letters.weight"]])
    ours["fc.bias"] = torch.cat([heads["general.bias"], heads["letters.bias"]])
    start = load_file(generalist_file)
    assert set(ours) == set(plain)
    for name, value in plain.items():
        if not value.is_floating_point():
            continue
        moved = 0.0 if name.startswith("fc.") else float((value - start[name]).abs().max())
        error = float((ours[name] - value).abs().max())
        assert error <= 1e-6 + 0.01 * moved, (name, error, moved)
    backbone = [name for name in plain if plain[name].is_floating_point() and not name.startswith("fc.")]
    assert (
        np.mean([float((plain[name] - start[name]).abs().max()) > 1e-6 for name in backbone if "running" not in name])
        > 0.9
    )

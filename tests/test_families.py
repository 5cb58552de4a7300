"""Architectures go the whole way, precompute → train → RUN → load, with the logits of the library's own networks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MACHINE
from safetensors.torch import load as tensors_of
from test_train import QUICK, UPKEEP
from torch import Tensor, nn
from torchvision import models as zoo

from fastcon.data.manifest import Manifest, index
from fastcon.distill.loader import Loader
from fastcon.distill.precompute import Teacher, precompute
from fastcon.distill.train import train
from fastcon.models.classifier import IMAGENET_MEAN, IMAGENET_STD, Classifier
from fastcon.models.load import load
from fastcon.store.format import Recipe

CLASSES = [f"class {k}" for k in range(7)]
FAST = ["torchvision:resnet18", "timm:convnext_atto", "timm:vit_tiny_patch16_224", "timm:tiny_vit_5m_224"]
TORCHVISION = """alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3:96 maxvit_t:224
    mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_1
    swin_t swin_v2_t vgg11_bn vit_b_32 wide_resnet50_2"""
TIMM = """resnet10t resnetv2_50 tf_efficientnet_lite0 mobilenetv3_small_050 mobilenetv4_conv_small ghostnet_100
    convnextv2_atto mobilevit_xxs edgenext_xx_small poolformer_s12 mixer_s32_224:224 resmlp_12_224:224 xcit_nano_12_p16_224
    pvt_v2_b0 repvgg_a0 dla46x_c fastvit_t8 nf_regnet_b0 inception_next_atto starnet_s1 tinynet_e
    visformer_tiny:224 pit_ti_224:224 regnetx_002 swin_tiny_patch4_window7_224:224 cspresnet50 rexnet_100 hgnet_tiny skresnet18"""
SLOW = [
    f"{package}:{name}" for package, names in (("torchvision", TORCHVISION), ("timm", TIMM)) for name in names.split()
]


@pytest.fixture(scope="module")
def twelve(proxy_folder: Path) -> Manifest:
    return index([str(proxy_folder)]).select(np.arange(12))


@pytest.mark.parametrize("spec", [*FAST, *(pytest.param(spec, marks=pytest.mark.slow) for spec in SLOW)])
def test_a_family_goes_the_whole_way(spec, twelve, tmp_path):
    package, name, *size = spec.split(":")
    side = int(size[0]) if size else 64
    network = load(f"{package}:{name}@random?size={side}", classes=CLASSES)
    if name == "inception_v3":
        _settle_statistics(network)
    weights = tmp_path / "generalist.safetensors"
    weights.write_bytes(network.export("head"))
    store, run = tmp_path / "store", tmp_path / "run"
    teacher = Teacher("general", str(weights), load(weights), generalist=True)
    precompute(str(store), twelve, [teacher], Recipe(size=side, chunk_rows=12), 1, MACHINE, 6)
    for batch in Loader(str(store), twelve, batch_size=6, epochs=1):
        plain = _plain(package, name, side, weights.read_bytes())(_normalised(batch.pixels))
        torch.testing.assert_close(batch.logits["general"].float(), plain, rtol=2e-3, atol=2e-3)

    train(str(store), str(run), replace(QUICK, method="soft-label", epochs=1, batch_size=6), MACHINE, UPKEEP, twelve)
    student, exported = load(run), load(run / "student.safetensors")
    pixels = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = exported(pixels)
        torch.testing.assert_close(student.split(student(pixels))["general"], logits, rtol=1e-4, atol=1e-4)
        plain = _plain(package, name, side, (run / "student.safetensors").read_bytes())(_normalised(pixels))
        torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-4)
    assert _moved(exported, network)


def _settle_statistics(network: Classifier) -> None:
    """With batch-norms at mean 0 and variance 1 its logits overflow float16."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    blobs = torch.rand(16, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        network.learn("batch", dropout=False)((nn.functional.interpolate(blobs, network.size) * 255).to(torch.uint8))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.eval()


def _plain(package: str, name: str, side: int, weights: bytes) -> nn.Module:
    """The library's own network, with weights that fastcon wrote."""
    if package == "timm":
        import timm

        takes_size = hasattr(timm.create_model(name), "set_input_size")
        net = timm.create_model(name, num_classes=len(CLASSES), **({"img_size": side} if takes_size else {}))
    else:
        more = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
        more |= {"image_size": side} if name.startswith("vit") else {}
        net = zoo.get_model(name, num_classes=len(CLASSES), **more)
    state = net.state_dict()
    new = tensors_of(weights)
    assert set(dict(net.named_parameters())) <= set(new) <= set(state)  # tables of positions are the network's own
    for name, value in new.items():  # not by load_state_dict: MNASNet's wants a version that no plain file carries
        state[name].copy_(value)
    return net.eval().requires_grad_(False)


def _normalised(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels / 255 - mean) / std


def _moved(after: Classifier, before: Classifier) -> bool:
    pairs = zip(after.parameters(), before.parameters(), strict=True)
    return any(not torch.equal(new, old) for new, old in pairs)

"""A network whose last layer is a set of named heads, with its preprocessing, and the file that it is kept in.

Every architecture keeps its own forward pass: its classifying layer (the last Linear, or the last Conv2d where
there is none, as in SqueezeNet) is widened to the classes of all heads, and what comes after it applies to each
class alike. Features are what that layer is given.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence

import torch
from safetensors.torch import save
from torch import Tensor, nn

from fastcon.errors import FastconError
from fastcon.models.sizes import resize

NO_CLASSIFIER = "a MODEL is a classifier, whose last layer makes one logit per class (or ?kind=embedding: its features)"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Head:
    """A head: its name, its class names, and "softmax", "sigmoid" (multi-label) or "embedding" (features for classes)."""

    name: str
    classes: tuple[str, ...]
    kind: str = "softmax"


class Tower(nn.Sequential):
    """A network of embeddings without a classifier, and a layer that is there only for its features to be the input of."""


class Heads(nn.Module):
    """The classifying layer of a network, as wide as the classes of all heads; computes in float32."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self.bypass = False

    def forward(self, x: Tensor) -> Tensor:
        """Logits of all heads, side by side; the input itself while bypassed."""
        if self.bypass:
            return x.float()
        with torch.autocast(x.device.type, enabled=False):
            return self.layer(x.float())


class Classifier(nn.Module):
    """A network with named heads and its own preprocessing.

    Called with uint8 pixels [B, 3, H, W] it returns float32 logits [B, C of all heads together].
    """

    def __init__(
        self,
        net: nn.Module,
        heads: Sequence[Head],
        *,
        architecture: str,
        size: int,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.mean, self.std = tuple(mean), tuple(std)
        self.head_path = head_path(net, architecture)
        layer = net.get_submodule(self.head_path)
        self.net = net
        self.size = size
        self._set_head(layer if isinstance(layer, Heads) else Heads(layer))  # type: ignore[arg-type]
        self.heads = list(heads)
        scale = 1.0 / (255.0 * torch.tensor(std))
        self._scale: Tensor
        self._shift: Tensor
        self.register_buffer("_scale", scale.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_shift", (-torch.tensor(mean) / torch.tensor(std)).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits of all heads, side by side, for uint8 pixels [B, 3, H, W]; of an embedding its features."""
        out = self.net(pixels.float() * self._scale + self._shift)
        if not self.head_module.bypass:
            return out
        return out.float().mean(dim=(2, 3)) if out.ndim == 4 else out.float()

    def features(self, pixels: Tensor) -> Tensor:
        """The input of the heads: float32 [B, D] (a feature map is averaged over its positions)."""
        module = self.head_module
        before, module.bypass = module.bypass, True
        try:
            return self.forward(pixels)
        finally:
            module.bypass = before

    def embed(self) -> None:
        """Return features instead of logits from now on: one head of kind "embedding", one class for each of them."""
        names = tuple(f"feature {k}" for k in range(self.feature_size))
        self.head_module.bypass = True
        self.heads = [Head(self.heads[0].name, names, "embedding")]

    def on(self, device: torch.device) -> Classifier:
        """Moved to a device, in channels-last memory."""
        return self.to(device=device).to(memory_format=torch.channels_last)

    def learn(self, batch_norm: str, dropout: bool) -> Classifier:
        """Prepare for training; with `train` alone, most networks would become another function.

        batch_norm: "running", every normalising layer keeps using its statistics and leaves them unchanged; "batch",
        it uses those of each batch, and averages them. dropout: whether dropout and stochastic depth are active, as
        in PyTorch's training mode.
        """
        self.train(dropout)
        for module in self.modules():
            if hasattr(module, "attention_bias_cache"):
                module.train()  # timm's: in evaluation mode it would keep the graph of its first batch
                for child in module.children():
                    child.train(dropout)
        for module in self.modules():
            if getattr(module, "running_var", None) is not None:
                module.train(batch_norm == "batch")
        return self

    def has_statistics(self) -> bool:
        """Whether batch-norms hold learned statistics rather than their initial ones; True without any."""
        variances = [value for name, value in self.named_buffers() if name.endswith("running_var")]
        return not variances or any(bool((value != 1).any()) for value in variances)

    def set_size(self, size: int) -> None:
        """Accept images of another side length. Raises FastconError for a network that cannot."""
        if size != self.size:
            resize(self.net, size, self.architecture)
            self.size = size
            self.try_once(self.architecture)

    def try_once(self, origin: str) -> None:
        """Run one image through, so that a network that cannot work fails before anything is written. Raises FastconError."""
        layer, outputs, training = self.head_module, [], self.training
        hook = layer.register_forward_hook(lambda module, given, out: outputs.append(out))
        pixels = torch.zeros(1, 3, self.size, self.size, dtype=torch.uint8, device=self._scale.device)
        try:
            with torch.no_grad():
                out = self.eval()(pixels)
        except Exception as error:
            reason = str(error).strip().split("\n")[0][:160] or type(error).__name__
            raise FastconError(
                f"{origin} does not run on images of {self.size} px ({reason}): name the size it takes, as ?size=224"
            ) from error
        finally:
            hook.remove()
            self.train(training)
        self._check_logits(out, outputs, origin)

    def _check_logits(self, out: object, outputs: list[Tensor], origin: str) -> None:
        """Whether the network returns the logits that its classifying layer makes."""
        expected = (1, sum(len(head.classes) for head in self.heads))
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        if shape != expected or not isinstance(out, Tensor):
            raise FastconError(f"{origin} returns {shape}, not logits of shape {expected}: {NO_CLASSIFIER}")
        if self.head_module.bypass:
            return
        linear = isinstance(self.head_module.layer, nn.Linear)
        if not outputs or (linear and not torch.equal(outputs[-1].reshape(-1), out.float().reshape(-1))):
            raise FastconError(
                f"what {origin} returns is not what its last layer, {self.head_path}, computes: {NO_CLASSIFIER}"
            )

    def keep_head(self, name: str) -> None:
        """Leave one head only."""
        self.head_index(name)
        position = [head.name for head in self.heads].index(name)
        self.replace_heads([self.heads[position]], keep={name: position}, seed=0)

    def split(self, logits: Tensor) -> dict[str, Tensor]:
        """Logits of all heads → {head: [B, C]}."""
        widths = [len(head.classes) for head in self.heads]
        return dict(zip([head.name for head in self.heads], logits.split(widths, dim=1), strict=True))

    @property
    def head_module(self) -> Heads:
        """The module that holds the heads' weights."""
        module = self.net.get_submodule(self.head_path)
        assert isinstance(module, Heads)
        return module

    @property
    def feature_size(self) -> int:
        """Width D of the features."""
        return self.head_module.layer.weight.shape[1]

    def head_index(self, name: str) -> tuple[Head, slice]:
        """A head and its columns among the logits."""
        start = 0
        for head in self.heads:
            if head.name == name:
                return head, slice(start, start + len(head.classes))
            start += len(head.classes)
        raise FastconError(f"no head {name!r}: there are {', '.join(head.name for head in self.heads)}")

    def backbone_parameters(self) -> list[nn.Parameter]:
        """All parameters but the heads'."""
        in_heads = {id(p) for p in self.head_module.parameters()}
        return [p for p in self.parameters() if id(p) not in in_heads]

    def replace_heads(self, heads: Sequence[Head], *, keep: Mapping[str, int], seed: int) -> None:
        """Replace the heads. `keep`: head name → position of the present head whose weights it takes.

        The rest start at random, as PyTorch initialises such a layer, from `seed`. Raises FastconError for a tower.
        """
        if isinstance(self.net, Tower):
            raise FastconError(
                f"{self.architecture} as an embedding is a teacher for precompute, and no network to train: give one with a "
                "classifier"
            )
        old = self.head_module.layer
        starts = [sum(len(h.classes) for h in self.heads[:i]) for i in range(len(self.heads) + 1)]
        weights, biases = [], []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for head in heads:
                fresh = _like(old, len(head.classes))
                if head.name in keep:
                    columns = slice(starts[keep[head.name]], starts[keep[head.name] + 1])
                    weight, bias = old.weight[columns], None if old.bias is None else old.bias[columns]
                else:
                    weight, bias = fresh.weight, fresh.bias
                weights.append(weight.detach().to(old.weight.device))
                biases.append(None if bias is None else bias.detach().to(old.weight.device))
        wide = _like(old, sum(len(head.classes) for head in heads)).to(old.weight.device)
        with torch.no_grad():
            wide.weight.copy_(torch.cat(weights))
            if wide.bias is not None:
                wide.bias.copy_(torch.cat([bias for bias in biases if bias is not None]))
        self._set_head(Heads(wide))
        self.heads = list(heads)

    def head_weights(self, name: str) -> dict[str, Tensor]:
        """`weight` (and `bias`, where there is one) of one head."""
        _, columns = self.head_index(name)
        layer = self.head_module.layer
        tensors = {"weight": layer.weight, "bias": layer.bias}
        return {key: t.detach()[columns].contiguous().cpu() for key, t in tensors.items() if t is not None}

    def state_for_export(self, head: str) -> dict[str, Tensor]:
        """The state dict of the architecture with one head, under the architecture's own names."""
        inside = f"{self.head_path}.layer."
        state = {k: v.detach().contiguous().cpu() for k, v in self.net.state_dict().items() if not k.startswith(inside)}
        return state | {f"{self.head_path}.{key}": value for key, value in self.head_weights(head).items()}

    def metadata(self, head: str) -> dict[str, str]:
        """What a safetensors file says of itself: architecture, preprocessing, class names of `head`."""
        chosen, _ = self.head_index(head)
        return {
            "architecture": self.architecture,
            "size": str(self.size),
            "head": head,
            "kind": chosen.kind,
            "mean": ",".join(map(str, self.mean)),
            "std": ",".join(map(str, self.std)),
            "classes": json.dumps(list(chosen.classes)),
        }

    def export(self, head: str) -> bytes:
        """The safetensors file of the network with one head; `load` takes it, and so does torchvision."""
        return save_safetensors(self.state_for_export(head), metadata=self.metadata(head))

    def export_heads(self) -> bytes:
        """The safetensors file of all heads: NAME.weight, NAME.bias, and class names and kinds as metadata."""
        tensors = {f"{h.name}.{key}": t for h in self.heads for key, t in self.head_weights(h.name).items()}
        heads = [{"name": h.name, "classes": list(h.classes), "kind": h.kind} for h in self.heads]
        return save_safetensors(tensors, metadata={"heads": json.dumps(heads)})

    def digest(self) -> str:
        """SHA-256 over the float32 state: names, shapes and values."""
        hasher = hashlib.sha256()
        unused = f"{self.head_path}.layer." if self.head_module.bypass else None
        for name, tensor in sorted(self.net.state_dict().items()):
            if unused is not None and name.startswith(unused):
                continue
            hasher.update(f"{name}{tuple(tensor.shape)}".encode())
            hasher.update(tensor.detach().cpu().contiguous().numpy())
        return hasher.hexdigest()

    def _set_head(self, module: Heads) -> None:
        parent, _, leaf = self.head_path.rpartition(".")
        setattr(self.net.get_submodule(parent), leaf, module)


def choose_batch_norm(mode: str, model: Classifier) -> str:
    """Resolve "auto": running statistics where the network has any, those of the batch where it starts at random."""
    if mode != "auto":
        return mode
    return "running" if model.has_statistics() else "batch"


def save_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file whose bytes depend on its content only: the library's own header has no fixed order."""
    data = save(dict(tensors), metadata=dict(metadata))
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def head_path(net: nn.Module, origin: str) -> str:
    """Where the classifying layer is: the last Linear, or the last Conv2d of a network without any."""
    paths = [name for name, module in net.named_modules() if isinstance(module, Heads)]
    if not paths and hasattr(net, "get_classifier"):  # timm names it
        layer = net.get_classifier()  # type: ignore[operator]
        paths = [name for name, module in net.named_modules() if module is layer]
        if not paths or not isinstance(layer, nn.Linear | nn.Conv2d):
            raise FastconError(f"{origin} has no classifying layer, or several: {NO_CLASSIFIER}")
    for kind in (nn.Linear, nn.Conv2d):
        paths = paths or [name for name, module in net.named_modules() if isinstance(module, kind) and name]
    if not paths:
        raise FastconError(f"{origin} has no Linear or Conv2d layer that could be its head")
    return paths[-1]


def _like(layer: nn.Linear | nn.Conv2d, classes: int) -> nn.Linear | nn.Conv2d:
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, classes, bias)
    return nn.Conv2d(layer.in_channels, classes, layer.kernel_size, layer.stride, layer.padding, bias=bias)  # type: ignore[arg-type]

"""Networks built for one input size (vision transformers), made to take another."""

from __future__ import annotations

from torch import nn

from fastcon.errors import FastconError


def built_for(net: nn.Module) -> int | None:
    """The side length in pixels that a network is built for; None if it takes any."""
    given = getattr(net, "image_size", None)  # torchvision's ViT
    if given is None and hasattr(net, "set_input_size"):  # timm's transformers
        given = getattr(getattr(net, "patch_embed", None), "img_size", None)
    if isinstance(given, tuple | list):
        given = given[0]
    return given if isinstance(given, int) else None


def resize(net: nn.Module, size: int, origin: str) -> None:
    """Make a network take images of `size` pixels, in place, with position embeddings interpolated as its library does.

    A network that takes any size is left as it is. Raises FastconError where the architecture cannot.
    """
    built = built_for(net)
    if built in (None, size):
        return
    try:
        if hasattr(net, "set_input_size"):
            net.set_input_size(img_size=(size, size))  # type: ignore[operator]
        else:
            _resize_torchvision(net, size)
    except (AssertionError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise FastconError(f"{origin} takes images of {built} px, not {size} ({reason}): use ?size={built}") from error


def _resize_torchvision(net: nn.Module, size: int) -> None:
    from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

    if not isinstance(net, VisionTransformer):
        raise ValueError("its image_size is fixed")
    if size % net.patch_size:
        raise ValueError(f"its patches are {net.patch_size} px wide, and {size} is no multiple of that")
    state = interpolate_embeddings(size, net.patch_size, dict(net.state_dict()))
    embedding = state["encoder.pos_embedding"]
    net.encoder.pos_embedding = nn.Parameter(embedding.clone())
    net.image_size, net.seq_length = size, embedding.shape[1]

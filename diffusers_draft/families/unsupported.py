"""diffusers models that draft attention does not apply to, with the reasons."""

from fnmatch import fnmatchcase

from torch import nn

_IMAGES = "it makes images, and draft attention chooses blocks of a video"
_UNET = "it is a UNet, whose attention never spans the whole video"

REASONS = {
    "LatteTransformer3DModel": "its blocks attend within a frame or along time, never over the whole video",
    "SanaVideoTransformer3DModel": "its self-attention is linear",
    "SanaWMTransformer3DModel": "its self-attention is recurrent in most blocks and no processor in the others",
    "SanaWMLTX2RefinerTransformer3DModel": "its queries attend to a cache of keys from earlier chunks",
    "WanAnimate2Transformer3DModel": "its self-attention has a cache of keys and a mask over pairs of tokens",
    "AnyFlowFARTransformer3DModel": "its self-attention is causal and has a cache of keys",
    "Kandinsky6SRTransformer3DModel": "its self-attention is block-sparse already (NABLA)",
    "Cosmos3OmniTransformer": "its video queries attend to other keys than their own, in groups of heads",
    "TransformerTemporalModel": "it attends along time alone",
    "PriorTransformer": "it makes an embedding of an image, not a video",
    "JoyImageEdit*Transformer3DModel": _IMAGES,
    "*UNet*": _UNET,
    "*2DModel": _IMAGES,
}
"""Class name or pattern -> reason; the first that matches counts."""


def reason_against(model: nn.Module) -> str | None:
    """Return the reason why draft attention does not apply to a diffusers model, or None if there is no known one."""
    cls = type(model)
    if not cls.__module__.startswith("diffusers."):
        return None
    return next((reason for pattern, reason in REASONS.items() if fnmatchcase(cls.__name__, pattern)), None)

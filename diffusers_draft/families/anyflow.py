"""AnyFlow: self-attention over video tokens alone, as in Wan; latents are `(B, F, C, H, W)`."""

from .family import Family, Refusal
from .locate.latents import frames_first

ANYFLOW = Family(
    name="AnyFlow",
    layers=("blocks.*.attn1",),
    processors=("AnyFlowAttnProcessor",),
    video=frames_first,
    dense_layers=("blocks.0.attn1",),
    dense_steps=0.25,
    split=Refusal("every token has its own timestep embedding, and diffusers has no plan that splits those"),
)

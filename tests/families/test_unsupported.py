"""Models that draft attention does not apply to say so."""

from collections.abc import Callable
from typing import Any

import diffusers
import models
import pytest
from paper import enable_draft_attention
from torch import nn

from diffusers_draft import disable_draft_attention
from diffusers_draft.families import families
from diffusers_draft.families.unsupported import REASONS, reason_against


def latte() -> nn.Module:
    config = dict(num_attention_heads=2, attention_head_dim=8, sample_size=8, num_layers=1, caption_channels=8)
    return diffusers.LatteTransformer3DModel(**config, in_channels=4, out_channels=4, patch_size=2, video_length=1)


def sd3() -> nn.Module:
    config = dict(sample_size=8, num_layers=1, attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16)
    return diffusers.SD3Transformer2DModel(
        **config, in_channels=4, joint_attention_dim=8, pooled_projection_dim=8, pos_embed_max_size=8
    )


def unet() -> nn.Module:
    blocks = dict(down_block_types=("DownBlock3D",), up_block_types=("UpBlock3D",))
    return diffusers.UNet3DConditionModel(
        **blocks, block_out_channels=(4,), layers_per_block=1, norm_num_groups=2, cross_attention_dim=4
    )


@pytest.mark.parametrize(
    ("make", "component", "reason"),
    [(latte, "transformer", "within a frame"), (sd3, "transformer", "makes images"), (unet, "unet", "is a UNet")],
)
def test_reason_is_given(make: Callable[[], nn.Module], component: str, reason: str) -> None:
    model = make()
    for pipe in (model, models.Loop(None, vae=models.wan_vae(), **{component: model})):
        for call in (enable_draft_attention, disable_draft_attention):
            with pytest.raises(TypeError, match=f"does not apply to {type(model).__name__}: .*{reason}"):
                call(pipe)


def test_a_known_transformer_beside_one_without_support_is_patched() -> None:
    pipe = models.Loop(None, upscaler=latte(), transformer=models.wan())
    assert [report.component for report in enable_draft_attention(pipe).report().transformers] == ["transformer"]


def test_no_family_is_among_them() -> None:
    classes: list[Any] = [getattr(diffusers, name, None) for name in families()]
    for cls in filter(None, classes):
        assert reason_against(cls.__new__(cls)) is None, cls


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("HunyuanDiT2DModel", "makes images"),
        ("LuminaNextDiT2DModel", "makes images"),
        ("FluxTransformer2DModel", "makes images"),
        ("UVit2DModel", "makes images"),
        ("PriorTransformer", "an embedding of an image"),
        ("UNet2DModel", "is a UNet"),
        ("I2VGenXLUNet", "is a UNet"),
    ],
)
def test_reason_for_class(name: str, reason: str) -> None:
    cls: Any = getattr(diffusers, name)
    assert reason in (reason_against(cls.__new__(cls)) or "")


def test_names_exist() -> None:
    names = [name for name in REASONS if "*" not in name and hasattr(diffusers, name)]
    assert {"LatteTransformer3DModel", "SanaVideoTransformer3DModel", "TransformerTemporalModel"} <= set(names)

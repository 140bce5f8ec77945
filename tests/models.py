"""Tiny models and pipelines from diffusers' own classes, with random weights, and random inputs for them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import tiny_cross
import tiny_joint
import tiny_older
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanAnimateTransformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)
from PIL import Image
from tiny import (
    FLOAT32_ERROR as FLOAT32_ERROR,
)
from tiny import (
    RAGGED,
    TEXT_SLOTS,
    Grid,
    Inputs,
    Tiny,
    build,
    latents,
    random,
)
from tiny import Loop as Loop
from tiny import attention_replaced as attention_replaced
from tiny import error as error
from tiny import forward as forward
from tiny import patched as patched
from tiny import processors as processors
from torch import Tensor

from diffusers_draft.attention import kernels
from diffusers_draft.attention.block_mask import BlockMask

_WAN = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    text_dim=8,
    freq_dim=16,
    ffn_dim=32,
    num_layers=3,
    rope_max_seq_len=64,
)
_HUNYUAN_VIDEO = dict(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=3,
    num_single_layers=2,
    num_refiner_layers=1,
    patch_size=2,
    patch_size_t=1,
    text_embed_dim=8,
    pooled_projection_dim=8,
    rope_axes_dim=(4, 6, 6),
)


def wan(*, num_layers: int = 3, seed: int = 0) -> WanTransformer3DModel:
    return build(WanTransformer3DModel, _WAN | {"num_layers": num_layers}, seed)


def wan_i2v() -> WanTransformer3DModel:
    return build(WanTransformer3DModel, _WAN | {"in_channels": 9, "image_dim": 6, "added_kv_proj_dim": 32})


def wan_vace() -> WanVACETransformer3DModel:
    return build(WanVACETransformer3DModel, _WAN | {"vace_layers": [0, 2], "vace_in_channels": 6})


def wan_animate() -> WanAnimateTransformer3DModel:
    return build(
        WanAnimateTransformer3DModel,
        _WAN
        | dict(
            in_channels=12,
            latent_channels=4,
            image_dim=6,
            added_kv_proj_dim=32,
            motion_encoder_channel_sizes={"4": 4, "8": 4, "16": 4},
            motion_encoder_size=16,
            motion_style_dim=4,
            motion_dim=2,
            motion_encoder_dim=4,
            face_encoder_hidden_dim=8,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=3,
        ),
    )


def hunyuan_video(*, seed: int = 0, **config: Any) -> HunyuanVideoTransformer3DModel:
    return build(HunyuanVideoTransformer3DModel, _HUNYUAN_VIDEO | config, seed)


def wan_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    return {
        "hidden_states": latents(4, batch, grid),
        "timestep": torch.full((batch,), timestep),
        "encoder_hidden_states": random(batch, 7, 8),
    }


def wan_i2v_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    return wan_inputs(batch, grid, timestep) | {
        "hidden_states": latents(9, batch, grid),
        "encoder_hidden_states": random(batch, 512, 8),
        "encoder_hidden_states_image": random(batch, 5, 6),
    }


def wan_ti2v_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    """One timestep for each token; the first frame is given, so its timestep is 0."""
    frames, rows, columns = grid
    timesteps = torch.full((batch, frames, rows * columns), timestep)
    timesteps[:, 0] = 0
    return wan_inputs(batch, grid, timestep) | {"timestep": timesteps.flatten(1)}


def wan_vace_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    return wan_inputs(batch, grid, timestep) | {"control_hidden_states": latents(6, batch, grid)}


def wan_animate_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    """With the character in front of the video."""
    frames, rows, columns = grid
    return wan_i2v_inputs(batch, grid, timestep) | {
        "hidden_states": latents(12, batch, (frames + 1, rows, columns)),
        "pose_hidden_states": latents(4, batch, grid),
        "face_pixel_values": random(batch, 3, 4 * (frames - 1) + 1, 16, 16),
    }


def hunyuan_video_inputs(
    batch: int = 1, grid: Grid = RAGGED, timestep: float = 500, *, text: int = TEXT_SLOTS, lengths: Any = None
) -> Inputs:
    """Right-padded text; by default every sample has four valid slots less than the one before."""
    lengths = torch.tensor(lengths or [text - 4 * sample for sample in range(batch)])
    return {
        "hidden_states": latents(4, batch, grid),
        "timestep": torch.full((batch,), timestep),
        "encoder_hidden_states": random(batch, text, 8),
        "encoder_attention_mask": (torch.arange(text) < lengths[:, None]).long(),
        "pooled_projections": random(batch, 8),
        "guidance": torch.full((batch,), 6000.0),
    }


def unguided_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    return hunyuan_video_inputs(batch, grid, timestep) | {"guidance": None}


def _tiny_wan(build: Callable[[], Any], inputs: Callable[..., Inputs], vace_blocks: int = 0, prefix: int = 0) -> Tiny:
    vace = tuple(f"vace_blocks.{index}.attn1" for index in range(vace_blocks))
    blocks = tuple(f"blocks.{index}.attn1" for index in range(3))
    return Tiny(
        build=build,
        inputs=inputs,
        layers=vace + blocks,
        dense_timestep=925,
        dense_layers=vace[:1] + blocks[:1],
        prefix=prefix,
    )


def _tiny_hunyuan_video(inputs: Callable[..., Inputs] = hunyuan_video_inputs, **config: Any) -> Tiny:
    dual = tuple(f"transformer_blocks.{index}.attn" for index in range(3))
    single = tuple(f"single_transformer_blocks.{index}.attn" for index in range(2))
    return Tiny(
        build=lambda: hunyuan_video(**config),
        inputs=inputs,
        layers=dual + single,
        dense_timestep=945,
        dense_layers=dual[:2],
        lengths=tiny_joint.without_padding,
    )


TINY = {
    **tiny_cross.TINY,
    **tiny_joint.TINY,
    **tiny_older.TINY,
    "wan": _tiny_wan(wan, wan_inputs),
    "wan_i2v": _tiny_wan(wan_i2v, wan_i2v_inputs),
    "wan_ti2v": _tiny_wan(wan, wan_ti2v_inputs),
    "wan_vace": _tiny_wan(wan_vace, wan_vace_inputs, vace_blocks=2),
    "wan_animate": _tiny_wan(wan_animate, wan_animate_inputs, prefix=RAGGED[1] * RAGGED[2]),
    "hunyuan_video": _tiny_hunyuan_video(),
    "hunyuan_video_no_guidance": _tiny_hunyuan_video(unguided_inputs, guidance_embeds=False),
    "hunyuan_video_latent_concat": _tiny_hunyuan_video(image_condition_type="latent_concat"),
    "hunyuan_video_token_replace": _tiny_hunyuan_video(
        unguided_inputs, image_condition_type="token_replace", guidance_embeds=False
    ),
}


def recording(seen: list[BlockMask]) -> Callable[..., kernels.Choice]:
    """A stand-in for `kernels.choose` whose choices add the masks that they get to a list."""
    choose = kernels.choose

    def choose_and_record(*args: Any) -> kernels.Choice:
        choice = choose(*args)

        def noted(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
            seen.append(mask)
            return choice.forward(query, key, value, mask, scale)

        return dataclasses.replace(choice, forward=noted)

    return choose_and_record


def recorded_masks(monkeypatch: pytest.MonkeyPatch) -> list[BlockMask]:
    """A list that takes what the backend gets in all sparse calls of a test."""
    seen: list[BlockMask] = []
    monkeypatch.setattr(kernels, "choose", recording(seen))
    return seen


def wan_scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def wan_vae() -> AutoencoderKLWan:
    config = dict(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKLWan(**config, latents_mean=[0.0] * 4, latents_std=[1.0] * 4).eval()


def wan_pipeline(
    transformer: Any = None, *, transformer_2: Any = None, boundary_ratio: float | None = None, scheduler: Any = None
) -> WanPipeline:
    """With the transformer that is given, or one of its own if there is no second one either."""
    if transformer is None and transformer_2 is None:
        transformer = wan()
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=wan_vae(),
        scheduler=scheduler or wan_scheduler(),
        transformer=transformer,
        transformer_2=transformer_2,
        boundary_ratio=boundary_ratio,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan_video_to_video_pipeline() -> WanVideoToVideoPipeline:
    components = wan_pipeline().components
    names = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")
    pipe = WanVideoToVideoPipeline(**{name: components[name] for name in names})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_video_to_video(pipe: Any, *, height: int, width: int, steps: int) -> Tensor:
    """The second half of a run, without guidance."""
    return pipe(
        video=[Image.new("RGB", (width, height))] * 5,
        prompt_embeds=random(1, 7, 8),
        height=height,
        width=width,
        num_inference_steps=steps,
        strength=0.5,
        guidance_scale=1.0,
        output_type="latent",
    ).frames


def run_wan(pipe: Any, *, grid: Grid = RAGGED, steps: int = 4, output_type: str = "latent", **options: Any) -> Tensor:
    """One call with classifier-free guidance."""
    frames, rows, columns = grid
    scale = 2 * pipe.vae_scale_factor_spatial
    arguments = dict(
        prompt_embeds=random(1, 7, 8, seed=1),
        negative_prompt_embeds=random(1, 7, 8, seed=2),
        height=rows * scale,
        width=columns * scale,
        num_frames=4 * (frames - 1) + 1,
        num_inference_steps=steps,
        output_type=output_type,
        generator=torch.Generator().manual_seed(0),
    )
    return pipe(**arguments | options).frames


def hunyuan_video_pipeline(transformer: Any = None) -> HunyuanVideoPipeline:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
        )
    pipe = HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=transformer or hunyuan_video(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_hunyuan_video(
    pipe: Any,
    *,
    grid: Grid = RAGGED,
    steps: int = 4,
    true_cfg: bool = False,
    output_type: str = "latent",
    **options: Any,
) -> Tensor:
    frames, rows, columns = grid
    scale = 2 * pipe.vae_scale_factor_spatial
    arguments = dict(
        height=rows * scale,
        width=columns * scale,
        num_frames=4 * (frames - 1) + 1,
        num_inference_steps=steps,
        output_type=output_type,
        generator=torch.Generator().manual_seed(0),
    )
    for prefix, valid in {"": 9, "negative_": 3}.items() if true_cfg else {"": 9}.items():
        arguments[f"{prefix}prompt_embeds"] = random(1, TEXT_SLOTS, 8, seed=valid)
        arguments[f"{prefix}pooled_prompt_embeds"] = random(1, 8, seed=valid)
        arguments[f"{prefix}prompt_attention_mask"] = (torch.arange(TEXT_SLOTS) < valid)[None].long()
    if true_cfg:
        arguments["true_cfg_scale"] = 3.0
    return pipe(**arguments | options).frames

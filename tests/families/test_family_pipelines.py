"""Tiny pipelines of the real classes: dense and enabled at sparsity 0 they make the same video."""

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import models
import pytest
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
    LTXPipeline,
    MochiPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    UniPCMultistepScheduler,
)
from models import TEXT_SLOTS, TINY, error, random
from paper import enable_draft_attention
from PIL import Image
from torch import Tensor

EVERYWHERE = dict(dense_layers=(), dense_steps=0)


def pipeline(cls: type, transformer: Any, scheduler: Any, vae: Any = None) -> Any:
    parts = dict(tokenizer=None, text_encoder=None, vae=vae)
    pipe = cls(**parts, transformer=transformer, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, *, masked: bool = False, steps: int = 4, guidance: float = 3.0, **options: Any) -> Tensor:
    """One call with classifier-free guidance and, where text is masked, prompts of different lengths."""
    arguments: dict[str, Any] = {}
    for prefix, length in {"": 9, "negative_": 3}.items():
        arguments[f"{prefix}prompt_embeds"] = random(1, TEXT_SLOTS, 8, seed=length)
        if masked:
            arguments[f"{prefix}prompt_attention_mask"] = (torch.arange(TEXT_SLOTS) < length)[None].long()
    arguments |= dict(num_inference_steps=steps, guidance_scale=guidance, output_type="latent")
    return pipe(**arguments | options, generator=torch.Generator().manual_seed(0)).frames


def tiny(cls: str) -> Any:
    return TINY[cls].build()


def ltx() -> Any:
    return pipeline(LTXPipeline, tiny("LTXVideoTransformer3DModel"), FlowMatchEulerDiscreteScheduler())


def ltx_with_conditions() -> Any:
    four, five = (8,) * 4, (1,) * 5
    stages = dict(spatio_temporal_scaling=(True, True, False, False), layers_per_block=five, block_out_channels=four)
    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        **stages,
        **{f"decoder_{name}": value for name, value in stages.items()},
        patch_size=1,
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
    )
    vae.use_framewise_encoding = False
    return pipeline(LTXConditionPipeline, tiny("LTXVideoTransformer3DModel"), FlowMatchEulerDiscreteScheduler(), vae)


def cogvideox(scheduler: Any = CogVideoXDDIMScheduler) -> Any:
    return pipeline(CogVideoXPipeline, tiny("CogVideoXTransformer3DModel"), scheduler())


def mochi() -> Any:
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    transformer = models.build(diffusers.MochiTransformer3DModel, dict(tiny("MochiTransformer3DModel").config))
    return pipeline(MochiPipeline, transformer, scheduler)


def skyreels() -> Any:
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=8.0)
    return pipeline(SkyReelsV2DiffusionForcingPipeline, tiny("SkyReelsV2Transformer3DModel"), scheduler)


LTX_SIZE = dict(masked=True, height=13 * 32, width=17 * 32, num_frames=17)
RUNS: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor], models.Grid]] = {
    "ltx": (ltx, functools.partial(generate, **LTX_SIZE), (3, 13, 17)),
    "ltx_with_conditions": (
        ltx_with_conditions,
        functools.partial(
            generate,
            masked=True,
            height=32,
            width=96,
            num_frames=17,
            image=Image.new("RGB", (96, 32), "red"),
            frame_index=8,
        ),
        (5, 8, 24),
    ),
    "cogvideox": (cogvideox, functools.partial(generate, height=208, width=272, num_frames=9), (3, 13, 17)),
    "cogvideox_dpm": (
        functools.partial(cogvideox, CogVideoXDPMScheduler),
        functools.partial(generate, height=208, width=272, num_frames=9),
        (3, 13, 17),
    ),
    "mochi": (mochi, functools.partial(generate, masked=True, height=208, width=272, num_frames=13), (3, 13, 17)),
    "skyreels": (
        skyreels,
        functools.partial(generate, prompt=None, height=208, width=272, num_frames=9, base_num_frames=9),
        (3, 13, 17),
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_sparsity_0_makes_the_same_video(name: str) -> None:
    make, run, grid = RUNS[name]
    pipe = make()
    stock = run(pipe)
    handle = enable_draft_attention(pipe, sparsity=0, **EVERYWHERE)
    assert error(run(pipe), stock) < 1e-5
    (report,) = handle.report().transformers
    assert report.grid == grid
    assert report.density == 1
    assert report.forwards["dense"] == 0
    handle.disable()
    assert torch.equal(run(pipe), stock)


@pytest.mark.parametrize("name", RUNS)
def test_default_schedule(name: str) -> None:
    """A quarter of the four steps is dense, whatever the scheduler tells."""
    make, run, _ = RUNS[name]
    pipe = make()
    stock = run(pipe)
    handle = enable_draft_attention(pipe, sparsity=0.9)
    sparse = run(pipe)
    assert sparse.isfinite().all()
    assert error(sparse, stock) > 1e-5
    assert torch.equal(run(pipe), sparse)
    assert handle.report().transformers[0].steps == {"dense": 2, "sparse": 6}


def test_under_diffusion_forcing_steps_are_counted_where_none_is_dense() -> None:
    pipe = skyreels()
    handle = enable_draft_attention(pipe, dense_steps=0)
    generate(pipe, prompt=None, height=32, width=32, num_frames=9, base_num_frames=9, steps=8)
    (report,) = handle.report().transformers
    assert (report.steps, report.forwards) == ({"dense": 0, "sparse": 8}, {"dense": 0, "sparse": 16})


def test_under_diffusion_forcing_the_noisiest_frame_tells_the_step() -> None:
    """Three latent frames, each one step behind the one before: the last one's second step is the forward's fourth."""
    pipe = skyreels()
    handle = enable_draft_attention(pipe)
    noisiest: list[float] = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: noisiest.append(float(kwargs["timestep"].max())), with_kwargs=True
    )
    sizes = dict(prompt=None, height=32, width=32, num_frames=9, base_num_frames=9)
    generate(pipe, **sizes, steps=8, ar_step=1, causal_block_size=1)
    assert len(noisiest) == 2 * (8 + 2)
    dense = sum(timestep > pipe.scheduler.timesteps[2] for timestep in noisiest)
    assert dense == 2 * 4
    assert handle.report().transformers[0].forwards == {"dense": dense, "sparse": len(noisiest) - dense}

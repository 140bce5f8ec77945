"""The demo's pipeline: diffusers' own Wan classes, small enough for a CPU."""

from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn

TEXT_DIM = 32


def demo_pipeline() -> WanPipeline:
    """Builds a Wan pipeline without text encoder, on the CPU in float32, the same one every time.

    The weights are random but arranged so that there is something to see: queries and keys share a bias, so that the
    rotary embedding makes heads look at their neighbourhood as trained heads do, and what paints pixels is smoothed.
    A later release ships trained weights in the package; this function is where they will be loaded.

    Returns:
        A pipeline that takes `demo_inputs`. A token is 4 x 4 pixels of every second frame.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=64,
            ffn_dim=256,
            num_layers=6,
            text_dim=TEXT_DIM,
            freq_dim=64,
            rope_max_seq_len=256,
        )
        vae = AutoencoderKLWan(
            base_dim=8,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[True],
            scale_factor_temporal=2,
            scale_factor_spatial=2,
        )
        with torch.no_grad():
            _look_around(transformer)
            _paint_smoothly(transformer, vae)
    return WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def demo_inputs(pipe: WanPipeline, frames: int, height: int, width: int, *, seed: int) -> dict[str, Any]:
    """Makes the arguments of one pipeline call; what they hold depends on the seed alone.

    Args:
        pipe: the demo's pipeline.
        frames: frames of the video, an odd number.
        height: in pixels, a multiple of 16.
        width: in pixels, a multiple of 16.
        seed: of the noise and of the random "text".

    Returns:
        Keyword arguments for `pipe`, all but the number of steps. `latents` is `(1, C, F, H, W)` float32.
    """
    generator = torch.Generator().manual_seed(seed)
    latent = (
        (frames - 1) // pipe.vae_scale_factor_temporal + 1,
        height // pipe.vae_scale_factor_spatial,
        width // pipe.vae_scale_factor_spatial,
    )
    return {
        "prompt_embeds": torch.randn(1, 16, TEXT_DIM, generator=generator),
        "guidance_scale": 1.0,
        "num_frames": frames,
        "height": height,
        "width": width,
        "latents": _smooth_noise((1, pipe.transformer.config.in_channels, *latent), generator),
    }


def _look_around(transformer: WanTransformer3DModel) -> None:
    for block in transformer.blocks:
        attention = block.attn1
        bias = 2 * torch.randn_like(attention.to_q.bias)
        for projection, norm in ((attention.to_q, attention.norm_q), (attention.to_k, attention.norm_k)):
            projection.bias.copy_(bias)
            norm.weight.fill_(1.5)


def _paint_smoothly(transformer: WanTransformer3DModel, vae: AutoencoderKLWan) -> None:
    """Gives the pixels of a patch one colour, makes the decoder's kernels blur, and halves of a frame pair equal."""
    patch = transformer.config.patch_size[1] * transformer.config.patch_size[2]
    for parameter in transformer.proj_out.parameters():
        _repeat_first_part(parameter, patch)
    for name, module in vae.decoder.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and max(module.kernel_size) > 1:
            kernel_dims = tuple(range(2, module.weight.dim()))
            module.weight.copy_(3 * module.weight.mean(kernel_dims, keepdim=True).expand_as(module.weight))
        if name.endswith("time_conv"):
            for parameter in module.parameters():
                _repeat_first_part(parameter, 2)


def _repeat_first_part(parameter: Tensor, parts: int) -> None:
    first = parameter[: len(parameter) // parts].clone()
    parameter.copy_(torch.cat([first] * parts))


def _smooth_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Noise of mean 0 and deviation 1 in every channel, blurred over space and time."""
    noise = torch.randn(shape, generator=generator)
    for _ in range(2):
        padded = nn.functional.pad(noise, (4, 4, 4, 4, 1, 1), mode="replicate")
        noise = nn.functional.avg_pool3d(padded, (3, 9, 9), stride=1)
    noise = noise - noise.mean((2, 3, 4), keepdim=True)
    return noise / noise.std((2, 3, 4), keepdim=True)

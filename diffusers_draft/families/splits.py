"""Plans for diffusers' context parallelism: how families are split over GPUs."""

from typing import Any

from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

from .family import Refusal, Split

Plan = dict[Any, Any]


def _split(dim: int, dims: int) -> ContextParallelInput:
    return ContextParallelInput(split_dim=dim, expected_dims=dims)


def _split_rope(dim: int, dims: int) -> Plan:
    """Split the cosines and sines that a module returns."""
    part = ContextParallelInput(split_dim=dim, expected_dims=dims, split_output=True)
    return {0: part, 1: part}


_GATHER = ContextParallelOutput(gather_dim=1, expected_dims=3)


def _wan(config: Any) -> Plan:
    """Plan Wan's split as newer diffusers does: text stays whole, timesteps are split if every token has its own."""
    return {
        "": {"timestep": _split(1, 2)},
        "rope": _split_rope(1, 4),
        "blocks.0": {"hidden_states": _split(1, 3)},
        "proj_out": _GATHER,
    }


def _wan_vace(config: Any) -> Plan:
    """Plan Wan VACE's split: Wan's plan, and the control stream is split too."""
    control = {
        "vace_blocks.*": {"hidden_states": _split(1, 3)},
        "vace_blocks.0": {"control_hidden_states": _split(1, 3)},
    }
    return _wan(config) | control


def _skyreels(config: Any) -> Plan:
    """Plan SkyReels-V2's split, gathered after the last block.

    Under diffusion forcing every token has its own modulation, in the blocks and behind them.
    """
    return {
        "rope": _split_rope(1, 4),
        "blocks.0": {"hidden_states": _split(1, 3)},
        "blocks.*": {"temb": _split(2, 4)},
        f"blocks.{config.num_layers - 1}": _GATHER,
    }


def _joint(config: Any) -> Plan:
    """Plan the split of HunyuanVideo models: the video is split, text stays whole."""
    return {
        "rope": _split_rope(0, 2),
        "transformer_blocks.0": {"hidden_states": _split(1, 3)},
        "proj_out": _GATHER,
    }


def _ltx(config: Any) -> Plan:
    """Plan LTX-Video's split: the video, its rotary embeddings and timesteps are split."""
    return {
        "": {"hidden_states": _split(1, 3), "timestep": _split(1, 2)},
        "rope": _split_rope(1, 3),
        "proj_out": _GATHER,
    }


def _ltx2(config: Any) -> Plan:
    """Plan LTX-2's split: the video is split, audio stays whole and attends to the video's split keys."""
    rope = _split_rope(2, 4) if config.rope_type == "split" else _split_rope(1, 3)
    return _ltx(config) | {"rope": rope, "cross_attn_rope": rope}


def _check_hunyuan_video(config: Any) -> None:
    if config.image_condition_type == "token_replace":
        raise ValueError(
            'A HunyuanVideo model with image_condition_type="token_replace" cannot be split over GPUs: its blocks '
            "count the tokens of the first frame from the start of the whole video."
        )


def _check_ltx2(config: Any) -> None:
    if getattr(config, "use_keyframes_abs_pos_embedding", False):
        raise ValueError(
            "An LTX-2 model with use_keyframes_abs_pos_embedding=True cannot be split over GPUs: the tokens that it "
            "marks are not split with the video."
        )


NO_PARALLEL_CONFIG = Refusal(
    "its attention processors take no parallel config, so that they cannot be told of a split"
)
"""Refusal of families whose attention processors know no context parallelism."""
WAN = Split(plan=_wan)
WAN_VACE = Split(plan=_wan_vace)
SKYREELS_V2 = Split(plan=_skyreels)
HUNYUAN_VIDEO = Split(plan=_joint, whole_text=True, check=_check_hunyuan_video)
HUNYUAN_VIDEO15 = Split(plan=_joint, whole_text=True)
LTX = Split(plan=_ltx)
LTX2 = Split(plan=_ltx2, others=("transformer_blocks.*.video_to_audio_attn",), check=_check_ltx2)

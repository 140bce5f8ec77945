"""The table in docs/models.md, and the facts in it that code does not need: pipelines, text handling, notes."""

import math
from dataclasses import dataclass

from ..families import Family, families


@dataclass(frozen=True)
class Row:
    """Facts about one transformer class for the table.

    Attributes:
        pipelines: names of the diffusers pipelines that use it.
        text: how text and other tokens enter the attention.
        notes: what else a user should know.
    """

    pipelines: tuple[str, ...]
    text: str
    notes: str = ""


CATALOGUE = {
    "WanTransformer3DModel": Row(
        (
            "WanPipeline",
            "WanImageToVideoPipeline",
            "WanVideoToVideoPipeline",
            "LucyEditPipeline",
        ),
        "cross-attention",
    ),
    "WanVACETransformer3DModel": Row(
        ("WanVACEPipeline",),
        "cross-attention",
        "reference images count as the first frames of the video",
    ),
    "WanAnimateTransformer3DModel": Row(
        ("WanAnimatePipeline",),
        "cross-attention; the character's frame in front",
    ),
    "HunyuanVideoTransformer3DModel": Row(
        (
            "HunyuanVideoPipeline",
            "HunyuanVideoImageToVideoPipeline",
            "HunyuanSkyreelsImageToVideoPipeline",
        ),
        "joint, behind the video, padding left out",
    ),
    "HunyuanVideo15Transformer3DModel": Row(
        (
            "HunyuanVideo15Pipeline",
            "HunyuanVideo15ImageToVideoPipeline",
        ),
        "joint, behind the video, padding left out",
        "without stock's mask over pairs of tokens (12.5 GB at 720p); layers in `dense_layers` make it again",
    ),
    "SkyReelsV2Transformer3DModel": Row(
        (
            "SkyReelsV2Pipeline",
            "SkyReelsV2ImageToVideoPipeline",
            "SkyReelsV2DiffusionForcingPipeline",
            "SkyReelsV2DiffusionForcingImageToVideoPipeline",
            "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        ),
        "cross-attention",
        "with `num_frame_per_block` above 1 (causal) it runs dense, and the report counts it; under "
        "diffusion forcing the noisiest frame tells the step",
    ),
    "LTXVideoTransformer3DModel": Row(
        (
            "LTXPipeline",
            "LTXImageToVideoPipeline",
            "LTXConditionPipeline",
            "LTXI2VLongMultiPromptPipeline",
        ),
        "cross-attention; tokens of conditions in front",
        "`LTXI2VLongMultiPromptPipeline` makes new coordinates in every step; reading them waits for the GPU",
    ),
    "LTX2VideoTransformer3DModel": Row(
        (
            "LTX2Pipeline",
            "LTX2ImageToVideoPipeline",
            "LTX2ConditionPipeline",
            "LTX2InContextPipeline",
            "LTX2HDRPipeline",
            "LTX2DFRPipeline",
            "LTX2DFRTemporalRefinePipeline",
        ),
        "cross-attention; keyframe and reference tokens behind, audio apart",
        "calls with a mask over pairs of tokens (conditions of a strength below 1) run dense and are counted",
    ),
    "Kandinsky5Transformer3DModel": Row(
        (
            "Kandinsky5T2VPipeline",
            "Kandinsky5I2VPipeline",
        ),
        "cross-attention",
        "not with NABLA attention",
    ),
    "Kandinsky6Transformer3DModel": Row(
        ("Kandinsky6TI2VAPipeline",),
        "cross-attention; a reference frame behind the video, audio apart",
    ),
    "CosmosTransformer3DModel": Row(
        (
            "CosmosTextToWorldPipeline",
            "CosmosVideoToWorldPipeline",
            "Cosmos2TextToImagePipeline",
            "Cosmos2VideoToWorldPipeline",
            "Cosmos2_5_PredictBasePipeline",
            "Cosmos2_5_TransferPipeline",
        ),
        "cross-attention",
    ),
    "CosmosControlNetModel": Row(
        ("Cosmos2_5_TransferPipeline",),
        "cross-attention",
        "a component of its own beside the transformer",
    ),
    "AnyFlowTransformer3DModel": Row(
        ("AnyFlowPipeline",),
        "cross-attention",
    ),
    "ChronoEditTransformer3DModel": Row(
        ("ChronoEditPipeline",),
        "cross-attention",
    ),
    "MotifVideoTransformer3DModel": Row(
        (
            "MotifVideoPipeline",
            "MotifVideoImage2VideoPipeline",
        ),
        "joint, behind the video, padding left out",
        "the decoder's layers see the encoder's video behind their own, and it stays exact; layers with text "
        "that is not padded on the right run dense and are counted",
    ),
    "HunyuanVideoFramepackTransformer3DModel": Row(
        ("HunyuanVideoFramepackPipeline",),
        "joint, behind the video, padding left out; history in front",
        "each section is a run of its own",
    ),
    "HeliosTransformer3DModel": Row(
        (
            "HeliosPipeline",
            "HeliosPyramidPipeline",
        ),
        "cross-attention; history in front",
        "each chunk, and each stage of the pyramid, is a run of its own; with the distilled scheduler the "
        "timestep tells the step",
    ),
    "MiniMaxH3Transformer3DModel": Row(
        ("MiniMaxH3ModularPipeline",),
        "joint, in front with conditions and audio",
    ),
    "CogVideoXTransformer3DModel": Row(
        (
            "CogVideoXPipeline",
            "CogVideoXImageToVideoPipeline",
            "CogVideoXVideoToVideoPipeline",
            "CogVideoXFunControlPipeline",
        ),
        "joint, in front",
        "fuse its projections before enabling: `fuse_qkv_projections` replaces every processor",
    ),
    "ConsisIDTransformer3DModel": Row(
        ("ConsisIDPipeline",),
        "joint, in front",
    ),
    "MochiTransformer3DModel": Row(
        ("MochiPipeline",),
        "joint, behind the video, padding left out",
        "sparse layers do not loop over samples; timesteps rise, so use `dense_steps`",
    ),
    "AllegroTransformer3DModel": Row(
        ("AllegroPipeline",),
        "cross-attention",
    ),
    "EasyAnimateTransformer3DModel": Row(
        (
            "EasyAnimatePipeline",
            "EasyAnimateInpaintPipeline",
            "EasyAnimateControlPipeline",
        ),
        "joint, in front",
    ),
}
"""diffusers class name -> facts."""


def models_table() -> str:
    """Write the table as Markdown: one row for each transformer class."""
    lines = [
        "| Family | transformer | pipelines | sparse layers | text and other tokens | dense by the paper | notes |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_line(cls, family) for cls, family in families().items()]
    return "\n".join(lines)


def _line(cls: str, family: Family) -> str:
    row = CATALOGUE[cls]
    pipelines, layers = (", ".join(map("`{}`".format, names)) for names in (row.pipelines, family.layers))
    return f"| {family.name} | `{cls}` | {pipelines} | {layers} | {row.text} | {_dense(family)} | {row.notes} |"


def _dense(family: Family) -> str:
    """List the steps and layers of a family that stay dense with `schedule="paper"`."""
    steps = [] if math.isinf(family.dense_timestep) else [f"timestep > {family.dense_timestep:g}"]
    steps += [] if family.dense_steps is None else [f"first {family.dense_steps:.0%} of the steps"]
    return "; ".join([*steps, *map("`{}`".format, family.dense_layers)])

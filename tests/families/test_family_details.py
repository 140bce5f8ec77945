"""What is special to a family: grids from coordinates, refusals, fused projections, defaults of the schedule."""

import gc
import math
import warnings
import weakref
from types import SimpleNamespace
from typing import Any

import diffusers
import models
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from models import TINY, Loop, error, forward, patched, processors
from paper import enable_draft_attention
from tiny_cross import raster

from diffusers_draft import DraftConfig
from diffusers_draft.attention import layout
from diffusers_draft.families.kandinsky import KANDINSKY6
from diffusers_draft.families.locate import coordinates
from diffusers_draft.families.locate.coordinates import from_arguments, videos

EVERYWHERE = dict(dense_layers=(), dense_steps=0)
LTX, COGVIDEOX = "LTXVideoTransformer3DModel", "CogVideoXTransformer3DModel"


def reports(handle: Any) -> list[Any]:
    return [(video.grid, video.prefix) for video in handle]


@pytest.mark.parametrize("grid", [(1, 1, 1), (4, 1, 1), (1, 1, 5), (1, 5, 1), (3, 1, 4), (3, 4, 1), (5, 7, 9)])
@pytest.mark.parametrize("scale", [(1, 1, 1), (8 / 25, 32, 32)])
def test_videos_of_one_grid(grid: models.Grid, scale: tuple[float, float, float]) -> None:
    coords = raster(grid) * torch.tensor(scale)[:, None]
    assert reports(videos(coords)) == [(grid, 0)]


def test_videos_between_conditions() -> None:
    """Behind each other: two frames, a coarser frame at the time of the last, the video, and its first frame again."""
    parts = [raster((2, 3, 4), 5), raster((1, 2, 2), 6), raster((4, 3, 4)), raster((1, 3, 4))]
    found = videos(torch.cat(parts, dim=1))
    assert reports(found) == [((2, 3, 4), 0), ((1, 2, 2), 24), ((4, 3, 4), 28), ((1, 3, 4), 76)]


@pytest.mark.skipif(not hasattr(diffusers, "LTX2DFRPipeline"), reason="this diffusers has no LTX2DFRPipeline")
@pytest.mark.parametrize("slots", [(16,), (16, 0), (8, 16), (15,), (1, 9)])
def test_keyframes_of_dfr_are_no_frames_of_the_video(slots: tuple[int, ...]) -> None:
    """With upstream's coordinates of both; pixel frame 16 is the last one of three latent frames."""
    model = TINY["LTX2VideoTransformer3DModel"].build()
    sizes = dict(transformer_spatial_patch_size=1, transformer_temporal_patch_size=1)
    ratios = dict(vae_temporal_compression_ratio=8, vae_spatial_compression_ratio=32)
    coords = [model.rope.prepare_video_coords(1, 3, 4, 5, torch.device("cpu"), fps=25.0)]
    coords += [
        diffusers.LTX2DFRPipeline._prepare_keyframe_coords(
            SimpleNamespace(**sizes, **ratios), 1, 4, 5, slot, 1, 25.0, torch.device("cpu")
        )
        for slot in slots
    ]
    video = from_arguments(
        {"hidden_states": torch.zeros(1, 20 * (3 + len(slots)), 4), "video_coords": torch.cat(coords, dim=2)}, None
    )
    assert reports([video]) == [((3, 4, 5), 0)]


@pytest.mark.parametrize("inference", [False, True])
def test_coordinates_are_read_once_and_when_they_change(inference: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    monkeypatch.setattr(coordinates, "videos", lambda coords: reads.append(coords) or videos(coords))
    with torch.inference_mode(inference):
        tokens, coords = torch.zeros(1, 60, 4), raster((3, 4, 5))[None]
        for _ in range(2):
            assert reports([from_arguments({"hidden_states": tokens, "video_coords": coords}, None)]) == [
                ((3, 4, 5), 0)
            ]
    assert len(reads) == 1
    if not inference:
        coords.copy_(raster((5, 3, 4)))
        assert reports([from_arguments({"hidden_states": tokens, "video_coords": coords}, None)]) == [((5, 3, 4), 0)]
    with torch.inference_mode(inference):
        other = raster((5, 3, 4))[None]
        assert reports([from_arguments({"hidden_states": tokens, "video_coords": other}, None)]) == [((5, 3, 4), 0)]


@pytest.mark.parametrize("sizes", [(None, None, None), (1, 1, 1), (3, 13, 18)])
def test_ltx_without_a_grid_is_refused(sizes: tuple[int | None, ...]) -> None:
    tiny = TINY[LTX]
    model = tiny.build()
    inputs = tiny.inputs() | dict(zip(("num_frames", "height", "width"), sizes, strict=True))
    enable_draft_attention(model)
    with pytest.raises(ValueError, match=r"do not fit the 663 tokens.*pass it, or video_coords"):
        forward(model, inputs)


def test_ltx_window_of_one_for_each_size_uses_the_coordinates() -> None:
    """As LTXI2VLongMultiPromptPipeline."""
    tiny = TINY[LTX]
    model, inputs = tiny.build(), tiny.inputs()
    stock = forward(model, inputs | {"video_coords": raster(models.RAGGED)[None]})
    handle = enable_draft_attention(model, sparsity=0, **EVERYWHERE)
    inputs |= dict(num_frames=1, height=1, width=1, video_coords=raster(models.RAGGED)[None])
    assert error(forward(model, inputs), stock) < models.FLOAT32_ERROR
    assert handle.report().transformers[0].grid == models.RAGGED


def test_kandinsky_with_nabla_is_refused() -> None:
    tiny = TINY["Kandinsky5Transformer3DModel"]
    model = tiny.build()
    model.register_to_config(attention_type="nabla")
    with pytest.raises(ValueError, match=r'attention_type="nabla".*needs attention_type="regular"'):
        enable_draft_attention(model)
    assert not patched(model)


def test_causal_skyreels_runs_dense_and_is_counted() -> None:
    tiny = TINY["SkyReelsV2Transformer3DModel"]
    model, inputs = tiny.build(), tiny.inputs()
    model.register_to_config(num_frame_per_block=3)
    stock = forward(model, inputs)
    handle = enable_draft_attention(model)
    assert torch.equal(forward(model, inputs), stock)
    assert handle.report().transformers[0].dense_calls == {"step": 0, "layer": 1, "mask": 2, "replacement": 0}


@pytest.mark.skipif(not hasattr(diffusers, "LTX2VideoTransformer3DModel"), reason="this diffusers has no LTX-2")
def test_ltx2_with_a_mask_over_pairs_runs_dense_and_is_counted() -> None:
    tiny = TINY["LTX2VideoTransformer3DModel keyframes"]
    model, inputs = tiny.build(), tiny.inputs(2)
    mask = torch.ones(2, 693, 693)
    mask[:, :663, 663:] = 0.3
    inputs["video_self_attention_mask"] = mask
    stock = forward(model, inputs)
    handle = enable_draft_attention(model)
    assert error(forward(model, inputs), stock) < models.FLOAT32_ERROR
    assert handle.report().transformers[0].dense_calls["mask"] == 2


def test_allegro_with_a_mask_over_its_video_runs_dense_and_is_counted() -> None:
    tiny = TINY["AllegroTransformer3DModel"]
    model, inputs = tiny.build(), tiny.inputs(2)
    unmasked = forward(model, inputs)
    inputs["attention_mask"] = (torch.arange(2 * 17) < 20).expand(2, 3, 2 * 13, 2 * 17).long()
    stock = forward(model, inputs)
    assert error(stock, unmasked) > 1e-4
    handle = enable_draft_attention(model)
    assert torch.equal(forward(model, inputs), stock)
    assert handle.report().transformers[0].dense_calls["mask"] == 2


@pytest.mark.skipif(not hasattr(diffusers, "MotifVideoTransformer3DModel"), reason="this diffusers has no Motif-Video")
@pytest.mark.parametrize("gaps", [("000011111111", "111111110000"), ("111111111111", "111001111000")])
def test_motif_video_with_gaps_in_its_text_runs_dense_and_is_counted(gaps: tuple[str, str]) -> None:
    tiny = TINY["MotifVideoTransformer3DModel"]
    model, inputs = tiny.build(), tiny.inputs(2)
    right_padded = forward(model, inputs)
    inputs["encoder_attention_mask"] = torch.tensor([[int(digit) for digit in row] for row in gaps])
    stock = forward(model, inputs)
    assert error(stock, right_padded) > 1e-4
    handle = enable_draft_attention(model, sparsity=0.8, dense_layers=(3,))  # the decoder's, which sees no text
    assert torch.equal(forward(model, inputs), stock)
    assert handle.report().transformers[0].dense_calls["mask"] == 3
    assert error(forward(model, tiny.inputs(2)), right_padded) > 1e-4
    assert handle.report().transformers[0].dense_calls["mask"] == 3


def test_cosmos_control_network_is_a_component_of_its_own() -> None:
    if "CosmosControlNetModel" not in TINY:
        pytest.skip("this diffusers has no CosmosControlNetModel")
    control, cosmos = TINY["CosmosControlNetModel"], TINY["CosmosTransformer3DModel"]
    pipe = Loop(FlowMatchEulerDiscreteScheduler(), transformer=cosmos.build(), controlnet=control.build())
    pipe.scheduler.set_timesteps(8)
    handle = enable_draft_attention(pipe)
    forward(pipe.components["controlnet"], control.inputs())
    forward(pipe.components["transformer"], cosmos.inputs())
    found = handle.report().transformers
    assert [report.component for report in found] == ["transformer", "controlnet"]
    # Both get the timestep in units that are not the scheduler's, and it must not be looked for among its timesteps.
    assert [report.forwards for report in found] == [{"dense": 1, "sparse": 0}] * 2


@pytest.mark.parametrize(
    ("types", "frames"), [([[0, 0, 0, 1]], 3), ([[0, 0, 1, 1], [0, 0, 0, 1]], 2), ([[0, 1, 0, 0]], 4), ([[1] * 4], 4)]
)
def test_frames_of_another_type_behind_the_video_are_references(types: list[list[int]], frames: int) -> None:
    inputs = {"hidden_states": torch.zeros(len(types), 4, 6, 10, 1), "visual_token_type_ids": torch.tensor(types)}
    video = KANDINSKY6.video(inputs, SimpleNamespace(patch_size=(1, 2, 2)))
    assert reports([video]) == [((frames, 3, 5), 0)]


# Replaced processors


def test_projections_fused_while_enabled_are_noticed() -> None:
    tiny = TINY[COGVIDEOX]
    model, inputs = tiny.build(), tiny.inputs()
    handle = enable_draft_attention(model, sparsity=0.8)
    forward(model, inputs)
    model.fuse_qkv_projections()
    with pytest.warns(UserWarning, match=r"2 attention layers of CogVideoX.*FusedCogVideoXAttnProcessor2_0"):
        forward(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward(model, inputs)
    report = handle.report()
    assert report.transformers[0].dense_calls["replacement"] == 4
    assert "4 by replacement" in str(report)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enable_draft_attention(model, sparsity=0.8)
        forward(model, inputs)


@pytest.mark.parametrize("again", [False, True], ids=["disabled", "enabled again"])
def test_projections_unfused_after_a_change_are_stock(again: bool) -> None:
    """Unfusing puts back what diffusers had kept: our processors of before, whose time is over."""
    tiny = TINY[COGVIDEOX]
    model, inputs = tiny.build(), tiny.inputs()
    stock, before = forward(model, inputs), processors(model)
    handle = enable_draft_attention(model, sparsity=0.8)
    sparse = forward(model, inputs)
    assert not torch.equal(sparse, stock)
    model.fuse_qkv_projections()
    handle = enable_draft_attention(model, sparsity=0.7) if again else handle
    handle.disable()
    model.unfuse_qkv_projections()
    assert processors(model) == before
    assert torch.equal(forward(model, inputs), stock)
    enable_draft_attention(model, sparsity=0.8)
    assert torch.equal(forward(model, inputs), sparse)


def test_our_processors_that_somebody_put_back_can_be_replaced() -> None:
    tiny = TINY[COGVIDEOX]
    model, inputs = tiny.build(), tiny.inputs()
    stock = forward(model, inputs)
    handle = enable_draft_attention(model, sparsity=0.8)
    sparse, kept = forward(model, inputs), model.attn_processors
    handle.disable()
    model.set_attn_processor(kept)
    assert torch.equal(forward(model, inputs), stock)
    handle = enable_draft_attention(model, sparsity=0.8)
    assert torch.equal(forward(model, inputs), sparse)
    handle.disable()
    assert not patched(model)
    assert torch.equal(forward(model, inputs), stock)


def test_fusing_projections_of_consisid_changes_nothing() -> None:
    """Its upstream method looks for attention of another class than its own."""
    tiny = TINY["ConsisIDTransformer3DModel"]
    model, inputs = tiny.build(), tiny.inputs()
    enable_draft_attention(model, sparsity=0.8)
    sparse, before = forward(model, inputs), processors(model)
    model.fuse_qkv_projections()
    assert processors(model) == before
    assert torch.equal(forward(model, inputs), sparse)


def test_projections_fused_before_are_sparse() -> None:
    tiny = TINY[COGVIDEOX]
    model, fused, inputs = tiny.build(), tiny.build(), tiny.inputs(2)
    fused.fuse_qkv_projections()
    stock = forward(fused, inputs)
    enable_draft_attention(model, sparsity=0.8)
    handle = enable_draft_attention(fused, sparsity=0.8)
    assert error(forward(fused, inputs), forward(model, inputs)) < models.FLOAT32_ERROR
    handle.disable()
    assert torch.equal(forward(fused, inputs), stock)


# Schedules


def run(pipe: Loop, inputs: models.Inputs, steps: int, name: str = "transformer") -> None:
    pipe.scheduler.set_timesteps(steps)
    for timestep in pipe.scheduler.timesteps:
        forward(pipe.components[name], inputs | {"timestep": timestep.expand(len(inputs["hidden_states"]))})
        pipe.scheduler.step(torch.zeros(1), timestep, torch.zeros(1))


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(shift=5.0), DDIMScheduler()])
@pytest.mark.parametrize(("options", "dense"), [({}, 2), (dict(dense_steps=0.5), 4), (dict(dense_timestep=1e9), 0)])
def test_a_quarter_of_the_steps_is_dense_by_default(scheduler: Any, options: dict[str, float], dense: int) -> None:
    tiny = TINY[COGVIDEOX]
    pipe = Loop(scheduler, transformer=tiny.build())
    handle = enable_draft_attention(pipe, **options)
    run(pipe, tiny.inputs(grid=(1, 8, 16)), 8)
    assert handle.report().transformers[0].steps == {"dense": dense, "sparse": 8 - dense}


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("CosmosTransformer3DModel", "EDMEulerScheduler"),
        ("CosmosTransformer3DModel", "UniPCMultistepScheduler"),
        ("AnyFlowTransformer3DModel", "FlowMapEulerDiscreteScheduler"),
        ("MiniMaxH3Transformer3DModel", "MiniMaxH3Scheduler"),
    ],
)
def test_schedulers_of_single_families(name: str, scheduler: str) -> None:
    """Their models get other timesteps than these schedulers count, or they count upwards."""
    if name not in TINY:
        pytest.skip("this diffusers has no such family")
    tiny = TINY[name]
    pipe = Loop(getattr(diffusers, scheduler)(), transformer=tiny.build())
    handle = enable_draft_attention(pipe)
    pipe.scheduler.set_timesteps(8)
    timesteps = pipe.scheduler.timesteps.tolist()
    for step, timestep in enumerate(timesteps):
        pipe.scheduler._step_index = step or None  # what its `step` would do
        for _ in ("cond", "uncond"):
            forward(pipe.components["transformer"], tiny.inputs(grid=(1, 8, 16), timestep=timestep))
    dense = 2 * round(len(timesteps) / 4)
    assert handle.report().transformers[0].forwards == {"dense": dense, "sparse": 2 * len(timesteps) - dense}


@pytest.mark.skipif(not hasattr(diffusers, "HeliosDMDScheduler"), reason="this diffusers has no Helios")
def test_distilled_scheduler_of_helios() -> None:
    """It counts no steps, and each stage of the pyramid is a run."""
    tiny = TINY["HeliosTransformer3DModel first chunk"]
    pipe = Loop(diffusers.HeliosDMDScheduler(stages=2, stage_range=[0, 0.5, 1]), transformer=tiny.build())
    handle = enable_draft_attention(pipe, dense_steps=0.5)
    for stage in range(2):
        pipe.scheduler.set_timesteps(4, stage)
        for timestep in pipe.scheduler.timesteps:
            for _ in ("cond", "uncond"):
                forward(pipe.components["transformer"], tiny.inputs(grid=(1, 8, 16), timestep=int(timestep)))
    assert pipe.scheduler.step_index is None
    assert handle.report().transformers[0].steps == {"dense": 4, "sparse": 4}
    assert handle.report().transformers[0].forwards == {"dense": 8, "sparse": 8}


def test_enabled_in_the_middle_of_a_run_whose_scheduler_counts_no_steps() -> None:
    """The share is then one of the six steps that are left."""
    tiny = TINY[COGVIDEOX]
    pipe = Loop(DDIMScheduler(), transformer=tiny.build())
    pipe.scheduler.set_timesteps(8)
    handle = enable_draft_attention(pipe, dense_steps=0.5)
    for timestep in pipe.scheduler.timesteps[2:]:
        forward(pipe.components["transformer"], tiny.inputs(grid=(1, 8, 16), timestep=int(timestep)))
    assert handle.report().transformers[0].steps == {"dense": 3, "sparse": 3}


def test_timesteps_of_other_units_are_not_looked_for_in_a_scheduler_that_counts_no_steps() -> None:
    tiny = TINY["CosmosTransformer3DModel"]
    pipe = Loop(DDIMScheduler(), transformer=tiny.build())
    handle = enable_draft_attention(pipe, dense_steps=0.5)
    pipe.scheduler.set_timesteps(8)
    with pytest.warns(UserWarning, match=r"without a step_index.*So no step is dense"):
        forward(pipe.components["transformer"], tiny.inputs(grid=(1, 8, 16)))
    assert handle.report().transformers[0].forwards == {"dense": 0, "sparse": 1}


def test_a_transformer_alone_has_no_dense_steps_by_default() -> None:
    tiny = TINY[COGVIDEOX]
    model = tiny.build()
    handle = enable_draft_attention(model)
    for timestep in (999, 1):
        forward(model, tiny.inputs(timestep=timestep))
    assert handle.report().transformers[0].forwards == {"dense": 0, "sparse": 2}
    handle = enable_draft_attention(model, dense_timestep=500)
    for timestep in (999, 1):
        forward(model, tiny.inputs(timestep=timestep))
    assert handle.report().transformers[0].forwards == {"dense": 1, "sparse": 1}


@pytest.mark.parametrize(
    ("options", "dense"),
    [({}, 2), (dict(dense_steps=0.5), 4), (dict(dense_steps=0), 0), (dict(dense_timestep=math.inf), 0)],
)
def test_rising_timesteps(options: dict[str, float], dense: int) -> None:
    """As Mochi's."""
    tiny = TINY["MochiTransformer3DModel"]
    pipe = Loop(FlowMatchEulerDiscreteScheduler(invert_sigmas=True), transformer=tiny.build())
    handle = enable_draft_attention(pipe, **options)
    run(pipe, tiny.inputs(grid=(1, 8, 16)), 8)
    assert pipe.scheduler.timesteps[0] < pipe.scheduler.timesteps[-1]
    assert handle.report().transformers[0].steps == {"dense": dense, "sparse": 8 - dense}


def test_a_threshold_among_rising_timesteps_is_refused() -> None:
    tiny = TINY["MochiTransformer3DModel"]
    pipe = Loop(FlowMatchEulerDiscreteScheduler(invert_sigmas=True), transformer=tiny.build())
    enable_draft_attention(pipe, dense_timestep=900)
    with pytest.raises(ValueError, match=r"dense_timestep=900.*rise.*Use dense_steps"):
        run(pipe, tiny.inputs(grid=(1, 8, 16)), 8)


def test_two_stages_of_other_sizes() -> None:
    """Each stage sets its timesteps, and each is a run."""
    tiny = TINY[LTX]
    pipe = Loop(FlowMatchEulerDiscreteScheduler(), transformer=tiny.build())
    handle = enable_draft_attention(pipe)
    for grid, steps in (((2, 4, 8), 4), ((2, 8, 16), 8)):
        run(pipe, tiny.inputs(grid=grid), steps)
        assert handle.report().transformers[0].grid == grid
    assert handle.report().transformers[0].steps == {"dense": 3, "sparse": 9}


def test_a_timestep_for_each_frame() -> None:
    """Diffusion forcing: the latest frames, of the largest timestep, say where the run is."""
    tiny = TINY["SkyReelsV2Transformer3DModel forcing"]
    model = tiny.build()
    handle = enable_draft_attention(model, dense_timestep=500)
    for timestep in (900, 400):
        forward(model, tiny.inputs(timestep=timestep))
    assert handle.report().transformers[0].forwards == {"dense": 1, "sparse": 1}


# Grids that change


def test_index_tensors_of_old_grids_are_let_go() -> None:
    tiny = TINY[LTX]
    model = tiny.build()
    enable_draft_attention(model)
    layout.token_layout.cache_clear()
    forward(model, tiny.inputs())
    old = weakref.ref(layout.token_layout(models.RAGGED, 0, 663, DraftConfig.tile, torch.device("cpu")).order)
    assert layout.token_layout.cache_info().currsize == 1
    for columns in range(3, 13):
        forward(model, tiny.inputs(grid=(2, 3, columns)))
    gc.collect()
    assert old() is None
    assert layout.token_layout.cache_info().currsize <= 8


def test_number_of_frames_drops_in_a_run() -> None:
    """As ChronoEdit's does."""
    tiny = TINY["ChronoEditTransformer3DModel"]
    model = tiny.build()
    for frames in (5, 2):
        inputs = tiny.inputs(grid=(frames, 9, 11))
        stock = forward(model, inputs)
        with enable_draft_attention(model, sparsity=0, **EVERYWHERE) as handle:
            assert error(forward(model, inputs), stock) < models.FLOAT32_ERROR
            assert handle.report().transformers[0].grid == (frames, 9, 11)


def test_conditions_stay_exact() -> None:
    """At sparsity 0.9 the tokens in front of the video still attend to all of it."""
    tiny = TINY["LTXVideoTransformer3DModel conditions"]
    model, inputs = tiny.build(), tiny.inputs()
    enable_draft_attention(model, sparsity=0.9, dense_layers=(1, 2))
    front: list[torch.Tensor] = []
    attention = model.transformer_blocks[0].attn1
    attention.register_forward_hook(lambda module, args, output: front.append(output[:, : tiny.prefix]))
    forward(model, inputs)
    enable_draft_attention(model, sparsity=0, dense_layers=(1, 2))
    forward(model, inputs)
    assert error(front[0], front[1]) < models.FLOAT32_ERROR

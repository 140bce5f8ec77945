import threading
from collections.abc import Callable
from typing import Any

import models
import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel, WanVACEPipeline, WanVACETransformer3DModel
from models import RAGGED, error, run_hunyuan_video, run_wan
from paper import enable_draft_attention
from PIL import Image
from torch import Tensor

from diffusers_draft import DraftConfig, disable_draft_attention

EVERYWHERE = dict(dense_layers=(), dense_steps=0)


def wan_22() -> Any:
    return models.wan_pipeline(models.wan(), transformer_2=models.wan(seed=1), boundary_ratio=0.8)


def run_true_cfg(pipe: Any, **options: Any) -> Tensor:
    return run_hunyuan_video(pipe, true_cfg=True, **options)


RUNS: dict[str, tuple[Callable[[], Any], Callable[..., Any]]] = {
    "wan": (models.wan_pipeline, run_wan),
    "wan_22": (wan_22, run_wan),
    "hunyuan_video": (models.hunyuan_video_pipeline, run_hunyuan_video),
    "hunyuan_video_true_cfg": (models.hunyuan_video_pipeline, run_true_cfg),
}


@pytest.mark.parametrize("name", RUNS)
def test_sparsity_0_makes_the_same_video(name: str) -> None:
    make, generate = RUNS[name]
    pipe = make()
    stock = generate(pipe)
    handle = enable_draft_attention(pipe, sparsity=0, **EVERYWHERE)
    assert error(generate(pipe), stock) < 1e-5
    for report in handle.report().transformers:
        assert report.density == 1
        assert report.dense_calls == {"step": 0, "layer": 0, "mask": 0, "replacement": 0}
    handle.disable()
    assert torch.equal(generate(pipe), stock)


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_decoded_video(name: str) -> None:
    make, generate = RUNS[name]
    pipe, grid = make(), (2, 5, 7)
    stock = generate(pipe, grid=grid, output_type="np")
    enable_draft_attention(pipe, sparsity=0, **EVERYWHERE)
    video = generate(pipe, grid=grid, output_type="np")
    assert video.shape == (1, 5, 80, 112, 3)
    assert np.abs(video - stock).max() < 1e-4


@pytest.mark.parametrize("name", RUNS)
def test_sparsity_of_9_in_10(name: str) -> None:
    make, generate = RUNS[name]
    pipe = make()
    stock = generate(pipe, steps=6)
    handle = enable_draft_attention(pipe, sparsity=0.9)
    first = generate(pipe, steps=6)
    assert first.isfinite().all()
    assert 1e-3 < error(first, stock) < 1
    assert torch.equal(generate(pipe, steps=6), first)
    reports = handle.report().transformers
    assert sum(sum(report.steps.values()) for report in reports) == 12
    for report in reports:
        assert report.steps["sparse"] > 0
        assert report.grid == RAGGED
        assert report.density == pytest.approx((5 + 5 + 6) / 36)
        assert report.dense_calls["mask"] == 0


def test_every_resolution_and_length() -> None:
    pipe = models.wan_pipeline()
    handle = enable_draft_attention(pipe, sparsity=0, **EVERYWHERE)
    for grid in ((3, 13, 17), (1, 13, 17), (3, 17, 13), (4, 8, 16)):
        video = run_wan(pipe, grid=grid, steps=2)
        assert handle.report().transformers[0].grid == grid
        with enable_draft_attention(pipe, sparsity=0, dense_steps=1.0) as dense:
            stock = run_wan(pipe, grid=grid, steps=2)
        assert dense.report().transformers[0].forwards["sparse"] == 0
        assert error(video, stock) < 1e-5
        handle = enable_draft_attention(pipe, sparsity=0, **EVERYWHERE)


def test_videos_per_prompt() -> None:
    """Samples of one batch have text of one length, and each its own draft."""
    pipe = models.wan_pipeline()
    options = dict(prompt_embeds=models.random(1, 7, 8), negative_prompt_embeds=models.random(1, 7, 8, seed=1))
    latents = models.random(2, 4, 3, 26, 34)
    enable_draft_attention(pipe, sparsity=0.8, **EVERYWHERE)
    together = run_wan(pipe, num_videos_per_prompt=2, latents=latents, **options)
    for sample in range(2):
        alone = run_wan(pipe, latents=latents[sample : sample + 1], **options)
        assert error(together[sample : sample + 1], alone) < 1e-5


def test_boundary_hands_over_to_the_second_transformer() -> None:
    pipe = wan_22()
    forwards = {"transformer": 0, "transformer_2": 0}
    for name in forwards:
        getattr(pipe, name).register_forward_hook(lambda *_, name=name: forwards.update({name: forwards[name] + 1}))
    handle = enable_draft_attention(pipe, dense_steps=0.5)
    run_wan(pipe, steps=8)
    first, second = handle.report().transformers
    high = sum(t >= 800 for t in pipe.scheduler.timesteps.tolist())
    assert 0 < high < 8
    assert forwards == {"transformer": 2 * high, "transformer_2": 2 * (8 - high)}
    assert first.steps == {"dense": min(4, high), "sparse": max(0, high - 4)}
    assert second.steps == {"dense": max(0, 4 - high), "sparse": min(4, 8 - high)}


@pytest.mark.parametrize("boundary", [0.3, 1.1])
def test_wan_22_with_one_transformer_missing(boundary: float) -> None:
    """All steps lie on one side of the boundary, so the pipeline needs one transformer."""
    there = "transformer" if boundary < 1 else "transformer_2"
    pipe = models.wan_pipeline(**{there: models.wan()}, boundary_ratio=boundary)
    stock = run_wan(pipe)
    handle = enable_draft_attention(pipe, sparsity=0, **EVERYWHERE)
    assert error(run_wan(pipe), stock) < 1e-5
    (report,) = handle.report().transformers
    assert (report.component, report.steps) == (there, {"dense": 0, "sparse": 4})


def components(pipe: Any, *extra: str) -> dict[str, Any]:
    names = ("tokenizer", "text_encoder", "vae", "scheduler")
    return {name: pipe.components[name] for name in names} | dict.fromkeys(extra)


def test_wan_image_to_video_pipeline() -> None:
    """Of Wan 2.2: the image enters as channels of the latents."""
    config = dict(models.wan().config) | {"in_channels": 4 + 4 + 4}
    base = components(models.wan_pipeline(), "image_processor", "image_encoder")
    pipe = WanImageToVideoPipeline(**base, transformer=models.build(WanTransformer3DModel, config))
    pipe.set_progress_bar_config(disable=True)

    def generate() -> Tensor:
        return pipe(
            image=Image.new("RGB", (112, 80), "red"),
            prompt_embeds=models.random(1, 7, 8),
            negative_prompt_embeds=models.random(1, 7, 8, seed=1),
            height=80,
            width=112,
            num_frames=9,
            num_inference_steps=3,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).frames

    stock = generate()
    handle = enable_draft_attention(pipe, sparsity=0, **EVERYWHERE)
    assert error(generate(), stock) < 1e-5
    report = handle.report().transformers[0]
    assert report.grid == (3, 5, 7)
    assert report.forwards == {"dense": 0, "sparse": 6}


def test_pipelines_with_different_settings_do_not_disturb_each_other() -> None:
    settings = [
        dict(sparsity=0.9),
        dict(sparsity=0.5, budget="head", dense_steps=0.5),
        dict(sparsity=0.7, tile=(4, 8)),
    ]
    pipes = [models.wan_pipeline() for _ in settings]
    stock = run_wan(pipes[0])
    handles = [enable_draft_attention(pipe, **options) for pipe, options in zip(pipes, settings, strict=True)]
    expected = []
    for options in settings:
        with_it = models.wan_pipeline()
        enable_draft_attention(with_it, **options)
        expected.append(run_wan(with_it))
    for _ in range(2):
        assert all(torch.equal(run_wan(pipe), video) for pipe, video in zip(pipes, expected, strict=True))
    handles[1].disable()
    assert torch.equal(run_wan(pipes[0]), expected[0])
    assert torch.equal(run_wan(pipes[1]), stock)
    assert torch.equal(run_wan(pipes[2]), expected[2])
    assert [handle.report().transformers[0].attached for handle in handles] == [True, False, True]


def test_two_families_interleaved_step_by_step() -> None:
    wan, hunyuan_video = models.wan_pipeline(), models.hunyuan_video_pipeline()
    for pipe in (wan, hunyuan_video):
        enable_draft_attention(pipe, sparsity=0.8)
    expected, inner = run_wan(wan), run_hunyuan_video(hunyuan_video)

    def run_the_other(pipe: Any, step: int, timestep: int, inputs: dict[str, Any]) -> dict[str, Any]:
        assert torch.equal(run_hunyuan_video(hunyuan_video), inner)
        return inputs

    assert torch.equal(run_wan(wan, callback_on_step_end=run_the_other), expected)


def test_two_threads() -> None:
    settings = {
        "wan": DraftConfig(sparsity=0.9),
        "wan_22": DraftConfig(sparsity=0.6, budget="head", dense_steps=0.25),
        "hunyuan_video_true_cfg": DraftConfig(sparsity=0.8, dense_layers=(0,)),
    }
    pipes = {name: RUNS[name][0]() for name in settings}
    for name, pipe in pipes.items():
        enable_draft_attention(pipe, config=settings[name])
    expected = {name: RUNS[name][1](pipe) for name, pipe in pipes.items()}
    wrong: list[str] = []
    start = threading.Barrier(len(pipes))

    def work(name: str) -> None:
        start.wait(timeout=60)
        for _ in range(4):
            if not torch.equal(RUNS[name][1](pipes[name]), expected[name]):
                wrong.append(name)
        disable_draft_attention(pipes[name])
        enable_draft_attention(pipes[name], config=settings[name])
        if not torch.equal(RUNS[name][1](pipes[name]), expected[name]):
            wrong.append(f"{name} after enabling again")
        done.append(name)

    done: list[str] = []
    threads = [threading.Thread(target=work, args=(name,)) for name in pipes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == sorted(pipes)
    assert wrong == []


def test_wan_vace_pipeline() -> None:
    config = dict(models.wan_vace().config) | {"vace_in_channels": 2 * 4 + 64}
    transformer = models.build(WanVACETransformer3DModel, config)
    pipe = WanVACEPipeline(**components(models.wan_pipeline()), transformer=transformer)
    pipe.set_progress_bar_config(disable=True)

    def generate() -> Tensor:
        return pipe(
            prompt_embeds=models.random(1, 7, 8),
            negative_prompt_embeds=models.random(1, 7, 8, seed=1),
            reference_images=[Image.new("RGB", (112, 80), "red")],
            height=80,
            width=112,
            num_frames=9,
            num_inference_steps=3,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).frames

    stock = generate()
    handle = enable_draft_attention(pipe, sparsity=0, **EVERYWHERE)
    assert error(generate(), stock) < 1e-5
    report = handle.report().transformers[0]
    assert report.grid == (4, 5, 7)  # the reference image is one more frame
    assert len(report.densities) == 5

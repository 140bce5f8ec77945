"""The `generate` command on tiny pipelines that are saved to disk and loaded by path."""

import contextlib
import inspect
import json
import os
import re
import sys
from types import SimpleNamespace

import checkpoints
import diffusers
import imageio
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanPipeline
from paper import enable_draft_attention
from PIL import Image

from diffusers_draft import DraftConfig, DraftHandle
from diffusers_draft.cli import main, model_options
from diffusers_draft.tools.demo.model import WEIGHTS
from diffusers_draft.tools.evaluation.attention import Samples, measure_attention
from diffusers_draft.tools.evaluation.settings import Setting
from diffusers_draft.tools.generation import video
from diffusers_draft.tools.generation.loading import Model, load, pipeline_class, supported_pipelines
from diffusers_draft.tools.generation.run import call_arguments, run

SMALL = ["--prompt", "a red circle", "--height", "208", "--width", "272", "--frames", "9", "--steps", "4"]
"""3 x 13 x 17 tokens: five full blocks and a rest."""
CALL = dict(height=208, width=272, num_frames=9, num_inference_steps=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    checkpoints.wan(folder / "wan")
    checkpoints.wan_i2v(folder / "wan_i2v")
    checkpoints.hunyuan_video(folder / "hunyuan_video")
    Image.new("RGB", (272, 208), "red").save(folder / "red.png")
    return folder


def generate(*arguments, code=0):
    """Runs the command in this process."""
    if code == 0:
        assert main(["generate", *map(str, arguments)]) == 0
        return
    with pytest.raises(SystemExit) as exit_:
        main(["generate", *map(str, arguments)])
    assert exit_.value.code == code


def one_line(capsys):
    """The last line on stderr, which is all that a failing command adds to the bars of what it did before."""
    return last_line(capsys.readouterr().err)


def last_line(err):
    assert err.endswith("\n") and err.count("diffusers-draft: error:") == 1
    line = err.rstrip("\n").rpartition("\n")[2]
    assert line.startswith("diffusers-draft: error:")
    return line


PAPER = ("--schedule", "paper", "--score", "mass", "--probes", "0", "--budget", "head", "--tile", "8x16")


@pytest.mark.parametrize(
    ("name", "layers", "steps"),
    [("wan", "2 sparse, 1 dense", "3 sparse, 1 dense"), ("hunyuan_video", "3 sparse, 2 dense", "2 sparse, 2 dense")],
)
def test_writes_the_video_of_a_plain_pipeline_call(name, layers, steps, folder, tmp_path, capsys):
    out = tmp_path / "new" / "video.mp4"
    generate("--model", folder / name, *SMALL, "--sparsity", "0.8", *PAPER, "--seed", "3", "--output", out)
    printed = capsys.readouterr().out
    assert "sparsity 0.8 paper, head budget, mass score" in printed
    assert "grid      (3, 13, 17) = 663 video tokens" in printed
    assert f"layers    {layers}" in printed and f"steps     {steps}" in printed
    assert re.search(r"Denoising took \d+\.\d s, the whole call \d+\.\d s\.", printed)
    assert printed.endswith(f"Wrote {out}.\n")
    frames = imageio.v3.imread(out)
    assert frames.shape == (9, 208, 272, 3)
    assert [path.name for path in out.parent.iterdir()] == ["video.mp4"]

    pipe = DiffusionPipeline.from_pretrained(folder / name)
    enable_draft_attention(pipe, config=DraftConfig.paper(0.8))
    noise = torch.Generator().manual_seed(3)
    expected = pipe(prompt="a red circle", **CALL, generator=noise, output_type="np").frames[0]
    other = pipe(prompt="a red circle", **CALL, generator=noise, output_type="np").frames[0]
    assert distance(frames, expected) < 0.6 * distance(frames, other)  # H.264 blurs what looks like noise


def test_steps_and_layers_that_stay_dense(folder, tmp_path, capsys):
    options = ["--dense-timestep", "900", "--dense-layers", "0+2"]
    generate("--model", folder / "wan", *SMALL, *options, "--output", tmp_path / "video.mp4")
    printed = capsys.readouterr().out
    assert "layers    1 sparse, 2 dense" in printed and "steps     3 sparse, 1 dense" in printed


def distance(frames, video):
    return np.abs(frames - 255.0 * video).mean()


def clip(model, seed=0, prompt="a red circle", **options):
    pipe = load(model, with_image="image" in options)
    return run(pipe, call_arguments(pipe, prompt=prompt, seed=seed, **CALL, **options)).frames


def test_frames_are_those_of_the_pipeline_and_depend_on_seed_and_prompt(folder):
    pipe = DiffusionPipeline.from_pretrained(folder / "wan")
    generator = torch.Generator().manual_seed(0)
    expected = pipe(prompt="a red circle", **CALL, generator=generator, output_type="np").frames[0]
    model = Model(name=str(folder / "wan"))
    frames = clip(model)
    assert frames.dtype == np.uint8
    assert np.abs(frames - expected * 255.0).max() <= 0.5001
    for other in (clip(model, seed=1), clip(model, prompt="a blue square"), clip(model, guidance_scale=1.0)):
        assert (other != frames).any()
    assert (clip(model, negative_prompt="stripes") != frames).any()


def test_the_demos_model(tmp_path, capsys):
    prompt = "a big red plain circle moving left over blue waves, camera still"
    size = ["--height", "64", "--width", "128", "--frames", "9", "--steps", "3", "--guidance-scale", "1"]
    generate("--model", WEIGHTS, "--prompt", prompt, *size, "--output", tmp_path / "out.mp4")
    assert "grid      (5, 8, 16) = 640 video tokens" in capsys.readouterr().out
    assert imageio.v3.imread(tmp_path / "out.mp4").shape == (9, 64, 128, 3)


def test_dense_leaves_draft_attention_out(folder, tmp_path, capsys):
    generate("--model", folder / "wan", *SMALL, "--dense", "--output", tmp_path / "video.mp4")
    assert "dense: draft attention was left out" in capsys.readouterr().out
    dense = clip(Model(name=str(folder / "wan")))
    video.write_video(dense, tmp_path / "same.mp4", 16)
    assert (imageio.v3.imread(tmp_path / "video.mp4") == imageio.v3.imread(tmp_path / "same.mp4")).all()


def test_image_to_video(folder, tmp_path, capsys):
    image = ["--image", folder / "red.png"]
    generate("--model", folder / "wan_i2v", *SMALL, *image, "--output", tmp_path / "video.mp4")
    assert "density" in capsys.readouterr().out
    model = Model(name=str(folder / "wan_i2v"))
    red, blue = (clip(model, image=Image.new("RGB", (272, 208), colour)) for colour in ("red", "blue"))
    assert (red != blue).any()


def test_options_reach_the_pipeline(folder, tmp_path, monkeypatch):
    seen = {}

    def call(pipe, **arguments):
        seen.update(arguments)
        raise ValueError("enough")

    monkeypatch.setattr(WanPipeline, "__call__", call_with_signature(call))
    options = ["--negative-prompt", "stripes", "--guidance-scale", "2.5"]
    generate("--model", folder / "wan", *SMALL, *options, "--seed", "5", "--output", tmp_path / "a.mp4", code=2)
    seed = seen.pop("generator").initial_seed()
    text = dict(prompt="a red circle", negative_prompt="stripes", output_type="np")
    assert (seed, seen) == (5, text | dict(guidance_scale=2.5) | CALL)


def call_with_signature(call):
    call.__signature__ = inspect.signature(WanPipeline.__call__)
    return call


def test_components_get_their_dtypes(folder):
    pipe = load(Model(name=str(folder / "wan_i2v"), dtype=torch.bfloat16), with_image=True)
    assert pipe.transformer.dtype == pipe.text_encoder.dtype == torch.bfloat16
    assert pipe.vae.dtype == pipe.image_encoder.dtype == torch.float32


def test_fp8_stores_the_transformer_in_float8_and_computes_in_the_dtype(folder):
    pipe = load(Model(name=str(folder / "wan"), fp8=True))
    assert pipe.transformer.blocks[1].attn1.to_q.weight.dtype is torch.float8_e4m3fn
    frames = run(pipe, call_arguments(pipe, prompt="a red circle", seed=0, **CALL)).frames
    exact = clip(Model(name=str(folder / "wan")))
    difference = np.abs(frames.astype(float) - exact).mean()
    assert 0 < difference < 30


def test_compile_compiles_the_repeated_blocks(folder, tmp_path, monkeypatch, capsys):
    calls = []
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: calls.append((module, options)))
    pipe = load(Model(name=str(folder / "wan"), compile=True))
    assert calls == [(block, {"fullgraph": True}) for block in pipe.transformer.blocks]
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compiled(module, backend="eager"))
    generate("--model", folder / "wan", *SMALL, "--compile", "--vae-tiling", "--output", tmp_path / "video.mp4")
    assert "density" in capsys.readouterr().out


def test_vae_tiling(folder):
    assert load(Model(name=str(folder / "wan"), vae_tiling=True)).vae.use_tiling
    assert not load(Model(name=str(folder / "wan"))).vae.use_tiling


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offload(offload, folder, monkeypatch):
    model = Model(name=str(folder / "wan"), offload=offload)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=rf"Offloading \({offload}\) needs an accelerator"):
            load(model)
        return
    frames = clip(model)
    assert np.abs(frames.astype(float) - clip(Model(name=str(folder / "wan")))).mean() < 5


def test_pipeline_class_follows_the_model_index():
    def chosen(name, with_image=False, **index):
        return pipeline_class({"_class_name": name} | index, with_image).__name__

    assert chosen("WanPipeline") == "WanPipeline"
    assert chosen("WanPipeline", expand_timesteps=True) == "WanPipeline"
    assert chosen("WanPipeline", with_image=True, expand_timesteps=True) == "WanImageToVideoPipeline"
    assert chosen("HunyuanVideoImageToVideoPipeline", with_image=True) == "HunyuanVideoImageToVideoPipeline"
    for name, with_image, message in [
        ("StableDiffusionPipeline", False, "The model is a StableDiffusionPipeline. Supported are WanPipeline, "),
        ("WanVideoToVideoPipeline", False, "The model is a WanVideoToVideoPipeline"),
        ("WanPipeline", True, "WanPipeline takes no image. Pipelines that do: WanImageToVideoPipeline, "),
        ("WanImageToVideoPipeline", False, "makes a video from an image and needs one"),
    ]:
        with pytest.raises(ValueError, match=message):
            chosen(name, with_image)
    for other in ("WanAnimatePipeline", "LucyEditPipeline", "Cosmos2_5_TransferPipeline"):
        assert other not in supported_pipelines()  # they need more than a text and an image


@pytest.mark.parametrize("name", supported_pipelines())
def test_supported_pipelines_take_what_they_are_called_with(name):
    """Also those whose calls have no `callback_on_step_end`, as HunyuanVideo 1.5's."""
    given = {"prompt": "a cat", "generator": None, "output_type": "np"}
    try:
        chosen = pipeline_class({"_class_name": name}, False)
    except ValueError as refusal:
        assert "needs one" in str(refusal)
        chosen = pipeline_class({"_class_name": name}, True)
        given["image"] = None
    inspect.signature(chosen.__call__).bind(None, **given)


@pytest.mark.skipif(not hasattr(diffusers, "HunyuanVideo15Pipeline"), reason="this diffusers has none")
def test_a_pipeline_that_calls_back_nobody():
    pipe, arguments = hunyuan_video15()
    handle = enable_draft_attention(pipe, 0.5)
    clip = run(pipe, arguments)
    assert clip.frames.shape == (5, 192, 256, 3)
    assert 0 < clip.denoising_seconds < clip.seconds
    assert sum(handle.report().transformers[0].steps.values()) == 3
    handle.disable()
    rows = measure_attention(pipe, arguments, [Setting(DraftConfig(sparsity=0.5))], Samples(layers=1, heads=1), 0)
    assert [row["step"] for row in rows.popitem()[1]] == [0, 1, 2]


def hunyuan_video15():
    """A tiny pipeline of HunyuanVideo 1.5, and what it is called with."""
    heads = dict(num_attention_heads=2, attention_head_dim=16, num_layers=2, num_refiner_layers=1)
    text = dict(text_embed_dim=8, text_embed_2_dim=10, image_embed_dim=7, rope_axes_dim=(4, 6, 6))
    transformer = diffusers.HunyuanVideo15Transformer3DModel(in_channels=9, out_channels=4, **heads, **text)
    vae = diffusers.AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(16,) * 5, layers_per_block=1)
    missing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=6.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    parts = dict(transformer=transformer.eval(), vae=vae.eval(), scheduler=scheduler, guider=guider)
    embeds = {
        f"{sign}prompt_embeds{which}": torch.randn(1, 9, size)
        for sign in ("", "negative_")
        for which, size in (("", 8), ("_2", 10))
    }
    masks = {name.replace("embeds", "embeds_mask"): torch.ones(1, 9) for name in embeds}
    size = dict(height=192, width=256, num_frames=5, num_inference_steps=3)
    return diffusers.HunyuanVideo15Pipeline(**parts, **missing), embeds | masks | size


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("HeliosPipeline", False),
        ("Cosmos2_5_PredictBasePipeline", False),
        ("LTXConditionPipeline", False),
        ("LTXImageToVideoPipeline", True),
        ("Cosmos2VideoToWorldPipeline", True),
        ("HunyuanVideo15ImageToVideoPipeline", True),
    ],
)
def test_an_image_is_asked_for_where_nothing_goes_without(name, needs):
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    with pytest.raises(ValueError, match="needs one") if needs else contextlib.nullcontext():
        pipeline_class({"_class_name": name}, False)


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def load(*arguments, **options):
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(model_options, "load", load)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "triton"], "Backend 'triton' needs "),
        (["--backend", "fa4"], "Backend 'fa4' needs "),
        (["--fps", "-5"], "--fps: must be a number of frames per second above 0, got '-5'"),
        (["--fps", "nan"], "--fps: must be a number of frames per second above 0, got 'nan'"),
        (["--steps", "0"], "--steps: must be a whole number from 1 on, got '0'"),
        (["--frames", "-1"], "--frames: must be a whole number from 1 on, got '-1'"),
        (["--height", "0"], "--height: must be a whole number from 1 on, got '0'"),
        (["--width", "12.5"], "--width: must be a whole number from 1 on, got '12.5'"),
        (["--guidance-scale", "nan"], "--guidance-scale: must be a finite number, got 'nan'"),
        (["--seed", str(2**64)], "--seed: must be below 2^63"),
        (["--probes", "-1"], "probes must be a whole number of rows"),
        (["--dense-steps", "x"], "--dense-steps: must be a share of the run in [0, 1], as 0.25, got 'x'"),
        (["--dense-timestep", "nan"], "--dense-timestep: must be a finite number, got 'nan'"),
        (["--dense-layers", "0,1"], "--dense-layers: expected indices joined by +, as in 0+1, or none, got '0,1'"),
    ],
)
def test_options_are_checked_before_the_model_is_loaded(options, message, tmp_path, nothing_is_loaded, capsys):
    if torch.cuda.is_available() and "--backend" in options:
        pytest.skip("it may run here")
    generate("--model", "owner/name", *SMALL, "--output", tmp_path / "a.mp4", *options, code=2)
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_frame_rate_that_ffmpeg_refuses_is_found_before_the_model_is_loaded(tmp_path, nothing_is_loaded, capsys):
    generate("--model", "owner/name", *SMALL, "--output", tmp_path / "a.mp4", "--fps", "1e300", code=2)
    assert "ffmpeg could not write a video" in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_is_one_line_and_leaves_no_file(folder, tmp_path, monkeypatch, capsys):
    def interrupt(frames, path, fps):
        path.write_bytes(b"half a file")
        if len(frames) > 1:
            raise KeyboardInterrupt
        encode(frames, path, fps)

    encode = video._encode
    monkeypatch.setattr(video, "_encode", interrupt)
    generate("--model", folder / "wan", *SMALL, "--dense", "--output", tmp_path / "video.mp4", code=130)
    assert capsys.readouterr().err.endswith("\ndiffusers-draft: stopped\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("/nowhere/at/all", [], "'/nowhere/at/all' is neither a folder nor a hub id of the form owner/name"),
        (".", [], "no file named model_index.json"),
        ("image", [], "The model is a FluxPipeline. Supported are WanPipeline"),
        ("broken", [], "broken"),
        ("wan", ["--sparsity", "1.5"], "sparsity must be in [0, 1), got 1.5"),
        ("wan", ["--tile", "8by8"], "A tile is numbers of tokens joined by x, as in 2x8x8, got '8by8'"),
        ("wan", ["--dense-steps", "2"], "dense_steps is a share of the run"),
        ("wan", ["--dense-steps", "1"], "got 1. For one step of 50 give 0.02, for all of them 1.0"),
        ("wan", ["--backend", "magic"], "Unknown backend 'magic'"),
        ("wan", ["--backend", "triton"], "Backend 'triton' needs "),
        ("wan", ["--image", "missing.png"], "No such file or directory: 'missing.png'"),
        ("wan", ["--image", __file__], "cannot identify image file"),
        ("wan", ["--height", "100"], "divisible by 16"),
        ("wan", ["--output", "video.gif"], "Videos are written as .mp4, got 'video.gif'"),
        ("wan", ["--output", "/proc/here/video.mp4"], "/proc/here"),
        ("hunyuan_video", ["--negative-prompt", "stripes"], "ignores a negative prompt"),
    ],
)
def test_errors_are_one_line(model, options, message, folder, tmp_path, monkeypatch, capsys):
    if torch.cuda.is_available() and "triton" in options:
        pytest.skip("triton runs here")
    monkeypatch.chdir(tmp_path)
    for name, content in (("image", '{"_class_name": "FluxPipeline"}'), ("broken", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(content)
    if (folder / model).is_dir() and model != ".":
        model = folder / model
    generate("--model", model, *SMALL, *options, code=2)
    assert message in one_line(capsys)


def test_image_for_a_model_that_takes_none(folder, tmp_path, capsys):
    out = ["--output", tmp_path / "a.mp4"]
    generate("--model", folder / "wan", *SMALL, "--image", folder / "red.png", *out, code=2)
    assert "WanPipeline takes no image" in one_line(capsys)


def test_missing_packages_are_named(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    generate("--model", folder / "wan", *SMALL, code=2)
    assert "imageio_ffmpeg is not installed: pip install 'diffusers-draft[generate]'" in one_line(capsys)


@pytest.mark.parametrize("ffmpeg", ["/bin/false", "/nowhere/ffmpeg"])
def test_without_ffmpeg_nothing_is_computed(ffmpeg, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", ffmpeg)
    generate("--model", folder / "wan", *SMALL, "--output", tmp_path / "video.mp4", code=2)
    line = one_line(capsys)
    assert "ffmpeg could not write a video" in line
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def ffmpeg_fails_later(monkeypatch):
    """Encodes the trial and then no more."""
    encode = video._encode

    def fail(frames, path, fps):
        if len(frames) > 1:
            path.write_bytes(b"half a file")
            raise OSError("No space left on device")
        encode(frames, path, fps)

    monkeypatch.setattr(video, "_encode", fail)


def test_frames_are_kept_when_the_video_cannot_be_written(folder, tmp_path, capsys, ffmpeg_fails_later):
    generate("--model", folder / "wan", *SMALL, "--dense", "--output", tmp_path / "video.mp4", code=2)
    printed, error = capsys.readouterr()
    assert "draft attention was left out" in printed and "Denoising took" in printed and "Wrote" not in printed
    line = last_line(error)
    assert "No space left on device" in line and str(tmp_path / "video.npz") in line
    assert [path.name for path in tmp_path.iterdir()] == ["video.npz"]
    kept = np.load(tmp_path / "video.npz")["frames"]
    assert (kept == clip(Model(name=str(folder / "wan")))).all()


def test_frames_are_kept_elsewhere_on_a_full_disk(tmp_path, monkeypatch):
    save = np.savez_compressed

    def full(path, **arrays):
        if path.parent == tmp_path:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(path, **arrays)

    monkeypatch.setattr(np, "savez_compressed", full)
    frames = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    kept = video.keep_frames(frames, tmp_path / "video.mp4")
    assert kept.parent != tmp_path and kept.name == "video.npz"
    assert (np.load(kept)["frames"] == frames).all()
    assert list(tmp_path.iterdir()) == []
    kept.unlink()
    kept.parent.rmdir()


def test_a_report_that_fails_costs_no_video(folder, tmp_path, monkeypatch):
    def report(handle):
        raise BrokenPipeError

    monkeypatch.setattr(DraftHandle, "report", report)
    with pytest.raises(BrokenPipeError):
        generate("--model", folder / "wan", *SMALL, "--output", tmp_path / "a.mp4")
    assert imageio.v3.imread(tmp_path / "a.mp4").shape == (9, 208, 272, 3)


def test_a_video_behind_a_link_is_written_there(tmp_path):
    """Also in a folder of its own, under a name that says nothing of its kind."""
    store, link = tmp_path / "store", tmp_path / "link.mp4"
    store.mkdir()
    link.symlink_to(store / "0a1b")
    video.check_writable(link, 16)
    assert not any(store.iterdir())
    video.write_video(np.zeros((3, 32, 32, 3), np.uint8), link, 16)
    assert link.is_symlink() and imageio.v3.imread(link, extension=".mp4").shape == (3, 32, 32, 3)
    assert [path.name for path in store.iterdir()] == ["0a1b"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_link_into_a_folder_that_cannot_be_written_is_found_in_advance(tmp_path):
    store, link = tmp_path / "store", tmp_path / "link.mp4"
    store.mkdir(mode=0o500)
    link.symlink_to(store / "a.mp4")
    with pytest.raises(OSError, match="Permission denied"):
        video.check_writable(link, 16)


def test_an_image_is_read_upright(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: the camera was held upright
    Image.new("RGB", (40, 20)).save(tmp_path / "photo.jpg", exif=turned)
    assert model_options.image(SimpleNamespace(image=tmp_path / "photo.jpg")).size == (20, 40)


def test_compiling_what_diffusers_does_not_compile_is_refused_before_loading(tmp_path, monkeypatch):
    index = {"_class_name": "CogVideoXPipeline", "transformer": ["diffusers", "CogVideoXTransformer3DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"no repeated blocks of a CogVideoXTransformer3DModel\. Leave --compile out"):
        load(Model(name=str(tmp_path), compile=True))


def test_video_that_ffmpeg_cuts_short_is_an_error(tmp_path, monkeypatch):
    frames = np.zeros((3, 32, 32, 3), np.uint8)
    monkeypatch.setattr(video.imageio_ffmpeg, "count_frames_and_secs", lambda path: (2, 1.0))
    with pytest.raises(OSError, match="2 of 3 frames written"):
        video.write_video(frames, tmp_path / "video.mp4", 16)
    assert list(tmp_path.iterdir()) == []


def test_video_that_is_not_finite_is_an_error(folder):
    pipe = load(Model(name=str(folder / "wan")))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    pipe.transformer.proj_out.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        run(pipe, call_arguments(pipe, prompt="a", seed=0, **CALL))


def test_unknown_arguments_are_named(folder):
    pipe = load(Model(name=str(folder / "wan")))
    with pytest.raises(ValueError, match="WanPipeline takes no colour"):
        call_arguments(pipe, prompt="a", seed=0, colour="red")

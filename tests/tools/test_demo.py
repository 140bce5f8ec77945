"""The `diffusers-draft` command and the demo behind it."""

import contextlib
import functools
import io
import os
import re
import runpy
import signal
import subprocess
import sys

import imageio
import models
import numpy as np
import pytest
import torch
from diffusers.utils.logging import is_progress_bar_enabled
from paper import enable_draft_attention
from PIL import Image
from torch.nn.functional import scaled_dot_product_attention

import diffusers_draft
from diffusers_draft import DraftConfig
from diffusers_draft.cli import main
from diffusers_draft.tools.demo import model
from diffusers_draft.tools.demo.capture import Captured, captured
from diffusers_draft.tools.demo.model import WEIGHTS, demo_pipeline
from diffusers_draft.tools.demo.pictures import draft_picture, side_by_side
from diffusers_draft.tools.demo.scenes import COLOURS, unknown_words
from diffusers_draft.tools.generation.run import call_arguments, run

TINY = ["--steps", "2", "--frames", "5", "--height", "64", "--width", "128"]
"""3 x 8 x 16 tokens: twelve blocks."""


@pytest.fixture(scope="module")
def pipe():
    pipe = demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(pipe, prompt="a big red plain star spinning over blue sky, camera still", seed=0, **given):
    """Of one call for a tiny video; each call needs new ones, with a fresh generator."""
    size = {"num_frames": 5, "height": 64, "width": 128, "num_inference_steps": 2}
    return call_arguments(pipe, prompt=prompt, seed=seed, guidance_scale=1.0, **size) | given


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One run of the command: its folder, what it printed and its progress bars."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(["demo", *TINY, "--sparsity", "0.5", "--output", str(folder)]) == 0
    return folder, out.getvalue(), err.getvalue()


def test_demo_prints_the_report_and_both_times(demo):
    folder, out, err = demo
    assert "grid      (3, 8, 16) = 384 video tokens" in out
    assert "steps     2 sparse, 0 dense" in out
    assert "layers    6 sparse, 0 dense" in out
    assert "density   0.500 (forwards from 0.500 to 0.500; asked for 0.500)" in out
    assert re.search(r"Denoising: \d+\.\d s dense, \d+\.\d s with draft attention: \d+\.\dx\.", out)
    assert re.search(r"The two videos: PSNR \d+\.\d dB, SSIM [01]\.\d{3}", out)
    assert str(folder) in out
    assert "dense: 100%" in err and "draft attention: 100%" in err


def test_demo_writes_both_videos_and_a_picture(demo):
    folder, _, _ = demo
    assert sorted(path.name for path in folder.iterdir()) == [
        "dense-and-draft.gif",
        "dense-and-draft.mp4",
        "draft-map.png",
    ]
    assert imageio.v3.imread(folder / "dense-and-draft.mp4").shape == (5, 2 * 64 + 24, 2 * 2 * 128, 3)
    with Image.open(folder / "dense-and-draft.gif") as gif:
        assert gif.format == "GIF"
        assert gif.size == (2 * 2 * 128, 2 * 64 + 24)
        assert gif.n_frames == 5
        gif.seek(4)
        assert len(gif.convert("RGB").getcolors(1 << 24)) > 50
    with Image.open(folder / "draft-map.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_sparsity_0_gives_the_dense_video(tmp_path, capsys):
    main(["demo", *TINY, "--sparsity", "0", "--output", str(tmp_path)])
    out = capsys.readouterr().out
    assert "density   1.000" in out
    assert float(re.search(r"PSNR (\S+) dB", out)[1]) > 90 and "SSIM 1.000" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--sparsity", "1.5"], "sparsity must be in [0, 1), got 1.5"),
        (["demo", "--sparsity", "much"], "invalid float value: 'much'"),
        (["demo", "--steps", "0"], "--steps: must be a whole number from 1 on, got '0'"),
        (["demo", "--seed", "-1"], "--seed: must be a whole number from 0 on, got '-1'"),
        (["demo", "--seed", str(2**63)], "--seed: must be below 2^63"),
        (["demo", "--frames", "4"], "--frames must be an odd number"),
        (["demo", "--height", "40"], "--height must be a multiple of 16"),
        (["demo", "--width", "-16"], "--width must be a multiple of 16"),
        (["demo", "--frames", "1", "--height", "32", "--width", "32"], "the video has 16 tokens"),
        (["demo", "--colour", "red"], "unrecognized arguments: --colour red"),
        (["demo", "--prompt", "a red cat over blue tables"], "does not know 'cat', 'tables'. It knows a and big"),
        (["demo", "--prompt", " "], "The prompt is empty"),
        (["dance"], "invalid choice: 'dance'"),
        ([], "required: command"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert message in err
    assert err.startswith("diffusers-draft") and err.count("\n") == 1 and err.endswith("\n")


def test_output_that_is_a_file_is_an_error(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit) as exit_:
        main(["demo", *TINY, "--output", str(file)])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["dense-and-draft.gif", "draft-map.png"])
def test_a_file_that_cannot_be_written_is_found_before_the_work(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model, "demo_pipeline", None)
    (tmp_path / name).mkdir()
    with pytest.raises(SystemExit) as exit_:
        main(["demo", *TINY, "--output", str(tmp_path)])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert f"{name} cannot be written: it is not a file" in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_ctrl_c_before_the_command_begins_is_one_line(monkeypatch, capsys):
    class Interrupted:
        def find_spec(self, name, *_):
            if name == "diffusers_draft.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "diffusers_draft.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("diffusers_draft", run_name="__main__")
    assert exit_.value.code == 130
    assert capsys.readouterr().err == "diffusers-draft: stopped\n"


def test_ctrl_c_is_one_line(tmp_path):
    many = [*TINY, "--steps", "100000", "--output", str(tmp_path)]
    command = [sys.executable, "-m", "diffusers_draft", "demo", *many]
    # Whoever runs the tests in the background has Ctrl-C ignored, and processes inherit that.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=heed) as process:
        printed = b""
        # Once a step is over: a bar that was only just made may have no time to end its line.
        while not re.search(rb" [1-9]\d*/100000", printed) and process.poll() is None:
            printed += os.read(process.stderr.fileno(), 4096)
        process.send_signal(signal.SIGINT)
        printed += process.stderr.read()
    assert process.returncode == 130
    *before, line, end = printed.decode().split("\n")
    assert (line, end) == ("diffusers-draft: stopped", "")
    assert any("step/s" in bar for bar in before) and not any("Traceback" in other for other in before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["matplotlib", "ftfy"])  # of which the pipeline would miss one only later
def test_missing_packages_are_named_with_the_install_line(package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as exit_:
        main(["demo", *TINY])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert "pip install 'diffusers-draft[demo]'" in err and err.count("\n") == 1
    assert err.endswith(f"{package} is not installed: pip install 'diffusers-draft[demo]'\n")


def test_python_m_runs_the_command():
    command = [sys.executable, "-m", "diffusers_draft", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == diffusers_draft.__version__


def test_pipeline_is_the_same_every_time_and_leaves_the_global_seed_alone(pipe):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    again = demo_pipeline()
    assert torch.equal(torch.rand(4), expected)
    for component in ("transformer", "vae"):
        weights, others = (getattr(p, component).state_dict() for p in (pipe, again))
        assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_videos_depend_on_the_seed_alone(pipe):
    first, again, other = (pipe(**arguments(pipe, seed=seed), output_type="latent").frames for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (1, 12, 3, 16, 32)


def test_pipeline_is_silent_and_in_float32(capsys):
    pipe = demo_pipeline()
    assert capsys.readouterr() == ("", "")
    assert is_progress_bar_enabled()
    for component in (pipe.transformer, pipe.vae, pipe.text_encoder):
        assert not component.training
        assert {parameter.dtype for parameter in component.parameters()} == {torch.float32}


@pytest.mark.parametrize("colour", ["blue", "green", "yellow"])
def test_the_model_knows_its_words(pipe, colour):
    prompt = f"a small pink plain ring standing still over {colour} stripes, camera still"
    frames = run(pipe, arguments(pipe, prompt, num_inference_steps=6, guidance_scale=3.0)).frames
    middle = np.median(frames.reshape(-1, 3), axis=0)
    # The ground is the colour at 55 to 100 %.
    away = {name: min(np.linalg.norm(middle - 255 * np.array(rgb) * part) for part in np.linspace(0.55, 1, 10))
            for name, rgb in COLOURS.items()}  # fmt: skip
    assert min(away, key=away.get) == colour


def test_the_package_holds_the_model_and_its_card():
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*.safetensors")) < 10e6
    card = (WEIGHTS / "README.md").read_text()
    assert all((WEIGHTS / name).exists() and name in card for name in ("samples.jpg", "loss.png", "prompts.txt"))
    prompts = (WEIGHTS / "prompts.txt").read_text().splitlines()
    assert len(set(prompts)) == 64 and not any(map(unknown_words, prompts))


def test_captured_queries_and_keys_are_those_of_the_attention(pipe):
    """Attention recomputed from what was captured gives the layer's output, and nobody notices the capture."""
    layer = pipe.transformer.blocks[1].attn1
    stock_video = pipe(**arguments(pipe), output_type="latent").frames
    seen = {}
    hook = layer.register_forward_hook(lambda layer, args, output: seen.update(hidden=args[0], output=output))
    with captured(pipe.transformer, "blocks.1.attn1") as tensors:
        video = pipe(**arguments(pipe), output_type="latent").frames
    hook.remove()
    assert torch.equal(video, stock_video)
    value = layer.to_v(seen["hidden"]).unflatten(2, (layer.heads, -1))
    attended = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (tensors.query, tensors.key, value)))
    expected = layer.to_out[0](attended.transpose(1, 2).flatten(2))
    torch.testing.assert_close(seen["output"], expected)


@pytest.mark.parametrize("name", [name for name in models.TINY if not name.startswith("wan")])
def test_capture_in_every_family(name):
    """Also where dense forwards run upstream's code: nothing but rounding is changed."""
    tiny = models.TINY[name]
    model, inputs = tiny.build(), tiny.inputs(1)
    stock = models.forward(model, inputs)
    with captured(model, tiny.layers[-1]) as tensors:
        assert models.error(models.forward(model, inputs), stock) < tiny.tolerance
    assert tensors.query is not None and tensors.query.shape == tensors.key.shape == tensors.value.shape
    assert torch.equal(models.forward(model, inputs), stock)


def test_capture_leaves_no_trace_after_an_error(pipe):
    layer = pipe.transformer.blocks[1].attn1
    module = sys.modules[type(layer.processor).__module__]
    stock, processor = module.dispatch_attention_fn, layer.processor
    with captured(pipe.transformer, "blocks.1.attn1"), pytest.raises(RuntimeError, match="outside of its transformer"):
        layer(None)
    assert layer.processor is processor
    assert module.dispatch_attention_fn is stock
    assert not layer._forward_pre_hooks and not layer._forward_hooks


@pytest.mark.parametrize("dense_layers", [(), (1,)])
def test_capture_refuses_while_draft_attention_is_enabled(pipe, dense_layers):
    """Also in a layer that it leaves dense: capturing would replace the settings."""
    with enable_draft_attention(pipe, dense_layers=dense_layers) as handle:
        with pytest.raises(ValueError, match="Disable it first"), captured(pipe.transformer, "blocks.1.attn1"):
            pass
        assert handle.report().transformers[0].attached


def test_capture_refuses_another_processor(pipe):
    layer = pipe.transformer.blocks[1].attn1
    stock, layer.processor = layer.processor, type("Mine", (), {})()
    with pytest.raises(ValueError, match="got Mine"), captured(pipe.transformer, "blocks.1.attn1"):
        pass
    layer.processor = stock


def test_side_by_side_puts_videos_in_order_under_a_caption():
    black = np.zeros((2, 16, 32, 3), np.uint8)
    white = black + np.uint8(255)
    pairs = side_by_side((black, white), ("black", "white"))
    assert [pair.size for pair in pairs] == [(128, 56)] * 2
    pixels = np.asarray(pairs[0])[24:]
    assert (pixels[:, :64] == 0).all() and (pixels[:, 64:] == 255).all()
    assert (np.asarray(pairs[0])[:24] < 128).any()


@pytest.mark.parametrize("grid", [(1, 8, 48), (3, 9, 17)])
def test_draft_picture_of_any_grid(grid):
    frames, rows, columns = grid
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, frames * rows * columns, 2, 16, generator=generator)
    video = np.random.default_rng(0).integers(0, 256, (2 * frames - 1, rows * 4, columns * 4, 3), np.uint8)
    before = query.clone(), key.clone()
    picture = draft_picture(Captured(query, key, key), grid, video, DraftConfig(sparsity=0.5), head=1)
    assert picture.mode == "RGB" and picture.width == 1000
    assert torch.equal(query, before[0]) and torch.equal(key, before[1])

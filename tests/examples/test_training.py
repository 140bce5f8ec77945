"""Training of the demo's model: what it learns from, that it can be stopped, and what comes out."""

import dataclasses
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imageio
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from PIL import Image
from torch import nn

import diffusers_draft
from diffusers_draft.cli import main
from diffusers_draft.tools.demo.scenes import WORDS, captions, unknown_words
from examples.training import __main__ as command
from examples.training import autoencoder, card, checkpoint, flow, loop
from examples.training.architecture import untrained_pipeline, word_tokenizer
from examples.training.autoencoder import autoencoder_phase, encode, measure_latents, reconstruction_psnr
from examples.training.clips import HELD_OUT, clips, noise_generator, scenes
from examples.training.flow import LONGEST, STAGES, USES, WINDOW, embed, flow_phase, tokenized
from examples.training.loop import Phase, train

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="the example needs torch 2.9")

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
JUDGED = (2, (9, 64, 64))
"""Fewer and smaller clips than the real training judges its autoencoder by."""


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = untrained_pipeline(0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def faked(pipe: Any, transformer: Any) -> Any:
    """The pipeline with a function as its transformer."""
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "device")}
    return SimpleNamespace(**parts, transformer=SimpleNamespace(train=lambda: transformer, blocks=nn.ModuleList()))


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is a second later."""
    counter = itertools.count()
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(counter)))


def line_phase(steps: int, stop_at: int = -1, learning_rate: float = 0.1, muon: bool = False) -> Phase:
    """Fits a line for so many steps of a second each."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        line = nn.Linear(1, 1)

    def batch(number: int, share: float) -> tuple[torch.Tensor, ...]:
        if number == stop_at:
            raise KeyboardInterrupt
        return (torch.randn(8, 1, generator=torch.Generator().manual_seed(number)),)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (line(x) - 3 * x + 1).square().mean()

    return Phase("line", steps / 60, {"line": line}, learning_rate, batch, loss, [line.weight] if muon else [])


def loss_of(phase: Phase, number: int, share: float) -> torch.Tensor:
    """The loss of one step."""
    return phase.loss(*phase.batch(number, share))


@pytest.mark.parametrize("muon", [False, True])
def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path, seconds: None, muon: bool) -> None:
    whole, stopped, resumed = (line_phase(200, stop_at, muon=muon) for stop_at in (-1, 91, -1))
    expected = train(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(stopped, tmp_path / "parts", save_every=9)
    found = train(resumed, tmp_path / "parts", save_every=9)
    assert found == expected and found.steps == 200
    for name, tensor in whole.modules["line"].state_dict().items():
        assert torch.equal(tensor, resumed.modules["line"].state_dict()[name])
    first, last = found.losses[0][1], found.losses[-1][1]
    assert len(found.losses) == 10 and last < (first / 2 if muon else 1e-2) < first


def test_a_finished_training_is_not_repeated_and_gives_the_average(tmp_path: Path, seconds: None) -> None:
    first = line_phase(120)
    train(first, tmp_path)
    again = line_phase(120, stop_at=120)
    assert train(again, tmp_path).steps == 120
    assert torch.equal(first.modules["line"].weight, again.modules["line"].weight)
    raw = torch.load(tmp_path / "line.pt", weights_only=True)["line"]["weight"]
    assert not torch.equal(raw, again.modules["line"].weight)


def test_a_checkpoint_is_whole_or_not_there(tmp_path: Path, seconds: None, monkeypatch: pytest.MonkeyPatch) -> None:
    train(line_phase(40), tmp_path)
    before = (tmp_path / "line.pt").read_bytes()

    def full(_: int) -> None:  # `fsync`, when all is written but for the disk
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        train(line_phase(80), tmp_path)
    assert (tmp_path / "line.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["line.pt"]


def test_errors(tmp_path: Path, seconds: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"The loss of line is (nan|inf) after \d+ steps"):
        train(line_phase(200, learning_rate=1e30), tmp_path / "diverged")
    train(line_phase(20), tmp_path)
    monkeypatch.setattr(checkpoint, "__version__", "9.9")
    with pytest.raises(ValueError, match=r"line.pt is from another version of diffusers-draft"):
        train(line_phase(20), tmp_path)


def test_muon_trains_the_weights_of_the_blocks_linear_layers(pipe: Any) -> None:
    linear = [module.weight for module in pipe.transformer.blocks.modules() if isinstance(module, nn.Linear)]
    matrices = flow_phase(pipe, 1, 0, tokens=1).matrices
    assert len(linear) == 6 * 10 and {id(matrix) for matrix in matrices} == {id(weight) for weight in linear}
    torch.optim.Muon(matrices)  # refuses other than two dimensions


def test_clips_depend_on_seed_and_number_alone() -> None:
    video, texts = clips(CPU, 3, (5, 64, 96), 7, 11)
    again, same = clips(CPU, 3, (5, 64, 96), 7, 11)
    assert torch.equal(video, again) and texts == same == captions(scenes(3, 64, 96, 7, 11))
    for seed, number in ((7, 12), (8, 11), (7, HELD_OUT + 11)):
        assert clips(CPU, 3, (5, 64, 96), seed, number)[1] != texts
    noise = [torch.randn(4, generator=noise_generator(CPU, *where)) for where in ((7, 11), (7, 12), (8, 11))]
    assert len({tuple(one.tolist()) for one in noise}) == 3
    assert torch.equal(noise[0], torch.randn(4, generator=noise_generator(CPU, 7, 11)))


def test_tokens_are_words() -> None:
    tokenizer = word_tokenizer()
    text = captions(scenes(1, 192, 384, 0, 0))[0]
    tokens = tokenizer(text).input_ids
    words = re.findall(r"\w+|,", text)
    assert tokenizer.convert_ids_to_tokens(tokens) == [*words, "</s>"]
    assert tokenizer.unk_token_id not in tokens
    assert tokenizer.unk_token_id in tokenizer("a green cat").input_ids
    assert len(tokenizer) == len(WORDS) + 4


def test_captions_are_embedded_as_the_pipeline_does(pipe: Any) -> None:
    texts = [*captions(scenes(3, 192, 384, 0, 0)), ""]
    expected, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=64)
    ids, mask = tokenized(pipe, texts)
    torch.testing.assert_close(embed(pipe, ids, nn.functional.pad(mask, (0, 64 - LONGEST))), expected)


def test_latents_are_normalised_as_the_pipeline_wants(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoencoder, "JUDGED", JUDGED)
    video, _ = clips(CPU, 4, (9, 64, 64), 0, 0)
    with torch.no_grad():
        raw = encode(pipe.vae, video)
        before = reconstruction_psnr(pipe.vae, 0)
        measure_latents(pipe.vae, 0)
        latents = encode(pipe.vae, video)
    assert latents.shape == (4, 12, 5, 16, 16)
    mean, deviation = (
        torch.tensor(pipe.vae.config[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std")
    )
    torch.testing.assert_close(latents * deviation + mean, raw)
    assert latents.mean((0, 2, 3, 4)).abs().max() < 0.5
    assert reconstruction_psnr(pipe.vae, 0) == before


def test_every_weight_of_the_autoencoder_is_trained() -> None:
    """Each time step of a convolution too: those that look far back see nothing in short clips."""
    vae = untrained_pipeline(0).vae
    loss_of(autoencoder_phase(vae, 1, 0, pixels=1), 0, 0.0).backward()
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv3d):
            for step in range(module.kernel_size[0]):
                assert module.weight.grad[:, :, step].any(), f"{name}, time step {step}"


def test_autoencoder_learns() -> None:
    vae = untrained_pipeline(0).vae
    phase = autoencoder_phase(vae, 1, 0, pixels=30_000)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=phase.learning_rate)
    losses = []
    for _ in range(25):  # always the same clip
        losses.append(loss_of(phase, 0, 0.0))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.6 * losses[0]


def test_the_flow_is_that_of_diffusers_schedulers(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model sees `scale_noise` of the latents at its timestep, and the loss is zero for the way to the noise."""
    latents, seen = torch.randn(2, 12, 1, 32, 32), []
    texts = tokenized(pipe, ["a red circle", ""])
    monkeypatch.setattr(flow, "_encoded", lambda *_: (latents, *texts))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)

    def exact(noisy: torch.Tensor, timestep: torch.Tensor, embeds: torch.Tensor, return_dict: bool) -> Any:
        random = noise_generator(CPU, 0, 3)
        picked = latents[torch.randint(2, (2,), generator=random)]
        noise = torch.randn(latents.shape, generator=random)
        seen.append((noisy, timestep, noise, embeds, picked))
        return ((noisy - picked) / (timestep / 1000)[:, None, None, None, None],)

    phase = flow_phase(faked(pipe, exact), 1, 0, tokens=2 * 256)
    assert loss_of(phase, 3, 0.0) < 1e-6
    noisy, timestep, noise, embeds, picked = seen[0]
    assert embeds.shape == (2, STAGES[0].text, 64) and ((timestep > 0) & (timestep < 1000)).all()
    for sample in range(2):
        scheduler.timesteps, scheduler.sigmas = timestep[sample : sample + 1], timestep[sample : sample + 1] / 1000
        scheduler._begin_index = None
        expected = scheduler.scale_noise(picked[sample : sample + 1], timestep[sample : sample + 1], noise[sample])
        torch.testing.assert_close(noisy[sample : sample + 1], expected)


def test_steps_choose_from_the_newest_clips(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen, noises = [], [], []

    def encoded(pipe: Any, grid: Any, batch: int, seed: int, number: int) -> Any:
        made.append((grid, number))
        return torch.full((batch, 12, 1, 4, 4), float(number)), *tokenized(pipe, ["a red circle"] * batch)

    def exactly(latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        seen.append(latents[:, 0, 0, 0, 0].int().tolist())
        noises.append(float(noise.sum()))
        return latents

    monkeypatch.setattr(flow, "_encoded", encoded)
    monkeypatch.setattr(torch, "lerp", exactly)
    grids = STAGES[0].grids
    phase = flow_phase(faked(pipe, lambda noisy, *_, **__: (noisy,)), 1, 0, tokens=4 * 240)
    steps = len(grids) * USES * (WINDOW + 2)
    for number in range(steps):
        loss_of(phase, number, 0.0)
    assert len(set(made)) == len(made) == len(grids) * (WINDOW + 2), "each batch of clips is made once"
    assert all(grid == grids[number % len(grids)] for grid, number in made)
    assert len(set(noises)) == steps, "each step has other noise"
    for number, chosen in enumerate(seen):
        newest = number // len(grids) // USES
        assert len(chosen) == max(1, 4 * 240 // math.prod(grids[number % len(grids)]))
        assert all(number % len(grids) == clip % len(grids) for clip in chosen)
        assert all(newest - WINDOW < clip // len(grids) <= newest for clip in chosen)
    assert len({clip for chosen in seen[-USES * len(grids) :] for clip in chosen}) > 8 * len(grids)
    before = len(made)
    resumed = flow_phase(faked(pipe, lambda noisy, *_, **__: (noisy,)), 1, 0, tokens=4 * 240)
    assert loss_of(resumed, steps - 1, 0.0) > 0
    assert seen[-1] == seen[-2] and len(made) == before + WINDOW, "resumed, a step has the same clips"


def test_stages_fill_the_time_and_grow_to_ten_thousand_tokens_of_several_shapes() -> None:
    ends = [stage.until for stage in STAGES]
    assert ends == sorted(ends) and ends[-1] == 1
    grids = STAGES[-1].grids
    assert (9, 24, 48) in grids and any(rows > columns for _, rows, columns in grids)
    assert any(rows % 8 and columns % 16 for _, rows, columns in grids)
    assert not any(rows % 2 or columns % 2 for stage in STAGES for _, rows, columns in stage.grids)
    longest = max(len(word_tokenizer()(text).input_ids) for text in captions(scenes(500, 192, 384, 0, 0)))
    assert longest <= LONGEST <= min(stage.text for stage in STAGES)


@pytest.mark.parametrize("share", [0.0, 0.4, 0.99])
def test_every_stage_trains_transformer_and_text_encoder(pipe: Any, share: float, monkeypatch: Any) -> None:
    stages = [dataclasses.replace(stage, grids=((1, *stage.grids[0][1:]),)) for stage in STAGES]
    monkeypatch.setattr(flow, "STAGES", stages)
    phase = flow_phase(pipe, 1, 0, tokens=200)
    loss = loss_of(phase, 0, share)
    loss.backward()
    gradients = [p.grad for module in phase.modules.values() for p in module.parameters() if p.requires_grad]
    assert torch.isfinite(loss) and sum(g is not None and bool(g.any()) for g in gradients) > 0.9 * len(gradients)
    pipe.transformer.zero_grad()
    pipe.text_encoder.zero_grad()
    assert all(parameter.grad is None for parameter in pipe.vae.parameters())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training of a few steps on one small grid."""
    folder = tmp_path_factory.mktemp("training") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "STAGES", (flow.Stage(1.0, ((3, 8, 12),), text=64),))
        patch.setattr(autoencoder, "JUDGED", JUDGED)
        for name, value in {"HEIGHT": 64, "WIDTH": 96, "FRAMES": 5, "STEPS": 2, "SAMPLES": 2}.items():
            patch.setattr(card, name, value)
        sizes = ["--minutes", "0.1", "--tokens", "300", "--pixels", "40000"]
        patch.setattr(sys, "argv", ["examples/training/__main__.py", "--output", str(folder), *sizes])
        command.main()
    return folder


def test_the_command_makes_a_pipeline_and_its_card(trained: Path) -> None:
    folder = trained / "model"
    weights = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert 8e6 < weights < 10e6
    text = (folder / "README.md").read_text()
    for expected in (r"\d+ steps in 0\.\d minutes", "seed 0", diffusers_draft.__version__, "--minutes 0.1"):
        assert re.search(expected, text), expected
    assert f"`python -m examples.training --output {trained} --minutes 0.1 " in text
    assert "{" not in text
    with Image.open(folder / "samples.jpg") as sheet:
        assert sheet.size == (4 * 96, 2 * 64)
    assert (folder / "loss.png").exists()
    prompts = (folder / "prompts.txt").read_text().splitlines()
    assert len(set(prompts)) == 64 and not any(map(unknown_words, prompts))
    pipe: Any = WanPipeline.from_pretrained(folder)
    assert max(abs(value) for value in pipe.vae.config.latents_mean) > 0


def test_generate_takes_the_trained_model(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--height", "64", "--width", "128", "--frames", "9", "--steps", "3", "--guidance-scale", "1"]
    prompt = ["--prompt", "a big red plain circle moving left over blue waves, camera still"]
    output = tmp_path / "out.mp4"
    assert main(["generate", "--model", str(trained / "model"), *prompt, *size, "--output", str(output)]) == 0
    assert "grid      (5, 8, 16) = 640 video tokens" in capsys.readouterr().out
    assert imageio.v3.imread(output).shape == (9, 64, 128, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--minutes", "0"], "must be above 0"), (["--tokens", "0"], "must be above 0")],
)
def test_wrong_options_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["--output", str(tmp_path), *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_older_torch_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(SystemExit) as stop:
        command.main(["--output", str(tmp_path / "new")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "needs torch 2.9 or newer" in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_missing_package_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "PACKAGES", ("tqdm", "no_such_package"))
    with pytest.raises(SystemExit) as stop:
        command.main(["--output", str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error == "error: no_such_package is not installed: pip install '.[train]'\n"


def test_it_runs_from_a_checkout() -> None:
    arguments = [sys.executable, "-m", "examples.training", "--help"]
    printed = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--minutes MINUTES" in printed


def test_interrupting_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("examples.training.run.train", interrupted)
    with pytest.raises(SystemExit):
        command.main(["--output", str(tmp_path)])
    assert f"stopped; the same command goes on from what is in {tmp_path}" in capsys.readouterr().err

"""The commands that time a transformer: predictions, whole runs of tiny models, and what they refuse."""

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffusers_draft.attention import kernels
from diffusers_draft.cli import bench, bench_model, main
from diffusers_draft.config import DraftConfig
from diffusers_draft.tools.bench import models, predict, step
from diffusers_draft.tools.bench.run import Bench
from diffusers_draft.tools.bench.shapes import SHAPES


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_bench_model_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "model"])
    assert "needs a CUDA GPU" in capsys.readouterr().err


def a_step(name: str, entry: models.Model, block_ms: float, density: float | None = None) -> step.Step:
    layers = sum(length for _, _, length in entry.blocks)
    costs = {path: block_ms for path, _, _ in entry.blocks}
    return step.Step(name, False, costs, 2.0, block_ms * layers + 2.0, {}, 0.0, density=density)


@pytest.mark.parametrize("name", models.MODELS)
def test_a_predicted_run_adds_up(name: str) -> None:
    """Of blocks that take 1 ms and 10 more at density 1, against 8 ms dense; and with the paper's dense parts."""
    entry = models.MODELS[name]
    assert entry.shape in SHAPES
    layers = sum(length for _, _, length in entry.blocks)
    config = DraftConfig(sparsity=0.8)
    densities = predict.densities_to_measure(name, config, 50)
    assert densities[-1] == pytest.approx(0.2) and densities[0] < 0.06 and densities[1] > 0.5
    others = [a_step("dense", entry, 8.0), a_step(step.NO_ATTENTION, entry, 0.5)]
    drafts = [a_step("draft", entry, 1 + 10 * density, density) for density in densities]
    found = predict.predict(name, config, [*others, *drafts], 50)
    assert found["dense_steps"] == 0 and found["sparse_step_ms"] == pytest.approx(3 * layers + 2)
    assert found["draft_s"] == pytest.approx(50 * entry.forwards * (3 * layers + 2) / 1e3)
    assert found["dense_s"] == pytest.approx(50 * entry.forwards * (8 * layers + 2) / 1e3)

    paper = predict.predict(name, DraftConfig.paper(0.9), [*others, a_step("draft", entry, 2.0, 0.1)], 50)
    sparse = 2 * layers + 2 + 6.0 * (2 if "hunyuan" in name else 1)  # the family's dense layers
    assert paper["sparse_step_ms"] == pytest.approx(sparse)
    steps = paper["dense_steps"]
    assert 0 < steps < 25
    expected = (steps * (8 * layers + 2) + (50 - steps) * sparse) * entry.forwards / 1e3
    assert paper["draft_s"] == pytest.approx(expected)


def test_a_run_of_which_all_is_dense_is_predicted_at_its_mean() -> None:
    assert predict.densities_to_measure("wan-14b-768p", DraftConfig.paper(0.9), 1) == [pytest.approx(0.1)]


@pytest.mark.parametrize("what", ["model", "run", "attention"])
def test_too_little_memory_is_one_line(what: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB.")

    monkeypatch.setattr(bench_model, "_check", lambda *_: None)
    monkeypatch.setattr(bench_model, "_check_backend", lambda *_: None)
    monkeypatch.setattr(bench_model, "environment", lambda _: {})
    for module, name in ((bench_model, "_run_model"), (bench_model, "_runs"), (bench, "_sparse_rows")):
        monkeypatch.setattr(module, name, full)
    with pytest.raises(SystemExit) as stop:
        main(["bench", what])
    assert stop.value.code == 2
    assert "error: CUDA out of memory. Tried to allocate 2.00 GiB." in capsys.readouterr().err


@pytest.mark.parametrize("name", ["wan-14b-768p"])  # without text, whose blocks are always computed
def test_densities_of_a_run_are_those_that_it_has(name: str, tiny_model: str) -> None:
    config = DraftConfig(sparsity=0.6, tile=(2, 2, 4))
    bench = Bench(tiny_model, compiled=False, device=torch.device("cpu"))
    run = bench.draft("draft 0.6", config, 4)
    asked = predict.densities_of_run(tiny_model, config, 4)
    forwards = models.MODELS[tiny_model].forwards
    assert run.densities is not None and len(run.densities) == 4 * forwards
    assert run.densities[::forwards] == pytest.approx(asked, abs=0.05)
    assert run.steps == len(run.step_s) == 4 and run.seconds == pytest.approx(sum(run.step_s))


@pytest.fixture
def tiny_model(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A benchmark's model with small blocks and a small grid."""
    entry = models.MODELS[name]
    shape = dataclasses.replace(SHAPES[entry.shape], grid=(3, 8, 8), text=SHAPES[entry.shape].text and 20)
    monkeypatch.setitem(SHAPES, "tiny", shape)
    small: dict[str, Any] = dict(num_attention_heads=2, attention_head_dim=32)
    small |= dict(rope_axes_dim=(8, 12, 12)) if "hunyuan" in name else dict(ffn_dim=64)
    small |= dict(in_channels=48, out_channels=48) if "5b" in name else {}
    tiny = dataclasses.replace(
        entry,
        shape="tiny",
        build=functools.partial(models._hunyuan if "hunyuan" in name else models._wan, **small),
        blocks=tuple((path, key, 3) for path, key, _ in entry.blocks),
    )
    monkeypatch.setitem(models.MODELS, "tiny", tiny)
    monkeypatch.setattr(step, "BLOCKS", 2)
    return "tiny"


@pytest.mark.parametrize("what", ["model", "run"])
@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("fa4", "Backend 'fa4' needs flash-attn-4"),
        ("flex", "Backend 'flex' lacks something"),
    ],
)
def test_a_backend_that_cannot_run_is_found_before_the_work(
    what: str, backend: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is built or timed")

    def missing(name: str) -> Any:
        if name == "fa4":
            raise ImportError("Backend 'fa4' needs flash-attn-4: pip install it.")
        return SimpleNamespace(refusal=lambda *_: "lacks something")

    monkeypatch.setattr(bench_model, "_check", lambda *_: None)
    monkeypatch.setattr(kernels, "load", missing)
    for name in ("environment", "Bench", "fastest", "together"):
        monkeypatch.setattr(bench_model, name, work)
    with pytest.raises(SystemExit) as exit_:
        main(["bench", what, "--backend", backend])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["hunyuan-13b-768p", "hunyuan-custom-13b", "wan-14b-768p", "wan-5b-704p"])
def test_whole_runs_dense_and_draft(name: str, tiny_model: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench_model, "_check", lambda *_, **__: None)
    monkeypatch.setattr(bench_model, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(bench_model, "SECONDS", 0.01)
    record = tmp_path / "run.json"
    options = ["--sparsity", "0.5", "0.8", "--paper", "--default", "--steps", "5", "--dense-steps", "2"]
    main(["bench", "run", "--model", tiny_model, *options, "--json", str(record)])
    found = json.loads(record.read_text())
    names = ["dense sdpa", "diffusers default", "draft 0.5", "draft 0.8", "paper"]
    assert [run["name"] for run in found["runs"]] == names
    for run in found["runs"]:
        dense = run["config"] is None
        assert run["steps"] == 5 and len(run["step_s"]) == (2 if dense else 5) and run["seconds"] > 0
        assert (run["densities"] is None) == dense
        assert (run["predicted_s"] is None) == (run["name"] == "diffusers default")
    assert found["runs"][2]["config"]["sparsity"] == 0.5 and found["runs"][4]["config"]["schedule"] == "paper"
    printed = capsys.readouterr()
    assert "draft 0.8" in printed.out and "predicted" in printed.out
    assert "draft 0.8" in printed.err  # the progress bar


@pytest.mark.parametrize("name", ["wan-14b-768p"])
def test_a_run_that_ends_without_numbers_is_refused(name: str, tiny_model: str) -> None:
    bench = Bench(tiny_model, compiled=False, device=torch.device("cpu"))
    bench.transformer.proj_out.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        bench.dense(None, 2, 2)


def test_two_texts_of_different_lengths() -> None:
    """HunyuanCustom's halves of classifier-free guidance, in one batch."""
    entry = models.MODELS["hunyuan-custom-13b"]
    shape, device = dataclasses.replace(SHAPES[entry.shape], grid=(1, 2, 2)), torch.device("cpu")
    given = entry.inputs(shape, device, torch.float32)
    assert {tensor.shape[0] for tensor in given.values()} == {2}
    masks = given["encoder_attention_mask"], entry.arguments(shape, device, torch.float32)["prompt_attention_mask"]
    assert [mask.sum(1).tolist() for mask in masks] == [[831, 415]] * 2


@pytest.mark.parametrize(("name", "default"), [("hunyuan-13b-768p", True), ("wan-14b-768p", False)])
def test_one_step_dense_and_draft(
    name: str, default: bool, tiny_model: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(bench_model, "_check", lambda *_, **__: None)
    monkeypatch.setattr(bench_model, "DEVICE", torch.device("cpu"))
    record = tmp_path / "model.json"
    options = ["--steps", "6", "--seconds", "0.01", *(["--default"] if default else [])]
    main(["bench", "model", "--model", tiny_model, *options, "--json", str(record)])
    found = json.loads(record.read_text())
    names = [entry["name"] for entry in found["steps"]]
    dense, draft = names[:-3], names[-3:]
    assert dense == [*(["diffusers default"] if default else []), "no attention", "dense sdpa"]
    assert draft[-1] == "draft, density 0.2" and found["options"]["config"]["schedule"] == "falling"
    assert found["prediction"]["steps"] == 6 and "of them dense" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["wan-14b-768p"])
@pytest.mark.parametrize(("what", "rows"), [("model", "steps"), ("run", "runs")])
def test_what_was_measured_before_an_error_is_in_the_record(
    what: str, rows: str, name: str, tiny_model: str, tmp_path: Path, monkeypatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("too little memory")

    monkeypatch.setattr(bench_model, "_check", lambda *_, **__: None)
    monkeypatch.setattr(bench_model, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(bench_model, "SECONDS", 0.01)
    monkeypatch.setattr(step, "draft_steps", full)
    monkeypatch.setattr(Bench, "draft", full)
    options = ["--steps", "2", *(["--seconds", "0.01"] if what == "model" else [])]
    record = tmp_path / "x.json"
    with pytest.raises(SystemExit):
        main(["bench", what, "--model", tiny_model, *options, "--json", str(record)])
    found = json.loads(record.read_text())
    assert [row["name"] for row in found[rows]][-1] == "dense sdpa" and "prediction" not in found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model", "--steps", "0"], "--steps: must be a whole number from 1 on, got '0'"),
        (["run", "--steps", "-3"], "--steps: must be a whole number from 1 on, got '-3'"),
        (["run", "--dense-steps", "0"], "--dense-steps: must be a whole number from 1 on, got '0'"),
        (["run", "--steps", "4", "--dense-steps", "5"], "--dense-steps must be at most --steps 4, got 5"),
        (["run", "--sparsity", "1.5"], "sparsity must be"),
        (["model", "--backend", "nonsense"], "Unknown backend"),
        (["model", "--seconds", "0"], "--seconds: must be a number of seconds above 0"),
        (["run", "--json", "no/such/folder/run.json"], "there is no folder"),
    ],
)
def test_bad_options_of_models_are_one_line(options, message, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit) as stop:
        main(["bench", *options])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1

"""The bench command on shapes that take a moment, its refusal to time what is wrong, and README's tables."""

import json
from pathlib import Path

import pytest
import tables
import torch
from tables import speed_page, speed_section
from torch import Tensor

from diffusers_draft.attention import kernels
from diffusers_draft.cli import main
from diffusers_draft.tools.bench import models, step
from diffusers_draft.tools.bench.attention import Case, run_dense, run_draft
from diffusers_draft.tools.bench.shapes import SHAPES, Shape, random_inputs, structured_inputs
from diffusers_draft.tools.bench.table import format_table

TINY = ["bench", "attention", "--grid", "3", "13", "17", "--heads", "2", "--head-dim", "32", "--text", "20"]
SHAPE = Shape((3, 13, 17), 2, 32, text=20)


def a_case(seconds: float = 0.01) -> Case:
    return Case(SHAPE, structured_inputs(SHAPE, torch.device("cpu"), torch.float32), seconds)


def test_bench_attention_writes_table_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, picture = tmp_path / "result.json", tmp_path / "result.png"
    options = ["--sparsity", "0.5", "0.9", "--backend", "torch", "--seconds", "0.01"]
    main([*TINY, *options, "--json", str(table), "--plot", str(picture)])
    printed = capsys.readouterr().out
    assert "sparsity 0.9, row budget" in printed and "stage: draft and select" in printed
    record = json.loads(table.read_text())
    drafts = [row for row in record["rows"] if row["kind"] == "draft"]
    assert {(row["sparsity"], row["budget"]) for row in drafts} == {
        (s, b) for s in (0.5, 0.9) for b in ("head", "row")
    }
    assert all(row["time"]["median"] > 0 and row["error"] < 1e-5 for row in drafts)
    assert torch.__version__.startswith(record["environment"]["torch"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(query: Tensor, *_: object) -> Tensor:
        return torch.zeros_like(query)

    def choose(*_: object) -> kernels.Choice:
        return kernels.Choice("torch", "asked for", zeros)

    monkeypatch.setattr(kernels, "choose", choose)
    draft = next(iter(run_draft(a_case(), 0.5, "head", (8, 16), ["torch"])))
    assert draft.time is None and draft.note == "wrong numbers, not timed"
    assert "wrong numbers, not timed" in format_table([draft], SHAPE)


def test_a_backend_that_cannot_run_says_why() -> None:
    draft = next(iter(run_draft(a_case(), 0.5, "head", (8, 16), ["fa4"])))
    assert draft.time is None and "fa4" in draft.note


def test_dense_rows_are_right() -> None:
    rows = list(run_dense(a_case()))
    assert [row.name for row in rows] == ["diffusers default", "sdpa"]
    assert all(row.time and row.error < 1e-5 for row in rows)


@pytest.mark.parametrize("inputs", [random_inputs, structured_inputs])
def test_inputs_have_the_shape_and_come_from_the_seed(inputs) -> None:
    shape = Shape((2, 9, 11), 3, 16, text=7, batch=2)
    first, again, other = (inputs(shape, torch.device("cpu"), torch.bfloat16, seed) for seed in (0, 0, 1))
    for a, b, c in zip(first, again, other, strict=True):
        assert a.shape == (2, 205, 3, 16) and a.dtype == torch.bfloat16
        assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sparsity", "1"], "sparsity must be in"),
        (["--backend", "nonsense"], "Unknown backend"),
        (["--tile", "3", "5"], "tile must be"),
        (["--grid", "0", "8", "8"], "grid must be"),
    ],
)
def test_user_errors_are_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*TINY, *options])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_bench_model_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "model"])
    assert "needs a CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("name", models.MODELS)
def test_models_are_of_their_real_size_and_the_run_adds_up(name: str) -> None:
    entry = models.MODELS[name]
    assert entry.shape in SHAPES
    costs = {path: 1.0 for path, _, _ in entry.blocks}
    dense = step.Step("dense", False, {path: 4.0 for path in costs}, 2.0, 4.0 * 50, {}, 0.0)
    draft = step.Step("draft", False, costs, 2.0, 1.0 * 50, {}, 0.0)
    nothing = step.Step(step.NO_ATTENTION, False, dict.fromkeys(costs, 0.0), 2.0, 2.0, {}, 0.0)
    prediction = step.predict(name, [dense, nothing, draft], 50)
    sparse = 50 + 3.0 * (2 if "hunyuan" in name else 1)
    assert prediction["sparse_step_ms"] == sparse
    dense_steps = prediction["dense_steps"]
    assert 0 < dense_steps < 25
    expected = (dense_steps * 200 + (50 - dense_steps) * sparse) * entry.forwards / 1e3
    assert prediction["draft_s"] == pytest.approx(expected)


def test_readme_and_the_page_show_the_recorded_results() -> None:
    root = Path(__file__).parents[2]
    assert speed_section() in (root / "README.md").read_text()
    assert (root / "docs" / "speed.md").read_text() == speed_page() + "\n"


def test_several_gpus_have_a_table_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    record = tables._records()["model-wan-14b-768p-compiled"]
    alone = record["steps"][-1] | {"name": step.ONE_GPU, "step_ms": 5000.0}
    record["steps"] = [alone, *record["steps"][:-1], record["steps"][-1] | {"step_ms": 2500.0}]
    record["options"]["ulysses"] = 2
    record["prediction"] |= {"gpu_speedup": 2.0, "exchange_share": 0.07}
    monkeypatch.setattr(tables, "_records", lambda: {"model-two": record})
    section, page = speed_section().splitlines(), speed_page()
    name = "wan-14b-768p, compiled, sparsity 0.75, 2 x NVIDIA H200"
    assert section[-1] == f"| {name} | 5000 | 2500, **2.00x** | 7% | 11424 (dense fa4) |"
    assert section[-4] == "" and section[-5].startswith("|---")  # no step of one GPU
    assert "compiled, on 2 GPUs, summed" in page
    assert "one GPU takes 5000 ms: 2 are 2.00x as fast; exchanges alone would take 7% of their time." in page
    assert f"| {step.ONE_GPU} |" not in page


def test_the_script_prints_the_page_and_draws_the_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "speed.png"
    tables.main(["--full", "--plot", str(picture)])
    assert capsys.readouterr().out == speed_page() + "\n"
    assert picture.read_bytes().startswith(b"\x89PNG")

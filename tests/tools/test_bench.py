"""The bench command on shapes that take a moment, its refusal to time what is wrong, and the tables of the pages."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from time import sleep
from types import ModuleType
from typing import Any

import pytest
import speed_records
import tables
import torch
import torch.distributed as dist
from tables import readme_section, speed_page, speed_section
from torch import Tensor

from diffusers_draft.attention import kernels
from diffusers_draft.attention.method import Method
from diffusers_draft.cli import bench, main, option_types, outputs
from diffusers_draft.config import DraftConfig
from diffusers_draft.tools.bench import step
from diffusers_draft.tools.bench.attention import Row, run_dense, run_draft
from diffusers_draft.tools.bench.measure import Time, environment, measure
from diffusers_draft.tools.bench.pictures import plot, plot_error
from diffusers_draft.tools.bench.reference import Case, relative_error
from diffusers_draft.tools.bench.rival import run_rival
from diffusers_draft.tools.bench.shapes import Shape, random_inputs, structured_inputs
from diffusers_draft.tools.bench.table import table_lines

TINY = ["bench", "attention", "--grid", "3", "13", "17", "--heads", "2", "--head-dim", "32", "--text", "20"]
SHAPE = Shape((3, 13, 17), 2, 32, text=20)


PNG = b"\x89PNG"


def a_case(seconds: float = 0.01) -> Case:
    return Case(SHAPE, structured_inputs(SHAPE, torch.device("cpu"), torch.float32), seconds)


def fails(options: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command, which must end with one line on stderr before it prints anything; return that line."""
    with pytest.raises(SystemExit) as stop:
        main([*TINY, *options])
    assert stop.value.code == 2
    printed, error = capsys.readouterr()
    assert printed == "" and error.count("\n") == 1
    return error


def test_bench_attention_writes_table_json_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, picture, errors = tmp_path / "result.json", tmp_path / "result.png", tmp_path / "errors.png"
    options = ["--sparsity", "0.5", "0.9", "--budget", "head", "row", "--backend", "torch", "--seconds", "0.01"]
    main([*TINY, *options, "--paper", "--json", str(table), "--plot", str(picture), "--plot-error", str(errors)])
    printed = capsys.readouterr().out
    for part in (
        "sparsity 0.9, row budget",
        "sparsity 0.9, settings of the paper",
        "stage: draft and select",
        "vs dense",
        "without correction",
        "diffusers default",
    ):
        assert part in printed
    record = json.loads(table.read_text())
    assert record["tile"] == list(DraftConfig.tile) and record["inputs"] == "structured, smooth-valued"
    drafts = [row for row in record["rows"] if row["kind"] == "draft"]
    compared = {("torch", "head"), ("torch", "row"), ("without correction", "head"), ("without correction", "row")}
    assert sorted((row["sparsity"], row["name"], row["budget"]) for row in drafts) == sorted(
        (sparsity, *names) for sparsity in (0.5, 0.9) for names in compared | {("paper", "head")}
    )
    assert all(row["time"]["median"] > 0 and row["error"] < 1e-5 < row["dense_error"] < 2 for row in drafts)
    assert all(row["dense_error"] is None for row in record["rows"] if row["kind"] in ("dense", "stage"))
    assert torch.__version__.startswith(record["environment"]["torch"])
    assert picture.read_bytes().startswith(PNG) and errors.read_bytes().startswith(PNG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["errors.png", "result.json", "result.png"]


def test_the_library_s_defaults_are_measured(tmp_path: Path) -> None:
    table = tmp_path / "result.json"
    main([*TINY, "--sparsity", "0.5", "--backend", "torch", "--seconds", "0.01", "--json", str(table)])
    record = json.loads(table.read_text())
    drafts = [(row["name"], row["budget"]) for row in record["rows"] if row["kind"] == "draft"]
    assert drafts == [("torch", DraftConfig.budget), ("without correction", DraftConfig.budget)]
    stages = [row["name"] for row in record["rows"] if row["kind"] == "stage"]
    names = ["order", "draft and select", "kernel (torch)", "correct", "restore"]
    assert stages == [f"stage: {name}" for name in names]


def test_tiles_are_given_as_elsewhere(tmp_path: Path) -> None:
    table = tmp_path / "result.json"
    main([*TINY, "--tile", "2x8x8", "--backend", "torch", "--seconds", "0.01", "--json", str(table)])
    assert json.loads(table.read_text())["tile"] == [2, 8, 8]


@pytest.mark.parametrize(
    ("started", "expected"),
    [
        ("/opt/venv/bin/diffusers-draft", "diffusers-draft --seconds 1"),
        ("/repo/diffusers_draft/__main__.py", "diffusers-draft --seconds 1"),
        ("docs/results/error_study.py", "python docs/results/error_study.py --seconds 1"),
    ],
)
def test_a_record_has_the_command_that_a_reader_can_type(started: str, expected: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [started, "--seconds", "1"])
    assert environment(torch.device("cpu"))["command"] == expected


@pytest.fixture
def process_group() -> Iterator[None]:
    """One of a single process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_over_several_gpus_no_call_is_made_without_a_use() -> None:
    calls: list[None] = []
    time = measure(lambda: (sleep(0.02), calls.append(None)), 0.01)
    assert time.runs == 3 and 20 <= time.low <= time.median <= time.high
    assert len(calls) == 2 + 1 + 1 + 3  # warm-up, one that tells how many, until clocks are steady, and timed


@pytest.mark.usefixtures("process_group")
def test_a_record_of_several_gpus_says_how_its_processes_were_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/repo/diffusers_draft/__main__.py", "bench", "model", "--ulysses", "2"])
    assert (
        environment(torch.device("cpu"))["command"]
        == "torchrun --nproc-per-node 1 -m diffusers_draft bench model --ulysses 2"
    )


def test_the_error_against_dense_is_that_of_the_video_rows() -> None:
    case = a_case()
    query, key, value = (tensor.transpose(1, 2) for tensor in case.tensors)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    text_wrong, doubled = dense.clone(), 2 * dense
    text_wrong[:, SHAPE.video :] = 9
    assert relative_error(text_wrong, case.dense_video) < 1e-5
    assert relative_error(doubled, case.dense_video) == pytest.approx(1, abs=1e-5)
    rows = [row for row in run_draft(case, 0.0, Method(), ["torch"]) if row.kind == "draft"]
    assert all(row.dense_error is not None and row.dense_error < 1e-5 for row in rows)


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(query: Tensor, *_: object) -> Tensor:
        return torch.zeros_like(query)

    def choose(*_: object) -> kernels.Choice:
        return kernels.Choice("torch", "asked for", zeros)

    monkeypatch.setattr(kernels, "choose", choose)
    draft = next(iter(run_draft(a_case(), 0.5, Method(), ["torch"])))
    assert draft.time is None and draft.note == "wrong numbers, not timed"
    assert "wrong numbers, not timed" in "\n".join(table_lines([], [draft], SHAPE))


def test_a_backend_that_cannot_run_says_why() -> None:
    draft = next(iter(run_draft(a_case(), 0.5, Method(), ["fa4"])))
    assert draft.time is None and "fa4" in draft.note


def test_rows_are_shown_as_they_come() -> None:
    def measured() -> Iterator[Row]:
        yield from run_draft(a_case(), 0.5, Method(), ["torch"])
        raise torch.OutOfMemoryError

    shown = []
    with pytest.raises(torch.OutOfMemoryError):
        for line in table_lines(list(run_dense(a_case())), measured(), SHAPE):
            shown.append(line.split())
    assert [line[0] for line in shown[1:4]] == ["dense", "diffusers", "sdpa"]
    assert shown[4][:2] == ["sparsity", "0.5,"] and shown[5][0] == "torch" and any("x" in cell for cell in shown[5])


def test_dense_rows_are_right() -> None:
    rows = list(run_dense(a_case()))
    assert [row.name for row in rows] == ["diffusers default", "sdpa"]
    assert all(row.time and row.error is not None and row.error < 1e-5 for row in rows)


@pytest.mark.parametrize("kernel", ["no", "sdpa"])
def test_dense_operators_keep_what_they_promise_to_compiled_code(kernel: str) -> None:
    """Also of two samples as they come from several GPUs, token by token."""
    tensors = [torch.randn(50, 2, 3, 16).transpose(0, 1) for _ in range(3)]
    checks = "test_schema", "test_faketensor"
    torch.library.opcheck(torch.ops.diffusers_draft_bench.dense.default, (*tensors, kernel), test_utils=checks)


@pytest.mark.parametrize("inputs", [random_inputs, structured_inputs])
def test_inputs_have_the_shape_and_come_from_the_seed(inputs) -> None:
    shape = Shape((2, 9, 11), 3, 16, text=7, batch=2)
    first, again, other = (inputs(shape, torch.device("cpu"), torch.bfloat16, seed) for seed in (0, 0, 1))
    for a, b, c in zip(first, again, other, strict=True):
        assert a.shape == (2, 205, 3, 16) and a.dtype == torch.bfloat16
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_values_are_smooth_and_a_field_of_their_own() -> None:
    shape = Shape((8, 20, 20), 2, 64, text=64)
    query, key, value = structured_inputs(shape, torch.device("cpu"), torch.float32)

    def likeness(a: Tensor, b: Tensor) -> float:
        return float(torch.cosine_similarity(a, b, dim=-1).mean())

    video = value[:, : shape.video]
    assert likeness(video[:, 1:], video[:, :-1]) > 0.5  # neighbours in a row
    assert abs(likeness(video, query[:, : shape.video])) < 0.1 < 0.5 < likeness(query[:, :100], key[:, :100])
    assert abs(likeness(value[:, shape.video + 1 :], value[:, shape.video : -1])) < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sparsity", "1"], "sparsity must be in"),
        (["--backend", "nonsense"], "Unknown backend"),
        (["--tile", "3x5"], "tile must be"),
        (["--tile", "2,8,8"], "as in 2x8x8"),
        (["--grid", "0", "8", "8"], "grid must be"),
        (["--heads", "0"], "--heads: must be a whole number from 1 on, got '0'"),
        (["--head-dim", "0"], "--head-dim: must be"),
        (["--batch", "0"], "--batch: must be"),
        (["--text", "-5"], "--text: must be a whole number from 0 on"),
        (["--text", "some"], "--text: must be"),
        (["--seconds", "-1"], "--seconds: must be a number of seconds above 0"),
        (["--seconds", "0"], "--seconds: must be"),
        (["--seconds", "nan"], "--seconds: must be"),
        (["--device", "foo"], "--device: 'foo' cannot be used here"),
        (["--device", "meta"], "--device: 'meta' cannot be used here"),
        (["--plot", "x.foo"], "Pictures are written as .png"),
        (["--plot-error", "picture"], "Pictures are written as .png"),
        (["--plot", "missing/x.png"], "there is no folder missing"),
        (["--json", "missing/x.json"], "there is no folder missing"),
        (["--json", "."], "it is not a file"),
        (["--json", "/dev/full"], "it is not a file"),
        (["--shape", "cpu-10k"], "not allowed with argument --grid"),
    ],
)
def test_user_errors_are_one_line(options, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in fails(options, capsys)
    assert not any(tmp_path.iterdir())


def test_the_device_that_is_asked_for_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.ones(1))
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    assert option_types.device("cuda:1") == torch.device("cuda", 1) and option_types.device("cpu").index is None
    assert chosen == [1]


def test_too_large_a_shape_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def full(*_: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(bench, "structured_inputs", full)
    with pytest.raises(SystemExit):
        main(TINY)
    assert "error: DefaultCPUAllocator: can't allocate memory" in capsys.readouterr().err


def test_sizes_are_those_of_the_shape_unless_a_grid_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "attention", "--head-dim", "64", "--batch", "2"])
    assert "--head-dim, --batch: only beside --grid. Every --shape has its own." in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--device: 'cuda' cannot be used here" in fails(["--device", "cuda"], capsys)


def test_a_missing_matplotlib_is_named(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib is not installed" in fails(["--plot", str(tmp_path / "x.png")], capsys)


def test_a_full_disk_is_found_before_the_work_and_takes_nothing(tmp_path, monkeypatch, capsys) -> None:
    def full(path: Path, content: bytes) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    before = tmp_path / "x.json"
    before.write_text("before")
    monkeypatch.setattr(Path, "write_bytes", full)
    assert "x.json cannot be written: No space left on device" in fails(["--json", str(before)], capsys)
    assert before.read_text() == "before" and list(tmp_path.iterdir()) == [before]


@pytest.mark.parametrize("before", [None, "before"])
def test_a_run_that_fails_leaves_files_as_they_were(before, tmp_path, monkeypatch) -> None:
    table = tmp_path / "x.json"
    if before is not None:
        table.write_text(before)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run_dense", interrupted)
    with pytest.raises(SystemExit) as exit_:
        main([*TINY, "--json", str(table)])
    assert exit_.value.code == 130
    assert (table.read_text() if table.exists() else None) == before
    assert len(list(tmp_path.iterdir())) == (before is not None)


def test_what_was_measured_before_an_error_is_in_the_record(tmp_path, monkeypatch) -> None:
    def one_row(*_: object) -> Iterator[Row]:
        yield Row("draft torch", "draft", 0.5, note="a row")
        raise torch.OutOfMemoryError("too little memory")

    monkeypatch.setattr(bench, "_sparse_rows", one_row)
    table = tmp_path / "x.json"
    with pytest.raises(SystemExit):
        main([*TINY, "--seconds", "0.01", "--json", str(table)])
    names = [row["name"] for row in json.loads(table.read_text())["rows"]]
    assert names == ["diffusers default", "sdpa", "draft torch"]


def test_a_dense_row_that_fails_leaves_those_before_it_in_the_record(tmp_path, monkeypatch) -> None:
    def one_row(*_: object) -> Iterator[Row]:
        yield Row("diffusers default", "dense", note="a row")
        raise torch.OutOfMemoryError("too little memory")

    monkeypatch.setattr(bench, "run_dense", one_row)
    table = tmp_path / "x.json"
    with pytest.raises(SystemExit):
        main([*TINY, "--json", str(table)])
    assert [row["name"] for row in json.loads(table.read_text())["rows"]] == ["diffusers default"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "target.txt", tmp_path / "link.txt"
    target.write_text("before")
    link.symlink_to(target)
    outputs.check_output(link)
    outputs.write_output(link, lambda path: path.write_text("after"))
    assert link.is_symlink() and target.read_text() == "after"


RIVAL_SHAPE = Shape((3, 13, 17), 2, 128, text=20)


def rival_case() -> Case:
    return Case(RIVAL_SHAPE, structured_inputs(RIVAL_SHAPE, torch.device("cpu"), torch.bfloat16), 0.01)


def install_rival(monkeypatch: pytest.MonkeyPatch, attend: Callable[..., Tensor]) -> None:
    package = ModuleType("comfy_kitchen")
    vars(package).update(sol_attn=attend, sol_attn_is_available=lambda device: True)
    monkeypatch.setitem(sys.modules, "comfy_kitchen", package)


def test_the_rival_is_absent_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)
    assert run_rival(rival_case(), 0.5) == []


def test_a_rival_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Tensor:
        raise TypeError("unexpected keyword\nand more")

    install_rival(monkeypatch, broken)
    (row,) = run_rival(rival_case(), 0.5)
    assert (row.kind, row.time, row.note) == ("rival", None, "unexpected keyword")
    assert "unexpected keyword" in "\n".join(table_lines([], [row], SHAPE))


def test_a_rival_that_cannot_take_the_tensors_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    install_rival(monkeypatch, lambda *tensors, **_: tensors[2])
    (row,) = run_rival(a_case(), 0.5)
    assert row.time is None and "takes bfloat16 or float16 and heads of 128" in row.note


def test_a_rival_with_wrong_numbers_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    install_rival(monkeypatch, lambda *tensors, **_: torch.zeros_like(tensors[0]))
    (row,) = run_rival(rival_case(), 0.5)
    assert row.time is None and row.note.startswith("wrong numbers")


def test_the_rival_gets_block_order_and_its_answer_comes_back_in_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the signature of comfy-kitchen 0.2.40 that attends to all, or skips the first block of keys."""
    asked = []

    def stand_in(
        q, k, v, tau=1.0, scale=None, sink_blocks=None, sink_q=None, key_bias=None, topk_ratio=0.0, tail=True,
        block_len=None, coarse_gate=None, token_aug=0,
    ):  # fmt: skip
        asked.append((sink_blocks, sink_q, topk_ratio))
        first = 64 if topk_ratio else 0
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k[:, first:], v[:, first:]))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()

    install_rival(monkeypatch, stand_in)
    (row,) = run_rival(rival_case(), 0.75)
    assert row.time and row.error is not None and row.error < 1e-2 < row.dense_error
    text = [663 // 64, -(-683 // 64)]
    assert asked[0] == (text, [0, 11], 0.0) and asked[1] == (text, text, 0.25)
    assert row.density == pytest.approx((10 * (2 + 1) + 1 * 11) / 121)  # round(0.25 * 10) = 2 of the video blocks


def fake_rows(dense_error: float | None = 0.1) -> list[Row]:
    time = Time(2.0, 1.0, 3.0, 3)
    sparse = [
        Row(name, kind, sparsity, budget, time, density, 1e-3, "", dense_error)
        for sparsity, density in ((0.9, 0.11), (0.5, 0.51))
        for name, kind, budget in (("fa4", "draft", "row"), ("paper", "draft", "head"), ("other", "rival", None))
    ]
    return [Row("sdpa", "dense", time=time, error=1e-3), *sparse]


@pytest.mark.parametrize("draw", [plot, plot_error])
@pytest.mark.parametrize(
    "rows", [fake_rows(), fake_rows(None), fake_rows()[:1], [Row("fa4", "draft", 0.5, "row")], []]
)
def test_pictures_are_drawn_from_whatever_was_measured(draw, rows, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    draw(rows, picture, "title")
    assert picture.read_bytes().startswith(PNG)


def test_the_ideal_line_has_one_time_for_each_sparsity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    closed: list[Figure] = []
    monkeypatch.setattr(pyplot, "close", closed.append)
    rows = [*fake_rows(), Row("fa4", "draft", 0.9, "head", Time(3.0, 3.0, 3.0, 3), 0.2, 1e-3)]
    plot(rows, tmp_path / "picture.png", "title")
    lines = {line.get_label(): line for line in closed[0].axes[0].lines}
    ideal = lines["ideal: dense x density"]
    assert ideal.get_xdata().tolist() == [0.5, 0.9]
    assert ideal.get_ydata().tolist() == pytest.approx([1.02, 0.22])


def test_the_pages_show_the_recorded_results() -> None:
    root = Path(__file__).parents[2]
    assert speed_section() in (root / "docs" / "benchmarks.md").read_text()
    assert (root / "docs" / "speed.md").read_text() == speed_page() + "\n"
    assert readme_section() in (root / "README.md").read_text()


def test_whole_runs_have_a_table_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = {"name": "dense fa4", "steps": 10, "step_s": [20.0, 22.0], "seconds": 220.0, "predicted_s": 210.4}
    draft = {"name": "draft 0.8", "steps": 10, "step_s": [9.0] + [6.0] * 9, "seconds": 63.0, "predicted_s": None}
    runs = [dense | {"densities": None, "memory_gib": 8.0}, draft | {"densities": [0.6, 0.1], "memory_gib": 8.126}]
    facts = {"device": "NVIDIA H200", "torch": "2.11.0", "date": "2026-11-28", "command": "diffusers-draft bench run"}
    record = {"environment": facts, "model": "wan-14b-768p", "options": {"compiled": True}, "runs": runs}
    monkeypatch.setattr(speed_records, "load", lambda: {"run": record})
    section, page = speed_section().splitlines(), speed_page()
    name = "wan-14b-768p, compiled, NVIDIA H200"
    assert f"| {name}: dense fa4 | 10 (2 timed) | 220 | **1.00x** | 210 | 8.00 |" in section
    assert f"| {name}: draft 0.8 | 10 | 63 | **3.49x** |  | 8.13 |" in section
    assert "| dense fa4 | 20.00, 22.00 | 1 |" in page and "| 0.60, 0.10 |" in page


def test_several_gpus_have_a_table_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    record = speed_records.load()["model-wan-14b-768p-compiled"]
    alone = record["steps"][-1] | {"name": step.ONE_GPU, "step_ms": 5000.0}
    record["steps"] = [alone, *record["steps"][:-1], record["steps"][-1] | {"step_ms": 2500.0}]
    record["options"]["ulysses"] = 2
    record["prediction"] |= {"gpu_speedup": 2.0, "exchange_share": 0.07}
    monkeypatch.setattr(speed_records, "load", lambda: {"model-two": record})
    section, page = speed_section().splitlines(), speed_page()
    name = "wan-14b-768p, compiled, sparsity 0.8, 2 x NVIDIA H200"
    assert section[-1] == f"| {name} | 5000 | 2500, **2.00x** | 7% | 11481 (dense fa4) |"
    assert section[-4] == "" and section[-5].startswith("|---")  # no step of one GPU
    assert "compiled, on 2 GPUs, summed" in page
    assert "one GPU takes 5000 ms: 2 are 2.00x as fast; exchanges alone would take 7% of their time." in page
    assert f"| {step.ONE_GPU} |" not in page


def test_records_of_the_defaults_and_of_a_rival_have_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    record = speed_records.load()["hunyuan-768p"] | {"rows": [asdict(row) for row in fake_rows()]}
    record["rows"].append(asdict(Row("without correction", "draft", 0.9, "row", Time(1.0, 1.0, 1.0, 3), 0.1, 0.0)))
    monkeypatch.setattr(speed_records, "load", lambda: {"new": record})
    assert "| 0.9 | 2.0 (sdpa) | 2.0 (fa4), **1.00x** | 2.0, **1.00x** |" in speed_section()
    page = speed_page()
    assert "| of ideal | error | against dense |\n|---|---|---|---|---|---|---|---|\n" in page
    assert "| other | 0.9 | 0.110 | 2.00 (1.00 to 3.00) | 1.00x | 11% | 1e-03 | 1.0e-01 |" in page


def test_the_script_prints_the_page_and_draws_the_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "speed.png"
    tables.main(["--full", "--plot", str(picture)])
    assert capsys.readouterr().out == speed_page() + "\n"
    assert picture.read_bytes().startswith(b"\x89PNG")

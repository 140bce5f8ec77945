"""The doctor on a CPU: what works there, what it says of the rest, and that no failure ends it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from diffusers_draft.attention import kernels
from diffusers_draft.attention.kernels import flex, gather, reference
from diffusers_draft.cli import doctor, main

ON_CPU = ["doctor", "--device", "cpu"]


@pytest.fixture(autouse=True)
def fresh_choice() -> Iterator[None]:
    kernels.choose.cache_clear()
    yield
    kernels.choose.cache_clear()


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compile` fails as where there is no compiler, in two lines."""

    def compiled() -> None:
        raise RuntimeError("backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr(flex, "_compiled", compiled)


def rows(printed: str) -> dict[str, str]:
    """The lines of the table by backend."""
    lines = printed.partition("\nbackend ")[2].partition("\n\n")[0].splitlines()[1:]
    return {line.split()[0]: line for line in lines if not line.startswith(" ")}


def test_every_backend_has_a_row_on_a_cpu(no_compiler: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ON_CPU) == 0
    printed = capsys.readouterr().out
    table = rows(printed)
    assert tuple(table) == kernels.BACKENDS
    for name in ("reference", "torch"):
        assert table[name].split(maxsplit=1)[1].split("  ")[0] == "yes"
        assert "float32, float16, bfloat16" in table[name] and "64, 96, 128   64, 128" in table[name]
    reasons = {
        "flex": "No working C++ compiler found",
        "triton": "needs a GPU, got cpu",
        "fa4": "flash-attn-4",
        "block_sparse_attn": "block_sparse_attn 0.0.2",
    }
    for name, reason in reasons.items():
        assert table[name].split()[1] == "no" and reason in table[name]


def test_versions_device_and_the_choice_of_auto_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    main([*ON_CPU, "--backend", "reference"])
    printed = capsys.readouterr().out
    found = {line[:18].strip(): line[19:] for line in printed.partition("\n\n")[0].splitlines()}
    assert {"device", "python", "torch", "diffusers", "accelerate", "diffusers-draft"} <= found.keys()
    assert torch.__version__.startswith(found["torch"])
    assert found["build of torch"].split()[0] in ("CPU", "CUDA", "ROCm")
    assert "\nauto takes torch in float32: fastest that works on cpu" in printed


def test_the_record_has_what_was_printed_with_whole_reasons(
    no_compiler: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "REASON", 60)
    path = tmp_path / "doctor.json"
    main([*ON_CPU, "--backend", "flex", "torch", "--json", str(path)])
    record = json.loads(path.read_text())
    flex_row, torch_row = record["backends"]
    assert not flex_row["works"] and flex_row["dtypes"] == flex_row["head_dims"] == flex_row["blocks"] == []
    assert flex_row["refused"].keys() == {"float32", "float16", "bfloat16"}
    assert flex_row["refused"]["float32"].endswith("raised:\nInvalidCxxCompiler: No working C++ compiler found")
    assert torch_row == {
        "works": True,
        "name": "torch",
        "dtypes": ["float32", "float16", "bfloat16"],
        "head_dims": [64, 96, 128],
        "blocks": [64, 128],
        "refused": {},
    }
    assert record["auto"]["backend"] == "torch" and record["auto"]["dtype"] == "float32"
    assert record["environment"]["command"].startswith("diffusers-draft")
    assert rows(capsys.readouterr().out)["flex"].endswith(" ...")


def test_wrong_numbers_are_found_where_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = gather.forward

    def wrong(query: Tensor, key: Tensor, value: Tensor, mask: kernels.BlockMask, scale: float) -> Tensor:
        broken = query.dtype == torch.float16 or query.shape[-1] == 96 or mask.block == 64
        return right(query, key, value, mask, 2 * scale if broken else scale)

    monkeypatch.setattr(gather, "forward", wrong)
    assert main([*ON_CPU, "--backend", "torch"]) == 0
    printed = capsys.readouterr().out
    assert rows(printed)["torch"].split("  ")[-1].strip() == "128"
    assert "float32, bfloat16 " in rows(printed)["torch"] and "64, 128 " in rows(printed)["torch"]
    for what in ("float16", "head_dim 96", "blocks of 64"):
        assert f"not {what}: gives wrong numbers on cpu" in printed


@pytest.mark.parametrize("error", [AttributeError("moved"), OSError("libcudart.so.12: no such file"), KeyError()])
def test_whatever_a_backend_raises_is_a_row(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(name: str) -> ModuleType:
        if name == "torch":
            raise error
        return reference

    monkeypatch.setattr(kernels, "load", load)
    assert main([*ON_CPU, "--backend", "torch", "reference"]) == 0
    printed = capsys.readouterr().out
    reason = str(error) or type(error).__name__
    assert rows(printed)["torch"].split(maxsplit=2)[1:] == ["no", reason]
    assert "auto takes none in float32: " in printed


def test_no_backend_at_all_ends_with_code_2_after_the_table_and_the_record(
    no_compiler: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "doctor.json"
    with pytest.raises(SystemExit) as stop:
        main([*ON_CPU, "--backend", "flex", "--json", str(path)])
    printed, error = capsys.readouterr()
    assert stop.value.code == 2 and error.count("\n") == 1 and "No backend works on cpu" in error
    assert rows(printed).keys() == {"flex"}
    assert [row["works"] for row in json.loads(path.read_text())["backends"]] == [False]


def test_a_file_that_cannot_be_written_is_found_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*ON_CPU, "--json", str(tmp_path / "missing" / "doctor.json")])
    printed, error = capsys.readouterr()
    assert printed == "" and "there is no folder" in error


def test_it_runs_where_diffusers_and_triton_are_missing() -> None:
    code = f"""
import sys
for name in ("diffusers", "accelerate", "transformers", "triton", "PIL"):
    sys.modules[name] = None
from diffusers_draft.cli import main
sys.exit(main([*{ON_CPU}, "--backend", "torch", "triton"]))
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert rows(printed)["torch"].split()[1] == "yes"
    assert rows(printed)["triton"].split(maxsplit=3)[1:3] == ["no", "needs"]
    assert "triton 3.4 or later" in rows(printed)["triton"]

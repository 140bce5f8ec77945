"""The `generate` command in several processes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import checkpoints
import imageio
import numpy as np
import pytest
from launch import Pool, pool

from diffusers_draft.cli import main

__all__ = ["pool"]

SMALL = ["--prompt", "a red circle", "--height", "208", "--width", "256", "--frames", "9", "--steps", "4"]
"""3 x 13 x 16 tokens."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "hunyuan_video"
    checkpoints.hunyuan_video(folder)
    return folder


def test_the_first_rank_writes_the_video_of_one_process(pool: Pool, model: Path, tmp_path: Path) -> None:
    """Without the correction: one more rounding changes a pixel by one, and H.264 makes much of that in noise."""
    together, alone = tmp_path / "together.mp4", tmp_path / "alone.mp4"
    arguments = ["generate", "--model", str(model), *SMALL, "--probes", "0", "--output"]
    (code, printed, errors), other = pool.run(2, "command", *arguments, str(together), "--ulysses", "2")
    assert (code, other[0]) == (0, 0), errors + other[2]
    assert main([*arguments, str(alone)]) == 0
    assert "grid      (3, 13, 16) = 624 video tokens" in printed and printed.endswith(f"Wrote {together}.\n")
    assert "| 0/4" in errors  # the progress bar
    assert other[1] == "" and "%|" not in other[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.mp4", "together.mp4"]
    frames = [imageio.v3.imread(path).astype(int) for path in (together, alone)]
    assert np.abs(frames[0] - frames[1]).mean() < 0.1


def test_an_error_of_any_rank_reaches_the_user(pool: Pool, model: Path, tmp_path: Path) -> None:
    odd = ["generate", "--model", str(model), *SMALL, "--width", "272", "--ulysses", "2"]
    found = pool.run(2, "command", *odd, "--output", str(tmp_path / "never.mp4"))
    assert [code for code, _, _ in found] == [2, 2]
    assert any(re.search(r"error: \[rank \d of 2\] 2 GPUs cannot share 663 tokens equally", rank[2]) for rank in found)


def torchrun(model: Path, output: Path, steps: str, ranks: str = "2") -> subprocess.Popen[str]:
    """Starts the command in some processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    command += ["-m", "diffusers_draft", "generate", "--model", str(model), *SMALL[:-1], steps, "--ulysses", ranks]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([*command, "--output", output], stderr=subprocess.PIPE, text=True, env=environment)


def test_an_error_of_one_rank_ends_the_command(model: Path, tmp_path: Path) -> None:
    """Only the first looks at the output."""
    folder = tmp_path / "folder.mp4"
    folder.mkdir()
    process = torchrun(model, folder, "4")
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert f"error: [rank 0 of 2] {folder} is a folder" in errors


def test_a_killed_rank_ends_the_command(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """One of eight."""
    folder = tmp_path_factory.mktemp("models") / "hunyuan_video"
    checkpoints.hunyuan_video(folder, num_attention_heads=8)
    process = torchrun(folder, tmp_path / "never.mp4", "100000", ranks="8")
    assert process.stderr is not None
    for line in iter(lambda: process.stderr.read(80), ""):
        if re.search(r" [2-9]/100000", line):
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    killed = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - killed < 60 and process.returncode != 0
    assert "Signal 9 (SIGKILL)" in errors
    assert list(tmp_path.iterdir()) == []


def _as_started_by_torchrun(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": size, "RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    ("name", "options"),
    [("eval", ["--model", "any", "--prompts", "any"]), ("bench attention", []), ("bench run", []), ("demo", [])],
)
def test_commands_of_one_process_refuse_several(
    name: str, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _as_started_by_torchrun(2, monkeypatch)
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), *options])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert f"{name} runs in one process, and was started in 2. Start it without torchrun." in error


def test_a_cluster_s_own_word_for_its_size_starts_no_processes(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["models"]) == 0
    with pytest.raises(SystemExit):
        main(["generate", "--model", "any", "--prompt", "a", "--ulysses", "2"])
    assert "needs as many processes, and this command runs in 1" in capsys.readouterr().err


@pytest.mark.parametrize(("started", "asked"), [(1, 2), (2, 1), (2, 4)])
def test_as_many_processes_as_asked(
    started: int, asked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _as_started_by_torchrun(started, monkeypatch)
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--model", "any", *SMALL, "--ulysses", str(asked), "--output", str(tmp_path / "never.mp4")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert f"--ulysses {asked} needs as many processes, and this command runs in {started}" in error
    assert f"torchrun --nproc-per-node {max(started, asked)}" in error

"""The studies of docs/results: what they share."""

import contextlib
import json
import signal
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import over_captions
import pytest
import torch


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a study of captions' lengths, whose processes are one, and whose machine is `machine`."""
    monkeypatch.setattr(over_captions, "processes", lambda count: contextlib.nullcontext(SimpleNamespace(map=map)))

    def start(captions: int, run_unit, machine: str = "first", times: int = 1):
        monkeypatch.setattr(over_captions, "this_machine", lambda: {"machine": machine})
        monkeypatch.setattr(sys, "argv", ["study.py", "--output", f"{tmp_path}/a.json", "--captions", str(captions)])
        return over_captions.study(
            "A study.",
            captions=9,
            units=lambda chosen, folder: [(caption, times, folder.name) for caption in chosen],
            run_unit=run_unit,
            packed=lambda found: {"lengths": [one["length"] for one in found]},
        )

    return start


def lengths(unit: tuple[str, int, str]) -> list[dict[str, int]]:
    caption, times, _ = unit
    return [{"length": len(caption)}] * times


def test_a_record_has_what_all_parts_found(run, tmp_path: Path) -> None:
    record = run(3, lengths, times=2)
    assert len(record["captions"]) == 3 and record["environment"] == {"machine": "first"}
    assert record["lengths"] == [len(caption) for caption in record["captions"] for _ in range(2)]
    assert json.loads((tmp_path / "a.json").read_text()) == record


def test_a_study_that_was_cut_off_goes_on_where_it_was(run, tmp_path: Path, capsys) -> None:
    seen = []

    def cut_off(unit):
        seen.append(unit[0])
        if len(seen) == 3:
            raise KeyboardInterrupt
        return lengths(unit)

    with pytest.raises(KeyboardInterrupt):
        run(5, cut_off)
    assert not (tmp_path / "a.json").exists()
    with (tmp_path / "a.json.lines").open("a") as file:
        file.write('{"of": "half a line')
    with pytest.raises(SystemExit):
        run(5, cut_off, machine="second")
    assert "on another machine: {'machine': 'first'}. This is {'machine': 'second'}." in capsys.readouterr().err
    record = run(5, cut_off)
    assert seen == [*record["captions"][:3], *record["captions"][2:]]
    assert record["lengths"] == [len(caption) for caption in record["captions"]]
    assert run(2, cut_off) == record | {"captions": record["captions"][:2], "lengths": record["lengths"][:2]}
    assert len(seen) == 6


@pytest.mark.parametrize("changed", ["units", "scripts"])
def test_other_work_is_not_put_behind_what_is_there(changed: str, run, capsys, monkeypatch) -> None:
    run(3, lengths)
    if changed == "scripts":
        monkeypatch.setattr(over_captions, "SCRIPTS", "changed")
    with pytest.raises(SystemExit):
        run(3, lengths, times=2 if changed == "units" else 1)
    assert "a.json.lines has other work than was asked for. Remove it, or" in capsys.readouterr().err


def test_a_study_whose_processes_die_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with over_captions.processes(2) as pool, pytest.raises(BrokenProcessPool):
        list(pool.map(signal.raise_signal, [signal.SIGKILL] * 2))

"""The `eval` command and what it is made of, on a tiny Wan pipeline that is saved to disk."""

import csv
import dataclasses
import io
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import time
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import checkpoints
import imageio
import models
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paper import PAPER, enable_draft_attention
from PIL import Image

from diffusers_draft import DraftConfig
from diffusers_draft.cli import evaluate, main
from diffusers_draft.patching.report import DraftReport
from diffusers_draft.tools.evaluation import Setting, Store, Study, grid, parse_setting, read_prompts
from diffusers_draft.tools.evaluation.metrics import fidelity, fidelity_metrics, flicker
from diffusers_draft.tools.evaluation.results import read_results
from diffusers_draft.tools.evaluation.selection import selecting
from diffusers_draft.tools.evaluation.statistics import Estimate, estimate
from diffusers_draft.tools.evaluation.store import key
from diffusers_draft.tools.evaluation.study import work
from diffusers_draft.tools.evaluation.table import as_csv, as_text, table
from diffusers_draft.tools.generation.files import whole_or_not

SIZE = ["--height", "96", "--width", "160", "--frames", "5", "--steps", "3"]
"""2 x 6 x 10 tokens: with tiles of 4 x 8 three full blocks and a rest."""
TILE = ("--tile", "4x8")
PAPERS = ("--schedule", "paper", "--score", "mass", "--probes", 0)
RANDOM = "sparsity=0.8,schedule=paper,score=mass,probes=0,budget=head,tile=4x8,selection=random"
PROMPTS = ["a red circle", "a blue square moves left", "stripes"]
TIMES = ("seconds", "speedup")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    checkpoints.wan(folder / "wan")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


def arguments(folder, output, *more):
    model = ["--model", str(folder / "wan"), "--prompts", str(folder / "prompts.txt"), "--output", str(output)]
    return ["eval", *model, *SIZE, *map(str, more)]


def fails(argv, capsys, code=2):
    """Runs a command that must fail; its one line on stderr."""
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == code
    line = capsys.readouterr().err.rstrip("\n").rpartition("\n")[2]
    assert line.startswith("diffusers-draft: error: " if code == 2 else "diffusers-draft: ")
    return line


# --- the whole command


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    """One finished run: its folder and its record."""
    output = tmp_path_factory.mktemp("eval") / "new"
    settings = ["--sparsity", "0.5", "0.8", "--budget", "head", "row", *TILE, *PAPERS, "--setting", RANDOM]
    assert main(arguments(folder, output, "--seeds", 0, 7, *settings, "--attention", 2)) == 0
    return output, json.loads((output / "results.json").read_text())


NAMES = (
    ["dense"]
    + [
        f"sparsity={s},schedule=paper,score=mass,probes=0,budget={b},tile=4x8"
        for s in (0.5, 0.8)
        for b in ("head", "row")
    ]
    + [RANDOM]
)


def test_every_prompt_seed_and_setting_has_a_clip_and_a_video(done):
    output, record = done
    assert [row["setting"] for row in record["rows"]] == NAMES
    assert all((row["prompts"], row["clips"]) == (3, 6) for row in record["rows"])
    keys = {(clip["setting"], clip["prompt"], clip["seed"]) for clip in record["clips"]}
    assert len(keys) == len(record["clips"]) == 6 * 3 * 2
    videos = sorted((output / "videos" / NAMES[4]).iterdir())
    assert [video.name.rpartition("-")[0] for video in videos] == sorted(
        f"{prompt.replace(' ', '-')}-{seed}" for prompt in PROMPTS for seed in (0, 7)
    )
    assert imageio.v3.imread(videos[0]).shape == (5, 96, 160, 3)


def test_numbers_are_those_of_a_run_by_hand(folder, done):
    """Same noise, 8-bit frames, metrics from their formulas."""
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(folder / "wan")
    call = dict(prompt=PROMPTS[1], height=96, width=160, num_frames=5, num_inference_steps=3, output_type="np")

    def video():
        frames = pipe(**call, generator=torch.Generator().manual_seed(7)).frames[0]
        return np.round(frames * 255)

    dense = video()
    handle = enable_draft_attention(pipe, 0.8, budget="row", tile=(4, 8))
    draft = video()
    (clip,) = [
        clip
        for clip in done[1]["clips"]
        if (clip["setting"], clip["prompt"], clip["seed"]) == (NAMES[4], PROMPTS[1], 7)
    ]
    assert clip["psnr"] == pytest.approx(10 * math.log10(255**2 / np.square(draft - dense).mean()), abs=1e-3)
    changes = [np.abs(np.diff(frames, axis=0)).mean() for frames in (dense, draft)]
    assert clip["flicker"] == pytest.approx(changes[1], abs=1e-4)
    assert clip["flicker_difference"] == pytest.approx(changes[1] - changes[0], abs=1e-4)
    (report,) = handle.report().transformers
    assert clip["density"] == report.density < 1
    # Two forwards in each of 1 dense and 2 sparse steps, through 1 dense and 2 sparse layers.
    assert report.forwards == {"dense": 2, "sparse": 4}
    assert clip["computed"] == pytest.approx((2 * 3 + 4 * 1 + 4 * 2 * report.density) / (6 * 3))


def test_table_is_that_of_the_clips(done):
    output, record = done
    clips = record["clips"]
    for row in record["rows"][1:]:
        means = [
            np.mean([clip["psnr"] for clip in clips if (clip["setting"], clip["prompt"]) == (row["setting"], prompt)])
            for prompt in PROMPTS
        ]
        assert row["psnr"]["mean"] == pytest.approx(np.mean(means))
        assert min(means) <= row["psnr"]["low"] <= row["psnr"]["mean"] <= row["psnr"]["high"] <= max(means)
    lines = list(csv.DictReader((output / "results.csv").open()))
    assert [line["setting"] for line in lines] == [row["setting"] for row in record["rows"]]
    assert float(lines[1]["psnr_low"]) == record["rows"][1]["psnr"]["low"]
    assert lines[0]["psnr"] == ""
    again = read_results(output / "results.json")
    assert json.loads(json.dumps([plain(row) for row in again])) == record["rows"]


def test_the_table_comes_back_from_the_file(done, tmp_path, capsys):
    output, record = done
    assert main(["table", str(output / "results.json"), str(output / "results.json")]) == 0
    blocks = capsys.readouterr().out.split(f"{output / 'results.json'}\n")
    assert blocks[0] == "" and blocks[1] == blocks[2]
    for line, row in zip(blocks[1].splitlines()[1:], record["rows"], strict=True):
        assert line.startswith(f"{row['setting']} ")
        assert row["setting"] == "dense" or f" {row['psnr']['mean']:.4g} ±" in line


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"clips": [{}], "attention": []}', None])
def test_a_file_that_is_no_study_is_one_line(content, tmp_path, capsys):
    file = tmp_path / "other.json"
    if content is not None:
        file.write_text(content)
    line = fails(["table", str(file)], capsys)
    assert str(file) in line and ("is not a results.json" in line or "No such file" in line)


def plain(row):
    return {name: dataclasses.asdict(v) if isinstance(v, Estimate) else v for name, v in row.items()}


def test_attention_was_measured_on_two_prompts(done):
    record = done[1]
    assert {entry["prompt"] for entry in record["attention"]} == set(PROMPTS[:2])
    for row in record["rows"][1:]:
        assert 0 < row["attention_error"]["mean"] < 2
        assert 0 < row["attention_kept"]["mean"] <= row["attention_oracle"]["mean"] + 1e-6 <= 1.00001
    assert "attention_kept" not in record["rows"][0]


def test_picture(done):
    with Image.open(done[0] / "fidelity.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000


def test_what_is_done_is_not_done_again(folder, done, monkeypatch, capsys):
    """Not even the model is loaded, and the same table comes out."""
    import diffusers_draft.cli.evaluate as command

    monkeypatch.setattr(command, "loaded", None)
    output, record = done
    settings = ["--sparsity", "0.5", "0.8", "--budget", "head", "row", *TILE, *PAPERS, "--setting", RANDOM]
    main(arguments(folder, output, "--seeds", 0, 7, *settings, "--attention", 2))
    assert json.loads((output / "results.json").read_text())["rows"] == record["rows"]
    out = capsys.readouterr().out
    assert out.startswith("3 prompts, 2 seeds, 5 settings")
    assert all(name in out for name in NAMES)


def rows_without_times(output):
    rows = json.loads((output / "results.json").read_text())["rows"]
    return [{name: cell for name, cell in row.items() if name not in TIMES} for row in rows]


def test_killed_run_started_again_ends_with_the_same_table(folder, tmp_path):
    settings = ("--sparsity", "0.5", "0.8", *TILE, "--attention", 1)
    command = [sys.executable, "-m", "diffusers_draft", *arguments(folder, tmp_path / "killed", *settings)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    clips = tmp_path / "killed" / "clips"
    kept = {}
    for wanted in (2, 5):
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            until = time.monotonic() + 120
            while len(list(clips.glob("[!.]*.json"))) < wanted and process.poll() is None and time.monotonic() < until:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
        finished = {path.name: path.read_bytes() for path in clips.glob("[!.]*.json")}
        assert wanted <= len(finished) < 9
        assert finished.items() >= kept.items()
        kept = finished
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert all((clips / name).read_bytes() == content for name, content in kept.items())
    main(arguments(folder, tmp_path / "whole", *settings))
    assert rows_without_times(tmp_path / "killed") == rows_without_times(tmp_path / "whole")
    assert len(list(clips.glob("[!.]*.json"))) == 9
    assert not list((tmp_path / "killed").rglob("*.part*"))


def test_interrupt_is_one_line_that_says_how_to_go_on(folder, tmp_path, monkeypatch, capsys):
    def interrupt(self, *arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Study, "_make", interrupt)
    line = fails(arguments(folder, tmp_path / "out", "--sparsity", "0.5"), capsys, code=130)
    assert f"stopped; the same command goes on from what is in {tmp_path / 'out'}" in line


def test_full_disk_is_one_line_and_keeps_what_was_done(folder, tmp_path, monkeypatch, capsys):
    command = arguments(folder, tmp_path / "out", "--sparsity", "0.5")
    replace, count = type(tmp_path).replace, 0

    def full(path, target):
        nonlocal count
        if target.parent.name == "clips":
            count += 1
            if count == 5:
                raise OSError(28, "No space left on device")
        return replace(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(type(tmp_path), "replace", full)
        assert "could not be written: No space left on device" in fails(command, capsys)
    assert len(list((tmp_path / "out" / "clips").glob("*.json"))) == 4
    assert not list((tmp_path / "out" / "clips").glob(".*"))
    assert main(command) == 0
    assert len(list((tmp_path / "out" / "clips").glob("*.json"))) == 6


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "There is nothing to compare"),
        (["--sparsity", "2"], "sparsity must be in [0, 1), got 2.0"),
        (["--sparsity", "much"], "sparsity cannot be 'much': expected a number."),
        (["--probes", "1.5"], "probes cannot be '1.5': expected a whole number."),
        (["--dense-layers", "x"], "dense_layers cannot be 'x': expected indices joined by +, as in 0+1, or none."),
        (["--setting", "sparsity=.5,sparsity=.9"], "sparsity is given twice in the setting 'sparsity=.5,sparsity=.9'"),
        (["--dense-steps", "0.5", "1"], "got 1. For one step of 50 give 0.02, for all of them 1.0"),
        (["--tile", "8by16"], "tile cannot be '8by16'"),
        (["--selection", "best"], "selection cannot be 'best': expected one of draft, random, local, oracle"),
        (
            ["--setting", "sparsety=0.9"],
            "Unknown option 'sparsety' in a setting. Known are sparsity, max_error, schedule, score, probes,",
        ),
        (["--setting", "budget=column"], "Unknown budget 'column'"),
        (["--sparsity", "0.5", "--prompts", "missing.txt"], "No such file or directory: 'missing.txt'"),
        (["--sparsity", "0.5", "--prompts", "binary.txt"], "binary.txt is not UTF-8 text"),
        (["--sparsity", "0.5", "--prompts", "empty.txt"], "empty.txt holds no prompt"),
        (["--sparsity", "0.5", "--prompts", "other.csv"], "needs a column named prompt; its first line has text, id"),
        (
            ["--sparsity", "0.5", "--prompts", "open.csv"],
            "open.csv cannot be read as CSV: field larger than field limit",
        ),
        (["--sparsity", "0.5", "--image", "missing.png"], "No such file or directory: 'missing.png'"),
        (["--sparsity", "0.5", "--output", "empty.txt"], "Not a directory"),
        (["--sparsity", "0.5", "--vbench"], "pip install vbench"),
        (["--max-error", "0.05", "--sparsity", "0.5"], "leave the other None, got sparsity=0.5"),
        (["--max-error", "0.05", "--attention"], "--attention measures calls at a given sparsity"),
        (["--sparsity", "0.5", "--attention", "--compile"], "need a model that is not compiled"),
        (["--sparsity", "0.5", "--height", "100"], "divisible by 16"),
        (["--sparsity", "0.5", "--backend", "torch", "fa4"], "Backend 'fa4' needs "),
        (["--dense-layers", "none", "0+99"], "dense_layers has [99], but WanTransformer3DModel has 3 layers"),
        (["--sparsity", "0.5", "--output", "taken"], "results.csv cannot be written: it is not a file"),
        (["--sparsity", "0.5", "--model", "/nowhere"], "'/nowhere' is neither a folder nor a hub id"),
    ],
)
def test_errors_are_one_line(more, message, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "taken" / "results.csv").mkdir(parents=True)
    (tmp_path / "other.csv").write_text("text,id\na,1\n")
    (tmp_path / "open.csv").write_text('prompt\n"a cat\n' + "a dog\n" * 30_000)
    assert message in fails(arguments(folder, tmp_path / "out", *more), capsys)
    assert not list(tmp_path.glob("*/clips/*")), "it was found before the first clip"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "0"], "argument --steps: must be a whole number from 1 on, got '0'"),
        (["--fps", "0"], "argument --fps: must be a number of frames per second above 0, got '0'"),
        (["--attention", "-1"], "argument --attention: must be a whole number from 0 on, got '-1'"),
        (["--seeds", "0", "-1"], "argument --seeds: must be a whole number from 0 on, got '-1'"),
    ],
)
def test_numbers_that_are_none_are_one_line(more, message, folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(arguments(folder, tmp_path, "--sparsity", "0.5", *more))
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--steps", "5"), "num_inference_steps 3; now it is 5"),
        (("--fps", "30"), "fps 16; now it is 30.0"),
        (("--dtype", "bfloat16"), "dtype 'float32'; now it is 'bfloat16'"),
    ],
)
def test_folder_of_another_study_is_refused(option, message, folder, done, capsys):
    line = fails(arguments(folder, done[0], "--sparsity", "0.5", *option), capsys)
    assert f"holds results with {message}. Choose another folder." in line


def test_folder_of_another_machine_is_refused(folder, done, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "environment", lambda device: {"device": "another"})
    line = fails(arguments(folder, done[0], "--sparsity", "0.5"), capsys)
    assert "; now it is 'another'. Choose another folder." in line


def test_folder_of_a_refused_try_is_free_for_the_next(folder, tmp_path, capsys):
    assert "divisible by 16" in fails(arguments(folder, tmp_path, "--sparsity", "0.5", "--height", "100"), capsys)
    (tmp_path / "dense" / "of-a-clip-that-was-never-finished.npz").touch()
    (tmp_path / "clips" / ".half.part.json").touch()
    small = ["--height", "64", "--width", "64", "--steps", "1", "--no-videos"]
    assert main(arguments(folder, tmp_path, "--sparsity", "0.5", *TILE, *small, "--seeds", 3, 3)) == 0
    assert len(list((tmp_path / "clips").glob("[!.]*"))) == 2 * 3, "a seed given twice counts once"


@pytest.mark.parametrize("package", ["torchmetrics", "matplotlib"])
def test_missing_packages_are_named(package, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    line = fails(arguments(folder, tmp_path, "--sparsity", "0.5"), capsys)
    assert f"{package} is not installed: pip install 'diffusers-draft[eval]'" in line


def test_vbench_scores_the_videos_of_every_setting(folder, done, tmp_path, monkeypatch, capsys):
    """A stand-in with VBench's interface and the file that it writes."""

    class VBench:
        def __init__(self, device, full_info_dir, output_path):
            self.output = output_path

        def evaluate(self, videos_path, name, dimension_list, mode):
            assert mode == "custom_input"
            videos = sorted(os.listdir(videos_path))
            scores = {
                dimension: [len(videos) / 10, [{"video_path": v} for v in videos]] for dimension in dimension_list
            }
            with open(os.path.join(self.output, f"{name}_eval_results.json"), "w") as file:
                json.dump(scores, file)

    module = types.ModuleType("vbench")
    module.VBench = VBench
    module.__spec__ = ModuleSpec("vbench", None)
    monkeypatch.setitem(sys.modules, "vbench", module)
    main(arguments(folder, tmp_path, "--sparsity", "0.5", "--vbench"))
    assert "leave --no-videos out" in fails(arguments(folder, tmp_path, "--vbench", "--no-videos"), capsys)
    scores = json.loads((tmp_path / "results.json").read_text())["vbench"]
    name = "sparsity=0.5,schedule=falling,score=value,probes=64,budget=row,tile=4x4x8"
    assert list(scores) == ["dense", name]
    assert scores["dense"]["motion_smoothness"] == scores[name]["imaging_quality"] == 0.3

    (tmp_path / "videos" / "dense" / "of-an-earlier-list.mp4").touch()
    monkeypatch.setattr(VBench, "evaluate", fails_to_load)
    for before in (scores, None):
        if before is None:
            (tmp_path / "results.json").unlink()
        with pytest.raises(KeyError):
            main(arguments(folder, tmp_path, "--sparsity", "0.5", "--vbench"))
        kept = json.loads((tmp_path / "results.json").read_text())
        assert len(kept["clips"]) == 6 and kept.get("vbench") == before
    assert len(list((tmp_path / "vbench" / "dense" / "clips").iterdir())) == 3, "only this study's are scored"


def fails_to_load(self, **options):
    raise KeyError("no weights")


def test_without_videos_the_numbers_are_the_same(folder, done, tmp_path):
    settings = ["--seeds", 0, 7, "--sparsity", "0.5", "--budget", "head", *TILE, *PAPERS]
    assert main(arguments(folder, tmp_path, *settings, "--no-videos")) == 0
    assert not list((tmp_path / "videos").iterdir())

    def psnr(record):
        return {
            (clip["prompt"], clip["seed"]): clip["psnr"] for clip in record["clips"] if clip["setting"] == NAMES[1]
        }

    assert psnr(json.loads((tmp_path / "results.json").read_text())) == pytest.approx(psnr(done[1]))


# --- studies from Python


def study(folder, settings, **options):
    """On a pipeline without text encoder, as a study of an embedded model is."""

    def inputs(pipe, prompt, seed):
        return dict(
            prompt_embeds=models.random(1, 7, 8, seed=len(prompt)),
            guidance_scale=1.0,
            height=80,
            width=112,
            num_frames=5,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(seed),
        )

    store = Store(folder, {"model": "tiny"})
    metrics = fidelity_metrics()
    return Study(store, models.wan_pipeline, inputs, ["a", "bcd"], [0], settings, metrics, videos=False, **options)


def test_study_of_any_pipeline_without_videos(tmp_path):
    options = dict(tile=(2, 8), dense_steps=0, dense_layers=()) | PAPER
    tiles = [Setting(DraftConfig(sparsity=s, **options)) for s in (0.0, 0.7)]
    small = study(tmp_path, tiles)
    small.run()
    rows = table(small.records())
    assert [row["setting"] for row in rows] == ["dense", *(setting.name for setting in tiles)]
    assert rows[1]["psnr"].mean > 60 and rows[1]["density"].mean == rows[1]["computed"].mean == 1
    assert rows[2]["psnr"].mean < rows[1]["psnr"].mean and rows[2]["computed"].mean < 0.6
    assert not list((tmp_path / "videos").iterdir())


def test_equal_settings_give_equal_clips_and_random_ones_depend_on_the_seed_alone(tmp_path):
    config = DraftConfig(sparsity=0.7, tile=(2, 8), dense_steps=0, dense_layers=())
    random = [Setting(config, "random")]
    psnr = []
    for name in ("a", "b"):
        small = study(tmp_path / name, random)
        small.run()
        psnr.append([clip["psnr"] for clip in small.records()[2:]])
    assert psnr[0] == psnr[1]


def test_draft_selection_as_a_baseline_is_draft_attention(tmp_path):
    """The way that runs baselines changes nothing but the choice."""
    pipe = models.wan_pipeline()
    with enable_draft_attention(pipe, 0.7, tile=(2, 8), dense_steps=0) as handle:
        expected = models.run_wan(pipe)
        density = handle.report().transformers[0].density
        with handle._watched(selecting("draft", 0)):
            assert models.error(models.run_wan(pipe), expected) < 1e-6
        with handle._watched(selecting("random", 0)):
            assert models.error(models.run_wan(pipe), expected) > 1e-3
        assert handle.report().transformers[0].density == pytest.approx(density)
        assert torch.equal(models.run_wan(pipe), expected)


@pytest.mark.parametrize("captions", [1, 3])
def test_the_study_of_the_defaults_shows_as_many_captions_as_there_are(captions, tmp_path):
    study = runpy.run_path(str(Path(__file__).parents[2] / "docs/results/fidelity_study.py"))
    names = ["dense", *(variant.name for variant in study["MAIN"])]
    clips = [np.full((17, 4, 6, 3), 50 * caption, np.uint8) for caption in range(captions)]
    study["_show"](study["Unit"]("wide", 14, ("a caption",) * captions), dict.fromkeys(names, clips), tmp_path)
    picture = imageio.v3.imread(tmp_path / "wide.png")
    assert picture.shape == (7 * 4, min(captions, 2) * 3 * 6, 3) and picture[0, -1, 0] == 50 * (min(captions, 2) - 1)


def test_work_without_any_call_is_that_of_a_dense_run():
    report = enable_draft_attention(models.wan()).report()
    assert work(None, report) == work(report, report) == {"density": 1.0, "computed": 1.0}


def test_work_of_two_experts_counts_each_by_its_calls():
    """As of Wan 2.2: 12 steps of the denser one, 28 of the other, 3 layers in each."""
    report = enable_draft_attention(models.wan(), 0.5, probes=0).report().transformers[0]
    experts = [
        dataclasses.replace(
            report, run=(types.SimpleNamespace(density=density),), sparse_calls=3 * steps, dense_calls={}
        )
        for density, steps in ((0.45, 12), (0.09, 28))
    ]
    found = work(None, DraftReport(tuple(experts)))
    assert found["density"] == pytest.approx((12 * 0.45 + 28 * 0.09) / 40) == pytest.approx(found["computed"])


@pytest.mark.parametrize("sparsity", [0, 0.7])
def test_draft_selection_under_autocast_is_draft_attention(sparsity):
    """Its queries come in float32, and nothing of it is rounded where draft attention is not."""
    model, inputs = models.wan(), models.wan_inputs()
    handle = enable_draft_attention(model, sparsity, tile=(2, 8), schedule="constant", probes=64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = models.forward(model, inputs)
        before = handle.report().transformers[0]
        with handle._watched(selecting("draft", 0)):
            assert torch.equal(models.forward(model, inputs), expected)
    after = handle.report().transformers[0]
    assert after.run[1] == dataclasses.replace(before.run[0], step=1)
    assert (after.error.before == 0) == (sparsity == 0)


def test_more_metrics_and_settings_are_added_to_a_finished_study(tmp_path):
    config = DraftConfig(sparsity=0.5, tile=(2, 8))
    study(tmp_path, [Setting(config)]).run()
    before = {path: path.read_bytes() for path in (tmp_path / "clips").iterdir()}
    more = study(tmp_path, [Setting(config), Setting(dataclasses.replace(config, budget="head"))])
    more.run()
    assert len(more.records()) == 6
    assert all(path.read_bytes() == content for path, content in before.items())
    more.metrics.add_metrics({"ssim_again": type(more.metrics["ssim"])(data_range=1.0)})
    more.run()
    clips = more.records()[2:]
    assert len(clips) == 4 and all(clip["ssim_again"] == clip["ssim"] for clip in clips)


def test_dense_clips_that_were_thrown_away_are_made_again_where_they_are_needed(tmp_path):
    config = DraftConfig(sparsity=0.5, tile=(2, 8))
    first = study(tmp_path, [Setting(config)])
    first.run()
    for path in (tmp_path / "dense").iterdir():
        path.unlink()
    first.run()
    assert not list((tmp_path / "dense").iterdir()), "nothing was left to compare"
    study(tmp_path, [Setting(config), Setting(dataclasses.replace(config, budget="head"))]).run()
    assert len(list((tmp_path / "clips").iterdir())) == 6


# --- prompts, settings


def test_prompts_from_text(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffein Ührchen, das tickt\r\n\r\n  a cat \na cat\n".encode())
    assert read_prompts(path) == ["ein Ührchen, das tickt", "a cat"]


def test_prompts_from_csv(tmp_path):
    path = tmp_path / "benchmark.CSV"
    path.write_text('index,Prompt,class\n1,"A dove, ""flying"",\nin anime style.",animal\n2,a cat,animal\n3,,\n')
    assert read_prompts(path) == ['A dove, "flying",\nin anime style.', "a cat"]


def test_settings_are_read_and_named():
    text = "tile=16x8, sparsity=0.75,budget=row,probes=0, score=mass,schedule=paper,dense_steps=0.25,dense_layers=0+2"
    setting = parse_setting(f"{text},selection=local")
    config = DraftConfig(sparsity=0.75, budget="row", tile=(16, 8), dense_steps=0.25, dense_layers=(0, 2), **PAPER)
    assert setting == Setting(config, "local")
    assert setting.name == (
        "sparsity=0.75,schedule=paper,score=mass,probes=0,budget=row,tile=16x8,dense_steps=0.25,dense_layers=0+2,"
        "selection=local"
    )
    assert parse_setting("dense_layers=none") == Setting(DraftConfig(dense_layers=()))
    assert parse_setting("sparsity=0.8") == Setting()
    assert parse_setting("sparsity=0.8").name == (
        "sparsity=0.8,schedule=falling,score=value,probes=64,budget=row,tile=4x4x8"
    )


@given(
    st.builds(
        DraftConfig,
        sparsity=st.sampled_from([0.0, 0.5, 0.875, 0.95]),
        schedule=st.sampled_from(["falling", "constant", "paper"]),
        score=st.sampled_from(["value", "mass"]),
        probes=st.sampled_from([0, 64, 100]),
        budget=st.sampled_from(["head", "row"]),
        tile=st.sampled_from([(8, 16), (4, 32), (2, 8, 8)]),
        dense_steps=st.none() | st.sampled_from([0.0, 0.25, 1.0]),
        dense_layers=st.none() | st.lists(st.integers(0, 40), max_size=3),
        backend=st.sampled_from(["auto", "torch"]),
    ),
    st.sampled_from(["draft", "oracle"]),
)
def test_names_of_settings_can_be_read(config, selection):
    setting = Setting(config, selection)
    assert parse_setting(setting.name) == setting
    assert json.loads(json.dumps(setting.options)) == setting.options


def test_grid_is_every_combination():
    settings = grid(sparsity=[0.5, 0.9], budget=["head", "row"], selection=["draft"])
    assert [(s.config.sparsity, s.config.budget) for s in settings] == [
        (0.5, "head"), (0.5, "row"), (0.9, "head"), (0.9, "row")
    ]  # fmt: skip


# --- metrics


def random_frames(frames=3, height=24, width=40, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3)).astype(np.uint8)


def gaussian_ssim(a, b):
    """Wang et al. 2004: Gaussian window of 11 with deviation 1.5, where it fits in; mean of all."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2

    def smooth(x):
        views = np.lib.stride_tricks.sliding_window_view(x, (11, 11), axis=(1, 2))
        return np.einsum("fhwcij,ij->fhwc", views, window)

    a, b = a / 255.0, b / 255.0
    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b, cov = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2, smooth(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    ssim = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return ssim.mean()


@pytest.mark.parametrize("frames", [1, 3, 17])
def test_metrics_equal_their_formulas(frames):
    dense = random_frames(frames)
    noise = np.random.default_rng(1).normal(0, 12, dense.shape)
    video = np.clip(dense + noise, 0, 255).astype(np.uint8)
    found = fidelity(video, dense, fidelity_metrics())
    error = np.square(video.astype(float) - dense).mean()
    assert found["psnr"] == pytest.approx(10 * math.log10(255**2 / error), abs=1e-3)
    assert found["ssim"] == pytest.approx(gaussian_ssim(video, dense), abs=5e-3)
    assert fidelity(dense, dense, fidelity_metrics()) == {"psnr": 100.0, "ssim": pytest.approx(1.0)}


def test_metrics_forget_the_clip_before():
    metrics, a, b = fidelity_metrics(), random_frames(), random_frames(seed=1)
    first = fidelity(a, b, metrics)
    fidelity(a, a, metrics)
    assert fidelity(a, b, metrics) == first


def test_flicker_is_the_mean_change():
    frames = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (10, 250, 240)])
    assert flicker(frames) == (240 + 10) / 2
    assert flicker(frames[:1]) == 0


def test_lpips_without_torchvision_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"pip install 'diffusers-draft\[lpips\]'"):
        fidelity_metrics(lpips=True)


@pytest.fixture
def torchvision(monkeypatch):
    """A stand-in with AlexNet's layers and random weights: neither the package nor the weights are needed here."""
    from torch.nn import Conv2d, MaxPool2d, ReLU, Sequential

    def alexnet(weights):
        assert weights == "trained"
        torch.manual_seed(0)
        pool = MaxPool2d(3, 2)
        convolutions = [Conv2d(3, 64, 11, 4, 2), Conv2d(64, 192, 5, padding=2), Conv2d(192, 384, 3, padding=1)]
        convolutions += [Conv2d(384, 256, 3, padding=1), Conv2d(256, 256, 3, padding=1)]
        a, b, c, d, e = convolutions
        layers = [a, ReLU(), pool, b, ReLU(), pool, c, ReLU(), d, ReLU(), e, ReLU(), pool]
        return types.SimpleNamespace(features=Sequential(*layers))

    module = types.ModuleType("torchvision")
    module.__spec__ = ModuleSpec("torchvision", None)
    module.models = types.SimpleNamespace(alexnet=alexnet, AlexNet_Weights=types.SimpleNamespace(DEFAULT="trained"))
    monkeypatch.setitem(sys.modules, "torchvision", module)
    import torchmetrics.functional.image.lpips
    import torchmetrics.image.lpip

    for user in (torchmetrics.functional.image.lpips, torchmetrics.image.lpip):
        monkeypatch.setattr(user, "_TORCHVISION_AVAILABLE", True)
    return module


def test_lpips(torchvision):
    metrics = fidelity_metrics(lpips=True)
    frames = random_frames(9, 80, 96)
    near, far = frames ^ 1, 255 - frames
    found = [fidelity(video, frames, metrics)["lpips"] for video in (frames, near, far)]
    assert found[0] == 0 < found[1] < found[2]


def test_lpips_without_weights_says_where_they_go(torchvision, monkeypatch):
    def fetch(weights):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models, "alexnet", fetch)
    with pytest.raises(
        OSError, match=r"could not be fetched \(no route to host\). Put them in .*checkpoints, or leave"
    ):
        fidelity_metrics(lpips=True)


# --- statistics and tables


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=40))
def test_interval_holds_the_mean_and_lies_within_the_values(values):
    found = estimate(values)
    slack = 1e-9 * max(1, *map(abs, values))
    assert found.mean == pytest.approx(np.mean(values))
    assert min(values) - slack <= found.low <= found.high <= max(values) + slack
    assert found.low - slack <= found.mean + 3 * (found.high - found.low) + slack
    assert estimate(values) == found
    moved = estimate([value + 100 for value in values])
    assert moved.low == pytest.approx(found.low + 100) and moved.high == pytest.approx(found.high + 100)


def test_interval_covers_the_true_mean_as_often_as_it_says():
    generator = np.random.default_rng(0)
    intervals = [estimate(generator.normal(5, 2, 30)) for _ in range(300)]
    covered = np.mean([found.low <= 5 <= found.high for found in intervals])
    assert 0.89 < covered < 0.98
    widths = [found.high - found.low for found in intervals]
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 2 / math.sqrt(30), rel=0.08)


def test_one_prompt_has_no_interval():
    assert estimate([3.0]) == Estimate(3.0, None, None)


def clip(setting, prompt, seed, seconds, warm=True, **more):
    return {"setting": setting, "prompt": prompt, "seed": seed, "seconds": seconds, "warm": warm} | more


def test_prompts_count_the_same_whatever_their_seeds():
    clips = [clip("dense", prompt, seed, 8) for prompt, seed in (("a", 0), ("a", 1), ("b", 0))]
    clips += [clip("s", "a", 0, 4, psnr=10), clip("s", "a", 1, 4, psnr=20), clip("s", "b", 0, 2, psnr=35)]
    dense, sparse = table(clips)
    assert sparse["psnr"].mean == (15 + 35) / 2
    assert sparse["speedup"].mean == (2 + 4) / 2
    assert "psnr" not in dense and "speedup" not in dense


def test_times_leave_the_warm_up_out():
    clips = [clip("dense", p, 0, 8, warm=p != "a") for p in "abc"]
    clips += [clip("s", p, 0, {"a": 100}.get(p, 4), warm=p != "a") for p in "abc"]
    assert table(clips)[1]["seconds"].mean == 4
    assert table(clips)[1]["speedup"].mean == 2
    assert table([c for c in clips if c["prompt"] == "a"])[1]["seconds"].mean == 100


def test_no_times_where_clips_have_none():
    clips = [{k: v for k, v in clip(s, "a", 0, 8, psnr=10).items() if k != "seconds"} for s in ("dense", "s")]
    assert not {"seconds", "speedup"} & set().union(*table(clips))


SHORT = {f"sparsity=0.75,budget=head,tile=8x16,selection={name}" for name in ("local", "oracle")}
"""Baselines of the wide grid that a few clips are missing of."""


@pytest.mark.parametrize("grid", ["wide", "tall", "ragged"])
def test_the_numbers_of_the_study_come_back_from_its_clips(grid, capsys):
    path = Path(__file__).parents[2] / "docs" / "results" / "evaluation" / f"{grid}.json"
    record = json.loads(path.read_text())
    rows = read_results(path)
    assert {row["prompts"] for row in record["rows"] if row["setting"] not in SHORT} == {64}
    assert [row["setting"] for row in rows] == [row["setting"] for row in record["rows"]]
    for row, old in zip(rows, record["rows"], strict=True):
        assert row.keys() == old.keys()
        for column in row.keys() - {"setting", "prompts", "clips"}:
            assert dataclasses.asdict(row[column]) == pytest.approx(old[column])
        if row["setting"] != "dense":
            parse_setting(row["setting"])
            today = row["setting"].replace(",budget=", ",schedule=paper,score=mass,probes=0,budget=")
            assert parse_setting(today).name == today
    assert main(["table", str(path)]) == 0
    assert as_text(rows) in capsys.readouterr().out


def test_text_and_csv_of_a_table():
    rows = [
        {"setting": "dense", "prompts": 2, "seconds": Estimate(4.0, 3.0, 5.0)},
        {
            "setting": "sparsity=0.9",
            "prompts": 1,
            "seconds": Estimate(2.0, None, None),
            "psnr": Estimate(30.123456, 29.0, 31.0),
        },
    ]
    assert as_text(rows).splitlines() == [
        "setting       prompts  seconds  psnr",
        "dense         2        4 ±1",
        "sparsity=0.9  1        2        30.12 ±1",
    ]
    lines = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert lines[1]["psnr"] == "30.123456" and lines[1]["seconds_low"] == "" and lines[0]["seconds_high"] == "5.0"


# --- the folder


def test_keys_depend_on_everything_but_the_order_of_options():
    settings = [None, Setting(), Setting(DraftConfig(budget="head")), Setting(selection="random")]
    keys = {key(p, seed, setting) for p in ("a", "b") for seed in (0, 1) for setting in settings}
    assert len(keys) == 16
    assert key("a", 0, parse_setting("budget=head,sparsity=0.5")) == key(
        "a", 0, parse_setting("sparsity=0.5,budget=head")
    )


def test_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    whole_or_not(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the new one")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"file could not be written: No space left on device"):
        whole_or_not(path, fail)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]

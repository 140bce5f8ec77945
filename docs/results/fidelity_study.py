"""The study of fidelity with the demo's model: the settings, run on a GPU, and what came of them.

Run `python docs/results/fidelity_study.py --output FILE` in a checkout, on a machine with a GPU. Every caption is made
dense and with every setting from the same noise, several captions in one batch; frames of the first two go beside the
file. `diffusers-draft eval` does the same for any model and any options, one clip at a time. Variants of what is no
option can be tried here, as the constants were: how a schedule falls, and the weight of the penalty.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from over_captions import study
from PIL import Image

from diffusers_draft import DraftConfig, enable_draft_attention, schedules
from diffusers_draft.attention import correct
from diffusers_draft.attention.method import Method
from diffusers_draft.attention.ops import Attended, attend
from diffusers_draft.attention.steps.plain import attend_to_valid
from diffusers_draft.patching import schedule
from diffusers_draft.patching.clock import Moment
from diffusers_draft.patching.forward import AttentionCall
from diffusers_draft.tools.demo.model import WEIGHTS
from diffusers_draft.tools.evaluation.metrics import fidelity, fidelity_metrics, flicker
from diffusers_draft.tools.evaluation.settings import Setting
from diffusers_draft.tools.evaluation.study import work
from diffusers_draft.tools.generation.loading import from_pretrained

GRIDS = {"wide": (192, 384), "tall": (384, 192), "ragged": (240, 304)}
"""Height and width in pixels: 9 x 24 x 48, 9 x 48 x 24 and 9 x 30 x 38 tokens."""
FRAMES, GUIDANCE, BATCH = 17, 3.0, 8
FIRST_EDITION: dict[str, Any] = dict(schedule="paper", score="mass", probes=0, tile=(2, 8, 8))


@dataclasses.dataclass(frozen=True)
class Variant:
    """A setting of the study.

    Attributes:
        config: its options.
        power: how a falling schedule falls.
        end: its end relative to the mean, or None for that of its number of steps.
        ridge: weight of the penalty.
        noise: whether the density falls with the noise instead of with the steps.
    """

    config: DraftConfig
    power: float = 3.0
    end: float | None = None
    ridge: float = 0.1
    noise: bool = False

    @property
    def name(self) -> str:
        """The setting's options, and what is not as usual beside them."""
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        changed = {name: getattr(self, name) for name in ("power", "end", "ridge", "noise")}
        others = [f"{name}={value}" for name, value in changed.items() if value != usual[name]]
        return ",".join([Setting(self.config).name, *others])

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Put the constants in force."""
        before = schedules.POWER, schedules.end_of, correct.RIDGE, schedule.share_left
        schedules.POWER, correct.RIDGE = self.power, self.ridge
        if (end := self.end) is not None:
            schedules.end_of = lambda steps: end
        if self.noise:
            schedule.share_left = noise_left
        try:
            yield
        finally:
            schedules.POWER, schedules.end_of, correct.RIDGE, schedule.share_left = before


def noise_left(moment: Moment) -> list[float]:
    """Compute the share of the noise that is left at each step of a run: 1 at the first, 0 at the last."""
    timesteps = moment.timesteps[moment.begin :]
    first, last = timesteps[0], timesteps[-1]
    return [(value - last) / (first - last) if first > last else 1.0 for value in timesteps]


def draft(sparsity: float, **others: Any) -> Variant:
    """Make a setting from its options and variants."""
    own = {name: others.pop(name) for name in ("power", "end", "ridge", "noise") if name in others}
    return Variant(DraftConfig(sparsity=sparsity, **others), **own)


FIRST = draft(0.9, **FIRST_EDITION)
"""The default of the first edition: the line to beat."""
MAIN = [
    FIRST,
    Variant(DraftConfig.paper(0.9)),
    *(draft(sparsity, tile=(4, 4, 8)) for sparsity in (0.59, 0.7, 0.8, 0.84, 0.9)),
    *(draft(sparsity, tile=(2, 8, 8)) for sparsity in (0.59, 0.8, 0.84)),
]
"""What all captions are made with."""
SHORT = [FIRST, *(draft(sparsity, tile=(4, 4, 8)) for sparsity in (0.59, 0.8, 0.84))]
"""What other numbers of steps are tried with."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """Captions that are made together.

    Attributes:
        grid: one of `GRIDS`.
        steps: of the run.
        captions: their texts.
        variants: what they are made with, beside dense.
        pictures: folder for frames of them, or None.
    """

    grid: str
    steps: int
    captions: tuple[str, ...]
    variants: tuple[Variant, ...] = ()
    pictures: Path | None = dataclasses.field(default=None, repr=False)


def batches(captions: list[str]) -> list[tuple[str, ...]]:
    """Put captions together that are made in one batch."""
    return [tuple(captions[start : start + BATCH]) for start in range(0, len(captions), BATCH)]


def units(captions: list[str], pictures: Path) -> list[Unit]:
    """List the work, all grids in turn."""
    found = []
    for number, batch in enumerate(batches(captions)):
        found += [Unit(grid, 14, batch, tuple(MAIN), pictures if number == 0 else None) for grid in GRIDS]
        if number % 2 == 0:
            found += [Unit("wide", steps, batch, tuple(SHORT)) for steps in (4, 8, 30)]
    return found


def run_unit(unit: Unit) -> list[dict[str, Any]]:
    """Make all clips of a unit and compare them with the dense ones."""
    pipe, metrics = tools()
    records = []
    dense = clips_of(pipe, unit)
    shown = {"dense": dense}
    for variant in unit.variants:
        with variant.in_force(), enable_draft_attention(pipe, config=variant.config) as handle:
            clips = clips_of(pipe, unit)
            report = handle.report()
        shown[variant.name] = clips
        common = {"grid": unit.grid, "steps": unit.steps, "setting": variant.name}
        common |= {name: round(value, 5) for name, value in work(None, report).items()}
        if error := report.transformers[0].error:
            common |= {"error_before": round(error.before, 5), "error_after": round(error.after, 5)}
        for caption, clip, other in zip(unit.captions, clips, dense, strict=True):
            measured = fidelity(clip, other, metrics)
            measured["flicker_difference"] = flicker(clip) - flicker(other)
            records.append(common | {"prompt": caption} | {name: round(v, 4) for name, v in measured.items()})
    if unit.pictures:
        records += _true_errors(pipe, unit)
        _show(unit, shown, unit.pictures)
    return records


def tools() -> tuple[Any, Any]:
    """Load the pipeline and the metrics once in every process."""
    global _kept
    if _kept is None:
        from diffusers import WanPipeline

        torch.set_num_threads(1)
        pipe = from_pretrained(WanPipeline, str(WEIGHTS), torch.bfloat16).to("cuda")
        pipe.set_progress_bar_config(disable=True)
        _kept = pipe, fidelity_metrics().to("cuda")
    return _kept


_kept: tuple[Any, Any] | None = None


def clips_of(pipe: Any, unit: Unit) -> list[np.ndarray]:
    """Make the clips of a unit's captions, each from the same noise, as 8-bit RGB."""
    height, width = GRIDS[unit.grid]
    generators = [torch.Generator().manual_seed(0) for _ in unit.captions]
    options: dict[str, Any] = dict(height=height, width=width, num_frames=FRAMES, num_inference_steps=unit.steps)
    video = pipe(
        list(unit.captions), generator=generators, guidance_scale=GUIDANCE, output_type="np", **options
    ).frames
    return [(clip * 255).round().astype(np.uint8) for clip in video]


def _true_errors(pipe: Any, unit: Unit) -> list[dict[str, Any]]:
    """Compare, in every call of a run with the defaults, the measured error with that of all rows."""
    found: list[dict[str, Any]] = []

    def look(seen: AttentionCall) -> Attended:
        result = attend(*seen.arguments)
        before, after, whole = result.squares.tolist()
        if not whole:  # nothing was left out
            return result
        plainly = dataclasses.replace(Method.from_tensor(seen.method), probes=0).to_tensor()
        plain = attend(*seen._replace(method=plainly).arguments).out
        dense = attend_to_valid(seen.query, seen.key, seen.value, seen.kv_len, seen.scale)
        norm = dense.float().norm()
        found.append(
            {
                "grid": unit.grid,
                "layer": seen.path,
                "step": int(seen.numbers[1]),
                "measured": [math.sqrt(before / whole), math.sqrt(after / whole)],
                "true": [((out - dense).float().norm() / norm).item() for out in (plain, result.out)],
            }
        )
        return result

    with enable_draft_attention(pipe) as handle, handle._watched(look):
        clips_of(pipe, unit)
    return found


def _show(unit: Unit, shown: dict[str, list[np.ndarray]], folder: Path) -> None:
    """Write frames of the first captions, a row for each setting."""
    names = ["dense", *(variant.name for variant in (FIRST, *MAIN[2:7]))]
    rows = [
        np.concatenate([clip[frame] for clip in shown[name][:2] for frame in (4, 8, 12)], axis=1) for name in names
    ]
    Image.fromarray(np.concatenate(rows)).save(folder / f"{unit.grid}.png")


def packed(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Put the records of clips together, one entry for each grid, number of steps and setting.

    Returns:
        `settings`, each with `clips`: caption's number, PSNR, SSIM and difference of flicker; and `errors`, the
        measured and the true errors of single calls.
    """
    clips = [record for record in records if "psnr" in record]
    captions = list(dict.fromkeys(clip["prompt"] for clip in clips))
    settings: dict[tuple[str, int, str], dict[str, Any]] = {}
    for clip in clips:
        key = clip["grid"], clip["steps"], clip["setting"]
        entry = settings.setdefault(key, dict(zip(("grid", "steps", "setting"), key, strict=True)) | {"clips": []})
        for name in ("density", "computed", "error_before", "error_after"):
            entry.setdefault(name, []).extend([clip[name]] if name in clip else [])
        values = (round(clip[name], digits) for name, digits in (("psnr", 2), ("ssim", 4), ("flicker_difference", 3)))
        entry["clips"].append([captions.index(clip["prompt"]), *values])
    for entry in settings.values():
        for name in ("density", "computed", "error_before", "error_after"):
            values = entry.pop(name)
            entry |= {name: round(sum(values) / len(values), 5)} if values else {}
    errors = [
        record | {name: [round(value, 5) for value in record[name]] for name in ("measured", "true")}
        for record in records
        if "true" in record
    ]
    return {"settings": list(settings.values()), "errors": errors}


if __name__ == "__main__":
    study(__doc__, captions=64, units=units, run_unit=run_unit, packed=packed)

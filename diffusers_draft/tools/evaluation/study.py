"""A resumable study: every prompt and seed is run dense and with every setting, from the same noise."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from torchmetrics import MetricCollection
from tqdm import tqdm

from ...api import DraftHandle, enable_draft_attention
from ...patching.report import DraftReport
from ..generation.run import Clip, run
from .attention import Samples, measure_attention
from .metrics import fidelity, flicker
from .selection import selecting
from .settings import Setting
from .store import Json, Store


@dataclass
class Study:
    """A comparison of settings with dense attention, and the folder of its results.

    Attributes:
        store: the folder of the results.
        pipeline: makes the pipeline; called once, and not at all if nothing is left to do.
        inputs: makes the keyword arguments of one pipeline call from the pipeline, a prompt and a seed. The same
            seed must give the same noise.
        prompts: the prompts.
        seeds: seeds of the noise.
        settings: the settings to compare with the dense run.
        metrics: from `fidelity_metrics`.
        videos: whether to write every clip as an mp4.
        fps: frames per second of the mp4 files.
    """

    store: Store
    pipeline: Callable[[], Any]
    inputs: Callable[[Any, str, int], Json]
    prompts: Sequence[str]
    seeds: Sequence[int]
    settings: Sequence[Setting]
    metrics: MetricCollection
    videos: bool = True
    fps: float = 16

    def run(self) -> None:
        """Generate and measure every clip that is missing, with a progress bar.

        Raises:
            OSError: if a result cannot be written; earlier results stay.
        """
        clips = [(prompt, seed) for prompt in self.prompts for seed in self.seeds]
        todo = {setting: [clip for clip in clips if not self._is_done(*clip, setting)] for setting in self._all}
        total, left = len(clips) * len(todo), sum(map(len, todo.values()))
        with tqdm(total=total, initial=total - left, unit="clip", desc="eval", smoothing=0) as bar:
            for setting, missing in todo.items():
                if not missing:
                    continue
                bar.set_postfix_str(setting.name if setting else "dense")
                with enabled(self._pipe, setting) as handle:
                    for number, (prompt, seed) in enumerate(missing):
                        self._make(prompt, seed, setting, handle, warm=number > 0)
                        bar.update()

    def measure_attention(self, prompts: int, samples: Samples) -> None:
        """Measure attention calls of dense runs, on the first prompts with the first seed.

        Args:
            prompts: number of prompts.
            samples: the number of calls to sample.
        """
        seed = self.seeds[0]
        for prompt in tqdm(self.prompts[:prompts], unit="prompt", desc="attention"):
            missing = [setting for setting in self.settings if self.store.attention(prompt, seed, setting) is None]
            if missing:
                arguments = self.inputs(self._pipe, prompt, seed)
                for setting, calls in measure_attention(self._pipe, arguments, missing, samples, seed).items():
                    self.store.save_attention(prompt, seed, setting, calls)

    def records(self) -> list[Json]:
        """Read the records of all finished clips, dense ones first."""
        clips = [(p, seed, setting) for setting in self._all for p in self.prompts for seed in self.seeds]
        return [record for clip in clips if (record := self.store.clip(*clip))]

    def attention_records(self) -> list[Json]:
        """Read the measurements of attention calls, one entry for each prompt and setting."""
        found = [
            (p, setting, self.store.attention(p, self.seeds[0], setting))
            for setting in self.settings
            for p in self.prompts
        ]
        return [{"prompt": p, "setting": setting.name, "calls": calls} for p, setting, calls in found if calls]

    def videos_made(self) -> dict[str, list[Path]]:
        """List the mp4 files of every setting, and of `"dense"`."""
        clips = [(prompt, seed) for prompt in self.prompts for seed in self.seeds]
        return {
            setting.name if setting else "dense": [self.store.video(*clip, setting) for clip in clips]
            for setting in self._all
        }

    @property
    def _all(self) -> list[Setting | None]:
        return [None, *self.settings]

    @cached_property
    def _pipe(self) -> Any:
        pipe = self.pipeline()
        pipe.set_progress_bar_config(leave=False, position=1)
        for setting in self.settings:  # one that this model refuses is found before the dense clips
            with enabled(pipe, setting):
                pass
        return pipe

    def _is_done(self, prompt: str, seed: int, setting: Setting | None) -> bool:
        record = self.store.clip(prompt, seed, setting)
        if record is None or (self.videos and not self.store.video(prompt, seed, setting).exists()):
            return False
        if setting is None:  # what is left to do is compared with it
            left = self.store.has_dense_frames(prompt, seed)
            return left or all(self._is_done(prompt, seed, other) for other in self.settings)
        return set(self.metrics.keys()) <= record.keys()

    def _make(self, prompt: str, seed: int, setting: Setting | None, handle: DraftHandle | None, warm: bool) -> None:
        """Generate one clip, compare it with the dense one and store the results."""
        before = handle.report() if handle else None
        with _selecting(handle, setting, seed):
            clip = run(self._pipe, self.inputs(self._pipe, prompt, seed))
        record: Json = {"prompt": prompt, "seed": seed, "setting": setting.name if setting else "dense", "warm": warm}
        record |= {"seconds": clip.denoising_seconds, "flicker": flicker(clip.frames)}
        if setting and handle and before:
            record |= work(before, handle.report()) | self._compare(prompt, seed, clip, record["flicker"])
        else:
            self.store.save_dense_frames(prompt, seed, clip.frames)
        if self.videos:
            from ..generation.video import write_video  # needs ffmpeg, which measuring alone does not

            write_video(clip.frames, self.store.video(prompt, seed, setting), self.fps)
        self.store.save_clip(prompt, seed, setting, record)

    def _compare(self, prompt: str, seed: int, clip: Clip, own_flicker: float) -> Json:
        """Compute fidelity and flicker of a clip against the stored dense clip."""
        dense: np.ndarray | None = self.store.dense_frames(prompt, seed)
        assert dense is not None, "dense runs come first"
        return fidelity(clip.frames, dense, self.metrics) | {"flicker_difference": own_flicker - flicker(dense)}


@contextlib.contextmanager
def enabled(pipe: Any, setting: Setting | None) -> Iterator[DraftHandle | None]:
    """Enable draft attention with a setting while the body runs; do nothing for None."""
    if setting is None:
        yield None
        return
    with enable_draft_attention(pipe, config=setting.config) as handle:
        yield handle


def _selecting(
    handle: DraftHandle | None, setting: Setting | None, seed: int
) -> contextlib.AbstractContextManager[None]:
    """Choose blocks by the setting's selection while the body runs."""
    if handle is None or setting is None or setting.selection == "draft":
        return contextlib.nullcontext()
    return handle._watched(selecting(setting.selection, seed))


def work(before: DraftReport | None, after: DraftReport) -> Json:
    """Compute the density of the latest run's sparse calls, and the share of all block pairs that was computed.

    Both are 1 where there was no call.

    Args:
        before: the report before the run; None if it is the first.
        after: the report behind it.
    """
    total = computed = 0.0
    calls, kept = 0, 0.0
    for number, new in enumerate(after.transformers):
        old = before.transformers[number] if before else None
        sparse = new.sparse_calls - (old.sparse_calls if old else 0)
        dense = sum(new.dense_calls.values()) - (sum(old.dense_calls.values()) if old else 0)
        density = fmean(forward.density for forward in new.run) if new.run else 1.0
        exact_rows = min(1.0, new.config.probes / math.prod(new.grid)) if new.grid else 0.0
        calls += sparse
        kept += sparse * density
        total += sparse + dense
        computed += dense + sparse * min(1.0, density + exact_rows)
    return {"density": kept / calls if calls else 1.0, "computed": computed / total if total else 1.0}

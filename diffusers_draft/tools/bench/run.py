"""Benchmark of whole denoising runs: all layers of a real transformer with random weights, in diffusers' pipeline."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ...api import enable_draft_attention
from ...config import DraftConfig
from .dense import through
from .models import MODELS
from .predict import densities_to_measure, predict
from .shapes import SHAPES
from .step import Step, dense_step, draft_steps

STOCK = "diffusers default"
"""Name of the run with the attention that diffusers chooses."""


@dataclass(frozen=True)
class Run:
    """A measured run.

    Attributes:
        name: dense attention or draft attention, and with what.
        steps: denoising steps of the run.
        step_s: seconds of each step that was timed. Of a dense run a few may do.
        seconds: of all steps; the mean of those that were timed stands for all.
        densities: of the forwards, as measured; None for dense attention.
        config: the settings; None for dense attention.
        memory_gib: peak memory beyond weights and inputs, on a GPU.
        predicted_s: seconds of all steps as predicted from steps of few blocks; None if nothing was predicted.
    """

    name: str
    steps: int
    step_s: list[float]
    seconds: float
    densities: list[float] | None
    config: dict[str, Any] | None
    memory_gib: float
    predicted_s: float | None = None


class Bench:
    """A model in its pipeline, to be run with one attention after the other.

    Args:
        name: key of `MODELS`.
        compiled: whether to compile the repeated blocks.
        device: the device to run on.
    """

    def __init__(self, name: str, *, compiled: bool, device: torch.device) -> None:
        self.name, self.compiled, self.device = name, compiled, device
        self.model = MODELS[name]
        torch.manual_seed(0)
        self.transformer = self.model.make(device, torch.bfloat16)
        self.pipe = self.model.pipeline(self.transformer, self.model.scheduler())
        self.arguments = self.model.arguments(SHAPES[self.model.shape], device, torch.bfloat16)
        if compiled:
            self.transformer.compile_repeated_blocks(fullgraph=True)

    def dense(self, kernel: str | None, steps: int, timed: int) -> Run:
        """Run with a dense kernel of `dense.dense_kernels`, or with what diffusers chooses for None."""
        torch._dynamo.reset()
        with contextlib.ExitStack() as stack:
            if kernel is not None:
                handle = stack.enter_context(enable_draft_attention(self.pipe, dense_layers=()))
                stack.enter_context(handle._watched(through(kernel)))
            self._call(1, "warm-up")
            run = self._timed(STOCK if kernel is None else f"dense {kernel}", timed)
        return replace(run, steps=steps, seconds=steps * fmean(run.step_s))

    def draft(self, name: str, config: DraftConfig, steps: int) -> Run:
        """Run with draft attention; compile and choose kernels before."""
        torch._dynamo.reset()
        self._warm_up(config)
        with enable_draft_attention(self.pipe, config=config) as handle:
            run = self._timed(name, steps)
            report = handle.report()
        print(report)
        forwards = report.transformers[0].run
        return replace(run, densities=[forward.density for forward in forwards], config=asdict(config))

    def predictions(
        self, kernel: str, configs: Sequence[DraftConfig], steps: int, seconds: float
    ) -> Iterator[dict[str, float]]:
        """Predict runs from steps of few blocks, as `bench model` does."""
        inputs = self.model.inputs(SHAPES[self.model.shape], self.device, torch.bfloat16)
        how = self.compiled, seconds
        dense = dense_step(kernel, self.transformer, self.model, inputs, *how)
        for config in configs:
            densities = densities_to_measure(self.name, config, steps)
            drafts: list[Step] = list(draft_steps(self.transformer, self.model, inputs, config, densities, *how))
            yield predict(self.name, config, [dense, *drafts], steps)

    def _warm_up(self, config: DraftConfig) -> None:
        """Run a sparse step, and a dense one if there will be any: both have graphs of their own."""
        sometimes_dense = config.schedule == "paper" or config.dense_steps or config.dense_timestep is not None
        for dense_steps in (0.0, 1.0) if sometimes_dense else (0.0,):
            with enable_draft_attention(self.pipe, config=replace(config, dense_steps=dense_steps)):
                self._call(1, "warm-up")

    def _timed(self, name: str, steps: int) -> Run:
        """Run the pipeline and note when each step ends."""
        ends: list[float] = []

        def note(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
            self._wait()
            ends.append(time.perf_counter())
            return {}

        before = self._memory()
        begin = time.perf_counter()
        latents = self._call(steps, name, callback_on_step_end=note)
        if not latents.isfinite().all():
            raise RuntimeError(
                f"The latents of the run {name!r} are not finite: nothing that it took time for counts."
            )
        step_s = [end - start for start, end in zip([begin, *ends], ends, strict=False)]
        return Run(name, steps, step_s, sum(step_s), None, None, self._memory(peak=True) - before)

    def _call(self, steps: int, name: str, **options: Any) -> Tensor:
        self.pipe.set_progress_bar_config(desc=name)
        return self.pipe(**self.arguments, num_inference_steps=steps, output_type="latent", **options).frames

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _memory(self, peak: bool = False) -> float:
        """Read allocated memory in GiB, or its peak since the last reading; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0.0
        self._wait()
        read = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return read / 2**30

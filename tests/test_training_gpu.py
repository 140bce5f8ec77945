"""A look at the training on a GPU before it takes long."""

import time
from typing import Any

import pytest
import torch

from diffusers_draft.training.architecture import untrained_pipeline
from diffusers_draft.training.autoencoder import autoencoder_phase
from diffusers_draft.training.flow import flow_phase

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),
]


def test_all_stages_at_full_size(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing fails and nothing is too large; prints how long a step takes."""
    pipe: Any = untrained_pipeline(0).to("cuda")
    pipe.transformer.compile_repeated_blocks(dynamic=True)
    phases = {"autoencoder": (autoencoder_phase(pipe.vae, 1, 0, 1_500_000), [0.0])}
    phases["flow"] = (flow_phase(pipe, 1, 0, 125_000), [0.1, 0.25, 0.4, 0.6, 0.99])
    for name, (phase, shares) in phases.items():
        for share in shares:
            torch.cuda.reset_peak_memory_stats()
            for number in range(24):
                if number == 12:  # every grid has been compiled for
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                loss = phase.step(number, share)
                loss.backward()
            assert torch.isfinite(loss)
            torch.cuda.synchronize()
            took, memory = (time.perf_counter() - start) / 12, torch.cuda.max_memory_allocated() / 2**30
            with capsys.disabled():
                print(f"\n{name} at {share}: {1e3 * took:.0f} ms a step, {memory:.1f} GiB")
            assert memory < 60

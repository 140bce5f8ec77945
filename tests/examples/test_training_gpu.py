"""A look at the training on a GPU before it takes long."""

import time

import pytest
import torch

from examples.training.architecture import untrained_pipeline
from examples.training.autoencoder import autoencoder_phase
from examples.training.flow import flow_phase

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),
]


def test_all_stages_at_full_size(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing fails and nothing is too large; prints how long a step takes."""
    pipe = untrained_pipeline(0).to("cuda")
    pipe.transformer.compile_repeated_blocks(dynamic=True)
    phases = (autoencoder_phase(pipe.vae, 1, 0, pixels=3_000_000), flow_phase(pipe, 1, 0, tokens=60_000))
    for phase, shares in zip(phases, ([0.0], [0.1, 0.25, 0.4, 0.6, 0.99]), strict=True):
        for share in shares:
            torch.cuda.reset_peak_memory_stats()
            for number in range(24):
                if number == 12:  # every grid has been compiled
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                loss = phase.loss(*phase.batch(number, share))
                loss.backward()
            assert torch.isfinite(loss)
            torch.cuda.synchronize()
            took, memory = (time.perf_counter() - start) / 12, torch.cuda.max_memory_allocated() / 2**30
            with capsys.disabled():
                print(f"\n{phase.name} at {share}: {1e3 * took:.0f} ms a step, {memory:.1f} GiB")
            assert memory < 60

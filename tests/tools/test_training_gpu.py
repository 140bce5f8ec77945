"""A look at the training on a GPU before it takes long."""

import time
from typing import Any

import pytest
import torch

from diffusers_draft.training.architecture import untrained_pipeline
from diffusers_draft.training.autoencoder import autoencoder_phase
from diffusers_draft.training.flow import flow_phase
from diffusers_draft.training.gradients import Gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),
]


@pytest.fixture
def phases() -> Any:
    """Makes the two phases for batches of some pixels and tokens."""
    pipe: Any = untrained_pipeline(0).to("cuda")
    pipe.transformer.compile_repeated_blocks(dynamic=True)
    return lambda pixels, tokens: (autoencoder_phase(pipe.vae, 1, 0, pixels), flow_phase(pipe, 1, 0, tokens))


def test_recorded_gradients_are_those_of_autograd(phases: Any) -> None:
    """Of other inputs than the recorded ones, after all shapes have been recorded."""
    for phase in phases(100_000, 2_000):
        parameters = [p for module in phase.modules.values() for p in module.parameters() if p.requires_grad]
        gradients = Gradients(phase.loss, parameters)
        for number in range(3):  # one of each shape
            gradients(*phase.batch(number, 0.0))
        for number in range(3, 9):
            inputs = phase.batch(number, 0.0)
            torch.manual_seed(number)
            expected_loss = phase.loss(*inputs)
            expected = torch.autograd.grad(expected_loss, parameters, allow_unused=True)
            torch.manual_seed(number)
            torch.testing.assert_close(gradients(*inputs), expected_loss.detach(), rtol=2e-2, atol=0)
            found = torch.cat([p.grad.flatten() for p in parameters])  # type: ignore[union-attr]
            flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, expected, strict=True)]
            whole = torch.cat([gradient.flatten() for gradient in flat])
            assert (found - whole).norm() < 0.05 * whole.norm(), phase.name


def test_all_stages_at_full_size(phases: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing fails and nothing is too large; prints how long a step takes."""
    for phase, shares in zip(phases(3_000_000, 60_000), ([0.0], [0.1, 0.25, 0.4, 0.6, 0.99]), strict=True):
        parameters = [parameter for module in phase.modules.values() for parameter in module.parameters()]
        gradients = Gradients(phase.loss, parameters)
        for share in shares:
            torch.cuda.reset_peak_memory_stats()
            for number in range(24):
                if number == 12:  # every grid has been recorded
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                loss = gradients(*phase.batch(number, share))
            assert torch.isfinite(loss)
            torch.cuda.synchronize()
            took, memory = (time.perf_counter() - start) / 12, torch.cuda.max_memory_allocated() / 2**30
            with capsys.disabled():
                print(f"\n{phase.name} at {share}: {1e3 * took:.0f} ms a step, {memory:.1f} GiB")
            assert memory < 60

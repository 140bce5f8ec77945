"""The defaults on a GPU: value score, probes and correction, fused, against the plain steps, and without a wait."""

import pytest
import torch
from oracle import error
from test_gpu import DEVICE, FUSED_BACKENDS, need, no_waiting, pytestmark, tensors

from diffusers_draft import draft_attention
from diffusers_draft.attention.method import Method
from diffusers_draft.attention.ops import attend

__all__ = ["pytestmark"]

GRID, TEXT = (5, 30, 52), 77


@pytest.mark.parametrize("budget", ["head", "row"])
@pytest.mark.parametrize("backend", ["auto", *FUSED_BACKENDS])
def test_a_corrected_call_never_waits_for_the_device(backend, budget):
    if backend != "auto":
        need(backend)
    query, key, value = tensors(2, 5 * 30 * 52 + TEXT, 3, 128, torch.bfloat16)
    lengths = torch.tensor([5 * 30 * 52 + TEXT, 5 * 30 * 52 + 5], device=DEVICE)
    how = torch.tensor([*GRID, 0]), lengths, torch.tensor([0.7, 3], dtype=torch.float64)
    method = Method(budget=budget, backend=backend).to_tensor()
    first = attend(query, key, value, *how, method)  # compiles, probes, builds the index tensors
    with no_waiting():
        again = attend(query, key, value, *how, method)
    torch.testing.assert_close(again.out, first.out)
    assert again.squares[0] > again.squares[1] > 0


@pytest.mark.parametrize("tile", [(8, 16), (2, 8, 8), (4, 4, 8)], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_fused_steps_correct_as_plain_ones(backend, padded, tile):
    """Values share a mean and queries look for keys like themselves, so that there is something to correct."""
    need(backend)
    seq_len = 5 * 30 * 52 + TEXT
    query, key, value = tensors(2, seq_len, 3, 128, torch.bfloat16)
    key, value = (1.5 * query + key).bfloat16(), (query + 0.5 * value + 1).bfloat16()
    lengths = torch.tensor([seq_len, seq_len - 50], device=DEVICE) if padded else None
    if padded:
        key[1, -50:] = value[1, -50:] = float("nan")
    options = dict(grid=GRID, sparsity=0.7, tile=tile)
    found = draft_attention(query, key, value, kv_len=lengths, backend=backend, **options)
    on_cpu = [tensor.float().cpu() for tensor in (query, key, value)]
    expected = draft_attention(*on_cpu, kv_len=None if lengths is None else lengths.cpu(), **options)
    without = draft_attention(*on_cpu, kv_len=None if lengths is None else lengths.cpu(), probes=0, **options)
    assert error(found.cpu(), expected.double()) < 2e-2 < error(without, expected.double())

"""Gradients of a loss, on a GPU from a recording: small models are thousands of kernels too short for the CPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BEFORE_RECORDING = 2
"""Runs in which code is compiled and algorithms are chosen."""


class Gradients:
    """Computes a loss and, into `.grad` of the parameters, its gradients.

    On a GPU they are recorded as a CUDA graph for each combination of input shapes, and then replayed.

    Args:
        loss: of some tensors; the same kernels for the same shapes.
        parameters: what it depends on.
    """

    def __init__(self, loss: Callable[..., Tensor], parameters: Sequence[nn.Parameter]) -> None:
        self._loss = loss
        self._all = [torch.zeros_like(parameter) for parameter in parameters]
        for parameter, gradient in zip(parameters, self._all, strict=True):
            parameter.grad = gradient
        self._recordings: dict[tuple[torch.Size, ...], _Recording] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Returns the loss, detached; gradients of calls before are gone."""
        if not inputs[0].is_cuda:
            return self._run(inputs)
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self._recordings:
            self._recordings[shapes] = self._record(inputs)
        recording = self._recordings[shapes]
        for own, new in zip(recording.inputs, inputs, strict=True):
            own.copy_(new)
        recording.graph.replay()
        return recording.loss.clone()

    def _record(self, inputs: Sequence[Tensor]) -> "_Recording":
        own = [tensor.clone() for tensor in inputs]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(BEFORE_RECORDING):
                self._run(own)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # One at a time is replayed, so that all can use the same memory.
        memory = next((recording.graph.pool() for recording in self._recordings.values()), None)
        with torch.cuda.graph(graph, pool=memory):
            loss = self._run(own)
        return _Recording(graph, own, loss)

    def _run(self, inputs: Sequence[Tensor]) -> Tensor:
        torch._foreach_zero_(self._all)
        loss = self._loss(*inputs)
        loss.backward()
        return loss.detach()


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: Sequence[Tensor]
    loss: Tensor

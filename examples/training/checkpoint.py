"""The checkpoint of a training phase: everything that is needed to resume it, in one file."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from diffusers_draft import __version__
from diffusers_draft.tools.generation.files import whole_or_not


@dataclass
class Progress:
    """Progress of a phase.

    Attributes:
        steps: number of finished steps.
        seconds: time that they took.
        losses: the loss curve: `(step, mean loss since the entry before)`.
    """

    steps: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Checkpoint:
    """A checkpoint file and the objects whose state it stores.

    Attributes:
        path: path of the file.
        modules: the modules that are trained, by name.
        optimizers: optimizers of their parameters.
        average: moving average of their weights.
        progress: progress of the phase.
    """

    path: Path
    modules: dict[str, nn.Module]
    optimizers: Sequence[torch.optim.Optimizer]
    average: EMAModel
    progress: Progress

    def save(self) -> None:
        """Write the state of all objects to the file, atomically.

        Raises:
            OSError: if the file cannot be written; the checkpoint from before is unchanged.
        """
        states: dict[str, Any] = {name: module.state_dict() for name, module in self.modules.items()}
        states["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        states["average"] = self.average.state_dict()
        content = io.BytesIO()  # torch.save to a file raises no OSError when the disk is full
        torch.save({"version": __version__, "progress": vars(self.progress), **states}, content)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole_or_not(self.path, lambda file: file.write(content.getbuffer()))

    def load(self, device: torch.device) -> None:
        """Read the state of all objects from the file; do nothing if there is no file.

        Args:
            device: the device to load tensors on.

        Raises:
            ValueError: if the file was written by another version.
        """
        if not self.path.exists():
            return
        content = torch.load(self.path, map_location=device, weights_only=True)
        if content["version"] != __version__:
            raise ValueError(
                f"{self.path} is from another version of diffusers-draft. Remove it, or use that version."
            )
        vars(self.progress).update(content["progress"])
        for name, module in self.modules.items():
            module.load_state_dict(content[name])
        for optimizer, state in zip(self.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.average.load_state_dict(content["average"])
        self.average.to(device)

"""The checkpoint of a training phase: all that it needs to go on, in one file."""

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
    """How far a phase is.

    Attributes:
        steps: made.
        seconds: that they took.
        losses: `(step, mean loss since the entry before)` of the loss curve.
    """

    steps: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Checkpoint:
    """The file, and what it holds.

    Attributes:
        path: of the file.
        modules: what is trained, by name.
        optimizers: of its parameters.
        average: of its weights.
        progress: of the phase.
    """

    path: Path
    modules: dict[str, nn.Module]
    optimizers: Sequence[torch.optim.Optimizer]
    average: EMAModel
    progress: Progress

    def save(self) -> None:
        """Write everything, whole or not at all.

        Raises:
            OSError: if it cannot be written; the checkpoint from before is still there.
        """
        states: dict[str, Any] = {name: module.state_dict() for name, module in self.modules.items()}
        states["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        states["average"] = self.average.state_dict()
        content = io.BytesIO()  # a full disk is an OSError only for Python's own files
        torch.save({"version": __version__, "progress": vars(self.progress), **states}, content)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole_or_not(self.path, lambda file: file.write(content.getbuffer()))

    def load(self, device: torch.device) -> None:
        """Read everything back; do nothing if there is no file.

        Args:
            device: for what is read.

        Raises:
            ValueError: if the file is another version's.
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

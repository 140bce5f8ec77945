"""The loop of a training phase, which lasts a given time and can be stopped and resumed."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from .checkpoint import Checkpoint, Progress

WARM_UP = 300
"""Number of steps in which the learning rate rises."""
COOL_DOWN = 0.4
"""Share of the time, at its end, in which the learning rate falls to zero."""
LOG_EVERY = 20
"""Number of steps between entries of the loss curve; the loop waits for the device only there."""


@dataclass
class Phase:
    """What one phase trains, and how.

    Attributes:
        name: name of the phase and its checkpoint.
        minutes: length in all, including earlier runs that it resumes.
        modules: the modules that are trained, by name.
        learning_rate: the highest learning rate.
        batch: makes the tensors of a step, from the step's number and the share of the time that has passed.
        loss: computes the loss of those tensors.
        matrices: parameters that Muon trains, all of two dimensions; AdamW trains the others.
    """

    name: str
    minutes: float
    modules: dict[str, nn.Module]
    learning_rate: float
    batch: Callable[[int, float], tuple[Tensor, ...]]
    loss: Callable[..., Tensor]
    matrices: Sequence[nn.Parameter] = ()


def train(phase: Phase, folder: Path, save_every: float = 15.0) -> Progress:
    """Train until the phase's time is over, then set its modules to the moving average of their weights.

    Args:
        phase: the phase to train or resume.
        folder: the folder of its checkpoint.
        save_every: seconds between checkpoints.

    Raises:
        ValueError: if the loss is not finite, or the checkpoint was written by another version.
        OSError: if a checkpoint cannot be written.
    """
    parameters = [parameter for module in phase.modules.values() for parameter in module.parameters()]
    optimizers = _optimizers(parameters, phase.matrices)
    average = EMAModel(parameters, decay=0.999, use_ema_warmup=True, inv_gamma=10.0, power=0.75, foreach=True)
    progress = Progress()
    checkpoint = Checkpoint(folder / f"{phase.name}.pt", phase.modules, optimizers, average, progress)
    checkpoint.load(parameters[0].device)
    with tqdm(total=round(60 * phase.minutes), initial=round(progress.seconds), unit="s", desc=phase.name) as bar:
        recent: list[Tensor] = []
        last = saved = time.perf_counter()
        while (share := progress.seconds / (60 * phase.minutes)) < 1:
            rate = min(1.0, (progress.steps + 1) / WARM_UP, (1 - share) / COOL_DOWN)
            for group in itertools.chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
                group["lr"] = phase.learning_rate * rate
            loss = phase.loss(*phase.batch(progress.steps, share))
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            average.step(parameters)
            progress.steps += 1
            recent.append(loss.detach())
            now = time.perf_counter()
            progress.seconds += now - last
            last = now
            if progress.steps % LOG_EVERY == 0:
                progress.losses.append((progress.steps, _mean(recent, phase.name, progress.steps)))
                recent = []
                bar.update(min(round(progress.seconds), bar.total) - bar.n)
                bar.set_postfix_str(f"step {progress.steps}, loss {progress.losses[-1][1]:.4f}")
                if now - saved > save_every:
                    checkpoint.save()
                    saved = now
    checkpoint.save()
    average.copy_to(parameters)
    return progress


def _optimizers(parameters: Sequence[nn.Parameter], matrices: Sequence[nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Make Muon for the matrices, if there are any, and AdamW for all other parameters."""
    for_muon = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in parameters if id(parameter) not in for_muon]
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    if not matrices:
        return [adamw]
    # Scale Muon's updates to the size of AdamW's, so that one learning rate and one decay fit both.
    return [adamw, torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")]


def _mean(losses: list[Tensor], name: str, steps: int) -> float:
    """Compute the mean loss; raise ValueError if it is not finite."""
    mean = torch.stack(losses).mean().item()
    if not mean < float("inf"):
        raise ValueError(f"The loss of {name} is {mean} after {steps} steps. Try a lower learning rate.")
    return mean

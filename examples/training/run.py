"""The whole training of the demo's model: autoencoder, statistics of latents, flow, and the saved pipeline."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin

from diffusers_draft.tools.generation.loading import Model, device, from_pretrained, load

from .architecture import untrained_pipeline
from .autoencoder import autoencoder_phase, measure_latents, reconstruction_psnr
from .card import write_card
from .flow import flow_phase
from .loop import train

FOR_AUTOENCODER = 0.15
MOST_FOR_AUTOENCODER = 2.1
"""Share of the time for the autoencoder, and its limit in minutes: after two it is good enough."""
MODEL = "model"
"""Name of the finished pipeline's folder, in the folder of the training."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Options of a training.

    Attributes:
        minutes: length of the training, on any device.
        seed: seed of weights, clips and noise.
        tokens: tokens of one batch of the transformer.
        pixels: pixels of one batch of the autoencoder, in all frames together.
    """

    minutes: float
    seed: int
    tokens: int
    pixels: int


def run(training: Training, folder: Path) -> Path:
    """Train, or resume the training that was stopped in this folder, and save the pipeline with its card.

    Args:
        training: options of the training.
        folder: the folder for checkpoints and results.

    Returns:
        The folder of the pipeline, in bfloat16.

    Raises:
        OSError: if something cannot be written.
        ValueError: if the loss is not finite or the checkpoints do not fit.
    """
    where = device()
    pipe: Any = untrained_pipeline(training.seed)
    pipe.to(where)
    if where.type == "cuda":
        torch.set_float32_matmul_precision("high")
        pipe.transformer.compile_repeated_blocks(dynamic=True)  # grids and captions change
    minutes = min(training.minutes * FOR_AUTOENCODER, MOST_FOR_AUTOENCODER)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):  # worth its search, as clips have few sizes
        learned = {"autoencoder": train(autoencoder_phase(pipe.vae, minutes, training.seed, training.pixels), folder)}
    measure_latents(pipe.vae, training.seed)
    psnr = reconstruction_psnr(pipe.vae, training.seed)
    print(f"The autoencoder gives clips back with a PSNR of {psnr:.1f} dB.")
    minutes = training.minutes - minutes
    learned["flow"] = train(flow_phase(pipe, minutes, training.seed, training.tokens), folder)
    save_in_bfloat16(pipe, folder / MODEL)
    write_card(folder / MODEL, load(Model(name=str(folder / MODEL))), training, learned, psnr)
    return folder / MODEL


def save_in_bfloat16(pipe: Any, folder: Path) -> None:
    """Save a pipeline with weights in bfloat16, except those that diffusers keeps in float32."""
    with tempfile.TemporaryDirectory() as exact:
        pipe.save_pretrained(exact)
        rounded = from_pretrained(type(pipe), exact, torch.bfloat16)
    for part in (rounded, *rounded.components.values()):
        if isinstance(part, ConfigMixin):
            part.register_to_config(_name_or_path="")  # the temporary folder does not belong in it
    rounded.save_pretrained(folder)
    # transformers 5 has a new name for the tokenizer's class, which older ones do not know; it knows the old one too.
    for name in ("model_index.json", "tokenizer/tokenizer_config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("TokenizersBackend", "PreTrainedTokenizerFast"))

"""Loading of a supported diffusers pipeline, by hub id or folder."""

import inspect
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

from ...families import families, family_of
from ..catalogue import CATALOGUE

Offload = Literal["none", "model", "sequential"]

FLOAT32_COMPONENTS = ("AutoencoderKLWan", "CLIPVisionModel")
"""Classes of small components that lose quality below float32, as their model cards say."""
ALSO_NEEDED = {
    "LTXImageToVideoPipeline": "image",
    "LTX2ImageToVideoPipeline": "image",
    "LTX2DFRTemporalRefinePipeline": "video",
    "CosmosVideoToWorldPipeline": "image",
    "Cosmos2VideoToWorldPipeline": "image",
}
"""What a pipeline starts from, where it makes nothing from a text alone and its signature does not say so."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model to load, and how it is kept in memory.

    Attributes:
        name: hub id or folder.
        dtype: dtype of weights and computation; by default bfloat16, float32 on a CPU.
        offload: `"model"` keeps one component at a time on the accelerator, `"sequential"` one layer.
        fp8: whether to store the transformers' weights in float8 and compute in `dtype` (layerwise casting).
        compile: whether to compile the transformers' repeated blocks.
        vae_tiling: whether to decode the video in tiles.
    """

    name: str
    dtype: torch.dtype | None = None
    offload: Offload = "none"
    fp8: bool = False
    compile: bool = False
    vae_tiling: bool = False


def device() -> torch.device:
    """Get this process's accelerator if there is one, else the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device(found.type, torch.accelerator.current_device_index()) if found else torch.device("cpu")


def dtype_of(model: Model) -> torch.dtype:
    """Get the dtype that a model computes in on this machine."""
    return model.dtype or (torch.float32 if device().type == "cpu" else torch.bfloat16)


def supported_pipelines() -> list[str]:
    """List the names of supported pipelines whose call makes a video from text, or from text and an image."""
    names = dict.fromkeys(name for row in CATALOGUE.values() for name in row.pipelines if hasattr(diffusers, name))
    return [
        name
        for name in names
        if "num_frames" in call_parameters(getattr(diffusers, name)) and _needed(name) <= {"prompt", "image"}
    ]


def _needed(name: str) -> set[str]:
    """List the arguments that a pipeline cannot do without."""
    parameters = list(call_parameters(getattr(diffusers, name)).values())[1:]  # but for self
    needed = {each.name for each in parameters if each.default is each.empty and each.kind is not each.VAR_KEYWORD}
    return needed | ({ALSO_NEEDED[name]} if name in ALSO_NEEDED else set())


def transformers(pipe: Any) -> list[Any]:
    """List the transformers of a pipeline that draft attention supports."""
    modules = [component for component in pipe.components.values() if isinstance(component, nn.Module)]
    return [module for module in modules if family_of(module)]


def call_parameters(pipeline: type) -> dict[str, inspect.Parameter]:
    """Get the parameters of a pipeline class's call, by name."""
    return dict(inspect.signature(pipeline.__call__).parameters)


def load(model: Model, *, with_image: bool = False, prepare: Callable[[Any], None] = lambda pipe: None) -> Any:
    """Load a pipeline and move it to the device, or set up offloading.

    Args:
        model: what to load.
        with_image: whether the pipeline will be called with an image.
        prepare: gets the pipeline before it is offloaded or moved, to split it over GPUs.

    Returns:
        A diffusers pipeline.

    Raises:
        OSError: if the model is not found or cannot be read.
        ValueError: if its pipeline is not supported, or there is no accelerator to offload from.
    """
    where = device()
    if model.offload != "none" and where.type == "cpu":
        raise ValueError(f"Offloading ({model.offload}) needs an accelerator such as CUDA, and there is none.")
    dtype = dtype_of(model)
    index = _index(model.name)
    chosen = pipeline_class(index, with_image)
    if model.compile:
        _check_compiles(index)
    exact = [name for name, entry in index.items() if isinstance(entry, list) and entry[1] in FLOAT32_COMPONENTS]
    dtypes = {"default": dtype} | dict.fromkeys(exact, torch.float32)
    pipe = from_pretrained(chosen, model.name, dtypes)
    for transformer in transformers(pipe):
        if model.fp8:
            transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
        if model.compile:
            transformer.compile_repeated_blocks(fullgraph=True)
    if model.vae_tiling:
        pipe.vae.enable_tiling()
    prepare(pipe)
    if model.offload == "model":
        pipe.enable_model_cpu_offload(device=where)
    elif model.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=where)
    else:
        pipe.to(where)
    return pipe


def from_pretrained(pipeline: Any, name: str, dtype: torch.dtype | dict[str, torch.dtype]) -> Any:
    """Load a pipeline with weights of the given dtypes, except those that diffusers keeps in float32."""
    with warnings.catch_warnings():
        # The oldest supported diffusers has only the old name of this argument.
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        return pipeline.from_pretrained(name, torch_dtype=dtype)


def pipeline_class(index: dict[str, Any], with_image: bool) -> Any:
    """Choose the pipeline class for the content of a `model_index.json`.

    Raises:
        ValueError: if the pipeline is not supported, takes no image but one is given, or needs one.
    """
    name, supported = index.get("_class_name"), supported_pipelines()
    if name not in supported:
        raise ValueError(f"The model is a {name}. Supported are {', '.join(supported)}.")
    if with_image and index.get("expand_timesteps") and name == "WanPipeline":
        name = "WanImageToVideoPipeline"  # Wan 2.2 5B makes videos from text and from images
    takers = [other for other in supported if "image" in call_parameters(getattr(diffusers, other))]
    if with_image and name not in takers:
        raise ValueError(f"{name} takes no image. Pipelines that do: {', '.join(takers)}.")
    if not with_image and "image" in _needed(name):
        raise ValueError(f"{name} makes a video from an image and needs one.")
    return getattr(diffusers, name)


def _check_compiles(index: dict[str, Any]) -> None:
    """Raise ValueError for a transformer of which diffusers does not say what to compile."""
    names = [entry[1] for entry in index.values() if isinstance(entry, list)]
    for name in families().keys() & set(names):
        if not getattr(diffusers, name)._repeated_blocks:
            raise ValueError(f"diffusers compiles no repeated blocks of a {name}. Leave --compile out.")


def _index(name: str) -> dict[str, Any]:
    """Read the `model_index.json` of a model."""
    if not Path(name).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise FileNotFoundError(f"{name!r} is neither a folder nor a hub id of the form owner/name.")
    return dict(DiffusionPipeline.load_config(name))

"""Draft attention over several GPUs: diffusers' context parallelism with plans that are exact."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..families.family import Family, Refusal, Split, parameter_names
from .attachment import attachment_of, check_not_running
from .context_parallel import check_config, context_parallel
from .processors import attention_module
from .splitting import Splitting, splitting_of
from .targets import known_transformers, layer_paths


def enable_parallelism(pipe: Any, *, config: Any) -> None:
    """Split the video of every forward over GPUs (Ulysses), with diffusers' own engine.

    As the method `enable_parallelism` of diffusers' models, for all transformers of a pipeline and with a plan for
    families for which diffusers has none; their texts stay whole on every GPU. Call it in every process of a group,
    with the same model and later the same inputs; each gets the whole output. Draft attention can be enabled before
    or after.

    Args:
        pipe: a diffusers pipeline or transformer.
        config: `diffusers.ContextParallelConfig(ulysses_degree=...)`.

    Raises:
        TypeError: if `pipe` has no transformer that draft attention knows, or `config` is another one.
        NotImplementedError: for ring attention, and for families that cannot be split; the message says why.
        ValueError: if the GPUs cannot share the heads, there are not `ulysses_degree` processes, or the model's config
            cannot be split.
        RuntimeError: if torch.distributed is not initialized, or the transformer is split already, offloaded already
            or running.
    """
    from diffusers import ContextParallelConfig
    from diffusers.models._modeling_parallel import ParallelConfig

    config = context_parallel(config) or config
    if not isinstance(config, ContextParallelConfig):
        raise TypeError(
            f"config must be a ContextParallelConfig, as in ContextParallelConfig(ulysses_degree=2), got "
            f"{type(config).__name__}."
        )
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "torch.distributed is not initialized. Start the script with torchrun and call "
            "torch.distributed.init_process_group() first."
        )
    mesh = getattr(config, "mesh", None)
    if mesh is None and config.ulysses_degree * config.ring_degree != dist.get_world_size():
        raise ValueError(
            f"ulysses_degree={config.ulysses_degree}, but there are {dist.get_world_size()} processes. Start as many, "
            "or give the config the mesh of those that share a model."
        )
    found = known_transformers(pipe)
    splits = {name: _check(transformer, family, config) for name, (transformer, family) in found.items()}

    parallel = ParallelConfig(context_parallel_config=config)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    mesh = mesh or dist.device_mesh.init_device_mesh(
        device.type, config.mesh_shape, mesh_dim_names=config.mesh_dim_names
    )
    parallel.setup(dist.get_rank(), dist.get_world_size(), device, mesh=mesh)
    begun = []
    try:
        for name, (transformer, family) in found.items():
            begun.append((transformer, family, splits[name]))
            _split(transformer, family, splits[name], parallel)
    except BaseException:
        for transformer, family, split in begun:
            _undo(transformer, family, split)
        raise


def _check(transformer: Any, family: Family, config: Any) -> Split:
    """Refuse what cannot be split, before anything is."""
    if isinstance(family.split, Refusal):
        raise NotImplementedError(f"{family.name} cannot be split over GPUs: {family.split.reason}.")
    check_not_running(transformer)
    if transformer._parallel_config is not None:
        raise RuntimeError(f"This {type(transformer).__name__} is split over GPUs already.")
    if any(hasattr(module, "_hf_hook") for module in transformer.modules()):
        raise RuntimeError(
            f"This {type(transformer).__name__} is offloaded already, and accelerate would remove the hooks that "
            "split it. Split it first, then offload it."
        )
    family.split.check(transformer.config)
    for path in _exchanging(transformer, family, family.split):
        check_config(config, attention_module(transformer, path).heads)
    return family.split


def _exchanging(transformer: nn.Module, family: Family, split: Split) -> tuple[str, ...]:
    """List the layers whose keys are split."""
    return layer_paths(transformer, (*family.layers, *split.others))


def _split(transformer: Any, family: Family, split: Split, parallel: Any) -> None:
    # Not the model's own `enable_parallelism`: it would have layers exchange whose keys are whole on every rank, and
    # it needs an accelerator.
    from diffusers.hooks.context_parallel import apply_context_parallel

    with _without_draft_attention(transformer):
        _tell_layers(transformer, family, split, parallel)
        apply_context_parallel(transformer, parallel.context_parallel_config, split.plan(transformer.config))
        _prepare_for_compile(transformer)
        Splitting(transformer, family, layer_paths(transformer, family.layers))


def _undo(transformer: Any, family: Family, split: Split) -> None:
    """Take back as much as there is of a split."""
    from diffusers.hooks.context_parallel import remove_context_parallel

    with _without_draft_attention(transformer):
        if splitting := splitting_of(transformer):
            splitting.remove()
        remove_context_parallel(transformer, split.plan(transformer.config))
        _tell_layers(transformer, family, split, None)


def _tell_layers(transformer: Any, family: Family, split: Split, parallel: Any) -> None:
    for path in _exchanging(transformer, family, split):
        attention_module(transformer, path).processor._parallel_config = parallel
    transformer._parallel_config = parallel


@contextlib.contextmanager
def _without_draft_attention(transformer: nn.Module) -> Iterator[None]:
    """Take draft attention out for a while: splits lie below it."""
    attachment = attachment_of(transformer)
    if attachment:
        attachment.detach()
    try:
        yield
    finally:
        if attachment:
            attachment.attach()


def _prepare_for_compile(transformer: nn.Module) -> None:
    """Keep diffusers' hooks from what `torch.compile` refuses: reading signatures at first, and warnings."""
    from diffusers.hooks.context_parallel import ContextParallelSplitHook

    for module in transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for hook in registry.hooks.values() if registry else ():
            if isinstance(hook, ContextParallelSplitHook):
                at = {name: index for index, name in enumerate(parameter_names(type(module).forward))}
                hook.module_forward_metadata.cached_parameter_indices = at
                hook._prepare_cp_input = functools.partial(_share, hook._prepare_cp_input)


def _share(share: Callable[[Tensor, Any], Tensor], tensor: Tensor, plan: Any) -> Tensor:
    """Get this rank's part of a tensor, if it has the dimensions that the plan speaks of; else all of it."""
    return share(tensor, plan) if tensor.dim() == plan.expected_dims else tensor

"""What in a pipeline draft attention goes into: its transformers, and their layers; refuses the rest."""

from typing import Any

import diffusers
from diffusers.utils.torch_utils import is_compiled_module
from torch import nn

from ..config import DraftConfig
from ..families import families, family_of
from ..families.family import Family
from ..families.unsupported import reason_against
from .processors import attention_module, processors_of
from .shadow import can_be_patched, stock_class
from .splitting import check_layers


def known_transformers(pipe: Any) -> dict[str, tuple[nn.Module, Family]]:
    """Find the known transformers in a pipeline, or the one that was given, by component name.

    Raises:
        TypeError: if there is none; the message lists those that are known, or says why one cannot be or what to do.
    """
    components = {"transformer": pipe} if isinstance(pipe, nn.Module) else getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise TypeError(
            f"Expected a diffusers pipeline or transformer, got {type(pipe).__name__}. Load one, as in "
            "WanPipeline.from_pretrained(...), and give that."
        )
    modules = {
        name: _unwrapped(component) for name, component in components.items() if isinstance(component, nn.Module)
    }
    found: dict[str, tuple[nn.Module, Family]] = {}
    for name, module in modules.items():
        family = family_of(module)
        if family and all(module is not other for other, _ in found.values()):
            found[name] = (module, family)
    if not found:
        raise TypeError(_none_found(pipe, components, modules))
    return found


def _unwrapped(module: Any) -> nn.Module:
    """Get the model in wrappers that call it as a module, so that its hooks run."""
    while True:
        if is_compiled_module(module):
            module = module._orig_mod
        elif isinstance(module, nn.parallel.DistributedDataParallel):
            module = module.module
        elif type(module).__name__ == "PeftModel":  # those for one task and of mixed adapters run no hooks inside
            module = module.get_base_model()
        else:
            return module


def _none_found(pipe: Any, components: dict[str, Any], modules: dict[str, nn.Module]) -> str:
    """Say why nothing in a pipeline can be patched, and what to do."""
    for module in modules.values():
        if reason := reason_against(module):
            return f"Draft attention does not apply to {type(module).__name__}: {reason}."
        if inner := next(filter(family_of, module.modules()), None):
            wrapper, wrapped = type(module).__name__, type(inner).__name__
            return (
                f"Draft attention does not know the wrapper {wrapper}. Give it the {wrapped} inside, in the wrapper's "
                "place or before it is wrapped."
            )
    missing = [name for name, component in components.items() if component is None and "transformer" in name]
    names = [type(module).__name__ for name, module in modules.items() if "transformer" in name]
    if missing and not names and hasattr(pipe, "load_components"):
        return f"The {missing[0]} of this {type(pipe).__name__} is not loaded. Call its load_components() first."
    return (
        f"Draft attention does not know {', '.join(names) or type(pipe).__name__}. It knows {', '.join(families())}."
    )


def choose_layers(
    transformer: nn.Module, family: Family, config: DraftConfig
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """List module paths of the layers to make sparse, and of those that stay dense.

    Raises:
        ValueError: for a layer that does not exist, a processor that is not diffusers' own, or a hook that draft
            attention would silence.
        NotImplementedError: for a split over GPUs that draft attention cannot follow.
    """
    paths = layer_paths(transformer, family.layers)
    if config.dense_layers is None:
        dense = set(family.dense_layers) if config.schedule == "paper" else set()
    else:
        wrong = [index for index in config.dense_layers if index >= len(paths)]
        if wrong:
            raise ValueError(f"dense_layers has {wrong}, but {type(transformer).__name__} has {len(paths)} layers.")
        dense = {paths[index] for index in config.dense_layers}
    processors = processors_of(transformer, paths)
    for path, processor in processors.items():
        if not _is_stock(processor, family):
            raise ValueError(
                f"Layer {path} of {type(transformer).__name__} has the processor {type(processor).__name__}, but "
                f"draft attention needs diffusers' own {' or '.join(family.processors)}. Undo what replaced it first."
            )
        if not can_be_patched(stock_class(processor), family):
            raise ValueError(
                f"The code of {type(processor).__name__} in diffusers {diffusers.__version__} ends in no attention "
                "call that draft attention knows. Use a version of diffusers that it was tested with."
            )
    check_layers(transformer, family, processors)
    sparse = tuple(path for path in paths if path not in dense)
    for path in sparse:
        if _looks_for_stock_call(attention_module(transformer, path)):
            raise ValueError(
                f"Layer {path} of {type(transformer).__name__} has a hook of perturbed attention guidance "
                "(skip_attention_scores), which would do nothing to draft attention. Remove the hook, or leave the "
                "layer dense with dense_layers."
            )
    return sparse, tuple(path for path in paths if path in dense)


def layer_paths(transformer: nn.Module, patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Spell patterns out: `"blocks.*.attn1"` -> `"blocks.0.attn1"`, `"blocks.1.attn1"`, ..."""
    found = []
    for blocks, layer in (pattern.split(".*.") for pattern in patterns):
        found += [f"{blocks}.{name}.{layer}" for name, _ in transformer.get_submodule(blocks).named_children()]
    return tuple(found)


def _looks_for_stock_call(layer: nn.Module) -> bool:
    """Return True for a layer with a hook of diffusers that replaces the stock attention call while the layer runs."""
    registry = getattr(layer, "_diffusers_hook", None)
    hooks = registry.hooks.values() if registry else ()
    return any(getattr(hook, "skip_attention_scores", False) for hook in hooks)


def _is_stock(processor: Any, family: Family) -> bool:
    stock = stock_class(processor)
    return stock.__module__.startswith("diffusers.") and stock.__name__ in family.processors

"""Whether and how a transformer's forward is split over GPUs by diffusers' context parallelism."""

import copy
import math
from typing import Any

import torch
from torch import nn

from ..families.family import Family, Inputs, Refusal, VideoTokens, inputs_of
from .context_parallel import check_config, check_tokens, context_parallel
from .forward import Forward
from .processors import PatchedLayers, attention_module, processors_of
from .records import LayerRecord
from .shadow import DraftProcessor, Shadow


class Splitting:
    """The forward pre-hook of a transformer that `enable_parallelism` has split.

    Its layers exchange with ours also where they are dense: diffusers' own exchange would mix up a text that stays
    whole on every GPU, and takes no masks in older versions.
    """

    def __init__(self, transformer: nn.Module, family: Family, paths: tuple[str, ...]) -> None:
        self.family = family
        shadow = Shadow(family)
        self.forward = shadow.forward
        records = {path: LayerRecord(path) for path in paths}
        self.layers = PatchedLayers(transformer, processors_of(transformer, paths), shadow, records)
        self.layers.put()
        self._hook = transformer.register_forward_pre_hook(self, with_kwargs=True)

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check that the ranks can share this forward's tokens, before anything is computed."""
        inputs = inputs_of(module, args, kwargs)
        video = self.family.video(inputs, module.config)
        share(self.forward, module, self.family, {}, inputs, video)
        present = self.layers.present().items()
        if replaced := [path for path, processor in present if not isinstance(processor, DraftProcessor)]:
            raise RuntimeError(
                f"{len(replaced)} attention layers of this {type(module).__name__} no longer exchange tokens with the "
                f"other GPUs: something replaced their processors, such as that of {replaced[0]}, after the model was "
                "split. Undo that, or do it before the model is split."
            )

    def __reduce__(self) -> Any:
        raise TypeError("A model that is split over GPUs cannot be copied or pickled. Copy it before it is split.")

    def remove(self) -> None:
        """Restore the processors, and forget the forward."""
        self._hook.remove()
        self.layers.take_back()


def splitting_of(transformer: nn.Module) -> Splitting | None:
    hooks = transformer._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, Splitting)), None)


def originals_of(transformer: nn.Module, paths: tuple[str, ...]) -> dict[str, Any]:
    """Get the processors that draft attention goes on top of, by module path: diffusers' own, or those of a split.

    A processor of ours that somebody kept and put back counts as the stock one that it stands for.
    """
    splitting = splitting_of(transformer)
    ours = splitting.layers.processors if splitting else {}
    found = processors_of(transformer, paths)
    for path, processor in found.items():
        if isinstance(processor, DraftProcessor) and processor is not ours.get(path):
            found[path] = copy.copy(processor)
    return found


def check_layers(transformer: nn.Module, family: Family, processors: dict[str, Any]) -> Any:
    """Refuse a split that draft attention cannot follow.

    Args:
        transformer: of a known family.
        family: this one.
        processors: of its video self-attention, by module path.

    Returns:
        diffusers' `ContextParallelConfig`, or None if nothing is split.

    Raises:
        NotImplementedError: for a family or a kind of context parallelism that draft attention does not support.
        ValueError: if the ranks cannot share the heads.
    """
    configs = {
        path: context_parallel(getattr(processor, "_parallel_config", None)) for path, processor in processors.items()
    }
    path, config = next(((path, config) for path, config in configs.items() if config), ("", None))
    config = config or context_parallel(getattr(transformer, "_parallel_config", None))
    if config is None:
        return None
    if isinstance(family.split, Refusal):
        reason = family.split.reason
        raise NotImplementedError(f"Draft attention cannot be split over GPUs for {family.name}: {reason}.")
    if path:
        check_config(config, attention_module(transformer, path).heads)
    if family.split.whole_text and not splitting_of(transformer):
        raise NotImplementedError(
            f"The way that {family.name} is split over GPUs is not one that draft attention knows. Split it with "
            "diffusers_draft.enable_parallelism(pipe, config=...), which is exact with padded text."
        )
    return config


def share(
    forward: Forward,
    transformer: nn.Module,
    family: Family,
    processors: dict[str, Any],
    inputs: Inputs,
    video: VideoTokens,
) -> None:
    """Tell a forward's layers what the ranks share; refuse what they cannot share equally, and as `check_layers`.

    Raises:
        ValueError: names grids that would fit.
    """
    config = check_layers(transformer, family, processors)
    if config is None or isinstance(family.split, Refusal):
        forward.shared = forward.ranks = None
        return
    states = inputs["hidden_states"]
    tokens = math.prod(video.grid) if states.dim() > 3 else states.shape[1]  # packed latents come with their others
    check_tokens(tokens, video.grid, config.ulysses_degree)
    # Compiled code would be tied to a number, but takes any length.
    forward.shared = torch.empty(tokens, dtype=torch.uint8, device="meta")
    forward.whole_text = family.split.whole_text
    forward.ranks = config._ulysses_mesh.get_group()

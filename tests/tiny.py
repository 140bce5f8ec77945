"""What the tests of all families share: tiny models of random weights, and a way into their attention."""

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from diffusers_draft.patching.shadow import DraftProcessor

Grid = tuple[int, int, int]
Inputs = dict[str, Any]

RAGGED: Grid = (3, 13, 17)
"""Five full blocks and a rest, no multiple of the tile in any direction."""
TEXT_SLOTS = 12
FLOAT32_ERROR = 2e-6


def error(found: Tensor, expected: Tensor) -> float:
    """Relative error by norm."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def build(cls: type[nn.Module], config: dict[str, Any], seed: int = 0) -> Any:
    """Makes a model of random weights whose attention is peaked enough for a skipped block to show."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls(**config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("norm_q.weight"):
                parameter.data.fill_(3.0)
            elif name.endswith(("to_v.weight", "add_v_proj.weight", "scale_shift_table")):
                parameter.data.mul_(4.0)
    return model


def build_open(cls: type[nn.Module], config: dict[str, Any]) -> Any:
    """As `build`, and what begins at zero does not: gates and modulations would hide the attention."""
    model = build(cls, config)
    for seed, parameter in enumerate(model.parameters()):
        if not parameter.any():
            parameter.data.copy_(0.1 * random(*parameter.shape, seed=seed))
    return model


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def latents(channels: int, batch: int, grid: Grid) -> Tensor:
    frames, rows, columns = grid
    return random(batch, channels, frames, 2 * rows, 2 * columns)


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A family's tiny model.

    Attributes:
        build: makes it.
        inputs: makes keyword arguments of a forward from the batch size, the grid in tokens and the timestep.
        layers: paths of its video self-attention in execution order.
        dense_layers: paths of the layers that draft attention leaves dense by default.
        dense_timestep: the threshold that draft attention has for it by default.
        prefix: tokens in front of the video.
        tolerance: of its outputs in float32.
        lengths: valid keys of each sample, from the inputs and the sequence length, where text is padded.
    """

    build: Callable[[], Any]
    inputs: Callable[..., Inputs]
    layers: tuple[str, ...]
    dense_layers: tuple[str, ...]
    dense_timestep: float = math.inf
    prefix: int = 0
    tolerance: float = FLOAT32_ERROR
    lengths: Callable[[Inputs, int], Tensor | None] = lambda inputs, seq_len: None


def family(
    cls: str,
    config: dict[str, Any],
    inputs: Callable[..., Inputs],
    layers: dict[str, int],
    case: str = "",
    builder: Callable[..., Any] = build_open,
    **options: Any,
) -> dict[str, Tiny]:
    """One entry of a table, or none where the installed diffusers is older than the class.

    Args:
        cls: name of the transformer class in diffusers.
        config: of the tiny model.
        inputs: as `Tiny` has them.
        layers: paths of its layers with `*` for the index, and how many there are.
        case: what is special.
        builder: makes the model from class and config.
        **options: other attributes of `Tiny`; if no dense layers are among them, the first one stays dense.
    """
    if not hasattr(diffusers, cls):
        return {}
    paths = tuple(pattern.replace("*", str(index)) for pattern, count in layers.items() for index in range(count))
    make = functools.partial(builder, getattr(diffusers, cls), config)
    tiny = Tiny(**dict(build=make, inputs=inputs, layers=paths, dense_layers=paths[:1]) | options)
    return {f"{cls}{case}": tiny}


def processors(model: nn.Module) -> dict[str, Any]:
    """Every attention processor of a model by module path."""
    return {path: module.processor for path, module in model.named_modules() if hasattr(module, "processor")}


def patched(model: nn.Module) -> list[str]:
    """Paths of the layers whose processor is not diffusers' own."""
    return [path for path, processor in processors(model).items() if isinstance(processor, DraftProcessor)]


def forward(model: nn.Module, inputs: Inputs) -> Tensor:
    """The output of a model for video, of whatever form."""
    with torch.no_grad():
        output = model(**inputs)
    found = next(iter(output.values()))
    return found if isinstance(found, Tensor) else torch.stack(found, dim=1)


@contextlib.contextmanager
def attention_replaced(model: nn.Module, paths: tuple[str, ...], attend: Callable[..., Tensor]) -> Iterator[list[str]]:
    """Runs `attend(query, key, value)` instead of the attention in the given layers of an unpatched model.

    Shares nothing with draft attention's own way in. Yields the paths of the layers as they run.
    """
    ran: list[str] = []
    current: list[str] = []
    handles = []
    for path in paths:
        module = model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(lambda module, args, path=path: current.append(path)))
        handles.append(module.register_forward_hook(lambda module, args, output: current.clear()))
    upstream = {sys.modules[type(model.get_submodule(path).processor).__module__] for path in paths}

    def dispatch_of(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def dispatch(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
            if not current:
                return stock(query, key, value, **kwargs)
            ran.append(current[0])
            return attend(query, key, value)

        return dispatch

    def sdpa_of(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def sdpa(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
            if not current:
                return stock(query, key, value, **kwargs)
            path = current.pop()  # `attend` itself may come through here
            ran.append(path)
            out = attend(*(tensor.transpose(1, 2) for tensor in (query, key, value))).transpose(1, 2)
            current.append(path)
            return out

        return sdpa

    def way_in(module: ModuleType) -> tuple[Any, str, Callable[..., Tensor]]:
        """Where the attention call of a module is, and what to put there."""
        if hasattr(module, "dispatch_attention_fn"):
            return module, "dispatch_attention_fn", dispatch_of(module.dispatch_attention_fn)
        functional = nn.functional
        return functional, "scaled_dot_product_attention", sdpa_of(functional.scaled_dot_product_attention)

    ways = [way_in(module) for module in upstream]
    stocks = [(owner, name, getattr(owner, name)) for owner, name, _ in ways]
    try:
        for owner, name, ours in ways:
            setattr(owner, name, ours)
        yield ran
    finally:
        for owner, name, stock in stocks:
            setattr(owner, name, stock)
        for handle in handles:
            handle.remove()


class Loop:
    """The least that has components and a scheduler, for tests that run their own denoising loop."""

    def __init__(self, scheduler: Any, **components: Any) -> None:
        self.components = components
        self.scheduler = scheduler

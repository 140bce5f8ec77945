"""Attention layers of a transformer whose processors make their attention call with ours."""

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from ..families import Family
from .processors import Dispatch, DraftProcessor, patched_class


def attention_module(transformer: nn.Module, path: str) -> Any:
    """The attention layer at a module path; it has a `processor`."""
    return transformer.get_submodule(path)


def processors_of(transformer: nn.Module, paths: Iterable[str]) -> dict[str, Any]:
    """The processors that layers have now, by module path."""
    return {path: attention_module(transformer, path).processor for path in paths}


class PatchedLayers:
    """Processors in place of those that some layers have.

    Args:
        transformer: whose layers these are.
        originals: the processors that they have, by module path.
        state: what forwards leave for the layers.
        family: the transformer's.
        dispatch: makes our attention call; takes the one to make where ours does not apply.

    Attributes:
        originals: as given.
        processors: ours, by module path.
    """

    def __init__(
        self,
        transformer: nn.Module,
        originals: dict[str, Any],
        state: Any,
        family: Family,
        dispatch: Callable[[Dispatch], Dispatch],
    ) -> None:
        self.originals = originals
        stocks = {path: stock_class(original) for path, original in originals.items()}
        patched: dict[type, Any] = {
            stock: patched_class(stock, state, family, dispatch) for stock in dict.fromkeys(stocks.values())
        }
        self._shadows = {module.__name__: module for cls in patched.values() for module in cls.shadows}
        self.processors = {path: patched[stocks[path]].wrapping(originals[path]) for path in stocks}
        self._transformer = weakref.ref(transformer)
        self._modules = {path: weakref.ref(attention_module(transformer, path)) for path in originals}
        self._forget: weakref.finalize | None = None

    def put(self) -> None:
        """Puts the processors in place."""
        transformer = self._transformer()
        assert transformer is not None, "the transformer is held by the caller"
        # In `sys.modules` because `torch.compile` looks up a function's globals by module name.
        sys.modules.update(self._shadows)
        self._forget = weakref.finalize(transformer, _drop_modules, list(self._shadows))
        for path, module in self._there():
            module.processor = self.processors[path]

    def take_back(self) -> None:
        """Restores every processor that is still replaced by ours. Harmless when done twice."""
        # `fuse_qkv_projections` keeps the processors it replaces, and `unfuse_qkv_projections` puts them back.
        kept = getattr(self._transformer(), "original_attn_processors", None) or {}
        for path, module in self._there():
            ours, name = self.processors[path], f"{path}.processor"
            if module.processor is ours:
                module.processor = ours.unwrapped(self.originals[path])
            if name in kept and kept[name] is ours:
                kept[name] = ours.unwrapped(self.originals[path])
        if self._forget is not None:
            self._forget()

    def replaced(self) -> list[Any]:
        """Processors that somebody else has put in the place of ours since."""
        return [found for path, found in self.present().items() if found is not self.processors[path]]

    def present(self) -> dict[str, Any]:
        """The processors that those layers have now that still exist, by module path."""
        return {path: module.processor for path, module in self._there()}

    def _there(self) -> Iterator[tuple[str, Any]]:
        """The layers that still exist."""
        for path, reference in self._modules.items():
            if module := reference():
                yield path, module


def stock_class(processor: Any) -> type:
    """The diffusers class of a processor, or the one that ours stands in for."""
    return processor._stock if isinstance(processor, DraftProcessor) else type(processor)


def _drop_modules(names: list[str]) -> None:
    for name in names:
        sys.modules.pop(name, None)

"""Puts our processors in the place of stock ones, and takes them back."""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from .records import LayerRecord
from .shadow import Shadow, stock_class


def attention_module(transformer: nn.Module, path: str) -> Any:
    """Get the attention layer at a module path; it has a `processor`."""
    return transformer.get_submodule(path)


def processors_of(transformer: nn.Module, paths: Iterable[str]) -> dict[str, Any]:
    """Get the processors that layers have now, by module path."""
    return {path: attention_module(transformer, path).processor for path in paths}


class PatchedLayers:
    """Processors in place of those that some layers have.

    Args:
        transformer: whose layers these are.
        originals: the processors that they have, by module path.
        shadow: makes the classes of ours.
        records: of each layer, by module path.

    Attributes:
        originals: as given.
        processors: ours, by module path.
    """

    def __init__(
        self, transformer: nn.Module, originals: dict[str, Any], shadow: Shadow, records: dict[str, LayerRecord]
    ) -> None:
        self.originals = originals
        self._shadow = shadow
        self.processors = {
            path: shadow.class_for(stock_class(original)).wrapping(original, records[path])
            for path, original in originals.items()
        }
        self._transformer = weakref.ref(transformer)
        self._modules = {path: weakref.ref(attention_module(transformer, path)) for path in originals}
        self._in_place = False

    def put(self) -> None:
        """Put the processors in place."""
        transformer = self._transformer()
        assert transformer is not None, "the transformer is held by the caller"
        self._shadow.show(transformer)
        self._in_place = True
        for path, module in self._there():
            module.processor = self.processors[path]

    def take_back(self) -> None:
        """Restore every processor that is still replaced by ours. Harmless when done twice."""
        if not self._in_place:
            return
        self._in_place = False
        # `fuse_qkv_projections` keeps the processors it replaces, and `unfuse_qkv_projections` puts them back.
        kept = getattr(self._transformer(), "original_attn_processors", None) or {}
        for path, module in self._there():
            ours, name = self.processors[path], f"{path}.processor"
            if module.processor is ours:
                module.processor = ours.unwrapped(self.originals[path])
            if name in kept and kept[name] is ours:
                kept[name] = ours.unwrapped(self.originals[path])
        self._shadow.hide()

    def modules(self) -> list[Any]:
        """List those layers that still exist."""
        return [module for _, module in self._there()]

    def replaced(self) -> list[Any]:
        """List the processors that somebody else has put in the place of ours since."""
        return [found for path, found in self.present().items() if found is not self.processors[path]]

    def present(self) -> dict[str, Any]:
        """Get the processors that those layers have now that still exist, by module path."""
        return {path: module.processor for path, module in self._there()}

    def _there(self) -> Iterator[tuple[str, Any]]:
        """Go through the layers that still exist."""
        for path, reference in self._modules.items():
            if module := reference():
                yield path, module

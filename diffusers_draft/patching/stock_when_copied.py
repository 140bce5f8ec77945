"""Hooks that stay behind when a module is copied."""

import contextlib
from typing import Any


class StockWhenCopied:
    """A module's hook that copies and pickles of the module do not have."""

    def __reduce__(self) -> Any:
        # A copy or a pickle of a patched transformer is a stock transformer, with a hook from the standard library
        # that takes three arguments and does nothing.
        return (getattr, (contextlib.nullcontext(), "__exit__"))

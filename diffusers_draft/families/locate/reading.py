"""What must be read from a tensor's values, once for each tensor."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


def read_once(read: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """Remembers the result as long as the tensor lives and nobody writes into it.

    Reading waits for the GPU, and most pipelines keep their masks and coordinates for a whole run. Tensors of
    inference mode do not know of writes.
    """
    found: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    @functools.wraps(read)
    def reading(tensor: Tensor) -> Any:
        version = None if tensor.is_inference() else tensor._version
        if tensor not in found or found[tensor][0] != version:
            found[tensor] = version, read(tensor)
        return found[tensor][1]

    return reading

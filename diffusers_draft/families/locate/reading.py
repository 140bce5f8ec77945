"""Cache of results that are read from the values of a tensor."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


def read_once(read: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """Cache the result of a function of one tensor, until the tensor is freed or written to.

    Reading waits for the GPU, and most pipelines keep their masks and coordinates for a whole run. Inference tensors
    have no version counter, so writes to them are not noticed.
    """
    found: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    @functools.wraps(read)
    def reading(tensor: Tensor) -> Any:
        if tensor.device.type == "meta":
            raise ValueError(
                "Draft attention reads masks and coordinates to find the video, and on the meta device an input has "
                "no values. Disable it for forwards of shapes alone."
            )
        version = None if tensor.is_inference() else tensor._version
        if tensor not in found or found[tensor][0] != version:
            found[tensor] = version, read(tensor)
        return found[tensor][1]

    return reading

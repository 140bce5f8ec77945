"""Can a backend that was asked for by name run here?"""

import torch

from ..attention import kernels
from ..attention.method import Method
from . import CommandError, one_line


def check_runs(method: Method, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Check that a backend asked for by name can run calls of a kind.

    Raises:
        CommandError: if its package is missing, or it refuses the device, the dtype or the sizes.
    """
    if method.backend == "auto":
        return
    with one_line(ImportError):
        refusal = getattr(kernels.load(method.backend), "refusal", None)
    if refusal and (reason := refusal(device, dtype, head_dim, method.block)):
        raise CommandError(f"Backend {method.backend!r} {reason}. Choose another backend, or 'auto'.")

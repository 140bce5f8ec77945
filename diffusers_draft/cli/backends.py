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
        reason = kernels.refusal(method.backend, device, dtype, head_dim, method.block)
    if reason:
        raise CommandError(f"Backend {method.backend!r} {reason}. Choose another backend, or 'auto'.")

"""Does the pipeline still have the transformers that were patched?"""

import warnings
from typing import Any

from torch import nn

from .attachment import Attachment, attachment_of

Components = dict[str, nn.Module]
"""Modules that a pipeline has now, by name."""


def components_of(pipe: Any) -> Components | None:
    """List the modules that a pipeline has now; None for a transformer alone, or where the pipeline is gone."""
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        return None
    return {name: module for name, module in components.items() if isinstance(module, nn.Module)}


def warn_of_dense_components(components: Components | None, attachments: dict[str, Attachment]) -> None:
    """Warn of transformers in the pipeline that run dense in the place of patched ones; without any, nothing does."""
    for name, attachment in attachments.items():
        found = (components or {}).get(name)
        if not attachment.attached or found is None or is_in(components, attachment):
            continue
        if not any(map(attachment_of, found.modules())):
            warnings.warn(
                f"The pipeline's {name} was replaced since draft attention was enabled, and the one that it has now, "
                f"{type(found).__name__}, runs dense. Enable draft attention again.",
                stacklevel=3,
            )


def is_in(components: Components | None, attachment: Attachment) -> bool:
    """Return True if a transformer is still in its pipeline, maybe wrapped, or has none."""
    if components is None:
        return True
    transformer = attachment.transformer()
    return any(module is transformer for component in components.values() for module in component.modules())

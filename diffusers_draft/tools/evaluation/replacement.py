"""What attends in draft attention's place (`dispatch.attending`), for measurements and baselines."""

from typing import Any

import torch
from torch import Tensor

from ...attention import kernels
from ...attention.layout import token_layout
from ...attention.steps import plain
from ...config import DraftConfig
from ...patching.dispatch import Attend
from .selection import SELECTIONS, Call, chosen


def ordered_call(
    query: Tensor, key: Tensor, geometry: Tensor, kv_len: Tensor | None, config: DraftConfig, scale: float | None,
    generator: torch.Generator,
) -> Call:  # fmt: skip
    """Puts an attention call in block order; the arguments are those of `attend`."""
    frames, rows, columns, prefix = geometry.tolist()
    layout = token_layout((frames, rows, columns), prefix, query.shape[1], config.tile, query.device)
    return Call(
        query=plain.order(query, layout, average=False)[0],
        key=plain.order(key, layout, average=False)[0],
        grid=(frames, rows, columns),
        prefix=prefix,
        layout=layout,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        kv_len=kv_len,
        tile=config.tile,
        generator=generator,
    )


def attend_with(selection: str, seed: int) -> Attend:
    """Draft attention with its choice of blocks made by one of `SELECTIONS`.

    For `dispatch.attending`, in a model that is not compiled.

    Args:
        selection: its name.
        seed: of what is random in it.
    """
    generator = torch.Generator().manual_seed(seed)

    def attend(
        query: Tensor, key: Tensor, value: Tensor, geometry: Tensor, kv_len: Tensor | None, config: Any, scale: Any
    ) -> tuple[Tensor, Tensor]:
        call = ordered_call(query, key, geometry, kv_len, config, scale, generator)
        mask = chosen(SELECTIONS[selection](call), call, config)
        kernel = kernels.choose(config.backend, query.device, query.dtype, query.shape[-1], call.layout.block)
        value, _ = plain.order(value, call.layout, average=False)
        out = kernel.forward(call.query, call.key, value, mask, call.scale)
        return plain.restore(out, call.layout), mask.kv_num_blocks

    return attend

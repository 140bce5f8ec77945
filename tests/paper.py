"""Draft attention with the paper's schedule and score and without correction: what is dense under the selected mask.

Most tests look at one thing at a time with it; tests of the schedule, the score and the correction use the defaults.
"""

from typing import Any

from torch import Tensor

import diffusers_draft
from diffusers_draft import DraftHandle

PAPER: dict[str, Any] = dict(schedule="paper", score="mass", probes=0)


def enable_draft_attention(pipe: Any, sparsity: float = 0.9, **options: Any) -> DraftHandle:
    if "config" in options:
        given = {} if sparsity == 0.9 else dict(sparsity=sparsity)
        return diffusers_draft.enable_draft_attention(pipe, **given, **options)
    return diffusers_draft.enable_draft_attention(pipe, sparsity, **PAPER | options)


def draft_attention(*tensors: Any, sparsity: float = 0.9, **options: Any) -> Tensor:
    return diffusers_draft.draft_attention(*tensors, sparsity=sparsity, **dict(score="mass", probes=0) | options)

"""Ulysses: ranks that each hold some tokens of all heads exchange them for all tokens of some heads, and back."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from ..call import needs_grad
from ..ops import Attended, in_autocast_dtype
from .operators import attend_over_ranks, to_heads, to_tokens


class Exchange:
    """One attention call's way from tokens split over ranks to heads split over ranks.

    Args:
        group: the ranks, in the order of their tokens.
        shared: tokens of the whole sequence that the ranks share.
        whole_text: whether every rank has other tokens behind its own, the same ones.
    """

    def __init__(self, group: dist.ProcessGroup, shared: int, whole_text: bool = False) -> None:
        self.group = group
        self.size = group.size()
        self.shared = shared
        self.whole_text = whole_text

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Exchange three `(B, S on this rank, H, D)` to three `(B, S, H / ranks, D)`: the same heads of each.

        Raises:
            NotImplementedError: if a gradient is needed.
            RuntimeError: if this rank does not have its share of the tokens.
        """
        whole = to_heads(query, key, value, self.group.group_name, self._tokens(query, key, value))
        return [tensor.transpose(0, 1) for tensor in whole]

    def to_tokens(self, out: Tensor) -> Tensor:
        """Exchange `(B, S, H / ranks, D)` for `(B, S on this rank, H, D)`."""
        return to_tokens(out, self.group.group_name, self.size, self.shared // self.size)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        geometry: Tensor,
        kv_len: Tensor | None,
        numbers: Tensor,
        method: Tensor,
        scale: float | None = None,
    ) -> Attended:
        """Run `ops.attend` on this rank's tokens; pairs and facts are of its heads.

        It equals `to_heads`, `attend` and `to_tokens`, but some heads attend while others are on their way.

        Raises:
            NotImplementedError: if a gradient is needed.
            RuntimeError: if this rank does not have its share of the tokens.
        """
        query, key, value = in_autocast_dtype(query, key, value)
        where = self.group.group_name, self._tokens(query, key, value)
        return Attended(*attend_over_ranks(query, key, value, *where, geometry, kv_len, numbers, method, scale))

    def whole_mask(self, mask: Tensor | None, seq_len: int) -> Tensor | None:
        """Make the mask of a call as it must be for the whole sequence of `seq_len` tokens.

        Raises:
            NotImplementedError: if it does not speak of the whole sequence.
        """
        if mask is None or mask.shape[-1] == seq_len:
            return mask
        if not self.whole_text or mask.shape[-2] > 1 or mask.dtype != torch.bool:
            raise NotImplementedError(
                f"A mask of shape {tuple(mask.shape)} does not fit the whole sequence of {seq_len} tokens. Draft "
                "attention cannot split this kind of input over GPUs."
            )
        behind = seq_len - self.shared
        return functional.pad(mask[..., mask.shape[-1] - behind :], (self.shared, 0), value=True)

    def _tokens(self, *tensors: Tensor) -> list[int]:
        """Count the tokens that each rank sends; raises what `to_heads` raises."""
        if needs_grad(*tensors):
            raise NotImplementedError("No gradients flow between GPUs yet: run the transformer under torch.no_grad().")
        split = self.shared // self.size
        here = tensors[0].shape[1]
        behind = here - split
        if behind < 0 or (behind > 0 and not self.whole_text):
            raise RuntimeError(
                f"A GPU has {here} tokens, but its share of {self.shared} tokens is {split}: something "
                "removed diffusers' hooks that split the model's inputs. Split the model before it is offloaded."
            )
        # The last rank sends what is behind the video: it arrives in its place, and nobody has to put it there.
        return [split] * (self.size - 1) + [split + behind]

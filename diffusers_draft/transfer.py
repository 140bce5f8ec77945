"""What `ulysses.Exchange` sends: every part goes straight to its place, and a rank's own part is not sent.

Point to point, because torch's functional collectives return what came in tensors of their own, which would be copied
once more, and pass a rank's own part through the communication kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

WORD = torch.int64


@dataclass(frozen=True)
class Underway:
    """A tensor that is being received.

    Attributes:
        tensor: not to be read before `wait`.
        operations: hold the tensors that are sent, which must live until then.
        works: what to wait for.
    """

    tensor: Tensor
    operations: list[dist.P2POp]
    works: list[dist.Work]

    def wait(self) -> Tensor:
        """What came."""
        for work in self.works:
            work.wait()
        return self.tensor


def start_to_heads(
    query: Tensor, key: Tensor, value: Tensor, ranks: dist.ProcessGroup, tokens: list[int], part: slice = slice(None)
) -> Underway:
    """Sends all tokens of each rank's heads to it.

    Args:
        query: `(B, S on this rank or more, H, D)`.
        key: as `query`.
        value: as `query`.
        ranks: the process group.
        tokens: how many come from each rank.
        part: of each rank's heads.

    Returns:
        `(3, S, B, heads of the part, D)`.
    """
    parts = [
        tensor[:, : tokens[ranks.rank()]].unflatten(2, (len(tokens), -1))[:, :, :, part]
        for tensor in (query, key, value)
    ]
    batch, _, _, heads, head_dim = parts[0].shape
    whole = query.new_empty(3, sum(tokens), batch, heads, head_dim)
    underway = Underway(whole, [], [])
    # One after the other: while the query is on its way, the key is made ready.
    for tensor, received in zip(parts, whole, strict=True):
        _swap(ranks, tensor.permute(2, 1, 0, 3, 4).unbind(), received.split(tokens), underway)
    return underway


def start_to_tokens(out: Tensor, ranks: dist.ProcessGroup, split: int) -> Underway:
    """Sends each rank its tokens of this rank's heads.

    Args:
        out: `(B, S, heads, D)`.
        ranks: the process group.
        split: tokens of each rank; those behind all ranks' go to every rank.

    Returns:
        `(ranks, S on this rank, B, heads, D)`.
    """
    rows = out.transpose(0, 1)  # whole rows can be sent as they are if there is one sample
    size = ranks.size()
    video, behind = rows[: size * split], rows[size * split :]
    came = out.new_empty(size, split + len(behind), *rows.shape[1:])
    sent, received = [*video.chunk(size)], [*came[:, :split].unbind()]
    if len(behind):
        sent += [_packed(behind)] * size
        received += came[:, split:].unbind()
    underway = Underway(came, [], [])
    _swap(ranks, sent, received, underway)
    return underway


def place(parts: list[Tensor]) -> Tensor:
    """Puts the parts of `start_to_tokens` together: `(B, S on this rank, H, D)`."""
    ranks, tokens, batch, _, head_dim = parts[0].shape
    whole = parts[0].new_empty(batch, tokens, ranks, sum(part.shape[3] for part in parts), head_dim)
    for heads, part in zip(whole.split([part.shape[3] for part in parts], dim=3), parts, strict=True):
        _copy(heads, part.permute(2, 1, 0, 3, 4))
    return whole.flatten(2, 3)


def group_named(name: str) -> dist.ProcessGroup:
    """The process group of that `group_name`: operators take strings, not groups."""
    return _resolve_process_group(name)  # type: ignore[arg-type]  # newer torch: a type of its own for names


def _swap(ranks: dist.ProcessGroup, sent: Sequence[Tensor], received: Sequence[Tensor], underway: Underway) -> None:
    """Sends parts to each other rank and receives as many from it; this rank's own are copied meanwhile.

    Args:
        ranks: the process group.
        sent: one or more parts for each rank in turn.
        received: contiguous, as many.
        underway: gets what is to be waited for.
    """
    operations = []
    own = range(ranks.rank(), len(sent), ranks.size())
    for index in range(len(sent)):
        if index not in own:
            peer = dist.get_global_rank(ranks, index % ranks.size())
            operations.append(dist.P2POp(dist.isend, _packed(sent[index]), peer, ranks))
            operations.append(dist.P2POp(dist.irecv, received[index], peer, ranks))
    underway.operations.extend(operations)
    underway.works.extend(dist.batch_isend_irecv(operations) if operations else [])
    for index in own:
        _copy(received[index], sent[index])


def _packed(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous():
        return tensor
    packed = tensor.new_empty(tensor.shape)
    _copy(packed, tensor)
    return packed


def _copy(into: Tensor, tensor: Tensor) -> None:
    """Copies 8 bytes at a time where it can: torch copies tensors with strides element by element."""
    if all(map(_in_words, (into, tensor))):
        into, tensor = into.view(WORD), tensor.view(WORD)
    into.copy_(tensor)


def _in_words(tensor: Tensor) -> bool:
    lengths = (tensor.shape[-1], tensor.storage_offset(), *tensor.stride()[:-1])
    return tensor.stride(-1) == 1 and all(n * tensor.element_size() % WORD.itemsize == 0 for n in lengths)

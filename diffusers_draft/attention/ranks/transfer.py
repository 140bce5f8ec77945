"""What `exchange.Exchange` sends: every part goes straight to its place, and a rank's own part is not sent.

Point to point, because torch's functional collectives return what came in tensors of their own, which would be copied
once more, and pass a rank's own part through the communication kernel.
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

WORD = torch.int64

_with_priority: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


class Underway:
    """A tensor that is being received: not to be read before `wait`.

    Args:
        tensor: with memory for all that will come.
        ranks: the process group.
    """

    def __init__(self, tensor: Tensor, ranks: dist.ProcessGroup) -> None:
        self.tensor = tensor
        self.ranks = ranks
        self.works: list[dist.Work] = []
        self.operations: list[dist.P2POp] = []  # hold the tensors that are sent, which must live until they have been

    def swap(self, sent: Sequence[Tensor], received: Sequence[Tensor]) -> None:
        """Send parts to each other rank and receive as many from it; this rank's own are copied meanwhile.

        Args:
            sent: one or more parts for each rank in turn.
            received: contiguous parts of the tensor, as many.
        """
        operations = []
        own = range(self.ranks.rank(), len(sent), self.ranks.size())
        for index in range(len(sent)):
            if index not in own:
                peer = dist.get_global_rank(self.ranks, index % self.ranks.size())
                operations.append(dist.P2POp(dist.isend, _packed(sent[index]), peer, self.ranks))
                operations.append(dist.P2POp(dist.irecv, received[index], peer, self.ranks))
        self.operations += operations
        self.works += dist.batch_isend_irecv(operations) if operations else []
        for index in own:
            _copy(received[index], sent[index])

    def wait(self) -> Tensor:
        """Wait until everything has come, and return it."""
        for work in self.works:
            work.wait()
        return self.tensor


def start_to_heads(
    query: Tensor, key: Tensor, value: Tensor, ranks: dist.ProcessGroup, tokens: list[int], part: slice = slice(None)
) -> Underway:
    """Send all tokens of each rank's heads to it.

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
    underway = Underway(whole, ranks)
    try:
        # One after the other: while the query is on its way, the key is made ready.
        for tensor, received in zip(parts, whole, strict=True):
            underway.swap(tensor.permute(2, 1, 0, 3, 4).unbind(), received.split(tokens))
    except BaseException:
        underway.wait()
        raise
    return underway


def start_to_tokens(out: Tensor, ranks: dist.ProcessGroup, split: int) -> Underway:
    """Send each rank its tokens of this rank's heads.

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
    underway = Underway(came, ranks)
    underway.swap(sent, received)
    return underway


def place(parts: list[Tensor]) -> Tensor:
    """Put the parts of `start_to_tokens` together: `(B, S on this rank, H, D)`."""
    ranks, tokens, batch, _, head_dim = parts[0].shape
    heads = [part.shape[3] for part in parts]
    whole = parts[0].new_empty(batch, tokens, ranks, sum(heads), head_dim)
    for into, part in zip(whole.split(heads, dim=3), parts, strict=True):
        _copy(into, part.permute(2, 1, 0, 3, 4))
    return whole.flatten(2, 3)


def group_named(name: str) -> dist.ProcessGroup:
    """Look up the ranks of the process group with that `group_name`: operators take strings, not groups.

    Where all processes exchange through NCCL, this is a group of its own with priority: what is sent or received takes
    the next processors of the GPU that are free, and does not wait until attention, whose thread blocks are many, has
    started the last of them.
    """
    group = _resolve_process_group(name)  # type: ignore[arg-type]  # newer torch: a type of its own for names
    if group not in _with_priority and _is_everyone(group) and "nccl" in dist.get_backend_config(group):
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        _with_priority[group] = dist.new_group(backend="nccl", pg_options=options)
    return _with_priority.get(group, group)


def _is_everyone(group: dist.ProcessGroup) -> bool:
    return dist.get_process_group_ranks(group) == list(range(dist.get_world_size()))


def _packed(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous():
        return tensor
    packed = tensor.new_empty(tensor.shape)
    _copy(packed, tensor)
    return packed


def _copy(into: Tensor, tensor: Tensor) -> None:
    """Copy 8 bytes at a time where it can: torch copies tensors with strides element by element."""
    if all(map(_in_words, (into, tensor))):
        into, tensor = into.view(WORD), tensor.view(WORD)
    into.copy_(tensor)


def _in_words(tensor: Tensor) -> bool:
    lengths = (tensor.shape[-1], tensor.storage_offset(), *tensor.stride()[:-1])
    return tensor.stride(-1) == 1 and all(n * tensor.element_size() % WORD.itemsize == 0 for n in lengths)

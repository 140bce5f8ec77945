"""What `ulysses.Exchange` sends: every part goes straight to its place, and a rank's own part is not sent.

Custom ops, because torch's functional collectives return what came in tensors of their own, which would be copied once
more, and pass a rank's own part through the communication kernel.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

WORD = torch.int64

Underway = tuple[dist.Work, list[dist.P2POp]]
"""What to wait for, and the operations whose tensors must live until then."""


@torch.library.custom_op("diffusers_draft::to_heads", mutates_args=())
def to_heads(query: Tensor, key: Tensor, value: Tensor, group: str, tokens: list[int]) -> Tensor:
    """All tokens of this rank's heads.

    Args:
        query: `(B, S on this rank or more, H, D)`.
        key: as `query`.
        value: as `query`.
        group: name of the ranks' process group.
        tokens: how many come from each rank.

    Returns:
        `(3, S, B, H / ranks, D)`.
    """
    ranks = _ranks(group)
    whole = query.new_empty(3, sum(tokens), query.shape[0], query.shape[2] // len(tokens), query.shape[3])
    works: list[Underway] = []
    # One after the other: while the query is on its way, the key is made ready.
    for tensor, received in zip((query, key, value), whole, strict=True):
        by_rank = tensor[:, : tokens[ranks.rank()]].unflatten(2, (len(tokens), -1)).permute(2, 1, 0, 3, 4)
        works += _swap(ranks, by_rank.unbind(), received.split(tokens))
    _wait(works)
    return whole


@to_heads.register_fake
def _(query, key, value, group, tokens):
    return query.new_empty(3, sum(tokens), query.shape[0], query.shape[2] // len(tokens), query.shape[3])


@torch.library.custom_op("diffusers_draft::to_tokens", mutates_args=())
def to_tokens(out: Tensor, group: str, size: int, split: int) -> Tensor:
    """This rank's tokens, of all heads.

    Args:
        out: `(B, S, H / ranks, D)`.
        group: name of the ranks' process group.
        size: number of ranks.
        split: tokens of each rank; those behind all ranks' go to every rank.

    Returns:
        `(B, S on this rank, H, D)`.
    """
    ranks = _ranks(group)
    rows = out.transpose(0, 1)  # whole rows can be sent as they are if there is one sample
    video, behind = rows[: size * split], rows[size * split :]
    came = out.new_empty(size, split + len(behind), *rows.shape[1:])
    works = _swap(ranks, video.chunk(size), came[:, :split].unbind())
    if len(behind):
        works += _swap(ranks, [_packed(behind)] * size, came[:, split:].unbind())
    _wait(works)
    whole = out.new_empty(out.shape[0], came.shape[1], size, *out.shape[2:])
    _copy(whole, came.permute(2, 1, 0, 3, 4))
    return whole.flatten(2, 3)


@to_tokens.register_fake
def _(out, group, size, split):
    return out.new_empty(out.shape[0], out.shape[1] - (size - 1) * split, size * out.shape[2], out.shape[3])


def _swap(ranks: dist.ProcessGroup, sent: Sequence[Tensor], received: Sequence[Tensor]) -> list[Underway]:
    """Sends a part to each other rank and receives one from it; this rank's own is copied while they are on the way.

    Args:
        ranks: the process group.
        sent: a part for each rank.
        received: contiguous, as many.

    Returns:
        What `_wait` waits for.
    """
    operations = []
    for rank in range(ranks.size()):
        if rank != ranks.rank():
            peer = dist.get_global_rank(ranks, rank)
            operations.append(dist.P2POp(dist.isend, _packed(sent[rank]), peer, ranks))
            operations.append(dist.P2POp(dist.irecv, received[rank], peer, ranks))
    works = dist.batch_isend_irecv(operations) if operations else []
    _copy(received[ranks.rank()], sent[ranks.rank()])
    return [(work, operations) for work in works]


def _wait(works: list[Underway]) -> None:
    for work, _ in works:
        work.wait()


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


def _ranks(group: str) -> dist.ProcessGroup:
    return _resolve_process_group(group)  # type: ignore[arg-type]  # newer torch: a type of its own for names

"""The trial of finer key blocks: 128 queries x 64 keys against 128 x 128, in decoded video and in time.

Run `python docs/results/finer_keys.py --output FILE` in a checkout, on a machine with a GPU; with FlashAttention-4 the
time of its kernel with each size is measured too. docs/trials.md tells what came of it.
"""

from importlib.util import find_spec
from typing import Any

import torch
from fidelity_study import GRIDS, Unit, batches, clips_of, tools
from over_captions import study
from torch import Tensor
from torch.nn.functional import pad

from diffusers_draft import enable_draft_attention
from diffusers_draft.attention.block_mask import BlockMask
from diffusers_draft.attention.call import Call
from diffusers_draft.attention.draft import block_means
from diffusers_draft.attention.kernels import number_of
from diffusers_draft.attention.method import Method
from diffusers_draft.attention.ops import Attended
from diffusers_draft.patching.forward import AttentionCall
from diffusers_draft.tools.bench.measure import measure
from diffusers_draft.tools.bench.shapes import SHAPES, random_inputs
from diffusers_draft.tools.evaluation.metrics import fidelity, flicker
from diffusers_draft.tools.evaluation.study import work

SETTINGS = [
    (128, 0.59),
    (128, 0.8),
    (128, 0.84),
    (64, 0.59),
    (64, 0.63),
    (64, 0.8),
    (64, 0.82),
    (64, 0.84),
    (64, 0.856),
]
"""Keys of a block, and the sparsity: with 64 keys at equal pairs and at equal time of the kernel."""


def finer_mask(call: Call, sparsity: float, keys: int) -> BlockMask:
    """Keep the best blocks of `keys` keys for every block of queries, as many pairs as the row budget keeps.

    Kernels take square blocks: each half of a block of queries gets the same list.
    """
    halves = call.layout.block // keys
    video, total = call.layout.num_video_blocks * halves, -(-call.layout.seq_len // keys)
    means = [block_means(tensor, video, keys) for tensor in (call.key, call.value)]
    draft = torch.softmax(call.query_means @ means[0].mT * call.scale, dim=-1)
    scores = draft * torch.cdist(draft @ means[1], means[1])
    own = (
        torch.arange(video, device=draft.device) // halves
        == torch.arange(video // halves, device=draft.device)[:, None]
    )
    count = max(halves, round((1 - sparsity) * video))
    kept = scores.masked_fill(own, float("inf")).topk(count, sorted=False).indices.sort().values
    anchors = torch.arange(video, total, device=draft.device).expand(*kept.shape[:3], -1)
    rows = torch.cat([kept, anchors], dim=-1).repeat_interleave(halves, dim=2)
    lists = torch.arange(total, device=draft.device).repeat(*kept.shape[:2], total, 1)
    lists[:, :, :video] = pad(rows, (0, total - rows.shape[-1]))
    counts = torch.full(lists.shape[:3], total, dtype=torch.int32, device=draft.device)
    counts[:, :, :video] = rows.shape[-1]
    return BlockMask(counts, lists.int(), None, call.layout.seq_len, keys, video)


def finer(keys: int):
    """Make a hook that chooses blocks of `keys` keys."""

    def attend(seen: AttentionCall) -> Attended | None:
        query, key, value, geometry, _, numbers, method, scale = seen.arguments
        sparsity, number = numbers.tolist()
        call = Call.order(query, key, value, geometry, None, Method.from_tensor(method), scale)
        if not call.skips_pairs(sparsity):
            return None
        mask = finer_mask(call, sparsity, keys)
        out = call.attend(mask)
        correction = call.correct(out, int(number))
        facts = torch.tensor([*mask.kv_num_blocks.shape[1:], mask.num_video_blocks, number_of(call.kernel)])
        pairs = mask.kv_num_blocks.sum((1, 2))
        return Attended(call.restore(out, correction), pairs, correction.squares, facts)

    return attend


def run_unit(unit: Unit) -> list[dict[str, Any]]:
    """Make the clips of some captions, dense and with every setting, from the same noise."""
    pipe, metrics = tools()
    dense, found = clips_of(pipe, unit), []
    for keys, sparsity in SETTINGS:
        with enable_draft_attention(pipe, sparsity, backend="triton") as handle:
            if keys == 128:
                clips = clips_of(pipe, unit)
            else:
                with handle._watched(finer(keys)):
                    clips = clips_of(pipe, unit)
            report = handle.report()
        for caption, clip, other in zip(unit.captions, clips, dense, strict=True):
            measured = fidelity(clip, other, metrics) | {"flicker_difference": flicker(clip) - flicker(other)}
            what = {"grid": unit.grid, "keys": keys, "sparsity": sparsity, "caption": caption} | work(None, report)
            found.append(what | {name: round(number, 4) for name, number in measured.items()})
    return found


def kernel_times(shape: str = "hunyuan-768p", seconds: float = 0.3) -> list[dict[str, Any]]:
    """Time FlashAttention-4 with lists of blocks of 128, 64 and 32 keys, chosen at random."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_fwd

    sizes = SHAPES[shape]
    query, key, value = random_inputs(sizes, torch.device("cuda"), torch.bfloat16)
    found = [{"density": 1.0, "ms": measure(lambda: _flash_attn_fwd(query, key, value), seconds).median}]
    rows = sizes.seq_len // 128
    for keys in (128, 64, 32):
        for density in (0.05, 0.1, 0.2, 0.3, 0.4):
            count = round(density * sizes.seq_len / keys)
            chosen = torch.rand(1, sizes.heads, rows, sizes.seq_len // keys, device="cuda").topk(count).indices
            counts = torch.full(chosen.shape[:3], count, dtype=torch.int32, device="cuda")
            lists = BlockSparseTensorsTorch(
                mask_block_cnt=torch.zeros_like(counts),
                mask_block_idx=torch.zeros_like(counts)[..., None],
                full_block_cnt=counts,
                full_block_idx=chosen.sort().values.int(),
                block_size=(128, keys),
            )

            def call(lists: Any = lists) -> tuple[Tensor, ...]:
                return _flash_attn_fwd(query[:, : rows * 128], key, value, block_sparse_tensors=lists)

            found.append({"keys": keys, "density": density, "ms": measure(call, seconds).median})
    return found


if __name__ == "__main__":
    if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
        raise SystemExit("The kernel that is timed is FlashAttention-4's, and flash_attn.cute is not installed.")
    study(
        __doc__,
        captions=16,
        units=lambda captions, _: [Unit(grid, 14, batch) for batch in batches(captions) for grid in GRIDS],
        run_unit=run_unit,
        packed=lambda clips: {"clips": clips, "kernel": kernel_times()},
    )

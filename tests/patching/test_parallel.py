"""Over several ranks everything is as in one process."""

import inspect
import math
import re
from typing import Any

import pytest
import torch
from diffusers import ContextParallelConfig
from launch import Pool, pool
from models import FLOAT32_ERROR, RAGGED, TINY, Grid, error
from ranks import HALF, SPARSE, Outcome, a_run, baseline, how, outcome
from torch import Tensor

from diffusers_draft import enable_parallelism
from diffusers_draft.attention.ops import attend
from diffusers_draft.attention.ranks.transfer import _in_words
from diffusers_draft.config import DraftConfig
from diffusers_draft.families import families
from diffusers_draft.families.family import Refusal
from diffusers_draft.tools.bench.step import NO_ATTENTION, ONE_GPU

__all__ = ["pool"]

EVEN = (4, 13, 17)
"""Tokens that two and four ranks can share, and no multiple of the tile in any direction."""
CORRECTED = dict(sparsity=0.8, schedule="constant", score="value", probes=64)
DENSE_STEP = dict(sparsity=0.8, dense_timestep=0)


def check(found: list[Any], expected: Outcome) -> None:
    for rank in results(found):
        assert error(rank[0], expected[0]) < FLOAT32_ERROR
    if not expected[1]:
        assert not any(rank[1] for rank in found)
        return
    for calls in zip(*(_of_layers(rank[1], len(expected[1])) for rank in found), expected[1], strict=True):
        assert torch.equal(torch.cat(calls[:-1], dim=1), calls[-1])


def results(found: list[Any]) -> list[Any]:
    """What ranks returned; raises what one raised."""
    for rank in found:
        if isinstance(rank, Exception):
            raise rank
    return found


def _of_layers(kept: list[Tensor], layers: int) -> list[Tensor]:
    """One of each layer, of all heads of a rank, which has them attend in parts."""
    parts = len(kept) // layers
    return [torch.cat(kept[start : start + parts], dim=1) for start in range(0, len(kept), parts)]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ["wan 4 heads", "hunyuan_video 4 heads"])
@pytest.mark.parametrize("draft", [SPARSE, SPARSE | dict(budget="head", dense_layers=(1,)), DENSE_STEP, None])
def test_as_in_one_process(pool: Pool, name: str, ranks: int, draft: Any) -> None:
    case = (name, 2, EVEN, draft)
    expected = outcome(*case)
    assert bool(expected[1]) == (draft not in (DENSE_STEP, None))
    check(pool.run(ranks, "outcome", *case, "before"), expected)


@pytest.mark.parametrize("name", ["wan 4 heads", "hunyuan_video 4 heads"])
def test_ranks_follow_the_errors_of_all_heads(pool: Pool, name: str) -> None:
    """As one process does, which sees all heads: every rank alike, or they would wait for each other for ever."""
    case, knob = (name, 1, (3, 24, 32)), dict(max_error=0.04, runs=2)
    outputs, _, run = a_run(*case, False, **knob)
    assert len({forward.asked for forward in run}) > 3
    for rank in results(pool.run(2, "a_run", *case, True, **knob)):
        assert [forward.asked for forward in rank[2]] == pytest.approx([forward.asked for forward in run], abs=1e-4)
        assert all(error(found, right) < FLOAT32_ERROR for found, right in zip(rank[0], outputs, strict=True))


@pytest.mark.parametrize("name", ["wan 8 heads", "hunyuan_video 8 heads"])
def test_a_run_over_eight_ranks(pool: Pool, name: str) -> None:
    """With the correction, a falling schedule, and two samples, whose texts have different lengths."""
    case = (name, 2, (4, 14, 17))
    outputs, kept, run = a_run(*case, False, sparsity=0.7)
    assert len({forward.density for forward in run}) > 3
    ranks = results(pool.run(8, "a_run", *case, True, sparsity=0.7))
    for found, _, forwards in ranks:
        assert all(error(one, right) < FLOAT32_ERROR for one, right in zip(found, outputs, strict=True))
        assert [forward.density for forward in forwards] == pytest.approx([forward.density for forward in run])
        errors = [forward.error.after for forward in run]
        assert [forward.error.after for forward in forwards] == pytest.approx(errors, rel=1e-4)
    for calls in zip(*(rank[1] for rank in ranks), kept, strict=True):
        assert torch.equal(torch.cat(calls[:-1], dim=1), calls[-1])


def test_eight_ranks_need_heads_that_eight_divides(pool: Pool) -> None:
    for found in pool.run(8, "outcome", "wan 12 heads", 1, (4, 14, 17), SPARSE, "before"):
        assert isinstance(found, ValueError)
        assert re.search("ulysses_degree=8 does not divide the 12 heads.*Use one of 2, 3, 4, 6, 12", str(found))


SPLIT = [name for name, family in families().items() if not isinstance(family.split, Refusal)]
REFUSED = ("animate", "token_replace")


@pytest.mark.parametrize(
    "name",
    [name for name in TINY if name.startswith((*SPLIT, "wan", "hunyuan_video")) and not name.endswith(REFUSED)],
)
def test_every_family_that_can_be_split(pool: Pool, name: str) -> None:
    grid = RAGGED if name.endswith("conditions") else EVEN  # with an odd number of tokens in front
    for draft in (SPARSE, CORRECTED, None):
        case = (name, 2, grid, draft)
        check(pool.run(2, "outcome", *case, "after"), outcome(*case))


@pytest.mark.parametrize("split_when", ["before", "after"])
def test_the_method_of_diffusers_on_wan(pool: Pool, split_when: str) -> None:
    case = ("wan 4 heads", 2, EVEN, SPARSE)
    check(pool.run(2, "outcome", *case, split_when, "diffusers"), outcome(*case))


@pytest.mark.parametrize(("batch", "behind"), [(1, 5), (2, 5), (2, 0)])
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.bfloat16, 8), (torch.bfloat16, 6), (torch.float32, 3)])
def test_what_the_ranks_exchange(pool: Pool, dtype: torch.dtype, head_dim: int, batch: int, behind: int) -> None:
    """Copies in words of 8 bytes, and of head sizes that no word fits."""
    whole = torch.randn(3, batch, 4 * 7 + behind, 8, head_dim).to(dtype)
    for rank, (heads, tokens) in enumerate(pool.run(4, "exchanged", whole, behind)):
        assert torch.equal(torch.stack(heads), whole[..., 2 * rank : 2 * rank + 2, :])
        assert torch.equal(tokens, torch.cat((whole[0, :, 7 * rank : 7 * rank + 7], whole[0, :, 28:]), dim=1))


@pytest.mark.parametrize(("ranks", "heads"), [(2, 6), (4, 12), (4, 4)])
@pytest.mark.parametrize("behind", [0, 5])
def test_heads_attend_in_parts_as_they_arrive(pool: Pool, ranks: int, heads: int, behind: int) -> None:
    whole, grid, video = torch.randn(3, 2, math.prod(EVEN) + behind, heads, 16), EVEN, math.prod(EVEN)
    kv_len = torch.tensor([video + 2, video + 5]) if behind else None
    config = DraftConfig(sparsity=0.7, tile=(2, 4, 4))
    geometry = torch.tensor([*grid, 0])
    out = attend(*whole, geometry, kv_len, *how(config)).out
    share, of_rank = video // ranks, heads // ranks
    for rank, (found, pairs, calls) in enumerate(pool.run(ranks, "attended", whole, grid, kv_len)):
        expected = torch.cat((out[:, rank * share : (rank + 1) * share], out[:, video:]), dim=1)
        assert error(found, expected) < FLOAT32_ERROR
        own_heads = whole[..., rank * of_rank : (rank + 1) * of_rank, :]
        assert torch.equal(pairs, attend(*own_heads, geometry, kv_len, *how(config)).pairs)
        parts = min(of_rank, 2)
        each = ["wait", "attend_now", "start_to_tokens"]
        assert calls == ["start_to_heads"] * parts + each * parts + ["wait"] * parts


def test_what_is_underway_is_awaited_after_an_error(pool: Pool) -> None:
    """Or it would meet the next call's, and its memory would be free while it arrives."""
    whole, too_short = torch.randn(3, 1, math.prod(EVEN) + 5, 4, 16), torch.tensor([3])
    for message, _, calls in pool.run(2, "attended", whole, EVEN, too_short):
        assert "kv_len must lie between" in message
        assert calls == ["start_to_heads", "start_to_heads", "wait", "attend_now", "wait"]


@pytest.mark.parametrize(
    ("fitting", "expected"),
    [(2, ["start_to_heads", "wait"]), (4, ["start_to_heads", "start_to_heads", "wait", "wait"])],
)
def test_what_is_underway_is_awaited_where_the_rest_cannot_be_sent(
    pool: Pool, fitting: int, expected: list[str]
) -> None:
    whole = torch.randn(3, 1, math.prod(EVEN) + 5, 4, 16)
    for message, _, calls in pool.run(2, "attended", whole, EVEN, None, fitting):
        assert "no memory" in message
        assert calls == expected


def test_two_groups_exchange_among_themselves(pool: Pool) -> None:
    whole = torch.randn(3, 2, 2 * 7 + 5, 8, 16)
    for rank, (heads, tokens) in enumerate(pool.run(4, "exchanged", whole, 5, [[0, 2], [1, 3]])):
        place = rank // 2
        assert torch.equal(torch.stack(heads), whole[..., 4 * place : 4 * place + 4, :] + rank % 2)
        assert torch.equal(tokens, torch.cat((whole[0, :, 7 * place : 7 * place + 7], whole[0, :, 14:]), 1) + rank % 2)


def test_what_is_exchanged_goes_before_what_computes(pool: Pool) -> None:
    """One group for both operators, made anew when the processes are in another."""
    whole = torch.randn(3, 2, 2 * 7 + 5, 8, 16)
    for _ in range(2):
        for rank, (heads, _, made) in enumerate(pool.run(2, "exchanged_with_priority", whole)):
            assert torch.equal(torch.stack(heads), whole[..., 4 * rank : 4 * rank + 4, :])
            assert made == [dict(backend="nccl", pg_options=dict(is_high_priority_stream=True))]


def test_the_operators_are_what_they_say(pool: Pool) -> None:
    for found in pool.run(2, "operators"):
        assert found == dict.fromkeys(("to_heads", "to_tokens", "attend_over_ranks"), "SUCCESS")


def test_copies_in_words_only_where_words_fit() -> None:
    base = torch.zeros(6, 16, dtype=torch.bfloat16)
    assert all(map(_in_words, (base, base[:, 4:8], base[::2], base.view(2, 3, 16).transpose(0, 1))))
    assert not any(map(_in_words, (base[:, :6], base[:, 2:6], base[:, ::2], base.T, base.view(-1)[:90].view(6, 15))))


def test_every_rank_computes_the_same_number_of_pairs(pool: Pool) -> None:
    found = pool.run(4, "outcome", "wan 4 heads", 1, EVEN, SPARSE | dict(budget="head"), "before")
    assert all(rank[1] for rank in found)
    assert len({sum(kept.sum().item() for kept in rank[1]) for rank in found}) == 1
    assert len({rank[2] for rank in found}) == 1  # the reports: density, steps, layers


def test_a_baseline_in_place_of_draft_attention(pool: Pool) -> None:
    name = "hunyuan_video 4 heads"
    expected = baseline(name, EVEN)
    assert error(expected[0], outcome(name, 2, EVEN, HALF)[0]) > 100 * FLOAT32_ERROR
    check(pool.run(2, "baseline", name, EVEN, "ours"), expected)


def test_disabling_leaves_a_split_model_dense_and_right(pool: Pool) -> None:
    check(pool.run(2, "disabled_again", "hunyuan_video", EVEN), outcome("hunyuan_video", 2, EVEN, None))


MANY = [EVEN, (2, 13, 17), (4, 11, 17), (4, 13, 15), (6, 9, 17), (2, 19, 21)]


@pytest.mark.parametrize(
    ("name", "grids"), [("wan 4 heads", MANY), ("hunyuan_video", MANY[:5]), ("SkyReelsV2Transformer3DModel", MANY[:3])]
)
def test_compiled_blocks_at_many_resolutions(pool: Pool, name: str, grids: list[Grid]) -> None:
    found = pool.run(2, "compiled", name, grids)
    for grid, *outputs in zip(grids, *found, strict=True):
        check([(output, []) for output in outputs], (outcome(name, 2, grid, dict(sparsity=0.8))[0], [], ""))


def test_a_model_compiled_as_a_whole(pool: Pool) -> None:
    expected = outcome("wan 4 heads", 2, EVEN, dict(sparsity=0.8))[0]
    check([(output, []) for output in pool.run(2, "compiled_whole", "wan 4 heads", EVEN)], (expected, [], ""))


def test_offloading_comes_after_splitting(pool: Pool) -> None:
    for way, message in (
        ("ours", "offloaded already.*Split it first"),
        ("diffusers", "its share of 884 tokens is 442"),
    ):
        for found in pool.run(2, "offloaded_first", way):
            assert isinstance(found, RuntimeError) and re.search(message, str(found)), found


def test_what_would_lose_the_exchange_is_refused(pool: Pool) -> None:
    for found in pool.run(2, "replaced"):
        assert isinstance(found, RuntimeError) and "1 attention layers of this WanTransformer3DModel" in str(found)
    for found in pool.run(2, "copied"):
        assert isinstance(found, TypeError) and "Copy it before it is split" in str(found)


def test_all_transformers_are_split_or_none(pool: Pool) -> None:
    for found in pool.run(2, "half_split"):
        assert not isinstance(found, Exception), found
        assert found[1] == "no memory" and "density" in found[0][2]


def test_the_report_counts_masked_calls(pool: Pool) -> None:
    causal = "SkyReelsV2Transformer3DModel"
    found = pool.run(2, "causal", causal, (4, 13, 17))
    assert not any(isinstance(rank, Exception) for rank in found), found
    assert all(rank == {"step": 0, "layer": 1, "mask": 2, "replacement": 0} for rank in found)


ERRORS = [
    ("wan", dict(ulysses_degree=4), EVEN, ValueError, "ulysses_degree=4 does not divide the 2 heads.*Use one of 2"),
    ("wan", dict(ring_degree=4), EVEN, NotImplementedError, r"ring_degree=4.*Use ContextParallelConfig"),
    ("wan 4 heads", dict(ulysses_degree=8), EVEN, ValueError, "ulysses_degree=8, but there are 4 processes"),
    ("wan 4 heads", dict(ulysses_degree=2), EVEN, ValueError, "ulysses_degree=2, but there are 4 processes"),
    (
        "wan 4 heads",
        {},
        RAGGED,
        ValueError,
        r"4 GPUs cannot share 663 tokens.*4 x 13 x 17 or 3 x 12 x 17 or 3 x 13 x 16",
    ),
    ("wan_animate", {}, EVEN, NotImplementedError, "Wan Animate cannot be split over GPUs: its face adapter"),
    ("hunyuan_video_token_replace", {}, EVEN, ValueError, 'image_condition_type="token_replace" cannot be split'),
]


@pytest.mark.parametrize(("name", "config", "grid", "kind", "message"), ERRORS)
@pytest.mark.parametrize("split_when", ["before", "after"])
def test_errors_before_any_work(
    pool: Pool, name: str, config: Any, grid: Any, kind: type[Exception], message: str, split_when: str
) -> None:
    for draft in (SPARSE, CORRECTED, None):
        for found in pool.run(4, "outcome", name, 1, grid, draft, split_when, "ours", config):
            assert isinstance(found, kind) and re.search(message, str(found)), found


@pytest.mark.parametrize("split_when", ["before", "after"])
def test_errors_with_the_method_of_diffusers(pool: Pool, split_when: str) -> None:
    errors = [
        ("wan", dict(ring_degree=2), EVEN, "ring_degree=2"),
        ("wan", dict(ulysses_degree=2), RAGGED, "2 GPUs cannot share 663 tokens"),
        ("hunyuan_video", dict(ulysses_degree=2), EVEN, r"diffusers_draft.enable_parallelism\(pipe"),
        ("MochiTransformer3DModel", dict(ulysses_degree=2), EVEN, "Mochi: its attention processors take no"),
    ]
    if "ulysses_anything" in inspect.signature(ContextParallelConfig).parameters:
        errors.append(("wan", dict(ulysses_degree=2, ulysses_anything=True), RAGGED, "ulysses_anything=True"))
        errors.append(("wan 4 heads", dict(ulysses_degree=2, ring_degree=2), EVEN, "ring_degree=2"))
    for name, config, grid, message in errors:
        ranks = config.get("ulysses_degree", 1) * config.get("ring_degree", 1)
        for found in pool.run(ranks, "outcome", name, 1, grid, dict(sparsity=0.8), split_when, "diffusers", config):
            assert isinstance(found, (ValueError, NotImplementedError)) and re.search(message, str(found)), found


def test_a_model_is_split_once_and_in_a_group(pool: Pool) -> None:
    assert pool.run(2, "split_twice") == ["This WanTransformer3DModel is split over GPUs already."] * 2
    with pytest.raises(RuntimeError, match="Start the script with torchrun"):
        enable_parallelism(TINY["wan"].build(), config=ContextParallelConfig(ulysses_degree=2))
    with pytest.raises(TypeError, match=r"config must be a ContextParallelConfig, as in .*, got dict"):
        enable_parallelism(TINY["wan"].build(), config={"ulysses_degree": 2})


def test_bench_compares_several_gpus_with_one(pool: Pool) -> None:
    ranks = pool.run(2, "bench", False)
    assert ranks[0] == ranks[1]
    for found in ranks:
        assert not isinstance(found, Exception), found
        steps, sparse, prediction = found
        drafts = [step.name for step in steps if step.density is not None]
        assert drafts[0] == ONE_GPU and drafts[-1] == "draft, density 0.2" and len(drafts) == 4 and sparse == drafts
        assert [step.name for step in steps[1:4]] == ["diffusers default", NO_ATTENTION, "dense sdpa"]
        assert prediction["gpu_speedup"] == pytest.approx(steps[0].step_ms / steps[-1].step_ms)
        assert prediction["exchange_share"] == pytest.approx(5 * steps[-1].exchange_ms / steps[-1].step_ms)
        assert steps[-1].exchange_ms > 0 and prediction["best_dense_step_ms"] in [
            step.step_ms for step in (steps[1], steps[3])
        ]
    for found in pool.run(2, "bench", True):
        assert isinstance(found, RuntimeError) and "Several GPUs give another output than one" in str(found)


def test_gradients_are_refused(pool: Pool) -> None:
    for found in pool.run(2, "with_gradients"):
        assert isinstance(found, NotImplementedError) and "torch.no_grad()" in str(found)

import oracle
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from diffusers_draft.attention.draft import block_means, draft_map, value
from diffusers_draft.attention.select import BUDGETS, select

BLOCK = 16


def random_map(batch: int, heads: int, num_video: int, seed: int) -> torch.Tensor:
    scores = torch.randn(batch, heads, num_video, num_video, generator=torch.Generator().manual_seed(seed))
    return torch.softmax(2 * scores, dim=-1)


def video_pairs(rows: list[list[int]], num_video: int) -> oracle.Pairs:
    return {(index, column) for index, row in enumerate(rows[:num_video]) for column in row if column < num_video}


@st.composite
def problems(draw):
    num_video = draw(st.integers(0, 24))
    others = draw(st.integers(0, 5 * BLOCK))
    seq_len = num_video * BLOCK + others
    batch = draw(st.integers(1, 3))
    lengths = st.integers(max(1, num_video * BLOCK), max(1, seq_len))
    kv_len = draw(st.none() | st.lists(lengths, min_size=batch, max_size=batch))
    draft = random_map(batch, draw(st.integers(1, 3)), num_video, draw(st.integers(0, 2**16)))
    return draft, max(1, seq_len), None if kv_len is None else torch.tensor(kv_len)


sparsities = st.sampled_from([0.5, 0.75, 0.9]) | st.floats(0, 0.99)


@pytest.mark.parametrize("budget", ["head", "row"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_take_no_own_block_away(budget, wrong):
    draft = random_map(1, 2, 12, 0)
    draft[0, 0, 3] = wrong
    mask = select(draft.clone(), 0.9, budget, seq_len=12 * BLOCK, block=BLOCK)
    kept = mask.to_dense()
    assert kept.diagonal(dim1=-2, dim2=-1).all()
    assert (kept.sum((-2, -1)) == oracle.number_of_pairs(12, 0.9, budget)).all()


@pytest.mark.parametrize("offset", [10, 1e4])
@pytest.mark.parametrize("gap", [8, 12, 14, 16, 20, 24, 40, 80])
def test_the_one_block_that_a_row_looks_at_is_kept_by_value(gap, offset):
    """The output is that block's value up to rounding, and how far it is from it is not known."""
    num_video = 48
    logits = torch.randn(num_video, num_video, generator=torch.Generator().manual_seed(0))
    looked_at = (torch.arange(num_video) + 7) % num_video
    logits[torch.arange(num_video), looked_at] = gap
    values = torch.randn(1, 1, num_video, 64, generator=torch.Generator().manual_seed(1)) + offset
    scores = value(torch.softmax(logits, -1)[None, None], values)
    kept = select(scores, 0.9, "row", seq_len=num_video * BLOCK, block=BLOCK).to_dense()[0, 0]
    assert kept[torch.arange(num_video), looked_at].all()


def test_there_are_two_budgets():
    assert list(BUDGETS) == ["head", "row"]


@pytest.mark.parametrize("budget", ["head", "row"])
@given(problem=problems(), sparsity=sparsities)
def test_the_kept_pairs_are_the_largest_of_the_map(budget, problem, sparsity):
    draft, seq_len, kv_len = problem
    num_video = draft.shape[-1]
    mask = select(draft.clone(), sparsity, budget, seq_len=seq_len, block=BLOCK, kv_len=kv_len)
    for maps, heads in zip(draft, oracle.listed(mask), strict=True):
        for scores, rows in zip(maps, heads, strict=True):
            kept = video_pairs(rows, num_video)
            assert kept == oracle.best_pairs(scores, sparsity, budget)
            assert len(kept) == oracle.number_of_pairs(num_video, sparsity, budget)


def test_an_own_block_of_the_lowest_score_is_kept_inside_the_budget():
    draft = torch.tensor([[0.0, 0.6, 0.4], [0.3, 0.0, 0.7], [0.8, 0.2, 0.0]])[None, None]
    kept = {
        (sparsity, budget): video_pairs(
            oracle.listed(select(draft.clone(), sparsity, budget, seq_len=48, block=16))[0][0], 3
        )
        for sparsity in (0.3, 0.9)
        for budget in BUDGETS
    }
    own = {(0, 0), (1, 1), (2, 2)}
    assert kept == {
        (0.3, "head"): own | {(2, 0), (1, 2), (0, 1)},
        (0.3, "row"): own | {(2, 0), (1, 2), (0, 1)},
        (0.9, "head"): own,
        (0.9, "row"): own,
    }


def test_the_head_budget_gives_rows_what_their_scores_earn():
    draft = torch.full((4, 4), 0.25)
    draft[2] = torch.tensor([0.3, 0.32, 0.06, 0.32])
    rows = oracle.listed(select(draft[None, None], 0.5, "head", seq_len=64, block=16))[0][0]
    assert len(rows[2]) == 4
    assert sum(map(len, rows)) == 8


@pytest.mark.parametrize("budget", ["head", "row"])
@given(problem=problems(), sparsity=sparsities)
@example(problem=(random_map(2, 2, 5, 0), 100, torch.tensor([80, 97])), sparsity=0.75)
@example(problem=(random_map(2, 2, 5, 0), 80, None), sparsity=0.9)
def test_lists_are_ascending_hold_all_valid_anchors_and_no_padding(budget, problem, sparsity):
    draft, seq_len, kv_len = problem
    num_video, num_blocks = draft.shape[-1], -(-seq_len // BLOCK)
    mask = select(draft.clone(), sparsity, budget, seq_len=seq_len, block=BLOCK, kv_len=kv_len)
    assert mask.kv_num_blocks.shape == (*draft.shape[:2], num_blocks)
    assert mask.kv_indices.shape == (*draft.shape[:2], num_blocks, num_blocks)
    assert {mask.kv_num_blocks.dtype, mask.kv_indices.dtype} == {torch.int32}
    lengths = [seq_len] * len(draft) if kv_len is None else kv_len.tolist()
    for length, heads in zip(lengths, oracle.listed(mask), strict=True):
        blocks_with_keys = [block for block in range(num_blocks) if block * BLOCK < length]
        for rows in heads:
            for row in rows[:num_video]:
                assert row == sorted(set(row))
                assert [block for block in row if block >= num_video] == blocks_with_keys[num_video:]
            for row in rows[num_video:]:
                assert row == blocks_with_keys


@given(problem=problems(), sparsity=sparsities, budget=st.sampled_from(["head", "row"]))
@example(problem=(random_map(2, 2, 5, 0), 112, torch.tensor([80, 97])), sparsity=0.75, budget="head")
def test_density_and_dense_map_agree_with_counting(problem, sparsity, budget):
    draft, seq_len, kv_len = problem
    mask = select(draft.clone(), sparsity, budget, seq_len=seq_len, block=BLOCK, kv_len=kv_len)
    num_blocks = -(-seq_len // BLOCK)
    lengths = [seq_len] * len(draft) if kv_len is None else kv_len.tolist()
    dense = torch.zeros(*draft.shape[:2], num_blocks, num_blocks, dtype=torch.bool)
    computed = possible = 0
    for sample, (length, heads) in enumerate(zip(lengths, oracle.listed(mask), strict=True)):
        for head, rows in enumerate(heads):
            for index, row in enumerate(rows):
                dense[sample, head, index, row] = True
                computed += len(row)
                possible += -(-length // BLOCK)
    assert torch.equal(mask.to_dense(), dense)
    assert mask.density().item() == pytest.approx(computed / possible, rel=1e-6)
    assert mask.valid_len.tolist() == lengths
    assert mask.tail_block.tolist() == [(length - 1) // BLOCK for length in lengths]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_blocks", [0, 1, 7])
def test_draft_map_equals_its_definition(dtype, num_blocks):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 7 * 32 + 5, 3, 64, generator=generator).to(dtype) for _ in range(2))
    order = torch.arange(query.shape[1])
    means = [block_means(tokens, num_blocks, 32) for tokens in (query, key)]
    found = draft_map(*means, 0.3)
    assert {tensor.dtype for tensor in (*means, found)} == {torch.float32}
    torch.testing.assert_close(
        means[0].double(), oracle.block_means(query, order, num_blocks, 32), rtol=1e-5, atol=1e-6
    )
    expected = oracle.draft_map(query, key, order, num_blocks, 32, 0.3)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


def test_draft_map_stays_float32_under_autocast():
    query, key = torch.randn(2, 1, 2, 9, 64, generator=torch.Generator().manual_seed(0))
    expected = draft_map(query, key, 0.125)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(draft_map(query, key, 0.125), expected)

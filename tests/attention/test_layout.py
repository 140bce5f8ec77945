import math

import oracle
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from diffusers_draft.attention.layout import token_layout, walk

CPU = torch.device("cpu")

grids = st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 60))
tiles = st.sampled_from([(1, 128), (4, 32), (8, 16), (16, 8), (2, 8, 8), (3, 4, 4)])


def coordinates(grid):
    """`(T * Y * X, 3)` frame, row and column of each token in walking order."""
    return torch.stack(torch.unravel_index(walk(grid, (8, 16)), grid), dim=1)


@given(grid=grids, tile=tiles)
@example(grid=(3, 30, 52), tile=(8, 16))
@example(grid=(2, 45, 80), tile=(8, 16))
@example(grid=(1, 1, 1), tile=(8, 16))
@example(grid=(5, 12, 7), tile=(2, 8, 8))
@example(grid=(2, 3, 5), tile=(16, 8))
def test_walk_equals_the_naive_walk_and_visits_every_token_once(grid, tile):
    visited = walk(grid, tile).tolist()
    assert visited == oracle.walk(grid, tile)
    assert sorted(visited) == list(range(grid[0] * grid[1] * grid[2]))


@pytest.mark.parametrize(
    "grid", [(1, 8, 16), (2, 16, 32), (3, 24, 48), (2, 48, 80), (4, 40, 16), (1, 8, 160)], ids=str
)
def test_runs_are_the_tiles_of_the_paper_where_these_fit(grid):
    frames, rows, columns = grid
    tiles = {
        frozenset((t * rows + y) * columns + x for y in range(top, top + 8) for x in range(left, left + 16))
        for t in range(frames)
        for top in range(0, rows, 8)
        for left in range(0, columns, 16)
    }
    runs = walk(grid, (8, 16)).view(-1, 128).tolist()
    assert {frozenset(run) for run in runs} == tiles
    assert len(runs) == len(tiles)


def test_runs_are_boxes_of_several_frames_where_these_fit():
    runs = torch.stack(torch.unravel_index(walk((4, 16, 24), (2, 8, 8)), (4, 16, 24)), dim=1).view(-1, 128, 3)
    assert ((runs.amax(1) - runs.amin(1) + 1) == torch.tensor([2, 8, 8])).all()
    assert len(runs.amin(1).unique(dim=0)) == len(runs)


@pytest.mark.parametrize("grid", [(2, 30, 52), (2, 45, 80), (3, 22, 40), (2, 34, 60)], ids=str)
def test_a_run_inside_a_frame_is_a_compact_patch(grid):
    runs = [run for run in coordinates(grid).split(128) if len(run) == 128 and len(run[:, 0].unique()) == 1]
    assert len(runs) > grid[0] * grid[1] * grid[2] // 128 - 2 * grid[0]
    boxes = [(run.amax(0) - run.amin(0) + 1).prod().item() for run in runs]
    assert max(boxes) <= 2.2 * 128
    assert sorted(boxes)[len(boxes) // 2] <= 1.2 * 128


@given(grid=grids)
@example(grid=(3, 30, 52))
@example(grid=(2, 45, 80))
def test_consecutive_tokens_are_neighbours_but_for_the_way_back_to_the_next_column(grid):
    frames, _, columns = grid
    strips = oracle.strips(grid[1], 8)
    steps = coordinates(grid).diff(dim=0).abs()
    jumps = steps[steps.sum(1) > 1]
    assert len(jumps) == frames * (columns - 1) * sum(len(strip) > 1 for strip in strips)
    assert (jumps[:, 0] == 0).all()
    assert (jumps[:, 1] < max(map(len, strips))).all()
    assert (jumps[:, 2] == 1).all()


@given(grid=grids, prefix=st.integers(0, 300), suffix=st.integers(0, 300), tile=tiles)
@example(grid=(1, 8, 16), prefix=0, suffix=0, tile=(8, 16))
@example(grid=(2, 30, 52), prefix=128, suffix=128, tile=(8, 16))
def test_token_layout_puts_video_first_and_can_be_undone(grid, prefix, suffix, tile):
    video = grid[0] * grid[1] * grid[2]
    seq_len = prefix + video + suffix
    layout = token_layout(grid, prefix, seq_len, tile, CPU)
    assert torch.equal(layout.order, oracle.block_order(grid, prefix, seq_len, tile))
    assert torch.equal(layout.order[layout.inverse], torch.arange(seq_len))
    assert torch.equal(layout.inverse[layout.order], torch.arange(seq_len))
    block = math.prod(tile)
    assert layout.block == block
    assert layout.num_video_blocks * block <= video < (layout.num_video_blocks + 1) * block
    assert (layout.num_blocks - 1) * block < seq_len <= layout.num_blocks * block


def test_token_layout_is_built_once():
    first = token_layout((2, 9, 11), 3, 210, (8, 16), CPU)
    assert token_layout((2, 9, 11), 3, 210, (8, 16), CPU) is first
    assert token_layout((2, 11, 9), 3, 210, (8, 16), CPU) is not first
    assert token_layout((2, 9, 11), 3, 211, (8, 16), CPU) is not first
    assert token_layout((2, 9, 11), 4, 210, (8, 16), CPU) is not first
    assert token_layout((2, 9, 11), 3, 210, (4, 8), CPU) is not first


def test_a_layout_made_in_inference_mode_works_under_autograd():
    with torch.inference_mode():
        layout = token_layout((1, 13, 29), 7, 401, (8, 16), CPU)
    assert not layout.order.is_inference()
    assert not layout.inverse.is_inference()
    tokens = torch.randn(1, 401, 1, 4, requires_grad=True)
    tokens.index_select(1, layout.order).index_select(1, layout.inverse).sum().backward()
    assert torch.equal(tokens.grad, torch.ones_like(tokens))


@pytest.mark.parametrize(("prefix", "seq_len"), [(0, 127), (1, 128), (200, 300)])
def test_a_sequence_too_short_for_its_grid_is_refused(prefix, seq_len):
    with pytest.raises(
        ValueError, match=rf"\(1, 8, 16\) has 128 video tokens .* prefix of {prefix}.* {seq_len} tokens"
    ):
        token_layout((1, 8, 16), prefix, seq_len, (8, 16), CPU)

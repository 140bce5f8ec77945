"""The Triton steps and kernel against the plain ones: compiled on a GPU, interpreted elsewhere."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from diffusers_draft.attention import ops
from diffusers_draft.attention.block_mask import BlockMask
from diffusers_draft.attention.correct import Correction
from diffusers_draft.attention.draft import draft_map
from diffusers_draft.attention.draft import value as value_score
from diffusers_draft.attention.kernels import probe, reference
from diffusers_draft.attention.kernels import triton_lists as triton_kernel
from diffusers_draft.attention.layout import TokenLayout, token_layout
from diffusers_draft.attention.method import Budget, Method
from diffusers_draft.attention.steps import fused, plain
from diffusers_draft.attention.steps.fused_exact import exact_parts, merged
from diffusers_draft.attention.steps.fused_fit import MOST_PROBES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDING = 0.01 if DEVICE.type == "cuda" else 2e-3
"""Relative, of scores: products are in TF32 on a GPU, and those of values in float16 everywhere."""


def tokens(batch: int, seq_len: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, seq_len, heads, head_dim, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


def a_layout(num_video: int, num_anchors: int, block: int = 16) -> TokenLayout:
    """A layout of which only the sizes are read."""
    nothing = torch.empty(0)
    blocks = num_video + num_anchors
    return TokenLayout((1, 1, 1), 0, nothing, nothing, blocks * block, block, blocks, num_video)


@pytest.mark.parametrize("head_dim", [40, 64, 96, 128])
@pytest.mark.parametrize("tile", [(8, 16), (4, 4), (3, 16), (2, 4, 4)])
def test_order_and_restore(head_dim: int, tile: tuple[int, ...]) -> None:
    x = tokens(2, 2 * 13 * 7 + 45, 3, head_dim)
    layout = token_layout((2, 13, 7), 5, x.shape[1], tile, DEVICE)
    ordered, means = fused.order(x, layout)
    expected, expected_means = plain.order(x, layout)
    assert torch.equal(ordered, expected)
    torch.testing.assert_close(means, expected_means, rtol=1e-5, atol=1e-6)
    assert torch.equal(fused.restore(ordered, layout), x)
    assert fused.order(x, layout, average=False)[1] is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_order_takes_any_strides(dtype: torch.dtype) -> None:
    layout = token_layout((1, 9, 8), 0, 80, (4, 4), DEVICE)
    base = tokens(2, 80, 6, 64, dtype)
    views = [base[:, :, ::2], base.transpose(1, 2).contiguous().transpose(1, 2), base[..., 1::2], base[1:]]
    for view in views:
        assert torch.equal(fused.order(view, layout)[0], plain.order(view, layout)[0])


@settings(max_examples=10)
@given(
    maps=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    num_video=st.integers(1, 40),
    num_anchors=st.integers(0, 5),
    sparsity=st.floats(0, 0.97),
    budget=st.sampled_from(["head", "row"]),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_select_keeps_the_pairs_that_plain_select_keeps(maps, num_video, num_anchors, sparsity, budget, seed, data):
    generator = torch.Generator().manual_seed(seed)
    means = [torch.randn(*maps, num_video, 24, generator=generator).to(DEVICE) for _ in range(2)]
    layout = a_layout(num_video, num_anchors)
    kv_len = None
    if num_anchors:
        lengths = data.draw(st.lists(st.integers(num_video * 16, layout.seq_len), min_size=maps[0], max_size=maps[0]))
        kv_len = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    mask = fused.select(*means, None, 0.3, sparsity, budget, layout, kv_len)
    expected = plain.select(*means, None, 0.3, sparsity, budget, layout, kv_len)
    assert_same_choice(mask, expected, draft_map(*means, 0.3), budget)
    for indices, count in zip(mask.kv_indices.flatten(0, 2), mask.kv_num_blocks.flatten(), strict=True):
        assert (indices[:count].diff() > 0).all()


@pytest.mark.parametrize("budget", ["head", "row"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_ties_do_not_change_the_count(budget: str, sparsity: float) -> None:
    means = torch.ones(2, 2, 13, 16, device=DEVICE)
    mask = fused.select(means, means, None, 0.25, sparsity, budget, a_layout(13, 2), None)
    kept = mask.to_dense()[:, :, :13, :13]
    expected = max(13, round((1 - sparsity) * 169)) if budget == "head" else 13 * max(1, round((1 - sparsity) * 13))
    assert (kept.sum((-1, -2)) == expected).all()
    assert kept.diagonal(dim1=-2, dim2=-1).all()


@pytest.mark.parametrize("budget", ["head", "row"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["query", "key", "value", "all of it"])
def test_numbers_that_are_none_do_not_change_the_count(where: str, wrong: float, budget: str) -> None:
    """A list that grew too long would be written over its neighbours."""
    means = {name: tokens(1, 2, 19, 24).clone() for name in ("query", "key", "value")}
    if where == "all of it":
        means["query"][:, 1] = wrong
    else:
        means[where][0, 1, 3, 5] = wrong
    for value in (None, means["value"]):
        mask = fused.select(means["query"], means["key"], value, 0.3, 0.7, budget, a_layout(19, 2), None)
        expected = plain.select(means["query"], means["key"], value, 0.3, 0.7, budget, a_layout(19, 2), None)
        assert torch.equal(mask.kv_num_blocks.sum(-1), expected.kv_num_blocks.sum(-1))
        assert mask.kv_indices.gather(-1, mask.kv_num_blocks[..., None].long() - 1).max() == 20
        assert mask.to_dense().diagonal(dim1=-2, dim2=-1).all()


@pytest.mark.parametrize("gap", [8, 12, 14, 16, 24, 40])
def test_the_one_block_that_a_row_looks_at_is_kept_by_value(gap: float) -> None:
    looked_at = torch.roll(torch.arange(32, device=DEVICE), 7)
    code = torch.linalg.qr(tokens(1, 1, 32, 32).double())[0].float().contiguous()
    values = tokens(1, 1, 32, 32).flip(-1)
    mask = fused.select(gap * code, code[:, :, looked_at], values, 1.0, 0.9, "row", a_layout(32, 0), None)
    kept = mask.to_dense()[0, 0]
    assert all(kept[row, column] for column, row in enumerate(looked_at.tolist()))


def test_select_in_parts_equals_select_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    means = [tokens(2, 3, 11, 16) for _ in range(2)]
    whole = fused.select(*means, None, 0.2, 0.6, "head", a_layout(11, 1), None)
    monkeypatch.setattr("diffusers_draft.attention.steps.fused_select.MAX_SCORES", 2 * 11 * 11)
    parts = fused.select(*means, None, 0.2, 0.6, "head", a_layout(11, 1), None)
    assert torch.equal(whole.to_dense(), parts.to_dense())


# Blocks of 32 run whole, larger ones in parts: interpreted, the kernel has one configuration with parts of 32 keys.
@pytest.mark.parametrize("block", [32, 64, 128] if DEVICE.type == "cpu" else [64, 128])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_kernel_equals_reference(block: int, head_dim: int) -> None:
    dtype = torch.float32 if DEVICE.type == "cpu" else torch.float16
    query, key, value, mask = probe._problem(DEVICE, dtype, head_dim, block)
    expected = reference.forward(query.float(), key.float(), value.float(), mask, head_dim**-0.5)
    lse = torch.full((2, 2, query.shape[1]), float("nan"), device=DEVICE)
    out = triton_kernel.forward(query, key, value, mask, head_dim**-0.5, lse=lse)
    assert (out.float() - expected).norm() / expected.norm() < (1e-5 if DEVICE.type == "cpu" else 2e-3)
    weights_sum = _log_sum_exp(query.float(), key.float(), mask, head_dim**-0.5)
    torch.testing.assert_close(lse, weights_sum, rtol=1e-3, atol=1e-3)


def _log_sum_exp(query: Tensor, key: Tensor, mask, scale: float) -> Tensor:
    token = torch.arange(mask.seq_len, device=query.device)
    kept = mask.to_dense()[:, :, token // mask.block][..., token // mask.block]
    kept = kept & (token < mask.kv_len[:, None])[:, None, None, :]
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
    return scores.masked_fill(~kept, float("-inf")).logsumexp(-1)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "block", "reason"),
    [
        ("cpu", torch.float16, 64, 128, "needs a GPU"),
        ("cuda", torch.float32, 64, 128, "needs float16 or bfloat16"),
        ("cuda", torch.float16, 64, 48, "needs blocks of 64 or 128"),
        ("cuda", torch.float16, 256, 128, "needs head_dim up to 128"),
    ],
)
def test_triton_says_why_it_cannot_run(device, dtype, head_dim, block, reason) -> None:
    assert reason in triton_kernel.refusal(torch.device(device), dtype, head_dim, block)


@settings(max_examples=10)
@given(
    maps=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    num_video=st.integers(1, 80),
    head_dim=st.sampled_from([16, 24, 96]),
    sparsity=st.floats(0, 0.97),
    budget=st.sampled_from(["head", "row"]),
    shift=st.sampled_from([0.0, 10.0]),
    seed=st.integers(0, 9),
)
def test_select_by_value_keeps_what_plain_select_keeps(maps, num_video, head_dim, sparsity, budget, shift, seed):
    """Also where all values share a large mean, which must not drown their distances."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(*maps, num_video, head_dim, generator=generator).to(DEVICE) for _ in range(3))
    layout = a_layout(num_video, 2)
    how = 0.3, sparsity, budget, layout, None
    mask, expected = (steps.select(query, key, value + shift, *how) for steps in (fused, plain))
    assert_same_choice(mask, expected, value_score(draft_map(query, key, 0.3), value), budget)


def assert_same_choice(mask: BlockMask, expected: BlockMask, scores: Tensor, budget: str) -> None:
    """As many pairs are kept, and none is kept in place of one whose score is higher by more than rounding."""
    n = mask.num_video_blocks
    kept, others = mask.to_dense()[:, :, :n, :n], expected.to_dense()
    over = (-1, -2) if budget == "head" else (-1,)
    assert torch.equal(mask.to_dense().sum(over), others.sum(over))
    assert torch.equal(mask.to_dense()[:, :, n:], others[:, :, n:]) and torch.equal(
        mask.to_dense()[..., n:], others[..., n:]
    )
    assert kept.diagonal(dim1=-2, dim2=-1).all()
    own = torch.eye(n, dtype=torch.bool, device=kept.device)
    least = scores.masked_fill(~kept | own, float("inf")).amin(over)
    most = scores.masked_fill(kept, 0.0).amax(over)
    assert (least >= most * (1 - ROUNDING)).all()


@pytest.mark.parametrize("budget", ["head", "row"])
def test_values_that_are_all_the_same_leave_the_choice_to_ties(budget: str) -> None:
    query, key = (tokens(2, 3, 13, 16).clone() for _ in range(2))
    mask = fused.select(query, key, torch.ones_like(key), 0.25, 0.5, budget, a_layout(13, 2), None)
    kept = mask.to_dense()[:, :, :13, :13]
    expected = round(0.5 * 169) if budget == "head" else 13 * round(0.5 * 13)
    assert (kept.sum((-1, -2)) == expected).all() and kept.diagonal(dim1=-2, dim2=-1).all()


@pytest.mark.parametrize("head_dim", [40, 64, 128])
@pytest.mark.parametrize("rows", [1, 7, 64, 100])
@pytest.mark.parametrize("lengths", [None, (300, 201)])
def test_exact_rows(head_dim: int, rows: int, lengths: tuple[int, int] | None) -> None:
    query, key, value = (tokens(2, 300, 3, head_dim) * factor for factor in (2, 1, 3))
    kv_len = None if lengths is None else torch.tensor(lengths, device=DEVICE)
    if kv_len is not None:
        key, value = key.clone(), value.clone()
        key[1, 201:] = value[1, 201:] = float("nan")
    how = query[:, :rows], key, value, kv_len, head_dim**-0.5
    torch.testing.assert_close(merged(*exact_parts(*how)), plain.attend_to_valid(*how), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head_dim", [40, 64, 128])
@pytest.mark.parametrize("probes", [1, 7, 64, MOST_PROBES + 13])
@pytest.mark.parametrize("lengths", [None, (300, 201)])
def test_the_fit_is_that_of_the_plain_steps(head_dim: int, probes: int, lengths: tuple[int, int] | None) -> None:
    """One head is fitted, one is shifted, and one is exact and left alone."""
    query, key, value = (tokens(2, 300, 3, head_dim) * factor for factor in (2, 1, 3))
    kv_len = None if lengths is None else torch.tensor(lengths, device=DEVICE)
    if kv_len is not None:
        key[1, 201:] = value[1, 201:] = float("nan")
    rows = torch.arange(probes, device=DEVICE) * (200 // probes)
    out = plain.attend_to_valid(query, key, value, kv_len, head_dim**-0.5)
    noise = tokens(2, 300, 3, head_dim).flip(1, 3) * out.std()
    out[:, :, 0] *= 0.7
    out[:, :, 1] = out[:, :, 1] + 2 * out.std() + 0.1 * noise[:, :, 1]
    how = out.transpose(1, 2).contiguous().transpose(1, 2), rows, query, key, value, kv_len, head_dim**-0.5
    found, expected = fused.correct(*how), plain.correct(*how)
    torch.testing.assert_close(found.squares, expected.squares, rtol=1e-3, atol=0)
    torch.testing.assert_close(found.matrix, expected.matrix, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.offset, expected.offset, rtol=1e-3, atol=1e-3)
    if probes > 7:
        assert found.matrix[:, 0].any() and not found.matrix[:, 1].any() and found.offset[:, 1].any()


def test_a_head_of_constant_output_is_shifted() -> None:
    query, key, value = tokens(1, 96, 2, 16), tokens(1, 96, 2, 16).flip(1), torch.ones(1, 96, 2, 16, device=DEVICE)
    out, rows = torch.full_like(value, 0.5), torch.arange(0, 96, 3, device=DEVICE)
    how = out, rows, query, key, value, None, 0.25
    found, expected = fused.correct(*how), plain.correct(*how)
    assert not found.matrix.any() and not expected.matrix.any()
    torch.testing.assert_close(found.offset, torch.full_like(found.offset, 0.5), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.offset, expected.offset, rtol=1e-4, atol=1e-4)


def test_a_corrected_output_stays_in_the_range_of_float16() -> None:
    x = tokens(1, 64, 1, 16, torch.float16).clamp(-1, 1) * 6e4
    layout = token_layout((1, 8, 8), 0, 64, (4, 8), DEVICE)
    correction = Correction(torch.eye(16, device=DEVICE).expand(1, 1, 16, 16).contiguous(),
                            torch.zeros(1, 1, 16, device=DEVICE), torch.zeros(3))  # fmt: skip
    for steps in (plain, fused):
        found = steps.restore(plain.order(x, layout)[0], layout, correction)
        assert found.isfinite().all() and found.abs().max() == 65504
        broken = plain.order(x, layout)[0].clone()
        broken[0, 0, 0, 0] = float("nan")
        assert steps.restore(broken, layout, correction).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter has no products of bfloat16
@pytest.mark.parametrize("head_dim", [40, 64, 128])
@pytest.mark.parametrize("tile", [(4, 4), (2, 4, 4)])
def test_restore_corrects_the_video_blocks(head_dim: int, tile: tuple[int, ...], dtype: torch.dtype) -> None:
    x = tokens(2, 2 * 13 * 7 + 45, 3, head_dim, dtype)
    layout = token_layout((2, 13, 7), 5, x.shape[1], tile, DEVICE)
    matrix, offset = 0.3 * tokens(2, head_dim, 3, head_dim).transpose(1, 2), tokens(2, 3, 1, head_dim)[:, :, 0]
    correction = Correction(matrix.contiguous(), offset.contiguous(), torch.zeros(3))
    found = fused.restore(plain.order(x, layout)[0], layout, correction)
    expected = plain.restore(plain.order(x, layout)[0], layout, correction)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    anchors = layout.order[layout.num_video_blocks * layout.block :]
    assert torch.equal(found[:, anchors], x[:, anchors])


@pytest.mark.parametrize("budget", ["head", "row"])
@pytest.mark.parametrize("lengths", [None, (255, 222)])
def test_a_whole_call_with_the_defaults(
    budget: Budget, lengths: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output, computed pairs and measured errors are those of the plain steps, also where a head is left alone."""
    query, key, value = (tokens(2, 2 * 13 * 7 + 73, 3, 40) * factor for factor in (2, 1, 3))
    value = value.flip(1) + 1
    query[:, :, 2] *= 0.1  # nearly a mean over all values, of which the sparse output sees a part
    kv_len = None if lengths is None else torch.tensor(lengths, device=DEVICE)
    method = Method(tile=(2, 2, 4), budget=budget, probes=20, backend="torch")
    arguments = torch.tensor([2, 13, 7, 5]), kv_len, torch.tensor([0.6, 3], dtype=torch.float64), method.to_tensor()
    found = []
    for steps in (plain, fused):
        monkeypatch.setattr("diffusers_draft.attention.call.steps_for", lambda *_, steps=steps: steps)
        found.append(ops.attend(query, key, value, *arguments))
    expected, ours = found
    valid = slice(None) if lengths is None else slice(min(lengths))
    assert (ours.out - expected.out)[:, valid].norm() / expected.out[:, valid].norm() < 2e-5
    assert torch.equal(ours.pairs, expected.pairs) and torch.equal(ours.facts, expected.facts)
    torch.testing.assert_close(ours.squares, expected.squares, rtol=1e-4, atol=0)
    before, after, _ = ours.squares.tolist()
    assert after < before

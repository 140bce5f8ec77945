"""The correction and the value score against oracles in float64, and what must hold where a correction cannot help."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import models
import oracle
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from diffusers_draft import draft_attention
from diffusers_draft.attention import kernels, ops
from diffusers_draft.attention.call import Call
from diffusers_draft.attention.correct import Correction, fit, probe_rows
from diffusers_draft.attention.layout import token_layout
from diffusers_draft.attention.method import Method
from diffusers_draft.attention.steps import plain

pytestmark = pytest.mark.usefixtures("nan_memory")

CPU = torch.device("cpu")
FLOAT32_ERROR = 2e-6
FIT_ERROR = 2e-5
"""Of a corrected output in float32: the system of the fit has a condition of up to a thousand."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    grid: tuple[int, int, int]
    prefix: int = 0
    suffix: int = 0
    padding: tuple[int | None, ...] = (None,)
    """Padded tokens at the end of each sample; None for a call without `kv_len`."""
    heads: int = 2
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    sparsity: float = 0.6
    budget: str = "row"
    score: str = "value"
    probes: int = 64
    tile: tuple[int, ...] = (2, 4, 4)
    seed: int = 0

    @property
    def seq_len(self) -> int:
        return self.prefix + math.prod(self.grid) + self.suffix

    @property
    def block(self) -> int:
        return math.prod(self.tile)

    @property
    def num_video(self) -> int:
        return math.prod(self.grid) // self.block

    @property
    def kv_len(self) -> Tensor | None:
        if None in self.padding:
            return None
        return torch.tensor([self.seq_len - padding for padding in self.padding])

    @property
    def options(self) -> dict[str, Any]:
        names = ("sparsity", "prefix", "tile", "budget", "score", "probes")
        return {name: getattr(self, name) for name in names} | {"kv_len": self.kv_len}

    @property
    def order(self) -> Tensor:
        return oracle.block_order(self.grid, self.prefix, self.seq_len, self.tile)

    @property
    def rows(self) -> Tensor:
        return probe_rows(self.num_video * self.block, self.probes, 0, CPU)

    def tensors(self) -> list[Tensor]:
        """Attention that lies on a few keys; values of padded tokens and their keys are NaN."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (len(self.padding), self.seq_len, self.heads, self.head_dim)
        query, key, value = (torch.randn(shape, generator=generator) for _ in range(3))
        value = value + torch.randn(self.heads, self.head_dim, generator=generator)
        if self.kv_len is not None:
            for sample, length in enumerate(self.kv_len.tolist()):
                key[sample, length:] = value[sample, length:] = torch.nan
        return [tensor.to(self.dtype) for tensor in (1.5 * query, key, value)]


@st.composite
def cases(draw: st.DrawFn, **fixed: Any) -> Case:
    frames, rows = draw(st.integers(1, 5)), draw(st.integers(1, 19))
    text = draw(st.integers(0, 70))
    prefix = draw(st.integers(0, text))
    batch = draw(st.integers(1, 3))
    padding = st.integers(0, text - prefix)
    options: dict[str, Any] = dict(
        grid=(frames, rows, draw(st.integers(1, max(1, 600 // (frames * rows))))),
        prefix=prefix,
        suffix=text - prefix,
        padding=draw(st.one_of(st.just((None,) * batch), st.tuples(*[padding] * batch))),
        heads=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([8, 16, 24, 40])),
        sparsity=draw(st.sampled_from([0.9, 0.75, 0.5]) | st.floats(0, 0.97)),
        budget=draw(st.sampled_from(["row", "head"])),
        score=draw(st.sampled_from(["value", "mass"])),
        probes=draw(st.sampled_from([0, 1, 5, 64, 1000])),
        tile=draw(st.sampled_from([(2, 4, 4), (4, 4), (4, 8), (2, 2, 4)])),
        seed=draw(st.integers(0, 2**16)),
    )
    return Case(**options | fixed)


DEFAULTS = Case(grid=(3, 13, 17), padding=(None, None))
PADDED = Case(grid=(2, 11, 23), prefix=5, suffix=40, padding=(40, 3, 0), budget="head", tile=(4, 8))
FEW_PROBES = Case(grid=(4, 9, 14), prefix=3, suffix=9, padding=(9, 0), probes=5, score="mass", seed=10)
MORE_PROBES_THAN_ROWS = Case(grid=(1, 9, 14), suffix=33, padding=(7,), probes=1000, tile=(4, 4), sparsity=0.8)
ONE_PROBE = Case(grid=(1, 16, 24), probes=1)
LESS_THAN_A_BLOCK = Case(grid=(1, 3, 5), prefix=6, suffix=4, padding=(4,))
EXAMPLES = (DEFAULTS, PADDED, FEW_PROBES, MORE_PROBES_THAN_ROWS, ONE_PROBE, LESS_THAN_A_BLOCK)


def examples(test: Any) -> Any:
    for case in EXAMPLES:
        test = example(case=case)(test)
    return test


@contextlib.contextmanager
def spying() -> Iterator[list[Any]]:
    """Collects the block masks that kernels get."""
    masks: list[Any] = []
    with mock.patch.object(kernels, "choose", models.recording(masks)):
        yield masks


def attend(case: Case, tensors: list[Tensor], **options: Any) -> tuple[Tensor, Any]:
    with spying() as masks:
        out = draft_attention(*tensors, case.grid, **case.options | options)
    return out, masks[0]


def skips(mask: Any) -> bool:
    """Whether a block mask leaves out any pair of video blocks."""
    lists = oracle.listed(mask)
    num_video = mask.num_video_blocks
    return any(sum(c < num_video for c in row) < num_video for h in lists for rows in h for row in rows[:num_video])


def sizes(out: Tensor, expected: Tensor) -> Tensor:
    """`(B, H)` relative error of each head."""
    difference = (out.double() - expected).square().sum((1, 3)).sqrt()
    return difference / expected.square().sum((1, 3)).sqrt().clamp(min=1e-30)


# The whole call


@given(case=cases())
@examples
def test_output_equals_the_oracle_s_correction(case: Case) -> None:
    tensors = case.tensors()
    out, mask = attend(case, tensors)
    rows = case.rows if skips(mask) else case.rows[:0]
    expected, fits = oracle.corrected_attention(*tensors, mask, case.order, rows)
    assert out.shape == tensors[0].shape and out.dtype == case.dtype and out.is_contiguous()
    decided = torch.tensor([[not found.is_close_call for found in of_heads] for of_heads in fits], dtype=torch.bool)
    found = sizes(out, expected)
    assert (found <= FIT_ERROR)[decided if fits else ...].all()
    others = case.order[mask.num_video_blocks * mask.block :]
    dense = oracle.length_mask(len(case.padding), case.heads, case.seq_len, case.kv_len)
    clean = [tensors[0], *(tensor.nan_to_num() for tensor in tensors[1:])]
    if len(others):
        anchors = oracle.attention(*clean, dense)[:, others]
        assert oracle.error(out[:, others], anchors) <= FLOAT32_ERROR


@pytest.mark.parametrize("case", [DEFAULTS, PADDED, MORE_PROBES_THAN_ROWS], ids=range(3))
def test_the_correction_corrects(case: Case) -> None:
    """The cases above are no empty promise: heads are corrected, and come closer to exact attention."""
    tensors = case.tensors()
    out, mask = attend(case, tensors)
    plainly, _ = attend(case, tensors, probes=0)
    _, fits = oracle.corrected_attention(*tensors, mask, case.order, case.rows)
    assert all(found.helps for of_heads in fits for found in of_heads)
    clean = [tensors[0], *(tensor.nan_to_num() for tensor in tensors[1:])]
    dense = oracle.length_mask(len(case.padding), case.heads, case.seq_len, case.kv_len)
    exact = oracle.attention(*clean, dense)
    assert oracle.error(out, exact) < 0.95 * oracle.error(plainly, exact)


@pytest.mark.parametrize("scale", [0.05, 1.0])
def test_scale_reaches_the_exact_rows(scale: float) -> None:
    tensors = PADDED.tensors()
    out, mask = attend(PADDED, tensors, scale=scale)
    expected, fits = oracle.corrected_attention(*tensors, mask, PADDED.order, PADDED.rows, scale)
    assert any(found.helps for of_heads in fits for found in of_heads)
    assert oracle.error(out, expected) <= FIT_ERROR


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [DEFAULTS, FEW_PROBES], ids=["defaults", "few probes"])
def test_half_precision_is_as_close_as_rounding_lets_it(case: Case, dtype: torch.dtype) -> None:
    """The tensors are the rounded ones in both; stock attention under the mask tells what rounding costs."""
    case = dataclasses.replace(case, dtype=dtype)
    tensors = case.tensors()
    out, mask = attend(case, tensors)
    assert out.dtype == dtype
    expected, _ = oracle.corrected_attention(*tensors, mask, case.order, case.rows)
    clean = [tensors[0], *(tensor.nan_to_num() for tensor in tensors[1:])]
    token_mask = oracle.token_mask(mask, case.order)
    stock = scaled_dot_product_attention(*(t.transpose(1, 2) for t in clean), attn_mask=token_mask).transpose(1, 2)
    rounding = oracle.error(stock, oracle.attention(*clean, token_mask))
    assert oracle.error(out, expected) <= 4 * rounding


@given(case=cases(score="value", probes=0))
@examples
def test_kept_pairs_are_the_best_by_value(case: Case) -> None:
    query, key, value = case.tensors()
    _, mask = attend(case, [query, key, value], score="value")
    num_video = case.num_video
    draft = oracle.draft_map(query, key, case.order, num_video, case.block, case.head_dim**-0.5)
    all_scores = oracle.value_scores(draft, value, case.order, case.block)
    others = ~torch.eye(num_video, dtype=torch.bool)
    for maps, heads in zip(all_scores, oracle.listed(mask), strict=True):
        for scores, rows in zip(maps, heads, strict=True):
            kept = torch.zeros(num_video, num_video, dtype=torch.bool)
            for index, row in enumerate(rows[:num_video]):
                kept[index, [column for column in row if column < num_video]] = True
            assert kept.sum() == oracle.number_of_pairs(num_video, case.sparsity, case.budget)
            contests = [(scores, kept, others)]
            if case.budget == "row":
                contests = list(zip(scores, kept, others, strict=True))
            for score, keep, other in contests:
                worst_kept, best_dropped = score[keep & other], score[~keep]
                if len(worst_kept) and len(best_dropped):
                    assert worst_kept.min() >= best_dropped.max() * (1 - 1e-4) - 1e-6 * score.max()


def test_the_scores_differ() -> None:
    """A block whose mean value is that of the output costs nothing by value, however much mass it has."""
    tensors = DEFAULTS.tensors()
    masks = [attend(DEFAULTS, tensors, score=score)[1] for score in ("value", "mass")]
    assert oracle.listed(masks[0]) != oracle.listed(masks[1])


def test_value_scores_equal_the_oracle_s() -> None:
    tensors = DEFAULTS.tensors()
    call = order(DEFAULTS, tensors)
    draft = oracle.draft_map(*tensors[:2], DEFAULTS.order, DEFAULTS.num_video, DEFAULTS.block, DEFAULTS.head_dim**-0.5)
    expected = oracle.value_scores(draft, tensors[2], DEFAULTS.order, DEFAULTS.block)
    assert oracle.error(call.scores(), expected) <= FLOAT32_ERROR


def order(case: Case, tensors: list[Tensor]) -> Call:
    names = ("score", "probes", "budget", "tile")
    method = Method(**{name: getattr(case, name) for name in names})
    return Call.order(*tensors, torch.tensor([*case.grid, case.prefix]), case.kv_len, method)


# Probes


@given(rows=st.integers(0, 5000), probes=st.integers(0, 200), number=st.integers(0, 2**31))
def test_probes_lie_one_in_each_stretch(rows: int, probes: int, number: int) -> None:
    found = probe_rows(rows, probes, number, CPU).tolist()
    count = min(rows, probes)
    assert len(found) == count
    for index, row in enumerate(found):
        assert index * rows // count <= row < (index + 1) * rows // count


def test_the_steps_of_a_run_look_at_other_rows() -> None:
    """Neighbours share no row, and fifty steps look at nearly every row there is."""
    of_steps = [probe_rows(2048, 64, number, CPU).tolist() for number in range(50)]
    for one, next_one in itertools.pairwise(of_steps):
        assert not set(one) & set(next_one)
    assert len(set().union(*of_steps)) >= 0.9 * 2048


def test_other_step_numbers_look_at_other_rows() -> None:
    tensors = DEFAULTS.tensors()
    outs = [attend_numbered(DEFAULTS, tensors, number) for number in (0, 0, 1)]
    assert torch.equal(outs[0].out, outs[1].out) and torch.equal(outs[0].squares, outs[1].squares)
    assert not torch.equal(outs[0].out, outs[2].out) and not torch.equal(outs[0].squares, outs[2].squares)


def attend_numbered(case: Case, tensors: list[Tensor], number: int, **changes: Any) -> ops.Attended:
    """As a transformer's layers call it."""
    case = dataclasses.replace(case, **changes)
    method = Method(score=case.score, probes=case.probes, budget=case.budget, tile=case.tile)
    numbers = torch.tensor([case.sparsity, number], dtype=torch.float64)
    geometry = torch.tensor([*case.grid, case.prefix])
    return ops.attend(*tensors, geometry, case.kv_len, numbers, method.to_tensor())


@pytest.mark.parametrize("case", EXAMPLES, ids=range(len(EXAMPLES)))
def test_the_same_call_twice_is_the_same_bit_for_bit(case: Case) -> None:
    tensors = case.tensors()
    state = torch.get_rng_state()
    outs = [draft_attention(*tensors, case.grid, **case.options) for _ in range(2)]
    valid = slice(None) if case.kv_len is None else slice(int(case.kv_len.min()))
    assert torch.equal(outs[0][:, valid], outs[1][:, valid])
    assert torch.equal(torch.get_rng_state(), state)


@given(case=cases(), number=st.integers(0, 100))
@example(case=DEFAULTS, number=1)
@example(case=PADDED, number=7)
@example(case=MORE_PROBES_THAN_ROWS, number=0)
def test_squares_equal_the_oracle_s(case: Case, number: int) -> None:
    tensors = case.tensors()
    attended = attend_numbered(case, tensors, number)
    _, mask = attend(case, tensors)
    if not skips(mask) or not case.probes:
        assert not attended.squares.any()
        return
    rows = probe_rows(case.num_video * case.block, case.probes, number, CPU)
    _, fits = oracle.corrected_attention(*tensors, mask, case.order, rows)
    heads = [found for of_heads in fits for found in of_heads]
    before, after, whole = attended.squares.tolist()
    assert whole == pytest.approx(sum(found.whole for found in heads), rel=1e-5)
    assert before == pytest.approx(sum(found.before for found in heads), rel=1e-4, abs=1e-9 * whole)
    least = sum(min(found.after, found.before) if found.helps else found.before for found in heads)
    assert after == pytest.approx(least, rel=2e-3, abs=1e-9 * whole)
    assert after <= before * (1 + 1e-6)


# The fit


@given(
    shape=st.tuples(st.integers(1, 2), st.sampled_from([2, 3, 5, 17, 64]), st.integers(1, 3), st.integers(1, 40)),
    mean=st.sampled_from([0.0, 1.0, 30.0]),
    slope=st.sampled_from([0.0, 0.3]),
    noise=st.sampled_from([0.01, 0.3]),
    seed=st.integers(0, 2**16),
)
def test_fit_equals_the_primal_form(
    shape: tuple[int, int, int, int], mean: float, slope: float, noise: float, seed: int
) -> None:
    """The library solves a system of the probes, the oracle one of the dimensions."""
    generator = torch.Generator().manual_seed(seed)
    sparse = torch.randn(shape, generator=generator) + mean
    mixing = torch.randn(shape[-1], shape[-1], generator=generator) / shape[-1] ** 0.5
    exact = sparse + slope * (sparse - mean) @ mixing + noise * torch.randn(shape, generator=generator) + slope
    found = fit(sparse, exact)
    for sample, of_heads in enumerate(oracle.correction(sparse, exact)):
        for head, expected in enumerate(of_heads):
            assume(not expected.is_close_call)
            rows = sparse[sample, :, head].double()
            matrix, offset = found.matrix[sample, head].double(), found.offset[sample, head].double()
            if not expected.helps:
                assert not matrix.any() and not offset.any()
                continue
            assert oracle.error(rows + rows @ matrix + offset, expected.apply(rows)) <= FIT_ERROR
            assert oracle.error(matrix, expected.matrix) <= 1e-3


def test_fit_takes_a_call_s_dtype() -> None:
    generator = torch.Generator().manual_seed(0)
    sparse = torch.randn(1, 64, 2, 16, generator=generator).bfloat16()
    exact = torch.randn(1, 64, 2, 16, generator=generator)
    found = fit(sparse, exact)
    assert found.matrix.dtype == found.offset.dtype == found.squares.dtype == torch.float32
    assert [found.matrix.shape, found.offset.shape, found.squares.shape] == [(1, 2, 16, 16), (1, 2, 16), (3,)]


# The guard


def helpful_and_harmful() -> tuple[Tensor, Tensor]:
    """Probes of two heads: what the first lacks is linear in what it has, what the second lacks is noise."""
    generator = torch.Generator().manual_seed(0)
    sparse = torch.randn(1, 64, 2, 40, generator=generator)
    mixing = torch.randn(40, 40, generator=generator) / 40**0.5
    lacking = torch.stack([sparse[:, :, 0] @ mixing, torch.randn(1, 64, 40, generator=generator)], dim=2)
    return sparse, sparse + 0.5 * lacking


def test_a_fit_that_makes_it_worse_is_not_applied() -> None:
    """A fit of 40 dimensions to 64 probes of noise always looks better on its own probes; left out they show it."""
    sparse, exact = helpful_and_harmful()
    found = fit(sparse, exact)
    helps, harms = oracle.correction(sparse, exact)[0]
    assert helps.after < 0.3 * helps.before and harms.candidates[0] > 1.2 * harms.before
    on_its_own = sparse[0, :, 1].double() + (sparse[0, :, 1].double() - harms.mean) @ harms.regression + harms.shift
    assert (exact[0, :, 1] - on_its_own).square().sum() < 0.8 * harms.before
    assert found.matrix[0, 0].any() and found.offset[0, 0].any()
    assert not found.matrix[0, 1].any() and not found.offset[0, 1].any()
    before, after, whole = found.squares.tolist()
    assert before == pytest.approx(helps.before + harms.before, rel=1e-5)
    assert after == pytest.approx(helps.after + harms.before, rel=1e-3)
    assert whole == pytest.approx(helps.whole + harms.whole, rel=1e-5)


def test_a_regression_that_only_found_the_shift_is_not_applied() -> None:
    """Nearly constant probes lack one and the same, and noise: fitted to that, rows unlike them would be blown up."""
    generator = torch.Generator().manual_seed(0)
    sparse = 1 + 1e-3 * torch.randn(1, 64, 1, 64, generator=generator)
    exact = sparse + 1 + 0.3 * torch.randn(1, 64, 1, 64, generator=generator)
    found = fit(sparse, exact)
    assert not found.matrix.any()
    torch.testing.assert_close(found.offset[0, 0], (exact - sparse)[0, :, 0].mean(0))
    before, after, _ = found.squares.tolist()
    (expected,) = oracle.correction(sparse, exact)[0]
    assert expected.candidates[1] < expected.candidates[0] < expected.before
    assert (before, after) == pytest.approx((expected.before, expected.candidates[1]), rel=1e-4)


def test_a_head_that_is_left_alone_is_as_without_probes_bit_for_bit() -> None:
    """Exact rows are replaced where the call computes them, so that one head's fit helps and the other's does not."""
    case = dataclasses.replace(DEFAULTS, padding=(None,), head_dim=40)
    tensors = case.tensors()
    plainly = draft_attention(*tensors, case.grid, **case.options | {"probes": 0})
    video = case.order[: case.num_video * case.block]
    sparse = plainly[:, video][:, case.rows]
    generator = torch.Generator().manual_seed(0)
    exact = torch.stack([1.5 * sparse[:, :, 0], sparse[:, :, 1] + torch.randn(1, 64, 40, generator=generator)], dim=2)
    with mock.patch.object(plain, "attend_to_valid", lambda *_: exact):
        out = draft_attention(*tensors, case.grid, **case.options)
    assert torch.equal(out[:, :, 1], plainly[:, :, 1])
    helps, harms = oracle.correction(sparse, exact)[0]
    assert helps.helps and not harms.helps
    expected = plainly[:, :, 0].double()
    expected[0, video] = helps.apply(expected[0, video])
    assert oracle.error(out[:, :, 0], expected) <= FIT_ERROR
    assert not torch.equal(out[:, video, 0], plainly[:, video, 0])


@pytest.mark.parametrize("of", ["query", "key", "value"])
def test_nan_in_one_head_leaves_the_others_as_they_are(of: str) -> None:
    tensors = dict(zip(("query", "key", "value"), DEFAULTS.tensors(), strict=True))
    expected = draft_attention(*tensors.values(), DEFAULTS.grid, **DEFAULTS.options)
    tensors[of][0, 100, 1] = torch.nan
    out = draft_attention(*tensors.values(), DEFAULTS.grid, **DEFAULTS.options)
    assert not out[0, :, 1].isfinite().all()
    for sample, head in ((0, 0), (1, 0), (1, 1)):
        assert torch.equal(out[sample, :, head], expected[sample, :, head])


def test_one_probe_that_is_nan_leaves_its_head_alone() -> None:
    sparse, exact = helpful_and_harmful()
    exact[0, 7, 0, 3] = torch.nan
    found = fit(sparse, exact)
    assert not found.matrix.any() and not found.offset.any()


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1])
def test_a_constant_output_stays(constant: float) -> None:
    """All values are one: no dimension varies, and nothing is lacking."""
    query, key, value = DEFAULTS.tensors()
    value = torch.full_like(value, constant)
    out = draft_attention(query, key, value, DEFAULTS.grid, **DEFAULTS.options)
    torch.testing.assert_close(out, value, rtol=1e-6, atol=0)


def test_a_constant_output_that_lacks_something_stays_finite() -> None:
    sparse = torch.ones(2, 64, 3, 16)
    exact = sparse + torch.randn(2, 64, 3, 16, generator=torch.Generator().manual_seed(0))
    found = fit(sparse, exact)
    assert found.matrix.isfinite().all() and found.offset.isfinite().all() and found.squares.isfinite().all()
    assert found.squares[1] <= found.squares[0]


def test_a_dimension_without_variance_is_no_trouble() -> None:
    sparse, exact = helpful_and_harmful()
    sparse[..., 5] = 0.25
    found, (expected, _) = fit(sparse, exact), oracle.correction(sparse, exact)[0]
    assert expected.helps
    rows = sparse[0, :, 0].double()
    corrected = rows + rows @ found.matrix[0, 0].double() + found.offset[0, 0].double()
    assert oracle.error(corrected, expected.apply(rows)) <= FIT_ERROR


@pytest.mark.parametrize(
    "case",
    [
        Case(grid=(1, 5, 7), prefix=3, suffix=30, sparsity=0.9),
        Case(grid=(1, 4, 8), sparsity=0.9),
        LESS_THAN_A_BLOCK,
    ],
    ids=["one video block", "one video block and nothing else", "none"],
)
def test_where_nothing_is_left_out_probes_change_nothing(case: Case) -> None:
    tensors = case.tensors()
    out = draft_attention(*tensors, case.grid, **case.options)
    assert torch.equal(out, draft_attention(*tensors, case.grid, **case.options | {"probes": 0}))
    assert not attend_numbered(case, tensors, 3).squares.any()


def test_fewer_video_tokens_than_probes() -> None:
    """Two blocks of 32 rows, all of them probes: what is fitted is exactly what is there."""
    case = Case(grid=(1, 8, 9), suffix=11, sparsity=0.5, tile=(4, 8), probes=100, head_dim=8)
    assert case.num_video == 2 and len(case.rows) == 64
    tensors = case.tensors()
    out, mask = attend(case, tensors)
    expected, _ = oracle.corrected_attention(*tensors, mask, case.order, torch.arange(64))
    assert oracle.error(out, expected) <= FIT_ERROR


@given(case=cases(sparsity=0.0))
@examples
def test_without_sparsity_probes_and_score_change_nothing(case: Case) -> None:
    case = dataclasses.replace(case, sparsity=0.0)
    tensors = [tensor.nan_to_num() for tensor in case.tensors()]
    out = draft_attention(*tensors, case.grid, **case.options)
    for options in (dict(probes=0), dict(score="mass"), dict(score="value", probes=7)):
        assert torch.equal(out, draft_attention(*tensors, case.grid, **case.options | options))
    dense = oracle.length_mask(len(case.padding), case.heads, case.seq_len, case.kv_len)
    stock = scaled_dot_product_attention(*(t.transpose(1, 2) for t in tensors), attn_mask=dense).transpose(1, 2)
    assert oracle.error(out, stock.double()) <= FLOAT32_ERROR


def test_anchors_are_not_corrected() -> None:
    """Text and the video tokens behind the last full block: their rows are exact already."""
    case = PADDED
    tensors = case.tensors()
    out = draft_attention(*tensors, case.grid, **case.options)
    plainly = draft_attention(*tensors, case.grid, **case.options | {"probes": 0})
    video, others = case.order[: case.num_video * case.block], case.order[case.num_video * case.block :]
    assert len(others) > case.prefix + case.suffix
    assert torch.equal(out[:, others], plainly[:, others])
    assert not torch.equal(out[:, video], plainly[:, video])


# Gradients


@pytest.mark.parametrize("backend", kernels.WITH_BACKWARD)
@pytest.mark.parametrize("budget", ["head", "row"])
def test_gradients_take_the_fit_as_it_is(budget: str, backend: str) -> None:
    """The same forward with a fixed matrix and offset, in float64 by torch's own autograd."""
    case = Case(grid=(3, 13, 17), prefix=5, suffix=12, padding=(12, 3), probes=5, budget=budget)
    tensors = [tensor.nan_to_num().requires_grad_() for tensor in case.tensors()]
    fits: list[Correction] = []

    def recording(*arguments: Tensor) -> Correction:
        fits.append(fit(*arguments))
        return fits[-1]

    with mock.patch.object(plain, "fit", recording):
        out, mask = attend(case, tensors, backend=backend)
    matrix, offset = fits[0].matrix.double(), fits[0].offset.double()
    assert matrix.any() and not matrix.requires_grad
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).double()
    found = torch.autograd.grad((out * weight).sum(), tensors)

    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    dense = oracle.attention(*doubles, oracle.token_mask(mask, case.order))
    correction = torch.einsum("bshd,bhde->bshe", dense, matrix) + offset[:, None]
    in_video = torch.zeros(case.seq_len, 1, 1, dtype=torch.float64)
    in_video[case.order[: case.num_video * case.block]] = 1
    expected = torch.autograd.grad(((dense + in_video * correction) * weight).sum(), doubles)
    for ours, theirs in zip(found, expected, strict=True):
        assert oracle.error(ours, theirs) <= FIT_ERROR


def test_gradients_of_the_correction_are_not_those_without() -> None:
    case = Case(grid=(3, 13, 17), probes=5)
    grads = []
    for probes in (5, 0):
        tensors = [tensor.requires_grad_() for tensor in case.tensors()]
        out = draft_attention(*tensors, case.grid, **case.options | {"probes": probes})
        grads.append(torch.autograd.grad(out.square().sum(), tensors))
    assert all(oracle.error(one, other.double()) > 1e-3 for one, other in zip(*grads, strict=True))


def test_probes_lie_in_the_layout_s_video_blocks() -> None:
    """The rows that are looked at are those of `probe_rows`, in block order, with the prefix behind the video."""
    case = PADDED
    tensors = case.tensors()
    layout = token_layout(case.grid, case.prefix, case.seq_len, case.tile, CPU)
    call = order(case, tensors)
    seen: list[Tensor] = []

    def recording(query: Tensor, *rest: Any) -> Tensor:
        seen.append(query)
        return exact(query, *rest)

    exact = plain.attend_to_valid
    with mock.patch.object(plain, "attend_to_valid", recording):
        call.correct(call.attend(call.select(case.sparsity)), 9)
    rows = probe_rows(layout.num_video_blocks * layout.block, case.probes, 9, CPU)
    assert torch.equal(seen[0], tensors[0][:, case.order[rows]])


def test_some_heads_of_the_examples_are_corrected_and_some_are_not() -> None:
    tensors = FEW_PROBES.tensors()
    _, mask = attend(FEW_PROBES, tensors)
    _, fits = oracle.corrected_attention(*tensors, mask, FEW_PROBES.order, FEW_PROBES.rows)
    assert {found.helps for of_heads in fits for found in of_heads} == {True, False}

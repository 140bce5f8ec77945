import contextlib
import dataclasses
import math
from dataclasses import dataclass
from unittest import mock

import oracle
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from paper import draft_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from diffusers_draft.attention import kernels
from diffusers_draft.attention.correct import probe_rows
from diffusers_draft.attention.kernels import gather
from diffusers_draft.attention.layout import token_layout

pytestmark = pytest.mark.usefixtures("nan_memory")

FLOAT32_ERROR = 2e-6


@dataclass(frozen=True, kw_only=True)
class Case:
    grid: tuple[int, int, int]
    prefix: int = 0
    suffix: int = 0
    padding: tuple[int | None, ...] = (None,)
    """Padded tokens at the end of each sample; None for a call without `kv_len`."""
    heads: int = 1
    head_dim: int = 32
    dtype: torch.dtype = torch.float32
    sparsity: float = 0.75
    budget: str = "head"
    tile: tuple[int, ...] = (8, 16)
    seed: int = 0

    @property
    def seq_len(self) -> int:
        frames, rows, columns = self.grid
        return self.prefix + frames * rows * columns + self.suffix

    @property
    def block(self) -> int:
        return math.prod(self.tile)

    @property
    def num_video(self) -> int:
        return (self.seq_len - self.prefix - self.suffix) // self.block

    @property
    def kv_len(self) -> Tensor | None:
        if None in self.padding:
            return None
        return torch.tensor([self.seq_len - padding for padding in self.padding])

    @property
    def options(self) -> dict:
        names = ("sparsity", "prefix", "tile", "budget")
        return {name: getattr(self, name) for name in names} | {"kv_len": self.kv_len}

    @property
    def order(self) -> Tensor:
        return oracle.block_order(self.grid, self.prefix, self.seq_len, self.tile)

    def tensors(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (len(self.padding), self.seq_len, self.heads, self.head_dim)
        query, key, value = (torch.randn(shape, generator=generator) for _ in range(3))
        return [tensor.to(self.dtype) for tensor in (2 * query, key, value)]

    def integer_tensors(self) -> list[Tensor]:
        """Block means and draft scores of these are exact, whatever the order of the sums."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (len(self.padding), self.seq_len, self.heads, self.head_dim)
        return [torch.randint(-3, 4, shape, generator=generator).to(self.dtype) for _ in range(3)]


ODD_GRIDS = [(1, 30, 40), (2, 22, 26), (3, 19, 20), (1, 23, 47), (5, 8, 29), (1, 40, 29), (3, 7, 53), (4, 16, 16)]
SPARSITIES = [0.97, 0.9, 0.75, 0.5]


@st.composite
def grids(draw, max_video: int) -> tuple[int, int, int]:
    frames = draw(st.integers(1, 5))
    rows = draw(st.integers(1, 40))
    return frames, rows, draw(st.integers(1, min(60, max_video // (frames * rows))))


@st.composite
def cases(draw, max_video: int = 1200, max_heads: int = 2) -> Case:
    text = draw(st.integers(0, 300))
    prefix = draw(st.integers(0, text))
    batch = draw(st.integers(1, 3))
    padding = st.integers(0, text - prefix)
    return Case(
        grid=draw(st.sampled_from(ODD_GRIDS) | grids(max_video)),
        prefix=prefix,
        suffix=text - prefix,
        padding=draw(st.one_of(st.just((None,) * batch), st.tuples(*[padding] * batch))),
        heads=draw(st.integers(1, max_heads)),
        head_dim=draw(st.sampled_from([32, 64, 128])),
        dtype=draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        sparsity=draw(st.sampled_from(SPARSITIES) | st.floats(0, 0.97)),
        budget=draw(st.sampled_from(["head", "row"])),
        tile=draw(st.sampled_from([(4, 4), (4, 8), (8, 16), (16, 8), (2, 4, 4)])),
        seed=draw(st.integers(0, 2**16)),
    )


PAPER_TILES = Case(grid=(2, 16, 32), suffix=128, padding=(0, 128), sparsity=0.9)
WAN_480P = Case(grid=(2, 30, 52), sparsity=0.75, head_dim=64, dtype=torch.bfloat16)
WAN_5B_WITH_TEXT = Case(grid=(2, 22, 40), prefix=1, suffix=77, padding=(76, 3), sparsity=0.9)
PORTRAIT_PRIMES = Case(grid=(1, 37, 23), prefix=13, suffix=101, padding=(100, 0, 7), budget="row", tile=(4, 8))
LESS_THAN_A_BLOCK = Case(grid=(1, 7, 11), prefix=64, suffix=5, padding=(5,), sparsity=0.97)
ONE_TOKEN = Case(grid=(1, 1, 1), sparsity=0.5, budget="row")


def examples(test):
    for case in (PAPER_TILES, WAN_480P, WAN_5B_WITH_TEXT, PORTRAIT_PRIMES, LESS_THAN_A_BLOCK, ONE_TOKEN):
        test = example(case)(test)
    return test


@contextlib.contextmanager
def spying(forward=None):
    """Collects the `(query, key, value, mask, scale)` that kernels get; `forward` takes the kernel's place."""
    calls = []
    choose = kernels.choose

    def spy(*args):
        choice = choose(*args)

        def record(*call):
            calls.append(call)
            return (forward or choice.forward)(*call)

        return dataclasses.replace(choice, forward=record)

    with mock.patch.object(kernels, "choose", spy):
        yield calls


def attend(case: Case, tensors: list[Tensor], backend: str = "auto"):
    with spying() as calls:
        out = draft_attention(*tensors, case.grid, backend=backend, **case.options)
    return out, calls[0][3]


def selected(case: Case, tensors: list[Tensor]):
    """The block mask alone, without the attention."""
    with spying(forward=lambda query, *_: query) as calls:
        draft_attention(*tensors, case.grid, **case.options)
    return calls[0][3]


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def assert_exact(out: Tensor, tensors: list[Tensor], mask: Tensor) -> None:
    expected = oracle.attention(*tensors, mask)
    error = oracle.error(out, expected)
    if out.dtype == torch.float32:
        assert error <= FLOAT32_ERROR
    else:
        assert error <= 2 * oracle.error(sdpa(*tensors, mask), expected) + 1e-5


@given(case=cases())
@examples
def test_output_equals_the_oracle_under_the_library_s_own_mask(case):
    tensors = case.tensors()
    out, mask = attend(case, tensors)
    assert out.shape == tensors[0].shape
    assert out.dtype == case.dtype
    assert out.is_contiguous()
    assert_exact(out, tensors, oracle.token_mask(mask, case.order))


@given(case=cases(max_video=4000))
@examples
@example(Case(grid=(5, 40, 60), suffix=226, padding=(226, 1), sparsity=0.9, heads=2))
def test_mask_keeps_exactly_what_was_asked(case):
    mask = selected(case, case.tensors())
    num_video = case.num_video
    num_blocks = -(-case.seq_len // case.block)
    lengths = [case.seq_len] * len(case.padding) if case.kv_len is None else case.kv_len.tolist()
    assert (mask.seq_len, mask.block) == (case.seq_len, case.block)
    for length, heads in zip(lengths, oracle.listed(mask), strict=True):
        valid_blocks = -(-length // case.block)
        anchors = list(range(num_video, valid_blocks))
        for rows in heads:
            assert len(rows) == num_blocks
            video = [[column for column in row if column < num_video] for row in rows[:num_video]]
            for index, (row, columns) in enumerate(zip(rows[:num_video], video, strict=True)):
                assert row == sorted(set(columns)) + anchors
                assert index in columns
            assert sum(map(len, video)) == oracle.number_of_pairs(num_video, case.sparsity, case.budget)
            if case.budget == "row":
                assert {len(columns) for columns in video} <= {max(1, round((1 - case.sparsity) * num_video))}
            assert all(row == list(range(valid_blocks)) for row in rows[num_video:])


@given(case=cases())
@examples
def test_kept_pairs_are_the_best_of_the_draft_map(case):
    query, key, value = case.tensors()
    num_video = case.num_video
    mask = selected(case, [query, key, value])
    draft = oracle.draft_map(query, key, case.order, num_video, case.block, case.head_dim**-0.5)
    for maps, heads in zip(draft, oracle.listed(mask), strict=True):
        for scores, rows in zip(maps, heads, strict=True):
            kept = torch.zeros(num_video, num_video, dtype=torch.bool)
            for index, row in enumerate(rows[:num_video]):
                kept[index, [column for column in row if column < num_video]] = True
            others = ~torch.eye(num_video, dtype=torch.bool)
            contests = [(scores, kept, others)]
            if case.budget == "row":
                contests = list(zip(scores, kept, others, strict=True))
            for score, keep, other in contests:
                worst_kept, best_dropped = score[keep & other], score[~keep]
                if len(worst_kept) and len(best_dropped):
                    assert worst_kept.min() >= best_dropped.max() * (1 - 1e-5)


@given(case=cases())
@examples
def test_without_sparsity_it_is_dense_attention(case):
    case = dataclasses.replace(case, sparsity=0.0)
    tensors = case.tensors()
    batch, seq_len, heads, _ = tensors[0].shape
    mask = oracle.length_mask(batch, heads, seq_len, case.kv_len)
    out = draft_attention(*tensors, case.grid, **case.options)
    if case.dtype == torch.float32:
        assert oracle.error(out, sdpa(*tensors, mask).double()) <= FLOAT32_ERROR
    assert_exact(out, tensors, mask)


@given(case=cases(max_video=500))
@example(WAN_5B_WITH_TEXT)
@example(PORTRAIT_PRIMES)
def test_a_batch_equals_its_samples_one_by_one(case):
    tensors = case.integer_tensors()
    out, mask = attend(case, tensors)
    for sample, padding in enumerate(case.padding):
        alone = dataclasses.replace(case, padding=(padding,))
        out_alone, mask_alone = attend(alone, [tensor[sample : sample + 1] for tensor in tensors])
        assert oracle.listed(mask_alone) == oracle.listed(mask)[sample : sample + 1]
        assert oracle.error(out[sample : sample + 1], out_alone.double()) <= _rounding(case.dtype)


@given(case=cases(max_video=500, max_heads=4), shuffle=st.randoms(use_true_random=False))
def test_permuting_heads_permutes_the_output(case, shuffle):
    tensors = case.integer_tensors()
    heads = shuffle.sample(range(case.heads), case.heads)
    expected = draft_attention(*tensors, case.grid, **case.options)[:, :, heads]
    out = draft_attention(*(tensor[:, :, heads] for tensor in tensors), case.grid, **case.options)
    assert oracle.error(out, expected.double()) <= _rounding(case.dtype)


@pytest.mark.parametrize("budget", ["head", "row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
def test_ties_keep_the_exact_count(budget, dtype, sparsity):
    case = Case(grid=(3, 24, 32), suffix=9, dtype=dtype, sparsity=sparsity, budget=budget, heads=2)
    query = torch.full((1, case.seq_len, 2, 32), 0.3, dtype=dtype)
    rows_of_heads = oracle.listed(selected(case, [query, query, query]))[0]
    for rows in rows_of_heads:
        kept = sum(column < case.num_video for row in rows[: case.num_video] for column in row)
        assert kept == oracle.number_of_pairs(case.num_video, sparsity, budget)
        assert all(index in row for index, row in enumerate(rows))


def test_tokens_behind_kv_len_are_never_attended_to():
    case = Case(grid=(2, 16, 24), prefix=3, suffix=200, padding=(200, 57), sparsity=0.5)
    tensors = case.tensors()
    expected = draft_attention(*tensors, case.grid, **case.options)
    for sample, length in enumerate(case.kv_len.tolist()):
        for tensor in tensors[1:]:
            tensor[sample, length:] = 1e4
    assert torch.equal(draft_attention(*tensors, case.grid, **case.options), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_kv_len_may_be_any_integer_type(dtype):
    case = Case(grid=(1, 16, 24), suffix=20, padding=(20, 5))
    tensors = case.tensors()
    options = case.options | {"kv_len": case.kv_len.to(dtype)}
    assert torch.equal(
        draft_attention(*tensors, case.grid, **options), draft_attention(*tensors, case.grid, **case.options)
    )


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_scale_reaches_the_draft_and_the_attention(backend):
    case = Case(grid=(2, 16, 32), suffix=30, sparsity=0.6, tile=(4, 4))
    query, key, value = case.tensors()
    with spying() as calls:
        out = draft_attention(query, key, value, case.grid, scale=3.0, backend=backend, **case.options)
    mask = calls[0][3]
    expected = oracle.attention(query, key, value, oracle.token_mask(mask, case.order), scale=3.0)
    assert oracle.error(out, expected) <= FLOAT32_ERROR
    kept = {
        (row, column)
        for row, columns in enumerate(oracle.listed(mask)[0][0][: case.num_video])
        for column in columns
        if column < case.num_video
    }
    best, best_at_default_scale = (
        oracle.best_pairs(
            oracle.draft_map(query, key, case.order, case.num_video, case.block, scale)[0, 0], case.sparsity, "head"
        )
        for scale in (3.0, case.head_dim**-0.5)
    )
    assert kept == best != best_at_default_scale


def test_transposed_views_give_the_same_result():
    case = Case(grid=(1, 16, 24), heads=2)
    tensors = case.tensors()
    views = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    assert not views[0].is_contiguous()
    with spying() as calls:
        out = draft_attention(*views, case.grid, **case.options)
    assert all(tensor.stride(-1) == 1 for tensor in calls[0][:3])
    assert out.is_contiguous()
    assert torch.equal(out, draft_attention(*tensors, case.grid, **case.options))


def test_arguments_are_left_as_they_were():
    case = Case(grid=(2, 16, 24), suffix=20, padding=(20, 5))
    tensors, kv_len = case.tensors(), case.kv_len
    draft_attention(*tensors, case.grid, **case.options | {"kv_len": kv_len})
    assert all(map(torch.equal, tensors, case.tensors()))
    assert torch.equal(kv_len, case.kv_len)


@pytest.mark.parametrize("budget", ["row", "head"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_default_dtype_changes_nothing(backend, budget):
    """In a first call, as with a default device."""
    case = Case(grid=(2, 16, 24), prefix=3, suffix=40, padding=(40, 7), sparsity=0.5, tile=(4, 8), budget=budget)
    tensors, options = case.tensors(), case.options | {"backend": backend, "probes": 16, "score": "value"}
    expected = draft_attention(*tensors, case.grid, **options)
    for cache in (kernels.choose, token_layout, probe_rows):
        cache.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        out = draft_attention(*tensors, case.grid, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert out.dtype is torch.float32
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", ["torch", "reference", "auto"])
def test_float64_keeps_its_precision(backend):
    case = Case(grid=(2, 16, 24), prefix=3, suffix=40, padding=(40, 7), sparsity=0, tile=(4, 8), dtype=torch.float64)
    query, key, value = case.tensors()
    mask = oracle.length_mask(2, 1, case.seq_len, case.kv_len)
    expected = oracle.attention(query, key, value, mask)
    out = draft_attention(query, key, value, case.grid, **case.options | {"backend": backend})
    assert out.dtype is torch.float64
    assert oracle.error(out, expected) < 1e-13


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_float64_is_corrected_in_float64(backend):
    """Rows that went through float32 on the way would be float32 numbers."""
    case = Case(grid=(2, 16, 24), sparsity=0.5, tile=(4, 8), dtype=torch.float64)
    options = case.options | {"backend": backend, "probes": 64}
    query, key, value = case.tensors()
    tensors = [query, key, value + 3 * torch.arange(case.seq_len).div(50).sin()[:, None, None]]
    out = draft_attention(*tensors, case.grid, **options)
    single = draft_attention(*(tensor.float() for tensor in tensors), case.grid, **options)
    uncorrected = draft_attention(*tensors, case.grid, **options | {"probes": 0})
    assert oracle.error(single, out) < 1e-5 < 1e-3 < oracle.error(uncorrected, out)
    assert not torch.equal(out, out.float().double())


def test_under_autocast_float64_stays_as_in_stock_attention():
    case = Case(grid=(2, 16, 24), sparsity=0, tile=(4, 8), dtype=torch.float64)
    query, key, value = case.tensors()
    with torch.autocast("cpu", torch.bfloat16):
        stock = scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in (query, key, value)))
        out = draft_attention(query, key, value, case.grid, **case.options)
    assert out.dtype is stock.dtype is torch.float64
    assert oracle.error(out, stock.transpose(1, 2)) < 1e-13


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_default_device_changes_nothing(backend):
    """In a first call, which checks the backend and builds what later calls find in caches."""
    case = Case(grid=(2, 16, 24), prefix=3, suffix=40, padding=(40, 7), sparsity=0.5, tile=(4, 8))
    tensors, options = case.tensors(), case.options | {"backend": backend, "probes": 16}
    expected = draft_attention(*tensors, case.grid, **options)
    for cache in (kernels.choose, token_layout, probe_rows):
        cache.cache_clear()
    with torch.device("meta"):
        out = draft_attention(*tensors, case.grid, **options)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", kernels.WITH_BACKWARD)
@pytest.mark.parametrize("budget", ["head", "row"])
def test_gradients_equal_the_oracle_s(budget, backend):
    case = Case(grid=(2, 11, 23), prefix=5, suffix=40, padding=(40, 3), heads=2, tile=(4, 8), budget=budget)
    tensors = [tensor.requires_grad_() for tensor in case.tensors()]
    out, mask = attend(case, tensors, backend)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((out * weight).sum(), tensors)
    expected = torch.autograd.grad(
        (oracle.attention(*tensors, oracle.token_mask(mask, case.order)) * weight).sum(), tensors
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert oracle.error(ours, theirs.double()) <= FLOAT32_ERROR


@pytest.mark.parametrize("position", range(3))
def test_a_gradient_of_one_of_the_three(position, monkeypatch):
    """A LoRA on to_q alone: what attention keeps for the query's gradient are keys and values."""
    monkeypatch.setitem(gather.CHUNK_ELEMENTS, "cpu", 1)
    case = Case(grid=(2, 11, 23), prefix=5, suffix=40, padding=(40, 3), heads=2, tile=(4, 8))
    found = []
    for tensors in (case.tensors(), [tensor.requires_grad_() for tensor in case.tensors()]):
        tensors[position].requires_grad_()
        out, _ = attend(case, tensors, "torch")
        (gradient,) = torch.autograd.grad(out.square().sum(), tensors[position : position + 1])
        found.append(gradient)
    assert oracle.error(found[0], found[1].double()) <= FLOAT32_ERROR


def test_gradients_flow_after_a_first_call_in_inference_mode():
    case = Case(grid=(1, 17, 31), suffix=3)
    tensors = case.tensors()
    with torch.inference_mode():
        expected = draft_attention(*tensors, case.grid, **case.options)
    out = draft_attention(*(tensor.requires_grad_() for tensor in tensors), case.grid, **case.options)
    out.sum().backward()
    assert oracle.error(out.detach(), expected.double()) <= FLOAT32_ERROR
    assert all(tensor.grad is not None for tensor in tensors)


def _rounding(dtype: torch.dtype) -> float:
    return FLOAT32_ERROR if dtype == torch.float32 else torch.finfo(dtype).eps

"""What only a GPU can show: every backend's numbers, no wait for the device, whole graphs, and memory."""

import contextlib
import dataclasses
import importlib
import math

import oracle
import pytest
import torch
import torch.distributed as dist
from paper import draft_attention
from torch import Tensor

from diffusers_draft.attention import kernels, ops
from diffusers_draft.attention.block_mask import BlockMask
from diffusers_draft.attention.call import Call
from diffusers_draft.attention.correct import fit, probe_rows
from diffusers_draft.attention.kernels import reference
from diffusers_draft.attention.layout import token_layout
from diffusers_draft.attention.method import Method
from diffusers_draft.attention.ranks.transfer import group_named
from diffusers_draft.attention.steps import plain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda", 0)
FUSED_BACKENDS = ("flex", "triton", "fa4", "block_sparse_attn")
ERROR = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-3}
"""Relative to the reference in float32: twice the rounding of a result in that dtype; TF32 products in float32."""


def tensors(batch: int, seq_len: int, heads: int, head_dim: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, seq_len, heads, head_dim, generator=generator).to(DEVICE, dtype) for _ in range(3)]


def need(backend: str, dtype: torch.dtype = torch.bfloat16, head_dim: int = 128, block: int = 128) -> None:
    """Skips where the backend's package is missing or the backend says that it cannot run on such tensors."""
    try:
        module = kernels.load(backend)
    except ImportError as error:
        pytest.skip(str(error))
    refusal = getattr(module, "refusal", lambda *_: None)(DEVICE, dtype, head_dim, block)
    if refusal:
        pytest.skip(f"{backend} {refusal}")


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Results of the reference in float32 on what the kernels got, in block order, call by call."""
    results = []
    choose = kernels.choose

    def spying(*args: object) -> kernels.Choice:
        choice = choose(*args)

        def forward(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
            results.append(reference.forward(query.float(), key.float(), value.float(), mask, scale))
            return choice.forward(query, key, value, mask, scale)

        return dataclasses.replace(choice, forward=forward)

    monkeypatch.setattr(kernels, "choose", spying)
    return results


@pytest.mark.parametrize(("budget", "tile"), [("head", (8, 16)), ("row", (2, 8, 8))], ids=str)
@pytest.mark.parametrize(
    ("grid", "prefix", "text", "kv_len"),
    [
        ((3, 30, 52), 0, 0, None),
        ((3, 13, 17), 0, 45, (663 + 45, 663 + 1)),
        ((2, 19, 11), 37, 256, None),
        ((1, 45, 80), 0, 128, (3600, 3600 + 77)),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(torch.bfloat16, 128), (torch.float16, 64), (torch.bfloat16, 96)], ids=str
)
@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_a_backend_equals_the_reference_under_the_selected_mask(
    exact, backend, dtype, head_dim, grid, prefix, text, kv_len, budget, tile
):
    need(backend, dtype, head_dim)
    seq_len = prefix + grid[0] * grid[1] * grid[2] + text
    query, key, value = tensors(2, seq_len, 3, head_dim, dtype)
    lengths = None if kv_len is None else torch.tensor(kv_len, device=DEVICE)
    options = dict(prefix=prefix, kv_len=lengths, sparsity=0.7, budget=budget, tile=tile)
    out = draft_attention(query, key, value, grid, backend=backend, **options)
    inverse = token_layout(grid, prefix, seq_len, tile, DEVICE).inverse
    assert oracle.error(out, exact[0][:, inverse].double()) <= ERROR[dtype]


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_at_sparsity_0_a_backend_equals_dense_attention(backend):
    need(backend)
    query, key, value = tensors(2, 4 * 22 * 40 + 100, 4, 128, torch.bfloat16)
    out = draft_attention(query, key, value, (4, 22, 40), sparsity=0.0, backend=backend)
    every_pair = torch.ones(1, dtype=torch.bool, device=DEVICE)
    dense = oracle.attention(query, key, value, every_pair)
    assert oracle.error(out, dense) <= ERROR[torch.bfloat16]


@contextlib.contextmanager
def no_waiting():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("budget", ["head", "row"])
@pytest.mark.parametrize("backend", ["auto", *FUSED_BACKENDS])
def test_a_sparse_call_never_waits_for_the_device(backend, budget):
    if backend != "auto":
        need(backend)
    query, key, value = tensors(2, 3 * 30 * 52 + 77, 3, 128, torch.bfloat16)
    lengths = torch.tensor([3 * 30 * 52 + 77, 3 * 30 * 52 + 5], device=DEVICE)

    def call() -> Tensor:
        return draft_attention(query, key, value, (3, 30, 52), kv_len=lengths, budget=budget, backend=backend)

    first = call()  # compiles, probes, builds the index tensors
    with no_waiting():
        again = call()
    torch.testing.assert_close(again, first)


DEFAULTS = dict(score="value", probes=64)
"""What `paper.draft_attention` leaves out."""


@pytest.mark.parametrize("budget", ["head", "row"])
@pytest.mark.parametrize("backend", ["triton", "fa4"])
def test_a_corrected_call_never_waits_for_the_device(backend, budget):
    """With the value score, the correction and padded text, as the layers of a transformer call it."""
    need(backend)
    grid = (3, 30, 52)
    query, key, value = tensors(2, 3 * 30 * 52 + 77, 3, 128, torch.bfloat16)
    lengths = torch.tensor([3 * 30 * 52 + 77, 3 * 30 * 52 + 5], device=DEVICE)
    method = Method(budget=budget, backend=backend, **DEFAULTS).to_tensor()
    geometry = torch.tensor([*grid, 0])

    def call(number: int) -> ops.Attended:
        numbers = torch.tensor([0.8, number], dtype=torch.float64)
        return ops.attend(query, key, value, geometry, lengths, numbers, method)

    first = [call(number) for number in range(3)]  # compiles, probes, builds the index tensors of these steps
    with no_waiting():
        again = [call(number) for number in range(3)]
    for one, other in zip(first, again, strict=True):
        torch.testing.assert_close(other.out, one.out)
        torch.testing.assert_close(other.squares, one.squares)
    before, after, whole = again[0].squares.tolist()
    assert 0 < after <= before and whole > 0


@pytest.mark.parametrize("number", [0, 5])
@pytest.mark.parametrize("backend", ["triton", "fa4"])
def test_a_new_step_never_waits_for_the_device(backend, number):
    """Its rows are chosen on the device, where nothing of them is kept from earlier steps."""
    need(backend)
    grid = (2, 30, 52)
    query, key, value = tensors(1, 2 * 30 * 52, 3, 128, torch.bfloat16)
    method, geometry = Method(backend=backend, **DEFAULTS).to_tensor(), torch.tensor([*grid, 0])
    numbers = [torch.tensor([0.8, step], dtype=torch.float64) for step in (1, 10 + number)]
    ops.attend(query, key, value, geometry, None, numbers[0], method)
    with no_waiting():
        ops.attend(query, key, value, geometry, None, numbers[1], method)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("budget", "tile"), [("head", (8, 16)), ("row", (2, 8, 8))], ids=str)
@pytest.mark.parametrize(
    ("grid", "prefix", "text", "kv_len"),
    [((3, 30, 52), 0, 0, None), ((2, 22, 40), 3, 100, (1863, 1800)), ((1, 37, 23), 13, 101, (965, 870))],
)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("backend", ["triton", "fa4"])
def test_corrected_output_is_that_of_the_plain_steps_in_float32(
    backend, head_dim, grid, prefix, text, kv_len, budget, tile, dtype
):
    """With the mask that the fused steps chose, the reference kernel and the plain correction."""
    need(backend, dtype, head_dim)
    seq_len = prefix + math.prod(grid) + text
    query, key, value = tensors(2, seq_len, 3, head_dim, dtype)
    query, value = 2 * query, value[..., :6] @ value[0, :6, 0] + 1  # of few dimensions, which the probes can tell
    lengths = None if kv_len is None else torch.tensor(kv_len, device=DEVICE)
    method = Method(budget=budget, tile=tile, backend=backend, **DEFAULTS)
    call = Call.order(query, key, value, torch.tensor([*grid, prefix]), lengths, method)
    assert call.steps is not plain
    mask = call.select(0.7)
    out = call.attend(mask)
    found = call.restore(out, call.correct(out, 4))

    full = [tensor.float() for tensor in (call.query, call.key, call.value)]
    sparse = reference.forward(*full, mask, call.scale)
    rows = probe_rows(call.layout.num_video_blocks * call.layout.block, 64, 4, DEVICE)
    correction = fit(sparse[:, rows], plain.attend_to_valid(full[0][:, rows], *full[1:], lengths, call.scale))
    assert correction.matrix.any()
    expected = plain.restore(sparse, call.layout, correction)
    # The fit makes a little more of what float16 and bfloat16 round, but not much: its penalty holds it.
    assert oracle.error(found, expected.double()) <= 3 * ERROR[dtype]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", ["triton", "fa4"])
def test_tensors_need_not_be_on_the_current_gpu(backend):
    need(backend)
    here = tensors(1, 2 * 22 * 40, 4, 128, torch.bfloat16)
    there = [tensor.to("cuda:1") for tensor in here]
    options = dict(grid=(2, 22, 40), sparsity=0.7, backend=backend)
    with torch.cuda.device(0):
        found = draft_attention(*there, **options)
        assert found.device == there[0].device
        assert oracle.error(found.to(here[0].device), draft_attention(*here, **options).double()) < 1e-3


@pytest.mark.parametrize("backend", ["triton", "fa4"])
def test_at_sparsity_0_correction_changes_nothing(backend):
    need(backend)
    query, key, value = tensors(1, 2 * 22 * 40, 4, 128, torch.bfloat16)
    options = dict(sparsity=0.0, backend=backend)
    found = draft_attention(query, key, value, (2, 22, 40), **options, **DEFAULTS)
    assert torch.equal(found, draft_attention(query, key, value, (2, 22, 40), **options))


def test_the_errors_that_densities_follow_are_read_back_without_waiting(monkeypatch):
    from models import run_wan, wan, wan_pipeline

    from diffusers_draft import enable_draft_attention

    pipe = wan_pipeline(wan().to(torch.bfloat16)).to(DEVICE)
    call = type(pipe.transformer).__call__
    calls = []

    def watched(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:  # a run's timesteps are read once
            return call(*args, **kwargs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return call(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with enable_draft_attention(pipe, max_error=0.05, tile=(1, 8, 8), probes=16, backend="triton") as handle:
        texts = {
            name: torch.randn(1, 7, 8, device=DEVICE, dtype=torch.bfloat16)
            for name in ("prompt_embeds", "negative_prompt_embeds")
        }
        for watching in (False, True):  # kernels are chosen and compiled first
            if watching:
                monkeypatch.setattr(type(pipe.transformer), "__call__", watched)
            run_wan(pipe, steps=8, grid=(3, 24, 32), **texts)
        report = handle.report().transformers[0]
    assert len({forward.asked for forward in report.run}) > 4
    assert report.error.after < 0.1


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_a_compiled_transformer_is_one_graph_a_block(backend):
    from models import error, hunyuan_video, hunyuan_video_inputs
    from paper import enable_draft_attention

    need(backend, torch.bfloat16, 64)
    torch._dynamo.reset()
    model = hunyuan_video(attention_head_dim=64, rope_axes_dim=(16, 24, 24)).to(DEVICE, torch.bfloat16)
    inputs = {name: value.to(DEVICE) for name, value in hunyuan_video_inputs(batch=2).items()}
    inputs = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    with enable_draft_attention(model, 0.5, backend=backend, dense_layers=(), dense_timestep=float("inf")) as handle:
        with torch.inference_mode():
            eager = model(**inputs).sample
            model.compile_repeated_blocks(fullgraph=True)
            compiled = model(**inputs).sample
        assert handle.report().transformers[0].backend == backend
    assert error(compiled, eager) <= 2e-2


@pytest.mark.parametrize("backend", ["triton", "fa4"])
def test_peak_memory_is_one_copy_of_query_key_value_and_out(backend):
    need(backend)
    grid = (8, 45, 80)
    query, key, value = tensors(1, 8 * 45 * 80, 8, 128, torch.bfloat16)
    size = query.numel() * query.element_size()
    draft_attention(query, key, value, grid, backend=backend)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = draft_attention(query, key, value, grid, backend=backend)
    torch.cuda.synchronize()
    num_blocks = 8 * 45 * 80 // 128
    lists_and_scores = 8 * num_blocks**2 * 4 * 3
    assert torch.cuda.max_memory_allocated() - before <= 5 * size + lists_and_scores
    del out


def test_the_log_sum_exp_of_the_triton_kernel():
    need("triton")
    triton_kernel = importlib.import_module("diffusers_draft.attention.kernels.triton_lists")
    from tests.attention.test_kernels import random_mask

    query, key, value = tensors(2, 777, 3, 128, torch.bfloat16)
    mask = random_mask(2, 777, 3, 128, (777, 650))
    lists = {name: getattr(mask, name).to(DEVICE) for name in ("kv_num_blocks", "kv_indices", "kv_len")}
    lse = torch.empty(2, 3, 777, device=DEVICE)
    triton_kernel.forward(query, key, value, dataclasses.replace(mask, **lists), 0.1, lse=lse)
    scores = torch.einsum("bqhd,bkhd->bhqk", query.double().cpu(), key.double().cpu()) * 0.1
    allowed = oracle.token_mask(mask, torch.arange(777))
    exact = scores.masked_fill(~allowed, float("-inf")).logsumexp(-1)
    torch.testing.assert_close(lse.double().cpu(), exact, atol=2e-2, rtol=0)


def test_exchanges_have_priority(tmp_path):
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        with_priority = group_named(group.group_name)
        assert with_priority is not group and with_priority is group_named(group.group_name)
        assert with_priority._get_backend(DEVICE).options.is_high_priority_stream
        assert not group._get_backend(DEVICE).options.is_high_priority_stream
    finally:
        dist.destroy_process_group()

import dataclasses
import importlib
import re
import sys
import types
from types import SimpleNamespace

import oracle
import pytest
import torch
from paper import draft_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

from diffusers_draft.attention import kernels
from diffusers_draft.attention.block_mask import BlockMask
from diffusers_draft.attention.kernels import flex, probe, reference
from diffusers_draft.attention.method import Method

torch_kernel = importlib.import_module("diffusers_draft.attention.kernels.gather")

CPU = torch.device("cpu")
FLOAT32_ERROR = 2e-6
PROBE_KINDS = [
    (torch.float32, 64, 128),
    (torch.float16, 32, 16),
    (torch.bfloat16, 128, 128),
    (torch.float32, 16, 1024),
]


def random_tensors(batch, seq_len, heads, head_dim, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, seq_len, heads, head_dim, generator=generator).to(dtype) for _ in range(3)]


def random_mask(batch, seq_len, heads, block, kv_len=None, anchors=1, seed=0) -> BlockMask:
    """Any lists that the contract of `BlockMask` allows; entries that no kernel may use hold the largest int32."""
    generator = torch.Generator().manual_seed(seed)
    num_blocks = -(-seq_len // block)
    num_video = num_blocks - anchors
    counts = torch.zeros(batch, heads, num_blocks, dtype=torch.int32)
    indices = torch.full((batch, heads, num_blocks, num_blocks), 2**31 - 1, dtype=torch.int32)
    for sample in range(batch):
        valid = -(-(seq_len if kv_len is None else kv_len[sample]) // block)
        for head in range(heads):
            for row in range(num_blocks):
                count = valid if row >= num_video else int(torch.randint(1, valid + 1, (), generator=generator))
                counts[sample, head, row] = count
                kept = torch.randperm(valid, generator=generator)[:count].sort().values
                indices[sample, head, row, :count] = kept.int()
    lengths = None if kv_len is None else torch.tensor(kv_len, dtype=torch.int32)
    return BlockMask(counts, indices, lengths, seq_len, block, num_video)


def assert_equals_reference(forward, tensors, mask):
    """A backend may be as far from the exact result as twice the reference, which rounds once, at its end."""
    exact = oracle.attention(*tensors, oracle.token_mask(mask, torch.arange(mask.seq_len)), scale=0.17)
    error, allowed = (oracle.error(run(*tensors, mask, 0.17), exact) for run in (forward, reference.forward))
    assert error <= max(FLOAT32_ERROR if tensors[0].dtype == torch.float32 else 0, 2 * allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_len", [None, (300, 163), (128, 1)], ids=str)
def test_reference_equals_the_oracle(kv_len, dtype):
    tensors = random_tensors(2, 300, 2, 32, dtype)
    mask = random_mask(2, 300, 2, 32, kv_len)
    expected = oracle.attention(*tensors, oracle.token_mask(mask, torch.arange(300)), 0.2)
    found = reference.forward(*tensors, mask, 0.2)
    assert found.dtype == dtype
    assert oracle.error(found, expected) <= max(1e-6, torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128])
@pytest.mark.parametrize(
    ("seq_len", "block", "kv_len"),
    [
        (777, 128, None),
        (777, 128, (777, 650)),
        (777, 128, (640, 129)),
        (512, 128, (512, 1)),
        (515, 32, (515, 511)),
        (100, 128, (99, 100)),
        (97, 16, (97, 90)),
    ],
    ids=str,
)
def test_torch_backend_equals_reference(nan_memory, seq_len, block, kv_len, head_dim, dtype):
    tensors = random_tensors(2, seq_len, 2, head_dim, dtype)
    assert_equals_reference(torch_kernel.forward, tensors, random_mask(2, seq_len, 2, block, kv_len))


def heads_first(tensors):
    """The same tensors in the memory of `(B, H, S, D)`."""
    return [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]


@pytest.mark.parametrize("forward", [reference.forward, torch_kernel.forward], ids=["reference", "torch"])
def test_backends_take_tensors_with_the_memory_of_heads_first(nan_memory, forward):
    tensors = heads_first(random_tensors(2, 717, 2, 64, torch.float32))
    assert_equals_reference(forward, tensors, random_mask(2, 717, 2, 128, (717, 150)))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "seq_len", "kv_len", "memory"),
    [
        (torch.float32, 16, 717, None, list),
        (torch.float32, 64, 717, (717, 150), heads_first),
        (torch.bfloat16, 64, 640, (512, 129), list),
    ],
    ids=["ragged", "lengths_heads_first", "lengths_bfloat16"],
)
def test_flex_backend_equals_reference(nan_memory, dtype, head_dim, seq_len, kv_len, memory):
    tensors = memory(random_tensors(2, seq_len, 2, head_dim, dtype))
    assert_equals_reference(flex.forward, tensors, random_mask(2, seq_len, 2, 128, kv_len))


@pytest.mark.parametrize("chunk_elements", [1, 5000, 1 << 22])
def test_torch_backend_does_not_depend_on_the_size_of_its_chunks(monkeypatch, nan_memory, chunk_elements):
    monkeypatch.setitem(torch_kernel.CHUNK_ELEMENTS, "cpu", chunk_elements)
    tensors = random_tensors(2, 333, 2, 32, torch.float32)
    assert_equals_reference(torch_kernel.forward, tensors, random_mask(2, 333, 2, 32, (333, 200)))


@pytest.mark.parametrize("kv_len", [None, (333, 200)], ids=str)
def test_torch_backend_has_the_gradients_of_the_reference(nan_memory, kv_len):
    tensors = [tensor.requires_grad_() for tensor in random_tensors(2, 333, 2, 32, torch.float32)]
    mask = random_mask(2, 333, 2, 32, kv_len)
    weight = torch.randn(2, 333, 2, 32, generator=torch.Generator().manual_seed(1))
    found, expected = (
        torch.autograd.grad((forward(*tensors, mask, 0.17) * weight).sum(), tensors)
        for forward in (torch_kernel.forward, reference.forward)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert oracle.error(ours, theirs.double()) <= FLOAT32_ERROR


def ignores_the_mask(query, key, value, mask, scale):
    num_blocks = mask.kv_num_blocks.shape[-1]
    lists = {
        "kv_num_blocks": torch.full_like(mask.kv_num_blocks, num_blocks),
        "kv_indices": torch.arange(num_blocks, dtype=torch.int32).expand_as(mask.kv_indices),
    }
    return reference.forward(query, key, value, dataclasses.replace(mask, **lists), scale)


def ignores_kv_len(query, key, value, mask, scale):
    return reference.forward(query, key, value, dataclasses.replace(mask, kv_len=None), scale)


def ignores_the_scale(query, key, value, mask, scale):
    return reference.forward(query, key, value, mask, query.shape[-1] ** -0.5)


def gives_every_head_the_mask_of_the_first(query, key, value, mask, scale):
    lists = {
        name: getattr(mask, name)[:, :1].expand_as(getattr(mask, name)) for name in ("kv_num_blocks", "kv_indices")
    }
    return reference.forward(query, key, value, dataclasses.replace(mask, **lists), scale)


def gives_every_sample_the_mask_of_the_first(query, key, value, mask, scale):
    lists = {name: getattr(mask, name)[:1].expand_as(getattr(mask, name)) for name in ("kv_num_blocks", "kv_indices")}
    return reference.forward(query, key, value, dataclasses.replace(mask, **lists), scale)


def forgets_the_last_listed_block(query, key, value, mask, scale):
    fewer = dataclasses.replace(mask, kv_num_blocks=(mask.kv_num_blocks - 1).clamp(min=1))
    return reference.forward(query, key, value, fewer, scale)


def leaves_the_last_query_block_unwritten(query, key, value, mask, scale):
    out = reference.forward(query, key, value, mask, scale)
    out[:, -(mask.seq_len % mask.block) :] = 0
    return out


def returns_nan(query, key, value, mask, scale):
    return torch.full_like(query, torch.nan)


WRONG = [
    ignores_the_mask,
    ignores_kv_len,
    ignores_the_scale,
    gives_every_head_the_mask_of_the_first,
    gives_every_sample_the_mask_of_the_first,
    forgets_the_last_listed_block,
    leaves_the_last_query_block_unwritten,
    returns_nan,
]


@pytest.mark.parametrize(("dtype", "head_dim", "block"), PROBE_KINDS, ids=str)
@pytest.mark.parametrize("forward", WRONG, ids=lambda forward: forward.__name__)
def test_probe_refuses_a_backend_that(forward, dtype, head_dim, block):
    with pytest.raises(RuntimeError, match=r"'fake' gives wrong numbers on cpu .* relative error"):
        probe.check("fake", forward, CPU, dtype, head_dim, block)


def test_probe_reports_a_backend_that_raises():
    def broken(*_):
        raise ZeroDivisionError("no luck today")

    with pytest.raises(RuntimeError, match=r"'fake' cannot run on cpu in torch.float32: no luck today"):
        probe.check("fake", broken, CPU, torch.float32, 64, 128)


def test_probe_refuses_other_dtypes():
    with pytest.raises(RuntimeError, match=r"'fake' needs float64, .* or bfloat16 tensors, got torch.complex64"):
        probe.check("fake", reference.forward, CPU, torch.complex64, 64, 128)


def test_probe_holds_float64_to_its_own_precision():
    def in_float32(*arguments):
        query, key, value, mask, scale = arguments
        return reference.forward(query.float(), key.float(), value.float(), mask, scale).double()

    probe.check("fake", reference.forward, CPU, torch.float64, 64, 128)
    with pytest.raises(RuntimeError, match="wrong numbers"):
        probe.check("fake", in_float32, CPU, torch.float64, 64, 128)


@pytest.mark.parametrize(("dtype", "head_dim", "block"), PROBE_KINDS, ids=str)
def test_probe_accepts_a_right_backend(dtype, head_dim, block):
    probe.check("fake", reference.forward, CPU, dtype, head_dim, block)


def test_probe_runs_under_inference_mode_and_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    with torch.inference_mode():
        probe.check("torch", torch_kernel.forward, CPU, torch.float32, 64, 128)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def fresh_choice():
    kernels.choose.cache_clear()
    yield kernels.choose
    kernels.choose.cache_clear()


@pytest.fixture
def fake_backend(monkeypatch, fresh_choice):
    """Adds a backend named "fake", first of all that `auto` tries, whose `forward` the test sets."""
    module = SimpleNamespace(forward=reference.forward)
    monkeypatch.setitem(sys.modules, "diffusers_draft.attention.kernels.fake", module)
    monkeypatch.setattr(kernels, "BACKENDS", (*kernels.BACKENDS, "fake"))
    monkeypatch.setitem(kernels.AUTO, "cpu", ("fake", *kernels.AUTO["cpu"]))
    return module


KIND = (CPU, torch.float32, 32, 128)


def test_auto_is_torch_on_the_cpu(fresh_choice):
    choice = fresh_choice("auto", *KIND)
    assert choice.name == "torch"
    assert choice.forward is torch_kernel.forward
    assert "refused" not in choice.reason


def test_explicit_backends_are_what_was_asked_for(fresh_choice):
    for name in ("reference", "torch"):
        choice = fresh_choice(name, *KIND)
        assert (choice.name, choice.reason) == (name, "asked for")


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_a_device_that_was_full_once_costs_no_backend(name, fresh_choice, monkeypatch):
    """A choice is for the life of the process."""
    stock = kernels.load("torch").forward

    def full(*arguments):
        monkeypatch.setattr(kernels.load("torch"), "forward", stock)
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setitem(kernels.AUTO, "cpu", ("torch", "reference"))
    monkeypatch.setattr(kernels.load("torch"), "forward", full)
    of_a_call = name, torch.device("cpu"), torch.float32, 64, 64
    with pytest.raises(torch.OutOfMemoryError):
        fresh_choice(*of_a_call)
    assert fresh_choice(*of_a_call).name == "torch"


def test_unknown_backend_is_refused_with_the_names(fresh_choice):
    with pytest.raises(ValueError, match=r"'falsh'") as error:
        fresh_choice("falsh", *KIND)
    assert all(repr(name) in str(error.value) for name in ("auto", *kernels.BACKENDS))


def test_auto_takes_the_first_backend_that_works(fake_backend):
    assert kernels.choose("auto", *KIND).name == "fake"


def test_auto_skips_a_wrong_backend_and_says_why(fake_backend):
    fake_backend.forward = returns_nan
    choice = kernels.choose("auto", *KIND)
    assert choice.name == "torch"
    assert "fake: Backend 'fake' gives wrong numbers" in choice.reason


def test_an_explicit_wrong_backend_is_refused_every_time(fake_backend):
    fake_backend.forward = ignores_the_mask
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"'fake' gives wrong numbers"):
            kernels.choose("fake", *KIND)


def test_a_backend_is_checked_once_for_each_kind_of_tensors(fake_backend):
    calls = []

    def forward(query, *rest):
        calls.append((query.dtype, query.shape[-1]))
        return reference.forward(query, *rest)

    fake_backend.forward = forward
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        for head_dim in (32, 64, 32):
            kernels.choose("fake", CPU, dtype, head_dim, 128)
    assert len(calls) == len(set(calls)) == 4


def test_a_missing_package_is_an_import_error_when_asked_for_and_a_reason_under_auto(monkeypatch, fake_backend):
    monkeypatch.setitem(sys.modules, "diffusers_draft.attention.kernels.fake", None)
    with pytest.raises(ImportError, match=r"fake"):
        kernels.choose("fake", *KIND)
    choice = kernels.choose("auto", *KIND)
    assert choice.name == "torch"
    assert "refused: fake: Backend 'fake' needs" in choice.reason


@pytest.mark.parametrize("name", sorted(kernels.PACKAGES))
def test_a_missing_package_is_named_with_the_backend_that_needs_it(monkeypatch, fresh_choice, name):
    monkeypatch.setitem(sys.modules, f"diffusers_draft.attention.kernels.{kernels.MODULES.get(name, name)}", None)
    with pytest.raises(ImportError, match=f"Backend '{name}' needs {re.escape(kernels.PACKAGES[name])}"):
        fresh_choice(name, *KIND)


@pytest.mark.parametrize("name", ["triton", "fa4", "block_sparse_attn"])
def test_backends_for_gpus_never_run_on_the_cpu(fresh_choice, name):
    with pytest.raises((ImportError, RuntimeError), match=f"Backend '{name}' needs"):
        fresh_choice(name, *KIND)


@pytest.fixture
def block_sparse_attn(monkeypatch):
    """Our adapter on a stand-in for the package, which attends densely to the blocks listed for each row."""

    def forward(q, k, v, cu_q, cu_k, block_q, block_k, kinds, streaming, lists, max_q, max_k, dropout, scale, *rest):
        assert (block_q, block_k, dropout, rest) == (128, 128, 0.0, (False, False, False, -1, -1))
        assert (
            kinds.tolist() == [1, 2]
            and lists.is_contiguous()
            and lists.dtype == cu_q.dtype == cu_k.dtype == torch.int32
        )
        (first, queries), (start, keys) = cu_q.tolist(), cu_k.tolist()
        assert first == start == 0 and queries == max_q == len(q) and max_k == len(k)
        kept = torch.zeros(len(kinds), max_q, max_k, dtype=torch.bool)
        for head, rows in enumerate(lists[0].tolist()):
            for row, columns in enumerate(rows):
                listed = [column for column in columns if column >= 0]
                assert listed == sorted(listed, reverse=True) and columns[len(listed) :] == [-1] * (
                    len(columns) - len(listed)
                )
                for column in listed:
                    kept[head, row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128] = True
        kept[..., keys:] = False
        return [oracle.attention(q[None], k[None], v[None], kept[None], scale)[0].to(q.dtype)]

    package = types.ModuleType("block_sparse_attn")
    monkeypatch.setitem(sys.modules, "block_sparse_attn", package)
    monkeypatch.setattr(torch.ops.flash_attn, "_block_sparse_attn_forward", forward, raising=False)
    monkeypatch.delitem(sys.modules, "diffusers_draft.attention.kernels.mit", raising=False)
    yield importlib.import_module("diffusers_draft.attention.kernels.mit")
    del sys.modules["diffusers_draft.attention.kernels.mit"]  # monkeypatch would put it back for later tests


@pytest.mark.parametrize("kv_len", [None, (717, 150)], ids=str)
def test_block_sparse_attn_gets_its_lists_and_lengths_in_its_own_form(nan_memory, block_sparse_attn, kv_len):
    tensors = heads_first(random_tensors(2, 717, 2, 64, torch.float32))
    assert_equals_reference(block_sparse_attn.forward, tensors, random_mask(2, 717, 2, 128, kv_len))


def test_what_a_backend_refuses_is_an_error_when_asked_for_and_a_reason_under_auto(fake_backend):
    fake_backend.refusal = lambda device, dtype, head_dim, block: f"needs blocks of 64 tokens, got {block}"
    with pytest.raises(RuntimeError, match=r"Backend 'fake' needs blocks of 64 tokens, got 128\. Choose another"):
        kernels.choose("fake", *KIND)
    choice = kernels.choose("auto", *KIND)
    assert choice.name == "torch"
    assert "needs blocks of 64 tokens, got 128" in choice.reason


def test_a_backend_that_refuses_nothing_here_is_taken(fake_backend):
    fake_backend.refusal = lambda *kind: None
    assert kernels.choose("auto", *KIND).name == "fake"


def test_when_no_backend_works_the_error_names_them_all(monkeypatch, fake_backend):
    fake_backend.forward = returns_nan
    monkeypatch.setattr(torch_kernel, "forward", returns_nan)
    with pytest.raises(RuntimeError, match=r"No backend can run on cpu .* fake: .* torch: "):
        kernels.choose("auto", *KIND)


def test_a_device_without_its_own_list_runs_torch(monkeypatch, fresh_choice):
    monkeypatch.setattr(kernels, "AUTO", {})
    assert fresh_choice("auto", *KIND).name == "torch"


@pytest.mark.parametrize("kv_len", [None, (300, 260)], ids=str)
@pytest.mark.parametrize("outer", [1, 2], ids=["by token", "by head"])
def test_the_operator_of_compiled_graphs_keeps_its_contract(outer, kv_len):
    tensors = [
        tensor.transpose(0, outer).contiguous().transpose(0, outer)
        for tensor in random_tensors(2, 300, 2, 32, torch.float32)
    ]
    lengths = None if kv_len is None else torch.tensor(kv_len)
    how = torch.tensor([0.5, 3], dtype=torch.float64), Method(tile=(8, 16), budget="head").to_tensor(), None
    arguments = (*tensors, torch.tensor([1, 16, 16, 4]), lengths, *how)
    torch.library.opcheck(torch.ops.diffusers_draft.attend.default, arguments)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kv_len", [None, (300, 260)], ids=str)
def test_compiled_draft_attention_equals_eager(fresh_compiler, kv_len, compiler):
    lengths = None if kv_len is None else torch.tensor(kv_len)

    def attend(query, key, value):
        options = {"sparsity": 0.5, "prefix": 4, "kv_len": lengths, "budget": "row", "scale": 0.2}
        return 2 * draft_attention(query + 1, key, value, (1, 16, 16), **options)

    tensors = random_tensors(2, 300, 2, 32, torch.float32)
    compiled = torch.compile(attend, fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(*tensors), attend(*tensors), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_under_autocast_a_first_call_gives_what_it_gives_without_eager_and_compiled(
    fresh_compiler, fresh_choice, compiler
):
    """The layers of some models hand over a query, a key and a value of two dtypes under autocast."""

    def attend(query, key, value):
        return draft_attention(query + 0, key, value.bfloat16(), (1, 16, 16), sparsity=0.5, tile=(4, 8), probes=64)

    query, key, value = tensors = random_tensors(2, 256, 2, 32, torch.float32)
    expected = attend(*(tensor.bfloat16() for tensor in tensors))
    compiled = torch.compile(attend, fullgraph=True, backend=compiler)
    with torch.autocast("cpu", torch.bfloat16):
        assert sdpa(query, key, value.bfloat16()).dtype is torch.bfloat16
        for run in (attend, compiled):
            fresh_choice.cache_clear()
            assert torch.equal(run(*tensors), expected)


def test_a_backend_is_not_checked_under_autocast(fake_backend):
    def forward(*arguments):
        under.append(torch.is_autocast_enabled("cpu"))
        return reference.forward(*arguments)

    under: list = []
    fake_backend.forward = forward
    with torch.autocast("cpu", torch.bfloat16):
        draft_attention(*random_tensors(1, 160, 1, 16, torch.float32), (1, 10, 16))
    assert under == [False, False]


def test_one_compiled_graph_takes_its_grid_from_any_shape(fresh_compiler):
    def attend(video):
        tokens = video.flatten(1, 3)
        return draft_attention(tokens, tokens, tokens, video.shape[1:4], sparsity=0.5)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for grid in ((4, 9, 13), (3, 24, 17)):
        video = torch.randn(1, *grid, 2, 32, generator=torch.Generator().manual_seed(0))
        with torch.compiler.set_stance("fail_on_recompile" if grid[0] == 3 else "default"):
            torch.testing.assert_close(compiled(video), attend(video), rtol=1e-6, atol=1e-6)


def test_operator_says_what_was_computed():
    tensors = random_tensors(1, 4 * 128, 2, 32, torch.float32)
    method = Method(tile=(8, 16), budget="row", score="mass", probes=0)
    how = torch.tensor([0.5, 0], dtype=torch.float64), method.to_tensor(), None
    out, pairs, squares, facts = torch.ops.diffusers_draft.attend(*tensors, torch.tensor([1, 16, 32, 0]), None, *how)
    assert torch.equal(out, draft_attention(*tensors, (1, 16, 32), sparsity=0.5, budget="row", tile=(8, 16)))
    assert pairs.tolist() == [2 * (2 + 2 + 2 + 2)]
    assert facts.tolist()[:3] == [2, 4, 4]
    assert squares.tolist() == [0, 0, 0]
    assert kernels.choice_of(facts.tolist()[3]).name == "torch"


@pytest.mark.parametrize("name", sorted(set(kernels.BACKENDS) - {"reference", "torch"}))
@pytest.mark.parametrize("trained", [0, 1, 2])
def test_a_backend_without_backward_refuses_gradients_and_names_those_with_one(name, trained) -> None:
    tensors = random_tensors(1, 160, 1, 16, torch.float32)
    tensors[trained].requires_grad_()
    with pytest.raises(RuntimeError, match=f"'{name}' has no backward. Choose 'auto' or one of 'reference', 'torch'"):
        draft_attention(*tensors, (1, 10, 16), backend=name)


def test_auto_takes_a_backend_with_backward_where_gradients_are_needed(fake_backend) -> None:
    def forward(*arguments):
        used.append(arguments)
        return reference.forward(*arguments).detach()

    used: list = []
    fake_backend.forward = forward
    choice = kernels.choose("auto", *KIND, True)
    assert (choice.name, used) == ("torch", [])
    assert "fake: has no backward" in choice.reason
    tensors = random_tensors(1, 160, 1, 16, torch.float32)
    tensors[0].requires_grad_()
    assert draft_attention(*tensors, (1, 10, 16)).requires_grad
    with torch.no_grad():
        draft_attention(*tensors, (1, 10, 16))
    assert used


def test_the_list_of_backends_with_a_backward_is_right() -> None:
    for name in kernels.WITH_BACKWARD:
        tensors = [tensor.requires_grad_() for tensor in random_tensors(1, 160, 1, 16, torch.float32)]
        draft_attention(*tensors, (1, 10, 16), backend=name).square().sum().backward()
        assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in tensors)

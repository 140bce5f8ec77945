import contextlib
import functools
from typing import Any

import diffusers
import models
import pytest
import torch
from diffusers import WanTransformer3DModel
from models import RAGGED, TINY, attention_replaced, error, forward, processors
from packaging.version import Version
from paper import draft_attention, enable_draft_attention
from torch import Tensor

from diffusers_draft import DraftConfig
from diffusers_draft.attention import kernels
from diffusers_draft.attention.ops import Attended
from diffusers_draft.families import families, family_of
from diffusers_draft.patching import dispatch
from diffusers_draft.tools.catalogue import CATALOGUE

pytestmark = pytest.mark.usefixtures("nan_memory")

EVERYWHERE = dict(dense_layers=(), dense_steps=0)
GRIDS = [RAGGED, (1, 11, 23), (5, 8, 16), (4, 19, 7), (2, 3, 5)]
"""Ragged, one frame, whole tiles, portrait with prime sides, and less than one block."""


@pytest.mark.parametrize("name", TINY)
def test_layers_are_the_video_self_attention_in_execution_order(name: str) -> None:
    tiny = TINY[name]
    model = tiny.build()
    inputs = tiny.inputs()
    with attention_replaced(model, tiny.layers, lambda query, key, value: value) as ran:
        forward(model, inputs)
    assert tuple(ran) == tiny.layers
    layers = enable_draft_attention(model, **EVERYWHERE).report().transformers[0].densities
    assert tuple(layers) == tiny.layers


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", TINY)
def test_sparsity_0_equals_stock(name: str, batch: int) -> None:
    tiny = TINY[name]
    model, inputs = tiny.build(), tiny.inputs(batch)
    stock = forward(model, inputs)
    handle = enable_draft_attention(model, sparsity=0, **EVERYWHERE)
    assert error(forward(model, inputs), stock) < tiny.tolerance
    assert handle.report().transformers[0].density == 1


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_sparsity_0_equals_stock_on_every_grid(name: str, grid: models.Grid) -> None:
    tiny = TINY[name]
    model, inputs = tiny.build(), tiny.inputs(2, grid)
    stock = forward(model, inputs)
    handle = enable_draft_attention(model, sparsity=0, **EVERYWHERE)
    assert error(forward(model, inputs), stock) < models.FLOAT32_ERROR
    assert handle.report().transformers[0].grid == grid


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_sparsity_0_is_as_close_to_float64_as_stock_is(name: str, dtype: torch.dtype) -> None:
    tiny = TINY[name]
    inputs = tiny.inputs(2)
    exact = forward(tiny.build().double(), _cast(inputs, torch.float64))
    model = tiny.build().to(dtype)
    stock = error(forward(model, _cast(inputs, dtype)), exact)
    enable_draft_attention(model, sparsity=0, **EVERYWHERE)
    assert error(forward(model, _cast(inputs, dtype)), exact) < 1.2 * stock


@pytest.mark.parametrize("name", TINY)
def test_under_autocast_sparsity_0_is_as_close_to_float32_as_stock_is(name: str) -> None:
    """Layers hand over a query, key and value of two dtypes then, which stock attention casts to one."""
    tiny = TINY[name]
    model, inputs = tiny.build(), tiny.inputs(2)
    exact = forward(model, inputs)
    kernels.choose.cache_clear()
    with torch.autocast("cpu", torch.bfloat16):
        stock = forward(model, inputs)
        handle = enable_draft_attention(model, sparsity=0, **EVERYWHERE)
        draft = forward(model, inputs)
    assert draft.dtype is stock.dtype
    assert error(draft, exact) < 1.2 * error(stock, exact)
    assert "bfloat16" in handle.report().transformers[0].backend_reason


def _cast(inputs: models.Inputs, dtype: torch.dtype) -> models.Inputs:
    floats = {name: value for name, value in inputs.items() if torch.is_tensor(value) and value.is_floating_point()}
    return inputs | {name: value.to(dtype) for name, value in floats.items()}


@pytest.mark.parametrize("name", TINY)
def test_latents_without_a_batch_are_refused_by_their_shape(name: str) -> None:
    tiny = TINY[name]
    inputs = tiny.inputs()
    found = {key: value for key, value in inputs.items() if torch.is_tensor(value) and value.dim() == 5}
    latents = "controls_latents" if "controls_latents" in found else "hidden_states"
    if latents not in found:
        pytest.skip("it takes packed latents")
    model = tiny.build()
    enable_draft_attention(model)
    for wrong in (latents, *(key for key in found if key.startswith("latents_"))):  # the latter are history
        with pytest.raises(ValueError, match=rf"{wrong} must be latents of shape \(B, .*\), got \(\d+(, \d+){{3}}\)"):
            model(**inputs | {wrong: found[wrong][0]})
    forward(model, inputs)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", TINY)
def test_sparse_equals_draft_attention_put_into_the_stock_model(name: str, batch: int) -> None:
    tiny = TINY[name]
    model, inputs = tiny.build(), tiny.inputs(batch)
    sparse_layers = tuple(path for path in tiny.layers if path not in tiny.dense_layers)
    options = dict(sparsity=0.8, prefix=tiny.prefix, backend="reference", tile=(2, 8, 8))

    def oracle(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return draft_attention(query, key, value, RAGGED, kv_len=tiny.lengths(inputs, query.shape[1]), **options)

    dense = forward(model, inputs)
    with attention_replaced(model, sparse_layers, oracle):
        expected = forward(model, inputs)
    assert error(expected, dense) > 5e-4
    for backend in ("reference", "torch"):
        enable_draft_attention(model, sparsity=0.8, backend=backend, tile=(2, 8, 8))
        assert error(forward(model, inputs), expected) < tiny.tolerance


@pytest.mark.parametrize("name", TINY)
def test_every_chosen_layer_is_routed_and_no_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = TINY[name]
    model, inputs = tiny.build(), tiny.inputs(2)
    calls = []

    def marked(*arguments: object) -> Attended:
        calls.append(arguments)
        found = attend(*arguments)
        return found._replace(out=torch.zeros_like(found.out))

    attend = dispatch.attend
    monkeypatch.setattr(dispatch, "attend", marked)
    for dense in ((), (0,), (1, len(tiny.layers) - 1), tuple(range(len(tiny.layers)))):
        calls.clear()
        chosen = tuple(path for index, path in enumerate(tiny.layers) if index not in dense)
        with enable_draft_attention(model, dense_layers=dense):
            routed = forward(model, inputs)
        with attention_replaced(model, chosen, lambda query, key, value: torch.zeros_like(query)):
            expected = forward(model, inputs)
        assert len(calls) == len(chosen)
        assert torch.equal(routed, expected)


@pytest.mark.parametrize("name", TINY)
def test_disable_is_bit_exact(name: str) -> None:
    tiny = TINY[name]
    model, inputs = tiny.build(), tiny.inputs()
    stock, before = forward(model, inputs), processors(model)
    attributes = {path: dict(processor.__dict__) for path, processor in before.items()}
    handle = enable_draft_attention(model)
    sparse = forward(model, inputs)
    assert not torch.equal(sparse, stock)
    handle.disable()
    after = processors(model)
    assert after.keys() == before.keys()
    assert all(after[path] is before[path] for path in before)
    assert {path: dict(processor.__dict__) for path, processor in after.items()} == attributes
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert torch.equal(forward(model, inputs), stock)


@pytest.mark.parametrize("name", TINY)
def test_a_batch_equals_its_samples_one_by_one(name: str) -> None:
    tiny = TINY[name]
    model, inputs = tiny.build(), tiny.inputs(2)
    enable_draft_attention(model, sparsity=0.7)
    together = forward(model, inputs)
    for sample in range(2):
        batched = {key: value for key, value in inputs.items() if torch.is_tensor(value) and value.shape[0] == 2}
        alone = inputs | {key: value[sample : sample + 1] for key, value in batched.items()}
        assert error(forward(model, alone), together[sample : sample + 1]) < tiny.tolerance


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_grid_and_lengths_are_read_at_every_forward(name: str) -> None:
    tiny = TINY[name]
    model, fresh = tiny.build(), tiny.build()
    enable_draft_attention(model, sparsity=0.7)
    for batch, grid in zip((2, 1, 3, 2), GRIDS, strict=False):
        inputs = tiny.inputs(batch, grid)
        with enable_draft_attention(fresh, sparsity=0.7):
            expected = forward(fresh, inputs)
        assert torch.equal(forward(model, inputs), expected)


def test_arguments_may_be_positional() -> None:
    model, inputs = models.hunyuan_video(), models.hunyuan_video_inputs()
    enable_draft_attention(model)
    by_name = forward(model, inputs)
    with torch.no_grad():
        by_position = model(*inputs.values()).sample
    assert torch.equal(by_position, by_name)


class HiddenParameters(WanTransformer3DModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_positional_arguments_of_a_forward_that_hides_its_parameters() -> None:
    inputs = models.wan_inputs()
    model = models.wan()
    with torch.no_grad(), enable_draft_attention(model, 0.8, dense_steps=0):
        expected = model(**inputs).sample
    model.__class__ = HiddenParameters
    with torch.no_grad(), enable_draft_attention(model, 0.8, dense_steps=0):
        assert torch.equal(model(*inputs.values()).sample, expected)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_class_whose_forward_was_replaced(wrapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = WanTransformer3DModel.forward

    def replacement(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    if wrapped:
        functools.update_wrapper(replacement, forward)
    monkeypatch.setattr(WanTransformer3DModel, "forward", replacement)
    inputs, model = models.wan_inputs(), models.wan()
    with torch.no_grad(), enable_draft_attention(model, 0.8, dense_steps=0) as handle:
        model(**inputs)
        context = contextlib.nullcontext() if wrapped else pytest.raises(TypeError, match="Give it keyword arguments")
        with context:
            model(*inputs.values())
        assert handle.report().transformers[0].forwards["sparse"] == 1 + wrapped


def test_a_forward_that_renames_its_parameters_says_what_it_was_called_with() -> None:
    class Renamed(WanTransformer3DModel):
        def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Any:
            return super().forward(x, t, context)

    inputs, model = models.wan_inputs(), models.wan()
    model.__class__ = Renamed
    with enable_draft_attention(model), pytest.raises(TypeError, match="was called with x, t, context, and without"):
        model(*(inputs[name] for name in ("hidden_states", "timestep", "encoder_hidden_states")))


@pytest.mark.parametrize("lengths", [(12, 12), (12, 1), (5, 11), (1, 1)])
def test_hunyuan_video_equals_stock_with_its_mask_on_every_valid_token(lengths: tuple[int, int]) -> None:
    model = models.hunyuan_video()
    inputs = models.hunyuan_video_inputs(2, lengths=lengths)
    tokens: list[list[Tensor]] = [[], []]
    video = RAGGED[0] * RAGGED[1] * RAGGED[2]

    def record(into: list[Tensor]):
        def hook(module: torch.nn.Module, args: object, output: tuple[Tensor, Tensor]) -> None:
            hidden, text = output
            into.extend(hidden)
            into.extend(sample[:length] for sample, length in zip(text, lengths, strict=True))
            assert hidden.shape[1] == video

        return hook

    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    for run in range(2):
        hooks = [block.register_forward_hook(record(tokens[run])) for block in blocks]
        forward(model, inputs)
        for hook in hooks:
            hook.remove()
        enable_draft_attention(model, sparsity=0, **EVERYWHERE)
    assert len(tokens[0]) == 4 * len(blocks)
    assert max(map(error, tokens[1], tokens[0])) < models.FLOAT32_ERROR


@pytest.mark.parametrize("sparsity", [0, 0.8])
def test_padded_text_does_not_influence_anything(sparsity: float) -> None:
    model = models.hunyuan_video()
    inputs = models.hunyuan_video_inputs(2, lengths=(9, 4))
    enable_draft_attention(model, sparsity=sparsity, **EVERYWHERE)
    expected = forward(model, inputs)
    padding = inputs["encoder_attention_mask"] == 0
    inputs["encoder_hidden_states"][padding] = 100 * models.random(int(padding.sum()), 8)
    assert error(forward(model, inputs), expected) < models.FLOAT32_ERROR
    inputs["encoder_hidden_states"][1, 3] *= 2
    assert error(forward(model, inputs), expected) > 1e-3


def test_padded_text_slots_may_be_cut_off() -> None:
    model = models.hunyuan_video()
    inputs = models.hunyuan_video_inputs(2, lengths=(9, 4))
    enable_draft_attention(model, sparsity=0.8, **EVERYWHERE)
    expected = forward(model, inputs)
    for name in ("encoder_hidden_states", "encoder_attention_mask"):
        inputs[name] = inputs[name][:, :9]
    assert error(forward(model, inputs), expected) < models.FLOAT32_ERROR


def test_hunyuan_custom() -> None:
    """Guidance in one batch of two, 34 latent frames, 831 text slots of which each sample fills its own number."""
    grid, lengths = (34, 6, 7), (831, 575)
    model = models.hunyuan_video(num_layers=3, num_single_layers=1)
    inputs = models.hunyuan_video_inputs(2, grid, 974, text=831, lengths=lengths)
    video = grid[0] * grid[1] * grid[2]

    def oracle(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        kv_len = video + torch.tensor(lengths)
        return draft_attention(
            query, key, value, grid, sparsity=0.9, budget="head", tile=(8, 16), kv_len=kv_len, backend="reference"
        )

    dense = forward(model, inputs)
    with attention_replaced(model, ("transformer_blocks.2.attn", "single_transformer_blocks.0.attn"), oracle):
        expected = forward(model, inputs)
    handle = enable_draft_attention(model, config=DraftConfig.hunyuan_custom())
    assert error(forward(model, inputs), expected) < models.FLOAT32_ERROR
    assert error(expected, dense) > 1e-2
    early = inputs | {"timestep": torch.full((2,), 976)}
    sparse = forward(model, early)
    handle.disable()
    assert torch.equal(sparse, forward(model, early))
    report = handle.report().transformers[0]
    assert report.forwards == {"dense": 1, "sparse": 1}
    assert report.grid == grid
    assert report.blocks == (-(-(video + 831) // 128), video // 128)


def test_table_names_diffusers_classes_and_their_pipelines() -> None:
    """All of them exist in the newest diffusers that is supported; an older one may lack some."""
    newest = Version(diffusers.__version__) >= Version("0.42")
    for name in families():
        assert hasattr(diffusers, name) or not newest
        for pipeline in CATALOGUE[name].pipelines:
            assert hasattr(diffusers, pipeline) or not newest, pipeline
    assert {name.split()[0] for name in TINY if "Model" in name} < set(families())


@pytest.mark.parametrize("name", TINY)
def test_family_defaults(name: str) -> None:
    tiny = TINY[name]
    model = tiny.build()
    family = family_of(model)
    assert family.dense_timestep == tiny.dense_timestep
    report = enable_draft_attention(model).report().transformers[0]
    assert report.dense_layers == tiny.dense_layers
    assert set(report.densities) == set(tiny.layers) - set(tiny.dense_layers)


def test_a_subclass_of_a_known_transformer_is_known() -> None:
    class MyWan(diffusers.WanTransformer3DModel):
        pass

    assert family_of(models.build(MyWan, dict(models.wan().config))) is families()["WanTransformer3DModel"]
    assert family_of(torch.nn.Linear(2, 2)) is None

import copy
import functools
import io
import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import diffusers
import models
import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from models import error, patched, processors, run_wan, wan_inputs
from paper import enable_draft_attention
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from diffusers_draft import DraftHandle, disable_draft_attention
from diffusers_draft.attention import kernels
from diffusers_draft.attention.layout import token_layout

SPARSE_LAYERS = ["blocks.1.attn1", "blocks.2.attn1"]
LOADED_ERROR = 1e-5
"""Loaded weights are the same bit for bit but lie elsewhere in memory, where matrix products may round otherwise."""


def run(model: Any, inputs: models.Inputs | None = None) -> Tensor:
    with torch.no_grad():
        return model(**(inputs or wan_inputs())).sample


def enable(pipe: Any, sparsity: float = 0.8) -> DraftHandle:
    return enable_draft_attention(pipe, sparsity, dense_steps=0.25)


@pytest.fixture(scope="module")
def dense_video() -> Tensor:
    return run_wan(models.wan_pipeline())


@pytest.fixture(scope="module")
def sparse_video(dense_video: Tensor) -> Tensor:
    pipe = models.wan_pipeline()
    enable(pipe)
    video = run_wan(pipe)
    assert error(video, dense_video) > 1e-2
    return video


CPU = torch.device("cpu")


def model_offload(pipe: WanPipeline) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe: WanPipeline) -> None:
    """What `enable_sequential_cpu_offload` does, which itself refuses to run without an accelerator."""
    for component in (pipe.transformer, pipe.vae):
        accelerate.cpu_offload(component, CPU, offload_buffers=False)


def group_offload(**options: Any) -> Callable[[WanPipeline], None]:
    return lambda pipe: pipe.transformer.enable_group_offload(onload_device=CPU, offload_device=CPU, **options)


OFFLOADS = {
    "model": model_offload,
    "sequential": sequential_offload,
    "group by block": group_offload(offload_type="block_level", num_blocks_per_group=1),
    "group by leaf": group_offload(offload_type="leaf_level"),
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offload(offload: str, order: str, sparse_video: Tensor, dense_video: Tensor) -> None:
    """Twice, because a pipeline removes and adds accelerate's hooks after every call."""
    pipe = models.wan_pipeline()
    if order == "after":
        OFFLOADS[offload](pipe)
    handle = enable(pipe)
    if order == "before":
        OFFLOADS[offload](pipe)
    for _ in range(2):
        assert torch.equal(run_wan(pipe), sparse_video)
    assert handle.report().transformers[0].steps == {"dense": 2, "sparse": 6}
    handle.disable()
    assert torch.equal(run_wan(pipe), dense_video)


def test_offload_between_two_runs(sparse_video: Tensor) -> None:
    pipe = models.wan_pipeline()
    enable(pipe)
    for offload in (lambda pipe: None, model_offload, lambda pipe: pipe.remove_all_hooks()):
        offload(pipe)
        assert torch.equal(run_wan(pipe), sparse_video)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_layerwise_casting(order: str, compute: torch.dtype) -> None:
    model = models.wan().to(compute)
    inputs = {name: value.to(compute) for name, value in wan_inputs().items()}
    full = run(model, inputs)
    casting = dict(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute)
    if order == "after":
        model.enable_layerwise_casting(**casting)
    enable_draft_attention(model, sparsity=0)
    if order == "before":
        model.enable_layerwise_casting(**casting)
    assert model.blocks[1].attn1.to_q.weight.dtype is torch.float8_e4m3fn
    draft = run(model, inputs)
    disable_draft_attention(model)
    stock = run(model, inputs)
    assert error(stock, full) > 1e-3
    assert error(draft, stock) < (models.FLOAT32_ERROR if compute is torch.float32 else 1e-2)
    enable_draft_attention(model, sparsity=0.8)
    assert error(run(model, inputs), stock) > 1e-2


def test_dtype_changed_while_enabled() -> None:
    model = models.wan()
    inputs = wan_inputs()
    handle = enable_draft_attention(model)
    sparse = run(model, inputs)
    model.to(torch.bfloat16)
    half = run(model, {name: value.to(torch.bfloat16) for name, value in inputs.items()})
    assert half.dtype is torch.bfloat16
    assert error(half, sparse) < 5e-2
    assert "bfloat16" in handle.report().transformers[0].backend_reason


def test_mixed_precision_of_accelerate() -> None:
    model = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare_model(models.hunyuan_video())
    inputs = models.hunyuan_video_inputs(2)
    stock = run(model, inputs)
    handle = enable_draft_attention(model, sparsity=0)
    draft = run(model, inputs)
    assert draft.dtype is stock.dtype is torch.float32
    assert error(draft, stock) < 1e-2
    assert "bfloat16" in handle.report().transformers[0].backend_reason


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_a_model_in_float64(name: str) -> None:
    tiny = models.TINY[name]
    model = tiny.build().double()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in tiny.inputs(2).items()}
    stock = run(model, inputs)
    with enable_draft_attention(model, sparsity=0):
        draft = run(model, inputs)
    assert draft.dtype is stock.dtype is torch.float64
    assert error(draft, stock) < 1e-12


@pytest.mark.parametrize("schedule", ["falling", "constant"])
@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "CosmosTransformer3DModel"])
def test_shapes_of_a_model_on_the_meta_device(name: str, schedule: Any) -> None:
    tiny = models.TINY[name]
    model = tiny.build().to("meta")
    inputs = {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in tiny.inputs(2).items()}
    stock = run(model, inputs)
    handle = enable_draft_attention(model, schedule=schedule)
    draft = run(model, inputs)
    assert (draft.shape, draft.dtype, draft.device) == (stock.shape, stock.dtype, stock.device)
    assert "no sparse call yet" in str(handle.report())


def test_a_model_on_the_meta_device_whose_video_is_in_the_values_of_its_inputs() -> None:
    tiny = models.TINY["LTXVideoTransformer3DModel conditions"]
    model = tiny.build().to("meta")
    inputs = {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in tiny.inputs(2).items()}
    enable_draft_attention(model)
    with pytest.raises(ValueError, match=r"on the meta device an input has no values\. Disable it"):
        run(model, inputs)


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_default_dtype(name: str) -> None:
    tiny = models.TINY[name]
    model, fresh, inputs = tiny.build(), tiny.build(), tiny.inputs(2)
    enable_draft_attention(model, probes=16)
    expected = run(model, inputs)
    kernels.choose.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        enable_draft_attention(fresh, probes=16)
        found = run(fresh, inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype is torch.float32
    assert error(found, expected) < models.FLOAT32_ERROR


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_default_device(name: str) -> None:
    tiny = models.TINY[name]
    model, fresh, inputs = tiny.build(), tiny.build(), tiny.inputs(2)
    enable_draft_attention(model, probes=16)
    expected = run(model, inputs)
    kernels.choose.cache_clear()
    token_layout.cache_clear()
    with torch.device("meta"):
        handle = enable_draft_attention(fresh, probes=16)
        assert torch.equal(run(fresh, inputs), expected)
        assert handle.report().transformers[0].density < 1


def lora_config() -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)


def add_adapter(model: WanTransformer3DModel) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.add_adapter(lora_config())


@pytest.mark.parametrize("sparsity", [0, 0.8])
def test_lora_adapter(sparsity: float) -> None:
    first, second = models.wan(), models.wan()
    plain = run(first)
    add_adapter(first)
    stock = run(first)
    assert error(stock, plain) > 1e-2
    enable_draft_attention(first, sparsity)
    enable_draft_attention(second, sparsity)
    without = run(second)
    add_adapter(second)
    assert torch.equal(run(first), run(second))
    assert (error(run(first), stock) < models.FLOAT32_ERROR) == (sparsity == 0)
    second.disable_adapters()
    assert torch.equal(run(second), without)
    second.enable_adapters()
    second.delete_adapters("default")
    assert torch.equal(run(second), without)
    disable_draft_attention(first)
    assert torch.equal(run(first), stock)


@pytest.mark.parametrize("offload", [False, True])
def test_lora_weights_of_a_pipeline(
    offload: bool, sparse_video: Tensor, dense_video: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading removes accelerate's hooks and adds them again."""
    donor = models.wan()
    add_adapter(donor)
    weights = {f"transformer.{name}": value.clone() for name, value in get_peft_model_state_dict(donor).items()}
    expected = models.wan_pipeline(donor)
    enable(expected)
    with_lora = run_wan(expected)
    assert error(with_lora, sparse_video) > 1e-2
    pipe = models.wan_pipeline()
    enable(pipe)
    if offload:
        # Loading calls it without a device, and then it looks for an accelerator.
        offload_to_cpu = functools.partial(pipe.enable_model_cpu_offload, device="cpu")
        monkeypatch.setattr(pipe, "enable_model_cpu_offload", offload_to_cpu, raising=False)
        pipe.enable_model_cpu_offload()
    assert torch.equal(run_wan(pipe), sparse_video)
    pipe.load_lora_weights(dict(weights))
    assert torch.equal(run_wan(pipe), with_lora)
    assert patched(pipe.transformer) == SPARSE_LAYERS
    pipe.fuse_lora()
    assert error(run_wan(pipe), with_lora) < 1e-4
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert error(run_wan(pipe), sparse_video) < 1e-4
    disable_draft_attention(pipe)
    assert error(run_wan(pipe), dense_video) < 1e-4


@pytest.mark.parametrize("order", ["before", "after"])
def test_fused_qkv_projections(order: str) -> None:
    model = models.wan()
    stock = run(model)
    if order == "after":
        model.fuse_qkv_projections()
    enable_draft_attention(model, sparsity=0.8)
    if order == "before":
        model.fuse_qkv_projections()
    assert model.blocks[1].attn1.fused_projections
    assert patched(model) == SPARSE_LAYERS
    fused = run(model)
    model.unfuse_qkv_projections()
    assert patched(model) == SPARSE_LAYERS
    assert error(fused, run(model)) < models.FLOAT32_ERROR
    disable_draft_attention(model)
    assert torch.equal(run(model), stock)


@pytest.fixture
def backend_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[AttentionBackendName]]:
    """Counts the calls of diffusers' attention backends; restores the active one, which is global."""
    calls: Counter[AttentionBackendName] = Counter()

    def counting(backend: AttentionBackendName, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def attention(*args: Any, **kwargs: Any) -> Tensor:
            calls[backend] += 1
            return function(*args, **kwargs)

        return attention

    active = _AttentionBackendRegistry._active_backend
    for backend in (AttentionBackendName.NATIVE, AttentionBackendName._NATIVE_MATH):
        original = _AttentionBackendRegistry._backends[backend]
        monkeypatch.setitem(_AttentionBackendRegistry._backends, backend, counting(backend, original))
    yield calls
    _AttentionBackendRegistry._active_backend = active


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("backend", ["_native_math", "native"])
def test_dense_calls_use_the_attention_backend(
    backend: str, order: str, backend_calls: Counter[AttentionBackendName]
) -> None:
    name = AttentionBackendName(backend)
    model = models.wan()
    stock = processors(model)
    if order == "after":
        model.set_attention_backend(backend)
    enable_draft_attention(model)
    if order == "before":
        model.set_attention_backend(backend)
    # It also set the backend of all models that have none of their own: another one shows whose is used.
    _AttentionBackendRegistry._active_backend = next(
        other for other in (AttentionBackendName.NATIVE, AttentionBackendName._NATIVE_MATH) if other is not name
    )
    cross = 3
    run(model, wan_inputs(timestep=500))
    assert backend_calls == {name: cross + 1}
    run(model, wan_inputs(timestep=950))
    assert backend_calls == {name: cross + 1 + cross + 3}
    disable_draft_attention(model)
    assert processors(model) == stock
    assert {processor._attention_backend for processor in stock.values()} == {name}


def test_reset_attention_backend_while_enabled(backend_calls: Counter[AttentionBackendName]) -> None:
    model = models.wan()
    model.set_attention_backend("_native_math")
    enable_draft_attention(model)
    model.reset_attention_backend()
    disable_draft_attention(model)
    assert {processor._attention_backend for processor in processors(model).values()} == {None}


def test_attention_backend_survives_new_settings(backend_calls: Counter[AttentionBackendName]) -> None:
    model = models.wan()
    enable_draft_attention(model)
    model.set_attention_backend("_native_math")
    enable_draft_attention(model, 0.5)
    enable_draft_attention(model, 0.5, dense_layers=(1,))
    assert {processor._attention_backend for processor in processors(model).values()} == {
        AttentionBackendName._NATIVE_MATH
    }


CACHES = {
    "first block": FirstBlockCacheConfig(threshold=1e6),
    "pyramid": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 990),
        spatial_attention_block_identifiers=("blocks",),
        current_timestep_callback=lambda: 500,
    ),
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("cache", CACHES)
def test_cache(cache: str, order: str, dense_video: Tensor) -> None:
    expected = models.wan_pipeline()
    expected.transformer.enable_cache(CACHES[cache])
    stock = run_wan(expected)
    assert error(stock, dense_video) > 1e-3
    pipe = models.wan_pipeline()
    if order == "after":
        pipe.transformer.enable_cache(CACHES[cache])
    handle = enable(pipe, sparsity=0)
    if order == "before":
        pipe.transformer.enable_cache(CACHES[cache])
    for _ in range(2):
        assert error(run_wan(pipe), stock) < 1e-5
    assert handle.report().transformers[0].steps == {"dense": 2, "sparse": 6}
    pipe.transformer.disable_cache()
    assert error(run_wan(pipe), dense_video) < 1e-5
    assert patched(pipe.transformer) == SPARSE_LAYERS


def faster_cache(inputs: models.Inputs, **options: Any) -> FasterCacheConfig:
    """Leaves out the first half of the batch in every second forward, and nothing else."""
    batched = [name for name, value in inputs.items() if torch.is_tensor(value) and value.shape[0] == 2]
    return FasterCacheConfig(
        **dict(_unconditional_conditional_input_kwargs_identifiers=batched) | options,
        spatial_attention_timestep_skip_range=(-1, 0),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 901),
        current_timestep_callback=lambda: 500,
        attention_weight_callback=lambda module: 0.3,
    )


GUIDED = {
    "wan",
    "hunyuan_video",
    "HunyuanVideo15Transformer3DModel",
    "MochiTransformer3DModel",
    "MotifVideoTransformer3DModel",
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", sorted(GUIDED & models.TINY.keys()))
def test_faster_cache_with_guidance(name: str, order: str) -> None:
    tiny = models.TINY[name]
    inputs = tiny.inputs(2)

    def two_forwards(model: Any) -> list[Tensor]:
        with torch.no_grad():
            return [model(**inputs, return_dict=False)[0] for _ in range(2)]

    expected, model = tiny.build(), tiny.build()
    expected.enable_cache(faster_cache(inputs))
    if order == "after":
        model.enable_cache(faster_cache(inputs))
    handle = enable_draft_attention(model, sparsity=0, dense_layers=())
    if order == "before":
        model.enable_cache(faster_cache(inputs))
    stock = two_forwards(expected)
    assert error(stock[1], stock[0]) > 1e-3
    assert max(map(error, two_forwards(model), stock)) < models.FLOAT32_ERROR
    assert handle.report().transformers[0].density == 1


KNOWN = FasterCacheConfig()._unconditional_conditional_input_kwargs_identifiers
"""Inputs that FasterCache halves unless it is told others: HunyuanVideo 1.5 has more."""


@pytest.mark.skipif("HunyuanVideo15Transformer3DModel" not in models.TINY, reason="this diffusers has none")
@pytest.mark.parametrize("sparsity", [0, 0.5])
@pytest.mark.parametrize("name", ["HunyuanVideo15Transformer3DModel", "HunyuanVideo15Transformer3DModel image"])
def test_faster_cache_that_leaves_some_inputs_whole_pairs_texts_as_stock(name: str, sparsity: float) -> None:
    """Stock pairs the second sample's one text with the first sample's other."""
    tiny = models.TINY[name]
    inputs = tiny.inputs(2)
    cache = faster_cache(inputs, _unconditional_conditional_input_kwargs_identifiers=KNOWN)
    halves = {key: value[1:] if key in KNOWN else value[:1] for key, value in inputs.items() if torch.is_tensor(value)}
    seen: list[Tensor] = []
    with torch.no_grad():
        expected, model = tiny.build(), tiny.build()
        expected.enable_cache(cache)
        model.enable_cache(cache)
        enable_draft_attention(model, sparsity=sparsity, dense_layers=())
        for built in (expected, model):
            built.proj_out.register_forward_hook(lambda module, args, output: seen.append(output))
            for _ in range(2):
                built(**inputs, return_dict=False)
        alone = tiny.build()
        enable_draft_attention(alone, sparsity=sparsity, dense_layers=())
        alone.proj_out.register_forward_hook(lambda module, args, output: seen.append(output))
        alone(**halves, return_dict=False)
    _, stock, _, draft, of_halves = seen
    assert len(draft) == 1
    assert error(draft, of_halves) < models.FLOAT32_ERROR
    assert (error(draft, stock) < models.FLOAT32_ERROR) == (sparsity == 0)


def test_saved_transformer_is_stock(tmp_path: Any) -> None:
    model = models.wan()
    stock = run(model)
    model.save_pretrained(tmp_path / "stock")
    enable_draft_attention(model)
    sparse = run(model)
    model.save_pretrained(tmp_path / "draft")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("stock", "draft")]
    assert configs[0] == configs[1]
    weights = [load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("stock", "draft")]
    assert weights[0].keys() == weights[1].keys()
    assert sorted(path.name for path in (tmp_path / "stock").iterdir()) == sorted(
        path.name for path in (tmp_path / "draft").iterdir()
    )
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "draft")
    assert patched(loaded) == []
    assert models.error(run(loaded), stock) <= LOADED_ERROR
    assert torch.equal(run(model), sparse)


def test_saved_pipeline_is_stock(tmp_path: Any, sparse_video: Tensor, dense_video: Tensor) -> None:
    pipe = models.wan_pipeline()
    enable(pipe)
    pipe.save_pretrained(tmp_path)
    assert "draft" not in (tmp_path / "model_index.json").read_text().lower()
    loaded = WanPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    loaded.set_progress_bar_config(disable=True)
    assert patched(loaded.transformer) == []
    assert models.error(run_wan(loaded), dense_video) <= LOADED_ERROR
    assert torch.equal(run_wan(pipe), sparse_video)


def test_state_dict_has_nothing_new() -> None:
    model = models.wan()
    names = (
        list(model.state_dict()),
        [name for name, _ in model.named_modules()],
        [n for n, _ in model.named_buffers()],
    )
    enable_draft_attention(model)
    run(model)
    assert names == (
        list(model.state_dict()),
        [name for name, _ in model.named_modules()],
        [name for name, _ in model.named_buffers()],
    )
    models.wan(seed=1).load_state_dict(model.state_dict())


def saved_and_loaded(model: WanTransformer3DModel) -> WanTransformer3DModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled_and_unpickled(model: WanTransformer3DModel) -> WanTransformer3DModel:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled_and_unpickled, saved_and_loaded])
def test_copy_of_a_patched_transformer_is_stock(duplicate: Callable[[Any], Any]) -> None:
    model = models.wan()
    model.blocks[1].attn1.processor._attention_backend = AttentionBackendName.NATIVE
    stock = run(model)
    handle = enable_draft_attention(model)
    sparse = run(model)
    duplicated = duplicate(model)
    assert {type(processor) for processor in processors(duplicated).values()} == {WanAttnProcessor}
    assert processors(duplicated)["blocks.1.attn1"].__dict__ == {"_attention_backend": AttentionBackendName.NATIVE}
    assert torch.equal(run(duplicated), stock)
    assert handle.report().transformers[0].forwards == {"dense": 0, "sparse": 1}
    assert torch.equal(run(model), sparse)
    with enable_draft_attention(duplicated, 0.5) as other:
        run(duplicated)
        assert other.report().transformers[0].forwards == {"dense": 0, "sparse": 1}
        assert torch.equal(run(model), sparse)
    assert torch.equal(run(duplicated), stock)
    handle.disable()
    assert torch.equal(run(model), stock)


def test_pickle_does_not_need_this_package() -> None:
    model = models.wan()
    enable_draft_attention(model)
    assert b"diffusers_draft" not in pickle.dumps(model)


def test_diffusers_is_not_patched() -> None:
    """Nothing of diffusers itself changes, only the processors of this one model."""
    dispatch = diffusers.models.transformers.transformer_wan.dispatch_attention_fn
    call = WanAttnProcessor.__call__
    other, model = models.wan(), models.wan()
    stock = run(other)
    enable_draft_attention(model)
    run(model)
    assert diffusers.models.transformers.transformer_wan.dispatch_attention_fn is dispatch
    assert WanAttnProcessor.__call__ is call
    assert torch.equal(run(other), stock)

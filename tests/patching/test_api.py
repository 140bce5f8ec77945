import copy
import gc
import inspect
import math
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import diffusers.modular_pipelines
import models
import pytest
import torch
import torch.distributed as dist
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0
from models import RAGGED, patched, processors, run_wan, wan_inputs
from paper import PAPER, enable_draft_attention
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import diffusers_draft
from diffusers_draft import DraftConfig, DraftHandle, disable_draft_attention
from diffusers_draft.attention import kernels
from diffusers_draft.families import families
from diffusers_draft.patching.attachment import attachment_of


def run(model: nn.Module, inputs: models.Inputs | None = None) -> Tensor:
    with torch.no_grad():
        return model(**(inputs or wan_inputs())).sample


def state(model: nn.Module) -> Any:
    """Everything that enabling could leave behind in a model."""
    kept = processors(model)
    return (
        {path: (id(processor), dict(processor.__dict__)) for path, processor in kept.items()},
        list(model._forward_pre_hooks.values()),
        list(model._forward_hooks),
        sorted(model.__dict__),
        list(model.state_dict()),
        dict(model.config),
    )


@pytest.fixture
def shadows() -> Any:
    """Lists the modules made for patched processors since the test began."""

    def everything() -> set[str]:
        return {name for name in sys.modules if name.startswith("diffusers_draft.patching.shadow.")}

    before = everything()
    return lambda: everything() - before


def test_public_names() -> None:
    assert sorted(diffusers_draft.__all__) == [
        "DraftConfig",
        "DraftHandle",
        "disable_draft_attention",
        "draft_attention",
        "enable_draft_attention",
        "enable_parallelism",
    ]


# What can be enabled


def test_pipeline() -> None:
    pipe = models.wan_pipeline()
    before = dict(pipe.config)
    handle = enable_draft_attention(pipe)
    assert isinstance(handle, DraftHandle)
    assert patched(pipe.transformer) == ["blocks.1.attn1", "blocks.2.attn1"]
    assert dict(pipe.config) == before
    disable_draft_attention(pipe)
    assert patched(pipe.transformer) == []


@pytest.mark.parametrize("name", models.TINY)
def test_transformer_alone(name: str) -> None:
    tiny = models.TINY[name]
    transformer = tiny.build()
    enable_draft_attention(transformer)
    assert set(patched(transformer)) == set(tiny.layers) - set(tiny.dense_layers)
    disable_draft_attention(transformer)
    assert patched(transformer) == []


def modular_wan_pipeline(**components: Any) -> Any:
    blocks = getattr(diffusers.modular_pipelines, "WanBlocks", None) or diffusers.modular_pipelines.WanAutoBlocks
    pipe = blocks().init_pipeline()
    pipe.update_components(**components)
    return pipe


def test_modular_pipeline() -> None:
    pipe = modular_wan_pipeline(transformer=models.wan(), scheduler=models.wan_scheduler())
    assert isinstance(pipe, diffusers.ModularPipeline)
    with enable_draft_attention(pipe, dense_steps=0.5) as handle:
        assert patched(pipe.transformer) == ["blocks.1.attn1", "blocks.2.attn1"]
        pipe.scheduler.set_timesteps(4)
        for timestep in pipe.scheduler.timesteps:
            run(pipe.transformer, wan_inputs(timestep=float(timestep)))
            pipe.scheduler.step(torch.zeros(1, 1, 1), timestep, torch.zeros(1, 1, 1))
        assert handle.report().transformers[0].steps == {"dense": 2, "sparse": 2}
    assert patched(pipe.transformer) == []


def test_both_transformers() -> None:
    pipe = models.wan_pipeline(models.wan(), transformer_2=models.wan(num_layers=2))
    handle = enable_draft_attention(pipe)
    assert [report.component for report in handle.report().transformers] == ["transformer", "transformer_2"]
    assert patched(pipe.transformer) == ["blocks.1.attn1", "blocks.2.attn1"]
    assert patched(pipe.transformer_2) == ["blocks.1.attn1"]
    handle.disable()
    assert patched(pipe.transformer) == patched(pipe.transformer_2) == []


@pytest.mark.parametrize("there", ["transformer", "transformer_2"])
def test_only_one_transformer(there: str) -> None:
    pipe = models.wan_pipeline(**{there: models.wan()})
    assert [name for name in ("transformer", "transformer_2") if getattr(pipe, name) is None] != []
    handle = enable_draft_attention(pipe)
    assert [report.component for report in handle.report().transformers] == [there]
    assert patched(getattr(pipe, there))


def test_the_same_transformer_twice_in_a_pipeline() -> None:
    transformer = models.wan()
    pipe = models.wan_pipeline(transformer, transformer_2=transformer)
    before, stock = state(transformer), run(transformer)
    handle = enable_draft_attention(pipe, 0.5)
    enable_draft_attention(pipe, dense_steps=0)
    assert len(transformer._forward_pre_hooks) == 1
    assert not torch.equal(run(transformer), stock)
    handle.disable()
    assert patched(transformer)
    disable_draft_attention(pipe)
    assert state(transformer) == before
    assert torch.equal(run(transformer), stock)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def with_lora(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["to_q", "to_v"]))


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "distributed": nn.parallel.DistributedDataParallel,
    "lora": with_lora,
    "lora, distributed": lambda model: nn.parallel.DistributedDataParallel(with_lora(model)),
}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("in_pipeline", [False, True], ids=["alone", "in a pipeline"])
def test_wrapped_transformer(name: str, in_pipeline: bool, one_process: None) -> None:
    model = models.wan()
    wrapper = WRAPPERS[name](model)
    stock, settings = run(wrapper), dict(sparsity=0.8, dense_layers=(), dense_steps=0)
    given = models.Loop(None, transformer=wrapper) if in_pipeline else wrapper
    with enable_draft_attention(given, **settings) as handle:
        sparse = run(wrapper)
        assert not torch.allclose(sparse, stock)
        (report,) = handle.report().transformers
        assert report.forwards == {"dense": 0, "sparse": 1} and report.sparse_calls == 3
    assert torch.equal(run(wrapper), stock)
    enable_draft_attention(given, **settings)
    disable_draft_attention(given)
    assert patched(model) == []
    with enable_draft_attention(model, **settings):
        assert torch.allclose(run(model), sparse, atol=1e-5)


# What cannot


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


def test_a_wrapper_that_is_not_known_is_named_with_what_is_in_it() -> None:
    wrapper = Around(models.wan())
    for given in (wrapper, models.Loop(None, transformer=wrapper)):
        with pytest.raises(
            TypeError, match=r"does not know the wrapper Around\. Give it the WanTransformer3DModel inside"
        ):
            enable_draft_attention(given)
    assert patched(wrapper.inner) == []


def test_modular_pipeline_before_its_components_are_loaded() -> None:
    for call in (enable_draft_attention, disable_draft_attention):
        with pytest.raises(
            TypeError, match=r"^The transformer of this \w+ is not loaded. Call its load_components\(\)"
        ):
            call(modular_wan_pipeline())


def test_unknown_transformer() -> None:
    class UnknownTransformer(torch.nn.Linear):
        pass

    transformer = UnknownTransformer(2, 2)
    for call in (enable_draft_attention, disable_draft_attention):
        for pipe in (transformer, models.Loop(None, transformer=transformer)):
            with pytest.raises(TypeError) as error:
                call(pipe)
            assert "UnknownTransformer" in str(error.value)
            for name in families():
                assert name in str(error.value)


@pytest.mark.parametrize("thing", [None, "pipeline", 3, object(), {"transformer": None}, [models.wan]])
def test_not_a_pipeline(thing: Any) -> None:
    for call in (enable_draft_attention, disable_draft_attention):
        with pytest.raises(
            TypeError, match=f"Expected a diffusers pipeline or transformer, got {type(thing).__name__}"
        ):
            call(thing)


def test_pipeline_without_transformer() -> None:
    with pytest.raises(TypeError, match=r"Loop.*WanTransformer3DModel"):
        enable_draft_attention(models.Loop(None, vae=models.wan_vae(), transformer=None))


def test_stock_processor_that_ends_in_another_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.wan()

    def call_of_tomorrow(self: Any, attn: Any, hidden_states: Tensor) -> Tensor:
        return hidden_states

    monkeypatch.setattr(type(model.blocks[0].attn1.processor), "__call__", call_of_tomorrow)
    with pytest.raises(ValueError, match=r"WanAttnProcessor in diffusers .* ends in no attention call"):
        enable_draft_attention(model)
    assert not patched(model)


class MyProcessor:
    def __call__(self, attn: nn.Module, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


class MyWanAttnProcessor(type(models.wan().blocks[0].attn1.processor)):
    """Calls upstream's code, but is not upstream's."""


@pytest.mark.parametrize("make", [MyProcessor, MyWanAttnProcessor, PAGIdentitySelfAttnProcessor2_0])
def test_custom_processor(make: Any) -> None:
    model = models.wan()
    model.blocks[1].attn1.processor = make()
    before = state(model)
    with pytest.raises(ValueError, match=rf"blocks\.1\.attn1.*{make.__name__}.*WanAttnProcessor"):
        enable_draft_attention(model)
    assert state(model) == before


def with_perturbed_attention(model: nn.Module, layer: int) -> None:
    config = LayerSkipConfig(indices=[layer], skip_attention=False, skip_attention_scores=True, skip_ff=False)
    apply_layer_skip(model, config)


@pytest.fixture
def perturbed_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets diffusers' guidance into Wan, whose processor its registry has under an older name."""
    AttentionProcessorRegistry._register()
    metadata = AttentionProcessorMetadata(
        skip_processor_output_fn=lambda module, hidden_states, *_, **__: hidden_states
    )
    stock = type(models.wan().blocks[0].attn1.processor)
    monkeypatch.setitem(AttentionProcessorRegistry._registry, stock, metadata)


def test_perturbed_attention_guidance_is_not_silenced(perturbed_attention: None) -> None:
    model = models.wan()
    stock = run(model)
    with_perturbed_attention(model, 1)
    perturbed = run(model)
    assert not torch.allclose(perturbed, stock)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn1 .*perturbed attention guidance .*dense_layers"):
        enable_draft_attention(model, 0, dense_layers=(0,), dense_steps=0)
    assert not patched(model)
    with enable_draft_attention(model, 0, dense_layers=(1,), dense_steps=0):
        assert torch.allclose(run(model), perturbed, atol=1e-5)


def test_perturbed_attention_guidance_after_enabling_is_an_error(perturbed_attention: None) -> None:
    model = models.wan()
    enable_draft_attention(model, dense_layers=())
    with pytest.raises(ValueError, match="not registered"):
        with_perturbed_attention(model, 1)


def test_custom_processor_on_cross_attention_is_fine() -> None:
    model = models.wan()
    model.blocks[1].attn2.processor = mine = MyProcessor()
    with enable_draft_attention(model):
        run(model)
    assert model.blocks[1].attn2.processor is mine


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sparsity=1.0), "sparsity"),
        (dict(sparsity=-0.1), "sparsity"),
        (dict(sparsity=math.nan), "sparsity"),
        (dict(budget="heads"), "'head', 'row'"),
        (dict(tile=(8, 15)), "tile"),
        (dict(tile=(1, 8, 16, 1)), "tile"),
        (dict(dense_steps=1.5), "dense_steps"),
        (dict(dense_steps=25), "dense_steps"),
        (dict(dense_layers=(-1,)), "dense_layers"),
        (dict(dense_layers=(0, 3)), r"dense_layers has \[3\].*WanTransformer3DModel has 3 layers"),
        (dict(backend="flash"), "'flash'.*'auto'.*'torch'"),
        (dict(config=DraftConfig(), sparsity=0.7), "either config or single options"),
        (dict(config=DraftConfig(sparsity=0.8), dense_layers=()), "either config or single options"),
        (dict(config=DraftConfig(sparsity=0.5), sparsity=0.8), "either config or single options"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    pipe = models.wan_pipeline()
    before = state(pipe.transformer)
    with pytest.raises(ValueError, match=message):
        enable_draft_attention(pipe, **options)
    assert state(pipe.transformer) == before


@pytest.mark.parametrize(
    "config",
    [{}, {"sparsity": 0.9}, "paper", 0.9, False, DraftConfig, DraftConfig().method],
    ids=lambda config: type(config).__name__,
)
def test_a_config_that_is_none(config: Any) -> None:
    model = models.wan()
    before = state(model)
    with pytest.raises(TypeError, match=r"config must be a DraftConfig, got .*\. Make one, as in DraftConfig\("):
        enable_draft_attention(model, config=config)
    assert state(model) == before


def test_backend_that_is_missing_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BACKENDS", (*kernels.BACKENDS, "nowhere"))
    model = models.wan()
    before = state(model)
    with pytest.raises(ImportError, match="Backend 'nowhere' needs"):
        enable_draft_attention(model, backend="nowhere")
    assert state(model) == before


def test_options_are_keywords() -> None:
    with pytest.raises(TypeError, match="positional"):
        enable_draft_attention(models.wan(), 0.9, "row")


@pytest.mark.parametrize("there", ["before", "after"])
def test_ring_attention(there: str) -> None:
    ring = ParallelConfig(context_parallel_config=ContextParallelConfig(ring_degree=2))
    model = models.wan()
    if there == "before":
        model.blocks[1].attn1.processor._parallel_config = ring
        before = state(model)
        with pytest.raises(NotImplementedError, match=r"ring_degree=2"):
            enable_draft_attention(model)
        assert state(model) == before
    else:
        enable_draft_attention(model)
        model.blocks[1].attn1.processor._parallel_config = ring
        with pytest.raises(NotImplementedError, match=r"ring_degree=2"):
            run(model)


# Enabling and disabling again and again


def test_context_manager() -> None:
    model = models.wan()
    stock = run(model)
    with enable_draft_attention(model) as handle:
        assert isinstance(handle, DraftHandle)
        assert not torch.equal(run(model), stock)
    assert torch.equal(run(model), stock)
    with pytest.raises(ZeroDivisionError), enable_draft_attention(model):
        1 / 0  # noqa: B018
    assert patched(model) == []


def test_enabling_again_replaces_the_settings(shadows: Any) -> None:
    model, other = models.wan(), models.wan()
    stock, before = run(model), state(model)
    settings = dict(sparsity=0.5, dense_layers=(2,))
    enable_draft_attention(other, **settings)
    modules = shadows()
    handles = [enable_draft_attention(model, sparsity=0.9), enable_draft_attention(model, **settings)]
    assert patched(model) == ["blocks.0.attn1", "blocks.1.attn1"]
    assert len(model._forward_pre_hooks) == 1
    assert len(shadows() - modules) == 1
    assert torch.equal(run(model), run(other))
    assert handles[1].config == DraftConfig(**PAPER | settings)
    assert [handle.report().transformers[0].attached for handle in handles] == [False, True]
    assert [handle.report().transformers[0].forwards["sparse"] for handle in handles] == [0, 1]
    handles[1].disable()
    assert state(model) == before
    assert torch.equal(run(model), stock)


def test_old_handle_is_harmless() -> None:
    model = models.wan()
    old = enable_draft_attention(model, sparsity=0.5)
    enable_draft_attention(model, sparsity=0.9)
    sparse = run(model)
    old.disable()
    old.__exit__(None, None, None)
    assert patched(model) == ["blocks.1.attn1", "blocks.2.attn1"]
    assert torch.equal(run(model), sparse)


def test_disabling_twice_is_harmless(shadows: Any) -> None:
    model = models.wan()
    before = state(model)
    disable_draft_attention(model)
    handle = enable_draft_attention(model)
    for _ in range(2):
        handle.disable()
        disable_draft_attention(model)
        assert state(model) == before
    assert shadows() == set()


def test_disabling_the_pipeline_disables_what_was_enabled_on_its_transformer() -> None:
    pipe = models.wan_pipeline()
    handle = enable_draft_attention(pipe.transformer)
    disable_draft_attention(pipe)
    assert patched(pipe.transformer) == []
    assert not handle.report().transformers[0].attached


def test_processor_replaced_by_someone_else_stays() -> None:
    model = models.wan()
    handle = enable_draft_attention(model)
    model.blocks[1].attn1.processor = mine = MyProcessor()
    with pytest.raises(ValueError, match=r"blocks\.1\.attn1.*MyProcessor"):
        enable_draft_attention(model, sparsity=0.5)
    handle.disable()
    assert model.blocks[1].attn1.processor is mine
    assert patched(model) == []


def test_attributes_set_while_enabled_survive() -> None:
    model = models.wan()
    originals = processors(model)
    handle = enable_draft_attention(model)
    model.blocks[1].attn1.processor.label = "kept"
    handle = enable_draft_attention(model, sparsity=0.5)
    assert model.blocks[1].attn1.processor.label == "kept"
    handle.disable()
    assert model.blocks[1].attn1.processor is originals["blocks.1.attn1"]
    assert model.blocks[1].attn1.processor.__dict__ == {"label": "kept"}


def test_isinstance_and_signature_of_the_stock_processor_stay() -> None:
    model = models.hunyuan_video()
    stock = model.transformer_blocks[2].attn.processor
    enable_draft_attention(model)
    ours = model.transformer_blocks[2].attn.processor
    assert ours is not stock
    assert isinstance(ours, type(stock))
    assert inspect.signature(ours.__call__) == inspect.signature(stock.__call__)


# Failures half way


def test_second_transformer_invalid() -> None:
    pipe = models.wan_pipeline(models.wan(), transformer_2=models.wan())
    pipe.transformer_2.blocks[1].attn1.processor = MyProcessor()
    before = state(pipe.transformer), state(pipe.transformer_2)
    with pytest.raises(ValueError, match="MyProcessor"):
        enable_draft_attention(pipe)
    assert (state(pipe.transformer), state(pipe.transformer_2)) == before


def refuse_hooks_once(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.undo()
        raise OSError("no hooks today")

    monkeypatch.setattr(model, "register_forward_pre_hook", refuse, raising=False)


def test_hook_refused(shadows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = models.wan_pipeline(models.wan(), transformer_2=models.wan())
    before = state(pipe.transformer), state(pipe.transformer_2)
    refuse_hooks_once(pipe.transformer_2, monkeypatch)
    with pytest.raises(OSError, match="no hooks today"):
        enable_draft_attention(pipe)
    assert (state(pipe.transformer), state(pipe.transformer_2)) == before
    assert shadows() == set()


def test_failure_while_replacing_keeps_the_old_settings(shadows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.wan()
    handle = enable_draft_attention(model, sparsity=0.9)
    sparse, before, modules = run(model), processors(model), shadows()
    refuse_hooks_once(model, monkeypatch)
    with pytest.raises(OSError, match="no hooks today"):
        enable_draft_attention(model, sparsity=0.3)
    assert handle.report().transformers[0].attached
    assert processors(model) == before
    assert torch.equal(run(model), sparse)
    assert handle.report().transformers[0].forwards == {"dense": 0, "sparse": 2}
    assert shadows() == modules  # `torch.compile` needs them
    handle.disable()
    assert patched(model) == []


@pytest.mark.parametrize(
    "wrong", [dict(sparsity=2), dict(dense_layers=(7,)), dict(dense_steps=0.5), dict(backend="flash")]
)
def test_wrong_options_while_replacing_keep_the_old_settings(wrong: dict[str, Any]) -> None:
    model = models.wan()
    handle = enable_draft_attention(model)
    before = state(model)
    with pytest.raises(ValueError):
        enable_draft_attention(model, **wrong)
    assert state(model) == before
    assert handle.report().transformers[0].attached


@pytest.mark.parametrize("where", ["model", "layer"])
@pytest.mark.parametrize("what", ["enable", "handle", "disable"])
def test_in_a_running_forward(where: str, what: str) -> None:
    model = models.wan()
    handle = enable_draft_attention(model)
    before = processors(model), list(model._forward_pre_hooks.values())
    calls = {
        "enable": lambda: enable_draft_attention(model, 0.5),
        "handle": handle.disable,
        "disable": lambda: disable_draft_attention(model),
    }

    def hook(*_: Any) -> None:
        with pytest.raises(RuntimeError, match=r"WanTransformer3DModel is running.*callback_on_step_end"):
            calls[what]()
        caught.append(True)

    caught: list[bool] = []
    hooked = (model if where == "model" else model.blocks[1].attn1).register_forward_hook(hook)
    sparse = run(model)
    assert caught == [True]
    hooked.remove()
    assert torch.equal(run(model), sparse)
    assert (processors(model), list(model._forward_pre_hooks.values())) == before


def test_an_interrupted_forward_can_be_disabled() -> None:
    """Hooks that are always called are not, after Ctrl-C."""
    model = models.wan()
    before = state(model)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.blocks[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), enable_draft_attention(model):
        run(model)
    hook.remove()
    assert state(model) == before


def test_another_model_may_be_running() -> None:
    model, other = models.wan(), models.wan()
    model.register_forward_hook(lambda *_: enable_draft_attention(other) and None)
    run(model)
    assert patched(other)


# What is left in memory


def patched_and_dropped() -> tuple[DraftHandle, list[weakref.ref]]:
    pipe = models.wan_pipeline()
    handle = enable_draft_attention(pipe)
    run_wan(pipe)
    return handle, [weakref.ref(thing) for thing in (pipe, pipe.transformer, pipe.scheduler)]


def test_handle_does_not_keep_the_pipeline_alive() -> None:
    handle, references = patched_and_dropped()
    gc.collect()
    assert [reference() for reference in references] == [None] * 3
    assert handle.report().transformers[0].grid == RAGGED
    handle.disable()


def test_enabling_keeps_nothing_of_the_caller_alive() -> None:
    pipe = models.wan_pipeline()
    reference = weakref.ref(pipe)
    handle = enable_draft_attention(pipe)
    del pipe
    gc.collect()
    assert reference() is None
    handle.disable()


def test_nothing_piles_up(shadows: Any) -> None:
    model = models.wan()
    for _ in range(3):
        for sparsity in (0.5, 0.9):
            enable_draft_attention(model, sparsity)
            assert len(shadows()) == 1
        disable_draft_attention(model)
        assert shadows() == set()


def living(shadows: Any) -> tuple[int, int]:
    """Subclasses of a stock processor that exist, and modules."""
    gc.collect()
    stock = type(models.wan().blocks[0].attn1.processor)
    return len(stock.__subclasses__()), len(shadows())


def test_three_hundred_enablings_add_one_class(shadows: Any) -> None:
    model = models.wan()
    classes, modules = living(shadows)
    for number in range(300):
        handle = enable_draft_attention(model, 0.3 + number / 1000, budget=("row", "head")[number % 2])
        if number % 7 == 0:
            handle.disable()
    run(model)
    assert living(shadows) == (classes + 1, modules + 1)
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == (1, 1)
    handle = enable_draft_attention(model)
    handle.disable()
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert not model._forward_hooks_always_called and not model._forward_pre_hooks_with_kwargs


def test_a_hundred_dropped_pipelines_leave_nothing(shadows: Any) -> None:
    before = living(shadows)
    for _ in range(100):
        pipe = models.wan_pipeline(models.wan(num_layers=1))
        handle = enable_draft_attention(pipe, dense_layers=())
        run(pipe.transformer)
        del pipe, handle
    assert living(shadows) == before


def test_looking_into_one_model_leaves_another_alone() -> None:
    looked_into, other, alone = models.wan(), models.wan(), models.wan()
    first = enable_draft_attention(looked_into, 0.5)
    enable_draft_attention(other, 0.8, tile=(4, 8))
    enable_draft_attention(alone, 0.8, tile=(4, 8))
    seen = []

    def zeros(call: Any) -> Tensor:
        seen.append((call.path, call.sparse))
        return torch.zeros_like(call.query)

    expected, before = run(alone), run(looked_into)
    with first._watched(zeros):
        assert not torch.equal(run(looked_into), before)
        assert torch.equal(run(other), expected)
    assert seen == [("blocks.1.attn1", True), ("blocks.2.attn1", True)]
    assert torch.equal(run(looked_into), before)


def test_modules_of_a_dropped_model_are_dropped(shadows: Any) -> None:
    patched_and_dropped()
    gc.collect()
    assert shadows() == set()


def test_inputs_and_outputs_are_not_kept() -> None:
    model = models.hunyuan_video()
    enable_draft_attention(model)
    inputs = models.hunyuan_video_inputs(2)
    output = run(model, inputs)
    references = [weakref.ref(value) for value in (*inputs.values(), output)]
    del inputs, output
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


def test_config_may_be_shared() -> None:
    config = DraftConfig(sparsity=0.8, dense_layers=[2, 0, 2])
    handles = [enable_draft_attention(models.wan(), config=config) for _ in range(2)]
    assert handles[0].config is handles[1].config is config
    assert copy.deepcopy(config) == config
    assert config.dense_layers == (0, 2)


def test_blocks_can_be_left_out_while_enabled() -> None:
    """As `bench model` measures a block, and as layers are pruned."""
    model, shorter = models.wan(num_layers=3), models.wan(num_layers=3)
    shorter.blocks = shorter.blocks[:2]
    settings = dict(dense_layers=(0,), dense_timestep=1000)
    enable_draft_attention(model, **settings)
    enable_draft_attention(shorter, **settings)
    model.blocks = model.blocks[:2]
    assert torch.equal(run(model), run(shorter))


# Contexts in contexts


def sparsity_of(transformer: nn.Module) -> float | None:
    attachment = attachment_of(transformer)
    return attachment.config.sparsity if attachment else None


def test_an_inner_context_gives_the_outer_settings_back() -> None:
    pipe = models.wan_pipeline()
    stock = processors(pipe.transformer)
    expected = {}
    for sparsity in (0.5, 0.9):
        with enable_draft_attention(pipe, sparsity):
            expected[sparsity] = run_wan(pipe)
    with enable_draft_attention(pipe, 0.5) as outer:
        with enable_draft_attention(pipe, 0.9) as inner:
            with enable_draft_attention(pipe, 0.7):
                assert sparsity_of(pipe.transformer) == 0.7
            assert torch.equal(run_wan(pipe), expected[0.9])
        assert torch.equal(run_wan(pipe), expected[0.5])
        reports = [handle.report().transformers[0] for handle in (outer, inner)]
        assert [report.attached for report in reports] == [True, False]
        assert [sum(report.steps.values()) for report in reports] == [4, 4]
    assert processors(pipe.transformer) == stock and sparsity_of(pipe.transformer) is None


def test_a_handle_entered_twice_holds_until_the_outer_context_ends() -> None:
    model = models.wan()
    handle = enable_draft_attention(model, 0.5)
    with handle:
        with handle:
            pass
        assert sparsity_of(model) == 0.5
    assert sparsity_of(model) is None


def test_a_config_in_the_place_of_the_sparsity_is_refused() -> None:
    model = models.wan()
    with pytest.raises(TypeError, match=r"argument is the sparsity, got a DraftConfig\. Give it as config="):
        enable_draft_attention(model, DraftConfig())  # type: ignore[arg-type]
    assert sparsity_of(model) is None


def test_a_call_without_an_argument_says_which() -> None:
    model = models.hunyuan_video()
    inputs = models.hunyuan_video_inputs()
    del inputs["encoder_attention_mask"]
    enable_draft_attention(model, 0.5)
    with pytest.raises(TypeError, match="called without the argument 'encoder_attention_mask'"):
        model(**inputs)


@pytest.mark.parametrize("how", ["left", "disabled", "replaced"])
def test_a_handle_that_is_not_in_force_cannot_be_entered(how: str) -> None:
    model = models.wan()
    handle = enable_draft_attention(model, 0.5)
    if how == "left":
        with handle:
            assert sparsity_of(model) == 0.5
    else:
        {"disabled": disable_draft_attention, "replaced": enable_draft_attention}[how](model)
    found = sparsity_of(model)
    with pytest.raises(RuntimeError, match=r"not in force any more.*Call enable_draft_attention again"), handle:
        pass
    assert sparsity_of(model) == found


def test_an_inner_context_whose_transformer_is_gone() -> None:
    pipe = models.wan_pipeline()
    enable_draft_attention(pipe, 0.5)
    with enable_draft_attention(pipe, 0.9):
        pipe.transformer = models.wan(seed=1)
        gc.collect()
    assert patched(pipe.transformer) == []


def test_a_transformer_that_its_pipeline_no_longer_has_is_restored_by_the_handle() -> None:
    pipe = models.wan_pipeline()
    handle, before = enable_draft_attention(pipe, 0.5), pipe.transformer
    pipe.transformer = models.wan(seed=1)
    disable_draft_attention(pipe)
    assert patched(before)
    handle.disable()
    assert not patched(before)


def test_an_inner_context_of_one_expert_leaves_the_other_alone() -> None:
    pipe = models.wan_pipeline(models.wan(), transformer_2=models.wan(seed=1), boundary_ratio=0.8)
    enable_draft_attention(pipe, 0.5)
    with enable_draft_attention(pipe.transformer_2, 0.9):
        assert [sparsity_of(pipe.transformer), sparsity_of(pipe.transformer_2)] == [0.5, 0.9]
    assert [sparsity_of(pipe.transformer), sparsity_of(pipe.transformer_2)] == [0.5, 0.5]


def test_what_was_disabled_or_replaced_within_a_context_stays_so() -> None:
    pipe = models.wan_pipeline()
    outer = enable_draft_attention(pipe, 0.5)
    with enable_draft_attention(pipe, 0.9):
        outer.disable()
        assert sparsity_of(pipe.transformer) == 0.9
    assert sparsity_of(pipe.transformer) is None
    enable_draft_attention(pipe, 0.5)
    with enable_draft_attention(pipe, 0.9):
        disable_draft_attention(pipe)
    assert sparsity_of(pipe.transformer) is None
    enable_draft_attention(pipe, 0.5)
    with enable_draft_attention(pipe, 0.9):
        enable_draft_attention(pipe, 0.7)
    assert sparsity_of(pipe.transformer) == 0.7

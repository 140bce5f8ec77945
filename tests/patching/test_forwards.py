"""Forwards of one transformer that run side by side, one in another, again in a backward, or past its hooks."""

import functools
import threading
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from models import error
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from diffusers_draft import disable_draft_attention, enable_draft_attention
from diffusers_draft.patching.turn import Turn


def run(model: torch.nn.Module, inputs: models.Inputs | None = None) -> Tensor:
    with torch.no_grad():
        return model(**(inputs or models.wan_inputs()), return_dict=False)[0]


def gradients(model: torch.nn.Module, *batches: models.Inputs) -> dict[str, Tensor]:
    """Of one backward through the forwards of all batches."""
    model.zero_grad()
    sum(model(**inputs).sample.square().mean() for inputs in batches).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(value.norm() for value in expected.values())
    for name, value in expected.items():
        assert (found[name] - value).norm() < 1e-5 * value.norm() + 1e-6 * largest, name


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_training(name: str) -> None:
    tiny = models.TINY[name]
    model, inputs = tiny.build().train(), tiny.inputs(2)
    stock = gradients(model, inputs)
    with enable_draft_attention(model, sparsity=0):
        assert_close(gradients(model, inputs), stock)
    with enable_draft_attention(model, sparsity=0.8):
        sparse = gradients(model, inputs)
        layer = tiny.layers[-1]
        assert error(sparse[f"{layer}.to_q.weight"], stock[f"{layer}.to_q.weight"]) > 1e-2
        model.enable_gradient_checkpointing()
        assert_close(gradients(model, inputs), sparse)


def diffusers_own(model: Any, layers: tuple[str, ...]) -> None:
    model.enable_gradient_checkpointing()


def diffusers_own_reentrant(model: Any, layers: tuple[str, ...]) -> None:
    model.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=True))


def wrapped(how: CheckpointImpl, part: str) -> Callable[[Any, tuple[str, ...]], None]:
    """Wrap every block, or every attention layer, as FSDP's recipes do."""

    def wrap(model: Any, layers: tuple[str, ...]) -> None:
        for path in layers:
            path = path if part == "layer" else path.rpartition(".")[0]
            parent, _, name = path.rpartition(".")
            module = model.get_submodule(path)
            setattr(model.get_submodule(parent), name, checkpoint_wrapper(module, checkpoint_impl=how))

    return wrap


CHECKPOINTING = {
    "diffusers": diffusers_own,
    "diffusers, reentrant": diffusers_own_reentrant,
    "wrapped blocks": wrapped(CheckpointImpl.NO_REENTRANT, "block"),
    "wrapped blocks, reentrant": wrapped(CheckpointImpl.REENTRANT, "block"),
    "wrapped layers": wrapped(CheckpointImpl.NO_REENTRANT, "layer"),
}


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize(
    ("name", "other", "options"),
    [
        ("wan", dict(grid=(3, 17, 13)), {}),
        ("wan", dict(grid=(3, 13, 17), timestep=990), {}),
        ("hunyuan_video", dict(lengths=(3,)), {}),
        ("MochiTransformer3DModel", dict(timestep=990), dict(dense_timestep=900)),
    ],
    ids=["grid", "step", "lengths", "step that runs upstream's code"],
)
def test_a_backward_recomputes_the_forward_that_it_belongs_to(
    name: str, other: dict[str, Any], options: dict[str, float], checkpointing: str
) -> None:
    """With another forward behind it, one without gradients, and one whose backward never comes."""
    if name.startswith("Mochi") and "reentrant" in checkpointing:
        pytest.skip("stock fails: its rotary embedding has gradients, and comes in a tuple")
    tiny = models.TINY[name]
    model = tiny.build().train()
    handle = enable_draft_attention(model, sparsity=0.8, **options)
    expected = gradients(model, tiny.inputs(), tiny.inputs(**other))
    CHECKPOINTING[checkpointing](model, tiny.layers)
    model(**tiny.inputs(**other))
    found = gradients(model, tiny.inputs(), tiny.inputs(**other))
    assert_close({name.replace("_checkpoint_wrapped_module.", ""): value for name, value in found.items()}, expected)

    model.zero_grad()
    loss = model(**tiny.inputs()).sample.square().mean()
    before = handle.report().transformers[0]
    with torch.no_grad():
        model(**tiny.inputs(**other))
    loss.backward()
    again = {key.replace("_checkpoint_wrapped_module.", ""): p.grad for key, p in model.named_parameters()}
    alone = tiny.build().train()
    enable_draft_attention(alone, sparsity=0.8, **options)
    assert_close({key: value for key, value in again.items() if value is not None}, gradients(alone, tiny.inputs()))
    report = handle.report().transformers[0]
    assert sum(report.forwards.values()) == sum(before.forwards.values()) + 1
    calls = before.sparse_calls + sum(before.dense_calls.values())
    assert report.sparse_calls + sum(report.dense_calls.values()) - calls == len(tiny.layers)  # of the teacher's alone
    handle.disable()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_backward_that_checkpoints_less_than_a_layer_is_refused() -> None:
    model = models.wan().train()
    inputs = models.wan_inputs(1, (3, 13, 17))
    enable_draft_attention(model, sparsity=0.8)
    block = model.blocks[1]
    whole = block.attn1.processor

    class Checkpointed:
        def __call__(self, attn: Any, hidden_states: Tensor, *args: Any) -> Tensor:
            return checkpoint(lambda x: whole(attn, x + 0, *args), hidden_states * 1, use_reentrant=False)

    block.attn1.processor = Checkpointed()
    with pytest.warns(UserWarning, match="lost draft attention"):
        loss = model(**inputs).sample.square().mean()
    with pytest.raises(RuntimeError, match="nothing tells for which forward"):
        loss.backward()


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_two_threads_do_not_see_each_other(name: str) -> None:
    """Two grids of as many tokens."""
    tiny = models.TINY[name]
    model = tiny.build().eval()
    grids = (3, 13, 17), (3, 17, 13)
    enable_draft_attention(model, sparsity=0.7)
    expected = [run(model, tiny.inputs(grid=grid)) for grid in grids]
    wrong: list[int] = []

    def forwards(number: int) -> None:
        for _ in range(15):
            out = run(model, tiny.inputs(grid=grids[number]))
            wrong.extend([number] * (not torch.equal(out, expected[number])))

    threads = [threading.Thread(target=forwards, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forward_that_fails_lets_the_next_thread_in() -> None:
    model = models.wan().eval()
    enable_draft_attention(model)
    with pytest.raises(RuntimeError):
        run(model, models.wan_inputs(1, (3, 13, 17)) | {"encoder_hidden_states": torch.zeros(1, 2, 3)})
    with pytest.raises((RuntimeError, ValueError, TypeError, AttributeError, KeyError)):
        model(hidden_states=None, timestep=None, encoder_hidden_states=None)
    thread = threading.Thread(target=run, args=(model,))
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_a_turn_that_was_lost_is_taken() -> None:
    """Ctrl-C in a forward: its thread holds the turn and runs no module."""
    turn, taken = Turn(), threading.Event()
    turn.take()

    def other() -> None:
        turn.take()
        taken.set()

    threading.Thread(target=other, daemon=True).start()
    assert taken.wait(timeout=30)
    assert not turn.give()


@pytest.mark.parametrize("how", ["export", "strict export", "trace"])
@pytest.mark.parametrize("sparsity", [0.0, 0.7])
def test_exports_are_refused(how: str, sparsity: float) -> None:
    model, inputs = models.wan().eval(), models.wan_inputs(1, (3, 13, 17))
    arguments = tuple(inputs[name] for name in ("hidden_states", "timestep", "encoder_hidden_states"))
    enable_draft_attention(model, sparsity)
    expected = run(model, inputs)
    # Which of the two a strict export meets first depends on torch's version.
    message = "cannot be exported or traced" + ("|before it is exported" if how == "strict export" else "")
    with pytest.raises(Exception, match=message), torch.no_grad():
        if how == "trace":
            torch.jit.trace(model, arguments, strict=False)
        else:
            torch.export.export(model, arguments, strict=how == "strict export")
    assert torch.equal(run(model, inputs), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_blocks_and_forward_called_past_the_hooks_are_refused(compiled: bool) -> None:
    model = models.wan().eval()
    inputs = models.wan_inputs(1, (3, 13, 17))
    stock = run(model, inputs)
    enable_draft_attention(model, sparsity=0.7)
    run(model, models.wan_inputs(1, (3, 17, 13)))
    forward = torch.compile(model.forward, backend="eager") if compiled else model.forward
    with pytest.raises(RuntimeError, match="outside of its transformer's forward"), torch.no_grad():
        forward(**inputs)
    with pytest.raises(RuntimeError, match="outside of its transformer's forward"), torch.no_grad():
        model.blocks[0].attn1(torch.randn(1, 663, 32))
    disable_draft_attention(model)
    with torch.no_grad():
        assert torch.equal(model.forward(**inputs).sample, stock)

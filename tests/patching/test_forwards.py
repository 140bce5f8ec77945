"""Forwards of one transformer that run side by side, one in another, again in a backward, or past its hooks."""

import functools
import threading
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
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
    del loss
    handle.disable()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_backward_that_checkpoints_less_than_a_layer() -> None:
    model, inputs = models.wan().train(), models.wan_inputs(1, (3, 13, 17))
    enable_draft_attention(model, sparsity=0.8)
    expected = gradients(model, inputs)
    whole = model.blocks[1].attn1.processor

    class Checkpointed:
        def __call__(self, attn: Any, hidden_states: Tensor, *args: Any) -> Tensor:
            return checkpoint(lambda x: whole(attn, x + 0, *args), hidden_states * 1, use_reentrant=False)

    model.blocks[1].attn1.processor = Checkpointed()
    with pytest.warns(UserWarning, match="lost draft attention"):
        loss = model(**inputs).sample.square().mean()
    with torch.no_grad():
        model(**models.wan_inputs(1, (3, 17, 13)))
    model.zero_grad()
    loss.backward()
    assert_close({name: parameter.grad for name, parameter in model.named_parameters()}, expected)


def fresh(**options: Any) -> Any:
    """A model in training, and draft attention enabled, that has not run yet."""
    model = models.wan().train()
    enable_draft_attention(model, sparsity=0.7, **options)
    return model


def loss_of(model: Any, inputs: models.Inputs) -> Tensor:
    return model(**inputs, return_dict=False)[0].square().mean()


def gradients_of(model: Any) -> dict[str, Tensor]:
    named = ((name.replace("_checkpoint_wrapped_module.", ""), value.grad) for name, value in model.named_parameters())
    return {name: grad.clone() for name, grad in named if grad is not None}


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    """Gradients without checkpoints."""
    return gradients(fresh(), models.wan_inputs())


@pytest.mark.parametrize("how", CHECKPOINTING)
def test_a_model_may_be_wrapped_before_it_ever_ran(how: str, expected: dict[str, Tensor]) -> None:
    model = fresh()
    CHECKPOINTING[how](model, models.TINY["wan"].layers)
    loss_of(model, models.wan_inputs()).backward()
    assert_close(gradients_of(model), expected)


@pytest.mark.parametrize("blocks", [None, True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_whole_forward_may_be_checkpointed(
    blocks: bool | None, reentrant: bool, expected: dict[str, Tensor]
) -> None:
    """With its blocks in it or without, and others behind it; a repetition is not counted."""
    model = models.wan().train()
    handle = enable_draft_attention(model, sparsity=0.7)
    if blocks is not None:
        model.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=blocks))
    inputs = models.wan_inputs()
    states = inputs.pop("hidden_states").requires_grad_()
    out = checkpoint(
        lambda states: model(hidden_states=states, **inputs, return_dict=False)[0], states, use_reentrant=reentrant
    )
    run(model, models.wan_inputs(grid=(3, 17, 13), timestep=990))
    out.square().mean().backward()
    assert_close(gradients_of(model), expected)
    report = handle.report().transformers[0]
    assert (report.forwards["sparse"], report.sparse_calls) == (2, 6)


def gradients_of_a_loop(reentrant: bool | None) -> dict[str, Tensor]:
    """Of a denoising loop with guidance whose steps are checkpointed; None for no checkpoints."""
    model = models.wan().train()
    pipe = models.Loop(FlowMatchEulerDiscreteScheduler(), transformer=model)
    enable_draft_attention(pipe, sparsity=0.7)
    pipe.scheduler.set_timesteps(4)
    inputs = models.wan_inputs(grid=(3, 24, 24))
    states, text = inputs["hidden_states"].requires_grad_(), inputs["encoder_hidden_states"]

    def step(states: Tensor, timestep: Tensor) -> Tensor:
        halves = [model(states, timestep.expand(1), half, return_dict=False)[0] for half in (text, text * 0)]
        return halves[1] + 3 * (halves[0] - halves[1])

    for timestep in pipe.scheduler.timesteps:
        out = (
            step(states, timestep)
            if reentrant is None
            else checkpoint(step, states, timestep, use_reentrant=reentrant)
        )
        states = pipe.scheduler.step(out, timestep, states, return_dict=False)[0]
    states.square().mean().backward()
    return gradients_of(model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_every_step_of_a_checkpointed_loop_has_its_own_density(reentrant: bool) -> None:
    """Also where two forwards are checkpointed as one."""
    assert_close(gradients_of_a_loop(reentrant), gradients_of_a_loop(None))


def test_checkpoints_whose_inputs_are_kept_elsewhere(expected: dict[str, Tensor]) -> None:
    """As activation offloading does."""
    model = fresh()
    model.enable_gradient_checkpointing()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
        loss = loss_of(model, models.wan_inputs())
    run(model, models.wan_inputs(grid=(3, 17, 13)))
    loss.backward()
    assert_close(gradients_of(model), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_other_settings_between_a_forward_and_its_backward(reentrant: bool, expected: dict[str, Tensor]) -> None:
    model = fresh()
    model.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=reentrant))
    loss = loss_of(model, models.wan_inputs())
    with enable_draft_attention(model, sparsity=0.2, probes=0):
        run(model, models.wan_inputs())
    enable_draft_attention(model, sparsity=0.5, score="mass")
    loss.backward()
    assert_close(gradients_of(model), expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("way", ["blocks", "whole"])
def test_a_backward_after_many_forwards_without_gradients(
    way: str, reentrant: bool, expected: dict[str, Tensor]
) -> None:
    """As behind a validation: they make no nodes, and only some of them are remembered."""
    model = fresh()
    again = functools.partial(checkpoint, use_reentrant=reentrant)
    for _ in range(20):
        run(model, models.wan_inputs(grid=(3, 17, 13)))
    inputs = models.wan_inputs()
    if way == "blocks":
        model.enable_gradient_checkpointing(again)
        loss = loss_of(model, inputs)
    else:
        states = inputs.pop("hidden_states").requires_grad_()
        whole = again(lambda states: model(hidden_states=states, **inputs, return_dict=False)[0], states)
        loss = whole.square().mean()
    for _ in range(20):
        run(model, models.wan_inputs(grid=(3, 17, 13)))
    loss.backward()
    assert_close(gradients_of(model), expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    ("name", "other"),
    [("hunyuan_video", dict(lengths=(3,))), ("wan", dict(grid=(3, 17, 13)))],
    ids=["lengths", "grid"],
)
def test_two_forwards_of_one_timestep_are_checkpointed_as_one(
    name: str, other: dict[str, Any], reentrant: bool
) -> None:
    """As those of guidance, whose texts have different lengths."""
    tiny = models.TINY[name]

    def found(again: Callable[..., Tensor]) -> dict[str, Tensor]:
        model = tiny.build().train()
        enable_draft_attention(model, sparsity=0.7)
        first, second = tiny.inputs(), tiny.inputs(**other)
        states = first.pop("hidden_states").requires_grad_()

        def both(states: Tensor) -> Tensor:
            outs = [model(hidden_states=states, **first).sample, model(**second).sample]
            return sum((out.square().mean() * (number + 1) for number, out in enumerate(outs)), torch.zeros(()))

        again(both, states).backward()
        return gradients_of(model)

    assert_close(
        found(functools.partial(checkpoint, use_reentrant=reentrant)), found(lambda both, states: both(states))
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_that_was_dense_is_dense_again(reentrant: bool) -> None:
    expected = gradients(fresh(dense_layers=(1,)), models.wan_inputs())
    model = fresh(dense_layers=(1,))
    model.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=reentrant))
    loss = loss_of(model, models.wan_inputs())
    enable_draft_attention(model, sparsity=0.7)
    loss.backward()
    assert_close(gradients_of(model), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_that_is_dense_since_says_so(reentrant: bool) -> None:
    model = fresh()
    model.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=reentrant))
    loss = loss_of(model, models.wan_inputs())
    enable_draft_attention(model, sparsity=0.7, dense_layers=(1,))
    with pytest.raises(RuntimeError, match="draft attention was disabled before the backward, at least there"):
        loss.backward()


def test_disabling_a_handle_that_is_not_in_force_is_harmless(expected: dict[str, Tensor]) -> None:
    model = models.wan().train()
    model.enable_gradient_checkpointing()
    old = enable_draft_attention(model, sparsity=0.5)
    enable_draft_attention(model, sparsity=0.7)
    loss = loss_of(model, models.wan_inputs())
    old.disable()
    loss.backward()
    assert_close(gradients_of(model), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_backward_after_disabling_says_so(reentrant: bool) -> None:
    """Its forward's processors are gone; stock ones would compute other gradients."""
    model = models.wan().train()
    model.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=reentrant))
    with enable_draft_attention(model, sparsity=0.7):
        loss = loss_of(model, models.wan_inputs())
    with pytest.raises(RuntimeError, match="draft attention was disabled before the backward"):
        loss.backward()
    model.zero_grad()
    stock = gradients(model, models.wan_inputs())
    assert_close(stock, gradients(models.wan().train(), models.wan_inputs()))


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch 2.8 reads no tensor under torch.func.grad, 2.13 does")
def test_gradients_by_torch_func() -> None:
    model, inputs = fresh(), models.wan_inputs()

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (), inputs | dict(return_dict=False))[0].square().mean()

    found = torch.func.grad(loss)({name: value.detach() for name, value in model.named_parameters()})
    assert_close(found, gradients(fresh(), inputs))


def test_a_forward_within_a_forward() -> None:
    """A user's hook that runs the model once more, on another grid."""
    model, inside = models.wan().eval(), []
    handle = enable_draft_attention(model, sparsity=0.7)
    expected = run(model), run(model, models.wan_inputs(grid=(3, 17, 13)))
    alone = [forward.error for forward in handle.report().transformers[0].run]

    def once_more(*args: Any) -> None:
        if not inside:
            inside.append(None)
            inside[0] = run(model, models.wan_inputs(grid=(3, 17, 13)))

    model.blocks[1].register_forward_pre_hook(once_more)
    assert torch.equal(run(model), expected[0]) and torch.equal(inside[0], expected[1])
    report = handle.report().transformers[0]
    assert (report.forwards["sparse"], report.sparse_calls, report.skipped_calls) == (4, 12, 0)
    assert [forward.error for forward in report.run] == [*alone, *reversed(alone)]  # the inner one is over first


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


def test_threads_that_enable_and_disable_never_tear_a_forward() -> None:
    """Settings belong to the transformer: whatever the others set, a forward has one of them from start to end."""
    model, sparsities = models.wan().eval(), (0.3, 0.7)
    outputs = [run(model)]
    for sparsity in sparsities:
        with enable_draft_attention(model, sparsity):
            outputs.append(run(model))
    torn: list[object] = []

    def forwards(sparsity: float) -> None:
        try:
            for _ in range(10):
                with enable_draft_attention(model, sparsity):
                    out = run(model)
                torn.extend([sparsity] * (not any(torch.equal(out, whole) for whole in outputs)))
        except Exception as failure:
            torn.append(failure)

    threads = [threading.Thread(target=forwards, args=(sparsity,)) for sparsity in sparsities]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not torn


@pytest.mark.parametrize("change", ["disable", "enable"])
def test_changes_wait_for_the_forward_of_another_thread(change: str) -> None:
    model, inside, out = models.wan().eval(), threading.Event(), []
    handle = enable_draft_attention(model, sparsity=0.7)
    expected = run(model)
    go_on = threading.Event()

    def hold(*args: Any) -> None:
        inside.set()
        go_on.wait(timeout=60)

    hook = model.blocks[1].register_forward_pre_hook(hold)
    worker = threading.Thread(target=lambda: out.append(run(model)))
    worker.start()
    assert inside.wait(timeout=60)
    threading.Timer(0.3, go_on.set).start()
    handle.disable() if change == "disable" else enable_draft_attention(model, sparsity=0.2)
    worker.join()
    hook.remove()
    assert torch.equal(out[0], expected)


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
    turn, taken, model = Turn(), threading.Event(), models.wan()
    turn.take(model)

    def other() -> None:
        turn.take(model)
        taken.set()

    threading.Thread(target=other, daemon=True).start()
    assert taken.wait(timeout=30)
    assert not turn.is_held_here


@pytest.mark.parametrize("how", ["interrupted", "recomputed"])
def test_layers_past_their_forward_are_refused_also_after(how: str) -> None:
    """A Ctrl-C leaves a forward without an end, and a checkpoint states of earlier ones."""
    model = models.wan().train()
    enable_draft_attention(model, sparsity=0.7)
    if how == "recomputed":
        model.enable_gradient_checkpointing()
        loss_of(model, models.wan_inputs()).backward()
    else:

        def stop(*args: Any) -> None:
            raise KeyboardInterrupt

        hook = model.blocks[1].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            run(model)
        hook.remove()
    with pytest.raises(RuntimeError, match="called outside of its transformer's forward"):
        model.forward(**models.wan_inputs(grid=(3, 17, 13)))
    assert torch.equal(run(model), run(fresh()))


def test_ctrl_c_within_another_module_leaves_nothing_behind() -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = models.wan().eval()

        def forward(self) -> Tensor:
            with enable_draft_attention(self.inner, sparsity=0.7):
                return run(self.inner)

    wrapper = Wrapper()
    expected = wrapper()

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    hook = wrapper.inner.blocks[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        wrapper()
    hook.remove()
    assert torch.equal(wrapper(), expected)


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

"""Processors that are written out: they equal upstream's, and upstream's are watched."""

import hashlib
import importlib
import inspect

import models
import pytest
import torch
from models import TINY, error, forward
from paper import enable_draft_attention
from torch import Tensor

from diffusers_draft.families import families

UPSTREAM = {
    "models.attention_processor.MochiAttnProcessor2_0": {"78e91a5c57e8c1e8", "56050b08e51df642"},
    "models.transformers.transformer_hunyuan_video15.HunyuanVideo15AttnProcessor2_0": {
        "726352c341142b51",
        "7bb9b09c8f4ac8c8",
    },
}
"""Hashes of the sources of `__call__` that ours were compared with, of the oldest and the newest diffusers."""

WRITTEN_OUT = [name for name in TINY if name.startswith(("Mochi", "HunyuanVideo15"))]


@pytest.mark.parametrize("path", UPSTREAM)
def test_upstream_has_not_changed(path: str) -> None:
    module, _, name = path.rpartition(".")
    stock = getattr(importlib.import_module(f"diffusers.{module}"), name)
    found = hashlib.sha256(inspect.getsource(stock.__call__).encode()).hexdigest()[:16]
    assert found in UPSTREAM[path], (
        f"diffusers has changed {name}.__call__. Compare it with ours in diffusers_draft/families/processors, change "
        f"ours if the mathematics differ, and then add {found} to UPSTREAM."
    )


def test_every_written_out_processor_is_watched() -> None:
    written = {name for family in families().values() if family.explicit for name in family.processors}
    assert {path.rpartition(".")[2] for path in UPSTREAM} == written


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_dense_forwards_equal_stock(name: str, batch: int) -> None:
    tiny = TINY[name]
    model, inputs = tiny.build(), tiny.inputs(batch)
    stock = forward(model, inputs)
    handle = enable_draft_attention(model, dense_timestep=0, dense_layers=())
    assert error(forward(model, inputs), stock) < models.FLOAT32_ERROR
    assert handle.report().transformers[0].forwards == {"dense": 1, "sparse": 0}


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_padded_text_does_not_influence_anything(name: str) -> None:
    tiny = TINY[name]
    model, inputs = tiny.build(), tiny.inputs(2)
    enable_draft_attention(model, sparsity=0.8, dense_layers=())
    expected = forward(model, inputs)
    padding = inputs["encoder_attention_mask"] == 0
    assert padding.any()
    changed = inputs["encoder_hidden_states"].clone()
    changed[padding] = 100 * models.random(int(padding.sum()), 8)
    assert error(forward(model, inputs | {"encoder_hidden_states": changed}), expected) < models.FLOAT32_ERROR
    changed[1, 0] *= 2
    assert error(forward(model, inputs | {"encoder_hidden_states": changed}), expected) > 1e-4


def test_dense_forwards_of_mochi_are_stock() -> None:
    """Its loop over the samples needs no mask, and so dense attention may be the fastest there is."""
    tiny = TINY["MochiTransformer3DModel"]
    model, inputs = tiny.build(), tiny.inputs(2)
    stock = forward(model, inputs)
    enable_draft_attention(model, dense_timestep=0, dense_layers=())
    assert torch.equal(forward(model, inputs), stock)


def test_hunyuan_video15_makes_no_mask_over_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = TINY["HunyuanVideo15Transformer3DModel"]
    model, inputs = tiny.build(), tiny.inputs()
    masks: list[torch.Size] = []
    native = torch.nn.functional.scaled_dot_product_attention

    def recording(query: Tensor, *args: Tensor, attn_mask: Tensor | None = None, **kwargs: object) -> Tensor:
        masks.append(torch.Size() if attn_mask is None else attn_mask.shape)
        return native(query, *args, attn_mask=attn_mask, **kwargs)

    enable_draft_attention(model, dense_timestep=0)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recording)
    forward(model, inputs)
    video = [mask for mask in masks if mask and mask[-1] > 663]
    assert len(video) == len(tiny.layers)
    assert {mask[-2] for mask in video} == {1}


def test_mochi_reads_no_length_in_sparse_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = TINY["MochiTransformer3DModel"]
    model, inputs = tiny.build(), tiny.inputs(2)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("finding the valid tokens waits for the device")

    monkeypatch.setattr(torch, "nonzero", refuse)
    with pytest.raises(AssertionError, match="waits for the device"):
        forward(model, inputs)
    enable_draft_attention(model, dense_layers=(), backend="reference")
    forward(model, inputs)

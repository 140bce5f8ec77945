"""The defaults in every family: corrected attention of the oracle under the mask that the library chose."""

import models
import oracle
import pytest
import torch
from models import RAGGED, TINY, attention_replaced, error, forward
from torch import Tensor

from diffusers_draft import enable_draft_attention
from diffusers_draft.attention.block_mask import BlockMask
from diffusers_draft.attention.correct import probe_rows
from diffusers_draft.attention.ops import Attended, attend
from diffusers_draft.patching.forward import AttentionCall
from diffusers_draft.patching.measured import Error

pytestmark = pytest.mark.usefixtures("nan_memory")

TILE = (4, 4, 8)


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[BlockMask]:
    """What the backend gets in all sparse calls of a test."""
    return models.recorded_masks(monkeypatch)


ONE_CALL = [name for name in TINY if not name.startswith("Mochi")]
"""Stock Mochi attends sample by sample."""


@pytest.mark.parametrize("name", ONE_CALL)
def test_a_model_equals_the_stock_one_with_the_oracle_in_its_layers(name: str, masks: list[BlockMask]) -> None:
    tiny = TINY[name]
    model, inputs = tiny.build(), tiny.inputs(2)
    with enable_draft_attention(model, sparsity=0.5, schedule="constant") as handle:
        out = forward(model, inputs)
        report = handle.report().transformers[0]
    of_layers = iter(masks)
    fits: list[oracle.Fit] = []

    def oracle_attends(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = next(of_layers)
        order = oracle.block_order(RAGGED, tiny.prefix, query.shape[1], TILE)
        rows = probe_rows(mask.num_video_blocks * mask.block, 64, 0, torch.device("cpu"))
        found, heads = oracle.corrected_attention(query, key, value, mask, order, rows)
        fits.extend(fit for of_heads in heads for fit in of_heads)
        return found.to(query.dtype)

    with attention_replaced(model, tiny.layers, oracle_attends) as ran:
        expected = forward(model, inputs)
    assert tuple(ran) == tiny.layers and next(of_layers, None) is None
    assert error(out, expected) < 5 * tiny.tolerance
    assert tuple(report.densities) == tuple(report.errors) == tiny.layers and report.dense_layers == ()
    assert any(fit.helps for fit in fits)
    assert report.error is not None and report.error.after < report.error.before


@pytest.mark.parametrize("name", TINY)
def test_every_layer_equals_the_oracle_and_so_do_measured_errors(name: str, masks: list[BlockMask]) -> None:
    """From the tensors that the layers really got."""
    tiny = TINY[name]
    model, inputs = tiny.build(), tiny.inputs(2)
    expected: dict[str, tuple[float, float]] = {}

    def look(call: AttentionCall) -> Attended:
        seen.append((call, attend(*call.arguments)))
        return seen[-1][1]

    seen: list[tuple[AttentionCall, Attended]] = []
    handle = enable_draft_attention(model, sparsity=0.5, schedule="constant")
    with handle._watched(look):
        forward(model, inputs)
    for (call, attended), mask in zip(seen, masks, strict=True):
        order = oracle.block_order(RAGGED, tiny.prefix, call.query.shape[1], TILE)
        rows = probe_rows(mask.num_video_blocks * mask.block, 64, 0, torch.device("cpu"))
        out, heads = oracle.corrected_attention(call.query, call.key, call.value, mask, order, rows, call.scale)
        valid = slice(None) if call.kv_len is None else slice(int(call.kv_len.min()))
        assert oracle.error(attended.out[:, valid], out[:, valid]) < 2e-5
        fits = [fit for of_heads in heads for fit in of_heads]
        whole = sum(fit.whole for fit in fits)
        after = sum(fit.after if fit.helps else fit.before for fit in fits)
        expected[call.path] = ((sum(fit.before for fit in fits) / whole) ** 0.5, (after / whole) ** 0.5)
    (report,) = handle.report().transformers
    assert {path: (found.before, found.after) for path, found in report.errors.items()} == {
        path: pytest.approx(values, rel=1e-3, abs=1e-6) for path, values in expected.items()
    }
    before, after = (sum(values) / len(expected) for values in zip(*expected.values(), strict=True))
    assert (report.error.before, report.error.after) == pytest.approx((before, after), rel=1e-3)
    worst = max(expected, key=lambda path: expected[path][1])
    assert report.errors[report.worst_layer].after == pytest.approx(expected[worst][1], rel=1e-3)
    assert f"error     {report.error.before:.3f}" in str(report) and f"worst layer {report.worst_layer}" in str(report)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", TINY)
def test_sparsity_0_equals_stock(name: str, batch: int) -> None:
    tiny = TINY[name]
    model, inputs = tiny.build(), tiny.inputs(batch)
    stock = forward(model, inputs)
    handle = enable_draft_attention(model, sparsity=0)
    assert error(forward(model, inputs), stock) < tiny.tolerance
    (report,) = handle.report().transformers
    assert report.density == 1 and report.error == Error(0.0, 0.0)
    assert set(report.errors.values()) == {Error(0.0, 0.0)}


@pytest.mark.parametrize("name", TINY)
def test_a_batch_equals_its_samples_one_by_one(name: str) -> None:
    tiny = TINY[name]
    model, inputs = tiny.build(), tiny.inputs(2)
    enable_draft_attention(model, sparsity=0.5, schedule="constant")
    together = forward(model, inputs)
    for sample in range(2):
        batched = {key: value for key, value in inputs.items() if torch.is_tensor(value) and value.shape[0] == 2}
        alone = inputs | {key: value[sample : sample + 1] for key, value in batched.items()}
        assert error(forward(model, alone), together[sample : sample + 1]) < 5 * tiny.tolerance


def test_without_probes_nothing_is_measured() -> None:
    model = models.wan()
    handle = enable_draft_attention(model, sparsity=0.5, probes=0)
    forward(model, models.wan_inputs())
    (report,) = handle.report().transformers
    assert report.error is report.worst_layer is None and report.errors == {}
    assert [found.error for found in report.run] == [None] and "error" not in str(report)

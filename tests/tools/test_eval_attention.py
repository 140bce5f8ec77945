"""Attention-level measures and baselines against brute force in raster order."""

import contextlib

import models
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paper import PAPER
from PIL import Image

from diffusers_draft import DraftConfig
from diffusers_draft.attention.call import Call
from diffusers_draft.cli import main
from diffusers_draft.patching.clock import Clock
from diffusers_draft.tools.evaluation import attention, mass
from diffusers_draft.tools.evaluation.attention import Samples, measure_attention, measure_call, spread
from diffusers_draft.tools.evaluation.mass import block_mass
from diffusers_draft.tools.evaluation.selection import SELECTIONS
from diffusers_draft.tools.evaluation.settings import Setting

GRID = (2, 9, 13)
PREFIX, SUFFIX, TILE = 3, 20, (4, 8)
SEQ_LEN = PREFIX + 2 * 9 * 13 + SUFFIX
BLOCK = 32
VIDEO_BLOCKS = 2 * 9 * 13 // BLOCK


def tensors(batch=2, heads=3, head_dim=16):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(batch, SEQ_LEN, heads, head_dim, generator=generator) for _ in range(3))
    return 2 * query, key, value


def call_of(query, key, kv_len=None, **options):
    config = DraftConfig(tile=TILE, **options)
    return Call.order(query, key, key, torch.tensor([*GRID, PREFIX]), kv_len, config.method), config


def true_mass(query, key, kv_len):
    """`(B, H, Nv, N)` float64 in plain loops over blocks."""
    batch, _, heads, head_dim = query.shape
    order = oracle.block_order(GRID, PREFIX, SEQ_LEN, TILE)
    scores = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) * head_dim**-0.5
    weights = scores.masked_fill(~oracle.length_mask(batch, heads, SEQ_LEN, kv_len), -torch.inf).softmax(-1)
    blocks = [order[start : start + BLOCK] for start in range(0, SEQ_LEN, BLOCK)]
    expected = torch.zeros(batch, heads, VIDEO_BLOCKS, len(blocks), dtype=torch.float64)
    for row in range(VIDEO_BLOCKS):
        for column, tokens in enumerate(blocks):
            expected[:, :, row, column] = weights[:, :, blocks[row]][..., tokens].sum((-2, -1)) / BLOCK
    return expected


@pytest.mark.parametrize("lengths", [None, [SEQ_LEN, SEQ_LEN - 17]])
@pytest.mark.parametrize("chunk", [1, 3 * BLOCK * SEQ_LEN * 6, 1 << 26])
def test_block_mass_equals_brute_force(lengths, chunk, monkeypatch):
    monkeypatch.setattr(mass, "CHUNK_ELEMENTS", chunk)
    query, key, _ = tensors()
    kv_len = None if lengths is None else torch.tensor(lengths)
    call, _ = call_of(query, key, kv_len)
    found = block_mass(call.query, call.key, VIDEO_BLOCKS, BLOCK, call.scale, kv_len)
    torch.testing.assert_close(found.double(), true_mass(query, key, kv_len), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 3, VIDEO_BLOCKS))


@pytest.mark.parametrize("budget", ["head", "row"])
@pytest.mark.parametrize("lengths", [None, [SEQ_LEN, SEQ_LEN - 17]])
def test_measures_of_a_call_equal_brute_force(budget, lengths):
    query, key, value = tensors()
    kv_len = None if lengths is None else torch.tensor(lengths)
    config = DraftConfig(sparsity=0.7, budget=budget, tile=TILE, **PAPER)
    dense = oracle.attention(query, key, value, oracle.length_mask(2, 3, SEQ_LEN, kv_len))
    geometry, generator = torch.tensor([*GRID, PREFIX]), torch.Generator()
    found = measure_call(query, key, value, dense.float(), geometry, kv_len, None, Setting(config), generator)

    order, scale = oracle.block_order(GRID, PREFIX, SEQ_LEN, TILE), 16**-0.5
    draft = oracle.draft_map(query, key, order, VIDEO_BLOCKS, BLOCK, scale)
    expected_mass, video = true_mass(query, key, kv_len), slice(PREFIX, PREFIX + 2 * 9 * 13)
    blocks = [order[start : start + BLOCK] for start in range(0, SEQ_LEN, BLOCK)]
    for head, measured in enumerate(found):
        errors, kept, most = [], [], []
        for sample in range(2):
            shares = []
            for scores in (draft[sample, head], expected_mass[sample, head, :, :VIDEO_BLOCKS]):
                pairs = oracle.best_pairs(scores, 0.7, budget)
                pairs |= {(row, anchor) for row in range(VIDEO_BLOCKS) for anchor in range(VIDEO_BLOCKS, len(blocks))}
                shares.append((sum(expected_mass[sample, head][pair] for pair in pairs) / VIDEO_BLOCKS, pairs))
            (share, pairs), (best, _) = shares
            mask = oracle.length_mask(2, 3, SEQ_LEN, kv_len)[sample, head]
            for row in range(VIDEO_BLOCKS):
                for column in range(VIDEO_BLOCKS):
                    if (row, column) not in pairs:
                        mask[blocks[row][:, None], blocks[column]] = False
            one = (tensor[sample : sample + 1, :, head : head + 1] for tensor in (query, key, value))
            out = oracle.attention(*one, mask[None, None])[0, video, 0]
            errors.append(oracle.error(out, dense[sample, video, head]))
            kept.append(share)
            most.append(best)
        assert measured["error"] == pytest.approx(sum(errors) / 2, rel=1e-4)
        assert measured["kept"] == pytest.approx(float(sum(kept)) / 2, rel=1e-5)
        assert measured["oracle"] == pytest.approx(float(sum(most)) / 2, rel=1e-5)
        assert measured["kept"] <= measured["oracle"]


def test_calls_are_measured_at_the_mean_sparsity_and_the_help_says_so(capsys):
    query, key, value = tensors()
    geometry, generator = torch.tensor([*GRID, PREFIX]), torch.Generator()
    dense = oracle.attention(query, key, value, oracle.length_mask(2, 3, SEQ_LEN, None)).float()
    falling, constant = (
        measure_call(query, key, value, dense, geometry, None, None, Setting(config), generator)
        for config in (DraftConfig(sparsity=0.7, tile=TILE), DraftConfig(sparsity=0.7, tile=TILE, schedule="constant"))
    )
    assert falling == constant
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    assert "all at the mean sparsity, without the schedule" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("budget", ["head", "row"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8])
def test_all_selections_keep_the_same_number_and_the_oracle_keeps_most(budget, sparsity):
    query, key, _ = tensors()
    shares = {}
    for name, scores in SELECTIONS.items():
        call, config = call_of(query, key, sparsity=sparsity, budget=budget)
        mask = call.select(config.sparsity, scores(call, torch.Generator().manual_seed(0)))
        dense = mask.to_dense()
        video = dense[:, :, :VIDEO_BLOCKS, :VIDEO_BLOCKS]
        pairs = oracle.number_of_pairs(VIDEO_BLOCKS, sparsity, budget)
        assert (video.sum((2, 3)) == pairs).all()
        assert video.diagonal(dim1=-2, dim2=-1).all()
        assert dense[..., VIDEO_BLOCKS:].all() and dense[:, :, VIDEO_BLOCKS:].all()
        shares[name] = (true_mass(query, key, None) * dense[:, :, :VIDEO_BLOCKS]).sum().item()
    assert shares["oracle"] >= max(shares.values()) - 1e-6
    if VIDEO_BLOCKS < pairs < VIDEO_BLOCKS**2:
        assert shares["oracle"] > shares["random"]


@pytest.mark.parametrize("prefix", [0, 40])
@pytest.mark.parametrize("tile", [(8, 16), (4, 4, 8), (1, 16, 8)])
def test_local_window_keeps_the_nearest_blocks_in_space_and_time(tile, prefix):
    """On a grid of whole tiles the centres are known: 3 x 2 x 3 blocks."""
    depth, height, width = (1, *tile)[-3:]
    grid = (3 * depth, 2 * height, 3 * width)
    query = torch.zeros(1, prefix + 18 * 128, 1, 16)
    config = DraftConfig(sparsity=1 - 5 / 18, budget="row", tile=tile)
    call = Call.order(query, query, query, torch.tensor([*grid, prefix]), None, config.method)
    scores = SELECTIONS["local"](call, torch.Generator())[0, 0]
    order = oracle.block_order(grid, prefix, query.shape[1], tile) - prefix
    places = []
    for block in range(18):
        tokens = order[block * 128 : (block + 1) * 128]
        frame, row, column = tokens // (grid[1] * grid[2]), tokens // grid[2] % grid[1], tokens % grid[2]
        place = frame // depth, row // height, column // width
        assert all(len(axis.unique()) == 1 for axis in place)
        places.append(torch.stack([axis[0] for axis in place]))
    where = torch.stack(places).double()
    torch.testing.assert_close(scores.double(), -(where[:, None] - where).square().sum(-1).sqrt(), atol=1e-3, rtol=0)
    (middle,) = [block for block, place in enumerate(places) if place.tolist() == [1, 0, 1]]
    kept = call.select(config.sparsity, scores[None, None]).to_dense()[0, 0, :18, :18]
    near = {block for block, place in enumerate(places) if (place - places[middle]).abs().sum() <= 1}
    assert len(near) == 6  # itself, left, right, below, before, after: five of them fit
    assert set(kept[middle].nonzero().flatten().tolist()) < near


def test_random_blocks_differ_between_heads_and_calls_and_come_from_the_seed():
    query, key, _ = tensors()
    call, config = call_of(query, key, sparsity=0.7)

    def kept(generator):
        return call.select(config.sparsity, SELECTIONS["random"](call, generator)).to_dense()

    generator, again = (torch.Generator().manual_seed(1) for _ in range(2))
    first, second = kept(generator), kept(generator)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0, 0], first[0, 1])
    assert torch.equal(first, kept(again))


@given(st.integers(1, 50), st.integers(1, 50))
def test_samples_are_spread(count, total):
    indices = spread(count, total)
    assert len(set(indices)) == len(indices) == min(count, total)
    assert indices == sorted(indices) and indices[0] >= 0 and indices[-1] < total
    assert indices[0] + indices[-1] in (total - 1, total, total - 2)


PIPELINES = {
    "wan": (models.wan_pipeline, models.run_wan, 3, 2),
    "wan_22": (
        lambda: models.wan_pipeline(models.wan(), transformer_2=models.wan(seed=1), boundary_ratio=0.8),
        models.run_wan,
        3,
        2,
    ),
    "hunyuan_video": (models.hunyuan_video_pipeline, models.run_hunyuan_video, 5, 1),
}


class Recorder:
    """A pipeline that is called with the arguments that its `run` function makes."""

    def __init__(self, pipe, run):
        self.pipe, self.run = pipe, run
        self.components = pipe.components
        self.scheduler = pipe.scheduler

    @property
    def num_timesteps(self):
        return self.pipe.num_timesteps

    def __call__(self, **arguments):
        self.latents = self.run(self.pipe, grid=(2, 9, 13), steps=4, **arguments)


@pytest.mark.parametrize("name", PIPELINES)
def test_calls_of_a_run_are_those_of_a_dense_run(name, monkeypatch):
    """Every layer, step and head is looked at, with the queries and keys that an unpatched model has."""
    make, run, layers, forwards = PIPELINES[name]
    pipe, seen = make(), []
    dense_latents = run(make(), grid=(2, 9, 13), steps=4)

    def record(query, key, value, dense, geometry, kv_len, scale, setting, generator):
        seen.append((query, key, value, dense, geometry.tolist(), kv_len))
        return [{"error": 0.0, "kept": 0.0, "oracle": 0.0}] * query.shape[2]

    monkeypatch.setattr(attention, "measure_call", record)
    recorder, setting = Recorder(pipe, run), Setting()
    found = measure_attention(recorder, {}, [setting], Samples(layers=9, steps=9, heads=9), 0)[setting]
    monkeypatch.undo()
    assert models.error(recorder.latents, dense_latents) < 1e-5
    assert all(not models.patched(model) for model in pipe.components.values() if hasattr(model, "named_modules"))

    stock, expected = make(), []
    paths = tuple(dict.fromkeys(entry["layer"] for entry in found))
    assert len(paths) == layers and len(found) == 4 * layers * 2

    def attend(query, key, value):
        expected.append((query, key, value))
        lengths = None if seen[0][5] is None else seen[0][5][:1]
        return oracle.attention(query, key, value, oracle.length_mask(1, 2, key.shape[1], lengths)).float()

    with contextlib.ExitStack() as replaced:
        for component in ("transformer", "transformer_2"):
            if model := stock.components.get(component):
                replaced.enter_context(models.attention_replaced(model, paths, attend))
        run(stock, grid=(2, 9, 13), steps=4)
    first = [entry for number, entry in enumerate(expected) if number // layers % forwards == 0]
    for ours, theirs in zip(seen, first, strict=True):
        assert all(models.error(*pair) < 1e-4 for pair in zip(ours[:3], theirs, strict=True))
    assert [entry["step"] for entry in found[:: 2 * layers]] == [0, 1, 2, 3]
    assert all(entry[4] == [2, 9, 13, 0] for entry in seen)


def test_measures_of_a_whole_run():
    setting = Setting(DraftConfig(sparsity=0.7, tile=TILE))
    settings = [setting, Setting(DraftConfig(sparsity=0, tile=TILE)), Setting(setting.config, "random")]
    recorder = Recorder(models.hunyuan_video_pipeline(), models.run_hunyuan_video)
    found = measure_attention(recorder, {}, settings, Samples(layers=2, steps=2, heads=1), 0)
    assert {len(calls) for calls in found.values()} == {4}
    assert {(entry["layer"], entry["step"], entry["head"]) for entry in found[setting]} == {
        (layer, step, 1)
        for layer in ("transformer_blocks.1.attn", "single_transformer_blocks.0.attn")
        for step in (1, 3)
    }
    for entry in found[settings[1]]:
        assert entry["error"] < 1e-5 and entry["kept"] == entry["oracle"] == pytest.approx(1)
    for entry in found[setting]:
        assert 0 < entry["kept"] <= entry["oracle"] + 1e-6 < 1 and entry["error"] > 1e-2


def test_steps_are_those_of_a_run_that_begins_in_the_middle():
    pipe = models.wan_video_to_video_pipeline()
    arguments = dict(video=[Image.new("RGB", (128, 256))] * 5, height=256, width=128)
    arguments |= dict(prompt_embeds=torch.zeros(1, 7, 8), num_inference_steps=10, strength=0.3, guidance_scale=1.0)
    found = measure_attention(pipe, arguments, [Setting()], Samples(layers=1, steps=9, heads=1), 0)
    assert [entry["step"] for entry in found[Setting()]] == [0, 1, 2]


def test_a_run_whose_steps_nothing_tells_is_an_error(monkeypatch):
    monkeypatch.setattr(Clock, "at", lambda clock, timestep: None)
    with pytest.raises(ValueError, match="Nothing tells the steps of this pipeline's run"):
        measure_attention(Recorder(models.wan_pipeline(), models.run_wan), {}, [Setting()], Samples(), 0)


def test_video_of_less_than_a_block_is_an_error():
    recorder = Recorder(models.wan_pipeline(), lambda pipe, **call: models.run_wan(pipe, **call | {"grid": (1, 5, 7)}))
    with pytest.raises(ValueError, match="fewer tokens than a block of 128"):
        measure_attention(recorder, {}, [Setting()], Samples(), 0)
    assert not models.patched(recorder.pipe.transformer)

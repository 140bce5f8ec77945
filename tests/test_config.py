import dataclasses
import inspect
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from paper import PAPER, draft_attention

import diffusers_draft
from diffusers_draft import DraftConfig, enable_draft_attention
from diffusers_draft.attention.kernels import BACKENDS

NAN = float("nan")
GRID = (1, 8, 16)

OPTIONS_OF_BOTH = [
    ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
    ({"sparsity": -0.1}, r"sparsity must be in \[0, 1\), got -0.1"),
    ({"sparsity": 90}, r"sparsity must be in \[0, 1\), got 90"),
    ({"sparsity": NAN}, r"sparsity must be in \[0, 1\), got nan"),
    ({"sparsity": Fraction(10**20 - 1, 10**20)}, r"sparsity must be in \[0, 1\), got Fraction"),
    ({"sparsity": "0.5"}, r"sparsity must be in \[0, 1\), got '0.5'"),
    ({"sparsity": True}, r"sparsity must be in \[0, 1\), got True"),
    ({"sparsity": torch.tensor(0.5)}, r"sparsity must be in \[0, 1\), got tensor\(0.5"),
    ({"score": "values"}, "Unknown score 'values'. Expected one of 'value', 'mass'"),
    ({"score": None}, "Unknown score None. Expected one of 'value', 'mass'"),
    (
        {"probes": -1},
        r"probes must be a whole number of rows below 2.*31, 0 for no correction, got -1\. The default is 64",
    ),
    ({"probes": 2.5}, "probes must be a whole number of rows below 2.*31, .* got 2.5"),
    ({"probes": True}, "probes must be a whole number of rows below 2.*31, .* got True"),
    ({"probes": "64"}, "probes must be a whole number of rows below 2.*31, .* got '64'"),
    ({"probes": None}, "probes must be a whole number of rows below 2.*31, .* got None"),
    ({"probes": torch.tensor(64)}, r"probes must be a whole number of rows below 2.*31, .* got tensor\(64\)"),
    ({"budget": "heads"}, "Unknown budget 'heads'. Expected one of 'head', 'row'"),
    ({"backend": "sdpa"}, "Unknown backend 'sdpa'. Expected 'auto' or one of 'reference', 'torch', 'flex', "),
    ({"tile": (8, 15)}, r"tile must be .* multiple of 16 tokens, got \(8, 15\)"),
    ({"tile": (8,)}, r"tile must be .*, got \(8,\)"),
    ({"tile": (1, 2, 8, 16)}, r"tile must be .*, got \(1, 2, 8, 16\)"),
    ({"tile": (2, 4, 3)}, r"tile must be .* multiple of 16 tokens, got \(2, 4, 3\)"),
    ({"tile": (0, 16)}, r"tile must be .*, got \(0, 16\)"),
    ({"tile": (-8, -16)}, r"tile must be .*, got \(-8, -16\)"),
    ({"tile": (16.0, 16)}, r"tile must be .*, got \(16.0, 16\)"),
    ({"tile": (16, 16, 16)}, r"tile must have at most 1024 tokens, got \(16, 16, 16\) with 4096"),
    ({"probes": 10**100}, "probes must be a whole number of rows below 2.*31, .* got 1000"),
    ({"tile": (True, 16)}, r"tile must be .*, got \(True, 16\)"),
    ({"tile": (np.int8(64), np.int8(64))}, r"tile must have at most 1024 tokens, got \(64, 64\) with 4096"),
    ({"tile": (26, 40)}, r"tile must have at most 1024 tokens, got \(26, 40\) with 1040"),
]
OPTIONS_OF_CONFIG = [
    ({"schedule": "rising"}, "Unknown schedule 'rising'. Expected one of 'falling', 'constant', 'paper'"),
    ({"schedule": None}, "Unknown schedule None. Expected one of 'falling', 'constant', 'paper'"),
    ({"dense_steps": -0.25}, r"dense_steps .* must be in \[0, 1\], got -0.25"),
    ({"dense_steps": 12}, r"dense_steps .* must be in \[0, 1\], got 12"),
    ({"dense_steps": NAN}, r"dense_steps .* must be in \[0, 1\], got nan"),
    ({"dense_steps": 1}, r"dense_steps is a share .* got 1\. For one step of 50 give 0.02, for all of them 1\.0\."),
    ({"dense_steps": np.int64(1)}, "dense_steps is a share of the run .* got np.int64"),
    ({"dense_steps": True}, "dense_steps is a share of the run .* got True"),
    ({"dense_steps": False}, "dense_steps is a share of the run .* got False"),
    ({"max_error": 0}, r"max_error is a relative error and must be in \(0, 1\), got 0"),
    ({"max_error": 1.0}, r"max_error is a relative error and must be in \(0, 1\), got 1.0"),
    ({"max_error": -0.1}, r"max_error is a relative error .* got -0.1"),
    ({"max_error": NAN}, "max_error is a relative error .* got nan"),
    ({"max_error": True}, "max_error is a relative error .* got True"),
    ({"max_error": "0.05"}, "max_error is a relative error .* got '0.05'"),
    ({"max_error": torch.tensor(0.05)}, r"max_error is a relative error .* got tensor\(0.05"),
    ({"max_error": 0.05, "sparsity": 0.8}, "leave the other None, got sparsity=0.8, max_error=0.05"),
    ({"max_error": 0.05, "probes": 0}, "max_error=0.05 is measured on probes, so that probes=0 cannot be given"),
    ({"dense_steps": "0.5"}, "dense_steps is a share of the run .* got '0.5'"),
    ({"dense_steps": torch.tensor(0.5)}, r"dense_steps is a share of the run .* got tensor\(0.5"),
    ({"dense_steps": 10**400}, "dense_steps is a share of the run .* got 1000"),
    ({"max_error": Fraction(1, 10**400)}, "max_error is a relative error .* got Fraction"),
    ({"max_error": 10**400}, "max_error is a relative error .* got 1000"),
    ({"dense_timestep": 10**400}, "dense_timestep must be a number that a float can hold, got 1000"),
    ({"dense_timestep": NAN}, "dense_timestep .* got nan"),
    ({"dense_timestep": True}, "dense_timestep must be a number.*, got True"),
    ({"dense_timestep": "900"}, "dense_timestep must be a number.*, got '900'"),
    ({"dense_timestep": torch.tensor(900.0)}, r"dense_timestep must be a number.*, got tensor\(900"),
    ({"dense_layers": [0, -1]}, r"dense_layers must be layer indices from 0 on, .* got \(0, -1\)"),
    ({"dense_layers": ["blocks.0"]}, r"dense_layers must be layer indices from 0 on, .* got \('blocks.0',\)"),
    ({"dense_layers": [0.5]}, r"dense_layers must be layer indices from 0 on, .* got \(0.5,\)"),
    ({"dense_layers": {0: 1}}, r"dense_layers must be layer indices from 0 on, .* got \{0: 1\}"),
    ({"dense_layers": b"\0\1"}, r"dense_layers must be layer indices from 0 on, .* got b'"),
    ({"dense_layers": torch.tensor([True, False])}, r"dense_layers must be layer indices .* got \(True, False\)"),
    ({"dense_layers": 1}, r"dense_layers must be layer indices from 0 on, as in \(0, 1\), got 1\."),
    ({"dense_layers": "01"}, r"dense_layers must be layer indices from 0 on, .* got \('0', '1'\)"),
    ({"dense_layers": [True]}, r"dense_layers must be layer indices from 0 on, .* got \(True,\)"),
    ({"dense_layers": torch.tensor(1)}, r"dense_layers must be layer indices from 0 on, .* got tensor\(1\)"),
]


def tokens(*shape: int, **kwargs) -> torch.Tensor:
    return torch.zeros(*(shape or (2, 200, 3, 32)), **kwargs)


@pytest.mark.parametrize(("options", "message"), OPTIONS_OF_BOTH + OPTIONS_OF_CONFIG, ids=str)
def test_config_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        DraftConfig(**options)


@pytest.mark.parametrize(("options", "message"), OPTIONS_OF_BOTH + OPTIONS_OF_CONFIG, ids=str)
def test_enabling_refuses_and_changes_nothing(options, message):
    module = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=message):
        enable_draft_attention(module, **options)
    assert not module._forward_pre_hooks


@pytest.mark.parametrize(("options", "message"), OPTIONS_OF_BOTH, ids=str)
def test_draft_attention_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        draft_attention(tokens(), tokens(), tokens(), GRID, **options)


def test_a_refused_call_leaves_later_calls_alone():
    grid, tile = (1, 24, 32), (4, 16)
    query = torch.randn(1, 800, 1, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises((TypeError, ValueError)):
        draft_attention(query, query, query, grid, tile=(4.0, 16.0))
    assert draft_attention(query, query, query, grid, tile=tile).shape == query.shape


def test_both_have_the_same_defaults():
    parameters = inspect.signature(diffusers_draft.draft_attention).parameters
    shared = {name: parameters[name].default for name in ("sparsity", "tile", "budget", "score", "probes", "backend")}
    config = DraftConfig()
    assert shared == {name: getattr(config, name) for name in shared}


def test_every_limit_itself_is_allowed():
    assert DraftConfig(tile=(16, 8, 8)).tile == (16, 8, 8)
    config = DraftConfig(sparsity=0, tile=(4, 4), dense_steps=1.0, dense_timestep=0.0, dense_layers=[])
    assert (config.sparsity, config.tile, config.dense_steps, config.dense_layers) == (0, (4, 4), 1, ())
    assert all(DraftConfig(backend=name).backend == name for name in ("auto", *BACKENDS))


def test_no_probes_and_whole_numbers_of_other_types_are_allowed():
    assert DraftConfig(probes=0).probes == 0
    assert DraftConfig(probes=np.int64(7), sparsity=np.float32(0.5)).probes == 7
    config = DraftConfig(dense_steps=np.float32(0.5), dense_layers=torch.tensor([2, 0]))
    assert (config.dense_steps, config.dense_layers) == (0.5, (0, 2))
    assert DraftConfig(dense_steps=np.int64(0)).dense_steps == 0


def test_settings_of_the_papers_code():
    expected = DraftConfig(sparsity=0.75, budget="head", tile=(8, 16), **PAPER)
    assert DraftConfig.paper(0.75) == expected and DraftConfig.paper().sparsity == 0.9
    assert expected.dense_steps is expected.dense_timestep is expected.dense_layers is None


def test_defaults_are_those_that_the_study_supports():
    config = DraftConfig()
    assert (config.sparsity, config.budget, config.tile, config.backend) == (0.8, "row", (4, 4, 8), "auto")
    assert (config.schedule, config.score, config.probes) == ("falling", "value", 64)
    assert config.dense_steps is config.dense_timestep is config.dense_layers is None


def test_settings_of_the_papers_code_for_hunyuan_custom():
    paper = dict(budget="head", tile=(8, 16), dense_timestep=975.0, **PAPER)
    assert DraftConfig.hunyuan_custom() == DraftConfig(sparsity=0.9, **paper)
    assert DraftConfig.hunyuan_custom(sparsity=0.5) == DraftConfig(sparsity=0.5, **paper)


def test_config_is_frozen_keyword_only_and_hashable():
    config = DraftConfig(tile=[8, 16], dense_layers=iter([3, 1, 1]))
    assert config == DraftConfig(tile=(8, 16), dense_layers=(1, 3))
    assert hash(config) == hash(DraftConfig(tile=(8, 16), dense_layers=(1, 3)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.sparsity = 0.5
    with pytest.raises(TypeError):
        DraftConfig(0.5)


@pytest.mark.parametrize(
    ("grid", "prefix"), [((1, 8, 26), 0), ((2, 8, 16), 0), ((1, 8, 16), 73), ((21, 30, 52), 0)], ids=str
)
def test_a_grid_that_does_not_fit_the_sequence_is_refused(grid, prefix):
    with pytest.raises(ValueError, match=r"The grid \(T, Y, X\) = .* video tokens .* only 200 tokens"):
        draft_attention(tokens(), tokens(), tokens(), grid, prefix=prefix)


@pytest.mark.parametrize(
    "grid", [(0, 8, 16), (1, -8, 16), (-1, -8, 16), (8, 16), (1, 1, 8, 16), (1.0, 8.0, 16.0)], ids=str
)
def test_a_grid_that_is_none_is_refused(grid):
    with pytest.raises(ValueError, match=r"grid"):
        draft_attention(tokens(), tokens(), tokens(), grid)


@pytest.mark.parametrize("prefix", [-1, 2.0, "2", None, torch.tensor(2), torch.tensor(2.0)], ids=repr)
def test_a_prefix_that_is_no_whole_number_is_refused(prefix):
    with pytest.raises(ValueError, match=r"prefix is .* a whole number from 0 on below 2.*31, got"):
        draft_attention(tokens(), tokens(), tokens(), GRID, prefix=prefix)


def test_grid_and_prefix_may_be_numpy_s_integers():
    query = torch.randn(2, 200, 3, 32, generator=torch.Generator().manual_seed(0))
    expected = draft_attention(query, query, query, GRID, prefix=10)
    numbers = tuple(map(np.int64, GRID))
    assert torch.equal(draft_attention(query, query, query, numbers, prefix=np.int32(10)), expected)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_arrays_are_refused(position):
    tensors = [tokens(), tokens(), tokens()]
    tensors[position] = tensors[position].numpy()
    with pytest.raises(ValueError, match=r"must be torch tensors, got ndarray\. torch\.as_tensor"):
        draft_attention(*tensors, GRID)


@pytest.mark.parametrize("shape", [(0, 200, 3, 32), (2, 0, 3, 32), (2, 200, 0, 32), (2, 200, 3, 0)], ids=str)
def test_empty_tensors_are_refused_with_their_shape(shape):
    with pytest.raises(ValueError, match=r"at least one sample, token, head and dimension, got") as error:
        draft_attention(*[tokens(*shape)] * 3, GRID)
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool], ids=str)
def test_tensors_of_no_real_numbers_are_refused(dtype, autocast, backend):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(ValueError, match=f"got {dtype}"):
        draft_attention(*[tokens(dtype=dtype)] * 3, GRID, backend=backend)


@pytest.mark.parametrize(
    "shapes",
    [
        [(200, 3, 32)] * 3,
        [(2, 200, 96)] * 3,
        [(2, 200, 3, 32), (2, 201, 3, 32), (2, 201, 3, 32)],
        [(2, 200, 3, 32), (2, 200, 3, 32), (2, 200, 3, 64)],
        [(2, 200, 3, 32), (2, 200, 1, 32), (2, 200, 1, 32)],
        [(2, 200, 3, 32), (1, 200, 3, 32), (1, 200, 3, 32)],
    ],
    ids=str,
)
def test_tensors_of_other_shapes_are_refused_with_their_shapes(shapes):
    with pytest.raises(ValueError, match=r"one shape \(B, S, H, D\), got") as error:
        draft_attention(*(tokens(*shape) for shape in shapes), GRID)
    assert all(str(shape) in str(error.value) for shape in shapes)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_mixed_dtypes_are_refused(position):
    tensors = [tokens(), tokens(), tokens()]
    tensors[position] = tensors[position].half()
    with pytest.raises(ValueError, match=r"same dtype, got .*torch.float16"):
        draft_attention(*tensors, GRID)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_mixed_devices_are_refused(position):
    tensors = [tokens(), tokens(), tokens()]
    tensors[position] = tensors[position].to("meta")
    with pytest.raises(ValueError, match=r"same device, got .*meta"):
        draft_attention(*tensors, GRID)


@pytest.mark.parametrize(
    "scale", [True, "1", NAN, math.inf, -math.inf, torch.tensor(0.25), [0.25], 1j, 10**400], ids=str
)
def test_a_scale_that_is_no_finite_number_is_refused(scale):
    with pytest.raises(ValueError, match=r"scale is a factor on the scores and must be a finite number above 0, got"):
        draft_attention(tokens(), tokens(), tokens(), GRID, scale=scale)


@pytest.mark.parametrize("scale", [np.float32(0.25), Fraction(1, 4)], ids=repr)
def test_scale_may_be_any_real_number(scale):
    tensors = [torch.randn(2, 200, 3, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    assert torch.equal(draft_attention(*tensors, GRID, scale=scale), draft_attention(*tensors, GRID, scale=0.25))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8_tensors_are_refused(dtype):
    with pytest.raises(ValueError, match=rf"must be float64, .* or bfloat16, got {dtype}\. Cast them\."):
        draft_attention(*[tokens().to(dtype)] * 3, GRID)


def test_flex_refuses_float64():
    with pytest.raises(RuntimeError, match=r"'flex' needs float32, float16 or bfloat16, got torch.float64\. Choose"):
        draft_attention(*[tokens(dtype=torch.float64)] * 3, GRID, backend="flex")


@pytest.mark.parametrize("grid", [(10**30, 1, 1), (True, 8, 16)], ids=str)
def test_a_grid_that_no_tensor_has_is_refused(grid):
    with pytest.raises(ValueError, match=r"grid must be \(T, Y, X\): .* below 2\*\*31, got"):
        draft_attention(tokens(), tokens(), tokens(), grid)


@pytest.mark.parametrize("prefix", [10**30, False, True])
def test_a_prefix_that_is_no_position_is_refused(prefix):
    with pytest.raises(ValueError, match=r"prefix is .* below 2\*\*31, got"):
        draft_attention(tokens(), tokens(), tokens(), GRID, prefix=prefix)


def test_sparse_and_nested_tensors_are_refused():
    with pytest.raises(
        ValueError, match=r"must be dense torch tensors, got torch.sparse_coo\. Pad it, or use to_dense"
    ):
        draft_attention(*[tokens().to_sparse()] * 3, GRID)
    nested = torch.nested.nested_tensor([tokens(200, 3, 32), tokens(180, 3, 32)], layout=torch.jagged)
    with pytest.raises(ValueError, match=r"must be dense torch tensors, got a nested tensor\. Pad it"):
        draft_attention(nested, nested, nested, GRID)


def test_a_length_without_a_value_is_refused():
    with pytest.raises(ValueError, match=r"kv_len must have values, got a tensor on the meta device\. Make it on cpu"):
        draft_attention(tokens(), tokens(), tokens(), GRID, kv_len=torch.full((2,), 200, device="meta"))


def test_shapes_of_meta_tensors():
    query = tokens(device="meta", dtype=torch.float16)
    out = draft_attention(query, query, query, GRID)
    assert (out.shape, out.dtype, out.device) == (query.shape, query.dtype, query.device)


@pytest.mark.parametrize(
    "kv_len",
    [torch.tensor(200), torch.tensor([200]), torch.tensor([[200, 200]]), torch.tensor([200, 200, 200])],
    ids=lambda kv_len: str(tuple(kv_len.shape)),
)
def test_kv_len_of_another_shape_is_refused(kv_len):
    with pytest.raises(ValueError, match=r"kv_len must hold one integer for each of the 2 samples, got shape \("):
        draft_attention(tokens(), tokens(), tokens(), GRID, kv_len=kv_len)


@pytest.mark.parametrize("kv_len", [[200, 200], 200, np.array([200, 200])], ids=repr)
def test_kv_len_that_is_no_tensor_is_refused(kv_len):
    with pytest.raises(ValueError, match=r"kv_len must be a tensor of 2 integers, got"):
        draft_attention(tokens(), tokens(), tokens(), GRID, kv_len=kv_len)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64], ids=str)
def test_kv_len_that_is_not_integer_is_refused(dtype):
    with pytest.raises(ValueError, match=f"kv_len must hold one integer .* dtype {dtype}"):
        draft_attention(tokens(), tokens(), tokens(), GRID, kv_len=torch.tensor([200, 200], dtype=dtype))


@pytest.mark.parametrize("kv_len", [[200, 201], [137, 200], [0, 200], [-1, 200]], ids=str)
def test_kv_len_out_of_range_is_refused(kv_len):
    with pytest.raises(ValueError, match=r"kv_len must lie between prefix \+ T \* Y \* X = 138 and S = 200, got"):
        draft_attention(tokens(), tokens(), tokens(), GRID, prefix=10, kv_len=torch.tensor(kv_len))


def test_the_limits_of_kv_len_are_allowed():
    out = draft_attention(tokens(), tokens(), tokens(), GRID, prefix=10, kv_len=torch.tensor([138, 200]))
    assert out.shape == (2, 200, 3, 32)


@pytest.mark.parametrize("goal", ["sparsity", "max_error"])
def test_a_goal_may_be_any_real_number_and_is_kept_as_a_float(goal):
    found = getattr(DraftConfig(**{goal: Fraction(1, 4)}), goal)
    assert found == 0.25 and type(found) is float

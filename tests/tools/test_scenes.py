"""The procedural videos: what a caption says is what is drawn."""

import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_draft.tools.demo.drawing import draw
from diffusers_draft.tools.demo.scenes import (
    CAMERAS,
    COLOURS,
    MOTIONS,
    PATTERNS,
    SHAPES,
    SIZES,
    TEXTURES,
    WORDS,
    Scenes,
    captions,
    sample_scenes,
    unknown_words,
)

HEIGHT, WIDTH, FRAMES = 72, 120, 5
ONE_SHAPE = (
    rf"a ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(TEXTURES)}) ({'|'.join(SHAPES)}) ({'|'.join(MOTIONS)})"
)
GROUND = rf"({'|'.join(COLOURS)}) ({'|'.join(PATTERNS)}), camera ({'|'.join(CAMERAS)})"


def sampled(seed: int, batch: int = 4, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Scenes:
    return sample_scenes(batch, *size, torch.Generator().manual_seed(seed))


def scene(**changed: object) -> Scenes:
    """One grey circle of radius 15 in the middle of a blue sky, at rest; other values as given."""
    chosen: dict[str, object] = {
        "pattern": PATTERNS.index("sky"),
        "pattern_colour": list(COLOURS).index("blue"),
        "pattern_size": 1e6,  # so that the sky is even
        "pattern_angle": 0.0,
        "camera": CAMERAS.index("still"),
        "camera_speed": 2.0,
        "present": [True, False, False],
        "shape": [SHAPES.index("circle")] * 3,
        "colour": [list(COLOURS).index("grey")] * 3,
        "size": [0] * 3,
        "texture": [TEXTURES.index("plain")] * 3,
        "motion": [MOTIONS.index("standing still")] * 3,
        "radius": [15.0] * 3,
        "position": [[0.0, 0.0]] * 3,
        "angle": [0.0] * 3,
        "speed": [2.0] * 3,
        "phase": [0.0] * 3,
        "brightness": [1.0] * 4,
    }
    return Scenes(**{name: torch.tensor([value]) for name, value in (chosen | changed).items()})


def drawn(scenes: Scenes, frames: int = FRAMES) -> torch.Tensor:
    """`(3, F, H, W)` of the only scene."""
    return draw(scenes, frames, HEIGHT, WIDTH)[0]


def bright_shape(**changed: object) -> torch.Tensor:
    """`(F, H, W)` bool: pixels of a white shape on black, which the colours cannot give: the ground is dark blue."""
    video = drawn(scene(colour=[list(COLOURS).index("white")] * 3, brightness=[1.0, 1.0, 1.0, 0.3], **changed))
    return video[0] > -0.4


def centres(mask: torch.Tensor) -> torch.Tensor:
    """`(F, 2)`: x and y of the middle of each frame's pixels."""
    frames, y, x = mask.nonzero(as_tuple=True)
    return torch.stack(
        [torch.stack([x[frames == f].float().mean(), y[frames == f].float().mean()]) for f in range(len(mask))]
    )


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([(96, 128), (192, 384), (384, 192), (64, 64)]))
def test_a_caption_names_everything_in_the_scene(seed, size):
    scenes = sampled(seed, size=size)
    for b, caption in enumerate(captions(scenes)):
        shapes, _, ground = caption.partition(" over ")
        found = [re.fullmatch(ONE_SHAPE, shape) for shape in shapes.split(" and ")]
        assert len(found) == scenes.present[b].sum()
        for k, match in enumerate(found):
            assert list(SIZES).index(match[1]) == scenes.size[b, k]
            low, high = SIZES[match[1]]
            assert low <= scenes.radius[b, k] <= high
            assert list(COLOURS).index(match[2]) == scenes.colour[b, k] != scenes.pattern_colour[b]
            assert TEXTURES.index(match[3]) == scenes.texture[b, k]
            assert SHAPES.index(match[4]) == scenes.shape[b, k]
            assert MOTIONS.index(match[5]) == scenes.motion[b, k]
        colour, pattern, camera = re.fullmatch(GROUND, ground).groups()
        assert list(COLOURS).index(colour) == scenes.pattern_colour[b]
        assert PATTERNS.index(pattern) == scenes.pattern[b]
        assert CAMERAS.index(camera) == scenes.camera[b]
        assert unknown_words(caption) == []


def test_words():
    assert len(set(WORDS)) == len(WORDS)
    assert unknown_words("a red cat over green stripes, camera pans slowly") == ["cat", "slowly"]


def test_scenes_depend_on_the_generator_alone():
    first, again, other = sampled(1), sampled(1), sampled(2)
    fields = [field.name for field in dataclasses.fields(Scenes)]
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in fields)
    assert not torch.equal(first.position, other.position)


def test_a_small_frame_has_few_shapes():
    assert sampled(0, 50, (64, 64)).present.sum(1).max() == 1
    assert sampled(0, 50, (192, 384)).present.sum(1).unique().tolist() == [1, 2, 3]


@pytest.mark.parametrize("seed", range(3))
def test_a_batch_is_its_clips(seed):
    scenes = sampled(seed, 3)
    video = draw(scenes, FRAMES, HEIGHT, WIDTH)
    assert video.shape == (3, 3, FRAMES, HEIGHT, WIDTH) and video.dtype == torch.float32
    assert video.min() >= -1 and video.max() <= 1 and video.isfinite().all()
    for b in range(3):
        names = [field.name for field in dataclasses.fields(Scenes)]
        alone = Scenes(**{name: getattr(scenes, name)[b : b + 1] for name in names})
        torch.testing.assert_close(draw(alone, FRAMES, HEIGHT, WIDTH)[0], video[b], atol=1e-5, rtol=0)


def test_nothing_but_the_ground_without_shapes():
    video = drawn(scene(present=[False] * 3))
    expected = torch.tensor(COLOURS["blue"]) * (0.55 + 0.45 * 0.5) * 2 - 1
    torch.testing.assert_close(video, expected[:, None, None, None].expand_as(video), atol=1e-3, rtol=0)


AREAS = {
    "circle": torch.pi * 0.95**2,
    "square": 1.64**2,
    "triangle": 0.75 * 3**0.5 * 1.04**2,
    "star": 5 * 1.1 * 0.55 * torch.sin(torch.tensor(torch.pi / 5)).item(),
    "ring": torch.pi * (0.96**2 - 0.44**2),
    "cross": 2 * 1.9 * 0.68 - 0.68**2,
}
"""In squares of the radius."""


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_has_its_area_and_place(name):
    mask = bright_shape(shape=[SHAPES.index(name)] * 3, position=[[10.0, -6.0]] * 3, radius=[24.0] * 3)
    assert mask[0].sum() / 24**2 == pytest.approx(AREAS[name], rel=0.06)
    middle = centres(mask)[0] - torch.tensor([(WIDTH - 1) / 2, (HEIGHT - 1) / 2])
    torch.testing.assert_close(middle, torch.tensor([10.0, -6.0]), atol=1.5, rtol=0)


@pytest.mark.parametrize(
    ("motion", "step"),
    [("moving left", (-2, 0)), ("moving right", (2, 0)), ("moving up", (0, -2)), ("moving down", (0, 2))],
)
def test_shapes_move_as_they_say(motion, step):
    steps = centres(bright_shape(motion=[MOTIONS.index(motion)] * 3)).diff(dim=0)
    torch.testing.assert_close(steps, torch.tensor(step, dtype=torch.float32).expand_as(steps), atol=0.3, rtol=0)


def test_a_bouncing_shape_goes_up_and_comes_down():
    white, motion = [list(COLOURS).index("white")] * 3, [MOTIONS.index("bouncing")] * 3
    video = drawn(scene(colour=white, brightness=[1.0, 1.0, 1.0, 0.3], motion=motion), frames=31)
    height = -centres(video[0] > -0.4)[:, 1]
    # Two pixels in a frame and thirty in a bounce: the ground in the first, the middle and the last frame.
    for rise in (height[7] - height[0], height[7] - height[15], height[23] - height[15], height[23] - height[30]):
        assert 19 < rise < 23


def test_a_spinning_shape_turns_in_its_place():
    mask = bright_shape(shape=[SHAPES.index("cross")] * 3, motion=[MOTIONS.index("spinning")] * 3, radius=[24.0] * 3)
    assert centres(mask).diff(dim=0).abs().max() < 0.5
    # A quarter turn is pi / 2, and each frame turns by 2 / 20.
    assert (mask[0] != mask[-1]).sum() > 100


@pytest.mark.parametrize(("camera", "step"), [("pans left", (2, 0)), ("pans down", (0, -2)), ("still", (0, 0))])
def test_what_the_camera_leaves_behind_moves_the_other_way(camera, step):
    steps = centres(bright_shape(camera=CAMERAS.index(camera))).diff(dim=0)
    torch.testing.assert_close(steps, torch.tensor(step, dtype=torch.float32).expand_as(steps), atol=0.3, rtol=0)


@pytest.mark.parametrize("pattern", [name for name in PATTERNS if name != "sky"])
def test_the_ground_moves_with_the_camera_and_has_two_tones(pattern):
    options = dict(present=[False] * 3, pattern=PATTERNS.index(pattern), pattern_size=24.0, pattern_angle=0.4)
    video = drawn(scene(**options, camera=CAMERAS.index("pans right")))
    torch.testing.assert_close(video[:, 1, :, :-2], video[:, 0, :, 2:], atol=1e-3, rtol=0)
    bright, dark = (COLOURS["blue"][2] * tone * 2 - 1 for tone in (1.0, 0.55))
    assert video[2].max().item() == pytest.approx(bright, abs=1e-4)
    assert video[2].min().item() == pytest.approx(dark, abs=1e-4)
    is_bright = video[2] > (bright + dark) / 2
    assert 0.15 < is_bright.float().mean() < 0.85


def test_zooming_in_makes_shapes_larger_about_the_middle():
    areas = [
        bright_shape(camera=CAMERAS.index(name), camera_speed=5.0).sum((1, 2)) for name in ("zooms in", "zooms out")
    ]
    assert (areas[0].diff() > 0).all() and (areas[1].diff() < 0).all()
    # From the first frame to the last 4 x 5 per cent in length.
    assert areas[0][-1] / areas[0][0] == pytest.approx(torch.e**0.4, rel=0.05)


def test_later_shapes_lie_on_top():
    colours = [list(COLOURS).index(name) for name in ("red", "green", "white")]
    for top in (1, 2):
        present = [k <= top for k in range(3)]
        middle = drawn(scene(colour=colours, present=present))[:, 0, HEIGHT // 2, WIDTH // 2]
        expected = torch.tensor(list(COLOURS.values())[colours[top]]) * 2 - 1
        torch.testing.assert_close(middle, expected, atol=0.05, rtol=0)


def test_textures_differ():
    videos = [drawn(scene(texture=[texture] * 3, radius=[30.0] * 3)) for texture in range(len(TEXTURES))]
    for i, video in enumerate(videos):
        for other in videos[i + 1 :]:
            assert ((video - other).abs() > 0.2).any(0).float().mean() > 0.03

"""Scenes of the procedural videos: random shapes that move over a background, and their captions."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

COLOURS = {
    "red": (0.88, 0.16, 0.16),
    "orange": (0.98, 0.56, 0.10),
    "yellow": (0.97, 0.87, 0.18),
    "green": (0.18, 0.68, 0.28),
    "cyan": (0.20, 0.78, 0.85),
    "blue": (0.17, 0.32, 0.86),
    "purple": (0.55, 0.24, 0.75),
    "pink": (0.98, 0.52, 0.72),
    "white": (0.95, 0.95, 0.95),
    "grey": (0.50, 0.50, 0.52),
}
"""Colour -> red, green and blue in [0, 1]."""
SIZES = {"small": (22.0, 30.0), "big": (40.0, 54.0)}
"""Size -> smallest and largest radius, in pixels at any resolution."""
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
TEXTURES = ("plain", "striped", "dotted", "checkered")
MOTIONS = ("moving left", "moving right", "moving up", "moving down", "bouncing", "spinning", "standing still")
PATTERNS = ("stripes", "checks", "dots", "waves", "sky")
CAMERAS = ("still", "pans left", "pans right", "pans up", "pans down", "zooms in", "zooms out")
MOST_SHAPES = 3
"""Largest number of shapes in a scene."""

_CHOICES = (COLOURS, SIZES, SHAPES, TEXTURES, MOTIONS, PATTERNS, CAMERAS)
WORDS = tuple(
    sorted({"a", "and", "over", "camera"} | {word for choice in _CHOICES for name in choice for word in name.split()})
)
"""All words that occur in captions."""


@dataclass(frozen=True)
class Scenes:
    """Descriptions of a batch of B clips.

    There are K places for shapes, `MOST_SHAPES` of them; later ones lie on top. All indices are int64 and all other
    numbers float32. Lengths are in pixels from the middle of the frame, to the right and down; times are in frames
    from the middle of the clip.

    Attributes:
        pattern: `(B,)` of the background, an index into `PATTERNS`.
        pattern_colour: `(B,)` index into `COLOURS`.
        pattern_size: `(B,)` length of a period.
        pattern_angle: `(B,)` in radians.
        camera: `(B,)` index into `CAMERAS`.
        camera_speed: `(B,)` a pan's pixels in a frame; a zoom's per cent in a frame.
        present: `(B, K)` bool.
        shape: `(B, K)` index into `SHAPES`.
        colour: `(B, K)` index into `COLOURS`.
        size: `(B, K)` index into `SIZES`.
        texture: `(B, K)` index into `TEXTURES`.
        motion: `(B, K)` index into `MOTIONS`.
        radius: `(B, K)`.
        position: `(B, K, 2)` x and y in the middle of the clip.
        angle: `(B, K)` in radians, in the middle of the clip.
        speed: `(B, K)` pixels in a frame; a spinning shape turns by a twentieth of it, in radians.
        phase: `(B, K)` of a bounce, in [0, 1).
        brightness: `(B, K + 1)` factors on the colours of the shapes and, last, of the background.
    """

    pattern: Tensor
    pattern_colour: Tensor
    pattern_size: Tensor
    pattern_angle: Tensor
    camera: Tensor
    camera_speed: Tensor
    present: Tensor
    shape: Tensor
    colour: Tensor
    size: Tensor
    texture: Tensor
    motion: Tensor
    radius: Tensor
    position: Tensor
    angle: Tensor
    speed: Tensor
    phase: Tensor
    brightness: Tensor

    def to(self, device: torch.device) -> "Scenes":
        """Copy the scenes to a device."""
        return Scenes(
            **{field.name: getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)}
        )


def sample_scenes(batch: int, height: int, width: int, generator: torch.Generator) -> Scenes:
    """Sample random scenes, on the CPU; half of them have one shape alone.

    Args:
        batch: B, the number of scenes.
        height: height of the frame in pixels.
        width: width of the frame in pixels.
        generator: source of randomness, on the CPU.
    """

    def choose(choices: Any, *size: int) -> Tensor:
        return torch.randint(len(choices), (batch, *size), generator=generator)

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, *size, generator=generator)

    places = MOST_SHAPES
    pattern_colour, colour = choose(COLOURS), choose(COLOURS, places)
    # No shape has the colour of the background.
    colour = torch.where(colour == pattern_colour[:, None], (colour + 1) % len(COLOURS), colour)
    count = torch.randint(1, _fitting(height, width) + 1, (batch, 1), generator=generator)
    count = torch.where(uniform(0, 1, 1) < 0.5, 1, count)
    size = choose(SIZES, places)
    low, high = torch.tensor(list(SIZES.values())).unbind(1)
    return Scenes(
        pattern=choose(PATTERNS),
        pattern_colour=pattern_colour,
        pattern_size=uniform(40, 64),
        pattern_angle=torch.randint(4, (batch,), generator=generator) * (torch.pi / 4),
        camera=choose(CAMERAS),
        camera_speed=uniform(1, 2.5),
        present=torch.arange(places) < count,
        shape=choose(SHAPES, places),
        colour=colour,
        size=size,
        texture=choose(TEXTURES, places),
        motion=choose(MOTIONS, places),
        radius=low[size] + (high - low)[size] * uniform(0, 1, places),
        position=uniform(-0.32, 0.32, places, 2) * torch.tensor([width, height]),
        angle=uniform(-0.35, 0.35, places),
        speed=uniform(1.5, 3.0, places),
        phase=uniform(0, 1, places),
        brightness=uniform(0.92, 1.05, places + 1),
    )


def captions(scenes: Scenes) -> list[str]:
    """Write a caption for each scene, such as `"a small red plain ring bouncing over blue dots, camera pans left"`."""
    choices = (
        (tuple(SIZES), scenes.size),
        (tuple(COLOURS), scenes.colour),
        (TEXTURES, scenes.texture),
        (SHAPES, scenes.shape),
        (MOTIONS, scenes.motion),
    )
    # (B, K, 5) indices, and one name for each
    shapes = torch.stack([index for _, index in choices], dim=2).tolist()
    grounds = torch.stack([scenes.pattern_colour, scenes.pattern, scenes.camera], dim=1).tolist()
    texts = []
    for places, present, (colour, pattern, camera) in zip(shapes, scenes.present.tolist(), grounds, strict=True):
        shown = [
            " ".join(["a", *(names[index] for (names, _), index in zip(choices, place, strict=True))])
            for place, there in zip(places, present, strict=True)
            if there
        ]
        ground = f"{tuple(COLOURS)[colour]} {PATTERNS[pattern]}"
        texts.append(f"{' and '.join(shown)} over {ground}, camera {CAMERAS[camera]}")
    return texts


def unknown_words(caption: str) -> list[str]:
    """List the words of a text that occur in no caption."""
    return [word for word in caption.replace(",", " ").split() if word not in WORDS]


def _fitting(height: int, width: int) -> int:
    """Compute how many shapes a frame of this size has room for."""
    return max(1, min(MOST_SHAPES, round(height * width / 128**2)))

"""Rendering of scenes as videos, on any device, a whole batch at once."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .scenes import CAMERAS, COLOURS, MOTIONS, PATTERNS, SHAPES, TEXTURES, Scenes

LIGHT = (-0.6, -0.8)
"""Direction that the light comes from, (x, y) in the plane of the frame."""
SHADOW = 5.0
"""Distance of a shadow from its shape, in pixels."""
PERIODS = 1.3
"""Periods of a shape's texture in one radius."""


def draw(scenes: Scenes, frames: int, height: int, width: int) -> Tensor:
    """Draw a batch of clips.

    Args:
        scenes: what the clips show, on the device to draw on.
        frames: F, frames of a clip.
        height: H in pixels.
        width: W in pixels.

    Returns:
        `(B, 3, F, H, W)` float32 in [-1, 1].
    """
    world = _world(scenes, frames, height, width)
    palette = _palette(world.x.device)
    ground = _look_up(palette[scenes.pattern_colour] * scenes.brightness[:, -1:])
    picture = ground * (0.55 + 0.45 * _background(scenes, world))[:, None]
    shapes = _shapes(scenes, world)
    colours = _look_up(palette[scenes.colour] * scenes.brightness[:, :-1, None])
    for place in range(scenes.present.shape[1]):
        cover, shadow, tone = (layer[:, place, None] for layer in (shapes.cover, shapes.shadow, shapes.tone))
        picture = torch.lerp(picture * (1 - 0.45 * shadow), colours[:, place] * tone, cover)
    return picture.clamp(0, 1) * 2 - 1


@dataclass(frozen=True)
class _World:
    """World coordinates of the pixels: `(B, F, H, W)` x and y, `(F,)` times and `(B, F, 1, 1)` zoom."""

    x: Tensor
    y: Tensor
    time: Tensor
    zoom: Tensor


@dataclass(frozen=True)
class _Shapes:
    """Layers of all shapes, `(B, K, F, H, W)` each: coverage and shadow of every pixel, and brightness."""

    cover: Tensor
    shadow: Tensor
    tone: Tensor


def _world(scenes: Scenes, frames: int, height: int, width: int) -> _World:
    """Compute the world coordinates of all pixels under the motion of the camera."""
    device = scenes.camera.device
    time = torch.arange(frames, device=device) - (frames - 1) / 2
    across, down = _towards(CAMERAS, "left", "right", device), _towards(CAMERAS, "up", "down", device)
    closer = _towards(CAMERAS, "out", "in", device)
    way = scenes.camera_speed[:, None] * time  # (B, F)
    zoom = torch.exp(0.01 * closer[scenes.camera][:, None] * way)[..., None, None]
    x = torch.arange(width, device=device) - (width - 1) / 2
    y = (torch.arange(height, device=device) - (height - 1) / 2)[:, None]
    x = x / zoom + (across[scenes.camera][:, None] * way)[..., None, None]
    y = y / zoom + (down[scenes.camera][:, None] * way)[..., None, None]
    x, y = torch.broadcast_tensors(x, y)
    return _World(x, y, time, zoom)


def _background(scenes: Scenes, world: _World) -> Tensor:
    """Compute the brightness of the background pattern, `(B, F, H, W)` in [0, 1]."""
    size = _look_up(scenes.pattern_size)
    angle = _look_up(scenes.pattern_angle)
    u = (world.x * angle.cos() + world.y * angle.sin()) / size
    v = (world.y * angle.cos() - world.x * angle.sin()) / size
    edge = size * world.zoom / math.pi  # pixels in which the value below moves by one where it is steepest
    values = {
        "stripes": _wave(u),
        "checks": _wave(u) * _wave(v),
        "dots": _wave(u) + _wave(v) - 0.9,
        "waves": _wave(u + 0.25 * _wave(v)),
    }
    tones = {name: _threshold(value, edge) for name, value in values.items()}
    tones["sky"] = (0.5 - world.y / (4 * size)).clamp(0, 1)
    return _choose([tones[name] for name in PATTERNS], scenes.pattern)


def _shapes(scenes: Scenes, world: _World) -> _Shapes:
    """Compute coverage, shadow and brightness of all shapes."""
    radius = _look_up(scenes.radius)
    x, y, turn = _motion(scenes, world.time)
    x, y = (world.x[:, None] - x) / radius, (world.y[:, None] - y) / radius
    pixels = radius * world.zoom[:, None]

    def turned(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()

    def cover(x: Tensor, y: Tensor, softness: float) -> tuple[Tensor, Tensor]:
        distance = _choose([_DISTANCES[name](*turned(x, y)) for name in SHAPES], scenes.shape)
        return distance, (0.5 - distance * pixels / softness).clamp(0, 1)

    distance, covered = cover(x, y, 1)
    away = SHADOW / radius
    _, shadow = cover(x + LIGHT[0] * away, y + LIGHT[1] * away, 5)
    lit = 1.0 + 0.22 * (x * LIGHT[0] + y * LIGHT[1])
    outline = (0.5 + (distance + 0.1) * pixels / 1.5).clamp(0, 1)
    tone = lit * (1 - 0.5 * outline) * (0.6 + 0.4 * _texture(*turned(x, y), pixels, scenes.texture))
    there = _look_up(scenes.present)
    return _Shapes(covered * there, shadow * there, tone)


def _motion(scenes: Scenes, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute x, y and the angle of every shape in every frame, `(B, K, F, 1, 1)` each."""
    device = time.device
    across, down = _towards(MOTIONS, "left", "right", device), _towards(MOTIONS, "up", "down", device)
    bounces, spins = _towards(MOTIONS, "", "bouncing", device), _towards(MOTIONS, "", "spinning", device)
    way = scenes.speed[..., None] * time  # (B, K, F)
    jump = 22 * torch.sin(math.pi * (way / 30 + scenes.phase[..., None])).abs()
    x = scenes.position[..., :1] + across[scenes.motion][..., None] * way
    y = scenes.position[..., 1:] + down[scenes.motion][..., None] * way - bounces[scenes.motion][..., None] * jump
    turn = scenes.angle[..., None] + spins[scenes.motion][..., None] * way / 20
    return x[..., None, None], y[..., None, None], turn[..., None, None]


def _texture(x: Tensor, y: Tensor, pixels: Tensor, index: Tensor) -> Tensor:
    """Compute the brightness of the shapes' textures, `(B, K, F, H, W)` in [0, 1], at coordinates in radii."""
    u, v = PERIODS * x, PERIODS * y
    edge = pixels / (PERIODS * math.pi)
    values = {"plain": torch.ones_like(u), "striped": _wave(u), "checkered": _wave(u) * _wave(v)}
    values["dotted"] = 0.9 - _wave(u + 0.25) - _wave(v + 0.25)
    return _choose([_threshold(values[name], edge) for name in TEXTURES], index)


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Compute the signed distance to a star of five points: one sector of 36 degrees, mirrored ten times."""
    sector = math.pi / 5
    angle = torch.atan2(x, -y)
    angle = torch.remainder(angle + sector, 2 * sector) - sector
    length = torch.hypot(x, y)
    across, along = length * angle.sin().abs(), length * angle.cos()
    # The edge runs from the point at (0, 1.1) to the notch at half that radius.
    edge_x, edge_y = 0.55 * math.sin(sector), 0.55 * math.cos(sector) - 1.1
    return (across * -edge_y + (along - 1.1) * edge_x) / math.hypot(edge_x, edge_y)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    """Compute the signed distance to a cross of two bars."""
    x, y = x.abs(), y.abs()
    return torch.minimum(torch.maximum(x - 0.95, y - 0.34), torch.maximum(x - 0.34, y - 0.95))


_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": lambda x, y: torch.hypot(x, y) - 0.95,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.82,
    "triangle": lambda x, y: torch.maximum(0.866 * x.abs() - 0.5 * y, y) - 0.52,
    "star": _star,
    "ring": lambda x, y: (torch.hypot(x, y) - 0.7).abs() - 0.26,
    "cross": _cross,
}
"""Shape -> signed distance to its edge from (x, y), all in radii; negative inside."""


def _wave(turns: Tensor) -> Tensor:
    """Compute a sine of period 1."""
    return torch.sin(2 * math.pi * turns)


def _threshold(value: Tensor, edge: Tensor) -> Tensor:
    """Return 1 where the value is above zero and 0 below, with a soft edge of about one pixel."""
    return (0.5 + value * edge / 2).clamp(0, 1)


def _palette(device: torch.device) -> Tensor:
    """Return all colours, `(C, 3)`."""
    return torch.tensor(list(COLOURS.values()), device=device)


def _towards(names: tuple[str, ...], negative: str, positive: str, device: torch.device) -> Tensor:
    """Return for each name 1 if its last word is `positive`, -1 if it is `negative`, else 0."""
    words = [name.split()[-1] for name in names]
    return torch.tensor([float(word == positive) - float(word == negative) for word in words], device=device)


def _choose(options: list[Tensor], index: Tensor) -> Tensor:
    """Choose for every clip or shape the option with its index."""
    index = index[..., None, None, None]
    chosen = options[0]
    for number, option in enumerate(options[1:], start=1):
        chosen = torch.where(index == number, option, chosen)
    return chosen


def _look_up(values: Tensor) -> Tensor:
    """Append three dimensions to `(B, ...)`, to broadcast it over pixels `(B, ..., F, H, W)`."""
    return values[..., None, None, None]

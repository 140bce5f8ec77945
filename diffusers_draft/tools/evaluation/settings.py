"""Settings of a study: options of draft attention, and the scores that choose the blocks."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ...attention.method import format_tile, parse_tile
from ...config import DraftConfig, parse_layers, parse_share
from .selection import SELECTIONS

ALWAYS_NAMED = ("sparsity", "schedule", "score", "probes", "budget", "tile")
"""Options that a setting's name always shows, because defaults may change after a study was recorded."""


@dataclass(frozen=True)
class Setting:
    """Options of a run with draft attention.

    Attributes:
        config: options of draft attention.
        selection: scores that choose the blocks, a key of `SELECTIONS`; all but `"draft"` are baselines.
    """

    config: DraftConfig = field(default_factory=DraftConfig)
    selection: str = "draft"

    @property
    def options(self) -> dict[str, Any]:
        """All options by name, as JSON values."""
        values = dataclasses.asdict(self.config) | {"selection": self.selection}
        return {name: _plain(values[name]) for name in PARSERS}

    @property
    def name(self) -> str:
        """The method and all options that are not the default, in the form that `parse_setting` reads."""
        defaults = Setting().options
        shown = {k: v for k, v in self.options.items() if v is not None and (k in ALWAYS_NAMED or v != defaults[k])}
        return ",".join(f"{key}={_text(key, value)}" for key, value in shown.items())


def _number(text: str, kind: Callable[[str], float] = float) -> float:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"expected a {'whole number' if kind is int else 'number'}") from None


def _selection(text: str) -> str:
    if text not in SELECTIONS:
        raise ValueError(f"expected one of {', '.join(SELECTIONS)}")
    return text


PARSERS: dict[str, Callable[[str], Any]] = {
    "sparsity": _number,
    "max_error": _number,
    "schedule": str,
    "score": str,
    "probes": functools.partial(_number, kind=int),
    "budget": str,
    "tile": parse_tile,
    "dense_steps": parse_share,
    "dense_timestep": _number,
    "dense_layers": parse_layers,
    "backend": str,
    "selection": _selection,
}
"""Option -> function that reads its text: `8x16` is a tile, `0+1` are layers and `none` is no layer."""


def parse_setting(text: str) -> Setting:
    """Read a setting such as `"sparsity=0.9,budget=row,tile=8x16"`; other options keep their defaults.

    Raises:
        ValueError: for an unknown option, one that is given twice, or a wrong value.
    """
    options: dict[str, Any] = {}
    for item in text.split(","):
        key, value = (part.strip() for part in item.partition("=")[::2])
        if key in options:
            raise ValueError(f"{key} is given twice in the setting {text!r}.")
        options[key] = parse_value(key, value)
    return _setting(options)


def parse_value(key: str, text: str) -> Any:
    """Read the value of one option.

    Raises:
        ValueError: for an unknown option or a value that cannot be read.
    """
    if key not in PARSERS:
        raise ValueError(f"Unknown option {key!r} in a setting. Known are {', '.join(PARSERS)}.")
    try:
        return PARSERS[key](text)
    except ValueError as error:
        raise ValueError(f"{key} cannot be {text!r}: {error}.") from error


def grid(**values: Iterable[Any]) -> list[Setting]:
    """List the settings of every combination of the values given for each option.

    Raises:
        ValueError: for a wrong value.
    """
    names = list(values)
    return [_setting(dict(zip(names, chosen, strict=True))) for chosen in itertools.product(*values.values())]


def _setting(options: dict[str, Any]) -> Setting:
    selection = options.pop("selection", "draft")
    return Setting(DraftConfig(**options), selection)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _text(key: str, value: Any) -> str:
    if key == "tile":
        return format_tile(value)
    if key == "dense_layers":
        return "+".join(map(str, value)) or "none"
    if key == "dense_steps" and value == 1:
        return "1.0"  # a 1 would be read as one step
    return f"{value:g}" if isinstance(value, float) else str(value)

"""Types of options that argparse does not have: numbers with limits, and a device that works here."""

import argparse
import math
from collections.abc import Callable

import torch

from ..config import parse_layers, parse_share

DEFAULT = "default: %(default)s"
"""For help texts: argparse fills it in."""


def whole(least: int) -> Callable[[str], int]:
    """Make a type of whole numbers from `least` on."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} on, got {text!r}")
        return number

    return read


def seconds(text: str) -> float:
    """Read a time that is longer than nothing."""
    return _above_zero(text, "a number of seconds")


def rate(text: str) -> float:
    """Read frames per second."""
    return _above_zero(text, "a number of frames per second")


def _above_zero(text: str, what: str) -> float:
    number = _number(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be {what} above 0, got {text!r}")
    return number


def finite(text: str) -> float:
    """Read a number that is neither infinite nor NaN."""
    number = _number(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def share(text: str) -> float:
    """Read a share of a run, as `parse_share` does."""
    try:
        return parse_share(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a share of the run in [0, 1], as 0.25, got {text!r}") from error


def layers(text: str) -> tuple[int, ...]:
    """Read layer indices, as `parse_layers` does."""
    try:
        return parse_layers(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, got {text!r}") from error


def seed(text: str) -> int:
    """Read a seed of torch's generators."""
    number = whole(0)(text)
    if number >= 1 << 63:
        raise argparse.ArgumentTypeError(f"must be below 2^63, got {text!r}")
    return number


def device(text: str) -> torch.device:
    """Read a device, try it and make it the current one, on which kernels run."""
    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).split("\n")[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {reason}") from error
    found = torch.device(text)
    if found.index is not None and found.type != "cpu":
        torch.accelerator.set_device_index(found.index)
    return found

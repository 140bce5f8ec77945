"""Types of options that argparse does not have: numbers with a least value, and a device that works here."""

import argparse
import math
from collections.abc import Callable

import torch


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
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return number


def device(text: str) -> torch.device:
    """Read a device and try it."""
    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).split("\n")[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {reason}") from error
    return torch.device(text)

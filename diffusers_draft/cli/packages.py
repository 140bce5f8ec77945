"""The check that the packages of an extra are there. It imports none of them, and not diffusers."""

from importlib.util import find_spec

from . import CommandError


def check_packages(extra: str, *packages: str) -> None:
    """Raise CommandError if a package is missing; the message names the extra that installs it."""
    if missing := [package for package in packages if find_spec(package) is None]:
        raise CommandError(f"{', '.join(missing)} is not installed: pip install 'diffusers-draft[{extra}]'")

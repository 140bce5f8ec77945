"""The table of families, for people."""

import math

from . import Family, families


def models_table() -> str:
    """Markdown: one row for each transformer class."""
    lines = [
        "| Family | transformer | pipelines | sparse layers | text and other tokens | dense by default | notes |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_row(cls, family) for cls, family in families().items()]
    return "\n".join(lines)


def _row(cls: str, family: Family) -> str:
    pipelines, layers = (", ".join(map("`{}`".format, names)) for names in (family.pipelines, family.layers))
    return f"| {family.name} | `{cls}` | {pipelines} | {layers} | {family.text} | {_dense(family)} | {family.notes} |"


def _dense(family: Family) -> str:
    steps = [] if math.isinf(family.dense_timestep) else [f"timestep > {family.dense_timestep:g}"]
    steps += [] if family.dense_steps is None else [f"first {family.dense_steps:.0%} of the steps"]
    return "; ".join([*steps, *map("`{}`".format, family.dense_layers)])

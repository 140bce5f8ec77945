"""A pytest plug-in that runs diffusers' own model tests with draft attention enabled at sparsity 0 in every model.

From a checkout of diffusers, whose tests are not in its wheel:

    PYTHONPATH=path/to/this/folder pytest -p upstream_plugin tests/models/transformers/test_models_transformer_ltx.py
"""

import functools
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
from paper import enable_draft_attention

from diffusers_draft import DraftHandle
from diffusers_draft.families import families

handles: list[DraftHandle] = []


def enabling(init: Any) -> Any:
    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        handles.append(enable_draft_attention(self, sparsity=0, dense_layers=(), dense_steps=0))

    return __init__


@pytest.fixture(autouse=True, scope="session")
def every_model_enabled() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in families():
            if cls := getattr(diffusers, name, None):
                patch.setattr(cls, "__init__", enabling(cls.__init__))
        yield


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [handle.report().transformers[0] for handle in handles]
    forwards = sum(report.forwards["sparse"] for report in reports)
    masked = sum(report.dense_calls["mask"] for report in reports)
    terminalreporter.write_line(
        f"draft attention: {len(handles)} models, {forwards} sparse forwards, {masked} calls dense because of a mask"
    )

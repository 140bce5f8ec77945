from pathlib import Path

import pytest

from diffusers_draft.cli import main
from diffusers_draft.families import families
from diffusers_draft.tools.catalogue import models_table


def test_models_prints_a_row_for_every_class(capsys: pytest.CaptureFixture[str]) -> None:
    main(["models"])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[1] for row in rows] == [f"`{name}`" for name in families()]
    assert {row.count(" | ") for row in rows} == {6}


def test_the_page_of_models_shows_the_table() -> None:
    root = Path(__file__).parents[2]
    assert models_table() in (root / "docs" / "models.md").read_text()

"""The pages keep their word: snippets run, commands parse, links resolve, and every test that is named exists."""

import ast
import dataclasses
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import checkpoints
import models
import pytest
import torch
from diffusers import WanPipeline

from diffusers_draft import DraftConfig, cli, enable_draft_attention
from diffusers_draft.families import families

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FENCE = re.compile(r"^```(?P<language>.*)\n(?P<text>(?:.*\n)*?)^```$", re.MULTILINE)

IN_TWO_PROCESSES = "init_process_group"
"""What a snippet holds that is started with torchrun."""


class Snippet(NamedTuple):
    page: Path
    line: int
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.line}"


def fences(page: Path, language: str) -> list[Snippet]:
    """The blocks of code of a page, by the first line of each."""
    text = page.read_text()
    found = [match for match in FENCE.finditer(text) if match["language"] == language]
    return [Snippet(page, text[: match.start("text")].count("\n") + 1, match["text"]) for match in found]


SNIPPETS = [snippet for page in PAGES for snippet in fences(page, "python")]


# What snippets take as given


class SmallPipeline(WanPipeline):
    """Makes small videos in few steps unless it is told otherwise, and offloads to where it runs."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        small = dict(height=192, width=256, num_frames=9, num_inference_steps=3)  # four blocks and a half
        return super().__call__(*args, **small | options)

    def enable_model_cpu_offload(self, gpu_id: Any = None, device: Any = "cpu") -> None:
        super().enable_model_cpu_offload(gpu_id, device)


def small_pipeline(given: dict[str, Any]) -> SmallPipeline:
    parts = dict(tokenizer=checkpoints.tokenizer(), text_encoder=checkpoints.text_encoder())
    pipe = SmallPipeline(**models.wan_pipeline().components | parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def handle_after_a_run(given: dict[str, Any]) -> Any:
    pipe = given["pipe"] = small_pipeline(given)  # a handle keeps no pipeline alive
    handle = enable_draft_attention(pipe, 0.8)
    pipe("a red circle")
    assert handle.report().transformers[0].density < 1
    return handle


GRID = (3, 13, 17)


def tokens(given: dict[str, Any]) -> torch.Tensor:
    return models.random(2, math.prod(GRID), 2, 16)


GIVEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "pipe": small_pipeline,
    "prompt": lambda given: "a red circle moves left",
    "handle": handle_after_a_run,
    "transformer": lambda given: models.wan(),
    "inputs": lambda given: models.wan_inputs(),
    "target": lambda given: torch.zeros_like(models.wan_inputs()["hidden_states"]),
    "device": lambda given: torch.device("cpu"),
    "folder": lambda given: given["tmp_path"] / "model",
    "query": tokens,
    "key": tokens,
    "value": tokens,
    "frames": lambda given: GRID[0],
    "rows": lambda given: GRID[1],
    "columns": lambda given: GRID[2],
}
"""Names that a snippet may use without making them -> what makes them."""


def imports_before(snippet: Snippet) -> ast.Module:
    """What the snippets in front of it on its page import."""
    before = [other for other in SNIPPETS if other.page == snippet.page and other.line < snippet.line]
    lines = [node for other in before for node in ast.parse(other.text).body]
    return ast.Module([node for node in lines if isinstance(node, (ast.Import, ast.ImportFrom))], [])


@pytest.fixture
def eager_compile(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`torch.compile` traces, and generates no code."""
    stock = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: stock(*args, **{"backend": "eager"} | options))
    yield
    torch._dynamo.reset()


def run(snippet: Snippet, folder: Path) -> dict[str, Any]:
    """Run a snippet, and return the names that it was given and those that it made."""
    names: dict[str, Any] = {}
    exec(compile(imports_before(snippet), snippet.name, "exec"), names)
    found = [node for node in ast.walk(ast.parse(snippet.text)) if isinstance(node, ast.Name)]
    made = {node.id for node in found if isinstance(node.ctx, ast.Store)}
    given: dict[str, Any] = {"tmp_path": folder}
    for name in GIVEN.keys() & {node.id for node in found} - made:
        given.setdefault(name, GIVEN[name](given))
    names |= given
    code = "\n" * (snippet.line - 1) + snippet.text  # errors name the line of the page
    exec(compile(code, str(snippet.page), "exec"), names)
    return names


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[snippet.name for snippet in SNIPPETS])
def test_snippet(snippet: Snippet, tmp_path: Path, eager_compile: None) -> None:
    if IN_TWO_PROCESSES not in snippet.text:
        run(snippet, tmp_path)
        return
    script = tmp_path / "script.py"
    lines = [
        "import pathlib, test_docs",
        f"snippet = next(s for s in test_docs.SNIPPETS if s.name == {snippet.name!r})",
        f"pipe = test_docs.run(snippet, pathlib.Path({str(tmp_path)!r}))['pipe']",
        "with test_docs.enable_draft_attention(pipe) as handle:",
        "    pipe('a red circle')",
        "    assert handle.report().transformers[0].density < 1",
        "test_docs.torch.distributed.destroy_process_group()",
    ]
    script.write_text("\n".join(lines))
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    of_a_cpu = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, check=True, env=os.environ | of_a_cpu, timeout=250)


COMMAND = re.compile(r"(?:diffusers-draft|-m diffusers_draft) (.*)")
COMMANDS = [
    (snippet.name, match[1])
    for page in PAGES
    for snippet in fences(page, "")
    for match in COMMAND.finditer(snippet.text.replace("\\\n", " "))
    if "..." not in match[1]
]


@pytest.mark.parametrize(("where", "command"), COMMANDS, ids=[f"{where} {text[:12]}" for where, text in COMMANDS])
def test_command_parses(where: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    parse = cli._Parser.parse_args

    def parse_only(parser: Any, argv: list[str]) -> Any:
        options = parse(parser, argv)
        options.run = ran.append
        return options

    monkeypatch.setattr(cli._Parser, "parse_args", parse_only)
    assert cli.main(shlex.split(command, comments=True)) == 0
    assert len(ran) == 1


STUDY = re.compile(r"`python docs/results/(\w+)\.py([^`]*)`")


@pytest.mark.parametrize("page", PAGES + NOTEBOOKS, ids=lambda page: page.name)
def test_studies_are_named_with_the_option_that_they_need(page: Path) -> None:
    for name, options in STUDY.findall(words(page)):
        script = (ROOT / "docs" / "results" / f"{name}.py").read_text()
        assert ("study(" in script) == ("--output" in options), name


# Links, tests that are named, and what is written twice

LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s#]*)(?:#([^)\s]*))?\)")


def words(path: Path) -> str:
    """What a page says, or a notebook in its own words."""
    if path.suffix == ".md":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def anchors(text: str) -> set[str]:
    """The names of its headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    for path, anchor in LINK.findall(FENCE.sub("", words(page))):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(words(target)), f"{path}#{anchor}"


def test_there_are_links() -> None:
    assert sum(len(LINK.findall(words(page))) for page in PAGES) > 60


TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_are_named_exist(page: Path) -> None:
    for path, name in TEST.findall(page.read_text()):
        functions = {node.name for node in ast.parse((ROOT / path).read_text()).body if hasattr(node, "name")}
        assert not name or name in functions, f"{path}::{name}"


@pytest.mark.parametrize("name", ["together.md", "gpus.md"])
def test_every_claim_names_its_tests(name: str) -> None:
    _, *tables = (ROOT / "docs" / name).read_text().split("| What | Tests |\n|---|---|\n")
    rows = [row for table in tables for row in table.partition("\n\n")[0].splitlines()]
    assert len(rows) > 5
    for row in rows:
        assert TEST.search(row), row


def test_the_page_of_options_has_them_all_with_their_defaults() -> None:
    table = (ROOT / "docs" / "options.md").read_text().partition("| Option | Default | Meaning |\n|---|---|---|\n")[2]
    rows = [row.split(" | ")[:2] for row in table.partition("\n\n")[0].splitlines()]
    found = {name.strip("| `"): default.strip("`").replace('"', "'") for name, default in rows}
    assert found == {
        field.name: "none" if field.default is None else repr(field.default)
        for field in dataclasses.fields(DraftConfig)
    }


def test_the_page_of_the_report_shows_that_of_the_quickstart() -> None:
    (shown,) = (snippet.text for snippet in fences(ROOT / "docs" / "report.md", "") if "density" in snippet.text)
    cells = json.loads((ROOT / "notebooks" / "1-quickstart.ipynb").read_text())["cells"]
    printed = ["".join(out.get("text", "")) for cell in cells for out in cell.get("outputs", [])]
    assert shown in printed


def test_readme_is_short_and_names_every_family() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 130 and len(readme.split()) <= 1000
    for family in families().values():
        assert f"| {family.name} |" in readme


def test_readme_shows_the_report_that_its_page_explains() -> None:
    (shown,) = (snippet.text for snippet in fences(ROOT / "docs" / "report.md", "") if "density" in snippet.text)
    assert f"```\n{shown}```" in (ROOT / "README.md").read_text()


def test_hooks_before_a_commit_have_the_versions_of_the_tests() -> None:
    ruff = re.compile(r'"(ruff==[^"]+)"')
    wanted = set(ruff.findall((ROOT / "pyproject.toml").read_text()))
    assert len(wanted) == 1
    assert set(ruff.findall((ROOT / ".pre-commit-config.yaml").read_text())) == wanted

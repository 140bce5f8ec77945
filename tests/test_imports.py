import ast
import subprocess
import sys
from pathlib import Path

import pytest

import diffusers_draft

PACKAGE = Path(diffusers_draft.__file__).parent
MAY_IMPORT = {
    "attention": {"attention"},
    "families": {"families", "attention.layout"},
    "patching": {"patching", "families", "attention", "config", "schedules"},
    "schedules": set(),
    "config": {"attention", "schedules"},
    "api": {"patching", "families", "attention", "config"},
}
"""What each wing may import of the package. `tools` and `cli` may import anything, and nobody imports them."""

NEEDS = {
    "attention": {"torch"},
    "attention.kernels": {"torch", "triton", "flash_attn", "block_sparse_attn"},
    "attention.steps": {"torch", "triton"},
    "config": set(),
    "schedules": set(),
    "families": {"torch", "diffusers"},
    "patching": {"torch", "diffusers"},
    "api": {"torch", "diffusers"},
}
"""Other packages of each wing, besides the standard library."""


def modules() -> dict[str, Path]:
    """Every file of the package by its module name inside the package; the package itself is ""."""
    paths = sorted(PACKAGE.rglob("*.py"))
    names = [path.relative_to(PACKAGE).with_suffix("").parts for path in paths]
    return {
        ".".join(name[:-1] if name[-1] == "__init__" else name): path for name, path in zip(names, paths, strict=True)
    }


MODULES = modules()
CORE = [name for name in MODULES if name and name.split(".")[0] not in ("__main__", "cli", "tools")]


def imports(name: str, source: str | None = None) -> tuple[set[str], set[str]]:
    """The modules of the package that a module imports, anywhere in its code, and the other packages."""
    source = MODULES[name].read_text() if source is None else source
    inside, outside = set(), set()

    def add(module: str) -> None:
        package, _, rest = module.partition(".")
        if package != "diffusers_draft":
            outside.add(package)
        else:
            inside.add(rest)

    parents = ["diffusers_draft", *name.split(".")] if name else ["diffusers_draft"]
    if MODULES[name].name != "__init__.py":
        parents = parents[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{module}.{alias.name}"
                add(submodule if submodule.partition(".")[2] in MODULES else module)
    return inside - {name}, outside


def test_the_reader_of_imports_sees_every_form():
    source = """
import torch.nn
from . import probe, names
from .flex import forward
from .. import layout
from ..select import select
from diffusers_draft.attention.draft import block_means
def later():
    from diffusers.models import attention
"""
    names = ("kernels.probe", "kernels.flex", "layout", "select", "draft")
    inside = {f"attention.{name}" for name in names}
    assert imports("attention.kernels.reference", source) == (inside | {"attention.kernels"}, {"torch", "diffusers"})
    assert imports("attention.kernels", source) == (inside, {"torch", "diffusers"})


@pytest.mark.parametrize("name", CORE)
def test_nobody_imports_upwards(name):
    allowed = MAY_IMPORT[name.split(".")[0]]
    assert [
        module for module in imports(name)[0] if not f"{module}.".startswith(tuple(f"{a}." for a in allowed))
    ] == []


@pytest.mark.parametrize("name", CORE)
def test_a_wing_needs_few_packages(name):
    wing = max((wing for wing in NEEDS if f"{name}.".startswith(f"{wing}.")), key=len)
    assert imports(name)[1] - NEEDS[wing] - sys.stdlib_module_names == set()


def test_there_are_no_utils():
    assert not {"utils", "util", "common", "helpers", "misc"} & {part for name in MODULES for part in name.split(".")}


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_the_package_imports_no_models():
    loaded = run("import sys, diffusers_draft; diffusers_draft.DraftHandle; print(*sys.modules)").split()
    assert "diffusers_draft.attention.call" in loaded
    assert [name for name in loaded if name.startswith(("diffusers.models", "diffusers.pipelines"))] == []


def test_the_method_runs_where_there_is_no_diffusers():
    code = """
import sys
for name in ("diffusers", "accelerate", "transformers", "numpy"):
    sys.modules[name] = None
import diffusers_draft, torch
tokens = torch.randn(1, 3 * 13 * 17 + 5, 2, 16)
out = diffusers_draft.draft_attention(tokens, tokens, tokens, grid=(3, 13, 17), sparsity=0.5)
print(out.shape == tokens.shape, diffusers_draft.DraftConfig(sparsity=0.5).sparsity)
try:
    diffusers_draft.enable_draft_attention
except ImportError as error:
    print("diffusers" in str(error))
"""
    assert run(code).split() == ["True", "0.5", "True"]


def test_importing_the_package_patches_nothing():
    code = """
import sys
import torch
import diffusers.models.attention_dispatch
import diffusers.models.transformers.transformer_hunyuan_video
import diffusers.models.transformers.transformer_wan

def contents(module):
    found = {}
    for name, value in vars(module).items():
        if not isinstance(value, type(sys)):
            found[name] = id(value)
            if isinstance(value, type):
                found |= {f"{name}.{attribute}": id(member) for attribute, member in vars(value).items()}
    return found

watched = [module for name, module in sys.modules.items() if name.startswith("diffusers.models")]
watched += [torch, torch.nn, torch.nn.functional, torch.nn.Module]
before = [contents(module) for module in watched]
import diffusers_draft
print(len(watched), [str(module) for module, old in zip(watched, before) if contents(module) != old])
"""
    count, changed = run(code).split(maxsplit=1)
    assert int(count) > 20
    assert changed.strip() == "[]"

"""How Sphinx builds the pages of this folder: `make docs`."""

import shutil
from pathlib import Path
from typing import Any

import latex2mathml.converter
from docutils import nodes
from sphinx.application import Sphinx

import diffusers_draft

HERE = Path(__file__).parent
NOTEBOOKS = HERE / "notebooks"
"""Copies, ignored by git: Sphinx reads nothing outside of its folder."""

project = "diffusers-draft"
author = "the authors of diffusers-draft"
version = release = diffusers_draft.__version__
html_title = f"{project} {version}"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_copyright = False
html_math_renderer = "mathml"
highlight_language = "none"  # of blocks that name no language: commands and what they print
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "results"]

# Pages and notebooks. Outputs are those that the notebooks store; the tests run them.
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Docstrings have the words of Markdown: one backtick is code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
add_module_names = False
nitpicky = True
nitpick_ignore = [("py:class", "collections.abc.Iterable")]


def _bring_notebooks() -> None:
    NOTEBOOKS.mkdir(exist_ok=True)
    for path in sorted((HERE.parent / "notebooks").glob("*.ipynb")):
        copy = NOTEBOOKS / path.name
        if not copy.exists() or copy.read_bytes() != path.read_bytes():
            shutil.copyfile(path, copy)


def _write_formula(writer: Any, node: nodes.Element) -> None:
    """Write a formula as MathML, which browsers show without scripts from elsewhere."""
    formula = node.astext()
    if isinstance(node, nodes.math):
        writer.body.append(latex2mathml.converter.convert(formula))
    else:
        writer.body.append(f'<div class="formula">{latex2mathml.converter.convert(formula, display="block")}</div>')
    raise nodes.SkipNode


def _read_page(app: Sphinx, name: str, text: list[str]) -> None:
    """Turn links to files outside of this folder, as they are in the repository, into links to their pages."""
    for path, page in {"../notebooks/": "notebooks/", "../CONTRIBUTING.md": "contributing.md"}.items():
        text[0] = text[0].replace(f"]({path}", f"]({page}")


def setup(app: Sphinx) -> None:
    """Register how formulas are written and links are read."""
    app.connect("source-read", _read_page)
    app.add_html_math_renderer("mathml", (_write_formula, None), (_write_formula, None))


_bring_notebooks()

"""Every notebook runs from top to bottom in this interpreter, on very small sizes, and stores its outputs."""

import json
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


@pytest.fixture
def kernel_manager(tmp_path):
    """Starts kernels in the interpreter that runs the tests, whatever kernels are installed elsewhere."""
    spec = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "this"}
    (tmp_path / "this").mkdir()
    (tmp_path / "this" / "kernel.json").write_text(json.dumps(spec))
    specs = KernelSpecManager(kernel_dirs=[str(tmp_path)])
    return AsyncKernelManager(kernel_name="this", kernel_spec_manager=specs)


def test_notebook_runs(notebook, kernel_manager, monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFUSERS_DRAFT_SMOKE", "1")
    # A package that is not installed is found where the tests found it.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "docs").symlink_to(ROOT / "docs")  # records that a notebook reads; what it writes goes nowhere else
    resources = {"metadata": {"path": str(tmp_path / "notebooks")}}
    NotebookClient(notebook, km=kernel_manager, timeout=240, resources=resources).execute()
    assert all(cell.execution_count for cell in code_cells(notebook))
    assert code_cells(notebook)[-1].outputs[0].data["text/plain"] == "True"


def test_stored_outputs_come_from_one_run_without_errors(notebook):
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]

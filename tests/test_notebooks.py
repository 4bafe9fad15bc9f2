# SPDX-License-Identifier: Apache-2.0
"""The tutorials: what is committed is whole, and (pytest -m notebook) each of them runs from a clean kernel."""

import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


_FOLDER = Path(__file__).parents[1] / "notebooks"
_NOTEBOOKS = sorted(_FOLDER.glob("*.ipynb"))

_WIDGET = "application/vnd.jupyter.widget-view+json"

# bitsandbytes, in the `dev` extra for its 8-bit optimizers, says so when it is imported on some CPUs.
_NOT_OURS = ("gemm_4bit_forward", "pip install kernels")


def _outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def _complaints(notebook):
    """List the lines on stderr, where all warnings go."""
    text = "".join(output.text for output in _outputs(notebook) if output.get("name") == "stderr")
    return [line for line in text.splitlines() if line.strip() and not any(part in line for part in _NOT_OURS)]


@pytest.mark.parametrize("path", _NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_was_run_whole_and_shows_no_warnings_nor_this_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it from top to bottom"
    assert not [output for output in _outputs(notebook) if output.output_type == "error"]
    assert not _complaints(notebook)
    assert any("image/png" in output.get("data", {}) for output in _outputs(notebook)), "a figure is rendered"
    text = path.read_text(encoding="utf-8")
    assert _WIDGET not in text, "a progress bar, say, which is blank in the saved file"
    assert not re.search(r"/(tmp|root|home|Users|work)/", text), "a path of the machine that it was run on"
    assert len(text) < 500_000
    assert f"colab.research.google.com/github/hf-aace/hf_aace/blob/main/notebooks/{path.name}" in text


def test_table_of_contents_and_links_between_notebooks_are_right():
    contents = (_FOLDER / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in _NOTEBOOKS} == set(re.findall(r"\]\((\w+\.ipynb)\)", contents))
    for path in _NOTEBOOKS:
        links = re.findall(r"\]\(([\w./-]+\.(?:ipynb|md|py|sh|csv))\)", path.read_text(encoding="utf-8"))
        assert [link for link in links if not (_FOLDER / link).exists()] == []


@pytest.mark.notebook
@pytest.mark.parametrize("path", _NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_from_a_clean_kernel_without_warnings_or_traces(path, tmp_path, monkeypatch):
    source = str(_FOLDER.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))  # for hf-aace
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    # The working directory is that of the kernel: a notebook that writes where it lies would write there.
    shutil.copytree(_FOLDER / "study", tmp_path / "study")
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert not _complaints(notebook)
    assert not [output for output in _outputs(notebook) if _WIDGET in output.get("data", {})]
    assert [path.name for path in tmp_path.iterdir()] == ["study"]

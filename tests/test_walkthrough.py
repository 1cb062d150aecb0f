"""docs/walkthrough.ipynb: it executes from top to bottom with what this commit computes.

It takes minutes: NOTEBOOK=1 asks for it, as CI does.
"""

import json
import os
import shutil

import pytest
from conftest import ROOT, environment

NOTEBOOK = ROOT / "docs" / "walkthrough.ipynb"


def test_it_is_stored_with_its_outputs_and_names_the_paper():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code)
    shown = [name for cell in code for out in cell["outputs"] for name in out.get("data", {})]
    assert shown.count("image/png") >= 4
    text = "".join("".join(cell["source"]) for cell in cells)
    for word in ("3.3.1", "3.3.2", "Sec. 3.4", "Eq. 1", "Eq. 2"):
        assert word in text
    assert text.count("*Exercise.*") >= 8


@pytest.mark.skipif("NOTEBOOK" not in os.environ, reason="minutes; NOTEBOOK=1 asks for it")
def test_it_executes(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    skipped = shutil.ignore_patterns("runs", ".*", "__pycache__", "tests", "assets")
    shutil.copytree(ROOT, tmp_path / "code", ignore=skipped)  # no models of earlier runs
    notebook = nbformat.read(NOTEBOOK, 4)
    where = {"metadata": {"path": str(tmp_path / "code" / "docs")}}
    client = nbclient.NotebookClient(notebook, timeout=900, resources=where)
    client.execute(env=environment())

"""docs/notebook.ipynb, cell by cell, in a Python of its own."""

import json
from pathlib import Path

import pytest
from cases.children import run_python

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "notebook.ipynb"


@pytest.mark.slow
def test_every_cell_runs(tmp_path):
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells)
    printed = run_python(code, DARKMATTER_CACHE=str(tmp_path)).stdout
    assert "SaeMeasurement('topk-256'" in printed
    assert "tokens: must be at least" in printed

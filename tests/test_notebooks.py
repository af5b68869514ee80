"""Every tutorial runs from top to bottom, and is committed with its outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.ipynb"))


def test_there_are_tutorials():
    assert [path.name for path in NOTEBOOKS] == [
        "ablation.ipynb",
        "conditions.ipynb",
        "drop_in.ipynb",
        "factors.ipynb",
        "memory.ipynb",
        "projection.ipynb",
        "query.ipynb",
        "reading.ipynb",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_tutorial_is_committed_executed_and_small(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert path.stat().st_size < 1_000_000


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_tutorial_runs(path, tmp_path):
    if path.stem == "memory":
        pytest.importorskip("annbatch", reason="counts on disk need the extra `large`")
    notebook = nbformat.read(path, as_version=4)
    trained = 0
    for cell in notebook.cells:
        # Fewer epochs: whether it runs does not need a model that fits, but some factors that other trainings confirm.
        trained += cell.source.count("max_epochs=250")
        cell.source = cell.source.replace("max_epochs=250", "max_epochs=40")
    assert trained > 0
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()

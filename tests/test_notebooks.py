"""Every tutorial runs from top to bottom, and is committed with its outputs."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from jupyter_core.utils import run_sync
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


@pytest.fixture(scope="module")
def kernel():
    """One kernel for all tutorials: imports, and the compilation of UMAP, take longer than a short training."""
    manager = NotebookClient(nbformat.v4.new_notebook()).create_kernel_manager()
    yield manager
    run_sync(manager.shutdown_kernel)(now=True)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_tutorial_runs(path, tmp_path, kernel):
    if path.stem == "memory":
        pytest.importorskip("annbatch", reason="counts on disk need the extra `large`")
    notebook = nbformat.read(path, as_version=4)
    # Fewer epochs: whether it runs does not need a model that fits, but in most some factors that other trainings confirm.
    n_epochs, trained = 10 if path.stem == "memory" else 40, 0
    for cell in notebook.cells:
        cell.source, n = re.subn(r"max_epochs=(50|250)\b", f"max_epochs={n_epochs}", cell.source)
        trained += n
    assert trained > 0
    # No variable and no figure of the one before.
    first = f"%reset -f\n%cd -q {tmp_path}\nimport matplotlib.pyplot\nmatplotlib.pyplot.close('all')\ndel matplotlib"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(first))
    # `projection` shows that torch is not imported.
    client = NotebookClient(notebook, km=None if path.stem == "projection" else kernel, timeout=600)
    client.execute()
    if client.kc is not None:
        client.kc.stop_channels()

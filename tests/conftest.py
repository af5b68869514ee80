from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import pytest

from tests import pairwise

# One thread: the models are small, and threads that wait for each other on a busy machine cost ten times as much. Set
# before numpy and torch are imported; torch itself is imported by the tests that need it, not here.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_addoption(parser):
    parser.addoption(
        "--grid", action="store_true", help="run all combinations of tests that are marked `grid`, and all examples"
    )


def pytest_configure(config):
    pairwise.is_full = config.getoption("--grid")


def pytest_collection_modifyitems(config, items):
    """Keep a sample of each test marked ``grid`` in which all pairs of values of two parameters occur.

    With ``grid(1)`` all values occur, not all pairs; with ``grid(0)`` the first combination is kept. Files with slow tests come
    first, so that processes that run in parallel end at about the same time.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)
    if config.getoption("--grid"):
        return
    grids = {}
    for item in items:
        if item.get_closest_marker("grid") is not None:
            grids.setdefault((item.parent.nodeid, item.originalname), []).append(item)
    left_out = set()
    for grid in grids.values():
        kept = pairwise.covering([axes_of(item.callspec) for item in grid], *grid[0].get_closest_marker("grid").args)
        left_out |= {item for at, item in enumerate(grid) if at not in kept}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def axes_of(callspec):
    """Values of the parameters of a test; the elements of a tuple or dictionary are parameters of their own."""
    axes = {}
    for name, value in callspec.params.items():
        if isinstance(value, tuple):
            axes |= {(name, at): repr(part) for at, part in enumerate(value)}
        elif isinstance(value, dict) and value:
            axes |= {(name, key): repr(part) for key, part in value.items()}
        else:
            axes[name, 0] = id(value)  # values need no equality; each is one object in all combinations
    return axes


@pytest.fixture(autouse=True)
def _seeded_and_quiet():
    """A seed for each test, one thread and no notices of Lightning, if torch and scvi-tools are there at all."""
    if (scvi := sys.modules.get("scvi")) is not None:
        scvi.settings.seed = 0
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)
        for name in (
            "lightning.pytorch",
            "lightning.pytorch.utilities.rank_zero",
            "lightning.pytorch.accelerators.cuda",
        ):
            logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real counts, which does not come with the package."""
    folder = os.environ.get("LDVAE_EXT_DATA")
    if not folder:
        pytest.skip("real counts are not here: LDVAE_EXT_DATA names no folder")
    return Path(folder)


@pytest.fixture(scope="session")
def pbmc_trained():
    """An LDVAE trained on the bundled example; tests must not change it."""
    import scvi

    from ldvae_ext import datasets
    from ldvae_ext.model import LDVAE

    adata = datasets.pbmc68k()
    LDVAE.setup_anndata(adata)
    scvi.settings.seed = 0
    model = LDVAE(adata)
    model.train(40, accelerator="cpu", enable_progress_bar=False, kl_warmup="auto", plan_kwargs={"lr": 5e-3})
    return model

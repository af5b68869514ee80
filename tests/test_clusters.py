"""Work on other processes: runs of an ensemble by an executor or dask, analysis of dask arrays by a dask cluster."""

from __future__ import annotations

import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from scipy import sparse

from ldvae_ext import tl
from ldvae_ext.core import rows
from ldvae_ext.model import LDVAE, Ensemble, fit_ensemble
from tests.helpers import counts, untrained

TRAINING = {"accelerator": "cpu", "check_val_every_n_epoch": None}
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Last batch will have a small size")]


@pytest.fixture(scope="module")
def cells():
    adata = counts(150, 30, 2)
    LDVAE.setup_anndata(adata, batch_key="batch")
    return adata


@pytest.fixture(scope="module")
def whole(cells):
    return fitted(cells)


@pytest.fixture(scope="module")
def pool():
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.fixture(scope="module")
def client():
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 2, "threads_per_worker": 2, "processes": True, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        yield client


def fitted(cells, **kwargs):
    options = {"n_latent": 3, "max_epochs": 3, "train_kwargs": TRAINING, "silent": True, **kwargs}
    return fit_ensemble(cells, 4, **options)


def assert_same(found, expected):
    assert found.seeds == expected.seeds
    pd.testing.assert_frame_equal(found.stats, expected.stats)
    for model, own in zip(found.models, expected.models, strict=True):
        pd.testing.assert_frame_equal(model.get_loadings(), own.get_loadings())
        pd.testing.assert_frame_equal(model.history["elbo_train"], own.history["elbo_train"])
        np.testing.assert_array_equal(model.train_indices, own.train_indices)


def test_an_executor_gives_the_runs_that_this_process_gives(cells, whole, pool, tmp_path):
    torch.manual_seed(7)
    found = fitted(cells, client=pool, folder=tmp_path)
    after = torch.rand(1)
    torch.manual_seed(7)
    assert after == torch.rand(1), "random states stay as they are"
    assert_same(found, whole)
    assert all(model.adata is cells for model in found.models)
    pd.testing.assert_frame_equal(Ensemble.load(tmp_path).stats, whole.stats)


def test_dask_gives_the_runs_that_this_process_gives(cells, whole, client):
    assert_same(fitted(cells, client=client), whole)


def test_threads_of_this_process_train_one_run_at_a_time(cells, whole):
    with ThreadPoolExecutor(2) as executor:
        assert_same(fitted(cells, client=executor), whole)


def mark(tmp_path, name):
    try:
        (tmp_path / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class Fail:
    """Fails in the first training of all processes."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, *_):
        if mark(self.folder, "failed"):
            msg = "no luck"
            raise RuntimeError(msg)


class Kill(Fail):
    """Kills the process of the first training."""

    def __call__(self, *_):
        if mark(self.folder, "killed"):
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_that_fails_in_a_process_is_left_out(cells, pool, tmp_path):
    options = {**TRAINING, "callbacks": [LambdaCallback(on_train_start=Fail(tmp_path))]}
    with pytest.warns(UserWarning, match="no luck"):
        found = fitted(cells, client=pool, train_kwargs=options)
    assert len(found.models) == 3
    assert sorted([*found.seeds, *found.failures]) == [0, 1, 2, 3]
    with pytest.raises(TypeError, match="wrong_name"):
        fitted(cells, client=pool, train_kwargs={**TRAINING, "wrong_name": 1})


def test_dask_repeats_the_run_of_a_worker_that_was_killed(cells, whole, client, tmp_path):
    options = {**TRAINING, "callbacks": [LambdaCallback(on_train_start=Kill(tmp_path))]}
    assert_same(fitted(cells, client=client, train_kwargs=options), whole)
    assert (tmp_path / "killed").exists()


def test_a_client_is_checked(cells):
    with pytest.raises(TypeError, match="with a method `submit`; got str"):
        fitted(cells, client="scheduler:8786")
    with ThreadPoolExecutor(1) as executor, pytest.raises(ValueError, match="either `client` or `n_jobs`"):
        fitted(cells, client=executor, n_jobs=2)


@pytest.fixture(scope="module")
def exported():
    adata = counts(150, 30, 2)
    untrained(adata).export_to_anndata()
    adata.obs["type"] = pd.Categorical(np.where(np.arange(150) % 3 == 0, "T", "CD4+/CD25 T"))
    return adata


TOOLS = {
    "ablate": lambda adata, _: tl.ablate(adata, chunk_size=20),
    "ablate by group": lambda adata, _: tl.ablate(adata, mode="group_mean", groupby="type", chunk_size=20),
    "ablate_genes": lambda adata, _: tl.ablate_genes(adata, chunk_size=20),
    "population_loadings": lambda adata, _: tl.population_loadings(adata, "type", chunk_size=20),
    "population_expression": lambda adata, _: tl.population_expression(adata, "type", chunk_size=20),
    "rank_factors_groups": lambda adata, _: tl.rank_factors_groups(adata, "type"),
    "project": lambda adata, reference: tl.project(adata, reference, chunk_size=20),
}


def arrays_of(value, name=""):
    """All numbers of a result, by name."""
    if isinstance(value, ad.AnnData):
        parts = {
            "obs": value.obs,
            "var": value.var,
            "uns": value.uns,
            "obsm": dict(value.obsm),
            "varm": dict(value.varm),
        }
        parts["layers"] = dict(value.layers)
        parts["X"] = None if hasattr(value.X, "compute") or sparse.issparse(value.X) else value.X
        return {key: each for part, own in parts.items() for key, each in arrays_of(own, part).items()}
    if isinstance(value, pd.DataFrame):
        return {f"{name}.{key}": value[key].to_numpy() for key in value if value[key].dtype.kind in "fiu"}
    if isinstance(value, dict):
        return {key: each for part, own in value.items() for key, each in arrays_of(own, f"{name}.{part}").items()}
    return {name: value} if isinstance(value, np.ndarray) and value.dtype.kind in "fiu" else {}


# The model is not trained.
@pytest.mark.filterwarnings("ignore:From these genes, the decoder of the reference does not give")
@pytest.mark.parametrize("tool", TOOLS)
def test_tools_read_dask_arrays_in_parts_by_a_cluster(exported, client, monkeypatch, tool):
    da = pytest.importorskip("dask.array")
    monkeypatch.setattr(rows, "READ_AHEAD_BYTES", 40 * 30 * 4)
    here, there = exported.copy(), exported.copy()
    lazy = da.from_array(exported.X.toarray(), chunks=(35, 30))
    there.X = lazy.map_blocks(sparse.csr_matrix, meta=sparse.csr_matrix((0, 30), dtype=np.float32))
    computed = []
    own = da.Array.compute

    def compute(self, **kwargs):
        computed.append(self.shape[0])
        return own(self, **kwargs)

    monkeypatch.setattr(da.Array, "compute", compute)
    started = client.run(lambda dask_worker: dask_worker.state.transition_counter)
    result, expected = TOOLS[tool](there, exported), TOOLS[tool](here, exported)
    found, wanted = (
        arrays_of(each)
        for each in (result if result is not None else there, expected if expected is not None else here)
    )
    assert found.keys() == wanted.keys()
    assert found
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
    assert hasattr(there.X, "compute"), "the counts stay where they are"
    if tool.startswith(("ablate", "project")):
        assert sum(computed) >= 150
        assert max(computed) <= 40, "no more than the rows that are read ahead"
        after = client.run(lambda dask_worker: dask_worker.state.transition_counter)
        assert all(after[worker] > started[worker] for worker in started), "both workers took part"
    else:
        assert computed == [], "it needs no counts"

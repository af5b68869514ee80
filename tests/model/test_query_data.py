"""Which queries can be mapped: data modules, other genes, what is refused."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
import pytest
import torch
from packaging.version import Version
from scipy import sparse
from scvi.model import LinearSCVI

from ldvae_ext.model import LDVAE
from tests.datamodule import CountsDataModule
from tests.query import (
    FAST,
    HARD,
    assert_same,
    cells,
    map_query,
    snapshot,
    trained,
)


@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`:UserWarning")
@pytest.mark.parametrize("reference_of", ["adata", "data module"])
def test_a_query_in_a_data_module(reference_of):
    adata = cells(["a"])
    reference = trained(adata)
    if reference_of == "data module":
        datamodule = CountsDataModule(adata)
        reference = LDVAE(datamodule=datamodule, n_latent=3)
        reference.train(2, **FAST, datamodule=datamodule)
    query = cells(["a", "new"], seed=1)
    datamodule = CountsDataModule(query)
    model = LDVAE.load_query_data(reference_model=reference, datamodule=datamodule)
    logs = np.log(np.asarray(query.X.sum(axis=1)).ravel()[query.obs["batch"] == "new"])
    np.testing.assert_allclose(model.module.library_log_means[0, 1], logs.mean(), rtol=1e-5)
    assert torch.equal(model.module.library_log_means[:, :1], reference.module.library_log_means)
    assert model.get_decoder().batches.tolist() == ["a", "new"]
    before, first = snapshot(model, 1), model.get_decoder()
    model.train(2, **FAST, plan_kwargs=HARD, datamodule=datamodule)
    assert_same(before, snapshot(model, 1))
    assert np.abs(model.get_decoder().intercept_bg[1] - first.intercept_bg[1]).max() > 0
    with pytest.raises(ValueError, match="must begin with the reference's"):
        LDVAE.load_query_data(reference_model=reference, registry=CountsDataModule(cells(["new"])).registry)


@pytest.mark.skipif(
    Version(version("anndata")) < Version("0.13"),
    reason="scvi-tools' `prepare_query_anndata` fails with anndata before 0.13 if the counts are in a layer",
)
@pytest.mark.parametrize("kind", ["csr_matrix", "csr_array", "csc_array", "dense"])
@pytest.mark.parametrize("cls", [LDVAE, LinearSCVI])
@pytest.mark.filterwarnings("ignore:Query data contains less than 80%:UserWarning")
def test_a_query_with_other_genes_is_prepared(kind, cls, tmp_path):
    adata = cells(["a"])
    adata.layers["counts"] = adata.X.copy()
    reference = trained(adata, cls=cls, setup={"layer": "counts"}, epochs=2)
    reference.save(tmp_path / "reference")
    query = cells(["new"], seed=1)[:, 5:]
    query = query[:, ::-1].copy()
    query.var_names = ["more", *query.var_names[1:]]
    dense = query.to_df()
    query.layers["counts"] = dense.to_numpy() if kind == "dense" else getattr(sparse, kind)(dense.to_numpy())
    query.X = None
    with pytest.raises(ValueError, match=r"lacks 6 of the 20 genes .*`prepare_query_anndata`"):
        map_query(reference, query)
    ready = LDVAE.prepare_query_anndata(query, tmp_path / "reference", inplace=False)
    assert LDVAE.prepare_query_anndata(query, reference) is None
    for each in (ready, query):
        model = map_query(reference, each)
        expected = dense.reindex(columns=adata.var_names, fill_value=0).to_numpy()
        values = model.adata_manager.get_from_registry("X")
        np.testing.assert_array_equal(values.toarray() if sparse.issparse(values) else values, expected)
    assert LDVAE.prepare_query_anndata(query, reference, return_reference_var_names=True).equals(adata.var_names)


def test_genes_are_cut_to_the_reference_s_when_asked():
    reference = trained(cells(["a"])[:, :6].copy(), epochs=2)
    query = cells(["new"], seed=1)[:, ::-1].copy()
    model = map_query(reference, query, inplace_subset_query_vars=True)
    assert query.var_names.tolist() == model.get_var_names().tolist() == [f"gene{i}" for i in range(6)]


def test_what_cannot_be_is_said_and_nothing_is_written():
    reference = trained(cells(["a", "b"]), epochs=2)

    def refuse(error, match, query=None, reference_model=reference, **kwargs):
        query = cells(["new"], seed=1) if query is None else query
        before = (query.obs.columns.tolist(), query.n_vars, list(query.uns))
        with pytest.raises(error, match=match):
            map_query(reference_model, query, **kwargs)
        assert before == (query.obs.columns.tolist(), query.n_vars, list(query.uns))

    refuse(ValueError, "transfer_batch=False.*'new'.*knows 'a', 'b'", transfer_batch=False)
    refuse(ValueError, "`freeze_classifier` must be True", freeze_classifier=False)
    refuse(TypeError, "must be an LDVAE.*NoneType", reference_model=None)
    refuse(ValueError, "either `adata`, or `registry`", registry=reference.registry)
    refuse(ValueError, "in another order", query=cells(["new"])[:, ::-1].copy())
    without = cells(["new"])
    del without.obs["batch"]
    refuse(KeyError, "'batch' is not a column", query=without)
    negative = cells(["new"])
    negative.X = -negative.X
    refuse(ValueError, "negative", query=negative)
    with pytest.raises(ValueError, match="either `adata`, or `registry`"):
        LDVAE.load_query_data(reference_model=reference)
    with pytest.raises(TypeError, match="must be an AnnData"):
        map_query(reference, "query.h5ad")


def test_the_caller_s_random_numbers_stay():
    reference, query = trained(cells(["a"]), epochs=2), cells(["new"], seed=1)
    query.X = sparse.csr_array(query.X)
    state = torch.get_rng_state()
    map_query(reference, query)
    assert torch.equal(state, torch.get_rng_state())

"""Other packages on what an export holds, and their results in ours."""

from __future__ import annotations

import re

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from sklearn.decomposition import NMF

import ldvae_ext
from ldvae_ext import datasets, get, pl, tl
from ldvae_ext.core import LinearDecoder
from ldvae_ext.model import LDVAE

MARKERS = {
    "B cell": ["CD79A", "CD79B", "MS4A1", "CD37", "HLA-DRA"],
    "T cell": ["CD3D", "CD3E", "IL32", "IL7R", "LTB"],
    "Monocyte": ["LYZ", "S100A8", "S100A9", "CST3", "FCN1", "AIF1"],
    "NK cell": ["GNLY", "NKG7", "GZMB", "GZMA", "CTSW", "PRF1"],
}


@pytest.fixture(scope="module")
def cells():
    """The bundled blood cells with the export of a short training."""
    adata = datasets.pbmc68k()
    ldvae_ext.run(adata, n_runs=1, n_latent=6, max_epochs=60, silent=True, umap=False)
    return adata


@pytest.mark.filterwarnings("ignore")
def test_decoupler_finds_cell_types_in_gene_scores(cells):
    decoupler = pytest.importorskip("decoupler", reason="in the dependency group test")
    network = pd.DataFrame([(name, gene, 1.0) for name, genes in MARKERS.items() for gene in genes])
    network.columns = ["source", "target", "weight"]
    scores = get.gene_scores(cells, kind="regression").T
    found, _ = decoupler.mt.ulm(scores, network, tmin=3)
    assert found.shape == (6, 4)
    # The factor on which a set scores highest separates the cells of that type best, or nearly so.
    labels = cells.obs["bulk_labels"].astype(str)
    for name, label in {"B cell": "CD19+ B", "NK cell": "CD56+ NK", "Monocyte": "CD14+ Monocyte"}.items():
        factor = found[name].idxmax()
        k = get.factors(cells).index.get_loc(factor)
        value = pd.Series(cells.obsm["X_ldvae"][:, k], index=labels.index)
        assert value[labels == label].mean() > value[labels != label].mean()


@pytest.mark.filterwarnings("ignore")
def test_scib_metrics_scores_the_ordered_latent(cells):
    scib_metrics = pytest.importorskip("scib_metrics", reason="in the dependency group interop")
    labels = pd.Categorical(cells.obs["bulk_labels"]).codes
    result = scib_metrics.nmi_ari_cluster_labels_kmeans(cells.obsm["X_ldvae"], labels)
    assert result["nmi"] > 0.4


@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.drop")
def test_scanpy_takes_the_export_as_embedding_scores_and_pca(cells):
    adata = cells.copy()
    sc.pp.neighbors(adata, use_rep="X_ldvae", n_pcs=4)
    assert adata.uns["neighbors"]["params"]["use_rep"] == "X_ldvae"
    sc.pl.embedding(adata, "ldvae", color="bulk_labels", show=False)
    sc.pl.ranking(adata, "varm", "ldvae_loadings", indices=[0, 1], show=False)
    frame = sc.get.obs_df(adata, obsm_keys=[("X_ldvae", 0)])
    np.testing.assert_array_equal(frame["X_ldvae-0"], adata.obsm["X_ldvae"][:, 0])
    tl.rank_factors_groups(adata, "bulk_labels")
    table = sc.get.rank_genes_groups_df(adata, "CD19+ B", key="rank_factors_groups")
    assert set(table["names"]) == set(get.factors(adata).index)


@pytest.mark.filterwarnings("ignore:From these genes, the decoder")
def test_an_export_keeps_to_the_rules_of_cellxgene_for_keys_and_embeddings(cells, tmp_path):
    """Rules of the CELLxGENE schema 5 that concern what an export adds; ontology terms are the author's."""
    adata = cells.copy()
    query = datasets.pbmc68k()
    tl.project(query, adata, key_added="projected")
    for each in (adata, query):
        for name, value in each.obsm.items():
            assert isinstance(value, np.ndarray)
            if name.startswith("X_"):
                assert re.fullmatch(r"X_[a-zA-Z][a-zA-Z0-9_.-]*", name)
                assert value.ndim == 2
                assert value.shape[1] >= 2
                assert value.dtype.kind == "f"
                assert np.isfinite(value).all()
        assert not [name for name, value in each.uns.items() if hasattr(value, "__len__") and len(value) == 0]
        assert not [column for column in (*each.obs, *each.var) if column.startswith("__")]
    query.write_h5ad(tmp_path / "query.h5ad")
    assert "projected" in ad.read_h5ad(tmp_path / "query.h5ad").uns


def test_the_spectra_of_an_nmf_are_read_as_a_decoder(tmp_path):
    """As cNMF's: their logarithm is a table of loadings."""
    adata, _ = datasets.simulate(400, 120, 4, kind="additive")
    spectra = NMF(4, init="nndsvda", max_iter=400, random_state=0).fit(adata.X.toarray()).components_
    table = pd.DataFrame(
        np.log(spectra + 1e-3 * spectra.max()).T, index=adata.var_names, columns=[f"program {k}" for k in range(4)]
    )
    decoder = LinearDecoder.from_loadings(table, counts=adata.X)
    result = tl.match_factors(decoder, decoder)
    assert result.pairs["cosine"].min() > 0.999
    pl.match(result, show=False)
    tl.project(adata, decoder)
    assert get.factors(adata).index.tolist() == table.columns.tolist()
    usage = adata.obsm["usage_true"]
    agreement = np.abs(np.corrcoef(adata.obsm["X_ldvae"], usage, rowvar=False)[:4, 4:])
    assert agreement.max(axis=0).min() > 0.6
    text = ldvae_ext.report(adata, tmp_path / "report.html").read_text()
    assert "program 0" in text


@pytest.mark.filterwarnings("ignore")
def test_autotune_tries_two_settings(tmp_path):
    pytest.importorskip("ray", reason="in the dependency group interop")
    from ray import tune
    from scvi.autotune import run_autotune

    adata = datasets.pbmc68k()[:200].copy()
    LDVAE.setup_anndata(adata)
    found = run_autotune(
        LDVAE,
        data=adata,
        mode="min",
        metrics="elbo_validation",
        search_space={"model_params": {"n_latent": tune.choice([3, 5])}, "train_params": {"max_epochs": 2}},
        num_samples=2,
        seed=0,
        scheduler="asha",
        searcher="random",
        logging_dir=str(tmp_path),
        resources={"cpu": 1},
    )
    assert len(found.result_grid) == 2
    assert not found.result_grid.errors


@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.drop")
@pytest.mark.parametrize("method", ["setup", "run"])
def test_mudata_is_refused_with_the_way_to_pass_its_rna(method):
    mudata = pytest.importorskip("mudata")
    data = mudata.MuData({"rna": datasets.pbmc68k()[:20].copy()})
    call = {"setup": LDVAE.setup_anndata, "run": ldvae_ext.run}[method]
    with pytest.raises(TypeError, match=r"pass one modality, such as `mdata\['rna'\]`"):
        call(data)

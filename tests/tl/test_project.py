"""Factors of a reference in other cells, against the model's own posteriors and against `core`."""

from __future__ import annotations

import subprocess
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from ldvae_ext import get, tl
from ldvae_ext.core import LinearDecoder, posterior_of
from ldvae_ext.core.likelihood import deviance
from tests.helpers import untrained
from tests.reference import covariate_counts, setup_arguments
from tests.rotated import oblique

KINDS = [
    {},
    {"gene_likelihood": "zinb"},
    {"gene_likelihood": "poisson", "covariates": "both"},
    {"latent_distribution": "ln"},
    {"dispersion": "gene-batch", "n_batches": 3},
    {"dispersion": "gene-label", "labels": True},
    {"dispersion": "gene-cell", "covariates": "categorical"},
    {"size_factor": True, "n_batches": 2},
]


def reference(n_cells=60, covariates="none", labels=False, size_factor=False, n_batches=1, **options):
    """A model that reads library sizes from the counts, and its exported cells."""
    adata = covariate_counts(n_cells=n_cells, n_batches=n_batches)
    setup = setup_arguments(covariates, size_factor=size_factor, labels=labels)
    if not size_factor:
        options["use_observed_lib_size"] = True
    model = untrained(adata, setup=setup, n_latent=3, **options)
    # The encoder of an untrained network knows nothing of its decoder.
    model.export_to_anndata(use_posterior="refined")
    return model, adata


def stripped(adata):
    """The counts and the columns of obs that are not an export's."""
    obs = adata.obs[[name for name in adata.obs if not name.startswith(("ldvae", "_scvi"))]]
    return ad.AnnData(adata.X.copy(), obs=obs.copy(), var=pd.DataFrame(index=adata.var_names))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())) or "default")
def test_posteriors_are_those_that_the_model_refines(kind):
    model, adata = reference(**kind)
    query = stripped(adata)
    tl.project(query, adata, size_factor_key="size" if kind.get("size_factor") else None)
    # From 0 and from the encoder's means, the same mode is found in these cells.
    expected, factors = model.get_refined_posterior(), get.factors(adata)
    latent = query.obsm["X_ldvae_u"] if kind.get("latent_distribution") == "ln" else query.obsm["X_ldvae"]
    np.testing.assert_allclose(latent, expected.mean[factors.index] * factors["sign"].to_numpy(), atol=2e-5)
    np.testing.assert_allclose(query.obsm["X_ldvae_var"], expected.variance[factors.index], atol=2e-5)
    assert query.obs["ldvae_converged"].all()
    np.testing.assert_allclose(query.obs["ldvae_library"], adata.obs["ldvae_library"], rtol=1e-6)
    assert get.factors(query).index.tolist() == factors.index.tolist()
    np.testing.assert_allclose(get.loadings(query), get.loadings(adata))
    if kind.get("latent_distribution") != "ln":
        np.testing.assert_array_equal(query.varm["ldvae_loadings_error"], adata.varm["ldvae_loadings_error"])
    # The decoder explains the cells at these latents as an export's does.
    effects = tl.ablate(query)
    assert np.isfinite(effects.X).all()
    assert effects.var_names.tolist() == factors.index.tolist()


def test_oblique_factors_have_their_prior_and_the_variances_of_the_network():
    model, adata = reference()
    model.rotation_ = {"matrix": oblique(3), "method": "promax"}
    model.export_to_anndata(use_posterior="refined")
    query = stripped(adata)
    tl.project(query, adata)
    expected, factors = model.get_refined_posterior(), get.factors(adata)
    np.testing.assert_allclose(
        query.obsm["X_ldvae"], expected.mean[factors.index] * factors["sign"].to_numpy(), atol=2e-5
    )
    np.testing.assert_allclose(query.obsm["X_ldvae_var"], expected.variance[factors.index], atol=2e-5)
    model.rotate("none")
    np.testing.assert_allclose(query.obsm["X_ldvae_network_var"], model.get_refined_posterior().variance, atol=2e-5)
    assert np.isfinite(tl.ablate(query, use_posterior="samples", n_samples=2).X).all()


@pytest.mark.filterwarnings("ignore:From these genes, the decoder")
def test_genes_are_matched_by_name_and_no_zeros_are_invented():
    _, adata = reference()
    query = stripped(adata)
    some = [17, 3, 9, 0, 12, 5, 8, 1, 14, 2]
    query = query[:, some].copy()
    extra = ad.AnnData(np.full((query.n_obs, 2), 7.0), obs=query.obs[[]], var=pd.DataFrame(index=["other", "another"]))
    query = ad.concat([extra, query], axis=1, merge="same")
    query.obs = adata.obs[["batch"]].copy()
    tl.project(query, adata)
    decoder = get.decoder(adata)
    genes = [gene for gene in decoder.genes if gene in query.var_names]
    found = posterior_of(decoder.with_genes(genes), adata[:, genes].X)
    np.testing.assert_allclose(query.obsm["X_ldvae"], found.mean_nk, atol=2e-5)
    np.testing.assert_array_equal(query.obs["ldvae_library"], np.asarray(adata[:, genes].X.sum(axis=1)).ravel())
    assert query.var["ldvae"].sum() == 10
    assert np.isnan(query.varm["ldvae_loadings"][:2]).all()
    assert query.uns["ldvae"]["projection"]["n_genes"] == 10
    assert query.uns["ldvae"]["projection"]["n_reference_genes"] == 20


def test_a_decoder_and_its_file_are_references_too(tmp_path):
    _, adata = reference()
    decoder = get.decoder(adata)
    decoder.save(tmp_path / "decoder.npz")
    results = []
    for given in (decoder, tmp_path / "decoder.npz", str(tmp_path / "decoder.npz"), adata):
        query = tl.project(stripped(adata), given, copy=True)
        results.append(query.obsm["X_ldvae"])
        assert get.factors(query).index.tolist() == get.factors(adata).index.tolist()
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], atol=2e-5)


def test_batches_of_the_reference_are_chosen():
    _, adata = reference(n_batches=3, dispersion="gene-batch")
    query, decoder = stripped(adata), get.decoder(adata)
    own = tl.project(query, adata, copy=True)
    named = tl.project(query, adata, batch="b1", copy=True)
    at = (query.obs["batch"] == "b1").to_numpy()
    np.testing.assert_allclose(own.obsm["X_ldvae"][at], named.obsm["X_ldvae"][at], atol=2e-5)
    assert np.abs(own.obsm["X_ldvae"][~at] - named.obsm["X_ldvae"][~at]).max() > 1e-3
    mean = tl.project(query, adata, batch="mean", copy=True)
    expected = decoder._with(
        intercept_bg=decoder.intercept_bg.mean(axis=0)[None],
        theta_bg=np.exp(np.log(decoder.theta_bg).mean(axis=0))[None],
        batches=["mean"],
    )
    np.testing.assert_allclose(mean.obsm["X_ldvae"], posterior_of(expected, query.X).mean_nk, atol=2e-5)
    query.obs["batch"] = "elsewhere"
    with pytest.raises(ValueError, match=r"'elsewhere', which are no batches of the reference. `batch` chooses"):
        tl.project(query, adata)
    with pytest.raises(ValueError, match="`batch` must be 'mean', 'fit', or a batch of the reference"):
        tl.project(query, adata, batch="elsewhere")
    del query.obs["batch"]
    with pytest.raises(ValueError, match=r"no column with those of the cells. `batch` chooses"):
        tl.project(query, adata)
    assert "X_ldvae" not in query.obsm


def test_a_batch_that_is_called_fit_is_that_batch():
    decoder, _, _, query = shifted_cells(n_cells=30)
    decoder = decoder._with(batches=["fit"])
    named = tl.project(query, decoder, batch="fit", copy=True)
    plain = tl.project(query, decoder, copy=True)
    np.testing.assert_array_equal(named.obsm["X_ldvae"], plain.obsm["X_ldvae"])
    with pytest.raises(ValueError, match="`offset_sd` is for `batch='fit'`"):
        tl.project(query, decoder, batch="fit", offset_sd=1.0)


def shifted_cells(n_cells=400, n_genes=300):
    """Counts of a known decoder, in a batch that differs from it by an offset of each gene."""
    rng = np.random.default_rng(0)
    decoder = LinearDecoder(
        weight_gk=rng.normal(scale=0.5, size=(n_genes, 3)),
        intercept_bg=rng.normal(scale=0.5, size=(1, n_genes)),
        genes=[f"g{i}" for i in range(n_genes)],
        batches=["b"],
        factors=["A", "B", "C"],
        theta_bg=rng.gamma(5, 1, (1, n_genes)),
    )
    offset = rng.normal(scale=0.7, size=n_genes)
    z = rng.normal(size=(n_cells, 3))
    mu = decoder._with(intercept_bg=decoder.intercept_bg + offset).rate(z, library=3000.0)
    x = rng.poisson(rng.gamma(decoder.theta_bg, mu / decoder.theta_bg)).astype(np.float32)
    query = ad.AnnData(sparse.csr_matrix(x), var=pd.DataFrame(index=decoder.genes))
    return decoder, offset, z, query


def test_offsets_of_a_new_batch_are_fitted():
    decoder, offset, z, query = shifted_cells()
    plain = tl.project(query, decoder, copy=True)
    fitted = tl.project(query, decoder, batch="fit", copy=True)

    def agreement(adata):
        return np.diag(np.corrcoef(adata.obsm["X_ldvae"], z, rowvar=False)[:3, 3:]).min()

    assert agreement(fitted) > 0.98
    found = get.decoder(fitted).intercept_bg[0] - decoder.centered().intercept_bg[0]
    assert np.corrcoef(found, offset)[0, 1] > 0.98
    np.testing.assert_allclose(found, offset - offset.mean(), atol=0.25)
    # Cells that are described by their decoder are as its own draws are.
    assert 0.95 < np.median(fitted.obs["ldvae_fit"]) < 1.05
    assert np.median(plain.obs["ldvae_fit"]) > 1.2
    # Each batch of the query can have offsets of its own.
    query.obs["day"] = np.resize(["1", "2/3"], query.n_obs)
    by_day = tl.project(query, decoder, batch="fit", batch_key="day", copy=True)
    assert get.decoder(by_day).batches.tolist() == ["1", "2/3"]
    assert np.isfinite(tl.ablate(by_day).X).all()


def test_the_fit_is_the_deviance_relative_to_that_of_draws():
    decoder, _, _, query = shifted_cells(n_cells=200)
    x = query.X.toarray()
    x[0] = 0
    x[1] = np.random.default_rng(0).permutation(x[1])
    query.X = sparse.csr_matrix(x)
    tl.project(query, decoder, batch="fit")
    fit = query.obs["ldvae_fit"].to_numpy()
    assert np.isnan(fit[0])
    assert fit[1] > 1.5 * np.median(fit[2:])
    # An independent expectation: the mean over many draws.
    fitted, rng = get.decoder(query), np.random.default_rng(1)
    n = 5
    mu = fitted.rate(query.obsm["X_ldvae"][[n]].astype(float), library=x[n].sum())
    draws = rng.poisson(rng.gamma(fitted.theta_bg, mu / fitted.theta_bg, (500, mu.shape[1]))).astype(float)
    expected = deviance("nb", draws, mu, fitted.theta_bg).sum(axis=1).mean()
    observed = deviance("nb", x[[n]].astype(float), mu, fitted.theta_bg).sum()
    np.testing.assert_allclose(fit[n], observed / expected, rtol=0.1)


def test_the_reference_gives_a_range_of_the_fit():
    _, adata = reference(n_cells=80)
    query = stripped(adata)
    tl.project(query, adata)
    low, middle, high = query.uns["ldvae"]["projection"]["fit_range"]
    np.testing.assert_allclose([low, middle, high], np.quantile(query.obs["ldvae_fit"], [0.05, 0.5, 0.95]))
    adata.X = None
    tl.project(query, adata)
    assert "fit_range" not in query.uns["ldvae"]["projection"]


def test_factors_that_a_panel_does_not_see_are_named():
    decoder, _, _, query = shifted_cells()
    weight = decoder.weight_gk.copy()
    weight[:200, 1] = 0
    decoder = decoder._with(weight_gk=weight)
    with pytest.warns(UserWarning, match=r"say next to nothing about 'B': more than 90% of the prior variance is left"):
        tl.project(query[:, :150].copy(), decoder, min_share=0.5)
    with pytest.warns(UserWarning, match="'B'"):
        panel = tl.project(query[:, :150].copy(), decoder, min_share=0.1, copy=True)
    assert panel.uns["ldvae"]["projection"]["unseen"].tolist() == ["B"]
    np.testing.assert_allclose(panel.obsm["X_ldvae_var"][:, 1], 1)


def test_tools_and_files_take_a_projection(tmp_path):
    model, adata = reference(n_batches=2)
    query = stripped(adata)
    tl.project(query, adata, key_added="other")
    query.write_h5ad(tmp_path / "query.h5ad")
    again = ad.read_h5ad(tmp_path / "query.h5ad")
    tl.population_loadings(again, "type", key="other")
    tl.rank_factors_groups(again, "type", key="other")
    assert len(get.top_genes(again, key="other")) > 0
    assert np.isfinite(tl.ablate_genes(again, "type", key="other").X).all()
    # A later export under the key leaves nothing of the projection.
    model.export_to_anndata(again, key_added="other")
    assert "other_fit" not in again.obs
    assert "projection" not in again.uns["other"]


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
@pytest.mark.parametrize(
    ("change", "arguments", "error", "match"),
    [
        (
            None,
            {"reference": 3},
            TypeError,
            "`reference` must be an AnnData with an export, a LinearDecoder, or the path",
        ),
        (None, {"key": "nothing"}, KeyError, "No export 'nothing'"),
        (lambda q: q[:, :3], {}, ValueError, "has 3 of the 20 genes of the reference, less than `min_share=0.5`"),
        (lambda q: q[:, :2], {"min_share": 0}, ValueError, "has 2 genes of the reference, fewer than its 3 factors"),
        (lambda q: q[:, [*range(20), 4]], {}, ValueError, "must be unique; 'gene4' occurs more than once"),
        (
            lambda q: with_matrix(q, np.nan),
            {},
            ValueError,
            "`adata.X` must hold counts, but holds NaN, infinite or negative",
        ),
        (
            lambda q: with_matrix(q, -1),
            {},
            ValueError,
            "`adata.X` must hold counts, but holds NaN, infinite or negative",
        ),
        (None, {"layer": "raw"}, KeyError, "`layer`: 'raw' is not in `adata.layers`"),
        (None, {"size_factor_key": "size"}, ValueError, "`size_factor_key` is for models with size factors"),
        (None, {"min_share": 2}, ValueError, "`min_share`"),
        (None, {"offset_sd": 0}, ValueError, "`offset_sd`"),
        (None, {"offset_sd": 1.0}, ValueError, "`offset_sd` is for `batch='fit'`"),
        (None, {"batch_key": "lane"}, ValueError, "`batch_key` has no use: the reference has a single batch"),
        (
            None,
            {"batch_key": "lane", "batch": "mean"},
            ValueError,
            "`batch_key` has no use: all cells have the intercepts",
        ),
        (None, {"reference": "reference.h5ad"}, ValueError, "a path must be that of an .npz file"),
        (lambda q: q[:0], {}, ValueError, "`adata` has no cells"),
        (None, {"seed": -1}, ValueError, "`seed`"),
        (None, {"chunk_size": 0}, ValueError, "`chunk_size`"),
        (None, {"batch_key": "day"}, KeyError, "`batch_key`: 'day' is not a column"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(change, arguments, error, match):
    _, adata = reference()
    query = stripped(adata)
    query = query if change is None else change(query).copy()
    before = query.copy()
    with pytest.raises(error, match=match):
        tl.project(query, **{"reference": adata, **arguments})
    assert set(query.obsm) == set(before.obsm) == set()
    assert query.obs.equals(before.obs)
    assert query.var.equals(before.var)
    assert not query.uns


def with_matrix(query, value):
    x = query.X.toarray()
    x[3, 4] = value
    query.X = x
    return query


def test_a_decoder_with_nan_is_refused():
    _, adata = reference()
    adata.uns["ldvae"]["decoder"]["weight_gk"] = np.full((20, 3), np.nan)
    with pytest.raises(ValueError, match="`weight_gk` must be finite"):
        tl.project(stripped(adata), adata)


def test_cells_without_counts_are_flagged():
    _, adata = reference()
    query = stripped(adata)
    x = query.X.toarray()
    x[2] = 0
    query.X = x
    tl.project(query, adata)
    assert np.isnan(query.obs["ldvae_fit"].iloc[2])
    assert np.abs(query.obsm["X_ldvae"][2]).max() < 1
    assert (query.obsm["X_ldvae_var"][2] > 0.3).all()


def test_torch_is_not_needed(tmp_path):
    _, adata = reference()
    adata.write_h5ad(tmp_path / "reference.h5ad")
    stripped(adata).write_h5ad(tmp_path / "query.h5ad")
    code = (
        "import sys, anndata\n"
        "from ldvae_ext import get, tl\n"
        f"query = anndata.read_h5ad({str(tmp_path / 'query.h5ad')!r})\n"
        f"tl.project(query, anndata.read_h5ad({str(tmp_path / 'reference.h5ad')!r}))\n"
        "tl.ablate(query)\n"
        "assert 'torch' not in sys.modules and 'scvi' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_backed_and_chunked_cells_give_the_same(tmp_path):
    _, adata = reference()
    query = stripped(adata)
    plain = tl.project(query, adata, copy=True)
    chunked = tl.project(query, adata, copy=True, chunk_size=7)
    for name in ("X_ldvae", "X_ldvae_var"):
        np.testing.assert_allclose(chunked.obsm[name], plain.obsm[name], atol=2e-5)
    np.testing.assert_allclose(chunked.obs["ldvae_fit"], plain.obs["ldvae_fit"], rtol=1e-4)
    query.write_h5ad(tmp_path / "query.h5ad")
    backed = ad.read_h5ad(tmp_path / "query.h5ad", backed="r")
    tl.project(backed, adata)
    np.testing.assert_allclose(backed.obsm["X_ldvae"], plain.obsm["X_ldvae"], atol=2e-5)


def test_small_batches_have_offsets_of_their_own(monkeypatch):
    from ldvae_ext.tl import _project

    decoder, _, _, query = shifted_cells(n_cells=120)
    query.obs["day"] = ["many"] * 117 + ["a", "b", "c"]
    monkeypatch.setattr(_project, "N_CELLS_TO_FIT", 40)
    tl.project(query, decoder, batch="fit", batch_key="day")
    fitted = get.decoder(query)
    off = np.abs(fitted.intercept_bg - decoder.centered().intercept_bg)
    assert (off.max(axis=1) > 0.1).all()
    # A factor that the panel lacks does not stop that.
    weight = decoder.weight_gk * [1, 0, 1]
    with pytest.warns(UserWarning, match="'B'"):
        tl.project(query, decoder._with(weight_gk=weight), batch="fit", batch_key="day")


def test_columns_of_somebody_else_are_kept():
    model, adata = reference()
    for column in ("ldvae_fit", "ldvae_converged"):
        query = stripped(adata)
        query.obs[column] = "mine"
        with pytest.raises(ValueError, match=rf"`adata` has obs\['{column}'\], which no export describes"):
            tl.project(query, adata)
        with pytest.raises(ValueError, match="which no export describes"):
            model.export_to_anndata(query)
        assert (query.obs[column] == "mine").all()
    query = stripped(adata)
    query.obsm["X_ldvae_u"] = np.ones((query.n_obs, 2))
    with pytest.raises(ValueError, match=r"obsm\['X_ldvae_u'\]"):
        tl.project(query, adata)


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_other_genes_may_have_a_name_twice():
    _, adata = reference()
    query = stripped(adata)
    extra = ad.AnnData(np.ones((query.n_obs, 2)), obs=query.obs[[]], var=pd.DataFrame(index=["other", "other"]))
    both = ad.AnnData(
        sparse.hstack([query.X, sparse.csr_matrix(extra.X)]).tocsr(),
        obs=query.obs,
        var=pd.DataFrame(index=[*query.var_names, "other", "other"]),
    )
    tl.project(both, adata)
    expected = tl.project(query, adata, copy=True)
    np.testing.assert_allclose(both.obsm["X_ldvae"], expected.obsm["X_ldvae"])
    assert both.var["ldvae"].tolist() == [True] * 20 + [False] * 2


@pytest.mark.parametrize("form", ["csc", "float16", "int", "dense"])
def test_counts_of_any_form_give_the_same(form):
    _, adata = reference()
    expected = tl.project(stripped(adata), adata, copy=True)
    query, x = stripped(adata), adata.X.toarray()
    forms = {"csc": sparse.csc_matrix(x), "float16": x.astype(np.float16), "int": x.astype(np.int64), "dense": x}
    query.X = forms[form]
    tl.project(query, adata)
    np.testing.assert_allclose(query.obsm["X_ldvae"], expected.obsm["X_ldvae"], atol=1e-6)
    np.testing.assert_allclose(query.obs["ldvae_library"], expected.obs["ldvae_library"])


def test_backed_cells_are_not_copied(tmp_path):
    _, adata = reference()
    stripped(adata).write_h5ad(tmp_path / "query.h5ad")
    with pytest.raises(ValueError, match="`copy=True` needs cells in memory"):
        tl.project(ad.read_h5ad(tmp_path / "query.h5ad", backed="r"), adata, copy=True)


def test_a_reference_whose_decoder_and_export_disagree_is_named():
    _, adata = reference(n_cells=80)
    adata.obsm["X_ldvae"][:, 1] += 2
    name = get.factors(adata).index[1]
    query = stripped(adata)
    with pytest.warns(UserWarning, match=rf"'{name}'.* shifted by up to .* prior standard deviations"):
        tl.project(query, adata)
    shift = query.uns["ldvae"]["projection"]["shift"]
    expected = query.obsm["X_ldvae"].mean(axis=0) - adata.obsm["X_ldvae"].mean(axis=0)
    np.testing.assert_allclose(shift, expected, atol=1e-5)


def test_cells_that_are_not_described_are_reported():
    decoder, _, _, query = shifted_cells(n_cells=150)
    x = query.X.toarray()
    own = ad.AnnData(sparse.csr_matrix(x), var=pd.DataFrame(index=decoder.genes))
    tl.project(own, decoder, batch="fit")
    # Its decoder describes these cells, so that they can be a reference.
    del own.uns["ldvae"]["projection"]
    wrong = ad.AnnData(own.X.copy(), var=pd.DataFrame(index=np.random.default_rng(0).permutation(decoder.genes)))
    with pytest.warns(UserWarning, match=r"of the cells fit worse than 95 % of the reference's"):
        tl.project(wrong, own)


@pytest.mark.filterwarnings("ignore:From these genes, the decoder", "ignore:.*of the cells fit worse")
def test_normalised_counts_are_named_once():
    _, adata = reference()
    query = stripped(adata)
    x = query.X.toarray()
    query.X = np.rint(x / x.sum(axis=1, keepdims=True) * 1e6)
    with pytest.warns(UserWarning, match="All cells have the same sum of counts, 1e\\+06"):
        tl.project(query, adata, copy=True)
    query.X = np.log1p(x)
    with pytest.warns(UserWarning, match="not integers") as caught:
        tl.project(query, adata)
    assert sum("not integers" in str(w.message) for w in caught) == 1

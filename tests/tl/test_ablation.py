from __future__ import annotations

import subprocess
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from ldvae_ext import get, tl
from ldvae_ext.core._paired import can_be_compiled
from ldvae_ext.kernels.threads import compiled
from tests.helpers import counts, untrained
from tests.reference import covariate_counts, setup_arguments

REQUESTS = [
    {},
    {"mode": "mean"},
    {"mode": "group_mean", "groupby": "type"},
    {"mode": "permute"},
    {"mode": "prior", "seed": 3},
    {"mode": "value", "value": {"Z_1": 2.0}, "latents": "Z_1"},
    {"scheme": "leave_in"},
    {"scheme": "keep_top"},
    {"scheme": "keep_top", "latents": ["Z_3", "Z_0"]},
    {"use_posterior": "samples", "n_samples": 3},
    {"use_posterior": "samples", "n_samples": 2, "mode": "permute", "seed": 1},
    {"latents": {"both": ["Z_0", "Z_1"], "one": "Z_2"}},
    {"latents": ["Z_2", "Z_0"]},
]


def with_types(adata):
    adata.obs["type"] = pd.Categorical(np.resize(["B", "CD4+/CD25 T"], adata.n_obs))
    adata.obs.loc[adata.obs_names[3], "type"] = np.nan
    return adata


def exported(latent_distribution="normal", likelihood="nb", **kwargs):
    adata = with_types(counts(n_cells=50, n_batches=3))
    model = untrained(adata, latent_distribution=latent_distribution, gene_likelihood=likelihood, **kwargs)
    model.export_to_anndata()
    return model, adata


def agree(model, adata, request, **kwargs):
    """Whether the tool says of an export what the model says, in the exported signs."""
    of_model = dict(request)
    signs = get.factors(adata)["sign"]
    if "value" in request:
        of_model["value"] = {name: value * signs[name] for name, value in request["value"].items()}
    expected, got = model.ablate(**of_model), tl.ablate(adata, **request, **kwargs)
    assert sorted(got.var_names) == sorted(expected.var_names)
    # Compiled loops are float32: to so much of the largest effect.
    largest = np.nanmax(np.abs(expected.X), initial=1.0) if can_be_compiled(model.get_decoder()) else 1.0
    np.testing.assert_allclose(got.X, expected[:, got.var_names].X, atol=1e-6 * largest)
    assert np.isnan(got.X).sum() == np.isnan(expected.X).sum()
    assert got.obs_names.tolist() == expected.obs_names.tolist()


@pytest.mark.parametrize("request_", REQUESTS, ids=str)
@pytest.mark.parametrize("latent_distribution", ["normal", "ln"])
def test_the_numbers_are_the_models_own(latent_distribution, request_):
    model, adata = exported(latent_distribution, "zinb")
    agree(model, adata, request_)
    if latent_distribution == "ln":
        agree(model, adata, {"mode": "drop"})
    with compiled(on=False):
        agree(*exported(latent_distribution, "nb"), request_)


@pytest.mark.parametrize(
    ("options", "setup"),
    [
        ({"gene_likelihood": "poisson"}, {}),
        ({"gene_likelihood": "nb", "dispersion": "gene-batch", "use_observed_lib_size": True}, {}),
        ({"gene_likelihood": "nb", "dispersion": "gene-cell"}, {"refit_heads": True}),
        ({"gene_likelihood": "zinb"}, {"refit_heads": True}),
        ({"gene_likelihood": "zinb"}, {"transform_batch": ["b1", "b2"]}),
    ],
)
def test_every_likelihood_and_dispersion_agrees(options, setup):
    adata = with_types(counts(n_cells=50, n_batches=3))
    model = untrained(adata, **options)
    model.export_to_anndata()
    agree(model, adata, setup)


def test_flags_of_the_export_are_those_of_single_factors(tmp_path):
    _, adata = exported()
    assert tl.ablate(adata).var.columns.empty
    adata.uns["ldvae"]["statistics"]["reproducibility"] = np.linspace(0.95, 0.3, len(get.factors(adata)))
    flags = get.factors(adata)["flag"]
    assert set(flags) >= {"stable", "unstable"}
    first = flags.index[0]
    ablation = tl.ablate(adata, {first: [first], "both": flags.index[:2].tolist()})
    assert ablation.var["flag"].to_dict() == {first: flags[first], "both": ""}
    assert tl.ablate_genes(adata).var["flag"].to_dict() == flags.to_dict()
    ablation.write_h5ad(tmp_path / "a.h5ad")


@pytest.mark.parametrize("size_factor", [False, True])
def test_covariates_labels_and_size_factors_are_read_from_obs(size_factor):
    adata = covariate_counts(n_batches=2)
    setup = setup_arguments("both", size_factor=size_factor, labels=True)
    model = untrained(adata, setup=setup, dispersion="gene-label")
    model.export_to_anndata()
    agree(model, adata, {})
    lost = adata.copy()
    column = model.get_decoder().covariates[0].name
    del lost.obs[column]
    with pytest.raises(KeyError, match=f"`adata.obs` lacks {column!r}, which the decoder needs"):
        tl.ablate(lost)


def test_columns_are_in_the_exported_order_and_the_gene_effects_add_up():
    model, adata = exported()
    names = get.factors(adata).index.tolist()
    effects = tl.ablate(adata)
    assert effects.var_names.tolist() == names
    genes = tl.ablate_genes(adata, "type")
    assert genes.var_names.tolist() == names
    table = get.gene_ablation_df(genes).groupby(["group", "factor"])["mean"].sum()
    with compiled(on=False):
        in_float64 = tl.ablate(adata)
    for cells, tolerance in ((effects, 1e-6 * np.abs(effects.X).max()), (in_float64, 1e-10)):
        expected = get.ablation_df(cells, "type").set_index(["group", "factor"])["mean"]
        np.testing.assert_allclose(table[expected.index], expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(genes.X, model.ablate_genes("type")[genes.obs_names, names].X, atol=1e-6)
    assert tl.ablate(adata, latents=[1, 0]).var_names.tolist() == names[:2]
    assert tl.ablate(adata, scheme="keep_top").uns["ldvae_ablation"]["order"].tolist() == names


def test_it_works_on_what_a_file_holds_in_any_order_of_genes_and_for_some_cells(tmp_path):
    model, adata = exported()
    expected = tl.ablate(adata, chunk_size=1000).X
    shuffled = adata[:, np.random.default_rng(0).permutation(adata.n_vars)].copy()
    np.testing.assert_allclose(tl.ablate(shuffled, chunk_size=7).X, expected, atol=1e-9)
    shuffled.write_h5ad(tmp_path / "a.h5ad")
    shuffled.write_zarr(tmp_path / "a.zarr")
    np.testing.assert_allclose(tl.ablate(ad.read_zarr(tmp_path / "a.zarr")).X, expected, atol=1e-9)
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    np.testing.assert_allclose(tl.ablate(backed, chunk_size=7).X, expected, atol=1e-9)
    some = tl.ablate(backed, indices=[9, 2, 30], chunk_size=2)
    assert some.obs_names.tolist() == ["cell9", "cell2", "cell30"]
    np.testing.assert_allclose(some.X, expected[[9, 2, 30]], atol=1e-9)
    backed.file.close()
    mask = np.arange(50) % 7 == 0
    np.testing.assert_allclose(tl.ablate(adata, indices=mask).X, expected[mask], atol=1e-9)
    assert tl.ablate(adata, indices=[]).shape == (0, model.n_latent)
    np.testing.assert_allclose(tl.ablate(adata[10:20]).X, expected[10:20], atol=1e-9)


@pytest.mark.parametrize("form", [np.asarray, sparse.csc_matrix, sparse.csr_array, sparse.csc_array])
def test_every_form_of_matrix_gives_the_same(form):
    _, adata = exported()
    expected = tl.ablate(adata).X
    adata.layers["counts"] = form(adata.X.toarray())
    adata.X = adata.X * 0.5
    np.testing.assert_allclose(tl.ablate(adata, layer="counts", chunk_size=11).X, expected, atol=1e-9)


def test_the_layer_of_the_model_is_the_default():
    adata = counts(n_batches=3)
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X * 0.5
    model = untrained(adata, setup={"layer": "counts"})
    model.export_to_anndata(key_added="mine")
    np.testing.assert_allclose(
        tl.ablate(adata, key="mine").X, model.ablate()[:, get.factors(adata, key="mine").index].X, atol=1e-6
    )


def test_the_anndata_is_left_alone_and_the_result_goes_through_files(tmp_path):
    _, adata = exported()
    before = adata.copy()
    result = tl.ablate_genes(adata, "type")
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert sorted(adata.uns) == sorted(before.uns)
    result.write_h5ad(tmp_path / "r.h5ad")
    pd.testing.assert_frame_equal(
        get.gene_ablation_df(ad.read_h5ad(tmp_path / "r.h5ad")), get.gene_ablation_df(result), check_dtype=False
    )


def test_no_torch_is_needed():
    code = "import ldvae_ext; ldvae_ext.tl; ldvae_ext.tl.ablate; import sys; print('torch' in sys.modules, 'scvi' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False False"


def test_bad_input_is_named():
    _, adata = exported()
    with pytest.raises(KeyError, match="No export 'other'"):
        tl.ablate(adata, key="other")
    with pytest.raises(KeyError, match=r"`layer`: 'counts' is not in `adata.layers`, which has none"):
        tl.ablate(adata, layer="counts")
    with pytest.raises(ValueError, match=r"lacks 1 of its 20 genes: 'gene0'"):
        tl.ablate(adata[:, 1:])
    with pytest.raises(ValueError, match="`chunk_size` must be an integer of at least 1"):
        tl.ablate(adata, chunk_size=0)
    with pytest.raises(ValueError, match="`groupby` belongs to `mode='group_mean'`"):
        tl.ablate(adata, groupby="type")
    with pytest.raises(ValueError, match=r"`transform_batch` must name batches of the decoder.*got 'b9'"):
        tl.ablate(adata, transform_batch="b9")
    with pytest.raises(ValueError, match="'Z_9' is no latent"):
        tl.ablate(adata, latents=["Z_9"])
    normalised = adata.copy()
    normalised.X = normalised.X * 0.5
    with pytest.warns(UserWarning, match="values that are not integers"):
        tl.ablate(normalised)
    normalised.X = -normalised.X
    with pytest.raises(ValueError, match="negative values"):
        tl.ablate(normalised)
    normalised.X = None
    with pytest.raises(ValueError, match=r"`adata.X` is empty; name the `layer`"):
        tl.ablate(normalised)
    old = adata.copy()
    del old.obs["ldvae_library"]
    with pytest.raises(KeyError, match="export again"):
        tl.ablate(old)
    with pytest.raises(ValueError, match="`indices` must be positions of 50 cells; got 50"):
        tl.ablate(adata, indices=[0, 50])
    with pytest.raises(ValueError, match="`value` must be a finite number, one for each of 4 latents"):
        tl.ablate(adata, mode="value", value=[1, 2])
    with pytest.raises(TypeError, match="`groupby` must be the name of a column"):
        tl.ablate_genes(adata, ["type"])
    lost = adata.copy()
    del lost.obs["batch"]
    with pytest.raises(KeyError, match=r"`adata.obs` lacks 'batch'"):
        tl.ablate(lost)


def test_positions_may_count_from_the_end():
    model, adata = exported()
    for request in ({}, {"mode": "prior"}, {"mode": "permute"}):
        whole = tl.ablate(adata, **request)
        np.testing.assert_array_equal(tl.ablate(adata, indices=[-1, 0], **request).X, whole.X[[49, 0]])
        of_model = model.ablate(indices=[-1, 0], **request)[:, whole.var_names]
        np.testing.assert_allclose(of_model.X, whole.X[[49, 0]], atol=1e-3)


def test_a_value_is_described_in_the_exported_order_and_signs():
    _, adata = exported()
    info = tl.ablate(adata, mode="value", value=[1, 2, 3, 4]).uns["ldvae_ablation"]
    assert info["value"].tolist() == [1, 2, 3, 4]
    assert info["value_of"].tolist() == get.factors(adata).index.tolist()


def test_minified_data_have_no_counts_to_ablate():
    adata = counts(n_batches=3)
    model = untrained(adata, use_observed_lib_size=True)
    model.export_to_anndata()
    adata.obsm["X_latent_qzm"], adata.obsm["X_latent_qzv"] = model.get_latent_representation(return_dist=True)
    model.minify_adata()
    with pytest.raises(ValueError, match="`adata` was minified"):
        tl.ablate(model.adata)


def test_labels_that_are_one_string_are_named_before_any_work():
    _, adata = exported()
    adata.obs["mixed"] = pd.Categorical([1, "1"] * 25)
    with pytest.raises(ValueError, match="labels of 'mixed' must be distinct and not empty"):
        tl.ablate_genes(adata, "mixed")

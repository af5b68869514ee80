"""Data that no model should be trained on: named before anything is written."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scvi.model import LinearSCVI

from ldvae_ext.model import LDVAE
from ldvae_ext.model import _counts as module_under_test
from tests.helpers import TRAIN, counts, untrained


def with_value(value, *, layer=None, form=sparse.csr_matrix):
    adata = counts(n_batches=3)
    dense = adata.X.toarray()
    dense[-1, -1] = value
    if layer is None:
        adata.X = form(dense)
    else:
        adata.layers[layer] = form(dense)
    return adata


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_array, np.asarray])
@pytest.mark.parametrize("layer", [None, "counts"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-3, "holds negative values, such as -3.0"),
        (np.nan, "holds NaN or infinite values, such as nan"),
        (np.inf, "holds NaN or infinite values, such as inf"),
    ],
)
def test_values_that_are_no_counts_are_an_error(value, message, layer, form, monkeypatch):
    monkeypatch.setattr(module_under_test, "_CHUNK_VALUES", 100)
    adata = with_value(value, layer=layer, form=form)
    where = "adata.X" if layer is None else r"adata.layers\['counts'\]"
    with pytest.raises(ValueError, match=f"`{where}` must hold counts, but {message}"):
        LDVAE.setup_anndata(adata, batch_key="batch", layer=layer)
    assert list(adata.uns) == []
    assert adata.obs.columns.tolist() == ["batch"]


def test_fractions_are_a_warning_that_points_to_the_caller():
    with pytest.warns(UserWarning, match="not integers, such as 0.5; LDVAE models raw counts") as record:
        LDVAE.setup_anndata(with_value(0.5), batch_key="batch")
    (warning,) = [w for w in record if "integers" in str(w.message)]
    assert warning.filename == __file__


def test_cells_without_counts_are_a_warning_and_left_out_of_the_library_prior(monkeypatch):
    monkeypatch.setattr(module_under_test, "_CHUNK_VALUES", 100)
    adata = counts()
    whole = adata[2:].copy()
    adata.X = sparse.csr_matrix(sparse.diags_array(np.array([0.0, 0.0] + [1.0] * 58, dtype=np.float32)) @ adata.X)
    with pytest.warns(UserWarning, match="2 of 60 cells have no counts in `adata.X`; the first is 'cell0'"):
        LDVAE.setup_anndata(adata)
    LDVAE.setup_anndata(whole)
    model, without = LDVAE(adata), LDVAE(whole)
    np.testing.assert_allclose(model.module.library_log_means, without.module.library_log_means, rtol=1e-6)
    np.testing.assert_allclose(model.module.library_log_vars, without.module.library_log_vars, rtol=1e-6)
    LinearSCVI.setup_anndata(adata)
    with pytest.warns(UserWarning, match="empty cells"):
        stock = LinearSCVI(adata)
    assert stock.module.library_log_vars > 2 * model.module.library_log_vars, "the defect that this avoids"
    model.train(2, kl_warmup=1, **TRAIN)
    assert np.isfinite(model.ablate().X).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": "raw"}, "`layer`: 'raw' is not in `adata.layers`, which has none"),
        ({"batch_key": "lane"}, "`batch_key`: 'lane' is not a column of `adata.obs`, which has 'batch'"),
        ({"labels_key": "type"}, "`labels_key`: 'type' is not a column"),
    ],
)
def test_missing_fields_are_named(arguments, message):
    adata = counts(n_batches=3)
    with pytest.raises(KeyError, match=message):
        LDVAE.setup_anndata(adata, **arguments)
    assert list(adata.uns) == []
    assert adata.obs.columns.tolist() == ["batch"]


@pytest.mark.parametrize("argument", ["batch_key", "labels_key"])
def test_nan_in_a_category_is_an_error(argument):
    adata = counts(n_batches=3)
    adata.obs["batch"] = pd.Categorical([None, *adata.obs["batch"][1:]])
    with pytest.raises(ValueError, match=rf"`{argument}`: `adata.obs\['batch'\]` is NaN for 1 of 60 cells"):
        LDVAE.setup_anndata(adata, **{argument: "batch"})
    assert list(adata.uns) == []


def test_a_matrix_of_zeros_is_an_error():
    adata = counts()
    adata.X = 0 * adata.X
    with pytest.raises(ValueError, match=r"`adata\.X` has no counts"):
        LDVAE.setup_anndata(adata)


def test_no_matrix_at_all_is_an_error():
    adata = counts()
    del adata.X
    with pytest.raises(ValueError, match=r"`adata\.X` is empty"):
        LDVAE.setup_anndata(adata)


@pytest.mark.parametrize("n_latent", [0, -1, 2.5, "3", True])
def test_a_number_of_latents_that_is_none(n_latent):
    adata = counts()
    LDVAE.setup_anndata(adata)
    with pytest.raises(ValueError, match="`n_latent` must be an integer of at least 1; got"):
        LDVAE(adata, n_latent=n_latent)


def test_cells_are_chosen_by_position_or_mask():
    model = untrained(counts())
    for indices in (["cell1", "cell2"], [0.0, 1.0]):
        with pytest.raises(TypeError, match=r"`indices` must be positions .* or a mask"):
            model.get_latent_kl(indices=indices)
    assert model.get_latent_kl(indices=[]).shape == (0, 4)


def test_cells_keep_their_names():
    model = untrained(counts())
    with pytest.raises(ValueError, match="in another order than their names"):
        model.get_normalized_expression(use_posterior_mean=True, data_loader_kwargs={"shuffle": True})


def test_columns_and_groups_of_a_comparison_are_named():
    model = untrained(counts(n_batches=3))
    with pytest.raises(KeyError, match="`groupby`: 'cell_type' is not a column"):
        model.differential_expression(groupby="cell_type", group1="T")
    with pytest.raises(ValueError, match=r"`group1` must be one of .*'b1'.*; got 'b3'"):
        model.differential_expression(groupby="batch", group1="b3")
    with pytest.raises(ValueError, match="`group2` must be one of"):
        model.differential_expression(groupby="batch", group1=["b1", "b2"], group2="b3")
    with pytest.raises(KeyError, match="`sample_key`: 'donor' is not a column"):
        model.differential_abundance(sample_key="donor")


def test_setup_names_an_argument_that_it_does_not_have():
    with pytest.raises(TypeError, match="has no argument 'batchkey'; it takes 'adata', 'batch_key'"):
        LDVAE.setup_anndata(counts(), batchkey="batch")


def test_genes_named_alike_are_told_of_at_the_start():
    adata = counts()
    adata.var_names = ["gene0", *adata.var_names[:-1]]
    with pytest.warns(UserWarning, match="'gene0' occurs more than once"):
        LDVAE.setup_anndata(adata)


def test_latents_batches_and_covariates_with_other_indices_are_not_mixed():
    adata = counts(n_batches=3)
    model = untrained(adata)
    z = pd.DataFrame(np.eye(4), columns=model.latent_names, index=adata.obs_names[:4])
    batch = adata.obs["batch"].iloc[:4]
    assert model.decode(z, batch=batch).index.equals(z.index)
    with pytest.raises(ValueError, match="`batch` must have the index of `z`"):
        model.decode(z, batch=batch.iloc[::-1])


@pytest.mark.parametrize(
    "given", [None, "file.h5ad", np.ones((3, 3)), pd.DataFrame(np.ones((3, 3)))], ids=lambda v: type(v).__name__
)
def test_what_is_no_anndata_is_named(given):
    name = type(given).__name__
    with pytest.raises(TypeError, match=f"`adata` must be an AnnData; got {name}"):
        LDVAE.setup_anndata(given)
    if given is not None:
        for read in (LDVAE, untrained(counts()).get_elbo, untrained(counts()).ablate):
            with pytest.raises(TypeError, match=f"`adata` must be an AnnData or None.*got ({name}|'file.h5ad')"):
                read(given)


def test_mudata_is_told_to_pass_one_modality():
    class MuData:
        """As mudata names its class."""

    with pytest.raises(TypeError, match=r"must be an AnnData; got MuData; pass one modality, such as `mdata\['rna'\]`"):
        LDVAE.setup_anndata(MuData())


def test_counts_in_raw_only_are_pointed_out():
    adata = counts()
    adata.raw = adata.copy()
    adata.X = None
    with pytest.raises(
        ValueError, match=r"`adata.X` is empty.*`adata.layers\['counts'\] = adata.raw\[:, adata.var_names\].X`"
    ):
        LDVAE.setup_anndata(adata)
    adata.layers["counts"] = adata.raw[:, adata.var_names].X
    LDVAE.setup_anndata(adata, layer="counts")


def test_masked_counts_are_refused():
    adata = counts()
    adata.X = np.ma.masked_greater(adata.X.toarray(), 3)
    with pytest.raises(TypeError, match=r"`adata.X` is a masked array.*`adata.X.filled\(0\)`"):
        LDVAE.setup_anndata(adata)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ([1, "a"], "values of several types, such as 1, 'a'"),
        ([True, "a"], "values of several types"),
        ([(1, 2), (3, 4)], "values of several types"),
        (list(pd.date_range("2020", periods=2)), "dates"),
        (list(pd.period_range("2020", periods=2)), "dates"),
    ],
)
@pytest.mark.parametrize("argument", ["batch_key", "labels_key", "categorical_covariate_keys"])
def test_levels_are_of_one_type(values, what, argument):
    adata = counts()
    adata.obs["c"] = pd.Series(values * 30, index=adata.obs_names)
    columns, uns = list(adata.obs), list(adata.uns)
    with pytest.raises(
        TypeError, match=rf"`{argument}`: `adata.obs\['c'\]` must hold text, numbers or booleans; it has {what}"
    ):
        LDVAE.setup_anndata(adata, **{argument: ["c"] if argument.endswith("keys") else "c"})
    assert (list(adata.obs), list(adata.uns)) == (columns, uns)


@pytest.mark.parametrize("dtype", ["Int64", "boolean", "string", "Float64", "category", "bool", "int8"])
def test_levels_of_nullable_types_are_read(dtype):
    adata = counts()
    adata.obs["c"] = pd.Series(np.resize([0, 1], 60), index=adata.obs_names).astype(dtype)
    model = untrained(adata, setup={"batch_key": "c"})
    assert len(model.get_decoder().batches) == 2
    np.testing.assert_array_equal(model.ablate(adata.copy()).X, model.ablate().X)


def test_a_list_is_no_column():
    with pytest.raises(TypeError, match=r"`batch_key` must be the name of one column of `adata.obs`; got \['batch'\]"):
        LDVAE.setup_anndata(counts(), batch_key=["batch"])

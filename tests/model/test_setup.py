"""Covariates, size factors and labels at setup: what is wrong is named before anything is written."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scvi.model import LinearSCVI

from ldvae_ext.model import LDVAE
from tests.helpers import counts, untrained
from tests.reference import CATEGORICAL, CONTINUOUS, covariate_counts, setup_arguments


def bad(column, value):
    """One cell of a column changed."""

    def change(adata):
        values = (
            adata.obs[column].astype(object if value is None or isinstance(value, str) else float).to_numpy(copy=True)
        )
        values[3] = value
        adata.obs[column] = pd.Categorical(values) if column in CATEGORICAL else values

    return change


def unchanged(_adata):
    pass


CATS, CONTS = "categorical_covariate_keys", "continuous_covariate_keys"
ERRORS = [
    ({CATS: "lane"}, unchanged, TypeError, f"`{CATS}` must be a list of columns of `adata.obs`; got 'lane'"),
    ({CONTS: "age"}, unchanged, TypeError, f"`{CONTS}` must be a list of columns of `adata.obs`; got 'age'"),
    ({CONTS: [3]}, unchanged, TypeError, rf"`{CONTS}` must be a list of columns of `adata.obs`; got \[3\]"),
    ({CATS: ["lane", "lane"]}, unchanged, ValueError, f"`{CATS}` must name each column once; got 'lane', 'lane'"),
    ({CONTS: ["age", "age"]}, unchanged, ValueError, f"`{CONTS}` must name each column once; got 'age', 'age'"),
    ({CATS: ["dose"], CONTS: ["age", "dose"]}, unchanged, ValueError, "'dose': a covariate is either categorical or"),
    ({CATS: ["lanes"]}, unchanged, KeyError, f"`{CATS}`: 'lanes' is not a column of `adata.obs`, which has 'batch', "),
    ({CONTS: ["Age"]}, unchanged, KeyError, f"`{CONTS}`: 'Age' is not a column of `adata.obs`, which has 'batch', "),
    ({"size_factor_key": "sf"}, unchanged, KeyError, "`size_factor_key`: 'sf' is not a column"),
    ({CATS: ["lane"]}, bad("lane", None), ValueError, rf"`{CATS}`: `adata.obs\['lane'\]` is NaN for 1 of 60 cells"),
    (
        {CONTS: ["age"]},
        bad("age", np.nan),
        ValueError,
        rf"`{CONTS}`: `adata.obs\['age'\]` must hold finite numbers; 1 of 60 are not, such as nan",
    ),
    ({CONTS: ["age"]}, bad("age", -np.inf), ValueError, "must hold finite numbers; 1 of 60 are not, such as -inf"),
    (
        {CONTS: ["age"]},
        bad("age", "old"),
        TypeError,
        rf"`{CONTS}`: `adata.obs\['age'\]` must hold numbers; its type is",
    ),
    ({CONTS: ["lane"]}, unchanged, TypeError, r"`adata.obs\['lane'\]` must hold numbers; its type is category"),
    *(
        (
            {"size_factor_key": "size"},
            bad("size", value),
            ValueError,
            r"`size_factor_key`: `adata.obs\['size'\]` must hold positive numbers; 1 of 60 are not, such as",
        )
        for value in (0.0, -1.5, np.nan, np.inf)
    ),
    (
        {"size_factor_key": "lane"},
        unchanged,
        TypeError,
        r"`size_factor_key`: .* must hold numbers; its type is category",
    ),
]


@pytest.mark.parametrize(("arguments", "change", "error", "message"), ERRORS)
def test_what_is_wrong_is_named_and_nothing_is_written(arguments, change, error, message):
    adata = covariate_counts(n_batches=3)
    change(adata)
    before = adata.copy()
    with pytest.raises(error, match=message):
        LDVAE.setup_anndata(adata, batch_key="batch", **arguments)
    assert list(adata.uns) == []
    assert list(adata.obsm) == []
    pd.testing.assert_frame_equal(adata.obs, before.obs)


@pytest.mark.parametrize("dtype", [bool, np.int8, np.int64, np.float32, np.float64, "Int64", "Float64"])
def test_numbers_of_every_type_are_read(dtype):
    """Integers, nullable numbers and booleans beside floats: the same model as floats."""
    outs = []
    for kind in (np.float64, dtype):
        adata = covariate_counts()
        adata.obs["dose"] = (adata.obs["dose"] > 1).astype(float).astype(kind)
        adata.obs["size"] = (1.0 + np.arange(60) % 3 if dtype is not bool else np.ones(60)).astype(float)
        adata.obs["size"] = adata.obs["size"].astype(kind if dtype is not bool else float)
        model = untrained(adata, setup=setup_arguments("continuous", size_factor=True), encode_covariates=True)
        outs.append((model.get_normalized_expression(use_posterior_mean=True, library_size="latent"), model.ablate().X))
    np.testing.assert_allclose(outs[0][0], outs[1][0], rtol=1e-6)
    np.testing.assert_allclose(outs[0][1], outs[1][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("levels", [[0, 1, 2], [10, 2, 30], [0.5, 1.5, 2.5], [True, False, True], ["1", "0", "2"]])
def test_levels_of_every_type_are_names(levels):
    adata = covariate_counts()
    adata.obs["lane"] = np.array(levels)[np.arange(60) % 3]
    model = untrained(adata, setup={"categorical_covariate_keys": ["lane"]})
    own = [str(level) for level in sorted(set(levels))]
    (covariate,) = model.get_decoder().covariates
    assert covariate.levels.tolist() == own
    expression = model.get_normalized_expression(use_posterior_mean=True)
    z, effect = model.get_latent_representation(), model.get_decoder().covariate_cg
    at = [own.index(str(level)) for level in adata.obs["lane"]]
    logits = z @ model.get_decoder().weight_gk.T + model.get_decoder().intercept_bg[0] + effect[at]
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(expression, expected, atol=1e-6)
    assert np.ptp(effect, axis=0).min() > 0


def test_a_model_that_uses_nothing_new_is_saved_as_linear_scvi_saves_it(tmp_path):
    written = []
    for cls in (LinearSCVI, LDVAE):
        adata = counts(n_batches=3)
        cls.setup_anndata(adata, batch_key="batch")
        model = cls(adata, n_latent=3, gene_likelihood="zinb", use_batch_norm=False, bias=True)
        model.is_trained_ = True
        model.save(tmp_path / cls.__name__, save_anndata=True)
        written.append(model)
    stock, ours = written
    assert ours.registry["setup_args"] == stock.registry["setup_args"]
    fields = {**ours.registry["field_registries"]}
    for name in ("size_factor", "extra_categorical_covs", "extra_continuous_covs"):  # empty, as SCVI registers them
        assert fields.pop(name)["state_registry"] == {}
    assert fields.keys() == stock.registry["field_registries"].keys()
    assert ours.init_params_ == stock.init_params_
    back = LinearSCVI.load(tmp_path / "LDVAE", allowed_classes_names_list=["LDVAE"])
    np.testing.assert_array_equal(back.get_latent_representation(), ours.get_latent_representation())
    np.testing.assert_array_equal(back.get_loadings(), ours.get_loadings())


@pytest.mark.parametrize("empty", [[], None, ()])
def test_no_covariates_are_no_covariates(empty):
    adata = counts(n_batches=3)
    LDVAE.setup_anndata(
        adata,
        batch_key="batch",
        categorical_covariate_keys=empty,
        continuous_covariate_keys=empty,
        size_factor_key=None,
    )
    model = LDVAE(adata, n_latent=2)
    assert "categorical_covariate_keys" not in model.registry["setup_args"]
    assert model.get_decoder().covariates == ()
    assert list(adata.obsm) == []


def test_what_is_new_is_saved_under_its_name():
    adata = covariate_counts(n_batches=3)
    LDVAE.setup_anndata(adata, **setup_arguments("both", size_factor=True, labels=True))
    arguments = LDVAE(adata, n_latent=2).registry["setup_args"]
    assert arguments["categorical_covariate_keys"] == CATEGORICAL
    assert arguments["continuous_covariate_keys"] == CONTINUOUS
    assert arguments["size_factor_key"] == "size"


@pytest.mark.parametrize(
    ("values", "has_warning"),
    [
        (np.linspace(-2, 2, 60), False),
        (np.linspace(0, 15, 60), False),
        (np.resize([2019, 2020, 2021], 60), True),
        (np.linspace(1e3, 1e4, 60), True),
        (np.resize([-30.0, 30.0], 60), True),
    ],
)
def test_a_covariate_of_large_values_is_named_with_the_line_that_standardises_it(recwarn, values, has_warning):
    adata = counts(n_batches=3)
    adata.obs["c"] = values
    LDVAE.setup_anndata(adata, continuous_covariate_keys=["c"])
    said = [str(w.message) for w in recwarn if "continuous_covariate_keys" in str(w.message)]
    assert len(said) == has_warning
    for message in said:
        assert f"has mean {values.mean():.4g} and standard deviation {values.std():.4g}" in message
        exec(message.split("`")[-2], {"adata": adata})
        recwarn.clear()
        LDVAE.setup_anndata(adata, continuous_covariate_keys=["c"])
        assert not [w for w in recwarn if "continuous_covariate_keys" in str(w.message)]

"""LDVAE against scvi.model.LinearSCVI, side by side."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import scvi
import torch
from scipy import sparse
from scvi.model import LinearSCVI

from ldvae_ext import datasets
from ldvae_ext.model import LDVAE
from ldvae_ext.module import LDVAEModule
from tests.helpers import TRAIN, counts, untrained


def pair(adata, **kwargs):
    """Both classes built from the same seed on the same data."""
    models = []
    for cls in (LinearSCVI, LDVAE):
        data = adata.copy()
        cls.setup_anndata(data, batch_key="batch")
        scvi.settings.seed = 3
        models.append(cls(data, **kwargs))
    return models


def state(model):
    return {name: value.numpy() for name, value in model.module.state_dict().items()}


def assert_same_state(a, b):
    assert list(state(a)) == list(state(b))
    for name, value in state(a).items():
        np.testing.assert_array_equal(value, state(b)[name], err_msg=name)


def test_constructor_and_setup_have_the_arguments_of_linear_scvi_in_its_order():
    def positional(function):
        return [
            (p.name, p.default)
            for p in inspect.signature(function).parameters.values()
            if p.kind is not inspect.Parameter.KEYWORD_ONLY
        ]

    for method in ("__init__", "setup_anndata", "train", "load", "save", "get_normalized_expression", "get_loadings"):
        assert positional(getattr(LDVAE, method)) == positional(getattr(LinearSCVI, method)), method


def test_every_public_method_of_linear_scvi_is_there():
    assert {name for name in dir(LinearSCVI) if not name.startswith("_")} <= set(dir(LDVAE))
    assert LDVAE._module_cls is LDVAEModule
    assert issubclass(LDVAEModule, scvi.module.LDVAE)


@pytest.mark.parametrize("n_batches", [1, 3])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"gene_likelihood": "zinb", "dispersion": "gene-batch", "n_layers": 2},
        {"use_observed_lib_size": True, "latent_distribution": "ln"},
        {"gene_likelihood": "poisson", "bias": True, "use_batch_norm": False},
    ],
)
def test_same_seed_gives_the_same_initial_parameters(n_batches, kwargs):
    assert_same_state(*pair(counts(n_batches=n_batches), **kwargs))


@pytest.mark.slow
@pytest.mark.parametrize("kwargs", [{}, {"gene_likelihood": "zinb", "use_observed_lib_size": True}])
def test_same_seed_gives_the_same_elbo_over_twenty_epochs(kwargs):
    adata = datasets.pbmc68k()
    adata.obs["batch"] = np.array(["a", "b"])[np.arange(adata.n_obs) % 2]
    curves = []
    for model in pair(adata, **kwargs):
        scvi.settings.seed = 3
        model.train(20, train_size=0.9, check_val_every_n_epoch=1, plan_kwargs={"n_epochs_kl_warmup": 5}, **TRAIN)
        curves.append({name: model.history[name].to_numpy(dtype=float) for name in ("elbo_train", "elbo_validation")})
    for name, curve in curves[0].items():
        assert len(curve) == 20
        np.testing.assert_allclose(curves[1][name], curve, rtol=1e-3)


@pytest.mark.parametrize(
    "kwargs", [{}, {"gene_likelihood": "zinb", "latent_distribution": "ln", "dispersion": "gene-batch"}]
)
def test_from_linear_scvi_keeps_latent_loadings_and_expression(kwargs):
    adata = counts(n_batches=3)
    LinearSCVI.setup_anndata(adata, batch_key="batch")
    stock = LinearSCVI(adata, n_latent=4, **kwargs)
    stock.train(1, plan_kwargs={"n_epochs_kl_warmup": 1}, **TRAIN)
    ours = LDVAE.from_linear_scvi(stock)
    assert type(ours) is LDVAE
    assert_same_state(stock, ours)
    assert ours.is_trained
    assert ours.history.keys() == stock.history.keys()
    np.testing.assert_array_equal(
        ours.get_latent_representation(return_dist=True), stock.get_latent_representation(return_dist=True)
    )
    np.testing.assert_array_equal(ours.get_loadings(), stock.get_loadings())
    expressions = []
    for model in (stock, ours):
        torch.manual_seed(5)
        expressions.append(model.get_normalized_expression(n_samples=2))
    np.testing.assert_array_equal(*expressions)
    assert np.isnan(ours.final_kl_weight), "LinearSCVI does not say"


def test_from_linear_scvi_without_data_and_of_another_class(tmp_path):
    stock = untrained(counts(n_batches=3), cls=LinearSCVI)
    stock.save(tmp_path / "m")
    bare = LinearSCVI.load(tmp_path / "m", adata=False)
    assert_same_state(stock, LDVAE.from_linear_scvi(bare))
    with pytest.raises(TypeError, match=r"must be a scvi.model.LinearSCVI; got LDVAE"):
        LDVAE.from_linear_scvi(LDVAE.from_linear_scvi(stock))


@pytest.mark.parametrize("writer", [LinearSCVI, LDVAE])
@pytest.mark.parametrize("reader", [LinearSCVI, LDVAE])
@pytest.mark.parametrize("with_data", [True, False])
def test_directories_open_in_either_class(tmp_path, writer, reader, with_data):
    adata = counts(n_batches=3)
    model = untrained(adata, cls=writer, gene_likelihood="zinb", bias=True)
    model.save(tmp_path / "m", save_anndata=with_data, prefix="p_")
    allowed = {} if reader is LDVAE or writer is LinearSCVI else {"allowed_classes_names_list": ["LDVAE"]}
    back = reader.load(tmp_path / "m", adata=None if with_data else adata, prefix="p_", **allowed)
    assert_same_state(model, back)
    np.testing.assert_array_equal(back.get_latent_representation(), model.get_latent_representation())
    np.testing.assert_array_equal(back.get_loadings(), model.get_loadings())


def test_a_trained_model_of_ours_opens_in_stock_scvi_tools(tmp_path):
    adata = counts(n_batches=3)
    LDVAE.setup_anndata(adata, batch_key="batch")
    model = LDVAE(adata, n_latent=3)
    model.train(2, kl_warmup="auto", **TRAIN)
    model.export_to_anndata()
    model.save(tmp_path / "m", save_anndata=True)
    stock = LinearSCVI.load(tmp_path / "m", allowed_classes_names_list=["LDVAE"])
    assert_same_state(model, stock)
    assert LDVAE.load(tmp_path / "m").final_kl_weight == model.final_kl_weight == 1.0


def test_load_still_refuses_other_classes(tmp_path):
    adata = counts()
    scvi.model.SCVI.setup_anndata(adata)
    scvi.model.SCVI(adata).save(tmp_path / "m")
    with pytest.raises(ValueError, match="different class"):
        LDVAE.load(tmp_path / "m", adata=adata)


FORMATS = [sparse.csr_matrix, sparse.csr_array, sparse.csc_matrix, sparse.csc_array, lambda x: x.toarray()]


@pytest.mark.grid(1)
@pytest.mark.parametrize("layer", [None, "counts"])
@pytest.mark.parametrize("form", FORMATS, ids=["csr_matrix", "csr_array", "csc_matrix", "csc_array", "dense"])
def test_every_matrix_format_trains_to_the_same_model(form, layer):
    def fit(form):
        adata = counts(n_batches=3)
        matrix = form(adata.X)
        if layer is None:
            adata.X = matrix
        else:
            adata.layers[layer] = matrix
            adata.X = np.full(adata.shape, -1.0)
        LDVAE.setup_anndata(adata, "batch", layer=layer)
        scvi.settings.seed = 1
        model = LDVAE(adata, n_latent=3)
        model.train(2, kl_warmup=1, **TRAIN)
        return model

    reference, model = fit(sparse.csr_matrix), fit(form)
    for name, value in state(reference).items():
        np.testing.assert_allclose(state(model)[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(model.ablate().X, reference.ablate().X, rtol=1e-4, atol=1e-4)


def test_the_library_prior_is_that_of_linear_scvi():
    stock, ours = pair(counts(n_cells=101, n_batches=3))
    np.testing.assert_array_equal(ours.module.library_log_means, stock.module.library_log_means)
    np.testing.assert_array_equal(ours.module.library_log_vars, stock.module.library_log_vars)


def test_setup_draws_as_many_random_numbers_as_linear_scvi():
    after = []
    for cls in (LinearSCVI, LDVAE):
        np.random.seed(0)  # noqa: NPY002 - scvi-tools' own generator
        cls.setup_anndata(counts(), batch_key="batch")
        after.append(np.random.random())  # noqa: NPY002
    assert after[0] == after[1]

"""Options of the network: what LinearSCVI gets wrong, shown wrong there and right here.

T1 to T36 number the page on defects; see ``test_traps.py``.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.special import softmax
from scvi.model import LinearSCVI
from torch.nn.functional import softplus

from ldvae_ext.model import LDVAE
from tests.helpers import TRAIN, counts, untrained
from tests.reference import covariate_counts, covariates_of, network64, setup_arguments
from tests.traps import built, dense, logits

# LDVAE warns where training ends before the KL term has its full weight; LinearSCVI trains the same and says nothing.
SHORT = {**TRAIN, "plan_kwargs": {"n_epochs_kl_warmup": 1}}


def has_batch_norm(layers):
    return any(isinstance(layer, torch.nn.BatchNorm1d) for layer in layers.modules())


@pytest.mark.parametrize("where", ["both", "encoder", "decoder", "none"])
def test_batch_norm_is_where_the_string_says_and_loadings_fold_it(where):
    # T3
    adata = counts(n_batches=3)
    stock = untrained(adata.copy(), cls=LinearSCVI, use_batch_norm=where)
    ours = untrained(adata, use_batch_norm=where)

    def error_of_loadings(model):
        """Against the slopes of the network: the change of logits by one unit of each latent."""
        slopes = logits(model, np.vstack([np.zeros(4), np.eye(4)]))
        return np.abs(model.get_loadings().to_numpy() - (slopes[1:] - slopes[0]).T).max()

    def norms(model):
        return has_batch_norm(model.module.z_encoder), has_batch_norm(model.module.decoder.factor_regressor)

    assert norms(ours) == (where in ("both", "encoder"), where in ("both", "decoder"))
    assert norms(stock) == (True, True), "whatever was asked for"
    assert error_of_loadings(ours) < 1e-5
    assert error_of_loadings(stock) > 0.05


@pytest.mark.parametrize(("dispersion", "error"), [("gene-cell", TypeError), ("gene-label", RuntimeError)])
def test_dispersion_of_a_cell_or_a_label_trains_and_is_used(dispersion, error):
    # T6
    adata = covariate_counts(n_batches=3)
    for cls in (LinearSCVI, LDVAE):
        cls.setup_anndata(adata, batch_key="batch", labels_key="type")
        model = cls(adata, n_latent=4, dispersion=dispersion)
        if cls is LinearSCVI:
            with pytest.raises(error):
                model.train(2, **SHORT)
        else:
            model.train(2, **SHORT)
    seen = []
    model.module.decoder.register_forward_hook(lambda _layer, inputs, _output: seen.append(inputs[1]))
    theta = model.get_likelihood_parameters()["dispersions"]
    (z,) = seen
    expected = network64(model, z.numpy(), adata.obs, "none", 1.0).parts["theta"]
    np.testing.assert_allclose(theta, expected, rtol=1e-4)
    assert len(np.unique(theta[:, 0].round(6))) == (60 if dispersion == "gene-cell" else 2)


@pytest.mark.parametrize("what", ["categorical", "continuous", "size factor"])
def test_covariates_and_size_factors_are_registered_and_used(what):
    # T7
    adata = covariate_counts(n_batches=3)
    setup = setup_arguments(what, size_factor=what == "size factor")
    with pytest.raises(TypeError, match="unexpected keyword"):
        LinearSCVI.setup_anndata(adata.copy(), **setup)
    model = untrained(adata, setup=setup)
    z = model.get_latent_representation()
    library = adata.obs["size"].to_numpy() if what == "size factor" else 1.0
    expected = network64(model, z, adata.obs, what, library).parts["rate"].numpy()
    size = "latent" if what == "size factor" else 1
    got = model.get_normalized_expression(use_posterior_mean=True, library_size=size)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)

    other = adata.obs.copy()
    other["lane"], other["age"] = other["lane"].to_numpy()[::-1], other["age"] + 1
    other["size"] = 2 * other["size"]
    library = other["size"].to_numpy() if what == "size factor" else 1.0
    moved = model.decode(z, batch=other["batch"], covariates=covariates_of(other, what), library_size=library)
    np.testing.assert_allclose(moved, network64(model, z, other, what, library).parts["rate"], rtol=1e-4, atol=1e-6)
    assert np.abs(moved.to_numpy() - expected).max() > 0.01


@pytest.mark.parametrize(
    "option",
    [
        {"encode_covariates": True},
        {"use_layer_norm": "encoder"},
        {"var_activation": softplus},
        {"extra_encoder_kwargs": {"activation_fn": torch.nn.Tanh}},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_of_the_network_are_honoured(option):
    # T8
    adata = counts(n_batches=3)
    adata.obs["batch"] = "b1"
    adata.obs.loc[adata.obs_names[1::2], "batch"] = "b2"
    adata.X = sparse.csr_matrix(np.repeat(dense(adata)[::2], 2, axis=0).astype(np.float32))  # twins in either batch

    def posterior(cls, **kwargs):
        model = untrained(adata.copy(), cls=cls, **kwargs)
        return model.get_latent_representation(return_dist=True), model.module.z_encoder

    (mean, variance), _ = posterior(LDVAE)
    (new_mean, new_variance), encoder = posterior(LDVAE, **option)
    for ignored, original in zip(posterior(LinearSCVI, **option)[0], posterior(LinearSCVI)[0], strict=True):
        np.testing.assert_array_equal(ignored, original)

    name = next(iter(option))
    twins_differ = np.abs(new_mean[::2] - new_mean[1::2]).max() > 1e-3
    assert twins_differ == (name == "encode_covariates")
    if name == "var_activation":
        np.testing.assert_allclose(new_mean, mean)
        before = np.log(variance - encoder.var_eps)
        np.testing.assert_allclose(new_variance, np.logaddexp(0, before) + encoder.var_eps, rtol=1e-3)
    kinds = {type(layer) for layer in encoder.modules()}
    assert (torch.nn.LayerNorm in kinds) == (name == "use_layer_norm")
    assert (torch.nn.Tanh in kinds) == (name == "extra_encoder_kwargs")


def test_options_that_cannot_be_honoured_raise():
    # T8
    adata = counts(n_batches=3)
    stock = built(
        adata.copy(), LinearSCVI, extra_decoder_kwargs={"activation_fn": torch.nn.Tanh}, use_layer_norm="both"
    )
    assert list(stock.module.state_dict()) == list(built(adata.copy(), LinearSCVI).module.state_dict()), "ignored"
    for option in ({"extra_decoder_kwargs": {"activation_fn": torch.nn.Tanh}}, {"use_layer_norm": "both"}):
        with pytest.raises(ValueError, match=next(iter(option))):
            built(adata.copy(), **option)
    with pytest.raises(TypeError, match="LDVAE has no argument 'n_hiden'"):
        built(adata.copy(), n_hiden=3)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        built(adata.copy(), LinearSCVI, batch_representation="embedding").train(1, **SHORT)
    model = untrained(adata, batch_representation="embedding", setup={"labels_key": "batch"})
    z = model.get_latent_representation()
    obs = adata.obs.assign(type=adata.obs["batch"])
    expected = network64(model, z, obs, "none", 1.0).parts["scale"]
    np.testing.assert_allclose(model.get_normalized_expression(use_posterior_mean=True), expected, atol=1e-6)


def test_a_decoder_without_intercept_is_named_and_auto_starts_at_the_mean_expression():
    # T13
    adata = counts()
    mean = dense(adata).mean(axis=0)

    def at_origin(model):
        return softmax(logits(model, np.zeros((1, 4)))[0])

    stock = built(adata.copy(), LinearSCVI, use_batch_norm=False)
    stock.train(5, **SHORT)
    np.testing.assert_allclose(at_origin(stock), 1 / 20, rtol=1e-6, err_msg="all genes alike, and no word of it")
    with pytest.warns(UserWarning, match="leaves genes without an intercept"):
        built(adata.copy(), use_batch_norm=False)
    with pytest.warns(UserWarning, match="before a batch norm does nothing"):
        built(adata.copy(), bias=True)
    for use_batch_norm in (False, "encoder"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = built(adata.copy(), use_batch_norm=use_batch_norm, bias="auto")
        # A gene without counts is given half a count.
        np.testing.assert_allclose(at_origin(model), mean / mean.sum(), rtol=0.02, atol=5e-4)

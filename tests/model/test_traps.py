"""Reading a model: what LinearSCVI gets wrong, shown wrong there and right here. T1 to T36 number the page on defects.

Others are in ``test_traps_densities.py``, ``test_traps_options.py`` and ``test_traps_training.py``.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import log_softmax, softmax
from scvi.model import LinearSCVI
from scvi.module import LDVAE as ScviLDVAE
from torch.distributions import Normal, kl_divergence

from ldvae_ext.model import LDVAE
from tests.helpers import brute_force_ablation, counts, network, untrained
from tests.reference import covariate_counts, setup_arguments
from tests.traps import codes, dense, encoded, logits, pair


def test_expression_can_be_decoded_without_sampling():
    # T1
    adata = counts(n_batches=3)
    stock, ours = pair(adata)
    z = encoded(ours)[0].loc.numpy()
    expected = network(ours, z, codes(adata), 1.0).scale.numpy()

    def expression(model):
        return model.get_normalized_expression(use_posterior_mean=True, return_numpy=True)

    assert np.abs(expression(stock) - expected).max() > 0.02, "the argument is swallowed"
    assert np.abs(expression(stock) - expression(stock)).max() > 0.02, "one draw, another at each call"
    np.testing.assert_array_equal(expression(ours), expression(ours))
    np.testing.assert_allclose(expression(ours), expected, atol=1e-6)


def test_decoding_needs_the_intercept_of_a_batch_and_says_so():
    # T2
    adata = counts(n_batches=3)
    stock, ours = pair(adata)
    z, loadings = encoded(stock)[0].loc.numpy(), stock.get_loadings().to_numpy()
    expected = network(stock, z, codes(adata), 1.0).scale.numpy()
    layer, batch_norm = stock.module.decoder.factor_regressor.fc_layers[0][:2]
    gamma, beta, mean, var = (
        value.detach().numpy()
        for value in (batch_norm.weight, batch_norm.bias, batch_norm.running_mean, batch_norm.running_var)
    )
    shift = beta - gamma * mean / np.sqrt(var + batch_norm.eps)
    assert np.abs(softmax(z @ loadings.T, axis=1) - expected).max() > 0.05, "loadings alone are no decoder"
    assert np.abs(softmax(z @ loadings.T + shift, axis=1) - expected).max() > 0.01, "nor with the batch norm's shift"
    assert layer.weight.shape[1] == 4 + 3, "the columns of the batches, which get_loadings leaves out"
    with pytest.raises(AttributeError):
        stock.get_decoder()
    np.testing.assert_allclose(ours.get_decoder().scale(z, adata.obs["batch"]), expected, atol=1e-6)
    with pytest.raises(ValueError, match="`batch` is needed"):
        ours.get_decoder().scale(z)


def turned(model):
    """The same function of the cells, written differently: latents permuted and turned, loadings shifted per factor."""
    other = LDVAE.from_linear_scvi(model)
    order, sign = [2, 0, 3, 1], torch.tensor([1.0, -1.0, -1.0, 1.0])
    encoder, layer = other.module.z_encoder, other.module.decoder.factor_regressor.fc_layers[0][0]
    with torch.no_grad():
        for part, factor in ((encoder.mean_encoder, sign), (encoder.var_encoder, torch.ones(4))):
            part.weight.copy_(part.weight[order] * factor[:, None])
            part.bias.copy_(part.bias[order] * factor)
        layer.weight[:, :4] = layer.weight[:, order] * sign + torch.tensor([3.0, -2.0, 1.0, 0.5])
    return other


def test_exported_loadings_do_not_depend_on_how_the_network_writes_them():
    # T15
    stock = untrained(counts(n_batches=3), cls=LinearSCVI, use_batch_norm=False)
    ours, other = LDVAE.from_linear_scvi(stock), turned(stock)
    exports = []
    for model in (ours, other):
        model.export_to_anndata()
        exports.append({k: model.adata.obsm.get(k, model.adata.varm.get(k)) for k in ("X_ldvae", "ldvae_loadings")})
        exports[-1]["kl"] = model.adata.uns["ldvae"]["statistics"]["kl"]
    np.testing.assert_allclose(
        ours.get_normalized_expression(use_posterior_mean=True),
        other.get_normalized_expression(use_posterior_mean=True),
        atol=1e-6,
    )
    a, b = (np.sort(model.get_loadings().to_numpy(), axis=1) for model in (stock, other))
    assert np.abs(a - b).max() > 1, "the same function, and loadings that no one would take for the same"
    for name, value in exports[0].items():
        np.testing.assert_allclose(exports[1][name], value, atol=1e-5, err_msg=name)
    loadings = exports[0]["ldvae_loadings"].astype(float)
    np.testing.assert_allclose(loadings.mean(axis=0), 0, atol=1e-6)
    assert ((loadings**3).sum(axis=0) > 0).all()
    assert (np.diff(exports[0]["kl"]) < 0).all()


def test_reconstruction_error_is_a_negative_log_likelihood_and_can_be_repeated():
    # T16
    adata = counts(n_batches=3)
    stock, ours = pair(adata, use_observed_lib_size=True)
    x, z = dense(adata), encoded(ours)[0].loc.numpy()
    expected = -network(ours, z, codes(adata), x.sum(axis=1)).log_prob(torch.as_tensor(x)).sum(dim=-1).numpy()

    def error(model, **kwargs):
        return model.get_reconstruction_error(return_mean=False, **kwargs)["reconstruction_loss"].numpy()

    assert "higher is better" in " ".join(LinearSCVI.get_reconstruction_error.__doc__.split())
    assert "*lower* is better" in LDVAE.get_reconstruction_error.__doc__
    assert not np.allclose(error(stock), error(stock), atol=0.1)
    np.testing.assert_array_equal(error(ours, use_posterior_mean=True), error(ours, use_posterior_mean=True))
    np.testing.assert_allclose(error(ours, use_posterior_mean=True), expected, rtol=1e-5)
    with torch.no_grad():
        ours.module.decoder.factor_regressor.fc_layers[0][0].weight[0] += 20
    assert error(ours, use_posterior_mean=True).mean() > expected.mean(), "a worse model has more of it"


def test_parameters_and_correlations_of_a_poisson_are_those_of_its_rate():
    # T17
    stock, ours = pair(counts(n_batches=3), gene_likelihood="poisson")
    for method in ("get_likelihood_parameters", "get_feature_correlation_matrix"):
        with pytest.raises(AttributeError, match="theta"):
            getattr(stock, method)()
    seen = []
    ours.module.decoder.register_forward_hook(lambda _layer, inputs, _output: seen.append(inputs[1:]))
    parameters = ours.get_likelihood_parameters(n_samples=3)
    (drawn,) = seen
    z, library, batch = (value.numpy().astype(float) for value in drawn)
    expected = [network(ours, z[s], batch, np.exp(library[s]).ravel()).rate.numpy() for s in range(3)]
    assert parameters.keys() == {"mean"}
    np.testing.assert_allclose(parameters["mean"], expected, rtol=1e-4, atol=1e-9)

    seen.clear()
    correlation = ours.get_feature_correlation_matrix(n_samples=3, correlation_type="pearson")
    (drawn,) = seen
    z, _, batch = (value.numpy().astype(float) for value in drawn)
    rates = np.concatenate([network(ours, z[s], batch, 1000.0).scale.numpy() for s in range(3)])
    np.testing.assert_allclose(correlation, np.corrcoef(rates, rowvar=False), atol=1e-4)


def test_a_logistic_normal_latent_has_a_deterministic_value_on_the_simplex():
    # T20
    adata = counts(n_batches=3)
    stock, ours = pair(adata, latent_distribution="ln")
    u = encoded(ours)[0].loc.numpy().astype(float)
    assert np.abs(stock.get_latent_representation() - stock.get_latent_representation()).max() > 1e-3
    got = ours.get_latent_representation(use_posterior_mean=True)
    np.testing.assert_array_equal(got, ours.get_latent_representation(use_posterior_mean=True))
    np.testing.assert_allclose(got, softmax(u, axis=1), atol=1e-6)
    without = u.copy()
    without[:, 1] = 0
    decoded = ours.decode(softmax(without, axis=1), batch=adata.obs["batch"])
    np.testing.assert_allclose(ours.get_ablated_expression("Z_1"), decoded, atol=1e-6)
    np.testing.assert_allclose(
        ours.ablate().X, brute_force_ablation(ours, ours.adata, np.zeros(4)), rtol=1e-3, atol=1e-3
    )


def test_kl_of_each_latent_is_that_of_torch():
    # T24
    stock, ours = pair(counts(n_batches=3))
    with pytest.raises(AttributeError):
        stock.get_latent_kl()
    with pytest.raises(TypeError, match="ascending"):
        np.argsort(np.zeros(3), ascending=False)  # the recipe of the forum
    qz = encoded(ours)[0]
    expected = kl_divergence(qz, Normal(torch.zeros_like(qz.loc), torch.ones_like(qz.scale)))
    np.testing.assert_allclose(ours.get_latent_kl(), expected, rtol=1e-4, atol=1e-5)
    _, second = ours.get_latent_representation(return_dist=True)
    np.testing.assert_allclose(second, qz.scale.square(), rtol=1e-6, err_msg="variances, not standard deviations")


def test_change_of_expression_along_a_factor_is_the_loading_less_its_mean_over_expression():
    # T25
    stock, ours = pair(counts())
    h = 0.25
    at_0 = log_softmax(logits(ours, np.zeros((1, 4))), axis=1)
    up, down = (log_softmax(logits(ours, sign * h * np.eye(4)), axis=1) for sign in (1, -1))
    change = ((up - down) / (2 * h)).T
    loadings, rho = stock.get_loadings().to_numpy(), np.exp(at_0[0])
    assert np.abs(loadings - change).max() > 0.1, "a loading is no change of expression"
    assert (np.sign(loadings) != np.sign(change)).any(), "not even its direction"
    exact = loadings - rho @ loadings
    np.testing.assert_allclose(change, exact, atol=0.05)

    expected = rho[:, None] * exact * np.abs(exact)
    information = ours.get_decoder().gene_information()
    np.testing.assert_allclose(information, expected / np.abs(expected).sum(axis=0), rtol=1e-3, atol=1e-6)
    shares = ours.decode(np.vstack([np.zeros(4), np.eye(4)]), return_numpy=True)
    np.testing.assert_allclose(shares[0], rho, atol=1e-6)


def test_loadings_leave_out_the_columns_of_all_covariates():
    # T26
    adata = covariate_counts(n_batches=3)
    model = untrained(adata, setup=setup_arguments("categorical"))
    assert ScviLDVAE.get_loadings(model.module).shape == (20, 4 + 3), (
        "the levels of the covariate are taken for latents"
    )
    loadings = model.get_loadings()
    assert loadings.columns.tolist() == ["Z_0", "Z_1", "Z_2", "Z_3"]
    steps = logits(model, np.vstack([np.zeros(4), np.eye(4)]), 0, 0, 0)
    np.testing.assert_allclose(loadings, (steps[1:] - steps[0]).T, atol=1e-5)


GETTERS = {
    "get_latent_representation": {"give_mean": False},
    "get_normalized_expression": {"n_samples": 2},
    "get_likelihood_parameters": {},
    "get_feature_correlation_matrix": {"n_samples": 2},
    "get_elbo": {},
    "get_marginal_ll": {"n_mc_samples": 4, "n_mc_samples_per_pass": 4},
    "get_reconstruction_error": {},
    "get_latent_library_size": {"give_mean": False},
    "get_aggregated_posterior": {},
    "posterior_predictive_sample": {},
    "differential_expression": {"groupby": "batch", "group1": "b1", "n_samples_overall": 50, "silent": True},
    "differential_abundance": {"sample_key": "batch"},
    "get_latent_kl": {},
    "ablate": {},
    "get_ablated_expression": {"latents": "Z_1"},
}
CASES = [*GETTERS.items()] + [
    (name, {"use_posterior_mean": True})
    for name in ("get_latent_representation", "get_normalized_expression", "get_reconstruction_error")
]


def answer(model, name, kwargs):
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - scvi-tools' own generator
    out = getattr(model, name)(**kwargs)
    if name == "differential_abundance":
        out = model.adata.obsm.pop("da_log_probs")
    if name == "get_aggregated_posterior":
        out = out.component_distribution.base_dist.loc
    if isinstance(out, dict):
        out = np.concatenate([np.ravel(v) for v in out.values()])
    if isinstance(out, pd.DataFrame):
        out = out.select_dtypes("number")
    out = getattr(out, "X", out)
    return np.asarray(out.todense() if hasattr(out, "todense") else out, dtype=float)


@pytest.mark.parametrize(
    ("name", "kwargs"), CASES, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_getters_answer_in_evaluation_mode_and_leave_the_mode_as_it_was(name, kwargs):
    # T23
    stock, ours = pair(counts(n_batches=3))
    expected = answer(ours, name, kwargs)
    before = {key: value.clone() for key, value in ours.module.state_dict().items()}
    ours.module.train()
    np.testing.assert_allclose(answer(ours, name, kwargs), expected, rtol=1e-6, atol=1e-7)
    assert all(layer.training for layer in ours.module.modules())
    for key, value in before.items():
        torch.testing.assert_close(ours.module.state_dict()[key], value, rtol=0, atol=0)
    if name == "get_normalized_expression" and "n_samples" in kwargs:
        right = answer(stock, name, kwargs)
        stock.module.train()
        assert np.abs(answer(stock, name, kwargs) - right).max() > 0.01

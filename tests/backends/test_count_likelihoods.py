"""All forms of a count likelihood against the reference, ``core.log_likelihood`` in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scvi.distributions import NegativeBinomial, Normal, Poisson, ZeroInflatedNegativeBinomial

from ldvae_ext.backends.counts import Counts
from ldvae_ext.backends.decoder_head import head_loss
from ldvae_ext.backends.likelihood import negative_log_likelihood
from ldvae_ext.backends.softmax_likelihood import softmax_negative_log_likelihood
from ldvae_ext.core import LinearDecoder, ablation_effects, log_likelihood
from ldvae_ext.kernels.threads import compiled

LIKELIHOODS = ["nb", "zinb", "poisson"]
N_CELLS, N_GENES = 40, 24


class Case:
    """Counts of up to 200, beyond the tables of gamma functions, and parameters over several orders of magnitude."""

    def __init__(self, likelihood, seed=0):
        rng = np.random.default_rng(seed)
        self.likelihood = likelihood
        self.logits = rng.normal(0, 2, (N_CELLS, N_GENES))
        self.library = rng.gamma(2, 100, N_CELLS)
        share = np.exp(self.logits) / np.exp(self.logits).sum(axis=1, keepdims=True)
        self.mu = self.library[:, None] * share
        self.x = rng.poisson(rng.gamma(0.5, 8, self.mu.shape)).astype(float)
        self.x[0, 0], self.x[1] = 200, 0
        self.theta = None if likelihood == "poisson" else np.exp(rng.normal(0, 1.5, N_GENES))
        self.dropout = rng.normal(0, 2, self.mu.shape) if likelihood == "zinb" else None

    @property
    def reference(self):
        return -log_likelihood(self.likelihood, self.x, self.mu, self.theta, self.dropout).sum(axis=1)

    def tensors(self, dtype):
        """Counts, and the arrays of the given names as tensors."""

        def tensor(value):
            return None if value is None else torch.as_tensor(value).to(dtype)

        return Counts.of(tensor(self.x)), tensor

    def scvi_tools(self):
        mu, x = torch.as_tensor(self.mu), torch.as_tensor(self.x)
        if self.likelihood == "poisson":
            distribution = Poisson(mu)
        elif self.likelihood == "nb":
            distribution = NegativeBinomial(mu=mu, theta=torch.as_tensor(self.theta))
        else:
            parameters = {"theta": torch.as_tensor(self.theta), "zi_logits": torch.as_tensor(self.dropout)}
            distribution = ZeroInflatedNegativeBinomial(mu=mu, **parameters)
        return -distribution.log_prob(x).sum(-1).numpy()

    def of_means(self, dtype):
        counts, tensor = self.tensors(dtype)
        given = tensor(self.mu), tensor(self.theta), tensor(self.dropout)
        return negative_log_likelihood(self.likelihood, counts, *given).numpy()

    def of_logits(self, dtype):
        counts, tensor = self.tensors(dtype)
        given = tensor(self.logits), tensor(np.log(self.library)[:, None]), tensor(self.theta), tensor(self.dropout)
        return softmax_negative_log_likelihood(self.likelihood, counts, *given).numpy()

    def compiled(self):
        """The kernels, with one input of the decoder for each cell, so that any logits are an affine map of the inputs."""
        counts, tensor = self.tensors(torch.float32)
        zeros, inputs = torch.zeros(N_GENES), torch.eye(N_CELLS)
        log_theta = None if self.theta is None else tensor(np.log(self.theta))[None]
        dropout = None if self.dropout is None else (tensor(self.dropout), zeros)
        log_library = tensor(np.log(self.library))
        return head_loss(counts, inputs, tensor(self.logits), zeros, log_library, log_theta, None, dropout).numpy()

    def effects(self, *, on):
        """Changes of the likelihood in an ablation, from logits of 0 to those of the case."""
        decoder = LinearDecoder(
            weight_gk=self.logits.T,
            intercept_bg=np.zeros((1, N_GENES)),
            genes=[f"gene_{g}" for g in range(N_GENES)],
            batches=["0"],
            factors=[f"Z_{n}" for n in range(N_CELLS)],
            likelihood=self.likelihood,
            theta_bg=None if self.theta is None else self.theta[None],
            dropout_weight_gk=None if self.dropout is None else self.dropout.T,
            dropout_intercept_bg=None if self.dropout is None else np.zeros((1, N_GENES)),
        )
        with compiled(on=on):
            batch, value = np.zeros(N_CELLS, dtype=int), np.zeros(N_CELLS)
            effects = ablation_effects(decoder, self.x, np.eye(N_CELLS), self.library, batch, value, np.arange(N_CELLS))
        return np.diag(effects)

    @property
    def reference_effects(self):
        even = np.repeat(self.library[:, None] / N_GENES, N_GENES, axis=1)
        without = -log_likelihood(self.likelihood, self.x, even, self.theta, self.dropout).sum(axis=1)
        return without - self.reference


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_reference_is_the_likelihood_of_scvi_tools(likelihood):
    case = Case(likelihood)
    case.mu[0] = 1e-12  # scvi-tools' eps decides here
    np.testing.assert_allclose(case.reference, case.scvi_tools(), rtol=1e-10)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 5e-6)])
def test_the_forms_of_torch_agree_with_the_reference(likelihood, dtype, rtol):
    case = Case(likelihood)
    np.testing.assert_allclose(case.of_means(dtype), case.reference, rtol=rtol)
    np.testing.assert_allclose(case.of_logits(dtype), case.reference, rtol=rtol)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_kernels_agree_with_the_reference(likelihood):
    case = Case(likelihood)
    np.testing.assert_allclose(case.compiled(), case.reference, rtol=5e-6)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_changes_of_an_ablation_agree_with_the_reference(likelihood):
    case = Case(likelihood)
    expected = case.reference_effects
    np.testing.assert_allclose(case.effects(on=False), expected, atol=1e-9 * np.abs(expected).max())
    np.testing.assert_allclose(case.effects(on=True), expected, atol=1e-5 * np.abs(expected).max())


def test_the_normal_reference_is_the_likelihood_of_scvi_tools():
    rng = np.random.default_rng(0)
    x, mu, sd = rng.normal(size=(5, 7)), rng.normal(size=(5, 7)), np.exp(rng.normal(size=7))
    expected = Normal(torch.as_tensor(mu), torch.as_tensor(sd)).log_prob(torch.as_tensor(x)).numpy()
    np.testing.assert_allclose(log_likelihood("normal", x, mu, sd), expected, rtol=1e-10, atol=1e-10)

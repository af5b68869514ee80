"""Results do not depend on the number of processes that load minibatches."""

from __future__ import annotations

import numpy as np
import pytest
import scvi

from ldvae_ext.model import LDVAE
from tests.helpers import TRAIN, counts

# Lightning and torch advise on the number of workers; a fork of a process with threads is torch's own way.
pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create .* worker processes:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*persistent_workers:UserWarning"),
]
GETTERS = {
    "latents": lambda m: m.get_latent_representation(),
    "kl": lambda m: m.get_latent_kl().to_numpy(),
    "expression": lambda m: m.get_normalized_expression(use_posterior_mean=True).to_numpy(),
    "sampled expression": lambda m: m.get_normalized_expression(n_samples=2, return_numpy=True),
    "elbo": lambda m: np.array(float(m.get_elbo())),
    "ablation": lambda m: m.ablate().X,
    "ablation by samples": lambda m: m.ablate(use_posterior="samples", n_samples=2, seed=0).X,
    "stats": lambda m: m.get_factor_stats().factors.select_dtypes("number").to_numpy(),
}


def with_workers(number, monkeypatch, compute):
    monkeypatch.setattr(scvi.settings, "dl_num_workers", number)
    scvi.settings.seed = 0
    try:
        return compute()
    finally:
        monkeypatch.undo()


def trained(backend):
    LDVAE.setup_anndata(adata := counts(40, 12, 3), batch_key="batch")
    model = LDVAE(adata, n_latent=2, n_hidden=8)
    model.train(2, kl_warmup=1, batch_size=16, check_val_every_n_epoch=1, backend=backend, **TRAIN)
    return model


@pytest.mark.parametrize("backend", ["numba", "torch", "scvi"])
def test_training_curves_and_weights_do_not_depend_on_the_number_of_workers(backend, monkeypatch):
    none, *others = (with_workers(number, monkeypatch, lambda: trained(backend)) for number in (0, 1, 2))
    for other in others:
        assert set(other.history) == set(none.history)
        for name, table in none.history.items():
            np.testing.assert_array_equal(other.history[name].to_numpy(), table.to_numpy(), err_msg=name)
        for name, value in none.module.state_dict().items():
            np.testing.assert_array_equal(other.module.state_dict()[name], value, err_msg=name)


@pytest.fixture(scope="module")
def model():
    scvi.settings.seed = 0
    return trained("auto")


@pytest.mark.parametrize("name", GETTERS)
def test_results_do_not_depend_on_the_number_of_workers(model, name, monkeypatch):
    none, *others = (with_workers(number, monkeypatch, lambda: GETTERS[name](model)) for number in (0, 1, 2))
    for other in others:
        np.testing.assert_array_equal(other, none)

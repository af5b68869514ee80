from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers import counts, untrained


@pytest.mark.parametrize("use_observed_lib_size", [True, False])
def test_posterior_is_that_of_inference_without_its_sample(use_observed_lib_size):
    model = untrained(counts(n_batches=3), use_observed_lib_size=use_observed_lib_size)
    (tensors,) = model._make_data_loader(model.adata, batch_size=100)
    posterior = model.module.posterior(tensors)
    with torch.no_grad():
        out = model.module.inference(**model.module._get_inference_input(tensors))
    np.testing.assert_array_equal(posterior.mean, out["qz"].loc)
    np.testing.assert_array_equal(posterior.variance, out["qz"].scale.square())
    expected = torch.log(tensors["X"].sum(1)) if use_observed_lib_size else out["ql"].loc.squeeze(-1)
    np.testing.assert_allclose(posterior.log_library, expected, rtol=1e-6)
    np.testing.assert_array_equal(posterior.mean, model.module.posterior(tensors).mean)


def test_modes_come_back_also_after_an_error():
    module = untrained(counts()).module
    module.train()
    module.decoder.eval()

    def fail():
        with module.evaluating():
            assert not any(layer.training for layer in module.modules())
            msg = "on the way"
            raise RuntimeError(msg)

    with pytest.raises(RuntimeError, match="on the way"):
        fail()
    assert module.training
    assert module.z_encoder.encoder.training
    assert not module.decoder.factor_regressor.training


@pytest.mark.parametrize("use_batch_norm", [True, False])
def test_loadings_are_no_window_into_the_network(use_batch_norm):
    module = untrained(counts(), use_batch_norm=use_batch_norm, bias=True).module
    loadings = module.get_loadings()
    before = loadings.copy()
    with torch.no_grad():
        module.decoder.factor_regressor.fc_layers[0][0].weight.add_(1.0)
    np.testing.assert_array_equal(loadings, before)

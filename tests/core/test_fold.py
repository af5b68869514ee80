from __future__ import annotations

import numpy as np
import pytest

from ldvae_ext.core import BatchNorm, RawLinear


@pytest.fixture
def batch_norm():
    rng = np.random.default_rng(1)
    return BatchNorm(
        running_mean=rng.normal(size=5),
        running_var=rng.gamma(2, 1, 5),
        gamma=rng.normal(size=5),
        beta=rng.normal(size=5),
        eps=1e-3,
    )


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("n_batches", [1, 3])
@pytest.mark.parametrize("with_batch_norm", [True, False])
def test_fold_equals_the_layer_written_out(batch_norm, with_bias, n_batches, with_batch_norm):
    rng = np.random.default_rng(0)
    n_columns = n_batches if n_batches > 1 else 0
    weight, bias = rng.normal(size=(5, 2 + n_columns)), rng.normal(size=5) if with_bias else None
    raw = RawLinear(weight=weight, bias=bias, batch_norm=batch_norm if with_batch_norm else None)
    folded, intercept, effects = raw.fold(2)
    assert intercept.shape == (n_batches, 5)
    for b in range(n_batches):
        z = rng.normal(size=2)
        one_hot = np.eye(n_batches)[b][:n_columns]
        a = weight @ np.concatenate([z, one_hot]) + (0 if bias is None else bias)
        if with_batch_norm:
            a = (
                batch_norm.gamma * (a - batch_norm.running_mean) / np.sqrt(batch_norm.running_var + 1e-3)
                + batch_norm.beta
            )
        np.testing.assert_allclose(folded @ z + intercept[b], a, atol=1e-12)


def test_parts_cannot_be_written_to(batch_norm):
    raw = RawLinear(weight=np.ones((5, 2)), batch_norm=batch_norm)
    for array in (raw.weight, batch_norm.beta):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_parts_of_other_lengths_are_an_error():
    with pytest.raises(ValueError, match=r"`bias` must have shape \(5,\); got \(4,\)"):
        RawLinear(weight=np.ones((5, 2)), bias=np.ones(4))

from __future__ import annotations

import numpy as np
import pytest

from ldvae_ext.core import BatchNorm, Covariate, RawLinear


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
    folded, intercept, _ = raw.fold(2)
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


@pytest.mark.grid
@pytest.mark.parametrize("with_batch_norm", [True, False])
@pytest.mark.parametrize("batches", ["one", "one-hot", "embedding", "embedding of one"])
@pytest.mark.parametrize("n_slopes", [0, 2])
@pytest.mark.parametrize("levels", [[], [3], [1], [2, 1, 4]])
def test_fold_with_covariates_equals_the_layer_written_out(batch_norm, with_batch_norm, batches, n_slopes, levels):
    """Columns in the order of the network: latents, slopes, batches, levels; a level that is alone has no column."""
    rng = np.random.default_rng(0)
    n_batches = 1 if batches.endswith("one") else 3
    embedding = rng.normal(size=(n_batches, 4)) if batches.startswith("embedding") else None
    seen_of_batch = np.eye(3) if embedding is None else embedding
    if batches == "one":
        seen_of_batch = np.zeros((1, 0))
    n_columns = 2 + n_slopes + seen_of_batch.shape[1] + sum(n for n in levels if n > 1)
    weight, bias = rng.normal(size=(5, n_columns)), rng.normal(size=5)
    raw = RawLinear(
        weight=weight, bias=bias, batch_norm=batch_norm if with_batch_norm else None, batch_embedding=embedding
    )
    covariates = [Covariate(f"c{i}") for i in range(n_slopes)]
    covariates += [Covariate(f"l{i}", [f"/{j}" for j in range(n)]) for i, n in enumerate(levels)]
    folded, intercept, effects = raw.fold(2, covariates)
    assert intercept.shape == (n_batches, 5)
    assert effects.shape == (n_slopes + sum(levels), 5)
    for b in range(n_batches):
        z, slopes, codes = rng.normal(size=2), rng.normal(size=n_slopes), [rng.integers(n) for n in levels]
        one_hot = [np.eye(n)[code] for n, code in zip(levels, codes)]
        seen = [z, slopes, seen_of_batch[b], *(hot for hot in one_hot if len(hot) > 1)]
        a = weight @ np.concatenate(seen) + bias
        if with_batch_norm:
            a = (a - batch_norm.running_mean) / np.sqrt(batch_norm.running_var + 1e-3) * batch_norm.gamma
            a = a + batch_norm.beta
        design = np.concatenate([slopes, *one_hot])
        np.testing.assert_allclose(folded @ z + intercept[b] + design @ effects, a, atol=1e-12)


def test_parts_go_into_arrays_and_back(batch_norm):
    whole = RawLinear(weight=np.ones((5, 6)), bias=np.arange(5), batch_norm=batch_norm, batch_embedding=np.eye(2))
    back = RawLinear.from_arrays({f"raw_{name}": value for name, value in whole.to_arrays().items()}, "raw_")
    for a, b in zip(whole.fold(4), back.fold(4), strict=True):
        np.testing.assert_array_equal(a, b)
    bare = RawLinear.from_arrays(RawLinear(weight=np.ones((5, 2))).to_arrays())
    assert bare.bias is bare.batch_norm is bare.batch_embedding is None
    assert RawLinear.from_arrays({}) is None

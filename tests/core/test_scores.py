from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse, stats

from ldvae_ext.core.scores import SlopeSums, log_normalised


@pytest.fixture
def cells():
    rng = np.random.default_rng(0)
    usage = rng.dirichlet(np.ones(3), 80)
    counts = rng.poisson(np.exp(usage @ rng.normal(0, 2, (3, 7)))).astype(float)
    return counts, usage


@pytest.mark.parametrize("container", [np.asarray, sparse.csr_array, sparse.csc_matrix])
@pytest.mark.parametrize("chunk", [80, 13])
def test_slopes_are_those_of_scipy(cells, container, chunk):
    counts, usage = cells
    sums = SlopeSums(7, 3)
    for start in range(0, 80, chunk):
        sums.add(container(counts[start : start + chunk]), usage[start : start + chunk])
    got = sums.scores()
    expression = stats.zscore(np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True)), axis=0)
    for g in range(7):
        for k in range(3):
            fit = stats.linregress(stats.zscore(usage[:, k]), expression[:, g])
            assert got.score_gk[g, k] == pytest.approx(fit.slope, abs=1e-10)
            assert got.error_gk[g, k] == pytest.approx(fit.stderr, abs=1e-10)


def test_constants_have_no_score_and_no_error(cells):
    counts, usage = cells
    counts[:, 2], usage[:, 1] = 0, 0.1
    sums = SlopeSums(7, 3)
    sums.add(counts, usage)
    got = sums.scores()
    assert (got.score_gk[2] == 0).all()
    assert np.isnan(got.error_gk[2]).all()
    assert (got.score_gk[:, 1] == 0).all()
    assert np.isnan(got.error_gk[:, 1]).all()
    assert np.isfinite(got.error_gk[0, 0])


def test_two_cells_have_no_standard_error(cells):
    sums = SlopeSums(7, 3)
    sums.add(cells[0][:2], cells[1][:2])
    assert np.isnan(sums.scores().error_gk).all()


def test_expression_is_the_log_of_counts_per_ten_thousand(cells):
    counts = cells[0]
    expected = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(log_normalised(counts).toarray(), expected)
    assert log_normalised(np.zeros((1, 4))).nnz == 0

"""Sums of explained deviance take counts in any form."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from ldvae_ext.core.explained import ExplainedSums, PooledProfile, cell_deviances, explained_sets
from ldvae_ext.core.plan import AblationRequest
from tests.core.decoders import full_decoder
from tests.core.test_plan import random_cells


@pytest.mark.grid
@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csr_array, sparse.csc_array])
@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint16])
@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson", "normal"])
def test_sparse_counts_explain_what_dense_ones_do(likelihood, dtype, form):
    decoder = full_decoder(0, 20, likelihood=likelihood, dispersion="gene")
    of_dense = random_cells(decoder, 30, 0, density=0.2)
    of_sparse = of_dense._replace(counts=form(of_dense.counts.astype(dtype)))
    before = of_sparse.counts.copy()
    plan = explained_sets(AblationRequest(decoder=decoder).plan())
    group_n, tables, shares = np.arange(30) % 3, [], []
    for cells in (of_dense, of_sparse):
        profile, sums = PooledProfile(*decoder.intercept_bg.shape), ExplainedSums(3, plan)
        profile.add(cells)
        sums.add(decoder, cells, np.arange(30), group_n, profile.share_bg)
        shares.append(profile.share_bg)
        tables.append(sums.columns(["a", "b", "c"], decoder.factors.tolist()))
    assert type(shares[1]) is np.ndarray
    np.testing.assert_allclose(shares[1], shares[0], rtol=1e-12)
    np.testing.assert_allclose(
        cell_deviances(decoder, of_sparse, shares[0]), cell_deviances(decoder, of_dense, shares[0]), rtol=1e-12
    )
    assert tables[1].keys() == tables[0].keys()
    for name in ("explained_deviance", "cumulative", "without_latents"):
        np.testing.assert_allclose(tables[1][name], tables[0][name], rtol=1e-9, atol=1e-9)
    assert (of_sparse.counts != before).nnz == 0

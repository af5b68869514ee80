"""Counts of each type and byte order of numpy, in each container."""

from __future__ import annotations

from functools import cache

import anndata as ad
import numpy as np
import pytest
import scvi
from scipy import sparse

from ldvae_ext import tl
from ldvae_ext.model import LDVAE
from tests.helpers import TRAIN, counts

NATIVE = ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "g"]
SWAPPED = [">i2", ">i4", ">i8", ">u2", ">u4", ">u8", ">f2", ">f4", ">f8"]
DENSE = {"C order": np.ascontiguousarray, "Fortran order": np.asfortranarray}
SPARSE = {
    "csr_matrix": sparse.csr_matrix,
    "csc_matrix": sparse.csc_matrix,
    "csr_array": sparse.csr_array,
    "csc_array": sparse.csc_array,
}
# scipy has neither float16 nor another byte order.
GRID = [(dtype, container) for dtype in NATIVE + SWAPPED for container in DENSE] + [
    (dtype, container) for dtype in NATIVE if dtype != "f2" for container in SPARSE
]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*KL weight|.*writable|.*Sparse CSR tensor support|.*values that are not integers"
)


def cells(dtype="f4", container="csr_matrix"):
    adata = counts(60, 12, n_batches=2)
    x = adata.X.toarray()
    x = (x > 0 if dtype == "?" else x).astype(dtype)
    return ad.AnnData({**DENSE, **SPARSE}[container](x), obs=adata.obs, var=adata.var)


def results(adata, **options):
    LDVAE.setup_anndata(adata, batch_key="batch")
    scvi.settings.seed = 0
    model = LDVAE(adata, n_latent=2, **options)
    model.train(1, **TRAIN, batch_size=32)
    model.export_to_anndata()
    return model, {
        "loss": model.history["elbo_train"].to_numpy(dtype=float),
        "prior": np.concatenate([model.module.library_log_means, model.module.library_log_vars]),
        "effects": model.ablate().X,
        "effects from the export": tl.ablate(adata).X,
        "deviance": model.get_explained_deviance().select_dtypes("number").to_numpy(dtype=float),
        "expression": model.get_normalized_expression(use_posterior_mean=True).to_numpy(),
    }


@cache
def expected(is_binary, bias):
    return results(cells("?" if is_binary else "f4"), **({"bias": "auto", "use_batch_norm": "encoder"} if bias else {}))


def assert_alike(found, reference):
    for name, value in reference.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


def test_the_grid_is_large_enough():
    assert len(GRID) >= 40


@pytest.mark.grid(1)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", GRID, ids="-".join)
def test_training_and_reading_are_those_of_float32(kind, bias):
    reference = expected(kind[0] == "?", bias)
    options = {"bias": "auto", "use_batch_norm": "encoder"} if bias else {}
    assert_alike(results(cells(*kind), **options)[1], reference[1])


@pytest.mark.parametrize("kind", GRID, ids="-".join)
def test_other_cells_are_read_too(kind):
    model, reference = expected(kind[0] == "?", bias=False)
    np.testing.assert_allclose(model.ablate(cells(*kind)).X, reference["effects"], rtol=1e-3, atol=1e-4)
    assert np.isfinite(float(model.get_elbo(cells(*kind))))


def test_totals_beyond_float16_are_summed():
    adata = counts(60, 12)
    adata.X = adata.X.toarray() * 2000
    LDVAE.setup_anndata(adata)
    prior = LDVAE(adata).module.library_log_means
    half = adata.copy()
    half.X = half.X.astype(np.float16)
    LDVAE.setup_anndata(half)
    np.testing.assert_allclose(LDVAE(half).module.library_log_means, prior, rtol=1e-3)

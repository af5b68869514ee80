"""Checkpoints that LinearSCVI wrote, of this scvi-tools and an older one, against what that scvi-tools computed.

``tests/golden/README.md`` says how they were made.
"""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from ldvae_ext import get
from ldvae_ext.core.likelihood import log_likelihood
from ldvae_ext.model import LDVAE

GOLDEN = Path(__file__).parents[1] / "golden"
VERSIONS = ["1.4.2", "1.5.1"]
CASES = ["default", "zinb", "encoder"]
LIBRARY = 500.0  # of make_checkpoints.py
READERS = ["saved data", "given data", "no data"]


def golden(version, case):
    """Folder of a checkpoint, and what its scvi-tools computed from it."""
    folder = GOLDEN / f"linear_scvi_{version}_{case}"
    with np.load(folder / "expected.npz") as arrays:
        expected = dict(arrays)
    made_with = dict(entry.split() for entry in expected["made_with"])
    assert made_with["scvi-tools"] == version
    # The training history is a pickled DataFrame, whose strings an older pandas cannot read.
    if int(made_with["pandas"].split(".")[0]) > int(pd.__version__.split(".")[0]):
        pytest.skip(f"written with pandas {made_with['pandas']}")
    return folder, expected


@pytest.fixture(params=VERSIONS)
def version(request):
    return request.param


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@pytest.fixture(params=READERS)
def loaded(request, version, case):
    """A checkpoint opened by LDVAE, data to read with it (None if it has its own), and what is expected."""
    folder, expected = golden(version, case)
    given = {
        "saved data": None,
        "given data": ad.read_h5ad(folder / "adata.h5ad"),
        "no data": False,
    }[request.param]
    model = LDVAE.load(folder, given)
    assert type(model) is LDVAE
    assert model.is_trained
    assert (model.adata is None) is (request.param == "no data")
    return model, ad.read_h5ad(folder / "adata.h5ad") if given is False else None, expected


def folded(expected):
    """Loadings by scvi-tools' decoder alone, up to a constant per factor: what a unit of a latent adds to the log-rate.

    The first latents of each batch are the origin and the unit vectors.
    """
    log_scale = np.log(expected["scale"].astype(np.float64))
    return center(log_scale[1:4] - log_scale[0]).T


def center(weight_kg):
    return weight_kg - weight_kg.mean(axis=1, keepdims=True)


def assert_decodes(model, expected):
    """The decoder of the model is the network that was saved."""
    decoder = model.get_decoder()
    z, batch = expected["z"], expected["batch"]
    assert decoder.batches.tolist() == ["CD4+/CD25 T", "b1", "b2"]
    np.testing.assert_allclose(decoder.scale(z, batch), expected["scale"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(decoder.rate(z, batch, library=LIBRARY), expected["rate"], rtol=1e-5, atol=1e-4)
    rows = pd.Categorical(batch, decoder.batches).codes if decoder.dispersion == "gene-batch" else np.zeros(len(z), int)
    np.testing.assert_allclose(decoder.theta_bg[rows], expected["theta"], rtol=1e-5)
    assert ("zi_logits" in expected) is (decoder.likelihood == "zinb")
    if decoder.likelihood == "zinb":
        np.testing.assert_allclose(decoder.dropout_logits(z, batch), expected["zi_logits"], atol=1e-5)


def assert_encodes(model, adata, expected):
    mean, variance = model.get_latent_representation(adata, return_dist=True)
    np.testing.assert_allclose(mean, expected["latent_mean"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(variance, expected["latent_variance"], rtol=1e-4, atol=1e-5)


def test_latents_are_those_that_linear_scvi_computed(loaded):
    assert_encodes(*loaded)


def test_decoder_is_the_network_that_linear_scvi_saved(loaded):
    model, _, expected = loaded
    assert_decodes(model, expected)


def test_history_comes_along(loaded):
    model, _, expected = loaded
    np.testing.assert_array_equal(model.history["elbo_train"].to_numpy(dtype=float).ravel(), expected["elbo_train"])


def test_loadings_are_those_of_linear_scvi_and_fold_the_batch_norm_where_it_did_not(version, case):
    folder, expected = golden(version, case)
    loadings = LDVAE.load(folder, False).get_loadings()
    assert loadings.columns.tolist() == ["Z_0", "Z_1", "Z_2"]
    assert loadings.index.tolist() == [f"gene{i}" for i in range(30)]
    np.testing.assert_allclose(center(loadings.to_numpy().T).T, folded(expected), atol=1e-5)
    if case == "encoder":
        # LinearSCVI gave the bare weights of a decoder with batch norm; with True it folds those of the same network.
        assert np.abs(loadings.to_numpy() - expected["loadings"]).max() > 0.05
        _, same_network = golden(version, "default")
        np.testing.assert_array_equal(same_network["scale"], expected["scale"])
        np.testing.assert_allclose(loadings, same_network["loadings"], rtol=1e-5, atol=1e-6)
    else:
        np.testing.assert_allclose(loadings, expected["loadings"], rtol=1e-6, atol=1e-7)


def test_library_and_likelihood_of_each_cell(version, case):
    folder, expected = golden(version, case)
    model = LDVAE.load(folder)
    loader = model._make_data_loader(model.adata, batch_size=model.adata.n_obs)
    log_library = model.module.posterior(next(iter(loader))).log_library
    np.testing.assert_allclose(log_library.exp(), expected["library"], rtol=1e-4)
    x = model.adata.X.toarray()
    if case == "zinb":
        np.testing.assert_allclose(expected["library"], x.sum(axis=1), rtol=1e-5)

    decoder, z, batch = model.get_decoder(), expected["latent_mean"], model.adata.obs["batch"]
    per_gene = log_likelihood(
        decoder.likelihood,
        x,
        decoder.rate(z, batch, library=expected["library"]),
        decoder.theta_bg[batch.cat.codes] if case == "zinb" else decoder.theta_bg,
        decoder.dropout_logits(z, batch) if case == "zinb" else None,
    )
    np.testing.assert_allclose(per_gene.sum(axis=1), expected["log_likelihood"], rtol=1e-4, atol=1e-2)


def test_differential_expression_runs(version, case):
    model = LDVAE.load(golden(version, case)[0])
    table = model.differential_expression(groupby="batch", group1="CD4+/CD25 T", silent=True)
    assert sorted(table.index) == sorted(model.adata.var_names)
    assert np.isfinite(table["bayes_factor"]).all()


def test_ablation_and_export_run(version, case):
    folder, expected = golden(version, case)
    model = LDVAE.load(folder)
    assert np.isfinite(model.ablate().X).all()
    model.export_to_anndata()
    factors = get.factors(model.adata)
    back = np.empty_like(expected["latent_mean"])
    back[:, factors["dimension"]] = model.adata.obsm["X_ldvae"] * factors["sign"].to_numpy()
    np.testing.assert_allclose(back, expected["latent_mean"], rtol=1e-4, atol=1e-5)
    by_name = get.loadings(model.adata)[["Z_0", "Z_1", "Z_2"]].to_numpy()
    signs = factors["sign"][["Z_0", "Z_1", "Z_2"]].to_numpy()
    np.testing.assert_allclose(by_name * signs, folded(expected), atol=1e-5)


@pytest.mark.parametrize("with_data", [True, False])
def test_saved_by_ldvae_it_opens_again(tmp_path, version, case, with_data):
    folder, expected = golden(version, case)
    first = LDVAE.load(folder, None if with_data else False)
    first.save(tmp_path / "m", save_anndata=with_data)
    again = LDVAE.load(tmp_path / "m", None if with_data else False)
    for name, value in first.module.state_dict().items():
        assert torch.equal(value, again.module.state_dict()[name]), name
    pd.testing.assert_frame_equal(again.get_loadings(), first.get_loadings())
    assert_decodes(again, expected)
    assert_encodes(again, None if with_data else ad.read_h5ad(folder / "adata.h5ad"), expected)


def test_checkpoints_are_small():
    files = [path for path in GOLDEN.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} >= {f"linear_scvi_{v}_{c}" for v in VERSIONS for c in CASES}
    assert max(path.stat().st_size for path in files) < 300_000

"""Counts to 1e6 for a gene, libraries from 1 to 1e8, dispersions of both extremes, large latents: all results are numbers."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scipy import sparse

from ldvae_ext import get, tl
from ldvae_ext.model import LDVAE
from tests.helpers import TRAIN

LIBRARIES = np.array([1.0, 2.0, 30.0, 1e3, 1e4, 1e6, 1e8])
# Natural logarithms of dispersions from 1e-8 to 1e8.
LOG_THETA = np.log([1e-8, 1e-4, 1.0, 1e4, 1e8])
N_GENES, N_CELLS = 110, 28


def extreme_cells(dtype=np.float32):
    """Cells whose totals are from 1 to 1e8; a quarter of the genes of the largest have 1e6 counts."""
    rng = np.random.default_rng(0)
    library_n = np.tile(LIBRARIES, N_CELLS // len(LIBRARIES))
    share = rng.gamma(0.3, 1.0, (N_CELLS, N_GENES)) + 1e-6
    x = np.minimum(np.round(share / share.sum(axis=1, keepdims=True) * library_n[:, None]), 1e6)
    x[np.arange(N_CELLS), rng.integers(0, N_GENES, N_CELLS)] += 1
    x[-1], x[0, :] = 1e6, 0
    x[0, 3] = 1
    labels = np.array(["T/NK", "B"])[np.arange(N_CELLS) % 2]
    return ad.AnnData(
        X=sparse.csr_matrix(x.astype(dtype)),
        obs=pd.DataFrame(
            {"batch": pd.Categorical(labels), "group": pd.Categorical(labels[::-1])},
            index=[f"c{i}" for i in range(N_CELLS)],
        ),
        var=pd.DataFrame(index=[f"g{i}" for i in range(N_GENES)]),
    )


def extreme_model(dtype=np.float32, *, scale=1.0, **options):
    """A model after a few steps, with dispersions of both extremes and, with a large ``scale``, large latents."""
    adata = extreme_cells(dtype)
    LDVAE.setup_anndata(adata, batch_key="batch")
    scvi.settings.seed = 0
    model = LDVAE(adata, n_latent=3, n_hidden=8, **options)
    model.train(2, batch_size=8, train_size=1.0, kl_warmup=1, **TRAIN)
    with torch.no_grad():
        if hasattr(model.module, "px_r") and options.get("gene_likelihood") != "poisson":
            theta = np.resize(LOG_THETA, model.module.px_r.shape)
            model.module.px_r.copy_(torch.as_tensor(theta, dtype=torch.float32))
        model.module.z_encoder.mean_encoder.weight *= scale
    return model


def check_finite(value, *, where="", allowed=()):
    """Fail if a table, array or AnnData holds a NaN or an infinity, unless it is in one of the allowed columns."""
    if isinstance(value, ad.AnnData):
        return check_finite(value.X, where=where)
    if isinstance(value, dict):
        for name, entry in value.items():
            check_finite(entry, where=f"{where}[{name}]")
    elif isinstance(value, pd.DataFrame):
        for name in value:
            if value[name].dtype.kind in "fiu" and name not in allowed:
                check_finite(value[name].to_numpy(), where=f"{where}.{name}")
    elif isinstance(value, (tuple, list)):
        for entry in value:
            check_finite(entry, where=where)
    elif value is not None and not isinstance(value, str):
        array = np.asarray(value.detach() if isinstance(value, torch.Tensor) else value)
        if array.dtype.kind in "fc":
            assert np.isfinite(array).all(), f"{where}: {np.count_nonzero(~np.isfinite(array))} of {array.size} values"
    return None


OPTIONS = {
    "nb": {},
    "zinb, gene-batch": {"gene_likelihood": "zinb", "dispersion": "gene-batch"},
    "poisson": {"gene_likelihood": "poisson"},
    "observed library, no batch norm": {"use_observed_lib_size": True, "use_batch_norm": False, "bias": True},
    "ln": {"latent_distribution": "ln"},
}
RESULTS = {
    "latents": lambda m: m.get_latent_representation(return_dist=True),
    "kl": lambda m: m.get_latent_kl(),
    "elbo": lambda m: float(m.get_elbo()),
    "reconstruction": lambda m: float(m.get_reconstruction_error()["reconstruction_loss"]),
    "marginal": lambda m: float(m.get_marginal_ll(n_mc_samples=5)),
    "expression": lambda m: m.get_normalized_expression(),
    "mean expression": lambda m: m.get_normalized_expression(use_posterior_mean=True, library_size=1e8),
    "parameters": lambda m: {k: v for k, v in m.get_likelihood_parameters().items() if k != "dispersions"},
    "samples": lambda m: m.posterior_predictive_sample().todense(),
    "loadings": lambda m: m.get_loadings(),
    "ablate": lambda m: m.ablate(),
    "ablate to 1e3": lambda m: m.ablate(mode="value", value=1e3),
    "ablate genes": lambda m: m.ablate_genes("group"),
    "explained deviance": lambda m: m.get_explained_deviance(),
    "factor stats": lambda m: m.get_factor_stats(),
    "populations": lambda m: m.get_population_loadings("group", "gradient"),
    "refined": lambda m: [m.get_refined_posterior().mean, m.get_refined_posterior().variance],
}


# scvi-tools' Poisson has no eps: where a float32 mean is 0, a count has the likelihood 0.
OF_NO_MEAN = ("elbo", "reconstruction", "marginal")


@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize("case", OPTIONS)
def test_results_of_extreme_cells_are_numbers(case, scale):
    model = extreme_model(scale=scale, **OPTIONS[case])
    for table in model.history.values():
        check_finite(table, where="history")
    for name, compute in RESULTS.items():
        if (case, scale) == ("poisson", 1e3) and name in OF_NO_MEAN:
            with pytest.warns(UserWarning, match="has values that are not finite"):
                assert abs(compute(model)) == np.inf
        else:
            check_finite(compute(model), where=name)


@pytest.mark.filterwarnings("ignore:A path is so long:UserWarning")
@pytest.mark.filterwarnings("ignore:From these genes, the decoder of the reference does not give:UserWarning")
@pytest.mark.parametrize(("dtype", "scale"), [(np.float32, 1.0), (np.float64, 1e3)])
@pytest.mark.parametrize("rotation", [None, "varimax", "promax"])
def test_what_is_exported_and_computed_from_exports_of_extreme_cells_is_a_number(dtype, scale, rotation):
    model = extreme_model(dtype, scale=scale)
    if rotation is not None:
        model.rotate(rotation)
    adata = model.adata
    model.export_to_anndata(stats=True)
    # Constant genes have no error of their scores.
    no_error = {"ldvae_scores_error"}
    for slot in ("obsm", "varm"):
        for name, value in getattr(adata, slot).items():
            if name not in no_error:
                check_finite(value, where=f"{slot}[{name}]")
    check_finite(adata.obs["ldvae_library"].to_numpy(), where="library")
    check_finite({name: value for name, value in adata.uns["ldvae"].items() if name != "decoder"}, where="uns")
    check_finite(tl.ablate(adata), where="tl.ablate")
    check_finite(tl.ablate_genes(adata, "group"), where="tl.ablate_genes")
    tl.rank_factors_groups(adata, "group")
    check_finite(get.rank_factors_groups_df(adata), where="ranking")
    for kind in ("gradient", "contribution", "path", "within"):
        tl.population_loadings(adata, "group", kind)
        check_finite(adata.varm["ldvae_population_loadings"], where=kind)
    check_finite(get.top_genes(adata), where="top genes")
    query = extreme_cells(dtype)
    tl.project(query, adata, batch="mean")
    for name in ("X_ldvae", "X_ldvae_var"):
        check_finite(query.obsm[name], where=f"projection {name}")
    check_finite(query.obs["ldvae_fit"].to_numpy(), where="fit")


def test_a_check_of_this_file_fails_on_a_nan():
    for value in (
        np.array([np.nan]),
        pd.DataFrame({"a": [np.inf]}),
        {"a": [np.array([np.nan])]},
        torch.tensor([np.inf]),
    ):
        with pytest.raises(AssertionError, match="1 of 1 values"):
            check_finite(value)

"""A small model with populations and batches, and rotations of it."""

from __future__ import annotations

import functools
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import scvi
import torch
from scipy.stats import ortho_group
from scvi.model import LinearSCVI

from ldvae_ext.model import LDVAE
from tests.helpers import TRAIN, counts

GROUPS = ["B", "CD4+/CD25 T", "NK"]


def grouped(n_cells=120, seed=0):
    adata = counts(n_cells, n_batches=3, seed=seed)
    rng = np.random.default_rng(seed + 7)
    codes = rng.permutation(np.arange(n_cells) % 3)
    # Populations differ in some genes, so that the latents carry something.
    x = adata.X.toarray()
    for p in range(3):
        x[np.ix_(codes == p, np.arange(4 * p + 1, 4 * p + 5))] *= 4
    adata.X = type(adata.X)(x)
    adata.obs["type"] = pd.Categorical.from_codes(codes, GROUPS)
    adata.obs.loc["cell3", "type"] = np.nan
    return adata


@functools.cache
def grouped_model():
    adata = grouped()
    LDVAE.setup_anndata(adata, batch_key="batch")
    scvi.settings.seed = 0
    model = LDVAE(adata, n_latent=4)
    model.train(15, kl_warmup="auto", batch_size=32, plan_kwargs={"lr": 1e-2}, **TRAIN)
    return model


def fresh(model):
    """The model's cells without anything that scvi-tools or an export left there."""
    return ad.AnnData(
        X=model.adata.X.copy(),
        obs=model.adata.obs[["batch", "type"]].copy(),
        var=pd.DataFrame(index=model.adata.var_names),
    )


def oblique(n, seed=0):
    """Axes of unit length with angles of some 60 to 120 degrees between them."""
    rng = np.random.default_rng(seed)
    matrix = ortho_group.rvs(n, random_state=seed) + 0.25 * rng.normal(size=(n, n))
    return matrix / np.linalg.norm(matrix, axis=0)


def orthogonal(n, seed=0):
    """Orthogonal axes."""
    return ortho_group.rvs(n, random_state=seed)


# What `turn_at_random` draws from; tests replace it by `oblique`.
random_axes = orthogonal


def turn_at_random(model, seed=3):
    """Axes that no rule would choose, in force; some point to their shorter tail."""
    axes = random_axes(model.n_latent, seed)
    matrix = axes * np.resize([-1, 1], model.n_latent)
    model.rotation_ = {"matrix": matrix, "method": "varimax"}
    return matrix


def as_stock(model):
    """The same network as a LinearSCVI of a copy of its cells."""
    adata = ad.AnnData(
        X=model.adata.X.copy(), obs=model.adata.obs[["batch"]].copy(), var=pd.DataFrame(index=model.adata.var_names)
    )
    LinearSCVI.setup_anndata(adata, batch_key="batch")
    stock = LinearSCVI(adata, n_latent=model.n_latent)
    stock.module.load_state_dict(model.module.state_dict())
    stock.module.eval()
    stock.is_trained_ = True
    return stock


def full_kl(mean_nk, variance_nk, rotation_kk):
    """Mean divergence of N(R'm, R'diag(v)R) from the prior N(0, R'R), from the full covariance matrix."""
    prior = rotation_kk.T @ rotation_kk
    precision, total = np.linalg.inv(prior), 0.0
    for mean_k, variance_k in zip(mean_nk.astype(float), variance_nk.astype(float)):
        covariance = rotation_kk.T @ np.diag(variance_k) @ rotation_kk
        center = rotation_kk.T @ mean_k
        log_det = np.linalg.slogdet(covariance)[1] - np.linalg.slogdet(prior)[1]
        total += 0.5 * (center @ precision @ center + np.trace(precision @ covariance) - len(mean_k) - log_det)
    return total / len(mean_nk)


def warnings_of(action, *args, **kwargs):
    """What was said, but for what is not ours to mend."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        action(*args, **kwargs)
    return [str(w.message) for w in said if issubclass(w.category, UserWarning) and "rotation" in str(w.message)]


def seeded(method, *args, **kwargs):
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - scvi-tools' own generator
    return method(*args, **kwargs)

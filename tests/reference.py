"""scvi-tools' network in float64, layer by layer, with columns written out: independent of how the package folds it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scipy import sparse
from scvi.distributions import NegativeBinomial, Normal, Poisson, ZeroInflatedNegativeBinomial

from tests.helpers import counts

# Columns of obs that `covariate_counts` makes.
CATEGORICAL, CONTINUOUS = ["lane", "site"], ["age", "dose"]


def covariate_counts(n_cells: int = 60, n_genes: int = 20, n_batches: int = 1, seed: int = 0) -> ad.AnnData:
    """Counts with covariates, labels and size factors; ``site`` has one level only, and names have slashes."""
    adata = counts(n_cells, n_genes, n_batches, seed)
    rng = np.random.default_rng(seed + 1)
    adata.obs["lane"] = pd.Categorical(rng.permutation(np.resize(["L/1", "L/2", "L 3"], n_cells)))
    adata.obs["site"] = pd.Categorical(["here/there"] * n_cells)
    adata.obs["age"] = rng.normal(size=n_cells)
    adata.obs["dose"] = rng.integers(0, 4, n_cells)
    adata.obs["size"] = rng.gamma(3.0, 1.0, n_cells) + 0.1
    adata.obs["type"] = pd.Categorical(rng.permutation(np.resize(["T/NK", "B"], n_cells)))
    return adata


def setup_arguments(
    covariates: str = "none", *, size_factor: bool = False, labels: bool = False, batch: bool = True
) -> dict[str, Any]:
    """Arguments of ``setup_anndata`` for data of :func:`covariate_counts`."""
    arguments: dict[str, Any] = {"batch_key": "batch" if batch else None}
    if covariates in ("categorical", "both"):
        arguments["categorical_covariate_keys"] = CATEGORICAL
    if covariates in ("continuous", "both"):
        arguments["continuous_covariate_keys"] = CONTINUOUS
    if size_factor:
        arguments["size_factor_key"] = "size"
    if labels:
        arguments["labels_key"] = "type"
    return arguments


def covariates_of(obs: pd.DataFrame, covariates: str) -> pd.DataFrame | None:
    """The covariates of cells as ``decode`` takes them."""
    names = [*(CONTINUOUS if covariates in ("continuous", "both") else [])]
    names += CATEGORICAL if covariates in ("categorical", "both") else []
    return obs[names] if names else None


def _one_hot(values: pd.Series) -> np.ndarray:
    """Indicator columns in the order of the sorted categories, as scvi-tools codes them; none for a single category."""
    categories = sorted(values.astype(str).unique())
    columns = np.array([[value == category for category in categories] for value in values.astype(str)], dtype=float)
    return columns if len(categories) > 1 else columns[:, :0]


def network64(model: Any, z: Any, obs: pd.DataFrame, covariates: str, library: Any) -> Any:
    """Distribution of the counts in float64; with ``logits``, ``dropout`` besides.

    ``obs`` must hold every batch, level and label at least once.
    """
    module = model.module
    inputs = [np.asarray(z, dtype=np.float64)]
    if covariates in ("continuous", "both"):
        inputs.append(obs[CONTINUOUS].to_numpy(dtype=np.float64))
    batch, label = _codes(obs["batch"]), _codes(obs["type"])
    if module.batch_representation == "embedding":
        inputs.append(module.embeddings_dict["batch"].weight.detach().double().numpy()[batch])
    else:
        inputs.append(_one_hot(obs["batch"]))
    if covariates in ("categorical", "both"):
        inputs += [_one_hot(obs[name]) for name in CATEGORICAL]
    columns = torch.as_tensor(np.concatenate(inputs, axis=1))

    def head(layers: Any) -> torch.Tensor:
        out = columns
        for layer in layers.fc_layers[0]:
            out = out if layer is None else deepcopy(layer).double().eval()(out)
        return out

    with torch.no_grad():
        logits = head(module.decoder.factor_regressor)
        scale = torch.nn.functional.softplus(logits) if module.use_size_factor_key else torch.softmax(logits, dim=-1)
        rate = torch.as_tensor(np.broadcast_to(library, len(scale)).astype(np.float64).copy())[:, None] * scale
        dropout = head(module.decoder.px_dropout_decoder) if module.gene_likelihood == "zinb" else None
        theta = None
        if module.gene_likelihood != "poisson":
            if module.dispersion == "gene-cell":
                theta = head(module.decoder.px_r_decoder).exp()
            else:
                theta = module.px_r.double().exp()
                codes = {"gene-batch": batch, "gene-label": label}.get(module.dispersion)
                theta = theta if codes is None else theta.T[codes]
        px = {
            "poisson": lambda: Poisson(rate, scale=scale),
            "nb": lambda: NegativeBinomial(mu=rate, theta=theta, scale=scale),
            "zinb": lambda: ZeroInflatedNegativeBinomial(mu=rate, theta=theta, zi_logits=dropout, scale=scale),
            "normal": lambda: Normal(rate, theta, normal_mu=scale),
        }[module.gene_likelihood]()
    px.parts = {"scale": scale, "rate": rate, "theta": theta, "dropout": dropout, "logits": logits}
    return px


def _codes(values: pd.Series) -> np.ndarray:
    return np.searchsorted(sorted(values.astype(str).unique()), values.astype(str)).astype(np.int64)


def brute_force(model: Any, adata: ad.AnnData, covariates: str, value_k: np.ndarray) -> np.ndarray:
    """Paired change of the NLL, latent by latent; dispersion, dropout and library are those of the unablated cell."""
    module, obs = model.module, adata.obs
    x = torch.as_tensor(adata.X.toarray() if sparse.issparse(adata.X) else np.asarray(adata.X))
    given: dict[str, Any] = {"batch_index": torch.as_tensor(_codes(obs["batch"])).reshape(-1, 1)}
    if covariates in ("continuous", "both"):
        given["cont_covs"] = torch.as_tensor(obs[CONTINUOUS].to_numpy(dtype=np.float32))
    if covariates in ("categorical", "both"):
        given["cat_covs"] = torch.as_tensor(np.stack([_codes(obs[name]) for name in CATEGORICAL], axis=1))
    with torch.no_grad():
        out = module.inference(x, **given)
    mean = out["qz"].loc.double()
    if module.use_size_factor_key:
        library = obs["size"].to_numpy()
    elif module.use_observed_lib_size:
        library = x.double().sum(1).numpy()
    else:
        library = out["ql"].loc.double().exp().ravel().numpy()

    def generate(u: torch.Tensor) -> Any:
        return network64(model, module.z_encoder.z_transformation(u), obs, covariates, library)

    full, effect = generate(mean), np.empty(mean.shape)
    for k in range(mean.shape[1]):
        moved = mean.clone()
        moved[:, k] = float(value_k[k])
        px = generate(moved)
        if module.gene_likelihood == "zinb":
            px.zi_logits = full.zi_logits
        if module.dispersion == "gene-cell" and module.gene_likelihood in ("nb", "zinb"):
            px.theta = full.theta
        if module.dispersion == "gene-cell" and module.gene_likelihood == "normal":
            px.scale = full.scale
        effect[:, k] = (full.log_prob(x.double()) - px.log_prob(x.double())).sum(-1).numpy()
    return effect

"""What several test files share: small data, small models, and computations that are independent of the package."""

from __future__ import annotations

import itertools
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scvi
import torch
from scipy import sparse
from scvi.distributions import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial

from ldvae_ext.model import LDVAE

TRAIN = {"accelerator": "cpu", "enable_progress_bar": False}

# The grid over which the decoder must be exact.
GRID = [
    dict(
        zip(
            ("use_batch_norm", "bias", "n_batches", "gene_likelihood", "latent_distribution", "dispersion"),
            values,
            strict=True,
        )
    )
    for values in itertools.product(
        (True, False), (True, False), (1, 3), ("nb", "zinb", "poisson"), ("normal", "ln"), ("gene", "gene-batch")
    )
]


def grid_id(case: dict[str, Any]) -> str:
    return "-".join(f"{value}" for value in case.values())


def counts(n_cells: int = 60, n_genes: int = 20, n_batches: int = 1, seed: int = 0) -> ad.AnnData:
    """Over-dispersed counts with a batch column whose first label has a slash in it."""
    rng = np.random.default_rng(seed)
    rate = rng.gamma(0.5, 4.0, n_genes) * rng.gamma(2.0, 0.5, (n_cells, n_genes))
    labels = ["CD4+/CD25 T", "b1", "b2"][:n_batches]
    x = rng.poisson(rate)
    x[:, 0] += 1  # no empty cells
    return ad.AnnData(
        X=sparse.csr_matrix(x.astype(np.float32)),
        obs=pd.DataFrame(
            {
                "batch": pd.Categorical(
                    np.array(labels)[rng.permutation(np.arange(n_cells) % n_batches)], categories=labels
                )
            },
            index=[f"cell{i}" for i in range(n_cells)],
        ),
        var=pd.DataFrame(index=[f"gene{i}" for i in range(n_genes)]),
    )


def untrained(
    adata: ad.AnnData,
    n_latent: int = 4,
    *,
    cls: type = LDVAE,
    seed: int = 0,
    setup: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """A model with random parameters *and* random batch-norm statistics, in evaluation mode."""
    cls.setup_anndata(adata, **{"batch_key": "batch", **(setup or {})})
    scvi.settings.seed = seed
    model = cls(adata, n_latent=n_latent, **kwargs)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in itertools.chain(model.module.named_parameters(), model.module.named_buffers()):
            if not value.is_floating_point() or "library" in name:
                continue
            noise = torch.rand(value.shape, generator=generator)
            value.copy_(noise + 0.3 if name.endswith(("running_var", "1.weight")) else 1.5 * (noise - 0.5))
    model.module.eval()
    model.is_trained_ = True
    return model


def network(model: Any, z: Any, batch: Any, library: Any) -> Any:
    """Distribution of the counts from scvi-tools' own layers in float64.

    ``generative`` itself cannot run in float64, since scvi-tools casts its one-hot vectors to float32.
    """
    module = model.module
    batch = torch.as_tensor(np.asarray(batch), dtype=torch.int64).reshape(-1, 1)
    library = torch.as_tensor(np.broadcast_to(library, len(batch)).copy(), dtype=torch.float64).reshape(-1, 1)
    module.double()
    try:
        with torch.no_grad():
            z = torch.as_tensor(z, dtype=torch.float64)
            scale, _, rate, dropout = module.decoder(module.dispersion, z, library.log(), batch)
            theta = module.px_r.exp()
            theta = theta.T[batch.ravel()] if module.dispersion == "gene-batch" else theta
            if module.gene_likelihood == "poisson":
                return Poisson(rate, scale=scale)
            if module.gene_likelihood == "nb":
                return NegativeBinomial(mu=rate, theta=theta, scale=scale)
            return ZeroInflatedNegativeBinomial(mu=rate, theta=theta, zi_logits=dropout, scale=scale)
    finally:
        module.float()


def brute_force_ablation(model: Any, adata: ad.AnnData, value_k: np.ndarray) -> np.ndarray:
    """Paired change of the NLL by scvi-tools' own network and distributions in float64, latent by latent."""
    module = model.module
    x = torch.as_tensor(adata.X.toarray() if sparse.issparse(adata.X) else adata.X, dtype=torch.float32)
    batch = pd.Categorical(adata.obs["batch"]).codes.astype(np.int64)
    with torch.no_grad():
        inference = module.inference(x, torch.as_tensor(batch).reshape(-1, 1))
    mean = inference["qz"].loc.double()
    library = x.double().sum(1) if module.use_observed_lib_size else inference["ql"].loc.double().exp().ravel()

    def generate(u: torch.Tensor) -> Any:
        return network(model, module.z_encoder.z_transformation(u), batch, library.numpy())

    full = generate(mean)
    out = np.empty(mean.shape)
    for k in range(mean.shape[1]):
        moved = mean.clone()
        moved[:, k] = float(value_k[k])
        px = generate(moved)
        if module.gene_likelihood == "zinb":
            px.zi_logits = full.zi_logits
        out[:, k] = (full.log_prob(x.double()) - px.log_prob(x.double())).sum(-1).numpy()
    return out

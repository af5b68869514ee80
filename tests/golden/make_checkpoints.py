"""Writes checkpoints of scvi.model.LinearSCVI, and beside each what the scvi-tools that wrote it computes from it.

Run in an environment with the scvi-tools whose checkpoints are wanted; it needs nothing of ldvae_ext. See README.md.
"""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scvi
import torch
from scipy import sparse
from scvi.model import LinearSCVI

BATCHES = ["CD4+/CD25 T", "b1", "b2"]
N_CELLS, N_GENES, N_LATENT = 80, 30, 3
LIBRARY = 500.0
CASES = {
    "default": {},
    "zinb": {
        "gene_likelihood": "zinb",
        "dispersion": "gene-batch",
        "use_observed_lib_size": True,
        "use_batch_norm": False,
        "bias": True,
    },
    # LinearSCVI takes a string for True where it builds the decoder, and for False where it reads the loadings.
    "encoder": {"use_batch_norm": "encoder"},
}


def simulate() -> ad.AnnData:
    """Counts with two programs of genes and a batch effect; the first batch has a slash in its name."""
    rng = np.random.default_rng(0)
    batch = rng.permutation(np.arange(N_CELLS) % len(BATCHES))
    log_rate = (
        rng.normal(1.0, 0.8, N_GENES)
        + rng.normal(0.0, 1.0, (N_CELLS, 2)) @ rng.normal(0.0, 0.5, (2, N_GENES))
        + rng.normal(0.0, 0.3, (len(BATCHES), N_GENES))[batch]
    )
    x = rng.poisson(np.exp(log_rate) * rng.gamma(3.0, 1 / 3, (N_CELLS, N_GENES)))
    x[:, 0] += 1  # no empty cells
    return ad.AnnData(
        X=sparse.csr_matrix(x.astype(np.float32)),
        obs=pd.DataFrame(
            {"batch": pd.Categorical(np.array(BATCHES)[batch], categories=BATCHES)},
            index=[f"cell{i}" for i in range(N_CELLS)],
        ),
        var=pd.DataFrame(index=[f"gene{i}" for i in range(N_GENES)]),
    )


def latents() -> tuple[np.ndarray, np.ndarray]:
    """In every batch the origin, the unit vectors and some other latents; and the codes of the batches."""
    other = np.random.default_rng(1).uniform(-3.0, 3.0, (6, N_LATENT))
    z = np.concatenate([np.zeros((1, N_LATENT)), np.eye(N_LATENT), other]).astype(np.float32)
    return np.tile(z, (len(BATCHES), 1)), np.repeat(np.arange(len(BATCHES)), len(z))


def generate(
    model: LinearSCVI, z: np.ndarray, library: np.ndarray, batch: np.ndarray
) -> torch.distributions.Distribution:
    return model.module.generative(
        z=torch.as_tensor(z),
        library=torch.as_tensor(library, dtype=torch.float32).reshape(-1, 1).log(),
        batch_index=torch.as_tensor(batch).reshape(-1, 1),
    )["px"]


@torch.inference_mode()
def expected(model: LinearSCVI) -> dict[str, np.ndarray]:
    """What the model says, without drawing: latents, libraries and likelihoods of its cells; the decoder at fixed latents."""
    module = model.module.eval()
    x = torch.as_tensor(model.adata.X.toarray())
    batch_n = model.adata.obs["batch"].cat.codes.to_numpy().astype(np.int64)
    encoded = module.inference(x, torch.as_tensor(batch_n).reshape(-1, 1))
    log_library = encoded["library"] if module.use_observed_lib_size else encoded["ql"].loc
    mean, variance = model.get_latent_representation(return_dist=True)
    library = log_library.exp().numpy().ravel()
    z, batch = latents()
    px = generate(model, z, np.full(len(z), LIBRARY), batch)
    out = {
        "latent_mean": mean,
        "latent_variance": variance,
        "library": library,
        "log_likelihood": generate(model, mean, library, batch_n).log_prob(x).sum(-1).numpy(),
        "loadings": model.get_loadings().to_numpy(),
        "z": z,
        "batch": np.array(BATCHES)[batch],
        "scale": px.scale.numpy(),
        "rate": px.mu.numpy(),
        "theta": px.theta.expand_as(px.mu).numpy(),
        "elbo_train": model.history["elbo_train"].to_numpy(dtype=float).ravel(),
    }
    if module.gene_likelihood == "zinb":
        out["zi_logits"] = px.zi_logits.numpy()
    return out


def write(folder: Path) -> None:
    packages = ["scvi-tools", "torch", "anndata", "lightning", "numpy", "pandas"]
    made_with = [f"python {platform.python_version()}"] + [f"{name} {version(name)}" for name in packages]
    for name, arguments in CASES.items():
        adata = simulate()
        LinearSCVI.setup_anndata(adata, batch_key="batch")
        scvi.settings.seed = 0
        model = LinearSCVI(adata, n_hidden=16, n_latent=N_LATENT, **arguments)
        model.train(
            40,
            batch_size=24,
            accelerator="cpu",
            enable_progress_bar=False,
            plan_kwargs={"lr": 5e-3, "n_epochs_kl_warmup": 10},
        )
        target = folder / f"linear_scvi_{scvi.__version__}_{name}"
        model.save(str(target), overwrite=True, save_anndata=True)
        np.savez_compressed(target / "expected.npz", made_with=np.array(made_with), **expected(model))


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)

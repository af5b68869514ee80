"""Decoders with everything that a decoder can have, made of random numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from ldvae_ext.core import BatchNorm, Covariate, LinearDecoder, RawLinear

COVARIATES = (Covariate("age"), Covariate("lane", ["L/1", "L/2"]), Covariate("site", ["only"]))


def full_decoder(
    seed: int = 0, n_genes: int = 9, n_factors: int = 3, n_batches: int = 2, **changes: Any
) -> LinearDecoder:
    """A continuous covariate and two categorical ones; by default two batches, ``zinb`` and ``gene-cell``."""
    rng = np.random.default_rng(seed)
    likelihood, dispersion = changes.get("likelihood", "zinb"), changes.get("dispersion", "gene-cell")
    covariates = changes.pop("covariates", COVARIATES)
    n_columns = sum(covariate.n_columns for covariate in covariates)
    parts: dict[str, Any] = {}
    heads = {
        "": True,
        "dropout_": likelihood == "zinb",
        "dispersion_": dispersion == "gene-cell" and likelihood != "poisson",
    }
    for head, present in heads.items():
        weight, intercept = rng.normal(size=(n_genes, n_factors)), rng.normal(size=(n_batches, n_genes))
        effect = rng.normal(size=(n_columns, n_genes))
        if present:
            parts |= {f"{head}weight_gk": weight, f"{head}intercept_bg": intercept}
            parts |= {f"{head}covariate_cg": effect} if n_columns else {}
    rows = {"gene": 1, "gene-batch": n_batches, "gene-label": 3}.get(dispersion)
    if likelihood != "poisson" and rows is not None:
        parts["theta_bg"] = rng.gamma(2.0, 1.0, (rows, n_genes))
        if dispersion == "gene-label":
            parts["labels"] = ["T/NK", "B", "other"]
    raw = RawLinear(
        weight=rng.normal(size=(n_genes, n_factors + 1 + 4 + 2)),
        bias=rng.normal(size=n_genes),
        batch_embedding=rng.normal(size=(n_batches, 4)),
        batch_norm=BatchNorm(
            running_mean=rng.normal(size=n_genes),
            running_var=rng.gamma(1.0, 1.0, n_genes),
            gamma=rng.normal(size=n_genes),
            beta=rng.normal(size=n_genes),
            eps=1e-3,
        ),
    )
    return LinearDecoder(
        **{
            "genes": [f"g{i}" for i in range(n_genes)],
            "batches": ["CD4+/CD25 T", "other", "third"][:n_batches],
            "factors": [f"Z_{k}" for k in range(n_factors)],
            "likelihood": likelihood,
            "dispersion": dispersion,
            "covariates": covariates,
            "raw": raw,
            "raw_dropout": raw if likelihood == "zinb" else None,
            **parts,
            **changes,
        }
    )


def cells(decoder: LinearDecoder, n_cells: int = 7, seed: int = 1) -> dict[str, Any]:
    """Latents, batches, covariates and labels that a decoder of :func:`full_decoder` can read."""
    rng = np.random.default_rng(seed)
    n_factors = len(decoder.factors)
    simplex = decoder.latent_distribution == "ln"
    values = {"age": rng.normal(size=n_cells), "lane": rng.integers(0, 2, n_cells), "site": 0}
    return {
        "z": rng.dirichlet(np.ones(n_factors), n_cells) if simplex else rng.normal(0, 2, (n_cells, n_factors)),
        "batch": rng.integers(0, len(decoder.batches), n_cells),
        "covariates": {c.name: values[c.name] for c in decoder.covariates} or None,
        "label": rng.integers(0, 3, n_cells),
    }

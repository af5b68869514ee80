"""Counts and a trained model; made once for each commit."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import scvi
import torch
from anndata import AnnData
from threadpoolctl import threadpool_limits

from ldvae_ext import datasets

N_CELLS, N_GENES, N_LATENT = 2048, 1000, 10
TRAIN = {"accelerator": "cpu", "enable_progress_bar": False, "plan_kwargs": {"lr": 5e-3}}


def alone() -> None:
    """One thread, and silence."""
    torch.set_num_threads(1)
    threadpool_limits(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    scvi.settings.verbosity = logging.ERROR


def counts() -> AnnData:
    adata, _ = datasets.simulate(N_CELLS, N_GENES, N_LATENT, n_populations=8, median_library=0.2 * N_GENES)
    return adata


def fresh(adata: AnnData) -> Any:
    from ldvae_ext.model import LDVAE

    LDVAE.setup_anndata(adata)
    scvi.settings.seed = 0
    return LDVAE(adata, n_latent=N_LATENT)


def trained() -> Any:
    alone()
    model = fresh(counts())
    model.train(2, **TRAIN)
    model.export_to_anndata()
    return model
